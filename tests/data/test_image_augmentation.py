"""Augmentation: what each option may do to an image, that it can be repeated, and what is no option."""

from __future__ import annotations

import copy
import importlib.util
import math
import pickle
import random
import sys
import types
from dataclasses import asdict

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy import ndimage

from hfdistill.data import image_augmentation as module_under_test
from hfdistill.data.image_augmentation import RAND_AUGMENT, ImageAugmentation, crop_box, resolve_augmentation


EVERYTHING = {
    "random_resized_crop": [0.3, 1.0],
    "pad_crop": 2,
    "shift": 0.1,
    "rotate": 15,
    "horizontal_flip": 0.5,
    "color_jitter": {"brightness": 0.4, "contrast": 0.3, "saturation": 0.2},
    "rand_augment": [2, 9, 0.5, 0.5],
    "random_erasing": 0.5,
}


def noise(height=24, width=40, channels=3, seed=0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def ramp(height=60, width=80, across=2, down=1) -> Image.Image:
    """Grey values that rise by `across` a pixel to the right and by `down` a pixel downwards."""
    return Image.fromarray(np.rint(across * np.arange(width)[None] + down * np.arange(height)[:, None]).astype(np.uint8))


def same(one, other) -> bool:
    return one.mode == other.mode and one.size == other.size and one.tobytes() == other.tobytes()


def changed(one, two) -> list[int]:
    return [place for place, (a, b) in enumerate(zip(one, two)) if a != b]


def draws(image, count=400, **options):
    """The image as `count` example ids get it."""
    augmentation = ImageAugmentation(**options)
    return [augmentation(image, seed=0, epoch=0, example_id=i) for i in range(count)]


def arrays(images) -> np.ndarray:
    return np.array([np.asarray(image) for image in images], dtype=float)


# ---- A function of seed, epoch and example ----


@pytest.mark.parametrize("options", [{name: value} for name, value in EVERYTHING.items()] + [EVERYTHING], ids=[*EVERYTHING, "everything"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_depends_on_seed_epoch_and_example_alone(options, channels):
    image, augmentation = noise(channels=channels), ImageAugmentation(**options)
    before = image.tobytes()
    keys = [(seed, epoch, example) for seed in range(3) for epoch in range(3) for example in range(3)]
    first = [augmentation(image, *key) for key in keys]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    again = [augmentation(image, *key) for key in reversed(keys)][::-1]
    assert all(map(same, first, again)) and image.tobytes() == before
    assert all(own.mode == image.mode for own in first)
    assert len({own.tobytes() for own in first}) > 1
    for place in range(3):  # each of the three numbers matters
        pairs = [(i, j) for i, one in enumerate(keys) for j, two in enumerate(keys) if changed(one, two) == [place]]
        assert not all(same(first[i], first[j]) for i, j in pairs)


def test_random_states_of_the_process_are_left_alone():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    draws(noise(), 20, **EVERYTHING)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_a_yaml_file_can_hold_it():
    augmentation = resolve_augmentation(yaml.safe_load(yaml.safe_dump(EVERYTHING)))
    assert augmentation == ImageAugmentation(**EVERYTHING) == resolve_augmentation(asdict(augmentation))
    assert resolve_augmentation(augmentation) is augmentation and hash(augmentation)
    assert copy.deepcopy(augmentation) == augmentation and pickle.dumps(augmentation)
    assert augmentation.color_jitter == (0.4, 0.3, 0.2) and augmentation.rand_augment == (2, 9.0, 0.5, 0.5)


def test_nothing_is_done_by_default():
    assert resolve_augmentation(None) is resolve_augmentation({}) is resolve_augmentation({"rotate": 0, "fill": 128}) is None
    image = noise()
    assert same(ImageAugmentation()(image, 0, 0, 0), image)
    for name, value in EVERYTHING.items():
        assert resolve_augmentation({name: value}).changes, name


# ---- Geometry ----


def test_boxes_have_the_share_and_ratio_of_the_paper():
    generator = np.random.default_rng(0)
    boxes = np.array([crop_box((400, 300), (0.1, 0.3), generator) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    width, height = right - left, bottom - top
    assert (left >= 0).all() and (top >= 0).all() and (right <= 400).all() and (bottom <= 300).all()
    share, logs = width * height / 120000, np.log(width / height)
    assert share.min() > 0.099 and share.max() < 0.301 and abs(share.mean() - 0.2) < 0.004
    assert np.exp(logs.min()) > 0.74 and np.exp(logs.max()) < 1.35 and abs(logs.mean()) < 0.01
    assert abs(logs.std() - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.005  # uniform in the logarithm
    for start, rest in ((left, 400 - width), (top, 300 - height)):
        place = start / rest
        assert place.min() < 0.01 and place.max() > 0.99 and abs(place.mean() - 0.5) < 0.02


@pytest.mark.parametrize(
    "size,box", [((100, 10), (43, 0, 56, 10)), ((10, 100), (0, 43, 10, 56)), ((1, 1), (0, 0, 1, 1)), ((9, 9), (0, 0, 9, 9))]
)
def test_where_no_box_fits_it_is_the_largest_in_the_middle(size, box):
    found = {crop_box(size, (1.0, 1.0), np.random.default_rng(seed)) for seed in range(20)}
    assert box in found and all(0 <= own[0] < own[2] <= size[0] and 0 <= own[1] < own[3] <= size[1] for own in found)


def test_boxes_lie_everywhere():
    """Boxes of 2 x 2 pixels in an image of 3 x 3 have four places."""
    found = [crop_box((3, 3), (4 / 9, 4 / 9), np.random.default_rng(seed)) for seed in range(400)]
    places = [own[:2] for own in found if (own[2] - own[0], own[3] - own[1]) == (2, 2)]
    assert len(places) > 300 and {80 < places.count(place) * 400 / len(places) < 120 for place in ((0, 0), (0, 1), (1, 0), (1, 1))} == {
        True
    }


def test_random_resized_crop_cuts_and_does_not_resize():
    image = noise()
    pixels = np.asarray(image)
    sizes = set()
    for crop in draws(image, 60, random_resized_crop=[0.2, 0.6]):
        own = np.asarray(crop)
        height, width = own.shape[:2]
        windows = np.lib.stride_tricks.sliding_window_view(pixels, (height, width), axis=(0, 1)).transpose(0, 1, 3, 4, 2)
        assert (windows == own).all((2, 3, 4)).sum() == 1
        sizes.add(crop.size)
    assert len(sizes) > 20


@pytest.mark.parametrize("channels", [1, 3])
def test_pad_crop_is_a_window_of_the_padded_image(channels):
    image, padding = noise(6, 9, channels), 2
    pixels = np.asarray(image).reshape(6, 9, channels)
    padded = np.pad(pixels, ((2, 2), (2, 2), (0, 0)), constant_values=77)
    windows = {padded[y : y + 6, x : x + 9].tobytes(): (y, x) for y in range(5) for x in range(5)}
    seen = [windows[own.tobytes()] for own in draws(image, 600, pad_crop=padding, fill=77)]
    counts = np.array([seen.count(place) for place in windows.values()])
    assert counts.min() > 5 and ((counts - 24) ** 2 / 24).sum() < 24 + 5 * math.sqrt(48)  # all 25 places alike


def test_horizontal_flip():
    image = noise()
    flipped = np.asarray(image)[:, ::-1]
    kept = [same(own, image) for own in draws(image, 1000, horizontal_flip=0.3)]
    assert 0.64 < np.mean(kept) < 0.76
    assert all((np.asarray(own) == flipped).all() for own in draws(image, 5, horizontal_flip=1.0))


def test_shift_moves_by_parts_of_pixels_up_to_its_share():
    """On a ramp, moving by (x, y) lowers every inner value by `2.3 x + 1.1 y`; scipy moves the same way."""
    image = ramp(across=2.3, down=1.1)
    values = arrays(draws(image, 600, shift=0.1))[:, 20:-20, 20:-20]
    change = (values - np.asarray(image, dtype=float)[20:-20, 20:-20]).mean((1, 2))
    across, down = 2.3 * 8, 1.1 * 6
    assert 0.85 * (across + down) < np.abs(change).max() < across + down + 0.5 and abs(change.mean()) < 1.5
    assert abs(change.std() - math.sqrt((across**2 + down**2) / 3)) < 0.8  # both uniform
    assert len(set(np.round(change, 1))) > 100
    only_across = ramp(across=2, down=0)
    own = np.asarray(ImageAugmentation(shift=0.1)(only_across, 0, 0, 3), dtype=float)
    moved = (np.asarray(only_across, dtype=float) - own)[30, 40] / 2
    assert np.abs(ndimage.shift(np.asarray(only_across, dtype=float), (0, moved), order=1)[15:-15, 15:-15] - own[15:-15, 15:-15]).max() <= 1


def test_rotate_turns_about_the_centre_up_to_its_angle():
    """The direction in which a ramp rises turns with it."""
    pixels = np.asarray(ramp(81, 81, 1, 1), dtype=float)
    angles = []
    for own in arrays(draws(ramp(81, 81, 1, 1), 300, rotate=30)):
        down, across = (axis[25:-25, 25:-25].mean() for axis in np.gradient(own))
        angles.append(math.degrees(math.atan2(down, across)) - 45)
        assert abs(own[40, 40] - pixels[40, 40]) < 1.5
    assert 28 < max(angles) < 31 and -31 < min(angles) < -28 and abs(np.mean(angles)) < 3.5
    assert abs(np.std(angles) - 60 / math.sqrt(12)) < 1.5


@pytest.mark.parametrize("options", [{"shift": 0.9}, {"rotate": 180}, {"pad_crop": 20}, {"rand_augment": [3, 10]}])
def test_what_is_uncovered_has_the_fill(options):
    white = Image.new("RGB", (16, 16), (255, 255, 255))
    colours = {tuple(own) for image in draws(white, 40, fill=90, **options) for own in np.asarray(image).reshape(-1, 3).tolist()}
    assert (90, 90, 90) in colours
    if "rand_augment" not in options:
        assert all(own[0] == own[1] == own[2] >= 90 for own in colours)


# ---- Colour ----


def test_brightness_is_a_factor():
    factors = np.array(
        [np.asarray(own)[0, 0, 0] / 100 for own in draws(Image.new("RGB", (2, 2), (100,) * 3), 600, color_jitter=[0.4, 0, 0])]
    )
    assert 0.59 < factors.min() < 0.63 and 1.37 < factors.max() < 1.41 and abs(factors.mean() - 1) < 0.04
    assert abs(factors.std() - 0.8 / math.sqrt(12)) < 0.02
    # Factors do not become negative.
    assert min(np.asarray(own).min() for own in draws(Image.new("L", (1, 1), 100), 200, color_jitter=[3.0, 0, 0])) < 20


def test_contrast_keeps_the_mean_and_saturation_keeps_grey():
    image = Image.fromarray(np.array([[60, 140]], dtype=np.uint8))
    for own in arrays(draws(image, 50, color_jitter=[0, 0.5, 0])):
        assert abs(own.mean() - 100) <= 1 and 38 <= own[0, 1] - own[0, 0] <= 122
    assert all(same(own, image) for own in draws(image, 20, color_jitter=[0, 0, 0.9]))
    red = Image.new("RGB", (1, 1), (200, 100, 100))
    greys = 0.299 * 200 + 0.701 * 100
    spread = []
    for own in arrays(draws(red, 200, color_jitter={"saturation": 0.5})):
        assert abs(own[0, 0] @ [0.299, 0.587, 0.114] - greys) < 1.5
        spread.append(own[0, 0, 0] - own[0, 0, 1])
    assert min(spread) < 60 and max(spread) > 140


def test_tints_come_in_random_order():
    """Brightness and contrast commute but for clipping: a bright image loses contrast when it is brightened first."""
    image = Image.fromarray(np.array([[150, 250]], dtype=np.uint8))
    augmentation = ImageAugmentation(color_jitter=[0.9, 0.9, 0])
    orders = []
    for i in range(80):
        generator = np.random.default_rng([0, 0, i])
        b, c, _ = (generator.uniform(max(0.0, 1 - s), 1 + s) for s in (0.9, 0.9, 0.0))
        bright = np.clip(np.array([150, 250]) * b, 0, 255)
        first = np.clip(bright.mean() * (1 - c) + c * bright, 0, 255)
        contrast = np.clip(200 * (1 - c) + c * np.array([150, 250]), 0, 255)
        second = np.clip(contrast * b, 0, 255)
        own = np.asarray(augmentation(image, 0, 0, i), dtype=float)[0]
        fits = [np.abs(own - expected).max() <= 4 for expected in (first, second)]
        assert any(fits), (own, first, second)
        orders += [fits[0]] if fits[0] != fits[1] else []
    assert 0.2 < np.mean(orders) < 0.8 and len(orders) > 20


# ---- RandAugment ----


PLAIN = Image.fromarray(np.linspace(0, 255, 30 * 40).reshape(30, 40).astype(np.uint8)).convert("RGB")


def operation(name, magnitude, sign=1, image=PLAIN, fill=0):
    return RAND_AUGMENT[name](image, magnitude, sign, fill)


@pytest.mark.parametrize("name", sorted(RAND_AUGMENT.keys() - {"auto_contrast", "equalize"}))
def test_operations_at_magnitude_0(name):
    for image in (noise(), noise(channels=1)):
        for sign in (1, -1):
            assert np.abs(np.asarray(operation(name, 0.0, sign, image), float) - np.asarray(image, float)).max() <= (
                0 if name != "x" else 1
            )


def test_operations_at_magnitude_10():
    before = np.asarray(PLAIN, dtype=float)
    after = {name: np.asarray(operation(name, 1.0), dtype=float) for name in RAND_AUGMENT}
    back = {name: np.asarray(operation(name, 1.0, -1), dtype=float) for name in RAND_AUGMENT}
    assert len(RAND_AUGMENT) == 14 and (after["identity"] == before).all()
    assert (after["solarize"] == 255 - before).all() and (after["posterize"] == before // 16 * 16).all()
    assert (operation("solarize", 0.5).getpixel((0, 0))) == (0, 0, 0) and operation("solarize", 0.5).getpixel((39, 29)) == (0, 0, 0)
    assert np.abs(after["brightness"] - np.clip(1.9 * before, 0, 255)).max() <= 1 and np.abs(back["brightness"] - 0.1 * before).max() <= 1
    assert np.abs(back["contrast"] - (0.9 * round(before.mean()) + 0.1 * before)).max() <= 1.5
    tinted = np.asarray(operation("color", 1.0, -1, noise()), dtype=float)
    assert np.ptp(tinted, axis=2).max() <= 0.1 * 255 + 2
    assert np.abs(after["translate_x"][:, :22] - before[:, 18:]).max() <= 1 and (after["translate_x"][:, 23:] == 0).all()
    assert np.abs(back["translate_y"][14:] - before[:16]).max() <= 255 * 0.6 / 30 + 1 and (back["translate_y"][:13] == 0).all()
    turned = ndimage.rotate(before[..., 0], 30, reshape=False, order=1)
    assert np.abs(after["rotate"][10:-10, 12:-12, 0] - turned[10:-10, 12:-12]).max() <= 4
    row = 20  # x of the source is x + 0.3 y
    assert (
        np.abs(after["shear_x"][row, :30, 0] - np.interp(np.arange(30) + 0.3 * (row + 0.5), np.arange(40), before[row, :, 0])).max() <= 1.5
    )
    column = 10
    expected = np.interp(np.arange(20) + 0.3 * (column + 0.5), np.arange(30), before[:, column, 0])
    assert np.abs(after["shear_y"][:20, column, 0] - expected).max() <= 1.5
    dull = Image.eval(PLAIN, lambda value: 100 + value // 4)
    assert (
        np.asarray(operation("auto_contrast", 0.3, image=dull)).min() == 0
        and np.asarray(operation("equalize", 0.3, image=dull)).max() == 255
    )
    blurred = np.asarray(operation("sharpness", 1.0, -1, noise()), dtype=float)
    assert np.abs(np.diff(blurred, axis=1)).mean() < 0.75 * np.abs(np.diff(np.asarray(noise(), dtype=float), axis=1)).mean()


def calls(monkeypatch, count=1500, **options):
    seen = []

    def note(name):
        return lambda image, magnitude, sign, fill: seen.append((name, magnitude, sign)) or image

    monkeypatch.setattr(module_under_test, "RAND_AUGMENT", {name: note(name) for name in RAND_AUGMENT})
    draws(noise(4, 4), count, **options)
    return seen


def test_operations_are_drawn_evenly(monkeypatch):
    seen = calls(monkeypatch, rand_augment=[2, 7])
    assert len(seen) == 3000 and {magnitude for _, magnitude, _ in seen} == {0.7}
    counts = np.array([sum(name == own for own, _, _ in seen) for name in RAND_AUGMENT])
    assert ((counts - 3000 / 14) ** 2 / (3000 / 14)).sum() < 13 + 5 * math.sqrt(26)
    assert abs(np.mean([sign for _, _, sign in seen])) < 0.08 and {sign for _, _, sign in seen} == {-1, 1}


def test_magnitudes_vary_and_operations_are_left_out(monkeypatch):
    seen = calls(monkeypatch, rand_augment=[2, 9, 0.5, 0.5])
    magnitudes = np.array([magnitude for _, magnitude, _ in seen])
    assert 1380 < len(seen) < 1620  # half of 3000
    assert magnitudes.max() <= 1 and abs(np.median(magnitudes) - 0.9) < 0.005 and abs(np.mean(magnitudes < 0.85) - 0.159) < 0.03


# ---- Erasing ----


@pytest.mark.parametrize("fill", ["noise", "mean"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_rectangle_is_erased(fill, mode):
    image = Image.new("RGB", (60, 40), (1, 2, 3)).convert(mode)
    shares, ratios, values = [], [], []
    for own in arrays(draws(image, 300, random_erasing=1.0, random_erasing_area=[0.05, 0.2], random_erasing_fill=fill)):
        changed = (own != np.asarray(image)).reshape(40, 60, -1).any(2)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        box = own[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean() > (0.9 if fill == "noise" else 0.999)
        shares.append(box.shape[0] * box.shape[1] / 2400)
        ratios.append(box.shape[0] / box.shape[1])
        values.append(box.reshape(-1, 3) if mode == "RGB" else box.reshape(-1, 1))
    values = np.concatenate(values)
    assert 0.04 < min(shares) < 0.06 and 0.19 < max(shares) < 0.21 and abs(np.mean(shares) - 0.125) < 0.01
    assert 0.25 < min(ratios) < 0.4 and 2.5 < max(ratios) < 4 and abs(np.mean(np.log(ratios))) < 0.15
    if fill == "noise":
        assert abs(values.mean() - 127.5) < 1 and abs(values.std() - 256 / math.sqrt(12)) < 1 and len(np.unique(values)) == 256
    else:
        assert {tuple(own) for own in values.tolist()} == ({(124, 116, 104)} if mode == "RGB" else {(117,)})


def test_erasing_has_a_probability():
    image = Image.new("L", (30, 30), 128)
    kept = [same(own, image) for own in draws(image, 1000, random_erasing=0.25)]
    assert 0.7 < np.mean(kept) < 0.8


# ---- torchvision ----


@pytest.fixture
def torchvision(monkeypatch):
    """A stand-in that notes what it is asked for and changes pixels at random, by torch's generator as the original does."""
    made = []
    v2 = types.ModuleType("torchvision.transforms.v2")
    v2.InterpolationMode = types.SimpleNamespace(BILINEAR="bilinear")

    def transform(name):
        class Transform:
            def __init__(self, *args, **options):
                made.append((name, args, options))

            def __call__(self, image):
                assert isinstance(image, Image.Image)
                amount = int(torch.randint(1, 50, ()))
                return Image.eval(image, lambda value: (value + amount) % 256)

        return Transform

    for name in "RandomCrop RandomAffine RandomHorizontalFlip ColorJitter RandAugment RandomResizedCrop".split():
        setattr(v2, name, transform(name))

    def get_params(image, scale, ratio):
        made.append(("RandomResizedCrop", (scale, ratio), {}))
        return 1, 2, int(torch.randint(5, 10, ())), 7  # top, left, height, width

    v2.RandomResizedCrop.get_params = staticmethod(get_params)
    package, transforms = types.ModuleType("torchvision"), types.ModuleType("torchvision.transforms")
    for name, module in (("torchvision", package), ("torchvision.transforms", transforms), ("torchvision.transforms.v2", v2)):
        monkeypatch.setitem(sys.modules, name, module)
    return made


def test_torchvision_does_the_same_by_its_own_transforms(torchvision):
    options = {**EVERYTHING, "rand_augment": [2, 8], "fill": 9, "backend": "torchvision", "random_erasing": 0.0}
    augmentation = resolve_augmentation(options)
    crop = augmentation(noise(), 0, 0, 0)
    scale, ratio = [0.3, 1.0], [3 / 4, 4 / 3]
    assert sorted(name for name, _, _ in torchvision) == sorted(
        ["RandomAffine", "RandomHorizontalFlip", "ColorJitter", "RandAugment", "RandAugment", "RandomResizedCrop", "RandomCrop"]
    )
    assert ("RandomCrop", ((crop.height, crop.width),), {"padding": 2, "fill": 9}) in torchvision
    assert ("RandomHorizontalFlip", (0.5,), {}) in torchvision and ("ColorJitter", (0.4, 0.3, 0.2), {}) in torchvision
    assert ("RandomAffine", (15.0, (0.1, 0.1)), {"interpolation": "bilinear", "fill": 9}) in torchvision
    assert ("RandomResizedCrop", (scale, ratio), {}) in torchvision and crop.width == 7 and 5 <= crop.height < 10
    assert torchvision.count(("RandAugment", (1, 24, 31, "bilinear", 9), {})) == 2  # magnitude 8 of 10 is 24 of 30


def test_torchvision_is_seeded_and_leaves_torch_alone(torchvision):
    augmentation = ImageAugmentation(horizontal_flip=0.5, random_erasing=1.0, backend="torchvision")
    image, state = noise(), torch.get_rng_state()
    first = [augmentation(image, 0, 0, i) for i in range(8)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    again = [augmentation(image, 0, 0, i) for i in range(8)]
    assert all(map(same, first, again)) and len({own.tobytes() for own in first}) == 8


def test_torchvision_never_seeds_the_gpu(torchvision, monkeypatch):
    """torch.manual_seed would: dropout on a GPU would then repeat itself with every image of the main process."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded"))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeded"))
    ImageAugmentation(horizontal_flip=0.5, backend="torchvision")(noise(), 0, 0, 0)


def test_torchvision_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert importlib.util.find_spec("torchvision") is None
    with pytest.raises(ValueError, match="the backend 'torchvision' needs torchvision, which is not installed.*or leave backend out"):
        resolve_augmentation({"horizontal_flip": 0.5, "backend": "torchvision"})


# ---- Errors ----


@pytest.mark.parametrize(
    "options,message",
    [
        ({"horizontal_flop": 0.5}, r"augmentation: there is no 'horizontal_flop'. Did you mean 'horizontal_flip'\?"),
        ({"blur": 1}, "there is no 'blur'. Known: random_resized_crop, pad_crop"),
        ([0.5], r"augmentation must be a mapping such as \{'horizontal_flip': 0.5\}, got \[0.5\]"),
        ({"horizontal_flip": True}, "horizontal_flip must be a probability, such as 0.5, got True"),
        ({"horizontal_flip": 1.5}, "got 1.5"),
        ({"horizontal_flip": "0.5"}, "got '0.5'"),
        ({"horizontal_flip": float("nan")}, "got nan"),
        (
            {"random_resized_crop": True},
            r"random_resized_crop must be a smallest and a largest share of the area, such as \[0.08, 1\], got True",
        ),
        ({"random_resized_crop": [1.0, 0.08]}, r"got \[1.0, 0.08\]"),
        ({"random_resized_crop": [0, 1]}, r"got \[0, 1\]"),
        ({"random_erasing_area": [0.5]}, r"random_erasing_area must be .* such as \[0.02, 0.33\], got \[0.5\]"),
        ({"pad_crop": 1.5}, "pad_crop must be a number of pixels, such as 4, got 1.5"),
        ({"pad_crop": -1}, "pad_crop"),
        ({"shift": 2}, "shift must be a share of the side, such as 0.1, got 2"),
        ({"rotate": 200}, "rotate must be degrees from 0 to 180, got 200"),
        ({"color_jitter": [0.4, 0.4]}, r"color_jitter must be a strength of at least 0, such as 0.4, or three.*got \[0.4, 0.4\]"),
        ({"color_jitter": -0.1}, "got -0.1"),
        ({"color_jitter": {"hue": 0.1}}, "color_jitter has no 'hue'. Known: brightness, contrast, saturation"),
        ({"rand_augment": 9}, r"rand_augment must be \[operations, magnitude from 0 to 10\].*got 9"),
        ({"rand_augment": [2, 15]}, r"got \[2, 15\]"),
        ({"rand_augment": [0, 9]}, r"got \[0, 9\]"),
        ({"rand_augment": [2, 9, 0.5, 2]}, r"got \[2, 9, 0.5, 2\]"),
        ({"random_erasing": -1}, "random_erasing must be a probability"),
        ({"random_erasing": 0.1, "random_erasing_fill": "black"}, "random_erasing_fill must be one of noise, mean, got 'black'"),
        ({"fill": 256}, "fill must be a grey value from 0 to 255, got 256"),
        ({"rotate": 5, "backend": "cv2"}, "backend must be one of pil, torchvision, got 'cv2'"),
    ],
    ids=str,
)
def test_what_is_no_augmentation(options, message):
    with pytest.raises(ValueError, match=message):
        resolve_augmentation(options)


def test_other_modes_are_refused():
    with pytest.raises(ValueError, match="mode 'RGBA' cannot be augmented.*plain_image"):
        ImageAugmentation(rotate=5)(Image.new("RGBA", (2, 2)), 0, 0, 0)
