"""What Ray's exporters hand out, as a Prometheus server would fetch it, and the names that our dashboard asks for."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DASHBOARD = Path(__file__).resolve().parents[2] / "docs" / "cluster" / "grafana.json"
_NAME = re.compile(r"\bray_\w+")
_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Sample:
    """One line of what was scraped."""

    name: str
    labels: dict[str, str]
    value: float


def scrape() -> list[Sample]:
    """All samples of all nodes of the Ray that this process is connected to."""
    import ray

    found = []
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for node in ray.nodes():
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with opener.open(address, timeout=60) as answer:
            for line in answer.read().decode().splitlines():
                if sample := _SAMPLE.match(line):
                    found.append(Sample(sample[1], dict(_LABEL.findall(sample[2] or "")), float(sample[3])))
    return found


def queries() -> Iterator[str]:
    """Every query of the dashboard, of its panels and of its variables."""
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"]
    for one in board["templating"]["list"]:
        if one["type"] == "query":
            yield one["query"]["query"]


def names_asked_for() -> set[str]:
    """The names of the metrics that the dashboard asks for."""
    return {name for query in queries() for name in _NAME.findall(query)}
