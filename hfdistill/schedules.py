"""Weights and temperatures as functions of training progress, a number in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .suggest import did_you_mean


# How far the value has moved from start to end, given the share of `over` that has passed; both in [0, 1].
SHAPES = {
    "constant": lambda share: 0.0,
    "linear": lambda share: share,
    "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2,
    "step": lambda share: float(share >= 1),
}


@dataclass(frozen=True)
class Schedule:
    """A number that may change while training runs.

    Formula: `start * (1 - m) + end * m`, where `share = (progress - over[0]) / (over[1] - over[0])` cut to [0, 1] and
    `m` is `share` for `linear`, `(1 - cos(pi * share)) / 2` for `cosine` (half a period, the annealing of
    https://arxiv.org/abs/1608.03983), 0 until `over[1]` is reached and then 1 for `step`, and 0 for `constant`.

    It depends on progress alone, so a resumed run continues where it stopped; it is frozen, so the number that the
    user wrote stays what the user wrote.

    Args:
        type: `"constant"`, `"linear"`, `"cosine"` or `"step"`.
        start: the value before `over[0]`.
        end: the value after `over[1]`; left out, or equal to `start`, for a constant.
        over: the share of training in which the value moves, as `(first, last)` with `0 <= first < last <= 1`.

    Raises:
        ValueError: for an unknown type, a value that is not a finite number, an `over` that is not an increasing pair
            inside [0, 1], and a constant whose `end` differs from its `start`.

    Example:

    ```python
    >>> from hfdistill.schedules import Schedule
    >>> warmup = Schedule("linear", start=0.0, end=2.0, over=(0.0, 0.5))
    >>> warmup(0.0), warmup(0.25), warmup(0.5), warmup(1.0)
    (0.0, 1.0, 2.0, 2.0)
    ```
    """

    type: str = "constant"
    start: float | None = None
    end: float | None = None
    over: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        if self.type not in SHAPES:
            raise ValueError(f"unknown schedule type {self.type!r}.{did_you_mean(self.type, SHAPES)} Known: {', '.join(SHAPES)}")
        start = _finite(self.start, "start", self.type)
        end = start if self.type == "constant" and self.end is None else _finite(self.end, "end", self.type)
        if self.type == "constant" and end != start:
            raise ValueError(
                f"a constant schedule cannot go from start={start:g} to end={end:g}: it would stay at {start:g}. "
                "Use type 'linear', 'cosine' or 'step', or leave `end` out"
            )
        for name, value in (("start", start), ("end", end), ("over", _span(self.over))):
            object.__setattr__(self, name, value)

    def __call__(self, progress: float) -> float:
        """The value at `progress`, the share of training done, in [0, 1]."""
        if not 0 <= progress <= 1:
            raise ValueError(f"progress={progress} is outside [0, 1]: pass the share of training done, for example step / max_steps")
        first, last = self.over
        moved = SHAPES[self.type](min(1.0, max(0.0, (progress - first) / (last - first))))
        return self.start * (1 - moved) + self.end * moved  # exact at both ends, unlike start + (end - start) * moved

    @property
    def minimum(self) -> float:
        """The smallest value of the whole run."""
        return min(self.start, self.end)

    @property
    def maximum(self) -> float:
        """The largest value of the whole run."""
        return max(self.start, self.end)

    def as_dict(self) -> dict[str, Any]:
        """The four fields with lists for tuples, ready for JSON; `resolve_schedule` reads it back."""
        return {**asdict(self), "over": list(self.over)}


def resolve_schedule(value: float | Mapping[str, Any] | Schedule, default: float | None = None) -> Schedule:
    """Turn what a user may write into a checked `Schedule`.

    Args:
        value: a number (a constant), a `Schedule` (passed through), or a dict with any of the keys `type`, `start`,
            `end`, `over`. In a dict `type` is `"linear"` unless given, and a missing `start` or `end` is `default`.
        default: the user's own number for this weight or temperature, say `kd_weight`.

    Raises:
        ValueError: for an unknown key or type, numbers that are not finite, and an end that neither the dict nor
            `default` gives.

    Example:

    ```python
    >>> from hfdistill.schedules import resolve_schedule
    >>> resolve_schedule({"type": "cosine", "start": 0.0}, default=0.5)
    Schedule(type='cosine', start=0.0, end=0.5, over=(0.0, 1.0))
    >>> resolve_schedule(2.0)(0.3)
    2.0
    ```
    """
    if isinstance(value, Schedule):
        return value
    if not isinstance(value, Mapping):
        return Schedule("constant", _finite(value, "value", "constant"))
    keys = Schedule.__dataclass_fields__
    for key in value:
        if key not in keys:
            raise ValueError(f"unknown key {key!r} in a schedule.{did_you_mean(key, keys)} Known: {', '.join(keys)}")
    filled = {"type": "linear", "start": default, "end": default, **{k: v for k, v in value.items() if v is not None}}
    if filled["type"] == "constant" and value.get("end") is None:
        filled["end"] = None
    return Schedule(**filled)


def _finite(value: Any, name: str, kind: str) -> float:
    if value is None:
        raise ValueError(f"a {kind} schedule has no `{name}`, so its value is unknown. Give `{name}`, or the plain number it schedules")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"schedule {name}={value!r} is not a finite number, and the loss would not be either. Give a number such as 0.5")
    return float(value)


def _span(over: Any) -> tuple[float, float]:
    try:
        first, last = (_finite(edge, "over", "") for edge in over)
    except (TypeError, ValueError):
        first, last = 1.0, 0.0
    if not 0 <= first < last <= 1:
        raise ValueError(f"schedule over={over!r} is not an increasing pair inside [0, 1]. Give shares of training such as (0.0, 0.5)")
    return first, last
