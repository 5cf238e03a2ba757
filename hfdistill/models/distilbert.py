"""BERT as DistilBERT: the same function without segment embeddings and pooler."""

from __future__ import annotations

import copy

import torch
import transformers
from transformers import DistilBertConfig, PreTrainedModel


HEADS = ("Model", "ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering")
# Parts of a parameter's name and how DistilBERT spells them. Order matters: `attention.output.` goes before `output.`.
NAMES = {
    "bert.": "distilbert.",
    "encoder.layer.": "transformer.layer.",
    "attention.self.query.": "attention.q_lin.",
    "attention.self.key.": "attention.k_lin.",
    "attention.self.value.": "attention.v_lin.",
    "attention.output.dense.": "attention.out_lin.",
    "attention.output.LayerNorm.": "sa_layer_norm.",
    "intermediate.dense.": "ffn.lin1.",
    "output.dense.": "ffn.lin2.",
    "output.LayerNorm.": "output_layer_norm.",
    "cls.predictions.transform.dense.": "vocab_transform.",
    "cls.predictions.transform.LayerNorm.": "vocab_layer_norm.",
    "cls.predictions.decoder.": "vocab_projector.",
    "cls.predictions.bias": "vocab_projector.bias",
}
_COPIED_ENTRIES = ("vocab_size", "max_position_embeddings", "initializer_range", "pad_token_id", "id2label", "label2id", "problem_type",
                   "tie_word_embeddings")  # fmt: skip


def to_distilbert(model: PreTrainedModel) -> PreTrainedModel:
    """The DistilBERT that computes what a BERT computes for one segment: a new model, weights copied.

    [DistilBERT](https://huggingface.co/papers/1910.01108) has no segment embeddings; that of segment 0 is added to every position
    embedding, so outputs stay the same up to rounding. Second segments and the pooler are lost. The depth is that of
    `model`: build a shallower BERT first (`build_student`), then convert it.

    Args:
        model (`PreTrainedModel`): a `BertModel`, `BertForMaskedLM`, `BertForTokenClassification` or `BertForQuestionAnswering`.

    Returns:
        `PreTrainedModel`: the DistilBERT class of the same head, in eval mode, in the dtype and on the device of `model`.

    Raises:
        ValueError: for another class (classifiers of whole texts pool with tanh in BERT and ReLU in DistilBERT, so they cannot be
            the same function), a decoder, or a LayerNorm epsilon that DistilBERT does not have.

    Example:
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> bert = BertForMaskedLM(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50))
        >>> type(to_distilbert(bert)).__name__
        'DistilBertForMaskedLM'
    """
    kind, config = type(model).__name__.removeprefix("Bert"), model.config
    if config.model_type != "bert" or kind not in HEADS:
        raise ValueError(
            f"{type(model).__name__} cannot be written as a DistilBERT that computes the same. Convert one of "
            f"{', '.join('Bert' + head for head in HEADS)}; for whole texts, fine-tune DistilBertForSequenceClassification from it."
        )
    if config.layer_norm_eps != 1e-12 or config.is_decoder:
        raise ValueError(
            f"A DistilBERT encodes with layer_norm_eps=1e-12, this BERT has {config.layer_norm_eps} and is_decoder={config.is_decoder}: "
            "it would compute something else. Keep the student a BERT."
        )
    dropout = {"dropout": config.hidden_dropout_prob, "attention_dropout": config.attention_probs_dropout_prob, "qa_dropout": 0.0}
    entries = {name: getattr(config, name) for name in _COPIED_ENTRIES}
    distil = DistilBertConfig(
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        dim=config.hidden_size,
        hidden_dim=config.intermediate_size,
        activation=config.hidden_act,
        **dropout,
        **entries,
    )
    if getattr(config, "distilled_from", None):
        distil.distilled_from = copy.deepcopy(config.distilled_from)
    with torch.random.fork_rng(devices=[]):  # its own first weights are thrown away: no draw of the caller's is used up
        converted = getattr(transformers, f"DistilBert{kind}")(distil).to(model.device, model.dtype).eval()
    weights = {distilbert_name(name): value for name, value in model.state_dict().items()}
    places = "distilbert.embeddings.position_embeddings.weight" if kind != "Model" else "embeddings.position_embeddings.weight"
    weights[places] = weights[places] + model.get_parameter(_segments(kind))[0].detach()
    own = converted.state_dict()
    missing = own.keys() - weights.keys()
    if missing:
        raise ValueError(f"BERT has no weights for {sorted(missing)} of DistilBERT: this version of Transformers names them otherwise.")
    converted.load_state_dict({name: weights[name] for name in own})
    if hasattr(model, "copy_report"):
        converted.copy_report = model.copy_report
    return converted


def distilbert_name(name: str) -> str:
    """DistilBERT's name of a parameter of BERT."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs, 1)
    return name


def _segments(kind: str) -> str:
    return f"{'' if kind == 'Model' else 'bert.'}embeddings.token_type_embeddings.weight"
