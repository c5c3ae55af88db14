"""Ending Ray Train's wait for the workers' room, which can be half an hour where a cluster has to grow.

Its controller hears nothing while it waits, its own `abort` included. So the room that it waits for is taken back from outside: then it
ends as at the end of its start timeout, by itself, and leaves no wish for room behind that would outlive it. To be killed would leave one:
Ray lets go of a place only when the whole job has ended, and that is a sweep's last trial.
"""

from __future__ import annotations

import ray
from ray._private.state import state as ray_state  # no public function tells who asked for a place
from ray.core.generated.gcs_pb2 import ActorTableData, PlacementGroupTableData
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup


def end_waiting() -> int:
    """Take back every place that an actor of this process still waits for, as Ray Train's controller does; returns how many there were."""
    accessor = ray_state._connect_and_get_accessor()
    mine = bytes.fromhex(ray.get_runtime_context().get_worker_id())
    ended = 0
    for raw in accessor.get_placement_group_table():
        place = PlacementGroupTableData.FromString(raw)
        if place.state != PlacementGroupTableData.PENDING or not any(place.creator_actor_id):
            continue
        asking = accessor.get_actor_info(ray.ActorID(place.creator_actor_id))
        if asking is not None and ActorTableData.FromString(asking).owner_address.worker_id == mine:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(place.placement_group_id)))
            ended += 1
    return ended
