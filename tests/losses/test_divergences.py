"""Reverse KL and Jensen-Shannon: numbers from outside this repository, a second implementation of each (NumPy, probabilities instead of
logs, loops over rows), and what happens at the ends of beta."""

from __future__ import annotations

import math
import re
import warnings

import numpy as np
import pytest
import torch

from hfdistill.losses import LOSSES, SoftTargetsLoss
from hfdistill.losses.divergences import JSDLoss, ReverseKLLoss


def g(shape, a, b=0.0):
    """`sin(a (i + 1) + b) (1 + ((7 i) mod 5) / 5)` for i = 0, 1, ..., row by row."""
    i = np.arange(math.prod(shape))
    return torch.from_numpy((np.sin(a * (i + 1) + b) * (1 + (7 * i) % 5 / 5)).reshape(shape))


zs, zt = 2 * g((6, 5), 1.3), 2 * g((6, 5), 0.7, 0.5)

GOLDEN = {
    "reverse KL T=1": (ReverseKLLoss(1.0), 1.82010101092),
    "reverse KL T=2": (ReverseKLLoss(), 2.72407675993),
    "JSD 0.1": (JSDLoss(0.1, 1.0), 0.111696526805),
    "JSD 0.5": (JSDLoss(temperature=1.0), 0.280778126677),
    "JSD 0.9": (JSDLoss(0.9, 1.0), 0.126367357176),
    "JSD T=2": (JSDLoss(), 0.573248980215),
    "JSD 0": (JSDLoss(0, 1.0), 1.62224445472),
    "JSD 1": (JSDLoss(1, 1.0), 1.82010101092),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    loss, expected = GOLDEN[name]
    assert loss(zs, zt).mean.item() == pytest.approx(expected, rel=1e-11)


def softmax(row, T):
    e = [math.exp(x / T) for x in row]
    return [x / math.fsum(e) for x in e]


def kl(p, q):
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q))


def jsd(beta, T):
    def row(s, t):
        q, p = softmax(s, T), softmax(t, T)
        m = [beta * b + (1 - beta) * a for a, b in zip(q, p)]
        return T * T * (beta * kl(p, m) + (1 - beta) * kl(q, m))

    return row


ROWS = {
    "reverse": (ReverseKLLoss(3.0), lambda s, t: 9 * kl(softmax(s, 3), softmax(t, 3))),
    "jsd": (JSDLoss(temperature=0.7), jsd(0.5, 0.7)),
    "jsd 0.2": (JSDLoss(0.2, 3.0), jsd(0.2, 3.0)),
    "jsd 0.99": (JSDLoss(0.99, 1.0), jsd(0.99, 1.0)),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ROWS)
def test_rows(name, seed):
    loss, row = ROWS[name]
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=(2, 3, 4, 6)) * 2
    mask = rng.random((3, 4)) < 0.7
    mask[0, 0] = True
    rows = [row(s, t) for s, t in zip(student[mask], teacher[mask])]
    value = loss(*map(torch.from_numpy, (student, teacher, mask)))
    assert value.total.item() == pytest.approx(math.fsum(rows), rel=1e-10) and value.count.item() == len(rows)


# ------------------------------------------------------------------------------------------------------------ identities


def test_reverse_kl_is_soft_targets_with_the_models_exchanged():
    torch.testing.assert_close(ReverseKLLoss(3.0)(zs, zt).total, SoftTargetsLoss(3.0)(zt, zs).total, rtol=1e-14, atol=0)


def test_the_ends_of_beta_are_the_two_kl_and_silent():
    student = zs.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for beta, plain in ((0, SoftTargetsLoss()), (1, ReverseKLLoss())):
            ours, expected = JSDLoss(beta)(student, zt).total, plain(student, zt).total
            assert torch.equal(ours, expected)
            torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (ours, expected)), rtol=1e-14, atol=1e-16)


def test_near_the_ends_it_is_a_small_share_of_the_kl():
    small = 1e-4
    assert JSDLoss(small, 1.0)(zs, zt).mean.item() / small == pytest.approx(1.6192, rel=1e-4)
    torch.testing.assert_close(JSDLoss(1e-7, 1.0)(zs, zt).mean * 1e7, SoftTargetsLoss(1.0)(zs, zt).mean, rtol=1e-4, atol=0)
    torch.testing.assert_close(JSDLoss(1 - 1e-7, 1.0)(zs, zt).mean * 1e7, ReverseKLLoss(1.0)(zs, zt).mean, rtol=1e-4, atol=0)


