"""The matching task: a page and the words on it are drawn together in the embedding space, on generic text alone.

Pages come in groups that share most of their title, as near-equal articles do; a query has some of its page's words between words that
are on no page. Documents are pixels, and in a share of steps the pages' text, so that texts and tiles come to lie in one space.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from stairstep.models.inputs import Inputs
from stairstep.models.prompts import Prompts
from stairstep.models.reading import language_states
from stairstep.models.tower import Features, tower_features
from stairstep.objectives import build_objective, candidates
from stairstep.tiny.fonts import PRETRAINING_FONTS
from stairstep.tiny.layouts import PRETRAINING_LAYOUTS
from stairstep.tiny.render import HEIGHT, WIDTH, Line, TilePage, fits, wrap
from stairstep.tiny.words import pretraining_word, year
from stairstep.training import EvaluationReport, StepReport

from .ahead import Batch
from .base import Pretraining, report_of
from .exam import retrieval_scores
from .pages import as_tensor, share_at, unworldly_name, varied
from .settings import MatchingTaskSettings

if TYPE_CHECKING:
    from ..recipe import Recipe

_SIZES = (16, 18, 20)
_MULTIPLE = 16
_SAME_ARTICLE = 0.45  # share of a group's pages that keep the title of the page before
_ASKING = (
    "what",
    "which",
    "who",
    "whom",
    "whose",
    "when",
    "where",
    "how",
    "is",
    "was",
    "were",
    "are",
    "did",
    "does",
    "has",
    "had",
    "the",
    "a",
    "of",
    "in",
    "on",
    "at",
    "by",
    "to",
    "for",
    "from",
    "with",
    "it",
)


@dataclass(frozen=True)
class Match:
    """A page, a query that means it, and the page as text."""

    page: TilePage
    query: str
    passage: str


def matches(rng: random.Random, count: int) -> list[Match]:
    """Pages of one step, in groups of one to three: pages of one article, which only their facts tell apart, and near-equal titles."""
    found: list[Match] = []
    while len(found) < count:
        title = [unworldly_name(rng), unworldly_name(rng, 6) if rng.random() < 0.4 else "", _plain_word(rng)]
        for _ in range(rng.choice((1, 2, 2, 3))):
            match = _match(rng, title)
            if match is not None:
                found.append(match)
            chance = rng.random()
            if chance >= _SAME_ARTICLE:
                place = 2 if chance < 0.8 else 0
                title = [*title[:place], _plain_word(rng) if place else unworldly_name(rng), *title[place + 1 :]]
    return found[:count]


def _plain_word(rng: random.Random) -> str:
    while True:
        word = pretraining_word(rng, 8).lower()
        if word.isalpha() and len(word) >= 3:
            return word


def _match(rng: random.Random, title: Sequence[str]) -> Match | None:
    """A page with this title, facts or sentences of random words, and a query about one of them."""
    layout, font, size = rng.choice(PRETRAINING_LAYOUTS), rng.choice(PRETRAINING_FONTS), rng.choice(_SIZES)
    names = [part for part in title[:2] if part]
    text = f"{' '.join(names)} ({title[2]})" if rng.random() < 0.6 else f"{title[2].capitalize()} {' '.join(names)}"
    rows = [Line(line, role="title") for line in wrap(text, layout, font, size, bold=True)]
    facts = [(_plain_word(rng), year(rng) if rng.random() < 0.4 else unworldly_name(rng)) for _ in range(rng.randint(1, 3))]
    for label, value in facts:
        if rng.random() < 0.5:
            more = [Line(label.capitalize(), value, "fact")]
        else:
            more = [Line(line) for line in wrap(f"{label.capitalize()} {rng.choice(_ASKING)} {value}.", layout, font, size)]
        if fits([*rows, *more], layout, font, size):
            rows += more
    if not fits(rows, layout, font, size):
        return None
    page = TilePage(tuple(rows), layout, font, size)
    return Match(page, _query(rng, names, title[2], facts[0][0]), "\n".join(page.lines))


def _query(rng: random.Random, names: Sequence[str], qualifier: str, label: str) -> str:
    """A query: what is asked for, mostly in the page's word, then the title or, under another qualifier, the name alone."""
    about = label if rng.random() < 0.85 else _plain_word(rng)
    chance = rng.random()
    name = " ".join(names)
    title = f"the {qualifier} {name}" if chance < 0.4 else f"{name} ({qualifier})" if chance < 0.7 else f"the {_plain_word(rng)} {name}"
    asking = rng.choices(_ASKING, k=rng.randint(1, 3))
    words = [*asking, about, *rng.choices(_ASKING, k=rng.randint(0, 2)), title]
    if rng.random() < 0.4:
        words = [*asking, title, *rng.choices(_ASKING, k=rng.randint(0, 1)), about]
    query = " ".join(words)
    return query[0].upper() + query[1:] + "?"


