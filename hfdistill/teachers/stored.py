"""A stored teacher in the place of a model: it answers a batch by looking its examples up."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..capture_plan import CapturePlan
from ..counting import EXAMPLE_ID, marked_targets
from ..signals import Projection, Signals, TopLogits
from .store_format import StoredSignal
from .store_keys import STORE_KEYS, BatchKeys, batch_keys
from .store_table import TeacherStore


class StoredCapture:
    """What is asked of a teacher's [`Capture`] before training, answered from the manifest: depths, shapes, names.

    Args:
        store: whose teacher it stands for.
    """

    def __init__(self, store: TeacherStore):
        about = store.manifest.teacher
        self.store, self.role, self.columns = store, "teacher", list(about["columns"])
        self.own_pooling, self.run_pooling = about["own_pooling"], about["run_pooling"]
        self.is_causal, self._depth, self._stages = about["is_causal"], about["depth"], about["stages"]
        self.token_ids = None if about["token_ids"] is None else torch.tensor(about["token_ids"])
        config = PreTrainedConfig.from_dict(about["config"]) if about["config"] else None
        self.inner = SimpleNamespace(config=config)
        if config is not None:
            config._name_or_path = about["name"] or ""

    @property
    def name(self) -> str:
        return f"stored teacher ({self.store.manifest.teacher['class']})"

    @property
    def pooling(self) -> str:
        return self.own_pooling or self.run_pooling

    @property
    def depth(self) -> int:
        if self._depth is None:
            raise ValueError(f"The {self.name} was stored without its blocks. {_CURE}")
        return self._depth

    def find_stages(self, example: Mapping) -> range:
        """As many as the teacher has."""
        if self._stages is None:
            raise ValueError(f"The {self.name} was stored without its stages. {_CURE}")
        return range(self._stages)

    def require(self, plan: CapturePlan, example: Mapping) -> Signals:
        """Zeros in the shapes of what `plan` asks for, of as many examples as the batch has.

        Raises:
            ValueError: where that is not stored.
        """
        manifest = self.store.manifest
        self.check(plan)
        ids, mask = example.get("input_ids"), example.get("attention_mask")
        size = next(value.size(0) for value in example.values() if isinstance(value, Tensor))
        length = ids.size(1) if isinstance(ids, Tensor) and ids.dim() == 2 else manifest.teacher["tokens"]

        def zeros(own: StoredSignal) -> Tensor:
            middle = {"example": (), "tokens": (length,), "spans": (2, length)}[own.layout]
            return torch.zeros(()).expand(size, *middle, *own.shape)  # no memory: only its shape is looked at

        signals = Signals(attention_mask=mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None)
        self.fill(signals, plan, zeros)
        if plan.logits and signals.logits is None:
            signals.logits = torch.zeros(()).expand(size, length, manifest.vocabulary)
        return signals

    def check(self, plan: CapturePlan) -> None:
        """Refuses what is not stored."""
        manifest = self.store.manifest
        missing = ["logits"] if plan.logits and manifest.logits is None else []
        for name in (f.name for f in fields(CapturePlan) if f.name != "logits"):
            wanted = getattr(plan, name)
            if isinstance(wanted, frozenset):
                missing += [f"{name} {key}" for key in sorted(wanted, key=str) if f"{name}.{key}" not in self.store.columns]
            elif wanted and name not in self.store.columns:
                missing.append(name)
        if missing:
            raise ValueError(
                f"The stored teacher in {str(self.store.folder)!r} has no {', '.join(missing)}, only {', '.join(self.store.columns)}, but "
                f"terms of the objective compare them. {_CURE}"
            )

    @staticmethod
    def wanted(plan: CapturePlan, columns: Mapping[str, StoredSignal]) -> list[StoredSignal]:
        """The columns of whole signals that `plan` asks for."""
        return [
            own
            for own in columns.values()
            if own.layout != "rows" and (own.key in getattr(plan, own.signal) if own.key is not None else getattr(plan, own.signal, False))
        ]

    def fill(self, signals: Signals, plan: CapturePlan, make: Callable[[StoredSignal], Tensor]) -> None:
        """Sets what `plan` asks for to `make(column)`."""
        for own in self.wanted(plan, self.store.columns):
            if own.key is None:
                setattr(signals, own.signal, make(own))
            else:
                getattr(signals, own.signal)[own.key] = make(own)


_CURE = "Change the objective, or delete the folder and let a run with the teacher and teacher_store store all it needs."


class StoredTeacher:
    """A teacher that was asked once: its answers are read from disk, and no model is in memory.

        DistillationTrainer(model=student, teacher=StoredTeacher("folder"), ...)

    An answer is used only where the batch holds the very inputs the teacher was asked: a hash of the unpadded inputs is compared for
    each example, so another tokenizer, order, length, mask or augmentation is refused with the number of the example. Logits of a
    vocabulary come at the positions that carry a loss alone.

    Args:
        store (`TeacherStore`, `str` or `os.PathLike`): the folder, or a data set on the Hub.
        live (*optional*): the teacher itself, for batches that are not stored, as evaluation with `eval_with_teacher` has them.
    """

    def __init__(self, store: TeacherStore | str | os.PathLike, live=None):
        self.store = store if isinstance(store, TeacherStore) else TeacherStore(store)
        self.live = live
        self.capture = StoredCapture(self.store)

    @property
    def config(self):
        """The teacher's config, as far as it is known."""
        return self.capture.inner.config

    @property
    def columns(self) -> list[str]:
        return [*self.capture.columns, EXAMPLE_ID]

    def __call__(self, batch: Mapping, plan: CapturePlan, rows: Tensor | None = None, project: bool = True) -> Signals:
        """The signals of the teacher on `batch`, on its device.

        Args:
            batch: with the column `example_id`, or made by a [`KeyedCollator`].
            plan: what to fetch.
            rows: integer `(rows,)`, positions in the flattened `(batch * length)` whose logits are wanted; `None` for all.
            project: has no meaning here: hidden states that are stored in place of logits come as a `Projection`.

        Raises:
            ValueError: for batches that are not stored, and for positions without a stored answer.
        """
        keys = batch.get(STORE_KEYS)
        if keys is None:
            if self.live is not None:
                return self.live(batch, plan, rows=rows, project=project)
            keys = self._keys(batch)
        self.capture.check(plan)
        by_rows = plan.logits and "logits" not in self.store.columns
        columns = [own.column for own in self.capture.wanted(plan, self.store.columns)]
        columns += [own.column for own in self.store.columns.values() if by_rows and own.layout == "rows"]
        found = self.store.read(keys.ids, keys.epoch, keys.hashes, columns)
        device = next(value.device for value in batch.values() if isinstance(value, Tensor))
        mask = batch.get("attention_mask")
        signals = Signals(target_mask=marked_targets(batch))
        if isinstance(mask, Tensor) and mask.dim() == 2:
            signals.attention_mask = mask.bool()

        def whole(own: StoredSignal) -> Tensor:
            return own.unpack(_whole(own, [answer[own.column] for answer in found], keys)).to(device, non_blocking=True)

        self.capture.fill(signals, plan, whole)
        if by_rows:
            self._answer_rows(signals, found, keys, rows, (len(keys.ids), keys.length), device)
        elif plan.logits and rows is not None:
            signals.rows, signals.logits = rows, signals.logits.flatten(0, 1)[rows]
        return signals

    def _keys(self, batch: Mapping) -> BatchKeys:
        ids = batch.get(EXAMPLE_ID)
        if not isinstance(ids, Tensor):
            raise ValueError(
                f"A batch has no {EXAMPLE_ID!r}, only {sorted(map(str, batch))}, so its stored answers cannot be found. Evaluation data "
                "are not stored: set eval_with_teacher=False, or pass the teacher together with teacher_store. In a loop of your own, "
                f"keep the column {EXAMPLE_ID!r}."
            )
        return batch_keys(batch, self.store.manifest.inputs, ids.cpu().numpy().astype(np.int64))

    def _answer_rows(self, signals: Signals, found: list, keys: BatchKeys, rows: Tensor | None, shape: tuple[int, int], device) -> None:
        """Logits of a vocabulary, which are stored at the positions that carry a loss."""
        manifest, columns = self.store.manifest, self.store.columns
        slots, count = np.full(shape, -1, dtype=np.int64), 0
        for i, answer in enumerate(found):
            positions = answer["positions"]
            slots[i, positions if keys.mask is None else np.flatnonzero(keys.mask[i])[positions]] = np.arange(count, count + len(positions))
            count += len(positions)
        if rows is None and manifest.logits != "hidden":
            raise ValueError(
                f"The top {columns['top_ids'].size} logits are stored, at the positions that carry a loss, but all logits of all positions "
                "are asked for. Set vocabulary_head to auto, rows or chunked, or store with teacher_store_logits=full."
            )
        wanted = torch.from_numpy(np.flatnonzero(slots >= 0)).to(device) if rows is None else rows
        index = torch.from_numpy(slots.reshape(-1)).to(device)[wanted]
        if device.type == "cpu" and (index < 0).any():
            example = int(keys.ids[int(wanted[index < 0][0]) // shape[1]])
            raise ValueError(
                f"The stored teacher has no logits for a position of example_id {example} that carries a loss now: it was stored with "
                "other labels or kd_positions. Go back to those, or choose another teacher_store."
            )

        def stored(name: str) -> Tensor:
            own, views = columns[name], [answer[name] for answer in found]
            if device.type != "cpu":  # to look for missing ones would wait for the device: they become NaN, which no one overlooks
                views.append(own.pack_missing())
            return own.unpack(np.concatenate(views)).view(-1, *own.shape).to(device, non_blocking=True)[index]

        signals.rows = wanted
        if manifest.logits == "hidden":
            head = {name: tensor.to(device) for name, tensor in self.store.head.items()}
            self.store.head.update(head)  # stays where it is used
            features = stored("row_features").to(head["weight"].dtype)
            signals.projection = Projection(features, head["weight"], head.get("bias"), **manifest.head)
            if rows is None:
                made = signals.projection.logits()
                # positions that were never stored are NaN: a zero would be an answer, of a uniform teacher.
                missing = made.new_full((shape[0] * shape[1], made.size(1)), float("nan"))
                signals.logits = missing.index_copy(0, wanted, made).view(*shape, -1)
                signals.rows = signals.projection = None
        else:
            signals.top_logits = TopLogits(
                stored("top_values").float(),
                stored("top_ids").long(),
                stored("top_logsumexp"),
                manifest.temperature,
                tail=manifest.logits == "top_k",
            )


def _whole(own: StoredSignal, views: list[np.ndarray], keys: BatchKeys) -> np.ndarray:
    """One array of the stored numbers of each example, padded with zeros as the batch is."""
    mask = keys.mask
    if own.layout == "example" or mask is None:
        middle = {"example": (), "tokens": (-1,), "spans": (2, -1)}[own.layout]
        out = np.empty((len(views), len(views[0])), dtype=views[0].dtype)
        for i, view in enumerate(views):
            out[i] = view
        return out.reshape(len(views), *middle, *own.shape)
    length = mask.shape[1]
    if own.layout == "tokens":
        out = np.zeros((len(views), length, *own.shape), dtype=views[0].dtype)
        for i, view in enumerate(views):
            out[i, mask[i]] = view.reshape(-1, *own.shape)
        return out
    out = np.zeros((len(views), 2, length), dtype=views[0].dtype)
    for i, view in enumerate(views):
        out[i][:, mask[i]] = view.reshape(2, -1)
    return out
