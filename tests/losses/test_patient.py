"""Patient distillation against a loop over samples, wherever the padding is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfdistill.losses import PatientLoss


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=5),
    st.integers(0, 2**16),
    st.booleans(),
    st.sampled_from(["sum", "mean"]),
    st.sampled_from(["first", "last"]),
)
def test_the_chosen_token_of_each_sample_wherever_it_is(spans, seed, normalize, reduction, token):
    """`spans`: padding before the sample and its length, 0 for a row without a real token."""
    rng, width = np.random.default_rng(seed), 4
    longest = max(start + length for start, length in spans) + 1
    student, teacher = rng.normal(size=(2, len(spans), longest, width))
    mask, rows = torch.zeros(len(spans), longest, dtype=torch.bool), []
    for row, (start, length) in enumerate(spans):
        mask[row, start : start + length] = True
        if length:
            position = start if token == "first" else start + length - 1
            s, t = student[row, position], teacher[row, position]
            if normalize:
                s, t = (x / math.sqrt(math.fsum(x * x)) for x in (s, t))
            rows.append(math.fsum((s - t) ** 2) / (width if reduction == "mean" else 1))
    value = PatientLoss(normalize, reduction, token)(torch.from_numpy(student), torch.from_numpy(teacher), mask)
    assert value.count.item() == len(rows)
    assert value.total.item() == pytest.approx(math.fsum(rows), rel=1e-10, abs=1e-14)


def test_scale_of_a_vector_counts_only_without_normalization():
    s, t = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    scale = torch.rand(3, 4, 1, dtype=torch.float64) + 0.5
    torch.testing.assert_close(PatientLoss()(scale * s, t).total, PatientLoss()(s, t).total)
    assert not torch.allclose(PatientLoss(False)(scale * s, t).total, PatientLoss(False)(s, t).total)
    torch.testing.assert_close(PatientLoss()(-s, s).total, torch.tensor(12.0, dtype=torch.float64))  # 4, the largest, three times


def test_a_zero_vector_is_at_distance_one_and_gets_no_gradient():
    s = torch.zeros(1, 2, 3, requires_grad=True)
    value = PatientLoss()(s, torch.ones(1, 2, 3))
    (gradient,) = torch.autograd.grad(value.total, s)
    assert value.total.item() == pytest.approx(1.0) and (gradient == 0).all()


def test_other_tokens_change_nothing():
    s, t = torch.randn(2, 2, 4, 6)
    other = s.clone()
    other[:, 1:] += 1
    assert torch.equal(PatientLoss()(other, t).total, PatientLoss()(s, t).total)


@pytest.mark.parametrize("option,value", [("width_reduction", "max"), ("token", "cls")])
def test_unknown_choices(option, value):
    with pytest.raises(ValueError, match=f"{option} must be .* got '{value}': it says .* Use '"):
        PatientLoss(**{option: value})


def test_pooled_vectors_have_no_tokens():
    with pytest.raises(ValueError, match=r"student has shape \(2, 8\).*use hidden_mse for pooled vectors"):
        PatientLoss()(torch.zeros(2, 8), torch.zeros(2, 8))
