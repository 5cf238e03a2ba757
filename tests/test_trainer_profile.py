"""The profile of a training run: what a log line says of its steps, and the trace of `profile=True`."""

from __future__ import annotations

import json

import families
import pytest
import torch
from torch.profiler import ProfilerAction
from torch.utils._python_dispatch import TorchDispatchMode
from training import arguments, ragged, run

from hfdistill import Term
from hfdistill.step_clock import PROFILE_NAMES, SECTIONS
from hfdistill.trainer_profile import ACTIVE, step_actions


def train(tmp_path, family="bert", **options):
    options = {"log_step_profile": True, **options}
    student, teacher = families.build(family, 1, seed=1), families.build(family, 2, seed=2)
    trainer, _ = run(student, teacher, ragged(family), arguments(tmp_path, **options))
    return trainer, [log for log in trainer.state.log_history if "loss" in log]


def test_a_log_line_says_where_the_time_of_its_steps_went(tmp_path):
    trainer, logs = train(tmp_path, max_steps=4, logging_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert len(logs) == 2
    rows, tokens = 8, int(ragged("bert").batch["attention_mask"].sum())  # of a window, which holds all rows
    for log in logs:
        assert log.keys() >= set(PROFILE_NAMES)
        times = [log[f"time_{name}_ms"] for name in SECTIONS]
        assert min(times) > 0 and 0.5 * log["time_step_ms"] < sum(times) <= log["time_step_ms"] * 1.001
        assert log["samples_per_second"] * log["time_step_ms"] / 1000 == pytest.approx(rows, rel=1e-3)
        assert log["tokens_per_second"] * log["time_step_ms"] / 1000 == pytest.approx(tokens, rel=1e-3)
        assert log["peak_memory_mb"] > 50
    assert not set(PROFILE_NAMES) & trainer.state.log_history[-1].keys()  # the summary
    json.dumps(trainer.state.log_history)


def test_evaluation_does_not_count(tmp_path):
    student, teacher = families.build("bert", 1, seed=1), families.build("bert", 2, seed=2)
    measured = {"eval_strategy": "steps", "eval_steps": 1, "eval_with_teacher": True}
    args = arguments(tmp_path, log_step_profile=True, max_steps=3, logging_steps=3, **measured)
    trainer, _ = run(student, teacher, ragged("bert"), args, eval_dataset=ragged("bert", rows=40))
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["samples_per_second"] * log["time_step_ms"] / 1000 == pytest.approx(8, rel=1e-3)
    assert not any(set(PROFILE_NAMES) & log.keys() for log in trainer.state.log_history if "eval_loss" in log)
    trainer.evaluate()
    assert not trainer.clock.running and trainer.clock.collect() == {}


def test_images_have_samples_alone(tmp_path):
    _, logs = train(tmp_path, "vit")
    assert {*PROFILE_NAMES} - logs[0].keys() == {"tokens_per_second"}


def test_it_can_be_turned_off(tmp_path):
    trainer, logs = train(tmp_path, log_step_profile=False)
    assert not {*PROFILE_NAMES} & logs[0].keys() and not trainer.clock.enabled


class Reads(TorchDispatchMode):
    """Counts how often a value is fetched from a tensor, for which a device would have to be waited for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


def test_no_value_is_fetched_in_a_step(tmp_path):
    counts = []
    for on in (False, True):
        with Reads() as reads:
            train(tmp_path / str(on), max_steps=6, logging_steps=6, log_step_profile=on)
        counts.append(reads.count)
    assert counts[1] - counts[0] <= 2  # two numbers of the one log line


def ranges(folder, name) -> int:
    events = json.loads((folder / "profile" / "trace.json").read_text())["traceEvents"]
    return sum(event.get("name") == name and event.get("cat") == "user_annotation" for event in events)


@pytest.mark.parametrize(("steps", "written"), [(1, 1), (2, 2), (7, ACTIVE)])
def test_profile_writes_a_trace_of_a_few_steps(steps, written, tmp_path):
    train(tmp_path, max_steps=steps, profile=True, log_step_profile=False)
    for name in SECTIONS:
        # Data is entered twice a step: for the batch, and when it is brought to the device.
        assert ranges(tmp_path, f"hfdistill.{name}") == (2 if name == "data" else 1) * written, name
    table = (tmp_path / "profile" / "operations.txt").read_text()
    assert "aten::addmm" in table and "Self CPU" in table


def test_what_training_left_is_written_where_it_stops_early(tmp_path):
    class Stop(families.tf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    student, teacher = families.build("bert", 1, seed=1), families.build("bert", 2, seed=2)
    run(student, teacher, ragged("bert"), arguments(tmp_path, max_steps=9, profile=True), callbacks=[Stop()])
    assert ranges(tmp_path, "hfdistill.student") == 1


@pytest.mark.parametrize("steps", range(1, 12))
def test_every_run_has_active_steps(steps):
    actions = [step_actions(steps)(step) for step in range(steps + 3)]
    active = [i for i, action in enumerate(actions) if action in (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)]
    assert len(active) == min(ACTIVE, steps) and active == list(range(active[0], active[-1] + 1)) and active[-1] < steps
    assert [i for i, action in enumerate(actions) if action is ProfilerAction.RECORD_AND_SAVE] == [active[-1]]
    assert steps <= ACTIVE or actions[active[0] - 1] is ProfilerAction.WARMUP


@pytest.mark.parametrize("name", ["time_student_ms", "peak_memory_mb"])
def test_no_term_has_the_name_of_a_profile_entry(name):
    with pytest.raises(ValueError, match="taken by the log"):
        Term("cosine", name=name)
