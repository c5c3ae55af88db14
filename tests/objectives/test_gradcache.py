"""GradCache against one full-batch backward over the same chunk forwards.

Invariants: value and gradient of every parameter (temperature and bias included) equal autograd's to 1e-9 in norm, for every option and
chunk size; dropout is active and replayed; keeping graphs changes no bit and saves forwards; activations do not grow with the batch;
the caller's random state and earlier gradients survive.
"""

import gc
import math

import pytest
import torch
from objectives_toy import SEED, STEP, ToyEncoder, full_backward, gradients, make_case, worst_error
from torch.multiprocessing.reductions import StorageWeakRef

from stairstep.objectives import (
    InfoNCESettings,
    ObjectiveSettings,
    SigLIPSettings,
    build_objective,
    cached_loss,
    cached_step,
    cut_batch,
)
from stairstep.objectives.settings import GradCacheSettings

LOSSES = {
    "plain": InfoNCESettings(),
    "smoothed": InfoNCESettings(label_smoothing=0.1),
    "hardness": InfoNCESettings(hardness=5.0),
    "smoothed and hardness": InfoNCESettings(label_smoothing=0.2, hardness=2.0),
    "siglip": SigLIPSettings(initial_bias=-3.0),
}


def _cached(case, chunks, encoder, objective, **options):
    return cached_step(
        chunks,
        case.encode(encoder),
        case.loss(objective),
        parameters=encoder.trained(),
        loss_parameters=list(objective.parameters()),
        seed=SEED,
        step=STEP,
        device=case.device,
        **options,
    )


def _pair(case, chunks, loss=None, encoder=None, **options):
    """(cached output, cached gradients, full output, full gradients), from the same weights."""
    results = []
    for cached in (True, False):
        model = ToyEncoder() if encoder is None else encoder()
        objective = build_objective(ObjectiveSettings(loss=loss or InfoNCESettings())).double()
        if cached:
            output = _cached(case, chunks, model, objective, **options)
        else:
            output = full_backward(case, chunks, model, objective)
        results += [output, gradients(model, objective)]
    return results


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize("hard", [0, 2])
def test_value_and_gradients_are_those_of_the_full_batch(loss, duplicates, hard):
    case = make_case(rows=6, hard=hard, duplicates=duplicates)
    assert case.candidates.masked_pairs > 0
    for size in (1, 2, 4, 5, len(case.documents)):  # 4 and 5 leave uneven last chunks
        cached, found, full, true = _pair(case, case.chunks(chunk_items=size), loss)
        assert cached.loss == pytest.approx(full.loss.item(), rel=1e-12)
        assert torch.allclose(cached.per_query, full.per_query, rtol=1e-12)
        assert {"0.lora_a", "0.lora_b", "0.vit", "0.head", "1.temperature.log_scale"} <= true.keys()
        assert ("1.bias" in true) == isinstance(loss, SigLIPSettings)
        assert worst_error(found, true) <= 1e-9


@pytest.mark.parametrize("size", range(1, 9))
def test_every_chunk_size_up_to_the_batch(size):
    case = make_case(rows=8, hard=0, duplicates=False)
    _, found, _, true = _pair(case, case.chunks(chunk_items=size))
    assert worst_error(found, true) <= 1e-9


def test_chunks_by_tokens():
    case = make_case(rows=8, hard=2)
    chunks = case.chunks(chunk_tokens=17)
    assert len({len(chunk.positions) for chunk in chunks}) > 1
    _, found, _, true = _pair(case, chunks, LOSSES["smoothed and hardness"], keep_graphs_mb=1)
    assert worst_error(found, true) <= 1e-9


def test_masks_change_the_gradient():
    losses = {}
    for same_article in (False, True):
        case = make_case(rows=6, hard=2, same_article=same_article)
        cached, found, _, true = _pair(case, case.chunks(chunk_items=4))
        assert worst_error(found, true) <= 1e-9
        losses[same_article] = cached.loss
    assert losses[True] != losses[False]


def test_dropout_is_active_differs_between_chunks_and_is_replayed():
    case = make_case(rows=6, hard=1, duplicates=False)
    case.documents[:] = case.documents[0]
    chunks = case.chunks(chunk_items=1)
    seen = {}

    def encode(chunk):
        embeddings = case.encode(encoder)(chunk)
        seen.setdefault(chunk.index, []).append(embeddings.detach())
        return embeddings

    encoder, objective = ToyEncoder(), build_objective(ObjectiveSettings()).double()
    options = {"parameters": encoder.trained(), "loss_parameters": list(objective.parameters())}
    cached_step(chunks, encode, case.loss(objective), seed=SEED, step=STEP, **options)
    documents = [seen[chunk.index] for chunk in chunks if chunk.side == "document"]
    assert all(torch.equal(first, second) for first, second in documents)
    assert len({tuple(first.flatten().tolist()) for first, _ in documents}) == len(documents)
    before = seen[0][0]
    seen.clear()
    cached_step(chunks, encode, case.loss(objective), seed=SEED, step=STEP + 1, **options)
    assert not torch.equal(before, seen[0][0])


