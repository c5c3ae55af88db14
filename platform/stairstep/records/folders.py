"""Folders that are complete or absent: checkpoints, results, anything of several files that a reader must never see half of.

A folder is filled under a hidden temporary name, every file is synced, the marker COMPLETE (which lists the sizes) is written last, and
one rename commits it. Readers ask `is_complete`, which is true on any store that has the marker. Where a complete folder is replaced it
is set aside first; `sweep` puts it back if the process died between the two renames, and deletes what dead writers left.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .files import (
    COMPLETE,
    Temporary,
    host_name,
    parse_temporary,
    process_is_alive,
    sync_file,
    sync_folder,
    temporary_name,
    write_json,
)

_ABANDONED_ELSEWHERE_S = 3600.0
_ABANDONED_HERE_S = 86400.0
_BETWEEN_RENAMES_S = 10.0


def is_complete(folder: Path) -> bool:
    """Whether a folder has its marker and every file that the marker lists, at its size."""
    try:
        text = (folder / COMPLETE).read_text(encoding="utf-8")
        sizes = json.loads(text)["files"] if text.strip() else {}
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A temporary folder to fill; it becomes `final` in one instant when the block ends, and vanishes when the block raises."""
    temporary = temporary_name(Path(final))
    temporary.mkdir(parents=True)
    try:
        yield temporary
        commit_folder(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def commit_folder(temporary: Path, final: Path) -> None:
    """Turn a filled folder into `final`: sync all files, write the marker last, rename. A folder that is there already is replaced."""
    temporary, final = Path(temporary), Path(final)
    write_json(temporary / COMPLETE, {"files": _sync_tree(temporary)})
    if not final.exists():
        os.rename(temporary, final)
        sync_folder(final.parent)
        return
    aside = temporary_name(final, "old" if is_complete(final) else "trash")
    os.rename(final, aside)
    try:
        os.rename(temporary, final)
    except BaseException:
        os.rename(aside, final)
        raise
    sync_folder(final.parent)
    _delete(aside)


def _sync_tree(folder: Path) -> dict[str, int]:
    """Sync all files and folders below a folder; returns the sizes by relative name, the marker left out."""
    sizes = {}
    mode = 0o666 & (folder.stat().st_mode | 0o600)  # a folder's mode shows the umask that it was made under
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(parent, name)
            if path != folder / COMPLETE:
                path.chmod(mode)  # safetensors writes files that nobody else may read
                sync_file(path)
                sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
        sync_folder(Path(parent))
    return dict(sorted(sizes.items()))


def remove_folder(folder: Path) -> None:
    """Delete a folder so that no reader ever takes the remains for a complete one."""
    trash = temporary_name(folder, "trash")
    os.rename(folder, trash)
    _delete(trash)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        (path / COMPLETE).unlink(missing_ok=True)  # first, so that half of a folder never looks whole
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path) -> list[str]:
    """Delete temporaries of dead writers directly in a folder and put set-aside folders back; returns a line for each thing done."""
    done = []
    for path in sorted(folder.iterdir()):
        temporary = parse_temporary(path.name)
        if temporary is None:
            continue
        final = folder / temporary.name
        replaced = temporary.purpose != "old" or final.exists()
        if not _abandoned(path, temporary, replaced):
            continue
        if not replaced and is_complete(path):
            os.rename(path, final)
            sync_folder(folder)
            done.append(f"put {final.name} back, whose replacement was never committed")
        else:
            _delete(path)
            done.append(f"deleted {path.name}, left by a process that is gone")
    return done


def _abandoned(path: Path, temporary: Temporary, replaced: bool) -> bool:
    """Whether its writer is surely gone: a dead process of this machine, or one that has not touched it for long."""
    here = temporary.host == host_name()
    if here and temporary.pid != os.getpid() and not process_is_alive(temporary.pid):
        return True
    try:
        stat = path.lstat()
    except FileNotFoundError:
        return False
    if not replaced:
        return time.time() - stat.st_ctime > _BETWEEN_RENAMES_S  # a living writer has its second rename done in an instant
    return time.time() - stat.st_mtime > (_ABANDONED_HERE_S if here else _ABANDONED_ELSEWHERE_S)
