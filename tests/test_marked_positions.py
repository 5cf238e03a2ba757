"""Logit terms at the positions that `target_mask` marks (first sub-tokens), whether they have a label or not."""

import families
import pytest
import torch
from test_denominators import assert_same
from training import arguments, flat, pad, ragged, run, without_dropout

from hfdistill import DistillationTrainer, TokenCollator, train_wordpiece


WEIGHTS = dict(task_weight=0.4, kd_weight=0.7, logit_mse_weight=0.2, temperature=3.0)
TOKENS = dict(head="TokenClassification")


def marked_rows(family="bert", rows=8, seed=1):
    """Ragged rows: about half of the real tokens begin a word; rows 2, 5 and 7 have no labels, one row of them no marks either."""
    data = ragged(family, rows=rows, seed=seed)
    g = torch.Generator().manual_seed(seed)
    ids, real = data.batch["input_ids"], data.batch["attention_mask"] == 1
    starts = (torch.rand(ids.shape, generator=g) < 0.5) & real
    starts[:, 1] = True
    starts[5] = False
    data.batch["target_mask"] = starts.long()
    labels = torch.where(starts, ids % families.LABELS, -100)
    labels[[2, 5, 7]] = -100
    data.batch["labels"] = labels
    return data


def pair(family="bert", **options):
    options = {**options, "classifier_dropout": 0.0} if family == "gpt2" else options
    student = families.build(family, 2, seed=1, **without_dropout(family), **{**TOKENS, **options})
    return student, families.build(family, 4, seed=2, **{**TOKENS, **options})


def gradient(tmp_path, batch=8, steps=1, data=None, models=None, **options):
    args = arguments(
        tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps, **{**WEIGHTS, **options.pop("weights", {})}
    )
    return run(*(models or pair()), data or marked_rows(), args, **options)


@pytest.mark.parametrize(
    "family,head", [("bert", "TokenClassification"), ("gpt2", "TokenClassification"), ("bert", "MaskedLM"), ("gpt2", "LMHeadModel")]
)
def test_accumulation_does_not_change_the_gradient(family, head, tmp_path):
    def cut(batch, steps):
        return gradient(tmp_path, batch, steps, marked_rows(family), pair(family, head=head))

    trainer, (whole,) = cut(8, 1)
    assert trainer.objective.positions == "marked"
    for batch, steps in ((4, 2), (1, 8)):
        other, (parts,) = cut(batch, steps)
        assert_same(parts, whole)
        for key in ("loss", "task", "kd", "logit_mse"):
            assert other.state.log_history[0][key] == pytest.approx(trainer.state.log_history[0][key], rel=1e-5), key


def test_gradient_equals_one_written_by_hand(tmp_path):
    """The task where there is a label, the teacher where a word begins: nowhere else, and each with its own count."""
    _, (ours,) = gradient(tmp_path, 2, 4)
    student, teacher = pair()
    batch = dict(marked_rows().batch)
    labels, starts = batch.pop("labels"), batch.pop("target_mask")
    s = student(**batch).logits
    with torch.no_grad():
        t = teacher(**batch).logits
    labelled = [(i, j) for i in range(8) for j in range(9) if labels[i, j] != -100]
    begin = [(i, j) for i in range(8) for j in range(9) if starts[i, j] == 1 and batch["attention_mask"][i, j] == 1]
    assert len(begin) > len(labelled) > 0
    task = sum(-s[i, j].softmax(-1)[labels[i, j]].log() for i, j in labelled) / len(labelled)
    kd = sum(9 * ((p := (t[i, j] / 3).softmax(-1)) * (p / (s[i, j] / 3).softmax(-1)).log()).sum() for i, j in begin) / len(begin)
    mse = sum((s[i, j] - t[i, j]).square().mean() for i, j in begin) / len(begin)
    (0.4 * task + 0.7 * kd + 0.2 * mse).backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_other_sub_tokens_and_padding_are_not_heard(tmp_path):
    """The teacher says something else wherever no word begins; padded places of the column hold a 1."""
    data = marked_rows()
    _, (first,) = gradient(tmp_path, data=data)

    class Noisy(torch.nn.Module):
        def __init__(self, teacher):
            super().__init__()
            self.teacher, self.config = teacher, teacher.config

        def forward(self, input_ids, attention_mask):
            logits = self.teacher(input_ids=input_ids, attention_mask=attention_mask).logits
            begin = data.batch["target_mask"][: input_ids.size(0), : input_ids.size(1)].bool() & (attention_mask == 1)
            return {"logits": torch.where(begin.unsqueeze(-1), logits, 1e4)}

    def padded_with_ones(rows):
        batch = pad(rows)
        batch["target_mask"] = torch.where(batch["attention_mask"] == 1, batch["target_mask"], 1)
        return batch

    student, teacher = pair()
    _, (second,) = gradient(tmp_path, data=data, models=(student, Noisy(teacher).eval()), data_collator=padded_with_ones)
    assert torch.equal(flat(first), flat(second))


