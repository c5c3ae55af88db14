"""The adviser: published values come back as published, memory decides monotonically, and a fragment holds what was proposed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from stairstep.models.load import build_on_meta, load_encoder
from stairstep.settings import InputError, to_plain
from stairstep.tasks import Recipe, load_recipe
from stairstep.tasks.advise import Advice, Memory, advise, fragment, memory_of, rules, show, trial, write_fragment
from stairstep.tasks.advise import advice as advice_module
from stairstep.tasks.advise import memory as planning
from stairstep.tasks.advise.advice import value_at
from stairstep.tasks.doctor.estimate import chunk_bytes, memory_estimate

MakeRecipe = Callable[..., Recipe]
ROOT = Path(__file__).resolve().parents[2]
V8R = ROOT / "recipes" / "v8r.yaml"


def gpu(gib: float) -> Memory:
    return Memory("cuda", int(gib * 2**30), f"{gib:g} GiB")


def value(advice: Advice, key: str) -> object:
    [found] = [one.value for one in advice.proposals if one.key == key]
    return found


# --- the rules


@pytest.mark.parametrize(("parameters", "rate"), [(5e8, 7e-5), (1e9, 5e-5), (3e9, 3e-5), (1e8, 7e-5), (2e10, 3e-5)])
def test_seed_001s_table_is_met_at_its_points_and_level_beyond(parameters: float, rate: float) -> None:
    assert rules.rate_of_001(parameters) == pytest.approx(rate)


def test_between_the_points_the_rate_falls_without_a_jump() -> None:
    sizes = [5e8 * 1.01**step for step in range(181)]
    rates = [rules.rate_of_001(size) for size in sizes]
    assert sizes[-1] > 2.9e9
    assert all(0.98 < after / before < 1 for before, after in pairwise(rates))
    assert rules.rate_of_001(math.sqrt(1e9 * 3e9)) == pytest.approx(math.sqrt(5e-5 * 3e-5))


def test_seed_000s_run_is_met_at_its_own_size_and_the_other_seed_is_not_hidden() -> None:
    found = rules.propose_rate(2_127_532_032, 1e-3)
    assert (found.value, found.basis) == (7e-6, "published")
    assert found.numbers["seed_001"] / found.numbers["seed_000"] == pytest.approx(5.03, abs=0.01)
    assert "5.0 times as much" in found.rule
    assert rules.propose_rate(8e9, 1e-3).value == pytest.approx(7e-6 * 3e-5 / rules.rate_of_001(2_127_532_032), rel=0.01)


def test_ranks_are_the_tables() -> None:
    assert [rules.rank_of(size) for size in (4e8, 1e9, 2.13e9, 3e9, 8e9)] == [16, 32, 32, 64, 64]
    rank, alpha = rules.propose_rank(5e8, 8, 99.0)
    assert (rank.value, alpha.value) == (16, 16.0)


@pytest.mark.parametrize("parameters", [2.5e6, 1e11])
def test_far_from_what_is_published_the_recipes_own_values_stand(parameters: float) -> None:
    found = [rules.propose_rate(parameters, 3e-3), *rules.propose_rank(parameters, 7, 21.0)]
    assert [one.value for one in found] == [3e-3, 7, 21.0]
    assert {one.basis for one in found} == {"kept"}
    assert all("nothing is published" in one.rule for one in found[:2])


@pytest.mark.parametrize(("steps", "warmup"), [(350, 20), (80, 5), (35, 2), (1, 1), (0, 0), (3500, 200)])
def test_warmup_is_seed_000s_share(steps: int, warmup: int) -> None:
    assert rules.propose_warmup(steps).value == warmup


def test_the_share_of_distinct_articles_is_that_of_drawn_batches() -> None:
    counts = [1] * 10 + [4] * 5 + [30]
    rows = [article for article, count in enumerate(counts) for _ in range(count)]
    generator = random.Random(0)
    drawn = [len(set(generator.sample(rows, 16))) / 16 for _ in range(4000)]
    assert rules.distinct_share(counts, 16) == pytest.approx(sum(drawn) / len(drawn), abs=0.005)
    assert rules.distinct_share([1] * 50, 50) == pytest.approx(1)
    assert rules.distinct_share([50], 50) == pytest.approx(1 / 50)
    with pytest.raises(ValueError, match="1 to 50 rows, found 51"):
        rules.distinct_share([50], 51)


def propose(counts: list[int], now: int = 7, fits: Callable[[int], bool] = lambda batch: True) -> rules.Proposal:
    return rules.propose_batch(counts, now, fits, articles=True, documents=3)


def test_the_batch_is_the_published_one_where_the_data_bears_it_and_less_where_not() -> None:
    assert (propose([]).value, propose([2] * 5000).value) == (64, 64)
    assert propose([1] * 300).value == 32  # eight batches an epoch
    crowded = propose([200] * 20)
    assert crowded.value == 8 and crowded.basis == "our rule"
    assert rules.distinct_share([200] * 20, 8) >= 0.75 > rules.distinct_share([200] * 20, 16)
    assert propose([2] * 5000, fits=lambda batch: batch <= 20).value == 16
    alone = propose([500], now=7)
    assert (alone.value, alone.basis) == (7, "kept")


# --- memory


def test_the_largest_that_fits_is_found() -> None:
    asked: list[int] = []

    def fits(count: int) -> bool:
        asked.append(count)
        return count <= 37

    assert planning.largest(fits, 1000) == 37
    assert len(asked) <= 10
    assert [planning.largest(lambda count, top=top: count <= top, 5) for top in (0, 5, 9)] == [0, 5, 5]


@pytest.fixture(scope="module")
def v8r() -> Recipe:
    return load_recipe(V8R, ["data.roots=[.]"])


def test_more_memory_never_gives_a_smaller_budget_and_the_proposed_one_just_fits(v8r: Recipe) -> None:
    model, _ = build_on_meta(v8r.model)
    tile, budgets = (1024, 864), []
    for gib in (12, 24, 48, 80, 10_000):
        memory = gpu(gib)
        found = planning.largest_budget(v8r, model, tile, [], memory)
        budgets.append(found.tokens if found else 0)
        if not found:
            continue
        cost = planning.costliest(v8r, tile, [])
        room = planning.MARGIN * memory.total
        assert found.tokens == found.items * cost
        assert memory_estimate(planning.with_budget(v8r, found.tokens), model, tile, [], "cuda").total <= room
        if found.further is not None:
            more = memory_estimate(planning.with_budget(v8r, found.tokens + cost), model, tile, [], "cuda").total
            assert more == found.further.total > room
    assert budgets == sorted(budgets)
    assert len(set(budgets)) > 3
    assert budgets[0] == 0 and budgets[-1] == 64 * 3 * (864 + 32)


def test_a_chunk_that_takes_more_than_estimated_makes_the_budget_smaller(v8r: Recipe) -> None:
    model, _ = build_on_meta(v8r.model)
    plain, heavy = (planning.largest_budget(v8r, model, (1024, 864), [], gpu(80), ratio) for ratio in (1.0, 1.5))
    assert plain is not None and heavy is not None
    assert 1.3 < plain.items / heavy.items < 1.7


def test_a_device_that_is_not_here() -> None:
    found = memory_of(load_recipe(V8R), 80)
    assert (found.kind, found.total, found.device) == ("cuda", 80 * 2**30, None)
    assert "estimated alone" in found.said
    assert memory_of(load_recipe(ROOT / "recipes" / "tinywiki.yaml"), 0.5).kind == "cpu"
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="--memory-gb: expected the device's memory in GiB"):
            memory_of(load_recipe(V8R), wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_asked_for_and_absent_says_how_to_plan_for_one() -> None:
    with pytest.raises(InputError, match=r"torch sees no GPU here.*--memory-gb 80"):
        memory_of(load_recipe(V8R))


# --- whole advice


def test_the_published_run_is_advised_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATA_ROOT", raising=False)
    advice = advise(load_recipe(V8R), gpu(80))
    wanted = {
        "optim.batch": 64,
        "optim.rates.llm": 7e-6,
        "optim.schedule.warmup_steps": 20,
        "model.adapter.rank": 32,
        "model.adapter.alpha": 32.0,
    }
    assert {key: value(advice, key) for key in wanted} == wanted
    assert {one.key for one in advice.changes} == {"objective.gradcache.chunk_tokens", "objective.gradcache.chunk_items"}
    assert "$DATA_ROOT is not set" in dict(advice.facts)["data"]
    assert dict(advice.facts)["trial"].startswith("none: ")
    assert advice.trial is None


def test_a_small_device_gets_checkpointing_and_a_smaller_one_a_refusal() -> None:
    overrides = ["data.roots=[nowhere]", "tiles.max_visual_tokens=1024"]
    advice = advise(load_recipe(V8R, overrides), gpu(13))
    assert value(advice, "model.gradient_checkpointing") is True
    assert advice.advised.model.gradient_checkpointing
    with pytest.raises(InputError, match=r"does not fit into the device .*tiles.max_visual_tokens"):
        advise(load_recipe(V8R, overrides), gpu(4))


def test_a_budget_that_holds_the_whole_batch_already_stays(recipe: MakeRecipe) -> None:
    memory = replace(memory_of(recipe()), device=None)
    kept = advise(recipe("objective.gradcache.chunk_tokens=8192"), memory)
    assert value(kept, "objective.gradcache.chunk_tokens") == 8192 and kept.budget.tokens < 8192
    raised = advise(recipe("objective.gradcache.chunk_tokens=100"), memory)
    assert value(raised, "objective.gradcache.chunk_tokens") == raised.budget.tokens > 100
    bounded = advise(recipe("objective.gradcache={chunk_tokens: 8192, chunk_items: 2}"), memory)
    assert value(bounded, "objective.gradcache.chunk_tokens") == bounded.budget.tokens


def test_what_there_is_no_advice_for(recipe: MakeRecipe) -> None:
    with pytest.raises(InputError, match=r"model\.adapter: it is null"):
        advise(recipe("model.adapter=null"), gpu(1))
    with pytest.raises(InputError, match="there is no folder no-such-base"):
        advise(recipe("model.base=no-such-base"), gpu(1))
    with pytest.raises(InputError, match="advice for retrieval alone"):
        advise(load_recipe(ROOT / "recipes" / "tiny" / "glyphs.yaml"), gpu(1))


def test_a_tiny_model_from_its_data_to_a_trial_step_and_a_recipe(recipe: MakeRecipe, tmp_path: Path) -> None:
    given = recipe("optim.batch=2", "optim.schedule.warmup_steps=0")
    before = to_plain(given)
    advice = advise(given, memory_of(given))
    assert to_plain(given) == before
    assert advice.trial is not None and advice.trial.seconds > 0
    facts = dict(advice.facts)
    assert "40 rows of " in facts["data"] and " articles" in facts["data"] and "6 visual tokens" in facts["data"]
    assert value(advice, "optim.batch") == 4  # of forty rows: eight batches an epoch allow five
    assert value(advice, "optim.schedule.warmup_steps") == 1
    assert value(advice, "optim.rates.llm") == 0.01 and value(advice, "model.adapter.rank") == 2
    text = show(advice)
    assert all(one.key in text and one.rule.split()[0] in text for one in advice.proposals)
    assert max(map(len, text.splitlines())) <= 140


def test_the_fragment_extends_the_recipe_and_holds_the_values(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    origin = tmp_path / "deep" / "mine.yaml"
    origin.write_text(f"extends: {V8R}\ndata: {{roots: [nowhere]}}\noptim: {{batch: 8, rates: {{llm: 0.5}}}}\n")
    text, overrides = origin.read_text(), ["model.adapter.rank=4", "optim.steps=700"]
    advice = advise(load_recipe(origin, overrides), gpu(80))
    out = tmp_path / "link" / "advised.yaml"
    write_fragment(advice, origin, out, overrides)
    written = load_recipe(out)
    plain = to_plain(written)
    assert {one.key: value_at(plain, one.key) for one in advice.proposals} == {one.key: one.value for one in advice.proposals}
    assert (written.optim.batch, written.optim.rates.llm, written.optim.schedule.warmup_steps) == (64, 7e-6, 40)
    assert written.optim.steps == 700
    assert replace(written, run=advice.advised.run) == advice.advised
    assert written.run.name == "advised"
    assert out.read_text().splitlines()[1] == "extends: ../deep/mine.yaml"
    assert origin.read_text() == text
    assert [one.name for one in (tmp_path / "there").iterdir()] == ["advised.yaml"]
    kept = out.read_text()
    with pytest.raises(InputError, match="this file exists, and nothing is overwritten"):
        write_fragment(advice, origin, out)
    assert out.read_text() == kept
    with pytest.raises(InputError, match="there is no such folder"):
        write_fragment(advice, origin, tmp_path / "none" / "advised.yaml")
    again = advise(written, gpu(80))
    assert again.changes == () and fragment(again) == ""


# --- the trial step


def test_a_model_too_slow_for_this_cpu_is_only_estimated(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    given = recipe()
    monkeypatch.setattr(advice_module, "WORK_ON_CPU", 1e3)
    advice = advise(given, memory_of(given))
    assert advice.trial is None and "a CPU would need minutes" in dict(advice.facts)["trial"]


def test_a_device_that_is_full_is_one_message(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **more: object) -> None:
        raise torch.cuda.OutOfMemoryError("no room")

    given = recipe()
    monkeypatch.setattr(advice_module, "load_encoder", full)
    with pytest.raises(InputError, match="found no room for one tile of 6 visual tokens"):
        advise(given, memory_of(given))


def test_a_chunk_that_was_measured_larger_makes_the_budget_smaller(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    given = recipe("model.base=tiny-embedder", "tiles.max_visual_tokens=64", "data.roots=[nowhere]", "optim.batch=64")
    memory = replace(memory_of(given), total=4 * 2**30)
    before = advise(given, replace(memory, device=None))
    heavy = 4 * before.budget.estimate.parts["one chunk"]
    monkeypatch.setattr(
        advice_module, "trial_step", lambda recipe, encoder, tile, items: trial.Trial(before.budget.items, heavy, 1.0, "as the test says")
    )
    after = advise(given, memory)
    assert before.budget.items / 5 < after.budget.items < before.budget.items / 3
    assert {one.basis for one in after.proposals if one.key == "objective.gradcache.chunk_tokens"} == {"measured"}
    assert "as the test says" in show(after) and "4.00 times its estimate" in show(after).replace("\n        ", " ")


@pytest.mark.skipif(not trial._RESET.exists(), reason="this system does not show a process its memory")
def test_what_a_trial_measures_is_near_the_estimate_and_changes_nothing(recipe: MakeRecipe) -> None:
    base = recipe(
        "model.base=tiny-embedder", "tiles.max_visual_tokens=64", "model.adapter.rank=16", "optim.batch=64", "data.hard_negatives=0"
    )
    given = planning.with_budget(base, 12 * (64 + 32))
    encoder = load_encoder(given.model, "cpu", trainable=True)
    weights = {name: one.clone() for name, one in encoder.named_parameters()}
    found = trial.trial_step(given, encoder, (256, 256), 12)
    assert found.items == 12
    assert found.measured is not None, found.how
    model, _ = build_on_meta(given.model)
    assert 0.6 < found.measured / chunk_bytes(given, model, (256, 256), [], "cpu")[0] < 1.6
    assert all(torch.equal(one, weights[name]) for name, one in encoder.named_parameters())
    assert all(one.grad is None for one in encoder.parameters()) and not encoder.training


def test_what_is_too_small_to_be_measured_is_not(recipe: MakeRecipe) -> None:
    given = recipe()
    encoder = load_encoder(given.model, "cpu", trainable=True)
    found = trial.trial_step(given, encoder, (64, 96), 2)
    assert found.measured is None and found.how


def test_a_device_without_room_is_tried_with_fewer(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    given = recipe()
    encoder = load_encoder(given.model, "cpu", trainable=True)
    real, tried = trial._forward_and_backward, []

    def short(encoder: object, tiles: list[torch.Tensor]) -> None:
        tried.append(len(tiles))
        if len(tiles) > 3:
            raise torch.cuda.OutOfMemoryError("no room")
        real(encoder, tiles)  # type: ignore[arg-type]

    monkeypatch.setattr(trial, "_forward_and_backward", short)
    assert trial.trial_step(given, encoder, (64, 96), 10).items == 2
    assert tried == [1, 10, 5, 2]
