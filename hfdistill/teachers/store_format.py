"""The files of a stored teacher: a manifest, the teacher's head, and Arrow shards that are whole or not there."""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Features, List, Value
from datasets.fingerprint import Hasher
from safetensors.torch import load_file, save_file
from torch import Tensor

from .store_files import write_aside


MANIFEST = "manifest.json"
HEAD = "head.safetensors"
SHARDS = "data"
FORMAT = 1
STORE_ID = b"hfdistill_store"
"""Name in the metadata of a shard under which it says to which manifest it belongs."""
KEY_COLUMNS = {"example_id": "int64", "epoch": "int32", "input_hash": "int64", "checksum": "int64"}
_ARROW_TYPES = {"float32": "float32", "float16": "float16", "bfloat16": "int16", "int32": "int32"}


@dataclass(frozen=True)
class StoredSignal:
    """One column of the table.

    Args:
        signal: a field of `Signals`, or a part of one at chosen positions: `positions`, `row_features`, `top_values`, `top_ids`,
            `top_logsumexp`.
        layout: `example`, `tokens` (one entry for each real token), `spans` (start and end, by real token) or `rows` (one entry for
            each position that carries a loss).
        shape: of one entry.
        dtype: bfloat16 is written as int16, bit by bit, since Arrow has no such type.
        key: block or stage.
    """

    signal: str
    layout: str
    shape: tuple[int, ...]
    dtype: str
    key: int | str | None = None

    @property
    def column(self) -> str:
        return self.signal if self.key is None else f"{self.signal}.{self.key}"

    @property
    def size(self) -> int:
        """Numbers in one entry."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def arrow_type(self) -> str:
        return _ARROW_TYPES[self.dtype]

    def pack(self, tensor: Tensor) -> np.ndarray:
        """`tensor` as it is written.

        Raises:
            ValueError: for numbers that are not finite, or too large for the type.
        """
        packed = tensor.detach().to(getattr(torch, self.dtype)).cpu().contiguous()
        if packed.is_floating_point() and not packed.isfinite().all():
            largest = float(tensor.detach().float().abs().max())
            cure = "Set teacher_store_dtype=bfloat16 or float32." if np.isfinite(largest) else "Check the teacher and the data."
            raise ValueError(f"The teacher's {self.column} has the value {largest:g}, which is no finite number in {self.dtype}. {cure}")
        return (packed.view(torch.int16) if self.dtype == "bfloat16" else packed).numpy()

    def pack_missing(self) -> np.ndarray:
        """One entry that stands for none: NaN, or 0 of whole numbers."""
        whole = self.dtype == "int32"
        entry = torch.full((self.size,), 0 if whole else float("nan"), dtype=getattr(torch, self.dtype))
        return (entry.view(torch.int16) if self.dtype == "bfloat16" else entry).numpy()

    def unpack(self, array: np.ndarray) -> Tensor:
        """What `pack` made back as a tensor."""
        tensor = torch.from_numpy(array)
        return tensor.view(torch.bfloat16) if self.dtype == "bfloat16" else tensor


@dataclass
class Manifest:
    """`manifest.json`.

    Args:
        fingerprint: what the answers depend on; compared before they are used.
        signals: the columns.
        inputs: what the teacher read, by the names of its forward pass; hashed by example.
        teacher: what is asked of a teacher that is not there: name, class, config, depth, ...
        examples, epochs: how many answers there are when all are there.
        example_ids: hash of the numbers of all examples.
        changes: whether inputs change from epoch to epoch; where not, one epoch answers for all.
        store_id: drawn when the folder is made, and written into each of its shards.
        logits: `full`, `hidden`, `top_k`, `top_k_without_tail`, or `None`.
        temperature: of the mass outside the `top_k`.
        head: `scale` and `softcap` behind the output embedding, with `hidden`.
        head_hash: SHA-256 of the file with that embedding.
        vocabulary: classes of the logits.
    """

    fingerprint: dict[str, Any]
    signals: list[StoredSignal]
    inputs: list[str]
    teacher: dict[str, Any]
    examples: int
    epochs: int = 1
    example_ids: str = ""
    changes: bool = False
    store_id: str = field(default_factory=lambda: secrets.token_hex(8))
    logits: str | None = None
    temperature: float | None = None
    head: dict[str, float | None] = field(default_factory=dict)
    head_hash: str | None = None
    vocabulary: int | None = None
    format: int = FORMAT

    def write(self, folder: Path, new: bool = False) -> None:
        """Writes it aside and renames it.

        Raises:
            ValueError: where it must be `new` and another run has written one meanwhile.
        """
        text = json.dumps(asdict(self), indent=2)
        write_aside(folder / MANIFEST, lambda path: path.write_text(text + "\n", encoding="utf-8"), new)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises `ValueError` where it is missing, damaged or of a newer format."""
        path = folder / MANIFEST
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] > FORMAT:
                raise ValueError(
                    f"{path} has format {record['format']}, this version of hfdistill reads up to {FORMAT}. Upgrade hfdistill."
                )
            signals = [StoredSignal(**{**own, "shape": tuple(own["shape"])}) for own in record.pop("signals")]
            return cls(signals=signals, **record)
        except FileNotFoundError:
            raise ValueError(
                f"{str(folder)!r} holds no stored teacher: {MANIFEST} is missing. Give the folder that store_teacher or a run with "
                "teacher_store has written."
            ) from None
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}). Delete the folder and store the teacher again.") from error


