"""Records: the run folder, its atomic files and folders, the metric log, trackers, and what a person sees of a run."""

from .claim import Claim
from .environment import describe_environment, source_digest
from .files import (
    append_line,
    digest_of_file,
    digest_of_folder,
    digest_of_json,
    read_json,
    read_json_lines,
    write_atomically,
    write_json,
)
from .folders import commit_folder, is_complete, new_folder, remove_folder
from .log import logging_setup
from .metrics import VOLATILE, MetricLog, comparable, is_volatile, series
from .progress import Progress
from .resume import differences
from .run_folder import Checkpoint, Opening, RunFolder, check_set_name, result_paths
from .settings import CheckpointSettings, RunSettings, TrackerSettings
from .status import Status
from .stopping import StopFlag
from .trackers import NoTracker, Tracker, check_trackers, open_trackers

__all__ = [
    "VOLATILE",
    "Checkpoint",
    "CheckpointSettings",
    "Claim",
    "MetricLog",
    "NoTracker",
    "Opening",
    "Progress",
    "RunFolder",
    "RunSettings",
    "Status",
    "StopFlag",
    "Tracker",
    "TrackerSettings",
    "append_line",
    "check_set_name",
    "check_trackers",
    "commit_folder",
    "comparable",
    "describe_environment",
    "differences",
    "digest_of_file",
    "digest_of_folder",
    "digest_of_json",
    "is_complete",
    "is_volatile",
    "logging_setup",
    "new_folder",
    "open_trackers",
    "read_json",
    "read_json_lines",
    "remove_folder",
    "result_paths",
    "series",
    "source_digest",
    "write_atomically",
    "write_json",
]
