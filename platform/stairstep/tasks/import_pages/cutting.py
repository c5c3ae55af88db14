"""From a page to tiles: a page wider than a tile is shrunk to its width, never enlarged, and cut from top to bottom.

Invariants: no tile is larger than the limits; the tiles of a page, put together from top to bottom, are the page (as shrunk), pixel for
pixel; a tile that the encoders cannot take is an error here and not in a run.
"""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from stairstep.settings import InputError
from stairstep.tiles import FACTOR, Geometry, TileSettings
from stairstep.tiles.geometry import MAX_RATIO

MAX_SIDE = 16_384


@dataclass(frozen=True)
class TileSize:
    """The largest tile that a page is cut into, in pixels; the seed's screenshots are 875 wide and most of them 1024 high."""

    width: int = 875
    height: int = 1024

    def check(self) -> None:
        """Sides between one visual token and what a picture may well have, in a shape that the encoders take."""
        for side, value in (("width", self.width), ("height", self.height)):
            if not FACTOR <= value <= MAX_SIDE:
                raise InputError(f"--{side} {value}: expected {FACTOR} to {MAX_SIDE} pixels")
        if max(self.width, self.height) > MAX_RATIO * min(self.width, self.height):
            raise InputError(f"--width {self.width} --height {self.height}: one side may be at most {MAX_RATIO} times the other")


@dataclass(frozen=True)
class Piece:
    """A tile as it is written: PNG bytes and their size in pixels."""

    data: bytes
    width: int
    height: int


def cut(page: torch.Tensor, size: TileSize, where: str) -> tuple[Piece, ...]:
    """The tiles of a page, uint8 [3, H, W], from top to bottom; `where` names it in a TileError for a shape that no encoder takes."""
    geometry = TileSettings().geometry()
    pixels = _shrunk(page.permute(1, 2, 0).numpy(), size.width)
    return tuple(_piece(pixels[top:bottom], geometry, where) for top, bottom in bounds(len(pixels), size.height))


def bounds(total: int, height: int) -> list[tuple[int, int]]:
    """First row and end of each tile. A last piece of fewer than 32 rows, less than a visual token, shares the rows of the one above it
    evenly: a sliver would be a candidate that shows half a line of text."""
    edges = [*range(0, total, height), total]
    if len(edges) > 2 and edges[-1] - edges[-2] < FACTOR:
        edges[-2] = (edges[-3] + edges[-1] + 1) // 2
    return list(itertools.pairwise(edges))


def _shrunk(pixels: np.ndarray, width: int) -> np.ndarray:
    rows, columns = pixels.shape[:2]
    if columns <= width:
        return pixels
    size = (width, max(1, round(rows * width / columns)))
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.LANCZOS))


def _piece(pixels: np.ndarray, geometry: Geometry, where: str) -> Piece:
    height, width = pixels.shape[:2]
    geometry.resized(height, width, where)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return Piece(buffer.getvalue(), width, height)
