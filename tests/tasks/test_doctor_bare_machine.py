"""The doctor before anything is fetched: it names exactly what is missing, and raises no alarm about what it has not seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from stairstep.models.load import build_on_meta
from stairstep.settings import UnreachableError, build, from_plain
from stairstep.tasks import Recipe, load_recipe
from stairstep.tasks.doctor import Check, Finding, Patient, examine, good, machine, table, verdict
from stairstep.tasks.doctor.findings import entry, run_checks

V8R = Path(__file__).resolve().parents[2] / "recipes" / "v8r.yaml"
NOWHERE = "http://127.0.0.1:9/v1"  # nobody listens on the discard port
MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """v8r where no data, no base, no reader and no key is; the network is down."""
    for name in ("OPENAI_API_KEY", "OPENAI_API_KEY_FILE", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    data = tmp_path / "data"
    data.mkdir()
    monkeypatch.setenv("DATA_ROOT", str(data))

    def down(*arguments: Any, **options: Any) -> str:
        raise LocalEntryNotFoundError("the network is down")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", down)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *arguments, **options: None)
    reader = {
        "evaluation.reader.base_url": NOWHERE,
        "evaluation.reader.backoff_s": 0.01,
        "run.root": tmp_path / "runs",
        "cluster.workers": 0,
    }
    return load_recipe(V8R, [f"{key}={value}" for key, value in reader.items()])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, which a bare machine of this test lacks")
def test_v8r_on_a_bare_machine_is_told_exactly_what_is_missing(bare: Recipe) -> None:
    told: list[str] = []
    findings = examine(bare, told=told.append)
    found = {one.check: one.answer for one in findings}
    stops = {one.check: one.answer.do for one in findings if one.stops}
    data = "Chrisyichuan/screenshot-training-natural-filtered-v2, Chrisyichuan/screenshot-training, Chrisyichuan/text-qa-pair"
    fetched = f"python -m jobs.fetch with this recipe brings {data}"
    base = "python -m jobs.fetch with this recipe brings Qwen/Qwen3-VL-Embedding-2B too"
    assert list(stops) == ["pairs", "question sets", "device", "model", "reader", "grader"]
    assert (stops["pairs"], stops["question sets"], stops["model"]) == (fetched, fetched, base)
    for name in ("train_hn.jsonl", "eval_hn.jsonl", "text-qa-pair"):
        assert name in found["pairs"].said
    assert "test_miniv8.json" in found["question sets"].said
    assert "torch sees no GPU here" in found["device"].said and "start it where there is one" in found["device"].said
    assert "the hub could not be reached" in found["model"].said
    assert NOWHERE in found["reader"].said
    assert "set the variable OPENAI_API_KEY" in found["grader"].said

    well = {name for name, one in found.items() if one.state == "good"}
    assert well | {"versions"} == {"recipe", "versions", "adapter", "disk"}, "another major version of a package is this machine's affair"
    assert "trainable params: 25,427,968 || all params: 2,152,960,000" in found["adapter"].said
    assert found["archives"].said.startswith("no file matches screenshot-training-natural-filtered-v2/image_shards/*.tar")
    assert {name for name, one in found.items() if one.state == "open"} == {"archives", "tiles", "memory", "trackers"}
    assert "\n".join([*told, "", verdict(findings)]) == table(findings), "what is printed as it comes is the table"
    assert verdict(findings).startswith("not ready: pairs, question sets, device, model, reader, grader")


def test_what_the_disks_estimate_leaves_out_is_said(bare: Recipe, recipe: MakeRecipe) -> None:
    said = machine.disk(Patient(bare)).said
    assert "not counted: embeddings and rows of 1 of 1 question sets, which could not be read" in said
    assert "not counted: what python -m jobs.fetch brings" in said
    patient = Patient(recipe())
    examined = {one.check: one.answer for one in examine(recipe())}
    assert examined["disk"].state == "good" and "not counted" not in examined["disk"].said
    assert "not counted" in machine.disk(patient).said, "the same recipe, its set not read"


# --- memory, where no tile was seen


def gpu(monkeypatch: pytest.MonkeyPatch, gib: int) -> None:
    """A machine whose GPU has so much memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=gib * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


def test_tiles_that_were_not_seen_raise_no_alarm(bare: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, 80)
    patient = Patient(bare)
    patient._known["adapter"] = build_on_meta(bare.model)
    unseen = machine.memory(patient)
    assert unseen.state == "open" and "tiles not seen yet" in unseen.said and "look again once the tiles are here" in unseen.said
    patient.tile_size = (1024, 864)
    assert machine.memory(patient).state == "good", "the tiles of the seed fit"
    patient.tile_size = (2048, 2048)
    large = machine.memory(patient)
    assert large.state == "bad" and "gradient_checkpointing" in large.do, "tiles that were seen and do not fit are an alarm"
    gpu(monkeypatch, 400)
    patient.tile_size = None
    assert machine.memory(patient).state == "good", "where the largest would fit, any will"


def test_a_recipe_without_tiles_waits_for_none(bare: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, 3)
    texts = replace(bare, data=replace(bare.data, train=()))
    assert machine.memory(Patient(texts)).state == "bad", "4 GiB of base alone"


# --- as it goes


def test_each_finding_is_told_before_the_next_check_is_made() -> None:
    heard: list[str] = []

    def look(name: str) -> Callable[[None], Any]:
        def answer(patient: None) -> Any:
            heard.append(f"look {name}")
            return good(name)

        return answer

    def tell(one: Finding) -> None:
        heard.append(entry(one, 6))

    run_checks([Check(name, look(name)) for name in ("first", "second")], None, told=tell)
    assert heard == ["look first", "✓ first   first", "look second", "✓ second  second"]


def test_a_base_that_cannot_be_reached_is_the_error_that_training_would_meet(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*arguments: Any, **options: Any) -> str:
        raise LocalEntryNotFoundError("the network is down")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", down)
    tree["model"]["base"] = "nobody/has-this-model"
    [model] = [one for one in examine(build(Recipe, from_plain(tree, "test"))) if one.check == "model"]
    assert model.stops and model.answer.do == "python -m jobs.fetch with this recipe brings nobody/has-this-model too"
    assert isinstance(model.answer.error, UnreachableError)
