"""The recipe through its real `main`, a few steps, on the embedded text and on files; its student in plain Transformers."""

import json
import subprocess
import sys

import families
import numpy as np
import pytest
from recipes_under_test import ROOT, load_recipe
from safetensors.torch import load_file

import hfdistill
from hfdistill.cli import parse
from hfdistill.data.byte_level import train_byte_level


CONFIG = str(ROOT / "recipes/configs/token_classification/stdlib_modernbert_kd.yaml")
QUICK = (
    "--max_steps 3 --per_device_train_batch_size 8 --max_seq_length 24 --vocab_size 600 --disable_tqdm true --logging_steps 1 --seeds 0 "
    "--allow_weak_teacher true --learning_rate 1e-3"
).split()
SMALL = json.dumps({"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16})
TEACHER = ["--teacher_config", SMALL, "--teacher_training", json.dumps({"max_steps": 3})]
NAMES = ["B-LOC", "B-PER", "I-PER", "O"]


def run(*flags):
    recipe = load_recipe("token_classification")
    return recipe.main(*parse(recipe.ARGUMENTS, list(flags)))


@pytest.fixture(scope="module")
def ner(tmp_path_factory):
    """Two files as conll2003 has them: 24 and 8 short sentences."""
    folder, rng = tmp_path_factory.mktemp("ner"), np.random.default_rng(0)
    people, places, others = ["Peter Blackburn", "Anna Lee", "Bob"], ["Brussels", "Rome"], ["saw", "the", "old", "bridge", "in", "near"]
    paths = []
    for name, count in (("train", 24), ("validation", 8)):
        rows = []
        for i in range(count):
            person = people[i % 3].split()
            words = [*person, *rng.choice(others, 3).tolist(), places[i % 2], "today"]
            tags = ["B-PER", *["I-PER"] * (len(person) - 1), "O", "O", "O", "B-LOC", "O"]
            rows.append(json.dumps({"id": str(i), "tokens": words, "pos_tags": [0] * len(words), "ner_tags": tags}))
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(rows) + "\n")
        paths.append(str(path))
    return ["--train_file", paths[0], "--validation_file", paths[1], "--cache_dir", str(folder / "cache")]


@pytest.fixture
def trainers(monkeypatch):
    """Every trainer that the recipe runs, by the name of its arm."""
    seen, finish = {}, hfdistill.Run.finish

    def noted(self, name, trainer):
        seen[name] = trainer
        return finish(self, name, trainer)

    monkeypatch.setattr(hfdistill.Run, "finish", noted)
    return seen


def test_the_embedded_task(tmp_path, trainers):
    flags = ["--config", CONFIG, *QUICK, *TEACHER, "--student_config", '{"hidden_size": 16, "num_attention_heads": 2}']
    flags += ["--max_train_samples", "60", "--max_eval_samples", "30", "--labelled_rows", "20"]
    results = run(*flags, "--output_dir", str(tmp_path))
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["metric"] == "token_f1" and "punctuation" in written["task"] and written["seeds"] == [0]
    assert {"control", "window_logreg", "window_logreg_teacher_labels", "majority"} == written["baselines"].keys()
    assert written["baselines"]["majority"] == 0  # always O finds no mark
    assert 0 <= written["agreement"] <= 1 and written["student_alone"]["steps"] == written["student_distilled"]["steps"] == 3
    assert written["teacher"]["parameters"] > written["student_distilled"]["parameters"]
    assert results["evaluation"]["test"].keys() >= {"eval_token_f1", "eval_token_macro_f1", "eval_accuracy"}

    # 20 rows have labels, 60 have none, and the teacher is heard at the first sub-token of every word of both.
    trainer = trainers["distilled_0"]
    assert trainer.objective.positions == "marked" and len(trainer.train_dataset) == 80
    hidden = [row for row in trainer.train_dataset if set(row["labels"]) == {-100}]
    assert len(hidden) == 60 and all(sum(row["target_mask"]) > 0 for row in hidden)
    shown = [row for row in trainer.train_dataset if set(row["labels"]) != {-100}]
    assert all([int(label != -100) for label in row["labels"]] == row["target_mask"] for row in shown)
    assert any(sum(row["target_mask"]) < len(row["input_ids"]) - 2 for row in shown)  # there are other sub-tokens
    assert trainers["alone_0"].train_dataset["labels"][:] == [row["labels"] for row in shown]

    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "results.json", "results.png", "README.md", "tokenizer.json"} <= names
    code = f"""
import sys
sys.modules["hfdistill"] = None
from transformers import AutoModelForTokenClassification, pipeline
model, report = AutoModelForTokenClassification.from_pretrained({str(tmp_path)!r}, output_loading_info=True)
assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
print([answer["entity"] for answer in pipeline("token-classification", {str(tmp_path)!r}, ignore_labels=[])("return the first one")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.strip().splitlines()[-1].replace("'", '"'))
    assert answers and set(answers) <= {"O", "COMMA", "PERIOD", "COLON"}


def test_entities_under_a_teacher_of_another_label_order(tmp_path, ner, trainers):
    """The data numbers its labels by name; the teacher has its own order, which labels, students and metrics follow."""
    theirs = ["O", "B-PER", "I-PER", "B-LOC"]
    tokenizer = hfdistill.train_wordpiece(["Peter Blackburn Anna Lee Bob saw the old bridge in near Brussels Rome today"], vocab_size=80)
    labels = {"id2label": dict(enumerate(theirs)), "label2id": {name: i for i, name in enumerate(theirs)}}
    teacher = families.build("bert", 2, head="TokenClassification", vocab_size=len(tokenizer), num_labels=4, **labels)
    for part in (teacher, tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    flags = [*ner, *QUICK, "--teacher_model_name_or_path", str(tmp_path / "teacher"), "--labelled_rows", "10"]
    results = run(*flags, "--output_dir", str(tmp_path / "out"), "--max_steps", "2")
    assert results["metric"] == "span_f1" and results["evaluation"]["validation"].keys() >= {"eval_span_f1", "eval_span_recall"}
    assert 0 <= results["student_distilled"]["span_f1"]["mean"] <= 1
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert [config["id2label"][str(i)] for i in range(4)] == theirs
    row = trainers["control_0"].train_dataset[0]  # Peter Blackburn ... Brussels today
    assert [label for label in row["labels"] if label != -100] == [1, 2, 0, 0, 0, 3, 0]
    assert trainers["distilled_0"].objective.label_order is None  # both name them alike by now
    assert results["baselines"].keys() >= {"window_logreg", "majority"}


def test_stages_and_a_byte_level_teacher(tmp_path, ner, trainers):
    """RoBERTa's tokenizer is loaded so that words in a list stay words; stages name the data of this recipe."""
    tokenizer = train_byte_level(["Peter Blackburn saw the old bridge in Brussels today, near Rome. Anna Lee and Bob"], vocab_size=330)
    teacher = families.build("roberta", 2, head="TokenClassification", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
                             num_labels=4, id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)})  # fmt: skip
    for part in (teacher, tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    stages = [
        {"name": "listen", "data": "transfer", "task_weight": 0.0, "kd_weight": 1.0, "max_steps": 2},
        {"name": "learn", "data": "labelled", "max_steps": 1},
    ]
    flags = [*ner, *QUICK, "--teacher_model_name_or_path", str(tmp_path / "teacher"), "--labelled_rows", "10", "--baselines", "false"]
    (tmp_path / "stages.yaml").write_text(json.dumps({"stages": stages, "label_all_tokens": True, "packing": True}))
    results = run("--config", str(tmp_path / "stages.yaml"), *flags, "--output_dir", str(tmp_path / "out"))
    assert results["student_distilled"]["steps"] == 3 and results["metric"] == "span_f1" and results["student_alone"] is None
    assert all(isinstance(trainer.data_collator, hfdistill.PackingCollator) for trainer in trainers.values())
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.convert_ids_to_tokens(saved(["Bob", "saw"], is_split_into_words=True)["input_ids"])[1][0] == "Ġ"
    assert load_file(tmp_path / "out/model.safetensors")["classifier.weight"].shape == (4, 32)


def test_without_seqeval_tokens_are_counted(tmp_path, ner, monkeypatch, capsys):
    recipe = load_recipe("token_classification")
    parsed, _ = parse(recipe.ARGUMENTS, [*ner, "--output_dir", str(tmp_path)])
    monkeypatch.setitem(hfdistill.__dict__, "has_seqeval", lambda: False)
    assert recipe.choose_metric(parsed, NAMES, print) == "token_f1"
    assert "seqeval is not installed" in capsys.readouterr().out
    assert recipe.choose_metric(parsed, ["O", "COMMA"], print) == "token_f1" and not capsys.readouterr().out
    parsed.token_metric = "span_f1"
    assert recipe.choose_metric(parsed, NAMES, print) == "span_f1"


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--resume_from_checkpoint", "x"], "resume_from_checkpoint is not needed"),
        (["--text_column_name", "nope"], "--text_column_name nope is about your own data, but none is given"),
        (["--teacher_training", '{"max_step": 3}'], "unknown key 'max_step' in teacher_training. Did you mean 'max_steps'?"),
        (["--train_file", "a.csv", "--validation_file", "b.csv"], "must all be json, jsonl or parquet"),
        (["--token_metric", "f1"], "token_metric"),
    ],
)
def test_flags_that_cannot_work(tmp_path, flags, words):
    with pytest.raises((ValueError, SystemExit), match=words.replace("(", r"\(")) as error:
        run("--output_dir", str(tmp_path), *flags)
    assert words in str(error.value)
