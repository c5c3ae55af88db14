"""The retrieval task: contrastive fine-tuning of a bi-encoder on query–tile pairs and text pairs, measured on question sets.

One path computes every step, text or tile, warmup or later: the same masks, the same objective, the same GradCache. What differs between
phases is the rows alone, so no option can act in one of them and be lost in another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from stairstep.data import BatchPlan, Order, PairRow, PairSource, TextRow, TextSource, counts_of, fixed_sample
from stairstep.evaluation.embed import Told, nobody
from stairstep.evaluation.embeddings import EmbeddingStore
from stairstep.evaluation.question_set import RetrievalResult, evaluate_pairs, evaluate_question_set, write_result
from stairstep.evaluation.table import result_table
from stairstep.models.encoder import Encoder
from stairstep.models.flops import forward_and_backward
from stairstep.objectives import (
    Alone,
    Chunk,
    Collective,
    LossOutput,
    Side,
    build_objective,
    cached_loss,
    cached_step,
    candidates,
    cut_batch,
)
from stairstep.records import result_paths
from stairstep.tiles import TileReader
from stairstep.training import EvaluationReport, PhasePlan, StepReport

from .answering import Answering, with_earlier_calls
from .batches import Batch, TileAhead, pixels_of, text_batch, tile_batch, tile_paths
from .loading import RetrievalRows
from .recipe import Recipe, RetrievalTaskSettings

Role = Literal["query", "document"]
OBJECTIVE_FILE = "objective.safetensors"
_FROZEN: tuple[Side, ...] = ("document",)
_SAMPLE_SEED = 0  # the validation sample is the same in all runs, so that their curves can be laid over each other


class FrozenDocuments:
    """The encoder as query-side tuning sees documents: its adapter off, nothing of it copied."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.tile_tokens = encoder.tile_tokens
        self.text_tokens = encoder.text_tokens
        self.modules = encoder.modules
        self.eval = encoder.eval

    @property
    def device(self) -> torch.device:
        """Where the one model lies."""
        return self._encoder.device

    @property
    def dimension(self) -> int:
        """Numbers in an embedding."""
        return self._encoder.dimension

    def encode_tiles(self, pixels: Sequence[Tensor]) -> Tensor:
        """Embeddings of tiles by the bare base."""
        with self._encoder.adapter_disabled():
            return self._encoder.encode_tiles(pixels)

    def encode_texts(self, texts: Sequence[str], role: Role) -> Tensor:
        """Embeddings of texts by the bare base."""
        with self._encoder.adapter_disabled():
            return self._encoder.encode_texts(texts, role)

    def state_digest(self) -> str:
        """The bare base's digest."""
        return self._encoder.state_digest(adapter=False)


