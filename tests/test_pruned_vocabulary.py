"""A student with a part of the teacher's vocabulary under the whole teacher: the teacher reads other ids, the words are the same."""

import json
from functools import cache

import families
import pytest
import torch
import transformers as tf
from training import Rows, arguments, flat, pad, run, state, without_dropout

from hfdistill import (
    DistillationTrainer,
    FrozenTeacher,
    build_student,
    prune_tokenizer,
    resolve_vocabulary,
    teacher_token_ids,
    train_wordpiece,
)
from hfdistill.capture import Capture
from hfdistill.capture_plan import CapturePlan


TEXTS = [
    "the old cat sat on the mat and the young cat sat there",
    "words about cats and mats",
    "nobody wrote a longer book about owls",
    "the owls sat on the old book",
]
CORPUS = ["the cat sat on the mat", "the owls sat", "a book about cats and owls", "old words"]


@cache
def tokenizers():
    """The teacher's tokenizer, the student's, and the teacher's id of each student token."""
    tokenizer = train_wordpiece(TEXTS, vocab_size=90)
    return tokenizer, *prune_tokenizer(tokenizer, CORPUS)


def build(layers=2, head="MaskedLM", seed=2, family="bert"):
    teacher = families.build(family, layers, head=head, seed=seed, vocab_size=len(tokenizers()[0]), **without_dropout(family))
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
    return teacher


