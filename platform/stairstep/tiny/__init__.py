"""The embedded world: tinywiki (its articles, pages, fonts and files) and the tiny models' configs and tokenizer.

Everything here is made from a seed and nothing else, so a newcomer's first run, the tests and the shipped models need no download.
"""
