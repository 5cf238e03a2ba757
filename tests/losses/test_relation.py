"""Relations between tokens against loops over cropped samples, and what must not change them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfdistill.losses import AttentionKLLoss, RelationKLLoss


def reference(student, teacher, lengths, heads):
    """One number for each real token: NumPy, float64, each sample cut to its tokens, one head and one query at a time."""
    rows = []
    for s, t, length in zip(student, teacher, lengths):
        for query in range(length):
            divergence = 0.0
            for head in range(heads):
                p, q = (distribution(side[:length], query, head, heads) for side in (t, s))
                divergence += sum(a * math.log(a / b) for a, b in zip(p, q))
            rows.append(divergence / heads)
    return rows


def distribution(tokens, query, head, heads):
    width = tokens.shape[1] // heads
    part = [token[head * width : (head + 1) * width] for token in tokens]
    scores = [math.fsum(part[query] * key) / math.sqrt(width) for key in part]
    weights = np.exp(np.array(scores) - max(scores))
    return weights / weights.sum()


@st.composite
def cases(draw):
    """Student, teacher, lengths, heads: random batch, lengths, widths, head counts."""
    heads = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    widths = [heads * draw(st.integers(1, 4)) for _ in range(2)]
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    student, teacher = (rng.normal(size=(len(lengths), max(lengths), width)) * 1.5 for width in widths)
    return student, teacher, lengths, heads


def right(lengths, longest):
    return torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]


def left(array, lengths, longest):
    """The real tokens of each sample at the end of `longest` positions, with garbage before them."""
    moved = torch.full((len(lengths), longest, array.shape[2]), 7.0, dtype=torch.float64)
    for row, (sample, length) in enumerate(zip(array, lengths)):
        moved[row, longest - length :] = torch.from_numpy(sample[:length])
    return moved


@settings(max_examples=60, deadline=None)
@given(cases())
def test_relations_are_those_of_a_loop_over_cropped_samples(case):
    student, teacher, lengths, heads = case
    value = RelationKLLoss(heads)(torch.from_numpy(student), torch.from_numpy(teacher), right(lengths, max(lengths)))
    rows = reference(student, teacher, lengths, heads)
    assert value.count.item() == len(rows)
    assert value.total.item() == pytest.approx(math.fsum(rows), rel=1e-9, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(0, 4))
def test_side_and_length_of_padding_change_nothing(case, more):
    student, teacher, lengths, heads = case
    longest, loss = max(lengths), RelationKLLoss(heads)
    s = torch.from_numpy(student).requires_grad_()
    plain = loss(s, torch.from_numpy(teacher), right(lengths, longest))
    (gradient,) = torch.autograd.grad(plain.total, s)
    total = longest + more
    moved = left(student, lengths, total).requires_grad_()
    value = loss(moved, left(teacher, lengths, total), right(lengths, total).flip(1))
    (moved_gradient,) = torch.autograd.grad(value.total, moved)
    torch.testing.assert_close(value.total, plain.total, rtol=1e-10, atol=1e-12)
    assert value.count == plain.count
    for row, length in enumerate(lengths):
        torch.testing.assert_close(moved_gradient[row, total - length :], gradient[row, :length], rtol=1e-9, atol=1e-12)
        assert (moved_gradient[row, : total - length] == 0).all() and (gradient[row, length:] == 0).all()


@settings(max_examples=30, deadline=None)
@given(cases(), st.integers(0, 2**16))
def test_a_rotation_inside_each_head_changes_nothing(case, seed):
    student, teacher, lengths, heads = case
    width = student.shape[2] // heads
    rotations, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(heads, width, width)))
    rotated = np.einsum("blhd,hde->blhe", student.reshape(*student.shape[:2], heads, width), rotations).reshape(student.shape)
    mask, loss = right(lengths, max(lengths)), RelationKLLoss(heads)
    values = [loss(torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(teacher), mask).total for x in (student, rotated)]
    torch.testing.assert_close(values[1], values[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 12])
def test_identical_models_give_zero_for_every_number_of_heads(heads):
    tokens = torch.randn(3, 5, 12, dtype=torch.float64)
    assert RelationKLLoss(heads)(tokens, tokens, right([5, 3, 1], 5)).total == 0
    assert RelationKLLoss(heads)(tokens, tokens * 1.1, right([5, 3, 1], 5)).total > 1e-4


def test_with_as_many_heads_as_the_model_it_is_the_attention_of_the_vectors_on_themselves():
    """MiniLM's value relation, through the other loss: attention scores with the values as queries and keys."""
    student, teacher, mask = torch.randn(3, 5, 8).double(), torch.randn(3, 5, 12).double(), right([5, 3, 1], 5)
    scores = []
    for side, width in ((student, 2), (teacher, 3)):
        heads = torch.stack([side[..., h * width : (h + 1) * width] for h in range(4)], 1)
        scores.append(heads @ heads.transpose(2, 3) / width**0.5)
    expected = AttentionKLLoss()(*scores, mask[:, None, :, None] & mask[:, None, None, :])
    value = RelationKLLoss(4)(student, teacher, mask)
    torch.testing.assert_close(value.total, expected.total)
    assert value.count == expected.count == 9


@pytest.mark.parametrize("heads", [0, -1, 2.0, True, "12"])
def test_numbers_of_heads_that_are_none(heads):
    with pytest.raises(ValueError, match="heads must be an integer >= 1, got"):
        RelationKLLoss(heads)


def test_widths_that_cannot_be_cut():
    message = "heads=5 relation heads do not divide the widths 8 of the student and 12 of the teacher.*Set heads to one of 1, 2, 4.$"
    with pytest.raises(ValueError, match=message):
        RelationKLLoss(5)(torch.zeros(1, 2, 8), torch.zeros(1, 2, 12))
    with pytest.raises(ValueError, match="heads=3 relation heads do not divide"):  # one of the two is enough
        RelationKLLoss(3).check_widths(8, 12)


def test_shapes_that_are_no_tokens():
    with pytest.raises(ValueError, match=r"student has shape \(2, 8\): relations are between the tokens of a sample"):
        RelationKLLoss(2)(torch.zeros(2, 8), torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"only the last axis, the width, may differ.*Feed both models the same token ids"):
        RelationKLLoss(2)(torch.zeros(2, 3, 8), torch.zeros(2, 4, 8))
