"""A sweep in an object store: its folder is worked on in a copy on the machine of its driver, and the store is the truth.

The copy's own files are put there every few seconds (`records.mirror`), first of all what others rely upon. The runs of its trials are put
by whoever trains them; below `runs/` the copy has what a reader needs of them, and no checkpoints. Whoever claims the sweep makes the copy
equal to the store, so it goes on on any machine.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stairstep.records.cache import copy_folder
from stairstep.records.copies import follow
from stairstep.records.mirror import WATCH_S, Mirror, MirroredClaim
from stairstep.records.places import PATIENCE_S, ObjectFolder
from stairstep.records.status import HEARTBEAT_S, StatusFile
from stairstep.settings import InputError

from .folder import PARTS, SweepFolder

_LOG = logging.getLogger(__name__)
_APART = ("runs", ".ray")  # the trials' own, and what Tune keeps meanwhile


class MirroredSweep(SweepFolder):
    """A sweep's folder whose truth lies in an object store."""

    def __init__(self, remote: ObjectFolder) -> None:
        super().__init__(copy_folder("sweeps", remote) / remote.name)
        self.remote = remote
        self.mirror = Mirror(remote, self.path, "sweep", "driver.json", _APART)
        self._status = StatusFile(self.path / "driver.json")
        self._lost: Exception | None = None

    def __reduce__(self) -> tuple[type[SweepFolder], tuple[Path]]:
        """Sent to another process it is its copy alone, which asks and is asked through files."""
        return SweepFolder, (self.path,)

    @property
    def where(self) -> str:
        """Its URL."""
        return str(self.remote)

    @property
    def run_root(self) -> str:
        """The URL below which its trials' runs lie."""
        return str(self.remote / "runs")

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """As of any sweep; the store has all of it when the block has ended, its plan last."""
        self.check_free({*self.remote.files(deep=False), *self.remote.folders()})
        with self._claimed(WATCH_S):
            self.make()
            self.mirror.put_all()  # first of all nothing of a sweep that never began is left
            yield

    @contextmanager
    def claim(self, watch_s: float = WATCH_S) -> Iterator[None]:
        """The right to work on it, on this machine and in the store; meanwhile what is new is put, and who else looks sees it alive."""
        with self._claimed(watch_s):
            _LOG.info("%s is worked on in %s", self.remote, self.path)
            self.mirror.put_all()
            self._lost = None
            ended = threading.Event()
            keeper = threading.Thread(target=self._keep, args=(ended,), name="sweep-mirror", daemon=True)
            keeper.start()
            try:
                yield
            finally:
                ended.set()
                keeper.join()
            if self._lost is not None:
                raise self._lost

    @property
    def lost(self) -> str:
        """Why the sweep cannot be kept any longer, such as that another machine has taken it over; empty while it can."""
        return str(self._lost) if self._lost is not None else ""

    def published(self, name: str) -> str:
        """Put a file that was written here when the sweep had ended; its URL."""
        self.remote.put_file(name, self.path / name)
        return self.remote.where(name)

    @contextmanager
    def _claimed(self, watch_s: float) -> Iterator[None]:
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            claim = MirroredClaim(self.path, self.mirror, watch_s)
        except InputError as error:
            raise self._refusal(error) from None
        claim.patience_s = PATIENCE_S  # a sweep of days does not end by a store that is away for a minute
        with claim:
            for part in PARTS:
                (self.path / part).mkdir(exist_ok=True)
            follow(self.remote / "runs", self.runs)
            self._status.set("preparing")
            yield
            self._status.set("stopped")

    def _keep(self, ended: threading.Event) -> None:
        try:
            while not ended.wait(HEARTBEAT_S):
                self._status.heartbeat(state="running")
                self.mirror.beat()
        except Exception as error:  # noqa: BLE001 - carried to the main thread, which ends the sweep and raises it
            self._lost = error
