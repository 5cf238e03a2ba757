"""How large and how fast a model is: parameters, bytes on disk, latency of one sample."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Timer

from .process_memory import MEGABYTE


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; tied ones (input and output embeddings, say) count once, buffers do not.

    Example:
        >>> count_parameters(torch.nn.Linear(3, 2))
        8
    """
    return sum(parameter.numel() for parameter in model.parameters())


def size_on_disk(model: nn.Module) -> float:
    """Megabytes (10^6 bytes) of the safetensors files that saving this model writes; configuration files do not count."""
    with tempfile.TemporaryDirectory() as folder:
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(folder)
        else:
            from safetensors.torch import save_model

            save_model(model, str(Path(folder, "model.safetensors")))
        return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors")) / MEGABYTE


def measure_model(
    model: nn.Module, example_inputs: Mapping[str, Any], threads: int = 1, min_run_time: float = 0.5
) -> dict[str, float | int]:
    """Parameters, size on disk and latency of a model.

    Times of different calls are comparable only on an idle machine; for a ratio use [`interleaved_latency`]. Modes of the
    modules and the number of threads are as before afterwards.

    Args:
        model (`nn.Module`): measured in eval mode, under `inference_mode`, on the device where it is.
        example_inputs (`dict`): keyword arguments of one forward pass; one row for the latency at batch 1.
        threads (`int`, defaults to 1): intra-op threads of PyTorch.
        min_run_time (`float`, defaults to 0.5): seconds to measure for; at least 3 passes, however slow.

    Returns:
        `dict`: `parameters`, `size_mb` (10^6 bytes of safetensors), `latency_ms` (median), `latency_iqr_ms` (distance of
        the quartiles), `batch_size` and `threads`.

    Raises:
        ValueError: for no inputs, or `threads` below 1.
    """
    batch_size = _check(example_inputs, threads)
    with _measured(model):
        timer = _timer(model, example_inputs, threads)
        timer.timeit(2)  # the first passes allocate
        times = timer.blocked_autorange(min_run_time=min_run_time).times
        while len(times) < 3:
            times.append(timer.timeit(1).median)
    return {
        "parameters": count_parameters(model),
        "size_mb": size_on_disk(model),
        **_summary(times),
        "batch_size": batch_size,
        "threads": threads,
    }


def interleaved_latency(
    models: Mapping[str, tuple[nn.Module, Mapping[str, Any]]], rounds: int = 15, threads: int = 1, block_seconds: float = 0.02
) -> dict[str, dict[str, float | int]]:
    """Latency of several models, measured in turns, so that whatever else slows the machine down hits all of them.

    Each round runs a block of passes of every model, every other round in reverse order. `speedup` is the median over
    rounds of the first model's time divided by this model's time *in the same round*, which is steadier than the quotient
    of the medians.

    Args:
        models (`dict`): name to `(model, inputs)`; the first is the one the others are compared with.
        rounds (`int`, defaults to 15): blocks per model.
        threads (`int`, defaults to 1): intra-op threads of PyTorch.
        block_seconds (`float`, defaults to 0.02): about how long a block lasts; at least one pass.

    Returns:
        `dict`: for each name `latency_ms`, `latency_iqr_ms` and `speedup` (1.0 for the first).

    Raises:
        ValueError: for no models, no inputs, or `rounds` or `threads` below 1.
    """
    if not models or rounds < 1:
        raise ValueError(f"Measuring needs at least one model and one round, got {len(models)} models and rounds={rounds}.")
    for _, inputs in models.values():
        _check(inputs, threads)
    times: dict[str, list[float]] = {name: [] for name in models}
    with contextlib.ExitStack() as stack:
        for model, _ in models.values():
            stack.enter_context(_measured(model))
        timers = {name: _timer(model, inputs, threads) for name, (model, inputs) in models.items()}
        passes = {}
        for name, timer in timers.items():
            timer.timeit(2)
            passes[name] = max(1, round(block_seconds / timer.timeit(2).median))
        for number in range(rounds):
            for name in list(timers)[:: -1 if number % 2 else 1]:
                times[name].append(timers[name].timeit(passes[name]).median)
    first = next(iter(times.values()))
    return {
        name: {**_summary(own), "speedup": statistics.median(a / b for a, b in zip(first, own, strict=True))} for name, own in times.items()
    }


def _check(inputs: Mapping[str, Any], threads: int) -> int:
    """The batch size of the inputs."""
    sizes = [value.shape[0] for value in inputs.values() if isinstance(value, torch.Tensor) and value.ndim]
    if not sizes:
        raise ValueError(f"example_inputs holds no tensor ({sorted(inputs)}), so there is nothing to run. Pass one tokenized row.")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}.")
    return sizes[0]


@contextlib.contextmanager
def _measured(model: nn.Module) -> Iterator[None]:
    """Eval mode and inference mode; every submodule gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _timer(model: nn.Module, inputs: Mapping[str, Any], threads: int) -> Timer:
    return Timer("model(**inputs)", globals={"model": model, "inputs": dict(inputs)}, num_threads=threads)


def _summary(seconds: list[float]) -> dict[str, float]:
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"latency_ms": median * 1e3, "latency_iqr_ms": (upper - lower) * 1e3}
