"""Text classification data with several labels a text; the other kinds are in tests/test_recipe_text_classification.py."""

import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import BertConfig, DataCollatorWithPadding

from hfdistill import encode_texts, linear_baselines, load_named, match_labels, train_wordpiece


ROWS = [("a red round thing", ["red", "round"]), ("a blue thing", ["blue"]), ("nothing to see", []), ("red or blue", ["blue", "red"])]
HOT = [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]  # blue, red, round


def write(path, labels, texts=tuple(text for text, _ in ROWS), column="labels"):
    path.write_text("".join(json.dumps({"text": text, column: label}) + "\n" for text, label in zip(texts, labels, strict=True)))
    return str(path)


def load(tmp_path, labels, held_out=None, **options):
    files = {"train": write(tmp_path / "train.jsonl", labels)}
    held_out = labels if held_out is None else held_out
    files["validation"] = write(tmp_path / "validation.jsonl", held_out, [text for text, _ in ROWS][: len(held_out)])
    return load_named(files=files, cache_dir=str(tmp_path / "cache"), **options)


@pytest.mark.parametrize(
    "labels,names",
    [
        ([label for _, label in ROWS], ["blue", "red", "round"]),
        ([[{"blue": 3, "red": 5, "round": 9}[name] for name in label] for _, label in ROWS], ["LABEL_3", "LABEL_5", "LABEL_9"]),
        (HOT, ["LABEL_0", "LABEL_1", "LABEL_2"]),
        ([[int(value) for value in row] for row in HOT], ["LABEL_0", "LABEL_1", "LABEL_2"]),
        ([[bool(value) for value in row] for row in HOT], ["LABEL_0", "LABEL_1", "LABEL_2"]),
    ],
    ids=["names", "ids", "floats", "integers", "bools"],
)
def test_lists_of_labels(labels, names, tmp_path):
    data = load(tmp_path, labels, labels[:2])
    assert data.is_multi_label and data.problem_type == "multi_label_classification" and data.label_names == names
    assert data.teacher_train["label"][:] == data.labelled["label"][:] == HOT
    assert data.evaluation["validation"]["label"][:] == HOT[:2]


def test_class_labels_in_lists(tmp_path):
    features = Features({"text": Value("string"), "label": List(ClassLabel(names=["round", "blue", "red"]))})
    ids = [[0, 2], [1], [], [1, 2]]
    path = str(tmp_path / "a.parquet")
    Dataset.from_dict({"text": [text for text, _ in ROWS], "label": ids}, features=features).to_parquet(path)
    data = load_named(files={"train": path, "test": path}, cache_dir=str(tmp_path))
    assert data.label_names == ["round", "blue", "red"] and data.teacher_train["label"][0] == [1.0, 0.0, 1.0]


def test_hidden_labels_reach_the_loss_as_missing(tmp_path):
    """Rows of -100: batches stay float, and the task loss counts the labelled rows only."""
    from hfdistill import TaskBinaryCrossEntropyLoss

    data = load(tmp_path, [label for _, label in ROWS], labelled_rows=3)
    assert len(data.labelled) == 3 and data.transfer["label"][:] == [[-100.0] * 3]
    shown = dict(zip([text for text, _ in ROWS], HOT))
    assert all(row["label"] == shown[row["text"]] for row in data.labelled)
    tokenizer = train_wordpiece(data.vocabulary_texts, vocab_size=60)
    rows = [*encode_texts(data.labelled, tokenizer, data.text_columns), *encode_texts(data.transfer, tokenizer, data.text_columns)]
    batch = DataCollatorWithPadding(tokenizer)(rows)
    assert batch["labels"].dtype == torch.float32 and batch["labels"].shape == (4, 3)
    value = TaskBinaryCrossEntropyLoss()(torch.zeros(4, 3), batch["labels"])
    assert int(value.count) == 3 and float(value.mean) == pytest.approx(np.log(2))


def test_the_order_of_a_teacher(tmp_path):
    data = load(tmp_path, [label for _, label in ROWS], labelled_rows=3)
    matched = match_labels(data, BertConfig(id2label={0: "Round", 1: "Blue", 2: "Red"}))
    assert matched.label_names == ["Round", "Blue", "Red"] and matched.is_multi_label
    assert matched.evaluation["validation"]["label"][:] == [[row[2], row[0], row[1]] for row in HOT]
    assert matched.transfer["label"][:] == [[-100.0] * 3]
    with pytest.raises(ValueError, match="could not be told right from wrong"):
        match_labels(data, BertConfig(id2label={0: "round", 1: "blue"}))


@pytest.mark.parametrize(
    "labels,held_out,message",
    [
        ([*HOT[:3], [1.0, 0.0]], None, r"Row 3 of the train data has the labels \[1.0, 0.0\].*3 numbers"),
        ([*HOT[:3], [1.0, 0.5, 0.0]], None, "must say 0 or 1 for each label"),
        (HOT, [HOT[0], [0.0, 2.0, 0.0]], "Row 1 of the validation data"),
        ([[1.0]] * 4, None, "1 numbers: each row must say 0 or 1"),
        ([["red"], ["blue"], ["red"], []], [["green"]], r"labels that the training data lacks: \['green'\]"),
        ([["red"], ["red"], ["red"], []], None, r"1 different labels \['red'\]"),
        ([["red"], None, ["red"], ["blue"]], None, "1 of 4 cells in column 'labels' of the train data are empty"),
    ],
    ids=["ragged", "half", "held out", "one", "unknown", "one name", "empty"],
)
def test_what_is_no_set_of_labels(labels, held_out, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, labels, held_out)


def test_baselines_for_several_labels(tmp_path):
    """Each label is a word of the text, which logistic regression finds; a label that every row has is no trouble."""
    words = ["red", "blue", "round", "flat"]
    rng = np.random.default_rng(0)
    chosen = [[word for word in words if word == "red" or rng.random() < 0.4] for _ in range(40)]
    texts = [f"this one is {' and '.join(own)} here" for own in chosen]
    path = write(tmp_path / "a.jsonl", chosen, texts)
    data = load_named(files={"train": path, "validation": path}, cache_dir=str(tmp_path))
    rates = linear_baselines(data, lambda guesses, truth: float((np.asarray(guesses) == np.asarray(truth)).mean()))
    truth = np.array(data.labelled["label"][:])
    assert rates["tfidf_logreg"] > 0.95
    assert rates["majority"] == pytest.approx(np.maximum(truth.mean(0), 1 - truth.mean(0)).mean())
