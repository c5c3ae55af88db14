"""A run whose root is a URL: killed and gone on with on another machine to the same bits, and read by its URL."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kill_resume import differences

from stairstep.data import WorldSettings
from stairstep.records import RunFolder, read_json
from stairstep.records.copies import copy_to_read
from stairstep.records.places import place
from stairstep.records.resume import check_same_recipe
from stairstep.settings import StairstepError, to_plain, to_yaml
from stairstep.tasks.comparing import compare_named, named
from stairstep.tasks.evaluate import evaluate
from stairstep.tasks.loading import tile_reader
from stairstep.tasks.opening import outcome_line, with_world_here
from stairstep.tasks.placing import checkpoint_here
from stairstep.tasks.preprocessing import preprocess
from stairstep.tasks.resolve import have_world, resolve
from stairstep.tasks.run import train

SHORT = ("optim.steps=4", "optim.batch=4", "checkpoints.every=1", "checkpoints.keep=1", "evaluation.every=2", "evaluation.loss_every=2")
KILLED = """
    import os, sys
    from stairstep.tasks import load_recipe
    from stairstep.tasks.run import train

    def reported(step, values):
        if step == 3 and "checkpoint" in values:
            os._exit(9)

    train(load_recipe(sys.argv[1]), reported=reported, console=False)
"""


def on(recipe: Any, root: str) -> Any:
    return replace(recipe, run=replace(recipe.run, root=root))


def on_machine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("STAIRSTEP_CACHE", str(folder))


@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_on_another_machine_to_the_same_bits(recipe, object_root, tmp_path, monkeypatch):
    local = recipe(*SHORT, "run.name=r")
    whole = train(local, console=False)
    assert whole.outcome.step == 4

    remote = on(local, object_root)
    (tmp_path / "r.yaml").write_text(to_yaml(remote))
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "r.yaml")]
    environment = {**os.environ, "STAIRSTEP_CACHE": str(tmp_path / "one"), "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == 9, killed.stderr[-3000:]

    on_machine(monkeypatch, tmp_path / "two")
    again = train(remote, console=False)
    assert again.outcome.step == 4
    assert "s3://stairs/base/r?endpoint" in outcome_line(again)
    folder = RunFolder.open(again.folder)
    assert read_json(folder.path / "environment.json")["from_step"] == 3
    assert folder.recipe()["run"]["root"] == object_root, "the store keeps the recipe as it was asked for"
    assert [row["step"] for row in folder.metrics.rows() if "train/loss" in row] == [1, 2, 3, 4]
    assert differences(whole.folder, again.folder) == []
    with pytest.raises(StairstepError, match=r"^s3://stairs/base/r\?.*this run is finished"):
        train(remote, console=False)

    on_machine(monkeypatch, tmp_path / "three")
    store = place(object_root) / "r"
    assert {"ledger", "embeddings", "r"} >= set(place(object_root).folders()) >= {"embeddings", "r"}
    copy = copy_to_read(store)
    assert copy.joinpath("eval_step4.jsonl").read_bytes() == Path(whole.folder, "eval_step4.jsonl").read_bytes()
    step = checkpoint_here(f"{object_root.replace('/base', '/base/r/checkpoint-4')}")
    assert (
        step.joinpath("adapter_model.safetensors").read_bytes()
        == Path(whole.folder, "checkpoint-4", "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(StairstepError, match="no complete checkpoint"):
        checkpoint_here(f"{object_root.replace('/base', '/base/r/checkpoint-9')}")


@pytest.mark.timeout(900)
def test_tiles_and_an_evaluation_below_a_url(recipe, object_root, tmp_path, monkeypatch):
    local = recipe("run.name=r", "evaluation.reader=null")
    on_machine(monkeypatch, tmp_path / "one")
    remote, root = on(local, object_root), place(object_root)
    filled = preprocess(remote)
    assert filled.made == filled.tiles > 0
    assert "tiles" in root.folders()
    on_machine(monkeypatch, tmp_path / "two")
    reader = tile_reader(remote)
    assert reader.store is not None
    assert len(reader.store) == filled.tiles

    measured = evaluate(remote, base=True)
    assert str(measured.folder).startswith("s3://stairs/base/evaluations/r-base?")
    here = evaluate(local, base=True)
    assert (root / "evaluations/r-base").get("eval_step0.jsonl") == Path(here.folder, "eval_step0.jsonl").read_bytes()
    assert compare_named(named(f"{measured.folder}"), named(str(here.folder)), None)[1] is None
    (at_step,) = named(str(measured.folder).replace("r-base?", "r-base:0?"))
    assert at_step.step == 0
    assert at_step.line == "s3://stairs/base/evaluations/r-base step 0", "what it is called by, not where its copy lies"


def test_a_generated_world_is_made_where_the_paths_of_a_run_in_a_store_say(recipe, monkeypatch, tmp_path):
    on_machine(monkeypatch, tmp_path / "one")
    world = WorldSettings(articles=3, questions=2, pairs=2, text_pairs=2, seed=5)
    made = recipe()
    data = replace(made.data, world=world, roots=("{world}",), train=(replace(made.data.train[0], path="{world}/train.jsonl"),))
    resolved = resolve(replace(on(made, "s3://bucket/runs"), data=data))
    folder = Path(resolved.data.roots[0])
    assert resolved.run.root == "s3://bucket/runs"
    assert folder.is_relative_to(tmp_path / "one")
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    shutil.rmtree(folder)
    on_machine(monkeypatch, tmp_path / "two")
    have_world(resolved)  # as a worker on another node does, whose cache may lie elsewhere
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before != []
    shutil.rmtree(folder)
    have_world(on(resolved, str(tmp_path)))
    assert not folder.exists(), "a folder that all see has it, or the error says where it lacks"


def test_a_run_with_a_generated_world_goes_on_where_the_cache_lies_elsewhere(recipe, monkeypatch, tmp_path):
    world = WorldSettings(articles=3, questions=2, pairs=2, text_pairs=2, seed=5)
    found = []
    for machine in ("one", "two"):
        on_machine(monkeypatch, tmp_path / machine)
        made = recipe()
        data = replace(made.data, world=world, roots=("{world}",), train=(replace(made.data.train[0], path="{world}/train.jsonl"),))
        found.append(resolve(replace(on(made, "s3://bucket/runs"), data=data)))
    one, two = found
    assert one.data.roots != two.data.roots
    check_same_recipe(tmp_path, with_world_here(to_plain(one), two), to_plain(two))
    other = replace(two, data=replace(two.data, world=replace(world, seed=6)))
    with pytest.raises(StairstepError, match="another recipe"):
        check_same_recipe(tmp_path, with_world_here(to_plain(one), other), to_plain(other))
    folders = [on(each, str(tmp_path)) for each in found]
    assert with_world_here(to_plain(folders[0]), folders[1]) == to_plain(folders[0]), "a folder that all see has one path"
