"""Which processes a Ray has, by the titles that it gives them."""

from __future__ import annotations

import psutil


def titled(start: str, starter: int | None = None) -> list[psutil.Process]:
    """The living processes whose title begins so, of the Ray that a process started; by default of this one's."""
    found = []
    for one in psutil.Process(starter).children(recursive=True):
        try:
            title = (one.cmdline() or [""])[0]  # read once: a process may end between two looks, and then has no title
            if title.startswith(start) and one.status() != psutil.STATUS_ZOMBIE:
                found.append(one)
        except psutil.Error:
            continue
    return found
