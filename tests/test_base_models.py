"""Students that are base models, without a head: pooled vectors, hidden states and attention are what there is to match."""

import families
import numpy as np
import pytest
import torch
import transformers
from test_denominators import assert_same, wide
from torch import nn
from training import Rows, arguments, flat, pad, ragged, run, without_dropout

from hfdistill import Capture, DistillationTrainer, Signals, Term
from hfdistill.capture_plan import CapturePlan


NO_HEAD = dict(task_weight=0.0, kd_weight=0.0)


def base(family: str, layers: int, seed: int, **options):
    return families.build(family, layers, seed=seed, **options).base_model


def unlabelled(family: str, rows: int = 8, seed: int = 1) -> Rows:
    return Rows(families.batch(family, rows=rows, seed=seed, labels=False))


def trainer_of(tmp_path, student, teacher=None, objective=None, data=None, **options):
    names = ("eval_dataset", "compute_metrics")
    kwargs = {name: options.pop(name) for name in names if name in options}
    return DistillationTrainer(
        model=student,
        teacher=teacher,
        objective=objective,
        args=arguments(tmp_path, **options),
        train_dataset=unlabelled("bert") if data is None else data,
        data_collator=pad,
        **kwargs,
    )


# ---- The pooled vector ----


def shifted(batch, how):
    """The same rows with the padding on the right, on the left, or none at all (cut to the shortest)."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if how == "none":
        return {"input_ids": ids[:, : mask.sum(1).min()]}
    if how == "left":
        turned = [torch.cat([row[m == 0], row[m == 1]]) for row, m in zip(ids, mask)]
        return {"input_ids": torch.stack(turned), "attention_mask": mask.flip(1)}
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("padding", ["right", "left", "none"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "gpt2", "llama"])
def test_pooled_against_one_row_at_a_time(family, padding):
    """Each row alone and without padding; with padding on the left the model's own numbers are the reference's input."""
    model = base(family, 2, seed=1)
    batch = shifted(families.batch(family, labels=False), padding)
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    with torch.no_grad():
        states = model(**batch).last_hidden_state.double()
    for pooling in ("mean", "cls", "last"):
        expected = []
        for row, m in zip(states.tolist(), mask.tolist()):
            real = [vector for vector, on in zip(row, m) if on]
            means = [sum(column) / len(real) for column in zip(*real)]
            expected.append({"mean": means, "cls": real[0], "last": real[-1]}[pooling])
        with torch.no_grad():
            pooled = Capture(model, pooling=pooling)(batch, CapturePlan(logits=False, pooled=True)).pooled
        assert pooled.shape == (3, 32)
        torch.testing.assert_close(pooled.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_what_padding_holds_does_not_reach_the_pooled_vector():
    model, batch = base("bert", 2, seed=1), families.batch("bert", labels=False)
    plan = CapturePlan(logits=False, pooled=True)
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7)}
    for pooling in ("mean", "cls", "last"):
        capture = Capture(model, pooling=pooling)
        torch.testing.assert_close(capture(batch, plan).pooled, capture(other, plan).pooled, rtol=1e-5, atol=1e-6)


def test_half_precision_is_averaged_in_float32():
    from hfdistill.pooling import pool_tokens

    states = torch.full((1, 3000, 1), 1.0).to(torch.bfloat16)
    assert pool_tokens(states, None, "mean").item() == 1.0
    assert pool_tokens(torch.tensor([[[float("nan")], [2.0]]]), torch.tensor([[False, True]]), "mean").item() == 2.0
    assert pool_tokens(torch.ones(1, 2, 3), torch.zeros(1, 2, dtype=torch.bool), "mean").tolist() == [[0.0] * 3]


def test_auto_is_the_pooler_the_first_or_the_last_real_token():
    plan = CapturePlan(logits=False, pooled=True)
    batch = shifted(families.batch("bert", labels=False), "left")
    bert, distilbert, gpt = (base(family, 2, seed=1) for family in ("bert", "distilbert", "gpt2"))
    with torch.no_grad():
        assert torch.equal(Capture(bert)(batch, plan).pooled, bert(**batch).pooler_output)
        states = distilbert(**batch).last_hidden_state
        assert torch.equal(Capture(distilbert)(batch, plan).pooled, states[[0, 1, 2], [0, 3, 6]])
        assert torch.equal(Capture(gpt)(batch, plan).pooled, gpt(**batch).last_hidden_state[:, -1])


# ---- Training ----


TERMS = [
    dict(loss="hidden_mse", signal="pooled", name="sentence"),
    dict(loss="cosine", signal="pooled", name="direction", weight=0.5),
    dict(loss="hidden_mse", name="hidden", weight=0.3),
    dict(loss="attention_score_mse", name="attention", weight=0.2),
]


def first_gradient(family, tmp_path, batch, steps, adapters):
    student = base(family, 2, seed=1, **without_dropout(family))
    teacher = base(family, 4, seed=2, **(wide(family) if adapters else {}))
    args = arguments(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps, pooling="mean")
    trainer, gradients = run(student, teacher, unlabelled(family), args, objective=[Term.from_dict(term) for term in TERMS])
    return trainer, gradients[0]


@pytest.mark.parametrize("family,adapters", [("bert", False), ("bert", True), ("distilbert", True), ("gpt2", False)])
def test_accumulation_does_not_change_the_gradient(family, adapters, tmp_path):
    trainer, whole = first_gradient(family, tmp_path, 8, 1, adapters)
    assert any(name.startswith("adapter.sentence") or "terms.sentence" in name for name in whole) == adapters
    assert trainer.objective.task == "features"
    for batch, steps in ((4, 2), (1, 8)):
        other, cut = first_gradient(family, tmp_path, batch, steps, adapters)
        assert_same(cut, whole)
        for key, value in trainer.state.log_history[0].items():
            if key != "grad_norm":
                assert other.state.log_history[0][key] == pytest.approx(value, rel=1e-5, abs=1e-7), key


def test_gradient_equals_one_written_by_hand(tmp_path):
    student, teacher = base("bert", 2, seed=1, **without_dropout("bert")), base("bert", 4, seed=2)
    terms = [Term("hidden_mse", signal="pooled"), Term("cosine", signal="pooled", weight=0.5)]
    _, (ours,) = run(
        student,
        teacher,
        unlabelled("bert"),
        arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, pooling="mean"),
        objective=terms,
    )
    student = base("bert", 2, seed=1, **without_dropout("bert"))
    total = 0
    for row in unlabelled("bert"):  # one text at a time, without padding
        s = student(row["input_ids"][None]).last_hidden_state[0].mean(0)
        with torch.no_grad():
            t = teacher(row["input_ids"][None]).last_hidden_state[0].mean(0)
        total = total + (s - t).square().mean() / 8 + 0.5 * (1 - torch.dot(s, t) / s.norm() / t.norm()) / 8
    total.backward()
    reference = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert set(ours) >= set(reference) and not any("pooler" in name for name in reference)
    for name, gradient in reference.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


def test_student_equal_to_its_teacher_has_nothing_to_learn(tmp_path):
    terms = [Term("hidden_mse", signal="pooled"), Term("cosine", signal="pooled"), Term("hidden_mse", name="hidden")]
    trainer = trainer_of(
        tmp_path, base("bert", 2, seed=1), base("bert", 2, seed=1), terms, eval_dataset=unlabelled("bert"), eval_with_teacher=True
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0, abs=1e-10)


def test_the_student_learns_and_loads_with_plain_transformers(tmp_path):
    student, teacher = base("bert", 2, seed=1), base("bert", 4, seed=2, **wide("bert"))
    objective = [Term("cosine", signal="pooled")]
    trainer = trainer_of(tmp_path, student, teacher, objective, pooling="mean", max_steps=40, learning_rate=1e-2)
    trainer.train()
    logs = [log["cosine"] for log in trainer.state.log_history if "cosine" in log]
    assert logs[-1] < 0.5 * logs[0]
    trainer.save_model(str(tmp_path / "saved"))
    loaded, report = transformers.AutoModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert type(loaded) is transformers.BertModel and not report["missing_keys"] and not report["unexpected_keys"]
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name])
    trainer.create_model_card()
    assert "pipeline_tag: feature-extraction" in (tmp_path / "README.md").read_text()
    assert trainer.objective.describe()[0]["pooling"] == "mean" and trainer.objective.describe()[0]["adapter"] == ["Linear"]


def test_the_adapter_of_pooled_vectors_stays_out_of_autocast(tmp_path):
    student, teacher = base("bert", 2, seed=1), base("bert", 4, seed=2, **wide("bert"))
    trainer = trainer_of(tmp_path, student, teacher, [Term("hidden_mse", signal="pooled")], bf16=True)
    seen = []
    trainer.objective.terms["hidden_mse"].adapters[0].register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))
    trainer.train()
    assert seen and set(seen) == {torch.float32}


def test_a_function_may_be_the_teacher_of_pooled_vectors(tmp_path):
    targets = torch.randn(families.VOCAB, 32, generator=torch.Generator().manual_seed(5))

    def teacher(batch):
        return Signals(pooled=targets[batch["input_ids"][:, 0]])

    trainer = trainer_of(tmp_path, base("bert", 2, seed=1), teacher, [Term("hidden_mse", signal="pooled")], max_steps=2)
    trainer.train()
    assert trainer.state.log_history[0]["hidden_mse"] > 0
    narrow = trainer_of(tmp_path, base("bert", 2, seed=1), lambda b: Signals(pooled=targets[:8, :5]), [Term("hidden_mse", signal="pooled")])
    with pytest.raises(ValueError, match=r"student has shape \(8, 32\) and teacher \(8, 5\)"):
        narrow.train()
    wider = [Term("hidden_mse", signal="pooled", adapter=nn.Linear(32, 5))]
    trainer_of(tmp_path, base("bert", 2, seed=1), lambda b: Signals(pooled=targets[:8, :5]), wider).train()
    with pytest.raises(ValueError, match="wants the adapter 'linear', but the teacher is a function"):
        trainer_of(tmp_path, base("bert", 2, seed=1), teacher, [Term("hidden_mse", signal="pooled", adapter="linear")])


# ---- Evaluation ----


@pytest.mark.parametrize("labelled", [False, True])
def test_predictions_are_pooled_vectors(labelled, tmp_path):
    student, teacher = base("bert", 2, seed=1), base("bert", 4, seed=2)
    calls, seen = [], []
    data = Rows(families.batch("bert", rows=7, labels=labelled))
    trainer = trainer_of(
        tmp_path,
        student,
        teacher,
        [Term("hidden_mse", signal="pooled")],
        pooling="mean",
        eval_dataset=data,
        per_device_eval_batch_size=3,
        compute_metrics=lambda p: seen.append(p) or {"width": p.predictions.shape[1]},
    )
    teacher.register_forward_hook(lambda *_: calls.append(1))
    metrics = trainer.evaluate()
    predictions = trainer.predict(data).predictions
    assert not calls and "eval_loss" not in metrics
    expected = torch.stack([student(row["input_ids"][None]).last_hidden_state[0].mean(0) for row in data]).detach()
    assert isinstance(predictions, np.ndarray) and predictions.shape == (7, 32)
    np.testing.assert_allclose(predictions, expected.numpy(), rtol=1e-4, atol=1e-5)
    if labelled:  # the Trainer asks for metrics only where there are labels
        assert metrics["eval_width"] == 32 and seen[0].label_ids.tolist() == data.batch["labels"].tolist()


def test_evaluation_with_the_teacher_gives_the_objective(tmp_path):
    student, teacher = base("bert", 2, seed=1), base("bert", 4, seed=2)
    data = unlabelled("bert", rows=7)
    trainer = trainer_of(
        tmp_path,
        student,
        teacher,
        [Term("hidden_mse", signal="pooled", weight=2.0), Term("hidden_mse", name="hidden")],
        pooling="cls",
        eval_dataset=data,
        eval_with_teacher=True,
        per_device_eval_batch_size=3,
    )
    result = trainer.evaluate()
    with torch.no_grad():
        vectors = [torch.stack([m(row["input_ids"][None]).last_hidden_state[0, 0] for row in data]) for m in (student, teacher)]
    assert result["eval_hidden_mse"] == pytest.approx(float((vectors[0] - vectors[1]).square().mean()), rel=1e-4)
    assert result["eval_loss"] == pytest.approx(2 * result["eval_hidden_mse"] + result["eval_hidden"], rel=1e-6)


# ---- Pairs instead of a teacher ----


def pairs(rows=8):
    data = Rows(families.batch("bert", rows=rows, seed=4, labels=False))
    data.batch["labels"] = torch.arange(rows) // 2
    return data


def test_pairs_train_a_base_model_without_a_teacher(tmp_path):
    student = base("bert", 1, seed=1, **without_dropout("bert"))
    objective = [Term("contrastive_pairs", options={"temperature": 0.5})]
    args = arguments(tmp_path, pooling="mean", max_steps=30, learning_rate=5e-3)
    trainer, gradients = run(student, None, pairs(), args, objective=objective)
    logs = [log["contrastive_pairs"] for log in trainer.state.log_history if "contrastive_pairs" in log]
    assert logs[0] == pytest.approx(np.log(7), rel=0.3) and logs[-1] < 0.5 * logs[0]
    fresh = base("bert", 1, seed=1, **without_dropout("bert"))
    vectors = torch.stack([fresh(row["input_ids"][None]).last_hidden_state[0].mean(0) for row in pairs()])
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    scores = (unit @ unit.T / 0.5).masked_fill(torch.eye(8, dtype=torch.bool), float("-inf"))
    torch.nn.functional.cross_entropy(scores, torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])).backward()
    for name, p in fresh.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[0][name], p.grad, rtol=1e-4, atol=1e-6)


def test_pairs_count_rows_with_a_partner_over_the_window(tmp_path):
    """Rows without a partner are not in the divisor: the gradient is the mean over the rows that have one, over micro-batches too."""
    data = pairs()
    data.batch["labels"] = torch.tensor([0, 0, 1, -100, 2, 2, 3, 3])
    values, terms = [], [Term("contrastive_pairs")]
    for batch, steps in ((4, 2), (2, 4)):
        student = base("bert", 1, seed=1, **without_dropout("bert"))
        args = arguments(tmp_path, pooling="mean", per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
        trainer, gradients = run(student, None, data, args, objective=terms)
        values.append((trainer.state.log_history[0]["contrastive_pairs"], flat(gradients[0]).norm()))
    assert values[0][0] > 0 and values[1][0] == pytest.approx(0, abs=1e-5)  # pairs alone in their micro-batch have no negatives


# ---- What cannot work ----


@pytest.mark.parametrize("weights", [{}, {"kd_weight": 0.0}, {"task_weight": 0.0}, {**NO_HEAD, "logit_mse_weight": 1.0}], ids=str)
def test_terms_on_logits_are_refused(weights, tmp_path):
    with pytest.raises(ValueError, match=r"student \(BertModel\) returned no logits.*AutoModelFor.*signal='pooled'"):
        trainer_of(tmp_path, base("bert", 2, seed=1), base("bert", 4, seed=2), data=ragged("bert"), **weights)


def test_a_teacher_without_logits_is_refused_where_they_are_compared(tmp_path):
    with pytest.raises(ValueError, match=r"teacher \(BertModel\) returned no logits"):
        trainer_of(tmp_path, families.build("bert", 2), base("bert", 4, seed=2), data=ragged("bert"))


def test_pairs_need_labels(tmp_path):
    with pytest.raises(ValueError, match="have no 'labels'"):
        trainer_of(tmp_path, base("bert", 2, seed=1), None, [Term("contrastive_pairs")])


def test_what_cannot_be_pooled_is_refused(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

        def forward(self, input_ids):
            states = nn.functional.one_hot(input_ids % 3, 3).float()
            for layer in self.layers:
                states = layer(states)
            return {"states": states}

    with pytest.raises(ValueError, match=r"student \(Odd\) returned no last_hidden_state.*pooling='mean'"):
        trainer_of(tmp_path, Odd(), base("bert", 4, seed=2), [Term("hidden_mse", signal="pooled")], pooling="mean")
    with pytest.raises(ValueError, match=r"pooling must be one of .*Did you mean 'mean'"):
        arguments(tmp_path, pooling="means")


def test_a_module_of_ones_own_that_returns_token_vectors(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 32)

        def forward(self, input_ids, attention_mask):
            return {"last_hidden_state": self.layer(nn.functional.one_hot(input_ids % 3, 3).float())}

    model = Own()
    trainer = trainer_of(tmp_path, model, base("bert", 4, seed=2), [Term("hidden_mse", signal="pooled")], pooling="mean")
    trainer.train()
    row = unlabelled("bert")[1]
    expected = model(row["input_ids"][None], None)["last_hidden_state"][0].mean(0).detach().numpy()
    np.testing.assert_allclose(trainer.predict(unlabelled("bert")).predictions[1], expected, rtol=1e-5, atol=1e-6)
