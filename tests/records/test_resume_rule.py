"""Comparing recipes, and the folder name that a recipe without one gets."""

import pytest

from stairstep.records import differences
from stairstep.records.resume import ABSENT, binding, check_same_recipe, normal
from stairstep.settings import InputError


def test_differences_name_every_leaf_that_differs():
    old = {"a": 1, "b": {"c": [1, {"d": 2}], "e": None}, "gone": {"x": 1}, "same": "s"}
    new = {"a": 2, "b": {"c": [1, {"d": 3}], "e": 0}, "came": [1], "same": "s"}
    assert differences(old, new) == [
        ("a", 1, 2),
        ("b.c[1].d", 2, 3),
        ("b.e", None, 0),
        ("gone", {"x": 1}, ABSENT),
        ("came", ABSENT, [1]),
    ]
    assert differences(old, old) == []
    assert differences({"a": [1]}, {"a": [1, 2]}) == [("a", [1], [1, 2])]
    assert differences({"a": True}, {"a": 1}) == [("a", True, 1)]
    assert differences({"a": 1}, {"a": 1.0}) == []
    assert differences({"a": ["x"]}, {"a": "x"}) == [("a", ["x"], "x")]


def test_only_cluster_trackers_limits_the_place_and_where_tiles_come_from_are_free():
    free = (
        "cluster",
        "cluster.workers",
        "trackers.wandb",
        "limits.hours",
        "run.resume",
        "run.root",
        "run.name",
        "cluster[0]",
        "data.fetch[0].revision",
        "data.archives[0].path",
        "tiles.store",
    )
    held = ("run.seed", "run.threads", "clusters", "data.limits", "optim.cluster", "run")
    assert binding([(key, 1, 2) for key in (*free, *held)]) == [(key, 1, 2) for key in held]


def test_plain_settings_are_compared_as_they_come_back_from_yaml():
    plain = {"a": 7e-6, "b": "off", "c": "7e-6", "d": [1.0, None, True], "e": 1e22, "f": "é: #"}
    assert normal(plain) == plain
    assert [type(value) for value in normal(plain).values()] == [type(value) for value in plain.values()]


def test_a_long_value_does_not_fill_the_refusal(tmp_path):
    with pytest.raises(InputError, match=r"template: 'aaa.*… there, 'bbb.*… now") as told:
        check_same_recipe(tmp_path, {"template": "a" * 9000}, {"template": "b" * 9000})
    assert len(str(told.value)) < 1000
