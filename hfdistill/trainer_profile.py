"""The profile of a run: where each step's time goes, in every log line, and a trace of a few steps for who wants to see more."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile
from transformers import Trainer, TrainerCallback

from .counting import Unit, count_units
from .step_clock import StepClock


logger = logging.getLogger(__name__)

WAIT, WARM_UP, ACTIVE = 2, 1, 3
"""Steps of `args.profile`: untouched, traced but thrown away, and written."""
TRACE, TABLE = "trace.json", "operations.txt"
_ROWS = 40
_SEQUENCES, _TOKENS = Unit("sequences"), Unit("tokens")


class TrainerProfile(Trainer):
    """A Trainer with a [`StepClock`], whose sections `student`, `teacher` and `loss` the computation of the loss has to enter.

    With `args.log_step_profile` every log line of the training loss has the means of its steps, see [`StepClock.collect`]: times and
    memory of the main process, throughput of all processes together. Evaluation is not timed.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.clock = StepClock(self.args.device, self.args.log_step_profile or self.args.profile)
        self.add_callback(_ProfileCallback(self.clock))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self.clock.begin_step()
        with self.clock.section("data"):
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.clock.running:
            for batch in batches:
                counts = count_units(batch, (_SEQUENCES, _TOKENS), "", None)
                self.clock.count(counts[_SEQUENCES], counts[_TOKENS])
        return batches, num_items

    def _prepare_inputs(self, inputs):
        with self.clock.section("data"):
            return super()._prepare_inputs(inputs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        with self.clock.section("backward"):  # student, teacher and loss stop it while they run
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.clock.begin_section("optimizer")
        return loss

    def log(self, logs, start_time=None):
        if "loss" in logs and self.args.log_step_profile:
            logs.update({name: float(f"{value:.5g}") for name, value in self.clock.collect(self._reduce).items()})
        super().log(logs, start_time)


class _ProfileCallback(TrainerCallback):
    """Ends the steps of the clock, and traces some of them with `args.profile`."""

    def __init__(self, clock: StepClock):
        self.clock = clock
        self._tracer: profile | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.clock.reset()
        remaining = state.max_steps - state.global_step
        if args.profile and state.is_world_process_zero and remaining > 0:
            self._tracer = _tracer(os.path.join(args.output_dir, "profile"), args.device, remaining)
            self._tracer.start()
            self.clock.named_ranges = True

    def on_step_end(self, args, state, control, **kwargs):
        self.clock.end_step()
        if self._tracer is not None:
            self._tracer.step()

    def on_train_end(self, args, state, control, **kwargs):
        self.clock.end_step()
        self.clock.named_ranges = False
        if self._tracer is not None:
            self._tracer.stop()  # writes what there is, where training ended before the schedule
            self._tracer = None


def _tracer(folder: str, device: torch.device, steps: int) -> profile:
    """A profiler that writes the trace and the table of its active steps, of which there are some in any run."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]

    def write(tracer: profile) -> None:
        os.makedirs(folder, exist_ok=True)
        tracer.export_chrome_trace(os.path.join(folder, TRACE))
        order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        table = tracer.key_averages().table(sort_by=order, row_limit=_ROWS, max_name_column_width=70)
        with open(os.path.join(folder, TABLE), "w", encoding="utf-8") as file:
            file.write(table + "\n")
        logger.info("Profile of a few steps: %s (open it in a trace viewer) and %s", os.path.join(folder, TRACE), TABLE)

    return profile(activities=activities, schedule=step_actions(steps), on_trace_ready=write)


def step_actions(steps: int) -> Callable[[int], ProfilerAction]:
    """What the profiler does in each step of a run of `steps`; a short one has less warm-up, and all of its last steps are written."""
    before = min(WAIT + WARM_UP, max(steps - ACTIVE, 0))
    last = min(before + ACTIVE, steps) - 1

    def action(step: int) -> ProfilerAction:
        if step > last or step < before - WARM_UP:
            return ProfilerAction.NONE
        if step < before:
            return ProfilerAction.WARMUP
        return ProfilerAction.RECORD_AND_SAVE if step == last else ProfilerAction.RECORD

    return action
