"""Keeps the memory that a training step has freed for the next step, on CPU with glibc.

Tensors of more than a few megabytes are asked from the system and given back to it one by one, and the system hands out each of their
pages (4 KiB) again, cleared, when it is first written to. Where tensors of hundreds of megabytes are made anew in every step, as the
logits of a vocabulary are, that can take longer than the arithmetic.
"""

from __future__ import annotations

import ctypes
import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager


logger = logging.getLogger(__name__)

# Names and numbers of malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
_NEVER = -1  # as a size: more than there is
_DEFAULTS = {M_MMAP_MAX: 65536, M_TRIM_THRESHOLD: 128 * 1024}
_said = False


@contextmanager
def keep_memory_pages() -> Iterator[bool]:
    """While this is open, `free` gives no pages back to the system; afterwards the defaults hold again and free pages are given back.

    Two calls of [mallopt](https://man7.org/linux/man-pages/man3/mallopt.3.html): no block is mapped on its own (`M_MMAP_MAX` 0), and
    the top of the heap is never cut off (`M_TRIM_THRESHOLD` -1). It costs memory, since holes of the wrong size are kept too. One thing
    is not undone: after such a call glibc no longer raises its thresholds by itself, for the rest of the process.

    Returns:
        Whether it has an effect: with glibc alone. Elsewhere (musl, macOS, Windows) nothing is done, and that is said once.
    """
    library = _glibc()
    if library is None:
        _say_once()
        yield False
        return
    try:
        yield bool(library.mallopt(M_MMAP_MAX, 0) and library.mallopt(M_TRIM_THRESHOLD, _NEVER))
    finally:
        for option, value in _DEFAULTS.items():
            library.mallopt(option, value)
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library of this process where it is glibc."""
    if platform.libc_ver()[0] != "glibc":
        return None
    library = ctypes.CDLL(None)
    library.malloc_trim.argtypes = [ctypes.c_size_t]
    return library


def _say_once() -> None:
    global _said
    if not _said:
        _said = True
        logger.warning("keep_memory_pages has no effect here: it needs the memory allocator of glibc (Linux).")
