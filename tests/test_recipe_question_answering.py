"""The recipe through its real `main`, a few steps, on embedded questions and on files; its student in plain Transformers."""

import json
import subprocess
import sys

import families
import pytest
import torch
from datasets import Dataset
from recipes_under_test import ROOT, load_recipe
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from hfdistill import train_wordpiece
from hfdistill.cli import parse


pytestmark = pytest.mark.slow  # the file takes about a minute; tests of its parts are quick


CONFIG = str(ROOT / "recipes/configs/question_answering/stdlib_modernbert_kd.yaml")
QUICK = "--max_steps 3 --per_device_train_batch_size 8 --disable_tqdm true --logging_steps 1 --allow_weak_teacher true".split()
SMALL = "--max_train_samples 40 --max_eval_samples 30 --vocab_size 600 --max_seq_length 96 --doc_stride 16".split()
TINY = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}


def settings(*flags):
    recipe = load_recipe("question_answering")
    return recipe, parse(recipe.ARGUMENTS, list(flags))


def run(*flags, **changes):
    recipe, parsed = settings(*flags)
    for name, value in {"teacher_config": TINY, "teacher_training": {"max_steps": 3}, "student_config": None, **changes}.items():
        setattr(parsed[0], name, value)
    return recipe.main(*parsed)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "stdlib"
    return folder, run("--config", CONFIG, "--output_dir", str(folder), "--seeds", "0", "1", *QUICK, *SMALL)


def test_results(finished):
    folder, results = finished
    written = json.loads((folder / "results.json").read_text())
    assert written["metric"] == "f1" and written["seeds"] == [0, 1]
    assert len(written["student_alone"]["f1"]["values"]) == len(written["student_distilled"]["f1"]["values"]) == 2
    assert {"word_overlap", "first_sentence", "control"} <= written["baselines"].keys()
    assert written["baselines"]["word_overlap"] > written["baselines"]["first_sentence"] > 0
    assert [part["loss"] for part in written["objective"]] == ["task", "soft_targets"] and 0 <= written["agreement"] <= 1
    assert {"eval_f1", "eval_exact_match", "eval_loss"} <= written["evaluation"]["test"].keys()
    assert written["evaluation"]["test"]["eval_f1"] == pytest.approx(written["student_distilled"]["f1"]["values"][0])
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "results.json", "results.png", "README.md", "tokenizer.json"} <= names
    assert "pipeline_tag: question-answering" in (folder / "README.md").read_text()


