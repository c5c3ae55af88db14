"""InfoNCE and SigLIP against naive loops in plain Python, their gradients against differences, their precision, metrics and parameters."""

import math

import pytest
import torch
from objectives_toy import make_case

from stairstep.objectives import (
    InfoNCESettings,
    MaskSettings,
    ObjectiveSettings,
    SigLIPSettings,
    TemperatureSettings,
    build_objective,
    candidates,
)

OPTIONS = [(0.0, 0.0), (0.1, 0.0), (0.0, 3.0), (0.3, 5.0)]


def _embeddings(case, dtype=torch.float64):
    draw = torch.Generator().manual_seed(2)
    shapes = (len(case.queries), len(case.documents))
    made = [torch.nn.functional.normalize(torch.randn(rows, 7, generator=draw, dtype=torch.float64), dim=-1) for rows in shapes]
    return [one.to(dtype).requires_grad_() for one in made]


def _naive(queries, documents, found, scale, smoothing, hardness, constant=None):
    """Mean InfoNCE; `constant` holds the cosines that hardness reads, where the gradient is wanted."""
    total = 0.0
    for row, positive in enumerate(found.positive.tolist()):
        logits = {}
        for column in range(len(documents)):
            if found.allowed[row, column]:
                cosine = sum(a * b for a, b in zip(queries[row], documents[column], strict=True))
                logits[column] = scale * cosine
                if column != positive:
                    logits[column] += hardness * (cosine if constant is None else constant[row][column])
        normaliser = math.log(sum(math.exp(one) for one in logits.values()))
        losses = {column: normaliser - one for column, one in logits.items()}
        total += (1 - smoothing) * losses[positive] + smoothing * sum(losses.values()) / len(losses)
    return total / len(queries)


@pytest.mark.parametrize(("smoothing", "hardness"), OPTIONS)
def test_infonce_is_the_naive_sum_and_its_gradient_that_of_differences(smoothing, hardness):
    case = make_case(rows=5)
    assert case.candidates.masked_pairs > 0
    queries, documents = _embeddings(case)
    settings = ObjectiveSettings(InfoNCESettings(label_smoothing=smoothing, hardness=hardness), TemperatureSettings(initial=0.1))
    objective = build_objective(settings).double()
    output = objective(queries, documents, case.candidates)
    scale = objective.temperature.scale.item()
    plain = [queries.tolist(), documents.tolist()]
    assert scale == pytest.approx(10, rel=1e-6)
    assert output.loss.item() == pytest.approx(_naive(*plain, case.candidates, scale, smoothing, hardness), rel=1e-12)
    assert output.loss.item() == pytest.approx(output.per_query.mean().item(), rel=1e-12)

    output.loss.backward()
    constant = (queries @ documents.T).tolist()  # hardness is a weight, not a way down

    def value(side, row, place, change):
        moved = [[list(one) for one in rows] for rows in plain]
        moved[side][row][place] += change
        return _naive(*moved, case.candidates, scale, smoothing, hardness, constant)

    for side, row, place in [(0, 0, 0), (0, 3, 5), (1, 0, 2), (1, 4, 6)]:
        slope = (value(side, row, place, 1e-6) - value(side, row, place, -1e-6)) / 2e-6
        assert (queries, documents)[side].grad[row, place].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)
    slope = (_naive(*plain, case.candidates, scale * math.exp(1e-6), smoothing, hardness) - output.loss.item()) / 1e-6
    assert objective.temperature.log_scale.grad.item() == pytest.approx(slope, rel=1e-4)


def test_infonce_without_masks_is_torchs_cross_entropy():
    case = make_case(rows=6, duplicates=False, same_article=False)
    assert case.candidates.masked_pairs == 0
    queries, documents = _embeddings(case)
    objective = build_objective(ObjectiveSettings(InfoNCESettings(label_smoothing=0.2))).double()
    logits = objective.temperature.scale * queries @ documents.T
    true = torch.nn.functional.cross_entropy(logits, case.candidates.positive, label_smoothing=0.2)
    assert torch.allclose(objective(queries, documents, case.candidates).loss, true, rtol=1e-12)


def test_siglip_is_the_naive_sum_divided_by_the_queries():
    case = make_case(rows=5)
    queries, documents = _embeddings(case)
    objective = build_objective(ObjectiveSettings(SigLIPSettings(initial_bias=-2.5), TemperatureSettings(initial=0.1))).double()
    total = 0.0
    for row, positive in enumerate(case.candidates.positive.tolist()):
        for column in range(len(documents)):
            if case.candidates.allowed[row, column]:
                logit = objective.temperature.scale.item() * (queries[row] @ documents[column]).item() - 2.5
                total += math.log1p(math.exp(-logit if column == positive else logit))
    output = objective(queries, documents, case.candidates)
    assert output.loss.item() == pytest.approx(total / len(queries), rel=1e-12)
    output.loss.backward()
    assert objective.bias.grad.abs() > 0
    assert output.metrics["bias"].item() == -2.5


