"""Corpora from Python itself, from files and as streams; rows that lose no token and know their number."""

from __future__ import annotations

import csv
import itertools
import json

import numpy as np
import pytest
from datasets import Dataset, load_dataset
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from hfdistill import MaskingCollator, encode_corpus, load_corpus, load_embedded_corpus, load_stdlib_docs, train_byte_level, train_wordpiece
from hfdistill.data.rows import special_frame
from hfdistill.data.stdlib_docs import load_topics_paragraphs


def documents(count: int = 40, seed: int = 0) -> list[str]:
    g = np.random.default_rng(seed)
    words = "to be or not that is the question whether tis nobler in mind suffer slings and arrows".split()
    return [f"{i} " + " ".join(g.choice(words, size=g.integers(1, 40))) for i in range(count)]


TOKENIZERS = {
    "bert": lambda: train_wordpiece(documents(), vocab_size=80),
    "roberta": lambda: train_byte_level(documents(), vocab_size=280),
    "gpt2": lambda: train_byte_level(documents(), vocab_size=280, kind="gpt2"),
}


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def wordpiece():
    return TOKENIZERS["bert"]()


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ---- The embedded corpus ----


@pytest.fixture(scope="module")
def sources():
    """The documentation strings, read once: parsing the standard library takes seconds."""
    docs = load_stdlib_docs(mask_module=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hfdistill.data.corpus.load_stdlib_docs", lambda mask_module: docs if not mask_module else None)
        yield docs["text"][:]


@pytest.fixture(scope="module")
def embedded(sources):
    return load_embedded_corpus()


def test_embedded_corpus_is_every_document_once(embedded, sources):
    train, held_out = embedded.train["text"][:], embedded.held_out["text"][:]
    expected = [*sources, *load_topics_paragraphs()]
    assert sorted([*train, *held_out]) == sorted(expected) and 5000 < len(expected) < 7000
    assert len(held_out) == round(0.1 * len(expected)) and not set(train) & set(held_out)
    assert [*train, *held_out] != expected  # shuffled: else only the last source would be held out
    assert embedded.embedded and not embedded.streaming


def test_the_seed_decides_the_cut(embedded):
    again = load_embedded_corpus()
    assert again.fingerprint() == embedded.fingerprint() and again.train["text"][:] == embedded.train["text"][:]
    other = load_embedded_corpus(seed=1, held_out=0.2)
    assert other.fingerprint() != embedded.fingerprint() and len(other.held_out) == round(0.2 * (len(other.train) + len(other.held_out)))
    with pytest.raises(ValueError, match="leaves 0 to measure with"):
        load_embedded_corpus(held_out=0.0)


# ---- Files and streams ----


def write(folder, kind: str, texts: list[str], name: str = "a") -> str:
    path = folder / f"{name}.{kind}"
    if kind == "txt":
        path.write_text("\n".join(texts) + "\n\n")  # an empty line is no document
    elif kind == "csv":
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([["number", "text"], *([i, text] for i, text in enumerate(texts))])
    elif kind == "parquet":
        load_dataset("json", data_files=write(folder, "jsonl", texts, "other"), split="train").to_parquet(path)
    else:
        path.write_text("".join(json.dumps({"text": text, "more": 1}) + "\n" for text in texts))
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "parquet"])
def test_files_of_every_kind(tmp_path, kind, streaming):
    files = {"train": write(tmp_path, kind, documents()), "validation": write(tmp_path, kind, documents(7, seed=1), "b")}
    corpus = load_corpus(files=files, streaming=streaming, cache_dir=str(tmp_path / "cache"))
    assert [row["text"] for row in corpus.train] == documents() and corpus.held_out["text"][:] == documents(7, seed=1)
    assert corpus.streaming == streaming and corpus.description == f"a.{kind}, b.{kind}"
    limited = load_corpus(
        files=files, streaming=streaming, max_train_documents=5, max_held_out_documents=2, cache_dir=str(tmp_path / "cache")
    )
    assert [row["text"] for row in limited.train] == documents()[:5] == limited.sample() and len(limited.held_out) == 2


