"""InfoNCE and CRD: golden values, loops over rows from the papers' formulas, and what they promise like every other loss."""

from __future__ import annotations

import copy
import math
import re

import numpy as np
import pytest
import torch

from hfdistill.losses.contrastive import InfoNCELoss
from hfdistill.losses.memory_bank import CRDLoss, _draw


CLASSES = [0, 1, 2, 0, 1, -100, 2, 0, -100, 1, 2, 2]


def prepared(loss, student=6, teacher=9, seed=0, batches=1):
    """Float64, with parameters, after some training batches (which fill the queue and set Z), in evaluation."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        loss.prepare((2, student), (2, teacher))
    loss = loss.double()
    for batch in range(batches):
        s, t, options = draw(loss, student, teacher, rows=5, seed=100 + batch)
        loss(s, t, **options)
    return loss.eval()


def draw(loss, student=6, teacher=9, rows=7, seed=0, dtype=torch.float64):
    """Student, teacher and what else the loss wants, for a batch of the training data of `CLASSES`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(len(CLASSES), generator=generator)[:rows]
    options = {"labels": torch.tensor(CLASSES)[ids], "example_ids": ids}
    s, t = (torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype) for width in (student, teacher))
    return s.requires_grad_(), t, {name: options[name] for name in loss.needs}


# name -> builder of a loss that is ready for vectors of width 6 (student) and 9 (teacher; 6 where nothing is projected)
CONTRASTIVE_CASES = {
    "info_nce": lambda: prepared(InfoNCELoss(projection=4)),
    "info_nce labels": lambda: prepared(InfoNCELoss(projection=4, positives="labels")),
    "info_nce plain": lambda: prepared(InfoNCELoss(0.3, projection=None), teacher=6),
    "info_nce queue": lambda: prepared(InfoNCELoss(projection=4, queue_size=8), batches=1),
    "info_nce queue labels": lambda: prepared(InfoNCELoss(0.2, 4, queue_size=8, positives="labels"), batches=3),
    "info_nce queue plain": lambda: prepared(InfoNCELoss(projection=None, queue_size=3), teacher=6),
    "crd": lambda: prepared(CRDLoss(dim=4, negatives=3, classes=CLASSES)),
    "crd all others": lambda: prepared(CRDLoss(dim=4, temperature=0.3, examples=len(CLASSES)), batches=2),
    "crd relax": lambda: prepared(CRDLoss(dim=4, negatives=5, mode="relax", classes=CLASSES)),
    "crd gathered rows": lambda: prepared(CRDLoss(dim=2, negatives=2, classes=CLASSES)),  # (K + 1) dim < N
}


@pytest.fixture(params=CONTRASTIVE_CASES, ids=str)
def case(request):
    loss = CONTRASTIVE_CASES[request.param]()

    def batch(**how):
        return draw(loss, **{"teacher": 6 if getattr(loss, "projection", 0) is None else 9, **how})

    return loss, batch


def backward(loss, student, teacher, mask=None, **options):
    value = loss(student, teacher, mask, **options)
    (gradient,) = torch.autograd.grad(value.total, student, retain_graph=True)
    return value, gradient


def g(shape, a, b=0.0):
    """`sin(a (i + 1) + b) (1 + ((7 i) mod 5) / 5)` for i = 0, 1, ..., row by row."""
    i = np.arange(math.prod(shape))
    return torch.from_numpy((np.sin(a * (i + 1) + b) * (1 + (7 * i) % 5 / 5)).reshape(shape))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


fs, ft = g((6, 8), 0.9), g((6, 12), 0.37, 0.2)


# ------------------------------------------------------------------------------------------------- what every loss promises


def test_attributes(case):
    loss, batch = case
    assert loss.signal == "pooled" and loss.signal in loss.signals
    assert loss.layout == "vectors" and loss.unit == "sequences" and not loss.compares_widths and not loss.joint
    assert set(loss.needs) == set(batch()[2])


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_value_is_a_finite_positive_scalar_with_a_count(case, training):
    loss, batch = case
    student, teacher, options = batch()
    value, gradient = backward(loss.train(training), student, teacher, **options)
    assert value.total.shape == () and value.total > 0 and torch.isfinite(value.total) and value.total.dtype == torch.float64
    assert value.count.shape == () and value.count.item() == 7 and not value.count.requires_grad
    assert torch.isfinite(gradient).all() and (gradient.abs().sum(1) > 0).all()


def test_above_zero_when_student_is_the_teacher():
    for loss in (InfoNCELoss(projection=None), CRDLoss(dim=6, examples=12)):
        loss.prepare((2, 6), (2, 6))
        if isinstance(loss, CRDLoss):
            loss.teacher_embedding.load_state_dict(loss.student_embedding.state_dict())
        student, _, options = draw(loss, dtype=torch.float32)
        assert loss(student, student, **options).total > 1e-3


def test_gradcheck(case):
    """In evaluation, with memories, Z and queue that stay: for the inputs and for the loss's own parameters."""
    loss, batch = case
    student, teacher, options = batch(rows=4)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, **options).total, student, eps=1e-6, atol=1e-7, rtol=1e-5)
    if parameters := list(loss.parameters()):
        assert torch.autograd.gradcheck(lambda *_: loss(student, teacher, **options).total, parameters, eps=1e-6, atol=1e-7, rtol=1e-5)


