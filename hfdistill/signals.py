"""What one forward pass leaves behind.

Capture writes `Signals`, losses read the tensors in them; neither knows the other.
Blocks (transformer layers) are counted from 0 and the embedding output is not a block. Stages (of image models) are counted from 0
and the stem is not a stage.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


SIGNALS = (
    "logits",
    "hidden_states",
    "features",
    "pooled_features",
    "embeddings",
    "attention_scores",
    "queries",
    "keys",
    "values",
    "pooled",
)
ATTENTION_SIGNALS = ("attention_scores", "queries", "keys", "values")
BLOCK_SIGNALS = ("hidden_states", *ATTENTION_SIGNALS)
"""Signals of transformer blocks."""
STAGE_SIGNALS = ("features", "pooled_features")
"""Signals of the stages of image models: their maps, and the means of these over space."""
LAYERED_SIGNALS = (*BLOCK_SIGNALS, *STAGE_SIGNALS)
"""Signals with a layer map: of blocks, or of stages."""


@dataclass
class Projection:
    """The last step to the logits of a vocabulary, not taken yet: `cap(scale * (features @ weight.T + bias))`.

    Logits of a whole vocabulary are the largest tensors of a language model. With this, a loss makes them where and when it needs
    them, a few rows at a time.

    Shapes:
        features: `(rows, width)`, the input of the output embedding.
        weight: `(vocabulary, width)`, the rows of the output embedding.
        bias: `(vocabulary,)` or `None`.
        scale: multiplies the logits (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`).
        softcap: c of `c * tanh(z / c)` (Gemma 2), after the scale; `None` for none.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self) -> Tensor:
        """All of them at once, `(rows, vocabulary)`."""
        logits = torch.nn.functional.linear(self.features, self.weight, self.bias)
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass
class TopLogits:
    """The `k` largest logits of each row, and how much probability the others have together at one temperature.

    Shapes:
        values, ids: `(rows, k)`: logits, not divided by the temperature, and their integer classes, largest first.
        logsumexp: `(rows,)` of *all* logits divided by `temperature`.
        temperature: the only one at which the mass of the tail is known.
        tail: whether the other classes are one more outcome (the right mass); `False` renormalises over the `k`, which is biased.
    """

    values: Tensor
    ids: Tensor
    logsumexp: Tensor
    temperature: float
    tail: bool = True


@dataclass
class Signals:
    """The captured tensors of one model on one batch; what nobody asked for is `None` or an empty dict.

    Shapes:
        logits: `(batch, classes)`, `(batch, length, classes)`, or `(batch, 2, length)` for spans: start and end, by position.
        hidden_states: block -> `(batch, length, width)`, the output of that block.
        features: stage, or name of a module, -> `(batch, channels, height, width)`, its output. Patch tokens are laid out on their
            grid, without class, distillation and register tokens. The signal `pooled_features` is their mean over space.
        embeddings: `(batch, length, width)`, the input of block 0.
        attention_scores: block -> `(batch, heads, queries, keys)`, scaled `q·k` before mask, softmax and dropout.
        attention_allowed: block -> bool `(batch, 1, queries, keys)`, True where the query is a real token and
            may look at that key (padding, causality and sliding windows included).
        queries, keys, values: block -> `(batch, length, heads * head_dim)`, what the attention of that block worked on (biases
            and rotary positions included), its heads side by side; grouped key and value heads are not repeated.
        pooled: `(batch, width)`.
        rows: integer `(rows,)`, positions in the flattened `(batch * length)`: where it is given, `logits` are `(rows, classes)` of
            these positions alone.
        shape: `(batch, length)` of the input, where `rows` is given.
        projection: the same rows of a vocabulary before the output embedding, in place of `logits`.
        top_logits: the largest ones of the same rows, in place of `logits`.
        cls_logits, distillation_logits: `(batch, classes)`, of the two heads of a DeiT, where `logits` is their mean.
        attention_mask: bool `(batch, length)`, True at real tokens; `None` when every position is real.
        target_mask: bool `(batch, length)`, True at the real tokens that the batch marks to carry logit terms; `None` when it
            marks none.
    """

    logits: Tensor | None = None
    hidden_states: dict[int, Tensor] = field(default_factory=dict)
    features: dict[int | str, Tensor] = field(default_factory=dict)
    embeddings: Tensor | None = None
    attention_scores: dict[int, Tensor] = field(default_factory=dict)
    attention_allowed: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    pooled: Tensor | None = None
    rows: Tensor | None = None
    shape: tuple[int, int] | None = None
    projection: Projection | None = None
    top_logits: TopLogits | None = None
    cls_logits: Tensor | None = None
    distillation_logits: Tensor | None = None
    attention_mask: Tensor | None = None
    target_mask: Tensor | None = None

    def attention_probabilities(self, block: int) -> Tensor:
        """Softmax of the scores of `block` over the keys each query may see, in at least fp32; padded rows are 0."""
        scores, allowed = self.attention_scores[block], self.attention_allowed[block]
        scores = scores if scores.dtype == torch.float64 else scores.float()
        return scores.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0)
