"""Losses on logits: soft targets for softmax and for sigmoid outputs, hard targets, and squared errors."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from .base import DistillationLoss, LossValue
from .masking import check_mask, check_same_shape, relative_entropy, select_rows, sum_rows


_SAME_LOGITS = "Compare the label sets (or vocabularies) of the two models and pass the logits of the shared ones in the same order."
_STANDARDIZATION_EPS = 1e-7


def check_temperature(temperature: float) -> float:
    """`temperature` itself; `ValueError` unless it is a finite number above 0."""
    if not (isinstance(temperature, Real) and math.isfinite(temperature) and temperature > 0):
        raise ValueError(
            f"temperature must be a finite number > 0, got {temperature!r}: dividing logits by it gives inf or NaN. "
            "Use 1 (plain KL) to 8; 2 is usual."
        )
    return temperature


def check_weights(cure: str, **weights: float) -> None:
    """`ValueError` unless all are finite numbers of at least 0, and one is above 0."""
    numbers = all(isinstance(w, Real) and not isinstance(w, bool) and math.isfinite(w) and w >= 0 for w in weights.values())
    if not numbers or not any(weights.values()):
        seen = " and ".join(f"{name}={weight!r}" for name, weight in weights.items())
        raise ValueError(
            f"Weights must be finite numbers >= 0 and not all 0, got {seen}: the student would be pushed away from the teacher, or learn "
            f"nothing. {cure}; 0 turns one off."
        )


def check_classes(student: Tensor, teacher: Tensor) -> None:
    """`ValueError` unless both are logits of the same shape with more than one class."""
    check_same_shape(student, teacher, _SAME_LOGITS)
    if student.size(-1) == 1:
        raise ValueError(
            f"student and teacher have 1 class (shape {tuple(student.shape)}): a softmax over one class is always 1, so this loss "
            "would always be 0. Use regression_mse for a regression or binary_soft_targets for one yes-or-no label."
        )


def varies(tensor: Tensor, centered: Tensor) -> Tensor:
    """Where `tensor` varies over its last axis by more than the rounding of its mean, from it and `tensor - mean`.

    What rounding leaves of a constant row has a direction, but one that means nothing, and its gradient is huge.
    """
    tensor, centered = tensor.detach(), centered.detach()
    rounding = 16 * torch.finfo(tensor.dtype).eps
    return torch.linalg.vector_norm(centered, dim=-1, keepdim=True) > rounding * torch.linalg.vector_norm(tensor, dim=-1, keepdim=True)


def _standardized(logits: Tensor, absent: Tensor) -> Tensor:
    """Each row with mean 0 and standard deviation 1 over the classes that are there; rows of equal logits become 0."""
    present = torch.where(absent, 0, logits)
    classes = (~absent).sum(-1, keepdim=True)
    centered = torch.where(absent, 0, present - present.sum(-1, keepdim=True) / classes.clamp(min=1))
    varied = varies(present, centered)
    variance = torch.where(varied, centered.square().sum(-1, keepdim=True) / (classes - 1).clamp(min=1), 1)
    standardized = torch.where(varied, centered / (variance.sqrt() + _STANDARDIZATION_EPS), 0)
    return torch.where(absent, float("-inf"), standardized)


class SoftTargetsLoss(DistillationLoss):
    r"""Kullback-Leibler divergence from the softened student to the softened teacher, times T².

    `T² · sum over rows of KL(softmax(t/T) || softmax(s/T))`, [Hinton et al. 2015](https://huggingface.co/papers/1503.02531).
    A row sums over classes, so the weight does not change with the label count. A class at -inf in both models (padding, where
    positions are the classes) is not there.

    Zero when `s - t` is constant in each row, otherwise positive. T² keeps the gradient of the same order for every T; for
    T → infinity the loss tends to half the mean over classes of the squared difference of centred logits.

    Args:
        temperature (`float`, defaults to 2.0): T, the same for student and teacher. May follow a schedule.
        class_reduction (`str`, defaults to `"sum"`): `"sum"` over classes, or `"mean"`, which divides each row by the number of
            classes, as the published code of [DeiT, Touvron et al. 2021](https://huggingface.co/papers/2012.12877) does: it needs a
            weight larger by the classes.

    Shapes:
        student, teacher: `(..., classes)`, logits in the same class order.
        mask: bool `(...)`, True at the rows that count; `None` for all.
        unit: rows.

    Raises:
        ValueError: if `temperature` is not a finite number > 0, for an unknown `class_reduction`, if the shapes differ, or if there
            is only one class.

    Example:
        >>> import torch
        >>> loss = SoftTargetsLoss(temperature=1.0)
        >>> value = loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]).log_softmax(-1))
        >>> value.total.item(), value.count.item()
        (0.0, 1)
    """

    scheduled = ("temperature",)

    def __init__(self, temperature: float = 2.0, class_reduction: str = "sum"):
        super().__init__()
        if class_reduction not in ("sum", "mean"):
            raise ValueError(
                f"class_reduction must be 'sum' or 'mean', got {class_reduction!r}: it says how the terms of the classes are put together. "
                "Use 'sum' (the divergence) or 'mean' (divided by the classes, for weights published with DeiT)."
            )
        self.temperature, self.class_reduction = check_temperature(temperature), class_reduction

    def compute(self, student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float | None = None) -> LossValue:
        check_classes(student, teacher)
        check_mask(mask, student.shape[:-1])
        temperature = self.temperature if temperature is None else check_temperature(temperature)
        student_log = log_softmax(select_rows(student, mask) / temperature, dim=-1)
        teacher_log = log_softmax(select_rows(teacher, mask) / temperature, dim=-1)
        rows = relative_entropy(student_log, teacher_log).sum(-1) * temperature**2
        return LossValue(*sum_rows(rows if self.class_reduction == "sum" else rows / student.size(-1), mask))


class StandardizedSoftTargetsLoss(SoftTargetsLoss):
    r"""Soft targets between logits that were brought to mean 0 and standard deviation 1 first, row by row.

    `T² · sum over rows of KL(softmax(Z(t)/T) || softmax(Z(s)/T))` with `Z(z) = (z - mean) / (std + 1e-7)` and the unbiased standard
    deviation over classes, [Sun et al. 2024](https://huggingface.co/papers/2403.01427): the student need not copy the size of the
    teacher's logits. Zero when each row of the student is the teacher's up to a positive factor and a constant, otherwise positive.
    With two classes only which one is larger is left. A row of equal logits counts as zeros and gets no gradient. A class at -inf in
    both models is not there, for mean and deviation either. The paper's weight on CIFAR-100 is 9, beside 0.1 for the labels.

    Args:
        temperature (`float`, defaults to 2.0): T, the same for student and teacher. May follow a schedule.

    Shapes:
        student, teacher: `(..., classes)`, logits in the same class order.
        mask: bool `(...)`, True at the rows that count; `None` for all.
        unit: rows.

    Raises:
        ValueError: if `temperature` is not a finite number > 0, if the shapes differ, or if there is only one class.
    """

    one_class_a_row = True

    def __init__(self, temperature: float = 2.0):
        super().__init__(temperature)

    def compute(self, student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float | None = None) -> LossValue:
        check_classes(student, teacher)
        check_mask(mask, student.shape[:-1])
        student, teacher = select_rows(student, mask), select_rows(teacher, mask)
        absent = (student == float("-inf")) & (teacher == float("-inf"))
        return super().compute(_standardized(student, absent), _standardized(teacher, absent), mask, temperature)


class HardTargetsLoss(DistillationLoss):
    r"""Cross entropy of the student with the class that the teacher finds most likely.

    `sum over rows of -log softmax(s)[argmax t]`, hard-label distillation of
    [DeiT, Touvron et al. 2021](https://huggingface.co/papers/2012.12877), equation 3, which weighs it as much as the labels
    (0.5 each) and puts it on a head of its own. There is no temperature. Not zero when the logits are equal: it tends to 0 only as
    the student becomes certain of the teacher's class, and is `log(classes)` at chance.

    Shapes:
        student, teacher: `(..., classes)`, logits in the same class order.
        mask: bool `(...)`, True at the rows that count; `None` for all.
        unit: rows.

    Raises:
        ValueError: if the shapes differ, or if there is only one class.

    Example:
        >>> import torch
        >>> value = HardTargetsLoss()(torch.zeros(1, 4), torch.tensor([[0.0, 0.0, 3.0, 0.0]]))
        >>> round(value.total.item(), 4)  # log 4
        1.3863
    """

    one_class_a_row = True

    def compute(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> LossValue:
        check_classes(student, teacher)
        check_mask(mask, student.shape[:-1])
        best = select_rows(teacher, mask).argmax(-1, keepdim=True)
        rows = -log_softmax(select_rows(student, mask), dim=-1).gather(-1, best).squeeze(-1)
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
