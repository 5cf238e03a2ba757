"""Extractive question answering: start and end, real tokens only, whatever a row is batched with."""

import json
import re

import families
import pytest
import torch
from datasets import Dataset
from training import ALL_TERMS, Rows, arguments, flat, pad, run, without_dropout
from transformers import AutoModelForQuestionAnswering, TrainerCallback

from hfdistill import DistillationTrainer, LogitMSELoss, Signals, SoftTargetsLoss, TaskSpanLoss, Term
from hfdistill.counting import Unit, count_units, labels_of, span_labels
from hfdistill.losses.masking import select_rows
from hfdistill.objective import Objective


HEAD = {"head": "QuestionAnswering", "num_labels": 2}
INF = float("inf")
STARTS = [2, 5, 1, -100, 7, 9, 0, 3]  # of lengths 9, 6, 3, 9, 6, 3, 9, 6: row 4 points at what is padding in a longer batch,
ENDS = [4, 5, 2, -100, 8, 12, 0, 5]  # row 5 past the longest row, row 3 has no answer, row 6 says "no answer" by [CLS]
LABELLED = (0, 1, 2, 6, 7)


def spans(family="bert", rows=8, lengths=None):
    batch = families.batch(family, rows=rows, seed=1, labels=False)
    if lengths is not None:
        batch = {"input_ids": batch["input_ids"].clamp(min=3), "attention_mask": torch.ones(rows, families.LENGTH, dtype=torch.long)}
    return {**batch, "start_positions": torch.tensor(STARTS[:rows]), "end_positions": torch.tensor(ENDS[:rows])}


def models(family="bert"):
    """A student and a teacher whose fresh heads are scaled up: otherwise every position is about as likely as every other."""
    dropout = {**without_dropout(family), **({"qa_dropout": 0.0} if family == "distilbert" else {})}
    student, teacher = families.build(family, 2, seed=1, **HEAD, **dropout), families.build(family, 4, seed=2, **HEAD)
    for model in (student, teacher):
        (model.classifier if family == "modernbert" else model.qa_outputs).weight.data *= 30
    return student, teacher


def first_gradient(tmp_path, batch, steps, family="bert", data=None, **weights):
    args = arguments(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps, **(weights or ALL_TERMS))
    trainer, gradients = run(*models(family), Rows(data or spans(family)), args)
    return trainer, gradients[0]


# ---- The gradient ----


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "gpt2"])
def test_accumulation_and_padding_do_not_change_the_gradient(family, tmp_path):
    trainer, whole = first_gradient(tmp_path, 8, 1, family)
    for batch, steps in ((4, 2), (1, 8)):
        other, cut = first_gradient(tmp_path, batch, steps, family)
        torch.testing.assert_close(flat(cut), flat(whole), rtol=1e-5, atol=1e-6 * float(flat(whole).abs().max()))
        for key, value in trainer.state.log_history[0].items():
            if key != "grad_norm":
                assert other.state.log_history[0][key] == pytest.approx(value, rel=1e-5, abs=1e-7), key


def by_hand(logits, targets, lengths, temperature):
    """`(task, kd, logit_mse)` in a loop over float64, each row alone and without its padding."""
    student, teacher = ([pair.double() for pair in pairs] for pairs in logits)
    task, kd, mse, labelled, rows = 0, 0, 0, 0, 0
    for side in (0, 1):
        for i, length in enumerate(lengths):
            s, t = student[side][i, :length], teacher[side][i, :length].detach()
            if 0 <= targets[side][i] < length:
                task = task - (s[targets[side][i]].exp() / s.exp().sum()).log()
                labelled += 1
            p, q = ((z / temperature).exp() / (z / temperature).exp().sum() for z in (t, s))
            kd = kd + sum(p[j] * (p[j] / q[j]).log() for j in range(length)) * temperature**2
            mse = mse + sum((s[j] - t[j]) ** 2 for j in range(length)) / length
            rows += 1
    return task / labelled, kd / rows, mse / rows


