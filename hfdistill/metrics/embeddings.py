"""How good sentence embeddings are: search among all documents, and agreement with graded similarity. numpy and scipy only.

Plain functions: an `evaluate.Metric` would store every vector as a row of an Arrow table and could not rank across batches any
better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .distillation import _array


def cosine_matrix(first: Any, second: Any) -> np.ndarray:
    """Cosine of every row of `first` with every row of `second`; 0 where a vector is zero."""
    units = []
    for vectors in (first, second):
        vectors = _array(vectors).astype(np.float64)
        units.append(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))
    return units[0] @ units[1].T


def retrieval_metrics(scores: Any, cutoffs: Sequence[int] = (1, 10)) -> dict[str, float]:
    """Recall and mean reciprocal rank where document `i` is the one answer to query `i`.

    `recall_at_k` is the share of queries whose document is among the first k, `mrr_at_k` the mean of 1 / rank, 0 beyond k (for the
    largest k). Documents with the same score are placed before the right one: an encoder that gives every text the same vector
    finds nothing.

    Shapes:
        scores: `(queries, documents)`, such as [`cosine_matrix`]; there may be further documents.

    Raises:
        ValueError: for scores that are not finite, or fewer documents than queries.

    Example:
        >>> {name: round(value, 4) for name, value in retrieval_metrics([[0.9, 0.1], [0.8, 0.7]]).items()}
        {'recall_at_1': 0.5, 'recall_at_10': 1.0, 'mrr_at_10': 0.75}
    """
    scores = _array(scores).astype(np.float64)
    if scores.ndim != 2 or not 0 < scores.shape[0] <= scores.shape[1] or not np.isfinite(scores).all():
        raise ValueError(
            f"Scores must be finite, (queries, documents) with a document for each query, got shape {scores.shape}"
            f"{'' if np.isfinite(scores).all() else ' with values that are not finite'}. Check that the encoder has not diverged."
        )
    ranks = (scores >= np.diagonal(scores)[:, None] - 1e-9).sum(1)  # rounding must not break ties
    largest = max(cutoffs)
    recalls = {f"recall_at_{k}": float((ranks <= k).mean()) for k in cutoffs}
    return {**recalls, f"mrr_at_{largest}": float(np.where(ranks <= largest, 1 / ranks, 0).mean())}


def similarity_metrics(similarities: Any, scores: Any) -> dict[str, float]:
    """Rank correlation (and Pearson's) of similarities with graded ones; nan where one side is constant.

    Raises:
        ValueError: for different numbers of both, or fewer than two.
    """
    from scipy import stats

    ours, graded = _array(similarities).astype(np.float64), _array(scores).astype(np.float64)
    if ours.shape != graded.shape or ours.ndim != 1 or len(ours) < 2:
        raise ValueError(f"Expected one similarity and one score for each of at least two pairs, got {ours.shape} and {graded.shape}.")
    if np.ptp(ours) == 0 or np.ptp(graded) == 0:
        return {"spearmanr": float("nan"), "pearson": float("nan")}
    return {"spearmanr": float(stats.spearmanr(ours, graded)[0]), "pearson": float(stats.pearsonr(ours, graded)[0])}


def score_embeddings(vectors: Any, scores: Any = None) -> dict[str, float]:
    """Metrics of held-out pairs: retrieval, or with `scores` correlation of the cosine with them.

    Shapes:
        vectors: `(2 n, width)`: the first texts of all pairs, then the second ones.
        scores: `(n,)`, how alike the two of each pair are.
    """
    vectors = _array(vectors)
    first, second = np.split(vectors, 2)
    if scores is None:
        return retrieval_metrics(cosine_matrix(first, second))
    units = [part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12) for part in (first, second)]
    return similarity_metrics((units[0] * units[1]).sum(1), scores)


def embedding_metrics(scores: Any = None) -> Callable[[Any], dict[str, float]]:
    """[`score_embeddings`] as the `compute_metrics` of a trainer; labels are the numbers of the rows, see [`encode_sentences`]."""

    def compute_metrics(prediction) -> dict[str, float]:
        return score_embeddings(np.asarray(prediction.predictions)[np.argsort(prediction.label_ids)], scores)

    return compute_metrics


def retrieval_agreement(student_vectors: Any, teacher_vectors: Any) -> float:
    """Share of queries for which student and teacher find the same document first; widths may differ.

    Shapes:
        student_vectors, teacher_vectors: as in [`score_embeddings`], in the same order of rows.
    """
    found = [cosine_matrix(*np.split(_array(vectors), 2)).argmax(1) for vectors in (student_vectors, teacher_vectors)]
    return float((found[0] == found[1]).mean())
