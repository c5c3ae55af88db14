"""The fonts that ship with the package: two families for tinywiki, three others for the tiny models' own pretraining.

Characters are rasterised once each, by themselves and at whole pixels, so nothing depends on a text layout engine. The world's fonts carry
no hinting and keep FreeType's auto-hinter off (NOTICE.txt), so their pixels are the same with every FreeType from 2.13 on; golden digests
in the tests hold them to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_FOLDER = Path(__file__).parent

_FILES = {
    "roboto": ("Roboto-Regular.ttf", "Roboto-Bold.ttf"),
    "roboto-slab": ("RobotoSlab-Regular.ttf", "RobotoSlab-Bold.ttf"),
    "open-sans": ("OpenSans-Regular.ttf", "OpenSans-Bold.ttf"),
    "open-sans-condensed": ("OpenSans-CondLight.ttf", "OpenSans-CondBold.ttf"),
    "caladea": ("Caladea-Regular.ttf", "Caladea-Bold.ttf"),
}

WORLD_FONTS = ("roboto", "roboto-slab")
PRETRAINING_FONTS = ("open-sans", "open-sans-condensed", "caladea")


@dataclass(frozen=True)
class Glyph:
    """One rasterised character: coverage (uint8, height × width, 16 levels), its place from pen and baseline, the pen's advance."""

    mask: np.ndarray
    left: int
    top: int
    advance: int


@cache
def _face(font: str, size: int, bold: bool) -> ImageFont.FreeTypeFont:
    if font not in _FILES:
        raise ValueError(f"there is no font '{font}'; known: {', '.join(sorted(_FILES))}")
    return ImageFont.truetype(str(_FOLDER / _FILES[font][bold]), size, layout_engine=ImageFont.Layout.BASIC)


@cache
def glyph(font: str, size: int, bold: bool, character: str) -> Glyph:
    """A character of a shipped font at a pixel size."""
    face = _face(font, size, bold)
    left, top, right, bottom = face.getbbox(character, anchor="ls")
    image = Image.new("L", (max(int(right - left), 0), max(int(bottom - top), 0)))
    if image.width and image.height:
        ImageDraw.Draw(image).text((-left, -top), character, fill=255, font=face, anchor="ls")
    mask = ((np.asarray(image, dtype=np.int32) * 15 + 127) // 255 * 17).astype(np.uint8)
    return Glyph(mask, int(left), int(top), round(face.getlength(character)))


def text_width(text: str, font: str, size: int, bold: bool = False) -> int:
    """The width of a line of text in pixels."""
    return sum(glyph(font, size, bold, character).advance for character in text)


@cache
def vertical_extent(font: str, size: int) -> tuple[int, int]:
    """How far a font's letters reach above and below the baseline, in pixels."""
    letters = [glyph(font, size, True, character) for character in "AMlgpy(5"]
    return max(-one.top for one in letters), max(one.top + one.mask.shape[0] for one in letters)