def encoded(tokenizer, labels="tokens"):
    batch = tokenizer(CORPUS * 2, padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    rows = ids.masked_fill(~mask.bool(), -100) if labels == "tokens" else torch.arange(len(ids)) % 3
    return {"input_ids": ids, "attention_mask": mask, "labels": rows}


def both():
    whole, pruned, _ = tokenizers()
    return {"processing_class": pruned, "teacher_processing_class": whole}


TERMS = dict(
    task_weight=0.0, kd_weight=1.0, hidden_weight=1.0, embedding_weight=1.0, cosine_weight=1.0, attention_weight=1.0, logit_mse_weight=1.0
)


@pytest.mark.parametrize(
    "family,head", [("bert", "MaskedLM"), ("bert", "SequenceClassification"), ("roberta", "MaskedLM"), ("gpt2", "LMHeadModel")]
)
def test_a_student_that_is_the_teacher_on_fewer_tokens_has_nothing_to_learn(family, head, tmp_path):
    whole, pruned, kept = tokenizers()
    teacher = build(family=family, head=head)
    student = build_student(teacher, vocabulary=kept)
    data = Rows(encoded(pruned, "tokens" if head != "SequenceClassification" else "classes"))
    trainer, steps = run(student, teacher, data, arguments(tmp_path, **TERMS), **both())
    log = trainer.state.log_history[0]
    assert {"kd", "hidden", "embedding", "cosine", "attention", "logit_mse"} <= log.keys()
    assert all(abs(log[name]) < 1e-6 for name in ("kd", "hidden", "embedding", "cosine", "attention", "logit_mse")), log
    assert flat(steps[0]).abs().max() < 1e-4 and flat(steps[0]).numel() > 1000
    # The same run with a teacher that reads the student's ids as if they were its own has a lot to learn.
    trainer.teacher.capture.token_ids = None
    assert (
        trainer.teacher(encoded(pruned), CapturePlan(embeddings=True))
        .embeddings.sub(teacher(**{k: v for k, v in encoded(whole).items() if k != "labels"}, output_hidden_states=True).hidden_states[0])
        .abs()
        .max()
        > 0.05
    )


@pytest.mark.parametrize("positions", ["all", "labelled"])
def test_losses_and_gradient_are_those_written_by_hand(positions, tmp_path):
    """KL over the kept tokens at T = 2: both softmaxes run over them alone, in the student's order."""
    whole, pruned, kept = tokenizers()
    teacher, student = build(4, seed=2), build_student(build(4, seed=7), 2, vocabulary=kept)
    start = state(student)
    batch = encoded(pruned)
    batch["labels"][:, ::2] = -100
    options = dict(task_weight=0.5, kd_weight=2.0, temperature=2.0, kd_positions=positions)
    trainer, steps = run(student, teacher, Rows(batch), arguments(tmp_path, **options), **both())

    student.load_state_dict(start)
    student.train()
    student.zero_grad()
    logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    teacher_batch = whole(CORPUS * 2, padding=True, return_tensors="pt")
    with torch.no_grad():
        answers = teacher(**teacher_batch).logits
    kd, rows, task, labels = 0.0, 0, 0.0, 0
    for i in range(logits.size(0)):
        for j in range(logits.size(1)):
            if not batch["attention_mask"][i, j]:
                continue
            label = batch["labels"][i, j].item()
            if label != -100:
                task, labels = task - (logits[i, j, label] - logits[i, j].logsumexp(0)), labels + 1
            if positions == "labelled" and label == -100:
                continue
            weights = [(answers[i, j, old] / 2).exp() for old in kept]
            p = torch.stack(weights) / sum(weights)
            kd, rows = (
                kd + 4 * sum(p[k] * (p[k].log() - (logits[i, j, k] / 2 - (logits[i, j] / 2).logsumexp(0))) for k in range(len(kept))),
                rows + 1,
            )
    log = trainer.state.log_history[0]
    assert log["kd"] == pytest.approx((kd / rows).item(), rel=1e-4) and log["kd"] > 0.01
    assert log["task"] == pytest.approx((task / labels).item(), rel=1e-4)
    (2.0 * kd / rows + 0.5 * task / labels).backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(steps[0][name], parameter.grad, atol=2e-6, rtol=1e-3)


def test_evaluation_checkpoints_and_the_card(tmp_path):
    _, pruned, kept = tokenizers()
    options = dict(
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=4,
        teacher_batch_size=3,
        hidden_weight=1.0,
        adapter="linear",
    )

    def models():
        teacher = build(4)
        return build_student(teacher, 2, hidden_size=16, num_attention_heads=2, vocabulary=kept), teacher

    data = Rows(encoded(pruned))
    student, teacher = models()
    whole, _ = run(student, teacher, data, arguments(tmp_path / "run", **options), eval_dataset=data, **both())
    plain = whole.evaluate()
    whole.args.eval_with_teacher = True
    assert {"eval_kd", "eval_hidden"} <= whole.evaluate().keys() and plain["eval_loss"] == whole.evaluate()["eval_task"]
    again, teacher = models()
    resumed, _ = run(again, teacher, data, arguments(tmp_path / "run", **options), resume=str(tmp_path / "run/checkpoint-2"), **both())
    for name, tensor in student.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert not any("teacher_columns" in name for name in whole.objective.state_dict())
    whole.create_model_card()
    card = (tmp_path / "run/README.md").read_text()
    assert "kd" in card and "hidden" in card
    whole.save_model(str(tmp_path / "final"))
    loaded = tf.AutoModelForMaskedLM.from_pretrained(tmp_path / "final")
    reader = tf.AutoTokenizer.from_pretrained(tmp_path / "final")
    assert len(reader) == loaded.config.vocab_size == len(kept)


def test_a_teacher_by_name_brings_its_tokenizer(tmp_path):
    whole, pruned, kept = tokenizers()
    teacher = build()
    teacher.save_pretrained(tmp_path / "teacher")
    whole.save_pretrained(tmp_path / "teacher")
    student = build_student(teacher, vocabulary=kept)
    args = arguments(tmp_path / "run", task_weight=0.0, kd_weight=1.0)
    trainer, _ = run(student, str(tmp_path / "teacher"), Rows(encoded(pruned)), args, processing_class=pruned)
    assert trainer.teacher.capture.token_ids.tolist() == kept
    assert abs(trainer.state.log_history[0]["kd"]) < 1e-6


def test_ids_are_translated_once_and_for_the_similar_map_too(tmp_path):
    whole, pruned, kept = tokenizers()
    teacher = build(3)
    capture = Capture(teacher, "teacher")
    capture.token_ids = torch.tensor(kept)
    batch, plan = encoded(pruned), CapturePlan(hidden_states=frozenset({2}))
    before = batch["input_ids"].clone()
    with torch.no_grad():
        expected = teacher(**whole(CORPUS * 2, padding=True, return_tensors="pt"), output_hidden_states=True).hidden_states[-1]
        assert torch.equal(capture(batch, plan).hidden_states[2], expected)
    assert torch.equal(capture.require(plan, batch).hidden_states[2], expected)
    assert torch.equal(batch["input_ids"], before)
    student = build_student(teacher, vocabulary=kept)
    args = arguments(tmp_path, layer_map="similar", hidden_weight=1.0, task_weight=0.0, kd_weight=0.0)
    trainer, _ = run(student, teacher, Rows(encoded(pruned)), args, **both())
    assert trainer.objective.terms["hidden"].pairs == [(0, 0), (1, 1), (2, 2)]
    assert trainer.state.log_history[0]["hidden"] == pytest.approx(0.0, abs=1e-9)


def test_the_same_teacher_under_an_unpruned_student_reads_plain_ids(tmp_path):
    whole, pruned, kept = tokenizers()
    teacher = FrozenTeacher(build())
    run(build_student(teacher.model, 1, vocabulary=kept), teacher, Rows(encoded(pruned)), arguments(tmp_path), **both())
    assert teacher.capture.token_ids is not None
    args = arguments(tmp_path, task_weight=0.0)
    full = {"processing_class": whole, "teacher_processing_class": whole}
    trainer, _ = run(build_student(teacher.model), teacher, Rows(encoded(whole)), args, **full)
    assert teacher.capture.token_ids is None and trainer.objective.teacher_columns is None
    assert abs(trainer.state.log_history[0]["kd"]) < 1e-6


def test_teacher_token_ids_only_for_pruned_tokenizers():
    whole, pruned, kept = tokenizers()
    assert teacher_token_ids(pruned, whole) == kept
    assert teacher_token_ids(whole, whole) is None and teacher_token_ids(whole, pruned) is None
    assert (
        teacher_token_ids(None, whole) is None
        and teacher_token_ids(pruned, None) is None
        and teacher_token_ids(pruned, tf.ByT5Tokenizer()) is None
    )
    first = whole.convert_ids_to_tokens(range(len(whole) - 1))
    assert teacher_token_ids(tf.BertTokenizer(vocab={token: i for i, token in enumerate(first)}), whole) is None  # ids agree already
    tokens = pruned.convert_ids_to_tokens(range(len(pruned)))
    vocab = {token: i for i, token in enumerate(tokens)}
    assert teacher_token_ids(tf.BertTokenizer(vocab=vocab, do_lower_case=True), whole) == kept
    assert teacher_token_ids(tf.BertTokenizer(vocab=vocab, do_lower_case=False), whole) is None
    assert teacher_token_ids(tf.BertTokenizer(vocab=vocab, mask_token="cat"), whole) is None
    assert teacher_token_ids(tf.BertTokenizer(vocab={**vocab, "unheard": len(vocab)}), whole) is None


def test_other_pairs_are_refused_as_before(tmp_path):
    whole, pruned, kept = tokenizers()
    teacher = build()

    def trainer(student, **tokenizers):
        return DistillationTrainer(
            model=student,
            teacher=teacher,
            args=arguments(tmp_path),
            train_dataset=Rows(encoded(pruned)),
            data_collator=pad,
            **tokenizers,
        )

    student = build_student(teacher, 1, vocabulary=kept)
    with pytest.raises(ValueError, match=f"The vocabularies differ: student {len(kept)}, teacher {len(whole)}.*pass both tokenizers"):
        trainer(student, processing_class=pruned)
    stranger = train_wordpiece(["something else altogether", "no words in common"], vocab_size=len(kept))
    with pytest.raises(ValueError, match="Student and teacher tokenizers differ in"):
        trainer(student, processing_class=stranger, teacher_processing_class=whole)
    with pytest.raises(ValueError, match="Student and teacher tokenizers differ in"):
        resolve_vocabulary(len(kept), len(whole), pruned, whole)  # for models that read one batch without a trainer between them
    small = build_student(teacher, 1, vocabulary=kept[:-2])
    with pytest.raises(ValueError, match=f"The student has {len(kept) - 2} rows.*but the pruned tokenizer has {len(kept)} tokens"):
        trainer(small, **both())


def test_what_the_trainer_logs_is_plain_json(tmp_path):
    _, pruned, kept = tokenizers()
    teacher = build()
    trainer, _ = run(build_student(teacher, 1, vocabulary=kept), teacher, Rows(encoded(pruned)), arguments(tmp_path), **both())
    json.dumps([trainer.objective.describe(), trainer.state.log_history])
