"""What a run is estimated to take: operations against those that torch counts, calls exactly, and how the time grows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stairstep.models.flops import forward_and_backward
from stairstep.models.load import load_encoder
from stairstep.settings import InputError
from stairstep.tasks import Recipe, load_recipe
from stairstep.tasks import cost as costs
from stairstep.tasks.cost import Sizes, Speed, cost_of, due, estimate_cost, price_of, sizes_of, speed_of

MakeRecipe = Callable[..., Recipe]
ROOT = Path(__file__).resolve().parents[2]
SIZES = Sizes(query=20, text=80, tile=36, visual=24, sets=((10, 100),))
SPEED = Speed(1e10, "cpu", "a test's speed")


def trained(recipe: Recipe, **more: object) -> float:
    return cost_of(recipe, replace(SIZES, **more), SPEED).training_s  # type: ignore[arg-type]


# --- operations


@pytest.mark.parametrize(
    "targets", ["llm_attention: true", "llm_mlp: true, llm_attention: true, vit_attention: true, vit_mlp: true", "vit_mlp: true"]
)
def test_operations_are_those_that_torch_counts(recipe: MakeRecipe, targets: str) -> None:
    given = recipe("model.base=tiny-embedder", "model.adapter.rank=16", f"model.adapter.targets={{{targets}}}", "model.attention=eager")
    encoder = load_encoder(given.model, "cpu", trainable=True).train()
    tiles = [torch.randint(0, 256, (3, 256, 256), dtype=torch.uint8) for _ in range(3)]
    with FlopCounterMode(display=False) as first:
        vectors = encoder.encode_tiles(tiles)
    with FlopCounterMode(display=False) as second:
        vectors.sum().backward()
    forward, backward = forward_and_backward(encoder.model)
    tokens = encoder.tile_tokens(256, 256)
    assert first.get_total_flops() > 1e8
    assert 3 * forward.of(tokens, 64) == pytest.approx(first.get_total_flops(), rel=0.1)
    assert 3 * backward.of(tokens, 64) == pytest.approx(second.get_total_flops(), rel=0.15)


# --- time


def test_time_grows_with_steps_batch_and_tiles(recipe: MakeRecipe) -> None:
    plain = recipe("phases.text_warmup_steps=0", "objective.gradcache.keep_graphs_mb=0")
    base = trained(plain)
    assert base > 0
    assert trained(recipe("phases.text_warmup_steps=0", "objective.gradcache.keep_graphs_mb=0", "optim.steps=12")) == pytest.approx(
        2 * base
    )
    assert trained(recipe("phases.text_warmup_steps=0", "objective.gradcache.keep_graphs_mb=0", "optim.batch=16")) == pytest.approx(
        2 * base
    )
    assert trained(plain, visual=48, tile=60) > 1.5 * base
    assert trained(recipe("phases.text_warmup_steps=6")) != pytest.approx(base)
    assert cost_of(plain, SIZES, replace(SPEED, rate=2e10)).training_s == pytest.approx(base / 2)
    more = cost_of(plain, replace(SIZES, sets=((20, 200),)), SPEED).evaluation_s
    losses = cost_of(plain, replace(SIZES, sets=()), SPEED).evaluation_s
    assert more - losses == pytest.approx(2 * (cost_of(plain, SIZES, SPEED).evaluation_s - losses))


def test_kept_graphs_save_a_forward_pass_and_checkpointing_costs_one(recipe: MakeRecipe) -> None:
    kept, cached, again = (
        trained(recipe("objective.gradcache.keep_graphs_mb=100000")),
        trained(recipe("objective.gradcache.keep_graphs_mb=0")),
        trained(recipe("objective.gradcache.keep_graphs_mb=0", "model.gradient_checkpointing=true")),
    )
    assert kept < cached < again
    assert again - cached == pytest.approx(cached - kept)


def test_query_side_tuning_encodes_documents_once(recipe: MakeRecipe) -> None:
    assert trained(recipe("task.query_side=true")) < 0.7 * trained(recipe())


def test_workers_share_the_training_and_wait_for_the_evaluation(recipe: MakeRecipe) -> None:
    one, two = (cost_of(recipe(f"cluster.workers={count}"), SIZES, SPEED) for count in (1, 2))
    assert two.training_s == pytest.approx(one.training_s / 2)
    assert two.evaluation_s == pytest.approx(one.evaluation_s)
    assert two.device_hours == pytest.approx((two.training_s + two.evaluation_s) * 2 / 3600)


def test_how_often_something_is_due() -> None:
    assert [due(every, steps) for every, steps in ((3, 6), (4, 6), (50, 350), (100, 350), (10, 0), (0, 5), (9, 4))] == [3, 3, 8, 5, 1, 0, 2]


# --- calls and their price

CHAT = "evaluation.grader={kind: openai, model: judge, template: '{question}{target}{predicted_answer}', max_new_tokens: 10}"
READER = "evaluation.reader={kind: endpoint, base_url: 'https://reader.example/v1', model: eyes, system: abc, max_new_tokens: 100}"
PRICES = "evaluation.prices=[{model: judge, prompt: 2, completion: 8}, {model: eyes, prompt: 1, completion: 4}]"


def test_calls_are_counted_over_all_sets_and_evaluations(recipe: MakeRecipe) -> None:
    alone = estimate_cost(recipe())
    assert (alone.answer_calls, alone.grade_calls, alone.cost) == (0, 0, 0.0)
    read = estimate_cost(recipe("evaluation.reader={kind: local, model: tiny-reader}"))
    assert (read.answer_calls, read.grade_calls, read.cost) == (3 * 12, 0, 0.0)
    assert read.evaluation_s > alone.evaluation_s > 0
    graded = estimate_cost(recipe("evaluation.reader={kind: local, model: tiny-reader}", CHAT))
    assert (graded.answer_calls, graded.grade_calls, graded.cost) == (36, 36, None)
    path = recipe().evaluation.sets[0].path
    limited = f"evaluation.sets=[{{path: {path}, name: one}}, {{path: {path}, name: two, limit: 5}}]"
    assert estimate_cost(recipe("evaluation.reader={kind: local, model: tiny-reader}", limited)).answer_calls == 3 * 17


def test_a_price_is_tokens_times_prices(recipe: MakeRecipe) -> None:
    settings = recipe(READER, CHAT, PRICES, "evaluation.top_k_read=2").evaluation
    reading = 30 * ((3 / 3 + 20 + 2 * 24) * 1 + 100 * 4) / 1e6
    judging = 30 * ((len("{question}{target}{predicted_answer}") / 3 + 40) * 2 + 10 * 8) / 1e6
    assert price_of(settings, 30, 30, SIZES) == pytest.approx(reading + judging)
    assert price_of(settings, 0, 0, SIZES) == 0


def test_without_a_price_a_paid_endpoint_has_no_cost_and_one_of_this_machine_is_free(recipe: MakeRecipe) -> None:
    assert price_of(recipe(READER).evaluation, 30, 0, SIZES) is None
    assert price_of(recipe(READER.replace("'https://reader.example/v1'", "'http://localhost:8200/v1'")).evaluation, 30, 0, SIZES) == 0
    assert price_of(recipe(READER.replace("'https://reader.example/v1'", "null")).evaluation, 30, 0, SIZES) is None
    assert price_of(recipe(READER, CHAT, "evaluation.prices=[{model: eyes, prompt: 1}]").evaluation, 30, 30, SIZES) is None


# --- where the numbers come from


def test_sizes_are_those_of_the_data(recipe: MakeRecipe) -> None:
    found = sizes_of(recipe())
    assert found.sets == ((12, 36),)
    assert found.visual == 6 and found.tile > found.visual
    given = recipe()
    encoder = load_encoder(given.model, "cpu")
    assert found.tile == encoder.tile_tokens(64, 96)
    assert 10 < found.query < 200 and found.text > 10


def test_data_that_is_not_here_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATA_ROOT", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = estimate_cost(load_recipe(ROOT / "recipes" / "v8r.yaml"))
    assert "$DATA_ROOT is not set" in found.assumptions[0]
    assert found.answer_calls == found.grade_calls == 0
    assert found.cost is None  # its judge is paid, and nobody knows how often it would be asked
    assert estimate_cost(load_recipe(ROOT / "recipes" / "v8r.yaml", ["evaluation.grader={kind: exact}"])).cost == 0
    assert "assumed for a GPU that is not here" in found.how and "\n" not in found.how
    assert 1 < found.device_hours < 1000


def test_speed_is_measured_here_with_the_recipes_threads(recipe: MakeRecipe) -> None:
    costs._matrix_rate.cache_clear()
    before = torch.get_num_threads()
    found = speed_of(recipe())
    assert found.kind == "cpu" and 1e8 < found.rate < 1e14
    assert "measured here (cpu, float32, 1 threads)" in found.said
    assert torch.get_num_threads() == before


def test_other_tasks_are_refused() -> None:
    with pytest.raises(InputError, match="only retrieval"):
        estimate_cost(load_recipe(ROOT / "recipes" / "tiny" / "glyphs.yaml"))
