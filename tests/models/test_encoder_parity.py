"""The encoder against plain transformers code: same vectors, whatever the padding and whoever else is in the batch."""

import inspect

import pytest
import torch

from stairstep.tiles import patches

QUERY = "Retrieve images or text relevant to the user's query."
DOCUMENT = "Represent the user's input."
TEXTS = ["x", "a much longer query about nothing in particular", "ünïcode, too", "x" * 40]


@pytest.fixture(scope="module")
def reference(plain_model):
    return plain_model()


@pytest.fixture(scope="module")
def ids_of(base):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    return lambda text: tokenizer.encode(text).ids


def chat(instruction: str, content: str) -> str:
    return f"<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


@torch.no_grad()
def plain(model, rows, left, grids=None, pixel_values=None):
    """From the documentation: pad, let the model find its own positions, take the last real token, normalise."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        span = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[index, span], mask[index, span] = torch.tensor(row), 1
    extra = {}
    if grids is not None:
        extra = {"pixel_values": pixel_values, "image_grid_thw": grids}
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
            extra["mm_token_type_ids"] = ((ids == model.config.image_token_id) & (mask == 1)).int()
    model.rope_deltas = None
    hidden = model(input_ids=ids, attention_mask=mask, **extra).last_hidden_state
    last = [longest - 1 if left else len(row) - 1 for row in rows]
    return torch.nn.functional.normalize(hidden[torch.arange(len(rows)), torch.tensor(last)], dim=-1)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_texts_equal_plain_transformers(make, reference, ids_of, left):
    encoder = make()
    with torch.no_grad():
        for role, instruction in (("query", QUERY), ("document", DOCUMENT)):
            expected = plain(reference, [ids_of(chat(instruction, text)) for text in TEXTS], left)
            found = encoder.encode_texts(TEXTS, role)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
            assert (expected[0] - expected[1]).norm() > 0.1, "the fixture's vectors must differ from one another"


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_tiles_equal_plain_transformers(make, reference, ids_of, tiles, left):
    content = [f"<|vision_start|>{'<|image_pad|>' * (t.shape[1] // 32 * (t.shape[2] // 32))}<|vision_end|>" for t in tiles]
    values, grids = patches(tiles)
    expected = plain(reference, [ids_of(chat(DOCUMENT, one)) for one in content], left, grids, values)
    with torch.no_grad():
        found = make().encode_tiles(tiles)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (expected[0] - expected[3]).norm() > 0.01, "two tiles of one size must be told apart"


@pytest.mark.parametrize("options", [{}, {"attention": "eager"}, {"bidirectional": True}, {"bidirectional": True, "attention": "eager"}])
def test_a_vector_does_not_depend_on_its_batch(make, tiles, options):
    encoder = make(**options)
    with torch.no_grad():
        texts, images = encoder.encode_texts(TEXTS, "query"), encoder.encode_tiles(tiles)
        backwards = encoder.encode_texts(TEXTS[::-1], "query").flip(0)
        alone = torch.cat([encoder.encode_texts([text], "query") for text in TEXTS])
        single = torch.cat([encoder.encode_tiles([tile]) for tile in tiles])
    torch.testing.assert_close(alone, texts, atol=1e-5, rtol=0)
    torch.testing.assert_close(backwards, texts, atol=1e-5, rtol=0)
    torch.testing.assert_close(single, images, atol=1e-5, rtol=0)


def test_attention_implementations_agree(make, tiles):
    with torch.no_grad():
        sdpa, eager = (make(attention=name).encode_tiles(tiles) for name in ("sdpa", "eager"))
    torch.testing.assert_close(sdpa, eager, atol=1e-5, rtol=0)


def test_tiles_in_one_call_do_not_see_each_other(make, tiles):
    encoder = make()
    other = [tiles[0], torch.flip(tiles[1], [0, 1, 2]), tiles[2]]
    with torch.no_grad():
        first, second = encoder.encode_tiles(tiles[:3]), encoder.encode_tiles(other)
    assert torch.equal(first[[0, 2]], second[[0, 2]])
    assert not torch.equal(first[1], second[1])


def test_text_after_tiles_sees_no_stale_positions(make, tiles):
    encoder = make()
    with torch.no_grad():
        before = encoder.encode_texts(TEXTS, "query")
        encoder.encode_tiles(tiles)
        assert encoder.core.rope_deltas is None
        encoder.core.rope_deltas = torch.full((len(TEXTS), 1), -37)
        after, images = encoder.encode_texts(TEXTS, "query"), encoder.encode_tiles(tiles)
        encoder.core.rope_deltas = None
        assert torch.equal(images, encoder.encode_tiles(tiles))
    assert torch.equal(before, after)


def test_nothing_in_nothing_out(make):
    encoder = make()
    assert encoder.encode_texts([], "query").shape == encoder.encode_tiles([]).shape == (0, encoder.dimension)


def test_costs_are_the_tokens_of_the_input(make, tiles, ids_of):
    encoder = make()
    assert encoder.text_tokens("hello", "query") == len(ids_of(chat(QUERY, "hello")))
    assert encoder.tile_tokens(64, 96) == 6 + encoder.tile_tokens(32, 32) - 1 == len(encoder.inputs.tile_ids(64, 96))
