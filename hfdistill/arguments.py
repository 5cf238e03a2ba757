"""Every knob of distillation, beside those of `transformers.TrainingArguments`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from .schedules import Schedule, resolve_schedule
from .suggest import did_you_mean


WEIGHTS = (
    "task_weight",
    "kd_weight",
    "logit_mse_weight",
    "hidden_weight",
    "embedding_weight",
    "cosine_weight",
    "attention_weight",
)
TEACHER_WEIGHTS = WEIGHTS[1:]
"""Names of the weights of terms that need a teacher; all of them at 0 make a plain Trainer."""
WITHOUT_TEACHER = {"task_weight": 1.0, "objective": None, "schedules": None, "teacher_store": None, **dict.fromkeys(TEACHER_WEIGHTS, 0.0)}
"""Training arguments of a model that learns from labels alone."""
SCHEDULED = (*WEIGHTS, "temperature")


def _knob(default, text: str, **metadata):
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class DistillationTrainingArguments(TrainingArguments):
    """Arguments of `DistillationTrainer`: `TrainingArguments` plus the objective and the teacher.

    A weight of 0 turns a term off. Weights are used as given: they are not normalised to a sum of 1. The knobs below
    build the usual terms; for anything else pass `objective`, a list of `Term` or of dicts with the same keys.

    Raises:
        ValueError: for weights that are negative, not finite or all zero, a temperature <= 0, unknown choices, schedules
            with unknown names, and a `hub_token` (it would be stored in clear in `training_args.bin`, which is pushed).
    """

    task_weight: float = _knob(0.5, "Weight of the task loss on hard labels (cross entropy, BCE or MSE, by problem type).")
    kd_weight: float = _knob(0.5, "Weight of the soft targets loss on the teacher's logits (T^2 KL; binary KL or MSE, by problem type).")
    temperature: float = _knob(2.0, "Temperature of the soft targets, for student and teacher. The loss is multiplied by its square.")
    logit_mse_weight: float = _knob(0.0, "Weight of the mean squared error between logits.")
    hidden_weight: float = _knob(0.0, "Weight of the mean squared error between hidden states of mapped blocks.")
    embedding_weight: float = _knob(0.0, "Weight of the mean squared error between embedding outputs.")
    cosine_weight: float = _knob(0.0, "Weight of the cosine embedding loss between hidden states (DistilBERT: last block only).")
    attention_weight: float = _knob(0.0, "Weight of the attention loss of mapped blocks.")
    attention_loss: str = _knob(
        "attention_score_mse",
        "attention_score_mse (TinyBERT, before softmax), attention_kl or attention_mse (probabilities).",
        choices=["attention_score_mse", "attention_kl", "attention_mse"],
    )
    attention_heads: str = _knob(
        "equal", "'equal' requires as many heads in both models; 'mean' averages over heads first.", choices=["equal", "mean"]
    )
    layer_map: str = _knob(
        "uniform",
        "Which teacher block each student block learns from: uniform, spread, last, first, skip, random (drawn anew each step), "
        "similar (by CKA on a calibration batch), original (as recorded by build_student), or pairs such as '0:1,1:3'. "
        "Blocks count from 0; embeddings are not a block.",
    )
    cosine_layer_map: str = _knob("-1:-1", "Layer map of the cosine loss; the last block of both models by default.")
    layer_reduction: str = _knob("mean", "'mean' or 'sum' over the mapped pairs of a term.", choices=["mean", "sum"])
    adapter: str = _knob(
        "auto",
        "Projection of the student's width to the teacher's: auto (linear where they differ), linear, mlp, shared (one linear map for "
        "all layers and terms of equal widths) or none. On feature maps these are 1x1 convolutions; conv_bn_relu, for maps alone, adds a "
        "batch norm and ReLU (FitNets' regressor).",
        choices=["auto", "linear", "shared", "mlp", "conv_bn_relu", "none"],
    )
    pooling: str = _knob(
        "auto",
        "What the signal 'pooled' is, for student and teacher: mean, cls (first) or last, over real tokens, or auto: that of a "
        "sentence-transformers teacher given by name, else the model's own pooler, else cls (last for causal models). Base models "
        "without a head return it in evaluation. A sentence-transformers teacher keeps its own in any case.",
        choices=["auto", "mean", "cls", "last"],
    )
    kd_positions: str = _knob(
        "auto",
        "Which positions of token models carry logit terms: all (real tokens), labelled (label != -100; masked is another word for "
        "it), marked (where the column "
        "target_mask is 1, such as first sub-tokens, labelled or not), or auto: marked where there is such a column, else all for "
        "masked language models and labelled otherwise. Sequence and "
        "question answering models use every sample, labelled or not.",
        choices=["auto", "all", "labelled", "masked", "marked"],
    )
    schedules: dict[str, Any] | str | None = _knob(
        None,
        "Schedules of weights and temperature over training, by name: {'kd_weight': {'type': 'linear', 'start': 1.0, 'end': 0.2, "
        "'over': [0.0, 0.5]}}. Types: constant, linear, cosine, step. A missing start or end is the number given above.",
    )
    objective: list[dict] | str | None = _knob(
        None, "The whole objective as a list of terms (loss, weight, layer_map, adapter, ...); replaces the weights above."
    )
    frozen_parts: list[str] | None = _knob(
        None,
        "Parts of the student that are not trained: embeddings, blocks, blocks.0, blocks.0-2, blocks.-1, head, or patterns of "
        "parameter names such as '*.bias'.",
    )
    learning_rate_scales: dict[str, float] | str | None = _knob(
        None, "Factors of the learning rate by part (named as in frozen_parts), such as {'blocks.0-2': 0.1}; others keep 1."
    )
    learning_rate_milestones: list[float] | None = _knob(
        None,
        "Shares of training at which the learning rate is multiplied by learning_rate_gamma (0.625 0.75 0.875: the CIFAR protocol). "
        "Replaces lr_scheduler_type.",
    )
    learning_rate_gamma: float = _knob(0.1, "Factor of the learning rate at each milestone.")
    teacher_model_init_kwargs: dict[str, Any] | str | None = _knob(
        None, "Keyword arguments of from_pretrained for a teacher given by name."
    )
    teacher_batch_size: int | None = _knob(None, "Rows per teacher forward pass. Default: the whole batch.")
    teacher_dtype: str | None = _knob(
        None,
        "What the teacher's weights are cast to: float32, bfloat16, float16, or auto: bfloat16 where it makes the forward pass at least "
        "a tenth faster, measured at the start on a batch of the run, else float32. What half precision changes in logits and in the "
        "soft targets term is printed. Default: their own.",
        choices=["auto", "float32", "bfloat16", "float16"],
    )
    teacher_quantization: str | None = _knob(
        None,
        "int8 stores the teacher's linear layers, but a vocabulary, as int8 weights (needs torchao), which are a quarter of the memory of "
        "float32; what it changes is printed. It saves memory; without torch.compile a forward pass on a CPU may be slower. Default: none.",
        choices=["int8"],
    )
    teacher_compile: bool = _knob(
        False,
        "Run the teacher through torch.compile: a minute or more to start, worth it for long runs. Its forward pass then always runs to "
        "its end (no teacher_trimming). For the student there is torch_compile.",
    )
    teacher_device: str | None = _knob(None, "Device of the teacher. Default: that of the student.")
    teacher_trimming: bool = _knob(
        True, "Stop the teacher's forward pass where the last signal that a term needs has been seen: no blocks above it, no head."
    )
    teacher_store: str | None = _knob(
        None,
        "Folder of stored teacher outputs (or a data set on the Hub, hf://datasets/user/name, which is only read). Where it does not exist "
        "the teacher answers all training data once, before training; then it is not run again. {seed} in the name stands for the seed, "
        "on which augmentation depends.",
    )
    teacher_store_logits: str = _knob(
        "auto",
        "How logits are stored: full, hidden (last hidden state and the teacher's head: exact, for vocabularies), top_k (with one "
        "bucket for all other classes), top_k_without_tail (biased: the student's mass outside is not punished), or auto: hidden for "
        "vocabularies, else full.",
        choices=["auto", "full", "hidden", "top_k", "top_k_without_tail"],
    )
    teacher_store_top_k: int = _knob(64, "Logits stored for each position with teacher_store_logits=top_k.")
    teacher_store_dtype: str = _knob("float16", "In which stored outputs are written.", choices=["float32", "bfloat16", "float16"])
    teacher_store_epochs: int | None = _knob(
        None,
        "With augmentation or new masks in every epoch: how many epochs are stored; later ones repeat them. Default: all of the run, or "
        "one where nothing changes from epoch to epoch.",
    )
    vocabulary_head: str = _knob(
        "auto",
        "Where a language model's vocabulary is projected. rows: only at positions that carry a loss. chunked: there, a few rows at a "
        "time inside the loss, so that all logits never exist together. full: everywhere, as the model does. auto: chunked where the "
        "logit terms allow it and the model's head is understood, else rows.",
        choices=["auto", "full", "rows", "chunked"],
    )
    vocabulary_chunk_rows: int | None = _knob(None, "Rows of logits that exist at a time with vocabulary_head=chunked. Default: by size.")
    channels_last: bool = _knob(
        False,
        "Keep images and 2-d convolutions of student and teacher in channels-last memory format; saved weights are plain. No effect on "
        "models of text.",
    )
    keep_memory_pages: bool = _knob(
        False,
        "On CPU with glibc: while training, freed memory is kept for the next step in place of being given back to the system (mallopt). "
        "Of use where large tensors are made anew in every step, as all logits of a vocabulary are. It costs memory: freed pieces of the "
        "wrong size are kept too.",
    )
    log_step_profile: bool = _knob(
        True, "Log milliseconds of data, student, teacher, loss, backward and optimizer, the throughput and the peak memory."
    )
    profile: bool = _knob(False, "Write a torch profiler trace of a few steps into output_dir/profile.")
    teacher_label_order: str = _knob(
        "by_name",
        "'by_name' compares label names and permutes the teacher's logits; 'by_index' trusts the positions.",
        choices=["by_name", "by_index"],
    )
    eval_with_teacher: bool = _knob(
        False, "Run the teacher in evaluation too, so that eval_loss is the whole objective. Default: the student alone, its task loss."
    )
    calibration_samples: int = _knob(32, "Training samples used by layer_map='similar'.")
    logging_nan_inf_filter: bool = _knob(
        False, "Filter nan and inf losses for logging. Off here, unlike in TrainingArguments: it costs a host sync per micro-batch."
    )

    def __post_init__(self):
        for name in ("schedules", "teacher_model_init_kwargs", "objective", "learning_rate_scales"):
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    setattr(self, name, json.loads(value))
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f'{name} is no valid JSON ({error}): {value!r}. Write it as in {{"key": 1.0}}, or use a YAML file.'
                    ) from None
        self._check_numbers()
        self._check_choices()
        self.kd_positions = "labelled" if self.kd_positions == "masked" else self.kd_positions
        self.resolved_schedules()
        if self.hub_token is not None:
            raise ValueError(
                "hub_token would be written in clear into training_args.bin, and that file is pushed. Leave it out: log in with "
                "`hf auth login`, or set the HF_TOKEN environment variable."
            )
        if not self.use_cpu and not torch.accelerator.is_available():
            # Otherwise each of several processes on a machine without an accelerator would train alone.
            self.use_cpu = True
        super().__post_init__()

    def _check_numbers(self) -> None:
        for name in WEIGHTS:
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise ValueError(
                    f"{name} must be a finite number >= 0, got {value!r}: a negative weight would push the student away from the teacher. "
                    "Use 0 to turn the term off."
                )
        if not isinstance(self.temperature, (int, float)) or not math.isfinite(self.temperature) or self.temperature <= 0:
            raise ValueError(
                f"temperature must be a finite number > 0, got {self.temperature!r}: logits are divided by it. Use 1 (plain KL) to 8; 2 "
                "is usual."
            )
        given = [name for name in WEIGHTS if getattr(self, name) != type(self).__dataclass_fields__[name].default]
        if self.objective is not None and given:
            raise ValueError(
                f"{given[0]}={getattr(self, given[0])} would not be used, because objective gives every term its own weight. "
                "Remove one of them."
            )
        if self.objective is not None and not self.objective:
            raise ValueError("objective is an empty list: there is nothing to train. Give at least one term, or leave objective out.")
        if self.objective is None and not any(getattr(self, name) > 0 or name in (self.schedules or {}) for name in WEIGHTS):
            raise ValueError(
                "All weights are zero, so the loss is 0 and nothing would be learnt. Set at least one of " + ", ".join(WEIGHTS) + "."
            )
        for part, scale in (self.learning_rate_scales or {}).items():
            if not isinstance(scale, (int, float)) or not math.isfinite(scale) or scale <= 0:
                raise ValueError(
                    f"learning_rate_scales[{part!r}] must be a finite number > 0, got {scale!r}. To train a part not at all, name it in "
                    "frozen_parts."
                )
        milestones = self.learning_rate_milestones or []
        if any(not 0 < share < 1 for share in milestones) or sorted(set(milestones)) != milestones:
            raise ValueError(
                f"learning_rate_milestones must be shares of training between 0 and 1, in rising order, got {milestones}: the learning "
                "rate falls at each. Write epoch 150 of 240 as 0.625."
            )
        if milestones and self.warmup_steps:
            raise ValueError(
                f"learning_rate_milestones starts at the full learning rate, so warmup_steps={self.warmup_steps} would not be used. "
                "Remove one."
            )
        if not math.isfinite(self.learning_rate_gamma) or not 0 < self.learning_rate_gamma < 1:
            raise ValueError(f"learning_rate_gamma must be between 0 and 1, got {self.learning_rate_gamma}: it lowers the learning rate.")
        counts = ("teacher_batch_size", "calibration_samples", "teacher_store_top_k", "teacher_store_epochs", "vocabulary_chunk_rows")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")

    def _check_choices(self) -> None:
        for name, knob in type(self).__dataclass_fields__.items():
            choices, value = knob.metadata.get("choices"), getattr(self, name)
            if choices and name in DistillationTrainingArguments.__annotations__ and value is not None and value not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}.{did_you_mean(value, choices)}")

    def resolved_schedules(self) -> dict[str, Schedule]:
        """Weight and temperature schedules by name; the numbers in the arguments themselves are never changed."""
        resolved = {}
        for name, value in (self.schedules or {}).items():
            if name not in SCHEDULED:
                raise ValueError(f"schedules has no place for {name!r}.{did_you_mean(name, SCHEDULED)} Known: {', '.join(SCHEDULED)}.")
            resolved[name] = resolve_schedule(value, default=getattr(self, name))
        return resolved