def test_gradient_for_every_parameter_and_none_for_the_teacher(case):
    loss, batch = case
    student, teacher, options = batch()
    teacher.requires_grad_()
    loss.train()(student, teacher, **options).total.backward()
    assert teacher.grad is None and student.grad is not None
    for name, parameter in loss.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    assert not any(buffer.requires_grad for buffer in loss.buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_half_precision_is_computed_in_float32(case, dtype, autocast):
    loss, batch = case
    student, teacher, options = batch(dtype=dtype)
    exact = loss(student.detach().double(), teacher.double(), **options).total
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value, gradient = backward(loss.float(), student, teacher, **options)
    assert value.total.dtype == torch.float32
    torch.testing.assert_close(value.total.double(), exact, rtol=2e-5, atol=0)
    assert gradient.dtype == dtype and torch.isfinite(gradient).all()


def test_autocast_changes_nothing_for_float32(case):
    loss, batch = case
    student, teacher, options = batch(dtype=torch.float32)
    plain, plain_gradient = backward(loss.float(), student, teacher, **options)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher, **options)
    (gradient,) = torch.autograd.grad(value.total, student)
    assert torch.equal(value.total, plain.total) and torch.equal(gradient, plain_gradient)


def test_float64_inputs_stay_float64_with_float32_parameters(case):
    loss, batch = case
    student, teacher, options = batch()
    value, gradient = backward(loss.float().train(), student, teacher, **options)
    assert value.total.dtype == gradient.dtype == torch.float64
    assert all(buffer.dtype in (torch.float32, torch.int64) for buffer in loss.buffers())


def test_order_of_the_batch_changes_nothing(case):
    loss, batch = case
    student, teacher, options = batch()
    value, gradient = backward(loss, student, teacher, **options)
    order = torch.tensor([2, 0, 6, 3, 1, 5, 4])
    moved = {name: tensor[order] for name, tensor in options.items()}
    permuted, permuted_gradient = backward(loss, student.detach()[order].requires_grad_(), teacher[order], **moved)
    torch.testing.assert_close(permuted.total, value.total, rtol=1e-12, atol=0)
    torch.testing.assert_close(permuted_gradient, gradient[order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("content", [float("nan"), float("inf"), 1e30], ids=str)
def test_samples_that_are_masked_change_nothing(case, content):
    loss, batch = case
    student, teacher, options = batch()
    mask = torch.tensor([True, True, False, True, False, True, True])
    cut, cut_gradient = backward(loss, student, teacher, mask, **options)
    kept = {name: tensor[mask] for name, tensor in options.items()}
    short = student.detach()[mask].requires_grad_()
    value, gradient = backward(loss, short, teacher[mask], **kept)
    assert torch.equal(cut.total, value.total) and cut.count == value.count == 5
    dirty = torch.where(mask[:, None], student.detach(), content).requires_grad_()
    garbage = {name: torch.where(mask, tensor, 10**6) for name, tensor in options.items()}
    states = [copy.deepcopy(loss).train() for _ in range(2)]
    dirty_value, dirty_gradient = backward(states[0], dirty, torch.where(mask[:, None], teacher, content), mask, **garbage)
    assert torch.equal(dirty_value.total, value.total)
    for seen in (cut_gradient, dirty_gradient):
        assert torch.equal(seen[mask], gradient) and (seen[~mask] == 0).all()
    states[1](short, teacher[mask], **kept)
    assert all(torch.equal(a, b) for a, b in zip(states[0].buffers(), states[1].buffers()))


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_nothing_valid_gives_zero_with_a_graph(case, training):
    loss, batch = case
    student, teacher, options = batch()
    before = {name: buffer.clone() for name, buffer in loss.named_buffers()}
    value, gradient = backward(loss.train(training), student, teacher, torch.zeros(7, dtype=torch.bool), **options)
    assert value.total == 0 and value.count == 0 and value.mean == 0 and torch.equal(gradient, torch.zeros_like(student))
    value.mean.backward()  # ranks with and without samples must have gradients of the same parameters
    assert all(torch.equal(parameter.grad, torch.zeros_like(parameter)) for parameter in loss.parameters())
    assert all(torch.equal(buffer, before[name]) for name, buffer in loss.named_buffers() if name != "draws")


def test_an_empty_first_batch_does_not_set_z():
    loss = CRDLoss(dim=3, examples=5)
    loss.prepare((2, 4), (2, 4))
    value = loss(torch.randn(2, 4), torch.randn(2, 4), torch.zeros(2, dtype=torch.bool), example_ids=torch.tensor([0, 1]))
    assert value.total == 0 and (loss.z == -1).all()
    loss(torch.randn(2, 4), torch.randn(2, 4), example_ids=torch.tensor([0, 1]))
    assert (loss.z > 0).all()


@pytest.mark.parametrize("rows", ["one", "duplicates", "zero student", "zero teacher", "zero both"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_degenerate_batches_are_finite(case, rows, training):
    """Zeros where the projections have no bias either, or they would not be zeros any more."""
    loss, batch = case
    for module in loss.children():
        torch.nn.init.zeros_(module.bias)
    student, teacher, options = batch(dtype=torch.float32)
    student = student.detach()
    if rows == "one":
        student, teacher, options = student[:1], teacher[:1], {name: tensor[:1] for name, tensor in options.items()}
    elif rows == "duplicates":
        student, teacher = student[:1].repeat(7, 1), teacher[:1].repeat(7, 1)
        options = {name: tensor[:1].repeat(7) for name, tensor in options.items()}
    else:
        student = student if rows == "zero teacher" else torch.zeros_like(student)
        teacher = teacher if rows == "zero student" else torch.zeros_like(teacher)
    loss = loss.float().train(training)
    value, gradient = backward(loss, student.requires_grad_(), teacher, **options)
    value.total.backward()
    assert torch.isfinite(value.total) and value.total >= 0
    for tensor in (gradient, *(p.grad for p in loss.parameters())):
        assert torch.isfinite(tensor).all() and tensor.abs().max() < 1e4
    assert all(torch.isfinite(buffer).all() for buffer in loss.buffers())
    if rows in ("zero student", "zero both"):
        assert (gradient == 0).all()


def test_scale_of_the_vectors_changes_nothing(case):
    loss, batch = case
    for module in loss.children():
        torch.nn.init.zeros_(module.bias)
    student, teacher, options = batch()
    torch.testing.assert_close(loss(100 * student, teacher / 7, **options).total, loss(student, teacher, **options).total)


def test_inputs_are_not_changed(case):
    loss, batch = case
    student, teacher, options = batch()
    before = student.detach().clone(), teacher.clone(), *(tensor.clone() for tensor in options.values())
    backward(loss.train(), student, teacher, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, (student, teacher, *options.values())))


def test_evaluation_keeps_nothing(case):
    loss, batch = case
    student, teacher, options = batch()
    before = {name: buffer.clone() for name, buffer in loss.named_buffers()}
    first, second = (loss(student, teacher, **options).total for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(buffer, before[name]) for name, buffer in loss.named_buffers())


def test_backward_changes_no_buffer(case):
    loss, batch = case
    student, teacher, options = batch()
    value = loss.train()(student, teacher, **options)
    before = {name: buffer.clone() for name, buffer in loss.named_buffers()}
    value.total.backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in loss.named_buffers())


def test_micro_batches_can_wait_for_one_backward(case):
    """The graph of a batch must survive that the next ones move queue and memories."""
    loss, batch = case
    batches = [batch(seed=seed) for seed in (1, 2)]
    loss.train()
    apart, state = 0, copy.deepcopy(loss)
    for student, teacher, options in batches:
        apart = apart + backward(state, student, teacher, **options)[1].sum()
    sum(loss(student, teacher, **options).total for student, teacher, options in batches).backward()
    torch.testing.assert_close(sum(student.grad.sum() for student, _, _ in batches), apart)


def test_resumed_run_goes_on_as_the_uninterrupted_one(case):
    loss, batch = case
    loss.train()
    saved = copy.deepcopy(loss.state_dict())
    fresh = copy.deepcopy(loss)
    for parameter in fresh.parameters():
        torch.nn.init.zeros_(parameter)
    for buffer in fresh.buffers():
        buffer.zero_()
    fresh.load_state_dict(saved)
    for seed in (3, 4, 5):
        student, teacher, options = batch(seed=seed)
        values = [one(student, teacher, **options).total for one in (loss, fresh)]
        assert torch.equal(*values)
    assert all(torch.equal(a, b) for a, b in zip(loss.state_dict().values(), fresh.state_dict().values()))


def test_torch_randomness_is_not_used(case):
    loss, batch = case
    student, teacher, options = batch()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    loss.train()(student, teacher, **options)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("loss", [InfoNCELoss(), CRDLoss(examples=4), InfoNCELoss(projection=None, queue_size=4)])
def test_prepare_was_forgotten(loss):
    with pytest.raises(ValueError, match=re.escape("Call prepare(student_shape, teacher_shape) before training")):
        loss(torch.zeros(2, 3), torch.zeros(2, 3), **({"example_ids": torch.arange(2)} if isinstance(loss, CRDLoss) else {}))


@pytest.mark.parametrize("loss", [InfoNCELoss, CRDLoss])
@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), "0.1", True])
def test_bad_temperatures(loss, temperature):
    with pytest.raises(ValueError, match="temperature must be a finite number > 0"):
        loss(temperature=temperature)


