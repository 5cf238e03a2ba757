"""Adapters: what brings the student's width to the teacher's before the two are compared."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..suggest import did_you_mean


def auto_adapter(student_width: int, teacher_width: int) -> nn.Module:
    """Nothing where the widths are equal, a linear map otherwise."""
    return nn.Identity() if student_width == teacher_width else linear_adapter(student_width, teacher_width)


def linear_adapter(student_width: int, teacher_width: int) -> nn.Linear:
    """`W h + b` with `W ~ N(0, 0.02)` and `b = 0` (TinyBERT's `W_h`, [arXiv 1909.10351](https://huggingface.co/papers/1909.10351))."""
    linear = nn.Linear(student_width, teacher_width)
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


def mlp_adapter(student_width: int, teacher_width: int) -> nn.Sequential:
    """Linear, GELU, Linear; the teacher's width in between."""
    return nn.Sequential(linear_adapter(student_width, teacher_width), nn.GELU(), linear_adapter(teacher_width, teacher_width))


def no_adapter(student_width: int, teacher_width: int) -> nn.Identity:
    """Nothing; refuses unequal widths."""
    if student_width != teacher_width:
        raise ValueError(
            f"adapter='none' compares the student's width {student_width} with the teacher's width {teacher_width} as they are, which "
            "needs equal widths. Use adapter='auto' or 'linear'."
        )
    return nn.Identity()


class SharedAdapter(nn.Module):
    """One user of an adapter that several terms or layers share; the adapter itself is a parameter of its owner only."""

    def __init__(self, adapter: nn.Module):
        super().__init__()
        self._adapter = (adapter,)  # in a tuple, so that it is not registered, saved and counted once more

    def forward(self, features: Tensor) -> Tensor:
        return self._adapter[0](features)


# `shared` is one linear map for all layers and terms of equal widths (TinyBERT's code); `build_objective` hands out the same one.
ADAPTERS = {"auto": auto_adapter, "linear": linear_adapter, "shared": linear_adapter, "mlp": mlp_adapter, "none": no_adapter}


def auto_map_adapter(student_width: int, teacher_width: int) -> nn.Module:
    """Nothing where the channels are equal, a 1×1 convolution otherwise."""
    return nn.Identity() if student_width == teacher_width else conv_adapter(student_width, teacher_width)


def conv_adapter(student_width: int, teacher_width: int) -> nn.Conv2d:
    """A 1×1 convolution with bias: the linear map of channels, the same at every position."""
    return nn.Conv2d(student_width, teacher_width, kernel_size=1)


def conv_mlp_adapter(student_width: int, teacher_width: int) -> nn.Sequential:
    """1×1 convolution, GELU, 1×1 convolution; the teacher's channels in between."""
    return nn.Sequential(conv_adapter(student_width, teacher_width), nn.GELU(), conv_adapter(teacher_width, teacher_width))


def conv_bn_relu_adapter(student_width: int, teacher_width: int) -> nn.Sequential:
    """1×1 convolution, batch norm, ReLU: the regressor of the public FitNets
    ([Romero et al. 2015](https://huggingface.co/papers/1412.6550)) code. The batch norm couples the samples of a micro-batch."""
    return nn.Sequential(conv_adapter(student_width, teacher_width), nn.BatchNorm2d(teacher_width), nn.ReLU())


MAP_ADAPTERS = {
    "auto": auto_map_adapter,
    "linear": conv_adapter,
    "shared": conv_adapter,
    "mlp": conv_mlp_adapter,
    "conv_bn_relu": conv_bn_relu_adapter,
    "none": no_adapter,
}


def build_adapter(kind: str | nn.Module, student_width: int, teacher_width: int, maps: bool = False) -> nn.Module:
    """Makes the module that maps student features to the teacher's width.

    Shapes: `(..., student_width)` -> `(..., teacher_width)`; for feature maps `(batch, student_width, height, width)` ->
    `(batch, teacher_width, height, width)`. The weights are drawn from torch's global generator.

    Args:
        kind (`str` or `nn.Module`): a name in `ADAPTERS` (`MAP_ADAPTERS`), or a module, of which a copy is used.
        student_width (`int`): width of the student's features.
        teacher_width (`int`): width of the teacher's features.
        maps (`bool`): for feature maps, on which a linear map is a 1×1 convolution.

    Raises:
        ValueError: for an unknown kind, and for `none` with unequal widths.
    """
    if isinstance(kind, nn.Module):
        return copy.deepcopy(kind)  # each pair, and each trial of a search, starts from the weights as given
    kinds: Mapping[str, Any] = MAP_ADAPTERS if maps else ADAPTERS
    build: Any = kinds.get(kind) if isinstance(kind, str) else None
    if build is None and kind in MAP_ADAPTERS:
        raise ValueError(f"adapter={kind!r} is for feature maps (signal 'features'), not for vectors. Use one of {', '.join(ADAPTERS)}.")
    if build is None:
        raise ValueError(f"Unknown adapter {kind!r}.{did_you_mean(kind, kinds)} Use one of {', '.join(kinds)}, or pass an nn.Module.")
    return build(student_width, teacher_width)
