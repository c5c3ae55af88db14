"""A rough estimate of what a run takes, before it starts: hours of its device, calls to reader and grader, and their price.

Time is operations over speed. Operations come from shapes (flops.py); speed is that of a short matrix product on this device in the
recipe's numbers, times a share of it that a run is taken to reach. Only the CPU's share was ever held against real runs, and fitted to
them: thirteen of the tiny embedder, whose updates took 0.8 to 2.7 times their estimate (half of them less than 1.15) and whose evaluations
0.6 to 1.5 times, on two cores that other work shared. The GPU's share is a guess. Loading, decoding, checkpoints and waiting for a reader
elsewhere are not in it. Calls are upper bounds: what the ledger knows is not asked again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from statistics import mean
from urllib.parse import urlsplit

import torch

from stairstep.evaluation.graders import RUBRIC, ChatGraderSettings
from stairstep.evaluation.readers import RemoteReaderSettings
from stairstep.evaluation.settings import EvaluationSettings, LocalReaderSettings
from stairstep.models.flops import PATCHES_PER_TOKEN, Work, forward_and_backward
from stairstep.models.inputs import Inputs, load_tokenizer
from stairstep.models.sources import locate_here
from stairstep.models.weights import DTYPES, on_meta, read_config
from stairstep.objectives.graphs import machine_memory
from stairstep.settings import InputError
from stairstep.training import PhasePlan

from .doctor import Patient, inputs
from .doctor.estimate import CHARACTERS_PER_TOKEN, TEMPLATE_TOKENS, graph_bytes
from .doctor.models import hub_folder
from .loading import RetrievalRows, tile_reader
from .recipe import Recipe, RetrievalTaskSettings
from .resolve import resolve
from .tile_check import tiles_of

SHARES = {"cpu": 0.25, "cuda": 0.35}
ABSENT_GPU = 3e14  # operations a second of a GPU that is not here
QUERY_TOKENS, ANSWER_TOKENS = 48, 16
_MEASURED_S = 0.4
_SIDES = {"cpu": 512, "cuda": 8192}
_HERE = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class RunCost:
    """What a run takes. `device_hours`: wall hours times workers; `how`: where the time came from, on one line; calls are upper bounds;
    `cost`: of those calls, in the unit of evaluation.prices, None where a paid endpoint has no price there or no question set was read."""

    device_hours: float
    training_s: float
    evaluation_s: float
    how: str
    answer_calls: int
    grade_calls: int
    cost: float | None
    assumptions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """Mean tokens of what a run computes, and how many questions and tiles each question set has."""

    query: float
    text: float
    tile: float  # template included
    visual: float
    sets: tuple[tuple[int, int], ...] = ()  # questions, tiles
    said: tuple[str, ...] = ()


@dataclass(frozen=True)
class Speed:
    """Matrix operations a second, and where the number is from."""

    rate: float
    kind: str
    said: str
    notes: tuple[str, ...] = field(default=())


def estimate_cost(recipe: Recipe) -> RunCost:
    """A run's device hours, calls and price; a retrieval recipe's alone."""
    if not isinstance(recipe.task, RetrievalTaskSettings):
        raise InputError(f"task.kind: {recipe.task.kind} is not estimated; only retrieval is")
    return cost_of(recipe, sizes_of(recipe), speed_of(recipe))


def cost_of(recipe: Recipe, sizes: Sizes, speed: Speed) -> RunCost:
    """The same from sizes and a speed that are known."""
    model, _ = Patient(recipe).meta
    forward, backward = forward_and_backward(model)
    kept, said = _kept_share(recipe, model, sizes, speed.kind)
    rate = speed.rate * SHARES[speed.kind]
    workers = max(1, recipe.cluster.workers)
    training = _training(recipe, sizes, forward, backward, kept) / rate / workers
    looks = evaluations(recipe)
    tile, query = forward.of(sizes.tile, sizes.visual), forward.of(sizes.query)
    embedded = sum(questions * query + tiles * tile for questions, tiles in sizes.sets)
    pairs = recipe.evaluation.pairs * (query + (1 + recipe.data.hard_negatives) * tile)
    batch = recipe.optim.batch * (query + (1 + recipe.data.hard_negatives) * tile)
    losses = due(recipe.evaluation.loss_every, recipe.optim.steps) * recipe.evaluation.loss_batches * batch * bool(recipe.data.validation)
    questions = sum(one for one, _ in sizes.sets)
    reading, unread = _reading(recipe, sizes)
    evaluation = (looks * (embedded + pairs + questions * reading) + losses) / rate
    known = len(sizes.sets) == len(recipe.evaluation.sets)
    answers = questions * looks if recipe.evaluation.reader is not None else 0
    grades = answers if isinstance(recipe.evaluation.grader, ChatGraderSettings) else 0
    return RunCost(
        device_hours=(training + evaluation) * workers / 3600,
        training_s=training,
        evaluation_s=evaluation,
        how=f"operations counted from shapes, over {speed.said}, of which a run reaches {SHARES[speed.kind]:.0%} (assumed)",
        answer_calls=answers,
        grade_calls=grades,
        cost=price_of(recipe.evaluation, answers, grades, sizes) if known or not _is_paid(recipe.evaluation, sizes) else None,
        assumptions=(
            *sizes.said,
            *speed.notes,
            said,
            f"{looks} evaluations, step 0 among them, which trials of one base share where evaluation.cache is on",
            *unread,
            "loading, decoding, checkpoints and waiting for endpoints are left out",
        ),
    )


def due(every: int, steps: int) -> int:
    """How often something happens that is due at step 0, every so many steps and at the last; 0: never."""
    return len({*range(0, steps + 1, every), steps}) if every else 0


def evaluations(recipe: Recipe) -> int:
    """How often the question sets are measured."""
    return due(recipe.evaluation.every, recipe.optim.steps)


def price_of(settings: EvaluationSettings, answers: int, grades: int, sizes: Sizes) -> float | None:
    """The most that so many calls cost; an endpoint on this machine is free where it has no price."""
    total = 0.0
    reader, grader = settings.reader, settings.grader
    if answers and isinstance(reader, RemoteReaderSettings):
        prompt = len(reader.system) / CHARACTERS_PER_TOKEN + sizes.query + settings.top_k_read * sizes.visual
        paid = _paid(settings, reader.model, reader.base_url, answers, prompt, reader.max_new_tokens)
        if paid is None:
            return None
        total += paid
    if grades and isinstance(grader, ChatGraderSettings):
        prompt = len(grader.template or RUBRIC) / CHARACTERS_PER_TOKEN + 2 * sizes.query
        paid = _paid(settings, grader.model, grader.base_url, grades, prompt, grader.max_new_tokens)
        if paid is None:
            return None
        total += paid
    return total


def _is_paid(settings: EvaluationSettings, sizes: Sizes) -> bool:
    """Whether an answered and graded question costs anything, or has no price that is known."""
    answered = int(settings.reader is not None)
    return price_of(settings, answered, answered, sizes) != 0


def _paid(settings: EvaluationSettings, model: str, url: str | None, calls: int, prompt: float, completion: float) -> float | None:
    price = next((one for one in settings.prices if one.model == model), None)
    if price is not None:
        return calls * (prompt * price.prompt + completion * price.completion) / 1e6
    return 0.0 if url is not None and urlsplit(url).hostname in _HERE else None


def _training(recipe: Recipe, sizes: Sizes, forward: Work, backward: Work, kept: float) -> float:
    """Operations of all updates: a first pass, a second one where graphs are not kept, and the backward pass."""
    passes = 2 - kept + recipe.model.gradient_checkpointing
    documents = recipe.optim.batch * (1 + recipe.data.hard_negatives)
    query_side = isinstance(recipe.task, RetrievalTaskSettings) and recipe.task.query_side

    def whole(tokens: float, visual: float = 0.0) -> float:
        return passes * forward.of(tokens, visual) + backward.of(tokens, visual)

    # Query-side tuning encodes documents once, without a gradient.
    tile = forward.of(sizes.tile, sizes.visual) if query_side else whole(sizes.tile, sizes.visual)
    text = forward.of(sizes.text) if query_side else whole(sizes.text)
    queries = recipe.optim.batch * whole(sizes.query)
    texts = PhasePlan(recipe.phases, recipe.optim.steps).texts_until(recipe.optim.steps)
    return texts * (queries + documents * text) + (recipe.optim.steps - texts) * (queries + documents * tile)


def _kept_share(recipe: Recipe, model: torch.nn.Module, sizes: Sizes, kind: str) -> tuple[float, str]:
    """The share of a step's graphs that is kept from the first pass, and how it was found."""
    keep, workers = recipe.objective.gradcache.keep_graphs_mb, max(1, recipe.cluster.workers)
    if keep == "auto" and kind == "cuda":
        return 0.0, "no graphs are taken to be kept (keep_graphs_mb: auto keeps what the GPU has room for)"
    room = machine_memory() // 8 // workers if keep == "auto" else keep * 2**20
    graph = graph_bytes(recipe, model, kind)
    documents = recipe.optim.batch * (1 + recipe.data.hard_negatives)
    tokens = recipe.optim.batch * sizes.query + documents * sizes.tile
    wanted = graph.of(int(tokens), int(documents * sizes.visual * PATCHES_PER_TOKEN)) / workers
    share = min(1.0, room / wanted) if wanted else 0.0
    return share, f"{share:.0%} of a step's graphs are kept from the first pass"


