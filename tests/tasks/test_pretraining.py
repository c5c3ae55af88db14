"""The pretraining tasks on the platform's own step loop: they learn, a resumed run takes the very same steps, and what they refuse."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from stairstep.records import series
from stairstep.records.metrics import MetricLog, comparable
from stairstep.settings import InputError, RecipeError, apply_overrides, build, from_plain
from stairstep.tasks import Recipe
from stairstep.tasks.pretraining.base import load_generating
from stairstep.tasks.pretraining.build import pretraining_task
from stairstep.tasks.run import train

KINDS: dict[str, dict[str, Any]] = {
    "glyphs": {"kind": "glyphs", "held_out": 8},
    "reading": {
        "kind": "reading",
        "held_out": 4,
        "tiles": [1, 3],
        "unknown": [0.3],
        "transcription": [0.5],
        "comparison": 0.5,
        "same_fact": 0.5,
    },
    "matching": {"kind": "matching", "held_out": 4, "text": [0.4]},
}


@pytest.fixture(scope="module")
def base(micro: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro base as a generating model, as an earlier stage leaves one."""
    from stairstep.tasks.pretraining.base import write_model

    folder = tmp_path_factory.mktemp("generating") / "base"
    write_model(folder, Path(micro.base), load_generating(Path(micro.base), True, 3), torch.float32)
    return folder


def recipe(kind: str, base: Path, root: Path, *overrides: str) -> Recipe:
    tree = {
        "run": {"name": kind, "root": str(root), "threads": 1},
        "task": KINDS[kind],
        "model": {"base": str(base), "dtype": "float32", "adapter": None},
        "optim": {"batch": 6, "steps": 5, "rates": {"llm": 1e-2, "objective": 1e-2}, "schedule": {"warmup_steps": 1}},
        "evaluation": {"every": 5, "loss_every": 0},
        "checkpoints": {"every": 2, "keep": 5, "keep_best": False},
        "cluster": {"device": "cpu"},
    }
    return build(Recipe, apply_overrides(from_plain(tree, "test"), overrides))


def run(one: Recipe, stop_after: int | None = None) -> Path:
    seen: list[int] = []

    def stop() -> bool:
        seen.append(1)
        return len(seen) == stop_after

    return train(one, stop=stop, console=False).folder


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted((folder / f"checkpoint-{step}").glob("*.safetensors")):
        found |= {f"{path.name}:{name}": tensor for name, tensor in load_file(path).items()}
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_in_the_same_bits(kind: str, base: Path, tmp_path: Path) -> None:
    whole = run(recipe(kind, base, tmp_path / "whole"))
    parted = recipe(kind, base, tmp_path / "parted")
    folder = run(parted, stop_after=3)
    assert not (folder / "checkpoint-5").exists()
    assert run(parted) == folder
    expected, found = weights(whole, 5), weights(folder, 5)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    first = weights(whole, 2)
    assert any(not torch.equal(expected[name], first[name]) for name in expected if name.startswith("model."))
    assert comparable(MetricLog(whole / "metrics.jsonl").rows()) == comparable(MetricLog(folder / "metrics.jsonl").rows())


@pytest.mark.parametrize("kind", KINDS)
def test_worker_processes_change_nothing(kind: str, base: Path, tmp_path: Path) -> None:
    alone = run(recipe(kind, base, tmp_path / "alone", "optim.steps=2"))
    helped = run(recipe(kind, base, tmp_path / "helped", "optim.steps=2", "task.workers=2"))
    expected, found = weights(alone, 2), weights(helped, 2)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_an_ordinary_model_folder(kind: str, base: Path, tmp_path: Path) -> None:
    folder = run(recipe(kind, base, tmp_path, "optim.steps=1")) / "checkpoint-1"
    model, info = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(folder).decode([72, 105]) != ""
    assert not (folder / "figures.json").exists()


