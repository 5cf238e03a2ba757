"""A student's training in several steps, one trainer a stage.

What is carried from stage to stage: the student's weights, and the adapters of terms that are the same in both stages. What
is not: the optimizer and its moments, the learning rate schedule, the step counter, frozen parts, the random state (each stage
has its own seed, derived from the run's).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerState

from .arguments import DistillationTrainingArguments
from .checkpoints import last_whole_checkpoint
from .models.anatomy import find_blocks, unwrap_peft
from .models.parts import has_head
from .models.peft_student import is_peft_student
from .side_file import changed_maps, save_side_file
from .stages import Stage, expand_progressive, resolve_stages, stage_arguments
from .suggest import nearest_or_all
from .teachers import FrozenTeacher
from .terms import resolve_terms
from .trainer import DistillationTrainer


RECORD = "stage.json"
STATE = "trainer_state.json"
# What may differ between two starts of one run.
_PLACES = (
    "output_dir", "logging", "log_", "report_to", "disable_tqdm", "run_name", "hub_", "push_to_hub", "dataloader_", "save_", "use_cpu",
    "local_rank", "_n_gpu", "ddp_",
)  # fmt: skip


@dataclass
class StageRecord:
    """What one finished stage did, as written to `stage.json`.

    `objective` is the stage's own as resolved, `settings` what differs from stage to stage: learning rate, rows a step, seed.
    """

    name: str
    data: str
    teacher: str | None
    steps: int
    seconds: float | None
    first_loss: float | None
    last_loss: float | None
    carried_adapters: int
    metrics: dict[str, float] = field(default_factory=dict)
    objective: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    assistant: bool = False
    """Whether it trained a student of its own, not the run's."""


def train_stages(
    stages: Sequence[Stage | Mapping[str, Any]],
    model: nn.Module,
    args: DistillationTrainingArguments,
    *,
    datasets: Mapping[str, Any],
    teachers: Mapping[str, Any],
    trainer_for: Callable[..., DistillationTrainer],
    build: Callable[[dict[str, Any]], nn.Module] | None = None,
    metric: str | None = None,
) -> tuple[DistillationTrainer, list[StageRecord]]:
    """Trains `model` through `stages`; a stage that was finished is read back, one that was killed goes on from its last checkpoint.

    Args:
        stages: [`Stage`]s or dicts.
        model: the student; trained in place.
        args: of the run; each stage works in a folder of its own under `args.output_dir`.
        datasets: name -> training data, for `Stage.data`.
        teachers: name -> teacher, for `Stage.teacher`; the main one is called `teacher`.
        trainer_for: `(model, args, train_dataset, teacher) -> DistillationTrainer`, with collator, metrics and evaluation data.
        build: makes the student of a stage that has one of its own, from its sizes.
        metric: name of a metric that is measured after each stage that trains logits, without the `eval_` prefix.

    Returns:
        The trainer of the last stage, which holds the trained student, and a record of every stage.

    Raises:
        ValueError: before any training, for unknown data or teachers and settings that do not fit.

    Example:

    ```python
    trainer, records = train_stages(
        [Stage("hints", settings={"hidden_weight": 1.0, "max_steps": 500}), Stage("soft_targets", settings={"kd_weight": 1.0})],
        student, args, datasets={"train": rows}, teachers={"teacher": teacher},
        trainer_for=lambda model, args, rows, teacher: DistillationTrainer(model, args, train_dataset=rows, teacher=teacher),
    )
    ```
    """
    stages = _expand(resolve_stages(stages), model, args, teachers, build)
    _check_names(stages, datasets, [*teachers, *(["base"] if is_peft_student(model) else [])], build)
    plans = [stage_arguments(args, stage, i, str(Path(args.output_dir) / f"{i}_{stage.name}")) for i, stage in enumerate(stages)]
    _check_stores(stages, plans)
    teachers = {"base": "base", **teachers}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}

    def set_up(stage, plan):
        for name, p in model.named_parameters():
            p.requires_grad_(trainable[name])
        student = model if stage.student is None else build(stage.student)
        trainer = trainer_for(student, plan, datasets[stage.data], None if stage.teacher is None else teachers[stage.teacher])
        if is_peft_student(trainer.model) and not is_peft_student(student):
            raise ValueError(
                f"The trainer of stage {stage.name!r} put PEFT adapters on the student, and every stage would put others on top. Give "
                "train_stages a student that has them already (peft.get_peft_model), and trainer_for no peft_config."
            )
        return trainer

    for stage, plan in zip(stages, plans):  # what does not fit shows now, and not after the stages in front of it
        trainer = set_up(stage, plan)
        _release(trainer)
        if stage.student is not None:
            teachers[stage.name] = trainer.model
    records, previous, trainer, mark = [], None, None, ""  # previous: the last trainer of the run's own student
    for stage, plan in zip(stages, plans):
        if trainer is not None:
            _release(trainer)
        trainer = set_up(stage, plan)
        carried = _carry_adapters(previous, trainer) if stage.carry_adapters and previous is not None else 0
        if plan.should_log:
            print(f"\n== Stage {len(records) + 1} of {len(stages)}: {stage.name}", flush=True)
        mark = _mark(stage, plan, mark)
        records.append(_finish(stage, trainer, carried, metric, mark))
        student = trainer.model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        if stage.student is not None:
            teachers[stage.name] = student.eval()
        else:
            previous = trainer
    return trainer, records


