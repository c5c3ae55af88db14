"""A recipe's own reader, asked where it is served: one copy for all trials instead of one in each of their processes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stairstep.evaluation.readers import RemoteReaderSettings
from stairstep.evaluation.settings import LocalReaderSettings
from stairstep.tasks import Recipe

_AT_ONCE = 4


@dataclass(frozen=True)
class ServedReader:
    """A reader that is served for the length of a sweep: its model's name, where it listens, and which weights it has."""

    model: str
    url: str
    weights: str


def asked_where_served(recipe: Recipe, served: ServedReader | None) -> Recipe:
    """The recipe with its own reader asked where one of that model is served; what else it says of its reader stays as it is."""
    reader = recipe.evaluation.reader
    if served is None or not isinstance(reader, LocalReaderSettings) or reader.model != served.model:
        return recipe
    remote = RemoteReaderSettings(
        model=reader.model,
        base_url=served.url,
        revision=served.weights,  # so that answers of other weights are asked anew
        system=reader.system,
        max_new_tokens=reader.max_new_tokens,
        concurrency=_AT_ONCE,
    )
    return replace(recipe, evaluation=replace(recipe.evaluation, reader=remote))
