"""The batched vision tower against transformers' own forward: same features, same gradients, with adapters too."""

import pytest
import torch

from stairstep.models.tower import tower_features
from stairstep.tiles import patches


@pytest.fixture
def same_size() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 96, 64), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)


def reference(visual, pixels):
    values, grid = patches(list(pixels))
    output = visual(values, grid_thw=grid)
    if isinstance(output, tuple):  # transformers before 5
        return output
    return output.pooler_output, output.deepstack_features


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_features_are_those_of_transformers(make, same_size):
    visual = make().core.visual
    with torch.no_grad():
        merged, deepstack = reference(visual, same_size)
        found = tower_features(visual, same_size, torch.device("cpu"))
    assert found.merged.shape == (3, 6, 64)
    assert len(found.deepstack) == len(deepstack) == 2
    assert relative(found.merged.flatten(0, 1), merged) < 1e-5
    for one, other in zip(found.deepstack, deepstack, strict=True):
        assert relative(one.flatten(0, 1), other) < 1e-5
    assert not torch.allclose(found.merged[0], found.merged[1]), "tiles must differ, or their order would not be seen"


def test_a_selection_is_in_the_order_asked(make, same_size):
    with torch.no_grad():
        found = tower_features(make().core.visual, same_size, torch.device("cpu"))
    chosen = found.select(torch.tensor([2, 0, 2]))
    assert torch.equal(chosen.merged, found.merged[[2, 0, 2]])
    assert all(torch.equal(one, other[[2, 0, 2]]) for one, other in zip(chosen.deepstack, found.deepstack, strict=True))


def test_gradients_are_those_of_transformers_and_reach_adapters(make, trained, same_size):
    encoder = make(trainable=True, targets=_visual_targets())
    trained(encoder)
    visual = encoder.core.visual
    parameters = [one for one in visual.parameters() if one.requires_grad]
    assert parameters
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(18, 64, generator=draw)
    merged, deepstack = reference(visual, same_size)
    expected = torch.autograd.grad((merged * weight).sum() + sum((one * weight).sum() for one in deepstack), parameters)
    found = tower_features(visual, same_size, torch.device("cpu"))
    total = (found.merged.flatten(0, 1) * weight).sum() + sum((one.flatten(0, 1) * weight).sum() for one in found.deepstack)
    for one, other in zip(torch.autograd.grad(total, parameters), expected, strict=True):
        assert relative(one, other) < 1e-4


def _visual_targets():
    from stairstep.models.settings import TargetSettings

    return TargetSettings(llm_attention=False, vit_attention=True, vit_mlp=True, merger=True)
