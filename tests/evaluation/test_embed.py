"""Embedding lists of tiles and texts: batches of one shape, each input once, order kept, the encoder left as it was."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from stairstep.evaluation.embed import Embedder
from stairstep.evaluation.embeddings import EmbeddingStore
from stairstep.settings import StairstepError

SIZES = {"a": "32x64:1", "b": "64x64:2", "c": "32x64:3", "d": "32x64:4", "e": "64x64:5", "f": "32x64:6", "g": "96x32:7"}


def test_tiles_come_back_in_order_whatever_the_batches(fakes, tiles) -> None:
    paths = tiles(**SIZES)
    expected = None
    for batch_tokens, batches in ((1, 7), (10, 5), (15, 4), (1000, 3)):
        encoder = fakes.Encoder()
        found = Embedder(encoder, batch_tokens).tiles(paths, fakes.Reader())
        assert len(encoder.tile_batches) == found.report.batches == batches
        assert sum(encoder.tile_batches) == found.report.computed == 7
        assert found.rows == (0, 1, 2, 3, 4, 5, 6)
        if expected is not None:
            assert torch.equal(found.vectors, expected)
        expected = found.vectors
    assert expected is not None
    reader = fakes.Reader()
    for row, path in enumerate(paths):
        (tile,) = reader.ahead([path])
        assert torch.equal(expected[row], fakes.vector_of(tile.pixels.numpy().tobytes(), 12, 0.0))


def test_no_batch_exceeds_the_budget_unless_one_tile_does(fakes, tiles) -> None:
    paths = tiles(**{f"t{one}": f"32x64:{one}" for one in range(11)}, big="320x320:0")
    encoder = fakes.Encoder()
    report = Embedder(encoder, 22).tiles(paths, fakes.Reader()).report
    assert sorted(encoder.tile_batches) == [1, 3, 4, 4]  # 5 tokens each; the big one has 103
    assert report.tokens == 11 * 5 + 103


def test_waiting_tiles_are_bounded_when_every_tile_has_its_own_size(fakes, tiles) -> None:
    paths = tiles(**{f"t{one:02d}": f"32x{32 * (one + 1)}:x" for one in range(40)})
    encoder, reader = fakes.Encoder(), fakes.Reader()
    most = 0

    def watch(pixels):
        nonlocal most
        most = max(most, len(reader.decoded) - sum(encoder.tile_batches))
        return type(encoder).encode_tiles(encoder, pixels)

    encoder.encode_tiles = watch
    Embedder(encoder, 100).tiles(paths, reader)
    assert sum(encoder.tile_batches) == 40
    assert 10 < most < 32, "tiles without mates pile up"


def test_who_waits_is_told_at_every_file_and_batch(fakes, tiles) -> None:
    told: list[tuple[str, int, int]] = []
    embedder = Embedder(fakes.Encoder(), 10, told=lambda *one: told.append(one))
    embedder.tiles(tiles(**SIZES), fakes.Reader())
    files = [one for one in told if one[0] == "tiles known by their content"]
    assert files == [("tiles known by their content", done, 7) for done in range(1, 8)]
    assert [one for one in told if one not in files] == [("tiles embedded", done, 7) for done in (0, 1, 3, 4, 6)], (
        "each batch a moment later"
    )
    told.clear()
    embedder.texts(["one", "two three"], "query")
    assert [what for what, _, _ in told] == ["query texts embedded"] * 2


def test_equal_tiles_are_computed_once(fakes, tiles) -> None:
    paths = tiles(a="32x64:same", b="32x64:other", c="32x64:same")
    reader = fakes.Reader()
    found = Embedder(fakes.Encoder(), 100).tiles(paths, reader)
    assert found.rows == (0, 1, 0)
    assert found.ids[0] == found.ids[2] != found.ids[1]
    assert found.vectors.shape == (2, 12)
    assert reader.decoded == paths[:2]


def test_texts_of_one_length_go_together_and_come_back_in_order(fakes) -> None:
    texts = ["a b c", "d", "e f", "g", "h i j", "d"]
    encoder = fakes.Encoder()
    found = Embedder(encoder, 12).texts(texts, "query")
    assert sorted(encoder.text_batches) == [["a b c", "h i j"], ["d", "g"], ["e f"]]
    expected = torch.stack([fakes.vector_of(f"query:{text}".encode(), 12, 0.0) for text in texts])
    assert torch.equal(found.vectors, expected)
    assert (found.report.computed, found.report.tokens) == (5, 4 + 4 + 5 + 6 + 6)


def test_a_second_evaluation_of_one_state_computes_nothing(fakes, tiles, tmp_path: Path) -> None:
    paths = tiles(**SIZES)
    store = EmbeddingStore(tmp_path / "kept", 4)
    first = Embedder(fakes.Encoder(), 15, store)
    cold, cold_texts = first.tiles(paths, fakes.Reader()), first.texts(["q", "r s"], "query")

    encoder, reader = fakes.Encoder(), fakes.Reader()
    second = Embedder(encoder, 10, EmbeddingStore(tmp_path / "kept", 4))
    warm, warm_texts = second.tiles(paths, reader), second.texts(["r s", "q"], "query")
    assert (encoder.tile_batches, encoder.text_batches, reader.decoded) == ([], [], [])
    assert (warm.report.computed, warm.report.found) == (0, 7)
    assert (warm_texts.report.computed, warm_texts.report.found) == (0, 2)
    assert torch.equal(warm.vectors, cold.vectors)
    assert torch.equal(warm_texts.vectors, cold_texts.vectors[[1, 0]])


def test_another_state_role_or_geometry_is_computed_anew(fakes, tiles, tmp_path: Path) -> None:
    paths = tiles(**SIZES)
    store = EmbeddingStore(tmp_path / "kept", 4)
    first = Embedder(fakes.Encoder(), 15, store)
    first.tiles(paths, fakes.Reader())
    first.texts(["q"], "query")
    assert Embedder(fakes.Encoder(weight=0.5), 15, store).tiles(paths, fakes.Reader()).report.computed == 7
    assert Embedder(fakes.Encoder(), 15, store).tiles(paths, fakes.Reader(key="geometry-b")).report.computed == 7
    assert Embedder(fakes.Encoder(), 15, store).texts(["q"], "document").report.computed == 1


def test_overlapping_sets_share_what_they_share(fakes, tiles, tmp_path: Path) -> None:
    paths = tiles(**SIZES)
    store = EmbeddingStore(tmp_path / "kept", 4)
    Embedder(fakes.Encoder(), 15, store).tiles(paths[:4], fakes.Reader())
    encoder, reader = fakes.Encoder(), fakes.Reader()
    found = Embedder(encoder, 15, store).tiles(paths[2:], reader)
    assert (found.report.found, found.report.computed) == (2, 3)
    assert reader.decoded == paths[4:]
    assert torch.equal(found.vectors, Embedder(fakes.Encoder(), 15).tiles(paths[2:], fakes.Reader()).vectors)


def test_what_was_computed_before_a_failure_is_kept(fakes, tiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stairstep.evaluation.embed._SHARD_ROWS", 2)
    paths = tiles(**{f"t{one}": f"32x32:{one}" for one in range(6)}, z="32x32:broken")
    store, encoder, reader = EmbeddingStore(tmp_path / "kept", 4), fakes.Encoder(), fakes.Reader()
    encoder.train()
    with pytest.raises(ValueError, match="broken"):
        Embedder(encoder, 4, store).tiles(paths, reader)
    assert reader.closed == 1, "the reader was left running"
    assert encoder.training
    assert not torch.is_inference_mode_enabled()
    assert Embedder(fakes.Encoder(), 4, store).tiles(paths[:-1], fakes.Reader()).report.found >= 4


def test_the_encoder_is_left_in_the_modes_it_was_in(fakes, tiles) -> None:
    encoder = fakes.Encoder()
    encoder.train()
    encoder.frozen.eval()
    embedder = Embedder(encoder, 100)
    found = embedder.tiles(tiles(a="32x32:1"), fakes.Reader())
    embedder.texts(["x"], "query")
    assert encoder.training
    assert not encoder.frozen.training
    (found.vectors @ encoder.weight.expand(12)).sum().backward()  # no inference tensor leaks into training
    assert encoder.weight.grad is not None


def test_an_embedding_that_is_not_finite_stops_and_is_not_kept(fakes, tiles, tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path / "kept", 4)
    with pytest.raises(StairstepError, match="not finite"):
        Embedder(fakes.Encoder(weight=float("nan")), 100, store).tiles(tiles(a="32x32:1"), fakes.Reader())
    assert not list((tmp_path / "kept").rglob("*.safetensors"))


def test_a_tile_that_changes_under_the_evaluation_is_told(fakes, tiles) -> None:
    (path,) = tiles(a="32x32:1")

    class Changing(fakes.Reader):
        def ahead(self, paths):
            path.write_text("32x32:2")
            return super().ahead(paths)

    with pytest.raises(StairstepError, match=r"a\.png.*changed"):
        Embedder(fakes.Encoder(), 100).tiles([path], Changing())


def test_progress_is_told(fakes, tiles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("stairstep.evaluation.embed._LOG_EVERY_S", -1.0)
    with caplog.at_level(logging.INFO):
        Embedder(fakes.Encoder(), 1).tiles(tiles(**SIZES), fakes.Reader())
    assert "embedding tiles: 3 of 7" in caplog.text
