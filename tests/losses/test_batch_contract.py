"""What every loss on relations between samples promises: one row of `BATCH_CASES` buys all the tests of this file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hfdistill.losses.batch import BatchLoss
from hfdistill.losses.correlation import DISTLoss
from hfdistill.losses.instance_graph import InstanceGraphLoss
from hfdistill.losses.ranking import DarkRankLoss
from hfdistill.losses.sample_relations import (
    CorrelationCongruenceLoss,
    PKTLoss,
    RKDAngleLoss,
    RKDDistanceLoss,
    SimilarityKLLoss,
    SimilarityPreservingLoss,
)
from hfdistill.signals import SIGNALS


SAMPLES = 6


def embedded(form):
    loss = CorrelationCongruenceLoss(form, embedding=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss.prepare((SAMPLES, 6), (SAMPLES, 9))
    return loss


ONE_WIDTH, TWO_WIDTHS = ([6], [6]), ([6], [9])
ROTATION, SCALE, SAMPLE_SCALE, SHIFT, ROW_SHIFT = "rotation", "scale", "scale of each sample", "shift", "shift of each row"

# name -> (loss, widths of the layers of student and teacher, what may be done to the student alone without changing the value)
BATCH_CASES = {
    "dist": (DISTLoss, ONE_WIDTH, {ROW_SHIFT}),
    "dist T=4": (lambda: DISTLoss(beta=0.5, gamma=2.0, temperature=4.0), ONE_WIDTH, {ROW_SHIFT}),
    "rkd_distance": (RKDDistanceLoss, TWO_WIDTHS, {ROTATION, SCALE, SHIFT}),
    "rkd_angle": (RKDAngleLoss, TWO_WIDTHS, {ROTATION, SCALE, SHIFT}),
    "similarity_preserving": (SimilarityPreservingLoss, TWO_WIDTHS, {ROTATION, SCALE}),
    "correlation_congruence": (CorrelationCongruenceLoss, TWO_WIDTHS, {ROTATION, SCALE, SAMPLE_SCALE}),
    "correlation_congruence squared": (
        lambda: CorrelationCongruenceLoss(gamma=1.0, order=3, squared=True),
        TWO_WIDTHS,
        {ROTATION, SCALE, SAMPLE_SCALE},
    ),
    "correlation_congruence adjacent": (lambda: CorrelationCongruenceLoss("adjacent"), ONE_WIDTH, set()),
    "correlation_congruence embedded": (lambda: embedded("kernel"), TWO_WIDTHS, set()),
    "correlation_congruence adjacent embedded": (lambda: embedded("adjacent"), TWO_WIDTHS, set()),
    "pkt": (PKTLoss, TWO_WIDTHS, {ROTATION, SCALE, SAMPLE_SCALE}),
    "similarity_kl": (SimilarityKLLoss, TWO_WIDTHS, {ROTATION, SCALE, SAMPLE_SCALE}),
    "dark_rank": (DarkRankLoss, TWO_WIDTHS, {ROTATION, SCALE, SAMPLE_SCALE}),
    "dark_rank raw": (lambda: DarkRankLoss(alpha=0.2, beta=1.5, length=9, normalize=False), TWO_WIDTHS, {ROTATION, SHIFT}),
    "instance_graph": (InstanceGraphLoss, ([6, 4, 4], [9, 4, 4]), set()),
    "instance_graph widths": (InstanceGraphLoss, ([6, 6, 4], [9, 9, 7]), {ROTATION, SCALE, SHIFT}),
    "instance_graph one layer": (lambda: InstanceGraphLoss(2.0, 0.5, 0.0), ONE_WIDTH, set()),
}

NOT_ZERO_WHEN_EQUAL = ("dark_rank", "embedded")
DEPENDS_ON_ORDER = ("adjacent",)


def names(without=()):
    return [name for name in BATCH_CASES if not any(word in name for word in without)]


def draw(name, samples=SAMPLES, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    build, widths, _ = BATCH_CASES[name]
    sides = [[(2 * torch.randn(samples, w, generator=generator, dtype=torch.float64)).to(dtype) for w in side] for side in widths]
    return build(), *sides


def call(loss, student, teacher, mask=None):
    return loss(student, teacher, mask) if loss.joint else loss(student[0], teacher[0], mask)


def backward(loss, student, teacher, mask=None):
    student = [tensor.detach().clone().requires_grad_() for tensor in student]
    value = call(loss, student, teacher, mask)
    return value, list(torch.autograd.grad(value.total, student))


def rows(tensors, index):
    return [tensor[index] for tensor in tensors]


def assert_close(ones, others, **tolerance):
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.fixture(params=BATCH_CASES, ids=str)
def name(request):
    return request.param


def test_attributes(name):
    loss, student, teacher = draw(name)
    assert isinstance(loss, BatchLoss) and loss.joint == (name.startswith("instance_graph"))
    assert (loss.layout, loss.unit) == (("rows", "rows") if name.startswith("dist") else ("vectors", "sequences"))
    assert loss.signal in loss.signals and set(loss.signals) <= set(SIGNALS)
    assert loss.compares_widths is name.startswith("dist") and not loss.gather
    for s, t in zip(student, teacher):
        loss.check_widths(s.size(-1), t.size(-1))


def test_value_is_a_finite_positive_scalar_with_a_count(name):
    loss, student, teacher = draw(name)
    value, gradients = backward(loss, student, teacher)
    assert value.total.shape == () and value.count.shape == ()
    assert torch.isfinite(value.total) and value.total > 0
    assert value.count.item() == SAMPLES and not value.count.requires_grad
    assert all(torch.isfinite(gradient).all() and gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("name", names(without=NOT_ZERO_WHEN_EQUAL))
def test_zero_when_student_is_the_teacher(name):
    loss, student, _ = draw(name)
    value, gradients = backward(loss, student, [tensor.clone() for tensor in student])
    tolerance, slope = {"dist": (1e-4, 1e-4), "pkt": (1e-13, 1e-7)}.get(name.split()[0], (1e-13, 1e-13))  # these two add an epsilon
    assert 0 <= value.mean <= tolerance
    assert max(gradient.abs().max() for gradient in gradients) < slope


def test_gradcheck(name):
    loss, student, teacher = draw(name, samples=4)
    student = [tensor.requires_grad_() for tensor in student]
    mask = torch.tensor([True, True, False, True])
    for chosen in (None, mask):
        check = torch.autograd.gradcheck(
            lambda *s, m=chosen: call(loss, list(s), teacher, m).total, student, eps=1e-6, atol=1e-6, rtol=1e-5
        )
        assert check


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_half_precision_is_computed_in_float32(name, dtype, autocast):
    loss, student, teacher = draw(name, dtype=dtype)
    exact = call(loss, [s.double() for s in student], [t.double() for t in teacher]).total
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value, gradients = backward(loss, student, teacher)
    assert value.total.dtype == torch.float32
    torch.testing.assert_close(value.total.double(), exact, rtol=2e-5, atol=0)
    assert all(gradient.dtype == dtype and torch.isfinite(gradient).all() for gradient in gradients)


def test_autocast_changes_nothing_for_float32(name):
    loss, student, teacher = draw(name, dtype=torch.float32)
    plain, plain_gradients = backward(loss, student, teacher)
    student = [tensor.requires_grad_() for tensor in student]
    with torch.autocast("cpu", torch.bfloat16):
        value = call(loss, student, teacher)
    assert torch.equal(value.total, plain.total)
    assert all(map(torch.equal, torch.autograd.grad(value.total, student), plain_gradients))


def test_order_of_the_batch(name):
    loss, student, teacher = draw(name)
    value, gradients = backward(loss, student, teacher)
    order = torch.tensor([2, 0, 5, 3, 1, 4])
    permuted, permuted_gradients = backward(loss, rows(student, order), rows(teacher, order))
    if any(word in name for word in DEPENDS_ON_ORDER):
        assert not torch.allclose(permuted.total, value.total, rtol=1e-3)
    else:
        torch.testing.assert_close(permuted.total, value.total, rtol=1e-12, atol=0)
        assert_close(permuted_gradients, rows(gradients, order))


@pytest.mark.parametrize("content", [float("nan"), float("inf"), 1e30], ids=str)
def test_samples_that_the_mask_drops_are_left_out(name, content):
    loss, student, teacher = draw(name)
    mask = torch.tensor([True, False, True, True, False, True])
    expected, expected_gradients = backward(loss, rows(student, mask), rows(teacher, mask))
    dirty, dirty_teacher = ([tensor.masked_fill(~mask[:, None], content) for tensor in side] for side in (student, teacher))
    with torch.autograd.set_detect_anomaly(True):
        value, gradients = backward(loss, dirty, dirty_teacher, mask)
    assert value.count == expected.count == 4
    # cdist rounds by the number of rows
    torch.testing.assert_close(value.total, expected.total, rtol=1e-14, atol=0)
    assert_close(rows(gradients, mask), expected_gradients, rtol=1e-13, atol=1e-16)
    assert all((gradient[~mask] == 0).all() for gradient in gradients)


def test_no_mask_means_every_sample(name):
    loss, student, teacher = draw(name)
    without, full = call(loss, student, teacher), call(loss, student, teacher, torch.ones(SAMPLES).bool())
    assert without.total == full.total and without.count == full.count


def test_no_gradient_to_the_teacher_and_inputs_unchanged(name):
    loss, student, teacher = draw(name)
    before = [tensor.clone() for tensor in (*student, *teacher)]
    student, teacher = ([tensor.requires_grad_() for tensor in side] for side in (student, teacher))
    call(loss, student, teacher).total.backward()
    assert all(tensor.grad is None for tensor in teacher) and all(tensor.grad is not None for tensor in student)
    assert all(map(torch.equal, before, (*student, *teacher)))


def test_nothing_to_compare_gives_zero_with_a_graph(name):
    loss, student, teacher = draw(name)
    value, gradients = backward(loss, student, teacher, torch.zeros(SAMPLES).bool())
    assert value.total == 0 and value.count == 0 and value.mean == 0
    one, one_gradients = backward(loss, rows(student, [0]), rows(teacher, [0]))
    assert one.count == 1
    if not name.startswith("dist"):  # one row still has classes
        assert one.total == 0
        gradients += one_gradients
    assert all((gradient == 0).all() for gradient in gradients)
    for parameter in loss.parameters():
        call(loss, rows(student, [0]), rows(teacher, [0])).total.backward()
        assert parameter.grad is not None and (parameter.grad == 0).all()


DEGENERATE = {
    "one": lambda side: rows(side, [0]),
    "two": lambda side: rows(side, [0, 1]),
    "all equal": lambda side: rows(side, [0] * 4),
    "duplicates": lambda side: rows(side, [0, 1, 0, 2, 1]),
    "opposite": lambda side: [torch.cat([tensor, -3 * tensor]) for tensor in side],
    "zero row": lambda side: [tensor * torch.tensor([[1.0], [0.0], [1.0], [0.0], [1.0], [1.0]]) for tensor in side],
    "zero": lambda side: [torch.zeros_like(tensor) for tensor in side],
    "constant": lambda side: [torch.full_like(tensor, 0.1) for tensor in side],
    "constant rows": lambda side: [torch.arange(len(tensor))[:, None].float().expand_as(tensor) for tensor in side],
}


@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_batches_are_finite(name, kind):
    loss, student, teacher = draw(name, dtype=torch.float32)
    changed, changed_teacher = DEGENERATE[kind](student), DEGENERATE[kind](teacher)
    samples = len(changed[0])
    student, teacher = (rows(side, [i % SAMPLES for i in range(samples)]) for side in (student, teacher))
    for sides in ((changed, changed_teacher), (changed, teacher), (student, changed_teacher)):
        value, gradients = backward(loss, *sides)
        assert torch.isfinite(value.total) and value.total >= -1e-6 and value.count == samples
        assert all(torch.isfinite(gradient).all() and gradient.abs().max() < 1e3 for gradient in gradients)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_very_small_and_very_large_vectors_are_finite(name, scale):
    loss, student, teacher = draw(name, dtype=torch.float32)
    if name == "dark_rank raw" or (name.startswith(("instance_graph", "correlation_congruence adjacent")) and scale > 1):
        scale = scale**0.5  # these grow with a power of the scale
    value, gradients = backward(loss, [scale * tensor for tensor in student], [scale * tensor for tensor in teacher])
    assert torch.isfinite(value.total) and all(torch.isfinite(gradient).all() for gradient in gradients)


def rotation(width):
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64))[0]


CHANGES = {
    ROTATION: lambda x: x @ rotation(x.size(1)),
    SCALE: lambda x: 3 * x,
    SAMPLE_SCALE: lambda x: torch.linspace(0.5, 2, len(x), dtype=x.dtype)[:, None] * x,
    SHIFT: lambda x: x + torch.linspace(-1, 2, x.size(1), dtype=x.dtype),
    ROW_SHIFT: lambda x: x + torch.linspace(-1, 2, len(x), dtype=x.dtype)[:, None],
}


def test_it_ignores_what_it_says_and_nothing_else(name):
    loss, student, teacher = draw(name)
    before = call(loss, student, teacher).total
    ignored = set()
    for change, apply in CHANGES.items():
        after = call(loss, [apply(tensor) for tensor in student], teacher).total
        if torch.allclose(after, before, rtol=1e-6 if name == "pkt" else 1e-10, atol=0):  # PKT adds an epsilon to lengths
            ignored.add(change)
        else:
            assert not torch.allclose(after, before, rtol=1e-4, atol=0), change
    assert ignored == BATCH_CASES[name][2]


def test_samples_must_agree(name):
    loss, student, teacher = draw(name)
    with pytest.raises(ValueError, match="student has shape"):
        call(loss, student, rows(teacher, [0, 1]))
    with pytest.raises(ValueError, match="mask has shape"):
        call(loss, student, teacher, torch.ones(SAMPLES - 1).bool())
    with pytest.raises(ValueError, match="mask must be a bool tensor"):
        call(loss, student, teacher, torch.ones(SAMPLES))


@pytest.mark.parametrize("loss", sorted({type(draw(name)[0]) for name in BATCH_CASES}, key=lambda loss: loss.__name__))
def test_gather_is_true_or_false(loss):
    assert loss(gather=True).gather is True
    with pytest.raises(ValueError, match="gather must be true or false, got 'all'"):
        loss(gather="all")


# ------------------------------------------------------------------------------------------------------------ two processes

SPLITS = ((5, 3), (1, 7), (8, 0))  # samples of each process


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    """What two processes got, each with its part of a batch and `gather`."""
    folder = tmp_path_factory.mktemp("two_processes")
    worker = Path(__file__).with_name("two_processes_batch.py")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(worker), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_two_processes_that_gather_are_one(name, split, gathered):
    loss, student, teacher = draw(name, samples=sum(split))
    value, gradients = backward(loss, student, teacher)
    parts = [result[f"{name} {split}"] for result in gathered]
    assert [part["count"].item() for part in parts] == list(split) and value.count == sum(split)
    torch.testing.assert_close(sum(part["total"] for part in parts), value.total, rtol=1e-12, atol=1e-15)
    # each reports its share of the value
    torch.testing.assert_close(parts[0]["total"], value.total * split[0] / sum(split), rtol=1e-12, atol=1e-15)
    assert_close([torch.cat(pieces) for pieces in zip(*(part["gradients"] for part in parts))], gradients, rtol=1e-11, atol=1e-13)
    if list(loss.parameters()):
        expected = torch.autograd.grad(call(loss, student, teacher).total, list(loss.parameters()))
        assert_close([sum(pieces) for pieces in zip(*(part["parameters"] for part in parts))], expected)
