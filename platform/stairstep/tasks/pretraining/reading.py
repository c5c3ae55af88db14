"""The reading task: transcription and questions, through the very prompts that a reader is later sent.

A reader that spells well still takes the wrong value from a page. A second loss on the vision tower tells it directly: of which fact is
the value under each visual token, and which qualifier is it? Its linear head is thrown away, like that of the glyph stage. A third one on
the language model has it compare the page with the question (comparing.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from stairstep.models.prompts import Prompts
from stairstep.models.reading import Reader, language_states
from stairstep.models.tower import Features, tower_features
from stairstep.tiny.articles import Fact, Title
from stairstep.tiny.kinds import KINDS
from stairstep.tiny.render import HEIGHT, WIDTH, Drawing
from stairstep.training import EvaluationReport, StepReport

from .ahead import Batch
from .base import Pretraining, report_of
from .comparing import QUALIFIERS, Comparing, comparison_labels, states_on_the_way
from .exam import reading_scores
from .glyphs import CELL
from .pages import as_tensor
from .samples import BLANK, Drill, drill
from .settings import ReadingTaskSettings

if TYPE_CHECKING:
    from ..recipe import Recipe

_SIZE = (HEIGHT, WIDTH)
_MULTIPLE = 16  # lengths are rounded up, so that a GPU meets few different shapes
# What is told of a visual token: 0 for neither a value nor a qualifier, then facts, then qualifiers.
_FACTS = {fact: index for index, fact in enumerate((fact for kind in KINDS for fact in kind.facts), start=1)}
_MARKS = 1 + len(_FACTS) + len(QUALIFIERS)


class ReadingTask(Pretraining):
    """Trains the whole generating model on the tokens of right answers."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        assert isinstance(recipe.task, ReadingTaskSettings)
        self.settings = recipe.task
        super().__init__(recipe, device, False, recipe.task.workers)
        self.prompts = Prompts(self.tokenizer, self.model.config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.model.init_seed)
            self.heads = nn.ModuleDict()
            if self.settings.values:
                self.heads["value"] = nn.Linear(self.model.config.vision_config.out_hidden_size, _MARKS)
            if self.settings.comparison:
                width = self.model.config.text_config.hidden_size
                self.heads["comparing"] = Comparing(width)
            self.heads.to(device)

    def groups(self) -> dict[str, list[tuple[str, Parameter]]]:
        """All parameters with the heads, or those of the language model alone with its head."""
        every = super().groups()
        heads = [(f"heads.{name}", one) for name, one in self.heads.named_parameters()]
        if not self.settings.train_tower:
            return {"llm": [*every["llm"], *heads]}
        return {**every, "merger": [*every["merger"], *heads]}

    def own_tensors(self) -> dict[str, Tensor]:
        """The heads that are trained."""
        return {name: one.data for name, one in self.heads.named_parameters()}

    def make_batch(self, step: int) -> Batch:
        """Pages, prompts with their answers, and the tokens to be predicted."""
        return answer_batch(self.prompts, drill(self.settings, self.seed, step, self.steps, self.batch))

    def step(self, step: int) -> StepReport:
        """One batch of answers."""
        batch, waited = self.take(step)
        with self.computing():
            seen = seen_pages(self.model, batch, self.device, self.settings.train_tower)
            with states_on_the_way(self.model) as states:
                loss, exact = answer_loss(self.model, batch, seen)
            metrics = {"exact": exact, "tiles": float(batch["tiles"].shape[1])}
            whole = loss
            if self.settings.values:
                marks = self.heads["value"](seen.merged.flatten(0, 1))
                of_values = nn.functional.cross_entropy(marks, batch["values"].flatten().long())
                metrics["values_loss"] = float(of_values.detach())
                whole = whole + self.settings.values * of_values
            if self.settings.comparison and "named" in batch:
                told = self.heads["comparing"](states, batch["ids"] == self.prompts.image_token, batch)
                metrics |= {f"{name}_loss": float(one.detach()) for name, one in told.items()}
                whole = whole + self.settings.comparison * sum(told.values())
            whole.backward()
        return StepReport(float(loss.detach()), metrics, waited_s=waited)

    def evaluate(self, step: int) -> EvaluationReport:
        """Exact answers on a tinywiki world that no step shows anything of."""
        with self.looking():
            reader = Reader(self.model, self.tokenizer, batch=256 if self.device.type == "cuda" else 32)
            scores = reading_scores(reader, self.settings.exam_seed, self.settings.held_out)
        return report_of({name: one.value for name, one in scores.items()})


