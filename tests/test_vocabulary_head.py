"""The head of a language model at chosen rows: the same logits, found out for each architecture, refused where it is not so."""

import families
import pytest
import torch
import transformers as tf

from hfdistill.capture import Capture
from hfdistill.capture_plan import CapturePlan


_SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=40,
    pad_token_id=0,
)
_CAUSAL = dict(bos_token_id=1, eos_token_id=2, **_SMALL)


def masked(family):
    return lambda: families.build(family, 2, head="MaskedLM")


MODELS = {
    "bert": masked("bert"),
    "roberta": masked("roberta"),
    "distilbert": masked("distilbert"),
    "albert": masked("albert"),
    "electra": masked("electra"),
    "mpnet": masked("mpnet"),
    "deberta_v2": masked("deberta_v2"),
    "modernbert": masked("modernbert"),
    "gpt2": lambda: families.build("gpt2", 2, head="LMHeadModel"),
    "llama": lambda: families.build("llama", 2, head="CausalLM"),
    "qwen3": lambda: families.build("qwen3", 2, head="CausalLM"),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_CAUSAL, num_key_value_heads=2, head_dim=8, final_logit_softcapping=30.0)),
    "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**_CAUSAL, logit_scale=0.25)),
    "granite": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**_CAUSAL, logits_scaling=4.0)),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, ffn_dim=48, num_attention_heads=4, max_position_embeddings=40,
            word_embed_proj_dim=32, bos_token_id=1, eos_token_id=2,
        )
    ),
}  # fmt: skip
EXPECTED = {"gemma2": (1.0, 30.0), "cohere": (0.25, None), "granite": (0.25, None)}


def example(rows=3):
    batch = families.batch("bert", rows=rows, labels=False)
    return {"input_ids": batch["input_ids"].clamp(min=3), "attention_mask": batch["attention_mask"]}


@pytest.mark.parametrize("name", MODELS)
def test_logits_at_rows_and_projections_are_those_of_the_whole_pass(name):
    model = MODELS[name]().eval()
    capture, batch = Capture(model, "student"), example()
    head = capture.understand_head(batch)
    assert head.place == ("embedding" if name == "opt" else "base")  # OPT goes past its base model
    assert head.projects and (head.scale, head.softcap) == EXPECTED.get(name, (1.0, None))
    rows = torch.tensor([1, 4, 9, 10, 25])
    with torch.no_grad():
        expected = model(**batch).logits.flatten(0, 1)[rows]
        found = capture(batch, CapturePlan(), rows=rows)
        projected = capture(batch, CapturePlan(hidden_states=frozenset([1])), rows=rows, project=False)
        whole = capture(batch, CapturePlan(hidden_states=frozenset([1])))
    assert found.shape == (3, 9) and found.logits.shape == (5, 64)
    torch.testing.assert_close(found.logits, expected, rtol=1e-5, atol=1e-6)
    assert projected.logits is None and projected.projection.features.shape[0] == 5
    torch.testing.assert_close(projected.projection.logits(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(projected.hidden_states[1], whole.hidden_states[1])  # the hooks leave the rest alone
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in (model.base_model, model.get_output_embeddings()))


def test_no_row_is_a_batch_too():
    capture = Capture(families.build("bert", 2, head="MaskedLM"), "student")
    capture.understand_head(example())
    assert capture(example(), CapturePlan(), rows=torch.zeros(0, dtype=torch.long)).logits.shape == (0, 64)


class Mixing(tf.BertForMaskedLM):
    """Logits of a position that depend on all others, behind the output embedding."""

    def forward(self, input_ids, attention_mask=None, **options):
        output = super().forward(input_ids, attention_mask, **options)
        output["logits"] = output["logits"] - output["logits"].mean(1, keepdim=True)
        return output


class Shifted(tf.BertForMaskedLM):
    """Something unknown is done to each logit."""

    def forward(self, input_ids, attention_mask=None, **options):
        output = super().forward(input_ids, attention_mask, **options)
        output["logits"] = output["logits"].exp()
        return output


def of_class(cls):
    config = tf.BertConfig(**{**_SMALL, "num_hidden_layers": 2})
    return cls(config).eval()


class Capped(tf.BertForMaskedLM):
    """A cap of which the config says nothing, far above the logits of random weights."""

    def forward(self, input_ids, attention_mask=None, **options):
        output = super().forward(input_ids, attention_mask, **options)
        output["logits"] = 30 * torch.tanh(output["logits"] / 30)
        return output


class Nested(tf.BertModel):
    """A base model that returns an object of its own."""

    def forward(self, input_ids, attention_mask=None, **options):
        return {"states": super().forward(input_ids, attention_mask, **options).last_hidden_state}


class Unusual(tf.BertForMaskedLM):
    def __init__(self, config):
        super().__init__(config)
        self.bert = Nested(config, add_pooling_layer=False)

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.cls(self.bert(input_ids, attention_mask)["states"])}


def test_what_is_not_understood_is_found_out():
    assert Capture(of_class(Mixing), "student").understand_head(example()).place is None
    for cls in (Shifted, Capped):
        head = Capture(of_class(cls), "student").understand_head(example())
        assert head.place == "base" and not head.projects, cls
    head = Capture(of_class(Unusual), "student").understand_head(example())
    assert head.place == "embedding" and head.projects


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cap_is_seen_in_half_precision_too(dtype):
    """There it changes logits of random weights by less than rounding does."""
    head = Capture(MODELS["gemma2"]().to(dtype).eval(), "teacher").understand_head(example())
    assert head.projects and head.softcap == 30.0
    assert not Capture(of_class(Capped).to(dtype), "teacher").understand_head(example()).projects


def test_left_padding_and_long_rows_are_tried_on_real_tokens():
    model = families.build("llama", 2, head="CausalLM")
    ids = torch.randint(3, 64, (2, 40))
    mask = torch.ones_like(ids)
    mask[:, :36] = 0
    assert Capture(model, "student").understand_head({"input_ids": ids, "attention_mask": mask}).projects


def test_too_little_memory_is_not_taken_for_an_unknown_head(monkeypatch):
    model = families.build("bert", 2, head="MaskedLM")
    monkeypatch.setattr(model.cls, "forward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(torch.OutOfMemoryError):
        Capture(model, "student").understand_head(example())


def test_an_adapter_or_a_frozen_shape_on_the_output_embedding_is_no_plain_projection():
    model = families.build("llama", 2, head="CausalLM")
    embedding = torch.nn.utils.parametrizations.weight_norm(model.get_output_embeddings())
    assert embedding is model.get_output_embeddings()
    head = Capture(model, "student").understand_head(example())
    assert head.place == "base" and not head.projects


def test_half_precision_is_compared_with_its_own_tolerance():
    model = families.build("bert", 2, head="MaskedLM").to(torch.bfloat16)
    head = Capture(model, "teacher").understand_head(example())
    assert head.place == "base" and head.projects


def test_features_come_in_the_dtype_of_autocast():
    model = families.build("bert", 2, head="MaskedLM")
    capture = Capture(model, "student")
    capture.understand_head(example())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        signals = capture(example(), CapturePlan(), rows=torch.tensor([0, 3]), project=False)
    assert signals.projection.features.dtype == torch.bfloat16 and signals.projection.weight.dtype == torch.float32
