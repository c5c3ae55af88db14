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


def test_auto_leaves_room_on_a_crowded_device():
    free, total = torch.cuda.mem_get_info(CUDA)
    filler = torch.empty(free - total // 13, dtype=torch.uint8, device=CUDA)
    values = total // 400 // 4 // 2  # two saved tensors of float32: a graph is a four-hundredth of the device
    weight = torch.nn.Parameter(torch.ones(1, device=CUDA))
    case = make_case(rows=8, hard=1, duplicates=False, dtype=torch.float32, device="cuda:0")
    inputs = torch.zeros(values, device=CUDA)

    def encode(chunk):
        activations = (inputs * weight).sin().cos()
        rows = case.queries if chunk.side == "query" else case.documents
        return torch.nn.functional.normalize(rows[list(chunk.positions)] + activations.mean() * weight, dim=-1)

    objective = build_objective(ObjectiveSettings()).to(CUDA)
    chunks = case.chunks(chunk_items=1)
    output = cached_step(chunks, encode, case.loss(objective), parameters=[weight], seed=1, step=1, keep_graphs_mb="auto", device=CUDA)
    del filler
    assert 0 < output.own_kept_chunks < len(chunks)
    storages = 2 * output.own_kept_chunks + 1  # the inputs are every graph's, and count once
    assert output.own_kept_mb == pytest.approx(storages * values * 4 / 2**20, rel=0.01)
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_real_encoder_on_the_device(dtype):
    pytest.importorskip("peft")
    from stairstep.models.load import load_encoder
    from stairstep.models.settings import AdapterSettings, ModelSettings

    settings = ModelSettings(base="tiny-embedder", dtype=dtype, adapter=AdapterSettings(rank=4, dropout=0.2))
    case = make_case(rows=4, hard=1, dtype=torch.float32, device="cuda:0")
    draw = torch.Generator().manual_seed(5)
    tiles = [torch.randint(0, 256, (3, 64, 96), generator=draw, dtype=torch.uint8) for _ in case.documents]
    found = {}
    for kind in ("again", 0, "auto", "full"):
        encoder = load_encoder(settings, CUDA, trainable=True).train()
        trained = [one for members in encoder.groups().values() for _, one in members]
        with torch.no_grad():
            for number, one in enumerate(trained):
                generator = torch.Generator().manual_seed(number)
                one += 0.05 * torch.randn(one.shape, generator=generator).to(one.device)

        def encode(chunk, encoder=encoder):
            if chunk.side == "query":
                return encoder.encode_texts([f"question {place}" for place in chunk.positions], "query")
            return encoder.encode_tiles([tiles[place] for place in chunk.positions])

        objective = build_objective(ObjectiveSettings()).to(CUDA)
        if kind == "full":
            case.encode = lambda _, encode=encode: encode
            full_backward(case, case.chunks(chunk_items=4), encoder, objective)
        else:
            given = {"parameters": trained, "loss_parameters": list(objective.parameters()), "device": CUDA}
            keep = kind if kind == "auto" else 0
            chunks = case.chunks(chunk_items=4)
            cached_step(chunks, encode, case.loss(objective), seed=SEED, step=STEP, keep_graphs_mb=keep, **given)
        found[kind] = gradients(encoder, objective)
    assert all(torch.equal(one, found["again"][name]) for name, one in found[0].items())
    assert all(torch.equal(one, found["auto"][name]) for name, one in found[0].items())
    assert worst_error(found[0], found["full"]) <= (1e-5 if dtype == "float32" else 0.05)
