"""The task loss of extractive question answering: where the answer starts and where it ends."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from .task import TaskCrossEntropyLoss


class TaskSpanLoss(TaskCrossEntropyLoss):
    r"""Cross entropy over the positions of a text: the start and the end of an answer are one row each.

    `sum over labelled rows of -log softmax(logits)[position]` ([Devlin et al. 2019](https://huggingface.co/papers/1810.04805), section
    4.2), so the mean is that of start and end, as the models of Transformers have it. A position whose logit is -inf is not there: it
    has no share in the softmax, nor in label smoothing, which spreads ε over the other positions of its row. Zero only when the
    labelled position has all the probability; the logarithm of the number of positions at chance.

    **Padding.** The objective sets the logits of padding to -inf. The stock loss of Transformers does not: there padding takes
    probability away from the answer, and the loss depends on what a row is batched with. Without padding the two are equal.

    Args:
        ignore_index (`int`, defaults to -100): label of a start or an end that does not count.
        label_smoothing (`float`, defaults to 0.0): ε, at least 0 and below 1.

    Shapes:
        logits: `(batch, 2, length)`, start and end; -inf at positions that are not there.
        labels: integer `(batch, 2)`. One that points at a logit of -inf makes the loss infinite.
        unit: starts and ends whose label is not `ignore_index`.

    Raises:
        ValueError: as [`TaskCrossEntropyLoss`] does; a class is a position here.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 2, 8).masked_fill(torch.arange(8) >= 4, float("-inf"))  # four tokens, four times padding
        >>> value = TaskSpanLoss()(logits, torch.tensor([[1, 2]]))
        >>> round(value.mean.item(), 4), value.count.item()
        (1.3863, 2)
    """

    def rows(self, logits: Tensor, labels: Tensor) -> Tensor:
        log_probabilities = log_softmax(logits, dim=-1)
        chosen = -log_probabilities.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        if not self.label_smoothing:
            return chosen
        present = logits != float("-inf")
        spread = -torch.where(present, log_probabilities, 0).sum(-1) / present.sum(-1).clamp(min=1)
        return (1 - self.label_smoothing) * chosen + self.label_smoothing * spread
