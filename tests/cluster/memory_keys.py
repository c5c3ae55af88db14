"""Keys and values as Ray keeps them for a cluster, in this process alone: for tests of who uses them."""

from __future__ import annotations


class MemoryKeys:
    """See `stairstep.cluster.words.Keys`."""

    def __init__(self) -> None:
        self._kept: dict[str, bytes] = {}

    def put(self, key: str, value: bytes) -> None:
        """Keep a value, in place of one that is there."""
        self._kept[key] = value

    def get(self, key: str) -> bytes | None:
        """A value, or None."""
        return self._kept.get(key)

    def below(self, prefix: str) -> list[str]:
        """The keys that begin so."""
        return [one for one in self._kept if one.startswith(prefix)]

    def forget(self, prefix: str) -> None:
        """Delete all keys that begin so."""
        for one in self.below(prefix):
            del self._kept[one]
