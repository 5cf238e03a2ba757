"""Sum of weighted terms: what to fetch from which model, which rows each term counts, and the loss parts by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .bound_term import BoundTerm
from .capture_plan import CapturePlan, plan_for
from .counting import Denominators, Unit, span_labels, token_mask
from .losses.task import TaskCrossEntropyLoss
from .losses.top_k import top_k_soft_targets
from .models.layer_map import Pairs, resolve_layer_map
from .signals import STAGE_SIGNALS, Signals, TopLogits
from .terms import PAIRS
from .vocabulary_terms import NO_LABELS, FusedTerms, compared_positions, target_labels


@dataclass
class Part:
    """One term of one micro-batch.

    `value` is unweighted and divided by the count of the window (training) or of the batch (evaluation); `totals` and
    `counts` are the sums and row counts behind it, one per mapped pair, detached. `contribution` is what it adds to the loss, with
    a graph: `weight * value`, except for terms that were computed together, where one part carries the graph of all.
    """

    name: str
    weight: float
    value: Tensor
    totals: Tensor
    counts: Tensor
    contribution: Tensor


class Objective(nn.Module):
    """The terms of a run, bound to a student and a teacher. Its parameters are the adapters; it holds no model.

    Made by [`build_objective`]. The trainer asks `pairs_at` and `plans` what to fetch, `units_at` what to count, and
    calls the objective itself for the parts.
    """

    def __init__(self, terms: list[BoundTerm], task: str, problem_type: str | None, positions: str, seed: int):
        super().__init__()
        self.terms = nn.ModuleDict({term.name: term for term in terms})
        self.shared_adapters = nn.ModuleDict()  # by widths; terms hold a `SharedAdapter` of one
        self.task, self.problem_type, self.positions, self.seed = task, problem_type, positions, seed
        self.label_order: list[int] | None = None
        self.vocabulary: int | None = None
        self.register_buffer("teacher_columns", None, persistent=False)  # of the kept tokens, under a student with a pruned vocabulary
        self.task_loss: nn.Module = nn.Identity()
        self.fused: FusedTerms | None = None  # where the logits of a vocabulary are made chunk by chunk

    def measures_others(self, progress: float) -> bool:
        """Whether a term that has a weight at `progress` has a value for rows that are not trained on."""
        return not all(term.remembers for term, _ in self.active(progress))

    def active(self, progress: float) -> list[tuple[BoundTerm, float]]:
        """Terms with their weights at `progress`; those at 0 are left out unless all are."""
        weighted = [(term, term.term.weight(progress)) for term in self.terms.values()]
        return [(term, weight) for term, weight in weighted if weight > 0] or weighted

    def pairs_at(self, step: int) -> dict[str, Pairs]:
        """Layer pairs of each layered term at an optimizer step; a function of seed and step alone, so a resume repeats it."""
        return {
            name: term.pairs if term.pairs is not None else resolve_layer_map("random", *term.depths, seed=self.seed, step=step)
            for name, term in self.terms.items()
            if term.layered
        }

    def plans(self, pairs: dict[str, Pairs], progress: float) -> tuple[CapturePlan, CapturePlan]:
        """What to fetch from the student and from the teacher."""
        terms = [term for term, _ in self.active(progress)]
        student = plan_for([(term.signal, [s for s, _ in pairs.get(term.name, [])]) for term in terms])
        teacher = plan_for([(t.signal, [k for _, k in pairs.get(t.name, [])]) for t in terms if not t.term.is_task])
        return student, teacher

    def unit_of(self, term: BoundTerm, pair: tuple[int, int] | None = None) -> Unit:
        if term.term.is_task:
            return Unit("partners" if term.loss_name == PAIRS else "labels")
        if term.signal == "logits":
            if term.loss.unit == "labels":
                return Unit("labels")
            if self.task == "sequence":
                return Unit("samples")
            if self.task == "question_answering":
                return Unit("spans")
            if self.positions in ("labelled", "marked"):
                return Unit("labels" if self.positions == "labelled" else "marked")
            return Unit("next_tokens" if self.task == "causal_lm" else "tokens")
        if term.signal in ("pooled", "pooled_features"):
            return Unit("samples")
        if term.loss.unit == "pairs":
            return term.units[pair]
        if term.loss.unit == "sequences":
            return Unit("sequences")
        return Unit("tokens")

    def units_at(self, pairs: dict[str, Pairs], progress: float) -> set[Unit]:
        return {self.unit_of(term, pair) for term, _ in self.active(progress) for pair in pairs.get(term.name, [None])}

    def forward(
        self,
        student: Signals,
        teacher: Signals | None,
        labels: Tensor | None,
        progress: float,
        pairs: dict[str, Pairs],
        denominators: Denominators | None = None,
        soft_labels: Tensor | None = None,
        example_ids: Tensor | None = None,
    ) -> list[Part]:
        """The parts of one micro-batch.

        Args:
            student, teacher: captured signals; `teacher` may be `None` where only the task counts.
            labels: hard labels as the batch has them (not shifted), or `None`.
            progress: share of training done, in [0, 1], for the schedules.
            pairs: from `pairs_at`.
            denominators: counts of the accumulation window; `None` divides by the counts of this batch.
            soft_labels: `(batch, classes)`, shares of the classes in mixed images, for the task term; rows count where `labels` do.
            example_ids: `(batch,)`, for losses that remember examples, which have no part in evaluation (eval mode).
        """
        parts = []
        if student.projection is not None:
            parts = self._fused_parts(student, teacher, labels, progress, denominators)
        for term, weight in self.active(progress):
            if not self.training and term.remembers:
                continue  # it remembers training examples, of which there are none here
            if student.projection is not None and term.signal == "logits":
                continue
            options = {name: schedule(progress) for name, schedule in term.schedules.items()}
            inputs = {"labels": labels, "soft_labels": soft_labels, "example_ids": example_ids}
            own = pairs.get(term.name, [None])
            values, totals, counts = [], [], []
            for index, pair in enumerate([own] if term.joint else own):
                total, count, samples = self._compare(term, index, pair, student, teacher, inputs, options)
                pair = own[0] if term.joint else pair
                if denominators is None:
                    divisor = count.clamp(min=1)
                else:
                    divisor = denominators.of(self.unit_of(term, pair), count, samples)
                values.append(total / divisor)
                totals.append(total.detach())
                counts.append(count.detach())
            value = torch.stack(values)
            value = value.sum() if term.reduction == "sum" else value.mean()
            parts.append(Part(term.name, weight, value, torch.stack(totals), torch.stack(counts), weight * value))
        return parts

    def _fused_parts(
        self, student: Signals, teacher: Signals | None, labels: Tensor | None, progress: float, denominators: Denominators
    ) -> list[Part]:
        """The parts of all logit terms, whose logits are made chunk by chunk; the first one carries the graph of all."""
        terms = [(term, weight) for term, weight in self.active(progress) if term.signal == "logits"]
        divisors = {term.name: denominators.of(self.unit_of(term), torch.zeros(()), student.shape[0]) for term, _ in terms}
        combined, values = self.fused(
            terms,
            student,
            teacher,
            None if labels is None else self._at_rows(target_labels(labels, self.task), student.rows),
            masks=lambda: self._at_rows(self._compared(student, teacher, labels, student.shape), student.rows),
            divisor=lambda term: divisors[term.name],
            options=lambda term: {name: schedule(progress) for name, schedule in term.schedules.items()},
            shared=self.vocabulary,
            teacher_columns=self.teacher_columns,
        )
        return [
            Part(
                term.name,
                weight,
                total / divisors[term.name],
                total[None],
                count[None],
                combined if index == 0 else torch.zeros_like(total),
            )
            for index, ((term, weight), (total, count)) in enumerate(zip(terms, values))
        ]

    @staticmethod
    def _at_rows(tensor: Tensor, rows: Tensor) -> Tensor:
        """Of `(batch, length, ...)`, the flattened positions `rows`."""
        return tensor.flatten(0, 1)[rows]

    def _compared(self, student: Signals, teacher: Signals | None, labels: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """bool `(batch, length)`: where logits are compared with the teacher's."""
        device = (student.projection.features if student.logits is None else student.logits).device
        tokens = token_mask(student, teacher, shape, device)
        return compared_positions(tokens, student.target_mask, labels, self.task, self.positions, shape, device)

    def _compare(self, term: BoundTerm, index: int, pair, student: Signals, teacher: Signals | None, inputs: Mapping, options: dict):
        """`(sum, count, samples)` of one pair of a term, or of all pairs of a joint one, which are then in `pair`."""
        labels = inputs["labels"]
        if term.loss_name == PAIRS:
            return self._pairs_value(term, student, labels)
        if term.term.is_task:
            return self.task_value(student, labels, inputs["soft_labels"], inference=not self.training)
        loss = term.loss_of(index)
        options = {**options, **{name: self._input(term, name, inputs, student.rows) for name in loss.needs}}
        if term.signal == "logits":
            s, t, mask = self._logit_rows(student, teacher, labels)
            mask = None if loss.unit == "labels" else mask  # its rows are those with a label
            if isinstance(t, TopLogits):
                temperature = options.get("temperature", loss.temperature)
                return *top_k_soft_targets(s, t, mask, temperature), s.size(0)
        elif term.signal == "attention_scores":
            s, t = term.tensors(pair, student, teacher)
            mask = student.attention_allowed[pair[0]] & teacher.attention_allowed[pair[1]].to(s.device)
        elif term.joint:
            brought = [
                term.bring(i, *term.tensors(one, student, teacher), self._mask(term, one, student, teacher)) for i, one in enumerate(pair)
            ]
            s, t, mask = [s for s, _, _ in brought], [t for _, t, _ in brought], brought[0][2]
        else:
            s, t, mask = term.bring(index, *term.tensors(pair, student, teacher), self._mask(term, pair, student, teacher))
        samples = (s[0] if term.joint else s).size(0)
        total, count = loss(s, t.to(s.device) if isinstance(t, Tensor) else t, mask, **options)
        return total, count, samples

    @staticmethod
    def _mask(term: BoundTerm, pair, student: Signals, teacher: Signals):
        """As [`BoundTerm.token_masks`]; `None` for maps and vectors."""
        if term.signal in (*STAGE_SIGNALS, "pooled"):
            return None
        s, _ = term.tensors(pair, student, teacher)
        return term.token_masks(student, teacher, s)

    def _input(self, term: BoundTerm, name: str, inputs: Mapping, rows: Tensor | None) -> Tensor:
        """What a loss needs from the batch beside the signals."""
        value = inputs[name]
        if value is None:
            column = "labels" if name == "labels" else "example_id"
            raise ValueError(
                f"The term {term.name!r} ({term.loss_name}) needs the column {column!r}, but the batch has none. Add it to the training "
                "data" + (" (one number for each example)." if name == "example_ids" else ".")
            )
        if name == "labels" and inputs["soft_labels"] is not None:
            raise ValueError(
                f"The term {term.name!r} ({term.loss_name}) needs one class for each row, but mixup and cutmix mix them. Turn mixing off, "
                "or use soft_targets."
            )
        if name == "labels" and term.signal == "logits" and rows is not None:
            return self._at_rows(target_labels(value, self.task), rows)
        return value[:, 1:] if name == "labels" and self.task == "causal_lm" and term.signal == "logits" else value

    @staticmethod
    def _pairs_value(term: BoundTerm, student: Signals, labels: Tensor | None):
        if labels is None:
            raise ValueError(
                f"The term {term.name!r} brings rows with equal labels together, but the batch has no labels. Add a column 'labels' with "
                "the number of the pair (PairCollator does), or remove the term."
            )
        total, count = term.loss(student.pooled, labels)
        return total, count, labels.size(0)

    def task_value(
        self, student: Signals, labels: Tensor | None, soft_labels: Tensor | None = None, inference: bool = False
    ) -> tuple[Tensor, Tensor, int]:
        """`(sum, count, samples)` of the task loss on hard labels; causal logits and labels are shifted here, padding leaves spans.

        A DeiT with two heads learns labels with the head of its class token alone where a term teaches the other head, else with the
        mean of both, which is its answer and what `inference` measures.
        """
        taught = any(term.signal == "logits" and not term.term.is_task for term in self.terms.values())
        logits = student.cls_logits if student.cls_logits is not None and taught and not inference else student.logits
        if labels is None:
            raise ValueError(NO_LABELS)
        samples = labels.size(0)
        if student.rows is not None:
            labels = self._at_rows(target_labels(labels, self.task), student.rows)
        elif self.task == "causal_lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        if self.task == "question_answering":
            (logits,), real = _real_positions(student, None, logits)
            labels = span_labels(labels, real)
        if soft_labels is not None:
            if not isinstance(self.task_loss, TaskCrossEntropyLoss):
                raise ValueError(
                    f"Images are mixed, which gives shares of one class each, but the student is trained for {self.problem_type}. Turn "
                    "mixup and cutmix off."
                )
            return *self.task_loss(logits, labels, soft_labels), samples
        return *self.task_loss(logits, labels), samples

    def _logit_rows(self, student: Signals, teacher: Signals, labels: Tensor | None):
        """Logits of both models, row by row, and the mask of the rows that are compared (`None` for all)."""
        s = student.logits if student.distillation_logits is None else student.distillation_logits
        if teacher.top_logits is not None:
            s = s if self.vocabulary is None else s[..., : self.vocabulary]
            return s, teacher.top_logits, self._row_mask(student, teacher, labels)
        t = teacher.logits if teacher.projection is None else teacher.projection.logits()
        t = t.to(s.device)
        if student.rows is not None and teacher.rows is None:  # a function as the teacher answers for all positions
            t = self._at_rows(t, student.rows)
        if self.label_order is not None:
            t = t[..., self.label_order]
        if self.vocabulary is not None:
            columns = slice(self.vocabulary) if self.teacher_columns is None else self.teacher_columns
            s, t = s[..., : self.vocabulary], t[..., columns]
        if self.task == "question_answering":
            (s, t), real = _real_positions(student, teacher, s, t)
            return s, t, real.any(1, keepdim=True).expand(-1, 2)
        if self.task == "causal_lm" and student.rows is None:
            s, t = s[:, :-1], t[:, :-1]
        return s, t, self._row_mask(student, teacher, labels)

    def _row_mask(self, student: Signals, teacher: Signals, labels: Tensor | None) -> Tensor | None:
        """Which rows of the student's logits are compared; `None` for all."""
        if self.task == "sequence":
            return None
        if student.rows is None:
            mask = self._compared(student, teacher, labels, tuple(student.logits.shape[:2]))
            return mask[:, :-1] if self.task == "causal_lm" else mask
        return self._at_rows(self._compared(student, teacher, labels, student.shape), student.rows)

    @property
    def answer_plan(self) -> CapturePlan:
        """What evaluation returns: logits, or the pooled vectors of a base model."""
        return CapturePlan(logits=self.task != "features", pooled=self.task == "features")

    def answer(self, student: Signals) -> Tensor:
        return student.pooled if self.task == "features" else student.logits

    def named_logits(self, logits: Tensor) -> dict[str, Tensor]:
        """Logits under the names that the models of Transformers give them."""
        if self.task == "features":
            return {"pooled": logits}
        if self.task == "question_answering":
            return {"start_logits": logits[:, 0], "end_logits": logits[:, 1]}
        return {"logits": logits}

    def describe(self) -> list[dict[str, Any]]:
        """The objective as resolved, for `results.json`, the card and checkpoints."""
        rows = [term.describe() for term in self.terms.values()]
        if self.task in ("token", "masked_lm", "causal_lm"):
            named = "masked" if (self.task, self.positions) == ("masked_lm", "labelled") else self.positions
            for row, term in zip(rows, self.terms.values()):
                if term.signal == "logits" and not term.term.is_task:
                    row["positions"] = named
        return rows


def _real_positions(student: Signals, teacher: Signals | None, *logits: Tensor) -> tuple[list[Tensor], Tensor]:
    """Span logits `(batch, 2, length)` with -inf at positions that are no real token for both models, and the bool `(batch, length)`."""
    shapes = [tuple(tensor.shape) for tensor in logits]
    masks = [tuple(s.attention_mask.shape) for s in (student, teacher) if s is not None and s.attention_mask is not None]
    positions = (shapes[0][0], shapes[0][-1])
    if shapes[0] != (positions[0], 2, positions[1]) or len({*shapes}) > 1 or {*masks} - {positions}:
        raise ValueError(
            f"Start and end logits must have the shape (batch, 2, length), with one position for each of the attention mask's, but have "
            f"{' (student) and '.join(map(str, shapes))}{' (teacher)' if teacher is not None else ''}, with attention masks {masks}: "
            "positions could not be matched. Return start_logits and end_logits of (batch, length) from both models, and no virtual tokens."
        )
    real = token_mask(student, teacher, positions, logits[0].device)
    return [tensor.masked_fill(~real.unsqueeze(1), float("-inf")) for tensor in logits], real
