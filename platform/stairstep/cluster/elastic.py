"""How many workers a group has, and when a running group gives way to another: an elastic run (`cluster.min_workers`) goes on with fewer
workers when nodes leave, and with more when they return.

Whether there is room is asked of Ray by reservations, one for each worker: Ray reserves only what is free, an autoscaler sees what is
wanted, and what a larger group needs stays reserved until the smaller one has stopped. Ray Train's own elastic groups are not used: they
count what nodes have and not what is free, and after a loss they wait a whole start timeout for the size that has just been lost. A batch
is cut into chunks alike for any number of workers (objectives/chunks.py), so the curve stays the same to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from ray._private.state import state as ray_state  # no public function tells what is being drained; Ray Train asks here too
from ray.util import placement_group, placement_group_table, remove_placement_group

from stairstep.tasks import ClusterSettings

SETTLE_S = 10.0  # what has been there so long is taken for what there is
_LOOK_S = 2.0


class Room:
    """Places for workers that are not running yet, asked of Ray; whatever is there stays ours until `close`."""

    def __init__(self, each: Mapping[str, float]) -> None:
        self._each = dict(each)
        self._places: list[Any] = []

    def ask(self, count: int) -> None:
        """Want so many places in all, those that are there already among them."""
        if len(self._places) > count:
            self._places.sort(key=_is_there, reverse=True)
        while len(self._places) > count:
            remove_placement_group(self._places.pop())
        while len(self._places) < count:
            self._places.append(placement_group([self._each]))

    def there(self) -> int:
        """How many of the places that were asked for are there."""
        return sum(map(_is_there, self._places))

    def close(self) -> None:
        """Give all places back."""
        while self._places:
            remove_placement_group(self._places.pop())


def _is_there(place: Any) -> bool:
    return bool(placement_group_table(place).get("state") == "CREATED")


class _Steady:
    """For how long a number has been the same."""

    def __init__(self) -> None:
        self._value, self._since = -1, 0.0

    def seconds(self, value: int, now: float) -> float:
        if value != self._value:
            self._value, self._since = value, now
        return now - self._since


class Sizing:
    """How many workers the next group has: all of them as soon as there is room, and fewer once waiting for more is not worth it.

    The first group waits for all of them to the end of its patience, for a cluster that grows needs minutes; a later one, and the first on
    a cluster that cannot grow, takes what has been there for `SETTLE_S`. Fewer than `least` are waited for to the end of the patience."""

    def __init__(self, least: int, most: int, patience_s: float, hasty: bool, now: float) -> None:
        self.least, self.most, self.patience_s, self.hasty = least, most, patience_s, hasty
        self._began = now
        self._steady = _Steady()

    def decide(self, there: int, now: float) -> int | None:
        """The size of the group; None: not yet. Raises TimeoutError where even the fewest did not come."""
        settled = self._steady.seconds(there, now) >= SETTLE_S
        over = now - self._began >= self.patience_s
        if there >= self.most:
            return self.most
        if there >= self.least and (over or (self.hasty and settled)):
            return there
        if over:
            raise TimeoutError
        return None


class GroupWatch:
    """Looks, while a group of workers trains, whether it had better stop at a checkpoint and be set up anew."""

    def __init__(self, cluster: ClusterSettings, size: int, room: Room, nodes: Callable[[], set[str]]) -> None:
        """`nodes`: those of the group's workers, as far as they are known."""
        self._missing = cluster.workers - size
        self._room, self._nodes = room, nodes
        self._grow_at = time.monotonic() + cluster.grow_after_s
        self._look_at = 0.0
        self._steady = _Steady()
        self.leaving = False
        """Whether a node of this group is about to go: its loss is no failure."""

    def why(self, grows: Callable[[], bool], asked: bool = False) -> str:
        """Why the group is to stop; empty where it is not. Looks every few seconds; asks for room only while the run `grows`.

        A group that was `asked` to stop needs a while for it, and one of its nodes may be taken back meanwhile; room stays as it is."""
        now = time.monotonic()
        if now < self._look_at:
            return ""
        self._look_at = now + _LOOK_S
        if gone := self._nodes() & set(ray_state.get_draining_nodes()):
            self.leaving = True
            return f"a node of the workers is about to go ({', '.join(sorted(one[:12] for one in gone))})"
        if asked or not self._missing:
            return ""
        self._room.ask(self._missing if grows() else 0)
        more = self._room.there()
        settled = self._steady.seconds(more, now) >= SETTLE_S
        if more and settled and now >= self._grow_at:
            return f"there is room for {more} more of {self._missing} missing workers"
        return ""
