"""A term that has met its models: its losses, its layer pairs, its adapters, and what the two models have to compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from .counting import Unit, token_mask
from .models.adapters import SharedAdapter
from .models.layer_map import Pairs
from .pooling import pool_tokens
from .schedules import Schedule
from .signals import LAYERED_SIGNALS, STAGE_SIGNALS, Signals
from .terms import Term


class BoundTerm(nn.Module):
    """A `Term` that has met its models: loss built, layer map resolved, adapters made."""

    def __init__(self, term: Term, loss_name: str, loss: nn.Module, pairs: Pairs | None, reduction: str, schedules: dict[str, Schedule]):
        super().__init__()
        self.term, self.name, self.loss_name, self.signal = term, term.name, loss_name, term.loss_signal
        self.losses = nn.ModuleList([loss])  # one for all pairs, or one for each where it has parameters of its own
        self.pairs = pairs  # None: drawn anew each step
        self.depths = (0, 0)  # blocks or stages of student and teacher
        self.reduction = reduction
        self.pooling = "auto"  # for the record; the captures pool
        self.schedules = schedules
        self.adapters = nn.ModuleList()
        self.units: dict[tuple[int, int], Unit] = {}

    @property
    def loss(self) -> nn.Module:
        return self.losses[0]

    def loss_of(self, index: int) -> nn.Module:
        """The loss of pair `index`."""
        return self.losses[index if len(self.losses) > 1 else 0]

    @property
    def layered(self) -> bool:
        return self.signal in LAYERED_SIGNALS

    @property
    def joint(self) -> bool:
        """Whether the loss takes all pairs at once."""
        return not self.term.is_task and self.loss.joint

    def tensors(self, pair: tuple | None, student: Signals, teacher: Signals) -> tuple[Tensor, Tensor]:
        """What the two models have at `pair`."""
        name = "features" if self.signal in STAGE_SIGNALS else self.signal
        s, t = getattr(student, name), getattr(teacher, name)
        s, t = (s, t) if pair is None else (s[pair[0]], t[pair[1]])
        return (_full(s).mean((2, 3)), _full(t).mean((2, 3))) if self.signal == "pooled_features" else (s, t)

    @property
    def remembers(self) -> bool:
        """Whether it has no value but for training examples, which it remembers."""
        return not self.term.is_task and "example_ids" in self.loss.needs

    def token_masks(self, student: Signals, teacher: Signals, s: Tensor) -> Tensor | tuple[Tensor | None, Tensor | None]:
        """bool `(batch, length)` of the tokens that are real for both models; for losses on samples, of each model's own."""
        if self.loss.layout == "vectors":
            return student.attention_mask, teacher.attention_mask
        return token_mask(student, teacher, tuple(s.shape[:2]), s.device)

    def bring(self, index: int, s: Tensor, t: Tensor, mask) -> tuple[Tensor, Tensor, Tensor | None]:
        """Both sides of pair `index` in the layout of the loss, the student's through its adapter; `mask` as `token_masks` gives it."""
        # Outside autocast: an adapter in half precision would lose the small differences it is there to measure.
        with torch.autocast(s.device.type, enabled=False):
            s, t = self.project(index, _full(s)), t.to(s.device)
            layout = self.loss.layout
            if self.signal == "features":
                if (layout == "rows" or layout == "maps" and self.loss.same_size) and s.shape[-2:] != t.shape[-2:]:
                    size = tuple(min(sides) for sides in zip(s.shape[-2:], t.shape[-2:]))
                    s, t = adaptive_avg_pool2d(s, size), adaptive_avg_pool2d(_full(t), size)
                if layout == "rows":
                    s, t = s.flatten(2).transpose(1, 2), t.flatten(2).transpose(1, 2)
                elif layout == "vectors":
                    s, t = s.flatten(1), t.flatten(1)
            elif layout == "vectors" and s.dim() == 3:
                own, other = (None if one is None else one.to(s.device) for one in mask)
                s, t = pool_tokens(s, own, "mean"), pool_tokens(_full(t), other, "mean")
                real = [one.any(1) for one in (own, other) if one is not None]
                mask = torch.stack(real).all(0) if real else None
        return s, t, mask

    def project(self, index: int, tensor: Tensor) -> Tensor:
        """The student's features of pair `index` as the loss compares them: through the adapter, where there is one."""
        return self.adapters[index](tensor) if self.loss.compares_widths else tensor

    def describe(self) -> dict[str, Any]:
        """The term as resolved, in plain JSON types."""
        options = {k: _short(v) for k, v in self.term.options.items() if not isinstance(v, (Schedule, Mapping))}
        options |= {k: _plain(v) for k, v in self.schedules.items()}
        text = {"name": self.name, "loss": self.loss_name, "weight": _plain(self.term.weight), "signal": self.signal, **options}
        if self.layered:
            text |= {
                "layer_map": "random" if self.pairs is None else [list(pair) for pair in self.pairs],
                "layer_reduction": self.reduction,
            }
        if self.signal == "pooled":
            text["pooling"] = self.pooling
        own = sum(p.numel() for p in self.losses.parameters())
        if own:
            text["own_parameters"] = own
        if any(isinstance(adapter, SharedAdapter) or any(True for _ in adapter.parameters()) for adapter in self.adapters):
            text["adapter"] = [type(adapter).__name__ for adapter in self.adapters]
        return text


def _short(value: Any) -> Any:
    """An option for the record: a label for every example is counted, not copied."""
    long = isinstance(value, Tensor) or isinstance(value, (list, tuple)) and len(value) > 32
    return f"{len(value)} values" if long else value


def _plain(schedule: Schedule) -> float | dict:
    return schedule.start if schedule.type == "constant" else schedule.as_dict()


def _full(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
