"""A run or a sweep in an object store: worked on in a copy on this machine, which is brought from the store and put there in a safe order.

The store is the one truth. Who claims a run makes the copy equal to it, and whatever the run leaves is put there: at every checkpoint and
change of state all that is new, every few seconds the status and the metrics. An object that others rely upon is put after what it relies
upon: the recipe first, the metrics before the checkpoint that counts their lines, a summary after its rows, a checkpoint's files before its
marker COMPLETE, the status last; what is deleted loses its marker first. So a run that is killed between any two requests goes on from the
last checkpoint whose marker is there, to the same bits, and the remains of another one are passed over and removed. Of a sweep the trials
are put after their recipes and the plan after the trials; the runs of the trials are put by whoever trains them.

A store that cannot be reached stops no run: what it lacks is put with the next checkpoint, and at the end at the latest, or told.
The object `.lock` names who works on the run, and is signed anew every ten seconds for as long as that process lives. Arrow cannot create
an object on a condition, so of two that start at the same moment both may; each looks whether the lock is still its own whenever it puts
something, and the one that has lost it ends.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from stairstep.settings import InputError, StairstepError

from .claim import Claim
from .copies import AT_THE_END, LOCK, STATUS, checkpoint_of, fetch, is_plain, mapping, offer, turn_of
from .files import COMPLETE, host_name, machine_name, parse_temporary, process_is_alive, write_atomically
from .places import ObjectFolder, Stored, patiently
from .run_folder import Opening, RunFolder
from .status import LOST_S, State

_LOG = logging.getLogger(__name__)
PUSH_S = 10.0
SIGN_S = 10.0
WATCH_S = 4 * SIGN_S
_STOP = "stop"  # an object of a run; a folder of objects of a sweep

Signature = tuple[int, int]


class TakenOverError(InputError):
    """Somebody else works on this run or sweep now."""


class Mirror:
    """The copy of one folder, and what of it the store has. `status`: the file that says how it stands, which is put last; `apart`:
    folders in it that others put, or nobody; `checkpoints`: whether the copy is to have them."""

    def __init__(
        self,
        remote: ObjectFolder,
        local: Path,
        what: str = "run",
        status: str = STATUS,
        apart: Collection[str] = (),
        checkpoints: bool = True,
    ) -> None:
        self.remote, self.local, self.what, self.status, self.apart, self.checkpoints = remote, local, what, status, apart, checkpoints
        self._token = secrets.token_hex(8)
        self._known: dict[str, Signature | None] = {}  # objects by name, as the file was that they were made from; None: not from here
        self._beaten = float("-inf")
        self._pushing = threading.Lock()
        self._failing = False
        self._released = threading.Event()
        self._keeper: threading.Thread | None = None

    # --- whose it is

    def take(self, watch_s: float = WATCH_S) -> None:
        """Make it ours, or refuse while somebody else is at work on it."""
        holder = self._holder()
        gone = holder.get("machine") == machine_name() and not process_is_alive(int(holder.get("pid", 0)))
        if holder and not gone and holder.get("token") != self._token:  # ours: it was signed, and the store was away before that was seen
            self._watch(holder, watch_s)
        self._sign()
        self._check_ours()
        self._released.clear()
        self._keeper = threading.Thread(target=self._keep, name=f"lock-of-{self.remote.name}", daemon=True)
        self._keeper.start()

    def _sign(self) -> None:
        signed = {"host": host_name(), "machine": machine_name(), "pid": os.getpid(), "token": self._token, "time": time.time()}
        self.remote.put(LOCK, json.dumps(signed))

    def _keep(self) -> None:
        """Sign the lock again and again: who looks from elsewhere sees that this process lives, whatever it is at."""
        while not self._released.wait(SIGN_S):
            try:
                self._check_ours()
                self._sign()
            except TakenOverError:  # whoever puts something next meets it too, and ends
                return
            except (StairstepError, OSError):  # away for those as well who would take it over
                continue

    def let_go(self) -> None:
        """Sign no more."""
        self._released.set()
        if self._keeper is not None:
            self._keeper.join()

    def abandon(self) -> None:
        """Nothing was done with it: who comes next need not watch a lock of ours, if the store lets it be taken back."""
        self.let_go()
        with suppress(StairstepError, OSError):
            if self._holder().get("token") == self._token:
                self.remote.remove([LOCK])

    def _holder(self) -> dict[str, Any]:
        return mapping(self.remote.get(LOCK))

    def _watch(self, holder: Mapping[str, Any], watch_s: float) -> None:
        first = float(holder.get("time", 0.0))
        if abs(time.time() - first) > LOST_S:
            return
        who = f"process {holder.get('pid')} on {holder.get('host')}"
        _LOG.info("%s was at work on %s a moment ago; watching its lock for up to %.0f s", who, self.remote, watch_s)
        end = time.monotonic() + watch_s
        while time.monotonic() < end:
            time.sleep(min(2.0, max(0.01, watch_s / 10)))
            now = self._holder()
            if not now:
                return
            if now.get("time") != holder.get("time"):
                raise InputError(f"{self.remote}: {who} is at work on this {self.what}; wait for it or stop it, or choose another run.name")
        _LOG.warning("%s: %s has gone silent; taking over", self.remote, who)

    def _check_ours(self) -> None:
        holder = self._holder()
        if holder.get("token") != self._token:
            now = f"process {holder['pid']} on {holder['host']} works on it now" if holder.get("host") else "its lock was removed"
            raise TakenOverError(f"{self.remote}: this {self.what} was taken over ({now}); this process ends and puts nothing more there")

    def release(self) -> None:
        """Put what is left and let another process have it."""
        self.put_all(last=True)
        self.let_go()
        self.remote.remove([LOCK])

    # --- from the store

    def pull(self) -> None:
        """Make the copy what the store has: everything but torn checkpoints, which the next push removes."""
        listed = self._stored()
        torn = self._torn(listed)
        for path in self.local.iterdir():
            if path.name != LOCK and path.name not in self.apart:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        whole = [name for name in listed if checkpoint_of(name) not in torn]
        fetch(self.remote, whole, self.local)
        here = self._here(last=True)
        self._known = {name: here.get(name) for name in listed}
        for one in sorted(torn):
            why = "no marker, or a file is missing or cut"
            _LOG.warning("%s: this checkpoint is not complete (%s); it is not used", self.remote.where(one), why)

    def _stored(self) -> dict[str, Stored]:
        """What the store has, less what is no concern of this copy."""
        if self.apart:
            found = self.remote.files(deep=False)
            for folder in set(self.remote.folders()) - set(self.apart):
                found |= {f"{folder}/{name}": stored for name, stored in (self.remote / folder).files().items()}
        else:
            found = self.remote.files()
        return {name: stored for name, stored in found.items() if is_plain(name) and (self.checkpoints or not checkpoint_of(name))}

    def _torn(self, listed: Mapping[str, Stored]) -> set[str]:
        torn = set()
        for folder in {one for name in listed if (one := checkpoint_of(name))}:
            marker = f"{folder}/{COMPLETE}"
            sizes = mapping(self.remote.get(marker)).get("files") if marker in listed else None
            if not isinstance(sizes, dict) or any(
                (stored := listed.get(f"{folder}/{name}")) is None or stored.size != size for name, size in sizes.items()
            ):
                torn.add(folder)
        return torn

    # --- to the store

    def push(self) -> None:
        """Put what the store lacks; a store that cannot be reached is told and asked again with the next push."""
        try:
            self.put_all()
        except TakenOverError:
            raise
        except (StairstepError, OSError) as error:
            if not self._failing:
                _LOG.warning("%s; the %s goes on in %s, and what the store lacks is put later", error, self.what, self.local)
            self._failing = True
        else:
            self._failing = False

    def beat(self) -> None:
        """Push now and then, and see whether a stop is asked for; cheap enough for every step."""
        if time.monotonic() - self._beaten < PUSH_S or not self._pushing.acquire(blocking=False):
            return
        self._pushing.release()
        self._beaten = time.monotonic()
        self.push()

    def put_all(self, last: bool = False) -> None:
        """Put what the store lacks and delete what the copy lacks, in this order, or raise; `last`: also what grows and is for people."""
        with self._pushing:
            self._check_ours()
            self._hear()
            here = self._here(last)
            gone = [name for name in self._known if name not in here and (last or not name.startswith(AT_THE_END))]
            changed = [name for name, signature in here.items() if self._known.get(name) != signature]
            if "recipe.yaml" in changed:  # it begins: nothing of another one may seem to be of it
                self._remove(gone)
                gone = []
            for name in sorted(set(changed) - {self.status}, key=lambda one: (turn_of(one), one)):
                if name.endswith(f"/{COMPLETE}"):
                    self._check_ours()  # what was put before it may have taken minutes
                self._put(name, here[name])
            self._remove(gone)
            if self.status in changed:
                self._put(self.status, here[self.status])

    def _hear(self) -> None:
        """Bring what asks for a stop and was put by a person."""
        below = self.local / _STOP
        if below.is_dir():
            asked = [f"{_STOP}/{name}" for name in (self.remote / _STOP).files(deep=False) if is_plain(name)]
        else:
            asked = [_STOP] if _STOP not in self._known and self.remote.exists(_STOP) else []
        for name in set(asked) - set(self._known):
            why = (self.remote.get(name) or b"").decode("utf-8", "replace").strip()
            path = self.local / name
            write_atomically(path, why or f"asked by {self.remote.where(name)}")
            stat = path.stat()
            self._known[name] = (stat.st_size, stat.st_mtime_ns)

    def _put(self, name: str, signature: Signature) -> None:
        folder = checkpoint_of(name)
        marker = f"{folder}/{COMPLETE}"
        if folder and name != marker and marker in self._known:  # it is replaced by another one
            self._remove([marker])
        try:
            self.remote.put_file(name, self.local / name)
        except FileNotFoundError:
            return  # it has gone since
        self._known[name] = signature

    def _remove(self, names: Iterable[str]) -> None:
        for name in sorted(names, key=lambda one: (-turn_of(one), one)):
            self.remote.remove([name])
            self._known.pop(name, None)

    def _here(self, last: bool) -> dict[str, Signature]:
        """What is in the copy, less what is being written just now."""
        found = {}
        # From the last name to the first: of a sweep `trials` before `recipes`, so that no record is found without its recipe.
        tops = sorted((one for one in self.local.iterdir() if one.name not in self.apart), reverse=True)
        for path in (one for top in tops for one in (top, *top.rglob("*"))):
            parts = path.relative_to(self.local).parts
            name = "/".join(parts)
            if name == LOCK or any(map(parse_temporary, parts)) or (parts[0] in AT_THE_END and not last):
                continue
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            if not path.is_dir():
                found[name] = (stat.st_size, stat.st_mtime_ns)
        return found


class MirroredClaim(Claim):
    """The right to write the copy and the store."""

    def __init__(self, folder: Path, mirror: Mirror, watch_s: float, patience_s: float = 0.0) -> None:
        """`patience_s`: for how long a store that cannot be reached is asked again."""
        super().__init__(folder)
        self._mirror, self.patience_s = mirror, patience_s
        try:
            patiently(lambda: mirror.take(watch_s), patience_s)
            patiently(mirror.pull, patience_s)
        except BaseException:
            mirror.abandon()
            super().release()
            raise

    def release(self) -> None:
        """Put what is left, and let another process have it; a failure is raised, unless something else has failed already."""
        if not self.held:
            return
        failed_before = sys.exc_info()[1] is not None
        try:
            patiently(self._mirror.release, self.patience_s)
        except StairstepError as error:
            lacks = f"The store lacks what the {self._mirror.what} has left since its last push"
            told = f"{error}. {lacks}; the same command goes on from what is there"
            if not failed_before:
                raise type(error)(told) from error
            _LOG.error("%s", told)
        finally:
            self._mirror.let_go()
            super().release()


class MirroredRunFolder(RunFolder):
    """A run folder whose truth lies in an object store; `checkpoints`: whether the copy is to have them; `patience_s`: for how long a
    store that cannot be reached is asked again when the run begins and when it ends."""

    def __init__(self, path: str | Path, remote: ObjectFolder, checkpoints: bool = True, patience_s: float = 0.0) -> None:
        super().__init__(path)
        self.remote, self.patience_s = remote, patience_s
        self.mirror = Mirror(remote, self.path, checkpoints=checkpoints)

    @property
    def where(self) -> str:
        """Its URL."""
        return str(self.remote)

    def claim(self, watch_s: float = WATCH_S) -> Claim:
        """The right to write here and there; the copy is then what the store has."""
        if patiently(lambda: self.remote.exists("sweep.json"), self.patience_s):
            raise InputError(f"{self.where}: a sweep is here and no run; its runs lie below runs/, or choose another run.name")
        self._claim = MirroredClaim(self.path, self.mirror, watch_s, self.patience_s)
        return self._claim

    def open_for(
        self,
        recipe: Mapping[str, Any],
        resume: Literal["auto", "never", "overwrite"],
        completed: Callable[[dict[str, Any]], Mapping[str, Any]] = lambda plain: plain,
    ) -> Opening:
        """Begin a run as in any folder; the store knows of it when this returns."""
        try:
            opening = super().open_for(recipe, resume, completed)
        except InputError as error:  # what is wrong is wrong in the store, and not in the copy of it
            raise InputError(str(error).replace(str(self.path), self.where)) from error
        if opening.state != "finished":
            patiently(self.mirror.put_all, self.patience_s)
        return opening

    def set_status(self, state: State, step: int | None = None, of: int | None = None, message: str = "") -> None:
        """Write a state at once, and put what is new."""
        super().set_status(state, step, of, message)
        self.mirror.push()

    def heartbeat(self, step: int | None = None, state: State | None = None) -> None:
        """Say that the run lives."""
        super().heartbeat(step, state)
        self.mirror.beat()

    def share(self) -> None:
        """Put what the store lacks, or raise."""
        patiently(self.mirror.put_all)

    def offer(self, name: str) -> None:
        """Put a file at once, from whatever thread: a run that has stalled puts nothing else."""
        offer(self.remote, self.path, name)

    @contextmanager
    def new_checkpoint(self, step: int) -> Iterator[Path]:
        """A folder to write a checkpoint to; it is put when it is whole."""
        with super().new_checkpoint(step) as place:
            yield place
        self.mirror.push()
