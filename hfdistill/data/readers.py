"""Readers that have learnt nothing: what a question answering model has to beat."""

from __future__ import annotations

import re
from typing import Any


STEM = 5
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`'\"(\[])")
_COMMON = frozenset("what who where when which why how does do did of in on at to is are was were the a an and".split())


def sentences_of(context: str) -> list[str]:
    """`context` cut behind full stops, question and exclamation marks, where a capital, a quotation mark or a bracket follows."""
    return SENTENCE_END.split(context.strip())


def word_overlap(question: str, context: str) -> str:
    """The sentence that shares most words with the question, compared by their first five letters; the first one of equals.

    Example:
        >>> word_overlap("What does reader position of buffer do?", "Close it. Return the positions of the reader. Return nothing.")
        'Return the positions of the reader.'
    """

    def stems(text: str) -> set[str]:
        return {word[:STEM] for word in re.findall(r"\w+", text.lower())} - _COMMON

    asked = stems(question)
    return max(sentences_of(context), key=lambda sentence: len(asked & stems(sentence)))


def reading_baselines(examples, has_unanswerable: bool = False) -> dict[str, list[dict[str, Any]]]:
    """The answers of readers without a model: `word_overlap`, and `first_sentence`, as predictions for the SQuAD metrics.

    Args:
        examples: rows with `id`, `question` and `context`.
        has_unanswerable: add the `no_answer_probability` (0.0) that the metric of SQuAD 2 asks for.
    """
    columns = list(zip(examples["id"], examples["question"], examples["context"]))
    readers = {"word_overlap": word_overlap, "first_sentence": lambda question, context: sentences_of(context)[0]}
    more = {"no_answer_probability": 0.0} if has_unanswerable else {}
    return {
        name: [{"id": row, "prediction_text": read(question, context), **more} for row, question, context in columns]
        for name, read in readers.items()
    }
