"""The temperature as a float32 log scale: multiplicative steps, clamped after each of them so that the forward needs no clamp."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .settings import TemperatureSettings


class Temperature(nn.Module):
    """Holds `log_scale`, the logarithm of 1 / temperature; fixed when the settings say so."""

    def __init__(self, settings: TemperatureSettings) -> None:
        super().__init__()
        self._bounds = (math.log(settings.min_scale), math.log(settings.max_scale))
        log_scale = torch.tensor(-math.log(settings.initial), dtype=torch.float32)
        self.log_scale = nn.Parameter(log_scale, requires_grad=settings.learnable)

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied by."""
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Brings the scale back into its range; to be called after each optimizer step."""
        self.log_scale.clamp_(*self._bounds)
