"""The bottom floor: typed settings, YAML with origins, strict building, the project's exceptions. Knows nothing of any room above."""

from .build import build, to_plain, to_yaml
from .errors import DataError, InputError, RecipeError, StairstepError, TileError, TrainingError, UnreachableError
from .fields import SettingError, setting
from .schema import json_schema
from .tree import Node, apply_overrides, from_plain, load_tree, merge, parse_yaml

__all__ = [
    "DataError",
    "InputError",
    "Node",
    "RecipeError",
    "SettingError",
    "StairstepError",
    "TileError",
    "TrainingError",
    "UnreachableError",
    "apply_overrides",
    "build",
    "from_plain",
    "json_schema",
    "load_tree",
    "merge",
    "parse_yaml",
    "setting",
    "to_plain",
    "to_yaml",
]
