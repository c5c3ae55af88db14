"""Copies of the metrics for people: Weights & Biases and TensorBoard, beside metrics.jsonl, which stays the truth.

Events wait until the step that they belong to is committed (its checkpoint is on disk), so a run that is killed and goes on logs no
step twice. A resumed session learns from metrics.jsonl what was committed. TensorBoard's new event file hides the former ones and holds
everything; so does a new offline W&B folder, which alone is to be synced. What an online W&B run has been sent cannot be taken
back, so it is noted in trackers.jsonl just before it is sent and never sent again.

A tracker that cannot be opened stops the run before it starts; one that fails later is dropped with one warning.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from stairstep.settings import InputError

from .files import append_line, digest_of_json, read_json_lines
from .run_folder import RunFolder
from .settings import TrackerSettings
from .tracker_sinks import Sink, TensorBoardSink, WandbSink

_LOG = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where events go besides metrics.jsonl."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Take an event; it is sent once its step is committed."""

    def commit(self, step: int) -> None:
        """Send every event up to a step; called when the step's checkpoint is on disk, and at the end of the run."""

    def close(self, failed: bool = False) -> None:
        """End the session; events that were never committed are not sent."""


class NoTracker:
    """The tracker of runs without trackers and of every worker but the first."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def commit(self, step: int) -> None:
        """Nothing."""

    def close(self, failed: bool = False) -> None:
        """Nothing."""


class Ledger:
    """trackers.jsonl: the ids under which a run is known elsewhere, and which events have been sent where that cannot be undone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows = read_json_lines(path) if path.exists() else []

    def id_of(self, name: str) -> str:
        """The run's id with a tracker, the same at every resume; made at first use."""
        for row in self._rows:
            if row["tracker"] == name and "id" in row:
                return str(row["id"])
        made = secrets.token_hex(4)
        self._add({"tracker": name, "id": made})
        return made

    def sent(self, name: str) -> set[tuple[int, str]]:
        """The events that a tracker has been sent, by step and digest of their fields' names."""
        return {(step, names) for row in self._rows if row["tracker"] == name for step, names in row.get("sent", [])}

    def note(self, name: str, events: list[tuple[int, str]]) -> None:
        """Note events as sent."""
        self._add({"tracker": name, "sent": [list(event) for event in events]})

    def _add(self, row: dict[str, Any]) -> None:
        append_line(self.path, row)
        self._rows.append(row)


class _Channel:
    """One tracker's pending events on the way to its sink."""

    def __init__(self, sink: Sink, ledger: Ledger) -> None:
        self.sink = sink
        self._ledger = ledger if sink.permanent else None
        self._sent = ledger.sent(sink.name) if sink.permanent else set()
        self._pending: list[tuple[int, float, dict[str, Any]]] = []
        self._alive = True

    def log(self, step: int, moment: float, values: Mapping[str, Any]) -> None:
        if self._alive:
            self._pending.append((step, moment, dict(values)))

    def commit(self, step: int) -> None:
        ready = [event for event in self._pending if event[0] <= step]
        self._pending = [event for event in self._pending if event[0] > step]
        ready = [event for event in ready if (event[0], _names(event[2])) not in self._sent]
        if not ready or not self._alive:
            return
        if self._ledger is not None:
            marks = [(event[0], _names(event[2])) for event in ready]
            self._ledger.note(self.sink.name, marks)
            self._sent.update(marks)
        try:
            for event in ready:
                self.sink.send(*event)
            self.sink.flush()
        except self.sink.failures as error:
            self._drop(error)

    def close(self, failed: bool) -> None:
        if not self._alive:
            return
        try:
            self.sink.close(failed)
        except self.sink.failures as error:
            self._drop(error)

    def _drop(self, error: Exception) -> None:
        self._alive = False
        self._pending.clear()
        _LOG.warning(
            "%s failed and is left out from here on (%s: %s); metrics.jsonl has everything",
            self.sink.name,
            type(error).__name__,
            error,
        )


class Trackers:
    """Several trackers as one."""

    def __init__(self, channels: list[_Channel]) -> None:
        self._channels = channels

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Take an event; it is sent once its step is committed."""
        moment = time.time()
        plain = {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
        for channel in self._channels:
            channel.log(step, moment, plain)

    def replay(self, rows: list[dict[str, Any]]) -> None:
        """Send what a former session committed, to those that do not have it."""
        for row in rows:
            values = {name: value for name, value in row.items() if name not in ("step", "time")}
            for channel in self._channels:
                channel.log(row["step"], row["time"], values)
        if rows:
            self.commit(max(row["step"] for row in rows))

    def commit(self, step: int) -> None:
        """Send every event up to a step."""
        for channel in self._channels:
            channel.commit(step)

    def close(self, failed: bool = False) -> None:
        """End all sessions."""
        for channel in self._channels:
            channel.close(failed)


def _names(values: Mapping[str, Any]) -> str:
    return digest_of_json(sorted(values))[:8]


def check_trackers(settings: TrackerSettings) -> None:
    """Refuse, before anything is started, trackers that are not installed or have no key."""
    if settings.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise InputError(f"trackers.wandb: {settings.wandb}: the package wandb is not installed; install it or say trackers.wandb=off")
    if settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError("trackers.tensorboard: the package tensorboard is not installed; install it or say trackers.tensorboard=false")
    if settings.wandb == "online":
        wandb_key()


def wandb_key() -> str:
    """The W&B key, from the environment or from the file that it names; it is handed to W&B and to nobody else."""
    key = os.environ.get("WANDB_API_KEY", "").strip()
    named = os.environ.get("WANDB_API_KEY_FILE", "")
    if not key and named:
        try:
            key = Path(named).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"WANDB_API_KEY_FILE: the file that it names cannot be read: {error}") from None
    if not key:
        raise InputError(
            "trackers.wandb: online: there is no key; set WANDB_API_KEY, or WANDB_API_KEY_FILE to a file that holds it, "
            "on the machine that trains, or say trackers.wandb=offline"
        )
    return key


def open_trackers(settings: TrackerSettings, folder: RunFolder, recipe: Mapping[str, Any], init_timeout_s: float = 90.0) -> Tracker:
    """The trackers of a run, in its first worker only. At a resume call it after the metrics were truncated: all they hold is committed."""
    check_trackers(settings)
    if settings.wandb == "off" and not settings.tensorboard:
        return NoTracker()
    committed = folder.metrics.rows()
    ledger = Ledger(folder.path / "trackers.jsonl")
    sinks: list[Sink] = []
    if settings.tensorboard:
        sinks.append(TensorBoardSink(folder.path / "tensorboard", resumed=bool(committed)))
    if settings.wandb != "off":
        name = f"wandb {settings.wandb}"
        _set_aside_offline(folder.path / "wandb")
        key = wandb_key() if settings.wandb == "online" else None
        sinks.append(WandbSink(name, settings, folder.path, dict(recipe), ledger.id_of(name), key, init_timeout_s))
    trackers = Trackers([_Channel(sink, ledger) for sink in sinks])
    trackers.replay(committed)
    return trackers


def _set_aside_offline(folder: Path) -> None:
    """Move former offline sessions out of the way of `wandb sync wandb/offline-run-*`: the session that starts now holds all of theirs."""
    for session in folder.glob("offline-run-*"):
        (folder / "superseded").mkdir(exist_ok=True)
        shutil.move(session, folder / "superseded" / f"{session.name}-{secrets.token_hex(2)}")
