from __future__ import annotations

import dataclasses
import json
import math

import pytest

from hfdistill.schedules import Schedule, resolve_schedule


# Points written down from the definitions, not computed by the code's formulas.
POINTS = [
    (Schedule("constant", 0.5), {0.0: 0.5, 0.3: 0.5, 1.0: 0.5}),
    (Schedule("linear", 1.0, 0.0), {0.0: 1.0, 0.25: 0.75, 0.5: 0.5, 1.0: 0.0}),
    (Schedule("linear", 2.0, 6.0, over=(0.25, 0.75)), {0.0: 2.0, 0.25: 2.0, 0.375: 3.0, 0.5: 4.0, 0.75: 6.0, 0.9: 6.0}),
    (Schedule("cosine", 1.0, 0.0), {0.0: 1.0, 1 / 3: 0.75, 0.5: 0.5, 2 / 3: 0.25, 1.0: 0.0}),
    (Schedule("cosine", 0.0, 4.0, over=(0.5, 1.0)), {0.2: 0.0, 0.5: 0.0, 0.5 + 1 / 6: 1.0, 0.75: 2.0, 1.0: 4.0}),
    (Schedule("step", 1.0, 8.0, over=(0.0, 0.6)), {0.0: 1.0, 0.3: 1.0, 0.5999: 1.0, 0.6: 8.0, 1.0: 8.0}),
]


@pytest.mark.parametrize(("schedule", "points"), POINTS, ids=lambda value: getattr(value, "type", ""))
def test_values(schedule, points):
    for progress, value in points.items():
        assert math.isclose(schedule(progress), value, abs_tol=1e-12), progress


@pytest.mark.parametrize("schedule", [schedule for schedule, _ in POINTS], ids=lambda schedule: schedule.type)
def test_bounds_hold_over_the_whole_run_and_are_reached(schedule):
    values = [schedule(i / 1000) for i in range(1001)]
    assert (min(values), max(values)) == (schedule.minimum, schedule.maximum)


@pytest.mark.parametrize("kind", ["linear", "cosine", "step"])
def test_both_ends_are_exact_in_spite_of_rounding(kind):
    start, end = 0.7, 0.1
    assert start + (end - start) != end  # the case in which the textbook interpolation misses
    schedule = Schedule(kind, start, end, over=(0.2, 0.9))
    assert (schedule(0.0), schedule(0.2), schedule(0.9), schedule(1.0)) == (start, start, end, end)


def test_a_number_is_constant_and_a_schedule_passes():
    assert resolve_schedule(3)(0.7) == 3.0
    schedule = Schedule("step", 1.0, 2.0)
    assert resolve_schedule(schedule) is schedule


def test_missing_ends_are_the_users_own_number():
    assert resolve_schedule({"end": 0.0}, default=0.7) == Schedule("linear", 0.7, 0.0)
    assert resolve_schedule({"type": "cosine", "start": 0.0}, default=0.7) == Schedule("cosine", 0.0, 0.7)
    assert resolve_schedule({"type": "constant"}, default=0.7) == Schedule("constant", 0.7)
    assert resolve_schedule({"type": "constant", "start": 0.2}, default=0.7) == Schedule("constant", 0.2)


def test_dict_survives_json():
    schedule = Schedule("cosine", 1, 0, over=(0.1, 0.9))
    assert resolve_schedule(json.loads(json.dumps(schedule.as_dict()))) == schedule


def test_a_schedule_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Schedule("constant", 1.0).start = 2.0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"type": "liner", "start": 1, "end": 0}, r"unknown schedule type 'liner'\. Did you mean 'linear'\?"),
        ({"type": "linear", "strat": 1, "end": 0}, r"unknown key 'strat' in a schedule\. Did you mean 'start'\?"),
        ({"type": "linear", "start": 1}, r"a linear schedule has no `end`"),
        ({"start": float("nan"), "end": 0}, r"start=nan is not a finite number"),
        ({"start": 0, "end": float("inf")}, r"end=inf is not a finite number"),
        ({"start": "1", "end": 0}, r"start='1' is not a finite number"),
        ({"start": True, "end": 0}, r"start=True is not a finite number"),
        ({"start": 1, "end": 0, "over": [0.5, 0.5]}, r"over=\[0.5, 0.5\] is not an increasing pair"),
        ({"start": 1, "end": 0, "over": [-0.1, 0.5]}, "is not an increasing pair"),
        ({"start": 1, "end": 0, "over": [0.0, 1.1]}, "is not an increasing pair"),
        ({"start": 1, "end": 0, "over": 0.5}, "is not an increasing pair"),
        ({"start": 1, "end": 0, "over": [0, 0.5, 1]}, "is not an increasing pair"),
        ({"start": 1, "end": 0, "over": [float("nan"), 1]}, "is not an increasing pair"),
        ({"type": "constant", "start": 1, "end": 0}, r"a constant schedule cannot go from start=1 to end=0"),
        (float("nan"), "value=nan is not a finite number"),
        ("0.5", "value='0.5' is not a finite number"),
        (None, "a constant schedule has no `value`"),
    ],
)
def test_bad_values_say_what_to_do(value, message):
    with pytest.raises(ValueError, match=message):
        resolve_schedule(value)


@pytest.mark.parametrize("progress", [-0.01, 1.01, float("nan")])
def test_progress_outside_the_run_is_refused(progress):
    with pytest.raises(ValueError, match=r"is outside \[0, 1\]"):
        Schedule("linear", 0.0, 1.0)(progress)
