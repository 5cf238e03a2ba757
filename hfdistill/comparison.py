"""What a run found: teacher, student alone and distilled student side by side, and whether the teacher had anything to teach."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from .baselines import majority_share
from .benchmark import count_parameters, interleaved_latency, size_on_disk
from .capture import Capture
from .metrics import agreement, gap_closed
from .models.anatomy import task_of
from .report import summarise, versions
from .runs import Arm
from .stage_training import staged_objective


def launch_command() -> str:
    """How this process was started, as far as it can know: `accelerate launch` sets variables, plain Python does not."""
    launcher = "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in os.environ else "python"
    return " ".join([launcher, *sys.argv])


def refuse_weak_teacher(teacher: Arm, allowed: bool = False) -> None:
    """A classifier that has learnt nothing has nothing to teach.

    Raises:
        ValueError: when the teacher is right no more often than the majority class, unless `allowed`.
    """
    counted, labels = teacher.labels != -100, teacher.labels
    if labels.ndim == teacher.logits.ndim:  # several yes-or-no labels a row
        right, share = ((teacher.logits > 0) == labels)[counted].mean(), np.where(counted, labels, 0).sum(0) / counted.sum(0).clip(min=1)
        majority = np.maximum(share, 1 - share).mean()
    else:
        right, majority = (teacher.logits.argmax(-1) == labels)[counted].mean(), majority_share(labels)
    if right <= majority and not allowed:
        raise ValueError(
            f"The teacher is right on {right:.3f} of the held-out rows, and always answering the most frequent label on {majority:.3f}: "
            "the student would learn nothing from it. Fine-tune the teacher on this task (teacher_training), check that its labels are "
            "in the order of the data, or pass --allow_weak_teacher true."
        )


def _mean_seconds(arms: list[Arm]) -> float | None:
    seconds = [arm.seconds for arm in arms]
    return None if not seconds or None in seconds else statistics.fmean(seconds)


def _inputs(name: str, model, example: dict[str, Any]) -> dict[str, Any]:
    """What one model reads of the example; a teacher may have its own preparation of an image."""
    return Capture(model, "teacher" if name == "teacher" else "model").select_inputs(example)


def compare_arms(
    task: str,
    metric: str,
    seeds: list[int],
    teacher: Arm,
    arms: dict[str, list[Arm]],
    example: dict[str, Any],
    baselines: dict[str, float],
    config_sha256: str,
    agreement_of: Callable[[np.ndarray, np.ndarray], float] | None = None,
) -> dict[str, Any]:
    """The contents of `results.json`: accuracy of every arm, sizes, latencies measured in turns, agreement, share of the gap closed.

    Args:
        metric: name without the `eval_` prefix.
        arms: `alone`, `distilled`, and others such as `control` -> one [`Arm`] a seed; those but `distilled` may be empty. The
            others become entries of `baselines`.
        example: one row as a batch, for the latency.
        baselines: name -> value of `metric`.
        agreement_of: `(predictions of a student, predictions of the teacher) -> share on which they agree`. Default: top-1 for
            classifiers, nothing for others.
    """
    for arm in [teacher, *(arm for own in arms.values() for arm in own)]:
        arm.trainer.rest()
    models = {"teacher": teacher.model, **{name: own[0].model for name, own in arms.items() if own}}
    inputs = {
        name: {key: value.to(model.device) for key, value in _inputs(name, model, example).items()}
        for name, model in models.items()
    }
    latencies = interleaved_latency({name: (model, inputs[name]) for name, model in models.items()})

    def entry(name: str, value) -> dict[str, Any]:
        model = models[name]
        return {
            metric: value,
            "parameters": count_parameters(model),
            "size_mb": size_on_disk(model),
            "latency_ms": latencies[name]["latency_ms"],
            "steps": teacher.steps if name == "teacher" else arms[name][0].steps,
        }

    def over_seeds(name: str) -> dict[str, Any] | None:
        own = arms.get(name)
        return entry(name, summarise([arm.metrics[f"eval_{metric}"] for arm in own])) if own else None

    teacher_value, distilled_arm = teacher.metrics[f"eval_{metric}"], arms["distilled"][0]
    alone, distilled = over_seeds("alone"), over_seeds("distilled")
    others = {name: over_seeds(name) for name, own in arms.items() if own and name not in ("alone", "distilled")}
    if agreement_of is None and task_of(teacher.model) == "sequence" and teacher.logits.ndim == 2 and teacher.logits.shape[-1] > 1:
        agreement_of = agreement
    agreements = {
        name: statistics.fmean(agreement_of(arm.logits, teacher.logits) for arm in own)
        for name, own in arms.items()
        if own and agreement_of is not None
    }
    return {
        "task": task,
        "metric": metric,
        "seeds": list(seeds),
        "teacher": entry("teacher", teacher_value),
        "student_alone": alone,
        "student_distilled": distilled,
        "baselines": {**others, **baselines},
        "agreement": agreements.get("distilled"),
        "agreements": agreements,
        "gap_closed": None if alone is None else gap_closed(alone[metric]["mean"], distilled[metric]["mean"], teacher_value),
        "objective": staged_objective(distilled_arm.stages) or distilled_arm.trainer.objective.describe(),
        **({"stages": distilled_arm.stages} if distilled_arm.stages else {}),
        "versions": versions(),
        "config_sha256": config_sha256,
        "command": launch_command(),
        "num_processes": teacher.trainer.accelerator.num_processes,
        "seconds": {
            "teacher": teacher.seconds,
            **{name: _mean_seconds(arms.get(name, [])) for name in ("alone", "distilled", "control", *others)},
        },
    }
