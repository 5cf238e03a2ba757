"""What every labelled task has: splits for the teacher, for the student, without labels, and held out; and how they are read and cut."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np


MISSING = -100
FILE_KINDS = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}


@dataclass
class Splits:
    """Splits of a task, each a `datasets.Dataset` with the text columns and `label`.

    Attributes:
        teacher_train: what the teacher is trained on, with labels.
        labelled: what the student has labels for.
        transfer: texts whose label is hidden (missing), on which the student hears the teacher only.
        evaluation: name -> held-out split; the first one is the one reported.
        text_columns: names of the columns that hold the input.
        label_names: in order of the label ids.
        vocabulary_texts: what a tokenizer may be trained on; never the held-out splits.
        embedded: whether the data came with the package.
    """

    teacher_train: Any
    labelled: Any
    transfer: Any
    evaluation: dict[str, Any]
    text_columns: tuple[str, ...]
    label_names: list[str]
    vocabulary_texts: list[str] = field(default_factory=list)
    description: str = ""
    embedded: bool = False

    @property
    def has_classes(self) -> bool:
        """Whether `label_names` are classes, whose order a teacher may have otherwise."""
        return True

    @property
    def label_config(self) -> dict[str, Any]:
        """What the config of a model must say about the labels."""
        names = dict(enumerate(self.label_names))
        return {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}

    def fingerprint(self) -> str:
        """sha256 of every text and label that is used, in order."""
        digest = hashlib.sha256(json.dumps(self.label_names).encode())
        for split in (self.teacher_train, self.labelled, self.transfer, *self.evaluation.values()):
            for column in (*self.text_columns, "label"):
                digest.update(json.dumps(split[column][:]).encode())
        return digest.hexdigest()

    def renumber(self, label: Any, number: dict[int, int]) -> Any:
        """One cell of the label column after label `i` has become `number[i]`."""
        return number[label]

    def with_labels(self, split, change: Callable[[list], list]):
        """`split` with `change(labels)` for its label column."""
        return relabel(split, change(split["label"][:]))

    def in_order(self, names: list[str], number: dict[int, int]):
        """This data with `names` for labels, of which number `number[i]` is the one that was `i`."""

        def changed(split):
            return self.with_labels(split, lambda labels: [self.renumber(label, number) for label in labels])

        return replace(
            self,
            teacher_train=changed(self.teacher_train),
            labelled=changed(self.labelled),
            transfer=changed(self.transfer),
            evaluation={name: changed(split) for name, split in self.evaluation.items()},
            label_names=names,
        )


AnySplits = TypeVar("AnySplits", bound=Splits)


def match_labels(data: AnySplits, config) -> AnySplits:
    """`data` with label ids in the order of a given teacher's `config`, compared by name (case does not matter).

    Where one of the two names none of its labels, both are taken to number them alike; whether they do, the teacher's
    accuracy shows. The names are the teacher's from then on, or the data's where the teacher has none.

    Raises:
        ValueError: when the names or their number differ.
    """
    if not data.has_classes:
        return data
    names = [str(config.id2label[i]) for i in sorted(config.id2label, key=int)]
    ours, theirs = [name.casefold() for name in data.label_names], [name.casefold() for name in names]
    generic = any(all(re.fullmatch(r"label_\d+", name) for name in side) for side in (ours, theirs))
    if ours == theirs or (generic and len(ours) == len(theirs)):
        return data if all(re.fullmatch(r"label_\d+", name) for name in theirs) else replace(data, label_names=names)
    if sorted(ours) != sorted(theirs):
        raise ValueError(
            f"The data has the labels {data.label_names[:6]} and the teacher {names[:6]}: its answers could not be told right from wrong. "
            "Correct id2label in the teacher's config.json, or fine-tune it on this data (teacher_training)."
        )
    return data.in_order(names, {ours.index(name): i for i, name in enumerate(theirs)} | {MISSING: MISSING})


def named_files(recipe, needs_data: Mapping[str, Any], task_name: str | None = None) -> dict[str, str] | None:
    """Split name -> file, as a recipe's flags name them; `None` where they name no data at all, which means the embedded task.

    Args:
        recipe: with `train_file`, `validation_file`, `test_file` and `dataset_name`.
        needs_data: flag -> value of what describes data of one's own.
        task_name: names data too, where it is given.

    Raises:
        ValueError: when one of these is given without data.
    """
    named = {"train": recipe.train_file, "validation": recipe.validation_file, "test": recipe.test_file}
    files = {split: path for split, path in named.items() if path}
    if files or recipe.dataset_name or task_name:
        return files
    for flag, value in needs_data.items():
        if value:
            raise ValueError(f"--{flag} {value} is about your own data, but none is given. Pass --train_file or --dataset_name")
    return None


def load_raw(dataset_name: str | None, config_name: str | None, files: dict[str, str] | None, cache_dir: str | None, kinds=FILE_KINDS):
    """The splits of a data set on the Hub, or of local files.

    Args:
        files: split name -> file; all must have one suffix of `kinds`.
        kinds: suffix -> the loader of datasets that reads it.

    Raises:
        ValueError: when it cannot be found or reached, or the files are of another kind.
    """
    from datasets import load_dataset

    if files:
        suffixes = {path.rsplit(".", 1)[-1].lower() for path in files.values()}
        kind = kinds.get(next(iter(suffixes)))
        if len(suffixes) > 1 or kind is None:
            *first, last = kinds
            raise ValueError(f"Data files must all be {', '.join(first)} or {last}, got {sorted(files.values())}.")
        try:
            return load_dataset(kind, data_files=files, cache_dir=cache_dir, **({"sep": "\t"} if suffixes == {"tsv"} else {}))
        except FileNotFoundError as error:
            raise ValueError(
                f"A data file does not exist: {str(error).splitlines()[0]}. Check the paths {sorted(files.values())}."
            ) from error
    try:
        return load_dataset(dataset_name, config_name, cache_dir=cache_dir)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The data set {dataset_name!r}{f' ({config_name})' if config_name else ''} could not be loaded from the Hub "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0][:160]}). Check the name and the network; where there is none, "
            "download it elsewhere "
            "(`hf download --repo-type dataset`) and pass --train_file and --validation_file, or leave both out to use the embedded data."
        ) from error


def train_and_evaluation(raw, max_train_samples: int | None = None, max_eval_samples: int | None = None) -> tuple[Any, dict[str, Any]]:
    """The training split and the held-out ones (`validation*`, else `test`) of what [`load_raw`] gave.

    Raises:
        ValueError: when one of them is not there.
    """
    if "train" not in raw:
        raise ValueError(f"The data has no 'train' split, only {sorted(raw)}. Pass --train_file, or a data set with one.")
    evaluation = {name: split for name, split in raw.items() if name.startswith("validation")} or {
        name: split for name, split in raw.items() if name == "test"
    }
    if not evaluation:
        raise ValueError(
            f"The data has no 'validation' or 'test' split, only {sorted(raw)}, so nothing could be measured. Pass --validation_file."
        )
    return first_rows(raw["train"], max_train_samples), {name: first_rows(split, max_eval_samples) for name, split in evaluation.items()}


def with_label_column(train, evaluation: dict[str, Any], text_columns: tuple[str, ...], label: str) -> tuple[Any, dict[str, Any]]:
    """Both with the column `label` under that name, and no empty cell in it or in the text.

    Raises:
        ValueError: for empty cells.
    """

    def renamed(split):
        return split if label == "label" else split.rename_column(label, "label")

    train, evaluation = renamed(train), {name: renamed(split) for name, split in evaluation.items()}
    for name, split in {"train": train, **evaluation}.items():
        for column in (*text_columns, "label"):
            empty = sum(value is None for value in split[column])
            if empty:
                raise ValueError(
                    f"{empty} of {len(split)} cells in column {label if column == 'label' else column!r} of the {name} data are empty. "
                    "Fill them or drop these rows; for texts without a label use --labelled_rows."
                )
    return train, evaluation


def first_rows(split, rows: int | None):
    return split if rows is None else split.select(range(min(rows, len(split))))


def relabel(split, labels: list):
    """`split` with other labels, as plain numbers: a ClassLabel column would refuse -100."""
    from datasets import Dataset

    return Dataset.from_dict({**{name: split[name][:] for name in split.column_names if name != "label"}, "label": labels})


def hide_labels(train, labelled_rows: int, missing: Callable[[Any], Any], seed: int, stratify: bool = False) -> tuple[Any, Any]:
    """`train` as `labelled_rows` rows with their labels and the others with the label that `missing` makes of theirs."""
    from sklearn.model_selection import train_test_split

    rows = np.arange(len(train))
    keep, rest = train_test_split(rows, train_size=labelled_rows, random_state=seed, stratify=train["label"][:] if stratify else None)
    labelled, transfer = train.select(np.sort(keep)), train.select(np.sort(rest))
    return relabel(labelled, labelled["label"][:]), relabel(transfer, [missing(label) for label in transfer["label"]])
