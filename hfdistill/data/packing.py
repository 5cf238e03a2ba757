"""Several sequences in one row instead of padding."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..counting import EXAMPLE_ID, SEQUENCE_IDS
from .masking import IGNORED, CausalCollator


class PackingCollator:
    """Lays the sequences of a training batch into as few rows as possible, where the models read each of them as if it were alone.

    The wrapped collator makes a padded batch, and its real tokens are laid out anew: first-fit decreasing, the longest sequence first
    and, of equals, the earlier one, each into the first row that has room. No token of one sequence sees another (a block-diagonal
    attention mask), and positions begin anew in each, which [`DistillationTrainer`] sees to from `sequence_ids`. So loss and
    gradient are those of the padded batch, at the cost of fewer rows. It is for losses on tokens: models of whole sequences, and
    losses that compare samples or tokens of a row with each other, are refused.

    The collator itself pads, as is right for evaluation, where each row is one example. [`for_training`] gives the one that packs,
    and [`DistillationTrainer`] asks for it. What is packed is the batch of one device: `per_device_train_batch_size` remains the
    number of sequences, and the larger it is the fuller rows get.

    Args:
        collator: makes batches of `input_ids` with per-token columns alone, such as [`MaskingCollator`], [`CausalCollator`] or
            [`TokenCollator`].
        max_length (`int`, *optional*): tokens of a row. Default: those of the longest sequence of the batch.
        causal (`bool`, *optional*): for models that predict the next token: the first token of a sequence is no target, since the
            token before it belongs to another one. Default: whether `collator` is a [`CausalCollator`].
        pad_to_multiple_of (`int`, *optional*): row lengths are multiples of it.

    Shapes:
        rows: as `collator` takes them.
        returns: in training, `(rows, length)` columns of `collator` without `attention_mask`, and `sequence_ids`, 1, 2, ... in each
            row and 0 where there is padding.

    Raises:
        ValueError: for columns that are not per token, and sequences longer than `max_length`.

    Example:
        >>> def pad(rows):
        ...     return {"input_ids": torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0], [9, 9, 0, 0]]), "attention_mask": torch.tensor(
        ...         [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]])}
        >>> batch = PackingCollator(pad).for_training()([{}, {}, {}])
        >>> batch["input_ids"].tolist(), batch["sequence_ids"].tolist()
        ([[5, 6, 7, 8], [5, 6, 9, 9]], [[1, 1, 1, 1], [1, 1, 2, 2]])
    """

    def __init__(self, collator, max_length: int | None = None, causal: bool | None = None, pad_to_multiple_of: int | None = None):
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}: no token fits into such rows. Leave it out.")
        self.collator, self.max_length, self.pad_to_multiple_of = collator, max_length, pad_to_multiple_of
        self.causal = isinstance(collator, CausalCollator) if causal is None else causal
        self.training = False
        self._for_training: PackingCollator | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """What the wrapped collator reads beside the inputs of models."""
        return tuple(getattr(self.collator, "columns", ()))

    def set_epoch(self, epoch: int) -> None:
        """Tells the wrapped collator the epoch, where it asks."""
        if hasattr(self.collator, "set_epoch"):
            self.collator.set_epoch(epoch)

    def for_training(self) -> PackingCollator:
        """The collator of training batches, always the same one: it packs."""
        if self.training:
            return self
        if self._for_training is None:
            self._for_training = copy.copy(self)
            self._for_training.training = True
        return self._for_training

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = dict(self.collator(rows))
        return self.pack(batch) if self.training else batch

    def pack(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A padded batch laid out anew; padding may be on either side."""
        columns = {name: value for name, value in batch.items() if name not in ("attention_mask", EXAMPLE_ID)}
        shape = batch["input_ids"].shape
        wrong = [name for name, value in columns.items() if not isinstance(value, Tensor) or value.shape != shape]
        if wrong or len(shape) != 2:
            raise ValueError(
                f"The column {(wrong or ['input_ids'])[0]!r} does not have one value for each token {tuple(shape)}, so it could not follow "
                "the tokens into packed rows. Packing is for losses on tokens: leave it out for models of whole sequences and spans, and "
                "remove columns that nobody reads."
            )
        mask = batch.get("attention_mask")
        mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool()
        lengths = mask.sum(1).tolist()
        limit = self.max_length or max(lengths)
        if max(lengths) > limit:
            raise ValueError(
                f"A sequence has {max(lengths)} tokens, which do not fit into rows of max_length={limit}. Cut texts to at most that many "
                "when they are tokenised, or raise max_length."
            )
        plan = first_fit(lengths, limit)
        longest = max(sum(lengths[i] for i in row) for row in plan)
        multiple = self.pad_to_multiple_of or 1
        longest = -(-longest // multiple) * multiple
        places = mask.flatten().nonzero().squeeze(1).split(lengths)  # of the tokens of each sequence in the padded batch
        source = torch.full((len(plan), longest), -1)
        sequence_ids = torch.zeros_like(source)
        begins = torch.zeros_like(source, dtype=torch.bool)
        for row, sequences in enumerate(plan):
            end = 0
            for number, sequence in enumerate(sequences, 1):
                start, end = end, end + lengths[sequence]
                source[row, start:end], sequence_ids[row, start:end] = places[sequence], number
                begins[row, start : start + 1] = True
        padding = source < 0
        packed = {
            name: value.flatten()[source.clamp(min=0)].masked_fill(padding, self._fill(name)) for name, value in columns.items()
        }
        if self.causal:
            for name, nothing in (("labels", IGNORED), ("target_mask", 0)):
                if name in packed:
                    packed[name] = packed[name].masked_fill(begins, nothing)
        return {**packed, SEQUENCE_IDS: sequence_ids}

    def _fill(self, column: str) -> int:
        if column == "input_ids":
            tokenizer = getattr(self.collator, "tokenizer", None)
            known = getattr(self.collator, "pad_token_id", None) if tokenizer is None else tokenizer.pad_token_id
            return known or 0
        return IGNORED if column == "labels" else 0


def first_fit(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Rows of at most `limit` tokens: the longest sequence first, each into the first row that has room; empty sequences are left out.

    Example:
        >>> first_fit([2, 5, 3, 4], 7)
        [[1, 0], [3, 2]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not lengths[i]:
            continue
        row = next((row for row, free in enumerate(room) if free >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(limit)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows
