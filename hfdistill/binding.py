"""Binds terms to a student and a teacher: losses built, layer maps resolved, adapters made, and what cannot work refused."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping

import torch
from torch import nn

from .bound_term import BoundTerm
from .capture import Capture
from .capture_plan import CapturePlan, plan_for
from .counting import TARGET_MASK, Unit, token_mask
from .losses import LOSSES, TASK_LOSSES
from .losses.base import DistillationLoss
from .losses.logits import SoftTargetsLoss
from .losses.pairs import ContrastivePairsLoss
from .losses.spans import TaskSpanLoss
from .losses.task import TaskCrossEntropyLoss
from .models.adapters import SharedAdapter, build_adapter
from .models.anatomy import problem_type_of, task_of
from .models.layer_map import Pairs, resolve_layer_map
from .models.similarity import similar_layer_map
from .objective import Objective
from .schedules import resolve_schedule
from .signals import ATTENTION_SIGNALS, LAYERED_SIGNALS, STAGE_SIGNALS, Signals
from .terms import PAIRS, TASK, Term


# Losses whose temperature is that of the run where the term has none; others have one of another kind, with a default of its own.
_RUN_TEMPERATURE = ("soft_targets", "binary_soft_targets", "standardized_soft_targets", "decoupled", "reverse_kl", "jsd")


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
    example_labels: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None,
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
        example_labels: gives the label (-100 where unknown) and the number of every training example, for losses that remember them.

    Raises:
        ValueError: where a signal cannot be had, blocks do not exist, widths, heads or lengths do not fit.
    """
    layered = [term for term in terms if term.loss_signal in LAYERED_SIGNALS]
    if layered and teacher is None:
        raise ValueError(
            f"The term {layered[0].name!r} compares layers, but the teacher is a function, whose layers are not known. "
            "Pass the teacher as a module, or use terms on logits."
        )
    counted = {_depth_kind(term) for term in layered if not _names_only(_strategy(term, args))}
    depths = {kind: _depths(kind, student, teacher, example) if kind in counted else (0, 0) for kind in map(_depth_kind, layered)}
    similarities = {
        signal: _similarity(signal, student, teacher, calibration)
        for signal in {_depth_kind(term) for term in layered if _strategy(term, args) == "similar"}
    }
    bound = []
    for term in terms:
        pairs = None
        if term.loss_signal in LAYERED_SIGNALS:
            spec, kind = _strategy(term, args), _depth_kind(term)
            if term.name in (fixed_maps or {}):
                pairs = fixed_maps[term.name]
            elif spec == "similar":
                pairs = similarities[kind]
            elif spec != "random":
                named = kind == "features"
                pairs = resolve_layer_map(spec, *depths[kind], seed=args.seed, recorded=recorded, named=named)
            elif kind == "features" or term.loss_class.joint:
                raise ValueError(
                    f"The term {term.name!r} cannot draw its layer map anew each step: its layers have different shapes, or belong "
                    "together. Use layer_map='uniform', or pairs such as '0:0,1:1'."
                )
        bound.append((term, pairs))

    task = task_of(student.model)
    if task == "other" and not any(term.loss_signal == "logits" for term in terms) and not student.has_logits(example):
        task = "features"
    for capture in filter(None, (student, teacher)):
        capture.run_pooling = args.pooling
    if args.pooling == "auto" and teacher is not None and teacher.own_pooling:
        student.run_pooling = teacher.own_pooling
    problem_type = None
    if task in ("sequence", "other"):
        compares_logits = any(term.loss_signal == "logits" and not term.is_task for term in terms)
        problem_type = _problem_type(student, teacher, labels_dtype, compares_logits)
    needs = [(t.loss_signal, _layers(t, pairs, depths, 0)) for t, pairs in bound]
    answer = "pooled" if task == "features" else "logits"
    s_example = student.require(plan_for([(answer, [])]).union(plan_for(needs)), example)
    t_example = None
    if teacher is not None:
        needs = [(t.loss_signal, _layers(t, pairs, depths, 1)) for t, pairs in bound if not t.is_task]
        if needs:
            t_example = teacher.require(plan_for(needs), example)
    if task == "other":
        task = "sequence" if s_example.logits.dim() == 2 else "token"

    positions = args.kd_positions
    if positions == "auto":
        positions = "marked" if TARGET_MASK in example else "all" if task == "masked_lm" else "labelled"
    objective_terms = [_bind(term, pairs, task, problem_type, args) for term, pairs in bound]
    for own in objective_terms:
        own.depths = depths[_depth_kind(own.term)] if own.layered else (0, 0)
    objective = Objective(objective_terms, task, problem_type, positions, args.seed)
    objective.task_loss = build_task_loss(task, problem_type, args.label_smoothing_factor)
    # Adapters get their own seed: the student's dropout must not depend on whether there is an adapter.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        for term in objective.terms.values():
            poolings = [capture.pooling for capture in (student, teacher) if capture is not None]
            term.pooling = poolings[0] if len({*poolings}) == 1 else f"student {poolings[0]}, teacher {poolings[1]}"
            _add_adapters(term, args, s_example, t_example, objective.shared_adapters)
            _prepare_losses(term, s_example, t_example, example_labels)
            if term.signal in (*ATTENTION_SIGNALS, *STAGE_SIGNALS):
                _check_checkpointing(student, args)
            if getattr(term.loss, "token", None) == "first" and any(c is not None and c.is_causal for c in (student, teacher)):
                raise ValueError(
                    f"The term {term.name!r} compares the first token of each text, which in a decoder has seen nothing but itself: it "
                    "would teach nothing about the text. Set its option token='last'."
                )
            if term.signal == "attention_scores":
                _check_attention(term, student, teacher, s_example, t_example)
    return objective


