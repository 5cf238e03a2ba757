"""Each loss against a second one, written from the formula: NumPy, float64, probabilities instead of logs, loops over unpadded rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfdistill.losses import (
    AttentionKLLoss,
    AttentionMSELoss,
    AttentionScoreMSELoss,
    BinarySoftTargetsLoss,
    CosineLoss,
    HiddenMomentsLoss,
    HiddenMSELoss,
    LogitMSELoss,
    NormalizedHiddenMSELoss,
    RegressionMSELoss,
    SoftTargetsLoss,
    TaskBinaryCrossEntropyLoss,
    TaskCrossEntropyLoss,
    TaskSquaredErrorLoss,
)


SEEDS = range(4)


def softmax(row):
    e = np.exp(np.asarray(row) - np.max(row))
    return e / e.sum()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def ragged(seed, *widths):
    """Arrays `(batch, length, width)`, one for each width, and lengths; the padding is garbage."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 6, size=rng.integers(1, 5))
    arrays = [rng.normal(size=(len(lengths), lengths.max(), width)) * 2 for width in widths]
    return lengths, arrays


def check(value, rows, count=None):
    """`rows` are the reference's rows: their sum is the total, their number the count."""
    assert value.count.item() == (len(rows) if count is None else count)
    assert value.total.item() == pytest.approx(math.fsum(rows), rel=1e-10)


def run(loss, student, teacher, lengths):
    mask = torch.arange(student.shape[1])[None, :] < torch.tensor(lengths)[:, None]
    return loss(torch.from_numpy(student), torch.from_numpy(teacher), mask)


def token_rows(student, teacher, lengths, row):
    return [row(student[b, i], teacher[b, i]) for b, n in enumerate(lengths) for i in range(n)]


def squared(s, t):
    return sum((a - b) ** 2 for a, b in zip(s, t)) / len(s)


def soft_targets(T):
    return lambda s, t: T * T * kl(softmax(t / T), softmax(s / T))


def binary_soft_targets(T):
    def row(s, t):
        p, q = sigmoid(t / T), sigmoid(s / T)
        return T * T * sum(kl((a, 1 - a), (b, 1 - b)) for a, b in zip(p, q)) / len(s)

    return row


def normalized(s, t):
    return squared(*((x - math.fsum(x) / len(x)) / math.sqrt(np.var(x)) for x in (s, t)))


def moments(s, t):
    (a, b), (x, z) = ((math.fsum(v) / len(v), math.fsum(v * v) / len(v)) for v in (s, t))
    return 3 * (a - x) ** 2 + 0.5 * abs((b - a * a) - (z - x * x))


ROWS = {
    "soft targets 1": (SoftTargetsLoss(1.0), soft_targets(1.0)),
    "soft targets 3": (SoftTargetsLoss(3.0), soft_targets(3.0)),
    "binary 1": (BinarySoftTargetsLoss(1.0), binary_soft_targets(1.0)),
    "binary 3": (BinarySoftTargetsLoss(3.0), binary_soft_targets(3.0)),
    "logits": (LogitMSELoss(), squared),
    "logits centred": (LogitMSELoss(centered=True), lambda s, t: np.var(s - t)),
    "regression": (RegressionMSELoss(), squared),
    "hidden": (HiddenMSELoss(), squared),
    "normalized hidden": (NormalizedHiddenMSELoss(), normalized),
    "hidden moments": (HiddenMomentsLoss(3.0, 0.5), moments),
    "cosine": (CosineLoss(), lambda s, t: 1 - math.fsum(s * t) / math.sqrt(math.fsum(s * s) * math.fsum(t * t))),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ROWS)
def test_row_losses(name, seed):
    loss, row = ROWS[name]
    lengths, (student, teacher) = ragged(seed, 6, 6)
    check(run(loss, student, teacher, lengths), token_rows(student, teacher, lengths, row))


# ------------------------------------------------------------------------------------------------------------ attention


