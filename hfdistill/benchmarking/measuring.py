"""Measurements inside one process: interleaved steps, whether losses are the same, peak memory, growth, and where the time goes."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..process_memory import MEGABYTE, forget_peak, peak
from .candidates import ALONE, BareSteps, Candidate, Setting, Steps
from .workloads import Workload, build_workload


WARM_UP = 1  # after the first passes of the check
SAME_LOSS, SAME_GRADIENT = 1e-4, 1e-3
"""Relative differences up to which a loss, or the gradient of the student, counts as the same in fp32."""


def timed(take: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Wall and CPU seconds of a call. On CUDA the wall seconds lie between two events on the device."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        cpu = time.process_time()
        begin.record()
        take()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1000, time.process_time() - cpu
    wall, cpu = time.perf_counter(), time.process_time()
    take()
    return time.perf_counter() - wall, time.process_time() - cpu


def interleave(steps: Mapping[str, Steps], rounds: int, device: torch.device) -> dict[str, dict[str, list[float]]]:
    """Wall and CPU seconds of `rounds` steps of each, taken in turns, every other round in reverse order, after a warm-up."""
    for own in steps.values():
        for _ in range(WARM_UP):
            own.take()
        own.rest()
    times: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in steps}
    for number in range(rounds):
        for name in list(steps)[:: -1 if number % 2 else 1]:
            wall, cpu = timed(steps[name].take, device)
            steps[name].rest()
            times[name]["wall"].append(wall)
            times[name]["cpu"].append(cpu)
        print(f"  round {number + 1}: {sum(own['wall'][-1] for own in times.values()):.1f} s", flush=True)
    return times


def ratio(times: Mapping[str, Mapping[str, list[float]]], name: str, reference: str, clock: str = "wall") -> float:
    """Median over rounds of the time of `name` divided by that of `reference` in the same round."""
    return statistics.median(a / b for a, b in zip(times[name][clock], times[reference][clock], strict=True))


def gradients(steps: Steps) -> Tensor:
    """All gradients of the student in one vector, in fp32 on the CPU; a parameter without one counts as 0."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in steps.student.parameters()]
    return torch.cat([part.detach().float().cpu().flatten() for part in parts])


class LossCheck:
    """Holds the first loss and gradient of a candidate against the formula of its objective in plain PyTorch.

    Where an objective has no formula, the first candidate that has it is the reference.
    """

    def __init__(self, workload: Workload, setting: Setting):
        self.workload, self.setting = workload, setting
        self._references: dict[str, tuple[float, Tensor]] = {}

    def __call__(self, steps: Steps, objective: str) -> dict[str, float]:
        """Takes the first forward and backward pass of `steps`; the weights stay as they are."""
        loss = steps.backward().item()
        own = gradients(steps)
        steps.clear()
        if objective not in self._references:
            self._references[objective] = self._formula(objective) or (loss, own)
        expected, vector = self._references[objective]
        return {
            "loss": loss,
            "reference_loss": expected,
            "loss_difference": abs(loss - expected) / max(abs(expected), 1e-12),
            "gradient_difference": ((own - vector).norm() / vector.norm().clamp(min=1e-12)).item(),
        }

    def _formula(self, objective: str) -> tuple[float, Tensor] | None:
        if objective != ALONE and self.workload.objectives[objective].formula is None:
            return None
        bare = BareSteps(self.workload, self.setting, objective)
        return bare.backward().item(), gradients(bare)


def measure_times(workload: Workload, candidates: Mapping[str, Candidate], setting: Setting, rounds: int) -> dict[str, Any]:
    """Times and checks of the candidates of a workload; what cannot be built or fails its first step is in `failed`, with why."""
    check = LossCheck(workload, setting)
    steps: dict[str, Steps] = {}
    checks: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    for name, candidate in candidates.items():
        try:
            own = candidate.build(workload, setting, candidate.objective)
            start = time.perf_counter()
            checks[name] = check(own, candidate.objective)
            print(f"  {candidate.title}: first passes {time.perf_counter() - start:.1f} s", flush=True)
            own.rest()
            steps[name] = own
        except Exception as error:  # one of many: an hour of measurements must not be lost with it
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    del check  # with the gradients it compares with
    gc.collect()
    return {"times": interleave(steps, rounds, setting.device), "checks": checks, "failed": failed}


def measure_memory(workload: Workload, candidate: Candidate, setting: Setting, steps: int = 2) -> float:
    """Megabytes (10^6 bytes) by which memory was at most above its start, the models and data there, while steps were taken.

    Gradients and the state of the optimizer are among them. One candidate a process: what was freed before would be used again unseen.
    """
    warm = BareSteps(build_workload(workload.name, "tiny"), setting, "distil")
    warm.take()  # libraries load their parts at first use
    del warm
    own = candidate.build(workload, setting, candidate.objective)
    gc.collect()
    start = forget_peak(setting.device)
    for _ in range(steps):
        own.take()
    return max(peak(setting.device) - start, 0) / MEGABYTE


def measure_growth(
    name: str, size: str, changes: tuple[dict[str, int], dict[str, int]], candidates: Mapping[str, Candidate], setting: Setting, rounds: int
) -> dict[str, Any]:
    """How many times longer a step takes when a workload grows from the first of `changes` to the second, by candidate."""
    steps = {}
    for number, change in enumerate(changes):
        workload = build_workload(name, size, **change)
        for key, candidate in candidates.items():
            steps[f"{key}/{number}"] = candidate.build(workload, setting, candidate.objective)
    times = interleave(steps, rounds, setting.device)
    return {
        "changes": list(changes),
        "factors": {key: ratio(times, f"{key}/1", f"{key}/0") for key in candidates},
        "ratios": {key: [ratio(times, f"{key}/{number}", f"{next(iter(candidates))}/{number}") for number in (0, 1)] for key in candidates},
    }


def profile_steps(workload: Workload, candidate: Candidate, setting: Setting, steps: int = 3, top: int = 15) -> str:
    """Table of the operations that take most time in `steps` steps, from torch.profiler."""
    own = candidate.build(workload, setting, candidate.objective)
    for _ in range(WARM_UP):
        own.take()
    activities = [torch.profiler.ProfilerActivity.CPU]
    cuda = setting.device.type == "cuda"
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            own.take()
    return profile.key_averages().table(sort_by="self_cuda_time_total" if cuda else "self_cpu_time_total", row_limit=top)
