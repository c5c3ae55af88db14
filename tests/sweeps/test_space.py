"""A space says what it tries, or is refused with the place and the remedy, before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from stairstep.settings import RecipeError, StairstepError, build, from_plain, to_plain
from stairstep.sweeps.beginning import Asked, planned
from stairstep.sweeps.plan import as_override
from stairstep.sweeps.space import Space, load_space, space_of
from stairstep.tasks import load_recipe

ROOT = Path(__file__).resolve().parents[2]
SPACES = sorted((ROOT / "tune_spaces").glob("*.yaml"))
TINYWIKI = ROOT / "recipes" / "tinywiki.yaml"


def grid(key: str, *values: Any) -> dict[str, Any]:
    """A parameter with these values."""
    return {key: {"kind": "grid", "values": list(values)}}


GRID = grid("optim.batch", 4, 8)
OPTUNA = {"kind": "optuna", "samples": 4}


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """plan(space as plain values, *overrides): the trials over tinywiki's recipe, no world being made."""
    monkeypatch.setattr("stairstep.sweeps.plan.resolve", lambda recipe: recipe)

    def make(space: dict[str, Any], *overrides: str, recipe: Path = TINYWIKI, **asked: Any) -> Any:
        file = tmp_path / "space.yaml"
        file.write_text(yaml.safe_dump(space, sort_keys=False))
        return planned(Asked(recipe, file, overrides, **asked))

    return make


def points(made: Any) -> list[dict[str, Any]]:
    return [one.record.point for one in made[1].trials]


# --- what is shipped


def test_the_shipped_spaces_are_the_five():
    assert [path.stem for path in SPACES] == ["hyper", "lr_warmup_lora", "resolution", "stairstep", "vit_rank"]


