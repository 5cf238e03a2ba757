"""Image classification data: the embedded digits, folders of PNG files, and data sets as the Hub has them."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as pillow
from transformers import ViTConfig

from hfdistill.data import images as module_under_test
from hfdistill.data.digits import load_digits_images, load_digits_splits
from hfdistill.data.image_files import images_of
from hfdistill.data.images import (
    load_embedded_images,
    load_image_data,
    load_named_images,
    replace_labels,
    some_rows,
    stratified_rows,
)
from hfdistill.data.splits import match_labels


def picture(number: int) -> pillow.Image:
    """A small image that no other number gives."""
    return pillow.fromarray(np.full((4, 6, 3), [number % 256, number // 256, 7], dtype=np.uint8))


def number_of(image) -> int:
    low, high, _ = np.asarray(image)[0, 0].tolist()
    return low + 256 * high


def folder(root: Path, counts: dict[str, int], start: int = 0) -> str:
    """One folder a class; pictures are numbered in the order of classes."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(start + i).save(root / name / f"{i:03}.png")
        start += count
    return str(root)


def hub(root: Path, monkeypatch=None, **splits) -> str:
    """A local folder of parquet files, which datasets loads by name as it loads one of the Hub."""
    root.mkdir(exist_ok=True)
    for name, data in splits.items():
        data.to_parquet(str(root / f"{name}-00000.parquet"))
    return str(root)


def table(labels, feature=None, start=0, image="image", label="label"):
    features = None if feature is None else Features({image: Image(), label: feature})
    return Dataset.from_dict(
        {image: [{"bytes": png(start + i), "path": None} for i in range(len(labels))], label: labels}, features=features
    ).cast_column(image, Image())


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def numbers(split) -> list[int]:
    return [number_of(image) for image in images_of(split)]


def rows(data) -> dict:
    return {"teacher_train": data.teacher_train, "labelled": data.labelled, "transfer": data.transfer, **data.evaluation}


@pytest.fixture(scope="module")
def digits():
    return load_embedded_images()


# ---- The embedded task ----


def test_the_embedded_task_mirrors_the_splits_of_digits(digits):
    splits = load_digits_splits()
    for name, own in (("teacher", digits.teacher_train), ("few", digits.labelled), ("transfer", digits.transfer)):
        assert own["example_id"][:] == splits[name]["example_id"][:] and own["label"][:] == splits[name]["label"][:]
    assert list(digits.evaluation) == ["test"] and digits.evaluation["test"]["label"][:] == splits["test"]["label"][:]
    assert digits.embedded and digits.label_names == list("0123456789") and digits.has_classes
    assert digits.label_config["id2label"][3] == "3" and digits.label_config["num_labels"] == 10
    own, theirs = next(images_of(digits.transfer)), splits["transfer"][0]["image"]
    assert own.mode == "L" and own.tobytes() == theirs.tobytes()


def test_an_image_has_one_number_wherever_it_is(digits):
    seen = {}
    for split in rows(digits).values():
        assert len(set(split["example_id"])) == len(split)
        for number, image in zip(split["example_id"], images_of(split)):
            assert seen.setdefault(number, image.tobytes()) == image.tobytes()
    assert len(seen) == 1797
    assert not set(digits.transfer["example_id"]) & set(digits.teacher_train["example_id"])


def test_rows_of_the_student_are_put_together_and_keep_missing_labels(digits):
    mixed = concatenate_datasets([digits.labelled, digits.transfer])
    assert len(mixed) == 819 and mixed.features == digits.labelled.features
    assert mixed["label"][:] == digits.labelled["label"][:] + [-100] * 719


def test_every_label(digits):
    data = load_embedded_images(labelled_rows=None)
    assert data.labelled["example_id"][:] == data.teacher_train["example_id"][:] and len(data.labelled) == 1437 and not len(data.transfer)
    truth = load_digits_images()["label"][:]
    assert data.labelled["label"][:] == [truth[number] for number in data.labelled["example_id"]]
    assert data.evaluation["test"]["example_id"][:] == digits.evaluation["test"]["example_id"][:]


