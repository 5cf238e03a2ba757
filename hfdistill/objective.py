"""Sum of weighted terms: what to fetch from which model, which rows each term counts, and the loss parts by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Capture, CapturePlan, plan_for
from .counting import Denominators, Unit, token_mask, valid_labels
from .losses import LOSSES, TASK_LOSSES
from .losses.base import DistillationLoss
from .losses.task import TaskCrossEntropyLoss
from .models.adapters import build_adapter
from .models.anatomy import problem_type_of, task_of
from .models.layer_map import resolve_layer_map
from .models.similarity import similar_layer_map
from .schedules import Schedule, resolve_schedule
from .signals import LAYERED_SIGNALS, Signals
from .terms import Term


Pairs = list[tuple[int, int]]


@dataclass
class Part:
    """One term of one micro-batch.

    `value` is unweighted and divided by the count of the window (training) or of the batch (evaluation); `totals` and
    `counts` are the sums and row counts behind it, one per mapped pair, detached.
    """

    name: str
    weight: float
    value: Tensor
    totals: Tensor
    counts: Tensor


class BoundTerm(nn.Module):
    """A `Term` that has met its models: loss built, layer map resolved, adapters made."""

    def __init__(self, term: Term, loss: nn.Module, pairs: Pairs | None, reduction: str, schedules: dict[str, Schedule]):
        super().__init__()
        self.term, self.name, self.signal = term, term.name, term.loss_signal
        self.loss = loss
        self.pairs = pairs  # None: drawn anew each step
        self.reduction = reduction
        self.schedules = schedules
        self.adapters = nn.ModuleList()
        self.units: dict[tuple[int, int], Unit] = {}

    @property
    def layered(self) -> bool:
        return self.signal in LAYERED_SIGNALS

    def describe(self) -> dict[str, Any]:
        """The term as resolved, in plain JSON types."""
        options = {k: v for k, v in self.term.options.items() if not isinstance(v, (Schedule, Mapping))}
        options |= {k: _plain(v) for k, v in self.schedules.items()}
        text = {"name": self.name, "loss": "task" if self.term.is_task else type(self.loss).__name__, "weight": _plain(self.term.weight)}
        text |= {"signal": self.signal, **({"options": options} if options else {})}
        if self.layered:
            text |= {"layer_map": "random" if self.pairs is None else [list(pair) for pair in self.pairs], "layer_reduction": self.reduction}
        if any(True for _ in self.adapters.parameters()):
            text["adapter"] = [type(adapter).__name__ for adapter in self.adapters]
        return text


def _plain(schedule: Schedule) -> float | dict:
    return schedule.start if schedule.type == "constant" else schedule.as_dict()


class Objective(nn.Module):
    """The terms of a run, bound to a student and a teacher. Its parameters are the adapters; it holds no model.

    Made by [`build_objective`]. The trainer asks `pairs_at` and `plans` what to fetch, `units_at` what to count, and
    calls the objective itself for the parts.
    """

    def __init__(self, terms: list[BoundTerm], task: str, problem_type: str | None, positions: str, seed: int, depths):
        super().__init__()
        self.terms = nn.ModuleDict({term.name: term for term in terms})
        self.task, self.problem_type, self.positions, self.seed, self.depths = task, problem_type, positions, seed, depths
        self.label_order: list[int] | None = None
        self.vocabulary: int | None = None
        self.task_loss: nn.Module = nn.Identity()

    @property
    def needs_teacher(self) -> bool:
        return any(not term.term.is_task for term in self.terms.values())

    @property
    def needs_labels(self) -> bool:
        return any(term.term.is_task for term in self.terms.values())

    def active(self, progress: float) -> list[tuple[BoundTerm, float]]:
        """Terms with their weights at `progress`; those at 0 are left out unless all are."""
        weighted = [(term, term.term.weight(progress)) for term in self.terms.values()]
        return [(term, weight) for term, weight in weighted if weight > 0] or weighted

    def pairs_at(self, step: int) -> dict[str, Pairs]:
        """Layer pairs of each layered term at an optimizer step; a function of seed and step alone, so a resume repeats it."""
        return {
            name: term.pairs if term.pairs is not None else resolve_layer_map("random", *self.depths, seed=self.seed, step=step)
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
            return Unit("labels")
        if term.signal == "logits":
            if self.task == "sequence":
                return Unit("samples")
            if self.positions == "labelled":
                return Unit("labels")
            return Unit("next_tokens" if self.task == "causal_lm" else "tokens")
        if term.signal == "pooled":
            return Unit("samples")
        if getattr(term.loss, "unit", "rows") == "pairs":
            return term.units[pair]
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
    ) -> list[Part]:
        """The parts of one micro-batch.

        Args:
            student, teacher: captured signals; `teacher` may be `None` where only the task counts.
            labels: hard labels as the batch has them (not shifted), or `None`.
            progress: share of training done, in [0, 1], for the schedules.
            pairs: from `pairs_at`.
            denominators: counts of the accumulation window; `None` divides by the counts of this batch.
        """
        parts = []
        for term, weight in self.active(progress):
            options = {name: schedule(progress) for name, schedule in term.schedules.items()}
            values, totals, counts = [], [], []
            for index, pair in enumerate(pairs.get(term.name, [None])):
                total, count, samples = self._compare(term, index, pair, student, teacher, labels, options)
                if denominators is None:
                    divisor = count.clamp(min=1)
                else:
                    divisor = denominators.of(self.unit_of(term, pair), count, samples)
                values.append(total / divisor)
                totals.append(total.detach())
                counts.append(count.detach())
            value = torch.stack(values)
            value = value.sum() if term.reduction == "sum" else value.mean()
            parts.append(Part(term.name, weight, value, torch.stack(totals), torch.stack(counts)))
        return parts

    def _compare(self, term: BoundTerm, index: int, pair, student: Signals, teacher: Signals | None, labels, options):
        if term.term.is_task:
            return self.task_value(student.logits, labels)
        if term.signal == "logits":
            s, t, mask = self._logit_rows(student, teacher, labels)
        elif term.signal == "pooled":
            s, t, mask = term.adapters[index](_full(student.pooled)), teacher.pooled, None
        elif term.signal == "attention_scores":
            s, t = student.attention_scores[pair[0]], teacher.attention_scores[pair[1]]
            mask = student.attention_allowed[pair[0]] & teacher.attention_allowed[pair[1]].to(s.device)
        else:
            s, t = (
                (student.embeddings, teacher.embeddings)
                if term.signal == "embeddings"
                else (student.hidden_states[pair[0]], teacher.hidden_states[pair[1]])
            )
            mask = token_mask(student, teacher, tuple(s.shape[:2]), s.device)
            # Outside autocast: an adapter in half precision would lose the small differences it is there to measure.
            with torch.autocast(s.device.type, enabled=False):
                s = term.adapters[index](_full(s))
        total, count = term.loss(s, t.to(s.device), mask, **options)
        return total, count, s.size(0)

    def task_value(self, logits: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, int]:
        """`(sum, count, samples)` of the task loss on hard labels; causal logits and labels are shifted here."""
        if labels is None:
            raise ValueError(
                "The objective has a task term, but the batch has no labels. Add a 'labels' column (-100 where a label is missing), "
                "or set task_weight to 0."
            )
        samples = logits.size(0)
        if self.task == "causal_lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        total, count = self.task_loss(logits, labels)
        return total, count, samples

    def _logit_rows(self, student: Signals, teacher: Signals, labels: Tensor | None):
        s, t = student.logits, teacher.logits.to(student.logits.device)
        if self.label_order is not None:
            t = t[..., self.label_order]
        if self.vocabulary is not None:
            s, t = s[..., : self.vocabulary], t[..., : self.vocabulary]
        if self.task == "sequence":
            return s, t, None
        if self.positions == "labelled":
            if labels is None:
                raise ValueError(
                    "kd_positions='labelled' needs labels, but the batch has none. Add a 'labels' column, or set kd_positions='all'."
                )
            mask = valid_labels(labels, self.task, self.problem_type)
        else:
            mask = token_mask(student, teacher, tuple(s.shape[:2]), s.device)
            mask = mask[:, 1:] & mask[:, :-1] if self.task == "causal_lm" else mask
        return (s[:, :-1], t[:, :-1], mask) if self.task == "causal_lm" else (s, t, mask)

    def describe(self) -> list[dict[str, Any]]:
        """The objective as resolved, for `results.json`, the card and checkpoints."""
        return [term.describe() for term in self.terms.values()]


def _full(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def build_objective(
    terms: list[Term],
    student: Capture,
    teacher: Capture | None,
    args,
    example: Mapping,
    labels_dtype: torch.dtype | None = None,
    recorded: list[int] | None = None,
    calibration: Mapping | None = None,
    fixed_maps: Mapping[str, Pairs] | None = None,
) -> Objective:
    """Binds terms to a student and a teacher: layer maps, adapters, units. Everything that cannot work is refused here.

    Args:
        terms: what to match.
        student: capture of the student.
        teacher: capture of the teacher; `None` for a teacher that is a function, whose shapes show only in training.
        args: [`DistillationTrainingArguments`].
        example: a tiny batch that both models accept, for shapes.
        labels_dtype: decides between single-label and multi-label where the config does not say.
        recorded: teacher block of each student block as recorded by `build_student`, for `layer_map="original"`.
        calibration: a batch for `layer_map="similar"`.
        fixed_maps: layer maps by term name that replace the resolved ones (from a checkpoint).

    Raises:
        ValueError: where a signal cannot be had, blocks do not exist, widths, heads or lengths do not fit.
    """
    layered = [term for term in terms if term.loss_signal in LAYERED_SIGNALS]
    if layered and teacher is None:
        raise ValueError(
            f"The term {layered[0].name!r} compares layers, but the teacher is a function, whose layers are not known. "
            "Pass the teacher as a module, or use terms on logits."
        )
    depths = (student.depth, teacher.depth) if layered else (0, 0)
    similarity = _similarity(student, teacher, calibration) if _wants(layered, args, "similar") else None
    bound = []
    for term in terms:
        pairs = None
        if term.loss_signal in LAYERED_SIGNALS:
            spec = args.layer_map if term.layer_map is None else term.layer_map
            if term.name in (fixed_maps or {}):
                pairs = fixed_maps[term.name]
            elif spec == "similar":
                pairs = similarity
            elif spec != "random":
                pairs = resolve_layer_map(spec, *depths, seed=args.seed, recorded=recorded)
        bound.append((term, pairs))

    task = task_of(student.model)
    if task == "question_answering":
        raise ValueError(
            f"The {student.name} predicts spans with two sets of logits, which DistillationTrainer does not support. "
            "Use a sequence, token, masked or causal language model."
        )
    problem_type = problem_type_of(student.model, labels_dtype) if task in ("sequence", "other") else None
    needs = [(t.loss_signal, range(depths[0]) if pairs is None else [s for s, _ in pairs]) for t, pairs in bound]
    s_example = student.require(plan_for([("logits", [])]).union(plan_for(needs)), example)
    t_example = None
    if teacher is not None:
        needs = [(t.loss_signal, range(depths[1]) if p is None else [k for _, k in p]) for t, p in bound if not t.is_task]
        if needs:
            t_example = teacher.require(plan_for(needs), example)
    if task == "other":
        task = "sequence" if s_example.logits.dim() == 2 else "token"

    positions = args.kd_positions
    if positions == "auto":
        positions = "all" if task == "masked_lm" else "labelled"
    objective_terms = [_bind(term, pairs, task, problem_type, args) for term, pairs in bound]
    objective = Objective(objective_terms, task, problem_type, positions, args.seed, depths)
    objective.task_loss = build_task_loss(task, problem_type, args.label_smoothing_factor)
    # Adapters get their own seed: the student's dropout must not depend on whether there is an adapter.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        for term in objective.terms.values():
            _add_adapters(term, args, s_example, t_example, depths)
            if term.signal == "attention_scores":
                _check_attention(term, student, teacher, s_example, t_example, depths, args)
    return objective


def build_task_loss(task: str, problem_type: str | None, label_smoothing: float = 0.0) -> nn.Module:
    """The loss on hard labels: by problem type for sequence models, cross entropy over positions otherwise."""
    if task != "sequence":
        return TaskCrossEntropyLoss(label_smoothing=label_smoothing)
    loss = TASK_LOSSES[problem_type]
    smooth = "label_smoothing" in inspect.signature(loss.__init__).parameters and problem_type == "single_label_classification"
    return loss(label_smoothing=label_smoothing) if smooth else loss()


def _wants(terms: list[Term], args, strategy: str) -> bool:
    return any((args.layer_map if term.layer_map is None else term.layer_map) == strategy for term in terms)


def _bind(term: Term, pairs: Pairs | None, task: str, problem_type: str | None, args) -> BoundTerm:
    reduction = term.layer_reduction or args.layer_reduction
    if term.is_task:
        return BoundTerm(term, nn.Identity(), pairs, reduction, {})
    options, schedules = dict(term.options), {}
    name = term.loss
    if name == "soft_targets" and task == "sequence":
        name = {"multi_label_classification": "binary_soft_targets", "regression": "regression_mse"}.get(problem_type, name)
        if name == "regression_mse":
            options.pop("temperature", None)
    loss_class = LOSSES[name] if isinstance(name, str) else type(name)
    for key in [key for key in options if key in loss_class.scheduled]:
        schedules[key] = resolve_schedule(options[key])
        if schedules[key].type != "constant":
            loss_class(**{key: schedules[key].minimum})  # the constructor's own check, at the end that can be wrong
        options[key] = schedules[key](0.0)
    loss: DistillationLoss = name if isinstance(name, DistillationLoss) else loss_class(**options)
    return BoundTerm(term, loss, pairs, reduction, schedules)


def _example_pair(term: BoundTerm, depths) -> Pairs:
    """The pairs of a term; for a random map one pair for each student block (all teacher blocks have one shape)."""
    if not term.layered:
        return [None]
    return term.pairs if term.pairs is not None else [(s, s) for s in range(depths[0])]


def _add_adapters(term: BoundTerm, args, student: Signals, teacher: Signals | None, depths) -> None:
    kind = term.term.adapter if term.term.adapter is not None else args.adapter
    if term.signal in ("logits", "attention_scores"):
        return
    for pair in _example_pair(term, depths):
        if pair is not None:
            s, t = student.hidden_states[pair[0]], teacher.hidden_states[pair[1]]
        else:
            s, t = getattr(student, term.signal), getattr(teacher, term.signal)
        if s.shape[:-1] != t.shape[:-1]:
            raise ValueError(
                f"The term {term.name!r} compares student tensors of shape {tuple(s.shape)} with teacher tensors of shape {tuple(t.shape)} on "
                "the same batch: the two models cut the input into different numbers of positions. Use signal 'pooled', or logits terms."
            )
        term.adapters.append(build_adapter(kind, s.size(-1), t.size(-1)))


def _check_attention(term: BoundTerm, student: Capture, teacher: Capture, s_example, t_example, depths, args) -> None:
    if args.activation_checkpointing:
        if (args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "Reentrant activation checkpointing loses the gradient of captured attention, so the attention term would train nothing. "
                "Set activation_checkpointing_kwargs={'use_reentrant': False}."
            )
        if student.shares_attention:
            raise ValueError(
                f"The {student.name} shares one attention among its blocks, which cannot be told apart when activation checkpointing runs them "
                "again. Turn activation_checkpointing or the attention term off."
            )
    random = term.pairs is None
    for s, t in [(s, t) for s in range(depths[0]) for t in range(depths[1])] if random else term.pairs:
        a, b = s_example.attention_scores[s], t_example.attention_scores[t]
        if a.shape[2:] != b.shape[2:]:
            raise ValueError(
                f"The attention of the student (block {s}) is {tuple(a.shape[2:])} and of the teacher (block {t}) {tuple(b.shape[2:])} on the same "
                "batch: the two models cut the input into different numbers of positions. Set attention_weight to 0."
            )
        if a.size(1) != b.size(1) and getattr(term.loss, "heads", "equal") == "equal":
            raise ValueError(
                f"The student has {a.size(1)} attention heads at block {s} and the teacher {b.size(1)} at block {t}, so maps cannot be compared "
                "head by head. Set attention_heads='mean' (heads are averaged first), or give the student as many heads."
            )
        term.units[(s, t)] = Unit("pairs", *student.attention_pattern(s)).intersect(Unit("pairs", *teacher.attention_pattern(t)))


def _similarity(student: Capture, teacher: Capture, calibration: Mapping | None) -> Pairs:
    if calibration is None:
        raise ValueError(
            "layer_map='similar' compares the layers of both models on real data. Pass a train_dataset with a length to the trainer, "
            "or choose another layer map."
        )
    rows = []
    for capture in (student, teacher):
        signals = capture.require(CapturePlan(logits=False, hidden_states=frozenset(range(capture.depth))), calibration)
        mask = token_mask(signals, None, tuple(signals.hidden_states[0].shape[:2]), signals.hidden_states[0].device)
        rows.append([signals.hidden_states[k][mask].float().cpu() for k in range(capture.depth)])
    return similar_layer_map(*rows)
