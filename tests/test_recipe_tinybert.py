"""TinyBERT's recipe through its real `main`, a few steps a stage; its layer map, its numbers for tasks, its refusals."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import datasets
import families
import pytest
import torch
import yaml
from recipes_under_test import ROOT, load_recipe
from safetensors.torch import load_file

from hfdistill import load_text_data, resolve_layer_map, train_wordpiece
from hfdistill.cli import parse


pytestmark = pytest.mark.slow  # the file takes about a minute; tests of its parts are quick


CONFIGS = ROOT / "recipes/configs/tinybert"
QUICK = [
    *("--max_seq_length", "16", "--vocab_size", "600", "--max_train_samples", "40", "--max_eval_samples", "30"),
    *("--per_device_train_batch_size", "8", "--max_corpus_documents", "200", "--augmentation_copies", "2", "--disable_tqdm", "true"),
    *("--logging_steps", "1", "--allow_weak_teacher", "true", "--labelled_rows", "20", "--cpu_threads", "1"),
]


def settings(*flags, steps=2):
    recipe = load_recipe("tinybert")
    own, args = parse(recipe.ARGUMENTS, list(flags))
    for name in ("general_teacher_training", "teacher_training"):
        if name == "general_teacher_training" and own.general_teacher_name_or_path:
            continue
        setattr(own, name, {**(getattr(own, name) or {}), "max_steps": steps})
    own.stages = [{**stage, "max_steps": steps + i} for i, stage in enumerate(own.stages or recipe.STAGES)]
    return recipe, own, args


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "stdlib"
    recipe, own, args = settings("--config", str(CONFIGS / "stdlib_tinybert.yaml"), "--output_dir", str(folder), "--seeds", "0", *QUICK)
    return folder, recipe.main(own, args)


def test_every_arm_has_as_many_steps(finished):
    folder, results = finished
    written = json.loads((folder / "results.json").read_text())
    assert [stage["name"] for stage in written["stages"]] == ["general", "intermediate", "prediction"]
    assert [stage["steps"] for stage in written["stages"]] == [2, 3, 4]
    assert [stage["teacher"] for stage in written["stages"]] == ["general", "teacher", "teacher"]
    steps = [written["student_distilled"]["steps"], written["student_alone"]["steps"], written["baselines"]["kd_alone"]["steps"]]
    assert steps == [9, 9, 9]
    assert {"kd_alone", "tfidf_logreg", "majority"} <= written["baselines"].keys()
    assert written["agreements"].keys() == {"alone", "kd_alone", "distilled"}
    parts = {stage: [part["name"] for part in written["objective"] if part["stage"] == stage] for stage in ("general", "prediction")}
    assert parts == {"general": ["hidden", "embedding", "attention"], "prediction": ["kd"]}  # no hard labels
    assert written["general_teacher"]["perplexity"] > 1
    assert written["augmented_texts"] > 60  # 20 labelled texts, 40 of transfer, their copies


def test_adapters_are_carried_into_the_task(finished):
    folder, results = finished
    assert [stage["carried_adapters"] > 0 for stage in results["stages"]] == [False, True, False]
    first, second = (load_file(folder / "_arms/distilled_0" / name / "distillation_state.safetensors") for name in STAGE_FOLDERS[:2])
    assert first.keys() == second.keys()
    (weight,) = {tuple(value.shape) for value in first.values() if value.ndim == 2}  # one map for all layers
    assert weight == (128, 64)


STAGE_FOLDERS = ("0_general", "1_intermediate", "2_prediction")


def test_task_teacher_comes_from_the_general_one(finished):
    folder, _ = finished
    general, task = (load_file(folder / "_arms" / name / "model.safetensors") for name in ("general_teacher", "teacher"))
    shared = [name for name in general if name in task]
    assert len(shared) > 20
    # Two steps of fine-tuning do not lead far from where they began; other random weights would.
    for name in shared:
        assert (general[name] - task[name]).abs().max() < 0.02, name


def test_student_loads_where_hfdistill_cannot_be_imported(finished):
    folder, _ = finished
    code = f"""
