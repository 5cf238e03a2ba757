"""Patient knowledge distillation: the summary token of intermediate blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import DistillationLoss, LossValue
from .hidden import NEEDS_ADAPTER, unit_vectors
from .masking import check_mask, check_same_shape, select_rows, sum_rows


class PatientLoss(DistillationLoss):
    r"""Squared distance between the normalised vectors of one token of each sample, usually `[CLS]`.

    `sum over samples of ||n(hs) - n(ht)||²` with `n(h) = h / ||h||` and `h` the hidden state of the first real token,
    [Patient KD, Sun et al. 2019](https://huggingface.co/papers/1908.09355), equation 7. Between 0 and 4; zero when the two vectors
    of each sample have one direction. The paper sums over mapped blocks (`layer_reduction="sum"`), the published code takes the mean
    over width and blocks (`width_reduction="mean"`): weights of the two differ by width times blocks. Its layer maps are `skip` and,
    for PKD-Last, the teacher's blocks just below its last one, as pairs; neither uses the student's last block.

    Args:
        normalize (`bool`, defaults to `True`): whether only the direction of the vectors counts. Without it the loss grows with the
            square of their scale.
        width_reduction (`str`, defaults to `"sum"`): `"sum"` or `"mean"` over width.
        token (`str`, defaults to `"first"`): `"first"` or `"last"` real token of the sample. Decoders want `"last"`: their first
            token has seen nothing but itself.

    Shapes:
        student, teacher: `(batch, length, width)`.
        mask: bool `(batch, length)`, True at real tokens, on whichever side the padding is; `None` for all.
        unit: sequences, the samples with at least one real token.

    Raises:
        ValueError: for an unknown `width_reduction` or `token`, and if the shapes differ.
    """

    signal = "hidden_states"
    signals = ("hidden_states", "embeddings", "queries", "keys", "values")
    unit = "sequences"

    def __init__(self, normalize: bool = True, width_reduction: str = "sum", token: str = "first"):
        super().__init__()
        if width_reduction not in ("sum", "mean"):
            raise ValueError(
                f"width_reduction must be 'sum' or 'mean', got {width_reduction!r}: it says how the squares over width are put together. "
                "Use 'sum' (the paper) or 'mean' (the published code, whose weights are larger by the width)."
            )
        if token not in ("first", "last"):
            raise ValueError(
                f"token must be 'first' or 'last', got {token!r}: it says which real token stands for its sample. "
                "Use 'first' ([CLS] of encoders) or 'last' (decoders)."
            )
        self.normalize, self.width_reduction, self.token = normalize, width_reduction, token

    def compute(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> LossValue:
        if student.dim() != 3:
            raise ValueError(
                f"student has shape {tuple(student.shape)}: the token of each sample is taken from (batch, length, width). "
                "Pass hidden states, or use hidden_mse for pooled vectors."
            )
        check_same_shape(student, teacher, NEEDS_ADAPTER)
        check_mask(mask, student.shape[:-1])
        if mask is None:
            mask = student.new_ones(student.shape[:-1]).bool()
        order = torch.arange(mask.size(1), device=mask.device)
        order = order + 1 if self.token == "last" else mask.size(1) - order
        rows, position, present = torch.arange(mask.size(0), device=mask.device), (mask * order).argmax(-1), mask.any(-1)
        student, teacher = (select_rows(tensor[rows, position], present) for tensor in (student, teacher))
        if self.normalize:
            student, teacher = _normalized(student), _normalized(teacher)
        squares = (student - teacher).square()
        return LossValue(*sum_rows(squares.sum(-1) if self.width_reduction == "sum" else squares.mean(-1), present))


def _normalized(tensor: Tensor) -> Tensor:
    """Vectors of length 1; a zero vector stays one and gets no gradient."""
    unit, nonzero = unit_vectors(tensor)
    return select_rows(unit, nonzero)
