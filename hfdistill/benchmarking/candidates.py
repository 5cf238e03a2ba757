"""Who takes the steps: the bare loop, the stock Trainer, the textbook subclass, and hfdistill with its fast paths on and off."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ..arguments import DistillationTrainingArguments
from ..costs import OptimizerSteps
from ..suggest import did_you_mean
from ..trainer import DistillationTrainer
from .workloads import SEED, Workload


LEARNING_RATE = 1e-5  # small: hundreds of steps on one batch must not change what is measured
MAX_GRAD_NORM = 1.0
ALONE = "alone"
"""The objective of a student that learns from labels without a teacher."""


@dataclass
class Setting:
    """Where steps are taken.

    Args:
        device: `cpu` or `cuda`.
        bf16: autocast for everybody, for GPUs.
        folder: for what has to be written, such as a stored teacher.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    bf16: bool = False
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="hfdistill_benchmark_")))

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def training(self) -> dict[str, Any]:
        """Arguments that all Trainers have in common."""
        return dict(
            output_dir=str(self.folder / "trainer"), use_cpu=self.device.type == "cpu", bf16=self.bf16, max_steps=10, seed=SEED,
            learning_rate=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM, save_strategy="no", report_to="none", disable_tqdm=True,
            train_sampling_strategy="sequential", dataloader_pin_memory=False,
        )  # fmt: skip


class Steps:
    """Optimizer steps of one candidate, always on the same batch. `student` has the gradients between `backward` and `update`."""

    student: nn.Module

    def backward(self) -> Tensor:
        """Forward and backward passes; returns the loss, detached."""
        raise NotImplementedError

    def update(self) -> None:
        """Clips, moves the weights, and clears the gradients."""
        raise NotImplementedError

    def clear(self) -> None:
        """Forgets the gradients."""
        self.student.zero_grad()

    def take(self) -> None:
        """One step: what is measured."""
        self.backward()
        self.update()

    def rest(self) -> None:
        """Costs others nothing until the next step."""


class LoopSteps(Steps):
    """A training loop as people write it: [`loss`] is the objective, the rest is four lines."""

    def __init__(self, workload: Workload, setting: Setting, eager: bool = False):
        self.setting = setting
        self.student = workload.new_student().to(setting.device)
        self.teacher = workload.new_teacher().to(setting.device)
        self.projections = workload.new_projections().to(setting.device)
        self.batch = {name: value.to(setting.device) for name, value in workload.batch().items()}
        self.inputs = {name: value for name, value in self.batch.items() if name != "labels"}
        if eager:
            self.student.set_attn_implementation("eager")
            self.teacher.set_attn_implementation("eager")
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def parameters(self) -> list[nn.Parameter]:
        return [*self.student.parameters(), *self.projections.parameters()]

    def loss(self) -> Tensor:
        raise NotImplementedError

    def backward(self) -> Tensor:
        with self.setting.autocast():
            loss = self.loss()
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()


class BareSteps(LoopSteps):
    """The formula of an objective, or the student alone."""

    def __init__(self, workload: Workload, setting: Setting, objective: str):
        super().__init__(workload, setting, eager=workload.attentions and objective != ALONE)
        self.outputs = workload.outputs
        self.formula = None if objective == ALONE else workload.objectives[objective].formula

    def loss(self) -> Tensor:
        if self.formula is None:
            return self.student(**self.batch).loss
        student = self.student(**self.batch, **self.outputs)
        with torch.no_grad():
            teacher = self.teacher(**self.inputs, **self.outputs)
        return self.formula(student, teacher, self.batch, self.projections)


class TrainerSteps(Steps):
    """Steps of a `Trainer`, outside of its loop."""

    def __init__(self, trainer: Trainer):
        self.steps = OptimizerSteps(trainer)
        self.student = trainer.model
        trainer.model.train()

    def backward(self) -> Tensor:
        return self.steps.backward().detach()

    def update(self) -> None:
        self.steps.update()

    def clear(self) -> None:
        self.steps.clear()

    def rest(self) -> None:
        self.steps.rest()


class TextbookTrainer(Trainer):
    """The subclass of tutorials: both models get the whole batch and give back everything, and `outputs.loss` is added in."""

    def __init__(self, *args, teacher: nn.Module, workload: Workload, **options):
        super().__init__(*args, **options)
        self.teacher, self.outputs = teacher.to(self.args.device), {**workload.outputs, "output_hidden_states": True}
        self.formula = workload.objectives["distil"].formula
        self.projections = workload.new_projections().to(self.args.device)

    def create_optimizer(self, model=None):
        super().create_optimizer(model)
        if len(self.projections):
            self.optimizer.add_param_group({"params": list(self.projections.parameters())})
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student = model(**inputs, **self.outputs)
        with torch.no_grad():
            teacher = self.teacher(**inputs, **self.outputs)
        loss = self.formula(student, teacher, inputs, self.projections)
        return (loss, student) if return_outputs else loss


