"""Kill a training at random instants, go on each time, and compare it with an undisturbed run: weights, optimizer and metrics bit by bit.

python bench/kill_resume.py --kills 10                              the embedded recipe, shortened
python bench/kill_resume.py --kills 10 RECIPE.yaml key.path=value   another one, as it stands

An instant is a step that the run has reached and a random wait after it, so that kills fall into every step, evaluation, checkpoint and
start. Writes bench/results/kill_resume.json; exit code 1 if any bit differs.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from stairstep.records import RunFolder, describe_environment, is_volatile, read_json, read_json_lines, write_json
from stairstep.settings import StairstepError, build, from_plain, to_plain
from stairstep.tasks import Recipe, load_recipe
from stairstep.tasks.placing import open_placed
from stairstep.tasks.resolve import resolve

RESULTS = Path(__file__).parent / "results" / "kill_resume.json"
EMBEDDED = Path(__file__).parent.parent / "recipes" / "tinywiki.yaml"
SHORT = (
    "data.world.articles=20",
    "data.world.questions=20",
    "data.world.pairs=160",
    "data.world.text_pairs=60",
    "tiles.max_visual_tokens=16",
    "optim.batch=8",
    "optim.steps=24",
    "optim.ema_decay=0.9",
    "phases.text_warmup_steps=6",
    "phases.text_mix=0.25",
    "evaluation.every=8",
    "evaluation.loss_every=6",
    "evaluation.loss_batches=1",
    "checkpoints.every=4",
)
_POLL_S = 0.002
_COSTS = ("timings", "embeddings")  # of a summary: how long it took, and what was found instead of computed
_CONTEXT = multiprocessing.get_context("forkserver")


@functools.cache
def warm_up() -> None:
    """Start the process that all trainings are forked from, and wait until it has imported what each of them needs."""
    # Killed processes leave the locks that tqdm made; that is no news worth a warning at the end.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    _CONTEXT.set_forkserver_preload(["stairstep.tasks.run", "torch.fx.experimental.symbolic_shapes"])
    first = _CONTEXT.Process(target=int)
    first.start()
    first.join()


def launch(recipe: Recipe, log: Path, prepare: Callable[..., None] | None = None, *arguments: Any) -> BaseProcess:
    """Train a resolved recipe in a process of its own, as jobs.train does; `prepare(*arguments)` is called there first."""
    warm_up()
    process = _CONTEXT.Process(target=_work, args=(to_plain(recipe), str(log), prepare, arguments), daemon=True)
    process.start()
    return process


def _work(plain: Mapping[str, Any], log: str, prepare: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    from stairstep.records import StopFlag, logging_setup
    from stairstep.tasks.opening import outcome_line
    from stairstep.tasks.run import train

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    logging_setup()
    recipe = build(Recipe, from_plain(plain, "recipe"))
    try:
        with StopFlag() as flag:
            if prepare is not None:
                prepare(*arguments)
            print(outcome_line(train(recipe, stop=lambda: bool(flag), console=False)), flush=True)
    except StairstepError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def wait(process: BaseProcess) -> int:
    """The exit code, once the process is gone and its parent has seen so."""
    process.join()
    assert process.pid is not None and process.exitcode is not None
    for _ in range(2500):
        try:
            os.kill(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(_POLL_S)
    return process.exitcode


# --- the instants


@dataclass(frozen=True)
class Instant:
    """So many seconds after the run has logged this step; with step 0 after its process began."""

    step: int
    wait_s: float


@dataclass(frozen=True)
class Death:
    """A kill that hit, and what the run was doing."""

    step: int
    wait_s: float
    state: str
    logged: int
    checkpoint: int


def draw(rng: random.Random, kills: int, steps: int, longest_s: float, start_s: float) -> list[Instant]:
    """Random instants in the order in which a run meets them."""
    chosen = sorted(rng.randrange(steps) for _ in range(kills))
    return [Instant(step, rng.uniform(0, longest_s if step else start_s)) for step in chosen]


def kill_at(process: BaseProcess, folder: RunFolder, instant: Instant) -> Death | None:
    """SIGKILL at the instant; None where the process ended before."""
    while process.is_alive() and instant.step and _logged(folder, process.pid) < instant.step:
        time.sleep(_POLL_S)
    process.join(instant.wait_s)
    if process.is_alive():
        process.kill()
    if wait(process) != -signal.SIGKILL:
        return None
    status, checkpoints = folder.status, folder.checkpoints()
    newest = checkpoints[-1].step if checkpoints else 0
    return Death(instant.step, round(instant.wait_s, 3), status.state if status else "nothing", _logged(folder, None), newest)


def _logged(folder: RunFolder, process: int | None) -> int:
    """The last step in the log, once this process has taken the log over."""
    status = folder.status
    if status is None or (process is not None and status.pid != process) or not folder.metrics.path.exists():
        return 0
    return max((row["step"] for row in read_json_lines(folder.metrics.path) if "train/loss" in row), default=0)


# --- the comparison


def differences(one: Path, other: Path) -> list[str]:
    """What two finished runs of one recipe differ in; empty when every bit that should be the same is the same."""
    found = []
    ends = [RunFolder.open(folder).checkpoints()[-1].path for folder in (one, other)]
    names = [sorted(path.name for path in end.iterdir()) for end in ends]
    if ends[0].name != ends[1].name or names[0] != names[1]:
        found.append(f"last checkpoint: {ends[0].name} with {names[0]}, {ends[1].name} with {names[1]}")
    else:
        found += [f"{ends[0].name}/{name}" for name in names[0] if (ends[0] / name).read_bytes() != (ends[1] / name).read_bytes()]
    found += _metric_differences(*(_events(folder) for folder in (one, other)))
    for pattern, read in (("eval_step*.jsonl", Path.read_bytes), ("eval_step*.summary.json", _summary)):
        files = [{str(path.relative_to(folder)): read(path) for path in folder.rglob(pattern)} for folder in (one, other)]
        found += [name for name in sorted(files[0].keys() | files[1].keys()) if files[0].get(name) != files[1].get(name)]
    found += [f"left behind: {path.name}" for path in other.iterdir() if path.name.startswith(".") and path.name != ".lock"]
    return found


def _events(folder: Path) -> list[dict[str, Any]]:
    """The metric log in its order, without what a clock says."""
    return [{name: value for name, value in row.items() if not is_volatile(name)} for row in RunFolder.open(folder).metrics.rows()]


def _metric_differences(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> list[str]:
    if len(one) != len(other):
        return [f"metrics.jsonl: {len(one)} and {len(other)} events"]
    return [f"metrics.jsonl: event {place} (step {row['step']})" for place, row in enumerate(one) if row != other[place]]


def _summary(path: Path) -> dict[str, Any]:
    return {name: value for name, value in read_json(path).items() if name not in _COSTS}


# --- the bench


def disturb(recipe: Recipe, whole: RunFolder, kills: int, rng: random.Random, took_s: float) -> tuple[list[Death], list[str]]:
    """Runs of the recipe that are killed and resumed until so many kills have hit; what they differ in from the whole one."""
    times = [row["time"] for row in whole.metrics.rows()]
    longest = max(after - before for before, after in itertools.pairwise(times))
    deaths: list[Death] = []
    found: list[str] = []
    victims = 0
    while len(deaths) < kills and victims < 5 * kills:
        victims += 1
        victim = _elsewhere(recipe, f"victim-{victims}")
        folder = open_placed(victim)
        log = Path(victim.run.root) / "log.txt"
        for instant in draw(rng, kills - len(deaths), recipe.optim.steps, longest, took_s - (times[-1] - times[0])):
            death = kill_at(launch(victim, log), folder, instant)
            if death is None:
                break
            deaths.append(death)
            print(f"{len(deaths):>4}  {death.step:>10}  {death.wait_s:>7.3f}  {death.state:<11} {death.logged:>6}  {death.checkpoint:>10}")
        code = wait(launch(victim, log)) if folder.status is None or folder.status.state != "finished" else 0
        if code:
            return deaths, [*found, f"victim {victims} ended with exit code {code}: {log.read_text()[-800:]}"]
        found += [f"victim {victims}: {line}" for line in differences(whole.path, folder.path)]
    if len(deaths) < kills:
        found.append(f"only {len(deaths)} of {kills} kills hit a living run")
    return deaths, found


def _elsewhere(recipe: Recipe, name: str) -> Recipe:
    """The recipe with a root of its own, so that no run finds another's embeddings."""
    plain = to_plain(recipe)
    plain["run"]["root"] = str(Path(recipe.run.root) / name)
    Path(plain["run"]["root"]).mkdir(parents=True, exist_ok=True)
    return build(Recipe, from_plain(plain, "recipe"))


