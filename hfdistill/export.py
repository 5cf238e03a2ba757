"""Students in the form in which they are given away."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer

from .attention_taps import IMPLEMENTATION
from .models.anatomy import unwrap_peft
from .models.peft_student import adapter_settings, is_peft_student
from .redaction import shareable


def merged_student(student: Trainer | nn.Module) -> PreTrainedModel:
    """A LoRA student as a plain Transformers model: the adapters are added to the weights of a copy of their base.

    `merged_student(trainer).save_pretrained(folder)` gives a folder that `AutoModel...from_pretrained` loads where neither peft
    nor hfdistill is installed; `trainer.save_model()` writes the adapters alone. The trained model is not changed.
    `config.merged_adapters` records the base and the settings of the adapters. To evaluate, save and push the merged student
    with its trainer: `trainer.model = merged_student(trainer)`.

    Args:
        student ([`DistillationTrainer`] or `peft.PeftModel`).

    Returns:
        `PreTrainedModel`: in eval mode, all of its parameters trainable, as after `from_pretrained`.

    Raises:
        ValueError: for a model without PEFT adapters, adapters that cannot be merged (prompts), and adapters on one of two
            tied weights, where merging would change the other too.
    """
    model = student.model if isinstance(student, Trainer) else student
    if not is_peft_student(model):
        raise ValueError(
            f"{type(model).__name__} has no PEFT adapters to merge (or not in a peft.PeftModel). Save it as it is, with "
            "model.save_pretrained(folder)."
        )
    if not hasattr(model.base_model, "merge_and_unload"):
        kind = adapter_settings(model)["peft_type"]
        raise ValueError(f"Adapters of type {kind} cannot be merged into weights. Keep them as adapters: trainer.save_model(folder).")
    _refuse_tied(model)
    # The tuner inside, not the PeftModel: Accelerate replaces the forward of the latter by one bound to it.
    merged = copy.deepcopy(model.base_model).merge_and_unload()
    if getattr(merged.config, "_attn_implementation", None) == IMPLEMENTATION:
        merged.set_attn_implementation("sdpa")
    base = getattr(merged.config, "_name_or_path", None)
    merged.config.merged_adapters = {"base": shareable(base) if base else None, **_settings(model)}
    return merged.requires_grad_(True).eval()


def _settings(model: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in adapter_settings(model).items() if name != "trainable_parameters"}


def _refuse_tied(model: nn.Module) -> None:
    """LoRA on one of two tied weights adds to one use only; merged, it would add to both."""
    names: dict[int, list[str]] = {}
    for name, parameter in unwrap_peft(model).named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for same in names.values():
        if len(same) > 1 and any(".base_layer." in name for name in same):
            raise ValueError(
                f"The adapters lie on {same[0]}, which is tied to {same[1]}: merged into the weight they would act in both places. Leave "
                "it out of target_modules, or set config.tie_word_embeddings=False in the base."
            )
