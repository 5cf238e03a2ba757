"""What to fetch from a model: the signals of which blocks and stages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from .signals import LAYERED_SIGNALS


TEACHER_PREFIX = "teacher_"
"""Columns with this prefix are what the teacher gets instead of those without it, such as images in its own normalisation."""


@dataclass(frozen=True)
class CapturePlan:
    """What to fetch. Blocks and stages count from 0, a stage may be the name of a module; nothing else is retained."""

    logits: bool = True
    embeddings: bool = False
    pooled: bool = False
    hidden_states: frozenset[int] = frozenset()
    features: frozenset[int | str] = frozenset()
    attention_scores: frozenset[int] = frozenset()
    queries: frozenset[int] = frozenset()
    keys: frozenset[int] = frozenset()
    values: frozenset[int] = frozenset()

    def union(self, other: CapturePlan) -> CapturePlan:
        return CapturePlan(**{f.name: getattr(self, f.name) | getattr(other, f.name) for f in fields(self)})

    def blocks_of(self, signals: Iterable[str]) -> frozenset[int]:
        """Blocks that one of these layered signals is wanted from."""
        return frozenset().union(*(getattr(self, signal) for signal in signals))


def plan_for(pairs: Iterable[tuple[str, Iterable[int]]]) -> CapturePlan:
    """The union of `(signal, blocks)` needs."""
    plan = CapturePlan(logits=False)
    for signal, blocks in pairs:
        signal = "features" if signal == "pooled_features" else signal
        value = frozenset(blocks) if signal in LAYERED_SIGNALS else True
        plan = plan.union(CapturePlan(**{"logits": False, signal: value}))
    return plan
