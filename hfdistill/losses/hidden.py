"""Losses on hidden states, pooled outputs and embeddings. Projections are applied by the caller, so widths agree here."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import DistillationLoss, LossValue
from .masking import check_mask, check_same_shape, select_rows, sum_rows


_NEEDS_ADAPTER = "Give the term an adapter that brings the student to the teacher's width, and feed both models the same tokens."
_SMALLEST_NORM = 1e-8


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
        check_same_shape(student, teacher, _NEEDS_ADAPTER)
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
        check_same_shape(student, teacher, _NEEDS_ADAPTER)
        check_mask(mask, student.shape[:-1])
        student_unit, student_nonzero = _unit_vectors(select_rows(student, mask))
        teacher_unit, teacher_nonzero = _unit_vectors(select_rows(teacher, mask))
        # 1 - cos as half a squared distance: exactly 0 when equal, never below 0, and no cancellation for small angles
        distance = (student_unit - teacher_unit).square().sum(-1) / 2
        return LossValue(*sum_rows(torch.where(student_nonzero & teacher_nonzero, distance, 1), mask))


def _unit_vectors(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors of length 1, and where the original was not a zero vector. Zero vectors get neither NaN nor a huge gradient."""
    nonzero = torch.linalg.vector_norm(tensor.detach(), dim=-1) > _SMALLEST_NORM
    safe = torch.where(nonzero.unsqueeze(-1), tensor, 1)
    return safe / torch.linalg.vector_norm(safe, dim=-1, keepdim=True), nonzero