def _expand(stages: list[Stage], model, args, teachers, build) -> list[Stage]:
    expanded = []
    for stage in stages:
        if stage.progressive is None:
            expanded.append(stage)
            continue
        teacher = teachers.get(stage.teacher)
        if not isinstance(teacher, nn.Module) or stage.student is not None:
            raise ValueError(
                f"The progressive stage {stage.name!r} needs a model as its teacher and trains the run's student, but its teacher is "
                f"{stage.teacher!r}{' and it has a student of its own' if stage.student is not None else ''}. Use one of the run's "
                "teachers, or write its stages out, one a block, with layer_map and frozen_parts."
            )
        recorded = (getattr(unwrap_peft(model).config, "distilled_from", None) or {}).get("layers")
        depths = find_blocks(model).depth, find_blocks(teacher).depth
        expanded += expand_progressive(stage, args, *depths, has_head(model), recorded)
    return expanded


def _check_names(stages: list[Stage], datasets: Mapping, known: list[str], build) -> None:
    for stage in stages:
        if stage.data not in datasets:
            raise ValueError(f"Stage {stage.name!r} trains on data {stage.data!r}.{nearest_or_all(stage.data, list(datasets))}")
        if stage.teacher is not None and stage.teacher not in known:
            raise ValueError(f"Stage {stage.name!r} has the teacher {stage.teacher!r}.{nearest_or_all(stage.teacher, [*known, 'none'])}")
        if stage.student is not None:
            if build is None:
                raise ValueError(f"Stage {stage.name!r} has a student of its own, but nothing says how to build it. Pass build=...")
            if stage.name in (*known, "base"):
                raise ValueError(
                    f"The student of stage {stage.name!r} would take the place of the teacher {stage.name!r}. Give the stage another name."
                )
            known.append(stage.name)


def _check_stores(stages: list[Stage], plans: list[DistillationTrainingArguments]) -> None:
    """Each stage asks its teacher for its own signals, about its own data: one folder cannot answer two of them."""
    seen: dict[str, str] = {}
    for stage, plan in zip(stages, plans):
        if plan.teacher_store is None or stage.teacher is None or all(term.is_task for term in resolve_terms(plan)):
            continue
        folder = plan.teacher_store.replace("{seed}", str(plan.seed))
        if folder in seen:
            raise ValueError(
                f"The stages {seen[folder]!r} and {stage.name!r} would store their teachers in one folder, {folder!r}, but have other "
                "terms or data. Set teacher_store in each stage (none of them in the run), with a folder of its own."
            )
        seen[folder] = stage.name


def _release(trainer: DistillationTrainer) -> None:
    """Takes the attention taps off both models, which the next stage uses again."""
    trainer.student.release()
    if isinstance(trainer.teacher, FrozenTeacher):
        trainer.teacher.capture.release()


