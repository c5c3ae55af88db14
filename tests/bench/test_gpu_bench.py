"""The GPU bench on the tiny model: every way is measured, beside the plain one, and a way that does not fit is a row and not the end."""

from __future__ import annotations

import ast
import json
import re
import sys
from importlib import metadata
from pathlib import Path

import gpu
import pytest
import torch
from gpu import PLAIN, TINY, Contest, Row, Way, disagreements, goals, matrix_rate, measure, table

from stairstep.objectives import GradCacheSettings

BENCH = Path(gpu.__file__).parent
PACKAGE = BENCH.parent / "platform" / "stairstep"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def contest() -> Contest:
    return Contest(TINY, torch.device("cpu"))


def test_all_of_it_runs_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--tiny", "--rounds", "1"]) == 0
    said = capsys.readouterr().out
    assert "not measured" in said, "without a GPU it says so"
    report = json.loads((tmp_path / "gpu-cpu-tiny.json").read_text())
    rows = report["rows"]
    assert [row["kind"] for row in rows] == ["training"] * 9 + ["evaluation"] * 3
    assert all(len(row["seconds"]) == 1 and row["peak_mb"] > 0 and not row["out_of_memory"] for row in rows)
    assert all(row["name"] in said for row in rows)
    assert all(row["share"] == pytest.approx(row["flops"] / row["seconds"][0] / report["matrix_rate"]) for row in rows)
    assert report["disagreements"] == []
    kept = {row["name"].partition(" tokens ")[2] or row["name"]: row["kept"] for row in rows if row["kind"] == "training"}
    assert kept.pop(f"{PLAIN}, chunks of 4") is None
    for name, one in kept.items():
        auto = "auto" in name
        assert (one["kept"], one["tile_kept"]) == ((one["chunks"], one["tile_chunks"]) if auto else (0, 0)), "a tiny graph always fits"
        assert 0 < one["tile_chunks"] < one["chunks"]
        assert f"{one['kept']}/{one['chunks']}" in said
    assert all(row["kept"] is None for row in rows if row["kind"] == "evaluation")
    by_chunk = {row["name"] for row in rows}
    assert {name for name in by_chunk if f"{name}, checkpointing" in by_chunk}, "checkpointing is compared at one size of chunks"
    assert 0.9 < report["counted_ratio"] < 1.02, "the operations are those that torch counts, but for a gradient at the pixels"


def test_a_way_without_memory_is_a_row_and_the_next_one_is_measured(contest: Contest, capsys: pytest.CaptureFixture[str]):
    def too_much(*_: object) -> float:
        raise torch.OutOfMemoryError("no room")

    plain = next(way for way in contest.ways() if way.kind == "evaluation")
    rows = measure(contest, [Way("training", "too much", too_much), plain], 2, float("inf"))
    assert [(row.out_of_memory, len(row.seconds)) for row in rows] == [(True, 0), (False, 2)]
    assert capsys.readouterr().out.count("out of memory") == 1, "it is not tried again"
    lines = table(rows, 1e9)
    assert any("too much" in line and "out of memory" in line for line in lines)
    assert any(plain.name in line and line.endswith("1.00") for line in lines)
    assert "median_s" not in rows[0].figures(1e9)


def test_the_first_round_is_whole_and_no_step_is_begun_that_would_end_too_late(contest: Contest):
    ways = [Way("training", name, lambda *_: 0.0) for name in ("a", "b")]
    assert [len(row.seconds) for row in measure(contest, ways, 3, until=0.0, clock=lambda: 1.0)] == [1, 1]
    assert [len(row.seconds) for row in measure(contest, ways, 3, until=float("inf"))] == [3, 3]


def test_a_way_with_another_loss_or_gradient_is_told(contest: Contest):
    plain, ours, *_ = contest.ways()

    def other_loss(*given):
        return 1.01 * ours.run(*given)

    def other_gradient(*given):
        loss = ours.run(*given)
        contest.steps.parameters[0].grad.neg_()
        return loss

    told = disagreements(contest, [plain, ours, Way("training", "loss", other_loss), Way("training", "gradient", other_gradient)])
    assert [line.partition(":")[0] for line in told] == ["loss", "gradient"]


