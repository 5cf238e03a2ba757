"""From start and end logits to the text of an answer: what `postprocess_qa_predictions` of the Transformers examples does."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..metrics import load_metric


OUTSIDE = -1


def answer_texts(
    examples,
    features,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    n_best_size: int = 20,
    max_answer_length: int = 30,
    has_unanswerable: bool = False,
    null_score_diff_threshold: float = 0.0,
) -> list[dict[str, Any]]:
    """The best answer to each question, over all of its windows.

    Candidates of a window are pairs of its `n_best_size` best starts and ends that lie in the context, in order, and at most
    `max_answer_length` tokens apart; the sum of both logits is their score. Where questions may have no answer, the lowest
    score of the null position over the windows is compared with the best candidate: the answer is empty when it is higher by
    more than `null_score_diff_threshold`.

    Args:
        examples: rows with `id` and `context`.
        features: the windows of [`encode_spans`] with `for_evaluation=True`, in the order of the logits.
        start_logits, end_logits: `(windows, length)`, padded on the right where batches were.

    Returns:
        `list[dict]`: `id` and `prediction_text` of each example, and `no_answer_probability` (0.0) where questions may have no
        answer: what the SQuAD metrics take.

    Raises:
        ValueError: when there are not as many logits as windows.
    """
    if not len(features) == len(start_logits) == len(end_logits):
        raise ValueError(
            f"There are {len(start_logits)} rows of start logits and {len(end_logits)} of end logits for {len(features)} windows, so they "
            "would go to other questions. Pass the features that were predicted, in the same order."
        )
    windows = defaultdict(list)
    columns = zip(features["example_id"], features["null_position"], features["offset_mapping"], start_logits, end_logits)
    for example, null, offsets, starts, ends in columns:
        windows[example].append((null, np.asarray(offsets), np.asarray(starts, dtype=np.float64), np.asarray(ends, dtype=np.float64)))
    answers = []
    for example, context in zip(examples["id"], examples["context"]):
        null_score, best_score, text = float("inf"), -float("inf"), ""
        for null, offsets, starts, ends in windows[example]:
            null_score = min(null_score, starts[null] + ends[null])
            score, first, last = _best_pair(offsets, starts[: len(offsets)], ends[: len(offsets)], n_best_size, max_answer_length)
            if score > best_score:
                best_score, text = score, context[offsets[first][0] : offsets[last][1]]
        answer = {"id": example, "prediction_text": text}
        if has_unanswerable:
            refused = null_score - best_score > null_score_diff_threshold
            answer |= {"prediction_text": "" if refused else text, "no_answer_probability": 0.0}
        answers.append(answer)
    return answers


def _best_pair(offsets: np.ndarray, starts: np.ndarray, ends: np.ndarray, n_best: int, longest: int) -> tuple[float, int, int]:
    """`(score, first, last)`; the score is -inf where no pair is left."""
    first, last = (np.argsort(-logits, kind="stable")[:n_best] for logits in (starts, ends))
    inside = offsets[:, 0] != OUTSIDE
    length = last[None] - first[:, None] + 1
    allowed = inside[first][:, None] & inside[last][None] & (length > 0) & (length <= longest)
    scores = np.where(allowed, starts[first][:, None] + ends[last][None], -np.inf)
    row, column = np.unravel_index(scores.argmax(), scores.shape)
    return float(scores[row, column]), int(first[row]), int(last[column])


@dataclass
class AnswerScorer:
    """Measures the start and end logits of a `Trainer` with the SQuAD metrics; made to be its `compute_metrics`.

    Args:
        examples, features, n_best_size, max_answer_length, has_unanswerable, null_score_diff_threshold: as in [`answer_texts`].

    `scorer(prediction)` gives `exact_match` and `f1` in percent, or what `squad_v2` gives where questions may have no answer.
    """

    examples: Any
    features: Any
    n_best_size: int = 20
    max_answer_length: int = 30
    has_unanswerable: bool = False
    null_score_diff_threshold: float = 0.0

    def answers(self, predictions: tuple[np.ndarray, np.ndarray]) -> list[dict[str, Any]]:
        """The answers behind `(start logits, end logits)`."""
        options = (self.n_best_size, self.max_answer_length, self.has_unanswerable, self.null_score_diff_threshold)
        return answer_texts(self.examples, self.features, *predictions, *options)

    def score(self, answers: list[dict[str, Any]]) -> dict[str, float]:
        """The SQuAD metrics of some answers to these examples."""
        metric = load_metric("squad_v2" if self.has_unanswerable else "squad")
        return metric.compute(predictions=answers, references=answer_references(self.examples))

    def __call__(self, prediction) -> dict[str, float]:
        return self.score(self.answers(prediction.predictions))


def answer_references(examples) -> list[dict[str, Any]]:
    """What the SQuAD metrics compare with: `id` and `answers` of each example."""
    return [{"id": name, "answers": answers} for name, answers in zip(examples["id"], examples["answers"])]