def main() -> int:
    """Run, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="recipe file (default: the embedded one, shortened)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the random instants")
    options = parser.parse_intermixed_args()
    embedded = options.recipe is None or "=" in options.recipe
    overrides = [*(SHORT if embedded else ()), *([options.recipe] if embedded and options.recipe else []), *options.overrides]
    with tempfile.TemporaryDirectory(prefix="kill-resume-") as root:
        recipe = load_recipe(EMBEDDED if embedded else options.recipe, [*overrides, f"run.root={root}", "cluster.workers=0"])
        recipe = resolve(recipe)
        warm_up()
        started = time.perf_counter()
        undisturbed = _elsewhere(recipe, "undisturbed")
        code = wait(launch(undisturbed, Path(undisturbed.run.root) / "log.txt"))
        took_s = time.perf_counter() - started
        if code:
            print((Path(undisturbed.run.root) / "log.txt").read_text()[-2000:])
            return code
        whole = open_placed(undisturbed)
        print(f"undisturbed: {recipe.optim.steps} steps in {took_s:.1f} s\n\nkill  after step  waited  state       logged  checkpoint")
        deaths, found = disturb(recipe, whole, options.kills, random.Random(options.seed), took_s)
    print(f"\n{len(deaths)} kills; " + (f"{len(found)} differences:\n  " + "\n  ".join(found) if found else "every bit is the same"))
    RESULTS.parent.mkdir(exist_ok=True)
    facts = {"kills": [asdict(one) for one in deaths], "differences": found, "seed": options.seed, "overrides": overrides}
    write_json(RESULTS, {**facts, "undisturbed_s": round(took_s, 2), "environment": describe_environment()})
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
