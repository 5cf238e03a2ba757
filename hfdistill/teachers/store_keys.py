"""By what a stored answer is found: the number of its example, the epoch of its draws, and a hash of what the teacher was asked."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets.fingerprint import Hasher
from torch import Tensor

from ..capture_plan import TEACHER_PREFIX
from ..counting import EXAMPLE_ID, LABEL_COLUMNS


STORE_KEYS = "teacher_store_keys"
"""Name under which a batch carries its [`BatchKeys`]."""

PROBED_ROWS = 64


@dataclass(frozen=True, eq=False)
class BatchKeys:
    """Keys of the examples of a batch. They stay on the CPU, so that looking an answer up waits for no device.

    Shapes:
        ids, hashes: int64 `(batch,)`: `example_id`, and the hash of the teacher's inputs.
        epoch: the one that the collator drew for.
        mask: bool `(batch, length)`, True at real tokens; `None` when every position is real.
        length: tokens of each row, padding included; 0 for images.
    """

    ids: np.ndarray
    hashes: np.ndarray
    epoch: int = 0
    mask: np.ndarray | None = None
    length: int = 0


class KeyedCollator:
    """A collator whose batches carry their [`BatchKeys`]; `DistillationTrainer` puts it around the one it was given.

    Args:
        collator: makes the batch; one row of it for each example, in their order.
        inputs (`list[str]`): columns that the teacher reads.
        numbered (`bool`): the column `example_id` was added for the store, and `collator` need not see it.
        epochs (`int`, *optional*): how many are stored; later ones have the keys of these. Default: all.

    Raises:
        ValueError: when called, for rows without `example_id`, and for a collator that makes more or fewer rows than it gets.
    """

    def __init__(self, collator: Callable, inputs: Sequence[str], numbered: bool = False, epochs: int | None = None):
        self.collator, self.inputs, self.numbered, self.epochs = collator, list(inputs), numbered, epochs
        self.columns = tuple(getattr(collator, "columns", ()))  # which the trainer keeps for it

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if any(row.get(EXAMPLE_ID) is None for row in rows):
            raise ValueError(
                f"A row has no column {EXAMPLE_ID!r}, only {sorted(rows[0])}, so its stored answer cannot be found. Add it: "
                f"dataset.add_column({EXAMPLE_ID!r}, range(len(dataset)))."
            )
        ids = np.array([int(row[EXAMPLE_ID]) for row in rows], dtype=np.int64)
        epoch = int(getattr(self.collator, "epoch", 0)) % (self.epochs or sys.maxsize)
        if self.numbered:
            rows = [{name: value for name, value in row.items() if name != EXAMPLE_ID} for row in rows]
        batch = dict(self.collator(rows))
        size = next((value.size(0) for name in self.inputs if isinstance(value := teacher_input(batch, name), Tensor)), len(ids))
        if size != len(ids):
            raise ValueError(
                f"The collator makes {size} rows of {len(ids)} examples (it packs, or puts pairs side by side), so a row has no example "
                "whose answer could be stored. Use a collator with one row for each example, or leave teacher_store out."
            )
        return {**batch, STORE_KEYS: batch_keys(batch, self.inputs, ids, epoch)}


def teacher_input(batch: Mapping, name: str):
    """What the teacher gets for `name`: the column `teacher_<name>` where there is one."""
    return batch.get(TEACHER_PREFIX + name, batch.get(name))


def input_columns(batch: Mapping, columns: Sequence[str]) -> list[str]:
    """Columns of `batch` that the teacher reads and that are hashed. The attention mask only says where tokens are padding."""
    names = [name for name in columns if name != "attention_mask" and name not in LABEL_COLUMNS]
    return sorted(name for name in names if isinstance(teacher_input(batch, name), Tensor))


def batch_keys(batch: Mapping, inputs: Sequence[str], ids: np.ndarray, epoch: int = 0) -> BatchKeys:
    """The keys of a batch, from its tensors."""
    mask, tokens = real_tokens(batch), teacher_input(batch, "input_ids")
    length = tokens.size(1) if isinstance(tokens, Tensor) else 0
    hashes = example_hashes(batch, inputs, mask) if inputs else np.zeros(len(ids), dtype=np.int64)
    return BatchKeys(ids, hashes, epoch, mask, length)


def real_tokens(batch: Mapping) -> np.ndarray | None:
    """bool `(batch, length)` of the attention mask; `None` where there is none."""
    mask = teacher_input(batch, "attention_mask")
    return mask.cpu().numpy() > 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def example_hashes(batch: Mapping, inputs: Sequence[str], mask: np.ndarray | None) -> np.ndarray:
    """64 bits for each example, of what the teacher reads of it without padding.

    Padding on the right changes nothing before it. Anywhere else it moves tokens to other positions, so its place is hashed too.

    Shapes:
        mask: bool `(batch, length)`; `None` for no padding.
        returns: int64 `(batch,)`.
    """
    columns = {}
    for name in inputs:
        value = teacher_input(batch, name)
        if not isinstance(value, Tensor):
            raise ValueError(f"The batch has no {name!r}, only {sorted(map(str, batch))}, but the stored teacher had read it.")
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value.long()
        columns[name] = value.contiguous().numpy()
    size = len(next(iter(columns.values())))
    hashes = np.empty(size, dtype=np.uint64)
    shifted = np.zeros(size, dtype=bool) if mask is None else (mask[:, 1:] & ~mask[:, :-1]).any(1)
    for i in range(size):
        pieces = [f"at {np.flatnonzero(mask[i]).tolist()}".encode()] if shifted[i] else []
        for name, values in columns.items():
            row = values[i]
            if mask is not None and values.shape[:2] == mask.shape:
                row = row[mask[i]]
            pieces += [f"{name} {row.dtype} {row.shape}".encode(), np.ascontiguousarray(row)]
        hashes[i] = int(Hasher.hash_bytes(pieces), 16)
    return hashes.view(np.int64)


def check_numbered(dataset) -> None:
    """Looks at the first row alone.

    Raises:
        ValueError: for data without a length, or without the column `example_id`.
    """
    if isinstance(dataset, torch.utils.data.IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise ValueError(
            f"A {type(dataset).__name__} is a stream, in which no example is known again, so answers of a teacher cannot be stored for it. "
            "Use a data set with a length, or leave teacher_store out."
        )
    names = getattr(dataset, "column_names", None)
    if names is None and len(dataset):
        names = list(dataset[0])
    if EXAMPLE_ID not in (names or ()):
        raise ValueError(
            f"The training data has no column {EXAMPLE_ID!r}, only {sorted(names or ())}, so stored answers could not be found. Add one "
            f"number for each example: dataset.add_column({EXAMPLE_ID!r}, range(len(dataset)))."
        )


def example_ids(dataset) -> np.ndarray:
    """`example_id` of every row, int64 `(rows,)`; reads all rows where there are no columns.

    Raises:
        ValueError: as [`check_numbered`], for numbers that are no whole numbers, and for one that stands twice.
    """
    check_numbered(dataset)
    if hasattr(dataset, "with_format"):
        values = dataset.with_format(None)[EXAMPLE_ID][:]
    else:
        values = [int(dataset[i][EXAMPLE_ID]) for i in range(len(dataset))]
    ids = np.asarray(values)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"The column {EXAMPLE_ID!r} must hold one whole number for each example, so that it is known again.")
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) < len(ids):
        raise ValueError(
            f"{len(ids) - len(unique)} rows have an {EXAMPLE_ID!r} that another row has too, such as {unique[counts > 1][0]}: one answer "
            f"would stand for several. Number them anew: dataset.remove_columns({EXAMPLE_ID!r}).add_column({EXAMPLE_ID!r}, "
            "range(len(dataset))), with the data sets put together first."
        )
    return ids.astype(np.int64)


def ids_hash(ids: np.ndarray) -> str:
    """16 hex digits of the set of numbers, whatever their order."""
    return Hasher.hash_bytes([np.unique(ids).astype(np.int64)])


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Python's, NumPy's and PyTorch's random states are afterwards as they were before."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def check_epochs(collator: Callable) -> None:
    """Raises `ValueError` for a collator that is told its epoch and does not tell: answers of two epochs would have one key."""
    if hasattr(collator, "set_epoch") and not hasattr(collator, "epoch"):
        raise ValueError(
            f"{_name(collator)} has set_epoch and no attribute epoch, so it is not known for which epoch a batch was made, and stored "
            "answers could not be told apart. Give it a property epoch that workers see too, as MaskingCollator has."
        )


def changes_with_the_epoch(
    dataset, collator: Callable, columns: Sequence[str], numbered: bool = False, rows_of: Callable[[Mapping], Tensor] | None = None
) -> bool:
    """Whether the collator makes other inputs of the same rows in another epoch, or other positions are stored; looks at a few rows.

    Args:
        columns: that the teacher reads.
        numbered: see [`KeyedCollator`].
        rows_of (*optional*): gives the positions of a batch whose logits are stored, which may depend on labels drawn for the student.

    Raises:
        ValueError: for inputs that could not be made again: drawn without a seed, or dependent on the other rows of the batch.
    """
    if getattr(collator, "mixes", False):
        raise ValueError(
            "mixup and cutmix make images of a whole batch, whose rows are drawn anew in each epoch: what the teacher says to them cannot "
            "be stored by example. Set mixup_alpha and cutmix_alpha to 0, or leave teacher_store out."
        )
    check_epochs(collator)
    count = min(len(dataset), PROBED_ROWS)

    def hashes(places: Sequence[int]) -> np.ndarray:
        rows = [dataset[i] for i in places]
        plain = KeyedCollator(collator, [], numbered)(rows)
        return KeyedCollator(lambda _: plain, input_columns(plain, columns))(rows)[STORE_KEYS].hashes

    def positions() -> Tensor:
        return torch.empty(0) if rows_of is None else rows_of(KeyedCollator(collator, [], numbered)([dataset[i] for i in range(count)]))

    with random_states_kept():
        epoch = int(getattr(collator, "epoch", 0))
        first = hashes(range(count))
        if not np.array_equal(first, hashes(range(count))):
            raise ValueError(
                f"{_name(collator)} (or the data set) makes other inputs each time it gets the same rows: it draws without a seed that "
                "belongs to the example, so the stored answers would be those to other inputs. Use a collator whose draws depend on seed, "
                "epoch and example_id (MaskingCollator, ImageCollator), or leave teacher_store out."
            )
        backwards = np.concatenate([hashes([i]) for i in range(count - 1, max(count - 9, -1), -1)])
        if not np.array_equal(first[::-1][: len(backwards)], backwards):
            raise ValueError(
                f"What {_name(collator)} makes of a row depends on the other rows of its batch, which are others in each epoch: answers "
                "cannot be stored by example. Use a collator that treats each row by itself, or leave teacher_store out."
            )
        if not hasattr(collator, "set_epoch"):
            return False
        try:
            before = positions()
            collator.set_epoch(epoch + 1)
            return not np.array_equal(first, hashes(range(count))) or not torch.equal(before, positions())
        finally:
            collator.set_epoch(epoch)


def _name(collator) -> str:
    return getattr(collator, "__name__", type(collator).__name__)
