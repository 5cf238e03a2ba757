"""What every loss has in common: a sum and a count, fp32 outside autocast, masks, and shape checks."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class LossValue(NamedTuple):
    """A loss before it is averaged.

    The caller divides `total` by the count of the whole accumulation window and of all ranks, which is what makes
    batch 8x1, 4x2 and 1x8 give the same gradient. For a single batch `mean` is the usual number.
    """

    total: Tensor
    """Scalar, the sum over the rows, at least fp32, always attached to the student's graph."""
    count: Tensor
    """Scalar, the number of rows in `total`, without gradient."""

    @property
    def mean(self) -> Tensor:
        """`total / count`, and 0 (with a graph) where there is no row."""
        return self.total / self.count.clamp(min=1)


class DistillationLoss(nn.Module):
    """Base class: `loss(student, teacher, mask) -> LossValue`. A loss holds no model, no tokenizer and no config.

    Subclasses implement `compute(student, teacher, mask, **kwargs)`; `forward` calls it outside autocast with
    half-precision inputs raised to fp32 (float64 is left alone) and the teacher detached.
    """

    signal: ClassVar[str] = "logits"
    """Which field of `Signals` it compares: one of `hfdistill.signals.SIGNALS`."""
    signals: ClassVar[tuple[str, ...] | None] = None
    """Every signal it can compare, for losses that would make no sense of some; `None` says nothing."""
    unit: ClassVar[str] = "rows"
    """What `count` counts: `rows` (positions where `mask` is True), `pairs` (query-key pairs), `sequences` (samples with at least one
    real token; every sample where there is no mask) or `labels` (rows whose label is not missing)."""
    layout: ClassVar[str] = "rows"
    """The shape it takes: `rows` `(..., width)`, `maps` `(batch, channels, height, width)`, or `vectors` `(batch, width)`, one for each
    sample. The caller brings hidden states and feature maps into it: token maps are flattened to rows, samples to vectors."""
    same_size: ClassVar[bool] = True
    """For feature maps: whether both sides must have one height and width. The caller then average-pools each axis to the smaller."""
    joint: ClassVar[bool] = False
    """Whether it takes all mapped layers at once: lists of tensors, one for each pair of the layer map, in its order."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What `compute` takes as keywords beside what is scheduled: `labels` (one for each row) and `example_ids` (one for each sample)."""
    compares_widths: ClassVar[bool] = True
    """Whether it needs both sides of one width. Where not, no adapter is made for it."""
    one_class_a_row: ClassVar[bool] = False
    """Whether it reads logits as a softmax over classes of which one is right: not for several labels, regression and spans."""
    scheduled: ClassVar[tuple[str, ...]] = ()
    """Names of float attributes that may follow a schedule; `forward` takes them as keywords."""

    def forward(self, student, teacher, mask: Tensor | None = None, **options) -> LossValue:
        unknown = set(options) - set(self.scheduled) - set(self.needs)
        if unknown:
            raise TypeError(f"{type(self).__name__} has no scheduled value or input {sorted(unknown)}")
        first = student[0] if self.joint else student
        with torch.autocast(first.device.type, enabled=False):
            if self.joint:
                student, teacher = [raise_precision(s) for s in student], [raise_precision(t.detach()) for t in teacher]
            else:
                student, teacher = raise_precision(student), raise_precision(teacher.detach())
            return self.compute(student, teacher, mask, **options)

    def prepare(self, student: tuple[int, ...] | list[tuple[int, ...]], teacher: tuple[int, ...] | list[tuple[int, ...]]) -> None:
        """Makes the parameters of losses that train some, from the shapes of an example (lists of shapes where `joint`).

        Called once, before training, under a seed of its own. They are trained with the student, saved beside its checkpoints and
        never part of it.
        """

    def compute(self, student: Tensor, teacher: Tensor, mask: Tensor | None, **scheduled: float) -> LossValue:
        raise NotImplementedError(f"{type(self).__name__} must implement compute")

    def check_widths(self, student: int, teacher: int) -> None:
        """Raises `ValueError` for widths it cannot compare; called once before training."""


def raise_precision(tensor: Tensor) -> Tensor:
    """Half precision becomes fp32; fp32 and float64 stay; integers (labels) stay."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
