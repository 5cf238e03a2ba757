"""The recipe through its real `main`, a few steps, on real text and on files; its student in plain Transformers."""

import csv
import json
import os
import subprocess
import sys

import families
import pytest
import torch
import transformers
from recipes_under_test import ROOT, load_recipe
from safetensors.torch import load_file

from hfdistill import load_named, train_wordpiece
from hfdistill.cli import parse


CONFIG = str(ROOT / "recipes/configs/text_classification/stdlib_bert_kd.yaml")
QUICK = [
    "--max_steps",
    "3",
    "--per_device_train_batch_size",
    "16",
    "--max_seq_length",
    "16",
    "--vocab_size",
    "600",
    "--disable_tqdm",
    "true",
    "--logging_steps",
    "1",
    "--allow_weak_teacher",
    "true",
]


def settings(*flags):
    recipe = load_recipe("text_classification")
    return recipe, parse(recipe.ARGUMENTS, list(flags))


def run(*flags):
    recipe, parsed = settings(*flags)
    parsed[0].teacher_training = {**(parsed[0].teacher_training or {}), "max_steps": 3} if parsed[0].teacher_training else None
    return recipe.main(*parsed)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "stdlib"
    results = run("--config", CONFIG, "--output_dir", str(folder), "--seeds", "0", "1", *QUICK)
    return folder, results


def test_results_keep_the_contract(finished):
    folder, results = finished
    written = json.loads((folder / "results.json").read_text())
    assert written.keys() >= {
        "task",
        "metric",
        "seeds",
        "teacher",
        "student_alone",
        "student_distilled",
        "baselines",
        "agreement",
        "gap_closed",
        "objective",
        "versions",
        "config_sha256",
        "command",
        "seconds",
    }
    assert written["seeds"] == [0, 1] and len(written["student_alone"]["accuracy"]["values"]) == 2
    assert written["teacher"]["parameters"] > written["student_distilled"]["parameters"] == written["student_alone"]["parameters"]
    assert {"tfidf_logreg", "control", "majority"} <= written["baselines"].keys()
    assert [part["name"] for part in written["objective"]] == ["task", "kd"] and written["objective"][1]["temperature"] == 2.0
    assert written["seconds"].keys() >= {"teacher", "alone", "distilled"}
    assert 0 <= written["agreement"] <= 1


def test_folder_holds_student_picture_and_card_and_nothing_of_the_teacher(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "results.json", "results.png", "README.md", "tokenizer.json"} <= names
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    card = (folder / "README.md").read_text()
    assert "{" not in card.split("## Citations")[0]
    assert "knowledge-distillation" in card and "student distilled" in card and str(folder.parent) not in card
    student = load_file(folder / "model.safetensors")
    assert student["classifier.weight"].shape == (6, 64)


