"""Batches of images: what each model gets of one image, that batches can be repeated, and mixing by its definition."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch
from datasets import concatenate_datasets
from PIL import Image
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    BitImageProcessorPil,
    ConvNextImageProcessorPil,
    DeiTImageProcessorPil,
    EfficientNetImageProcessorPil,
    MobileNetV2ImageProcessorPil,
    MobileViTImageProcessorPil,
    ViTImageProcessorPil,
)

from hfdistill.data.image_augmentation import ImageAugmentation
from hfdistill.data.image_collator import ImageCollator, Preparation, preparation_difference
from hfdistill.data.images import load_embedded_images


MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
AUGMENTATION = {"random_resized_crop": [0.3, 1.0], "horizontal_flip": 0.5, "color_jitter": 0.3}


def vit(size=16, **options):
    return ViTImageProcessorPil(size={"height": size, "width": size}, **options)


def photo(width=40, height=24, seed=0, mode="RGB") -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    return image.quantize(16) if mode == "P" else image.convert(mode)


def rows(count=6, labels=None, **options):
    labels = [i % 3 for i in range(count)] if labels is None else labels
    return [{"image": photo(40 - i, 24 + 2 * i, i, **options), "label": label, "example_id": 10 * i} for i, label in enumerate(labels)]


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- As at inference ----

PROCESSORS = {
    "vit": (vit(), 16),
    "convnext": (ConvNextImageProcessorPil(size={"shortest_edge": 20}), 20),
    "deit": (DeiTImageProcessorPil(size={"height": 24, "width": 24}, crop_size={"height": 18, "width": 18}), 18),
    "mobilenet": (MobileNetV2ImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 22, "width": 22}), 22),
    "bit": (BitImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}), 16),
    "efficientnet": (EfficientNetImageProcessorPil(size={"height": 20, "width": 20}), 20),
    "mobilevit": (MobileViTImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 24, "width": 24}), 24),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1"])
def test_evaluation_is_inference(name, mode, tmp_path):
    """What a user's `AutoImageProcessor` makes of each image by itself, in RGB, whatever its mode and shape."""
    processor, size = PROCESSORS[name]
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(processor)
    batch = ImageCollator(loaded, augmentation=AUGMENTATION, mixup_alpha=1.0, num_labels=3)(rows(mode=mode))
    assert sorted(batch) == ["example_id", "labels", "pixel_values"] and batch["pixel_values"].dtype == torch.float32
    for row, own in zip(rows(mode=mode), batch["pixel_values"]):
        expected = processor(row["image"].convert("RGB"), return_tensors="pt")["pixel_values"][0]
        assert own.shape == (3, size, size) and torch.equal(own, expected)
    assert batch["labels"].tolist() == [0, 1, 2, 0, 1, 2] and batch["labels"].dtype == torch.int64
    assert batch["example_id"].tolist() == [0, 10, 20, 30, 40, 50]


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_size_of_the_input_is_found(name):
    processor, size = PROCESSORS[name]
    assert Preparation(processor).size == (size, size) and Preparation(processor).mode == "RGB"


def test_usual_sizes_and_oblong_ones():
    assert Preparation(DeiTImageProcessorPil()).size == (224, 224)
    assert Preparation(ConvNextImageProcessorPil(size={"shortest_edge": 384})).size == (384, 384)
    assert Preparation(ViTImageProcessorPil(size={"height": 12, "width": 30})).size == (12, 30)
    assert Preparation(vit(do_resize=False)).size is None


