"""`TeacherStore`: a folder of stored answers, opened, checked and looked up."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .fingerprints import differences
from .store_format import MANIFEST, SHARDS, Manifest, Shard, StoredSignal, read_head
from .store_hub import download_store, upload_store
from .store_keys import ids_hash


OPEN_FILES = 128
_HUB = "hf://datasets/"


class TeacherStore:
    """Answers of a teacher on disk: an Arrow table that is read in place, keyed by `example_id` and epoch.

    The folder holds `manifest.json` (what is stored, and the fingerprint of everything that decides it), shards `data/*.arrow`, which
    `datasets` can read too (`load_dataset("arrow", data_files="folder/data/*.arrow")`), and with logits stored as hidden states the
    teacher's head. A shard is there whole or not at all, so a run that was killed goes on where it was. Rows are read where they lie, and
    compared with their checksum the first time: resident memory does not grow with the table, but for an index of about 50 bytes for each
    answer.

    Args:
        folder (`str` or `os.PathLike`): as [`store_teacher`] or a run with `teacher_store` has written it, or a data set on the Hub
            (`hf://datasets/user/name`, with `@revision` for one of its versions), which is only read.

    Raises:
        ValueError: for a folder without a store, of a newer format, and for damaged shards, which are named.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = resolve_folder(folder)
        self.manifest = Manifest.read(self.folder)
        self.columns: dict[str, StoredSignal] = {own.column: own for own in self.manifest.signals}
        self.refresh()

    def refresh(self) -> None:
        """Opens the shards that are there now."""
        paths = sorted((self.folder / SHARDS).glob("*.arrow"))
        self.shards = [Shard(path, self.manifest.signals, self.manifest.store_id) for path in paths]
        self._first = np.cumsum([0, *(len(shard) for shard in self.shards)])
        self._index = _index(self.shards)
        self._open: dict[int, Shard] = {}  # the last one used last
        self._head: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        """Answers that are there."""
        return sum(len(ids) for ids, _ in self._index.values())

    def __repr__(self) -> str:
        kinds = ", ".join(self.columns)
        return f"TeacherStore({str(self.folder)!r}: {len(self)} of {self.manifest.examples * self.manifest.epochs} answers; {kinds})"

    @property
    def complete(self) -> bool:
        """Whether the answers to all examples are there in each epoch."""
        epochs = range(self.manifest.epochs)
        return all(epoch in self._index and ids_hash(self._index[epoch][0]) == self.manifest.example_ids for epoch in epochs)

    @property
    def bytes(self) -> int:
        """Size of the shards on disk."""
        return sum(shard.path.stat().st_size for shard in self.shards)

    def has(self, ids: np.ndarray, epoch: int) -> np.ndarray:
        """bool `(ids,)`: whether the answers to these examples are there."""
        known, _ = self._index.get(epoch, (np.empty(0, np.int64), None))
        if not len(known):
            return np.zeros(len(ids), dtype=bool)
        return known[np.minimum(np.searchsorted(known, ids), len(known) - 1)] == ids

    def check_fingerprint(self, now: Mapping[str, Any], parts: Sequence[str] | None = None) -> None:
        """Refuses what is stored where it answers other questions.

        Args:
            now: fingerprint of this run, as [`store_fingerprint`] makes it.
            parts: names at its top level to compare; all by default.

        Raises:
            ValueError: naming each difference with both values.
        """
        stored = self.manifest.fingerprint
        names = parts if parts is not None else sorted({*stored, *now})
        found = differences({name: stored.get(name) for name in names}, {name: now.get(name) for name in names})
        if found:
            listed = "; ".join(f"{name}: stored {_short(then)}, now {_short(today)}" for name, (then, today) in list(found.items())[:6])
            raise ValueError(
                f"The stored teacher in {str(self.folder)!r} answers other questions than this run asks ({listed}"
                f"{'; ...' if len(found) > 6 else ''}): the student would learn from wrong answers. Choose another teacher_store, delete "
                "this folder to store the teacher again, or go back to the settings it was stored with."
            )

    def read(
        self, ids: np.ndarray, epoch: int, hashes: np.ndarray | None = None, columns: Sequence[str] | None = None
    ) -> list[dict[str, np.ndarray]]:
        """The stored numbers of each example, by column (all by default), flat and without padding.

        Args:
            ids, hashes: int64 `(examples,)`; hashes of what the teacher would be asked now, if they are to be compared.

        Raises:
            ValueError: for answers that are missing, or were given to other inputs than those with these hashes.
        """
        there = self.has(ids, epoch)
        if not there.all():
            example = int(ids[~there][0])
            stored = f"{len(self)} of {self.manifest.examples * self.manifest.epochs} answers"
            raise ValueError(
                f"The stored teacher in {str(self.folder)!r} has no answer to example_id {example} in epoch {epoch}, only {stored}. Train "
                "on the data it was stored for, or run once with the teacher and teacher_store, which stores what is missing."
            )
        known, places = self._index[epoch]
        rows = places[np.searchsorted(known, ids)]
        numbers = np.searchsorted(self._first, rows, side="right") - 1
        answers = []
        for i, (number, row) in enumerate(zip(numbers.tolist(), (rows - self._first[numbers]).tolist())):
            shard = self._shard(number)
            if hashes is not None and shard.hashes[row] != hashes[i]:
                raise ValueError(
                    f"The teacher's stored answer to example_id {int(ids[i])} (epoch {epoch}) in {str(self.folder)!r} was given to other "
                    f"inputs ({', '.join(self.manifest.inputs)}) than this batch has: the data, their order (where ids were numbered by "
                    "it), the tokenizer, the length, the masks or the augmentation have changed. Go back to those it was stored with, or "
                    "choose another teacher_store."
                )
            answers.append(shard.read(row, self.columns if columns is None else columns, (int(ids[i]), epoch)))
        return answers

    def _shard(self, number: int) -> Shard:
        """A shard, whose file stays open until many others have been used."""
        self._open[number] = self._open.pop(number, self.shards[number])
        if len(self._open) > OPEN_FILES:
            self._open.pop(next(iter(self._open))).close()
        return self.shards[number]

    @property
    def head(self) -> dict[str, Tensor]:
        """`weight` and `bias` of the teacher's output embedding, read on first use."""
        if self._head is None:
            self._head = read_head(self.folder, self.manifest.head_hash)
        return self._head

    def lost_mass(self, examples: int = 1000) -> tuple[float, float]:
        """Estimate of the probability outside the stored top k: its mean over positions, and what the worst percent exceeds.

        Args:
            examples: how many answers are looked at, spread over the table.
        """
        chosen = np.unique(np.linspace(0, self._first[-1] - 1, min(examples, self._first[-1]), dtype=np.int64))
        numbers = np.searchsorted(self._first, chosen, side="right") - 1
        values, sums = self.columns["top_values"], self.columns["top_logsumexp"]
        lost = []
        for number, row in zip(numbers.tolist(), (chosen - self._first[numbers]).tolist()):
            shard = self._shard(number)
            top = values.unpack(shard.row(values.column, row)).float().view(-1, values.size) / self.manifest.temperature
            lost.append(1 - (top.logsumexp(1) - torch.from_numpy(shard.row(sums.column, row))).exp())
        seen = torch.cat(lost).clamp(min=0)
        return float(seen.mean()), float(seen.quantile(0.99)) if len(seen) < 10**6 else float(seen.sort().values[int(0.99 * len(seen))])

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None, revision: str | None = None) -> str:
        """Uploads the folder as a data set with a card; `TeacherStore("hf://datasets/user/name")` reads it back.

        Args:
            repo_id: `user/name`.
            private, token, revision: as for `huggingface_hub`.

        Returns:
            The address of the commit.
        """
        return upload_store(self, repo_id, private, token, revision)


