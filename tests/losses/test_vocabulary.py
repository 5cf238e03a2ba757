"""The chunked losses against the plain ones on whole logits, through autograd: values and all gradients."""

from __future__ import annotations

import re

import pytest
import torch

from hfdistill.losses import JSDLoss, ReverseKLLoss, SoftTargetsLoss, TaskCrossEntropyLoss
from hfdistill.losses.top_k import top_k_soft_targets
from hfdistill.losses.vocabulary import VocabularyPart, VocabularyScratch, chunked_vocabulary_losses
from hfdistill.losses.vocabulary_chunks import ChunkedLosses, ProjectedLogits
from hfdistill.signals import Projection, TopLogits


ROWS, CLASSES, WIDTH, TEACHER_WIDTH = 23, 41, 6, 9
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def projection(rows, classes, width, seed, dtype=torch.float64, bias=True, grad=True, **options):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)

    return Projection(draw(rows, width), draw(classes, width), draw(classes) if bias else None, **options)


def models(rows=ROWS, classes=CLASSES, dtype=torch.float64, bias=True, student=None, teacher=None):
    return (
        projection(rows, classes, WIDTH, 0, dtype, bias, **(student or {})),
        projection(rows, classes, TEACHER_WIDTH, 1, dtype, bias, grad=False, **(teacher or {})),
    )


def rows_that_count(rows=ROWS, classes=CLASSES):
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    return torch.where(torch.arange(rows) % 3 == 0, -100, labels), torch.rand(rows, generator=generator) < 0.7


labels, mask = rows_that_count()
PARTS = {
    "task": [VocabularyPart("task", 0.3, labels=labels)],
    "smoothed": [VocabularyPart("task", 0.3, labels=labels, label_smoothing=0.2)],
    "soft targets": [VocabularyPart("soft_targets", 0.7, temperature=2.0)],
    "soft targets masked": [VocabularyPart("soft_targets", torch.tensor(0.7), mask)],
    "reverse": [VocabularyPart("reverse_kl", 0.7, mask, temperature=1.5)],
    "jsd": [VocabularyPart("jsd", 0.7, mask, temperature=1.5)],
    "jsd 0.1": [VocabularyPart("jsd", 0.7, beta=0.1)],
    "jsd 0": [VocabularyPart("jsd", 0.7, beta=0, temperature=2.0)],
    "jsd 1": [VocabularyPart("jsd", 0.7, beta=1, temperature=2.0)],
    # T = 4, 2, 1: powers of one temperature are squares of those of another
    "task and soft targets 2": [VocabularyPart("task", 0.3, labels=labels), VocabularyPart("soft_targets", 0.7, mask, temperature=2.0)],
    "task and soft targets 4": [VocabularyPart("soft_targets", 0.7, temperature=4.0), VocabularyPart("task", 0.3, labels=labels)],
    "task and soft targets 1": [VocabularyPart("soft_targets", 0.7), VocabularyPart("task", 0.3, labels=labels, label_smoothing=0.1)],
    "everything": [
        VocabularyPart("soft_targets", 0.7, temperature=4.0),
        VocabularyPart("task", 0.3, labels=labels, label_smoothing=0.1),
        VocabularyPart("reverse_kl", -0.2, mask, temperature=3.0),
        VocabularyPart("jsd", 0.5, mask, temperature=3.0, beta=0.7),
        VocabularyPart("soft_targets", 0.1, ~mask, temperature=1.0),
        VocabularyPart("jsd", 0.4, temperature=2.0),
    ],
}


def plain(student, teacher, parts, shared=None, columns=None):
    """On whole logits."""
    own = student.logits()
    compared = slice(shared if shared is not None or columns is None else columns.numel())
    if isinstance(teacher, Projection):
        teacher = teacher.logits()
    if isinstance(teacher, torch.Tensor):
        teacher = teacher.detach()[:, compared if columns is None else columns]
    values = []
    for part in parts:
        if part.kind == "task":
            values.append(TaskCrossEntropyLoss(label_smoothing=part.label_smoothing)(own, part.labels))
        elif part.kind == "top_k":
            values.append(top_k_soft_targets(own[:, compared], teacher, part.mask, part.temperature))
        else:
            loss = {"soft_targets": SoftTargetsLoss(), "reverse_kl": ReverseKLLoss(), "jsd": JSDLoss(part.beta)}[part.kind]
            values.append(loss(own[:, compared], teacher, part.mask, temperature=part.temperature))
    return sum(part.scale * value.total for part, value in zip(parts, values)), values


