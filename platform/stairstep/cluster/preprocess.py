"""Preprocessing on Ray Data: the blocks of `tasks.preprocessing` as tasks on the CPUs of any node, as many at once as there are CPUs.

A block's result is a value even where it failed, because Ray Data knows no errors of single rows: an exception would end the whole job with
a traceback from another machine. Blocks of a worker that dies are done again by Ray; a shard is whole or absent, so nothing is torn.
"""

from __future__ import annotations

import errno
import logging
import os
import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import ray
import ray.data
from ray.exceptions import RayError

from stairstep.records.places import is_url
from stairstep.settings import StairstepError
from stairstep.tasks import Recipe
from stairstep.tasks.preprocessing import Summary, preprocess

from .session import check_root, ray_session

S = TypeVar("S")
T = TypeVar("T")
_GROUP = "ray-subcluster"  # the one label by which Ray Data tells nodes apart


def preprocess_on_ray(recipe: Recipe, stop: Callable[[], bool] = lambda: False) -> Summary:
    """Fill the recipe's tile store with all CPUs of the cluster, or of this machine; Ray is not started where nothing is to be done."""
    if not is_url(recipe.run.root):  # the store and its tiles are there for all nodes, and nothing else of the root is shared
        check_root(recipe.run.root, recipe.cluster.address)
    check_root(recipe.tiles.store, recipe.cluster.address, "tiles.store")
    with ExitStack() as stack:

        def on_ray(work: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
            if items and not ray.is_initialized():
                stack.enter_context(ray_session(recipe.cluster.address))
            return spread(work, items, recipe.cluster.preprocess_group)

        return preprocess(recipe, on_ray, stop)


def spread(work: Callable[[S], T], items: Sequence[S], group: str | None = None) -> Iterator[T]:
    """The results of `work` over items, one Ray task each, as they come; on the nodes of a group, where one is named."""
    if not items:
        return
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # By label and not by custom resource: what Ray Data asks of the autoscaler, and what it counts as its share, knows no custom resources.
    context.execution_options.label_selector = {_GROUP: group} if group is not None else None
    shared = ray.put(work)
    rows = [{"item": pickle.dumps(item)} for item in items]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(_Call(shared), num_cpus=1)
    try:
        for row in dataset.iter_rows():
            outcome = pickle.loads(row["outcome"])  # noqa: S301 - made by our own workers
            if isinstance(outcome, Exception):
                raise outcome
            yield outcome
    except RayError as error:
        raise StairstepError(f"preprocessing ended: {str(error).strip().splitlines()[-1]}; the same command goes on") from error


_LAST: list[tuple[Any, Any]] = []  # the work that this process did last, by its reference: it may hold the indices of many archives


def _held(reference: Any) -> Any:
    """The work behind a reference, made once in a process and not for each of its items."""
    if not _LAST or _LAST[0][0] != reference:
        _LAST[:] = [(reference, ray.get(reference))]
    return _LAST[0][1]


class _Call:
    """What a task does with a row; the work itself lies in Ray's object store once, and not in each of a thousand rows."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """One item's outcome, or the failure that the job is to tell."""
        import torch

        torch.set_num_threads(1)
        item = pickle.loads(row["item"])  # noqa: S301 - made by the driver
        outcome: Any
        try:
            outcome = _held(self.work)(item)
        except StairstepError as error:
            outcome = error
        except OSError as error:
            outcome = OSError(error.errno or errno.EIO, f"{error.strerror or error} (on node {os.uname().nodename})", error.filename)
        except Exception as error:  # noqa: BLE001 - Ray would tell it as a failure of its own, and hide what it was
            said = f"preprocessing failed on node {os.uname().nodename} with {type(error).__name__}: {error}"
            outcome = StairstepError(f"{said}\n{traceback.format_exc()}")
        return {"outcome": pickle.dumps(outcome)}
