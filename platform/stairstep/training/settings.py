"""Settings of the optimizer, its schedule and the phases of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stairstep.settings import SettingError, setting


@dataclass(frozen=True)
class ScheduleSettings:
    """The learning rate over the run, as a factor on each group's own rate; a function of the step alone."""

    shape: Literal["constant", "cosine", "cosine_restarts"] = setting("cosine", doc="Shape after the warmup.")
    warmup_steps: int = setting(0, doc="Updates over which the rate rises linearly to full.", minimum=0)
    minimum: float = setting(0.0, doc="Floor of the cosine, as a share of the full rate.", minimum=0, maximum=1)
    cycles: int = setting(1, doc="Number of cosines with shape cosine_restarts.", minimum=1)
    fresh_after_text_warmup: bool = setting(False, doc="Start the schedule anew, warmup included, when the text warmup ends.")


@dataclass(frozen=True)
class RateSettings:
    """Learning rates by group of parameters; null means the rate of `llm`."""

    llm: float = setting(7e-6, doc="Language model (and everything that has no rate of its own).", minimum=0)
    vit: float | None = setting(None, doc="Vision tower.", minimum=0)
    merger: float | None = setting(None, doc="Mergers between vision tower and language model.", minimum=0)
    objective: float = setting(1e-3, doc="Temperature and bias of the loss: own rate, never decayed.", minimum=0)

    def of(self, group: str) -> float:
        """The learning rate of one group."""
        own = getattr(self, group, None)
        return self.llm if own is None else own


@dataclass(frozen=True)
class OptimSettings:
    """AdamW over every trained parameter."""

    batch: int = setting(64, doc="Rows of one global batch, whatever the number of workers.", minimum=1)
    steps: int = setting(350, doc="Updates of the whole run, text warmup included.", minimum=0)
    rates: RateSettings = setting(doc="Learning rates by group.", factory=RateSettings)
    schedule: ScheduleSettings = setting(doc="Learning rate over the run.", factory=ScheduleSettings)
    weight_decay: float = setting(0.01, doc="Decoupled weight decay of the encoder's parameters.", minimum=0)
    beta1: float = setting(0.9, doc="AdamW's first moment.", minimum=0, below=1)
    beta2: float = setting(0.999, doc="AdamW's second moment.", minimum=0, below=1)
    epsilon: float = setting(1e-8, doc="AdamW's epsilon.", above=0)
    clip_norm: float | None = setting(1.0, doc="Largest norm of the gradient over all trained parameters; null: no clipping.", above=0)
    ema_decay: float | None = setting(None, doc="Decay of the averaged weights that are evaluated and saved; null: none.", above=0, below=1)
    stop_after: int | None = setting(
        None, doc="Stop after so many evaluations without a better score on the selection split; null: never.", minimum=1
    )

    def check(self) -> None:
        """A warmup longer than the run would never reach the full rate."""
        if self.steps and self.schedule.warmup_steps > self.steps:
            raise SettingError("schedule.warmup_steps", f"{self.schedule.warmup_steps} is more than optim.steps ({self.steps})")


@dataclass(frozen=True)
class PhaseSettings:
    """Which steps train on text pairs instead of query–tile pairs."""

    text_warmup_steps: int = setting(0, doc="First steps on text pairs alone; then a hard switch.", minimum=0)
    text_mix: float = setting(0.0, doc="Exact share of the later steps that train on text pairs.", minimum=0, below=1)
    text_curriculum: tuple[float, ...] = setting(
        (), doc="Shares of text steps over equal parts of the later steps, e.g. [0.5, 0.33, 0.2, 0].", minimum=0, maximum=1
    )

    def check(self) -> None:
        """Mix and curriculum both say the share of text steps."""
        if self.text_mix and self.text_curriculum:
            raise SettingError("text_curriculum", "give either text_mix or text_curriculum, not both")

    @property
    def any_text(self) -> bool:
        """Whether any step needs text pairs."""
        return bool(self.text_warmup_steps or self.text_mix or any(self.text_curriculum))
