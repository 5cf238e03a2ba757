"""The model card: its metadata parse back, its text says what was done, and nothing private is in it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import families
import pytest
from example_results import make_results
from huggingface_hub import ModelCard
from training import arguments, pad, ragged

from hfdistill import DistillationTrainer, build_student, hub, train_wordpiece
from hfdistill.citations import LOSS_PAPERS, PAPERS, citations_for
from hfdistill.hub import CARD_TAGS, CardContext, distillation_card, template_path
from hfdistill.losses import LOSSES
from hfdistill.report import results_rows


def context(**changes):
    return {
        "student_name": "docs6-student",
        "teacher_name": "org/teacher",
        "base_model": "org/teacher",
        "objective": [
            {"name": "task", "loss": "task", "weight": 0.3},
            {"name": "kd", "loss": "SoftTargetsLoss", "weight": 0.7, "options": {"temperature": 2.0}},
            {"name": "hidden", "loss": "hidden_mse", "weight": {"type": "linear", "start": 1.0, "end": 0.0}, "layer_map": [[0, 1], [1, 3]]},
        ],
        "layer_map_table": "| student | teacher |\n| ---: | ---: |\n| 0 | 1 |",
        "dataset": "documentation of the standard library",
        "hyperparameters": {"learning_rate": 3e-5, "max_steps": 220, "bf16": False, "lr_scheduler_type": "linear"},
        "results": results_rows(make_results()),
        "results_note": "With all labels distillation gives no gain here.",
        "metric_values": {"accuracy": 0.64},
        "pipeline_tag": "text-classification",
        "license": "apache-2.0",
        "language": "en",
        "tags": ["stdlib"],
        "versions": {"torch": "2.13.0"},
        **changes,
    }


def test_metadata_parses_back():
    card = distillation_card(context())
    data = ModelCard(str(card)).data
    assert data.to_dict() == card.data.to_dict()
    assert data.tags == [*CARD_TAGS, "stdlib"] and {"knowledge-distillation", "distillation", "hfdistill"} <= set(data.tags)
    assert data.base_model == "org/teacher" and data.base_model_relation == "finetune" and data.teacher_model == "org/teacher"
    assert (data.library_name, data.pipeline_tag, data.license, data.language) == (
        "transformers",
        "text-classification",
        "apache-2.0",
        "en",
    )
    assert data.metrics == ["accuracy"] and data.model_name == "docs6-student" and data.datasets is None
    (result,) = data.eval_results
    assert (result.task_type, result.metric_type, result.metric_value) == ("text-classification", "accuracy", 0.64)
    assert (result.dataset_name, result.dataset_type) == ("documentation of the standard library", "other")


def test_text():
    text = distillation_card(context()).text
    for line in (
        "# docs6-student",
        "| Teacher | org/teacher |",
        "| Student's weights start from | org/teacher |",
        "| name | loss | weight | temperature | layer_map |",
        "| kd | SoftTargetsLoss | 0.7 | 2 | – |",
        "| hidden | hidden_mse | type: linear, start: 1, end: 0 | – | 0:1, 1:3 |",
        "| `learning_rate` | 3e-05 |",
        "| `bf16` | False |",
        "| student distilled | 0.640 ± 0.010 | 233,350 | 0.93 | 0.81 | 0.500 | 0.750 |",
        "With all labels distillation gives no gain here.",
        'model = pipeline("text-classification", model="docs6-student")',
        "torch 2.13.0",
        "| 0 | 1 |",
    ):
        assert line in text.splitlines(), line
    assert hub.DEFAULT_LIMITS in text and "hinton2015distilling" in text and "jiao2020tinybert" in text and "sanh2019" not in text
    assert not re.search(r"\n{3,}|\{\{ |\{%|\bNone\b", text)


def test_the_least_card():
    card = distillation_card(CardContext("tiny", limits="Only for tests."))
    data = ModelCard(str(card)).data.to_dict()
    assert data == {"library_name": "transformers", "tags": list(CARD_TAGS)}
    assert "| Student's weights start from | random numbers |" in card.text and "Only for tests." in card.text
    for absent in ("Results", "Citations", "Hyperparameters", "Layer map", "How to use it", "Versions", "None"):
        assert absent not in card.text
    assert not re.search(r"\n{3,}", card.text)


def test_nothing_private(tmp_path):
    teacher = tmp_path / "teacher-folder"
    teacher.mkdir()
    card = str(
        distillation_card(
            context(
                student_name="/home/ana/runs/student",
                teacher_name=str(teacher),
                base_model=str(teacher),
                dataset="/home/ana/data/train.csv",
                hyperparameters={
                    "output_dir": Path("/home/ana/runs"),
                    "hub_token": "hf_abcdefghijklmnopqrstuv",
                    "command": "x --token SECRET",
                },
                results_note=f"Trained in {tmp_path} by C:\\Users\\ana\\x.",
                summary="See /home/ana/notes.md.",
            )
        )
    )
    for private in ("ana", str(tmp_path), tmp_path.parts[-2], "SECRET", "hf_abc", "C:\\"):
        assert private not in card, private
    data = ModelCard(card).data
    assert data.base_model is None and data.get("base_model_relation") is None  # a folder is nothing the Hub could link to
    assert data.teacher_model == "teacher-folder" and "| Student's weights start from | teacher-folder |" in card
    assert "| `output_dir` | runs |" in card and "See notes.md." in card


def test_local_folder_that_looks_like_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/teacher").mkdir(parents=True)
    assert distillation_card(context(base_model="runs/teacher")).data.base_model is None
    assert distillation_card(context(base_model=["runs/teacher", "org/other"])).data.base_model == "org/other"


def test_student_from_random_numbers_has_a_teacher_but_no_base():
    data = distillation_card(context(base_model=None)).data.to_dict()
    assert "base_model" not in data and "base_model_relation" not in data and data["teacher_model"] == "org/teacher"


def test_hub_dataset_and_repository():
    card = distillation_card(context(dataset_ids="glue", repo_id="ana/student", task_name="GLUE RTE"))
    assert card.data.datasets == ["glue"] and card.data.eval_results[0].dataset_type == "glue"
    assert card.data.eval_results[0].dataset_name == "GLUE RTE" and 'model="ana/student"' in card.text


def test_text_that_could_break_the_page():
    card = distillation_card(context(dataset="a | b: {{ 7 * 7 }} {% if %} #x", task_name="'quoted': \"x\"\n- y"))
    assert ModelCard(str(card)).data.eval_results[0].dataset_name == "'quoted': \"x\"\n- y"
    assert "{{ 7 * 7 }} {% if %}" in card.text and "49" not in card.text


def test_bad_contexts():
    with pytest.raises(ValueError, match="A model card has no place for 'techer_name'. Did you mean 'teacher_name'?"):
        distillation_card({"student_name": "x", "techer_name": "y"})
    with pytest.raises(ValueError, match="student_name is empty"):
        distillation_card(CardContext(""))


def test_template_in_checkout_and_wheel(tmp_path, monkeypatch):
    assert template_path().parts[-2:] == ("model_cards", "template.md") or template_path().name == "model_card_template.md"
    package = tmp_path / "site" / "hfdistill"
    package.mkdir(parents=True)
    monkeypatch.setattr(hub, "__file__", str(package / "hub.py"))
    with pytest.raises(FileNotFoundError, match="template of the model card is missing"):
        template_path()
    shutil.copy(Path(__file__).parent.parent / "model_cards" / "template.md", package / "model_card_template.md")
    assert template_path() == package / "model_card_template.md"
    assert "# docs6-student" in distillation_card(context()).text


def test_citations():
    assert set(LOSS_PAPERS) == {*LOSSES, "contrastive_pairs"}
    assert {paper for papers in LOSS_PAPERS.values() for paper in papers} == set(PAPERS)
    for name, loss in LOSSES.items():
        assert citations_for([loss.__name__]) == citations_for([name])
    assert [entry.split("{")[1].split(",")[0] for entry in citations_for(["logit_mse", "task", "soft_targets", "LogitMSELoss"])] == [
        "ba2014deep",
        "kim2021comparing",
        "hinton2015distilling",
    ]
    for entry in PAPERS.values():
        assert entry.count("{") == entry.count("}") and entry.startswith("@") and " title = {" in entry and " year = {" in entry


def test_rendering_needs_no_network():
    """`no_network` of conftest makes any connection an error; a card with Hub names everywhere must not open one."""
    assert distillation_card(context(dataset_ids=["glue"], repo_id="org/student")).data.base_model == "org/teacher"


@pytest.mark.parametrize(
    "tag, head",
    [
        ("text-classification", "SequenceClassification"),
        ("token-classification", "TokenClassification"),
        ("question-answering", "QuestionAnswering"),
        ("fill-mask", "MaskedLM"),
        ("feature-extraction", "MaskedLM"),
    ],
)
def test_the_code_on_the_card_runs(tmp_path, tag, head):
    tokenizer = train_wordpiece(["What does it return? Reads a line. Returns the text of it."], vocab_size=families.VOCAB)
    options = {"num_labels": 2} if head.endswith(("Classification", "Answering")) else {}
    model = families.build("bert", 1, head=head, vocab_size=len(tokenizer), **options)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "student")
    code = re.search(r"```python\n(.*?)```", distillation_card(context(student_name="student", pipeline_tag=tag)).text, re.S)[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    if tag == "question-answering":  # whatever random weights answer stands in the context
        assert done.stdout.strip() and done.stdout.strip() in "reads a line. returns the text of it."


@pytest.mark.parametrize("copied, words", [(True, "its teacher: embeddings, head and block 0"), (False, "random numbers")])
def test_what_the_weights_start_from_where_the_teacher_has_no_name(tmp_path, copied, words):
    teacher, data = families.build("bert", 2), ragged("bert")
    student = build_student(teacher, num_hidden_layers=1, layer_map="first", copy_weights=copied)
    trainer = DistillationTrainer(student, arguments(tmp_path), train_dataset=data, data_collator=pad, teacher=teacher)
    trainer.create_model_card()
    assert f"| Student's weights start from | {words} |" in (tmp_path / "README.md").read_text()
