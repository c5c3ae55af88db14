"""Lines of text to pixels: one small page in one layout, the same bytes everywhere.

Characters stand at whole pixels and are blended with integer arithmetic, so the pixels depend on nothing but the arguments. Lines stand
on a grid of rows as high as a merged visual token: a model of three million parameters, trained on two cores, then has to find a character
only across, not also up and down. A line that does not fit is an error of the caller (`fits` and `wrap` tell beforehand): a cut line would
be a question without an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from .fonts import glyph, text_width, vertical_extent
from .layouts import LAYOUTS, Colour, Layout

WIDTH, HEIGHT = 192, 128
ROW = 32  # a line's height: that of a merged token (patches of 16 pixels, merged two by two)


@dataclass(frozen=True)
class Line:
    """One line of a page: a title, running text, or a fact, whose value may stand apart from its label."""

    text: str
    value: str = ""
    role: Literal["title", "fact", "text"] = "text"

    @property
    def plain(self) -> str:
        """The line as a reader transcribes it."""
        return f"{self.text} {self.value}" if self.value else self.text


@dataclass(frozen=True)
class Drawing:
    """A page's pixels (uint8, height × width × 3) and where its characters lie: (character, left, top, right, bottom)."""

    pixels: np.ndarray
    characters: tuple[tuple[str, int, int, int, int], ...]


def as_lines(lines: Sequence[Line | str]) -> tuple[Line, ...]:
    """Lines of a page from lines or plain text, of which the first is then the title."""
    return tuple(line if isinstance(line, Line) else Line(line, role="title" if index == 0 else "text") for index, line in enumerate(lines))


def room(layout: str, width: int = WIDTH) -> int:
    """The width that a line may take in a layout, in pixels."""
    return width - 2 * LAYOUTS[layout].margin


def wrap(text: str, layout: str, font: str, size: int, bold: bool = False, width: int = WIDTH) -> tuple[str, ...]:
    """Text broken at its spaces into lines that fit the layout; a single word that is too long stays a line of its own."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, font, size, bold) <= room(layout, width):
            lines[-1] = longer
        else:
            lines.append(word)
    return tuple(lines)


def fits(lines: Sequence[Line | str], layout: str, font: str, size: int, width: int = WIDTH, height: int = HEIGHT) -> bool:
    """Whether every line fits the page's width and all of them its height."""
    every = as_lines(lines)
    look = LAYOUTS[layout]
    wide = all(_line_width(line, look, font, size) <= room(layout, width) for line in every)
    return wide and len(every) * ROW <= height


def _line_width(line: Line, look: Layout, font: str, size: int) -> int:
    if line.role != "fact":
        return text_width(line.text, font, size, line.role == "title")
    space = text_width(" ", font, size)
    return text_width(line.text, font, size, look.bold_labels) + space + text_width(line.value, font, size)


def draw(lines: Sequence[Line | str], layout: str, font: str, size: int, width: int = WIDTH, height: int = HEIGHT) -> Drawing:
    """A page with the places of its characters; the lines have to fit."""
    every = as_lines(lines)
    if not fits(every, layout, font, size, width, height):
        text = " / ".join(line.plain for line in every)
        raise ValueError(f"these lines do not fit {width}×{height} pixels in layout {layout}, {font} {size} px: {text}")
    look = LAYOUTS[layout]
    titles = sum(line.role == "title" for line in every)
    page = _Page(look, font, size, width, height)
    page.ground(titles, len(every))
    for index, line in enumerate(every):
        page.line(line, page.baseline(index))
    return Drawing(page.pixels, tuple(page.characters))


