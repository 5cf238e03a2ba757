from itertools import combinations

import numpy as np
import pytest
import torch

from hfdistill.models.similarity import increasing_assignment, linear_cka, representative_blocks, similar_layer_map


def features(rows, width, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cka_by_hsic(x, y):
    """Equation 3 of the paper: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with centring matrices."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    n = len(x)
    centre = np.eye(n) - 1 / n
    hsic = lambda a, b: np.trace(a @ a.T @ centre @ b @ b.T @ centre) / (n - 1) ** 2  # noqa: E731
    return hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))


@pytest.mark.parametrize("rows, dx, dy", [(50, 4, 7), (6, 9, 5), (8, 8, 8), (10, 4, 30), (2, 3, 3)])
def test_cka_is_the_ratio_of_hsic(rows, dx, dy):
    x, y = features(rows, dx, 1) + 3.0, features(rows, dy, 2) - 1.0
    y[:, :2] += x[:, :2]
    assert linear_cka(x, y) == pytest.approx(cka_by_hsic(x, y), abs=1e-12)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x), abs=1e-12)


def test_cka_is_one_for_rotated_scaled_shifted_features_and_not_for_stretched_ones():
    x = features(40, 6)
    rotation = torch.linalg.qr(features(6, 6, 5)).Q
    assert linear_cka(x, 17.0 * x @ rotation + 4.0) == pytest.approx(1.0, abs=1e-12)
    assert linear_cka(x, x * torch.tensor([100.0, 1, 1, 1, 1, 1], dtype=torch.float64)) < 0.9


def test_cka_of_unrelated_and_orthogonal_features():
    x, y = torch.zeros(4, 1), torch.zeros(4, 1)
    x[:, 0], y[:, 0] = torch.tensor([1.0, -1, 1, -1]), torch.tensor([1.0, 1, -1, -1])
    assert linear_cka(x, y) == 0.0


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567])
def test_cka_of_constant_features_is_zero(value):
    for rows in (7, 30, 1001):  # the mean of many equal numbers is not always that number
        constant = torch.full((rows, 4), value, dtype=torch.float64)
        assert linear_cka(constant, features(rows, 4)) == 0.0
        assert linear_cka(features(rows, 4), constant) == 0.0
        assert linear_cka(constant, constant) == 0.0


def test_cka_of_half_precision_is_computed_in_float64():
    x, y = features(60, 8).bfloat16() * 300, features(60, 8, 1).bfloat16() * 300
    assert linear_cka(x, y) == pytest.approx(cka_by_hsic(x.double(), y.double()), abs=1e-12)


def test_cka_refuses_what_cannot_be_compared():
    with pytest.raises(ValueError, match=r"same rows, got \(3, 2\) and \(4, 2\)"):
        linear_cka(features(3, 2), features(4, 2))
    with pytest.raises(ValueError, match="Flatten tokens into rows"):
        linear_cka(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="not finite"):
        linear_cka(torch.full((3, 2), float("nan")), features(3, 2))


@pytest.mark.parametrize("student, teacher", [(1, 1), (1, 6), (2, 5), (3, 7), (4, 4), (4, 8)])
@pytest.mark.parametrize("seed", range(5))
def test_assignment_is_the_best_of_all_increasing_ones(student, teacher, seed):
    similarity = torch.rand(student, teacher, generator=torch.Generator().manual_seed(seed))
    best = max(combinations(range(teacher), student), key=lambda blocks: sum(similarity[s, t].double() for s, t in enumerate(blocks)))
    assert increasing_assignment(similarity) == list(enumerate(best))


def test_assignment_with_negative_values_and_ties():
    assert increasing_assignment(torch.tensor([[-3.0, -1.0, -2.0]])) == [(0, 1)]
    assert increasing_assignment(torch.ones(2, 5)) == [(0, 0), (1, 1)]


@pytest.mark.parametrize("similarity", [torch.zeros(3, 2), torch.zeros(4), torch.tensor([[float("nan")]]), torch.zeros(0, 2)])
def test_assignment_refuses_bad_similarities(similarity):
    with pytest.raises(ValueError, match="student no deeper than its teacher"):
        increasing_assignment(similarity)


def test_similar_finds_planted_twins_of_another_width():
    teacher = [features(64, 12, seed) for seed in range(6)]
    student = [0.5 * teacher[t] @ torch.linalg.qr(features(12, 12, 50 + t)).Q[:, :9] + 1.0 for t in (1, 2, 5)]
    assert similar_layer_map(student, teacher) == [(0, 1), (1, 2), (2, 5)]


def test_representatives_stand_for_planted_groups():
    # Groups 0-1, 2-5, 6: members are noisy copies of the cleanest one of each group.
    groups, clean = [(0, 1), (2, 3, 4, 5), (6,)], {0: 0, 1: 4, 2: 6}
    hidden = [None] * 7
    for g, members in enumerate(groups):
        base = features(80, 6, g)
        for member in members:
            hidden[member] = base + (0.0 if member == clean[g] else 0.4) * features(80, 6, 20 + member)
    chosen = representative_blocks(hidden, 3)
    # In a group of two both are equally near to each other, and the later one is taken.
    assert chosen == [1, 4, 6]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_representatives_maximise_over_all_contiguous_groups(count):
    hidden = [features(30, 5, seed) for seed in range(6)]
    hidden = [sum(hidden[: k + 1]) for k in range(6)]
    cka = np.array([[cka_by_hsic(a, b) for b in hidden] for a in hidden])

    def total(cuts):
        bounds = [0, *cuts, 6]
        return sum(max(cka[m, a:b].sum() for m in range(a, b)) for a, b in zip(bounds, bounds[1:], strict=False))

    cuts = max(combinations(range(1, 6), count - 1), key=total)
    bounds = [0, *cuts, 6]
    # Of a group of two both represent it equally well: the later one is the documented choice.
    expected = [max(range(a, b), key=lambda m: (round(cka[m, a:b].sum(), 9), m)) for a, b in zip(bounds, bounds[1:], strict=False)]
    assert representative_blocks(hidden, count) == expected


@pytest.mark.parametrize("count", [0, 4])
def test_representatives_refuse_impossible_counts(count):
    with pytest.raises(ValueError, match=f"Cannot choose {count} representatives of 3 blocks"):
        representative_blocks([features(4, 2)] * 3, count)