def test_gradient_and_parts_equal_a_loop(tmp_path):
    weights = dict(task_weight=0.5, kd_weight=0.7, temperature=3.0, logit_mse_weight=0.2)
    trainer, ours = first_gradient(tmp_path, 2, 4, **weights)
    student, teacher = models()
    batch = spans()
    lengths = batch["attention_mask"].sum(1).tolist()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    s, t = student(**inputs), teacher(**inputs)
    pairs = [(out.start_logits, out.end_logits) for out in (s, t)]
    task, kd, mse = by_hand(pairs, (STARTS, ENDS), lengths, 3.0)
    (0.5 * task + 0.7 * kd + 0.2 * mse).backward()
    log = trainer.state.log_history[0]
    assert (log["task"], log["kd"], log["logit_mse"]) == pytest.approx((task.item(), kd.item(), mse.item()), rel=1e-4)
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_task_loss_is_that_of_transformers_where_nothing_is_padded_and_only_there(tmp_path):
    full = spans(rows=6, lengths="equal")
    full["start_positions"], full["end_positions"] = torch.tensor([2, 5, 1, 12, 7, 0]), torch.tensor([4, 5, 2, 12, 8, 0])
    for family in ("bert", "distilbert", "roberta"):
        trainer, ours = first_gradient(tmp_path, 6, 1, family, data=full, task_weight=1.0, kd_weight=0.0)
        student, _ = models(family)
        stock = student(**full).loss
        stock.backward()
        assert trainer.state.log_history[0]["task"] == pytest.approx(stock.item(), rel=1e-5)
        reference = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        for name, gradient in reference.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)
    trainer, _ = first_gradient(tmp_path, 8, 1, task_weight=1.0, kd_weight=0.0)
    assert abs(trainer.state.log_history[0]["task"] - models()[0](**spans()).loss.item()) > 0.1


