"""Settings of the objective: which loss, its temperature, its masks, and how GradCache cuts the batch.

The learning rate of the temperature (and of SigLIP's bias) is one of the optimizer's groups and lies there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stairstep.settings import SettingError, setting


@dataclass(frozen=True)
class InfoNCESettings:
    """Cross-entropy of the positive against every allowed document of the global batch."""

    kind: Literal["infonce"] = setting("infonce", doc="One positive against all allowed documents of the batch, by softmax.")
    label_smoothing: float = setting(
        0.0, minimum=0.0, below=1.0, doc="Share of the target that is spread evenly over all candidates of the query."
    )
    hardness: float = setting(
        0.0, minimum=0.0, doc="Adds this much of a negative's own cosine (as a constant) to its logit: hard negatives weigh more."
    )


@dataclass(frozen=True)
class SigLIPSettings:
    """A sigmoid for each pair of the global batch, with a learned bias."""

    kind: Literal["siglip"] = setting("siglip", doc="Every pair by itself, by sigmoid: its positive yes, every allowed document no.")
    initial_bias: float = setting(-10.0, doc="The learned bias at the start; negative, because most pairs are negatives.")


@dataclass(frozen=True)
class TemperatureSettings:
    """The scale of the cosines, 1 / temperature, held as a logarithm."""

    initial: float = setting(0.07, above=0.0, doc="Temperature at the start; cosines are divided by it.")
    learnable: bool = setting(True, doc="Learn the temperature (with the learning rate of its own group, without weight decay).")
    min_scale: float = setting(1.0, above=0.0, doc="Least scale (1 / temperature); clamped after each step.")
    max_scale: float = setting(100.0, above=0.0, doc="Greatest scale (1 / temperature); clamped after each step.")

    def check(self) -> None:
        if self.max_scale < self.min_scale:
            raise SettingError("max_scale", f"must not be below min_scale ({self.min_scale:g}), found {self.max_scale:g}")
        if not self.min_scale <= 1 / self.initial <= self.max_scale:
            low, high = 1 / self.max_scale, 1 / self.min_scale
            raise SettingError("initial", f"must lie from {low:g} to {high:g}, as the scale is clamped; found {self.initial:g}")


@dataclass(frozen=True)
class MaskSettings:
    """False negatives. A tile that is positive for a query text is never its negative; that needs no option."""

    same_article: bool = setting(
        True, doc="Mask other tiles of the positive's article, where the article is known: evaluation counts them as hits."
    )


@dataclass(frozen=True)
class GradCacheSettings:
    """How the global batch is cut into chunks, and how much memory may hold graphs of the first pass."""

    chunk_tokens: int | None = setting(
        8192, minimum=1, doc="Most tokens in a chunk, padding counted (an item above it is a chunk alone); null: no such limit."
    )
    chunk_items: int | None = setting(None, minimum=1, doc="Most items in a chunk; null: no such limit.")
    keep_graphs_mb: int | Literal["auto"] = setting(
        0,
        minimum=0,
        doc="MiB of activations that may be kept from the first pass, so that their chunks are computed once; auto: what is free.",
    )


@dataclass(frozen=True)
class ObjectiveSettings:
    """What training minimises, and how its gradient is computed."""

    loss: InfoNCESettings | SigLIPSettings = setting(factory=InfoNCESettings, doc="The loss, by kind.")
    temperature: TemperatureSettings = setting(factory=TemperatureSettings, doc="Scale of the cosines.")
    masks: MaskSettings = setting(factory=MaskSettings, doc="Which documents are not negatives of a query.")
    gradcache: GradCacheSettings = setting(factory=GradCacheSettings, doc="Chunks of the batch and kept graphs.")
