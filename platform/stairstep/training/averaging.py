"""Averaged weights (EMA): they are what is evaluated and published, while training goes on from the raw ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter


class AveragedWeights:
    """An exponential moving average of named parameters, in at least float32; with decay null it is a no-op."""

    def __init__(self, named: Mapping[str, Parameter], decay: float | None) -> None:
        self._named = named
        self._decay = decay
        self._average: dict[str, Tensor] = {}
        if decay is not None:
            self._average = {name: _wide(parameter.detach()).clone() for name, parameter in named.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the parameters as they are now."""
        if self._decay is None:
            return
        for name, parameter in self._named.items():
            self._average[name].lerp_(parameter.to(self._average[name].dtype), 1 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Averaged weights inside, raw weights again afterwards, to the bit and also after an error."""
        if self._decay is None:
            yield
            return
        raw = {name: parameter.detach().clone() for name, parameter in self._named.items()}
        try:
            self._put(self._average)
            yield
        finally:
            self._put(raw)

    def state(self) -> dict[str, Tensor]:
        """Average and raw weights: inside a checkpoint the model's own file holds the average, rounded to its dtype."""
        if self._decay is None:
            return {}
        average = {f"average.{name}": value for name, value in self._average.items()}
        return average | {f"raw.{name}": parameter.detach() for name, parameter in self._named.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave, raw weights into the parameters."""
        if self._decay is None:
            return
        self._average = {name: state[f"average.{name}"].to(parameter.device, copy=True) for name, parameter in self._named.items()}
        self._put({name: state[f"raw.{name}"] for name in self._named})

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._named.items():
            parameter.copy_(values[name])


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()
