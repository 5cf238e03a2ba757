"""What the trainer promises: every family trains, the teacher is left alone, resume is exact, logs add up, evaluation is lean."""

import copy
import json
import subprocess
import sys

import families
import numpy as np
import pytest
import torch
from training import ALL_TERMS, Rows, arguments, pad, ragged, run, without_dropout
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hfdistill import DistillationLoss, DistillationTrainer, Signals, Term
from hfdistill.losses.base import LossValue


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---- Every family, every term ----


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_step_with_all_terms_moves_every_parameter_and_nothing_of_the_teacher(family, tmp_path):
    student, teacher = families.build(family, 2, seed=1), families.build(family, 4, seed=2)
    before, frozen = state(student), state(teacher)
    trainer, steps = run(student, teacher, ragged(family), arguments(tmp_path, max_steps=2, **ALL_TERMS))
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, frozen[name]), name
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters()) and not teacher.training
    still = [n for n, p in student.named_parameters() if torch.equal(p, before[n]) and p.numel() > 0]
    assert not [name for name in still if name not in unused_by(family, student)], still
    logs = trainer.state.log_history[0]
    for name in ("task", "kd", "logit_mse", "hidden", "embedding", "cosine", "attention"):
        assert np.isfinite(logs[name]) and logs[name] > 0, name


def unused_by(family, model):
    """Parameters that the architecture itself does not use in this head or with these inputs."""
    return [n for n, _ in model.named_parameters() if family == "deberta_v2" and "token_type" in n or "mask_token" in n]


PAIRS = [
    ("distilbert", "bert"),
    ("bert", "roberta"),
    ("roberta", "electra"),
    ("llama", "gpt2"),
    ("qwen3", "llama"),
    ("deberta_v2", "bert"),
    ("bert", "modernbert"),
]


@pytest.mark.parametrize("student_family,teacher_family", PAIRS)
def test_teacher_and_student_may_be_of_different_families(student_family, teacher_family, tmp_path):
    student, teacher = families.build(student_family, 2, seed=1), families.build(teacher_family, 4, seed=2)
    trainer, steps = run(student, teacher, ragged(student_family), arguments(tmp_path, **ALL_TERMS))
    assert trainer.state.log_history[0]["attention"] > 0 and torch.isfinite(torch.tensor(trainer.state.log_history[0]["loss"]))


def test_student_equal_to_teacher_gives_zero(tmp_path):
    teacher = families.build("bert", 3, seed=2)
    student = families.build("bert", 3, seed=2, **without_dropout("bert"))
    weights = {**ALL_TERMS, "task_weight": 0.0}
    trainer, _ = run(student, teacher, ragged("bert"), arguments(tmp_path, layer_map="0:0,1:1,2:2", **weights))
    logs = trainer.state.log_history[0]
    for name in ("kd", "logit_mse", "hidden", "embedding", "cosine", "attention", "loss"):
        assert abs(logs[name]) < 1e-6, name


# ---- A plain Trainer where there is no teacher ----


def test_without_a_teacher_it_is_the_stock_trainer(tmp_path):
    results = []
    for cls, kind in ((Trainer, TrainingArguments), (DistillationTrainer, None)):
        student = families.build("vit", 2, seed=1)
        if kind is None:
            args = arguments(tmp_path, max_steps=3, per_device_train_batch_size=4, task_weight=1.0, kd_weight=0.0)
        else:
            args = TrainingArguments(
                str(tmp_path),
                use_cpu=True,
                per_device_train_batch_size=4,
                max_steps=3,
                learning_rate=1e-3,
                max_grad_norm=0.0,
                logging_steps=1,
                lr_scheduler_type="constant",
                train_sampling_strategy="sequential",
                save_strategy="no",
                disable_tqdm=True,
                seed=3,
                dataloader_pin_memory=False,
            )
        trainer = cls(model=student, args=args, train_dataset=ragged("vit"), eval_dataset=ragged("vit", seed=5), data_collator=pad)
        trainer.train()
        results.append((state(student), [log["loss"] for log in trainer.state.log_history[:3]], trainer.evaluate()["eval_loss"]))
    for name, tensor in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], tensor, rtol=1e-5, atol=1e-7)
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-4) and results[1][2] == pytest.approx(results[0][2], rel=1e-4)