@pytest.mark.parametrize("recipe", ["tinywiki", "v8r"])
@pytest.mark.parametrize("space", SPACES, ids=lambda path: path.stem)
def test_a_shipped_space_fits_both_recipes(space: Path, recipe: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("stairstep.sweeps.plan.resolve", lambda recipe: recipe)
    found, made = planned(Asked(ROOT / "recipes" / f"{recipe}.yaml", space))
    assert found.about
    assert made.total >= 6
    assert space_of(to_plain(found)) == found
    names = [one.record.name for one in made.trials]
    assert len(set(names)) == len(names)


def test_the_staircase_ends_in_the_recipe_itself(monkeypatch: pytest.MonkeyPatch):
    """Each step changes one knob, and the last is what the recipe's own file says."""
    monkeypatch.setattr("stairstep.sweeps.plan.resolve", lambda recipe: recipe)
    for name, negatives, warmup in (("tinywiki", 1, 10), ("v8r", 2, 50)):
        file = ROOT / "recipes" / f"{name}.yaml"
        trials = [one.recipe for one in planned(Asked(file, ROOT / "tune_spaces" / "stairstep.yaml", seeds=[7]))[1].trials]
        knobs = [
            (
                one.data.hard_negatives,
                one.phases.text_warmup_steps,
                one.model.adapter.targets.vit_attention,
                one.model.adapter.targets.vit_mlp,
            )
            for one in trials
        ]
        assert knobs == [
            (0, 0, False, False),
            (negatives, 0, False, False),
            (negatives, warmup, False, False),
            (negatives, warmup, True, True),
        ]
        assert to_plain(trials[-1]) == to_plain(load_recipe(file, ["run.seed=7"]))


# --- expansion


def test_a_grid_is_every_combination_in_order_with_every_seed(plan):
    made = plan({"parameters": {**GRID, "optim.steps": {"kind": "grid", "values": [10, 20]}}, "seeds": [3, 5]})
    batches = [(one.recipe.optim.batch, one.recipe.optim.steps, one.recipe.run.seed) for one in made[1].trials]
    assert batches == [(b, s, seed) for b in (4, 8) for s in (10, 20) for seed in (3, 5)]
    assert made[1].total == 8
    assert [one.record.seed for one in made[1].trials] == [3, 5] * 4


def test_options_set_their_keys_together(plan):
    options = {"small": {"optim.batch": 4, "model.adapter.rank": 2}, "large": {"optim.batch": 8}}
    made = plan({"parameters": {"size": {"kind": "options", "options": options}}})
    assert points(made) == [{"size": "small"}, {"size": "large"}]
    assert [(one.recipe.optim.batch, one.recipe.model.adapter.rank) for one in made[1].trials] == [(4, 2), (8, 16)]


def test_times_are_multiples_of_the_recipes_own_numbers(plan):
    space = {
        "parameters": {
            "optim.rates.llm": {"kind": "grid", "times": [1, 0.1]},
            "optim.schedule.warmup_steps": {"kind": "grid", "times": [3]},
        }
    }
    made = plan(space)
    assert [(one.recipe.optim.rates.llm, one.recipe.optim.schedule.warmup_steps) for one in made[1].trials] == [(3e-3, 15), (3e-4, 15)]


def test_skipped_combinations_are_listed_with_their_reason(plan):
    skip = [{"when": {"optim.batch": 8, "optim.steps": 20}, "reason": "twice the work of the others"}]
    made = plan({"parameters": {**GRID, "optim.steps": {"kind": "grid", "values": [10, 20]}}, "skip": skip})
    assert len(made[1].trials) == 3
    assert made[1].skipped == ({"point": {"optim.batch": 8, "optim.steps": 20}, "reason": "twice the work of the others"},)


def test_a_random_search_draws_the_same_from_the_same_seed_and_stays_in_range(plan):
    space = {
        "parameters": {
            "optim.rates.llm": {"kind": "loguniform", "low": 1e-5, "high": 1e-1},
            "model.adapter.dropout": {"kind": "uniform", "low": 0.1, "high": 0.2},
            "optim.batch": {"kind": "randint", "low": 4, "high": 6},
            "model.adapter.rank": {"kind": "choice", "values": [2, 64]},
        },
        "search": {"kind": "random", "samples": 60, "seed": 1},
    }
    first = points(plan(space))
    assert first == points(plan(space))
    assert first != points(plan({**space, "search": {"kind": "random", "samples": 60, "seed": 2}}))
    assert {one["optim.batch"] for one in first} == {4, 5, 6} and {one["model.adapter.rank"] for one in first} == {2, 64}
    rates = [one["optim.rates.llm"] for one in first]
    assert min(rates) < 1e-4 < 1e-2 < max(rates) and all(1e-5 <= rate <= 1e-1 for rate in rates)
    assert all(0.1 <= one["model.adapter.dropout"] <= 0.2 for one in first)


def test_seeds_of_the_command_line_stand_instead_of_the_spaces(plan):
    made = plan({"parameters": GRID, "seeds": [1]}, seeds=[4, 5])
    assert [one.recipe.run.seed for one in made[1].trials] == [4, 5, 4, 5]
    assert made[0].seeds == (4, 5)


@pytest.mark.parametrize("value", [1e-05, 3, 0.1, True, False, None, "null", "3", "1e-5", "a, b: c", "[x]", "ü # no comment", 123456789.25])
def test_a_value_comes_back_from_its_override_as_what_it_was(value: Any):
    from stairstep.settings import apply_overrides

    (child,) = apply_overrides(from_plain({}, "test"), [f"key={as_override(value)}"]).value.values()
    assert child.value == value and type(child.value) is type(value)


# --- what is refused

STEP = {"name": "one", "adds": "x", "set": {"optim.batch": 4}}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": (
        {"parameters": grid("optim.bach", 1)},
        r"optim\.bach=1: unknown key 'optim\.bach'.*optim\.batch",
    ),
    "unknown key of the space": ({"parameters": GRID, "serach": {}}, r"unknown key 'serach'.*search"),
    "wrong type": (
        {"parameters": grid("optim.batch", 4, "many")},
        r"trial optim\.batch=many: .*expected a whole number",
    ),
    "out of range": ({"parameters": grid("optim.batch", 0)}, r"optim\.batch: expected a whole number at least 1"),
    "against another key": (
        {"parameters": grid("optim.steps", 3)},
        r"optim\.schedule\.warmup_steps: 5 is more than",
    ),
    "empty grid": ({"parameters": grid("optim.batch")}, r"optim\.batch\.values: the list is empty"),
    "empty options": ({"parameters": {"x": {"kind": "options", "options": {}}}}, "at least one option"),
    "a value twice": ({"parameters": grid("optim.batch", 4, 4)}, "stands there twice"),
    "nothing": ({"about": "x"}, "neither steps nor parameters"),
    "both": ({"parameters": GRID, "steps": [STEP]}, "both steps and parameters"),
    "all left out": (
        {"parameters": grid("optim.batch", 4), "skip": [{"when": {"optim.batch": 4}, "reason": "x"}]},
        "every comb",
    ),
    "skip of no parameter": (
        {"parameters": GRID, "skip": [{"when": {"optim.steps": 4}, "reason": "x"}]},
        r"skip\[0\]\.when: .*found optim\.steps",
    ),
    "range upside down": (
        {"parameters": {"optim.batch": {"kind": "randint", "low": 8, "high": 4}}, "search": {"kind": "random", "samples": 2}},
        r"low \(8\) is not below high \(4\)",
    ),
    "range in a grid": ({"parameters": {"optim.batch": {"kind": "randint", "low": 4, "high": 8}}}, "needs a search that picks"),
    "grid with Optuna": (
        {"parameters": GRID, "search": OPTUNA},
        "a grid cannot be searched by optuna: say kind choice",
    ),
    "bad end of a range": (
        {"parameters": {"model.adapter.dropout": {"kind": "uniform", "low": 0, "high": 1}}, "search": OPTUNA},
        r"trial model\.adapter\.dropout=1\.0: .*below 1",
    ),
    "two objectives with ASHA": (
        {
            "parameters": {"optim.batch": {"kind": "choice", "values": [4]}},
            "search": OPTUNA,
            "also": [{"metric": "mrr"}],
            "scheduler": {"kind": "asha", "grace_steps": 20},
        },
        "without a scheduler",
    ),
    "two seeds with Optuna": (
        {"parameters": {"optim.batch": {"kind": "choice", "values": [4]}}, "search": OPTUNA, "seeds": [0, 1]},
        "one score a suggestion",
    ),
    "a seed twice": ({"parameters": GRID, "seeds": [1, 1]}, "no second seed"),
    "the sweep's own keys": ({"parameters": grid("run.seed", 1)}, r"cannot set run\.seed; give them as `seeds`"),
    "no such metric": ({"parameters": GRID, "metric": "hit@2"}, "expected 'hit@1' or"),
    "nothing to multiply": ({"parameters": {"optim.rates.vit": {"kind": "grid", "times": [2]}}}, "has to be a number other than 0"),
    "values and times": ({"parameters": {"optim.batch": {"kind": "grid", "values": [2], "times": [2]}}}, "either values or times"),
    "ASHA after the end": (
        {"parameters": GRID, "scheduler": {"kind": "asha", "grace_steps": 64}},
        r"asha: hit@1 comes every 32 steps, so from step 64 on",
    ),
    "a rule without a bound": ({"parameters": GRID, "stop": [{"metric": "mrr"}]}, "needs `below` or `above`"),
    "stairs with ASHA": ({"steps": [STEP], "scheduler": {"kind": "asha", "grace_steps": 20}}, "a staircase compares whole runs"),
    "a step twice": ({"steps": [STEP, STEP]}, "'one' stands there twice"),
    "a step that adds nothing": ({"steps": [STEP, {"name": "two", "adds": "x", "set": {"optim.batch": 4}}]}, "step 'two' changes nothing"),
    "nothing to give back": ({"steps": [{"name": "a", "adds": "x", "restore": ["optim.batch"]}]}, "there is nothing to give back"),
    "gives back what it is": (
        {"steps": [{"name": "a", "adds": "x", "set": {"optim.batch": 32}}, {"name": "b", "adds": "x", "restore": ["optim.batch"]}]},
        "step 'b' would add nothing",
    ),
    "a loss that should rise": ({"parameters": GRID, "metric": "validation/loss"}, "less of validation/loss is better; say mode: min"),
    "a key set twice": (
        {"parameters": {**GRID, "size": {"kind": "options", "options": {"a": {"optim.batch": 2}}}}},
        r"parameters\.size: optim\.batch is set by parameters\.optim\.batch as well",
    ),
    "a key set for all and tried": ({"parameters": GRID, "set": {"optim.batch": 2}}, r"optim\.batch is set by set as well"),
    "skip of a value that never comes": (
        {"parameters": GRID, "skip": [{"when": {"optim.batch": 5}, "reason": "x"}]},
        r"optim\.batch never has the value 5; it has 4, 8",
    ),
    "the median too late": (
        {"parameters": GRID, "scheduler": {"kind": "median", "grace_steps": 50}},
        r"median: hit@1 comes every 32 steps, so from step 50 on",
    ),
    "a rule too late": (
        {"parameters": GRID, "stop": [{"metric": "mrr", "from_step": 41, "below": 0.1}]},
        r"stop\[0\]: mrr comes every 32 steps",
    ),
    "a metric that one trial lacks": (
        {"parameters": grid("evaluation.selection_fraction", 0.5, 0)},
        r"hit@1 never comes: the selection split is empty",
    ),
    "a step's name": ({"steps": [{**STEP, "name": "a/b"}]}, r"steps\[0\]\.name: expected at most 60 letters"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_space_is_refused_with_its_place(plan, case: str):
    space, message = BAD[case]
    with pytest.raises(StairstepError, match=message) as raised:
        plan(space)
    assert raised.value.exit_code == 2
    assert "space.yaml" in str(raised.value) or "override" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("metric", "overrides", "message"),
    [
        ("qa", ["evaluation.reader=null"], r"qa never comes: nobody answers"),
        ("hit@1", ["evaluation.sets=[]"], r"hit@1 never comes: the recipe names no question set"),
        ("mrr", ["evaluation.selection_fraction=0"], r"mrr never comes: the selection split is empty"),
        ("validation/loss", ["evaluation.loss_every=0"], r"validation/loss never comes: the recipe has no validation loss"),
    ],
)
def test_a_metric_that_never_comes_is_refused(plan, metric: str, overrides: list[str], message: str):
    space = {"parameters": GRID, "metric": metric, "mode": "min" if metric == "validation/loss" else "max"}
    with pytest.raises(RecipeError, match=message):
        plan(space, *overrides)
    assert plan(space)[0].metric == metric


