"""Layer maps: which student block learns from which teacher block. Blocks count from 0; embeddings are not a block."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

from torch import Tensor

from ..suggest import did_you_mean
from .similarity import increasing_assignment, linear_cka, representative_blocks, similar_layer_map


__all__ = [
    "LAYER_MAPS",
    "increasing_assignment",
    "layer_map_table",
    "linear_cka",
    "representative_blocks",
    "resolve_layer_map",
    "similar_layer_map",
]

Pairs = list[tuple[int | str, int | str]]


def uniform(student_depth: int, teacher_depth: int) -> Pairs:
    """The last block of each of `student_depth` equal groups (TinyBERT): 12 -> 4 is 2, 5, 8, 11. Halves are rounded up."""
    return [(k, (2 * (k + 1) * teacher_depth + student_depth) // (2 * student_depth) - 1) for k in range(student_depth)]


def spread(student_depth: int, teacher_depth: int) -> Pairs:
    """First and last block and the rest evenly between (DistilBERT): 12 -> 6 is 0, 2, 4, 7, 9, 11. One block gets the last."""
    if student_depth == 1:
        return [(0, teacher_depth - 1)]
    gaps = student_depth - 1
    return [(k, (2 * k * (teacher_depth - 1) + gaps) // (2 * gaps)) for k in range(student_depth)]


def last(student_depth: int, teacher_depth: int) -> Pairs:
    """The top `student_depth` blocks."""
    return [(k, teacher_depth - student_depth + k) for k in range(student_depth)]


def first(student_depth: int, teacher_depth: int) -> Pairs:
    """The bottom `student_depth` blocks."""
    return [(k, k) for k in range(student_depth)]


def skip(student_depth: int, teacher_depth: int) -> Pairs:
    """`uniform` without the student's last block, which the logits teach (PKD-Skip): 12 -> 6 is 1, 3, 5, 7, 9."""
    if student_depth == 1:
        raise ValueError("layer_map='skip' leaves out the student's last block, so a student of 1 block has none left. Use 'uniform'.")
    return uniform(student_depth, teacher_depth)[:-1]


def random(student_depth: int, teacher_depth: int, seed: int = 0, step: int = 0) -> Pairs:
    """An increasing sample of the teacher's blocks, a function of `(seed, step)` alone; global random states stay as they are."""
    return list(enumerate(sorted(Random(f"{seed}:{step}").sample(range(teacher_depth), student_depth))))


LAYER_MAPS = {"uniform": uniform, "spread": spread, "last": last, "first": first, "skip": skip, "random": random}
"""Strategies: `(student_depth, teacher_depth) -> [(student block, teacher block), ...]`; `random` also takes seed and step."""

_CURE = (
    f"Use one of {', '.join(LAYER_MAPS)}, similar, original, or pairs such as '0:1,1:3' (student:teacher, from 0, -1 is the last block)."
)


def resolve_layer_map(
    spec: Any,
    student_depth: int,
    teacher_depth: int,
    *,
    seed: int = 0,
    step: int = 0,
    recorded: list[int] | None = None,
    similarity: Tensor | None = None,
    named: bool = False,
) -> Pairs:
    """Turns what a user wrote into checked pairs of blocks.

    Args:
        spec: a name in `LAYER_MAPS`; `"similar"`; `"original"`; explicit pairs as text (`"0:1,1:3"`), as a list of pairs, or
            as a mapping (`{0: 1}` or `{0: [0, 1]}`). One student block may learn from several teacher blocks. Negative
            indices count from the end.
        student_depth (`int`): number of blocks of the student.
        teacher_depth (`int`): number of blocks of the teacher.
        seed (`int`), step (`int`): for `"random"`.
        recorded (`list[int]`, *optional*): teacher block of each student block, for `"original"`.
        similarity (`Tensor`, *optional*): `(student_depth, teacher_depth)`, for `"similar"`.
        named (`bool`): whether a module may be named instead of a block (`"encoder.stages.1.layers.0:encoder.stages.3"`).

    Returns:
        `list[tuple[int, int]]`: `(student block, teacher block)`, sorted; in the order given where one is a name.

    Raises:
        ValueError: for unknown strategies, malformed pairs, blocks out of range, duplicates, an empty map, a student deeper
            than the teacher, and for `"original"` and `"similar"` without what they need.

    Example:

    ```python
    >>> from hfdistill.models.layer_map import resolve_layer_map
    >>> resolve_layer_map("uniform", 4, 12)
    [(0, 2), (1, 5), (2, 8), (3, 11)]
    >>> resolve_layer_map("0:1,-1:-1", 4, 12)
    [(0, 1), (3, 11)]
    ```
    """
    if isinstance(spec, str) and ":" not in spec:
        return _by_strategy(spec.strip(), student_depth, teacher_depth, seed, step, recorded, similarity)
    pairs = []
    for s, t in _explicit(spec):
        pair = (_index(s, student_depth, "student", spec, named), _index(t, teacher_depth, "teacher", spec, named))
        if pair in pairs:
            raise ValueError(f"layer_map {spec!r} names the pair {pair[0]}:{pair[1]} twice, which would count it double. Remove one.")
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"layer_map {spec!r} is empty, so no block would be matched. {_CURE}")
    return pairs if any(isinstance(end, str) for pair in pairs for end in pair) else sorted(pairs)


