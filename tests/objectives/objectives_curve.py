"""Twenty steps of the toy on any collective, text-only steps among them; run as a script, on a real gloo group.

python objectives_curve.py PROCESSES OUTPUT_FOLDER
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from objectives_toy import ToyEncoder, gradients, make_case

from stairstep.objectives import Collective, ObjectiveSettings, ProcessGroup, build_objective, cached_step

STEPS, RATE = 20, 0.05


def curve(collective: Collective, dtype: torch.dtype = torch.float32, steps: int = STEPS) -> dict[str, Any]:
    """Losses by step, and the gradients of the first tile step and of the first text step."""
    encoder, objective = ToyEncoder(dtype=dtype), build_objective(ObjectiveSettings()).to(dtype)
    parameters, learned = encoder.trained(), list(objective.parameters())
    losses, first = [], {}
    for step in range(steps):
        tiles = step % 4 != 1
        case = make_case(rows=8, hard=2 if tiles else 0, dtype=dtype, tiles=tiles, seed=step % 5)
        chunks = case.chunks(chunk_items=5) if tiles else case.chunks()  # a text step: two chunks, so some ranks have none
        output = cached_step(
            chunks,
            case.encode(encoder),
            case.loss(objective),
            parameters=parameters,
            loss_parameters=learned,
            collective=collective,
            seed=1,
            step=step,
        )
        losses.append(output.loss)
        if step < 2:
            first[step] = gradients(encoder, objective)
        with torch.no_grad():  # plain descent: unlike Adam's, its curve shows a gradient that is too long
            for one in parameters + learned:
                if one.grad is not None:
                    one.sub_(RATE * one.grad)
                    one.grad = None
        objective.clamp_()
    return {"losses": losses, "gradients": first, "weights": [one.detach().clone() for one in parameters + learned]}


def exchanges(group: ProcessGroup) -> dict[str, Any]:
    """What each operation gives, for uneven rows of several types (the middle ranks have none) and tensors of mixed types."""
    found: dict[str, Any] = {}
    counts = [(3 * rank) % 4 if rank in (0, group.size - 1) else 0 for rank in range(group.size)]
    counts[0] = 2
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64):
        local = torch.full((counts[group.rank], 3), 10 + group.rank, dtype=dtype)
        found[f"rows {dtype}"] = (counts, group.gather_rows(local, counts))
    found["no rows"] = group.gather_rows(torch.empty(0, 3), [0] * group.size)
    tensors = [torch.full((2, 2), group.rank + 0.5), torch.tensor(1.0, dtype=torch.float64), torch.ones(3, dtype=torch.bfloat16)]
    group.sum_(tensors)
    group.sum_([])
    found["sums"] = tensors
    found["any"] = (group.any(group.rank == 1), group.any(False))
    group.barrier()
    return found


def main(rank: int, size: int, folder: str) -> None:
    """One process: once in a group of the first two, once in the group of all."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    pair = dist.new_group([0, 1])
    results = {}
    if rank < 2:
        two = ProcessGroup(pair)
        results[2] = {**curve(two), "exchanges": exchanges(two)}
    everyone = ProcessGroup()
    results[size] = {**curve(everyone), "exchanges": exchanges(everyone)}
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked, so that torch (and what its backward imports at first use) is imported once; nothing has been computed yet that had threads.
    importlib.import_module("torch.fx.experimental.symbolic_shapes")
    processes, output = int(sys.argv[1]), sys.argv[2]
    torch.multiprocessing.start_processes(main, args=(processes, output), nprocs=processes, start_method="fork")
