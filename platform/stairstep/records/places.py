"""Places: a folder of this machine, or one in an object store named by a URL (`s3://bucket/prefix`, `gs://bucket/prefix`).

A plain path and `file:///…` are a `Path`, and whoever is given one goes on as ever. A URL is an `ObjectFolder`: objects are put whole or
not at all, replaced whole, and seen by all as soon as they are there; nothing is renamed, locked, appended to or mapped. What is complete
or absent is therefore committed by an object that is put last.

A URL is written into recipes and logs, so it holds no secret: one that does is refused, and not repeated. Credentials come from the
environment (AWS_ACCESS_KEY_ID and its companions, a profile, an instance's role; GOOGLE_APPLICATION_CREDENTIALS).
"""

from __future__ import annotations

import difflib
import functools
import logging
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from stairstep.settings import InputError, SettingError, StairstepError, UnreachableError

from .files import temporary_name

SCHEMES = {"s3": ("endpoint_override", "region", "scheme"), "gs": ("endpoint_override", "scheme"), "file": ()}
"""What a URL may begin with, and what may follow its `?`."""

_SECRET = re.compile(r"key|secret|token|password|credential|signature", re.IGNORECASE)
_PIECE = 64 << 20  # bytes that are read or written at once
_ATTEMPTS = "8"
PATIENCE_S = 600.0
"""For how long a store that cannot be reached is asked again where hours of work are at stake."""
_AGAIN_S = 5.0
_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
_REFUSED = ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "PERMISSION_DENIED", "UNAUTHENTICATED", "EXPIRED_TOKEN")
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the role of the machine",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or the account of the machine",
}


@dataclass(frozen=True)
class Stored:
    """An object below a folder: its size, and when it was last put (nanoseconds since 1970, by the store's clock)."""

    size: int
    time_ns: int


def is_url(text: str | Path) -> bool:
    """Whether this names a place by a URL and not by a path."""
    return isinstance(text, str) and "://" in text


def place(text: str | Path) -> Path | ObjectFolder:
    """The place that a recipe or a command line names; an InputError for a URL that cannot be one."""
    if not isinstance(text, str) or not is_url(text):
        return Path(text)
    scheme, _, rest = text.partition("://")
    scheme = "gs" if scheme == "gcs" else scheme
    if scheme not in SCHEMES:
        near = difflib.get_close_matches(scheme, SCHEMES, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}://?" if near else ""
        raise InputError(
            f"{scheme}://…: this kind of place is not known{hint} (known: {', '.join(f'{one}://' for one in SCHEMES)}, or a path)"
        )
    parts = urlsplit(f"{scheme}://{rest}")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    bare = f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    secrets = sorted(name for name in options if _SECRET.search(name))
    if "@" in parts.netloc or secrets or "@" in options.get("endpoint_override", ""):
        where = f"its {', '.join(secrets)}" if secrets else "what stands before its @"
        raise InputError(
            f"{bare}: this URL holds credentials ({where}), and URLs are logged and kept; take them out of it (and change "
            f"them, where it was shown) and set {_CREDENTIALS.get(scheme, 'nothing')} in the environment"
        )
    if scheme == "file":
        if parts.netloc or options or not parts.path:
            raise InputError(f"{bare}: expected file:///, an absolute path, and nothing else")
        return Path(unquote(parts.path))
    for name in options:
        if name not in SCHEMES[scheme]:
            near = difflib.get_close_matches(name, SCHEMES[scheme], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"{bare}: '{name}' is not known after the ? of such a URL{hint} (known: {', '.join(SCHEMES[scheme])})")
    if not parts.netloc or parts.fragment:
        raise InputError(f"{bare}: expected {scheme}://BUCKET/PREFIX{'' if parts.netloc else ', found no bucket'}")
    path = "/".join(one for one in (parts.netloc, *parts.path.split("/")) if one)
    if any(one in (".", "..") for one in path.split("/")):
        raise InputError(f"{bare}: '.' and '..' mean nothing in an object store; give the prefix itself")
    return ObjectFolder(scheme, path, tuple(sorted(options.items())))


