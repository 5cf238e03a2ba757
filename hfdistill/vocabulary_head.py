"""Runs the head of a language model at chosen positions only, or stops in front of its vocabulary.

A head projects every position onto the whole vocabulary, but a loss lives on a few: the masked ones, the real tokens. Two places are
hooked, and a comparison with the plain forward pass decides which of them is right for a model: the output of its base model, so
that everything behind it sees the chosen rows alone, or (where something behind it needs all positions) the input of its output
embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .models.anatomy import text_config
from .signals import Projection


_FAR = 300.0
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_SCALES, _DIVISORS = ("logit_scale", "lm_head_multiplier"), ("logits_scaling",)
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class VocabularyHead:
    """The way from hidden states to logits of one language model.

    Args:
        model (`nn.Module`): a `PreTrainedModel` (without its PEFT or DDP wrapper).

    Attributes:
        place (`str` or `None`): where rows are chosen: `base`, `embedding`, or nowhere.
        scale, softcap: what is done to the logits behind the output embedding.
        projects (`bool`): whether the logits are nothing but that, so that a loss may make them itself.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.place: str | None = None
        self.scale, self.softcap, self.projects = 1.0, None, False

    @property
    def embedding(self) -> nn.Module | None:
        """The output embedding; looked up anew, since resizing the vocabulary replaces it."""
        return self.model.get_output_embeddings()

    def understand(self, run: Callable[[], Tensor], shape: tuple[int, int]) -> None:
        """Finds out where rows can be chosen and whether logits are a plain projection.

        Args:
            run: runs the model on an example, without a graph and in eval mode, and returns what it gives as logits.
            shape: batch and length of that example.
        """
        self.place, self.scale, self.softcap, self.projects = None, 1.0, None, False
        logits = _attempt(run) if isinstance(self.embedding, nn.Module) else None
        if logits is None or tuple(logits.shape[:2]) != shape:
            return
        rows = torch.arange(0, shape[0] * shape[1], 2, device=logits.device)
        expected = logits.flatten(0, 1)[rows]
        for place in ("base", "embedding"):
            if place == "base" and getattr(self.model, "base_model", self.model) is self.model:
                continue
            self.place = place
            if _equal(_attempt(lambda: self.run(run, shape, rows, project=True)[0]), expected):
                break
        else:
            self.place = None
            return
        if not _is_plain_linear(self.embedding):
            return
        # Caps show at logits far above any of them; small ones, and bf16, would hide them.
        factor = _FAR / max(float(expected.abs().max()), 1e-6)
        large = _attempt(lambda: self.run(run, shape, rows, project=True, factor=factor)[0])
        projection = _attempt(lambda: self.run(run, shape, rows, project=False)[1])
        if large is None or projection is None:
            return
        for scale, softcap in _ways_to_the_logits(self.model):
            own = replace(projection, scale=scale, softcap=softcap)
            if _equal(own.logits(), expected) and _equal(replace(own, features=own.features * factor).logits(), large):
                self.scale, self.softcap, self.projects = scale, softcap, True
                return

    def run(
        self, run: Callable[[], Tensor], shape: tuple[int, int], rows: Tensor, project: bool, factor: float = 1.0
    ) -> tuple[Tensor, Projection | None]:
        """`run()` with the head at `rows` alone.

        Args:
            run: runs the model and returns its logits.
            shape: batch and length of its input.
            rows: integer `(rows,)`, positions in the flattened `(batch * length)`.
            project: whether the vocabulary is projected.
            factor: of the input of the output embedding, to try it out.

        Returns:
            The logits `(rows, vocabulary)`, and `None`; without `project` those of no row, and a [`Projection`].
        """
        kept: dict[str, Tensor] = {}

        @torch.compiler.disable  # a compiled model would be compiled anew for every shape
        def select(states: Tensor) -> Tensor:
            if tuple(states.shape[:2]) != shape:
                raise ValueError(f"hidden states of shape {tuple(states.shape)} for {shape} positions")
            return states.flatten(0, 1).index_select(0, rows.to(states.device)).unsqueeze(0)

        def after_base(_module, _args, output):
            if isinstance(output, Tensor):
                return select(output)
            if isinstance(output, tuple):
                return (select(output[0]), *output[1:])
            return type(output)(**{**output, "last_hidden_state": select(output["last_hidden_state"])})

        def before_embedding(_module, args):
            states = select(args[0]) if self.place == "embedding" else args[0]
            if project:
                return (states if factor == 1.0 else states * factor, *args[1:])
            if torch.is_autocast_enabled(states.device.type) and states.dtype != torch.float64:  # as it would for the matrix product
                states = states.to(torch.get_autocast_dtype(states.device.type))
            kept["features"] = states
            return (args[0][:, :0] if self.place == "base" else args[0].flatten(0, 1)[:0].unsqueeze(0), *args[1:])

        with ExitStack() as hooks:
            if self.place == "base":
                hooks.callback(self.model.base_model.register_forward_hook(after_base).remove)
            if self.place == "embedding" or not project or factor != 1.0:
                hooks.callback(self.embedding.register_forward_pre_hook(before_embedding).remove)
            logits = run()
        if project:
            return logits.squeeze(0), None
        projection = Projection(kept["features"].squeeze(0), self.embedding.weight, self.embedding.bias, self.scale, self.softcap)
        return logits.squeeze(0), projection


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether it does nothing but a linear map with its own weight: no adapter, no quantisation, no parametrisation."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and type(module.weight) is nn.Parameter and not hooks


def _ways_to_the_logits(model: nn.Module) -> list[tuple[float, float | None]]:
    """`(scale, softcap)` that a config may stand for; constants only. What it names comes first."""
    config = text_config(model.config)
    named = {name: getattr(config, name, None) for name in (*_CAPS, *_SCALES, *_DIVISORS)}
    named = {name: float(value) for name, value in named.items() if isinstance(value, (int, float)) and value > 0}
    caps = [named[name] for name in _CAPS if name in named]
    scales = [named[name] for name in _SCALES if name in named] + [1 / named[name] for name in _DIVISORS if name in named]
    return [(scale, cap) for scale in [*scales, 1.0] for cap in [*caps, None]]


def _attempt(function: Callable[[], Any]) -> Any:
    """What it returns, or `None` where a model does not bear the hooks; too little memory is no answer."""
    try:
        return function()
    except torch.OutOfMemoryError:
        raise
    except Exception:  # an experiment with a model of which nothing is known
        return None


def _equal(seen: Tensor | None, expected: Tensor) -> bool:
    if seen is None or seen.shape != expected.shape:
        return False
    tolerance = _TOLERANCE.get(expected.dtype, 5e-2) * max(float(expected.abs().max()), 1e-6)
    return bool((seen.to(expected.dtype) - expected).abs().max() <= tolerance)