def test_checkpointing_is_on_for_its_way_alone(contest: Contest):
    core = contest.encoder.core
    way = next(way for way in contest.ways() if way.checkpointing)
    with contest.mode(way):
        assert core.is_gradient_checkpointing
    assert not core.is_gradient_checkpointing


def test_graphs_that_do_not_all_fit_are_counted_by_side(contest: Contest):
    """Queries come first and are kept; of the tiles' graphs some budget holds a few."""
    found = []
    for budget in (16, 32, 64):
        contest.steps.ours(contest.small[0], GradCacheSettings(chunk_tokens=None, chunk_items=1, keep_graphs_mb=budget))
        contest.steps.clear()
        assert contest.steps.kept is not None
        found.append(contest.steps.kept)
    assert {(one.chunks, one.tile_chunks) for one in found} == {(8, 6)}
    some = [one for one in found if 0 < one.tile_kept < 6]
    assert some, found
    assert all(one.kept == 2 + one.tile_kept for one in some), found


def test_what_the_bench_needs_is_what_it_says():
    """Libraries that are imported on the way, less what torch, transformers and peft bring, are named in its first words."""
    brought = required({"torch", "transformers", "peft"})
    owners = metadata.packages_distributions()
    needed = {normal(owners[name][0]) for name in imported(BENCH / "gpu.py") if name not in sys.stdlib_module_names}
    assert {"torch", "peft"} < needed, "the way is followed"
    assert needed - brought == {"pyarrow", "pillow"}
    assert "pyarrow and Pillow" in str(gpu.__doc__)


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


def required(names: set[str]) -> set[str]:
    """Packages by name with all that they ask for without extras, as far as it is installed."""
    found: set[str] = set()
    left = set(names)
    while left:
        one = left.pop()
        found.add(one)
        try:
            lines = metadata.requires(one) or []
        except metadata.PackageNotFoundError:
            continue
        left |= {normal(re.split(r"[^\w.-]", line)[0]) for line in lines if "extra ==" not in line} - found
    return found


def imported(path: Path) -> set[str]:
    """Top-level names of the libraries that a script's imports at module level lead to, through the package and bench/."""
    found: set[str] = set()
    left, seen = [path], set()
    while left:
        file = left.pop()
        if file in seen:
            continue
        seen.add(file)
        for name in module_imports(file):
            top, *parts = name.split(".")
            if (BENCH / f"{top}.py").exists():
                left.append(BENCH / f"{top}.py")
            elif top == "stairstep":
                places = [PACKAGE.joinpath(*parts[:end]) for end in range(len(parts) + 1)]
                left += [one for place in places for one in (place / "__init__.py", place.with_suffix(".py")) if one.exists()]
            else:
                found.add(top)
    return found


def module_imports(file: Path) -> set[str]:
    """Full names of what a file's statements at module level import; a name taken from a package may be a module of it."""
    package = ["stairstep", *file.relative_to(PACKAGE).parent.parts] if file.is_relative_to(PACKAGE) else []
    found: set[str] = set()
    for one in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(one, ast.Import):
            found |= {alias.name for alias in one.names}
        elif isinstance(one, ast.ImportFrom):
            stem = [*package[: len(package) + 1 - one.level], *([one.module] if one.module else [])] if one.level else [str(one.module)]
            found |= {".".join([*stem, alias.name]) for alias in one.names}
    return found


def test_goals_look_at_the_best_of_ours():
    rows = [
        Row("training", f"{PLAIN}, x", 192, 100.0, [1.0]),
        Row("training", "ours", 192, 100.0, [2.0, 4.0, 2.0]),
        Row("training", "worse", 192, 100.0, out_of_memory=True),
        Row("evaluation", "ours", 7426, 100.0, [240.0]),
    ]
    counter = "by torch's counter, which sees 0.900 of the operations"
    assert goals(rows, 100.0, 0.9) == {
        f"training: 50.0% of the matrix rate ({counter}, 45.0%), at least 45% wanted": True,
        f"evaluation: 0.4% of the matrix rate ({counter}, 0.4%), at least 50% wanted": False,
        "evaluation: 7,426 tiles in 4.0 minutes, at most 2.5 wanted": False,
    }


def test_the_matrix_rate_is_a_products_operations_by_its_time(monkeypatch: pytest.MonkeyPatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: float(next(ticks)))
    assert matrix_rate(8, torch.float32, torch.device("cpu")) == 2 * 8**3
