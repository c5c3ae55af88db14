"""Pages to learn from: generic ones full of meaningless words, and articles that look like a world's but whose names no world has."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stairstep.tiny.articles import Manner
from stairstep.tiny.fonts import PRETRAINING_FONTS, WORLD_FONTS, text_width
from stairstep.tiny.layouts import PRETRAINING_LAYOUTS, SHIFTED_LAYOUTS, WORLD_LAYOUTS
from stairstep.tiny.render import ROW, Line, TilePage, fits, room, wrap
from stairstep.tiny.words import pretraining_name, pretraining_word, year

from .settings import Look

_SIZES = {"one": (20,), "generic": (16, 18, 20), "world": (16, 18, 20)}
MOST_LINES = 4
_FEW = 2

# How words of tinywiki are built, with the letter by which a near-equal title may differ.
_ONSET = "(?:[bdgk]r|tr|st|th|vl|[bdklmnprstvz])"
_WORLDLY = re.compile(f"{_ONSET}[aeiou](?:{_ONSET}[aeiou])?{_ONSET}[aeiou](?:l|m|n|r|s|t|ld|nd|rn|sk|th|x)?[nrsaeo]?", re.IGNORECASE)


def unworldly_name(rng: random.Random, longest: int = 7) -> str:
    """A capitalised name that no tinywiki world can contain: the reader has to spell theirs, never to remember them."""
    while True:
        if rng.random() < 0.6:
            name = pretraining_name(rng, longest)
        else:
            name = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(4, longest))).capitalize()
        if not _WORLDLY.fullmatch(name):
            return name


WORLD = Manner(unworldly_name, WORLD_FONTS, WORLD_LAYOUTS, SHIFTED_LAYOUTS)
ONE = Manner(unworldly_name, PRETRAINING_FONTS[:1], PRETRAINING_LAYOUTS[:1], PRETRAINING_LAYOUTS[:1])
GENERIC = Manner(unworldly_name, PRETRAINING_FONTS, PRETRAINING_LAYOUTS, PRETRAINING_LAYOUTS)


def manner_of(look: Look) -> Manner:
    """Names, fonts and layouts of a look."""
    return {"one": ONE, "generic": GENERIC, "world": WORLD}[look]


def word(rng: random.Random) -> str:
    """A word of generic text: a name, a number, or letters, now and then with a mark."""
    chance = rng.random()
    if chance < 0.3:
        found = unworldly_name(rng)
    elif chance < 0.45:
        found = year(rng)
    else:
        found = pretraining_word(rng)
    mark = rng.random()
    return f"({found})" if mark < 0.05 else found + rng.choice(".,?;:'-") if mark < 0.15 else found


def generic_page(rng: random.Random, look: Look, most_lines: int = MOST_LINES) -> TilePage:
    """A page of words without meaning: a title, facts and lines of text in any order, as many as fit; where only one or two lines are
    allowed, a word on each."""
    manner = manner_of(look)
    layout = rng.choice((*manner.layouts, *manner.shifted))
    font, size = rng.choice(manner.fonts), rng.choice(_SIZES[look])
    if most_lines <= _FEW:
        return TilePage(tuple(Line(word(rng)) for _ in range(rng.randint(1, most_lines))), layout, font, size)
    title = wrap(" ".join(word(rng) for _ in range(rng.randint(1, 3))), layout, font, size, bold=True)
    rows = [Line(text, role="title") for text in title]
    for _ in range(rng.randint(1, most_lines)):
        row = _fact(rng, layout, font, size) if rng.random() < 0.5 else _running(rng, layout, font, size)
        if fits([*rows, row], layout, font, size):
            rows.append(row)
    if not fits(rows, layout, font, size):
        return generic_page(rng, look)
    return TilePage(tuple(rows), layout, font, size)


def _fact(rng: random.Random, layout: str, font: str, size: int) -> Line:
    return Line(word(rng), word(rng), "fact")


def _running(rng: random.Random, layout: str, font: str, size: int) -> Line:
    words = [word(rng)]
    while len(words) < 5:
        longer = [*words, word(rng)]
        if text_width(" ".join(longer), font, size) > room(layout):
            break
        words = longer
    return Line(" ".join(words))


def as_tensor(images: Sequence[np.ndarray]) -> Tensor:
    """Images, height × width × 3, as uint8 [n, 3, h, w]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def varied(rng: random.Random, pixels: np.ndarray) -> np.ndarray:
    """A page that another hand has set: its letters bent, slanted, moved, bolder or thinner, and in other shades, now and then light on
    dark or with its first lines on a ground of their own. What is learned on three fonts then holds for others."""
    height, width, _ = pixels.shape
    wide, slant = rng.uniform(0.84, 1.04), rng.uniform(-0.12, 0.12)
    right, down = rng.uniform(-4, 4), rng.uniform(-2.5, 2.5)
    ground = tuple(int(part) for part in pixels[-1, -1])
    matrix = (1 / wide, slant, -right / wide - slant * height / 2, 0.0, 1.0, -down)
    moved = Image.fromarray(pixels).transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=ground)
    drawn = _bent(rng, np.asarray(moved, dtype=np.float32))
    neighbour = np.roll(drawn, 1, axis=1)
    weight = rng.uniform(-0.45, 0.6)  # below nothing: thinner
    drawn += abs(weight) * ((np.minimum if weight > 0 else np.maximum)(drawn, neighbour) - drawn)
    shades = _shaded(rng, drawn)
    if rng.random() < 0.15:
        seam = ROW * rng.choice((1, 1, 2))
        shades[:seam] = _shaded(rng, drawn[:seam])
    return shades.round().clip(0, 255).astype(np.uint8)


def _bent(rng: random.Random, pixels: np.ndarray) -> np.ndarray:
    """Columns and rows pulled together here and apart there, by a pixel or so: letters of other widths and heights."""
    for axis, most in ((1, 2.0), (0, 1.0)):
        count = pixels.shape[axis]
        places = np.arange(count, dtype=np.float32)
        steps = np.arange(count, dtype=np.float32)
        for _ in range(2):
            turns, height, start = rng.uniform(1, 7 if axis else 4), rng.uniform(0, most), rng.random()
            places = places + height * np.sin(2 * np.pi * (turns / count * steps + start), dtype=np.float32)
        places = places.clip(0, count - 1.001)
        first = places.astype(np.int64)
        share = (places - first).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        pixels = pixels.take(first, axis) * (1 - share) + pixels.take(first + 1, axis) * share
    return pixels


def _shaded(rng: random.Random, pixels: np.ndarray) -> np.ndarray:
    """Dark on light in other shades, or the other way round."""
    dark, light = rng.uniform(0, 80), rng.uniform(190, 255)
    if rng.random() < 0.2:
        dark, light = light, dark
    tint = np.array([rng.uniform(-25, 25) for _ in range(3)], dtype=np.float32)
    return dark + pixels * np.float32((light - dark) / 255) + tint


def share_at(shares: Sequence[float], step: int, steps: int) -> float:
    """The value of the part of the run that a step (from 1) lies in."""
    return shares[min(len(shares) - 1, (step - 1) * len(shares) // max(1, steps))]
