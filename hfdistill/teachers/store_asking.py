"""Asks a teacher what is to be stored, and cuts its answer to a batch into those to single examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor, nn

from ..capture_plan import CapturePlan
from ..models.anatomy import task_of
from ..redaction import shareable
from ..signals import Signals
from ..vocabulary_head import VocabularyHead
from .fingerprints import config_settings, plain
from .frozen import FrozenTeacher
from .store_format import Manifest, StoredRow, StoredSignal
from .store_keys import STORE_KEYS, BatchKeys


KINDS = ("full", "hidden", "top_k", "top_k_without_tail")


class TeacherAsker:
    """Asks `teacher` for `plan`, with the logits of a vocabulary at the positions that carry a loss.

    Args:
        teacher: a model.
        plan: what is stored.
        example: a small batch with its keys, which decides the columns.
        logits, top_k, temperature, classes, rows_of, dtype: as for [`store_teacher`].

    Raises:
        ValueError: for kinds of logits that the teacher does not have, and answers that do not fit the tokens of the batch.
    """

    def __init__(
        self,
        teacher: FrozenTeacher,
        plan: CapturePlan,
        example: Mapping,
        logits: str,
        top_k: int,
        temperature: float,
        rows_of: Callable[[Mapping], Tensor] | None,
        dtype: str,
        classes: int | None = None,
    ):
        self.teacher, self.plan, self.dtype = teacher, plan, dtype
        self.rows_of = rows_of or _real_tokens
        self.task = task_of(teacher.capture.inner)
        whole = teacher.capture.require(plan, example)
        teacher.stops_early = teacher.stops_early and teacher.capture.check_early_stop(plan, example)  # asked for this plan
        self.vocabulary = whole.logits.size(-1) if plan.logits else None
        self.kind = self._kind(logits, whole.logits) if plan.logits else None
        by_rows = self.kind in ("hidden", "top_k", "top_k_without_tail")
        self.temperature = float(temperature) if by_rows and self.kind != "hidden" else None
        self.classes = min(classes or self.vocabulary, self.vocabulary) if self.temperature else None
        self.top_k = min(top_k, self.classes) if self.temperature else None
        self.head: VocabularyHead | None = self._understand(example) if self.kind == "hidden" else None
        self._restricted = by_rows and (self.head or teacher.capture.understand_head(example)).place is not None
        keys, signals = example[STORE_KEYS], self(example)
        self.tokens = example["input_ids"].size(1) if "input_ids" in example else None
        self.signals = self._columns(signals, keys)
        if self.tokens is None:
            self.tokens = next((_tensor(signals, own).size(1) for own in self.signals if own.layout == "tokens"), None)
        rows = list(self.rows(keys, signals, 0))
        self.bytes_per_example = sum(row.bytes for row in rows) / len(rows)
        self._example = example

    def _kind(self, wanted: str, logits: Tensor) -> str:
        embedding = self.teacher.capture.inner.get_output_embeddings() if self.teacher.capture.is_pretrained else None
        is_vocabulary = logits.dim() == 3 and isinstance(embedding, nn.Module) and self.task in ("masked_lm", "causal_lm")
        if wanted == "auto":
            return "hidden" if is_vocabulary else "full"
        if wanted != "full" and not is_vocabulary:
            raise ValueError(
                f"teacher_store_logits={wanted} is for the vocabulary of a language model, but the {self.teacher.capture.name} has logits "
                f"of {logits.size(-1)} classes, which are stored whole. Set it to auto."
            )
        return wanted

    def _understand(self, example: Mapping) -> VocabularyHead:
        head = self.teacher.capture.understand_head(example)
        if head.place is None or not head.projects:
            raise ValueError(
                f"Hidden states and the output embedding of the {self.teacher.capture.name} do not give its logits: its head does "
                "something else too, or is quantised. Set teacher_store_logits=top_k, or full for a small vocabulary."
            )
        return head

    def __call__(self, batch: Mapping) -> Signals:
        """The answer to a batch; logits by row have `rows`, and `projection` or `top_logits` for `logits`."""
        if self.kind in (None, "full"):
            return self.teacher(batch, self.plan)
        rows = self.rows_of(batch).cpu()
        asked = rows if len(rows) else rows.new_zeros(1)  # models need not know what to do with none
        if self._restricted:
            signals = self.teacher(batch, self.plan, rows=asked, project=self.kind != "hidden")
        else:
            signals = self.teacher(batch, self.plan)
            signals.logits = signals.logits.flatten(0, 1)[asked]
        signals.rows = rows
        return signals

    def _columns(self, signals: Signals, keys: BatchKeys) -> list[StoredSignal]:
        columns = []
        for name in (f.name for f in fields(CapturePlan)):
            wanted = getattr(self.plan, name)
            if name == "logits" and self.kind not in (None, "full"):
                columns += self._row_columns(signals)
            elif isinstance(wanted, frozenset):
                columns += [self._column(name, key, getattr(signals, name)[key], keys) for key in sorted(wanted, key=str)]
            elif wanted:
                columns.append(self._column(name, None, getattr(signals, name), keys))
        return columns

    def _column(self, name: str, key, tensor: Tensor, keys: BatchKeys) -> StoredSignal:
        if name == "logits" and self.task == "question_answering":
            return StoredSignal(name, "spans", (), self.dtype)
        by_token = tensor.dim() == 3 and name in ("logits", "hidden_states", "embeddings")
        if by_token and keys.mask is not None and tensor.size(1) != keys.mask.shape[1]:
            raise ValueError(
                f"The teacher's {name} have {tensor.size(1)} positions for {keys.mask.shape[1]} tokens, so padding cannot be told from the "
                "rest and they cannot be stored. Leave teacher_store out."
            )
        shape = tuple(tensor.shape[2:] if by_token else tensor.shape[1:])
        return StoredSignal(name, "tokens" if by_token else "example", shape, self.dtype, key)

    def _row_columns(self, signals: Signals) -> list[StoredSignal]:
        columns = [StoredSignal("positions", "rows", (), "int32")]
        if self.kind == "hidden":
            return [*columns, StoredSignal("row_features", "rows", (signals.projection.features.size(-1),), self.dtype)]
        return [
            *columns,
            StoredSignal("top_values", "rows", (self.top_k,), self.dtype),
            StoredSignal("top_ids", "rows", (self.top_k,), "int32"),
            StoredSignal("top_logsumexp", "rows", (), "float32"),
        ]

    def rows(self, keys: BatchKeys, signals: Signals, epoch: int) -> Iterator[StoredRow]:
        """The answers to single examples, without padding."""
        size = len(keys.ids)
        values: list[dict[str, np.ndarray]] = [{} for _ in range(size)]
        for own in self.signals:
            if own.layout == "rows":
                continue
            tensor = _tensor(signals, own)
            if own.layout == "example" and tuple(tensor.shape[1:]) != own.shape:
                raise ValueError(
                    f"The teacher's {own.column} have shape {tuple(tensor.shape[1:])} for example_id {int(keys.ids[0])} and {own.shape} "
                    "for the first examples: images of several sizes cannot be stored in one table. Bring them to one size."
                )
            array = own.pack(tensor)
            for i in range(size):
                kept = array[i] if keys.mask is None or own.layout == "example" else None
                if kept is None:
                    kept = array[i][keys.mask[i]] if own.layout == "tokens" else array[i][:, keys.mask[i]]
                values[i][own.column] = kept.reshape(-1)
        if self.kind not in (None, "full"):
            self._add_rows(values, keys, signals)
        for i in range(size):
            yield StoredRow(int(keys.ids[i]), epoch, int(keys.hashes[i]), values[i])

    def _add_rows(self, values: list[dict[str, np.ndarray]], keys: BatchKeys, signals: Signals) -> None:
        rows, count = signals.rows.numpy(), len(signals.rows)
        length = keys.length
        example, column = rows // length, rows % length
        positions = column
        if keys.mask is not None:
            if not keys.mask[example, column].all():
                bad = int(keys.ids[example[~keys.mask[example, column]][0]])
                raise ValueError(f"A position of example_id {bad} carries a loss but is padding. Give padding the label -100.")
            positions = (np.cumsum(keys.mask, axis=1) - 1)[example, column]
        parts = {"positions": torch.from_numpy(positions)}
        if self.kind == "hidden":
            parts["row_features"] = signals.projection.features[:count]
        else:
            logits = signals.logits[:count, : self.classes].float()
            top = logits.topk(self.top_k, dim=-1)
            parts |= {"top_values": top.values, "top_ids": top.indices, "top_logsumexp": (logits / self.temperature).logsumexp(-1)}
        bounds = np.searchsorted(example, np.arange(len(keys.ids) + 1))
        for own in self.signals:
            if own.layout == "rows":
                array = own.pack(parts[own.signal])
                for i, row in enumerate(values):
                    row[own.column] = array[bounds[i] : bounds[i + 1]].reshape(-1)

    def manifest(self, inputs: list[str], examples: int, epochs: int) -> Manifest:
        """What is said about the table, without a fingerprint."""
        capture = self.teacher.capture
        config = getattr(capture.inner, "config", None)
        about = {
            "name": shareable(getattr(config, "_name_or_path", None)),
            "class": type(capture.inner).__name__,
            "config": config_settings(capture.inner),
            "columns": self.teacher.columns,
            "depth": _known(lambda: capture.depth),
            "stages": _known(lambda: len(capture.find_stages(self._example))) if "input_ids" not in self._example else None,
            "tokens": self.tokens,
            "is_causal": capture.is_causal,
            "own_pooling": capture.own_pooling,
            "run_pooling": capture.run_pooling,
            "token_ids": None if capture.token_ids is None else capture.token_ids.tolist(),
        }
        return Manifest(
            {},
            self.signals,
            inputs,
            plain(about),
            examples,
            epochs,
            logits=self.kind,
            temperature=self.temperature,
            head={} if self.head is None else {"scale": self.head.scale, "softcap": self.head.softcap},
            vocabulary=self.vocabulary,
        )


def _tensor(signals: Signals, own: StoredSignal) -> Tensor:
    value = getattr(signals, own.signal)
    return value if own.key is None else value[own.key]


def _known(find: Callable[[], int]) -> int | None:
    try:
        return find()
    except ValueError:  # the model has none, and no term asks for them
        return None


def _real_tokens(batch: Mapping) -> Tensor:
    mask = batch.get("attention_mask")
    mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
    return mask.flatten().nonzero().squeeze(1)
