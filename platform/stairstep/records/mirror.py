"""A run or a sweep in an object store: worked on in a copy on this machine, which is brought from the store and put there in a safe order.

The store is the one truth. Who claims a run makes the copy equal to it, and whatever the run leaves is put there: at every checkpoint and
change of state all that is new, every few seconds the status and the metrics. An object that others rely upon is put after what it relies
upon: the recipe first, the metrics before the checkpoint that counts their lines, a summary after its rows, a checkpoint's files before its
marker COMPLETE, the status last; what is deleted loses its marker first. So a run that is killed between any two requests goes on from the
last checkpoint whose marker is there, to the same bits, and the remains of another one are passed over and removed. Of a sweep the trials
are put after their recipes and the plan after the trials; the runs of the trials are put by whoever trains them.

A store that cannot be reached stops no run: what it lacks is put with the next checkpoint, and at the end at the latest, or told.
The object `.lock` names who works on the run. Arrow cannot create an object on a condition, so of two that start at the same moment both
may; each looks whether the lock is still its own whenever it puts something, and the one that has lost it ends.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from stairstep.settings import InputError, StairstepError

from .cache import copy_folder
from .claim import Claim
from .files import COMPLETE, host_name, locked, parse_temporary, process_is_alive, write_atomically
from .places import ObjectFolder, Stored
from .run_folder import Opening, RunFolder
from .status import ACTIVE, LOST_S, State

_LOG = logging.getLogger(__name__)
PUSH_S = 10.0
WATCH_S = 4 * PUSH_S
LOCK = ".lock"
_STOP = "stop"  # an object of a run; a folder of objects of a sweep
_STATUS = "status.json"
WANTED = "beside/wanted-"
"""How the wishes for an evaluation beside training begin (tasks/beside.py)."""
_AT_THE_END = ("tensorboard", "wandb")  # files that grow, for people
_CHECKPOINT = re.compile(r"((?:[^/]+/)*checkpoint-\d+)/.+")
_AT_ONCE = 8

Signature = tuple[int, int]


class TakenOverError(InputError):
    """Somebody else works on this run or sweep now."""


class Mirror:
    """The copy of one folder, and what of it the store has. `status`: the file with the heartbeat of whoever works on it; `apart`: folders
    in it that others put, or nobody; `checkpoints`: whether the copy is to have them."""

    def __init__(
        self,
        remote: ObjectFolder,
        local: Path,
        what: str = "run",
        status: str = _STATUS,
        apart: Collection[str] = (),
        checkpoints: bool = True,
    ) -> None:
        self.remote, self.local, self.what, self.status, self.apart, self.checkpoints = remote, local, what, status, apart, checkpoints
        self._token = secrets.token_hex(8)
        self._known: dict[str, Signature | None] = {}  # objects by name, as the file was that they were made from; None: not from here
        self._beaten = float("-inf")
        self._pushing = threading.Lock()
        self._failing = False

    # --- whose it is

    def take(self, watch_s: float = WATCH_S) -> None:
        """Make it ours, or refuse while somebody else is at work on it."""
        holder = self._holder()
        here = holder.get("host") == host_name()
        if holder and not (here and not process_is_alive(int(holder.get("pid", 0)))):
            self._watch(f"process {holder.get('pid')} on {holder.get('host')}", watch_s)
        self.remote.put(LOCK, json.dumps({"host": host_name(), "pid": os.getpid(), "token": self._token}))
        self._check_ours()

    def _holder(self) -> dict[str, Any]:
        return _mapping(self.remote.get(LOCK))

    def _watch(self, who: str, watch_s: float) -> None:
        first = self._heartbeat()
        if first is None or abs(time.time() - first) > LOST_S:
            return
        _LOG.info("%s was at work on %s a moment ago; watching its heartbeat for up to %.0f s", who, self.remote, watch_s)
        end = time.monotonic() + watch_s
        while time.monotonic() < end:
            time.sleep(min(2.0, max(0.01, watch_s / 10)))
            now = self._heartbeat()
            if now is None:
                return
            if now != first:
                raise InputError(f"{self.remote}: {who} is at work on this {self.what}; wait for it or stop it, or choose another run.name")
        _LOG.warning("%s: %s has gone silent; taking over", self.remote, who)

    def _heartbeat(self) -> float | None:
        """When whoever works on it last said so, or None if nobody does."""
        status = _mapping(self.remote.get(self.status))
        return float(status.get("heartbeat", 0.0)) if status.get("state") in ACTIVE else None

    def _check_ours(self) -> None:
        holder = self._holder()
        if holder.get("token") != self._token:
            now = f"process {holder['pid']} on {holder['host']} works on it now" if holder.get("host") else "its lock was removed"
            raise TakenOverError(f"{self.remote}: this {self.what} was taken over ({now}); this process ends and puts nothing more there")

    def release(self) -> None:
        """Put what is left and let another process have it."""
        self.put_all(last=True)
        self.remote.remove([LOCK])

    # --- from the store

    def pull(self) -> None:
        """Make the copy what the store has: everything but torn checkpoints, which the next push removes."""
        listed = self._stored()
        torn = self._torn(listed)
        for path in self.local.iterdir():
            if path.name != LOCK and path.name not in self.apart:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        whole = [name for name in listed if _folder_of(name) not in torn]
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
        return {name: stored for name, stored in found.items() if _is_plain(name) and (self.checkpoints or not _folder_of(name))}

    def _torn(self, listed: Mapping[str, Stored]) -> set[str]:
        torn = set()
        for folder in {one for name in listed if (one := _folder_of(name))}:
            marker = f"{folder}/{COMPLETE}"
            sizes = _mapping(self.remote.get(marker)).get("files") if marker in listed else None
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
            gone = [name for name in self._known if name not in here and (last or not name.startswith(_AT_THE_END))]
            changed = [name for name, signature in here.items() if self._known.get(name) != signature]
            if "recipe.yaml" in changed:  # it begins: nothing of another one may seem to be of it
                self._remove(gone)
                gone = []
            for name in sorted(set(changed) - {self.status}, key=lambda one: (_turn(one), one)):
                self._put(name, here[name])
            self._remove(gone)
            if self.status in changed:
                self._put(self.status, here[self.status])

    def _hear(self) -> None:
        """Bring what asks for a stop and was put by a person."""
        below = self.local / _STOP
        if below.is_dir():
            asked = [f"{_STOP}/{name}" for name in (self.remote / _STOP).files(deep=False) if _is_plain(name)]
        else:
            asked = [_STOP] if _STOP not in self._known and self.remote.exists(_STOP) else []
        for name in set(asked) - set(self._known):
            why = (self.remote.get(name) or b"").decode("utf-8", "replace").strip()
            path = self.local / name
            write_atomically(path, why or f"asked by {self.remote.where(name)}")
            stat = path.stat()
            self._known[name] = (stat.st_size, stat.st_mtime_ns)

    def _put(self, name: str, signature: Signature) -> None:
        folder = _folder_of(name)
        marker = f"{folder}/{COMPLETE}"
        if folder and name != marker and marker in self._known:  # it is replaced by another one
            self._remove([marker])
        try:
            self.remote.put_file(name, self.local / name)
        except FileNotFoundError:
            return  # it has gone since
        self._known[name] = signature

    def _remove(self, names: Iterable[str]) -> None:
        for name in sorted(names, key=lambda one: (-_turn(one), one)):
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
            if name == LOCK or any(map(parse_temporary, parts)) or (parts[0] in _AT_THE_END and not last):
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

    def __init__(self, folder: Path, mirror: Mirror, watch_s: float) -> None:
        super().__init__(folder)
        self._mirror = mirror
        try:
            mirror.take(watch_s)
            mirror.pull()
        except BaseException:
            super().release()
            raise

    def release(self) -> None:
        """Put what is left, and let another process have it; a failure is raised, unless something else has failed already."""
        if not self.held:
            return
        failed_before = sys.exc_info()[1] is not None
        try:
            self._mirror.release()
        except StairstepError as error:
            lacks = f"The store lacks what the {self._mirror.what} has left since its last push"
            told = f"{error}. {lacks}; the same command goes on from what is there"
            if not failed_before:
                raise type(error)(told) from error
            _LOG.error("%s", told)
        finally:
            super().release()


class MirroredRunFolder(RunFolder):
    """A run folder whose truth lies in an object store; `checkpoints`: whether the copy is to have them."""

    def __init__(self, path: str | Path, remote: ObjectFolder, checkpoints: bool = True) -> None:
        super().__init__(path)
        self.remote = remote
        self.mirror = Mirror(remote, self.path, checkpoints=checkpoints)

    @property
    def where(self) -> str:
        """Its URL."""
        return str(self.remote)

    def claim(self, watch_s: float = WATCH_S) -> Claim:
        """The right to write here and there; the copy is then what the store has."""
        self._claim = MirroredClaim(self.path, self.mirror, watch_s)
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
            self.mirror.put_all()
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
        self.mirror.put_all()

    def offer(self, name: str) -> None:
        """Put a file at once, from whatever thread: a run that has stalled puts nothing else."""
        offer(self.remote, self.path, name)

    @contextmanager
    def new_checkpoint(self, step: int) -> Iterator[Path]:
        """A folder to write a checkpoint to; it is put when it is whole."""
        with super().new_checkpoint(step) as place:
            yield place
        self.mirror.push()


def fetch(remote: ObjectFolder, names: Iterable[str], folder: Path) -> None:
    """Copy objects to a folder, markers of complete folders last."""
    wanted = sorted(names)

    def one(name: str) -> None:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        remote.get_file(name, target)

    with ThreadPoolExecutor(_AT_ONCE, "fetch") as pool:
        list(pool.map(one, (name for name in wanted if not name.endswith(f"/{COMPLETE}"))))
        list(pool.map(one, (name for name in wanted if name.endswith(f"/{COMPLETE}"))))


def offer(remote: ObjectFolder, folder: Path, name: str) -> None:
    """Put a file, for people; one that cannot be put is told and let be."""
    try:
        remote.put_file(name, folder / name)
    except (StairstepError, OSError) as error:
        _LOG.warning("%s could not be put into the store: %s", folder / name, error)


def copy_to_read(remote: ObjectFolder) -> Path:
    """A copy of a run, a sweep or an evaluation, or of those directly in a folder, for whoever reads them: all but checkpoints and
    trackers' files, and only what has changed since the last copy."""
    folder = copy_folder("read", remote) / remote.name
    folder.mkdir(exist_ok=True)
    with locked(folder.parent / LOCK):
        if remote.exists("recipe.yaml") or any(name.endswith(".summary.json") for name in remote.files(deep=False)):
            follow(remote, folder)
            return folder
        there = [name for name in remote.folders() if (remote / name).exists("recipe.yaml")]
        if not there:
            expected = "expected the URL of a run or a sweep (it has a recipe.yaml), or of a folder of them"
            raise InputError(f"{remote}: no run and no sweep is here; {expected}")
        for path in folder.iterdir():
            if path.name not in there:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in there:
            follow(remote / name, folder / name)
    return folder


