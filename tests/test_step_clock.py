"""The clock of a step, with a time of our own: what is booked where, and that nothing is read before a log line."""

from __future__ import annotations

import pytest
import torch

from hfdistill import step_clock
from hfdistill.step_clock import PROFILE_NAMES, SECTIONS, StepClock


class Time:
    """Seconds that pass only when a test says so; also what the events of a device would have recorded."""

    def __init__(self, monkeypatch):
        self.now, self.done, self.waits = 0.0, False, 0
        monkeypatch.setattr(step_clock.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(step_clock, "peak", lambda device: 7_000_000)
        monkeypatch.setattr(step_clock, "forget_peak", lambda device: 0)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))

    def take(self, seconds: float) -> None:
        self.now += seconds


class Event:
    def __init__(self, time: Time):
        self.time = time

    def record(self, stream):
        self.at = self.time.now

    def query(self):
        return self.time.done

    def synchronize(self):
        self.time.done = True
        self.time.waits += 1

    def elapsed_time(self, end):
        assert self.time.done, "read before the device was there"
        return 1000 * (end.at - self.at)


@pytest.fixture
def clock_time(monkeypatch):
    return Time(monkeypatch)


def one_step(clock: StepClock, time: Time, factor: float = 1.0) -> None:
    clock.begin_step()
    with clock.section("data"):
        time.take(1 * factor)
    time.take(0.25 * factor)  # in no section
    clock.count(torch.tensor(4), torch.tensor(10))
    with clock.section("backward"):
        with clock.section("student"):
            time.take(2 * factor)
        with clock.section("teacher"):
            time.take(3 * factor)
        with clock.section("loss"):
            time.take(0.5 * factor)
        time.take(4 * factor)
    clock.begin_section("optimizer")
    time.take(0.75 * factor)
    clock.end_step()


ONE = {"data": 1000, "student": 2000, "teacher": 3000, "loss": 500, "backward": 4000, "optimizer": 750, "step": 11500}


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_times_are_means_over_steps_and_inner_sections_stop_the_outer_one(device, clock_time):
    clock = StepClock(torch.device(device))
    one_step(clock, clock_time, 1.0)
    clock_time.take(100)  # evaluation, say
    one_step(clock, clock_time, 3.0)
    values = clock.collect()
    assert values == pytest.approx(
        {f"time_{name}_ms": 2 * value for name, value in ONE.items()}
        | {"samples_per_second": 8 / 46, "tokens_per_second": 20 / 46, "peak_memory_mb": 7.0}
    )
    assert tuple(values) == PROFILE_NAMES
    assert clock.collect() == {}
    clock_time.done = False
    one_step(clock, clock_time, 1.0)
    assert clock.collect()["time_step_ms"] == pytest.approx(11500)


def test_a_device_is_waited_for_once_a_line_and_finished_work_is_read_without(clock_time):
    clock = StepClock(torch.device("cuda"))
    for _ in range(5):
        one_step(clock, clock_time)
    assert clock_time.waits == 0 and len(clock._marks) == 5 * 13  # one for each piece of a section
    clock_time.done = True
    clock.begin_step()
    assert clock_time.waits == 0 and not clock._marks  # a run that never logs keeps no more than a step or two
    clock.end_step()
    clock_time.done = False
    one_step(clock, clock_time)
    assert clock.collect()["time_student_ms"] == pytest.approx(6 * 2000 / 7) and clock_time.waits == 1


def test_counts_stay_on_the_device_until_a_line(clock_time):
    clock = StepClock(torch.device("cpu"))
    for _ in range(2):
        clock.begin_step()
        clock.count(*torch.ones(2, dtype=torch.int64, device="meta"))  # which has no value that could be read
        clock.end_step()
    assert clock._samples.device.type == clock._tokens.device.type == "meta"


def test_nothing_counts_outside_of_a_step(clock_time):
    clock = StepClock(torch.device("cpu"))
    with clock.section("student"):
        clock_time.take(5)
    clock.begin_section("optimizer")
    clock.count(torch.tensor(4))
    clock.end_step()
    assert not clock.running and clock.collect() == {}
    one_step(clock, clock_time)
    with clock.section("teacher"):
        clock_time.take(5)
    assert clock.collect()["time_teacher_ms"] == 3000


def test_a_step_that_was_broken_off_leaves_nothing_open(clock_time):
    clock = StepClock(torch.device("cpu"))
    clock.begin_step()
    with pytest.raises(KeyError), clock.section("student"):
        raise KeyError
    section = clock.section("loss")
    section.__enter__()
    clock.begin_step()
    section.__exit__(None, None, None)
    assert clock.running
    clock.reset()
    one_step(clock, clock_time)
    assert clock.collect()["time_step_ms"] == 11500


def test_counts_are_those_of_all_processes(clock_time):
    clock = StepClock(torch.device("cpu"))
    one_step(clock, clock_time)
    values = clock.collect(lambda tensor: 3 * tensor)
    assert values["samples_per_second"] == pytest.approx(12 / 11.5) and values["tokens_per_second"] == pytest.approx(30 / 11.5)
    assert values["time_student_ms"] == 2000


def test_images_have_no_tokens(clock_time):
    clock = StepClock(torch.device("cpu"))
    clock.begin_step()
    clock.count(torch.tensor(4))
    clock_time.take(2)
    clock.end_step()
    values = clock.collect()
    assert values["samples_per_second"] == 2 and "tokens_per_second" not in values


def test_a_clock_that_is_off_does_nothing(clock_time):
    clock = StepClock(torch.device("cpu"), enabled=False)
    one_step(clock, clock_time)
    assert clock.collect() == {} and not clock.running


def test_a_section_that_nobody_would_see_is_refused():
    with pytest.raises(ValueError, match=f"no section 'techer'.*{SECTIONS[0]}"):
        StepClock(torch.device("cpu")).section("techer")


def test_the_peak_counts_from_the_reset():
    from hfdistill.process_memory import forget_peak, peak, resident

    device = torch.device("cpu")
    before = forget_peak(device)
    large = bytearray(200_000_000)
    large[::4096] = b"x" * len(large[::4096])
    with_it = peak(device)
    del large
    assert with_it - before > 190_000_000 and peak(device) > resident() + 100_000_000
    forget_peak(device)
    assert peak(device) < with_it - 100_000_000
