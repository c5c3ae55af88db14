"""The retrieval task: what a batch holds and is compared with, any number of workers, validation, bad numbers, query-side tuning."""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from objectives_toy import run_ranks, worst_error
from torch import Tensor
from transformers import Qwen3VLModel

from stairstep.data import PairRow, TextRow
from stairstep.models.encoder import Encoder
from stairstep.models.load import load_encoder
from stairstep.objectives import Alone, Collective
from stairstep.records import RunFolder, read_json
from stairstep.tasks.batches import text_batch, tile_batch, tile_paths
from stairstep.tasks.evaluate import evaluate
from stairstep.tasks.loading import load_rows, tile_reader
from stairstep.tasks.recipe import Recipe
from stairstep.tasks.retrieval import FrozenDocuments, RetrievalTask
from stairstep.tasks.run import train
from stairstep.training import NonFiniteError

still = ("model.adapter.dropout=0", "evaluation.every=100", "evaluation.loss_every=0", "evaluation.sets=[]", "phases.text_warmup_steps=0")


def task_of(recipe: Recipe, collective: Collective | None = None, disturb: bool = True) -> RetrievalTask:
    """The recipe's task, its adapter moved from where B is zero and nothing but B has a gradient."""
    encoder = load_encoder(recipe.model, trainable=True, seed=recipe.run.seed)
    draw = torch.Generator().manual_seed(3)
    for members in encoder.groups().values() if disturb else ():
        for _, parameter in members:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return RetrievalTask(recipe, encoder, load_rows(recipe), tile_reader(recipe), collective or Alone())


def gradients(task: RetrievalTask) -> dict[str, Tensor]:
    """The gradients that the last step left, taken away."""
    found = {}
    for name, parameter in (one for members in task.groups().values() for one in members):
        if parameter.grad is not None:
            found[name], parameter.grad = parameter.grad, None
    return found


# --- a batch


