# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Reads user-supplied image files, and writes label maps as images.

Error messages name the file and say what to do.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image, UnidentifiedImageError

from modeling_alignzeg import class_colors
from modeling_alignzeg.images_alignzeg import to_rgb


IMAGE_SUFFIXES = frozenset(".jpg .jpeg .png .webp .bmp .gif .tif .tiff .ppm .pgm".split())


# A file of a few kilobytes can claim terabytes of pixels. This is PIL's own limit, about 13,400 x 13,400.
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**26)
FILTERS = Lock()  # of warnings, which all threads share


def open_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens any image file as upright 8-bit RGB.

    Args:
        path: a file in any format that PIL reads; the first of several frames is used.
        max_pixels: larger images are rejected after reading their header, before they take memory. To read images
            above the default, raise `PIL.Image.MAX_IMAGE_PIXELS` too.

    Returns:
        A PIL image of mode `RGB`; see [`to_rgb`] for transparency, 16-bit images and EXIF orientation.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder.
        ValueError: the file is empty, not an image, truncated, damaged or too large.
    """
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder; expected an image file.")
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes); save or download it again.")
    return _decode(path, str(path), max_pixels)


def decode_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """As [`open_image`], for the contents of a file; error messages call it `name`."""
    if not data:
        raise ValueError(f"{name} is empty (0 bytes); save or download it again.")
    return _decode(io.BytesIO(data), name, max_pixels)


def label_picture(label: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Converts a label map to a palette image for up to 255 classes, or a 16-bit image for more.

    Args:
        label: Integers of shape (height, width), positions in `names`. Negative values mean no class: they become 255 in
            a palette image, 65535 in a 16-bit one.
        names: Class names, which determine the colours.
    """
    if len(names) > 255:
        return Image.fromarray(np.where(label < 0, 65535, label.astype(np.uint16)))
    picture = Image.fromarray(np.where(label < 0, 255, label.astype(np.uint8)))
    colors = np.full((256, 3), 128, np.uint8)
    colors[: len(names)] = class_colors(list(names))
    picture.putpalette(colors.flatten().tolist())
    return picture


def _decode(source: Path | io.BytesIO, path: str, max_pixels: int) -> Image.Image:
    try:
        with FILTERS, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `max_pixels` decides
            image = Image.open(source)
    except UnidentifiedImageError:
        raise ValueError(
            f"{path} is not an image, or PIL cannot read its format; convert it to PNG or JPEG."
        ) from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large ({error}); scale it down first.") from None
    except Exception as error:  # missing permissions, or headers on which PIL's plug-ins fail
        raise ValueError(f"{path} cannot be read: {error}.") from error
    with image:
        if image.width * image.height > max_pixels:
            raise ValueError(
                f"{path} has {image.width} x {image.height} pixels, more than {max_pixels:,}; scale it down first."
            )
        try:
            return to_rgb(image)
        except ValueError as error:
            raise ValueError(f"{path} cannot be used: {error}.") from error
