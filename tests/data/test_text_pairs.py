"""Pairs for sentence embeddings: how docstrings are cut, that no test text is trained on, own data, and batches of pairs."""

import json

import pytest
import torch
from datasets import Dataset

from hfdistill import PairCollator, encode_pairs, encode_sentences, load_embedded_pairs, load_named_pairs, train_wordpiece
from hfdistill.data.stdlib_docs import load_topics_paragraphs
from hfdistill.data.text_pairs import docstring_pairs


@pytest.fixture(scope="module")
def data():
    return load_embedded_pairs()


@pytest.mark.parametrize(
    "text,pair",
    [
        ("Return the sum of numbers. An empty list has the sum 0.", ("Return the sum of numbers.", "An empty list has the sum 0.")),
        ("Is this the end of it? (No, it goes on like that.)", ("Is this the end of it?", "(No, it goes on like that.)")),
        ("A mapping, e.g. a dict, here. It is not changed in place.", ("A mapping, e.g. a dict, here.", "It is not changed in place.")),
        ("A mapping, e.g. a dict, here. It is not changed at all.", ("A mapping, e.g. a dict, here.", "It is not changed at all.")),
        ("Only one sentence without anything that follows it at all.", None),
        ("Too short. This part would be long enough on its own.", None),
        ("This part would be long enough. Not this.", None),
    ],
)
def test_first_sentence_and_rest(text, pair):
    assert docstring_pairs([text]) == ([] if pair is None else [pair])


def test_repeated_halves_are_dropped():
    first, other = "Return the sum of all numbers.", "An empty list has the sum 0."
    again = other.replace("0.", "0!").lower().capitalize()
    texts = [f"{first} {other}", f"{first} It never fails but with strings.", f"Return the product of the list. {again}"]
    assert docstring_pairs(texts) == [(first, other)]
    assert docstring_pairs([f"{first} {other}", f"{other} {first}"]) == [(first, other)]


def test_embedded_parts(data):
    pairs = list(zip(data.pairs["query"], data.pairs["document"]))
    test = data.evaluation["test"]
    held_out, paragraphs = {*test["query"], *test["document"]}, load_topics_paragraphs()
    transfer = data.transfer["text"][: -len(paragraphs)]
    assert data.embedded and list(data.evaluation) == ["test"] and "score" not in test.column_names
    total = len(test) + len(transfer) // 2
    assert total > 1000 and len(test) == round(total / 5) and len(pairs) == pytest.approx(0.4 * total, abs=1)
    assert len({*transfer}) == len(transfer)
    assert {text for pair in pairs for text in pair} < {*transfer}
    assert data.transfer["text"][-len(paragraphs) :] == paragraphs
    assert not held_out & {*data.transfer["text"]} and not held_out & {*data.vocabulary_texts}
    for query, document in pairs[:200]:
        assert query[-1] in ".!?" and min(len(query.split()), len(document.split())) >= 5


@pytest.fixture
def sources(tmp_path):
    """A standard library of forty functions."""
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()
    body = "".join(
        f'def f{i}():\n    """Return the {a} of every {b}. It is {b} before {a} and never fails."""\n'
        for i, (a, b) in enumerate((a, b) for a in words[:4] for b in words)
    )
    (tmp_path / "json.py").write_text(body)
    return tmp_path


def test_embedded_is_the_same_every_time(sources):
    data, again, other = (load_embedded_pairs(seed, root=sources) for seed in (0, 0, 1))
    few = load_embedded_pairs(max_train_samples=7, max_eval_samples=5, root=sources)
    assert again.fingerprint() == data.fingerprint() != other.fingerprint()
    assert [len(part) for part in (data.pairs, data.transfer, data.evaluation["test"])] == [16, 64 + len(load_topics_paragraphs()), 8]
    assert len(few.pairs) == len(few.transfer) == 7 and len(few.evaluation["test"]) == 5
    assert few.evaluation["test"]["query"][:] == data.evaluation["test"]["query"][:5]
    assert data.fingerprint() != few.fingerprint()


# ---- Own data ----


def write(folder, name, rows):
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    train = [{"text": f"text {i % 4}", "other": f"other {i}"} for i in range(6)]
    held_out = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "score": i} for i in range(4)]
    return {"train": write(tmp_path, "train.jsonl", train), "validation": write(tmp_path, "validation.jsonl", held_out)}


def test_texts_and_graded_pairs(files):
    data = load_named_pairs(files=files)
    assert data.transfer["text"][:] == ["text 0", "text 1", "text 2", "text 3"] and not len(data.pairs) and not data.embedded
    assert data.evaluation["validation"][2] == {"query": "a 2", "document": "b 2", "score": 2.0}
    assert data.vocabulary_texts == data.transfer["text"][:]