def test_grey_processors_get_grey_images():
    processor = vit(image_mean=[0.5], image_std=[0.25])
    batch = ImageCollator(processor, augmentation=AUGMENTATION).for_training()(rows())
    assert batch["pixel_values"].shape == (6, 1, 16, 16)
    grey = np.asarray(photo().convert("L").resize((16, 16), Image.Resampling.BILINEAR), dtype=float) / 255
    assert np.abs(ImageCollator(processor)([{"image": photo()}])["pixel_values"][0, 0].numpy() - (grey - 0.5) / 0.25).max() < 1e-5
    # A grey image is grey for a colour model too, and both see it beside each other.
    both = ImageCollator(processor, vit())([{"image": photo(mode="L")}])
    assert both["pixel_values"].shape == (1, 1, 16, 16) and both["teacher_pixel_values"].shape == (1, 3, 16, 16)
    assert torch.equal(both["teacher_pixel_values"][0, 0], both["teacher_pixel_values"][0, 2])
    assert torch.allclose(both["pixel_values"][0, 0] * 0.25, both["teacher_pixel_values"][0, 0] * 0.5, atol=1e-6)


def test_rows_as_data_sets_store_them(tmp_path):
    path = tmp_path / "a.png"
    photo().save(path)
    collate = ImageCollator(vit(), image_column="photo", label_column="kind")
    stored = [photo(), str(path), np.asarray(photo()), {"bytes": path.read_bytes(), "path": None}, {"bytes": None, "path": str(path)}]
    batch = collate([{"photo": own, "kind": 1} for own in stored])
    assert all(torch.equal(own, batch["pixel_values"][0]) for own in batch["pixel_values"]) and batch["labels"].tolist() == [1] * 5
    assert "example_id" not in batch and "labels" not in collate([{"photo": photo()}])
    assert collate([{"photo": photo(), "labels": 2}])["labels"].tolist() == [2]
    assert collate([{"photo": photo(), "kind": label} for label in (None, -100, 0)])["labels"].tolist() == [-100, -100, 0]
    assert set(collate.columns) == {"photo", "kind", "example_id"}


# ---- Training: one augmented image, two preparations ----


def by_hand(image, size, mean, std, resample) -> np.ndarray:
    pixels = np.asarray(image.resize((size, size), resample), dtype=float) / 255
    return np.moveaxis((pixels - mean) / std, -1, 0)


def test_a_crop_is_brought_to_each_models_size_at_once():
    """DeiT's processor would cut its middle out, and ConvNeXT's would keep its proportions."""
    student, teacher = PROCESSORS["deit"][0], ConvNextImageProcessorPil(size={"shortest_edge": 20}, image_mean=MEAN, image_std=STD)
    collate = ImageCollator(student, teacher, augmentation=AUGMENTATION, seed=5).for_training()
    collate.set_epoch(2)
    batch = collate(rows())
    for i, row in enumerate(rows()):
        image = ImageAugmentation(**AUGMENTATION)(row["image"], 5, 2, row["example_id"])
        assert image.size != row["image"].size
        expected = by_hand(image, 18, [0.5] * 3, [0.5] * 3, Image.Resampling.BICUBIC)
        assert np.abs(batch["pixel_values"][i].numpy() - expected).max() < 1e-5
        expected = by_hand(image, 20, MEAN, STD, Image.Resampling.BICUBIC)
        assert np.abs(batch["teacher_pixel_values"][i].numpy() - expected).max() < 1e-5


def test_a_crop_is_brought_to_an_oblong_size():
    collate = ImageCollator(ViTImageProcessorPil(size={"height": 12, "width": 30}), augmentation={"random_resized_crop": [1.0, 1.0]})
    batch = collate.for_training()([{"image": photo(24, 24), "example_id": 0}])
    expected = np.asarray(photo(24, 24).resize((30, 12), Image.Resampling.BILINEAR), dtype=float) / 127.5 - 1
    assert np.abs(batch["pixel_values"][0].numpy() - np.moveaxis(expected, -1, 0)).max() < 1e-5


def test_both_models_see_the_same_image():
    """Without its own mean and deviation, the teacher's image is the student's."""
    for options in ({"augmentation": AUGMENTATION}, {"augmentation": {**AUGMENTATION, "random_erasing": 1.0}, "mixup_alpha": 1.0}, {}):
        collate = ImageCollator(vit(), vit(image_mean=MEAN, image_std=STD), num_labels=3, **options)
        for own in (collate, collate.for_training()):
            batch = own(rows())
            student = batch["pixel_values"] * 0.5 + 0.5
            teacher = batch["teacher_pixel_values"] * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
            assert torch.allclose(student, teacher, atol=1e-5)
            assert not torch.allclose(batch["pixel_values"], batch["teacher_pixel_values"], atol=0.1)