@pytest.mark.parametrize(("kind", "change"), [("glyphs", "task.one_look=1"), ("reading", "task.look=one"), ("matching", "task.text=[1]")])
def test_the_loss_falls(kind: str, change: str, base: Path, tmp_path: Path) -> None:
    long = ("optim.steps=24", "optim.batch=12", "evaluation.every=24", "checkpoints.every=24", "optim.schedule.shape=constant")
    slower = ("optim.rates.llm=1e-3",) if kind == "matching" else ()  # its batches differ much; at 1e-2 it only shakes
    folder = run(recipe(kind, base, tmp_path, *long, *slower, change))
    rows = MetricLog(folder / "metrics.jsonl").rows()
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 24
    assert sum(losses[-8:]) / 8 < 0.95 * sum(losses[:4]) / 4
    assert [row["step"] for row in rows if any(name.startswith("exam/") for name in row)] == [0, 24]


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_the_quick_way_on_a_cpu_is_the_same_training_in_fewer_digits(base: Path, tmp_path: Path) -> None:
    steps = ("optim.steps=6", "optim.rates.llm=1e-3", "model.attention=auto")
    exact = run(recipe("reading", base, tmp_path / "exact", *steps))
    quick = run(recipe("reading", base, tmp_path / "quick", *steps, "model.dtype=bfloat16"))
    losses = [series(MetricLog(one / "metrics.jsonl").rows(), "train/loss") for one in (exact, quick)]
    assert losses[0] != losses[1], "the second did compute in bfloat16"
    assert [value for _, value in losses[1]] == pytest.approx([value for _, value in losses[0]], rel=0.02)
    task = pretraining_task(recipe("reading", base, tmp_path, "model.dtype=bfloat16"), torch.device("cpu"))
    assert all("forward" in vars(one) for one in task.model.model.language_model.layers)
    assert all(block.mlp._compiled_call_impl is not None for block in task.model.model.visual.blocks)


def test_a_tower_that_is_not_trained_stays_as_it_was(base: Path, tmp_path: Path) -> None:
    before = load_file(base / "model.safetensors")
    for trained in (True, False):
        folder = run(recipe("reading", base, tmp_path / str(trained), "optim.steps=2", f"task.train_tower={str(trained).lower()}"))
        after = load_file(folder / "checkpoint-2" / "model.safetensors")
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert any("language_model" in name for name in moved)
        assert any("visual" in name for name in moved) == trained


def test_what_a_question_names_is_learned_beside_the_answers(base: Path, tmp_path: Path) -> None:
    more = ("optim.steps=40", "optim.batch=24", "evaluation.every=40", "checkpoints.every=40", "task.transcription=[0]", "task.tiles=[1]")
    folder = run(recipe("reading", base, tmp_path, *more, "task.look=one", "optim.schedule.shape=constant"))
    rows = MetricLog(folder / "metrics.jsonl").rows()
    for name in ("asked", "shown"):  # what the page shows has to be read first, by a tower that was taught glyphs
        assert len(series(rows, f"train/{name}_loss")) == 40
    for name in ("named", "cells"):
        losses = [value for _, value in series(rows, f"train/{name}_loss")]
        assert sum(losses[-8:]) < 0.9 * sum(losses[:8]), name
    assert any(name.startswith("task.safetensors:comparing") for name in weights(folder, 40))


def test_the_batch_is_a_function_of_seed_and_step(base: Path, tmp_path: Path) -> None:
    for kind in KINDS:
        one, again = (pretraining_task(recipe(kind, base, tmp_path), torch.device("cpu")) for _ in range(2))
        other = pretraining_task(recipe(kind, base, tmp_path, "run.seed=1"), torch.device("cpu"))
        again.make_batch(1)
        batch, same, next_one, seeded = one.make_batch(4), again.make_batch(4), one.make_batch(5), other.make_batch(4)
        assert batch.keys() == same.keys()
        assert all(torch.equal(batch[name], same[name]) for name in batch if isinstance(batch[name], torch.Tensor))
        for different in (next_one, seeded):
            assert any(
                name not in different or batch[name].shape != different[name].shape or not torch.equal(batch[name], different[name])
                for name in batch
                if isinstance(batch[name], torch.Tensor)
            )


