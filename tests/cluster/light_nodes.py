"""Nodes for Ray's autoscaler that are processes here: those of Ray's own provider of fakes, lighter, and with time to start.

Each of Ray's starts a log monitor and a full dashboard agent, and is given up after 30 seconds, which is too short for a machine that has
other work; what was given up stays behind. Runs in the monitor process of a head.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import ray._private.parameter
import ray._private.services
import ray._private.utils
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

PATIENCE_S = 90.0  # a raylet whose agent has not come within thirty seconds ends itself
_get_node = ray._private.services.get_node


def _patient_get_node(address: str, node: str) -> Any:
    """What the GCS knows of a node, once it knows it."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return _get_node(address, node)
        except RuntimeError:
            if time.monotonic() > end:
                raise
        time.sleep(0.2)


class LightNodes(FakeMultiNodeProvider):
    """Nodes without log monitor and dashboard, waited for."""

    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        params = partial(ray._private.parameter.RayParams, include_log_monitor=False)
        with ExitStack() as stack:
            stack.enter_context(patch.object(ray._private.parameter, "RayParams", params))
            stack.enter_context(patch.object(ray._private.services, "get_node", _patient_get_node))
            stack.enter_context(patch.object(ray._private.utils, "get_dashboard_dependency_error", lambda: ImportError("left out")))
            super()._create_node_with_resources_and_labels(*arguments)