def test_without_a_random_crop_training_is_prepared_as_evaluation():
    """A flip changes nothing about what a processor has to do: it resizes and cuts as the models know it."""
    for processor, _ in PROCESSORS.values():
        batch = ImageCollator(processor, augmentation={"horizontal_flip": 1.0}).for_training()(rows())
        expected = ImageCollator(processor)([{**row, "image": row["image"].transpose(Image.Transpose.FLIP_LEFT_RIGHT)} for row in rows()])
        assert equal(batch, expected)
        assert equal(ImageCollator(processor).for_training()(rows()), ImageCollator(processor)(rows()))


def test_steps_of_odd_processors_are_kept():
    """MobileViT's reads colours backwards, EfficientNet's normalises twice: known to no one but themselves."""
    pad = {"random_resized_crop": [1.0, 1.0]}
    square = [{"image": photo(24, 24), "example_id": 0}]
    own = ImageCollator(PROCESSORS["mobilevit"][0], augmentation=pad).for_training()(square)["pixel_values"][0]
    assert np.abs(own.numpy() - np.moveaxis(np.asarray(photo(24, 24)), -1, 0)[::-1] / 255).max() < 1e-6
    processor = EfficientNetImageProcessorPil(size={"height": 24, "width": 24}, image_std=STD)
    own = ImageCollator(processor, augmentation=pad).for_training()(square)["pixel_values"][0]
    twice = by_hand(photo(24, 24), 24, [0.5] * 3, STD, Image.Resampling.BICUBIC) / np.array(STD)[:, None, None]
    assert np.abs(own.numpy() - twice).max() < 1e-4


def test_the_teacher_gets_the_students_images_where_they_are_prepared_alike():
    for teacher in (None, vit(), vit(do_convert_rgb=True), vit(image_mean=(0.5, 0.5, 0.5))):
        assert "teacher_pixel_values" not in ImageCollator(vit(), teacher)(rows())
    assert "teacher_pixel_values" in ImageCollator(vit(), vit(resample=3))(rows())


def test_evaluation_of_both_models_is_inference_too():
    teacher = PROCESSORS["mobilenet"][0]
    batch = ImageCollator(vit(), teacher, augmentation=AUGMENTATION)(rows())
    assert torch.equal(batch["teacher_pixel_values"], ImageCollator(teacher)(rows())["pixel_values"])


# ---- The same batch again ----


EVERYTHING = dict(augmentation={**AUGMENTATION, "rand_augment": [2, 9, 0.5, 0.5]}, mixup_alpha=0.8, cutmix_alpha=1.0, num_labels=10)


@pytest.fixture(scope="module")
def digits():
    data = load_embedded_images(20)
    return concatenate_datasets([data.labelled, data.transfer.select(range(20))])


def test_batches_are_the_same_for_any_number_of_workers(digits):
    def epochs(workers):
        collate = ImageCollator(vit(), vit(image_mean=MEAN), **EVERYTHING)
        loader = DataLoader(digits, 8, collate_fn=collate.for_training(), num_workers=workers, persistent_workers=workers > 0)
        found = []
        for epoch in (0, 1):
            collate.set_epoch(epoch)  # running workers hear of it
            random.seed(workers), np.random.seed(workers), torch.manual_seed(workers)
            found.append(list(loader))
        return found

    alone, two = epochs(0), epochs(2)
    for one, other in zip(alone, two, strict=True):
        assert len(one) == 5 and all(map(equal, one, other))
    assert not any(torch.equal(one["pixel_values"], other["pixel_values"]) for one, other in zip(*alone))


