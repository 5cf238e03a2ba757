"""What is logged and what evaluation does: parts add up, the student runs alone, predictions are lean."""

import families
import numpy as np
import pytest
import torch
from training import ALL_TERMS, Rows, arguments, pad, ragged, run

from hfdistill import DistillationTrainer


# ---- Logging ----


def test_weighted_parts_sum_to_the_loss_and_schedules_are_logged(tmp_path):
    student, teacher = families.build("bert", 2, seed=1), families.build("bert", 4, seed=2)
    schedules = {
        "kd_weight": {"type": "linear", "start": 1.0, "end": 0.0},
        "temperature": {"type": "step", "start": 4.0, "end": 2.0, "over": [0.0, 0.5]},
    }
    args = arguments(
        tmp_path,
        max_steps=4,
        logging_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        schedules=schedules,
        **ALL_TERMS,
    )
    trainer, _ = run(student, teacher, ragged("bert"), args)
    for log in [log for log in trainer.state.log_history if "loss" in log]:
        assert sum(value for key, value in log.items() if key.endswith("_weighted")) == pytest.approx(log["loss"], rel=1e-4)
    logs = trainer.state.log_history
    assert [log["kd_weight"] for log in logs[:2]] == [0.75, 0.25] and [log["kd_temperature"] for log in logs[:2]] == [4.0, 2.0]
    assert args.kd_weight == ALL_TERMS["kd_weight"] and args.temperature == 2.0


# ---- Evaluation ----


def test_evaluation_runs_the_student_alone_and_returns_logits_only(tmp_path):
    student, teacher = families.build("bert", 2, seed=1), families.build("bert", 4, seed=2)
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    seen = []

    def metrics(prediction):
        seen.append(prediction)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    data = ragged("bert", rows=7)
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        args=arguments(tmp_path, per_device_eval_batch_size=3, **ALL_TERMS),
        train_dataset=ragged("bert"),
        eval_dataset=data,
        data_collator=pad,
        compute_metrics=metrics,
    )
    calls.clear()
    result = trainer.evaluate()
    assert not calls and isinstance(seen[0].predictions, np.ndarray) and seen[0].predictions.shape == (7, 3)
    with torch.no_grad():
        logits = student(data.batch["input_ids"], data.batch["attention_mask"]).logits
        expected = torch.nn.functional.cross_entropy(logits, data.batch["labels"])
    assert result["eval_loss"] == pytest.approx(float(expected), rel=1e-5)  # exact, though the last batch holds one row
    assert "eval_accuracy" in result


def test_evaluation_with_the_teacher_reports_every_part(tmp_path):
    student, teacher = families.build("bert", 2, seed=1), families.build("bert", 4, seed=2)
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        args=arguments(tmp_path, eval_with_teacher=True, per_device_eval_batch_size=3, **ALL_TERMS),
        train_dataset=ragged("bert"),
        eval_dataset=ragged("bert", rows=7),
        data_collator=pad,
    )
    result = trainer.evaluate()
    weights = {"task": 0.5, "kd": 0.7, "logit_mse": 0.1, "hidden": 0.3, "embedding": 0.2, "cosine": 0.4, "attention": 0.6}
    assert result["eval_loss"] == pytest.approx(sum(w * result[f"eval_{name}"] for name, w in weights.items()), rel=1e-6)


def test_vocabularies_are_reduced_to_the_best_token_in_evaluation(tmp_path):
    student = families.build("bert", 2, seed=1, head="MaskedLM")
    data = ragged("bert")
    data.batch["labels"] = data.batch["input_ids"].masked_fill(data.batch["attention_mask"] == 0, -100)
    shapes = []
    trainer = DistillationTrainer(
        model=student,
        args=arguments(tmp_path, kd_weight=0.0),
        train_dataset=data,
        eval_dataset=data,
        data_collator=pad,
        compute_metrics=lambda p: shapes.append(p.predictions.shape) or {},
    )
    trainer.evaluate()
    assert shapes == [(8, 9)]


def test_prediction_without_labels_drops_what_only_the_teacher_reads(tmp_path):
    student, teacher = families.build("distilbert", 2, seed=1), families.build("bert", 4, seed=2)
    trainer = DistillationTrainer(
        model=student, teacher=teacher, args=arguments(tmp_path), train_dataset=ragged("distilbert"), data_collator=pad
    )
    batch = families.batch("bert", labels=False)
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    assert trainer.predict(Rows(batch)).predictions.shape == (3, 3)


def test_without_training_data_labels_are_not_asked_for(tmp_path):
    data = Rows(families.batch("bert", labels=False))
    trainer = DistillationTrainer(
        model=families.build("bert", 2), args=arguments(tmp_path, task_weight=1.0, kd_weight=0.0), eval_dataset=data, data_collator=pad
    )
    assert trainer.predict(data).predictions.shape == (3, 3)
