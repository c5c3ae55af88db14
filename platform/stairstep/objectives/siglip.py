"""SigLIP: each pair of the batch is judged by itself, its positive +1 and every allowed negative −1; the sum is divided by the queries.

Dividing by the queries and not by the pairs is the published form: more negatives add to the loss, and the bias answers them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from .loss import Objective
from .masks import Candidates
from .temperature import Temperature


class SigLIP(Objective):
    """Sigmoid loss with a learned scale and a learned bias."""

    def __init__(self, temperature: Temperature, initial_bias: float = -10.0) -> None:
        super().__init__(temperature)
        self.bias = nn.Parameter(torch.tensor(initial_bias, dtype=torch.float32))

    def losses(self, cosine: Tensor, candidates: Candidates) -> Tensor:
        """The sum over each query's pairs [Q]."""
        logits = cosine * self.temperature.scale.to(cosine.dtype) + self.bias.to(cosine.dtype)
        sign = torch.full_like(logits, -1).scatter(1, candidates.positive[:, None], 1)
        return -logsigmoid(sign * logits).masked_fill(~candidates.allowed, 0).sum(1)

    def state(self) -> dict[str, Tensor]:
        """The scale and the bias."""
        return {**super().state(), "bias": self.bias.detach()}