def test_hooks_of_the_stock_trainer_still_have_our_signatures():
    import inspect

    for name in (
        "compute_loss",
        "get_batch_samples",
        "training_step",
        "prediction_step",
        "evaluation_loop",
        "create_optimizer",
        "log",
        "_clip_grad_norm",
        "_save_checkpoint",
        "_load_from_checkpoint",
        "_load_best_model",
        "call_model_init",
        "floating_point_ops",
        "_set_signature_columns_if_needed",
        "create_model_card",
    ):
        ours, theirs = (list(inspect.signature(getattr(cls, name)).parameters) for cls in (DistillationTrainer, Trainer))
        assert ours == theirs, name
    ours, theirs = (list(inspect.signature(cls.__init__).parameters) for cls in (DistillationTrainer, Trainer))
    assert ours[: len(theirs)] == theirs


# ---- Teacher ----


def test_teacher_is_put_back_into_eval_mode_before_every_forward(tmp_path):
    teacher = families.build("bert", 4, seed=2)

    class Vandal(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            teacher.train()

    logs = []
    for callbacks in ([], [Vandal()]):
        student = families.build("bert", 2, seed=1)
        trainer, _ = run(student, teacher, ragged("bert"), arguments(tmp_path, max_steps=2), callbacks=callbacks)
        logs.append([log["kd"] for log in trainer.state.log_history[:2]])
    assert logs[0] == logs[1] and not teacher.training


def test_token_type_ids_reach_a_bert_teacher_behind_a_distilbert_student(tmp_path):
    from datasets import Dataset

    teacher = families.build("bert", 2, seed=2)
    student = families.build("distilbert", 2, seed=1, **without_dropout("distilbert"))
    with torch.no_grad():
        teacher.classifier.weight.mul_(100)  # a tiny random model is nearly uniform: its KL would be rounding
    batch = families.batch("bert", rows=3)
    batch["token_type_ids"] = torch.ones_like(batch["input_ids"])
    batch["text"] = ["a", "b", "c"]
    data = Dataset.from_dict({k: v if isinstance(v, list) else v.tolist() for k, v in batch.items()})
    trainer, _ = run(student, teacher, data, arguments(tmp_path, temperature=1.0), data_collator=None)
    with torch.no_grad():
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
        p = teacher(**inputs).logits.softmax(-1)
        fresh = families.build("distilbert", 2, seed=1)
        q = fresh(batch["input_ids"], batch["attention_mask"]).logits.softmax(-1)
        wrong = teacher(batch["input_ids"], batch["attention_mask"]).logits.softmax(-1)
    kd = float((p * (p / q).log()).sum(-1).mean())
    assert trainer.state.log_history[0]["kd"] == pytest.approx(kd, rel=1e-4)
    assert kd != pytest.approx(float((wrong * (wrong / q).log()).sum(-1).mean()), rel=1e-2)


def test_teacher_batch_size_dtype_and_function(tmp_path):
    values = {}
    teacher = families.build("bert", 4, seed=2)

    def answer(batch):
        with torch.no_grad():
            return Signals(logits=teacher(batch["input_ids"], batch["attention_mask"]).logits)

    for name, who, options in (
        ("plain", teacher, {}),
        ("cut", teacher, {"teacher_batch_size": 3}),
        ("function", answer, {}),
        ("half", copy.deepcopy(teacher), {"teacher_dtype": "bfloat16"}),
    ):
        student = families.build("bert", 2, seed=1)
        trainer, _ = run(student, who, ragged("bert"), arguments(tmp_path, **options))
        values[name] = trainer.state.log_history[0]["kd"]
    assert values["cut"] == pytest.approx(values["plain"], rel=1e-4) and values["function"] == pytest.approx(values["plain"], rel=1e-4)
    assert values["half"] == pytest.approx(values["plain"], rel=0.5) and values["half"] != values["plain"]


def test_teacher_labels_are_matched_by_name(tmp_path):
    names = ["negative", "neutral", "positive"]
    order = [2, 0, 1]
    kd = []
    for permuted in (False, True):
        student, teacher = families.build("bert", 2, seed=1), families.build("bert", 4, seed=2)
        student.config.id2label, student.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
        shown = [names[i].upper() for i in order] if permuted else names
        teacher.config.id2label, teacher.config.label2id = dict(enumerate(shown)), {n: i for i, n in enumerate(shown)}
        if permuted:
            with torch.no_grad():
                teacher.classifier.weight.copy_(teacher.classifier.weight[order].clone())
                teacher.classifier.bias.copy_(teacher.classifier.bias[order].clone())
        trainer, _ = run(student, teacher, ragged("bert"), arguments(tmp_path))
        kd.append(trainer.state.log_history[0]["kd"])
    assert kd[0] == pytest.approx(kd[1], rel=1e-5)


def test_vocabulary_padding_is_cut_when_the_tokenizers_agree(tmp_path):
    from hfdistill.data.tokenizer import train_wordpiece

    tokenizer = train_wordpiece(["to be or not to be that is the question"], vocab_size=60)
    values = []
    for size in (families.VOCAB, families.VOCAB + 7):
        student = families.build("bert", 2, seed=1, head="MaskedLM")
        teacher = families.build("bert", 2, seed=2, head="MaskedLM")
        teacher.resize_token_embeddings(size)
        data = ragged("bert")
        data.batch["labels"] = data.batch["input_ids"].masked_fill(data.batch["attention_mask"] == 0, -100)
        trainer, _ = run(
            student, teacher, data, arguments(tmp_path), processing_class=tokenizer, teacher_processing_class=copy.deepcopy(tokenizer)
        )
        assert trainer.objective.vocabulary == (None if size == families.VOCAB else families.VOCAB)
        values.append(trainer.state.log_history[0]["kd"])
    assert values[0] == pytest.approx(values[1], rel=1e-3)


# ---- Saving and resuming ----


OPTIONS = dict(
    max_steps=6,
    save_strategy="steps",
    save_steps=3,
    layer_map="random",
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    train_sampling_strategy="random",
    max_grad_norm=1.0,
    lr_scheduler_type="linear",
    num_train_epochs=3,
    schedules={"kd_weight": {"type": "linear", "start": 1.0, "end": 0.1}, "temperature": {"type": "cosine", "start": 4.0, "end": 1.0}},
    **ALL_TERMS,
)


def test_resume_equals_uninterrupted_training(tmp_path):
    """Adapters, schedules, random layer maps, dropout and shuffling included; checkpoints hold the student alone."""

    def models():
        return families.build("bert", 2, seed=1), families.build("bert", 4, seed=2, hidden_size=48)

    student, teacher = models()
    whole, _ = run(student, teacher, ragged("bert"), arguments(tmp_path / "whole", **OPTIONS))
    again, teacher = models()
    resumed, _ = run(again, teacher, ragged("bert"), arguments(tmp_path / "whole", **OPTIONS), resume=str(tmp_path / "whole/checkpoint-3"))
    assert resumed.state.global_step == 6
    for name, tensor in student.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    for name, tensor in whole.objective.state_dict().items():
        assert torch.equal(resumed.objective.state_dict()[name], tensor), name
    drop = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")
    histories = [[{k: v for k, v in log.items() if k not in drop} for log in t.state.log_history[:6]] for t in (whole, resumed)]
    assert histories[0] == histories[1]
    assert any(True for _ in whole.objective.parameters())
    files = {path.name for path in (tmp_path / "whole/checkpoint-3").iterdir()}
    assert "distillation_state.safetensors" in files and "training_args.bin" not in files
    fresh = families.build("bert", 2)
    from safetensors.torch import load_file

    assert load_file(tmp_path / "whole/checkpoint-3/model.safetensors").keys() <= fresh.state_dict().keys()


def test_random_layer_maps_change_from_step_to_step(tmp_path):
    student, teacher = families.build("bert", 2, seed=1), families.build("bert", 6, seed=2)
    trainer, _ = run(student, teacher, ragged("bert"), arguments(tmp_path, layer_map="random", hidden_weight=1.0))
    maps = [tuple(trainer.objective.pairs_at(step)["hidden"]) for step in range(8)]
    assert len(set(maps)) > 1 and maps == [tuple(trainer.objective.pairs_at(step)["hidden"]) for step in range(8)]


def test_similar_layer_map_is_kept_on_resume(tmp_path, monkeypatch):
    """The map is chosen on the untrained student; another student, or a trained one, might choose another."""
    options = dict(max_steps=4, save_strategy="steps", save_steps=2, layer_map="similar", hidden_weight=1.0, attention_weight=1.0)
    student, teacher = families.build("bert", 2, seed=1), families.build("bert", 4, seed=2)
    first, _ = run(student, teacher, ragged("bert"), arguments(tmp_path, **options))
    chosen = first.objective.terms["hidden"].pairs
    another = [(0, 0), (1, 3)] if chosen != [(0, 0), (1, 3)] else [(0, 1), (1, 2)]
    monkeypatch.setattr("hfdistill.binding.similar_layer_map", lambda *_: another)
    other = families.build("bert", 2, seed=9)
    resume = str(tmp_path / "checkpoint-2")
    second, _ = run(other, families.build("bert", 4, seed=2), ragged("bert"), arguments(tmp_path, **options), resume=resume)
    assert second.objective.terms["hidden"].pairs == chosen != another
    for name, tensor in student.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_saved_student_loads_where_hfdistill_cannot_be_imported(tmp_path):
    student, teacher = families.build("bert", 2, seed=1), families.build("bert", 4, seed=2, hidden_size=48)
    trainer, _ = run(student, teacher, ragged("bert"), arguments(tmp_path, **ALL_TERMS))
    trainer.save_model(str(tmp_path / "final"))
    code = f"""
import sys
sys.modules["hfdistill"] = None
from transformers import AutoModelForSequenceClassification
model, report = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "final")!r}, output_loading_info=True)
assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
import torch
print(model(torch.tensor([[5, 6, 7]])).logits.tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = student.eval()(torch.tensor([[5, 6, 7]])).logits.tolist()
    assert np.allclose(json.loads(done.stdout.strip().splitlines()[-1]), expected, atol=1e-6)


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


# ---- Objectives in Python and YAML ----


class Difference(DistillationLoss):
    """A user's own loss: mean absolute difference of logits."""

    signal = "logits"

    def compute(self, student, teacher, mask):
        return LossValue((student - teacher).abs().mean(-1).sum(), torch.tensor(student.size(0)))


def test_objective_as_a_list_of_terms(tmp_path):
    student, teacher = families.build("bert", 2, seed=1, hidden_size=16), families.build("bert", 4, seed=2)
    terms = [
        Term("task", weight=0.2),
        Term(Difference(), weight=1.5),
        Term("hidden_mse", weight={"type": "linear", "start": 1.0, "end": 0.5}, layer_map="0:0,0:1,1:3", adapter="mlp", name="early"),
        Term("cosine", signal="pooled", name="summary"),
    ]
    trainer, steps = run(student, teacher, ragged("bert"), arguments(tmp_path), objective=terms)
    logs = trainer.state.log_history[0]
    assert {"task", "Difference", "early", "summary", "early_weight"} <= logs.keys()
    assert len(trainer.objective.terms["early"].adapters) == 3
    assert [t["name"] for t in trainer.objective.describe()] == ["task", "Difference", "early", "summary"]
    json.dumps(trainer.objective.describe())
    as_yaml = [{"loss": "task", "weight": 0.2}, {"loss": "soft_targets", "weight": 0.5, "temperature": 4.0}]
    trainer, _ = run(families.build("bert", 2), teacher, ragged("bert"), arguments(tmp_path, objective=as_yaml))
    assert trainer.objective.terms["soft_targets"].loss.temperature == 4.0


@pytest.mark.parametrize("problem,loss", [("multi_label_classification", "BinarySoftTargetsLoss"), ("regression", "RegressionMSELoss")])
def test_soft_targets_follow_the_problem_type(problem, loss, tmp_path):
    student, teacher = families.build("bert", 2, seed=1), families.build("bert", 4, seed=2)
    for model in (student, teacher):
        model.config.problem_type = problem
    data = ragged("bert")
    data.batch["labels"] = torch.rand(8, 3).round()
    trainer, _ = run(student, teacher, data, arguments(tmp_path))
    assert type(trainer.objective.terms["kd"].loss).__name__ == loss


def test_problem_type_is_found_from_float_labels_and_kept_in_the_config(tmp_path):
    student = families.build("bert", 2, seed=1)
    data = ragged("bert")
    data.batch["labels"] = torch.rand(8, 3).round()
    run(student, None, data, arguments(tmp_path, kd_weight=0.0))
    assert student.config.problem_type == "multi_label_classification"


def test_model_init_gives_each_trial_its_own_objective(tmp_path):
    teacher = families.build("bert", 4, seed=2, hidden_size=48)
    trainer = DistillationTrainer(
        model_init=lambda: families.build("bert", 2, seed=1),
        teacher=teacher,
        args=arguments(tmp_path, hidden_weight=1.0),
        train_dataset=ragged("bert"),
        data_collator=pad,
    )
    first = trainer.objective
    trainer.train()
    assert trainer.objective is not first and trainer.student.model is trainer.model
    weight = first.terms["hidden"].adapters[0].weight
    assert not torch.equal(trainer.objective.terms["hidden"].adapters[0].weight, weight)  # trained, from equal starts


def test_best_model_brings_its_adapters_back(tmp_path):
    student, teacher = families.build("bert", 2, seed=1), families.build("bert", 4, seed=2, hidden_size=48)
    args = arguments(
        tmp_path,
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        hidden_weight=1.0,
        learning_rate=1e-2,
    )
    trainer, _ = run(student, teacher, ragged("bert"), args, eval_dataset=ragged("bert"))
    from safetensors.torch import load_file

    best = trainer.state.best_model_checkpoint
    assert best is not None and not best.endswith("checkpoint-4")
    for name, tensor in load_file(f"{best}/distillation_state.safetensors").items():
        assert torch.equal(trainer.objective.state_dict()[name], tensor)


def test_bf16_autocast_trains_and_keeps_the_losses_in_fp32(tmp_path):
    values = []
    for bf16 in (False, True):
        student, teacher = families.build("bert", 2, seed=1, **without_dropout("bert")), families.build("bert", 4, seed=2, hidden_size=48)
        trainer, _ = run(student, teacher, ragged("bert"), arguments(tmp_path, bf16=bf16, **ALL_TERMS))
        values.append(trainer.state.log_history[0])
    for name in ("task", "hidden", "embedding", "attention"):
        assert values[1][name] == pytest.approx(values[0][name], rel=0.03), name


def test_auto_class_reload_after_training_by_name(tmp_path):
    families.build("bert", 4, seed=2).save_pretrained(tmp_path / "teacher")
    trainer, _ = run(families.build("bert", 2, seed=1), str(tmp_path / "teacher"), ragged("bert"), arguments(tmp_path / "run"))
    assert trainer.teacher.model.config.num_hidden_layers == 4 and trainer.state.log_history[0]["kd"] > 0
    trainer.save_model()
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").config.num_hidden_layers == 2


# ---- What a wrong line would break silently ----


def test_student_and_adapters_are_clipped_as_one(tmp_path):
    class Norms(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients = [p.grad for p in [*model.parameters(), *trainers[0].objective.parameters()] if p.grad is not None]
            norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))

    norms, trainers = [], []
    student, teacher = families.build("bert", 2, seed=1), families.build("bert", 4, seed=2, hidden_size=48)
    trainer = DistillationTrainer(
        model=student, teacher=teacher, args=arguments(tmp_path, max_grad_norm=0.05, **ALL_TERMS), train_dataset=ragged("bert"),
        data_collator=pad, callbacks=[Norms()],
    )  # fmt: skip
    trainers.append(trainer)
    trainer.train()
    assert norms == [pytest.approx(0.05, rel=1e-3)]


