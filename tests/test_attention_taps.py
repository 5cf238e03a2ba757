"""Queries, keys and values as the attention saw them, against the models' own projections and the captured scores."""

from __future__ import annotations

import families
import pytest
import torch
from torch import nn

from hfdistill.capture import Capture
from hfdistill.capture_plan import CapturePlan
from hfdistill.model_outputs import example_batch
from hfdistill.signals import ATTENTION_SIGNALS
from hfdistill.teachers.frozen import FrozenTeacher


OWN_ATTENTION = ("mpnet", "deberta_v2")  # theirs does not go through the attention interface
SEEN = [family for family in families.FAMILIES if family not in OWN_ATTENTION]
BLOCKS = frozenset({1, 2})
QKV = CapturePlan(queries=BLOCKS, keys=BLOCKS, values=BLOCKS)


def captured(model, batch, plan):
    capture = Capture(model, "student")
    capture.require(plan, example_batch(model))
    with torch.no_grad():
        return capture, capture(batch, plan)


def split(tensor, heads):
    """`(batch, length, heads * d)` -> `(batch, heads, length, d)`."""
    return tensor.view(*tensor.shape[:2], heads, -1).transpose(1, 2)


@pytest.mark.parametrize("family", SEEN)
def test_queries_and_keys_give_back_the_scores(family):
    """With rotary positions, biases and grouped heads, whatever the family has."""
    model, batch = families.build(family, 4), families.batch(family)
    plan = CapturePlan(attention_scores=BLOCKS).union(QKV)
    _, signals = captured(model, batch, plan)
    groups = 2 if family in ("llama", "qwen2", "qwen3") else 1
    for block in BLOCKS:
        queries, keys, values = (getattr(signals, name)[block] for name in ("queries", "keys", "values"))
        length = signals.attention_scores[block].size(2)
        assert queries.shape == (3, length, 32) and keys.shape == values.shape == (3, length, 32 // groups)
        q, k = split(queries, 4), split(keys, 4 // groups)
        expected = torch.stack([q[:, h] @ k[:, h // groups].transpose(1, 2) / 8**0.5 for h in range(4)], 1)
        torch.testing.assert_close(signals.attention_scores[block], expected, rtol=1e-5, atol=1e-6)


LINEAR = {
    "bert": lambda model, block: [getattr(model.bert.encoder.layer[block].attention.self, name) for name in ("query", "key", "value")],
    "distilbert": lambda model, block: [
        getattr(model.distilbert.transformer.layer[block].attention, name) for name in ("q_lin", "k_lin", "v_lin")
    ],
    "qwen2": lambda model, block: [None, None, model.model.layers[block].self_attn.v_proj],
}


@pytest.mark.parametrize("family", LINEAR)
def test_they_are_the_outputs_of_the_projections(family):
    """Biases included, in the order of the projection's own output; rotary models turn queries and keys afterwards."""
    model, batch = families.build(family, 4), families.batch(family)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    seen = {}
    modules = {(b, i): module for b in BLOCKS for i, module in enumerate(LINEAR[family](model, b)) if module is not None}
    for key, module in modules.items():
        module.register_forward_hook(lambda _m, _a, out, key=key: seen.__setitem__(key, out))
    _, signals = captured(model, batch, QKV)
    assert seen
    for (block, i), output in seen.items():
        assert torch.equal(getattr(signals, ("queries", "keys", "values")[i])[block], output)


@pytest.mark.parametrize("family", SEEN)
def test_capturing_changes_no_logit(family):
    model, batch = families.build(family, 4), families.batch(family)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        plain = model(**inputs).logits
        _, signals = captured(model, batch, QKV)
    assert torch.equal(plain, signals.logits)


@pytest.mark.parametrize("family", ["bert", "albert", "llama"])
@pytest.mark.parametrize("name", ATTENTION_SIGNALS)
def test_only_what_is_asked_for_is_kept(family, name, monkeypatch):
    """Scores are `length²` numbers a head: relations must not pay for them."""
    model, batch = families.build(family, 4), families.batch(family)
    capture = Capture(model, "student")
    capture.require(CapturePlan(values=BLOCKS), batch)
    made = []
    monkeypatch.setattr("hfdistill.attention_taps.repeat_kv", lambda key, groups: made.append(key) or key.repeat_interleave(groups, 1))
    signals = capture(batch, CapturePlan(**{name: frozenset({1})}))
    assert {other for other in ATTENTION_SIGNALS if getattr(signals, other)} == {name}
    assert list(getattr(signals, name)) == [1]
    assert len(made) == (name == "attention_scores")
    assert not capture._tap.found and not capture._tap.masks


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_attention_of_its_own_is_refused_with_the_cure(family):
    capture = Capture(families.build(family, 2), "teacher")
    message = r"runs an attention of its own, which shows its scores but not its queries, values: .* Use signal 'hidden_states'"
    with pytest.raises(ValueError, match=message):
        capture.require(CapturePlan(queries=frozenset({0}), values=frozenset({1})), families.batch(family))
    capture.require(CapturePlan(attention_scores=frozenset({0})), families.batch(family))  # scores it can give


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # read by PEFT itself
def test_learned_prefixes_are_refused():
    """Keys and values of a prefix have no token to be compared with."""
    import peft

    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(families.build("llama", 2, head="CausalLM"), config)
    capture = Capture(model, "student")
    message = r"The values of the student \(LlamaForCausalLM\) at block 0 have shape .*Use signal 'hidden_states'"
    with pytest.raises(ValueError, match=message):
        capture.require(CapturePlan(values=frozenset({0})), {k: v for k, v in families.batch("llama").items() if k != "labels"})


def test_a_teacher_cut_into_pieces_answers_as_one():
    batch = families.batch("qwen2", rows=5)
    whole, pieces = (FrozenTeacher(families.build("qwen2", 4), batch_size=size) for size in (None, 2))
    for teacher in (whole, pieces):
        teacher.capture.require(QKV, batch)
    for name in ("queries", "keys", "values"):
        a, b = (getattr(teacher(batch, QKV), name) for teacher in (whole, pieces))
        assert a.keys() == b.keys() == BLOCKS
        for block in BLOCKS:
            torch.testing.assert_close(a[block], b[block], rtol=1e-5, atol=1e-6)
            assert not a[block].requires_grad
