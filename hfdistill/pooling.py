"""One vector a sample from token vectors: the mean, the first or the last real token."""

from __future__ import annotations

import torch
from torch import Tensor


POOLINGS = ("auto", "mean", "cls", "last")
"""Choices of the knob `pooling`; `auto` is a choice of the model, the others are those of [`pool_tokens`]."""


def pool_tokens(states: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """Pools token vectors over real tokens, whichever side the padding is on.

    Half precision is summed in fp32, and the mean stays in fp32. A row without a real token has a mean of 0.

    Shapes:
        states: `(batch, length, width)`.
        mask: bool `(batch, length)`, True at real tokens; `None` when every position is real.
        returns: `(batch, width)`.

    Args:
        pooling: `mean`, `cls` (the first real token) or `last` (the last real token).

    Raises:
        ValueError: for another pooling.

    Example:
        >>> states = torch.tensor([[[1.0], [2.0], [9.0]]])
        >>> mask = torch.tensor([[True, True, False]])
        >>> [pool_tokens(states, mask, pooling).item() for pooling in ("mean", "cls", "last")]
        [1.5, 1.0, 2.0]
    """
    if pooling not in POOLINGS[1:]:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS[1:])}, got {pooling!r}.")
    if mask is None:
        mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    if pooling == "mean":
        states = states.float() if states.dtype in (torch.float16, torch.bfloat16) else states
        real = torch.where(mask.unsqueeze(-1), states, 0)  # not by multiplication: 0 * NaN is NaN
        return real.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    position = torch.arange(mask.size(1), device=mask.device)
    # argmax takes the first of equals: the first real token; positions grow, so the last one has the largest.
    index = mask.int().argmax(-1) if pooling == "cls" else (mask * position).argmax(-1)
    return states[torch.arange(states.size(0), device=states.device), index]
