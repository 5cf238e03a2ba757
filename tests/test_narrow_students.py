"""4 blocks of width 312 under 12 of width 768, by cutting and by one shared projection, as TinyBERT has it."""

import json

import families
import pytest
import torch
from safetensors import safe_open
from training import Gradients, arguments, pad, ragged, run, without_dropout
from transformers import BertConfig, BertForSequenceClassification, BertModel

from hfdistill import DistillationTrainer, Term, build_student


VOCAB = 50  # the blocks are what has the paper's sizes here
TINY = dict(hidden_size=312, num_attention_heads=12, intermediate_size=1200)


@pytest.fixture(scope="module")
def teacher():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(vocab_size=VOCAB, num_labels=3, max_position_embeddings=40)
        assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size) == (12, 768, 12, 3072)
        return BertForSequenceClassification(config).eval()


def batch():
    ids = torch.randint(5, VOCAB, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9)[None] < torch.tensor([9, 5, 7, 9])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 1])}


def test_the_published_size():
    with torch.device("meta"):
        student = BertModel(BertConfig(num_hidden_layers=4, **TINY))
    assert sum(p.numel() for p in student.parameters()) == 14_350_248  # "14.5M" in table 1 of the paper


def test_4x312_by_slicing(teacher):
    student = build_student(teacher, 4, **TINY)
    assert student.config.distilled_from["layers"] == [2, 5, 8, 11]  # g(m) = 3m, counted from 0
    assert student.copy_report.random == 0 and student.copy_report.copied > 0 and student.copy_report.sliced > 0
    rows = [64 * head + dim for head in range(12) for dim in range(26)]  # 312 / 12 dims of each head
    for block, source in zip(student.bert.encoder.layer, [teacher.bert.encoder.layer[i] for i in (2, 5, 8, 11)]):
        ours, theirs = block.attention, source.attention
        for name in ("query", "key", "value"):
            assert torch.equal(getattr(ours.self, name).weight, getattr(theirs.self, name).weight[rows][:, :312])
            assert torch.equal(getattr(ours.self, name).bias, getattr(theirs.self, name).bias[rows])
        assert torch.equal(ours.output.dense.weight, theirs.output.dense.weight[:312][:, rows])
        assert torch.equal(block.intermediate.dense.weight, source.intermediate.dense.weight[:1200, :312])
        assert torch.equal(block.output.dense.weight, source.output.dense.weight[:312, :1200])
        assert torch.equal(block.output.LayerNorm.weight, source.output.LayerNorm.weight[:312])
    assert torch.equal(student.bert.embeddings.word_embeddings.weight, teacher.bert.embeddings.word_embeddings.weight[:, :312])
    assert torch.equal(student.classifier.weight, teacher.classifier.weight[:, :312])
    logits = student(**batch()).logits
    assert logits.shape == (4, 3) and logits.isfinite().all()


@pytest.mark.parametrize("copy_weights", [False, True])
def test_4x312_by_one_shared_projection(teacher, copy_weights, tmp_path):
    """TinyBERT's transformer distillation: embeddings, hidden states and scores, one `Linear(312, 768)` with bias."""
    student = build_student(teacher, 4, copy_weights=copy_weights, **TINY)
    options = dict(task_weight=0.0, kd_weight=0.0, hidden_weight=1.0, embedding_weight=1.0, attention_weight=1.0, layer_reduction="sum")
    gradients = Gradients()
    data = [{k: v[i] for k, v in batch().items()} for i in range(4)]
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        args=arguments(tmp_path, adapter="shared", **options),
        train_dataset=data,
        data_collator=pad,
        callbacks=[gradients],
    )
    gradients.trainer = trainer
    weight, bias = trainer.objective.parameters()
    assert weight.shape == (768, 312) and weight.std().item() == pytest.approx(0.02, rel=0.02) and not bias.any()
    assert {name: len(term.adapters) for name, term in trainer.objective.terms.items()} == {"hidden": 4, "embedding": 1, "attention": 0}
    trainer.train()
    log = trainer.state.log_history[0]
    assert all(log[name] > 0 for name in ("hidden", "embedding", "attention"))
    assert log["loss"] == pytest.approx(log["hidden"] + log["embedding"] + log["attention"], rel=1e-4)
    moved = {name for name, gradient in gradients.steps[0].items() if gradient.abs().sum() > 0}
    assert {"adapter.shared_adapters.312_768.weight", "adapter.shared_adapters.312_768.bias"} <= moved
    assert "bert.encoder.layer.0.attention.self.query.weight" in moved and "classifier.weight" not in moved


# ---- One adapter for many, on tiny models ----


TERMS = dict(task_weight=0.0, kd_weight=0.0, hidden_weight=0.7, embedding_weight=0.4, cosine_weight=0.3, layer_map="0:1,1:3")
SHARED = "adapter.shared_adapters.32_48"


def models(family="bert"):
    student = families.build(family, 2, seed=1, **without_dropout(family))
    return student, families.build(family, 4, seed=2, hidden_size=48, **without_dropout(family))


