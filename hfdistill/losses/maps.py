"""Losses on the feature maps of one layer: where it is active (attention transfer, factors) and what its channels answer to (NST)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import DistillationLoss, LossValue
from .masking import check_mask, check_same_shape, sum_rows


_SMALLEST = 1e-8
"""Below this largest entry a map counts as zero: it has no direction."""


class MapLoss(DistillationLoss):
    """Base class of losses on two feature maps: `compare(student, teacher)` gives one value for each sample.

    A sum over samples, so the parts of a batch add up. A mask leaves out whole samples.
    """

    signal = "features"
    signals = ("features",)
    layout = "maps"
    unit = "sequences"

    def compute(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> LossValue:
        check_maps(student, teacher, self.compares_widths)
        check_mask(mask, student.shape[:1])
        return LossValue(*sum_rows(self.compare(select_samples(student, mask), select_samples(teacher, mask)), mask))

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """`(batch, channels, height, width)` twice -> `(batch,)`."""
        raise NotImplementedError(f"{type(self).__name__} must implement compare")


class AttentionTransferLoss(MapLoss):
    r"""Squared error between spatial attention maps: where a layer is active, whatever its channels.

    `sum over samples of the mean over positions of (Q_s - Q_t)²` with `Q = n(mean over channels of |f|^power)`, one vector over
    all positions of length 1, [Zagoruyko & Komodakis 2017](https://huggingface.co/papers/1612.03928) as in the published code, where
    its weight is 1000 on every stage and stages are summed (`layer_reduction="sum"`). `form="paper"` is the distance `||Q_s - Q_t||`
    of each sample as printed in the paper, about a hundred times larger on small maps: weights are not exchangeable. The code form
    is between 0 and 2 / positions, the paper form between 0 and sqrt(2). Zero when the activity of both layers agrees up to a
    positive factor for each sample; ignores the order of channels. A zero map has no attention: its Q is 0 and it gets no gradient.

    Height and width must agree; the trainer average-pools each axis to the smaller of the two. The channels may differ.

    Args:
        power (`float`, defaults to 2.0): exponent of the activations, at least 1. A larger one looks at the strongest only.
        form (`str`, defaults to `"code"`): `"code"` (mean of squares) or `"paper"` (length of the difference).

    Shapes:
        student, teacher: `(batch, channels, height, width)`; the channels may differ.
        mask: bool `(batch,)`, True at the samples that count; `None` for all.
        unit: sequences (samples).

    Raises:
        ValueError: for a `power` below 1 or an unknown `form`, and if batch, height or width differ.

    Example:
        >>> import torch
        >>> loss = AttentionTransferLoss()
        >>> maps = torch.tensor([[[[1.0, 2.0]], [[0.0, 3.0]]]])
        >>> loss(5 * maps.flip(1), maps).mean.item()
        0.0
    """

    compares_widths = False

    def __init__(self, power: float = 2.0, form: str = "code"):
        super().__init__()
        if form not in ("code", "paper"):
            raise ValueError(
                f"form must be 'code' or 'paper', got {form!r}: it says how two attention maps are compared, and the weight goes with it. "
                "Use 'code' (mean of squares, weight 1000) or 'paper' (length of the difference, a weight about a hundred times smaller)."
            )
        self.power, self.form = check_power(power), form

    def prepare(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
        check_positions(type(self).__name__, student)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        difference = attention_vectors(student, self.power) - attention_vectors(teacher, self.power)
        if self.form == "code":
            return difference.square().mean(-1)
        squares = difference.square().sum(-1)
        # the root of 0 has no finite slope
        apart = squares > 0
        return torch.where(apart, torch.where(apart, squares, 1).sqrt(), squares)


class FactorTransferLoss(MapLoss):
    r"""Distance between factors of two layers, the factors being spatial attention maps.

    `sum over samples of the mean over positions of |Q_s - Q_t|^norm` with `Q = n(mean over channels of |f|^power)`, one vector over
    all positions of length 1. [Kim et al. 2018](https://huggingface.co/papers/1802.04977) compare normalised factors by their L1
    distance and train a paraphraser and a translator that make them; this is the form of public benchmarks, which has no parameters.
    With `norm=2` it is [`AttentionTransferLoss`]. Between 0 and sqrt(2 / positions); zero when the activity of both layers agrees up
    to a positive factor for each sample; ignores the order of channels. A zero map has Q = 0 and gets no gradient.

    Height and width must agree; the trainer average-pools each axis to the smaller of the two. The channels may differ.

    Args:
        power (`float`, defaults to 2.0): exponent of the activations, at least 1.
        norm (`int`, defaults to 1): 1 for absolute differences, 2 for squared ones.

    Shapes:
        student, teacher: `(batch, channels, height, width)`; the channels may differ.
        mask: bool `(batch,)`, True at the samples that count; `None` for all.
        unit: sequences (samples).

    Raises:
        ValueError: for a `power` below 1 or a `norm` that is neither 1 nor 2, and if batch, height or width differ.
    """

    compares_widths = False

    def __init__(self, power: float = 2.0, norm: int = 1):
        super().__init__()
        if isinstance(norm, bool) or norm not in (1, 2):
            raise ValueError(
                f"norm must be 1 or 2, got {norm!r}: it is the exponent of the differences between factors. "
                "Use 1 (the paper) or 2 (attention transfer)."
            )
        self.power, self.norm = check_power(power), norm

    def prepare(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
        check_positions(type(self).__name__, student)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        difference = attention_vectors(student, self.power) - attention_vectors(teacher, self.power)
        return (difference.abs() if self.norm == 1 else difference.square()).mean(-1)


class NSTLoss(MapLoss):
    r"""Maximum mean discrepancy between the channels of two layers: what the neurons of a layer answer to, as a set.

    `sum over samples of mean k(t, t') + mean k(s, s') - 2 mean k(s, t)` over pairs of channels, with each channel map flattened and
    brought to length 1 and the polynomial kernel `k(a, b) = (a·b)²`, neuron selectivity transfer,
    [Huang & Wang 2017](https://huggingface.co/papers/1707.01219). Public runs use weight 50. Between 0 and 2; zero when the two sets
    of channel maps agree (up to rounding, which may leave something like -1e-8 in fp32); ignores the order, scale and sign of
    channels. A channel that is 0 everywhere counts in the means, adds nothing and gets no gradient.

    Height and width must agree; the trainer average-pools each axis to the smaller of the two. The channels may differ.

    Shapes:
        student, teacher: `(batch, channels, height, width)`; the channels may differ.
        mask: bool `(batch,)`, True at the samples that count; `None` for all.
        unit: sequences (samples).

    Raises:
        ValueError: if batch, height or width differ.
    """

    compares_widths = False

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = _directions(student.flatten(2)), _directions(teacher.flatten(2))
        if student.size(2) < max(student.size(1), teacher.size(1)):
            # This kernel's mean embedding is the second moment of the channels, a positions x positions matrix. Late stages have
            # many channels on few positions: 2048 on 7 x 7, which is 1700 times smaller than the kernel matrices.
            moments = student.mT @ student / student.size(1) - teacher.mT @ teacher / teacher.size(1)
            return moments.square().sum((1, 2))
        return _mean_kernel(teacher, teacher) + _mean_kernel(student, student) - 2 * _mean_kernel(student, teacher)


def _mean_kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.mT).square().mean((1, 2))


def attention_vectors(maps: Tensor, power: float) -> Tensor:
    """`n(mean over channels of |f|^power)`: `(batch, channels, height, width)` -> `(batch, height * width)`, 0 for a zero map."""
    # the result does not depend on the scale of the map, but |f|^power may overflow or vanish on the way
    scale = maps.detach().abs().amax((1, 2, 3), keepdim=True)
    activity = (maps / torch.where(scale <= _SMALLEST, 1, scale)).abs().pow(power)
    return _directions(activity.mean(1).flatten(1))


def _directions(rows: Tensor) -> Tensor:
    """Rows of length 1 over the last axis. A zero row stays 0 and gets no gradient; NaN stays NaN."""
    scale = rows.detach().abs().amax(-1, keepdim=True)
    zero = scale <= _SMALLEST
    safe = torch.where(zero, 1, rows / torch.where(zero, 1, scale))
    return torch.where(zero, 0, safe / torch.linalg.vector_norm(safe, dim=-1, keepdim=True))


def select_samples(maps: Tensor, mask: Tensor | None) -> Tensor:
    """`maps` `(batch, ...)` with the samples where `mask` `(batch,)` is False set to 0."""
    return maps if mask is None else torch.where(mask.reshape(-1, *[1] * (maps.dim() - 1)), maps, 0)


def check_power(power: float) -> float:
    """`power` itself; `ValueError` unless it is a finite number of at least 1."""
    if isinstance(power, bool) or not isinstance(power, (int, float)) or not math.isfinite(power) or power < 1:
        raise ValueError(
            f"power must be a finite number >= 1, got {power!r}: activations are raised to it, and below 1 the gradient at 0 is infinite. "
            "Use 2; 4 looks at the strongest activations only."
        )
    return power


def check_maps(student: Tensor, teacher: Tensor, same_channels: bool, same_size: bool = True) -> None:
    """Raises `ValueError` unless both are feature maps of the same samples, of equal sizes and channels where these must agree."""
    for name, maps in (("student", student), ("teacher", teacher)):
        if maps.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(maps.shape)}: this loss compares feature maps, (batch, channels, height, width). "
                "Take the signal 'features'; tokens are laid out on their grid first."
            )
    shapes = f"student has shape {tuple(student.shape)} and teacher {tuple(teacher.shape)}"
    if student.size(0) != teacher.size(0):
        raise ValueError(f"{shapes}: their samples cannot be paired. Feed both models the same batch.")
    if same_size and student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"{shapes}: maps of different height or width show different places at one index. Average-pool each axis of the larger to "
            "the smaller, as the trainer does, or map stages of one resolution."
        )
    if same_channels:
        check_same_shape(student, teacher, "Give the term an adapter that brings the student to the teacher's channels.")


def check_map_lists(student: Sequence[Tensor], teacher: Sequence[Tensor], loss: str) -> None:
    """Raises `ValueError` unless both are lists of equally many feature maps, all of the same samples."""
    if len(student) != len(teacher):
        raise ValueError(
            f"{loss} got {len(student)} maps of the student and {len(teacher)} of the teacher: it compares them one to one. "
            "Pass one map of each for every pair of the layer map."
        )
    for s, t in zip(student, teacher):
        check_maps(s, t, same_channels=False, same_size=False)
        if s.size(0) != student[0].size(0):
            raise ValueError(
                f"{loss} got maps of {student[0].size(0)} and of {s.size(0)} samples: they are not of one batch. "
                "Pass the layers of one forward pass."
            )


def check_positions(loss: str, shape: tuple[int, ...]) -> None:
    """Raises `ValueError` for maps of a single position, whose attention is 1 whatever the model does."""
    if tuple(shape[-2:]) == (1, 1):
        raise ValueError(
            f"{loss} compares where a layer is active, but a mapped layer has a single position (shape {tuple(shape)}): the loss would be "
            "a constant without a gradient. Map earlier stages (layer_map), or feed larger images."
        )