def test_rows_without_an_answer_are_heard_from_the_teacher_only(tmp_path):
    scarce = spans()
    for name in ("start_positions", "end_positions"):
        scarce[name] = torch.where(torch.arange(8) < 2, scarce[name], -100)
    seen = []

    class Peek(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(trainer._window.denominators._window)

    student, teacher = models()
    args = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    trainer = DistillationTrainer(student, args, pad, Rows(scarce), callbacks=[Peek()], teacher=teacher)
    trainer.train()
    assert {unit.kind: int(count) for unit, count in seen[0].items()} == {"samples": 8, "labels": 4, "spans": 16}
    none = {**scarce, "start_positions": torch.full((8,), -100), "end_positions": torch.full((8,), -100)}
    trainer, gradient = first_gradient(tmp_path, 4, 2, data=none)
    assert trainer.state.log_history[0]["task"] == 0 and trainer.state.log_history[0]["kd"] > 0
    assert all(torch.isfinite(g).all() for g in gradient.values())


# ---- Counts and labels ----


def test_positions_at_no_real_token_are_missing():
    tokens = torch.arange(6)[None] < torch.tensor([6, 4, 4, 4, 4])[:, None]
    positions = torch.tensor([[0, 5], [3, 4], [-100, 2], [6, 600], [-1, 1]])
    assert span_labels(positions, tokens).tolist() == [[0, 5], [3, -100], [-100, 2], [-100, -100], [-100, 1]]
    assert torch.equal(span_labels(positions.int(), None), positions.int())


def test_units_of_a_batch():
    units = [Unit(kind) for kind in ("samples", "labels", "tokens", "spans")]
    counts = count_units(spans(), units, "question_answering", None)
    found = {unit.kind: int(count) for unit, count in counts.items()}
    assert found == {"samples": 8, "labels": 2 * len(LABELLED), "tokens": 51, "spans": 16}
    empty = spans()
    empty["attention_mask"][3] = 0
    assert int(count_units(empty, [Unit("spans")], "question_answering", None)[Unit("spans")]) == 14


def test_start_and_end_are_one_label():
    batch = spans()
    assert labels_of(batch).tolist() == [list(pair) for pair in zip(STARTS, ENDS)]
    columns = {name: batch[name][:, None] for name in ("start_positions", "end_positions")}
    assert torch.equal(labels_of(columns), labels_of(batch))
    assert labels_of({"start_positions": batch["start_positions"]}) is None


# ---- The losses, where positions are not there ----


@pytest.mark.parametrize("loss", [SoftTargetsLoss(2.0), SoftTargetsLoss(0.5), LogitMSELoss(), LogitMSELoss(centered=True)], ids=repr)
def test_positions_at_minus_infinity_are_not_there(loss):
    g = torch.Generator().manual_seed(0)
    short = [torch.randn(3, 2, 4, generator=g, dtype=torch.float64) for _ in range(2)]
    short[1][0, 0, 1] = -1e4  # the teacher's probability underflows to exactly 0
    long = [torch.nn.functional.pad(tensor, (1, 2), value=-INF) for tensor in short]
    for tensors in (short, long):
        tensors[0].requires_grad_()
    values = [loss(*tensors) for tensors in (short, long)]
    torch.testing.assert_close(values[1].total, values[0].total, rtol=1e-12, atol=0)
    assert values[1].count == values[0].count == 6
    with torch.autograd.set_detect_anomaly(True):
        gradients = [torch.autograd.grad(value.total, tensors[0])[0] for value, tensors in zip(values, (short, long))]
    torch.testing.assert_close(gradients[1][..., 1:-2], gradients[0], rtol=1e-12, atol=1e-15)
    assert (gradients[1][..., [0, 5, 6]] == 0).all()
    same = long[0].detach()
    assert loss(same, same).total == 0
    mask = torch.ones(3, 2, dtype=torch.bool)
    mask[1] = False
    gone = [select_rows(tensor, mask).masked_fill(~mask[..., None], -INF) for tensor in long]  # a row without any real token
    torch.testing.assert_close(loss(*gone, mask).total, loss(*short, mask).total, rtol=1e-12, atol=0)


def test_a_class_that_only_one_model_lacks_is_no_padding():
    student, teacher = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -INF]])
    assert LogitMSELoss()(student, teacher).total == INF
    assert SoftTargetsLoss(1.0)(student, teacher).total.item() == pytest.approx(0.4055, abs=1e-4)  # log(3 / 2)
    assert SoftTargetsLoss(1.0)(teacher, student).total == INF


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_task_loss_spreads_over_positions_that_are_there(smoothing):
    g = torch.Generator().manual_seed(0)
    short = torch.randn(3, 2, 4, generator=g, dtype=torch.float64, requires_grad=True)
    long = torch.nn.functional.pad(short.detach(), (0, 3), value=-INF).requires_grad_()
    labels = torch.tensor([[0, 3], [1, -100], [2, 2]])
    reference = torch.nn.functional.cross_entropy(short.reshape(6, 4), labels.reshape(6), reduction="sum", label_smoothing=smoothing)
    value = TaskSpanLoss(label_smoothing=smoothing)(long, labels)
    torch.testing.assert_close(value.total, reference, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(reference, short)[0], torch.autograd.grad(value.total, long)[0]
    torch.testing.assert_close(gradients[1][..., :4], gradients[0], rtol=1e-12, atol=1e-15)
    assert (gradients[1][..., 4:] == 0).all() and value.count == 5


def test_label_smoothing_reaches_the_trainer(tmp_path):
    plain, _ = first_gradient(tmp_path, 8, 1, task_weight=1.0, kd_weight=0.0)
    smooth, _ = first_gradient(tmp_path, 8, 1, task_weight=1.0, kd_weight=0.0, label_smoothing_factor=0.1)
    assert smooth.state.log_history[0]["task"] != plain.state.log_history[0]["task"]


def test_half_precision_under_autocast(tmp_path):
    trainer, gradient = first_gradient(tmp_path, 4, 2, bf16=True, **ALL_TERMS)
    exact, reference = first_gradient(tmp_path, 4, 2, **ALL_TERMS)
    assert all(torch.isfinite(g).all() for g in gradient.values())
    assert trainer.state.log_history[0]["kd"] == pytest.approx(exact.state.log_history[0]["kd"], rel=0.1)


# ---- The trainer ----


def test_columns_predictions_and_evaluation(tmp_path):
    """A DistilBERT student and a BERT teacher: pruning keeps token types and positions; predictions are start and end logits."""
    student = families.build("distilbert", 2, seed=1, **HEAD)
    teacher = families.build("bert", 2, seed=2, **HEAD)
    batch = spans()
    rows = {name: [row.tolist() for row in value] for name, value in batch.items()}
    data = Dataset.from_dict({**rows, "token_type_ids": [[0] * families.LENGTH] * 8, "example_id": list("abcdefgh")})
    read = []
    teacher.register_forward_pre_hook(lambda _m, _a, inputs: read.append(sorted(inputs)), with_kwargs=True)
    seen = []

    def metrics(prediction):
        seen.append(prediction)
        return {}

    args = arguments(tmp_path, per_device_eval_batch_size=3)
    trainer = DistillationTrainer(student, args, None, data, data, compute_metrics=metrics, teacher=teacher)
    trainer.train()
    assert read and all(names == ["attention_mask", "input_ids", "token_type_ids"] for names in read)
    values = trainer.evaluate()
    assert [p.shape for p in seen[0].predictions] == [(8, families.LENGTH)] * 2
    assert [label.tolist() for label in seen[0].label_ids] == [STARTS, ENDS]
    student.eval()
    with torch.no_grad():
        out = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    torch.testing.assert_close(torch.tensor(seen[0].predictions[0]), out.start_logits)
    torch.testing.assert_close(torch.tensor(seen[0].predictions[1]), out.end_logits)
    task, kd, _ = by_hand([(out.start_logits, out.end_logits)] * 2, (STARTS, ENDS), batch["attention_mask"].sum(1).tolist(), 1.0)
    assert values["eval_loss"] == pytest.approx(task.item(), rel=1e-5)

    unlabelled = data.remove_columns(["start_positions", "end_positions"])
    output = trainer.predict(unlabelled)
    assert [p.shape for p in output.predictions] == [(8, families.LENGTH)] * 2 and output.label_ids is None


def test_evaluation_with_the_teacher(tmp_path):
    student, teacher = models()
    args = arguments(tmp_path, per_device_eval_batch_size=3, eval_with_teacher=True)
    data = Rows(spans())
    trainer = DistillationTrainer(student, args, pad, data, data, teacher=teacher)
    values = trainer.evaluate()
    batch = spans()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        pairs = [(out.start_logits, out.end_logits) for out in (student(**inputs), teacher(**inputs))]
    task, kd, _ = by_hand(pairs, (STARTS, ENDS), batch["attention_mask"].sum(1).tolist(), 2.0)
    assert (values["eval_task"], values["eval_kd"]) == pytest.approx((task.item(), kd.item()), rel=1e-4)
    assert values["eval_loss"] == pytest.approx(0.5 * task.item() + 0.5 * kd.item(), rel=1e-4)


def test_student_trains_saves_and_loads_and_teacher_by_name(tmp_path):
    student, teacher = models()
    teacher.save_pretrained(tmp_path / "teacher")
    args = arguments(tmp_path / "out", max_steps=20, task_weight=0.0, learning_rate=5e-3)
    trainer, _ = run(student, str(tmp_path / "teacher"), Rows(spans()), args)
    kd = [log["kd"] for log in trainer.state.log_history if "kd" in log]
    assert kd[-1] < kd[0] / 2
    trainer.save_model()
    loaded, report = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    trainer.create_model_card()
    assert "pipeline_tag: question-answering" in (tmp_path / "out" / "README.md").read_text()


def test_a_teacher_that_is_a_function(tmp_path):
    student, teacher = models()
    args = arguments(tmp_path, max_steps=1)
    inputs = ("input_ids", "attention_mask")
    _, ours = run(student, lambda batch: teacher(**{name: batch[name] for name in inputs}), Rows(spans()), args)
    _, reference = run(*models(), Rows(spans()), args)
    assert torch.equal(flat(ours[0]), flat(reference[0]))
    with pytest.raises(ValueError, match=r"Start and end logits must have the shape \(batch, 2, length\).*\(8, 9\) \(teacher\)"):
        run(models()[0], lambda batch: teacher(**{name: batch[name] for name in inputs}).start_logits, Rows(spans()), args)


def test_padding_of_either_side_counts():
    """A teacher function may know of padding that the student does not."""
    objective = Objective([], "question_answering", None, "labelled", 0)
    logits = torch.zeros(1, 2, 4)
    sides = [Signals(logits=logits, attention_mask=torch.tensor([mask]).bool()) for mask in ([1, 1, 1, 0], [0, 1, 1, 1])]
    s, t, rows = objective._logit_rows(*sides, None)
    assert torch.isneginf(s).tolist() == torch.isneginf(t).tolist() == [[[True, False, False, True]] * 2]
    assert rows.tolist() == [[True, True]]


# ---- What cannot work ----


def test_refusals(tmp_path):
    student, teacher = models()
    batch = spans()

    def build(data, student=student, objective=None, **options):
        return DistillationTrainer(student, arguments(tmp_path, **options), pad, Rows(data), teacher=teacher, objective=objective)

    half = {name: value for name, value in batch.items() if name != "end_positions"}
    text = "Batches of the training data have no 'start_positions' and 'end_positions', only ['attention_mask', 'input_ids', 'start_pos"
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        build(half)
    build(half, task_weight=0.0)
    for loss in ("binary_soft_targets", "regression_mse"):
        with pytest.raises(ValueError, match=f"compares single outputs \\({loss}\\).*Use soft_targets or logit_mse"):
            build(batch, objective=[Term(loss)])
    with pytest.raises(ValueError, match=r"label_names=\['labels'\] does not fit BertForQuestionAnswering, whose hard labels are in"):
        build(batch, label_names=["labels"])
    build(batch, label_names=["start_positions", "end_positions"])
    with pytest.raises(ValueError, match=r"label_names=\['start_positions', 'end_positions'\] does not fit BertForSequenceClassification"):
        other = families.build("bert", 2)
        build(families.batch("bert"), student=other, label_names=["start_positions", "end_positions"])


def test_describe_is_plain(tmp_path):
    student, teacher = models()
    trainer = DistillationTrainer(student, arguments(tmp_path), pad, Rows(spans()), teacher=teacher)
    assert [part["loss"] for part in json.loads(json.dumps(trainer.objective.describe()))] == ["task", "soft_targets"]
    assert trainer.objective.task == "question_answering" and trainer.label_names == ["start_positions", "end_positions"]
