"""The objective's settings from a recipe: kinds, limits, and what is refused."""

import pytest

from stairstep.objectives import (
    InfoNCE,
    InfoNCESettings,
    ObjectiveSettings,
    SigLIP,
    SigLIPSettings,
    TemperatureSettings,
    build_objective,
)
from stairstep.settings import InputError, build, from_plain, to_plain


def _build(tree):
    return build(ObjectiveSettings, from_plain(tree, "recipe.yaml"))


def test_defaults_are_the_seeds():
    settings = _build({})
    assert settings == ObjectiveSettings()
    assert settings.loss == InfoNCESettings(label_smoothing=0.0, hardness=0.0)
    assert settings.temperature == TemperatureSettings(0.07, True, 1.0, 100.0)
    assert settings.masks.same_article
    assert settings.gradcache.keep_graphs_mb == 0


def test_the_kind_tells_the_loss():
    siglip = _build({"loss": {"kind": "siglip", "initial_bias": -5}})
    assert siglip.loss == SigLIPSettings(initial_bias=-5.0)
    assert isinstance(build_objective(siglip), SigLIP)
    objective = build_objective(_build({"loss": {"label_smoothing": 0.1, "hardness": 9}}))
    assert isinstance(objective, InfoNCE)
    assert (objective.label_smoothing, objective.hardness) == (0.1, 9.0)
    assert _build(to_plain(siglip)) == siglip


def test_graphs_may_be_counted_or_left_to_the_machine():
    for value in (0, 4096, "auto"):
        assert _build({"gradcache": {"keep_graphs_mb": value}}).gradcache.keep_graphs_mb == value
    assert _build({"gradcache": {"chunk_tokens": None, "chunk_items": 4}}).gradcache.chunk_items == 4


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ({"gradcache": {"keep_graphs_mb": -1}}, "gradcache.keep_graphs_mb"),
        ({"gradcache": {"keep_graphs_mb": "all"}}, "gradcache.keep_graphs_mb"),
        ({"gradcache": {"chunk_items": 0}}, "gradcache.chunk_items"),
        ({"loss": {"label_smoothing": 1.0}}, "loss.label_smoothing"),
        ({"loss": {"kind": "siglip", "label_smoothing": 0.1}}, "loss.label_smoothing"),
        ({"loss": {"kind": "triplet"}}, "loss"),
        ({"loss": {"hardness": -1}}, "loss.hardness"),
        ({"temperature": {"initial": 0.001}}, "temperature.initial: must lie from 0.01 to 1"),
        ({"temperature": {"min_scale": 5.0, "max_scale": 2.0}}, "temperature.max_scale: must not be below min_scale"),
        ({"masks": {"same_tile": False}}, "masks.same_tile"),
    ],
)
def test_what_makes_no_sense_is_refused(tree, told):
    with pytest.raises(InputError, match=told.replace(".", r"\.")):
        _build(tree)
