"""The order of work of the chunked vocabulary losses: matrix products over chunks of rows, everything else over blocks of a chunk.

A chunk is large, since each one adds to a weight gradient as large as the vocabulary. A block is small, so that what the passes over it
read and write stays in the cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..signals import Projection, TopLogits
from .base import LossValue
from .task import MISSING_LABEL
from .top_k import teacher_outcomes
from .vocabulary_block import ABSENT, BlockLosses, BlockPart


_LOG2E = math.log2(math.e)
# by timing on a CPU; elsewhere calls are dearer than passes over memory
_CPU_BLOCK, _BLOCK = 2**19, 2**24  # entries
_CPU_CHUNKS, _CHUNKS = 2**28, 2**30  # bytes of the logits of both models
_MOST_USEFUL_ROWS = 512


class ProjectedLogits:
    """Logits of a [`Projection`], made for a chunk of rows and read a block at a time.

    Args:
        name: of its buffers.
        projection: what they are made from.
        columns: the classes that are wanted.
        losses: the computation it belongs to.
    """

    def __init__(self, name: str, projection: Projection, columns: slice | Tensor, losses: ChunkedLosses):
        self.name, self.losses, self.scratch, self.features = name, losses, losses.scratch, projection.features
        self.device, self.softcap = projection.weight.device, projection.softcap
        autocast = torch.is_autocast_enabled(self.device.type) and projection.features.dtype != torch.float64
        self.dtype = torch.get_autocast_dtype(self.device.type) if autocast else projection.features.dtype
        self.capped: Tensor | None = None
        self.weight = self._weight(projection.weight.detach(), columns)
        # softmaxes to the base of 2 need logits times log2(e)
        self.unit_scale = _LOG2E / losses.unit
        self.alpha = projection.scale * (self.unit_scale if self.softcap is None else 1 / self.softcap)
        self.bias = None
        if projection.bias is not None:
            bias = projection.bias.detach()[columns].to(losses.precision_of(self.dtype)) * self.alpha
            # -inf for classes that are not there; fp16 has no number small enough, see `block`
            self.bias = (bias if self.dtype == torch.float16 else bias.clamp(min=ABSENT)).to(self.dtype)

    def _weight(self, weight: Tensor, columns: slice | Tensor) -> Tensor:
        if isinstance(columns, Tensor):
            chosen = self.scratch.take(f"{self.name} chosen", (columns.numel(), weight.size(1)), weight.dtype, self.device)
            weight = torch.index_select(weight, 0, columns.to(self.device), out=chosen)
        else:
            weight = weight[columns]
        if weight.dtype == self.dtype:
            return weight
        return self.scratch.take(f"{self.name} cast", tuple(weight.shape), self.dtype, self.device).copy_(weight)

    def start(self, chunk: slice, rows: Tensor) -> None:
        """Makes the logits of the rows in `chunk`; those where bool `rows` is False are as if their features were 0."""
        # they may hold anything, and 0 times NaN is NaN
        features = torch.where(rows[chunk, None].to(self.device), self.features.detach()[chunk], 0).to(self.dtype)
        self.rows = features
        self.logits = self.scratch.take(self.name, (features.size(0), self.weight.size(0)), self.dtype, self.device)
        if self.bias is None:
            torch.addmm(self.logits, features, self.weight.t(), beta=0, alpha=self.alpha, out=self.logits)
        else:
            torch.addmm(self.bias, features, self.weight.t(), alpha=self.alpha, out=self.logits)

    def block(self, rows: slice) -> Tensor:
        """Logits of some rows of the chunk times `log2(e) / unit`, to be overwritten."""
        logits = self.logits[rows]
        if self.dtype == self.losses.precision and self.device == self.losses.device:
            if self.softcap is None:
                return logits
        else:
            logits = self.losses.buffer(f"{self.name} block", *logits.shape).copy_(logits)
            if self.dtype == torch.float16:
                logits.clamp_(min=ABSENT)
        if self.softcap is None:
            return logits
        self.capped = logits.tanh_()
        return torch.mul(self.capped, self.softcap * self.unit_scale, out=self.losses.buffer(f"{self.name} uncapped", *logits.shape))


class WholeLogits:
    """Logits that are there already, as [`ProjectedLogits`] gives them."""

    def __init__(self, logits: Tensor, columns: slice | Tensor, losses: ChunkedLosses):
        self.logits, self.columns, self.losses = logits.detach(), columns, losses

    def start(self, chunk: slice, rows: Tensor) -> None:
        self.chunk, self.rows = chunk, rows

    def block(self, rows: slice) -> Tensor:
        rows = slice(self.chunk.start + rows.start, self.chunk.start + rows.stop)
        columns = self.columns.to(self.logits.device) if isinstance(self.columns, Tensor) else self.columns
        found = self.logits[rows][:, columns]
        block = self.losses.buffer("teacher block", *found.shape).copy_(found)
        block.masked_fill_(~self.rows[rows, None], 0)
        return block.mul_(_LOG2E / self.losses.unit).clamp_(min=ABSENT)


class ChunkedLosses:
    """One call of [`chunked_vocabulary_losses`], whose arguments it takes.

    After `run`, `values` holds the value of each part, and `factor` what the gradients are still to be multiplied by.
    """

    def __init__(self, student, teacher, parts, compared, teacher_columns, chunk_rows, scratch):
        self.parts, self.scratch, self.compared, self.chunk_rows = parts, scratch, compared, chunk_rows
        self.device, (self.count, self.width) = student.features.device, student.features.shape
        self.columns = student.weight.size(0)
        divergences = [index for index, part in enumerate(parts) if part.kind != "task"]
        self.unit = float(parts[divergences[0]].temperature) if divergences else 1.0
        self.student = ProjectedLogits("student", student, slice(None), self)
        self.precision = self.precision_of(self.student.dtype)
        chosen = slice(compared) if teacher_columns is None else teacher_columns
        self.teacher = None
        if isinstance(teacher, Projection):
            self.teacher = ProjectedLogits("teacher", teacher, chosen, self)
        elif isinstance(teacher, Tensor):
            self.teacher = WholeLogits(teacher, chosen, self)
        if not divergences:
            self.teacher = None
        self._choose_rows(student.scale)
        self.tops = [self._outcomes(part, counts, teacher) for part, counts in zip(parts, self.counts)]
        whole = [index for index, part in enumerate(parts) if part.kind == "task" or compared == self.columns]
        # parts that see the same classes share their softmax; the last ones may overwrite the logits
        self.groups = [([index for index in divergences if index not in whole], compared), (whole, self.columns)]
        self.groups = [group for group in self.groups if group[0]]

    @staticmethod
    def precision_of(dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32)

    def _choose_rows(self, scale: float) -> None:
        """Which rows count, and what their derivatives are multiplied by now (`factors`) and at the end (`factor`)."""
        everything = torch.ones(self.count, dtype=torch.bool, device=self.device)
        self.counts = [
            part.labels.to(self.device) != MISSING_LABEL if part.kind == "task" else everything if part.mask is None else part.mask
            for part in self.parts
        ]
        self.scales = [
            part.scale.detach().to(self.device, self.precision)
            if isinstance(part.scale, Tensor)
            else torch.full((), part.scale, dtype=self.precision, device=self.device)
            for part in self.parts
        ]
        self.factor = torch.full((), scale, dtype=self.precision, device=self.device)
        common = torch.ones_like(self.factor)
        if self.student.dtype == torch.float16:  # a weight over a count would take derivatives below its smallest number
            common = torch.stack(self.scales).abs().amax()
            common = torch.where(common > 0, common, 1)
            self.factor = self.factor * common
        self.factors = [torch.where(counts, own / common, 0).unsqueeze(-1) for counts, own in zip(self.counts, self.scales)]
        self.seen, self.matched = torch.zeros_like(everything), torch.zeros_like(everything)
        for part, counts in zip(self.parts, self.counts):
            self.seen |= counts
            if part.kind != "task":
                self.matched |= counts

    def _outcomes(self, part, counts: Tensor, teacher) -> dict[str, Tensor | None]:
        """The teacher's outcomes of a `top_k` part."""
        if part.kind != "top_k":
            return {}
        top = TopLogits(
            torch.where(counts.unsqueeze(-1), teacher.values.to(self.device), 0),
            torch.where(counts.unsqueeze(-1), teacher.ids.to(self.device).long(), 0),
            torch.where(counts, teacher.logsumexp.to(self.device), 0),
            teacher.temperature,
            teacher.tail,
        )
        log, tail = teacher_outcomes(top, part.temperature, top.ids.size(-1) < self.compared)
        return {"top_log": log.to(self.precision), "top_ids": top.ids, "tail": None if tail is None else tail.to(self.precision)}

    def _size_of_chunks(self) -> int:
        if self.chunk_rows is None:
            # each chunk costs three accesses to the weight gradient, each row about ten to its logits
            bytes_of_row = self.columns * self.student.dtype.itemsize * (2 if isinstance(self.teacher, ProjectedLogits) else 1)
            affordable = (_CPU_CHUNKS if self.device.type == "cpu" else _CHUNKS) // max(bytes_of_row, 1)
            rows = max(min(max(self.width, _MOST_USEFUL_ROWS), affordable), 16)
        else:
            rows = self.chunk_rows
        return max(math.ceil(self.count / max(math.ceil(self.count / rows), 1)), 1)

    def buffer(self, name: str, rows: int, columns: int) -> Tensor:
        """Uninitialised `(rows, columns)` in the precision of the softmaxes."""
        return self.scratch.take(name, (rows, columns), self.precision, self.device)

    def run(self, wanted: tuple[bool, ...]) -> tuple[Tensor, list[Tensor | None]]:
        """The combined loss, and the gradients of features, weight and bias where `wanted`."""
        shapes = ((self.count, self.width), (self.columns, self.width), (self.columns,))
        make = torch.empty if self.count else torch.zeros
        gradients = [make(shape, dtype=self.precision, device=self.device) if want else None for shape, want in zip(shapes, wanted)]
        values = [torch.zeros(self.count, dtype=self.precision, device=self.device) for _ in self.parts]
        size = self._size_of_chunks()
        with torch.autocast(self.device.type, enabled=False):
            for start in range(0, self.count, size):
                self._chunk(slice(start, min(start + size, self.count)), values, gradients)
        self.values = [LossValue(torch.where(counts, rows, 0).sum(), counts.sum()) for counts, rows in zip(self.counts, values)]
        combined = torch.zeros((), dtype=self.precision, device=self.device)
        for scale, value in zip(self.scales, self.values):
            combined = combined + scale * value.total
        return combined, gradients

    def _chunk(self, chunk: slice, values: list[Tensor], gradients: list[Tensor | None]) -> None:
        self.student.start(chunk, self.seen)
        if self.teacher is not None:
            self.teacher.start(chunk, self.matched)
        wanted = any(gradient is not None for gradient in gradients)
        size = max((_CPU_BLOCK if self.device.type == "cpu" else _BLOCK) // self.columns, 1)
        for start in range(chunk.start, chunk.stop, size):
            rows = slice(start, min(start + size, chunk.stop))
            local = slice(rows.start - chunk.start, rows.stop - chunk.start)
            gradient = self._block(rows, local, values, wanted)
            if wanted:
                self.student.logits[local].copy_(gradient)
            if gradients[2] is not None:
                sums = torch.sum(gradient, 0, out=self.buffer("sums", 1, self.columns).squeeze(0))
                gradients[2].add_(sums) if start else gradients[2].copy_(sums)
        if wanted:
            self._products(chunk, gradients[0], gradients[1])

    def _products(self, chunk: slice, features: Tensor | None, weight: Tensor | None) -> None:
        """Gradients of features and weight from those of the logits, which lie in the place of the logits."""
        logits, dtype = self.student.logits, self.student.dtype
        if features is not None:
            product = self.scratch.take("features", (logits.size(0), self.width), dtype, self.device)
            features[chunk] = torch.mm(logits, self.student.weight, out=product)
        if weight is None:
            return
        if dtype == self.precision:
            torch.addmm(weight, logits.t(), self.student.rows, beta=1 if chunk.start else 0, out=weight)
        else:
            product = self.scratch.take("weight", tuple(weight.shape), dtype, self.device)
            # the sum over the rows of a chunk would leave the range of fp16 where a feature is large
            share = 2.0 ** math.ceil(math.log2(logits.size(0))) if dtype == torch.float16 else 1.0
            torch.mm(logits.t(), self.student.rows / share, out=product)
            if not chunk.start:
                weight.zero_()
            weight.add_(product, alpha=share)

    def _block(self, rows: slice, local: slice, values: list[Tensor], wanted: bool) -> Tensor | None:
        """Writes the values of some rows, and returns the derivatives by their logits."""
        count = rows.stop - rows.start
        gradient = self.buffer("gradient", count, self.columns) if wanted else None
        block = BlockLosses(lambda name, columns: self.buffer(name, count, columns), gradient)
        logits = self.student.block(local)
        for indices, columns in self.groups:
            last = indices is self.groups[-1][0]
            own = logits if columns == self.columns else logits[:, :columns]
            own = own if last else self.buffer("compared", count, columns).copy_(own)
            compares = any(self.parts[index].kind not in ("task", "top_k") for index in indices)
            other = self.teacher.block(local) if compares else None
            found = block(own, other, [self._block_part(index, rows) for index in indices], self.unit)
            for index, value in zip(indices, found):
                values[index][rows] = value.squeeze(-1)
        block.finish()
        if wanted and self.student.capped is not None:  # the derivative of c tanh(z / c)
            slope = torch.mul(self.student.capped, self.student.capped, out=self.buffer("product", count, self.columns))
            gradient.addcmul_(slope, gradient, value=-1)
        return gradient

    def _block_part(self, index: int, rows: slice) -> BlockPart:
        part = self.parts[index]
        labels = None
        if part.kind == "task":
            labels = torch.where(self.counts[index][rows], part.labels[rows].to(self.device).long(), 0).unsqueeze(-1)
        tops = {name: None if tensor is None else tensor[rows] for name, tensor in self.tops[index].items()}
        temperature = 1.0 if part.kind == "task" else float(part.temperature)
        return BlockPart(part.kind, temperature, self.factors[index][rows], part.beta, part.label_smoothing, labels, **tops)
