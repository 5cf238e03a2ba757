"""Documents into rows of token ids: packed without padding, or one document a row."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase


NO_WORD = -1
_BATCH = 256


def encode_corpus(
    documents: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int = 128,
    *,
    packing: bool = True,
    whole_word: bool = False,
    min_row_tokens: int = 12,
    max_unknown: float = 0.5,
    streaming: bool = False,
    shuffle_buffer: int = 10_000,
    seed: int = 0,
) -> Dataset | IterableDataset:
    """Tokenised rows with a column `example_id`, the number of the row, from which masks and stored teachers know it again.

    Packing puts documents one after another with a separator behind each and cuts every `max_seq_length` tokens: no padding,
    no token is lost. Rows begin and end as the tokenizer begins and ends a text (`[CLS] ... [SEP]`, `<s> ... </s>`; nothing
    for GPT-2), and the separator is that end, or `eos` where there is none. The last row may be shorter. Otherwise each row
    holds one document, or one piece of a longer one, and DistilBERT's two filters apply.

    Args:
        documents: a `Dataset` or `IterableDataset` with a column `text`, or a list of texts.
        tokenizer (`PreTrainedTokenizerBase`): of the student and its teacher.
        max_seq_length (`int`, defaults to 128): tokens per row, special ones included.
        packing (`bool`, defaults to `True`): several documents a row.
        whole_word (`bool`, defaults to `False`): add the column `word_ids` (-1 at special tokens), for masking whole words with
            any tokenizer. A word that a row's end cuts counts as two.
        min_row_tokens (`int`, defaults to 12): without packing, shorter rows are dropped, special tokens counted; the published
            filter is "11 and fewer".
        max_unknown (`float`, defaults to 0.5): without packing, rows with at least that share of `unk` are dropped.
        streaming (`bool`, defaults to `False`): tokenise on the fly. The stream never ends: it begins again behind its last
            document, and `example_id` counts on, so that there is no epoch (train by `max_steps`) and every pass has masks of
            its own. Rows are shuffled within a buffer. All of it is read by each process; more than one data loader worker
            brings nothing.
        shuffle_buffer (`int`, defaults to 10,000): rows in the buffer of a stream; 1 keeps the order.
        seed (`int`, defaults to 0): of that buffer.

    Returns:
        `Dataset`, or `IterableDataset` when streaming: `input_ids`, `example_id`, `length` (in tokens) without packing, and
        `word_ids` on request. No `attention_mask`: collators make it where a batch is padded.

    Raises:
        ValueError: when rows are too short for a token, there is no separator to pack with, word boundaries are not known, or
            no row is left.
    """
    from datasets import Dataset, Features, IterableDataset, List, Value

    encoder = _Encoder.of(tokenizer, max_seq_length, packing, whole_word, min_row_tokens, max_unknown)
    columns = {"input_ids": List(Value("int32")), "example_id": Value("int64")}
    columns |= {} if packing else {"length": Value("int32")}
    columns |= {"word_ids": List(Value("int32"))} if encoder.word_ids else {}
    if streaming:
        # Bound, not passed as gen_kwargs: a list there would be taken for shards, and cut.
        stream = IterableDataset.from_generator(partial(encoder.numbered, documents, endless=True), Features(columns))
        return stream if shuffle_buffer <= 1 else stream.shuffle(seed=seed, buffer_size=shuffle_buffer)
    # Arrays while they are collected: 4 bytes a token instead of a Python integer.
    rows = [
        {name: np.asarray(value, np.int32) if isinstance(value, list) else value for name, value in row.items()}
        for row in encoder.numbered(documents)
    ]
    if not rows:
        raise ValueError(
            f"No row is left: every document is empty, has fewer than min_row_tokens={min_row_tokens} tokens, or is unknown to the "
            f"tokenizer by max_unknown={max_unknown} and more. Check the text column and these two."
        )
    return Dataset.from_dict({name: [row[name] for row in rows] for name in columns}, features=Features(columns))


@dataclass
class _Encoder:
    tokenizer: Any
    length: int
    packing: bool
    word_ids: bool
    min_row_tokens: int
    max_unknown: float
    begin: list[int]
    end: list[int]
    separator: list[int]

    @classmethod
    def of(cls, tokenizer, length: int, packing: bool, whole_word: bool, min_row_tokens: int, max_unknown: float) -> _Encoder:
        if whole_word and not tokenizer.is_fast:
            raise ValueError(
                f"whole_word=True needs to know the words of a text, and {type(tokenizer).__name__} does not tell. Use a fast tokenizer; "
                "the '##' pieces of a WordPiece vocabulary are found by MaskingCollator(whole_word=True) without this column."
            )
        begin, end = special_frame(tokenizer)
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        separator = end[-1:] or eos
        if packing and not separator:
            raise ValueError(
                f"{type(tokenizer).__name__} has no token that ends a text, so packed documents would run into one another. Set its "
                "eos_token, or pass packing=False."
            )
        if length <= len(begin) + len(end) + len(separator):
            raise ValueError(
                f"max_seq_length={length} leaves no room for text beside {len(begin) + len(end)} special tokens and a separator. Use at "
                "least 16; models usually take 512."
            )
        return cls(tokenizer, length, packing, whole_word, min_row_tokens, max_unknown, begin, end, separator)

    def numbered(self, documents, endless: bool = False) -> Iterator[dict[str, Any]]:
        """Rows with their numbers."""
        for number, (ids, words) in enumerate(self._pack(documents, endless) if self.packing else self._one_a_row(documents, endless)):
            row: dict[str, Any] = {"input_ids": ids, "example_id": number}
            if not self.packing:
                row["length"] = len(ids)
            if self.word_ids:
                row["word_ids"] = words
            yield row

    def _pack(self, documents, endless: bool):
        room = self.length - len(self.begin) - len(self.end)
        ids: list[int] = []
        words: list[int] = []
        for more, numbers in _repeat(lambda: self._tokenised(documents), endless):
            ids += [*more, *self.separator]
            words += [*numbers, *[NO_WORD] * len(self.separator)]
            start = 0
            while len(ids) - start >= room:
                yield self._framed(ids[start : start + room], words[start : start + room])
                start += room
            del ids[:start], words[:start]
        if any(token not in self.separator for token in ids):
            yield self._framed(ids, words)

    def _one_a_row(self, documents, endless: bool):
        room = self.length - len(self.begin) - len(self.end)
        tail = [] if self.end else self.separator

        def once():
            for ids, words in self._tokenised(documents):
                ids, words = [*ids, *tail], [*words, *[NO_WORD] * len(tail)]
                for start in range(0, len(ids), room):
                    row = self._framed(ids[start : start + room], words[start : start + room])
                    unknown = row[0].count(self.tokenizer.unk_token_id) if self.tokenizer.unk_token_id not in tail else 0
                    if len(row[0]) >= self.min_row_tokens and unknown < self.max_unknown * len(row[0]):
                        yield row

        return _repeat(once, endless)

    def _framed(self, ids: list[int], words: list[int]) -> tuple[list[int], list[int]]:
        return [*self.begin, *ids, *self.end], [*[NO_WORD] * len(self.begin), *words, *[NO_WORD] * len(self.end)]

    def _tokenised(self, documents) -> Iterator[tuple[list[int], list[int]]]:
        """Ids and word numbers of each document that is not empty, without special tokens."""
        for texts in _batches(documents):
            encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            for i, ids in enumerate(encoded["input_ids"]):
                if ids:
                    words = encoded.word_ids(i) if self.word_ids else [None] * len(ids)
                    yield ids, [NO_WORD if word is None else word for word in words]


def special_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and behind a text: `([CLS], [SEP])`, `([], [])` for GPT-2."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
    return framed[:start], framed[start + len(bare) :]


def _batches(documents) -> Iterator[list[str]]:
    if hasattr(documents, "iter"):  # not `__iter__`: inside a data loader worker a stream would leave out the other workers' part
        yield from (batch["text"] for batch in documents.iter(batch_size=_BATCH))
    else:
        texts = iter(documents)
        while batch := list(itertools.islice(texts, _BATCH)):
            yield batch


def _repeat(once: Callable[[], Iterable], endless: bool) -> Iterator:
    """`once()`, again and again if `endless`; a pass that gives nothing ends it with an error instead of never."""
    while True:
        empty = True
        for item in once():
            empty = False
            yield item
        if not endless:
            return
        if empty:
            raise ValueError("A whole pass over the stream gave no row: its documents are empty or filtered out. Check the text column.")
