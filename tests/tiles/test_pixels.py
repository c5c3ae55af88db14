"""`image → resized uint8 → patches` is the Hugging Face torchvision processor's `pixel_values`, bit for bit, for 200 kinds of tile."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from stairstep.settings import TileError
from stairstep.tiles import Geometry, TileReader, TileSettings, TileStore, patches, resize, tile_key
from stairstep.tiles.store import write_manifest, write_shard

SETTINGS = TileSettings(max_visual_tokens=40, min_visual_tokens=4)
# (height, width): odd, tiny, below min_pixels, above max_pixels, halves that round to even, multiples that stay, ratios up to 200.
SIZES = [
    (1, 1), (3, 5), (31, 33), (37, 53), (16, 16), (48, 80), (80, 144), (64, 64), (128, 160), (97, 211), (263, 191), (211, 419), (150, 77),
    (1, 200), (200, 1), (5, 999), (3000, 15),
]  # fmt: skip
MODES = ["RGB", "RGBA", "P", "P-one", "P-many", "L", "L-trns", "LA", "1", "I;16", "CMYK", "GIF"]


def _file(mode: str, rgb: np.ndarray, saved: Callable[..., bytes], seed: int) -> bytes:
    image = Image.fromarray(rgb)
    alpha = Image.fromarray(rgb[..., 1].copy())
    if mode == "RGB":
        return saved(image, "PNG")
    if mode == "RGBA":
        image.putalpha(alpha)
        return saved(image, "PNG")
    if mode in ("P", "P-one", "P-many", "GIF"):
        image = image.quantize(48, dither=Image.Dither.NONE)
        options: dict = {"P-one": {"transparency": 3}, "P-many": {"transparency": bytes(range(40))}}.get(mode, {})
        return saved(image, "GIF" if mode == "GIF" else "PNG", **options)
    if mode == "L":
        return saved(image.convert("L"), "PNG")
    if mode == "L-trns":
        return saved(image.convert("L"), "PNG", transparency=7)
    if mode == "LA":
        grey = image.convert("L").convert("LA")
        grey.putalpha(alpha)
        return saved(grey, "PNG")
    if mode == "1":
        return saved(image.convert("1"), "PNG")
    if mode == "I;16":
        # Half of the images hold small values only, because 16 bits are clipped and not scaled by some versions of Pillow.
        wide = rgb[..., 0].astype(np.uint16) * (257 if seed % 2 else 1)
        return saved(Image.frombytes("I;16", wide.shape[::-1], wide.astype("<u2").tobytes()), "PNG")
    assert mode == "CMYK"
    return saved(image.convert("CMYK"), "JPEG", quality=90)


def _cases(scene: Callable[..., np.ndarray], saved: Callable[..., bytes], raw_png: Callable[..., bytes]) -> Iterator[tuple[str, bytes]]:
    for index, mode in enumerate(MODES):
        for height, width in SIZES:
            if mode in ("RGB", "I;16", "CMYK") or (height, width) not in SIZES[8:11]:
                seed = index * 100 + height
                yield f"{mode} {height}x{width}.{'jpg' if mode == 'CMYK' else 'png'}", _file(mode, scene(height, width, seed), saved, seed)
    image = Image.fromarray(scene(75, 141, 1))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"exif {orientation}.jpg", saved(image, "JPEG", exif=exif)
        if orientation % 3 == 0:
            yield f"exif {orientation}.png", saved(image, "PNG", exif=exif)
            yield f"exif {orientation}.webp", saved(image, "WEBP", exif=exif, lossless=True)
    yield "grey.jpg", saved(image.convert("L"), "JPEG")
    yield "progressive.jpg", saved(image, "JPEG", progressive=True, subsampling=2)
    yield "plain 444.jpg", saved(image, "JPEG", subsampling=0, quality=100)
    yield "lossy.webp", saved(image, "WEBP", quality=60)
    see_through = image.copy()
    see_through.putalpha(Image.fromarray(scene(75, 141, 2)[..., 0].copy()))
    yield "alpha.webp", saved(see_through, "WEBP", lossless=True)
    frames = [Image.fromarray(scene(60, 90, seed)) for seed in (3, 4, 5)]
    for name, format in (("moving.webp", "WEBP"), ("moving.gif", "GIF"), ("moving.png", "PNG")):
        yield name, saved(frames[0], format, save_all=True, append_images=frames[1:])
    yield "clear.gif", saved(image.quantize(20), "GIF", transparency=5)
    for mode in ("1", "L", "P", "RGB"):
        yield f"{mode}.bmp", saved(image.convert(mode), "BMP")
    wide = scene(45, 70, 6).astype(">u2") * 257 + 13
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    yield "RGB 16 bit.png", raw_png(70, 45, 16, 2, rows)
    yield "RGB 16 bit, one clear.png", raw_png(70, 45, 16, 2, rows, (b"tRNS", struct.pack(">HHH", 13, 13, 13)))
    pair = np.ascontiguousarray(wide[..., :2])
    yield "LA 16 bit.png", raw_png(70, 45, 16, 4, b"".join(b"\0" + row.tobytes() for row in pair))
    yield "page.png", saved(Image.fromarray(scene(1024, 875, 7)), "PNG")


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory, scene, saved, raw_png) -> list[Path]:
    folder = tmp_path_factory.mktemp("tiles")
    paths = []
    for name, data in _cases(scene, saved, raw_png):
        paths.append(folder / name)
        assert not paths[-1].exists(), f"two cases are named {name}"
        paths[-1].write_bytes(data)
    return paths


def _processor(settings: TileSettings):
    pytest.importorskip("torchvision")
    import transformers

    geometry = settings.geometry()
    size = {"shortest_edge": geometry.min_pixels, "longest_edge": geometry.max_pixels}
    # The torchvision processor was called ...Fast while the plain name was still the slow one.
    kind = transformers.Qwen2VLImageProcessorFast if transformers.__version__ < "5" else transformers.Qwen2VLImageProcessor
    processor = kind(size=size, patch_size=16, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    assert getattr(processor, "backend", "torchvision") == "torchvision"
    return processor


def _theirs(processor, paths: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    result = processor(images=[Image.open(path) for path in paths], return_tensors="pt")
    return result["pixel_values"], result["image_grid_thw"]


def _assert_same(ours: tuple[torch.Tensor, torch.Tensor], theirs: tuple[torch.Tensor, torch.Tensor], what: object) -> None:
    assert ours[0].dtype == theirs[0].dtype == torch.float32
    assert torch.equal(ours[1], theirs[1]), what
    assert torch.equal(ours[0].view(torch.int32), theirs[0].view(torch.int32)), what


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_each_tile_alone_equals_the_processor(tiles: list[Path]) -> None:
    processor, reader = _processor(SETTINGS), TileReader(SETTINGS)
    assert len(tiles) >= 200
    for path in tiles:
        _assert_same(patches([reader.load(path).pixels]), _theirs(processor, [path]), path.name)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_batch_of_all_tiles_equals_the_processor(tiles: list[Path]) -> None:
    reader = TileReader(SETTINGS)
    # Neighbours of one size and lonely sizes, so that both ways through `patches` are taken.
    ordered = sorted(tiles, key=lambda path: Image.open(path).size)[:120] + tiles[120:]
    _assert_same(patches([tile.pixels for tile in reader.ahead(ordered)]), _theirs(_processor(SETTINGS), ordered), "all")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_each_tile_from_the_store_equals_the_processor(tiles: list[Path], tmp_path: Path) -> None:
    direct = TileReader(SETTINGS)
    shard = write_shard(tmp_path / direct.key, direct.key, ((one.id, one.pixels) for one in map(direct.load, tiles)))
    assert shard is not None
    write_manifest(tmp_path / direct.key, direct.key, [shard])
    reader = TileReader(SETTINGS, ids=direct.ids, store=TileStore(tmp_path, direct.key))
    reader._read = lambda path: pytest.fail(f"{path} was read")  # type: ignore[method-assign]
    processor = _processor(SETTINGS)
    for path in tiles:
        _assert_same(patches([reader.load(path).pixels]), _theirs(processor, [path]), path.name)


def test_a_page_at_the_default_settings_equals_the_processor(tiles: list[Path]) -> None:
    settings = TileSettings()
    ours = patches([TileReader(settings).load(tiles[-1]).pixels])
    assert ours[0].shape == (3456, 1536)
    _assert_same(ours, _theirs(_processor(settings), [tiles[-1]]), tiles[-1].name)


def test_the_tiles_hold_every_case(tiles: list[Path]) -> None:
    """What the comparison above is worth: the modes, the sizes and the rotations are really in the files."""
    images = {path.name: Image.open(path) for path in tiles}
    modes = {image.mode for image in images.values()}
    assert modes >= {"RGB", "RGBA", "P", "L", "LA", "1", "CMYK", "I;16"}
    kinds = {type(image.info.get("transparency")) for image in images.values() if image.mode == "P"}
    assert kinds >= {type(None), int, bytes}
    geometry = SETTINGS.geometry()
    areas = [image.width * image.height for image in images.values()]
    assert min(areas) < geometry.min_pixels and max(areas) > geometry.max_pixels
    assert any(geometry.resized(image.height, image.width) == (image.height, image.width) for image in images.values())
    turned = images["exif 6.jpg"]
    assert ImageOps.exif_transpose(turned).size == turned.size[::-1] != turned.size
    assert {image.n_frames for name, image in images.items() if name.startswith("moving")} == {3}


def test_exif_orientation_is_ignored_as_the_processor_ignores_it(tiles: list[Path]) -> None:
    reader = TileReader(SETTINGS)
    by_name = {path.name: path for path in tiles}
    straight, turned = reader.load(by_name["exif 1.jpg"]), reader.load(by_name["exif 6.jpg"])
    assert torch.equal(straight.pixels, turned.pixels) and straight.id != turned.id


@pytest.mark.parametrize("shape", [(1, 201), (201, 1), (4, 805)])
def test_a_ratio_that_the_processor_refuses_is_a_tile_error(tmp_path: Path, saved, shape: tuple[int, int]) -> None:
    path = tmp_path / "thin.png"
    path.write_bytes(saved(Image.new("RGB", shape[::-1]), "PNG"))
    with pytest.raises(TileError, match=re.escape(f"{path}: the image is {shape[1]}×{shape[0]} pixels") + ".*200 times"):
        TileReader(SETTINGS).load(path)
    with pytest.raises(ValueError, match="aspect ratio"):
        _theirs(_processor(SETTINGS), [path])


def test_resized_pixels_are_contiguous_and_keep_their_input(scene) -> None:
    geometry = Geometry(4096, 40960)
    rows = torch.from_numpy(scene(97, 211))
    before = rows.clone()
    from_rows = resize(rows.permute(2, 0, 1), geometry)
    from_planes = resize(rows.permute(2, 0, 1).contiguous(), geometry)
    assert from_rows.is_contiguous() and from_rows.dtype == torch.uint8 and from_rows.shape == (3, 96, 224)
    assert torch.equal(from_rows, from_planes), "the memory layout of the input must not matter"
    assert torch.equal(rows, before)
    kept = resize(torch.from_numpy(scene(64, 96)).permute(2, 0, 1), geometry)
    assert kept.is_contiguous() and np.array_equal(kept.permute(1, 2, 0).numpy(), scene(64, 96))


@pytest.mark.parametrize(
    "wrong", [torch.zeros(3, 64, 64), torch.zeros(64, 64, dtype=torch.uint8), torch.zeros(4, 64, 64, dtype=torch.uint8)]
)
def test_resize_refuses_what_is_not_an_image(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[3, H, W\]"):
        resize(wrong, Geometry(4096, 40960))


def test_the_key_names_all_that_the_pixels_depend_on() -> None:
    key = tile_key(Geometry(4096, 1048576))
    assert "4096-1048576" in key and torch.__version__ in key and Image.__version__ in key and "bicubic" in key
    assert re.fullmatch(r"[\w.+-]+", key), "it becomes part of file names"
    assert len({key, tile_key(Geometry(2048, 1048576)), tile_key(Geometry(4096, 4096))}) == 3