def test_held_out_part_of_a_single_file(tmp_path):
    file = write(tmp_path, "txt", documents())
    corpus = load_corpus(files={"train": file}, held_out=0.25, cache_dir=str(tmp_path / "cache"))
    train, held_out = corpus.train["text"][:], corpus.held_out["text"][:]
    assert len(held_out) == 10 and sorted([*train, *held_out]) == sorted(documents()) and [*train, *held_out] != documents()
    stream = load_corpus(files={"train": file}, held_out=10, streaming=True)
    assert stream.held_out["text"][:] == documents()[:10] and [row["text"] for row in stream.train] == documents()[10:]
    assert len(load_corpus(files={"train": file}, held_out=10, streaming=True, max_held_out_documents=4).held_out) == 4
    with pytest.raises(ValueError, match="is a share, but the length of a stream is not known"):
        load_corpus(files={"train": file}, streaming=True)


def test_paragraphs_and_several_files(tmp_path):
    (tmp_path / "a.txt").write_text("first\nstill first\n\nsecond")
    (tmp_path / "b.txt").write_text("third\n\nfourth\n")
    files = {"train": [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], "validation": str(tmp_path / "a.txt")}
    corpus = load_corpus(files=files, sample_by="paragraph", cache_dir=str(tmp_path / "cache"))
    assert [text.split() for text in corpus.train["text"]] == [["first", "still", "first"], ["second"], ["third"], ["fourth"]]


def test_data_sets_are_joined_or_mixed(monkeypatch):
    def named(name, streaming, cache_dir):
        data = Dataset.from_dict({"text": [f"{name} {i}" for i in range(40)], "more": range(40)})
        return {"train": data.to_iterable_dataset() if streaming else data, **({"test": data} if name == "b" else {})}

    monkeypatch.setattr("hfdistill.data.corpus._load_named", named)
    joined = load_corpus(["a", "c"], held_out=8)
    texts = {f"{name} {i}" for name in "ac" for i in range(40)}
    assert {*joined.train["text"], *joined.held_out["text"]} == texts and len(joined.held_out) == 8 and joined.description == "a, c"
    assert load_corpus(["a", "b"], held_out=8).held_out["text"][:] == [f"b {i}" for i in range(40)]  # the first that has such a part
    for streaming in (False, True):
        mixed = load_corpus(["b", "a"], probabilities=[0.8, 0.2], streaming=streaming)
        kinds = [row["text"][0] for row in mixed.train]
        assert 40 < len(kinds) < 80 and 0.6 < kinds.count("b") / len(kinds) < 0.95 and "a" in kinds[:20]
        assert len(mixed.held_out) == 40  # the test part of the one that has it
    for wrong in ([0.5], [0.5, 0.6]):
        with pytest.raises(ValueError, match="with a sum of 1"):
            load_corpus(["a", "b"], probabilities=wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Give either dataset_names or files"),
        ({"dataset_names": ["nobody/nothing:main"]}, "'nobody/nothing:main' could not be loaded from the Hub"),
        ({"files": {"train": "a.txt", "validation": "b.csv"}}, "must all be of one kind"),
        ({"files": {"train": "a.docx"}}, "must all be of one kind"),
        ({"files": {"train": "missing.txt"}}, "does not exist"),
        ({"files": {"train": "here.txt"}, "text_column": "body"}, "no column 'body', only"),
        ({"files": {"train": "here.txt"}, "sample_by": "page"}, "sample_by must be"),
        ({"files": {"validation": "here.txt"}}, "no 'train' split"),
        ({"files": {"train": "here.txt", "validation": "empty.txt"}}, "no document to measure with"),
    ],
)
def test_what_is_no_corpus_is_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "txt", documents(), "here")
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match=message):
        load_corpus(**options, cache_dir=str(tmp_path / "cache"))


# ---- Rows ----


