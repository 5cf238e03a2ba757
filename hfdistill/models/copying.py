"""Copies a teacher's weights into a smaller student: block by block by a layer map, cut where the student is narrower."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..suggest import did_you_mean
from .anatomy import find_blocks
from .layer_map import resolve_layer_map
from .vocabulary import vocabulary_rows
from .width import WIDTHS, Selection, Sizes, axes_of, check_narrower


@dataclass(frozen=True)
class CopyReport:
    """What became of the weights, in numbers of student parameters; tied weights count once.

    Attributes:
        copied (`int`): copied whole.
        sliced (`int`): cut out of larger teacher weights.
        random (`int`): left at their initial values.
        names_random (`list[str]`): the parameters behind `random`.
        layers (`list[int]`): teacher block of each student block.
        unused (`list[str]`): parameters of the copied blocks and of everything outside the blocks that found no place.
    """

    copied: int
    sliced: int
    random: int
    names_random: list[str]
    layers: list[int]
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        names = f" ({', '.join(self.names_random)})" if self.names_random else ""
        unused = f"; teacher weights without a place: {', '.join(self.unused)}" if self.unused else ""
        return (
            f"{self.copied:,} parameters copied, {self.sliced:,} cut out of larger ones, {self.random:,} left at random{names}; "
            f"teacher blocks {self.layers}{unused}"
        )


def copy_weights(student: nn.Module, teacher: nn.Module, layer_map: Any = "uniform", *, width: str = "slice", seed: int = 0) -> CopyReport:
    """Copies the teacher's weights into a student you built yourself, in place, wherever names and shapes (or cuts) fit.

    The two may have different heads; parts the teacher lacks keep their values and are reported.

    Args:
        student, teacher (`nn.Module`): models of one architecture.
        layer_map: as in [`build_student`]; `"similar"` needs the teacher's data and is not supported here.
        width (`str`): as in [`build_student`].
        seed (`int`): for `layer_map="random"`.

    Returns:
        [`CopyReport`]

    Raises:
        ValueError: where the student is wider than the teacher, the map is not one to one, or nothing fits.
    """
    if width not in WIDTHS:
        raise ValueError(f"Unknown width {width!r}.{did_you_mean(width, WIDTHS)} Use one of {', '.join(WIDTHS)}.")
    for model in (student, teacher):
        refuse_peft(model)
    check_narrower(Sizes.of(getattr(student, "config", None)), Sizes.of(getattr(teacher, "config", None)))
    layers = one_to_one(layer_map, find_blocks(student).depth, find_blocks(teacher).depth, seed)
    return copy_by_layers(student, teacher, layers, width)


def refuse_peft(model: nn.Module) -> None:
    """Raises for models that carry adapters."""
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"{type(model).__name__} carries PEFT adapters, whose wrappers would be copied instead of plain weights. "
            "Call model = model.merge_and_unload() first (load adapters with PeftModel.from_pretrained for that)."
        )


def one_to_one(layer_map: Any, depth: int, teacher_depth: int, seed: int = 0) -> list[int]:
    """The teacher block of each student block; raises where `layer_map` does not give exactly one."""
    if layer_map == "original":
        raise ValueError(
            "layer_map='original' is the map a student was built with, so it cannot build one. Use 'uniform' or explicit pairs."
        )
    pairs = resolve_layer_map(layer_map, depth, teacher_depth, seed=seed)
    if [s for s, _ in pairs] != list(range(depth)):
        counts = {k: sum(s == k for s, _ in pairs) for k in range(depth)}
        block, count = next((k, n) for k, n in counts.items() if n != 1)
        raise ValueError(
            f"layer_map {layer_map!r} gives {count} teacher blocks to student block {block}, but weights are copied from exactly one. "
            "Build with a one-to-one map such as 'uniform', and use this map for the losses."
        )
    return [t for _, t in pairs]


@torch.no_grad()
def copy_by_layers(student: nn.Module, teacher: nn.Module, layers: list[int], width: str, kept: list[int] | None = None) -> CopyReport:
    """Copies what fits: student block `k` from teacher block `layers[k]`, everything else by name, the rows of `kept` tokens only."""
    ours, theirs = Sizes.of(getattr(student, "config", None)), Sizes.of(getattr(teacher, "config", None))
    s_blocks, t_blocks = find_blocks(student), find_blocks(teacher)
    # Where blocks share their weights there is nothing to choose: the modules themselves correspond.
    modules = list(range(len(s_blocks.modules))) if s_blocks.shared or t_blocks.shared else layers
    s_path, t_path = (_plain(f"{b.path}." if b.path else "", m) for b, m in ((s_blocks, student), (t_blocks, teacher)))
    sources = {_plain(name, teacher): p for name, p in teacher.named_parameters(remove_duplicate=False)}
    targets = {_plain(name, student): p for name, p in student.named_parameters()}
    original_id = {name: id(p) for name, p in sources.items()}
    if kept is not None:
        rows = vocabulary_rows(teacher, kept)
        sources = {name: rows.get(id(p), p) for name, p in sources.items()}

    selection = None
    if ours != theirs and ours.hidden is not None and theirs.hidden is not None:
        tied = {id(p): name for name, p in sources.items() if not name.startswith(t_path)}
        selection = Selection(
            width,
            ours,
            theirs,
            [t_blocks.modules[t] for t in modules],
            {name: sources[name] for name in tied.values()},
            {_plain(name, student): p for name, p in student.named_parameters(remove_duplicate=False)},
            rotary=any("rotary" in type(module).__name__.lower() for module in teacher.modules()),
        )

    numbers, names_random, used = {"copied": 0, "sliced": 0, "random": 0}, [], set()
    original = {id(p): name for name, p in student.named_parameters()}
    for name, target in targets.items():
        source_name, inside, block = _source(name, s_path, t_path, modules)
        source, kind = sources.get(source_name), "random"
        if source is not None:
            used.add(original_id[source_name])
            kind = _fill(target, source, inside, block, t_blocks.modules[modules[block]] if block is not None else None, selection)
            if kind == "copied" and id(source) != original_id[source_name]:
                kind = "sliced"
        numbers[kind] += target.numel()
        if kind == "random":
            names_random.append(original[id(target)])
    if not used:
        raise ValueError(
            f"No weight of {type(student).__name__} has the name of a weight of {type(teacher).__name__}, so nothing was copied. "
            "Copying needs two models of one architecture."
        )

    parameters, state = set(sources), teacher.state_dict()
    buffers = {_plain(name, teacher): value for name, value in state.items()}
    for name, value in student.state_dict().items():
        source_name = _source(_plain(name, student), s_path, t_path, modules)[0]
        if source_name in buffers and source_name not in parameters and buffers[source_name].shape == value.shape:
            value.copy_(buffers[source_name])

    copied = {f"{t_path}{t}." for t in modules}
    unused = [
        name
        for name, p in teacher.named_parameters()
        if id(p) not in used and (not _plain(name, teacher).startswith(t_path) or any(_plain(name, teacher).startswith(b) for b in copied))
    ]
    return CopyReport(**numbers, names_random=names_random, layers=list(layers), unused=unused)


def _plain(name: str, model: nn.Module) -> str:
    """The name without the prefix of the base model, so that heads and bare models meet."""
    prefix = getattr(model, "base_model_prefix", "")
    return name.removeprefix(f"{prefix}.") if prefix else name


def _source(name: str, s_path: str, t_path: str, modules: list[int]) -> tuple[str, str, int | None]:
    """Teacher name of a student parameter, its name inside the block, and the student's block (`None` outside the blocks)."""
    if not name.startswith(s_path):
        return name, name, None
    number, inside = name.removeprefix(s_path).split(".", 1)
    return f"{t_path}{modules[int(number)]}.{inside}", inside, int(number)


def _fill(target: Tensor, source: Tensor, name: str, block: int | None, module: nn.Module | None, selection: Selection | None) -> str:
    """Copies or cuts `source` into `target` and says which."""
    if selection is None or source.dim() != target.dim():
        if source.shape != target.shape:
            return "random"
        target.copy_(source)
        return "copied"
    value = source
    for axis, label in enumerate(axes_of(name, source.shape, target.shape, selection.teacher, selection.student, module)):
        if label == "unknown":
            return "random"
        if label is not None:
            value = value.index_select(axis, selection.index(label, block or 0).to(value.device))
    if value.shape != target.shape:
        raise ValueError(
            f"{name} should be {tuple(value.shape)} in the student by its heads and head_dim, but is {tuple(target.shape)}: this "
            "architecture takes head_dim from hidden_size and num_attention_heads. Choose these two, without head_dim."
        )
    target.copy_(value)
    return "copied" if source.shape == target.shape else "sliced"
