"""Text for language models: the embedded corpus, local files or Hub data sets, in memory or as a stream."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .stdlib_docs import load_stdlib_docs, load_topics_paragraphs


SAMPLED_DOCUMENTS = 1000
_BUILDERS = {"txt": "text", "csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}


@dataclass
class Corpus:
    """Documents to train a language model on and documents to measure it with, each with one column `text`.

    Attributes:
        train: `datasets.Dataset`, or `datasets.IterableDataset` where it is streamed.
        held_out: `datasets.Dataset`, always in memory; nobody trains on it, and no tokenizer is made from it.
        description: for the card.
        embedded: whether it is the corpus that comes with Python.
    """

    train: Any
    held_out: Any
    description: str
    embedded: bool = False

    @property
    def streaming(self) -> bool:
        return not hasattr(self.train, "__len__")

    def fingerprint(self) -> str:
        """sha256 of the held-out texts, and of 1,000 training texts: evenly spaced ones, or the first ones of a stream."""
        digest = hashlib.sha256(json.dumps(self.held_out["text"][:]).encode())
        if self.streaming:
            texts = [row["text"] for row in itertools.islice(iter(self.train), SAMPLED_DOCUMENTS)]
        else:
            size = len(self.train)
            digest.update(str(size).encode())
            rows = sorted({i * size // SAMPLED_DOCUMENTS for i in range(SAMPLED_DOCUMENTS)}) if size > SAMPLED_DOCUMENTS else range(size)
            texts = self.train.select(rows)["text"][:]
        digest.update(json.dumps(texts).encode())
        return digest.hexdigest()

    def sample(self, documents: int = 100_000) -> list[str]:
        """The first training texts, to make a tokenizer from."""
        return [row["text"] for row in itertools.islice(iter(self.train), documents)]


def load_embedded_corpus(
    seed: int = 0, held_out: float = 0.1, *, max_train_documents: int | None = None, max_held_out_documents: int | None = None
) -> Corpus:
    """About 1.5 million characters of English that every Python brings along; no network is used.

    The documentation strings of [`load_stdlib_docs`], module names unmasked, and the paragraphs of
    [`load_topics_paragraphs`]: 5,745 documents in Python 3.11.7. Shuffled, then cut by document. Near-duplicates are not
    grouped and may lie on both sides of the cut.

    Args:
        seed (`int`, defaults to 0): of the shuffle.
        held_out (`float`, defaults to 0.1): share of documents that nobody trains on.
        max_train_documents, max_held_out_documents (`int`, *optional*): use only that many.

    Raises:
        ValueError: where this Python has no sources or no `pydoc_data`, and for a share that leaves one side empty.
    """
    texts = [*load_stdlib_docs(mask_module=False)["text"], *load_topics_paragraphs()]
    random.Random(seed).shuffle(texts)
    train, test = _cut(_dataset(texts), held_out)
    train, test = _first(train, max_train_documents), _first(test, max_held_out_documents)
    return Corpus(train, test, "documentation of the Python standard library and language (embedded, no network)", embedded=True)


def load_corpus(
    dataset_names: list[str] | None = None,
    files: Mapping[str, str | list[str]] | None = None,
    *,
    probabilities: list[float] | None = None,
    text_column: str = "text",
    sample_by: str = "line",
    streaming: bool = False,
    held_out: float = 0.05,
    seed: int = 0,
    max_train_documents: int | None = None,
    max_held_out_documents: int | None = None,
    cache_dir: str | None = None,
) -> Corpus:
    """A corpus from the Hub or from local files.

    Args:
        dataset_names (list of `str`, *optional*): Hub data sets, one after another, each written `name`, `name:configuration` or
            `name:configuration@revision`. Their `train` splits are joined; `validation` (else `test`) of the first that has
            one is held out.
        probabilities (list of `float`, *optional*): draw documents from the data sets at random with these probabilities until one of
            them ends, instead of one data set after another. A stream is shuffled within a buffer only, so it needs them.
        files (`Mapping`, *optional*): `train` and `validation` -> file or files: txt, csv, tsv, json, jsonl or parquet.
        text_column (`str`, defaults to `"text"`): the column with the documents; txt files have no other.
        sample_by (`str`, defaults to `"line"`): in txt files a document is a `line`, a `paragraph` (up to a blank line) or the
            whole file (`document`).
        streaming (`bool`, defaults to `False`): never load all of it; for corpora that do not fit on the disk or in memory.
        held_out (`float`, defaults to 0.05): without a validation part, the share of the documents that is cut off after
            shuffling; of a stream, the number of documents taken from its beginning (at least 1).
        seed (`int`, defaults to 0): of the shuffle before the cut.
        max_train_documents, max_held_out_documents (`int`, *optional*): use only that many.
        cache_dir (`str`, *optional*): where downloads are kept.

    Raises:
        ValueError: for files or data sets that cannot be read, a missing text column, or a part without documents.
    """
    from datasets import concatenate_datasets, interleave_datasets

    if bool(dataset_names) == bool(files):
        raise ValueError(f"Give either dataset_names or files, got {dataset_names!r} and {files!r}. For neither: load_embedded_corpus.")
    if files:
        parts = [_load_files(dict(files), sample_by, streaming, cache_dir)]
    else:
        parts = [_load_named(name, streaming, cache_dir) for name in dataset_names]
    for part in parts:
        if "train" not in part:
            raise ValueError(f"The data has no 'train' split, only {sorted(part)}. Pass files={{'train': ...}}, or a data set with one.")
    trains = [_texts_only(part["train"], text_column) for part in parts]
    if probabilities is not None and (len(probabilities) != len(trains) or abs(sum(probabilities) - 1) > 1e-6):
        raise ValueError(f"probabilities={probabilities} must be one for each of {len(trains)} data sets, with a sum of 1.")
    if len(trains) == 1:
        train = trains[0]
    else:
        train = concatenate_datasets(trains) if probabilities is None else interleave_datasets(trains, probabilities, seed=seed)
    apart = next((part[name] for part in parts for name in ("validation", "test") if name in part), None)
    if apart is not None:
        test = _in_memory(_texts_only(apart, text_column), max_held_out_documents)
    elif streaming:
        if held_out < 1:
            raise ValueError(
                f"held_out={held_out!r} is a share, but the length of a stream is not known. Give a number of documents, such as 1000, "
                "or a validation file."
            )
        test = _in_memory(train, int(held_out))
        train = train.skip(int(held_out))
        test = test if max_held_out_documents is None else _in_memory(test, max_held_out_documents)
    else:
        train, test = _cut(train.shuffle(seed=seed), held_out)
        test = _in_memory(test, max_held_out_documents)
    train = _first(train, max_train_documents)
    if not len(test) or next(iter(train), None) is None:
        raise ValueError(
            f"There is no document to {'measure with' if not len(test) else 'train on'}. Check the files and held_out={held_out}."
        )
    return Corpus(train, test, ", ".join(dataset_names or [os.path.basename(path) for path in _flat(files)]))


def _dataset(texts: list[str]):
    from datasets import Dataset

    return Dataset.from_dict({"text": texts})


def _cut(documents, held_out: float):
    """Training and held-out documents; the latter are the last ones."""
    size = len(documents)
    count = round(size * held_out) if held_out < 1 else int(held_out)
    if not 0 < count < size:
        raise ValueError(f"held_out={held_out!r} of {size} documents leaves {count} to measure with and {size - count} to train on.")
    return documents.select(range(size - count)), documents.select(range(size - count, size))


def _first(documents, limit: int | None):
    if limit is None:
        return documents
    return documents.select(range(min(limit, len(documents)))) if hasattr(documents, "__len__") else documents.take(limit)


def _in_memory(documents, limit: int | None):
    return _dataset([row["text"] for row in itertools.islice(iter(documents), limit)])


def _texts_only(documents, column: str):
    """The documents that are not empty, with one column `text`."""
    names = documents.column_names or list(next(iter(documents), {}))  # a stream may not know them before its first row
    if column not in names:
        raise ValueError(f"The data has no column {column!r}, only {names}. Pass text_column with one of them.")
    documents = documents.select_columns([column])
    documents = documents if column == "text" else documents.rename_column(column, "text")
    return documents.filter(_not_empty)


def _not_empty(row) -> bool:
    return bool(row["text"] and row["text"].strip())


def _flat(files: Mapping[str, str | list[str]]) -> list[str]:
    return [path for value in files.values() for path in ([value] if isinstance(value, str) else value)]


def _load_files(files: dict, sample_by: str, streaming: bool, cache_dir: str | None):
    from datasets import load_dataset

    suffixes = {path.rsplit(".", 1)[-1].lower() for path in _flat(files)}
    kind = _BUILDERS.get(next(iter(suffixes))) if len(suffixes) == 1 else None
    if kind is None:
        raise ValueError(f"Data files must all be of one kind, {', '.join(_BUILDERS)}, got {sorted(_flat(files))}.")
    if sample_by not in ("line", "paragraph", "document"):
        raise ValueError(f"sample_by must be 'line', 'paragraph' or 'document', got {sample_by!r}: how else would a txt file be cut?")
    options = {"sample_by": sample_by} if kind == "text" else {"sep": "\t"} if suffixes == {"tsv"} else {}
    try:
        return load_dataset(kind, data_files=files, streaming=streaming, cache_dir=cache_dir, **options)
    except FileNotFoundError as error:
        raise ValueError(f"A data file does not exist: {str(error).splitlines()[0]}. Check the paths {sorted(_flat(files))}.") from error


def _load_named(name: str, streaming: bool, cache_dir: str | None):
    from datasets import load_dataset

    path, _, revision = name.partition("@")
    path, _, configuration = path.partition(":")
    try:
        return load_dataset(path, configuration or None, revision=revision or None, streaming=streaming, cache_dir=cache_dir)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The data set {name!r} could not be loaded from the Hub ({type(error).__name__}: {str(error).strip().splitlines()[0][:160]}). "
            "Check the name and the network; where there is none, download it elsewhere (`hf download --repo-type dataset`) and pass its "
            "files, or leave both out to use the embedded corpus."
        ) from error
