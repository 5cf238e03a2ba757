"""How much memory this process, or PyTorch on its accelerator, holds and has held at most."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path

import torch


MEGABYTE = 10**6


def resident(what: str = "VmRSS") -> int:
    """Bytes of this process in memory now (`VmRSS`), or at most so far (`VmHWM`)."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss: a process that was started by a large one inherits that one's.
        return int(re.search(rf"{what}:\s+(\d+) kB", status.read_text())[1]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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