def test_keeping_graphs_changes_no_bit_and_saves_forwards():
    case = make_case(rows=16, hard=2)
    chunks = case.chunks(chunk_items=4)
    bits, kept = {}, {}
    for keep in (0, "some", 1000, "auto"):
        encoder, objective = ToyEncoder(), build_objective(ObjectiveSettings()).double()
        one_graph = 2000 / 2**20  # the toy's graphs weigh a few kilobytes each
        budget = one_graph * len(chunks) if keep == "some" else keep
        output = _cached(case, chunks, encoder, objective, keep_graphs_mb=budget)
        bits[keep] = (output.loss, gradients(encoder, objective))
        kept[keep] = output.own_kept_chunks
        assert encoder.forwards == 2 * len(chunks) - output.own_kept_chunks
        assert (output.own_kept_mb > 0) == (output.own_kept_chunks > 0)
    assert kept[0] == 0 < kept["some"] < kept[1000] == kept["auto"] == len(chunks)
    for keep, (loss, found) in bits.items():
        assert loss == bits[0][0], keep
        assert found.keys() == bits[0][1].keys()
        assert all(torch.equal(one, bits[0][1][name]) for name, one in found.items()), keep


@pytest.mark.parametrize("keep", [1000, 1e-5], ids=["kept", "found too heavy"])
def test_graphs_are_let_go_without_the_collector(keep):
    case = make_case(rows=8)
    encoder, objective, storages = ToyEncoder(), build_objective(ObjectiveSettings()).double(), []

    def encode(chunk):
        embeddings = case.encode(encoder)(chunk)
        result = embeddings.exp()  # saves its own result
        storages.append(StorageWeakRef(result.untyped_storage()))
        return result * 0.1

    chunks = case.chunks(chunk_items=4)
    gc.collect()
    gc.disable()  # it would find a cycle some time later, and the memory be held until then
    try:
        output = cached_step(chunks, encode, case.loss(objective), parameters=encoder.trained(), seed=1, step=1, keep_graphs_mb=keep)
        assert output.own_kept_chunks == (len(chunks) if keep == 1000 else 0)
        assert len(storages) >= len(chunks) > 2
        assert all(storage.expired() for storage in storages)
    finally:
        gc.enable()


def test_frozen_chunks_are_encoded_once_and_without_gradient():
    case = make_case(rows=6, hard=2)
    chunks = case.chunks(chunk_items=4, frozen=("document",))
    for keep in (0, 1000):
        encoder, objective = ToyEncoder(), build_objective(ObjectiveSettings()).double()
        output = _cached(case, chunks, encoder, objective, keep_graphs_mb=keep)
        queries = sum(chunk.side == "query" for chunk in chunks)
        assert encoder.forwards == len(chunks) + (queries if keep == 0 else 0)
        assert output.own_kept_chunks == (0 if keep == 0 else queries)
        assert encoder.vit.grad is None
        _, found, _, true = _pair(case, chunks, keep_graphs_mb=keep)
        assert worst_error(found, true) <= 1e-9


def test_a_step_that_leaves_parameters_unused_gives_them_no_gradient():
    case = make_case(rows=6, hard=0, tiles=False)
    encoder, objective = ToyEncoder(), build_objective(ObjectiveSettings()).double()
    _cached(case, case.chunks(chunk_items=4), encoder, objective)
    assert encoder.vit.grad is None
    assert encoder.lora_b.grad.norm() > 0


def test_gradients_add_to_those_of_earlier_steps():
    case = make_case()
    chunks = case.chunks(chunk_items=4)
    encoder, objective = ToyEncoder(), build_objective(ObjectiveSettings()).double()
    _cached(case, chunks, encoder, objective)
    once = gradients(encoder, objective)
    _cached(case, chunks, encoder, objective)
    twice = gradients(encoder, objective)
    assert all(torch.equal(twice[name], 2 * one) for name, one in once.items())


def test_the_callers_random_state_is_left_alone():
    case = make_case()
    torch.manual_seed(123)
    undisturbed = torch.rand(4)
    torch.manual_seed(123)
    _pair(case, case.chunks(chunk_items=4))
    assert torch.equal(torch.rand(4), undisturbed)


def test_a_fixed_temperature_gets_no_gradient():
    from stairstep.objectives import TemperatureSettings

    case, encoder = make_case(), ToyEncoder()
    objective = build_objective(ObjectiveSettings(temperature=TemperatureSettings(learnable=False))).double()
    _cached(case, case.chunks(chunk_items=4), encoder, objective)
    assert objective.temperature.log_scale.grad is None
    assert encoder.head.grad.norm() > 0


def test_the_loss_alone_is_the_steps_loss():
    case = make_case()
    chunks = case.chunks(chunk_items=4)
    encoder, objective = ToyEncoder(), build_objective(ObjectiveSettings()).double()
    step = _cached(case, chunks, encoder, objective)
    forwards = encoder.forwards
    alone = cached_loss(chunks, case.encode(encoder), case.loss(objective), seed=SEED, step=STEP)
    assert alone.loss == step.loss
    assert alone.metrics == step.metrics
    assert encoder.forwards - forwards == len(chunks)
    assert all(isinstance(value, float) for value in alone.metrics.values())


