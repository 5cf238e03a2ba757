"""Knowledge distillation for Hugging Face models: a teacher in, a student out.

Public names are imported when they are first used, so `import hfdistill` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0.dev0"

_NAMES = {
    "trainer": ("DistillationTrainer",),
    "arguments": ("TEACHER_WEIGHTS", "DistillationTrainingArguments"),
    "models.student": ("build_student", "copy_weights"),
    "models.layer_map": ("LAYER_MAPS", "resolve_layer_map"),
    "terms": ("Term",),
    "objective": ("Objective",),
    "binding": ("build_objective",),
    "losses": (
        "LOSSES",
        "TASK_LOSSES",
        "AttentionKLLoss",
        "AttentionMSELoss",
        "AttentionScoreMSELoss",
        "BinarySoftTargetsLoss",
        "CosineLoss",
        "EmbeddingMSELoss",
        "HiddenMSELoss",
        "LogitMSELoss",
        "RegressionMSELoss",
        "SoftTargetsLoss",
        "TaskBinaryCrossEntropyLoss",
        "TaskCrossEntropyLoss",
        "TaskLoss",
        "TaskSquaredErrorLoss",
    ),
    "losses.base": ("DistillationLoss", "LossValue"),
    "signals": ("Signals",),
    "capture": ("Capture",),
    "teachers": ("CallableTeacher", "FrozenTeacher"),
    "teachers.loading": ("load_named_part", "load_teacher", "load_tokenizer"),
    "schedules": ("Schedule", "resolve_schedule"),
    "data.stdlib_docs": ("load_stdlib_docs", "load_stdlib_docs_splits"),
    "data.text": ("TextData", "encode_texts", "load_embedded", "load_named", "match_labels"),
    "data.tokenizer": ("train_wordpiece",),
    "metrics": ("GLUE_METRICS", "agreement", "gap_closed", "glue_metric", "load_metric", "metric_function"),
    "alignment": ("resolve_vocabulary",),
    "baselines": ("linear_baselines", "majority_share", "tfidf_logistic_regression"),
    "runs": ("Arm", "Run", "compare_arms", "refuse_weak_teacher", "run_fingerprint"),
    "benchmark": ("measure_model",),
    "plots": ("plot_results",),
    "report": ("results_table", "write_results"),
    "cli": ("parse",),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:  # the table above, for type checkers and editors; tests/test_house.py compares the two
    from .alignment import resolve_vocabulary as resolve_vocabulary
    from .arguments import TEACHER_WEIGHTS as TEACHER_WEIGHTS
    from .arguments import DistillationTrainingArguments as DistillationTrainingArguments
    from .baselines import linear_baselines as linear_baselines
    from .baselines import majority_share as majority_share
    from .baselines import tfidf_logistic_regression as tfidf_logistic_regression
    from .benchmark import measure_model as measure_model
    from .binding import build_objective as build_objective
    from .capture import Capture as Capture
    from .cli import parse as parse
    from .data.stdlib_docs import load_stdlib_docs as load_stdlib_docs
    from .data.stdlib_docs import load_stdlib_docs_splits as load_stdlib_docs_splits
    from .data.text import TextData as TextData
    from .data.text import encode_texts as encode_texts
    from .data.text import load_embedded as load_embedded
    from .data.text import load_named as load_named
    from .data.text import match_labels as match_labels
    from .data.tokenizer import train_wordpiece as train_wordpiece
    from .losses import LOSSES as LOSSES
    from .losses import TASK_LOSSES as TASK_LOSSES
    from .losses import AttentionKLLoss as AttentionKLLoss
    from .losses import AttentionMSELoss as AttentionMSELoss
    from .losses import AttentionScoreMSELoss as AttentionScoreMSELoss
    from .losses import BinarySoftTargetsLoss as BinarySoftTargetsLoss
    from .losses import CosineLoss as CosineLoss
    from .losses import EmbeddingMSELoss as EmbeddingMSELoss
    from .losses import HiddenMSELoss as HiddenMSELoss
    from .losses import LogitMSELoss as LogitMSELoss
    from .losses import RegressionMSELoss as RegressionMSELoss
    from .losses import SoftTargetsLoss as SoftTargetsLoss
    from .losses import TaskBinaryCrossEntropyLoss as TaskBinaryCrossEntropyLoss
    from .losses import TaskCrossEntropyLoss as TaskCrossEntropyLoss
    from .losses import TaskLoss as TaskLoss
    from .losses import TaskSquaredErrorLoss as TaskSquaredErrorLoss
    from .losses.base import DistillationLoss as DistillationLoss
    from .losses.base import LossValue as LossValue
    from .metrics import GLUE_METRICS as GLUE_METRICS
    from .metrics import agreement as agreement
    from .metrics import gap_closed as gap_closed
    from .metrics import glue_metric as glue_metric
    from .metrics import load_metric as load_metric
    from .metrics import metric_function as metric_function
    from .models.layer_map import LAYER_MAPS as LAYER_MAPS
    from .models.layer_map import resolve_layer_map as resolve_layer_map
    from .models.student import build_student as build_student
    from .models.student import copy_weights as copy_weights
    from .objective import Objective as Objective
    from .plots import plot_results as plot_results
    from .report import results_table as results_table
    from .report import write_results as write_results
    from .runs import Arm as Arm
    from .runs import Run as Run
    from .runs import compare_arms as compare_arms
    from .runs import refuse_weak_teacher as refuse_weak_teacher
    from .runs import run_fingerprint as run_fingerprint
    from .schedules import Schedule as Schedule
    from .schedules import resolve_schedule as resolve_schedule
    from .signals import Signals as Signals
    from .teachers import CallableTeacher as CallableTeacher
    from .teachers import FrozenTeacher as FrozenTeacher
    from .teachers.loading import load_named_part as load_named_part
    from .teachers.loading import load_teacher as load_teacher
    from .teachers.loading import load_tokenizer as load_tokenizer
    from .terms import Term as Term
    from .trainer import DistillationTrainer as DistillationTrainer


def module_of(name: str) -> str:
    """The dotted module that defines a public name, found without importing it."""
    if name not in _MODULE_OF:
        from .suggest import did_you_mean

        raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{did_you_mean(name, _MODULE_OF)}")
    return _MODULE_OF[name]


def __getattr__(name: str) -> Any:
    value = getattr(import_module(module_of(name)), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
