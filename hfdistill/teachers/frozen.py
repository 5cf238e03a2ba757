"""One frozen model as the teacher."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from ..capture import Capture
from ..capture_plan import CapturePlan
from ..model_outputs import move_to
from ..signals import Projection, Signals
from .precision import cast_weights


logger = logging.getLogger(__name__)


class FrozenTeacher:
    """A model in eval mode, without gradients, in its own dtype, outside the student's modules and checkpoints.

    Args:
        model (`nn.Module`): the teacher. It is frozen (`requires_grad_(False)`) and put in eval mode, now and again before
            every forward pass, so its dropout is off and its buffers do not change.
        device: where it runs; `None` leaves it where it is.
        dtype (`torch.dtype`, *optional*): what its weights are cast to; `None` keeps their own. Quantized and dispatched models
            stay where and as they are.
        batch_size (`int`, *optional*): rows per forward pass; larger batches are cut and put together again.
        autocast: a callable giving the context of the forward pass, such as `accelerator.autocast`.
        pooling (`str`, *optional*): of its `pooled` signal, where it differs from that of the arguments; see [`Capture`].
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int | None = None,
        autocast: Callable | None = None,
        pooling: str | None = None,
    ):
        if model.training:
            logger.warning(
                "The teacher (%s) was in training mode: its dropout would have made its targets random. It has been put in eval mode.",
                type(model).__name__,
            )
        self.model = model.requires_grad_(False).eval()
        if not is_placed(model):
            if dtype is not None:
                cast_weights(self.model, dtype)
            if device is not None:
                self.model.to(device=device)
        self.batch_size = batch_size
        self.stops_early = False  # whether forward passes end with the last signal; see `Capture.check_early_stop`
        self.compiled: nn.Module | None = None
        self.autocast = autocast or nullcontext
        self.capture = Capture(self.model, "teacher", pooling)

    @property
    def columns(self) -> list[str]:
        return self.capture.columns

    def compile(self) -> None:
        """From now on forward passes go through `torch.compile`, and run to their end.

        One graph for the first shape and a second, dynamic one as soon as another is seen (`dynamic=None`). No mode with CUDA graphs:
        their outputs are overwritten by the next pass, of which a batch in pieces has several.
        """
        self.compiled = torch.compile(self.model)

    def __call__(self, batch: Mapping, plan: CapturePlan, rows: Tensor | None = None, project: bool = True) -> Signals:
        """The teacher's signals on `batch`, on the device of the batch, without a graph.

        Args:
            batch, plan: as for [`Capture`], as are `rows` and `project`, which restrict the head of a language model.
        """
        self.model.eval()
        inputs = self.capture.select_inputs(batch)
        home = next(value.device for value in inputs.values() if isinstance(value, Tensor))
        size = next(value.size(0) for value in inputs.values() if isinstance(value, Tensor))
        step = self.batch_size or size
        parts = []
        # no_grad, not inference_mode: tensors of the latter cannot be saved for the student's backward pass.
        with torch.no_grad(), self.autocast():
            for start in range(0, size, step):
                cut = {k: v[start : start + step] if isinstance(v, Tensor) and v.size(0) == size else v for k, v in inputs.items()}
                own = rows_of_piece(rows, inputs, start, step)
                # The exception that ends a pass early would break the compiled graph in two.
                early = self.stops_early and self.compiled is None
                cut = move_to(cut, self.model)
                parts.append(self.capture(cut, plan, forward=self.compiled, rows=own, project=project, stop_early=early))
        return replace(concatenate(parts, home), rows=rows)


def is_placed(model: nn.Module) -> bool:
    """Whether the model refuses to be moved or cast: quantized and dispatched ones are where and as they should be."""
    return bool(getattr(model, "is_quantized", False) or getattr(model, "hf_device_map", None))


def rows_of_piece(rows: Tensor | None, inputs: Mapping, start: int, step: int) -> Tensor | None:
    """Which of `rows`, positions of the flattened `(batch * length)`, are in samples `start` to `start + step`, counted from there."""
    if rows is None or start == 0 and inputs["input_ids"].size(0) <= step:
        return rows
    length = inputs["input_ids"].size(1)
    return rows[(rows >= start * length) & (rows < (start + step) * length)] - start * length


def concatenate(parts: list[Signals], device) -> Signals:
    """Signals of consecutive pieces of a batch as those of the whole, on `device`."""

    def join(values):
        if isinstance(values[0], Projection):
            return replace(values[0], features=join([value.features for value in values]))
        if isinstance(values[0], dict):
            return {key: join([value[key] for value in values]) for key in values[0]}
        if not isinstance(values[0], Tensor):
            return values[0]
        # To a GPU the host need not wait; what is read on the CPU must have arrived.
        return (values[0] if len(values) == 1 else torch.cat(values)).to(device, non_blocking=torch.device(device).type != "cpu")

    return Signals(**{f.name: join([getattr(part, f.name) for part in parts]) for f in fields(Signals)})
