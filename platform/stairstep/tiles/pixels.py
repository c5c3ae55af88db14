"""Decoded image → resized uint8 pixels: the one lossy step, done once per tile and bit for bit as the torchvision processor does it."""

from __future__ import annotations

import os
from importlib.metadata import version

import numpy as np
import torch
import torch.nn.functional as F
from PIL import features

from .decode import DECODING
from .geometry import MERGE, PATCH, TEMPORAL, Geometry

RESAMPLER = "torch-bicubic-antialias-uint8"


def resize(image: torch.Tensor, geometry: Geometry, where: str = "tile") -> torch.Tensor:
    """uint8 [3, H, W] on the CPU → contiguous uint8 [3, h, w] in the geometry's size; raises TileError for an extreme shape.

    Copies go through numpy: torch would start its own pool of threads in every decoding worker.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"expected uint8 [3, H, W], found {image.dtype} {tuple(image.shape)}")
    height, width = image.shape[1:]
    size = geometry.resized(height, width, where)
    if size == (height, width):
        return torch.from_numpy(np.ascontiguousarray(image.numpy()))
    # Rows of RGB triples with an honest batch stride: the resampler then neither unpacks its input nor repacks its output.
    rows = torch.from_numpy(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    resized = F.interpolate(rows[None].permute(0, 3, 1, 2), size=size, mode="bicubic", align_corners=False, antialias=True)
    return torch.from_numpy(np.ascontiguousarray(resized[0].numpy()))


def tile_key(geometry: Geometry) -> str:
    """What the resized pixels of a given tile depend on, as a name that is safe in a file name: for stores and caches of embeddings."""
    return (
        f"p{PATCH}m{MERGE}t{TEMPORAL}-{geometry.min_pixels}-{geometry.max_pixels}"
        f"-{RESAMPLER}-decode{DECODING}-{os.uname().machine}-torch{torch.__version__}-pillow{version('pillow')}-jpeg{_library('libjpeg_turbo')}-webp{_library('webp')}"
    )


def _library(name: str) -> str:
    """The version of a decoder whose pixels its own releases may change; Pillow is built with one or another."""
    return str(features.version(name) or "none").replace("/", "_")
