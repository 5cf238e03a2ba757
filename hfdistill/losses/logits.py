"""Losses on logits: soft targets for softmax and for sigmoid outputs, and squared errors."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from .base import DistillationLoss, LossValue
from .masking import check_mask, check_same_shape, relative_entropy, select_rows, sum_rows


_SAME_LOGITS = "Compare the label sets (or vocabularies) of the two models and pass the logits of the shared ones in the same order."


def check_temperature(temperature: float) -> float:
    """`temperature` itself; `ValueError` unless it is a finite number above 0."""
    if not (isinstance(temperature, Real) and math.isfinite(temperature) and temperature > 0):
        raise ValueError(
            f"temperature must be a finite number > 0, got {temperature!r}: dividing logits by it gives inf or NaN. "
            "Use 1 (plain KL) to 8; 2 is usual."
        )
    return temperature


class SoftTargetsLoss(DistillationLoss):
    r"""Kullback-Leibler divergence from the softened student to the softened teacher, times T².

    `T² · sum over rows of KL(softmax(t/T) || softmax(s/T))`, [Hinton et al. 2015](https://huggingface.co/papers/1503.02531).
    A row sums over classes and is never averaged over them, so the weight does not change with the label count. A class at -inf
    in both models (padding, where positions are the classes) is not there.

    Zero when `s - t` is constant in each row, otherwise positive. T² keeps the gradient of the same order for every T; for
    T → infinity the loss tends to half the mean over classes of the squared difference of centred logits.

    Args:
        temperature (`float`, defaults to 2.0): T, the same for student and teacher. May follow a schedule.

    Shapes:
        student, teacher: `(..., classes)`, logits in the same class order.
        mask: bool `(...)`, True at the rows that count; `None` for all.
        unit: rows.

    Raises:
        ValueError: if `temperature` is not a finite number > 0, if the shapes differ, or if there is only one class.

    Example:
        >>> import torch
        >>> loss = SoftTargetsLoss(temperature=1.0)
        >>> value = loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]).log_softmax(-1))
        >>> value.total.item(), value.count.item()
        (0.0, 1)
    """

    scheduled = ("temperature",)

    def __init__(self, temperature: float = 2.0):
        super().__init__()
        self.temperature = check_temperature(temperature)

    def compute(self, student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float | None = None) -> LossValue:
        check_same_shape(student, teacher, _SAME_LOGITS)
        if student.size(-1) == 1:
            raise ValueError(
                f"student and teacher have 1 class (shape {tuple(student.shape)}): a softmax over one class is always 1, so this loss "
                "would always be 0. Use regression_mse for a regression or binary_soft_targets for one yes-or-no label."
            )
        check_mask(mask, student.shape[:-1])
        temperature = self.temperature if temperature is None else check_temperature(temperature)
        student_log = log_softmax(select_rows(student, mask) / temperature, dim=-1)
        teacher_log = log_softmax(select_rows(teacher, mask) / temperature, dim=-1)
        rows = relative_entropy(student_log, teacher_log).sum(-1) * temperature**2
        return LossValue(*sum_rows(rows, mask))


class BinarySoftTargetsLoss(DistillationLoss):
    r"""Soft targets for multi-label models: each label is its own yes-or-no distribution, `sigmoid(logit / T)`.

    `T² · sum over rows of the mean over labels of KL(Bernoulli(sigmoid(t/T)) || Bernoulli(sigmoid(s/T)))`, the sigmoid form of
    [Hinton et al. 2015](https://huggingface.co/papers/1503.02531). A softmax would make the labels compete.

    This is the KL form: zero when the logits agree, otherwise positive. The usual binary cross entropy on `sigmoid(t/T)` is this
    plus the teacher's entropy, a constant, so both have the same gradient. For T → infinity it tends to the mean of `(s - t)² / 8`.

    Args:
        temperature (`float`, defaults to 2.0): T, the same for student and teacher. May follow a schedule.

    Shapes:
        student, teacher: `(..., labels)`.
        mask: bool `(...)`, True at the rows that count; `None` for all.
        unit: rows.

    Raises:
        ValueError: if `temperature` is not a finite number > 0, or if the shapes differ.
    """

    scheduled = ("temperature",)

    def __init__(self, temperature: float = 2.0):
        super().__init__()
        self.temperature = check_temperature(temperature)

    def compute(self, student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float | None = None) -> LossValue:
        check_same_shape(student, teacher, _SAME_LOGITS)
        check_mask(mask, student.shape[:-1])
        temperature = self.temperature if temperature is None else check_temperature(temperature)
        student = select_rows(student, mask) / temperature
        teacher = select_rows(teacher, mask) / temperature
        yes = relative_entropy(logsigmoid(student), logsigmoid(teacher))
        no = relative_entropy(logsigmoid(-student), logsigmoid(-teacher))
        return LossValue(*sum_rows((yes + no).mean(-1) * temperature**2, mask))


class RegressionMSELoss(DistillationLoss):
    r"""Squared error between the outputs of two regression models.

    `sum over rows of the mean over targets of (s - t)²`, the regression form of distillation. Zero when equal; grows with the
    square of the unit of the target, so standardise targets where several tasks are compared. There is no temperature.

    Shapes:
        student, teacher: `(rows, targets)`, `(rows, 1)` or `(rows,)`; the last two are the same thing and may be mixed.
        mask: bool `(rows,)`, True at the rows that count; `None` for all.
        unit: rows.

    Raises:
        ValueError: if the shapes differ otherwise.
    """

    def compute(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> LossValue:
        # (B, 1) against (B,) would broadcast to (B, B)
        student, teacher = (tensor.unsqueeze(-1) if tensor.dim() == 1 else tensor for tensor in (student, teacher))
        check_same_shape(student, teacher, "Build both models with the same number of targets (num_labels).")
        check_mask(mask, student.shape[:-1])
        rows = (select_rows(student, mask) - select_rows(teacher, mask)).square().mean(-1)
        return LossValue(*sum_rows(rows, mask))


class LogitMSELoss(DistillationLoss):
    r"""Squared error between logits.

    `sum over rows of the mean over classes of (s - t)²`, [Ba and Caruana 2014](https://huggingface.co/papers/1312.6184).
    Zero when equal. It also copies the constant that a softmax ignores, unless `centered`, which is twice the limit of
    [`SoftTargetsLoss`] for T → infinity. There is no temperature: it would only shrink the gradient by T².

    A class at -inf in both models (padding, where positions are the classes) is not there: the means are over the others.

    Args:
        centered (`bool`, defaults to `False`): subtract the mean over classes from each row of both sides first.

    Shapes:
        student, teacher: `(..., classes)`, logits in the same class order.
        mask: bool `(...)`, True at the rows that count; `None` for all.
        unit: rows.

    Raises:
        ValueError: if the shapes differ.
    """

    def __init__(self, centered: bool = False):
        super().__init__()
        self.centered = centered

    def compute(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> LossValue:
        check_same_shape(student, teacher, _SAME_LOGITS)
        check_mask(mask, student.shape[:-1])
        student, teacher = select_rows(student, mask), select_rows(teacher, mask)
        absent = (student == float("-inf")) & (teacher == float("-inf"))
        classes = (~absent).sum(-1, keepdim=True).clamp(min=1)
        difference = torch.where(absent, 0, student - teacher)
        if self.centered:
            difference = torch.where(absent, 0, difference - difference.sum(-1, keepdim=True) / classes)
        return LossValue(*sum_rows(difference.square().sum(-1) / classes.squeeze(-1), mask))
