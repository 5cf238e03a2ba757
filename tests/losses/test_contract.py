"""What every loss promises: one row of `CASES` (or `TASK_CASES`) buys all the tests of this file."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from hfdistill.losses import (
    LOSSES,
    TASK_LOSSES,
    AttentionKLLoss,
    AttentionMSELoss,
    AttentionScoreMSELoss,
    BinarySoftTargetsLoss,
    CosineLoss,
    DistillationLoss,
    EmbeddingMSELoss,
    HiddenMomentsLoss,
    HiddenMSELoss,
    LogitMSELoss,
    LossValue,
    NormalizedHiddenMSELoss,
    PatientLoss,
    RegressionMSELoss,
    RelationKLLoss,
    SoftTargetsLoss,
    TaskBinaryCrossEntropyLoss,
    TaskCrossEntropyLoss,
    TaskLoss,
    TaskSpanLoss,
    TaskSquaredErrorLoss,
)
from hfdistill.losses.decoupled import DecoupledLoss
from hfdistill.losses.divergences import JSDLoss, ReverseKLLoss
from hfdistill.losses.logits import HardTargetsLoss, StandardizedSoftTargetsLoss
from hfdistill.losses.ranking import MarginMSELoss
from hfdistill.signals import SIGNALS


LENGTHS = (5, 3, 1, 4)


def token_mask(lengths):
    return torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]


def pair_mask(lengths, causal=False):
    tokens = token_mask(lengths)
    pairs = tokens[:, None, :, None] & tokens[:, None, None, :]
    return pairs & torch.ones_like(pairs).tril() if causal else pairs


# layouts: lengths -> student shape, teacher shape, mask
def per_token(lengths):
    shape = (len(lengths), max(lengths), 6)
    return shape, shape, token_mask(lengths)


def unequal_widths(lengths):
    student, _, mask = per_token(lengths)
    return student, (*student[:2], 12), mask


def per_sample(lengths):
    return (len(lengths), 6), (len(lengths), 6), torch.tensor([length > 1 for length in lengths])


def pairs(lengths):
    shape = (len(lengths), 3, max(lengths), max(lengths))
    return shape, shape, pair_mask(lengths)


def causal_pairs(lengths):
    shape = (len(lengths), 3, max(lengths), max(lengths))
    return shape, shape, pair_mask(lengths, causal=True)


def unequal_heads(lengths):
    student, _, mask = pairs(lengths)
    return student, (student[0], 2, *student[2:]), mask


SAMPLES, TOKENS = 3, 5 + 3 + 1 + 4
PAIRS, CAUSAL_PAIRS = 25 + 9 + 1 + 16, 15 + 6 + 1 + 10

# name -> (loss, layout, count for LENGTHS)
CASES = {
    "soft_targets": (SoftTargetsLoss, per_token, TOKENS),
    "soft_targets T=1": (lambda: SoftTargetsLoss(1), per_sample, SAMPLES),
    "soft_targets T=8": (lambda: SoftTargetsLoss(temperature=8.0), per_token, TOKENS),
    "soft_targets mean": (lambda: SoftTargetsLoss(class_reduction="mean"), per_token, TOKENS),
    "standardized_soft_targets": (StandardizedSoftTargetsLoss, per_token, TOKENS),
    "standardized_soft_targets T=8": (lambda: StandardizedSoftTargetsLoss(8.0), per_sample, SAMPLES),
    "hard_targets": (HardTargetsLoss, per_token, TOKENS),
    "hard_targets samples": (HardTargetsLoss, per_sample, SAMPLES),
    "reverse_kl": (ReverseKLLoss, per_token, TOKENS),
    "reverse_kl T=1": (lambda: ReverseKLLoss(1.0), per_sample, SAMPLES),
    "jsd": (JSDLoss, per_token, TOKENS),
    "jsd beta=0.2 T=1": (lambda: JSDLoss(0.2, 1.0), per_sample, SAMPLES),
    "jsd beta=0": (lambda: JSDLoss(0), per_token, TOKENS),
    "jsd beta=1": (lambda: JSDLoss(1.0), per_token, TOKENS),
    "decoupled": (DecoupledLoss, per_token, TOKENS),
    "decoupled T=1": (lambda: DecoupledLoss(beta=2.0, temperature=1.0), per_sample, SAMPLES),
    "margin_mse": (MarginMSELoss, per_sample, SAMPLES),
    "margin_mse tokens": (lambda: MarginMSELoss(positive=2), per_token, TOKENS),
    "binary_soft_targets": (BinarySoftTargetsLoss, per_sample, SAMPLES),
    "binary_soft_targets tokens": (lambda: BinarySoftTargetsLoss(1.0), per_token, TOKENS),
    "regression_mse": (RegressionMSELoss, per_sample, SAMPLES),
    "logit_mse": (LogitMSELoss, per_sample, SAMPLES),
    "logit_mse centered": (lambda: LogitMSELoss(centered=True), per_token, TOKENS),
    "hidden_mse": (HiddenMSELoss, per_token, TOKENS),
    "hidden_mse pooled": (HiddenMSELoss, per_sample, SAMPLES),
    "cosine": (CosineLoss, per_token, TOKENS),
    "cosine pooled": (CosineLoss, per_sample, SAMPLES),
    "embedding_mse": (EmbeddingMSELoss, per_token, TOKENS),
    "attention_score_mse": (AttentionScoreMSELoss, pairs, PAIRS),
    "attention_score_mse centered": (lambda: AttentionScoreMSELoss(center=True), causal_pairs, CAUSAL_PAIRS),
    "attention_score_mse mean": (lambda: AttentionScoreMSELoss(heads="mean"), unequal_heads, PAIRS),
    "attention_kl": (AttentionKLLoss, pairs, TOKENS),
    "attention_kl causal": (AttentionKLLoss, causal_pairs, TOKENS),
    "attention_kl mean": (lambda: AttentionKLLoss(heads="mean"), unequal_heads, TOKENS),
    "attention_mse": (AttentionMSELoss, pairs, PAIRS),
    "attention_mse keys": (lambda: AttentionMSELoss(reduction="keys"), causal_pairs, TOKENS),
    "attention_mse mean": (lambda: AttentionMSELoss(heads="mean"), unequal_heads, PAIRS),
    "relation_kl": (lambda: RelationKLLoss(heads=3), per_token, TOKENS),
    "relation_kl widths": (lambda: RelationKLLoss(heads=2), unequal_widths, TOKENS),
    "patient": (PatientLoss, per_token, len(LENGTHS)),
    "patient plain": (lambda: PatientLoss(normalize=False, width_reduction="mean"), per_token, len(LENGTHS)),
    "patient last": (lambda: PatientLoss(token="last"), per_token, len(LENGTHS)),
    "normalized_hidden_mse": (NormalizedHiddenMSELoss, per_token, TOKENS),
    "normalized_hidden_mse pooled": (NormalizedHiddenMSELoss, per_sample, SAMPLES),
    # its default of 5000 gives gradients above what the tests below allow
    "hidden_moments": (lambda: HiddenMomentsLoss(50.0, 5.0), per_token, TOKENS),
    "hidden_moments widths": (lambda: HiddenMomentsLoss(50.0, 5.0), unequal_widths, TOKENS),
}

NOT_ZERO_WHEN_EQUAL = ("hard_targets", "hard_targets samples")
OTHER_TABLES = {"test_batch_contract": "BATCH_CASES", "test_map_contract": "MAP_CASES", "test_contrastive": "CONTRASTIVE_CASES"}


def draw(layout, lengths=LENGTHS, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student_shape, teacher_shape, mask = layout(lengths)
    student = 2 * torch.randn(student_shape, generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(teacher_shape, generator=generator, dtype=torch.float64)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), mask


def cut(tensor, rows):
    """Some rows, as long as the longest of them. Length axes are those of size `max(LENGTHS)`: no other axis has it."""
    longest = max(LENGTHS[row] for row in rows)
    tensor = tensor[rows]
    for axis in range(1, tensor.dim()):
        if tensor.size(axis) == max(LENGTHS):
            tensor = tensor.narrow(axis, 0, longest)
    return tensor


def valid_entries(mask, tensor):
    """`mask` for each entry of `tensor`: pair masks already have its rank, row masks lack the last axis."""
    return (mask if mask.dim() == tensor.dim() else mask.unsqueeze(-1)).expand(tensor.shape)


def call(loss, student, teacher, mask=None):
    """Where a loss needs labels, they are made from the teacher's rows, which they follow wherever a test moves them."""
    if "labels" not in loss.needs:
        return loss(student, teacher, mask)
    rows = teacher.detach()[..., 0].double().nan_to_num().clamp(-100, 100)
    return loss(student, teacher, mask, labels=(1000 * rows).long() % teacher.size(-1))


