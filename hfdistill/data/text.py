"""Text classification data in one shape: GLUE, Hub data sets, local files, or the embedded standard-library documentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .splits import MISSING, Splits, first_rows, hide_labels, load_raw, named_files, relabel, train_and_evaluation, with_label_column
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


@dataclass
class TextData(Splits):
    """Splits of a text classification task.

    `label` is a class id, a number for regression, or for several labels a text (`is_multi_label`) one float for each of
    `label_names`, 1.0 where the text has it. A hidden label is -100, NaN for regression, or a row of -100.0.

    Attributes:
        text_columns: one or two column names.
        label_names: one name for regression.
        is_regression: labels are numbers.
        is_multi_label: a text may have several labels, or none.
    """

    is_regression: bool = False
    is_multi_label: bool = False

    @property
    def has_classes(self) -> bool:
        return not self.is_regression

    @property
    def problem_type(self) -> str:
        """What `config.problem_type` of the models must be."""
        if self.is_regression:
            return "regression"
        return "multi_label_classification" if self.is_multi_label else "single_label_classification"

    @property
    def label_config(self) -> dict[str, Any]:
        labels = super().label_config
        return {**labels, "problem_type": self.problem_type} if self.is_multi_label else labels

    def renumber(self, label, number):
        if not self.is_multi_label:
            return number[label]
        old = {new: i for i, new in number.items() if i != MISSING}
        return [label[old[i]] for i in range(len(label))]


def load_text_data(recipe) -> TextData:
    """The data that the flags of a recipe name; the embedded task where they name none.

    Args:
        recipe: [`TextDataArguments`].
    """
    columns = {"text_column_names": recipe.text_column_names, "label_column_name": recipe.label_column_name}
    limits = {"max_train_samples": recipe.max_train_samples, "max_eval_samples": recipe.max_eval_samples}
    files = named_files(recipe, {**columns, "dataset_config_name": recipe.dataset_config_name}, recipe.task_name)
    if files is None:
        return load_embedded(recipe.labelled_rows, **limits)
    named = (recipe.task_name, recipe.dataset_name, recipe.dataset_config_name, files)
    return load_named(*named, **columns, **limits, labelled_rows=recipe.labelled_rows, cache_dir=recipe.cache_dir)


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
    teacher_train, labelled, transfer = (first_rows(split, max_train_samples) for split in (teacher_train, labelled, transfer))
    return TextData(
        teacher_train,
        labelled,
        transfer,
        {"test": first_rows(splits["test"], max_eval_samples)},
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

    The label column decides the kind of task: floats are regression; lists are several labels a text, as names, as class
    ids, or as one 0 or 1 for each label (lists of floats or bools, or of integers that are all of one length and all 0 or
    1); anything else is one class.

    Args:
        files: split name (`train`, `validation`, `test`) -> file. All files must have one suffix.
        labelled_rows: the student sees labels of that many training rows (stratified where each row has one class); the
            others become transfer text.

    Raises:
        ValueError: when the data cannot be found or reached, columns are missing, or labels are not of one kind.
    """
    if task_name is not None:
        if task_name not in GLUE_COLUMNS:
            raise ValueError(f"Unknown GLUE task {task_name!r}. Known: {', '.join(GLUE_COLUMNS)}.")
        dataset_name, dataset_config_name = "nyu-mll/glue", task_name
    raw = load_raw(dataset_name, dataset_config_name, files, cache_dir)
    train, evaluation = train_and_evaluation(raw, max_train_samples, max_eval_samples)
    text_columns = _text_columns(task_name, text_column_names, train)
    label = label_column_name or next((name for name in ("label", "labels") if name in train.column_names), None)
    if label is None or label not in train.column_names:
        raise ValueError(
            f"The training data has no label column {label_column_name or 'label'!r}, only {train.column_names}. Pass --label_column_name."
        )
    train, evaluation = with_label_column(train, evaluation, text_columns, label)
    feature = train.features["label"]
    is_multi_label = hasattr(feature, "feature")
    is_regression = not is_multi_label and feature.dtype in ("float32", "float64")
    if is_multi_label:
        train, evaluation, names = multi_hot(train, evaluation)
    else:
        train, evaluation, names = _encode_labels(train, evaluation, is_regression)
    labelled, transfer = train, train.select([])
    if labelled_rows is not None and labelled_rows < len(train):
        missing = [float(MISSING)] * len(names) if is_multi_label else float("nan") if is_regression else MISSING
        stratify = not (is_multi_label or is_regression)
        labelled, transfer = hide_labels(train, labelled_rows, lambda label: missing, seed, stratify)
    title = f"GLUE {task_name}" if task_name else dataset_name or ", ".join(sorted(files or {}))
    texts = [text for column in text_columns for text in train[column]]
    return TextData(train, labelled, transfer, evaluation, text_columns, names, texts, title, False, is_regression, is_multi_label)


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


