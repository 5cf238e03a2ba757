"""Contrastive representation distillation: each sample against thousands of others, whose vectors a memory bank keeps."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from .base import DistillationLoss, LossValue
from .batch import gather_rows
from .contrastive import check_contrastive_temperature, check_size, check_vectors, normalized, project
from .task import MISSING_LABEL


_EPS = 1e-7  # of the paper's code
_NOT_SET = float("inf")
_MODES = ("exact", "relax")


class CRDLoss(DistillationLoss):
    r"""Telling the teacher's vector of each sample from those of `K` samples of other classes, by a memory of all training samples.

    Linear embeddings of both sides, of length 1 and trained with the student, `v_s` and `v_t`; memories `M_s` and `M_t` with one row
    for each of the `N` training examples. `v_s` is scored against `M_t`, `v_t` against `M_s`, at the sample itself (the positive) and
    at `K` negatives `j`: `x = exp(v · m / τ) / Z`. With `c = K / N` each side loses
    `sum over samples of -log(x₊ / (x₊ + c + ε)) - Σ_j log(c / (x_j + c + ε))`, and the loss is the sum of both sides,
    [CRD, Tian et al. 2020](https://huggingface.co/papers/1910.10699). `Z` of each side is `N · mean(exp(v · m / τ))` of the first
    training batch, and stays. After a training batch its rows of both memories become `n(momentum · m + (1 - momentum) · v)`, without
    gradient.

    Always above 0, also where student and teacher agree; `2 (log(K + 1) + K log(1 + 1 / K))` for each sample where all scores are the
    same, so about 21 for 16384 negatives and 13 for 255. It ignores the scale of the inputs. The paper's weight is 0.8, alone or beside
    soft targets of weight 1.

    The negatives of a sample are a function of `seed`, its id, the training examples and the batches so far: neither its place in the
    batch nor the process it is on matters, and a resumed run draws what an uninterrupted one would have. They come from other classes,
    samples without a label being a class each, and repeat only where there are fewer than `K` candidates. Memories, `Z` and the number of
    batches are buffers and saved with the embeddings. All processes keep the same memories: they exchange ids and vectors of each
    training batch, and two processes with half a batch each are one with the whole. Accumulation is not: each micro-batch is a
    batch here, and updates the memories for the next.

    In evaluation nothing is stored or exchanged; the negatives are then those of the next training batch, and where `Z` is not set yet,
    the batch's own is used. Ids must be those of training examples: an evaluation set has no rows in the memories.

    Memory: two memories of `N · dim` numbers and copies of both while one batch is on its way back (50 MB and as much again for 50 000
    examples), and up to `batch · N` scores a side. For millions of examples use [`InfoNCELoss`] with a queue.

    Args:
        dim (`int`, defaults to 128): width of the embeddings.
        negatives (`int`, defaults to 16384): K. At most N - 1 are used: where the training data are smaller than the paper's, "all others"
            (among which those of other classes are drawn with repetition).
        temperature (`float`, defaults to 0.07): τ. It follows no schedule, since `Z` belongs to one temperature.
        momentum (`float`, defaults to 0.5): how much of a row of the memory stays when its example comes by, in [0, 1). An id that is
            twice in a batch (Accelerate fills the last one up) is stored once, as its last row has it.
        mode (`str`, defaults to `"exact"`): `"exact"`: the positive is the sample itself; `"relax"`: any example of its class.
        seed (`int`, defaults to 0): of the memories' first content and of the draws.
        examples (`int`, *optional*): N, with ids 0 to N - 1. Where neither this nor `classes` is given, the trainer takes both from the
            training data (`set_examples`), whose ids may be any numbers.
        classes (`list` or tensor of integers, *optional*): the label of every example, by its id; -100 where there is none. `None`: no
            labels, so negatives are any other examples.

    Shapes:
        student, teacher: `(batch, width)`; the widths may differ.
        mask: bool `(batch,)`, True at the samples that count; `None` for all.
        example_ids: integer `(batch,)`, the number of each sample in the column `example_id` of the training data.
        unit: sequences, the samples that count.

    Raises:
        ValueError: for settings out of range, for classes that leave no negatives, where `prepare` or `set_examples` was not called, and
            for ids that have no row in the memories.
    """

    signal = "pooled"
    signals = ("pooled", "features", "pooled_features")
    layout = "vectors"
    unit = "sequences"
    compares_widths = False
    needs = ("example_ids",)

    def __init__(
        self,
        dim: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        mode: str = "exact",
        seed: int = 0,
        examples: int | None = None,
        classes: Sequence[int] | Tensor | None = None,
    ):
        super().__init__()
        if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0 <= momentum < 1:
            raise ValueError(
                f"momentum must be a number in [0, 1), got {momentum!r}: it is the share of a memory row that stays; at 1 the memory would "
                "never learn anything. Use 0.5 (CRD)."
            )
        if mode not in _MODES:
            raise ValueError(
                f"mode must be 'exact' or 'relax', got {mode!r}: it says what the positive is. Use 'exact' (the sample itself) or 'relax' "
                "(any example of its class)."
            )
        self.dim = check_size("dim", dim, 1, "the width of the embeddings")
        self.negatives = check_size("negatives", negatives, 1, "the number of negatives of each sample")
        self.temperature = check_contrastive_temperature(temperature)
        self.seed = check_size("seed", seed, 0, "what the memories and the negatives are drawn from")
        self.momentum, self.mode = float(momentum), mode
        self.student_embedding: nn.Linear | None = None
        self.teacher_embedding: nn.Linear | None = None
        self.register_buffer("memory_v1", None)  # the student's vectors
        self.register_buffer("memory_v2", None)  # the teacher's
        # log Z of the student's and of the teacher's side: Z itself leaves the range of fp32 at small temperatures
        self.register_buffer("log_z", torch.full((2,), _NOT_SET))
        self.register_buffer("draws", torch.tensor(0))
        if classes is not None:
            labels = torch.as_tensor(classes)
            if examples is not None and examples != labels.numel():
                raise ValueError(
                    f"classes has {labels.numel()} entries but examples is {examples!r}: classes holds the label of every example. "
                    "Leave examples out, it is known from classes."
                )
            self.set_examples(labels)
        elif examples is not None:
            check_size("examples", examples, 2, "the number of training examples, and one alone has no negatives")
            self.set_examples(torch.full((examples,), MISSING_LABEL))

    @property
    def examples(self) -> int | None:
        """N, the rows of each memory; `None` until it is known."""
        return None if self.memory_v1 is None else self.memory_v1.size(0)

    @property
    def z(self) -> Tensor:
        """Z of the student's and of the teacher's side, `(2,)`; -1 where it is not set yet."""
        return torch.where(self.log_z == _NOT_SET, -1, self.log_z.exp())

    def set_examples(self, labels: Tensor, ids: Tensor | None = None) -> None:
        """Makes the memories, for as many training examples as there are labels. Forgets what was in them.

        Called once, before training and before a saved state is loaded.

        Args:
            labels (`Tensor`): integer `(N,)`, the label of each example; -100 where there is none.
            ids (`Tensor`, *optional*): integer `(N,)`, the id of each. Default: 0 to N - 1, in order.

        Raises:
            ValueError: unless there are at least two, of at least two classes; for `mode="relax"` without labels.
        """
        if labels.dim() != 1 or labels.is_floating_point() or len(labels) < 2:
            raise ValueError(
                f"The labels of the training examples have shape {tuple(labels.shape)} ({labels.dtype}): CRD needs one integer for each of "
                "at least two examples, -100 where there is none. Pass a tensor (examples,)."
            )
        labels = labels.detach().cpu().long()
        known = labels != MISSING_LABEL
        if self.mode == "relax" and not known.any():
            raise ValueError(
                f"mode='relax' takes any example of a sample's class as its positive, but none of the {len(labels)} training examples "
                "has a label. Pass classes, or use mode='exact'."
            )
        # an example without a label is a class of its own, above all others
        groups = torch.where(known, labels, labels.max() + 1 + torch.arange(len(labels)))
        _, group, sizes = groups.unique(return_inverse=True, return_counts=True)
        if len(sizes) == 1:
            raise ValueError(
                f"All {len(labels)} training examples have the label {int(labels[0])}: negatives come from other classes, so there are "
                "none. Pass examples instead of classes, which draws them from all other examples."
            )
        self._by_class = group.argsort(stable=True)  # ids, class after class
        self._class_size = sizes[group]  # of each example's class ...
        self._class_start = (sizes.cumsum(0) - sizes)[group]  # ... and where it begins in `_by_class`
        ids = torch.arange(len(labels)) if ids is None else ids.detach().cpu().long()
        if ids.shape != labels.shape or len(ids.unique()) < len(ids):
            raise ValueError(
                f"There are {len(labels)} labels and {len(ids.unique())} different ids of training examples: each example needs an id of "
                "its own. Number them once, before the data is split or repeated."
            )
        self._ids, self._row_of_id = ids.sort()
        self._id_of_row = ids
        generator, bound = torch.Generator().manual_seed(self.seed), 1 / math.sqrt(self.dim / 3)
        like = self.log_z
        for name in ("memory_v1", "memory_v2"):
            memory = torch.rand(len(labels), self.dim, generator=generator) * (2 * bound) - bound
            setattr(self, name, memory.to(device=like.device, dtype=like.dtype))
        self.log_z, self.draws = torch.full_like(like, _NOT_SET), torch.zeros_like(self.draws)

    def prepare(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
        self.student_embedding = nn.Linear(student[-1], self.dim)
        self.teacher_embedding = nn.Linear(teacher[-1], self.dim)

    def compute(self, student: Tensor, teacher: Tensor, mask: Tensor | None, example_ids: Tensor | None = None) -> LossValue:
        check_vectors(student, teacher, mask)
        self._check_ready()
        ids = self._checked_ids(example_ids, student.size(0), mask)
        if mask is not None:
            student, teacher = student[mask], teacher[mask]
        student = normalized(project(self.student_embedding, student))
        teacher = normalized(project(self.teacher_embedding, teacher))
        chosen = torch.cat([self.positive_ids(ids)[:, None], self.negative_ids(ids)], dim=1).to(student.device)
        scores = [
            _scores(vectors, memory.to(vectors.dtype), chosen) / self.temperature
            for vectors, memory in ((student, self.memory_v2), (teacher, self.memory_v1))
        ]
        log_z = self._log_z_of([side.detach() for side in scores])
        share = (chosen.size(1) - 1) / self.memory_v1.size(0)
        rows = sum(_noise_contrast(side - constant, share) for side, constant in zip(scores, log_z))
        if self.training:
            self._remember(ids.to(student.device), student.detach(), teacher.detach())
            self.draws = self.draws + 1
        return LossValue(rows.sum(), torch.full((), rows.numel(), dtype=torch.long, device=rows.device))

    def negative_ids(self, example_ids: Tensor) -> Tensor:
        """The negatives of the next training batch, on the CPU: `(batch,)` -> `(batch, K)`."""
        count = min(self.negatives, len(self._by_class) - 1)
        start, size = self._class_start[example_ids, None], self._class_size[example_ids, None]
        drawn = example_ids.new_empty((len(example_ids), count))
        for row, own, generator in zip(drawn, size[:, 0].tolist(), self._generators("negatives", example_ids)):
            row.copy_(_draw(len(self._by_class) - own, count, generator))
        # the candidates are all of `_by_class` but one run, that of the example's own class
        return self._by_class[torch.where(drawn >= start, drawn + size, drawn)]

    def positive_ids(self, example_ids: Tensor) -> Tensor:
        """What each sample is to be told from the negatives, on the CPU: itself, or (`relax`) any example of its class."""
        if self.mode == "exact":
            return example_ids
        generators = self._generators("positive", example_ids)
        drawn = [int(torch.randint(size, (), generator=g)) for size, g in zip(self._class_size[example_ids].tolist(), generators)]
        return self._by_class[self._class_start[example_ids] + torch.tensor(drawn, dtype=torch.long)]

    def _generators(self, purpose: str, example_ids: Tensor) -> Iterator[torch.Generator]:
        """One for each sample: a function of the seed, the number of training batches so far and its id."""
        draws = int(self.draws)
        for example in self._id_of_row[example_ids].tolist():
            # hashed, since torch's generator looks at the last 32 bits of a seed only
            digest = hashlib.blake2b(f"{purpose} {self.seed} {draws} {example}".encode(), digest_size=8).digest()
            yield torch.Generator().manual_seed(int.from_bytes(digest, "big"))

    def _log_z_of(self, scores: list[Tensor]) -> Tensor:
        """log Z of both sides. The first training batch, that of all processes, sets it."""
        if bool((self.log_z != _NOT_SET).all()):
            return self.log_z.to(scores[0].dtype)
        sums = torch.stack([side.logsumexp(1) for side in scores], dim=1)  # one row for each sample
        sums = gather_rows(sums) if self.training else sums
        log_z = sums.logsumexp(0) - math.log(max(len(sums), 1) * scores[0].size(1)) + math.log(self.memory_v1.size(0))
        if self.training and len(sums):
            self.log_z = log_z.to(self.log_z.dtype)
        return log_z

    @torch.no_grad()
    def _remember(self, ids: Tensor, student: Tensor, teacher: Tensor) -> None:
        """Moves the rows of this batch, that of all processes, in both memories."""
        ids, both = gather_rows(ids), gather_rows(torch.cat([student, teacher], dim=1))
        # Rows of the same id are all given the last one's vector: writing them in any order is then the same.
        order = torch.arange(len(ids), device=ids.device)
        last = torch.where(ids[:, None] == ids, order, -1).amax(1) if len(ids) else order
        for name, vectors in zip(("memory_v1", "memory_v2"), both[last].split(self.dim, dim=1)):
            memory = getattr(self, name)
            rows = normalized(self.momentum * memory[ids].to(vectors.dtype) + (1 - self.momentum) * vectors)
            # a new tensor, not written in place: the graph of this batch still holds the old memory
            setattr(self, name, memory.index_copy(0, ids, rows.to(memory.dtype)))

    def _check_ready(self) -> None:
        if self.memory_v1 is None:
            raise ValueError(
                "CRD does not know the training examples: its memories have a row for each of them. Pass examples (their number) or "
                "classes (their labels), or call set_examples(labels) before training, as the trainer does."
            )
        if self.student_embedding is None:
            raise ValueError(
                "This CRDLoss has no embeddings yet: there is nothing to compare. Call prepare(student_shape, teacher_shape) before "
                "training, as the trainer does."
            )

    def _checked_ids(self, example_ids: Tensor | None, samples: int, mask: Tensor | None) -> Tensor:
        """The memory rows of the samples that count, on the CPU, where negatives are drawn."""
        if example_ids is None or example_ids.shape != (samples,) or example_ids.is_floating_point():
            seen = "none" if example_ids is None else f"{tuple(example_ids.shape)} ({example_ids.dtype})"
            raise ValueError(
                f"CRD needs the id of each of the {samples} samples, an integer, to find it in its memories, got {seen}. Give the data a "
                "column 'example_id' with one number for each example."
            )
        ids = (example_ids if mask is None else example_ids[mask.to(example_ids.device)]).cpu().long()
        place = torch.searchsorted(self._ids, ids).clamp(max=len(self._ids) - 1)
        wrong = ids[self._ids[place] != ids]
        if len(wrong):
            raise ValueError(
                f"The example id {int(wrong[0])} has no row in the memories of CRD, which were made for {len(self._ids)} training examples "
                f"with ids from {int(self._ids[0])} to {int(self._ids[-1])}. Leave examples and classes out, so that they are taken from "
                "the training data, and keep its column 'example_id' as it is."
            )
        return self._row_of_id[place]


def _scores(vectors: Tensor, memory: Tensor, chosen: Tensor) -> Tensor:
    """Products of each vector with its chosen rows: `(batch, dim)`, `(N, dim)`, `(batch, K + 1)` -> `(batch, K + 1)`."""
    if chosen.size(1) * memory.size(1) < memory.size(0):
        return torch.einsum("bd,bkd->bk", vectors, memory[chosen])
    # With every row, and most thrown away: less than copying 128 numbers for each that is kept.
    return (vectors @ memory.T).gather(1, chosen)


def _noise_contrast(log_x: Tensor, share: float) -> Tensor:
    """`-log(x₊ / (x₊ + c + ε)) - Σ log(c / (x₋ + c + ε))` of each row, from log x with the positive first, `c` the share.

    In log space: `x / (x + a) = sigmoid(log x - log a)`.
    """
    noise = math.log(share + _EPS)
    positive = logsigmoid(log_x[:, 0] - noise)
    negatives = logsigmoid(noise - log_x[:, 1:]) + (math.log(share) - noise)
    return -positive - negatives.sum(1)


def _draw(candidates: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the numbers below `candidates`, each at most once where there are enough."""
    if count > candidates:
        return torch.randint(candidates, (count,), generator=generator)
    if candidates < 16 * count:
        return torch.randperm(candidates, generator=generator)[:count]
    # Of many candidates few: some more than needed, once each, and of these a random choice. 1.3 times is enough for 1 in 16.
    found = torch.randint(candidates, (count + count // 3 + 8,), generator=generator).unique()
    while len(found) < count:
        found = torch.cat([found, torch.randint(candidates, (count,), generator=generator)]).unique()
    return found[torch.randperm(len(found), generator=generator)[:count]]
