"""Relations between the tokens of a sample, which models of different width and head count can share."""

from __future__ import annotations

import math

from torch import Tensor

from .base import DistillationLoss, LossValue
from .masking import check_mask, check_same_rows, log_softmax_over, select_rows


class RelationKLLoss(DistillationLoss):
    r"""Kullback-Leibler divergence between the self-relations of two models, token by token.

    The width of each side is cut into `heads` relation heads, whatever the heads of the model. Within a head, with `X` the vectors
    of one sample, `R = softmax(X X^T / sqrt(width / heads))` over its real tokens, and the loss is `sum over real tokens of the
    mean over relation heads of KL(R_t || R_s)`. On queries, keys and values these are the three relations of
    [MiniLMv2, Wang et al. 2021](https://huggingface.co/papers/2012.15828), one term each; on values with as many relation heads as
    the models have heads, the value relation of [MiniLM, Wang et al. 2020](https://huggingface.co/papers/2002.10957), which goes
    with [`AttentionKLLoss`]; on hidden states a comparison that needs no projection. Zero when all relations agree, so it ignores
    an orthogonal map within a relation head; otherwise positive.

    MiniLM compares the last block only (`layer_map="-1:-1"`); MiniLMv2 the student's last block with one in the upper part of a
    large teacher. The relations take a few times `batch * heads * length²` numbers of memory.

    Args:
        heads (`int`, defaults to 12): relation heads. MiniLMv2 uses 48 for teachers of width 768 and 64 for width 1024.

    Shapes:
        student, teacher: `(batch, length, width)`; the widths may differ, and `heads` divides both.
        mask: bool `(batch, length)`, True at real tokens, which count as rows and are the keys of each other; `None` for all.
        unit: rows (once for all heads).

    Raises:
        ValueError: if `heads` is no integer >= 1 or does not divide both widths, and if the shapes differ but for the width.

    Example:
        >>> from hfdistill import Term
        >>> [
        ...     Term("relation_kl", signal=signal, name=f"{signal}_relation", layer_map="-1:-1", options={"heads": 48}).loss_signal
        ...     for signal in ("queries", "keys", "values")
        ... ]
        ['queries', 'keys', 'values']
    """

    signal = "values"
    signals = ("values", "queries", "keys", "hidden_states", "embeddings")
    compares_widths = False

    def __init__(self, heads: int = 12):
        super().__init__()
        if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
            raise ValueError(
                f"heads must be an integer >= 1, got {heads!r}: the width of each model is cut into that many relation heads. "
                "Use 12, or as many as divide both widths; more heads make finer relations."
            )
        self.heads = heads

    def check_widths(self, student: int, teacher: int) -> None:
        if student % self.heads or teacher % self.heads:
            shared = math.gcd(student, teacher)
            fitting = ", ".join(str(n) for n in range(1, shared + 1) if shared % n == 0)
            raise ValueError(
                f"heads={self.heads} relation heads do not divide the widths {student} of the student and {teacher} of the teacher, so the "
                f"relations of the two could not be paired. Set heads to one of {fitting}."
            )

    def compute(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> LossValue:
        if student.dim() != 3:
            raise ValueError(
                f"student has shape {tuple(student.shape)}: relations are between the tokens of a sample, (batch, length, width). "
                "Pass queries, keys, values or hidden states of one block."
            )
        check_same_rows(student, teacher)
        self.check_widths(student.size(-1), teacher.size(-1))
        check_mask(mask, student.shape[:-1])
        if mask is None:
            mask = student.new_ones(student.shape[:-1]).bool()
        student_log, teacher_log = self._log_relations(student, mask), self._log_relations(teacher, mask)
        entries = teacher_log.exp() * (teacher_log - student_log)
        return LossValue(entries.sum(-1).mean(1).sum(), mask.sum())

    def _log_relations(self, tensor: Tensor, mask: Tensor) -> Tensor:
        """`(batch, heads, length, length)`: log-probabilities between real tokens, 0 elsewhere."""
        heads = select_rows(tensor, mask).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        scores = heads @ heads.transpose(2, 3) / math.sqrt(heads.size(-1))
        return log_softmax_over(scores, mask[:, None, :, None] & mask[:, None, None, :])
