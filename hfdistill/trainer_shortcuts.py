"""What a step need not compute: rows of vocabularies without a loss, and what lies above the last signal of the teacher."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from transformers import Trainer

from .capture_plan import CapturePlan, plan_for
from .vocabulary_terms import FusedTerms, choose_head


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
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        compiled = args.torch_compile
        self._head = choose_head(args.vocabulary_head, terms, objective.task, objective.task_loss, self.student, example, sharded, compiled)
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
