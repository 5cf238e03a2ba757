"""`DistillationTrainer`: the Hugging Face Trainer with a teacher."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from .arguments import DistillationTrainingArguments
from .binding import build_objective
from .capture import Capture
from .capture_plan import TEACHER_PREFIX, CapturePlan
from .counting import EXAMPLE_ID, SOFT_LABELS, TARGET_MASK, Denominators, count_units, labels_of
from .data.packing import PackingCollator
from .model_outputs import example_batch
from .models.anatomy import unwrap_peft
from .models.parts import freeze_parts, names_of_part
from .models.peft_student import wrap_student
from .objective import Objective, Pairs, Part
from .packing_check import check_packing
from .part_log import EvaluationParts, TrainingParts
from .preparation import (
    align,
    check_columns,
    check_constructor,
    check_labels,
    check_separate,
    check_teacher,
    example_labels,
    freeze_unused_pooler,
    load_by_name,
    own_pooling,
    resolve_label_names,
    translate_tokens,
    use_channels_last,
    warn_of_preparation,
    wrap_teacher,
)
from .teachers import AdaptersOffTeacher, FrozenTeacher, StoredTeacher
from .terms import Term, resolve_terms
from .trainer_files import TrainerFiles
from .trainer_hardware import TrainerHardware
from .trainer_optimization import TrainerOptimization
from .trainer_profile import TrainerProfile
from .trainer_sampling import TrainerSampling
from .trainer_search import TrainerSearch
from .trainer_shortcuts import NOTHING, TrainerShortcuts
from .trainer_store import TrainerStore
from .vocabulary_terms import LOSS_ROWS, add_loss_rows, loss_rows


logger = logging.getLogger(__name__)


@dataclass
class Window:
    """What holds for all micro-batches of one optimizer step."""

    progress: float
    pairs: dict[str, Pairs]
    student_plan: CapturePlan
    teacher_plan: CapturePlan
    denominators: Denominators


class DistillationTrainer(
    TrainerProfile, TrainerOptimization, TrainerSampling, TrainerFiles, TrainerSearch, TrainerHardware, TrainerStore, TrainerShortcuts
):
    """Trains a student under a teacher; everything else is `transformers.Trainer`.

    Args:
        model, args, data_collator, train_dataset, eval_dataset, processing_class, model_init, compute_metrics, callbacks,
            optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics: as in `Trainer`; `model` is the student and
            `args` a [`DistillationTrainingArguments`]. For language models with `compute_metrics`, logits are reduced to
            the best token unless `preprocess_logits_for_metrics` is given: whole vocabularies do not fit in memory.
        teacher (`nn.Module`, `str` or callable, *optional*): a model, a folder or Hub id, or a function `batch -> Signals`
            (or logits). `"base"` is the student's own model with its PEFT adapters off, see [`AdaptersOffTeacher`]; a folder
            of that name is `"./base"`. Without a teacher, and with `task_weight` alone, this is a plain Trainer.
        objective (`list` of [`Term`], *optional*): replaces the weights of the arguments.
        teacher_processing_class (*optional*): the teacher's tokenizer, compared with `processing_class`. Where that was cut out of
            it by `prune_tokenizer`, the teacher reads the student's ids as its own, and vocabularies are compared at the kept tokens.
        peft_config (`peft.PeftConfig`, *optional*): puts adapters on the student, which alone are then trained and saved;
            [`merged_student`] makes a plain model of it. As in TRL's `SFTTrainer`.

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
        peft_config=None,
    ):
        if args is None:
            args = DistillationTrainingArguments("tmp_trainer")
        check_constructor(model, args, compute_loss_func, teacher, {"train_dataset": train_dataset, "eval_dataset": eval_dataset})
        if peft_config is not None and model is not None:
            model = wrap_student(model, peft_config, args.seed)
        self._peft_config = peft_config
        self.objective: Objective | None = None
        self.card: dict = {}
        self._given_terms = objective
        self._needs_example_ids = False
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
                f"{self.args.n_gpu} GPUs are visible to one process, which would run DataParallel; its averaging of losses is not "
                "supported. Start with `accelerate launch`, or show one GPU with CUDA_VISIBLE_DEVICES=0."
            )
        teacher = self._stored_teacher(teacher)
        pooling = own_pooling(teacher, self.model, self.args)
        teacher, tokenizer = load_by_name(teacher, self.model, self.args, self.processing_class)
        self.teacher_processing_class = teacher_processing_class or tokenizer
        warn_of_preparation(self.processing_class, self.teacher_processing_class, self.data_collator, self.train_dataset)
        check_separate(self.model, teacher)
        self.teacher = wrap_teacher(teacher, self.args, self.accelerator, pooling)
        self.label_names = resolve_label_names(self.model, self.args.label_names, self.label_names)
        self._bind()
        self._set_up_teacher()
        self._check_store()
        self.add_callback(_ObjectiveCallback(self))
        if (
            self.preprocess_logits_for_metrics is None
            and self.compute_metrics is not None
            and self.objective.task in ("masked_lm", "causal_lm")
        ):
            self.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(-1)

    # ---- Set-up ----

    def _bind(self, fixed_maps: Mapping[str, Pairs] | None = None) -> None:
        """Builds the objective for the current student and teacher."""
        args = self.args
        if args.channels_last:
            use_channels_last(self.model, "student")
        if args.frozen_parts:
            freeze_parts(self.model, args.frozen_parts)
        for part in args.learning_rate_scales or {}:
            names_of_part(self.model, part)
        if args.learning_rate_scales and self.optimizer is not None and self.objective is None:
            raise ValueError("learning_rate_scales would have no effect on the optimizer you pass. Give it the groups, or leave one out.")
        terms = resolve_terms(args, self._given_terms)
        check_teacher(terms, self.teacher)
        self._needs_example_ids = any("example_ids" in term.loss_class.needs for term in terms if not term.is_task)
        if self.objective is not None:
            self.student.release()
        self.student = Capture(self.model, "student")
        if isinstance(self.teacher, AdaptersOffTeacher):
            self.teacher.follow(self.student)
        teacher = self.teacher.capture if isinstance(self.teacher, (FrozenTeacher, AdaptersOffTeacher, StoredTeacher)) else None
        translate_tokens(self.student, teacher, self.processing_class, self.teacher_processing_class)
        self._signature_columns = None
        if args.remove_unused_columns:
            check_columns(self.model, self.train_dataset, self.data_collator)
        example = self._collate(2)
        if self.train_dataset is not None:
            check_labels(example, terms, self.label_names)
        labels = None if example is None else labels_of(example)
        maps = [args.layer_map, *(term.layer_map for term in terms if isinstance(term.layer_map, str))]
        config = getattr(unwrap_peft(self.model), "config", None)
        self.objective = build_objective(
            terms,
            self.student,
            teacher,
            args,
            example_batch(self.model) if example is None else example,
            labels_dtype=None if labels is None else labels.dtype,
            recorded=(getattr(config, "distilled_from", None) or {}).get("layers"),
            calibration=self._collate(args.calibration_samples) if "similar" in maps else None,
            fixed_maps=fixed_maps,
            example_labels=None if self.train_dataset is None else partial(example_labels, self.train_dataset),
        ).to(args.device)
        freeze_unused_pooler(self.student, self.objective)
        if args.ddp_find_unused_parameters is None and not any(term.signal == "logits" for term in self.objective.terms.values()):
            args.ddp_find_unused_parameters = True  # the head gets no gradient; Transformers' own choice depends on checkpointing
        known = labels is not None or getattr(getattr(teacher, "inner", None), "config", None) is not None
        if config is not None and known and self.objective.problem_type and getattr(config, "problem_type", None) is None:
            config.problem_type = self.objective.problem_type  # the stock forward pass would have set it; pipelines read it
        if any(True for _ in self.objective.parameters()) and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                "Adapters are not sharded by FSDP or DeepSpeed. Use DDP (recipes/accelerate/multi_gpu.yaml), or a student as wide as the "
                "teacher."
            )
        if self.accelerator.num_processes > 1:
            for tensor in [*self.objective.parameters(), *self.objective.buffers()]:  # a user's adapter may start differently on each rank
                tensor.data.copy_(broadcast(tensor.data))
        align(self.objective, self.student, teacher, args, self.processing_class, self.teacher_processing_class)
        if isinstance(self.data_collator, PackingCollator):
            check_packing(self.data_collator, self.objective, self.student, self.teacher, self._collate(4))
        self._choose_shortcuts(teacher, example_batch(self.model) if example is None else example)
        self._window: Window | None = None
        self._check_counts = True
        self._training_parts, self._evaluation_parts = TrainingParts(), EvaluationParts()

    def _collate(self, count: int) -> dict | None:
        """The first samples of the training (else the evaluation) data as a batch on the device; random states are left as they were."""
        evaluation = self.eval_dataset
        evaluation = next(iter(evaluation.values()), None) if isinstance(evaluation, dict) else evaluation
        dataset = evaluation if self.train_dataset is None else self.train_dataset
        if dataset is None:
            return None
        collate = self._get_collator_with_removed_columns(self.data_collator)
        states = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=[]):
            if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset):
                rows = [dataset[i] for i in range(min(count, len(dataset)))]
            else:
                rows = list(itertools.islice(iter(dataset), count))
            batch = collate(rows)
        random.setstate(states[0])
        np.random.set_state(states[1])
        return dict(self._prepare_inputs(batch))

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        extra = [] if self.teacher is None else self.teacher.columns
        extra = [*extra, *(f"{TEACHER_PREFIX}{name}" for name in extra), *([EXAMPLE_ID] if self._needs_example_ids else [])]
        collator = getattr(self.data_collator, "columns", [])
        kept = [*extra, *collator, TARGET_MASK, SOFT_LABELS, "labels"]
        self._signature_columns += [name for name in kept if name not in self._signature_columns]

    def call_model_init(self, trial=None):
        self._set_up_trial(trial)
        model = super().call_model_init(trial)
        if self._peft_config is not None:
            model = wrap_student(model, self._peft_config, self.args.seed)
        if self.objective is not None:  # a new trial: its student and its weights need a new objective
            self.model = model
            if self.place_model_on_device:
                self._move_model_to_device(model, self.args.device)
            self._bind()
        return model

    def replace_student(self, model: nn.Module) -> None:
        """From now on measures, saves and publishes `model`, such as the student with its PEFT adapters merged; it trains no more."""
        old, self.model = self.student, model
        self.student = Capture(model, "student", old.own_pooling)
        self.student.run_pooling = old.run_pooling
        self._head, self.objective.fused = "full", None
        example = self._collate(2)
        if self.args.eval_with_teacher and example is not None:
            self.student.require(self.objective.plans(self.objective.pairs_at(0), 1.0)[0].union(self.objective.answer_plan), example)
        if not isinstance(self.teacher, AdaptersOffTeacher):  # which needs the student as it was
            old.release()

    def rest(self) -> None:
        """Between passes of its own the trainer costs the two models nothing: no scores are computed for anybody."""
        self.student.rest()
        if isinstance(self.teacher, (FrozenTeacher, AdaptersOffTeacher)):
            self.teacher.capture.rest()

    # ---- Training ----

    def get_train_dataloader(self):
        """As `Trainer`; a collator that prepares training batches otherwise (augments and mixes images) is asked for its own kind."""
        collator = self.data_collator
        self.data_collator = collator.for_training() if hasattr(collator, "for_training") else collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def _progress(self) -> float:
        return min(self.state.global_step / max(self.state.max_steps, 1), 1.0)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        progress, pairs = self._progress(), self.objective.pairs_at(self.state.global_step)
        units = self.objective.units_at(pairs, progress)
        reduce = self.accelerator.reduce if self.accelerator.num_processes > 1 else None
        counts = Denominators(batches, units, self.objective.task, self.objective.problem_type, device, reduce)
        self._window = Window(progress, pairs, *self.objective.plans(pairs, progress), counts)
        active = [term for term, _ in self.objective.active(progress)]
        if self._head != "full":
            add_loss_rows(batches, active, self.objective.task, self.objective.positions)
        self._training_parts.begin_step(term.name for term in active)
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The weighted objective of one micro-batch, in training; in evaluation see `eval_with_teacher`.

        `num_items_in_batch` is not used: it counts labels only. See `hfdistill.counting`.
        """
        training = model.training and self._window is not None
        if training or (self.args.eval_with_teacher and self.teacher is not None and self.objective.measures_others(self._progress())):
            logits, parts = self._parts(model, inputs, self._window if training else None)
            loss = sum(part.contribution for part in parts)
            if training:
                # The trainer averages gradients over ranks, the denominators already count all of them.
                loss = loss * self.accelerator.num_processes
                self._training_parts.add(parts)
            else:
                for part in parts:
                    reduction = self.objective.terms[part.name].reduction
                    self._evaluation_parts.add(part.name, part.weight, part.totals, part.counts, reduction)
        else:
            student = self.student(inputs, CapturePlan(), forward=model)
            logits = student.logits
            total, count, _ = self.objective.task_value(student, labels_of(inputs), inputs.get(SOFT_LABELS), inference=not model.training)
            loss = total / count.clamp(min=1)
            if not model.training:
                self._evaluation_parts.add("task", 1.0, total.detach()[None], count[None])
        return (loss, {"loss": loss, **self.objective.named_logits(logits)}) if return_outputs else loss

    def _parts(self, model, inputs, window: Window | None) -> tuple[Tensor, list[Part]]:
        if window is None:
            progress, pairs = self._progress(), self.objective.pairs_at(self.state.global_step)
            plans, denominators = self.objective.plans(pairs, progress), None
        else:
            progress, pairs, plans, denominators = (
                window.progress,
                window.pairs,
                (window.student_plan, window.teacher_plan),
                window.denominators,
            )
        student_plan = plans[0] if window is not None else plans[0].union(self.objective.answer_plan)
        labels, rows, teacher = labels_of(inputs), None, None
        if window is not None and self._head != "full":
            terms = [term for term, _ in self.objective.active(progress)]
            rows = inputs.get(LOSS_ROWS)
            if rows is None:
                rows = loss_rows(inputs, terms, self.objective.task, self.objective.positions)
        with self.clock.section("student"):
            student = self.student(inputs, student_plan, forward=model, rows=rows, project=self._head != "chunked")
        if plans[1] != NOTHING:
            teacher_rows = rows if plans[1].logits and self._teacher_rows else None
            with self.clock.section("teacher"):
                teacher = self.teacher(inputs, plans[1], rows=teacher_rows, project=self._teacher_projects)
        self.objective.train(window is not None)
        with self.clock.section("loss"):
            parts = self.objective(
                student, teacher, labels, progress, pairs, denominators, inputs.get(SOFT_LABELS), inputs.get(EXAMPLE_ID)
            )
        if window is not None and self._check_counts:
            self._verify_counts(inputs, pairs, parts, denominators)
        return self.objective.answer(student), parts

    def _verify_counts(self, inputs, pairs, parts: list[Part], denominators: Denominators) -> None:
        """Once per run: rows predicted from the masks are the rows the losses saw, so the denominators are right."""
        self._check_counts = False
        for part in parts:
            term = self.objective.terms[part.name]
            for pair, seen in zip(pairs.get(part.name, [None]), part.counts.tolist()):
                unit = self.objective.unit_of(term, pair)
                expected = count_units(inputs, [unit], self.objective.task, self.objective.problem_type)[unit]
                if expected is not None and int(expected) != int(seen):
                    where = "" if pair is None else f" at student block {pair[0]}, teacher block {pair[1]}"
                    raise ValueError(
                        f"The term {part.name!r} compared {int(seen)} rows ({unit.kind}) of the first batch, but {int(expected)} were "
                        f"expected from its masks{where}: the loss would be scaled wrongly. The two models mask the input differently; "
                        "remove this term, and please report the architectures."
                    )

    def floating_point_ops(self, inputs):
        own = super().floating_point_ops(inputs)
        if isinstance(self.teacher, (FrozenTeacher, AdaptersOffTeacher)) and hasattr(self.teacher.model, "floating_point_ops"):
            own += self.teacher.model.floating_point_ops(inputs) // 3  # forward only, of the 6 operations a step counts
        return own

    # ---- Evaluation ----

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if self.objective.task == "features":
            return self._pooled_prediction(model, inputs, prediction_loss_only)
        if ignore_keys is None and hasattr(self.student.inner, "distillation_classifier"):  # one answer, with labels or without
            ignore_keys = [*getattr(self.student.inner.config, "keys_to_ignore_at_inference", []), "cls_logits", "distillation_logits"]
        labelled = all(inputs.get(name) is not None for name in self.label_names) and bool(self.label_names)
        if not (labelled and self.args.eval_with_teacher):
            keep = {*self.student.columns, *self.label_names}
            inputs = {name: value for name, value in inputs.items() if name in keep}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _pooled_prediction(self, model, inputs, prediction_loss_only):
        """Of a base model: pooled vectors instead of logits, and no task loss; the objective's with `eval_with_teacher`."""
        inputs, loss = self._prepare_inputs(inputs), None
        with torch.no_grad(), self.compute_loss_context_manager():
            if self.args.eval_with_teacher and self.teacher is not None:
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
                pooled = outputs["pooled"]
            else:
                pooled = self.student(inputs, self.objective.answer_plan, forward=model).pooled
        return (loss, None, None) if prediction_loss_only else (loss, pooled, labels_of(inputs))

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"):
        self._evaluation_parts = EvaluationParts()
        self._free_buffers()  # evaluation makes large tensors of its own
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        sums = self._evaluation_parts.collect(self._reduce)
        if sums is not None:
            # A mean over rows: the trainer's own eval_loss averages batch means, whatever their number of rows. On several
            # ranks the rows that Accelerate repeats to fill the last batch count twice.
            output.metrics[f"{metric_key_prefix}_loss"], values = sums
            if self.args.eval_with_teacher:
                output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in values.items()})
        return output

    # ---- Logging ----

    def _reduce(self, tensor: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return tensor
        return self.accelerator.reduce(tensor.to(self.args.device), "sum")

    def log(self, logs, start_time=None):
        """Adds every loss part, unweighted and weighted: the weighted ones sum to `loss`."""
        if "loss" in logs and (parts := self._training_parts.collect(self._reduce)):
            logs.update(parts, **self._scheduled_values())
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


class _ObjectiveCallback(TrainerCallback):
    """Prints the layer maps at the start, tells the collator the epoch, and clears the gradients of the adapters, which the
    training loop does not know."""

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer
        self.epoch: int | None = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epoch = int(state.epoch + 1e-6) if self.epoch is None else self.epoch + 1
        if hasattr(self.trainer.data_collator, "set_epoch"):
            self.trainer.data_collator.set_epoch(self.trainer.data_epoch(self.epoch))

    def on_train_begin(self, args, state, control, **kwargs):
        self.epoch = None
        tables = self.trainer.layer_map_tables()
        about_head = self.trainer._describe_head()
        if about_head and state.is_world_process_zero:
            print(about_head)
        if tables and state.is_world_process_zero:
            for name, table in tables.items():
                print(f"Layer map of the term {name!r} (blocks and stages count from 0):\n{table}\n")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.objective.zero_grad()

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer._window = None  # its counts belong to the last step alone
        self.trainer.rest()
        self.trainer._free_buffers()
