"""Soft targets against a teacher of which only the largest logits are known, against loops over outcomes."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from hfdistill.losses import SoftTargetsLoss
from hfdistill.losses.top_k import top_k_soft_targets
from hfdistill.signals import TopLogits


def top(logits, k, temperature, tail=True):
    values, ids = logits.topk(k)
    return TopLogits(values, ids, torch.logsumexp(logits / temperature, -1), temperature, tail)


def draw(seed=0, rows=5, classes=9, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    student, teacher = (torch.from_numpy(2 * rng.normal(size=(rows, classes))).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher


def reference(student, teacher, k, T, tail):
    """Probabilities of all classes, put together into outcomes."""
    total = 0.0
    for s, t in zip(student.detach().numpy(), teacher.numpy()):
        q, p = (np.exp(x / T) / np.exp(x / T).sum() for x in (s, t))
        best = np.argsort(-t)[:k]
        rest = np.setdiff1d(np.arange(len(t)), best)
        q, p = ([*x[best], x[rest].sum()] if tail else x[best] / x[best].sum() for x in (q, p))
        total += T * T * math.fsum(a * math.log(a / b) for a, b in zip(p, q) if a > 0)
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("T", [1.0, 2.5])
@pytest.mark.parametrize("tail", [True, False])
def test_outcomes(seed, k, T, tail):
    student, teacher = draw(seed)
    value = top_k_soft_targets(student, top(teacher, k, T, tail), temperature=T)
    assert value.total.item() == pytest.approx(reference(student, teacher, k, T, tail), rel=1e-10, abs=1e-14) and value.count == 5
    assert torch.autograd.gradcheck(lambda s: top_k_soft_targets(s, top(teacher, k, T, tail), temperature=T).total, student)


@pytest.mark.parametrize("tail", [True, False])
def test_all_classes_are_the_plain_loss(tail):
    student, teacher = draw()
    ours, plain = top_k_soft_targets(student, top(teacher, 9, 2.0, tail), temperature=2.0), SoftTargetsLoss(2.0)(student, teacher)
    torch.testing.assert_close(ours.total, plain.total, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(value.total, student)[0] for value in (ours, plain)), rtol=1e-10, atol=1e-13)


def test_the_tail_makes_it_a_lower_bound_that_grows_with_k_and_dropping_it_hides_the_students_other_classes():
    student, teacher = draw()
    values = [top_k_soft_targets(student, top(teacher, k, 1.0)).total.item() for k in range(1, 10)]
    assert values == sorted(values) and values[0] < values[-1]
    ids = teacher.topk(3).indices
    elsewhere = (student.detach() + 5).scatter(1, ids, student.detach().gather(1, ids))
    dropped = [top_k_soft_targets(s, top(teacher, 3, 1.0, tail=False)).total for s in (student.detach(), elsewhere)]
    kept = [top_k_soft_targets(s, top(teacher, 3, 1.0)).total for s in (student.detach(), elsewhere)]
    torch.testing.assert_close(*dropped)
    assert kept[1] > kept[0] + 1


@pytest.mark.parametrize("gap", [0.0, 20.0, 100.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_finite_where_the_k_have_all_the_probability(gap, dtype):
    """In either model, and where rounded values sum to more than their logsumexp."""
    sure, flat = torch.tensor([[gap, gap, 0.0, 0, 0]]), torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.4]])
    for s, t in ((sure, sure), (sure, flat), (flat, sure), (sure, -sure)):
        student = s.to(dtype).requires_grad_()
        teacher = top(t, 2, 1.0)
        teacher.values = (teacher.values * 1.001).to(dtype)
        value = top_k_soft_targets(student, teacher)
        value.total.backward()
        assert torch.isfinite(value.total) and value.total > -1e-5 and torch.isfinite(student.grad).all()


def test_the_students_tail_is_pulled_back_even_where_it_is_lost_to_rounding():
    """One minus the rest would be 0 here, and its logarithm without a gradient."""
    student = torch.tensor([[40.0, 0.0, 1.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[2.0, 1.0, 0.0, 0.0]])
    value = top_k_soft_targets(student, top(teacher, 1, 1.0))
    value.total.backward()
    rest = 1 - teacher.softmax(-1)[0, 0]
    assert value.total > 40 * rest - 2
    torch.testing.assert_close(student.grad[0, 1:], -rest * student.detach()[0, 1:].softmax(-1))
    torch.testing.assert_close(student.grad[0, 0], rest)


def test_rows_that_do_not_count_may_hold_anything():
    student, teacher = draw()
    mask = torch.tensor([True, False, True, True, False])
    known = top(teacher, 3, 1.0)
    expected = top_k_soft_targets(student, known, mask)
    rows = top_k_soft_targets(student[mask], TopLogits(known.values[mask], known.ids[mask], known.logsumexp[mask], 1.0))
    torch.testing.assert_close(expected.total, rows.total)
    assert expected.count == 3
    hidden = mask[:, None]
    dirty = torch.where(hidden, student.detach(), float("nan")).requires_grad_()
    known.values, known.ids = torch.where(hidden, known.values, float("nan")), torch.where(hidden, known.ids, -1)
    known.logsumexp = torch.where(mask, known.logsumexp, float("inf"))
    value = top_k_soft_targets(dirty, known, mask)
    value.total.backward()
    assert torch.equal(value.total, expected.total) and (dirty.grad[~mask] == 0).all() and torch.isfinite(dirty.grad).all()
    nothing = top_k_soft_targets(dirty, known, torch.zeros(5).bool())
    assert nothing.total == 0 and nothing.count == 0 and nothing.total.requires_grad


def test_classes_that_are_there_in_neither_model():
    pad = torch.tensor([False] * 6 + [True] * 3)
    student, teacher = (torch.where(pad, float("-inf"), logits.detach()) for logits in draw())
    for k in (4, 6, 8):
        s = student.clone().requires_grad_()
        value = top_k_soft_targets(s, top(teacher, k, 1.0))
        value.total.backward()
        expected = top_k_soft_targets(student[:, :6], top(teacher[:, :6], min(k, 6), 1.0))
        torch.testing.assert_close(value.total, expected.total)
        assert torch.isfinite(s.grad).all() and (s.grad[:, pad] == 0).all()


def raises(message):
    return pytest.raises(ValueError, match="^" + re.escape(message) + "$")


def test_a_temperature_at_which_the_tail_is_not_known():
    student, teacher = draw()
    with raises(
        "The probability of the teacher's other classes is stored for temperature 2.0, but 1.0 is asked for, at which it is not known. "
        "Use temperature 2.0, store the teacher again with that of this run, or leave out the tail, which is biased."
    ):
        top_k_soft_targets(student, top(teacher, 3, 2.0), temperature=1.0)
    assert torch.isfinite(top_k_soft_targets(student, top(teacher, 3, 2.0, tail=False), temperature=1.0).total)


def test_shapes():
    student, teacher = draw()
    with raises(
        "The student's logits have shape (5, 9), but the teacher's largest ones (4, 3) and their ids (4, 3): rows would be compared with "
        "those of other tokens. Read the stored rows of this batch, and keep no more logits than there are classes."
    ):
        top_k_soft_targets(student, top(teacher[:4], 3, 1.0))
    with pytest.raises(ValueError, match="temperature must be a finite number > 0"):
        top_k_soft_targets(student, top(teacher, 3, 1.0), temperature=0)
