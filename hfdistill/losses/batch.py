"""What losses on relations between the samples of a batch have in common: which rows take part, and those of other processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .base import DistillationLoss, LossValue
from .masking import check_mask, check_same_rows


class BatchLoss(DistillationLoss):
    """Base class of losses that compare samples with each other: `compare(student, teacher)` gives one number for the whole batch.

    Such a loss is no sum over samples: a batch cut in two is not the same thing. Its total is that number times the samples, so
    micro-batches of an accumulation window are weighed by their samples. Every process compares its own samples, unless `gather`.

    Args:
        gather (`bool`, defaults to `False`): compare the samples of all processes with each other, which makes two processes with
            half the batch equal to one. Costs one exchange of the vectors per step; gradients stay exact.
    """

    signal = "pooled"
    signals = ("pooled", "features", "pooled_features", "hidden_states", "embeddings")
    layout = "vectors"
    unit = "sequences"
    compares_widths = False
    fewest = 2
    """Samples below which there is nothing to compare; the loss is then 0."""

    def __init__(self, gather: bool = False):
        super().__init__()
        if not isinstance(gather, bool):
            raise ValueError(f"gather must be true or false, got {gather!r}: it says whether the samples of all processes are compared.")
        self.gather = gather

    def compute(self, student: Tensor, teacher: Tensor, mask: Tensor | None, **options) -> LossValue:
        check_same_rows(student, teacher)
        check_mask(mask, student.shape[:-1])
        if mask is None:
            student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
        else:
            student, teacher = student[mask], teacher[mask]
        own = student.size(0)
        count = torch.full((), own, dtype=torch.long, device=student.device)
        rows = student
        if self.gather and process_count() > 1:
            rows, teacher = gather_rows(student), gather_rows(teacher)
        if rows.size(0) < self.fewest:
            return LossValue(student.sum() * 0, count)
        value = self.compare(rows, teacher, **options)
        # Every process sees the whole value, and its gradient for its own rows only: it reports its share, and keeps that gradient.
        whole = value * rows.size(0)
        return LossValue(whole if rows is student else whole - whole.detach() * (1 - own / rows.size(0)), count)

    def compare(self, student: Tensor, teacher: Tensor, **options) -> Tensor:
        """The loss of a batch, as the paper has it: `(samples, width)` twice, and what `compute` was given -> a scalar."""
        raise NotImplementedError(f"{type(self).__name__} must implement compare")


def process_count() -> int:
    """Processes that train together; 1 where none were started."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(tensor: Tensor) -> Tensor:
    """Rows of all processes in the order of their ranks; gradients reach the own ones only.

    Shapes: `(own rows, ...)` -> `(all rows, ...)`. The processes may have different numbers of rows.
    """
    if process_count() == 1:
        return tensor
    own = torch.tensor([tensor.size(0)], device=tensor.device)
    sizes = [torch.zeros_like(own) for _ in range(process_count())]
    dist.all_gather(sizes, own)
    sizes = [int(size) for size in sizes]
    padded = tensor.detach().new_zeros((max(sizes), *tensor.shape[1:]))
    padded[: tensor.size(0)] = tensor.detach()
    pieces = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(pieces, padded)
    pieces = [piece[:size] for piece, size in zip(pieces, sizes)]
    pieces[dist.get_rank()] = tensor
    return torch.cat(pieces)
