"""Sums of loss parts between two log lines: kept on the device, one reduction and one transfer per line."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .objective import Part


class TrainingParts:
    """Averages of loss parts over optimizer steps.

    Parts come divided by the count of their window, so their sum over micro-batches and ranks is the value of the step,
    and the weighted ones add up to the logged loss.
    """

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}
        self._all_steps = 0

    def begin_step(self, names: Iterable[str]) -> None:
        self._all_steps += 1
        for name in names:
            self._steps[name] = self._steps.get(name, 0) + 1

    def add(self, parts: list[Part]) -> None:
        for part in parts:
            value = part.value.detach()
            self._sums[part.name] = self._sums.get(part.name, 0) + torch.stack([value, part.weight * value])

    def collect(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """`{name: unweighted, name_weighted: weighted}`, and starts anew. Every rank must call it at the same step."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        table = reduce(torch.stack([self._sums[name] for name in names])).tolist()
        values = {}
        for name, (value, weighted) in zip(names, table):
            # Over the steps in which the term had a weight, and over all of them, as the loss is.
            values[name], values[f"{name}_weighted"] = value / self._steps[name], weighted / self._all_steps
        self._sums, self._steps, self._all_steps = {}, {}, 0
        return values


class EvaluationParts:
    """Exact means of loss parts over a data set: sums and row counts, divided once at the end."""

    def __init__(self):
        self._parts: dict[str, tuple[float, str, Tensor]] = {}

    def add(self, name: str, weight: float, totals: Tensor, counts: Tensor, reduction: str = "mean") -> None:
        """Adds one batch; `totals` and `counts` have one entry per mapped pair."""
        sums = torch.stack([totals.float(), counts.float()])
        sums = sums if sums.device.type == "mps" else sums.double()  # MPS has no float64
        before = self._parts[name][2] if name in self._parts else 0
        self._parts[name] = (weight, reduction, before + sums)

    def collect(self, reduce: Callable[[Tensor], Tensor]) -> tuple[float, dict[str, float]] | None:
        """The weighted sum and every part, or `None` where nothing was added; starts anew."""
        if not self._parts:
            return None
        loss, values = 0.0, {}
        for name, (weight, reduction, sums) in sorted(self._parts.items()):
            totals, counts = reduce(sums)
            means = totals / counts.clamp(min=1)
            values[name] = float(means.sum() if reduction == "sum" else means.mean())
            loss += weight * values[name]
        self._parts = {}
        return loss, values
