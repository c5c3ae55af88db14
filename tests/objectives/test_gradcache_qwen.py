"""GradCache around the real encoder (a tiny Qwen3-VL, LoRA in both towers, dropout on): tiles and texts, chunks of mixed sizes."""

import pytest
import torch
from objectives_toy import SEED, STEP, full_backward, gradients, make_case, run_ranks, worst_error

from stairstep.models.load import load_encoder
from stairstep.models.settings import AdapterSettings, ModelSettings, TargetSettings
from stairstep.objectives import Alone, InfoNCESettings, ObjectiveSettings, build_objective, cached_step

ROWS = 4


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _encoder(**options):
    targets = TargetSettings(vit_attention=True, vit_mlp=True)
    adapter = AdapterSettings(rank=4, alpha=8.0, dropout=0.2, targets=targets)
    settings = ModelSettings(**{"base": "tiny-embedder", "dtype": "float32", "adapter": adapter, **options})
    encoder = load_encoder(settings, trainable=True).train()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in _trained(encoder):  # LoRA's B starts at nothing, and A would have no gradient
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    return encoder


def _trained(encoder):
    return [one for members in encoder.groups().values() for _, one in members]


def _case(tiles=True):
    case = make_case(rows=ROWS, hard=1, dtype=torch.float32)
    draw = torch.Generator().manual_seed(5)
    sizes = [(64, 96), (64, 96), (32, 64), (96, 64)]
    pixels = [torch.randint(0, 256, (3, *sizes[row % 4]), generator=draw, dtype=torch.uint8) for row in range(len(case.documents))]
    texts = [f"what does the page say about subject {'very ' * row}{row}" for row in range(len(case.documents))]

    def encode(encoder):
        def run(chunk):
            if chunk.side == "query" or not tiles:
                return encoder.encode_texts([texts[place] for place in chunk.positions], chunk.side)
            return encoder.encode_tiles([pixels[place] for place in chunk.positions])

        return run

    case.encode = encode
    case.document_costs = [pixels[row].shape[1] * pixels[row].shape[2] // 1024 for row in range(len(pixels))]
    return case


def _step(case, chunks, encoder, keep=0, collective=None):
    objective = build_objective(ObjectiveSettings(InfoNCESettings(label_smoothing=0.1, hardness=1.0)))
    if collective is None:
        output = full_backward(case, chunks, encoder, objective)
        return output.loss.item(), gradients(encoder, objective), 0
    output = cached_step(
        chunks,
        case.encode(encoder),
        case.loss(objective),
        parameters=_trained(encoder),
        loss_parameters=list(objective.parameters()),
        collective=collective,
        seed=SEED,
        step=STEP,
        keep_graphs_mb=keep,
    )
    return output.loss, gradients(encoder, objective), output.own_kept_chunks


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradients_are_those_of_the_full_batch(checkpointing):
    case = _case()
    for size in (3, 100):
        chunks = case.chunks(chunk_items=size)
        loss, true, _ = _step(case, chunks, _encoder(gradient_checkpointing=checkpointing))
        assert len(true) > 50
        found = {}
        for keep in (0, 4, 1000):
            cached, found[keep], kept = _step(case, chunks, _encoder(gradient_checkpointing=checkpointing), keep, Alone())
            assert cached == pytest.approx(loss, rel=1e-6)
            assert worst_error(found[keep], true) <= 1e-5
            assert keep == 4 or kept == (len(chunks) if keep else 0)
        for keep in (4, 1000):
            assert all(torch.equal(one, found[keep][name]) for name, one in found[0].items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ranks_and_kept_graphs_in_both_number_types(dtype):
    case = _case()
    chunks = case.chunks(chunk_items=3)
    loss, true, _ = _step(case, chunks, _encoder(dtype=dtype), 0, Alone())
    _, kept, _ = _step(case, chunks, _encoder(dtype=dtype), 1000, Alone())
    assert all(torch.equal(one, kept[name]) for name, one in true.items())
    for other, found, _ in run_ranks(2, lambda rank: _step(case, chunks, _encoder(dtype=dtype), 0, rank)):
        assert other == pytest.approx(loss, rel=1e-6)
        assert worst_error(found, true) <= 1e-5


def test_a_text_step_leaves_the_vision_tower_without_gradients():
    case, encoder = _case(tiles=False), _encoder()
    _, found, _ = _step(case, case.chunks(chunk_items=3), encoder, 0, Alone())
    groups = encoder.groups()
    assert groups["vit"]
    assert all(parameter.grad is None for _, parameter in groups["vit"])
    assert all(parameter.grad.norm() > 0 for _, parameter in groups["llm"])
    assert len(found) == len(groups["llm"]) + 1


def test_a_frozen_document_side_with_the_adapter_off():
    case, encoder = _case(), _encoder()
    plain = case.encode

    def encode(encoder):
        def run(chunk):
            if chunk.side == "query":
                return plain(encoder)(chunk)
            with encoder.adapter_disabled():
                return plain(encoder)(chunk)

        return run

    case.encode = encode
    _, found, _ = _step(case, case.chunks(chunk_items=3, frozen=("document",)), encoder, 1000, Alone())
    assert all(parameter.grad is None for _, parameter in encoder.groups()["vit"])
    assert found["1.temperature.log_scale"].norm() > 0
    assert len(found) == len(encoder.groups()["llm"]) + 1
