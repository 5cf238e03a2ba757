"""A recipe's arms (teacher, alone, distilled, control): each trained once, measured once, kept apart, never mixed with another run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .arguments import WITHOUT_TEACHER
from .checkpoints import last_whole_checkpoint
from .export import merged_student
from .models.peft_student import is_peft_student
from .plots import plot_results
from .report import print_table, results_rows, write_results
from .run_card import staged_card
from .stage_training import stages_rows, train_stages
from .trainer import DistillationTrainer


# The Trainer uploads everything in output_dir but names that start with `_` or `checkpoint-`.
ARMS = "_arms"
MARK = "_run.json"
MODEL_FILES = (".safetensors", ".bin", ".json", ".txt", ".model")


@dataclass
class Arm:
    """One finished training, or one evaluation of a given model.

    Attributes:
        name: such as `distilled_0`.
        trainer: holds the trained model.
        metrics: of the held-out data, with the prefix `eval_`.
        logits: of the held-out data, `(rows, classes)`.
        labels: of the held-out data.
        seconds: of training; `None` where it was resumed.
        log_history: what the trainer logged.
        steps: optimizer steps of this model, those of all its stages together; 0 where nothing was trained.
        stages: one record a stage, the fields of [`StageRecord`].
    """

    name: str
    trainer: DistillationTrainer
    metrics: dict[str, float]
    logits: np.ndarray
    labels: np.ndarray
    seconds: float | None = 0.0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    stages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def model(self):
        return self.trainer.model


@dataclass(frozen=True)
class Comparison:
    """What a distilled student is compared with: a student of the same first weights, trained for as many steps on something else.

    Attributes:
        title: what is trained on what, for the log.
        rows: the training data.
        changes: training arguments that differ from those of the distilled student.
        teacher: `None` for a student without one.
        steps: instead of those of the distilled student.
    """

    title: str
    rows: Any
    changes: Mapping[str, Any]
    teacher: Any = None
    steps: int | None = None


def label_comparisons(labelled, transfer, teacher_rows, noun: str = "labelled texts") -> dict[str, Comparison]:
    """The student alone on its labelled rows; and, where its teacher has more of them, the control: the student on all of those.

    Args:
        labelled, transfer, teacher_rows: encoded splits.
        noun: what the rows are, for the log.
    """
    others = {"alone": Comparison(f"student alone, {len(labelled)} {noun}", labelled, WITHOUT_TEACHER)}
    if len(transfer):
        others["control"] = Comparison(f"control, student on the teacher's {len(teacher_rows)} {noun}", teacher_rows, WITHOUT_TEACHER)
    return others


class Run:
    """The output folder of a recipe.

    An arm that finished is read back instead of trained again, one that was killed goes on from its last checkpoint; both
    only where the fingerprint is the same. A run that fails before its first arm leaves no mark.

    Args:
        args: `DistillationTrainingArguments` of the recipe.
        fingerprint: of everything that decides the results: settings, data, checkpoints. See [`run_fingerprint`].
        overwrite: start anew; arms in the folder are deleted.
        evaluate: `trainer -> (metrics, predictions, labels)`, where `trainer.predict(trainer.eval_dataset)` is not what measures a
            model; the metrics have the prefix `eval_`.

    Raises:
        ValueError: when the folder holds another run, or a model of other origin.
    """

    def __init__(self, args, fingerprint: str, overwrite: bool = False, evaluate: Callable | None = None):
        self.args = args
        self.evaluate = evaluate or _predict
        self.root = Path(args.output_dir)
        # Batches are put together anew on another number of processes.
        self.fingerprint = fingerprint if args.world_size == 1 else f"{fingerprint} on {args.world_size} processes"
        with args.main_process_first(desc="output folder"):
            held = self._held()
            foreign = held is None and any((self.root / name).exists() for name in ("config.json", "model.safetensors"))
            if overwrite:
                if args.should_save:
                    shutil.rmtree(self.root / ARMS, ignore_errors=True)
                    (self.root / MARK).unlink(missing_ok=True)
            elif held not in (None, self.fingerprint):
                raise ValueError(
                    f"output_dir {str(self.root)!r} holds a run with other settings, data, checkpoints or processes (run "
                    f"{_short(held)}, this one is {_short(self.fingerprint)}): going on would mix the two. Choose another "
                    "--output_dir, or pass --overwrite_output_dir true to start anew."
                )
            elif foreign:
                raise ValueError(
                    f"output_dir {str(self.root)!r} holds a model that this recipe did not write, and it would be overwritten. Choose "
                    "another --output_dir, or pass --overwrite_output_dir true."
                )

    def _held(self) -> str | None:
        mark = self.root / MARK
        return json.loads(mark.read_text())["fingerprint"] if mark.is_file() else None

    def _claim(self) -> None:
        if self._held() != self.fingerprint:
            self.root.mkdir(parents=True, exist_ok=True)
            partial = self.root / f"{MARK}.partial"
            partial.write_text(json.dumps({"fingerprint": self.fingerprint}))
            os.replace(partial, self.root / MARK)

    def folder(self, arm: str) -> str:
        return str(self.root / ARMS / arm)

    def settings(self, arm: str, **changes) -> Any:
        """The training arguments of one arm."""
        return replace(self.args, output_dir=self.folder(arm), push_to_hub=False, **changes)

    def say(self, text: str) -> None:
        """A heading between progress bars, on the main process."""
        if self.args.should_log:
            print(f"\n== {text}", flush=True)

    def finish(self, name: str, trainer: DistillationTrainer) -> Arm:
        """Trains `trainer`, measures it on its `eval_dataset`, saves the model and the figures in the folder of the arm."""
        done = self._read(name, trainer)
        if done is not None:
            self.say(f"{name} is finished already")
            return done
        folder = self.folder(name)
        if self.args.should_save:
            self._claim()
        checkpoint = last_whole_checkpoint(folder, trainer.accelerator.num_processes)
        start = time.perf_counter()
        trainer.train(resume_from_checkpoint=checkpoint)
        seconds = time.perf_counter() - start if checkpoint is None else None  # what went before the kill is not known
        _merge(trainer)
        arm = self._measure(name, trainer, seconds)
        trainer.save_model(folder)
        self._write(arm)
        return arm

    def finish_stages(self, name: str, stages, model, seed: int, **options) -> Arm:
        """As `finish`, for a student that is trained in stages with `seed`; `options` are those of [`train_stages`].

        The record of every stage is printed and kept in `Arm.stages`.
        """
        if self.args.should_save:
            self._claim()
        trainer, records = train_stages(stages, model, self.settings(name, seed=seed), **options)
        arm = self._read(name, trainer)
        if arm is None:
            _merge(trainer)
            seconds = [record.seconds for record in records]
            arm = self._measure(name, trainer, None if None in seconds else sum(seconds))
            arm.steps = sum(record.steps for record in records if not record.assistant)
            arm.stages = [asdict(record) for record in records]
            trainer.save_model(self.folder(name))
            self._write(arm)
        if self.args.should_log:
            print_table(stages_rows(records), title=f"Stages of {name}")
        return arm

    def measure(self, name: str, trainer: DistillationTrainer) -> Arm:
        """As `finish`, for a model that is not trained here."""
        return self._measure(name, trainer, 0.0)

    def finish_teacher(self, pair, trainer_for: Callable, rows, title: str, alone: Mapping[str, Any] = WITHOUT_TEACHER) -> Arm:
        """The teacher of `pair` ([`ModelPair`]), trained on `rows` where it must be, else measured as it is.

        Args:
            trainer_for: `(model, arguments, rows) -> trainer`.
            title: what it is trained on, for the log.
            alone: training arguments of a model without a teacher; `teacher_training` of the recipe comes on top of them.
        """
        changes = {**alone, **(pair.recipe.teacher_training or {})}
        if pair.needs_teacher_training:
            self.say(f"Teacher: {title}")
            arm = self.finish("teacher", trainer_for(pair.teacher, self.settings("teacher", **changes), rows))
        else:
            self.say("Teacher: measured as it is")
            arm = self.measure("teacher", trainer_for(pair.teacher, self.settings("teacher", **changes)))
        pair.teacher = arm.model
        return arm

    def finish_students(
        self,
        recipe,
        build: Callable,
        trainer_for: Callable,
        datasets: Mapping[str, Any],
        teachers: Mapping[str, Any],
        metric: str,
        title: str,
        comparisons: Mapping[str, Comparison],
    ) -> dict[str, list[Arm]]:
        """For every seed of `recipe`: the distilled student, and what it is compared with, for as many steps.

        Args:
            recipe: [`RecipeArguments`], of which `seeds` and `stages` are used.
            build: `(seed, say=None, **sizes) -> student`; `sizes` are those of a teacher assistant.
            trainer_for: `(model, arguments, rows, teacher) -> trainer`.
            datasets: name -> training data, for `data` of the stages; without stages the student learns from `"train"`.
            teachers: name -> model, for `teacher` of the stages; without stages the student learns from `"teacher"`.
            metric: shown for each stage.
            title: what the distilled student is trained on, for the log.
            comparisons: name -> what else is trained.
        """
        arms: dict[str, list[Arm]] = {**{name: [] for name in comparisons}, "distilled": []}
        for seed in recipe.seeds:
            name, how = f"distilled_{seed}", f" in {len(recipe.stages)} stages" if recipe.stages else ""
            self.say(f"Seed {seed}: student distilled{how}, {title}")
            student = build(seed, self.say if seed == recipe.seeds[0] else None)
            if recipe.stages:
                arm = self.finish_stages(
                    name,
                    recipe.stages,
                    student,
                    seed=seed,
                    datasets=datasets,
                    teachers=teachers,
                    trainer_for=trainer_for,
                    build=lambda sizes, seed=seed: build(seed, **sizes),
                    metric=metric,
                )
            else:
                arm = self.finish(name, trainer_for(student, self.settings(name, seed=seed), datasets["train"], teachers["teacher"]))
            arms["distilled"].append(arm)
            for kind, other in comparisons.items():
                steps = other.steps or arm.steps
                self.say(f"Seed {seed}: {other.title}, {steps} steps")
                own = self.settings(f"{kind}_{seed}", seed=seed, **{**other.changes, "max_steps": steps})
                arms[kind].append(self.finish(f"{kind}_{seed}", trainer_for(build(seed), own, other.rows, other.teacher)))
        return arms

    def publish(self, arm: Arm, results: dict[str, Any], limits: str | None = None) -> None:
        """Writes the student of `arm`, `results.json`, `results.png` and the card into the output folder and prints the table.

        With `push_to_hub` in the arguments all of it is pushed.
        """
        trainer = arm.trainer
        trainer.args.output_dir = str(self.root)
        trainer.save_model(str(self.root))
        if self.args.should_save:
            self._claim()  # not done yet where no arm was trained
            results = write_results(results, self.root / "results.json")
            rows = results_rows(results)
            print_table(rows, title=results["task"])
            plot_results(results, self.root / "results.png", arm.log_history)
            metric, seeds = results["metric"], results["seeds"]
            trainer.card = {
                "dataset": results["task"],
                "results": rows,
                "results_note": f"Mean ± standard deviation over the student's seeds {seeds}; the published student is that of seed "
                f"{seeds[0]}. `{results['command']}`",
                "metric_values": {metric: arm.metrics[f"eval_{metric}"]},
                **({"limits": limits} if limits else {}),
                **(staged_card(arm.stages) if arm.stages else {}),
            }
        if self.args.push_to_hub:
            trainer.push_to_hub()
        else:
            trainer.create_model_card()

    def _measure(self, name: str, trainer: DistillationTrainer, seconds: float | None) -> Arm:
        metrics, predictions, labels = self.evaluate(trainer)
        trainer.log_metrics("eval", metrics)
        history = list(trainer.state.log_history)
        return Arm(name, trainer, metrics, np.asarray(predictions), np.asarray(labels), seconds, history, trainer.state.global_step)

    def _write(self, arm: Arm) -> None:
        if self.args.should_save:
            folder = Path(self.folder(arm.name))
            np.savez(folder / "predictions.npz", logits=arm.logits, labels=arm.labels)
            record = {
                "metrics": arm.metrics, "seconds": arm.seconds, "log_history": arm.log_history, "steps": arm.steps, "stages": arm.stages,
            }  # fmt: skip
            partial = folder / "arm.json.partial"
            partial.write_text(json.dumps(record))
            os.replace(partial, folder / "arm.json")
        arm.trainer.accelerator.wait_for_everyone()

    def _read(self, name: str, trainer: DistillationTrainer) -> Arm | None:
        folder = Path(self.folder(name))
        if not (folder / "arm.json").is_file():
            return None
        record = json.loads((folder / "arm.json").read_text())
        _merge(trainer)
        model = type(trainer.model).from_pretrained(folder)
        trainer.model.load_state_dict(model.state_dict())
        trainer.model.eval()  # as after its training and measuring
        with np.load(folder / "predictions.npz", allow_pickle=False) as arrays:
            arm = Arm(name, trainer, record["metrics"], arrays["logits"], arrays["labels"])
        for key in ("seconds", "log_history", "steps", "stages"):
            setattr(arm, key, record[key])
        return arm


def _merge(trainer: DistillationTrainer) -> None:
    """An arm is measured, saved and published as a plain model: one with PEFT adapters gets them merged into its weights."""
    if is_peft_student(trainer.model):
        trainer.replace_student(merged_student(trainer))


def _predict(trainer: DistillationTrainer):
    output = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
    return output.metrics, output.predictions, output.label_ids


def _short(fingerprint: str) -> str:
    digest, _, processes = fingerprint.partition(" ")
    return f"{digest[:12]} {processes}".strip()


def open_run(recipe, args, config_sha256: str, data_fingerprint: str, evaluate: Callable | None = None) -> Run:
    """The [`Run`] that the arguments of a recipe describe.

    Args:
        recipe: [`RecipeArguments`]; the checkpoints that it names count with the contents of their files.
        args: `DistillationTrainingArguments`.
        config_sha256: of both.
        data_fingerprint: of all texts and labels.
        evaluate: as in [`Run`].
    """
    named = ("teacher_model_name_or_path", "general_teacher_name_or_path", "model_name_or_path", "tokenizer_name")
    fingerprint = run_fingerprint(config_sha256, data_fingerprint, [getattr(recipe, name, None) for name in named])
    return Run(args, fingerprint, overwrite=recipe.overwrite_output_dir, evaluate=evaluate)


def run_fingerprint(config_sha256: str, data_fingerprint: str, checkpoints: list[str | None]) -> str:
    """sha256 of what decides the results of a run: its settings, its data, and the files of local models and tokenizers.

    Args:
        checkpoints: folders or Hub ids; the latter are known by name (and revision, which is a setting).
    """
    digest = hashlib.sha256(f"{config_sha256} {data_fingerprint}".encode())
    for folder in filter(None, checkpoints):
        for path in sorted(Path(folder).iterdir()) if os.path.isdir(folder) else []:
            if path.suffix in MODEL_FILES and path.is_file():
                with open(path, "rb") as file:
                    digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
