"""Windows of tokens and the way back to text, against loops over all windows and all spans."""

from __future__ import annotations

import collections
import json

import numpy as np
import pytest
from datasets import Dataset
from transformers import DataCollatorWithPadding

from hfdistill.data.answers import answer_references, answer_texts
from hfdistill.data.spans import SpanData, hide_answers, load_embedded_spans, load_named_spans, span_features
from hfdistill.data.tokenizer import train_wordpiece
from hfdistill.data.windows import encode_spans


CONTEXTS = [
    "Paris is the capital of France. It lies on the Seine, and it has more than two million people.",
    "The quick brown fox jumps over the lazy dog near the bank of the river in the early morning light, and then it rests for a while.",
    "Nobody knows.",
]
ROWS = [
    ("a", "  What is the capital of France?", 0, ["Paris"]),
    ("b", "Where does it lie?", 0, ["on the Seine", "the Seine"]),
    ("c", "Who jumps?", 1, ["quick brown fox"]),
    ("d", "What comes last?", 1, ["it rests for a while"]),
    ("e", "Who knows?", 2, []),
    ("f", "When does the fox jump?", 1, ["in the early morning light, and"]),
]


def rows():
    found = []
    for name, question, context, texts in ROWS:
        answers = {"text": texts, "answer_start": [CONTEXTS[context].index(text) for text in texts]}
        found.append({"id": name, "question": question, "context": CONTEXTS[context], "answers": answers})
    return found


@pytest.fixture(scope="module")
def examples():
    return Dataset.from_list(rows(), features=span_features())


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([*CONTEXTS, *(question for _, question, *_ in ROWS)], vocab_size=260, max_length=64)


def windows_by_hand(tokenizer, row, length, stride):
    """Windows of one example from its tokens alone: `(ids, start, end)`, with the span found by trying all of them."""
    tokenizer.backend_tokenizer.no_truncation()  # a call with truncation leaves it on
    encode = tokenizer.backend_tokenizer.encode
    question = encode(row["question"].lstrip(), add_special_tokens=False)
    context = encode(row["context"], add_special_tokens=False)
    room = length - len(question.ids) - 3
    first = 0
    while True:
        piece = slice(first, first + room)
        ids = [tokenizer.cls_token_id, *question.ids, tokenizer.sep_token_id, *context.ids[piece], tokenizer.sep_token_id]
        start = end = 0
        if row["answers"]["text"]:
            begin, text = row["answers"]["answer_start"][0], row["answers"]["text"][0]
            offsets = context.offsets[piece]
            fitting = [
                (j - i, i, j)
                for i in range(len(offsets))
                for j in range(i, len(offsets))
                if offsets[i][0] <= begin and offsets[j][1] >= begin + len(text)
            ]
            if fitting:
                _, i, j = min(fitting)
                start, end = i + len(question.ids) + 2, j + len(question.ids) + 2
        yield ids, start, end
        if first + room >= len(context.ids):
            return
        first += room - stride


@pytest.mark.parametrize(("length", "stride"), [(64, 8), (30, 4), (26, 2), (32, 12)])
def test_windows_and_positions(examples, tokenizer, length, stride):
    features = encode_spans(examples, tokenizer, length, stride, for_evaluation=True)
    expected = [(row["id"], *window) for row in examples for window in windows_by_hand(tokenizer, row, length, stride)]
    found = list(zip(features["example_id"], features["input_ids"], features["start_positions"], features["end_positions"]))
    assert found == expected
    assert len(found) > len(examples) or length == 64
    training = encode_spans(examples, tokenizer, length, stride)
    assert training.column_names == ["input_ids", "token_type_ids", "attention_mask", "start_positions", "end_positions"]
    assert training["start_positions"][:] == features["start_positions"][:]
    padded = encode_spans(examples, tokenizer, length, stride, pad_to_max_length=True)
    assert {len(ids) for ids in padded["input_ids"]} == {length} and padded["end_positions"][:] == features["end_positions"][:]


def perfect_logits(features):
    """Logits that say exactly where the labels are."""
    length = max(len(ids) for ids in features["input_ids"])
    starts, ends = np.full((len(features), length), -100.0), np.full((len(features), length), -100.0)
    for i, (start, end, offsets) in enumerate(zip(features["start_positions"], features["end_positions"], features["offset_mapping"])):
        starts[i, : len(offsets)], ends[i, : len(offsets)] = -5.0, -5.0
        starts[i, start], ends[i, end] = (3.0, 3.0) if start else (0.5, 0.5)
    return starts, ends


@pytest.mark.parametrize(("length", "stride"), [(64, 8), (30, 10)])
def test_round_trip_gives_the_answers_back(examples, tokenizer, length, stride):
    features = encode_spans(examples, tokenizer, length, stride, for_evaluation=True)
    answers = answer_texts(examples, features, *perfect_logits(features), has_unanswerable=True)
    assert [answer["id"] for answer in answers] == examples["id"][:]
    expected = [texts[0] if texts else "" for *_, texts in ROWS]
    assert [answer["prediction_text"] for answer in answers] == expected
    assert all(answer["no_answer_probability"] == 0.0 for answer in answers)
    forced = answer_texts(examples, features, *perfect_logits(features))
    assert forced[4]["prediction_text"] and "no_answer_probability" not in forced[4]


