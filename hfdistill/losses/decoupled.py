"""Decoupled distillation: soft targets in two parts, the labelled class against the rest, and the rest among themselves."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from .base import DistillationLoss, LossValue
from .logits import check_classes, check_temperature, check_weights
from .masking import check_mask, log_softmax_over, relative_entropy, select_rows, sum_rows
from .task import MISSING_LABEL


class DecoupledLoss(DistillationLoss):
    r"""Soft targets with a weight of their own for the classes that are not the label.

    `T² · sum over labelled rows of alpha · KL(b_t || b_s) + beta · KL(q_t || q_s)`,
    [DKD, Zhao et al. 2022](https://huggingface.co/papers/2203.08679). `b = (p_y, 1 - p_y)` is the probability of the
    labelled class and of all others together, `q` the softmax over the others alone, so the logit of the label plays no part in it.
    Soft targets ([`SoftTargetsLoss`]) weigh the second divergence by `1 - p_y` of the teacher, which silences it where the teacher is
    sure. Zero when `s - t` is constant in each row, otherwise positive.

    The paper's beta is 8 on CIFAR-100 (6 for some pairs of models, 2 for others) and 0.5 with T = 1 on ImageNet, with the labels at
    weight 1; it raises the weight of the loss from 0 over the first epochs (20 on CIFAR-100), which is the schedule of a term's weight.

    Args:
        alpha (`float`, defaults to 1.0): weight of the labelled class against the rest.
        beta (`float`, defaults to 8.0): weight of the rest among themselves.
        temperature (`float`, defaults to 4.0): T, the same for student and teacher. May follow a schedule.

    Shapes:
        student, teacher: `(..., classes)`, logits of at least 3 classes in the same order.
        labels: integer `(...)`, one class id for each row; -100 marks rows that do not count.
        mask: bool `(...)`, True at the rows that count; `None` for all.
        unit: labels, the rows of the mask with a label.

    Raises:
        ValueError: for weights that are negative, not finite or both 0, for a `temperature` that is not a finite number > 0, for fewer
            than 3 classes, and if the shapes differ or the labels are not one class id a row.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[9.0, 1.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])
        >>> value = DecoupledLoss(alpha=0.0)(student, teacher, labels=torch.tensor([0]))  # they differ in the label's logit only
        >>> value.total.item(), value.count.item()
        (0.0, 1)
    """

    one_class_a_row = True
    needs = ("labels",)
    unit = "labels"
    scheduled = ("temperature",)

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0):
        super().__init__()
        check_weights("Use alpha=1 and beta=8 (CIFAR-100) or 0.5 (ImageNet)", alpha=alpha, beta=beta)
        self.alpha, self.beta, self.temperature = alpha, beta, check_temperature(temperature)

    def check_widths(self, student: int, teacher: int) -> None:
        if min(student, teacher) < 3:
            raise ValueError(
                f"The student has {student} and the teacher {teacher} classes, but beside the label decoupled compares the other classes "
                "with each other: with fewer than 3 that part is always 0. Use soft_targets."
            )

    def compute(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None, labels: Tensor | None = None, temperature: float | None = None
    ) -> LossValue:
        check_classes(student, teacher)
        self.check_widths(student.size(-1), teacher.size(-1))
        check_mask(mask, student.shape[:-1])
        _check_labels(labels, student, mask)
        temperature = self.temperature if temperature is None else check_temperature(temperature)
        labels = labels.to(student.device)
        counted = labels != MISSING_LABEL if mask is None else mask & (labels != MISSING_LABEL)
        labels = torch.where(counted, labels, 0).long().unsqueeze(-1)
        student, teacher = select_rows(student, counted) / temperature, select_rows(teacher, counted) / temperature
        rows = self.alpha * _target_divergence(student, teacher, labels) + self.beta * _other_divergence(student, teacher, labels)
        return LossValue(*sum_rows(rows * temperature**2, counted))


def _target_divergence(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL between the pairs (labelled class, all others)."""
    pairs = []
    for logits in (student, teacher):
        log = log_softmax(logits, dim=-1)
        # log(1 - p) from p would be -inf for a sure model
        rest = log.scatter(-1, labels, float("-inf")).logsumexp(-1, keepdim=True)
        pairs.append(torch.cat([log.gather(-1, labels), rest], dim=-1))
    return relative_entropy(*pairs).sum(-1)


def _other_divergence(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL between the distributions over all classes but the labelled one."""
    absent = (student == float("-inf")) & (teacher == float("-inf"))
    others = ~absent.scatter(-1, labels, True)
    return relative_entropy(log_softmax_over(student, others), log_softmax_over(teacher, others)).sum(-1)


def _check_labels(labels: Tensor | None, logits: Tensor, mask: Tensor | None) -> None:
    rows, classes = tuple(logits.shape[:-1]), logits.size(-1)
    if labels is None:
        raise ValueError(
            f"No labels were given, but decoupled needs the class id of each row {rows}: it treats the labelled class and the others "
            "apart. Pass labels, or use soft_targets."
        )
    if labels.is_floating_point() or labels.dtype == torch.bool or tuple(labels.shape) != rows:
        raise ValueError(
            f"labels have dtype {labels.dtype} and shape {tuple(labels.shape)}, but decoupled takes one class id for each row, shape "
            f"{rows}: of soft labels (mixup, cutmix) or several labels no class is the labelled one. Pass integer labels, or use "
            "soft_targets."
        )
    if labels.device.type == "cpu":  # looking would cost a synchronisation elsewhere
        outside = labels[(labels != MISSING_LABEL) & ((labels < 0) | (labels >= classes)) & (True if mask is None else mask.cpu())]
        if outside.numel():
            raise ValueError(
                f"label {outside[0].item()} is no class of the model, which has {classes} classes (0 to {classes - 1}): its probability "
                f"does not exist. Set num_labels (or fix label2id), and mark rows without a label with {MISSING_LABEL}."
            )
