"""Adapters: what brings the student's width to the teacher's before the two are compared."""

from __future__ import annotations

import copy
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


def build_adapter(kind: str | nn.Module, student_width: int, teacher_width: int) -> nn.Module:
    """Makes the module that maps student features to the teacher's width.

    Shapes: `(..., student_width)` -> `(..., teacher_width)`. The weights are drawn from torch's global generator.

    Args:
        kind (`str` or `nn.Module`): a name in `ADAPTERS`, or a module, of which a copy is used.
        student_width (`int`): width of the student's features.
        teacher_width (`int`): width of the teacher's features.

    Raises:
        ValueError: for an unknown kind, and for `none` with unequal widths.
    """
    if isinstance(kind, nn.Module):
        return copy.deepcopy(kind)  # each pair, and each trial of a search, starts from the weights as given
    build: Any = ADAPTERS.get(kind) if isinstance(kind, str) else None
    if build is None:
        raise ValueError(f"Unknown adapter {kind!r}.{did_you_mean(kind, ADAPTERS)} Use one of {', '.join(ADAPTERS)}, or pass an nn.Module.")
    return build(student_width, teacher_width)
