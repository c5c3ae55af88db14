"""What 1 to 256 GPUs would make of large jobs, by arithmetic: time, cost, and what saturates first. Nothing large is run.

python bench/scale_sim.py                                    seconds, on any machine
python bench/scale_sim.py --set price.gpu_hour=2 --set pages.tiles=5

Every figure that goes in is in INPUTS with where it is from: `measured` here, `reference` (seed 000 as published, or counted from its
shapes), or `assumed`. The jobs: seed 000's run (recipes/v8r.yaml), evaluated inline and by evaluators beside training;
a sweep of 64 such trials; the embedding of a Wikipedia-sized corpus. A job is a chain of phases; in a phase some stages overlap (the
slowest counts) and others do not (all count). The stage with most of the time is what bounds the job; it is said to saturate where it is
no longer the GPUs' own arithmetic. Of what trials share (reader, grader, file system) the asymptotic bound is taken: the time is never
less than what all trials together ask of it, divided by its rate. Queues, failures, stragglers, the nodes' own coming and going,
checkpoints (0.1 GB each) and the rendering of pages are left out.

Then each assumed input is halved and doubled, and what changes of the conclusions is printed. docs/scale.md explains the result.
Writes bench/results/scale_sim.json; with --set it only prints.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Literal

from stairstep.records import write_json
from stairstep.settings import InputError

RESULTS = Path(__file__).parent / "results" / "scale_sim.json"
FLEETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PAYS = 1.5  # twice the GPUs are worth it where they make a job at least so much faster


@dataclass(frozen=True)
class Input:
    """One figure that goes in."""

    value: float
    unit: str
    kind: Literal["measured", "reference", "assumed"]
    source: str


def measured(value: float, unit: str, source: str) -> Input:
    """Measured with this code, on the machine that bench/RESULTS.md names."""
    return Input(value, unit, "measured", source)


def reference(value: float, unit: str, source: str) -> Input:
    """Published for seed 000, or counted from its shapes."""
    return Input(value, unit, "reference", source)


def assumed(value: float, unit: str, source: str) -> Input:
    """Nobody here has measured it."""
    return Input(value, unit, "assumed", source)


_TILES = "bench/results/tiles.json, 2026-11-21"
_V8R = "recipes/v8r.yaml"
_FLOPS = "counted by stairstep.models.flops for recipes/v8r.yaml"

INPUTS: dict[str, Input] = {
    # -- what is computed
    "tile.forward": reference(6.266, "TFLOP", f"{_FLOPS}: 864 visual tokens and 32 of the template"),
    "tile.backward": reference(7.734, "TFLOP", _FLOPS),
    "query.forward": reference(0.137, "TFLOP", f"{_FLOPS}: 48 tokens"),
    "query.backward": reference(0.139, "TFLOP", _FLOPS),
    "text.forward": reference(0.555, "TFLOP", f"{_FLOPS}: 192 tokens"),
    "text.backward": reference(0.568, "TFLOP", _FLOPS),
    "run.steps": reference(350, "", _V8R),
    "run.text_steps": reference(50, "", _V8R),
    "run.batch": reference(64, "queries", _V8R),
    "run.documents": reference(3, "a query", f"{_V8R}: one positive and two hard negatives"),
    "run.chunk": reference(4, "items", _V8R),
    "run.losses": reference(15, "validation losses", f"{_V8R}: step 0 and every 25"),
    "run.loss_batches": reference(5, "batches each", f"{_V8R}: the default"),
    "run.looks": reference(8, "evaluations", f"{_V8R}: step 0 and every 50"),
    "run.trained": reference(25_427_968, "parameters", "REFERENCE.md: LoRA in LLM and ViT"),
    "set.tiles": reference(7426, "tiles", "REFERENCE.md: miniv8"),
    "set.questions": reference(400, "", "REFERENCE.md: miniv8"),
    "sweep.trials": reference(64, "", "issue 8"),
    "corpus.pages": reference(8.28e6, "pages", "issue 8"),
    "pages.tiles": assumed(3, "tiles a page", "a page of some 10,000 characters with pictures and tables, at 45 lines a tile"),
    "embedding.bytes": reference(2048 * 4, "bytes", "REFERENCE.md: hidden 2048; float32 as this code keeps them"),
    # -- GPUs
    "gpu.forward": reference(7426 * 6.266 / 540, "TFLOP/s", "REFERENCE.md: 7,426 tiles in 9 minutes of an H100"),
    "gpu.relative": assumed(1, "", "the fleet's GPU and this code's kernels against that H100 and that code; no GPU was measured"),
    "gpu.training": assumed(1, "", "a training step's share of the matrix rate against an evaluation's"),
    "gpu.copy": assumed(20, "GB/s", "host to device, pinned, one GPU's share of PCIe 4 or 5"),
    "gpu.cores": assumed(12, "cores a GPU", "what clouds put beside one"),
    "gpu.node": assumed(8, "GPUs a node", "what clouds put together"),
    "link.node": assumed(100, "GB/s", "all-reduce between the GPUs of a node"),
    "link.between": assumed(5, "GB/s", "all-reduce between nodes, a GPU's share"),
    "ray.overhead": measured(0.020, "of a step", "bench/results/ray_overhead.json, 2026-11-30: between -0.014 and 0.060"),
    "evaluate.gpus": assumed(4, "GPUs", "of evaluators beside training, where there are any: as many as their group may grow to"),
    "start": assumed(300, "s", "nodes come, the environment is there, 4.3 GB of weights are read"),
    # -- tiles
    "decode.rate": measured(54.3, "tiles/s a core", f"{_TILES}: PNG to resized pixels"),
    "preprocess.rate": measured(
        64.2 / 2, "tiles/s a core", "bench/results/preprocess.json, 2026-11-21: Ray Data, two cores, shards written"
    ),
    "store.rate": measured(1580.5, "tiles/s a core", f"{_TILES}: store to resized pixels, warm"),
    "store.bytes": measured(0.521e6, "bytes a tile", _TILES),
    "pixels.bytes": reference(2.65e6, "bytes a tile", "REFERENCE.md: 864 visual tokens as uint8"),
    "png.bytes": reference(93.5e9 / 200e3, "bytes a tile", "seed 000: 93.5 GB in some 200,000 files"),
    "files.bandwidth": assumed(5, "GB/s", "of the shared file system, all nodes together"),
    # -- answers
    "ask.cpu": measured(0.0189, "s a question", "bench/results/qa_client.json, 2026-11-21: one process, three tiles"),
    "ask.flight": reference(16, "in flight", "the default of evaluation.reader.concurrency"),
    "reader.gpus": assumed(2, "GPUs", "the reader's own, beside those that are counted: as many as the reader's group may grow to"),
    "reader.rate": assumed(
        8, "answers/s a GPU", "a 4B reader, three tiles, 16 in flight; seed 000 had 3.3/s with 4 in flight, grader included"
    ),
    "reader.latency": assumed(1.0, "s", "of one answer; seed 000's 4 in flight took 1.2 s with the grade"),
    "grader.latency": assumed(1.0, "s", "of one grade"),
    "grader.limit": assumed(500 / 60, "grades/s", "a rate limit of 500 requests a minute for the whole account"),
    # -- prices
    "price.gpu_hour": assumed(3, "$", "with its cores"),
    "price.grade": assumed(700 * 2e-6 + 2 * 8e-6, "$", "some 700 tokens in at 2 $ and 2 out at 8 $ a million"),
}

Values = Mapping[str, float]


def values_of(changes: Mapping[str, float] | None = None) -> dict[str, float]:
    """The inputs' values, some of them changed."""
    changes = changes or {}
    unknown = sorted(set(changes) - set(INPUTS))
    if unknown:
        raise InputError(f"{', '.join(unknown)}: no such input; there are {', '.join(INPUTS)}")
    return {name: one.value for name, one in INPUTS.items()} | dict(changes)


