"""digits: the images are scikit-learn's, the cuts are those that its numbers were measured with."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from datasets import concatenate_datasets
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from hfdistill.data.digits import DIGIT_NAMES, digits_fingerprint, load_digits_images, load_digits_splits


@pytest.fixture(scope="module")
def everything():
    return load_digits_images()


@pytest.fixture(scope="module")
def splits():
    return load_digits_splits()


def pixels(split) -> np.ndarray:
    return np.array([np.asarray(image) for image in split["image"]])


def test_images_are_those_of_scikit_learn(everything):
    bunch = load_digits()
    assert everything.features["label"].names == list(DIGIT_NAMES) == [str(name) for name in bunch.target_names]
    assert everything["label"][:] == bunch.target.tolist() and everything["example_id"][:] == list(range(1797))
    own = pixels(everything)
    assert own.shape == (1797, 8, 8) and own.dtype == np.uint8 and {image.mode for image in everything["image"]} == {"L"}
    assert np.abs(own.astype(float) * 16 / 255 - bunch.images).max() < 0.04  # half a grey value
    assert own.min() == 0 and own.max() == 255
    # Counts of the reference page.
    assert np.bincount(everything["label"]).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_splits(everything, splits):
    ids = {name: splits[name]["example_id"][:] for name in splits}
    labels = np.array(everything["label"])
    assert {name: len(own) for name, own in ids.items()} == {"teacher": 718, "few": 100, "transfer": 719, "test": 360}
    assert set(ids["few"]) < set(ids["teacher"])
    assert sorted(ids["teacher"] + ids["transfer"] + ids["test"]) == list(range(1797))
    for own in ids.values():
        expected = np.bincount(labels) * len(own) / 1797
        assert (np.abs(np.bincount(labels[own], minlength=10) - expected) < 1.5).all()
    for name in ("teacher", "few", "test"):
        assert splits[name]["label"][:] == labels[ids[name]].tolist()
    assert set(splits["transfer"]["label"]) == {-100}
    every = pixels(everything)
    for name in splits:
        assert (pixels(splits[name]) == every[ids[name]]).all()
    assert {name: splits[name].features for name in splits} == dict.fromkeys(splits, everything.features)
    assert concatenate_datasets([splits["few"], splits["transfer"]])["label"][99:102] == [splits["few"]["label"][99], -100, -100]


def test_the_test_part_is_that_of_published_numbers(splits):
    """`train_test_split(..., test_size=0.2, stratify=y, random_state=0)` on the bare arrays, as anybody would cut them."""
    x, y = load_digits(return_X_y=True)
    _, test, _, labels = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)
    assert splits["test"]["label"][:] == labels.tolist()
    assert np.abs(pixels(splits["test"]).reshape(360, 64).astype(float) * 16 / 255 - test).max() < 0.04


def test_labels_are_scarce_enough_to_leave_room(splits):
    """Logistic regression on 100 labels: .899 ± .006 by the reference page, on other rows."""
    few, test = (pixels(splits[name]).reshape(-1, 64) / 255 for name in ("few", "test"))
    score = LogisticRegression(max_iter=2000).fit(few, splits["few"]["label"][:]).score(test, splits["test"]["label"][:])
    assert 0.86 < score < 0.94


def test_a_validation_part_comes_out_of_the_unlabelled_half(everything, splits):
    with_validation = load_digits_splits(validation_share=0.25)
    for name in ("teacher", "few", "test"):
        assert with_validation[name]["example_id"][:] == splits[name]["example_id"][:]
    validation, transfer = (with_validation[name]["example_id"][:] for name in ("validation", "transfer"))
    assert len(validation) == round(0.25 * 1437) and sorted(validation + transfer) == sorted(splits["transfer"]["example_id"])
    labels = np.array(everything["label"])
    assert with_validation["validation"]["label"][:] == labels[validation].tolist()
    assert (np.abs(np.bincount(labels[validation]) - np.bincount(labels) / 5) < 1.5).all()
    assert set(with_validation["transfer"]["label"]) == {-100}


def test_labels_may_be_shown(everything, splits):
    shown = load_digits_splits(hide_labels=False)["transfer"]
    assert shown["example_id"][:] == splits["transfer"]["example_id"][:]
    assert shown["label"][:] == np.array(everything["label"])[shown["example_id"]].tolist()


def test_splits_repeat_and_follow_the_seed(splits):
    again, other = load_digits_splits(), load_digits_splits(seed=1)
    for name in splits:
        assert again[name]["example_id"][:] == splits[name]["example_id"][:] != other[name]["example_id"][:]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"few": 9}, r"few=9 labelled rows.*Choose few between 10 and 708"),
        ({"few": 709}, "few=709"),
        ({"validation_share": 0.5}, r"0.5 of the 1437 training images is 718.*out of the 719.*between 0.007 and 0.493"),
        ({"validation_share": 0.005}, "validation_share=0.005"),
    ],
)
def test_cuts_that_cannot_be_made(options, message):
    with pytest.raises(ValueError, match=message):
        load_digits_splits(**options)


def test_fingerprint_sees_pixels_labels_and_order(everything):
    data = everything.select([0, 1])
    digest = hashlib.sha256()
    for image, label in zip(data["image"], data["label"]):
        digest.update(json.dumps(["L", [8, 8], label]).encode() + np.asarray(image).tobytes())
    assert digits_fingerprint(data) == digest.hexdigest()
    assert digits_fingerprint(data.select([1, 0])) != digest.hexdigest()
    assert digits_fingerprint(data.map(lambda row: {"label": 9 - row["label"]})) != digest.hexdigest()
    other = data.map(lambda row: {"image": Image.eval(row["image"], lambda value: max(value, 1))})
    assert digits_fingerprint(other) != digest.hexdigest()


def test_importing_needs_neither_pillow_nor_datasets():
    """Who distils text has no Pillow; None in sys.modules makes every import of it fail."""
    modules = "digits images image_files image_augmentation image_collator".split()
    code = "import sys; sys.modules['PIL'] = None\n" + "\n".join(f"import hfdistill.data.{name}" for name in modules)
    code += "\nprint(sorted({'datasets', 'transformers', 'sklearn'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr
