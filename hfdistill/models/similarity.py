"""Which blocks do the same work: linear CKA between hidden states, and the layer maps that follow from it."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cka(x: Tensor, y: Tensor) -> float:
    r"""Linear centred kernel alignment of two sets of features of the same rows.

    Formula: `||Yᵀ X||² / (||Xᵀ X|| ||Yᵀ Y||)` with centred columns and Frobenius norms, in float64
    (Kornblith et al. 2019, [arXiv 1905.00414](https://huggingface.co/papers/1905.00414), section 3).
    Between 0 and 1; 1 for features equal up to rotation and isotropic scale; 0 where one side is constant.

    Shapes: `x` `(rows, d_x)`, `y` `(rows, d_y)`; padding must be left out by the caller.

    Raises:
        ValueError: for other shapes, different rows, or values that are not finite.
    """
    if x.dim() != 2 or y.dim() != 2 or x.size(0) != y.size(0) or x.size(0) == 0:
        raise ValueError(
            f"linear_cka compares (rows, width) features of the same rows, got {tuple(x.shape)} and {tuple(y.shape)}. "
            "Flatten tokens into rows, drop padding, and feed both models the same batch."
        )
    x, y = _centred(x), _centred(y)
    if x is None or y is None:
        return 0.0
    if x.size(0) <= max(x.size(1), y.size(1)):
        # Few rows: the Gram matrices of the rows are smaller than those of the columns and give the same number.
        gram_x, gram_y = x @ x.T, y @ y.T
        value = (gram_x * gram_y).sum() / (gram_x.norm() * gram_y.norm())
    else:
        value = (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
    return min(max(value.item(), 0.0), 1.0)


def _centred(features: Tensor) -> Tensor | None:
    """Centred columns scaled to norm 1, or `None` where nothing but rounding is left of them."""
    features = features.detach().double()
    if not features.isfinite().all():
        raise ValueError(
            "linear_cka got features that are not finite, so no similarity exists. Look for NaN or infinity in the hidden states."
        )
    centred = features - features.mean(0)
    norm = centred.norm()
    return centred / norm if norm > 1e-12 * features.norm() else None


def increasing_assignment(similarity: Tensor) -> list[tuple[int, int]]:
    """The strictly increasing one-to-one map with the largest total similarity, by dynamic programming.

    Every student block gets one teacher block and the order is kept; ties go to the earlier teacher block.

    Shapes: `similarity` `(student_depth, teacher_depth)`.

    Raises:
        ValueError: where the student is deeper than the teacher, or values are not finite.
    """
    if similarity.dim() != 2 or not 0 < similarity.size(0) <= similarity.size(1) or not similarity.isfinite().all():
        raise ValueError(
            f"similarity must be finite and of shape (student_depth, teacher_depth) with a student no deeper than its teacher, got "
            f"{tuple(similarity.shape)}. Give each pair of blocks one number, students in rows."
        )
    values = similarity.double().tolist()
    depth, teacher_depth = len(values), len(values[0])
    # best[s][t]: largest total of the first s student blocks within the first t teacher blocks.
    best = [[0.0] * (teacher_depth + 1)] + [[float("-inf")] * (teacher_depth + 1) for _ in range(depth)]
    for s in range(1, depth + 1):
        for t in range(s, teacher_depth + 1):
            best[s][t] = max(best[s][t - 1], best[s - 1][t - 1] + values[s - 1][t - 1])
    pairs, t = [], teacher_depth
    for s in range(depth, 0, -1):
        while best[s][t] == best[s][t - 1]:
            t -= 1
        t -= 1
        pairs.append((s - 1, t))
    return pairs[::-1]


def similar_layer_map(student_hidden: list[Tensor], teacher_hidden: list[Tensor]) -> list[tuple[int, int]]:
    """The increasing layer map of the most similar blocks, by linear CKA on a calibration batch.

    Shapes: one `(rows, width)` a block, the same rows (real tokens) for all blocks of both models.

    Raises:
        ValueError: where the student is deeper than the teacher, or the rows differ.
    """
    similarity = [[linear_cka(s, t) for t in teacher_hidden] for s in student_hidden]
    return increasing_assignment(torch.tensor(similarity, dtype=torch.float64))


def representative_blocks(hidden: list[Tensor], count: int) -> list[int]:
    """The `count` blocks that stand best for a whole model: from which a student is built before it exists.

    The blocks are cut into `count` contiguous groups and each group is represented by the member with the largest summed
    linear CKA to its group (the last of equals), so that the total over all groups is largest, by dynamic programming.

    Args:
        hidden (`list[Tensor]`): `(rows, width)` a block, real tokens only.
        count (`int`): how many blocks to choose.

    Raises:
        ValueError: where `count` is not between 1 and the number of blocks.
    """
    depth = len(hidden)
    if not 1 <= count <= depth:
        raise ValueError(f"Cannot choose {count} representatives of {depth} blocks. Use between 1 and {depth}.")
    cka = [[1.0] * depth for _ in range(depth)]
    for i in range(depth):
        for j in range(i):
            cka[i][j] = cka[j][i] = linear_cka(hidden[i], hidden[j])

    def represent(start: int, end: int) -> tuple[float, int]:
        return max((sum(cka[member][start:end]), member) for member in range(start, end))

    # best[end]: total and members for the blocks before `end`, after as many groups as rounds.
    best: list[tuple[float, list[int]] | None] = [(0.0, [])] + [None] * depth
    for _ in range(count):
        longer: list[tuple[float, list[int]] | None] = [None] * (depth + 1)
        for start, before in enumerate(best):
            for end in range(start + 1, depth + 1) if before is not None else ():
                gain, member = represent(start, end)
                if longer[end] is None or before[0] + gain > longer[end][0]:
                    longer[end] = (before[0] + gain, [*before[1], member])
        best = longer
    return best[depth][1]
