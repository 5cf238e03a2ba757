"""Soft targets against a teacher of which only the largest logits are known, as a store keeps them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ..signals import TopLogits
from .base import LossValue, raise_precision
from .logits import check_temperature
from .masking import check_mask, select_rows, sum_rows


def check_top_k(rows: int, columns: int, teacher: TopLogits, temperature: float) -> None:
    """Raises `ValueError` where `teacher` does not fit logits `(rows, columns)`, or its tail is not known at `temperature`."""
    check_temperature(temperature)
    if teacher.values.shape != teacher.ids.shape or tuple(teacher.values.shape[:-1]) != (rows,) or teacher.values.size(-1) > columns:
        raise ValueError(
            f"The student's logits have shape {(rows, columns)}, but the teacher's largest ones {tuple(teacher.values.shape)} and their "
            f"ids {tuple(teacher.ids.shape)}: rows would be compared with those of other tokens. Read the stored rows of this batch, and "
            "keep no more logits than there are classes."
        )
    if teacher.tail and temperature != teacher.temperature:
        raise ValueError(
            f"The probability of the teacher's other classes is stored for temperature {teacher.temperature}, but {temperature} is asked "
            f"for, at which it is not known. Use temperature {teacher.temperature}, store the teacher again with that of this run, or "
            "leave out the tail, which is biased."
        )


def teacher_outcomes(teacher: TopLogits, temperature: float, has_others: bool) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities `(rows, k)` of the `k` classes and the probability `(rows, 1)` of all others together, in at least fp32.

    The latter is `None` without a tail, and where there are no others.
    """
    values = raise_precision(teacher.values) / temperature
    log = log_softmax(values, dim=-1)
    if not (teacher.tail and has_others):
        return log, None
    # of rounded values the k may have more than all classes had; then the others have nothing
    mass = (torch.logsumexp(values, -1) - raise_precision(teacher.logsumexp)).unsqueeze(-1).clamp(max=0)
    return log + mass, -torch.expm1(mass)


def top_k_soft_targets(student: Tensor, teacher: TopLogits, mask: Tensor | None = None, temperature: float = 1.0) -> LossValue:
    r"""Soft targets, times T², where of the teacher's logits only the `k` largest of each row are known.

    With the tail, all other classes are one more outcome, in both models: `T² · KL` over `k + 1` outcomes, which is at most that over all
    classes, and the same for `k` = all classes. Without it both models are renormalised over the `k` classes. That is biased: what the
    student gives to other classes goes unpunished, see [Anshumann et al. 2025](https://huggingface.co/papers/2503.16870) for what
    leaving out the tail does to the student's calibration.

    The student's tail is summed from its own logits, not as one minus the rest, so that its gradient is right (and finite) where the
    `k` classes have all the probability to rounding.

    Args:
        student (`torch.Tensor`): logits `(rows, classes)`.
        teacher ([`TopLogits`]): of the same rows; its ids are the student's classes.
        mask (`torch.Tensor`, *optional*): bool `(rows,)`, True at the rows that count; all by default.
        temperature (`float`, defaults to 1.0): T, the same for student and teacher.

    Shapes:
        student: `(rows, classes)`.
        mask: bool `(rows,)`.
        unit: rows.

    Raises:
        ValueError: if the shapes do not belong together, if `temperature` is not a finite number > 0, or if there is a tail and it is
            not the stored temperature.
    """
    with torch.autocast(student.device.type, enabled=False):
        check_mask(mask, student.shape[:-1])
        check_top_k(*student.shape, teacher, temperature)
        if mask is not None:  # what the rows that do not count hold must not reach a product
            kept = (select_rows(teacher.values, mask), select_rows(teacher.ids, mask), torch.where(mask, teacher.logsumexp, 0))
            teacher = TopLogits(*kept, teacher.temperature, teacher.tail)
        ids = teacher.ids.long()
        logits = select_rows(raise_precision(student), mask) / temperature
        teacher_log, tail = teacher_outcomes(teacher, temperature, ids.size(-1) < student.size(-1))
        kept = logits.gather(-1, ids)
        if tail is None:
            student_log = log_softmax(kept, dim=-1)
        else:
            others = logits.scatter(-1, ids, float("-inf"))
            # where all else is at -inf there is no tail, and the gradient of its logsumexp would be NaN
            absent = (others == float("-inf")).all(-1, keepdim=True)
            rest = torch.logsumexp(torch.where(absent, 0, others), -1, keepdim=True).masked_fill(absent, float("-inf"))
            student_log = log_softmax(torch.cat([kept, rest], -1), dim=-1)
            teacher_log = torch.cat([teacher_log, tail.masked_fill(absent, 0).log()], -1)
        known = teacher_log > float("-inf")
        difference = torch.where(known, teacher_log, 0) - torch.where(known, student_log, 0)
        rows = (teacher_log.exp() * difference).sum(-1) * temperature**2
        return LossValue(*sum_rows(rows, mask))
