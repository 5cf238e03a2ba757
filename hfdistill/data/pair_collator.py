"""Batches for sentence embeddings: both texts of a pair become rows of one batch, so that a student encodes them in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


PARTNER = "partner_"


class PairCollator:
    """Pads rows with the tokenizer; a row that holds a pair gives two, the second from its `partner_` columns.

    A batch of `n` pairs has `2 n` rows, first texts first, and in `labels` the number of the pair, which
    [`ContrastivePairsLoss`] reads. [`encode_pairs`] makes such rows; rows of one text pass as they are.

    Args:
        tokenizer: of student and teacher.
    """

    columns = tuple(PARTNER + name for name in ("input_ids", "attention_mask", "token_type_ids"))

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        first = [{name: value for name, value in row.items() if not name.startswith(PARTNER)} for row in rows]
        second = [
            {
                **{name.removeprefix(PARTNER): value for name, value in row.items() if name.startswith(PARTNER)},
                **({"labels": row["labels"]} if "labels" in row else {}),
            }
            for row in rows
            if PARTNER + "input_ids" in row
        ]
        return self.tokenizer.pad([*first, *second], return_tensors="pt")


def encode_pairs(split, tokenizer: PreTrainedTokenizerBase, max_seq_length: int | None = None, num_proc: int | None = None):
    """Tokenised pairs (columns `query` and `document`), one row a pair, for [`PairCollator`]; `labels` numbers them.

    Args:
        max_seq_length: tokens per text; longer texts are cut. Default: the model's limit.
    """

    def encode(rows, numbers):
        own, partner = (tokenizer(rows[name], truncation=True, max_length=max_seq_length) for name in ("query", "document"))
        return {**own, **{PARTNER + name: values for name, values in partner.items()}, "labels": numbers}

    return split.map(encode, batched=True, with_indices=True, num_proc=num_proc, remove_columns=split.column_names, desc="Tokenizing")


def encode_sentences(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_seq_length: int | None = None, number: bool = False):
    """Tokenised texts, one row each.

    Args:
        max_seq_length: as in [`encode_pairs`].
        number: add `labels`, the number of each row, by which [`embedding_metrics`] puts predictions in order.
    """
    from datasets import Dataset

    encoded = dict(tokenizer(list(texts), truncation=True, max_length=max_seq_length))
    return Dataset.from_dict({**encoded, **({"labels": list(range(len(texts)))} if number else {})})
