"""Small pictures of retrieved tiles, for the page.

A run folder may be a stranger's, and a page is passed on: a tile is read only from inside its question set's own folder, and only where
that folder lies in a place that the run's recipe names for data, links resolved. Its size is bounded before a pixel is decoded. One that
cannot be had is left out, and how many is told. The page is bounded too: in pictures and in bytes.
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
from .read import Board, Run

MOST_BYTES = 8_000_000
_SIDE = 220
_QUALITY = 60


def thumbnails(board: Board, found: Questions, count: int) -> tuple[dict[str, str], str]:
    """Pictures by tile id as data: addresses, at most `count` and MOST_BYTES; and what was left out."""
    reader = TileReader(TileSettings())  # its bounds on files and pictures, not its sizes
    roots = {run.name: Roots(_places(run)) for run in board.runs}
    made: dict[str, str] = {}
    notes: list[str] = []
    lost = spent = 0
    for one, tiles in wanted_tiles(found, count):
        folder = one.evaluation.summary.get("tiles_dir")
        if folder and not _inside(folder, roots[one.run]):
            notes.append(f"{one.label}: no pictures, because its tiles' folder {folder} is none that its recipe.yaml names for data")
            continue
        for tile, path in tiles.items():
            if tile in made or len(made) >= count:
                continue
            picture = _thumbnail(reader, Path(folder), path) if folder else None
            if picture is None:
                lost += 1
            elif spent + len(picture) > MOST_BYTES:
                return made, "; ".join([*notes, f"pictures are cut off at {MOST_BYTES / 1e6:g} MB"])
            else:
                made[tile], spent = picture, spent + len(picture)
    if lost:
        notes.append(f"{lost} tiles have no picture here: their files are gone, packed in an archive, or outside their folder")
    return made, "; ".join(notes)


def _places(run: Run) -> list[str]:
    """Where a run's tiles may lie: in the roots of its data and each set's tiles_dir; without either, beside the set's file or above it.
    The whole disk is no such place."""
    roots = run.said("data.roots") or []
    base = roots[0] if roots else ""
    sets = run.said("evaluation.sets") or []
    named = [os.path.join(base, one["tiles_dir"]) for one in sets if one.get("tiles_dir")]
    files = [os.path.abspath(one["path"]) for one in sets if one.get("path") and not one.get("tiles_dir") and not roots]
    found = [*(os.path.join(base, root) for root in roots), *named]
    found += [place for one in files for place in (os.path.dirname(one), os.path.dirname(os.path.dirname(one)))]
    return [one for one in found if os.path.realpath(one) != os.path.realpath(os.sep)]


def _inside(folder: str, roots: Roots) -> bool:
    try:
        resolve_inside(folder, roots)
    except DataError:
        return False
    return True


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
