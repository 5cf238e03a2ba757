"""Training from a stored teacher is training with the teacher, however batches are drawn; what would differ is refused."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import families
import pytest
import stored_runs
import torch
import yaml
from stored_runs import RUNS, collate, text_rows, train
from training import arguments, ragged

import hfdistill
from hfdistill import DistillationTrainer, StoredTeacher, TeacherStore, Term
from hfdistill.teachers import FrozenTeacher


def losses(trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def assert_same_run(one, other, tolerance: float = 1e-5) -> None:
    assert losses(one) == pytest.approx(losses(other), rel=tolerance, abs=tolerance)
    for name, tensor in one.model.state_dict().items():
        torch.testing.assert_close(tensor, other.model.state_dict()[name], rtol=1e-4, atol=tolerance, msg=name)


QUICK = ("classification", "spans", "masked_lm", "top_k_masked_lm", "augmented_maps")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS])
def test_training_from_the_store_is_training_with_the_teacher(name, tmp_path, monkeypatch):
    """Shuffled, with accumulation, over several epochs of new masks and augmentation; then from the store alone, without a teacher."""
    live = train(name, tmp_path / "run")
    first = train(name, tmp_path / "run", store=tmp_path / "store")
    assert_same_run(first, live)
    assert isinstance(first.teacher, StoredTeacher) and first.teacher.live is None

    monkeypatch.setattr(FrozenTeacher, "__call__", lambda *_, **__: pytest.fail("the teacher was asked again"))
    alone = train(name, tmp_path / "run", teacher=StoredTeacher(tmp_path / "store"))
    assert_same_run(alone, live)


def test_a_complete_store_is_not_written_again(tmp_path, monkeypatch):
    from hfdistill.teachers import store_writing

    train("classification", tmp_path / "run", max_steps=1, store=tmp_path / "store")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    monkeypatch.setattr(store_writing, "write_shard", lambda *_: pytest.fail("written again"))
    train("classification", tmp_path / "run", max_steps=1, store=tmp_path / "store")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == before


@pytest.mark.parametrize("name", ["classification", "masked_lm", "augmented_maps"])
def test_a_resumed_run_from_the_store_is_the_uninterrupted_one(name, tmp_path):
    whole = train(name, tmp_path / "run", store=tmp_path / "store", save_strategy="steps", save_steps=2)
    for step in (2, 4):  # in the middle of the first epoch, and of the second, which has other masks
        again = train(name, tmp_path / "run", store=tmp_path / "store", resume=str(tmp_path / f"run/checkpoint-{step}"))
        assert again.state.global_step == 5
        for key, tensor in whole.model.state_dict().items():
            assert torch.equal(tensor, again.model.state_dict()[key]), key


def test_workers_make_the_same_batches(tmp_path):
    """Those that stay from one epoch to the next are told of it."""
    live = train("masked_lm", tmp_path / "run", store=tmp_path / "store")
    options = dict(dataloader_num_workers=1, dataloader_persistent_workers=True)
    stored = train("masked_lm", tmp_path / "run", teacher=StoredTeacher(tmp_path / "store"), **options)
    assert stored.state.epoch > 1 and len(stored.teacher.store) == 24
    assert_same_run(stored, live)


class MaskedForTheStudent(stored_runs.MaskingCollator):
    """The teacher reads the text without masks, in every epoch the same."""

    def __call__(self, rows):
        batch = super().__call__(rows)
        labels = batch["labels"]
        return {**batch, "teacher_input_ids": torch.where(labels == -100, batch["input_ids"], labels)}


@pytest.mark.slow
def test_masks_of_the_student_alone_are_new_in_each_epoch(tmp_path, monkeypatch, caplog):
    _, teacher, rows, _, _ = RUNS["masked_lm"]()
    own = MaskedForTheStudent(stored_runs.tokenizer(), 0.3, seed=3)

    def fresh():
        student, _, _, options, more = RUNS["masked_lm"]()
        return student, teacher, rows, options, {**more, "data_collator": own}

    monkeypatch.setitem(RUNS, "own_masks", fresh)
    live = train("own_masks", tmp_path / "run")
    stored = train("own_masks", tmp_path / "run", store=tmp_path / "store")
    assert len(stored.teacher.store) == 12 and not stored.teacher.store.manifest.changes and own.epoch == 1
    assert_same_run(stored, live)
    assert "repeated" not in caplog.text

    live = train("own_masks", tmp_path / "run", kd_positions="labelled")
    stored = train("own_masks", tmp_path / "run", store=tmp_path / "labelled", kd_positions="labelled")
    assert len(stored.teacher.store) == 24 and stored.teacher.store.manifest.changes  # other positions in each epoch
    assert_same_run(stored, live)


@pytest.mark.parametrize("kind", ["labelled_masked_lm", pytest.param("causal_lm", marks=pytest.mark.slow)])
def test_a_student_whose_head_runs_everywhere_is_compared_at_stored_positions_alone(kind, tmp_path):
    """Others are NaN, which no loss may let through."""
    live = train(kind, tmp_path / "run", vocabulary_head="full")
    stored = train(kind, tmp_path / "run", store=tmp_path / "store", vocabulary_head="full")
    assert stored.teacher.store.manifest.logits == "hidden"
    assert_same_run(stored, live)


def test_other_positions_are_refused(tmp_path):
    """Stored by a run whose head needs no rows, which is asked for them as well."""

    def go(**changes):
        return train("masked_lm", tmp_path / "run", max_steps=1, **changes)

    go(store=tmp_path / "store", kd_positions="labelled", vocabulary_head="full")
    message = r"stored\.positions: stored \['labelled \(masked_lm\)'\], now \['all \(masked_lm\)'\]"
    with pytest.raises(ValueError, match=message):
        go(store=tmp_path / "store", kd_positions="all")
    for head in ("full", "auto"):
        with pytest.raises(ValueError, match=r"has logits at labelled \(masked_lm\) positions, but this run compares them at all"):
            go(teacher=StoredTeacher(tmp_path / "store"), kd_positions="all", vocabulary_head=head)
    go(store=tmp_path / "all", kd_positions="all")
    go(teacher=StoredTeacher(tmp_path / "all"), kd_positions="labelled")


def test_another_pooling_is_refused(tmp_path):
    train("pooled", tmp_path / "run", max_steps=1, store=tmp_path / "store", pooling="mean")
    with pytest.raises(ValueError, match="pooled vectors are those of pooling='mean', but this run has 'cls'"):
        train("pooled", tmp_path / "run", max_steps=1, teacher=StoredTeacher(tmp_path / "store"), pooling="cls")
    train("pooled", tmp_path / "run", max_steps=1, teacher=StoredTeacher(tmp_path / "store"), pooling="mean")


def test_a_run_without_a_teacher_needs_no_store(tmp_path):
    """As the students alone, to which a distilled one is compared."""
    alone = train("classification", tmp_path / "run", max_steps=1, store=tmp_path / "none", teacher=None, kd_weight=0.0,
                  hidden_weight=0.0, cosine_weight=0.0, embedding_weight=0.0, task_weight=1.0)  # fmt: skip
    assert alone.teacher is None and not (tmp_path / "none").exists()


def test_examples_without_an_answer_are_counted_before_training(tmp_path):
    train("classification", tmp_path / "run", max_steps=1, store=tmp_path / "store")
    student, more = families.build("bert", 2, seed=1), text_rows(15)
    args = arguments(tmp_path / "run", kd_weight=0.5)
    trainer = DistillationTrainer(student, args, collate, more, teacher=StoredTeacher(tmp_path / "store"))
    with pytest.raises(ValueError, match=r"has no answers to 3 of 15 training examples \(such as example_id 12\)"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_epochs_of_a_run(tmp_path):
    """12 rows in batches of 5: three an epoch, or two where the last one is dropped."""

    def epochs(**options):
        args = arguments(tmp_path / "run", teacher_store=str(tmp_path / "store"), per_device_train_batch_size=5, **options)
        trainer = DistillationTrainer(
            families.build("bert", 1, seed=1), args, collate, text_rows(), teacher=families.build("bert", 1, seed=2)
        )
        trainer.train()
        return trainer._epochs_of_run(), trainer.state.epoch

    for options, expected in ((dict(max_steps=4), 2), (dict(max_steps=4, dataloader_drop_last=True), 2), (dict(max_steps=3), 1)):
        counted, run = epochs(**options, gradient_accumulation_steps=1)
        assert counted == expected and counted - 1 < run <= counted
    assert epochs(max_steps=3, dataloader_drop_last=True, gradient_accumulation_steps=1) == (2, 1.5)


def test_options_without_effect_are_refused(tmp_path):
    train("classification", tmp_path / "run", max_steps=1, store=tmp_path / "store")
    options = dict(teacher_dtype="bfloat16", teacher_compile=True, teacher_device="cpu", teacher_batch_size=2)
    for name, value in options.items():
        with pytest.raises(ValueError, match=f"{name}={value!r} would not be used, because the teacher is stored"):
            train("classification", tmp_path / "run", teacher=StoredTeacher(tmp_path / "store"), **{name: value})
    for name, value in dict(teacher_store_logits="top_k", teacher_store_top_k=3, teacher_store_dtype="float32").items():
        for teacher, why in ((True, "nothing is stored without teacher_store"), (StoredTeacher(tmp_path / "store"), "is stored already")):
            args = arguments(tmp_path / "run", kd_weight=0.5, **{name: value})
            live = families.build("bert", 1, seed=2) if teacher is True else teacher
            with pytest.raises(ValueError, match=f"{name}={value!r} would not be used, because .*{why}"):
                DistillationTrainer(families.build("bert", 1, seed=1), args, collate, text_rows(), teacher=live)
    args = arguments(tmp_path / "run", kd_weight=0.5, teacher_store=str(tmp_path / "store"))
    searching = DistillationTrainer(None, args, collate, text_rows(), teacher=families.build("bert", 2, seed=2),
                                    model_init=lambda: families.build("bert", 1, seed=1))  # fmt: skip
    with pytest.raises(ValueError, match="hyperparameter_search with teacher_store: trials ask other questions"):
        searching.hyperparameter_search(n_trials=1)


def test_stages_with_one_store_are_refused_before_training(tmp_path):
    student, teacher = families.build("bert", 1, seed=1), families.build("bert", 2, seed=2)
    args = arguments(tmp_path / "run", teacher_store=str(tmp_path / "store"), max_steps=1)

    def trainer_for(model, args, rows, teacher):
        return DistillationTrainer(model, args, collate, rows, teacher=teacher)

    def go(*stores):
        weights = ({"hidden_weight": 1.0}, {"kd_weight": 1.0}, {"task_weight": 1.0})
        stages = [{"name": f"s{i}", **weight, **store} for i, (weight, store) in enumerate(zip(weights, stores))]
        return hfdistill.train_stages(
            stages, student, args, datasets={"train": text_rows()}, teachers={"teacher": teacher}, trainer_for=trainer_for
        )

    with pytest.raises(ValueError, match="stages 's0' and 's1' would store their teachers in one folder"):
        go({}, {}, {})
    assert not (tmp_path / "store").exists()
    go({}, {"teacher_store": str(tmp_path / "other")}, {})
    assert TeacherStore(tmp_path / "store").complete and TeacherStore(tmp_path / "other").complete


def test_auto_precision_is_that_of_the_store(tmp_path, monkeypatch):
    from hfdistill import teacher_setup

    train("classification", tmp_path / "run", max_steps=1, store=tmp_path / "store", teacher_dtype="bfloat16")
    monkeypatch.setattr(teacher_setup, "compare_speed", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(teacher_setup, "half_precision_excluded", lambda _: None)
    train("classification", tmp_path / "run", max_steps=1, store=tmp_path / "store", teacher_dtype="auto")


def test_few_stored_epochs_are_repeated(tmp_path, caplog):
    trainer = train("masked_lm", tmp_path / "run", store=tmp_path / "store", teacher_store_epochs=1)
    assert "stored for 1 of 2 epochs, and inputs change" in caplog.text
    caplog.clear()
    again = train("masked_lm", tmp_path / "run", teacher=StoredTeacher(tmp_path / "store"))
    assert "stored for 1 of 2 epochs, and inputs change" in caplog.text
    assert_same_run(again, trainer)
    assert trainer.teacher.store.manifest.epochs == 1 and len(trainer.teacher.store) == 12
    assert trainer.state.epoch > 1 and trainer.data_collator.epoch == 0
    assert trainer.teacher.store.manifest.changes
    trainer._store_epochs = 2
    assert [trainer.data_epoch(epoch) for epoch in range(4)] == [0, 1, 0, 1]


def test_a_longer_run_adds_the_epochs_that_are_missing(tmp_path):
    train("masked_lm", tmp_path / "run", store=tmp_path / "store", max_steps=3)
    assert len(TeacherStore(tmp_path / "store")) == 12
    longer = train("masked_lm", tmp_path / "run", store=tmp_path / "store")
    assert len(longer.teacher.store) == 24
    assert_same_run(longer, train("masked_lm", tmp_path / "run"))


def test_half_precision_is_close(tmp_path):
    live = train("masked_lm", tmp_path / "run")
    for dtype, tolerance in (("float16", 2e-3), ("bfloat16", 1e-2)):
        stored = train("masked_lm", tmp_path / "run", store=tmp_path / dtype, teacher_store_dtype=dtype)
        assert losses(stored) == pytest.approx(losses(live), rel=tolerance)


def test_random_states_are_left_alone(tmp_path):
    """Dropout of the student draws the same with and without storing."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    student, teacher = families.build("bert", 1, seed=1), families.build("bert", 2, seed=2)
    args = arguments(tmp_path / "run", teacher_store=str(tmp_path / "store"))
    trainer = DistillationTrainer(student, args, collate, text_rows(), teacher=teacher)
    torch.manual_seed(1)
    trainer.store_teacher()
    assert torch.equal(torch.rand(3), expected)


