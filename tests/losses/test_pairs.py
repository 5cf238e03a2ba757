"""The in-batch contrastive loss: against a loop over rows, and what it promises like every other loss."""

from __future__ import annotations

import math

import pytest
import torch

from hfdistill.losses import ContrastivePairsLoss


def by_loop(vectors, labels, temperature):
    """One row after the other, with Python's own exp and log."""
    rows = [[float(x) for x in row] for row in vectors]
    norm = [math.sqrt(sum(x * x for x in row)) for row in rows]
    present = [i for i, label in enumerate(labels.tolist()) if label != -100]
    total, count = 0.0, 0
    for i in present:
        cosine = {j: sum(a * b for a, b in zip(rows[i], rows[j])) / norm[i] / norm[j] for j in present if j != i}
        partners = [j for j in cosine if labels[j] == labels[i]]
        if partners:
            everything = sum(math.exp(value / temperature) for value in cosine.values())
            total += sum(math.log(everything) - cosine[p] / temperature for p in partners) / len(partners)
            count += 1
    return total, count


def draw(labels=(4, 9, 4, -100, 9, 7, 9), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(labels), 5, generator=generator, dtype=torch.float64).requires_grad_(), torch.tensor(labels)


@pytest.mark.parametrize("temperature", [0.05, 0.7])
def test_value_against_a_loop(temperature):
    vectors, labels = draw()
    total, count = by_loop(vectors.detach(), labels, temperature)
    value = ContrastivePairsLoss(temperature)(vectors, labels)
    assert count == 5 == value.count.item() and not value.count.requires_grad
    assert value.total.item() == pytest.approx(total, rel=1e-10)


def test_two_views_of_pairs_are_nt_xent_as_cross_entropy():
    vectors, labels = draw((0, 1, 2, 0, 1, 2))
    unit = vectors.detach() / vectors.detach().norm(dim=1, keepdim=True)
    scores = (unit @ unit.T / 0.05).fill_diagonal_(float("-inf"))
    reference = torch.nn.functional.cross_entropy(scores, torch.tensor([3, 4, 5, 0, 1, 2]), reduction="sum")
    torch.testing.assert_close(ContrastivePairsLoss()(vectors, labels).total.detach(), reference)


def test_chance_best_and_scale():
    same = torch.ones(6, 3)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    assert ContrastivePairsLoss()(same, labels).mean.item() == pytest.approx(math.log(5), rel=1e-6)
    apart = torch.eye(3).repeat_interleave(2, 0)
    assert ContrastivePairsLoss(0.01)(apart, labels).mean.item() < 1e-6
    vectors, labels = draw()
    torch.testing.assert_close(ContrastivePairsLoss()(100 * vectors, labels).total, ContrastivePairsLoss()(vectors, labels).total)
    assert ContrastivePairsLoss()(torch.randn(2, 3), torch.tensor([1, 1])).total.item() == pytest.approx(0, abs=1e-6)  # one pair alone


def test_gradcheck_and_order():
    vectors, labels = draw()
    loss = ContrastivePairsLoss(0.5)
    assert torch.autograd.gradcheck(lambda v: loss(v, labels).total, vectors)
    order = torch.randperm(len(labels))
    torch.testing.assert_close(loss(vectors[order], labels[order]).total, loss(vectors, labels).total)


@pytest.mark.parametrize("content", [float("nan"), float("inf"), 1e30], ids=str)
def test_rows_without_a_label_change_nothing(content):
    vectors, labels = draw()
    loss = ContrastivePairsLoss(0.5)
    dirty = torch.where((labels == -100)[:, None], content, vectors.detach()).requires_grad_()
    values = [loss(vectors, labels), loss(dirty, labels)]
    gradients = [torch.autograd.grad(value.total, v)[0] for value, v in zip(values, (vectors, dirty))]
    assert torch.equal(values[0].total, values[1].total) and torch.equal(*gradients)
    assert (gradients[0][labels == -100] == 0).all() and (gradients[0][[0, 1, 2, 4, 5, 6]] != 0).any(1).all()


@pytest.mark.parametrize("labels", [(-100, -100, -100), (1, 2, 3), (1, -100, 2)], ids=str)
def test_no_pair_gives_zero_with_a_graph(labels):
    vectors, labels = draw(labels)
    value = ContrastivePairsLoss()(vectors, labels)
    (gradient,) = torch.autograd.grad(value.mean, vectors)
    assert value.total == 0 and value.count == 0 and torch.equal(gradient, torch.zeros_like(vectors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    vectors, labels = draw()
    half = vectors.detach().to(dtype).requires_grad_()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = ContrastivePairsLoss(0.5)(half, labels)
        assert value.total.dtype == torch.float32
        torch.testing.assert_close(value.total.double(), ContrastivePairsLoss(0.5)(half.detach().double(), labels).total, rtol=2e-5, atol=0)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), "0.1"])
def test_bad_temperatures(temperature):
    with pytest.raises(ValueError, match="temperature must be a finite number > 0"):
        ContrastivePairsLoss(temperature)


BAD_LABELS = {"float": torch.zeros(3), "few": torch.zeros(2, dtype=torch.long), "2d": torch.zeros(3, 1, dtype=torch.long)}


@pytest.mark.parametrize("labels", BAD_LABELS.values(), ids=BAD_LABELS)
def test_bad_labels(labels):
    with pytest.raises(ValueError, match="one integer for each row"):
        ContrastivePairsLoss()(torch.randn(3, 4), labels)
