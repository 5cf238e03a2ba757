"""Images under the trainer: two preparations of one image, mixing, the warning about statistics, and milestones of the learning rate."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import vision_families as vision
from datasets import Dataset
from PIL import Image
from torch.nn.functional import cross_entropy
from training import Rows, arguments, run
from transformers import ViTImageProcessorPil

from hfdistill import DistillationTrainer, ImageCollator, Term


def processor(size=32, mean=0.5, std=0.5):
    return ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=[mean] * 3, image_std=[std] * 3)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)) for _ in range(8)]
    return Dataset.from_dict({"image": pictures, "label": [i % 3 for i in range(8)], "example_id": list(range(8))})


def trained(images, tmp_path, collator, objective, teacher=None, **options):
    student = vision.build("vit", 1, seed=1)
    teacher = vision.build("vit", 2, seed=2) if teacher is None else teacher
    options = {"processing_class": collator.image_processor, "data_collator": collator, **options}
    return run(student, teacher, images, arguments(tmp_path), objective=objective, **options)[0]


def test_each_model_gets_its_own_preparation(images, tmp_path):
    """The teacher reads 64 pixels with its own mean and deviation, the student 32: logits of both by hand."""
    teacher = vision.build("vit", 2, seed=2, image_size=64)
    ours, theirs = processor(), processor(64, 0.3, 0.2)
    trainer = trained(images, tmp_path, ImageCollator(ours, theirs), [Term("logit_mse")], teacher=teacher)
    fresh, pictures = vision.build("vit", 1, seed=1), images["image"][:]
    with torch.no_grad():
        s = fresh(**ours(pictures, return_tensors="pt")).logits
        t = teacher(**theirs(pictures, return_tensors="pt")).logits
    assert trainer.state.log_history[0]["logit_mse"] == pytest.approx((s - t).square().mean().item(), rel=1e-4)


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "prepared otherwise" in record.getMessage()]


def test_other_statistics_are_warned_of_once_and_only_where_nothing_was_said(images, tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="hfdistill")
    ours, theirs = processor(), processor(32, 0.3, 0.2)

    def build(collator, **options):
        caplog.clear()
        DistillationTrainer(
            vision.build("vit", 1),
            arguments(tmp_path),
            teacher=vision.build("vit", 2),
            train_dataset=images,
            data_collator=collator,
            processing_class=ours,
            **options,
        )
        return warnings_of(caplog)

    (message,) = build(ImageCollator(ours), teacher_processing_class=theirs)
    assert "mean" in message and "0.3" in message and "std" in message and "size" not in message
    assert build(ImageCollator(ours, theirs), teacher_processing_class=theirs) == []
    assert build(ImageCollator(ours), teacher_processing_class=processor()) == []
    assert build(ImageCollator(ours)) == []


def test_the_processor_beside_a_teacher_given_by_name_is_looked_at(images, tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="hfdistill")
    vision.build("vit", 2).save_pretrained(tmp_path / "teacher")
    processor(32, 0.1).save_pretrained(tmp_path / "teacher")
    ours = processor()
    trainer = DistillationTrainer(
        vision.build("vit", 1),
        arguments(tmp_path),
        teacher=str(tmp_path / "teacher"),
        train_dataset=images,
        data_collator=ImageCollator(ours),
        processing_class=ours,
    )
    assert len(warnings_of(caplog)) == 1 and tuple(trainer.teacher_processing_class.image_mean) == (0.1,) * 3


def test_mixed_images_have_soft_labels(images, tmp_path):
    """The logged task loss is the cross entropy with the shares of the collator's own batch."""
    collator = ImageCollator(processor(), mixup_alpha=1.0, num_labels=3, seed=5)
    trainer = trained(images, tmp_path, collator, [Term("task"), Term("soft_targets")])
    collator.set_epoch(0)
    batch = collator.for_training()([images[i] for i in range(8)])
    assert (batch["soft_labels"].sum(1) - 1).abs().max() < 1e-6 and (batch["soft_labels"].max(1).values < 1).any()
    with torch.no_grad():
        logits = vision.build("vit", 1, seed=1)(pixel_values=batch["pixel_values"]).logits
    assert trainer.state.log_history[0]["task"] == pytest.approx(cross_entropy(logits, batch["soft_labels"]).item(), rel=1e-5)
    # Evaluation sees the images as they are.
    plain = trainer.predict(images).metrics["test_loss"]
    with torch.no_grad():
        logits = trainer.model.eval()(**processor()(images["image"][:], return_tensors="pt")).logits
    assert plain == pytest.approx(cross_entropy(logits, torch.tensor(images["label"][:])).item(), rel=1e-5)


def test_rows_without_a_label_stay_without_one_when_mixed(images, tmp_path):
    hidden = images.remove_columns("label").add_column("label", [0, -100, 2, -100, 1, -100, 0, -100])
    collator = ImageCollator(processor(), cutmix_alpha=1.0, num_labels=3)
    trainer = trained(hidden, tmp_path, collator, [Term("task"), Term("soft_targets")])
    assert np.isfinite(trainer.state.log_history[0]["task"])
    batch = collator.for_training()([hidden[i] for i in range(8)])
    assert (batch["soft_labels"][batch["labels"] == -100] == 0).all() and (batch["labels"] == -100).sum() == 4