def inputs_of(student):
    return [x for x in (student.features, student.weight, student.bias) if x is not None and x.requires_grad]


def check(student, teacher, parts, rtol=None, atol=None, shared=None, columns=None, **options):
    """Combined loss, values, counts and gradients."""
    rtol = rtol or TOLERANCE[student.features.dtype]
    atol = atol or rtol
    inputs = inputs_of(student)
    expected, plain_values = plain(student, teacher, parts, shared, columns)
    combined, values = chunked_vocabulary_losses(student, teacher, parts, shared=shared, teacher_columns=columns, **options)
    torch.testing.assert_close(combined, expected, rtol=rtol, atol=atol)
    assert combined.shape == () and combined.requires_grad and combined.dtype == expected.dtype
    for value, other in zip(values, plain_values, strict=True):
        torch.testing.assert_close(value.total, other.total.detach(), rtol=rtol, atol=atol)
        assert value.count == other.count and not value.total.requires_grad
    gradients = torch.autograd.grad(combined, inputs)
    for ours, other, x in zip(gradients, torch.autograd.grad(expected, inputs), inputs):
        assert ours.dtype == x.dtype and ours.shape == x.shape
        torch.testing.assert_close(ours, other, rtol=rtol, atol=atol)
    return gradients


# ------------------------------------------------------------------------------------------------------------ equality


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_parts(name, dtype, bias):
    check(*models(dtype=dtype, bias=bias), PARTS[name], chunk_rows=10)


@pytest.mark.parametrize("chunk_rows", [1, 4, 12, 23, 100, None])
@pytest.mark.parametrize("block_rows", [1, 3, 100])
def test_sizes_of_chunks_and_blocks(chunk_rows, block_rows, monkeypatch):
    monkeypatch.setattr("hfdistill.losses.vocabulary_chunks._CPU_BLOCK", block_rows * CLASSES)
    check(*models(), PARTS["everything"], chunk_rows=chunk_rows)


