"""What is measured: pairs of models with random weights, their data, and the objective in plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from ..suggest import did_you_mean
from . import formulas


SEED = 0
MASKED_SHARE = 0.15
_BATCHES = 2  # in the data; steps are always taken on the first one
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass
class Objective:
    """What is minimised, twice: as settings of `DistillationTrainingArguments`, and as a formula on whole model outputs.

    Args:
        settings: training arguments of hfdistill.
        formula: `(student output, teacher output, batch, projections) -> loss`; `None` where model outputs do not hold what is compared.
        note: what it is.
    """

    settings: dict[str, Any]
    formula: Callable[[Any, Any, Mapping[str, Tensor], nn.ModuleList], Tensor] | None
    note: str


@dataclass
class Workload:
    """A pair of models, a batch, and objectives by name; `distil` is the one that all libraries minimise.

    Args:
        name, title: by which it is chosen, and what it is.
        student, teacher: models with random weights, without dropout. Take copies: [`new_student`], [`new_teacher`].
        rows (`datasets.Dataset`): training data, two batches of full length.
        batch_size: rows of a step.
        objectives: name -> [`Objective`].
        outputs: what a forward pass is asked for by those who need captured layers.
        attentions: whether attention maps are among it, which only eager attention returns.
        projection_widths: `(student, teacher)` widths of the projections; of convolutions with `maps`.
        vocabulary: classes of a language model, else 0.
    """

    name: str
    title: str
    student: PreTrainedModel
    teacher: PreTrainedModel
    rows: Dataset
    batch_size: int
    objectives: dict[str, Objective]
    outputs: dict[str, bool] = field(default_factory=dict)
    attentions: bool = False
    projection_widths: tuple[tuple[int, int], ...] = ()
    maps: bool = False
    vocabulary: int = 0

    def new_student(self) -> PreTrainedModel:
        """A copy with the first weights, in training mode."""
        return copy.deepcopy(self.student).train()

    def new_teacher(self) -> PreTrainedModel:
        return copy.deepcopy(self.teacher).eval()

    def new_projections(self) -> nn.ModuleList:
        """The same first weights for everybody: linear maps with bias, or 1x1 convolutions."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            made = [nn.Conv2d(s, t, 1) if self.maps else nn.Linear(s, t) for s, t in self.projection_widths]
            for module in made:
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        return nn.ModuleList(made)

    def batch(self) -> dict[str, Tensor]:
        """The batch of every step, without the ids of its examples."""
        return {name: value for name, value in self.rows[: self.batch_size].items() if name != "example_id"}