@pytest.fixture
def mixed(micro: SimpleNamespace, tmp_path: Path) -> Path:
    """Four rows in which a text, a tile and an article return: the same tile once more under another name, and as its own negative."""
    images = sorted((micro.world / "images").rglob("*.png"))
    data = tmp_path / "data"
    for place, name in enumerate(["A_chunk_0", "A_chunk_1", "B_chunk_0", "C_chunk_0", "D_chunk_0", "D_chunk_1"]):
        _copy(images[place], data / f"{name}.png")
    _copy(data / "A_chunk_0.png", data / "again" / "A_chunk_0.png")
    _copy(data / "D_chunk_0.png", data / "again" / "unnamed.png")
    rows = [
        ("where is a", "A_chunk_0", ["B_chunk_0"]),
        ("where is b", "B_chunk_0", ["A_chunk_1", "again/unnamed"]),
        ("where is c", "again/A_chunk_0", ["A_chunk_0"]),
        ("where is a", "C_chunk_0", ["D_chunk_0", "D_chunk_1"]),
    ]
    lines = [
        json.dumps({"query": query, "chunk_path": f"{positive}.png", "neg_chunk_paths": [f"{one}.png" for one in negatives]})
        for query, positive, negatives in rows
    ]
    (data / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return data


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


@pytest.fixture
def mixed_recipe(mixed: Path, recipe: Any) -> Callable[..., Recipe]:
    place = (f"data.roots=[{mixed}]", "data.train=[{path: rows.jsonl}]", "data.validation=[]", "data.text=[]", "data.order=sequential")
    return lambda *overrides: recipe(*still, *place, "optim.batch=4", "data.hard_negatives=2", *overrides)


@pytest.mark.parametrize(
    ("overrides", "documents", "masked", "candidates"),
    [
        # A0 B0 A1 D0 C0 D1; a's rows leave out the other's positive and A1, c's row leaves out A1
        ((), 6, 2 + 0 + 1 + 2, (4 + 6 + 5 + 4) / 4),
        (("objective.masks.same_article=false",), 6, 1 + 0 + 0 + 1, (5 + 6 + 6 + 5) / 4),
        # the second negatives of b and of the last row are gone: A0 B0 A1 C0 D0
        (("data.hard_negatives=1",), 5, 2 + 0 + 1 + 2, (3 + 5 + 4 + 3) / 4),
        # A0 B0 C0
        (("data.hard_negatives=0",), 3, 1 + 0 + 0 + 1, (2 + 3 + 3 + 2) / 4),
    ],
)
def test_a_batch_holds_each_tile_once_and_compares_what_may_be_compared(
    overrides: tuple[str, ...], documents: int, masked: int, candidates: float, mixed_recipe: Callable[..., Recipe]
) -> None:
    task = task_of(mixed_recipe(*overrides))
    report = task.step(1)
    found = {name: report.metrics[name] for name in ("documents", "masked_pairs", "candidates")}
    assert found == {"documents": documents, "masked_pairs": masked, "candidates": pytest.approx(candidates)}
    assert [one.rsplit(":", 1)[-1] for one in report.rows] == ["1", "2", "3", "4"]
    same_article = "objective.masks.same_article=false" not in overrides
    expected = plain_loss(task, task.rows.train[0], same_article)
    assert report.loss == pytest.approx(expected, rel=1e-5)
    if same_article and documents == 6:
        assert abs(expected - plain_loss(task, task.rows.train[0], False)) > 1e-3, "these masks make no difference"


@torch.no_grad()
def plain_loss(task: RetrievalTask, rows: Sequence[PairRow], same_article: bool = True) -> float:
    """InfoNCE row by row in plain numbers, each text and tile encoded by itself."""
    encoder, reader = task.encoder, task.reader
    tiles = {path: reader.load(path) for row in rows for path in (row.positive, *row.negatives)}
    vectors = {tile.id: encoder.encode_tiles([tile.pixels])[0] for tile in tiles.values()}
    article = {tile.id: path.name.split("_chunk_")[0] if "_chunk_" in path.name else None for path, tile in reversed(tiles.items())}
    scale = 1 / task.recipe.objective.temperature.initial
    total = 0.0
    for row in rows:
        query = encoder.encode_texts([row.query], "query")[0]
        positive = tiles[row.positive].id
        right = {tiles[one.positive].id for one in rows if one.query == row.query}
        shunned = {article[one] for one in right} - {None} if same_article else set()
        logits = {one: scale * float(query @ vector) for one, vector in vectors.items() if one not in right and article[one] not in shunned}
        own = scale * float(query @ vectors[positive])
        total += math.log(math.exp(own) + sum(map(math.exp, logits.values()))) - own
    return total / len(rows)


def test_the_same_tile_under_two_paths_is_one_document(mixed_recipe: Callable[..., Recipe]) -> None:
    task = task_of(mixed_recipe())
    rows = task.rows.train[0]
    paths = tile_paths(rows)
    assert len(paths) == len(set(paths)) == 8
    batch = tile_batch(rows, [task.reader.load(path) for path in paths], 0.0, Alone())
    assert len(batch.documents) == 6
    assert batch.positives[0] == batch.positives[2] != batch.positives[1]
    assert [one.article for one in batch.documents] == ["A", "B", "A", None, "C", "D"]


def test_equal_passages_are_one_document() -> None:
    rows = [
        TextRow("q", "one", ("two", "three"), "f", "f:1"),
        TextRow("r", "two", ("one",), "f", "f:2"),
        TextRow("s", "one", (), "f", "f:3"),
    ]
    batch = text_batch(rows)
    assert [one.text for one in batch.documents] == ["one", "two", "three"]
    assert batch.positives == [batch.documents[0].key, batch.documents[1].key, batch.documents[0].key]
    assert batch.where == ["f:1", "f:2", "f:3"]


# --- any number of workers


@pytest.mark.parametrize("size", [2, 3])
def test_workers_make_the_same_batch(size: int, mixed_recipe: Callable[..., Recipe]) -> None:
    task = task_of(mixed_recipe())
    rows, reader = task.rows.train[0], task.reader
    paths = tile_paths(rows)
    whole = tile_batch(rows, [reader.load(path) for path in paths], 0.0, Alone())

    def share(rank: Any) -> Any:
        mine = paths[rank.rank * len(paths) // size : (rank.rank + 1) * len(paths) // size]
        return tile_batch(rows, [reader.load(path) for path in mine], 0.0, rank)

    for batch in run_ranks(size, share):
        assert (batch.queries, batch.positives, batch.documents) == (whole.queries, whole.positives, whole.documents)
        assert 0 < len(batch.pixels) < len(whole.pixels), "a worker decodes its own share alone"


@pytest.mark.parametrize("extra", [(), ("task.query_side=true",), ("objective.gradcache.keep_graphs_mb=100",)], ids=["", "query", "kept"])
def test_two_workers_step_like_one(extra: tuple[str, ...], recipe: Any) -> None:
    """A text step and two tile steps, dropout on, odd chunks: same loss, same metrics, and gradients that add up to the same."""
    whole = recipe("phases.text_warmup_steps=1", "objective.gradcache.chunk_items=3", "data.hard_negatives=2", *extra)

    def steps(collective: Collective | None) -> list[tuple[Any, dict[str, Tensor]]]:
        task = task_of(whole, collective)
        try:
            return [(task.step(step), gradients(task)) for step in (1, 2, 3)]
        finally:
            task.close()

    alone = steps(None)
    assert [report.metrics["text"] for report, _ in alone] == [1.0, 0.0, 0.0]
    for ranks in run_ranks(2, steps):
        for (report, found), (expected, true) in zip(ranks, alone, strict=True):
            assert report.loss == pytest.approx(expected.loss, rel=1e-6)
            assert report.metrics == pytest.approx(dict(expected.metrics), rel=1e-4, abs=1e-6)
            assert list(report.rows) == list(expected.rows)
            moved = {name for name, one in true.items() if one.norm() > 1e-9}
            assert len(moved) > 10
            assert all(found[name].norm() < 1e-9 for name in true.keys() - moved)
            assert worst_error({name: found[name] for name in moved}, {name: true[name] for name in moved}) <= 1e-5


# --- validation


def test_validation_is_a_seeded_sample_of_the_whole_split_in_batches_like_trainings(recipe: Any) -> None:
    held_out = ("data.validation=[{path: train_hn.jsonl}]", "evaluation.loss_batches=2", "optim.batch=6")
    task = task_of(recipe(*still, *held_out))
    seen: list[list[str]] = []
    encode = task.encoder.encode_texts
    task.encoder.encode_texts = lambda texts, role: (seen.append(list(texts)), encode(texts, role))[1]  # type: ignore[method-assign]
    found = task.validation()

    rows = task.rows.validation[0]
    assert len(rows) == 40
    row_of = {row.query: index for index, row in enumerate(rows)}
    assert [len(texts) for texts in seen] == [6, 6]
    taken = [row_of[text] for texts in seen for text in texts]
    assert len(set(taken)) == 12 and max(taken) > 20, "a sample of the whole split, not its beginning"
    parts = [[rows[index] for index in taken[:6]], [rows[index] for index in taken[6:]]]
    task.encoder.encode_texts = encode  # type: ignore[method-assign]
    losses = [plain_loss(task, part) for part in parts]
    assert found["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    smaller = sum(plain_loss(task, part[start : start + 2]) for part in parts for start in (0, 2, 4)) / 6
    assert abs(found["loss"] - smaller) > 0.1, "fewer candidates give another loss, so this one was taken over all"

    other = task_of(recipe(*still, *held_out, "run.seed=5"))
    again: list[str] = []
    encode = other.encoder.encode_texts
    other.encoder.encode_texts = lambda texts, role: (again.extend(texts), encode(texts, role))[1]  # type: ignore[method-assign]
    other.validation()
    assert sorted(again) == sorted(text for texts in seen for text in texts), "runs of other seeds are measured on the same rows"


def test_validation_takes_no_batch_that_is_smaller_than_trainings(recipe: Any) -> None:
    task = task_of(recipe(*still, "data.validation=[{path: train_hn.jsonl, limit: 9}]", "evaluation.loss_batches=3", "optim.batch=6"))
    seen: list[int] = []
    encode = task.encoder.encode_texts
    task.encoder.encode_texts = lambda texts, role: (seen.append(len(texts)), encode(texts, role))[1]  # type: ignore[method-assign]
    assert task.validation()["loss"] > 0
    assert seen == [6]
    few = task_of(recipe(*still, "data.validation=[{path: train_hn.jsonl, limit: 3}]", "optim.batch=6"))
    assert few.validation()["loss"] == pytest.approx(plain_loss(few, few.rows.validation[0]), rel=1e-5)


def test_validation_leaves_no_trace(recipe: Any) -> None:
    task, other = task_of(recipe("model.adapter.dropout=0.3", *still[1:])), task_of(recipe("model.adapter.dropout=0.3", *still[1:]))
    first = task.validation()
    assert task.validation() == first, "validation has no dropout"
    assert not gradients(task)
    assert task.step(1).loss == other.step(1).loss


# --- numbers that are not finite


def test_a_bad_embedding_names_its_row(recipe: Any) -> None:
    task = task_of(recipe(*still))
    bad = task.rows.train[0][task._tiles.batch(0)[2][1]]  # type: ignore[union-attr]
    encode = task.encoder.encode_texts

    def poisoned(texts: Sequence[str], role: Any) -> Tensor:
        wrong = torch.tensor([float("nan") if text == bad.query else 1.0 for text in texts])
        return encode(texts, role) * wrong[:, None]

    task.encoder.encode_texts = poisoned  # type: ignore[method-assign]
    report = task.step(1)
    assert math.isnan(report.loss)
    assert list(report.rows) == [bad.where]
    assert not gradients(task)


def test_a_run_that_blows_up_stops_and_keeps_what_it_had(recipe: Any) -> None:
    wild = recipe(*still, "optim.rates.llm=1e30", "optim.schedule.warmup_steps=0", "checkpoints.every=1")
    with pytest.raises(NonFiniteError, match=r"step 2: the loss is not finite; nothing was updated.*train_hn\.jsonl:\d+"):
        train(wild, console=False)
    folder = RunFolder.open(Path(wild.run.root) / "run")
    assert [one.step for one in folder.checkpoints()] == [1]
    assert [row["step"] for row in folder.metrics.rows()] == [1]
    assert folder.status is not None and folder.status.state == "failed"
    told = read_json(folder.path / "not_finite.json")
    assert told["step"] == 2
    assert len(told["rows"]) == wild.optim.batch
    with pytest.raises(NonFiniteError, match="step 2"):
        train(wild, console=False)


# --- query-side tuning

query_side = ("task.query_side=true", "model.adapter.dropout=0.2", "phases.text_warmup_steps=1")


def test_query_side_documents_are_the_bare_bases_and_the_queries_are_not(recipe: Any) -> None:
    task = task_of(recipe(*still, "task.query_side=true"))
    base = load_encoder(task.recipe.model, trainable=False)
    frozen = FrozenDocuments(task.encoder)
    tiles = [task.reader.load(path).pixels for path in tile_paths(task.rows.train[0])[:4]]
    with torch.no_grad():
        assert torch.equal(frozen.encode_tiles(tiles), base.encode_tiles(tiles))
        assert torch.equal(frozen.encode_texts(["some passage"], "document"), base.encode_texts(["some passage"], "document"))
        assert frozen.state_digest() == base.state_digest() != task.encoder.state_digest()
        assert not torch.allclose(task.encoder.encode_texts(["q"], "query"), base.encode_texts(["q"], "query"), atol=1e-3)
        assert not torch.allclose(task.encoder.encode_tiles(tiles), base.encode_tiles(tiles), atol=1e-3)


def test_a_query_side_step_trains_against_the_bare_bases_documents(recipe: Any) -> None:
    task = task_of(recipe(*still, "task.query_side=true"))
    rows = [task.rows.train[0][row] for _, row in task._tiles.batch(0)]  # type: ignore[union-attr]
    report = task.step(1)
    found = gradients(task)
    assert not any(name.startswith("visual.") for name in found)
    assert found["objective.temperature.log_scale"].norm() > 0

    both_sides = plain_loss(task, rows)
    adapted = task.encoder.encode_tiles
    base = load_encoder(task.recipe.model, trainable=False)
    task.encoder.encode_tiles = base.encode_tiles  # type: ignore[method-assign]
    assert report.loss == pytest.approx(plain_loss(task, rows), rel=1e-5)
    assert abs(report.loss - both_sides) > 1e-3
    task.encoder.encode_tiles = adapted  # type: ignore[method-assign]


def test_an_index_built_by_the_base_stays_valid_and_there_is_one_model(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = recipe(*query_side)
    measured = evaluate(tuned, base=True)
    tiles = measured.results[0].facts["embeddings"]["tiles"]
    assert tiles["computed"] > 10
    del measured

    gc.collect()
    before = sum(isinstance(one, Qwen3VLModel) for one in gc.get_objects())
    models: list[int] = []
    step = RetrievalTask.step

    def counted(task: RetrievalTask, number: int) -> Any:
        models.append(sum(isinstance(one, Qwen3VLModel) for one in gc.get_objects()) - before)
        return step(task, number)

    monkeypatch.setattr(RetrievalTask, "step", counted)
    folder = train(tuned, console=False).folder
    assert models == [1] * 6
    for number in (0, 3, 6):
        counts = read_json(folder / f"eval_step{number}.summary.json")["embeddings"]
        assert counts["tiles"]["computed"] == 0
        assert counts["tiles"]["found"] == tiles["computed"]
        assert (counts["queries"]["computed"] > 0) == (number > 0), "the queries' embeddings move with the adapter"


def test_an_encoder_is_in_eval_mode_outside_its_steps(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation and evaluation would otherwise have dropout, and a step none."""
    modes: list[bool] = []
    encode = Encoder.encode_texts

    def watched(encoder: Encoder, texts: Sequence[str], role: Any) -> Tensor:
        modes.append(encoder.training)
        return encode(encoder, texts, role)

    monkeypatch.setattr(Encoder, "encode_texts", watched)
    task = task_of(recipe(*still))
    task.validation()
    assert modes and not any(modes)
    modes.clear()
    task.step(1)
    assert modes and all(modes)
    assert not task.encoder.training