def test_a_resumed_run_sees_the_same_images():
    first = ImageCollator(vit(), **EVERYTHING)
    seen = []
    for epoch in range(3):
        first.set_epoch(epoch)
        seen.append(first.for_training()(rows()))
    resumed = copy.deepcopy(ImageCollator(vit(), **EVERYTHING).for_training())  # as it is sent to a worker
    resumed.set_epoch(2)
    assert resumed.epoch == 2 and equal(resumed(rows()), seen[2]) and not equal(seen[1], seen[2])
    assert not equal(ImageCollator(vit(), seed=1, **EVERYTHING).for_training()(rows()), seen[0])


def test_augmentation_of_an_image_does_not_depend_on_its_batch():
    collate = ImageCollator(vit(), augmentation=AUGMENTATION).for_training()
    whole = collate(rows())["pixel_values"]
    assert torch.equal(collate(rows()[4:] + rows()[:1])["pixel_values"], whole[[4, 5, 0]])


def test_random_states_of_the_process_are_left_alone():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    ImageCollator(vit(), **EVERYTHING).for_training()(rows())
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_there_is_one_collator_for_training():
    collate = ImageCollator(vit(), **EVERYTHING)
    training = collate.for_training()
    assert collate.for_training() is training is training.for_training() and training is not collate
    assert collate.mixes and training.mixes and training.columns == collate.columns
    training.set_epoch(4)
    assert collate.epoch == 4
    collate.set_epoch(7)
    assert training.epoch == 7
    assert not ImageCollator(vit()).mixes and not ImageCollator(vit(), mixup_alpha=1.0, mix_probability=0.0).mixes
    assert "soft_labels" not in collate(rows()) and "soft_labels" in training(rows())
    assert equal(collate(rows()), ImageCollator(vit())(rows()))


# ---- Mixing ----


def mixing(seed=0, teacher=None, **options):
    collate = ImageCollator(vit(), teacher or vit(32, image_mean=MEAN), num_labels=3, seed=seed, **options)
    return collate.for_training(), ImageCollator(vit(), teacher or vit(32, image_mean=MEAN))


LABELS = [0, 1, 2, 2, 1]  # backwards: 1, 2, 2, 1, 0


@pytest.mark.parametrize("seed", range(4))
def test_mixup_by_its_definition(seed):
    mix, plain = mixing(seed, mixup_alpha=1.0)
    batch, own = mix(rows(labels=LABELS)), plain(rows(labels=LABELS))
    kept = float(batch["soft_labels"][0, 0])
    assert 0 < kept < 1
    for name in ("pixel_values", "teacher_pixel_values"):
        for i in range(5):
            assert torch.allclose(batch[name][i], kept * own[name][i] + (1 - kept) * own[name][4 - i], atol=1e-5)
    for i in range(5):
        expected = [0.0] * 3
        expected[LABELS[i]] += kept
        expected[LABELS[4 - i]] += 1 - kept
        assert batch["soft_labels"][i].tolist() == pytest.approx(expected, abs=1e-6)
        assert int(batch["labels"][i]) == (LABELS[i] if kept >= 0.5 else LABELS[4 - i])


@pytest.mark.parametrize("seed", range(6))
def test_cutmix_by_its_definition(seed):
    """Every pixel comes from one of the two images; the box is the same part of it for both sizes; shares are areas."""
    mix, plain = mixing(seed, cutmix_alpha=1.0)
    batch, own = mix(rows(labels=LABELS)), plain(rows(labels=LABELS))
    foreign = {}
    for name in ("pixel_values", "teacher_pixel_values"):
        kept = (batch[name] == own[name]).all(1)
        from_partner = (batch[name] == own[name].flip(0)).all(1)
        assert (kept | from_partner).all()
        foreign[name] = ~kept[0]
        box = foreign[name].nonzero()
        if len(box):
            (top, left), (bottom, right) = box.min(0).values, box.max(0).values + 1
            assert foreign[name][top:bottom, left:right].all() and len(box) == (bottom - top) * (right - left)
        for other in (1, 3, 4):
            assert torch.equal(~kept[other], foreign[name])
    assert torch.equal(foreign["pixel_values"].repeat_interleave(2, 0).repeat_interleave(2, 1), foreign["teacher_pixel_values"])
    share = 1 - float(foreign["pixel_values"].float().mean())
    assert float(batch["soft_labels"][0, 0]) == pytest.approx(share, abs=1e-6)
    assert int(batch["labels"][0]) == (0 if share >= 0.5 else 1)