import sys
sys.modules["hfdistill"] = None
from transformers import AutoModelForSequenceClassification, pipeline
model, report = AutoModelForSequenceClassification.from_pretrained({str(folder)!r}, output_loading_info=True)
assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
print(pipeline("text-classification", {str(folder)!r})("Open a socket.", truncation=True)[0]["label"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] in (
        *("concurrency", "data formats", "files and processes", "language tools", "network", "numbers and containers"),
    )


def test_nothing_names_the_folder_of_the_run(finished):
    folder, _ = finished
    texts = [path for path in folder.iterdir() if path.suffix in (".json", ".md")]
    assert len(texts) >= 5
    for path in texts:
        assert str(folder.parent) not in path.read_text() and "_arms" not in path.read_text(), path.name
    assert "distilled from a BertForSequenceClassification" in (folder / "README.md").read_text()


def test_a_finished_run_is_read_back(finished, capsys, monkeypatch):
    folder, results = finished
    recipe, own, args = settings("--config", str(CONFIGS / "stdlib_tinybert.yaml"), "--output_dir", str(folder), "--seeds", "0", *QUICK)
    monkeypatch.setattr("hfdistill.data.augmentation._augment", None)  # kept beside the arms
    again = recipe.main(own, args)
    said = capsys.readouterr().out
    assert all(f"{name} is finished already" in said for name in ("general_teacher", "teacher", "prediction", "kd_alone_0"))
    assert again["student_distilled"]["accuracy"] == results["student_distilled"]["accuracy"]
    assert again["stages"] == results["stages"]


def test_nothing_of_the_test_part_is_read_before_the_end(finished, monkeypatch):
    """Neither tokenizer, corpus nor augmentation sees a held-out text."""
    recipe, own, args = settings("--config", str(CONFIGS / "stdlib_tinybert.yaml"), "--output_dir", "unused", steps=1)
    data = load_text_data(replace(own, max_train_samples=None))
    corpus = recipe.load_corpus(replace(own, max_corpus_documents=None), data)
    held_out = set(data.evaluation["test"]["text"])
    assert len(held_out) > 100 and not held_out & {*corpus.train["text"], *corpus.held_out["text"]}
    assert not held_out & {*data.labelled["text"], *data.transfer["text"], *data.teacher_train["text"]}
    assert not set(corpus.train["text"]) & set(corpus.held_out["text"])


@pytest.fixture
def pair_files(tmp_path):
    words = ["red", "green", "blue", "black", "white"]
    rows = [(f"a {a} ball", f"the {b} ball", float(a == b)) for a in words for b in words]
    for name, own in (("train", rows), ("held", rows[:12])):
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("sentence1", "sentence2", "label"), *own])
    (tmp_path / "corpus.txt").write_text("\n".join(f"{a} is not {b} and no ball is {a}, {b}" for a in words for b in words))
    tokenizer = train_wordpiece((tmp_path / "corpus.txt").read_text().splitlines() + ["a the"], vocab_size=80)
    tokenizer.save_pretrained(tmp_path / "mlm")
    families.build("bert", 4, head="MaskedLM", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "mlm")
    return tmp_path


def test_pairs_regression_and_given_teachers(pair_files, tmp_path):
    """A masked language model by name, pairs, scores instead of classes, a corpus file, STS-B's rule by hand."""
    recipe, own, args = settings(
        *("--train_file", str(pair_files / "train.csv"), "--validation_file", str(pair_files / "held.csv")),
        *("--general_teacher_name_or_path", str(pair_files / "mlm"), "--corpus_file", str(pair_files / "corpus.txt")),
        *("--output_dir", str(tmp_path / "out"), "--max_seq_length", "16", "--augmentation_copies", "3", "--cpu_threads", "1"),
        *("--student_config", '{"hidden_size": 16, "intermediate_size": 24}', "--seeds", "0"),
        *("--student_init", "random", "--report_to", "none"),
        *("--kd_weight", "1.0", "--task_weight", "0.0", "--baseline_steps", "2", "--save_strategy", "no", "--disable_tqdm", "true"),
    )
    own.stages[2] = {**own.stages[2], "data": "train"}
    results = recipe.main(own, args)
    assert results["metric"] == "pearson" and results["student_alone"]["steps"] == 2
    assert [stage["data"] for stage in results["stages"]] == ["corpus", "augmented", "train"]
    assert "general_teacher" not in results  # given, not trained
    cache = datasets.load_from_disk(str(next((tmp_path / "out/_arms/augmented").iterdir())))
    assert cache.column_names == ["sentence1", "sentence2", "source"] and 25 < len(cache) <= 100
    student = load_file(tmp_path / "out/model.safetensors")
    assert student["classifier.weight"].shape == (1, 16)
    assert all(torch.isfinite(value).all() for value in student.values())