def build_task_loss(task: str, problem_type: str | None, label_smoothing: float = 0.0) -> nn.Module:
    """The loss on hard labels: by problem type for sequence models, start and end of spans, cross entropy over positions otherwise."""
    if task == "question_answering":
        return TaskSpanLoss(label_smoothing=label_smoothing)
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


def _strategy(term: Term, args):
    return args.layer_map if term.layer_map is None else term.layer_map


def _names_only(spec) -> bool:
    """Whether a layer map names modules alone, for which no stages need to be found."""
    if isinstance(spec, str) and ":" not in spec:
        return False
    try:
        return bool(resolve_layer_map(spec, 0, 0, named=True))
    except ValueError:
        return False


def _depth_kind(term: Term) -> str:
    """Whether the layers of a term are stages (`features`) or transformer blocks (`hidden_states`)."""
    return "features" if term.loss_signal in STAGE_SIGNALS else "hidden_states"


def _depths(kind: str, student: Capture, teacher: Capture, example: Mapping) -> tuple[int, int]:
    if kind == "features":
        return len(student.find_stages(example)), len(teacher.find_stages(example))
    return student.depth, teacher.depth


def _layers(term: Term, pairs: Pairs | None, depths: Mapping[str, tuple[int, int]], side: int):
    """What is needed of the student (side 0) or the teacher (side 1); all of it for a map that is drawn anew each step."""
    if pairs is not None:
        return [pair[side] for pair in pairs]
    return range(depths[_depth_kind(term)][side]) if term.loss_signal in LAYERED_SIGNALS else []


def _bind(term: Term, pairs: Pairs | None, task: str, problem_type: str | None, args) -> BoundTerm:
    reduction = term.layer_reduction or args.layer_reduction
    if term.loss == PAIRS:
        return BoundTerm(term, PAIRS, ContrastivePairsLoss(**term.options), pairs, reduction, {})
    if term.is_task:
        return BoundTerm(term, TASK, nn.Identity(), pairs, reduction, {})
    options, schedules = dict(term.options), {}
    name = term.loss
    if isinstance(name, DistillationLoss):
        _check_kind_of_logits(term, type(name), task, problem_type)
        schedules = {key: resolve_schedule(getattr(name, key)) for key in name.scheduled}
        # A copy, as of adapters: each trainer, trial and term starts from the loss as it was given.
        return BoundTerm(term, type(name).__name__, copy.deepcopy(name), pairs, reduction, schedules)
    if name == "soft_targets" and task == "sequence":
        name = {"multi_label_classification": "binary_soft_targets", "regression": "regression_mse"}.get(problem_type, name)
        if name == "regression_mse":
            options.pop("temperature", None)
    if task == "question_answering" and name in ("binary_soft_targets", "regression_mse"):
        raise ValueError(
            f"The term {term.name!r} compares single outputs ({name}), but start and end are each one softmax over the positions of a "
            "text. Use soft_targets or logit_mse."
        )
    loss_class = LOSSES[name]
    _check_kind_of_logits(term, loss_class, task, problem_type)
    if name in _RUN_TEMPERATURE:
        options.setdefault("temperature", args.resolved_schedules().get("temperature", args.temperature))
    for key in [key for key in options if key in loss_class.scheduled]:
        schedules[key] = resolve_schedule(options[key])
        if schedules[key].type != "constant":
            loss_class(**{key: schedules[key].minimum})  # the constructor's own check, at the end that can be wrong
        options[key] = schedules[key](0.0)
    return BoundTerm(term, name, loss_class(**options), pairs, reduction, schedules)


