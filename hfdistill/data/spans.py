"""Extractive question answering data in one shape: SQuAD-like Hub data sets, local files, or the embedded questions."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .splits import Splits, first_rows, load_raw, train_and_evaluation
from .stdlib_questions import load_stdlib_questions_splits


logger = logging.getLogger(__name__)

COLUMNS = ("id", "question", "context", "answers")
MAX_MISPLACED = 0.01


@dataclass
class SpanData(Splits):
    """Splits of an extractive question answering task, with the columns `id`, `question`, `context` and `answers` of SQuAD.

    `answers` holds `text` and `answer_start`, one entry for each accepted answer; none for a question that cannot be
    answered. It is `None` where the answer is hidden (the rows of `transfer`), which is something else.

    Attributes:
        has_unanswerable: "there is no answer" is an answer (SQuAD 2).
    """

    has_unanswerable: bool = False

    @property
    def has_classes(self) -> bool:
        return False

    def fingerprint(self) -> str:
        """sha256 of every question, context and answer that is used, in order."""
        digest = hashlib.sha256(json.dumps(self.has_unanswerable).encode())
        for split in (self.teacher_train, self.labelled, self.transfer, *self.evaluation.values()):
            for row in split:
                digest.update(json.dumps([row[name] for name in COLUMNS]).encode())
        return digest.hexdigest()


def load_embedded_spans(
    labelled_rows: int | None = 100,
    seed: int = 0,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    root: str | None = None,
) -> SpanData:
    """The default task: what does this documentation say about a function or class of the standard library? No network is used.

    Args:
        labelled_rows: how many answers the student gets; `None` gives it and its teacher every answer.
        seed: of the split, not of any training.
        max_train_samples: rows of each training split that are used.
        max_eval_samples: rows of the test split that are used.
        root: as in [`load_stdlib_questions`].
    """
    from datasets import concatenate_datasets

    splits = load_stdlib_questions_splits(labelled_rows or 1, seed, root=root, hide_answers=labelled_rows is not None)
    teacher_train, labelled, transfer = splits["teacher"], splits["few"], splits["transfer"]
    if labelled_rows is None:
        teacher_train = labelled = concatenate_datasets([teacher_train, transfer])
        transfer = transfer.select([])
    texts = [text for name in ("teacher", "transfer") for column in ("question", "context") for text in splits[name][column]]
    return SpanData(
        first_rows(teacher_train, max_train_samples),
        first_rows(labelled, max_train_samples),
        first_rows(transfer, max_train_samples),
        {"test": first_rows(splits["test"], max_eval_samples)},
        ("question", "context"),
        [],
        list(dict.fromkeys(texts)),
        "questions about the Python standard library, answered by sentences of its docstrings (embedded, no network)",
        True,
    )


def load_named_spans(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    files: dict[str, str] | None = None,
    version_2_with_negative: bool = False,
    labelled_rows: int | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
    cache_dir: str | None = None,
) -> SpanData:
    """A data set on the Hub (`squad`, `squad_v2`), or local csv, json or parquet files, with the columns of SQuAD.

    `answers` is a mapping with lists `text` and `answer_start`; in csv files that mapping as JSON. A missing `id` is the
    number of the row. The nested json files of the SQuAD web site (`train-v2.0.json`) are read too.

    Args:
        files: split name (`train`, `validation`, `test`) -> file. All files must have one suffix.
        version_2_with_negative: questions without an answer are part of the task, as in SQuAD 2.
        labelled_rows: the student knows the answers of that many training questions; the others become transfer questions.

    Raises:
        ValueError: when the data cannot be found or reached, columns are missing, answers are not where `answer_start` says, or
            some questions have no answer although `version_2_with_negative` is off.
    """
    raw = load_raw(dataset_name, dataset_config_name, files, cache_dir)
    train, evaluation = train_and_evaluation({name: _squad_columns(split, name) for name, split in raw.items()})
    train = first_rows(train, max_train_samples)
    evaluation = {name: first_rows(split, max_eval_samples) for name, split in evaluation.items()}
    for name, split in {"train": train, **evaluation}.items():
        _check_answers(split, name, version_2_with_negative)
    labelled, transfer = train, train.select([])
    if labelled_rows is not None and labelled_rows < len(train):
        rows = train.shuffle(seed=seed)
        labelled, transfer = rows.select(range(labelled_rows)), hide_answers(rows.select(range(labelled_rows, len(rows))))
    texts = list(dict.fromkeys(text for column in ("question", "context") for text in train[column]))
    title = dataset_name or ", ".join(sorted(files or {}))
    return SpanData(
        train, labelled, transfer, evaluation, ("question", "context"), [], texts, title, has_unanswerable=version_2_with_negative
    )


def hide_answers(split):
    """`split` without its answers."""
    return _dataset({**row, "answers": None} for row in split)


def span_features():
    """The columns of SQuAD as `datasets.Features`; `answers` may be `None`."""
    from datasets import Features, List, Value

    answers = {"text": List(Value("string")), "answer_start": List(Value("int32"))}
    return Features({**{name: Value("string") for name in COLUMNS[:-1]}, "answers": answers})


def _dataset(rows):
    from datasets import Dataset

    return Dataset.from_list([{name: row[name] for name in COLUMNS} for row in rows], features=span_features())


def _squad_columns(split, name: str):
    """The four columns, whatever the form of the file."""
    if "paragraphs" in split.column_names or split.column_names == ["data"] or set(split.column_names) == {"data", "version"}:
        return _dataset(_flat(split))
    missing = [column for column in COLUMNS[1:] if column not in split.column_names]
    if missing:
        raise ValueError(
            f"The {name} data has no column {missing[0]!r}, only {split.column_names}: extractive question answering needs 'question', "
            "'context' and 'answers' ({'text': [...], 'answer_start': [...]}). Rename the columns, or convert the data to that of SQuAD."
        )
    return _dataset(
        {**row, "id": str(i if row.get("id") is None else row["id"]), "answers": _answers(row["answers"], i, name)}
        for i, row in enumerate(split)
    )


def _flat(split) -> Iterator[dict[str, Any]]:
    """The questions of the nested files: articles of paragraphs of questions."""
    articles = split if "paragraphs" in split.column_names else (article for row in split for article in row["data"])
    for article in articles:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = question.get("answers") or []
                answers = {"text": [a["text"] for a in answers], "answer_start": [a["answer_start"] for a in answers]}
                yield {"id": question["id"], "question": question["question"], "context": paragraph["context"], "answers": answers}


def _answers(value: Any, row: int, name: str) -> dict[str, list]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = {"text": value}
    if isinstance(value, list):  # one mapping for each answer
        value = {key: [answer.get(key) for answer in value] for key in ("text", "answer_start")}
    texts, starts = ((value or {}).get(key) for key in ("text", "answer_start"))
    if not (isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts) and None not in [*texts, *starts]):
        raise ValueError(
            f"Row {row} of the {name} data has the answers {value!r}, which is not {{'text': [...], 'answer_start': [...]}} with one start "
            "for each text: where the answer stands would not be known. Two empty lists mean that there is no answer."
        )
    return {"text": texts, "answer_start": starts}


def _check_answers(split, name: str, version_2_with_negative: bool) -> None:
    count, empty, misplaced = 0, [], []
    for row in split:
        texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
        if not texts:
            empty.append(row["id"])
        for text, start in zip(texts, starts):
            count += 1
            if row["context"][start : start + len(text)] != text:
                misplaced.append((row["id"], text, row["context"][start : start + len(text)]))
    if empty and not version_2_with_negative:
        raise ValueError(
            f"{len(empty)} of {len(split)} questions of the {name} data have no answer (the first is {empty[0]!r}), and a model that may "
            "not say so would learn from nothing. Pass --version_2_with_negative true, or drop these rows."
        )
    if misplaced:
        row, text, there = misplaced[0]
        found = f"{len(misplaced)} of {count} answers of the {name} data are not where answer_start says (question {row!r}: {text!r}, "
        found += f"there stands {there!r})"
        if len(misplaced) > MAX_MISPLACED * count:
            raise ValueError(f"{found}: the model would learn other spans. answer_start counts characters of 'context'. Correct them.")
        logger.warning("%s: the model learns what stands there.", found)