def attention_inputs(seed, student_heads, teacher_heads, pattern):
    """Scores and, for each sample and query, the list of keys it may see (none for padding)."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 6, size=rng.integers(1, 4))
    longest = lengths.max()
    student = rng.normal(size=(len(lengths), student_heads, longest, longest)) * 2
    teacher = rng.normal(size=(len(lengths), teacher_heads, longest, longest)) * 2
    seen = {
        (b, q): [k for k in range(n) if {"full": True, "causal": k <= q, "window": abs(k - q) < 2}[pattern]]
        for b, n in enumerate(lengths)
        for q in range(n)
    }
    mask = torch.zeros(len(lengths), 1, longest, longest, dtype=torch.bool)
    for (b, q), keys in seen.items():
        mask[b, 0, q, keys] = True
    return student, teacher, seen, mask


def maps(scores, b, q, keys, of, average):
    heads = [of(scores[b, h, q, keys]) for h in range(scores.shape[1])]
    return [sum(heads) / len(heads)] if average else heads


def score_rows(student, teacher, seen, average, center):
    of = (lambda row: row - row.mean()) if center else np.asarray
    for (b, q), keys in seen.items():
        s, t = (maps(scores, b, q, keys, of, average) for scores in (student, teacher))
        yield sum(((x - z) ** 2).sum() for x, z in zip(s, t)) / len(s)


def probability_rows(student, teacher, seen, average, compare):
    for (b, q), keys in seen.items():
        s, t = (maps(scores, b, q, keys, softmax, average) for scores in (student, teacher))
        yield sum(compare(x, z) for x, z in zip(s, t)) / len(s)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("pattern", ["full", "causal", "window"])
@pytest.mark.parametrize("heads,student_heads,teacher_heads", [("equal", 3, 3), ("mean", 3, 3), ("mean", 2, 4)])
def test_attention_losses(seed, pattern, heads, student_heads, teacher_heads):
    student, teacher, seen, mask = attention_inputs(seed, student_heads, teacher_heads, pattern)
    s, t, average = torch.from_numpy(student), torch.from_numpy(teacher), heads == "mean"
    pair_count, row_count = sum(map(len, seen.values())), len(seen)
    for center in (False, True):
        expected = list(score_rows(student, teacher, seen, average, center))
        if math.fsum(expected) > 1e-20:  # one visible key each: centred scores are all 0
            check(AttentionScoreMSELoss(heads, center)(s, t, mask), expected, pair_count)
    expected = list(probability_rows(student, teacher, seen, average, lambda x, z: kl(z, x)))
    value = AttentionKLLoss(heads)(s, t, mask)
    assert value.count.item() == row_count and value.total.item() == pytest.approx(math.fsum(expected), rel=1e-10, abs=1e-14)
    expected = list(probability_rows(student, teacher, seen, average, lambda x, z: ((x - z) ** 2).sum()))
    for reduction, count in (("pairs", pair_count), ("keys", row_count)):
        value = AttentionMSELoss(heads, reduction)(s, t, mask)
        assert value.count.item() == count and value.total.item() == pytest.approx(math.fsum(expected), rel=1e-10, abs=1e-14)


def test_attention_between_different_lengths_of_queries_and_keys():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 2, 3, 2, 5))
    expected = [kl(softmax(teacher[b, h, q]), softmax(student[b, h, q])) / 3 for b in range(2) for h in range(3) for q in range(2)]
    check(AttentionKLLoss()(torch.from_numpy(student), torch.from_numpy(teacher)), expected, count=4)


def test_row_constants_change_probabilities_losses_nothing_and_scores_unless_centred():
    student, teacher, _, mask = attention_inputs(3, 3, 3, "causal")
    s, t = torch.from_numpy(student), torch.from_numpy(teacher)
    shifted = s + torch.arange(s.size(2), dtype=s.dtype)[:, None] + 1
    for loss in (AttentionKLLoss(), AttentionMSELoss(), AttentionScoreMSELoss(center=True)):
        torch.testing.assert_close(loss(shifted, t, mask).total, loss(s, t, mask).total, rtol=1e-10, atol=1e-12)
    plain = AttentionScoreMSELoss()
    assert not torch.allclose(plain(shifted, t, mask).total, plain(s, t, mask).total)


def test_heads_in_another_order_on_both_sides_change_nothing():
    student, teacher, _, mask = attention_inputs(3, 3, 3, "full")
    s, t = torch.from_numpy(student), torch.from_numpy(teacher)
    for loss in (AttentionKLLoss(), AttentionMSELoss(), AttentionScoreMSELoss()):
        torch.testing.assert_close(loss(s[:, [2, 0, 1]], t[:, [2, 0, 1]], mask).total, loss(s, t, mask).total)
        assert not torch.allclose(loss(s[:, [2, 0, 1]], t, mask).total, loss(s, t, mask).total)


# ------------------------------------------------------------------------------------------------------------ limits and identities


def test_soft_targets_tend_to_half_the_centred_mse():
    _, (student, teacher) = ragged(1, 6, 6)
    s, t = torch.from_numpy(student), torch.from_numpy(teacher)
    limit = LogitMSELoss(centered=True)(s, t).mean / 2
    torch.testing.assert_close(SoftTargetsLoss(1e4)(s, t).mean, limit, rtol=1e-3, atol=0)


def test_binary_soft_targets_tend_to_an_eighth_of_the_mse():
    _, (student, teacher) = ragged(1, 6, 6)
    s, t = torch.from_numpy(student), torch.from_numpy(teacher)
    torch.testing.assert_close(BinarySoftTargetsLoss(1e4)(s, t).mean, LogitMSELoss()(s, t).mean / 8, rtol=1e-3, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_one_binary_label_is_a_softmax_over_logit_and_zero(temperature):
    _, (student, teacher) = ragged(2, 1, 1)
    s, t = torch.from_numpy(student), torch.from_numpy(teacher)
    two = [torch.cat([x, torch.zeros_like(x)], -1) for x in (s, t)]
    binary, softmax_ = BinarySoftTargetsLoss(temperature)(s, t), SoftTargetsLoss(temperature)(*two)
    torch.testing.assert_close(binary.total, softmax_.total, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_binary_soft_targets_have_the_gradient_of_binary_cross_entropy(temperature):
    _, (student, teacher) = ragged(2, 5, 5)
    s, t = torch.from_numpy(student).requires_grad_(), torch.from_numpy(teacher)
    (gradient,) = torch.autograd.grad(BinarySoftTargetsLoss(temperature)(s, t).total, s)
    expected = temperature * (sigmoid(student / temperature) - sigmoid(teacher / temperature)) / 5
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_a_one_hot_teacher_gives_the_plain_cross_entropy():
    _, (student,) = ragged(0, 6)
    s = torch.from_numpy(student)
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 6, size=student.shape[:2]))
    certain = torch.nn.functional.one_hot(labels, 6).double() * 1e3
    torch.testing.assert_close(SoftTargetsLoss(1.0)(s, certain).total, TaskCrossEntropyLoss()(s, labels).total, rtol=1e-12, atol=0)


def test_classes_that_both_models_rule_out_are_ignored():
    """-inf logits (suppressed tokens, padded vocabulary) must give neither NaN nor a gradient."""
    _, (student, teacher) = ragged(0, 5, 5)
    s, t = torch.from_numpy(student), torch.from_numpy(teacher)
    ruled_out = torch.full((*s.shape[:-1], 1), -float("inf"), dtype=s.dtype)
    wide = torch.cat([s, ruled_out], -1).requires_grad_()
    value = SoftTargetsLoss(2.0)(wide, torch.cat([t, ruled_out], -1))
    (gradient,) = torch.autograd.grad(value.total, wide)
    torch.testing.assert_close(value.total, SoftTargetsLoss(2.0)(s, t).total)
    assert torch.isfinite(gradient).all() and (gradient[..., -1] == 0).all()


@pytest.mark.parametrize("gap", [120.0, 1e4])
def test_certain_models_that_disagree_give_a_finite_loss(gap):
    s = torch.tensor([[gap, 0.0, -gap]], requires_grad=True)
    t = torch.tensor([[-gap, 0.0, gap]])
    for loss, expected in ((SoftTargetsLoss(1.0), 2 * gap), (BinarySoftTargetsLoss(1.0), 2 * gap / 3)):
        value = loss(s, t)
        (gradient,) = torch.autograd.grad(value.total, s)
        assert value.total.item() == pytest.approx(expected, rel=1e-6) and torch.isfinite(gradient).all()


def test_cosine_ignores_scale_and_ranges_from_zero_to_two():
    _, (student,) = ragged(0, 6)
    s = torch.from_numpy(student)
    rows = s.shape[0] * s.shape[1]
    assert CosineLoss()(s * 7, s / 3).total < 1e-12
    assert CosineLoss()(s, -2 * s).total.item() == pytest.approx(2 * rows)


def test_normalized_hidden_states_ignore_an_affine_change_of_each_token_and_the_moments_see_it():
    _, (student, teacher) = ragged(0, 6, 6)
    s, t = torch.from_numpy(student), torch.from_numpy(teacher)
    scale, shift = torch.rand(2, *s.shape[:2], 1, dtype=s.dtype) + 0.5
    torch.testing.assert_close(NormalizedHiddenMSELoss()(scale * s + shift, t).total, NormalizedHiddenMSELoss()(s, t).total)
    assert NormalizedHiddenMSELoss()(scale * s + shift, s).total < 1e-15
    rows = (3 * ((scale - 1) * s.mean(-1, keepdim=True) + shift) ** 2 + 0.5 * (scale**2 - 1).abs() * s.var(-1, False, keepdim=True)).sum()
    torch.testing.assert_close(HiddenMomentsLoss(3.0, 0.5)(scale * s + shift, s).total, rows)


def test_moments_are_those_of_mobilebert_by_default():
    """A student shifted by 0.1: 5000 * 0.01; twice the teacher with variance 1: 5 * 3."""
    t = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    assert HiddenMomentsLoss()(t + 0.1, t).total.item() == pytest.approx(50)
    assert HiddenMomentsLoss()(2 * t, t).total.item() == pytest.approx(15)


def test_a_constant_vector_has_no_direction_and_no_gradient():
    s = torch.tensor([[3.0, 3.0], [2.0, 4.0]], requires_grad=True)
    value = NormalizedHiddenMSELoss()(s, torch.tensor([[1.0, 2.0], [5.0, 5.0]]))
    (gradient,) = torch.autograd.grad(value.total, s)
    assert value.total.item() == pytest.approx(2.0) and gradient[0].tolist() == [0.0, 0.0] and torch.isfinite(gradient).all()


def test_a_zero_vector_has_cosine_zero_and_no_gradient():
    s = torch.tensor([[0.0, 0.0], [1.0, 1.0], [3.0, 0.0]], requires_grad=True)
    t = torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 2.0]])
    value = CosineLoss()(s, t)
    (gradient,) = torch.autograd.grad(value.total, s)
    assert value.total.item() == pytest.approx(3.0)
    np.testing.assert_allclose(gradient.numpy(), [[0, 0], [0, 0], [0, -1 / 3]], atol=1e-7)


shapes = st.tuples(st.integers(1, 4), st.integers(2, 7))


@settings(max_examples=25, deadline=None)
@given(shapes, st.integers(0, 2**16), st.floats(0.5, 20), st.floats(-50, 50))
def test_soft_targets_ignore_row_constants_and_class_order(shape, seed, temperature, constant):
    generator = torch.Generator().manual_seed(seed)
    s, t = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    loss = SoftTargetsLoss(temperature)
    expected = loss(s, t).total
    assert expected >= -1e-10
    order = torch.randperm(shape[1], generator=generator)
    torch.testing.assert_close(loss(s + constant, t - constant).total, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(loss(s[:, order], t[:, order]).total, expected, rtol=1e-9, atol=1e-11)


@settings(max_examples=25, deadline=None)
@given(shapes, st.integers(0, 2**16), st.floats(0.5, 20))
def test_binary_labels_are_independent(shape, seed, temperature):
    generator = torch.Generator().manual_seed(seed)
    s, t = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    loss = BinarySoftTargetsLoss(temperature)
    alone = sum(loss(s[:, [i]], t[:, [i]]).total for i in range(shape[1]))
    torch.testing.assert_close(loss(s, t).total * shape[1], alone, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ the task loss


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_cross_entropy(seed, smoothing, ignore_index):
    lengths, (logits,) = ragged(seed, 5)
    rng = np.random.default_rng(seed)
    labels = np.full(logits.shape[:2], ignore_index)
    rows = []
    for b, n in enumerate(lengths):
        for i in range(n):
            labels[b, i] = rng.integers(0, 5)
            if labels[b, i] != ignore_index:
                surprise = [-math.log(p) for p in softmax(logits[b, i])]
                rows.append((1 - smoothing) * surprise[labels[b, i]] + smoothing * sum(surprise) / 5)
    loss = TaskCrossEntropyLoss(ignore_index, smoothing)
    check(loss(torch.from_numpy(logits), torch.from_numpy(labels)), rows)
    flat = loss(torch.from_numpy(logits).flatten(0, 1), torch.from_numpy(labels).flatten().int())
    check(flat, rows)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_the_label_smoother_of_transformers(smoothing):
    """Its mean over labelled positions is what `Trainer` logs, so `label_smoothing_factor` keeps its meaning."""
    from transformers.trainer_pt_utils import LabelSmoother

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 5, generator=generator)
    labels = torch.randint(0, 5, (3, 7), generator=generator)
    labels[1, 4:] = -100
    expected = LabelSmoother(epsilon=smoothing)({"logits": logits}, labels)
    torch.testing.assert_close(TaskCrossEntropyLoss(label_smoothing=smoothing)(logits, labels).mean, expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_binary_cross_entropy(seed, smoothing):
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(6, 4)) * 2, rng.integers(0, 2, size=(6, 4))
    labels[rng.random((6, 4)) < 0.4] = -100
    labels[0] = -100
    rows = []
    for z, y in zip(logits, labels):
        terms = []
        for logit, label in zip(z, y):
            if label != -100:
                target = label * (1 - smoothing) + smoothing / 2
                terms.append(-target * math.log(sigmoid(logit)) - (1 - target) * math.log(1 - sigmoid(logit)))
        if terms:
            rows.append(sum(terms) / len(terms))
    loss = TaskBinaryCrossEntropyLoss(smoothing)
    check(loss(torch.from_numpy(logits), torch.from_numpy(labels)), rows)
    check(loss(torch.from_numpy(logits), torch.from_numpy(labels).double()), rows)


@pytest.mark.parametrize("seed", SEEDS)
def test_squared_error(seed):
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(6, 3)), rng.normal(size=(6, 3))
    labels[rng.random((6, 3)) < 0.4] = np.nan
    labels[0] = np.nan
    rows = [
        np.mean([(z - y) ** 2 for z, y in zip(zs, ys) if not math.isnan(y)]) for zs, ys in zip(logits, labels) if not np.isnan(ys).all()
    ]
    check(TaskSquaredErrorLoss()(torch.from_numpy(logits), torch.from_numpy(labels)), rows)


@pytest.mark.parametrize("loss", [TaskSquaredErrorLoss(), RegressionMSELoss()], ids=lambda loss: type(loss).__name__)
def test_a_column_and_a_vector_are_the_same_regression(loss):
    column, vector = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0.0, 4.0, 4.0])
    for student, other in ((column, vector), (column.flatten(), vector[:, None]), (column, vector[:, None]), (column.flatten(), vector)):
        value = loss(student, other)
        assert value.total.item() == 5.0 and value.count.item() == 3


def test_integer_targets_are_all_present_in_a_regression():
    value = TaskSquaredErrorLoss()(torch.zeros(2, 1), torch.tensor([-100, 3]))
    assert value.total.item() == 10009.0 and value.count.item() == 2
