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
    cls_logits: Tensor | None = None
    distillation_logits: Tensor | None = None
    attention_mask: Tensor | None = None
    target_mask: Tensor | None = None

    def attention_probabilities(self, block: int) -> Tensor:
        """Softmax of the scores of `block` over the keys each query may see, in at least fp32; padded rows are 0."""
        scores, allowed = self.attention_scores[block], self.attention_allowed[block]
        scores = scores if scores.dtype == torch.float64 else scores.float()
        return scores.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0)
