"""The house rules that code can check: who imports what, what runs without Ray, sizes, docstrings, no trace of one machine.

Imports are read from the syntax tree, inside functions and relative ones too, so a rule does not depend on which line happens to run.
"""

from __future__ import annotations

import ast
import dataclasses
import graphlib
import importlib
import inspect
import os
import platform
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from stairstep.settings import build, from_plain, json_schema, to_plain

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "platform" / "stairstep"

# Where these may be imported: folders (with /) and files, from the root of the repository.
HEAVY = {
    "ray": ("platform/stairstep/cluster/", "jobs/", "serve/", "tune_spaces/"),
    "vllm": ("serve/",),
    "wandb": ("platform/stairstep/records/tracker_sinks.py",),
    "torchvision": (),
    "pypdfium2": ("platform/stairstep/tasks/import_pages/pdf.py",),
    "playwright": ("platform/stairstep/tasks/import_pages/web.py",),
    "plotly": ("platform/stairstep/board/figures.py",),
    "optuna": ("platform/stairstep/sweeps/suggesting.py",),
}
# A bare GPU machine has none of these; the last three come along with development tools and must not be missed either.
BLOCKED = ("ray", "vllm", "wandb", "torchvision", "pypdfium2", "playwright", "plotly", "optuna", "pydantic", "tensorboard", "sklearn")

FLOOR = {"settings", "records"}
MIDDLE = {"objectives", "models", "tiles", "data"}
# Which rooms a room may import; the table of docs/architecture.md says the same.
ARROWS: dict[str, set[str]] = {
    "settings": set(),
    "records": {"settings"},
    "data": FLOOR,
    "tiles": FLOOR,
    "models": FLOOR | {"tiles"},
    "objectives": {"settings"},
    "training": {"settings", "objectives"},
    "evaluation": FLOOR | MIDDLE,
    "tiny": FLOOR | {"data", "tiles", "models"},
    "tasks": FLOOR | MIDDLE | {"training", "evaluation", "tiny"},
    "sweeps": FLOOR | MIDDLE | {"training", "evaluation", "tasks"},
    "board": FLOOR | MIDDLE | {"evaluation", "tasks", "sweeps"},
    "cluster": FLOOR | MIDDLE | {"training", "evaluation", "tiny", "tasks", "sweeps"},
    "jobs": FLOOR | MIDDLE | {"training", "evaluation", "tiny", "tasks", "sweeps", "board", "cluster", "serve", "tune_spaces"},
    "serve": FLOOR | MIDDLE | {"evaluation"},
    "tune_spaces": FLOOR,
}

MAX_LINES = 450


