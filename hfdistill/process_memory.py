"""How much memory this process, or PyTorch on its accelerator, holds and has held at most."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import psutil
import torch


MEGABYTE = 10**6


def resident(what: str = "VmRSS") -> int:
    """Bytes of this process in memory now (`VmRSS`), or at most so far (`VmHWM`; where the system does not tell, those of now)."""
    status = Path("/proc/self/status")
    found = re.search(rf"{what}:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    # Not ru_maxrss where there is another way: a process that was started by a large one inherits that one's.
    return int(found[1]) * 1024 if found else psutil.Process().memory_info().rss


def forget_peak(device: torch.device) -> int:
    """From now on [`peak`] counts anew where the system allows it (CUDA, Linux); returns the bytes that are held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return resident()


def peak(device: torch.device) -> int:
    """The most bytes so far: what PyTorch has allocated on a GPU, else the resident memory of the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")
