"""The bottom floor: typed settings, YAML with origins, strict building, the project's exceptions. Knows nothing of any room above."""

from .build import build, to_plain, to_yaml
from .errors import (
    DataError,
    FetchError,
    InputError,
    MissingDataError,
    RecipeError,
    StairstepError,
    TileError,
    TrainingError,
    UnreachableError,
)
from .fields import SettingError, setting
from .nodes import Node, Origin, describe, from_plain
from .schema import json_schema
from .tree import apply_overrides, load_tree, merge
from .yaml_text import parse_yaml

__all__ = [
    "DataError",
    "FetchError",
    "InputError",
    "MissingDataError",
    "Node",
    "Origin",
    "RecipeError",
    "SettingError",
    "StairstepError",
    "TileError",
    "TrainingError",
    "UnreachableError",
    "apply_overrides",
    "build",
    "describe",
    "from_plain",
    "json_schema",
    "load_tree",
    "merge",
    "parse_yaml",
    "setting",
    "to_plain",
    "to_yaml",
]
