"""Images as data sets store them: opened, checked, and brought to one of two modes, grey or RGB."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


CHECKED_IMAGES = 20_000

_GREY, _DEEP = ("1", "LA"), ("I", "F")
_ORIENTATION = 0x0112


def check_images(split, name: str) -> None:
    """Opens the headers of the images of a split, of 20,000 evenly spread ones where it has more.

    Raises:
        ValueError: for a row that holds no image, with its number.
    """
    count = len(split)
    rows = range(count) if count <= CHECKED_IMAGES else np.linspace(0, count - 1, CHECKED_IMAGES).astype(int).tolist()
    stored = split.select_columns(["image"])
    for row in rows:
        open_image(stored[row]["image"], f"row {row} of the {name} data", header_only=True)


def open_image(stored, what: str = "it", header_only: bool = False):
    """A PIL image, turned as its EXIF data say, from what a data set may hold: a file, its bytes, an array or an image.

    Args:
        stored: PIL image, path, bytes, `{"bytes", "path"}` as `datasets.Image(decode=False)` gives, or a uint8 array
            `(height, width)` or `(height, width, channels)`.
        what: how an error message names it.
        header_only: do not decode the pixels.

    Raises:
        ValueError: when it is no image.
    """
    from PIL import Image, ImageOps

    name = stored.get("path") if isinstance(stored, Mapping) else stored if isinstance(stored, (str, os.PathLike)) else None
    if isinstance(stored, Mapping):
        data = stored.get("bytes")
        stored = io.BytesIO(data) if data is not None else stored.get("path")
    elif isinstance(stored, (bytes, bytearray)):
        stored = io.BytesIO(stored)
    try:
        if isinstance(stored, (str, os.PathLike, io.BytesIO)):
            with Image.open(stored) as image:
                if header_only:
                    return image
                image.load()
                return ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION) is not None else image
        if isinstance(stored, Image.Image):
            return stored
        array = np.asarray(stored)
        if array.dtype == np.uint8 and (array.ndim == 2 or array.ndim == 3 and array.shape[2] in (1, 3, 4)):
            return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
        raise TypeError(f"{type(stored).__name__} of type {array.dtype} and shape {array.shape}, not uint8 (height, width[, channels])")
    except (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"No image could be read from {what}{f' ({name})' if name else ''}: {type(error).__name__}: {error}. Repair or remove it."
        ) from error


def plain_image(image, what: str = "it"):
    """`image` in mode "L" where it is grey, else "RGB", without transparency, as the pipelines of Transformers see it.

    Raises:
        ValueError: for more than 8 bits a pixel, which conversion would clip to white.
    """
    if image.mode in ("L", "RGB"):
        return image
    if image.mode.startswith(_DEEP):
        raise ValueError(
            f"The image of {what} has mode {image.mode!r}, more than 8 bits a pixel, of which pipelines of Transformers would clip all but "
            "the darkest to white. Bring it to 0..255 first (dataset.map)."
        )
    if image.mode in ("P", "PA"):  # by way of RGBA: Pillow warns of transparent palettes
        image = image.convert("RGBA")
    return image.convert("L" if image.mode in _GREY else "RGB")


def images_of(split) -> Iterator[Any]:
    """The images of a split, decoded one after another, in mode "L" or "RGB"."""
    return (plain_image(open_image(stored, f"row {row}"), f"row {row}") for row, stored in enumerate(split["image"]))


def pixels_of(split, size: int | None = None) -> np.ndarray:
    """Grey pixels of every image of a split, one row each, for models without a neural network.

    Args:
        size: bring every image to that many pixels a side; by default all must be of one size.

    Shapes:
        returns: float64 `(rows, height * width)`, from 0 to 1.

    Raises:
        ValueError: for images of several sizes.
    """
    grey = (image.convert("L") for image in images_of(split))
    rows = [np.asarray(image if size is None else image.resize((size, size)), dtype=np.float64).ravel() / 255 for image in grey]
    lengths = sorted(set(map(len, rows)))
    if len(lengths) > 1:
        raise ValueError(f"The images have {lengths[:4]} pixels, so their rows cannot be put together. Pass size, such as size=32.")
    return np.array(rows)
