"""What all losses share: the output, the precision, and the metrics of a batch.

The loss is the mean over the global batch, whatever the number of workers. Embeddings come L2-normalised, so a product is a cosine.
Similarity, scale and what follows are computed in float32 or in the inputs' own type where that is wider, whatever autocast or TF32 say:
bfloat16 logits at a scale of 14 have steps of 0.06.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .masks import Candidates
from .temperature import Temperature


@dataclass(frozen=True)
class LossOutput:
    """A loss with its graph, and what is worth knowing about it without one."""

    loss: Tensor  # scalar: mean over the batch's queries
    per_query: Tensor  # [Q], detached
    metrics: dict[str, Tensor | float]  # scalars, detached


class Objective(nn.Module):
    """A loss over query and document embeddings; its parameters (temperature, bias) are trained beside the encoder's."""

    def __init__(self, temperature: Temperature) -> None:
        super().__init__()
        self.temperature = temperature

    def losses(self, cosine: Tensor, candidates: Candidates) -> Tensor:
        """The loss of each query [Q], from the cosines [Q, D]."""
        raise NotImplementedError

    def forward(self, queries: Tensor, documents: Tensor, candidates: Candidates) -> LossOutput:
        """The mean loss of `queries` [Q, d] over `documents` [D, d], with metrics."""
        if candidates.allowed.shape != (len(queries), len(documents)) or not len(queries):
            expected = " x ".join(str(size) for size in candidates.allowed.shape)
            raise ValueError(f"{len(queries)} queries and {len(documents)} documents, but candidates of {expected}")
        with full_precision(queries.device):
            dtype = torch.promote_types(torch.promote_types(queries.dtype, documents.dtype), torch.float32)
            cosine = queries.to(dtype) @ documents.to(dtype).T
            per_query = self.losses(cosine, candidates)
            metrics = {**_ranking(cosine.detach(), candidates), **self.state()}
            return LossOutput(per_query.mean(), per_query.detach(), metrics)

    def state(self) -> dict[str, Tensor]:
        """The loss's own parameters, as metrics."""
        return {"scale": self.temperature.scale.detach()}

    def clamp_(self) -> None:
        """Brings the loss's own parameters back into range; to be called after each optimizer step."""
        self.temperature.clamp_()


def _ranking(cosine: Tensor, candidates: Candidates) -> dict[str, Tensor | float]:
    """How the positives stand against the negatives; over queries that have a negative, and absent where none has."""
    positive = cosine.gather(1, candidates.positive[:, None]).squeeze(1)
    metrics: dict[str, Tensor | float] = {
        "positive_cosine": positive.mean(),
        "masked_pairs": float(candidates.masked_pairs),
        "candidates": (candidates.negative_pairs + len(positive)) / len(positive),
    }
    if candidates.negative_pairs:
        negatives = candidates.negatives
        compared = negatives.any(1)
        hardest = cosine.masked_fill(~negatives, -torch.inf).amax(1)
        count = compared.sum()
        metrics["accuracy"] = ((positive > hardest) & compared).sum().to(cosine.dtype) / count
        metrics["margin"] = torch.where(compared, positive - hardest, 0).sum() / count
        metrics["hardest_negative_cosine"] = torch.where(compared, hardest, 0).sum() / count
    return metrics


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in the tensors' own type: autocast and TF32 are off within, and as they were after."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        matmul = torch.backends.cuda.matmul
        before = matmul.fp32_precision
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before