def shares_of(count=400, **options):
    """The share that the first image keeps, for as many batches."""
    mix, _ = mixing(teacher=vit(), **options)
    found = []
    for epoch in range(count):
        mix.set_epoch(epoch)
        found.append(mix([{**row, "image": Image.new("L", (16, 16), 255 * i)} for i, row in enumerate(rows(2, labels=[0, 1]))]))
    return np.array([float(batch["soft_labels"][0, 0]) for batch in found]), found


def test_shares_are_beta_distributed():
    shares, _ = shares_of(mixup_alpha=0.4)
    assert abs(shares.mean() - 0.5) < 0.06 and abs(shares.var() - 1 / (4 * (2 * 0.4 + 1))) < 0.015
    # With a centre anywhere, more than λ is left of what is cut off at the border.
    generator = np.random.default_rng(0)
    for alpha in (1.0, 8.0):
        shares, _ = shares_of(cutmix_alpha=alpha, mixup_alpha=0.0)
        side, centre = np.sqrt(1 - generator.beta(alpha, alpha, 20000)) / 2, generator.random((2, 20000))
        lengths = np.minimum(centre + side, 1) - np.maximum(centre - side, 0)
        expected = 1 - lengths[0] * lengths[1]
        assert abs(shares.mean() - expected.mean()) < 0.04 and abs(shares.std() - expected.std()) < 0.02


def test_each_batch_has_one_kind_of_mixing():
    """Of two flat images a cut shows as pixels of both kinds, a mix as pixels in between."""
    shares, batches = shares_of(mixup_alpha=1.0, cutmix_alpha=1.0)
    blended = np.array([(batch["pixel_values"][0].abs() < 0.999).any() for batch in batches])
    changed = shares < 0.999
    assert 0.4 < blended[changed].mean() < 0.6
    # Only one of them, or neither.
    for options, kind in (({"mixup_alpha": 1.0}, True), ({"cutmix_alpha": 1.0}, False)):
        _, own = shares_of(30, **options)
        assert {bool((batch["pixel_values"][0].abs() < 0.999).any()) for batch in own} == {kind}
    shares, _ = shares_of(mixup_alpha=1.0, mix_probability=0.25)
    assert 0.68 < (shares == 1.0).mean() < 0.82


def test_draws_of_a_batch_depend_on_its_rows_and_epoch():
    mix, _ = mixing(mixup_alpha=1.0)
    share = float(mix(rows(labels=LABELS))["soft_labels"][0, 0])
    assert float(mix(rows(labels=LABELS))["soft_labels"][0, 0]) == share
    other = [{**row, "example_id": row["example_id"] + 1} for row in rows(labels=LABELS)]
    assert float(mix(other)["soft_labels"][0, 0]) != share
    mix.set_epoch(1)
    assert float(mix(rows(labels=LABELS))["soft_labels"][0, 0]) != share


