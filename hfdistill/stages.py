"""What a stage of a run is: its own objective, data, teacher, student, length, learning rate and frozen parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .arguments import WEIGHTS, DistillationTrainingArguments
from .models.layer_map import resolve_layer_map
from .signals import LAYERED_SIGNALS
from .suggest import nearest_or_all
from .terms import Term


MAIN_TEACHER = "teacher"
# Two stages with one seed would draw the same batches and the same dropout.
SEED_STEP = 1000
# One teacher and one student go through all stages: what changes the models themselves cannot change in between.
_RESERVED = (
    "output_dir", "seed", "push_to_hub", "resume_from_checkpoint", "teacher_dtype", "teacher_device", "activation_checkpointing",
    "gradient_checkpointing",
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
