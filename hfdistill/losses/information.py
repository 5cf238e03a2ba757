"""Mutual information between two layers, bounded from below by how well one predicts the other (VID)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from .maps import MapLoss


class VIDLoss(MapLoss):
    r"""Gaussian negative log-likelihood of the teacher's feature map given the student's.

    `sum over samples of the mean over channels and positions of ½ [(mu(fs) - ft)² / v_c + log v_c]`, variational information
    distillation, [Ahn et al. 2019](https://huggingface.co/papers/1904.05835), up to a constant a lower bound of their mutual
    information with the sign turned. `mu` is three 1×1 convolutions without bias with ReLU in between, of the teacher's channels
    inside; `v_c = softplus(a_c) + eps` is one variance for each channel of the teacher. Both are trained with the student: one
    instance serves one pair of layers. Public runs use weight 1.

    It may be *negative*, and equal maps do not make it 0: where `mu(fs) = ft` the variances shrink towards `eps` and the loss towards
    `½ log eps` (-5.76). A channel of variance v weighs squared errors by 1 / (2 v), so what the student cannot predict counts little.

    Height and width must agree; the trainer average-pools each axis to the smaller of the two. The channels may differ.

    Args:
        variance (`float`, defaults to 5.0): all variances before training.
        eps (`float`, defaults to 1e-5): the smallest variance.

    Shapes:
        student, teacher: `(batch, channels, height, width)`; the channels may differ.
        mask: bool `(batch,)`, True at the samples that count; `None` for all.
        unit: sequences (samples).

    Raises:
        ValueError: unless `variance > eps > 0` are finite numbers, before `prepare`, for other channels than it was prepared for, and
            if batch, height or width differ.

    Example:
        >>> import torch
        >>> loss = VIDLoss()
        >>> loss.prepare((1, 4, 7, 7), (1, 6, 7, 7))
        >>> {name: tuple(p.shape) for name, p in loss.named_parameters()}["raw_variance"]
        (6,)
    """

    compares_widths = False

    def __init__(self, variance: float = 5.0, eps: float = 1e-5):
        super().__init__()
        numbers = all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in (variance, eps))
        if not numbers or not 0 < eps < variance:
            raise ValueError(
                f"variance and eps must be finite numbers with 0 < eps < variance, got {variance!r} and {eps!r}: a variance starts at the "
                "one and never falls below the other, and the squared errors are divided by it. Use 5 and 1e-5."
            )
        self.variance, self.eps = variance, eps
        self.regressor: nn.Sequential | None = None
        self.raw_variance: nn.Parameter | None = None

    def prepare(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
        inputs, outputs = student[-3], teacher[-3]
        self.regressor = nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, kernel_size=1, bias=False),
        )
        start = self.variance - self.eps
        # the inverse of softplus, log(exp(start) - 1), without its overflow
        self.raw_variance = nn.Parameter(torch.full((outputs,), start + math.log(-math.expm1(-start))))

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.regressor is None or self.raw_variance is None:
            raise ValueError(
                "VIDLoss has no regressor yet: its parameters are made from the shapes of both maps. Call prepare(student_shape, "
                "teacher_shape) before training and before the optimizer is made, as the trainer does."
            )
        prepared = self.regressor[0].in_channels, self.regressor[0].out_channels
        if (student.size(1), teacher.size(1)) != prepared:
            raise ValueError(
                f"VIDLoss was prepared for {prepared[0]} channels of the student and {prepared[1]} of the teacher, got {student.size(1)} "
                f"and {teacher.size(1)}: its regressor fits one pair of layers. Use an instance of its own for each pair."
            )
        variance = (softplus(self.raw_variance) + self.eps)[:, None, None]
        return ((self.regressor(student) - teacher).square() / variance + variance.log()).mean((1, 2, 3)) / 2
