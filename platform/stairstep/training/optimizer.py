"""AdamW by groups, with a state that is kept by parameter name: a checkpoint does not depend on the order of parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .settings import OptimSettings
from .task import Groups

OBJECTIVE = "objective"


class NamedAdamW:
    """torch's AdamW over a task's groups; `set_rate` scales every group's own rate."""

    def __init__(self, groups: Groups, settings: OptimSettings) -> None:
        self.named = {name: parameter for members in groups.values() for name, parameter in members}
        self._base_rates: dict[str, float] = {}
        options = []
        for group, members in groups.items():
            if not members:
                continue
            self._base_rates[group] = settings.rates.of(group)
            decay = 0.0 if group == OBJECTIVE else settings.weight_decay
            parameters = [parameter for _, parameter in members]
            options.append({"params": parameters, "lr": self._base_rates[group], "weight_decay": decay, "name": group})
        self._adamw = torch.optim.AdamW(options, betas=(settings.beta1, settings.beta2), eps=settings.epsilon)

    def set_rate(self, factor: float) -> dict[str, float]:
        """Set every group's rate to `factor` times its own; returns the rates by group."""
        rates = {}
        for options in self._adamw.param_groups:
            options["lr"] = rates[options["name"]] = self._base_rates[options["name"]] * factor
        return rates

    def update(self) -> None:
        """One update from the gradients, which are then dropped."""
        self._adamw.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget all gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def clip(self, limit: float | None) -> Tensor:
        """The norm of the gradient over all parameters before it is cut to `limit`."""
        gradients = [parameter.grad for parameter in self.named.values() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if limit is not None and gradients:
            torch.nn.utils.clip_grads_with_norm_(list(self.named.values()), limit, norm)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Moments and counts, as flat named tensors."""
        state = {}
        for name, parameter in self.named.items():
            for key, value in self._adamw.state.get(parameter, {}).items():
                state[f"adamw.{key}.{name}"] = value.detach()
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave; a parameter that was never updated has none."""
        self._adamw.state.clear()
        for name, parameter in self.named.items():
            entries = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = state.get(f"adamw.{key}.{name}")
                if value is not None:
                    entries[key] = value.clone() if key == "step" else value.to(parameter.device, copy=True)
            if entries:
                self._adamw.state[parameter] = entries
