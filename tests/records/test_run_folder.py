"""The run folder: how a run begins in it under each rule of resume, and what it never touches."""

import os
import shutil

import pytest

from stairstep.records import RunFolder, result_paths
from stairstep.records.files import read_json
from stairstep.records.folders import is_complete
from stairstep.settings import DataError, InputError, to_yaml

RECIPE = {
    "run": {"name": "x", "root": "runs", "seed": 3, "resume": "auto"},
    "optim": {"lr": 7e-6, "steps": 100, "clip": None},
    "data": {"train": [{"path": "a", "limit": 1}]},
    "cluster": {"workers": 1},
    "trackers": {"wandb": "off"},
}


def _changed(section, **values):
    return {**RECIPE, section: {**RECIPE[section], **values}}


def _checkpoint(folder, step):
    with folder.new_checkpoint(step) as path:
        (path / "weights").write_text(f"weights of {step}")


def _begun(path, steps=(), log=range(0)):
    folder = RunFolder.create(path)
    with folder.claim():
        assert folder.open_for(RECIPE, "auto").state == "new"
        folder.write_environment({"python": "3"})
        folder.set_status("running", 0, 100)
        for step in log:
            folder.metrics.append(step, {"train/loss": 1.0})
        for step in steps:
            _checkpoint(folder, step)
    return folder


def _open(path, recipe=RECIPE, resume="auto"):
    folder = RunFolder.create(path)
    with folder.claim():
        return folder.open_for(recipe, resume)


def test_an_empty_folder_is_a_new_run_under_every_rule(tmp_path):
    for resume in ("auto", "never", "overwrite"):
        opening = _open(tmp_path / resume / "deep", resume=resume)
        assert (opening.state, opening.from_step, opening.checkpoint) == ("new", 0, None)
        assert RunFolder.open(tmp_path / resume / "deep").recipe() == RECIPE
    RunFolder.create(tmp_path / "died").claim().release()
    assert _open(tmp_path / "died", resume="never").state == "new", "a run killed before its recipe was written left a lock only"


def test_opening_needs_the_claim(tmp_path):
    folder = RunFolder.create(tmp_path)
    with pytest.raises(RuntimeError, match="claim"):
        folder.open_for(RECIPE, "auto")
    folder.claim().release()
    with pytest.raises(RuntimeError, match="claim"):
        folder.open_for(RECIPE, "auto")


def test_auto_goes_on_from_the_last_complete_checkpoint(tmp_path, caplog):
    folder = _begun(tmp_path, steps=(50, 100, 9), log=range(120))
    (tmp_path / "checkpoint-150").mkdir()
    (tmp_path / "checkpoint-100" / "weights").write_text("cut")
    (tmp_path / "checkpoint-best").mkdir()
    opening = _open(tmp_path)
    assert (opening.state, opening.from_step, opening.checkpoint) == ("resumed", 50, tmp_path / "checkpoint-50")
    assert [row["step"] for row in folder.metrics.rows()] == list(range(51))
    assert "checkpoint-100: this checkpoint is not complete" in caplog.text
    assert "checkpoint-best" not in caplog.text


def test_auto_without_a_checkpoint_starts_again_with_an_empty_log(tmp_path):
    folder = _begun(tmp_path, log=range(20))
    opening = _open(tmp_path)
    assert (opening.state, opening.from_step, opening.checkpoint) == ("resumed", 0, None)
    assert folder.metrics.rows() == []


