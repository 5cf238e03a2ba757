"""Decoupled, correlated, standardised and hard targets, and margins: numbers from outside this repository, and a second implementation of
each, written from the formula with NumPy, probabilities instead of logs and loops over rows."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from hfdistill.losses import LogitMSELoss, SoftTargetsLoss, TaskCrossEntropyLoss
from hfdistill.losses.correlation import DISTLoss
from hfdistill.losses.decoupled import DecoupledLoss
from hfdistill.losses.logits import HardTargetsLoss, StandardizedSoftTargetsLoss
from hfdistill.losses.ranking import MarginMSELoss


def g(shape, a, b=0.0):
    """`sin(a (i + 1) + b) (1 + ((7 i) mod 5) / 5)` for i = 0, 1, ..., row by row."""
    i = np.arange(math.prod(shape))
    return torch.from_numpy((np.sin(a * (i + 1) + b) * (1 + (7 * i) % 5 / 5)).reshape(shape))


zs, zt = 2 * g((6, 5), 1.3), 2 * g((6, 5), 0.7, 0.5)
y = torch.tensor([0, 1, 2, 3, 4, 0])


def deit(distillation, labels_weight=0.5):
    """Two heads: the class token learns the labels, the distillation token the teacher."""
    base = TaskCrossEntropyLoss()(zs, y).mean
    return labels_weight * base + (1 - labels_weight) * distillation(zs.flip(-1), zt).mean


GOLDEN = {
    "DKD": (lambda: DecoupledLoss()(zs, zt, labels=y).mean, 23.5278048951),
    "TCKD": (lambda: DecoupledLoss(alpha=1, beta=0)(zs, zt, labels=y).mean, 0.847158260654),
    "NCKD": (lambda: DecoupledLoss(alpha=0, beta=1)(zs, zt, labels=y).mean, 2.83508082931),
    "DKD as parts": (lambda: 0.847158260654 + 8 * DecoupledLoss(alpha=0, beta=1)(zs, zt, labels=y).mean, 23.5278048951),
    "DIST T=1": (lambda: DISTLoss()(zs, zt).mean, 1.69370388454),
    "DIST T=4": (lambda: DISTLoss(temperature=4.0)(zs, zt).mean, 29.2473295772),
    "standardised KD": (lambda: StandardizedSoftTargetsLoss()(zs, zt).mean, 0.732474281581),
    "DeiT soft, / (B C)": (lambda: deit(SoftTargetsLoss(3.0, class_reduction="mean")), 1.54852367351),
    "DeiT hard": (lambda: deit(HardTargetsLoss()), 2.41817160121),
    "margin MSE": (lambda: MarginMSELoss()(zs[:, :2], zt[:, :2]).mean, 6.06433003356),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    compute, expected = GOLDEN[name]
    assert float(compute()) == pytest.approx(expected, rel=1e-11)


# ------------------------------------------------------------------------------------------------------------ references


def softmax(row):
    e = [math.exp(x - max(row)) for x in row]
    return [x / math.fsum(e) for x in e]


def kl(p, q):
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q))


def decoupled(s, t, label, alpha, beta, T):
    p, q = softmax(t / T), softmax(s / T)
    target = kl((p[label], 1 - p[label]), (q[label], 1 - q[label]))
    rest = [[x / (1 - r[label]) for c, x in enumerate(r) if c != label] for r in (p, q)]
    return T * T * (alpha * target + beta * kl(*rest))


def standardized(s, t, T):
    def z(row):
        mean = math.fsum(row) / len(row)
        return [(x - mean) / (1e-7 + math.sqrt(math.fsum((y - mean) ** 2 for y in row) / (len(row) - 1))) / T for x in row]

    return T * T * kl(softmax(z(t)), softmax(z(s)))


def pearson(a, b):
    a, b = np.asarray(a) - math.fsum(a) / len(a), np.asarray(b) - math.fsum(b) / len(b)
    return math.fsum(a * b) / (math.sqrt(math.fsum(a * a)) * math.sqrt(math.fsum(b * b)) + 1e-8)


def dist(student, teacher, beta, gamma, T):
    q, p = (np.array([softmax(row / T) for row in rows]) for rows in (student, teacher))
    rows = 1 - np.mean([pearson(a, b) for a, b in zip(q, p)])
    classes = 1 - np.mean([pearson(q[:, c], p[:, c]) for c in range(q.shape[1])])
    return T * T * (beta * rows + gamma * classes)


def margin(s, t, positive):
    return np.mean([((s[positive] - s[j]) - (t[positive] - t[j])) ** 2 for j in range(len(s)) if j != positive])


ROWS = {
    "standardized": (StandardizedSoftTargetsLoss(3.0), lambda s, t: standardized(s, t, 3.0)),
    "soft, mean over classes": (SoftTargetsLoss(3.0, "mean"), lambda s, t: 9 * kl(softmax(t / 3), softmax(s / 3)) / len(s)),
    "hard": (HardTargetsLoss(), lambda s, t: -math.log(softmax(s)[max(range(len(t)), key=lambda c: t[c])])),
    "margin": (MarginMSELoss(), lambda s, t: margin(s, t, 0)),
    "margin positive=2": (MarginMSELoss(positive=2), lambda s, t: margin(s, t, 2)),
}


def draw(seed, classes=5):
    rng = np.random.default_rng(seed)
    shape = (rng.integers(1, 5), rng.integers(2, 6), classes)
    student, teacher, mask = rng.normal(size=shape) * 2, rng.normal(size=shape) * 2, rng.random(shape[:2]) < 0.7
    mask[0, :2] = True
    return student, teacher, mask


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ROWS)
def test_rows(name, seed):
    loss, row = ROWS[name]
    student, teacher, mask = draw(seed)
    rows = [row(s, t) for s, t in zip(student[mask], teacher[mask])]
    value = loss(*map(torch.from_numpy, (student, teacher, mask)))
    assert value.total.item() == pytest.approx(math.fsum(rows), rel=1e-10) and value.count.item() == len(rows)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (0.3, 2.0, 1.0), (0.0, 1.0, 2.0), (1.0, 0.0, 2.0)])
@pytest.mark.parametrize("masked", [False, True])
def test_decoupled(seed, alpha, beta, temperature, masked):
    student, teacher, mask = draw(seed)
    labels = np.random.default_rng(seed).integers(0, 5, size=mask.shape)
    labels[:, 1] = -100
    counted = (labels != -100) & (mask if masked else True)
    rows = [decoupled(s, t, label, alpha, beta, temperature) for s, t, label in zip(student[counted], teacher[counted], labels[counted])]
    labels[~mask] = 99 if masked else labels[~mask]  # what the mask leaves out is not looked at
    student, teacher, mask, labels = map(torch.from_numpy, (student, teacher, mask, labels))
    value = DecoupledLoss(alpha, beta, temperature)(student, teacher, mask if masked else None, labels=labels)
    assert value.total.item() == pytest.approx(math.fsum(rows), rel=1e-10) and value.count.item() == len(rows)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("beta", "gamma", "temperature"), [(1.0, 1.0, 1.0), (2.0, 0.0, 4.0), (0.0, 3.0, 2.0), (1.0, 2.0, 0.5)])
def test_dist(seed, beta, gamma, temperature):
    student, teacher, mask = draw(seed)
    expected = dist(student[mask], teacher[mask], beta, gamma, temperature)
    value = DISTLoss(beta, gamma, temperature)(*map(torch.from_numpy, (student, teacher, mask)))
    assert value.mean.item() == pytest.approx(expected, rel=1e-10) and value.count.item() == mask.sum()


# ------------------------------------------------------------------------------------------------------------ DKD


def test_soft_targets_are_the_target_part_plus_the_rest_weighted_by_the_teachers_doubt():
    doubt = 1 - (zt / 4).softmax(-1).gather(-1, y[:, None]).squeeze(-1)
    rows = [
        DecoupledLoss(1, 0)(s, t, labels=label).total + d * DecoupledLoss(0, 1)(s, t, labels=label).total
        for s, t, label, d in zip(zs.split(1), zt.split(1), y.split(1), doubt)
    ]
    torch.testing.assert_close(sum(rows), SoftTargetsLoss(4.0)(zs, zt).total, rtol=1e-13, atol=0)


def test_the_rest_does_not_see_the_logit_of_the_label():
    """Probabilities that are masked but not renormalised would: their divergence is negative here."""
    loss = DecoupledLoss(alpha=0, beta=1, temperature=1)
    student, teacher = torch.tensor([[1.0, 0, 0, 0]]).double().requires_grad_(), torch.tensor([[3.0, 0, 0, 0]]).double()
    assert loss(student, teacher, labels=torch.tensor([0])).total.item() == pytest.approx(0, abs=1e-15)
    moved = zs.clone().scatter_(-1, y[:, None], 7.0)
    torch.testing.assert_close(loss(moved, zt, labels=y).total, loss(zs, zt, labels=y).total, rtol=1e-13, atol=0)


@pytest.mark.parametrize("gap", [30.0, 200.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sure_models_have_finite_losses_and_gradients(gap, dtype):
    """`log(1 - p)` from a probability is -inf from a gap of 17 on in float32."""
    for student, teacher in (
        ([gap, 0, 0], [0, gap, 0]),
        ([gap, 0, 0], [gap, 0, 0]),
        ([0, gap, 0], [gap, 0, -gap]),
        ([0, 0, 0], [gap, 1, 0]),
    ):
        student, teacher = torch.tensor([student], dtype=dtype).requires_grad_(), torch.tensor([teacher], dtype=dtype)
        value = DecoupledLoss()(student, teacher, labels=torch.tensor([0]))
        value.total.backward()
        assert torch.isfinite(value.total) and value.total >= 0 and torch.isfinite(student.grad).all()


def test_rows_without_a_label_do_not_count():
    labels = torch.where(torch.arange(6) % 2 == 0, y, -100)
    student = torch.where((labels == -100)[:, None], float("nan"), zs).requires_grad_()
    value = DecoupledLoss()(student, zt, labels=labels)
    value.total.backward()
    expected = DecoupledLoss()(zs[::2], zt[::2], labels=y[::2])
    assert value.count == expected.count == 3
    torch.testing.assert_close(value.total, expected.total)
    assert (student.grad[1::2] == 0).all() and student.grad[::2].abs().sum() > 0
    nothing = DecoupledLoss()(zs.clone().requires_grad_(), zt, labels=torch.full_like(y, -100))
    assert nothing.total == 0 and nothing.count == 0 and nothing.total.requires_grad


@pytest.mark.parametrize("rows", ["absent", "absent and only one other"])
def test_classes_that_are_there_in_neither_model(rows):
    """Positions as classes: padding is at -inf in both."""
    pad = torch.tensor([False, False, rows != "absent", True, True])
    student = torch.where(pad, float("-inf"), zs[:1]).requires_grad_()
    teacher = torch.where(pad, float("-inf"), zt[:1])
    value = DecoupledLoss()(student, teacher, labels=torch.tensor([0]))
    (gradient,) = torch.autograd.grad(value.total, student)
    assert torch.isfinite(gradient).all() and (gradient[0, pad] == 0).all()
    expected = decoupled(zs[0, ~pad].numpy(), zt[0, ~pad].numpy(), 0, 1, 8, 4)
    assert value.total.item() == pytest.approx(expected, rel=1e-12)


def test_temperature_of_the_step():
    for loss, options in ((DecoupledLoss(), {"labels": y}), (DISTLoss(), {}), (StandardizedSoftTargetsLoss(), {})):
        own = type(loss)(temperature=3.0)(zs, zt, **options).total
        assert torch.equal(loss(zs, zt, temperature=3.0, **options).total, own)
        assert not torch.equal(loss(zs, zt, **options).total, own)
        assert loss.scheduled == ("temperature",)


# ------------------------------------------------------------------------------------------------------------ the others


def test_standardised_logits_ignore_a_positive_affine_map_of_each_row():
    loss = StandardizedSoftTargetsLoss()
    factor, shift = torch.linspace(0.5, 3, 6).double()[:, None], torch.linspace(-5, 5, 6).double()[:, None]
    torch.testing.assert_close(loss(factor * zs + shift, zt / factor - shift).total, loss(zs, zt).total, rtol=1e-5, atol=0)
    assert loss(factor * zt + shift, zt).total < 1e-12
    assert loss(-zt, zt).total > 1


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e4, -3e-5])
@pytest.mark.parametrize("loss", [StandardizedSoftTargetsLoss(), DISTLoss()], ids=lambda loss: type(loss).__name__)
def test_constant_rows_get_no_gradient(loss, constant):
    """What rounding leaves of a constant row is no direction: its standard deviation would be divided by, 1e7 times over."""
    student = torch.full((4, 6), constant).requires_grad_()
    teacher = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value.total, student)
    assert torch.isfinite(value.total) and (gradient == 0).all()
    expected = SoftTargetsLoss()(torch.zeros(4, 6), ((teacher - teacher.mean(-1, keepdim=True)) / teacher.std(-1, keepdim=True)))
    if isinstance(loss, StandardizedSoftTargetsLoss):
        torch.testing.assert_close(value.total, expected.total)
    else:
        assert value.mean == 2  # nothing correlates


def test_absent_classes_play_no_part_in_mean_and_deviation():
    pad = torch.tensor([False, True, False, True, False])
    absent = [torch.where(pad, float("-inf"), z).requires_grad_() for z in (zs, zt)]
    value = StandardizedSoftTargetsLoss()(*absent)
    torch.testing.assert_close(value.total, StandardizedSoftTargetsLoss()(zs[:, ~pad], zt[:, ~pad]).total)
    assert torch.isfinite(torch.autograd.grad(value.total, absent[0])[0]).all()


def test_dist_ignores_an_affine_map_of_the_probabilities():
    q = zt.softmax(-1)
    mixed = (0.3 * q + 0.7 / 5).log()  # of each row and of each class
    assert DISTLoss()(mixed, zt).mean.abs() < 1e-5 and DISTLoss(temperature=2.0)(zt + 5, zt).mean.abs() < 1e-5
    assert LogitMSELoss()(mixed, zt).mean > 1
    assert 0 < DISTLoss()(-zt, zt).mean < 4


def test_dist_of_one_row_has_no_classes_to_correlate():
    value, rows_only = DISTLoss()(zs[:1], zt[:1]), DISTLoss(gamma=0)(zs[:1], zt[:1])
    assert value.total == rows_only.total > 0
    nothing = DISTLoss()(zs.clone().requires_grad_(), zt, torch.zeros(6).bool())
    assert nothing.total == 0 and nothing.count == 0 and nothing.total.requires_grad


def test_hard_targets_take_the_teachers_word_only():
    value = HardTargetsLoss()(zs, zt)
    assert value.total == TaskCrossEntropyLoss()(zs, zt.argmax(-1)).total
    assert HardTargetsLoss()(zs, 100 * zt).total == value.total
    assert HardTargetsLoss()(zt, zt).mean > 0.1 > HardTargetsLoss()(100 * zt, zt).mean


def test_margins_ignore_a_constant_and_padded_candidates():
    loss = MarginMSELoss(positive=1)
    torch.testing.assert_close(loss(zs + torch.arange(6)[:, None], zt).total, loss(zs, zt).total)
    assert loss(zt + 3, zt).total < 1e-25
    pad = torch.tensor([False, False, False, True, True])
    student = torch.where(pad, float("-inf"), zs).requires_grad_()
    value = loss(student, torch.where(pad, float("-inf"), zt))
    torch.testing.assert_close(value.total, loss(zs[:, :3], zt[:, :3]).total)
    assert torch.isfinite(torch.autograd.grad(value.total, student)[0]).all()
    # a row of one candidate, or without the relevant one, has no margin
    alone = torch.full((1, 5), float("-inf")).double()
    for column in (1, 2):
        row = alone.clone()
        row[0, column] = 1.0
        assert loss(row, row + 1).total == 0


# ------------------------------------------------------------------------------------------------------------ errors


def raises(message):
    return pytest.raises(ValueError, match="^" + re.escape(message) + "$")


def zeros(*shape):
    return torch.zeros(shape)


@pytest.mark.parametrize("weights", [(-1.0, 8.0), (0, 0), (float("nan"), 1.0), (1.0, float("inf")), ("1", 8.0), (True, 8.0)])
def test_weights(weights):
    with raises(
        f"Weights must be finite numbers >= 0 and not all 0, got alpha={weights[0]!r} and beta={weights[1]!r}: the student would be pushed "
        "away from the teacher, or learn nothing. Use alpha=1 and beta=8 (CIFAR-100) or 0.5 (ImageNet); 0 turns one off."
    ):
        DecoupledLoss(*weights)
    with pytest.raises(ValueError, match="got beta=.* and gamma=.*Use 1 and 1"):
        DISTLoss(*weights)


@pytest.mark.parametrize("loss", [DecoupledLoss, DISTLoss, StandardizedSoftTargetsLoss])
@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_temperatures(loss, temperature):
    with pytest.raises(ValueError, match="temperature must be a finite number > 0"):
        loss(temperature=temperature)
    options = {"labels": y} if loss is DecoupledLoss else {}
    with pytest.raises(ValueError, match="temperature must be a finite number > 0"):
        loss()(zs, zt, temperature=temperature, **options)


def test_class_reduction():
    with raises(
        "class_reduction must be 'sum' or 'mean', got 'none': it says how the terms of the classes are put together. "
        "Use 'sum' (the divergence) or 'mean' (divided by the classes, for weights published with DeiT)."
    ):
        SoftTargetsLoss(class_reduction="none")


def test_decoupled_needs_three_classes():
    message = (
        "The student has 2 and the teacher 2 classes, but beside the label decoupled compares the other classes with each other: with "
        "fewer than 3 that part is always 0. Use soft_targets."
    )
    with raises(message):
        DecoupledLoss().check_widths(2, 2)
    with raises(message):
        DecoupledLoss()(zeros(4, 2), zeros(4, 2), labels=torch.zeros(4).long())
    DecoupledLoss().check_widths(3, 3)


def test_decoupled_needs_labels():
    with raises(
        "No labels were given, but decoupled needs the class id of each row (4,): it treats the labelled class and the others apart. "
        "Pass labels, or use soft_targets."
    ):
        DecoupledLoss()(zeros(4, 3), zeros(4, 3))
    for labels in (zeros(4, 3), torch.zeros(4, 3).long(), zeros(4).bool(), zeros(4)):
        with raises(
            f"labels have dtype {labels.dtype} and shape {tuple(labels.shape)}, but decoupled takes one class id for each row, shape (4,): "
            "of soft labels (mixup, cutmix) or several labels no class is the labelled one. Pass integer labels, or use soft_targets."
        ):
            DecoupledLoss()(zeros(4, 3), zeros(4, 3), labels=labels)
    for label in (3, -1):
        with raises(
            f"label {label} is no class of the model, which has 3 classes (0 to 2): its probability does not exist. Set num_labels (or "
            "fix label2id), and mark rows without a label with -100."
        ):
            DecoupledLoss()(zeros(4, 3), zeros(4, 3), labels=torch.tensor([0, -100, label, 2]))


@pytest.mark.parametrize(
    "loss", [DecoupledLoss(), DISTLoss(), StandardizedSoftTargetsLoss(), HardTargetsLoss()], ids=lambda x: type(x).__name__
)
def test_one_class_and_other_classes(loss):
    options = {"labels": torch.zeros(4).long()} if isinstance(loss, DecoupledLoss) else {}
    with pytest.raises(ValueError, match="have 1 class"):
        loss(zeros(4, 1), zeros(4, 1), **options)
    with pytest.raises(ValueError, match="cannot be compared entry by entry. Compare the label sets"):
        loss(zeros(4, 3), zeros(4, 5), **options)
    with pytest.raises(ValueError, match="mask must be a bool tensor"):
        loss(zeros(4, 3), zeros(4, 3), torch.ones(4), **options)


@pytest.mark.parametrize("positive", [-1, 1.0, True, None])
def test_positive(positive):
    with raises(
        f"positive must be an integer >= 0, got {positive!r}: it is the column of the candidate whose margin over the others is compared. "
        "Use 0 if it comes first."
    ):
        MarginMSELoss(positive)


def test_margins_need_candidates():
    message = (
        "The student scores {0} and the teacher {0} candidates, but margin_mse needs at least {1}: candidate {2} is compared with the "
        "others. Pass rows of candidates, or set positive to one of their columns."
    )
    with raises(message.format(1, 2, 0)):
        MarginMSELoss()(zeros(4, 1), zeros(4, 1))
    with raises(message.format(3, 4, 3)):
        MarginMSELoss(positive=3).check_widths(3, 3)
    with pytest.raises(ValueError, match="Score the same candidates with both models"):
        MarginMSELoss()(zeros(4, 3), zeros(4, 2))
