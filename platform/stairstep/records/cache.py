"""Copies on this machine of what lies in an object store, for whoever has to map a file or append to one.

They lie below STAIRSTEP_CACHE (by default `~/.cache/stairstep`), one folder a place, and can be deleted whenever nothing runs: they are
made again. How much room there is for them is a matter of the machine and of no recipe.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from stairstep.settings import InputError

from .places import ObjectFolder

LIMIT_GB = 100.0
_MARK = ".last_used"


def cache_folder() -> Path:
    """Where this machine keeps copies."""
    named = os.environ.get("STAIRSTEP_CACHE")
    return Path(named).absolute() if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stairstep"


def cache_limit() -> int:
    """Bytes that copies of tile stores may take here: STAIRSTEP_CACHE_GB."""
    text = os.environ.get("STAIRSTEP_CACHE_GB", str(LIMIT_GB))
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < float("inf"):
        raise InputError(f"STAIRSTEP_CACHE_GB: expected a number of GB, found '{text}'")
    return int(limit * 1e9)


def copy_folder(kind: str, place: ObjectFolder) -> Path:
    """The folder for the copy of a place; made, and marked as used now."""
    digest = hashlib.sha256(f"{place.kind}://{place.path}?{dict(place.options).get('endpoint_override', '')}".encode()).hexdigest()
    folder = cache_folder() / kind / f"{place.name[:60]}-{digest[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MARK).touch()
    except OSError as error:
        advice = "name a folder of this machine that can be written in STAIRSTEP_CACHE"
        raise InputError(f"{folder}: the copy of {place} cannot be kept here ({error.strerror}); {advice}") from None
    return folder


def make_room(folder: Path, wanted: int, limit: int) -> None:
    """Delete the copies beside this one that were unused for longest, until it may take `wanted` bytes, or no other is left."""
    others = sorted((_used(one), one) for one in folder.parent.iterdir() if one.is_dir() and one != folder)
    sizes = {one: sum(file.stat().st_size for file in one.rglob("*") if file.is_file()) for _, one in others}
    for _, one in others:
        if sum(sizes.values()) + wanted <= limit:
            return
        shutil.rmtree(one, ignore_errors=True)
        del sizes[one]


def _used(folder: Path) -> int:
    mark = folder / _MARK
    return (mark if mark.exists() else folder).stat().st_mtime_ns
