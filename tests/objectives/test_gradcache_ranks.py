"""Several ranks against one: simulated in one process, then real gloo processes; dropout on, text-only steps and idle ranks included."""

import subprocess
import sys

import objectives_curve
import pytest
import torch
from objectives_curve import STEPS, curve
from objectives_toy import ToyEncoder, gradients, make_case, run_ranks, worst_error

from stairstep.objectives import Alone, InfoNCESettings, ObjectiveSettings, SigLIPSettings, build_objective, cached_loss, cached_step

LOSSES = [InfoNCESettings(label_smoothing=0.1, hardness=2.0), SigLIPSettings(initial_bias=-3.0)]


def _step(collective, chunks, case, loss, keep=0):
    encoder, objective = ToyEncoder(), build_objective(ObjectiveSettings(loss=loss)).double()
    options = {"parameters": encoder.trained(), "loss_parameters": list(objective.parameters()), "collective": collective}
    output = cached_step(
        chunks, case.encode(encoder), case.loss(objective), seed=2, step=9, keep_graphs_mb=keep, device=case.device, **options
    )
    return output, gradients(encoder, objective), encoder


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("loss", LOSSES, ids=["infonce", "siglip"])
@pytest.mark.parametrize("keep", [0, 1000])
def test_simulated_ranks_have_the_loss_and_gradient_of_one(size, loss, keep):
    case = make_case(rows=7)
    chunks = case.chunks(chunk_items=3)
    one, true, _ = _step(Alone(), chunks, case, loss)
    results = run_ranks(size, lambda rank: _step(rank, chunks, case, loss, keep))
    for output, found, _ in results:
        assert output.loss == pytest.approx(one.loss, rel=1e-12)
        assert output.metrics == pytest.approx(one.metrics, rel=1e-12)
        assert worst_error(found, true) <= 1e-11  # a norm that grew with the ranks would be off by a factor
        assert all(torch.equal(gradient, results[0][1][name]) for name, gradient in found.items())
    assert sum(encoder.forwards for _, _, encoder in results) == (2 if keep == 0 else 1) * len(chunks)
    assert all(0 < encoder.forwards < 2 * len(chunks) for _, _, encoder in results)


def test_ranks_without_a_chunk_and_parameters_that_only_some_ranks_used():
    case = make_case(rows=4, hard=0, duplicates=False)
    chunks = case.chunks()  # one chunk of queries, one of documents: ranks 2 and 3 have none, and only one rank uses the tile layer
    one, true, _ = _step(Alone(), chunks, case, LOSSES[0])
    results = run_ranks(4, lambda rank: _step(rank, chunks, case, LOSSES[0]))
    assert sorted(encoder.forwards for _, _, encoder in results) == [0, 0, 2, 2]
    for output, found, encoder in results:
        assert output.loss == pytest.approx(one.loss, rel=1e-12)
        assert worst_error(found, true) <= 1e-11
        assert encoder.vit.grad is not None

    texts = make_case(rows=4, hard=0, duplicates=False, tiles=False)
    for _, found, encoder in run_ranks(3, lambda rank: _step(rank, texts.chunks(), texts, LOSSES[0])):
        assert encoder.vit.grad is None
        assert found["0.lora_a"].norm() > 0


def test_earlier_gradients_are_not_summed_again():
    case = make_case(rows=6)
    chunks = case.chunks(chunk_items=3)

    def twice(collective):
        encoder, objective = ToyEncoder(), build_objective(ObjectiveSettings()).double()
        for step in range(2):
            cached_step(
                chunks,
                case.encode(encoder),
                case.loss(objective),
                parameters=encoder.trained(),
                loss_parameters=list(objective.parameters()),
                collective=collective,
                seed=1,
                step=step,
            )
        return gradients(encoder, objective)

    true = twice(Alone())
    for found in run_ranks(3, twice):
        assert worst_error(found, true) <= 1e-11


def test_the_loss_alone_over_ranks():
    case, encoder = make_case(rows=5), ToyEncoder()
    objective = build_objective(ObjectiveSettings()).double()
    chunks = case.chunks(chunk_items=4)
    one = cached_loss(chunks, case.encode(encoder), case.loss(objective))
    for found in run_ranks(3, lambda rank: cached_loss(chunks, case.encode(encoder), case.loss(objective), collective=rank)):
        assert found.loss == one.loss


def test_simulated_curves_in_both_precisions():
    for dtype, first, whole in ((torch.float32, 1e-6, 1e-3), (torch.float64, 1e-12, 1e-9)):
        one = curve(Alone(), dtype)
        _compare(run_ranks(3, lambda rank, dtype=dtype: curve(rank, dtype)), one, first, whole)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Results by rank of four real gloo processes, which ran once as two and once as four."""
    folder = tmp_path_factory.mktemp("gloo")
    command = [sys.executable, objectives_curve.__file__, "4", str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(4)]


@pytest.mark.parametrize("size", [2, 4])
def test_real_processes_follow_the_curve_of_one(processes, size):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = curve(Alone())
    torch.set_num_threads(threads)
    _compare([processes[rank][size] for rank in range(size)], one, 1e-6, 1e-3)


def _compare(ranks, one, first, whole):
    assert one["losses"][-1] < one["losses"][0]
    for found in ranks:
        assert found["losses"][0] == pytest.approx(one["losses"][0], rel=first)
        assert found["losses"] == pytest.approx(one["losses"], rel=whole)
        assert len(found["losses"]) == STEPS
        for step in (0, 1):
            assert worst_error(found["gradients"][step], one["gradients"][step]) <= (1e-5 if step == 0 else 1e-3)
        assert "0.vit" in found["gradients"][0]
        assert "0.vit" not in found["gradients"][1]
        assert all(torch.equal(mine, other) for mine, other in zip(found["weights"], ranks[0]["weights"], strict=True))


@pytest.mark.parametrize("size", [2, 4])
def test_the_process_groups_operations(processes, size):
    for rank in range(size):
        found = processes[rank][size]["exchanges"]
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64):
            counts, rows = found[f"rows {dtype}"]
            assert counts[0] == 2 and counts[-1] > 0 and len(set(counts)) > 1
            expected = [10 + other for other in range(size) for _ in range(counts[other])]
            assert rows.dtype == dtype
            assert rows.tolist() == [[value] * 3 for value in expected]
        assert found["no rows"].shape == (0, 3)
        halves, double, bfloat = found["sums"]
        assert halves.tolist() == [[sum(other + 0.5 for other in range(size))] * 2] * 2
        assert double.item() == size and double.dtype == torch.float64
        assert bfloat.tolist() == [size] * 3 and bfloat.dtype == torch.bfloat16
        assert found["any"] == (True, False)
