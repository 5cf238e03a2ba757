"""Where image models keep their stages, and how their outputs become feature maps."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..suggest import did_you_mean
from .anatomy import unwrap_peft


_SPECIAL_TOKENS = ("cls_token", "distillation_token", "register_tokens", "dist_token", "reg_token", "class_embedding")  # timm's, CLIP's


@dataclass(frozen=True)
class Stages:
    """The stages of an image model, from shallow to deep, counted from 0; the stem (patch embedding) is not a stage.

    Attributes:
        names (`list[str]`): path of each from the root of the model.
        modules (`list[nn.Module]`): whose outputs are the feature maps.
    """

    names: list[str]
    modules: list[nn.Module]

    def __len__(self) -> int:
        return len(self.modules)


def find_stages(model: nn.Module, run: Callable[[], Any], image_size: tuple[int, int]) -> Stages:
    """Finds the stages of an image model: the blocks of a ViT, the stages of a ResNet, Swin or ConvNeXt, and where a network is one
    long list of blocks (MobileNetV2, EfficientNet) the last block at each resolution.

    They are the members of the outermost list of modules that holds most of the weights of the model without its head.

    Args:
        model (`nn.Module`): the student or the teacher.
        run: runs the model on an example without a graph.
        image_size: height and width of that example.

    Raises:
        ValueError: where no such list is found, or its members give no maps.
    """
    inner = unwrap_peft(model)
    body = getattr(inner, "base_model", inner)
    prefix = next((f"{name}." if name else "" for name, module in inner.named_modules() if module is body), "")
    named = _listed_by_timm(inner)
    if named is None:
        found = max(_outermost_lists(body), key=lambda item: _weights(item[1]), default=None)
        if found is None or 2 * _weights(found[1]) < _weights(body):
            raise ValueError(
                f"No stages found in {type(inner).__name__}: no nn.ModuleList or nn.Sequential holds most of its weights. Name the modules "
                "in the layer map (layer_map: 'encoder.a:encoder.b'), or use terms on logits or signal 'pooled'."
            )
        path, modules = found
        named = [(f"{prefix}{path}.{name}", module) for name, module in modules.named_children()]
    named = [_called(name, module) for name, module in named]
    shapes = _map_shapes(inner, named, run, image_size)
    config = getattr(inner, "config", None)
    lengths = {len(value) for key in ("hidden_sizes", "depths") if isinstance(value := getattr(config, key, None), (list, tuple))}
    if len(named) not in lengths and len({shape[-2:] for shape in shapes}) > 1:
        last = [i for i in range(len(named)) if i + 1 == len(named) or shapes[i + 1][-2:] != shapes[i][-2:]]
        named = [named[i] for i in last]
    return Stages([name for name, _ in named], [module for _, module in named])


def find_module(model: nn.Module, name: str, role: str) -> nn.Module:
    """The module called `name` (from the root of the model, or of its base model).

    Raises:
        ValueError: when there is none.
    """
    inner = unwrap_peft(model)
    for root in (inner, getattr(inner, "base_model", inner)):
        modules = dict(root.named_modules())
        if name in modules:
            return modules[name]
    raise ValueError(
        f"The layer map names the module {name!r} of the {role}, which has none of that name.{did_you_mean(name, modules)} Names are those "
        "of model.named_modules()."
    )


def special_token_count(model: nn.Module) -> int:
    """Class, distillation and register tokens in front of the patch tokens."""
    kinds = {}
    for name, parameter in unwrap_peft(model).named_parameters():
        kind = name.rpartition(".")[2]
        if kind in _SPECIAL_TOKENS:
            kinds[kind] = parameter.size(-2) if parameter.dim() > 1 else 1
    return sum(kinds.values())


def token_grid(length: int, image_size: tuple[int, int], special: int) -> tuple[int, int, int] | None:
    """`(tokens in front, height, width)` of `length` tokens of an image that was cut into squares; `None` where they fit no grid."""
    for front in dict.fromkeys((special, 0)):
        for rounded in (math.floor, math.ceil):
            for stride in range(1, max(image_size) + 1):
                height, width = (max(rounded(side / stride), 1) for side in image_size)
                if height * width == length - front:
                    return front, height, width
    return None


def feature_map(output: Any, image_size: tuple[int, int], special: int) -> Tensor | None:
    """What a stage returned as a map; `None` where it is neither a map nor patch tokens.

    Shapes: a tensor (or a tuple that begins with one) `(batch, channels, height, width)`, or `(batch, length, width)` with `special`
    tokens in front of the patches or none -> `(batch, channels, height, width)`.
    """
    tensor = output
    while isinstance(tensor, (tuple, list)) and tensor:
        tensor = tensor[0]
    tensor = getattr(tensor, "last_hidden_state", tensor)
    if not isinstance(tensor, Tensor) or tensor.dim() not in (3, 4):
        return None
    if tensor.dim() == 4:
        return tensor
    grid = token_grid(tensor.size(1), image_size, special)
    if grid is None:
        return None
    front, height, width = grid
    return tensor[:, front:].transpose(1, 2).unflatten(2, (height, width))


def _listed_by_timm(inner: nn.Module) -> list[tuple[str, nn.Module]] | None:
    """The stages that a timm model names itself."""
    info = getattr(getattr(inner, "timm_model", None), "feature_info", None)
    entries = getattr(info, "info", info)
    if not isinstance(entries, (list, tuple)) or not entries:
        return None
    paths = [entry["module"] for entry in entries if entry.get("module")]
    # `act1, layer1, layer2, ...` of a ResNet begins with its stem, which is no stage.
    stem = len(paths) > 1 and re.fullmatch(r"(stem\b.*|.*\b)?(act1|bn1|conv1|conv_stem|norm0|stem)", paths[0]) is not None
    names = [f"timm_model.{path}" for path in paths[1 if stem else 0 :]]
    modules = dict(inner.named_modules())
    named = [(name, modules[name]) for name in names if name in modules]
    return named or None


def _outermost_lists(root: nn.Module) -> list[tuple[str, nn.Module]]:
    lists: list[tuple[str, nn.Module]] = []
    for name, module in root.named_modules():
        long = isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1
        # A list of one stage still is one, if that is how the config has it; an nn.Sequential of one is an accident.
        long = long or (isinstance(module, nn.ModuleList) and len(module) == 1)
        if long and not any(name.startswith(f"{other}.") for other, _ in lists):
            lists.append((name, module))
    return lists


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _called(name: str, module: nn.Module) -> tuple[str, nn.Module]:
    """A list is never called itself: the last of its members gives the output of the stage (PVT)."""
    while isinstance(module, nn.ModuleList):
        name, module = f"{name}.{len(module) - 1}", module[-1]
    return name, module


def _map_shapes(inner: nn.Module, named: list[tuple[str, nn.Module]], run: Callable, image_size) -> list[tuple[int, ...]]:
    outputs: dict[str, Any] = {}
    handles = [module.register_forward_hook(lambda _m, _a, output, name=name: outputs.__setitem__(name, output)) for name, module in named]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    special = special_token_count(inner)
    maps = {name: feature_map(output, image_size, special) for name, output in outputs.items()}
    for name, _ in named:
        if maps.get(name) is None:
            raise ValueError(
                f"The stage {name!r} of {type(inner).__name__} gave neither a map (batch, channels, height, width) nor patch tokens that "
                "fit the image, so its features cannot be compared. Name other modules in the layer map, or use signal 'pooled'."
            )
    return [tuple(maps[name].shape) for name, _ in named]
