"""A student's training in several steps: each stage with its own objective, data, teacher, length, learning rate and frozen parts.

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
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .arguments import WEIGHTS, DistillationTrainingArguments
from .checkpoints import last_whole_checkpoint
from .models.anatomy import find_blocks, unwrap_peft
from .models.layer_map import resolve_layer_map
from .models.parts import has_head
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
# One teacher and one student go through all stages: what changes the models themselves cannot change in between.
_RESERVED = (
    "output_dir", "seed", "push_to_hub", "resume_from_checkpoint", "teacher_dtype", "teacher_device", "activation_checkpointing",
    "gradient_checkpointing",
)  # fmt: skip
# What may differ between two starts of one run.
_PLACES = (
    "output_dir", "logging", "log_", "report_to", "disable_tqdm", "run_name", "hub_", "push_to_hub", "dataloader_", "save_", "use_cpu",
    "local_rank", "_n_gpu", "ddp_",
)  # fmt: skip


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
            ([MobileBERT](https://huggingface.co/papers/2004.02984)). The stage becomes one stage a block: in the k-th its terms on
            layers compare block k alone, later blocks and the head are frozen, and from the second on embeddings and earlier
            blocks train at the learning rate times this number (0 freezes them; the paper has 0.1).
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
    base: dict[str, Any] = {}
    defaults = {f.name: f.default for f in fields(DistillationTrainingArguments)}
    if "objective" in settings:
        base |= {"schedules": None, **{name: defaults[name] for name in WEIGHTS}}
    elif any(name in settings for name in WEIGHTS):
        base |= {"objective": None, "schedules": None, **dict.fromkeys(WEIGHTS, 0.0)}
    if "num_train_epochs" in settings and "max_steps" not in settings:
        base["max_steps"] = -1
    return replace(args, **{**base, **settings}, output_dir=output_dir, seed=args.seed + SEED_STEP * index, push_to_hub=False)


def expand_progressive(
    stage: Stage, args: DistillationTrainingArguments, depth: int, teacher_depth: int, head: bool = True, recorded: list[int] | None = None
) -> list[Stage]:
    """The stages, one a block, that a progressive stage stands for.

    Args:
        head: whether the student has parameters behind its blocks.
        recorded: teacher block of each student block, for `layer_map="original"`.

    Raises:
        ValueError: when the layer map does not give each block one teacher block, no term compares layers, or a term has a layer
            map of its own.
    """
    if stage.progressive is None:
        return [stage]
    merged = stage_arguments(args, stage, 0, args.output_dir)
    entries = merged.objective
    layered = [Term.from_dict(entry).loss_signal in LAYERED_SIGNALS for entry in entries or []]
    if not (any(layered) or merged.hidden_weight or merged.attention_weight or merged.cosine_weight):
        raise ValueError(f"The progressive stage {stage.name!r} has no term that compares layers. Set hidden_weight or attention_weight.")
    own = next((entry for entry, is_layered in zip(entries or [], layered) if is_layered and entry.get("layer_map") is not None), None)
    if own is not None:
        raise ValueError(
            f"The progressive stage {stage.name!r} goes through the blocks itself, but its term {own['loss']!r} has the layer_map "
            f"{own['layer_map']!r}, which would not be used. Set layer_map beside the objective."
        )
    pairs = resolve_layer_map(merged.layer_map, depth, teacher_depth, seed=args.seed, recorded=recorded)
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
        frozen = [*(merged.frozen_parts or []), *(["head"] if head else [])]
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
    teachers = {"base": "base", **teachers}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}

    def set_up(stage, plan):
        for name, p in model.named_parameters():
            p.requires_grad_(trainable[name])
        student = model if stage.student is None else build(stage.student)
        return trainer_for(student, plan, datasets[stage.data], None if stage.teacher is None else teachers[stage.teacher])

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


def _mark(stage: Stage, plan: DistillationTrainingArguments, before: str) -> str:
    """A hash of what decides the weights after a stage, as far as the arguments say: its settings and those of the stages before."""
    settings = {key: value for key, value in plan.to_dict().items() if not key.startswith(_PLACES)}
    return hashlib.sha256(json.dumps([asdict(stage), settings, before], sort_keys=True, default=str).encode()).hexdigest()


def _finish(stage: Stage, trainer: DistillationTrainer, carried: int, metric: str | None, mark: str) -> StageRecord:
    folder = Path(trainer.args.output_dir)
    if (folder / RECORD).is_file():
        written = json.loads((folder / RECORD).read_text())
        if written.pop("mark") != mark:
            raise ValueError(
                f"The finished stage in {str(folder)!r} was trained with other settings, or after other stages. Choose another output_dir, "
                "or delete this folder and those of later stages."
            )
        trainer._load_from_checkpoint(str(folder))
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
