"""When are two answers the same? As the scripts of SQuAD have it; plain Python."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence


_PUNCTUATION = set(string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space.

    Example:
        >>> normalize_answer("The  Old Man, and a Sea.")
        'old man and sea'
    """
    text = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, reference: str) -> float:
    """1.0 when both are the same after [`normalize_answer`]."""
    return float(normalize_answer(answer) == normalize_answer(reference))


def answer_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the words of both, after [`normalize_answer`]; no word on both sides is a match.

    Example:
        >>> round(answer_f1("the cat sat", "a cat sat down"), 4)
        0.8
    """
    ours, theirs = normalize_answer(answer).split(), normalize_answer(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * sum((Counter(ours) & Counter(theirs)).values()) / (len(ours) + len(theirs))


def answer_agreement(student_answers: Sequence[str], teacher_answers: Sequence[str]) -> float:
    """Share of questions to which student and teacher give the same answer, after [`normalize_answer`]; right or wrong.

    Example:
        >>> answer_agreement(["the sea", "a fish"], ["Sea.", "two fish"])
        0.5
    """
    pairs = list(zip(student_answers, teacher_answers, strict=True))
    if not pairs:
        raise ValueError("There are no answers to compare. Predict at least one question.")
    return sum(exact_match(*pair) for pair in pairs) / len(pairs)
