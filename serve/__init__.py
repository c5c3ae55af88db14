"""The Ray Serve application that reads: an OpenAI-compatible endpoint in front of one of two engines, `transformers` or `vllm`.

`serve.reader` builds it; everything else here is plain Python that a test calls without Ray. Not to be taken for `ray.serve`.
"""