def test_the_gradient_is_the_sum_over_its_users(tmp_path):
    student, teacher = models()
    trainer, (shared,) = run(student, teacher, ragged("bert"), arguments(tmp_path, adapter="shared", **TERMS))
    student, teacher = models()
    gradients = Gradients()
    apart = DistillationTrainer(
        model=student,
        teacher=teacher,
        args=arguments(tmp_path, adapter="linear", **TERMS),
        train_dataset=ragged("bert"),
        data_collator=pad,
        callbacks=[gradients],
    )
    gradients.trainer = apart
    fresh, _ = models()
    start = DistillationTrainer(model=fresh, teacher=teacher, args=arguments(tmp_path, adapter="shared", **TERMS)).objective
    (weight, bias) = start.parameters()
    with torch.no_grad():
        for adapter in [adapter for term in apart.objective.terms.values() for adapter in term.adapters]:
            adapter.weight.copy_(weight)
            adapter.bias.copy_(bias)
    apart.train()
    own = {name: gradient for name, gradient in gradients.steps[0].items() if name.startswith("adapter.")}
    assert len(own) == 8  # hidden: two blocks, embedding, cosine; weight and bias of each
    for leaf in ("weight", "bias"):
        total = sum(gradient for name, gradient in own.items() if name.endswith(leaf))
        torch.testing.assert_close(shared[f"{SHARED}.{leaf}"], total, atol=1e-7, rtol=1e-5)
    assert [name for name in shared if name.startswith("adapter.")] == [f"{SHARED}.weight", f"{SHARED}.bias"]
    for name, gradient in gradients.steps[0].items():
        if not name.startswith("adapter."):
            torch.testing.assert_close(shared[name], gradient, atol=1e-7, rtol=1e-5)


def test_it_is_saved_once_optimised_once_and_resumed(tmp_path):
    options = dict(
        max_steps=6,
        save_strategy="steps",
        save_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=3,
        max_grad_norm=1.0,
        adapter="shared",
        **TERMS,
    )
    student, teacher = models()
    whole, _ = run(student, teacher, ragged("bert"), arguments(tmp_path, **options))
    again, teacher = models()
    resumed, _ = run(again, teacher, ragged("bert"), arguments(tmp_path, **options), resume=str(tmp_path / "checkpoint-3"))
    for name, tensor in [*student.state_dict().items(), *whole.objective.state_dict().items()]:
        assert torch.equal({**again.state_dict(), **resumed.objective.state_dict()}[name], tensor), name
    with safe_open(tmp_path / "checkpoint-3/distillation_state.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["shared_adapters.32_48.bias", "shared_adapters.32_48.weight"]
    ids = [id(p) for group in whole.optimizer.param_groups for p in group["params"]]
    (weight, bias) = whole.objective.parameters()
    assert ids.count(id(weight)) == ids.count(id(bias)) == 1
    assert len({id(adapter._adapter[0]) for term in whole.objective.terms.values() for adapter in term.adapters}) == 1


def test_it_is_described_and_only_for_those_who_ask(tmp_path):
    student, teacher = models()
    terms = [
        Term("hidden_mse", name="early", layer_map="0:0", adapter="shared"),
        Term("hidden_mse", name="late", layer_map="1:3", adapter="linear"),
        Term("embedding_mse", name="words", adapter="shared"),
        Term("cosine", name="mlp", signal="pooled", adapter="mlp"),
    ]
    trainer, _ = run(student, teacher, ragged("bert"), arguments(tmp_path), objective=terms)
    adapters = {term["name"]: term["adapter"] for term in trainer.objective.describe()}
    assert adapters == {"early": ["SharedAdapter"], "late": ["Linear"], "words": ["SharedAdapter"], "mlp": ["Sequential"]}
    json.dumps(trainer.objective.describe())
    trainer.create_model_card()
    table = [line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("| ")]
    assert [name for name in adapters if any(name in line and "| shared |" in f"{line} |" for line in table)] == ["early", "words"]
    names = [name for name, _ in trainer.objective.named_parameters()]
    assert sum(name.startswith("shared_adapters.") for name in names) == 2 and sum("late.adapters.0" in name for name in names) == 2
    parts = trainer.objective.terms
    assert parts["early"].adapters[0]._adapter[0] is parts["words"].adapters[0]._adapter[0]
    assert not any(True for _ in parts["early"].parameters())


def test_it_trains_even_where_widths_agree_and_in_double_precision(tmp_path):
    student, teacher = families.build("bert", 2, seed=1).double(), families.build("bert", 4, seed=2).double()
    trainer, steps = run(student, teacher, ragged("bert"), arguments(tmp_path, adapter="shared", hidden_weight=1.0))
    (weight, bias) = trainer.objective.parameters()
    assert weight.dtype == bias.dtype == torch.float64 and weight.shape == (32, 32)
    assert steps[0]["adapter.shared_adapters.32_32.weight"].abs().sum() > 0