def backward(loss, student, teacher, mask):
    value = call(loss, student, teacher, mask)
    (gradient,) = torch.autograd.grad(value.total, student)
    return value, gradient


@pytest.fixture(params=CASES, ids=str)
def case(request):
    build, layout, count = CASES[request.param]
    return build(), layout, count


def test_every_loss_has_a_row():
    """In this table or in that of another file; the name of a row begins with that of its loss."""
    tables = [CASES, *(getattr(import_module(f"losses.{module}"), name) for module, name in OTHER_TABLES.items())]
    assert {name.split()[0] for table in tables for name in table} == set(LOSSES)
    for name, (build, _, _) in CASES.items():
        assert type(build()) is LOSSES[name.split()[0]]
    for loss in LOSSES.values():
        assert loss.signal in SIGNALS


def test_unit_says_what_is_counted(case):
    loss, layout, count = case
    rows = "labels" if loss.needs else "rows"
    assert loss.unit == ("pairs" if count in (PAIRS, CAUSAL_PAIRS) else "sequences" if count == len(LENGTHS) else rows)


def test_autocast_is_off_while_a_loss_is_computed():
    """A matrix product is the first operation that autocast would lower to bf16."""

    class Product(DistillationLoss):
        def compute(self, student, teacher, mask):
            return LossValue((student @ teacher.T).sum(), torch.tensor(1))

    class TaskProduct(TaskLoss):
        def compute(self, logits, labels):
            return LossValue((logits @ logits.T).sum(), torch.tensor(1))

    third = torch.full((2, 3), 1 / 3)
    with torch.autocast("cpu", torch.bfloat16):
        for value in (Product()(third, third), TaskProduct()(third, None)):
            assert value.total.dtype == torch.float32
            torch.testing.assert_close(value.total, torch.tensor(4 / 3), rtol=1e-6, atol=0)


