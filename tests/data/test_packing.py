"""Sequences laid side by side: nothing lost, nothing twice, in an order that is always the same."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from hfdistill import CausalCollator, MaskingCollator, PackingCollator, TokenCollator, train_wordpiece
from hfdistill.counting import Unit, count_pairs, count_units, marked_targets, real_tokens
from hfdistill.data.packing import first_fit
from hfdistill.packed import packed_positions


TEXTS = ["to be or not to be", "that is", "the question whether tis nobler in the mind to suffer", "the slings", "and arrows of fortune"]
TEXTS += ["or"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(TEXTS * 3, vocab_size=90)


def rows_of(tokenizer, **columns):
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    return [{"input_ids": own, "example_id": i, **{name: make(own) for name, make in columns.items()}} for i, own in enumerate(ids)]


def sequences(batch, column):
    """What each sequence of a packed batch holds of `column`, as a sorted list of pairs with its ids."""
    found = []
    for row in range(batch["input_ids"].size(0)):
        for number in range(1, int(batch["sequence_ids"][row].max()) + 1):
            here = batch["sequence_ids"][row] == number
            found.append((batch["input_ids"][row][here].tolist(), batch[column][row][here].tolist()))
    return sorted(found)


def padded(batch, column):
    masks = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    return sorted((ids[mask].tolist(), own[mask].tolist()) for ids, own, mask in zip(batch["input_ids"], batch[column], masks))


@pytest.mark.parametrize("max_length", [None, 30, 64])
def test_every_token_keeps_its_label_and_place(tokenizer, max_length):
    collator = PackingCollator(MaskingCollator(tokenizer, 0.4), max_length)
    rows = rows_of(tokenizer)
    plain, packed = collator(rows), collator.for_training()(rows)
    assert plain.keys() == {"input_ids", "labels", "attention_mask"} and packed.keys() == {"input_ids", "labels", "sequence_ids"}
    assert sequences(packed, "labels") == padded(plain, "labels")
    lengths = plain["attention_mask"].sum(1)
    rows_packed, length = packed["input_ids"].shape
    assert length <= (max_length or int(lengths.max())) and rows_packed < len(rows)
    assert rows_packed == {None: 3, 30: 2, 64: 1}[max_length]
    padding = packed["sequence_ids"] == 0
    assert (packed["labels"][padding] == -100).all() and (packed["input_ids"][padding] == tokenizer.pad_token_id).all()
    for row in packed["sequence_ids"].tolist():  # numbered from 1, one after another, padding last
        seen = [number for i, number in enumerate(row) if i == 0 or row[i - 1] != number]
        assert seen in (list(range(1, len(seen) + 1)), [*range(1, len(seen)), 0])


def test_token_columns_follow_and_padding_may_be_left(tokenizer):
    columns = {"labels": lambda ids: [i % 3 for i in ids], "target_mask": lambda ids: [i % 2 for i in ids]}
    rows = rows_of(tokenizer, **columns, token_type_ids=lambda ids: [1] * len(ids))
    rows = [{name: value for name, value in row.items() if name != "example_id"} for row in rows]
    batches = []
    for side in ("right", "left"):
        tokenizer.padding_side = side
        collator = PackingCollator(TokenCollator(tokenizer))
        batches.append(collator.for_training()(rows))
        for column in ("labels", "target_mask", "token_type_ids"):
            assert sequences(batches[-1], column) == padded(collator(rows), column)
    tokenizer.padding_side = "right"
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])


def test_the_first_token_of_a_causal_sequence_is_no_target(tokenizer):
    collator = PackingCollator(CausalCollator(tokenizer))
    assert collator.causal and not PackingCollator(MaskingCollator(tokenizer)).causal
    rows = rows_of(tokenizer)
    packed = collator.for_training()(rows)
    for ids, labels in sequences(packed, "labels"):
        assert labels == [-100, *ids[1:]]
    counted = [count_units(batch, [Unit("labels")], "causal_lm", None)[Unit("labels")] for batch in (packed, collator(rows))]
    assert counted[0] == counted[1] == sum(len(row["input_ids"]) - 1 for row in rows)


def test_first_fit_puts_the_longest_first_and_equals_in_their_order():
    assert first_fit([3, 7, 3, 4, 0, 7], 10) == [[1, 0], [5, 2], [3]]
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 50, (200,), generator=g).tolist()
    rows = first_fit(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(200)) and all(sum(lengths[i] for i in row) <= 64 for row in rows)
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 64) + 1  # the bound of first-fit decreasing


def test_rows_are_multiples_where_asked(tokenizer):
    packed = PackingCollator(MaskingCollator(tokenizer), pad_to_multiple_of=8).for_training()(rows_of(tokenizer))
    assert packed["input_ids"].size(1) % 8 == 0


def test_masks_are_those_of_the_epoch_in_workers_too(tokenizer):
    """What is told to the collator of evaluation holds for that of training: they share the wrapped one."""
    collator = PackingCollator(MaskingCollator(tokenizer, 0.4))
    training = collator.for_training()
    assert training is collator.for_training() is training.for_training() and collator.columns == ("example_id",)
    loader = DataLoader(rows_of(tokenizer), batch_size=6, collate_fn=training, num_workers=1)
    batches = []
    for epoch in (0, 1):
        collator.set_epoch(epoch)
        batches.append(next(iter(loader)))
        assert torch.equal(batches[-1]["labels"], training(rows_of(tokenizer))["labels"])
    assert not torch.equal(batches[0]["labels"], batches[1]["labels"])
    pickle.dumps(PackingCollator(CausalCollator(tokenizer)))
    PackingCollator(CausalCollator(tokenizer)).set_epoch(1)  # has none


def test_what_does_not_fit_is_refused(tokenizer):
    with pytest.raises(ValueError, match="A sequence has 1. tokens, which do not fit into rows of max_length=5"):
        PackingCollator(MaskingCollator(tokenizer), 5).for_training()(rows_of(tokenizer))
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        PackingCollator(MaskingCollator(tokenizer), 0)
    for name, value in (("labels", torch.zeros(2)), ("start_positions", torch.zeros(2)), ("name", ["a", "b"])):
        with pytest.raises(ValueError, match=f"The column '{name}' does not have one value for each token \\(2, 3\\)"):
            PackingCollator(None).pack({"input_ids": torch.ones(2, 3, dtype=torch.long), name: value})


# ---- Positions and counts of packed rows ----

IDS = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])


def test_positions_begin_anew():
    assert packed_positions(IDS).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], list(range(8))]


def test_rows_are_counted_as_if_each_sequence_were_alone():
    lengths = [3, 2, 1, 8]
    batch = {"input_ids": torch.ones_like(IDS), "sequence_ids": IDS, "target_mask": torch.ones_like(IDS)}
    units = [Unit("tokens"), Unit("sequences"), Unit("marked"), Unit("pairs"), Unit("pairs", causal=True), Unit("pairs", window=2)]
    counts = count_units(batch, units, "masked_lm", None)
    windows = sum(sum(abs(i - j) < 2 for i in range(n) for j in range(n)) for n in lengths)
    expected = [14, 4, 14, sum(n * n for n in lengths), sum(n * (n + 1) // 2 for n in lengths), windows]
    assert [int(counts[unit]) for unit in units] == expected
    assert torch.equal(real_tokens(batch), IDS > 0) and torch.equal(marked_targets(batch), IDS > 0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_pairs_of_single_sequences_are_those_of_the_padding_mask(causal, window):
    tokens = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    assert count_pairs(tokens, causal, window) == count_pairs(tokens, causal, window, tokens.long())