def test_jsd_of_one_half_is_symmetric_and_at_most_log_two():
    loss = JSDLoss(temperature=1.0)
    torch.testing.assert_close(loss(zs, zt).total, loss(zt, zs).total, rtol=1e-14, atol=0)
    rows = [loss(s[None], t[None]).total.item() for s, t in zip(20 * zs, 20 * zt)]
    assert 0.5 < max(rows) <= math.log(2) + 1e-12
    torch.testing.assert_close(JSDLoss(0.2)(zs, zt).total, JSDLoss(0.8)(zt, zs).total, rtol=1e-14, atol=0)


# ------------------------------------------------------------------------------------------------------------ extreme logits


@pytest.mark.parametrize("loss", [ReverseKLLoss(1.0), JSDLoss(0.3, 1.0), JSDLoss(1, 1.0)], ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("gap", [30.0, 200.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sure_models_have_finite_losses_and_gradients(loss, gap, dtype):
    for s, t in (([gap, 0, -gap], [-gap, 0, gap]), ([0, 0, gap], [0, 0, gap]), ([gap, 0, 0], [0, 0, 0]), ([0, 0, 0], [gap, 0, 0])):
        student, teacher = torch.tensor([s], dtype=dtype).requires_grad_(), torch.tensor([t], dtype=dtype)
        value = loss(student, teacher)
        value.total.backward()
        assert torch.isfinite(value.total) and value.total >= 0 and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("loss", [ReverseKLLoss(), JSDLoss(), JSDLoss(0.2), JSDLoss(0), JSDLoss(1)])
def test_classes_that_are_there_in_neither_model(loss):
    pad = torch.tensor([False, True, False, True, False])
    student = torch.where(pad, float("-inf"), zs).requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        value = loss(student, torch.where(pad, float("-inf"), zt))
        (gradient,) = torch.autograd.grad(value.total, student)
    torch.testing.assert_close(value.total, loss(zs[:, ~pad], zt[:, ~pad]).total)
    assert torch.isfinite(gradient).all() and (gradient[:, pad] == 0).all()


def test_classes_that_one_model_rules_out():
    """What the student leaves out costs nothing in reverse KL; what the teacher rules out must not be said at all."""
    only = torch.tensor([False, True, False, False, False])
    student = torch.where(only, float("-inf"), zs).requires_grad_()
    for loss in (ReverseKLLoss(), JSDLoss(0.3)):
        value = loss(student, zt)
        (gradient,) = torch.autograd.grad(value.total, student)
        assert torch.isfinite(value.total) and torch.isfinite(gradient).all()
        torch.testing.assert_close(value.total, loss(torch.where(only, -1e4, zs), zt).total)
    assert ReverseKLLoss()(zs, student.detach()).total == float("inf")
    assert torch.isfinite(JSDLoss(0.3)(zs, student.detach()).total)


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("beta", [-0.1, 1.5, float("nan"), "0.5", True])
def test_beta(beta):
    message = (
        f"beta must be a number from 0 to 1, got {beta!r}: it is the teacher's share of the mixture that both models are compared "
        "with. Use 0.5 (symmetric), 0 for soft_targets or 1 for reverse_kl."
    )
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        JSDLoss(beta)


@pytest.mark.parametrize("loss", [ReverseKLLoss, JSDLoss])
def test_what_all_logit_losses_refuse(loss):
    for temperature in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be a finite number > 0"):
            loss(temperature=temperature)
        with pytest.raises(ValueError, match="temperature must be a finite number > 0"):
            loss()(zs, zt, temperature=temperature)
    with pytest.raises(ValueError, match="have 1 class"):
        loss()(zs[:, :1], zt[:, :1])
    with pytest.raises(ValueError, match="cannot be compared entry by entry. Compare the label sets"):
        loss()(zs, zt[:, :3])
    with pytest.raises(ValueError, match="mask must be a bool tensor"):
        loss()(zs, zt, torch.ones(6))


def test_registered():
    assert LOSSES["reverse_kl"] is ReverseKLLoss and LOSSES["jsd"] is JSDLoss
