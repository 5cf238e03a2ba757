"""What the trainer promises: every family trains, the teacher is left alone, without one it is the stock Trainer."""

import copy

import families
import numpy as np
import pytest
import torch
from training import ALL_TERMS, arguments, pad, ragged, run, state, without_dropout
from transformers import Trainer, TrainerCallback, TrainingArguments

from hfdistill import DistillationTrainer, Signals


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
        "_prepare_inputs",
        "_get_train_sampler",
        "_get_eval_sampler",
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


# ---- Collators that know epochs and columns of their own ----


def test_the_collator_hears_every_epoch_and_gets_its_columns(tmp_path):
    from datasets import Dataset as Table

    class Collator:
        columns = ["example_id"]

        def __init__(self):
            self.epoch, self.seen = None, []

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __call__(self, rows):
            ids = [row.pop("example_id") for row in rows]
            self.seen.append((self.epoch, ids))
            return pad([{key: torch.tensor(value) for key, value in row.items()} for row in rows])

    batch = families.batch("bert", rows=4)
    columns = {key: value.tolist() for key, value in batch.items()}
    rows = Table.from_dict({**columns, "example_id": [10, 11, 12, 13], "remark": ["a"] * 4})

    def train(folder, resume=None, collator=None):
        collator = Collator()
        options = dict(max_steps=6, per_device_train_batch_size=2, save_strategy="steps", save_steps=3)
        run(
            families.build("bert", 2), families.build("bert", 4, seed=1), rows, arguments(folder, **options),
            data_collator=collator, resume=resume,
        )  # fmt: skip
        return [(epoch, ids) for epoch, ids in collator.seen if epoch is not None]

    whole = train(tmp_path)
    assert whole == [(epoch, ids) for epoch in range(3) for ids in ([10, 11], [12, 13])]
    resumed = train(tmp_path, resume=str(tmp_path / "checkpoint-3"))
    assert [entry for entry in resumed if entry in whole[3:]] == whole[3:]
    assert {epoch for epoch, _ in resumed} == {1, 2}
