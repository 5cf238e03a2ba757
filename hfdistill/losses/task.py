"""The task loss: student logits against hard labels, by `problem_type`.

`outputs.loss` of a model is a mean over one micro-batch, which cannot be put together over an accumulation window.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from .base import LossValue, raise_precision
from .masking import select_rows, sum_rows


MISSING_LABEL = -100


class TaskLoss(nn.Module):
    """Base class: `loss(logits, labels) -> LossValue`, outside autocast with half-precision logits raised to fp32.

    Subclasses implement `compute(logits, labels)`; those that take soft labels too, `compute(logits, labels, soft_labels)`.
    """

    def forward(self, logits: Tensor, labels: Tensor, *soft_labels: Tensor) -> LossValue:
        with torch.autocast(logits.device.type, enabled=False):
            return self.compute(raise_precision(logits), labels, *soft_labels)

    def compute(self, logits: Tensor, labels: Tensor) -> LossValue:
        raise NotImplementedError(f"{type(self).__name__} must implement compute")


class TaskCrossEntropyLoss(TaskLoss):
    r"""Cross entropy with class ids: sequence classification, token labels, masked and (shifted by the caller) causal language models.

    `sum over labelled rows of -log softmax(logits)[label]`; with smoothing ε, `(1 - ε)` of that plus ε times the mean of
    `-log softmax` over classes ([Szegedy et al. 2016](https://huggingface.co/papers/1512.00567)), as `torch` and the
    `LabelSmoother` of Transformers have it. Zero only when the labelled class has all the probability; `log(classes)` at chance.

    Args:
        ignore_index (`int`, defaults to -100): label of the rows that do not count.
        label_smoothing (`float`, defaults to 0.0): ε, at least 0 and below 1.

    Shapes:
        logits: `(batch, classes)` or `(batch, length, classes)`.
        labels: integer `(batch,)` or `(batch, length)`.
        soft_labels: `(batch, classes)` or `(batch, length, classes)`, optional: shares of the classes, as mixup and cutmix make them, in
            place of the labels of the rows that have one.
        unit: rows whose label is not `ignore_index`.

    Raises:
        ValueError: if the shapes do not belong together, if the labels are not class ids, or (for labels on the CPU, where looking
            costs no synchronisation) if one is not a class of the model.

    Example:
        >>> import torch
        >>> value = TaskCrossEntropyLoss()(torch.zeros(2, 4), torch.tensor([3, -100]))
        >>> round(value.mean.item(), 4), value.count.item()
        (1.3863, 1)
    """

    def __init__(self, ignore_index: int = MISSING_LABEL, label_smoothing: float = 0.0):
        super().__init__()
        self.ignore_index = ignore_index
        self.label_smoothing = check_label_smoothing(label_smoothing)

    def compute(self, logits: Tensor, labels: Tensor, soft_labels: Tensor | None = None) -> LossValue:
        check_class_ids(labels)
        if labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}: there must be one class id for each row of "
                f"logits, shape {tuple(logits.shape[:-1])}. Check the data collator and the task of the model."
            )
        classes = logits.size(-1)
        if classes == 1:
            raise ValueError(
                f"logits have 1 class (shape {tuple(logits.shape)}): a softmax over one class is always 1, so this loss would always be "
                "0. Set num_labels, or problem_type to 'regression'."
            )
        labels = labels.long()
        present = labels != self.ignore_index
        check_class_range(labels, classes, self.ignore_index)
        if soft_labels is None:
            targets = torch.where(present, labels, 0).reshape(-1)
        elif soft_labels.shape != logits.shape:
            raise ValueError(
                f"soft_labels have shape {tuple(soft_labels.shape)} and logits {tuple(logits.shape)}: there must be one share for each "
                "class. Set num_labels of the collator that mixes to the classes of the model."
            )
        else:
            targets = select_rows(soft_labels.to(logits.dtype), present).reshape(-1, classes)
        rows = self.rows(select_rows(logits, present).reshape(-1, classes), targets)
        return LossValue(*sum_rows(rows, present.reshape(-1)))

    def rows(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each row: `(rows, classes)` and `(rows,)`, or soft `(rows, classes)`, -> `(rows,)`."""
        return cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)


class TaskBinaryCrossEntropyLoss(TaskLoss):
    r"""Binary cross entropy for multi-label classification.

    `sum over rows of the mean over the row's labels of -(y log σ(z) + (1 - y) log(1 - σ(z)))`; with smoothing ε, `y` becomes
    `y (1 - ε) + ε / 2`. Zero only when every label is predicted with certainty; `log 2` at chance.

    Args:
        label_smoothing (`float`, defaults to 0.0): ε, at least 0 and below 1.

    Shapes:
        logits: `(batch, labels)`.
        labels: integer, bool or float `(batch, labels)`, from 0 to 1; entries of -100 are missing.
        unit: rows with at least one label that is not missing.

    Raises:
        ValueError: if the shapes differ, or (for labels on the CPU, where looking costs no synchronisation) if a label is not
            between 0 and 1.
    """

    def __init__(self, label_smoothing: float = 0.0):
        super().__init__()
        self.label_smoothing = check_label_smoothing(label_smoothing)

    def compute(self, logits: Tensor, labels: Tensor) -> LossValue:
        if labels.shape != logits.shape:
            raise ValueError(
                f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}: a multi-label model needs a 0 or 1 for each "
                "label. Pass multi-hot rows, or set problem_type to 'single_label_classification' for class ids."
            )
        present = labels != MISSING_LABEL
        if labels.device.type == "cpu":
            outside = labels[present & ~((labels >= 0) & (labels <= 1))]
            if outside.numel():
                raise ValueError(
                    f"label {outside[0].item()} is not between 0 and 1: binary cross entropy would have no minimum. "
                    f"Pass multi-hot rows, and mark missing entries with {MISSING_LABEL}."
                )
        targets = torch.where(present, labels, 0).to(logits.dtype)
        targets = targets * (1 - self.label_smoothing) + self.label_smoothing / 2
        entries = binary_cross_entropy_with_logits(torch.where(present, logits, 0), targets, reduction="none")
        return _mean_over_present(entries, present)


