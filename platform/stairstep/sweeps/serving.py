"""A recipe's own reader, asked where it is served: one copy for all trials instead of one in each of their processes."""

from __future__ import annotations

from stairstep.evaluation.readers import RemoteReaderSettings
from stairstep.evaluation.settings import LocalReaderSettings
from stairstep.models.digest import folder_identity, of_json
from stairstep.models.sources import locate

_AT_ONCE = 4


def served_reader(reader: LocalReaderSettings, url: str) -> RemoteReaderSettings:
    """A local reader as it is asked at an address; its weights stand in the revision, so that other weights are asked anew."""
    weights = of_json(folder_identity(locate(reader.model, None, "evaluation.reader.model").folder))
    return RemoteReaderSettings(
        model=reader.model,
        base_url=url,
        revision=weights[:16],
        system=reader.system,
        max_new_tokens=reader.max_new_tokens,
        concurrency=_AT_ONCE,
    )