@pytest.mark.parametrize("name", ["task and soft targets 2", "everything"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [({"scale": 0.3}, {"scale": 2.0}), ({"softcap": 3.0}, {}), ({}, {"softcap": 3.0}), ({"softcap": 2.0, "scale": 1.5}, {"softcap": 9.0})],
)
def test_scale_and_softcap(name, dtype, student, teacher):
    check(*models(dtype=dtype, student=student, teacher=teacher), PARTS[name], chunk_rows=9)


@pytest.mark.parametrize("name", ["soft targets masked", "task and soft targets 2", "everything"])
@pytest.mark.parametrize("whole", [False, True], ids=["projection", "whole logits"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_vocabularies_that_differ(name, whole, softcap):
    parts = PARTS[name]
    for student_classes, teacher_classes, shared in ((CLASSES, 47, CLASSES), (47, CLASSES, CLASSES), (45, 47, CLASSES)):
        student = projection(ROWS, student_classes, WIDTH, 0, softcap=softcap)
        teacher = projection(ROWS, teacher_classes, TEACHER_WIDTH, 1, grad=False)
        check(student, teacher.logits() if whole else teacher, parts, shared=shared, chunk_rows=7)
    columns = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:CLASSES]
    teacher = projection(ROWS, 60, TEACHER_WIDTH, 1, grad=False)
    for student_classes in (CLASSES, CLASSES + 3):
        student = projection(ROWS, student_classes, WIDTH, 0, softcap=softcap)
        check(student, teacher.logits() if whole else teacher, parts, columns=columns, chunk_rows=7)
        check(student, teacher.logits() if whole else teacher, parts, columns=columns, shared=CLASSES, chunk_rows=7)


def top(logits, k, T, tail=True):
    values, ids = logits.detach().topk(k)
    return TopLogits(values, ids, torch.logsumexp(logits.detach() / T, -1), T, tail)


@pytest.mark.parametrize("k", [1, 5, CLASSES])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("shared", [None, 41])
def test_top_k(k, tail, T, shared):
    student, teacher = models()
    if shared:
        student = projection(ROWS, 45, WIDTH, 0)
    known = top(teacher.logits(), k, T, tail)
    check(student, known, [VocabularyPart("top_k", 0.7, mask, temperature=T)], shared=shared, chunk_rows=9)
    parts = [VocabularyPart("task", 0.3, labels=labels), VocabularyPart("top_k", 0.7, temperature=T)]
    check(student, known, parts, shared=shared, chunk_rows=9)
    known.values, known.logsumexp, known.ids = known.values.half(), known.logsumexp.float(), known.ids.int()
    check(student, known, parts, shared=shared, rtol=1e-6)


def test_top_k_where_the_student_is_sure():
    """The k have all of its probability to rounding: the tail is summed about its own largest."""
    student, teacher = models(dtype=torch.float32, student={"scale": 60.0})
    parts = [VocabularyPart("top_k", 1.0)]
    for k in (1, 4):
        check(student, top(student.logits(), k, 1.0), parts, rtol=1e-3)
        check(student, top(teacher.logits(), k, 1.0), parts, rtol=1e-4)


def test_gradcheck_of_everything_at_once():
    """Against differences, without autograd's help. Each call makes its gradients once, so each backward needs its own call."""
    student, teacher = models(rows=5, classes=7, student={"softcap": 4.0, "scale": 1.2})
    targets, counted = rows_that_count(5, 7)
    parts = [
        VocabularyPart("task", 0.3, labels=targets, label_smoothing=0.1),
        *(VocabularyPart(kind, 0.4, counted, temperature=1.7, beta=0.3) for kind in ("soft_targets", "reverse_kl", "jsd")),
    ]

    def loss():
        return chunked_vocabulary_losses(student, teacher, parts, chunk_rows=2)[0]

    for tensor, gradient in zip(inputs_of(student), torch.autograd.grad(loss(), inputs_of(student))):
        for index in range(0, tensor.numel(), 3):
            values = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    tensor.view(-1)[index] += step
                    values.append(loss())
                    tensor.view(-1)[index] -= step
            assert (values[0] - values[1]).item() / 2e-6 == pytest.approx(gradient.flatten()[index].item(), rel=1e-5, abs=1e-8)


# ------------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["task and soft targets 2", "everything"])
def test_half_precision(name, dtype):
    """Within what rounding the logits and their derivatives to half precision does, against exact arithmetic on the same numbers."""
    student, teacher = models(dtype=dtype)
    exact = [Projection(x.features.double().detach(), x.weight.double().detach(), x.bias.double().detach()) for x in (student, teacher)]
    for tensor in (exact[0].features, exact[0].weight, exact[0].bias):
        tensor.requires_grad_()
    expected, plain_values = plain(*exact, PARTS[name])
    combined, values = chunked_vocabulary_losses(student, teacher, PARTS[name], chunk_rows=5)
    assert combined.dtype == torch.float32
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(combined.double(), expected, rtol=4 * rounding, atol=0)
    gradients = torch.autograd.grad(combined, inputs_of(student))
    for ours, other in zip(gradients, torch.autograd.grad(expected, inputs_of(exact[0]))):
        assert ours.dtype == dtype
        assert torch.linalg.vector_norm(ours.double() - other) < 4 * rounding * torch.linalg.vector_norm(other)


def test_small_weights_do_not_vanish_in_float16():
    """1 over the rows of a window times a derivative is below its smallest number; a scaled loss would come too late to help."""
    student, teacher = models(dtype=torch.float16)
    parts = [VocabularyPart("soft_targets", 1e-7, temperature=2.0)]
    combined, _ = chunked_vocabulary_losses(student, teacher, parts)
    gradient = torch.autograd.grad(combined * 2.0**20, student.weight)[0]
    large, _ = chunked_vocabulary_losses(student, teacher, [VocabularyPart("soft_targets", 1e-7 * 2.0**20, temperature=2.0)])
    torch.testing.assert_close(gradient, torch.autograd.grad(large, student.weight)[0], rtol=2e-3, atol=1e-6)
    assert gradient.abs().max() > 1e-3
    nothing, _ = chunked_vocabulary_losses(student, teacher, [VocabularyPart("soft_targets", 0.0)])
    assert nothing == 0 and (torch.autograd.grad(nothing, student.weight)[0] == 0).all()


def test_autocast_runs_the_products_in_its_dtype_and_nothing_else():
    student, teacher = models(dtype=torch.float32)
    expected = chunked_vocabulary_losses(student, teacher, PARTS["everything"])[0]
    half = [Projection(x.features.bfloat16(), x.weight.bfloat16(), x.bias.bfloat16()) for x in (student, teacher)]
    rounded = chunked_vocabulary_losses(*half, PARTS["everything"])[0]
    with torch.autocast("cpu", torch.bfloat16):
        combined = chunked_vocabulary_losses(student, teacher, PARTS["everything"])[0]
    gradients = torch.autograd.grad(combined, inputs_of(student))
    assert combined.dtype == torch.float32 and all(gradient.dtype == torch.float32 for gradient in gradients)
    assert combined != expected
    torch.testing.assert_close(combined, rounded, rtol=1e-3, atol=0)
    doubles = models()
    with torch.autocast("cpu", torch.bfloat16):
        assert chunked_vocabulary_losses(*doubles, PARTS["everything"])[0].dtype == torch.float64


def test_weight_gradients_are_summed_in_float32():
    """400 chunks of one row, each below half a unit in the last place of their sum in bf16."""
    rows = 400
    features = torch.ones(rows, 1, dtype=torch.bfloat16)
    student = Projection(features, torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True))
    combined, _ = chunked_vocabulary_losses(student, None, [VocabularyPart("task", 1.0, labels=torch.zeros(rows).long())], chunk_rows=1)
    combined.backward()
    assert student.weight.grad.flatten().tolist() == [-200.0, 200.0]


# ------------------------------------------------------------------------------------------------------------ masks and odd inputs


def test_rows_that_do_not_count_may_hold_anything():
    student, teacher = models()
    nothing = (labels == -100) & ~mask
    assert nothing.any()
    for parts in (PARTS["task and soft targets 2"], PARTS["reverse"]):
        combined, _ = chunked_vocabulary_losses(student, teacher, parts)
        expected = torch.autograd.grad(combined, inputs_of(student))
        unseen = nothing if len(parts) == 2 else ~mask
        dirty = student.features.detach().masked_fill(unseen[:, None], float("nan")).requires_grad_()
        features = teacher.features.masked_fill(~mask[:, None], float("nan"))
        own = Projection(dirty, student.weight, student.bias)
        for other in (Projection(features, teacher.weight, teacher.bias), Projection(features, teacher.weight, teacher.bias).logits()):
            again, _ = chunked_vocabulary_losses(own, other, parts)
            torch.testing.assert_close(again, combined)
            for ours, gradient in zip(torch.autograd.grad(again, inputs_of(own)), expected):
                torch.testing.assert_close(ours, gradient)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [*PARTS, "top_k", "top_k without tail"])
