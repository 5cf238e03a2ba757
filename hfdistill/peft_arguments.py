"""The PEFT arguments of recipes, named as in TRL's `ModelConfig`. Light to import, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field


def _knob(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class PeftArguments:
    """A LoRA student. Inherited by the arguments of a recipe; [`lora_config`] makes the `peft.LoraConfig`."""

    use_peft: bool = _knob(False, "Train LoRA adapters of the student instead of its weights; published is the merged student.")
    lora_r: int = _knob(16, "Rank of the adapters.")
    lora_alpha: int = _knob(32, "Scale of the adapters: their output is multiplied by lora_alpha / lora_r.")
    lora_dropout: float = _knob(0.05, "Dropout in front of the adapters.")
    lora_target_modules: list[str] | None = _knob(
        None, "Names of the layers that get adapters, or all-linear. Default: by architecture, queries and values as a rule."
    )
    lora_modules_to_save: list[str] | None = _knob(
        None, "Further modules that are trained and saved whole. The new head of a classifier is one anyway."
    )
