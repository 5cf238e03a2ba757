"""DistilBERT's triple loss through the trainer, against the paper's formula written out in float64 without any of our code."""

from __future__ import annotations

import families
import pytest
import torch
from torch.nn.functional import cosine_similarity
from training import arguments, flat, pad, run, without_dropout

from hfdistill import build_student, to_distilbert


WEIGHTS = dict(kd_weight=5.0, task_weight=2.0, cosine_weight=1.0, temperature=2.0)


def masked_rows(family: str):
    """Ragged rows with labels at some positions only."""
    batch = families.batch(family, rows=8, labels=False)
    g = torch.Generator().manual_seed(3)
    chosen = (torch.rand(batch["input_ids"].shape, generator=g) < 0.4) & batch["attention_mask"].bool()
    batch["labels"] = torch.where(chosen, batch["input_ids"], -100)
    return batch


def single(batch):
    rows = []
    for i in range(batch["input_ids"].size(0)):
        length = int(batch["attention_mask"][i].sum())
        rows.append({name: value[i, :length] for name, value in batch.items()})
    return rows


def ragged_pad(rows):
    batch = pad([{name: value for name, value in row.items() if name != "labels"} for row in rows])
    length = batch["input_ids"].size(1)
    labels = [torch.nn.functional.pad(row["labels"], (0, length - len(row["labels"])), value=-100) for row in rows]
    return {**batch, "labels": torch.stack(labels)}


def paper_loss(student, teacher, batch, positions: str, causal: bool = False):
    """`5 · T² KL(teacher || student) + 2 · CE + 1 · (1 - cos)`, each a mean over its own positions, one token at a time."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        expected = teacher(**inputs, output_hidden_states=True)
    own = student(**inputs, output_hidden_states=True)
    soft, hard, angles = [], [], []
    for row in range(batch["input_ids"].size(0)):
        length = int(batch["attention_mask"][row].sum())
        for i in range(length):
            angles.append(1 - cosine_similarity(own.hidden_states[-1][row, i], expected.hidden_states[-1][row, i], dim=0))
            target = i + 1 if causal else i  # a causal model's position predicts the token behind it
            if target >= length:
                continue
            s, t = own.logits[row, i], expected.logits[row, i]
            label = batch["labels"][row, target]
            if positions == "all" or label != -100:
                p, q = torch.softmax(t / 2, -1), torch.softmax(s / 2, -1)
                soft.append(4 * (p * (p.log() - q.log())).sum())
            if label != -100:
                hard.append(-torch.log_softmax(s, -1)[label])
    return 5 * torch.stack(soft).mean() + 2 * torch.stack(hard).mean() + torch.stack(angles).mean()


def pair(family: str, head: str):
    teacher = families.build(family, 4, head=head, **without_dropout(family)).double()
    for parameter in teacher.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return build_student(teacher, 2, layer_map="spread"), teacher


@pytest.mark.parametrize("positions", ["all", "masked"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "bert to distilbert"])
def test_masked_models(tmp_path, family, positions):
    student, teacher = pair(family.split()[0], "MaskedLM")
    student = to_distilbert(student) if "to" in family.split() else student
    check(tmp_path, student, teacher, masked_rows(family.split()[0]), positions, causal=False)


def test_causal_models(tmp_path):
    student, teacher = pair("gpt2", "LMHeadModel")
    batch = families.batch("gpt2", rows=8, labels=False)
    batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    check(tmp_path, student, teacher, batch, "all", causal=True)


def check(tmp_path, student, teacher, batch, positions, causal):
    loss = paper_loss(student, teacher, batch, positions, causal)
    names, parameters = zip(*student.named_parameters())
    expected = dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True)))
    args = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, kd_positions=positions, **WEIGHTS)
    trainer, gradients = run(student, teacher, single(batch), args, data_collator=ragged_pad)
    logged = next(log for log in trainer.state.log_history if "loss" in log)
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-6)
    used = {name: value for name, value in expected.items() if value is not None and name in gradients[0]}
    assert len(used) >= len(names) - 2
    torch.testing.assert_close(flat({name: gradients[0][name] for name in used}), flat(used), rtol=1e-6, atol=1e-9)