def test_non_finite_features_are_not_hidden(name, bad):
    student, teacher = models()
    parts = PARTS.get(name, [VocabularyPart("top_k", 1.0)])
    other = top(teacher.logits(), 4, 1.0, tail=name == "top_k") if "top_k" in name else teacher
    row = int((mask & (labels != -100)).nonzero()[0])
    with torch.no_grad():
        student.features[row, 0] = bad
    combined, _ = chunked_vocabulary_losses(student, other, parts)
    assert not torch.isfinite(combined)
    assert not torch.isfinite(torch.autograd.grad(combined, student.weight)[0]).all()


@pytest.mark.parametrize("name", ["soft targets", "reverse", "jsd", "task and soft targets 2", "everything"])
def test_classes_that_are_there_in_neither_model(name):
    pad = torch.arange(CLASSES) % 7 == 3
    parts = [
        part if part.kind != "task" else VocabularyPart("task", part.scale, labels=torch.where(pad[labels.clamp(min=0)], -100, labels))
        for part in PARTS[name]
    ]
    for dtype in TOLERANCE:
        student, teacher = models(dtype=dtype)
        for x in (student, teacher):
            with torch.no_grad():
                x.bias[pad] = float("-inf")
        gradients = check(student, teacher, parts, chunk_rows=10)
        assert all(torch.isfinite(gradient).all() for gradient in gradients) and (gradients[2][pad] == 0).all()
        check(student, teacher.logits(), parts, chunk_rows=10)
    student, teacher = models(dtype=torch.float16)
    for x in (student, teacher):
        with torch.no_grad():
            x.bias[pad] = float("-inf")
    combined, _ = chunked_vocabulary_losses(student, teacher, parts)
    assert torch.isfinite(combined) and torch.isfinite(torch.autograd.grad(combined, student.weight)[0]).all()


