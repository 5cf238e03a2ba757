"""What packed rows cannot be used for is refused before training."""

from __future__ import annotations

from typing import Any

import torch

from .attention_taps import SoftmaxTap
from .bound_term import BoundTerm
from .capture import Capture
from .capture_plan import CapturePlan
from .counting import real_tokens
from .data.packing import PackingCollator
from .objective import Objective
from .signals import STAGE_SIGNALS
from .teachers import AdaptersOffTeacher


_TOKEN_TASKS = ("token", "masked_lm", "causal_lm")
_TOLERANCE = {torch.float16: 0.05, torch.bfloat16: 0.05}
_CURE = "Leave packing out; train_sampling_strategy='group_by_length' saves padding with any objective."


def check_packing(
    collator: PackingCollator, objective: Objective, student: Capture, teacher: Any, example: dict[str, torch.Tensor] | None
) -> None:
    """Raises unless every term means the same in packed rows, and both models read packed sequences as if each were alone.

    Args:
        collator: of the run.
        objective: bound.
        student: its capture.
        teacher: of the trainer; `None` for a plain training.
        example: a padded batch that `collator` can pack; without one the models are not tried.

    Raises:
        ValueError: for tasks and terms that are about whole sequences or compare tokens of a row with each other, and for models
            whose hidden states are others in a packed row than alone.
    """
    if objective.task not in _TOKEN_TASKS:
        raise ValueError(
            f"Rows are packed, but the student answers for whole sequences (its task: {objective.task}), of which a packed row holds "
            f"several. {_CURE}"
        )
    causal = objective.task == "causal_lm"
    if collator.causal != causal:
        raise ValueError(
            f"PackingCollator has causal={collator.causal}, but the student's task is {objective.task}: the first token of each sequence "
            f"would {'be predicted from another sequence' if causal else 'lose its label'}. Pass causal={causal}."
        )
    captures = [student]
    if teacher is not None and not isinstance(teacher, AdaptersOffTeacher):  # which is the student's own model
        if not isinstance(getattr(teacher, "capture", None), Capture):
            raise ValueError(
                f"Rows are packed, but a teacher that is a {type(teacher).__name__} answers for single examples, of which a packed row "
                "holds several. Pass the teacher as a model, without teacher_store, or leave packing out."
            )
        captures.append(teacher.capture)
    for term in objective.terms.values():
        reason = _unfit(term, objective, captures, causal)
        if reason is not None:
            raise ValueError(f"Rows are packed, but the term {term.name!r} {reason}")
    for capture in captures if example is not None else ():
        _try_model(collator, capture, example)


def _unfit(term: BoundTerm, objective: Objective, captures: list[Capture], causal: bool) -> str | None:
    if term.term.is_task and term.signal == "logits":
        return None
    if term.signal in ("pooled", *STAGE_SIGNALS) or term.loss.layout != "rows" or term.loss.unit == "sequences":
        return f"({term.loss_name}) is about whole sequences, of which a packed row holds several. Remove it, or leave packing out."
    if "keys" in (term.loss.signals or (term.signal,)):
        return f"({term.loss_name}) compares the tokens of a row with each other, across its sequences. Remove it, or leave packing out."
    if "example_ids" in term.loss.needs:
        return f"({term.loss_name}) remembers examples, and a packed row is none. Remove it, or leave packing out."
    if term.signal == "attention_scores" and any(isinstance(capture._tap, SoftmaxTap) for capture in captures):
        return "reads an attention that does not show its mask of blocks. Set attention_weight to 0, or leave packing out."
    if term.signal == "logits" and term.loss.unit != "labels" and causal and objective.positions == "all":
        return (
            "would compare what the last token of one sequence says about the first of the next (kd_positions='all'). Set "
            "kd_positions='labelled': with CausalCollator these are all real tokens but the first of each sequence."
        )
    return None


def _try_model(collator: PackingCollator, capture: Capture, example: dict[str, torch.Tensor]) -> None:
    """The last hidden states of sequences that share a row must be those of the padded batch."""
    mask = real_tokens(example)
    ids = example["input_ids"]
    total = ids.numel() if mask is None else int(mask.sum())
    padded = {name: value.cpu() for name, value in example.items() if isinstance(value, torch.Tensor)}
    padded["place"] = torch.arange(ids.numel()).view_as(padded["input_ids"])
    one_row = PackingCollator(collator.collator, total, collator.causal).pack(padded)
    places = one_row.pop("place")[one_row["sequence_ids"] > 0]
    block = capture.depth - 1
    plan = CapturePlan(logits=False, hidden_states=frozenset([block]))

    def states(batch) -> torch.Tensor:
        batch = {name: value.to(ids.device) for name, value in batch.items()}
        return capture.require(plan, batch).hidden_states[block].flatten(0, 1).float()

    alone = states(example)[places.to(ids.device)]
    try:
        difference = float((states(one_row) - alone).abs().max() / alone.abs().max().clamp(min=1e-12))
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"The {capture.name} cannot read packed rows: it takes no mask of blocks ({error}). {_CURE}") from error
    if not difference <= _TOLERANCE.get(capture.inner.dtype, 1e-3):
        raise ValueError(
            f"In a packed row the {capture.name} does not read each sequence as if it were alone: its hidden states differ by "
            f"{difference:.1%} of their largest value, so it takes no mask of blocks or no positions that begin anew. {_CURE}"
        )