def test_scores_that_come_too_late_to_stop_anything_are_refused(plan):
    space = {"parameters": GRID, "scheduler": {"kind": "asha", "grace_steps": 20}}
    with pytest.raises(RecipeError, match=r"evaluation\.mode=after scores come when training has ended"):
        plan(space, "evaluation.mode=after")
    with pytest.raises(RecipeError, match=r"from step 20 on it comes before the last step \(64\) not even once.*evaluation\.every"):
        plan(space, "evaluation.every=64")
    assert plan(space)[1].total == 2
    # What the space itself sets counts; and a loss comes during training, whenever question sets are measured.
    assert plan({**space, "set": {"evaluation.every": 10}}, "evaluation.mode=inline")[1].total == 2
    rule = {"parameters": GRID, "stop": [{"metric": "validation/loss", "above": 9.0}]}
    assert plan(rule, "evaluation.mode=after")[1].total == 2


def test_a_key_of_the_space_cannot_be_given_twice(plan):
    with pytest.raises(StairstepError, match=r"optim\.batch is set by the space .* and on the command line"):
        plan({"parameters": GRID}, "optim.batch=2")
    with pytest.raises(StairstepError, match="give seeds in the space or by --seeds"):
        plan({"parameters": GRID}, "run.seed=2")
    # What a step gives back is the recipe's own value, whoever said it.
    stairs = {"steps": [STEP, {"name": "two", "adds": "x", "restore": ["optim.batch"]}]}
    assert [one.recipe.optim.batch for one in plan(stairs, "optim.batch=16")[1].trials] == [4, 16]


def test_optuna_lists_nothing_before_the_start(plan):
    made = plan({"parameters": {"optim.batch": {"kind": "choice", "values": [4, 8]}}, "search": {"kind": "optuna", "samples": 5}})
    assert (made[1].trials, made[1].total) == ((), 5)


def test_a_space_is_a_file_of_settings(tmp_path: Path):
    path = tmp_path / "space.yaml"
    path.write_text("parameters:\n  optim.batch: {kind: gird, values: [1]}\n")
    with pytest.raises(RecipeError, match=r"space\.yaml:2: parameters\.optim\.batch\.kind: .*did you mean 'grid'"):
        load_space(path)
    assert build(Space, from_plain({"parameters": GRID}, "test")).metric == "hit@1"
