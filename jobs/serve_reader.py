"""Serve a reader, OpenAI-compatible, until Ctrl-C: the tiny one on this machine's CPU unless told otherwise.

python -m jobs.serve_reader                                                 the tiny reader
python -m jobs.serve_reader port=8300 engine.model=runs/reading/checkpoint-900
python -m jobs.serve_reader engine.kind=vllm                                Qwen3-VL-4B-Instruct on a GPU
python -m jobs.serve_reader host=0.0.0.0 key_env=READER_API_KEY             for other machines, with a key

`--show` prints every setting. It runs on the Ray cluster that RAY_ADDRESS names, else on a private one. A reader that is deployed
there already is never replaced; it ends only what it started.
"""

from __future__ import annotations

import argparse
import signal
import threading
from dataclasses import dataclass

from jobs.common import run
from serve.settings import ReaderAppSettings, check_host
from stairstep.settings import apply_overrides, build, from_plain, setting, to_yaml


@dataclass(frozen=True)
class ServeSettings(ReaderAppSettings):
    """The reader app, and where it listens."""

    host: str = setting("127.0.0.1", doc="Address to listen on; any but this machine's own needs key_env.")
    port: int = setting(8200, minimum=0, maximum=65535, doc="Port to listen on; 0 = a free one.")


def main(arguments: list[str]) -> int:
    """Start, say where, wait."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings, for example limits.queue=64")
    parser.add_argument("--show", action="store_true", help="print every setting, and stop")
    options = parser.parse_intermixed_args(arguments)
    settings = build(ServeSettings, apply_overrides(from_plain({}, "jobs.serve_reader"), options.overrides))
    if options.show:
        print(to_yaml(settings), end="")
        return 0
    check_host(settings, settings.host)
    from serve.reader import serving
    from stairstep.cluster.session import ray_session

    ended = threading.Event()
    with ray_session(None):
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, lambda *_: ended.set())
        with serving(settings, settings.port, settings.host) as base_url:
            print(f"{settings.model_name} answers at {base_url}; Ctrl-C ends it", flush=True)
            while not ended.wait(1.0):
                pass
    return 0


if __name__ == "__main__":
    run(main)
