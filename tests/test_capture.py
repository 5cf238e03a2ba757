"""Captured signals against what Transformers itself returns, for every family."""

import copy
import gc
import weakref

import families
import pytest
import torch
from torch import nn

from hfdistill.capture import Capture
from hfdistill.capture_plan import CapturePlan
from hfdistill.model_outputs import example_batch
from hfdistill.signals import Signals


EVERYTHING = CapturePlan(logits=True, embeddings=True, pooled=True, hidden_states=frozenset({0, 2}), attention_scores=frozenset({1, 2}))


def captured(model, batch, plan=EVERYTHING, require=True) -> tuple[Capture, Signals]:
    capture = Capture(model, "student")
    if require:
        capture.require(plan, example_batch(model))
    return capture, capture(batch, plan)


@pytest.mark.parametrize("family", families.FAMILIES)
class TestEveryFamily:
    def test_hidden_states_embeddings_and_logits_are_those_of_transformers(self, family):
        model, batch = families.build(family, 4), families.batch(family)
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        with torch.no_grad():
            reference = model(**inputs, output_hidden_states=True)
            _, signals = captured(model, batch)
        torch.testing.assert_close(signals.logits, reference.logits, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(signals.embeddings, reference.hidden_states[0], rtol=1e-6, atol=1e-6)
        assert sorted(signals.hidden_states) == [0, 2]
        for block, states in signals.hidden_states.items():
            torch.testing.assert_close(states, reference.hidden_states[block + 1], rtol=1e-6, atol=1e-6)

    def test_attention_probabilities_are_those_of_the_eager_model(self, family):
        model, batch = families.build(family, 4), families.batch(family)
        eager = families.build(family, 4)
        eager.set_attn_implementation("eager")
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        with torch.no_grad():
            reference = eager(**inputs, output_attentions=True).attentions
            _, signals = captured(model, batch)
        assert sorted(signals.attention_scores) == [1, 2]
        for block in (1, 2):
            probabilities = signals.attention_probabilities(block)
            rows = signals.attention_allowed[block].any(-1, keepdim=True).expand_as(probabilities)
            torch.testing.assert_close(probabilities[rows], reference[block][rows].detach(), rtol=1e-5, atol=1e-6)

    def test_capturing_does_not_change_the_model(self, family):
        model, batch = families.build(family, 4), families.batch(family)
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        before = model.config.to_dict()
        with torch.no_grad():
            plain = model(**inputs).logits
            capture, signals = captured(model, batch)
            after = model(**inputs).logits
        assert torch.equal(plain, signals.logits) and torch.equal(plain, after)
        assert {k: v for k, v in model.config.to_dict().items() if "attn" not in k} == {k: v for k, v in before.items() if "attn" not in k}
        assert "hfdistill" not in model.config.to_json_string()
        capture.release()
        assert torch.equal(plain, model(**inputs).logits)

    def test_train_mode_scores_are_free_of_dropout(self, family):
        model, batch = families.build(family, 4, **dropouts(family)), families.batch(family)
        capture, still = captured(model, batch, CapturePlan(attention_scores=frozenset({0})))
        model.train()
        noisy = capture(batch, CapturePlan(attention_scores=frozenset({0})))
        # Block 0 sees embeddings; with attention dropout alone they are the same, so the scores must be too.
        torch.testing.assert_close(noisy.attention_scores[0], still.attention_scores[0])
        sums = noisy.attention_probabilities(0).sum(-1)
        rows = noisy.attention_allowed[0].any(-1).expand_as(sums)
        torch.testing.assert_close(sums[rows], torch.ones_like(sums[rows]))

    def test_gradients_reach_the_query_projection(self, family):
        model, batch = families.build(family, 4), families.batch(family)
        capture, _ = captured(model, batch)
        model.train()
        signals = capture(batch, EVERYTHING)
        torch.where(signals.attention_allowed[2], signals.attention_scores[2], 0).square().sum().backward()
        moved = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
        assert any(any(word in name for word in ("query", "q_proj", "q_lin", "Wqkv", "c_attn", ".q.")) for name in moved), moved

    def test_nothing_stays_behind(self, family):
        model, batch = families.build(family, 4), families.batch(family)
        capture, signals = captured(model, batch)
        scores = weakref.ref(signals.attention_scores[1])
        del signals
        gc.collect()
        assert scores() is None
        copy.deepcopy(model)


def dropouts(family: str) -> dict:
    """Attention dropout on, every other dropout off."""
    if family in ("distilbert",):
        return {"attention_dropout": 0.5, "dropout": 0.0}
    if family in ("gpt2",):
        return {"attn_pdrop": 0.5, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    if family in ("llama", "qwen2", "qwen3"):
        return {"attention_dropout": 0.5}
    if family in ("modernbert",):
        return {"attention_dropout": 0.5, "embedding_dropout": 0.0, "mlp_dropout": 0.0}
    return {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.0}


def test_only_what_is_asked_for_comes_back():
    model, batch = families.build("bert", 4), families.batch("bert")
    _, signals = captured(model, batch, CapturePlan(logits=False, hidden_states=frozenset({1})))
    assert signals.logits is None and signals.embeddings is None and signals.pooled is None
    assert list(signals.hidden_states) == [1] and not signals.attention_scores


def test_pooled_is_the_pooler_the_first_token_or_the_last_real_token():
    batch = families.batch("bert")
    bert = families.build("bert", 2)
    with torch.no_grad():
        plan = CapturePlan(pooled=True)
        assert torch.equal(captured(bert, batch, plan)[1].pooled, bert.bert(batch["input_ids"], batch["attention_mask"]).pooler_output)
        distilbert = families.build("distilbert", 2)
        states = distilbert.distilbert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        assert torch.equal(captured(distilbert, batch, plan)[1].pooled, states[:, 0])
        gpt = families.build("gpt2", 2)
        states = gpt.transformer(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        assert torch.equal(captured(gpt, batch, plan)[1].pooled, states[[0, 1, 2], [8, 5, 2]])


def test_columns_the_model_does_not_know_are_left_out():
    model = families.build("distilbert", 2)
    batch = {**families.batch("distilbert"), "token_type_ids": torch.zeros(3, 9, dtype=torch.long), "idx": torch.arange(3)}
    assert sorted(Capture(model).select_inputs(batch)) == ["attention_mask", "input_ids"]


class Plain(nn.Module):
    """A module that is no PreTrainedModel: blocks are found by shape, hidden states by hooks."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(families.VOCAB, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask=None):
        x = self.table(input_ids)
        for layer in self.layers:
            x = layer(x)
        return {"logits": self.head(x[:, 0])}


def test_unknown_modules_are_read_by_hooks():
    model, batch = Plain().eval(), families.batch("bert")
    capture = Capture(model, "teacher")
    signals = capture(batch, CapturePlan(embeddings=True, hidden_states=frozenset({0, 2})))
    x = model.table(batch["input_ids"])
    assert torch.equal(signals.embeddings, x)
    assert torch.equal(signals.hidden_states[0], model.layers[0](x))
    assert torch.equal(signals.hidden_states[2], model.layers[2](model.layers[1](model.layers[0](x))))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_attention_of_a_model_without_any_is_refused():
    capture = Capture(Plain(), "teacher")
    with pytest.raises(ValueError, match=r"The teacher \(Plain\) has no attention that can be read.*Set attention_weight to 0"):
        capture.require(CapturePlan(attention_scores=frozenset({0})), families.batch("bert"))


def test_blocks_that_do_not_exist_are_refused():
    capture = Capture(families.build("bert", 2), "student")
    with pytest.raises(ValueError, match=r"names blocks \[5\] of the student \(BertForSequenceClassification\), which has blocks 0 to 1"):
        capture.require(CapturePlan(hidden_states=frozenset({0, 5})), families.batch("bert"))


def test_require_leaves_train_mode_as_it_was():
    model = families.build("bert", 2)
    model.train()
    model.bert.encoder.layer[0].eval()
    modes = [m.training for m in model.modules()]
    Capture(model).require(EVERYTHING.__class__(attention_scores=frozenset({0})), families.batch("bert"))
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("family", ["bert", "vit", "llama", "deberta_v2"])
def test_gradient_checkpointing_gives_the_same_gradient(family):
    plan = CapturePlan(hidden_states=frozenset({1}), attention_scores=frozenset({0, 2}))
    gradients = []
    for checkpointing in (False, True):
        model, batch = families.build(family, 4), families.batch(family)
        capture = Capture(model)
        capture.require(plan, batch)
        for p in model.parameters():  # train mode, in which checkpointing acts, but without dropout
            p.requires_grad_(True)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for module in model.modules():
            for name in ("dropout_prob", "attention_dropout", "dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        signals = capture(batch, plan)
        loss = signals.hidden_states[1].square().mean()
        for block, scores in signals.attention_scores.items():
            loss = loss + torch.where(signals.attention_allowed[block], scores, 0).square().mean()
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
