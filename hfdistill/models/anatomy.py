"""Where each architecture keeps its parts: blocks, widths, vocabulary, and which task its head is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.models.auto import modeling_auto as auto


@dataclass(frozen=True)
class Blocks:
    """The transformer blocks of a model, counted from 0.

    Attributes:
        path (`str`): path of the list of blocks from the root of the model, such as `bert.encoder.layer`.
        modules (`list[nn.Module]`): its members. Where `shared`, fewer than `depth`.
        depth (`int`): how many blocks run in one forward pass.
        shared (`bool`): one module runs as several blocks (ALBERT).
    """

    path: str
    modules: list[nn.Module]
    depth: int
    shared: bool


def unwrap_peft(model: nn.Module) -> nn.Module:
    """The Transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_config(config: Any) -> Any:
    """The part of a config that holds depth and width: the text config of composite models, the config itself otherwise."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def find_blocks(model: nn.Module) -> Blocks:
    """Finds the list of transformer blocks of a head model, a bare base model, a PEFT model or any torch module.

    Looks, in this order, for a list of modules of one class
    (1) as long as `config.num_hidden_layers` says (as `config.num_hidden_groups` says where weights are shared),
    (2) of the class that Transformers records hidden states from, (3) that is the longest in the model.
    Lists inside the blocks of another list do not count; of several, the one with most parameters is taken.

    Args:
        model (`nn.Module`): the student or the teacher.

    Returns:
        [`Blocks`]

    Raises:
        ValueError: where no such list is found.
    """
    inner = unwrap_peft(model)
    prefix = next(name for name, module in model.named_modules() if module is inner)
    lists = [
        (name, module)
        for name, module in inner.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        and len({type(child) for child in module}) == 1
        and any(True for _ in module.parameters())
    ]
    config = text_config(getattr(inner, "config", None))
    depth = getattr(config, "num_hidden_layers", None)
    count = getattr(config, "num_hidden_groups", None) or depth
    recorded = _recorded_classes(inner)

    found = [item for item in lists if len(item[1]) == count]
    if not found:
        depth = None
        found = [item for item in lists if recorded and isinstance(item[1][0], recorded)]
    if not found:
        several = [item for item in lists if len(item[1]) > 1]
        outer = [item for item in several if not _is_nested(item[0], several)]
        # An nn.Sequential is more often a head or a piece of a block than a stack of blocks.
        found = [item for item in outer if isinstance(item[1], nn.ModuleList)] or outer
        found = [item for item in found if len(item[1]) == max(len(other) for _, other in found)]
    if not found:
        raise ValueError(
            f"No blocks found in {type(inner).__name__}: it has no nn.ModuleList or nn.Sequential whose members are of one class "
            f"(as many as config.num_hidden_layers={count}, or recorded by Transformers, or at least two), so hidden states and "
            "attention cannot be matched layer by layer. Use terms on logits only, or keep the blocks of your model in one nn.ModuleList."
        )
    path, module = max(found, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    modules = list(module)
    depth = depth or len(modules)
    return Blocks(".".join(part for part in (prefix, path) if part), modules, depth, shared=len(set(map(id, modules))) < depth)


def _recorded_classes(model: nn.Module) -> tuple[type, ...]:
    spec = getattr(getattr(model, "base_model", model), "_can_record_outputs", None) or {}
    entries = spec.get("hidden_states", ())
    entries = entries if isinstance(entries, (list, tuple)) else (entries,)
    classes = [getattr(entry, "target_class", entry) for entry in entries]
    return tuple(cls for cls in classes if isinstance(cls, type))


def _is_nested(path: str, lists: list[tuple[str, nn.Module]]) -> bool:
    return any(path != other and path.startswith(f"{other}." if other else "") for other, _ in lists)


def hidden_size(model: nn.Module) -> int:
    """Width of the hidden states that the blocks hand on (of the last stage where widths differ).

    Raises:
        ValueError: where the config names no width.
    """
    config = text_config(getattr(unwrap_peft(model), "config", None))
    size = getattr(config, "hidden_size", None) or (getattr(config, "hidden_sizes", None) or [None])[-1]
    if size is None:
        raise ValueError(
            f"The width of {type(unwrap_peft(model)).__name__} is not known: its config has neither hidden_size nor hidden_sizes. "
            "Set config.hidden_size, or use terms on logits only."
        )
    return size


def vocabulary_size(model: nn.Module) -> int | None:
    """Rows of the word embeddings according to the config; `None` for models without a vocabulary (images)."""
    return getattr(text_config(getattr(unwrap_peft(model), "config", None)), "vocab_size", None)


def _names(*mappings: dict) -> frozenset[str]:
    # Where several classes are listed for one model type, the further ones return something else (DeiT ... WithTeacher).
    return frozenset(value if isinstance(value, str) else value[0] for mapping in mappings for value in mapping.values())


_TASKS = {
    "other": _names(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES),
    "sequence": _names(auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    "token": _names(auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    "question_answering": _names(auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
    "masked_lm": _names(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "causal_lm": _names(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
}


def task_of(model: nn.Module) -> str:
    """What the head of a model predicts, decided by its class (or the nearest Transformers class it derives from).

    Returns:
        `str`: `sequence` (one row of logits a sample: sequence and image classification), `token`, `masked_lm`, `causal_lm`,
        `question_answering`, or `other`: base models, encoder-decoders, `DeiTForImageClassificationWithTeacher`, modules that
        are not of Transformers.
    """
    for cls in type(unwrap_peft(model)).__mro__:
        for task, names in _TASKS.items():
            if cls.__name__ in names and cls.__module__.startswith("transformers."):
                return task
    return "other"


def is_base_model(model: nn.Module) -> bool:
    """Whether it is a Transformers model without a head (`BertModel`), whose task is `other` and which gives hidden states only."""
    names = _names(auto.MODEL_MAPPING_NAMES)
    return task_of(model) == "other" and any(
        cls.__name__ in names and cls.__module__.startswith("transformers.") for cls in type(unwrap_peft(model)).__mro__
    )


def problem_type_of(model: nn.Module, labels_dtype: torch.dtype | None = None) -> str:
    """The kind of labels a sequence classifier is trained on, by the rule of Transformers.

    `config.problem_type` where set; otherwise one label is regression, integer labels are one class each, and float
    labels are several yes-or-no labels each.

    Args:
        model (`nn.Module`): the student.
        labels_dtype (`torch.dtype`, *optional*): of the labels; unknown counts as integer.

    Returns:
        `str`: `regression`, `single_label_classification` or `multi_label_classification`.
    """
    config = getattr(unwrap_peft(model), "config", None)
    if getattr(config, "problem_type", None):
        return config.problem_type
    if getattr(config, "num_labels", None) == 1:
        return "regression"
    several = labels_dtype is not None and (labels_dtype.is_floating_point or labels_dtype == torch.bool)
    return "multi_label_classification" if several else "single_label_classification"
