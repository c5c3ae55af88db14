"""A made-up release in seed 000's exact layout goes from the hub to an evaluation, by its own recipe, with no archive unpacked."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from stairstep.data import WorldSettings
from stairstep.tiny.tinywiki import ensure_world

ROOT = Path(__file__).resolve().parents[2]
TEXTS = 40
SIZES = {"small": (60, 10, 12), "two thousand tiles": (1560, 60, 100)}  # pairs, questions, articles
TRAINING, TESTING, WARMUP = "screenshot-training-natural-filtered-v2", "screenshot-training", "text-qa-pair"


def hub_server() -> ModuleType:
    """tests/hub_server.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("hub_server", ROOT / "tests" / "hub_server.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hub_server"] = module
    spec.loader.exec_module(module)
    return module


def pack(archive: Path, folder: Path, top: str) -> int:
    """The files of a folder as members below `top`, as `tar` writes them with folders of their own; how many files."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with tarfile.open(archive, "w") as tar:
        tar.add(folder, top or ".", recursive=False)
        for path in files:
            tar.add(path, f"{top}/{path.relative_to(folder).as_posix()}" if top else f"./{path.relative_to(folder).as_posix()}")
    return len(files)


@pytest.fixture(scope="module", params=["small", pytest.param("two thousand tiles", marks=pytest.mark.soak)])
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three repositories as the seed's documents describe them, and what must be counted in them."""
    pairs, questions, articles = SIZES[request.param]
    settings = WorldSettings(seed=77, articles=articles, questions=questions, pairs=pairs, text_pairs=TEXTS)
    world = ensure_world(settings, tmp_path_factory.mktemp("worlds"))
    hub = tmp_path_factory.mktemp("hub")
    counts: dict[str, dict[str, int]] = {TRAINING: {}, TESTING: {}, WARMUP: {}}
    for name in ("train_hn.jsonl", "eval_hn.jsonl", "test_hn.jsonl"):
        (hub / TRAINING).mkdir(exist_ok=True)
        shutil.copy(world / name, hub / TRAINING / name)
        counts[TRAINING][name] = len((world / name).read_text().splitlines())
    packed = 0
    for shard in sorted((world / "images").iterdir()):
        packed += pack(hub / TRAINING / "image_shards" / f"{shard.name}.tar", shard, f"images/{shard.name}")
    test = hub / TESTING / "test_miniv8"
    test.mkdir(parents=True)
    asked = json.loads((world / "test" / "tinywiki.json").read_text()) | {"tiles_dir": "test_miniv8/tiles"}
    (test / "test_miniv8.json").write_text(json.dumps(asked))
    candidates = pack(test / "tiles.tar", world / "test" / "tiles", "")
    counts[TESTING] = {"test_miniv8/test_miniv8.json": questions, "test_miniv8/tiles.tar": candidates}
    chunk = hub / WARMUP / "chunk_000"
    chunk.mkdir(parents=True)
    shutil.copy(next((world / "text").glob("chunk_*/filtered_hn.jsonl")), chunk / "filtered_hn.jsonl")
    texts = sum(len(path.read_text().splitlines()) for path in (world / "text").glob("chunk_*/filtered_hn.jsonl"))
    counts[WARMUP] = {"chunk_*/filtered_hn.jsonl": texts}
    return {"hub": hub, "counts": counts, "tiles": packed + candidates, "pairs": pairs, "questions": questions, "large": pairs > 1000}


Run = Callable[..., str]


@pytest.fixture
def run(release: dict[str, Any], job: Any, command: Any, in_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a job, which must succeed, and return what it printed; for the large release it is the command in a new process."""
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "data"))

    def of_its_own(verb: str, *arguments: object, **environment: str) -> tuple[int, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "HF_"))}
        done = subprocess.run(
            [sys.executable, "-m", f"jobs.{verb}", *map(str, arguments)],
            cwd=ROOT, env={**kept, "PYTHONPATH": str(ROOT / "platform"), **environment},
            capture_output=True, text=True, timeout=500, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    def here(verb: str, *arguments: object, **environment: str) -> tuple[int, str]:
        if not environment:
            told = job(verb, *arguments)
            return told.code, told.out + told.err
        forked = command(f"jobs.{verb}", *arguments, environment={"HF_HUB_OFFLINE": None, **environment})
        return forked.wait(500), "".join(forked.communicate())

    def succeed(verb: str, *arguments: object, **environment: str) -> str:
        code, said = (of_its_own if release["large"] else here)(verb, *arguments, **environment)
        assert code == 0, f"{verb}: {said}"
        return said

    return succeed


def test_from_the_hub_to_an_evaluation_with_nothing_unpacked(release: dict[str, Any], run: Run, tmp_path: Path) -> None:
    data, runs, recipe = tmp_path / "data", tmp_path / "runs", tmp_path / "release.yaml"
    fetch = [{"repo": f"Chrisyichuan/{name}", "expect": counts} for name, counts in release["counts"].items()]
    fetch[1]["include"] = ["test_miniv8/*"]
    recipe.write_text(
        f"extends: {ROOT}/recipes/v8r.yaml\n"
        f"run: {{root: {runs}, threads: 1, name: release}}\n"
        f"data: {{fetch: {json.dumps(fetch)}}}\n"
        "tiles: {max_visual_tokens: 64}\n"
        "model: {base: tiny-embedder, dtype: float32}\n"
        "optim: {batch: 4, steps: 3, schedule: {warmup_steps: 0}}\n"
        "phases: {text_warmup_steps: 1}\n"
        "evaluation: {every: 3, loss_every: 0, reader: null, selection_metric: hit@1}\n"
        "cluster: {workers: 0, device: cpu}\n"
    )
    module = hub_server()
    with module.HubServer(datasets={f"Chrisyichuan/{name}": release["hub"] / name for name in release["counts"]}) as server:
        fetched = run("fetch", recipe, HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / "hf"))
    assert str(release["pairs"]) in fetched.replace(",", "")
    made = run("preprocess", recipe)
    (manifest,) = (runs / "tiles").rglob("manifest-*.json")
    stored = json.loads(manifest.read_text())["tiles"]
    assert release["pairs"] < stored <= release["tiles"]
    assert stored >= 2000 or not release["large"]
    assert f"{stored:,} were made" in made
    trained = run("train", recipe)
    assert f"Tile store: {stored} tiles" in trained
    evaluated = run("evaluate", recipe, "--checkpoint", runs / "release" / "checkpoint-3")
    rows = [json.loads(line) for line in (runs / "release" / "eval_step3.jsonl").read_text().splitlines()]
    assert len(rows) == release["questions"]
    assert all(path.endswith(".png") for row in rows for path in row["top3_paths"])
    assert f"n={release['questions']}" in evaluated
    unpacked = [path for path in data.rglob("*") if path.suffix == ".png"]
    assert not unpacked
    assert len(list(data.rglob("*.tar"))) == len(list(release["hub"].rglob("*.tar"))) > 2
