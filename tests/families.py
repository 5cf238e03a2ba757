"""Tiny random models of every architecture family the test-suite promises, built without a network."""

from __future__ import annotations

import torch
import transformers as tf


VOCAB, LENGTH, LABELS = 64, 9, 3
_TEXT = dict(vocab_size=VOCAB, num_labels=LABELS, pad_token_id=0)
_BERT = dict(hidden_size=32, num_attention_heads=4, intermediate_size=48, max_position_embeddings=40, **_TEXT)
_LLAMA = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, max_position_embeddings=40, **_TEXT)
_VIT = dict(hidden_size=32, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8, num_labels=LABELS)


def _text(prefix, **options):
    return lambda layers, head="SequenceClassification", **more: _build(prefix, head, {**options, **more}, layers)


def _build(prefix, head, options, layers):
    config = getattr(tf, f"{prefix}Config")(**{**options, "num_hidden_layers": layers})
    return getattr(tf, f"{prefix}{head}" if head == "LMHeadModel" else f"{prefix}For{head}")(config)


# name -> build(num_hidden_layers, head="SequenceClassification", **config overrides)
FAMILIES = {
    "bert": _text("Bert", **_BERT),
    "roberta": _text("Roberta", **_BERT),
    "distilbert": _text("DistilBert", dim=32, n_heads=4, hidden_dim=48, max_position_embeddings=40, **_TEXT),
    "albert": _text("Albert", embedding_size=16, **_BERT),
    "electra": _text("Electra", embedding_size=16, **_BERT),
    "mpnet": _text("MPNet", **_BERT),
    "deberta_v2": _text("DebertaV2", relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"], **_BERT),
    "modernbert": _text(
        "ModernBert",
        local_attention=4,
        global_attn_every_n_layers=2,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        **_BERT,
    ),
    "xlm_roberta": _text("XLMRoberta", **_BERT),
    "camembert": _text("Camembert", **_BERT),
    "gpt2": _text("GPT2", n_embd=32, n_head=4, n_inner=48, n_positions=40, bos_token_id=1, eos_token_id=2, **_TEXT),
    "llama": _text("Llama", bos_token_id=1, eos_token_id=2, **_LLAMA),
    "qwen2": _text("Qwen2", bos_token_id=1, eos_token_id=2, **_LLAMA),
    "qwen3": _text("Qwen3", head_dim=8, bos_token_id=1, eos_token_id=2, **_LLAMA),
    "vit": lambda layers, head="ImageClassification", **more: _build("ViT", head, {**_VIT, **more}, layers),
    "deit": lambda layers, head="ImageClassification", **more: _build("DeiT", head, {**_VIT, **more}, layers),
}
IMAGE_FAMILIES = ("vit", "deit")
CAUSAL_FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")


def build(family: str, layers: int, seed: int = 0, **options):
    """A tiny model in eval mode with reproducible random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FAMILIES[family](layers, **options).eval()


def batch(family: str, rows: int = 3, seed: int = 0, labels: bool = True) -> dict[str, torch.Tensor]:
    """Ragged, right-padded text (lengths 9, 6, 3, 9, ...) or 16x16 images, with single-label targets."""
    g = torch.Generator().manual_seed(seed)
    target = {"labels": torch.randint(0, LABELS, (rows,), generator=g)} if labels else {}
    if family in IMAGE_FAMILIES:
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=g), **target}
    ids = torch.randint(3, VOCAB, (rows, LENGTH), generator=g)
    lengths = torch.tensor([(9, 6, 3)[i % 3] for i in range(rows)])
    mask = (torch.arange(LENGTH)[None] < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, **target}
