"""In which precision the teacher runs: which one is faster on this machine, and how far its signals are then from those in fp32."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..losses.base import LossValue
from ..models.anatomy import unwrap_peft
from ..signals import ATTENTION_SIGNALS, Signals


HALF = (torch.bfloat16, torch.float16)
GAIN = 1.1
"""How many times as fast half precision has to be: a smaller gain is within the noise of the measurement."""
REPEATS, BUDGET = 3, 30.0
"""Timed passes in each precision, after one to warm up; no further one is started when these have taken so many seconds."""
_ROWS = 256  # of logits that are compared at a time, in float64


# ---- Weights ----


def own_dtype(model: nn.Module) -> torch.dtype | None:
    """The precision of most of the weights, `None` for a model without any (and for quantized ones)."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in _castable(model):
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=sizes.get, default=None)


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts in place what `from_pretrained(dtype=...)` would.

    Not what a Transformers model keeps in fp32 by name, nor buffers that are not saved: rotary frequencies in half precision would
    put late tokens in the wrong place.
    """
    for tensor in _castable(model, dtype):
        tensor.data = tensor.data.to(dtype)


class TwoPrecisions:
    """A model with a second copy of its weights in `dtype`; `swap` changes places. The modules, and hooks on them, stay the same."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self._tensors = list(_castable(model, dtype))
        self._others = [tensor.data.to(dtype) for tensor in self._tensors]
        self._swapped = False

    def swap(self) -> None:
        self._swapped = not self._swapped
        for i, tensor in enumerate(self._tensors):
            tensor.data, self._others[i] = self._others[i], tensor.data

    def restore(self) -> None:
        """The weights that the model came with."""
        if self._swapped:
            self.swap()


