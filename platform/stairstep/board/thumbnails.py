"""Small pictures of retrieved tiles, for the page.

A tile is read only from inside its question set's own folder, links resolved, and its size is bounded before a pixel is decoded; one
that cannot be had is left out, and how many is told. The page is bounded too: in pictures and in bytes.
"""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

from PIL import Image

from stairstep.data import Roots, resolve_inside
from stairstep.settings import DataError, TileError
from stairstep.tiles import TileReader, TileSettings, decode_image

from .payload import Questions, wanted_tiles

MOST_BYTES = 8_000_000
_SIDE = 220
_QUALITY = 60


def thumbnails(found: Questions, count: int) -> tuple[dict[str, str], str]:
    """Pictures by tile id as data: addresses, at most `count` and MOST_BYTES; and what was left out."""
    reader = TileReader(TileSettings())  # its bounds on files and pictures, not its sizes
    made: dict[str, str] = {}
    lost = spent = 0
    for evaluation, tiles in wanted_tiles(found, count):
        folder = evaluation.summary.get("tiles_dir")
        for tile, path in tiles.items():
            if tile in made or len(made) >= count:
                continue
            picture = _thumbnail(reader, Path(folder), path) if folder else None
            if picture is None:
                lost += 1
            elif spent + len(picture) > MOST_BYTES:
                return made, f"pictures are cut off at {MOST_BYTES / 1e6:g} MB"
            else:
                made[tile], spent = picture, spent + len(picture)
    return made, f"{lost} tiles have no picture here: their files are gone, packed in an archive, or outside their folder" if lost else ""


def _thumbnail(reader: TileReader, folder: Path, path: str) -> str | None:
    try:
        inside = resolve_inside(os.path.join(folder, path), Roots([folder]))
        data = reader.source(inside)
        pixels = decode_image(data, str(inside), reader.settings.max_image_pixels)
    except (TileError, DataError):
        return None
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image.thumbnail((_SIDE, _SIDE))
    into = io.BytesIO()
    image.save(into, "WEBP", quality=_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(into.getvalue()).decode("ascii")
