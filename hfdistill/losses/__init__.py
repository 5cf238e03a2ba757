"""The losses, by topic: `task` (hard labels), `logits`, `hidden`, `patient`, `attention`, `relation`. They know tensors, and no model."""

from __future__ import annotations

from .attention import AttentionKLLoss, AttentionMSELoss, AttentionScoreMSELoss
from .base import DistillationLoss, LossValue
from .hidden import CosineLoss, EmbeddingMSELoss, HiddenMomentsLoss, HiddenMSELoss, NormalizedHiddenMSELoss
from .logits import BinarySoftTargetsLoss, LogitMSELoss, RegressionMSELoss, SoftTargetsLoss
from .pairs import ContrastivePairsLoss
from .patient import PatientLoss
from .relation import RelationKLLoss
from .spans import TaskSpanLoss
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
    "relation_kl": RelationKLLoss,
    "patient": PatientLoss,
    "normalized_hidden_mse": NormalizedHiddenMSELoss,
    "hidden_moments": HiddenMomentsLoss,
}
"""Name in arguments and YAML -> distillation loss."""

__all__ = [
    "LOSSES",
    "TASK_LOSSES",
    "AttentionKLLoss",
    "AttentionMSELoss",
    "AttentionScoreMSELoss",
    "BinarySoftTargetsLoss",
    "ContrastivePairsLoss",
    "CosineLoss",
    "DistillationLoss",
    "EmbeddingMSELoss",
    "HiddenMSELoss",
    "HiddenMomentsLoss",
    "LogitMSELoss",
    "LossValue",
    "NormalizedHiddenMSELoss",
    "PatientLoss",
    "RegressionMSELoss",
    "RelationKLLoss",
    "SoftTargetsLoss",
    "TaskBinaryCrossEntropyLoss",
    "TaskCrossEntropyLoss",
    "TaskLoss",
    "TaskSpanLoss",
    "TaskSquaredErrorLoss",
]
