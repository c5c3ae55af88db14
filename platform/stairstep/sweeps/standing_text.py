"""Standings in words: a few lines for a run, a line a trial for a sweep, a line each for all that lies in a folder."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from stairstep.records import RunFolder
from stairstep.records.copies import told_as
from stairstep.records.gpu import shown_gpu
from stairstep.records.pace import Pace
from stairstep.records.reading import shown_reading
from stairstep.settings import StairstepError

from .folder import SweepFolder, TrialRecord, shown_point
from .scores import scores
from .spent import spent
from .standing import Standing, runs_below, standing_of


def status_lines(path: Path, now: float | None = None, where: str = "") -> list[str]:
    """What there is to say of a run, a sweep, or a folder of them; `where`: how it is called, if it is the copy of something."""
    now = time.time() if now is None else now
    with told_as(path, where or str(path)):
        if SweepFolder.is_one(path):
            return sweep_lines(SweepFolder(path), now, where)
        if RunFolder(path).holds_run():
            return run_lines(standing_of(path, now), where)
        sweeps, runs = runs_below(path)
        below = {sweep.path: where and f"{where}/{sweep.path.relative_to(path).as_posix()}" for sweep in sweeps}
        lines = [line for sweep in sweeps for line in sweep_lines(sweep, now, below[sweep.path])]
        return [*lines, *_table([_row(run.name, run, now) for run in runs])]


def run_lines(one: Standing, where: str = "") -> list[str]:
    """A run, which is called so: where it is, how fast, what it has scored, and what is wrong with it."""
    status = one.status
    lines = [f"{where or one.path}: {_where(one)}"]
    if one.pace is not None:
        rows = one.batch * one.pace.steps_s
        lines.append(f"  {_speed(one.pace)}, {rows:.3g} rows/s, {one.pace.wait_share:.0%} waiting for data (last {one.pace.steps} steps)")
    if one.losses:
        lines.append(
            "  "
            + ", ".join(f"{'' if name == 'train' else name + ' '}loss {loss:.4f} at step {at}" for name, (at, loss) in one.losses.items())
        )
    if status.active() and status.gpu is not None:
        lines.append(f"  {shown_gpu(status.gpu)}, of the first worker")
    lines.append(f"  evaluations: {_evaluations(one)}")
    if reading := _reading(one):
        lines.append(f"  {reading}")
    if one.scores:
        lines.append(f"  step {one.evaluated[-1]}: {_scores(one)}")
    if status.active():
        lines.append(f"  last word {span(one.silent_s)} ago, by process {status.pid} on {status.host}")
    return lines + [f"  {line}" for line in _trouble(one)]


def sweep_lines(sweep: SweepFolder, now: float, where: str = "") -> list[str]:
    """A sweep, which is called so: how many trials are in which state, what it has spent, and a line a trial."""
    plan, trials = sweep.plan, sweep.trials()
    counts = Counter(one.state for one in trials)
    said = ", ".join(f"{count} {state}" for state, count in counts.items())
    used = spent(sweep)
    cost = f", calls {used.cost:.2f}" if used.cost else ""
    rows = [_trial_row(sweep, one, plan.metrics[0], now) for one in trials]
    head = (
        f"{where or sweep.path}: a sweep of {len(trials)} trials ({said}); {used.device_hours:.2f} device hours{cost}; by {plan.metrics[0]}"
    )
    return [head, *_table(rows)]


def span(seconds: float) -> str:
    """A span of time, short."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 7200 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _where(one: Standing) -> str:
    status = one.status
    parts = [status.state, f"step {status.step} of {status.of}"]
    if status.active():
        parts.append(f"phase {one.phase}")
        parts += [f"{span(one.left_s)} left"] if one.left_s is not None else []
    return ", ".join(parts) + (f" ({status.message})" if status.message and status.message != status.state else "")


def _speed(pace: Pace) -> str:
    return f"{pace.steps_s:.3g} steps/s"


