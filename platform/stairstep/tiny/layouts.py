"""How a page looks: a table of layout families.

`WORLD_LAYOUTS` are tinywiki's ordinary pages and `SHIFTED_LAYOUTS` its unusual ones (light on dark, coloured bands, values at the right
edge); what a model meets in `PRETRAINING_LAYOUTS` is always dark on light, so the shifted ones ask something of a vision tower that it has
not seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Layout:
    """Colours and places of one family of pages; a part whose colour is None is not drawn."""

    name: str
    paper: Colour
    ink: Colour
    title: Colour
    label: Colour
    band: Colour | None = None  # behind the title
    rule: Colour | None = None  # a line under the title
    panel: Colour | None = None  # behind the facts
    frame: Colour | None = None  # around the page
    lines: Colour | None = None  # under each line of content
    align: Literal["left", "centre"] = "left"  # of the title
    values: Literal["run", "column", "right"] = "run"  # where the value of a fact stands
    bold_labels: bool = False
    margin: int = 6


_ALL = (
    Layout("article", (255, 255, 255), (32, 33, 34), (0, 0, 0), (32, 33, 34), rule=(162, 169, 177), bold_labels=True),
    Layout(
        "infobox",
        (255, 255, 255),
        (32, 33, 34),
        (16, 20, 40),
        (72, 78, 86),
        band=(206, 218, 236),
        panel=(246, 247, 249),
        frame=(162, 169, 177),
        align="centre",
        values="column",
    ),
    Layout("night", (20, 24, 30), (222, 226, 230), (138, 180, 248), (150, 158, 168), rule=(70, 78, 88), values="column"),
    Layout(
        "poster",
        (244, 226, 190),
        (88, 40, 20),
        (255, 244, 214),
        (150, 80, 40),
        band=(150, 48, 40),
        lines=(220, 190, 140),
        values="right",
    ),
    Layout("plain", (255, 255, 255), (0, 0, 0), (0, 0, 0), (0, 0, 0)),
    Layout("boxed", (250, 250, 250), (40, 40, 40), (0, 0, 0), (90, 90, 90), frame=(80, 80, 80), values="column", margin=8),
    Layout("ruled", (252, 252, 246), (30, 30, 70), (30, 30, 70), (30, 30, 70), lines=(200, 214, 232), bold_labels=True),
    Layout("note", (255, 250, 224), (60, 50, 30), (20, 60, 30), (110, 90, 50), band=(236, 226, 180), align="centre", margin=5),
)

LAYOUTS = {one.name: one for one in _ALL}
WORLD_LAYOUTS = ("article", "infobox")
SHIFTED_LAYOUTS = ("night", "poster")
PRETRAINING_LAYOUTS = ("plain", "boxed", "ruled", "note")
