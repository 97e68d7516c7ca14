# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Reads images and label maps of any kind (PIL images of all modes, files, arrays and tensors) as arrays of one type.

PIL does the decoding and resampling, so pixels are the same with and without torchvision.
"""

import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import ChannelDimension, load_image


EXIF_ORIENTATION = 0x0112
# Maps EXIF orientation to the transpose that makes the image upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to upright 8-bit RGB.

    EXIF orientation is applied. Transparency is composited on white, as in Transformers. 16-bit modes are scaled from
    their full range. The modes `I` and `F` have no fixed range: values within 0 to 1 (`F`), 0 to 255 or 0 to 65535 (`I`)
    are assumed to use that range; others are stretched from minimum to maximum. NaN and infinity count as the smallest
    finite value.

    Args:
        image: a PIL image of any mode, decoded or not.

    Returns:
        A PIL image of mode `RGB` without EXIF data; `image` itself if nothing had to change.

    Raises:
        ValueError: the image has no pixels, its file is truncated or damaged, or its transparency is invalid.
    """
    if 0 in image.size:
        raise ValueError(f"it has no pixels: its size is {image.width} x {image.height}")
    try:
        image.load()
    except Exception as error:  # PIL's decoders raise many types
        raise ValueError(
            f"it cannot be decoded ({error}). The file is truncated or damaged: save it again or leave it out"
        ) from error

    try:
        turn = UPRIGHT.get(image.getexif().get(EXIF_ORIENTATION))
    except Exception:  # a damaged EXIF block has no orientation
        turn = None
    if turn is not None:
        kept = {key: value for key, value in image.info.items() if key == "transparency"}
        image = image.transpose(turn)
        image.info = kept  # without the tag, so that no other code rotates the image again

    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_uint8(np.asarray(image), any_range=True)[0]).convert("RGB")
    try:
        if image.has_transparency_data:
            image = image.convert("LA") if image.mode == "La" else image
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # `image.info` may contain any value for transparency
        raise ValueError(
            f"its mode {image.mode} cannot be converted to RGB ({error}). Save it again as PNG or JPEG"
        ) from error


def _to_uint8(values: np.ndarray, any_range: bool = False) -> tuple[np.ndarray, bool]:
    """Converts any real array to 8-bit values, and returns whether its range was 0 to 1.

    `any_range` is for files, which may contain any values; in an array in memory, other values are a mistake.
    """
    if values.dtype == np.uint8:
        return values, False
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255, False
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8), False
    if values.dtype.kind not in "iuf":
        raise ValueError(f"it contains values of type {values.dtype}; expected bool, integer or float")

    finite = np.isfinite(values)
    if not finite.all():
        if not any_range:
            raise ValueError("it contains NaN or infinite values; expected finite ones")
        values = np.where(finite, values, values[finite].min() if finite.any() else 0)
    low, high = float(values.min()), float(values.max())
    is_unit = values.dtype.kind == "f" and low >= -1e-3 and high <= 1 + 1e-3  # resampling may overshoot slightly
    if is_unit:
        offset, factor = 0.0, 255.0
    elif low >= -0.5 and high <= 255.5:
        offset, factor = 0.0, 1.0
    elif any_range and values.dtype.kind != "f" and low >= 0 and high <= 65535:
        offset, factor = 0.0, 1 / 257
    elif any_range:
        offset, factor = low, 255 / (high - low) if high > low else 0.0
    else:
        raise ValueError(
            f"it contains {values.dtype} values from {low:g} to {high:g}; expected 0 to 255, or 0 to 1 as float. "
            "Pass pixels that are already normalized to the model as `pixel_values`, without the image processor"
        )
    return np.rint((values.astype(np.float64) - offset) * factor).clip(0, 255).astype(np.uint8), is_unit


def _is_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, torch.Tensor))