def _reading(recipe: Recipe, sizes: Sizes) -> tuple[float, tuple[str, ...]]:
    """Operations of one answer by a reader in this process; 0 where it is elsewhere, or where its config is not here."""
    reader = recipe.evaluation.reader
    if not isinstance(reader, LocalReaderSettings):
        return 0.0, ()
    source = locate_here(reader.model, None, "evaluation.reader.model")
    if source is None:
        return 0.0, (f"the time of the reader {reader.model} is not in it: it is not on this machine",)
    work, _ = forward_and_backward(on_meta(read_config(source.folder)))
    shown = recipe.evaluation.top_k_read * sizes.visual
    new = min(ANSWER_TOKENS, reader.max_new_tokens)
    return work.of(sizes.query + shown + new, shown), (f"an answer of the reader in this process has {new} tokens",)


def sizes_of(recipe: Recipe) -> Sizes:
    """Sizes from a sample of the data, as the doctor takes it; where there is none, the recipe's largest tile and usual texts."""
    largest = float(recipe.tiles.max_visual_tokens)
    usual = Sizes(QUERY_TOKENS, QUERY_TOKENS * 4, largest + TEMPLATE_TOKENS, largest)
    try:
        quick = Patient(resolve(recipe), deep=False, resolved=True)
        inputs.pairs(quick)
        inputs.question_sets(quick)
        named = list(tiles_of(RetrievalRows(train=(quick.pairs,), question_sets=tuple(quick.question_sets))))
        sampled, _ = inputs.sample_tiles(named, tile_reader(quick.resolved, quick.archives))
    except InputError as error:
        return replace(
            usual, said=(f"the data was not read, so tiles are the largest that the recipe allows, and no question is counted: {error}",)
        )
    shapes = [(int(one.pixels.shape[-2]), int(one.pixels.shape[-1])) for one in sampled]
    count, tile_frame = _counter(recipe)
    questions = [one.problem for known in quick.question_sets for one in known.questions[: inputs.QUICK_ROWS]]
    queries = [row.query for row in quick.pairs] + questions
    visual = mean(recipe.tiles.geometry().visual_tokens(*one) for one in shapes) if shapes else largest
    return Sizes(
        count(queries, "query") if queries else usual.query,
        count([row.passage for row in quick.texts], "document") if quick.texts else usual.text,
        visual + tile_frame,
        visual,
        tuple((len(one.questions), len(one.tiles)) for one in quick.question_sets),
        (f"tiles of {visual:.0f} visual tokens, the mean of {len(shapes)}",),
    )


