"""What a loss costs in training: time of an optimizer step, and memory above what was there before."""

from __future__ import annotations

import gc
import itertools
import re
import statistics
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from .benchmark import MEGABYTE
from .trainer import DistillationTrainer


_WARM_UP = 2


def step_costs(trainers: Mapping[str, DistillationTrainer], rounds: int = 15) -> dict[str, float]:
    """Time of an optimizer step (forward passes of student and teacher, losses, backward, update) of several trainers as a ratio.

    The trainers take steps in turns, every other round in reverse order, so that whatever else slows the machine down hits all of
    them. Each stays on the first batches of its own training data, which are prepared beforehand: give all the same data and
    batch size. Terms with a schedule count as they are half-way through training. The students are changed by the steps.

    Args:
        trainers (`dict`): name -> trainer that has not begun training; the first is the one the others are compared with.
        rounds (`int`, defaults to 15): steps of each trainer that count.

    Returns:
        `dict`: name -> median over rounds of its time divided by the first trainer's *in the same round* (1.0 for the first).

    Raises:
        ValueError: for no trainers, or `rounds` below 1.
    """
    if not trainers or rounds < 1:
        raise ValueError(f"Measuring needs at least one trainer and one round, got {len(trainers)} trainers and rounds={rounds}.")
    return ratios(step_times(trainers, rounds))


def step_times(trainers: Mapping[str, DistillationTrainer], rounds: int = 15) -> dict[str, list[float]]:
    """Seconds of every step behind [`step_costs`], by trainer and round."""
    steps = {name: OptimizerSteps(trainer) for name, trainer in trainers.items()}
    for own in steps.values():
        for _ in range(_WARM_UP):
            own.take()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name in list(steps)[:: -1 if number % 2 else 1]:
            times[name].append(steps[name].take())
    return times


def ratios(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Median over rounds of each time divided by the first one's in the same round."""
    first = next(iter(times.values()))
    return {name: statistics.median(b / a for a, b in zip(first, own, strict=True)) for name, own in times.items()}


def peak_memory(trainer: DistillationTrainer, steps: int = 3) -> float:
    """Megabytes (10^6 bytes) by which memory was at most above its start while `trainer` took `steps` optimizer steps.

    On CPU it is the resident memory of the process, so nothing large should have been freed in it before: it would be used again
    without being seen. On a GPU it is what PyTorch has allocated.
    """
    device = trainer.args.device
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
    else:
        with suppress(OSError):  # Linux: the peak so far is forgotten
            Path("/proc/self/clear_refs").write_text("5")
        start = _resident()
    own = OptimizerSteps(trainer)
    for _ in range(steps):
        own.take()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")
    return max(peak - start, 0) / MEGABYTE


def _resident(what: str = "VmRSS") -> int:
    """Bytes of this process in memory now (`VmRSS`), or at most so far (`VmHWM`)."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss: a process that was started by a large one inherits that one's.
        return int(re.search(rf"{what}:\s+(\d+) kB", status.read_text())[1]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class OptimizerSteps:
    """Optimizer steps of one trainer outside of its training loop, always on the same batches."""

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer
        args = trainer.args
        self.batches = list(itertools.islice(iter(trainer.get_train_dataloader()), args.gradient_accumulation_steps))
        trainer.create_optimizer()
        self.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.state.max_steps, trainer.state.global_step = 2, 1

    def take(self) -> float:
        """One step; returns its seconds."""
        trainer = self.trainer
        self._wait()
        start = time.perf_counter()
        batches, items = trainer.get_batch_samples(iter([dict(batch) for batch in self.batches]), len(self.batches), trainer.args.device)
        trainer.current_gradient_accumulation_steps = len(batches)
        for inputs in batches:
            trainer.training_step(self.model, inputs, items)
        if trainer.args.max_grad_norm > 0:
            trainer._clip_grad_norm(self.model)
        trainer.optimizer.step()
        self.model.zero_grad()
        trainer.objective.zero_grad()
        self._wait()
        seconds = time.perf_counter() - start
        trainer.rest()
        return seconds

    def _wait(self) -> None:
        if self.trainer.args.device.type != "cpu":
            torch.accelerator.synchronize(self.trainer.args.device)