@pytest.mark.parametrize("labelled_rows", [100, None])
def test_settings_are_not_chosen_on_the_test_part(labelled_rows):
    final = load_embedded_images(labelled_rows)
    data = load_embedded_images(labelled_rows, validation_share=0.25)
    assert list(data.evaluation) == ["validation"]
    ids = {name: set(split["example_id"]) for name, split in rows(data).items()}
    assert not ids["validation"] & (ids["teacher_train"] | ids["labelled"] | ids["transfer"] | set(final.evaluation["test"]["example_id"]))
    truth = load_digits_images()["label"][:]
    assert data.evaluation["validation"]["label"][:] == [truth[number] for number in data.evaluation["validation"]["example_id"]]
    if labelled_rows:
        for name in ("teacher_train", "labelled"):
            assert rows(data)[name]["example_id"][:] == rows(final)[name]["example_id"][:]
        assert ids["validation"] | ids["transfer"] == set(final.transfer["example_id"])


def test_fewer_rows_are_of_every_class(digits):
    data = load_embedded_images(max_train_samples=40, max_eval_samples=20)
    assert [len(split) for split in rows(data).values()] == [40, 40, 40, 20]
    for name, count in (("teacher_train", 4), ("test", 2)):
        assert set(Counter(rows(data)[name]["label"]).values()) <= {count - 1, count, count + 1}
    assert set(data.labelled["example_id"]) < set(digits.labelled["example_id"])


# ---- Folders ----


@pytest.fixture
def cache(tmp_path):
    return {"cache_dir": str(tmp_path / "cache")}


def test_folders(tmp_path, cache):
    folders = {
        "train": folder(tmp_path / "a", {"cat": 6, "bird": 4}),
        "validation": folder(tmp_path / "b", {"cat": 2, "bird": 3}, start=300),
    }
    data = load_named_images(folders=folders, **cache)
    assert data.label_names == ["bird", "cat"] and list(data.evaluation) == ["validation"] and not data.embedded
    # cat was written first, bird is class 0
    assert dict(zip(numbers(data.teacher_train), data.teacher_train["label"])) == {
        **dict.fromkeys(range(6), 1),
        **dict.fromkeys(range(6, 10), 0),
    }
    held_out = data.evaluation["validation"]
    assert dict(zip(numbers(held_out), held_out["label"])) == {300: 1, 301: 1, 302: 0, 303: 0, 304: 0}
    assert data.labelled["example_id"][:] == data.teacher_train["example_id"][:] == list(range(10))
    assert held_out["example_id"][:] == list(range(10, 15)) and not len(data.transfer)


def test_a_share_is_held_out_where_there_is_no_validation_folder(tmp_path, cache):
    folders = {"train": folder(tmp_path / "a", {"cat": 20, "dog": 40})}
    data = load_named_images(folders=folders, **cache)
    train, held_out = data.teacher_train, data.evaluation["validation"]
    assert len(held_out) == 9 and Counter(held_out["label"]) == {0: 3, 1: 6}  # 15 % of each class
    assert sorted(numbers(train) + numbers(held_out)) == list(range(60))
    again = load_named_images(folders=folders, **cache)
    assert again.evaluation["validation"]["example_id"][:] == held_out["example_id"][:]
    half = load_named_images(folders=folders, train_val_split=0.5, **cache)
    assert Counter(half.evaluation["validation"]["label"]) == {0: 10, 1: 20}
    with pytest.raises(ValueError, match=r"no 'validation' or 'test' split, only \['train'\].*--train_val_split 0.15"):
        load_named_images(folders=folders, train_val_split=None, **cache)


def test_labels_are_hidden_from_the_student_alone(tmp_path, cache):
    folders = {"train": folder(tmp_path / "a", {"cat": 20, "dog": 40}), "validation": folder(tmp_path / "b", {"cat": 1, "dog": 1}, 100)}
    data = load_named_images(folders=folders, labelled_rows=6, **cache)
    assert len(data.teacher_train) == 60 and Counter(data.labelled["label"]) == {0: 2, 1: 4}
    assert set(data.transfer["label"]) == {-100} and len(data.transfer) == 54
    truth = dict(zip(data.teacher_train["example_id"], data.teacher_train["label"]))
    assert all(truth[number] == label for number, label in zip(data.labelled["example_id"], data.labelled["label"]))
    # Numbers still name the same images.
    assert numbers(data.labelled) == data.labelled["example_id"][:] and numbers(data.transfer) == data.transfer["example_id"][:]
    assert sorted(numbers(data.labelled) + numbers(data.transfer)) == list(range(60))
    assert load_named_images(folders=folders, labelled_rows=60, **cache).labelled["label"][:] == data.teacher_train["label"][:]


