"""What a loss costs in training: time of an optimizer step, and memory above what was there before."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import Trainer

from .process_memory import MEGABYTE, forget_peak, peak
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
    start = forget_peak(device)
    own = OptimizerSteps(trainer)
    for _ in range(steps):
        own.take()
    return max(peak(device) - start, 0) / MEGABYTE


class OptimizerSteps:
    """Optimizer steps of one trainer, which may be a plain `Trainer`, outside of its training loop, always on the same batches."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        args = trainer.args
        if isinstance(trainer, DistillationTrainer):
            trainer._take_stored_teacher()  # as `train` does first
        self.batches = list(itertools.islice(iter(trainer.get_train_dataloader()), args.gradient_accumulation_steps))
        trainer.create_optimizer()
        self.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.state.max_steps, trainer.state.global_step = 2, 1

    def take(self) -> float:
        """One step; returns its seconds."""
        self._wait()
        start = time.perf_counter()
        self.backward()
        self.update()
        self._wait()
        seconds = time.perf_counter() - start
        self.rest()
        return seconds

    def backward(self) -> Tensor:
        """Forward and backward passes of all batches; returns the loss."""
        trainer = self.trainer
        batches, items = trainer.get_batch_samples(iter([dict(batch) for batch in self.batches]), len(self.batches), trainer.args.device)
        trainer.current_gradient_accumulation_steps = len(batches)
        return sum(trainer.training_step(self.model, inputs, items) for inputs in batches)

    def update(self) -> None:
        """Clips, moves the weights, and clears the gradients."""
        if self.trainer.args.max_grad_norm > 0:
            self.trainer._clip_grad_norm(self.model)
        self.trainer.optimizer.step()
        self.clear()

    def clear(self) -> None:
        """Forgets the gradients."""
        self.model.zero_grad()
        if isinstance(self.trainer, DistillationTrainer):
            self.trainer.objective.zero_grad()

    def rest(self) -> None:
        """Between its steps the trainer costs others nothing."""
        if isinstance(self.trainer, DistillationTrainer):
            self.trainer.rest()

    def _wait(self) -> None:
        if self.trainer.args.device.type != "cpu":
            torch.accelerator.synchronize(self.trainer.args.device)
