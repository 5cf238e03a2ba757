"""Masks: the same for the same row wherever it is collated, the published shares, whole words whole, and labels of causal models."""

from __future__ import annotations

import itertools
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling

from hfdistill import (
    CausalCollator,
    MaskingCollator,
    count_tokens,
    encode_corpus,
    smoothed_probabilities,
    train_byte_level,
    train_wordpiece,
)


WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "unbelievableness"]


def texts(rows: int = 60, seed: int = 0) -> list[str]:
    g = np.random.default_rng(seed)
    return [" ".join(g.choice(WORDS, size=g.integers(5, 30))) + "." for _ in range(rows)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(texts(), vocab_size=70)


@pytest.fixture(scope="module")
def rows(tokenizer):
    return encode_corpus(texts(), tokenizer, 64, packing=False, min_row_tokens=1)


def masked_of(batches, tokenizer) -> dict[tuple, tuple]:
    """Unmasked content of each row -> its inputs and labels without padding; rows of the corpus all differ."""
    found = {}
    for batch in batches:
        for inputs, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist()):
            length = len(inputs) - sum(i == tokenizer.pad_token_id for i in inputs)
            original = tuple(i if label == -100 else label for i, label in zip(inputs, labels))[:length]
            found[original] = (tuple(inputs[:length]), tuple(labels[:length]))
    return found


class Reader:
    """The rows of a data set as a map-style torch data set that worker processes can take along."""

    def __init__(self, rows):
        self.rows = [rows[i] for i in range(len(rows))]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def test_masks_do_not_depend_on_order_batch_size_or_workers(tokenizer, rows):
    reader = Reader(rows)
    collator = MaskingCollator(tokenizer, seed=3)
    collator.set_epoch(2)
    expected = masked_of(DataLoader(reader, batch_size=7, collate_fn=collator), tokenizer)
    assert len(expected) == len(rows)
    shuffled = DataLoader(reader, batch_size=16, shuffle=True, collate_fn=collator, generator=torch.Generator().manual_seed(1))
    assert masked_of(shuffled, tokenizer) == expected
    workers = DataLoader(reader, batch_size=5, collate_fn=collator, num_workers=2)
    assert masked_of(workers, tokenizer) == expected
    # A resumed run begins in the middle, with a collator of its own.
    resumed = MaskingCollator(tokenizer, seed=3)
    resumed.set_epoch(2)
    rest = masked_of([resumed(reader.rows[40:])], tokenizer)
    assert rest == {key: value for key, value in expected.items() if key in rest} and len(rest) == len(rows) - 40


def test_another_epoch_seed_or_example_has_other_masks(tokenizer, rows):
    collator = MaskingCollator(tokenizer)
    row = max((rows[i] for i in range(len(rows))), key=lambda row: row["length"])["input_ids"]
    first = collator.mask(row, 0)[1].tolist()
    assert collator.mask(row, 0)[1].tolist() == first
    assert collator.mask(row, 1)[1].tolist() != first
    assert collator.mask(row, 0, epoch=1)[1].tolist() != first
    assert MaskingCollator(tokenizer, seed=1).mask(row, 0)[1].tolist() != first


def test_running_workers_see_a_new_epoch(tokenizer, rows):
    collator = MaskingCollator(tokenizer)
    loader = DataLoader(Reader(rows), batch_size=8, collate_fn=collator, num_workers=1, persistent_workers=True)
    before = masked_of(loader, tokenizer)
    collator.set_epoch(1)
    after = masked_of(loader, tokenizer)
    alone = MaskingCollator(tokenizer)
    alone.set_epoch(1)
    assert after == masked_of([alone([rows[i] for i in range(len(rows))])], tokenizer) != before


def test_the_collator_travels_to_spawned_workers_and_keeps_hearing(tokenizer, rows):
    collator = MaskingCollator(tokenizer, seed=5)
    sent = ForkingPickler.loads(ForkingPickler.dumps(collator))  # what a worker of the "spawn" kind is sent
    collator.set_epoch(4)
    batch = [rows[i] for i in range(8)]
    assert sent.epoch == 4 and torch.equal(sent(batch)["labels"], collator(batch)["labels"])


