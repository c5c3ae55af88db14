"""The recipe under examination, and what several checks need of it: each is made once, by the first check that asks.

Where making it fails, that check tells why, and the others say only where to read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import nn

from stairstep.data import PairRow, QuestionSet, TextRow
from stairstep.models.load import build_on_meta
from stairstep.models.placement import Placement
from stairstep.models.sources import _SHIPPED_COPIES, SAFE_FILES, fetch, shipped_bases
from stairstep.settings import StairstepError
from stairstep.tiles import Archives

from ..packed import open_archives
from ..recipe import Recipe, RetrievalTaskSettings, ray_address
from ..resolve import resolve
from ..run import device_of
from .findings import NotLooked

T = TypeVar("T")


class Patient:
    """A recipe and what is known of it. `deep`: everything is looked at, the network too; else what takes no time."""

    def __init__(self, recipe: Recipe, deep: bool = True, resolved: bool = False) -> None:
        self.recipe, self.deep = recipe, deep
        self.pairs: list[PairRow] = []  # what the data checks have read
        self.texts: list[TextRow] = []
        self.question_sets: list[QuestionSet] = []
        self.tile_size: tuple[int, int] | None = None  # height and width, resized, of the largest tile seen
        self._known: dict[str, Any] = {"recipe": recipe} if resolved else {}
        self._failed: set[str] = set()

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What `make` makes, made once; `name` is that of the check that tells why it cannot be."""
        if name in self._failed:
            raise NotLooked(f"not looked at: see {name}")
        if name not in self._known:
            try:
                self._known[name] = make()
            except (StairstepError, OSError, ValueError):
                self._failed.add(name)
                raise
        return cast(T, self._known[name])

    @property
    def resolved(self) -> Recipe:
        """The recipe as it would run; its world is generated where it is absent."""
        return self.once("recipe", lambda: resolve(self.recipe))

    @property
    def archives(self) -> Archives:
        """The recipe's archives; what is not indexed yet is now."""
        recipe = self.resolved
        return self.once("archives", lambda: open_archives(recipe))

    @property
    def retrieval(self) -> bool:
        """Whether the task reads rows and tiles; pretraining tasks draw their own pages."""
        return isinstance(self.recipe.task, RetrievalTaskSettings)

    @property
    def elsewhere(self) -> bool:
        """Whether the workers run on a cluster that was there before, and so perhaps not on this machine."""
        cluster = self.recipe.cluster
        return bool(cluster.workers) and ray_address(cluster.address) != "local"

    @property
    def device(self) -> torch.device:
        """Where a worker on this machine would compute."""
        return self.once("device", lambda: _device(self.recipe))

    @property
    def meta(self) -> tuple[nn.Module, Placement]:
        """The model with its adapter, names and shapes alone."""
        return self.once("adapter", self._on_meta)

    def _on_meta(self) -> tuple[nn.Module, Placement]:
        settings = self.recipe.model
        if settings.base in _SHIPPED_COPIES or not is_hub_id(settings.base):  # no network either way
            return build_on_meta(settings)
        cached = in_hub_cache(settings.base, settings.revision, "config.json")
        if cached is None and not self.deep:
            raise NotLooked("the base's config is not in the hub's cache yet")
        folder = cached.parent if cached is not None else fetch(settings.base, settings.revision, ("config.json",), "model.base")
        return build_on_meta(replace(settings, base=str(folder), revision=None))


def _device(recipe: Recipe) -> torch.device:
    if recipe.cluster.device == "cpu" or not torch.cuda.is_available():
        return device_of(recipe)
    return torch.device("cuda", 0)  # any: opening one in the driver would take memory from its worker


def is_hub_id(name: str) -> bool:
    """Whether a name can only mean a repository of the hub."""
    return name.count("/") == 1 and not name.startswith(("/", ".", "~")) and name not in shipped_bases() and not Path(name).exists()


def in_hub_cache(name: str, revision: str | None, file: str) -> Path | None:
    """A file of a hub repository in the hub's cache on this machine, without the network; None where it is not."""
    try:
        found = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
    except (HFValidationError, ValueError):
        return None
    return Path(found) if isinstance(found, str) else None


def hub_folder(name: str, revision: str | None) -> Path | None:
    """The cached snapshot of a hub repository, whole or not; None where there is none."""
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(SAFE_FILES), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, ValueError, OSError):
        return None
