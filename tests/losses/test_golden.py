"""Numbers from outside this repository, float64, on inputs made without random numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from hfdistill.losses import (
    AttentionKLLoss,
    AttentionMSELoss,
    AttentionScoreMSELoss,
    BinarySoftTargetsLoss,
    CosineLoss,
    EmbeddingMSELoss,
    HiddenMSELoss,
    LogitMSELoss,
    NormalizedHiddenMSELoss,
    PatientLoss,
    RegressionMSELoss,
    RelationKLLoss,
    SoftTargetsLoss,
    TaskBinaryCrossEntropyLoss,
    TaskCrossEntropyLoss,
)


def g(shape, a, b=0.0):
    """`sin(a (i + 1) + b) (1 + ((7 i) mod 5) / 5)` for i = 0, 1, ..., row by row."""
    i = np.arange(math.prod(shape))
    return torch.from_numpy((np.sin(a * (i + 1) + b) * (1 + (7 * i) % 5 / 5)).reshape(shape))


zs, zt = 2 * g((6, 5), 1.3), 2 * g((6, 5), 0.7, 0.5)
y = torch.tensor([0, 1, 2, 3, 4, 0])
hs, ht, ht8 = g((3, 7, 8), 0.43), g((3, 7, 12), 0.29, 0.3), g((3, 7, 8), 0.29, 0.3)
projection, bias = 0.3 * g((12, 8), 0.21), 0.1 * g((12,), 0.4)
sq, tq = 2 * g((3, 4, 7, 7), 0.57), 2 * g((3, 4, 7, 7), 0.39, 0.2)
student_qkv = [g((3, 7, 8), a) for a in (0.61, 0.67, 0.73)]
teacher_qkv = [g((3, 7, 12), a, 0.1) for a in (0.47, 0.53, 0.59)]
tokens = torch.arange(7)[None, :] < torch.tensor([7, 5, 3])[:, None]
valid_pairs = tokens[:, None, :, None] & tokens[:, None, None, :]


def entropy(temperature):
    p = (zt / temperature).softmax(-1)
    return -(p * p.log()).sum(-1).mean().item()


def binary_entropy(temperature):
    q = (zt / temperature).sigmoid()
    return -(q * q.log() + (1 - q) * (1 - q).log()).mean().item()


def relation(heads, which):
    return RelationKLLoss(heads)(student_qkv[which], teacher_qkv[which], tokens)


def test_generator():
    expected = [2 * math.sin(1.3), 2.8 * math.sin(2.6), 3.6 * math.sin(3.9), 2.4 * math.sin(5.2), 3.2 * math.sin(6.5)]
    np.testing.assert_allclose(zs[0].numpy(), expected, rtol=1e-14)


GOLDEN = {
    "KD T=4": (lambda: SoftTargetsLoss(4.0)(zs, zt), 3.18974248996),
    "KD T=1": (lambda: SoftTargetsLoss(1.0)(zs, zt), 1.62224445472),
    "KD T=1000": (lambda: SoftTargetsLoss(1000.0)(zs, zt), 3.7594),
    "reverse KL T=1": (lambda: SoftTargetsLoss(1.0)(zt, zs), 1.82010101092),
    "reverse KL T=2": (lambda: SoftTargetsLoss()(zt, zs), 2.72407675993),
    "binary KL T=1": (lambda: BinarySoftTargetsLoss(1.0)(zs, zt), 0.726169548455),
    "binary KL T=2": (lambda: BinarySoftTargetsLoss()(zs, zt), 0.952100641836),
    "logit MSE": (lambda: LogitMSELoss()(zs, zt), 8.67827950084),
    "logit MSE centred": (lambda: LogitMSELoss(centered=True)(zs, zt), 7.52251376264),
    "regression MSE": (lambda: RegressionMSELoss()(zs[:, 0], zt[:, 0]), 5.11402980584),
    "regression MSE (B,1) and (B,)": (lambda: RegressionMSELoss()(zs[:, :1], zt[:, 0]), 5.11402980584),
    "hidden MSE projected": (lambda: HiddenMSELoss()(hs @ projection.T + bias, ht, tokens), 3.06005384538),
    "hidden MSE": (lambda: HiddenMSELoss()(hs, ht8, tokens), 2.01624991125),
    "hidden MSE unmasked": (lambda: HiddenMSELoss()(hs, ht8), 2.12289912197),
    "embedding MSE": (lambda: EmbeddingMSELoss()(hs, ht8, tokens), 2.01624991125),
    "normalised CLS MSE": (lambda: HiddenMSELoss()(normalize(hs[:, 0], dim=-1), normalize(ht8[:, 0], dim=-1)), 0.278614817938),
    "cosine": (lambda: CosineLoss()(hs, ht8, tokens), 0.95883342742),
    "attention score MSE": (lambda: AttentionScoreMSELoss()(sq, tq, valid_pairs), 8.25721615286),
    "attention KL": (lambda: AttentionKLLoss()(sq, tq, valid_pairs), 1.44703002967),
    "attention MSE": (lambda: AttentionMSELoss()(sq, tq, valid_pairs), 0.07389543814),
    "PKD CLS, sum": (lambda: PatientLoss()(hs, ht8, tokens), 2.22891854351),
    "PKD CLS, mean": (lambda: PatientLoss(width_reduction="mean")(hs, ht8, tokens), 0.278614817938),
    "LN feature MSE": (lambda: NormalizedHiddenMSELoss()(hs, ht8, tokens), 1.89024010865),
    "MiniLMv2 QQ": (lambda: relation(4, 0), 0.722922854976),
    "MiniLMv2 KK": (lambda: relation(4, 1), 0.560528823742),
    "MiniLMv2 VV": (lambda: relation(4, 2), 0.284548727637),
    "value relation A_r=2": (lambda: relation(2, 2), 0.193307947871),
    "CE": (lambda: TaskCrossEntropyLoss()(zs, y), 2.44822487844),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    compute, expected = GOLDEN[name]
    # 12 significant digits were written down, 5 for the limit at T=1000
    assert compute().mean.item() == pytest.approx(expected, rel=1e-5 if name == "KD T=1000" else 1e-11)


@pytest.mark.parametrize(
    "relation",
    [
        ("soft CE T=4", lambda: SoftTargetsLoss(4.0)(zs, zt).mean.item() + 16 * entropy(4), 27.5902242822),
        ("soft CE T=1", lambda: SoftTargetsLoss(1.0)(zs, zt).mean.item() + entropy(1), 2.54882754014),
        ("BCE T=1", lambda: BinarySoftTargetsLoss(1.0)(zs, zt).mean.item() + binary_entropy(1), 1.13754339179),
        ("BCE T=2", lambda: BinarySoftTargetsLoss(2.0)(zs, zt).mean.item() + 4 * binary_entropy(2), 3.30555392384),
        ("hard BCE on soft labels", lambda: TaskBinaryCrossEntropyLoss()(zs, zt.sigmoid()).mean.item(), 1.13754339179),
        ("MiniLMv2 sum", lambda: sum(relation(4, which).mean.item() for which in range(3)), 1.56800040635),
        ("DML peer 1", lambda: (TaskCrossEntropyLoss()(zs, y).mean + SoftTargetsLoss(1.0)(zs, zt).mean).item(), 4.07046933316),
        ("DML peer 2", lambda: (TaskCrossEntropyLoss()(zt, y).mean + SoftTargetsLoss(1.0)(zt, zs).mean).item(), 4.99472448012),
    ],
    ids=lambda relation: relation[0],
)
def test_relations_between_golden_values(relation):
    _, compute, expected = relation
    assert compute() == pytest.approx(expected, rel=1e-11)


def test_gradient_norms_stay_of_one_order_over_temperatures():
    for temperature, expected in {1: 0.291, 2: 0.383, 4: 0.443, 8: 0.474, 16: 0.488}.items():
        student = zs.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(SoftTargetsLoss(temperature)(student, zt).mean, student)
        assert gradient.norm().item() == pytest.approx(expected, abs=5e-4)
