"""Helpers of the trainer tests: tiny data sets and runs that give back what an optimizer step saw."""

from __future__ import annotations

import families
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from hfdistill import DistillationTrainer, DistillationTrainingArguments


ALL_TERMS = dict(
    task_weight=0.5, kd_weight=0.7, logit_mse_weight=0.1, hidden_weight=0.3, embedding_weight=0.2, cosine_weight=0.4, attention_weight=0.6
)


class Rows(Dataset):
    """A batch as single rows, cut to their real length so that batches are padded anew (ragged)."""

    def __init__(self, batch: dict[str, torch.Tensor]):
        self.batch = batch

    def __len__(self):
        return next(iter(self.batch.values())).size(0)

    def __getitem__(self, i):
        row = {key: value[i] for key, value in self.batch.items()}
        if "attention_mask" in row:
            length = int(row["attention_mask"].sum())
            row = {k: v[:length] if v.dim() == 1 and v.size(0) == self.batch["attention_mask"].size(1) else v for k, v in row.items()}
        return row


def pad(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Right padding with 0 (-100 for token labels), as DataCollatorWithPadding does, without a tokenizer."""
    batch = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        if values[0].dim() == 1 and key != "labels" or values[0].dim() == 1 and len({v.size(0) for v in values}) > 1:
            fill = -100 if key == "labels" else 0
            values = [torch.nn.functional.pad(v, (0, max(w.size(0) for w in values) - v.size(0)), value=fill) for v in values]
        batch[key] = torch.stack(values)
    return batch


def arguments(tmp_path, **options) -> DistillationTrainingArguments:
    defaults = dict(
        output_dir=str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=8,
        max_steps=1,
        learning_rate=1e-3,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        log_step_profile=False,  # logs are compared
        seed=3,
    )
    return DistillationTrainingArguments(**{**defaults, **options})


def without_dropout(family: str) -> dict:
    if family == "distilbert":
        return {"attention_dropout": 0.0, "dropout": 0.0, "seq_classif_dropout": 0.0}
    if family == "gpt2":
        return {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    if family in ("llama", "qwen2", "qwen3", "modernbert"):
        return {}
    return {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}


class Gradients(TrainerCallback):
    """Keeps every gradient of each optimizer step, of the student and of the adapters."""

    def __init__(self):
        self.trainer, self.steps = None, []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = {**dict(self.trainer.model.named_parameters()), **{f"adapter.{k}": p for k, p in self.trainer.objective.named_parameters()}}
        self.steps.append({name: p.grad.clone() for name, p in named.items() if p.grad is not None})


def run(student, teacher, data, args, **options):
    """Trains and returns `(trainer, gradients of each step)`."""
    gradients, resume = Gradients(), options.pop("resume", None)
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        args=args,
        train_dataset=data,
        data_collator=options.pop("data_collator", pad),
        callbacks=[gradients, *options.pop("callbacks", [])],
        **options,
    )
    gradients.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    return trainer, gradients.steps


def ragged(family: str, rows: int = 8, seed: int = 1) -> Rows:
    return Rows(families.batch(family, rows=rows, seed=seed))


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradients[name].flatten().double() for name in sorted(gradients)])


def state(model) -> dict[str, torch.Tensor]:
    """A copy of the weights as they are now."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