def test_a_class_that_only_one_model_rules_out():
    student, teacher = models()
    with torch.no_grad():
        student.bias[3] = float("-inf")
    combined, _ = chunked_vocabulary_losses(student, teacher, [VocabularyPart("soft_targets", 1.0)])
    assert combined == float("inf")
    check(student, teacher, [VocabularyPart("reverse_kl", 1.0), VocabularyPart("jsd", 1.0)])
    student, teacher = models()
    teacher.bias[3] = float("-inf")
    check(student, teacher, [VocabularyPart("soft_targets", 1.0), VocabularyPart("jsd", 1.0)])
    assert chunked_vocabulary_losses(student, teacher, [VocabularyPart("reverse_kl", 1.0)])[0] == float("inf")


@pytest.mark.parametrize("gap", [100.0, 1e4])
def test_sure_models(gap):
    student, teacher = models(student={"scale": gap}, teacher={"scale": gap})
    for name in ("soft targets", "reverse", "jsd", "task"):
        check(student, teacher, PARTS[name])
        for dtype in (torch.float32, torch.bfloat16):
            half = models(dtype=dtype, student={"scale": gap}, teacher={"scale": gap})
            combined, _ = chunked_vocabulary_losses(*half, PARTS[name])
            assert torch.isfinite(combined) and torch.isfinite(torch.autograd.grad(combined, half[0].weight)[0]).all()


def test_nothing_that_counts_and_no_rows():
    student, teacher = models()
    parts = [VocabularyPart("task", 1.0, labels=torch.full_like(labels, -100)), VocabularyPart("jsd", 1.0, torch.zeros_like(mask))]
    combined, values = chunked_vocabulary_losses(student, teacher, parts)
    assert combined == 0 and [value.count.item() for value in values] == [0, 0]
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(combined, inputs_of(student)))
    student, teacher = models(rows=0)
    parts = [VocabularyPart("task", 1.0, labels=labels[:0]), VocabularyPart("jsd", 1.0)]
    combined, values = chunked_vocabulary_losses(student, teacher, parts)
    assert combined == 0 and combined.requires_grad and [value.total.item() for value in values] == [0, 0]
    for gradient, x in zip(torch.autograd.grad(combined, inputs_of(student)), inputs_of(student)):
        assert gradient.shape == x.shape and (gradient == 0).all()


# ------------------------------------------------------------------------------------------------------------ autograd


@pytest.mark.parametrize("wanted", ["features", "weight", "bias", "features weight", "weight bias"])
def test_only_some_inputs_learn(wanted, monkeypatch):
    """A frozen head, or features without a graph."""
    student, teacher = models()
    for name in ("features", "weight", "bias"):
        getattr(student, name).requires_grad_(name in wanted)
    made = []
    run = ChunkedLosses.run

    def recorded(self, flags):
        made.append(flags)
        return run(self, flags)

    monkeypatch.setattr(ChunkedLosses, "run", recorded)
    gradients = check(student, teacher, PARTS["everything"], chunk_rows=9)
    assert len(gradients) == len(wanted.split()) and made == [tuple(name in wanted for name in ("features", "weight", "bias"))]


def test_no_gradient_is_made_in_evaluation(monkeypatch):
    student, teacher = models()
    expected, expected_values = chunked_vocabulary_losses(student, teacher, PARTS["everything"])
    monkeypatch.setattr(ChunkedLosses, "_products", None)
    with torch.no_grad():
        combined, values = chunked_vocabulary_losses(student, teacher, PARTS["everything"])
    assert not combined.requires_grad and torch.equal(combined, expected.detach())
    assert all(torch.equal(a.total, b.total) for a, b in zip(values, expected_values))
    for x in inputs_of(student):
        x.requires_grad_(False)
    assert not chunked_vocabulary_losses(student, teacher, PARTS["everything"])[0].requires_grad


def test_tied_weights_and_accumulation():
    """The weight is the input embedding too, and each micro-batch adds to its gradient."""

    def run(losses):
        table = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
        _, teacher = models(bias=False)
        for start in (0, 10):
            ids = torch.arange(start, start + ROWS) % CLASSES
            student = Projection(torch.tanh(table[ids]), table)
            (losses(student, teacher, PARTS["task and soft targets 2"])[0] * 0.37).backward()
        return table.grad

    torch.testing.assert_close(run(chunked_vocabulary_losses), run(plain), rtol=1e-10, atol=1e-10)


