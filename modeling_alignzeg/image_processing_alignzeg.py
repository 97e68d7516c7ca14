# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Converts images and label maps to model inputs.

images_alignzeg.py reads images of all kinds; post_processing_alignzeg.py converts outputs to label maps.
"""

import math
from typing import Any

import numpy as np
import torch
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ImageInput,
    PILImageResampling,
    SizeDict,
    get_image_size_for_max_height_width,
)
from transformers.processing_utils import ImagesKwargs, Unpack

from .images_alignzeg import binary_masks, flatten_images, flatten_maps, resize_labels, to_label_map, to_planes
from .post_processing_alignzeg import AlignZegPostProcessing


LARGEST_INPUT = 2**28  # pixels of a model input: 3 GiB


# --- arguments -------------------------------------------------------------------------------------------------


def _check_pairs(settings: dict[str, Any]) -> None:
    for name in ("size", "pad_size"):
        if isinstance(settings.get(name), (list, tuple)) and len(settings[name]) != 2:
            raise ValueError(f"`{name}` is {settings[name]!r}; as a list it is (height, width).")


def _check_lengths(name: str, size: SizeDict) -> None:
    if any(not isinstance(length, int) or isinstance(length, bool) or length < 1 for _, length in size):
        raise ValueError(f"`{name}` is {dict(size)}; expected whole numbers of at least 1.")


def _output_size(height: int, width: int, size: SizeDict, size_divisor: int) -> tuple[int, int]:
    """Height and width after resizing; the aspect ratio is kept unless a side would fall below `size_divisor`."""
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
            f"`{name}` gives an input of {size[0]} x {size[1]} pixels; expected at most {LARGEST_INPUT}. Choose a smaller "
            "value, or segment the image in parts."
        )


def _padded_size(
    shapes: list[tuple[int, ...]], do_pad: bool | None, pad_size: SizeDict | None, size_divisor: int
) -> tuple[int, int]:
    """Height and width of a batch of images of shape (height, width, channels)."""
    if len({shape[2] for shape in shapes}) > 1:
        raise ValueError("The `images` have different channel counts; set `do_convert_rgb=True`.")
    height, width = max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
    if not do_pad:
        if len(set(shapes)) > 1:
            raise ValueError("The `images` have different sizes; set `do_pad=True` to batch them.")
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


class AlignZegImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    size_divisor (`int`, *optional*, defaults to 32):
        Padded height and width are multiples of it.
    ignore_index (`int`, *optional*, defaults to 255):
        Label of unlabelled pixels; with `None`, every label is a class.
    correction_gamma (`float`, *optional*, defaults to 1.0), correction_threshold (`float`, *optional*, defaults to 0.7):
        Predictive bias correction in post-processing.
    correction_on_scores (`bool`, *optional*, defaults to `False`):
        Whether it lowers scores instead of logits.
    dense_weight (`float`, *optional*, defaults to 0.5):
        Weight of the image tower's own cells in post-processing.
    """

    size_divisor: int
    ignore_index: int | None
    correction_gamma: float
    correction_threshold: float
    correction_on_scores: bool
    dense_weight: float