def test_packing_loses_no_token(tokenizer):
    data = encode_corpus(documents(), tokenizer, 24)
    begin, end = special_frame(tokenizer)
    separator = end[-1:] or [tokenizer.eos_token_id]
    expected = [token for text in documents() for token in [*plain(tokenizer, text), *separator]]
    content = []
    for row in data["input_ids"]:
        assert row[: len(begin)] == begin and row[len(row) - len(end) :] == end
        content += row[len(begin) : len(row) - len(end)]
    assert content == expected[: len(content)] and set(expected[len(content) :]) <= set(separator)
    assert {len(row) for row in data["input_ids"][:-1]} == {24} and len(data["input_ids"][-1]) <= 24
    assert data["example_id"][:] == list(range(len(data))) and set(data.column_names) == {"input_ids", "example_id"}


def test_frames_are_those_of_the_tokenizer(tokenizer):
    begin, end = special_frame(tokenizer)
    assert tokenizer("to be")["input_ids"] == [*begin, *plain(tokenizer, "to be"), *end]
    assert bool(begin) == bool(end) == (tokenizer.mask_token is not None)


def test_one_document_a_row_in_pieces(tokenizer):
    data = encode_corpus(documents(), tokenizer, 24, packing=False, min_row_tokens=1, max_unknown=1.1)
    begin, end = special_frame(tokenizer)
    tail = [] if end else [tokenizer.eos_token_id]
    room = 24 - len(begin) - len(end)
    expected = []
    for text in documents():
        ids = [*plain(tokenizer, text), *tail]
        expected += [[*begin, *ids[i : i + room], *end] for i in range(0, len(ids), room)]
    assert data["input_ids"][:] == expected and max(map(len, expected)) == 24
    assert data["length"][:] == [len(row) for row in expected] and data["example_id"][:] == list(range(len(expected)))


def test_distilberts_filters(wordpiece):
    # [CLS] ... [SEP] count: 9 words make 11 tokens, which is too short; 5 of 12 unknown are too few to drop, 6 of 12 are enough.
    word = next(word for word in documents()[0].split() if len(wordpiece.tokenize(word)) == 1)
    nine, ten = " ".join([word] * 9), " ".join([word] * 10)
    five, six = " ".join(["漢"] * 5 + [word] * 5), " ".join(["漢"] * 6 + [word] * 4)
    assert wordpiece.tokenize("漢") == ["[UNK]"]
    texts = [nine, ten, five, six]
    kept = encode_corpus(texts, wordpiece, 64, packing=False)
    assert kept["input_ids"][:] == [wordpiece(text)["input_ids"] for text in (ten, five)] and kept["example_id"][:] == [0, 1]
    assert len(encode_corpus(texts, wordpiece, 64, packing=False, min_row_tokens=1, max_unknown=1.1)) == 4
    with pytest.raises(ValueError, match="No row is left"):
        encode_corpus([nine], wordpiece, 64, packing=False)


def test_gpt2_end_of_text_is_not_counted_as_unknown():
    tokenizer = TOKENIZERS["gpt2"]()  # its unk is its eos
    data = encode_corpus(["to"], tokenizer, 16, packing=False, min_row_tokens=1)
    assert data["input_ids"][0] == [*plain(tokenizer, "to"), tokenizer.eos_token_id]
    assert len(encode_corpus(["to"], tokenizer, 16, packing=False, min_row_tokens=1, max_unknown=0.1)) == 1


def test_words_end_with_their_document(wordpiece):
    data = encode_corpus(documents(), wordpiece, 16, whole_word=True)
    assert len(data) > 20
    for ids, words in zip(data["input_ids"], data["word_ids"], strict=True):
        tokens = wordpiece.convert_ids_to_tokens(ids)
        assert [word == -1 for word in words] == [token in ("[CLS]", "[SEP]") for token in tokens]


@pytest.mark.parametrize(
    ("options", "message"), [({"max_seq_length": 3}, "leaves no room"), ({"min_row_tokens": 129, "packing": False}, "No row is left")]
)
def test_impossible_rows_are_refused(wordpiece, options, message):
    with pytest.raises(ValueError, match=message):
        encode_corpus(documents(), wordpiece, **options)


def test_packing_needs_an_end(tmp_path):
    tokenizer = TOKENIZERS["gpt2"]()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no token that ends a text"):
        encode_corpus(documents(), tokenizer, 16)


# ---- Streams of rows ----


