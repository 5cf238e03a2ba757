"""Relations between samples: numbers from outside this repository, and a second implementation of each loss, written from the definition
with NumPy and loops over samples."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
import torch
from torch.func import functional_call

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


def g(shape, a, b=0.0):
    """`sin(a (i + 1) + b) (1 + ((7 i) mod 5) / 5)` for i = 0, 1, ..., row by row."""
    i = np.arange(math.prod(shape))
    return torch.from_numpy((np.sin(a * (i + 1) + b) * (1 + (7 * i) % 5 / 5)).reshape(shape))


fs, ft, ft8 = g((6, 8), 0.9), g((6, 12), 0.37, 0.2), g((6, 8), 0.37, 0.2)
ms, mt = g((6, 4, 6, 6), 0.51).flatten(1), g((6, 6, 6, 6), 0.83, 0.1).flatten(1)

GOLDEN = {
    "RKD distance": (lambda: RKDDistanceLoss()(fs, ft).mean, 0.121286427188),
    "RKD angle": (lambda: RKDAngleLoss()(fs, ft).mean, 0.150965005565),
    "RKD total": (lambda: 25 * RKDDistanceLoss()(fs, ft).mean + 50 * RKDAngleLoss()(fs, ft).mean, 10.5804109579),
    "SP": (lambda: SimilarityPreservingLoss()(ms, mt).mean, 0.311463478623),
    "CC, adjacent": (lambda: CorrelationCongruenceLoss("adjacent")(fs, ft8).mean, 6.76168777071),
    "CC, kernel": (lambda: CorrelationCongruenceLoss()(fs, ft).mean, 0.0540068957624),
    "CC, kernel squared": (lambda: CorrelationCongruenceLoss(squared=True)(fs, ft).mean, (0.0540068957624 * 6) ** 2),
    "PKT": (lambda: PKTLoss()(fs, ft).mean, 0.143268533282),
    "similarity KL": (lambda: SimilarityKLLoss()(fs, ft).mean, 15.1598011457),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    compute, expected = GOLDEN[name]
    assert float(compute()) == pytest.approx(expected, rel=1e-11)


# ------------------------------------------------------------------------------------------------------------ references


def unit(vector):
    length = math.sqrt(math.fsum(x * x for x in vector))
    return np.array(vector) / length if length else np.zeros(len(vector))


def distance(a, b):
    return math.sqrt(math.fsum((x - y) ** 2 for x, y in zip(a, b)))


def smooth_l1(x):
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def rkd_distance(student, teacher):
    def relative(vectors):
        all_pairs = [[distance(a, b) for b in vectors] for a in vectors]
        positive = [d for row in all_pairs for d in row if d > 0]
        return np.array(all_pairs) / (math.fsum(positive) / len(positive))

    return np.mean([smooth_l1(x) for x in (relative(student) - relative(teacher)).flat])


def rkd_angle(student, teacher):
    n = range(len(student))

    def angle(v, i, j, k):
        return unit(v[j] - v[i]) @ unit(v[k] - v[i])

    return np.mean([smooth_l1(angle(student, *ijk) - angle(teacher, *ijk)) for ijk in itertools.product(n, n, n)])


def similarity_preserving(student, teacher):
    rows = [np.array([unit([a @ b for b in side]) for a in side]) for side in (student, teacher)]
    return ((rows[0] - rows[1]) ** 2).sum() / len(student) ** 2


def pkt(student, teacher):
    def probabilities(vectors):
        short = [v / (math.sqrt(math.fsum(v * v)) + 1e-7) for v in vectors]
        similar = np.array([[(math.fsum(a * b) + 1) / 2 for b in short] for a in short])
        return similar / similar.sum(1, keepdims=True)

    p, q = probabilities(teacher), probabilities(student)
    return np.mean([a * math.log((a + 1e-7) / (b + 1e-7)) for a, b in zip(p.flat, q.flat)])


def similarity_kl(student, teacher, temperature=0.1):
    total = 0
    for i in range(len(student)):
        p, q = [], []
        for vectors, out in ((teacher, p), (student, q)):
            scores = [math.exp((unit(vectors[i]) @ unit(vectors[j]) - 1) / temperature) for j in range(len(vectors)) if j != i]
            out += [score / math.fsum(scores) for score in scores]
        total += math.fsum(a * math.log(a / b) for a, b in zip(p, q))
    return total / len(student)


def kernel_congruence(student, teacher, gamma=0.4, order=2, squared=False):
    def kernel(vectors):
        def entry(a, b):
            cosine = unit(a) @ unit(b)
            return math.exp(-2 * gamma) * sum((2 * gamma * cosine) ** p / math.factorial(p) for p in range(order + 1))

        return np.array([[entry(a, b) for b in vectors] for a in vectors])

    norm = math.sqrt(((kernel(student) - kernel(teacher)) ** 2).sum())
    return norm ** (2 if squared else 1) / len(student) ** 2


def adjacent(student, teacher):
    products = [
        sum(abs(student[i, d] - teacher[i, d]) * abs(student[i + 1, d] - teacher[i + 1, d]) for d in range(student.shape[1]))
        for i in range(len(student) - 1)
    ]
    return sum(products) / len(products)


def dark_rank(student, teacher, alpha=3.0, beta=3.0, length=4, normalize=True):
    if normalize:
        student, teacher = (np.array([unit(v) for v in side]) for side in (student, teacher))
    total = 0
    for i in range(len(student)):
        others = [j for j in range(len(student)) if j != i]
        ranked = sorted(others, key=lambda j: distance(teacher[i], teacher[j]))[:length]
        scores = [-alpha * distance(student[i], student[j]) ** beta for j in ranked]
        while scores:
            best = scores[0]
            total += math.log(math.fsum(math.exp(score - best) for score in scores))
            scores = scores[1:]
    return total / len(student)


def edges(vectors):
    squares = np.array([[distance(a, b) ** 2 for b in vectors] for a in vectors])
    return squares / squares[squares > 0].mean()


def instance_graph(student, teacher, edge, vertex, transformation):
    layers = range(len(student))
    value = edge * np.mean([((edges(student[k]) - edges(teacher[k])) ** 2).mean() for k in layers])
    matching = [((student[k] - teacher[k]) ** 2).mean() for k in layers if student[k].shape == teacher[k].shape]
    value += vertex * np.mean(matching) if matching else 0
    changes = []
    for k in layers[:-1]:
        change = [edges(side[k + 1]) - edges(side[k]) for side in (student, teacher)]
        changes.append(((change[0] - change[1]) ** 2).mean())
        if all(side[k].shape == side[k + 1].shape for side in (student, teacher)):
            moved = [np.array([distance(a, b) ** 2 for a, b in zip(side[k], side[k + 1])]) for side in (student, teacher)]
            changes[-1] += ((moved[0] / moved[0].mean() - moved[1] / moved[1].mean()) ** 2).mean()
    return value + (transformation * np.mean(changes) if changes else 0)


REFERENCES = {
    "rkd distance": (RKDDistanceLoss(), rkd_distance),
    "rkd angle": (RKDAngleLoss(), rkd_angle),
    "rkd angle, 4 samples": (RKDAngleLoss(max_samples=4), lambda s, t: rkd_angle(s[:4], t[:4])),
    "similarity preserving": (SimilarityPreservingLoss(), similarity_preserving),
    "pkt": (PKTLoss(), pkt),
    "similarity kl": (SimilarityKLLoss(), similarity_kl),
    "similarity kl 0.5": (SimilarityKLLoss(0.5), lambda s, t: similarity_kl(s, t, 0.5)),
    "kernel": (CorrelationCongruenceLoss(), kernel_congruence),
    "kernel, order 4": (CorrelationCongruenceLoss(gamma=1.3, order=4), lambda s, t: kernel_congruence(s, t, 1.3, 4)),
    "kernel, squared": (CorrelationCongruenceLoss(order=1, squared=True), lambda s, t: kernel_congruence(s, t, 0.4, 1, True)),
    "adjacent": (CorrelationCongruenceLoss("adjacent"), adjacent),
    "dark rank": (DarkRankLoss(), dark_rank),
    "dark rank of all": (DarkRankLoss(length=99), lambda s, t: dark_rank(s, t, length=99)),
    "dark rank raw": (DarkRankLoss(0.3, 1.5, 3, normalize=False), lambda s, t: dark_rank(s, t, 0.3, 1.5, 3, False)),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("special", ["none", "duplicates", "zero row"])
@pytest.mark.parametrize("name", REFERENCES)
def test_references(name, special, seed):
    loss, reference = REFERENCES[name]
    rng = np.random.default_rng(seed)
    samples = 5 + seed
    student, teacher = rng.normal(size=(samples, 4)) + 1, rng.normal(size=(samples, 4 if name == "adjacent" else 7)) * 2
    if special == "duplicates":
        student[3], student[1] = student[0], student[2]
        teacher[1] = teacher[2] if "dark rank" not in name else teacher[1]  # neighbours equally near have no order
    elif special == "zero row":
        student[1] = 0
        teacher[2] = 0 if "dark rank" not in name else teacher[2]
    value = loss(torch.from_numpy(student), torch.from_numpy(teacher))
    assert value.mean.item() == pytest.approx(reference(student, teacher), rel=1e-9) and value.count.item() == samples


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (2.0, 0.0, 0.5), (0.0, 3.0, 0.0), (0.0, 0.0, 1.0)])
@pytest.mark.parametrize(
    "widths", [([4, 4, 4], [4, 4, 4]), ([4, 4, 6], [7, 7, 6]), ([4, 6], [4, 8]), ([5], [5])], ids=["same", "pooled", "stages", "one layer"]
)
def test_instance_graph(widths, weights, seed):
    if widths == ([5], [5]) and weights == (0.0, 0.0, 1.0):
        return  # refused, see below
    rng = np.random.default_rng(seed)
    student, teacher = ([rng.normal(size=(5, width)) * 2 for width in side] for side in widths)
    student[0][1] = student[0][3]
    value = InstanceGraphLoss(*weights)([torch.from_numpy(x) for x in student], [torch.from_numpy(x) for x in teacher])
    assert value.mean.item() == pytest.approx(instance_graph(student, teacher, *weights), rel=1e-10) and value.count.item() == 5


# ------------------------------------------------------------------------------------------------------------ what each is made of


def test_small_distances_between_large_vectors_survive_float32():
    """From inner products, the distances of 0.02 between vectors of length 1000 would be rounding."""
    generator = torch.Generator().manual_seed(0)
    base = 300 * torch.randn(1, 12, generator=generator)
    student, teacher = base + 0.01 * torch.randn(6, 12, generator=generator), torch.randn(6, 12, generator=generator)
    for loss in (RKDDistanceLoss(), RKDAngleLoss(), InstanceGraphLoss(vertex_weight=0.0)):
        sides = ([student], [teacher]) if loss.joint else (student, teacher)
        exact = ([student.double()], [teacher.double()]) if loss.joint else (student.double(), teacher.double())
        torch.testing.assert_close(loss(*sides).mean.double(), loss(*exact).mean, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-10, 1e10])
@pytest.mark.parametrize("loss", [RKDDistanceLoss(), SimilarityPreservingLoss()], ids=lambda loss: type(loss).__name__)
def test_scale_does_not_matter_however_small(loss, scale):
    torch.testing.assert_close(loss((scale * fs).float(), ft.float()).mean, loss(fs, ft).mean.float(), rtol=1e-5, atol=0)


def test_large_samples_count_for_more_in_sp_and_a_small_one_keeps_its_row():
    factor = torch.tensor([1, 1, 1, 1, 1, 1e-6], dtype=torch.float64)[:, None]
    loss = SimilarityPreservingLoss()
    # as if the last sample were not a column, while its own row is still compared
    assert loss(factor * fs, factor * ft).mean.item() == pytest.approx(similarity_preserving((factor * fs).numpy(), (factor * ft).numpy()))


def test_opposite_vectors_choose_each_other_with_no_probability_below_zero():
    """Rounding takes their cosine as far below -1 as float32 can tell, for some; the logarithm of a negative number is NaN."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        vector, teacher = torch.randn(1, 3000, generator=generator), torch.randn(2, 3, generator=generator)
        student = torch.cat([vector, -vector]).requires_grad_()
        value = PKTLoss()(student, teacher).total
        assert torch.isfinite(value) and torch.isfinite(torch.autograd.grad(value, student)[0]).all()


