# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Images into model inputs, and model outputs into label maps.

The first half turns any picture into `pixel_values`; PIL does the resampling, so the pixels are the same with and
without torchvision. The second half is the method's read-out: predictive bias correction, the sum over proposals, the
resize to the picture's own size and the argmax.
"""

import math
import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    get_image_size_for_max_height_width,
    load_image,
)
from transformers.processing_utils import ImagesKwargs, Unpack

from .checks_alignzeg import check_tensor


EXIF_ORIENTATION = 0x0112
# EXIF orientation to the turn that makes the picture upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Post-processing never holds classes x height x width scores: where they are more than WORKSPACE numbers (32 MiB), it
# works on tiles of at most so many output pixels and so many cells of the mask grid on a side. Small tiles leave few
# classes in the race, large ones launch fewer kernels, which is what counts on a GPU.
WORKSPACE = 2**23
TILE_PIXELS, TILE_CELLS = {"cpu": 64, "other": 256}, {"cpu": 16, "other": 32}
LARGEST_INPUT = 2**28  # pixels of a model input, which are 3 GiB
LARGEST_MAP = 2**31  # pixels of a label map, which are 16 GiB
LEADERS = 16  # classes of a tile that are scored before the others are ruled out


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as a person would see it: upright, 8 bits, three channels.

    EXIF orientation is applied. Transparency is laid on white, as Transformers does. 16-bit modes are scaled from
    their full range. The modes `I` and `F` have no fixed range: 0 to 1 (`F`), 0 to 255 and 0 to 65535 (`I`) are taken
    for what they look like, anything else is stretched from minimum to maximum; NaN and infinity become black.

    Args:
        image: a PIL image of any mode, decoded or not.

    Returns:
        A PIL image of mode `RGB` without EXIF data; `image` itself where nothing had to change.

    Raises:
        ValueError: the image has no pixels, its file is truncated or damaged, or its transparency makes no sense.
    """
    if 0 in image.size:
        raise ValueError(f"it has no pixels: its size is {image.width} x {image.height}")
    try:
        image.load()
    except Exception as error:  # PIL's decoders raise many kinds
        raise ValueError(
            f"it cannot be decoded ({error}). The file is truncated or damaged: save it again or leave it out"
        ) from error

    try:
        turn = UPRIGHT.get(image.getexif().get(EXIF_ORIENTATION))
    except Exception:  # a damaged EXIF block says nothing about orientation
        turn = None
    if turn is not None:
        kept = {key: value for key, value in image.info.items() if key == "transparency"}
        image = image.transpose(turn)
        image.info = kept  # without the tag, so that nobody turns it again

    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_uint8(np.asarray(image), any_range=True)[0]).convert("RGB")
    try:
        if image.has_transparency_data:
            image = image.convert("LA") if image.mode == "La" else image
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # what `image.info` says about transparency may be anything
        raise ValueError(
            f"its mode {image.mode} cannot be converted to RGB ({error}). Save it again as PNG or JPEG"
        ) from error


def _to_uint8(values: np.ndarray, any_range: bool = False) -> tuple[np.ndarray, bool]:
    """Any real array as 8-bit values, and whether it came in the range 0 to 1.

    `any_range` is for files, which may hold anything; an array in memory with other values is a mistake.
    """
    if values.dtype == np.uint8:
        return values, False
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255, False
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8), False
    if values.dtype.kind not in "iuf":
        raise ValueError(f"it holds values of type {values.dtype}; expected bool, integer or float")

    finite = np.isfinite(values)
    if not finite.all():
        if not any_range:
            raise ValueError("it holds NaN or infinite values; expected finite ones")
        values = np.where(finite, values, values[finite].min() if finite.any() else 0)
    low, high = float(values.min()), float(values.max())
    is_unit = values.dtype.kind == "f" and low >= -1e-3 and high <= 1 + 1e-3  # resampling overshoots a little
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
            f"it holds {values.dtype} values from {low:g} to {high:g}; expected 0 to 255, or 0 to 1 as float. "
            "Pixels that are normalized already go to the model as `pixel_values`, without the image processor"
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
    except (TypeError, RuntimeError) as error:  # sparse, quantized, 8-bit float, without data
        kind = f"{value.dtype} ({value.layout}, {value.device})".replace("torch.", "")
        raise ValueError(
            f"it is a torch tensor of type {kind}, which NumPy does not have; expected a dense tensor of bool, integer "
            "or float: convert it with `.to_dense()`, `.dequantize()` or `.float()`"
        ) from error


def _open(path: str, timeout: float | None = None) -> Image.Image:
    """A local file with its own mode, or what Transformers loads: an address or base64 text."""
    is_file = os.path.isfile(path)
    try:
        return Image.open(path) if is_file else load_image(path, timeout)
    except Exception as error:  # PIL's and httpx's errors have no common base
        if is_file:
            raise ValueError(
                f"it cannot be opened as an image ({error}). Convert it to PNG or JPEG, or leave it out"
            ) from error
        if path.startswith(("http://", "https://")):
            raise ValueError(
                f"{path[:80]!r} cannot be fetched as an image ({error}). Check the address, or download the file"
            ) from error
        raise ValueError(f"{path[:80]!r} is no existing file, nor the address or base64 text of an image") from error


