"""What a recipe says about evaluation: when, on which question sets, and how embeddings are made and kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stairstep.data.settings import QuestionSetSource
from stairstep.records.places import check_places
from stairstep.settings import SettingError, setting

from .graders import ChatGraderSettings, ExactGraderSettings
from .readers import RemoteReaderSettings


@dataclass(frozen=True)
class LocalReaderSettings:
    """A reader in this process, by plain greedy generation."""

    kind: Literal["local"] = setting("local", doc="The kind of reader.")
    model: str = setting("tiny-reader", doc="A local folder, a hub id, or the name of a reader shipped in the package.")
    system: str = setting("", doc="System message of the reader; empty: none.")
    max_new_tokens: int = setting(48, doc="Most tokens of an answer.", minimum=1)
    batch: int = setting(32, doc="Questions answered at once.", minimum=1)


@dataclass(frozen=True)
class PriceSettings:
    """What a model's tokens cost."""

    model: str = setting(doc="The model's name, as the reader or grader names it.")
    prompt: float = setting(0.0, doc="Price of a million tokens of the prompt.", minimum=0)
    completion: float = setting(0.0, doc="Price of a million tokens of the reply.", minimum=0)


@dataclass(frozen=True)
class EvaluationSettings:
    """When and on what a run is measured."""

    every: int = setting(50, doc="Steps between evaluations on the question sets; step 0 and the last are always among them.", minimum=1)
    mode: Literal["auto", "inline", "after", "beside"] = setting(
        "inline",
        doc="When question sets are measured: inline, while training waits; after, all their steps' checkpoints once training has ended, "
        "for people whose only GPU cannot hold the trainer and the reader at once; beside, by evaluators (cluster.evaluators) on devices "
        "of their own while training goes on; auto: beside where the cluster has room for the evaluators besides the workers, or where "
        "cluster.evaluator_resources names a node group for them on a cluster that may grow, else inline. "
        "The scores are the same.",
    )
    max_pending: int = setting(
        2, doc="Evaluations beside training that may be open at once; with one more, training waits until one is in.", minimum=1
    )
    loss_every: int = setting(25, doc="Steps between validation losses; step 0 and the last are always among them; 0: none.", minimum=0)
    loss_batches: int = setting(
        5,
        doc="Batches of the validation loss: a fixed sample of the whole split, with as many candidates a query as in training.",
        minimum=0,
    )
    selection_metric: Literal["hit@1", "hit@3", "hit@5", "hit@10", "mrr", "ndcg@5", "ndcg@10", "qa"] = setting(
        "hit@1", doc="Metric of the primary set whose value on the selection split picks the best checkpoint and stops early."
    )
    sets: tuple[QuestionSetSource, ...] = setting((), doc="Question sets; the first is the primary one, whose rows lie in the run folder.")
    pairs: int = setting(
        0,
        doc="Rows of the validation split, a fixed sample, whose tiles are found again among all tiles of the sample; 0: none.",
        minimum=0,
    )
    top_k: int = setting(10, doc="Retrieved tiles that each question's row lists.", minimum=3)
    selection_fraction: float = setting(
        0.5,
        doc="Share of the questions on which checkpoints are selected; scores of the selected one come from the others.",
        minimum=0,
        maximum=1,
    )
    reader: LocalReaderSettings | RemoteReaderSettings | None = setting(
        None, doc="Who answers the questions from the tiles retrieved; null: retrieval alone is measured."
    )
    grader: ExactGraderSettings | ChatGraderSettings = setting(ExactGraderSettings(), doc="Who grades the answers.")
    ledger: bool = setting(True, doc="Keep answers and grades by their content and never ask the same again.")
    ledger_folder: str | None = setting(
        None, doc="Where they are kept, a folder or a URL (s3://…); default: a folder under the run root, shared by its runs."
    )
    prices: tuple[PriceSettings, ...] = setting((), doc="Prices of models; the cost of an evaluation then stands in its summary.")
    top_k_read: int = setting(3, doc="Retrieved tiles that the reader is shown, best first.", minimum=1, maximum=10)
    coverage_floor: float = setting(
        0.95, doc="Least share of questions that must be graded; below it there is no QA score, only its bounds.", minimum=0, maximum=1
    )
    batch_tokens: int = setting(16384, doc="Tokens that the encoder sees at once in evaluation.", minimum=1)
    cache: bool = setting(True, doc="Keep embeddings by encoder state and find them again in later evaluations.")
    cache_folder: str | None = setting(
        None, doc="Where embeddings are kept, a folder or a URL (s3://…); default: a folder under the run root, shared by its runs."
    )
    cache_states: int = setting(
        32, doc="Encoder states whose embeddings are kept; those unused for longest go first (4 bytes a tile and dimension).", minimum=1
    )

    def check(self) -> None:
        """The reader is shown what the rows list, a model has one price, and a URL is one that holds no secret."""
        check_places(ledger_folder=self.ledger_folder, cache_folder=self.cache_folder)
        if self.reader is None and self.selection_metric == "qa":
            raise SettingError("selection_metric", "there is no QA score without a reader; name evaluation.reader, or another metric")
        if self.reader is not None and self.top_k_read > self.top_k:
            raise SettingError("top_k_read", f"{self.top_k_read} is more than evaluation.top_k ({self.top_k}); raise that, or lower this")
        twice = next((one.model for one in self.prices if sum(other.model == one.model for other in self.prices) > 1), None)
        if twice is not None:
            raise SettingError("prices", f"{twice} has more than one price; leave one")
