"""Resident memory of a process that reads a stored teacher, as the table grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, default_data_collator

from ..capture_plan import CapturePlan
from ..process_memory import MEGABYTE, resident
from ..teachers.store_writing import store_teacher
from ..teachers.stored import StoredTeacher
from .workloads import SEED


LENGTH, CLASSES, BATCH = 8, 4096, 32
"""Tokens of an example, logits stored for each (8 kB in fp16), and examples read at a time."""


def write_table(folder: str | Path, examples: int) -> None:
    """Stores the logits of a tiny classifier for `examples` random texts."""
    torch.manual_seed(SEED)
    config = BertConfig(
        vocab_size=128, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=LENGTH,
        num_labels=CLASSES,
    )  # fmt: skip
    rows = _examples(torch.arange(examples))
    data = Dataset.from_dict({name: value.numpy() for name, value in rows.items()}).with_format("torch")
    store_teacher(folder, BertForSequenceClassification(config).eval(), data, default_data_collator, batch_size=512, progress=False)


def read_table(folder: str | Path, examples: int, batches: int) -> dict[str, Any]:
    """Megabytes that the process holds before and after it has read `batches` batches from all over the table."""
    before = resident()
    teacher = StoredTeacher(folder)
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(batches):
        teacher(_examples(torch.randint(examples, (BATCH,), generator=generator)), CapturePlan())
    size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {
        "examples": examples,
        "batches": batches,
        "table_mb": size / MEGABYTE,
        "before_mb": before / MEGABYTE,
        "resident_mb": resident() / MEGABYTE,
    }


def _examples(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tokens that can be made again from the number of an example, so that the data itself takes no memory."""
    tokens = (ids[:, None] * 31 + torch.arange(LENGTH) * 7 + ids[:, None] // 97) % 128
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "example_id": ids}
