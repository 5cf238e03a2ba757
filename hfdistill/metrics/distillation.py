"""Numbers that say what distillation did; plain functions on arrays, numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np


def agreement(student_logits: Any, teacher_logits: Any) -> float:
    r"""Share of rows on which student and teacher choose the same class.

    "Top-1 agreement" of [Stanton et al., 2021](https://huggingface.co/papers/2106.05945). It needs no labels, and a student
    may agree with its teacher less than its accuracy suggests.

    Shapes:
        student_logits, teacher_logits: (..., classes), arrays or tensors; every position counts, so leave padding out.

    Raises:
        ValueError: for different shapes, no rows, or fewer than two classes (regression has no classes to agree on).

    Example:
        >>> agreement([[2.0, 1.0], [0.0, 3.0]], [[5.0, 0.0], [1.0, 0.0]])
        0.5
    """
    student, teacher = _array(student_logits), _array(teacher_logits)
    if student.shape != teacher.shape:
        raise ValueError(
            f"Logits of shape {student.shape} (student) and {teacher.shape} (teacher) cannot be compared row by row. Compute both on the "
            "same rows in the same order, with the same labels."
        )
    if student.ndim < 2 or student.shape[-1] < 2 or student.size == 0:
        raise ValueError(
            f"Agreement needs logits of at least one row and two classes, got shape {student.shape}. For regression compare the outputs "
            "with load_metric('pearson')."
        )
    return float((student.argmax(-1) == teacher.argmax(-1)).mean())


def gap_closed(alone: float, distilled: float, teacher: float) -> float | None:
    """How much of the way from the student alone to its teacher distillation went: 0 not at all, 1 all of it.

    `(distilled - alone) / (teacher - alone)`. Below 0 where distillation did harm, above 1 where the student overtook its
    teacher.

    Returns:
        `float` or `None`: `None` when the teacher is no better than the student alone: there is no gap, and the quotient
        would have the wrong sign.

    Example:
        >>> gap_closed(alone=0.5, distilled=0.75, teacher=0.9)
        0.625
        >>> gap_closed(alone=0.9, distilled=0.8, teacher=0.7) is None
        True
    """
    if teacher <= alone:
        return None
    return float((distilled - alone) / (teacher - alone))


def expected_calibration_error(logits: Any, labels: Any, bins: int = 15) -> float:
    r"""How far a model's confidence is from its accuracy, on average over bins of equal width.

    \\(\sum_b \frac{|B_b|}{n} |acc(B_b) - conf(B_b)|\\), where the confidence of a row is its largest softmax probability
    ([Guo et al., 2017](https://huggingface.co/papers/1706.04599), equation 3). 0 for a perfectly calibrated model. Bins are
    half-open, `(lower, upper]`.

    Shapes:
        logits: (..., classes); labels: (...), where -100 marks positions that do not count.

    Raises:
        ValueError: for shapes that do not fit, fewer than one bin, or no labelled row.
    """
    scores, labels = _array(logits).astype(np.float64), _array(labels)
    if scores.shape[:-1] != labels.shape or bins < 1:
        raise ValueError(f"Expected logits (..., classes), labels (...) and bins >= 1, got {scores.shape}, {labels.shape} and {bins}.")
    counted = labels != -100
    scores, labels = scores[counted], labels[counted]
    if not len(labels):
        raise ValueError("No row has a label (all are -100), so there is no accuracy to compare the confidence with.")
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    confidence = exponentials.max(-1) / exponentials.sum(-1)
    correct = scores.argmax(-1) == labels
    # ceil puts a confidence that equals an upper edge into the bin below it; rounding above 1 may not open another bin.
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return float(np.abs(np.bincount(place, correct - confidence, bins)).sum() / len(labels))


def _array(values: Any) -> np.ndarray:
    """Lists, arrays and tensors; bfloat16, which numpy lacks, through float32."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    return np.asarray(values)
