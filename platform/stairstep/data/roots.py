"""Where data may lie: every data file and tile must resolve inside the recipe's `data.roots`.

Links and `..` are resolved before the comparison, and the roots themselves may be links. Hundreds of thousands of row paths share few
folders, so `Roots.place` resolves each distinct folder once and costs no system call per file; a link that *is* the file is therefore
not seen by `place`, but by whoever touches the file: `rows.missing_tiles`, `questions.list_tiles` and `resolve_inside`, one of which
runs before any tile is opened. Without roots, the only root is the folder of the data file itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from stairstep.settings import DataError

AnyPath = str | os.PathLike[str]


class Roots:
    """Resolved root folders, with the resolved parents of the paths that were placed so far."""

    def __init__(self, folders: Iterable[AnyPath]) -> None:
        self.folders = tuple(os.path.realpath(folder) for folder in folders)
        self._prefixes = tuple(folder.rstrip("/") + "/" for folder in self.folders)
        self._real: dict[str, str] = {}
        self._prefix_of: dict[tuple[str, str], str] = {}

    def contains(self, real: str) -> bool:
        """Whether an already resolved path is a root or lies in one."""
        return real in self.folders or real.startswith(self._prefixes)

    def place(self, text: str, folder: str) -> str:
        """The path `text` (relative to `folder`, or absolute) with its parent folder resolved; ValueError says what is wrong with it."""
        cut = text.rfind("/") + 1
        head, name = text[:cut], text[cut:]
        if name in ("", ".", ".."):
            raise ValueError(f"expected the path of a file, found '{text}'")
        if "\0" in text:
            raise ValueError(f"expected the path of a file, found a zero character in {text!r}")
        prefix = self._prefix_of.get((folder, head))
        if prefix is None:
            parent = self._resolved(os.path.join(folder, head).rstrip("/") or "/")
            if not self.contains(parent):
                raise ValueError(f"'{text}' leads to {self.outside(os.path.join(parent, name))}")
            prefix = self._prefix_of[folder, head] = parent.rstrip("/") + "/"
        return prefix + name

    def _resolved(self, folder: str) -> str:
        """The folder with its links resolved: one system call for each further folder in a folder that is known already."""
        above, name = os.path.split(folder)
        if name in ("", ".", ".."):
            return os.path.realpath(folder)
        if above not in self._real:
            self._real[above] = os.path.realpath(above)
        joined = os.path.join(self._real[above], name)
        return os.path.realpath(joined) if os.path.islink(joined) else joined

    def outside(self, real: str) -> str:
        """The end of a message about a resolved path that lies in no root."""
        return f"{real}, which lies outside data.roots ({', '.join(self.folders)}); move it inside, or add its folder to data.roots"


def roots_of(roots: Sequence[AnyPath], base: AnyPath, default: AnyPath) -> Roots:
    """The recipe's roots, relative ones taken from `base`; without any, the folder `default` is the only one."""
    if not roots:
        return Roots([default])
    folders = [os.path.join(base, root) for root in roots]
    for index, folder in enumerate(folders):
        if not os.path.isdir(folder):
            raise DataError(f"data.roots[{index}]: there is no folder '{folder}'; correct the path or remove it")
    return Roots(folders)


def resolve_inside(path: AnyPath, roots: Roots | Sequence[AnyPath]) -> Path:
    """The path with every link resolved, its own included; a DataError if it leaves the roots. It need not exist."""
    allowed = roots if isinstance(roots, Roots) else Roots(roots)
    text = os.fspath(path)
    if "\0" in text:
        raise DataError(f"{text!r}: a path cannot hold a zero character")
    real = os.path.realpath(text)
    if not allowed.contains(real):
        raise DataError(f"{text}: this leads to {allowed.outside(real)}")
    return Path(real)
