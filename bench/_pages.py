"""The pages of the benches of tiles: white, lines of 16-px text, and an area of smooth colour noise; every pixel follows from the seed."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stairstep.tiny import fonts

WIDTH, HEIGHT = 875, 1024
LINES, TEXT_PX, MARGIN = 45, 16, 20
NOISE = (260, 300)  # width and height of the coloured area
_COARSE = 16  # one random colour for so many pixels across and down; smooth between
BLACK = (0, 0, 0)
# The ink of an encyclopedia's style sheet: its planes are not copies of one another, as those of black text are.
BROWSER = (32, 33, 34)
_LETTERS = np.array(list("etaoinshrdlucmfwygpbvkjxqz"))
_COMMON = np.array([12, 9, 8, 8, 7, 7, 6, 6, 6, 4, 4, 3, 3, 3, 3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1], dtype=float)


@cache
def _font() -> ImageFont.FreeTypeFont:
    path = Path(fonts.__file__).parent / "Roboto-Regular.ttf"
    return ImageFont.truetype(str(path), TEXT_PX, layout_engine=ImageFont.Layout.BASIC)


def draw_page(seed: int, width: int = WIDTH, height: int = HEIGHT, ink: tuple[int, int, int] = BLACK) -> Image.Image:
    """A page as a browser shows it; a smaller one has fewer and shorter lines and a smaller picture, in proportion."""
    rng = np.random.default_rng(seed)
    page = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(page)
    across, down = NOISE[0] * width // WIDTH, NOISE[1] * height // HEIGHT
    left, top = width - MARGIN - across, MARGIN
    lines = LINES * height // HEIGHT
    pitch = (height - 2 * MARGIN) / lines
    for number in range(lines):
        y = MARGIN + round(number * pitch)
        end = left - MARGIN // 2 if y < top + down else width - MARGIN
        pen.text((MARGIN, y), _line(rng, end - MARGIN), fill=ink, font=_font())
    coarse = rng.integers(0, 256, (down // _COARSE, across // _COARSE, 3), dtype=np.uint8)
    page.paste(Image.fromarray(coarse).resize((across, down), Image.Resampling.BICUBIC), (left, top))
    return page


def _line(rng: np.random.Generator, room: int) -> str:
    """Words of common and rare letters, as many as the room takes."""
    line = ""
    while True:
        word = "".join(rng.choice(_LETTERS, rng.integers(2, 10), p=_COMMON / _COMMON.sum()))
        longer = f"{line} {word}".strip()
        if _font().getlength(longer) > room:
            return line
        line = longer


def png(image: Image.Image) -> bytes:
    """The image as a PNG file, with Pillow's own settings."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_pages(folder: Path, count: int, distinct: int | None = None, width: int = WIDTH, height: int = HEIGHT) -> list[Path]:
    """PNG files of `count` pages. With `distinct` only so many are drawn and the others repeat their pixels; a comment of its own
    makes each file another tile, with an id of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn: Sequence[bytes] = [png(draw_page(seed, width, height)) for seed in range(min(distinct or count, count))]
    files = [folder / f"page-{number:05d}.png" for number in range(count)]
    for number, file in enumerate(files):
        file.write_bytes(_commented(drawn[number % len(drawn)], f"page {number}"))
    return files


def _commented(data: bytes, text: str) -> bytes:
    """The PNG file with one more chunk of text before its end."""
    body = b"tEXtComment\0" + text.encode("latin-1")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return data[:-12] + chunk + data[-12:]
