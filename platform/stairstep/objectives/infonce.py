"""InfoNCE over the global batch: in-batch and hard negatives alike, label smoothing, hardness weighting.

Smoothing spreads its share evenly over the query's own candidates, the positive among them; masked documents get none of it. Hardness
multiplies a negative's weight in the softmax by exp(hardness · cosine), a constant to the gradient (Lan et al. 2025): a weight that the
gradient could lower would be a second temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .loss import Objective
from .masks import Candidates
from .temperature import Temperature


class InfoNCE(Objective):
    """Cross-entropy of each query's positive against its candidates."""

    def __init__(self, temperature: Temperature, label_smoothing: float = 0.0, hardness: float = 0.0) -> None:
        super().__init__(temperature)
        self.label_smoothing = label_smoothing
        self.hardness = hardness

    def losses(self, cosine: Tensor, candidates: Candidates) -> Tensor:
        """The cross-entropy of each query [Q]."""
        logits = cosine * self.temperature.scale.to(cosine.dtype)
        if self.hardness:
            logits = logits + self.hardness * cosine.detach() * candidates.negatives
        log_share = logits.masked_fill(~candidates.allowed, -torch.inf).log_softmax(1)
        target = -log_share.gather(1, candidates.positive[:, None]).squeeze(1)
        if not self.label_smoothing:
            return target
        spread = -log_share.masked_fill(~candidates.allowed, 0).sum(1) / candidates.allowed.sum(1)
        return (1 - self.label_smoothing) * target + self.label_smoothing * spread
