"""What is recorded of the machine and the software, and that no secret is."""

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch

from stairstep.records.environment import describe_environment, git_state, same_software, source_digest


def test_it_names_what_a_second_run_needs_and_is_json(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "canary-31415")
    found = describe_environment()
    text = json.dumps(found, allow_nan=False)
    assert "canary-31415" not in text
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"]["threads"] == torch.get_num_threads()
    assert len(found["torch"]["devices"]) == torch.cuda.device_count()
    assert found["cpu"]["count"] == os.cpu_count()
    assert "devices" not in describe_environment(devices=False)["torch"]


def test_absent_packages_are_none_and_nothing_is_imported():
    code = "import sys; from stairstep.records.environment import versions; v = versions(); assert 'wandb' in v and 'ray' in v; "
    code += "assert not {'ray', 'wandb', 'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}).returncode == 0


def test_the_source_digest_sees_source_and_not_caches(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    first = source_digest(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.py").write_text("x")
    (tmp_path / "a.pyc").write_text("x")
    assert source_digest(tmp_path) == first
    (tmp_path / "a.py").write_text("x = 2")
    second = source_digest(tmp_path)
    (tmp_path / "b.json").write_text("{}")
    assert len({first, second, source_digest(tmp_path)}) == 3
    assert source_digest() == source_digest()


def _git(folder, *arguments):
    settings = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(folder), *settings, *arguments], check=True, capture_output=True)


def test_git_commit_and_dirtiness(tmp_path):
    package = tmp_path / "repo" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    assert git_state(package) is None
    try:
        _git(tmp_path / "repo", "init", "-q")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    assert git_state(package) is None, "an untracked copy inside somebody's checkout has no commit"
    _git(tmp_path / "repo", "add", ".")
    _git(tmp_path / "repo", "commit", "-q", "-m", "one")
    state = git_state(package)
    assert len(state["commit"]) == 40 and state["dirty"] is False
    (package / "__init__.py").write_text("x = 1")
    assert git_state(package) == {**state, "dirty": True}


def test_no_git_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None


def test_software_is_python_versions_and_source():
    one = {"python": "3", "versions": {"a": "1"}, "source": "d", "cpu": 1}
    assert same_software(one, {**one, "cpu": 2})
    assert not same_software(one, {**one, "source": "e"})
    assert not same_software(one, {**one, "versions": {"a": "2"}})
