"""What trackers.py sends events to. W&B and TensorBoard are imported only when one of them is opened."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from stairstep.settings import InputError, UnreachableError

from .settings import TrackerSettings

_LOG = logging.getLogger(__name__)


class Sink(Protocol):
    """One tracker's session. `permanent`: what it was sent outlives the session, so a later session must not send it again."""

    name: str
    permanent: bool
    failures: tuple[type[Exception], ...]

    def send(self, step: int, moment: float, values: Mapping[str, Any]) -> None:
        """Send one event; `moment` is when it happened, in seconds since 1970."""

    def flush(self) -> None:
        """Make what was sent visible."""

    def close(self, failed: bool) -> None:
        """End the session."""


class TensorBoardSink:
    """Event files in the run folder. A resumed session writes a file that hides the former ones and holds their events itself."""

    name = "tensorboard"
    permanent = False
    failures: tuple[type[Exception], ...] = (OSError, ValueError, TypeError, RuntimeError)

    def __init__(self, folder: Path, resumed: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            # `purge_step` hides every event of former files from that step on. It is given whenever there may be former files: a run
            # killed before its first checkpoint resumes with an empty log but has written files.
            self._writer = SummaryWriter(str(folder), purge_step=0 if resumed or folder.exists() else None)
        except OSError as error:
            raise InputError(f"{folder}: TensorBoard files cannot be written there: {error}") from None

    def send(self, step: int, moment: float, values: Mapping[str, Any]) -> None:
        """Write the event's numbers as scalars."""
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step, walltime=moment)

    def flush(self) -> None:
        """Write to disk."""
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """Close the file."""
        self._writer.close()


class WandbSink:
    """One W&B run, online or offline, with the recipe as its config and `step` as the axis of every metric.

    Nothing that a command line, a source tree or a terminal may contain is uploaded; the key never touches the run folder.
    """

    def __init__(
        self,
        name: str,
        settings: TrackerSettings,
        folder: Path,
        recipe: dict[str, Any],
        run_id: str,
        key: str | None,
        init_timeout_s: float,
    ) -> None:
        import wandb
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

        self.name = name
        self.permanent = settings.wandb == "online"
        self.failures: tuple[type[Exception], ...] = (
            wandb.Error,
            HandleAbandonedError,
            MailboxClosedError,
            OSError,
            ValueError,
            TypeError,
            RuntimeError,
        )
        options = wandb.Settings(
            api_key=key,
            console="off",
            quiet=True,
            silent=True,
            save_code=False,
            disable_code=True,
            disable_git=True,
            x_save_requirements=False,
            init_timeout=init_timeout_s,
            finish_timeout=300.0,
        )
        try:
            self._run = wandb.init(
                mode="online" if self.permanent else "offline",
                project=settings.project,
                entity=settings.entity,
                dir=str(folder),
                id=run_id,
                name=folder.resolve().name,
                config=recipe,
                resume="allow" if self.permanent else None,
                reinit="create_new",
                settings=options,
            )
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
            raise InputError(f"trackers.wandb: W&B refuses the session: {error}; mend it or say trackers.wandb=offline") from None
        except (wandb.Error, OSError) as error:
            if re.search(r"error 40[13]\b", str(error)):
                raise InputError("trackers.wandb: W&B refuses the key; give a valid one or say trackers.wandb=offline") from None
            message = f"trackers.wandb: W&B cannot be reached: {error}; try again, or say trackers.wandb=offline"
            raise UnreachableError(message) from None
        if self.permanent:
            _LOG.info("W&B: %s", self._run.url)

    def send(self, step: int, moment: float, values: Mapping[str, Any]) -> None:
        """Add one history row; W&B's own step counter is not used, because events of an earlier step may come late."""
        self._run.log({"step": step, **{name: value for name, value in values.items() if value is not None}})

    def flush(self) -> None:
        """Nothing: W&B sends in the background."""

    def close(self, failed: bool) -> None:
        """Finish the W&B run, waiting until it is sent or written."""
        self._run.finish(exit_code=1 if failed else 0)