def by_loops(examples, features, starts, ends, n_best, longest, has_unanswerable, threshold):
    """The post-processing of the question answering examples of Transformers, pair by pair."""
    per_example = collections.defaultdict(list)
    for i, name in enumerate(features["example_id"]):
        per_example[name].append(i)
    texts = []
    for example in examples:
        found, null = [], None
        for i in per_example[example["id"]]:
            offsets = features[i]["offset_mapping"]
            score = starts[i][0] + ends[i][0]
            null = score if null is None else min(null, score)
            for s in sorted(range(len(offsets)), key=lambda k: -starts[i][k])[:n_best]:  # padding takes no place
                for e in sorted(range(len(offsets)), key=lambda k: -ends[i][k])[:n_best]:
                    if offsets[s][0] == -1 or offsets[e][0] == -1:
                        continue
                    if e < s or e - s + 1 > longest:
                        continue
                    found.append((starts[i][s] + ends[i][e], example["context"][offsets[s][0] : offsets[e][1]]))
        best = max(found, key=lambda pair: pair[0]) if found else (-float("inf"), "")
        texts.append("" if has_unanswerable and null - best[0] > threshold else best[1])
    return texts


@pytest.mark.parametrize(
    ("n_best", "longest", "has_unanswerable", "threshold"),
    [(20, 30, False, 0), (3, 2, False, 0), (20, 30, True, 0), (5, 4, True, -2.0)],
)
def test_post_processing_is_that_of_loops(examples, tokenizer, n_best, longest, has_unanswerable, threshold):
    features = encode_spans(examples, tokenizer, 30, 10, for_evaluation=True)
    generator = np.random.default_rng(0)
    empty = 0
    for _ in range(10):
        starts, ends = generator.normal(size=(2, len(features), 34))
        starts[:, 0] += 2
        ours = answer_texts(examples, features, starts, ends, n_best, longest, has_unanswerable, threshold)
        expected = by_loops(examples, features, starts, ends, n_best, longest, has_unanswerable, threshold)
        assert [answer["prediction_text"] for answer in ours] == expected
        empty += expected.count("")
    assert (empty > 0) == has_unanswerable or n_best == 3


def test_answers_are_not_found_in_other_rows(examples, tokenizer):
    features = encode_spans(examples, tokenizer, 64, 8, for_evaluation=True)
    starts, ends = perfect_logits(features)
    with pytest.raises(ValueError, match="There are 5 rows of start logits and 6 of end logits for 6 windows"):
        answer_texts(examples, features, starts[:5], ends)


def test_hidden_answers_are_missing_labels(examples, tokenizer):
    features = encode_spans(hide_answers(examples), tokenizer, 64, 8)
    assert features["start_positions"][:] == features["end_positions"][:] == [-100] * 6
    batch = DataCollatorWithPadding(tokenizer)([features[i] for i in range(6)])
    assert batch["start_positions"].tolist() == [-100] * 6 and batch["input_ids"].size(0) == 6


def test_padding_on_the_left(examples, tokenizer):
    import copy

    left = copy.deepcopy(tokenizer)
    left.padding_side = "left"
    with pytest.raises(ValueError, match="pads on the left, so positions would move"):
        encode_spans(examples, left)
    features = encode_spans(examples, left, 64, 8, pad_to_max_length=True, for_evaluation=True)
    for feature, row in zip(features, examples):
        ids = feature["input_ids"][feature["start_positions"] : feature["end_positions"] + 1]
        texts = row["answers"]["text"]
        assert ids == (left(texts[0], add_special_tokens=False)["input_ids"] if texts else [left.cls_token_id])
        assert feature["input_ids"][feature["null_position"]] == left.cls_token_id
    answers = answer_texts(examples, features, *perfect_logits(features), has_unanswerable=True)
    assert [answer["prediction_text"] for answer in answers][:4] == ["Paris", "on the Seine", "quick brown fox", "it rests for a while"]


def test_windows_that_would_not_move(examples, tokenizer):
    with pytest.raises(ValueError, match=r"max_seq_length=20 leaves room for \d+ tokens of the context beside the longest question"):
        encode_spans(examples, tokenizer, 20, 16)

    class Slow:
        pass

    with pytest.raises(ValueError, match="Slow does not tell where in the text its tokens stand"):
        encode_spans(examples, Slow())


# ---- Files and the Hub ----


