"""Metrics that need no network. The `evaluate.Metric` classes are imported when first asked for: evaluate takes seconds."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .catalogue import GLUE_METRICS, METRIC_NAMES, glue_metric, load_metric, metric_function
from .distillation import agreement, expected_calibration_error, gap_closed


if TYPE_CHECKING:
    from .local import F1, Accuracy, Glue, MatthewsCorrelation, Pearson, Spearman


_CLASSES = ("Accuracy", "F1", "Glue", "MatthewsCorrelation", "Pearson", "Spearman")

__all__ = [
    "F1",
    "GLUE_METRICS",
    "METRIC_NAMES",
    "Accuracy",
    "Glue",
    "MatthewsCorrelation",
    "Pearson",
    "Spearman",
    "agreement",
    "expected_calibration_error",
    "gap_closed",
    "glue_metric",
    "load_metric",
    "metric_function",
]


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(importlib.import_module(".local", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