def test_bad_shapes(case):
    loss, _ = case
    options = {name: torch.arange(2) for name in loss.needs}
    for student, teacher, mask, message in (
        (torch.zeros(2, 3, 6), torch.zeros(2, 3, 9), None, "one vector each, (batch, width)"),
        (torch.zeros(2, 6), torch.zeros(3, 9), None, "student has shape (2, 6) and teacher (3, 9)"),
        (torch.zeros(2, 6), torch.zeros(2, 6), torch.ones(3).bool(), "mask has shape (3,)"),
        (torch.zeros(2, 6), torch.zeros(2, 6), torch.ones(2), "mask must be a bool tensor"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            loss(student, teacher, mask, **options)


# ---------------------------------------------------------------------------------------------------------------- InfoNCE


def info_nce_by_loop(student, teacher, temperature, labels=None, queue=(), queue_labels=()):
    """Both directions, one row after the other: mean of `-log softmax` at the row's own partner. Vectors of length 1, NumPy."""

    def cosine(a, b):
        return math.fsum(x * y for x, y in zip(a, b))

    def negative(a, b):
        return labels is None or labels[a] == -100 or labels[a] != b

    n, directions = len(student), []
    names = [None] * n if labels is None else labels
    for own, others, further in ((student, teacher, list(zip(queue, queue_labels))), (teacher, student, [])):
        rows = []
        for i in range(n):
            scores = [cosine(own[i], others[j]) / temperature for j in range(n) if j == i or negative(i, names[j])]
            scores += [cosine(own[i], vector) / temperature for vector, label in further if negative(i, label)]
            rows.append(math.log(math.fsum(map(math.exp, scores))) - cosine(own[i], others[i]) / temperature)
        directions.append(math.fsum(rows) / n)
    return directions


def golden_info_nce():
    loss = InfoNCELoss(temperature=0.1, projection=4)
    loss.prepare((6, 8), (6, 12))
    loss.double().load_state_dict(
        {
            "student_projection.weight": g((4, 8), 0.21),
            "student_projection.bias": g((4,), 0.4),
            "teacher_projection.weight": g((4, 12), 0.33),
            "teacher_projection.bias": g((4,), 0.6),
        }
    )
    return loss


def test_golden_info_nce(monkeypatch):
    loss = golden_info_nce()
    assert loss(fs, ft).mean.item() == pytest.approx(6.23274281358, rel=1e-11)
    directions, seen = loss._directions, []
    monkeypatch.setattr(loss, "_directions", lambda *inputs: seen.append(directions(*inputs)) or seen[-1])
    loss(fs, ft)
    assert [direction.item() / 6 for direction in seen[0]] == pytest.approx([6.55261425805, 5.9128713691], rel=1e-11)
    embeddings = [
        unit(side.numpy() @ layer.weight.detach().numpy().T + layer.bias.detach().numpy())
        for side, layer in ((fs, loss.student_projection), (ft, loss.teacher_projection))
    ]
    assert info_nce_by_loop(*embeddings, 0.1) == pytest.approx([6.55261425805, 5.9128713691], rel=1e-11)


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.3])
@pytest.mark.parametrize("labels", [None, (0, 1, 0, -100, 1, -100, 0), (2,) * 7, (-100,) * 7], ids=str)
def test_info_nce_against_a_loop(temperature, labels):
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(size=(2, 7, 5)) * 3
    loss = InfoNCELoss(temperature, projection=None, positives="itself" if labels is None else "labels")
    options = {} if labels is None else {"labels": torch.tensor(labels)}
    value = loss(torch.from_numpy(student), torch.from_numpy(teacher), **options)
    expected = info_nce_by_loop(unit(student), unit(teacher), temperature, labels)
    assert value.mean.item() == pytest.approx(sum(expected) / 2, rel=1e-10, abs=1e-12)
    if labels == (2,) * 7:
        assert value.total.item() == pytest.approx(0, abs=1e-12)  # nobody is a negative


