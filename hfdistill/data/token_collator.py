"""Batches for token classification: labels and the marks of the positions that count are padded like the tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DataCollatorForTokenClassification


@dataclass
class TokenCollator(DataCollatorForTokenClassification):
    """`DataCollatorForTokenClassification` that also pads `target_mask`, with 0 and on the side of the tokenizer.

    Where rows have that column, [`DistillationTrainer`] compares logits at its 1s only, whether they have a label or not;
    [`encode_tokens`] marks first sub-tokens.
    """

    def torch_call(self, features):
        marks = [feature.get("target_mask") for feature in features]
        batch = super().torch_call([{name: value for name, value in row.items() if name != "target_mask"} for row in features])
        if any(own is None for own in marks):
            return batch
        length, left = batch["input_ids"].size(1), self.tokenizer.padding_side == "left"
        rows = []
        for own in map(list, marks):
            padding = [0] * (length - len(own))
            rows.append([*padding, *own] if left else [*own, *padding])
        batch["target_mask"] = torch.tensor(rows)
        return batch