def shares(tokenizer, **options):
    """Masked share of ordinary tokens; of the masked: share of mask tokens, of others, of the same. On 200,000 tokens."""
    collator = MaskingCollator(tokenizer, **options)
    low = len(tokenizer.all_special_ids)
    ids = np.r_[2, np.random.default_rng(0).integers(low, len(tokenizer), 198), 3]
    chosen = mask = same = total = 0
    drawn = []
    for i in range(1000):
        inputs, labels = collator.mask(ids, i)
        at = labels != -100
        assert not at[0] and not at[-1] and (labels[at] == ids[at]).all() and (inputs[~at] == ids[~at]).all()
        chosen, total = chosen + at.sum(), total + len(ids) - 2
        mask, same = mask + (inputs[at] == tokenizer.mask_token_id).sum(), same + (inputs[at] == ids[at]).sum()
        drawn += inputs[at & (inputs != tokenizer.mask_token_id) & (inputs != ids)].tolist()
    return chosen / total, mask / chosen, len(drawn) / chosen, same / chosen, drawn


def test_published_shares(tokenizer):
    chosen, mask, other, same, drawn = shares(tokenizer)
    n, vocabulary = 198_000, len(tokenizer) - 5
    for value, expected, size in ((chosen, 0.15, n), (mask, 0.8, n * 0.15), (other, 0.1 * (1 - 1 / vocabulary), n * 0.15)):
        assert abs(value - expected) < 4 * np.sqrt(expected * (1 - expected) / size)
    assert same == pytest.approx(1 - mask - other)
    # Replacements: every ordinary token, none of the special ones, evenly.
    counts = np.bincount(drawn, minlength=len(tokenizer))
    assert not counts[tokenizer.all_special_ids].any()
    ordinary = np.delete(counts, tokenizer.all_special_ids)
    expected = len(drawn) / len(ordinary)
    assert ((ordinary - expected) ** 2 / expected).sum() < len(ordinary) + 5 * np.sqrt(2 * len(ordinary))


def test_shares_are_arguments(tokenizer):
    chosen, mask, other, same, _ = shares(tokenizer, mlm_probability=0.4, replace_with_mask=0.5, replace_with_random=0.0)
    assert abs(chosen - 0.4) < 0.01 and abs(mask - 0.5) < 0.01 and other == 0 and abs(same - 0.5) < 0.01


def test_a_short_row_has_one_masked_token_and_each_may_be_it(tokenizer):
    ids = [2, 20, 21, 3]
    hits = np.zeros(4)
    for i in range(600):
        labels = MaskingCollator(tokenizer, mlm_probability=0.01).mask(ids, i)[1]
        hits += labels != -100
        assert (labels != -100).any()
    assert not hits[0] and not hits[3] and min(hits[1:3]) > 230


def test_rows_without_an_ordinary_token_have_no_label(tokenizer):
    batch = MaskingCollator(tokenizer)([{"input_ids": [2, 1, 3], "example_id": 0}])  # [CLS] [UNK] [SEP]
    assert (batch["labels"] == -100).all() and batch["input_ids"].tolist() == [[2, 1, 3]]


def test_padding_of_a_row_does_not_change_its_masks(tokenizer):
    collator = MaskingCollator(tokenizer)
    ids = [2, *range(10, 40), 3]
    inputs, labels = collator.mask(ids, 4)
    padded = collator.mask([*ids, 0, 0, 0], 4)
    assert padded[0].tolist() == [*inputs, 0, 0, 0] and padded[1].tolist() == [*labels, -100, -100, -100]


def test_batches_are_padded_on_the_right_with_a_mask_only_where_needed(tokenizer):
    collator = MaskingCollator(tokenizer, pad_to_multiple_of=8)
    batch = collator([{"input_ids": list(range(10, 15)), "example_id": 0}, {"input_ids": list(range(10, 20)), "example_id": 1}])
    assert batch["input_ids"].shape == (2, 16) and batch["attention_mask"].sum(1).tolist() == [5, 10]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all() and not batch["input_ids"][0, 5:].any()
    assert set(MaskingCollator(tokenizer)([{"input_ids": [10, 11], "example_id": i} for i in range(3)])) == {"input_ids", "labels"}


# ---- Whole words ----