def test_student_loads_where_hfdistill_cannot_be_imported(finished):
    folder, _ = finished
    code = f"""
import sys
sys.modules["hfdistill"] = None
from transformers import AutoModelForSequenceClassification, pipeline
model, report = AutoModelForSequenceClassification.from_pretrained({str(folder)!r}, output_loading_info=True)
assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
answer = pipeline("text-classification", {str(folder)!r})("Open a socket and return the address of the peer.", truncation=True)
print(answer[0]["label"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    areas = ("concurrency", "data formats", "files and processes", "language tools", "network", "numbers and containers")
    assert done.stdout.strip().splitlines()[-1] in areas


def test_a_finished_run_is_read_back_and_another_one_refused(finished, capsys):
    folder, results = finished
    again = run("--config", CONFIG, "--output_dir", str(folder), "--seeds", "0", "1", *QUICK)
    assert "distilled_1 is finished already" in capsys.readouterr().out
    assert again["student_distilled"]["accuracy"] == results["student_distilled"]["accuracy"]
    assert again["agreement"] == results["agreement"]
    with pytest.raises(ValueError, match="holds a run with other settings"):
        run("--config", CONFIG, "--output_dir", str(folder), "--seeds", "0", *QUICK)


def test_a_killed_arm_goes_on_from_its_last_whole_checkpoint(tmp_path):
    from training import arguments, pad, ragged

    from hfdistill import DistillationTrainer, Run

    def finish(folder, stop_after=None):
        student, teacher = families.build("bert", 2, seed=1), families.build("bert", 4, seed=2, hidden_size=48)
        run_of = Run(arguments(folder), "a" * 64)
        args = arguments(run_of.folder("x"), max_steps=6, save_strategy="steps", save_steps=2, hidden_weight=1.0)
        trainer = DistillationTrainer(
            model=student, teacher=teacher, args=args, train_dataset=ragged("bert"), eval_dataset=ragged("bert"), data_collator=pad
        )
        if stop_after is not None:

            class Kill(transformers.TrainerCallback):
                def on_step_begin(self, args, state, control, **kwargs):
                    if state.global_step == stop_after:
                        raise KeyboardInterrupt

            trainer.add_callback(Kill())
        return run_of.finish("x", trainer)

    whole = finish(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        finish(tmp_path / "killed", stop_after=5)
    for step, state in ((5, None), (6, '{"epoch": 1.0, "global_st')):  # killed while saving, before the last file and in it
        half = tmp_path / f"killed/_arms/x/checkpoint-{step}"
        half.mkdir()
        (half / "distillation_state.safetensors").write_bytes(b"half")
        if state is not None:
            (half / "trainer_state.json").write_text(state)
            (half / "rng_state.pth").write_bytes(b"")
    resumed = finish(tmp_path / "killed")
    assert resumed.seconds is None and [log["step"] for log in resumed.log_history if "loss" in log] == [1, 2, 3, 4, 5, 6]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)


@pytest.fixture
def pair_files(tmp_path):
    """Pairs of sentences that say the same or not, with labels as words."""
    words = ["red", "green", "blue", "black", "white"]
    rows = [(a, b, "same" if a == b else "other") for a in words for b in words] * 2
    header = [("first", "second", "verdict")]
    return write_csv(tmp_path / "train.csv", header + rows), write_csv(tmp_path / "held.csv", header + rows[:25])


def pair_flags(files) -> list[str]:
    columns = ["--text_column_names", "first", "second", "--label_column_name", "verdict"]
    return ["--train_file", files[0], "--validation_file", files[1], *columns]


def save_teacher(folder, **options):
    """A tiny BERT teacher with a tokenizer beside it."""
    tokenizer = train_wordpiece(["red green blue black white", "the same colour or not"], vocab_size=60)
    teacher = families.build("bert", 2, seed=2, vocab_size=len(tokenizer), **options)
    teacher.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def accuracy_by_hand(folder, path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with open(path) as file:
        rows = list(csv.reader(file))[1:]
    right = 0
    for first, second, verdict in rows:
        with torch.no_grad():
            right += model.config.id2label[int(model(**tokenizer(first, second, return_tensors="pt")).logits.argmax())] == verdict
    return right / len(rows)


def test_pairs_from_files_with_a_teacher_by_name(tmp_path, pair_files):
    teacher = save_teacher(tmp_path / "teacher", num_labels=2, id2label={0: "same", 1: "other"}, label2id={"same": 0, "other": 1})
    results = run(
        "--teacher_model_name_or_path",
        teacher,
        *pair_flags(pair_files),
        "--student_layers",
        "1",
        "--output_dir",
        str(tmp_path / "out"),
        "--seeds",
        "4",
        "--hidden_weight",
        "1.0",
        "--attention_weight",
        "0.5",
        *QUICK,
    )
    # In sorted order the file's labels would be other, same; the teacher has them the other way round, and its order wins.
    student = json.loads((tmp_path / "out/config.json").read_text())
    assert student["id2label"] == {"0": "same", "1": "other"}
    assert results["teacher"]["accuracy"] == accuracy_by_hand(teacher, pair_files[1])
    assert results["seeds"] == [4] and results["gap_closed"] is None or isinstance(results["gap_closed"], float)
    assert [part["name"] for part in results["objective"]] == ["task", "kd", "hidden", "attention"]
    assert "| student block | teacher block |" in (tmp_path / "out/README.md").read_text().replace("Student", "student").replace(
        "Teacher", "teacher"
    )


def test_a_glue_task_has_its_columns_metrics_and_splits(tmp_path, monkeypatch):
    """MNLI as the Hub gives it: three ClassLabels, matched and mismatched validation, a test part whose labels are -1."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    names = ["entailment", "neutral", "contradiction"]
    features = Features(
        {"premise": Value("string"), "hypothesis": Value("string"), "label": ClassLabel(names=names), "idx": Value("int32")}
    )

    def split(rows, label=None):
        columns = {"premise": ["red green"] * rows, "hypothesis": ["blue", "red", "black"] * (rows // 3), "idx": list(range(rows))}
        return Dataset.from_dict({**columns, "label": [i % 3 if label is None else label for i in range(rows)]}, features=features)

    parts = {"train": split(30), "validation_matched": split(12), "validation_mismatched": split(9), "test_matched": split(3, -1)}
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *names, **options: asked.append(names) or DatasetDict(parts))
    teacher = save_teacher(
        tmp_path / "teacher", num_labels=3, id2label=dict(enumerate(names[::-1])), label2id={name: 2 - i for i, name in enumerate(names)}
    )
    results = run(
        "--task_name",
        "mnli",
        "--teacher_model_name_or_path",
        teacher,
        "--labelled_rows",
        "12",
        "--student_layers",
        "1",
        "--output_dir",
        str(tmp_path / "out"),
        "--seeds",
        "0",
        *QUICK,
    )
    assert asked == [("nyu-mll/glue", "mnli")] and results["metric"] == "accuracy"
    assert results["evaluation"].keys() == {"validation_matched", "validation_mismatched"}
    assert json.loads((tmp_path / "out/config.json").read_text())["id2label"]["0"] == "contradiction"  # the teacher's order
    assert results["baselines"]["tfidf_logreg"] == 1.0  # the hypothesis gives the label away: texts and labels still belong together


def test_regression_from_files(tmp_path):
    rows = [("text", "score")] + [(f"{'red ' * n}green", n / 4) for n in range(1, 9)] * 4
    train, held = write_csv(tmp_path / "a.csv", rows), write_csv(tmp_path / "b.csv", rows[:9])
    teacher = save_teacher(tmp_path / "teacher", num_labels=1)
    results = run(
        "--teacher_model_name_or_path",
        teacher,
        "--train_file",
        train,
        "--validation_file",
        held,
        "--label_column_name",
        "score",
        "--output_dir",
        str(tmp_path / "out"),
        "--seeds",
        "0",
        "--student_layers",
        "1",
        *QUICK,
    )
    assert results["metric"] == "pearson" and results["agreement"] is None


def test_other_data_in_the_same_file_is_another_run(tmp_path, pair_files):
    teacher = save_teacher(tmp_path / "teacher", num_labels=2)
    flags = [
        "--teacher_model_name_or_path",
        teacher,
        *pair_flags(pair_files),
        "--output_dir",
        str(tmp_path / "out"),
        "--seeds",
        "0",
        *QUICK,
    ]
    run(*flags)
    with open(pair_files[0]) as file:
        rows = list(csv.reader(file))
    write_csv(tmp_path / "train.csv", rows[:1] + rows[:0:-1])
    with pytest.raises(ValueError, match="holds a run with other settings, data, checkpoints or processes"):
        run(*flags)
    run(*flags, "--overwrite_output_dir", "true")
    run(*flags)  # the flag is no setting
    settings_of = tmp_path / "teacher/tokenizer_config.json"
    settings_of.write_text(settings_of.read_text().replace("{", '{"truncation_side": "left",', 1))
    with pytest.raises(ValueError, match="holds a run with other settings, data, checkpoints or processes"):
        run(*flags)


def test_a_student_by_name_keeps_its_tokenizer_and_others_are_refused_early(tmp_path, pair_files):
    student, teacher = save_teacher(tmp_path / "student", num_labels=2), tmp_path / "teacher"
    other = train_wordpiece(["quick brown fox", "jumps over"], vocab_size=60)
    families.build("bert", 2, num_labels=2, vocab_size=len(other)).save_pretrained(teacher)
    other.save_pretrained(teacher)
    flags = [
        "--model_name_or_path",
        student,
        *pair_flags(pair_files),
        "--seeds",
        "0",
        *QUICK,
    ]
    with pytest.raises(ValueError, match="Student and teacher tokenizers differ|The vocabularies differ"):
        run(*flags, "--teacher_model_name_or_path", str(teacher), "--output_dir", str(tmp_path / "refused"))
    assert not (tmp_path / "refused/_run.json").exists()
    small = json.dumps({"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32})
    run(*flags, "--teacher_config", small, "--output_dir", str(tmp_path / "out"))
    vocabularies = [json.loads((tmp_path / name / "tokenizer.json").read_text())["model"]["vocab"] for name in ("out", "student")]
    assert vocabularies[0] == vocabularies[1]


@pytest.mark.parametrize(
    "flags,words",
    [
        (
            ["--teacher_config", '{"num_hiden_layers": 1}'],
            "unknown key 'num_hiden_layers' in teacher_config. Did you mean 'num_hidden_layers'?",
        ),
        (["--teacher_training", '{"max_step": 3}'], "unknown key 'max_step' in teacher_training. Did you mean 'max_steps'?"),
        (["--resume_from_checkpoint", "x"], "resume_from_checkpoint is not needed: start the same command again"),
        (["--text_column_names", "nope"], "--text_column_names ['nope'] is about your own data, but none is given"),
        (["--teacher_model_name_or_path", "teachr"], "The teacher 'teachr' is neither a folder with a model nor a Hub id"),
        (["--model_name_or_path", "studnt"], "The tokenizer 'studnt' is neither a folder with a model nor a Hub id"),
    ],
)
def test_flags_that_cannot_work(tmp_path, flags, words):
    with pytest.raises(ValueError) as error:
        recipe, parsed = settings("--output_dir", str(tmp_path), *flags)
        recipe.main(*parsed)
    assert words in str(error.value)


def test_empty_cells_and_labels_only_in_validation(tmp_path):
    good = [("text", "label"), ("red", 0), ("green", 1), ("blue", 0)]
    train = write_csv(tmp_path / "a.csv", good)
    for rows, words in (
        ([*good, ("", 1)], "1 of 4 cells in column 'text' of the validation data are empty"),
        ([*good, ("black", 7)], r"labels that the training data lacks: \[7\]"),
    ):
        with pytest.raises(ValueError, match=words):
            load_named(files={"train": train, "validation": write_csv(tmp_path / "b.csv", rows)})


def test_a_weak_teacher_is_refused(tmp_path, pair_files):
    teacher = save_teacher(tmp_path / "teacher", num_labels=2, id2label={0: "other", 1: "same"}, label2id={"other": 0, "same": 1})
    flags = [
        "--teacher_model_name_or_path",
        teacher,
        *pair_flags(pair_files),
        "--output_dir",
        str(tmp_path / "out"),
        *QUICK[:-2],
    ]
    with pytest.raises(
        ValueError, match=r"^The teacher is right on 0\.\d+ of the held-out rows, and always answering the most frequent label on 0\.800"
    ):
        run(*flags)


@pytest.mark.parametrize("source", [{"task_name": "sst2"}, {"dataset_name": "stanfordnlp/imdb"}])
def test_data_that_cannot_be_reached(source):
    with pytest.raises(ValueError, match=r"could not be loaded from the Hub .* pass --train_file and --validation_file, or leave both out"):
        load_named(**source)


@pytest.mark.parametrize("regression", [False, True])
def test_hidden_labels_join_the_visible_ones(tmp_path, regression):
    from datasets import concatenate_datasets

    rows = [("text", "label")] + [(f"text {i}", i / 8 if regression else ("no", "yes")[i % 2]) for i in range(40)]
    path = write_csv(tmp_path / "a.csv", rows)
    data = load_named(files={"train": path, "validation": path}, labelled_rows=10)
    both = concatenate_datasets([data.labelled, data.transfer])
    assert len(data.labelled) == 10 and len(both) == 40 and len(data.teacher_train) == 40
    hidden = data.transfer["label"][:]
    assert all(label != label for label in hidden) if regression else set(hidden) == {-100}
    assert set(data.labelled["text"][:]) | set(data.transfer["text"][:]) == set(data.teacher_train["text"][:])


def test_true_and_false_are_two_classes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i}", "label": bool(i % 2)}) + "\n" for i in range(8)))
    data = load_named(files={"train": str(path), "validation": str(path)})
    assert data.labelled["label"][:] == [0, 1] * 4 and data.label_names == ["False", "True"]


def test_files_and_columns_that_are_not_there(tmp_path, pair_files):
    with pytest.raises(ValueError, match="^A data file does not exist"):
        load_named(files={"train": str(tmp_path / "nothing.csv")})
    with pytest.raises(ValueError, match=r"Which columns hold the text\? The data has \['first', 'second', 'verdict'\]"):
        load_named(files={"train": pair_files[0], "validation": pair_files[1]}, label_column_name="verdict")
    with pytest.raises(ValueError, match="^Unknown GLUE task 'sst'"):
        load_named(task_name="sst")


@pytest.mark.slow
def test_two_processes_train_the_student_of_one(tmp_path):
    """`accelerate launch` with the shipped configs: 2 x 8 rows a step give the weights of 1 x 16, and the same table."""
    students, tables = [], []
    still = [
        "--student_config",
        json.dumps(
            {
                "hidden_size": 32,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            }
        ),
    ]
    no_dropout = [
        "--teacher_config",
        json.dumps(
            {
                "num_hidden_layers": 2,
                "hidden_size": 32,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            }
        ),
    ]
    training = ["--teacher_training", json.dumps({"max_steps": 3, "learning_rate": 1e-3})]
    for name, rows in (("cpu", "16"), ("two_cpu", "8")):
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(ROOT / f"recipes/accelerate/{name}.yaml"),
            str(ROOT / "recipes/text_classification.py"),
            "--config",
            CONFIG,
            "--output_dir",
            str(tmp_path / name),
            "--seeds",
            "0",
            *QUICK,
            *still,
            *no_dropout,
            *training,
            "--per_device_train_batch_size",
            rows,
            "--cpu_threads",
            "1",
            "--hidden_weight",
            "1.0",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("== Teacher") == 1  # rank 0 alone speaks
        students.append(load_file(tmp_path / name / "model.safetensors"))
        tables.append(json.loads((tmp_path / name / "results.json").read_text()))
    for key, tensor in students[0].items():
        torch.testing.assert_close(students[1][key], tensor, rtol=1e-4, atol=1e-5)
    assert tables[1]["student_distilled"]["accuracy"]["mean"] == pytest.approx(tables[0]["student_distilled"]["accuracy"]["mean"], abs=0.01)


def test_several_labels_a_text(tmp_path):
    """Lists of names as labels: binary cross entropy and binary soft targets, micro F1, the student's config says so."""
    words = {"red": "apple rose", "green": "apple leaf", "big": "house tree"}
    rows = [
        {"text": f"the {' '.join(words[name].split()[i % 2] for name in names) or 'thing'} number {i}", "label": list(names)}
        for i in range(12)
        for names in (("red",), ("red", "green"), ("big", "green"), ())
    ]
    for name, part in (("train", rows), ("validation", rows[:16])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in part))
    files = ["--train_file", str(tmp_path / "train.jsonl"), "--validation_file", str(tmp_path / "validation.jsonl")]
    tiny = json.dumps({"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16})
    flags = [*files, "--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "run"), "--teacher_config", tiny]
    flags += (
        "--vocab_size 120 --student_layers 1 --max_steps 3 --learning_rate 1e-3 --seeds 0 --labelled_rows 24 --disable_tqdm true "
        "--allow_weak_teacher true --save_strategy no"
    ).split()
    results = run(*flags)
    assert results["metric"] == "f1" and 0 <= results["student_distilled"]["f1"]["mean"] <= 1
    assert {term["loss"] for term in results["objective"]} == {"task", "binary_soft_targets"}
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["problem_type"] == "multi_label_classification" and set(config["label2id"]) == {"red", "green", "big"}


def test_a_bert_teacher_gets_its_segments_under_a_distilbert_student(tmp_path, monkeypatch):
    """The student's tokenizer leaves token_type_ids out; without them the teacher would read both texts of a pair as the first."""
    import families
    from transformers import AutoTokenizer

    from hfdistill import DistillationTrainer, train_wordpiece

    tokenizer = train_wordpiece(["the rose is red and the leaf is green"] * 3, vocab_size=60)
    for family, name in (("bert", "teacher"), ("distilbert", "student")):
        families.build(family, 2, vocab_size=len(tokenizer), num_labels=2).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    settings_file = tmp_path / "student/tokenizer_config.json"
    own = {**json.loads(settings_file.read_text()), "model_input_names": ["input_ids", "attention_mask"]}
    settings_file.write_text(json.dumps(own))
    assert "token_type_ids" not in AutoTokenizer.from_pretrained(tmp_path / "student")("the rose", "red")
    rows = [{"sentence1": "the rose", "sentence2": "is red", "label": i % 2} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    seen, train = [], DistillationTrainer.train

    def noted(self, *args, **kwargs):
        teacher = self.teacher.model if self.teacher is not None else None
        if teacher is not None:
            teacher.register_forward_pre_hook(lambda _m, _a, inputs: seen.append(inputs.get("token_type_ids")), with_kwargs=True)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "train", noted)
    file = str(tmp_path / "train.jsonl")
    flags = ["--train_file", file, "--validation_file", file, "--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "run")]
    flags += ["--teacher_model_name_or_path", str(tmp_path / "teacher"), "--model_name_or_path", str(tmp_path / "student")]
    run(*flags, *"--max_steps 1 --seeds 0 --baselines false --allow_weak_teacher true --disable_tqdm true --save_strategy no".split())
    assert seen and all(ids is not None and ids[0].unique().tolist() == [0, 1] for ids in seen)
