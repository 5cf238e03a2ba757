"""How well a language model predicts held-out text; logits of one batch at a time, never of the whole set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


IGNORED = -100


def language_model_scores(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    collator: Callable,
    *,
    causal: bool = False,
    batch_size: int = 32,
    predictions: bool = False,
) -> dict[str, Any]:
    r"""Accuracy and perplexity of the labelled tokens: the masked ones, or (`causal`) each next one.

    `nll = -1/n Σ log p(label)` over the labelled tokens of all rows, `perplexity = exp(nll)`; a mean over tokens, however they
    are cut into batches. Masked rows should have fixed masks ([`MaskingCollator.mask_dataset`]), so that every model is asked
    the same. Nothing is sent between processes: each one that calls measures all rows, and one process has the same numbers as
    many.

    Args:
        model (`nn.Module`): a masked or causal language model. Its mode and the random state are left as they were.
        rows (sequence): held-out rows, such as those of `encode_corpus`.
        collator (callable): rows -> batch with `labels`.
        causal (`bool`, defaults to `False`): the logits of a position predict the token behind it.
        batch_size (`int`, defaults to 32): memory is `batch_size · length · vocabulary` logits.
        predictions (`bool`, defaults to `False`): also give the best token of each labelled one, and the labels, as arrays.

    Returns:
        `dict`: `accuracy`, `nll`, `perplexity` and `tokens`; `predictions` and `labels` `(tokens,)` on request.

    Raises:
        ValueError: when no token has a label.
    """
    loss, answers, truth = 0.0, [], []

    def add(batch: dict[str, Tensor]) -> None:
        nonlocal loss
        labels = batch.pop("labels")
        logits = model(**batch).logits
        logits, labels = (logits[:, :-1], labels[:, 1:]) if causal else (logits, labels)
        present = labels != IGNORED
        logits, labels = logits[present], labels[present]
        loss += cross_entropy(logits.float(), labels, reduction="sum").item()
        answers.append(logits.argmax(-1).cpu().numpy())
        truth.append(labels.cpu().numpy())

    starts = range(0, len(rows), batch_size)
    _evaluate(model, (collator([rows[i] for i in range(start, min(start + batch_size, len(rows)))]) for start in starts), add)
    guesses, labels = np.concatenate(answers or [[]]), np.concatenate(truth or [[]])
    if not len(labels):
        raise ValueError("No token of these rows has a label, so there is nothing to measure. Mask the rows first, or pass longer ones.")
    nll = loss / len(labels)
    scores = {"accuracy": float((guesses == labels).mean()), "nll": nll, "perplexity": perplexity(nll), "tokens": len(labels)}
    return scores | ({"predictions": guesses, "labels": labels} if predictions else {})


def token_accuracy(name: str = "accuracy", causal: bool = False) -> Callable[[Any], dict[str, float]]:
    """`compute_metrics` of a `Trainer` for a language model whose logits were reduced to the best token, as `DistillationTrainer` does.

    Args:
        name (`str`, defaults to `"accuracy"`): what the metric is called.
        causal (`bool`, defaults to `False`): the prediction of a position is for the token behind it.
    """

    def compute_metrics(prediction) -> dict[str, float]:
        guesses, labels = prediction.predictions, prediction.label_ids
        guesses, labels = (guesses[:, :-1], labels[:, 1:]) if causal else (guesses, labels)
        present = labels != IGNORED
        return {name: float((guesses == labels)[present].mean())}

    return compute_metrics


def pseudo_perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    *,
    max_documents: int | None = None,
    batch_size: int = 64,
) -> dict[str, float]:
    r"""`exp(-1/n Σ log p(w_t | all other tokens))`, each token masked in turn, of a masked language model.

    [Salazar et al. 2020](https://huggingface.co/papers/1910.14659), equation 2 over a corpus. Special tokens, `unk` among them,
    are neither masked nor counted. It costs one forward pass of a row for each of its tokens, so a part of the rows is usual:
    compare numbers of the same rows and the same tokenizer only.

    Args:
        model (`nn.Module`): a masked language model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        rows (iterable): with `input_ids` as in plain text, not masked.
        max_documents (`int`, *optional*): only that many rows, from the first one on.
        batch_size (`int`, defaults to 64): masked copies in one forward pass.

    Returns:
        `dict`: `pseudo_perplexity`, `pseudo_nll` and `tokens`.

    Raises:
        ValueError: for a tokenizer without a mask token, and rows without an ordinary token.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no mask token, so there is no pseudo-perplexity. For a causal model use "
            "language_model_scores(causal=True)."
        )
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)))
    loss, count = 0.0, 0

    def batches():
        for number, row in enumerate(rows):
            if max_documents is not None and number >= max_documents:
                return
            ids = torch.as_tensor(row["input_ids"])
            places = torch.nonzero(~torch.isin(ids, special))[:, 0]
            for chosen in places.split(batch_size) if len(places) else ():
                copies = ids.repeat(len(chosen), 1)
                copies[torch.arange(len(chosen)), chosen] = tokenizer.mask_token_id
                batch = {"input_ids": copies, "places": chosen, "labels": ids[chosen]}
                if "attention_mask" in row:
                    batch["attention_mask"] = torch.as_tensor(row["attention_mask"]).repeat(len(chosen), 1)
                yield batch

    def add(batch: dict[str, Tensor]) -> None:
        nonlocal loss, count
        places, labels = batch.pop("places"), batch.pop("labels")
        logits = model(**batch).logits
        logits = logits[torch.arange(len(places), device=logits.device), places]
        loss, count = loss + cross_entropy(logits.float(), labels, reduction="sum").item(), count + len(labels)

    _evaluate(model, batches(), add)
    if not count:
        raise ValueError("These rows have no token to mask, only special ones. Pass encoded text.")
    return {"pseudo_perplexity": perplexity(loss / count), "pseudo_nll": loss / count, "tokens": count}


def perplexity(nll: float) -> float:
    """`exp(nll)`, and infinity where that is too large for a float."""
    return math.exp(nll) if nll < 700 else math.inf


@torch.no_grad()
def _evaluate(model: nn.Module, batches: Iterable[dict[str, Tensor]], add: Callable) -> None:
    device = next(model.parameters()).device
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for batch in batches:
            add({name: value.to(device) for name, value in batch.items()})
    finally:
        for module in training:
            module.training = True