class TaskSquaredErrorLoss(TaskLoss):
    r"""Squared error for regression.

    `sum over rows of the mean over the row's targets of (z - y)²`. Zero when every target is met; grows with the square of its unit.

    Shapes:
        logits: `(batch, targets)`, `(batch, 1)` or `(batch,)`.
        labels: `(batch, targets)`, `(batch, 1)` or `(batch,)`, the last two are the same thing; NaN entries are missing.
        unit: rows with at least one target that is not missing.

    Raises:
        ValueError: if the shapes differ otherwise.
    """

    def compute(self, logits: Tensor, labels: Tensor) -> LossValue:
        # (B, 1) against (B,) would broadcast to (B, B)
        logits, labels = (tensor.unsqueeze(-1) if tensor.dim() == 1 else tensor for tensor in (logits, labels))
        if labels.shape != logits.shape:
            raise ValueError(
                f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}: a regression needs one number for each target. "
                "Set num_labels to the number of targets."
            )
        labels = labels.to(logits.dtype)
        present = ~labels.isnan()
        entries = (torch.where(present, logits, 0) - torch.where(present, labels, 0)).square()
        return _mean_over_present(entries, present)


def _mean_over_present(entries: Tensor, present: Tensor) -> LossValue:
    """Rows are means over their present entries; rows without any do not count."""
    rows = torch.where(present, entries, 0).sum(-1) / present.sum(-1).clamp(min=1)
    return LossValue(*sum_rows(rows, present.any(-1)))


def check_class_ids(labels: Tensor) -> None:
    """`ValueError` unless `labels` are integers."""
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels have dtype {labels.dtype} and shape {tuple(labels.shape)}, but cross entropy takes class ids. "
            "Pass integer labels, or set problem_type to 'multi_label_classification' or 'regression'."
        )


def check_class_range(labels: Tensor, classes: int, ignore_index: int = MISSING_LABEL) -> None:
    """`ValueError` for a label that is no class; only for labels on the CPU, where looking costs no synchronisation."""
    if labels.device.type != "cpu":
        return
    outside = labels[(labels != ignore_index) & ((labels < 0) | (labels >= classes))]
    if outside.numel():
        raise ValueError(
            f"label {outside[0].item()} is no class of the model, which has {classes} classes (0 to {classes - 1}): its probability "
            f"does not exist. Set num_labels (or fix label2id), and mark rows without a label with {ignore_index}."
        )


def check_label_smoothing(label_smoothing: float) -> float:
    if not 0 <= label_smoothing < 1:
        raise ValueError(
            f"label_smoothing must be at least 0 and below 1, got {label_smoothing!r}: at 1 the labels would not matter. "
            "Use 0 (off) to 0.2; 0.1 is usual."
        )
    return label_smoothing


TASK_LOSSES: dict[str, type[TaskLoss]] = {
    "single_label_classification": TaskCrossEntropyLoss,
    "multi_label_classification": TaskBinaryCrossEntropyLoss,
    "regression": TaskSquaredErrorLoss,
}
"""`problem_type` of a model -> its task loss. Token labels and language models are single-label, once per position."""