def test_labels_do_not_decide_where_the_teacher_is_heard(tmp_path):
    """Hiding every label leaves the teacher's part as it was; kd_positions='labelled' would lose it."""
    weights = {"weights": {"task_weight": 0.0}}
    _, (shown,) = gradient(tmp_path, **weights)
    hidden = marked_rows()
    hidden.batch["labels"] = torch.full_like(hidden.batch["labels"], -100)
    trainer, (silent,) = gradient(tmp_path, data=hidden, **weights)
    assert torch.equal(flat(shown), flat(silent)) and trainer.state.log_history[0]["kd"] > 0
    trainer, (lost,) = gradient(tmp_path, data=hidden, weights={"task_weight": 0.0, "kd_positions": "labelled"})
    assert trainer.state.log_history[0]["kd"] == 0 and not flat(lost).any()


def test_the_column_reaches_the_loss_and_no_model(tmp_path):
    """Columns are pruned by the models' signatures: this one stays, and neither model is called with it."""
    from datasets import Dataset

    tokenizer = train_wordpiece(["to be or not to be"], vocab_size=40)
    rows = {"input_ids": [[5, 6, 7], [5, 6]], "attention_mask": [[1] * 3, [1] * 2], "labels": [[-100] * 3, [1, -100]]}
    data = Dataset.from_dict({**rows, "target_mask": [[1, 0, 1], [1, 0]], "idle": [0, 1]})
    called = []
    student, teacher = pair()
    for model in (student, teacher):
        model.register_forward_pre_hook(lambda module, args, kwargs: called.append(set(kwargs)), with_kwargs=True)
    trainer, _ = run(student, teacher, data, arguments(tmp_path, **WEIGHTS), data_collator=TokenCollator(tokenizer))
    assert trainer.objective.positions == "marked" and trainer.state.log_history[0]["kd"] > 0
    assert called and all(not {"target_mask", "labels", "idle"} & keys for keys in called)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_collator_pads_marks_like_tokens(side):
    tokenizer = train_wordpiece(["to be or not to be"], vocab_size=40)
    tokenizer.padding_side = side
    rows = [
        {"input_ids": [5, 6, 7], "labels": [1, -100, 2], "target_mask": [1, 0, 1]},
        {"input_ids": [8], "labels": [0], "target_mask": [1]},
    ]
    batch = TokenCollator(tokenizer, pad_to_multiple_of=4)(rows)
    expected = {
        "right": ([[1, 0, 1, 0], [1, 0, 0, 0]], [[1, -100, 2, -100], [0, -100, -100, -100]]),
        "left": ([[0, 1, 0, 1], [0, 0, 0, 1]], [[-100, 1, -100, 2], [-100, -100, -100, 0]]),
    }[side]
    assert batch["target_mask"].tolist() == expected[0] and batch["labels"].tolist() == expected[1]
    assert batch["target_mask"].dtype == torch.long and batch["input_ids"].shape == (2, 4)
    assert rows[0].keys() == {"input_ids", "labels", "target_mask"}  # the data set's own rows are left alone
    bare = TokenCollator(tokenizer)([{"input_ids": [5, 6], "labels": [1, -100]}, {"input_ids": [8], "labels": [0]}])
    assert "target_mask" not in bare


def test_a_missing_column_is_said(tmp_path):
    data = marked_rows()
    del data.batch["target_mask"]
    with pytest.raises(ValueError, match="kd_positions='marked' needs the column 'target_mask'"):
        gradient(tmp_path, data=data, weights={"kd_positions": "marked"})


def test_evaluation_with_the_teacher_counts_the_same_positions(tmp_path):
    data = marked_rows()
    student, teacher = pair()
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        args=arguments(tmp_path, eval_with_teacher=True, per_device_eval_batch_size=3, **WEIGHTS),
        train_dataset=data,
        eval_dataset=data,
        data_collator=pad,
    )
    measured = trainer.evaluate()
    batch = {key: value for key, value in data.batch.items() if key not in ("labels", "target_mask")}
    with torch.no_grad():
        s, t = (model(**batch).logits.double() for model in (student, teacher))
    begin = (data.batch["target_mask"] == 1) & (data.batch["attention_mask"] == 1)
    assert measured["eval_logit_mse"] == pytest.approx(float((s - t).square().mean(-1)[begin].mean()), rel=1e-5)
