"""Bad input as a person meets it: one clear message, exit code 2 (1 where the network is at fault), no traceback, nothing half-written.

Most of it goes through the jobs' `main` in this process; those at the end are real commands in processes of their own.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

ROOT = Path(__file__).resolve().parents[2]
Job = Callable[..., Any]


def message(told: Any, code: int = 2) -> str:
    """The one message of a job that refused."""
    assert told.code == code, told.err
    assert "Traceback" not in told.err
    assert told.err.count("error: ") == 1, told.err
    return told.err[told.err.index("error: ") + len("error: ") :]


def half_written(folder: Path) -> list[Path]:
    """Temporary files, drafts and results that a refusal should not leave behind."""
    allowed = {"recipe.yaml", "environment.json", "status.json", "quarantine.jsonl", ".lock"}
    runs = (folder / "small", folder / "evaluations")
    return [path for run in runs for path in run.rglob("*") if path.is_file() and path.name not in allowed]


# --- the recipe and the command line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim: {batch: 4\n", ["bad.yaml:", "this is not valid YAML"]),
        ("optim:\n\tbatch: 4\n", ["bad.yaml:2", "tabs"]),
        ("optim:\n  batchs: 4\n", ["bad.yaml:2: unknown key 'optim.batchs'; did you mean 'optim.batch'?"]),
        ("optim:\n  batch: many\n", ["bad.yaml:2: optim.batch: expected a whole number at least 1, found", "'many'"]),
        ("optim: {batch: 0}\n", ["bad.yaml:1: optim.batch: expected a whole number at least 1, found", "0"]),
        (
            "task: {kind: retreival}\n",
            ["bad.yaml:1: task.kind: expected 'retrieval'", "found the text 'retreival'; did you mean 'retrieval'?"],
        ),
        ("extends: bad.yaml\n", ["bad.yaml:1: extends: ", "in a circle", "bad.yaml → ", "remove one"]),
        ("extends: nowhere.yaml\n", ["bad.yaml:1: extends: ", "nowhere.yaml: there is no such recipe"]),
        ("- optim\n", ["bad.yaml:1: a recipe is a mapping of keys, found"]),
        ("phases: {text_warmup_steps: 9}\noptim: {steps: 5}\n", ["bad.yaml:1: phases.text_warmup_steps: 9 is more than optim.steps (5)"]),
        ("evaluation: {pairs: 9}\n", ["bad.yaml:1: evaluation.pairs: ", "data.validation"]),
        ("data: {max_quarantined: 1, check_tiles: false}\n", ["bad.yaml:1: data.max_quarantined: ", "check_tiles"]),
        ("\x00\x01PNG", ["bad.yaml:1: this is not valid YAML"]),
    ],
    ids=lambda value: value[:25] if isinstance(value, str) else "",
)
def test_a_bad_recipe(job: Job, tmp_path: Path, text: str, expected: list[str]) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(text)
    for verb, flag in (("train", "--show"), ("evaluate", "--base")):
        told = message(job(verb, recipe, flag))
        assert all(part in told for part in expected), told
        assert str(recipe) in told
    assert list(tmp_path.iterdir()) == [recipe]


def test_a_cycle_names_every_recipe_in_it(job: Job, tmp_path: Path) -> None:
    for one, other in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{one}.yaml").write_text(f"extends: {other}.yaml\n")
    told = message(job("train", tmp_path / "a.yaml"))
    assert all(str(tmp_path / f"{name}.yaml") in told for name in "abc"), told


def test_a_missing_recipe_and_its_neighbour(job: Job, small: Any) -> None:
    told = message(job("train", small.recipe.with_name("smal.yaml")))
    assert "there is no such recipe" in told
    assert f"did you mean {small.recipe}?" in told
    assert "this is a folder" in message(job("evaluate", small.data, "--base"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.batch", ["'optim.batch': expected an override of the form key.path=value"]),
        ("optim.batch=many", ["override optim.batch=many: optim.batch: expected a whole number"]),
        ("optim.bach=4", ["override optim.bach=4: unknown key 'optim.bach'; did you mean 'optim.batch'?"]),
        ("optim.batch=[", ["override optim.batch=[: this is not valid YAML"]),
        ("evaluation.sets[0].limit=3", ["a list is given whole"]),
        ("run.root=s4://bucket/runs", ["run.root: s4://…: this kind of place is not known; did you mean s3://?"]),
        (
            "run.root=s3://ID:hunter2@bucket/runs",
            ["override run.root=s3://…@bucket/runs: run.root: s3://bucket/runs: this URL holds credentials"],
        ),
    ],
)
def test_a_bad_override(job: Job, small: Any, override: str, expected: list[str]) -> None:
    told = message(job("train", small.recipe, override))
    assert all(part in told for part in expected), told
    assert not small.runs.exists()


def test_a_variable_that_is_not_set_or_leads_nowhere(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = ROOT / "recipes" / "v8r.yaml"
    root = f"run.root={tmp_path / 'runs'}"
    monkeypatch.delenv("DATA_ROOT", raising=False)
    told = message(job("evaluate", recipe, "--base", root))
    assert "data.roots: the environment variable $DATA_ROOT is not set; export it, or override data.roots" in told
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "nowhere"))
    told = message(job("evaluate", recipe, "--base", root))
    assert f"data.roots[0]: there is no folder '{tmp_path / 'nowhere'}'" in told
    assert list(tmp_path.iterdir()) == []


def test_flags_that_do_not_exist_or_exclude_each_other(job: Job, small: Any) -> None:
    for arguments in (["--bse"], ["--base", "--checkpoint", "x"]):
        told = message(job("evaluate", small.recipe, *arguments))
        assert any(part in told for part in ("--bse", "not allowed with argument")), told
    assert "nowhere: there is no such checkpoint folder" in message(job("evaluate", small.recipe, "--checkpoint", "nowhere"))


# --- data


def png(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def put_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def first_positive(small: Any) -> Path:
    return (small.data / rows_of(small.data / "train_hn.jsonl")[0]["chunk_path"]).resolve()


def no_training_file(small: Any) -> list[str]:
    (small.data / "train_hn.jsonl").unlink()
    return [f"{small.data}/train_hn.jsonl: there is no such data file", "correct the path in the recipe, or fetch the data"]


def broken_line(small: Any) -> list[str]:
    path = small.data / "train_hn.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = lines[2][:-9]
    path.write_text("\n".join(lines))
    return [f"{path}:3: this is not valid JSON"]


def row_without_tile(small: Any) -> list[str]:
    path = small.data / "train_hn.jsonl"
    rows = rows_of(path)
    del rows[1]["chunk_path"]
    put_rows(path, rows)
    return [f"{path}:2: chunk_path: this key is missing"]


def tile_away(small: Any) -> list[str]:
    path = first_positive(small)
    path.unlink()
    return ["1 tiles are missing", f"train_hn.jsonl:1: {path}", "fetch or unpack them"]


def positive_is_text(small: Any) -> list[str]:
    path = first_positive(small)
    path.write_text("<html>404 Not Found</html>")
    return [str(path), "this is not an image", "named by", "train_hn.jsonl:1", "quarantine.jsonl", "data.max_quarantined=1"]


def negative_is_cut(small: Any) -> list[str]:
    rows = rows_of(small.data / "train_hn.jsonl")
    positives = {row["chunk_path"] for row in rows}
    line, name = next((line, name) for line, row in enumerate(rows, 1) for name in row["neg_chunk_paths"][:2] if name not in positives)
    path = (small.data / name).resolve()
    path.write_bytes(path.read_bytes()[:200])
    return [str(path), "this PNG file is damaged and cannot be decoded", f"train_hn.jsonl:{line}"]


def path_out_of_roots(small: Any) -> list[str]:
    path = small.data / "train_hn.jsonl"
    rows = rows_of(path)
    rows[3]["chunk_path"] = "../small.yaml"
    put_rows(path, rows)
    return [f"{path}:4: chunk_path: '../small.yaml' leads to {small.recipe}, which lies outside data.roots"]


def absolute_path_out_of_roots(small: Any) -> list[str]:
    path = small.data / "train_hn.jsonl"
    rows = rows_of(path)
    rows[3]["neg_chunk_paths"] = ["/etc/hostname"]
    put_rows(path, rows)
    return [f"{path}:4: neg_chunk_paths[0]: '/etc/hostname' leads to", "outside data.roots"]


def link_out_of_roots(small: Any) -> list[str]:
    path = first_positive(small)
    outside = small.data.parent / "outside.png"
    path.rename(outside)
    path.symlink_to(outside)
    return ["train_hn.jsonl:1", str(outside), "outside data.roots"]


def folder_out_of_roots(small: Any) -> list[str]:
    folder = first_positive(small).parent
    outside = small.data.parent / "outside"
    folder.rename(outside)
    folder.symlink_to(outside)
    return ["train_hn.jsonl:1: chunk_path: ", str(outside), "outside data.roots"]


TRAINING = [
    no_training_file,
    broken_line,
    row_without_tile,
    tile_away,
    positive_is_text,
    negative_is_cut,
    path_out_of_roots,
    absolute_path_out_of_roots,
    link_out_of_roots,
    folder_out_of_roots,
]


@pytest.mark.parametrize("spoil", TRAINING, ids=lambda one: one.__name__)
def test_bad_training_data(job: Job, small: Any, spoil: Callable[[Any], list[str]]) -> None:
    expected = spoil(small)
    told = message(job("train", small.recipe))
    assert all(part in told for part in expected), f"{expected} not in:\n{told}"
    assert half_written(small.runs) == []
    told_by = small.runs / "small" / "status.json"
    if not told_by.exists():  # refused before there was a run; training itself refuses it in the same words
        told = message(job("train", small.recipe, "--no-preflight"))
        assert all(part in told for part in expected), f"{expected} not in:\n{told}"
    status = json.loads(told_by.read_text())
    assert (status["state"], status["step"]) == ("failed", 0)
    assert expected[0] in status["message"]


def candidate(small: Any) -> Path:
    return small.files("test/tiles/*.png")[0]


def candidate_is_text(small: Any) -> list[str]:
    candidate(small).write_text("not an image")
    return [str(candidate(small)), "this is not an image", "tinywiki.json"]


def candidate_is_cut(small: Any) -> list[str]:
    path = candidate(small)
    path.write_bytes(path.read_bytes()[:-40])
    return [str(path), "this PNG file is damaged and cannot be decoded", "tinywiki.json"]


def candidate_is_empty(small: Any) -> list[str]:
    candidate(small).write_bytes(b"")
    return [str(candidate(small)), "the file is empty"]


def candidate_announces_a_billion_pixels(small: Any) -> list[str]:
    candidate(small).write_bytes(png(40_000, 25_000))
    return [str(candidate(small)), "40000×25000 = 1000000000 pixels, more than tiles.max_image_pixels = 80000000"]


def candidate_is_a_link_out_of_roots(small: Any) -> list[str]:
    path, outside = candidate(small), small.data.parent / "outside.png"
    path.rename(outside)
    path.symlink_to(outside)
    return [f"{path}: this leads to {outside}, which lies outside data.roots"]


def no_question_set(small: Any) -> list[str]:
    path = small.data / "test" / "tinywiki.json"
    path.unlink()
    return [f"{path}: there is no such question set"]


def no_questions(small: Any) -> list[str]:
    path = small.data / "test" / "tinywiki.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({**tree, "questions": []}))
    return [f"{path}: questions: there are no questions"]


def set_is_cut(small: Any) -> list[str]:
    path = small.data / "test" / "tinywiki.json"
    path.write_text(path.read_text()[:-20])
    return [f"{path}:", "this is not valid JSON"]


def no_candidates(small: Any) -> list[str]:
    for path in small.files("test/tiles/*.png"):
        path.unlink()
    return [f"{small.data}/test/tinywiki.json: there is no tile", str(small.data / "test" / "tiles"), "unpack the tiles there"]


def no_tile_folder(small: Any) -> list[str]:
    (small.data / "test" / "tiles").rename(small.data / "elsewhere")
    return [f"{small.data}/test/tinywiki.json: tiles_dir: there is no folder 'test/tiles'", "set tiles_dir in the recipe"]


MEASURED = [
    candidate_is_text,
    candidate_is_cut,
    candidate_is_empty,
    candidate_announces_a_billion_pixels,
    candidate_is_a_link_out_of_roots,
    no_question_set,
    no_questions,
    set_is_cut,
    no_candidates,
    no_tile_folder,
]


@pytest.mark.parametrize("spoil", MEASURED, ids=lambda one: one.__name__)
def test_bad_question_sets(job: Job, small: Any, spoil: Callable[[Any], list[str]]) -> None:
    expected = spoil(small)
    told = message(job("evaluate", small.recipe, "--base"))
    assert all(part in told for part in expected), f"{expected} not in:\n{told}"
    assert half_written(small.runs) == []
    # Training meets it before its first step, not when its evaluation is due.
    told = message(job("train", small.recipe))
    assert all(part in told for part in expected), f"{expected} not in:\n{told}"
    assert half_written(small.runs) == []


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ("{path: test/tinywiki.json}, {path: test/tinywiki.json}", "two sets of results are called 'tinywiki'"),
        ("{path: test/tinywiki.json}, {path: test/checkpoint-1.json}", "question set 'checkpoint-1': its results need a plain folder name"),
        ("{path: test/tinywiki.json}, {path: test/tinywiki.json, name: held_out_pairs}", "two sets of results are called 'held_out_pairs'"),
    ],
)
def test_question_sets_whose_results_would_overwrite_something(job: Job, small: Any, sets: str, expected: str) -> None:
    (small.data / "test" / "checkpoint-1.json").write_bytes((small.data / "test" / "tinywiki.json").read_bytes())
    for verb, flags in (("evaluate", ["--base"]), ("train", [])):
        told = message(job(verb, small.recipe, f"evaluation.sets=[{sets}]", "evaluation.pairs=2", *flags))
        assert expected in told
        assert "another name" in told or "such a name" in told
    assert half_written(small.runs) == []


def test_training_without_anything_to_train(job: Job, small: Any) -> None:
    told = message(job("train", small.recipe, "model.adapter=null"))
    assert "model.adapter: it is null, so there is nothing to train" in told
    assert half_written(small.runs) == []
    assert job("evaluate", small.recipe, "model.adapter=null", "--base").code == 0


def test_a_refused_run_starts_once_its_input_is_mended(job: Job, small: Any) -> None:
    path = first_positive(small)
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    message(job("train", small.recipe))
    listed = small.runs / "small" / "quarantine.jsonl"
    assert [one["tile"] for one in rows_of(listed)] == [str(path)]

    # A mended recipe is another recipe, but nothing was trained with the first one.
    told = job("train", small.recipe, "data.max_quarantined=1", "optim.rates.llm=1e-4")
    assert told.code == 0, told.err
    assert "1 bad tiles are left out: 1 rows" in told.err
    assert "finished at step 1" in told.out
    assert listed.exists()

    path.write_bytes(whole)
    told = job("train", small.recipe, "run.resume=overwrite")
    assert told.code == 0, told.err
    assert not listed.exists()
    assert "0 bad" in told.err


# --- the machine


def test_a_run_folder_that_cannot_be_written(job: Job, small: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    root = f"run.root={tmp_path / 'file' / 'runs'}"
    for verb, flags in (("train", []), ("evaluate", ["--base"])):
        told = message(job(verb, small.recipe, root, *flags))
        assert str(tmp_path / "file") in told
        assert "choose another run.root" in told


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_folder_without_permission(job: Job, small: Any) -> None:
    small.runs.mkdir(mode=0o555)
    for verb, flags in (("train", []), ("evaluate", ["--base"])):
        assert "choose another run.root" in message(job(verb, small.recipe, *flags))


def test_a_folder_of_something_else_is_not_taken_for_a_run(job: Job, small: Any) -> None:
    (small.runs / "small").mkdir(parents=True)
    (small.runs / "small" / "thesis.tex").write_text("years of work")
    assert "this folder is not empty and holds no run (there are thesis.tex)" in message(job("train", small.recipe))
    assert "thesis.tex" in message(job("train", small.recipe, "run.resume=overwrite"))
    assert (small.runs / "small" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/x/.metrics"), 1, "runs/x/.metrics: No space left on device; make room"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            1,
            "No space left on device; make room",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "runs/x/recipe.yaml"),
            2,
            "runs/x/recipe.yaml: Permission denied; change the perm",
        ),
    ],
)
def test_a_full_or_closed_disk(monkeypatch: pytest.MonkeyPatch, capsys: Any, error: Exception, code: int, expected: str) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    common = importlib.import_module("jobs.common")

    def main(arguments: list[str]) -> int:
        raise error

    with pytest.raises(SystemExit) as left:
        common.run(main)
    assert left.value.code == code
    assert capsys.readouterr().err.startswith(f"error: {expected}")


@pytest.mark.parametrize(
    "defect", [SafetensorError("Error while deserializing header"), OSError(errno.EINVAL, "Invalid argument"), KeyError("x")]
)
def test_our_own_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, defect: Exception) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    common = importlib.import_module("jobs.common")

    def main(arguments: list[str]) -> int:
        raise defect

    with pytest.raises(type(defect)) as kept:
        common.run(main)
    assert kept.value is defect


# --- real commands


def test_real_commands_refuse_alike(command: Callable[..., Any], small: Any) -> None:
    """From the root, with a hub that nobody answers for."""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": None, "DATA_ROOT": None}
    hub = command("jobs.evaluate", small.recipe, "--base", "model.base=nobody/no-such-model", "run.threads=1", environment=nowhere)
    unknown = command("jobs.train", small.recipe, "optim.batchs=3", environment=nowhere)
    out, err = unknown.communicate(timeout=300)
    assert (unknown.returncode, out) == (2, "")
    assert err == "error: override optim.batchs=3: unknown key 'optim.batchs'; did you mean 'optim.batch'?\n"
    out, err = hub.communicate(timeout=300)
    assert (hub.returncode, out) == (1, "")
    assert "Traceback" not in err
    assert err.count("error: ") == 1
    assert "error: model.base: 'nobody/no-such-model' is no local folder, and the hub could not be reached" in err
    assert "check the network, or name a folder that holds the files" in err