def words_of(tokenizer, ids) -> list[list[int]]:
    """Positions of each word, from the text of the tokens alone."""
    words, tokens = [], tokenizer.convert_ids_to_tokens(ids)
    for i, token in enumerate(tokens):
        if token in tokenizer.all_special_tokens:
            continue
        if token.startswith("##") and tokens[i - 1] not in tokenizer.all_special_tokens:  # a row may begin inside a word
            words[-1].append(i)
        else:
            words.append([i])
    return words


@pytest.mark.parametrize("column", [True, False])
def test_whole_words_are_masked_whole(tokenizer, column):
    data = encode_corpus(texts(), tokenizer, 64, packing=False, min_row_tokens=1, whole_word=column)
    assert ("word_ids" in data.column_names) == column
    collator = MaskingCollator(tokenizer, whole_word=True)
    assert "word_ids" in collator.columns
    split = chosen = total = 0
    for i in range(len(data)):
        row = data[i]
        for epoch in range(20):
            labels = collator.mask(row["input_ids"], row["example_id"], row.get("word_ids"), epoch)[1]
            for word in words_of(tokenizer, row["input_ids"]):
                at = [labels[k] != -100 for k in word]
                assert all(at) or not any(at)
                split += len(word) > 1 and at[0]
            chosen, total = chosen + (labels != -100).sum(), total + sum(map(len, words_of(tokenizer, row["input_ids"])))
    assert split > 100 and abs(chosen / total - 0.15) < 0.02


def test_both_ways_to_find_words_agree(tokenizer):
    data = encode_corpus(texts(), tokenizer, 64, packing=True, whole_word=True)
    collator = MaskingCollator(tokenizer, whole_word=True)
    for i in range(len(data)):
        ids, words = data[i]["input_ids"], data[i]["word_ids"]
        assert collator.mask(ids, i, words)[1].tolist() == collator.mask(ids, i)[1].tolist()


def test_replacements_of_whole_words_stay_eighty_ten_ten(tokenizer):
    _, mask, other, _, _ = shares(tokenizer, whole_word=True)
    assert abs(mask - 0.8) < 0.02 and abs(other - 0.1) < 0.02


def test_whole_words_of_a_byte_level_tokenizer_come_from_the_column():
    tokenizer = train_byte_level(texts(), vocab_size=290)
    data = encode_corpus(texts(), tokenizer, 64, packing=False, min_row_tokens=1, whole_word=True)
    collator = MaskingCollator(tokenizer, whole_word=True)
    for i in range(len(data)):
        ids = data[i]["input_ids"]
        labels = collator.mask(ids, i, data[i]["word_ids"])[1]
        tokens = tokenizer.convert_ids_to_tokens(ids)
        for k in range(2, len(ids) - 1):
            if not tokens[k].startswith("Ġ") and tokens[k] != ".":  # goes on where the token before it was
                assert (labels[k] == -100) == (labels[k - 1] == -100), tokens
    with pytest.raises(ValueError, match="no column 'word_ids'"):
        collator([{"input_ids": data[0]["input_ids"], "example_id": 0}])


# ---- Frequency smoothing ----


def test_smoothed_probabilities_against_the_formula():
    counts = np.array([5000, 800, 800, 90, 12, 1, 0])
    p = smoothed_probabilities(counts, 0.15, 0.7)
    assert (counts * p).sum() / counts.sum() == pytest.approx(0.15, abs=1e-12)
    free = p < 1
    ratio = p[free] / np.maximum(counts[free], 1) ** -0.7
    assert np.ptp(ratio) < 1e-9 * ratio[0]  # proportional to count^-0.7 wherever it is below 1
    assert p[1] == p[2] > p[0] and p[5] == p[6] == 1 and (ratio[0] * np.maximum(counts[~free], 1) ** -0.7 >= 1).all()
    assert smoothed_probabilities(counts, 0.15, 0.0) == pytest.approx(0.15)
    assert smoothed_probabilities(counts, 1.0, 0.7).tolist() == [1.0] * 7