@pytest.mark.parametrize("packing", [True, False])
def test_a_stream_has_the_rows_of_the_data_set(wordpiece, tmp_path, packing):
    options = dict(packing=packing, whole_word=True)
    memory = encode_corpus(documents(), wordpiece, 24, **options)
    lazy = load_dataset("text", data_files=write(tmp_path, "txt", documents()), split="train", streaming=True).filter(
        lambda row: row["text"]
    )
    stream = encode_corpus(lazy, wordpiece, 24, streaming=True, shuffle_buffer=1, **options)
    count = len(memory) - 1  # a stream goes on where the data set ends with a short row
    assert list(itertools.islice(stream, count)) == [memory[i] for i in range(count)]


def test_a_stream_never_ends_and_counts_on(wordpiece):
    stream = encode_corpus(documents(), wordpiece, 24, packing=False, streaming=True, shuffle_buffer=1)
    once = len(encode_corpus(documents(), wordpiece, 24, packing=False))
    rows = list(itertools.islice(stream, 2 * once + 1))
    assert [row["example_id"] for row in rows] == list(range(2 * once + 1))
    assert [row["input_ids"] for row in rows[once : 2 * once]] == [row["input_ids"] for row in rows[:once]]
    collator = MaskingCollator(wordpiece)
    first, second = (collator([rows[i]])["labels"].tolist() for i in (0, once))
    assert first != second  # the second pass has masks of its own


def test_a_stream_without_rows_ends_with_an_error(wordpiece):
    for packing in (True, False):
        with pytest.raises(ValueError, match="gave no row"):
            next(iter(encode_corpus([""], wordpiece, 24, packing=packing, streaming=True, shuffle_buffer=1)))


def test_the_shuffle_buffer_shuffles_by_seed_and_a_resumed_stream_has_the_same_rows(wordpiece):
    def first(seed, buffer=16):
        stream = encode_corpus(documents(), wordpiece, 24, streaming=True, shuffle_buffer=buffer, seed=seed)
        return [(row["example_id"], row["input_ids"]) for row in itertools.islice(stream, 40)]

    order = [number for number, _ in first(0)]
    assert order != sorted(order) and len(set(order)) == 40
    assert first(0) == first(0) != first(1)
    by_number = dict(first(0, buffer=1))
    assert all(by_number.get(number, ids) == ids for number, ids in first(0))


def test_workers_leave_nothing_out(wordpiece, tmp_path):
    """Inside a worker, a stream of several files gives a part of them only, unless it is asked the right way."""
    files = [write(tmp_path, "txt", documents()[:20], "a"), write(tmp_path, "txt", documents()[20:], "b")]
    lazy = load_dataset("text", data_files=files, split="train", streaming=True).filter(lambda row: row["text"])
    stream = encode_corpus(lazy, wordpiece, 24, streaming=True, shuffle_buffer=1)
    loader = DataLoader(stream, batch_size=1, num_workers=2, collate_fn=lambda rows: rows[0])
    memory = encode_corpus(documents(), wordpiece, 24)
    seen = list(itertools.islice(loader, len(memory) - 1))
    assert [row["example_id"] for row in seen] == list(range(len(memory) - 1))
    assert [row["input_ids"] for row in seen] == memory["input_ids"][:-1]


# ---- Byte-level tokenizers ----


@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_byte_level_tokenizers(tmp_path, kind):
    tokenizer = train_byte_level(documents(), vocab_size=290, kind=kind)
    again = train_byte_level(documents(), vocab_size=290, kind=kind)
    assert tokenizer.get_vocab() == again.get_vocab() and len(tokenizer) == 290
    text = "To be, or 漢字?\n  Two spaces"
    assert tokenizer.decode(plain(tokenizer, text)) == text  # bytes: nothing is unknown
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(tokenizer) and loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    if kind == "roberta":
        assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]  # as RobertaConfig has them


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kind": "t5"}, "kind must be one of"), ({"vocab_size": 200}, "Use at least 261"), ({"texts": [""]}, "no text")],
)
def test_byte_level_tokenizers_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        train_byte_level(**{"texts": documents(), **options})