def _castable(model: nn.Module, dtype: torch.dtype | None = None) -> Iterable[Tensor]:
    """Tensors that may be cast; to float16, not those that overflow in it either."""
    tensors = dict(model.state_dict(keep_vars=True))
    inner, kept = unwrap_peft(model), ()
    if isinstance(inner, PreTrainedModel):
        kept = tuple(getattr(inner, "_keep_in_fp32_modules_strict", None) or ())
        kept += tuple(getattr(inner, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ()
    else:
        tensors |= dict(model.named_buffers())  # who wrote them expects `model.to(dtype)`
    seen = set()
    for name, tensor in tensors.items():
        plain = isinstance(tensor, Tensor) and type(tensor.detach()) is Tensor  # quantized weights are subclasses
        if plain and tensor.is_floating_point() and id(tensor) not in seen and not any(part in name for part in kept):
            seen.add(id(tensor))
            yield tensor


def quantizable(model: nn.Module) -> list[nn.Linear]:
    """Linear layers that can be stored as int8: not the output embedding, which losses read and which is often the input embedding too."""
    inner = unwrap_peft(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head and type(m.weight.detach()) is Tensor]


def quantize_weights(model: nn.Module) -> None:
    """Stores the weights of linear layers as int8 with one scale for each output, in place.

    Raises:
        ValueError: where torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ValueError(
            f"teacher_quantization='int8' needs torchao, which cannot be imported ({error}). Install it with `pip install "
            "hfdistill[torchao]`, or leave teacher_quantization out."
        ) from error
    layers = set(map(id, quantizable(model)))
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, _name: id(module) in layers)
    model.requires_grad_(False)


# ---- Speed ----


def half_precision_excluded(device: torch.device) -> str | None:
    """Why half precision cannot be faster on `device`, from what its processor is known to lack; `None` where it may be."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    if device.type == "cpu" and not supported():
        return f"this CPU ({torch.backends.cpu.get_cpu_capability()}) has no bfloat16 arithmetic"
    return None


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of `run()`, until the device has done its work."""
    wait = (lambda: None) if device.type == "cpu" else (lambda: torch.accelerator.synchronize(device))
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def compare_speed(model: nn.Module, dtype: torch.dtype, run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Median seconds of `run()` with the weights as they are and in `dtype`, taken in turns. The weights are left as they were."""
    weights = TwoPrecisions(model, dtype)
    times: tuple[list[float], list[float]] = ([], [])
    try:
        for repeat in range(REPEATS + 1):
            for own in times:
                taken = seconds(run, device)
                weights.swap()
                if repeat > 0:
                    own.append(taken)
            if repeat > 0 and sum(map(sum, times)) > BUDGET:
                break
    finally:
        weights.restore()
    return statistics.median(times[0]), statistics.median(times[1])


# ---- Drift ----


@dataclass
class Drift:
    """How far signals are from those of a more precise teacher on one batch.

    Attributes:
        largest, mean (`float`): |difference| of logits, in standard deviations of the precise ones; `None` without logits.
        equal_argmax (`float`): share of rows whose best class is the same; `None` without logits, or with one column of them.
        terms (`dict[str, float]`): what the logit terms of the run are between the two teachers, by name.
        relative (`dict[str, float]`): norm of the difference over the norm, by signal; the worst layer of each.
        finite (`bool`): whether everything is finite that is so in the precise signals.
    """

    largest: float | None = None
    mean: float | None = None
    equal_argmax: float | None = None
    terms: dict[str, float] = field(default_factory=dict)
    relative: dict[str, float] = field(default_factory=dict)
    finite: bool = True

    def __str__(self) -> str:
        found = []
        if self.mean is not None:
            found.append(f"logits differ by {self.mean:.2g} of their standard deviation in the mean and {self.largest:.2g} at most")
        if self.equal_argmax is not None:
            found.append(f"{self.equal_argmax:.2%} of the best classes are the same")
        found += [f"the term {name} between the two is {value:.2g}" for name, value in self.terms.items()]
        found += [f"{name} differ by {value:.2g} of their norm" for name, value in self.relative.items()]
        return "; ".join(found)


LogitLosses = Mapping[str, Callable[[Tensor, Tensor], LossValue]]
"""Name -> a loss of `(student logits, teacher logits)`."""


def measure_drift(precise: Signals, other: Signals, terms: LogitLosses, spans: bool = False) -> Drift:
    """What the precision of the teacher changes.

    Args:
        precise, other: signals of the two on the same batch. Padding does not count.
        terms: losses of logits; `other` is the student.
        spans: whether logits are `(batch, 2, length)`, whose classes are the positions.
    """
    drift = Drift()
    for signal, first, second in _compared(precise, other):
        there = first.isfinite()
        drift.finite &= bool((second.isfinite() | ~there).all())
        error = float(torch.where(there, second - first, 0).norm() / torch.where(there, first, 0).norm().clamp(min=1e-30))
        drift.relative[signal] = max(drift.relative.get(signal, 0.0), error)
    rows = [_logit_rows(signals, spans) for signals in (precise, other)]
    if rows[0] is not None and rows[0].numel():
        _compare_logits(drift, *rows, terms)
    return drift


def _compared(precise: Signals, other: Signals) -> Iterable[tuple[str, Tensor, Tensor]]:
    """The tensors of both but logits, in float64, with the name of their signal; 0 at padding."""
    for name in ("hidden_states", "features", "embeddings", *ATTENTION_SIGNALS, "pooled"):
        first, second = getattr(precise, name), getattr(other, name)
        layers = [(key, first[key], second[key]) for key in first] if isinstance(first, dict) else [(None, first, second)]
        for key, one, two in layers:
            if one is None:
                continue
            one, two = one.double(), two.double()
            mask = precise.attention_allowed[key] if name == "attention_scores" else None
            if precise.attention_mask is not None and one.dim() == 3:
                mask = precise.attention_mask.unsqueeze(-1)
            yield name, *((one, two) if mask is None else (torch.where(mask, one, 0), torch.where(mask, two, 0)))


def _logit_rows(signals: Signals, spans: bool) -> Tensor | None:
    """Logits as `(rows, classes)`, of real tokens alone; -inf stands for a class that is not there."""
    if signals.projection is not None:
        return signals.projection.logits()
    logits, mask = signals.logits, signals.attention_mask
    if logits is None or logits.dim() == 2:
        return logits
    if spans:
        return (logits if mask is None else logits.masked_fill(~mask.unsqueeze(1), float("-inf"))).flatten(0, 1)
    return logits.flatten(0, 1) if mask is None or mask.shape != logits.shape[:2] else logits[mask]


def _compare_logits(drift: Drift, precise: Tensor, other: Tensor, terms: LogitLosses) -> None:
    there = precise.isfinite()
    drift.finite &= bool((other.isfinite() | ~there).all())
    difference, largest, equal = 0.0, 0.0, 0
    values = {name: [0.0, 0.0] for name in terms}
    for first, second in zip(precise.split(_ROWS), other.split(_ROWS)):
        first, second = first.double(), second.double()
        distance = torch.where(first.isfinite(), second - first, 0).abs()
        difference, largest = difference + float(distance.sum()), max(largest, float(distance.max()))
        equal += int((first.argmax(-1) == second.argmax(-1)).sum())
        for name, loss in terms.items():
            total, count = loss(second, first)
            values[name][0] += float(total)
            values[name][1] += float(count)
    deviation = float(precise[there].double().std(correction=0)) or 1.0
    drift.mean, drift.largest = difference / max(int(there.sum()), 1) / deviation, largest / deviation
    if precise.size(-1) > 1:
        drift.equal_argmax = equal / precise.size(0)
    drift.terms = {name: total / max(count, 1) for name, (total, count) in values.items()}
