"""Which units of a wider teacher a narrower student keeps: hidden dims, heads, intermediate units."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


WIDTHS = ("slice", "norm")
"""`slice` keeps the first units, `norm` those with the largest L2 norm."""

INTERMEDIATE_NAMES = ("intermediate_size", "n_inner", "hidden_dim", "ffn_dim")

# What each projection inside a block does, by the end of its path; the first match counts.
_ROLES = (
    ("query", r"(query|q|q_lin|q_proj|query_proj|pos_query_proj)"),
    ("key", r"(key|k|k_lin|k_proj|key_proj|pos_key_proj|value|v|v_lin|v_proj|value_proj)"),
    ("fused", r"(Wqkv|c_attn)"),
    ("output", r"(attention\.output\.dense|attention\.dense|out_lin|o_proj|attn\.o|attn\.Wo|attn\.c_proj)"),
    ("head_norm", r"(q_norm|k_norm)"),
    ("up", r"(intermediate\.dense|lin1|ffn|mlp\.Wi|c_fc|gate_proj|up_proj|fc1)"),
    ("down", r"(output\.dense|lin2|ffn_output|mlp\.Wo|mlp\.c_proj|down_proj|fc2)"),
)
_ROLES = tuple((role, re.compile(rf"(^|\.){pattern}$")) for role, pattern in _ROLES)
# role -> what the (outputs, inputs) of its weight are
_AXES = {
    "query": ("query", "hidden"),
    "key": ("key", "hidden"),
    "fused": ("fused", "hidden"),
    "output": ("hidden", "query"),
    "up": ("intermediate", "hidden"),
    "down": ("hidden", "intermediate"),
    "head_norm": ("head_dim",),
}


@dataclass(frozen=True)
class Sizes:
    """The widths of an architecture; `None` where it has no such thing."""

    hidden: int | None = None
    embedding: int | None = None
    intermediate: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None

    @classmethod
    def of(cls, config: Any) -> Sizes:
        hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
        if not isinstance(hidden, int) or not isinstance(heads, int):
            return cls()
        name = intermediate_name(config)
        intermediate = getattr(config, name) if name else None
        if name == "n_inner" and intermediate is None:
            intermediate = 4 * hidden
        return cls(
            hidden=hidden,
            embedding=getattr(config, "embedding_size", None) or hidden,
            intermediate=intermediate,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or hidden // heads,
        )


def intermediate_name(config: Any) -> str | None:
    """What the config calls the inner width of its feed-forward network."""
    return next((name for name in INTERMEDIATE_NAMES if hasattr(config, name)), None)


def check_narrower(student: Sizes, teacher: Sizes) -> None:
    """Raises where a student cannot be cut out of the teacher."""
    for field in fields(Sizes):
        ours, theirs = getattr(student, field.name), getattr(teacher, field.name)
        if ours is not None and theirs is not None and ours > theirs:
            label = f"{field.name}_size" if field.name in ("hidden", "embedding", "intermediate") else field.name
            cure = f"Choose at most {theirs}"
            if field.name == "head_dim":
                cure = f"Keep more heads or a smaller hidden_size, or pass head_dim={theirs} where the architecture reads it"
            raise ValueError(
                f"The student's {label} {ours} exceeds the teacher's {theirs}, so its weights cannot be cut out of the teacher's. {cure}, "
                "or pass copy_weights=False for random weights."
            )
    if student.heads and teacher.heads and student.heads // student.kv_heads > teacher.heads // teacher.kv_heads:
        raise ValueError(
            f"The student has {student.heads // student.kv_heads} query heads for each key-value head and the teacher "
            f"{teacher.heads // teacher.kv_heads}, so copied queries would meet keys they were not trained with. Raise num_key_value_heads "
            "or lower num_attention_heads, or pass copy_weights=False for random weights."
        )


def role_of(path: str) -> str | None:
    """What the module at `path` inside a block does, or `None` where that is not known."""
    return next((role for role, pattern in _ROLES if pattern.search(path)), None)


def axes_of(
    name: str, shape: Iterable[int], target: Iterable[int], teacher: Sizes, student: Sizes, block: nn.Module | None
) -> list[str | None]:
    """What each axis of a teacher parameter is: `None` (keep whole), the name of a choice in `Selection`, or `unknown`.

    Args:
        name: name of the parameter, from its block where it has one.
        shape, target: the teacher's and the student's shape.
        teacher, student: the widths of the two.
        block: the teacher block that holds it; `None` for everything outside the blocks.
    """
    shape, target = list(shape), list(target)
    path, _, leaf = name.rpartition(".")
    role = role_of(path) if block is not None else None
    if role is not None and leaf in ("weight", "bias"):
        axes: list[str | None] = list(_AXES[role])
        transposed = leaf == "weight" and isinstance(block.get_submodule(path), Conv1D)
        if role == "up" and shape[-1 if transposed else 0] == 2 * teacher.intermediate:
            axes[0] = "gated"
        axes = axes[: len(shape)]
        return axes[::-1] if transposed else axes
    if path.endswith("relative_attention_bias"):
        return [None, "heads"]
    known = [("hidden", teacher.hidden, student.hidden), ("embedding", teacher.embedding, student.embedding)]
    if block is not None:
        known.append(("intermediate", teacher.intermediate, student.intermediate))
    axes = []
    for ours, theirs in zip(target, shape, strict=True):
        match = next((label for label, t, s in known if (theirs, ours) == (t, s)), "unknown")
        axes.append(None if ours == theirs else match)
    return axes


class Selection:
    """Which teacher units the student keeps; indices are sorted, so a full selection changes nothing.

    The residual stream keeps the same hidden dims everywhere, norms, embeddings and heads included. Heads and
    intermediate units are chosen block by block (heads once for all blocks where they share a position bias, as in MPNet);
    a grouped key-value head is kept or dropped with its queries. Where heads get narrower their first dims are kept; in
    rotary models the dims whose frequencies the student will rotate them by, or the nearest.

    Args:
        width (`str`): one of `WIDTHS`.
        student, teacher ([`Sizes`]): the widths.
        blocks (`list[nn.Module]`): the teacher block of each student block.
        rest (`Mapping[str, Tensor]`): the teacher's parameters outside its blocks.
        targets (`Mapping[str, Tensor]`): the student's parameters outside its blocks, under the same names.
        rotary (`bool`): the teacher rotates queries and keys.
    """

    def __init__(
        self,
        width: str,
        student: Sizes,
        teacher: Sizes,
        blocks: list[nn.Module],
        rest: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        rotary: bool,
    ):
        self.student, self.teacher, self.ranked = student, teacher, width == "norm"
        for block in blocks:
            roles = {role_of(path) for path, _ in block.named_modules()}
            if not roles & {"fused", "query"} or "output" not in roles:
                raise ValueError(
                    f"The attention projections of {type(block).__name__} are not known, so a narrower student cannot be cut out of it. "
                    "Keep the teacher's widths and change only num_hidden_layers, or pass copy_weights=False for random weights."
                )
        self.dims = _rotary_dims(student.head_dim, teacher.head_dim) if rotary else torch.arange(student.head_dim)
        self.hidden, self.embedding = torch.arange(student.hidden), torch.arange(student.embedding)
        if self.ranked:
            self.hidden = self._largest("hidden", blocks, rest, targets)
            same = (student.embedding, teacher.embedding) == (student.hidden, teacher.hidden)
            self.embedding = self.hidden if same else self._largest("embedding", [], rest, targets)
        self.heads, self.kv_heads, self.intermediate = [], [], []
        scores = [self._scores(block) for block in blocks] if self.ranked else None
        if scores and any(name.endswith("relative_attention_bias.weight") for name in rest):
            query, key = sum(s[0] for s in scores), sum(s[1] for s in scores)
            scores = [(query, key, s[2]) for s in scores]
        for k in range(len(blocks)):
            query, key, units = scores[k] if scores else (None, None, None)
            heads, kv_heads = self._choose_heads(query, key)
            self.heads.append(heads)
            self.kv_heads.append(kv_heads)
            self.intermediate.append(_top(units, student.intermediate))

    def index(self, label: str, block: int) -> Tensor:
        """Positions along an axis of the teacher, in the student's order."""
        if label == "hidden":
            return self.hidden
        if label == "embedding":
            return self.embedding
        if label == "head_dim":
            return self.dims
        if label == "heads":
            return self.heads[block]
        if label in ("intermediate", "gated"):
            units = self.intermediate[block]
            return units if label == "intermediate" else torch.cat([units, self.teacher.intermediate + units])
        query, key = self._rows(self.heads[block]), self._rows(self.kv_heads[block])
        if label != "fused":
            return query if label == "query" else key
        start = self.teacher.heads * self.teacher.head_dim
        return torch.cat([query, start + key, start + self.teacher.kv_heads * self.teacher.head_dim + key])

    def _rows(self, heads: Tensor) -> Tensor:
        return (heads[:, None] * self.teacher.head_dim + self.dims).flatten()

    def _largest(self, label: str, blocks: list[nn.Module], rest: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
        """The dims with the largest sum of squares over all matrices that read or write them."""
        size = getattr(self.teacher, label)
        if getattr(self.student, label) == size:
            return torch.arange(size)
        matrices = [(p, axes_of(n, p.shape, targets[n].shape, self.teacher, self.student, None)) for n, p in rest.items() if n in targets]
        for block in {id(block): block for block in blocks}.values():
            weights = [(name, p) for name, p in block.named_parameters() if p.dim() == 2]
            matrices += [(p, axes_of(name, p.shape, p.shape, self.teacher, self.student, block)) for name, p in weights]
        total = torch.zeros(size, dtype=torch.float64)
        for matrix, axes in matrices:
            for axis in [a for a, found in enumerate(axes) if found == label and matrix.dim() >= 2]:
                total += matrix.detach().cpu().double().square().movedim(axis, 0).flatten(1).sum(1)
        return _top(total, getattr(self.student, label))

    def _scores(self, block: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of squares of one block: per query head, per key-value head, per intermediate unit."""
        t = self.teacher
        query, key, units = (torch.zeros(n or 0, dtype=torch.float64) for n in (t.heads, t.kv_heads, t.intermediate))
        for path, module in block.named_modules():
            role = role_of(path)
            if role in (None, "head_norm") or getattr(module, "weight", None) is None or module.weight.dim() != 2:
                continue
            weight = module.weight.detach().cpu().double().square()
            weight = weight.T if isinstance(module, Conv1D) else weight
            rows = weight.sum(1)
            if role in ("query", "fused"):
                query += rows[: t.heads * t.head_dim].reshape(t.heads, -1).sum(1)
            if role in ("key", "fused"):
                rows = rows[t.heads * t.head_dim :] if role == "fused" else rows
                key += rows.reshape(-1, t.kv_heads, t.head_dim).sum((0, 2))
            if role == "output":
                query += weight.sum(0).reshape(t.heads, -1).sum(1)
            if role == "up":
                units += rows.reshape(-1, t.intermediate).sum(0)
            if role == "down":
                units += weight.sum(0)
        return query, key, units

    def _choose_heads(self, query: Tensor | None, key: Tensor | None) -> tuple[Tensor, Tensor]:
        group, kept = self.teacher.heads // self.teacher.kv_heads, self.student.heads // self.student.kv_heads
        if query is None:
            kv_heads = torch.arange(self.student.kv_heads)
            return (kv_heads[:, None] * group + torch.arange(kept)).flatten(), kv_heads
        grouped = query.reshape(-1, group)
        kv_heads = _top(key + grouped.sum(1), self.student.kv_heads)
        return torch.cat([kv * group + _top(grouped[kv], kept) for kv in kv_heads]), kv_heads


def _top(scores: Tensor | None, count: int | None) -> Tensor:
    """Sorted positions of the `count` largest scores (the first of equals); the first `count` positions without scores."""
    if scores is None:
        return torch.arange(count or 0)
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def _rotary_dims(student: int, teacher: int) -> Tensor:
    """Dims of a narrower rotary head: pair `j` turns by `theta ** (-2 j / head_dim)`, so teacher pair `j * teacher / student` fits."""
    pairs = [(2 * j * teacher + student) // (2 * student) for j in range(student // 2)]
    return torch.tensor(pairs + [teacher // 2 + pair for pair in pairs])
