"""What goes into a model and what comes out, whatever the model: batches on its device, an example batch, logits."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .models.anatomy import unwrap_peft


def move_to(inputs: Mapping, model: nn.Module) -> dict:
    """`inputs` on the device of `model`, floats (images) in the dtype of its weights."""
    parameter = next(itertools.chain(model.parameters(), model.buffers()), None)
    if parameter is None:
        return dict(inputs)
    return {
        key: value.to(device=parameter.device, dtype=parameter.dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for key, value in inputs.items()
    }


_IMAGE_SIZE = 224


class NoLogitsError(ValueError):
    """The output of a model has no logits."""


def logits_of(output, name: str = "model") -> Tensor:
    """Logits from a `ModelOutput`, a dict, a tuple or a bare tensor; start and end logits are stacked to `(batch, 2, length)`."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "start_logits" in output and "end_logits" in output:
        return torch.stack([output["start_logits"], output["end_logits"]], dim=1)
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    keys = list(output) if isinstance(output, Mapping) else type(output).__name__
    raise NoLogitsError(
        f"The {name} returned no logits, only {keys}, so neither hard labels nor a teacher's logits can be compared with them. Use a "
        "model with a head (AutoModelFor...), or return a dict with 'logits'. For a base model set task_weight, kd_weight and "
        "logit_mse_weight to 0 and compare hidden states, embeddings, attention, or Term('hidden_mse', signal='pooled')."
    )


def example_batch(model: nn.Module, rows: int = 2, length: int = 6) -> dict[str, Tensor]:
    """A tiny batch that `model` accepts, from its config alone: token ids or images.

    Raises:
        ValueError: when the model takes neither; the trainer then needs a dataset to take an example from.
    """
    inner = unwrap_peft(model)
    config = getattr(inner, "config", None)
    device = next(inner.parameters()).device
    main = getattr(inner, "main_input_name", None)
    if config is not None and main == "pixel_values":
        size = getattr(config, "image_size", None) or _IMAGE_SIZE  # convolutional networks take any
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.zeros(rows, getattr(config, "num_channels", 3), height, width, device=device)}
    if config is not None and main == "input_ids":
        # Ids that are neither padding nor past the table: RoBERTa counts positions from the padding id, and classifiers of
        # decoder families look for the last token that is not padding.
        padding = getattr(config, "pad_token_id", None)
        token = next(i for i in (3, 2, 1, 0) if i != padding and i < config.vocab_size)
        ids = torch.full((rows, length), token, device=device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    raise ValueError(
        f"{type(inner).__name__} takes neither input_ids nor pixel_values, so no example batch can be made for it. "
        "Pass a train_dataset, from which an example is taken."
    )