def resolve_folder(folder: str | os.PathLike) -> Path:
    """The folder itself, or a copy of the data set on the Hub of that name."""
    return download_store(os.fspath(folder).removeprefix(_HUB)) if is_remote(folder) else Path(folder)


def is_remote(folder: str | os.PathLike) -> bool:
    """Whether it is a data set on the Hub.

    Raises:
        ValueError: for a misspelt one, which would be a folder called `hf:`.
    """
    name = os.fspath(folder)
    if name.startswith("hf:") and not name.startswith(_HUB):
        raise ValueError(f"A stored teacher on the Hub is called {_HUB}user/name, got {name!r}.")
    return name.startswith(_HUB)


def stored_dtype(folder: str | os.PathLike) -> torch.dtype | None:
    """In which precision the teacher was stored there: half where most of its weights are; `None` where nothing is."""
    path = resolve_folder(folder)
    if not (path / MANIFEST).is_file():
        return None
    names = Manifest.read(path).fingerprint["teacher"]["dtype"].split(", ")
    return next((getattr(torch, name) for name in ("bfloat16", "float16", "float32") if name in names), None)


def _index(shards: Sequence[Shard]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """epoch -> (sorted ids, number of the row in all shards together); an answer that stands twice counts once."""
    if not shards:
        return {}
    ids, epochs = (np.concatenate([getattr(shard, name) for shard in shards]) for name in ("ids", "epochs"))
    index = {}
    for epoch in np.unique(epochs).tolist():
        rows = np.flatnonzero(epochs == epoch)
        known, first = np.unique(ids[rows], return_index=True)
        index[epoch] = (known, rows[first])
    return index


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
