"""Real data that needs no network. Importing this package imports neither datasets nor transformers."""

from __future__ import annotations

from .stdlib_docs import (
    AREA_NAMES,
    STDLIB_AREAS,
    UNLABELLED,
    label_counts,
    load_stdlib_docs,
    load_stdlib_docs_splits,
    load_topics_paragraphs,
    stdlib_docs_fingerprint,
)
from .tokenizer import train_wordpiece, vocabulary_fingerprint
from .vocabulary import prune_tokenizer


__all__ = [
    "AREA_NAMES",
    "STDLIB_AREAS",
    "UNLABELLED",
    "label_counts",
    "load_stdlib_docs",
    "load_stdlib_docs_splits",
    "load_topics_paragraphs",
    "prune_tokenizer",
    "stdlib_docs_fingerprint",
    "train_wordpiece",
    "vocabulary_fingerprint",
]
