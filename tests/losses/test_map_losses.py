"""Losses on feature maps: published numbers, and second versions written from the formulas in NumPy and plain loops, float64."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d

from hfdistill.losses.flow import FSPLoss
from hfdistill.losses.hint import HintLoss
from hfdistill.losses.information import VIDLoss
from hfdistill.losses.maps import AttentionTransferLoss, FactorTransferLoss, NSTLoss
from hfdistill.losses.review import HCLLoss, ReviewLoss, hierarchical_context_loss


SEEDS = range(3)


def g(shape, a, b=0.0):
    """`sin(a (i + 1) + b) (1 + ((7 i) mod 5) / 5)` for i = 0, 1, ..., row by row."""
    i = np.arange(math.prod(shape))
    return torch.from_numpy((np.sin(a * (i + 1) + b) * (1 + (7 * i) % 5 / 5)).reshape(shape))


fs, ft8 = g((6, 8), 0.9), g((6, 8), 0.37, 0.2)
ms, mt, mt4, ms12 = g((6, 4, 6, 6), 0.51), g((6, 6, 6, 6), 0.83, 0.1), g((6, 4, 6, 6), 0.83, 0.1), g((6, 4, 12, 12), 0.51)


def vid(exact):
    loss = VIDLoss()
    loss.prepare(ms.shape, mt.shape)
    loss.double()
    with torch.no_grad():
        for j, convolution in enumerate((loss.regressor[0], loss.regressor[2], loss.regressor[4])):
            convolution.weight.copy_(0.3 * g((6, 4) if j == 0 else (6, 6), 0.61, j)[:, :, None, None])
        if exact:
            loss.raw_variance.fill_(math.log(math.exp(5 - 1e-5) - 1))
    return loss(ms, mt)


GOLDEN = {
    "FitNet MSE": (lambda: HintLoss()(fs[:, :, None, None], ft8[:, :, None, None]), 1.99080444073),
    "AT": (lambda: AttentionTransferLoss()(ms, mt), 0.00402820885335),
    "AT pooled": (lambda: AttentionTransferLoss()(avg_pool2d(ms12, 2), mt), 0.00163542664756),
    "AT paper": (lambda: AttentionTransferLoss(form="paper")(ms, mt), 0.38077647129),
    "NST": (lambda: NSTLoss()(ms, mt), 1.03863893048),
    "FT": (lambda: FactorTransferLoss()(ms, mt), 0.0535339469591),
    "FT squared is AT": (lambda: FactorTransferLoss(norm=2)(ms, mt), 0.00402820885335),
    "FSP": (lambda: FSPLoss()([ms, mt4], [mt4, ms]), 0.0103255417413),
    "HCL": (lambda: HCLLoss()(ms, mt4), 1.26588249961),
    "VID, variance in float32": (lambda: vid(exact=False), 0.910983246831),
    "VID, variance in float64": (lambda: vid(exact=True), 0.910983230681),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    compute, expected = GOLDEN[name]
    value = compute()
    assert value.count == 6
    assert value.mean.item() == pytest.approx(expected, rel=1e-11)


# ------------------------------------------------------------------------------------------------------------ references


def arrays(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) * 1.5 for shape in shapes]


def tensors(maps):
    return [torch.from_numpy(one) for one in maps] if isinstance(maps, list) else torch.from_numpy(maps)


def check(loss, student, teacher, expected, rel=1e-10):
    """`expected`: one value for each sample."""
    value = loss(tensors(student), tensors(teacher))
    assert value.count.item() == len(expected)
    assert value.total.item() == pytest.approx(math.fsum(expected), rel=rel)
    for row in range(len(expected)):
        if not any(isinstance(module, torch.nn.BatchNorm2d) and loss.training for module in loss.modules()):
            mask = torch.arange(len(expected)) == row
            assert loss(tensors(student), tensors(teacher), mask).total.item() == pytest.approx(expected[row], rel=rel)


def squares(student, teacher):
    return math.fsum(((student - teacher) ** 2).ravel()) / student.size


def pooled(maps, height, width):
    """Average pooling of `(channels, height, width)`: bin i covers [i H / h, (i + 1) H / h), and every position it touches."""
    result = np.zeros((len(maps), height, width))
    H, W = maps.shape[1:]
    for i, j in itertools.product(range(height), range(width)):
        rows = range(i * H // height, -(-(i + 1) * H // height))
        columns = range(j * W // width, -(-(j + 1) * W // width))
        result[:, i, j] = [np.mean([channel[r, c] for r in rows for c in columns]) for channel in maps]
    return result


@pytest.mark.parametrize("seed", SEEDS)
def test_hint(seed):
    student, teacher = arrays(seed, (3, 2, 4, 5), (3, 2, 4, 5))
    check(HintLoss(), student, teacher, [squares(s, t) for s, t in zip(student, teacher)])


def attention(maps, power):
    """One number for each position, divided by the length of them all."""
    activity = [sum(abs(maps[c, i, j]) ** power for c in range(maps.shape[0])) for i in range(maps.shape[1]) for j in range(maps.shape[2])]
    length = math.sqrt(math.fsum(a * a for a in activity))
    return [a / length for a in activity]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("power", [1, 2, 2.5, 4])
def test_attention_and_factor_transfer(seed, power):
    student, teacher = arrays(seed, (3, 2, 4, 5), (3, 7, 4, 5))
    pairs = [(attention(s, power), attention(t, power)) for s, t in zip(student, teacher)]
    absolute = [math.fsum(abs(a - b) for a, b in zip(s, t)) / 20 for s, t in pairs]
    squared = [math.fsum((a - b) ** 2 for a, b in zip(s, t)) / 20 for s, t in pairs]
    check(AttentionTransferLoss(power), student, teacher, squared)
    check(AttentionTransferLoss(power, "paper"), student, teacher, [math.sqrt(20 * value) for value in squared])
    check(FactorTransferLoss(power), student, teacher, absolute)
    check(FactorTransferLoss(power, 2), student, teacher, squared)


def mean_kernel(a, b):
    def k(x, y):
        return (math.fsum((x * y).ravel()) / math.sqrt(math.fsum((x * x).ravel()) * math.fsum((y * y).ravel()))) ** 2

    return math.fsum(k(x, y) for x in a for y in b) / (len(a) * len(b))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("channels", [(2, 3), (4, 4), (9, 2), (2, 9)], ids=str)
@pytest.mark.parametrize("size", [(2, 3), (4, 2), (1, 1)], ids=str)
def test_neuron_selectivity(seed, channels, size):
    student, teacher = arrays(seed, (3, channels[0], *size), (3, channels[1], *size))
    expected = [mean_kernel(t, t) + mean_kernel(s, s) - 2 * mean_kernel(s, t) for s, t in zip(student, teacher)]
    value = NSTLoss()(torch.from_numpy(student), torch.from_numpy(teacher))
    assert value.total.item() == pytest.approx(math.fsum(expected), rel=1e-10, abs=1e-12) and value.total >= -1e-12


def gram(first, second):
    size = min(first.shape[1], second.shape[1]), min(first.shape[2], second.shape[2])
    first, second = pooled(first, *size), pooled(second, *size)
    return np.array([[math.fsum((a * b).ravel()) / (size[0] * size[1]) for b in second] for a in first])


@pytest.mark.parametrize("seed", SEEDS)
def test_flow(seed):
    student = arrays(seed, (3, 2, 6, 4), (3, 4, 3, 4), (3, 3, 5, 2))  # one axis smaller, then one larger and one smaller
    teacher = arrays(seed + 10, (3, 2, 7, 7), (3, 4, 7, 5), (3, 3, 1, 1))
    expected = []
    for b in range(3):
        flows = [squares(gram(student[i][b], student[i + 1][b]), gram(teacher[i][b], teacher[i + 1][b])) for i in range(2)]
        expected.append(sum(flows) / 2)
    check(FSPLoss(), student, teacher, expected)


def own(loss):
    return {name: tensor.detach().numpy().astype(np.float64) for name, tensor in loss.state_dict().items()}


def shake(loss):
    """No parameter left where it starts: biases at 0 and norms at 1 would hide mistakes."""
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(0.3 * torch.rand_like(parameter))
    return loss.double()


def softplus(x):
    return math.log1p(math.exp(x))


@pytest.mark.parametrize("seed", SEEDS)
def test_vid(seed):
    torch.manual_seed(seed)
    student, teacher = arrays(seed, (3, 2, 4, 5), (3, 5, 4, 5))
    loss = VIDLoss(variance=2.0, eps=0.25)
    loss.prepare(student.shape, teacher.shape)
    shake(loss)
    weights = own(loss)
    first, second, third = (weights[f"regressor.{i}.weight"][:, :, 0, 0] for i in (0, 2, 4))
    assert first.shape == (5, 2) and second.shape == third.shape == (5, 5)
    expected = []
    for s, t in zip(student, teacher):
        terms = []
        for i, j in itertools.product(range(4), range(5)):
            predicted = third @ np.maximum(second @ np.maximum(first @ s[:, i, j], 0), 0)
            for c in range(5):
                variance = softplus(weights["raw_variance"][c]) + 0.25
                terms.append(((predicted[c] - t[c, i, j]) ** 2 / variance + math.log(variance)) / 2)
        expected.append(math.fsum(terms) / len(terms))
    check(loss, student, teacher, expected)


def hierarchical(student, teacher):
    """Scales below the smaller side only; each weighs half of the one before it."""
    sizes = [size for size in (4, 2, 1) if size < min(student.shape[1:])]
    values = [squares(student, teacher)] + [squares(pooled(student, size, size), pooled(teacher, size, size)) for size in sizes]
    weights = [0.5**i for i in range(len(values))]
    return math.fsum(w * v for w, v in zip(weights, values)) / math.fsum(weights)


@pytest.mark.parametrize("size", [(6, 6), (5, 9), (9, 5), (4, 7), (3, 3), (2, 8), (1, 6), (1, 1)], ids=str)
def test_hierarchical_context(size):
    student, teacher = arrays(0, (3, 2, *size), (3, 2, *size))
    expected = [hierarchical(s, t) for s, t in zip(student, teacher)]
    check(HCLLoss(), student, teacher, expected)
    values = hierarchical_context_loss(torch.from_numpy(student), torch.from_numpy(teacher))
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-12)


def nearest(maps, size):
    H, W = maps.shape[2:]
    return np.stack([[maps[:, :, i * H // size[0], j * W // size[1]] for j in range(size[1])] for i in range(size[0])]).transpose(
        2, 3, 0, 1
    )


def normed(maps, weights, name, training):
    mean, variance = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
    if training:
        mean, variance = maps.mean((0, 2, 3)), maps.var((0, 2, 3))
    unit = (maps - mean[:, None, None]) / np.sqrt(variance[:, None, None] + 1e-5)
    return unit * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]


def convolved(maps, weight):
    """Convolution of odd size with zeros around the border."""
    k = weight.shape[-1] // 2
    padded = np.pad(maps, ((0, 0), (0, 0), (k, k), (k, k)))
    result = np.zeros((len(maps), len(weight), *maps.shape[2:]))
    for i, j in itertools.product(*map(range, maps.shape[2:])):
        window = padded[:, :, i : i + 2 * k + 1, j : j + 2 * k + 1]
        result[:, :, i, j] = np.tensordot(window, weight, ((1, 2, 3), (1, 2, 3)))
    return result


def review(weights, student, teacher, training):
    values, below = np.zeros(len(student[0])), None
    for depth in range(len(student) - 1, -1, -1):
        name = f"fusions.{depth}"
        x = normed(convolved(student[depth], weights[f"{name}.reduce.0.weight"]), weights, f"{name}.reduce.1", training)
        if below is not None:
            y = nearest(below, x.shape[2:])
            scores = convolved(np.concatenate([x, y], axis=1), weights[f"{name}.gates.weight"])
            gates = 1 / (1 + np.exp(-scores - weights[f"{name}.gates.bias"][:, None, None]))
            x = gates[:, 0:1] * x + gates[:, 1:2] * y
        below = x
        out = convolved(nearest(x, teacher[depth].shape[2:]), weights[f"{name}.expand.0.weight"])
        out = normed(out, weights, f"{name}.expand.1", training)
        values += [hierarchical(a, b) for a, b in zip(out, teacher[depth])]
    return values.tolist()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("most", [512, 4])
def test_review(training, most):
    torch.manual_seed(0)
    student = arrays(0, (3, 2, 8, 6), (3, 3, 4, 3), (3, 6, 2, 3), (3, 6, 1, 1))
    teacher = arrays(1, (3, 4, 8, 6), (3, 5, 8, 2), (3, 6, 2, 3), (3, 7, 1, 1))
    loss = ReviewLoss(most)
    loss.prepare([s.shape for s in student], [t.shape for t in teacher])
    shake(loss).train(training)
    assert loss.fusions[0].reduce[0].out_channels == min(most, 6)
    for buffer in (b for name, b in loss.named_buffers() if "running" in name):
        buffer.add_(0.3 * torch.rand_like(buffer))
    check(loss, student, teacher, review(own(loss), student, teacher, training), rel=1e-9)


# ------------------------------------------------------------------------------------------------------------ properties


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    "loss", [AttentionTransferLoss(), AttentionTransferLoss(4, "paper"), FactorTransferLoss(3)], ids=lambda x: type(x).__name__
)
def test_attention_ignores_scale_sign_and_order_of_channels(loss):
    student, teacher = randn(3, 5, 4, 6), randn(3, 7, 4, 6, seed=1)
    expected = loss(student, teacher).total
    scale = torch.tensor([1e-6, 3.0, 1e6], dtype=torch.float64)[:, None, None, None]
    for other in (student * scale, -student, student[:, [3, 0, 4, 2, 1]]):
        torch.testing.assert_close(loss(other, teacher).total, expected, rtol=1e-10, atol=0)
    assert not torch.allclose(loss(student.flip(-1), teacher).total, expected, rtol=1e-3)
    # each sample has a length of its own
    torch.testing.assert_close(loss(student[:1], teacher[:1]).total, loss(student, teacher, torch.tensor([True, False, False])).total)


def test_attention_is_computed_wherever_fp32_can_hold_the_maps():
    student, teacher = randn(2, 5, 4, 6), randn(2, 5, 4, 6, seed=1)
    for loss in (AttentionTransferLoss(8), FactorTransferLoss(8), NSTLoss()):
        expected = loss(student, teacher).total.float()
        for scale in (1e-7, 1e25):
            maps = (scale * student).float().requires_grad_()
            value = loss(maps, teacher.float())
            (gradient,) = torch.autograd.grad(value.total, maps)
            torch.testing.assert_close(value.total, expected, rtol=1e-4, atol=1e-6)
            assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0


def test_a_zero_map_has_no_attention_and_no_gradient():
    teacher = randn(2, 3, 4, 6)
    for form, expected in (("code", 1 / 24), ("paper", 1.0)):
        student = torch.zeros(2, 5, 4, 6, dtype=torch.float64, requires_grad=True)
        value = AttentionTransferLoss(form=form)(student, teacher)
        (gradient,) = torch.autograd.grad(value.total, student)
        assert value.mean.item() == pytest.approx(expected) and (gradient == 0).all()
        assert AttentionTransferLoss(form=form)(student, torch.zeros_like(teacher)).total == 0


def test_bounds_of_attention():
    student, teacher = torch.zeros(2, 1, 1, 4, 6, dtype=torch.float64)
    student[..., 0, 0] = teacher[..., 1, 1] = 3
    assert AttentionTransferLoss()(student, teacher).total.item() == pytest.approx(2 / 24)
    assert AttentionTransferLoss(form="paper")(student, teacher).total.item() == pytest.approx(math.sqrt(2))
    assert 0 < FactorTransferLoss()(student, teacher).total.item() == pytest.approx(2 / 24)
    student[..., :2, :], student[..., 2:, :], teacher[..., :2, :], teacher[..., 2:, :] = 1, 0, 0, 1
    assert FactorTransferLoss()(student, teacher).total.item() == pytest.approx(math.sqrt(2 / 24))


@pytest.mark.parametrize("channels", [3, 40])
def test_neuron_selectivity_compares_sets_of_channels(channels):
    student, teacher = randn(3, channels, 4, 6), randn(3, 5, 4, 6, seed=1)
    expected = NSTLoss()(student, teacher).total
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(0))
    scale = randn(3, channels, 1, 1, seed=2)
    for other in (student[:, order], student * scale, student.repeat(1, 2, 1, 1)):
        torch.testing.assert_close(NSTLoss()(other, teacher).total, expected, rtol=1e-10, atol=0)
    assert NSTLoss()(student[:, order], student).total.abs() < 1e-12
    one_hot = torch.eye(24, dtype=torch.float64).reshape(1, 24, 4, 6)  # sets with nothing in common, the farthest there is
    assert NSTLoss()(one_hot[:, :1], one_hot[:, 1:2]).total.item() == pytest.approx(2)


def test_a_silent_channel_counts_in_the_mean_and_gets_no_gradient():
    student, teacher = randn(2, 3, 4, 6), randn(2, 5, 4, 6, seed=1)
    silent = student.clone()
    silent[:, 1] = 0
    silent.requires_grad_()
    value = NSTLoss()(silent, teacher)
    (gradient,) = torch.autograd.grad(value.total, silent)
    assert (gradient[:, 1] == 0).all() and (gradient[:, 0] != 0).any()
    rest = student[:, [0, 2]].numpy()
    expected = [mean_kernel(t, t) + 4 / 9 * mean_kernel(s, s) - 4 / 3 * mean_kernel(s, t) for s, t in zip(rest, teacher.numpy())]
    assert value.total.item() == pytest.approx(math.fsum(expected), rel=1e-10)


def test_late_stages_need_no_kernel_matrix_of_channels():
    """2048 channels on 7 x 7: kernel matrices of 16 samples would take 3 * 270 MB and the products 20 GFLOP."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        NSTLoss()(torch.zeros(2, 512, 7, 7), torch.zeros(2, 2048, 7, 7))
    assert counter.get_total_flops() <= 2 * 2 * 49 * 49 * (512 + 2048)
    with FlopCounterMode(display=False) as counter:  # early stages have few channels on many positions
        NSTLoss()(torch.zeros(2, 8, 28, 28), torch.zeros(2, 16, 28, 28))
    assert counter.get_total_flops() <= 2 * 2 * 28 * 28 * (8 * 8 + 16 * 16 + 8 * 16)


