"""The student's own base as the teacher: one model in memory, its adapters off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from ..capture import Capture
from ..capture_plan import CapturePlan
from ..models.peft_student import adapters_off, is_peft_student
from ..signals import Signals
from .frozen import concatenate, rows_of_piece


BASE = "base"
"""`DistillationTrainer(teacher="base")`. A folder of that name is `./base`, a model on the Hub its full id."""


class AdaptersOffCapture:
    """The student's own [`Capture`] with its adapters off.

    The attention taps are per module, so two captures of the same modules would take them from each other. After each pass
    the taps are as the student's pass left them: activation checkpointing runs that one again in backward.
    """

    def __init__(self, student: Capture):
        self.student = student

    def __getattr__(self, name: str):
        if name == "student":  # while being copied, before __init__
            raise AttributeError(name)
        return getattr(self.student, name)

    @property
    def role(self) -> str:
        return "teacher"

    @property
    def name(self) -> str:
        return f"teacher ({type(self.inner).__name__} with its adapters off)"

    def __call__(self, batch: Mapping, plan: CapturePlan, **how) -> Signals:
        with self._off():
            return self.student(batch, plan, **how)

    def require(self, plan: CapturePlan, example: Mapping) -> Signals:
        """As `Capture.require`."""
        with self._off():
            return self.student.require(plan, example)

    def check_early_stop(self, plan: CapturePlan, example: Mapping) -> bool:
        """As `Capture.check_early_stop`."""
        with self._off():
            return self.student.check_early_stop(plan, example)

    @contextmanager
    def _off(self) -> Iterator[None]:
        tap = self.student._tap
        kept = {} if tap is None else dict(vars(tap))
        try:
            with adapters_off(self.student.model):
                yield
        finally:
            if tap is not None:
                vars(tap).update(kept)


class AdaptersOffTeacher:
    """The base of a PEFT student as its teacher: `DistillationTrainer(model, teacher="base", peft_config=...)`.

    Nothing is loaded and nothing copied. Each forward pass runs the student's own modules in eval mode, under `no_grad`,
    with `disable_adapter()`, which also brings back the original head where `modules_to_save` trains a copy of it; then
    every flag is as it was. It goes past the DDP wrapper, which would expect a backward pass for it.

    Fresh LoRA adapters (`B = 0`) leave the student equal to its base, so terms that compare the two are 0 at the first step
    and only keep what the base knows: give the student something else to learn too, such as `task_weight`.

    Args:
        batch_size (`int`, *optional*): rows per forward pass; larger batches are cut and put together again.

    Raises:
        ValueError: from `follow`, when the student has no PEFT adapters, or would move what its base needs: weights that are
            trained beside the adapters, or the statistics of a BatchNorm.
    """

    def __init__(self, batch_size: int | None = None):
        self.batch_size = batch_size
        self.stops_early = False
        self.capture: AdaptersOffCapture | None = None

    def follow(self, student: Capture) -> None:
        """Makes the base of this student the teacher; the trainer calls it for every student it binds."""
        model = student.model
        if not is_peft_student(model):
            raise ValueError(
                f"teacher='base' is the student without its PEFT adapters, but {type(student.inner).__name__} has none (or not in a "
                "peft.PeftModel). Pass peft_config=peft.LoraConfig(...), or another model as the teacher; a folder called 'base' is "
                "'./base'."
            )
        moving = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            and module.track_running_stats
            and "modules_to_save" not in name
            and "original_module" not in name
        ]
        if moving:
            raise ValueError(
                f"The student has a BatchNorm ({moving[0]}), whose running statistics change in training: its base would not stay the "
                "teacher it was. Pass a copy as the teacher: teacher=copy.deepcopy(base), before the adapters are added."
            )
        with adapters_off(model):
            trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if trained:
            raise ValueError(
                f"{len(trained)} weights that the base needs too are trained ({trained[0]}, ...): it would not stay the teacher it was. "
                "Freeze them (LoraConfig(bias='none') trains none), name their module in modules_to_save, which trains a copy, or pass a "
                "copy of the base as the teacher."
            )
        self.capture = AdaptersOffCapture(student)

    @property
    def model(self) -> nn.Module | None:
        """The base model inside the student; its weights are the student's."""
        return None if self.capture is None else self.capture.inner

    @property
    def columns(self) -> list[str]:
        return [] if self.capture is None else self.capture.columns

    def __call__(self, batch: Mapping, plan: CapturePlan, rows: Tensor | None = None, project: bool = True) -> Signals:
        """The signals of the base on `batch`, without a graph; `rows` and `project` as for [`Capture`]."""
        inputs = self.capture.select_inputs(batch)
        tensor = next(value for value in inputs.values() if isinstance(value, Tensor))
        size, step = tensor.size(0), self.batch_size or tensor.size(0)
        pieces = []
        for start in range(0, size, step):
            cut = {k: v[start : start + step] if isinstance(v, Tensor) and v.size(0) == size else v for k, v in inputs.items()}
            own = rows_of_piece(rows, inputs, start, step)
            pieces.append(self.capture(cut, plan, rows=own, project=project, stop_early=self.stops_early))
        return replace(concatenate(pieces, tensor.device), rows=rows)
