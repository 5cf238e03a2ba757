"""How a run fits its machine: precision of the teacher, memory format of images, pages of the C library's allocator."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from transformers import Trainer

from .memory_pages import keep_memory_pages
from .signals import Signals
from .teacher_setup import TeacherSetup
from .teachers import FrozenTeacher
from .trainer_shortcuts import NOTHING


logger = logging.getLogger(__name__)


class TrainerHardware(Trainer):
    """A Trainer with a `teacher` and an `objective`, as [`DistillationTrainer`] sets them."""

    def _set_up_teacher(self) -> None:
        """Brings a frozen teacher into the precision of the run, once both models are known to fit together."""
        if isinstance(self.teacher, FrozenTeacher) and self._teacher_plan() != NOTHING:
            batch = partial(self._collate, self.args.per_device_train_batch_size)
            TeacherSetup(self.teacher, self.args, self.accelerator, self.objective, self._ask_teacher, batch).run()

    def _ask_teacher(self, batch: Mapping) -> Signals:
        """What a step of this run asks of the teacher."""
        plan = self._teacher_plan()
        rows = self._rows_of(batch) if plan.logits and self._head != "full" and self._teacher_rows else None
        return self.teacher(batch, plan, rows=rows, project=self._teacher_projects)

    def train(self, *args, **kwargs):
        """As `Trainer.train`, with freed memory kept for the next step where `keep_memory_pages` is set."""
        keeps = self.args.keep_memory_pages and self.args.device.type == "cpu"
        if self.args.keep_memory_pages and not keeps:
            logger.warning("keep_memory_pages has no effect on %s: PyTorch keeps the memory of that device itself.", self.args.device)
        with keep_memory_pages() if keeps else nullcontext():
            return super().train(*args, **kwargs)

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        if self.args.channels_last:
            for name, value in inputs.items():
                if isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point():
                    inputs[name] = value.contiguous(memory_format=torch.channels_last)
        return inputs
