"""Training from a stored teacher is training with the teacher, however batches are drawn; what would differ is refused."""

from __future__ import annotations

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

    train("classification", tmp_path / "run", store=tmp_path / "store")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    monkeypatch.setattr(store_writing, "write_shard", lambda *_: pytest.fail("written again"))
    train("classification", tmp_path / "run", store=tmp_path / "store")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == before


@pytest.mark.parametrize("name", ["classification", "masked_lm", "augmented_maps"])
def test_a_resumed_run_from_the_store_is_the_uninterrupted_one(name, tmp_path):
    whole = train(name, tmp_path / "run", store=tmp_path / "store", save_strategy="steps", save_steps=2)
    again = train(name, tmp_path / "run", store=tmp_path / "store", resume=str(tmp_path / "run/checkpoint-2"))
    assert again.state.global_step == 5
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[key]), key


def test_workers_make_the_same_batches(tmp_path):
    train("masked_lm", tmp_path / "run", store=tmp_path / "store")
    live = train("masked_lm", tmp_path / "run")
    stored = train("masked_lm", tmp_path / "run", store=tmp_path / "store", dataloader_num_workers=1)
    assert_same_run(stored, live)


def test_few_stored_epochs_are_repeated(tmp_path):
    trainer = train("masked_lm", tmp_path / "run", store=tmp_path / "store", teacher_store_epochs=1)
    assert trainer.teacher.store.manifest.epochs == 1 and len(trainer.teacher.store) == 12
    assert trainer.state.epoch > 1 and trainer.data_collator.epoch == 0
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
    train("classification", tmp_path / "run", store=tmp_path / "store")
    alone = train("classification", tmp_path / "run", store=tmp_path / "store", teacher=None)
    assert isinstance(alone.teacher, StoredTeacher)
    assert [type(adapter).__name__ for adapter in alone.objective.terms["hidden"].adapters] == ["Linear", "Linear"]
    alone.create_model_card()
    with pytest.raises(ValueError, match=r"has no hidden_states 2, only logits, embeddings, hidden_states\.1, hidden_states\.3"):
        train("classification", tmp_path / "run", store=tmp_path / "store", teacher=None, layer_map="0:2,1:3")


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
    train("masked_lm", tmp_path / "run", store=tmp_path / "store")
    student, teacher, rows, options, more = RUNS["masked_lm"]()
    other = stored_runs.MaskingCollator(stored_runs.tokenizer(), 0.3, seed=4)
    monkeypatch.setitem(RUNS, "seed", lambda: (student, teacher, rows, options, {"data_collator": other}))
    for given in (True, StoredTeacher(tmp_path / "store")):
        with pytest.raises(ValueError, match=r"collator\.seed: stored 3, now 4"):
            train("seed", tmp_path / "run", store=tmp_path / "store", teacher=given)
    monkeypatch.setattr("hfdistill.teachers.fingerprints.importlib.metadata.version", lambda name: "4.1.0")
    with pytest.raises(ValueError, match=r"versions\.torch: stored '\d+\.\d+', now '4\.1'"):
        train("masked_lm", tmp_path / "run", store=tmp_path / "store")
    train("masked_lm", tmp_path / "run", teacher=StoredTeacher(tmp_path / "store"))  # there is no model that would answer otherwise


def test_a_seed_matters_only_where_something_is_drawn(tmp_path):
    """Three seeds of a recipe share one store, unless images are augmented; then `{seed}` in the name keeps them apart."""
    for seed in (3, 4):
        train("maps", tmp_path / "run", store=tmp_path / "store", seed=seed, collator_seed=seed)
    with pytest.raises(ValueError, match=r"collator\.seed: stored 3, now 4"):
        for seed in (3, 4):
            train("augmented_maps", tmp_path / "run", store=tmp_path / "one", seed=seed, collator_seed=seed)
    for seed in (3, 4):
        train("augmented_maps", tmp_path / "run", store=tmp_path / "own_{seed}", seed=seed, collator_seed=seed)
    assert (tmp_path / "own_3/manifest.json").is_file() and (tmp_path / "own_4/manifest.json").is_file()


def test_other_data_under_the_same_numbers_are_refused(tmp_path):
    """Reordered rows whose numbers are their positions: nothing but the hash can tell."""
    train("classification", tmp_path / "run", store=tmp_path / "store")
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
        return train("top_k_masked_lm", tmp_path / "run", store=tmp_path / "store", **changes)

    with pytest.raises(ValueError, match="temperature of the term 'kd' changes in training"):
        go(schedules={"temperature": {"type": "linear", "start": 4.0, "end": 1.0}})
    with pytest.raises(ValueError, match="'logit_mse' needs all logits of the teacher"):
        go(logit_mse_weight=1.0)
    go()
    with pytest.raises(ValueError, match=r"stored\.temperature: stored 2\.0, now 3\.0"):
        go(temperature=3.0)
    with pytest.raises(ValueError, match="mass outside the stored top k is that at temperature 2, but the terms have 3"):
        go(temperature=3.0, teacher=StoredTeacher(tmp_path / "store"))


def test_the_lost_mass_is_printed_and_no_tail_is_named_biased(tmp_path, capsys, caplog):
    train("top_k_masked_lm", tmp_path / "run", store=tmp_path / "a", teacher_store_top_k=4)
    assert "Probability outside the top 4 at temperature 2: mean 0." in capsys.readouterr().out
    assert "biased" not in caplog.text
    train("top_k_masked_lm", tmp_path / "run", store=tmp_path / "b", teacher_store_top_k=4, teacher_store_logits="top_k_without_tail")
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
    stored = script.main(["text_classification", *flags])
    assert stored.complete and list(stored.columns) == ["logits"] and not list((tmp_path / "run/_arms").glob("distilled*"))
    monkeypatch.setattr("hfdistill.teachers.store_writing.write_shard", lambda *_: pytest.fail("the teacher was asked again"))
    recipe = hfdistill.load_recipe(Path(__file__).parents[1] / "recipes/text_classification.py")
    assert recipe.main(*hfdistill.parse(recipe.ARGUMENTS, flags))["seeds"] == [0, 1]
    with pytest.raises(ValueError, match="There is no folder to write to. Pass --teacher_store"):
        script.main(["text_classification", "--output_dir", str(tmp_path)])


@pytest.mark.slow
def test_two_processes_write_and_train_what_one_does(tmp_path):
    worker = Path(__file__).with_name("two_processes_store.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{worker.parent}{os.pathsep}{worker.parent.parent}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(worker), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("classification", "masked_lm"):
        names = sorted(path.name for path in (tmp_path / name / "data").glob("*"))
        assert names == ["part-0000-000000.arrow", "part-0001-000000.arrow"]
        one = train(name, tmp_path / "run", store=tmp_path / "one" / name)
        both, single = TeacherStore(tmp_path / name), one.teacher.store
        assert len(both) == len(single) and both.complete
        for rank in (0, 1):
            state = torch.load(tmp_path / f"{name}_{rank}.pt", weights_only=True)
            for key, tensor in one.model.state_dict().items():
                torch.testing.assert_close(state[key], tensor, rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")
