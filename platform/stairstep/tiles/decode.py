"""From a file's bytes to RGB pixels: what `PIL.Image.open(...)` and `convert("RGB")` give, with bad files told in one clear message.

Invariants: only the formats below are ever handed to a decoder; the size in the header is bounded before a pixel is decoded; every fault
of the file is a TileError that names it. As in the processors, EXIF orientation is not applied, transparency is dropped and not
blended, and the first frame of several is taken. Safe from many threads at once.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import torch
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from stairstep.settings import TileError

DECODING = 1  # to be raised when the same file gives other pixels than before, for stores that keep them

_PILLOW_MODULES = r"PIL\."
_QUIET = ("ignore", None, UserWarning, re.compile(_PILLOW_MODULES), 0)

_Factory = Callable[[io.BytesIO, str], Image.Image]

# Not TIFF: its decoder writes complaints to the standard error of the process, past anything that could name the file.
# The factories themselves, not `Image.open`: it would raise or warn by Pillow's process-wide limit before ours could speak.
_FORMATS: tuple[tuple[str, Callable[[bytes], bool], _Factory], ...] = (
    ("PNG", lambda head: head.startswith(b"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    ("JPEG", lambda head: head.startswith(b"\xff\xd8\xff"), JpegImagePlugin.jpeg_factory),
    ("WebP", lambda head: head[:4] == b"RIFF" and head[8:12] == b"WEBP", WebPImagePlugin.WebPImageFile),
    ("GIF", lambda head: head.startswith((b"GIF87a", b"GIF89a")), GifImagePlugin.GifImageFile),
    ("BMP", lambda head: head.startswith(b"BM"), BmpImagePlugin.BmpImageFile),
)
FORMATS = tuple(name for name, _, _ in _FORMATS)

# All that Pillow's plugins raise on a damaged file. MemoryError is not among them: it is the machine's fault, not the tile's.
_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    RuntimeError,
    struct.error,
    zlib.error,
    UserWarning,
)


def decode_image(data: bytes, where: str, max_pixels: int) -> torch.Tensor:
    """The image in `data` as uint8 [3, H, W]; `where` names it in errors, `max_pixels` bounds what its header may announce.

    The result is a view of rows of RGB triples (channels last in memory), which is what the resampler is fastest on.
    """
    name, factory = _identify(data, where)
    _quieten_pillow()
    try:
        image = factory(io.BytesIO(data), "")
        _bound(image, where, max_pixels)
        pixels = _rgb(image)
    except Image.DecompressionBombError as error:
        raise TileError(f"{where}: the image is larger than tiles.max_image_pixels = {max_pixels} or Pillow allows: {error}") from error
    except _FAULTS as error:
        reason = str(error).strip() or type(error).__name__
        raise TileError(
            f"{where}: this {name} file is damaged and cannot be decoded ({reason}; {len(data)} bytes). Fetch or render it again"
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _quieten_pillow() -> None:
    """Pillow warns about metadata (corrupt EXIF and the like) without naming the file, and the pixels are not concerned.

    The filter stays, for Pillow's own modules alone, because a temporary one (`catch_warnings`) would be undone by other threads; and it is
    looked for each time, because it is gone when a `catch_warnings` around us ends.
    """
    if _QUIET not in warnings.filters:
        warnings.filterwarnings("ignore", category=UserWarning, module=_PILLOW_MODULES)


def _identify(data: bytes, where: str) -> tuple[str, _Factory]:
    if not data:
        raise TileError(f"{where}: the file is empty (0 bytes); expected an image. Fetch or render it again")
    for name, accepts, factory in _FORMATS:
        if accepts(data[:16]):
            return name, factory
    raise TileError(
        f"{where}: this is not an image that a tile may be: expected one of {', '.join(FORMATS)}, but the file begins with {data[:12]!r}"
    )


def _bound(image: Image.Image, where: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise TileError(
            f"{where}: its header announces {width}×{height} = {width * height} pixels, more than tiles.max_image_pixels = {max_pixels};"
            " cut it into several tiles, or raise that limit if it is meant to be so large"
        )
    if width < 1 or height < 1:
        raise TileError(f"{where}: its header announces {width}×{height} pixels; expected at least one pixel")


def _rgb(image: Image.Image) -> np.ndarray:
    """The pixels as a writable uint8 [H, W, 3]."""
    if image.mode != "RGB":
        # Touches no pixel on the way to RGB, but per-entry transparency makes `convert` warn.
        image.load()
        image.info.pop("transparency", None)
        image = image.convert("RGB")
    return np.array(image)
