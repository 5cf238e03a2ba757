"""DIST: correlation of the predicted probabilities instead of their equality."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import LossValue
from .batch import BatchLoss
from .logits import check_classes, check_temperature, check_weights, varies


_EPS = 1e-8


class DISTLoss(BatchLoss):
    r"""One minus the correlation between the probabilities of student and teacher, within rows and within classes.

    `T² · (beta · (1 - mean over rows of r(P_i, Q_i)) + gamma · (1 - mean over classes of r(P_·c, Q_·c)))` with `P = softmax(s/T)`,
    `Q = softmax(t/T)` and Pearson's `r` (1e-8 is added to the product of norms),
    [DIST, Huang et al. 2022](https://huggingface.co/papers/2205.10536). The first part asks for the relations of the classes in each row,
    the second for those of the rows in each class. The paper has no T², which its code gained later; at its T = 1 they agree. With
    beta = gamma = 1 between 0 and 4 T². Zero (up to the 1e-8) when each row and each class of the student's probabilities is a positive
    multiple of the teacher's plus a constant.

    A constant row or class has no correlation: it counts as 0 (1 in the loss) and gets no gradient. A batch of one row has the first
    part only. A class must be the same thing in every row, so this is not for spans, whose classes are positions.

    Args:
        beta (`float`, defaults to 1.0): weight of the correlation within rows.
        gamma (`float`, defaults to 1.0): weight of the correlation within classes.
        temperature (`float`, defaults to 1.0): T, the same for student and teacher. May follow a schedule.
        gather (`bool`, defaults to `False`): correlate over the rows of all processes, see [`BatchLoss`].

    Shapes:
        student, teacher: `(..., classes)`, logits in the same class order.
        mask: bool `(...)`, True at the rows that count, the others are left out of the batch; `None` for all.
        unit: rows; the total is the loss of the batch times its rows.

    Raises:
        ValueError: for weights that are negative, not finite or both 0, for a `temperature` that is not a finite number > 0, if the
            shapes differ, or if there is only one class.
    """

    one_class_a_row = True
    signal = "logits"
    signals = ("logits",)
    layout = "rows"
    unit = "rows"
    compares_widths = True
    scheduled = ("temperature",)
    fewest = 1

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0, gather: bool = False):
        super().__init__(gather)
        check_weights("Use 1 and 1 (the paper)", beta=beta, gamma=gamma)
        self.beta, self.gamma, self.temperature = beta, gamma, check_temperature(temperature)

    def compute(self, student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float | None = None) -> LossValue:
        check_classes(student, teacher)
        temperature = self.temperature if temperature is None else check_temperature(temperature)
        return super().compute(student, teacher, mask, temperature=temperature)

    def compare(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        student, teacher = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
        value = self.beta * (1 - _correlation(student, teacher).mean())
        if student.size(0) > 1:
            value = value + self.gamma * (1 - _correlation(student.T, teacher.T).mean())
        return value * temperature**2


def _correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """Pearson's correlation over the last axis; 0 without gradient where one side does not vary."""
    sides, varied = [], True
    for tensor in (student, teacher):
        centered = tensor - tensor.mean(-1, keepdim=True)
        sides.append(centered)
        varied = varied & varies(tensor, centered)
    student, teacher = (torch.where(varied, centered, 1) for centered in sides)
    norms = torch.linalg.vector_norm(student, dim=-1) * torch.linalg.vector_norm(teacher, dim=-1)
    return torch.where(varied.squeeze(-1), (student * teacher).sum(-1) / (norms + _EPS), 0)
