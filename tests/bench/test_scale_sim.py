"""The model of large jobs: corner cases by hand, what must never happen as GPUs are added, and inputs held against what they are of."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import scale_sim
from scale_sim import FLEETS, INPUTS, JOBS, Estimate, Phase, at_least, corpus, pays_to, saturates, seed_run, sweep, together, values_of

from stairstep.models.flops import forward_and_backward
from stairstep.settings import InputError
from stairstep.tasks import load_recipe
from stairstep.tasks.cost import due, evaluations
from stairstep.tasks.doctor import Patient

ROOT = Path(__file__).resolve().parents[2]
# Everything but the GPU's arithmetic takes no time.
FREE = {
    "gpu.copy": 1e12,
    "link.node": 1e12,
    "link.between": 1e12,
    "ray.overhead": 0.0,
    "start": 0.0,
    "decode.rate": 1e12,
    "preprocess.rate": 1e12,
    "store.rate": 1e12,
    "files.bandwidth": 1e12,
    "ask.cpu": 0.0,
    "reader.rate": 1e12,
    "reader.latency": 0.0,
    "grader.latency": 0.0,
    "grader.limit": 1e12,
}
# 1 TFLOP/s; a tile takes 1 s forward and 2 s backward, texts and queries nothing.
SIMPLE = {
    **FREE,
    "gpu.forward": 1.0,
    "tile.forward": 1.0,
    "tile.backward": 2.0,
    **{f"{one}.{way}": 0.0 for one in ("query", "text") for way in ("forward", "backward")},
}


def test_a_phase_takes_its_slowest_stage_and_all_that_stand_alone():
    phase = Phase(10, {"GPU": 2.0, "decode": 3.0}, {"all-reduce": 0.5, "decode": 0.25})
    assert phase.critical() == {"decode": 32.5, "all-reduce": 5.0}
    assert together([phase, Phase(1, {}, {"start": 7.0})]) == {"decode": 32.5, "all-reduce": 5.0, "start": 7.0}


def test_seed_000_on_one_gpu_by_hand():
    """300 steps of 192 tiles, forward twice and backward once; 75 validation batches and 8 looks forward alone."""
    seconds = 300 * 192 * (2 * 1 + 2) + 75 * 192 + 8 * 7426
    assert seed_run(values_of(SIMPLE), 1).seconds == pytest.approx(seconds)


def test_chunks_bound_how_many_workers_help():
    """48 chunks of 4 tiles: 48 workers have one each, 32 have two at most, and more than 48 gain nothing."""
    at = values_of({**SIMPLE, "run.looks": 0.0, "run.losses": 0.0, "set.tiles": 0.0})
    assert seed_run(at, 1).seconds == pytest.approx(300 * 192 * 4)
    assert seed_run(at, 32).seconds == pytest.approx(300 * 2 * 4 * 4)
    assert seed_run(at, 48).seconds == pytest.approx(300 * 4 * 4)
    assert seed_run(at, 256).seconds == pytest.approx(300 * 4 * 4)


def test_evaluation_stays_on_one_gpu():
    """However many workers there are, 8 looks of 7,426 tiles take what they take; that is what bounds a run in the end."""
    at = values_of(SIMPLE)
    many = seed_run(at, 256)
    assert many.stages["evaluation on one GPU"] == pytest.approx(8 * 7426)
    assert many.bound == "evaluation on one GPU"
    assert seed_run(at, 1).bound == "GPU"
    assert "evaluation on one GPU" not in seed_run(at, 1).stages


def test_evaluators_beside_take_their_time_off_the_run_but_for_the_last_look():
    at = values_of({**SIMPLE, "evaluate.gpus": 1000.0})
    training = 300 * 192 * 4 + 75 * 192
    assert scale_sim.seed_run_beside(at, 1).seconds == pytest.approx(training + 7426)
    # One evaluator has seven looks to do before the last, and training of 48 workers takes less than that.
    slow = scale_sim.seed_run_beside(values_of({**SIMPLE, "evaluate.gpus": 1.0}), 48)
    assert slow.seconds == pytest.approx(8 * 7426)
    assert slow.bound == "evaluators"


def test_all_reduce_is_a_ring_over_the_slowest_link():
    at = values_of({"link.node": 100.0, "link.between": 10.0, "run.trained": 25e6, "gpu.node": 8.0})
    assert scale_sim.all_reduce(at, 1) == 0
    assert scale_sim.all_reduce(at, 8) == pytest.approx(2 * 7 / 8 * 0.1 / 100)
    assert scale_sim.all_reduce(at, 16) == pytest.approx(2 * 15 / 16 * 0.1 / 10)


def test_answers_take_the_slowest_of_what_they_pass_through():
    at = values_of({"reader.latency": 2.0, "grader.latency": 1.0, "ask.cpu": 0.01, "reader.rate": 8.0, "grader.limit": 20.0})
    # 400 × 3 s / 16 = 75 s in flight; 4 s of asking; 25 s of two readers; 20 s of the limit.
    assert together([scale_sim.answering_phase(at, 2)]) == {"answers in flight": pytest.approx(150)}
    assert together([scale_sim.answering_phase({**at, "grader.limit": 4.0}, 1)]) == {"grader limit": pytest.approx(100)}


def test_a_sweep_by_hand_its_waves_and_what_all_trials_share():
    at = values_of(SIMPLE)
    trial = 300 * 192 * 4 + 75 * 192 + 7 * 7426
    assert sweep(at, 1).seconds == pytest.approx(64 * trial + 7426)
    assert sweep(at, 32).seconds == pytest.approx(2 * trial + 7426)
    assert sweep(at, 48).seconds == pytest.approx(2 * trial + 7426), "64 trials on 48 GPUs are two waves"
    assert sweep(at, 64).seconds == pytest.approx(trial + 7426)
    limited = sweep(values_of({**SIMPLE, "grader.limit": 0.1}), 64)
    assert limited.seconds == pytest.approx((64 * 7 + 1) * 400 / 0.1)
    assert limited.bound == "grader limit"


def test_a_shared_resource_never_shortens_a_job():
    begin = Phase(1, {}, {"start": 10.0})
    path = {"start": 10.0, "GPU": 100.0}
    assert at_least(path, {"reader": 99.0, "file system": 1.0}, begin) == path
    assert at_least(path, {"reader": 101.0, "file system": 1.0}, begin) == {"start": 10.0, "reader": 101.0}


def test_a_corpus_by_hand():
    at = values_of({**FREE, "corpus.pages": 1e6, "pages.tiles": 2.0, "tile.forward": 5.0, "gpu.forward": 100.0})
    one = corpus(at, 10)
    assert one.seconds == pytest.approx(2e6 * 5 / 100 / 10)
    assert one.gpu_hours == pytest.approx(10 * one.seconds / 3600)
    assert one.cost == pytest.approx(one.gpu_hours * 3)
    files = corpus({**at, "files.bandwidth": 0.001, "png.bytes": 4e5, "embedding.bytes": 1e5}, 10)
    assert files.seconds == pytest.approx(2e6 * 5e5 / 1e6)
    assert files.bound == "file system"


@pytest.mark.parametrize("job", JOBS)
def test_more_gpus_never_take_longer_and_never_fewer_gpu_hours_than_one(job: str):
    """But for the all-reduce that a second worker, and a second node, bring along: within a hundredth."""
    found = [JOBS[job](values_of(), gpus) for gpus in FLEETS]
    for before, after in pairwise(found):
        assert after.seconds <= before.seconds * 1.01
    assert all(one.seconds == pytest.approx(sum(one.stages.values())) for one in found)
    assert found[-1].seconds < found[0].seconds / 2


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("name", ["gpu.forward", "gpu.copy", "decode.rate", "store.rate", "files.bandwidth", "reader.rate", "grader.limit"])
def test_a_faster_part_never_slows_a_job(job: str, name: str):
    for gpus in FLEETS:
        assert JOBS[job](values_of({name: INPUTS[name].value * 2}), gpus).seconds <= JOBS[job](values_of(), gpus).seconds * (1 + 1e-12)


def test_conclusions_name_the_first_stage_that_saturates_and_where_doubling_stops_to_pay():
    def one(gpus: int, **stages: float) -> Estimate:
        return Estimate(gpus, sum(stages.values()), 0.0, 0.0, stages)

    found = [one(1, GPU=100.0, decode=1.0), one(2, GPU=50.0, decode=1.0), one(4, GPU=25.0, decode=30.0), one(8, GPU=12.0, decode=30.0)]
    assert saturates(found) == ("decode", 4)
    assert pays_to(found) == 2
    assert saturates(found[:2]) is None


def test_every_assumed_input_is_halved_and_doubled():
    rows = scale_sim.sensitivity(values_of())
    assumed = [name for name, one in INPUTS.items() if one.kind == "assumed"]
    assert [(row["input"], row["factor"]) for row in rows] == [(name, factor) for name in assumed for factor in (0.5, 2.0)]
    [limit] = [row for row in rows if row["input"] == "grader.limit" and row["factor"] == 0.5]
    assert limit["time_ratio"]["a sweep of 64 trials"] == pytest.approx(2, rel=0.02), "the sweep waits for the grader, and twice as long"
    assert "grader limit from 32" in limit["changed"]["a sweep of 64 trials"]


def test_an_unknown_input_is_told():
    with pytest.raises(InputError, match=r"tile\.foreward: no such input; there are tile\.forward"):
        values_of({"tile.foreward": 1.0})


def test_the_document_shows_what_the_script_computes():
    told = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    for name, job in JOBS.items():
        lines = scale_sim.table(name, [job(values_of(), gpus) for gpus in FLEETS])[2:]
        assert len(lines) == 2 + len(FLEETS)
        assert "\n".join(lines) in told, name


def test_the_two_documents_do_not_give_two_answers_without_saying_why():
    """docs/cluster.md takes the seconds that seed 000 speaks of, docs/scale.md the rate that it publishes; each names the other's."""
    at, cluster = values_of(), " ".join((ROOT / "docs" / "cluster.md").read_text(encoding="utf-8").split())
    [images] = [one for one in scale_sim.training_phases(at, 1) if one.times == at["run.steps"] - at["run.text_steps"]]
    alone, beside, eight = seed_run(at, 1), scale_sim.seed_run_beside(at, 1), scale_sim.seed_run_beside(at, 8)
    assert f"at which a step takes {images.overlapped['GPU']:.0f}: {alone.seconds / 3600:.1f} hours and ${alone.cost:.0f} on one" in cluster
    assert (
        f"{beside.seconds / 3600:.1f} hours and ${beside.cost:.0f}, and {eight.seconds / 60:.0f} minutes and ${eight.cost:.0f}" in cluster
    )
    assert "About $30 a run" in cluster and "step taken as 5. " in cluster
    scale = " ".join((ROOT / "docs" / "scale.md").read_text(encoding="utf-8").split())
    assert "The $30 of [cluster.md](cluster.md#sizes-and-costs-of-seed-000s-run) for the same run" in scale
    assert f"where this page comes to ${alone.cost:.0f}" in scale


