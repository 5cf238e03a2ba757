"""Losses on the logits of a whole vocabulary, a few rows of logits at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..signals import Projection, TopLogits
from .base import LossValue
from .divergences import check_beta
from .logits import check_temperature
from .masking import check_mask
from .task import check_class_ids, check_class_range, check_label_smoothing
from .top_k import check_top_k
from .vocabulary_chunks import ChunkedLosses


KINDS = ("task", "soft_targets", "reverse_kl", "jsd", "top_k")


@dataclass(frozen=True)
class VocabularyPart:
    """One loss on vocabulary logits.

    Args:
        kind (`str`): `task` (cross entropy), `soft_targets`, `reverse_kl`, `jsd`, or `top_k` (soft targets against a [`TopLogits`]).
        scale (`torch.Tensor` or `float`): what the sum over rows is multiplied by in the combined loss, without a graph.
        mask (`torch.Tensor`, *optional*): bool `(rows,)`, True at the rows that count; all by default. `task` goes by its labels.
        labels (`torch.Tensor`, *optional*): integer `(rows,)`, -100 for none. For `task`.
        temperature (`float`, defaults to 1.0): T of all but `task`.
        beta (`float`, defaults to 0.5): of `jsd`, as in [`JSDLoss`].
        label_smoothing (`float`, defaults to 0.0): of `task`.

    Raises:
        ValueError: for an unknown kind, and for a temperature, a beta or a smoothing that the plain loss does not take.
    """

    kind: str
    scale: Tensor | float
    mask: Tensor | None = None
    labels: Tensor | None = None
    temperature: float = 1.0
    beta: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(
                f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}: no closed form of its gradient is known here. Use the plain "
                "loss on whole logits."
            )
        check_temperature(self.temperature)
        check_beta(self.beta)
        check_label_smoothing(self.label_smoothing)


class VocabularyScratch:
    """Buffers that serve at each step again, on CPU.

    Fresh memory of the size of a chunk of logits would be paged in at each step, which takes longer than the arithmetic. Other devices
    have an allocator that keeps it.
    """

    def __init__(self):
        self._buffers: dict[tuple, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor; the last one of that name is invalid from now on."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        key, size = (name, dtype, device), math.prod(shape)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers.pop(key, None)
            self._buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return self._buffers[key][:size].view(shape)

    def clear(self) -> None:
        """Gives the memory back; it is taken again when it is needed."""
        self._buffers.clear()


def chunked_vocabulary_losses(
    student: Projection,
    teacher: Projection | Tensor | TopLogits | None,
    parts: list[VocabularyPart],
    *,
    shared: int | None = None,
    teacher_columns: Tensor | None = None,
    chunk_rows: int | None = None,
    scratch: VocabularyScratch | None = None,
) -> tuple[Tensor, list[LossValue]]:
    """The weighted sum of several losses on vocabulary logits, which never exist all at once.

    `sum over parts of scale · total`, with the values and gradients that the plain losses have on whole logits. The gradients are made
    in closed form during the forward pass, chunk by chunk, and backward only hands them over, so there is one backward pass and no
    derivative of it. Matrix products run in the dtype of the features (under autocast in its dtype), softmaxes in at least fp32, and
    weight gradients are summed in at least fp32. A class at -inf in both models is not there.

    Args:
        student ([`Projection`]): its features, weight and bias get gradients where they require them.
        teacher ([`Projection`], `torch.Tensor`, [`TopLogits`] or `None`): logits `(rows, classes)`, or what they are made from, on any
            device. No gradient. `None` where all parts are `task`.
        parts (list of [`VocabularyPart`]): the losses.
        shared (`int`, *optional*): the models are compared at the first `shared` classes of both. All by default; `task` is over all
            classes of the student in any case.
        teacher_columns (`torch.Tensor`, *optional*): integer `(shared,)`, the teacher's classes that stand for the student's first
            ones, where the student's vocabulary was pruned.
        chunk_rows (`int`, *optional*): rows of logits at a time; by default as many as the width asks for and memory allows.
        scratch ([`VocabularyScratch`], *optional*): give the same one at each step.

    Returns:
        The combined loss (a scalar in at least fp32, with a graph), and a [`LossValue`] without a graph for each part.

    Shapes:
        student.features: `(rows, width)`; rows without a label, or outside the masks, may hold anything.
        values: sums over rows and their counts, as those of the plain losses.

    Raises:
        ValueError: if rows or classes of the models do not belong together, or if a part lacks what its kind needs.
        RuntimeError: on a second backward pass through one result.
    """
    _check_student(student)
    own = student.weight.size(0)
    compared = shared if shared is not None else own if teacher_columns is None else teacher_columns.numel()
    _check_teacher(student, teacher, compared, teacher_columns, whole=shared is None and teacher_columns is None)
    for part in parts:
        _check_part(part, student, teacher, compared)
    scratch = VocabularyScratch() if scratch is None else scratch
    losses = ChunkedLosses(student, teacher, parts, compared, teacher_columns, chunk_rows, scratch)
    inputs = (student.features, student.weight, student.bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        combined = _HandsOver.apply(*inputs, losses)
    else:
        with torch.no_grad():
            combined, _ = losses.run((False, False, False))
    return combined, losses.values


class _HandsOver(torch.autograd.Function):
    """Gradients are made with the loss; backward multiplies them by that of the loss."""

    @staticmethod
    def forward(ctx, features, weight, bias, losses):
        combined, ctx.gradients = losses.run(ctx.needs_input_grad[:3])
        ctx.factor = losses.factor
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (features, weight, bias)]
        return combined

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        if ctx.gradients is None:
            raise RuntimeError(
                "Second backward pass through chunked_vocabulary_losses: its gradients are made once and were handed over at the first. "
                "Add up all losses before calling backward, or compute this one again."
            )
        gradients, ctx.gradients = ctx.gradients, None
        factor = gradient * ctx.factor
        # looking costs nothing on a CPU, and saves a pass over something as large as the vocabulary
        if factor.device.type != "cpu" or factor != 1:
            for tensor in gradients:
                if tensor is not None:
                    tensor.mul_(factor)
        return *(None if tensor is None else tensor.to(dtype) for tensor, dtype in zip(gradients, ctx.dtypes)), None


def _check_student(student: Projection) -> None:
    if student.features.dim() != 2 or student.features.size(1) != student.weight.size(1):
        raise ValueError(
            f"student.features have shape {tuple(student.features.shape)} and student.weight {tuple(student.weight.shape)}: they make no "
            "logits. Pass the input of the output embedding, one row for each position, and its weight."
        )


def _check_teacher(student: Projection, teacher, compared: int, teacher_columns: Tensor | None, whole: bool) -> None:
    """Rows and classes of both models; those of `TopLogits` are checked with the part."""
    if isinstance(teacher, TopLogits) and teacher_columns is not None:
        raise ValueError(
            f"teacher_columns ({teacher_columns.numel()} of them) were given with TopLogits, whose ids are classes of the student "
            "already: they would be taken for others. Store the teacher with the student's pruned vocabulary."
        )
    if teacher is None or isinstance(teacher, TopLogits):
        return
    rows, own = student.features.size(0), student.weight.size(0)
    teacher_rows, columns = (teacher.features.size(0), teacher.weight.size(0)) if isinstance(teacher, Projection) else teacher.shape
    found = columns if teacher_columns is None else teacher_columns.numel()
    belong = found == own if whole else compared <= min(own, found) and (teacher_columns is None or found == compared)
    if teacher_rows != rows or not belong or compared < 2:
        raise ValueError(
            f"The student has {rows} rows of {own} classes and the teacher {teacher_rows} rows of {columns}, {found} of which correspond "
            f"to the student's, and {compared} classes are compared: rows or classes would be compared with others. Feed both models the "
            "same positions, and give `shared` (at least 2) where the vocabularies end differently."
        )


def _check_part(part: VocabularyPart, student: Projection, teacher, compared: int) -> None:
    rows = student.features.size(0)
    check_mask(part.mask, (rows,))
    if part.kind == "task":
        if part.labels is None or tuple(part.labels.shape) != (rows,):
            seen = None if part.labels is None else tuple(part.labels.shape)
            raise ValueError(
                f"A task part has labels of shape {seen}, but there are {rows} rows: each needs the class it predicts. Pass integer "
                f"labels of shape {(rows,)}, -100 where there is none."
            )
        check_class_ids(part.labels)
        check_class_range(part.labels, student.weight.size(0))
    elif teacher is None or (part.kind == "top_k") != isinstance(teacher, TopLogits):
        raise ValueError(
            f"A {part.kind} part has {type(teacher).__name__} as its teacher, but top_k takes TopLogits, and the other divergences need "
            "the logits of all classes. Run the teacher, or store what the loss needs."
        )
    elif part.kind == "top_k":
        check_top_k(rows, compared, teacher, part.temperature)