def _evaluations(one: Standing) -> str:
    if not one.evaluated and not one.due:
        return "none"
    done = f"done at {_steps(one.evaluated)}" if one.evaluated else "none done"
    if one.evaluating and not one.open:
        done += f", step {one.status.step} being evaluated"
    beside = f", open beside training: {_steps(one.open)}" if one.open else ""
    due = [step for step in one.due if step not in one.open]
    waiting = [step for step in due if step < one.status.step]
    late = f", waiting: {_steps(waiting)}" if waiting else ""
    coming = [step for step in due if step > one.status.step or (step == one.status.step and not one.evaluating)]
    return done + beside + late + (f", next at step {coming[0]}" if coming else "")


def _reading(one: Standing) -> str:
    """How far the questions of an evaluation are answered while they are, and how long an answer takes or took."""
    reading = one.reading
    if reading is None:
        return ""
    speed = shown_reading(reading)
    if one.status.active() and reading.done < reading.of:
        return f"{reading.name} at step {reading.step}: {reading.done} of {reading.of} questions done" + (f", {speed}" if speed else "")
    return f"{speed} at step {reading.step}" if speed else ""


def _steps(steps: Sequence[int]) -> str:
    shown = [str(one) for one in steps]
    return ("step " if len(shown) == 1 else "steps ") + ", ".join(["…", *shown[-6:]] if len(shown) > 6 else shown)


def _scores(one: Standing) -> str:
    return ", ".join(
        f"{'QA' if name == 'qa' else name.replace('hit@', 'R@').replace('mrr', 'MRR')} {value:.3f}" for name, value in one.scores.items()
    )


def _trouble(one: Standing) -> list[str]:
    """What is wrong, and what to do."""
    said = {
        "": [],
        "dead": ["DEAD: its process is gone; the same command goes on from its last checkpoint"],
        "stalled": [f"STALLED: its threads stand as {', '.join(map(str, one.stacks))} has them"],
        "silent": [f"SILENT for {span(one.silent_s)}"],
    }
    return said[one.trouble]


def _row(name: str, run: Path, now: float) -> list[str]:
    """One run of many; one that cannot be read is a line that says so."""
    try:
        one = standing_of(run, now)
    except StairstepError as error:
        return [name, "?", str(error).removeprefix(f"{run}: ")]  # its name stands before it
    active = one.status.active()
    state = one.trouble.upper() or one.status.state
    left = f"{span(one.left_s)} left" if active and one.left_s is not None else ""
    pace = f"{_speed(one.pace)}, {one.pace.wait_share:.0%} waiting" if active and one.pace is not None else ""
    gpu, reader = (shown_gpu(one.status.gpu), shown_reading(one.reading)) if active else ("", "")
    beside = f"{len(one.open)} evaluations open" if one.open else ""
    scored = f"step {one.evaluated[-1]}: {_scores(one)}" if one.scores else ""
    stacks = f"stacks: {', '.join(map(str, one.stacks))}" if one.trouble == "stalled" else ""
    why = one.status.message if one.status.state == "failed" else ""
    return [
        name,
        state,
        f"{one.status.step}/{one.status.of}",
        *(part for part in (one.phase if active else "", left, pace, gpu, beside, reader, scored, stacks, why) if part),
    ]


def _trial_row(sweep: SweepFolder, trial: TrialRecord, metric: str, now: float) -> list[str]:
    run = sweep.run_path(trial.name)
    point = shown_point(trial.point)
    if trial.state == "running" and RunFolder(run).holds_run():
        row = _row(trial.name, run, now)
        return [row[0], row[1], *row[2:], f"{point}, seed {trial.seed}"]
    found = scores(run, metric) if run.is_dir() else {}
    last = [f"{metric} {value:.3f} at step {step}" for step, value in list(found.items())[-1:]]
    return [trial.name, trial.state, *last, *([trial.reason] if trial.reason else []), f"{point}, seed {trial.seed}"]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows with their first two columns aligned; the rest follows in words."""
    if not rows:
        return []
    wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return [f"  {row[0]:<{wide[0]}}  {row[1]:<{wide[1]}}  {', '.join(row[2:])}".rstrip() for row in rows]