@dataclass(frozen=True)
class Phase:
    """Something done `times` over: stages that overlap, and stages that everything waits for; seconds of one time each."""

    times: float
    overlapped: Mapping[str, float] = field(default_factory=dict)
    alone: Mapping[str, float] = field(default_factory=dict)

    def critical(self) -> dict[str, float]:
        """Where the time goes: the slowest of the overlapped stages, and all the others."""
        found: dict[str, float] = {}
        if self.overlapped:
            slowest = max(self.overlapped, key=lambda one: self.overlapped[one])
            found[slowest] = self.times * self.overlapped[slowest]
        for stage, seconds in self.alone.items():
            found[stage] = found.get(stage, 0.0) + self.times * seconds
        return found


@dataclass(frozen=True)
class Estimate:
    """What a job takes on so many GPUs, those of readers and evaluators not among them."""

    gpus: int
    seconds: float
    gpu_hours: float  # those of readers and evaluators among them
    cost: float
    stages: Mapping[str, float]  # seconds on the critical path

    @property
    def bound(self) -> str:
        """The stage that takes most of the time."""
        return max(self.stages, key=lambda one: self.stages[one])


def together(phases: Sequence[Phase]) -> dict[str, float]:
    """The critical path of phases one after the other, by stage."""
    total: dict[str, float] = {}
    for phase in phases:
        for stage, seconds in phase.critical().items():
            total[stage] = total.get(stage, 0.0) + seconds
    return total


