"""Memory of the process, on systems that tell more and less about it."""

from pathlib import Path

import psutil
import pytest
import torch

from hfdistill.process_memory import MEGABYTE, forget_peak, peak, resident


@pytest.mark.parametrize("status", ["VmRSS:\t  1234 kB\n", None])
def test_where_the_system_does_not_tell_the_peak_it_is_that_of_now(status, monkeypatch):
    monkeypatch.setattr(Path, "is_file", lambda self: status is not None)
    monkeypatch.setattr(Path, "read_text", lambda self: status)
    now = psutil.Process().memory_info().rss
    assert abs(resident("VmHWM") - now) < 50 * MEGABYTE
    if status:
        assert resident() == 1234 * 1024


def test_the_peak_is_forgotten_and_counted_anew():
    device = torch.device("cpu")
    before = forget_peak(device)
    held = torch.ones(20_000_000)  # 80 MB
    assert peak(device) - before > 60 * MEGABYTE
    del held
    if Path("/proc/self/clear_refs").exists():
        assert forget_peak(device) < peak(device) + MEGABYTE
