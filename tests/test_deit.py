"""DeiT with its two heads under the trainer: the class head learns labels, the distillation head the teacher, inference is their mean."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import vision_families as vision
from torch.nn.functional import cross_entropy, kl_div
from training import Rows, arguments, run
from transformers import AutoModelForImageClassification, DeiTForImageClassificationWithTeacher

from hfdistill import DistillationTrainer, Term


def student(seed: int = 1):
    return vision.build("deit", 1, seed=seed, head="ForImageClassificationWithTeacher")


def setup(tmp_path, objective, **options):
    data = Rows(vision.batch(32, rows=8))
    return run(student(), vision.build("vit", 2, seed=2), data, arguments(tmp_path, **options), objective=objective)


def heads(gradients: dict) -> set[str]:
    return {name.split(".")[0] for name, gradient in gradients.items() if "classifier" in name and gradient.abs().sum() > 0}


def test_each_term_reaches_its_own_head(tmp_path):
    later = {"type": "step", "start": 0.0, "end": 1.0, "over": [0.9, 1.0]}  # there, and not yet of weight
    _, gradients = setup(tmp_path, [Term("task"), Term("soft_targets", weight=later)])
    assert heads(gradients[0]) == {"cls_classifier"}
    for loss in ("hard_targets", "soft_targets"):
        _, gradients = setup(tmp_path, [Term(loss)])
        assert heads(gradients[0]) == {"distillation_classifier"}


def test_without_a_teacher_labels_train_what_answers(tmp_path):
    """The mean of both heads is the answer: an untrained head in it would make the student alone look worse than it is."""
    trainer, gradients = run(student(), None, Rows(vision.batch(32, rows=8)), arguments(tmp_path), objective=[Term("task")])
    assert heads(gradients[0]) == {"cls_classifier", "distillation_classifier"}
    assert trainer.predict(Rows(vision.batch(32, rows=8))).predictions.shape == (8, 3)


@pytest.mark.parametrize("loss", ["hard_targets", "soft_targets"])
def test_the_logged_loss_is_that_of_the_paper(loss, tmp_path):
    """Touvron et al. 2021, equations 2 and 3, by hand: 0.5 CE(class head, labels) + 0.5 CE or T^2 KL (distillation head, teacher)."""
    model, teacher, batch = student().train(), vision.build("vit", 2, seed=2), vision.batch(32, rows=8)
    with torch.no_grad():
        out, target = model(pixel_values=batch["pixel_values"]), teacher(pixel_values=batch["pixel_values"]).logits
    if loss == "hard_targets":
        second = cross_entropy(out.distillation_logits, target.argmax(-1))
    else:
        logs = (out.distillation_logits / 3).log_softmax(-1), (target / 3).log_softmax(-1)
        second = 9 * kl_div(*logs, reduction="batchmean", log_target=True)
    expected = 0.5 * cross_entropy(out.cls_logits, batch["labels"]) + 0.5 * second
    trainer, _ = setup(tmp_path, [Term("task", weight=0.5), Term(loss, weight=0.5)], temperature=3.0)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_evaluation_measures_the_mean_of_both_heads(tmp_path):
    trainer, _ = setup(tmp_path, [Term("task", weight=0.5), Term("hard_targets", weight=0.5)], max_steps=3)
    batch = vision.batch(32, rows=8, seed=5)
    output = trainer.predict(Rows(batch))
    with torch.no_grad():
        out = trainer.model.eval()(pixel_values=batch["pixel_values"])
    mean = (out.cls_logits + out.distillation_logits) / 2
    torch.testing.assert_close(torch.from_numpy(output.predictions), mean)
    assert output.metrics["test_loss"] == pytest.approx(cross_entropy(mean, batch["labels"]).item(), rel=1e-5)


def test_the_student_loads_as_plain_deit_in_a_new_process(tmp_path):
    trainer, _ = setup(tmp_path, [Term("task", weight=0.5), Term("hard_targets", weight=0.5)])
    trainer.save_model(str(tmp_path / "student"))
    batch = vision.batch(32, rows=2)
    torch.save(batch["pixel_values"], tmp_path / "images.pt")
    code = (
        "import sys, torch; from transformers import AutoModelForImageClassification as A; "
        "m, info = A.from_pretrained(sys.argv[1], output_loading_info=True); assert not any(info.values()), info; "
        "x = torch.load(sys.argv[2], weights_only=True); "
        "print(type(m).__name__, m.eval()(pixel_values=x).logits.argmax(-1).tolist(), 'hfdistill' in sys.modules)"
    )
    paths = [str(tmp_path / "student"), str(tmp_path / "images.pt")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    with torch.no_grad():
        expected = trainer.model.eval()(pixel_values=batch["pixel_values"]).logits.argmax(-1).tolist()
    assert done.stdout.strip() == f"DeiTForImageClassificationWithTeacher {expected} False", done.stderr
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path / "student")) is DeiTForImageClassificationWithTeacher


def test_a_deit_of_two_heads_as_the_teacher_answers_with_their_mean(tmp_path):
    teacher, batch = student(seed=4), vision.batch(32, rows=8)
    model = vision.build("vit", 1, seed=1).train()
    with torch.no_grad():
        out, own = teacher(pixel_values=batch["pixel_values"]), model(pixel_values=batch["pixel_values"]).logits
    target = ((out.cls_logits + out.distillation_logits) / 2 / 2).softmax(-1)
    expected = 4 * kl_div((own / 2).log_softmax(-1), target, reduction="batchmean")
    trainer = DistillationTrainer(model, arguments(tmp_path), teacher=teacher, train_dataset=Rows(batch), objective=[Term("soft_targets")])
    trainer.train()
    assert trainer.state.log_history[0]["soft_targets"] == pytest.approx(expected.item(), rel=1e-4)


def test_a_teacher_given_by_name(tmp_path):
    vision.build("resnet").save_pretrained(tmp_path / "teacher")
    model = vision.build("deit", 1, head="ForImageClassificationWithTeacher", image_size=64)
    trainer = DistillationTrainer(
        model,
        arguments(tmp_path),
        teacher=str(tmp_path / "teacher"),
        train_dataset=Rows(vision.batch(64)),
        objective=[Term("hard_targets")],
    )
    assert type(trainer.teacher.model).__name__ == "ResNetForImageClassification"


def test_predictions_are_one_array_with_labels_and_without(tmp_path):
    trainer, _ = setup(tmp_path, [Term("task"), Term("hard_targets")])
    batch = vision.batch(32, rows=8)
    labelled = trainer.predict(Rows(batch)).predictions
    del batch["labels"]
    assert torch.equal(torch.from_numpy(trainer.predict(Rows(batch)).predictions), torch.from_numpy(labelled))


def test_the_task_loss_of_evaluation_does_not_depend_on_the_teacher(tmp_path):
    terms, data = [Term("task"), Term("soft_targets")], Rows(vision.batch(32, rows=8))
    plain, _ = setup(tmp_path, terms)
    full, _ = setup(tmp_path, terms, eval_with_teacher=True)
    assert full.evaluate(data)["eval_task"] == pytest.approx(plain.evaluate(data)["eval_loss"], rel=1e-6)