def test_fresh_weights_are_drawn_from_the_seed_and_not_read(base: Path) -> None:
    stored = load_file(base / "model.safetensors")
    drawn = [load_generating(base, True, seed).state_dict() for seed in (5, 5, 6)]
    name = "model.visual.blocks.0.attn.qkv.weight"
    assert torch.equal(drawn[0][name], drawn[1][name])
    assert not torch.equal(drawn[0][name], drawn[2][name])
    assert not torch.equal(drawn[0][name], stored[name])
    assert torch.equal(load_generating(base, False, 5).state_dict()[name], stored[name])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("model.adapter={rank: 4}", "model.adapter"),
        ("data.train=[{path: x.jsonl}]", "data"),
        ("phases.text_mix=0.5", "phases"),
        ("evaluation.sets=[{path: x.json}]", "evaluation.sets"),
        ("cluster.workers=2", "cluster.workers"),
    ],
)
def test_settings_of_other_tasks_are_refused(change: str, told: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"{told}: task reading"):
        pretraining_task(recipe("reading", base, tmp_path, change), torch.device("cpu"))


def test_a_stage_without_weights_to_start_from_is_told(base: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (bare / path.name).write_bytes(path.read_bytes())
    with pytest.raises(RecipeError, match="name the checkpoint of an earlier stage"):
        pretraining_task(recipe("reading", bare, tmp_path), torch.device("cpu"))


def test_both_models_are_made_stage_by_stage_and_gone_on_with(
    micro: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stairstep.tasks.pretraining import make

    monkeypatch.setattr(make, "shipped_bases", lambda: {"tiny-reader": Path(micro.base)})
    monkeypatch.setattr(make, "REPORTED_SEEDS", (7,))
    monkeypatch.setitem(make.STAGES, "reader", tuple(_on(stage, micro.base) for stage in make.STAGES["reader"]))
    recipes = Path(__file__).parents[2] / "recipes" / "tiny"
    small = ("optim.steps=2", "optim.batch=4", "optim.schedule.warmup_steps=1", "task.held_out=2", "run.threads=1", "model.dtype=float32")
    overrides = [f"{stage.recipe}:{change}" for stage in make.STAGES["reader"] for change in small]
    calls: list[str] = []
    real = make.train

    def counted(one: Recipe, **more: Any) -> Any:
        calls.append(str(one.run.name))
        return real(one, **more)

    monkeypatch.setattr(make, "train", counted)
    arguments = ("reader", recipes, tmp_path, torch.device("cpu"), 0, overrides, 2)
    assert make.make(*arguments, stop=lambda: True) is None
    made = make.make(*arguments)
    assert made == tmp_path / "tiny-reader"
    assert calls[0] == calls[1] == "reader-glyphs"
    assert all(one.dtype == torch.bfloat16 for one in load_file(made / "model.safetensors").values())
    figures = json.loads((tmp_path / "tiny-reader.json").read_text())
    assert set(figures["worlds"]["7"]) == {"single", "wrong_tile", "three", "wrong_tiles", "blank", "swapped"}
    assert figures["stages"]["reading"]["steps"] == 2
    done = len(calls)
    assert make.make(*arguments) == made
    assert len(calls) == done, "finished stages are not run again"


def _on(stage: Any, base: Path) -> Any:
    """The first stage with another base; the others start from the one before them."""
    return replace(stage, changes=("task.look=world", f"model.base={base}")) if stage.name == "glyphs" else stage


def test_a_finished_run_is_told(base: Path, tmp_path: Path) -> None:
    one = recipe("glyphs", base, tmp_path, "optim.steps=1")
    run(one)
    with pytest.raises(InputError, match="finished"):
        run(one)
