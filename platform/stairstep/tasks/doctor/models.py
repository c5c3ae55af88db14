"""The recipe's model: where its files are, and what the adapter finds to sit on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from peft import PeftModel

from stairstep.models.adapter_files import check_same_shape, locate_adapter, read_adapter
from stairstep.models.inputs import load_tokenizer
from stairstep.models.load import resolve_attention, trainable_line
from stairstep.models.settings import ModelSettings
from stairstep.models.sources import fetch, locate
from stairstep.models.weights import read_config, weight_files
from stairstep.settings import InputError, UnreachableError

from .findings import Answer, NotLooked, bad, good
from .patient import Patient, hub_folder, is_hub_id


def model(patient: Patient) -> Answer:
    """The base's config, weights and tokenizer, and the attention that the recipe asks for."""
    settings = patient.recipe.model
    try:
        said, folder = _base(settings, patient.deep)
    except UnreachableError as error:
        return replace(bad(str(error), f"python -m jobs.fetch with this recipe brings {settings.base} too"), error=error)
    if settings.tokenizer is not None:
        folder = locate(settings.tokenizer, None, "model.tokenizer").folder if patient.deep or not is_hub_id(settings.tokenizer) else None
    if patient.deep and folder is not None:
        load_tokenizer(folder)
    try:
        attention = resolve_attention(settings, patient.device)
    except NotLooked:
        return good(f"{said}, {settings.dtype}")
    return good(f"{said}, {settings.dtype}, attention {attention}")


def _base(settings: ModelSettings, deep: bool) -> tuple[str, Path | None]:
    """Where the base is, in words, and its folder where its files are on this machine."""
    if not is_hub_id(settings.base):
        source = locate(settings.base, settings.revision, "model.base")
        read_config(source.folder)
        if source.shipped and not source.has_weights:
            known = settings.tokenizer is not None or (source.folder / "tokenizer.json").is_file()
            if not known:
                raise InputError(
                    f"model.base: {settings.base} ships its config alone, with no tokenizer; name a folder or a hub id as model.tokenizer"
                )
            return f"{settings.base}: shipped config, random weights from init_seed", None
        size = sum(file.stat().st_size for file in weight_files(source.folder))
        return f"{settings.base}: {'shipped' if source.shipped else 'a local folder'}, {_size(size)} of weights", source.folder
    folder = hub_folder(settings.base, settings.revision)
    if folder is not None:
        try:
            size = sum(file.stat().st_size for file in weight_files(folder))
            read_config(folder)
        except InputError:
            folder = None  # a download that was broken off
        else:
            return f"{settings.base}: in the hub's cache, {_size(size)} of weights", folder
    if not deep:
        raise NotLooked(f"{settings.base}: not whole in the hub's cache; it would be downloaded")
    fetch(settings.base, settings.revision, ("config.json",), "model.base")
    return f"{settings.base}: on the hub; its weights would be downloaded at the first start", None


def adapter(patient: Patient) -> Answer:
    """What the adapter's patterns match, how many parameters that makes, and that `model.start` fits."""
    recipe = patient.recipe
    shape, placement = patient.meta
    said = f"{placement.describe()}\n{trainable_line(shape)}"
    start = recipe.model.start
    if recipe.model.adapter is None:
        if recipe.optim.steps and patient.retrieval:
            said += "\nnothing is trained (model.adapter is null): python -m jobs.evaluate measures this recipe, jobs.train refuses it"
            return bad(said, "leave model.adapter out, or only evaluate", needed=False)
        return good(said)
    if start is None:
        return good(said)
    if not patient.deep and not Path(start).expanduser().is_dir():
        return good(f"{said}\nmodel.start: {start} is looked for when the model is loaded")
    files = read_adapter(locate_adapter(start))
    assert isinstance(shape, PeftModel), "a recipe with an adapter has a PEFT model"
    check_same_shape(shape, files, recipe=True)
    return good(f"{said}\nmodel.start: {start} fits, {len(files.tensors)} tensors")


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"
