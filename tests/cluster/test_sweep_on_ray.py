"""A sweep on a real Ray: trials equal runs alone, a failed one is a row, a stopped one says why, and what is done is not done again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from stairstep.records import read_json_lines
from stairstep.records.places import ObjectFolder, place
from stairstep.settings import to_plain
from stairstep.sweeps import SweepFolder
from stairstep.sweeps.beginning import Asked, begin, find, planned
from stairstep.sweeps.scores import scores
from stairstep.sweeps.spent import Limits
from stairstep.tasks import load_recipe
from stairstep.tasks.placing import checkpoint_here
from stairstep.tasks.run import train

pytestmark = pytest.mark.usefixtures("ray_here")
HUGE = 1e30  # a rate at which the second loss is not finite
EARLIER_S = 1000.0


@pytest.fixture(scope="module")
def asked(recipe: Callable[..., Any], micro: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Asked]:
    """asked(name, space, *overrides): a sweep over the micro recipe with one worker a trial."""
    folder = tmp_path_factory.mktemp("sweeps")
    base = to_plain(recipe("base", "cluster.workers=1"))
    base["run"]["name"] = None
    (folder / "micro.yaml").write_text(yaml.safe_dump(base))

    def make(name: str, space: dict[str, Any], *overrides: str) -> Asked:
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(space, sort_keys=False))
        return Asked(folder / "micro.yaml", path, overrides, name=name)

    return make


def run(sweep: SweepFolder, limits: Limits | None = None) -> tuple[str, list[str]]:
    """Why the sweep ended early, if it did, and what it told meanwhile."""
    from stairstep.cluster.sweep import run_sweep

    told: list[str] = []
    why = run_sweep(sweep, nobody_serves, None, limits or Limits(), told.append)
    assert not told or told[0].startswith(f"{sweep.path.name}: 4 trials at once")  # CPUs of this Ray
    return why, told


def nobody_serves(model: str, *_: Any) -> Any:
    raise AssertionError(f"{model} is asked for, and no recipe here has a reader")


@pytest.fixture(scope="module")
def swept(asked: Callable[..., Asked]) -> SimpleNamespace:
    """A sweep that goes on: a trial that is still to be trained, one that failed and will again, and one that is done."""
    rates = {"high": 1e-2, "huge": HUGE, "done": 1e-3}
    options = {name: {"optim.rates.llm": rate} for name, rate in rates.items()}
    own = asked("swept", {"parameters": {"rates": {"kind": "options", "options": options}}})
    space, made = planned(own)
    sweep = begin(own, space, made)
    _, huge, done = sweep.trials()
    sweep.write_trial(replace(huge, state="failed", reason="of an earlier life", seconds=EARLIER_S))
    here = [f"run.root={sweep.runs}", f"run.name={done.name}", "cluster.workers=0", "evaluation.cache=false"]
    train(load_recipe(sweep.recipe_path(done.name), here), console=False)
    sweep.write_trial(replace(done, state="finished", seconds=EARLIER_S))
    before = {path: path.read_bytes() for path in sweep.run_path(done.name).rglob("*") if path.is_file()}
    assert list(scores(sweep.run_path(done.name), "hit@1")) == [4, 8]
    why, told = run(sweep)
    return SimpleNamespace(sweep=sweep, why=why, told=told, before=before)


def test_every_trial_ends_and_the_failed_one_is_a_row_with_its_error(swept: SimpleNamespace):
    states = {one.point["rates"]: one for one in swept.sweep.trials()}
    assert {name: one.state for name, one in states.items()} == {"high": "finished", "huge": "failed", "done": "finished"}
    assert "not finite" in states["huge"].reason and "\n" not in states["huge"].reason
    assert swept.why == ""
    assert states["high"].seconds > 1
    names = [one.name for one in swept.sweep.trials()]
    assert [name for name in names if any(line.startswith(f"{name}: step 8, hit@1") for line in swept.told)] == names[:1]
    assert any(line.startswith(f"{names[1]}: failed: ") and "of 3 trials done" in line for line in swept.told)
    assert not (swept.sweep.path / ".ray").exists()


def test_what_is_done_is_not_done_again_and_what_failed_is_tried_again(swept: SimpleNamespace):
    _, huge, done = swept.sweep.trials()
    assert huge.seconds > EARLIER_S + 1 and done.seconds == EARLIER_S
    assert len(swept.before) > 5
    assert {path: path.read_bytes() for path in swept.sweep.run_path(done.name).rglob("*") if path.is_file()} == swept.before
    assert not any(line.startswith(done.name) for line in swept.told), "its scores are not told again"


def test_a_trial_is_the_same_recipe_run_alone_bit_for_bit(swept: SimpleNamespace, tmp_path: Path):
    name = swept.sweep.trials()[0].name
    own = [f"run.root={tmp_path}", "run.name=alone", "cluster.workers=0", "evaluation.cache=false"]
    train(load_recipe(swept.sweep.recipe_path(name), own), console=False)
    runs = (tmp_path / "alone", swept.sweep.run_path(name))
    weights = [load_file(folder / "checkpoint-8" / "adapter_model.safetensors") for folder in runs]
    assert list(weights[0]) == list(weights[1])
    assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])
    assert any(one.abs().sum() > 0 for key, one in weights[0].items() if "lora_B" in key)
    rows = [read_json_lines(folder / "eval_step8.jsonl") for folder in runs]
    assert rows[0] == rows[1]


def test_a_sweep_in_an_object_store_ends_as_in_a_folder(
    asked: Callable[..., Asked], swept: SimpleNamespace, object_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same trial as above, the run put by its worker and the sweep by this process. Elsewhere it goes on, which is nothing to do."""
    monkeypatch.setenv("STAIRSTEP_CACHE", str(tmp_path / "one"))
    own = asked("stored", {"parameters": {"rates": {"kind": "options", "options": {"high": {"optim.rates.llm": 1e-2}}}}})
    own = replace(own, overrides=(f"run.root={object_root}",))
    space, made = planned(own)
    sweep = begin(own, space, made)
    why, told = run(sweep)
    (trial,) = sweep.trials()
    assert (why, trial.state) == ("", "finished"), trial.reason
    assert told[0].endswith(f"; {place(object_root) / 'stored'}")
    assert any(line.startswith(f"{trial.name}: step 8, hit@1") for line in told)

    monkeypatch.setenv("STAIRSTEP_CACHE", str(tmp_path / "another"))
    other = find("stored", object_root)
    assert run(other)[0] == ""
    assert other.trials() == [trial]
    there, same = other.run_path(trial.name), swept.sweep.run_path(swept.sweep.trials()[0].name)
    assert scores(there, "hit@1") == scores(same, "hit@1") != {}
    assert read_json_lines(there / "eval_step8.jsonl") == read_json_lines(same / "eval_step8.jsonl")
    store = place(object_root)
    assert isinstance(store, ObjectFolder)
    weights = [
        load_file(one / "adapter_model.safetensors")
        for one in (checkpoint_here(str(store / "stored" / "runs" / trial.name / "checkpoint-8")), same / "checkpoint-8")
    ]
    assert list(weights[0]) == list(weights[1])
    assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])
    assert set(store.folders()) == {"stored", "embeddings"}, "what is kept of a root lies in the store"
    assert not any(name.endswith(".lock") for name in store.files())


