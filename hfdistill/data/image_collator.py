"""Batches of images: one augmented image, prepared for the student and for the teacher, and mixed alike for both."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .image_augmentation import ImageAugmentation, resolve_augmentation
from .image_files import open_image, plain_image


IGNORED = -100

_MIXING = 0x6D6978  # keeps the draws of a batch apart from those of an image
_GEOMETRY = ("do_resize", "do_center_crop", "do_pad")
_STEPS = {  # what belongs to which step of a processor, and how differences are named
    "do_resize": {"size": "size", "resample": "resample"},
    "do_center_crop": {"crop_size": "crop"},
    "do_rescale": {"rescale_factor": "rescale"},
    "do_normalize": {"image_mean": "mean", "image_std": "std"},
    "do_pad": {"pad_size": "pad"},
}
_WITHOUT_EFFECT = frozenset(
    "image_processor_type feature_extractor_type processor_class auto_map do_convert_rgb do_reduce_labels data_format input_data_format "
    "device return_tensors default_to_square disable_grouping image_seq_length".split()
)


class ImageCollator:
    r"""Makes batches of rows with an image: `pixel_values` by the student's image processor, `teacher_pixel_values` by the teacher's.

    Both come from one image: a teacher that was trained with another mean, deviation or size gets what it knows, of the same crop
    and in the same colours. The collator itself prepares as at inference, for evaluation. [`for_training`] gives the one that
    augments and mixes, and [`DistillationTrainer`] asks for it. All its draws depend on the seed, the epoch ([`set_epoch`]) and
    the `example_id` of rows alone, so batches are the same for any number of workers and after a resume.

    After a `random_resized_crop` the box is brought to the size of each model's input at once, without the processor's own
    resizing and cropping, and only rescaled and normalised by it. In all other cases the processor does everything.

    mixup ([Zhang et al. 2017](https://huggingface.co/papers/1710.09412)): `x = λ x_i + (1 - λ) x_j`, `λ ~ Beta(α, α)`; cutmix
    ([Yun et al. 2019](https://huggingface.co/papers/1905.04899)): a box with the share `1 - λ` of the area (less where it is cut
    off at the border) comes from `x_j`, and `λ` becomes the share that is left. Labels are mixed like areas. One `λ` a batch;
    `j` runs through the batch backwards, as in timm, where some rows have no label among those with one and among those without
    apart, so that mixing costs no label. Student and teacher get the same `λ` and box.

    Args:
        image_processor: the student's, such as `AutoImageProcessor.from_pretrained` gives.
        teacher_image_processor (*optional*): the teacher's; there is no `teacher_pixel_values` where it prepares alike, see
            [`preparation_difference`].
        augmentation (mapping or [`ImageAugmentation`], *optional*): of training images.
        mixup_alpha (`float`, defaults to 0): α of mixup; 0 is off. DeiT: 0.8.
        cutmix_alpha (`float`, defaults to 0): α of cutmix; 0 is off. DeiT: 1.0. With both, each batch gets one, with equal chance.
        mix_probability (`float`, defaults to 1): of a training batch being mixed.
        num_labels (`int`, *optional*): classes; needed for mixing.
        seed (`int`, defaults to 0): of all draws.
        image_column (`str`, defaults to `"image"`): of a PIL image, or anything else that [`open_image`] takes.
        label_column (`str`, defaults to `"label"`): of the class id, -100 where it is missing; `labels` is found too.

    Shapes:
        rows: dicts with the two columns and `example_id`, which evaluation does without.
        returns: `pixel_values` and `teacher_pixel_values` `(batch, channels, height, width)`, each in its own size; `labels` and
            `example_id` `(batch,)`; where the collator mixes, `soft_labels` `(batch, num_labels)`, the shares of the classes,
            0 in rows without a label, and in `labels` the class with the larger share.

    Raises:
        ValueError: for options out of range, processors that fix no size where one is needed, rows without `example_id` in
            training, labels that are no class, and images that cannot be read.
    """

    def __init__(
        self,
        image_processor,
        teacher_image_processor=None,
        augmentation: Mapping[str, Any] | ImageAugmentation | None = None,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        mix_probability: float = 1.0,
        num_labels: int | None = None,
        seed: int = 0,
        image_column: str = "image",
        label_column: str = "label",
    ):
        for name, value in {"mixup_alpha": mixup_alpha, "cutmix_alpha": cutmix_alpha}.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be at least 0, got {value!r}: it is the parameter of a Beta distribution, 0 turns it off.")
        if not 0 <= mix_probability <= 1:
            raise ValueError(f"mix_probability must be from 0 to 1, got {mix_probability!r}: it is the chance of a batch to be mixed.")
        self.mixup_alpha, self.cutmix_alpha, self.mix_probability = float(mixup_alpha), float(cutmix_alpha), float(mix_probability)
        self.mixes = max(mixup_alpha, cutmix_alpha) > 0 and mix_probability > 0
        if self.mixes and num_labels is None:
            raise ValueError("Mixed images have shares of several classes as labels. Pass num_labels, the number of classes.")
        self.image_processor, self.teacher_image_processor = image_processor, teacher_image_processor
        self.augmentation = resolve_augmentation(augmentation)
        self.num_labels, self.seed = num_labels, seed
        self.image_column, self.label_column = image_column, label_column
        self.columns = (image_column, label_column, "example_id")
        self.training = False
        self.preparations = {"pixel_values": Preparation(image_processor)}
        if teacher_image_processor is not None and preparation_difference(image_processor, teacher_image_processor):
            self.preparations["teacher_pixel_values"] = Preparation(teacher_image_processor)
        self._resizes = self.augmentation is not None and self.augmentation.random_resized_crop is not None
        for preparation in self.preparations.values() if self._resizes else ():
            preparation.check_size()
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers of a data loader see the new value
        self._for_training: ImageCollator | None = None

    @property
    def epoch(self) -> int:
        """What the draws are made for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Other draws for another epoch, in this collator, the one for training, and running workers."""
        self._epoch.fill_(int(epoch))

    def for_training(self) -> ImageCollator:
        """The collator of training batches, always the same one: it augments and mixes, as far as options say so."""
        if self.training:
            return self
        if self._for_training is None:
            self._for_training = copy.copy(self)
            self._for_training.training = True
        return self._for_training

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids = self._example_ids(rows)
        images = [self.image(row) for row in rows]
        batch = {name: prepare(images, self.training and self._resizes) for name, prepare in self.preparations.items()}
        labels = self._labels(rows)
        if labels is not None:
            batch["labels"] = labels
        if ids is not None:
            batch["example_id"] = torch.tensor(ids)
        return self._mix(batch, ids) if self.training and self.mixes else batch

    def image(self, row: Mapping[str, Any]):
        """The image of a row before it is prepared for a model: in mode "L" or "RGB", and augmented in training."""
        if self.image_column not in row:
            raise ValueError(
                f"A row has no column {self.image_column!r}, only {sorted(row)}. Pass image_column, and keep the column in the data set."
            )
        number = row.get("example_id")
        what = "an example" if number is None else f"example_id {number}"
        image = plain_image(open_image(row[self.image_column], what), what)
        if self.training and self.augmentation is not None:
            image = self.augmentation(image, self.seed, self.epoch, int(number))
        return image

    def _example_ids(self, rows) -> list[int] | None:
        ids = [row.get("example_id") for row in rows]
        if all(number is not None for number in ids):
            return [int(number) for number in ids]
        if self.training and (self.mixes or self.augmentation is not None):
            raise ValueError(
                f"A row has no column 'example_id', only {sorted(rows[0])}, so what is done to its image could not be repeated. Add it: "
                "dataset.add_column('example_id', range(len(dataset)))."
            )
        return None

    def _labels(self, rows) -> Tensor | None:
        name = self.label_column if self.label_column in rows[0] else "labels"
        if name not in rows[0]:
            return None
        labels = torch.tensor([IGNORED if row[name] is None else int(row[name]) for row in rows])
        wrong = (labels != IGNORED) & (labels < 0)
        if self.num_labels is not None:
            wrong |= labels >= self.num_labels
        if wrong.any():
            count = "no class" if self.num_labels is None else f"none of the {self.num_labels} classes"
            raise ValueError(
                f"The label {int(labels[wrong][0])} is {count}: they are counted from 0, and -100 is a missing label. Correct the column, "
                "or num_labels."
            )
        return labels

    def _mix(self, batch: dict[str, Tensor], ids: list[int]) -> dict[str, Tensor]:
        labels = batch.get("labels", torch.full((len(ids),), IGNORED))
        known = labels != IGNORED
        shares = torch.zeros(len(labels), self.num_labels)
        shares[known, labels[known]] = 1.0
        generator = np.random.default_rng([_MIXING, self.seed, self.epoch, *ids])
        kept = 1.0
        if generator.random() < self.mix_probability:
            partner = torch.arange(len(labels))
            for group in (known, ~known):
                partner[group] = partner[group].flip(0)
            kept = self._mix_images(batch, partner, generator)
            shares = kept * shares + (1 - kept) * shares[partner]
            labels = labels if kept >= 0.5 else labels[partner]
        return {**batch, "labels": labels, "soft_labels": shares}

    def _mix_images(self, batch: dict[str, Tensor], partner: Tensor, generator: np.random.Generator) -> float:
        """Mixes all images of `batch` with those of `partner` and returns the share of their own that is left."""
        cut, box = generator.random() < (0.5 if self.mixup_alpha and self.cutmix_alpha else float(self.cutmix_alpha > 0)), None
        kept = float(generator.beta(*[self.cutmix_alpha if cut else self.mixup_alpha] * 2))
        if cut:
            # On the grid of the student's pixels, so that its share of the labels is exact.
            box, kept = _cut_box(kept, batch["pixel_values"].shape[-2:], generator)
        for name in self.preparations:
            own = batch[name]
            other = own[partner]
            if box is None:
                batch[name] = kept * own + (1 - kept) * other
            else:
                (top, bottom), (left, right) = ([round(edge * side) for edge in edges] for edges, side in zip(box, own.shape[-2:]))
                own[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
        return kept


class Preparation:
    """An image processor, the mode of the images it takes, and the size of the model's input.

    Attributes:
        mode: "L" where it normalises one channel, else "RGB".
        size: `(height, width)` of what it makes of a square image; `None` where that depends on the image.
    """

    def __init__(self, processor):
        from PIL import Image

        self.processor = processor
        mean = getattr(processor, "image_mean", None)
        grey = getattr(processor, "do_normalize", None) and isinstance(mean, (list, tuple)) and len(mean) == 1
        self.mode = "L" if grey else "RGB"
        # Asked instead of read: classes have their own ideas of what `size`, `crop_size` and `crop_pct` mean.
        sizes = {tuple(self._process([Image.new(self.mode, (side, side))]).shape[-2:]) for side in (48, 80)}
        self.size = sizes.pop() if len(sizes) == 1 else None

    def check_size(self) -> None:
        """Raises `ValueError` where the model's input has no size to which a crop could be brought."""
        if self.size is None:
            raise ValueError(
                f"{type(self.processor).__name__} leaves images as large as they are (do_resize=False), so a random_resized_crop cannot "
                "be brought to one size, and a new model has none. Set do_resize=True and size in its preprocessor_config.json, or use "
                "pad_crop (and image_size in the config of the model)."
            )

    def __call__(self, images: list, resize: bool) -> Tensor:
        """`pixel_values` of PIL images; `resize` brings each to `size` first and leaves out the processor's own resizing."""
        images = [image.convert(self.mode) if image.mode != self.mode else image for image in images]
        if not resize or not hasattr(self.processor, "do_resize"):
            return self._process(images)
        height, width = self.size
        images = [image.resize((width, height), _pillow_filter(getattr(self.processor, "resample", None))) for image in images]
        return self._process(images, **{name: False for name in _GEOMETRY if hasattr(self.processor, name)})

    def _process(self, images: list, **options) -> Tensor:
        try:
            return self.processor(images, return_tensors="pt", **options)["pixel_values"].float()
        except (ValueError, RuntimeError, TypeError) as error:
            sizes = sorted({image.size for image in images})
            if len(sizes) < 2:
                raise
            raise ValueError(
                f"{type(self.processor).__name__} cannot make one batch of images of the sizes {sizes[:3]} (width, height): "
                f"{str(error).splitlines()[0][:160]}. Set do_center_crop=True and crop_size, or a size with height and width, in its "
                "preprocessor_config.json."
            ) from error


def preparation_difference(student_processor, teacher_processor) -> dict[str, tuple[Any, Any]] | None:
    """In what two image processors differ: name -> (student's, teacher's); `None` where both prepare alike.

    Names are `size`, `crop`, `resample`, `rescale`, `mean`, `std` and `pad`, with `None` on the side that leaves the step out;
    options that only some processors have keep their own names.

    Example:
        >>> from transformers import ViTImageProcessorPil
        >>> preparation_difference(ViTImageProcessorPil(), ViTImageProcessorPil(size={"height": 96, "width": 96}))
        {'size': ({'height': 224, 'width': 224}, {'height': 96, 'width': 96})}
    """
    ours, theirs = _settings(student_processor), _settings(teacher_processor)
    names = list(dict.fromkeys([*ours, *theirs]))
    return {name: (ours.get(name), theirs.get(name)) for name in names if ours.get(name) != theirs.get(name)} or None


def _settings(processor) -> dict[str, Any]:
    values = {name: value for name, value in processor.to_dict().items() if not name.startswith("_") and name not in _WITHOUT_EFFECT}
    settings = {}
    for step, names in _STEPS.items():
        happens = values.pop(step, None)
        for name, shown in names.items():
            value = values.pop(name, None)
            if happens and value is not None:
                settings[shown] = _comparable(name, value)
    if (settings.get("size") or {}).get("shortest_edge", 0) >= 384:
        values.pop("crop_pct", None)  # ConvNeXT and its kin crop smaller images only
    means = max((len(settings[name]) for name in ("mean", "std") if name in settings), default=1)
    for name in ("mean", "std"):  # one number stands for all channels
        if len(settings.get(name, ())) == 1:
            settings[name] *= max(means, 3)
    return {**settings, **{name: value for name, value in values.items() if value}}


def _comparable(name: str, value):
    if name == "resample":
        return _pillow_filter(value).name.lower()
    if name in ("image_mean", "image_std"):
        return tuple(round(float(own), 6) for own in (value if isinstance(value, (list, tuple)) else [value]))
    if name == "rescale_factor":
        return round(float(value), 9)
    if isinstance(value, Mapping):
        return {side: own for side, own in value.items() if own is not None}
    return value


def _pillow_filter(resample):
    """A resampling filter as Pillow names it; torchvision has another enumeration."""
    from PIL import Image

    value = getattr(resample, "value", resample)
    if value is None:
        return Image.Resampling.BILINEAR
    return Image.Resampling[value.replace("-exact", "").upper()] if isinstance(value, str) else Image.Resampling(value)


def _cut_box(kept: float, size: Sequence[int], generator: np.random.Generator):
    """Edges `((top, bottom), (left, right))` of a box as shares of the sides, and the share of the area outside of it."""
    edges, sides = [], []
    for side in size:
        half, centre = side * np.sqrt(1 - kept) / 2, generator.random() * side
        low, high = (int(np.clip(round(edge), 0, side)) for edge in (centre - half, centre + half))
        edges.append((low / side, high / side))
        sides.append(high - low)
    return edges, 1 - sides[0] * sides[1] / (size[0] * size[1])
