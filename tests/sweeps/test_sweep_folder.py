"""A sweep's folder: made whole or taken over, read back as it was written, asked to stop, and what its trials have scored and spent."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stairstep.evaluation.readers import RemoteReaderSettings
from stairstep.settings import DataError, InputError
from stairstep.sweeps import ALL, StepOfStairs, SweepFolder, SweepPlan, TrialRecord, shown_point
from stairstep.sweeps.beginning import find
from stairstep.sweeps.plan import Planned, in_sweep, write_trial
from stairstep.sweeps.scores import best_score, scores
from stairstep.sweeps.serving import ServedReader, asked_where_served
from stairstep.sweeps.spent import Limits, Spent, spent
from stairstep.tasks import load_recipe

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "tinywiki.yaml"
PLAN = SweepPlan(
    name="s",
    recipe_file="recipes/tinywiki.yaml",
    space_file="tune_spaces/stairstep.yaml",
    overrides=("optim.steps=4",),
    recipe={"optim": {"steps": 4}},
    space={"steps": []},
    seeds=(0, 1),
    metrics=("hit@1",),
    modes=("max",),
    steps=(StepOfStairs("a", "this"), StepOfStairs("b", "that")),
    skipped=({"point": {"x": 1}, "reason": "no use"},),
)


@pytest.fixture
def sweep(tmp_path: Path) -> SweepFolder:
    """A sweep with two trials, nothing run yet."""
    made = SweepFolder(tmp_path / "runs" / "s")
    made.make()
    for number, name in enumerate(("a-seed0", "b-seed0"), start=1):
        made.write_trial(TrialRecord(number, name, {"step": name[0]}, ("optim.batch=4",), 0, workers=number))
    made.write_plan(PLAN)
    return made


def write_summary(run: Path, step: int, **content: Any) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / f"eval_step{step}.summary.json").write_text(json.dumps({"step": step, "name": "w", **content}))


def selection(value: float | None, n: int = 9) -> dict[str, Any]:
    return {"selection": {"hit@1": {"value": value, "low": 0, "high": 1, "n": n}}}


def test_plan_and_trials_come_back_as_they_were_written(sweep: SweepFolder):
    assert sweep.plan == PLAN
    assert [one.name for one in sweep.trials()] == ["a-seed0", "b-seed0"]
    changed = replace(sweep.trial("b-seed0"), state="stopped", reason="asha: worse", stopped_at=20, seconds=7.5)
    sweep.write_trial(changed)
    assert sweep.trial("b-seed0") == changed
    assert sweep.trials()[1] == changed


def test_a_trial_shares_what_is_kept_from_whatever_folder_it_runs_in(sweep: SweepFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Tune gives every trial a folder of its own to stand in; answers were once kept there, each trial's by itself."""
    (tmp_path / "home").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    recipe = load_recipe(RECIPE, ["run.root=runs", "tiles.store=kept"])
    write_trial(sweep, Planned(sweep.trial("a-seed0"), recipe))
    monkeypatch.chdir(tmp_path / "elsewhere")
    trial = in_sweep(load_recipe(sweep.recipe_path("a-seed0")), sweep.run_root, "a-seed0")
    assert trial.evaluation.ledger_folder == str(tmp_path / "home" / "runs" / "ledger")
    assert trial.evaluation.cache_folder == str(tmp_path / "home" / "runs" / "embeddings")
    assert trial.tiles.store == str(tmp_path / "home" / "kept")
    assert trial.run.root == str(sweep.path / "runs")
    write_trial(sweep, Planned(sweep.trial("a-seed0"), load_recipe(RECIPE, [f"run.root={tmp_path / 'runs'}"])))
    trial = in_sweep(load_recipe(sweep.recipe_path("a-seed0")), sweep.run_root, "a-seed0")
    assert trial.tiles.store == str(tmp_path / "runs" / "tiles"), "what jobs.preprocess fills"


def test_a_sweep_that_never_began_is_taken_over_and_nothing_else_is(sweep: SweepFolder, tmp_path: Path):
    sweep.ask_to_stop("a-seed0", "long ago")
    sweep.make()  # not one of its trials has begun: a corrected command may take its name
    assert sweep.trials() == []
    assert sweep.asked_to_stop("a-seed0") == ""
    assert not SweepFolder.is_one(sweep.path)
    (sweep.path / "runs" / "a-seed0").mkdir()
    with pytest.raises(InputError, match=r"a sweep is here already; go on with it by --resume"):
        sweep.make()
    other = tmp_path / "other"
    (other / "thesis").mkdir(parents=True)
    with pytest.raises(InputError, match="something that is no sweep is here"):
        SweepFolder(other).make()
    assert [one.name for one in other.iterdir()] == ["thesis"]


def test_a_record_of_something_else_is_told_with_its_file(sweep: SweepFolder):
    (sweep.path / "trials" / "c.json").write_text('{"name": "c"}')
    with pytest.raises(DataError, match=r"c\.json: this is no TrialRecord"):
        sweep.trials()


def test_a_key_of_a_younger_version_is_passed_over(sweep: SweepFolder):
    path = sweep.path / "trials" / "a-seed0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "colour": "blue"}))
    assert sweep.trial("a-seed0").number == 1


