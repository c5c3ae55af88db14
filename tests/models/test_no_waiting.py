"""Nothing between tiles and their vectors, or between a vector's gradient and the weights', asks the device for a value.

On torch's fake tensors there is no value to be had: a question such as `tolist`, `nonzero` or `if tensor.all()` is an error.
"""

import pytest
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from stairstep.models.settings import TargetSettings
from stairstep.tiles import patches

TEXTS = ["one", "and a longer one"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_vectors_and_gradients_are_made_without_a_question(make, tiles, checkpointing):
    targets = TargetSettings(vit_attention=True, vit_mlp=True, merger=True)
    encoder = make(trainable=True, dropout=0.1, targets=targets, gradient_checkpointing=checkpointing).train()
    ways = (lambda: encoder.encode_tiles(tiles), lambda: encoder.encode_tiles(tiles[:1]), lambda: encoder.encode_texts(TEXTS, "query"))
    for encode in ways:
        encode()  # tables are made at first use
    with FakeTensorMode(allow_non_fake_inputs=True):
        for encode in ways:
            vectors = encode()
            assert vectors.shape[1] == encoder.dimension
            vectors.sum().backward()


def test_transformers_own_forward_asks(make, tiles):
    """What the test above stands on: a question is seen."""
    core = make().core
    values, grid = patches(tiles)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        values, grid = mode.from_tensor(values), mode.from_tensor(grid)
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            core.visual(values, grid_thw=grid)
