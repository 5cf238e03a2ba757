"""Ends a forward pass as soon as the last signal that was asked for has been seen."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor

from .signals import Signals


class AllSeen(Exception):
    """Raised inside a forward pass that has nothing left to give; its caller catches it."""


class Arrivals(dict):
    """What hooks have seen, by name. With `awaited`, the last of these names to be set raises [`AllSeen`].

    Args:
        awaited: the names to wait for; `None` never ends the pass.
    """

    def __init__(self, awaited: Iterable[Hashable] | None = None):
        super().__init__()
        self._awaited = None if awaited is None else set(awaited)

    def __setitem__(self, name: Hashable, value) -> None:
        super().__setitem__(name, value)
        if self._awaited is not None:
            self._awaited.discard(name)
            if not self._awaited:
                raise AllSeen


def same_signals(first: Signals, second: Signals) -> bool:
    """Whether two ways of reading one model on one batch gave the same tensors."""
    return all(_same(getattr(first, name), getattr(second, name)) for name in vars(first) if name != "logits")


def _same(first, second) -> bool:
    if isinstance(first, dict):
        return isinstance(second, dict) and first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, Tensor):
        return (
            isinstance(second, Tensor)
            and first.shape == second.shape
            and torch.allclose(first.float(), second.float(), rtol=1e-4, atol=1e-5, equal_nan=True)
        )
    return first is None and second is None or first == second
