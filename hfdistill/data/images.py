"""Image classification data in one shape: Hub data sets, local folders, or the embedded handwritten digits."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from .digits import DIGIT_NAMES, load_digits_splits
from .image_files import check_images, open_image
from .splits import MISSING, Splits


_IMAGE_COLUMNS, _LABEL_COLUMNS = ("image", "img"), ("label", "labels")
_BEGINNING = 65_536
_DIRECTORIES = "one folder of images for each class"


@dataclass
class ImageData(Splits):
    """Splits of an image classification task, each with the columns `image`, `label` and `example_id`.

    `image` is the stored file, `{"bytes", "path"}` ([`open_image`] decodes it, [`ImageCollator`] does so when a batch is made);
    `label` is a class id, -100 where it is hidden; `example_id` is the number of the image in its source. It is the same in
    every split that has the image, and no two images share one, those of the held-out splits included.

    Attributes:
        text_columns: the name of the image column.
    """

    def with_labels(self, split, change):
        return replace_labels(split, change)  # the images stay as they are stored

    def fingerprint(self) -> str:
        """sha256 of every image and label that is used, in order: of files their size and first 64 KiB, of embedded images the pixels."""
        digest, known = hashlib.sha256(json.dumps(self.label_names).encode()), {}
        with ThreadPoolExecutor(8) as pool:  # files are read and hashed outside the interpreter's lock
            for split in (self.teacher_train, self.labelled, self.transfer, *self.evaluation.values()):
                ids = split["example_id"][:]
                new = [row for row, number in enumerate(ids) if number not in known]
                for start in range(0, len(new), 256):
                    rows = split[new[start : start + 256]]
                    known.update(zip(rows["example_id"], pool.map(self._digest, rows["image"])))
                digest.update(json.dumps([[known[number], label] for number, label in zip(ids, split["label"])]).encode())
        return digest.hexdigest()

    def _digest(self, stored: Mapping[str, Any]) -> str:
        if self.embedded:  # PNG files of equal pixels differ from one version of Pillow to the next
            image = open_image(stored)
            return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()
        data, size = stored["bytes"], len(stored["bytes"] or b"")
        if data is None:  # its beginning tells images apart, where all of a large data set would be read by every process
            with open(stored["path"], "rb") as file:
                data, size = file.read(_BEGINNING), os.fstat(file.fileno()).st_size
        return hashlib.sha256(f"{size} ".encode() + data[:_BEGINNING]).hexdigest()


def load_image_data(recipe) -> ImageData:
    """The data that the flags of a recipe name; the embedded digits where they name none.

    Args:
        recipe: [`ImageDataArguments`].

    Raises:
        ValueError: when flags do not go together, and as [`load_named_images`] and [`load_digits_splits`] do.
    """
    limits = {name: getattr(recipe, name) for name in ("labelled_rows", "validation_share", "max_train_samples", "max_eval_samples")}
    columns = {name: getattr(recipe, name) for name in ("image_column_name", "label_column_name")}
    own = {"dataset_config_name": recipe.dataset_config_name, "validation_dir": recipe.validation_dir, **columns}
    if recipe.dataset_name and (recipe.train_dir or recipe.validation_dir):
        raise ValueError(
            f"--dataset_name {recipe.dataset_name} and --{'train' if recipe.train_dir else 'validation'}_dir name two sources of images. "
            "Pass one of them."
        )
    if not (recipe.dataset_name or recipe.train_dir):
        for flag, value in own.items():
            if value:
                raise ValueError(f"--{flag} {value} is about your own data, but none is given. Pass --train_dir or --dataset_name")
        return load_embedded_images(**limits)
    folders = {"train": recipe.train_dir, "validation": recipe.validation_dir}
    return load_named_images(
        recipe.dataset_name,
        recipe.dataset_config_name,
        {name: folder for name, folder in folders.items() if folder},
        **columns,
        **limits,
        train_val_split=recipe.train_val_split,
        cache_dir=recipe.cache_dir,
    )


def load_embedded_images(
    labelled_rows: int | None = 100,
    seed: int = 0,
    validation_share: float | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
) -> ImageData:
    """The default task: which digit was written? 1,797 images of 8x8 pixels; no network is used. See [`load_digits_splits`].

    Args:
        labelled_rows: how many labels the student gets, stratified; `None` gives it and its teacher every label.
        seed: of the split, not of any training.
        validation_share: hold out that share of the training images instead of the test part, to choose settings on. They are
            taken from the half whose labels nobody trains on, so teacher and labelled rows are those of the final run.
        max_train_samples: rows of each training split that are used.
        max_eval_samples: rows of the held-out split that are used.
    """
    from datasets import concatenate_datasets

    hidden = labelled_rows is not None
    parts = load_digits_splits(100 if labelled_rows is None else labelled_rows, seed, hide_labels=hidden, validation_share=validation_share)
    number = {label: label for label in range(len(DIGIT_NAMES))}
    parts = {name: _plain(split, "image", "label", number) for name, split in parts.items()}
    teacher_train, labelled, transfer = parts["teacher"], parts["few"], parts["transfer"]
    if not hidden:
        everything = concatenate_datasets([teacher_train, transfer])
        teacher_train, labelled, transfer = everything, everything, transfer.select([])
    held_out = "test" if validation_share is None else "validation"
    return ImageData(
        some_rows(teacher_train, max_train_samples, seed),
        some_rows(labelled, max_train_samples, seed),
        some_rows(transfer, max_train_samples, seed),
        {held_out: some_rows(parts[held_out], max_eval_samples, seed)},
        ("image",),
        list(DIGIT_NAMES),
        description="handwritten digits of scikit-learn, 8x8 pixels (embedded, no network)",
        embedded=True,
    )


def load_named_images(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    folders: Mapping[str, str] | None = None,
    image_column_name: str | None = None,
    label_column_name: str | None = None,
    labelled_rows: int | None = None,
    validation_share: float | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    train_val_split: float | None = 0.15,
    seed: int = 0,
    cache_dir: str | None = None,
) -> ImageData:
    """A data set of images on the Hub, or local folders with one folder of images for each class.

    Class names are those of a `ClassLabel`, or the sorted values of the label column. All cuts are stratified and seeded.

    Args:
        folders: split name (`train`, `validation`) -> folder, read by the `imagefolder` loader of datasets.
        image_column_name: default `image`, or `img`.
        label_column_name: default `label`, or `labels`.
        labelled_rows: the student sees labels of that many training rows; the others become transfer images. The teacher
            has every label.
        validation_share: hold out that share of the training rows, from every model, instead of the validation or test split:
            settings are chosen there, not on what is reported.
        max_train_samples: use only that many training rows, of every class as many as its share.
        max_eval_samples: the same for each held-out split.
        train_val_split: share of the training rows that is held out where there is neither a validation nor a test split, as
            in `run_image_classification.py`; `None` refuses such data.

    Raises:
        ValueError: when the data cannot be found, has no such columns or no held-out split, holds files that are no images, or
            labels that are not one class a row.
    """
    raw = _load(dataset_name, dataset_config_name, folders, cache_dir)
    if "train" not in raw:
        raise ValueError(f"The data has no 'train' split, only {sorted(raw)}. Pass --train_dir, or a data set with one.")
    held_out = [name for name in raw if name.startswith("validation")] or [name for name in raw if name == "test"]
    for name, value in {"validation_share": validation_share, "train_val_split": train_val_split}.items():
        if value is not None and not 0 < value < 1:
            raise ValueError(f"{name} must be a share above 0 and below 1, got {value!r}: it is held out of the training rows.")
    if not held_out and train_val_split is None and validation_share is None:
        raise ValueError(
            f"The data has no 'validation' or 'test' split, only {sorted(raw)}, so nothing could be measured. Pass --validation_dir, or "
            "--train_val_split 0.15 to hold out a part of the training images."
        )
    held_out = held_out if validation_share is None else []
    train, evaluation, names = _columns_of(raw, held_out, image_column_name, label_column_name, bool(folders))
    cut = validation_share if validation_share is not None else None if evaluation else train_val_split
    if cut is not None:
        chosen, rest = stratified_rows(train["label"], max(1, round(cut * len(train))), seed)
        train, evaluation = train.select(rest), {"validation": train.select(chosen)}
        if not len(train):
            raise ValueError(f"A share of {cut} of {len(chosen)} images leaves none to train on. Choose a smaller one, or add images.")
    for name, split in {"train": train, **evaluation}.items():
        check_images(split, name)
    train = some_rows(train, max_train_samples, seed)
    labelled, transfer = train, train.select([])
    if labelled_rows is not None and labelled_rows < len(train):
        if labelled_rows < len(names):
            raise ValueError(
                f"--labelled_rows {labelled_rows} is fewer than the {len(names)} classes: the student would not see some of them. Choose "
                f"at least {len(names)}."
            )
        chosen, rest = stratified_rows(train["label"], labelled_rows, seed)
        labelled = train.select(chosen)
        transfer = replace_labels(train, lambda labels: [MISSING] * len(labels)).select(rest)
    return ImageData(
        train,
        labelled,
        transfer,
        {name: some_rows(split, max_eval_samples, seed) for name, split in evaluation.items()},
        ("image",),
        names,
        description=dataset_name or ", ".join(sorted((folders or {}).values())),
    )


def _load(dataset_name: str | None, config_name: str | None, folders: Mapping[str, str] | None, cache_dir: str | None):
    from datasets import load_dataset

    for flag, folder in (folders or {}).items():
        if not os.path.isdir(folder):
            raise ValueError(f"--{flag}_dir {folder} is no folder. It should hold {_DIRECTORIES}.")
    what = f"in {', '.join(map(repr, folders.values()))}" if folders else f"{dataset_name!r}{f' ({config_name})' if config_name else ''}"
    try:
        if folders:
            files = {name: os.path.join(folder, "**") for name, folder in folders.items()}
            return load_dataset("imagefolder", data_files=files, cache_dir=cache_dir)
        return load_dataset(dataset_name, config_name, cache_dir=cache_dir)
    except (OSError, ValueError, RuntimeError) as error:
        cure = (
            f"It should hold {_DIRECTORIES}."
            if folders
            else "Check the name and the network; where there is none, download it elsewhere (`hf download --repo-type dataset`) and pass "
            "--train_dir and --validation_dir, or leave both out to use the embedded digits."
        )
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        raise ValueError(f"The images {what} could not be loaded ({type(error).__name__}: {reason}). {cure}") from error


def _columns_of(raw, held_out: list[str], image_column: str | None, label_column: str | None, folders: bool):
    """Training split, held-out splits and class names, with the columns of [`ImageData`] and labels 0..n-1."""
    from datasets import Image

    splits = {name: raw[name] for name in ("train", *held_out)}
    image = image_column or next((name for name in _IMAGE_COLUMNS if name in raw["train"].column_names), None)
    label = label_column or next((name for name in _LABEL_COLUMNS if name in raw["train"].column_names), None)
    for name, split in splits.items():
        for column, flag, wanted in ((image, "image", image_column), (label, "label", label_column)):
            if column is None or column not in split.column_names:
                cure = f"The folder should hold {_DIRECTORIES}." if folders and flag == "label" else f"Pass --{flag}_column_name."
                raise ValueError(f"The {name} data has no {flag} column {wanted or column or flag!r}, only {split.column_names}. {cure}")
    kind = raw["train"].features[image]
    if not isinstance(kind, Image) and getattr(kind, "dtype", None) not in ("string", "binary"):
        raise ValueError(
            f"The column {image!r} holds {kind}, not images. Pass --image_column_name with one of {raw['train'].column_names}."
        )
    names, number = _class_names(label, {name: split[label][:] for name, split in splits.items()}, raw["train"].features[label], folders)
    offset = 0
    for name, split in splits.items():
        splits[name] = _plain(split, image, label, number, offset)
        offset += len(split)
    return splits.pop("train"), splits, names


def _plain(split, image: str, label: str, number: Mapping[Any, int], offset: int | None = None):
    """The three columns of `ImageData`: images as they are stored, and labels as plain numbers, which take -100."""
    from datasets import Image

    kept = (image, label) if offset is not None else (image, label, "example_id")
    split = split.remove_columns([name for name in split.column_names if name not in kept])
    for old, new in ((image, "image"), (label, "label")):
        split = split if old == new else split.rename_column(old, new)
    split = split.cast_column("image", Image(decode=False))
    if offset is not None:
        split = _set_column(split, "example_id", lambda whole: np.arange(offset, offset + len(whole)))
    return replace_labels(split, lambda labels: [number.get(label, MISSING) for label in labels])


def _class_names(column: str, labels: dict[str, list], feature, folders: bool) -> tuple[list[str], dict[Any, int]]:
    """Names in order of the ids, and the number of each value."""
    if hasattr(feature, "feature"):
        raise ValueError(
            f"The column {column!r} holds lists: several labels an image are not supported here, one class is. Pass another "
            "--label_column_name."
        )
    if feature.dtype.startswith("float"):
        raise ValueError(
            f"The column {column!r} holds numbers with a fraction ({feature.dtype}): regression on images is not supported here, one "
            "class is. Pass another --label_column_name, or store classes as integers or names."
        )
    for name, own in labels.items():
        empty = sum(value is None for value in own)
        if empty:
            raise ValueError(
                f"{empty} of {len(own)} cells in column {column!r} of the {name} data are empty. Fill them or drop these rows; for images "
                "without a label use --labelled_rows."
            )
    known = range(len(feature.names)) if hasattr(feature, "names") else sorted(set(labels["train"]))
    for name, own in labels.items():
        unknown = sorted(set(own) - set(known))
        if unknown and hasattr(feature, "names"):
            raise ValueError(
                f"The column {column!r} of the {name} data has the labels {unknown[:5]}, which are no numbers of its {len(known)} class "
                "names. Drop these rows, or take another split: hidden labels cannot be measured."
            )
        if unknown or (folders and set(own) - set(labels["train"])):
            unknown = unknown or [feature.names[label] for label in sorted(set(own) - set(labels["train"]))]
            raise ValueError(f"The {name} data has labels that the training data lacks: {unknown[:5]}. Correct the split.")
    if len(known) < 2:
        raise ValueError(
            f"The column {column!r} holds {len(known)} class {list(known)}, so there is nothing to tell apart. Pass another "
            "--label_column_name, or data with two classes at least."
        )
    number = {value: i for i, value in enumerate(known)}
    if hasattr(feature, "names"):
        return list(feature.names), number
    numbered = list(known) == list(range(len(known))) and feature.dtype != "bool"
    return [f"LABEL_{value}" if numbered else str(value) for value in known], number


def replace_labels(split, change: Callable[[list], list[int]]):
    """`split` with `change(labels)` in the column `label`; images stay where they are, neither decoded nor copied.

    Args:
        change: gives one label for each; it sees those of unselected rows of the table too.
    """
    return _set_column(split, "label", lambda whole: change(whole["label"][:]))


def _set_column(split, name: str, values: Callable[[Any], Any]):
    from datasets import Dataset, Features, Value

    # In the table behind a selection, all rows of it: `add_column` would first write every selected image anew.
    whole = Dataset(split.data, info=split.info.copy())
    column = np.asarray(values(whole), dtype=np.int64)
    whole = whole.remove_columns(name) if name in whole.column_names else whole
    if not len(whole):
        return Dataset.from_dict({**whole[:], name: []}, features=Features({**whole.features, name: Value("int64")}))
    whole = whole.add_column(name, column)
    return whole if split._indices is None else Dataset(whole.data, info=whole.info.copy(), indices_table=split._indices)


def stratified_rows(labels, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of `rows` rows, of each class as many as its share (to within one), and of the others; both in order.

    Unlike scikit-learn's it takes classes of one row and fewer rows than classes.

    Example:
        >>> chosen, rest = stratified_rows([0, 0, 0, 0, 1, 1], 3, seed=0)
        >>> sorted([0, 0, 0, 0, 1, 1][row] for row in chosen), len(rest)
        ([0, 0, 1], 3)
    """
    generator = np.random.default_rng(seed)
    _, labels, counts = np.unique(np.asarray(labels[:]), return_inverse=True, return_counts=True)
    share = counts * (rows / len(labels))
    take = np.floor(share + 1e-9).astype(int)
    largest = np.lexsort((generator.random(len(counts)), take - share))
    take[largest[: rows - take.sum()]] += 1
    order = generator.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = rank < np.repeat(take, counts)
    return np.sort(order[chosen]), np.sort(order[~chosen])


def some_rows(split, rows: int | None, seed: int = 0):
    """`rows` rows of `split` of all classes: the first ones of a folder would be of one class. All where it has no more."""
    return split if rows is None or rows >= len(split) else split.select(stratified_rows(split["label"], rows, seed)[0])
