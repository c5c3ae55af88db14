"""Where a run lies, and where it is worked on when its root is a URL: in a copy on this machine, which the store mirrors.

Ledger, embeddings and tile store below such a root lie in the store itself. For a root that is a folder all of this is that folder.
"""

from __future__ import annotations

import logging
from pathlib import Path

from stairstep.records import RunFolder
from stairstep.records.cache import copy_folder
from stairstep.records.copies import fetch
from stairstep.records.followed import FollowedRunFolder
from stairstep.records.mirror import MirroredRunFolder
from stairstep.records.places import ObjectFolder, below, place
from stairstep.settings import InputError

from .recipe import Recipe

_LOG = logging.getLogger(__name__)


def local_root(recipe: Recipe) -> Path:
    """The run root, or where this machine keeps what belongs to one in an object store: copies of its runs, indices, generated worlds."""
    root = place(recipe.run.root)
    return copy_folder("runs", root) if isinstance(root, ObjectFolder) else root


def run_place(recipe: Recipe) -> Path | ObjectFolder:
    """Where the recipe's run lies."""
    assert recipe.run.name is not None, "load_recipe gives every run a name"
    return below(recipe.run.root, recipe.run.name)


def working_copy(recipe: Recipe) -> Path:
    """The folder on this machine in which the first worker writes the recipe's run: the run folder itself, or a copy of it."""
    place = run_place(recipe)
    return local_root(recipe) / place.name if isinstance(place, ObjectFolder) else place


def open_placed(recipe: Recipe, rank: int = 0, patience_s: float = 0.0) -> RunFolder:
    """The folder of the recipe's run as this worker has it; the first one makes it, and writes it. `patience_s`: for how long a store that
    cannot be reached is asked again by that one."""
    remote = run_place(recipe)
    if not isinstance(remote, ObjectFolder):
        return RunFolder(remote) if rank else RunFolder.create(remote)
    if rank:
        return FollowedRunFolder(local_root(recipe) / ".workers" / f"{remote.name}-{rank}", remote)
    path = RunFolder.create(working_copy(recipe)).path
    _LOG.info("%s is worked on in %s", remote, path)
    return MirroredRunFolder(path, remote, patience_s=patience_s)


def checkpoint_here(text: str | Path) -> Path:
    """A checkpoint's folder on this machine: the folder itself, or a copy of the one in an object store."""
    remote = place(text)
    if not isinstance(remote, ObjectFolder):
        return remote
    if not remote.exists("COMPLETE"):
        raise InputError(
            f"{remote}: there is no complete checkpoint here (no object COMPLETE); expected one like s3://…/<name>/checkpoint-50"
        )
    folder = copy_folder("checkpoints", remote) / remote.path.split("/")[-2] / remote.name
    fetch(remote, remote.files(), folder)
    return folder


def folder_to_mend(text: str) -> RunFolder:
    """A run that is there, to change what it has measured: its folder, or a copy, without checkpoints, of the one in an object store."""
    remote = place(text)
    if not isinstance(remote, ObjectFolder):
        return RunFolder(remote)
    return MirroredRunFolder(RunFolder.create(copy_folder("mend", remote) / remote.name).path, remote, checkpoints=False)