class AlignZegImageProcessor(AlignZegPostProcessing, PilBackend):
    r"""
    Prepares images and label maps for [`AlignZegModel`], and turns its outputs into label maps.

    Args:
        do_convert_rgb (`bool`, *optional*, defaults to `True`):
            Convert any mode to RGB; see [`to_rgb`] for transparency, 16-bit images and EXIF orientation.
        do_resize (`bool`, *optional*, defaults to `True`):
            Resize to `size`.
        size (`dict[str, int]`, *optional*, defaults to `{"shortest_edge": 640, "longest_edge": 2560}`):
            The aspect ratio is kept. The longer side is at most `longest_edge` (default: four times `shortest_edge`).
            For very long images, such as 1 x N pixels, the short side is then at least `size_divisor`. An `int` is a
            `shortest_edge`; `height` and `width`, or `max_height` and `max_width`, work too.
        resample (`int`, *optional*, defaults to bicubic):
            PIL resampling filter. Label maps always use nearest neighbour.
        do_rescale (`bool`, *optional*, defaults to `True`):
            Multiply the 8-bit values by `rescale_factor`. If `False`, values keep their original range.
        rescale_factor (`float`, *optional*, defaults to 1/255):
            See `do_rescale`.
        do_normalize (`bool`, *optional*, defaults to `True`):
            Subtract `image_mean`, divide by `image_std`.
        image_mean, image_std (`list[float]`, *optional*):
            Default: the mean and standard deviation of OpenAI's CLIP.
        do_pad (`bool`, *optional*, defaults to `True`):
            Pad with zeros at the bottom and the right to a multiple of `size_divisor` and to the largest image of the
            batch, or to `pad_size`. If `False`, all images must have the same size after resizing.
        size_divisor (`int`, *optional*, defaults to 32):
            See `do_pad`.
        ignore_index (`int`, *optional*, defaults to 255):
            Label of unlabelled pixels.
        correction_gamma (`float`, *optional*, defaults to 1.0):
            Predictive bias correction (PBC): how much the logits of seen classes are lowered in proposals that look
            unseen, to the benefit of the unseen ones. The right value depends on the logit scale;
            `scripts/calibrate.py` chooses it for a checkpoint.
        correction_threshold (`float`, *optional*, defaults to 0.7):
            Proposals whose probability of being unseen exceeds it are corrected.
        correction_on_scores (`bool`, *optional*, defaults to `False`):
            Multiply the probabilities of seen classes by `exp(-correction_gamma)` after the softmax, instead of lowering
            their logits before it.
        dense_weight (`float`, *optional*, defaults to 0.5):
            Weight `a`, from 0 to 1, of the cells of a convolutional image tower against the proposals in
            `score = proposals^(1 - a) · cells^a`. No effect on a ViT.
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
    correction_gamma = 1.0
    correction_threshold = 0.7
    correction_on_scores = False
    dense_weight = 0.5

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
        Converts images, and optionally their label maps, to model inputs.

        Args:
            images: an image or any nesting of images: PIL of any mode, paths, NumPy arrays or torch tensors of shape
                (height, width), (height, width, channels) or (channels, height, width), or batches of them. Integers
                are 0 to 255 (uint16: 0 to 65535), floats 0 to 1 or 0 to 255. EXIF orientation is applied to PIL
                images: label maps and `target_sizes` must match the upright image.
            segmentation_maps: one map of class ids per image, of the image's own height and width: PIL (L, P, I, I;16)
                or an array of whole numbers.
            kwargs: any argument of the constructor, for this call only.

        Returns:
            [`BatchFeature`] with, for images padded to (height, width):

            - **pixel_values** -- (batch, 3, height, width), float32.
            - **pixel_mask** -- (batch, height, width), int64: 1 on the image, 0 on padding.
            - **mask_labels** -- with `segmentation_maps`: per image (classes present, height, width), float32, 0 or 1;
              empty if the map contains only `ignore_index`.
            - **class_labels** -- with `segmentation_maps`: per image (classes present,), int64, ascending.

        Raises:
            ValueError: an image cannot be read, is empty or has values out of range, or a label map does not match its
                image. The message gives the position of the image.
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
        images = flatten_images(images)
        if not images:
            raise ValueError("`images` is empty; expected at least one image.")
        maps = None if segmentation_maps is None else flatten_maps(segmentation_maps, len(images))
        if maps is not None and len(maps) != len(images):
            raise ValueError(
                f"There are {len(maps)} `segmentation_maps` for {len(images)} `images`; expected one per image."
            )

        arrays, factors, labels = [], [], []
        for index, image in enumerate(images):
            try:
                planes, is_unit = to_planes(image, do_convert_rgb, input_data_format)
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
                    labels.append(resize_labels(to_label_map(maps[index], (height, width), ignore_index), *resized))
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
                "float32 cannot represent; expected values such as 1/255, 0.5 and 0.25."
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
        if maps is not None:  # lists, because the number of classes differs between images
            wrap = torch.from_numpy if return_tensors == "pt" else np.asarray
            pairs = [binary_masks(label, height, width, ignore_index) for label in labels]
            features["mask_labels"] = [wrap(masks) for masks, _ in pairs]
            features["class_labels"] = [wrap(ids) for _, ids in pairs]
        return features


AlignZegImageProcessor.register_for_auto_class()
