"""Where a base, a tokenizer or an adapter lies: a local folder, the hub, or a base shipped in the package.

Everything ends as a local folder with a config. Nothing that could run code is ever fetched or read: JSON, templates and safetensors only.
What a user must mend is an InputError; a hub that cannot be reached is an UnreachableError, after one attempt and with one message.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from stairstep.settings import InputError, UnreachableError

SAFE_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt")
# The hub's client has changed its HTTP library twice; its own error class always descends from that library's.
_CLIENT_ERROR: type[Exception] = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SHIPPED_COPIES = {"Qwen/Qwen3-VL-Embedding-2B": "qwen3_vl_embedding_2b"}


@dataclass(frozen=True)
class Source:
    """A folder that holds a base; `shipped` when it came with the package, and its weights may then be random."""

    folder: Path
    shipped: bool

    @property
    def has_weights(self) -> bool:
        """Whether there are safetensors in the folder."""
        return any(self.folder.glob("*.safetensors"))


def shipped_bases() -> dict[str, Path]:
    """The bases that ship in the package, by name: every room may keep some under its `bases/` folder."""
    package = Path(__file__).resolve().parent.parent
    return {config.parent.name: config.parent for config in sorted(package.glob("*/bases/*/config.json"))}


def locate(name: str, revision: str | None, key: str, files: Sequence[str] = SAFE_FILES) -> Source:
    """The folder behind a base's name as the recipe's `key` gives it; hub files that match `files` are fetched or found in the cache."""
    return locate_here(name, revision, key) or Source(fetch(name, revision, files, key), shipped=False)


def locate_here(name: str, revision: str | None, key: str) -> Source | None:
    """As `locate`, but None for a hub id: nothing is asked of the hub."""
    shipped = shipped_bases()
    folder = Path(name).expanduser()
    if revision is not None and (name in shipped or folder.is_dir()):
        raise InputError(f"model.revision: '{revision}' means nothing for {name}, which is no hub repository; set it to null")
    if name in shipped:
        return Source(shipped[name], shipped=True)
    if folder.is_dir():
        return Source(folder, shipped=False)
    if folder.exists():
        raise InputError(f"{key}: {name} is a file; expected the folder that holds config.json")
    if not _HUB_ID.fullmatch(name) or name.startswith((".", "~")):
        raise InputError(
            f"{key}: there is no folder {name}; expected a local folder, a hub id like Qwen/Qwen3-VL-Embedding-2B,"
            f" or one of the shipped bases: {', '.join(shipped)}"
        )
    return None


def locate_config(name: str, revision: str | None, key: str) -> Source:
    """The folder of a base's config alone; a hub base whose config ships in the package needs no network."""
    if name in _SHIPPED_COPIES and not Path(name).is_dir():
        return Source(shipped_bases()[_SHIPPED_COPIES[name]], shipped=True)
    return locate(name, revision, key, ("config.json",))


def fetch(repository: str, revision: str | None, files: Sequence[str], key: str) -> Path:
    """A hub repository's files that match the patterns, as a local folder (the hub's own cache)."""
    at = f" at revision {revision}" if revision else ""
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except (LocalEntryNotFoundError, HfHubHTTPError, _CLIENT_ERROR, OSError) as error:
        final = _final(error, repository, at, key)
        if final is not None:
            raise final from None
        raise UnreachableError(
            f"{key}: '{repository}'{at} is no local folder, and the hub could not be reached ({type(error.__cause__ or error).__name__});"
            " check the network, or name a folder that holds the files"
        ) from None
    except (HFValidationError, ValueError) as error:
        raise InputError(f"{key}: '{repository}' is no hub id: {error}") from None


def _final(error: Exception, repository: str, at: str, key: str) -> InputError | None:
    """The hub's own refusals, which trying again does not mend."""
    if isinstance(error, GatedRepoError):
        return InputError(f"{key}: '{repository}' is gated; accept its terms on the hub and set HF_TOKEN")
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"{key}: '{repository}' has no revision{at.removeprefix(' at revision')}; check model.revision")
    if isinstance(error, RepositoryNotFoundError):
        return InputError(f"{key}: there is neither a local folder nor a hub repository '{repository}' (a private one needs HF_TOKEN)")
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return InputError(f"{key}: '{repository}'{at} lacks a file that was asked for: {error}")
    return None
