"""Exact match and F1 of answers, as SQuAD defines them, with no network."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean
from typing import Any

import datasets
import evaluate

from .answer_match import answer_f1, exact_match, normalize_answer
from .local import LocalMetric


class _AnswerMetric(LocalMetric):
    more: dict[str, Any] = {}

    def _info(self) -> evaluate.MetricInfo:
        answers = {"text": datasets.Value("string"), "answer_start": datasets.Value("int32")}
        features = {
            "predictions": {"id": datasets.Value("string"), "prediction_text": datasets.Value("string"), **self.more},
            "references": {"id": datasets.Value("string"), "answers": datasets.features.Sequence(answers)},
        }
        return evaluate.MetricInfo(
            description=type(self).__doc__, citation="", inputs_description="", features=datasets.Features(features)
        )


class Squad(_AnswerMetric):
    """Exact match and F1 in percent, the best over the accepted answers: `{"exact_match": ..., "f1": ...}`.

    Predictions are `{"id", "prediction_text"}` and references `{"id", "answers": {"text", "answer_start"}}`: the numbers of
    `evaluate.load("squad")`, of [Rajpurkar et al. 2016](https://huggingface.co/papers/1606.05250). A question without a
    prediction is an error here, not a 0.
    """

    def _compute(self, predictions, references):
        texts = _by_id(predictions, references)
        exact, f1 = [], []
        for reference in references:
            text, accepted = texts[reference["id"]], reference["answers"]["text"]
            if not accepted:
                raise ValueError(
                    f"The question {reference['id']!r} has no answer to compare with. Use the metric 'squad_v2', where that is allowed."
                )
            exact.append(max(exact_match(text, answer) for answer in accepted))
            # The first script gives 0 where no word is shared, also when nothing but articles is left of both.
            f1.append(max(answer_f1(text, answer) for answer in accepted) if normalize_answer(text) else 0.0)
        return {"exact_match": 100 * fmean(exact), "f1": 100 * fmean(f1)}


class SquadV2(_AnswerMetric):
    """Exact match and F1 in percent, where "no answer" (an empty text) is an answer: the numbers of `evaluate.load("squad_v2")`.

    `exact`, `f1`, `total`, the same of questions with an answer (`HasAns_`) and without one (`NoAns_`), and the best that any
    threshold on `no_answer_probability` could have reached (`best_exact`, `best_f1` and their `_thresh`), of [Rajpurkar et
    al. 2018](https://huggingface.co/papers/1806.03822). Predictions also hold `no_answer_probability`. A question without a
    prediction is an error.
    """

    more = {"no_answer_probability": datasets.Value("float32")}

    def _compute(self, predictions, references, no_answer_threshold=1.0):
        texts = _by_id(predictions, references)
        probability = {prediction["id"]: prediction["no_answer_probability"] for prediction in predictions}
        answerable, raw = {}, {"exact": {}, "f1": {}}
        for reference in references:
            name = reference["id"]
            answerable[name] = bool(reference["answers"]["text"])
            accepted = [text for text in reference["answers"]["text"] if normalize_answer(text)] or [""]
            for kind, score in (("exact", exact_match), ("f1", answer_f1)):
                raw[kind][name] = max(score(texts[name], answer) for answer in accepted)
        groups = {"": list(answerable)}
        groups["HasAns_"] = [name for name, has in answerable.items() if has]
        groups["NoAns_"] = [name for name, has in answerable.items() if not has]
        values: dict[str, float] = {}
        for prefix, names in groups.items():
            for kind in ("exact", "f1"):
                refused = {name: float(not answerable[name]) for name in names if probability[name] > no_answer_threshold}
                if names:
                    values[f"{prefix}{kind}"] = 100 * fmean(refused.get(name, raw[kind][name]) for name in names)
                    values[f"{prefix}total"] = len(names)
        for kind, scores in raw.items():
            values[f"best_{kind}"], values[f"best_{kind}_thresh"] = _best_threshold(texts, scores, probability, answerable)
        return values


SQUAD_METRICS = {"squad": Squad, "squad_v2": SquadV2}


def _by_id(predictions: Iterable[dict], references: Iterable[dict]) -> dict[str, str]:
    texts = {prediction["id"]: prediction["prediction_text"] for prediction in predictions}
    missing = [reference["id"] for reference in references if reference["id"] not in texts]
    if missing:
        raise ValueError(
            f"{len(missing)} questions have no prediction (the first is {missing[0]!r}), so they could not be counted. Predict an empty "
            "text where there is no answer, and compare the ids of both sides."
        )
    return texts


def _best_threshold(texts, scores, probability, answerable) -> tuple[float, float]:
    """The best score in percent if questions above a threshold of `no_answer_probability` were left unanswered, and that threshold."""
    current = best = float(sum(not has for has in answerable.values()))
    threshold = 0.0
    for name in sorted(scores, key=probability.get):
        current += scores[name] if answerable[name] else -1 if texts[name] else 0
        if current > best:
            best, threshold = current, probability[name]
    return 100 * best / len(scores), threshold
