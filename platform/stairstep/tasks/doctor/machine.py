"""The machine: versions against the lock, the device, its memory and the disk below the run root."""

from __future__ import annotations

import os
import re
import shutil
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from stairstep.objectives.graphs import machine_memory
from stairstep.records.places import ObjectFolder, place
from stairstep.settings import StairstepError

from ..placing import local_root
from ..recipe import Recipe
from .estimate import disk_estimate, memory_estimate
from .findings import Answer, NotLooked, bad, good, left
from .patient import Patient

ROOT = Path(__file__).resolve().parents[4]
ALWAYS = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "numpy",
    "pillow",
    "pyyaml",
)
CLOSE = 0.9

Version = tuple[int, ...]


def versions(patient: Patient, root: Path = ROOT) -> Answer:
    """The installed packages against the locked ones; another major version is told, and stops a run where pyproject.toml excludes it."""
    lock = root / "requirements" / "base.txt"
    if not lock.is_file():
        return left("no requirements/base.txt beside the package: this is an installed copy")
    locked, ranges = _locked(lock), _ranges(root / "pyproject.toml")
    minor: list[str] = []
    major: list[str] = []
    stopping: list[str] = []
    needed = _needed(patient.recipe)
    for name in needed:
        there = _installed(name)
        if there is None:
            stopping.append(f"{name} is not installed")
        elif name in locked and there != locked[name]:
            said = f"{name} {there}, locked {locked[name]}"
            if not _in_range(there, ranges.get(name, "")):
                stopping.append(f"{said}, and pyproject.toml says {name}{ranges[name]}")
            else:
                (major if _numbers(there)[:1] != _numbers(locked[name])[:1] else minor).append(said)
    mend = "install the locked environment (make setup), or expect other numbers than its"
    if stopping:
        return bad("\n".join([*stopping, *major, *minor]), mend)
    if major:
        return bad("\n".join([*major, *minor]), mend, needed=False)
    return good("as locked: " + _main(needed) if not minor else "as locked but for " + "; ".join(minor))


def _needed(recipe: Recipe) -> list[str]:
    """What this recipe imports."""
    some = [("ray", recipe.cluster.workers > 0), ("wandb", recipe.trackers.wandb != "off"), ("tensorboard", recipe.trackers.tensorboard)]
    return [*ALWAYS, *(name for name, wanted in some if wanted)]


def _main(names: list[str]) -> str:
    return ", ".join(f"{name} {_installed(name)}" for name in names if name in ("torch", "transformers", "peft", "ray"))


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def _locked(lock: Path) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;\\]+)", lock.read_text(encoding="utf-8"), re.MULTILINE))


def _ranges(project: Path) -> dict[str, str]:
    """What pyproject.toml says of each dependency's version."""
    if not project.is_file():
        return {}
    listed = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    split = (re.match(r"([\w.-]+)(?:\[[^\]]*\])?\s*(.*)", one) for one in listed)
    return {found[1].lower().replace("_", "-"): found[2] for found in split if found}


def _in_range(version: str, said: str) -> bool:
    """Whether a version is within bounds like `>=4.57,<6`."""
    return all(_holds(_numbers(version), sign, _numbers(bound)) for sign, bound in re.findall(r"([<>]=?)\s*([\w.]+)", said))


def _holds(one: Version, sign: str, other: Version) -> bool:
    size = max(len(one), len(other))
    left_, right = (version + (0,) * (size - len(version)) for version in (one, other))
    return {"<": left_ < right, "<=": left_ <= right, ">": left_ > right, ">=": left_ >= right}[sign]


def _numbers(version: str) -> Version:
    return tuple(map(int, re.match(r"\d+(?:\.\d+)*", version)[0].split("."))) if re.match(r"\d", version) else ()  # type: ignore[index]


def device(patient: Patient) -> Answer:
    """Where each worker computes."""
    found = patient.device
    if found.type == "cpu":
        return good(f"cpu, {patient.recipe.run.threads} threads (run.threads)")
    count = torch.cuda.device_count()
    if patient.recipe.cluster.least > count and not patient.elsewhere:
        return bad(
            f"{patient.recipe.cluster.least} workers with a GPU each were asked for, and this machine has {count}",
            "lower cluster.workers",
        )
    return good(f"cuda, {count} GPU{'' if count == 1 else 's'}")


