"""Token classification data in one shape: Hub data sets, local files, or punctuation restoration on the embedded documentation."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .splits import MISSING, Splits, first_rows, hide_labels, load_raw, relabel, train_and_evaluation, with_label_column
from .stdlib_docs import load_stdlib_docs, load_topics_paragraphs


PUNCTUATION_LABELS = ("O", "COMMA", "PERIOD", "COLON")
MAX_WORDS, MIN_WORDS = 40, 8
MAX_CODE = 0.2

_LABEL_OF = {",": 1, ".": 2, "!": 2, "?": 2, ":": 3, ";": 3}
_EDGES = re.compile(r"^[\"'`(\[{<*:]+|[\"'`()\[\]{}<>*]+$")
_PROSE = re.compile(r"[a-z]+(?:['’/-][a-z]+)*$|[a-z]+(?:_[a-z]+)*$|\d+$")
_ABBREVIATIONS = frozenset(("e.g", "i.e", "vs", "cf"))
_LIST_KINDS = {"json": "json", "jsonl": "json", "parquet": "parquet"}


@dataclass
class TokenData(Splits):
    """Splits of a token classification task: a column of words (`text_columns` names it) and `label`, one class id a word.

    A hidden label is -100, and rows of `transfer` have no other.
    """

    @property
    def words(self) -> str:
        """Name of the column of words."""
        return self.text_columns[0]

    def renumber(self, label, number):
        return [number[own] for own in label]


def punctuated_words(text: str) -> tuple[list[str], list[int]]:
    """The words of a text without case and sentence punctuation, and for each the number of its label in `PUNCTUATION_LABELS`.

    The label says which mark follows the word: a comma, an end of sentence (. ! ?), a colon or semicolon, or none. The full
    stop of an abbreviation is part of it. Quotation marks and brackets around a word are dropped, and so are pieces without
    a letter or digit, such as dashes.

    Example:
        >>> punctuated_words('Return x, i.e. the "end": it is last (see below).')
        (['return', 'x', 'i.e', 'the', 'end', 'it', 'is', 'last', 'see', 'below'], [0, 1, 0, 0, 3, 0, 0, 0, 0, 2])
    """
    words, labels = [], []
    for piece in text.lower().split():
        label = 0
        while piece and (piece[-1] in _LABEL_OF or _EDGES.search(piece)):
            mark = _LABEL_OF.get(piece[-1], 0)
            bare = _EDGES.sub("", piece) if not mark else piece[:-1]
            if mark and not (label == 0 and piece[-1] == "." and bare in _ABBREVIATIONS):
                label = label or mark
            piece = bare
        if re.search(r"\w", piece):
            words.append(piece)
            labels.append(label)
    return words, labels


def punctuation_rows(texts: Iterable[str], max_words: int = MAX_WORDS) -> list[dict[str, list]]:
    """Rows of up to `max_words` words, cut one after another from each text, with `tokens` and `label`.

    The last word of each text is left out: that texts end with a full stop would give it away. Rows of fewer than 8
    words, and rows in which more than a fifth of the words look like code, are dropped.
    """
    rows = []
    for text in texts:
        words, labels = punctuated_words(text)
        for start in range(0, len(words) - 1, max_words):
            stop = min(start + max_words, len(words) - 1)
            row = words[start:stop]
            code = sum(_PROSE.match(word) is None for word in row)
            if len(row) >= MIN_WORDS and code <= MAX_CODE * len(row):
                rows.append({"tokens": row, "label": labels[start:stop]})
    return rows


def load_embedded_tokens(
    labelled_rows: int | None = 200,
    seed: int = 0,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    root: str | None = None,
) -> TokenData:
    """The default task: put the punctuation back into the documentation of the standard library. No network is used.

    A fifth of the documents is the test part; the others are halved into A and B. The teacher learns from A with its
    labels; the student has the labels of `labelled_rows` rows of A, and of B the words only. Rows of one document lie in
    one part; near-duplicates among documents are not grouped. Documents with doctest lines (`>>>`) are left out.

    Args:
        labelled_rows: how many rows the student has labels for; `None` gives it and its teacher every label.
        seed: of the split, not of any training.
        max_train_samples: rows of each training split that are used.
        max_eval_samples: rows of the test split that are used.
        root: as in [`load_stdlib_docs`].

    Raises:
        ValueError: when `labelled_rows` does not fit into A, and as [`load_stdlib_docs`] does.
    """
    texts = [text for text in load_stdlib_docs(root, mask_module=False)["text"] if ">>>" not in text]
    random.Random(seed).shuffle(texts)
    test, rest = texts[: len(texts) // 5], texts[len(texts) // 5 :]
    a, b, held_out = (punctuation_rows(part) for part in (rest[::2], rest[1::2], test))
    random.Random(seed).shuffle(a)
    if labelled_rows is not None and not 1 <= labelled_rows <= len(a):
        raise ValueError(
            f"labelled_rows={labelled_rows} rows cannot be drawn from the teacher's {len(a)}. Choose between 1 and {len(a)}, or None for "
            "every label."
        )
    if labelled_rows is None:
        a, b = [*a, *b], []
    hidden = [{**row, "label": [MISSING] * len(row["label"])} for row in b]
    texts = [" ".join(row["tokens"]) for row in [*a, *b]]
    return TokenData(
        first_rows(_dataset(a), max_train_samples),
        first_rows(_dataset(a[:labelled_rows]), max_train_samples),
        first_rows(_dataset(hidden), max_train_samples),
        {"test": first_rows(_dataset(held_out), max_eval_samples)},
        ("tokens",),
        list(PUNCTUATION_LABELS),
        [*texts, *load_topics_paragraphs()],
        "punctuation of the docstrings of the Python standard library (embedded, no network)",
        True,
    )


def _dataset(rows: list[dict]):
    from datasets import Dataset, Features, List, Value

    features = Features({"tokens": List(Value("string")), "label": List(Value("int64"))})
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


def load_named_tokens(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    files: dict[str, str] | None = None,
    text_column_name: str | None = None,
    label_column_name: str | None = None,
    task_name: str = "ner",
    labelled_rows: int | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
    cache_dir: str | None = None,
) -> TokenData:
    """A Hub data set or local json or parquet files with a list of words and a list of labels in each row, as `conll2003` has.

    Args:
        files: split name (`train`, `validation`, `test`) -> file. All files must have one suffix.
        text_column_name: the words. Default: `tokens`, else the first column.
        label_column_name: the labels, as names or as ids. Default: `{task_name}_tags`, else the second column, as in `run_ner.py`.
        labelled_rows: the student sees labels of that many training rows; the others become transfer text.

    Raises:
        ValueError: when the data cannot be found or reached, columns are missing or hold no lists of one length, or the
            evaluation data has labels that the training data lacks.
    """
    raw = load_raw(dataset_name, dataset_config_name, files, cache_dir, _LIST_KINDS)
    train, evaluation = train_and_evaluation(raw, max_train_samples, max_eval_samples)
    columns = train.column_names
    words = text_column_name or ("tokens" if "tokens" in columns else columns[0])
    usual = f"{task_name}_tags"
    label = label_column_name or (usual if usual in columns else next((name for name in columns[1:] if name != words), None))
    for name, flag in ((words, "text"), (label, "label")):
        if name not in columns:
            raise ValueError(f"The training data has no column {name!r}, only {columns}. Pass --{flag}_column_name.")
        if not hasattr(train.features[name], "feature"):
            raise ValueError(
                f"Column {name!r} holds {train.features[name]}, not lists: token classification needs a list of words and a list of as "
                f"many labels in each row. Pass --{flag}_column_name, or split the text into words first."
            )
    train, evaluation = with_label_column(train, evaluation, (words,), label)
    for name, split in {"train": train, **evaluation}.items():
        for i, (own, tags) in enumerate(zip(split[words], split["label"])):
            if len(own) != len(tags):
                raise ValueError(
                    f"Row {i} of the {name} data has {len(own)} words and {len(tags)} labels: it cannot be told which label belongs to "
                    "which word. Correct it, or drop it."
                )
    train, evaluation, names = encode_tags(train, evaluation)
    labelled, transfer = train, train.select([])
    if labelled_rows is not None and labelled_rows < len(train):
        labelled, transfer = hide_labels(train, labelled_rows, lambda label: [MISSING] * len(label), seed)
    texts = [" ".join(row) for row in train[words]]
    return TokenData(train, labelled, transfer, evaluation, (words,), names, texts, dataset_name or ", ".join(sorted(files or {})))


def encode_tags(train, evaluation: dict[str, Any]):
    """Label ids 0..n-1 and their names: those of a `ClassLabel` in its order, others sorted, as in `run_ner.py`; -100 stays.

    Raises:
        ValueError: for labels that only the evaluation data has.
    """
    feature = train.features["label"].feature
    if hasattr(feature, "names"):
        return train, evaluation, list(feature.names)
    values = sorted({tag for row in train["label"] for tag in row} - {MISSING})
    unknown = sorted({tag for split in evaluation.values() for row in split["label"] for tag in row} - {*values, MISSING}, key=str)
    if unknown:
        raise ValueError(f"The evaluation data has labels that the training data lacks: {unknown[:5]}. Correct the split.")
    number = {value: i for i, value in enumerate(values)} | {MISSING: MISSING}

    def encode(split):
        return relabel(split, [[number[tag] for tag in row] for row in split["label"]])

    names = [value if isinstance(value, str) else f"LABEL_{value}" for value in values]
    return encode(train), {name: encode(split) for name, split in evaluation.items()}, names


def begin_to_inside(label_names: list[str]) -> list[int]:
    """For each label the number of that which goes on with the same entity: `I-PER` for `B-PER`, itself for others."""
    return [
        label_names.index(f"I-{name[2:]}") if name.startswith("B-") and f"I-{name[2:]}" in label_names else i
        for i, name in enumerate(label_names)
    ]


def reads_words_apart(tokenizer) -> bool:
    """Whether words in a list become the same tokens as in running text; byte-level tokenizers need `add_prefix_space` for that.

    Example:
        >>> from hfdistill import train_wordpiece
        >>> reads_words_apart(train_wordpiece(["to be or not to be"], vocab_size=40))
        True
    """
    return tokenizer(["a", "a"], is_split_into_words=True)["input_ids"] == tokenizer("a a")["input_ids"]


def encode_tokens(
    split,
    tokenizer,
    words: str,
    max_seq_length: int | None = None,
    label_names: list[str] | None = None,
    label_all_tokens: bool = False,
    pad_to_max_length: bool = False,
    num_proc: int | None = None,
):
    """Tokenised rows with `labels` and `target_mask`; all other columns are dropped. Padding is left to [`TokenCollator`].

    The label of a word goes to its first sub-token; the others, and special tokens, have -100. `target_mask` is 1 at the
    same positions, and stays so where labels are hidden: that is where a teacher is listened to.

    Args:
        split: with the column `words` and `label`.
        words: name of the column of words.
        max_seq_length: tokens per row; words behind it are cut off, and are neither learnt nor measured.
        label_names: in order of the ids; needed for `label_all_tokens`, where `B-` becomes `I-` inside a word.
        label_all_tokens: every sub-token has its word's label, and is a target.

    Raises:
        ValueError: for a tokenizer that does not tell words apart.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell which sub-tokens belong to which word, so labels cannot be placed. Use a "
            "fast tokenizer."
        )
    if not reads_words_apart(tokenizer):
        raise ValueError(
            f"{type(tokenizer).__name__} reads the words of a list as pieces of one word, as no space stands before them. Load it with "
            "AutoTokenizer.from_pretrained(..., add_prefix_space=True)."
        )
    inside = begin_to_inside(label_names) if label_all_tokens and label_names else None

    def encode(rows):
        encoded = tokenizer(
            rows[words],
            is_split_into_words=True,
            truncation=True,
            max_length=max_seq_length,
            padding="max_length" if pad_to_max_length else False,
        )
        labels, marks = [], []
        for i, tags in enumerate(rows["label"]):
            numbers = encoded.word_ids(i)
            first = [word is not None and (k == 0 or numbers[k - 1] != word) for k, word in enumerate(numbers)]
            chosen = [word is not None and (label_all_tokens or first[k]) for k, word in enumerate(numbers)]
            own = [tags[word] if here else MISSING for word, here in zip(numbers, chosen)]
            if inside is not None:
                own = [tag if starts or tag == MISSING else inside[tag] for tag, starts in zip(own, first)]
            labels.append(own)
            marks.append([int(here) for here in chosen])
        return {**encoded, "labels": labels, "target_mask": marks}

    return split.map(encode, batched=True, num_proc=num_proc, remove_columns=split.column_names, desc="Tokenizing")