def _estimate(at: Values, gpus: int, stages: Mapping[str, float], others: float, grades: float) -> Estimate:
    seconds = sum(stages.values())
    hours = (gpus + others) * seconds / 3600
    return Estimate(gpus, seconds, hours, hours * at["price.gpu_hour"] + grades * at["price.grade"], dict(stages))


# --- seed 000's run


def training_phases(at: Values, workers: int) -> list[Phase]:
    """Steps and validation losses on so many workers.

    A worker decodes its slice of the next batch ahead, and in the step, while all wait, what its chunks need of the others' slices."""
    queries, documents = at["run.batch"], at["run.batch"] * at["run.documents"]
    rate = at["gpu.forward"] * at["gpu.relative"]
    cores = at["gpu.cores"] * at["decode.rate"]
    elsewhere = 1 - 1 / workers

    def busiest(document: float, query: float) -> float:
        """The heaviest worker's operations: whole chunks of documents, and queries where there is room."""
        chunk = at["run.chunk"]
        return max(ceil(ceil(documents / chunk) / workers) * chunk * document, (documents * document + queries * query) / workers)

    def step(document: str) -> dict[str, float]:
        passes = {kind: 2 * at[f"{kind}.forward"] + at[f"{kind}.backward"] for kind in (document, "query")}
        seconds = (1 + at["ray.overhead"]) * busiest(passes[document], passes["query"]) / (rate * at["gpu.training"])
        return {"GPU": seconds, "all-reduce": all_reduce(at, workers)}

    sliced = documents / workers / cores
    read = documents * at["png.bytes"] / (at["files.bandwidth"] * 1e9)
    copied = documents / workers * at["pixels.bytes"] / (at["gpu.copy"] * 1e9)
    fresh = {"decode": sliced * elsewhere, "copies": copied}
    images = step("tile")
    loss = busiest(at["tile.forward"], at["query.forward"]) / rate
    # What is decoded ahead overlaps with the step's own work; everything that the step waits for stands beside the GPU's time.
    return [
        Phase(at["run.text_steps"], {}, step("text")),
        Phase(
            at["run.steps"] - at["run.text_steps"],
            {"GPU": images["GPU"], "decode": sliced, "file system": read},
            {"all-reduce": images["all-reduce"], **fresh},
        ),
        Phase(at["run.losses"] * at["run.loss_batches"], {}, {"GPU": loss, "decode": sliced * (1 + elsewhere), "copies": copied}),
    ]


def all_reduce(at: Values, workers: int) -> float:
    """Seconds to sum the gradients as a ring does: nearly twice their bytes over the slowest link."""
    if workers == 1:
        return 0.0
    link = at["link.node"] if workers <= at["gpu.node"] else at["link.between"]
    return 2 * (workers - 1) / workers * at["run.trained"] * 4 / (link * 1e9)


def embedding_phase(at: Values, looks: float, workers: int = 1) -> Phase:
    """The question set embedded: by the first worker alone, from the store; the other workers wait."""
    tiles, cores = at["set.tiles"], at["gpu.cores"]
    operations = tiles * at["tile.forward"] + at["set.questions"] * at["query.forward"]
    return Phase(
        looks,
        {
            "GPU" if workers == 1 else "evaluation on one GPU": operations / (at["gpu.forward"] * at["gpu.relative"]),
            "decode": tiles / (cores * at["store.rate"]),
            "file system": tiles * at["store.bytes"] / (at["files.bandwidth"] * 1e9),
            "copies": tiles * at["pixels.bytes"] / (at["gpu.copy"] * 1e9),
        },
    )


def answering_phase(at: Values, looks: float) -> Phase:
    """The questions of a look, so many in flight, each read and then graded: the slowest of what they pass through."""
    questions = at["set.questions"]
    return Phase(
        looks,
        {
            "answers in flight": questions * (at["reader.latency"] + at["grader.latency"]) / at["ask.flight"],
            "asking": questions * at["ask.cpu"],
            "reader": questions / (at["reader.gpus"] * at["reader.rate"]),
            "grader limit": questions / at["grader.limit"],
        },
    )


