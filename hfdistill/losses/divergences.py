"""Divergences between softmax outputs that also look from the student's side: reverse KL and Jensen-Shannon."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from .base import DistillationLoss, LossValue
from .logits import check_classes, check_temperature
from .masking import check_mask, relative_entropy, select_rows, sum_rows


def check_beta(beta: float) -> float:
    """`beta` itself; `ValueError` unless it is a number from 0 to 1."""
    if not (isinstance(beta, Real) and not isinstance(beta, bool) and 0 <= beta <= 1):
        raise ValueError(
            f"beta must be a number from 0 to 1, got {beta!r}: it is the teacher's share of the mixture that both models are compared "
            "with. Use 0.5 (symmetric), 0 for soft_targets or 1 for reverse_kl."
        )
    return beta


def _log_probabilities(student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    check_classes(student, teacher)
    check_mask(mask, student.shape[:-1])
    return log_softmax(select_rows(student, mask) / temperature, dim=-1), log_softmax(select_rows(teacher, mask) / temperature, dim=-1)


def _reverse_relative_entropy(student_log: Tensor, other_log: Tensor) -> Tensor:
    """`p_s * (log p_s - other)`, entry by entry, 0 (with gradient 0) where the student's probability is exactly 0."""
    # a gradient of 0 times the infinite difference would be NaN, so it is taken out before the product, not only after it
    return student_log.exp() * torch.where(student_log == float("-inf"), 0, student_log - other_log)


class ReverseKLLoss(DistillationLoss):
    r"""Kullback-Leibler divergence from the softened teacher to the softened student, times T²: soft targets the other way round.

    `T² · sum over rows of KL(softmax(s/T) || softmax(t/T))`, the divergence of MiniLLM,
    [Gu et al. 2023](https://huggingface.co/papers/2306.08543), here position by position on given text. It seeks modes: the student
    is punished for what the teacher finds unlikely, and may leave out some of what the teacher finds likely. A class at -inf in both
    models is not there.

    Zero when `s - t` is constant in each row, otherwise positive; equal to [`SoftTargetsLoss`] with the models exchanged.

    Args:
        temperature (`float`, defaults to 2.0): T, the same for student and teacher. May follow a schedule.

    Shapes:
        student, teacher: `(..., classes)`, logits in the same class order.
        mask: bool `(...)`, True at the rows that count; `None` for all.
        unit: rows.

    Raises:
        ValueError: if `temperature` is not a finite number > 0, if the shapes differ, or if there is only one class.
    """

    scheduled = ("temperature",)
    one_class_a_row = True

    def __init__(self, temperature: float = 2.0):
        super().__init__()
        self.temperature = check_temperature(temperature)

    def compute(self, student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float | None = None) -> LossValue:
        temperature = self.temperature if temperature is None else check_temperature(temperature)
        student_log, teacher_log = _log_probabilities(student, teacher, mask, temperature)
        return LossValue(*sum_rows(_reverse_relative_entropy(student_log, teacher_log).sum(-1) * temperature**2, mask))


class JSDLoss(DistillationLoss):
    r"""Generalised Jensen-Shannon divergence between softened student and teacher, times T².

    `T² · sum over rows of (β KL(p_t || m) + (1 - β) KL(p_s || m))` with `p = softmax(·/T)` and `m = β p_t + (1 - β) p_s`, equation 1 of
    GKD, [Agarwal et al. 2023](https://huggingface.co/papers/2306.13649), who use T = 1. A class at -inf in both models is not there.

    Zero when `s - t` is constant in each row, otherwise positive; at T = 1 and β = 0.5 at most log 2 a row. β = 0 and β = 1 are defined
    as forward KL ([`SoftTargetsLoss`]) and reverse KL ([`ReverseKLLoss`]), as in the paper. The formula itself tends to 0 there, so
    the size of the loss jumps: at β = 0.01 it is about a hundredth of the forward KL and needs a weight 100 times as large.

    Args:
        beta (`float`, defaults to 0.5): β, the teacher's share of the mixture, from 0 to 1.
        temperature (`float`, defaults to 2.0): T, the same for student and teacher. May follow a schedule.

    Shapes:
        student, teacher: `(..., classes)`, logits in the same class order.
        mask: bool `(...)`, True at the rows that count; `None` for all.
        unit: rows.

    Raises:
        ValueError: if `beta` is not a number from 0 to 1, if `temperature` is not a finite number > 0, if the shapes differ, or if
            there is only one class.

    Example:
        >>> import torch
        >>> apart = torch.tensor([[50.0, -50.0]])
        >>> round(JSDLoss(temperature=1.0)(apart, -apart).total.item(), 4)  # log 2
        0.6931
    """

    scheduled = ("temperature",)
    one_class_a_row = True

    def __init__(self, beta: float = 0.5, temperature: float = 2.0):
        super().__init__()
        self.beta, self.temperature = check_beta(beta), check_temperature(temperature)

    def compute(self, student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float | None = None) -> LossValue:
        temperature = self.temperature if temperature is None else check_temperature(temperature)
        student_log, teacher_log = _log_probabilities(student, teacher, mask, temperature)
        if self.beta == 0:
            entries = relative_entropy(student_log, teacher_log)
        elif self.beta == 1:
            entries = _reverse_relative_entropy(student_log, teacher_log)
        else:
            entries = self._entries(student_log, teacher_log)
        return LossValue(*sum_rows(entries.sum(-1) * temperature**2, mask))

    def _entries(self, student_log: Tensor, teacher_log: Tensor) -> Tensor:
        no_student, no_teacher = student_log == float("-inf"), teacher_log == float("-inf")
        ratio = torch.where(no_student & no_teacher, 0, student_log - teacher_log)
        # log(m / p) from the ratio that is at most 1: exactly 0 for equal models, and without overflow
        below, above = ratio.clamp(max=0), ratio.clamp(min=0)
        low, high = torch.log1p((1 - self.beta) * torch.expm1(below)), torch.log1p(self.beta * torch.expm1(-above))
        of_teacher = torch.where(no_teacher, 0, torch.where(ratio <= 0, low, high + above))
        of_student = torch.where(no_student, 0, torch.where(ratio <= 0, low - below, high))
        return -self.beta * teacher_log.exp() * of_teacher - (1 - self.beta) * student_log.exp() * of_student
