"""What every loss on feature maps promises: one row of `MAP_CASES` buys all the tests of this file."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call

from hfdistill.losses.flow import FSPLoss
from hfdistill.losses.hint import HintLoss
from hfdistill.losses.information import VIDLoss
from hfdistill.losses.maps import AttentionTransferLoss, FactorTransferLoss, NSTLoss
from hfdistill.losses.review import HCLLoss, ReviewLoss
from hfdistill.signals import SIGNALS


BATCH = 4
MASK = torch.tensor([True, False, True, True])
# shapes without the batch, no map square; joint losses have one of each for every mapped layer
ONE, WIDER, MANY = (3, 5, 4), (5, 5, 4), (24, 5, 4)
LAYERS = [(3, 6, 4), (4, 3, 4), (2, 3, 2)]
LARGER_LAYERS = [(3, 7, 9), (4, 3, 5), (2, 4, 2)]
TEACHER_LAYERS = [(5, 6, 4), (6, 6, 8), (3, 2, 1)]

# name -> constructor, shape(s) of the student, shape(s) of the teacher, what is particular about it:
# "own target": equal maps do not give 0; "signed": may be negative; "coupled": samples are not independent of each other
MAP_CASES = {
    "hint": (HintLoss, ONE, ONE, ()),
    "attention_transfer": (AttentionTransferLoss, ONE, WIDER, ()),
    "attention_transfer power": (lambda: AttentionTransferLoss(4), ONE, WIDER, ()),
    "attention_transfer paper": (lambda: AttentionTransferLoss(form="paper"), ONE, WIDER, ()),
    "nst": (NSTLoss, ONE, WIDER, ()),
    "nst many channels": (NSTLoss, ONE, MANY, ()),
    "factor_transfer": (FactorTransferLoss, ONE, WIDER, ()),
    "factor_transfer squared": (lambda: FactorTransferLoss(3, norm=2), ONE, WIDER, ()),
    "fsp": (FSPLoss, LAYERS, LARGER_LAYERS, ()),
    "vid": (VIDLoss, ONE, WIDER, ("own target", "signed")),
    "hcl": (HCLLoss, ONE, ONE, ()),
    "hcl small": (HCLLoss, (3, 2, 4), (3, 2, 4), ()),
    "review": (ReviewLoss, LAYERS, TEACHER_LAYERS, ("own target", "coupled")),
    "review evaluation": (lambda: ReviewLoss().eval(), LAYERS, TEACHER_LAYERS, ("own target",)),
    "review one layer": (ReviewLoss, LAYERS[:1], TEACHER_LAYERS[:1], ("own target", "coupled")),
}


class Case:
    """A loss ready to use, and its inputs. `student` and `teacher` are lists throughout, of one map where the loss is not joint."""

    def __init__(self, name, seed=0, one_by_one=False):
        self.build, student, teacher, self.particular = MAP_CASES[name]
        self.shapes = [[one] if isinstance(one, tuple) else one for one in (student, teacher)]
        if one_by_one:
            self.shapes = [[(shape[0], 1, 1) for shape in side] for side in self.shapes]
        self.loss = self.make(seed)

    def make(self, seed):
        loss = self.build()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            sides = [[(1, *shape) for shape in side] for side in self.shapes]
            if isinstance(loss, (AttentionTransferLoss, FactorTransferLoss)) and sides[0][0][-2:] == (1, 1):
                with pytest.raises(ValueError, match="a mapped layer has a single position"):  # compute is finite all the same
                    loss.prepare(sides[0][0], sides[1][0])
            else:
                loss.prepare(*(sides if loss.joint else (side[0] for side in sides)))
            with torch.no_grad():
                for parameter in loss.parameters():  # biases and norms too are then nowhere special
                    parameter.add_(0.2 * torch.rand_like(parameter))
        training = loss.training
        return loss.double().train(training)

    def draw(self, seed=1, dtype=torch.float64, scale=2.0):
        generator = torch.Generator().manual_seed(seed)
        student, teacher = (
            [(scale * torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64)).to(dtype) for shape in side]
            for side in self.shapes
        )
        return [s.requires_grad_() for s in student], teacher

    def __call__(self, student, teacher, mask=None, loss=None):
        loss = loss or self.loss
        return loss(student, teacher, mask) if loss.joint else loss(student[0], teacher[0], mask)

    def backward(self, student, teacher, mask=None, loss=None):
        """The value and the gradients: of the maps, then of the parameters."""
        value = self(student, teacher, mask, loss)
        parameters = list((loss or self.loss).parameters())
        gradients = torch.autograd.grad(value.total, [*student, *parameters], allow_unused=True)
        assert all(gradient is not None for gradient in gradients)
        return value, gradients[: len(student)], gradients[len(student) :]


@pytest.fixture(params=MAP_CASES, ids=str)
def case(request):
    return Case(request.param)


def picked(maps, rows):
    return [one.detach()[rows].clone().requires_grad_(one.requires_grad) for one in maps]


def close(actual, expected, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def test_every_loss_says_what_it_takes(case):
    loss = case.loss
    assert loss.layout == "maps" and loss.unit == "sequences" and loss.signal == "features" and loss.signals == ("features",)
    assert loss.signal in SIGNALS and not loss.needs and not loss.scheduled
    assert loss.compares_widths == isinstance(loss, (HintLoss, HCLLoss))
    assert loss.joint == (not loss.same_size) == isinstance(loss, (FSPLoss, ReviewLoss))
    assert bool(list(loss.parameters())) == ("own target" in case.particular)


def test_value_is_a_finite_scalar_with_a_count(case):
    value, gradients, own = case.backward(*case.draw())
    assert value.total.shape == () and value.count.shape == ()
    assert torch.isfinite(value.total) and (value.total > 0 or "signed" in case.particular)
    assert value.count == BATCH and not value.count.requires_grad and value.count.dtype == torch.long
    for gradient in (*gradients, *own):
        assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0
    close(value.mean, value.total / BATCH)


def test_no_mask_means_every_sample(case):
    student, teacher = case.draw()
    without, full = case(student, teacher), case(student, teacher, torch.ones(BATCH, dtype=torch.bool))
    assert without.count == full.count and without.count.dtype == full.count.dtype
    close(without.total, full.total)


def test_equal_maps(case):
    if case.shapes[0] != case.shapes[1] and "own target" not in case.particular:
        case.shapes[1] = case.shapes[0]
    student, teacher = case.draw()
    if "own target" in case.particular:
        assert case(student, teacher).total.abs() > 1e-3
        return
    value, gradients, _ = case.backward(student, [s.detach().clone() for s in student])
    assert value.total.abs() <= 1e-12 and all(gradient.abs().max() < 1e-12 for gradient in gradients)


def test_gradcheck(case):
    student, teacher = case.draw()
    names, parameters = zip(*case.loss.named_parameters()) if list(case.loss.parameters()) else ((), ())

    def total(*inputs):
        maps, own = list(inputs[: len(student)]), dict(zip(names, inputs[len(student) :]))
        arguments = (maps, teacher, MASK) if case.loss.joint else (maps[0], teacher[0], MASK)
        return functional_call(case.loss, own, arguments).total

    inputs = (*student, *(parameter.detach().clone().requires_grad_() for parameter in parameters))
    many = sum(one.numel() for one in inputs) > 400  # then along random directions
    assert torch.autograd.gradcheck(total, inputs, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=many)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_half_precision_is_computed_in_float32(case, dtype, autocast):
    student, teacher = case.draw(dtype=dtype)
    exact = case([s.detach().double() for s in student], [t.double() for t in teacher]).total
    single = copy.deepcopy(case.loss).float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value, gradients, _ = case.backward(student, teacher, loss=single)
    assert value.total.dtype == torch.float32
    close(value.total.double(), exact, rtol=2e-5)
    assert all(gradient.dtype == dtype and torch.isfinite(gradient).all() for gradient in gradients)


def test_large_half_precision_maps_do_not_overflow(case):
    """Squares of fp16 overflow above 255; fp32 must carry what comes after."""
    student, teacher = case.draw(dtype=torch.float16, scale=5000.0)
    # gradients of the maps in fp32: those of plain squared errors are beyond fp16
    student = [s.detach().float().requires_grad_() for s in student]
    value, gradients, own = case.backward(student, teacher, loss=copy.deepcopy(case.loss).float())
    assert torch.isfinite(value.total) and all(torch.isfinite(gradient).all() for gradient in (*gradients, *own))
    half = case([s.detach().half() for s in student], teacher, loss=copy.deepcopy(case.loss).float())
    assert torch.equal(half.total, value.total)


def test_autocast_changes_nothing_for_float32(case):
    single = copy.deepcopy(case.loss).float()
    student, teacher = case.draw(dtype=torch.float32)
    plain, gradients, own = case.backward(student, teacher, loss=single)
    with torch.autocast("cpu", torch.bfloat16):
        value = case(student, teacher, loss=single)
    after = torch.autograd.grad(value.total, [*student, *single.parameters()])  # outside autocast, as a training loop calls backward
    assert torch.equal(value.total, plain.total)
    assert all(torch.equal(a, b) for a, b in zip(after, (*gradients, *own)))


@pytest.mark.parametrize("content", [float("nan"), float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_masked_samples_change_nothing(case, content, dtype):
    loss = case.loss.to(dtype)
    student, teacher = case.draw(dtype=dtype)
    buffers = copy.deepcopy(dict(loss.named_buffers()))
    value, gradients, own = case.backward(student, teacher, MASK)
    after = copy.deepcopy(dict(loss.named_buffers()))
    dirty, dirty_teacher = ([torch.where(MASK[:, None, None, None], m.detach(), content) for m in side] for side in (student, teacher))
    with torch.no_grad():
        for name, buffer in loss.named_buffers():
            buffer.copy_(buffers[name])
    with torch.autograd.set_detect_anomaly(True):
        dirty_value, dirty_gradients, dirty_own = case.backward([s.requires_grad_() for s in dirty], dirty_teacher, MASK)
    assert torch.equal(dirty_value.total, value.total) and dirty_value.count == value.count == MASK.sum()
    assert all(torch.equal(a, b) for a, b in zip((*dirty_gradients, *dirty_own), (*gradients, *own)))
    assert all((gradient[~MASK] == 0).all() for gradient in dirty_gradients)
    assert all(torch.equal(buffer, after[name]) for name, buffer in loss.named_buffers())  # running statistics
    # and the others count as if they were alone
    alone = case(picked(student, MASK), picked(teacher, MASK))
    assert alone.count == value.count
    close(alone.total, value.total, rtol=1e-10 if dtype == torch.float64 else 1e-5)


def test_nothing_left_by_the_mask_gives_zero_with_a_graph(case):
    student, teacher = case.draw()
    student[0].data[0], teacher[0][1] = float("nan"), float("inf")
    buffers = copy.deepcopy(dict(case.loss.named_buffers()))
    value, gradients, own = case.backward(student, teacher, torch.zeros(BATCH, dtype=torch.bool))
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in case.loss.named_buffers())  # no running mean of nothing
    assert value.total == 0 and value.count == 0 and value.mean == 0 and value.mean.requires_grad
    assert all((gradient == 0).all() for gradient in (*gradients, *own))


def test_order_of_the_batch_changes_nothing(case):
    student, teacher = case.draw()
    value, gradients, own = case.backward(student, teacher, MASK)
    order = torch.tensor([2, 0, 3, 1])
    permuted, permuted_gradients, permuted_own = case.backward(picked(student, order), picked(teacher, order), MASK[order])
    close(permuted.total, value.total)
    close([*permuted_gradients, *permuted_own], [*(gradient[order] for gradient in gradients), *own])


def test_parts_of_a_batch_add_up(case):
    student, teacher = case.draw()
    whole = case(student, teacher, MASK)
    parts = [case(picked(student, rows), picked(teacher, rows), MASK[rows]) for rows in ([0], [1, 2], [3])]
    total = sum(part.total for part in parts)
    assert sum(part.count for part in parts) == whole.count
    if "coupled" in case.particular:  # by batch norm, as documented
        assert not torch.allclose(total, whole.total, rtol=1e-3)
    else:
        close(total, whole.total)


def test_no_gradient_to_the_teacher(case):
    student, teacher = case.draw()
    teacher = [t.requires_grad_() for t in teacher]
    case(student, teacher).total.backward()
    assert all(t.grad is None for t in teacher) and all(s.grad is not None for s in student)


@pytest.mark.parametrize("kind", ["one", "duplicates", "zero student", "zero teacher", "zero both", "constant", "zero channel", "tiny"])
@pytest.mark.parametrize("one_by_one", [False, True], ids=["maps", "1x1"])
def test_degenerate_maps_are_finite(case, request, kind, one_by_one):
    if one_by_one:
        case = Case(request.node.callspec.params["case"], one_by_one=True)
    case.loss.float()
    student, teacher = case.draw(dtype=torch.float32)
    student = [s.detach() for s in student]
    if kind in ("one", "duplicates"):
        rows = [0] if kind == "one" else [0, 0, 0, 0]
        student, teacher = picked(student, rows), picked(teacher, rows)
    elif kind == "constant":
        student, teacher = [torch.full_like(s, 0.3) for s in student], [torch.full_like(t, -0.7) for t in teacher]
    elif kind == "zero channel":
        for maps in (*student, *teacher):
            maps[:, 0] = 0
    elif kind == "tiny":  # below the smallest fp32 number when squared
        student = [1e-30 * s for s in student]
    else:
        student = student if kind == "zero teacher" else [torch.zeros_like(s) for s in student]
        teacher = teacher if kind == "zero student" else [torch.zeros_like(t) for t in teacher]
    value, gradients, own = case.backward([s.requires_grad_() for s in student], teacher)
    assert torch.isfinite(value.total) and (value.total >= -1e-5 or "signed" in case.particular)
    # batch norm divides by sqrt(1e-5) where all values are equal, one after the other
    most = 1e6 if isinstance(case.loss, ReviewLoss) else 1e3
    assert all(torch.isfinite(gradient).all() and gradient.abs().max() < most for gradient in (*gradients, *own))


def test_nan_of_a_sample_that_counts_is_not_hidden(case):
    student, teacher = case.draw()
    with torch.no_grad():
        student[0][0, 0, 0, 0] = float("nan")
    assert case(student, teacher).total.isnan()


def test_inputs_are_not_changed(case):
    student, teacher = case.draw()
    before = copy.deepcopy([s.detach() for s in student]), copy.deepcopy(teacher), MASK.clone()
    case.backward(student, teacher, MASK)
    assert all(torch.equal(a, b) for a, b in zip((*before[0], *before[1], before[2]), (*student, *teacher, MASK)))


def test_own_parameters_move_and_the_loss_falls(case):
    student, teacher = case.draw()
    student = [s.detach() for s in student]
    if not list(case.loss.parameters()):
        return
    optimizer = torch.optim.SGD(case.loss.parameters(), lr=1e-3)
    before = copy.deepcopy(dict(case.loss.named_parameters()))
    first = case(student, teacher)
    first.mean.backward()
    optimizer.step()
    for name, parameter in case.loss.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert case(student, teacher).total < first.total


def test_state_dict_brings_back_the_value(case):
    student, teacher = case.draw()
    for _ in range(2):
        case(student, teacher)  # running statistics
    other = case.make(seed=7)
    case.loss.eval(), other.eval()
    expected = case(student, teacher).total
    if list(case.loss.parameters()):
        assert not torch.allclose(case(student, teacher, loss=other).total, expected)
    other.load_state_dict(case.loss.state_dict())
    assert torch.equal(case(student, teacher, loss=other).total, expected)


def test_copies_are_prepared_apart(case):
    """The trainer copies a loss for each pair of the layer map, then prepares each copy."""
    student, teacher = case.draw()
    expected = case(student, teacher).total.detach()
    copied = copy.deepcopy(case.loss)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1.0)
    close(case(student, teacher).total.detach(), expected)
    assert not set(map(id, copied.parameters())) & set(map(id, case.loss.parameters()))
