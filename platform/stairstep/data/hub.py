"""What is asked of the hub: which files a repository has at a commit, and their bytes.

The listing is not trusted: every path must be a plain one inside the folder, every file must have a size and a checksum, and no more bytes
are taken than it announces. A file is written to a part that outlives a kill, and is asked for from where the part ends: the hub's own
client (2.4) keeps nothing of a file that it was killed over, and holds ten megabytes back before it writes them. The token comes from
HF_TOKEN alone, goes into one header and is not sent on to the host that a redirect names.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import build_hf_headers, filter_repo_objects, get_session, hf_raise_for_status

from stairstep.settings import DataError, FetchError, InputError, StairstepError, UnreachableError

from .fields import encodable
from .settings import FetchSource

OWN = ".stairstep-"
"""How our own hidden files in a fetched folder begin."""

_LOG = logging.getLogger(__name__)
# The hub's client has changed its HTTP library twice; its own error class always descends from that library's.
_CLIENT_ERROR: type[Exception] = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")

# Seconds between attempts: where nobody answers, and where the hub says that it is busy. Bytes that arrive begin the count anew.
LOST_WAITS: tuple[float, ...] = (1, 3)
BUSY_WAITS: tuple[float, ...] = (1, 2, 4, 8, 15, 30, 60, 60)
LONGEST_WAIT_S = 300.0
_BUSY = (408, 425, 429)
_BLOCK = 1 << 20

T = TypeVar("T")


class Stopped(Exception):
    """Another thread has failed, and this one need not go on."""


class TooLong(Exception):
    """A reply with more bytes than the listing says."""


class CutShort(Exception):
    """A reply that ended in good order before the file did, however often it was asked for."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository: its path there, its bytes, and their SHA-256 or, where git keeps it itself, its git blob id."""

    path: str
    size: int
    checksum: str

    def checksum_of(self, path: Path) -> str:
        """The same kind of checksum of a file on disk."""
        digest = hashlib.sha256() if len(self.checksum) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()


@dataclass(frozen=True)
class Listing:
    """The files of a repository at a commit that a source asks for."""

    source: FetchSource
    commit: str
    files: tuple[RemoteFile, ...]


def token() -> str | bool:
    """HF_TOKEN, or False: nothing that another program has saved is sent."""
    value = os.environ.get("HF_TOKEN", "").strip()
    if any(not "!" <= letter <= "~" for letter in value):
        raise InputError("HF_TOKEN: this token holds a character that no token has (a space, a line break?); set it anew")
    return value or False


def list_files(source: FetchSource) -> Listing:
    """What the hub has of a source: its commit, and its files with sizes and checksums."""
    api = huggingface_hub.HfApi(token=token())
    timeout = constants.HF_HUB_ETAG_TIMEOUT

    def ask() -> tuple[str, list[Any]]:
        commit = api.repo_info(source.repo, repo_type=source.repo_type, revision=source.revision, timeout=timeout).sha
        if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise ValueError(f"the commit is {commit!r}")
        tree = api.list_repo_tree(source.repo, repo_type=source.repo_type, revision=commit, recursive=True)
        return commit, [one for one in tree if isinstance(one, huggingface_hub.hf_api.RepoFile)]

    commit, entries = patiently(ask, source)
    files = {one.path: one for one in map(_checked(source), entries)}
    if len(files) < len(entries):
        raise DataError(f"'{source.repo}': the hub's listing names a file twice; nothing of it is fetched")
    _check_no_file_is_a_folder(files, source)
    chosen = _chosen(files, source)
    return Listing(source, commit, tuple(files[path] for path in sorted(chosen)))


def _chosen(paths: Iterable[str], source: FetchSource) -> set[str]:
    """The paths that `include` asks for; patterns may be alternatives, so one of them may match nothing, but not all."""
    every = list(paths)
    if not source.include:
        return set(every)
    chosen: set[str] = set()
    for pattern in source.include:
        found = set(filter_repo_objects(every, allow_patterns=[pattern]))
        if not found:
            _LOG.info("%s: include '%s' matches no file", source.repo, pattern)
        chosen |= found
    if not chosen:
        shown = ", ".join(sorted(every)[:5]) or "nothing"
        raise InputError(f"'{source.repo}': no file matches include ({', '.join(source.include)}); there are {shown}, …")
    return chosen


def _checked(source: FetchSource) -> Callable[[Any], RemoteFile]:
    """An entry of the listing as a file, if it is one that may be written."""

    def check(entry: Any) -> RemoteFile:
        path, size = entry.path, entry.size
        if not isinstance(path, str) or not _is_plain(path):
            raise DataError(
                f"'{source.repo}': the hub's listing names the file {path!r}, which would leave its folder or is no plain path;"
                " nothing of this repository is fetched. Do not trust it"
            )
        checksum = entry.lfs.sha256 if entry.lfs is not None else entry.blob_id
        if type(size) is not int or size < 0 or not re.fullmatch(r"[0-9a-f]{64}" if entry.lfs is not None else r"[0-9a-f]{40}", checksum):
            raise DataError(f"'{source.repo}': the hub's listing gives no size and checksum of {path!r}; nothing of it is fetched")
        return RemoteFile(path, size, checksum)

    return check


def _is_plain(path: str) -> bool:
    """Whether a path leads from a folder to a file in it, on any system, and is none of our own hidden names."""
    parts = path.split("/")
    if not encodable(path) or not path.isprintable() or "\\" in path or ":" in parts[0]:
        return False
    return all(part not in ("", ".", "..") and not part.startswith(OWN) and len(part.encode()) <= 255 for part in parts)