@pytest.mark.parametrize("size", [1, 3, 7, 16])
@pytest.mark.parametrize("positives", ["itself", "labels"])
def test_queue_against_a_list(size, positives):
    """Batches of 3, 7, 2 and 4 rows: a queue that is not full yet, one that wraps around, a batch larger than the queue."""
    rng = np.random.default_rng(size)
    loss = InfoNCELoss(0.2, projection=None, queue_size=size, positives=positives)
    loss.prepare((2, 5), (2, 5))
    loss.double()
    queue = []  # the latest at the end
    for rows in (3, 7, 2, 4):
        student, teacher = rng.normal(size=(2, rows, 5))
        labels = rng.choice([-100, 0, 1], size=rows).tolist()
        kept, names = zip(*queue) if queue else ((), ())
        value = loss(torch.from_numpy(student), torch.from_numpy(teacher), **({"labels": torch.tensor(labels)} if loss.needs else {}))
        known = labels if loss.needs else None
        expected = info_nce_by_loop(unit(student), unit(teacher), 0.2, known, kept, names if loss.needs else [None] * len(kept))
        assert value.mean.item() == pytest.approx(sum(expected) / 2, rel=1e-10)
        queue = (queue + list(zip(unit(teacher), labels)))[-size:]
        assert loss.queue_filled == len(queue)
        held = sorted(loss.queue[: len(queue)].tolist())
        np.testing.assert_allclose(held, sorted(vector.tolist() for vector, _ in queue))


def test_queue_is_saved_and_starts_empty():
    loss = InfoNCELoss(projection=3, queue_size=4)
    assert loss.queue is None
    loss.prepare((2, 5), (2, 6))
    assert set(loss.state_dict()) >= {"queue", "queue_labels", "queue_position", "queue_filled"}
    assert loss.queue.shape == (4, 3) and loss.queue_filled == 0
    student, teacher = torch.randn(2, 5), torch.randn(2, 6)
    without = InfoNCELoss(projection=3)
    without.prepare((2, 5), (2, 6))
    assert not any("queue" in name for name in without.state_dict())
    without.load_state_dict({name: tensor for name, tensor in loss.state_dict().items() if "queue" not in name})
    assert torch.equal(without(student, teacher).total, loss(student, teacher).total)  # an empty queue has no vectors of zeros


def test_info_nce_at_chance_and_at_best():
    same, loss = torch.ones(5, 3), InfoNCELoss(projection=None)
    assert loss(same, same).mean.item() == pytest.approx(math.log(5), rel=1e-6)
    assert InfoNCELoss(0.01, projection=None)(torch.eye(5), torch.eye(5)).mean.item() < 1e-6
    assert loss(torch.eye(5), torch.eye(5)).mean.item() == pytest.approx(math.log(1 + 4 * math.exp(-10)), rel=1e-3)
    assert loss(same[:1], same[:1]).total == 0  # one sample has no negatives
    queue = InfoNCELoss(projection=None, queue_size=6)
    queue.prepare((2, 3), (2, 3))
    for _ in range(2):
        queue(same, same)
    assert queue(same, same).mean.item() == pytest.approx((math.log(5) + math.log(11)) / 2, rel=1e-6)


