"""A chunk's random state: a function of seed, step and chunk; the caller's is given back, also after an error."""

import contextlib

import pytest
import torch

from stairstep.objectives import chunk_randomness, chunk_seed

CPU = torch.device("cpu")


def _draw(*key):
    with chunk_randomness(*key, CPU):
        return torch.rand(3).tolist()


def test_it_depends_on_each_part_and_on_nothing_else():
    torch.manual_seed(1)
    first = _draw(1, 2, 3)
    torch.manual_seed(2)
    assert _draw(1, 2, 3) == first
    others = [_draw(1, 2, 4), _draw(1, 3, 3), _draw(2, 2, 3), _draw(12, 3, 3), _draw(1, 23, 3)]
    assert len({tuple(one) for one in [first, *others]}) == 6
    assert 0 <= chunk_seed(1, 2, 3) < 2**63


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_the_callers_state_comes_back(error):
    torch.manual_seed(5)
    true = torch.rand(2).tolist()
    torch.manual_seed(5)
    with contextlib.suppress(RuntimeError), chunk_randomness(1, 1, 1, CPU):
        torch.rand(9)
        if error:
            raise error
    assert torch.rand(2).tolist() == true