def answer_batch(prompts: Prompts, practice: Drill) -> Batch:
    """A drill as tensors: `tiles` names the page of every tile, `predicted` the places (flat) whose next tokens are `targets`, and
    where all samples are questions about one tile, there is also what comparing.py tells of them."""
    samples = practice.samples
    drawings = [page.drawing() for page in practice.pages]
    pixels = as_tensor([one.pixels for one in drawings])
    shown = zip(drawings, practice.facts, practice.articles, strict=True)
    values = [value_labels(drawing, facts, article.title if article else None) for drawing, facts, article in shown]
    pixels = torch.cat([pixels, torch.full_like(pixels[:1], 255)])  # the blank one is last, where index -1 finds it
    texts = [prompts.text(one.question, len(one.tiles)) for one in samples]
    sizes = [[_SIZE] * len(one.tiles) for one in samples]
    end = prompts.tokenizer.eos_token_id
    answers = prompts.tokenizer([one.answer for one in samples], add_special_tokens=False)["input_ids"]
    rows = prompts.ids(texts, sizes)
    whole = [[*row, *answer] for row, answer in zip(rows, answers, strict=True)]
    tokens = prompts.batch(whole, sizes, _MULTIPLE)
    width = tokens.ids.shape[1]
    predicted: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for index, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        start = index * width + len(row) - 1
        predicted += range(start, start + len(answer) + 1)
        targets += [*answer, end]
        owners += [index] * (len(answer) + 1)
    tiles = torch.tensor([one.tiles for one in samples])
    alone = all(one.about and len(one.tiles) == 1 for one in samples)
    compared = comparison_labels(prompts, practice, drawings, rows, width) if alone else {}
    return {
        **compared,
        "pixels": pixels,
        "values": torch.from_numpy(np.stack([*values, np.zeros_like(values[0])])),
        "tiles": torch.where(tiles == BLANK, len(pixels) - 1, tiles),
        "ids": tokens.ids,
        "positions": tokens.positions,
        "predicted": torch.tensor(predicted),
        "targets": torch.tensor(targets),
        "owners": torch.tensor(owners),
    }


def value_labels(drawing: Drawing, facts: Sequence[Fact], title: Title | None = None) -> np.ndarray:
    """The number of the fact whose value lies under each 32×32 cell of a page, or of the title's qualifier, or 0: uint8 [cells]."""
    columns = WIDTH // CELL
    found = np.zeros(HEIGHT // CELL * columns, dtype=np.uint8)
    text = "".join(character for character, *_ in drawing.characters)
    marked = [(text.rindex(fact.value), fact.value, _FACTS[fact.kind]) for fact in facts]
    if title is not None:
        marked.append((text.index(title.word), title.word, 1 + len(_FACTS) + QUALIFIERS[title.word]))
    for start, word, number in marked:
        for _, left, top, right, bottom in drawing.characters[start : start + len(word)]:
            found[(top + bottom) // 2 // CELL * columns + (left + right) // 2 // CELL] = number
    return found


def seen_pages(model: Any, batch: Batch, device: torch.device, train_tower: bool = True) -> Features:
    """What the vision tower makes of a batch's pages."""
    with torch.set_grad_enabled(train_tower and torch.is_grad_enabled()):
        return tower_features(model.model.visual, batch["pixels"], device)


def answer_loss(model: Any, batch: Batch, pages: Features) -> tuple[Tensor, float]:
    """The mean loss of the answers' tokens, and the share of answers that are right in every token."""
    seen = pages.select(batch["tiles"].flatten())
    features = Features(seen.merged.flatten(0, 1)[None], tuple(one.flatten(0, 1)[None] for one in seen.deepstack))
    hidden, _ = language_states(model.model, batch["ids"], batch["positions"], features)
    logits = model.lm_head(hidden.flatten(0, 1)[batch["predicted"]])
    loss = nn.functional.cross_entropy(logits, batch["targets"])
    wrong = (logits.detach().argmax(-1) != batch["targets"]).float()
    mistakes = torch.zeros(len(batch["ids"]), device=loss.device).index_add_(0, batch["owners"], wrong)
    return loss, float((mistakes == 0).float().mean())