def _check_kind_of_logits(term: Term, loss_class: type[DistillationLoss], task: str, problem_type: str | None) -> None:
    """A softmax over labels that do not exclude each other, or over one number, means nothing."""
    softmax = issubclass(loss_class, SoftTargetsLoss) and task == "sequence"  # given as an object; the name becomes the binary form
    if not (loss_class.one_class_a_row or softmax):
        return
    if task == "sequence" and problem_type != "single_label_classification":
        raise ValueError(
            f"The term {term.name!r} ({loss_class.__name__}) compares one class a row, but the student is trained for {problem_type}. Use "
            "soft_targets, which becomes binary KL or squared error there, or logit_mse."
        )
    if task == "question_answering":
        raise ValueError(
            f"The term {term.name!r} ({loss_class.__name__}) compares classes, but start and end are positions of a text. Use soft_targets "
            "or logit_mse."
        )


def _example_pair(term: BoundTerm) -> Pairs:
    """The pairs of a term; for a random map one pair for each student block (all teacher blocks have one shape)."""
    if not term.layered:
        return [None]
    return term.pairs if term.pairs is not None else [(s, s) for s in range(term.depths[0])]


def _add_adapters(term: BoundTerm, args, student: Signals, teacher: Signals | None, shared: nn.ModuleDict) -> None:
    """An adapter for each pair where the loss compares widths; refuses shapes and widths that cannot be compared."""
    kind = term.term.adapter if term.term.adapter is not None else args.adapter
    if term.term.is_task or term.signal == "attention_scores":
        return
    if term.signal == "logits":
        if teacher is not None:
            term.loss.check_widths(student.logits.size(-1), teacher.logits.size(-1))
        return
    if teacher is None:  # a function, whose width shows only in training: the loss will compare the shapes
        if kind not in ("auto", "none") and not isinstance(kind, nn.Module):
            raise ValueError(
                f"The term {term.name!r} wants the adapter {kind!r}, but the teacher is a function, whose width is not known before "
                "training. Pass the adapter as a module, such as torch.nn.Linear(student width, teacher width)."
            )
        term.adapters.append(build_adapter(kind if isinstance(kind, nn.Module) else "none", 0, 0))
        return
    maps = term.signal == "features"
    for pair in _example_pair(term):
        s, t = term.tensors(pair, student, teacher)
        if not maps and term.signal not in ("pooled", "pooled_features") and not s.dim() == t.dim() == 3:
            raise ValueError(
                f"The term {term.name!r} compares token vectors (batch, length, width), but the student's {term.signal} have shape "
                f"{tuple(s.shape)} and the teacher's {tuple(t.shape)}. For the maps of convolutional networks use signal 'features'."
            )
        if not maps and term.loss.layout != "vectors" and s.shape[:-1] != t.shape[:-1]:
            images = " For the patches of images use signal 'features', which leaves special tokens out and resizes."
            raise ValueError(
                f"The term {term.name!r} compares student tensors of shape {tuple(s.shape)} with teacher tensors of shape "
                f"{tuple(t.shape)} on "
                "the same batch: the two models cut the input into different numbers of positions. Use signal 'pooled', or logits terms."
                + (images if student.attention_mask is None else "")
            )
        widths = (s.size(1), t.size(1)) if maps else (s.size(-1), t.size(-1))
        term.loss.check_widths(*widths)
        if not term.loss.compares_widths:
            continue
        key = f"{'map_' if maps else ''}{widths[0]}_{widths[1]}"
        adapter = shared[key] if kind == "shared" and key in shared else build_adapter(kind, *widths, maps=maps)
        adapter = adapter.double() if s.dtype == torch.float64 else adapter
        if kind == "shared":
            shared[key] = adapter
        term.adapters.append(SharedAdapter(adapter) if kind == "shared" else adapter)