def test_a_zero_vector_is_as_near_to_all():
    student, teacher, _ = draw(InfoNCELoss(), teacher=6)
    assert InfoNCELoss(projection=None)(0 * student, teacher).mean.item() == pytest.approx(math.log(7), rel=1e-12)
    loss = CRDLoss(dim=6, negatives=3, examples=12)
    loss.prepare((2, 6), (2, 6))
    torch.nn.init.zeros_(loss.student_embedding.bias)
    before = loss.memory_v1.clone()
    loss(torch.zeros(1, 6), torch.randn(1, 6), example_ids=torch.tensor([3]))
    torch.testing.assert_close(loss.memory_v1[3], before[3] / before[3].norm())  # its example keeps its direction


def test_temperature_of_the_step_wins_for_that_step_only():
    student, teacher, _ = draw(InfoNCELoss())
    loss = InfoNCELoss(projection=None)
    teacher = teacher[:, :6]
    usual = loss(student, teacher).total
    assert torch.equal(loss(student, teacher, temperature=0.5).total, InfoNCELoss(0.5, projection=None)(student, teacher).total)
    assert torch.equal(loss(student, teacher).total, usual) and loss.scheduled == ("temperature",)
    with pytest.raises(ValueError, match="temperature must be"):
        loss(student, teacher, temperature=0.0)


