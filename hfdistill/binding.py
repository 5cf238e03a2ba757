"""Binds terms to a student and a teacher: losses built, layer maps resolved, adapters made, and what cannot work refused."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import nn

from .capture import Capture, CapturePlan, plan_for
from .counting import Unit, token_mask
from .losses import LOSSES, TASK_LOSSES
from .losses.base import DistillationLoss
from .losses.task import TaskCrossEntropyLoss
from .models.adapters import build_adapter
from .models.anatomy import problem_type_of, task_of
from .models.layer_map import resolve_layer_map
from .models.similarity import similar_layer_map
from .objective import BoundTerm, Objective, Pairs
from .schedules import resolve_schedule
from .signals import LAYERED_SIGNALS, Signals
from .terms import TASK, Term


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
    problem_type = None
    if task in ("sequence", "other"):
        compares_logits = any(term.loss_signal == "logits" and not term.is_task for term in terms)
        problem_type = _problem_type(student, teacher, labels_dtype, compares_logits)
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


def _problem_type(student: Capture, teacher: Capture | None, labels_dtype: torch.dtype | None, compares_logits: bool) -> str:
    """The student's problem type; where its config is silent and logits are compared, the teacher's."""
    configs = [getattr(capture.inner, "config", None) if capture is not None else None for capture in (student, teacher)]
    own, other = (getattr(config, "problem_type", None) for config in configs)
    if own and other and own != other and compares_logits:
        raise ValueError(
            f"The student is trained for {own} and the teacher for {other}: their logits do not mean the same. "
            "Set config.problem_type of both models alike, or compare hidden states instead of logits."
        )
    return own or (other if compares_logits else None) or problem_type_of(student.model, labels_dtype)


def _wants(terms: list[Term], args, strategy: str) -> bool:
    return any((args.layer_map if term.layer_map is None else term.layer_map) == strategy for term in terms)


def _bind(term: Term, pairs: Pairs | None, task: str, problem_type: str | None, args) -> BoundTerm:
    reduction = term.layer_reduction or args.layer_reduction
    if term.is_task:
        return BoundTerm(term, TASK, nn.Identity(), pairs, reduction, {})
    options, schedules = dict(term.options), {}
    name = term.loss
    if isinstance(name, DistillationLoss):
        schedules = {key: resolve_schedule(getattr(name, key)) for key in name.scheduled}
        return BoundTerm(term, type(name).__name__, name, pairs, reduction, schedules)
    if name == "soft_targets" and task == "sequence":
        name = {"multi_label_classification": "binary_soft_targets", "regression": "regression_mse"}.get(problem_type, name)
        if name == "regression_mse":
            options.pop("temperature", None)
    loss_class = LOSSES[name]
    if "temperature" in loss_class.scheduled:
        options.setdefault("temperature", args.resolved_schedules().get("temperature", args.temperature))
    for key in [key for key in options if key in loss_class.scheduled]:
        schedules[key] = resolve_schedule(options[key])
        if schedules[key].type != "constant":
            loss_class(**{key: schedules[key].minimum})  # the constructor's own check, at the end that can be wrong
        options[key] = schedules[key](0.0)
    return BoundTerm(term, name, loss_class(**options), pairs, reduction, schedules)


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
        if term.signal != "pooled" and not s.dim() == t.dim() == 3:
            raise ValueError(
                f"The term {term.name!r} compares token vectors (batch, length, width), but the student's {term.signal} have shape "
                f"{tuple(s.shape)} and the teacher's {tuple(t.shape)}: feature maps of convolutional networks are not "
                "supported. Use logits terms."
            )
        if s.shape[:-1] != t.shape[:-1]:
            raise ValueError(
                f"The term {term.name!r} compares student tensors of shape {tuple(s.shape)} with teacher tensors of shape "
                f"{tuple(t.shape)} on "
                "the same batch: the two models cut the input into different numbers of positions. Use signal 'pooled', or logits terms."
            )
        adapter = build_adapter(kind, s.size(-1), t.size(-1))
        term.adapters.append(adapter.double() if s.dtype == torch.float64 else adapter)


def _check_attention(term: BoundTerm, student: Capture, teacher: Capture, s_example, t_example, depths, args) -> None:
    checkpoints = [m._gradient_checkpointing_func for m in student.model.modules() if getattr(m, "gradient_checkpointing", False)]
    if args.activation_checkpointing or checkpoints:
        reentrant = [getattr(function, "keywords", {}).get("use_reentrant") for function in checkpoints]
        if (args.activation_checkpointing_kwargs or {}).get("use_reentrant") or any(reentrant):
            raise ValueError(
                "Reentrant activation checkpointing loses the gradient of captured attention, so the attention term would train nothing. "
                "Set activation_checkpointing_kwargs={'use_reentrant': False}."
            )
        if student.shares_attention:
            raise ValueError(
                f"The {student.name} shares one attention among its blocks, which cannot be told apart when activation checkpointing "
                "runs them "
                "again. Turn activation_checkpointing or the attention term off."
            )
    random = term.pairs is None
    for s, t in [(s, t) for s in range(depths[0]) for t in range(depths[1])] if random else term.pairs:
        a, b = s_example.attention_scores[s], t_example.attention_scores[t]
        if a.shape[2:] != b.shape[2:]:
            raise ValueError(
                f"The attention of the student (block {s}) is {tuple(a.shape[2:])} and of the teacher (block {t}) {tuple(b.shape[2:])} "
                "on the same "
                "batch: the two models cut the input into different numbers of positions. Set attention_weight to 0."
            )
        if a.size(1) != b.size(1) and getattr(term.loss, "heads", "equal") == "equal":
            raise ValueError(
                f"The student has {a.size(1)} attention heads at block {s} and the teacher {b.size(1)} at block {t}, so maps cannot be "
                "compared "
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