def test_flow_of_swapped_layers_is_the_transpose():
    student, teacher = [randn(2, 3, 4, 4), randn(2, 5, 4, 4, seed=1)], [randn(2, 3, 6, 3, seed=2), randn(2, 5, 6, 3, seed=3)]
    value = FSPLoss()(student, teacher).total
    torch.testing.assert_close(FSPLoss()(student[::-1], teacher[::-1]).total, value)
    scaled = [2 * m for m in student], [2 * m for m in teacher]
    torch.testing.assert_close(FSPLoss()(*scaled).total, 16 * value)
    rescaled = [student[0] * 4, student[1] / 4]
    torch.testing.assert_close(FSPLoss()(rescaled, student).total, torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-20)


def test_vid_learns_the_variance_of_what_it_cannot_predict():
    loss = VIDLoss()
    teacher = torch.tensor([0.1, 2.0])[None, :, None, None] * randn(64, 2, 4, 4, dtype=torch.float32)
    student = torch.zeros(64, 3, 4, 4)  # says nothing: mu is 0
    loss.prepare(student.shape, teacher.shape)
    optimizer = torch.optim.Adam([loss.raw_variance], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        loss(student, teacher).mean.backward()
        optimizer.step()
    variances = torch.nn.functional.softplus(loss.raw_variance.detach()) + 1e-5
    torch.testing.assert_close(variances, teacher.square().mean((0, 2, 3)), rtol=0.02, atol=1e-4)
    # there the expected value is half of 1 + log variance, below 0 for the quiet channel
    quiet = loss(student, teacher).mean.item() * 2 - (1 + variances[1].log().item()) / 2
    assert quiet == pytest.approx((1 + variances[0].log().item()) / 2, abs=0.01) and quiet < 0


@pytest.mark.parametrize("variance,eps", [(5.0, 1e-5), (1e-3, 1e-5), (0.5, 0.4), (1000.0, 1e-5)])
def test_vid_starts_at_the_variance_asked_for(variance, eps):
    loss = VIDLoss(variance, eps)
    loss.prepare((1, 2, 1, 1), (1, 3, 1, 1))
    with torch.no_grad():
        loss.regressor[-1].weight.zero_()
    assert loss(torch.zeros(1, 2, 1, 1), torch.zeros(1, 3, 1, 1)).mean.item() == pytest.approx(math.log(variance) / 2, rel=1e-4)


@pytest.mark.parametrize("raw", [-1e4, -100.0, 100.0, 1e4])
def test_vid_with_extreme_variances_is_finite(raw):
    loss = VIDLoss()
    loss.prepare((1, 2, 1, 1), (1, 3, 1, 1))
    with torch.no_grad():
        loss.raw_variance.fill_(raw)
    student = torch.ones(2, 2, 3, 3, requires_grad=True)
    value = loss(student, torch.zeros(2, 3, 3, 3))
    gradients = torch.autograd.grad(value.total, [student, *loss.parameters()])
    assert torch.isfinite(value.total) and all(torch.isfinite(gradient).all() for gradient in gradients)


def test_one_pixel_has_one_scale():
    student, teacher = randn(3, 5, 1, 1), randn(3, 5, 1, 1, seed=1)
    torch.testing.assert_close(HCLLoss()(student, teacher).total, HintLoss()(student, teacher).total)


def prepared(student, teacher, **options):
    loss = ReviewLoss(**options)
    loss.prepare([s.shape for s in student], [t.shape for t in teacher])
    return loss.double()


def test_a_layer_of_the_teacher_reviews_all_deeper_layers_of_the_student():
    """What a map of the student gets to hear: the error at its own layer and at shallower ones, not at deeper ones."""
    student = [randn(2, 3, 8 >> i, 8 >> i, seed=i).requires_grad_() for i in range(3)]
    teacher = [randn(2, 4, 8 >> i, 8 >> i, seed=5 + i) for i in range(3)]
    loss = prepared(student, teacher).eval()  # batch norm apart

    def gradients(changed):
        """How much the gradients of all student maps change with one map of the teacher."""
        other = [t + 1 if i == changed else t for i, t in enumerate(teacher)]
        pairs = [torch.autograd.grad(loss(student, side).total, student) for side in (teacher, other)]
        return [not torch.allclose(a, b, atol=1e-9) for a, b in zip(*pairs)]

    assert gradients(0) == [True, True, True]
    assert gradients(1) == [False, True, True]
    assert gradients(2) == [False, False, True]


def test_fusions_are_no_larger_than_asked():
    student, teacher = [torch.zeros(1, 8, 4, 4), torch.zeros(1, 700, 2, 2)], [torch.zeros(1, 8, 4, 4), torch.zeros(1, 16, 2, 2)]
    assert prepared(student, teacher).fusions[0].reduce[0].out_channels == 512
    assert prepared(student, teacher, max_channels=64).fusions[1].reduce[0].out_channels == 64
    assert prepared(student[:1], teacher[:1]).fusions[0].reduce[0].out_channels == 8
    assert prepared(student, teacher).fusions[1].gates is None  # nothing comes from below


def test_one_value_for_each_channel_is_normalised_with_the_running_statistics():
    student, teacher = [randn(1, 3, 1, 1)], [randn(1, 4, 1, 1)]
    loss = prepared(student, teacher)
    before = {name: buffer.clone() for name, buffer in loss.named_buffers()}
    value = loss(student, teacher).total
    assert torch.equal(value, loss.eval()(student, teacher).total)
    assert all(torch.equal(buffer, before[name]) for name, buffer in loss.named_buffers())
    loss.train()(*([maps.repeat(2, 1, 1, 1) for maps in side] for side in (student, teacher)))
    assert loss.fusions[0].reduce[1].num_batches_tracked == 1


def test_evaluation_leaves_the_running_statistics():
    student, teacher = [randn(4, 3, 2, 2)], [randn(4, 4, 2, 2)]
    loss = prepared(student, teacher).eval()
    before = {name: buffer.clone() for name, buffer in loss.named_buffers()}
    loss(student, teacher)
    assert all(torch.equal(buffer, before[name]) for name, buffer in loss.named_buffers())


# ------------------------------------------------------------------------------------------------------------ errors


def raises(message):
    return pytest.raises(ValueError, match="^" + re.escape(message) + "$")


def zeros(*shape):
    return torch.zeros(shape)


SINGLE = [HintLoss(), AttentionTransferLoss(), NSTLoss(), FactorTransferLoss(), HCLLoss()]


@pytest.mark.parametrize("loss", SINGLE, ids=lambda loss: type(loss).__name__)
def test_maps_that_cannot_be_compared(loss):
    with raises(
        "student has shape (2, 3, 6, 6) and teacher (2, 3, 3, 6): maps of different height or width show different places at one index. "
        "Average-pool each axis of the larger to the smaller, as the trainer does, or map stages of one resolution."
    ):
        loss(zeros(2, 3, 6, 6), zeros(2, 3, 3, 6))
    with raises(
        "student has shape (2, 3, 6, 6) and teacher (1, 3, 6, 6): their samples cannot be paired. Feed both models the same batch."
    ):
        loss(zeros(2, 3, 6, 6), zeros(1, 3, 6, 6))
    with raises(
        "teacher has shape (2, 36, 3): this loss compares feature maps, (batch, channels, height, width). "
        "Take the signal 'features'; tokens are laid out on their grid first."
    ):
        loss(zeros(2, 3, 6, 6), zeros(2, 36, 3))
    with pytest.raises(ValueError, match=r"mask has shape \(2, 6, 6\) but the rows of this loss have shape \(2,\)"):
        loss(zeros(2, 3, 6, 6), zeros(2, 3, 6, 6), torch.ones(2, 6, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask must be a bool tensor"):
        loss(zeros(2, 3, 6, 6), zeros(2, 3, 6, 6), torch.ones(2))


@pytest.mark.parametrize("loss", [HintLoss(), HCLLoss()], ids=lambda loss: type(loss).__name__)
def test_channels_that_differ(loss):
    with raises(
        "student has shape (2, 3, 6, 6) and teacher (2, 5, 6, 6): they cannot be compared entry by entry. "
        "Give the term an adapter that brings the student to the teacher's channels."
    ):
        loss(zeros(2, 3, 6, 6), zeros(2, 5, 6, 6))


@pytest.mark.parametrize("loss", [AttentionTransferLoss, FactorTransferLoss])
@pytest.mark.parametrize("power", [0.5, 0, -2, float("nan"), float("inf"), "2", True])
def test_power(loss, power):
    with raises(
        f"power must be a finite number >= 1, got {power!r}: activations are raised to it, and below 1 the gradient at 0 is infinite. "
        "Use 2; 4 looks at the strongest activations only."
    ):
        loss(power=power)


def test_choices():
    with pytest.raises(ValueError, match="form must be 'code' or 'paper', got 'official': .* Use 'code' .* or 'paper'"):
        AttentionTransferLoss(form="official")
    for norm in (0, 3, "1", True):
        with pytest.raises(ValueError, match=f"norm must be 1 or 2, got {norm!r}: .* Use 1 .* or 2"):
            FactorTransferLoss(norm=norm)
    for channels in (0, -4, 1.5, "512", True):
        with pytest.raises(ValueError, match=f"max_channels must be an integer >= 1, got {channels!r}: .* Use 512"):
            ReviewLoss(max_channels=channels)


@pytest.mark.parametrize("variance,eps", [(0, 1e-5), (5, 0), (5, -1), (1e-6, 1e-5), (float("inf"), 1e-5), (5, float("nan")), ("5", 1e-5)])
def test_variances(variance, eps):
    with pytest.raises(ValueError, match="variance and eps must be finite numbers with 0 < eps < variance, got .* Use 5 and 1e-5"):
        VIDLoss(variance, eps)


def test_losses_with_parameters_are_prepared_first():
    with raises(
        "VIDLoss has no regressor yet: its parameters are made from the shapes of both maps. Call prepare(student_shape, teacher_shape) "
        "before training and before the optimizer is made, as the trainer does."
    ):
        VIDLoss()(zeros(2, 3, 4, 4), zeros(2, 5, 4, 4))
    with raises(
        "ReviewLoss has no fusion modules yet: they are made from the shapes of all mapped layers. Call prepare(student_shapes, "
        "teacher_shapes) before training and before the optimizer is made, as the trainer does."
    ):
        ReviewLoss()([zeros(2, 3, 4, 4)], [zeros(2, 5, 4, 4)])


def test_losses_with_parameters_fit_what_they_were_prepared_for():
    loss = VIDLoss()
    loss.prepare((3, 4, 4), (5, 4, 4))
    with raises(
        "VIDLoss was prepared for 3 channels of the student and 5 of the teacher, got 4 and 5: its regressor fits one pair of layers. "
        "Use an instance of its own for each pair."
    ):
        loss(zeros(2, 4, 4, 4), zeros(2, 5, 4, 4))
    loss = ReviewLoss()
    loss.prepare([(3, 4, 4), (4, 2, 2)], [(5, 4, 4), (6, 2, 2)])
    for student, teacher, given in (
        ([zeros(2, 3, 4, 4)], [zeros(2, 5, 4, 4)], "[(3, 5)]"),
        ([zeros(2, 4, 2, 2), zeros(2, 3, 4, 4)], [zeros(2, 6, 2, 2), zeros(2, 5, 4, 4)], "[(4, 6), (3, 5)]"),
    ):
        with raises(
            f"ReviewLoss was prepared for maps of (student, teacher) channels [(3, 5), (4, 6)], got {given}: its fusion modules fit the "
            "layers they were made for. Pass the same layers, from shallow to deep."
        ):
            loss(student, teacher)


def test_flow_needs_two_layers_of_equal_channels():
    for count in (0, 1):
        message = (
            f"the flow loss got {count} mapped layer{'s' if count != 1 else ''}, but a flow is between two layers of one network: there "
            "would be nothing to compare. Map at least two layers, from shallow to deep."
        )
        with raises(message):
            FSPLoss().prepare([(3, 4, 4)] * count, [(3, 4, 4)] * count)
    with raises(message):
        FSPLoss()([zeros(2, 3, 4, 4)], [zeros(2, 3, 4, 4)])
    message = (
        "student has 4 channels and teacher 5 at a mapped layer: their flows are matrices of different sizes. "
        "Map layers of equal channels, or use a loss that takes any, such as attention_transfer or nst."
    )
    with raises(message):
        FSPLoss().prepare([(1, 3, 4, 4), (1, 4, 4, 4)], [(1, 3, 4, 4), (1, 5, 4, 4)])
    with raises(message):
        FSPLoss()([zeros(1, 3, 4, 4), zeros(1, 4, 4, 4)], [zeros(1, 3, 4, 4), zeros(1, 5, 4, 4)])
    FSPLoss().prepare([(1, 3, 4, 4), (1, 4, 4, 4)], [(1, 3, 2, 2), (1, 4, 9, 4)])


@pytest.mark.parametrize("loss", [FSPLoss(), ReviewLoss()], ids=lambda loss: type(loss).__name__)
def test_lists_of_maps(loss):
    shapes = [(2, 3, 4, 4), (2, 3, 2, 2)]
    loss.prepare(shapes, shapes)
    with raises(
        f"{type(loss).__name__} got 2 maps of the student and 1 of the teacher: it compares them one to one. "
        "Pass one map of each for every pair of the layer map."
    ):
        loss([zeros(*shape) for shape in shapes], [zeros(*shapes[0])])
    with raises(f"{type(loss).__name__} got maps of 2 and of 3 samples: they are not of one batch. Pass the layers of one forward pass."):
        loss([zeros(2, 3, 4, 4), zeros(3, 3, 2, 2)], [zeros(2, 3, 4, 4), zeros(3, 3, 2, 2)])
