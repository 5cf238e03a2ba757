"""Builds a student from a teacher: fewer blocks, narrower blocks, and the teacher's weights where they fit."""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..suggest import did_you_mean
from .anatomy import Blocks, find_blocks, text_config
from .copying import CopyReport, copy_by_layers, copy_weights, one_to_one, refuse_peft
from .similarity import representative_blocks
from .vocabulary import renumber_token_ids, resolve_kept
from .width import WIDTHS, Sizes, check_narrower, intermediate_name


__all__ = ["CopyReport", "build_student", "copy_weights"]

logger = logging.getLogger(__name__)

# Config entries with one item a block, and entries that follow the hidden size where they equalled it.
_PER_BLOCK = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")
_FOLLOW_HIDDEN = ("embedding_size", "pooler_hidden_size", "pooler_output_size")


def build_student(
    teacher: PreTrainedModel,
    num_hidden_layers: int | None = None,
    *,
    hidden_size: int | None = None,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    intermediate_size: int | None = None,
    layer_map: Any = "uniform",
    width: str = "slice",
    copy_weights: bool = True,
    vocabulary: Iterable[int] | None = None,
    calibration_batch: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    **config_overrides: Any,
) -> PreTrainedModel:
    """Builds a smaller model of the teacher's class, with the teacher's weights where they fit.

    Labels stay the teacher's, and the vocabulary unless `vocabulary` cuts it. `student.config.distilled_from` records the
    teacher and the teacher block of each student block (`layer_map="original"` finds it there); `student.copy_report` is a
    [`CopyReport`].

    Args:
        teacher (`PreTrainedModel`): any encoder or decoder; it is not changed.
        num_hidden_layers (`int`, *optional*): depth. Default: the teacher's.
        hidden_size, num_attention_heads, num_key_value_heads, intermediate_size (`int`, *optional*): widths. Default: the
            teacher's. Where the config has a `head_dim` of its own (Llama, Qwen3) it stays, otherwise it is
            `hidden_size / num_attention_heads`. Key-value heads keep their share of queries.
        layer_map (*optional*): as in `resolve_layer_map`, with exactly one teacher block for each student block;
            `"similar"` takes the most representative blocks on `calibration_batch`.
        width (`str`): which units a narrower student keeps: `"slice"` the first, `"norm"` those with the largest L2 norm.
            See [`~hfdistill.models.width.Selection`].
        copy_weights (`bool`): `False` leaves all weights at random.
        vocabulary (iterable of `int`, *optional*): teacher ids of the tokens the student keeps, in the order of its own ids, from
            `prune_tokenizer`. Embeddings, output head and special-token ids follow. A student of full size then has the teacher's
            hidden states, and its logits at the kept tokens, for every text whose tokens are all kept.
        calibration_batch (`Mapping`, *optional*): inputs of the teacher, for `layer_map="similar"`.
        seed (`int`): for weights left at random and for `layer_map="random"`. The global generator is not touched.
        config_overrides: any further entries of the config, such as `embedding_size` or `hidden_dropout_prob`.

    Returns:
        `PreTrainedModel` in eval mode, in the teacher's dtype and on its device.

    Raises:
        ValueError: for teachers, sizes, maps or config entries that cannot give a student.

    Example:

    ```python
    >>> from transformers import BertConfig, BertModel
    >>> from hfdistill import build_student
    >>> teacher = BertModel(BertConfig(hidden_size=32, num_attention_heads=4, intermediate_size=64, vocab_size=50))
    >>> build_student(teacher, num_hidden_layers=3).config.distilled_from["layers"]
    [3, 7, 11]
    ```
    """
    _check_teacher(teacher)
    if width not in WIDTHS:
        raise ValueError(f"Unknown width {width!r}.{did_you_mean(width, WIDTHS)} Use one of {', '.join(WIDTHS)}.")
    blocks = find_blocks(teacher)
    sizes = {
        "num_hidden_layers": num_hidden_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "intermediate_size": intermediate_size,
    }
    aliases = {native: common for common, native in teacher.config.attribute_map.items()}
    aliases[intermediate_name(teacher.config)] = "intermediate_size"
    for name in [name for name in config_overrides if aliases.get(name) in sizes]:
        sizes[aliases[name]] = config_overrides.pop(name)
    sizes = {name: size for name, size in sizes.items() if size is not None}
    config = _student_config(teacher.config, blocks, sizes, config_overrides)
    generation_config = copy.deepcopy(getattr(teacher, "generation_config", None))
    kept = None if vocabulary is None else _cut_vocabulary(config, generation_config, teacher, vocabulary, config_overrides)
    ours, theirs = Sizes.of(config), Sizes.of(teacher.config)
    if copy_weights:
        check_narrower(ours, theirs)
    depth = sizes.get("num_hidden_layers", blocks.depth)
    per_block = [name for name in _PER_BLOCK if getattr(config, name, None) is not None and name not in config_overrides]
    layers = None
    if copy_weights or per_block:
        if layer_map == "similar" and calibration_batch is not None and depth <= blocks.depth:
            layers = representative_blocks(_block_outputs(teacher, blocks, calibration_batch), depth)
        else:
            layers = one_to_one(layer_map, depth, blocks.depth, seed)
        _select_per_block(config, per_block, layers, blocks.depth)
    config.distilled_from = {
        "name_or_path": _portable_name(teacher.config._name_or_path),
        "layers": layers if copy_weights else None,
        "width": None if not copy_weights else "same" if ours == theirs else width,
    }
    earlier = (getattr(teacher.config, "distilled_from", None) or {}).get("vocabulary")  # of a teacher that was cut itself
    if kept is not None or earlier:
        of = earlier["of"] if earlier else teacher.config.vocab_size
        config.distilled_from["vocabulary"] = {"kept": config.vocab_size, "of": of}
    config._name_or_path = ""

    # fork_rng with the CUDA devices left out, and the CPU generator alone seeded: no device is touched.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        student = type(teacher)(config)
    for parameter in student.parameters():
        parameter.data = parameter.data.to(teacher.dtype)  # .to(dtype) on the model would also round its rotary frequencies
    student.to(teacher.device).eval()
    built = find_blocks(student).depth
    if built != depth:
        raise ValueError(
            f"num_hidden_layers={depth} was asked for, but {type(teacher).__name__} built {built} blocks: its depth is set by other config "
            "entries. Build the student from its config and use copy_weights."
        )
    if generation_config is not None:
        student.generation_config = generation_config
    if copy_weights:
        student.copy_report = copy_by_layers(student, teacher, layers, width, kept)
        logger.info("%s from %s: %s", type(student).__name__, config.distilled_from["name_or_path"] or "teacher", student.copy_report)
    else:
        names = [name for name, _ in student.named_parameters()]
        student.copy_report = CopyReport(0, 0, sum(p.numel() for p in student.parameters()), names, [])
    return student