def test_copies_have_no_label_and_originals_keep_theirs():
    recipe = load_recipe("tinybert")
    classes, scores = (SimpleNamespace(is_multi_label=False, is_regression=value, label_names=["a", "b"]) for value in (False, True))
    assert recipe.hidden_label(classes) == -100 and recipe.hidden_label(scores) != recipe.hidden_label(scores)
    labelled = datasets.Dataset.from_dict({"text": ["x"], "label": [1]}).cast_column("label", datasets.ClassLabel(names=["n", "y"]))
    transfer = datasets.Dataset.from_dict({"text": ["z"], "label": [-100]})
    assert recipe.join(labelled, transfer, ("text",))["label"][:] == [1, -100]
    assert recipe.join(labelled, transfer.select([]), ("text",))["text"][:] == ["x"]


@pytest.mark.parametrize(
    ("teacher", "student", "blocks"),
    [
        (12, 4, [2, 5, 8, 11]),  # g(m) = 3m, m = 1..4
        (12, 6, [1, 3, 5, 7, 9, 11]),  # g(m) = 2m
        (24, 6, [3, 7, 11, 15, 19, 23]),
        (4, 2, [1, 3]),
    ],
)
def test_layer_map_of_the_paper(teacher, student, blocks):
    assert resolve_layer_map("uniform", student, teacher) == list(enumerate(blocks))
    assert blocks == [teacher // student * m - 1 for m in range(1, student + 1)]


@pytest.mark.parametrize(
    ("task", "epochs", "copies", "length", "data"),
    [
        ("cola", 50, 30, 64, "augmented"),
        ("mnli", 10, 10, 128, "augmented"),
        ("mrpc", 20, 30, 128, "augmented"),
        ("qnli", 10, 20, 128, "augmented"),
        ("qqp", 10, 10, 128, "augmented"),
        ("rte", 20, 30, 128, "augmented"),
        ("sst2", 20, 20, 64, "augmented"),
        ("stsb", 20, 30, 128, "train"),
        (None, 20, 20, 128, "augmented"),
    ],
)
@pytest.mark.parametrize("config", ["glue_tinybert4.yaml", "glue_tinybert6.yaml", None])
def test_numbers_of_the_paper_for_each_task(config, task, epochs, copies, length, data, tmp_path):
    recipe = load_recipe("tinybert")
    flags = ["--config", str(CONFIGS / config)] if config else ["--output_dir", str(tmp_path)]
    own, args = parse(recipe.ARGUMENTS, [*flags, *(["--task_name", task] if task else [])])
    if config:
        own.task_name = task
    done = recipe.with_task_defaults(own, args)
    general, intermediate, prediction = done.stages
    assert (done.augmentation_copies, done.max_seq_length) == (copies, length)
    assert (intermediate["num_train_epochs"], prediction["num_train_epochs"], prediction["data"]) == (epochs, 3, data)
    assert (general["data"], general["teacher"], intermediate["data"]) == ("corpus", "general", "augmented")
    assert own.stages is None or own.stages[1].get("num_train_epochs") is None  # the user's own mapping is not changed


def test_own_numbers_win():
    recipe = load_recipe("tinybert")
    flags = ["--output_dir", "x", "--task_name", "cola", "--augmentation_copies", "1", "--max_seq_length", "32"]
    own, args = parse(recipe.ARGUMENTS, flags)
    own.stages = [{"name": "intermediate", "max_steps": 7}]
    done = recipe.with_task_defaults(own, args)
    assert (done.augmentation_copies, done.max_seq_length, done.stages) == (1, 32, [{"name": "intermediate", "max_steps": 7}])


@pytest.mark.parametrize(("name", "layers", "width"), [("glue_tinybert4", 4, 312), ("glue_tinybert6", 6, 768)])
def test_paper_sizes(name, layers, width):
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert (config["student_layers"], config["student_config"]["hidden_size"]) == (layers, width)
    assert config["student_config"]["num_attention_heads"] == 12 and config["student_init"] == "random"


def test_a_task_of_ones_own_needs_a_corpus(pair_files, tmp_path):
    files = ["--train_file", str(pair_files / "train.csv"), "--validation_file", str(pair_files / "held.csv")]
    recipe, own, args = settings(*files, "--output_dir", str(tmp_path / "o"))
    with pytest.raises(ValueError, match="needs a corpus.*--corpus_dataset_names"):
        recipe.main(own, args)
    with pytest.raises(ValueError, match="unknown key 'max_step' in general_teacher_training"):
        recipe.main(replace(own, general_teacher_training={"max_step": 3}), args)