@pytest.mark.parametrize("loss", [RKDDistanceLoss(), RKDAngleLoss(), SimilarityKLLoss(), DarkRankLoss()], ids=lambda x: type(x).__name__)
def test_two_samples_have_one_relation(loss):
    student = fs[:2].clone().requires_grad_()
    value = loss(student, ft[:2])
    assert value.total.abs() < 1e-15 and value.count == 2
    assert (torch.autograd.grad(value.total, student)[0].abs() < 1e-15).all()


def test_similarity_temperature_of_the_step():
    loss = SimilarityKLLoss()
    assert torch.equal(loss(fs, ft, temperature=0.5).total, SimilarityKLLoss(0.5)(fs, ft).total)
    assert loss(fs, ft).total != loss(fs, ft, temperature=0.5).total and loss.scheduled == ("temperature",)


def test_similarity_of_a_sample_with_itself_is_left_out():
    """With it both sides would put nearly everything there, and hardly differ."""
    student, teacher = torch.eye(4).double(), torch.eye(4).double()
    teacher[0, 1] = 0.1
    assert SimilarityKLLoss(0.05)(student, teacher).mean > 0.1


def test_equal_models_have_the_likelihood_of_their_own_ranking():
    assert DarkRankLoss()(fs, fs).mean.item() == pytest.approx(dark_rank(fs.numpy(), fs.numpy()), rel=1e-12)
    assert DarkRankLoss(alpha=1e4)(fs, fs).mean < 1e-9  # sure of it
    # all distances agree: every order is as likely
    assert DarkRankLoss(length=5)(torch.eye(6).double(), fs).mean.item() == pytest.approx(math.log(math.factorial(5)), rel=1e-12)


