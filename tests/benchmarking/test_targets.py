"""Targets and floors, by hand."""

from __future__ import annotations

import pytest
from example_benchmark import results

from hfdistill.benchmarking.machine import count_work, floor
from hfdistill.benchmarking.tables import TITLES
from hfdistill.benchmarking.targets import IN_FP32, TARGETS, judge
from hfdistill.benchmarking.workloads import build_workload


def row(rows, **wanted):
    found = [one for one in rows if all(one[key] == value for key, value in wanted.items())]
    assert len(found) == 1, found
    return found[0]


def test_without_bf16_instructions_the_fp32_candidate_stands_in():
    rows = judge(results(), TITLES)
    own = row(rows, workload="W1", against=TITLES["stock"], measure="time, kept")
    assert own["what"] == TITLES["masked"] and own["here"] == 0.5 and own["met"] == "yes"  # 0.25 / 0.5, at most 0.58
    assert "fp32" in own["remark"]
    # a plain step is 3 * 2 operations; ours 3 * (2 - 0.9) + 0.1 * 1 + 2, and with a teacher 3.2 times faster 3.3 + 2.1 / 3.2
    assert own["floor"] == pytest.approx(5.4 / 6) and own["remark"].endswith(f"{(3.3 + 2.1 / 3.2) / 6:.2f}")
    textbook = row(rows, workload="W1", against=TITLES["textbook"], measure="time, default")
    assert textbook["here"] == pytest.approx(0.2) and textbook["met"] == "no"
    assert textbook["floor"] == pytest.approx(0.9 * 0.5 / 1.25)


def test_with_bf16_instructions_the_bf16_teacher_counts():
    rows = judge(results(flags=("avx2", "amx_bf16")), TITLES)
    own = row(rows, workload="W1", against=TITLES["stock"], measure="time, default")
    assert own["what"] == TITLES["masked_bf16"] and own["here"] == pytest.approx(0.4) and own["remark"] is None
    assert own["floor"] == pytest.approx((3.3 + 2.1 / 4) / 6)
    assert row(rows, workload="W1", against=TITLES["textbrewer"], measure="time, kept")["met"] == "not measured"  # no step in bf16 there


def test_short_steps_memory_and_tables():
    rows = judge(results(), TITLES)
    assert row(rows, workload="W1", what=TITLES["off"])["met"] == "yes"
    short = row(rows, workload="W3", what=TITLES["off"])
    assert short["met"] == "step is short" and short["remark"] == "+30 ms"
    memory = row(rows, workload="W1", measure="peak memory")
    assert memory["here"] == 0.2 and memory["met"] == "yes"
    assert row(rows, workload="W5", measure="peak memory")["met"] == "not measured"
    table = row(rows, workload="stored table")
    assert table["here"] == pytest.approx(1.02) and table["met"] == "yes"
    stored = row(rows, workload="W3", what=TITLES["stored"])
    assert stored["here"] == pytest.approx(1.04) and stored["met"] == "yes"
    assert stored["floor"] == pytest.approx((6 + 1) / 6)  # the stored hidden state still goes through the head


def test_names_in_targets_are_candidates():
    for target in TARGETS:
        assert {*target.ours, *target.others} <= TITLES.keys()
    assert {*IN_FP32, *IN_FP32.values()} <= TITLES.keys()


def test_floor_of_bert_base_is_that_of_half_the_layers():
    """12 layers teach 6: online costs 1 + 12 / (3 * 6) of plain training; a tiny head and embeddings do not matter."""
    work = count_work(build_workload("bert_base", "full", batch=1, length=16, width=192, heads=3, vocabulary=64))
    assert floor(work) == pytest.approx(1 + 12 / 18, abs=0.01)
    assert floor(work, teacher_speed=3.2) == pytest.approx(1 + 12 / 18 / 3.2, abs=0.01)
    assert floor(work, stored=True) == pytest.approx(1.0)


def test_work_of_a_vocabulary():
    workload = build_workload("W1", "tiny")
    work = count_work(workload)
    assert work["student_head"] == pytest.approx(2 * 24 * 32 * 64 / 1e9) and work["student"] > work["student_head"]
    assert work["labelled"] == pytest.approx((workload.batch()["labels"] != -100).float().mean().item())
