"""Any function as the teacher: an ensemble, an API client, a lookup, a model of another framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields

import torch
from torch import Tensor

from ..capture_plan import CapturePlan
from ..model_outputs import logits_of
from ..signals import Signals


class CallableTeacher:
    """Wraps `answer(batch)`, which returns `Signals`, or logits as a tensor or in a dict or `ModelOutput`.

    Args:
        answer: called under `no_grad` with the whole batch (labels included), every step.
        columns: dataset columns it needs beside the student's, such as `idx`; they are kept for it.
    """

    def __init__(self, answer: Callable[[Mapping], Signals | Tensor | Mapping], columns: list[str] | None = None):
        self.answer = answer
        self.columns = list(columns if columns is not None else getattr(answer, "columns", []))

    def __call__(self, batch: Mapping, plan: CapturePlan, rows: Tensor | None = None, project: bool = True) -> Signals:
        """What the function answers; `rows` and `project` are for models, whose heads can be restricted."""
        with torch.no_grad():
            result = self.answer(batch)
        signals = result if isinstance(result, Signals) else Signals(logits=logits_of(result))
        if signals.attention_mask is None and isinstance(batch.get("attention_mask"), Tensor) and batch["attention_mask"].dim() == 2:
            signals.attention_mask = batch["attention_mask"].bool()
        for name in (field.name for field in fields(CapturePlan)):
            wanted, got = getattr(plan, name), getattr(signals, name)
            missing = sorted(wanted - set(got)) if isinstance(wanted, frozenset) else ([""] if wanted and got is None else [])
            if missing:
                raise ValueError(
                    f"The teacher function gave no {name} {missing if isinstance(wanted, frozenset) else ''}, which a term needs. "
                    f"Return Signals({name}=...), or set the weight of that term to 0."
                )
        return signals
