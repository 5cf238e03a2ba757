"""The SQuAD metrics against values worked out by hand and a second reading of the official definition."""

from __future__ import annotations

import random

import pytest

from hfdistill.metrics import answer_agreement, answer_f1, exact_match, load_metric, normalize_answer


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat, sat!", "cat sat"),
        ("an A-team", "ateam"),  # punctuation goes before articles
        ("theatre a", "theatre"),
        ("“quotes”", "“quotes”"),  # only ASCII punctuation
        ("the", ""),
        ("U.S.", "us"),
    ],
)
def test_normalisation(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("answer", "reference", "f1", "exact"),
    [
        ("Denver Broncos", "The Denver Broncos", 1.0, 1.0),
        ("Denver", "Denver Broncos", 2 / 3, 0.0),  # precision 1, recall 1/2
        ("in 1998 and 1999", "1998", 0.4, 0.0),  # precision 1/4, recall 1
        ("a a b b", "b b b", 0.8, 0.0),  # articles gone: 2 shared of 2 and 3
        ("", "x", 0.0, 0.0),
        ("", "", 1.0, 1.0),
        ("x", "y", 0.0, 0.0),
    ],
)
def test_known_values(answer, reference, f1, exact):
    assert answer_f1(answer, reference) == pytest.approx(f1) and exact_match(answer, reference) == exact


def answers(*texts):
    return {"text": list(texts), "answer_start": [0] * len(texts)}


def test_squad_takes_the_best_of_several_answers():
    metric = load_metric("squad")
    predictions = [{"id": "1", "prediction_text": "blue"}, {"id": "0", "prediction_text": "the green light"}]
    references = [
        {"id": "0", "answers": answers("green", "green traffic light", "red")},
        {"id": "1", "answers": answers("blue", "x")},
    ]
    assert metric.compute(predictions=predictions, references=references) == pytest.approx({"exact_match": 50.0, "f1": 90.0})
    metric.add_batch(predictions=predictions, references=references)
    assert metric.compute()["f1"] == pytest.approx(90.0)
    with pytest.raises(ValueError, match=r"1 questions have no prediction \(the first is '0'\)"):
        metric.compute(predictions=[predictions[0], {"id": "x", "prediction_text": ""}], references=references)
    with pytest.raises(ValueError, match="The question '0' has no answer to compare with. Use the metric 'squad_v2'"):
        metric.compute(predictions=predictions, references=[{"id": "0", "answers": answers()}, references[1]])


def test_squad_v2_with_and_without_answers():
    metric = load_metric("squad_v2")
    texts = {"a": "cat", "b": "", "c": "dog", "d": ""}
    probability = {"a": 0.1, "b": 0.2, "c": 0.7, "d": 0.9}
    accepted = {"a": ["the cat"], "b": ["house"], "c": [], "d": []}
    values = metric.compute(
        predictions=[{"id": k, "prediction_text": texts[k], "no_answer_probability": probability[k]} for k in texts],
        references=[{"id": k, "answers": answers(*accepted[k])} for k in texts],
    )
    assert values["exact"] == values["f1"] == 50.0 and values["total"] == 4
    assert (values["HasAns_exact"], values["HasAns_total"], values["NoAns_f1"], values["NoAns_total"]) == (50.0, 2, 50.0, 2)
    # Answering only below 0.1: a is right, c and d are rightly left, b is not.
    assert values["best_exact"] == 75.0 and values["best_exact_thresh"] == pytest.approx(0.1)
    strict = metric.compute(
        predictions=[{"id": k, "prediction_text": texts[k], "no_answer_probability": probability[k]} for k in texts],
        references=[{"id": k, "answers": answers(*accepted[k])} for k in texts],
        no_answer_threshold=0.5,
    )
    assert strict["exact"] == 75.0


def share_right(texts, probability, accepted, threshold):
    right = 0
    for k in texts:
        text = "" if probability[k] > threshold else texts[k]
        right += max(exact_match(text, answer) for answer in accepted[k] or [""])
    return 100 * right / len(texts)


def test_squad_v2_against_every_threshold():
    """The best threshold by trying all of them."""
    generator = random.Random(0)
    words = ["cat", "dog", "the cat", ""]
    metric = load_metric("squad_v2")
    for _ in range(10):
        texts = {str(k): generator.choice(words) for k in range(12)}
        probability = {k: round(generator.random(), 6) for k in texts}
        accepted = {k: generator.choice([["cat"], ["dog", "a dog cat"], []]) for k in texts}
        values = metric.compute(
            predictions=[{"id": k, "prediction_text": texts[k], "no_answer_probability": probability[k]} for k in texts],
            references=[{"id": k, "answers": answers(*accepted[k])} for k in texts],
        )

        tried = [share_right(texts, probability, accepted, threshold) for threshold in [-1.0, *(p + 1e-7 for p in probability.values())]]
        assert values["best_exact"] == pytest.approx(max(tried))
        assert values["exact"] == pytest.approx(share_right(texts, probability, accepted, 1.0))


def test_agreement_of_answers():
    assert answer_agreement(["A cat!", "dog", "x"], ["cat", "the dog", "y"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no answers to compare"):
        answer_agreement([], [])