def test_value_is_a_finite_positive_scalar_with_a_count(case):
    loss, layout, count = case
    value, gradient = backward(loss, *draw(layout))
    assert value.total.shape == () and value.count.shape == ()
    assert torch.isfinite(value.total) and value.total > 0
    assert value.count.item() == count and not value.count.requires_grad
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0
    torch.testing.assert_close(value.mean, value.total / count)


def test_no_mask_means_every_row(case):
    loss, layout, _ = case
    student, teacher, mask = draw(layout)
    everything = torch.ones_like(mask)
    without, full = call(loss, student, teacher), call(loss, student, teacher, everything)
    assert without.count == full.count and without.count.dtype == full.count.dtype
    torch.testing.assert_close(without.total, full.total, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_ZERO_WHEN_EQUAL])
def test_zero_when_student_is_the_teacher(name):
    build, layout, _ = CASES[name]
    loss = build()
    student, _, mask = draw(layout)
    value, gradient = backward(loss, student, student.detach().clone(), mask)
    assert 0 <= value.total <= 1e-13
    assert gradient.abs().max() < 1e-13


def test_gradcheck(case):
    loss, layout, _ = case
    student, teacher, mask = draw(layout, lengths=(3, 1, 2))
    assert torch.autograd.gradcheck(lambda s: call(loss, s, teacher, mask).total, student, eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_half_precision_is_computed_in_float32(case, dtype, autocast):
    loss, layout, _ = case
    student, teacher, mask = draw(layout, dtype=dtype)
    exact = call(loss, student.detach().double(), teacher.double(), mask).total
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value, gradient = backward(loss, student, teacher, mask)
    assert value.total.dtype == torch.float32
    torch.testing.assert_close(value.total.double(), exact, rtol=2e-5, atol=0)
    assert gradient.dtype == dtype and torch.isfinite(gradient).all()


def test_autocast_changes_nothing_for_float32(case):
    loss, layout, _ = case
    student, teacher, mask = draw(layout, dtype=torch.float32)
    plain, plain_gradient = backward(loss, student, teacher, mask)
    with torch.autocast("cpu", torch.bfloat16):
        value = call(loss, student, teacher, mask)
    (gradient,) = torch.autograd.grad(value.total, student)  # outside autocast, as a training loop calls backward
    assert torch.equal(value.total, plain.total) and torch.equal(gradient, plain_gradient)


@pytest.mark.parametrize("content", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_content_of_padding_changes_nothing(case, content, dtype):
    loss, layout, _ = case
    student, teacher, mask = draw(layout, dtype=dtype)
    value, gradient = backward(loss, student, teacher, mask)
    valid = valid_entries(mask, student)
    dirty = torch.where(valid, student.detach(), content).requires_grad_()
    dirty_teacher = torch.where(valid_entries(mask, teacher), teacher, content)
    with torch.autograd.set_detect_anomaly(True):
        dirty_value, dirty_gradient = backward(loss, dirty, dirty_teacher, mask)
    assert torch.equal(dirty_value.total, value.total) and dirty_value.count == value.count
    assert torch.equal(dirty_gradient, gradient)
    assert (dirty_gradient[~valid] == 0).all()


def test_order_of_the_batch_changes_nothing(case):
    loss, layout, _ = case
    student, teacher, mask = draw(layout)
    value, gradient = backward(loss, student, teacher, mask)
    order = torch.tensor([2, 0, 3, 1])
    permuted, permuted_gradient = backward(loss, student.detach()[order].requires_grad_(), teacher[order], mask[order])
    torch.testing.assert_close(permuted.total, value.total, rtol=1e-12, atol=0)
    torch.testing.assert_close(permuted_gradient, gradient[order])


def test_parts_of_a_batch_add_up(case):
    """Each part is cut to its own longest row, as a collator would do it."""
    loss, layout, _ = case
    student, teacher, mask = draw(layout)
    whole = call(loss, student, teacher, mask)
    total, count = 0, 0
    for rows in ([0], [1, 2], [3]):
        value = call(loss, cut(student, rows), cut(teacher, rows), cut(mask, rows))
        total, count = total + value.total, count + value.count
    assert count == whole.count
    torch.testing.assert_close(total, whole.total, rtol=1e-12, atol=0)


def test_no_gradient_to_the_teacher(case):
    loss, layout, _ = case
    student, teacher, mask = draw(layout)
    teacher.requires_grad_()
    call(loss, student, teacher, mask).total.backward()
    assert teacher.grad is None and student.grad is not None


def test_nothing_valid_gives_zero_with_a_graph(case):
    loss, layout, _ = case
    student, teacher, mask = draw(layout)
    value, gradient = backward(loss, student, teacher, torch.zeros_like(mask))
    assert value.total == 0 and value.count == 0 and value.mean == 0 and value.mean.requires_grad
    assert torch.equal(gradient, torch.zeros_like(student))


@pytest.mark.parametrize("rows", ["one", "duplicates", "zero student", "zero teacher", "zero both"])
def test_degenerate_batches_are_finite(case, rows):
    loss, layout, _ = case
    student, teacher, mask = draw(layout, dtype=torch.float32)
    student = student.detach()
    if rows == "one":
        student, teacher, mask = student[:1], teacher[:1], mask[:1]
    elif rows == "duplicates":
        student, teacher, mask = (tensor[:1].repeat(4, *[1] * (tensor.dim() - 1)) for tensor in (student, teacher, mask))
    else:
        student = student if rows == "zero teacher" else torch.zeros_like(student)
        teacher = teacher if rows == "zero student" else torch.zeros_like(teacher)
    value, gradient = backward(loss, student.requires_grad_(), teacher, mask)
    assert torch.isfinite(value.total) and value.total >= 0
    assert torch.isfinite(gradient).all() and gradient.abs().max() < 1e3


def test_inputs_are_not_changed(case):
    loss, layout, _ = case
    student, teacher, mask = draw(layout)
    before = student.detach().clone(), teacher.clone(), mask.clone()
    backward(loss, student, teacher, mask)
    assert all(torch.equal(a, b) for a, b in zip(before, (student, teacher, mask)))


@pytest.mark.parametrize("name", ["soft_targets", "binary_soft_targets", "reverse_kl", "jsd"])
def test_temperature_of_the_step_wins_for_that_step_only(name):
    build, layout, _ = CASES[name]
    student, teacher, mask = draw(layout)
    loss = build()
    at_two = loss(student, teacher, mask).total
    assert torch.equal(loss(student, teacher, mask, temperature=5.0).total, type(loss)(temperature=5.0)(student, teacher, mask).total)
    assert torch.equal(loss(student, teacher, mask).total, at_two)
    assert loss.scheduled == ("temperature",)


# ------------------------------------------------------------------------------------------------------------ the task loss


def class_ids(generator):
    logits = torch.randn(4, 5, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 6, (4, 5), generator=generator)
    return logits, torch.where(token_mask(LENGTHS), labels, -100)


def positions(generator):
    logits = torch.randn(4, 2, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 6, (4, 2), generator=generator)
    labels[1, 1] = -100
    labels[2] = -100
    return logits, labels


def multi_hot(generator):
    logits = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 2, (4, 6), generator=generator)
    labels[0, 2:] = -100
    labels[2] = -100
    return logits, labels.double()


def targets(generator):
    logits = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    labels = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    labels[0, 2:] = float("nan")
    labels[2] = float("nan")
    return logits, labels


TASK_CASES = {
    "cross entropy": (TaskCrossEntropyLoss, class_ids, TOKENS),
    "cross entropy smoothed": (lambda: TaskCrossEntropyLoss(label_smoothing=0.1), class_ids, TOKENS),
    "spans": (TaskSpanLoss, positions, 5),
    "spans smoothed": (lambda: TaskSpanLoss(label_smoothing=0.1), positions, 5),
    "binary": (TaskBinaryCrossEntropyLoss, multi_hot, 3),
    "binary smoothed": (lambda: TaskBinaryCrossEntropyLoss(label_smoothing=0.1), multi_hot, 3),
    "squared error": (TaskSquaredErrorLoss, targets, 3),
}


@pytest.fixture(params=TASK_CASES, ids=str)
def task_case(request):
    build, make, count = TASK_CASES[request.param]
    logits, labels = make(torch.Generator().manual_seed(1))
    return build(), logits.requires_grad_(), labels, count


def missing(labels):
    return labels.isnan() if labels.isnan().any() else labels == -100


def task_backward(loss, logits, labels):
    value = loss(logits, labels)
    (gradient,) = torch.autograd.grad(value.total, logits)
    return value, gradient


def test_every_task_loss_has_a_row():
    assert {*TASK_LOSSES.values(), TaskSpanLoss} == {type(build()) for build, _, _ in TASK_CASES.values()}
    assert set(TASK_LOSSES) == {"single_label_classification", "multi_label_classification", "regression"}


def test_task_value(task_case):
    loss, logits, labels, count = task_case
    value, gradient = task_backward(loss, logits, labels)
    assert value.total.shape == () and torch.isfinite(value.total) and value.total > 0
    assert value.count.item() == count and not value.count.requires_grad
    rows = missing(labels)
    absent = rows.all(-1) if rows.shape == logits.shape else rows
    assert (gradient[absent] == 0).all() and (gradient[~absent].abs().sum(-1) > 0).all()


def test_task_gradcheck(task_case):
    loss, logits, labels, _ = task_case
    assert torch.autograd.gradcheck(lambda z: loss(z, labels).total, logits, eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_task_half_precision_is_computed_in_float32(task_case, dtype):
    loss, logits, labels, _ = task_case
    half = logits.detach().to(dtype).requires_grad_()
    exact = loss(half.detach().double(), labels).total
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value, gradient = task_backward(loss, half, labels)
        assert value.total.dtype == torch.float32 and gradient.dtype == dtype
        torch.testing.assert_close(value.total.double(), exact, rtol=2e-5, atol=0)


@pytest.mark.parametrize("content", [float("nan"), float("inf"), 1e30], ids=str)
def test_task_logits_without_a_label_change_nothing(task_case, content):
    loss, logits, labels, _ = task_case
    value, gradient = task_backward(loss, logits, labels)
    absent = missing(labels)
    absent = absent if absent.shape == logits.shape else absent.unsqueeze(-1).expand(logits.shape)
    dirty = torch.where(absent, content, logits.detach()).requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        dirty_value, dirty_gradient = task_backward(loss, dirty, labels)
    assert torch.equal(dirty_value.total, value.total) and torch.equal(dirty_gradient, gradient)


def test_task_order_and_parts(task_case):
    loss, logits, labels, _ = task_case
    whole = loss(logits, labels)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(loss(logits[order], labels[order]).total, whole.total, rtol=1e-12, atol=0)
    parts = [loss(logits[rows], labels[rows]) for rows in ([0], [1, 2], [3])]
    assert sum(part.count for part in parts) == whole.count
    torch.testing.assert_close(sum(part.total for part in parts), whole.total, rtol=1e-12, atol=0)


def test_task_nothing_labelled_gives_zero_with_a_graph(task_case):
    loss, logits, labels, _ = task_case
    absent = torch.full_like(labels, float("nan") if labels.isnan().any() else -100)
    value, gradient = task_backward(loss, logits, absent)
    assert value.total == 0 and value.count == 0 and value.mean == 0 and value.mean.requires_grad
    assert torch.equal(gradient, torch.zeros_like(logits))
