"""Bidirectional attention, number types, gradient checkpointing and dropout: each does what its setting says, everywhere."""

import pytest
import torch

TEXTS = ["first", "a second, longer text", "third"]


def hidden_states(encoder, **kwargs):
    """The last hidden states of one call, caught on their way out of the LLM."""
    caught = []
    hook = encoder.core.language_model.norm.register_forward_hook(lambda _, __, output: caught.append(output))
    with torch.no_grad():
        if "texts" in kwargs:
            encoder.encode_texts(kwargs["texts"], "document")
        else:
            encoder.encode_tiles(kwargs["tiles"])
    hook.remove()
    return caught[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_bidirectional_lets_early_tokens_see_late_ones(make, tiles, attention, training):
    texts = (["same beginning, end A"], ["same beginning, end B"])
    ragged = ([*texts[0], "short"], [*texts[1], "short"])
    changed = torch.cat([tiles[0][:, :32], 255 - tiles[0][:, 32:]], dim=1)
    pairs = [("texts", *texts), ("texts", *ragged), ("tiles", [tiles[0]], [changed]), ("tiles", tiles[:2], [changed, tiles[1]])]
    for bidirectional in (False, True):
        encoder = make(attention=attention, bidirectional=bidirectional).train(training)
        for kind, one, other in pairs:
            first, second = hidden_states(encoder, **{kind: one}), hidden_states(encoder, **{kind: other})
            early = 5  # inside the system message, before anything that differs
            assert not torch.allclose(first[0, -12:], second[0, -12:], atol=1e-3), "the fixture's inputs must differ late"
            seen = not torch.allclose(first[0, :early], second[0, :early], atol=1e-6)
            assert seen == bidirectional, (kind, bidirectional)


def test_bidirectional_changes_the_vectors(make, tiles):
    with torch.no_grad():
        causal, both = make(), make(bidirectional=True)
        assert (causal.encode_texts(TEXTS, "query") - both.encode_texts(TEXTS, "query")).norm(dim=-1).min() > 1e-2
        assert (causal.encode_tiles(tiles) - both.encode_tiles(tiles)).norm(dim=-1).min() > 1e-2


def test_bidirectional_ignores_padding_in_gradients_too(make):
    encoder = make(trainable=True, bidirectional=True)
    weight = torch.randn(encoder.dimension, generator=torch.Generator().manual_seed(0))

    def gradient(batches):
        encoder.zero_grad()
        for batch in batches:
            (encoder.encode_texts(batch, "query") @ weight).sum().backward()
        return torch.cat([p.grad.flatten() for members in encoder.groups().values() for _, p in members])

    together, apart = gradient([TEXTS]), gradient([[text] for text in TEXTS])
    assert together.norm() > 0
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_number_types_stay_near_float32(make, trained, tiles, dtype):
    exact, other = make(trainable=True), make(trainable=True, dtype=dtype)
    trained(exact), trained(other)
    expected = torch.float64 if dtype == "float64" else torch.float32
    least = 0.9999999 if dtype == "float64" else 0.98
    with torch.no_grad():
        for one, two in (
            (exact.encode_texts(TEXTS, "query"), other.encode_texts(TEXTS, "query")),
            (exact.encode_tiles(tiles), other.encode_tiles(tiles)),
        ):
            assert two.dtype == expected
            assert torch.cosine_similarity(one.double(), two.double()).min() > least
            torch.testing.assert_close(two.norm(dim=-1), torch.ones(len(two), dtype=expected), atol=1e-6, rtol=0)


def test_bfloat16_keeps_what_is_trained_and_the_rotary_tables_in_float32(make):
    encoder = make(trainable=True, dtype="bfloat16", vit_unfrozen=True, dora=True)
    types = {parameter.dtype for members in encoder.groups().values() for _, parameter in members}
    assert types == {torch.float32}
    assert encoder.core.language_model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    tables = [buffer for name, buffer in encoder.named_buffers() if name.endswith("inv_freq")]
    assert tables and all(table.dtype == torch.float32 for table in tables)
    (encoder.encode_texts(TEXTS, "query").sum()).backward()


@pytest.mark.parametrize("options", [{}, {"vit_unfrozen": True}, {"dora": True}])
def test_gradient_checkpointing_gives_the_same_gradients(make, trained, tiles, options):
    results = []
    for checkpointing in (False, True):
        encoder = make(trainable=True, gradient_checkpointing=checkpointing, dropout=0.3, **options)
        trained(encoder)
        encoder.train()
        calls = []
        layer = encoder.core.language_model.layers[1]
        hook = layer.self_attn.register_forward_hook(lambda *_, seen=calls: seen.append(1))
        torch.manual_seed(5)
        vectors = torch.cat([encoder.encode_texts(TEXTS, "query"), encoder.encode_tiles(tiles)])
        (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum().backward()
        hook.remove()
        results.append((len(calls), {name: p.grad for members in encoder.groups().values() for name, p in members}))
    (plain_calls, plain), (calls, checkpointed) = results
    assert (plain_calls, calls) == (2, 4), "checkpointing must really recompute"
    assert all(gradient is not None for gradient in plain.values()) and any(gradient.norm() > 0 for gradient in plain.values())
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], atol=1e-6, rtol=1e-5)


def test_dropout_acts_while_training_and_replays_from_the_random_state(make, trained, tiles):
    encoder = make(trainable=True, dropout=0.5)
    trained(encoder)

    def draw(seed):
        torch.manual_seed(seed)
        return encoder.encode_tiles(tiles).detach()

    encoder.eval()
    assert torch.equal(draw(1), draw(2))
    encoder.train()
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not encoder.eval().training


def test_all_targets_get_gradients_from_tiles(make, trained, tiles):
    from stairstep.models.settings import TargetSettings

    encoder = make(trainable=True, targets=TargetSettings(True, True, True, True, True))
    trained(encoder)
    encoder.encode_tiles(tiles).sum(0).square().sum().backward()
    groups = encoder.groups()
    assert all(groups.values())
    assert all(parameter.grad.abs().max() > 0 for members in groups.values() for _, parameter in members)