@pytest.mark.parametrize("options", [{"mixup_alpha": 1.0}, {"cutmix_alpha": 1.0}])
def test_rows_without_a_label_cost_no_label(options):
    """Rows with a label are mixed among themselves, the others among themselves."""
    labels = [0, -100, 1, -100, -100, 2]
    for seed in range(3):
        mix, plain = mixing(seed, **options)
        batch, own = mix(rows(labels=labels)), plain(rows(labels=labels))
        partner = [5, 4, 2, 3, 1, 0]
        kept = float(batch["soft_labels"][0, 0])
        for i, j in enumerate(partner):
            if labels[i] == -100:
                assert batch["soft_labels"][i].tolist() == [0, 0, 0] and batch["labels"][i] == -100
            else:
                expected = np.eye(3)[labels[i]] * kept + np.eye(3)[labels[j]] * (1 - kept)
                assert batch["soft_labels"][i].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
                assert int(batch["labels"][i]) == labels[i if kept >= 0.5 else j]
            for name in ("pixel_values", "teacher_pixel_values"):
                difference = own[name][j] - own[name][i]
                moved = batch[name][i] - own[name][i]
                assert torch.allclose(moved, (1 - kept) * difference, atol=1e-5) or bool(
                    ((moved == 0) | torch.isclose(moved, difference, atol=1e-6)).all() and options == {"cutmix_alpha": 1.0}
                )
    batch = mix(rows(labels=[-100] * 4))
    assert batch["labels"].tolist() == [-100] * 4 and not batch["soft_labels"].any()


def test_a_batch_of_one_and_batches_without_labels():
    for options in ({"mixup_alpha": 1.0}, {"cutmix_alpha": 1.0}):
        mix, plain = mixing(**options)
        batch = mix(rows(1, labels=[2]))
        assert torch.allclose(batch["pixel_values"], plain(rows(1, labels=[2]))["pixel_values"], atol=1e-6)
        assert batch["soft_labels"].tolist() == [[0, 0, 1]] and batch["labels"].tolist() == [2]
        unlabelled = mix([{name: row[name] for name in ("image", "example_id")} for row in rows()])
        assert unlabelled["labels"].tolist() == [-100] * 6 and not unlabelled["soft_labels"].any()


def test_soft_labels_sum_to_one():
    mix, _ = mixing(mixup_alpha=0.3, cutmix_alpha=0.7, mix_probability=0.7)
    for epoch in range(30):
        mix.set_epoch(epoch)
        batch = mix(rows(labels=[0, 1, 2, 0, -100, 1]))
        assert batch["soft_labels"].dtype == torch.float32 and batch["soft_labels"].shape == (6, 3)
        assert batch["soft_labels"].sum(1).tolist() == pytest.approx([1, 1, 1, 1, 0, 1], abs=1e-6)
        known = batch["labels"] != -100
        assert torch.allclose(
            batch["soft_labels"][known].gather(1, batch["labels"][known, None])[:, 0], batch["soft_labels"][known].max(1).values
        )


# ---- In what two processors differ ----


@pytest.mark.parametrize(
    "student,teacher,difference",
    [
        (vit(), vit(), None),
        (vit(), vit(do_convert_rgb=True), None),
        (vit(image_mean=0.5, image_std=0.5), vit(), None),
        (vit(image_mean=[0.485000001] * 3), vit(image_mean=[0.485] * 3), None),
        (
            vit(),
            vit(32, image_mean=MEAN, image_std=STD),
            {
                "size": ({"height": 16, "width": 16}, {"height": 32, "width": 32}),
                "mean": ((0.5,) * 3, tuple(MEAN)),
                "std": ((0.5,) * 3, tuple(STD)),
            },
        ),
        (vit(), vit(resample=3), {"resample": ("bilinear", "bicubic")}),
        (vit(), vit(rescale_factor=1 / 127.5), {"rescale": (round(1 / 255, 9), round(1 / 127.5, 9))}),
        (vit(), vit(do_rescale=False), {"rescale": (round(1 / 255, 9), None)}),
        (vit(), vit(do_normalize=False), {"mean": ((0.5,) * 3, None), "std": ((0.5,) * 3, None)}),
        (vit(do_normalize=False), vit(do_normalize=False, image_mean=MEAN), None),
        (vit(do_resize=False), vit(32, do_resize=False, resample=3), None),
        (
            DeiTImageProcessorPil(size={"height": 16, "width": 16}, resample=2),
            vit(),
            {"crop": ({"height": 224, "width": 224}, None)},
        ),
        (DeiTImageProcessorPil(size={"height": 16, "width": 16}, resample=2, do_center_crop=False), vit(), None),
        (PROCESSORS["mobilenet"][0], PROCESSORS["mobilenet"][0], None),
        (
            ConvNextImageProcessorPil(size={"shortest_edge": 20}),
            ConvNextImageProcessorPil(size={"shortest_edge": 20}, crop_pct=0.95),
            {"crop_pct": (0.875, 0.95)},
        ),
        (ConvNextImageProcessorPil(), ConvNextImageProcessorPil(crop_pct=0.95), None),  # 384: warped, not cut
        (vit(resample=3), EfficientNetImageProcessorPil(size={"height": 16, "width": 16}), {"include_top": (None, True)}),
    ],
)
def test_difference_of_processors(student, teacher, difference):
    assert preparation_difference(student, teacher) == difference
    backwards = None if difference is None else {name: (theirs, ours) for name, (ours, theirs) in difference.items()}
    assert preparation_difference(teacher, student) == backwards


