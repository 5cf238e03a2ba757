"""Relations, patient distillation and MobileBERT's terms through the trainer, beside everything else it does."""

from __future__ import annotations

import json

import families
import pytest
import torch
from test_denominators import assert_same
from training import arguments, flat, pad, ragged, run, state, without_dropout

from hfdistill import DistillationTrainer, Term


def relations(heads, signals=("queries", "keys", "values")):
    last = {"layer_map": "-1:-1", "options": {"heads": heads}}
    return [Term("relation_kl", name=f"{signal}_relation", signal=signal, **last) for signal in signals]


def everything(family):
    """Every loss of this part in one objective: MiniLM, MiniLMv2, hidden relations, patient, MobileBERT."""
    token = "last" if family == "qwen2" else "first"
    return [
        Term("attention_kl", layer_map="-1:-1"),
        *relations(4),
        Term("relation_kl", name="hidden_relation", signal="hidden_states", layer_map="uniform", options={"heads": 8}),
        Term("patient", weight=3.0, layer_map="skip", layer_reduction="sum", options={"token": token}),
        Term("normalized_hidden_mse", weight=0.3),
        Term("hidden_moments", options={"mean_weight": 2.0, "variance_weight": 0.5}),
    ]


ADAPTED = {"patient", "normalized_hidden_mse"}
WIDER = {"hidden_size": 48, "intermediate_size": 64}