def test_validation_rows_are_kept_from_every_model(tmp_path, cache):
    folders = {"train": folder(tmp_path / "a", {"cat": 20, "dog": 40}), "validation": folder(tmp_path / "b", {"cat": 1, "dog": 1}, 100)}
    data = load_named_images(folders=folders, labelled_rows=6, validation_share=0.3, **cache)
    held_out = numbers(data.evaluation["validation"])
    assert list(data.evaluation) == ["validation"] and len(held_out) == 18 and max(held_out) < 60
    assert sorted(held_out + numbers(data.teacher_train)) == list(range(60))
    assert sorted(numbers(data.labelled) + numbers(data.transfer)) == sorted(numbers(data.teacher_train))


def test_limits_take_rows_of_every_class(tmp_path, cache):
    """Folders are read class by class, so the first rows would be of one class."""
    folders = {"train": folder(tmp_path / "a", {"cat": 30, "dog": 30}), "validation": folder(tmp_path / "b", {"cat": 10, "dog": 10}, 100)}
    data = load_named_images(folders=folders, max_train_samples=10, max_eval_samples=4, **cache)
    assert Counter(data.teacher_train["label"]) == {0: 5, 1: 5} and Counter(data.evaluation["validation"]["label"]) == {0: 2, 1: 2}
    assert numbers(data.teacher_train) == data.teacher_train["example_id"][:]  # numbers are those of the whole


@pytest.mark.parametrize(
    "train,validation,options,message",
    [
        ({"cat": 3}, {"cat": 1}, {}, r"no label column 'label', only \['image'\]. The folder should hold one folder of images for each"),
        ({"cat": 3, "dog": 3}, {"cat": 1, "fox": 1}, {}, r"The validation data has labels that the training data lacks: \['fox'\]"),
        ({"cat": 3, "dog": 3}, None, {"labelled_rows": 1}, "--labelled_rows 1 is fewer than the 2 classes"),
        ({"cat": 3, "dog": 3}, None, {"train_val_split": 1.5}, "train_val_split must be a share above 0 and below 1, got 1.5"),
        ({"cat": 3, "dog": 3}, None, {"validation_share": 0.0}, "validation_share must be a share"),
        ({"cat": 1, "dog": 1}, None, {"train_val_split": 0.9}, "A share of 0.9 of 2 images leaves none to train on"),
        ({"cat": 3, "dog": 3}, None, {"image_column_name": "photo"}, r"no image column 'photo', only \['image', 'label'\].*--image_column"),
    ],
    ids=["one class", "unknown class", "few", "share", "validation share", "nothing left", "column"],
)
def test_folders_that_do_not_fit(train, validation, options, message, tmp_path, cache):
    folders = {"train": folder(tmp_path / "a", train)}
    if validation:
        folders["validation"] = folder(tmp_path / "b", validation, start=50)
    with pytest.raises(ValueError, match=message):
        load_named_images(folders=folders, **options, **cache)


def test_a_file_that_is_no_image_is_named(tmp_path, cache):
    folders = {"train": folder(tmp_path / "a", {"cat": 3, "dog": 3})}
    (tmp_path / "a" / "dog" / "001.png").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"No image could be read from row \d of the (train|validation) data \(.*001.png\)"):
        load_named_images(folders=folders, **cache)


def test_folders_that_are_not_there(tmp_path, cache):
    with pytest.raises(ValueError, match="--train_dir .*missing is no folder. It should hold one folder of images for each class"):
        load_named_images(folders={"train": str(tmp_path / "missing")}, **cache)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="The images in '.*empty' could not be loaded"):
        load_named_images(folders={"train": str(tmp_path / "empty")}, **cache)


# ---- Data sets of the Hub ----


