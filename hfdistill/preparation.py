"""Checks and set-up of a `DistillationTrainer` that need no training: arguments, data, teacher, agreement of the two models."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .alignment import resolve_label_order, resolve_vocabulary
from .arguments import DistillationTrainingArguments
from .capture import Capture
from .counting import labels_of
from .models.anatomy import task_of, unwrap_peft
from .objective import Objective
from .teachers import CallableTeacher, FrozenTeacher
from .teachers.loading import load_teacher, load_tokenizer
from .terms import Term


def check_constructor(model, args, compute_loss_func, teacher, datasets: dict) -> None:
    """What can be refused before the Trainer itself is built.

    Raises:
        ValueError: for foreign arguments, a loss function, other label names, a teacher that is the student, empty data.
    """
    if not isinstance(args, DistillationTrainingArguments):
        raise ValueError(
            f"args is a {type(args).__name__}, which has no distillation settings. Use hfdistill.DistillationTrainingArguments; "
            "it takes the same arguments and more."
        )
    if compute_loss_func is not None:
        raise ValueError(
            "compute_loss_func returns one number, from which no count of rows can be taken. Write the loss as a DistillationLoss and "
            "pass objective=[Term(loss), ...]."
        )
    if args.label_names not in (None, ["labels"]):
        raise ValueError(f"label_names={args.label_names} is not supported: rename the column of hard labels to 'labels'.")
    if teacher is not None and teacher is model:
        raise ValueError("teacher and model are the same object: freezing the teacher would freeze the student. Pass a copy.")
    for name, dataset in datasets.items():
        purpose = "train" if name == "train_dataset" else "evaluate"
        for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
            if part is not None and hasattr(part, "__len__") and len(part) == 0:
                raise ValueError(f"{name} is empty: there is nothing to {purpose} on. Check its filters and file.")


def check_columns(model: nn.Module, dataset) -> None:
    """The training data has the student's input."""
    names = getattr(dataset, "column_names", None)
    if not names:
        return
    main = getattr(unwrap_peft(model), "main_input_name", None)
    if main is not None and main not in names and "inputs_embeds" not in names:
        raise ValueError(
            f"The training data has no column {main!r}, only {sorted(names)}: the student would get no input. Tokenize or preprocess it "
            f"first (dataset.map), or name the column {main!r}."
        )


def check_labels(example: Mapping | None, terms: list[Term]) -> None:
    """Batches of the training data have labels where a term needs them; the collator may have made them."""
    if example is not None and any(term.is_task for term in terms) and labels_of(example) is None:
        raise ValueError(
            f"Batches of the training data have no 'labels', only {sorted(example)}, but the objective has a task term. Add a column "
            "'labels' (-100 where one is missing), or set task_weight to 0 to learn from the teacher alone."
        )


def check_separate(student: nn.Module, teacher) -> None:
    """The teacher owns its weights: freezing it must not freeze parts of the student."""
    if isinstance(teacher, nn.Module):
        own = {id(p): name for name, p in student.named_parameters()}
        shared = [own[id(p)] for p in teacher.parameters() if id(p) in own]
        if shared:
            raise ValueError(
                f"Student and teacher share {len(shared)} parameters ({', '.join(shared[:2])}...): freezing the teacher would freeze them "
                "in the student. Pass copy.deepcopy of one of them."
            )


def check_teacher(terms: list[Term], teacher) -> None:
    """Terms that compare have somebody to compare with."""
    wants = [term.name for term in terms if not term.is_task]
    if wants and teacher is None:
        raise ValueError(
            f"The terms {wants} compare the student with a teacher, but there is none. Pass teacher=..., or set kd_weight=0 and "
            "the other weights but task_weight to 0 to train without one."
        )


def load_by_name(teacher, student: nn.Module, args, processing_class=None):
    """A teacher given as a folder or Hub id becomes `(model, its tokenizer or None)`; any other teacher stays as it is."""
    if not isinstance(teacher, (str, os.PathLike)):
        return teacher, None
    name, task, options = os.fspath(teacher), task_of(student), args.teacher_model_init_kwargs or {}
    if task == "sequence" and getattr(unwrap_peft(student), "main_input_name", None) == "pixel_values":
        task = "image"
    text = isinstance(processing_class, PreTrainedTokenizerBase)
    return load_teacher(name, task, options), load_tokenizer(name, options.get("revision")) if text else None


def wrap_teacher(teacher, args, accelerator) -> FrozenTeacher | CallableTeacher | None:
    """Module -> [`FrozenTeacher`] on its device and in its dtype, function -> [`CallableTeacher`]."""
    if teacher is None or isinstance(teacher, (FrozenTeacher, CallableTeacher)):
        return teacher
    if isinstance(teacher, nn.Module):
        mixed = args.teacher_dtype is None and accelerator.mixed_precision in ("bf16", "fp16")
        return FrozenTeacher(
            teacher,
            device=args.teacher_device or args.device,
            dtype=getattr(torch, args.teacher_dtype) if args.teacher_dtype else None,
            batch_size=args.teacher_batch_size,
            autocast=accelerator.autocast if mixed else nullcontext,
        )
    if not callable(teacher):
        raise ValueError(f"teacher must be a module, a folder or Hub id, or a function that answers a batch, got {type(teacher).__name__}.")
    return CallableTeacher(teacher)


def align(objective: Objective, student: Capture, teacher: Capture | None, args, processing_class, teacher_processing_class) -> None:
    """Sets the label order and the shared vocabulary of `objective`.

    Raises:
        ValueError: where labels, vocabularies or tokenizers do not agree; see `hfdistill.alignment`.
    """
    configs = [getattr(capture.inner, "config", None) if capture is not None else None for capture in (student, teacher)]
    if None in configs:
        return
    uses_logits = any(term.signal == "logits" and not term.term.is_task for term in objective.terms.values())
    if uses_logits and objective.task in ("sequence", "token"):
        objective.label_order = resolve_label_order(*configs, args.teacher_label_order)
    sizes = [getattr(config, "vocab_size", None) for config in configs]
    if None not in sizes:
        tokenizers = [t if isinstance(t, PreTrainedTokenizerBase) else None for t in (processing_class, teacher_processing_class)]
        shared = resolve_vocabulary(*sizes, *tokenizers)
        objective.vocabulary = shared if objective.task in ("masked_lm", "causal_lm") else None
