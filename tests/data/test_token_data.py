"""Token classification data: the embedded task, files as run_ner.py reads them, labels on first sub-tokens."""

import json
import re

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import BertConfig

from hfdistill import encode_tokens, load_embedded_tokens, load_named_tokens, match_labels, reads_words_apart, train_wordpiece
from hfdistill.data.byte_level import train_byte_level
from hfdistill.data.token_data import PUNCTUATION_LABELS, punctuated_words, punctuation_rows


NAMES = [PUNCTUATION_LABELS.index(name) for name in ("O", "COMMA", "PERIOD", "COLON")]
NONE, COMMA, PERIOD, COLON = NAMES


@pytest.mark.parametrize(
    "text,expected",
    [
        ("Open a file, read it.", [("open", NONE), ("a", NONE), ("file", COMMA), ("read", NONE), ("it", PERIOD)]),
        ("Why? Stop! Note: x; y", [("why", PERIOD), ("stop", PERIOD), ("note", COLON), ("x", COLON), ("y", NONE)]),
        ('(see "below"), then', [("see", NONE), ("below", COMMA), ("then", NONE)]),
        ('The "end." Of [it.]', [("the", NONE), ("end", PERIOD), ("of", NONE), ("it", PERIOD)]),
        ("e.g. this, i.e., that vs. me", [("e.g", NONE), ("this", COMMA), ("i.e", COMMA), ("that", NONE), ("vs", NONE), ("me", NONE)]),
        ("a -- b - c ... d", [("a", NONE), ("b", NONE), ("c", NONE), ("d", NONE)]),
        ("call run(), os.path. *args*, don't", [("call", NONE), ("run", COMMA), ("os.path", PERIOD), ("args", COMMA), ("don't", NONE)]),
        ("wait... what", [("wait", PERIOD), ("what", NONE)]),
        ("version 3.12: new", [("version", NONE), ("3.12", COLON), ("new", NONE)]),
    ],
)
def test_words_and_the_mark_that_follows_each(text, expected):
    assert list(zip(*punctuated_words(text), strict=True)) == expected


def test_rows():
    words = " ".join(f"word{'abcdefghij'[i]}{'abcdefghij'[i % 7]}" for i in range(10)) + ", last."
    (row,) = punctuation_rows([words])
    assert len(row["tokens"]) == 10 and row["label"] == [NONE] * 9 + [COMMA]  # what ends the text is not asked
    assert [len(row["tokens"]) for row in punctuation_rows([" ".join(["word"] * 60)], max_words=25)] == [25, 25, 9]
    assert punctuation_rows([" ".join(["word"] * 8)]) == []  # seven words are left
    code = "x=1 y=2 z[0] word word word word word word end"
    assert punctuation_rows([code]) == []  # three of nine
    assert len(punctuation_rows([code.replace("x=1 y=2", "word word")])) == 1


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """60 documents of 26 words with a comma behind the tenth, one with a doctest, and one that is code."""
    root = tmp_path_factory.mktemp("library")
    name = "abcdefghijklmnopqrstuvwxyz"
    documents = []
    for i in range(60):
        words = [f"w{name[i % 26]}{name[i // 26]}{letter}" for letter in name]
        words[9] += ","
        documents.append(" ".join(words) + ".")
    documents += ["Doctest of a text with many words in it, and so on: >>> f(1) 1", "a=1 b=2 c=3 d=4 e=5 f=6 g=7 h=8 i=9 j=0"]
    body = "\n".join(f'def f{i}():\n    """{text}"""\n' for i, text in enumerate(documents))
    (root / "json.py").write_text(body)
    return str(root)


def test_the_embedded_task(library):
    data = load_embedded_tokens(7, root=library)
    rows = {"teacher": data.teacher_train, "transfer": data.transfer, "test": data.evaluation["test"]}
    documents = {name: {row["tokens"][0][:3] for row in split} for name, split in rows.items()}
    assert {name: len(own) for name, own in documents.items()} == {"teacher": 24, "transfer": 24, "test": 12}
    assert len(set.union(*documents.values())) == 60  # no document lies in two parts
    for split in (data.teacher_train, data.evaluation["test"], data.labelled):
        assert all(row["label"] == [NONE] * 9 + [COMMA] + [NONE] * 15 for row in split)
    assert data.labelled["tokens"][:] == data.teacher_train["tokens"][:7]
    assert {label for row in data.transfer["label"] for label in row} == {-100}
    assert all(len(row["tokens"]) == len(row["label"]) for row in data.transfer)
    text = " ".join(data.vocabulary_texts[:48])
    assert not any(re.search(rf"\b{prefix}", text) for prefix in documents["test"]) and data.embedded

    again, other = load_embedded_tokens(7, root=library), load_embedded_tokens(7, seed=1, root=library)
    assert again.fingerprint() == data.fingerprint() != other.fingerprint()
    short = load_embedded_tokens(7, max_train_samples=3, max_eval_samples=2, root=library)
    assert [len(s) for s in (short.teacher_train, short.labelled, short.transfer, short.evaluation["test"])] == [3, 3, 3, 2]
    every = load_embedded_tokens(None, root=library)
    assert len(every.teacher_train) == len(every.labelled) == 48 and len(every.transfer) == 0
    with pytest.raises(ValueError, match="labelled_rows=25 rows cannot be drawn from the teacher's 24"):
        load_embedded_tokens(25, root=library)


