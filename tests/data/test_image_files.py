"""Images as they are stored: every way to hold one, every mode, and what is no image."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image, ImageOps
from transformers.image_utils import load_image

from hfdistill.data import image_files
from hfdistill.data.image_files import check_images, images_of, open_image, pixels_of, plain_image


RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)


def encoded(image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def path(tmp_path):
    own = tmp_path / "a.png"
    own.write_bytes(encoded(Image.fromarray(PIXELS)))
    return own


def test_every_way_to_store_an_image(path):
    data = path.read_bytes()
    for stored in (path, str(path), data, bytearray(data), {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}, PIXELS):
        assert (np.asarray(open_image(stored)) == PIXELS).all()
    assert (np.asarray(open_image(torch.from_numpy(PIXELS.copy()))) == PIXELS).all()
    assert (np.asarray(open_image({"bytes": data, "path": "not there"})) == PIXELS).all()  # bytes go first, as in datasets
    image = Image.fromarray(PIXELS)
    assert open_image(image) is image
    for grey in (PIXELS[..., 0], PIXELS[..., :1]):
        assert open_image(grey).mode == "L" and (np.asarray(open_image(grey)) == PIXELS[..., 0]).all()
    assert open_image(np.dstack([PIXELS, PIXELS[..., :1]])).mode == "RGBA"


def test_images_are_turned_as_a_camera_says():
    image = Image.fromarray(PIXELS)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = open_image(encoded(image, exif=exif.tobytes()))
    assert turned.size == (5, 7) and (np.asarray(turned) == np.rot90(PIXELS, -1)).all()
    assert (np.asarray(turned) == np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(image, exif=exif.tobytes())))))).all()


def test_a_header_is_read_without_the_pixels():
    data = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    assert open_image(data[:200], header_only=True).size == (64, 64)
    with pytest.raises(ValueError, match="No image could be read from row 3: OSError: .*truncated.*Repair or remove it"):
        open_image(data[:200], "row 3")


@pytest.mark.parametrize(
    "stored,message",
    [
        (b"no image", "No image could be read from the row: UnidentifiedImageError"),
        ({"bytes": b"", "path": "a.png"}, r"No image could be read from the row \(a.png\)"),
        ({"bytes": None, "path": "missing.png"}, r"\(missing.png\): FileNotFoundError"),
        ("missing.png", r"\(missing.png\): FileNotFoundError"),
        ({"bytes": None, "path": None}, "NoneType"),
        (None, "NoneType"),
        (PIXELS / 255, r"ndarray of type float64 and shape \(5, 7, 3\), not uint8"),
        (np.moveaxis(PIXELS, -1, 0), r"shape \(3, 5, 7\), not uint8 \(height, width\[, channels\]\)"),
    ],
    ids=["bytes", "empty", "path in a row", "path", "nothing", "none", "floats", "channels first"],
)
def test_what_is_no_image(stored, message):
    with pytest.raises(ValueError, match=message):
        open_image(stored, "the row")


def of_mode(mode):
    image = Image.fromarray(PIXELS)
    if mode == "P with transparency":
        image = image.quantize(8)
        image.info["transparency"] = bytes(range(8))
        return image
    if mode.endswith("A"):
        image = image.convert(mode)
        image.putalpha(Image.fromarray(PIXELS[..., 1]))
        return image
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "P with transparency", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_modes_become_grey_or_rgb_as_in_a_pipeline(mode):
    """A student is used through `pipeline("image-classification")`, whose `load_image` makes RGB of everything."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = plain_image(of_mode(mode))
    assert plain.mode == ("L" if mode in ("1", "L", "LA") else "RGB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = load_image(of_mode(mode))
    assert (np.asarray(plain.convert("RGB")) == np.asarray(expected)).all()


def test_deep_images_are_refused():
    """Pillow clips them: of 16 bits nearly everything becomes white, in training and in use."""
    deep = Image.fromarray((np.arange(16).reshape(4, 4) * 4000).astype(np.uint16))
    for image in (deep, Image.new("F", (2, 2)), Image.new("I", (2, 2))):
        with pytest.raises(ValueError, match=f"image of row 2 has mode '{image.mode}', more than 8 bits.*0..255"):
            plain_image(image, "row 2")


def rows(*stored):
    return Dataset.from_dict({"image": [{"bytes": own, "path": None} for own in stored], "label": list(range(len(stored)))})


def test_checking_names_the_row(monkeypatch):
    good = encoded(Image.fromarray(PIXELS))
    check_images(rows(good, good), "train")
    with pytest.raises(ValueError, match="No image could be read from row 1 of the validation data: UnidentifiedImageError"):
        check_images(rows(good, b"<html>", good), "validation")
    monkeypatch.setattr(image_files, "CHECKED_IMAGES", 3)
    check_images(rows(good, b"<html>", good, b"<html>", good), "train")  # rows 0, 2 and 4
    with pytest.raises(ValueError, match="row 4 "):
        check_images(rows(good, good, good, good, b"<html>"), "train")


def test_pixels_for_models_without_a_network():
    images = [Image.fromarray(PIXELS), Image.fromarray(PIXELS[..., 0])]
    data = rows(*map(encoded, images))
    assert [image.mode for image in images_of(data)] == ["RGB", "L"]
    values = pixels_of(data)
    assert values.shape == (2, 35) and values.dtype == np.float64
    assert np.allclose(values[1].reshape(5, 7) * 255, PIXELS[..., 0])
    assert np.abs(values[0].reshape(5, 7) * 255 - PIXELS @ [0.299, 0.587, 0.114]).max() < 1
    assert pixels_of(data, size=3).shape == (2, 9)
    with pytest.raises(ValueError, match=r"The images have \[12, 35\] pixels.*Pass size"):
        pixels_of(rows(encoded(images[0]), encoded(Image.new("L", (3, 4)))))