def _encode_labels(train, evaluation, is_regression: bool):
    """Label ids 0..n-1 and their names; strings and sparse integers are numbered in sorted order."""
    feature = train.features["label"]
    if is_regression:
        return train, evaluation, ["score"]
    if hasattr(feature, "names"):
        return train, evaluation, list(feature.names)
    values = sorted(set(train["label"]))
    _refuse_new(values, [value for split in evaluation.values() for value in split["label"]])
    number = {value: i for i, value in enumerate(values)}
    if values == list(range(len(values))) and feature.dtype != "bool":
        return train, evaluation, [f"LABEL_{i}" for i in values]

    def encode(split):
        return relabel(split, [number[value] for value in split["label"]])

    return encode(train), {name: encode(split) for name, split in evaluation.items()}, [str(value) for value in values]


def multi_hot(train, evaluation: dict[str, Any]):
    """Lists of names, of ids or of zeros and ones as rows of floats, one for each label; and the names of the labels.

    Raises:
        ValueError: for rows of zeros and ones that differ in length, other numbers in them, and labels that only the
            evaluation data has.
    """
    feature = train.features["label"].feature
    splits = {"train": train, **evaluation}
    rows = {name: split["label"][:] for name, split in splits.items()}
    sizes = {len(row) for own in rows.values() for row in own}
    kind = "names" if hasattr(feature, "names") else feature.dtype
    integers = kind.startswith(("int", "uint"))
    both = {value for own in rows.values() for row in own for value in row} <= {0, 1} and len(sizes) == 1 and min(sizes) > 1
    if kind.startswith("float") or kind == "bool" or (integers and both):
        for name, own in rows.items():
            for i, row in enumerate(own):
                if len(row) != len(rows["train"][0]) or len(row) < 2 or not {float(value) for value in row} <= {0.0, 1.0}:
                    raise ValueError(
                        f"Row {i} of the {name} data has the labels {row[:6]}, where row 0 of the training data has "
                        f"{len(rows['train'][0])} numbers: each row must say 0 or 1 for each label. "
                        "Correct it, or give lists of label names."
                    )
        encoded, names = rows, [f"LABEL_{i}" for i in range(len(rows["train"][0]))]
    else:
        values = list(range(len(feature.names))) if kind == "names" else sorted({value for row in rows["train"] for value in row})
        _refuse_new(values, [value for name in evaluation for row in rows[name] for value in row])
        if len(values) < 2:
            raise ValueError(
                f"The label column holds lists with {len(values)} different labels {values}, so there is nothing to tell apart. "
                "Pass another --label_column_name, or data with two labels at least."
            )
        names = list(feature.names) if kind == "names" else [f"LABEL_{value}" if integers else str(value) for value in values]
        encoded = {name: [[value in row for value in values] for row in own] for name, own in rows.items()}
    changed = {name: relabel(split, [[float(value) for value in row] for row in encoded[name]]) for name, split in splits.items()}
    return changed.pop("train"), changed, names


def _refuse_new(known: list, values: list) -> None:
    unknown = sorted(set(values) - set(known), key=str)
    if unknown:
        raise ValueError(f"The evaluation data has labels that the training data lacks: {unknown[:5]}. Correct the split.")


def encode_texts(
    split,
    tokenizer,
    text_columns,
    max_seq_length: int | None = None,
    pad_to_max_length: bool = False,
    num_proc: int | None = None,
    return_token_type_ids: bool | None = None,
):
    """Tokenised split with `labels`; the text columns are dropped. Padding is left to the collator unless asked for.

    Args:
        max_seq_length: tokens per row; longer texts are cut. Default: the model's limit.
        return_token_type_ids: also give `token_type_ids`, for a teacher that reads them under a student whose tokenizer leaves them
            out (DistilBERT). Default: what the tokenizer gives.
    """

    def encode(rows):
        texts = [rows[column] for column in text_columns]
        return tokenizer(
            *texts,
            truncation=True,
            max_length=max_seq_length,
            padding="max_length" if pad_to_max_length else False,
            return_token_type_ids=return_token_type_ids,
        )

    encoded = split.map(
        encode, batched=True, num_proc=num_proc, remove_columns=[c for c in split.column_names if c != "label"], desc="Tokenizing"
    )
    return encoded.rename_column("label", "labels")