def test_the_real_library():
    """Every Python has enough of it: shares and sizes of 3.11, with room for other versions."""
    data = load_embedded_tokens()
    assert len(data.teacher_train) == pytest.approx(2250, rel=0.15) and len(data.labelled) == 200
    labels = [label for row in data.teacher_train["label"] for label in row]
    assert [labels.count(i) / len(labels) for i in range(4)] == pytest.approx([0.89, 0.044, 0.05, 0.014], abs=0.015)
    assert all(8 <= len(row) <= 40 for row in data.teacher_train["tokens"])
    words = [word for row in data.teacher_train["tokens"] for word in row]
    assert not any(word != word.lower() or word[-1] in ",.;:?!\"')(" for word in words)


CONLL = [
    (["EU", "rejects", "German", "call"], ["B-ORG", "O", "B-MISC", "O"]),
    (["Peter", "Blackburn"], ["B-PER", "I-PER"]),
    (["BRUSSELS", "1996-08-22"], ["B-LOC", "O"]),
    ([], []),
]


def write(path, rows, words="tokens", label="ner_tags"):
    path.write_text("".join(json.dumps({"id": str(i), words: own, label: tags}) + "\n" for i, (own, tags) in enumerate(rows)))
    return str(path)


def test_local_files(tmp_path):
    files = {"train": write(tmp_path / "a.jsonl", CONLL), "validation": write(tmp_path / "b.jsonl", CONLL[:2])}
    data = load_named_tokens(files=files, labelled_rows=2)
    assert data.label_names == ["B-LOC", "B-MISC", "B-ORG", "B-PER", "I-PER", "O"]  # sorted, as run_ner.py numbers them
    assert data.teacher_train["label"][:] == [[2, 5, 1, 5], [3, 4], [0, 5], []]
    assert data.evaluation["validation"]["label"][:] == [[2, 5, 1, 5], [3, 4]]
    assert len(data.labelled) == len(data.transfer) == 2 and data.words == "tokens"
    assert all(set(label) <= {-100} for label in data.transfer["label"])
    shown = {tuple(row["tokens"]): row["label"] for row in data.teacher_train}
    assert all(shown[tuple(row["tokens"])] == row["label"] for row in data.labelled)
    assert "Peter Blackburn" in data.vocabulary_texts

    numbered = [(words, [i % 3 for i, _ in enumerate(words)]) for words, _ in CONLL]
    path = write(tmp_path / "c.json", numbered, "words", "pos_tags")
    data = load_named_tokens(files={"train": path, "validation": path}, text_column_name="words", task_name="pos")
    assert data.label_names == ["LABEL_0", "LABEL_1", "LABEL_2"] and data.teacher_train["label"][0] == [0, 1, 2, 0]


def test_class_labels_keep_their_order(tmp_path):
    names = ["O", "B-PER", "I-PER"]
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=names))})
    path = str(tmp_path / "a.parquet")
    Dataset.from_dict({"tokens": [["Peter", "Blackburn", "won"]] * 4, "ner_tags": [[1, 2, 0]] * 4}, features=features).to_parquet(path)
    data = load_named_tokens(files={"train": path, "test": path}, labelled_rows=2)
    assert data.label_names == names and data.evaluation["test"]["label"][0] == [1, 2, 0] and data.transfer["label"][0] == [-100] * 3


