r"""Values and gradients of the losses on vocabulary logits, in closed form, for a few rows at a time.

With `p = softmax(z / T)`, the derivatives of a row by the student's logits z are

* cross entropy: `p_s - onehot` at T = 1; with smoothing ε, `p_s - (1 - ε) onehot - ε / V`,
* soft targets, times T²: `T (p_s - p_t)`,
* reverse KL, times T²: `T p_s (log p_s - log p_t - KL)`,
* JSD, times T²: `T (1 - β) p_s (l - sum of p_s l)` with `l = log p_s - log m`,
* top k, times T²: `T (p_s - p_t)` at the k classes, `T p_s (1 - tail_t / tail_s)` at the others.

Logits come times `log2(e)`, so that softmax is `2^u / sum of 2^u`: powers of 2 are cheaper than those of e.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


LN2 = math.log(2.0)
ABSENT = -1e30
"""Stands for a logit of -inf, of which differences would be NaN."""
_SURELY_ABSENT = ABSENT * 1e-15


@dataclass
class BlockPart:
    """One loss on the rows of a block.

    Shapes:
        factor: `(rows, 1)`, what the derivative of each row is multiplied by, 0 where the row does not count.
        labels: integer `(rows, 1)`, any class where there is none.
        top_log, top_ids: `(rows, k)`, and tail `(rows, 1)` or `None`: the teacher's outcomes.
    """

    kind: str
    temperature: float
    factor: Tensor
    beta: float = 0.5
    label_smoothing: float = 0.0
    labels: Tensor | None = None
    top_log: Tensor | None = None
    top_ids: Tensor | None = None
    tail: Tensor | None = None


class _Softmax:
    """`2^u` and its sum; `u` is at most 0 and 0 somewhere, so that nothing overflows."""

    def __init__(self, u: Tensor, powers: Tensor):
        self.u, self.powers = u, powers
        self.total = powers.sum(-1, keepdim=True)
        self.log_total = self.total.log2()


class BlockLosses:
    """Computes all losses of a block; few passes over memory, nothing of the size of the logits is allocated.

    Args:
        buffer: gives uninitialised `(rows, columns)` by name and columns.
        gradient: `(rows, columns)`, receives the derivatives by the student's logits; `None` for values only.
    """

    def __init__(self, buffer: Callable[[str, int], Tensor], gradient: Tensor | None):
        self.buffer, self.gradient = buffer, gradient
        self.started = False
        self.late: list[tuple[Tensor, Tensor]] = []  # ids and what is added there

    def __call__(self, student: Tensor, teacher: Tensor | None, parts: list[BlockPart], unit: float) -> list[Tensor]:
        """Values `(rows, 1)` of `parts`; the gradient gets their derivatives.

        Args:
            student, teacher: `(rows, columns)`, logits times `log2(e) / unit`; overwritten.
            parts: losses over these columns.
            unit: the temperature that logits are divided by already.
        """
        columns = student.size(-1)
        for logits in (student, teacher):
            if logits is not None:
                logits.sub_(logits.amax(-1, keepdim=True))
        values: dict[int, Tensor] = {}
        powers, last = None, 0.0
        # falling temperatures: the powers of half the temperature are the squares of these
        for temperature in sorted({part.temperature for part in parts}, reverse=True):
            own = [index for index, part in enumerate(parts) if part.temperature == temperature]
            ratio = unit / temperature
            self.u = student if ratio == 1 else torch.mul(student, ratio, out=self.buffer("u", columns))
            if any(parts[index].kind != "top_k" for index in own):
                if powers is not None and last in (2 * temperature, 4 * temperature):
                    for _ in range(round(last / temperature) // 2):
                        powers.square_()
                else:
                    powers = torch.exp2(self.u, out=self.buffer("student powers", columns))
                last = temperature
                self.student = _Softmax(self.u, powers)
                self.share = torch.zeros_like(self.student.total)  # factor of the student's probabilities in the gradient
            if any(parts[index].kind not in ("top_k", "task") for index in own):
                t = teacher if ratio == 1 else torch.mul(teacher, ratio, out=self.buffer("t", columns))
                self.teacher = _Softmax(t, torch.exp2(t, out=self.buffer("teacher powers", columns)))
            for index in own:
                values[index] = getattr(self, f"_{parts[index].kind}")(parts[index])
            if any(parts[index].kind != "top_k" for index in own):
                self._add(self.student.powers, self.share / self.student.total)
        return [values[index].masked_fill(values[index] > -_SURELY_ABSENT, float("inf")) for index in range(len(parts))]

    def finish(self) -> None:
        """Adds what concerns single classes, once all columns of the gradient are there."""
        if self.gradient is not None and not self.started:
            self.gradient.zero_()
        for ids, values in self.late:
            self.gradient.scatter_add_(-1, ids, values)

    def _add(self, term: Tensor, factor: Tensor) -> None:
        """Adds `factor * term` to the first columns of the gradient."""
        if self.gradient is None:
            return
        columns = term.size(-1)
        first = self.gradient[:, :columns]
        if self.started:
            first.addcmul_(term, factor)
        else:
            torch.mul(term, factor, out=first)
            self.gradient[:, columns:].zero_()
        self.started = True

    def _task(self, part: BlockPart) -> Tensor:
        s, epsilon = self.student, part.label_smoothing
        surprise = s.log_total - (1 - epsilon) * s.u.gather(-1, part.labels)
        if epsilon:
            surprise = surprise - epsilon * s.u.mean(-1, keepdim=True)
            self._add(torch.ones_like(part.factor).expand_as(s.u), part.factor * (-epsilon / s.u.size(-1)))
        self.share = self.share + part.factor
        if self.gradient is not None:
            self.late.append((part.labels, (epsilon - 1) * part.factor))
        return LN2 * surprise

    def _soft_targets(self, part: BlockPart) -> Tensor:
        s, t, T = self.student, self.teacher, part.temperature
        product = torch.sub(t.u, s.u, out=self.buffer("product", s.u.size(-1))).mul_(t.powers)
        divergence = product.sum(-1, keepdim=True) / t.total - t.log_total + s.log_total
        self._add(t.powers, -T * part.factor / t.total)
        self.share = self.share + T * part.factor
        return LN2 * T**2 * divergence

    def _reverse_kl(self, part: BlockPart) -> Tensor:
        s, t, T = self.student, self.teacher, part.temperature
        product = torch.sub(s.u, t.u, out=self.buffer("product", s.u.size(-1))).mul_(s.powers)
        mean = product.sum(-1, keepdim=True) / s.total
        self._add_centred(product, mean, LN2 * T * part.factor)
        return LN2 * T**2 * (mean - s.log_total + t.log_total)

    def _jsd(self, part: BlockPart) -> Tensor:
        s, t, T, beta = self.student, self.teacher, part.temperature, part.beta
        if beta in (0, 1):
            return self._reverse_kl(part) if beta else self._soft_targets(part)
        mixture = torch.mul(t.powers, beta / t.total, out=self.buffer("mixture", s.u.size(-1)))
        mixture.addcmul_(s.powers, (1 - beta) / s.total)
        # 0 where both probabilities are: the logarithm is multiplied by them
        log_mixture = mixture.clamp_(min=torch.finfo(mixture.dtype).tiny).log2_()
        product = torch.sub(t.u, log_mixture, out=self.buffer("product", s.u.size(-1))).mul_(t.powers)
        forward = product.sum(-1, keepdim=True) / t.total - t.log_total
        product = torch.sub(s.u, log_mixture, out=product).mul_(s.powers)
        mean = product.sum(-1, keepdim=True) / s.total
        self._add_centred(product, mean, LN2 * T * (1 - beta) * part.factor)
        return LN2 * T**2 * (beta * forward + (1 - beta) * (mean - s.log_total))

    def _add_centred(self, product: Tensor, mean: Tensor, factor: Tensor) -> None:
        """`factor * p_s (l - mean of l under p_s)` from `product`, which is `l` times the student's powers."""
        self._add(product, factor / self.student.total)
        self.share = self.share - factor * mean

    def _top_k(self, part: BlockPart) -> Tensor:
        T, teacher_log, ids = part.temperature, part.top_log, part.top_ids
        kept = LN2 * self.u.gather(-1, ids)
        if part.tail is None:
            student_log = kept.log_softmax(-1)
        else:
            others = self.buffer("product", self.u.size(-1)).copy_(self.u).scatter_(-1, ids, float("-inf"))
            peak = others.amax(-1, keepdim=True)
            absent = peak < _SURELY_ABSENT
            others.sub_(peak.masked_fill(absent, 0.0)).exp2_()  # about their own peak: the k may have all the probability
            total = others.sum(-1, keepdim=True).clamp(min=torch.finfo(others.dtype).tiny)
            rest = (LN2 * (peak + total.log2())).masked_fill(absent, float("-inf"))
            student_log = torch.cat([kept, rest], -1).log_softmax(-1)
            tail = part.tail.masked_fill(absent, 0.0)
            teacher_log = torch.cat([teacher_log, tail.log()], -1)
            self._add(others, T * part.factor * (student_log[:, -1:].exp() - tail) / total)
        known = teacher_log > float("-inf")
        difference = torch.where(known, teacher_log, 0) - torch.where(known, student_log, 0)
        if self.gradient is not None:
            k = ids.size(-1)
            self.late.append((ids, T * part.factor * (student_log[:, :k].exp() - teacher_log[:, :k].exp())))
        return T**2 * (teacher_log.exp() * difference).sum(-1, keepdim=True)
