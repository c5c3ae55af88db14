"""Pages of PDFs, drawn at the width of a tile by pdfium: the optional extra `pdf`.

pdfium is not safe for use by several threads, so PDFs are drawn by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from stairstep.settings import InputError, TileError


def check_pdf() -> None:
    """An InputError that names the extra, where it is not installed."""
    try:
        import pypdfium2  # noqa: F401
    except ImportError:
        raise InputError("PDFs need the optional extra: pip install 'stairstep[pdf]' (pypdfium2); or leave the PDFs out") from None


@contextmanager
def open_pdf(path: Path) -> Iterator[Any]:
    """An open PDF for `draw_page`; a TileError where it is damaged or encrypted."""
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(path)
    except (pypdfium2.PdfiumError, OSError) as error:
        what = "encrypted; save a copy without a password" if "password" in str(error).lower() else f"damaged, or no PDF ({error})"
        raise TileError(f"{path}: this PDF is {what}") from None
    try:
        document.init_forms()  # what a form was filled in with is part of the page
        yield document
    finally:
        document.close()


def draw_page(document: Any, index: int, width: int, max_pixels: int, where: str) -> torch.Tensor:
    """A page on white as uint8 [3, H, W] of this width; `max_pixels` bounds what is drawn."""
    import pypdfium2

    try:
        page = document[index]
        across, down = page.get_size()
        # Sizes are rounded up when a page is drawn: a little less gives the width itself.
        scale = (width - 0.01) / across if across > 0 else math.inf
        pixels = width * down * scale
        if not pixels <= max_pixels:
            raise TileError(f"{where}: this page measures {across:g}×{down:g} points; {width} wide it has more than {max_pixels} pixels")
        drawn = page.render(scale=scale, rev_byteorder=True).to_numpy()[..., :3].copy()
        page.close()
    except pypdfium2.PdfiumError as error:
        raise TileError(f"{where}: this page cannot be drawn ({error})") from None
    return torch.from_numpy(drawn).permute(2, 0, 1)