def _prepare_losses(term: BoundTerm, student: Signals, teacher: Signals | None, example_labels: Callable | None) -> None:
    """Makes the parameters of losses that train some: for each pair its own, from the shapes that the loss will see."""
    if term.term.is_task or type(term.loss).prepare is DistillationLoss.prepare:
        return
    if teacher is None:
        raise ValueError(
            f"The term {term.name!r} ({term.loss_name}) sets itself up by the shapes of both models, but the teacher is a function, whose "
            "shapes are not known before training. Pass the teacher as a module."
        )
    if getattr(term.loss, "examples", 0) is None and example_labels is not None:
        term.loss.set_examples(*example_labels())
    with torch.no_grad():
        adapters = term.adapters.training
        term.adapters.eval()  # an example is no batch: batch norm must not see it
        shapes = []
        for index, pair in enumerate(_example_pair(term)):
            s, t = term.tensors(pair, student, teacher)
            tokens = term.signal not in (*STAGE_SIGNALS, "pooled", "logits")
            mask = term.token_masks(student, teacher, s) if tokens else None
            s, t, _ = (s, t, None) if term.signal == "logits" else term.bring(index, s, t, mask)
            shapes.append((tuple(s.shape), tuple(t.shape)))
        term.adapters.train(adapters)
    if term.joint:
        term.loss.prepare([s for s, _ in shapes], [t for _, t in shapes])
    else:
        term.losses.extend(copy.deepcopy(term.loss) for _ in shapes[1:])
        for loss, (own, other) in zip(term.losses, shapes):
            loss.prepare(own, other)
    if s.dtype == torch.float64:
        term.losses.double()


def _check_checkpointing(student: Capture, args) -> None:
    """What is taken inside the attention must survive that checkpointing runs it again."""
    checkpoints = [m._gradient_checkpointing_func for m in student.model.modules() if getattr(m, "gradient_checkpointing", False)]
    if args.activation_checkpointing or checkpoints:
        reentrant = [getattr(function, "keywords", {}).get("use_reentrant") for function in checkpoints]
        if (args.activation_checkpointing_kwargs or {}).get("use_reentrant") or any(reentrant):
            raise ValueError(
                "Reentrant activation checkpointing loses the gradient of what is captured inside the model, so terms on attention and "
                "features would train nothing. "
                "Set activation_checkpointing_kwargs={'use_reentrant': False}."
            )
        if student.shares_attention:
            raise ValueError(
                f"The {student.name} shares one attention among its blocks, which cannot be told apart when activation checkpointing "
                "runs them "
                "again. Turn activation_checkpointing or the attention term off."
            )


def _check_attention(term: BoundTerm, student: Capture, teacher: Capture, s_example, t_example) -> None:
    random = term.pairs is None
    for s, t in [(s, t) for s in range(term.depths[0]) for t in range(term.depths[1])] if random else term.pairs:
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


def _similarity(kind: str, student: Capture, teacher: Capture, calibration: Mapping | None) -> Pairs:
    """Layers by CKA: of the real tokens at each block, or of the means over space at each stage."""
    if calibration is None:
        raise ValueError(
            "layer_map='similar' compares the layers of both models on real data. Pass a train_dataset with a length to the trainer, "
            "or choose another layer map."
        )
    rows = []
    for capture in (student, teacher):
        if kind == "features":
            stages = range(len(capture.find_stages(calibration)))
            maps = capture.require(CapturePlan(logits=False, features=frozenset(stages)), calibration).features
            rows.append([maps[k].float().mean((2, 3)).cpu() for k in stages])
            continue
        signals = capture.require(CapturePlan(logits=False, hidden_states=frozenset(range(capture.depth))), calibration)
        mask = token_mask(signals, None, tuple(signals.hidden_states[0].shape[:2]), signals.hidden_states[0].device)
        rows.append([signals.hidden_states[k][mask].float().cpu() for k in range(capture.depth)])
    return similar_layer_map(*rows)