def build_workload(name: str, size: str = "full", **changes: int) -> Workload:
    """Makes a workload of the table; the same weights and data on every call.

    Args:
        name (`str`): one of `WORKLOADS`.
        size (`str`): `full`, or `tiny` for tests.
        changes: other sizes than the workload's own: `batch`, `length`, `vocabulary`.

    Raises:
        ValueError: for unknown names and sizes.
    """
    if name not in WORKLOADS:
        raise ValueError(f"There is no workload {name!r}.{did_you_mean(name, WORKLOADS)} Known: {', '.join(WORKLOADS)}.")
    build, sizes = WORKLOADS[name]
    if size not in sizes:
        raise ValueError(f"size must be one of {', '.join(sizes)}, got {size!r}.")
    unknown = sorted(changes.keys() - sizes[size].keys())
    if unknown:
        raise ValueError(f"The workload {name} has no size {unknown[0]!r}.{did_you_mean(unknown[0], sizes[size])}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return build(name, **{**sizes[size], **changes})


# ---- Builders ----


def _rows(columns: Mapping[str, Tensor]) -> Dataset:
    count = len(next(iter(columns.values())))
    columns = {**columns, "example_id": torch.arange(count)}
    return Dataset.from_dict({name: value.numpy() for name, value in columns.items()}).with_format("torch")


def _tokens(batch: int, length: int, vocabulary: int) -> dict[str, Tensor]:
    ids = torch.randint(min(1000, vocabulary // 4), vocabulary, (_BATCHES * batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _bert(layers: int, width: int, vocabulary: int, length: int, heads: int) -> BertConfig:
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=length,
        **_NO_DROPOUT,
    )


def _masked_lm(name, *, batch, length, vocabulary, width, teacher_layers, student_layers) -> Workload:
    columns = _tokens(batch, length, vocabulary)
    chosen = torch.rand(columns["input_ids"].shape) < MASKED_SHARE
    chosen[:, 0] = True  # no row without a label
    columns["labels"] = torch.where(chosen, columns["input_ids"], -100)
    columns["input_ids"] = torch.where(chosen, 3, columns["input_ids"])  # one id stands for [MASK]
    heads = max(width // 64, 2)
    settings = {"task_weight": 2.0, "kd_weight": 5.0, "cosine_weight": 1.0, "temperature": 2.0}
    return Workload(
        name,
        f"masked language model, {teacher_layers}x{width} -> {student_layers}x{width}, vocabulary {vocabulary:,}, {batch}x{length} "
        f"tokens, {MASKED_SHARE:.0%} masked, 5 KL at T=2 + 2 CE + cosine",
        BertForMaskedLM(_bert(student_layers, width, vocabulary, length, heads)),
        BertForMaskedLM(_bert(teacher_layers, width, vocabulary, length, heads)),
        _rows(columns),
        batch,
        {
            "distil": Objective({**settings, "kd_positions": "all"}, formulas.triple(masked=False), "KL on all rows"),
            "masked": Objective({**settings, "kd_positions": "labelled"}, formulas.triple(masked=True), "KL on masked rows only"),
        },
        outputs={"output_hidden_states": True},
        vocabulary=vocabulary,
    )


def _layers(name, *, batch, length, vocabulary, teacher_width, student_width, heads, teacher_layers, student_layers) -> Workload:
    columns = {**_tokens(batch, length, vocabulary), "labels": torch.arange(_BATCHES * batch) % 2}
    step = teacher_layers // student_layers
    pairs = [(s, (s + 1) * step - 1) for s in range(student_layers)]
    settings = {
        "task_weight": 0.0,
        "kd_weight": 0.0,
        "hidden_weight": 1.0,
        "embedding_weight": 1.0,
        "attention_weight": 1.0,
        "layer_map": ",".join(f"{s}:{t}" for s, t in pairs),
        "layer_reduction": "sum",
        "adapter": "linear",
    }
    return Workload(
        name,
        f"TinyBERT's terms (hidden states, attention, embeddings), {teacher_layers}x{teacher_width} -> {student_layers}x{student_width}, "
        f"{batch}x{length} tokens",
        BertForSequenceClassification(_bert(student_layers, student_width, vocabulary, length, heads)),
        BertForSequenceClassification(_bert(teacher_layers, teacher_width, vocabulary, length, heads)),
        _rows(columns),
        batch,
        {
            "distil": Objective({**settings, "attention_loss": "attention_mse"}, formulas.tinybert(pairs), "attention after the softmax"),
            "scores": Objective({**settings, "attention_loss": "attention_score_mse"}, None, "attention before the softmax, as TinyBERT"),
        },
        outputs={"output_hidden_states": True, "output_attentions": True},
        attentions=True,
        projection_widths=((student_width, teacher_width),) * (student_layers + 1),
    )


def _images(batch: int, side: int, classes: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(_BATCHES * batch, 3, side, side), "labels": torch.arange(_BATCHES * batch) % classes}


def _vit(name, *, batch, side, patch, classes, layers, teacher_width, student_width) -> Workload:
    def model(width):
        return ViTForImageClassification(
            ViTConfig(
                image_size=side, patch_size=patch, hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(width // 32, 2),
                intermediate_size=4 * width, num_labels=classes, **_NO_DROPOUT,
            )  # fmt: skip
        )

    settings = {"task_weight": 0.5, "kd_weight": 0.5, "temperature": 2.0}
    return Workload(
        name,
        f"ViT {layers}x{teacher_width} -> {layers}x{student_width}, {side}x{side} pixels, patch {patch}, batch {batch}, KL at T=2 + CE",
        model(student_width),
        model(teacher_width),
        _rows(_images(batch, side, classes)),
        batch,
        {"distil": Objective(settings, formulas.classes, "logits and labels")},
    )


def _resnet(name, *, batch, side, classes, teacher_width, student_width, depth) -> Workload:
    def model(width):
        sizes = [width * 2**stage for stage in range(4)]
        config = ResNetConfig(embedding_size=width, hidden_sizes=sizes, depths=[depth] * 4, layer_type="basic", num_labels=classes)
        return ResNetForImageClassification(config)

    terms = [
        {"loss": "task", "weight": 0.5},
        {"loss": "soft_targets", "weight": 0.5, "temperature": 2.0},
        {"loss": "hint", "weight": 1.0, "layer_map": "1:1", "adapter": "linear"},
        {"loss": "attention_transfer", "weight": 1000.0, "layer_map": "0:0,1:1,2:2,3:3", "layer_reduction": "sum"},
    ]
    return Workload(
        name,
        f"ResNet of 4 stages of {depth} blocks, {teacher_width} to {8 * teacher_width} -> {student_width} to {8 * student_width} channels, "
        f"{side}x{side} pixels, batch {batch}, KL at T=2 + CE + hint at one stage + attention transfer at four",
        model(student_width),
        model(teacher_width),
        _rows(_images(batch, side, classes)),
        batch,
        {"distil": Objective({"objective": terms}, formulas.hint_and_attention, "logits, labels and maps")},
        outputs={"output_hidden_states": True},
        projection_widths=((2 * student_width, 2 * teacher_width),),
        maps=True,
    )


def _causal_lm(name, *, batch, length, vocabulary, width, teacher_layers, student_layers) -> Workload:
    def model(layers):
        heads = max(width // 64, 2)
        return Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
                intermediate_size=4 * width, max_position_embeddings=length, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
                pad_token_id=0, use_cache=False,
            )  # fmt: skip
        )

    columns = _tokens(batch, length, vocabulary)
    labels = columns["input_ids"].clone()
    labels[:, 0] = -100  # nothing predicts the first token: counted by some, not by others
    settings = {"task_weight": 0.0, "kd_weight": 1.0, "temperature": 1.0}
    return Workload(
        name,
        f"causal language model, {teacher_layers}x{width} -> {student_layers}x{width}, vocabulary {vocabulary:,}, {batch}x{length} tokens, "
        "forward KL at T=1",
        model(student_layers),
        model(teacher_layers),
        _rows({**columns, "labels": labels}),
        batch,
        {"distil": Objective(settings, formulas.next_tokens, "forward KL on all next tokens")},
        vocabulary=vocabulary,
    )


def _classifier(name, *, batch, length, vocabulary, width, heads, teacher_layers, student_layers) -> Workload:
    columns = {**_tokens(batch, length, vocabulary), "labels": torch.arange(_BATCHES * batch) % 2}
    settings = {"task_weight": 0.5, "kd_weight": 0.5, "temperature": 2.0}
    return Workload(
        name,
        f"BERT classifier, {teacher_layers}x{width} -> {student_layers}x{width}, {batch}x{length} tokens, KL at T=2 + CE",
        BertForSequenceClassification(_bert(student_layers, width, vocabulary, length, heads)),
        BertForSequenceClassification(_bert(teacher_layers, width, vocabulary, length, heads)),
        _rows(columns),
        batch,
        {"distil": Objective(settings, formulas.classes, "logits and labels")},
    )


WORKLOADS: dict[str, tuple[Callable[..., Workload], dict[str, dict[str, int]]]] = {
    "W1": (
        _masked_lm,
        {
            "full": dict(batch=16, length=128, vocabulary=30_522, width=256, teacher_layers=6, student_layers=3),
            "tiny": dict(batch=2, length=12, vocabulary=64, width=32, teacher_layers=2, student_layers=1),
        },
    ),
    "W2": (
        _layers,
        {
            "full": dict(
                batch=16, length=128, vocabulary=30_522, teacher_width=256, student_width=128, heads=4, teacher_layers=6, student_layers=3
            ),
            "tiny": dict(
                batch=2, length=12, vocabulary=64, teacher_width=32, student_width=16, heads=2, teacher_layers=4, student_layers=2
            ),
        },
    ),
    "W3": (
        _vit,
        {
            "full": dict(batch=32, side=64, patch=8, classes=100, layers=6, teacher_width=256, student_width=128),
            "tiny": dict(batch=4, side=16, patch=8, classes=3, layers=2, teacher_width=32, student_width=16),
        },
    ),
    "W4": (
        _resnet,
        {
            "full": dict(batch=32, side=64, classes=100, teacher_width=64, student_width=32, depth=2),
            "tiny": dict(batch=2, side=48, classes=3, teacher_width=16, student_width=8, depth=1),
        },
    ),
    "W5": (
        _causal_lm,
        {
            "full": dict(batch=4, length=256, vocabulary=151_936, width=256, teacher_layers=4, student_layers=2),
            "tiny": dict(batch=2, length=12, vocabulary=64, width=32, teacher_layers=2, student_layers=1),
        },
    ),
    "bert_base": (
        _classifier,
        {
            "full": dict(batch=4, length=128, vocabulary=30_522, width=768, heads=12, teacher_layers=12, student_layers=6),
            "tiny": dict(batch=2, length=12, vocabulary=64, width=32, heads=2, teacher_layers=2, student_layers=1),
        },
    ),
}
