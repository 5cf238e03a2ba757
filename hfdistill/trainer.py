"""`DistillationTrainer`: the Hugging Face Trainer with a teacher."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from .alignment import resolve_label_order, resolve_vocabulary
from .arguments import DistillationTrainingArguments
from .capture import Capture, CapturePlan, example_batch
from .counting import Denominators, count_units, labels_of
from .models.anatomy import task_of, unwrap_peft
from .models.layer_map import layer_map_table
from .objective import Objective, Pairs, Part, build_objective
from .side_file import load_side_file, read_record, save_side_file
from .teachers import CallableTeacher, FrozenTeacher
from .teachers.loading import load_teacher, load_tokenizer
from .terms import Term, resolve_terms


NOTHING = CapturePlan(logits=False)


@dataclass
class Window:
    """What holds for all micro-batches of one optimizer step."""

    progress: float
    pairs: dict[str, Pairs]
    student_plan: CapturePlan
    teacher_plan: CapturePlan
    denominators: Denominators


class DistillationTrainer(Trainer):
    """Trains a student under a teacher; everything else is `transformers.Trainer`.

    Args:
        model, args, data_collator, train_dataset, eval_dataset, processing_class, model_init, compute_metrics, callbacks,
            optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics: as in `Trainer`; `model` is the student and
            `args` a [`DistillationTrainingArguments`]. For language models with `compute_metrics`, logits are reduced to
            the best token unless `preprocess_logits_for_metrics` is given: whole vocabularies do not fit in memory.
        teacher (`nn.Module`, `str` or callable, *optional*): a model, a folder or Hub id, or a function `batch -> Signals`
            (or logits). Without a teacher, and with `task_weight` alone, this is a plain Trainer.
        objective (`list` of [`Term`], *optional*): replaces the weights of the arguments.
        teacher_processing_class (*optional*): the teacher's tokenizer, compared with `processing_class`.

    Raises:
        ValueError: at construction, for everything that could not train what was asked for: labels, vocabularies, layers,
            attention, widths, heads or columns that do not fit, and weights that do nothing.

    Every term is divided by the number of its rows in the whole accumulation window and on all ranks, so cutting a batch
    differently does not change the gradient. `outputs.loss` of the student is never used. Evaluation runs the student
    alone, unless `eval_with_teacher` is set, and `eval_loss` is then its task loss.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module | None = None,
        args: DistillationTrainingArguments | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_loss_func=None,
        compute_metrics=None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers=(None, None),
        optimizer_cls_and_kwargs=None,
        preprocess_logits_for_metrics=None,
        *,
        teacher: nn.Module | str | Callable | None = None,
        objective: list[Term] | None = None,
        teacher_processing_class=None,
    ):
        if args is None:
            args = DistillationTrainingArguments("tmp_trainer")
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
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
                if part is not None and hasattr(part, "__len__") and len(part) == 0:
                    raise ValueError(f"{name} is empty: there is nothing to {'train' if name == 'train_dataset' else 'evaluate'} on. Check its filters and file.")
        self.objective: Objective | None = None
        self._given_terms = objective
        self._given_teacher = teacher
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs are visible to one process, which would run DataParallel; its averaging of losses is not supported. "
                "Start with `accelerate launch`, or show one GPU with CUDA_VISIBLE_DEVICES=0."
            )
        self.teacher_processing_class = teacher_processing_class
        self.teacher = self._resolve_teacher(teacher)
        self._bind()
        self.add_callback(_ObjectiveCallback(self))
        if (
            self.preprocess_logits_for_metrics is None
            and self.compute_metrics is not None
            and self.objective.task in ("masked_lm", "causal_lm")
        ):
            self.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(-1)

    # ---- Set-up ----

    def _resolve_teacher(self, teacher) -> FrozenTeacher | CallableTeacher | None:
        if teacher is None or isinstance(teacher, (FrozenTeacher, CallableTeacher)):
            return teacher
        if isinstance(teacher, (str, os.PathLike)):
            name, task = os.fspath(teacher), task_of(self.model)
            options = self.args.teacher_model_init_kwargs or {}
            if task == "sequence" and getattr(unwrap_peft(self.model), "main_input_name", None) == "pixel_values":
                task = "image"
            teacher = load_teacher(name, task, options)
            if self.teacher_processing_class is None and isinstance(self.processing_class, PreTrainedTokenizerBase):
                self.teacher_processing_class = load_tokenizer(name, options.get("revision"))
        if not isinstance(teacher, nn.Module):
            if not callable(teacher):
                raise ValueError(f"teacher must be a module, a folder or Hub id, or a function that answers a batch, got {type(teacher).__name__}.")
            return CallableTeacher(teacher)
        dtype = getattr(torch, self.args.teacher_dtype) if self.args.teacher_dtype else None
        mixed = self.args.teacher_dtype is None and self.accelerator.mixed_precision in ("bf16", "fp16")
        return FrozenTeacher(
            teacher,
            device=self.args.teacher_device or self.args.device,
            dtype=dtype,
            batch_size=self.args.teacher_batch_size,
            autocast=self.accelerator.autocast if mixed else nullcontext,
        )

    def _bind(self, fixed_maps: Mapping[str, Pairs] | None = None) -> None:
        """Builds the objective for the current student and teacher."""
        args = self.args
        terms = resolve_terms(args, self._given_terms)
        wants = [term.name for term in terms if not term.is_task]
        if wants and self.teacher is None:
            raise ValueError(
                f"The terms {wants} compare the student with a teacher, but there is none. Pass teacher=..., or set kd_weight=0 and "
                "the other weights but task_weight to 0 to train without one."
            )
        if self.objective is not None:
            self.student.release()
        self.student = Capture(self.model, "student")
        teacher = self.teacher.capture if isinstance(self.teacher, FrozenTeacher) else None
        self._signature_columns = None
        self._check_columns(terms)
        example, labels_dtype = self._example()
        calibration = None
        if "similar" in [args.layer_map, *(term.layer_map for term in terms if isinstance(term.layer_map, str))]:
            calibration = self._collate(args.calibration_samples)
        config = getattr(unwrap_peft(self.model), "config", None)
        self.objective = build_objective(
            terms,
            self.student,
            teacher,
            args,
            example,
            labels_dtype=labels_dtype,
            recorded=(getattr(config, "distilled_from", None) or {}).get("layers"),
            calibration=calibration,
            fixed_maps=fixed_maps,
        ).to(args.device)
        if config is not None and self.objective.problem_type and getattr(config, "problem_type", None) is None:
            config.problem_type = self.objective.problem_type  # the stock forward pass would have set it; pipelines read it
        if any(True for _ in self.objective.parameters()) and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                "Adapters are not sharded by FSDP or DeepSpeed. Use DDP (recipes/accelerate/multi_gpu.yaml), or a student as wide as the teacher."
            )
        self._align(teacher)
        self._window: Window | None = None
        self._check_counts = True
        self._notes: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}
        self._eval_notes: dict[str, tuple[float, Tensor, Tensor]] = {}

    def _align(self, teacher: Capture | None) -> None:
        """Label order and vocabulary of the two models."""
        student_config = getattr(self.student.inner, "config", None)
        teacher_config = getattr(teacher.inner, "config", None) if teacher is not None else None
        if student_config is None or teacher_config is None:
            return
        uses_logits = any(term.signal == "logits" and not term.term.is_task for term in self.objective.terms.values())
        if uses_logits and self.objective.task in ("sequence", "token"):
            self.objective.label_order = resolve_label_order(student_config, teacher_config, self.args.teacher_label_order)
        sizes = [getattr(config, "vocab_size", None) for config in (student_config, teacher_config)]
        if None not in sizes:
            tokenizers = [t if isinstance(t, PreTrainedTokenizerBase) else None for t in (self.processing_class, self.teacher_processing_class)]
            shared = resolve_vocabulary(*sizes, *tokenizers)
            if self.objective.task in ("masked_lm", "causal_lm"):
                self.objective.vocabulary = shared

    def _collate(self, count: int) -> dict | None:
        """The first samples of the training data as a batch on the device; random states are left as they were."""
        if self.train_dataset is None or not hasattr(self.train_dataset, "__getitem__") or not hasattr(self.train_dataset, "__len__"):
            return None
        collate = self._get_collator_with_removed_columns(self.data_collator)
        with torch.random.fork_rng(devices=[]):
            batch = collate([self.train_dataset[i] for i in range(min(count, len(self.train_dataset)))])
        return dict(self._prepare_inputs(batch))

    def _example(self) -> tuple[Mapping, torch.dtype | None]:
        """A tiny batch for shapes, and the dtype of the labels where there is data."""
        batch = self._collate(2)
        labels = labels_of(batch) if batch is not None else None
        if batch is None:
            batch = example_batch(self.model)
        return batch, None if labels is None else labels.dtype

    def _check_columns(self, terms: list[Term]) -> None:
        names = getattr(self.train_dataset, "column_names", None)
        if not names or not self.args.remove_unused_columns:
            return
        main = getattr(unwrap_peft(self.model), "main_input_name", None)
        if main is not None and main not in names and "inputs_embeds" not in names:
            raise ValueError(
                f"The training data has no column {main!r}, only {sorted(names)}: the student would get no input. Tokenize or preprocess it first "
                f"(dataset.map), or name the column {main!r}."
            )
        if any(term.is_task for term in terms) and not set(names) & {"label", "labels", "label_ids"} and self.objective is None:
            if type(self.data_collator).__name__ in ("DataCollatorWithPadding", "function"):
                raise ValueError(
                    f"The training data has no column 'labels' or 'label', only {sorted(names)}, but the objective has a task term. Add labels "
                    "(-100 where one is missing), or set task_weight to 0 to learn from the teacher alone."
                )

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        extra = [] if self.teacher is None else self.teacher.columns
        self._signature_columns += [name for name in [*extra, "labels"] if name not in self._signature_columns]

    def call_model_init(self, trial=None):
        model = super().call_model_init(trial)
        if self.objective is not None:  # a new trial: its student and its weights need a new objective
            self.model = model
            self._bind()
        return model

    # ---- Training ----

    def _progress(self) -> float:
        return min(self.state.global_step / max(self.state.max_steps, 1), 1.0)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        progress, pairs = self._progress(), self.objective.pairs_at(self.state.global_step)
        units = self.objective.units_at(pairs, progress)
        reduce = self.accelerator.reduce if self.accelerator.num_processes > 1 else None
        counts = Denominators(batches, units, self.objective.task, self.objective.problem_type, device, reduce)
        self._window = Window(progress, pairs, *self.objective.plans(pairs, progress), counts)
        for term, _ in self.objective.active(progress):
            self._steps[term.name] = self._steps.get(term.name, 0) + 1
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The weighted objective of one micro-batch, in training; in evaluation see `eval_with_teacher`.

        `num_items_in_batch` is not used: it counts labels only. See `hfdistill.counting`.
        """
        training = model.training and self._window is not None
        if training or (self.args.eval_with_teacher and self.teacher is not None):
            logits, parts = self._parts(model, inputs, self._window if training else None)
            loss = sum(part.weight * part.value for part in parts)
            if training:
                # The trainer averages gradients over ranks, the denominators already count all of them.
                loss = loss * self.accelerator.num_processes
                self._note(parts)
            else:
                for part in parts:
                    self._note_evaluation(part.name, part.weight, part.totals, part.counts, self.objective.terms[part.name].reduction)
        else:
            logits = self.student(inputs, CapturePlan(), forward=model).logits
            total, count, _ = self.objective.task_value(logits, labels_of(inputs))
            loss = total / count.clamp(min=1)
            if not model.training:
                self._note_evaluation("task", 1.0, total.detach()[None], count[None], "mean")
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss

    def _parts(self, model, inputs, window: Window | None) -> tuple[Tensor, list[Part]]:
        if window is None:
            progress, pairs = self._progress(), self.objective.pairs_at(self.state.global_step)
            plans, denominators = self.objective.plans(pairs, progress), None
        else:
            progress, pairs, plans, denominators = (
                window.progress, window.pairs, (window.student_plan, window.teacher_plan), window.denominators,
            )
        student_plan = plans[0] if window is not None else plans[0].union(CapturePlan())
        student = self.student(inputs, student_plan, forward=model)
        teacher = self.teacher(inputs, plans[1]) if plans[1] != NOTHING else None
        parts = self.objective(student, teacher, labels_of(inputs), progress, pairs, denominators)
        if window is not None and self._check_counts:
            self._verify_counts(inputs, pairs, parts, denominators)
        return student.logits, parts

    def _verify_counts(self, inputs, pairs, parts: list[Part], denominators: Denominators) -> None:
        """Once per run: rows predicted from the masks are the rows the losses saw, so the denominators are right."""
        self._check_counts = False
        for part in parts:
            term = self.objective.terms[part.name]
            for pair, seen in zip(pairs.get(part.name, [None]), part.counts.tolist()):
                unit = self.objective.unit_of(term, pair)
                expected = count_units(inputs, [unit], self.objective.task, self.objective.problem_type)[unit]
                if expected is not None and int(expected) != int(seen):
                    raise ValueError(
                        f"The term {part.name!r} compared {int(seen)} rows ({unit.kind}) of the first batch, but {int(expected)} were expected from "
                        f"its masks{'' if pair is None else f' at student block {pair[0]}, teacher block {pair[1]}'}: the loss would be scaled "
                        "wrongly. The two models mask the input differently; remove this term, and please report the architectures."
                    )

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients and self.accelerator.num_processes > 1:
            self._average_adapter_gradients()
        return loss

    def _average_adapter_gradients(self) -> None:
        """One reduction per optimizer step: adapters live outside the student's DDP wrapper."""
        parameters = [p for p in self.objective.parameters() if p.grad is not None]
        if parameters:
            flat = torch.cat([p.grad.flatten() for p in parameters])
            flat = self.accelerator.reduce(flat, "mean")
            for p, piece in zip(parameters, flat.split([p.numel() for p in parameters])):
                p.grad.copy_(piece.view_as(p.grad))

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        present = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [p for p in self.objective.parameters() if id(p) not in present]
        if missing:
            # No decay: it would pull a projection to 0, where it hides a student that does not follow.
            optimizer.add_param_group({"params": missing, "weight_decay": 0.0})
        return optimizer

    def _clip_grad_norm(self, model):
        adapters = list(self.objective.parameters())
        if not adapters:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_([*model.parameters(), *adapters], self.args.max_grad_norm)

    def floating_point_ops(self, inputs):
        own = super().floating_point_ops(inputs)
        if isinstance(self.teacher, FrozenTeacher) and hasattr(self.teacher.model, "floating_point_ops"):
            own += self.teacher.model.floating_point_ops(inputs) // 3  # forward only, of the 6 operations a step counts
        return own

    # ---- Evaluation ----

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        labelled = all(inputs.get(name) is not None for name in self.label_names) and bool(self.label_names)
        if not (labelled and self.args.eval_with_teacher):
            keep = {*self.student.columns, *self.label_names}
            inputs = {name: value for name, value in inputs.items() if name in keep}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"):
        self._eval_notes = {}
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._eval_notes:
            # Exact over the data set: the trainer's own eval_loss averages batch means, whatever their number of rows.
            whole = 0.0
            for name, (weight, reduction, sums) in sorted(self._eval_notes.items()):
                totals, counts = self._reduce(sums)
                values = totals / counts.clamp(min=1)
                value = float(values.sum() if reduction == "sum" else values.mean())
                whole += weight * value
                if self.args.eval_with_teacher:
                    output.metrics[f"{metric_key_prefix}_{name}"] = value
            output.metrics[f"{metric_key_prefix}_loss"] = whole
        return output

    def _note_evaluation(self, name: str, weight: float, totals: Tensor, counts: Tensor, reduction: str) -> None:
        sums = torch.stack([totals.float(), counts.float()]).double() if totals.device.type != "mps" else torch.stack([totals.float(), counts.float()])
        before = self._eval_notes[name][2] if name in self._eval_notes else 0
        self._eval_notes[name] = (weight, reduction, before + sums)

    # ---- Logging ----

    def _note(self, parts: list[Part]) -> None:
        for part in parts:
            pair = torch.stack([part.value.detach(), part.weight * part.value.detach()])
            self._notes[part.name] = self._notes.get(part.name, 0) + pair

    def _reduce(self, tensor: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return tensor
        return self.accelerator.reduce(tensor.to(self.args.device), "sum")

    def log(self, logs, start_time=None):
        """Adds every loss part, unweighted and weighted: the weighted ones sum to `loss`."""
        if "loss" in logs and self._notes:
            names = sorted(self._notes)
            table = self._reduce(torch.stack([self._notes[name] for name in names])).tolist()
            for name, (value, weighted) in zip(names, table):
                logs[name] = value / self._steps[name]
                logs[f"{name}_weighted"] = weighted / self._steps[name]
            logs.update(self._scheduled_values())
            self._notes, self._steps = {}, {}
        super().log(logs, start_time)

    def _scheduled_values(self) -> dict[str, float]:
        progress = self._window.progress
        values = {}
        for name, term in self.objective.terms.items():
            if term.term.weight.type != "constant":
                values[f"{name}_weight"] = term.term.weight(progress)
            for option, schedule in term.schedules.items():
                if schedule.type != "constant":
                    values[f"{name}_{option}"] = schedule(progress)
        return values

    # ---- Checkpoints ----

    def _record(self) -> dict:
        maps = {name: term.pairs for name, term in self.objective.terms.items() if term.layered}
        return {"layer_maps": maps, "objective": self.objective.describe()}

    def _save_checkpoint(self, model, trial):
        if self.args.should_save:  # before super(), which pushes and rotates
            folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            save_side_file(folder, self.objective, self._record())
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_side_file(resume_from_checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        if self.state.best_model_checkpoint and read_record(self.state.best_model_checkpoint) is not None:
            self._load_side_file(self.state.best_model_checkpoint)

    def _load_side_file(self, folder: str) -> None:
        record = read_record(folder)
        if record is not None:
            saved = {name: None if p is None else [tuple(pair) for pair in p] for name, p in record["layer_maps"].items()}
            now = {name: term.pairs for name, term in self.objective.terms.items() if term.layered}
            changed = {name for name in saved.keys() | now.keys() if saved.get(name, "none") != now.get(name, "none")}
            by_similarity = {n for n in changed if n in now and self._layer_map_of(n) == "similar" and saved.get(n) is not None}
            if changed - by_similarity:
                name = sorted(changed - by_similarity)[0]
                raise ValueError(
                    f"The checkpoint {os.path.basename(folder)} was trained with layer map {saved.get(name, 'none')} for the term {name!r}, now it is "
                    f"{now.get(name, 'none')}. Use the settings of that run, or start anew without resume_from_checkpoint."
                )
            if by_similarity:  # chosen on the untrained student: the choice of the run goes on
                self._bind(fixed_maps={n: saved[n] for n in by_similarity})
        load_side_file(folder, self.objective)

    def _layer_map_of(self, name: str):
        own = self.objective.terms[name].term.layer_map
        return self.args.layer_map if own is None else own

    def layer_map_tables(self) -> dict[str, str]:
        """Markdown table of the layer map of each term that has one."""
        return {
            name: "random, drawn anew each step" if term.pairs is None else layer_map_table(term.pairs, *self.objective.depths)
            for name, term in self.objective.terms.items()
            if term.layered
        }


class _ObjectiveCallback(TrainerCallback):
    """Prints the layer maps at the start and clears the gradients of the adapters, which the training loop does not know."""

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        tables = self.trainer.layer_map_tables()
        if tables and state.is_world_process_zero:
            for name, table in tables.items():
                print(f"Layer map of the term {name!r} (blocks count from 0):\n{table}\n")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.objective.zero_grad()