def test_projections_are_trained_and_have_the_widths_of_the_signals():
    loss = InfoNCELoss()
    loss.prepare((4, 6), (4, 9))
    assert loss.student_projection.weight.shape == (128, 6) and loss.teacher_projection.weight.shape == (128, 9)
    assert all(parameter.requires_grad for parameter in loss.parameters()) and len(list(loss.parameters())) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection": 0}, "projection must be an integer >= 1, got 0"),
        ({"projection": 1.5}, "projection must be an integer >= 1, got 1.5"),
        ({"queue_size": -1}, "queue_size must be an integer >= 0, got -1"),
        ({"queue_size": True}, "queue_size must be an integer >= 0, got True"),
        ({"gather": "yes"}, "gather must be true or false, got 'yes'"),
        ({"positives": "class"}, "positives must be 'itself' or 'labels', got 'class'"),
    ],
    ids=str,
)
def test_bad_options_of_info_nce(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        InfoNCELoss(**options)


@pytest.mark.parametrize("labels", [None, torch.zeros(2, dtype=torch.long), torch.zeros(3), torch.zeros(3, 1, dtype=torch.long)], ids=str)
def test_info_nce_bad_labels(labels):
    loss = InfoNCELoss(projection=None, positives="labels")
    with pytest.raises(ValueError, match="one integer label for each of the 3 samples"):
        loss(torch.randn(3, 4), torch.randn(3, 4), **({} if labels is None else {"labels": labels}))


def test_labels_are_refused_where_they_are_not_used():
    with pytest.raises(TypeError, match="has no scheduled value or input"):
        InfoNCELoss(projection=None)(torch.randn(3, 4), torch.randn(3, 4), labels=torch.arange(3))


def test_unequal_widths_without_projection():
    with pytest.raises(ValueError, match="student vectors have width 6 and teacher vectors 9"):
        InfoNCELoss(projection=None).prepare((2, 6), (2, 9))
    with pytest.raises(ValueError, match="Set projection=128"):
        InfoNCELoss(projection=None)(torch.zeros(2, 6), torch.zeros(2, 9))
    InfoNCELoss().check_widths(6, 9)


# -------------------------------------------------------------------------------------------------------------------- CRD


class MemoryByLoop:
    """CRD straight from its formulas: NumPy, one row and one negative at a time."""

    def __init__(self, memories, temperature, momentum):
        self.memories, self.temperature, self.momentum, self.z = [m.copy() for m in memories], temperature, momentum, None

    def step(self, student, teacher, ids, positives, negatives):
        """Mean over the batch, then the update; `student` and `teacher` are of length 1."""
        n, k, eps = len(self.memories[0]), negatives.shape[1], 1e-7
        sides = ((student, self.memories[1]), (teacher, self.memories[0]))
        powers = [
            [[math.exp(float(v @ memory[j]) / self.temperature) for j in (p, *row)] for v, p, row in zip(vectors, positives, negatives)]
            for vectors, memory in sides
        ]
        if self.z is None:
            self.z = [n * float(np.mean(side)) for side in powers]
        total, c = 0.0, k / n
        for side, z in zip(powers, self.z):
            for row in side:
                x = [power / z for power in row]
                total -= math.log(x[0] / (x[0] + c + eps))
                total -= math.fsum(math.log(c / (xj + c + eps)) for xj in x[1:])
        former = [memory.copy() for memory in self.memories]
        for memory, old, vectors in zip(self.memories, former, (student, teacher)):
            for i, v in zip(ids, vectors):
                memory[i] = unit(self.momentum * old[i] + (1 - self.momentum) * v)
        return total / len(ids)


def golden_crd(temperature):
    loss = CRDLoss(dim=4, negatives=4, temperature=temperature, examples=10)
    loss.prepare((6, 8), (6, 12))
    loss.double().load_state_dict(
        {
            **loss.state_dict(),
            "student_embedding.weight": g((4, 8), 0.21),
            "student_embedding.bias": g((4,), 0.4),
            "teacher_embedding.weight": g((4, 12), 0.33),
            "teacher_embedding.bias": g((4,), 0.6),
            "memory_v1": torch.from_numpy(unit(g((10, 4), 0.77).numpy())),
            "memory_v2": torch.from_numpy(unit(g((10, 4), 0.45).numpy())),
        }
    )
    loss.negative_ids = lambda ids: (ids[:, None] + torch.tensor([1, 3, 5, 7])) % 10
    return loss


@pytest.mark.parametrize(
    ("temperature", "steps", "z", "tolerance"),
    [
        (float(np.float32(0.07)), (13.5881922244, 16.1594028269), (47600.0909856, 156.070431572), 1e-8),
        (0.07, (13.5881922749, 16.1594028892), (47600.0930415, 156.070434297), 1e-11),
    ],
    ids=["float32", "float64"],
)
def test_golden_crd(temperature, steps, z, tolerance):
    loss = golden_crd(temperature)
    assert loss.z.tolist() == [-1, -1]
    for step in steps:
        value = loss(fs, ft, example_ids=torch.arange(6))
        assert value.mean.item() == pytest.approx(step, rel=tolerance)
        assert loss.z.tolist() == pytest.approx(z, rel=max(tolerance, 1e-11))  # set by the first step, and kept


@pytest.mark.parametrize("mode", ["exact", "relax"])
@pytest.mark.parametrize("negatives", [1, 3, 4, 16384])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_crd_against_a_loop(mode, negatives, momentum):
    """Four training batches of different examples (the last has one of them twice): values, memories and Z."""
    rng = np.random.default_rng(negatives)
    loss = CRDLoss(dim=3, negatives=negatives, temperature=0.2, momentum=momentum, mode=mode, seed=5, classes=CLASSES)
    loss.prepare((2, 4), (2, 5))
    loss.double()
    reference = MemoryByLoop([loss.memory_v1.numpy(), loss.memory_v2.numpy()], 0.2, momentum)
    for ids in ([0, 5, 3, 9], [1, 2, 3], [11], [4, 0, 8, 4]):
        student, teacher = rng.normal(size=(len(ids), 4)), rng.normal(size=(len(ids), 5))
        embedded = [
            unit(side @ layer.weight.detach().numpy().T + layer.bias.detach().numpy())
            for side, layer in ((student, loss.student_embedding), (teacher, loss.teacher_embedding))
        ]
        positives, chosen = loss.positive_ids(torch.tensor(ids)).tolist(), loss.negative_ids(torch.tensor(ids)).numpy()
        expected = reference.step(*embedded, ids, positives, chosen)
        value = loss(torch.from_numpy(student), torch.from_numpy(teacher), example_ids=torch.tensor(ids))
        assert value.mean.item() == pytest.approx(expected, rel=1e-10) and value.count == len(ids)
        for memory, theirs in zip((loss.memory_v1, loss.memory_v2), reference.memories):
            np.testing.assert_allclose(memory.numpy(), theirs, rtol=1e-10, atol=1e-12)
        assert loss.z.tolist() == pytest.approx(reference.z, rel=1e-11)


def test_value_where_all_scores_are_the_same():
    loss = prepared(CRDLoss(dim=4, negatives=7, examples=20), batches=0).train()
    loss.memory_v1.zero_(), loss.memory_v2.zero_()
    student, teacher, options = draw(loss)
    expected = 2 * (math.log(8) + 7 * math.log(1 + 1 / 7))
    assert loss(student, teacher, **options).mean.item() == pytest.approx(expected, rel=1e-5)  # 1e-7 of the paper's code beside c
    assert loss.z.tolist() == pytest.approx([20, 20])


def test_parts_of_a_batch_add_up():
    """With memories and Z that stay: an id has its negatives wherever it is."""
    loss = CONTRASTIVE_CASES["crd"]()
    student, teacher, options = draw(loss)
    whole = loss(student, teacher, **options)
    parts = [loss(student[rows], teacher[rows], example_ids=options["example_ids"][rows]) for rows in ([0, 1], [2], [3, 4, 5, 6])]
    torch.testing.assert_close(sum(part.total for part in parts), whole.total, rtol=1e-12, atol=0)
    assert sum(part.count for part in parts) == whole.count


def test_both_ways_to_score_are_one():
    """A product with the whole memory, and with its chosen rows only, which is chosen where it is less."""
    values = []
    for copies in (1, 40):
        loss = CRDLoss(dim=4, negatives=3, examples=12 * copies)
        loss.prepare((2, 6), (2, 9))
        loss.double()
        with torch.no_grad():
            for parameter in loss.parameters():
                parameter.copy_(g(tuple(parameter.shape), 0.3))
        loss.memory_v1[:12], loss.memory_v2[:12] = g((12, 4), 0.8), g((12, 4), 0.5)
        loss.negative_ids = lambda ids: (ids[:, None] + torch.tensor([1, 2, 5])) % 12
        student, teacher, options = draw(loss)
        loss.eval()
        # c is 3 / N and Z grows with N: undone, so that both have the same x / c
        loss.log_z = torch.tensor([math.log(100 * copies)] * 2, dtype=torch.float64)
        value, gradient = backward(loss, student, teacher, **options)
        values.append((value.total.detach(), gradient))
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-6)  # but for the 1e-7 beside c