def test_gradients_do_not_live_in_the_scratch():
    """Two calls before a backward pass, of sizes that grow and shrink, and gradients that are kept over the next step."""
    scratch = VocabularyScratch()
    kept = []
    for rows, classes in ((ROWS, CLASSES), (60, CLASSES), (5, CLASSES), (ROWS, 90), (ROWS, CLASSES)):
        student, teacher = models(rows, classes)
        parts = [VocabularyPart("jsd", 1.0, temperature=2.0), VocabularyPart("task", 0.5, labels=torch.arange(rows) % classes)]
        expected = torch.autograd.grad(plain(student, teacher, parts)[0], inputs_of(student))
        kept.append((chunked_vocabulary_losses(student, teacher, parts, chunk_rows=9, scratch=scratch)[0], inputs_of(student), expected))
    gradients = [torch.autograd.grad(combined, inputs) for combined, inputs, _ in kept]
    for ours, (_, _, expected) in zip(gradients, kept):
        for a, b in zip(ours, expected):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_scratch_is_used_again():
    scratch = VocabularyScratch()
    student, teacher = models()

    def addresses():
        chunked_vocabulary_losses(student, teacher, PARTS["everything"], scratch=scratch)
        return {key: buffer.data_ptr() for key, buffer in scratch._buffers.items()}

    assert addresses() == addresses() != {}


def test_inputs_are_not_changed_and_the_teacher_gets_no_gradient():
    student, teacher = models()
    teacher.weight.requires_grad_()
    whole = teacher.logits().detach()
    before = [x.detach().clone() for x in (student.features, student.weight, student.bias, whole)]
    for other in (teacher, whole):
        chunked_vocabulary_losses(student, other, PARTS["everything"])[0].backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (student.features, student.weight, student.bias, whole)))
    assert teacher.weight.grad is None


def test_a_second_backward_pass_says_why_not():
    student, teacher = models()
    combined, _ = chunked_vocabulary_losses(student, teacher, PARTS["task"])
    combined.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Second backward pass through chunked_vocabulary_losses"):
        combined.backward()


