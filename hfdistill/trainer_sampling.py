"""The order of rows: texts of like length together in training, and the order of the data in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import has_length


BY_LENGTH = "group_by_length"


class TrainerSampling(Trainer):
    """A Trainer whose `train_sampling_strategy="group_by_length"` needs no column of lengths, survives a resume, and is for training.

    That of Transformers draws from the global random state: processes that have drawn different numbers for dropout would see other
    orders, and so miss rows, and a run that is resumed in its second epoch would go on with other batches. It also reorders the
    evaluation data, so predictions would not belong to the rows any more.
    """

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != BY_LENGTH or dataset is None or not has_length(dataset):
            return super()._get_train_sampler(train_dataset)
        args = self.args
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        names = getattr(self.processing_class, "model_input_names", None) or ["input_ids"]
        seed = args.seed if args.data_seed is None else args.data_seed
        known = args.length_column_name in (getattr(dataset, "column_names", None) or ())
        lengths = dataset[args.length_column_name] if known else row_lengths(dataset, names[0])
        return LengthGroups(rows, lengths, seed, lambda: int((self.state.epoch or 0) + 1e-6))

    def _get_eval_sampler(self, eval_dataset):
        if self.args.train_sampling_strategy != BY_LENGTH or not has_length(eval_dataset):
            return super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None


class LengthGroups(LengthGroupedSampler):
    """`LengthGroupedSampler` whose order depends on seed and epoch alone.

    Args:
        batch_size (`int`): rows of an optimizer step.
        lengths (sequence of `int`): of each row.
        seed (`int`): of the order.
        epoch (callable, *optional*): gives the epoch that is beginning. Default: they are counted.
    """

    def __init__(self, batch_size: int, lengths: Sequence[int], seed: int = 0, epoch: Callable[[], int] | None = None):
        super().__init__(batch_size, lengths=list(lengths), generator=torch.Generator())
        self.seed, self._epoch, self._passes = seed, epoch, 0

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + (self._passes if self._epoch is None else self._epoch()))
        self._passes += 1
        return super().__iter__()


def row_lengths(dataset, column: str = "input_ids") -> list[int]:
    """Length of `column` in each row; of a `datasets.Dataset` without reading the rows.

    Raises:
        ValueError: when rows have no such column, as images have none.
    """
    names = getattr(dataset, "column_names", None)
    if names is not None and column in names and getattr(dataset, "format", {}).get("type") != "custom":
        import pyarrow.compute as pc

        tables = dataset.select_columns([column]).with_format("arrow").iter(batch_size=10_000)
        return [length for table in tables for length in pc.list_value_length(table[column]).to_pylist()]
    first = dataset[0]
    if column not in first:
        raise ValueError(
            f"train_sampling_strategy='group_by_length' needs the length of each row, but rows have no {column!r}, only {sorted(first)}. "
            "Use train_sampling_strategy='random' for them."
        )
    return [len(dataset[i][column]) for i in range(len(dataset))]
