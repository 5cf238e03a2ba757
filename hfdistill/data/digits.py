"""digits: real images on every machine, the 1,797 handwritten digits that come with scikit-learn."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np

from .splits import MISSING


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


DIGIT_NAMES = tuple("0123456789")
"""Class names of the digits, in order of their ids."""

_LEVELS = 16


def load_digits_images() -> Dataset:
    """The handwritten digits of scikit-learn (the test part of UCI's optical digits): 8x8 pixels, grey, ten classes.

    The values 0 to 16 become 0 to 255. Users' processors enlarge the images; they are kept as they are.

    Returns:
        `datasets.Dataset`: columns `image` (PIL images of mode "L"), `label` (`ClassLabel` with the names "0" to "9") and
        `example_id` (the row in scikit-learn's order).

    Example:
        >>> row = load_digits_images()[0]
        >>> row["label"], row["image"].mode, row["image"].size
        (0, 'L', (8, 8))
    """
    from datasets import ClassLabel, Dataset, Features, Image, Value
    from PIL import Image as pillow
    from sklearn.datasets import load_digits

    bunch = load_digits()
    levels = np.rint(bunch.images * (255 / _LEVELS)).astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=list(DIGIT_NAMES)), "example_id": Value("int64")})
    columns = {"image": [pillow.fromarray(own) for own in levels], "label": bunch.target.tolist(), "example_id": list(range(len(levels)))}
    return Dataset.from_dict(columns, features=features)


def load_digits_splits(
    few: int = 100, seed: int = 0, test_size: float = 0.2, hide_labels: bool = True, validation_share: float | None = None
) -> DatasetDict:
    """The digits as a label-scarce task: a labelled half, another half without labels, and a test part nobody trains on.

    The twin of [`load_stdlib_docs_splits`]. The images outside the test part are halved into A and B. The teacher learns from A
    with its labels; the student has the labels of `few` rows of A and the unlabelled images of B, which its teacher has never
    seen. Every cut is stratified by digit.

    Args:
        few (`int`, defaults to 100): how many labelled rows the student gets.
        seed (`int`, defaults to 0): of all cuts.
        test_size (`float`, defaults to 0.2): share of the test part.
        hide_labels (`bool`, defaults to `True`): `False` leaves the labels of B where they are, for comparison runs.
        validation_share (`float`, *optional*): take that share of A and B together out of B, as a fifth split with labels on
            which settings are chosen. A, and so the teacher and the labelled rows, stay what they are without it.

    Returns:
        `datasets.DatasetDict`: `teacher` (A), `few` (rows of A), `transfer` (B, every label -100), `test`, and `validation`
        where it was asked for.

    Raises:
        ValueError: when `few` or `validation_share` do not leave every digit on both sides of a cut.
    """
    import pyarrow as pa
    from datasets import Dataset, DatasetDict
    from sklearn.model_selection import train_test_split

    data = load_digits_images()
    labels = data["label"][:]

    def cut(rows: list[int], **size) -> tuple[list[int], list[int]]:
        return train_test_split(rows, stratify=[labels[row] for row in rows], random_state=seed, **size)

    train, test = cut(list(range(len(data))), test_size=test_size)
    teacher, transfer = cut(train, test_size=0.5)
    digits = len(DIGIT_NAMES)
    if not digits <= few <= len(teacher) - digits:
        raise ValueError(
            f"few={few} labelled rows cannot be drawn from the teacher's {len(teacher)} so that every one of the {digits} digits occurs on "
            f"both sides. Choose few between {digits} and {len(teacher) - digits}."
        )
    rows = {"teacher": teacher, "few": cut(teacher, train_size=few)[0], "test": test}
    if validation_share is not None:
        size = round(validation_share * len(train))
        if not digits <= size <= len(transfer) - digits:
            raise ValueError(
                f"validation_share={validation_share!r} of the {len(train)} training images is {size}, but they are taken out of the "
                f"{len(transfer)} images without a label, where every digit must occur on both sides. Choose a share between "
                f"{digits / len(train):.3f} and {(len(transfer) - digits) / len(train):.3f}, such as 0.25 for half of them."
            )
        transfer, rows["validation"] = cut(transfer, test_size=size)
    splits = DatasetDict({name: data.select(indices) for name, indices in {**rows, "transfer": transfer}.items()})
    if not hide_labels:
        return splits
    # In an Arrow column a ClassLabel takes -100, which it would refuse as a Python value; all splits keep the same features.
    table = splits["transfer"].with_format("arrow")[:]
    hidden = pa.array([MISSING] * len(transfer), pa.int64())
    splits["transfer"] = Dataset(table.set_column(table.column_names.index("label"), table.schema.field("label"), hidden))
    return splits


def digits_fingerprint(dataset: Dataset) -> str:
    """sha256 of the pixels and labels of digits, in their order: equal fingerprints mean equal data, whatever wrote the files."""
    digest = hashlib.sha256()
    for image, label in zip(dataset["image"], dataset["label"], strict=True):
        digest.update(json.dumps([image.mode, image.size, label]).encode() + image.tobytes())
    return digest.hexdigest()