class RetrievalTask:
    """A `training.Task` over an encoder, its rows and its question sets."""

    def __init__(
        self,
        recipe: Recipe,
        encoder: Encoder,
        rows: RetrievalRows,
        reader: TileReader,
        collective: Collective | None = None,
        store: EmbeddingStore | None = None,
        fresh: bool = False,
    ) -> None:
        self.recipe, self.encoder, self.rows, self.reader, self.store = recipe, encoder, rows, reader, store
        self.collective: Collective = collective or Alone()
        self.objective = build_objective(recipe.objective).to(encoder.device)
        self.answering = Answering(recipe.evaluation, reader, recipe.tiles, encoder.device, recipe.run.root, fresh)
        self.phases = PhasePlan(recipe.phases, recipe.optim.steps)
        self.results: list[RetrievalResult] = []
        self.embedding: Told = nobody
        """Hears how far an evaluation's embedding is; whoever runs the task sets it."""
        self._forward, backward = forward_and_backward(encoder.model)
        self._both = self._forward + self._forward + backward  # of a GradCache step: its first pass, and its second
        self._query_side = isinstance(recipe.task, RetrievalTaskSettings) and recipe.task.query_side
        batch, seed, order = recipe.optim.batch, recipe.run.seed, recipe.data.order
        self._tiles = _plan(rows.train, recipe.data.train, batch, seed, order)
        self._texts = _plan(rows.text, recipe.data.text, batch, seed, order)
        self._ahead = TileAhead(reader, self._paths_of, self.collective)
        encoder.eval()

    # -- what the step loop asks for

    def groups(self) -> dict[str, list[tuple[str, Parameter]]]:
        """The encoder's trained parameters by group, and the objective's own."""
        own = [(f"objective.{name}", one) for name, one in self.objective.named_parameters() if one.requires_grad]
        return {**self.encoder.groups(), "objective": own}

    def step(self, step: int) -> StepReport:
        """One global batch: this worker's chunks, the whole loss."""
        batch = self._text_batch(step) if self.phases.kind(step) == "text" else self._tile_batch(self.phases.ordinal(step))
        groups = self.groups()
        learned = [one for _, one in groups.pop("objective")]
        self.encoder.train()
        try:
            output = cached_step(
                self._chunks(batch),
                lambda chunk: self._encode(batch, chunk),
                self._loss(batch),
                parameters=[one for members in groups.values() for _, one in members],
                loss_parameters=learned,
                collective=self.collective,
                seed=self.recipe.run.seed,
                step=step,
                keep_graphs_mb=self.recipe.objective.gradcache.keep_graphs_mb,
                device=self.encoder.device,
            )
        finally:
            self.encoder.eval()
        scale = output.metrics.pop("scale")
        metrics = {
            **output.metrics,
            "temperature": 1 / scale,
            "text": float(self.phases.kind(step) == "text"),
            "documents": float(len(batch.documents)),
        }
        rows = batch.where
        if any(output.not_finite.values()):
            rows = [batch.where[row] for row in output.not_finite.get("query", [])] or batch.where
        return StepReport(output.loss, metrics, rows, batch.waited_s)

    def after_update(self) -> None:
        """Hold the temperature in its limits."""
        self.objective.clamp_()

    def validation(self) -> Mapping[str, float]:
        """Loss and accuracy over a fixed sample of the whole validation split, in full batches like training's.

        A smaller batch at the end would have fewer candidates; only a split of less than one batch is taken as it is."""
        rows = [row for source in self.rows.validation for row in source]
        size = self.recipe.optim.batch
        batches = min(self.recipe.evaluation.loss_batches, max(1, len(rows) // size))
        if not rows or not batches:
            return {}
        sample = [rows[index] for index in fixed_sample(len(rows), batches * size, _SAMPLE_SEED)]
        totals: dict[str, float] = {}
        for start in range(0, len(sample), size):
            for name, value in self._validation_batch(sample[start : start + size]).items():
                totals[name] = totals.get(name, 0.0) + value / batches
        return totals

    def evaluate(self, step: int) -> EvaluationReport:
        """All question sets and the held-out pairs; the first worker computes, the selection score is told to the others."""
        self.results = self.evaluate_sets(step) if self.collective.rank == 0 else []
        metrics = {name: value for result in self.results for name, value in result.metrics().items()}
        selection = self._selection()
        told = torch.tensor([selection if selection is not None else 0.0, float(selection is not None)], dtype=torch.float64)
        self.collective.sum_([told])
        score, known = told.tolist()
        return EvaluationReport(metrics, score if known else None)

    def evaluate_sets(self, step: int = 0) -> list[RetrievalResult]:
        """The results of every question set in the recipe's order, then of the held-out pairs."""
        settings = self.recipe.evaluation
        tile_side = FrozenDocuments(self.encoder) if self._query_side else None
        results = []
        for one in self.rows.question_sets:
            found = evaluate_question_set(self.encoder, self.reader, one, settings, self.store, tile_side, self.embedding)
            results.append(self.answering.answered(found, step))
        held_out = [row for source in self.rows.validation for row in source]
        if settings.pairs and held_out:
            pairs = [held_out[index] for index in sorted(fixed_sample(len(held_out), settings.pairs, _SAMPLE_SEED))]
            results.append(evaluate_pairs(self.encoder, self.reader, pairs, settings, self.store, tile_side, self.embedding))
        return results

    def write_results(self, folder: Path, step: int) -> list[str]:
        """Rows and summaries of the last evaluation, the primary set's at the top; returns a table a set."""
        for result in self.results:
            primary = bool(self.rows.question_sets) and result is self.results[0]
            earlier = result_paths(folder, step, None if primary else result.name)[1]
            write_result(folder, step, replace(result, facts=with_earlier_calls(result.facts, earlier)), primary)
        return [f"step {step}\n{result_table(result, result.name)}" for result in self.results]

    def save(self, folder: Path) -> None:
        """The adapter and the objective's own parameters."""
        self.encoder.save(folder)
        own = {name: one.detach().cpu().contiguous() for name, one in self.objective.state_dict().items()}
        save_file(own, folder / OBJECTIVE_FILE)

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote."""
        self.encoder.load_trained(folder)
        self.objective.load_state_dict(load_file(folder / OBJECTIVE_FILE))

    def close(self) -> None:
        """Stop decoding ahead."""
        self._ahead.close()

    # -- batches

    def _text_batch(self, step: int) -> Batch:
        assert self._texts is not None, "a recipe with text steps has text rows"
        rows: list[TextRow] = [self.rows.text[source][row] for source, row in self._texts.batch(self.phases.ordinal(step))]
        return text_batch(rows)

    def _pair_rows(self, number: int) -> list[PairRow]:
        assert self._tiles is not None, "a recipe with tile steps has training rows"
        return [self.rows.train[source][row] for source, row in self._tiles.batch(number)]

    def _paths_of(self, number: int) -> list[Path] | None:
        last = self.recipe.optim.steps - self.phases.texts_until(self.recipe.optim.steps)
        return tile_paths(self._pair_rows(number)) if number < last else None

    def _tile_batch(self, number: int) -> Batch:
        tiles, waited = self._ahead.take(number)
        return tile_batch(self._pair_rows(number), tiles, waited, self.collective)

    def _validation_batch(self, rows: Sequence[PairRow]) -> Mapping[str, float]:
        ahead = TileAhead(self.reader, lambda number: tile_paths(rows) if number == 0 else None, self.collective)
        tiles, waited = ahead.take(0)
        batch = tile_batch(rows, tiles, waited, self.collective)
        output = cached_loss(
            self._chunks(batch),
            lambda chunk: self._encode(batch, chunk),
            self._loss(batch),
            collective=self.collective,
            device=self.encoder.device,
        )
        return {"loss": output.loss, **{name: output.metrics[name] for name in ("accuracy", "margin") if name in output.metrics}}

    # -- one batch's mathematics

    def _chunks(self, batch: Batch) -> list[Chunk]:
        tokens = self.encoder.tile_tokens
        costs = [self.encoder.text_tokens(one.text, "document") if one.text is not None else tokens(*one.size) for one in batch.documents]
        queries = [self.encoder.text_tokens(text, "query") for text in batch.queries]
        return cut_batch(
            queries,
            costs,
            self.recipe.objective.gradcache,
            document_shapes=[one.size for one in batch.documents],
            frozen=_FROZEN if self._query_side else (),
            token_work=self._token_work(max(queries), *max(zip(costs, (one.size for one in batch.documents), strict=True))),
        )

    def _token_work(self, query: int, document: int, size: tuple[int, int]) -> dict[Side, float]:
        """Operations by token of a query and of a document of so many tokens; those of a tile go through the vision tower as well."""
        visual = math.prod(self.encoder.inputs.grid(*size)) if all(size) else 0
        forward, both = self._forward.of(document, visual), self._both.of(document, visual)
        return {"query": self._both.of(query) / query, "document": (forward if self._query_side else both) / document}

    def _encode(self, batch: Batch, chunk: Chunk) -> Tensor:
        if chunk.side == "query":
            return self.encoder.encode_texts([batch.queries[position] for position in chunk.positions], "query")
        documents = [batch.documents[position] for position in chunk.positions]
        with self._documents_side():
            if documents[0].text is not None:
                return self.encoder.encode_texts([one.text or "" for one in documents], "document")
            return self.encoder.encode_tiles(pixels_of(batch, documents, self.reader))

    @contextmanager
    def _documents_side(self) -> Iterator[None]:
        """Documents under query-side tuning: adapter off and no dropout, as the built index has them."""
        if not self._query_side:
            yield
            return
        training = self.encoder.training
        self.encoder.eval()
        try:
            with self.encoder.adapter_disabled(), torch.no_grad():
                yield
        finally:
            self.encoder.train(training)

    def _loss(self, batch: Batch) -> Callable[[Tensor, Tensor], LossOutput]:
        compared = candidates(
            batch.queries,
            batch.positives,
            [one.key for one in batch.documents],
            [one.article for one in batch.documents],
            self.recipe.objective.masks,
        ).to(self.encoder.device)

        def loss(queries: Tensor, documents: Tensor) -> LossOutput:
            return self.objective(queries, documents, compared)

        return loss

    def _selection(self) -> float | None:
        """The score that keep-best and early stopping look at: the primary set's, on its selection split."""
        if not self.results or not self.rows.question_sets:
            return None
        metric, result = self.recipe.evaluation.selection_metric, self.results[0]
        if metric == "qa":
            interval = result.qa["selection"].interval if result.qa else None
        else:
            interval = result.selection.get(metric)
        return None if interval is None or interval.n == 0 else interval.value


def _plan(
    rows: Sequence[Sequence[object]], sources: Sequence[PairSource] | Sequence[TextSource], batch: int, seed: int, order: Order
) -> BatchPlan | None:
    if not rows:
        return None
    return BatchPlan([len(one) for one in rows], counts_of(sources, batch), seed, order, [one.path for one in sources])
