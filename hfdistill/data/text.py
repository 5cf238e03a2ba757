"""Text classification data in one shape: GLUE, Hub data sets, local files, or the embedded standard-library documentation."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .stdlib_docs import load_stdlib_docs_splits, load_topics_paragraphs


GLUE_COLUMNS = {
    "cola": ("sentence", None),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence", None),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
"""Text columns of the nine GLUE tasks."""

MISSING = -100


@dataclass
class TextData:
    """Splits of a text classification task, each a `datasets.Dataset` with the text columns and `label`.

    Attributes:
        teacher_train: what the teacher is trained on, with labels.
        labelled: what the student has labels for.
        transfer: texts without labels (`label` is -100, or NaN for regression), on which the student hears the teacher only.
        evaluation: name -> held-out split; the first one is the one reported.
        text_columns: one or two column names.
        label_names: in order of the label ids; one name for regression.
        vocabulary_texts: what a tokenizer may be trained on; never the held-out splits.
    """

    teacher_train: Any
    labelled: Any
    transfer: Any
    evaluation: dict[str, Any]
    text_columns: tuple[str, ...]
    label_names: list[str]
    is_regression: bool = False
    vocabulary_texts: list[str] = field(default_factory=list)
    description: str = ""
    embedded: bool = False

    def fingerprint(self) -> str:
        """sha256 of every text and label that is used, in order."""
        digest = hashlib.sha256(json.dumps(self.label_names).encode())
        for split in (self.teacher_train, self.labelled, self.transfer, *self.evaluation.values()):
            for column in (*self.text_columns, "label"):
                digest.update(json.dumps(split[column][:]).encode())
        return digest.hexdigest()


def load_embedded(
    labelled_rows: int | None = 300, seed: int = 0, max_train_samples: int | None = None, max_eval_samples: int | None = None
) -> TextData:
    """The default task: which area of the standard library is this documentation about? No network is used.

    Args:
        labelled_rows: how many labels the student gets, stratified; `None` gives it and its teacher every label.
        seed: of the split, not of any training.
        max_train_samples: rows of each training split that are used.
        max_eval_samples: rows of the test split that are used.
    """
    from datasets import concatenate_datasets

    splits = load_stdlib_docs_splits(few=labelled_rows or 300, seed=seed, hide_labels=labelled_rows is not None)
    names = splits["test"].features["label"].names
    teacher_train, labelled, transfer = splits["teacher"], splits["few"], splits["transfer"]
    if labelled_rows is None:
        everything = concatenate_datasets([teacher_train, transfer])
        teacher_train, labelled, transfer = everything, everything, transfer.select([])
    texts = [*splits["teacher"]["text"], *splits["transfer"]["text"], *load_topics_paragraphs()]
    teacher_train, labelled, transfer = (_first(split, max_train_samples) for split in (teacher_train, labelled, transfer))
    return TextData(
        teacher_train,
        labelled,
        transfer,
        {"test": _first(splits["test"], max_eval_samples)},
        ("text",),
        names,
        vocabulary_texts=texts,
        description="docstrings of the Python standard library, by area (embedded, no network)",
        embedded=True,
    )


def load_named(
    task_name: str | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    files: dict[str, str] | None = None,
    text_column_names: list[str] | None = None,
    label_column_name: str | None = None,
    labelled_rows: int | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
    cache_dir: str | None = None,
) -> TextData:
    """A GLUE task, a Hub data set, or local csv, json or parquet files.

    Args:
        files: split name (`train`, `validation`, `test`) -> file. All files must have one suffix.
        labelled_rows: the student sees labels of that many training rows, stratified; the others become transfer text.

    Raises:
        ValueError: when the data cannot be found or reached, or columns are missing.
    """
    raw = _load(task_name, dataset_name, dataset_config_name, files, cache_dir)
    if "train" not in raw:
        raise ValueError(f"The data has no 'train' split, only {sorted(raw)}. Pass --train_file, or a data set with one.")
    train = _first(raw["train"], max_train_samples)
    evaluation = {name: split for name, split in raw.items() if name.startswith("validation")} or {
        name: split for name, split in raw.items() if name == "test"
    }
    if not evaluation:
        raise ValueError(
            f"The data has no 'validation' or 'test' split, only {sorted(raw)}, so nothing could be measured. Pass --validation_file."
        )
    evaluation = {name: _first(split, max_eval_samples) for name, split in evaluation.items()}
    text_columns = _text_columns(task_name, text_column_names, train)
    label = label_column_name or next((name for name in ("label", "labels") if name in train.column_names), None)
    if label is None or label not in train.column_names:
        raise ValueError(
            f"The training data has no label column {label_column_name or 'label'!r}, only {train.column_names}. Pass --label_column_name."
        )
    train, evaluation = _rename(train, label), {name: _rename(split, label) for name, split in evaluation.items()}
    for name, split in {"train": train, **evaluation}.items():
        for column in (*text_columns, "label"):
            empty = sum(value is None for value in split[column])
            if empty:
                raise ValueError(
                    f"{empty} of {len(split)} cells in column {label if column == 'label' else column!r} of the {name} data are empty. "
                    "Fill them or drop these rows; for texts without a label use --labelled_rows."
                )
    is_regression = train.features["label"].dtype in ("float32", "float64")
    train, evaluation, names = _encode_labels(train, evaluation, is_regression)
    labelled, transfer = train, train.select([])
    if labelled_rows is not None and labelled_rows < len(train):
        labelled, transfer = _hide_labels(train, labelled_rows, is_regression, seed)
    title = f"GLUE {task_name}" if task_name else dataset_name or ", ".join(sorted(files or {}))
    return TextData(
        train,
        labelled,
        transfer,
        evaluation,
        text_columns,
        names,
        is_regression,
        [text for column in text_columns for text in train[column]],
        title,
    )


def _first(split, rows: int | None):
    return split if rows is None else split.select(range(min(rows, len(split))))


def match_labels(data: TextData, config) -> TextData:
    """`data` with label ids in the order of a given teacher's `config`, compared by name (case does not matter).

    Where one of the two names none of its labels, both are taken to number them alike; whether they do, the teacher's
    accuracy shows. The names are the teacher's from then on, or the data's where the teacher has none.

    Raises:
        ValueError: when the names or their number differ.
    """
    if data.is_regression:
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
    number = {ours.index(name): i for i, name in enumerate(theirs)} | {MISSING: MISSING}

    def renumber(split):
        return _relabel(split, [number[label] for label in split["label"]])

    return replace(
        data,
        teacher_train=renumber(data.teacher_train),
        labelled=renumber(data.labelled),
        transfer=renumber(data.transfer),
        evaluation={name: renumber(split) for name, split in data.evaluation.items()},
        label_names=names,
    )


def _load(task_name, dataset_name, config_name, files, cache_dir):
    from datasets import load_dataset

    if task_name is not None:
        if task_name not in GLUE_COLUMNS:
            raise ValueError(f"Unknown GLUE task {task_name!r}. Known: {', '.join(GLUE_COLUMNS)}.")
        dataset_name, config_name = "nyu-mll/glue", task_name
    if files:
        suffixes = {path.rsplit(".", 1)[-1].lower() for path in files.values()}
        kind = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}.get(next(iter(suffixes)))
        if len(suffixes) > 1 or kind is None:
            raise ValueError(f"Data files must all be csv, tsv, json, jsonl or parquet, got {sorted(files.values())}.")
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


def _text_columns(task_name: str | None, given: list[str] | None, train) -> tuple[str, ...]:
    if task_name is not None:
        return tuple(column for column in GLUE_COLUMNS[task_name] if column)
    if given:
        missing = [name for name in given if name not in train.column_names]
        if missing or len(given) > 2:
            raise ValueError(f"--text_column_names {given} must be one or two of {train.column_names}.")
        return tuple(given)
    for names in (("sentence1", "sentence2"), ("text",), ("sentence",)):
        if set(names) <= set(train.column_names):
            return names
    raise ValueError(f"Which columns hold the text? The data has {train.column_names}. Pass --text_column_names with one or two of them.")


def _rename(split, label: str):
    return split if label == "label" else split.rename_column(label, "label")


def _relabel(split, labels: list):
    """`split` with other labels, as plain numbers: a ClassLabel column would refuse -100."""
    from datasets import Dataset

    return Dataset.from_dict({**{name: split[name][:] for name in split.column_names if name != "label"}, "label": labels})


def _encode_labels(train, evaluation, is_regression: bool):
    """Label ids 0..n-1 and their names; strings and sparse integers are numbered in sorted order."""
    feature = train.features["label"]
    if is_regression:
        return train, evaluation, ["score"]
    if hasattr(feature, "names"):
        return train, evaluation, list(feature.names)
    values = sorted(set(train["label"]))
    number = {value: i for i, value in enumerate(values)}
    unknown = sorted({v for split in evaluation.values() for v in split["label"]} - set(values), key=str)
    if unknown:
        raise ValueError(f"The evaluation data has labels that the training data lacks: {unknown[:5]}. Correct the split.")
    if values == list(range(len(values))) and feature.dtype != "bool":
        return train, evaluation, [f"LABEL_{i}" for i in values]

    def encode(split):
        return _relabel(split, [number[value] for value in split["label"]])

    return encode(train), {name: encode(split) for name, split in evaluation.items()}, [str(value) for value in values]


def _hide_labels(train, labelled_rows: int, is_regression: bool, seed: int):
    from sklearn.model_selection import train_test_split

    rows = np.arange(len(train))
    keep, rest = train_test_split(rows, train_size=labelled_rows, random_state=seed, stratify=None if is_regression else train["label"])
    labelled, transfer = train.select(np.sort(keep)), train.select(np.sort(rest))
    missing = [float("nan") if is_regression else MISSING] * len(transfer)
    return _relabel(labelled, labelled["label"][:]), _relabel(transfer, missing)


def encode_texts(split, tokenizer, text_columns, max_seq_length: int | None = None, pad_to_max_length: bool = False, num_proc=None):
    """Tokenised split with `labels`; the text columns are dropped. Padding is left to the collator unless asked for.

    Args:
        max_seq_length: tokens per row; longer texts are cut. Default: the model's limit.
    """

    def encode(rows):
        texts = [rows[column] for column in text_columns]
        return tokenizer(*texts, truncation=True, max_length=max_seq_length, padding="max_length" if pad_to_max_length else False)

    encoded = split.map(
        encode, batched=True, num_proc=num_proc, remove_columns=[c for c in split.column_names if c != "label"], desc="Tokenizing"
    )
    return encoded.rename_column("label", "labels")
