"""Losses on self-attention, all computed from scores before mask and softmax.

Hugging Face returns probabilities after dropout, and none at all under SDPA; log-probabilities computed here from scores are exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import DistillationLoss, LossValue
from .masking import check_mask, log_softmax_over, softmax_over


class _AttentionLoss(DistillationLoss):
    """Checks and the two ways to treat heads, shared by the losses below."""

    signal = "attention_scores"

    def __init__(self, heads: str = "equal"):
        super().__init__()
        if heads not in ("equal", "mean"):
            raise ValueError(
                f"heads must be 'equal' or 'mean', got {heads!r}: it says how the heads of the two models are matched. "
                "Use 'equal' (head i with head i) or 'mean' (averages over heads, for models with different numbers of heads)."
            )
        self.heads = heads

    def compute(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> LossValue:
        for who, scores in (("student", student), ("teacher", teacher)):
            if scores.dim() != 4:
                raise ValueError(
                    f"{who} has shape {tuple(scores.shape)}: attention scores have four dimensions (batch, heads, queries, keys). "
                    "Pass the scores of one block."
                )
        batch, heads, queries, keys = student.shape
        if teacher.shape != (batch, teacher.size(1), queries, keys):
            raise ValueError(
                f"student has shape {tuple(student.shape)} and teacher {tuple(teacher.shape)}: their queries and keys are not the same "
                "tokens. Feed both models the same token ids."
            )
        if self.heads == "equal" and heads != teacher.size(1):
            raise ValueError(
                f"student has {heads} attention heads and teacher {teacher.size(1)}: head i of one has no partner in the other. "
                'Use heads="mean" to compare the averages over heads.'
            )
        check_mask(mask, (batch, 1, queries, keys))
        if mask is None:
            mask = torch.ones((batch, 1, queries, keys), dtype=torch.bool, device=student.device)
        return self.compare(student, teacher, mask)

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor) -> LossValue:
        raise NotImplementedError(f"{type(self).__name__} must implement compare")

    def log_probabilities(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Log-softmax over the valid keys of each query, with heads averaged (as probabilities) if asked; 0 at all other pairs."""
        log_probs = log_softmax_over(scores, mask)
        if self.heads == "mean":
            log_probs = log_probs.logsumexp(1, keepdim=True) - math.log(scores.size(1))
        return log_probs


class AttentionScoreMSELoss(_AttentionLoss):
    r"""Squared error between attention scores before the softmax, over valid query-key pairs only.

    `sum over valid pairs of the mean over heads of (Ss - St)²` with `S = q·k / sqrt(d)`,
    [TinyBERT, Jiao et al. 2020](https://huggingface.co/papers/1909.10351), equation 7. Zero when the scores agree. A constant added
    to a row of scores changes nothing in the softmax but is copied here, unless `center`.

    Args:
        heads (`str`, defaults to `"equal"`): `"equal"` compares head i with head i; `"mean"` the averages of the scores over heads.
        center (`bool`, defaults to `False`): subtract from each row of scores its mean over the valid keys first.

    Shapes:
        student, teacher: `(batch, heads, queries, keys)`, scores without the additive mask.
        mask: bool `(batch, 1, queries, keys)`, True where the query is a real token and may look at the key; `None` for all.
        unit: pairs (once for all heads).

    Raises:
        ValueError: if the shapes differ, head counts included unless `heads="mean"`.
    """

    unit = "pairs"

    def __init__(self, heads: str = "equal", center: bool = False):
        super().__init__(heads)
        self.center = center

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor) -> LossValue:
        if self.heads == "mean":
            student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
        difference = torch.where(mask, student - teacher, 0)
        if self.center:
            row_mean = difference.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
            difference = torch.where(mask, difference - row_mean, 0)
        return LossValue(difference.square().sum() / difference.size(1), mask.sum())


class AttentionKLLoss(_AttentionLoss):
    r"""Kullback-Leibler divergence from the student's attention to the teacher's, query by query.

    `sum over valid queries of the mean over heads of KL(A_t || A_s)` where `A` is the softmax of the scores over the valid keys,
    the first term of [MiniLM, Wang et al. 2020](https://huggingface.co/papers/2002.10957). Zero when the scores of each row differ
    by a constant, otherwise positive.

    Args:
        heads (`str`, defaults to `"equal"`): `"equal"` compares head i with head i; `"mean"` the averages of the probabilities
            over heads.

    Shapes:
        student, teacher: `(batch, heads, queries, keys)`, scores without the additive mask.
        mask: bool `(batch, 1, queries, keys)`, True where the query is a real token and may look at the key; `None` for all.
        unit: rows, the queries with at least one valid key (once for all heads).

    Raises:
        ValueError: if the shapes differ, head counts included unless `heads="mean"`.
    """

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor) -> LossValue:
        student_log, teacher_log = self.log_probabilities(student, mask), self.log_probabilities(teacher, mask)
        entries = teacher_log.exp() * (teacher_log - student_log)
        return LossValue(entries.sum(-1).mean(1).sum(), mask.any(-1).sum())


class AttentionMSELoss(_AttentionLoss):
    r"""Squared error between attention probabilities, over valid query-key pairs only.

    `sum over valid pairs of the mean over heads of (A_s - A_t)²` where `A` is the softmax of the scores over the valid keys, as
    TextBrewer's attention loss, [Yang et al. 2020](https://huggingface.co/papers/2002.12620). Zero when the scores of each row
    differ by a constant. Probabilities are about `1 / length`, so the mean over pairs falls with the square of the length;
    `reduction="keys"` falls more slowly.

    Args:
        heads (`str`, defaults to `"equal"`): `"equal"` compares head i with head i; `"mean"` the averages of the probabilities
            over heads.
        reduction (`str`, defaults to `"pairs"`): what the sum is divided by: `"pairs"` valid pairs, or `"keys"` valid queries,
            which leaves a sum over keys for each query.

    Shapes:
        student, teacher: `(batch, heads, queries, keys)`, scores without the additive mask.
        mask: bool `(batch, 1, queries, keys)`, True where the query is a real token and may look at the key; `None` for all.
        unit: pairs, or rows (queries with at least one valid key) with `reduction="keys"`.

    Raises:
        ValueError: for an unknown `reduction`, and if the shapes differ, head counts included unless `heads="mean"`.
    """

    unit = "pairs"

    def __init__(self, heads: str = "equal", reduction: str = "pairs"):
        super().__init__(heads)
        if reduction not in ("pairs", "keys"):
            raise ValueError(
                f"reduction must be 'pairs' or 'keys', got {reduction!r}: it says what the sum is divided by. "
                "Use 'pairs' (mean over query-key pairs) or 'keys' (sum over keys, mean over queries)."
            )
        self.reduction = reduction
        self.unit = "pairs" if reduction == "pairs" else "rows"

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor) -> LossValue:
        student, teacher = softmax_over(student, mask), softmax_over(teacher, mask)
        if self.heads == "equal":
            difference = student - teacher
        else:  # queries without a key have averages that differ by rounding
            difference = torch.where(mask, student.mean(1, keepdim=True) - teacher.mean(1, keepdim=True), 0)
        count = mask.sum() if self.reduction == "pairs" else mask.any(-1).sum()
        return LossValue(difference.square().sum() / difference.size(1), count)
