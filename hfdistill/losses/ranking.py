"""The order in which a model ranks: candidates by their logits, and samples by their distance."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from .base import DistillationLoss, LossValue
from .batch import BatchLoss
from .hidden import unit_vectors
from .masking import check_mask, check_same_shape, select_rows, sum_rows
from .sample_relations import distances


class MarginMSELoss(DistillationLoss):
    r"""Squared error between the margins by which a relevant candidate is scored above the others.

    `sum over rows of the mean over other candidates j of ((s_pos - s_j) - (t_pos - t_j))²`,
    [Hofstätter et al. 2020](https://huggingface.co/papers/2010.02666), whose rows have one other candidate. Zero when
    `s - t` is constant in each row; grows with the square of the scale of the scores. A candidate at -inf in both models (padding) is
    not there; a row without its relevant or without any other candidate counts as 0.

    Args:
        positive (`int`, defaults to 0): column of the relevant candidate.

    Shapes:
        student, teacher: `(..., candidates)`, one score for each, in the same order.
        mask: bool `(...)`, True at the rows that count; `None` for all.
        unit: rows.

    Raises:
        ValueError: if `positive` is no integer >= 0 or no column of the scores, if the shapes differ, or if there is one candidate.
    """

    one_class_a_row = True

    def __init__(self, positive: int = 0):
        super().__init__()
        if isinstance(positive, bool) or not isinstance(positive, int) or positive < 0:
            raise ValueError(
                f"positive must be an integer >= 0, got {positive!r}: it is the column of the candidate whose margin over the others is "
                "compared. Use 0 if it comes first."
            )
        self.positive = positive

    def check_widths(self, student: int, teacher: int) -> None:
        fewest = max(self.positive + 1, 2)
        if min(student, teacher) < fewest:
            raise ValueError(
                f"The student scores {student} and the teacher {teacher} candidates, but margin_mse needs at least {fewest}: candidate "
                f"{self.positive} is compared with the others. Pass rows of candidates, or set positive to one of their columns."
            )

    def compute(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> LossValue:
        check_same_shape(student, teacher, "Score the same candidates with both models.")
        self.check_widths(student.size(-1), teacher.size(-1))
        check_mask(mask, student.shape[:-1])
        student, teacher = select_rows(student, mask), select_rows(teacher, mask)
        absent = (student == float("-inf")) & (teacher == float("-inf"))
        present = ~absent
        difference = torch.where(absent, 0, student - teacher)
        others = present & present[..., self.positive, None] & (torch.arange(student.size(-1), device=student.device) != self.positive)
        squares = torch.where(others, difference[..., self.positive, None] - difference, 0).square()
        return LossValue(*sum_rows(squares.sum(-1) / others.sum(-1).clamp(min=1), mask))


class DarkRankLoss(BatchLoss):
    r"""How unlikely the student finds the teacher's ranking of each sample's nearest neighbours in the batch.

    For each sample, `-log Π_k exp(S_k) / Σ_{l≥k} exp(S_l)` over its `length` nearest others by the teacher, nearest first, with the
    student's score `S = -alpha · distance^beta`; the mean over samples. The hard form of
    [DarkRank, Chen et al. 2018](https://huggingface.co/papers/1707.01220), with the defaults of the published code of
    [RKD, Park et al. 2019](https://huggingface.co/papers/1904.05068), which compares itself with it.

    Not zero when both are equal: it is a likelihood, near 0 only when the student's distances rank as the teacher's and differ a lot,
    and `log(length!)` where all of the student's distances agree. Only the teacher's order counts, not its distances. Two samples have
    nothing to rank: the loss is 0.

    Args:
        alpha (`float`, defaults to 3.0): factor of the student's distance.
        beta (`float`, defaults to 3.0): its exponent, at least 1.
        length (`int`, defaults to 4): neighbours that are ranked, at least 2; at most all others.
        normalize (`bool`, defaults to `True`): bring the vectors to length 1 first, as those of the papers are. Without it the scores
            grow with the vectors to the power beta: choose alpha anew.
        gather (`bool`, defaults to `False`): rank the samples of all processes, see [`BatchLoss`].

    Shapes:
        student, teacher: `(batch, width)`; the widths may differ.
        mask: bool `(batch,)`, True at the samples that take part; `None` for all.
        unit: sequences; the total is the loss of the batch times its samples.

    Raises:
        ValueError: for options out of range, and if the numbers of samples differ.
    """

    def __init__(self, alpha: float = 3.0, beta: float = 3.0, length: int = 4, normalize: bool = True, gather: bool = False):
        super().__init__(gather)
        if not all(isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x) for x in (alpha, beta)) or alpha <= 0 or beta < 1:
            raise ValueError(
                f"alpha must be a finite number > 0 and beta a finite number >= 1, got {alpha!r} and {beta!r}: scores are "
                "-alpha * distance ** beta, which must fall with the distance and have a gradient at 0. Use 3 and 3."
            )
        if isinstance(length, bool) or not isinstance(length, int) or length < 2:
            raise ValueError(f"length must be an integer >= 2, got {length!r}: a shorter list has one order only. Use 4.")
        self.alpha, self.beta, self.length, self.normalize = alpha, beta, length, normalize

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.normalize:
            student, teacher = (select_rows(*unit_vectors(tensor)) for tensor in (student, teacher))
        itself = torch.eye(student.size(0), dtype=torch.bool, device=student.device)
        nearest = distances(teacher).masked_fill(itself, float("inf")).argsort(dim=-1, stable=True)[:, : min(self.length, len(itself) - 1)]
        scores = -self.alpha * distances(student).gather(1, nearest) ** self.beta
        # logcumsumexp from the end: what each place was drawn from
        return (scores.flip(1).logcumsumexp(1).flip(1) - scores).sum(1).mean()
