"""Retrieval and similarity of sentence embeddings, against loops and by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hfdistill.baselines import chance_level, pair_baselines
from hfdistill.metrics import cosine_matrix, embedding_metrics, retrieval_agreement, retrieval_metrics, score_embeddings, similarity_metrics


def draw(rows=30, width=4, seed=0):
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(rows, width))
    return first, first + rng.normal(size=(rows, width)), rng


def by_loop(first, second, cutoff):
    found = []
    for i, query in enumerate(first):
        cosine = [sum(a * b for a, b in zip(query, d)) / math.hypot(*query) / math.hypot(*d) for d in second]
        found.append(sorted(range(len(second)), key=lambda j: -cosine[j]).index(i) + 1)
    recall = {k: sum(rank <= k for rank in found) / len(found) for k in (1, cutoff)}
    return recall[1], recall[cutoff], sum(1 / rank for rank in found if rank <= cutoff) / len(found)


@pytest.mark.parametrize("cutoff", [3, 10])
def test_retrieval_against_a_loop(cutoff):
    first, second, _ = draw()
    values = retrieval_metrics(cosine_matrix(first, second), cutoffs=(1, cutoff))
    expected = by_loop(first.tolist(), second.tolist(), cutoff)
    assert 0.1 < expected[0] < expected[2] < expected[1] < 1
    assert (values["recall_at_1"], values[f"recall_at_{cutoff}"], values[f"mrr_at_{cutoff}"]) == pytest.approx(expected)


def test_best_worst_and_collapsed():
    assert retrieval_metrics(np.eye(20)) == {"recall_at_1": 1.0, "recall_at_10": 1.0, "mrr_at_10": 1.0}
    assert retrieval_metrics(-np.eye(20))["mrr_at_10"] == 0.0
    same = np.tile(np.random.default_rng(0).normal(size=7), (40, 1)).astype(np.float32)
    assert retrieval_metrics(cosine_matrix(same, same * 3))["mrr_at_10"] == 0.0  # one vector for every text finds nothing
    assert retrieval_metrics(cosine_matrix(np.zeros((11, 2)), np.ones((11, 2))))["recall_at_10"] == 0.0
    further = np.hstack([np.eye(3), np.full((3, 12), 2.0)])
    assert retrieval_metrics(further)["recall_at_10"] == 0.0


def test_scores_that_cannot_be_ranked():
    with pytest.raises(ValueError, match="not finite"):
        retrieval_metrics(np.array([[float("nan")]]))
    with pytest.raises(ValueError, match=r"got shape \(3, 2\)"):
        retrieval_metrics(np.zeros((3, 2)))


def test_similarity_against_ranks_by_hand():
    values = similarity_metrics([0.1, 0.5, 0.3, 0.9], [0.0, 5.0, 3.0, 4.0])
    assert values["spearmanr"] == pytest.approx(1 - 6 * 2 / (4 * 15))  # two neighbours swapped
    x, y = np.array([0.1, 0.5, 0.3, 0.9]) - 0.45, np.array([0.0, 5.0, 3.0, 4.0]) - 3
    assert values["pearson"] == pytest.approx((x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()))
    assert math.isnan(similarity_metrics([1, 1, 1], [1, 2, 3])["spearmanr"])
    for ours, graded in (([1.0], [1.0]), ([1.0, 2.0], [1.0, 2.0, 3.0])):
        with pytest.raises(ValueError, match="one similarity and one score"):
            similarity_metrics(ours, graded)


def test_scores_of_vectors_use_the_cosine_of_the_two_halves():
    first, second, rng = draw()
    scale = rng.uniform(0.1, 10, size=(60, 1))
    vectors = np.concatenate([first, second]) * scale
    assert score_embeddings(torch.tensor(vectors)) == pytest.approx(retrieval_metrics(cosine_matrix(first, second)))
    cosine = [float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(first, second)]
    graded = np.round(5 * np.array(cosine))
    assert score_embeddings(vectors, graded) == pytest.approx(similarity_metrics(cosine, graded))


def test_rows_are_put_in_order_by_their_numbers():
    first, second, rng = draw()
    vectors = np.concatenate([first, second])
    order = rng.permutation(60)
    shuffled = SimpleNamespace(predictions=vectors[order], label_ids=order)
    assert embedding_metrics()(shuffled) == score_embeddings(vectors)
    scores = rng.normal(size=30)
    assert embedding_metrics(scores)(shuffled) == score_embeddings(vectors, scores)


def test_agreement_compares_what_is_found_first():
    first, second, rng = draw()
    vectors = np.concatenate([first, second])
    turned = vectors @ np.linalg.qr(rng.normal(size=(9, 9)))[0][:4]  # other width, same cosines
    assert retrieval_agreement(turned, vectors) == 1.0
    other = vectors.copy()
    other[[30, 31]] = other[[31, 30]]  # two documents change places, and those who found one of them now find the other
    found = cosine_matrix(first, second).argmax(1)
    assert retrieval_agreement(other, vectors) == pytest.approx(1 - np.isin(found, [0, 1]).mean())


def test_chance_is_what_random_vectors_get():
    rng = np.random.default_rng(0)
    runs = [retrieval_metrics(rng.normal(size=(60, 60))) for _ in range(300)]
    for metric in ("recall_at_1", "recall_at_10", "mrr_at_10"):
        assert np.mean([run[metric] for run in runs]) == pytest.approx(chance_level(metric, 60), rel=0.1)
    assert chance_level("spearmanr", 60) == 0 and chance_level("recall_at_10", 4) == 1.0


def test_baselines_of_pairs():
    from datasets import Dataset

    queries, documents = ["red apple", "green tree", "blue sky"], ["an apple that is red", "sky of deep blue", "a tree, green all year"]
    test = Dataset.from_dict({"query": queries, "document": documents})
    data = SimpleNamespace(transfer=Dataset.from_dict({"text": [*queries, *documents]}), evaluation={"test": test})
    values = pair_baselines(data, "recall_at_1")
    assert values == {"tfidf_cosine": pytest.approx(1 / 3), "chance": pytest.approx(1 / 3)}  # two documents are exchanged
    graded = data.evaluation["test"].add_column("score", [5.0, 0.1, 0.0])
    data.evaluation = {"test": graded}
    assert pair_baselines(data, "spearmanr")["tfidf_cosine"] > 0.8 and pair_baselines(data, "spearmanr")["chance"] == 0
