"""Losses, masks and GradCache: knows tensors only, no model, no file, no cluster."""

from .chunks import Chunk, Side, cut, cut_batch, deal
from .collective import Alone, Collective, ProcessGroup
from .gradcache import StepOutput, cached_loss, cached_step
from .infonce import InfoNCE
from .loss import LossOutput, Objective
from .masks import Candidates, candidates, distinct
from .randomness import chunk_randomness, chunk_seed
from .settings import (
    GradCacheSettings,
    InfoNCESettings,
    MaskSettings,
    ObjectiveSettings,
    SigLIPSettings,
    TemperatureSettings,
)
from .siglip import SigLIP
from .temperature import Temperature


def build_objective(settings: ObjectiveSettings) -> Objective:
    """The loss that the settings name, with its temperature."""
    temperature = Temperature(settings.temperature)
    if isinstance(settings.loss, SigLIPSettings):
        return SigLIP(temperature, settings.loss.initial_bias)
    return InfoNCE(temperature, settings.loss.label_smoothing, settings.loss.hardness)


__all__ = [
    "Alone",
    "Candidates",
    "Chunk",
    "Collective",
    "GradCacheSettings",
    "InfoNCE",
    "InfoNCESettings",
    "LossOutput",
    "MaskSettings",
    "Objective",
    "ObjectiveSettings",
    "ProcessGroup",
    "Side",
    "SigLIP",
    "SigLIPSettings",
    "StepOutput",
    "Temperature",
    "TemperatureSettings",
    "build_objective",
    "cached_loss",
    "cached_step",
    "candidates",
    "chunk_randomness",
    "chunk_seed",
    "cut",
    "cut_batch",
    "deal",
    "distinct",
]
