"""The losses, by topic: `task` (hard labels), `logits`, `hidden`, `attention`. They know tensors, and no model."""

from __future__ import annotations

from .attention import AttentionKLLoss, AttentionMSELoss, AttentionScoreMSELoss
from .base import DistillationLoss, LossValue
from .hidden import CosineLoss, EmbeddingMSELoss, HiddenMSELoss
from .logits import BinarySoftTargetsLoss, LogitMSELoss, RegressionMSELoss, SoftTargetsLoss
from .task import TASK_LOSSES, TaskBinaryCrossEntropyLoss, TaskCrossEntropyLoss, TaskLoss, TaskSquaredErrorLoss


LOSSES: dict[str, type[DistillationLoss]] = {
    "soft_targets": SoftTargetsLoss,
    "binary_soft_targets": BinarySoftTargetsLoss,
    "regression_mse": RegressionMSELoss,
    "logit_mse": LogitMSELoss,
    "hidden_mse": HiddenMSELoss,
    "cosine": CosineLoss,
    "embedding_mse": EmbeddingMSELoss,
    "attention_score_mse": AttentionScoreMSELoss,
    "attention_kl": AttentionKLLoss,
    "attention_mse": AttentionMSELoss,
}
"""Name in arguments and YAML -> distillation loss."""

__all__ = [
    "LOSSES",
    "TASK_LOSSES",
    "AttentionKLLoss",
    "AttentionMSELoss",
    "AttentionScoreMSELoss",
    "BinarySoftTargetsLoss",
    "CosineLoss",
    "DistillationLoss",
    "EmbeddingMSELoss",
    "HiddenMSELoss",
    "LogitMSELoss",
    "LossValue",
    "RegressionMSELoss",
    "SoftTargetsLoss",
    "TaskBinaryCrossEntropyLoss",
    "TaskCrossEntropyLoss",
    "TaskLoss",
    "TaskSquaredErrorLoss",
]