def preparation(at: Values, gpus: int) -> Phase:
    """What comes before the first step: nodes, and the question set's tiles put into the store on the nodes' cores."""
    return Phase(1, {}, {"start": at["start"], "preprocess": at["set.tiles"] / (gpus * at["gpu.cores"] * at["preprocess.rate"])})


def seed_run(at: Values, gpus: int) -> Estimate:
    """Seed 000's run on all GPUs as workers, evaluated inline."""
    looks = at["run.looks"]
    phases = [preparation(at, gpus), *training_phases(at, gpus), embedding_phase(at, looks, gpus), answering_phase(at, looks)]
    return _estimate(at, gpus, together(phases), at["reader.gpus"], looks * at["set.questions"])


def seed_run_beside(at: Values, gpus: int) -> Estimate:
    """The same with evaluators of their own: training goes on while they work, and the run ends when the last look is in."""
    looks, evaluators = at["run.looks"], at["evaluate.gpus"]
    training = together([preparation(at, gpus), *training_phases(at, gpus)])
    look = sum(together([embedding_phase(at, 1), answering_phase(at, 1)]).values())
    stages = {**training, "last look": look}
    # The looks before the last have all of training's time; where that is too short, the evaluators are what is waited for.
    late = (looks - 1) * look / evaluators - sum(training.values())
    if late > 0:
        begin = preparation(at, gpus).critical()
        stages = {**begin, "evaluators": (looks - 1) * look / evaluators - sum(begin.values()), "last look": look}
    return _estimate(at, gpus, stages, at["reader.gpus"] + evaluators, looks * at["set.questions"])


# --- a sweep


