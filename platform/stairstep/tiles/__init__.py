"""Pixels in: from image files to the vision tower's input, equal in every bit to the model's own (torchvision) processor.

A tile is read once (`TileReader`), from its file or from within a tar archive (`Archives`), resized once on the CPU (`resize`), kept for
all runs (`TileStore`), and becomes patches on the device (`patches`).
"""

from .archive_index import ArchiveIndex, build_index, index_archive, index_archives, kept_index
from .archives import Archives, Member
from .decode import FORMATS, decode_image
from .geometry import FACTOR, MERGE, PATCH, PIXELS_PER_TOKEN, TEMPORAL, Geometry
from .identity import TileIds, tile_id
from .patches import PATCH_VALUES, patches
from .pixels import RESAMPLER, resize, tile_key
from .prefetch import Ahead
from .reader import Tile, TileReader
from .settings import TileSettings
from .store import TileStore, open_store

__all__ = [
    "FACTOR",
    "FORMATS",
    "MERGE",
    "PATCH",
    "PATCH_VALUES",
    "PIXELS_PER_TOKEN",
    "RESAMPLER",
    "TEMPORAL",
    "Ahead",
    "ArchiveIndex",
    "Archives",
    "Geometry",
    "Member",
    "Tile",
    "TileIds",
    "TileReader",
    "TileSettings",
    "TileStore",
    "build_index",
    "decode_image",
    "index_archive",
    "index_archives",
    "kept_index",
    "open_store",
    "patches",
    "resize",
    "tile_id",
    "tile_key",
]