def test_adapters_have_a_seed_of_their_own_and_no_decay(tmp_path):
    """Trainer.__init__ sets the global seed; drawing something before adapters are made must not change them."""

    def build(**options):
        student, teacher = families.build("bert", 2, seed=1), families.build("bert", 4, seed=2, hidden_size=48)
        args = arguments(tmp_path, hidden_weight=1.0, weight_decay=0.3, **options)
        return DistillationTrainer(
            model=student, teacher=teacher, args=args, train_dataset=ragged("bert"), data_collator=options_of_data.pop()
        )

    def draws(rows):
        torch.rand(3)
        return pad(rows)

    options_of_data = [draws, pad]
    first, second = build(), build()
    for name, tensor in first.objective.state_dict().items():
        assert torch.equal(second.objective.state_dict()[name], tensor)
    groups = first.create_optimizer().param_groups
    own = {id(p) for p in first.objective.parameters()}
    assert [g["weight_decay"] for g in groups if own & {id(p) for p in g["params"]}] == [0.0] and groups[0]["weight_decay"] == 0.3


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_label_smoothing_is_that_of_the_stock_trainer(family, tmp_path):
    losses = []
    for cls in (Trainer, DistillationTrainer):
        args = arguments(tmp_path, label_smoothing_factor=0.2, task_weight=1.0, kd_weight=0.0)
        student = families.build(family, 2, seed=1, **without_dropout(family))
        trainer = cls(model=student, args=args, train_dataset=ragged(family), data_collator=pad)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_under_bf16_the_teacher_runs_in_autocast_and_adapters_do_not(tmp_path):
    student, teacher = families.build("bert", 2, seed=1), families.build("bert", 4, seed=2, hidden_size=48)
    kinds = {}
    teacher.bert.encoder.layer[0].attention.self.query.register_forward_hook(lambda m, a, out: kinds.__setitem__("teacher", out.dtype))
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        args=arguments(tmp_path, bf16=True, hidden_weight=1.0),
        train_dataset=ragged("bert"),
        data_collator=pad,
    )
    trainer.objective.terms["hidden"].adapters[0].register_forward_hook(lambda m, a, out: kinds.__setitem__("adapter", out.dtype))
    trainer.train()
    assert kinds == {"teacher": torch.bfloat16, "adapter": torch.float32}