def test_there_is_no_derivative_of_the_gradient():
    student, teacher = models()
    combined, _ = chunked_vocabulary_losses(student, teacher, PARTS["task"])
    (gradient,) = torch.autograd.grad(combined**2, student.features, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_logits_never_exist_together(monkeypatch):
    seen = []
    start = ProjectedLogits.start

    def recorded(self, *args):
        start(self, *args)
        seen.append(tuple(self.logits.shape))

    monkeypatch.setattr(ProjectedLogits, "start", recorded)
    check(*models(), PARTS["task and soft targets 2"], chunk_rows=10)
    assert seen == [(8, CLASSES)] * 4 + [(7, CLASSES)] * 2  # 23 rows in three chunks of about the same size, in both models


def test_chunks_are_bounded_by_width_and_memory():
    def rows(count, classes, width, teacher=True):
        weight = torch.empty(0, width).expand(0, width) if not classes else torch.zeros(1, 1).expand(classes, width)
        student = Projection(torch.zeros(1, 1).expand(count, width), weight)
        parts = [VocabularyPart("soft_targets", 1.0)]
        return ChunkedLosses(student, student if teacher else None, parts, classes, None, None, VocabularyScratch())._size_of_chunks()

    assert rows(2048, 30522, 256) == 512
    assert rows(2048, 30522, 1024) == 1024
    assert rows(100, 30522, 256) == 100
    assert 150 <= rows(1024, 151936, 896) <= 220  # both models' logits in 256 MB
    assert rows(1024, 10**9, 8) == 16


# ------------------------------------------------------------------------------------------------------------ errors


def raises(message):
    return pytest.raises(ValueError, match="^" + re.escape(message) + "$")


def test_parts_that_make_no_sense():
    with raises(
        "kind must be one of task, soft_targets, reverse_kl, jsd, top_k, got 'dist': no closed form of its gradient is known here. Use the "
        "plain loss on whole logits."
    ):
        VocabularyPart("dist", 1.0)
    for options, message in (({"temperature": 0}, "temperature"), ({"beta": 2.0}, "beta"), ({"label_smoothing": 1.0}, "label_smoothing")):
        with pytest.raises(ValueError, match=f"^{message} must be"):
            VocabularyPart("jsd", 1.0, **options)
    student, teacher = models()
    with raises(
        "A task part has labels of shape None, but there are 23 rows: each needs the class it predicts. Pass integer labels of shape "
        "(23,), -100 where there is none."
    ):
        chunked_vocabulary_losses(student, teacher, [VocabularyPart("task", 1.0)])
    with pytest.raises(ValueError, match="label 41 is no class of the model, which has 41 classes"):
        chunked_vocabulary_losses(student, teacher, [VocabularyPart("task", 1.0, labels=torch.full_like(labels, 41))])
    with pytest.raises(ValueError, match="cross entropy takes class ids"):
        chunked_vocabulary_losses(student, teacher, [VocabularyPart("task", 1.0, labels=labels.double())])
    with pytest.raises(ValueError, match="mask must be a bool tensor"):
        chunked_vocabulary_losses(student, teacher, [VocabularyPart("jsd", 1.0, mask.long())])
    for other, kind in ((None, "jsd"), (teacher, "top_k"), (top(teacher.logits(), 3, 1.0), "reverse_kl")):
        with raises(
            f"A {kind} part has {type(other).__name__} as its teacher, but top_k takes TopLogits, and the other divergences need the "
            "logits of all classes. Run the teacher, or store what the loss needs."
        ):
            chunked_vocabulary_losses(student, other, [VocabularyPart(kind, 1.0)])
    with pytest.raises(ValueError, match="is stored for temperature 1.0, but 2.0 is asked for"):
        chunked_vocabulary_losses(student, top(teacher.logits(), 3, 1.0), [VocabularyPart("top_k", 1.0, temperature=2.0)])


def test_models_that_do_not_belong_together():
    student, teacher = models()
    parts = [VocabularyPart("soft_targets", 1.0)]
    with raises(
        "student.features have shape (2, 23, 6) and student.weight (41, 6): they make no logits. Pass the input of the output embedding, "
        "one row for each position, and its weight."
    ):
        chunked_vocabulary_losses(Projection(student.features.expand(2, -1, -1), student.weight), teacher, parts)
    for rows, classes, shared, columns in (
        (22, 41, None, None),
        (23, 40, None, None),
        (23, 43, None, None),
        (23, 60, 42, None),
        (23, 60, 41, torch.arange(40)),
        (23, 41, 1, None),
    ):
        other = projection(rows, classes, TEACHER_WIDTH, 1)
        with pytest.raises(ValueError, match="The student has 23 rows of 41 classes and the teacher.*give `shared`"):
            chunked_vocabulary_losses(student, other, parts, shared=shared, teacher_columns=columns)
    with pytest.raises(ValueError, match="teacher_columns .41 of them. were given with TopLogits"):
        chunked_vocabulary_losses(student, top(teacher.logits(), 3, 1.0), [VocabularyPart("top_k", 1.0)], teacher_columns=torch.arange(41))


def test_a_large_feature_leaves_the_range_of_fp16_in_no_sum():
    """An outlier of 30 in one feature, the same sign in all rows, as final norms make them."""
    generator = torch.Generator().manual_seed(0)
    rows, width, classes = 2048, 64, 32
    features = torch.randn(rows, width, generator=generator)
    features[:, 0] = 30.0
    weight, teacher = torch.randn(classes, width, generator=generator) / 100, torch.zeros(rows, classes)
    teacher[:, 0] = 50.0  # always the same class, so that the derivatives have one sign
    gradients = []
    for dtype in (torch.float64, torch.float16):
        own = weight.to(dtype).requires_grad_()
        part = VocabularyPart("soft_targets", 1 / rows, temperature=2.0)
        chunked_vocabulary_losses(Projection(features.to(dtype), own), teacher.to(dtype), [part], chunk_rows=rows)[0].backward()
        gradients.append(own.grad.double())
    assert 40 < gradients[0].abs().max() < 100  # times the rows more than fp16 has room for
    torch.testing.assert_close(gradients[1], gradients[0], rtol=2e-2, atol=2e-3 * float(gradients[0].abs().max()))
