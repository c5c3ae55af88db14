"""The size rule, against a brute-force search where the rule has a meaning of its own, and against worked examples."""

from __future__ import annotations

import pytest

from stairstep.settings import RecipeError, TileError, build, from_plain
from stairstep.tiles import Geometry, TileSettings

USUAL = Geometry(4 * 1024, 1024 * 1024)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (1024, 875, (1024, 864)),  # the tiles of seed 000: 864 visual tokens
        (1, 1, (64, 64)),
        (16, 16, (64, 64)),
        (48, 80, (64, 64)),  # 1.5 and 2.5 both round to the even 2
        (112, 144, (128, 128)),  # 3.5 to 4, 4.5 to 4
        (2048, 1750, (1088, 928)),
        (4000, 4000, (1024, 1024)),
        (1, 200, (32, 928)),
        (20000, 100, (14464, 64)),
    ],
)
def test_worked_examples(height: int, width: int, expected: tuple[int, int]) -> None:
    assert USUAL.resized(height, width) == expected


def test_every_result_is_legal_and_settled() -> None:
    geometry = Geometry(4 * 1024, 40 * 1024)
    for height in range(1, 400, 7):
        for width in range(1, 400, 11):
            if max(height, width) > 200 * min(height, width):
                continue
            rows, columns = geometry.resized(height, width)
            assert rows % 32 == columns % 32 == 0 and rows > 0 and columns > 0
            thin = min(rows, columns) == 32  # only there may the area leave its bounds
            assert thin or geometry.min_pixels <= rows * columns <= geometry.max_pixels, (height, width)
            assert thin or geometry.resized(rows, columns) == (rows, columns)


@pytest.mark.parametrize(("height", "width"), [(1, 201), (201, 1), (0, 5), (5, 0)])
def test_a_shape_without_a_size_names_the_tile(height: int, width: int) -> None:
    with pytest.raises(TileError, match=f"^a/b.png: the image is {width}×{height} pixels"):
        USUAL.resized(height, width, "a/b.png")


def test_visual_tokens_are_those_of_a_resized_tile() -> None:
    assert USUAL.visual_tokens(1024, 864) == 864
    assert Geometry.visual_tokens(32, 32) == 1
    with pytest.raises(ValueError, match="multiples of 32"):
        USUAL.visual_tokens(1024, 875)


def test_settings_give_the_geometry() -> None:
    assert TileSettings().geometry() == USUAL
    assert TileSettings(max_visual_tokens=4096, min_visual_tokens=1).geometry() == Geometry(1024, 4096 * 1024)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"min_visual_tokens": 9, "max_visual_tokens": 8}, "tiles.min_visual_tokens: 9 is more than max_visual_tokens = 8"),
        ({"min_visual_tokens": 0}, "tiles.min_visual_tokens"),
        ({"max_image_pixels": 0}, "tiles.max_image_pixels"),
        ({"decode_workers": 0}, "tiles.decode_workers"),
        ({"prefetch_mb": 0}, "tiles.prefetch_mb"),
    ],
)
def test_settings_are_checked(keys: dict[str, int], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        build(TileSettings, from_plain(keys, "recipe"), "tiles")
    assert build(TileSettings, from_plain({"min_visual_tokens": 8, "max_visual_tokens": 8, "decode_workers": None}, "recipe"), "tiles")


def test_a_geometry_with_crossed_bounds_is_refused() -> None:
    with pytest.raises(ValueError, match="min_pixels <= max_pixels"):
        Geometry(2048, 1024)
