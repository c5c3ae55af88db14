"""The data part of a recipe builds from YAML and says what is wrong with it."""

import pytest

from stairstep.data import DataSettings, PairSource, WorldSettings
from stairstep.settings import RecipeError, build, parse_yaml, to_yaml

RECIPE = """
roots: ["{world}"]
world: {kind: tinywiki, seed: 3}
train: [{path: "{world}/train_hn.jsonl", count: 48}, {path: more.jsonl, limit: 100}]
text: [{path: "{world}/text"}]
hard_negatives: 0
order: reversed
"""


def test_a_recipe_builds_and_goes_back_to_the_same_yaml() -> None:
    settings = build(DataSettings, parse_yaml(RECIPE, "recipe.yaml"))
    assert settings.train == (PairSource(path="{world}/train_hn.jsonl", count=48), PairSource(path="more.jsonl", limit=100))
    assert isinstance(settings.world, WorldSettings)
    assert settings.world.seed == 3
    assert (settings.order, settings.hard_negatives) == ("reversed", 0)
    assert build(DataSettings, parse_yaml(to_yaml(settings), "again")) == settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [{count: 3}]", r"train\[0\]\.path: this key is required"),
        ("train: [{path: a, count: 0}]", r"train\[0\]\.count: expected a whole number at least 1"),
        ("train: [{path: a, limit: 0}]", r"train\[0\]\.limit: expected"),
        ("hard_negatives: -1", "hard_negatives: expected a whole number at least 0"),
        ("order: random", "order: expected 'shuffled' or 'sequential' or 'reversed'"),
        ("world: {kind: bigwiki}", r"world\.kind: expected 'tinywiki', found the text 'bigwiki'"),
        ("validation_set: []", "unknown key 'validation_set'; did you mean 'validation'"),
    ],
)
def test_what_does_not_fit_is_told(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build(DataSettings, parse_yaml(text, "recipe.yaml"))


@pytest.mark.parametrize("name", ["a/b", "..", "", "a b"])
def test_the_name_of_a_question_set_must_do_as_a_file_name(name: str) -> None:
    from stairstep.data import QuestionSetSource

    with pytest.raises(RecipeError, match="name: expected letters"):
        build(QuestionSetSource, parse_yaml(f'{{path: a.json, name: "{name}"}}', "recipe.yaml"))
