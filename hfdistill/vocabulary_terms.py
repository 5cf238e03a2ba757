"""Logit terms of language models at the positions that carry a loss: which positions these are, and all their losses in one go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .bound_term import BoundTerm
from .capture import Capture
from .counting import labels_of, marked_targets, real_tokens
from .losses.base import LossValue
from .losses.divergences import JSDLoss, ReverseKLLoss
from .losses.logits import SoftTargetsLoss
from .losses.task import MISSING_LABEL, TaskCrossEntropyLoss
from .losses.vocabulary import VocabularyPart, VocabularyScratch, chunked_vocabulary_losses
from .signals import Signals


LANGUAGE_MODELS = ("masked_lm", "causal_lm")
NO_LABELS = (
    "The objective has a task term, but the batch has no labels. Add a 'labels' column (-100 where a label is missing), or set "
    "task_weight to 0."
)

_FUSED = {SoftTargetsLoss: "soft_targets", ReverseKLLoss: "reverse_kl", JSDLoss: "jsd"}


def target_labels(labels: Tensor, task: str) -> Tensor:
    """`(batch, length)`: the label that each position predicts, -100 for none; those of causal models come from the next position."""
    if task != "causal_lm":
        return labels
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], MISSING_LABEL)], dim=1)


def _predicting(mask: Tensor, task: str) -> Tensor:
    """From `(batch, length)` of targets to that of the positions that predict them."""
    return torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1) if task == "causal_lm" else mask


def compared_positions(
    tokens: Tensor | None, marked: Tensor | None, labels: Tensor | None, task: str, positions: str, shape, device
) -> Tensor:
    """bool `(batch, length)`: positions whose logits are compared with the teacher's.

    Args:
        tokens: bool `(batch, length)` of real tokens, `None` for all.
        marked: bool `(batch, length)` of the column `target_mask`.
        labels: hard labels as the batch has them.
        task: `masked_lm` or `causal_lm`.
        positions: `labelled`, `marked` or `all`, the resolved `kd_positions`.
        shape: `(batch, length)`.
        device: of the mask.

    Raises:
        ValueError: where the batch lacks the column that decides.
    """
    if positions == "labelled":
        if labels is None:
            raise ValueError(
                "kd_positions='labelled' needs labels, but the batch has none. Add a 'labels' column, or set kd_positions='all'."
            )
        return target_labels(labels, task) != MISSING_LABEL
    if positions == "marked":
        if marked is None:
            raise ValueError(
                "kd_positions='marked' needs the column 'target_mask' (1 at the positions that count), but the batch has none. Let "
                "the collator keep it (TokenCollator does), or set kd_positions='labelled'."
            )
        return _predicting(marked, task)
    real = torch.ones(shape, dtype=torch.bool, device=device) if tokens is None else tokens
    return _predicting(real, task) & real if task == "causal_lm" else real


LOSS_ROWS = "loss_rows"
"""Under this name a batch carries its own [`loss_rows`]."""


def add_loss_rows(batches: Sequence[MutableMapping], terms: Sequence[BoundTerm], task: str, positions: str) -> None:
    """Gives each micro-batch of a step its `LOSS_ROWS`; on a GPU the host waits for it once, to learn how many there are."""
    masks = [_loss_mask(batch, labels_of(batch), terms, task, positions).flatten() for batch in batches]
    if all(mask.device.type == "cpu" for mask in masks):
        found = [mask.nonzero() for mask in masks]
    else:
        counts = torch.stack([mask.sum() for mask in masks]).tolist()
        found = [torch.nonzero_static(mask, size=count) for mask, count in zip(masks, counts)]
    for batch, rows in zip(batches, found):
        batch[LOSS_ROWS] = rows.squeeze(1)


def loss_rows(batch: Mapping, terms: Sequence[BoundTerm], task: str, positions: str) -> Tensor:
    """Integer `(rows,)`: positions of the flattened `(batch * length)` that carry a logit loss in this batch."""
    return _loss_mask(batch, labels_of(batch), terms, task, positions).flatten().nonzero().squeeze(1)


def _loss_mask(batch: Mapping, labels: Tensor | None, terms: Sequence[BoundTerm], task: str, positions: str) -> Tensor:
    ids = batch["input_ids"]
    tokens = real_tokens(batch)
    wanted = torch.zeros(tuple(ids.shape), dtype=torch.bool, device=ids.device)
    for term in terms:
        if term.signal != "logits":
            continue
        if term.term.is_task or term.loss.unit == "labels":
            if labels is not None:
                wanted |= target_labels(labels, task) != MISSING_LABEL
        else:
            wanted |= compared_positions(tokens, marked_targets(batch), labels, task, positions, ids.shape, ids.device)
    return wanted


def unfused_term(terms: Sequence[BoundTerm], task_loss) -> str | None:
    """Name of the first logit term whose loss cannot be computed chunk by chunk; `None` where all can."""
    for term in terms:
        if term.signal != "logits":
            continue
        fused = type(task_loss) is TaskCrossEntropyLoss if term.term.is_task else type(term.loss) in _FUSED
        if not fused or getattr(term.loss, "class_reduction", "sum") != "sum":
            return term.name
    return None


class HeadChoice(NamedTuple):
    """Where the vocabulary is projected in training (`full`, `rows` or `chunked`), and what forbids less."""

    where: str
    why: str | None = None


def choose_head(
    asked: str, terms: Sequence[BoundTerm], task: str, task_loss, student: Capture, example: Mapping, outside: str | None, compiled: bool
) -> HeadChoice:
    """Decides on the argument `vocabulary_head`.

    Args:
        asked: the argument.
        terms, task, task_loss: of the objective.
        student: its head is looked at.
        example: a batch.
        outside: why a loss outside of the forward pass may not use the weights, such as FSDP, which holds them in pieces.
        compiled: whether the student will be compiled.

    Raises:
        ValueError: where the argument asks for what this model or objective does not allow.
    """
    if task not in LANGUAGE_MODELS:
        if asked in ("auto", "full"):
            return HeadChoice("full")
        raise ValueError(
            f"vocabulary_head={asked!r} is about language models, but {student.name} has no vocabulary to predict (its task: {task}). "
            "Leave vocabulary_head out."
        )
    if asked == "full":
        return HeadChoice("full", "vocabulary_head='full'")
    why = None
    if compiled or hasattr(student.model, "_orig_mod"):
        why = "it is compiled, and rows would change its shapes with every batch"
    elif student.understand_head(example).place is None:
        why = "its logits at some positions are not those that it gives there among all others"
    if why is not None:
        if asked != "auto":
            raise ValueError(
                f"vocabulary_head={asked!r} is not possible with the {student.name}: {why}. Set vocabulary_head='full', which projects "
                "every position."
            )
        return HeadChoice("full", why)
    if asked == "rows":
        return HeadChoice("rows", "vocabulary_head='rows'")
    unfused = unfused_term(terms, task_loss)
    if outside is not None:
        why = outside
    elif not student.head.projects:
        why = "its logits are not a plain projection (an adapter, quantised weights, or something unknown is done to them)"
    elif unfused is not None:
        why = f"the term {unfused!r} needs all logits of a row at once in a way that is not built in"
    if why is None:
        return HeadChoice("chunked")
    if asked == "chunked":
        raise ValueError(
            f"vocabulary_head='chunked' is not possible with the {student.name}: {why}. Use vocabulary_head='rows', or terms among "
            "task, soft_targets, reverse_kl and jsd."
        )
    return HeadChoice("rows", why)


class FusedTerms:
    """Task loss, soft targets, reverse KL and JSD of one vocabulary, a few rows of logits at a time.

    Args:
        task_loss: of the objective.
        chunk_rows (`int`, *optional*): rows of logits that exist at a time.
    """

    def __init__(self, task_loss: TaskCrossEntropyLoss, chunk_rows: int | None = None):
        self.task_loss, self.chunk_rows = task_loss, chunk_rows
        self.scratch = VocabularyScratch()

    def __call__(
        self,
        terms: Sequence[tuple[BoundTerm, float]],
        student: Signals,
        teacher: Signals | None,
        labels: Tensor | None,
        masks: Callable[[], Tensor],
        divisor: Callable[[BoundTerm], Tensor],
        options: Callable[[BoundTerm], Mapping[str, float]],
        shared: int | None,
        teacher_columns: Tensor | None,
    ) -> tuple[Tensor, list[LossValue]]:
        """The weighted sum of all terms with its graph, and the value of each.

        Args:
            terms: logit terms with their weights.
            student, teacher: signals at the same rows.
            labels: `(rows,)`, -100 for none.
            masks: gives bool `(rows,)`, the rows at which the models are compared.
            divisor: gives what the sum of a term is divided by.
            options: gives the scheduled values of a term.
            shared, teacher_columns: see [`chunked_vocabulary_losses`].
        """
        parts = []
        dtype = torch.promote_types(student.projection.features.dtype, torch.float32)
        for term, weight in terms:
            scale = weight / divisor(term).to(dtype)  # a count: float32 without being told otherwise
            if term.term.is_task:
                if labels is None:
                    raise ValueError(NO_LABELS)
                part = VocabularyPart("task", scale, labels=labels, label_smoothing=self.task_loss.label_smoothing)
            else:
                loss, own = term.loss, options(term)
                kind = _FUSED[type(loss)]
                if teacher.top_logits is not None:
                    kind = "top_k"
                part = VocabularyPart(
                    kind, scale, mask=masks(), temperature=own.get("temperature", loss.temperature), beta=getattr(loss, "beta", 0.5)
                )
            parts.append(part)
        other = None
        if any(not term.term.is_task for term, _ in terms):
            other = next(found for found in (teacher.projection, teacher.top_logits, teacher.logits) if found is not None)
            if isinstance(other, Tensor) and teacher.rows is None:  # a function as the teacher answers for all positions
                other = other.flatten(0, 1)[student.rows]
        return chunked_vocabulary_losses(
            student.projection,
            other,
            parts,
            shared=shared,
            teacher_columns=teacher_columns,
            chunk_rows=self.chunk_rows,
            scratch=self.scratch,
        )
