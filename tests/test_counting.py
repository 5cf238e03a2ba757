"""Counts from masks alone against counting pair by pair."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfdistill.counting import Denominators, Unit, count_pairs, count_units, valid_labels


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3), st.booleans(), st.sampled_from([None, 1, 2, 4, 9])
)
def test_pairs_are_counted_as_a_double_loop_does(rows, causal, window):
    tokens = torch.tensor(rows)
    expected = sum(
        1
        for row in rows
        for q in range(6)
        for k in range(6)
        if row[q] and row[k] and (k <= q or not causal) and (window is None or abs(q - k) < window)
    )
    assert int(count_pairs(tokens, causal, window)) == expected


def test_units_of_a_token_batch():
    batch = {
        "input_ids": torch.zeros(2, 4, dtype=torch.long),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]),
        "labels": torch.tensor([[5, -100, 7, -100], [-100, 1, -100, 2]]),
    }
    units = [Unit(kind) for kind in ("samples", "labels", "tokens", "next_tokens", "pairs")]
    counts = {u.kind: int(c) for u, c in count_units(batch, units, "token", None).items()}
    assert counts == {"samples": 2, "labels": 4, "tokens": 6, "next_tokens": 4, "pairs": 18}
    causal = count_units(batch, [Unit("labels")], "causal_lm", None)
    assert int(causal[Unit("labels")]) == 3  # position 0 is never a target


def test_missing_labels_by_problem_type():
    assert valid_labels(torch.tensor([0, -100]), "sequence", "single_label_classification").tolist() == [True, False]
    assert valid_labels(torch.tensor([0.5, float("nan")]), "sequence", "regression").tolist() == [True, False]
    multi = torch.tensor([[1.0, -100.0], [-100.0, -100.0]])
    assert valid_labels(multi, "sequence", "multi_label_classification").tolist() == [True, False]


def test_without_a_mask_samples_stand_for_positions():
    batches = [{"pixel_values": torch.zeros(2, 3, 4, 4)}, {"pixel_values": torch.zeros(3, 3, 4, 4)}]
    tokens = Unit("tokens")
    window = Denominators(batches, [tokens], "sequence", None, "cpu")
    assert float(window.of(tokens, torch.tensor(2 * 17), 2)) == 5 * 17


def test_text_without_a_mask_has_no_padding():
    batches = [{"input_ids": torch.zeros(2, 9, dtype=torch.long)}, {"input_ids": torch.zeros(2, 2, dtype=torch.long)}]
    window = Denominators(batches, [Unit("tokens"), Unit("pairs")], "token", None, "cpu")
    assert int(window.of(Unit("tokens"), torch.tensor(18), 2)) == 22
    assert int(window.of(Unit("pairs"), torch.tensor(162), 2)) == 2 * 81 + 2 * 4


def test_an_empty_window_divides_by_one():
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "labels": torch.full((2,), -100)}
    window = Denominators([batch], [Unit("labels")], "sequence", "single_label_classification", "cpu")
    assert int(window.of(Unit("labels"), torch.tensor(0), 2)) == 1


def test_counts_stay_exact_beyond_fp32():
    total = Denominators([], [], "sequence", None, "cpu", reduce=lambda t, how: t + 2**24 + 1)
    assert int(total.of(Unit("samples"), torch.tensor(1), 1)) == 2**24 + 1


@pytest.mark.parametrize(
    "a,b,expected",
    [((True, None), (False, 4), (True, 4)), ((False, 3), (False, 5), (False, 3)), ((False, None), (False, None), (False, None))],
)
def test_patterns_intersect(a, b, expected):
    assert Unit("pairs", *a).intersect(Unit("pairs", *b)) == Unit("pairs", *expected)
