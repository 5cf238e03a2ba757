"""Metrics of token and of multi-label classification against counts by hand."""

import sys

import numpy as np
import pytest
from transformers import EvalPrediction

from hfdistill import load_metric, metric_function, score_tags, tag_metric_function
from hfdistill.metrics import marks_spans


NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
TRUE = [[1, 2, 0, 3, 4], [0, 0, 1], [3, -100, 4, 0]]
GUESS = [[1, 2, 0, 3, 3], [0, 1, 1], [3, 1, 4, 0, 2, 2]]  # longer rows are padding


def spans(row):
    """(type, start, end) of the entities of a row of IOB2 names that are well formed."""
    found = []
    for i, name in enumerate(row):
        if name.startswith("B-"):
            end = i + 1
            while end < len(row) and row[end] == f"I-{name[2:]}":
                end += 1
            found.append((name[2:], i, end))
    return found


def known(pairs):
    return [(guess, true) for guess, true in pairs if true != -100]


def test_whole_entities():
    rows = [known(zip(guess, true)) for guess, true in zip(GUESS, TRUE)]
    right = guessed = there = 0
    for row in rows:
        ours, theirs = (set(spans([NAMES[pair[side]] for pair in row])) for side in (0, 1))
        right, guessed, there = right + len(ours & theirs), guessed + len(ours), there + len(theirs)
    assert (right, guessed, there) == (3, 6, 4)
    values = score_tags(load_metric("span_f1"), GUESS, TRUE, NAMES)
    every = [pair for row in rows for pair in row]
    assert values == {
        "span_precision": pytest.approx(3 / 6),
        "span_recall": pytest.approx(3 / 4),
        "span_f1": pytest.approx(2 * 3 / (6 + 4)),
        "accuracy": pytest.approx(sum(a == b for a, b in every) / len(every)),
    }


def test_single_tokens():
    every = [pair for guess, true in zip(GUESS, TRUE) for pair in known(zip(guess, true))]
    counts = {label: [0, 0, 0] for label in range(1, 5)}  # both, guessed, there
    for guess, true in every:
        for label in counts:
            counts[label][0] += guess == true == label
            counts[label][1] += guess == label
            counts[label][2] += true == label
    by_label = [2 * both / (guessed + there) for both, guessed, there in counts.values()]
    both, guessed, there = np.sum(list(counts.values()), axis=0)
    values = score_tags(load_metric("token_f1"), GUESS, TRUE, NAMES)
    assert values == {
        "token_f1": pytest.approx(2 * both / (guessed + there)),
        "token_macro_f1": pytest.approx(np.mean(by_label)),
        "accuracy": pytest.approx(sum(a == b for a, b in every) / len(every)),
    }
    # O counts by its name, not by its number; labels that do not occur are no zeros in the mean.
    moved = score_tags(load_metric("token_f1"), [[1, 0, 2]], [[1, 0, 0]], ["A", "O", "B", "C"])
    assert moved == {"token_f1": pytest.approx(2 / 4), "token_macro_f1": pytest.approx((2 / 3 + 0) / 2), "accuracy": pytest.approx(2 / 3)}
    assert score_tags(load_metric("token_f1"), [[0, 0]], [[0, 0]], NAMES)["token_f1"] == 0.0


@pytest.mark.parametrize("name", ["span_f1", "token_f1"])
def test_as_compute_metrics(name):
    """Padded batches, logits, and the first of a tuple."""
    labels = np.full((3, 6), -100)
    logits = np.full((3, 6, 5), -100.0)
    for i, (guess, true) in enumerate(zip(GUESS, TRUE)):
        labels[i, : len(true)] = true
        for j, label in enumerate(guess):
            logits[i, j, label] = 1.0
    expected = score_tags(load_metric(name), GUESS, TRUE, NAMES)
    compute = tag_metric_function(load_metric(name), NAMES)
    assert compute(EvalPrediction(predictions=logits, label_ids=labels)) == expected
    assert compute(EvalPrediction(predictions=(logits, logits[..., :1]), label_ids=labels)) == expected


def test_which_labels_mark_entities():
    assert marks_spans(NAMES) and marks_spans(["O", "S-PER", "B-PER", "I-PER", "E-PER"]) and marks_spans(["I-PER", "O"])
    assert not marks_spans(["O", "COMMA"]) and not marks_spans(["O"]) and not marks_spans(["NOUN", "VERB"]) and not marks_spans(["O", "B-"])


def test_without_seqeval(monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        sys.modules["hfdistill.metrics.catalogue"], "find_spec", lambda name: None if name == "seqeval" else found(name)
    )
    with pytest.raises(ValueError, match=r"hfdistill\[ner\].*token_f1"):
        load_metric("span_f1")
    assert load_metric("token_f1").name == "token_f1"


def test_several_labels_a_row():
    """Probability above 0.5 is a logit above 0; a missing entry counts nowhere, nor does a row of them."""
    logits = np.array([[2.0, -1.0, 0.5], [-3.0, 4.0, -0.1], [1.0, 1.0, 1.0], [0.2, -0.2, 3.0]])
    labels = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [-100.0] * 3, [1.0, -100.0, 1.0]])
    compute = metric_function(load_metric("f1", "multilabel"), average="micro")
    # right: (0,0) (1,1) (3,0) (3,2); guessed besides: (0,2); missed: (1,2)
    assert compute(EvalPrediction(predictions=logits, label_ids=labels)) == {"f1": pytest.approx(2 * 4 / (5 + 5))}
    with pytest.raises(ValueError, match=r'Scores of shape \(4, 3\) and as many labels of 0 and 1.*load_metric\("f1", "multilabel"\)'):
        metric_function(load_metric("accuracy"))(EvalPrediction(predictions=logits, label_ids=labels))
    macro = metric_function(load_metric("f1", "multilabel"), average="macro")
    assert macro(EvalPrediction(predictions=logits, label_ids=labels)) == {"f1": pytest.approx((1 + 1 + 2 / 4) / 3)}