# ---- Errors ----


@pytest.mark.parametrize(
    "options,message",
    [
        ({"mixup_alpha": -1}, "mixup_alpha must be at least 0, got -1"),
        ({"cutmix_alpha": float("nan")}, "cutmix_alpha must be at least 0, got nan"),
        ({"mix_probability": 1.5}, "mix_probability must be from 0 to 1, got 1.5"),
        ({"mixup_alpha": 0.8}, "Pass num_labels, the number of classes"),
        ({"augmentation": {"flip": 0.5}}, "augmentation: there is no 'flip'"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        ImageCollator(vit(), **options)


def test_processors_that_fix_no_size():
    with pytest.raises(ValueError, match=r"ViTImageProcessorPil leaves images as large as they are.*random_resized_crop cannot"):
        ImageCollator(vit(do_resize=False), augmentation=AUGMENTATION)
    with pytest.raises(ValueError, match="leaves images as large"):
        ImageCollator(vit(), vit(do_resize=False), augmentation=AUGMENTATION)
    alike = [{"image": photo(seed=i), "label": 0, "example_id": i} for i in range(2)]
    assert ImageCollator(vit(do_resize=False), augmentation={"pad_crop": 2}).for_training()(alike)["pixel_values"].shape == (2, 3, 24, 40)
    keeps_shape = BitImageProcessorPil(size={"shortest_edge": 16}, do_center_crop=False)
    with pytest.raises(
        ValueError, match=r"BitImageProcessorPil cannot make one batch of images of the sizes \[\(35, 34\), .*do_center_crop=T"
    ):
        ImageCollator(keeps_shape)(rows())


def test_rows_that_do_not_fit():
    collate = ImageCollator(vit(), augmentation=AUGMENTATION, num_labels=3)
    without = [{"image": photo(), "label": 0}]
    assert collate(without)["pixel_values"].shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"no column 'example_id', only \['image', 'label'\].*add_column"):
        collate.for_training()(without)
    assert ImageCollator(vit()).for_training()(without)["labels"].tolist() == [0]  # nothing is drawn
    with pytest.raises(ValueError, match=r"no column 'image', only \['label'\]. Pass image_column"):
        collate([{"label": 0}])
    with pytest.raises(ValueError, match="The label 3 is none of the 3 classes"):
        collate(rows(labels=[0, 3]))
    with pytest.raises(ValueError, match="The label -1 is no class"):
        ImageCollator(vit())(rows(labels=[0, -1]))
    with pytest.raises(ValueError, match="No image could be read from example_id 7"):
        collate([{"image": b"<html>", "label": 0, "example_id": 7}])
    with pytest.raises(ValueError, match="image of example_id 7 has mode 'I;16'"):
        collate([{"image": Image.fromarray(np.zeros((4, 4), np.uint16)), "label": 0, "example_id": 7}])


def test_shares_are_exact_on_the_students_grid():
    assert math.isclose(float(mixing(3, cutmix_alpha=1.0)[0](rows(labels=LABELS))["soft_labels"][0, 0]) * 256 % 1, 0, abs_tol=1e-3)