def test_losses_that_need_one_class_refuse_mixed_images(images, tmp_path):
    collator = ImageCollator(processor(), mixup_alpha=1.0, num_labels=3)
    with pytest.raises(ValueError, match="needs one class for each row, but mixup and cutmix mix them. Turn mixing off"):
        trained(images, tmp_path, collator, [Term("task"), Term("decoupled")])


def test_augmentation_is_that_of_the_epoch_and_of_training_alone(images, tmp_path):
    collator = ImageCollator(processor(), augmentation={"shift": 0.3}, seed=1)
    trainer = trained(images, tmp_path, collator, [Term("task")])
    loader = trainer.get_train_dataloader()
    first = next(iter(loader))["pixel_values"]
    collator.set_epoch(1)
    second = next(iter(loader))["pixel_values"]
    collator.set_epoch(0)
    again = next(iter(loader))["pixel_values"]
    plain = next(iter(trainer.get_eval_dataloader(images)))["pixel_values"]
    assert torch.equal(first, again) and not torch.equal(first, second) and not torch.equal(first, plain)
    assert torch.equal(plain, processor()(images["image"][:], return_tensors="pt")["pixel_values"])


def test_resumed_in_the_middle_of_an_epoch_the_images_are_the_same(images, tmp_path):
    def go(folder, resume=None):
        collator = ImageCollator(processor(), augmentation={"shift": 0.3, "horizontal_flip": 0.5}, mixup_alpha=0.5, num_labels=3)
        student, teacher = vision.build("vit", 1, seed=1), vision.build("vit", 2, seed=2)
        args = arguments(
            folder, max_steps=6, per_device_train_batch_size=2, save_strategy="steps", save_steps=3, train_sampling_strategy="random"
        )
        options = {"data_collator": collator, "objective": [Term("task"), Term("soft_targets")], "resume": resume}
        return run(student, teacher, images, args, **options)[0]

    whole, resumed = go(tmp_path / "a"), go(tmp_path / "b", str(tmp_path / "a/checkpoint-3"))
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[key]), key


def test_milestones_of_the_learning_rate(tmp_path):
    """x 0.1 at a half and at three quarters of 8 steps, for adapters too; resumed, it goes on at the rate it had."""

    def go(folder, resume=None):
        args = arguments(
            folder, max_steps=8, learning_rate=1.0, learning_rate_milestones=[0.5, 0.75], save_strategy="steps", save_steps=5, optim="sgd",
            learning_rate_scales={"head": 0.5},
        )  # fmt: skip
        student, teacher = vision.build("vit", 1, seed=1), vision.build("vit", 2, seed=2)
        terms = [Term("task", weight=1e-4), Term("hint", weight=1e-4, layer_map="0:0")]
        return run(student, teacher, Rows(vision.batch(32, rows=8)), args, objective=terms, resume=resume)[0]

    trainer = go(tmp_path / "a")
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    expected = [1.0] * 4 + [0.1] * 2 + [0.01] * 2
    assert rates == pytest.approx(expected) or rates == pytest.approx([rate / 2 for rate in expected])
    assert {round(group["lr"] / trainer.optimizer.param_groups[0]["lr"], 6) for group in trainer.optimizer.param_groups} in (
        {1.0, 0.5}, {1.0, 2.0},
    )  # fmt: skip
    resumed = go(tmp_path / "b", str(tmp_path / "a/checkpoint-5"))
    assert [log["learning_rate"] for log in resumed.state.log_history if "learning_rate" in log] == pytest.approx(rates)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate_milestones": [150, 180]}, "must be shares of training between 0 and 1, .* epoch 150 of 240 as 0.625"),
        ({"learning_rate_milestones": [0.5, 0.25]}, "in rising order"),
        ({"learning_rate_milestones": [0.5], "warmup_steps": 10}, "warmup_steps=10 would not be used"),
        ({"learning_rate_milestones": [0.5], "learning_rate_gamma": 2.0}, "learning_rate_gamma must be between 0 and 1, got 2.0"),
    ],
)  # fmt: skip
def test_milestones_that_cannot_be_meant(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_the_card_names_the_milestones_that_were_used(tmp_path):
    args = arguments(tmp_path, learning_rate_milestones=[0.5])
    trainer = DistillationTrainer(vision.build("vit", 1), args, teacher=vision.build("vit", 2), train_dataset=Rows(vision.batch(32)))
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "learning_rate_milestones" in card and "lr_scheduler_type" not in card
    trainer = DistillationTrainer(
        vision.build("resnet"), arguments(tmp_path), teacher=vision.build("resnet"), objective=[Term("cosine", signal="features")]
    )  # without data: any size of image will do
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "learning_rate_milestones" not in card and "lr_scheduler_type" in card and "| features |" in card


def test_mixed_images_of_several_labels_are_refused(images, tmp_path):
    batch = vision.batch(32, rows=4)
    batch |= {"labels": torch.ones(4, 3), "soft_labels": torch.full((4, 3), 1 / 3)}
    student = vision.build("vit", 1, problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="Images are mixed, .* trained for multi_label_classification. Turn mixup and cutmix off"):
        run(student, None, Rows(batch), arguments(tmp_path), objective=[Term("task")])
