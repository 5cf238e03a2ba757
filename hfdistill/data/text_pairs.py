"""Data for sentence embeddings in one shape: pairs that belong together, texts without partner, and pairs to measure on."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .splits import first_rows, load_raw, train_and_evaluation
from .stdlib_docs import load_stdlib_docs, load_topics_paragraphs


MIN_WORDS = 5
TEST_SHARE, TEACHER_SHARE = 0.2, 0.5
_FIRST_SENTENCE = re.compile(r"(.+?[.!?])[\"')\]]*\s+(?=[A-Z(\"'`<\[])(.+)")
_COLUMNS = (("sentence1", "sentence2"), ("anchor", "positive"), ("query", "document"), ("text",), ("sentence",))


@dataclass
class TextPairs:
    """Splits for sentence embeddings, each a `datasets.Dataset`.

    Attributes:
        pairs: columns `query` and `document`: texts that belong together, for the contrastive loss; may be empty.
        transfer: column `text`: what the student hears its teacher on. The texts of `pairs` are among them.
        evaluation: name -> held-out pairs, columns `query`, `document` and, for graded similarity, `score`. Without a score, the
            document of each query is searched among all of them. The first split is the one reported.
        vocabulary_texts: what a tokenizer may be trained on; never held-out texts.
        embedded: whether the data came with the package.
    """

    pairs: Any
    transfer: Any
    evaluation: dict[str, Any]
    vocabulary_texts: list[str] = field(default_factory=list)
    description: str = ""
    embedded: bool = False

    def fingerprint(self) -> str:
        """sha256 of every text and score that is used, in order."""
        digest = hashlib.sha256()
        for split in (self.pairs, self.transfer, *self.evaluation.values()):
            for column in sorted(split.column_names):
                digest.update(json.dumps([column, split[column][:]]).encode())
        return digest.hexdigest()


def docstring_pairs(texts: Iterable[str]) -> list[tuple[str, str]]:
    """`(first sentence, rest)` of each text where both have at least 5 words, without repetitions of either.

    Of texts that begin (or go on) with the same words but for case and punctuation the first is kept: two documents of one
    query could not be told apart.

    Example:
        >>> docstring_pairs(["Return the sum of all numbers. An empty list has the sum 0.", "Too short. Indeed it is."])
        [('Return the sum of all numbers.', 'An empty list has the sum 0.')]
    """
    pairs, seen = [], set()
    for text in texts:
        found = _FIRST_SENTENCE.match(text)
        if found is None or any(len(part.split()) < MIN_WORDS for part in found.groups()):
            continue
        keys = {re.sub(r"\W+", " ", part.lower()).strip() for part in found.groups()}
        if not keys & seen:
            seen |= keys
            pairs.append(found.groups())
    return pairs


def load_embedded_pairs(
    seed: int = 0, max_train_samples: int | None = None, max_eval_samples: int | None = None, root: str | None = None
) -> TextPairs:
    """The default task: which documentation goes on from this first sentence? Python's standard library, no network.

    A fifth of the pairs is the test part. Of the others, half (A) are the pairs that a teacher from scratch and the student
    alone are trained on; the texts of A and of the other half (B), without their partners, and paragraphs of the language
    reference are the transfer texts. So the student hears its teacher on texts that its teacher has never seen.
    Near-duplicates among documents are not grouped.

    Args:
        seed: of the split, not of any training.
        max_train_samples: pairs of A, and transfer texts, that are used.
        max_eval_samples: pairs of the test part that are used.
        root: as in [`load_stdlib_docs`].

    Raises:
        ValueError: as [`load_stdlib_docs`] does.
    """
    from datasets import Dataset

    pairs = docstring_pairs(load_stdlib_docs(root, mask_module=False)["text"])
    random.Random(seed).shuffle(pairs)
    held_out = round(TEST_SHARE * len(pairs))
    test, rest = pairs[:held_out], pairs[held_out:]
    ours = rest[: round(TEACHER_SHARE * len(rest))]
    texts = [*(text for pair in rest for text in pair), *load_topics_paragraphs()]
    return TextPairs(
        first_rows(_dataset(ours), max_train_samples),
        first_rows(Dataset.from_dict({"text": texts}), max_train_samples),
        {"test": first_rows(_dataset(test), max_eval_samples)},
        vocabulary_texts=texts,
        description="first sentence to rest of docstrings of the Python standard library (embedded, no network)",
        embedded=True,
    )


def load_named_pairs(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    files: dict[str, str] | None = None,
    text_column_names: list[str] | None = None,
    paired: bool = False,
    evaluation_dataset_name: str | None = None,
    evaluation_dataset_config_name: str | None = None,
    evaluation_column_names: list[str] | None = None,
    score_column_name: str | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    cache_dir: str | None = None,
) -> TextPairs:
    """Hub data sets or local csv, json or parquet files.

    Args:
        files: split name (`train`, `validation`, `test`) -> file.
        text_column_names: columns of the training data that hold texts.
        paired: the two text columns belong together, so that contrastive training may use them. Not so for data sets that
            grade the similarity of both (STS-B), of which this takes the texts only.
        evaluation_dataset_name: where the held-out pairs come from, if not from the same data set.
        evaluation_column_names: their two columns. Default: as in training, or `sentence1` and `sentence2`.
        score_column_name: how alike the two are, such as 0 to 5. Default: `score` where there is such a column.

    Raises:
        ValueError: when the data cannot be found or reached, columns are missing, or cells are empty.
    """
    from datasets import Dataset

    if files:  # one after the other: held-out files have other columns than training files, which datasets refuses for one data set
        raw = {name: load_raw(None, None, {name: path}, cache_dir)[name] for name, path in files.items()}
    else:
        raw = load_raw(dataset_name, dataset_config_name, None, cache_dir)
    if evaluation_dataset_name:
        raw = {"train": raw["train"]} if "train" in raw else dict(raw)
        other = load_raw(evaluation_dataset_name, evaluation_dataset_config_name, None, cache_dir)
        raw |= {name: split for name, split in other.items() if name != "train"}
    train, evaluation = train_and_evaluation(raw, max_train_samples, max_eval_samples)
    columns = _columns(train, text_column_names, "training data", "--text_column_names")
    if paired and len(columns) != 2:
        raise ValueError(f"--paired true needs two text columns that belong together, got {columns}. Pass --text_column_names with two.")
    held_out = {}
    for name, split in evaluation.items():
        given = evaluation_column_names or (columns if len(columns) == 2 else None)
        own = _columns(split, given, f"{name} data", "--evaluation_column_names")
        if len(own) != 2:
            raise ValueError(
                f"The {name} data must have two text columns to compare, got {own} of {split.column_names}. Pass --evaluation_column_names "
                "with two, and --evaluation_dataset_name where the pairs are in another data set (such as sentence-transformers/stsb)."
            )
        score = score_column_name or ("score" if "score" in split.column_names else None)
        if score is not None and score not in split.column_names:
            raise ValueError(f"The {name} data has no column {score!r}, only {split.column_names}. Correct --score_column_name.")
        scores = {} if score is None else {"score": [float(value) for value in _full_column(split, score, name)]}
        held_out[name] = Dataset.from_dict(
            {"query": _full_column(split, own[0], name), "document": _full_column(split, own[1], name), **scores}
        )
    texts = list(dict.fromkeys(text for column in columns for text in _full_column(train, column, "training")))
    pairs = zip(*(train[column] for column in columns)) if paired else []
    title = ", ".join(filter(None, (dataset_name, *sorted((files or {}).values()), evaluation_dataset_name)))
    return TextPairs(_dataset(list(pairs)), Dataset.from_dict({"text": texts}), held_out, texts, title)


def _dataset(pairs: list[tuple[str, str]]):
    from datasets import Dataset

    return Dataset.from_dict({"query": [query for query, _ in pairs], "document": [document for _, document in pairs]})


def _columns(split, given: list[str] | tuple[str, ...] | None, where: str, flag: str) -> tuple[str, ...]:
    if given:
        missing = [name for name in given if name not in split.column_names]
        if missing:
            raise ValueError(f"The {where} has no column {missing[0]!r}, only {split.column_names}. Correct {flag}.")
        return tuple(given)
    for names in _COLUMNS:
        if set(names) <= set(split.column_names):
            return names
    raise ValueError(f"Which columns of the {where} hold texts? It has {split.column_names}. Pass {flag}.")


def _full_column(split, column: str, where: str) -> list:
    cells = split[column][:]
    empty = sum(cell is None or cell == "" for cell in cells)
    if empty:
        raise ValueError(f"{empty} of {len(cells)} cells in column {column!r} of the {where} data are empty. Fill them or drop these rows.")
    return cells
