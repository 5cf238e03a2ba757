"""Which metrics there are, and how to get one; importing this costs nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from ..suggest import nearest_or_all


if TYPE_CHECKING:
    import evaluate


GLUE_METRICS = {
    "cola": ("matthews_correlation",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearmanr"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
}
"""GLUE task -> its official metrics. The first is the one to choose models by."""

METRIC_NAMES = ("accuracy", "f1", "matthews_correlation", "pearson", "spearmanr", "token_f1", "span_f1", "glue", "squad", "squad_v2")


def load_metric(name: str, config_name: str | None = None) -> evaluate.Metric:
    """A metric by its name, without a network.

    Args:
        name (`str`): one of `METRIC_NAMES`.
        config_name (`str`, *optional*): for `"glue"`, the task; `"multilabel"` for the `"f1"` of rows of zeros and ones.

    Returns:
        `evaluate.Metric`: with `compute`, `add_batch` and a place in `evaluate.combine`. It keeps everything in memory.

    Raises:
        ValueError: for a name that is not in `METRIC_NAMES`, an unknown GLUE task, or `"span_f1"` where seqeval is missing.
    """
    if name not in METRIC_NAMES:
        raise ValueError(
            f"Unknown metric {name!r}.{nearest_or_all(name, METRIC_NAMES)} These work without a network; for others use evaluate.load, "
            "which fetches them from the Hub."
        )
    if name == "glue" and config_name not in GLUE_METRICS:
        raise ValueError(f"Unknown GLUE task {config_name!r}.{nearest_or_all(config_name, GLUE_METRICS)}")
    if name == "span_f1" and not has_seqeval():
        raise ValueError(
            "span_f1 counts whole entities with seqeval, which is not installed. `pip install hfdistill[ner]`, or measure single tokens "
            "with load_metric('token_f1')."
        )
    if name in ("squad", "squad_v2"):
        from .squad import SQUAD_METRICS

        return SQUAD_METRICS[name](config_name=config_name)
    from .local import LOCAL_METRICS

    return LOCAL_METRICS[name](config_name=config_name)


def glue_metric(task_name: str) -> evaluate.Metric:
    """The official metrics of a GLUE task: the numbers and names of `evaluate.load("glue", task_name)`, without a network.

    Raises:
        ValueError: for a task that is not one of the nine.
    """
    return load_metric("glue", task_name)


def metric_function(metric: evaluate.Metric, **options: Any) -> Callable[[Any], dict[str, float]]:
    """Turn a metric into the `compute_metrics` of a `Trainer`.

    Class scores become the class with the largest one; regression outputs of shape (rows, 1) are flattened. Of a tuple of
    predictions the first is taken. Positions labelled -100 do not count. For `load_metric("f1", "multilabel")` a label is
    predicted where its probability is above 0.5 (its score above 0), and rows without any label of their own do not count.

    Args:
        metric (`evaluate.Metric`): from [`load_metric`], [`glue_metric`] or `evaluate.combine`.
        options: handed to `metric.compute`, such as `average="macro"`.

    Raises:
        ValueError: by the returned function, for several labels a row and another metric.

    Example:
        >>> trainer = Trainer(..., compute_metrics=metric_function(load_metric("accuracy")))  # doctest: +SKIP
    """

    def compute_metrics(prediction) -> dict[str, float]:
        scores, labels = prediction.predictions, prediction.label_ids
        scores = scores[0] if isinstance(scores, tuple) else scores
        if getattr(metric, "config_name", None) == "multilabel":
            known = labels != -100
            rows = known.any(-1)
            decided = ((scores > 0) & known)[rows].astype(int)
            return metric.compute(predictions=decided, references=np.where(known, labels, 0)[rows].astype(int), **options)
        if scores.ndim > labels.ndim:
            scores = scores[..., 0] if scores.shape[-1] == 1 else scores.argmax(-1)
        elif scores.ndim == 2 and labels.ndim == 2 and scores.shape[-1] == 1:
            scores, labels = scores[:, 0], labels[:, 0]
        elif scores.ndim == labels.ndim == 2 and scores.dtype.kind == "f" and np.isin(labels, (0, 1, -100)).all():
            raise ValueError(
                f"Scores of shape {scores.shape} and as many labels of 0 and 1 are several labels a row, and this metric counts one. Use "
                'load_metric("f1", "multilabel").'
            )
        counted = labels != -100
        return metric.compute(predictions=scores[counted], references=labels[counted], **options)

    return compute_metrics


def has_seqeval() -> bool:
    """Whether `load_metric("span_f1")` can be had here."""
    return find_spec("seqeval") is not None


def marks_spans(label_names: Sequence[str]) -> bool:
    """Whether labels mark the tokens of entities (`B-PER`, `I-PER`, `O`; IOB and its relatives), so that whole entities can be counted.

    Example:
        >>> marks_spans(["O", "B-PER", "I-PER"]), marks_spans(["O", "COMMA", "PERIOD"])
        (True, False)
    """
    return all(re.fullmatch(r"O|[BIESLU]-.+", name) for name in label_names) and any(name != "O" for name in label_names)


def score_tags(metric: evaluate.Metric, predictions: Sequence, references: Sequence, label_names: Sequence[str]) -> dict[str, float]:
    """The value of `load_metric("token_f1")` or `load_metric("span_f1")` on rows of label ids.

    Args:
        metric (`evaluate.Metric`): one of the two.
        predictions: rows of label ids, `(rows, length)` or lists of any lengths.
        references: the same; positions of -100 do not count, in both.
        label_names: in order of the ids. Under `token_f1`, `O` does not count.
    """
    rows = [(np.asarray(p)[: len(r)], np.asarray(r)) for p, r in zip(predictions, references, strict=True)]
    rows = [(p[r != -100], r[r != -100]) for p, r in rows]
    if metric.name == "span_f1":
        named = [[[label_names[i] for i in own] for own in side] for side in zip(*rows, strict=True)]
        return metric.compute(predictions=named[0], references=named[1])
    guesses, truth = (np.concatenate(side) for side in zip(*rows, strict=True))
    return metric.compute(predictions=guesses, references=truth, labels=[i for i, name in enumerate(label_names) if name != "O"])


def tag_metric_function(metric: evaluate.Metric, label_names: Sequence[str]) -> Callable[[Any], dict[str, float]]:
    """[`score_tags`] as the `compute_metrics` of a `Trainer`: the label with the largest score of each token that has one of its own."""

    def compute_metrics(prediction) -> dict[str, float]:
        scores = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        return score_tags(metric, scores.argmax(-1), prediction.label_ids, label_names)

    return compute_metrics
