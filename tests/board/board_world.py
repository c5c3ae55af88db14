"""Run folders and sweeps as jobs leave them, made in a moment: a test says which question found its tile where and what was answered."""

from __future__ import annotations

import base64
import gzip
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from stairstep.data.questions import is_selection
from stairstep.evaluation.question_set import RetrievalResult, write_result
from stairstep.evaluation.retrieval import ARTICLE_METRICS, article_metrics, scores_of
from stairstep.evaluation.settings import EvaluationSettings
from stairstep.records import RunFolder
from stairstep.settings import to_yaml
from stairstep.sweeps import StepOfStairs, SweepFolder, SweepPlan, TrialRecord

EVIL = "<script>window.ran = 1</script></script><img src=x onerror='window.ran = 1'>"


def ranks(n: int, found: float, seed: int) -> list[int]:
    """Where the golden article stood: first for about so many questions, else second to twelfth."""
    draw = random.Random(seed)
    return [1 if draw.random() < found else draw.randint(2, 12) for _ in range(n)]


def row(place: int, rank: int, problem: str | None = None) -> dict[str, Any]:
    """A question's row, its golden article at this rank."""
    name = f"q{place}"
    articles = [f"wrong-{place}-{at}" for at in range(10)]
    if rank <= 10:
        articles[rank - 1] = f"right-{place}"
    listed = [{"path": f"{one}.png", "article": one, "tile": f"{one:0>64}", "score": 0.9 - 0.05 * at} for at, one in enumerate(articles)]
    return {
        "id": name,
        "problem": problem or f"What is number {place}?",
        "answer": f"the {place}th",
        "golden_ids": [f"right-{place}"],
        **article_metrics(articles, [f"right-{place}"], [rank]),
        "golden_ranks": [rank],
        "split": "selection" if is_selection(name, 0.5) else "report",
        "retrieved": listed,
    }


def write_evaluation(
    folder: Path,
    step: int,
    places: Sequence[int],
    states: Sequence[str] | None = None,
    problems: Mapping[int, str] | None = None,
    name: str | None = None,
    calls: Mapping[str, Any] | None = None,
    tiles_dir: Path | None = None,
) -> list[dict[str, Any]]:
    """An evaluation as a run writes it; its rows. With `name` it is of a further question set."""
    rows = [row(place, rank, (problems or {}).get(place)) for place, rank in enumerate(places)]
    parts = {part: scores_of([one for one in rows if one["split"] == part], ARTICLE_METRICS) for part in ("selection", "report")}
    facts = {"timings": {"embed_s": 6.0, "search_s": 1.0}, "questions": len(rows), "tiles": 2 * len(rows)}
    facts |= {"tiles_dir": str(tiles_dir)} if tiles_dir else {}
    result = RetrievalResult(name or "wiki", tuple(rows), scores_of(rows, ARTICLE_METRICS), parts["selection"], parts["report"], facts)
    if states is not None:
        rows = [_answered(one, state) for one, state in zip(rows, states, strict=True)]
        made = {"answer": {"model": "reader", "hits": 3, "asked": len(rows) - 3, "waited": 1, "cost": 0.5}}
        result = result.answered(rows, EvaluationSettings(), {"read_s": 12.0, "grade_s": 2.0}, made if calls is None else calls)
    write_result(folder, step, result, primary=name is None)
    return rows


def _answered(one: dict[str, Any], state: str) -> dict[str, Any]:
    missing = state in ("unanswered", "ungraded")
    said = None if state == "unanswered" else f"I say {one['id']}"
    return {**one, "predicted": said, "state": state, **({"reason": "no reply"} if missing else {"correct": state == "correct"})}


def write_run(folder: Path, evaluations: Mapping[int, Sequence[int]], seed: int = 0, steps: int = 20, **more: Any) -> RunFolder:
    """A finished run with these evaluations; `more` goes to each of them."""
    run = RunFolder.create(folder)
    run.write_recipe(
        to_yaml(
            {
                "run": {"seed": seed},
                "data": {"roots": [str(folder.parent)]},
                "optim": {"batch": 32},
                "evaluation": {"selection_metric": "hit@1"},
                "cluster": {"workers": 2},
            }
        )
    )
    run.metrics.append(0, {"validation/loss": 1.5})
    for step in range(1, steps + 1):
        values = {"train/loss": 2.0 / step + 0.01 * seed, "train/temperature": 0.07, "rate/llm": 0.001 * step}
        run.metrics.append(step, {**values, "time/step_seconds": 2.0, "time/wait_seconds": 0.5})
    run.metrics.append(steps, {"validation/loss": 0.5 + 0.01 * seed})
    for step, places in evaluations.items():
        write_evaluation(folder, step, places, **more)
    run.set_status("finished", steps, steps, "finished")
    return run


