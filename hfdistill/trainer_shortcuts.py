"""What a step need not compute: rows of vocabularies without a loss, and what lies above the last signal of the teacher."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from transformers import Trainer

from .capture_plan import CapturePlan, plan_for
from .vocabulary_terms import LANGUAGE_MODELS, FusedTerms, choose_head


logger = logging.getLogger(__name__)

NOTHING = CapturePlan(logits=False)


class TrainerShortcuts(Trainer):
    """A Trainer that looks at its two models once, on an example, to see what can be left out."""

    def _teacher_plan(self) -> CapturePlan:
        """Everything that a step of this run may ask of the teacher."""
        terms = [term for term in self.objective.terms.values() if not term.term.is_task]
        return plan_for(
            (term.signal, range(term.depths[1]) if term.layered and term.pairs is None else [t for _, t in term.pairs or []])
            for term in terms
        )

    def _choose_shortcuts(self, teacher, example: Mapping) -> None:
        """Decides for this student, teacher and objective; `teacher` is its capture, or `None`."""
        args, objective = self.args, self.objective
        terms = list(objective.terms.values())
        outside = None
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            outside = "its weights are sharded, and a loss outside of its forward pass does not see them"
        elif args.ddp_static_graph:
            outside = "ddp_static_graph=True synchronises no gradient that goes round the output of the model"
        choice = choose_head(
            args.vocabulary_head, terms, objective.task, objective.task_loss, self.student, example, outside, args.torch_compile
        )
        self._head, self._head_reason = choice
        if args.vocabulary_chunk_rows is not None and self._head != "chunked":
            why = choice.why or f"the task {objective.task} has no vocabulary"
            raise ValueError(
                f"vocabulary_chunk_rows={args.vocabulary_chunk_rows} would not be used, because logits are not made in chunks: {why}. "
                "Leave it out."
            )
        objective.fused = FusedTerms(objective.task_loss, args.vocabulary_chunk_rows) if self._head == "chunked" else None
        self._teacher_rows = self._teacher_projects = True
        if teacher is None:
            return
        plan = self._teacher_plan()
        if self._head != "full" and plan.logits and hasattr(teacher, "understand_head"):
            head = teacher.understand_head(example)
            same_device = next(teacher.model.parameters()).device == self.args.device
            self._teacher_rows = head.place is not None
            self._teacher_projects = not (self._head == "chunked" and head.projects and same_device)
            if not self._teacher_rows:
                logger.warning("The head of the %s runs at every position: a part of its logits is not what it gives there.", teacher.name)
        if args.teacher_trimming and hasattr(teacher, "check_early_stop"):
            self.teacher.stops_early = replace(plan, logits=False) != NOTHING and teacher.check_early_stop(plan, example)

    def _free_buffers(self) -> None:
        """Gives back what is kept from step to step."""
        fused = getattr(self.objective, "fused", None)  # a number while `hyperparameter_search` evaluates a trial
        if fused is not None:
            fused.scratch.clear()

    def _describe_head(self) -> str | None:
        """A line about the vocabulary of a language model, for who looks at the start of a run."""
        where = {
            "full": "projected at every position",
            "rows": "projected at the positions that carry a loss",
            "chunked": "projected at the positions that carry a loss, a few rows at a time",
        }[self._head]
        if self.objective.task not in LANGUAGE_MODELS:
            return None
        why = f" Not at fewer at once, because of the student: {self._head_reason}." if self._head_reason else ""
        return f"Vocabulary: {where}.{why}"