@pytest.mark.parametrize(
    "labels,feature,names,ids",
    [
        ([1, 0, 1, 0], ClassLabel(names=["wolf", "ape"]), ["wolf", "ape"], [1, 0, 1, 0]),
        (["wolf", "ape", "wolf", "ape"], Value("string"), ["ape", "wolf"], [1, 0, 1, 0]),
        ([1, 0, 1, 0], Value("int32"), ["LABEL_0", "LABEL_1"], [1, 0, 1, 0]),
        ([7, 3, 7, 3], Value("int64"), ["3", "7"], [1, 0, 1, 0]),
        ([True, False, True, False], Value("bool"), ["False", "True"], [1, 0, 1, 0]),
    ],
    ids=["class label", "strings", "ids", "sparse", "bools"],
)
def test_kinds_of_labels(labels, feature, names, ids, tmp_path, cache):
    name = hub(tmp_path / "data", train=table(labels, feature), test=table(labels[:2], feature, start=10))
    data = load_named_images(name, **cache)
    assert data.label_names == names and data.teacher_train["label"][:] == ids and data.evaluation["test"]["label"][:] == ids[:2]
    assert data.teacher_train.features == data.evaluation["test"].features
    assert data.teacher_train.features["label"] == Value("int64") and data.teacher_train.column_names.count("example_id") == 1
    hidden = load_named_images(name, labelled_rows=2, **cache)
    assert hidden.transfer["label"][:] == [-100, -100]


def test_columns_by_other_names(tmp_path, cache):
    """CIFAR-10 calls the column `img`, CIFAR-100 has two label columns; a column `example_id` of the data itself has another meaning."""
    own = {"image": "img", "label": "fine"}
    train = table([0, 1, 2], Value("int64"), **own).add_column("coarse", [0, 0, 1]).add_column("example_id", ["x", "y", "z"])
    name = hub(tmp_path / "data", train=train, validation=table([2, 1], Value("int64"), start=5, **own))
    data = load_named_images(name, label_column_name="fine", **cache)
    assert sorted(data.teacher_train.column_names) == ["example_id", "image", "label"]
    assert data.teacher_train["example_id"][:] == [0, 1, 2] and data.evaluation["validation"]["example_id"][:] == [3, 4]
    assert numbers(data.teacher_train) == [0, 1, 2] and numbers(data.evaluation["validation"]) == [5, 6]
    with pytest.raises(
        ValueError, match=r"no label column 'label', only \['img', 'fine', 'coarse', 'example_id'\]. Pass --label_column_name"
    ):
        load_named_images(name, **cache)


def test_paths_in_a_column_of_text(tmp_path, cache):
    root = Path(folder(tmp_path / "a", {"x": 2, "y": 1}))
    paths = [str(root / "x" / "000.png"), str(root / "y" / "000.png")]
    name = hub(tmp_path / "data", train=Dataset.from_dict({"image": paths, "label": [0, 1]}))
    data = load_named_images(name, validation_share=0.5, **cache)
    assert numbers(data.teacher_train) + numbers(data.evaluation["validation"]) in ([0, 2], [2, 0])


@pytest.mark.parametrize(
    "splits,options,message",
    [
        (
            {"train": ([0.5, 1.0], Value("float32"))},
            {},
            "'label' holds numbers with a fraction .float32.: regression on images is not supp",
        ),
        ({"train": ([[0], [0, 1]], List(Value("int64")))}, {}, "'label' holds lists: several labels an image are not supported here"),
        ({"train": ([0, 0, 0], Value("int64"))}, {}, r"'label' holds 1 class \[0\], so there is nothing to tell apart"),
        ({"train": ([0, 1, None], Value("int64"))}, {}, "1 of 3 cells in column 'label' of the train data are empty.*--labelled_rows"),
        (
            {"train": ([0, 1], ClassLabel(names=["a", "b"])), "test": ([-1, -1], ClassLabel(names=["a", "b"]))},
            {},
            r"'label' of the test data has the labels \[-1\], which are no numbers of its 2 class names",
        ),
        ({"train": (["a", "b"], None), "test": (["a", "c"], None)}, {}, r"The test data has labels that the training data lacks: \['c'\]"),
        ({"test": ([0, 1], None)}, {}, r"no 'train' split, only \['test'\]. Pass --train_dir"),
        ({"train": ([0, 1], None)}, {"train_val_split": None}, "so nothing could be measured. Pass --validation_dir"),
        ({"train": ([0, 1], None)}, {"label_column_name": "kind"}, r"The train data has no label column 'kind', only \['image', 'label'\]"),
        ({"train": ([0, 1], None)}, {"image_column_name": "label"}, "The column 'label' holds .*not images. Pass --image_column_name"),
    ],
    ids=["regression", "lists", "one class", "empty", "hidden test labels", "new label", "no train", "no test", "column", "no images"],
)
def test_data_sets_that_do_not_fit(splits, options, message, tmp_path, cache):
    def make(labels, feature):
        data = table([None if isinstance(label, int) and label < 0 else label for label in labels], feature)
        if -1 in labels:  # as on the Hub, where the labels of a test part are -1
            arrow = data.with_format("arrow")[:]
            data = Dataset(arrow.set_column(1, arrow.schema.field("label"), [labels]))
        return data

    name = hub(tmp_path / "data", **{split: make(*content) for split, content in splits.items()})
    with pytest.raises(ValueError, match=message):
        load_named_images(name, **options, **cache)