def test_the_results_are_of_the_inputs_as_they_are():
    kept = json.loads(scale_sim.RESULTS.read_text(encoding="utf-8"))["inputs"]
    assert kept == {name: asdict(one) for name, one in INPUTS.items()}


# --- the inputs, held against what they are of


def test_the_shapes_and_counts_are_those_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    recipe = load_recipe(ROOT / "recipes" / "v8r.yaml")
    at = values_of()
    model, _ = Patient(recipe).meta
    assert sum(one.numel() for one in model.parameters() if one.requires_grad) == at["run.trained"]
    for way, work in zip(("forward", "backward"), forward_and_backward(model), strict=True):
        assert at[f"tile.{way}"] == pytest.approx(work.of(896, 864) / 1e12, rel=1e-3)
        assert at[f"query.{way}"] == pytest.approx(work.of(48) / 1e12, rel=1e-2)
        assert at[f"text.{way}"] == pytest.approx(work.of(192) / 1e12, rel=1e-2)
    assert (at["run.steps"], at["run.batch"], at["run.text_steps"]) == (
        recipe.optim.steps,
        recipe.optim.batch,
        recipe.phases.text_warmup_steps,
    )
    assert at["run.documents"] == 1 + recipe.data.hard_negatives
    assert at["run.chunk"] == recipe.objective.gradcache.chunk_items
    assert at["run.looks"] == evaluations(recipe)
    assert at["run.losses"] == due(recipe.evaluation.loss_every, recipe.optim.steps)
    assert at["run.loss_batches"] == recipe.evaluation.loss_batches
    assert at["ask.flight"] == recipe.evaluation.reader.concurrency


def test_what_was_measured_here_is_what_the_results_say():
    results = ROOT / "bench" / "results"
    tiles = json.loads((results / "tiles.json").read_text())
    median = {one["way"]: sorted(one["tiles_s"])[len(one["tiles_s"]) // 2] for one in tiles["rates"]}
    at = values_of()
    assert at["decode.rate"] == pytest.approx(median["Stairstep, PNG → bytes (cold)"], rel=0.01)
    assert at["store.rate"] == pytest.approx(median["Stairstep, store → bytes (warm)"], rel=0.01)
    assert at["store.bytes"] == pytest.approx(tiles["bytes"]["store"], rel=0.01)
    asked = json.loads((results / "qa_client.json").read_text())["rows"][0]
    assert at["ask.cpu"] == pytest.approx(asked["wall_s"] / asked["measured"], rel=0.01)
    speed = json.loads((results / "preprocess.json").read_text())["speed"]
    rates = sorted(speed["tiles"] / seconds for seconds in speed["ray_s"])
    assert at["preprocess.rate"] == pytest.approx(rates[len(rates) // 2] / 2, rel=0.01)
