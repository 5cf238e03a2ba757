"""Parts of a model by name, for freezing and for learning rates of their own."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from .anatomy import find_blocks, unwrap_peft


PARTS = "embeddings, blocks, blocks.0, blocks.0-2, blocks.-1, head, or a pattern of parameter names such as '*.bias'"


def names_of_part(model: nn.Module, part: str) -> list[str]:
    """Names of the parameters of one part of a model.

    `embeddings` is everything in front of the blocks, `blocks` all blocks, `blocks.2` one block (counted from 0, negative
    from the end), `blocks.0-2` the blocks 0, 1 and 2, and `head` everything behind the blocks (final norm, pooler, head). A
    weight that is tied to the embeddings belongs to them. Anything else is a shell pattern of parameter names.

    Raises:
        ValueError: when there is no such part, or no parameter matches the pattern.
    """
    names = [name for name, _ in model.named_parameters()]
    match = re.fullmatch(r"blocks(?:\.(-?\d+)(?:-(\d+))?)?", part)
    if part not in ("embeddings", "head") and not match:
        found = fnmatch.filter(names, part)
        if not found:
            raise ValueError(
                f"No parameter of {type(unwrap_peft(model)).__name__} matches {part!r}, so nothing would be changed. Use {PARTS}. Its "
                f"parameters are called {names[0]!r}, ..., {names[-1]!r}."
            )
        return found
    blocks = find_blocks(model)
    block_of = {id(p): k for k, module in enumerate(blocks.modules) for p in module.parameters()}
    inside = {name: block_of[id(p)] for name, p in model.named_parameters() if id(p) in block_of}
    if match:
        if match[1] is None:
            return list(inside)
        first = int(match[1]) + (blocks.depth if match[1].startswith("-") else 0)
        last = first if match[2] is None else int(match[2])
        if not 0 <= first <= last < blocks.depth:
            raise ValueError(
                f"{part!r} names blocks that {type(unwrap_peft(model)).__name__} does not have: it has blocks 0 to {blocks.depth - 1} "
                "(embeddings are not a block). Correct the numbers."
            )
        if blocks.shared:
            raise ValueError(
                f"The blocks of {type(unwrap_peft(model)).__name__} share their weights, so {part!r} is all of them: use 'blocks'."
            )
        return [name for name, k in inside.items() if first <= k <= last]
    start = next(i for i, name in enumerate(names) if name in inside)
    end = max(i for i, name in enumerate(names) if name in inside)
    found = names[:start] if part == "embeddings" else names[end + 1 :]
    if not found:
        raise ValueError(f"{type(unwrap_peft(model)).__name__} has no parameters in its {part}. Leave {part!r} out.")
    return found


def has_head(model: nn.Module) -> bool:
    """Whether a model has parameters behind its blocks."""
    inside = {id(p) for module in find_blocks(model).modules for p in module.parameters()}
    return id(list(model.parameters())[-1]) not in inside


def freeze_parts(model: nn.Module, parts: Iterable[str]) -> list[str]:
    """Takes the parameters of `parts` out of training and returns their names.

    Raises:
        ValueError: for parts that do not exist, and when nothing would be left to train.
    """
    frozen = {name for part in parts for name in names_of_part(model, part)}
    named = dict(model.named_parameters())
    if all(name in frozen or not p.requires_grad for name, p in named.items()):
        raise ValueError(f"frozen_parts {list(parts)} are the whole model: there is nothing left to train. Leave one part out.")
    for name in frozen:
        named[name].requires_grad_(False)
    return sorted(frozen)


def scale_learning_rates(optimizer, model: nn.Module, scales: Mapping[str, float]) -> None:
    """Gives the parameters of each part a group of their own with the learning rate times its scale.

    Where a parameter belongs to several parts, the one named last decides.

    Raises:
        ValueError: for parts that do not exist.
    """
    named = dict(model.named_parameters())
    scale_of = {id(named[name]): scale for part, scale in scales.items() for name in names_of_part(model, part)}
    for group in list(optimizer.param_groups):
        for scale in sorted({scale_of[id(p)] for p in group["params"] if id(p) in scale_of}):
            own = [p for p in group["params"] if scale_of.get(id(p)) == scale]
            group["params"] = [p for p in group["params"] if scale_of.get(id(p)) != scale]
            rest = {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr")}
            optimizer.add_param_group({**rest, "params": own, "lr": group["lr"] * scale})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def milestone_scheduler(optimizer: torch.optim.Optimizer, milestones: list[float], gamma: float, steps: int):
    """A learning rate scheduler that multiplies by `gamma` at each of `milestones`, shares of `steps` optimizer steps."""
    after = [round(share * steps) for share in milestones]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: gamma ** sum(step >= own for own in after))