PLAN = SweepPlan(
    name="small",
    recipe_file="recipes/tinywiki.yaml",
    space_file="tune_spaces/small.yaml",
    overrides=(),
    recipe={},
    space={},
    seeds=(0, 1),
    metrics=("hit@1",),
    modes=("max",),
    command="python -m jobs.sweep recipes/tinywiki.yaml tune_spaces/small.yaml",
)
STAIRS = (StepOfStairs("plain", "in-batch negatives"), StepOfStairs("hard", "a hard negative"), StepOfStairs("same", "nothing at all"))


def write_staircase(folder: Path, n: int = 80, seeds: Sequence[int] = (0, 1), **more: Any) -> SweepFolder:
    """A sweep of three steps, of which the second is clearly better than the first and the third is no better than the second."""
    sweep = SweepFolder(folder)
    sweep.make()
    sweep.write_plan(replace(PLAN, seeds=tuple(seeds), steps=STAIRS))
    base, number = ranks(n, 0.2, 99), 0
    for place, (step, found) in enumerate({"plain": 0.4, "hard": 0.8, "same": 0.8}.items()):
        for seed in seeds:
            name = f"{number:03d}-{step}-seed{seed}"
            write_run(sweep.run_path(name), {0: base, 20: ranks(n, found, 10 * place + seed)}, seed=seed, **more)
            sweep.write_trial(_trial(number, name, {"step": step}, seed))
            number += 1
    return sweep


def write_grid(folder: Path, n: int = 60) -> SweepFolder:
    """A grid of two rates and two ranks with a trial of every state, and a combination that was skipped."""
    sweep = SweepFolder(folder)
    sweep.make()
    skipped = ({"point": {"optim.rates.llm": 0.01, "model.adapter.rank": 64}, "reason": "too large for the rate"},)
    sweep.write_plan(replace(PLAN, seeds=(0,), skipped=skipped))
    points = [(0.001, 8, 0.5), (0.001, 16, 0.7), (0.01, 8, 0.3)]
    for number, (rate, rank, found) in enumerate(points):
        name = f"{number:03d}-trial"
        write_run(sweep.run_path(name), {0: ranks(n, 0.2, 99), 10: ranks(n, found - 0.1, number), 20: ranks(n, found, 50 + number)})
        record = _trial(number, name, {"optim.rates.llm": rate, "model.adapter.rank": rank}, 0)
        ended = {2: {"state": "stopped", "reason": "below the median at step 10", "stopped_at": 20}}
        sweep.write_trial(replace(record, **ended.get(number, {})))
    point = {"optim.rates.llm": 0.01, "model.adapter.rank": 16}
    sweep.write_trial(replace(_trial(3, "003-trial", point, 0), state="failed", reason=f"out of memory {EVIL}"))
    sweep.write_trial(replace(_trial(4, "004-trial", {**point, "model.adapter.rank": 32}, 0), state="waiting", seconds=0.0))
    return sweep


def _trial(number: int, name: str, point: Mapping[str, Any], seed: int) -> TrialRecord:
    return TrialRecord(number, name, point, (f"run.seed={seed}",), seed, "finished", seconds=1800.0, workers=2)


def write_tiles(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A picture for every tile that the rows name."""
    folder.mkdir(parents=True, exist_ok=True)
    for one in rows:
        for tile in one["retrieved"][:3]:
            Image.new("RGB", (90, 120), "navy").save(folder / tile["path"])


def unpacked(page: str, block: str = "data") -> Any:
    """A compressed block of a page: its data, or the text of the library."""
    found = re.search(rf'<script type="text/plain" id="{block}">([A-Za-z0-9+/=]*)</script>', page)
    assert found is not None, block
    text = gzip.decompress(base64.b64decode(found[1])).decode()
    return json.loads(text) if block == "data" else text