def sweep(at: Values, gpus: int) -> Estimate:
    """So many trials of that run: one GPU each until all have one, then several; the base's step 0 is computed once for all."""
    trials = at["sweep.trials"]
    workers = max(1, int(gpus // trials))
    waves = ceil(trials / min(trials, gpus // workers))
    own = at["run.looks"] - 1
    begin = preparation(at, gpus)
    base = together([embedding_phase(at, 1), answering_phase(at, 1)])
    trial = together([*training_phases(at, workers), embedding_phase(at, own, workers), answering_phase(at, own)])
    stages = together([begin])
    for part, times in ((base, 1), (trial, waves)):
        for stage, seconds in part.items():
            stages[stage] = stages.get(stage, 0.0) + times * seconds
    questions = (trials * own + 1) * at["set.questions"]
    fresh = (at["run.steps"] - at["run.text_steps"] + at["run.losses"] * at["run.loss_batches"]) * at["run.batch"] * at["run.documents"]
    demands = {
        "reader": questions / (at["reader.gpus"] * at["reader.rate"]),
        "grader limit": questions / at["grader.limit"],
        "file system": trials * (fresh * at["png.bytes"] + own * at["set.tiles"] * at["store.bytes"]) / (at["files.bandwidth"] * 1e9),
    }
    return _estimate(at, gpus, at_least(stages, demands, begin), at["reader.gpus"], questions)


def at_least(stages: Mapping[str, float], demands: Mapping[str, float], begin: Phase) -> dict[str, float]:
    """The critical path, made as long as the most demanded of the shared resources needs; what is added is that resource's."""
    found = dict(stages)
    most = max(demands, key=lambda one: demands[one])
    short = demands[most] + sum(begin.critical().values()) - sum(found.values())
    if short > 0:
        # Work that waits for the resource is hidden behind it: the resource is busy all the time, and the rest of the path is not.
        found = {**begin.critical(), most: demands[most]}
    return found


# --- a corpus


def corpus(at: Values, gpus: int) -> Estimate:
    """The embedding of all tiles of a corpus, read once from their files, decoded beside the GPUs, nothing kept but the embeddings."""
    tiles = at["corpus.pages"] * at["pages.tiles"]
    files = at["files.bandwidth"] * 1e9
    embed = Phase(
        1,
        {
            "GPU": tiles * at["tile.forward"] / (gpus * at["gpu.forward"] * at["gpu.relative"]),
            "decode": tiles / (gpus * at["gpu.cores"] * at["decode.rate"]),
            "file system": tiles * (at["png.bytes"] + at["embedding.bytes"]) / files,
            "copies": tiles * at["pixels.bytes"] / (gpus * at["gpu.copy"] * 1e9),
        },
    )
    return _estimate(at, gpus, together([Phase(1, {}, {"start": at["start"]}), embed]), 0, 0)


JOBS = {
    "seed 000's run": seed_run,
    "seed 000's run, evaluated beside": seed_run_beside,
    "a sweep of 64 trials": sweep,
    "8.28 million pages": corpus,
}


# --- conclusions


def pays_to(estimates: Sequence[Estimate]) -> int:
    """The most GPUs up to which each doubling made the job PAYS times faster."""
    reached = estimates[0].gpus
    for before, after in pairwise(estimates):
        if before.seconds < PAYS * after.seconds:
            break
        reached = after.gpus
    return reached


def saturates(estimates: Sequence[Estimate]) -> tuple[str, int] | None:
    """The first stage other than the GPU's own arithmetic that takes most of the time, and from how many GPUs on; None: none does."""
    return next(((one.bound, one.gpus) for one in estimates if one.bound != "GPU"), None)


def conclusions(at: Values) -> dict[str, str]:
    """What is concluded of each job, in words that can be compared."""
    found = {}
    for name, job in JOBS.items():
        estimates = [job(at, gpus) for gpus in FLEETS]
        first = saturates(estimates)
        said = f"{first[0]} from {first[1]} GPUs on" if first else f"nothing up to {FLEETS[-1]} GPUs"
        found[name] = f"saturates first: {said}; doubling pays up to {pays_to(estimates)}"
    return found


def sensitivity(at: Mapping[str, float]) -> list[dict[str, object]]:
    """Each assumed input halved and doubled: what that changes of the conclusions, and by how much times and costs move."""
    before = conclusions(at)
    plain = {name: {gpus: job(at, gpus) for gpus in FLEETS} for name, job in JOBS.items()}
    rows: list[dict[str, object]] = []
    for name in (one for one, known in INPUTS.items() if known.kind == "assumed"):
        for factor in (0.5, 2.0):
            changed = {**at, name: at[name] * factor}
            after = conclusions(changed)
            moved = {
                job: max((JOBS[job](changed, gpus).seconds / plain[job][gpus].seconds for gpus in FLEETS), key=lambda one: abs(one - 1))
                for job in JOBS
            }
            rows.append(
                {
                    "input": name,
                    "factor": factor,
                    "changed": {job: said for job, said in after.items() if said != before[job]},
                    "time_ratio": {job: round(ratio, 3) for job, ratio in moved.items()},
                }
            )
    return rows


def shown(seconds: float) -> str:
    """A span of time, short."""
    return (
        f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} days"
    )


def table(name: str, estimates: Sequence[Estimate]) -> list[str]:
    """Lines for a person, as a table of Markdown."""
    lines = [f"{name}:", "", "| GPUs | time | GPU hours | cost, $ | most of the time |", "| ---: | ---: | ---: | ---: | --- |"]
    for one in estimates:
        share = one.stages[one.bound] / one.seconds
        lines.append(f"| {one.gpus} | {shown(one.seconds)} | {one.gpu_hours:,.0f} | {one.cost:,.0f} | {one.bound}, {share:.0%} |")
    return lines


def main() -> int:
    """Compute, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], metavar="INPUT=VALUE", help="another value for an input")
    options = parser.parse_args()
    try:
        changes = {name: float(value) for name, _, value in (one.partition("=") for one in options.set)}
        at = values_of(changes)
    except ValueError as error:
        parser.error(f"--set wants INPUT=NUMBER: {error}")
    except InputError as error:
        parser.error(str(error))
    for name, one in INPUTS.items():
        print(f"{name:<18} {at[name]:>14,.6g} {one.unit:<18} {'changed' if name in changes else one.kind:<10} {one.source}")
    estimates = {name: [job(at, gpus) for gpus in FLEETS] for name, job in JOBS.items()}
    for name, found in estimates.items():
        print("\n" + "\n".join(table(name, found)))
    print("\n" + "\n".join(f"{name}: {said}" for name, said in conclusions(at).items()))
    rows = sensitivity(at)
    print("\nassumed inputs halved and doubled; what changes:")
    for row in rows:
        changed: Mapping[str, str] = row["changed"]  # type: ignore[assignment]
        for job, said in changed.items():
            print(f"{row['input']} × {row['factor']:g}: {job}: {said}")
    unmoved = [name for name, one in INPUTS.items() if one.kind == "assumed" and not any(r["changed"] for r in rows if r["input"] == name)]
    print(f"no conclusion changes with: {', '.join(unmoved)}")
    if changes:
        return 0
    RESULTS.parent.mkdir(exist_ok=True)
    report = {
        "inputs": {name: {**asdict(one), "value": at[name]} for name, one in INPUTS.items()},
        "estimates": {name: [{**asdict(one), "bound": one.bound} for one in found] for name, found in estimates.items()},
        "conclusions": conclusions(at),
        "sensitivity": rows,
    }
    write_json(RESULTS, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