def vivid(model, seed):
    """As if trained: fresh weights are so small that all relations are uniform, and fresh norms leave no moments to learn."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.2 * noise if parameter.dim() == 1 else 0.15 * noise)
    return model


def models(family="bert", teacher_depth=4):
    """A student of width 32 and a teacher of 48, both with 4 heads; keys and values of qwen2 are 16 and 24 wide."""
    student = vivid(families.build(family, 2, seed=1, **without_dropout(family)), 1)
    return student, vivid(families.build(family, teacher_depth, seed=2, **WIDER), 2)


def gradients(tmp_path, objective=None, family="bert", collate=pad, **options):
    student, teacher = models(family)
    objective = everything(family) if objective is None else objective
    trainer, seen = run(student, teacher, ragged(family), arguments(tmp_path, **options), objective=objective, data_collator=collate)
    return trainer, seen[0]


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_accumulation_does_not_change_the_gradient(family, tmp_path):
    """8x1, 4x2 and 1x8, ragged, grouped heads, another width: adapters where widths are compared and nowhere else."""
    trainer, whole = gradients(tmp_path, family=family)
    assert {key.split(".")[2] for key in whole if key.startswith("adapter.")} == ADAPTED
    logs = trainer.state.log_history[0]
    for batch, steps in ((4, 2), (1, 8)):
        other, cut = gradients(tmp_path, family=family, per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
        assert_same(cut, whole)
        for term in everything(family):
            assert other.state.log_history[0][term.name] == pytest.approx(logs[term.name], rel=1e-4) and logs[term.name] > 1e-3


def pad_left(rows):
    """As `pad`, on the other side, with the positions that the student would have had."""
    batch, length = pad(rows), max(row["input_ids"].size(0) for row in rows)
    for key in ("input_ids", "attention_mask"):
        batch[key] = torch.stack([torch.nn.functional.pad(row[key], (length - row[key].size(0), 0)) for row in rows])
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batch


def test_left_padding_gives_the_gradient_of_right_padding(tmp_path):
    sides = [gradients(tmp_path, collate=collate, remove_unused_columns=False)[1] for collate in (pad, pad_left)]
    assert_same(sides[1], sides[0])


def test_minilm_by_hand(tmp_path):
    """Attention and value relation of the last block from eager outputs, plain PyTorch, one sample at a time."""
    minilm = [Term("attention_kl", layer_map="-1:-1"), *relations(4, ["values"])]
    _, ours = gradients(tmp_path, minilm, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    student, teacher = models()
    rows = families.batch("bert", rows=8, seed=1)
    rows.pop("labels")
    losses, tokens = 0, int(rows["attention_mask"].sum())
    for i in range(8):
        length = int(rows["attention_mask"][i].sum())
        maps = []
        for model, block, width in ((student, 1, 8), (teacher, 3, 12)):
            states = model.bert(rows["input_ids"][i : i + 1, :length], output_hidden_states=True).hidden_states[block]
            layer = model.bert.encoder.layer[block].attention.self
            q, k, v = (p(states)[0].view(length, 4, width).transpose(0, 1) for p in (layer.query, layer.key, layer.value))
            maps.append([(a @ b.transpose(1, 2) / width**0.5).softmax(-1) for a, b in ((q, k), (v, v))])
        for s, t in zip(*maps):
            losses = losses + (t.detach() * (t.detach() / s).log()).sum() / 4 / tokens
    losses.backward()
    reference = {name: p.grad for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("value" in name for name in reference)
    for name, gradient in reference.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name,blocks", [("skip", [(0, 1), (1, 3), (2, 5), (3, 7), (4, 9)]), ("0:6,1:7,2:8,3:9,4:10", "last")])
def test_patient_maps_are_the_published_ones_and_leave_the_last_block_alone(name, blocks, tmp_path):
    student, teacher = families.build("bert", 6, seed=1, **without_dropout("bert")), families.build("bert", 12, seed=2)
    trainer, seen = run(student, teacher, ragged("bert"), arguments(tmp_path), objective=[Term("patient", layer_map=name)])
    expected = [(k, k + 6) for k in range(5)] if blocks == "last" else blocks
    assert trainer.objective.terms["patient"].pairs == expected
    assert not any("layer.5" in key and gradient.any() for key, gradient in seen[0].items())
    assert any("layer.4" in key and gradient.any() for key, gradient in seen[0].items())


def test_patient_value_is_that_of_the_paper_and_of_its_code(tmp_path):
    """Sum over width and blocks, mean over samples; the code divides by both. From the hidden states of Transformers."""
    student, teacher = families.build("bert", 3, seed=1, **without_dropout("bert")), families.build("bert", 6, seed=2)
    batch = families.batch("bert", rows=8, seed=1)
    with torch.no_grad():
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        s, t = (model(**inputs, output_hidden_states=True).hidden_states for model in (student, teacher))
    unit = [[states[k + 1][:, 0] / states[k + 1][:, 0].norm(dim=-1, keepdim=True) for k in at] for states, at in ((s, (0, 1)), (t, (1, 3)))]
    paper = sum((a - b).square().sum(-1).mean() for a, b in zip(*unit)).item()
    objective = [
        Term("patient", name="paper", layer_map="skip", layer_reduction="sum"),
        Term("patient", name="code", layer_map="skip", options={"width_reduction": "mean"}),
    ]
    trainer, _ = run(student, teacher, ragged("bert"), arguments(tmp_path), objective=objective)
    assert trainer.state.log_history[0]["paper"] == pytest.approx(paper, rel=1e-5)
    assert trainer.state.log_history[0]["code"] == pytest.approx(paper / 32 / 2, rel=1e-5)


def test_a_student_that_is_the_teacher_has_nothing_to_learn(tmp_path):
    student, teacher = (vivid(families.build("bert", 2, seed=1, **without_dropout("bert")), 1) for _ in range(2))
    objective = everything("bert")
    for term in objective:
        term.layer_map = "0:0,1:1"
    trainer, seen = run(student, teacher, ragged("bert"), arguments(tmp_path), objective=objective)
    assert flat(seen[0]).abs().max() < 1e-5 and trainer.state.log_history[0]["loss"] < 1e-6


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_checkpointing_and_a_teacher_in_pieces_give_the_same_gradient(family, tmp_path):
    _, plain = gradients(tmp_path, family=family)
    kwargs = {"use_reentrant": False}
    _, saving = gradients(
        tmp_path, family=family, activation_checkpointing=True, activation_checkpointing_kwargs=kwargs, teacher_batch_size=3
    )
    assert_same(saving, plain)


def test_what_reentrant_checkpointing_loses_is_refused(tmp_path):
    """Only what is taken inside the attention is lost."""
    options = dict(activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True})
    hidden = {"loss": "relation_kl", "signal": "hidden_states", "heads": 4}
    refused(tmp_path, "Reentrant activation checkpointing loses the gradient", {**hidden, "signal": "keys"}, **options)
    student, teacher = models()
    DistillationTrainer(student, arguments(tmp_path, **options), pad, ragged("bert"), teacher=teacher, objective=[Term.from_dict(hidden)])


def test_evaluation_with_the_teacher_is_the_same_for_every_batch_size(tmp_path):
    student, teacher = models()
    results = []
    for size in (8, 3):
        args = arguments(tmp_path, eval_with_teacher=True, per_device_eval_batch_size=size)
        trainer = DistillationTrainer(
            student, args, pad, ragged("bert"), eval_dataset=ragged("bert", seed=4), teacher=teacher, objective=everything("bert")
        )
        results.append(trainer.evaluate())
    for term in everything("bert"):
        assert results[0][f"eval_{term.name}"] == pytest.approx(results[1][f"eval_{term.name}"], rel=1e-4)
        assert results[0][f"eval_{term.name}"] > 1e-3


def test_resume_equals_uninterrupted_training(tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2, per_device_train_batch_size=2)
    students, adapters = [], []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        student, teacher = models()
        trainer, _ = run(student, teacher, ragged("bert"), arguments(tmp_path, **options), objective=everything("bert"), resume=resume)
        students.append(state(student))
        adapters.append(state(trainer.objective))
    assert {key.split(".")[1] for key in adapters[0]} == ADAPTED
    for a, b in (students, adapters):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_half_precision_trains(tmp_path):
    a, b = (flat(gradients(tmp_path, bf16=half)[1]) for half in (True, False))
    assert torch.isfinite(a).all() and torch.dot(a, b) / (a.norm() * b.norm()) > 0.99


def test_rows_without_a_real_token_are_not_counted(tmp_path):
    """A collator that fills batches up with empty rows changes nothing, in any piece of the window."""

    def filled(rows):
        batch = pad(rows)
        empty = {k: torch.zeros_like(v[:1]) for k, v in batch.items()}
        return {k: torch.cat([v, empty[k]]) for k, v in batch.items()}

    sides = []
    for collate in (pad, filled):
        student, teacher = models()
        args = arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
        _, seen = run(student, teacher, ragged("bert"), args, objective=[Term("patient", layer_map="skip")], data_collator=collate)
        sides.append(seen[0])
    assert_same(sides[1], sides[0])


def test_the_resolved_objective_says_heads_and_signals(tmp_path):
    trainer, _ = gradients(tmp_path, relations(4))
    described = trainer.objective.describe()
    assert [(t["signal"], t["heads"], t["layer_map"]) for t in described] == [(s, 4, [[1, 3]]) for s in ("queries", "keys", "values")]
    json.dumps(described)


# ---- What is refused before training ----


def refused(tmp_path, message, *objective, student=None, teacher=None, **options):
    with pytest.raises(ValueError, match=message):
        DistillationTrainer(
            families.build("bert", 2) if student is None else student,
            arguments(tmp_path, **options),
            pad,
            ragged("bert"),
            teacher=families.build("bert", 4, **WIDER) if teacher is None else teacher,
            objective=[Term.from_dict(entry) for entry in objective],
        )


def test_heads_that_do_not_divide_the_widths(tmp_path):
    message = r"heads=12 relation heads do not divide the widths 32 of the student and 48 .*Set heads to one of 1, 2, 4, 8, 16\."
    refused(tmp_path, message, {"loss": "relation_kl"})
    refused(tmp_path, message, {"loss": "relation_kl", "signal": "hidden_states"})
    refused(tmp_path, message, {"loss": "relation_kl"}, layer_map="random")


def test_models_that_show_no_values(tmp_path):
    message = r"The teacher \(MPNetForSequenceClassification\) runs an attention of its own.*not its values"
    refused(tmp_path, message, {"loss": "relation_kl", "heads": 4}, teacher=families.build("mpnet", 4))
    # the cure it names
    hidden = Term("relation_kl", signal="hidden_states", options={"heads": 4})
    student, teacher = families.build("bert", 2), families.build("mpnet", 4)
    trainer, _ = run(student, teacher, ragged("bert"), arguments(tmp_path), objective=[hidden])
    assert trainer.state.log_history[0]["relation_kl"] > 0


def test_the_first_token_of_a_decoder(tmp_path):
    student, teacher = models("qwen2")
    message = "compares the first token of each text, which in a decoder has seen nothing but itself.*Set its option token='last'"
    refused(tmp_path, message, {"loss": "patient"}, student=student, teacher=teacher)


@pytest.mark.parametrize("signal", ["logits", "pooled", "attention_scores"])
@pytest.mark.parametrize("loss", ["relation_kl", "patient"])
def test_signals_without_tokens(loss, signal):
    with pytest.raises(ValueError, match=f"The term '{loss}' cannot compare {signal}: .* the tokens of .* Set signal to one of these"):
        Term(loss, signal=signal)


@pytest.mark.parametrize("loss", ["relation_kl", "hidden_moments"])
def test_an_adapter_that_would_not_be_used(loss):
    with pytest.raises(ValueError, match=f"The adapter of the term '{loss}' would not be used.*Remove the adapter"):
        Term(loss, adapter="linear")