def test_a_user_optimizer_and_scheduler_train_the_adapters(tmp_path):
    student, teacher = families.build("bert", 2, seed=1), families.build("bert", 4, seed=2, hidden_size=48)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = DistillationTrainer(
        model=student, teacher=teacher, args=arguments(tmp_path, hidden_weight=1.0), train_dataset=ragged("bert"), data_collator=pad,
        optimizers=(optimizer, scheduler),
    )  # fmt: skip
    before = state(trainer.objective)
    trainer.train()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in trainer.objective.state_dict().items())


def test_each_trial_starts_from_the_adapter_as_given(tmp_path):
    adapter = torch.nn.Linear(32, 48)
    given = state(adapter)
    student, teacher = families.build("bert", 2, seed=1), families.build("bert", 4, seed=2, hidden_size=48)
    run(student, teacher, ragged("bert"), arguments(tmp_path), objective=[Term("hidden_mse", adapter=adapter)])
    assert all(torch.equal(tensor, given[name]) for name, tensor in adapter.state_dict().items())


def test_streams_and_float64(tmp_path):
    from datasets import IterableDataset

    rows = families.batch("bert", rows=8)
    rows["labels"] = torch.rand(8, 3).round()

    def generate():
        for i in range(8):
            yield {key: value[i].tolist() for key, value in rows.items()}

    student, teacher = families.build("bert", 2, seed=1).double(), families.build("bert", 4, seed=2, hidden_size=48).double()
    trainer, _ = run(student, teacher, IterableDataset.from_generator(generate), arguments(tmp_path, hidden_weight=1.0), data_collator=None)
    assert student.config.problem_type == "multi_label_classification"
    assert {p.dtype for p in trainer.objective.parameters()} == {torch.float64}


