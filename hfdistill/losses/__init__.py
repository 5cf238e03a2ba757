"""The losses, one topic a file. They know tensors, and no model.

Hard labels: `task`, `spans`, `pairs`. Logits: `logits`, `divergences`, `decoupled`, `correlation`, `ranking`, of vocabularies
`top_k`, `vocabulary`. Hidden states: `hidden`, `patient`,
`attention`, `relation`. Feature maps: `hint`, `maps`, `flow`, `information`, `review`. Relations between samples: `sample_relations`,
`instance_graph`, `contrastive`, `memory_bank`.
"""

from __future__ import annotations

from .attention import AttentionKLLoss, AttentionMSELoss, AttentionScoreMSELoss
from .base import DistillationLoss, LossValue
from .batch import BatchLoss
from .contrastive import InfoNCELoss
from .correlation import DISTLoss
from .decoupled import DecoupledLoss
from .divergences import JSDLoss, ReverseKLLoss
from .flow import FSPLoss
from .hidden import CosineLoss, EmbeddingMSELoss, HiddenMomentsLoss, HiddenMSELoss, NormalizedHiddenMSELoss
from .hint import HintLoss
from .information import VIDLoss
from .instance_graph import InstanceGraphLoss
from .logits import BinarySoftTargetsLoss, HardTargetsLoss, LogitMSELoss, RegressionMSELoss, SoftTargetsLoss, StandardizedSoftTargetsLoss
from .maps import AttentionTransferLoss, FactorTransferLoss, NSTLoss
from .memory_bank import CRDLoss
from .pairs import ContrastivePairsLoss
from .patient import PatientLoss
from .ranking import DarkRankLoss, MarginMSELoss
from .relation import RelationKLLoss
from .review import HCLLoss, ReviewLoss
from .sample_relations import CorrelationCongruenceLoss, PKTLoss, RKDAngleLoss, RKDDistanceLoss, SimilarityKLLoss, SimilarityPreservingLoss
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
    "hard_targets": HardTargetsLoss,
    "standardized_soft_targets": StandardizedSoftTargetsLoss,
    "decoupled": DecoupledLoss,
    "dist": DISTLoss,
    "margin_mse": MarginMSELoss,
    "hint": HintLoss,
    "attention_transfer": AttentionTransferLoss,
    "nst": NSTLoss,
    "factor_transfer": FactorTransferLoss,
    "fsp": FSPLoss,
    "vid": VIDLoss,
    "review": ReviewLoss,
    "hcl": HCLLoss,
    "similarity_preserving": SimilarityPreservingLoss,
    "rkd_distance": RKDDistanceLoss,
    "rkd_angle": RKDAngleLoss,
    "correlation_congruence": CorrelationCongruenceLoss,
    "pkt": PKTLoss,
    "similarity_kl": SimilarityKLLoss,
    "instance_graph": InstanceGraphLoss,
    "dark_rank": DarkRankLoss,
    "crd": CRDLoss,
    "info_nce": InfoNCELoss,
    "reverse_kl": ReverseKLLoss,
    "jsd": JSDLoss,
}
"""Name in arguments and YAML -> distillation loss."""

__all__ = [
    "LOSSES",
    "TASK_LOSSES",
    "AttentionKLLoss",
    "AttentionMSELoss",
    "AttentionScoreMSELoss",
    "AttentionTransferLoss",
    "BatchLoss",
    "BinarySoftTargetsLoss",
    "CRDLoss",
    "ContrastivePairsLoss",
    "CorrelationCongruenceLoss",
    "CosineLoss",
    "DISTLoss",
    "DarkRankLoss",
    "DecoupledLoss",
    "DistillationLoss",
    "EmbeddingMSELoss",
    "FSPLoss",
    "FactorTransferLoss",
    "HCLLoss",
    "HardTargetsLoss",
    "HiddenMSELoss",
    "HiddenMomentsLoss",
    "HintLoss",
    "InfoNCELoss",
    "InstanceGraphLoss",
    "JSDLoss",
    "LogitMSELoss",
    "LossValue",
    "MarginMSELoss",
    "NSTLoss",
    "NormalizedHiddenMSELoss",
    "PKTLoss",
    "PatientLoss",
    "RKDAngleLoss",
    "RKDDistanceLoss",
    "RegressionMSELoss",
    "RelationKLLoss",
    "ReverseKLLoss",
    "ReviewLoss",
    "SimilarityKLLoss",
    "SimilarityPreservingLoss",
    "SoftTargetsLoss",
    "StandardizedSoftTargetsLoss",
    "TaskBinaryCrossEntropyLoss",
    "TaskCrossEntropyLoss",
    "TaskLoss",
    "TaskSpanLoss",
    "TaskSquaredErrorLoss",
    "VIDLoss",
]
