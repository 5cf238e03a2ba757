"""A student's training in several steps: each stage with its own objective, data, teacher, length, learning rate and frozen parts.

What is carried from stage to stage: the student's weights, and the adapters of terms that are the same in both stages. What
is not: the optimizer and its moments, the learning rate schedule, the step counter, frozen parts, the random state (each stage
has its own seed, derived from the run's).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .arguments import WEIGHTS, DistillationTrainingArguments
from .checkpoints import last_whole_checkpoint
from .models.anatomy import find_blocks
from .models.layer_map import resolve_layer_map
from .models.peft_student import is_peft_student
from .side_file import changed_maps, save_side_file
from .signals import LAYERED_SIGNALS
from .suggest import nearest_or_all
from .teachers import FrozenTeacher
from .terms import Term
from .trainer import DistillationTrainer


MAIN_TEACHER = "teacher"
RECORD = "stage.json"
# Two stages with one seed would draw the same batches and the same dropout.
SEED_STEP = 1000
_SHOWN = ("learning_rate", "per_device_train_batch_size", "seed")
_RESERVED = ("output_dir", "seed", "push_to_hub", "resume_from_checkpoint")


@dataclass
class Stage:
    """One stage of a run.

    Args:
        name (`str`): of its folder, of its row in the table, and of its student as a teacher of later stages.
        data (`str`): which of the recipe's data sets it trains on.
        teacher (`str`, *optional*): which of the recipe's teachers it learns from, or the name of an earlier stage with a
            student of its own; `base` for the run's LoRA student without its adapters; `None` for none.
        student (`dict`, *optional*): sizes of another student that only this stage trains (a teacher assistant), as in
            `build_student`. Default: the run's student goes on.
        progressive (`float`, *optional*): progressive layerwise transfer
            ([MobileBERT](https://huggingface.co/papers/2004.02984)). The stage becomes one stage a block: in the k-th only the
            losses at block k count, later blocks and the head are frozen, and embeddings and earlier blocks train at the
            learning rate times this number (0 freezes them; the paper has 0.1).
        carry_adapters (`bool`): take over the adapters of the stage before where a term has the same name, layer map and shapes.
        settings (`dict`): training arguments of this stage. Where it names `objective` or any weight, that is its whole
            objective: weights it does not name are 0. `num_train_epochs` replaces the run's `max_steps`.

    Raises:
        ValueError: for settings that are no training arguments or that belong to the whole run.
    """

    name: str
    data: str = "train"
    teacher: str | None = MAIN_TEACHER
    student: dict[str, Any] | None = None
    progressive: float | None = None
    carry_adapters: bool = True
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name or not self.name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"A stage is called {self.name!r}, which cannot name a folder. Use letters, digits, '-' and '_'.")
        if self.name == MAIN_TEACHER:
            raise ValueError("A stage cannot be called 'teacher': that is the run's teacher. Choose another name.")
        if self.teacher == "none":
            self.teacher = None
        known = [f.name for f in fields(DistillationTrainingArguments) if f.init]
        own = [f.name for f in fields(type(self)) if f.name != "settings"]
        for key in self.settings:
            if key in _RESERVED:
                raise ValueError(f"Stage {self.name!r} sets {key}, which belongs to the whole run. Set it beside 'stages'.")
            if key not in known:
                raise ValueError(f"Stage {self.name!r} has no setting {key!r}.{nearest_or_all(key, [*own, *known])}")
        if self.progressive is not None:
            number = isinstance(self.progressive, (int, float)) and not isinstance(self.progressive, bool)
            if not number or not 0 <= self.progressive <= 1:
                raise ValueError(
                    f"Stage {self.name!r} has progressive={self.progressive!r}: it is the factor of the learning rate of earlier blocks, "
                    "from 0 (frozen) to 1. Use 0.1, or leave it out."
                )

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Stage:
        """A stage from YAML: keys that are no field of `Stage` are training arguments.

        Example:
            >>> Stage.from_dict({"name": "hints", "hidden_weight": 1.0, "max_steps": 100}).settings
            {'hidden_weight': 1.0, 'max_steps': 100}
        """
        if not isinstance(entry, Mapping) or "name" not in entry:
            raise ValueError(f"A stage needs at least a 'name', got {entry!r}. Example: {{'name': 'hints', 'hidden_weight': 1.0}}.")
        own = {f.name for f in fields(cls)}
        rest = {key: value for key, value in entry.items() if key not in own}
        given = {key: value for key, value in entry.items() if key in own}
        return cls(**{**given, "settings": {**given.get("settings", {}), **rest}})


def resolve_stages(entries: Sequence[Stage | Mapping[str, Any]]) -> list[Stage]:
    """Stages of a run from Python or YAML.

    Raises:
        ValueError: for an empty list, a name that stands twice, and a last stage that does not train the run's student.
    """
    stages = [entry if isinstance(entry, Stage) else Stage.from_dict(entry) for entry in entries]
    if not stages:
        raise ValueError("stages is an empty list: there is nothing to train. Give at least one stage, or leave stages out.")
    names = [stage.name for stage in stages]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Two stages are called {twice[0]!r}, so their folders would be one. Give one of them another name.")
    if stages[-1].student is not None:
        raise ValueError(
            f"The last stage, {names[-1]!r}, trains a student of its own, so the run's student would not be the result. Add a stage "
            f"without 'student' that has teacher: {names[-1]}."
        )
    return stages


def stage_arguments(args: DistillationTrainingArguments, stage: Stage, index: int, output_dir: str) -> DistillationTrainingArguments:
    """The arguments of the run with the settings of one stage."""
    settings = dict(stage.settings)
    base: dict[str, Any] = {"frozen_parts": None, "learning_rate_scales": None}
    defaults = {f.name: f.default for f in fields(DistillationTrainingArguments)}
    if "objective" in settings:
        base |= {"schedules": None, **{name: defaults[name] for name in WEIGHTS}}
    elif any(name in settings for name in WEIGHTS):
        base |= {"objective": None, "schedules": None, **dict.fromkeys(WEIGHTS, 0.0)}
    if "num_train_epochs" in settings and "max_steps" not in settings:
        base["max_steps"] = -1
    return replace(args, **{**base, **settings}, output_dir=output_dir, seed=args.seed + SEED_STEP * index, push_to_hub=False)


def expand_progressive(stage: Stage, args: DistillationTrainingArguments, depth: int, teacher_depth: int) -> list[Stage]:
    """The stages, one a block, that a progressive stage stands for.

    Raises:
        ValueError: when the layer map does not give each block one teacher block, or no term compares layers.
    """
    if stage.progressive is None:
        return [stage]
    merged = stage_arguments(args, stage, 0, args.output_dir)
    entries = merged.objective
    layered = [Term.from_dict(entry).loss_signal in LAYERED_SIGNALS for entry in entries or []]
    if not (any(layered) or merged.hidden_weight or merged.attention_weight or merged.cosine_weight):
        raise ValueError(f"The progressive stage {stage.name!r} has no term that compares layers. Set hidden_weight or attention_weight.")
    pairs = resolve_layer_map(merged.layer_map, depth, teacher_depth, seed=args.seed)
    if [s for s, _ in pairs] != list(range(depth)):
        raise ValueError(
            f"The progressive stage {stage.name!r} trains block after block, but its layer_map {merged.layer_map!r} gives {pairs}, not one "
            "teacher block for each student block. Use 'uniform' or explicit pairs."
        )
    expanded = []
    for block, teacher_block in pairs:
        pair = f"{block}:{teacher_block}"
        settings = {**stage.settings, "layer_map": pair}
        if merged.cosine_weight:
            settings["cosine_layer_map"] = pair
        if entries:
            settings["objective"] = [{**entry, "layer_map": pair} if is_layered else entry for entry, is_layered in zip(entries, layered)]
        frozen = [*(merged.frozen_parts or []), "head"]
        if block < depth - 1:
            frozen.append(f"blocks.{block + 1}-{depth - 1}")
        earlier = ["embeddings", *([f"blocks.0-{block - 1}"] if block else [])] if block else []
        if stage.progressive:
            settings["learning_rate_scales"] = {**(merged.learning_rate_scales or {}), **dict.fromkeys(earlier, stage.progressive)}
        else:
            frozen += earlier
        settings["frozen_parts"] = frozen
        expanded.append(replace(stage, name=f"{stage.name}_{block}", progressive=None, settings=settings))
    return expanded


@dataclass
class StageRecord:
    """What one finished stage did, as written to `stage.json`.

    `objective` is the stage's own as resolved, `settings` what differs from stage to stage: learning rate, rows per process, seed.
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
    teachers = {"base": "base", **teachers}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    records, previous, trainer = [], None, None  # previous: the last trainer of the run's own student
    for stage, plan in zip(stages, plans):
        if stage.student is None:
            student = model
            for name, p in model.named_parameters():
                p.requires_grad_(trainable[name])
        else:
            student = build(stage.student)
        if trainer is not None:
            _release(trainer)
        trainer = trainer_for(student, plan, datasets[stage.data], None if stage.teacher is None else teachers[stage.teacher])
        carried = _carry_adapters(previous, trainer) if stage.carry_adapters and previous is not None else 0
        if plan.should_log:
            print(f"\n== Stage {len(records) + 1} of {len(stages)}: {stage.name}", flush=True)
        records.append(_finish(stage, trainer, carried, metric))
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
                f"{stage.teacher!r}{' and it has a student of its own' if stage.student is not None else ''}."
            )
        expanded += expand_progressive(stage, args, find_blocks(model).depth, find_blocks(teacher).depth)
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
            known.append(stage.name)


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
    same = {
        key: value
        for key, value in before.items()
        if key in now and now[key].shape == value.shape and not any(key.startswith(f"terms.{name}.") for name in changed)
    }
    with torch.no_grad():
        for key, value in same.items():
            now[key].copy_(value)
    return len(same)


def _finish(stage: Stage, trainer: DistillationTrainer, carried: int, metric: str | None) -> StageRecord:
    folder = Path(trainer.args.output_dir)
    if (folder / RECORD).is_file():
        trainer._load_from_checkpoint(str(folder))
        if trainer.args.should_log:
            print(f"{stage.name} is finished already")
        return StageRecord(**json.loads((folder / RECORD).read_text()))
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
    record = StageRecord(
        stage.name, stage.data, stage.teacher, trainer.state.global_step, seconds,
        losses[0] if losses else None, losses[-1] if losses else None, carried, metrics, trainer.objective.describe(),
        {name: getattr(trainer.args, name) for name in _SHOWN},
    )  # fmt: skip
    trainer.save_model(str(folder))
    if trainer.args.should_save:
        save_side_file(folder, trainer.objective, trainer._record())
        partial = folder / f"{RECORD}.partial"
        partial.write_text(json.dumps(asdict(record)))
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
            "rows a step": record.settings["per_device_train_batch_size"],
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
