"""Make the tiny models that ship in the package, from nothing but a seed: on a GPU in minutes, on 2 CPU cores in about two hours each.

python -m jobs.make_tiny                                         both, into runs/make_tiny
python -m jobs.make_tiny --model reader --device cpu --out DIR
python -m jobs.make_tiny --model reader reading:optim.steps=500  with overrides of a stage's recipe in recipes/tiny/
python -m jobs.make_tiny --exam --questions 150                  only the exam, of the models that ship

Started again, it goes on where it was. The models lie in DIR/tiny-embedder and DIR/tiny-reader; to ship them, copy their files over those
in platform/stairstep/tiny/bases/.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from jobs.common import run
from stairstep.records import StopFlag, logging_setup
from stairstep.settings import InputError
from stairstep.tasks.pretraining.make import REPORTED_SEEDS, STAGES, examine, make

RECIPES = Path(__file__).parent.parent / "recipes" / "tiny"


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; say --device cpu")
    return torch.device(name)


def main(arguments: list[str]) -> int:
    """Make one model or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/make_tiny"))
    parser.add_argument("--workers", type=int, default=None, help="processes that draw pages; default: half of the cores, at most 14")
    parser.add_argument("--questions", type=int, default=1000, help="questions of each world of the final exam")
    parser.add_argument("--exam", action="store_true", help="make nothing; examine the models that ship")
    parser.add_argument("overrides", nargs="*", metavar="stage:key.path=value")
    options = parser.parse_intermixed_args(arguments)
    for text in options.overrides:
        if ":" not in text.partition("=")[0]:
            raise InputError(f"'{text}': expected stage:key.path=value, for example reading:optim.steps=500")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging_setup()
    workers = options.workers if options.workers is not None else min(14, max(1, (os.cpu_count() or 2) // 2))
    kinds = list(STAGES) if options.model == "all" else [options.model]
    if options.exam:
        for kind in kinds:
            for seed in REPORTED_SEEDS:
                for name, one in examine(kind, f"tiny-{kind}", _device(options.device), seed, options.questions).items():
                    print(f"tiny-{kind}, world {seed}: {name:<15} {one.value:.3f} [{one.low:.3f} {one.high:.3f}]  n={one.n}", flush=True)
        return 0
    with StopFlag() as stop:
        for kind in kinds:
            made = make(
                kind, RECIPES, options.out, _device(options.device), workers, options.overrides, options.questions, lambda: bool(stop)
            )
            if made is None:
                print(f"stopped; the same command goes on with {options.out}")
                return 0
            print(f"made {made}")
    return 0


if __name__ == "__main__":
    run(main)