def test_asking_to_stop(sweep: SweepFolder):
    assert sweep.asked_to_stop("a-seed0") == "" == sweep.asked_to_stop(ALL)
    (sweep.path / "stop" / "a-seed0").touch()  # as a power cut may leave it
    sweep.ask_to_stop("a-seed0", "asha: too low")
    sweep.ask_to_stop("a-seed0", "later, another reason")
    sweep.ask_to_stop(ALL, "Ctrl-C")
    assert sweep.asked_to_stop("a-seed0") == "asha: too low"
    sweep.let_go_on()
    assert sweep.asked_to_stop(ALL) == ""
    assert sweep.asked_to_stop("a-seed0") == "asha: too low"


def test_a_sweep_is_found_by_name_and_by_path(sweep: SweepFolder, tmp_path: Path):
    assert find("s", str(tmp_path / "runs")).path == sweep.path
    assert find(str(sweep.path), "runs").path == sweep.path
    with pytest.raises(InputError, match=r"there is no sweep 't' below .*; there are s;"):
        find("t", str(tmp_path / "runs"))


def test_scores_are_those_of_the_selection_split_by_step(tmp_path: Path):
    for step, value in ((0, 0.9), (20, 0.2), (100, 0.5), (40, 0.5)):
        write_summary(tmp_path, step, **selection(value))
    write_summary(tmp_path, 60, **selection(None, n=0))
    write_summary(tmp_path, 80, qa={"selection": {"score": 0.25}})
    assert list(scores(tmp_path, "hit@1").items()) == [(20, 0.2), (40, 0.5), (100, 0.5)]
    assert scores(tmp_path, "qa") == {80: 0.25}
    assert best_score(tmp_path, "hit@1", "max") == (40, 0.5)
    assert best_score(tmp_path, "hit@1", "min") == (20, 0.2)
    assert best_score(tmp_path, "mrr", "max") is None


def test_a_score_below_the_coverage_floor_is_none(tmp_path: Path):
    write_summary(tmp_path, 20, qa={"selection": {"score": None}})
    assert scores(tmp_path, "qa") == {}


def test_the_validation_loss_is_read_from_the_log(tmp_path: Path):
    assert scores(tmp_path, "validation/loss") == {}
    rows = [{"step": 0, "validation/loss": 3.0}, {"step": 5, "train/loss": 1.0}, {"step": 10, "validation/loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"time": 1.0, **row}) + "\n" for row in rows))
    assert scores(tmp_path, "validation/loss") == {10: 2.0}


def test_what_is_spent_is_hours_of_each_worker_and_the_price_of_all_calls(sweep: SweepFolder):
    for name, seconds in (("a-seed0", 1800.0), ("b-seed0", 900.0)):  # the second has two workers
        sweep.write_trial(replace(sweep.trial(name), seconds=seconds))
    calls = {"answer": {"cost": 0.5}, "grade": {"cost": None}}
    write_summary(sweep.run_path("a-seed0"), 0, calls=calls)
    write_summary(sweep.run_path("a-seed0"), 20, calls=calls)
    write_summary(sweep.run_path("b-seed0"), 0)
    assert spent(sweep) == Spent(1.0, 1.0)
    write_summary(sweep.run_path("a-seed0") / "other-set", 20, calls=calls)
    assert spent(sweep) == Spent(1.0, 1.5)
    assert spent(sweep).over(Limits()) == ""
    assert spent(sweep).over(Limits(device_hours=1.5, cost=2)) == ""
    assert "1 device hours is reached (1.00 spent)" in spent(sweep).over(Limits(device_hours=1))
    assert "0.9 for calls is reached (1.50 spent)" in spent(sweep).over(Limits(cost=0.9))
    with pytest.raises(InputError, match="--max-hours: expected a number above 0, found -1"):
        Limits(device_hours=-1)


def test_a_summary_that_changes_is_read_again(tmp_path: Path):
    write_summary(tmp_path, 20, **selection(0.2))
    assert scores(tmp_path, "hit@1") == {20: 0.2}
    write_summary(tmp_path, 20, **selection(0.25))
    assert scores(tmp_path, "hit@1") == {20: 0.25}


def test_a_served_reader_is_asked_for_what_each_trial_says_of_its_own():
    served = ServedReader("tiny-reader", "http://127.0.0.1:9/v1", "abc")
    recipe = load_recipe(RECIPE, ["evaluation.reader.max_new_tokens=4", "evaluation.reader.system=Short."])
    reader = asked_where_served(recipe, served).evaluation.reader
    assert isinstance(reader, RemoteReaderSettings)
    assert (reader.base_url, reader.revision, reader.model) == ("http://127.0.0.1:9/v1", "abc", "tiny-reader")
    assert (reader.max_new_tokens, reader.system) == (4, "Short.")
    other = load_recipe(RECIPE, ["evaluation.reader.model=runs/reading/checkpoint-9"])
    assert asked_where_served(other, served) == other  # another model than the one that is served
    assert asked_where_served(recipe, None) == recipe


def test_a_point_as_a_person_reads_it():
    assert shown_point({"optim.rates.llm": 0.001, "LoRA": "llm"}) == "llm 0.001, LoRA llm"


def test_a_record_that_names_another_file_is_no_trial(sweep: SweepFolder, tmp_path: Path) -> None:
    """Whoever may write to the store of a sweep by URL could have a file of this machine overwritten."""
    record = sweep.trials()[0]
    path = sweep.path / "trials" / f"{record.name}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "name": "../../../elsewhere"}))
    with pytest.raises(DataError, match=rf"{record.name}.json: it is called '../../../elsewhere' inside; expected '{record.name}'"):
        sweep.trials()
    with pytest.raises(DataError):
        sweep.trial(record.name)
    assert not (tmp_path / "elsewhere.json").exists()