def test_pairs_are_pairs_only_where_that_is_said(files):
    options = {"files": files, "text_column_names": ["text", "other"], "evaluation_column_names": ["sentence1", "sentence2"]}
    assert not len(load_named_pairs(**options).pairs)
    data = load_named_pairs(**options, paired=True, max_train_samples=3)
    assert [tuple(row.values()) for row in data.pairs] == [("text 0", "other 0"), ("text 1", "other 1"), ("text 2", "other 2")]
    assert data.transfer["text"][:] == ["text 0", "text 1", "text 2", "other 0", "other 1", "other 2"]


def test_without_a_score_the_documents_are_searched(files, tmp_path):
    files["validation"] = write(tmp_path, "v.jsonl", [{"query": "a", "document": "b"}])
    assert load_named_pairs(files=files).evaluation["validation"].column_names == ["query", "document"]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"text_column_names": ["texts"]}, "training data has no column 'texts'.*--text_column_names"),
        ({"paired": True}, r"--paired true needs two text columns.*got \('text',\)"),
        ({"evaluation_column_names": ["sentence1"]}, "must have two text columns to compare"),
        ({"evaluation_column_names": ["sentence1", "c"]}, "validation data has no column 'c'.*--evaluation_column_names"),
        ({"score_column_name": "grade"}, "has no column 'grade'.*--score_column_name"),
        ({"files": {}}, "could not be loaded from the Hub"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_is_missing_is_named(options, message, files):
    with pytest.raises(ValueError, match=message):
        load_named_pairs(**{"files": files, "dataset_name": None if options.get("files") is None else "nobody/nothing", **options})


def test_empty_cells_and_unknown_columns(files, tmp_path):
    with pytest.raises(ValueError, match="1 of 2 cells in column 'text' of the training data are empty"):
        load_named_pairs(files={**files, "train": write(tmp_path, "t.jsonl", [{"text": "a"}, {"text": None}])})
    with pytest.raises(ValueError, match=r"Which columns of the training data hold texts\? It has \['body'\]"):
        load_named_pairs(files={**files, "train": write(tmp_path, "t2.jsonl", [{"body": "a"}])})


# ---- Batches ----


TEXTS = ["to be or not to be", "that is the question", "whether it is nobler", "be"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(TEXTS, vocab_size=70, max_length=32)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_pair_becomes_two_rows(tokenizer, side):
    tokenizer.padding_side = side
    try:
        rows = encode_pairs(Dataset.from_dict({"query": TEXTS[:2], "document": TEXTS[2:]}), tokenizer)
        batch = PairCollator(tokenizer)([rows[1], rows[0]])
    finally:
        tokenizer.padding_side = "right"
    assert {*PairCollator.columns} <= {*rows.column_names} and batch["labels"].tolist() == [1, 0, 1, 0]
    for row, text in enumerate([TEXTS[1], TEXTS[0], TEXTS[3], TEXTS[2]]):
        mask = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][mask].tolist() == tokenizer(text)["input_ids"]
        assert mask[0 if side == "right" else -1] and {*batch} == {"input_ids", "attention_mask", "token_type_ids", "labels"}


def test_single_texts_pass(tokenizer):
    rows = encode_sentences(TEXTS, tokenizer, 5, number=True)
    batch = PairCollator(tokenizer)([rows[2], rows[0]])
    assert batch["labels"].tolist() == [2, 0] and batch["input_ids"].shape == (2, 5)
    assert "labels" not in encode_sentences(TEXTS, tokenizer).column_names
    assert torch.equal(batch["input_ids"][1], torch.tensor(tokenizer(TEXTS[0], truncation=True, max_length=5)["input_ids"]))


def test_the_trainer_keeps_the_partner_columns(tokenizer, tmp_path):
    from test_base_models import base
    from training import arguments

    from hfdistill import DistillationTrainer, Term

    rows = encode_pairs(Dataset.from_dict({"query": TEXTS[:2], "document": TEXTS[2:]}), tokenizer)
    trainer = DistillationTrainer(
        model=base("distilbert", 1, seed=1, vocab_size=len(tokenizer)),
        objective=[Term("contrastive_pairs")],
        args=arguments(tmp_path, pooling="mean"),
        train_dataset=rows,
        data_collator=PairCollator(tokenizer),
    )
    trainer.train()
    assert trainer.state.log_history[0]["contrastive_pairs"] > 0
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].size(0) == 4
