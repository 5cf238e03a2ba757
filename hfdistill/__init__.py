"""Knowledge distillation for Hugging Face models: a teacher in, a student out.

Public names are imported when they are first used, so `import hfdistill` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0.dev0"

_NAMES = {
    "trainer": ("DistillationTrainer",),
    "arguments": ("TEACHER_WEIGHTS", "WITHOUT_TEACHER", "DistillationTrainingArguments"),
    "models.student": ("build_student", "copy_weights"),
    "models.distilbert": ("to_distilbert",),
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
        "AttentionTransferLoss",
        "BinarySoftTargetsLoss",
        "CRDLoss",
        "ContrastivePairsLoss",
        "CorrelationCongruenceLoss",
        "CosineLoss",
        "DISTLoss",
        "DarkRankLoss",
        "DecoupledLoss",
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
    ),
    "citations": ("citations_for",),
    "losses.base": ("DistillationLoss", "LossValue"),
    "losses.batch": ("BatchLoss",),
    "signals": ("Signals",),
    "capture": ("Capture",),
    "capture_plan": ("CapturePlan",),
    "models.peft_student": ("lora_config",),
    "teachers": ("AdaptersOffTeacher", "CallableTeacher", "FrozenTeacher", "StoredTeacher", "TeacherStore", "store_teacher"),
    "teachers.loading": ("load_named_part", "load_teacher", "load_tokenizer"),
    "schedules": ("Schedule", "resolve_schedule"),
    "data.augmentation": ("AUGMENTATION_COPIES", "augment_texts"),
    "data.stdlib_docs": ("load_stdlib_docs", "load_stdlib_docs_splits"),
    "data.splits": ("match_labels", "named_files"),
    "data.text": ("TextData", "encode_texts", "load_embedded", "load_named", "load_text_data"),
    "data.packing": ("PackingCollator",),
    "data.token_collator": ("TokenCollator",),
    "data.token_data": ("TokenData", "encode_tokens", "load_embedded_tokens", "load_named_tokens", "reads_words_apart"),
    "data.byte_level": ("train_byte_level",),
    "data.corpus": ("Corpus", "load_corpus", "load_embedded_corpus"),
    "data.masking": ("CausalCollator", "MaskingCollator", "count_tokens", "smoothed_probabilities"),
    "data.rows": ("encode_corpus",),
    "data.pair_collator": ("PairCollator", "encode_pairs", "encode_sentences"),
    "data.text_pairs": ("TextPairs", "load_embedded_pairs", "load_named_pairs"),
    "data.answers": ("AnswerScorer", "answer_references", "answer_texts"),
    "data.readers": ("reading_baselines",),
    "data.spans": ("SpanData", "load_embedded_spans", "load_named_spans"),
    "data.stdlib_questions": ("load_stdlib_questions", "load_stdlib_questions_splits"),
    "data.windows": ("encode_spans",),
    "data.digits": ("load_digits_splits",),
    "data.image_augmentation": ("ImageAugmentation",),
    "data.image_collator": ("ImageCollator", "preparation_difference"),
    "data.images": ("ImageData", "load_image_data"),
    "data.tokenizer": ("train_wordpiece",),
    "data.vocabulary": ("prune_tokenizer",),
    "metrics": (
        "GLUE_METRICS",
        "agreement",
        "answer_agreement",
        "gap_closed",
        "glue_metric",
        "has_seqeval",
        "load_metric",
        "marks_spans",
        "metric_function",
        "score_tags",
        "tag_metric_function",
    ),
    "metrics.embeddings": (
        "embedding_metrics",
        "retrieval_agreement",
        "retrieval_metrics",
        "score_embeddings",
        "similarity_metrics",
    ),  # fmt: skip
    "metrics.language_model": ("language_model_scores", "pseudo_perplexity", "token_accuracy"),
    "metrics.ngrams": ("NgramBaselines",),
    "alignment": ("resolve_vocabulary", "teacher_token_ids"),
    "sentence_encoder": ("SentenceEncoder", "read_sentence_encoder", "save_sentence_encoder"),
    "baselines": (
        "chance_level",
        "linear_baselines",
        "majority_share",
        "pair_baselines",
        "pixel_baselines",
        "tfidf_logistic_regression",
        "window_baselines",
    ),
    "peft_arguments": ("PeftArguments",),
    "export": ("merged_student",),
    "recipe_arguments": ("ImageDataArguments", "RecipeArguments", "TextDataArguments", "recipe_field"),
    "image_pair": ("ImageModelPair",),
    "model_pair": ("ModelPair",),
    "stages": ("Stage",),
    "stage_training": ("StageRecord", "train_stages"),
    "ablation": ("load_ablation", "load_recipe", "run_ablation"),
    "benchmarking": ("run_benchmark",),
    "method_comparison": ("Method", "compare_methods", "load_methods", "memory_in_a_process", "memory_of"),
    "sweep": ("DEFAULT_SWEEP", "read_space", "run_sweep"),
    "costs": ("peak_memory", "step_costs"),
    "runs": ("Arm", "Comparison", "Run", "label_comparisons", "open_run", "run_fingerprint"),
    "comparison": ("compare_arms", "refuse_weak_teacher"),
    "benchmark": ("measure_model",),
    "plots": ("plot_results",),
    "report": ("results_table", "summarise", "write_results"),
    "cli": ("parse",),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:
    from .ablation import load_ablation as load_ablation
    from .ablation import load_recipe as load_recipe
    from .ablation import run_ablation as run_ablation
    from .alignment import resolve_vocabulary as resolve_vocabulary
    from .alignment import teacher_token_ids as teacher_token_ids
    from .arguments import TEACHER_WEIGHTS as TEACHER_WEIGHTS
    from .arguments import WITHOUT_TEACHER as WITHOUT_TEACHER
    from .arguments import DistillationTrainingArguments as DistillationTrainingArguments
    from .baselines import chance_level as chance_level
    from .baselines import linear_baselines as linear_baselines
    from .baselines import majority_share as majority_share
    from .baselines import pair_baselines as pair_baselines
    from .baselines import pixel_baselines as pixel_baselines
    from .baselines import tfidf_logistic_regression as tfidf_logistic_regression
    from .baselines import window_baselines as window_baselines
    from .benchmark import measure_model as measure_model
    from .benchmarking import run_benchmark as run_benchmark
    from .binding import build_objective as build_objective
    from .capture import Capture as Capture
    from .capture_plan import CapturePlan as CapturePlan
    from .citations import citations_for as citations_for
    from .cli import parse as parse
    from .comparison import compare_arms as compare_arms
    from .comparison import refuse_weak_teacher as refuse_weak_teacher
    from .costs import peak_memory as peak_memory
    from .costs import step_costs as step_costs
    from .data.answers import AnswerScorer as AnswerScorer
    from .data.answers import answer_references as answer_references
    from .data.answers import answer_texts as answer_texts
    from .data.augmentation import AUGMENTATION_COPIES as AUGMENTATION_COPIES
    from .data.augmentation import augment_texts as augment_texts
    from .data.byte_level import train_byte_level as train_byte_level
    from .data.corpus import Corpus as Corpus
    from .data.corpus import load_corpus as load_corpus
    from .data.corpus import load_embedded_corpus as load_embedded_corpus
    from .data.digits import load_digits_splits as load_digits_splits
    from .data.image_augmentation import ImageAugmentation as ImageAugmentation
    from .data.image_collator import ImageCollator as ImageCollator
    from .data.image_collator import preparation_difference as preparation_difference
    from .data.images import ImageData as ImageData
    from .data.images import load_image_data as load_image_data
    from .data.masking import CausalCollator as CausalCollator
    from .data.masking import MaskingCollator as MaskingCollator
    from .data.masking import count_tokens as count_tokens
    from .data.masking import smoothed_probabilities as smoothed_probabilities
    from .data.packing import PackingCollator as PackingCollator
    from .data.pair_collator import PairCollator as PairCollator
    from .data.pair_collator import encode_pairs as encode_pairs
    from .data.pair_collator import encode_sentences as encode_sentences
    from .data.readers import reading_baselines as reading_baselines
    from .data.rows import encode_corpus as encode_corpus
    from .data.spans import SpanData as SpanData
    from .data.spans import load_embedded_spans as load_embedded_spans
    from .data.spans import load_named_spans as load_named_spans
    from .data.splits import match_labels as match_labels
    from .data.splits import named_files as named_files
    from .data.stdlib_docs import load_stdlib_docs as load_stdlib_docs
    from .data.stdlib_docs import load_stdlib_docs_splits as load_stdlib_docs_splits
    from .data.stdlib_questions import load_stdlib_questions as load_stdlib_questions
    from .data.stdlib_questions import load_stdlib_questions_splits as load_stdlib_questions_splits
    from .data.text import TextData as TextData
    from .data.text import encode_texts as encode_texts
    from .data.text import load_embedded as load_embedded
    from .data.text import load_named as load_named
    from .data.text import load_text_data as load_text_data
    from .data.text_pairs import TextPairs as TextPairs
    from .data.text_pairs import load_embedded_pairs as load_embedded_pairs
    from .data.text_pairs import load_named_pairs as load_named_pairs
    from .data.token_collator import TokenCollator as TokenCollator
    from .data.token_data import TokenData as TokenData
    from .data.token_data import encode_tokens as encode_tokens
    from .data.token_data import load_embedded_tokens as load_embedded_tokens
    from .data.token_data import load_named_tokens as load_named_tokens
    from .data.token_data import reads_words_apart as reads_words_apart
    from .data.tokenizer import train_wordpiece as train_wordpiece
    from .data.vocabulary import prune_tokenizer as prune_tokenizer
    from .data.windows import encode_spans as encode_spans
    from .export import merged_student as merged_student
    from .image_pair import ImageModelPair as ImageModelPair
    from .losses import LOSSES as LOSSES
    from .losses import TASK_LOSSES as TASK_LOSSES
    from .losses import AttentionKLLoss as AttentionKLLoss
    from .losses import AttentionMSELoss as AttentionMSELoss
    from .losses import AttentionScoreMSELoss as AttentionScoreMSELoss
    from .losses import AttentionTransferLoss as AttentionTransferLoss
    from .losses import BinarySoftTargetsLoss as BinarySoftTargetsLoss
    from .losses import ContrastivePairsLoss as ContrastivePairsLoss
    from .losses import CorrelationCongruenceLoss as CorrelationCongruenceLoss
    from .losses import CosineLoss as CosineLoss
    from .losses import CRDLoss as CRDLoss
    from .losses import DarkRankLoss as DarkRankLoss
    from .losses import DecoupledLoss as DecoupledLoss
    from .losses import DISTLoss as DISTLoss
    from .losses import EmbeddingMSELoss as EmbeddingMSELoss
    from .losses import FactorTransferLoss as FactorTransferLoss
    from .losses import FSPLoss as FSPLoss
    from .losses import HardTargetsLoss as HardTargetsLoss
    from .losses import HCLLoss as HCLLoss
    from .losses import HiddenMomentsLoss as HiddenMomentsLoss
    from .losses import HiddenMSELoss as HiddenMSELoss
    from .losses import HintLoss as HintLoss
    from .losses import InfoNCELoss as InfoNCELoss
    from .losses import InstanceGraphLoss as InstanceGraphLoss
    from .losses import JSDLoss as JSDLoss
    from .losses import LogitMSELoss as LogitMSELoss
    from .losses import MarginMSELoss as MarginMSELoss
    from .losses import NormalizedHiddenMSELoss as NormalizedHiddenMSELoss
    from .losses import NSTLoss as NSTLoss
    from .losses import PatientLoss as PatientLoss
    from .losses import PKTLoss as PKTLoss
    from .losses import RegressionMSELoss as RegressionMSELoss
    from .losses import RelationKLLoss as RelationKLLoss
    from .losses import ReverseKLLoss as ReverseKLLoss
    from .losses import ReviewLoss as ReviewLoss
    from .losses import RKDAngleLoss as RKDAngleLoss
    from .losses import RKDDistanceLoss as RKDDistanceLoss
    from .losses import SimilarityKLLoss as SimilarityKLLoss
    from .losses import SimilarityPreservingLoss as SimilarityPreservingLoss
    from .losses import SoftTargetsLoss as SoftTargetsLoss
    from .losses import StandardizedSoftTargetsLoss as StandardizedSoftTargetsLoss
    from .losses import TaskBinaryCrossEntropyLoss as TaskBinaryCrossEntropyLoss
    from .losses import TaskCrossEntropyLoss as TaskCrossEntropyLoss
    from .losses import TaskLoss as TaskLoss
    from .losses import TaskSpanLoss as TaskSpanLoss
    from .losses import TaskSquaredErrorLoss as TaskSquaredErrorLoss
    from .losses import VIDLoss as VIDLoss
    from .losses.base import DistillationLoss as DistillationLoss
    from .losses.base import LossValue as LossValue
    from .losses.batch import BatchLoss as BatchLoss
    from .method_comparison import Method as Method
    from .method_comparison import compare_methods as compare_methods
    from .method_comparison import load_methods as load_methods
    from .method_comparison import memory_in_a_process as memory_in_a_process
    from .method_comparison import memory_of as memory_of
    from .metrics import GLUE_METRICS as GLUE_METRICS
    from .metrics import agreement as agreement
    from .metrics import answer_agreement as answer_agreement
    from .metrics import gap_closed as gap_closed
    from .metrics import glue_metric as glue_metric
    from .metrics import has_seqeval as has_seqeval
    from .metrics import load_metric as load_metric
    from .metrics import marks_spans as marks_spans
    from .metrics import metric_function as metric_function
    from .metrics import score_tags as score_tags
    from .metrics import tag_metric_function as tag_metric_function
    from .metrics.embeddings import embedding_metrics as embedding_metrics
    from .metrics.embeddings import retrieval_agreement as retrieval_agreement
    from .metrics.embeddings import retrieval_metrics as retrieval_metrics
    from .metrics.embeddings import score_embeddings as score_embeddings
    from .metrics.embeddings import similarity_metrics as similarity_metrics
    from .metrics.language_model import language_model_scores as language_model_scores
    from .metrics.language_model import pseudo_perplexity as pseudo_perplexity
    from .metrics.language_model import token_accuracy as token_accuracy
    from .metrics.ngrams import NgramBaselines as NgramBaselines
    from .model_pair import ModelPair as ModelPair
    from .models.distilbert import to_distilbert as to_distilbert
    from .models.layer_map import LAYER_MAPS as LAYER_MAPS
    from .models.layer_map import resolve_layer_map as resolve_layer_map
    from .models.peft_student import lora_config as lora_config
    from .models.student import build_student as build_student
    from .models.student import copy_weights as copy_weights
    from .objective import Objective as Objective
    from .peft_arguments import PeftArguments as PeftArguments
    from .plots import plot_results as plot_results
    from .recipe_arguments import ImageDataArguments as ImageDataArguments
    from .recipe_arguments import RecipeArguments as RecipeArguments
    from .recipe_arguments import TextDataArguments as TextDataArguments
    from .recipe_arguments import recipe_field as recipe_field
    from .report import results_table as results_table
    from .report import summarise as summarise
    from .report import write_results as write_results
    from .runs import Arm as Arm
    from .runs import Comparison as Comparison
    from .runs import Run as Run
    from .runs import label_comparisons as label_comparisons
    from .runs import open_run as open_run
    from .runs import run_fingerprint as run_fingerprint
    from .schedules import Schedule as Schedule
    from .schedules import resolve_schedule as resolve_schedule
    from .sentence_encoder import SentenceEncoder as SentenceEncoder
    from .sentence_encoder import read_sentence_encoder as read_sentence_encoder
    from .sentence_encoder import save_sentence_encoder as save_sentence_encoder
    from .signals import Signals as Signals
    from .stage_training import StageRecord as StageRecord
    from .stage_training import train_stages as train_stages
    from .stages import Stage as Stage
    from .sweep import DEFAULT_SWEEP as DEFAULT_SWEEP
    from .sweep import read_space as read_space
    from .sweep import run_sweep as run_sweep
    from .teachers import AdaptersOffTeacher as AdaptersOffTeacher
    from .teachers import CallableTeacher as CallableTeacher
    from .teachers import FrozenTeacher as FrozenTeacher
    from .teachers import StoredTeacher as StoredTeacher
    from .teachers import TeacherStore as TeacherStore
    from .teachers import store_teacher as store_teacher
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
