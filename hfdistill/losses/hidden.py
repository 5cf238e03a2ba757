"""Losses on hidden states, pooled outputs and embeddings. Projections are applied by the caller, so where a loss compares entries
the widths agree here."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import DistillationLoss, LossValue
from .masking import check_mask, check_same_rows, check_same_shape, select_rows, sum_rows


NEEDS_ADAPTER = "Give the term an adapter that brings the student to the teacher's width, and feed both models the same tokens."
_SMALLEST_NORM = 1e-8
_LAYER_NORM_EPS = 1e-12


class HiddenMSELoss(DistillationLoss):
    r"""Squared error between hidden states, over real tokens only.

    `sum over rows of the mean over width of (Hs - Ht)²`, [TinyBERT, Jiao et al. 2020](https://huggingface.co/papers/1909.10351),
    equation 8, where `Hs` has been projected by an adapter if the widths differ. Zero when equal. It grows with the square of the
    scale of the hidden states, so models of different scale want another loss or a smaller weight.

    Shapes:
        student, teacher: `(batch, length, width)`, or `(batch, width)` where pooled.
        mask: bool `(batch, length)`, or `(batch,)` where pooled; True at the rows that count, `None` for all.
        unit: rows.

    Raises:
        ValueError: if the shapes differ.
    """

    signal = "hidden_states"

    def compute(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> LossValue:
        check_same_shape(student, teacher, NEEDS_ADAPTER)
        check_mask(mask, student.shape[:-1])
        rows = (select_rows(student, mask) - select_rows(teacher, mask)).square().mean(-1)
        return LossValue(*sum_rows(rows, mask))


class EmbeddingMSELoss(HiddenMSELoss):
    r"""Squared error between embedding outputs, over real tokens only.

    `sum over rows of the mean over width of (Es - Et)²`, [TinyBERT, Jiao et al. 2020](https://huggingface.co/papers/1909.10351),
    equation 9. The same as [`HiddenMSELoss`] on the input of block 0. Zero when equal; means nothing if the models do not share
    their tokenizer.

    Shapes:
        student, teacher: `(batch, length, width)`.
        mask: bool `(batch, length)`, True at the tokens that count; `None` for all.
        unit: rows.

    Raises:
        ValueError: if the shapes differ.
    """

    signal = "embeddings"


class CosineLoss(DistillationLoss):
    r"""One minus the cosine between hidden states, over real tokens only.

    `sum over rows of 1 - cos(Hs, Ht)`, [DistilBERT, Sanh et al. 2019](https://huggingface.co/papers/1910.01108). Between 0 and 2;
    zero when each row of the student is a positive multiple of the teacher's, so it ignores scale. A zero vector has no
    direction: its cosine counts as 0 and it gets no gradient.

    Shapes:
        student, teacher: `(batch, length, width)`, or `(batch, width)` where pooled.
        mask: bool `(batch, length)`, or `(batch,)` where pooled; True at the rows that count, `None` for all.
        unit: rows.

    Raises:
        ValueError: if the shapes differ.
    """

    signal = "hidden_states"

    def compute(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> LossValue:
        check_same_shape(student, teacher, NEEDS_ADAPTER)
        check_mask(mask, student.shape[:-1])
        student_unit, student_nonzero = unit_vectors(select_rows(student, mask))
        teacher_unit, teacher_nonzero = unit_vectors(select_rows(teacher, mask))
        # 1 - cos as half a squared distance: exactly 0 when equal, never below 0, and no cancellation for small angles
        distance = (student_unit - teacher_unit).square().sum(-1) / 2
        return LossValue(*sum_rows(torch.where(student_nonzero & teacher_nonzero, distance, 1), mask))


class NormalizedHiddenMSELoss(DistillationLoss):
    r"""Squared error between hidden states after a layer norm without parameters, over real tokens only.

    `sum over rows of the mean over width of (LN(Hs) - LN(Ht))²` with `LN(x) = (x - mean) / sqrt(variance + 1e-12)` of each token,
    the feature map transfer of [MobileBERT, Sun et al. 2020](https://huggingface.co/papers/2004.02984) (weight 100, mean over
    layers). Between 0 and 4; zero when each row of the student is the teacher's up to a positive factor and a constant, so models
    of different scale can be compared. A constant vector has no direction: it counts as zeros and gets no gradient. What it
    ignores is the business of [`HiddenMomentsLoss`].

    Shapes:
        student, teacher: `(batch, length, width)`, or `(batch, width)` where pooled.
        mask: bool `(batch, length)`, or `(batch,)` where pooled; True at the rows that count, `None` for all.
        unit: rows.

    Raises:
        ValueError: if the shapes differ.
    """

    signal = "hidden_states"

    def compute(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> LossValue:
        check_same_shape(student, teacher, NEEDS_ADAPTER)
        check_mask(mask, student.shape[:-1])
        rows = (_layer_norm(select_rows(student, mask)) - _layer_norm(select_rows(teacher, mask))).square().mean(-1)
        return LossValue(*sum_rows(rows, mask))


class HiddenMomentsLoss(DistillationLoss):
    r"""Differences between mean and variance of the hidden states of each token, over real tokens only.

    `sum over rows of mean_weight * (mean(Hs) - mean(Ht))² + variance_weight * |var(Hs) - var(Ht)|`, both over width, the two terms
    that stand beside the normalised feature maps in the published training of
    [MobileBERT, Sun et al. 2020](https://huggingface.co/papers/2004.02984) (weight 1, mean over layers). Zero when both moments
    agree. Each model has its own width: nothing is projected.

    Args:
        mean_weight (`float`, defaults to 5000.0): weight of the squared difference of means.
        variance_weight (`float`, defaults to 5.0): weight of the absolute difference of variances.

    Shapes:
        student, teacher: `(batch, length, width)`, or `(batch, width)` where pooled; the widths may differ.
        mask: bool `(batch, length)`, or `(batch,)` where pooled; True at the rows that count, `None` for all.
        unit: rows.

    Raises:
        ValueError: for weights that are negative, not finite or both 0, and if the shapes differ but for the width.
    """

    signal = "hidden_states"
    compares_widths = False

    def __init__(self, mean_weight: float = 5000.0, variance_weight: float = 5.0):
        super().__init__()
        weights = (mean_weight, variance_weight)
        if not all(isinstance(w, (int, float)) and math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise ValueError(
                f"mean_weight and variance_weight must be finite numbers >= 0 and not both 0, got {mean_weight!r} and {variance_weight!r}: "
                "the student would be pushed away from the teacher, or learn nothing. Use 5000 and 5 (MobileBERT); 0 turns one off."
            )
        self.mean_weight, self.variance_weight = weights

    def compute(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> LossValue:
        check_same_rows(student, teacher)
        check_mask(mask, student.shape[:-1])
        student, teacher = select_rows(student, mask), select_rows(teacher, mask)
        means = (student.mean(-1) - teacher.mean(-1)).square()
        variances = (student.var(-1, correction=0) - teacher.var(-1, correction=0)).abs()
        return LossValue(*sum_rows(self.mean_weight * means + self.variance_weight * variances, mask))


def _layer_norm(tensor: Tensor) -> Tensor:
    """Each row with mean 0 and variance 1. Constant rows become 0 with neither NaN nor a huge gradient."""
    centered = tensor - tensor.mean(-1, keepdim=True)
    variance = centered.square().mean(-1, keepdim=True)
    varied = variance.detach() > _LAYER_NORM_EPS
    return torch.where(varied, centered * torch.where(varied, variance + _LAYER_NORM_EPS, 1).rsqrt(), 0)


def unit_vectors(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors of length 1, and where the original was not a zero vector. Zero vectors get neither NaN nor a huge gradient."""
    nonzero = torch.linalg.vector_norm(tensor.detach(), dim=-1) > _SMALLEST_NORM
    safe = torch.where(nonzero.unsqueeze(-1), tensor, 1)
    return safe / torch.linalg.vector_norm(safe, dim=-1, keepdim=True), nonzero
