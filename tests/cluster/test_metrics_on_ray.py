"""Prometheus metrics scraped from Ray's exporter over HTTP: the values that were set, those of a real run, the names of the dashboard."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scraping import DASHBOARD, Sample, names_asked_for, scrape

from stairstep.cluster import metrics
from stairstep.cluster.metrics import FIGURES, RunMetrics
from stairstep.cluster.train import train_on_ray
from stairstep.records import MetricLog, RunFolder
from stairstep.records.reading import Reading
from stairstep.sweeps import SweepFolder
from stairstep.tiny.configs import write_random_checkpoint
from stairstep.training import EVALUATION_WAIT

pytestmark = pytest.mark.timeout(1200)

ENDLESS = 20_000
OURS = "ray_stairstep_"


def of_run(samples: list[Sample], run: str) -> dict[str, list[Sample]]:
    """Our metrics of one run, by their names without any prefix."""
    found: dict[str, list[Sample]] = {}
    for one in samples:
        if one.name.startswith(OURS) and one.labels.get("run") == run:
            found.setdefault(one.name.removeprefix(OURS), []).append(one)
    return found


def short(names: Mapping[str, Any]) -> set[str]:
    return {name.removeprefix("stairstep_") for name in names}


def wait_for(tools: SimpleNamespace, run: str, running: Future[Any] | None = None) -> dict[str, list[Sample]]:
    """All metrics of ours for a run, as soon as they have been exported; Ray does that every few seconds."""
    latest: dict[str, list[Sample]] = {}

    def there() -> bool:
        latest.clear()
        latest.update(of_run(scrape(), run))
        return latest.keys() == short(FIGURES) or (running is not None and running.done())

    tools.wait(there, f"every metric of {run}", patience_s=900.0, every_s=0.5)
    if running is not None and running.done():
        running.result()
    assert latest.keys() == short(FIGURES)
    return latest


def test_every_metric_is_exported_with_its_value_its_run_and_its_sweep(ray_here: None, tools: SimpleNamespace, tmp_path: Path) -> None:
    sweep = SweepFolder(tmp_path / "grid")
    sweep.make()
    (sweep.path / "sweep.json").write_text("{}")
    run = RunMetrics(sweep.run_path("t1"), 40)
    for step, loss in ((6, 0.75), (7, 0.5)):
        run.logged(step, {"train/loss": loss, "rate/llm": 1e-3, "time/step_seconds": 2.0, "time/wait_seconds": 0.5 * (step == 7)})
    run.logged(5, {"validation/loss": 0.625, "validation/accuracy": 0.9})
    run.logged(5, {"wiki/hit@1": 0.25, "wiki/qa_score": 0.125, "other/hit@1": math.nan})
    run.logged(5, {EVALUATION_WAIT: 3.5})
    run.reading(Reading(5, "wiki", done=3, of=12, asked=2, seconds=3.0, time=0.0))
    run.reading(Reading(5, "wiki", done=4, of=12, asked=0, seconds=0.0, time=0.0))
    run.set("open_evaluations", 2)
    found = wait_for(tools, "t1")
    assert all(one.labels["sweep"] == "grid" for samples in found.values() for one in samples)
    scores = {(one.labels["set"], one.labels["metric"]): one.value for one in found.pop("score")}
    assert scores == {("wiki", "hit@1"): 0.25, ("wiki", "qa_score"): 0.125}
    assert {name: [one.value for one in samples] for name, samples in found.items()} == {
        "step": [7.0],
        "steps": [40.0],
        "loss": [0.5],
        "validation_loss": [0.625],
        "steps_per_second": [0.5],
        "data_wait_share": [0.125],
        "score_step": [5.0],
        "evaluation_wait_seconds": [3.5],
        "open_evaluations": [2.0],
        "questions_done": [4.0],
        "questions": [12.0],
        "reader_seconds": [1.5],
    }


class Said:
    """In place of Ray's gauges: what was set, in its order."""

    def __init__(self, name: str, calls: list[tuple[str, float, dict[str, str]]]) -> None:
        self.name, self.calls = name, calls

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.calls.append((self.name, value, tags))


def test_what_was_said_is_said_again_while_the_run_lives(monkeypatch: pytest.MonkeyPatch, tools: SimpleNamespace, tmp_path: Path) -> None:
    """Ray forgets what is not set again; a run that is over is to be forgotten."""
    calls: list[tuple[str, float, dict[str, str]]] = []
    monkeypatch.setattr(metrics, "_gauge", lambda name: Said(name, calls))
    monkeypatch.setattr(metrics, "_AGAIN_S", 0.01)
    monkeypatch.setattr(metrics, "_say_again", cache(metrics._say_again.__wrapped__))  # a thread of this test's own, which begins at once
    run, other = RunMetrics(tmp_path / "lives", 40), RunMetrics(tmp_path / "over", 7)
    run.logged(5, {"wiki/hit@1": 0.5, "wiki/mrr": 0.75})
    run.logged(6, {"wiki/hit@1": 0.625})
    del other
    gc.collect()
    calls.clear()

    def again() -> list[tuple[str, str | None, float]]:
        return [(name, tags.get("metric"), value) for name, value, tags in list(calls) if tags["run"] == "lives"]

    tools.wait(lambda: len(again()) >= 8, "all of it, twice")
    assert set(again()) == {
        ("stairstep_steps", None, 40.0),
        ("stairstep_score", "hit@1", 0.625),
        ("stairstep_score", "mrr", 0.75),
        ("stairstep_score_step", None, 6.0),
    }
    assert all(tags["run"] != "over" for _, _, tags in list(calls))