class MatchingTask(Pretraining):
    """Trains the whole model as an encoder."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        assert isinstance(recipe.task, MatchingTaskSettings)
        self.settings = recipe.task
        super().__init__(recipe, device, False, recipe.task.workers)
        model = recipe.model
        instructions = {"query": model.query_instruction, "document": model.document_instruction}
        self.inputs = Inputs(self.tokenizer, self.model.config, instructions, model.max_text_tokens)  # type: ignore[arg-type]
        self.prompts = Prompts(self.tokenizer, self.model.config)
        self.objective = build_objective(recipe.objective).to(device)

    def groups(self) -> dict[str, list[tuple[str, Parameter]]]:
        """The model's parameters, and the objective's own."""
        own = [(f"objective.{name}", one) for name, one in self.objective.named_parameters() if one.requires_grad]
        return {**super().groups(), "objective": own}

    def own_tensors(self) -> dict[str, Tensor]:
        """The temperature."""
        return dict(self.objective.state_dict())

    def after_update(self) -> None:
        """Hold the temperature in its limits."""
        self.objective.clamp_()

    def make_batch(self, step: int) -> Batch:
        """Queries with pages, or with their text."""
        rng = random.Random(f"matching/{self.seed}/{step}")
        found = matches(rng, self.batch)
        batch: Batch = {"queries": [one.query for one in found], **self._texts("query", [one.query for one in found])}
        if rng.random() < share_at(self.settings.text, step, self.steps):
            return batch | self._texts("document", [one.passage for one in found])
        pages = [one.page.render() for one in found]
        return batch | {"pixels": as_tensor([varied(rng, page) if rng.random() < self.settings.varied else page for page in pages])}

    def _texts(self, role: str, texts: Sequence[str]) -> Batch:
        rows = self.inputs.text_ids(texts, role)  # type: ignore[arg-type]
        batch = self.prompts.batch(rows, [()] * len(rows), _MULTIPLE)
        return {f"{role}_ids": batch.ids, f"{role}_positions": batch.positions, f"{role}_last": torch.tensor(batch.lengths) - 1}

    def step(self, step: int) -> StepReport:
        """One contrastive batch."""
        batch, waited = self.take(step)
        with self.computing():
            names = batch["queries"]
            queries = self._embed_texts(batch, "query")
            tiles = "pixels" in batch
            documents = self._embed_tiles(batch["pixels"]) if tiles else self._embed_texts(batch, "document")
            rows = list(range(len(names)))
            compared = candidates(names, rows, rows, None, self.recipe.objective.masks).to(self.device)
            output = self.objective(queries, documents, compared)
            output.loss.backward()
        metrics = {
            "accuracy": float(output.metrics["accuracy"]),
            "temperature": 1 / float(output.metrics["scale"]),
            "text": float(not tiles),
        }
        return StepReport(float(output.loss.detach()), metrics, waited_s=waited)

    def _embed_texts(self, batch: Batch, role: str) -> Tensor:
        hidden, _ = language_states(self.model.model, batch[f"{role}_ids"], batch[f"{role}_positions"], None)
        return _pooled(hidden, batch[f"{role}_last"])

    def _embed_tiles(self, pixels: Tensor) -> Tensor:
        features = tower_features(self.model.model.visual, pixels, self.device)
        tokens = self.inputs.tiles([(HEIGHT, WIDTH)] * len(pixels), self.device)
        packed = Features(features.merged.flatten(0, 1)[None], tuple(one.flatten(0, 1)[None] for one in features.deepstack))
        hidden, _ = language_states(self.model.model, tokens.ids, tokens.positions, packed)
        return _pooled(hidden, torch.full((len(pixels),), tokens.ids.shape[1] - 1, device=self.device))

    def evaluate(self, step: int) -> EvaluationReport:
        """Hits on a tinywiki world, whose fonts, layouts and words no step shows."""

        def texts(some: Sequence[str]) -> Tensor:
            batch = {name: one.to(self.device) for name, one in self._texts("query", some).items()}
            return self._embed_texts(batch, "query")

        with self.looking():
            scores = retrieval_scores(texts, self._embed_tiles, self.settings.exam_seed, self.settings.held_out)
        return report_of({name: one.value for name, one in scores.items()})


def _pooled(hidden: Tensor, last: Tensor) -> Tensor:
    rows = torch.arange(len(hidden), device=hidden.device)
    return nn.functional.normalize(hidden[rows, last].float(), dim=-1)
