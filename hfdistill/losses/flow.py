"""The flow between layers: how a network gets from one feature map to the next."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from .base import DistillationLoss, LossValue
from .maps import check_map_lists, select_samples
from .masking import check_mask, sum_rows


class FSPLoss(DistillationLoss):
    r"""Squared error between the flows of two networks, the Gram matrices between one mapped layer and the next.

    `sum over samples of the mean over consecutive pairs of mapped layers of the mean over i, j of (Gs_ij - Gt_ij)²` with
    `G_ij = mean over positions of f1_i f2_j`, FSP (flow of the solution procedure), Yim et al., CVPR 2017. Where the two layers of a
    network differ in height or width, each axis of the larger is average-pooled to the smaller. In the paper it is the whole loss of
    a first stage that initialises the student; public runs use weight 50. Zero when all flows agree, which layers of another scale
    can have; it grows with the fourth power of the scale of the maps.

    The two networks need the same channels at each mapped layer (there is no adapter: a flow through one would be the adapter's), but
    not the same height and width.

    Shapes:
        student, teacher: lists of `(batch, channels, height, width)`, from shallow to deep, at least two.
        mask: bool `(batch,)`, True at the samples that count; `None` for all.
        unit: sequences (samples).

    Raises:
        ValueError: for fewer than two mapped layers, and for channels that differ between student and teacher.
    """

    signal = "features"
    signals = ("features",)
    layout = "maps"
    unit = "sequences"
    same_size = False
    joint = True
    compares_widths = False

    def prepare(self, student: Sequence[tuple[int, ...]], teacher: Sequence[tuple[int, ...]]) -> None:
        _check_layers(len(student))
        for s, t in zip(student, teacher):
            self.check_widths(s[-3], t[-3])

    def check_widths(self, student: int, teacher: int) -> None:
        if student != teacher:
            raise ValueError(
                f"student has {student} channels and teacher {teacher} at a mapped layer: their flows are matrices of different sizes. "
                "Map layers of equal channels, or use a loss that takes any, such as attention_transfer or nst."
            )

    def compute(self, student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None) -> LossValue:
        _check_layers(len(student))
        check_map_lists(student, teacher, "FSPLoss")
        for s, t in zip(student, teacher):
            self.check_widths(s.size(1), t.size(1))
        check_mask(mask, student[0].shape[:1])
        student, teacher = ([select_samples(maps, mask) for maps in layers] for layers in (student, teacher))
        values = [(flow(*student[i : i + 2]) - flow(*teacher[i : i + 2])).square().mean((1, 2)) for i in range(len(student) - 1)]
        return LossValue(*sum_rows(sum(values) / len(values), mask))


def flow(first: Tensor, second: Tensor) -> Tensor:
    """Mean over positions of the products of two layers' channels.

    Shapes: `(batch, channels_1, ...)` and `(batch, channels_2, ...)` -> `(batch, channels_1, channels_2)`.
    """
    size = (min(first.size(2), second.size(2)), min(first.size(3), second.size(3)))
    first, second = (maps if maps.shape[2:] == size else adaptive_avg_pool2d(maps, size) for maps in (first, second))
    return first.flatten(2) @ second.flatten(2).mT / (size[0] * size[1])


def _check_layers(count: int) -> None:
    if count < 2:
        raise ValueError(
            f"the flow loss got {count} mapped layer{'s' * (count != 1)}, but a flow is between two layers of one network: there would be "
            "nothing to compare. Map at least two layers, from shallow to deep."
        )
