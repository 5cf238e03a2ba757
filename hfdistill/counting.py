"""How many rows of each kind a batch holds, so that a term can be divided by the count of the whole accumulation window.

A mean per micro-batch makes the gradient depend on how the batch was cut. Here each term keeps its sum, and the counts of
all micro-batches and all ranks are known before the first forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .signals import Signals


TARGET_MASK = "target_mask"
"""Column of 0 and 1, `(batch, length)`: positions that carry logit terms whether they have a label or not, such as first sub-tokens."""
SOFT_LABELS = "soft_labels"
"""Column `(batch, classes)` of shares of the classes, as mixup and cutmix make them; rows count where `labels` is not -100."""
EXAMPLE_ID = "example_id"
"""Column `(batch,)`: the number of each training example, for losses that remember examples."""
SEQUENCE_IDS = "sequence_ids"
"""Column `(rows, length)` of packed batches, see [`PackingCollator`]: which of the row's sequences (1, 2, ...) a token belongs to, 0 where
there is padding. It stands in for `attention_mask`."""
SPAN_COLUMNS = ("start_positions", "end_positions")
LABEL_COLUMNS = ("labels", "label", "label_ids", *SPAN_COLUMNS)
"""Columns that hold hard labels: models are never given them, since the loss is ours."""


class Unit(NamedTuple):
    """A kind of row.

    kind: `samples` (rows of the batch), `sequences` (those with at least one real token), `labels` (targets that are not
    missing), `tokens` (real tokens), `next_tokens` (real tokens that have a predecessor: the targets of a causal model),
    `pairs` (query-key pairs) or `spans` (two, start and end, for each sample that has a real token), `marked` (real tokens
    that `target_mask` marks), or `partners` (rows whose label another row of the micro-batch has too).
    """

    kind: str
    causal: bool = False
    window: int | None = None

    def intersect(self, other: Unit) -> Unit:
        """Pairs that both attention patterns allow."""
        windows = [w for w in (self.window, other.window) if w is not None]
        return Unit("pairs", self.causal or other.causal, min(windows, default=None))


def labels_of(batch: Mapping) -> Tensor | None:
    """Hard labels as the batch has them; start and end positions of spans are stacked to `(batch, 2)`."""
    spans = [batch.get(name) for name in SPAN_COLUMNS]
    if all(isinstance(positions, Tensor) for positions in spans):
        return torch.stack([positions.reshape(positions.size(0), -1)[:, 0] for positions in spans], dim=1)
    for name in ("labels", "label", "label_ids"):
        if isinstance(batch.get(name), Tensor):
            return batch[name]
    return None


def valid_labels(labels: Tensor, task: str, problem_type: str | None) -> Tensor:
    """bool: targets that are present. -100 is missing; NaN too, for regression. Causal labels are shifted by one."""
    if task == "causal_lm":
        return labels[..., 1:] != -100
    if task in ("token", "masked_lm", "question_answering"):
        return labels != -100
    if problem_type == "regression":
        present = ~torch.isnan(labels.float())
    else:
        present = labels != -100
    return present.flatten(1).any(-1) if present.dim() > 1 else present


def has_partner(labels: Tensor) -> Tensor:
    """bool `(batch,)`: rows whose label another row of the batch has too; -100 is no label."""
    return (labels != -100) & ((labels[:, None] == labels[None]).sum(1) > 1)


def span_labels(positions: Tensor, tokens: Tensor | None) -> Tensor:
    """Start and end positions with -100 wherever they point at no real token, so that cutting and padding change nothing.

    Transformers gives answers outside the window a position at (or past) its length, and a longer padding would make that a
    position of the batch.

    Shapes:
        positions: integer `(batch, 2)`, any number that is no position (-100, the length, ...) where the answer is missing.
        tokens: bool `(batch, length)`, True at real tokens; `None` leaves the positions as they are.
    """
    if tokens is None:
        return positions
    length = tokens.size(1)
    real = tokens.gather(1, positions.long().clamp(0, length - 1)) & (positions >= 0) & (positions < length)
    return torch.where(real, positions, -100)


def real_tokens(batch: Mapping) -> Tensor | None:
    """bool `(batch, length)`: tokens that are no padding; `None` where the batch does not say, as for images and texts of one length."""
    for name in (SEQUENCE_IDS, "attention_mask"):
        mask = batch.get(name)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return mask > 0
    return None


def marked_targets(batch: Mapping) -> Tensor | None:
    """bool `(batch, length)`: real tokens that the column `target_mask` marks (above 0); `None` where the batch has no such column."""
    marks, tokens = batch.get(TARGET_MASK), real_tokens(batch)
    if not isinstance(marks, Tensor):
        return None
    return marks > 0 if tokens is None else (marks > 0) & tokens


def count_pairs(tokens: Tensor, causal: bool, window: int | None, sequences: Tensor | None = None) -> Tensor:
    """Pairs of real tokens that attention allows, from the padding mask alone.

    Args:
        tokens: bool `(batch, length)`.
        causal: a query sees no later key.
        window: a query sees keys at a distance below `window`; `None` for all.
        sequences: integer `(batch, length)`, the sequence of each token where a row holds several, which do not see each other.
    """
    if sequences is not None:
        position = torch.arange(tokens.size(1), device=tokens.device)
        distance = position[:, None] - position[None]
        seen = (distance >= 0) if causal else torch.ones_like(distance, dtype=torch.bool)
        seen = seen if window is None else seen & (distance.abs() < window)
        return (seen & (sequences[:, :, None] == sequences[:, None]) & tokens[:, None]).sum()
    length = tokens.size(1)
    seen = torch.nn.functional.pad(tokens.long().cumsum(1), (1, 0))  # seen[:, i] = real tokens before position i
    position = torch.arange(length, device=tokens.device)
    first = torch.zeros_like(position) if window is None else (position - window + 1).clamp(min=0)
    last = position if causal else torch.full_like(position, length - 1)
    if window is not None and not causal:
        last = (position + window - 1).clamp(max=length - 1)
    return ((seen[:, last + 1] - seen[:, first]) * tokens).sum()


def count_units(batch: Mapping, units: Iterable[Unit], task: str, problem_type: str | None) -> dict[Unit, Tensor | None]:
    """Rows of each unit in one batch; `None` for a per-position unit of images.

    Text without an `attention_mask` has no padding. Images have as many positions as the model cuts them into, which is
    known only after the forward pass; all samples have the same number, and `Denominators` scales the number of samples.
    """
    labels = labels_of(batch)
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.dim() > 0]
    rows, device = tensors[0].size(0), tensors[0].device
    mask, packed = real_tokens(batch), batch.get(SEQUENCE_IDS)
    ids = batch.get("input_ids")
    if mask is None and isinstance(ids, Tensor) and ids.dim() == 2:
        mask = torch.ones_like(ids, dtype=torch.bool)
    if task == "question_answering" and labels is not None:
        labels = span_labels(labels, mask)
    counts: dict[Unit, Tensor | None] = {}
    for unit in units:
        if unit.kind == "samples":
            counts[unit] = torch.full((), rows, device=device)
        elif unit.kind == "sequences" and packed is not None:
            counts[unit] = packed.amax(1).sum()
        elif unit.kind == "sequences":
            counts[unit] = torch.full((), rows, device=device) if mask is None else mask.any(1).sum()
        elif unit.kind == "partners":
            counts[unit] = torch.zeros((), dtype=torch.long, device=device) if labels is None else has_partner(labels).sum()
        elif unit.kind == "spans":
            counts[unit] = torch.full((), 2 * rows, device=device) if mask is None else 2 * mask.any(1).sum()
        elif unit.kind == "labels":
            present = None if labels is None else valid_labels(labels, task, problem_type)
            counts[unit] = torch.zeros((), dtype=torch.long, device=device) if present is None else present.sum()
        elif unit.kind == "marked":
            marked = marked_targets(batch)
            marked = torch.zeros((1, 1), device=device) if marked is None else marked
            counts[unit] = (marked[:, 1:] if task == "causal_lm" else marked).sum().long()
        elif mask is None:
            counts[unit] = None
        elif unit.kind == "tokens":
            counts[unit] = mask.sum()
        elif unit.kind == "next_tokens":
            counts[unit] = (mask[:, 1:] & mask[:, :-1]).sum()
        else:
            counts[unit] = count_pairs(mask, unit.causal, unit.window, packed)
    return counts


class Denominators:
    """Counts over one accumulation window and all ranks.

    Args:
        batches: the micro-batches of this rank.
        units: what the terms of this step count.
        reduce: sums an int64 tensor over ranks; `None` on one process. The only collective, once per optimizer step.
    """

    def __init__(self, batches, units: Iterable[Unit], task: str, problem_type: str | None, device, reduce=None):
        units = sorted({Unit("samples"), *units}, key=repr)
        counted = [count_units(batch, units, task, problem_type) for batch in batches]
        self._positions_known = {unit: all(counts[unit] is not None for counts in counted) for unit in units}
        sums = [
            sum((counts[unit].to(device) for counts in counted), torch.zeros((), dtype=torch.long, device=device))
            if self._positions_known[unit]
            else torch.zeros((), dtype=torch.long, device=device)
            for unit in units
        ]
        window = torch.stack(sums).long()  # int64: fp32 stops being exact at 2^24
        if reduce is not None:
            window = reduce(window, "sum")
        self._window = dict(zip(units, window.unbind()))

    def of(self, unit: Unit, local_count: Tensor, local_samples: int) -> Tensor:
        """The divisor of a sum that holds `local_count` rows of `local_samples` samples."""
        if self._positions_known[unit]:
            return self._window[unit].clamp(min=1)
        return (self._window[Unit("samples")] * local_count / local_samples).clamp(min=1)


def token_mask(student: Signals, teacher: Signals | None, shape: tuple[int, int], device) -> Tensor:
    """bool `(batch, length)`: positions that are real for the student and for the teacher."""
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    for signals in (student, teacher):
        if signals is not None and signals.attention_mask is not None:
            mask = mask & signals.attention_mask.to(device)
    return mask
