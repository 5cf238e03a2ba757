"""Steps are taken in turns, ratios are of the same round, and another objective does not pass for the same."""

from __future__ import annotations

import pytest
import torch

from hfdistill.benchmarking import jobs, measuring
from hfdistill.benchmarking.candidates import OWN, BareSteps, Candidate, Setting, Steps
from hfdistill.benchmarking.measuring import LossCheck, interleave, measure_growth, measure_memory, measure_times, profile_steps, ratio
from hfdistill.benchmarking.tables import same_loss
from hfdistill.benchmarking.workloads import build_workload


class Noted(Steps):
    def __init__(self, name, log):
        self.name, self.log = name, log

    def take(self):
        self.log.append(self.name)

    def rest(self):
        self.log.append(f"{self.name} rests")


def test_steps_are_taken_in_turns():
    log = []
    times = interleave({name: Noted(name, log) for name in "ab"}, 2, torch.device("cpu"))
    warm_up = ["a", "a rests", "b", "b rests"]
    assert log == [*warm_up, "a", "a rests", "b", "b rests", "b", "b rests", "a", "a rests"]
    assert all(len(own["wall"]) == len(own["cpu"]) == 2 for own in times.values())


def test_ratios_compare_the_same_round():
    times = {"a": {"wall": [1.0, 2.0, 8.0]}, "b": {"wall": [3.0, 4.0, 8.0]}}
    assert ratio(times, "b", "a") == 2.0  # of 3, 2 and 1; the medians themselves would give 4 / 2
    times["b"]["wall"] = [1.5, 6.0, 8.0]
    assert ratio(times, "b", "a") == 1.5  # of 1.5, 3 and 1; the medians themselves would give 6 / 2


class Other(BareSteps):
    """Another objective: the loss times `factor`, plus `constant`."""

    factor, constant = 1.0, 0.0

    def loss(self):
        return self.factor * super().loss() + self.constant


@pytest.mark.parametrize(
    ("factor", "constant", "words"),
    [(1.0, 0.0, "yes"), (1.0, 0.5, "gradient yes, value no"), (1.01, 0.0, "gradient off by 1.0e-02")],
)
def test_another_objective_does_not_pass_for_the_same(factor, constant, words):
    workload = build_workload("W3", "tiny")
    steps = Other(workload, Setting(), "distil")
    steps.factor, steps.constant = factor, constant
    check = LossCheck(workload, Setting())(steps, "distil")
    assert same_loss(check) == words
    assert all(p.grad is None for p in steps.student.parameters()), "the check leaves no gradient behind"


def test_what_fails_is_named_and_the_others_are_measured():
    def broken(workload, setting, objective):
        raise RuntimeError("no such thing\nand more")

    chosen = {"bare": OWN["bare"], "fast": Candidate("broken", "distil", broken, ("W3",))}
    measured = measure_times(build_workload("W3", "tiny"), chosen, Setting(), rounds=1)
    assert measured["failed"] == {"fast": "RuntimeError: no such thing"} and list(measured["times"]) == ["bare"]


def test_memory_is_what_the_steps_take(monkeypatch):
    class Hungry(BareSteps):
        def take(self):
            held = torch.ones(30_000_000 // 4)  # written to, so it is there
            assert held.sum() > 0

    hungry = Candidate("hungry", "distil", Hungry, ("W3",))
    assert 25 < measure_memory(build_workload("W3", "tiny"), hungry, Setting()) < 60


def test_growth_is_a_factor_for_each_candidate(monkeypatch):
    seconds = {"bare/0": 1.0, "bare/1": 3.0, "fast/0": 0.5, "fast/1": 1.0}
    monkeypatch.setattr(measuring, "interleave", lambda steps, rounds, device: {name: {"wall": [seconds[name]] * 2} for name in steps})
    chosen = {name: OWN[name] for name in ("bare", "fast")}
    found = measure_growth("W5", "tiny", ({}, {"vocabulary": 128}), chosen, Setting(), rounds=2)
    assert found["factors"] == {"bare": 3.0, "fast": 2.0}
    assert found["ratios"] == {"bare": [1.0, 1.0], "fast": [0.5, pytest.approx(1 / 3)]}


def test_a_profile_lists_operations():
    text = profile_steps(build_workload("W3", "tiny"), OWN["bare"], Setting(), steps=1, top=5)
    assert "aten::" in text and "Self CPU %" in text


def test_a_stored_table_is_written_and_read(tmp_path):
    job = {"threads": torch.get_num_threads(), "device": "cpu", "bf16": False}
    job |= {"folder": str(tmp_path / "table"), "examples": 64, "batches": 2}
    jobs.run_job({"kind": "write_table", **job})
    found = jobs.run_job({"kind": "read_table", **job})
    assert found["table_mb"] > 64 * 4096 * 2 / 1e6 and found["resident_mb"] > 0 and found["examples"] == 64


def test_pages_are_kept_for_the_job_alone(monkeypatch):
    seen = []

    class Kept:
        def __enter__(self):
            seen.append("open")

        def __exit__(self, *error):
            seen.append("closed")

    monkeypatch.setattr(jobs, "keep_memory_pages", Kept)
    monkeypatch.setitem(jobs.KINDS, "nothing", lambda job, setting: seen.append(job["allocator"]))
    for allocator in ("default", "kept"):
        jobs.run_job({"kind": "nothing", "threads": torch.get_num_threads(), "device": "cpu", "bf16": False, "allocator": allocator})
    assert seen == ["default", "open", "kept", "closed"]
