"""On a CUDA device: dropout replay, automatic kept graphs, float32 similarity under TF32, and the nccl group."""

import pytest
import torch
from objectives_toy import SEED, STEP, ToyEncoder, full_backward, gradients, make_case, worst_error

from stairstep.objectives import ObjectiveSettings, ProcessGroup, build_objective, cached_step, chunk_randomness

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda", 0)


def _cached(case, encoder, objective, **options):
    return cached_step(
        case.chunks(chunk_items=4),
        case.encode(encoder),
        case.loss(objective),
        parameters=encoder.trained(),
        loss_parameters=list(objective.parameters()),
        seed=SEED,
        step=STEP,
        device=case.device,
        **options,
    )


def test_gradients_and_kept_graphs_on_the_device():
    case = make_case(rows=12, device="cuda:0")
    chunks, found = case.chunks(chunk_items=4), {}
    for keep in (0, "auto"):
        encoder, objective = ToyEncoder().to(CUDA), build_objective(ObjectiveSettings()).double().to(CUDA)
        output = _cached(case, encoder, objective, keep_graphs_mb=keep)
        found[keep] = gradients(encoder, objective)
        assert output.own_kept_chunks == (len(chunks) if keep == "auto" else 0)
        assert encoder.forwards == len(chunks) * (1 if keep == "auto" else 2)
    encoder, objective = ToyEncoder().to(CUDA), build_objective(ObjectiveSettings()).double().to(CUDA)
    full = full_backward(case, chunks, encoder, objective)
    assert output.loss == pytest.approx(full.loss.item(), rel=1e-12)
    assert worst_error(found[0], gradients(encoder, objective)) <= 1e-9
    assert all(torch.equal(one, found["auto"][name]) for name, one in found[0].items())


def test_the_devices_random_state_comes_back():
    torch.manual_seed(3)
    true = (torch.rand(2, device=CUDA).tolist(), torch.rand(2).tolist())
    torch.manual_seed(3)
    with chunk_randomness(1, 2, 3, CUDA):
        first = torch.rand(2, device=CUDA).tolist()
    assert (torch.rand(2, device=CUDA).tolist(), torch.rand(2).tolist()) == true
    with chunk_randomness(1, 2, 3, torch.device("cuda")):
        assert torch.rand(2, device=CUDA).tolist() == first


def test_similarity_is_float32_whatever_the_process_allows():
    case = make_case(rows=12, dtype=torch.float32, device="cuda:0")
    objective = build_objective(ObjectiveSettings()).to(CUDA)
    embeddings = [torch.nn.functional.normalize(one.repeat(1, 64), dim=-1) for one in (case.queries, case.documents)]
    exact = objective(*(one.double() for one in embeddings), case.candidates).loss.item()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        coarse = (embeddings[0] @ embeddings[1].T - (embeddings[0].double() @ embeddings[1].double().T)).abs().max().item()
        assert coarse > 1e-6, "TF32 is not active here, so the comparison says nothing"
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = objective(*embeddings, case.candidates).loss.item()
        assert loss == pytest.approx(exact, rel=2e-6)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_nccl_group_moves_what_it_is_given(tmp_path):
    torch.cuda.set_device(CUDA)
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        group = ProcessGroup()
        for device in ("cpu", "cuda:0"):
            rows = torch.randn(3, 2, dtype=torch.bfloat16, device=device)
            gathered = group.gather_rows(rows, [3])
            assert torch.equal(gathered, rows)
            assert gathered.device == rows.device
            tensors = [torch.ones(2, device=device), torch.ones(3, dtype=torch.bfloat16, device=device)]
            group.sum_(tensors)
            assert [one.sum().item() for one in tensors] == [2, 3]
        assert (group.any(True), group.any(False)) == (True, False)
        group.barrier()
    finally:
        torch.distributed.destroy_process_group()