def _check_no_file_is_a_folder(files: Iterable[str], source: FetchSource) -> None:
    names = set(files)
    for path in names:
        above = path
        while "/" in above:
            above = above.rpartition("/")[0]
            if above in names:
                raise DataError(f"'{source.repo}': the hub's listing names '{above}' as a file and as the folder of '{path}'")


def download(listing: Listing, file: RemoteFile, part: Path, seen: Callable[[int], None], stop: threading.Event) -> None:
    """The bytes of a file, into a part that may hold its beginning already; `seen` is told of each piece."""
    url = huggingface_hub.hf_hub_url(listing.source.repo, file.path, repo_type=listing.source.repo_type, revision=listing.commit)
    headers = {**build_hf_headers(token=token()), "Accept-Encoding": "identity"}

    def have() -> int:
        return part.stat().st_size if part.exists() else 0

    def ask() -> None:
        _stream(url, headers, file, part, have(), seen, stop)

    if have() > file.size:
        part.unlink()
    part.touch()
    patiently(ask, listing.source, have, stop, file.path)


def _stream(
    url: str, headers: dict[str, str], file: RemoteFile, part: Path, have: int, seen: Callable[[int], None], stop: threading.Event
) -> None:
    if have == file.size:
        return
    asked = {**headers, "Range": f"bytes={have}-"} if have else headers
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=asked, timeout=timeout, follow_redirects=True) as response:
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        if have and response.status_code != 206:  # all of it, whatever was asked for
            seen(-have)
            have = 0
        with open(part, "r+b") as out:
            out.seek(have)
            out.truncate()
            for piece in response.iter_bytes():
                if stop.is_set():
                    raise Stopped
                have += len(piece)
                if have > file.size:
                    raise TooLong
                out.write(piece)
                seen(len(piece))
    if have < file.size:
        raise CutShort


def cache_folder(source: FetchSource) -> Path:
    """The folder of a repository in the hub's own cache."""
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=source.repo, repo_type=source.repo_type)


def patiently(
    ask: Callable[[], T],
    source: FetchSource,
    have: Callable[[], int] = lambda: 0,
    stop: threading.Event | None = None,
    file: str = "",
) -> T:
    """What the hub answers; asked again while it is busy or the connection breaks, and a final refusal told in our words."""
    stop = stop or threading.Event()
    failures, before = 0, have()
    while True:
        try:
            return ask()
        except OfflineModeIsEnabled:
            raise UnreachableError(f"'{source.repo}': HF_HUB_OFFLINE forbids to ask the hub; unset it to fetch") from None
        except (HfHubHTTPError, _CLIENT_ERROR, CutShort) as error:
            told = error
        except HFValidationError as error:
            raise InputError(f"data.fetch: '{source.repo}' is no hub id: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise UnreachableError(
                f"'{source.repo}': what answers at {constants.ENDPOINT} is no hub ({type(error).__name__});"
                " check HF_ENDPOINT and the network"
            ) from None
        waits = _waits(told, source, file)
        failures, before = (1, have()) if have() > before else (failures + 1, before)
        if failures > len(waits):
            raise told if isinstance(told, CutShort) else _given_up(told, source, file) from None
        seconds = min(max(waits[failures - 1], _asked_to_wait(told)), LONGEST_WAIT_S)
        named = f"{source.repo}{f', {file}' if file else ''}"
        _LOG.info("%s: %s; asking again in %.0f s", named, _cause(told), seconds)
        if stop.wait(seconds):
            raise Stopped


def _waits(error: Exception, source: FetchSource, file: str) -> tuple[float, ...]:
    """The pauses that a failure is worth; the hub's own refusals are worth none."""
    if not isinstance(error, HfHubHTTPError):
        return LOST_WAITS
    status = error.response.status_code
    if status in _BUSY or status >= 500:
        return BUSY_WAITS
    raise _refusal(error, status, source, file) from None


def _refusal(error: Exception, status: int, source: FetchSource, file: str) -> StairstepError:
    """The hub's own refusals, which trying again does not mend."""
    repo = source.repo
    if isinstance(error, GatedRepoError):
        return InputError(f"'{repo}' is gated; accept its terms on the hub and set HF_TOKEN")
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"'{repo}' has no revision '{source.revision or 'main'}'; correct `revision`")
    if isinstance(error, RepositoryNotFoundError):
        return InputError(f"there is no {source.repo_type} '{repo}' on the hub (a private one needs HF_TOKEN)")
    if status in (401, 403):
        given = "does not open it; set one that may read it" if token() else "is not set; set it"
        return InputError(f"the hub refuses '{repo}' ({status}): HF_TOKEN {given}")
    return FetchError(f"'{repo}'{f', {file}' if file else ''}: the hub answers {status}; nothing that is whole is lost, look at the hub")


def _given_up(error: Exception, source: FetchSource, file: str) -> UnreachableError:
    named = f"'{source.repo}'{f', {file}' if file else ''}"
    if isinstance(error, HfHubHTTPError):
        return UnreachableError(f"{named}: the hub stays busy ({error.response.status_code}); start again later, it goes on from here")
    return UnreachableError(
        f"{named}: the hub at {constants.ENDPOINT} could not be reached ({_cause(error)});"
        " check the network and start again, it goes on from here"
    )


def _cause(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError):
        return f"the hub answers {error.response.status_code}"
    return "the reply was cut short" if isinstance(error, CutShort) else type(error).__name__


def _asked_to_wait(error: Exception) -> float:
    """The seconds that a busy hub asks for."""
    said = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(said) if re.fullmatch(r"\d{1,6}", said) else 0.0
