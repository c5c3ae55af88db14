"""Visual-token geometry: which size a tile is resized to, and how many tokens it then costs.

The rule is that of the Qwen-VL image processors, on which `pixel_values` must agree with ours bit for bit: sides are multiples of 32,
the area lies within bounds where the shape allows it, and the aspect ratio is kept as nearly as that permits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from stairstep.settings import TileError

PATCH = 16
MERGE = 2
TEMPORAL = 2
FACTOR = PATCH * MERGE
PIXELS_PER_TOKEN = FACTOR * FACTOR
MAX_RATIO = 200


@dataclass(frozen=True)
class Geometry:
    """Bounds on the area of a resized tile, in pixels; one visual token is 32×32 of them."""

    min_pixels: int
    max_pixels: int

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(f"expected 0 < min_pixels <= max_pixels, found {self.min_pixels} and {self.max_pixels}")

    def resized(self, height: int, width: int, where: str = "tile") -> tuple[int, int]:
        """The height and width that an image is resized to; `where` names it in the TileError for a shape that has none."""
        if height < 1 or width < 1:
            raise TileError(f"{where}: the image is {width}×{height} pixels; expected at least one pixel")
        if max(height, width) / min(height, width) > MAX_RATIO:
            raise TileError(
                f"{where}: the image is {width}×{height} pixels; one side may be at most {MAX_RATIO} times the other"
                " (a limit of the model's own processor). Cut it into several tiles or leave it out"
            )
        # round() rounds halves to even, and the two branches bound the area from the unrounded sides: both as the processor does.
        rows = round(height / FACTOR) * FACTOR
        columns = round(width / FACTOR) * FACTOR
        if rows * columns > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows = max(FACTOR, math.floor(height / shrink / FACTOR) * FACTOR)
            columns = max(FACTOR, math.floor(width / shrink / FACTOR) * FACTOR)
        elif rows * columns < self.min_pixels:
            enlarge = math.sqrt(self.min_pixels / (height * width))
            rows = math.ceil(height * enlarge / FACTOR) * FACTOR
            columns = math.ceil(width * enlarge / FACTOR) * FACTOR
        return rows, columns

    @staticmethod
    def visual_tokens(height: int, width: int) -> int:
        """The visual tokens of a tile that has been resized to this height and width."""
        if height % FACTOR or width % FACTOR:
            raise ValueError(f"expected the sides of a resized tile, multiples of {FACTOR}; found {height}×{width}")
        return height * width // PIXELS_PER_TOKEN