@pytest.mark.soak
def test_a_rule_stops_a_trial_for_good_and_a_limit_stops_the_sweep_until_it_goes_on(asked: Callable[..., Asked]):
    """The rule is met by every validation loss from step 4 on; the limit by the first second."""
    rules = [{"metric": "validation/loss", "from_step": 4, "below": 1000.0}]
    one = asked("ruled", {"parameters": {"optim.rates.llm": {"kind": "grid", "values": [1e-3]}}, "stop": rules}, "optim.steps=400")
    space, made = planned(one)
    sweep = begin(one, space, made)
    why, _ = run(sweep, Limits(device_hours=1e-6))
    (trial,) = sweep.trials()
    assert "device hours is reached" in why
    assert trial.state in ("waiting", "stopped")
    if trial.state == "waiting":
        assert sweep.run(trial.name).status is None or sweep.run(trial.name).status.state == "stopped"
    why, told = run(sweep)
    (trial,) = sweep.trials()
    assert (why, trial.state) == ("", "stopped")
    assert trial.reason.startswith("stop rule: validation/loss") and trial.reason.endswith("is below 1000")
    assert trial.stopped_at is not None and 4 <= trial.stopped_at < 400
    assert sweep.run(trial.name).checkpoints()[-1].step == trial.stopped_at
    assert any("stopped early at step" in line for line in told) or "stop rule" in why


@pytest.mark.soak
def test_optuna_suggests_one_after_the_other_and_its_trials_are_kept(asked: Callable[..., Asked]):
    parameters = {"optim.rates.llm": {"kind": "loguniform", "low": 1e-4, "high": 1e-2}}
    one = asked("suggested", {"parameters": parameters, "search": {"kind": "optuna", "samples": 2, "startup": 1}}, "optim.steps=4")
    space, made = planned(one)
    sweep = begin(one, space, made)
    assert sweep.trials() == []
    assert run(sweep)[0] == ""
    trials = sweep.trials()
    assert [trial.state for trial in trials] == ["finished", "finished"]
    rates = [trial.point["optim.rates.llm"] for trial in trials]
    assert rates[0] != rates[1] and all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert [load_recipe(sweep.recipe_path(trial.name)).optim.rates.llm for trial in trials] == rates
    assert all(list(scores(sweep.run_path(trial.name), "hit@1")) == [4] for trial in trials)
