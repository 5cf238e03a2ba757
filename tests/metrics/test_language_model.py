"""Perplexities and counting baselines against plain loops over single tokens."""

from __future__ import annotations

import math
from collections import Counter

import families
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from hfdistill import (
    CausalCollator,
    MaskingCollator,
    NgramBaselines,
    encode_corpus,
    language_model_scores,
    pseudo_perplexity,
    train_wordpiece,
)
from hfdistill.data.byte_level import train_byte_level
from hfdistill.metrics.language_model import token_accuracy


def texts(count: int = 12, seed: int = 0) -> list[str]:
    g = np.random.default_rng(seed)
    return [" ".join(g.choice("to be or not that is the question".split(), size=g.integers(2, 14))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(texts(), vocab_size=40)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                        initializer_range=0.5)  # fmt: skip
    return BertForMaskedLM(config).train()  # dropout is on until it is evaluated


@pytest.fixture(scope="module")
def rows(tokenizer):
    return encode_corpus(texts(), tokenizer, 16, packing=False, min_row_tokens=1)


def probabilities(model, ids, position) -> torch.Tensor:
    """float64 probabilities at one position of one unpadded row."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, position].double().softmax(-1)


def test_masked_scores_against_a_loop(tokenizer, model, rows):
    fixed = MaskingCollator(tokenizer).mask_dataset(rows)
    model.train()
    random = torch.random.get_rng_state()
    scores = language_model_scores(model, fixed, MaskingCollator(tokenizer), batch_size=5)
    assert model.training and model.bert.encoder.training and torch.equal(torch.random.get_rng_state(), random)
    right = loss = count = 0
    for row in (fixed[i] for i in range(len(fixed))):
        for position, label in enumerate(row["labels"]):
            if label != -100:
                p = probabilities(model, row["input_ids"], position)
                right, loss, count = right + (p.argmax() == label).item(), loss - p[label].log().item(), count + 1
    assert scores["tokens"] == count > 12 and scores["accuracy"] == pytest.approx(right / count)
    assert scores["nll"] == pytest.approx(loss / count, rel=1e-5) and scores["perplexity"] == pytest.approx(
        math.exp(loss / count), rel=1e-5
    )


def test_causal_scores_against_a_loop():
    tokenizer = train_byte_level(texts(), vocab_size=270, kind="gpt2")
    model = families.build("gpt2", 1, head="LMHeadModel", vocab_size=270)
    rows = encode_corpus(texts(), tokenizer, 30, packing=False, min_row_tokens=1)
    scores = language_model_scores(model, rows, CausalCollator(tokenizer), causal=True, batch_size=4)
    right = loss = count = 0
    for ids in rows["input_ids"]:
        for position in range(len(ids) - 1):
            p = probabilities(model, ids, position)
            right, loss, count = right + (p.argmax() == ids[position + 1]).item(), loss - p[ids[position + 1]].log().item(), count + 1
    assert scores["tokens"] == count and scores["accuracy"] == pytest.approx(right / count)
    assert scores["nll"] == pytest.approx(loss / count, rel=1e-5)


def test_predictions_are_those_of_the_labelled_tokens_in_order(tokenizer, model, rows):
    fixed, collator = MaskingCollator(tokenizer).mask_dataset(rows), MaskingCollator(tokenizer)
    scores = language_model_scores(model, fixed, collator, batch_size=2, predictions=True)
    assert scores["labels"].tolist() == [label for labels in fixed["labels"] for label in labels if label != -100]
    assert (scores["predictions"] == scores["labels"]).mean() == scores["accuracy"]
    again = language_model_scores(model, fixed, collator, batch_size=12, predictions=True)
    assert again["predictions"].tolist() == scores["predictions"].tolist() and again["nll"] == pytest.approx(scores["nll"])


def test_accuracy_of_the_trainer():
    class Prediction:
        predictions = np.array([[5, 6, 7], [8, 9, 1]])
        label_ids = np.array([[5, 5, -100], [-100, 8, 9]])

    assert token_accuracy("masked_accuracy")(Prediction) == {"masked_accuracy": 1 / 4}
    assert token_accuracy(causal=True)(Prediction) == {"accuracy": 3 / 3}


@pytest.mark.parametrize("batch_size", [3, 64])
def test_pseudo_perplexity_against_a_loop(tokenizer, model, rows, batch_size):
    loss = count = 0
    for ids in rows["input_ids"][:5]:
        for position, token in enumerate(ids):
            if token not in tokenizer.all_special_ids:
                masked = [*ids[:position], tokenizer.mask_token_id, *ids[position + 1 :]]
                loss, count = loss - probabilities(model, masked, position)[token].log().item(), count + 1
    scores = pseudo_perplexity(model, tokenizer, rows, max_documents=5, batch_size=batch_size)
    assert scores["tokens"] == count and scores["pseudo_nll"] == pytest.approx(loss / count, rel=1e-5)
    assert scores["pseudo_perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-5)
    assert pseudo_perplexity(model, tokenizer, rows)["tokens"] > count


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large(tokenizer, rows):
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    torch.nn.init.zeros_(model.bert.embeddings.word_embeddings.weight)
    assert pseudo_perplexity(model, tokenizer, rows, max_documents=2)["pseudo_perplexity"] == pytest.approx(len(tokenizer), rel=1e-4)


def test_nothing_to_measure_is_an_error(tokenizer, model):
    row = [{"input_ids": [2, 3], "labels": [-100, -100]}]
    with pytest.raises(ValueError, match="No token of these rows has a label"):
        language_model_scores(model, row, MaskingCollator(tokenizer))
    with pytest.raises(ValueError, match="no token to mask"):
        pseudo_perplexity(model, tokenizer, row)
    with pytest.raises(ValueError, match="no mask token"):
        pseudo_perplexity(model, train_byte_level(texts(), vocab_size=270, kind="gpt2"), row)


# ---- Counting baselines ----


def most_frequent(rows, special, wanted) -> int:
    """Token that follows the rule `wanted(ids, i)` most often, by a loop over everything; the smallest id of equals."""
    counts = Counter()
    for row in rows:
        for i, token in enumerate(row["input_ids"]):
            if token not in special and wanted(row["input_ids"], i):
                counts[token] += 1
    return min(counts, key=lambda token: (-counts[token], token)) if counts else None


def context_at(ids, i, offsets):
    return None if any(not 0 <= i + offset < len(ids) for offset in offsets) else tuple(ids[i + offset] for offset in offsets)


@pytest.mark.parametrize("context", ["input", "original"])
@pytest.mark.parametrize("causal", [False, True])
def test_ngrams_against_a_loop(tokenizer, context, causal):
    train = encode_corpus(texts(25, seed=1), tokenizer, 16, packing=False, min_row_tokens=1)
    test = encode_corpus(texts(12, seed=2), tokenizer, 16, packing=False, min_row_tokens=1)
    train = [train[i] for i in range(len(train))]
    asked = [test[i] for i in range(len(test))]
    if not causal:
        fixed = MaskingCollator(tokenizer, mlm_probability=0.4).mask_dataset(test)
        asked = [fixed[i] for i in range(len(fixed))]
    special = set(tokenizer.all_special_ids)
    pair = (-2, -1) if causal else (-1, 1)
    right, count, backed_off = np.zeros(3), 0, 0
    for row in asked:
        labels = row.get("labels", row["input_ids"])
        seen = row["input_ids"] if context == "input" else [x if y == -100 else y for x, y in zip(row["input_ids"], labels)]
        for i, label in enumerate(labels):
            if label == -100 or (causal and i == 0):
                continue
            answers = [most_frequent(train, special, lambda *_: True)]
            for offsets in ((-1,), pair):
                here = context_at(seen, i, offsets)
                best = None if here is None else most_frequent(
                    train, special, lambda ids, k, here=here, offsets=offsets: context_at(ids, k, offsets) == here
                )  # fmt: skip
                backed_off += best is None
                answers.append(answers[-1] if best is None else best)
            right += [answer == label for answer in answers]
            count += 1
    scores = NgramBaselines(train, tokenizer.all_special_ids, causal=causal).scores(asked, context)
    assert list(scores) == ["most_frequent", "left_bigram", "trigram"] and backed_off > 3
    assert list(scores.values()) == pytest.approx(list(right / count)) and len(set(scores.values())) >= 2


def test_ngrams_refuse_what_they_cannot_count(tokenizer):
    with pytest.raises(ValueError, match="no ordinary token"):
        NgramBaselines([{"input_ids": [2, 3]}], tokenizer.all_special_ids)
    baselines = NgramBaselines([{"input_ids": [10, 11]}])
    with pytest.raises(ValueError, match="has a label"):
        baselines.scores([{"input_ids": [10, 11], "labels": [-100, -100]}])
    with pytest.raises(ValueError, match="context must be"):
        baselines.scores([], context="both")