def _check_teacher(teacher: Any) -> None:
    if isinstance(teacher, (str, os.PathLike)):
        raise ValueError(
            f"build_student takes a loaded model, got {str(teacher)!r}. Load it first with the class of your task, such as "
            f"AutoModelForSequenceClassification.from_pretrained({str(teacher)!r})."
        )
    refuse_peft(teacher)
    if not isinstance(teacher, PreTrainedModel):
        raise ValueError(
            f"build_student takes a PreTrainedModel, got {type(teacher).__name__}: without its config no smaller one can be made. "
            "Build the student yourself and use copy_weights."
        )
    if getattr(teacher, "is_quantized", False):
        raise ValueError(f"{type(teacher).__name__} is quantized, so its packed weights cannot be copied. Load it without quantization.")
    if teacher.config.is_encoder_decoder or text_config(teacher.config) is not teacher.config:
        raise ValueError(
            f"{type(teacher).__name__} is made of several models (encoder and decoder, or text and image), and build_student makes "
            "encoders and decoders only. Build the student from its config and use copy_weights."
        )


def _student_config(teacher_config: Any, blocks: Blocks, sizes: dict[str, int], overrides: dict[str, Any]) -> Any:
    config = copy.deepcopy(teacher_config)
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}.")
        key = intermediate_name(config) if name == "intermediate_size" else name
        if key is None or not hasattr(config, key):
            raise ValueError(f"{type(config).__name__} has no {name}, so it cannot be set to {size}. Pass the entry by its own name.")
        setattr(config, key, size)
    for name, value in overrides.items():
        # Many models read head_dim although their config does not list it.
        if not hasattr(config, name) and name != "head_dim":
            known = [*config.to_dict(), *config.attribute_map]
            raise ValueError(
                f"{type(config).__name__} has no entry {name!r}, so it would change nothing.{did_you_mean(name, known)} "
                "Use a name from the teacher's config.json."
            )
        setattr(config, name, value)
    for name in _FOLLOW_HIDDEN:
        if "hidden_size" in sizes and name not in overrides and getattr(config, name, None) == teacher_config.hidden_size:
            setattr(config, name, config.hidden_size)
    if "num_hidden_layers" in sizes and blocks.depth > len(blocks.modules):
        config.num_hidden_groups = min(config.num_hidden_groups, config.num_hidden_layers)
    elif "num_hidden_layers" in sizes and getattr(config, "num_hidden_groups", None):
        config.num_hidden_groups = config.num_hidden_layers  # one block a group stays one block a group
    _check_heads(config, Sizes.of(teacher_config), sizes)
    return config


