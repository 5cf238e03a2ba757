"""A teacher's pass ends with the last signal that was asked for, and gives what the whole pass gives."""

import families
import pytest
import torch
import transformers as tf
import vision_families
from torch import nn

from hfdistill.capture import Capture
from hfdistill.capture_plan import CapturePlan
from hfdistill.early_stop import same_signals


def ran(model, batch, capture, plan, **how):
    """Signals, and the names of the modules that were run."""
    names, handles = [], []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _m, _a, name=name: names.append(name)))
    with torch.no_grad():
        signals = capture(batch, plan, **how)
    for handle in handles:
        handle.remove()
    return signals, names


PLANS = {
    "hidden": dict(hidden_states=frozenset([0, 1])),
    "attention": dict(attention_scores=frozenset([1])),
    "keys": dict(keys=frozenset([0, 1])),
    "embeddings": dict(embeddings=True),
    "both": dict(hidden_states=frozenset([0]), attention_scores=frozenset([1]), embeddings=True),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "deberta_v2", "gpt2", "llama", "vit"])
def test_blocks_above_and_the_head_are_not_run(family, plan):
    if (family, plan) == ("deberta_v2", "keys"):
        pytest.skip("its attention shows no keys")
    head = {"gpt2": "LMHeadModel", "llama": "CausalLM", "vit": "ImageClassification"}.get(family, "MaskedLM")
    model = families.build(family, 4, head=head)
    batch, capture = families.batch(family), Capture(model, "teacher")
    plan = CapturePlan(logits=False, **PLANS[plan])
    capture.require(plan, batch)
    assert capture.check_early_stop(plan, batch)
    whole, every = ran(model, batch, capture, plan)
    stopped, names = ran(model, batch, capture, plan, stop_early=True)
    assert same_signals(whole, stopped)
    blocks = capture.blocks.path
    assert f"{blocks}.2" in every and f"{blocks}.3" in every and f"{blocks}.2" not in names and f"{blocks}.3" not in names
    assert not [name for name in names if name.startswith(("cls", "lm_head", "classifier", "vocab", "head", "decoder"))]
    again, _ = ran(model, batch, capture, CapturePlan())  # nothing of the stop stays behind
    torch.testing.assert_close(again.logits, model(**{k: v for k, v in batch.items() if k != "labels"}).logits)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_the_last_hidden_state_is_the_one_of_the_tuple_and_only_the_head_is_left_out(family):
    """After the final norm for GPT-2 and Llama, before it for ViT."""
    head = {"gpt2": "LMHeadModel", "llama": "CausalLM", "vit": "ImageClassification"}.get(family, "MaskedLM")
    model = families.build(family, 3, head=head)
    with torch.no_grad():
        for module in model.modules():  # a norm that does nothing would hide the difference
            if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None:
                module.weight.mul_(1.7)
    batch, capture = families.batch(family, labels=False), Capture(model, "teacher")
    plan = CapturePlan(logits=False, hidden_states=frozenset([2]))
    assert capture.check_early_stop(plan, batch)
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True).hidden_states[-1]
        found = capture(batch, plan, stop_early=True).hidden_states[2]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", ["resnet", "vit", "swin", "mobilenet_v2"])
def test_stages_of_image_models(family):
    model, batch = vision_families.build(family), vision_families.batch(vision_families.VISION[family][2])
    capture = Capture(model, "teacher")
    plan = CapturePlan(logits=False, features=frozenset([0]))
    capture.require(plan, batch)
    assert capture.check_early_stop(plan, batch)
    stages = capture.find_stages(batch)
    _, names = ran(model, batch, capture, plan, stop_early=True)
    assert stages.names[0] in names and stages.names[1] not in names


def test_blocks_that_are_one_module_are_run_to_the_end():
    model = families.build("albert", 3)
    assert not Capture(model, "teacher").check_early_stop(CapturePlan(hidden_states=frozenset([0])), families.batch("albert"))


class Rewriting(tf.BertForSequenceClassification):
    """Hidden states that are not what its blocks return."""

    def forward(self, input_ids, attention_mask=None, **options):
        output = super().forward(input_ids, attention_mask, **options)
        if output.hidden_states:
            output.hidden_states = tuple(None if state is None else 2 * state for state in output.hidden_states)
        return output


def test_a_pass_that_would_give_something_else_is_not_stopped():
    config = families.build("bert", 3).config
    capture = Capture(Rewriting(config).eval(), "teacher")
    plan, batch = CapturePlan(hidden_states=frozenset([0])), families.batch("bert", labels=False)
    assert not capture.check_early_stop(plan, batch)
    with torch.no_grad():
        stopped = capture(batch, CapturePlan(logits=False, hidden_states=frozenset([0])), stop_early=True)
    whole = capture(batch, CapturePlan(hidden_states=frozenset([0])))
    torch.testing.assert_close(stopped.hidden_states[0], whole.hidden_states[0])


def test_a_plan_with_logits_runs_to_the_end():
    model = families.build("bert", 2)
    capture, batch = Capture(model, "teacher"), families.batch("bert")
    assert capture.check_early_stop(CapturePlan(hidden_states=frozenset([0])), batch)
    assert capture(batch, CapturePlan(hidden_states=frozenset([0])), stop_early=True).logits is not None


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_any_torch_module():
    model, batch = Plain(), {"x": torch.randn(2, 4)}
    capture, plan = Capture(model, "teacher"), CapturePlan(logits=False, hidden_states=frozenset([1]))
    assert capture.check_early_stop(plan, batch)
    _, names = ran(model, batch, capture, plan, stop_early=True)
    assert names == ["", "blocks.0", "blocks.1"]
