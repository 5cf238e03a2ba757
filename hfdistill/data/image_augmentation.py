"""Random changes of training images that can be repeated: the same ones for the same seed, epoch and image, wherever they are made."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ..suggest import nearest_or_all


BACKENDS = ("pil", "torchvision")
ERASING_FILLS = ("noise", "mean")
MEAN_COLOUR = (124, 116, 104)

_ATTEMPTS = 10
_CROP_RATIO = (3 / 4, 4 / 3)
_ERASING_RATIO = (0.3, 1 / 0.3)
_TINTS = ("brightness", "contrast", "saturation")


@dataclass(frozen=True)
class ImageAugmentation:
    """What is done to a training image, and how much of it; plain numbers, so that a YAML file can hold it as a mapping.

    `augmentation(image, seed, epoch, example_id)` is a pure function of its arguments: a resumed run, any worker, another
    process and the pass that stores a teacher's answers see the same image. Fields are applied in the order below; at their
    defaults they do nothing.

    Args:
        random_resized_crop: smallest and largest share of the area; a box of that size and of a width to height ratio of 3/4 to
            4/3 is cut out ([Szegedy et al. 2014](https://huggingface.co/papers/1409.4842)). Resizing it is left to each
            model's preparation. ImageNet: `[0.08, 1.0]`.
        pad_crop: pixels of padding on each side, of which a box as large as the image is cut. CIFAR: 4.
        shift: the image is moved by up to that share of its sides.
        rotate: and turned about its centre by up to that many degrees.
        horizontal_flip: probability.
        color_jitter: factors of brightness, contrast and saturation are drawn from 1 - s to 1 + s and applied in random order;
            one number for all three, or three. DeiT: 0.3.
        rand_augment: `[operations, magnitude]`, magnitude 0 to 10: that many random operations of `RAND_AUGMENT`, see there
            ([Cubuk et al. 2019](https://huggingface.co/papers/1909.13719)); two more numbers are the standard deviation of the
            magnitude (0) and the probability of each operation (1). DeiT's "9/0.5" is timm's `[2, 9, 0.5, 0.5]`.
        random_erasing: probability that a rectangle is covered
            ([Zhong et al. 2017](https://huggingface.co/papers/1708.04896)). DeiT: 0.25.
        random_erasing_area: its smallest and largest share of the area; sides are in a ratio of 0.3 to 3.3.
        random_erasing_fill: `noise`, every value drawn from 0 to 255, or `mean`, the mean colour of ImageNet. Both before the
            image is resized, unlike timm.
        fill: grey value 0 to 255 of what padding, moving and turning uncover.
        backend: `pil`, or `torchvision` for its transforms (v2) of the same names where it is installed; erasing is always our
            own. The two draw other numbers.

    Raises:
        ValueError: for values that are no such numbers, and a backend that is not installed.

    Example:
        >>> from PIL import Image
        >>> flip = ImageAugmentation(horizontal_flip=1.0)
        >>> image = Image.new("L", (2, 1)); image.putpixel((0, 0), 255)
        >>> list(flip(image, seed=0, epoch=3, example_id=7).tobytes())
        [0, 255]
    """

    random_resized_crop: tuple[float, float] | None = None
    pad_crop: int = 0
    shift: float = 0.0
    rotate: float = 0.0
    horizontal_flip: float = 0.0
    color_jitter: float | tuple[float, float, float] = 0.0
    rand_augment: tuple[float, ...] | None = None
    random_erasing: float = 0.0
    random_erasing_area: tuple[float, float] = (0.02, 0.33)
    random_erasing_fill: str = "noise"
    fill: int = 0
    backend: str = "pil"

    def __post_init__(self):
        def store(name, value):
            object.__setattr__(self, name, value)

        if self.random_resized_crop is not None:
            store("random_resized_crop", self._shares("random_resized_crop", "[0.08, 1]"))
        store("random_erasing_area", self._shares("random_erasing_area", "[0.02, 0.33]"))
        self._number("pad_crop", "a number of pixels, such as 4", 0, math.inf, whole=True)
        self._number("shift", "a share of the side, such as 0.1", 0, 1)
        self._number("rotate", "degrees from 0 to 180", 0, 180)
        self._number("horizontal_flip", "a probability, such as 0.5", 0, 1)
        self._number("random_erasing", "a probability, such as 0.25", 0, 1)
        self._number("fill", "a grey value from 0 to 255", 0, 255, whole=True)
        store("color_jitter", self._tints())
        store("rand_augment", self._rand_augment())
        for name, known in (("random_erasing_fill", ERASING_FILLS), ("backend", BACKENDS)):
            if getattr(self, name) not in known:
                raise ValueError(f"augmentation: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        if self.backend == "torchvision" and _missing_torchvision():
            raise ValueError(
                "augmentation: the backend 'torchvision' needs torchvision, which is not installed. Install the release that goes with "
                "your torch (pip install torchvision), or leave backend out: Pillow does the same."
            )

    def _refuse(self, name: str, wanted: str, value) -> ValueError:
        return ValueError(f"augmentation: {name} must be {wanted}, got {value!r}.")

    def _number(self, name: str, wanted: str, low: float, high: float, whole: bool = False) -> None:
        value = getattr(self, name)
        if not _is_number(value) or not low <= value <= high or (whole and value != int(value)):
            raise self._refuse(name, wanted, value)
        object.__setattr__(self, name, int(value) if whole else float(value))

    def _shares(self, name: str, usual: str) -> tuple[float, float]:
        value = getattr(self, name)
        if not _are_numbers(value, 2) or not 0 < value[0] <= value[1] <= 1:
            raise self._refuse(name, f"a smallest and a largest share of the area, such as {usual}", value)
        return tuple(map(float, value))

    def _tints(self) -> tuple[float, float, float]:
        value = self.color_jitter
        if isinstance(value, Mapping):
            unknown = sorted(set(value) - set(_TINTS))
            if unknown:
                raise ValueError(f"augmentation: color_jitter has no {unknown[0]!r}.{nearest_or_all(unknown[0], _TINTS)}")
            value = [value.get(name, 0.0) for name in _TINTS]
        value = [value] * 3 if _is_number(value) else value
        if not _are_numbers(value, 3) or min(value) < 0:
            raise self._refuse("color_jitter", "a strength of at least 0, such as 0.4, or three: " + ", ".join(_TINTS), self.color_jitter)
        return tuple(map(float, value))

    def _rand_augment(self) -> tuple[int, float, float, float] | None:
        value = self.rand_augment
        if value is None:
            return None
        wanted = "[operations, magnitude from 0 to 10], and maybe a standard deviation and a probability, such as [2, 9, 0.5, 0.5]"
        if not any(_are_numbers(value, count) for count in (2, 3, 4)):
            raise self._refuse("rand_augment", wanted, value)
        count, magnitude, deviation, probability = [*value, *(0.0, 1.0)[len(value) - 2 :]]
        if count != int(count) or count < 1 or not 0 <= magnitude <= 10 or deviation < 0 or not 0 <= probability <= 1:
            raise self._refuse("rand_augment", wanted, value)
        return int(count), float(magnitude), float(deviation), float(probability)

    @property
    def changes(self) -> bool:
        """Whether anything is on."""
        numbers = self.pad_crop, self.shift, self.rotate, self.horizontal_flip, *self.color_jitter, self.random_erasing
        return any(numbers) or self.random_resized_crop is not None or self.rand_augment is not None

    def __call__(self, image, seed: int, epoch: int, example_id: int):
        """`image` (PIL, mode "L" or "RGB") changed; smaller after `random_resized_crop`, else of the same size."""
        if image.mode not in ("L", "RGB"):
            raise ValueError(f"An image of mode {image.mode!r} cannot be augmented, 'L' or 'RGB' can. Bring it there with plain_image.")
        generator = np.random.default_rng([seed, epoch, example_id])
        image = (self._with_torchvision if self.backend == "torchvision" else self._with_pillow)(image, generator)
        if self.random_erasing and generator.random() < self.random_erasing:
            image = _erase(image, self.random_erasing_area, self.random_erasing_fill, generator)
        return image

    def _with_pillow(self, image, generator: np.random.Generator):
        if self.random_resized_crop is not None:
            image = image.crop(crop_box(image.size, self.random_resized_crop, generator))
        if self.pad_crop:
            left, top = generator.integers(-self.pad_crop, self.pad_crop + 1, 2).tolist()
            image = _moved(image, (1, 0, left, 0, 1, top), self.fill, smooth=False)
        if self.shift or self.rotate:
            turn, right, down = generator.uniform(-1, 1, 3)
            offset = right * self.shift * image.width, down * self.shift * image.height
            image = image.rotate(turn * self.rotate, _bilinear(), translate=offset, fillcolor=_colour(image, self.fill))
        if self.horizontal_flip and generator.random() < self.horizontal_flip:
            image = image.transpose(_pillow("Image").Transpose.FLIP_LEFT_RIGHT)
        if any(self.color_jitter):
            factors = [generator.uniform(max(0.0, 1 - strength), 1 + strength) for strength in self.color_jitter]
            for kind in generator.permutation(3):
                if self.color_jitter[kind]:
                    image = _enhance(image, ("Brightness", "Contrast", "Color")[kind], factors[kind])
        if self.rand_augment is not None:
            for name, magnitude, sign in self._drawn(generator):
                image = RAND_AUGMENT[name](image, magnitude, sign, self.fill)
        return image

    def _drawn(self, generator: np.random.Generator):
        """Name, magnitude from 0 to 1 and sign of each operation; as many numbers are drawn whatever they come to."""
        count, magnitude, deviation, probability = self.rand_augment
        for _ in range(count):
            name = list(RAND_AUGMENT)[generator.integers(len(RAND_AUGMENT))]
            own = min(max(magnitude + deviation * generator.standard_normal(), 0.0), 10.0) / 10
            sign, happens = 1 - 2 * int(generator.integers(2)), generator.random() < probability
            if happens:
                yield name, own, sign

    def _with_torchvision(self, image, generator: np.random.Generator):
        import torch

        v2 = importlib.import_module("torchvision.transforms.v2")
        steps = []
        if self.pad_crop:
            steps.append(lambda own: v2.RandomCrop((own.height, own.width), padding=self.pad_crop, fill=self.fill)(own))
        if self.shift or self.rotate:
            translate = (self.shift, self.shift) if self.shift else None
            steps.append(v2.RandomAffine(self.rotate, translate, interpolation=v2.InterpolationMode.BILINEAR, fill=self.fill))
        if self.horizontal_flip:
            steps.append(v2.RandomHorizontalFlip(self.horizontal_flip))
        if any(self.color_jitter):
            steps.append(v2.ColorJitter(*self.color_jitter))
        if self.rand_augment is not None:
            count, magnitude, deviation, probability = self.rand_augment
            for _ in range(count):
                bin_ = round(min(max(magnitude + deviation * generator.standard_normal(), 0.0), 10.0) * 3)
                if generator.random() < probability:
                    steps.append(v2.RandAugment(1, bin_, 31, v2.InterpolationMode.BILINEAR, self.fill))
        with torch.random.fork_rng(devices=[]):
            # The generator of the CPU alone: torch.manual_seed would give every image's seed to the dropout on a GPU too.
            torch.random.default_generator.manual_seed(int(generator.integers(2**63)))
            if self.random_resized_crop is not None:
                top, left, height, width = v2.RandomResizedCrop.get_params(image, list(self.random_resized_crop), list(_CROP_RATIO))
                image = image.crop((left, top, left + width, top + height))
            for step in steps:
                image = step(image)
        return image


def resolve_augmentation(augmentation: Mapping[str, Any] | ImageAugmentation | None) -> ImageAugmentation | None:
    """The mapping of a YAML file, or of keyword arguments, as [`ImageAugmentation`]; `None` where it changes nothing.

    Raises:
        ValueError: for unknown keys, and as [`ImageAugmentation`] does.

    Example:
        >>> resolve_augmentation({"horizontal_flip": 0.5, "random_resized_crop": [0.08, 1]}).random_resized_crop
        (0.08, 1.0)
        >>> resolve_augmentation({"horizontal_flip": 0.0}) is None
        True
    """
    if augmentation is None:
        return None
    if not isinstance(augmentation, ImageAugmentation):
        if not isinstance(augmentation, Mapping):
            raise ValueError(f"augmentation must be a mapping such as {{'horizontal_flip': 0.5}}, got {augmentation!r}.")
        known = [field.name for field in fields(ImageAugmentation)]
        for name in augmentation:
            if name not in known:
                raise ValueError(f"augmentation: there is no {name!r}.{nearest_or_all(name, known)}")
        augmentation = ImageAugmentation(**augmentation)
    return augmentation if augmentation.changes else None


def crop_box(size: tuple[int, int], scale: tuple[float, float], generator: np.random.Generator) -> tuple[int, int, int, int]:
    """`(left, top, right, bottom)` of a random box: its share of the area is drawn from `scale`, the logarithm of its ratio of
    width to height between those of 3/4 and 4/3. Where ten draws do not fit, the largest centred box of an allowed ratio.
    """
    width, height = size
    logs = [math.log(ratio) for ratio in _CROP_RATIO]
    draws = generator.random((_ATTEMPTS, 2))
    right, down = generator.random(2)  # drawn in any case, so that what follows does not depend on the attempts
    for share, shape in draws:
        area = (scale[0] + share * (scale[1] - scale[0])) * width * height
        ratio = math.exp(logs[0] + shape * (logs[1] - logs[0]))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(right * (width - w + 1)), int(down * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * _CROP_RATIO[1])))
    h = min(height, max(1, round(width / _CROP_RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _erase(image, area: tuple[float, float], fill: str, generator: np.random.Generator):
    width, height = image.size
    logs = [math.log(ratio) for ratio in _ERASING_RATIO]
    for _ in range(_ATTEMPTS):
        size = generator.uniform(*area) * width * height
        ratio = math.exp(generator.uniform(*logs))
        w, h = round(math.sqrt(size / ratio)), round(math.sqrt(size * ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = generator.integers(height - h + 1), generator.integers(width - w + 1)
            pixels = np.array(image)
            box = pixels[top : top + h, left : left + w]
            box[...] = generator.integers(0, 256, box.shape) if fill == "noise" else _colour(image, MEAN_COLOUR)
            return _pillow("Image").fromarray(pixels)
    return image


# ---- Operations of RandAugment: (image, magnitude from 0 to 1, sign, fill) ----


def _tint(kind: str):
    return lambda image, magnitude, sign, fill: _enhance(image, kind, 1 + 0.9 * sign * magnitude)


def _by(limit: float, terms):
    """An affine map from each pixel of the result to its source; `terms` makes its six numbers of the amount and the image."""
    return lambda image, magnitude, sign, fill: _moved(image, terms(limit * sign * magnitude, image), fill)


RAND_AUGMENT = {
    "identity": lambda image, magnitude, sign, fill: image,
    "auto_contrast": lambda image, magnitude, sign, fill: _pillow("ImageOps").autocontrast(image),
    "equalize": lambda image, magnitude, sign, fill: _pillow("ImageOps").equalize(image),
    "rotate": lambda image, magnitude, sign, fill: image.rotate(30 * sign * magnitude, _bilinear(), fillcolor=_colour(image, fill)),
    "solarize": lambda image, magnitude, sign, fill: _pillow("ImageOps").solarize(image, 256 * (1 - magnitude)),
    "color": _tint("Color"),
    "posterize": lambda image, magnitude, sign, fill: _pillow("ImageOps").posterize(image, 8 - round(4 * magnitude)),
    "contrast": _tint("Contrast"),
    "brightness": _tint("Brightness"),
    "sharpness": _tint("Sharpness"),
    "shear_x": _by(0.3, lambda amount, image: (1, amount, 0, 0, 1, 0)),
    "shear_y": _by(0.3, lambda amount, image: (1, 0, 0, amount, 1, 0)),
    "translate_x": _by(0.45, lambda amount, image: (1, 0, amount * image.width, 0, 1, 0)),
    "translate_y": _by(0.45, lambda amount, image: (1, 0, 0, 0, 1, amount * image.height)),
}
"""The operations of `rand_augment`, the paper's fourteen. At magnitude 10 they turn by 30 degrees, shear by 0.3, move by 0.45 of
the side, keep 4 bits, invert from 0 on, and enhance by 1 ± 0.9; the sign is random. At 0 they change nothing, but for
`auto_contrast` and `equalize`, which have no magnitude."""


def _enhance(image, kind: str, factor: float):
    return getattr(_pillow("ImageEnhance"), kind)(image).enhance(factor)


def _moved(image, terms, fill: int, smooth: bool = True):
    pillow = _pillow("Image")
    resample = pillow.Resampling.BILINEAR if smooth else pillow.Resampling.NEAREST
    return image.transform(image.size, pillow.Transform.AFFINE, terms, resample, fillcolor=_colour(image, fill))


def _colour(image, value: int | tuple[int, int, int]):
    """A grey value or colour as the mode of `image` has it."""
    if image.mode == "L":
        return value if isinstance(value, int) else round(float(np.dot(value, (0.299, 0.587, 0.114))))
    return (value,) * 3 if isinstance(value, int) else value


def _bilinear():
    return _pillow("Image").Resampling.BILINEAR


def _pillow(module: str):
    return importlib.import_module(f"PIL.{module}")  # when it is needed: texts do without Pillow


def _missing_torchvision() -> bool:
    try:
        return importlib.util.find_spec("torchvision") is None
    except ValueError:  # imported already, by hand
        return False


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _are_numbers(value, count: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count and all(map(_is_number, value))
