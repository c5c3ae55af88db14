"""Checkpoints of whole runs: plain PEFT reads them, they hold all that was trained, and the right ones stay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tasks_world import make_recipe, recipe_tree
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from stairstep.models.load import load_encoder
from stairstep.records import RunFolder, digest_of_folder, read_json
from stairstep.settings import InputError
from stairstep.tasks.loading import tile_reader
from stairstep.tasks.opening import Finished
from stairstep.tasks.recipe import Recipe
from stairstep.tasks.retrieval import RetrievalTask
from stairstep.tasks.run import train
from stairstep.tiles import patches
from stairstep.training import EvaluationReport

QUERIES = ["Where was Mara Velin born?", "x", "a much longer query about nothing that is written anywhere in particular"]
QUERY_INSTRUCTION = "Retrieve images or text relevant to the user's query."
DOCUMENT_INSTRUCTION = "Represent the user's input."
WEIGHTS = "adapter_model.safetensors"

quick = ("evaluation.every=100", "evaluation.loss_every=0", "evaluation.sets=[]")


def run(recipe: Recipe, **options: Any) -> Finished:
    return train(recipe, console=False, **options)


def kept(folder: Path) -> list[int]:
    return [one.step for one in RunFolder.open(folder).checkpoints()]


@torch.no_grad()
def plain_vectors(model: PeftModel, base: Path, texts: list[str], tiles: list[torch.Tensor]) -> torch.Tensor:
    """As one who knows transformers and PEFT alone would: chat template, one item at a time, last token of the last hidden state."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    core = model.get_base_model()
    vectors = []

    def embed(instruction: str, content: list[dict[str, str]], repeat: int, **visual: torch.Tensor) -> None:
        messages = [{"role": "system", "content": [{"type": "text", "text": instruction}]}, {"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        text = text.replace("<|image_pad|>", "<|image_pad|>" * repeat)
        inputs = tokenizer(text, return_tensors="pt")
        if visual:
            visual["mm_token_type_ids"] = (inputs["input_ids"] == core.config.image_token_id).int()
        core.rope_deltas = None
        hidden = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **visual).last_hidden_state
        vectors.append(torch.nn.functional.normalize(hidden[0, -1], dim=-1))

    for one in texts:
        embed(QUERY_INSTRUCTION, [{"type": "text", "text": one}], 1)
    for tile in tiles:
        values, grid = patches([tile])
        tokens = int(grid.prod()) // 4
        embed(DOCUMENT_INSTRUCTION, [{"type": "image"}], tokens, pixel_values=values, image_grid_thw=grid)
    return torch.stack(vectors)


ADAPTERS = {
    "lora": ("model.adapter.targets.vit_mlp=true", "model.adapter.vit_rank=3"),
    "dora": ("model.adapter.dora=true", "model.adapter.rslora=true"),
    "whole vit": ("model.adapter.targets.vit_attention=false", "model.adapter.vit_unfrozen=true"),
    "whole modules": ("model.adapter.modules_to_save=[visual.merger, language_model.norm]",),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_plain_peft_reads_a_checkpoint_and_gives_the_platforms_embeddings(kind: str, recipe: Any, micro: SimpleNamespace) -> None:
    trained = recipe("phases.text_warmup_steps=0", "optim.steps=3", *quick, *ADAPTERS[kind])
    checkpoint = run(trained).folder / "checkpoint-3"

    # By way of the whole model: transformers 4.57's bare one finds no weights under keys that begin with "model.", and only warns.
    base = Qwen3VLForConditionalGeneration.from_pretrained(micro.base, dtype=torch.float32).model
    before = {name: one.clone() for name, one in base.state_dict().items()}
    plain = PeftModel.from_pretrained(base, str(checkpoint)).eval()
    reader = tile_reader(trained)
    tiles = [reader.load(path).pixels for path in sorted((micro.world / "images").rglob("*.png"))[:3]]
    expected = plain_vectors(plain, micro.base, QUERIES, tiles)

    platform = load_encoder(trained.model, trainable=True)
    untrained = _platform_vectors(platform, tiles)
    platform.load_trained(checkpoint)
    found = _platform_vectors(platform, tiles)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for part in (slice(0, len(QUERIES)), slice(len(QUERIES), None)):
        assert (found[part] - untrained[part]).norm(dim=1).min() > 1e-3, "training must have moved these embeddings"

    stored = load_file(checkpoint / WEIGHTS)
    if kind == "whole vit":
        whole = [name for name in before if name.startswith("visual.")]
        assert {f"base_model.model.{name}" for name in whole} <= stored.keys()
        assert any(not torch.equal(stored[f"base_model.model.{name}"], before[name]) for name in whole if "blocks.0" in name)
        assert not any(".lora_" in name for name in stored if ".visual." in name)
    if kind == "whole modules":
        norm = "language_model.norm.weight"
        assert not torch.equal(stored[f"base_model.model.{norm}"], before[norm])
        assert not torch.equal(stored["base_model.model.visual.merger.linear_fc2.weight"], before["visual.merger.linear_fc2.weight"])


@torch.no_grad()
def _platform_vectors(encoder: Any, tiles: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([encoder.encode_texts(QUERIES, "query"), encoder.encode_tiles(tiles)])


def test_the_adapter_in_a_checkpoint_is_the_averaged_one(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    raw: list[dict[str, torch.Tensor]] = []
    after_update = RetrievalTask.after_update

    def watched(task: RetrievalTask) -> None:
        after_update(task)
        raw.append(_trained(task))

    monkeypatch.setattr(RetrievalTask, "after_update", watched)
    start = load_encoder(recipe().model, trainable=True, seed=0)
    average = {name: one.detach().clone() for members in start.groups().values() for name, one in members}
    folder = run(recipe("optim.ema_decay=0.7", *quick)).folder
    for weights in raw:
        average = {name: 0.7 * one + 0.3 * weights[name] for name, one in average.items()}

    task_side = load_encoder(recipe().model, trainable=True)
    task_side.load_trained(folder / "checkpoint-6")
    saved = {name: one.detach() for members in task_side.groups().values() for name, one in members}
    assert saved.keys() == average.keys()
    for name, one in saved.items():
        torch.testing.assert_close(one, average[name], atol=1e-6, rtol=1e-5)
    assert max(float((one - raw[-1][name]).abs().max()) for name, one in saved.items()) > 1e-3, "average and raw weights are the same"
    state = load_file(folder / "checkpoint-6" / "trainer.safetensors")
    assert all(torch.equal(state[f"raw.{name}"], raw[-1][name]) for name in saved)
    temperature = load_file(folder / "checkpoint-6" / "objective.safetensors")["temperature.log_scale"]
    assert temperature != raw[-1]["objective.temperature.log_scale"], "the temperature is averaged too"


def _trained(task: RetrievalTask) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for members in task.groups().values() for name, one in members}


# --- which checkpoints stay


def scored(monkeypatch: pytest.MonkeyPatch, scores: dict[int, float], seen: list[list[int]] | None = None) -> None:
    """Evaluations that give these selection scores, and note which checkpoints are there while they run."""

    def evaluate(task: RetrievalTask, step: int) -> EvaluationReport:
        folder = Path(task.recipe.run.root) / str(task.recipe.run.name)
        if seen is not None and step:
            seen.append(kept(folder))
            assert step in seen[-1], f"the weights that are evaluated at step {step} are not kept"
        return EvaluationReport({"score": scores[step]}, scores[step])

    monkeypatch.setattr(RetrievalTask, "evaluate", evaluate)


often = ("optim.steps=8", "evaluation.every=2", "evaluation.loss_every=0", "checkpoints.every=1", "checkpoints.keep=1")


def test_the_newest_and_the_best_checkpoints_stay(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    scored(monkeypatch, {0: 1.0, 2: 0.2, 4: 0.9, 6: 0.3, 8: 0.4}, seen)
    assert kept(run(recipe(*often)).folder) == [4, 8]
    assert seen == [[2], [2, 4], [4, 6], [4, 8]]
    assert kept(run(recipe(*often, "run.name=two", "checkpoints.keep=2")).folder) == [4, 7, 8]
    assert kept(run(recipe(*often, "run.name=newest", "checkpoints.keep_best=false")).folder) == [8]


def test_a_resumed_run_still_keeps_the_best(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scored(monkeypatch, {0: 1.0, 2: 0.9, 4: 0.1, 6: 0.2, 8: 0.3})
    steps: list[int] = []
    finished = run(recipe(*often), stop=lambda: steps.append(1) is None and len(steps) == 3)  # stops at step 3, whose look is not due
    assert (finished.outcome.reason, kept(finished.folder)) == ("stopped", [2, 3])
    again = run(recipe(*often), stop=lambda: True)
    assert (again.outcome.reason, again.outcome.step, again.outcome.best_step) == ("stopped", 4, 2)
    assert kept(finished.folder) == [2, 4]
    assert run(recipe(*often)).outcome.best_step == 2
    assert kept(finished.folder) == [2, 8]


def test_a_checkpoint_whose_evaluation_never_came_is_not_lost(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between a checkpoint and its evaluation: the resume measures that very checkpoint first."""
    scored(monkeypatch, {0: 1.0, 2: 0.2, 4: 0.9, 6: 0.3, 8: 0.4})
    count: list[int] = []
    finished = run(recipe(*often), stop=lambda: count.append(1) is None and len(count) == 4)
    rows = RunFolder.open(finished.folder).metrics
    assert finished.outcome.step == 4
    assert 4 in kept(finished.folder)
    assert not rows.has(4, "score")
    run(recipe(*often))
    assert rows.has(4, "score")
    assert kept(finished.folder) == [4, 8]


@pytest.fixture(scope="module")
def whole(micro: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with averaged weights; for reading only."""
    tree = recipe_tree(tmp_path_factory.mktemp("whole"), micro.world, micro.base)
    return run(make_recipe(tree, "optim.ema_decay=0.5", *quick)).folder


@pytest.mark.parametrize("damage", ["cut", "no marker", "lost file"])
def test_a_torn_checkpoint_is_ignored(damage: str, recipe: Any, whole: Path) -> None:
    torn = recipe("optim.ema_decay=0.5", *quick, "run.name=torn")
    copy = Path(torn.run.root) / "torn"
    shutil.copytree(whole, copy)
    status = read_json(copy / "status.json")
    (copy / "status.json").write_text(json.dumps(status | {"state": "running", "pid": 2**22 - 1}))
    last = copy / "checkpoint-6"
    if damage == "cut":
        (last / WEIGHTS).write_bytes((last / WEIGHTS).read_bytes()[:-9])
    else:
        (last / ("COMPLETE" if damage == "no marker" else "trainer.safetensors")).unlink()
    assert kept(copy) == [4]
    assert run(torn).outcome.step == 6
    assert kept(copy) == [4, 6]
    for name in (WEIGHTS, "trainer.safetensors", "objective.safetensors"):
        assert (last / name).read_bytes() == (whole / "checkpoint-6" / name).read_bytes()


# --- whose run it is


def test_a_finished_run_is_not_overwritten_unless_told(recipe: Any) -> None:
    folder = run(recipe(*quick)).folder
    before = digest_of_folder(folder)
    for resume in ("auto", "never"):
        with pytest.raises(InputError, match=r"run\.resume=overwrite"):
            run(recipe(*quick, f"run.resume={resume}"))
    assert digest_of_folder(folder) == before
    with pytest.raises(InputError, match=r"optim\.steps: 6 there, 5 now"):
        run(recipe(*quick, "optim.steps=5"))
    assert digest_of_folder(folder) == before
    assert run(recipe(*quick, "optim.steps=5", "run.resume=overwrite")).outcome.step == 5
    assert kept(folder) == [4, 5]
    assert [row["step"] for row in RunFolder.open(folder).metrics.rows()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optim.rates.llm=0.02", "optim.rates.llm: 0.01 there, 0.02 now"),
        ("model.adapter.dropout=0.2", "model.adapter.dropout: 0.1 there, 0.2 now"),
        ("objective.loss={kind: siglip}", r"objective.loss.kind: 'infonce' there, 'siglip' now"),
        ("run.seed=1", "run.seed: 0 there, 1 now"),
        ("run.threads=2", "run.threads: 1 there, 2 now"),
        ("data.order=sequential", "data.order: 'shuffled' there, 'sequential' now"),
        ("evaluation.every=50", "evaluation.every: 100 there, 50 now"),
    ],
)
def test_a_resume_with_another_recipe_is_refused_and_names_the_key(override: str, named: str, recipe: Any, stopped: Path) -> None:
    before = digest_of_folder(stopped)
    with pytest.raises(InputError, match=named.replace("(", r"\(")):
        run(recipe(*quick, override))
    assert digest_of_folder(stopped) == before


def test_a_resume_with_another_cluster_or_tracker_goes_on(recipe: Any, stopped: Path) -> None:
    changed = (
        "cluster.cpus_per_worker=2",
        "cluster.max_failures=0",
        "cluster.device=auto",
        "trackers.tensorboard=true",
        "trackers.project=p",
    )
    assert run(recipe(*quick, *changed)).outcome.reason == "finished"
    assert [row["step"] for row in RunFolder.open(stopped).metrics.rows()] == [1, 2, 3, 4, 5, 6]
    pytest.importorskip("tensorboard")
    assert list((stopped / "tensorboard").iterdir())


@pytest.fixture(scope="module")
def stopped_once(micro: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped at step 3; for reading only."""
    count: list[int] = []
    one = make_recipe(recipe_tree(tmp_path_factory.mktemp("stopped"), micro.world, micro.base), *quick)
    finished = run(one, stop=lambda: count.append(1) is None and len(count) == 3)
    assert (finished.outcome.reason, finished.outcome.step) == ("stopped", 3)
    return finished.folder


@pytest.fixture
def stopped(stopped_once: Path, recipe: Any) -> Path:
    """A copy of the stopped run where this test's recipe has its run."""
    one = recipe()
    return Path(shutil.copytree(stopped_once, Path(one.run.root) / str(one.run.name)))