@cache
def sources(*folders: str) -> tuple[Path, ...]:
    """The Python files below some folders of the repository; a folder that does not exist yet has none."""
    return tuple(path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if "__pycache__" not in path.parts)


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    """The dotted name that a file is imported by: stairstep.* for the library, jobs.*, serve.* and so on for the rest."""
    base = ROOT / "platform" if path.is_relative_to(LIBRARY) else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> list[tuple[int, str]]:
    """Line and full dotted name of everything that a file imports, also by a literal name at run time."""
    return imports_of(path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py")


def imports_of(text: str, module: str, is_package: bool) -> list[tuple[int, str]]:
    package = module if is_package else module.rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__", "importorskip"):
                found.append((node.lineno, node.args[0].value))
    return found


def room_of(name: str) -> str | None:
    """The room that a dotted module name lies in; None for modules of others and for the package itself."""
    parts = name.split(".")
    if parts[0] == "stairstep":
        return parts[1] if len(parts) > 1 and not parts[1].startswith("_") else None
    return parts[0] if parts[0] in ("jobs", "serve", "tune_spaces") else None


def told(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


# --- who imports what


def test_imports_are_found_however_they_are_written():
    text = """
import ray.train, os
from ray import data as d
def later():
    from . import fields
    from .fields import setting
    from ..models import load
    from stairstep.tasks.recipe import Recipe
    importlib.import_module("vllm.engine")
"""
    found = {name for _, name in imports_of(text, "stairstep.data.rows", is_package=False)}
    assert found == {
        "ray.train",
        "os",
        "ray.data",
        "stairstep.data.fields",
        "stairstep.data.fields.setting",
        "stairstep.models.load",
        "stairstep.tasks.recipe.Recipe",
        "vllm.engine",
    }
    assert imports_of("from .rows import PairRow", "stairstep.data", is_package=True) == [(1, "stairstep.data.rows.PairRow")]
    assert [room_of(name) for name in ("stairstep.data.rows", "stairstep", "jobs.train", "torch", "stairstep.__version__")] == [
        "data",
        None,
        "jobs",
        None,
        None,
    ]


@pytest.mark.parametrize("package", HEAVY)
def test_who_may_import(package):
    told(
        [
            f"{shown(path)}:{line}: imports {name}; only {', '.join(HEAVY[package]) or 'tests'} may"
            for path in sources("platform/stairstep", "jobs", "serve", "tune_spaces", "bench")
            for line, name in imports(path)
            if name.split(".")[0] == package and not shown(path).startswith(HEAVY[package] or ("-",)) and not is_bench(path, package)
        ]
    )


def is_bench(path: Path, package: str) -> bool:
    """A benchmark compares us with others, also with what the library itself may not import."""
    return shown(path).startswith("bench/") and package != "wandb"


def test_arrows_go_one_way():
    problems = []
    for path in sources("platform/stairstep", "jobs", "serve", "tune_spaces"):
        room = room_of(module_name(path))
        if room is None:
            continue
        allowed = ARROWS.get(room, set()) | {room}
        for line, name in imports(path):
            target = room_of(name)
            if target is not None and target not in allowed:
                problems.append(
                    f"{shown(path)}:{line}: {room} imports {name}; it may import {', '.join(sorted(allowed - {room})) or 'no room'}"
                )
    told(problems)


def test_every_room_is_in_the_picture():
    rooms = {path.relative_to(LIBRARY).parts[0] for path in sources("platform/stairstep") if path.parent != LIBRARY}
    assert {"settings", "training"} <= rooms
    told(
        [
            f"platform/stairstep/{room}: this room is not in ARROWS; add it here and in docs/architecture.md"
            for room in sorted(rooms - set(ARROWS))
        ]
    )
    loose = [path.name for path in LIBRARY.glob("*.py") if path.name not in ("__init__.py", "_version.py")]
    told([f"platform/stairstep/{name}: a module outside of every room" for name in loose])


def test_the_picture_has_no_circle():
    assert graphlib.TopologicalSorter(ARROWS).prepare() is None
    assert set().union(*ARROWS.values()) <= set(ARROWS)


def test_the_document_draws_the_same_picture():
    table = [
        line.split("|")[1:4]
        for line in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines()
        if line.count("|") == 4
    ]
    drawn = {re.sub(r"[`/ ]", "", room): set(re.findall(r"[a-z_]+", rooms)) - {"nothing"} for room, _, rooms in table[2:]}
    assert drawn == {room: ARROWS[room] for room in ARROWS if (LIBRARY / room).is_dir()}


def test_the_package_itself_imports_no_room():
    """`import stairstep` is cheap, and no room waits for another one through it."""
    told([f"{shown(LIBRARY / '__init__.py')}:{line}: imports {name}" for line, name in imports(LIBRARY / "__init__.py") if room_of(name)])


def test_what_is_imported_is_a_dependency_of_our_own():
    """And not one that comes along with another package until that package does without it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["pdf"], *extras["web"]]  # test_who_may_import holds the extras to one module each
    declared = {re.split(r"[\[<>=~! ]", one)[0].lower() for one in wanted}
    known_as = {"PIL": "pillow", "yaml": "pyyaml"}
    problems = {}
    for path in sources("platform/stairstep", "jobs"):
        for line, name in imports(path):
            top = name.split(".")[0]
            if (
                top not in sys.stdlib_module_names
                and room_of(name) is None
                and top != "stairstep"
                and known_as.get(top, top) not in declared
            ):
                problems.setdefault(top, f"{shown(path)}:{line}: imports {top}, which pyproject.toml does not name")
    told(list(problems.values()))


# --- without ray, vllm, wandb and torchvision

IMPORT_ALL = """
import importlib, importlib.util, sys, traceback

blocked = set(sys.argv[1].split(","))

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

# A library that only asks whether a package is there is told no, as it would be where it is not installed.
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.partition(".")[0] in blocked else real(name, package)
sys.meta_path.insert(0, Block())

for name in blocked:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} is not blocked")
failed = 0
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed += 1
        where = traceback.extract_tb(error.__traceback__)[-1]
        print(f"{name}: {type(error).__name__}: {error} ({where.filename}:{where.lineno})")
print(f"{len(sys.argv) - 2 - failed} imported")
sys.exit(bool(failed))
"""


def library_modules() -> list[str]:
    modules = [module_name(path) for path in sources("platform/stairstep") if path.name != "__main__.py"]
    return [name for name in modules if room_of(name) != "cluster"]


def python(*arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_every_module_outside_cluster_imports_without_ray_vllm_wandb_and_torchvision():
    modules = library_modules()
    assert "stairstep.settings.build" in modules
    result = python("-c", IMPORT_ALL, ",".join(BLOCKED), *modules, path=str(ROOT / "platform"))
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert f"{len(modules)} imported" in result.stdout


def test_the_block_is_one(tmp_path):
    """A module that does import ray fails under the block, wherever in it the import stands."""
    (tmp_path / "needs_ray.py").write_text("import ray\n")
    (tmp_path / "needs_deep.py").write_text("from ray.train import Checkpoint\n")
    (tmp_path / "asks.py").write_text("import importlib.util\nassert importlib.util.find_spec('ray') is None\n")
    result = python("-c", IMPORT_ALL, ",".join(BLOCKED), "needs_ray", "needs_deep", "asks", path=str(tmp_path))
    assert result.returncode == 1
    assert "needs_ray: ModuleNotFoundError: ray is blocked" in result.stdout
    assert "needs_deep: ModuleNotFoundError: ray is blocked" in result.stdout
    assert "1 imported" in result.stdout, result.stdout + result.stderr


def test_platform_is_the_standard_librarys_from_the_root():
    assert not (ROOT / "platform" / "__init__.py").exists()
    result = python("-c", "import platform; print(platform.system()); print(platform.__file__)")
    assert result.returncode == 0, result.stderr
    system, file = result.stdout.split("\n")[:2]
    assert system == platform.system()
    assert not Path(file).is_relative_to(ROOT / "platform")


# --- files


def test_every_module_says_why_it_exists():
    told(
        [
            f"{shown(path)}: has no module docstring"
            for path in sources("platform/stairstep", "jobs", "serve", "tune_spaces", "bench")
            if (path.stat().st_size or path.is_relative_to(LIBRARY)) and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        ]
    )


def test_no_file_is_two_files():
    told(
        [
            f"{shown(path)}: {count} lines; at most {MAX_LINES}"
            for path in sources("platform", "jobs", "serve")
            if (count := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
        ]
    )


def test_test_files_can_be_collected_together():
    """No packages among the tests and no name twice: a test is found by its file's name alone."""
    files = sources("tests")
    told([f"{shown(path)}: tests have no __init__.py" for path in files if path.name == "__init__.py"])
    names: dict[str, Path] = {}
    told(
        [
            f"{shown(path)}: the same name as {shown(names[path.name])}"
            for path in files
            if names.setdefault(path.name, path) != path and path.name != "conftest.py"
        ]
    )


# --- nothing of this machine

MACHINE = {
    "a machine's path": re.compile(r"(?<![\w.~$})\]>/-])/(?:work|root|tmp|home|Users|var/folders)/[\w.]"),
    "a registry's address": re.compile(
        r"index-url[ =]+['\"]?\w+://|trusted-host[ =]+\S|find-links[ =]+\S|(?:PIP|UV)_\w*INDEX\w*\s*[=:]\s*\S"
        r"|://[^\s'\"]*(?:/simple\b|pypi|artifactory|nexus|jfrog|devpi)|files\.pythonhosted\.org",
        re.IGNORECASE,
    ),
    "an address of a private network": re.compile(
        r"://(?:[\w.-]+@)?(?:10\.\d+|172\.(?:1[6-9]|2\d|3[01])|192\.168)\.\d+\.\d+|://[\w.-]+\.(?:internal|corp|lan)\b"
    ),
    "a secret": re.compile(r"\b(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{32,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36})\b"),
}
# The file, and the text in it that is meant: paths inside of containers and on the machines of examples.
MEANT = (
    (r".*", r"/home/(?:ray|user|you)/"),
    (r".*", r"/tmp/ray\b"),
    (r"tests/.*", r"sk-(?:test|fake)[\w-]*"),
)
BINARY = {".png", ".jpg", ".ttf", ".otf", ".safetensors", ".arrow", ".tar", ".gz", ".zst", ".ico", ".woff2"}


@cache
def repository_files() -> tuple[Path, ...]:
    """What git tracks; in a copy without git, every file that is no build output."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False) if (ROOT / ".git").exists() else None
    if listed is not None and listed.returncode == 0 and listed.stdout:
        files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    else:
        skipped = {"__pycache__", "runs", "outputs", "wandb", "build", "dist", "shared"}
        files = [
            Path(folder) / name
            for folder, folders, names in os.walk(ROOT)
            if folders.__setitem__(
                slice(None), [one for one in folders if one not in skipped and not one.startswith(".") and "egg-info" not in one]
            )
            is None
            for name in names
        ]
    return tuple(path for path in files if path.is_file() and path.suffix not in BINARY)


def machine_marks(name: str, text: str) -> list[str]:
    meant = [re.compile(words) for files, words in MEANT if re.fullmatch(files, name)]
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        for words in meant:
            line = words.sub("", line)
        found += [f"{name}:{number}: {what}: {match.group()}" for what, pattern in MACHINE.items() if (match := pattern.search(line))]
    return found


def test_nothing_of_this_machine_is_in_the_repository():
    problems = []
    for path in repository_files():
        if path == Path(__file__).resolve():
            continue
        data = path.read_bytes()
        if b"\0" not in data[:8192]:
            problems += machine_marks(shown(path), data.decode("utf-8", "replace"))
    problems = [f"{one} (and {count - 1} more there)" if count > 1 else one for one, count in first_of_each_file(problems)]
    told(problems)


def first_of_each_file(problems: list[str]) -> list[tuple[str, int]]:
    by_file: dict[str, list[str]] = {}
    for one in problems:
        by_file.setdefault(one.split(":")[0], []).append(one)
    return [(found[0], len(found)) for found in by_file.values()]


@pytest.mark.parametrize(
    "line",
    [
        "cd /work/main && make",
        "path = '/root/x'",
        "# -c /tmp/constraints.txt",
        "/home/anna/data",
        "--index-url https://x.y/z",
        "extra-index-url = 'http://x'",
        "PIP_INDEX_URL=http://somewhere",
        "https://mirror.example.org/simple/torch",
        "https://files.pythonhosted.org/x",
        "http://10.1.2.3:8000/v1",
        "http://192.168.0.7/",
        "key = 'hf_" + "a" * 34 + "'",
    ],
)
def test_marks_of_a_machine_are_found(line):
    assert len(machine_marks("file.txt", "fine\n" + line)) == 1
    assert machine_marks("file.txt", "fine\n" + line)[0].startswith("file.txt:2: ")


@pytest.mark.parametrize(
    "line",
    [
        "LOCK := --no-emit-index-url --no-header",
        "http://127.0.0.1:8000/v1",
        "http://localhost/work/",
        "https://github.com/x/root/y",
        "name: framework/root/tmp/x",
        "./work/x and <root>/tmp/x and $HOME/tmp/x",
        "/home/ray/anaconda3",
        "/tmp/ray/session_latest",
        "https://huggingface.co/Qwen/Qwen3-VL-Embedding-2B",
    ],
)
def test_what_is_no_mark_of_a_machine(line):
    assert machine_marks("file.txt", line) == []


# --- settings of all rooms


def settings_classes() -> list[type]:
    found = []
    for path in sources("platform/stairstep"):
        if path.name in ("settings.py", "recipe.py") and room_of(module_name(path)) not in ("settings", "cluster"):
            module = importlib.import_module(module_name(path))
            found += [
                cls
                for _, cls in inspect.getmembers(module, dataclasses.is_dataclass)
                if isinstance(cls, type) and cls.__module__ == module.__name__
            ]
    return found


def test_every_setting_can_be_built_documented_and_written():
    """Frozen, every field documented, only types that the builder knows, and its own defaults pass its own checks."""
    classes = settings_classes()
    assert classes
    problems = []
    for cls in classes:
        name = f"{cls.__module__}.{cls.__name__}"
        if not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            problems.append(f"{name}: is not frozen")
        hints = get_type_hints(cls)
        for one in dataclasses.fields(cls):
            if not one.metadata.get("doc"):
                problems.append(f"{name}.{one.name}: has no doc")
            if one.name == "kind" and (get_origin(hints["kind"]) is not Literal or len(get_args(hints["kind"])) != 1):
                problems.append(
                    f"{name}.kind: takes several values; `kind` is the tag of a class, and another one replaces the mapping whole"
                )
        json_schema(cls, name)
        if all(one.default is not dataclasses.MISSING or one.default_factory is not dataclasses.MISSING for one in dataclasses.fields(cls)):
            made = build(cls, from_plain({}, name))
            again = build(cls, from_plain(to_plain(made), name))
            if again != made or repr(again) != repr(made):
                problems.append(f"{name}: its defaults are not what the builder makes of them: {made} → {again}")
    told(problems)
