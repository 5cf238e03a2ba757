"""The objectives of the workloads in plain PyTorch, on whole model outputs: `(student, teacher, batch, projections) -> loss`.

They are what people write by hand, and the independent value that every library is held against.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def soft_targets(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T² KL(teacher || student)`, mean over rows, as everybody writes it."""
    student, teacher = student.flatten(0, -2) / temperature, teacher.flatten(0, -2) / temperature
    return F.kl_div(F.log_softmax(student, -1), F.softmax(teacher, -1), reduction="batchmean") * temperature**2


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    return F.cosine_embedding_loss(student, teacher, student.new_ones(len(student)))


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error between normalised maps of activity (the published code of Zagoruyko and Komodakis)."""
    maps = [F.normalize(one.pow(2).mean(1).flatten(1)) for one in (student, teacher)]
    return (maps[0] - maps[1]).pow(2).mean()


def triple(masked: bool):
    """DistilBERT's three terms with its weights 5, 2 and 1."""

    def formula(student, teacher, batch, projections):
        s, t = student.logits, teacher.logits
        if masked:
            rows = batch["labels"] != -100
            s, t = s[rows], t[rows]
        return 5 * soft_targets(s, t, 2.0) + 2 * student.loss + cosine(student.hidden_states[-1], teacher.hidden_states[-1])

    return formula


def tinybert(pairs: list[tuple[int, int]]):
    """Squared errors of embeddings, hidden states and attention maps of the mapped blocks, with weight 1 each."""

    def formula(student, teacher, batch, projections):
        loss = F.mse_loss(projections[0](student.hidden_states[0]), teacher.hidden_states[0])
        for (s, t), projection in zip(pairs, projections[1:]):
            loss = loss + F.mse_loss(projection(student.hidden_states[s + 1]), teacher.hidden_states[t + 1])
            loss = loss + F.mse_loss(student.attentions[s], teacher.attentions[t])
        return loss

    return formula


def classes(student, teacher, batch, projections):
    """Soft targets and labels, half and half."""
    return 0.5 * soft_targets(student.logits, teacher.logits, 2.0) + 0.5 * student.loss


def hint_and_attention(student, teacher, batch, projections):
    """[`classes`], a hint at the second stage, and attention transfer at all four with weight 1000 each."""
    loss = classes(student, teacher, batch, projections)
    loss = loss + F.mse_loss(projections[0](student.hidden_states[2]), teacher.hidden_states[2])
    return loss + 1000 * sum(attention_transfer(s, t) for s, t in zip(student.hidden_states[1:], teacher.hidden_states[1:]))


def next_tokens(student, teacher, batch, projections):
    """Forward KL of the next token."""
    return soft_targets(student.logits[:, :-1], teacher.logits[:, :-1], 1.0)
