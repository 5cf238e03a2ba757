"""Metrics against formulas written out here, and the promises made to evaluate and to Trainer."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from hfdistill.metrics import (
    GLUE_METRICS,
    METRIC_NAMES,
    agreement,
    expected_calibration_error,
    gap_closed,
    glue_metric,
    load_metric,
    metric_function,
)


@pytest.fixture(autouse=True)
def no_cache(monkeypatch, tmp_path):
    """Metrics must not write: their cache root is a folder that does not exist and may not come into being."""
    import evaluate

    root = tmp_path / "never"
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(root))
    yield
    assert not root.exists()


RNG = np.random.default_rng(0)
PREDICTED, TRUE = RNG.integers(0, 2, 60), RNG.integers(0, 2, 60)
TP, FP, FN, TN = (int(((PREDICTED == p) & (TRUE == t)).sum()) for p, t in ((1, 1), (1, 0), (0, 1), (0, 0)))
BINARY = {
    "accuracy": (TP + TN) / 60,
    "f1": 2 * TP / (2 * TP + FP + FN),
    "matthews_correlation": (TP * TN - FP * FN) / math.sqrt((TP + FP) * (TP + FN) * (TN + FP) * (TN + FN)),
}
SCORES, TARGETS = np.round(RNG.normal(size=40), 1), np.round(RNG.normal(size=40), 1)  # rounded: ties matter to ranks


def covariance_correlation(a, b):
    a, b = a - a.mean(), b - b.mean()
    return (a @ b) / math.sqrt((a @ a) * (b @ b))


def average_ranks(values):
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


CORRELATIONS = {
    "pearson": covariance_correlation(SCORES, TARGETS),
    "spearmanr": covariance_correlation(average_ranks(SCORES), average_ranks(TARGETS)),
}


@pytest.mark.parametrize("name", BINARY)
def test_binary_metrics(name):
    assert TP != TN and FP != FN  # or a wrong positive class would not be seen
    assert load_metric(name).compute(predictions=PREDICTED, references=TRUE) == {name: pytest.approx(BINARY[name])}


@pytest.mark.parametrize("name", CORRELATIONS)
def test_correlations(name):
    assert load_metric(name).compute(predictions=SCORES, references=TARGETS) == {name: pytest.approx(CORRELATIONS[name])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a student that gives one answer is bad, not misuse
        constant = load_metric(name).compute(predictions=np.ones(4), references=np.arange(4.0))
    assert math.isnan(constant[name])


@pytest.mark.parametrize("task", GLUE_METRICS)
def test_glue(task):
    values = glue_metric(task).compute(
        **dict(zip(("predictions", "references"), (SCORES, TARGETS) if task == "stsb" else (PREDICTED, TRUE), strict=True))
    )
    official = {"cola": ["matthews_correlation"], "mrpc": ["accuracy", "f1"], "qqp": ["accuracy", "f1"], "stsb": ["pearson", "spearmanr"]}
    names = official.get(task, ["accuracy"])
    assert values == {name: pytest.approx({**BINARY, **CORRELATIONS}[name]) for name in names}
    assert all(type(value) is float for value in values.values())


def test_the_nine_tasks():
    assert set(GLUE_METRICS) == {"cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"}


def test_macro_f1():
    predictions, references = [0, 1, 2, 2, 1], [0, 2, 2, 1, 1]
    by_class = [1.0, 2 * 1 / (2 * 1 + 1 + 1), 2 * 1 / (2 * 1 + 1 + 1)]
    assert load_metric("f1").compute(predictions=predictions, references=references, average="macro")["f1"] == pytest.approx(
        sum(by_class) / 3
    )
    assert load_metric("f1").compute(predictions=predictions, references=references, average=None)["f1"] == pytest.approx(by_class)


def test_batches_and_reuse():
    metric = load_metric("accuracy")
    for part in (slice(0, 7), slice(7, 30), slice(30, 60)):
        metric.add_batch(predictions=PREDICTED[part], references=TRUE[part])
    assert metric.compute()["accuracy"] == pytest.approx(BINARY["accuracy"])
    assert metric.compute(predictions=[1], references=[1]) == {"accuracy": 1.0}  # nothing is left over


def test_combine():
    import evaluate

    values = evaluate.combine([load_metric("accuracy"), load_metric("f1")]).compute(predictions=PREDICTED, references=TRUE)
    assert values == pytest.approx({name: BINARY[name] for name in ("accuracy", "f1")})


def test_unknown_names():
    with pytest.raises(ValueError, match="Unknown metric 'acuracy'. Did you mean 'accuracy'?"):
        load_metric("acuracy")
    with pytest.raises(ValueError, match=f"Unknown metric 'zzz'. Known: {', '.join(METRIC_NAMES)}"):
        load_metric("zzz")
    with pytest.raises(ValueError, match="Unknown GLUE task 'sst-2'. Did you mean 'sst2'?"):
        glue_metric("sst-2")


def test_every_name_loads():
    from hfdistill.metrics.local import LOCAL_METRICS

    assert (*LOCAL_METRICS, "squad", "squad_v2") == METRIC_NAMES
    for name in METRIC_NAMES:
        assert load_metric(name, "mrpc" if name == "glue" else None).compute is not None


def test_as_compute_metrics_of_trainer():
    one_hot = np.eye(2)[PREDICTED]
    labels = np.where(np.arange(60) < 3, -100, TRUE)
    compute = metric_function(load_metric("accuracy"))
    assert compute(EvalPrediction(one_hot, TRUE))["accuracy"] == pytest.approx(BINARY["accuracy"])
    assert compute(EvalPrediction((one_hot, np.zeros(3)), TRUE))["accuracy"] == pytest.approx(BINARY["accuracy"])
    assert compute(EvalPrediction(PREDICTED, TRUE))["accuracy"] == pytest.approx(BINARY["accuracy"])
    assert compute(EvalPrediction(one_hot, labels))["accuracy"] == pytest.approx((PREDICTED[3:] == TRUE[3:]).mean())
    tokens = compute(EvalPrediction(one_hot.reshape(6, 10, 2), labels.reshape(6, 10)))
    assert tokens["accuracy"] == pytest.approx((PREDICTED[3:] == TRUE[3:]).mean())
    regression = metric_function(glue_metric("stsb"))
    for labels in (TARGETS, TARGETS[:, None]):
        assert regression(EvalPrediction(SCORES[:, None], labels)) == pytest.approx(CORRELATIONS)
    assert "f1" in metric_function(load_metric("f1"), average="macro")(EvalPrediction(np.eye(3)[[0, 1, 2]], np.array([0, 2, 1])))


def test_agreement():
    student = torch.tensor([[0.1, 0.9, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 5.0], [1.0, 0.0, 0.0]])
    teacher = torch.tensor([[9.0, 9.5, 0.0], [0.0, 1.0, 0.0], [-3.0, -2.0, -1.0], [1.0, 0.0, 0.0]])
    assert agreement(student, teacher) == 0.75
    assert agreement(student.bfloat16(), teacher.numpy()) == 0.75
    assert agreement(student.reshape(2, 2, 3), teacher.reshape(2, 2, 3)) == 0.75
    assert agreement(student, student) == 1.0


def test_agreement_refuses():
    with pytest.raises(ValueError, match=r"\(2, 3\) \(student\) and \(2, 4\) \(teacher\)"):
        agreement(np.zeros((2, 3)), np.zeros((2, 4)))
    for shape in ((4, 1), (0, 3), (4,)):
        with pytest.raises(ValueError, match="at least one row and two classes"):
            agreement(np.zeros(shape), np.zeros(shape))


def test_gap_closed():
    assert gap_closed(0.4, 0.6, 0.8) == pytest.approx(0.5)
    assert gap_closed(0.4, 0.3, 0.8) == pytest.approx(-0.25)
    assert gap_closed(0.4, 0.9, 0.8) == pytest.approx(1.25)
    assert gap_closed(0.8, 0.9, 0.8) is None and gap_closed(0.9, 0.95, 0.8) is None


def test_calibration_error_against_plain_loops():
    logits, labels = RNG.normal(size=(50, 4)) * 2, RNG.integers(0, 4, 50)
    rows = []
    for row, label in zip(logits, labels, strict=True):
        probabilities = [math.exp(x) / sum(math.exp(y) for y in row) for x in row]
        rows.append((max(probabilities), probabilities.index(max(probabilities)) == label))
    for bins in (1, 5, 15):
        edges = [i / bins for i in range(bins + 1)]
        expected = 0.0
        for low, high in itertools.pairwise(edges):
            inside = [row for row in rows if low < row[0] <= high]
            if inside:
                expected += abs(sum(hit for _, hit in inside) - sum(conf for conf, _ in inside)) / 50
        assert expected_calibration_error(logits, labels, bins) == pytest.approx(expected)


def test_calibration_error_by_hand():
    sure = np.array([[100.0, 0.0], [0.0, 100.0], [100.0, 0.0], [0.0, 100.0]])
    assert expected_calibration_error(sure, [0, 1, 0, 1]) == pytest.approx(0.0)
    assert expected_calibration_error(sure, [0, 1, 1, 1]) == pytest.approx(0.25)
    assert expected_calibration_error(sure, [0, -100, 1, -100]) == pytest.approx(0.5)
    # Confidence .5 lies on the edge of two bins and belongs to the lower one, apart from the fifth row (.6, and wrong).
    five = np.array([[0.0, 0.0]] * 4 + [[math.log(1.5), 0.0]])
    assert expected_calibration_error(five, [0, 0, 0, 1, 1], bins=2) == pytest.approx((abs(3 - 4 * 0.5) + 0.6) / 5)
    with pytest.raises(ValueError, match="No row has a label"):
        expected_calibration_error(sure, [-100] * 4)
    with pytest.raises(ValueError, match="labels"):
        expected_calibration_error(sure, [0, 1])


def test_importing_the_package_is_light():
    code = "import sys, hfdistill.metrics; print(sorted({'torch', 'datasets', 'evaluate', 'transformers', 'sklearn'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