def test_a_plain_module_is_evaluated_too(tmp_path):
    class Bag(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = torch.nn.Embedding(families.VOCAB, 8), torch.nn.Linear(8, 3)

        def forward(self, input_ids, attention_mask=None):
            return {"logits": self.head(self.table(input_ids).mean(1))}

    trainer = DistillationTrainer(
        model=Bag(), teacher=families.build("bert", 2), args=arguments(tmp_path), train_dataset=ragged("bert"), eval_dataset=ragged("bert"),
        data_collator=pad, compute_metrics=lambda p: {"rows": len(p.label_ids)},
    )  # fmt: skip
    trainer.train()
    result = trainer.evaluate()
    assert result["eval_rows"] == 8 and result["eval_loss"] > 0


def test_changed_weights_on_resume_are_reported(tmp_path, caplog):
    options = dict(max_steps=2, save_strategy="steps", save_steps=1)
    run(families.build("bert", 2, seed=1), families.build("bert", 4, seed=2), ragged("bert"), arguments(tmp_path, **options))
    again = families.build("bert", 2, seed=1), families.build("bert", 4, seed=2), ragged("bert")
    run(*again, arguments(tmp_path, kd_weight=0.9, **options), resume=str(tmp_path / "checkpoint-1"))
    assert any("The objective has changed since the checkpoint checkpoint-1" in record.getMessage() for record in caplog.records)


def test_temperature_of_the_arguments_reaches_an_objective(tmp_path):
    student, teacher = families.build("bert", 2, seed=1), families.build("bert", 4, seed=2)
    args = arguments(tmp_path, temperature=8.0, objective=[{"loss": "soft_targets"}])
    trainer, _ = run(student, teacher, ragged("bert"), args)
    assert trainer.objective.describe()[0]["temperature"] == 8.0


def test_card_names_objective_layers_and_no_folder_of_this_machine(tmp_path):
    student, teacher = families.build("bert", 2, seed=1), families.build("bert", 4, seed=2, hidden_size=48)
    trainer, _ = run(student, teacher, ragged("bert"), arguments(tmp_path, **ALL_TERMS))
    trainer.create_model_card(license="apache-2.0", tags="demo", dataset="two rows")
    card = (tmp_path / "README.md").read_text()
    assert all(
        word in card for word in ("attention_score_mse", "hidden_mse", "license: apache-2.0", "demo", "two rows", "Layer map", "hinton2015")
    )
    assert str(tmp_path) not in card and "{" not in card.split("## Citations")[0].replace("{{", "")


def test_push_uploads_student_and_card_but_no_arms(tmp_path, monkeypatch):
    seen = {}

    class Api:
        def upload_folder(self, **options):
            seen.update(options)

    monkeypatch.setattr("transformers.trainer.hf_api", lambda: Api())
    monkeypatch.setattr(DistillationTrainer, "init_hf_repo", lambda self, **_: setattr(self, "hub_model_id", "org/student"))
    student, teacher = families.build("bert", 2, seed=1), families.build("bert", 4, seed=2)
    trainer, _ = run(student, teacher, ragged("bert"), arguments(tmp_path))
    trainer.push_to_hub()
    assert seen["repo_id"] == "org/student" and "_*" in seen["ignore_patterns"]
    assert {"README.md", "config.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    assert 'model="org/student"' in (tmp_path / "README.md").read_text()