@pytest.mark.parametrize("loss", [InfoNCESettings(label_smoothing=0.1, hardness=2.0), SigLIPSettings()], ids=["infonce", "siglip"])
def test_masked_documents_have_no_part_in_the_loss(loss):
    case = make_case(rows=5)
    queries, documents = _embeddings(case)
    found = case.candidates
    found.allowed[:, -1] = False
    objective = build_objective(ObjectiveSettings(loss)).double()
    before = objective(queries, documents, found).loss
    before.backward()
    assert documents.grad[-1].abs().max() == 0
    assert documents.grad[:-1].norm() > 0
    changed = torch.cat([documents[:-1], -queries[:1]])
    assert torch.equal(objective(queries, changed, found).loss, before)
    shorter = type(found)(found.positive, found.allowed[:, :-1], 0)
    assert torch.allclose(objective(queries, documents[:-1], shorter).loss, before, rtol=1e-12)


def test_a_row_alone_has_no_loss_and_is_not_its_own_negative():
    queries = torch.nn.functional.normalize(torch.ones(2, 3), dim=-1)
    found = candidates(["a", "b"], ["x", "x"], ["x"], None, MaskSettings())
    output = build_objective(ObjectiveSettings())(queries, queries[:1], found)
    assert output.loss.item() == 0  # its own negative would make it ln 2
    assert "accuracy" not in output.metrics


@pytest.mark.parametrize("loss", [InfoNCESettings(label_smoothing=0.1), SigLIPSettings()], ids=["infonce", "siglip"])
def test_precision_is_float32_at_least_and_never_below_the_inputs(loss):
    case = make_case(rows=6)
    objective = build_objective(ObjectiveSettings(loss))
    halves = _embeddings(case, torch.bfloat16)
    singles = [one.detach().float() for one in halves]
    doubles = [one.detach().double() for one in halves]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = objective(*halves, case.candidates).loss
        singles_under_autocast = objective(*singles, case.candidates).loss
    exact = objective(*doubles, case.candidates).loss
    assert (under_autocast.dtype, exact.dtype) == (torch.float32, torch.float64)
    assert torch.equal(under_autocast, objective(*singles, case.candidates).loss)
    assert torch.equal(under_autocast, singles_under_autocast)
    assert under_autocast.item() == pytest.approx(exact.item(), rel=1e-6)
    assert not torch.is_autocast_enabled("cpu")


def test_metrics_tell_accuracy_margin_and_what_was_masked():
    documents = torch.eye(4)
    queries = torch.tensor([[0.8, 0.6, 0, 0], [0.8, 0.6, 0, 0], [0, 0, 0, 1.0]])
    found = candidates(["a", "b", "c"], ["0", "1", "3"], ["0", "1", "2", "3"], None, MaskSettings())
    found.allowed[0, 3] = False
    found.allowed[2] = torch.tensor([False, False, False, True])  # no negative left: it says nothing about accuracy
    found = type(found)(found.positive, found.allowed, 4)
    metrics = build_objective(ObjectiveSettings())(queries, documents, found).metrics
    assert float(metrics["accuracy"]) == 0.5
    assert float(metrics["margin"]) == pytest.approx((0.2 - 0.2) / 2, abs=1e-7)
    assert float(metrics["hardest_negative_cosine"]) == pytest.approx((0.6 + 0.8) / 2)
    assert float(metrics["positive_cosine"]) == pytest.approx((0.8 + 0.6 + 1) / 3)
    assert metrics["masked_pairs"] == 4
    assert metrics["candidates"] == pytest.approx(8 / 3)
    assert float(metrics["scale"]) == pytest.approx(1 / 0.07)


def test_a_tie_is_not_an_accurate_answer():
    found = candidates(["a"], ["x"], ["x", "y"], None, MaskSettings())
    output = build_objective(ObjectiveSettings())(torch.ones(1, 1), torch.ones(2, 1), found)
    assert float(output.metrics["accuracy"]) == 0


def test_shapes_that_do_not_fit_are_refused():
    found = candidates(["a"], ["x"], ["x", "y"], None, MaskSettings())
    objective = build_objective(ObjectiveSettings())
    with pytest.raises(ValueError, match="2 queries and 2 documents, but candidates of 1 x 2"):
        objective(torch.ones(2, 1), torch.ones(2, 1), found)


def test_the_temperature_is_a_float32_log_scale_that_is_clamped():
    objective = build_objective(ObjectiveSettings(temperature=TemperatureSettings(initial=0.05)))
    log_scale = objective.temperature.log_scale
    assert log_scale.dtype == torch.float32
    assert log_scale.item() == pytest.approx(math.log(20))
    assert [name for name, one in objective.named_parameters() if one.requires_grad] == ["temperature.log_scale"]
    for value, expected in ((9.0, 100.0), (-3.0, 1.0), (2.0, math.exp(2))):
        log_scale.data.fill_(value)
        objective.clamp_()
        assert objective.temperature.scale.item() == pytest.approx(expected, rel=1e-6)
    siglip = build_objective(ObjectiveSettings(SigLIPSettings()))
    assert siglip.state_dict().keys() == {"temperature.log_scale", "bias"}
    assert siglip.bias.dtype == torch.float32


def test_the_temperature_can_learn():
    case = make_case(rows=6)
    queries, documents = (one.detach() for one in _embeddings(case))
    objective = build_objective(ObjectiveSettings())
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = objective(queries, documents, case.candidates).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.clamp_()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert objective.temperature.scale.item() < 0.9 / 0.07
