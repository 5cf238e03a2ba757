"""Metrics that need no network. The `evaluate.Metric` classes are imported when first asked for: evaluate takes seconds."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .answer_match import answer_agreement, answer_f1, exact_match, normalize_answer
from .catalogue import (
    GLUE_METRICS,
    METRIC_NAMES,
    glue_metric,
    has_seqeval,
    load_metric,
    marks_spans,
    metric_function,
    score_tags,
    tag_metric_function,
)
from .distillation import agreement, expected_calibration_error, gap_closed
from .embeddings import cosine_matrix, embedding_metrics, retrieval_agreement, retrieval_metrics, score_embeddings, similarity_metrics


if TYPE_CHECKING:
    from .local import F1, Accuracy, Glue, MatthewsCorrelation, Pearson, SpanF1, Spearman, TokenF1
    from .squad import Squad, SquadV2


_CLASSES = ("Accuracy", "F1", "Glue", "MatthewsCorrelation", "Pearson", "SpanF1", "Spearman", "TokenF1")
_SQUAD = ("Squad", "SquadV2")

__all__ = [
    "F1",
    "GLUE_METRICS",
    "METRIC_NAMES",
    "Accuracy",
    "Glue",
    "MatthewsCorrelation",
    "Pearson",
    "SpanF1",
    "Spearman",
    "Squad",
    "SquadV2",
    "TokenF1",
    "agreement",
    "answer_agreement",
    "answer_f1",
    "cosine_matrix",
    "embedding_metrics",
    "exact_match",
    "expected_calibration_error",
    "gap_closed",
    "glue_metric",
    "has_seqeval",
    "load_metric",
    "marks_spans",
    "metric_function",
    "normalize_answer",
    "retrieval_agreement",
    "retrieval_metrics",
    "score_embeddings",
    "similarity_metrics",
    "score_tags",
    "tag_metric_function",
]


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(importlib.import_module(".local", __name__), name)
    if name in _SQUAD:
        return getattr(importlib.import_module(".squad", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
