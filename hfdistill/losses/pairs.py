"""Pairs of texts that belong together, against everything else in the batch: what sentence embeddings are trained on without a teacher."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .base import LossValue
from .masking import select_rows, sum_rows
from .task import MISSING_LABEL, TaskLoss


class ContrastivePairsLoss(TaskLoss):
    r"""In-batch contrastive loss on pooled vectors: rows with equal labels belong together, all other rows are negatives.

    `sum over rows i of the mean over partners p of -log( exp(cos(v_i, v_p) / τ) / Σ_{j≠i} exp(cos(v_i, v_j) / τ) )`: NT-Xent of
    [SimCLR, Chen et al. 2020](https://huggingface.co/papers/2002.05709), equation 1, and for more than two rows of a label `L_out` of
    [Khosla et al. 2020](https://huggingface.co/papers/2004.11362), equation 2. `MultipleNegativesRankingLoss` of sentence-transformers
    ranks from one side of each pair only; its `scale` of 20 is `τ = 0.05` here. `log(rows - 1)` at chance, near 0 when partners are far
    closer than the rest; 0 for a batch of one pair, which has no negatives.

    Negatives come from the micro-batch: unlike every other loss here it depends on how a batch is cut, so give it large
    micro-batches rather than accumulation.

    Args:
        temperature (`float`, defaults to 0.05): τ.

    Shapes:
        vectors: `(batch, width)`.
        labels: integer `(batch,)`; rows of one pair have the same number, -100 marks rows that take no part.
        unit: rows that have a partner in the batch.

    Raises:
        ValueError: for a temperature that is not above 0, and labels that are not one integer a row.

    Example:
        >>> vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
        >>> value = ContrastivePairsLoss(temperature=1.0)(vectors, torch.tensor([7, 8, 7, 8]))
        >>> round(value.mean.item(), 4), value.count.item()  # log(e + 1 + 1) - 1
        (0.5514, 4)
    """

    def __init__(self, temperature: float = 0.05):
        super().__init__()
        if not isinstance(temperature, (int, float)) or not math.isfinite(temperature) or temperature <= 0:
            raise ValueError(f"temperature must be a finite number > 0, got {temperature!r}: cosines are divided by it. Use 0.02 to 0.1.")
        self.temperature = temperature

    def compute(self, vectors: Tensor, labels: Tensor) -> LossValue:
        if vectors.dim() != 2 or labels.shape != vectors.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"Pooled vectors have shape {tuple(vectors.shape)} and labels {tuple(labels.shape)} ({labels.dtype}): there must be one "
                "integer for each row, equal for rows that belong together. Number the pairs in the column 'labels'."
            )
        present = labels != MISSING_LABEL
        itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        candidates = present[None] & ~itself
        partners = (labels[:, None] == labels[None]) & candidates & present[:, None]
        counted = partners.any(1)
        unit = normalize(select_rows(vectors, present), dim=-1, eps=1e-8)
        scores = (unit @ unit.T / self.temperature).masked_fill(~candidates, float("-inf"))
        scores = torch.where(counted[:, None], scores, 0)  # a row of -inf only would be NaN, and so its gradient
        rows = -torch.where(partners, scores.log_softmax(-1), 0).sum(-1) / partners.sum(-1).clamp(min=1)
        return LossValue(*sum_rows(rows, counted))