def write_head(folder: Path, weight: Tensor, bias: Tensor | None) -> str:
    """The output embedding of the teacher; returns the hash of the file."""
    tensors = {"weight": weight, **({} if bias is None else {"bias": bias})}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_aside(folder / HEAD, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    return _file_hash(folder / HEAD)


def _file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_head(folder: Path, expected: str | None) -> dict[str, Tensor]:
    """Raises `ValueError` where it is missing, damaged, or not the file with the hash `expected`."""
    try:
        if _file_hash(folder / HEAD) != expected:
            raise ValueError("it is not the one that the manifest was written with")
        return load_file(folder / HEAD)
    except Exception as error:  # safetensors has errors of its own
        raise ValueError(f"{folder / HEAD} cannot be read ({error}). Delete the folder and store the teacher again.") from error


@dataclass
class StoredRow:
    """One answer: its key, and the numbers of each column, flat."""

    example_id: int
    epoch: int
    input_hash: int
    values: dict[str, np.ndarray]

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self.values.values())


def _checksum(example_id: int, epoch: int, input_hash: int, arrays: Sequence[np.ndarray]) -> np.int64:
    key = np.array([example_id, epoch, input_hash], dtype=np.int64)
    return np.uint64(int(Hasher.hash_bytes([key, *arrays]), 16)).view(np.int64)


def table_features(signals: Sequence[StoredSignal]) -> Features:
    """The columns as `datasets` knows them: one flat list of numbers for each signal of an answer."""
    columns = {name: Value(kind) for name, kind in KEY_COLUMNS.items()}
    for own in signals:
        columns[own.column] = List(Value(own.arrow_type), length=own.size if own.layout == "example" else -1)
    return Features(columns)


def write_shard(path: Path, signals: Sequence[StoredSignal], rows: Sequence[StoredRow], store_id: str) -> None:
    """One record batch of Arrow's stream format, as `datasets` writes and reads it."""
    schema = table_features(signals).arrow_schema
    schema = schema.with_metadata({**(schema.metadata or {}), STORE_ID: store_id})
    checksums = [_checksum(row.example_id, row.epoch, row.input_hash, [row.values[own.column] for own in signals]) for row in rows]
    arrays = [
        pa.array([row.example_id for row in rows], pa.int64()),
        pa.array([row.epoch for row in rows], pa.int32()),
        pa.array([row.input_hash for row in rows], pa.int64()),
        pa.array(checksums, pa.int64()),
    ]
    for own in signals:
        own_rows = [row.values[own.column].reshape(-1) for row in rows]
        values = pa.array(np.concatenate(own_rows))
        if own.layout == "example":
            arrays.append(pa.FixedSizeListArray.from_arrays(values, own.size))
        else:
            offsets = np.cumsum([0, *(len(one) for one in own_rows)], dtype=np.int32)
            arrays.append(pa.ListArray.from_arrays(pa.array(offsets), values))
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)

    def write(partial: Path) -> None:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(batch)

    write_aside(path, write)