class _Page:
    """One page while it is drawn."""

    def __init__(self, look: Layout, font: str, size: int, width: int, height: int) -> None:
        self.look, self.font, self.size = look, font, size
        above, below = vertical_extent(font, size)
        self.above = (ROW + above - below) // 2
        self.pixels = np.empty((height, width, 3), dtype=np.uint8)
        self.characters: list[tuple[str, int, int, int, int]] = []

    def baseline(self, index: int) -> int:
        return index * ROW + self.above

    def ground(self, titles: int, lines: int) -> None:
        """Everything that lies under the text."""
        look, pixels = self.look, self.pixels
        width = pixels.shape[1]
        pixels[:] = look.paper
        seam = titles * ROW
        if look.panel is not None:
            pixels[seam:] = look.panel
        if look.band is not None:
            pixels[:seam] = look.band
        if look.rule is not None and titles:
            pixels[seam - 1 : seam, look.margin : width - look.margin] = look.rule
        if look.lines is not None:
            for index in range(titles, lines):
                bottom = (index + 1) * ROW - 1
                pixels[bottom : bottom + 1, look.margin : width - look.margin] = look.lines
        if look.frame is not None:
            pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1] = (look.frame,) * 4

    def line(self, line: Line, baseline: int) -> None:
        look, width = self.look, self.pixels.shape[1]
        left, right = look.margin, width - look.margin
        if line.role == "title":
            if look.align == "centre":
                left += (right - left - text_width(line.text, self.font, self.size, True)) // 2
            self.text(line.text, left, baseline, look.title, True)
        elif line.role == "fact":
            pen = self.text(line.text, left, baseline, look.label, look.bold_labels) + text_width(" ", self.font, self.size)
            value = text_width(line.value, self.font, self.size)
            if look.values == "right":
                pen = right - value
            elif look.values == "column":
                pen = max(pen, min(left + (right - left) * 9 // 20, right - value))
            self.text(line.value, pen, baseline, look.ink, False)
        else:
            self.text(line.text, left, baseline, look.ink, False)

    def text(self, text: str, pen: int, baseline: int, ink: Colour, bold: bool) -> int:
        """Draws text from `pen` on and returns where the pen then stands."""
        height, width, _ = self.pixels.shape
        cover = np.zeros((height, width), dtype=np.uint8)
        start, end, first, last = pen, pen, height, 0
        for character in text:
            one = glyph(self.font, self.size, bold, character)
            rows, columns = one.mask.shape
            left, top = pen + one.left, baseline + one.top
            pen += one.advance
            x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + columns, width), min(top + rows, height)
            if x1 > x0 and y1 > y0:
                under = cover[y0:y1, x0:x1]
                np.maximum(under, one.mask[y0 - top : y1 - top, x0 - left : x1 - left], out=under)
                self.characters.append((character, x0, y0, x1, y1))
                start, end, first, last = min(start, x0), max(end, x1), min(first, y0), max(last, y1)
        # 255 · 255 + 127 fits 16 bits.
        spot = (slice(first, last), slice(start, end))
        amount = cover[spot][..., None].astype(np.uint16)
        self.pixels[spot] = (self.pixels[spot] * (255 - amount) + np.array(ink, dtype=np.uint16) * amount + 127) // 255
        return pen


@dataclass(frozen=True)
class TilePage:
    """A tile before it is drawn: its typed lines and how they look."""

    rows: tuple[Line, ...]
    layout: str
    font: str
    size: int

    @property
    def lines(self) -> tuple[str, ...]:
        """The plain text of the tile, line by line: its transcription."""
        return tuple(row.plain for row in self.rows)

    def drawing(self) -> Drawing:
        """The tile's pixels and the places of its characters."""
        return draw(self.rows, self.layout, self.font, self.size)

    def render(self) -> np.ndarray:
        """The tile's pixels, uint8, height × width × 3."""
        return self.drawing().pixels

    def exchanged(self, old: str, new: str) -> TilePage:
        """The same tile with one word put in the place of another, wherever it stands."""
        rows = tuple(replace(row, text=_exchange(row.text, old, new), value=_exchange(row.value, old, new)) for row in self.rows)
        return replace(self, rows=rows)


def _exchange(text: str, old: str, new: str) -> str:
    return " ".join(word.replace(old, new) if word.strip(".,;()") == old else word for word in text.split(" "))


def write_png(path: Path, pixels: np.ndarray) -> None:
    """A PNG of an image, with a palette where 256 colours are enough; the same pixels everywhere, not the same bytes under every zlib."""
    image = Image.fromarray(pixels)
    counted: Any = image.getcolors(256)
    if counted is not None:
        colours = sorted(colour for _, colour in counted)
        keys = np.array([red << 16 | green << 8 | blue for red, green, blue in colours], dtype=np.int32)
        wide = pixels.astype(np.int32)
        places = np.searchsorted(keys, wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2])
        image = Image.fromarray(places.astype(np.uint8))
        image.putpalette([part for colour in colours for part in colour])
    image.save(path, format="PNG", compress_level=3)
