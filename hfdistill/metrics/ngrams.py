"""Counting baselines of language models, asked about the very tokens that the models are asked about."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np


IGNORED = -100


class NgramBaselines:
    """The most frequent token, the most frequent one behind its left neighbour, and the most frequent one between both neighbours.

    What a neural model must beat to have learnt more than its neighbours. Counted on `input_ids` of training rows, special tokens
    included as neighbours (they say where texts begin and end) but never answered. A context that did not occur backs off: both
    neighbours (or, causal, the last two tokens), then the left one, then the most frequent token. Of equally frequent tokens the
    one with the smallest id is taken.

    Args:
        rows (iterable): training rows with `input_ids`.
        special_ids (sequence): ids that are no answers.
        causal (`bool`, defaults to `False`): trigrams of two left neighbours instead of one on each side.

    Raises:
        ValueError: when the rows hold no ordinary token.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], special_ids: Sequence[int] = (), causal: bool = False):
        special = set(special_ids)
        self.causal = causal
        single: Counter = Counter()
        left: dict = defaultdict(Counter)
        both: dict = defaultdict(Counter)
        for row in rows:
            ids = [int(i) for i in row["input_ids"]]
            for i, token in enumerate(ids):
                if token in special:
                    continue
                single[token] += 1
                if i:
                    left[ids[i - 1]][token] += 1
                if (context := self._context(ids, i)) is not None:
                    both[context][token] += 1
        if not single:
            raise ValueError("The training rows hold no ordinary token, so there is nothing to count. Pass encoded text.")
        self._most_frequent = _best(single)
        self._left = {context: _best(counts) for context, counts in left.items()}
        self._both = {context: _best(counts) for context, counts in both.items()}

    def _context(self, ids: list[int], i: int) -> tuple[int, int] | None:
        if self.causal:
            return (ids[i - 2], ids[i - 1]) if i > 1 else None
        return (ids[i - 1], ids[i + 1]) if 0 < i < len(ids) - 1 else None

    def scores(self, rows: Iterable[Mapping[str, Any]], context: str = "input") -> dict[str, float]:
        """Share of labelled tokens that each baseline gets right.

        Args:
            rows (iterable): with `input_ids` and `labels` (-100 where nothing is asked). For a causal model `labels` may be left
                out: every token but the first of a row is asked.
            context (`str`, defaults to `"input"`): neighbours as the model sees them, masked and replaced; or `"original"`, as
                they were before, which no model is told. Causal rows have no difference.

        Returns:
            `dict`: `most_frequent`, `left_bigram` and `trigram`.

        Raises:
            ValueError: for another `context`, or no labelled token.
        """
        if context not in ("input", "original"):
            raise ValueError(f"context must be 'input' or 'original', got {context!r}: which neighbours would it be?")
        right, asked = np.zeros(3, dtype=np.int64), 0
        for row in rows:
            ids = [int(i) for i in row["input_ids"]]
            labels = [int(i) for i in row["labels"]] if row.get("labels") is not None else ids
            seen = ids if context == "input" else [i if label == IGNORED else label for i, label in zip(ids, labels)]
            for i, label in enumerate(labels):
                if label == IGNORED or (self.causal and i == 0):
                    continue
                bigram = self._left.get(seen[i - 1], self._most_frequent) if i else self._most_frequent
                trigram = self._both.get(self._context(seen, i), bigram)
                right += [self._most_frequent == label, bigram == label, trigram == label]
                asked += 1
        if not asked:
            raise ValueError("No token of these rows has a label, so there is nothing to measure. Mask the rows first.")
        return dict(zip(("most_frequent", "left_bigram", "trigram"), (right / asked).tolist(), strict=True))


def _best(counts: Counter) -> int:
    return min(counts, key=lambda token: (-counts[token], token))
