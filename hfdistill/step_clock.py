"""Where the time of an optimizer step goes: sections that are timed without ever waiting for the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from .process_memory import MEGABYTE, forget_peak, peak


SECTIONS = ("data", "student", "teacher", "loss", "backward", "optimizer")
_OTHER = "other"
PROFILE_NAMES = (*(f"time_{name}_ms" for name in (*SECTIONS, "step")), "samples_per_second", "tokens_per_second", "peak_memory_mb")
"""Keys of the profile in a log line."""
_NOTHING = nullcontext()


class StepClock:
    """Times the sections of optimizer steps; all but free, and with no host sync before [`collect`].

    A section that is entered inside another one stops the outer clock until it is left, so the times of a step add up. On CPU they
    are wall time (`time.perf_counter`). On CUDA they are what the current stream of `device` spent between two events: the work
    of a section and what it waited for, such as a batch that was not ready or a teacher on another device. On other accelerators
    they are the time of the host, which runs ahead of the device: only the whole step means something there.

    Outside of a step (before training, in evaluation) sections do nothing.

    Args:
        device (`torch.device`): of the student.
        enabled (`bool`, defaults to `True`): `False` makes every method do nothing.

    Example:
        >>> clock = StepClock(torch.device("cpu"))
        >>> clock.begin_step()
        >>> with clock.section("student"):
        ...     _ = torch.ones(8, 8) @ torch.ones(8, 8)
        >>> clock.count(samples=torch.tensor(8))
        >>> clock.end_step()
        >>> values = clock.collect()
        >>> values["time_student_ms"] > 0 and values["time_teacher_ms"] == 0 and values["samples_per_second"] > 0
        True
    """

    def __init__(self, device: torch.device, enabled: bool = True):
        self.device, self.enabled = device, enabled
        self.named_ranges = False  # whether sections show in a trace of torch.profiler
        self._clear()

    def reset(self) -> None:
        """Forgets everything; the peak memory counts from here."""
        self._clear()
        if self.enabled:
            forget_peak(self.device)

    def _clear(self) -> None:
        self._open: list[tuple[str, record_function | None]] = []
        self._seconds = dict.fromkeys((*SECTIONS, _OTHER), 0.0)
        self._steps, self._samples, self._tokens = 0, 0, None
        self._marks: deque[tuple[str, Any, Any]] = deque()  # of CUDA: (section, begin, end), not read yet
        self._since = None

    # ---- In a step ----

    @property
    def running(self) -> bool:
        """Whether a step has begun and not ended."""
        return bool(self._open)

    def begin_step(self) -> None:
        """Time begins to count; a step that was broken off is closed."""
        if self.enabled:
            self._leave_all()
            while self._marks and self._marks[0][2].query():  # done already: this does not wait
                self._read()
            self._enter(_OTHER)

    def end_step(self) -> None:
        """Time stops to count; whatever is open is closed."""
        if self._open:
            self._leave_all()
            self._steps += 1

    def section(self, name: str):
        """A context manager that books the time inside on `name`, one of `SECTIONS`.

        Raises:
            ValueError: for another name.
        """
        if name not in SECTIONS:
            raise ValueError(f"A step has no section {name!r}, so its time would not be logged. Known: {', '.join(SECTIONS)}.")
        return _Section(self, name) if self._open else _NOTHING

    def begin_section(self, name: str) -> None:
        """Enters a section that [`end_step`] leaves."""
        if self._open:
            self._enter(name)

    def count(self, samples: Tensor, tokens: Tensor | None = None) -> None:
        """Adds one batch of the running step; both are scalar tensors, which stay on their device.

        Args:
            samples: number of texts or images.
            tokens: number of real tokens; `None` for images.
        """
        if self._open:
            self._samples = self._samples + samples
            if tokens is not None:
                self._tokens = tokens if self._tokens is None else self._tokens + tokens

    # ---- At a log line ----

    def collect(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Means per optimizer step since the last call, and starts anew; an empty dict where no step has ended.

        Times are milliseconds of this process, `time_step_ms` that of the whole step, which holds what belongs to no section too;
        evaluation, logging and saving are no part of it. `samples_per_second` and `tokens_per_second` (real tokens, of text alone)
        are those of all processes together. `peak_memory_mb` is the highest since [`reset`], of this process: what PyTorch
        allocated on a GPU, else the resident memory.

        Args:
            reduce: sums a tensor over processes; every one of them must then call this at the same step.
        """
        if not self.enabled or not self._steps:
            return {}
        samples = torch.as_tensor(self._samples)
        counts = torch.stack([samples, torch.zeros_like(samples) if self._tokens is None else self._tokens])
        samples, tokens = (counts if reduce is None else reduce(counts)).tolist()
        if self._marks:
            self._marks[-1][2].synchronize()
        while self._marks:
            self._read()
        seconds = sum(self._seconds.values())
        values = {f"time_{name}_ms": 1000 * self._seconds[name] / self._steps for name in SECTIONS}
        values |= {"time_step_ms": 1000 * seconds / self._steps, "samples_per_second": samples / max(seconds, 1e-9)}
        if self._tokens is not None:
            values["tokens_per_second"] = tokens / max(seconds, 1e-9)
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        self._steps, self._samples, self._tokens = 0, 0, None
        return {**values, "peak_memory_mb": peak(self.device) / MEGABYTE}

    # ---- Time ----

    def _enter(self, name: str) -> None:
        now = self._now()
        if self._open:
            self._book(self._open[-1][0], now)
        trace = None
        if self.named_ranges and name != _OTHER:
            trace = record_function(f"hfdistill.{name}")
            trace.__enter__()
        self._open.append((name, trace))
        self._since = now

    def _leave(self) -> None:
        name, trace = self._open.pop()
        if trace is not None:
            trace.__exit__(None, None, None)
        now = self._now()
        self._book(name, now)
        self._since = now

    def _leave_all(self) -> None:
        while self._open:
            self._leave()

    def _now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _book(self, name: str, now) -> None:
        if self.device.type == "cuda":
            self._marks.append((name, self._since, now))
        else:
            self._seconds[name] += now - self._since

    def _read(self) -> None:
        name, begin, end = self._marks.popleft()
        self._seconds[name] += begin.elapsed_time(end) / 1000


class _Section:
    """One entry of a section; a class because a generator would cost three times as much."""

    __slots__ = ("clock", "name", "depth")

    def __init__(self, clock: StepClock, name: str):
        self.clock, self.name = clock, name

    def __enter__(self):
        self.clock._enter(self.name)
        self.depth = len(self.clock._open)

    def __exit__(self, *error):
        if len(self.clock._open) == self.depth:  # else the step has ended inside
            self.clock._leave()
