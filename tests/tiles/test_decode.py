"""Bad files end in one clear TileError, good ones in Pillow's own pixels, with no warning and from many threads."""

from __future__ import annotations

import io
import random
import re
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from stairstep.settings import TileError
from stairstep.tiles import FORMATS, decode_image

LIMIT = 100_000
OPTIONS = {"PNG": {}, "JPEG": {"quality": 90}, "WEBP": {"lossless": True}, "GIF": {}, "BMP": {}}


@pytest.fixture(scope="module")
def files(scene, saved) -> dict[str, bytes]:
    image = Image.fromarray(scene(40, 56))
    return {format: saved(image, format, **options) for format, options in OPTIONS.items()}


def test_pixels_are_pillows(files: dict[str, bytes]) -> None:
    assert {one.upper() for one in FORMATS} == set(files)
    for data in files.values():
        expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        pixels = decode_image(data, "x", LIMIT)
        assert pixels.dtype == torch.uint8 and pixels.shape == (3, 40, 56)
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)


def test_a_header_of_a_thousand_million_pixels_is_refused_undecoded(raw_png) -> None:
    data = raw_png(31_250, 32_000, 8, 2, b"\0")
    with pytest.raises(TileError) as caught, warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_image(data, "tiles/huge.png", 80_000_000)
    assert str(caught.value).startswith("tiles/huge.png: ")
    assert "31250×32000 = 1000000000 pixels" in str(caught.value) and "tiles.max_image_pixels = 80000000" in str(caught.value)


def test_the_limit_itself_is_allowed(files: dict[str, bytes]) -> None:
    for data in files.values():
        assert decode_image(data, "x", 40 * 56).shape == (3, 40, 56)
        with pytest.raises(TileError, match=r"^x: .*56×40 = 2240 pixels.*tiles\.max_image_pixels = 2239"):
            decode_image(data, "x", 40 * 56 - 1)


def test_pillows_own_limits_neither_warn_nor_speak(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns above its process-wide limit and raises above its double: our limit alone decides where ours is the lower one."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("PNG", "JPEG", "BMP"):
            assert decode_image(files[name], "x", LIMIT).shape == (3, 40, 56)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        for data in files.values():
            try:
                decode_image(data, "x", LIMIT)
            except TileError as error:
                assert str(error).startswith("x: ") and "tiles.max_image_pixels" in str(error)


def test_every_truncation_of_a_png_is_a_tile_error_that_names_the_file(files: dict[str, bytes]) -> None:
    data = files["PNG"]
    trailer = len(data) - 16  # the end marker and the checksum of the pixels are not needed to have all pixels
    for length in range(1, trailer, 37):
        with pytest.raises(TileError, match=r"^a/cut\.png: this (PNG file is damaged|is not an image)"):
            decode_image(data[:length], "a/cut.png", LIMIT)


@pytest.mark.parametrize("format", ["JPEG", "GIF", "BMP", "WEBP"])
def test_half_a_file_of_any_format_is_a_tile_error(files: dict[str, bytes], format: str) -> None:
    with pytest.raises(TileError, match=r"^half: .*(damaged|cannot be decoded)"):
        decode_image(files[format][: len(files[format]) // 2], "half", LIMIT)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"hello, world", "not an image.*PNG, JPEG.*hello"),
        (b"<html><body>404</body></html>", "not an image.*<html>"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image.*%!PS"),
        (b"P6 2 2 255\n" + bytes(12), "not an image"),
        (b"\x89PNG\r\n\x1a\n", "PNG file is damaged"),
        (b"\xff\xd8\xff\xe0", "JPEG file is damaged"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "WebP file is damaged"),
        (b"GIF89a", "GIF file is damaged"),
        (b"BM", "BMP file is damaged"),
        (b"II*\0" + bytes(40), "not an image"),
    ],
)
def test_what_is_not_an_image_is_told(data: bytes, message: str) -> None:
    with pytest.raises(TileError, match=f"^dir/x: .*{message}"):
        decode_image(data, "dir/x", LIMIT)


def test_an_image_without_pixels_is_told(raw_png) -> None:
    with pytest.raises(TileError, match=r"^x: "):
        decode_image(raw_png(0, 7, 8, 2, b""), "x", LIMIT)


def test_damage_of_any_kind_ends_in_pixels_or_a_tile_error(files: dict[str, bytes]) -> None:
    rng = random.Random(5)
    refused = 0
    for data in files.values():
        for _ in range(120):
            mutant = bytearray(data)
            for _ in range(rng.choice((1, 1, 2, 8))):
                mutant[rng.randrange(min(len(mutant), rng.choice((64, len(mutant)))))] = rng.randrange(256)
            if rng.random() < 0.2:
                del mutant[rng.randrange(len(mutant)) :]
            try:
                pixels = decode_image(bytes(mutant), "mutant", LIMIT)
            except TileError as error:
                assert str(error).startswith("mutant: ")
                refused += 1
            else:
                assert pixels.dtype == torch.uint8 and pixels.shape[0] == 3 and pixels.shape[1] * pixels.shape[2] <= LIMIT
    assert 100 < refused < 120 * len(files), "the damage must be neither harmless nor always fatal"


def test_transparency_in_a_palette_does_not_warn(scene, saved) -> None:
    image = Image.fromarray(scene(40, 56)).quantize(32)
    data = saved(image, "PNG", transparency=bytes(range(32)))
    with pytest.warns(UserWarning, match="Transparency expressed in bytes"):
        expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(decode_image(data, "x", LIMIT).permute(1, 2, 0).numpy(), expected)


def test_warnings_about_metadata_do_not_leak(scene, saved) -> None:
    entry = struct.pack("<HHII", 0x010F, 2, 5_000, 5_000)  # a maker's name that lies far outside
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    data = saved(Image.fromarray(scene(40, 56)), "JPEG", exif=exif)
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        Image.open(io.BytesIO(data))
        assert caught, "the file must be one that Pillow warns about"
        caught.clear()
        assert decode_image(data, "x", LIMIT).shape == (3, 40, 56)
        assert not caught
        warnings.warn("somebody else's", stacklevel=1)
        assert len(caught) == 1


def test_many_threads_decode_the_same_pixels(files: dict[str, bytes]) -> None:
    work = list(files.values()) * 20 + [b"not an image"] * 5
    random.Random(1).shuffle(work)

    def outcome(data: bytes) -> bytes | str:
        try:
            return decode_image(data, "x", LIMIT).numpy().tobytes()
        except TileError as error:
            return str(error)

    alone = [outcome(data) for data in work]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(outcome, work))
    assert together == alone and len(set(alone)) == 4, "lossless, JPEG, GIF and the error"
    assert any(isinstance(one, str) and re.match("x: this is not an image", one) for one in alone)
