"""The allocator's two options are set and undone, and nothing is done where there is no glibc."""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from hfdistill import memory_pages
from hfdistill.memory_pages import keep_memory_pages


class Library:
    def __init__(self):
        self.calls = []

    def mallopt(self, option, value):
        self.calls.append((option, value))
        return 1

    def malloc_trim(self, pad):
        self.calls.append(("trim", pad))
        return 1


def test_options_are_set_and_undone_also_after_an_error(monkeypatch):
    library = Library()
    monkeypatch.setattr(memory_pages, "_glibc", lambda: library)
    with pytest.raises(ZeroDivisionError), keep_memory_pages() as works:
        assert works and library.calls == [(-4, 0), (-1, -1)]  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
        raise ZeroDivisionError
    assert library.calls[2:] == [(-4, 65536), (-1, 128 * 1024), ("trim", 0)]


def test_without_glibc_nothing_is_done_and_that_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory_pages, "_said", False)
    with caplog.at_level(logging.WARNING, logger="hfdistill"):
        for _ in range(2):
            with keep_memory_pages() as works:
                assert not works
    assert len(caplog.records) == 1 and "no effect" in caplog.text


FAULTS = """
import resource, torch
from hfdistill.memory_pages import keep_memory_pages

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (18, 17, 16, 15):
        torch.ones(size * 1_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
with keep_memory_pages():
    torch.ones(20_000_000)  # leaves a hole that is large enough
    print(faults())
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again_until_the_end():
    """60 to 72 MB are 17,000 pages of 4 KiB, each a page fault, or some 30 huge ones; kept pages cause none."""
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    kept, afterwards = map(int, run.stdout.split())
    assert kept < 50 < afterwards
