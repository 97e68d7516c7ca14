# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Training augmentation, and batching of label maps as masks.

All randomness comes from the given `torch.Generator`, so that samples are exactly reproducible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torchvision.transforms.v2 import functional

from modeling_alignzeg import AlignZegImageProcessor

from ..files import shown


# The photometric distortion of SSD (Liu et al., 2016), as in SAN and Mask2Former. Each part is applied with
# probability 0.5; the values are its maximum change.
BRIGHTNESS = 32 / 255  # relative
CONTRAST = SATURATION = 0.5  # relative
HUE = 0.1  # turns of the colour circle

CROP_TRIES = 10


@dataclass(frozen=True)
class TrainTransform:
    """Random scale, crop, horizontal flip and colour jitter for one training sample.

    The scale is relative to the crop, as in SAN and Mask2Former: the short side becomes `crop_size` times a random factor.
        (Copy-paste's range of 0.1–2.0 would give crops that are mostly padding.) An image smaller than the crop is returned
        smaller; [`Collator`] pads it.

    Attributes:
        crop_size: Maximum height and width of the result in pixels. `None`: no scaling or cropping.
        scale_range: Minimum and maximum length of the short side before the crop, in units of `crop_size`.
        max_category_ratio: Maximum share of a crop's labelled pixels that may belong to one class, in (0, 1]. After
            [`CROP_TRIES`] crops above it, the last one is used.
        flip_probability: Probability of a horizontal flip.
        color_jitter: Whether to change brightness, contrast, saturation and hue.
        ignore_index: Id of unlabelled pixels.
        resample: PIL resampling filter for images, the same as in the image processor.

    Raises:
        ValueError: An attribute is out of range.
    """

    crop_size: int | None = 640
    scale_range: tuple[float, float] = (0.5, 2.0)
    max_category_ratio: float = 0.75
    flip_probability: float = 0.5
    color_jitter: bool = True
    ignore_index: int = 255
    resample: int = PILImage.Resampling.BICUBIC

    def __post_init__(self) -> None:
        crop, scale = self.crop_size, self.scale_range
        if crop is not None and (type(crop) is not int or crop < 1):
            raise ValueError(f"`crop_size` is {shown(crop)}; expected a whole number of pixels ≥ 1, or None.")
        is_pair = isinstance(scale, Sequence) and len(scale) == 2 and all(map(_is_number, scale))
        if not is_pair or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"`scale_range` is {shown(scale)}; expected two positive factors in ascending order.")
        if not _is_number(self.max_category_ratio) or not 0 < self.max_category_ratio <= 1:
            raise ValueError(
                f"`max_category_ratio` is {shown(self.max_category_ratio)}; expected a number above 0, at most 1."
            )
        if not _is_number(self.flip_probability) or not 0 <= self.flip_probability <= 1:
            raise ValueError(f"`flip_probability` is {shown(self.flip_probability)}; expected a number from 0 to 1.")
        if not isinstance(self.color_jitter, bool):
            raise ValueError(f"`color_jitter` is {shown(self.color_jitter)}; expected true or false.")

    def __call__(
        self, image: np.ndarray, label: np.ndarray, generator: torch.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws one version of a sample.

        Args:
            image: `uint8` array of shape (height, width, 3), RGB.
            label: `int64` array of shape (height, width).
            generator: Source of all randomness.

        Returns:
            Image and label map of the same types and of equal size. No new ids occur.
        """
        if self.crop_size is not None:
            image, label = self._scale_and_crop(image, label, self.crop_size, generator)
        if _uniform(generator) < self.flip_probability:
            image, label = image[:, ::-1].copy(), label[:, ::-1].copy()  # torch does not support negative strides
        if self.color_jitter:
            image = jitter_colors(image, generator)
        return np.ascontiguousarray(image), np.ascontiguousarray(label)

    def _scale_and_crop(
        self, image: np.ndarray, label: np.ndarray, crop_size: int, generator: torch.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        scale = crop_size * _uniform(generator, *self.scale_range) / min(label.shape)
        height, width = (max(round(side * scale), 1) for side in label.shape)
        crop_height, crop_width = min(height, crop_size), min(width, crop_size)
        for _ in range(CROP_TRIES):
            top = _integer(generator, height - crop_height + 1)
            left = _integer(generator, width - crop_width + 1)
            rows = _nearest(label.shape[0], height)[top : top + crop_height]
            columns = _nearest(label.shape[1], width)[left : left + crop_width]
            label_crop = label[rows][:, columns]
            _, counts = np.unique(label_crop[label_crop != self.ignore_index], return_counts=True)
            if counts.size and counts.max() <= self.max_category_ratio * counts.sum():
                break
        # Only the crop is resized, not the whole image: `box` is its position in the source, in fractional pixels.
        y_scale, x_scale = label.shape[0] / height, label.shape[1] / width
        right = min((left + crop_width) * x_scale, label.shape[1])
        bottom = min((top + crop_height) * y_scale, label.shape[0])
        box = (left * x_scale, top * y_scale, right, bottom)
        resized = PILImage.fromarray(image).resize((crop_width, crop_height), self.resample, box)
        return np.array(resized), label_crop


def jitter_colors(image: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """Changes brightness, contrast, saturation and hue of `image`, a `uint8` RGB array of shape (height, width, 3).

    `v2.RandomPhotometricDistort` does the same, but draws from the global generator.
    """
    brightness, contrast, saturation, hue = (
        (functional.adjust_brightness, 1 + _maybe(generator, BRIGHTNESS)),
        (functional.adjust_contrast, 1 + _maybe(generator, CONTRAST)),
        (functional.adjust_saturation, 1 + _maybe(generator, SATURATION)),
        (functional.adjust_hue, _maybe(generator, HUE)),
    )
    contrast_last = _uniform(generator) < 0.5
    steps = [brightness, saturation, hue, contrast] if contrast_last else [brightness, contrast, saturation, hue]
    picture = PILImage.fromarray(image)
    for adjust, amount in steps:
        picture = adjust(picture, amount)
    return np.array(picture)


@dataclass(frozen=True)
class Collator:
    """Batches samples of [`~zeroshot.data.dataset.SegmentationDataset`] as arguments of the model's `forward`.

    Attributes:
        image_processor: Normalizes and pads; images are not resized.
        size_divisor: Height and width are padded to a multiple of this. With the crop size, all batches have the same shape.
    """

    image_processor: AlignZegImageProcessor
    size_divisor: int

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the output of [`AlignZegImageProcessor`], with `bool` masks, and

        - `names`, `indices` and `epochs`: lists of the samples' names, positions in the dataset, and epochs that seeded
          their transforms.
        """
        batch = self.image_processor(
            [sample["image"] for sample in samples],
            [sample["label"] for sample in samples],
            do_resize=False,
            size_divisor=self.size_divisor,
            return_tensors="pt",
        )
        return {
            **batch,
            "mask_labels": [masks.bool() for masks in batch["mask_labels"]],
            "names": [sample["name"] for sample in samples],
            "indices": [sample["index"] for sample in samples],
            "epochs": [sample["epoch"] for sample in samples],
        }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _nearest(source: int, target: int) -> np.ndarray:
    """The nearest of `source` positions for each of `target` positions along a side; indexing with them preserves ids."""
    return ((np.arange(target) + 0.5) * (source / target)).astype(np.int64)


def _uniform(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def _integer(generator: torch.Generator, high: int) -> int:
    """A random integer from 0 to high - 1."""
    return int(torch.randint(high, (), generator=generator))


def _maybe(generator: torch.Generator, limit: float) -> float:
    """A random number in [-limit, limit], or 0 with probability 0.5."""
    return _uniform(generator, -limit, limit) if _uniform(generator) < 0.5 else 0.0