def stock(workload: Workload, setting: Setting, objective: str) -> Steps:
    args = TrainingArguments(**setting.training(), per_device_train_batch_size=workload.batch_size)
    return TrainerSteps(Trainer(workload.new_student(), args, train_dataset=workload.rows))


def textbook(workload: Workload, setting: Setting, objective: str) -> Steps:
    args = TrainingArguments(**setting.training(), per_device_train_batch_size=workload.batch_size)
    student, teacher = workload.new_student(), workload.new_teacher()
    if workload.attentions:
        student.set_attn_implementation("eager")
        teacher.set_attn_implementation("eager")
    return TrainerSteps(TextbookTrainer(student, args, train_dataset=workload.rows, teacher=teacher, workload=workload))


def distillation(**mode: Any) -> Callable[[Workload, Setting, str], Steps]:
    """hfdistill with these settings beside the objective."""

    def build(workload: Workload, setting: Setting, objective: str) -> Steps:
        own = dict(mode)
        if own.get("teacher_store"):
            own["teacher_store"] = str(setting.folder / f"{own['teacher_store']}_{workload.name}_{objective}")
        args = DistillationTrainingArguments(
            **setting.training(), per_device_train_batch_size=workload.batch_size, **workload.objectives[objective].settings, **own
        )
        trainer = DistillationTrainer(workload.new_student(), args, train_dataset=workload.rows, teacher=workload.new_teacher())
        _set_projections(trainer, workload.new_projections())
        return TrainerSteps(trainer)

    return build


def _set_projections(trainer: DistillationTrainer, projections: nn.ModuleList) -> None:
    """The first weights that everybody's projections have, in the order embedding, then layers."""
    terms = trainer.objective.terms
    names = [name for name in ("embedding", "hidden", "hint") if name in terms]
    for adapter, projection in zip([one for name in names for one in terms[name].adapters], projections):
        adapter.load_state_dict(copy.deepcopy(projection.state_dict()))


@dataclass(frozen=True)
class Candidate:
    """One line of the table.

    Args:
        title: what it is.
        objective: which of the workload's it minimises, or `alone`.
        build: `(workload, setting, objective) -> Steps`.
        workloads: where it takes part.
        peer: the package it needs, by its import name.
        note: what has to be known to read its figures.
    """

    title: str
    objective: str
    build: Callable[[Workload, Setting, str], Steps]
    workloads: tuple[str, ...]
    peer: str | None = None
    note: str = ""


ALL = ("W1", "W2", "W3", "W4", "W5", "bert_base")
OFF = dict(vocabulary_head="full", teacher_trimming=False, log_step_profile=False)
BF16 = dict(teacher_dtype="bfloat16")
STORED = dict(teacher_store="store")

OWN: dict[str, Candidate] = {
    "bare": Candidate("bare loop", "distil", BareSteps, ALL),
    "bare_alone": Candidate("bare loop, student alone", ALONE, BareSteps, ALL),
    "stock": Candidate("stock Trainer, student alone", ALONE, stock, ALL),
    "textbook": Candidate("textbook subclass of Trainer", "distil", textbook, ALL),
    "off": Candidate("hfdistill, fast paths off", "distil", distillation(**OFF), ALL),
    "fast": Candidate("hfdistill", "distil", distillation(), ALL),
    "bf16": Candidate("hfdistill, bf16 teacher", "distil", distillation(**BF16), ALL),
    "stored": Candidate("hfdistill, stored teacher", "distil", distillation(**STORED), ("W1", "W3", "W4", "W5", "bert_base")),
    "masked": Candidate("hfdistill, masked rows", "masked", distillation(), ("W1",)),
    "masked_bf16": Candidate("hfdistill, masked rows, bf16 teacher", "masked", distillation(**BF16), ("W1",)),
    "masked_stored": Candidate("hfdistill, masked rows, stored teacher", "masked", distillation(**STORED), ("W1",)),
    "scores": Candidate("hfdistill, scores before softmax", "scores", distillation(), ("W2",)),
    "scores_bf16": Candidate("hfdistill, scores, bf16 teacher", "scores", distillation(**BF16), ("W2",)),
    "channels_last": Candidate("hfdistill, channels-last", "distil", distillation(channels_last=True), ("W4",)),
    "channels_last_bf16": Candidate("hfdistill, channels-last, bf16 teacher", "distil", distillation(channels_last=True, **BF16), ("W4",)),
}


def candidates_of(workload: str, chosen: list[str] | None, candidates: dict[str, Candidate]) -> dict[str, Candidate]:
    """Those of `candidates` that take part in a workload, in the order of the table.

    Raises:
        ValueError: for a name in `chosen` that no workload knows.
    """
    for name in chosen or []:
        if name not in candidates:
            raise ValueError(f"There is no candidate {name!r}.{did_you_mean(name, candidates)} Known: {', '.join(candidates)}.")
    return {name: one for name, one in candidates.items() if workload in one.workloads and (chosen is None or name in chosen)}
