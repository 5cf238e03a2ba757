"""Checks and set-up of a `DistillationTrainer` that need no training: arguments, data, teacher, agreement of the two models."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import nn
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from .alignment import resolve_label_order, resolve_vocabulary, teacher_token_ids
from .arguments import DistillationTrainingArguments
from .capture import Capture
from .capture_plan import TEACHER_PREFIX
from .counting import EXAMPLE_ID, LABEL_COLUMNS, SPAN_COLUMNS, labels_of
from .models.anatomy import is_base_model, task_of, unwrap_peft
from .models.peft_student import is_peft_student
from .objective import Objective
from .sentence_encoder import read_sentence_encoder
from .teachers import AdaptersOffTeacher, CallableTeacher, FrozenTeacher, StoredTeacher
from .teachers.base_model import BASE
from .teachers.frozen import is_placed
from .teachers.loading import load_image_processor, load_teacher, load_tokenizer
from .terms import Term


logger = logging.getLogger(__name__)


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
    if args.label_names not in (None, ["labels"], list(SPAN_COLUMNS)):
        raise ValueError(f"label_names={args.label_names} is not supported: rename the column of hard labels to 'labels'.")
    if teacher is not None and teacher is model:
        raise ValueError("teacher and model are the same object: freezing the teacher would freeze the student. Pass a copy.")
    for name, dataset in datasets.items():
        purpose = "train" if name == "train_dataset" else "evaluate"
        for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
            if part is not None and hasattr(part, "__len__") and len(part) == 0:
                raise ValueError(f"{name} is empty: there is nothing to {purpose} on. Check its filters and file.")


def check_columns(model: nn.Module, dataset, collator=None) -> None:
    """The training data has the student's input, or the columns from which the collator makes it."""
    names = getattr(dataset, "column_names", None)
    if not names or getattr(collator, "image_column", None) in names:
        return
    main = getattr(unwrap_peft(model), "main_input_name", None)
    if main is not None and main not in names and "inputs_embeds" not in names:
        raise ValueError(
            f"The training data has no column {main!r}, only {sorted(names)}: the student would get no input. Tokenize or preprocess it "
            f"first (dataset.map), or name the column {main!r}."
        )


def resolve_label_names(model: nn.Module, given: list[str] | None, found: list[str]) -> list[str]:
    """The columns of hard labels: those the forward pass names (`found`), start and end positions for spans, else `labels`.

    Raises:
        ValueError: when other names are `given` than the task of the model has.
    """
    spans = task_of(model) == "question_answering"
    names = list(SPAN_COLUMNS) if spans else found or ["labels"]
    if given is not None and given != (names if spans else ["labels"]):
        raise ValueError(
            f"label_names={given} does not fit {type(unwrap_peft(model)).__name__}, whose hard labels are in {names}: evaluation would "
            "find none. Leave label_names out."
        )
    return names


def check_labels(example: Mapping | None, terms: list[Term], names: list[str]) -> None:
    """Batches of the training data have labels where a term needs them; the collator may have made them."""
    columns = " and ".join(map(repr, names))
    if example is not None and any(term.is_task for term in terms) and labels_of(example) is None:
        raise ValueError(
            f"Batches of the training data have no {columns}, only {sorted(example)}, but the objective has a task term. Add a column "
            f"{columns} (-100 where one is missing), or set task_weight to 0 to learn from the teacher alone."
        )


