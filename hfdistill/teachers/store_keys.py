"""By what a stored answer is found: the number of its example, the epoch of its draws, and a hash of what the teacher was asked."""

from __future__ import annotations

import random
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

    Raises:
        ValueError: when called, for rows without `example_id`, and for a collator that makes more or fewer rows than it gets.
    """

    def __init__(self, collator: Callable, inputs: Sequence[str], numbered: bool = False):
        self.collator, self.inputs, self.numbered = collator, list(inputs), numbered
        self.columns = tuple(getattr(collator, "columns", ()))  # which the trainer keeps for it

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if any(row.get(EXAMPLE_ID) is None for row in rows):
            raise ValueError(
                f"A row has no column {EXAMPLE_ID!r}, only {sorted(rows[0])}, so its stored answer cannot be found. Add it: "
                f"dataset.add_column({EXAMPLE_ID!r}, range(len(dataset)))."
            )
        ids = np.array([int(row[EXAMPLE_ID]) for row in rows], dtype=np.int64)
        epoch = int(getattr(self.collator, "epoch", 0))
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
    for i in range(size):
        pieces = []
        for name, values in columns.items():
            row = values[i]
            if mask is not None and values.shape[:2] == mask.shape:
                row = row[mask[i]]
            pieces += [f"{name} {row.dtype} {row.shape}".encode(), np.ascontiguousarray(row)]
        hashes[i] = int(Hasher.hash_bytes(pieces), 16)
    return hashes.view(np.int64)


def example_ids(dataset) -> np.ndarray:
    """`example_id` of every row, int64 `(rows,)`.

    Raises:
        ValueError: for data without a length, without that column, and for numbers that are no whole numbers.
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
    if hasattr(dataset, "with_format"):
        values = dataset.with_format(None)[EXAMPLE_ID][:]
    else:
        values = [int(dataset[i][EXAMPLE_ID]) for i in range(len(dataset))]
    ids = np.asarray(values)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"The column {EXAMPLE_ID!r} must hold one whole number for each example, so that it is known again.")
    return ids.astype(np.int64)


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


def changes_with_the_epoch(dataset, collator: Callable, columns: Sequence[str], numbered: bool = False) -> bool:
    """Whether the collator makes other inputs of the same rows in another epoch; looks at a few rows.

    Args:
        columns: that the teacher reads.
        numbered: see [`KeyedCollator`].

    Raises:
        ValueError: for inputs that could not be made again: drawn without a seed, or dependent on the other rows of the batch.
    """
    if getattr(collator, "mixes", False):
        raise ValueError(
            "mixup and cutmix make images of a whole batch, whose rows are drawn anew in each epoch: what the teacher says to them cannot "
            "be stored by example. Set mixup_alpha and cutmix_alpha to 0, or leave teacher_store out."
        )
    count = min(len(dataset), PROBED_ROWS)

    def hashes(places: Sequence[int]) -> np.ndarray:
        rows = [dataset[i] for i in places]
        plain = KeyedCollator(collator, [], numbered)(rows)
        return KeyedCollator(lambda _: plain, input_columns(plain, columns))(rows)[STORE_KEYS].hashes

    with random_states_kept():
        epoch = int(getattr(collator, "epoch", 0))
        first = hashes(range(count))
        if not np.array_equal(first, hashes(range(count))):
            raise ValueError(
                f"{_name(collator)} (or the data set) makes other inputs each time it gets the same rows: it draws without a seed that "
                "belongs to the example, so the stored answers would be those to other inputs. Use a collator whose draws depend on seed, "
                "epoch and example_id (MaskingCollator, ImageCollator), or leave teacher_store out."
            )
        backwards = np.concatenate([hashes([i]) for i in range(count - 1, -1, -1)][: min(count, 8)])
        if not np.array_equal(first[::-1][: len(backwards)], backwards):
            raise ValueError(
                f"What {_name(collator)} makes of a row depends on the other rows of its batch, which are others in each epoch: answers "
                "cannot be stored by example. Use a collator that treats each row by itself, or leave teacher_store out."
            )
        if not hasattr(collator, "set_epoch"):
            return False
        try:
            collator.set_epoch(epoch + 1)
            return not np.array_equal(first, hashes(range(count)))
        finally:
            collator.set_epoch(epoch)


def _name(collator) -> str:
    return getattr(collator, "__name__", type(collator).__name__)
