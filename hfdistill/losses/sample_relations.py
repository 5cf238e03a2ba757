"""Relations between the samples of a batch: distances, angles and similarities, which models of different width can share."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, smooth_l1_loss

from .base import LossValue
from .batch import BatchLoss
from .hidden import unit_vectors
from .logits import check_temperature
from .masking import check_mask, check_same_rows, log_softmax_over, relative_entropy, select_rows


_PKT_EPS = 1e-7


def distances(vectors: Tensor) -> Tensor:
    """Euclidean distances between all rows: `(rows, width)` -> `(rows, rows)`. Equal rows are at exactly 0, with gradient 0."""
    # by differences: from inner products, a distance that is small beside the vectors is lost in rounding
    return torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")


def relative_to_mean(values: Tensor) -> Tensor:
    """`values`, all at least 0, divided by the mean of those above 0; unchanged where there is none."""
    mean = values.sum() / (values.detach() > 0).sum().clamp(min=1)
    return values / torch.where(mean.detach() > 0, mean, 1)


class RKDDistanceLoss(BatchLoss):
    r"""Difference between the distances of all samples to each other, in units of their mean.

    `mean over all pairs (i, j) of h(D^s_ij - D^t_ij)`, where `D` are Euclidean distances divided by the mean of those above 0, and `h`
    is the smooth L1 with its corner at 1; [RKD, Park et al. 2019](https://huggingface.co/papers/1904.05068). The mean is over all
    batch² pairs, those of a sample with itself included, as in the published code. Zero when all distances are proportional, so it
    ignores rotation, shift and scale; also for one or two samples. The usual weight is 25, beside 50 for [`RKDAngleLoss`].

    Args:
        gather (`bool`, defaults to `False`): compare the samples of all processes, see [`BatchLoss`].

    Shapes:
        student, teacher: `(batch, width)`; the widths may differ.
        mask: bool `(batch,)`, True at the samples that take part; `None` for all.
        unit: sequences; the total is the loss of the batch times its samples.

    Raises:
        ValueError: if the numbers of samples differ.
    """

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return smooth_l1_loss(relative_to_mean(distances(student)), relative_to_mean(distances(teacher)))


class RKDAngleLoss(BatchLoss):
    r"""Difference between the angles that all triples of samples make.

    `mean over all (i, j, k) of h(A^s_ijk - A^t_ijk)` with `A_ijk = <u_ij, u_ik>` the cosine of the angle at sample i, `u_ij` the unit
    vector from i to j, and `h` the smooth L1 with its corner at 1; [RKD, Park et al. 2019](https://huggingface.co/papers/1904.05068).
    The mean is over all batch³ triples, degenerate ones included, as in the published code. Zero when all angles agree, so it ignores
    rotation, shift and scale; also for one or two samples. Equal samples make no angle: it counts as 0. The usual weight is 50, beside
    25 for [`RKDDistanceLoss`].

    It takes a few times `samples² * width + samples³` numbers of memory: 128 samples of width 768 take some 60 MB a copy.

    Args:
        max_samples (`int`, *optional*): only the first so many samples of the batch take part, at least 3. `None` for all.
        gather (`bool`, defaults to `False`): compare the samples of all processes, see [`BatchLoss`].

    Shapes:
        student, teacher: `(batch, width)`; the widths may differ.
        mask: bool `(batch,)`, True at the samples that take part; `None` for all.
        unit: sequences; the total is the loss of the batch times its samples.

    Raises:
        ValueError: if `max_samples` is no integer >= 3, and if the numbers of samples differ.
    """

    def __init__(self, max_samples: int | None = None, gather: bool = False):
        super().__init__(gather)
        if max_samples is not None and (isinstance(max_samples, bool) or not isinstance(max_samples, int) or max_samples < 3):
            raise ValueError(
                f"max_samples must be an integer >= 3, got {max_samples!r}: an angle is between three samples. Use 64 to 128, or None for "
                "all samples of the batch."
            )
        self.max_samples = max_samples

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return smooth_l1_loss(*(_angles(tensor[: self.max_samples]) for tensor in (student, teacher)))


def _angles(vectors: Tensor) -> Tensor:
    """`(rows, rows, rows)`: the cosine at the first between the directions to the other two; 0 where there is no direction."""
    directions = select_rows(*unit_vectors(vectors[None] - vectors[:, None]))
    return directions @ directions.transpose(1, 2)


class SimilarityPreservingLoss(BatchLoss):
    r"""Squared difference between the similarities of all samples, each row of them brought to length 1.

    `sum over all pairs of (n(G^s)_ij - n(G^t)_ij)² / batch²` with `G = F Fᵀ`, `F` the flattened features of each sample and `n` making
    each row of `G` a unit vector; [Tung and Mori 2019](https://huggingface.co/papers/1907.09682). `F` itself is not normalised: samples
    with large features count for more. At most `4 / batch`. Zero when the rows of both `G` are proportional, so it ignores rotation and
    scale. The paper's weight is 3000.

    Args:
        gather (`bool`, defaults to `False`): compare the samples of all processes, see [`BatchLoss`].

    Shapes:
        student, teacher: `(batch, width)`, feature maps as `(batch, channels * height * width)`; the widths may differ.
        mask: bool `(batch,)`, True at the samples that take part; `None` for all.
        unit: sequences; the total is the loss of the batch times its samples.

    Raises:
        ValueError: if the numbers of samples differ.
    """

    signal = "features"

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (_similarity_rows(student) - _similarity_rows(teacher)).square().mean()


def _similarity_rows(vectors: Tensor) -> Tensor:
    """The inner products of each row with all rows, as a unit vector; 0 for a row of zeros."""
    # all by one factor, which changes nothing, against overflow; a row's own factor cancels, so small rows lose no digits
    largest = torch.linalg.vector_norm(vectors.detach(), dim=-1).max()
    vectors = vectors / torch.where(largest > 0, largest, 1)
    unit, nonzero = unit_vectors(vectors)
    rows, _ = unit_vectors(select_rows(unit, nonzero) @ vectors.T)
    return select_rows(rows, nonzero)


class PKTLoss(BatchLoss):
    r"""Divergence between the probabilities with which samples choose each other by their cosine.

    `mean over all pairs of P^t_ij log((P^t_ij + 1e-7) / (P^s_ij + 1e-7))`, where `P` are the `(cos + 1) / 2` of sample i with all
    samples, itself included, divided by their sum; [PKT, Passalis and Tefas 2018](https://huggingface.co/papers/1803.10837). As in the
    published code, 1e-7 is added to the lengths in the cosine too, and the mean over batch² pairs explains the usual weight of 30000.
    Zero when all cosines agree, so it ignores rotation and (up to the 1e-7) the length of each vector; otherwise positive. A zero vector
    has cosine 0 with all.

    Args:
        gather (`bool`, defaults to `False`): compare the samples of all processes, see [`BatchLoss`].

    Shapes:
        student, teacher: `(batch, width)`; the widths may differ.
        mask: bool `(batch,)`, True at the samples that take part; `None` for all.
        unit: sequences; the total is the loss of the batch times its samples.

    Raises:
        ValueError: if the numbers of samples differ.
    """

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = _choices(student), _choices(teacher)
        return (teacher * ((teacher + _PKT_EPS) / (student + _PKT_EPS)).log()).mean()


def _choices(vectors: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    shortened = select_rows(*unit_vectors(vectors)) * (lengths / (lengths + _PKT_EPS))
    # rounding takes the cosine of opposite vectors below -1, and the logarithm to NaN
    similarities = ((shortened @ shortened.T + 1) / 2).clamp(min=0)
    return similarities / similarities.sum(-1, keepdim=True)


def _cosines(vectors: Tensor) -> Tensor:
    """Cosines between all rows; 0 with a zero vector."""
    unit = select_rows(*unit_vectors(vectors))
    return unit @ unit.T


class SimilarityKLLoss(BatchLoss):
    r"""Divergence between the softmax of each sample's cosines with the other samples.

    `mean over samples of KL(p^t_i || p^s_i)` with `p_i` the softmax over `j ≠ i` of `cos(v_i, v_j) / τ`: what SEED (Fang et al. 2021)
    does with a queue, with the batch itself. A sample's cosine with itself is left out: it is always 1 and would take nearly all of the
    probability at a small τ. Zero when the cosines agree up to a constant for each sample, so it ignores rotation and the length of each
    vector; otherwise positive; also for one or two samples. There is no τ² in front.

    Args:
        temperature (`float`, defaults to 0.1): τ, the same for student and teacher; 0.05 to 0.1 is usual. May follow a schedule.
        gather (`bool`, defaults to `False`): compare the samples of all processes, see [`BatchLoss`].

    Shapes:
        student, teacher: `(batch, width)`; the widths may differ.
        mask: bool `(batch,)`, True at the samples that take part; `None` for all.
        unit: sequences; the total is the loss of the batch times its samples.

    Raises:
        ValueError: if `temperature` is not a finite number > 0, and if the numbers of samples differ.
    """

    scheduled = ("temperature",)

    def __init__(self, temperature: float = 0.1, gather: bool = False):
        super().__init__(gather)
        self.temperature = check_temperature(temperature)

    def compare(self, student: Tensor, teacher: Tensor, temperature: float | None = None) -> Tensor:
        temperature = self.temperature if temperature is None else check_temperature(temperature)
        others = ~torch.eye(student.size(0), dtype=torch.bool, device=student.device)
        student_log, teacher_log = (log_softmax_over(_cosines(tensor) / temperature, others) for tensor in (student, teacher))
        return relative_entropy(student_log, teacher_log).sum(-1).mean()


class CorrelationCongruenceLoss(BatchLoss):
    r"""Difference between the correlations of the samples: [CC, Peng et al. 2019](https://huggingface.co/papers/1904.01802), two forms.

    `form="kernel"` is the paper's: `K_ij = exp(-2 gamma) Σ_{p ≤ order} (2 gamma)^p / p! · cos(v_i, v_j)^p`, the Gaussian kernel of unit
    vectors expanded to that order, and the loss `||K_s - K_t|| / batch²` (Frobenius norm, as in torchdistill), or if `squared` the mean
    of squares `||K_s - K_t||² / batch²`, which the paper has. Zero when all cosines agree, so it ignores rotation and the length of each
    vector. A zero vector has cosine 0 with all.

    `form="adjacent"` is what the authors gave to [CRD, Tian et al. 2020](https://huggingface.co/papers/1910.10699): with `D = v_s - v_t`,
    `mean over neighbours i, i+1 in the batch of Σ_d |D_i,d| |D_i+1,d|`, weight 0.02. It needs equal widths (or `embedding`), grows with
    the square of their scale, depends on the order of the batch, and is 0 as soon as every second sample agrees. Weights of the two forms
    are not exchangeable.

    Args:
        form (`str`, defaults to `"kernel"`): `"kernel"` or `"adjacent"`.
        gamma (`float`, defaults to 0.4): of the kernel.
        order (`int`, defaults to 2): of the kernel's expansion, at least 1.
        squared (`bool`, defaults to `False`): of the kernel, the squared norm.
        embedding (`int`, *optional*): width of a linear layer for each side that is trained with the student and not part of it (128 in
            CRD). Both sides could agree by shrinking to nothing, so not without another loss on the student.
        gather (`bool`, defaults to `False`): compare the samples of all processes, see [`BatchLoss`].

    Shapes:
        student, teacher: `(batch, width)`; the widths may differ, but for the adjacent form without `embedding`.
        mask: bool `(batch,)`, True at the samples that take part; `None` for all.
        unit: sequences; the total is the loss of the batch times its samples.

    Raises:
        ValueError: for options out of range, if the numbers of samples differ, and for the adjacent form of different widths.
    """

    def __init__(
        self,
        form: str = "kernel",
        gamma: float = 0.4,
        order: int = 2,
        squared: bool = False,
        embedding: int | None = None,
        gather: bool = False,
    ):
        super().__init__(gather)
        if form not in ("kernel", "adjacent"):
            raise ValueError(
                f"form must be 'kernel' or 'adjacent', got {form!r}: it says what correlates the samples. Use 'kernel' (the paper) or "
                "'adjacent' (products of neighbours in the batch, as in the code that came with CRD)."
            )
        if not isinstance(gamma, Real) or isinstance(gamma, bool) or not math.isfinite(gamma) or gamma <= 0:
            raise ValueError(f"gamma must be a finite number > 0, got {gamma!r}: at 0 the kernel is the same for all samples. Use 0.4.")
        for name, value, example in (("order", order, "2"), ("embedding", embedding, "128, or None for none")):
            if value is None and name == "embedding":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}: below, nothing of the samples is left. Use {example}.")
        self.form, self.gamma, self.order, self.squared, self.embedding = form, gamma, order, squared, embedding
        self.student_embedding: nn.Linear | None = None
        self.teacher_embedding: nn.Linear | None = None

    def prepare(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
        if self.embedding is not None:
            self.student_embedding = nn.Linear(student[-1], self.embedding)
            self.teacher_embedding = nn.Linear(teacher[-1], self.embedding)

    def check_widths(self, student: int, teacher: int) -> None:
        if self.form == "adjacent" and self.embedding is None and student != teacher:
            raise ValueError(
                f"The student's vectors have width {student} and the teacher's {teacher}, but the adjacent form subtracts them. Set "
                "embedding (128 is usual), which trains a linear layer for each side, or form to 'kernel'."
            )

    def compute(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> LossValue:
        self.check_widths(student.size(-1), teacher.size(-1))
        if self.embedding is None:
            return super().compute(student, teacher, mask)
        if self.student_embedding is None or self.teacher_embedding is None:
            raise ValueError(
                f"embedding={self.embedding}, but the linear layers were not made, so there is nothing to compare. Call "
                "prepare(student_shape, teacher_shape) before training, as the objective does."
            )
        check_same_rows(student, teacher)
        check_mask(mask, student.shape[:-1])
        # before the exchange between processes: each then trains the layers on its own samples, once
        student = _embed(self.student_embedding, student, mask)
        teacher = _embed(self.teacher_embedding, teacher, mask)
        value = super().compute(student, teacher, mask)
        return LossValue(value.total + teacher.sum() * 0, value.count)  # a graph to both layers where there is nothing to compare

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.form == "adjacent":
            difference = (student - teacher).abs()
            return (difference[:-1] * difference[1:]).sum(-1).mean()
        difference = self._kernel(student) - self._kernel(teacher)
        return difference.square().mean() if self.squared else torch.linalg.vector_norm(difference) / difference.numel()

    def _kernel(self, vectors: Tensor) -> Tensor:
        cosines = _cosines(vectors)
        term = torch.full_like(cosines, math.exp(-2 * self.gamma))
        kernel = term
        for power in range(1, self.order + 1):
            term = term * cosines * (2 * self.gamma / power)
            kernel = kernel + term
        return kernel


def _embed(layer: nn.Linear, vectors: Tensor, mask: Tensor | None) -> Tensor:
    # the layer sees no sample that is left out: its weights would get 0 * NaN
    return linear(select_rows(vectors, mask), layer.weight.to(vectors.dtype), layer.bias.to(vectors.dtype))
