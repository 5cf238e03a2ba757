"""What decides a teacher's answers, in plain JSON types: weights, config, processors, collator, precision, library versions."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import types
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase


# Of a config: where it came from, how it is run, and what saving it adds.
_PASSING = frozenset(
    "architectures transformers_version _name_or_path dtype torch_dtype use_cache output_hidden_states output_attentions".split()
)
# Of a collator: its state, and objects that have a fingerprint of their own.
_STATE = ("_epoch", "epoch", "_for_training", "tokenizer", "processing_class", "image_processor", "teacher_image_processor", "preparations")


def weights_hash(model: nn.Module) -> str:
    """16 hex digits of the names and bytes of all weights and buffers of a model."""
    pieces: list[bytes | np.ndarray] = []
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        for part in _plain_parts(tensor):
            part = part.detach().cpu().contiguous()
            pieces.append(f"{name.replace('_orig_mod.', '')} {part.dtype} {tuple(part.shape)}".encode())
            pieces.append(_hashed(part.reshape(-1).view(torch.uint8).numpy()).encode())
    return _hashed(*pieces)


def _plain_parts(tensor: Tensor) -> list[Tensor]:
    """The tensors that a wrapper (as of torchao's quantised weights) holds, or the tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor.detach()]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _plain_parts(getattr(tensor, name))]


def _hashed(*pieces: bytes | np.ndarray) -> str:
    return Hasher.hash_bytes(list(pieces))


def config_settings(model: nn.Module) -> dict[str, Any]:
    """The config of a model without what does not change its answers."""
    config = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    return plain({key: value for key, value in settings.items() if key not in _PASSING and "attn_implementation" not in key})


def processor_settings(processor) -> dict[str, Any] | None:
    """A tokenizer by class and hash, an image processor by its settings; `None` for none."""
    if processor is None:
        return None
    name = type(processor).__name__
    if isinstance(processor, PreTrainedTokenizerBase):
        if getattr(processor, "is_fast", False):
            state = json.loads(processor.backend_tokenizer.to_str())
            state = {key: value for key, value in state.items() if key not in ("padding", "truncation")}  # of the last call
        else:
            state = {"vocabulary": processor.get_vocab(), "special": processor.special_tokens_map}
        return {"class": name, "hash": _hashed(json.dumps(state, sort_keys=True, default=str).encode())}
    settings = processor.to_dict() if hasattr(processor, "to_dict") else {}
    return {"class": name, **plain({key: value for key, value in settings.items() if not key.startswith("_")})}


def collator_settings(collator) -> dict[str, Any]:
    """The class of a collator and what it was set up with."""
    return {"class": _name(collator), **_settings(collator, depth=3)}


def _settings(value: Any, depth: int) -> dict[str, Any]:
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)) or not hasattr(value, "__dict__"):
        return {}
    return {name: plain(own, depth) for name, own in sorted(vars(value).items()) if name not in _STATE}


def _name(value: Any) -> str:
    """Of a class or function, without its module: that of a script is another one when it is imported."""
    if isinstance(value, functools.partial):
        return f"partial({_name(value.func)}, {plain(value.keywords)})"
    return getattr(value, "__name__", type(value).__name__)


def plain(value: Any, depth: int = 4) -> Any:
    """`value` in JSON types: arrays by their hash, objects by class and settings, nothing by its address in memory."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else str(value)
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, Tensor):
        value = value.detach().cpu().float().numpy() if value.is_floating_point() else value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)} {_hashed(np.ascontiguousarray(value))}"
    if isinstance(value, Mapping):
        return {str(key): plain(own, depth) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(own, depth) for own in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(own, depth) for own in value), key=str)
    if isinstance(value, PreTrainedTokenizerBase):
        return processor_settings(value)
    if depth > 0 and (is_dataclass(value) or hasattr(value, "__dict__")) and not callable(getattr(value, "forward", None)):
        return {"class": _name(value), **_settings(value, depth - 1)}
    return _name(value)


def library_versions() -> dict[str, str]:
    """Major and minor version of the libraries that a model's answers depend on."""
    from .. import __version__

    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {name: ".".join(version.split("+")[0].split(".")[:2]) for name, version in {**versions, "hfdistill": __version__}.items()}


def differences(stored: Any, now: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Where two fingerprints differ: dotted name -> (stored, now)."""
    if isinstance(stored, Mapping) and isinstance(now, Mapping):
        found = {}
        for key in sorted({*stored, *now}):
            found |= differences(stored.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        return found
    return {} if stored == now else {name: (stored, now)}