def check_separate(student: nn.Module, teacher) -> None:
    """The teacher owns its weights: freezing it must not freeze parts of the student."""
    if isinstance(teacher, nn.Module):
        own = {id(p): name for name, p in student.named_parameters()}
        shared = [own[id(p)] for p in teacher.parameters() if id(p) in own]
        if shared:
            raise ValueError(
                f"Student and teacher share {len(shared)} parameters ({', '.join(shared[:2])}...): freezing the teacher would freeze them "
                "in the student. Pass copy.deepcopy of one of them"
                f"{', or teacher=' + repr(BASE) + ' for the student with its adapters off' if is_peft_student(student) else ''}."
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
    """A teacher given as a folder or Hub id becomes `(model, its tokenizer, image processor or None)`; any other teacher stays as it is.

    The name `base` is the student itself with its PEFT adapters off; a folder called that is `./base`.
    """
    if isinstance(teacher, str) and teacher == BASE:
        return AdaptersOffTeacher(args.teacher_batch_size), None
    if not isinstance(teacher, (str, os.PathLike)):
        return teacher, None
    name, task, options = os.fspath(teacher), task_of(student), args.teacher_model_init_kwargs or {}
    images = getattr(unwrap_peft(student), "main_input_name", None) == "pixel_values"
    if is_base_model(student):
        task = "base"
    elif task in ("sequence", "other") and images:  # DeiT with its two heads has a task of its own
        task = "image"
    model = load_teacher(name, task, options)
    if isinstance(processing_class, PreTrainedTokenizerBase):
        return model, load_tokenizer(name, options.get("revision"))
    return model, load_image_processor(name, options.get("revision")) if images and processing_class is not None else None


def warn_of_preparation(student_processor, teacher_processor, collator, dataset) -> None:
    """Warns where both models get the same images although their processors prepare images differently.

    A collator with a `teacher_image_processor`, or a column `teacher_pixel_values`, gives each its own.
    """
    if not all(isinstance(processor, BaseImageProcessor) for processor in (student_processor, teacher_processor)):
        return
    from .data.image_collator import preparation_difference

    own = getattr(collator, "teacher_image_processor", None) is not None
    if own or f"{TEACHER_PREFIX}pixel_values" in (getattr(dataset, "column_names", None) or ()):
        return
    different = preparation_difference(student_processor, teacher_processor)
    if different:
        listed = ", ".join(f"{name} {ours} (teacher: {theirs})" for name, (ours, theirs) in different.items())
        logger.warning(
            "The teacher was trained on images that were prepared otherwise than the student's: %s. It gets the student's, and may answer "
            "worse than it can. Pass ImageCollator(image_processor, teacher_image_processor), which prepares each image for both.",
            listed,
        )


def example_labels(dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """The label of every training example, -100 where it is unknown, and its `example_id`.

    Shapes: integer `(examples,)` twice; a row that the data repeats counts once.

    Raises:
        ValueError: when the data has no such column, ids that are no whole numbers, or no length.
    """
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            f"A loss that remembers examples has a row for each, but a {type(dataset).__name__} does not tell how many there are. Use a "
            "data set with a length, or info_nce with a queue."
        )
    columns = getattr(dataset, "column_names", None)
    if columns:
        plain = dataset.with_format(None)
        rows = {name: plain[name][:] for name in (EXAMPLE_ID, *LABEL_COLUMNS) if name in columns}
    else:
        rows = {}
        for i in range(len(dataset)):
            row = dataset[i]
            for name in {EXAMPLE_ID, *LABEL_COLUMNS} & row.keys():
                rows.setdefault(name, []).append(row[name])
    if EXAMPLE_ID not in rows:
        raise ValueError(
            f"A loss that remembers examples needs to know them again, but the training data has no column {EXAMPLE_ID!r}. Add one number "
            "for each example: dataset.add_column('example_id', range(len(dataset)))."
        )
    ids = _whole_numbers(rows.pop(EXAMPLE_ID))
    if ids is None:
        raise ValueError(f"The column {EXAMPLE_ID!r} must hold one whole number for each example, so that it is known again.")
    labels = next((found for values in rows.values() if (found := _whole_numbers(values)) is not None), torch.full_like(ids, -100))
    unique, place = ids.unique(return_inverse=True)
    return torch.full_like(unique, -100).index_copy(0, place, labels), unique


def _whole_numbers(values) -> torch.Tensor | None:
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError):  # texts, lists of several lengths
        return None
    return None if tensor.is_floating_point() or tensor.dtype == torch.bool or tensor.dim() != 1 else tensor.long()


def own_pooling(teacher, student: nn.Module, args) -> str | None:
    """The pooling of a sentence-transformers folder that is the teacher of a base model; `None` for any other teacher."""
    if not isinstance(teacher, (str, os.PathLike)) or not is_base_model(student):
        return None
    options = args.teacher_model_init_kwargs or {}
    encoder = read_sentence_encoder(teacher, options.get("revision"), options.get("cache_dir"))
    return encoder and encoder.pooling


