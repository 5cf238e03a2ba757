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
    """Harmonic mean of precision and recall: `{"f1": ...}`. `average="macro"` and others as in scikit-learn."""

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
    "glue": Glue,
}


def _correlation(function, predictions, references) -> float:
    if len(predictions) < 2 or np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return float("nan")
    return float(function(predictions, references)[0])