class Shard:
    """A shard that can be read row by row. In memory are the hashes, checksums and offsets of its rows.

    It is mapped while it is opened and not afterwards: pages of a mapping count as resident once they are read, and Linux maps large
    pieces around them, so the memory of a process would grow with the table. Rows are read at their place in the file.

    Args:
        path: of the file.
        signals: its columns.
        store_id: of its manifest.

    Raises:
        ValueError: for a file that was cut off, has other columns than the manifest says, or belongs to another one.
    """

    def __init__(self, path: Path, signals: Sequence[StoredSignal], store_id: str):
        self.path, self.signals = path, list(signals)
        self._file: io.FileIO | None = None
        try:
            with open(path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            start = _address(np.frombuffer(mapped, np.uint8))
            batch = pa.ipc.open_stream(pa.py_buffer(mapped)).read_next_batch()
            batch.validate(full=True)  # offsets, by which rows are found
            written = (batch.schema.metadata or {}).get(STORE_ID, b"").decode()
            keys = {name: batch.column(name).to_numpy(zero_copy_only=True).copy() for name in KEY_COLUMNS}
            self._columns = {own.column: _place(batch.column(own.column), own, start) for own in self.signals}
        except (OSError, ValueError, KeyError, StopIteration, pa.ArrowException) as error:  # of an empty file too
            raise ValueError(
                f"{path} is damaged ({str(error).splitlines()[0] if str(error) else type(error).__name__}). Delete this file: the next "
                "run with the teacher writes its answers again."
            ) from error
        if written != store_id:
            raise ValueError(
                f"{path} was written with another {MANIFEST} (store {written or 'unknown'}, not {store_id}), so it may be of another "
                "teacher. Delete this file: the next run with the teacher writes its answers again."
            )
        self.ids, self.epochs, self.hashes, self._checksums = keys.values()
        self._checked = np.zeros(len(self.ids), dtype=bool)

    def __len__(self) -> int:
        return len(self.hashes)

    def row(self, column: str, index: int) -> np.ndarray:
        """The numbers of a row, flat, read from the file."""
        place, dtype, offsets, size = self._columns[column]
        first, last = (index * size, (index + 1) * size) if offsets is None else (int(offsets[index]), int(offsets[index + 1]))
        if self._file is None:
            self._file = open(self.path, "rb", buffering=0)
        numbers = np.empty(last - first, dtype)
        if _read_at(self._file, numbers.view(np.uint8), place + first * dtype.itemsize) != numbers.nbytes:
            raise ValueError(
                f"{self.path} was cut off while it was in use. Delete this file: the next run with the teacher writes it again."
            )
        return numbers

    def read(self, index: int, columns: Iterable[str], key: tuple[int, int]) -> dict[str, np.ndarray]:
        """Some columns of a row, which is compared with its checksum the first time.

        Args:
            key: its example and epoch.

        Raises:
            ValueError: when the file has been damaged.
        """
        if self._checked[index]:
            return {column: self.row(column, index) for column in columns}
        row = {column: self.row(column, index) for column in self._columns}
        if _checksum(*key, int(self.hashes[index]), list(row.values())) != self._checksums[index]:
            raise ValueError(
                f"{self.path} is damaged: the answer to example_id {key[0]} is not what was written. Delete this file: the next run "
                "with the teacher writes its answers again."
            )
        self._checked[index] = True
        return row

    def close(self) -> None:
        """Closes the file; the next read opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _read_at(file: io.FileIO, target: np.ndarray, place: int) -> int:
    if hasattr(os, "preadv"):  # one system call
        return os.preadv(file.fileno(), [target], place)
    file.seek(place)
    return file.readinto(target)


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _place(array: pa.Array, signal: StoredSignal, start: int) -> tuple[int, np.dtype, np.ndarray | None, int]:
    """Where the numbers of a column begin in the file, their type, the offsets of the rows (`None` for one size) and that size."""
    values = array.values.to_numpy(zero_copy_only=True)
    place = _address(values) - start if len(values) else 0
    if signal.layout != "example":
        return place, values.dtype, array.offsets.to_numpy(zero_copy_only=True).copy(), signal.size
    if array.type.list_size != signal.size:
        raise ValueError(f"{signal.column} has {array.type.list_size} numbers a row, not {signal.size}")
    return place, values.dtype, None, signal.size
