"""Copies of what lies in an object store, for whoever reads it, and what the names of its objects say.

A copy to read is made again by what has changed, so that a look every few seconds costs a listing. It has no checkpoints and no files of
trackers.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from stairstep.settings import InputError, StairstepError

from .cache import copy_folder
from .files import COMPLETE, locked, parse_temporary, write_atomically
from .places import ObjectFolder

_LOG = logging.getLogger(__name__)
LOCK = ".lock"
STATUS = "status.json"
WANTED = "beside/wanted-"
"""How the wishes for an evaluation beside training begin (tasks/beside.py)."""
AT_THE_END = ("tensorboard", "wandb")
"""Folders of files that grow, for people."""
_CHECKPOINT = re.compile(r"((?:[^/]+/)*checkpoint-\d+)/.+")
_AT_ONCE = 8


def fetch(remote: ObjectFolder, names: Iterable[str], folder: Path) -> None:
    """Copy objects to a folder, markers of complete folders last."""
    wanted = sorted(names)

    def one(name: str) -> None:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        remote.get_file(name, target)

    with ThreadPoolExecutor(_AT_ONCE, "fetch") as pool:
        list(pool.map(one, (name for name in wanted if not name.endswith(f"/{COMPLETE}"))))
        list(pool.map(one, (name for name in wanted if name.endswith(f"/{COMPLETE}"))))


def offer(remote: ObjectFolder, folder: Path, name: str) -> None:
    """Put a file, for people; one that cannot be put is told and let be."""
    try:
        remote.put_file(name, folder / name)
    except (StairstepError, OSError) as error:
        _LOG.warning("%s could not be put into the store: %s", folder / name, error)


def copy_to_read(remote: ObjectFolder) -> Path:
    """A copy of a run, a sweep or an evaluation, or of those directly in a folder, for whoever reads them: all but checkpoints and
    trackers' files, and only what has changed since the last copy."""
    folder = copy_folder("read", remote) / remote.name
    folder.mkdir(exist_ok=True)
    with locked(folder.parent / LOCK):
        if remote.exists("recipe.yaml") or any(name.endswith(".summary.json") for name in remote.files(deep=False)):
            follow(remote, folder)
            return folder
        there = [name for name in remote.folders() if (remote / name).exists("recipe.yaml")]
        if not there:
            expected = "expected the URL of a run or a sweep (it has a recipe.yaml), or of a folder of them"
            raise InputError(f"{remote}: no run and no sweep is here; {expected}")
        for path in folder.iterdir():
            if path.name not in there:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in there:
            follow(remote / name, folder / name)
    return folder


@contextmanager
def told_as(folder: Path, where: str) -> Iterator[None]:
    """What is wrong with a copy is told of what it is the copy of."""
    try:
        yield
    except StairstepError as error:
        raise type(error)(str(error).replace(str(folder), where)) from None


def follow(remote: ObjectFolder, folder: Path) -> list[str]:
    """Make a folder what the store has of runs, evaluations or a sweep now, less checkpoints and trackers' files; what is unchanged
    stays. Returns the names of all objects there."""
    found = remote.files()
    listed = {
        name: stored
        for name, stored in found.items()
        if is_plain(name) and not checkpoint_of(name) and not set(name.split("/")) & set(AT_THE_END)
    }
    wanted = {one.as_posix() for name in listed for one in (PurePosixPath(name), *PurePosixPath(name).parents)}
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.relative_to(folder).as_posix() not in wanted:
            path.rmdir() if path.is_dir() else path.unlink()
    here = {name: folder / name for name in listed if (folder / name).is_file()}
    had = {name: (path.stat().st_size, path.stat().st_mtime_ns) for name, path in here.items()}
    changed = [name for name, stored in listed.items() if had.get(name) != (stored.size, stored.time_ns)]

    def one(name: str) -> None:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        data = remote.get(name)  # of one moment: what grows or is replaced meanwhile is read whole
        if data is not None:
            write_atomically(target, data, durable=False)
            os.utime(target, ns=(listed[name].time_ns, listed[name].time_ns))

    with ThreadPoolExecutor(_AT_ONCE, "follow") as pool:
        for turn in sorted(set(map(turn_of, changed))):
            list(pool.map(one, (name for name in changed if turn_of(name) == turn)))
    return list(found)


def turn_of(name: str) -> int:
    """When an object is put: what it relies upon comes before it."""
    if name == "recipe.yaml":
        return 0
    if name in (STATUS, "sweep.json"):
        return 5
    if checkpoint_of(name):
        return 4 if name.endswith(f"/{COMPLETE}") else 3
    if name.startswith(WANTED):
        return 5  # who sees that a checkpoint is to be evaluated finds it
    return 2 if name.endswith(".summary.json") or name.startswith("trials/") else 1


def checkpoint_of(name: str) -> str:
    """The checkpoint that an object belongs to; empty for any other."""
    found = _CHECKPOINT.fullmatch(name)
    return found[1] if found else ""


def is_plain(name: str) -> bool:
    """Whether an object's name is one of a file in a run folder; others are let alone."""
    parts = name.split("/")
    return parts[-1] != LOCK and all(part not in ("", ".", "..") and parse_temporary(part) is None for part in parts)


def mapping(data: bytes | None) -> dict[str, Any]:
    try:
        plain = json.loads(data or b"{}")
    except ValueError:
        return {}
    return plain if isinstance(plain, dict) else {}
