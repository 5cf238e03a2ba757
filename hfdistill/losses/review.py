"""Knowledge review: shallow layers of the teacher are learnt from all deeper layers of the student, and compared at several scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, batch_norm, interpolate

from .base import DistillationLoss, LossValue
from .maps import MapLoss, check_map_lists, check_maps
from .masking import check_mask


_POOLED_SIZES = (4, 2, 1)


class HCLLoss(MapLoss):
    r"""Squared error between feature maps at several scales.

    `sum over samples of [MSE(fs, ft) + ½ MSE₄ + ¼ MSE₂ + ⅛ MSE₁] / (1 + ½ + ¼ + ⅛)` where `MSE_l` compares the maps average-pooled
    to l × l, the hierarchical context loss of [ReviewKD, Chen et al. 2021](https://huggingface.co/papers/2104.09044), here on single
    pairs with the term's adapter; [`ReviewLoss`] is the whole method. Sizes l that are not below the smaller side of the map are
    left out and the weights ½, ¼, ... go to those that remain, as in the published code: a 1×1 map has the plain MSE. Zero when
    equal. It grows with the square of the scale of the maps.

    Height and width must agree; the trainer average-pools each axis to the smaller of the two.

    Shapes:
        student, teacher: `(batch, channels, height, width)`.
        mask: bool `(batch,)`, True at the samples that count; `None` for all.
        unit: sequences (samples).

    Raises:
        ValueError: if the shapes differ.
    """

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return hierarchical_context_loss(student, teacher)


def hierarchical_context_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The hierarchical context loss of each sample, see [`HCLLoss`].

    Shapes: `(batch, channels, height, width)` twice -> `(batch,)`.
    """
    check_maps(student, teacher, same_channels=True)
    difference = student - teacher  # pooling is linear
    value, weight, weights = difference.square().mean((1, 2, 3)), 1.0, 1.0
    for size in _POOLED_SIZES:
        if size < min(student.shape[2:]):
            weight /= 2
            weights += weight
            value = value + weight * adaptive_avg_pool2d(difference, size).square().mean((1, 2, 3))
    return value / weights


class ReviewLoss(DistillationLoss):
    r"""Knowledge review: each layer of the teacher is compared with what all student layers from there on give together.

    [ReviewKD, Chen et al. 2021](https://huggingface.co/papers/2104.09044). From the deepest mapped layer up to the shallowest, an
    attention-based fusion brings the student's map to `m` channels (1×1 convolution, batch norm), adds what came from below, both
    weighted, position by position, by two sigmoid gates on both (`x = g₁ x + g₂ up(y)`, `up` to the nearest), hands `x` on upwards,
    and makes the teacher's channels of it (3×3 convolution, batch norm). Loss: `sum over samples of the sum over mapped layers of
    HCL(fused, ft)`, see [`HCLLoss`]. The sum over layers is the paper's; weights 1 to 8, after a ramp over the first epochs.

    Zero when the fused maps are the teacher's; equal networks do not make it 0, since the fusions are trained with the student.
    Height, width and channels of the two networks may all differ: `x` is brought to the teacher's height and width (nearest) before
    the 3×3 convolution. Published runs take the teacher's maps *before* the last activation of a stage, and the pooled vector as a last
    map of 1×1.

    The batch norms couple the samples of a micro-batch in training: the parts of a batch do not add up exactly, and a micro-batch of
    one sample with 1×1 maps is normalised with the running statistics.

    Args:
        max_channels (`int`, defaults to 512): the fusions work with the channels of the student's deepest mapped layer, and at most
            with these.

    Shapes:
        student, teacher: lists of `(batch, channels, height, width)`, from shallow to deep.
        mask: bool `(batch,)`, True at the samples that count; `None` for all. Others do not enter the batch norms either.
        unit: sequences (samples).

    Raises:
        ValueError: for a `max_channels` below 1, before `prepare`, and for maps of other number or channels than it was prepared for.

    Example:
        >>> import torch
        >>> loss = ReviewLoss()
        >>> student = [torch.randn(2, 8, 6, 6), torch.randn(2, 16, 3, 3)]
        >>> teacher = [torch.randn(2, 32, 12, 12), torch.randn(2, 64, 6, 6)]
        >>> loss.prepare([s.shape for s in student], [t.shape for t in teacher])
        >>> loss(student, teacher).count.item()
        2
    """

    signal = "features"
    signals = ("features",)
    layout = "maps"
    unit = "sequences"
    same_size = False
    joint = True
    compares_widths = False

    def __init__(self, max_channels: int = 512):
        super().__init__()
        if isinstance(max_channels, bool) or not isinstance(max_channels, int) or max_channels < 1:
            raise ValueError(
                f"max_channels must be an integer >= 1, got {max_channels!r}: it bounds the channels in which the student's layers are "
                "fused. Use 512; fewer save memory."
            )
        self.max_channels = max_channels
        self.fusions = nn.ModuleList()

    def prepare(self, student: Sequence[tuple[int, ...]], teacher: Sequence[tuple[int, ...]]) -> None:
        between = min(self.max_channels, student[-1][-3])
        self.fusions = nn.ModuleList(
            _Fusion(s[-3], between, t[-3], gated=depth < len(student) - 1) for depth, (s, t) in enumerate(zip(student, teacher))
        )

    def compute(self, student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None) -> LossValue:
        check_map_lists(student, teacher, "ReviewLoss")
        self._check_prepared(student, teacher)
        check_mask(mask, student[0].shape[:1])
        if mask is not None:
            # batch norm must not see the others, so they are taken out rather than set to 0
            student, teacher = [maps[mask] for maps in student], [maps[mask] for maps in teacher]
        samples = student[0].size(0)
        count = torch.full((), samples, dtype=torch.long, device=student[0].device)
        if samples == 0:
            # the parameters too are in the graph, as on the other processes, whose gradients this one is to meet
            return LossValue(sum(tensor.sum() for tensor in (*student, *self.parameters())) * 0, count)
        total, below = student[0].new_zeros(()), None
        for fusion, s, t in zip(reversed(self.fusions), reversed(student), reversed(teacher)):
            fused, below = fusion(s, below, t.shape[2:])
            total = total + hierarchical_context_loss(fused, t).sum()
        return LossValue(total, count)

    def _check_prepared(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
        if not len(self.fusions):
            raise ValueError(
                "ReviewLoss has no fusion modules yet: they are made from the shapes of all mapped layers. Call prepare(student_shapes, "
                "teacher_shapes) before training and before the optimizer is made, as the trainer does."
            )
        prepared = [(fusion.reduce[0].in_channels, fusion.expand[0].out_channels) for fusion in self.fusions]
        given = [(s.size(1), t.size(1)) for s, t in zip(student, teacher)]
        if given != prepared:
            raise ValueError(
                f"ReviewLoss was prepared for maps of (student, teacher) channels {prepared}, got {given}: its fusion modules fit the "
                "layers they were made for. Pass the same layers, from shallow to deep."
            )


class _Fusion(nn.Module):
    """Attention-based fusion of a student's map with what came from the deeper layers."""

    def __init__(self, inputs: int, between: int, outputs: int, gated: bool):
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(inputs, between, kernel_size=1, bias=False), _BatchNorm(between))
        self.gates = nn.Conv2d(2 * between, 2, kernel_size=1) if gated else None
        self.expand = nn.Sequential(nn.Conv2d(between, outputs, kernel_size=3, padding=1, bias=False), _BatchNorm(outputs))
        for convolution in (self.reduce[0], self.expand[0]):
            nn.init.kaiming_uniform_(convolution.weight, a=1)  # nothing rectifies what comes out: the gain is 1

    def forward(self, maps: Tensor, below: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        maps = self.reduce(maps)
        if self.gates is not None:
            below = _resize(below, maps.shape[2:])
            own, deeper = self.gates(torch.cat([maps, below], dim=1)).sigmoid().split(1, dim=1)
            maps = own * maps + deeper * below
        return self.expand(_resize(maps, size)), maps


class _BatchNorm(nn.BatchNorm2d):
    """Batch norm that takes a single value for each channel too: it has no variance, so the running statistics stand in."""

    def forward(self, maps: Tensor) -> Tensor:
        if self.training and maps.numel() == maps.size(1):
            return batch_norm(maps, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps)
        return super().forward(maps)


def _resize(maps: Tensor, size: torch.Size) -> Tensor:
    return maps if maps.shape[2:] == size else interpolate(maps, size=tuple(size), mode="nearest")