def test_only_the_order_of_the_teachers_distances_ranks():
    angles = torch.tensor([0.0, 0.1, 0.3, 0.7, 1.5]).double()
    line = torch.stack([angles.cos(), angles.sin()], -1)
    bent = torch.stack([(1.1 * angles).cos(), (1.1 * angles).sin()], -1)
    assert DarkRankLoss()(fs[:5], line).total == DarkRankLoss()(fs[:5], bent).total != DarkRankLoss()(fs[:5], line.flip(0)).total


def test_the_adjacent_form_is_zero_when_every_second_sample_agrees():
    student = ft8.clone()
    student[::2] += 1
    assert CorrelationCongruenceLoss("adjacent")(student, ft8).total == 0
    assert CorrelationCongruenceLoss()(student, ft8).total > 0.01


# ------------------------------------------------------------------------------------------------------------ trained embeddings


def embedded(form="kernel"):
    loss = CorrelationCongruenceLoss(form, embedding=5)
    loss.prepare((6, 8), (6, 12))
    return loss.double()


@pytest.mark.parametrize("form", ["kernel", "adjacent"])
def test_embeddings_of_both_sides_are_compared(form):
    loss = embedded(form)
    loss.check_widths(8, 12)
    with torch.no_grad():
        sides = [
            (x.numpy() @ layer.weight.numpy().T + layer.bias.numpy())
            for x, layer in ((fs, loss.student_embedding), (ft, loss.teacher_embedding))
        ]
    expected = (kernel_congruence if form == "kernel" else adjacent)(*sides)
    assert loss(fs, ft).mean.item() == pytest.approx(expected, rel=1e-10)
    for name, parameter in loss.named_parameters():
        at = parameter.detach().clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda w, name=name: functional_call(loss, {name: w}, (fs, ft)).total, at, atol=1e-6)


