"""What the driver of a run and the workers of one group tell each other, by the keys and values that Ray keeps for a cluster.

So it reaches every node at once, whether nodes share a file system or not, and is gone with the Ray that it was said on: what has to last
stands in the run folder. The driver asks a group to stop; the workers say on which nodes they are, what the first one shows on its
screen, and the error that ended them, where another try would meet it again.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from typing import Any, Protocol

from ray.experimental import internal_kv  # Ray's Serve and Data keep theirs there; no public function does

_SPACE = b"stairstep"
_LOOK_S = 0.5


class Keys(Protocol):
    """Values by key, the same for all processes of a cluster."""

    def put(self, key: str, value: bytes) -> None:
        """Keep a value, in place of one that is there."""

    def get(self, key: str) -> bytes | None:
        """A value, or None."""

    def below(self, prefix: str) -> list[str]:
        """The keys that begin so."""

    def forget(self, prefix: str) -> None:
        """Delete all keys that begin so."""


class RayKeys:
    """Those of the Ray that this process is connected to."""

    def put(self, key: str, value: bytes) -> None:
        """Keep a value, in place of one that is there."""
        internal_kv._internal_kv_put(key, value, overwrite=True, namespace=_SPACE)

    def get(self, key: str) -> bytes | None:
        """A value, or None."""
        return internal_kv._internal_kv_get(key, namespace=_SPACE)

    def below(self, prefix: str) -> list[str]:
        """The keys that begin so."""
        return [one.decode() for one in internal_kv._internal_kv_list(prefix, namespace=_SPACE)]

    def forget(self, prefix: str) -> None:
        """Delete all keys that begin so."""
        internal_kv._internal_kv_del(prefix, del_by_prefix=True, namespace=_SPACE)


class Words:
    """The words of one group; `group` is a name that no other group has."""

    def __init__(self, group: str, keys: Keys | None = None) -> None:
        self.group, self._keys = group, keys or RayKeys()
        self._shown = self._seen = 0
        self._looked, self._stop = float("-inf"), False
        self._lock = threading.RLock()  # what Ray says meanwhile may be shown as well

    # --- the driver's

    def ask_to_stop(self, why: str) -> None:
        """Ask the group to end its step and to stop at a checkpoint."""
        self._keys.put(self._key("stop"), why.encode())

    def seen(self) -> bytes | None:
        """The next piece that the first worker has shown; None where there is none yet. The first one, which is empty, is its beginning."""
        key = self._key(f"shown/{self._seen}.")  # the dot: what begins like 1 is not 10
        piece = self._keys.get(key)
        if piece is not None:
            self._seen += 1
            self._keys.forget(key)
        return piece

    def nodes(self) -> set[str]:
        """The nodes of the group's workers."""
        begin = self._key("on/")
        return {one.removeprefix(begin) for one in self._keys.below(begin)}

    def failure(self) -> dict[str, Any] | None:
        """The error that ended the group, as a worker told it."""
        told = self._keys.get(self._key("failure"))
        return json.loads(told) if told else None

    def forget(self) -> None:
        """The group has ended, and all that was said of it is known."""
        self._keys.forget(self._key(""))

    # --- the workers'

    def asked_to_stop(self) -> bool:
        """Whether the driver wants the group to stop, as of half a second ago at most: a look takes a millisecond, steps may be short."""
        if time.monotonic() - self._looked >= _LOOK_S:
            self._looked, self._stop = time.monotonic(), self._keys.get(self._key("stop")) is not None
        return self._stop

    def show(self, text: bytes) -> None:
        """A piece of the first worker's screen."""
        with self._lock:
            number, self._shown = self._shown, self._shown + 1
        self._keys.put(self._key(f"shown/{number}."), text)

    def tell_node(self, node: str) -> None:
        """A worker is on this node."""
        self._keys.put(self._key(f"on/{node}"), b"")

    def tell_failure(self, record: Mapping[str, Any]) -> None:
        """An error that another try would meet again."""
        self._keys.put(self._key("failure"), json.dumps(record).encode())

    def _key(self, name: str) -> str:
        return f"{self.group}/{name}"
