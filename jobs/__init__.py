"""One short module a verb: `python -m jobs.<verb> RECIPE.yaml key.path=value ...` from the repository root."""
