"""A teacher given by name: which Auto class, and its tokenizer."""

from __future__ import annotations

import transformers
from torch import nn


AUTO_CLASSES = {
    "sequence": "AutoModelForSequenceClassification",
    "image": "AutoModelForImageClassification",
    "token": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "masked_lm": "AutoModelForMaskedLM",
    "causal_lm": "AutoModelForCausalLM",
    "base": "AutoModel",
}


def load_teacher(name_or_path: str, task: str, init_kwargs: dict | None = None) -> nn.Module:
    """The teacher's model with the head that fits the student's task.

    Args:
        name_or_path: a folder or a Hub id.
        task: a key of `AUTO_CLASSES`.
        init_kwargs: passed to `from_pretrained`.

    Raises:
        ValueError: when the task has no Auto class, or the model cannot be found or reached.
    """
    if task not in AUTO_CLASSES:
        raise ValueError(f"A teacher cannot be loaded by name for a student of task {task!r}. Load it yourself and pass the module.")
    return load_named_part(getattr(transformers, AUTO_CLASSES[task]), name_or_path, "teacher", **(init_kwargs or {}))


def load_named_part(auto_class, name_or_path: str, role: str, **options):
    """`auto_class.from_pretrained(name_or_path)` with one clear message when there is nothing under that name.

    Args:
        auto_class: `AutoTokenizer`, `AutoConfig`, `AutoModelFor...`.
        name_or_path: a folder or a Hub id.
        role: what it is for, in the message: `teacher`, `student`, `tokenizer of the student`, ...

    Raises:
        ValueError: when it cannot be found or reached.
    """
    try:
        return auto_class.from_pretrained(name_or_path, **options)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"The {role} {name_or_path!r} has weights of other sizes than asked for, as a head for other labels has. Pass "
            "--ignore_mismatched_sizes true, which gives it a new head (image_classification.py), or a checkpoint for these labels."
        ) from error
    except OSError as error:
        raise ValueError(
            f"The {role} {name_or_path!r} is neither a folder with a model nor a Hub id that can be reached ({_first_line(error)}). Check "
            "the spelling, download it where there is a network (`hf download`) and give the folder, or pass a module."
        ) from error


def load_tokenizer(name_or_path: str, revision: str | None = None):
    """The tokenizer that lies beside a model, or `None` where there is none."""
    try:
        return transformers.AutoTokenizer.from_pretrained(name_or_path, revision=revision)
    except (OSError, ValueError, KeyError):
        return None


def load_image_processor(name_or_path: str, revision: str | None = None, **options):
    """The image processor that lies beside a model, or `None` where there is none."""
    try:
        return transformers.AutoImageProcessor.from_pretrained(name_or_path, revision=revision, **options)
    except (OSError, ValueError, KeyError, ImportError):
        return None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