def _flatten(images: Any) -> list[Any]:
    """One list of single images from an image, a batch array, or lists of them, nested at will."""
    if isinstance(images, torch.Tensor) and images.is_nested:
        images = images.unbind()
    if isinstance(images, (list, tuple)):
        return [image for part in images for image in _flatten(part)]
    if isinstance(images, (str, os.PathLike, Image.Image)):
        return [images]
    if _is_array(images) and images.ndim in (2, 3):
        return [images]
    if _is_array(images) and images.ndim > 3:
        return _flatten(list(images))
    shape = f" of shape {tuple(images.shape)}" if _is_array(images) else ""
    raise ValueError(
        f"`images` holds a {type(images).__name__}{shape}; expected PIL images, paths, or NumPy arrays or torch "
        "tensors of shape (height, width), (height, width, channels), (channels, height, width), or batches of them."
    )


def _channels_last(array: np.ndarray, input_data_format: str | None) -> np.ndarray:
    """(height, width), (height, width, channels) or (channels, height, width) to (height, width, channels).

    Where both ends could be channels, three wins over four, and four over one: a colour image one pixel high is
    likelier than a grey one three pixels wide. Between equals the first axis wins, as in Transformers.
    """
    if array.ndim == 2:
        return array[..., None]
    if input_data_format is None:
        rank = {3: 0, 4: 1, 1: 2}
        first, last = rank.get(array.shape[0], 9), rank.get(array.shape[2], 9)
        if first == last == 9:
            raise ValueError(
                f"its shape is {array.shape}; expected 1, 3 or 4 channels on the first or the last axis. "
                "Pass `input_data_format` for other numbers of channels"
            )
        input_data_format = ChannelDimension.FIRST if first <= last else ChannelDimension.LAST
    return np.moveaxis(array, 0, -1) if ChannelDimension(input_data_format) == ChannelDimension.FIRST else array


def _to_planes(
    image: Any, do_convert_rgb: bool | None, input_data_format: str | None
) -> tuple[list[Image.Image], bool]:
    """One image as 8-bit PIL images of equal size: one of mode RGB, or one of mode L per channel where conversion is
    off and there are not three. The flag says that its values came in the range 0 to 1."""
    if isinstance(image, (str, os.PathLike)):
        image = _open(os.fspath(image))
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
        raise ValueError(f"it has {channels} channels; expected 1, 3 or 4 where `do_convert_rgb` is on")
    return [plane.convert("RGB") for plane in planes] if do_convert_rgb else planes, is_unit


def _flatten_maps(maps: Any, images: int) -> list[Any]:
    """One list of single label maps from a map, a batch array of maps, or a list of maps."""
    if isinstance(maps, torch.Tensor) and maps.is_nested:
        return list(maps.unbind())
    if images == 1 and _is_array(maps) and maps.ndim == 3 and maps.shape[2] == 1:
        return [maps]
    if isinstance(maps, (list, tuple)) or (_is_array(maps) and maps.ndim > 2):
        return list(maps)
    return [maps]


