"""What a trainer knows for the model card of its student."""

from __future__ import annotations

import os
from typing import Any

from .losses import LOSSES
from .models.peft_student import adapter_settings, is_peft_student
from .redaction import shareable
from .report import versions
from .teachers.loading import AUTO_CLASSES


PIPELINE_TAGS = {
    "sequence": "text-classification",
    "token": "token-classification",
    "question_answering": "question-answering",
    "masked_lm": "fill-mask",
    "causal_lm": "text-generation",
    "features": "feature-extraction",
}
HYPERPARAMETERS = (
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "optim",
    "lr_scheduler_type",
    "learning_rate_milestones",
    "learning_rate_gamma",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "bf16",
    "fp16",
)


def card_fields(trainer) -> dict[str, Any]:
    """Fields of [`CardContext`] from a [`DistillationTrainer`]: names, objective as resolved, layer maps, settings, last metrics."""
    student = trainer.student.inner
    config = getattr(student, "config", None)
    origin = getattr(config, "distilled_from", None)
    if origin:
        start = origin["name_or_path"] if origin["width"] else None  # no width: built with random weights
    else:
        start = getattr(config, "_name_or_path", None)
    tag = PIPELINE_TAGS.get(trainer.objective.task)
    if tag == "text-classification" and getattr(student, "main_input_name", None) == "pixel_values":
        tag = "image-classification"
    tables = [f"**{name}**\n\n{table}" for name, table in trainer.layer_map_tables().items()]
    return {
        "student_name": os.path.basename(os.path.abspath(trainer.args.output_dir)),
        "teacher_name": _teacher_name(trainer.teacher),
        "base_model": start or None,
        "weights_from": _copied(origin),
        "objective": [_row(term) for term in trainer.objective.describe()],
        "layer_map_table": "\n\n".join(tables) or None,
        "hyperparameters": _hyperparameters(trainer.args) | adapter_settings(trainer.student.model),
        "metric_values": _last_metrics(trainer.state.log_history),
        "pipeline_tag": tag,
        "versions": versions(),
        "repo_id": trainer.hub_model_id,
        **_adapter_fields(trainer, start, tag),
    }


def _hyperparameters(args) -> dict[str, Any]:
    """Those that were used: milestones replace the scheduler, and stand alone."""
    unused = {"lr_scheduler_type"} if args.learning_rate_milestones else {"learning_rate_milestones", "learning_rate_gamma"}
    return {name: getattr(args, name) for name in HYPERPARAMETERS if name not in unused}


def _copied(origin: dict[str, Any] | None) -> str | None:
    """What `build_student` recorded about copied weights, in words."""
    if not origin or not origin["width"]:
        return None
    blocks = ", ".join(str(block) for block in origin["layers"])
    width = "" if origin["width"] == "same" else f", width by {origin['width']}"
    return f"its teacher: embeddings, head and block{'s' if len(origin['layers']) > 1 else ''} {blocks}{width}"


def staged_card(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Card fields of a student that was trained in stages, from the fields of its [`StageRecord`]s: terms and settings by stage."""
    columns = {"name": "stage", "data": "data", "teacher": "teacher", "steps": "steps"}
    return {
        "objective": [_row({"stage": stage["name"], **term}) for stage in stages for term in stage["objective"]],
        "layer_map_table": None,  # of the last stage only; the terms above have theirs
        "stages": [{title: stage[key] for key, title in columns.items()} | stage["settings"] for stage in stages],
    }


def _adapter_fields(trainer, base: str | None, tag: str | None) -> dict[str, Any]:
    """Where adapters alone are published: the library, and how they are loaded on top of a base that others can have."""
    if not is_peft_student(trainer.model):  # also a student that was merged after its training
        return {}
    name = os.path.basename(os.path.abspath(trainer.args.output_dir))
    auto = next((AUTO_CLASSES[task] for task, own in PIPELINE_TAGS.items() if own == tag and task in AUTO_CLASSES), None)
    auto = AUTO_CLASSES["image"] if tag == "image-classification" else auto
    fields: dict[str, Any] = {"library_name": "peft"}
    if base and auto:
        labels = f", num_labels={trainer.student.inner.config.num_labels}" if "Classification" in auto else ""
        fields["usage"] = (
            f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
            f'base = {auto}.from_pretrained("{shareable(base)}"{labels})\n'
            f'model = PeftModel.from_pretrained(base, "{trainer.hub_model_id or name}")'
        )
    return fields


def _teacher_name(teacher) -> str | None:
    if teacher is None:
        return None
    model = getattr(teacher, "model", teacher)
    return getattr(getattr(model, "config", None), "_name_or_path", None) or f"a {type(model).__name__}"


def _row(term: dict[str, Any]) -> dict[str, Any]:
    row = {key: value for key, value in term.items() if key not in ("signal", "adapter", "layer_reduction")}
    usual = getattr(LOSSES.get(term["loss"]), "signal", term.get("signal"))
    if term.get("signal") != usual:
        row["signal"] = term["signal"]
    if isinstance(row.get("layer_map"), list):
        row["layer_map"] = " ".join(f"{s}:{t}" for s, t in row["layer_map"])
    if "SharedAdapter" in term.get("adapter", ()):
        row["adapter"] = "shared"
    return row


def _last_metrics(history: list[dict[str, Any]]) -> dict[str, float]:
    """The metrics of the last evaluation, without losses and times."""
    noise = ("_loss", "_runtime", "_per_second", "_time")
    for log in reversed(history):
        if "eval_loss" in log:
            names = [name for name in log if name.startswith("eval_") and not name.endswith(noise)]
            return {name.removeprefix("eval_"): log[name] for name in names if isinstance(log[name], (int, float))}
    return {}