@pytest.mark.soak
def test_a_real_run_says_what_its_folder_says(
    ray_here: None,
    micro: SimpleNamespace,
    recipe: Callable[..., Any],
    background: Callable[..., Future[Any]],
    tools: SimpleNamespace,
    tmp_path: Path,
) -> None:
    """It goes on until all has been seen. Evaluated beside training: worker, evaluator and driver each have something to say."""
    reader = write_random_checkpoint(tmp_path / "reader", "reader")
    own = (f"optim.steps={ENDLESS}", "evaluation.every=40", "evaluation.loss_every=40", "cluster.workers=1", "checkpoints.every=40")
    beside = ("evaluation.mode=beside", "evaluation.ledger=false", f"evaluation.reader={{kind: local, model: {reader}, max_new_tokens: 2}}")
    made = recipe("measured", *own, *beside)
    folder = RunFolder(Path(made.run.root) / "measured")
    running = background(train_on_ray, made)
    try:
        found = wait_for(tools, "measured", running)
    finally:
        tools.wait(lambda: folder.path.is_dir() or running.done(), "the run's folder")
        (folder.path / "stop").touch()
    assert running.result(timeout=400).outcome.reason == "stopped"
    rows = MetricLog(folder.path / "metrics.jsonl").rows()

    def logged(name: str) -> list[float]:
        return [row[name] for row in rows if name in row]

    def said(name: str) -> float:
        (one,) = found[name]
        assert one.labels.get("sweep", "") == ""
        return one.value

    assert said("step") in [row["step"] for row in rows if "train/loss" in row]
    for name, field in (("loss", "train/loss"), ("validation_loss", "validation/loss"), ("evaluation_wait_seconds", EVALUATION_WAIT)):
        assert any(said(name) == pytest.approx(value, rel=1e-9) for value in logged(field)), name
    scores = {(one.labels["set"], one.labels["metric"]): one.value for one in found["score"]}
    assert ("tinywiki", "hit@1") in scores and ("tinywiki", "qa_score") in scores
    assert all(value in logged(f"{name}/{metric}") for (name, metric), value in scores.items())
    assert said("score_step") in [row["step"] for row in rows if "tinywiki/hit@1" in row]
    assert said("steps") == ENDLESS
    assert said("steps_per_second") > 0 and 0 <= said("data_wait_share") <= 1 and said("reader_seconds") > 0
    assert 0 <= said("questions_done") <= said("questions") == 12
    assert said("open_evaluations") in (0, 1, 2, 3)
    reading = folder.reading
    assert reading is not None and reading.name == "tinywiki" and reading.seconds_each is not None


def test_the_dashboard_asks_for_nothing_that_nobody_exports(ray_here: None, tools: SimpleNamespace) -> None:
    """Ours by their definition, the nodes' by a scrape; those of GPUs, of which there may be none, by what Ray's agent declares, and those
    of Serve by tests/cluster/test_serve_reader.py, where one runs."""
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    asked = names_asked_for()
    ours = {name for name in asked if name.startswith(OURS)}
    assert ours == {f"ray_{name}" for name in FIGURES}, "each of ours is on the dashboard, and no other"
    serve = {name for name in asked if name.startswith("ray_serve_")}
    gpu = {name for name in asked if "gpu" in name or "gram" in name}
    assert gpu and gpu <= {f"ray_{name}" for name in METRICS_GAUGES}
    nodes = asked - ours - serve - gpu
    assert nodes
    tools.wait(lambda: nodes <= {one.name for one in scrape()}, f"all of {sorted(nodes)}", every_s=0.5)  # Ray looks every few seconds


def test_the_dashboard_can_be_imported() -> None:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert board["title"] == "Stairstep" and board["schemaVersion"] >= 39 and "id" not in board
    variables = {one["name"] for one in board["templating"]["list"]}
    assert variables == {"datasource", "sweep", "run", "set", "metric"}
    places = [panel["gridPos"] for panel in board["panels"]]
    cells = [(x, y) for one in places for x in range(one["x"], one["x"] + one["w"]) for y in range(one["y"], one["y"] + one["h"])]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24, "panels lie beside one another"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in board["panels"]:
        if panel["type"] == "row":
            continue
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["title"] and panel["description"] and panel["targets"]
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")")
            assert target["expr"].count("{") == target["expr"].count("}")
