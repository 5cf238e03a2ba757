"""`evaluate.Metric` classes that work with no network and leave no file behind.

`evaluate.load("accuracy")` fetches a script from the Hub and fails without one. Importing this module imports evaluate,
which takes seconds; `hfdistill.metrics` therefore imports it on first use only.
"""

from __future__ import annotations

import os

import datasets
import evaluate
import numpy as np
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from .catalogue import GLUE_METRICS


class LocalMetric(evaluate.Metric):
    """Base class: predictions and references stay in memory, and no cache folder is created."""

    dtype = "int64"

    def __init__(self, config_name: str | None = None, **kwargs):
        super().__init__(config_name=config_name, **{"keep_in_memory": True, **kwargs})

    def _build_data_dir(self) -> str:
        return os.path.join(self._data_dir_root, self.name, self.config_name)

    def _info(self) -> evaluate.MetricInfo:
        features = {name: datasets.Value(self.dtype) for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description=type(self).__doc__, citation="", inputs_description="", features=datasets.Features(features), format="numpy"
        )


class Accuracy(LocalMetric):
    """Share of predictions that equal their reference: `{"accuracy": ...}`."""

    def _compute(self, predictions, references, normalize=True, sample_weight=None):
        return {"accuracy": float(accuracy_score(references, predictions, normalize=normalize, sample_weight=sample_weight))}


class F1(LocalMetric):
    """Harmonic mean of precision and recall: `{"f1": ...}`. `average="macro"` and others as in scikit-learn.

    With `config_name="multilabel"` each prediction and reference is a row of one 0 or 1 for each label, as in `evaluate`; name
    an `average` then.
    """

    def _info(self) -> evaluate.MetricInfo:
        info = super()._info()
        if self.config_name == "multilabel":
            info.features = datasets.Features(dict.fromkeys(info.features, datasets.Sequence(datasets.Value(self.dtype))))
        return info

    def _compute(self, predictions, references, labels=None, pos_label=1, average="binary", sample_weight=None):
        score = f1_score(references, predictions, labels=labels, pos_label=pos_label, average=average, sample_weight=sample_weight)
        return {"f1": float(score) if np.ndim(score) == 0 else score.tolist()}


class MatthewsCorrelation(LocalMetric):
    """Correlation between predicted and true classes: `{"matthews_correlation": ...}`; 0 for a constant prediction."""

    def _compute(self, predictions, references, sample_weight=None):
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions, sample_weight=sample_weight))}


class Pearson(LocalMetric):
    """Linear correlation: `{"pearson": ...}`; nan where one side is constant, as it is not defined there."""

    dtype = "float64"

    def _compute(self, predictions, references):
        return {"pearson": _correlation(stats.pearsonr, predictions, references)}


class Spearman(LocalMetric):
    """Correlation of ranks: `{"spearmanr": ...}`; nan where one side is constant, as it is not defined there."""

    dtype = "float64"

    def _compute(self, predictions, references):
        return {"spearmanr": _correlation(stats.spearmanr, predictions, references)}


class TokenF1(LocalMetric):
    """F1 of single tokens over the labels that mean something: `{"token_f1": ..., "token_macro_f1": ..., "accuracy": ...}`.

    `labels` are the ids that count, all but that of `O` (default: all but 0). `token_f1` is their micro average,
    `token_macro_f1` the mean over those of them that occur; `accuracy` is over all labels. Texts are mostly `O`, so that
    accuracy hardly tells a good model from one that answers `O` always, whose F1 is 0.
    """

    def _compute(self, predictions, references, labels=None):
        seen = sorted({*references.tolist(), *predictions.tolist()})
        counted = [label for label in seen if (label != 0 if labels is None else label in labels)]
        options = {"labels": counted, "zero_division": 0.0}
        return {
            "token_f1": float(f1_score(references, predictions, average="micro", **options)) if counted else 0.0,
            "token_macro_f1": float(f1_score(references, predictions, average="macro", **options)) if counted else 0.0,
            "accuracy": float(accuracy_score(references, predictions)),
        }


class SpanF1(LocalMetric):
    """Whole entities, right in both ends and in type: `{"span_f1": ..., "span_precision": ..., "span_recall": ..., "accuracy": ...}`.

    The overall `f1`, `precision`, `recall` and (per token) `accuracy` of `run_ner.py`, that is of seqeval in its default mode.
    Predictions and references are rows of label names such as `B-PER`, `I-PER`, `O`.
    """

    def _info(self) -> evaluate.MetricInfo:
        info = super()._info()
        info.features = datasets.Features(dict.fromkeys(info.features, datasets.Sequence(datasets.Value("string"))))
        return info

    def _compute(self, predictions, references):
        from seqeval import metrics

        rows = [list(map(str, row)) for row in references], [list(map(str, row)) for row in predictions]
        options = {"zero_division": 0}
        return {
            "span_f1": float(metrics.f1_score(*rows, **options)),
            "span_precision": float(metrics.precision_score(*rows, **options)),
            "span_recall": float(metrics.recall_score(*rows, **options)),
            "accuracy": float(metrics.accuracy_score(*rows)),
        }


class Glue(LocalMetric):
    """The official metrics of one GLUE task, named by `config_name`: the numbers of `evaluate.load("glue", task)`."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in GLUE_METRICS:
            raise ValueError(f"Unknown GLUE task {self.config_name!r}. Known: {', '.join(GLUE_METRICS)}.")
        self.dtype = "float64" if self.config_name == "stsb" else "int64"
        return super()._info()

    def _compute(self, predictions, references):
        values = {}
        for name in GLUE_METRICS[self.config_name]:
            values |= LOCAL_METRICS[name]._compute(self, predictions, references)
        return values


LOCAL_METRICS = {
    "accuracy": Accuracy,
    "f1": F1,
    "matthews_correlation": MatthewsCorrelation,
    "pearson": Pearson,
    "spearmanr": Spearman,
    "token_f1": TokenF1,
    "span_f1": SpanF1,
    "glue": Glue,
}


def _correlation(function, predictions, references) -> float:
    if len(predictions) < 2 or np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return float("nan")
    return float(function(predictions, references)[0])