def _to_numpy(value: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    try:
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    except (TypeError, RuntimeError) as error:  # sparse, quantized, 8-bit float, or without data
        kind = f"{value.dtype} ({value.layout}, {value.device})".replace("torch.", "")
        raise ValueError(
            f"it is a torch tensor of type {kind}, which NumPy does not have; expected a dense tensor of bool, integer "
            "or float: convert it with `.to_dense()`, `.dequantize()` or `.float()`"
        ) from error


def open_any(path: str, timeout: float | None = None) -> Image.Image:
    """Opens a local file without converting its mode, or loads a URL or base64 string with Transformers."""
    is_file = os.path.isfile(path)
    try:
        return Image.open(path) if is_file else load_image(path, timeout)
    except Exception as error:  # PIL's and httpx's errors have no common base
        if is_file:
            raise ValueError(
                f"it cannot be opened as an image ({error}). Convert it to PNG or JPEG, or remove it"
            ) from error
        if path.startswith(("http://", "https://")):
            raise ValueError(
                f"{path[:80]!r} cannot be fetched as an image ({error}). Check the URL, or download the file"
            ) from error
        raise ValueError(f"{path[:80]!r} is not an existing file, nor the URL or base64 string of an image") from error


def flatten_images(images: Any) -> list[Any]:
    """Flattens an image, a batch array, or nested lists of them into one list of single images."""
    if isinstance(images, torch.Tensor) and images.is_nested:
        images = images.unbind()
    if isinstance(images, (list, tuple)):
        return [image for part in images for image in flatten_images(part)]
    if isinstance(images, (str, os.PathLike, Image.Image)):
        return [images]
    if _is_array(images) and images.ndim in (2, 3):
        return [images]
    if _is_array(images) and images.ndim > 3:
        return flatten_images(list(images))
    shape = f" of shape {tuple(images.shape)}" if _is_array(images) else ""
    raise ValueError(
        f"`images` contains a {type(images).__name__}{shape}; expected PIL images, paths, or NumPy arrays or torch "
        "tensors of shape (height, width), (height, width, channels), (channels, height, width), or batches of them."
    )


def _channels_last(array: np.ndarray, input_data_format: str | None) -> np.ndarray:
    """(height, width), (height, width, channels) or (channels, height, width) to (height, width, channels).

    If both the first and the last axis could be channels, three is preferred over four, and four over one: a colour
        image one pixel high is more likely than a grey one three pixels wide. In a tie the first axis wins, as in
        Transformers.
    """
    if array.ndim == 2:
        return array[..., None]
    if input_data_format is None:
        rank = {3: 0, 4: 1, 1: 2}
        first, last = rank.get(array.shape[0], 9), rank.get(array.shape[2], 9)
        if first == last == 9:
            raise ValueError(
                f"its shape is {array.shape}; expected 1, 3 or 4 channels on the first or the last axis. "
                "Pass `input_data_format` for other channel counts"
            )
        input_data_format = ChannelDimension.FIRST if first <= last else ChannelDimension.LAST
    return np.moveaxis(array, 0, -1) if ChannelDimension(input_data_format) == ChannelDimension.FIRST else array


def to_planes(
    image: Any, do_convert_rgb: bool | None, input_data_format: str | None
) -> tuple[list[Image.Image], bool]:
    """Converts one image to 8-bit PIL images of equal size: a single one of mode RGB, or, if conversion is off and there
    are not three channels, one of mode L per channel. The returned flag is True if the values were in the range 0 to 1."""
    if isinstance(image, (str, os.PathLike)):
        image = open_any(os.fspath(image))
    if isinstance(image, Image.Image):
        if do_convert_rgb or image.mode == "RGB":
            return [to_rgb(image)], False
        array, input_data_format = np.asarray(image), "channels_last"
    else:
        array = _to_numpy(image)
    array = _channels_last(array, input_data_format)
    if 0 in array.shape:
        raise ValueError(f"it has no pixels: its shape is {array.shape}")
    array, is_unit = _to_uint8(array)
    channels = array.shape[2]
    if channels == 3 or (do_convert_rgb and channels == 4):
        return [to_rgb(Image.fromarray(np.ascontiguousarray(array)))], is_unit
    planes = [Image.fromarray(np.ascontiguousarray(array[..., channel])) for channel in range(channels)]
    if do_convert_rgb and channels != 1:
        raise ValueError(f"it has {channels} channels; expected 1, 3 or 4 with `do_convert_rgb`")
    return [plane.convert("RGB") for plane in planes] if do_convert_rgb else planes, is_unit


def flatten_maps(maps: Any, images: int) -> list[Any]:
    """Flattens a label map, a batch array of maps, or a list of maps into one list of single maps."""
    if isinstance(maps, torch.Tensor) and maps.is_nested:
        return list(maps.unbind())
    if images == 1 and _is_array(maps) and maps.ndim == 3 and maps.shape[2] == 1:
        return [maps]
    if isinstance(maps, (list, tuple)) or (_is_array(maps) and maps.ndim > 2):
        return list(maps)
    return [maps]


def to_label_map(value: Any, image_size: tuple[int, int], ignore_index: int | None) -> np.ndarray:
    """Class ids of shape (height, width), int64, from a PIL image, a path or an array."""
    if isinstance(value, (str, os.PathLike)):
        value = open_any(os.fspath(value))
    if isinstance(value, Image.Image):
        if value.mode not in ("1", "L", "P") and not value.mode.startswith("I"):
            raise ValueError(
                f"it is an image of mode {value.mode}; expected one class id per pixel (mode L, P, I or I;16)"
            )
        try:
            value = np.asarray(value)
        except Exception as error:  # as in to_rgb
            raise ValueError(
                f"it cannot be decoded ({error}). The file is truncated or damaged: save it again or leave it out"
            ) from error
    if not _is_array(value):
        raise ValueError(f"it is a {type(value).__name__}; expected a PIL image, a path, or an array of class ids")
    labels = _to_numpy(value)
    if labels.ndim == 3 and 1 in (labels.shape[0], labels.shape[2]):
        first = labels.shape[0] == 1 and (labels.shape[2] != 1 or labels.shape[1:] == image_size)
        labels = labels[0] if first else labels[..., 0]
    if labels.ndim != 2:
        raise ValueError(f"its shape is {labels.shape}; expected (height, width)")
    if labels.dtype.kind not in "biuf" or not (np.isfinite(labels).all() and np.array_equal(labels, np.rint(labels))):
        raise ValueError(f"it contains {labels.dtype} values that are not whole numbers; expected class ids")
    if int(labels.max(initial=0)) >= 2**63:
        raise ValueError(f"it contains the id {labels.max()}; expected class ids, 64-bit whole numbers")
    labels = labels.astype(np.int64)
    if labels.shape != image_size:
        hint = ": the map seems to belong to the image before its EXIF orientation was applied"
        raise ValueError(
            f"it has {labels.shape[0]} rows and {labels.shape[1]} columns, but its image has {image_size[0]} and "
            f"{image_size[1]}{hint if labels.shape == image_size[::-1] else ''}"
        )
    if (labels[labels != ignore_index] if ignore_index is not None else labels).min(initial=0) < 0:
        raise ValueError(f"it contains negative ids other than `ignore_index` = {ignore_index}; expected ids ≥ 0")
    return labels


def resize_labels(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Nearest-neighbour resize at pixel centres; values and dtype are unchanged."""
    rows = ((np.arange(height) + 0.5) * labels.shape[0] / height).astype(np.int64)
    columns = ((np.arange(width) + 0.5) * labels.shape[1] / width).astype(np.int64)
    return labels[rows[:, None], columns]


def count_labels(labels: np.ndarray, classes: int) -> np.ndarray:
    """Pixel count of each id from 0 to `classes` - 1, int64; other ids are not counted. Works row by row to save memory."""
    counts = np.zeros(classes, np.int64)
    for row in labels:
        counts += np.bincount(row[(row >= 0) & (row < classes)], minlength=classes)
    return counts


def binary_masks(
    labels: np.ndarray, height: int, width: int, ignore_index: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """One mask per class present, (classes, height, width) float32 with zeros on padding, and the classes, int64."""
    present = np.unique(labels)
    present = present[present != ignore_index] if ignore_index is not None else present
    masks = np.zeros((len(present), height, width), dtype=np.float32)
    masks[:, : labels.shape[0], : labels.shape[1]] = labels == present[:, None, None]
    return masks, present