def test_a_data_set_that_is_not_there(cache):
    with pytest.raises(
        ValueError, match=r"The images 'nobody/nothing' \(tiny\) could not be loaded .*Check the name.*--train_dir and --val"
    ):
        load_named_images("nobody/nothing", "tiny", **cache)


# ---- Flags ----


def flags(**given):
    names = "dataset_name dataset_config_name train_dir validation_dir image_column_name label_column_name labelled_rows validation_share"
    names += " max_train_samples max_eval_samples cache_dir"
    return SimpleNamespace(**{**dict.fromkeys(names.split()), "train_val_split": 0.15, **given})


def test_flags(tmp_path, monkeypatch):
    data = load_image_data(flags(labelled_rows=50, validation_share=0.2, max_eval_samples=30))
    assert (
        data.embedded and len(data.labelled) == 50 and list(data.evaluation) == ["validation"] and len(data.evaluation["validation"]) == 30
    )
    source = folder(tmp_path / "a", {"cat": 10, "dog": 10})
    data = load_image_data(flags(train_dir=source, train_val_split=0.5, labelled_rows=4, cache_dir=str(tmp_path / "cache")))
    assert data.label_names == ["cat", "dog"] and len(data.evaluation["validation"]) == 10 and len(data.transfer) == 6
    assert data.description == source
    asked = []
    own = table(["a", "b"], image="photo", label="kind")
    monkeypatch.setattr("datasets.load_dataset", lambda *names, **more: asked.append((names, more)) or DatasetDict(train=own, test=own))
    named = flags(
        dataset_name="someone/pets", dataset_config_name="small", image_column_name="photo", label_column_name="kind", cache_dir="c"
    )
    data = load_image_data(named)
    assert asked == [(("someone/pets", "small"), {"cache_dir": "c"})] and data.label_names == ["a", "b"]


@pytest.mark.parametrize(
    "given,message",
    [
        ({"dataset_name": "a/b", "train_dir": "c"}, "--dataset_name a/b and --train_dir name two sources of images"),
        ({"dataset_name": "a/b", "validation_dir": "c"}, "--dataset_name a/b and --validation_dir name two"),
        ({"validation_dir": "c"}, "--validation_dir c is about your own data, but none is given. Pass --train_dir or --dataset_name"),
        ({"label_column_name": "kind"}, "--label_column_name kind is about your own data"),
        ({"dataset_config_name": "small"}, "--dataset_config_name small"),
    ],
)
def test_flags_that_do_not_go_together(given, message):
    with pytest.raises(ValueError, match=message):
        load_image_data(flags(**given))


# ---- Labels in a teacher's order, and fingerprints ----


@pytest.mark.parametrize("labelled_rows", [100, None], ids=["selected", "concatenated"])
def test_the_order_of_a_teacher(labelled_rows, monkeypatch):
    data = load_embedded_images(labelled_rows)
    backwards = ViTConfig(id2label={i: str(9 - i) for i in range(10)})
    monkeypatch.setattr(Image, "decode_example", lambda *args, **kwargs: pytest.fail("an image was decoded"))
    monkeypatch.setattr(Image, "encode_example", lambda *args, **kwargs: pytest.fail("an image was encoded"))
    matched = match_labels(data, backwards)
    assert matched.label_names == [str(9 - i) for i in range(10)] and isinstance(matched, module_under_test.ImageData)
    for name, split in rows(matched).items():
        before = rows(data)[name]
        assert split["label"][:] == [label if label == -100 else 9 - label for label in before["label"]]
        assert split["example_id"][:] == before["example_id"][:] and split["image"][:] == before["image"][:]
        assert split.features == before.features
    assert match_labels(data, ViTConfig(id2label=dict(enumerate("0123456789")))).label_names == data.label_names
    with pytest.raises(ValueError, match="could not be told right from wrong"):
        match_labels(data, ViTConfig(id2label={0: "cat", 1: "dog"}))


