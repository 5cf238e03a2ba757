"""Hints: the feature map of a layer as it is, after a regressor."""

from __future__ import annotations

from torch import Tensor

from .maps import MapLoss


class HintLoss(MapLoss):
    r"""Squared error between feature maps.

    `sum over samples of the mean over channels and positions of (r(fs) - ft)²`,
    [FitNets, Romero et al. 2015](https://huggingface.co/papers/1412.6550), as it is trained today: beside the task, not in a stage
    of its own, without the paper's factor of a half. The regressor `r` is the adapter of the term, a 1×1 convolution;
    `adapter="conv_bn_relu"` comes closer to that of public code. Public runs use weight 100 on one stage in the middle. Zero when
    equal. It grows with the square of the scale of the maps, so models of different scale want another loss or a smaller weight.

    Height and width must agree; the trainer average-pools each axis to the smaller of the two.

    Shapes:
        student, teacher: `(batch, channels, height, width)`.
        mask: bool `(batch,)`, True at the samples that count; `None` for all.
        unit: sequences (samples).

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> import torch
        >>> value = HintLoss()(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 2.0))
        >>> value.total.item(), value.count.item()
        (8.0, 2)
    """

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).square().mean((1, 2, 3))