@pytest.mark.parametrize(
    "recipe",
    [
        _changed("cluster", workers=4, gpus=1),
        _changed("trackers", wandb="online"),
        _changed("run", resume="never", root="elsewhere", name="y"),
        {**RECIPE, "limits": {"hours": 3}},
        {name: section for name, section in RECIPE.items() if name != "cluster"},
    ],
)
def test_auto_lets_cluster_trackers_and_limits_differ(tmp_path, recipe):
    folder = _begun(tmp_path, steps=(50,), log=range(60))
    assert _open(tmp_path, recipe).from_step == 50
    assert folder.recipe() == recipe, "the recipe that the run goes on with"


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (_changed("optim", lr=8e-6), r"optim\.lr: 7e-06 there, 8e-06 now"),
        (_changed("run", seed=4), r"run\.seed: 3 there, 4 now"),
        (_changed("optim", ema=0.9), r"optim\.ema: absent there, 0\.9 now"),
        (_changed("optim", clip=1.0), r"optim\.clip: None there, 1\.0 now"),
        (_changed("data", train=[{"path": "a", "limit": 2}]), r"data\.train\[0\]\.limit: 1 there, 2 now"),
        ({**RECIPE, "cluster_like": 1}, r"cluster_like: absent there, 1 now"),
    ],
)
def test_auto_refuses_another_recipe_and_changes_nothing(tmp_path, recipe, words):
    folder = _begun(tmp_path, steps=(50,), log=range(60))
    with pytest.raises(InputError, match=words + ".*run.resume=overwrite"):
        _open(tmp_path, recipe)
    assert len(folder.metrics.rows()) == 60 and folder.recipe() == RECIPE
    folder.set_status("finished", 100)
    with pytest.raises(InputError, match=words):
        _open(tmp_path, recipe)


def test_a_finished_run_is_left_as_it_is(tmp_path):
    folder = _begun(tmp_path, steps=(50, 100), log=range(103))
    folder.set_status("finished", 102, 102)
    opening = _open(tmp_path)
    assert (opening.state, opening.from_step, opening.checkpoint) == ("finished", 100, tmp_path / "checkpoint-100")
    assert len(folder.metrics.rows()) == 103
    for state in ("failed", "stopped", "running"):
        folder.set_status(state)
        assert _open(tmp_path).state == "resumed"


def test_never_refuses_a_run(tmp_path):
    _begun(tmp_path, steps=(50,))
    with pytest.raises(InputError, match=r"a run is here already.*run\.resume=auto"):
        _open(tmp_path, resume="never")
    assert (tmp_path / "checkpoint-50").is_dir()


