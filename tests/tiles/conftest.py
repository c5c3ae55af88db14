"""Small images with structure at every scale, so that a wrong resample, a shifted patch or a swapped channel cannot go unseen; archives."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def _scene(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed * 1_000_003 + height * 1009 + width)
    rows, columns = np.mgrid[:height, :width]
    smooth = np.stack([rows * 3 + columns * 5, rows * 7 - columns * 2, rows * columns // 3], axis=-1) % 256
    noise = rng.integers(0, 256, (height, width, 3))
    return np.where((rows // 5 + columns // 7)[..., None] % 2 == 0, smooth, noise).astype(np.uint8)


def _saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), *extra, (b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*one) for one in chunks) + _chunk(b"IEND", b"")


def _pack(path: Path, contents: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="session")
def scene() -> Callable[..., np.ndarray]:
    """scene(height, width, seed=0): uint8 [height, width, 3]."""
    return _scene


@pytest.fixture(scope="session")
def saved() -> Callable[..., bytes]:
    """saved(image, format, **options): the bytes of an image file."""
    return _saved


@pytest.fixture(scope="session")
def raw_png() -> Callable[..., bytes]:
    """raw_png(width, height, depth, colour type, filtered rows, *extra chunks): a PNG that Pillow itself may not be able to write."""
    return _png


@pytest.fixture(scope="session")
def pack() -> Callable[[Path, dict[str, bytes]], Path]:
    """pack(path, {name: bytes}): a tar archive of these members, in this order; returns its path."""
    return _pack