def test_labels_are_replaced_without_touching_images():
    data = table([0, 1, 2, 1], Value("int64")).select([3, 0, 2])
    changed = replace_labels(data, lambda labels: [10 * label for label in labels])
    assert changed["label"][:] == [10, 0, 20] and numbers(changed) == [3, 0, 2] and data["label"][:] == [1, 0, 2]
    assert replace_labels(data.select(range(1, 3)), lambda labels: [5] * len(labels))["label"][:] == [5, 5]
    assert concatenate_datasets([changed, changed.select([1])])["label"][:] == [10, 0, 20, 0]


def test_fingerprint_of_folders(tmp_path):
    def load(name, counts=None, **options):
        path = tmp_path / name
        if counts:
            folder(path, counts)
        return load_named_images(folders={"train": str(path)}, cache_dir=str(tmp_path / "cache"), **options)

    counts = {"cat": 6, "dog": 6}
    first = load("a", counts).fingerprint()
    assert load("b", counts).fingerprint() == first  # wherever it lies
    assert load("a", labelled_rows=4).fingerprint() != first  # labels that are hidden
    assert load("a", train_val_split=0.3).fingerprint() != first  # other rows held out
    assert load("c", {"cow": 6, "dog": 6}).fingerprint() != first  # other names
    assert load("d", {"cat": 7, "dog": 5}).fingerprint() != first  # the same images, one of them in another class
    folder(tmp_path / "e", counts)
    picture(999).save(tmp_path / "e" / "dog" / "004.png")
    assert load("e").fingerprint() != first


def test_fingerprint_of_digits_counts_pixels(digits, monkeypatch):
    first = digits.fingerprint()
    assert load_embedded_images().fingerprint() == first != load_embedded_images(labelled_rows=101).fingerprint()

    def tiff(change):
        def to_bytes(image):
            buffer = io.BytesIO()
            pillow.eval(image, change).save(buffer, "TIFF")
            return buffer.getvalue()

        return to_bytes

    monkeypatch.setattr("datasets.features.image.image_to_bytes", tiff(lambda value: value))
    other = load_embedded_images()
    assert other.labelled[0]["image"]["bytes"] != digits.labelled[0]["image"]["bytes"] and other.fingerprint() == first
    monkeypatch.setattr("datasets.features.image.image_to_bytes", tiff(lambda value: value // 2))
    assert load_embedded_images().fingerprint() != first


# ---- Cuts ----


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, 6), min_size=1, max_size=80), st.floats(0, 1), st.integers(0, 5))
def test_stratified_rows(labels, share, seed):
    count = round(share * len(labels))
    chosen, rest = stratified_rows(labels, count, seed)
    assert len(chosen) == count and sorted([*chosen.tolist(), *rest.tolist()]) == list(range(len(labels)))
    assert chosen.tolist() == sorted(chosen.tolist()) and rest.tolist() == sorted(rest.tolist())
    taken = Counter(labels[row] for row in chosen)
    for label, rows_of_class in Counter(labels).items():
        assert abs(taken[label] - rows_of_class * count / len(labels)) < 1
    assert (stratified_rows(labels, count, seed)[0] == chosen).all()


def test_stratified_rows_are_random_within_a_class():
    labels = [0, 1] * 50
    hits = np.zeros(100)
    for seed in range(300):
        hits[stratified_rows(labels, 20, seed)[0]] += 1
    assert 35 < hits.min() and hits.max() < 90  # 60 expected, standard deviation 7
    # Which class gets the odd row is random too.
    assert 20 < sum(labels[stratified_rows(labels, 1, seed)[0][0]] for seed in range(80)) < 60


def test_some_rows_leave_short_data_alone():
    data = table([0, 1], Value("int64"))
    assert some_rows(data, None) is data and some_rows(data, 2) is data and len(some_rows(data, 1)) == 1