def test_evaluation_with_the_teacher_keeps_it(tmp_path):
    student, teacher = families.build("bert", 1, seed=1), families.build("bert", 2, seed=2)
    held_out, plain_args = text_rows(6, seed=9), arguments(tmp_path / "run", eval_with_teacher=True)
    args = arguments(tmp_path / "run", teacher_store=str(tmp_path / "store"), eval_with_teacher=True)
    trainer = DistillationTrainer(student, args, collate, text_rows(), held_out, teacher=teacher)
    trainer.train()
    assert trainer.teacher.live is not None
    plain = DistillationTrainer(student, plain_args, collate, None, held_out, teacher=teacher)
    assert trainer.evaluate()["eval_kd"] == pytest.approx(plain.evaluate()["eval_kd"], rel=1e-5)
    with pytest.raises(ValueError, match="eval_with_teacher=True asks the teacher about evaluation data, but only its answers to training"):
        DistillationTrainer(student, plain_args, collate, text_rows(), teacher=StoredTeacher(tmp_path / "store"))


def test_a_store_without_a_teacher(tmp_path):
    """`teacher_store` alone is enough, and shapes, names and widths come from the folder."""
    train("classification", tmp_path / "run", max_steps=1, store=tmp_path / "store")
    alone = train("classification", tmp_path / "run", max_steps=1, store=tmp_path / "store", teacher=None)
    assert isinstance(alone.teacher, StoredTeacher)
    assert [type(adapter).__name__ for adapter in alone.objective.terms["hidden"].adapters] == ["Linear", "Linear"]
    alone.create_model_card()
    with pytest.raises(ValueError, match=r"has no hidden_states 2, only logits, embeddings, hidden_states\.1, hidden_states\.3"):
        train("classification", tmp_path / "run", max_steps=1, store=tmp_path / "store", teacher=None, layer_map="0:2,1:3")


def test_columns_of_the_teacher_reach_it(tmp_path):
    """A DistilBERT student does not name token_type_ids, which its BERT teacher reads: they are kept and hashed."""
    rows = text_rows().map(lambda row: {"token_type_ids": [0, *[1] * (len(row["input_ids"]) - 1)]})
    student, teacher = families.build("distilbert", 1, seed=1), families.build("bert", 2, seed=2)
    args = arguments(tmp_path / "run", teacher_store=str(tmp_path / "store"))
    trainer = DistillationTrainer(student, args, collate, rows, teacher=teacher)
    trainer.train()
    assert trainer.teacher.store.manifest.inputs == ["input_ids", "token_type_ids"]
    changed = rows.map(lambda row: {"token_type_ids": [0] * len(row["input_ids"])})
    student = families.build("distilbert", 1, seed=1)
    trainer = DistillationTrainer(student, arguments(tmp_path / "run"), collate, changed, teacher=StoredTeacher(tmp_path / "store"))
    with pytest.raises(ValueError, match=r"example_id \d+ \(epoch 0\) .* was given to other inputs \(input_ids, token_type_ids"):
        trainer.train()


CHANGES = {
    "weights": (dict(seed=9), {}, r"teacher\.weights: stored '\w{16}', now '\w{16}'"),
    "dropout": (dict(hidden_dropout_prob=0.3), {}, r"teacher\.config\.hidden_dropout_prob: stored 0\.1, now 0\.3"),
    "dtype of the teacher": ({}, dict(teacher_dtype="bfloat16"), r"teacher\.dtype: stored 'float32', now 'bfloat16'"),
    "dtype of the store": ({}, dict(teacher_store_dtype="float32"), r"stored\.dtype: stored 'float16', now 'float32'"),
    "signals": ({}, dict(hidden_weight=1.0), r"stored\.signals: stored \['logits'\], now \['hidden_states\.1', 'logits'\]"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_teacher_or_setting_is_refused(change, tmp_path):
    model, options, message = CHANGES[change]

    def go(model, options, rows=12):
        teacher = families.build("bert", 2, **{"seed": 2, **model})
        args = arguments(tmp_path / "run", teacher_store=str(tmp_path / "store"), **options)
        trainer = DistillationTrainer(families.build("bert", 1, seed=1), args, collate, text_rows(rows), teacher=teacher)
        trainer.train()

    go({}, {})
    with pytest.raises(ValueError, match="answers other questions than this run asks .*" + message + r".*Choose another teacher_store"):
        go(model, options)
    with pytest.raises(ValueError, match="examples: stored 12, now 13"):
        go({}, {}, rows=13)


def test_another_collator_or_library_is_refused(tmp_path, monkeypatch):
    train("masked_lm", tmp_path / "run", max_steps=1, store=tmp_path / "store")
    student, teacher, rows, options, more = RUNS["masked_lm"]()
    other = stored_runs.MaskingCollator(stored_runs.tokenizer(), 0.3, seed=4)
    monkeypatch.setitem(RUNS, "seed", lambda: (student, teacher, rows, options, {"data_collator": other}))
    for given in (True, StoredTeacher(tmp_path / "store")):
        with pytest.raises(ValueError, match=r"collator\.seed: stored 3, now 4"):
            train("seed", tmp_path / "run", max_steps=1, store=tmp_path / "store", teacher=given)
    monkeypatch.setattr("hfdistill.teachers.fingerprints.importlib.metadata.version", lambda name: "4.1.0")
    with pytest.raises(ValueError, match=r"versions\.torch: stored '\d+\.\d+', now '4\.1'"):
        train("masked_lm", tmp_path / "run", max_steps=1, store=tmp_path / "store")
    train(
        "masked_lm", tmp_path / "run", max_steps=1, teacher=StoredTeacher(tmp_path / "store")
    )  # there is no model that would answer otherwise


def test_a_seed_matters_only_where_something_is_drawn(tmp_path):
    """Three seeds of a recipe share one store, unless images are augmented; then `{seed}` in the name keeps them apart."""
    for seed in (3, 4):
        train("maps", tmp_path / "run", max_steps=1, store=tmp_path / "store", seed=seed, collator_seed=seed)
    with pytest.raises(ValueError, match=r"collator\.seed: stored 3, now 4"):
        for seed in (3, 4):
            train("augmented_maps", tmp_path / "run", max_steps=1, store=tmp_path / "one", seed=seed, collator_seed=seed)
    for seed in (3, 4):
        train("augmented_maps", tmp_path / "run", max_steps=1, store=tmp_path / "own_{seed}", seed=seed, collator_seed=seed)
    assert (tmp_path / "own_3/manifest.json").is_file() and (tmp_path / "own_4/manifest.json").is_file()


def test_other_data_under_the_same_numbers_are_refused(tmp_path):
    """Reordered rows whose numbers are their positions: nothing but the hash can tell."""
    train("classification", tmp_path / "run", max_steps=1, store=tmp_path / "store")
    rows = text_rows().select(range(11, -1, -1))
    student = families.build("bert", 2, seed=1)
    options = dict(kd_weight=0.5)
    trainer = DistillationTrainer(student, arguments(tmp_path / "run", **options), collate, rows, teacher=StoredTeacher(tmp_path / "store"))
    with pytest.raises(ValueError, match="was given to other inputs .* than this batch has: the data, their order"):
        trainer.train()


def random_collate(rows):
    batch = collate(rows)
    batch["input_ids"] = torch.where(torch.rand(batch["input_ids"].shape) < 0.3, 5, batch["input_ids"])
    return batch


def test_inputs_that_cannot_be_made_again_are_refused(tmp_path):
    def go(collator=collate, rows=None, teacher=None, **options):
        student = families.build("bert", 1, seed=1)
        teacher = teacher or families.build("bert", 2, seed=2)
        args = arguments(tmp_path / "run", teacher_store=str(tmp_path / "store"), **options)
        DistillationTrainer(student, args, collator, rows or text_rows(), teacher=teacher).train()

    with pytest.raises(ValueError, match="random_collate .* makes other inputs each time it gets the same rows: it draws without a seed"):
        go(random_collate)
    with pytest.raises(ValueError, match="depends on the other rows of its batch"):
        go(lambda rows: {**(batch := collate(rows)), "input_ids": batch["input_ids"] + batch["attention_mask"] * (len(rows) % 3)})
    with pytest.raises(ValueError, match="has no column 'example_id', only .*dataset.add_column"):
        go(rows=ragged("bert"))
    with pytest.raises(ValueError, match="is a stream, in which no example is known again"):
        go(rows=text_rows().to_iterable_dataset())
    with pytest.raises(ValueError, match="keeps the answers of a model, but the teacher is a function"):
        go(teacher=lambda batch: torch.zeros(len(batch["labels"]), 3))
    with pytest.raises(ValueError, match="attention_scores of a teacher are not stored.*393 kB"):
        go(attention_weight=1.0)
    assert not (tmp_path / "store").exists()


def test_mixed_images_are_refused(tmp_path):
    student, teacher, rows, _, more = RUNS["maps"]()
    mixing = stored_runs.ImageCollator(more["data_collator"].image_processor, mixup_alpha=0.8, num_labels=3)
    args = arguments(tmp_path / "run", teacher_store=str(tmp_path / "store"))
    with pytest.raises(ValueError, match="mixup and cutmix make images of a whole batch"):
        DistillationTrainer(student, args, mixing, rows, teacher=teacher, objective=[Term("soft_targets")])


def test_top_k_needs_one_temperature_and_soft_targets(tmp_path, monkeypatch):
    def go(**changes):
        return train("top_k_masked_lm", tmp_path / "run", max_steps=1, store=tmp_path / "store", **changes)

    with pytest.raises(ValueError, match="temperature of the term 'kd' changes in training"):
        go(schedules={"temperature": {"type": "linear", "start": 4.0, "end": 1.0}})
    with pytest.raises(ValueError, match="'logit_mse' needs all logits of the teacher"):
        go(logit_mse_weight=1.0)
    go()
    with pytest.raises(ValueError, match=r"stored\.temperature: stored 2\.0, now 3\.0"):
        go(temperature=3.0)
    with pytest.raises(ValueError, match="mass outside the stored top k is that at temperature 2, but the terms have 3"):
        go(temperature=3.0, teacher=StoredTeacher(tmp_path / "store"))


def test_classes_that_the_student_lacks_are_not_stored(tmp_path, monkeypatch):
    """A vocabulary padded to a multiple of 8 in the teacher alone: classes beyond the student's are no outcome of either."""
    student, _, rows, options, more = RUNS["top_k_masked_lm"]()
    size = len(stored_runs.tokenizer())
    padded = families.build("bert", 2, seed=2, head="MaskedLM", vocab_size=size + 6)
    with torch.no_grad():
        padded.cls.predictions.bias[size:] = 5.0
    more |= dict(processing_class=stored_runs.tokenizer(), teacher_processing_class=stored_runs.tokenizer())
    monkeypatch.setitem(RUNS, "padded", lambda: (copy.deepcopy(student), padded, rows, options, more))
    live = train("padded", tmp_path / "run")
    assert live.objective.vocabulary == size
    assert_same_run(train("padded", tmp_path / "run", store=tmp_path / "store"), live)
    assert_same_run(train("padded", tmp_path / "run", teacher=StoredTeacher(tmp_path / "store")), live)
    larger = families.build("bert", 1, seed=1, head="MaskedLM", vocab_size=size + 6)
    monkeypatch.setitem(RUNS, "padded", lambda: (larger, padded, rows, options, more))
    with pytest.raises(ValueError, match=rf"has the largest of {size} classes, but student and teacher share {size + 6}"):
        train("padded", tmp_path / "run", max_steps=1, teacher=StoredTeacher(tmp_path / "store"))


def test_the_lost_mass_is_printed_and_no_tail_is_named_biased(tmp_path, capsys, caplog):
    train("top_k_masked_lm", tmp_path / "run", max_steps=1, store=tmp_path / "a", teacher_store_top_k=4)
    assert "Probability outside the top 4 at temperature 2: mean 0." in capsys.readouterr().out
    assert "biased" not in caplog.text
    train(
        "top_k_masked_lm",
        tmp_path / "run",
        max_steps=1,
        store=tmp_path / "b",
        teacher_store_top_k=4,
        teacher_store_logits="top_k_without_tail",
    )
    assert "teacher_store_logits=top_k_without_tail is biased" in caplog.text


@pytest.mark.slow
def test_the_script_stores_what_the_recipe_asks(tmp_path, monkeypatch):
    """Then the recipe trains its students, of two seeds, without asking the teacher."""
    config = {
        "output_dir": str(tmp_path / "run"), "teacher_store": str(tmp_path / "store"), "seeds": [0, 1], "baselines": False,
        "max_train_samples": 60, "max_eval_samples": 20, "max_steps": 2, "teacher_training": {"max_steps": 2}, "use_cpu": True,
        "teacher_config": {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16},
        "student_layers": 1, "allow_weak_teacher": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    flags = ["--config", str(tmp_path / "config.yaml")]
    script = hfdistill.load_recipe(Path(__file__).parents[1] / "scripts/store_teacher.py")
    stores = script.main(["text_classification", *flags])
    stored = stores[1]
    assert stores.keys() == {0, 1} and stored.complete and list(stored.columns) == ["logits"]
    assert not list((tmp_path / "run/_arms").glob("distilled*"))
    monkeypatch.setattr("hfdistill.teachers.store_writing.write_shard", lambda *_: pytest.fail("the teacher was asked again"))
    recipe = hfdistill.load_recipe(Path(__file__).parents[1] / "recipes/text_classification.py")
    assert recipe.main(*hfdistill.parse(recipe.ARGUMENTS, flags))["seeds"] == [0, 1]
    with pytest.raises(ValueError, match="There is no folder to write to. Pass --teacher_store"):
        script.main(["text_classification", "--output_dir", str(tmp_path)])


def test_the_script_refuses_what_it_cannot_store(tmp_path):
    script = hfdistill.load_recipe(Path(__file__).parents[1] / "scripts/store_teacher.py")
    with pytest.raises(ValueError, match="The recipe tinybert trains in stages, each with its own teacher"):
        script.main(["tinybert", "--output_dir", str(tmp_path), "--teacher_store", str(tmp_path / "store")])
    flags = ["--output_dir", str(tmp_path), "--teacher_store", str(tmp_path / "{seed}"), "--push_store_to_hub", "ana/one"]
    with pytest.raises(ValueError, match="is a folder for each of 3 seeds, and 'ana/one' one data set. Write {seed} in its name too"):
        script.main(["text_classification", *flags])


@pytest.mark.slow
def test_two_processes_write_and_train_what_one_does(tmp_path):
    worker = Path(__file__).with_name("two_processes_store.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{worker.parent}{os.pathsep}{worker.parent.parent}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(worker), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("classification", "masked_lm"):
        names = sorted(path.name[: len("part-0000-000000")] for path in (tmp_path / name / "data").glob("*"))
        assert names == ["part-0000-000000", "part-0001-000000"]
        one = train(name, tmp_path / "run", store=tmp_path / "one" / name)
        both, single = TeacherStore(tmp_path / name), one.teacher.store
        assert len(both) == len(single) and both.complete
        for rank in (0, 1):
            state = torch.load(tmp_path / f"{name}_{rank}.pt", weights_only=True)
            for key, tensor in one.model.state_dict().items():
                torch.testing.assert_close(state[key], tensor, rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")