def test_a_loss_that_is_not_finite_names_its_rows_and_leaves_no_gradient():
    case = make_case()
    case.documents[3] = torch.inf
    encoder, objective = ToyEncoder(), build_objective(ObjectiveSettings()).double()
    output = _cached(case, case.chunks(chunk_items=4), encoder, objective)
    assert not math.isfinite(output.loss)
    assert output.not_finite == {"query": [], "document": [3]}
    assert gradients(encoder, objective) == {}


def test_defects_of_the_caller_are_named():
    case = make_case()
    encoder, objective = ToyEncoder(), build_objective(ObjectiveSettings()).double()
    chunks = case.chunks(chunk_items=4)
    loss, given = case.loss(objective), {"parameters": encoder.trained(), "seed": 1, "step": 1}
    with pytest.raises(ValueError, match=r"chunk 0 \(query\) has 4 items, but its embeddings are \(3, 8\)"):
        cached_step(chunks, lambda chunk: case.encode(encoder)(chunk)[:3], loss, **given)
    with pytest.raises(ValueError, match="without a graph: mark it frozen"):
        cached_step(chunks, lambda chunk: case.encode(encoder)(chunk).detach(), loss, **given)
    with pytest.raises(ValueError, match="query positions must be 0 to"):
        cached_step(chunks[:1] * 2 + chunks[2:], case.encode(encoder), loss, **given)
    with pytest.raises(ValueError, match="batch without chunks"):
        cached_step([], case.encode(encoder), loss, **given)


class _LiveBytes:
    """Counts the bytes that are saved for backward and still held; each storage once, parameters not."""

    def __init__(self):
        self.live = self.peak = 0
        self.holders = {}

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)

    def pack(self, tensor):
        key, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        if isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter):
            size = 0
        self.holders[key] = self.holders.get(key, 0) + 1
        if self.holders[key] == 1:
            self.live += size
            self.peak = max(self.peak, self.live)
        return _Held(self, key, size, tensor.detach())

    def release(self, key, size):
        self.holders[key] -= 1
        if self.holders[key] == 0:
            self.live -= size


class _Held:
    def __init__(self, counter, key, size, tensor):
        self.counter, self.key, self.size, self.tensor = counter, key, size, tensor

    def __del__(self):
        self.counter.release(self.key, self.size)


def test_activations_do_not_grow_with_the_batch():
    peaks = {}
    for rows in (8, 64):
        for cached in (True, False):
            case = make_case(rows=rows, hard=2, duplicates=False)
            chunks = cut_batch([5] * rows, [5] * len(case.documents), GradCacheSettings(chunk_tokens=None, chunk_items=4))
            encoder, objective, live = ToyEncoder(), build_objective(ObjectiveSettings()).double(), _LiveBytes()
            encode = case.encode(encoder)

            def counted(chunk, encode=encode, live=live):
                with live.hooks():  # around the encoder only: embeddings and logits are apart
                    return encode(chunk)

            case.encode = lambda _, counted=counted: counted
            (_cached if cached else full_backward)(case, chunks, encoder, objective)
            peaks[rows, cached] = live.peak
            assert live.live == 0
    assert 0 < peaks[8, True] == peaks[64, True]
    assert peaks[64, False] > 4 * peaks[8, False] > 4 * peaks[8, True]


class _Checkpointed(ToyEncoder):
    def forward(self, inputs, tiles):
        return torch.utils.checkpoint.checkpoint(super().forward, inputs, tiles, use_reentrant=False)


def test_gradient_checkpointing_within_a_chunk():
    case = make_case(rows=8)
    chunks = case.chunks(chunk_items=4)
    sizes = {}
    for keep in (0, 1000):
        for kind in (ToyEncoder, _Checkpointed):
            cached, found, _, true = _pair(case, chunks, encoder=kind, keep_graphs_mb=keep)
            assert worst_error(found, true) <= 1e-9
            sizes[keep, kind] = cached.own_kept_mb
    assert 0 < sizes[1000, _Checkpointed] < sizes[1000, ToyEncoder]


def test_autocast_around_the_step_loses_no_gradient():
    case = make_case(rows=8, dtype=torch.float32)
    chunks = case.chunks(chunk_items=4)
    bits = []
    for keep in (0, 1000):
        encoder, objective = ToyEncoder(dtype=torch.float32), build_objective(ObjectiveSettings())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _cached(case, chunks, encoder, objective, keep_graphs_mb=keep)
        bits.append(gradients(encoder, objective))
    assert all(torch.equal(one, bits[1][name]) for name, one in bits[0].items())
    exact, objective = ToyEncoder(dtype=torch.float32), build_objective(ObjectiveSettings())
    full_backward(case, chunks, exact, objective)
    true = gradients(exact, objective)
    assert 1e-6 < worst_error(bits[0], true) < 0.1  # bfloat16 acted, and took nothing away