def memory(patient: Patient) -> Answer:
    """The estimate of estimate.py against the device of one worker."""
    recipe = patient.recipe
    if not patient.retrieval:
        raise NotLooked(f"not estimated for task {recipe.task.kind}")
    model, _ = patient.meta
    try:
        where = patient.device
    except NotLooked:
        where = None
    kind = where.type if where is not None else "cuda"
    estimate = memory_estimate(recipe, model, patient.tile_size, [row.passage for row in patient.texts], kind)
    unseen = bool(recipe.data.train) and patient.tile_size is None  # then the chunk is of the largest tiles that the recipe allows
    listed = ", ".join(f"{name} {size(part)}" for name, part in estimate.parts.items())
    said = f"about {size(estimate.total)} a worker: {listed} (chunk: {estimate.chunk})"
    said = f"tiles not seen yet; with the largest that the recipe allows {said}" if unseen else said
    if where is None:
        return left(f"{said}; there is no GPU to hold it against")
    if kind == "cuda" and recipe.cluster.workers and not patient.deep:
        return left(f"{said}; each worker opens its own GPU")
    there = torch.cuda.get_device_properties(where).total_memory if kind == "cuda" else machine_memory()
    workers = 1 if kind == "cuda" or patient.elsewhere else max(1, recipe.cluster.workers)
    owner = torch.cuda.get_device_name(where) if kind == "cuda" else "this machine"
    said = f"{said}; {owner} has {size(there)}" + (f" for {workers} workers" if workers > 1 else "")
    if estimate.total * workers <= there:
        return good(f"{said}{'; that is close' if estimate.total * workers > CLOSE * there else ''}")
    if unseen:
        return left(f"{said}: look again once the tiles are here, for smaller ones take less")
    return bad(
        said,
        "say model.gradient_checkpointing=true (the same result, slower), or lower objective.gradcache.chunk_tokens or chunk_items",
    )


def disk(patient: Patient) -> Answer:
    """That the run root can be written, and has room for what the run leaves there; what is not counted is said."""
    recipe = patient.recipe
    remote = place(recipe.run.root)
    if isinstance(remote, ObjectFolder):
        try:
            remote.folders()
        except StairstepError as error:
            return bad(f"run.root: {error}", "or choose another run.root")
    root = Path(os.path.abspath(local_root(recipe)))
    standing = _standing(root)
    if not standing.is_dir():
        return bad(f"run.root: {standing} is no folder", "choose another run.root")
    if not os.access(standing, os.W_OK | os.X_OK):
        return bad(f"run.root: {standing} cannot be written", "change its permissions, or choose another run.root")
    free = shutil.disk_usage(standing).free
    if not patient.retrieval:
        return good(f"{root}: {size(free)} free")
    try:
        model, _ = patient.meta
    except NotLooked:
        return good(f"{root}: {size(free)} free; what the run needs is not known without its model")
    sets = patient.question_sets
    parts = disk_estimate(recipe, model, sum(len(one.questions) for one in sets), sum(len(one.tiles) for one in sets))
    wanted = sum(parts.values())
    said = f"{root}: about {size(wanted)} ({', '.join(f'{name} {size(part)}' for name, part in parts.items() if part)}), {size(free)} free"
    said += "".join(f"\nnot counted: {one}" for one in _uncounted(recipe, len(sets)))
    if wanted > free:
        return bad(said, "make room, choose another run.root, or lower checkpoints.keep or evaluation.cache_states")
    return good(said)


def _uncounted(recipe: Recipe, sets: int) -> list[str]:
    """What else may come to lie on this disk, in words; `sets`: how many of the question sets were read."""
    found = []
    lacking = len(recipe.evaluation.sets) - sets
    if lacking:
        found.append(f"embeddings and rows of {lacking} of {len(recipe.evaluation.sets)} question sets, which could not be read")
    if recipe.data.fetch:
        found.append("what python -m jobs.fetch brings, which goes below the first of data.roots; it looks for room there itself")
    return found


def _standing(path: Path) -> Path:
    """The path, or the nearest one above it that there is."""
    return next(one for one in _upwards(path) if os.path.lexists(one))


def _upwards(path: Path) -> Iterator[Path]:
    yield path
    yield from path.parents


def size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if count >= 2**power / 2:
            return f"{count / 2**power:.1f} {unit}"
    return f"{count / 2**10:.0f} KiB"