def follow(remote: ObjectFolder, folder: Path) -> None:
    """Make a folder what the store has of runs, evaluations or a sweep now, less checkpoints and trackers' files; what is unchanged
    stays."""
    listed = {
        name: stored
        for name, stored in remote.files().items()
        if _is_plain(name) and not _folder_of(name) and not set(name.split("/")) & set(_AT_THE_END)
    }
    wanted = {one.as_posix() for name in listed for one in (PurePosixPath(name), *PurePosixPath(name).parents)}
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.relative_to(folder).as_posix() not in wanted:
            path.rmdir() if path.is_dir() else path.unlink()
    here = {name: folder / name for name in listed if (folder / name).is_file()}
    had = {name: (path.stat().st_size, path.stat().st_mtime_ns) for name, path in here.items()}
    changed = [name for name, stored in listed.items() if had.get(name) != (stored.size, stored.time_ns)]

    def one(name: str) -> None:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        data = remote.get(name)  # of one moment: what grows or is replaced meanwhile is read whole
        if data is not None:
            write_atomically(target, data, durable=False)
            os.utime(target, ns=(listed[name].time_ns, listed[name].time_ns))

    with ThreadPoolExecutor(_AT_ONCE, "follow") as pool:
        for turn in sorted(set(map(_turn, changed))):
            list(pool.map(one, (name for name in changed if _turn(name) == turn)))


def _turn(name: str) -> int:
    """When an object is put: what it relies upon comes before it."""
    if name == "recipe.yaml":
        return 0
    if name in (_STATUS, "sweep.json"):
        return 5
    if _folder_of(name):
        return 4 if name.endswith(f"/{COMPLETE}") else 3
    if name.startswith(WANTED):
        return 5  # who sees that a checkpoint is to be evaluated finds it
    return 2 if name.endswith(".summary.json") or name.startswith("trials/") else 1


def _folder_of(name: str) -> str:
    """The checkpoint that an object belongs to; empty for any other."""
    found = _CHECKPOINT.fullmatch(name)
    return found[1] if found else ""


def _is_plain(name: str) -> bool:
    """Whether an object's name is one of a file in a run folder; others are let alone."""
    parts = name.split("/")
    return parts[-1] != LOCK and all(part not in ("", ".", "..") and parse_temporary(part) is None for part in parts)


def _mapping(data: bytes | None) -> dict[str, Any]:
    try:
        plain = json.loads(data or b"{}")
    except ValueError:
        return {}
    return plain if isinstance(plain, dict) else {}
