"""The teacher's vector of a sample among those of other samples: which of them belongs to the student's."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from .base import LossValue
from .batch import BatchLoss, gather_rows, process_count
from .hidden import unit_vectors
from .masking import check_mask, check_same_rows, select_rows
from .task import MISSING_LABEL


class InfoNCELoss(BatchLoss):
    r"""Cross entropy of finding the teacher's vector of each sample among those of the batch, and the student's likewise.

    With `S = n(P_s h_s) n(P_t h_t)^T / τ`, `n(x) = x / ||x||` and linear projections `P` of both sides that are trained with the
    student: `samples · (CE(S, diagonal) + CE(S^T, diagonal)) / 2`, InfoNCE of
    [van den Oord et al. 2018](https://huggingface.co/papers/1807.03748) in both directions; as a distillation loss it is the in-batch
    form of CRD ([Tian et al. 2020](https://huggingface.co/papers/1910.10699)), whose memory bank is [`CRDLoss`].

    Always above 0 for more than one sample, even where student and teacher agree: how far depends on how similar the samples are to
    each other. `log(samples)` at chance. It ignores the scale of the vectors, and depends on how a batch is cut: micro-batches have
    fewer negatives, so give it large ones, or more with `gather` or `queue_size`. A zero vector has cosine 0 with everything.

    Samples that are the same twice are negatives of each other: where that is common, use `positives="labels"`.

    Args:
        temperature (`float`, defaults to 0.1): τ; 0.07 to 0.1 are usual. May follow a schedule.
        projection (`int` or `None`, defaults to 128): width of the projections. `None` compares the vectors as they are, which needs
            equal widths.
        queue_size (`int`, defaults to 0): so many teacher vectors of the batches before are further negatives, as in MoCo (He et al.
            2020). They extend the direction from student to teacher only; chance is then `log(samples + queue_size)` in that
            direction. They were projected with the weights of their time, and they should be fewer than the samples of an epoch, or
            a sample meets its own vector there. The queue takes the vectors of all processes in the order of their ranks, is the
            same on all of them, is saved with the projections, and stays as it is in evaluation.
        gather (`bool`, defaults to `False`): compare the samples of all processes with each other, which makes two processes with
            half the batch equal to one. Costs one exchange of the projected vectors per step; gradients stay exact.
        positives (`str`, defaults to `"itself"`): `"labels"` leaves other samples of the same label out of the negatives (-100 is no
            label, and such samples are negatives of all others). The target stays the sample itself.

    Shapes:
        student, teacher: `(batch, width)`; the widths may differ where they are projected.
        mask: bool `(batch,)`, True at the samples that count; `None` for all.
        labels: integer `(batch,)`, for `positives="labels"` only.
        unit: sequences, the samples that count.

    Raises:
        ValueError: for a temperature that is not above 0, sizes that are no integers, an unknown `positives`, unequal widths without
            projection, and where `prepare` was not called.

    Example:
        >>> vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> loss = InfoNCELoss(temperature=1.0, projection=None)
        >>> round(loss(vectors, vectors).mean.item(), 4)  # log(e + 1) - 1: above 0 although they are equal
        0.3133
    """

    scheduled = ("temperature",)
    fewest = 1  # with a queue, one sample has something to be compared with

    def __init__(
        self,
        temperature: float = 0.1,
        projection: int | None = 128,
        queue_size: int = 0,
        gather: bool = False,
        positives: str = "itself",
    ):
        super().__init__(gather)
        if positives not in ("itself", "labels"):
            raise ValueError(
                f"positives must be 'itself' or 'labels', got {positives!r}: it says which other samples are no negatives. Use 'itself' "
                "(all are) or 'labels' (those of the same label are left out)."
            )
        self.temperature = check_contrastive_temperature(temperature)
        self.projection = None if projection is None else check_size("projection", projection, 1, "the width vectors are projected to")
        self.queue_size = check_size("queue_size", queue_size, 0, "the number of earlier teacher vectors kept; 0 keeps none")
        self.positives = positives
        self.needs = ("labels",) if positives == "labels" else ()
        self.student_projection: nn.Linear | None = None
        self.teacher_projection: nn.Linear | None = None
        self.register_buffer("queue", None)
        self.register_buffer("queue_labels", None)
        self.register_buffer("queue_position", None)
        self.register_buffer("queue_filled", None)

    def check_widths(self, student: int, teacher: int) -> None:
        if self.projection is None and student != teacher:
            raise ValueError(
                f"student vectors have width {student} and teacher vectors {teacher}: without a projection they cannot be compared. "
                "Set projection=128."
            )

    def prepare(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
        self.check_widths(student[-1], teacher[-1])
        if self.projection is not None:
            self.student_projection = nn.Linear(student[-1], self.projection)
            self.teacher_projection = nn.Linear(teacher[-1], self.projection)
        if self.queue_size:
            self.queue = torch.zeros(self.queue_size, self.projection or teacher[-1])
            self.queue_labels = torch.full((self.queue_size,), MISSING_LABEL)
            self.queue_position, self.queue_filled = torch.tensor(0), torch.tensor(0)

    def compute(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None, labels: Tensor | None = None, temperature: float | None = None
    ) -> LossValue:
        temperature = self.temperature if temperature is None else check_contrastive_temperature(temperature)
        check_vectors(student, teacher, mask)
        self.check_widths(student.size(-1), teacher.size(-1))
        if (self.projection is not None and self.student_projection is None) or (self.queue_size and self.queue is None):
            raise ValueError(
                "This InfoNCELoss has no projections or queue yet: there is nothing to compare with. Call prepare(student_shape, "
                "teacher_shape) before training, as the trainer does."
            )
        if self.positives == "labels":
            self._check_labels(labels, student.size(0))
        if mask is not None:
            student, teacher = student[mask], teacher[mask]
            labels = None if labels is None else labels[mask]
        # Projected before they are exchanged: each process has the gradient of its own rows only, for the projections too.
        student, teacher = normalized(project(self.student_projection, student)), normalized(project(self.teacher_projection, teacher))
        own = student.size(0)
        rows = student
        if self.gather and process_count() > 1:
            rows, teacher = gather_rows(student), gather_rows(teacher)
            labels = None if labels is None else gather_rows(labels)
        total = sum(self._directions(rows, teacher, labels, temperature)) / 2
        if rows is not student and rows.size(0):
            total = total - total.detach() * (1 - own / rows.size(0))  # its share of the value, see BatchLoss
        if self.training and self.queue_size:
            self._enqueue(teacher.detach(), labels)
        return LossValue(total, torch.full((), own, dtype=torch.long, device=student.device))

    def _directions(self, student: Tensor, teacher: Tensor, labels: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
        """Sums of the cross entropies over the students' rows (with the queue) and over the teachers' rows."""
        scores = student @ teacher.T / temperature
        target = torch.arange(scores.size(0), device=scores.device)
        if labels is not None:
            itself = target[:, None] == target
            scores = scores.masked_fill(_same_label(labels, labels) & ~itself, float("-inf"))
        to_student = cross_entropy(scores.T, target, reduction="sum")
        if self.queue_size:
            former = student @ self.queue.to(student.dtype).T / temperature
            excluded = (torch.arange(self.queue_size, device=scores.device) >= self.queue_filled).expand(former.shape)
            if labels is not None:
                excluded = excluded | _same_label(labels, self.queue_labels)
            scores = torch.cat([scores, former.masked_fill(excluded, float("-inf"))], dim=1)
        return cross_entropy(scores, target, reduction="sum"), to_student

    @torch.no_grad()
    def _enqueue(self, teacher: Tensor, labels: Tensor | None) -> None:
        """The teacher's vectors of all processes overwrite the oldest ones of the queue."""
        if labels is None:
            labels = torch.full((teacher.size(0),), MISSING_LABEL, device=teacher.device)
        if not self.gather:
            teacher, labels = gather_rows(teacher), gather_rows(labels)
        teacher, labels = teacher[-self.queue_size :], labels[-self.queue_size :]
        places = (self.queue_position + torch.arange(teacher.size(0), device=teacher.device)) % self.queue_size
        # New tensors, not written in place: the graph of this batch still holds the old queue.
        self.queue = self.queue.index_copy(0, places, teacher.to(self.queue.dtype))
        self.queue_labels = self.queue_labels.index_copy(0, places, labels.to(self.queue_labels.dtype))
        self.queue_position = (self.queue_position + teacher.size(0)) % self.queue_size
        self.queue_filled = (self.queue_filled + teacher.size(0)).clamp(max=self.queue_size)

    @staticmethod
    def _check_labels(labels: Tensor | None, samples: int) -> None:
        if labels is None or labels.shape != (samples,) or labels.is_floating_point():
            seen = "none" if labels is None else f"{tuple(labels.shape)} ({labels.dtype})"
            raise ValueError(
                f"positives='labels' needs one integer label for each of the {samples} samples, got {seen}: samples of the same class "
                "could not be told. Add the column 'labels', or set positives='itself'."
            )


def check_contrastive_temperature(temperature: float) -> float:
    """`temperature` itself; `ValueError` unless it is a finite number above 0."""
    if isinstance(temperature, bool) or not (isinstance(temperature, Real) and math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a finite number > 0, got {temperature!r}: cosines are divided by it. Use 0.07 to 0.1.")
    return temperature


def check_size(name: str, value: int, fewest: int, meaning: str) -> int:
    """`value` itself; `ValueError` unless it is an integer of at least `fewest`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < fewest:
        raise ValueError(f"{name} must be an integer >= {fewest}, got {value!r}: it is {meaning}.")
    return value


def check_vectors(student: Tensor, teacher: Tensor, mask: Tensor | None) -> None:
    """Raises `ValueError` unless there is one vector for each sample on both sides, and one bool for each in the mask."""
    if student.dim() != 2:
        raise ValueError(
            f"student has shape {tuple(student.shape)}: samples are told apart by one vector each, (batch, width). "
            "Pool its tokens or flatten its maps first."
        )
    check_same_rows(student, teacher)
    check_mask(mask, student.shape[:-1])


def project(layer: nn.Linear | None, vectors: Tensor) -> Tensor:
    """`vectors` through `layer`, in the wider of their two dtypes: float64 stays float64. `None` leaves them alone."""
    if layer is None:
        return vectors
    dtype = torch.promote_types(vectors.dtype, layer.weight.dtype)
    return linear(vectors.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))


def normalized(tensor: Tensor) -> Tensor:
    """Vectors of length 1; a zero vector stays one and gets no gradient."""
    unit, nonzero = unit_vectors(tensor)
    return select_rows(unit, nonzero)


def _same_label(labels: Tensor, others: Tensor) -> Tensor:
    """bool `(labels, others)`: both have the same label, and it is not missing."""
    return (labels[:, None] == others) & (labels != MISSING_LABEL)[:, None]