def test_embeddings_are_parameters_of_the_loss_and_learn_from_real_samples_only():
    loss = embedded()
    assert sorted(loss.state_dict()) == [f"{side}_embedding.{name}" for side in ("student", "teacher") for name in ("bias", "weight")]
    mask = torch.tensor([True, True, False, True, False, True])
    dirty = [torch.where(mask[:, None], tensor, float("nan")).requires_grad_() for tensor in (fs, ft)]
    gradients = torch.autograd.grad(loss(*dirty, mask).total, list(loss.parameters()))
    expected = torch.autograd.grad(loss(fs[mask], ft[mask]).total, list(loss.parameters()))
    for gradient, other in zip(gradients, expected):
        torch.testing.assert_close(gradient, other)
        assert gradient.abs().sum() > 0
    assert not list(CorrelationCongruenceLoss().parameters())
    without = CorrelationCongruenceLoss()
    without.prepare((6, 8), (6, 12))
    assert not list(without.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_embeddings_take_what_the_model_gives(dtype):
    loss = CorrelationCongruenceLoss(embedding=5)
    loss.prepare((6, 8), (6, 12))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(fs.to(dtype).requires_grad_(), ft.to(dtype))
    value.total.backward()
    assert value.total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(parameter.grad.dtype == torch.float32 for parameter in loss.parameters())


# ------------------------------------------------------------------------------------------------------------ errors


def raises(message):
    return pytest.raises(ValueError, match="^" + re.escape(message) + "$")


@pytest.mark.parametrize("max_samples", [2, 0, -1, 3.0, True, "all"])
def test_max_samples(max_samples):
    with raises(
        f"max_samples must be an integer >= 3, got {max_samples!r}: an angle is between three samples. Use 64 to 128, or None for all "
        "samples of the batch."
    ):
        RKDAngleLoss(max_samples=max_samples)


@pytest.mark.parametrize("temperature", [0, -0.1, float("nan"), "0.1"])
def test_temperature(temperature):
    for run in (lambda: SimilarityKLLoss(temperature), lambda: SimilarityKLLoss()(fs, ft, temperature=temperature)):
        with pytest.raises(ValueError, match="temperature must be a finite number > 0"):
            run()


def test_correlation_congruence_options():
    with raises(
        "form must be 'kernel' or 'adjacent', got 'rbf': it says what correlates the samples. Use 'kernel' (the paper) or 'adjacent' "
        "(products of neighbours in the batch, as in the code that came with CRD)."
    ):
        CorrelationCongruenceLoss("rbf")
    for gamma in (0, -1.0, float("inf"), "0.4"):
        with raises(f"gamma must be a finite number > 0, got {gamma!r}: at 0 the kernel is the same for all samples. Use 0.4."):
            CorrelationCongruenceLoss(gamma=gamma)
    for order in (0, 1.5, None):
        with raises(f"order must be an integer >= 1, got {order!r}: below, nothing of the samples is left. Use 2."):
            CorrelationCongruenceLoss(order=order)
    with raises("embedding must be an integer >= 1, got 0: below, nothing of the samples is left. Use 128, or None for none."):
        CorrelationCongruenceLoss(embedding=0)


def test_the_adjacent_form_needs_one_width():
    message = (
        "The student's vectors have width 8 and the teacher's 12, but the adjacent form subtracts them. Set embedding (128 is usual), "
        "which trains a linear layer for each side, or form to 'kernel'."
    )
    with raises(message):
        CorrelationCongruenceLoss("adjacent").check_widths(8, 12)
    with raises(message):
        CorrelationCongruenceLoss("adjacent")(fs, ft)
    CorrelationCongruenceLoss("adjacent").check_widths(8, 8)


def test_embeddings_must_be_made():
    with raises(
        "embedding=5, but the linear layers were not made, so there is nothing to compare. Call prepare(student_shape, teacher_shape) "
        "before training, as the objective does."
    ):
        CorrelationCongruenceLoss(embedding=5)(fs, ft)


def test_dark_rank_options():
    for alpha, beta in ((0, 3), (3, 0.5), (float("nan"), 3), (3, float("inf")), ("3", 3)):
        with raises(
            f"alpha must be a finite number > 0 and beta a finite number >= 1, got {alpha!r} and {beta!r}: scores are -alpha * distance ** "
            "beta, which must fall with the distance and have a gradient at 0. Use 3 and 3."
        ):
            DarkRankLoss(alpha, beta)
    for length in (1, 0, 2.0, None):
        with raises(f"length must be an integer >= 2, got {length!r}: a shorter list has one order only. Use 4."):
            DarkRankLoss(length=length)


def test_instance_graph_errors():
    with raises(
        "Weights must be finite numbers >= 0 and not all 0, got edge_weight=0 and vertex_weight=-1 and transformation_weight=0: the "
        "student would be pushed away from the teacher, or learn nothing. Use 1 for each; 0 turns one off."
    ):
        InstanceGraphLoss(0, -1, 0)
    with raises("2 layers of the student and 1 of the teacher cannot be paired. Pass one tensor of each for every pair of the layer map."):
        InstanceGraphLoss()([fs, fs], [ft])
    with pytest.raises(ValueError, match="student has shape"):
        InstanceGraphLoss()([fs, fs], [ft, ft[:5]])
    with pytest.raises(ValueError, match="student has shape"):
        InstanceGraphLoss()([fs, fs[:5]], [ft, ft[:5]])
    for weights in ((0, 1.0, 0), (0, 0, 1.0), (0, 1.0, 1.0)):
        with raises(
            "Layers of widths [8] (student) and [12] (teacher) leave nothing to compare: the transformation needs two layers, and the "
            "vertices a layer of equal widths. Set edge_weight above 0."
        ):
            InstanceGraphLoss(*weights)([fs], [ft])
    assert InstanceGraphLoss(0, 0, 1.0)([fs, fs + 1], [ft, 2 * ft]).total > 0
