"""Several sequences in one row: what a model has to be given so that it reads each of them as if it were alone."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


_BOOLEAN_MASKS = ("sdpa", "hfdistill_sdpa")
"""Attention implementations that take a bool mask, True at the pairs that may look at each other. `eager` adds its mask to the scores."""


def packed_positions(sequence_ids: Tensor) -> Tensor:
    """Position of each token in its own sequence, from 0 on; padding counts as one more sequence.

    Shapes:
        sequence_ids: integer `(rows, length)`; returns the same.

    Example:
        >>> packed_positions(torch.tensor([[1, 1, 1, 2, 2, 0]])).tolist()
        [[0, 1, 2, 0, 1, 0]]
    """
    index = torch.arange(sequence_ids.size(1), device=sequence_ids.device).expand_as(sequence_ids)
    begins = torch.ones_like(sequence_ids, dtype=torch.bool)
    begins[:, 1:] = sequence_ids[:, 1:] != sequence_ids[:, :-1]
    return index - torch.where(begins, index, 0).cummax(1).values


class PackedInputs:
    """Gives a model `position_ids` and an `attention_mask` of blocks, in the form that its attention takes.

    The mask is block-diagonal, `(rows, 1, length, length)`; padding sees padding, so that no row of it is empty. Causal models with
    windows get none: Transformers makes theirs itself, from positions that begin anew, but has to wait for the device to look at them.

    Args:
        model (`PreTrainedModel`): the bare model.
        causal (`bool`): whether positions see earlier ones only.

    Raises:
        ValueError: for models whose `forward` takes no positions, and when called, for an attention implementation that takes no mask
            of blocks.
    """

    def __init__(self, model: nn.Module, causal: bool):
        self.model, self.causal = model, causal
        known = inspect.signature(model.forward).parameters
        if not isinstance(model, PreTrainedModel) or "position_ids" not in known:
            raise ValueError(
                f"{type(model).__name__} takes no position_ids, so in a packed row all sequences but the first would stand at wrong "
                "positions. Leave packing out; train_sampling_strategy='group_by_length' saves padding too."
            )
        config = model.config
        kinds = set(getattr(config, "layer_types", None) or ())
        self.sliding = "sliding_attention" in kinds
        windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        self.finds_blocks = causal and (bool(kinds - {"full_attention"}) if kinds else any(windows))
        # With a cache Transformers does not look for sequences in the positions.
        self.options = {"use_cache": False} if causal and "use_cache" in known else {}
        embeddings = [m for name, m in model.named_modules() if name.endswith("position_embeddings") and isinstance(m, nn.Embedding)]
        # Those of RoBERTa and its kin begin behind the position of padding.
        self.first = embeddings[0].padding_idx + 1 if embeddings and embeddings[0].padding_idx is not None else 0

    def __call__(self, sequence_ids: Tensor) -> dict[str, Any]:
        """
        Shapes:
            sequence_ids: integer `(rows, length)`, 0 where there is padding.
        """
        config = self.model.config
        implementation = config._attn_implementation
        if implementation not in (*_BOOLEAN_MASKS, "eager"):
            raise ValueError(
                f"Packed rows need an attention with a mask of blocks, and {type(self.model).__name__} runs {implementation!r}. Load it "
                "with attn_implementation='sdpa', or leave packing out."
            )
        inputs = {"position_ids": packed_positions(sequence_ids) + self.first, **self.options}
        if self.finds_blocks:
            return inputs
        allowed = (sequence_ids[:, :, None] == sequence_ids[:, None])[:, None]
        allowed = allowed.tril() if self.causal else allowed
        masks = {"full_attention": allowed}
        if self.sliding:  # ModernBERT
            index = torch.arange(sequence_ids.size(1), device=sequence_ids.device)
            masks["sliding_attention"] = allowed & ((index[:, None] - index[None]).abs() <= config.sliding_window)
        if implementation == "eager":
            dtype = self.model.dtype
            masks = {name: torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min) for name, mask in masks.items()}
        return {**inputs, "attention_mask": masks if self.sliding else masks["full_attention"]}