def test_overwrite_deletes_what_a_run_writes_and_nothing_else(tmp_path, caplog):
    folder = _begun(tmp_path, steps=(50, 100), log=range(60))
    folder.set_status("finished", 100)
    (tmp_path / "other").mkdir()
    for path in (*result_paths(tmp_path, 50), *result_paths(tmp_path, 50, "other")):
        path.write_text("{}")
    for name in ("tensorboard", "wandb", "notes", "checkpoint-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    for name in ("report.html", "quarantine.jsonl", "trackers.jsonl", "notes.txt"):
        (tmp_path / name).write_text("x")
    opening = _open(tmp_path, _changed("optim", lr=1.0), "overwrite")
    assert (opening.state, opening.from_step) == ("new", 0)
    assert sorted(os.listdir(tmp_path)) == [".lock", "checkpoint-mine", "notes", "notes.txt", "recipe.yaml"]
    assert folder.recipe()["optim"]["lr"] == 1.0
    assert (tmp_path / "notes" / "file").exists()
    assert "left alone, because no run wrote it: checkpoint-mine, notes, notes.txt" in caplog.text


def test_a_folder_that_is_no_run_folder_is_never_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    (tmp_path / "checkpoint-5").mkdir()
    for resume in ("auto", "never", "overwrite"):
        with pytest.raises(InputError, match=r"not empty and holds no run \(there are checkpoint-5, thesis\.txt\)"):
            _open(tmp_path, resume=resume)
    (tmp_path / "recipe.yaml").write_text(to_yaml(RECIPE))
    with pytest.raises(InputError, match="not written by a run, so nothing is deleted"):
        _open(tmp_path, resume="overwrite")
    assert sorted(os.listdir(tmp_path)) == [".lock", "checkpoint-5", "recipe.yaml", "thesis.txt"]


def test_death_at_any_step_of_overwriting_leaves_a_run_that_can_go_on(tmp_path, die_at_every_step):
    path = tmp_path / "run"
    states = set()

    def prepare():
        shutil.rmtree(path, ignore_errors=True)
        folder = _begun(path, steps=(5, 10), log=range(12))
        folder.set_status("finished", 100)
        (path / "other").mkdir()
        result_paths(path, 50, "other")[0].write_text("")

    for _ in die_at_every_step(prepare, lambda: _open(path, resume="overwrite")):
        opening = _open(path)
        states.add((opening.state, opening.from_step))
        if opening.state == "resumed":
            steps = [row["step"] for row in RunFolder(path).metrics.rows()]
            assert steps == list(range(opening.from_step + 1 if opening.checkpoint else 0))
            assert opening.checkpoint is None or is_complete(opening.checkpoint)
        assert _open(path, resume="overwrite").state == "new"
    assert {("finished", 10), ("resumed", 0)} <= states


def test_leftovers_of_dead_writers_are_swept_at_opening(tmp_path, script):
    _begun(tmp_path, steps=(50,))
    (tmp_path / "other").mkdir()
    writer = script(
        """
        import sys, time
        from pathlib import Path
        from stairstep.records import new_folder
        from stairstep.records.files import temporary_name
        with new_folder(Path(sys.argv[1]) / "checkpoint-100") as folder:
            (folder / "weights").write_text("half")
            temporary_name(Path(sys.argv[1]) / "other" / "eval_step50.jsonl").write_text("half")
            print("ready", flush=True)
            time.sleep(60)
        """,
        tmp_path,
    )
    assert writer.line() == "ready"
    _open(tmp_path)
    assert len([name for name in os.listdir(tmp_path) if ".tmp-" in name]) == 1, "the writer lives"
    writer.kill()
    _open(tmp_path)
    assert not [name for name in (*os.listdir(tmp_path), *os.listdir(tmp_path / "other")) if ".tmp-" in name]
    assert [one.step for one in RunFolder(tmp_path).checkpoints()] == [50]


def test_pruning_keeps_the_newest_and_the_protected(tmp_path):
    folder = _begun(tmp_path, steps=(10, 20, 30, 40, 100))
    assert folder.prune(2, protect={20}) == [10, 30]
    assert [one.step for one in folder.checkpoints()] == [20, 40, 100]
    assert folder.prune(3) == []


def test_a_checkpoint_is_committed_after_its_metrics_are_on_disk(tmp_path, monkeypatch):
    folder = _begun(tmp_path, log=range(3))
    events = []
    real_sync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda one: (events.append(os.path.basename(os.readlink(f"/proc/self/fd/{one}"))), real_sync(one)))
    monkeypatch.setattr(os, "rename", lambda one, two: (events.append("rename"), real_rename(one, two)))
    _checkpoint(folder, 2)
    assert events.index("metrics.jsonl") < events.index("rename")


def test_recipe_comes_back_and_reading_needs_a_run_folder(tmp_path):
    folder = _begun(tmp_path / "run")
    assert RunFolder.open(tmp_path / "run").recipe() == RECIPE
    folder.write_recipe((tmp_path / "run" / "recipe.yaml").read_text())
    assert (tmp_path / "run" / "recipe.yaml").read_text().count("#") == 1
    with pytest.raises(InputError, match="not a run folder"):
        RunFolder.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        RunFolder.create(tmp_path / "file" / "run")


def test_former_environments_stay(tmp_path, caplog):
    folder = _begun(tmp_path)
    folder.write_environment({"python": "3", "versions": {"torch": "1"}})
    folder.write_environment({"python": "3", "versions": {"torch": "1"}}, from_step=50)
    assert caplog.text == ""
    folder.write_environment({"python": "3", "versions": {"torch": "2"}}, from_step=100)
    assert "versions or source differ" in caplog.text
    found = read_json(tmp_path / "environment.json")
    assert found["versions"] == {"torch": "2"} and found["from_step"] == 100
    assert [one["from_step"] for one in found["earlier"]] == [0, 50]


def test_result_paths(tmp_path):
    assert result_paths(tmp_path, 50) == (tmp_path / "eval_step50.jsonl", tmp_path / "eval_step50.summary.json")
    assert result_paths(tmp_path, 50, "dev.v2")[1] == tmp_path / "dev.v2" / "eval_step50.summary.json"
    for name in ("../x", "wandb", "checkpoint-5", "a/b", ".x", ""):
        with pytest.raises(DataError, match="question set"):
            result_paths(tmp_path, 1, name)