def _cut_vocabulary(config: Any, generation_config: Any, teacher: Any, vocabulary: Iterable[int], overrides: dict[str, Any]) -> list[int]:
    if "vocab_size" in overrides:
        raise ValueError(
            f"vocabulary names the rows to keep and vocab_size={overrides['vocab_size']} their number: give one of them. Without "
            "vocabulary, the rows of another vocab_size are left at random."
        )
    kept = resolve_kept(vocabulary, teacher)
    config.vocab_size = len(kept)
    for entry in (config, generation_config):
        if entry is not None:
            renumber_token_ids(entry, kept, teacher.config.vocab_size)
    return kept


def _check_heads(config: Any, teacher: Sizes, sizes: dict[str, int]) -> None:
    if teacher.heads is None or not sizes.keys() & {"hidden_size", "num_attention_heads", "num_key_value_heads"}:
        return
    hidden, heads = config.hidden_size, config.num_attention_heads
    if hidden % heads:
        fitting = [n for n in range(1, max(teacher.heads, heads) + 1) if hidden % n == 0]
        raise ValueError(
            f"hidden_size={hidden} cannot be divided among num_attention_heads={heads}. Choose num_attention_heads from {fitting}, "
            f"or a hidden_size that is a multiple of {heads}."
        )
    if getattr(config, "num_key_value_heads", None) is not None:
        if "num_key_value_heads" not in sizes:
            config.num_key_value_heads = max(1, heads * teacher.kv_heads // teacher.heads)
        if heads % config.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={heads} cannot be divided among num_key_value_heads={config.num_key_value_heads}. Pass "
                f"num_key_value_heads from {[n for n in range(1, heads + 1) if heads % n == 0]}."
            )


def _select_per_block(config: Any, names: list[str], layers: list[int], teacher_depth: int) -> None:
    """Per-block config lists get the entries of the copied blocks: a block keeps the kind of attention it was trained with."""
    for name in names:
        entries = getattr(config, name)
        if len(entries) == teacher_depth:
            setattr(config, name, [entries[t] for t in layers])
    every = getattr(config, "global_attn_every_n_layers", None)
    if every is not None and "layer_types" in names:
        # Older Transformers read this number instead of the list (ModernBERT): keep it true, or leave it out.
        kinds = config.layer_types
        periods = [n for n in range(1, len(kinds) + 1) if all((kind == "full_attention") == (i % n == 0) for i, kind in enumerate(kinds))]
        if not periods:
            del config.global_attn_every_n_layers
        elif every not in periods:
            config.global_attn_every_n_layers = periods[0]


def _portable_name(name: str | None) -> str:
    name = name or ""
    return os.path.basename(name.rstrip("/\\")) if os.path.isabs(name) else name


@torch.no_grad()
def _block_outputs(model: PreTrainedModel, blocks: Blocks, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Outputs of all blocks in order of execution, `(real tokens, width)` each."""
    known = inspect.signature(model.forward).parameters
    inputs = {key: value.to(model.device) for key, value in batch.items() if key in known and key != "labels"}
    outputs: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for module in {id(module): module for module in blocks.modules}.values()
    ]
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape == outputs[0].shape[:2]:
        return [output[mask.bool()] for output in outputs]
    return [output.flatten(0, -2) for output in outputs]