@pytest.mark.parametrize(
    "change,flags,message",
    [
        (lambda words, tags: (words, tags[:-1] or ["O"] * 3), {}, "Row 0 of the train data has 4 words and 3 labels"),
        (lambda words, tags: (" ".join(words), tags), {}, "'tokens' holds Value.*, not lists"),
        (lambda words, tags: (words, tags), {"label_column_name": "tags"}, "no column 'tags', only .*--label_column_name"),
        (lambda words, tags: (words, tags), {"text_column_name": "text"}, "no column 'text', only .*--text_column_name"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, change, flags, message):
    path = write(tmp_path / "a.jsonl", [change(*row) for row in CONLL[:3]])
    with pytest.raises(ValueError, match=message):
        load_named_tokens(files={"train": path, "validation": path}, **flags)


def test_labels_of_the_evaluation_data_only_are_refused(tmp_path):
    files = {"train": write(tmp_path / "a.jsonl", CONLL[1:]), "validation": write(tmp_path / "b.jsonl", CONLL)}
    with pytest.raises(ValueError, match=r"lacks: \['B-MISC', 'B-ORG'\]"):
        load_named_tokens(files=files)
    with pytest.raises(ValueError, match="must all be json, jsonl or parquet"):
        load_named_tokens(files={"train": str(tmp_path / "a.csv")})


def test_labels_follow_a_teacher_of_another_order(tmp_path):
    path = write(tmp_path / "a.jsonl", CONLL[:2] * 2)
    data = load_named_tokens(files={"train": path, "validation": path}, labelled_rows=2)
    theirs = ["O", "B-per", "I-per", "B-misc", "B-org"]
    matched = match_labels(data, BertConfig(id2label=dict(enumerate(theirs))))
    assert matched.label_names == theirs and type(matched) is type(data)
    assert matched.evaluation["validation"]["label"][:2] == [[4, 0, 3, 0], [1, 2]]
    assert all(set(label) == {-100} for label in matched.transfer["label"])
    with pytest.raises(ValueError, match="could not be told right from wrong"):
        match_labels(data, BertConfig(id2label=dict(enumerate(["O", "B-X", "C", "D", "E"]))))


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(["peterwon blackburn peter black burn won"] * 3, vocab_size=36)


def test_labels_go_to_first_sub_tokens(tokenizer):
    names = ["O", "B-PER", "I-PER"]
    rows = Dataset.from_dict({"tokens": [["peterwon", "blackburn"], ["won"]], "label": [[1, 2], [-100]], "id": [0, 1]})
    pieces = [tokenizer.tokenize(word) for word in ("peterwon", "blackburn")]
    assert len(pieces[0]) > 1 and len(pieces[1]) > 1
    begin = [1, 1 + len(pieces[0])]
    length = 2 + sum(map(len, pieces))

    encoded = encode_tokens(rows, tokenizer, "tokens", label_names=names)
    assert set(encoded.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels", "target_mask"}
    assert encoded[0]["labels"] == [{begin[0]: 1, begin[1]: 2}.get(i, -100) for i in range(length)]
    assert encoded[0]["target_mask"] == [int(i in begin) for i in range(length)]
    # A hidden label: nothing to learn from, but the teacher is heard where the word begins.
    assert encoded[1]["labels"] == [-100] * len(encoded[1]["labels"]) and sum(encoded[1]["target_mask"]) == 1

    every = encode_tokens(rows, tokenizer, "tokens", label_names=names, label_all_tokens=True)
    inside = [1, *[2] * (len(pieces[0]) - 1), *[2] * len(pieces[1])]  # B-PER goes on as I-PER
    assert every[0]["labels"] == [-100, *inside, -100] and every[0]["target_mask"] == [0, *[1] * (length - 2), 0]
    assert set(every[1]["labels"]) == {-100}

    cut = encode_tokens(rows, tokenizer, "tokens", max_seq_length=len(pieces[0]) + 2)
    assert [label for label in cut[0]["labels"] if label != -100] == [1]
    padded = encode_tokens(rows, tokenizer, "tokens", 30, pad_to_max_length=True)[1]
    assert {len(padded[name]) for name in padded} == {30} and sum(padded["target_mask"]) == 1


def test_words_must_not_be_glued_together(tmp_path):
    rows = Dataset.from_dict({"tokens": [["return", "the"]], "label": [[0, 1]]})
    glued = train_byte_level(["return the value of the return"] * 5, vocab_size=280)
    assert not reads_words_apart(glued)
    with pytest.raises(ValueError, match="add_prefix_space=True"):
        encode_tokens(rows, glued, "tokens")
    glued.save_pretrained(tmp_path)
    apart = type(glued).from_pretrained(tmp_path, add_prefix_space=True)
    encoded = encode_tokens(rows, apart, "tokens")[0]
    assert encoded["input_ids"] == apart(" return the")["input_ids"] and [x for x in encoded["labels"] if x != -100] == [0, 1]