def _carry_adapters(previous: DistillationTrainer, trainer: DistillationTrainer) -> int:
    """Copies the adapters of terms that are the same in both objectives; returns how many tensors were copied."""
    changed = changed_maps(previous._record(), trainer._record()["layer_maps"])
    before = previous.accelerator.unwrap_model(previous.objective).state_dict()
    now = trainer.objective.state_dict()
    # Memories, queues and running statistics of a loss belong to the data and the teacher of their stage.
    memories = {name for name, _ in trainer.objective.named_buffers() if ".losses." in name}
    same = {
        key: value
        for key, value in before.items()
        if key not in memories
        and key in now
        and now[key].shape == value.shape
        and not any(key.startswith(f"terms.{name}.") for name in changed)
    }
    with torch.no_grad():
        for key, value in same.items():
            now[key].copy_(value)
    return len(same)


def _mark(stage: Stage, plan: DistillationTrainingArguments, before: str) -> str:
    """A hash of what decides the weights after a stage, as far as the arguments say: its settings and those of the stages before."""
    settings = {key: value for key, value in plan.to_dict().items() if not key.startswith(_PLACES)}
    return hashlib.sha256(json.dumps([asdict(stage), settings, before], sort_keys=True, default=str).encode()).hexdigest()


def _finish(stage: Stage, trainer: DistillationTrainer, carried: int, metric: str | None, mark: str) -> StageRecord:
    folder = Path(trainer.args.output_dir)
    if (folder / RECORD).is_file():
        written = json.loads((folder / RECORD).read_text())
        if written.pop("mark") != mark or not (folder / STATE).is_file():
            raise ValueError(
                f"The finished stage in {str(folder)!r} was trained with other settings, after other stages, or by an older version. "
                "Choose another output_dir, or delete this folder and those of later stages."
            )
        trainer._load_from_checkpoint(str(folder))
        trainer.state = TrainerState.load_from_json(str(folder / STATE))
        trainer.state.is_world_process_zero = trainer.is_world_process_zero()  # the main process wrote it for itself
        trainer.state.is_local_process_zero = trainer.is_local_process_zero()
        if trainer.args.should_log:
            print(f"{stage.name} is finished already")
        return StageRecord(**written)
    checkpoint = last_whole_checkpoint(folder, trainer.accelerator.num_processes)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start if checkpoint is None else None  # what went before the kill is not known
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    metrics = {}
    trains_logits = any(term.signal == "logits" for term in trainer.objective.terms.values())
    if metric is not None and trains_logits and trainer.eval_dataset is not None and trainer.compute_metrics is not None:
        measured = trainer.evaluate()
        metrics = {name: measured[f"eval_{name}"] for name in [metric] if f"eval_{name}" in measured}
    own = trainer.args
    record = StageRecord(
        stage.name, stage.data, stage.teacher, trainer.state.global_step, seconds,
        losses[0] if losses else None, losses[-1] if losses else None, carried, metrics, trainer.objective.describe(),
        {"learning_rate": own.learning_rate, "rows_a_step": own.train_batch_size * own.gradient_accumulation_steps * own.world_size,
         "seed": own.seed},
        stage.student is not None,
    )  # fmt: skip
    trainer.save_model(str(folder))
    if trainer.args.should_save:
        trainer.state.save_to_json(str(folder / STATE))
        save_side_file(folder, trainer.objective, trainer._record())
        partial = folder / f"{RECORD}.partial"
        partial.write_text(json.dumps({**asdict(record), "mark": mark}))
        os.replace(partial, folder / RECORD)
    trainer.accelerator.wait_for_everyone()
    return record


def stages_rows(records: Sequence[StageRecord]) -> list[dict[str, Any]]:
    """Rows of the table of stages, for `results_table`."""
    return [
        {
            "stage": record.name,
            "data": record.data,
            "teacher": record.teacher,
            "steps": record.steps,
            "learning rate": f"{record.settings['learning_rate']:g}",
            "rows a step": record.settings["rows_a_step"],
            "seconds": record.seconds,
            "first loss": record.first_loss,
            "last loss": record.last_loss,
            "adapters carried": record.carried_adapters,
            **record.metrics,
        }
        for record in records
    ]


def staged_objective(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The terms of all stages, each with the name of its stage; `records` are the fields of [`StageRecord`]s."""
    return [{"stage": record["name"], **term} for record in records for term in record["objective"]]
