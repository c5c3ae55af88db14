"""Files that lie in archives, as rows and question sets need to know of them: by the paths that they would have if unpacked.

What an archive is and how it is read is not known here; `tiles.Archives` is one of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class PackedFiles(Protocol):
    """Files in archives; `unmatched`: the recipe's patterns that no archive was found for."""

    @property
    def unmatched(self) -> Sequence[str]: ...
    def find(self, path: Path | str, /) -> object | None: ...
    def below(self, folder: Path | str, /) -> list[str]: ...


def or_unmatched(packed: PackedFiles | None) -> str:
    """The end of a message about a tile or a folder that is missing: patterns of `data.archives` that should perhaps have held it."""
    if packed is None or not packed.unmatched:
        return ""
    patterns = ", ".join(f"'{one}'" for one in packed.unmatched)
    return f"; no archive was found for {patterns} of data.archives: fetch it, or correct that pattern"
