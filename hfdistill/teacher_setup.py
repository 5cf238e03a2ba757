"""Brings a frozen teacher into the precision of the run, and through `torch.compile`, before training; says what that changes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from .arguments import DistillationTrainingArguments
from .losses.logits import SoftTargetsLoss
from .objective import Objective
from .signals import Signals
from .teachers import FrozenTeacher
from .teachers.precision import (
    GAIN,
    HALF,
    cast_weights,
    compare_speed,
    half_precision_excluded,
    measure_drift,
    own_dtype,
    quantizable,
    quantize_weights,
)
from .teachers.store_table import stored_dtype


logger = logging.getLogger(__name__)

_MEASURED = "_hfdistill_measured_dtype"
_DRIFT_TOKENS = 512
"""Of a language model, so many tokens (and at least one sample) are compared: more would cost memory and say the same."""


class TeacherSetup:
    """What `teacher_dtype`, `teacher_quantization` and `teacher_compile` ask for, done once.

    The first process measures and prints, and the others follow its decision.

    Args:
        teacher ([`FrozenTeacher`]): its model is changed in place.
        args: of the run.
        accelerator: of the trainer.
        objective: what the run compares.
        ask: `batch -> Signals` as a step of the run would ask.
        batch: a function that gives a batch of the training data, or `None` where there is none, and nothing is measured.
    """

    def __init__(
        self,
        teacher: FrozenTeacher,
        args: DistillationTrainingArguments,
        accelerator: Accelerator,
        objective: Objective,
        ask: Callable[[Mapping], Signals],
        batch: Callable[[], Mapping | None],
    ):
        self.teacher, self.args, self.accelerator, self.objective = teacher, args, accelerator, objective
        self.ask, self._collate = ask, batch
        self.own = own_dtype(teacher.model)

    def run(self) -> None:
        """Casts, quantizes and compiles.

        Raises:
            ValueError: where the signals are no longer finite, torchao is missing, or the compiled model gives other signals.
        """
        precision = self.args.teacher_dtype or self.args.teacher_quantization
        compiles = self.args.teacher_compile and self.teacher.compiled is None
        if not precision and not compiles:
            return
        self.batch = self._collate()
        if precision:
            self._change_precision()
        if compiles:
            self._compile()

    # ---- Precision ----

    def _change_precision(self) -> None:
        model, given = self.teacher.model, self.args.teacher_dtype
        dtype = self._measured_dtype() if given == "auto" else getattr(torch, given) if given else None
        quantizes = self.args.teacher_quantization is not None and bool(quantizable(model))
        coarser = quantizes or dtype in HALF and self.own not in (*HALF, None)
        compares = coarser and self.batch is not None and self.accelerator.is_main_process
        example = self._few() if compares else None
        precise = self._answers(example) if compares else None
        if dtype is not None:
            cast_weights(model, dtype)
        if quantizes:
            quantize_weights(model)
        finite = True
        if compares:
            now = " and ".join([*([_name(dtype)] if dtype in HALF else []), *(["int8"] if quantizes else [])])
            spans = self.objective.task == "question_answering"
            drift = measure_drift(precise, self._answers(example), self._terms(), spans)
            finite = drift.finite
            if finite:
                rows = next(value.size(0) for value in example.values() if isinstance(value, Tensor))
                print(f"Teacher in {now} against {_name(self.own)}, on {rows} examples: {drift}.")
        if not self._agree(finite):
            raise ValueError(
                f"The teacher's signals are not finite in {dtype or self.args.teacher_quantization}, and are in {_name(self.own)}: its "
                "activations are too large for it. Use teacher_dtype='bfloat16', which has the range of float32, or leave it out."
            )

    def _measured_dtype(self) -> torch.dtype:
        """That of the teacher's store where there is one; half precision where it makes the forward pass faster on the first process, else
        fp32. The model remembers it, so that several trainers (stages, seeds) have the same teacher."""
        folder = self.args.teacher_store
        stored = None if folder is None else stored_dtype(folder.replace("{seed}", str(self.args.seed)))
        if stored is None and (known := getattr(self.teacher.model, _MEASURED, None)) is not None:
            return known
        chosen = self._faster_dtype() if stored is None else stored
        if self.batch is not None:
            setattr(self.teacher.model, _MEASURED, chosen)
        return chosen

    def _faster_dtype(self) -> torch.dtype:
        half = self.own if self.own in HALF else torch.bfloat16
        faster = False
        if self.accelerator.is_main_process:
            faster, reason = self._is_faster(half)
            print(f"Teacher in {_name(half if faster else torch.float32)}: {reason}.")
        return half if self._agree(faster) else torch.float32

    def _is_faster(self, half: torch.dtype) -> tuple[bool, str]:
        model = self.teacher.model
        device = next(model.parameters()).device
        excluded = half_precision_excluded(device)
        if excluded or self.batch is None:
            return False, excluded or "there is no training data to measure with"
        other = torch.float32 if self.own == half else half
        try:
            times = compare_speed(model, other, partial(self.ask, self.batch), device)
        except torch.OutOfMemoryError:
            return True, "there is no room for both precisions at once, so float32 was not tried"
        except RuntimeError as error:
            if self.own == half:
                raise
            return False, f"it does not run in {_name(half)} ({str(error).splitlines()[0]})"
        slow, fast = times if other == half else times[::-1]
        return slow >= GAIN * fast, f"a forward pass takes {fast:.3g} s in {_name(half)}, {slow:.3g} s in float32"

    def _answers(self, example: Mapping) -> Signals:
        """The teacher's signals as it is now: a projection would change with the weight in it."""
        signals = self.ask(example)
        return signals if signals.projection is None else replace(signals, logits=signals.projection.logits(), projection=None)

    def _few(self) -> dict:
        if self.objective.task not in ("masked_lm", "causal_lm"):
            return dict(self.batch)
        ids = self.batch["input_ids"]
        return _first(self.batch, max(1, _DRIFT_TOKENS // ids.size(1)))

    def _terms(self) -> dict[str, Callable]:
        """The logit terms of the run; where all of them need labels, soft targets."""
        logit_terms = [term for term in self.objective.terms.values() if term.signal == "logits" and not term.term.is_task]
        terms = {}
        for term in logit_terms:
            if not term.loss.needs:
                options = {name: schedule(0.0) for name, schedule in term.schedules.items()}
                at = f" (T = {options['temperature']:g})" if "temperature" in options else ""
                terms[term.name + at] = partial(term.loss, **options)
        if logit_terms and not terms:
            temperature = self.args.temperature
            terms[f"soft_targets (T = {temperature:g})"] = SoftTargetsLoss(temperature)
        return terms

    def _agree(self, flag: bool) -> bool:
        """What the first process says."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(broadcast(torch.tensor([int(flag)], device=self.accelerator.device)).item())

    # ---- Compilation ----

    def _compile(self) -> None:
        if self.batch is None:
            self.teacher.compile()
            return
        turned = {key: value.flip(0) if isinstance(value, Tensor) and value.dim() else value for key, value in self.batch.items()}
        plain = self.ask(turned)
        self.teacher.compile()
        try:
            self.ask(self.batch)
            # The second call is the one that would show hooks that were traced away.
            drift = measure_drift(plain, self.ask(turned), {})
        except Exception as error:
            raise ValueError(
                f"teacher_compile: torch.compile cannot run the teacher ({type(error).__name__}: {str(error).splitlines()[0]}). A C++ "
                "compiler is needed on CPU, Triton on a GPU. Otherwise leave teacher_compile out."
            ) from error
        tolerance = 5e-2 if self.own in HALF or self.args.teacher_dtype in ("auto", "bfloat16", "float16") else 1e-3
        if not drift.finite or max([drift.mean or 0.0, *drift.relative.values()]) > tolerance:
            raise ValueError(f"The compiled teacher gives other signals than the teacher: {drift}. Leave teacher_compile out.")


def _first(batch: Mapping, rows: int) -> dict:
    size = next(value.size(0) for value in batch.values() if isinstance(value, Tensor))
    return {k: v[:rows] if isinstance(v, Tensor) and v.dim() and v.size(0) == size else v for k, v in batch.items()}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
