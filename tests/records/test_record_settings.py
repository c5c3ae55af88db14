"""What the sections run, checkpoints and trackers take."""

import pytest

from stairstep.records import CheckpointSettings, RunSettings, TrackerSettings
from stairstep.settings import RecipeError, build, parse_yaml


def test_defaults_are_valid():
    for cls in (RunSettings, CheckpointSettings, TrackerSettings):
        assert build(cls, parse_yaml("", "r.yaml")) == cls()
    assert TrackerSettings().wandb == "off" and RunSettings().resume == "auto"


@pytest.mark.parametrize(
    ("cls", "text", "words"),
    [
        (RunSettings, "name: a/b", "plain folder name"),
        (RunSettings, "name: ..", "plain folder name"),
        (RunSettings, "name: ''", "plain folder name"),
        (RunSettings, "root: s4://bucket/x", "did you mean s3"),
        (RunSettings, "root: ''", "expected a folder"),
        (RunSettings, "resume: sometimes", "'auto' or 'never' or 'overwrite'"),
        (RunSettings, "threads: 0", "at least 1"),
        (RunSettings, "seed: -1", "at least 0"),
        (CheckpointSettings, "keep: 0", "at least 1"),
        (CheckpointSettings, "every: 0", "at least 1"),
        (TrackerSettings, "wandb: true", "'off' or 'offline' or 'online'"),
    ],
)
def test_bad_values_name_file_line_and_key(cls, text, words):
    with pytest.raises(RecipeError, match=words) as error:
        build(cls, parse_yaml(text, "r.yaml"))
    assert str(error.value).startswith("r.yaml:1: " + text.split(":")[0])


def test_off_is_a_word():
    assert build(TrackerSettings, parse_yaml("wandb: off", "r.yaml")).wandb == "off"
