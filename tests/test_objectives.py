"""Objectives in Python and YAML, problem types, trials, precision, cards: what a wrong line would break silently."""

import json

import families
import pytest
import torch
from training import ALL_TERMS, arguments, pad, ragged, run, state, without_dropout
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

from hfdistill import DistillationLoss, DistillationTrainer, Term
from hfdistill.losses.base import LossValue


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

    class Sized(torch.utils.data.IterableDataset):
        def __len__(self):
            return 8

        def __iter__(self):
            return iter(ragged("bert")[i] for i in range(8))

    run(families.build("bert", 2), families.build("bert", 4), Sized(), arguments(tmp_path, train_sampling_strategy="random"))

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
