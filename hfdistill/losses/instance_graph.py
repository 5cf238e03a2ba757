"""Instance relationship graphs: the samples of a batch as vertices, their distances as edges, and what a layer does to both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import LossValue
from .batch import BatchLoss
from .logits import check_weights
from .masking import check_same_rows
from .sample_relations import distances, relative_to_mean


class InstanceGraphLoss(BatchLoss):
    r"""Squared differences between the graphs of a batch in several layers, and between what happens to them from layer to layer.

    IRG, Liu et al. 2019 (Knowledge Distillation via Instance Relationship Graph, CVPR 2019). In each layer the vertices are the samples'
    vectors `f_i`, the edges `E_ij = ||f_i - f_j||²`, divided by the mean of those above 0 so that models of any width compare. The loss is
    the sum of

    * `edge_weight` times the mean over layers and all pairs of `(E_s - E_t)²`,
    * `vertex_weight` times the mean over layers, samples and width of `(f_s - f_t)²`, in layers where the widths agree,
    * `transformation_weight` times the mean over neighbouring layers of the mean over pairs of `(ΔE_s - ΔE_t)²`, `ΔE` being the change of
      the edges, plus, where both models keep their width between the two layers, the mean over samples of `(Δf_s - Δf_t)²`,
      `Δf = ||f_i' - f_i||²` divided by its mean.

    Zero when edges are proportional and, in layers of equal widths, vertices agree and move alike. Without the vertices it ignores
    rotation, shift and scale. Published weights are small beside the labels; none of the three is standard.

    Args:
        edge_weight (`float`, defaults to 1.0): weight of the edges.
        vertex_weight (`float`, defaults to 1.0): weight of the vertices. It has no part where no layer has equal widths.
        transformation_weight (`float`, defaults to 1.0): weight of the change between layers. It has no part with one layer.
        gather (`bool`, defaults to `False`): compare the samples of all processes, see [`BatchLoss`].

    Shapes:
        student, teacher: lists of `(batch, width)`, one for each pair of the layer map, from the input on; widths may differ.
        mask: bool `(batch,)`, True at the samples that take part; `None` for all.
        unit: sequences; the total is the loss of the batch times its samples.

    Raises:
        ValueError: for weights that are negative, not finite or all 0, if student and teacher have different numbers of layers or samples,
            and if the weights leave nothing to compare in these layers.
    """

    signal = "features"
    joint = True

    def __init__(self, edge_weight: float = 1.0, vertex_weight: float = 1.0, transformation_weight: float = 1.0, gather: bool = False):
        super().__init__(gather)
        cure = "Use 1 for each"
        check_weights(cure, edge_weight=edge_weight, vertex_weight=vertex_weight, transformation_weight=transformation_weight)
        self.edge_weight, self.vertex_weight, self.transformation_weight = edge_weight, vertex_weight, transformation_weight

    def compute(self, student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None) -> LossValue:
        if len(student) != len(teacher) or not student:
            raise ValueError(
                f"{len(student)} layers of the student and {len(teacher)} of the teacher cannot be paired. Pass one tensor of "
                "each for every pair of the layer map."
            )
        for s, t in zip(student, teacher):
            check_same_rows(s, t)
            check_same_rows(student[0], s)
        widths = [s.size(-1) for s in student], [t.size(-1) for t in teacher]
        nothing = not self.edge_weight and (not self.transformation_weight or len(student) == 1)
        if nothing and (not self.vertex_weight or all(s != t for s, t in zip(*widths))):
            raise ValueError(
                f"Layers of widths {widths[0]} (student) and {widths[1]} (teacher) leave nothing to compare: the transformation needs two "
                "layers, and the vertices a layer of equal widths. Set edge_weight above 0."
            )
        # side by side, so that the samples are chosen and exchanged once
        return super().compute(torch.cat(list(student), -1), torch.cat(list(teacher), -1), mask, widths=widths)

    def compare(self, student: Tensor, teacher: Tensor, widths: tuple[list[int], list[int]]) -> Tensor:
        sides = [tensor.split(width, dim=-1) for tensor, width in zip((student, teacher), widths)]
        edges = [[relative_to_mean(distances(layer).square()) for layer in layers] for layers in sides]
        value = self.edge_weight * _mean([_squared_error(s, t) for s, t in zip(*edges)])
        vertices = [_squared_error(s, t) for s, t in zip(*sides) if s.shape == t.shape]
        if vertices:
            value = value + self.vertex_weight * _mean(vertices)
        changes = []
        for i in range(len(widths[0]) - 1):
            change = _squared_error(*(side[i + 1] - side[i] for side in edges))
            if all(layers[i].shape == layers[i + 1].shape for layers in sides):
                moved = (relative_to_mean((layers[i + 1] - layers[i]).square().sum(-1)) for layers in sides)
                change = change + _squared_error(*moved)
            changes.append(change)
        return value + self.transformation_weight * _mean(changes) if changes else value


def _squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().mean()


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()