def _counter(recipe: Recipe) -> tuple[Callable[[Sequence[str], str], float], int]:
    """Mean tokens of some texts, template included, and the tokens around a tile: by the tokenizer where it is here, else guessed."""
    settings = recipe.model
    name = settings.tokenizer or settings.base
    source = locate_here(name, None if settings.tokenizer else settings.revision, "model.base")
    folder = source.folder if source is not None else hub_folder(name, settings.revision)
    if folder is not None and (folder / "tokenizer.json").is_file() and settings.tokenizer is None:
        config = read_config(folder)
        instructions = {"query": settings.query_instruction, "document": settings.document_instruction}
        known = Inputs(load_tokenizer(folder), config, instructions, settings.max_text_tokens)  # type: ignore[arg-type]
        return lambda texts, role: mean(map(len, known.text_ids(list(texts), role))), len(known.tile_ids(known.cell, known.cell)) - 1  # type: ignore[arg-type]
    return lambda texts, role: mean(len(one) / CHARACTERS_PER_TOKEN for one in texts) + TEMPLATE_TOKENS, TEMPLATE_TOKENS


def speed_of(recipe: Recipe) -> Speed:
    """The matrix rate of the device that the recipe would use here, measured; that of a GPU which is not here is assumed."""
    wants_gpu = recipe.cluster.device == "cuda" or (recipe.cluster.device == "auto" and torch.cuda.is_available())
    if wants_gpu and not torch.cuda.is_available():
        said = f"{ABSENT_GPU / 1e12:.0f} TFLOP/s, assumed for a GPU that is not here"
        return Speed(ABSENT_GPU, "cuda", said, ("the GPU is not here: the time may be off by several times",))
    kind = "cuda" if wants_gpu else "cpu"
    rate = _matrix_rate(kind, recipe.model.dtype, recipe.run.threads)
    return Speed(rate, kind, f"{rate / 1e12:.3g} TFLOP/s measured here ({kind}, {recipe.model.dtype}, {recipe.run.threads} threads)")


@lru_cache
def _matrix_rate(kind: str, dtype: str, threads: int) -> float:
    """Operations a second of a square matrix product, the best of what fits into a fraction of a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        side = _SIDES[kind]
        one = torch.ones(side, side, dtype=DTYPES[dtype], device=kind)
        best, until = float("inf"), time.perf_counter() + _MEASURED_S
        while best == float("inf") or time.perf_counter() < until:
            started = time.perf_counter()
            one @ one
            if kind == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        return 2.0 * side**3 / best
    finally:
        torch.set_num_threads(before)
