"""The machine that figures belong to, what it can do, and what a step costs at least."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .workloads import Workload


_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")
_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, its instruction sets that matter, cores, threads, memory, GPU, and the speed of matrix products."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.is_file() else ""
    model = re.search(r"model name\s*:\s*(.+)", text)
    flags = set((re.search(r"flags\s*:\s*(.+)", text) or ["", ""])[1].split())
    machine = {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }
    for dtype in (torch.float32, torch.bfloat16):
        machine[f"{str(dtype).removeprefix('torch.')}_gflops"] = float(f"{matmul_speed(device, dtype):.3g}")
    return machine


def has_fast_bf16(machine: Mapping[str, Any]) -> bool:
    """Whether products of bf16 matrices have instructions of their own."""
    return bool(machine["gpu"] or _BF16_FLAGS & set(machine["flags"]))


def matmul_speed(device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.3) -> float:
    """10^9 floating point operations a second in products of square matrices."""
    a = torch.randn(size, size, device=device, dtype=dtype)

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    a @ a
    wait()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        a @ a
        wait()
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - start) / 1e9


def count_work(workload: Workload) -> dict[str, float]:
    """Operations of forward passes on the batch, in 10^9: both models, their vocabulary heads, and the share of rows with a label."""
    batch = {name: value for name, value in workload.batch().items() if name != "labels"}
    work = {}
    for role, model in (("student", workload.student), ("teacher", workload.teacher)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**batch)
        work[role] = counter.get_total_flops() / 1e9
        width = getattr(model.config, "hidden_size", 0)
        work[f"{role}_head"] = 2 * batch["input_ids"].numel() * width * workload.vocabulary / 1e9 if workload.vocabulary else 0.0
    labels = workload.batch()["labels"]
    work["labelled"] = (labels != -100).float().mean().item()
    return work


def floor(work: Mapping[str, float], masked: bool = False, stored: bool = False, teacher_speed: float = 1.0) -> float:
    """Arithmetic of a distillation step divided by that of a plain step of the same student, which projects every position.

    A training step costs three forward passes. A stored teacher still has its vocabulary head, from its stored last hidden state.

    Args:
        work: from [`count_work`].
        masked: heads at labelled rows only.
        stored: the teacher is not run.
        teacher_speed: how many times faster the teacher computes than the student, in bf16.
    """
    rows = work["labelled"] if masked else 1.0
    student = work["student"] - (1 - rows) * work["student_head"]
    teacher = rows * work["teacher_head"] + (0.0 if stored else work["teacher"] - work["teacher_head"])
    return (3 * student + teacher / teacher_speed) / (3 * work["student"])