def below(root: str | Path, name: str | Path) -> Path | ObjectFolder:
    """`name` as seen from `root`, either of them a path or a URL; a `name` that is absolute stands for itself."""
    if is_url(name) or os.path.isabs(name):
        return place(name)
    base = place(root)
    return base / str(name)


def check_places(**named: str | None) -> None:
    """A SettingError for a setting whose value is a URL that cannot be a place."""
    for name, value in named.items():
        if value is not None and is_url(value):
            try:
                place(value)
            except InputError as error:
                raise SettingError(name, str(error)) from None


@dataclass(frozen=True)
class ObjectFolder:
    """What lies below a prefix of a bucket; a plain value, which every process opens for itself. Names are relative, with slashes."""

    kind: str
    path: str  # bucket and prefix
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """The URL."""
        told = f"?{urlencode(self.options, safe=':/')}" if self.options else ""
        return f"{self.kind}://{self.path}{told}"

    def __truediv__(self, name: str) -> ObjectFolder:
        """A folder below this one."""
        parts = [one for one in str(name).split("/") if one not in ("", ".")]
        if ".." in parts:
            raise InputError(f"{self}: '{name}' leads out of it; give a name below it")
        return ObjectFolder(self.kind, "/".join((self.path, *parts)), self.options)

    @property
    def name(self) -> str:
        """Its last name."""
        return self.path.rpartition("/")[2]

    def where(self, name: str = "") -> str:
        """How an object in it is called in a message."""
        return f"{self.kind}://{self.path}{'/' if name else ''}{name}"

    # --- reading

    def get(self, name: str) -> bytes | None:
        """An object's bytes, of one moment; None where there is none."""
        with self._told(name):
            try:
                with self._system().open_input_file(f"{self.path}/{name}") as file:
                    data: bytes = file.read_at(file.size(), 0)
                    if len(data) != file.size():
                        raise OSError(f"it came cut short, {len(data)} of {file.size()} bytes")
                    return data
            except FileNotFoundError:
                return None

    def get_file(self, name: str, target: Path) -> None:
        """Copy an object that is never replaced to a file, whole or not at all."""
        temporary = temporary_name(target)
        try:
            with self._told(name), self._system().open_input_file(f"{self.path}/{name}") as source, open(temporary, "xb") as file:
                size = source.size()
                for start in range(0, size, _PIECE):
                    file.write(source.read_at(min(_PIECE, size - start), start))
                if file.tell() != size:
                    raise OSError(f"it came cut short, {file.tell()} of {size} bytes")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def opened(self, name: str) -> Iterator[Any]:
        """An object as a file of Arrow's, to read parts of."""
        with self._told(name), self._system().open_input_file(f"{self.path}/{name}") as file:
            yield file

    def exists(self, name: str) -> bool:
        """Whether there is such an object."""
        import pyarrow.fs as arrow

        with self._told(name):
            return bool(self._system().get_file_info(f"{self.path}/{name}").type == arrow.FileType.File)

    def files(self, deep: bool = True) -> dict[str, Stored]:
        """The objects below it by name, sorted; not `deep`: only those directly in it."""
        return {name: one for name, one in self._listed(deep) if one is not None}

    def folders(self) -> list[str]:
        """The names of the folders directly in it."""
        return [name for name, one in self._listed(deep=False) if one is None]

    def _listed(self, deep: bool) -> list[tuple[str, Stored | None]]:
        import pyarrow.fs as arrow

        with self._told():
            infos = self._system().get_file_info(arrow.FileSelector(self.path, recursive=deep, allow_not_found=True))
            bucket = self.path.split("/")[0]
            if not infos and self._system().get_file_info(bucket).type == arrow.FileType.NotFound:
                raise OSError(f"NO_SUCH_BUCKET {bucket}")  # which Arrow does not tell from a prefix without objects
        found = []
        for one in infos:
            file = one.type == arrow.FileType.File
            found.append((one.path[len(self.path) + 1 :], Stored(one.size, one.mtime_ns or 0) if file else None))
        return sorted(found, key=lambda one: one[0])

    # --- writing

    def put(self, name: str, data: bytes | str) -> None:
        """Put an object in one instant, in place of one that is there."""
        with self._told(name), self._system().open_output_stream(f"{self.path}/{name}", buffer_size=0) as stream:
            stream.write(data.encode("utf-8") if isinstance(data, str) else data)

    def put_file(self, name: str, source: Path) -> int:
        """Put a file's content as an object; its size. A file that cannot be read to its end leaves no object."""
        size = source.stat().st_size
        if size <= _PIECE:
            self.put(name, source.read_bytes())
            return size
        try:
            with open(source, "rb") as file, self._told(name), self._system().open_output_stream(f"{self.path}/{name}") as stream:
                while piece := file.read(_PIECE):
                    stream.write(piece)
        except OSError:  # Arrow ends a stream by committing it
            self.remove([name])
            raise
        return size

    def put_new(self, name: str, data: bytes | str) -> bool:
        """Put an object unless there is one. Arrow has no conditional put: of two at the same instant both may, and the later one stays."""
        if self.exists(name):
            return False
        self.put(name, data)
        return True

    def remove(self, names: Collection[str]) -> None:
        """Delete objects, in this order; one that is not there is none."""
        for name in names:
            with self._told(name):
                try:
                    self._system().delete_file(f"{self.path}/{name}")
                except FileNotFoundError:
                    continue

    # --- the store

    def _system(self) -> Any:
        return _system(self.kind, self.options, os.getpid())

    @contextmanager
    def _told(self, name: str = "") -> Iterator[None]:
        """What the store did not do in words, and what to do; an object that is not there stays a FileNotFoundError."""
        where = self.where(name)
        try:
            yield
        except StairstepError:
            raise
        except ValueError as error:
            raise InputError(f"{where}: {error}; correct the URL {self}") from error
        except OSError as error:
            if error.errno is not None:  # of this machine, or a file that is not there: the store's own failures have no number
                raise
            bucket = f"{self.kind}://{self.path.split('/')[0]}"
            text = str(error)
            if "NO_SUCH_BUCKET" in text or "bucket does not exist" in text:
                raise InputError(f"{where}: there is no bucket {bucket}; make it, or name another") from error
            if any(word in text for word in _REFUSED):
                known = self.kind != "s3" or any(one in os.environ for one in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE"))
                found = "" if known else " (the environment has none of the first two)"
                told = f"its credentials come from {_CREDENTIALS[self.kind]}{found}"
                raise InputError(
                    f"{where}: the store refuses access; {told}; they need the right to list, read, write and delete"
                ) from error
            raise UnreachableError(
                f"{where}: the object store did not do it: {text}; see whether it can be reached, and try again"
            ) from error


def patiently(act: Callable[[], _T], patience_s: float = PATIENCE_S) -> _T:
    """Do something with a store, again and again while it cannot be reached, and raise that at the end of the patience."""
    end, told = time.monotonic() + patience_s, False
    while True:
        try:
            return act()
        except UnreachableError as error:
            if time.monotonic() + _AGAIN_S > end:
                raise
            if not told:
                _LOG.warning("%s; it is asked again for up to %.0f minutes", error, patience_s / 60)
                told = True
        time.sleep(_AGAIN_S)


@functools.cache
def _system(kind: str, options: tuple[tuple[str, str], ...], process: int) -> Any:
    """Arrow's client, one a process: it does not outlive a fork."""
    import pyarrow.fs as arrow

    chosen: Mapping[str, Any] = dict(options)
    if kind == "gs":
        return arrow.GcsFileSystem(**chosen)
    attempts = os.environ.get("AWS_MAX_ATTEMPTS", _ATTEMPTS)
    if not attempts.isdecimal() or int(attempts) < 1:
        raise InputError(f"AWS_MAX_ATTEMPTS: expected a whole number above 0, found '{attempts}'")
    # A delayed open puts what is small by one request instead of three.
    return arrow.S3FileSystem(
        retry_strategy=arrow.AwsStandardS3RetryStrategy(max_attempts=int(attempts)), allow_delayed_open=True, **chosen
    )
