"""Which metrics there are, and how to get one; importing this costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

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

METRIC_NAMES = ("accuracy", "f1", "matthews_correlation", "pearson", "spearmanr", "glue")


def load_metric(name: str, config_name: str | None = None) -> evaluate.Metric:
    """A metric by its name, without a network.

    Args:
        name (`str`): one of `METRIC_NAMES`.
        config_name (`str`, *optional*): for `"glue"`, the task.

    Returns:
        `evaluate.Metric`: with `compute`, `add_batch` and a place in `evaluate.combine`. It keeps everything in memory.

    Raises:
        ValueError: for a name that is not in `METRIC_NAMES`, or an unknown GLUE task.
    """
    if name not in METRIC_NAMES:
        raise ValueError(
            f"Unknown metric {name!r}.{nearest_or_all(name, METRIC_NAMES)} These work without a network; for others use evaluate.load, "
            "which fetches them from the Hub."
        )
    if name == "glue" and config_name not in GLUE_METRICS:
        raise ValueError(f"Unknown GLUE task {config_name!r}.{nearest_or_all(config_name, GLUE_METRICS)}")
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
    predictions the first is taken. Positions labelled -100 do not count.

    Args:
        metric (`evaluate.Metric`): from [`load_metric`], [`glue_metric`] or `evaluate.combine`.
        options: handed to `metric.compute`, such as `average="macro"`.

    Example:
        >>> trainer = Trainer(..., compute_metrics=metric_function(load_metric("accuracy")))  # doctest: +SKIP
    """

    def compute_metrics(prediction) -> dict[str, float]:
        scores, labels = prediction.predictions, prediction.label_ids
        scores = scores[0] if isinstance(scores, tuple) else scores
        if scores.ndim > labels.ndim:
            scores = scores[..., 0] if scores.shape[-1] == 1 else scores.argmax(-1)
        elif scores.ndim == 2 and labels.ndim == 2 and scores.shape[-1] == 1:
            scores, labels = scores[:, 0], labels[:, 0]
        counted = labels != -100
        return metric.compute(predictions=scores[counted], references=labels[counted], **options)

    return compute_metrics
