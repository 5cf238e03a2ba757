"""Rows grouped by length: the same objective on the same rows, less padding, an order that a resume and every process share."""

from __future__ import annotations

import families
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import BatchSampler
from training import ALL_TERMS, Rows, arguments, flat, pad, run, state, without_dropout

from hfdistill import DistillationTrainer, MaskingCollator, train_wordpiece
from hfdistill.trainer_sampling import LengthGroups, row_lengths


GROUPED = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


def rows_of(count: int, seed: int = 0) -> list[dict]:
    """Texts of 4 to 19 tokens that name themselves in their first token."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 20, (count,), generator=g).tolist()
    texts = [torch.randint(3, families.VOCAB, (length,), generator=g).tolist() for length in lengths]
    return [{"input_ids": [5 + i % 50, *text[1:]], "attention_mask": [1] * len(text), "labels": i % 3} for i, text in enumerate(texts)]


def tensors(rows: list[dict]) -> dict[str, torch.Tensor]:
    return pad([{name: torch.tensor(value) for name, value in row.items()} for row in rows])


def models(family="bert", **options):
    return [families.build(family, n, seed=n, **without_dropout(family), **options) for n in (2, 4)]


@pytest.mark.parametrize("kind", ["datasets", "torch"])
def test_gradient_of_a_window_does_not_depend_on_the_grouping(kind, tmp_path):
    rows = rows_of(8)
    data = Dataset.from_list(rows) if kind == "datasets" else Rows(tensors(rows))
    gradients, padding = [], []

    def collate(batch):
        batch = tensors(batch) if kind == "datasets" else pad(batch)
        padding.append(int((batch["attention_mask"] == 0).sum()))
        return batch

    for options in ({}, GROUPED):
        padding.clear()
        args = arguments(tmp_path, **{**GROUPED, "train_sampling_strategy": "sequential", **options, **ALL_TERMS})
        trainer, seen = run(*models(), data, args, data_collator=collate)
        gradients.append((flat(seen[0]), sum(padding[-4:]), trainer.state.log_history[0]["loss"]))
    torch.testing.assert_close(gradients[1][0], gradients[0][0], rtol=1e-5, atol=1e-6 * float(gradients[0][0].abs().max()))
    assert gradients[1][2] == pytest.approx(gradients[0][2], rel=1e-5)
    assert 0 < gradients[1][1] < 0.7 * gradients[0][1]


def test_masks_belong_to_their_rows(tmp_path):
    """Grouped or not, a text is asked about the same tokens: its `example_id` goes with it through pruned columns and the sampler."""
    tokenizer = train_wordpiece(["to be or not to be that is the question", "whether tis nobler in the mind to suffer"] * 3, vocab_size=80)
    texts = [" ".join(["to be or not"] * (1 + i % 4)) for i in range(12)]
    ids = tokenizer(texts)["input_ids"]
    data = Dataset.from_dict({"input_ids": ids, "example_id": list(range(12)), "length": [len(row) for row in ids], "text": texts})
    gradients = []
    for strategy in ("sequential", "group_by_length"):
        options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "kd_positions": "labelled"}
        options["train_sampling_strategy"] = strategy
        student, teacher = models(head="MaskedLM", vocab_size=len(tokenizer))
        _, seen = run(student, teacher, data, arguments(tmp_path, **options), data_collator=MaskingCollator(tokenizer, 0.3))
        gradients.append(flat(seen[0]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6 * float(gradients[0].abs().max()))


def test_resume_in_the_second_epoch_goes_on_with_the_same_batches(tmp_path):
    ends, orders = [], []
    for resume in (None, str(tmp_path / "checkpoint-5")):
        seen = []

        def collate(batch, seen=seen):
            seen.append([row["input_ids"][0] for row in batch])
            return tensors(batch)

        options = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 4, "train_sampling_strategy": "group_by_length"}
        options |= {"save_strategy": "steps", "save_steps": 5, "learning_rate": 0.01}
        student, teacher = families.build("bert", 1, seed=1), families.build("bert", 2, seed=2)  # with dropout
        data = Dataset.from_list(rows_of(12))
        torch.manual_seed(len(ends))  # whatever was drawn before
        trainer, _ = run(student, teacher, data, arguments(tmp_path, **options), data_collator=collate, resume=resume)
        ends.append(state(trainer.model))
        orders.append(seen)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert orders[0][-3:] != orders[0][-6:-3]  # another order in each epoch
    assert sorted(sum(orders[0][-3:], [])) == sorted(sum(orders[0][-6:-3], []))


def test_processes_share_out_all_rows_whatever_they_have_drawn_before():
    lengths = [len(row["input_ids"]) for row in rows_of(400)]
    parts = []
    for rank in range(2):
        torch.manual_seed(rank)
        torch.rand(rank)
        sampler = BatchSampler(LengthGroups(8, lengths, seed=3, epoch=lambda: 1), 4, drop_last=False)
        parts.append(list(BatchSamplerShard(sampler, 2, rank)))
    assert sorted(i for part in parts for batch in part for i in batch) == list(range(400))
    steps = [[lengths[i] for batch in both for i in batch] for both in zip(*parts)]
    spreads = [max(own) - min(own) for own in steps]
    assert sum(spreads) / len(spreads) < 4 < 15 == max(lengths) - min(lengths)


def test_predictions_stay_in_the_order_of_the_data(tmp_path):
    student, teacher = models()
    data = Dataset.from_list(rows_of(10))
    args = arguments(tmp_path, **GROUPED, per_device_eval_batch_size=3)
    trainer, _ = run(student, teacher, Dataset.from_list(rows_of(8)), args, data_collator=tensors, eval_dataset=data)
    assert trainer.predict(data).label_ids.tolist() == data["labels"][:]


def test_lengths_are_those_of_the_rows():
    rows = rows_of(9)
    expected = [len(row["input_ids"]) for row in rows]
    data = Dataset.from_list(rows)
    assert row_lengths(data) == expected and row_lengths(data.with_format("torch")) == expected
    assert row_lengths(data.shuffle(seed=1).select([4, 0])) == [len(data.shuffle(seed=1)[i]["input_ids"]) for i in (4, 0)]
    shorter = data.with_transform(lambda batch: {"input_ids": [row[1:] for row in batch["input_ids"]]})
    assert row_lengths(shorter) == [n - 1 for n in expected]
    assert row_lengths(Rows(tensors(rows))) == expected
    with pytest.raises(ValueError, match="needs the length of each row, but rows have no 'input_ids', only \\['pixel_values'\\].*'random'"):
        row_lengths([{"pixel_values": torch.zeros(3, 4, 4)}])


def test_epochs_are_counted_where_nobody_says():
    groups = LengthGroups(4, list(range(16)), seed=1)
    first, second = list(groups), list(groups)
    assert first != second and sorted(first) == list(range(16)) and first == list(LengthGroups(4, list(range(16)), seed=1))


def test_a_column_of_lengths_is_used_where_there_is_one(tmp_path):
    """Texts that the collator tokenizes have no ids to measure."""
    data = Dataset.from_dict({"text": list("abcdefgh"), "length": [1, 9, 2, 8, 3, 7, 4, 6]})

    def collate(rows):
        return tensors(rows_of(len(rows)))

    args = arguments(tmp_path, train_sampling_strategy="group_by_length", per_device_train_batch_size=2, remove_unused_columns=False)
    student, teacher = models()
    trainer = DistillationTrainer(student, args, teacher=teacher, train_dataset=data, data_collator=collate)
    order = list(trainer._get_train_sampler())
    assert sorted(order) == list(range(8)) and max(data["length"][i] for i in order[:2]) == 9