def _by_strategy(name, student_depth, teacher_depth, seed, step, recorded, similarity) -> Pairs:
    if name == "original":
        if recorded is None:
            raise ValueError(
                "layer_map='original' is the map the student was built with, but its config records none (config.distilled_from). "
                f"Build the student with build_student, or choose a map. {_CURE}"
            )
        if len(recorded) != student_depth:
            raise ValueError(
                f"layer_map='original' is recorded for {len(recorded)} blocks, but the student has {student_depth}: "
                f"its config was changed. {_CURE}"
            )
        return [(k, _index(t, teacher_depth, "teacher", "original")) for k, t in enumerate(recorded)]
    if name not in LAYER_MAPS and name != "similar":
        raise ValueError(f"Unknown layer_map {name!r}.{did_you_mean(name, [*LAYER_MAPS, 'similar', 'original'])} {_CURE}")
    if student_depth > teacher_depth:
        raise ValueError(
            f"layer_map={name!r} needs a student no deeper than its teacher, but the student has {student_depth} blocks and the teacher "
            f"{teacher_depth}. Name the pairs yourself, such as '0:0,1:0', or build a shallower student."
        )
    if name == "similar":
        if similarity is None:
            raise ValueError(
                "layer_map='similar' compares the blocks of both models on a calibration batch, and there is none here. The trainer "
                "supplies it, build_student takes calibration_batch=...; otherwise pass similarity, or use another map."
            )
        if tuple(similarity.shape) != (student_depth, teacher_depth):
            raise ValueError(
                f"similarity has shape {tuple(similarity.shape)}, but the student has {student_depth} blocks and the teacher "
                f"{teacher_depth}. Give one row a student block and one column a teacher block."
            )
        return increasing_assignment(similarity)
    return random(student_depth, teacher_depth, seed, step) if name == "random" else LAYER_MAPS[name](student_depth, teacher_depth)


def _explicit(spec: Any) -> list[tuple[Any, Any]]:
    malformed = ValueError(f"layer_map {spec!r} cannot be read. {_CURE}")
    if isinstance(spec, str):
        parts = [part.split(":") for part in spec.strip().strip(",").split(",")]
        if any(len(part) != 2 for part in parts):
            raise malformed
        return [(s, t) for s, t in parts]
    if isinstance(spec, Mapping):
        return [(s, t) for s, targets in spec.items() for t in (targets if isinstance(targets, (list, tuple)) else [targets])]
    if not isinstance(spec, (list, tuple)) or any(not isinstance(pair, (list, tuple)) or len(pair) != 2 for pair in spec):
        raise malformed
    return [(s, t) for s, t in spec]


def _index(value: Any, depth: int, role: str, spec: Any, named: bool = False) -> int | str:
    try:
        if isinstance(value, (bool, float)):
            raise ValueError
        index = int(value)
    except (TypeError, ValueError):
        if named and isinstance(value, str) and value.strip():
            return value.strip()
        raise ValueError(f"layer_map {spec!r} has {value!r} where the number of a {role} block belongs. {_CURE}") from None
    if not -depth <= index < depth:
        kind, first = ("stage", "the stem is not a stage") if named else ("block", "the embeddings are not a block")
        raise ValueError(
            f"layer_map {spec!r} names {role} {kind} {index}, but the {role} has {depth} {kind}s: 0 to {depth - 1}, or -1 to -{depth} "
            f"from the end. {kind.capitalize()}s count from 0 and {first}."
        )
    return index % depth


def layer_map_table(pairs: Pairs, student_depth: int, teacher_depth: int) -> str:
    """A small Markdown table of a layer map, with the blocks that nobody uses named below it.

    Example:

    ```python
    >>> from hfdistill.models.layer_map import layer_map_table
    >>> print(layer_map_table([(0, 1), (1, 3)], 2, 4))
    | student block | teacher block |
    |---|---|
    | 0 | 1 |
    | 1 | 3 |
    <BLANKLINE>
    Teacher blocks not used: 0, 2.
    ```
    """
    lines = ["| student block | teacher block |", "|---|---|"]
    if any(isinstance(end, str) for pair in pairs for end in pair):
        return "\n".join(lines + [f"| {s} | {t} |" for s, t in pairs])
    for block in range(student_depth):
        lines.append(f"| {block} | {', '.join(str(t) for s, t in pairs if s == block) or '-'} |")
    unused = [str(t) for t in range(teacher_depth) if t not in {t for _, t in pairs}]
    return "\n".join(lines + (["", f"Teacher blocks not used: {', '.join(unused)}."] if unused else []))
