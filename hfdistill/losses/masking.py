"""Masks and shape checks that all losses share.

A mask always selects with `torch.where`, never by multiplication: `0 * NaN` is NaN. And it selects twice, on the way in (so
that no gradient of a padded position is ever `0 * inf`) and on the way out. Boolean indexing would do it in one step, but costs
a device synchronisation per call.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


def check_same_shape(student: Tensor, teacher: Tensor, cure: str) -> None:
    """Raises `ValueError` unless both have the same shape, since broadcasting would compare unrelated entries."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"student has shape {tuple(student.shape)} and teacher {tuple(teacher.shape)}: they cannot be compared entry by entry. {cure}"
        )


def check_same_rows(student: Tensor, teacher: Tensor) -> None:
    """Raises `ValueError` unless both have the same shape but for the last axis."""
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student has shape {tuple(student.shape)} and teacher {tuple(teacher.shape)}: only the last axis, the width, may differ, so "
            "their rows are not the same tokens. Feed both models the same token ids."
        )


def check_mask(mask: Tensor | None, shape: torch.Size | tuple[int, ...]) -> None:
    """Raises `ValueError` unless `mask` is `None` or a bool tensor of `shape`."""
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be a bool tensor (True = counts), got {mask.dtype}: it selects, it does not weigh. Pass mask.bool().")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} but the rows of this loss have shape {tuple(shape)}: rows would be chosen wrongly. "
            "Pass one bool for each row."
        )


def select_rows(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """`tensor` `(..., width)` with the rows where `mask` `(...)` is False set to 0."""
    return tensor if mask is None else torch.where(mask.unsqueeze(-1), tensor, 0)


def sum_rows(rows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of `rows` where `mask` is True, and how many there are; `(0, 0)` with a graph where there is none."""
    if mask is None:
        return rows.sum(), torch.full((), rows.numel(), dtype=torch.long, device=rows.device)
    return torch.where(mask, rows, 0).sum(), mask.sum()


def log_softmax_over(scores: Tensor, mask: Tensor) -> Tensor:
    """Log-softmax over the entries of the last axis where `mask` is True; 0 at all others."""
    # a row of nothing but -inf has a NaN softmax and a NaN gradient, so rows without a valid entry get zeros instead
    excluded = torch.where(mask.any(-1, keepdim=True), float("-inf"), 0.0).to(scores.dtype)
    return torch.where(mask, log_softmax(torch.where(mask, scores, excluded), dim=-1), 0)


def softmax_over(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the entries of the last axis where `mask` is True, 0 at the others; in rows without any, the same number everywhere."""
    excluded = torch.where(mask.any(-1, keepdim=True), float("-inf"), 0.0).to(scores.dtype)
    return torch.where(mask, scores, excluded).softmax(dim=-1)


def relative_entropy(student_log: Tensor, teacher_log: Tensor) -> Tensor:
    """`p_t * (log p_t - log p_s)`, entry by entry, from log-probabilities; 0 where the teacher's probability is exactly 0."""
    product = teacher_log.exp() * (teacher_log - student_log)
    return product.masked_fill(teacher_log == float("-inf"), 0)