def test_student_loads_where_hfdistill_cannot_be_imported(finished):
    folder, _ = finished
    code = f"""
import sys
sys.modules["hfdistill"] = None
from transformers import AutoModelForQuestionAnswering, AutoTokenizer
model, report = AutoModelForQuestionAnswering.from_pretrained({str(folder)!r}, output_loading_info=True)
assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})
output = model(**tokenizer("What does close do?", "Close the file. Open it.", return_tensors="pt"))
print(tuple(output.start_logits.shape) == tuple(output.end_logits.shape))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("True")


def test_a_finished_run_is_read_back(finished, capsys):
    folder, results = finished
    again = run("--config", CONFIG, "--output_dir", str(folder), "--seeds", "0", "1", *QUICK, *SMALL)
    assert "distilled_1 is finished already" in capsys.readouterr().out
    assert again["student_distilled"]["f1"] == results["student_distilled"]["f1"] and again["agreement"] == results["agreement"]


CONTEXT = "Anna lives in Paris. Ben lives in Rome. Carl lives in Oslo. Dora lives in Bonn."


def rows(unanswerable=False):
    data = []
    for i in range(24):
        name = ("Anna", "Ben", "Carl", "Dora")[i % 4]
        city = CONTEXT.split(f"{name} lives in ")[1].split(".")[0]
        answers = {"text": [city], "answer_start": [CONTEXT.index(city)]}
        empty = {"text": [], "answer_start": []}
        data.append({"id": f"q{i}", "question": f"Where does {name} live?", "context": CONTEXT, "answers": answers})
        if unanswerable and i % 3 == 0:
            data.append({"id": f"n{i}", "question": "Where does Emil live?", "context": CONTEXT, "answers": empty})
    return data


def write(path, data):
    path.write_text("\n".join(json.dumps(row) for row in data))
    return str(path)


def given(tmp_path):
    """A tiny BERT and its tokenizer in a folder, as a user has them."""
    tokenizer = train_wordpiece([CONTEXT, "Where does live?"], vocab_size=families.VOCAB, max_length=40)
    model = families.build("bert", 2, head="QuestionAnswering", num_labels=2, vocab_size=len(tokenizer))
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "teacher")
    student = families.build("distilbert", 1, head="QuestionAnswering", num_labels=2, vocab_size=len(tokenizer))
    student.save_pretrained(tmp_path / "student")
    return tokenizer


def test_squad_files_a_given_teacher_and_a_student_without_token_types(tmp_path):
    tokenizer = given(tmp_path)
    file = write(tmp_path / "train.jsonl", rows(unanswerable=True))
    flags = ["--train_file", file, "--validation_file", file, "--version_2_with_negative", "true", "--labelled_rows", "8"]
    flags += ["--teacher_model_name_or_path", str(tmp_path / "teacher"), "--model_name_or_path", str(tmp_path / "student")]
    flags += ["--tokenizer_name", str(tmp_path / "teacher"), "--cache_dir", str(tmp_path / "cache"), "--seeds", "0"]
    flags += ["--output_dir", str(tmp_path / "out"), "--max_seq_length", "40", "--doc_stride", "8", "--report_to", "none"]
    results = run(*flags, *QUICK, "--baselines", "false", teacher_config=None, teacher_training={"max_steps": 3})
    evaluation = results["evaluation"]["validation"]
    assert evaluation["eval_total"] == 32 and evaluation["eval_NoAns_total"] == 8 and evaluation["eval_HasAns_total"] == 24
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")
    assert type(loaded).__name__ == "DistilBertForQuestionAnswering"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()


def test_stages(tmp_path):
    given(tmp_path)
    file = write(tmp_path / "train.jsonl", rows())
    flags = ["--train_file", file, "--validation_file", file, "--teacher_model_name_or_path", str(tmp_path / "teacher")]
    flags += ["--cache_dir", str(tmp_path / "cache"), "--seeds", "0", "--baselines", "false", "--labelled_rows", "8"]
    flags += ["--output_dir", str(tmp_path / "out"), "--max_seq_length", "40", "--doc_stride", "8", "--report_to", "none"]
    stages = [{"name": "hidden", "data": "transfer", "hidden_weight": 1.0}, {"name": "answers", "task_weight": 0.5, "kd_weight": 0.5}]
    results = run(*flags, *QUICK, teacher_config=None, teacher_training=None, stages=stages)
    assert results["student_distilled"]["steps"] == 6 and results["student_alone"] is None
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_refusals(tmp_path):
    out = ["--output_dir", str(tmp_path / "out")]
    file = write(tmp_path / "train.jsonl", rows())
    recipe, parsed = settings(*out, "--resume_from_checkpoint", "x")
    with pytest.raises(ValueError, match="resume_from_checkpoint is not needed"):
        recipe.main(*parsed)
    recipe, parsed = settings(*out, "--version_2_with_negative", "true")
    with pytest.raises(ValueError, match="--version_2_with_negative True is about your own data"):
        recipe.main(*parsed)
    with pytest.raises(ValueError, match="unknown key 'max_step' in teacher_training"):
        run(*out, teacher_training={"max_step": 3})
    flags = ["--train_file", file, "--validation_file", file, "--cache_dir", str(tmp_path / "cache"), "--max_seq_length", "40"]
    with pytest.raises(ValueError, match=r"The teacher's F1 is [\d.]+ on the held-out questions, and always giving the first sentence"):
        recipe, parsed = settings(*out, *flags, "--doc_stride", "8", "--vocab_size", "80", "--seeds", "0", "--max_steps", "1")
        parsed[0].teacher_config = TINY
        recipe.refuse_weak_teacher(1.0, 1.0, True)
        recipe.load_data(parsed[0])
        recipe.refuse_weak_teacher(10.0, 12.0, False)
    write(tmp_path / "broken.jsonl", [{"question": "q", "context": "c"}])
    recipe, parsed = settings(*out, "--train_file", str(tmp_path / "broken.jsonl"), "--cache_dir", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="The train data has no column 'answers'"):
        recipe.main(*parsed)


def test_token_types_reach_the_teacher(tmp_path, monkeypatch):
    """DistilBERT's tokenizer makes no token types, and its BERT teacher would take question and context for one text."""
    tokenizer = given(tmp_path)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path / "student")
    from hfdistill.data.windows import encode_spans

    features = encode_spans(Dataset.from_list(rows()), tokenizer, 40, 8)
    assert "token_type_ids" not in features.column_names
    features = encode_spans(Dataset.from_list(rows()), tokenizer, 40, 8, return_token_type_ids=True)
    assert {0, 1} == {kind for row in features["token_type_ids"] for kind in row}
