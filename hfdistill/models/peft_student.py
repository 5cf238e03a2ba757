"""A student with PEFT adapters: how it is made, run as its own base, and described."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..peft_arguments import PeftArguments
from ..suggest import did_you_mean
from .anatomy import unwrap_peft


if TYPE_CHECKING:
    from peft import LoraConfig


# Queries and values of families that PEFT itself has no default for.
LORA_TARGETS = {
    "albert": ["query", "value"],
    "camembert": ["query", "value"],
    "deit": ["q_proj", "v_proj"],
    "distilbert": ["q_lin", "v_lin"],
    "modernbert": ["Wqkv"],
    "mpnet": ["attn.q", "attn.v"],
    "vit": ["q_proj", "v_proj"],
}
# Those of masked language models and images are None: PEFT has no class of its own for them, and its plain one passes everything on.
TASK_TYPES = {
    "sequence": "SEQ_CLS",
    "token": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "causal_lm": "CAUSAL_LM",
    "image": None,
    "masked_lm": None,
    "base": None,
    "features": None,
    "other": None,
}


def import_peft() -> ModuleType:
    """The `peft` library.

    Raises:
        ValueError: when it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            "A student with LoRA adapters needs peft, which is not installed. Get it with: pip install 'hfdistill[peft]'"
        ) from error
    return peft


def is_peft_student(model: nn.Module | None) -> bool:
    """Whether `model` is a `peft.PeftModel`; never imports peft."""
    return hasattr(model, "get_base_model") and hasattr(model, "disable_adapter")


def lora_config(recipe: PeftArguments, task: str) -> LoraConfig | None:
    """The `peft.LoraConfig` that `use_peft` and the `lora_...` arguments describe; `None` without `use_peft`.

    Args:
        recipe ([`PeftArguments`]): the arguments of a recipe.
        task (`str`): what the student's head is for: `sequence`, `token`, `question_answering`, `masked_lm`, `causal_lm`, `image`,
            `base`, `features` or `other`. Decides the task type; heads of classifiers are trained whole and saved with the adapters.

    Raises:
        ValueError: for a rank or an alpha below 1, a dropout outside [0, 1), an unknown task, `lora_...` arguments without
            `use_peft`, and without peft.

    Example:
        >>> from hfdistill import PeftArguments, lora_config
        >>> config = lora_config(PeftArguments(use_peft=True, lora_r=4, lora_target_modules=["query"]), "sequence")
        >>> config.r, config.lora_alpha, config.target_modules, config.task_type
        (4, 32, {'query'}, 'SEQ_CLS')
    """
    if task not in TASK_TYPES:
        raise ValueError(f"Unknown task {task!r}.{did_you_mean(task, TASK_TYPES)} Use one of {', '.join(TASK_TYPES)}.")
    if not recipe.use_peft:
        for knob in dataclasses.fields(PeftArguments):
            value = getattr(recipe, knob.name)
            if value != knob.default and value is not False:
                raise ValueError(f"{knob.name}={value!r} would not be used, because use_peft is off. Add --use_peft true, or leave it out.")
        return None
    for name in ("lora_r", "lora_alpha"):
        if getattr(recipe, name) < 1:
            raise ValueError(
                f"{name} must be at least 1, got {getattr(recipe, name)}: the adapters would do nothing. The defaults are 16 and 32."
            )
    if not 0 <= recipe.lora_dropout < 1:
        raise ValueError(f"lora_dropout must be in [0, 1), got {recipe.lora_dropout}: at 1 nothing reaches the adapters. Usual is 0.05.")
    targets = recipe.lora_target_modules or None
    heads = ["classifier"] if task == "image" else []  # PEFT knows the heads of its own task types
    return import_peft().LoraConfig(
        task_type=TASK_TYPES[task],
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        modules_to_save=[*(recipe.lora_modules_to_save or []), *heads] or None,
    )


def wrap_student(model: nn.Module, peft_config: Any, seed: int = 0) -> nn.Module:
    """`peft.get_peft_model(model, peft_config)`, checked first.

    Args:
        model (`nn.Module`): the base. Its modules are used, not copied: afterwards it is frozen but for the adapters.
        peft_config (`peft.PeftConfig`): not changed. Without `target_modules` a `LoraConfig` gets PEFT's own choice for the
            architecture, or queries and values (`LORA_TARGETS`) where PEFT has none.
        seed (`int`): of the adapters' first weights; the global random state is left as it was.

    Returns:
        `peft.PeftModel`

    Raises:
        ValueError: without peft, for something that is no `PeftConfig`, a model that carries adapters already, and target
            modules that are not in the model.
    """
    peft = import_peft()
    if not isinstance(peft_config, peft.PeftConfig):
        raise ValueError(f"peft_config is a {type(peft_config).__name__}, not a peft.PeftConfig. Pass peft.LoraConfig(r=16, ...).")
    if is_peft_student(model) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"{type(unwrap_peft(model)).__name__} carries PEFT adapters already, and peft_config would put others on top of them. Leave "
            "peft_config out to train those it has, or merge them first: model = model.merge_and_unload()."
        )
    peft_config = copy.deepcopy(peft_config)
    if isinstance(peft_config, peft.LoraConfig) and not peft_config.target_modules and not peft_config.target_parameters:
        peft_config.target_modules = LORA_TARGETS.get(getattr(getattr(model, "config", None), "model_type", None))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)  # read by PEFT itself
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)  # and corrected (GPT-2)
        torch.default_generator.manual_seed(seed)
        try:
            return peft.get_peft_model(model, peft_config)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"PEFT cannot put these adapters on {type(model).__name__} ({error}). Name its linear layers in target_modules "
                f"(--lora_target_modules), such as {' '.join(_linear_names(model)[:6])}."
            ) from error


def _linear_names(model: nn.Module) -> list[str]:
    return list(dict.fromkeys(name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)))


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """`model` as its own base: adapters off, original head, eval mode, no gradients; afterwards every flag is as it was.

    Args:
        model (`peft.PeftModel`).
    """
    training = [module for module in model.modules() if module.training]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for module in training:
        module.training = False
    try:
        with torch.no_grad(), model.disable_adapter():
            yield
    finally:
        for module in training:
            module.training = True
        for parameter, flag in trainable:  # PEFT makes all adapters trainable again, frozen ones too
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


def adapter_settings(model: nn.Module) -> dict[str, Any]:
    """The settings of the active adapters and what share of the parameters is trained, for the card; `{}` without adapters."""
    if not is_peft_student(model):
        return {}
    config = model.peft_config[model.active_adapters[0]]
    names = {"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "target_modules": "lora_target_modules"}
    values = {shown: getattr(config, name, None) for name, shown in names.items()}
    heads = {name.split(".modules_to_save.")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if ".modules_to_save." in name}
    values["modules_to_save"] = heads or None
    settings = {"peft_type": str(getattr(config.peft_type, "value", config.peft_type))}
    settings |= {name: sorted(v) if isinstance(v, (set, list, tuple)) else v for name, v in values.items() if v is not None}
    trained, total = (sum(p.numel() for p in model.parameters() if p.requires_grad or not only) for only in (True, False))
    return {**settings, "trainable_parameters": f"{trained} of {total} ({trained / total:.2%})"}