def write(path, kind, data):
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in data))
    elif kind == "json":
        path.write_text(json.dumps(data))
    elif kind == "csv":
        import csv

        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(data[0]))
            writer.writeheader()
            writer.writerows([{**row, "answers": json.dumps(row["answers"])} for row in data])
    else:
        Dataset.from_list(data).to_parquet(str(path))
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_local_files(tmp_path, kind, examples):
    file = write(tmp_path / f"train.{kind}", kind, rows())
    held_out = write(tmp_path / f"dev.{kind}", kind, rows()[:2])
    data = load_named_spans(files={"train": file, "validation": held_out}, version_2_with_negative=True, cache_dir=str(tmp_path))
    assert data.teacher_train.to_list() == examples.to_list() and list(data.evaluation) == ["validation"]
    assert len(data.evaluation["validation"]) == 2 and data.has_unanswerable and not len(data.transfer)
    assert answer_references(data.evaluation["validation"])[0] == {"id": "a", "answers": {"text": ["Paris"], "answer_start": [0]}}
    few = load_named_spans(
        files={"train": file, "validation": held_out}, version_2_with_negative=True, labelled_rows=2, cache_dir=str(tmp_path)
    )
    assert len(few.labelled) == 2 and few.transfer["answers"][:] == [None] * 4
    assert sorted([*few.labelled["id"], *few.transfer["id"]]) == list("abcdef")
    assert few.fingerprint() != data.fingerprint() and SpanData.fingerprint(data) == data.fingerprint()


def nested():
    paragraphs = []
    for context in CONTEXTS:
        qas = []
        for row in rows():
            if row["context"] == context:
                pairs = zip(row["answers"]["text"], row["answers"]["answer_start"])
                answers = [{"text": text, "answer_start": start} for text, start in pairs]
                qas.append({"id": row["id"], "question": row["question"], "answers": answers, "is_impossible": not answers})
        paragraphs.append({"context": context, "qas": qas})
    return {"version": "v2.0", "data": [{"title": "One", "paragraphs": paragraphs[:2]}, {"title": "Two", "paragraphs": paragraphs[2:]}]}


def test_the_files_of_the_web_site(tmp_path, examples):
    (tmp_path / "train-v2.0.json").write_text(json.dumps(nested()))
    files = dict.fromkeys(("train", "validation"), str(tmp_path / "train-v2.0.json"))
    data = load_named_spans(files=files, version_2_with_negative=True, cache_dir=str(tmp_path))
    assert sorted(data.teacher_train.to_list(), key=lambda row: row["id"]) == examples.to_list()


def test_bad_data(tmp_path):
    def load(data, **options):
        file = write(tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl", "jsonl", data)
        return load_named_spans(files={"train": file, "validation": file}, cache_dir=str(tmp_path / "cache"), **options)

    with pytest.raises(ValueError, match=r"1 of 6 questions of the train data have no answer \(the first is 'e'\).*version_2_with"):
        load(rows())
    moved = rows()[:2]
    moved[0]["answers"]["answer_start"] = [3]
    with pytest.raises(ValueError, match=r"1 of 3 answers of the train data are not where answer_start says \(question 'a': 'Paris', "):
        load(moved)
    with pytest.raises(ValueError, match=r"The train data has no column 'context', only \['id', 'question', 'answers'\]"):
        load([{name: row[name] for name in ("id", "question", "answers")} for row in rows()])
    with pytest.raises(ValueError, match=r"Row 0 of the train data has the answers .*'Paris'.*which is not"):
        load([{**row, "answers": "Paris"} for row in rows()[:2]])
    with pytest.raises(ValueError, match="no 'validation' or 'test' split"):
        load_named_spans(files={"train": write(tmp_path / "x.jsonl", "jsonl", rows()[:4])}, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="'squad' could not be loaded from the Hub"):
        load_named_spans("squad", cache_dir=str(tmp_path / "cache"))


def test_a_few_misplaced_answers_are_said_not_refused(tmp_path, caplog):
    data = [{**row, "id": f"{row['id']}{i}"} for i in range(40) for row in rows()[:4]]
    data[0]["answers"] = {"text": ["Paris"], "answer_start": [2]}
    file = write(tmp_path / "train.jsonl", "jsonl", data)
    load_named_spans(files={"train": file, "validation": file}, cache_dir=str(tmp_path))
    assert "1 of 200 answers of the train data are not where answer_start says" in caplog.text


def test_embedded_data(tmp_path):
    source = "\n".join(f'def name_{i}():\n    """Do sentence number {i} here. Return number {i} of it."""' for i in range(4))
    for module in ("queue", "json", "ast", "os", "re"):
        (tmp_path / f"{module}.py").write_text(source.replace("sentence", f"sentence of {module}"))
    data = load_embedded_spans(3, root=str(tmp_path))
    assert len(data.labelled) == 3 and len(data.teacher_train) == 8 and len(data.transfer) == 8 and len(data.evaluation["test"]) == 4
    assert data.transfer["answers"][0] is None and data.embedded and data.text_columns == ("question", "context")
    assert not set(data.vocabulary_texts) & {*data.evaluation["test"]["context"]}
    whole = load_embedded_spans(None, root=str(tmp_path))
    assert len(whole.labelled) == len(whole.teacher_train) == 16 and not len(whole.transfer) and len(whole.evaluation["test"]) == 4
    assert None not in whole.labelled["answers"][:]
    assert data.fingerprint() == load_embedded_spans(3, root=str(tmp_path)).fingerprint()
    assert len({data.fingerprint(), whole.fingerprint(), load_embedded_spans(3, seed=1, root=str(tmp_path)).fingerprint()}) == 3