def _to_label_map(value: Any, image_size: tuple[int, int], ignore_index: int | None) -> np.ndarray:
    """Class ids of shape (height, width), int64, from a PIL image, a path or an array."""
    if isinstance(value, (str, os.PathLike)):
        value = _open(os.fspath(value))
    if isinstance(value, Image.Image):
        if value.mode not in ("1", "L", "P") and not value.mode.startswith("I"):
            raise ValueError(
                f"it is a picture of mode {value.mode}; expected one class id a pixel (mode L, P, I or I;16)"
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
        raise ValueError(f"it holds {labels.dtype} values that are no whole numbers; expected class ids")
    if int(labels.max(initial=0)) >= 2**63:
        raise ValueError(f"it holds the id {labels.max()}; expected class ids, whole numbers of 64 bits")
    labels = labels.astype(np.int64)
    if labels.shape != image_size:
        hint = ": the map seems to belong to the picture before it was turned upright (EXIF orientation)"
        raise ValueError(
            f"it has {labels.shape[0]} rows and {labels.shape[1]} columns, and its image {image_size[0]} and "
            f"{image_size[1]}{hint if labels.shape == image_size[::-1] else ''}"
        )
    if (labels[labels != ignore_index] if ignore_index is not None else labels).min(initial=0) < 0:
        raise ValueError(f"it holds negative ids besides `ignore_index` = {ignore_index}; expected ids from 0")
    return labels


def _resize_labels(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Nearest neighbour at pixel centres; any id survives."""
    rows = ((np.arange(height) + 0.5) * labels.shape[0] / height).astype(np.int64)
    columns = ((np.arange(width) + 0.5) * labels.shape[1] / width).astype(np.int64)
    return labels[rows[:, None], columns]


def _binary_masks(
    labels: np.ndarray, height: int, width: int, ignore_index: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """One mask per class present, (classes, height, width) float32 with zeros on padding, and the classes, int64."""
    present = np.unique(labels)
    present = present[present != ignore_index] if ignore_index is not None else present
    masks = np.zeros((len(present), height, width), dtype=np.float32)
    masks[:, : labels.shape[0], : labels.shape[1]] = labels == present[:, None, None]
    return masks, present


def _check_pairs(settings: dict[str, Any]) -> None:
    for name in ("size", "pad_size"):
        if isinstance(settings.get(name), (list, tuple)) and len(settings[name]) != 2:
            raise ValueError(f"`{name}` is {settings[name]!r}; as a list it is (height, width).")


def _check_lengths(name: str, size: SizeDict) -> None:
    if any(not isinstance(length, int) or isinstance(length, bool) or length < 1 for _, length in size):
        raise ValueError(f"`{name}` is {dict(size)}; expected whole numbers of at least 1.")


def _output_size(height: int, width: int, size: SizeDict, size_divisor: int) -> tuple[int, int]:
    """Height and width after resizing; the aspect ratio is kept as far as no side falls below `size_divisor`."""
    _check_lengths("size", size)
    if size.height and size.width:
        return size.height, size.width
    if size.max_height and size.max_width:
        least = min(size_divisor, size.max_height, size.max_width)
        new = get_image_size_for_max_height_width((height, width), size.max_height, size.max_width)
        return max(new[0], least), max(new[1], least)
    if not (size.shortest_edge or size.longest_edge):
        raise ValueError(
            f"`size` is {dict(size)}; expected `shortest_edge` and/or `longest_edge`, `height` and `width`, or "
            "`max_height` and `max_width`."
        )
    short, long = sorted((height, width))
    shortest = size.shortest_edge or size.longest_edge
    longest = size.longest_edge or 4 * shortest
    if long * shortest > longest * short:
        short, long = max(round(longest * short / long), min(size_divisor, shortest)), longest
    else:
        short, long = shortest, shortest * long // short
    return (short, long) if height <= width else (long, short)


def _check_pixels(name: str, size: tuple[int, int]) -> None:
    if math.prod(size) > LARGEST_INPUT:
        raise ValueError(
            f"`{name}` makes an input of {size[0]} x {size[1]} pixels; expected at most {LARGEST_INPUT}. Choose a smaller "
            "one, or segment the image in parts."
        )


def _padded_size(
    shapes: list[tuple[int, ...]], do_pad: bool | None, pad_size: SizeDict | None, size_divisor: int
) -> tuple[int, int]:
    """Height and width of a batch of images of shape (height, width, channels)."""
    if len({shape[2] for shape in shapes}) > 1:
        raise ValueError("The `images` have different numbers of channels; set `do_convert_rgb=True`.")
    height, width = max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
    if not do_pad:
        if len(set(shapes)) > 1:
            raise ValueError("The `images` have different sizes, which need `do_pad=True` to become one batch.")
        return height, width
    if pad_size is None:
        return -(-height // size_divisor) * size_divisor, -(-width // size_divisor) * size_divisor
    _check_lengths("pad_size", pad_size)
    if not (pad_size.height and pad_size.width):
        raise ValueError(f"`pad_size` is {dict(pad_size)}; expected `height` and `width`.")
    if pad_size.height < height or pad_size.width < width:
        raise ValueError(
            f"`pad_size` is {pad_size.height} x {pad_size.width}, but an image has {height} rows or {width} columns "
            "after resizing; make `pad_size` larger or `size` smaller."
        )
    return pad_size.height, pad_size.width


def _per_channel(name: str, value: float | list[float], channels: int) -> np.ndarray:
    """One value per channel, (channels,) float64."""
    try:
        values = np.atleast_1d(np.asarray(value, dtype=np.float64))
    except (TypeError, ValueError):
        values = np.array([np.nan])
    if not np.isfinite(values).all():
        raise ValueError(f"`{name}` is {value!r}; expected a finite number, or one per channel.")
    if values.shape not in ((1,), (channels,)):
        raise ValueError(
            f"`{name}` has {values.size} values for {channels} channels; expected one, or one per channel."
        )
    return np.broadcast_to(values, (channels,))


# ---------------------------------------------------------------------------------------------------------------------
# Read-out
# ---------------------------------------------------------------------------------------------------------------------


def class_probabilities(
    class_queries_logits: torch.Tensor,
    unseen_logits: torch.Tensor | None = None,
    seen_class_mask: torch.Tensor | None = None,
    gamma: float = 0.0,
    threshold: float = 0.5,
) -> torch.Tensor:
    """What each proposal is, after predictive bias correction (PBC of AlignZeg, arXiv 2404.05667).

    Where a proposal's chance to be unseen, `sigmoid(unseen_logits)`, exceeds `threshold`, the logits of its seen
    classes are lowered by `gamma` before the softmax. `gamma=0`, a vocabulary without an unseen class, or a missing
    `unseen_logits` or `seen_class_mask` leave the plain softmax, to the bit.

    Args:
        class_queries_logits: (..., queries, classes + 1), scaled by the temperature; the background comes last.
        unseen_logits: (..., queries).
        seen_class_mask: (classes,), bool; True for classes that were seen in training.
        gamma: what seen logits lose.
        threshold: between 0 and 1.

    Returns:
        (..., queries, classes + 1), float32; the last axis sums to one.
    """
    logits = class_queries_logits.float()
    if gamma != 0 and unseen_logits is not None and seen_class_mask is not None and not bool(seen_class_mask.all()):
        lowered = torch.nn.functional.pad(seen_class_mask.to(logits) * gamma, (0, 1))
        logits = logits - (unseen_logits.float().sigmoid() > threshold).to(logits)[..., None] * lowered
    return logits.softmax(-1)


def resize_matrix(source: int, target: int, content: float | None = None) -> torch.Tensor:
    """Bilinear interpolation along one axis as a matrix: `target_values = matrix @ source_values`.

    Equal to `torch.nn.functional.interpolate(..., mode="bilinear", align_corners=False)` of the first `content`
    samples; `content` may be a fraction, for images whose border falls inside a cell of the grid.

    Args:
        source: length of the axis.
        target: wanted length.
        content: how much of the axis, from its start, becomes the target; all of it by default.

    Returns:
        (target, source), float32, on the CPU; the weights of a row are not negative and sum to one.
    """
    content = float(source if content is None else min(max(content, 1e-6), source))
    last = int(np.ceil(content)) - 1
    positions = ((torch.arange(target, dtype=torch.float64) + 0.5) * (content / target) - 0.5).clamp(0, last)
    lower = positions.floor()
    weight = (positions - lower).float()
    lower = lower.long()
    matrix = torch.zeros(target, source)
    index = torch.arange(target)
    matrix[index, lower] = 1 - weight
    matrix[index, (lower + 1).clamp(max=last)] += weight
    return matrix


def _tiles(matrix: torch.Tensor, pixels: int, cells: int) -> list[tuple[slice, slice]]:
    """Cuts the targets of a resize matrix into tiles; each comes with the range of sources that it reads."""
    target, source = matrix.shape
    used = matrix.ne(0).byte()
    first, last = used.argmax(1), source - used.flip(1).argmax(1)
    step = max(1, min(pixels, cells * target // int(last[-1] - first[0])))
    tiles = [slice(start, min(start + step, target)) for start in range(0, target, step)]
    return [(tile, slice(int(first[tile.start]), int(last[tile.stop - 1]))) for tile in tiles]


def _lowered(floor: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """`floor` less more than what rounding takes from a float32 score that should reach it: scores are sums of numbers
    that are not negative, less a penalty."""
    return floor - 1e-5 * (floor.abs() + 2 * penalty.abs().amax()) - torch.finfo(floor.dtype).tiny


def _floors(values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The least of `values` (H, W) among the pixels that each cell reaches through the resize matrices: (h, w)."""
    values = values.new_tensor(torch.inf).where(rows.T[:, :, None] == 0, values).amin(1)  # (h, W)
    return values.new_tensor(torch.inf).where(columns.T == 0, values[:, None]).amin(2)


def _winners(
    probabilities: torch.Tensor,
    cells: torch.Tensor,
    penalty: torch.Tensor,
    expected: torch.Tensor,
    upper: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
) -> torch.Tensor:
    """The best class of each pixel of a tile.

    The classes that are expected to win are scored first. What they reach is a floor: a class stays in the race only
    if it can reach it somewhere, first by its bound for the whole tile, then in some cell, for the score of a pixel
    is a mean of the cells around it.

    Args:
        probabilities: (classes, queries).
        cells: (queries, h, w).
        penalty: (classes,).
        expected: (classes,), scores of the mean cell.
        upper: (classes,), which no score of the tile exceeds.
        rows, columns: (H, h) and (W, w).

    Returns:
        (H, W), int64.
    """
    shape, flat = (len(rows), len(columns)), cells.flatten(1)
    at_once = max(1, WORKSPACE // max(shape[0] * shape[1], cells[0].numel()))

    def score(classes: torch.Tensor) -> torch.Tensor:
        return (probabilities[classes] @ flat - penalty[classes, None]).view(-1, *cells.shape[1:])

    def race(classes: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        resized = rows @ (scores @ columns.T)
        values = resized.amax(0)
        order = torch.arange(len(classes), dtype=torch.int32, device=scores.device)[:, None, None]
        return values, classes[torch.where(resized == values, order, len(classes) - 1).amin(0)]  # argmax, but faster

    leaders = expected.topk(min(LEADERS, at_once, len(expected))).indices.sort().values  # the first of equals wins
    best, labels = race(leaders, score(leaders))
    others = upper >= _lowered(best.amin(), penalty)
    others[leaders] = False
    others = others.nonzero()[:, 0]
    if len(others) == 0:
        return labels
    floors = _lowered(_floors(best, rows, columns), penalty)
    for part in others.split(at_once):
        scores = score(part)
        alive = (scores >= floors).flatten(1).any(1).nonzero()[:, 0]
        if len(alive):
            values, winners = race(part[alive], scores[alive])
            better = (values > best) | ((values == best) & (winners < labels))
            labels = torch.where(better, winners, labels)
            best = torch.maximum(best, values)
    return labels


def _label_map(
    probabilities: torch.Tensor, masks: torch.Tensor, penalty: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """The argmax over classes of the resized scores, tile by tile, without ever holding them all.

    Args:
        probabilities: (queries, classes), not negative.
        masks: (queries, h, w), 0 to 1.
        penalty: (classes,), subtracted from the scores.
        rows: (H, h), on the CPU, from [`resize_matrix`].
        columns: (W, w), the same.

    Returns:
        (H, W), int64.
    """
    device = masks.device
    kind = "cpu" if device.type == "cpu" else "other"
    row_tiles, column_tiles = (_tiles(axis, TILE_PIXELS[kind], TILE_CELLS[kind]) for axis in (rows, columns))
    rows, columns = rows.to(device), columns.to(device)
    by_class = probabilities.T.contiguous()
    labels = torch.empty(len(rows), len(columns), dtype=torch.long, device=device)
    for y, source_rows in row_tiles:
        band = masks[:, source_rows]
        # In a tile class c scores at most Σ_n p(c|n)·max(mask_n), and Σ_n p(c|n)·mean(mask_n) on average.
        most = torch.stack([band[..., source].amax((1, 2)) for _, source in column_tiles])
        mean = torch.stack([band[..., source].mean((1, 2)) for _, source in column_tiles])
        bounds = zip(column_tiles, mean @ probabilities - penalty, most @ probabilities - penalty)
        for (x, source), expected, upper in bounds:
            labels[y, x] = _winners(
                by_class, band[..., source], penalty, expected, upper, rows[y, source_rows], columns[x, source]
            )
    return labels


def _check_outputs(outputs: Any) -> tuple[int, int]:
    """Batch size and number of classes of model outputs, whose parts have to fit each other."""
    shapes = {
        "masks_queries_logits": ("batch", "queries", "height", "width"),
        "class_queries_logits": ("batch", "queries", "classes + 1"),
        "unseen_logits": ("batch", "queries"),
        "content_sizes": ("batch", 2),
        "seen_class_mask": None,
        "correction": None,
    }
    lengths = {2: 2}
    for name, axes in shapes.items():
        value = getattr(outputs, name, None)
        if value is None and name in ("masks_queries_logits", "class_queries_logits"):
            raise ValueError(
                f"`outputs` is a {type(outputs).__name__} without `masks_queries_logits` and `class_queries_logits`; "
                "expected what the model returns."
            )
        if value is None:
            continue
        check_tensor(f"outputs.{name}", value, "real numbers")
        if axes is None:
            continue
        expected = tuple(lengths.setdefault(axis, length) for axis, length in zip(axes, value.shape))
        if len(axes) != value.ndim or expected != tuple(value.shape) or 0 in expected[1:]:
            raise ValueError(
                f"`outputs.{name}` has shape {tuple(value.shape)}; expected ({', '.join(map(str, axes))}) with no empty "
                "axis, and batch and queries the same in all outputs."
            )
    classes = lengths["classes + 1"] - 1
    if classes == 0:
        raise ValueError("`outputs.class_queries_logits` has the background alone; expected at least one class.")
    return lengths["batch"], classes


def _check_target_sizes(target_sizes: Any, batch_size: int) -> list[tuple[int, int]] | None:
    if target_sizes is None:
        return None
    try:
        sizes = [(math.floor(height), math.floor(width)) for height, width in target_sizes]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        sizes = []
    if len(sizes) != batch_size or any(min(size) < 1 for size in sizes):
        raise ValueError(
            f"`target_sizes` is {target_sizes}; expected a list of {batch_size} pairs (height, width), one per image."
        )
    if any(height * width > LARGEST_MAP for height, width in sizes):
        raise ValueError(
            f"`target_sizes` is {target_sizes}; expected at most {LARGEST_MAP} pixels an image. Segment it in parts, or "
            "enlarge the label map afterwards."
        )
    return sizes


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"`{name}` is {value!r}; expected a number.") from None


def _check_correction(
    outputs: Any, classes: int, seen_class_mask: torch.Tensor | None, gamma: float | None, threshold: float | None
) -> tuple[torch.Tensor | None, float, float]:
    """Arguments before the defaults of `outputs`, checked."""
    device = outputs.class_queries_logits.device
    gamma = None if gamma is None else _number("gamma", gamma)
    mask = seen_class_mask
    if mask is None:  # the model's comes once for each image
        mask = getattr(outputs, "seen_class_mask", None)
        mask = mask[0] if mask is not None and mask.ndim == 2 and len(mask) else mask
    else:
        try:
            mask = torch.as_tensor(mask, device=device)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"`seen_class_mask` is a {type(mask).__name__}; expected a bool tensor of shape ({classes},)."
            ) from None
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError(
                f"`seen_class_mask` holds other values than True and False; expected a bool tensor of shape ({classes},)."
            )
    if mask is not None:
        mask = mask.bool()
        if mask.shape != (classes,):
            raise ValueError(f"`seen_class_mask` has shape {tuple(mask.shape)}; expected ({classes},), one per class.")
    if gamma and mask is None:
        raise ValueError("`gamma` needs `seen_class_mask`: pass it, or outputs of a model that knows its split.")
    if gamma and getattr(outputs, "unseen_logits", None) is None:
        raise ValueError(
            "`gamma` needs `outputs.unseen_logits`, which a model without predictive bias correction does not "
            "compute; `seen_penalty` works without them."
        )
    correction = getattr(outputs, "correction", None)
    if correction is not None and correction.numel() < 2:
        raise ValueError(f"`outputs.correction` has {correction.numel()} values; expected gamma and threshold.")
    default_gamma, default_threshold = (0.0, 0.5) if correction is None else correction.flatten()[:2].tolist()
    gamma = default_gamma if gamma is None else gamma
    threshold = default_threshold if threshold is None else _number("threshold", threshold)
    if not 0 <= gamma < float("inf") or not 0 <= threshold <= 1:
        raise ValueError(
            f"`gamma` is {gamma} and `threshold` {threshold}; expected gamma >= 0 and threshold from 0 to 1."
        )
    return mask, gamma, threshold


class AlignZegImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    size_divisor (`int`, *optional*, defaults to 32):
        Padded height and width are multiples of it.
    ignore_index (`int`, *optional*, defaults to 255):
        Label of pixels that belong to no class; `None` takes every label for a class.
    """

    size_divisor: int
    ignore_index: int | None


class AlignZegImageProcessor(PilBackend):
    r"""
    Prepares images and label maps for [`AlignZegModel`], and turns its outputs into label maps.

    Args:
        do_convert_rgb (`bool`, *optional*, defaults to `True`):
            Make three channels of any mode; see [`to_rgb`] for transparency, 16-bit images and EXIF orientation.
        do_resize (`bool`, *optional*, defaults to `True`):
            Resize to `size`.
        size (`dict[str, int]`, *optional*, defaults to `{"shortest_edge": 640, "longest_edge": 2560}`):
            The aspect ratio is kept. The longer side is at most `longest_edge` (four times `shortest_edge` where it is
            not given), also for images of 1 x N pixels, whose short side then becomes `size_divisor`. An `int` is a
            `shortest_edge`; `height` and `width`, or `max_height` and `max_width`, work too.
        resample (`int`, *optional*, defaults to bicubic):
            Filter of PIL. Label maps always take the nearest pixel.
        do_rescale (`bool`, *optional*, defaults to `True`):
            Multiply the 8-bit values by `rescale_factor`. Switched off, values keep the range in which they came.
        rescale_factor (`float`, *optional*, defaults to 1/255):
            See `do_rescale`.
        do_normalize (`bool`, *optional*, defaults to `True`):
            Subtract `image_mean`, divide by `image_std`.
        image_mean, image_std (`list[float]`, *optional*):
            CLIP's own by default.
        do_pad (`bool`, *optional*, defaults to `True`):
            Pad with zeros at the bottom and the right to a multiple of `size_divisor` and to the largest image of the
            batch, or to `pad_size`. Switched off, all images must come out equally large.
        size_divisor (`int`, *optional*, defaults to 32):
            See `do_pad`.
        ignore_index (`int`, *optional*, defaults to 255):
            Label of pixels that belong to no class.
    """

    valid_kwargs = AlignZegImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_mask"]

    do_convert_rgb = True
    do_resize = True
    size = {"shortest_edge": 640, "longest_edge": 2560}
    default_to_square = False
    resample = PILImageResampling.BICUBIC
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_pad = True
    size_divisor = 32
    ignore_index = 255

    def __init__(self, **kwargs: Unpack[AlignZegImageProcessorKwargs]) -> None:
        _check_pairs(kwargs)
        super().__init__(**kwargs)

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[AlignZegImageProcessorKwargs],
    ) -> BatchFeature:
        r"""
        Images, and optionally their label maps, into model inputs.

        Args:
            images: an image or any nesting of images: PIL of any mode, paths, NumPy arrays or torch tensors of shape
                (height, width), (height, width, channels) or (channels, height, width), or batches of them. Integers
                are 0 to 255 (uint16: 0 to 65535), floats 0 to 1 or 0 to 255. EXIF orientation is applied to PIL
                images: their label map, and `target_sizes` afterwards, are those of the upright image.
            segmentation_maps: one map of class ids per image, of the image's own height and width: PIL (L, P, I, I;16)
                or an array of whole numbers.
            kwargs: any argument of the constructor, for this call only.

        Returns:
            [`BatchFeature`] with, for images padded to (height, width):

            - **pixel_values** -- (batch, 3, height, width), float32.
            - **pixel_mask** -- (batch, height, width), int64: 1 on the image, 0 on padding.
            - **mask_labels** -- with `segmentation_maps`: per image (classes present, height, width), float32, 0 or 1;
              empty where the map holds nothing but `ignore_index`.
            - **class_labels** -- with `segmentation_maps`: per image (classes present,), int64, ascending.

        Raises:
            ValueError: an image cannot be read, is empty or holds values outside its range; a label map does not fit
                its image. The message names the image.
        """
        _check_pairs(kwargs)
        return super().preprocess(images, segmentation_maps, **kwargs)

    def _validate_preprocess_kwargs(self, **kwargs) -> None:
        super()._validate_preprocess_kwargs(**kwargs)
        if kwargs["do_center_crop"]:
            raise ValueError(
                "`do_center_crop` is not supported: every pixel gets a label. Crop the images beforehand."
            )
        if kwargs["do_rescale"]:
            _per_channel("rescale_factor", kwargs["rescale_factor"], 1)
        if not isinstance(kwargs["size_divisor"], int) or kwargs["size_divisor"] < 1:
            raise ValueError(f"`size_divisor` is {kwargs['size_divisor']}; expected a whole number of at least 1.")

    def _preprocess_image_like_inputs(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        *,
        do_convert_rgb: bool | None,
        input_data_format: str | None,
        do_resize: bool | None,
        size: SizeDict | None,
        resample: int | None,
        do_rescale: bool | None,
        rescale_factor: float | None,
        do_normalize: bool | None,
        image_mean: float | list[float] | None,
        image_std: float | list[float] | None,
        do_pad: bool | None,
        pad_size: SizeDict | None,
        size_divisor: int,
        ignore_index: int | None,
        return_tensors: str | None,
        **kwargs,
    ) -> BatchFeature:
        images = _flatten(images)
        if not images:
            raise ValueError("`images` is empty; expected at least one image.")
        maps = None if segmentation_maps is None else _flatten_maps(segmentation_maps, len(images))
        if maps is not None and len(maps) != len(images):
            raise ValueError(
                f"There are {len(maps)} `segmentation_maps` for {len(images)} `images`; expected one each."
            )

        arrays, factors, labels = [], [], []
        for index, image in enumerate(images):
            try:
                planes, is_unit = _to_planes(image, do_convert_rgb, input_data_format)
            except ValueError as error:
                raise ValueError(f"`images[{index}]` cannot be used: {error}.") from error
            width, height = planes[0].size
            resized = _output_size(height, width, size, size_divisor) if do_resize else (height, width)
            _check_pixels("size", resized)
            if resized != (height, width):
                planes = [plane.resize(resized[::-1], resample) for plane in planes]
            arrays.append(np.asarray(planes[0]) if planes[0].mode == "RGB" else np.dstack(planes))
            factors.append(rescale_factor if do_rescale else 1 / 255 if is_unit else 1.0)
            if maps is not None:
                try:
                    labels.append(_resize_labels(_to_label_map(maps[index], (height, width), ignore_index), *resized))
                except ValueError as error:
                    raise ValueError(f"`segmentation_maps[{index}]` cannot be used: {error}.") from error

        height, width = _padded_size([array.shape for array in arrays], do_pad, pad_size, size_divisor)
        _check_pixels("pad_size` or `size_divisor", (height, width))
        channels = arrays[0].shape[2]
        mean = _per_channel("image_mean", image_mean if do_normalize else 0.0, channels)
        std = _per_channel("image_std", image_std if do_normalize else 1.0, channels)
        if (std == 0).any():
            raise ValueError(f"`image_std` is {image_std}; expected values other than 0.")
        with np.errstate(over="ignore"):
            largest = np.float32([255 * max(map(abs, factors)) / std, mean / std])
        if not np.isfinite(largest).all():
            raise ValueError(
                f"`rescale_factor` {rescale_factor}, `image_mean` {image_mean} and `image_std` {image_std} give pixels that "
                "float32 does not hold; expected values such as 1/255, 0.5 and 0.25."
            )
        pixel_values = np.zeros((len(arrays), channels, height, width), dtype=np.float32)
        pixel_mask = np.zeros((len(arrays), height, width), dtype=np.int64)
        for array, factor, values, mask in zip(arrays, factors, pixel_values, pixel_mask):
            inside = (slice(array.shape[0]), slice(array.shape[1]))
            mask[inside] = 1
            for channel in range(channels):
                np.multiply(array[..., channel], np.float32(factor / std[channel]), out=values[channel][inside])
                values[channel][inside] -= np.float32(mean[channel] / std[channel])

        features = BatchFeature({"pixel_values": pixel_values, "pixel_mask": pixel_mask}, tensor_type=return_tensors)
        if maps is not None:  # lists, because images have different numbers of classes
            wrap = torch.from_numpy if return_tensors == "pt" else np.asarray
            pairs = [_binary_masks(label, height, width, ignore_index) for label in labels]
            features["mask_labels"] = [wrap(masks) for masks, _ in pairs]
            features["class_labels"] = [wrap(ids) for _, ids in pairs]
        return features

    @torch.no_grad()
    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: list[tuple[int, int]] | torch.Tensor | None = None,
        return_segmentation_scores: bool = False,
        *,
        seen_class_mask: torch.Tensor | None = None,
        gamma: float | None = None,
        threshold: float | None = None,
        seen_penalty: float = 0.0,
        none_of_these: bool = False,
        none_index: int = -1,
        return_unseen_scores: bool = False,
    ) -> list[torch.Tensor] | list[SemanticSegmentationPostProcessorOutput] | tuple[list, list[torch.Tensor] | None]:
        r"""
        Model outputs into label maps of the images' own sizes.

        `score(class, pixel) = Σ_n p(class|n) · σ(mask_n(pixel))`, the background dropped, is computed on the grid of
        the masks and resized bilinearly from the part of the grid that the image covers; the best class wins. No
        network runs here: call it again on the same outputs with another `gamma`, `threshold` or `target_sizes`.

        Args:
            outputs: [`AlignZegOutput`]; read are `masks_queries_logits` (batch, queries, h, w), `class_queries_logits`
                (batch, queries, classes + 1) with the background last, and, where they are there, `unseen_logits`
                (batch, queries), `seen_class_mask` (batch, classes), `correction` (batch, 2) = gamma and threshold of the
                checkpoint, and `content_sizes` (batch, 2): height and width of the image inside the mask grid, in
                cells, fractions allowed; what lies below or right of them is padding.
            target_sizes: (height, width) of each upright image, at most 2**31 pixels. Without it the maps have the size
                of the mask grid, padding included.
            return_segmentation_scores: return also the scores of all classes at full size, float32 of shape (classes,
                height, width).
            seen_class_mask: (classes,), bool; True for classes seen in training. Default: that of `outputs`.
            gamma: what the logits of seen classes lose in proposals that look unseen; 0 switches the correction off.
                Default: that of `outputs`, or 0.
            threshold: the chance, 0 to 1, above which a proposal looks unseen. Default: that of `outputs`, or 0.5.
            seen_penalty: subtracted from the scores of all seen classes at every pixel. It is the blind baseline of
                ZegCLIP (Zhou et al., CVPR 2023), which the correction has to beat; use it with `gamma=0`.
            none_of_these: let the background compete too; its pixels get `none_index`.
            none_index: label of pixels that are none of the classes.
            return_unseen_scores: return also how unseen each pixel looks, `Σ_n u_n·σ(mask_n) / Σ_n σ(mask_n)` with
                `u_n = σ(unseen_logits_n)`.

        Returns:
            A list of int64 label maps of shape (height, width), on the device of `outputs`; with
            `return_segmentation_scores` a list of [`SemanticSegmentationPostProcessorOutput`] with `segmentation` and
            `segmentation_scores`. With `return_unseen_scores` a pair: that list, and a list of float32 maps of shape
            (height, width), 0 to 1, or `None` where `outputs` hold no `unseen_logits`.

        Raises:
            ValueError: `target_sizes` does not fit the batch, an argument is out of its range, or asks for what
                `outputs` do not hold.
        """
        batch_size, classes = _check_outputs(outputs)
        masks_queries_logits, class_queries_logits = outputs.masks_queries_logits, outputs.class_queries_logits
        grid = masks_queries_logits.shape[2:]
        unseen_logits = getattr(outputs, "unseen_logits", None)
        content_sizes = getattr(outputs, "content_sizes", None)
        targets = _check_target_sizes(target_sizes, batch_size)
        seen_class_mask, gamma, threshold = _check_correction(outputs, classes, seen_class_mask, gamma, threshold)
        seen_penalty = _number("seen_penalty", seen_penalty)
        if not math.isfinite(seen_penalty):
            raise ValueError(f"`seen_penalty` is {seen_penalty}; expected a finite number.")
        if not isinstance(none_index, int) or abs(none_index) >= 2**63:
            raise ValueError(f"`none_index` is {none_index!r}; expected a whole number of 64 bits.")
        if none_of_these and 0 <= none_index < classes:
            raise ValueError(
                f"`none_index` is {none_index}, the id of a class; expected one outside 0..{classes - 1}."
            )
        if seen_penalty != 0 and seen_class_mask is None:
            raise ValueError(
                "`seen_penalty` needs `seen_class_mask`: pass it, or outputs of a model that knows its split."
            )

        probabilities = class_probabilities(class_queries_logits, unseen_logits, seen_class_mask, gamma, threshold)
        penalty = probabilities.new_zeros(classes + 1)
        if seen_penalty != 0:
            penalty[:-1] = seen_class_mask.to(penalty) * seen_penalty

        segmentations, unseen_scores = [], []
        for index in range(batch_size):
            masks = masks_queries_logits[index].float().sigmoid()
            if masks.isnan().any() or probabilities[index].isnan().any():
                raise ValueError(f"`outputs` hold NaN for image {index}; try float32, or check the checkpoint.")
            if targets is None:
                rows, columns = (torch.eye(length) for length in grid)
            else:
                content = grid if content_sizes is None else content_sizes[index].tolist()
                if not all(map(math.isfinite, content)):
                    raise ValueError(
                        f"`outputs.content_sizes` is {content} for image {index}; expected cells of the grid."
                    )
                rows, columns = (resize_matrix(*axis) for axis in zip(grid, targets[index], content))
            competing = classes + 1 if none_of_these else classes
            labels = _label_map(probabilities[index, :, :competing], masks, penalty[:competing], rows, columns)
            segmentations.append(labels.masked_fill_(labels == classes, none_index))
            rows, columns = rows.to(masks.device), columns.to(masks.device)
            if return_segmentation_scores:
                scores = torch.einsum("qc,qhw->chw", probabilities[index, :, :classes], masks)
                scores = rows @ scores @ columns.T - penalty[:classes, None, None]
                segmentations[-1] = SemanticSegmentationPostProcessorOutput(
                    {"segmentation": segmentations[-1], "segmentation_scores": scores}
                )
            if return_unseen_scores and unseen_logits is not None:
                unseen = torch.einsum("q,qhw->hw", unseen_logits[index].float().sigmoid(), masks)
                unseen_scores.append(rows @ (unseen / masks.sum(0).clamp(min=1e-12)) @ columns.T)
        if return_unseen_scores:
            return segmentations, unseen_scores or None
        return segmentations


AlignZegImageProcessor.register_for_auto_class()
