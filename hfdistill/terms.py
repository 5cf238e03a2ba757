"""`Term`: one line of an objective, as the user writes it in Python or YAML."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .losses import LOSSES
from .losses.base import DistillationLoss
from .losses.pairs import ContrastivePairsLoss
from .schedules import Schedule, resolve_schedule
from .signals import LAYERED_SIGNALS, SIGNALS
from .step_clock import PROFILE_NAMES
from .suggest import nearest_or_all


TASK = "task"
PAIRS = "contrastive_pairs"
RESERVED_NAMES = ("loss", "grad_norm", "learning_rate", "epoch", "step", "runtime", *PROFILE_NAMES)


@dataclass
class Term:
    """One weighted loss of the objective.

    Args:
        loss (`str` or [`DistillationLoss`]): a name from `LOSSES`, or `"task"` (hard labels, by problem type), or `"contrastive_pairs"`
            (pooled vectors of rows with equal labels, see [`ContrastivePairsLoss`]). `"soft_targets"` becomes binary KL for
            multi-label models and squared error for regression.
        weight (`float`, `dict` or [`Schedule`]): what the loss is multiplied by; a dict is a schedule.
        name (`str`, *optional*): under which it is logged. Default: the name of the loss.
        layer_map: for losses on layers, as in `resolve_layer_map`. Default: the `layer_map` of the arguments.
        signal (`str`, *optional*): what is compared, where a loss fits several: `hidden_states`, `features` (maps of image models,
            by stage), `pooled_features` (their means over space), `embeddings`, `pooled`, `queries`, `keys`, `values`.
        adapter (`str` or `nn.Module`, *optional*): projection of the student. Default: the `adapter` of the arguments.
        layer_reduction (`str`, *optional*): `mean` or `sum` over mapped pairs. Default: that of the arguments.
        options (`dict`): arguments of the loss, such as `temperature` (which may be a schedule).

    Raises:
        ValueError: for unknown losses, signals and options, and for weights that are negative or not finite.
    """

    loss: str | DistillationLoss
    weight: float | Mapping[str, Any] | Schedule = 1.0
    name: str | None = None
    layer_map: Any = None
    signal: str | None = None
    adapter: str | nn.Module | None = None
    layer_reduction: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if isinstance(self.loss, str) and self.loss not in (TASK, PAIRS) and self.loss not in LOSSES:
            raise ValueError(f"Unknown loss {self.loss!r}.{nearest_or_all(self.loss, [TASK, PAIRS, *LOSSES])}")
        if self.signal is not None and self.signal not in SIGNALS:
            raise ValueError(f"Unknown signal {self.signal!r}.{nearest_or_all(self.signal, SIGNALS)}")
        if self.layer_reduction not in (None, "mean", "sum"):
            raise ValueError(f"layer_reduction must be 'mean' or 'sum', got {self.layer_reduction!r}.")
        label = self.name or (self.loss if isinstance(self.loss, str) else type(self.loss).__name__)
        if label in RESERVED_NAMES or "." in label or hasattr(nn.ModuleDict, label):
            raise ValueError(f"A term cannot be called {label!r}: that name is taken by the log or by torch. Choose another name.")
        self.name = label
        self._check_options()
        self.weight = resolve_schedule(self.weight)
        if not (math.isfinite(self.weight.minimum) and self.weight.minimum >= 0):
            raise ValueError(
                f"The weight of the term {label!r} must be a finite number >= 0, got {self.weight.minimum}: a negative weight would push "
                "the student away from the teacher. Use 0 to turn the term off."
            )
        if self.layer_map is not None and isinstance(self.loss, str) and self.loss_signal not in LAYERED_SIGNALS:
            raise ValueError(f"The term {label!r} compares {self.loss_signal}, which has no layers. Remove its layer_map.")
        possible = None if self.is_task else self.loss_class.signals
        if possible is not None and self.loss_signal not in possible:
            raise ValueError(
                f"The term {label!r} cannot compare {self.loss_signal}: {self.loss_class.__name__} works on the tokens of "
                f"{', '.join(possible)}. Set signal to one of these."
            )
        if self.adapter is not None and not self.is_task and not self.loss_class.compares_widths:
            raise ValueError(
                f"The adapter of the term {label!r} would not be used: {self.loss_class.__name__} compares models of any width as they "
                "are. Remove the adapter."
            )

    def _check_options(self) -> None:
        if isinstance(self.loss, str) and self.loss != TASK:
            known = list(inspect.signature(self.loss_class.__init__).parameters)[1:]
        else:
            known = []  # the task loss has its settings in the arguments, an instance has got its own already
        for key in self.options:
            if key not in known:
                fields = [name for name in type(self).__dataclass_fields__ if name != "options"]
                raise ValueError(f"The term {self.name!r} has no setting {key!r}.{nearest_or_all(key, [*fields, *known])}")

    @property
    def is_task(self) -> bool:
        """Whether it compares the student with labels and needs no teacher."""
        return self.loss in (TASK, PAIRS)

    @property
    def loss_class(self) -> type[DistillationLoss] | type[ContrastivePairsLoss] | None:
        if self.is_task:
            return ContrastivePairsLoss if self.loss == PAIRS else None
        return LOSSES[self.loss] if isinstance(self.loss, str) else type(self.loss)

    @property
    def loss_signal(self) -> str:
        if self.is_task:
            return "pooled" if self.loss == PAIRS else "logits"
        return self.signal or self.loss_class.signal

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Term:
        """A term from YAML: keys that are no field of `Term` are arguments of the loss.

        Example:
            >>> Term.from_dict({"loss": "soft_targets", "weight": 0.5, "temperature": 4.0}).options
            {'temperature': 4.0}
        """
        if not isinstance(entry, Mapping) or "loss" not in entry:
            raise ValueError(f"A term needs at least a 'loss', got {entry!r}. Example: {{'loss': 'hidden_mse', 'weight': 1.0}}.")
        own = set(cls.__dataclass_fields__)
        fields = {key: value for key, value in entry.items() if key in own}
        rest = {key: value for key, value in entry.items() if key not in own}
        return cls(**{**fields, "options": {**fields.get("options", {}), **rest}})


def default_terms(args) -> list[Term]:
    """The terms that the plain weights of `DistillationTrainingArguments` stand for."""
    schedules = args.resolved_schedules()
    temperature = schedules.get("temperature", args.temperature)
    kinds = {
        "task_weight": Term(TASK, name="task"),
        "kd_weight": Term("soft_targets", name="kd", options={"temperature": temperature}),
        "logit_mse_weight": Term("logit_mse", name="logit_mse"),
        "hidden_weight": Term("hidden_mse", name="hidden"),
        "embedding_weight": Term("embedding_mse", name="embedding"),
        "cosine_weight": Term("cosine", name="cosine", layer_map=args.cosine_layer_map),
        "attention_weight": Term(args.attention_loss, name="attention", options={"heads": args.attention_heads}),
    }
    terms = []
    for argument, term in kinds.items():
        term.weight = schedules.get(argument) or resolve_schedule(getattr(args, argument))
        if term.weight.maximum > 0:
            terms.append(term)
    return terms


def resolve_terms(args, given: list[Term] | None = None) -> list[Term]:
    """The terms of a run: `given` in Python, else `args.objective` from YAML, else what the plain weights stand for.

    Raises:
        ValueError: when two terms share a name, or every weight is zero for the whole run.
    """
    entries = args.objective if given is None else given
    if entries is None:
        terms = default_terms(args)
    else:
        weights = [name for name in args.schedules or {} if name != "temperature"]
        if weights:
            raise ValueError(
                f"schedules names {weights}, but with an objective the plain weights are not used. Write the schedule as the weight of "
                "its term: weight={'type': 'linear', 'start': 1.0, 'end': 0.2}."
            )
        terms = [entry if isinstance(entry, Term) else Term.from_dict(entry) for entry in entries]
    names = [term.name for term in terms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Two terms are called {twice[0]!r}, so their logs could not be told apart. Give one of them another name.")
    if not any(term.weight.maximum > 0 for term in terms):
        raise ValueError("All weights are zero, so the loss is 0 and nothing would be learnt. Give at least one term a weight above 0.")
    return [term for term in terms if term.weight.maximum > 0]