def test_masks_follow_the_smoothed_probabilities(tokenizer):
    counts = np.zeros(len(tokenizer))
    counts[[20, 21, 22]] = [10_000, 1_000, 100]
    collator = MaskingCollator(tokenizer, frequency_smoothing=0.7, token_counts=dict(enumerate(counts)))
    ids = np.repeat([20, 21, 22], [10_000, 1_000, 100])
    np.random.default_rng(0).shuffle(ids)
    hits = np.zeros(3)
    for i in range(20):
        labels = collator.mask(ids, i)[1]
        hits += [(labels == token).sum() for token in (20, 21, 22)]
    expected = smoothed_probabilities(counts, 0.15, 0.7)[[20, 21, 22]]
    seen = hits / np.array([10_000, 1_000, 100]) / 20
    assert abs(seen - expected).max() < 0.02 and hits.sum() / len(ids) / 20 == pytest.approx(0.15, abs=0.005)
    assert seen[2] > 2 * seen[1] > 4 * seen[0] or expected[2] == 1


def test_counted_tokens(tokenizer, rows):
    counts = count_tokens(rows, len(tokenizer))
    everything = list(itertools.chain.from_iterable(rows["input_ids"]))
    assert counts.sum() == len(everything) and counts[2] == len(rows) and counts[20] == everything.count(20)


# ---- Fixed masks, causal labels, errors ----


def test_masked_once_is_masked_for_every_epoch(tokenizer, rows):
    collator = MaskingCollator(tokenizer, seed=1)
    fixed = collator.mask_dataset(rows)
    collator.set_epoch(3)
    batch = collator([fixed[i] for i in range(len(fixed))])
    first = MaskingCollator(tokenizer, seed=1)([rows[i] for i in range(len(rows))])
    assert all(torch.equal(batch[name], first[name]) for name in ("input_ids", "labels", "attention_mask"))


def test_causal_labels_keep_every_eos():
    tokenizer = train_byte_level(texts(), vocab_size=300, kind="gpt2")
    tokenizer.pad_token = tokenizer.eos_token
    eos = tokenizer.eos_token_id
    rows = [{"input_ids": [5, 6, eos], "example_id": 0}, {"input_ids": [5, 6, 7, 8, eos], "example_id": 1}]
    batch = CausalCollator(tokenizer)(rows)
    assert batch["labels"].tolist() == [[5, 6, eos, -100, -100], [5, 6, 7, 8, eos]]
    assert batch["input_ids"].tolist() == [[5, 6, eos, eos, eos], [5, 6, 7, 8, eos]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    stock = DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": row["input_ids"]} for row in rows])
    assert (stock["labels"] == eos).sum() == 0  # the trap this collator is there for
    given = CausalCollator(tokenizer)([{"input_ids": [5, eos, eos], "attention_mask": [1, 1, 0]}])
    assert given["labels"].tolist() == [[5, eos, -100]] and given["attention_mask"].tolist() == [[1, 1, 0]]


def test_a_gpt2_tokenizer_needs_no_padding_token():
    tokenizer = train_byte_level(texts(), vocab_size=300, kind="gpt2")
    assert tokenizer.pad_token_id is None
    assert CausalCollator(tokenizer)([{"input_ids": [5]}, {"input_ids": [5, 6]}])["labels"].tolist() == [[5, -100], [5, 6]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlm_probability": 0.0}, "mlm_probability must be above 0"),
        ({"mlm_probability": 15}, "at most 1, got 15"),
        ({"replace_with_mask": 0.9, "replace_with_random": 0.2}, "sum of at most 1"),
        ({"frequency_smoothing": 0.7}, "Pass token_counts"),
        ({"frequency_smoothing": -1.0, "token_counts": [1] * 30}, "smoothing must be at least 0"),
        ({"frequency_smoothing": 0.7, "token_counts": [0] * 30}, "Every token count is 0"),
    ],
)
def test_bad_options_are_refused(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        MaskingCollator(tokenizer, **options)


def test_what_cannot_be_masked_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no column 'example_id'"):
        MaskingCollator(tokenizer)([{"input_ids": [2, 10, 3]}])
    with pytest.raises(ValueError, match="no mask token.*CausalCollator"):
        MaskingCollator(train_byte_level(texts(), vocab_size=300, kind="gpt2"))


def test_segment_ids_are_padded_too(tokenizer):
    data = Dataset.from_dict({"input_ids": [[2, 10, 3], [2, 10, 11, 3]], "token_type_ids": [[0, 1, 1], [0, 0, 1, 1]], "example_id": [0, 1]})
    batch = MaskingCollator(tokenizer)([data[0], data[1]])
    assert batch["token_type_ids"].tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
