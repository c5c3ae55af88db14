"""What a kept graph weighs, and which chunks may keep theirs."""

import pytest
import torch

from stairstep.objectives import Chunk
from stairstep.objectives.graphs import GraphBudget, machine_memory

CPU = torch.device("cpu")
MIB = 2**20


def _run(budget, chunk, mib, held=None):
    """A chunk whose graph holds `mib` MiB (sin saves its input); `held` keeps the graph alive, as a step does."""
    with budget.measuring():
        graph = (torch.zeros(mib, MIB // 4, requires_grad=True) * 1.0).sin()
    if held is not None:
        held.append(graph)
    return budget.accepts(chunk)


def _chunk(cost, side="document", frozen=False):
    return Chunk(0, side, (0,), cost, frozen)


def test_storages_count_once_and_parameters_not():
    budget = GraphBudget(100, CPU)
    weight = torch.nn.Parameter(torch.randn(256, 256))
    with budget.measuring():
        inputs = torch.randn(4, 256)
        hidden = torch.nn.functional.linear(inputs, weight)  # saves inputs; transposed weight is the parameter's own storage
        (hidden * hidden).sum() + hidden[1:].pow(2).sum()  # hidden three times, once as a view
    assert budget.accepts(_chunk(1))
    assert budget.kept_bytes == inputs.nbytes + hidden.nbytes


def test_what_an_earlier_kept_graph_holds_is_not_counted_again():
    budget, shared, held = GraphBudget(100, CPU), torch.randn(MIB), []
    for _ in range(2):
        with budget.measuring():
            held.append(shared * torch.ones(1, requires_grad=True))
        assert budget.accepts(_chunk(1))
    assert budget.kept_bytes == shared.nbytes


def test_chunks_are_kept_as_long_as_they_fit():
    budget = GraphBudget(10, CPU)
    kept, held = [], []
    for mib in (4, 4, 4):
        chunk = _chunk(cost=100 * mib)
        kept.append(budget.attempts(chunk) and _run(budget, chunk, mib, held))
    assert kept == [True, True, False]
    assert not budget.attempts(_chunk(cost=400))  # known by now to be too heavy, so not even tried
    assert budget.attempts(_chunk(cost=100))
    assert _run(budget, _chunk(cost=100), 1, held)
    assert (budget.kept_chunks, budget.kept_bytes) == (3, 9 * MIB)


def test_sides_are_guessed_apart():
    budget = GraphBudget(3, CPU)
    assert not _run(budget, _chunk(cost=10), 4)
    assert not budget.attempts(_chunk(cost=10))
    assert budget.attempts(_chunk(cost=10, side="query"))


def test_a_limit_of_nothing_and_frozen_chunks_are_not_attempted():
    assert not GraphBudget(0, CPU).attempts(_chunk(1))
    assert GraphBudget(1, CPU).attempts(_chunk(1))
    assert not GraphBudget(1, CPU).attempts(_chunk(1, frozen=True))


def test_auto_on_the_cpu_is_a_share_of_the_machine():
    share = machine_memory() // 8 // 2
    assert share > MIB
    budget = GraphBudget("auto", CPU, workers=2)
    budget._rate["document"] = 1.0
    assert budget.attempts(_chunk(cost=share))
    assert not budget.attempts(_chunk(cost=share + 1))


@pytest.mark.parametrize("inner", [False, True])
def test_measuring_changes_no_gradient(inner):
    grads = []
    for measured in (False, True):
        inputs = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
        with GraphBudget(9, CPU).measuring() if measured else torch.enable_grad():
            output = inputs.exp().tanh() @ inputs.T
        (output.sin() if inner else output).sum().backward()
        grads.append(inputs.grad)
    assert torch.equal(*grads)