def test_memories_begin_uniform_and_depend_on_the_seed():
    loss = CRDLoss(dim=12, examples=2000)
    assert loss.memory_v1.shape == loss.memory_v2.shape == (2000, 12) and loss.memory_v1.dtype == torch.float32
    for memory in (loss.memory_v1, loss.memory_v2):
        assert 0.49 < memory.max() <= 0.5 and -0.5 <= memory.min() < -0.49 and memory.mean().abs() < 0.01
        assert memory.square().mean().item() == pytest.approx(1 / 12, rel=0.03)  # uniform in +-0.5: rows of length 1 on average
    assert (loss.memory_v1 - loss.memory_v2).abs().mean() > 0.3
    assert torch.equal(CRDLoss(dim=12, examples=2000).memory_v2, loss.memory_v2)
    assert not torch.equal(CRDLoss(dim=12, examples=2000, seed=1).memory_v2, loss.memory_v2)


def test_small_temperatures_stay_in_range():
    loss = CRDLoss(dim=4, negatives=3, temperature=0.002, examples=12)
    loss.prepare((2, 6), (2, 9))
    student, teacher, options = draw(loss, dtype=torch.float32)
    for _ in range(3):
        value, gradient = backward(loss, student, teacher, **options)
        assert torch.isfinite(value.total) and torch.isfinite(gradient).all()


# ---- draws


def test_negatives_are_of_other_classes_and_all_of_them_come():
    loss = CRDLoss(dim=4, negatives=3, classes=CLASSES)
    seen = [set() for _ in CLASSES]
    for draws in range(60):
        loss.draws.fill_(draws)
        chosen = loss.negative_ids(torch.arange(12))
        assert chosen.shape == (12, 3) and chosen.dtype == torch.int64
        for example, row in enumerate(chosen.tolist()):
            assert len(set(row)) == 3
            seen[example] |= set(row)
    for example, label in enumerate(CLASSES):
        others = {j for j, other in enumerate(CLASSES) if j != example and (label == -100 or other != label)}
        assert seen[example] == others


def test_negatives_of_a_sample_depend_on_its_id_and_the_batches_so_far_only():
    loss = CRDLoss(dim=4, negatives=30, examples=500)
    alone = {i: loss.negative_ids(torch.tensor([i]))[0] for i in (7, 8, 400)}
    together = loss.negative_ids(torch.tensor([400, 3, 7, 8, 7]))
    for row, example in ((0, 400), (2, 7), (3, 8), (4, 7)):
        assert torch.equal(together[row], alone[example])
    assert not torch.equal(alone[7], alone[8])
    loss.draws += 1
    assert not torch.equal(loss.negative_ids(torch.tensor([7]))[0], alone[7])
    loss.draws -= 1
    assert torch.equal(loss.negative_ids(torch.tensor([7]))[0], alone[7])
    assert not torch.equal(CRDLoss(dim=4, negatives=30, examples=500, seed=1).negative_ids(torch.tensor([7]))[0], alone[7])


def test_negatives_of_training_batches_are_those_of_their_number():
    loss = prepared(CRDLoss(dim=4, negatives=5, examples=12), batches=0).train()
    student, teacher, options = draw(loss)
    ids, seen = options["example_ids"], []
    for draws in range(3):
        assert loss.draws == draws
        seen.append(loss.negative_ids(ids))
        loss(student, teacher, **options)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    loss.eval()(student, teacher, **options)
    assert loss.draws == 3


def test_more_negatives_than_others_are_all_others():
    loss = CRDLoss(dim=4, negatives=16384, examples=9)
    for example, row in enumerate(loss.negative_ids(torch.arange(9)).tolist()):
        assert sorted(row) == [j for j in range(9) if j != example]
    assert sorted(CRDLoss(dim=4, negatives=7, examples=9).negative_ids(torch.tensor([2]))[0].tolist()) != list(range(9))
    loss = CRDLoss(dim=4, negatives=10, classes=[0] * 9 + [1, 1])  # two candidates for ten negatives: they repeat
    chosen = loss.negative_ids(torch.tensor([0, 10]))
    assert chosen.shape == (2, 10) and set(chosen[0].tolist()) == {9, 10} and set(chosen[1].tolist()) <= set(range(9))
    loss = CRDLoss(dim=4, negatives=2, classes=[0] * 9 + [1, 1])
    assert set(loss.negative_ids(torch.tensor([3]))[0].tolist()) == {9, 10}


@pytest.mark.parametrize(("candidates", "count"), [(40, 10), (40, 40), (400, 10), (40, 2), (40, 1)])
def test_draws_are_uniform(candidates, count):
    """Every way to draw: a permutation, and fewer of many. Each candidate comes equally often, and at any place."""
    rounds = 4000
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([_draw(candidates, count, generator) for _ in range(rounds)])
    assert all(len(set(row)) == count for row in drawn.tolist()) and drawn.min() >= 0 and drawn.max() < candidates
    for columns in (drawn, drawn[:, :1]):
        expected = columns.numel() / candidates
        chi_square = ((columns.flatten().bincount(minlength=candidates) - expected) ** 2 / expected).sum().item()
        assert chi_square < candidates + 6 * math.sqrt(2 * candidates)


def test_positives_of_relax_are_of_the_class():
    loss = CRDLoss(dim=4, negatives=3, mode="relax", classes=CLASSES)
    seen = [set() for _ in CLASSES]
    for draws in range(60):
        loss.draws.fill_(draws)
        for example, positive in enumerate(loss.positive_ids(torch.arange(12)).tolist()):
            seen[example].add(positive)
    for example, label in enumerate(CLASSES):
        assert seen[example] == ({example} if label == -100 else {j for j, other in enumerate(CLASSES) if other == label})
    exact = CRDLoss(dim=4, negatives=3, classes=CLASSES)
    assert torch.equal(exact.positive_ids(torch.arange(12)), torch.arange(12))