def wrap_teacher(teacher, args, accelerator, pooling: str | None = None) -> FrozenTeacher | AdaptersOffTeacher | CallableTeacher | None:
    """Module -> [`FrozenTeacher`] on its device, function -> [`CallableTeacher`].

    Half precision is left to `hfdistill.teacher_setup`, which compares it with fp32 first.

    Raises:
        ValueError: for what is no teacher, and for settings that this teacher cannot follow.
    """
    if teacher is not None and args.teacher_store is None:
        _refuse_store_options(args, isinstance(teacher, StoredTeacher))
    if isinstance(teacher, AdaptersOffTeacher):
        for name in ("teacher_dtype", "teacher_quantization", "teacher_compile", "teacher_device", "teacher_model_init_kwargs"):
            if getattr(args, name):
                raise ValueError(
                    f"{name}={getattr(args, name)!r} would not be used: teacher='base' is the student's own model, where and as the "
                    f"student is. Remove {name}, or pass a copy of the base as the teacher."
                )
        if accelerator.distributed_type.value in ("FSDP", "DEEPSPEED"):
            raise ValueError(
                f"teacher='base' calls the student past its {accelerator.distributed_type.value} wrapper, which gathers its weights. "
                "Pass a copy of the base as the teacher, or use DDP (recipes/accelerate/multi_gpu.yaml)."
            )
        return teacher
    if teacher is None:
        return teacher
    if isinstance(teacher, StoredTeacher):
        names = ("dtype", "quantization", "compile", "device", "batch_size", "model_init_kwargs")
        _refuse(args, tuple(f"teacher_{name}" for name in names), "is stored and no model runs")
        return teacher
    module = teacher.model if isinstance(teacher, FrozenTeacher) else teacher
    if not isinstance(module, nn.Module):
        if not callable(teacher):
            raise ValueError(
                f"teacher must be a module, a folder or Hub id, or a function that answers a batch, got {type(teacher).__name__}."
            )
        _refuse(args, ("teacher_dtype", "teacher_quantization", "teacher_compile", "teacher_device"), "is a function")
        return teacher if isinstance(teacher, CallableTeacher) else CallableTeacher(teacher)
    if is_placed(module):
        _refuse(args, ("teacher_dtype", "teacher_quantization", "teacher_device"), "is quantized, or dispatched to its devices, already")
    if args.channels_last:
        use_channels_last(module, "teacher")
    if isinstance(teacher, FrozenTeacher):
        return teacher
    mixed = args.teacher_dtype is None and accelerator.mixed_precision in ("bf16", "fp16")
    options = dict(
        device=args.teacher_device or args.device,
        batch_size=args.teacher_batch_size,
        autocast=accelerator.autocast if mixed else nullcontext,
        pooling=pooling,
    )
    if args.teacher_dtype in (None, "auto", "float32"):
        return FrozenTeacher(teacher, dtype=torch.float32 if args.teacher_dtype == "float32" else None, **options)
    try:
        return FrozenTeacher(teacher, **options)
    except torch.OutOfMemoryError:
        logger.warning("The teacher does not fit the device in its own precision, so its drift in %s is not measured.", args.teacher_dtype)
        return FrozenTeacher(teacher, dtype=getattr(torch, args.teacher_dtype), **options)


def _refuse(args, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if getattr(args, name):
            raise ValueError(f"{name}={getattr(args, name)!r} would not be used, because the teacher {why}. Remove it.")


def _refuse_store_options(args, stored: bool) -> None:
    """A store that is given as the teacher is as it is, but not all its epochs need to be used."""
    names = ("teacher_store_logits", "teacher_store_top_k", "teacher_store_dtype", *([] if stored else ["teacher_store_epochs"]))
    for name in names:
        if getattr(args, name) != type(args).__dataclass_fields__[name].default:
            raise ValueError(
                f"{name}={getattr(args, name)!r} would not be used, because "
                f"{'the teacher is stored already' if stored else 'nothing is stored without teacher_store'}. Remove it."
            )


def use_channels_last(model: nn.Module, role: str) -> None:
    """Brings convolutions into channels-last memory format, in place; images follow in `_prepare_inputs`."""
    if any(parameter.dim() == 4 for parameter in model.parameters()):
        model.to(memory_format=torch.channels_last)
    else:
        logger.warning("channels_last has no effect on the %s (%s): it has no 2-d convolution.", role, type(unwrap_peft(model)).__name__)


def translate_tokens(student: Capture, teacher: Capture | None, processing_class, teacher_processing_class) -> None:
    """Lets `teacher` read the student's token ids as its own where the student's tokenizer was pruned from the teacher's.

    Raises:
        ValueError: where the models have fewer rows than their tokenizers.
    """
    if not isinstance(teacher, Capture):
        return
    ids = teacher_token_ids(processing_class, teacher_processing_class)
    teacher.token_ids = None if ids is None else torch.tensor(ids)
    rows = [getattr(getattr(capture.inner, "config", None), "vocab_size", None) for capture in (student, teacher)]
    if ids is not None and None not in rows and (rows[0] < len(ids) or rows[1] <= max(ids)):
        raise ValueError(
            f"The student has {rows[0]} rows and the teacher {rows[1]}, but the pruned tokenizer has {len(ids)} tokens, the last of them "
            f"number {max(ids)} of the teacher: one of the models belongs to another tokenizer. Build the student with "
            "vocabulary=kept of the same prune_tokenizer call, and pass the teacher's own tokenizer as teacher_processing_class."
        )


def freeze_unused_pooler(student: Capture, objective: Objective) -> None:
    """Takes the pooler of a base model out of training where no term reads it.

    Its output is among those of the forward pass, so DistributedDataParallel would wait for gradients that never come.
    """
    reads = any(term.signal == "pooled" for term in objective.terms.values()) and student.pooling == "auto"
    pooler = getattr(getattr(student.inner, "base_model", None), "pooler", None)
    if objective.task == "features" and not reads and isinstance(pooler, nn.Module):
        pooler.requires_grad_(False)


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
    language_model = objective.task in ("masked_lm", "causal_lm")
    if getattr(teacher, "token_ids", None) is not None:
        if language_model:
            objective.vocabulary, objective.teacher_columns = len(teacher.token_ids), teacher.token_ids.to(args.device)
    elif None not in sizes:
        tokenizers = [t if isinstance(t, PreTrainedTokenizerBase) else None for t in (processing_class, teacher_processing_class)]
        shared = resolve_vocabulary(*sizes, *tokenizers)
        objective.vocabulary = shared if language_model else None