# ---- state


def test_an_id_that_is_twice_in_a_batch_is_stored_as_its_last_row():
    losses = [prepared(CRDLoss(dim=4, negatives=3, examples=12), batches=0).train() for _ in range(2)]
    student, teacher, _ = draw(losses[0], rows=4)
    losses[0](student, teacher, example_ids=torch.tensor([3, 5, 3, 3]))
    losses[1](student[[1, 3]], teacher[[1, 3]], example_ids=torch.tensor([5, 3]))
    for name in ("memory_v1", "memory_v2"):
        torch.testing.assert_close(getattr(losses[0], name), getattr(losses[1], name), rtol=1e-12, atol=0)


def test_only_rows_of_the_batch_move_and_they_have_length_one():
    loss = prepared(CRDLoss(dim=4, negatives=3, examples=12), batches=0).train()
    before = loss.memory_v1.clone(), loss.memory_v2.clone()
    student, teacher, options = draw(loss)
    loss(student, teacher, **options)
    moved = torch.zeros(12, dtype=torch.bool)
    moved[options["example_ids"]] = True
    for memory, former in zip((loss.memory_v1, loss.memory_v2), before):
        assert torch.equal((memory != former).any(1), moved)
        torch.testing.assert_close(memory[moved].norm(dim=1), torch.ones(7, dtype=torch.float64))


def test_evaluation_before_training_uses_the_z_of_its_batch():
    losses = [prepared(CRDLoss(dim=4, negatives=3, examples=12), batches=0) for _ in range(2)]
    student, teacher, options = draw(losses[0])
    value = losses[0](student, teacher, **options).total
    assert losses[0].z.tolist() == [-1, -1] and losses[0].draws == 0
    assert torch.equal(losses[1].train()(student, teacher, **options).total, value)


def test_set_examples_is_the_constructor():
    later = CRDLoss(dim=4, negatives=3, seed=2)
    assert later.examples is None and later.memory_v1 is None
    with pytest.raises(ValueError, match=re.escape("call set_examples(labels) before training")):
        later(torch.zeros(2, 3), torch.zeros(2, 3), example_ids=torch.arange(2))
    later.double().set_examples(torch.tensor(CLASSES, dtype=torch.int32))
    at_once = CRDLoss(dim=4, negatives=3, seed=2, classes=torch.tensor(CLASSES)).double()
    assert later.examples == at_once.examples == 12 and later.memory_v1.dtype == torch.float64
    assert all(torch.equal(a, b) for a, b in zip(later.buffers(), at_once.buffers()))
    assert torch.equal(later.negative_ids(torch.arange(12)), at_once.negative_ids(torch.arange(12)))
    later.prepare((2, 6), (2, 9))
    later.double()(*draw(later)[:2], example_ids=torch.arange(7))
    later.set_examples(torch.tensor(CLASSES))  # forgets
    assert all(torch.equal(a, b) for a, b in zip(later.buffers(), at_once.buffers()))


def test_state_dict_holds_all_of_it():
    loss = CRDLoss(dim=4, examples=12)
    loss.prepare((2, 6), (2, 9))
    layers = [f"{side}_embedding.{name}" for side in ("student", "teacher") for name in ("weight", "bias")]
    assert set(loss.state_dict()) == {"memory_v1", "memory_v2", "log_z", "draws", *layers}
    assert {name for name, _ in loss.named_parameters()} == set(layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim must be an integer >= 1, got 0"),
        ({"negatives": 0}, "negatives must be an integer >= 1, got 0"),
        ({"negatives": 2.0}, "negatives must be an integer >= 1, got 2.0"),
        ({"momentum": 1.0}, "momentum must be a number in [0, 1), got 1.0"),
        ({"momentum": float("nan")}, "momentum must be a number in [0, 1), got nan"),
        ({"mode": "hard"}, "mode must be 'exact' or 'relax', got 'hard'"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"examples": 1}, "examples must be an integer >= 2, got 1"),
        ({"examples": 3, "classes": [0, 1]}, "classes has 2 entries but examples is 3"),
        ({"classes": [4, 4, 4]}, "All 3 training examples have the label 4"),
        ({"classes": [4]}, "have shape (1,)"),
        ({"classes": [[0, 1]]}, "have shape (1, 2)"),
        ({"classes": [0.5, 1.0]}, "(torch.float32)"),
        ({"examples": 4, "mode": "relax"}, "none of the 4 training examples has a label"),
    ],
    ids=str,
)
def test_bad_options_of_crd(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CRDLoss(**options)


@pytest.mark.parametrize("ids", [None, torch.zeros(2), torch.arange(3), torch.zeros(2, 1, dtype=torch.long)], ids=str)
def test_bad_ids(ids):
    loss = prepared(CRDLoss(dim=4, examples=12), batches=0)
    with pytest.raises(ValueError, match="CRD needs the id of each of the 2 samples"):
        loss(torch.zeros(2, 6), torch.zeros(2, 9), **({} if ids is None else {"example_ids": ids}))


@pytest.mark.parametrize("wrong", [12, -1])
def test_ids_without_a_row(wrong):
    loss = prepared(CRDLoss(dim=4, examples=12), batches=0)
    message = f"The example id {wrong} has no row in the memories of CRD, which were made for 12 training examples with ids from 0 to 11."
    with pytest.raises(ValueError, match=re.escape(message)):
        loss(torch.zeros(2, 6), torch.zeros(2, 9), example_ids=torch.tensor([3, wrong]))
