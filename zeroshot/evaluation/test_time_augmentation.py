# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Test-time augmentation: mirror images and overlapping windows as views of an image (readout_alignzeg.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modeling_alignzeg import AlignZegImageProcessor, AlignZegModel
from modeling_alignzeg.readout_alignzeg import View, image_view


class Window(NamedTuple):
    """A window of an image for one forward pass: upper left corner in pixels, and whether it is mirrored."""

    top: int
    left: int
    is_flipped: bool


@dataclass(frozen=True)
class Augmentation:
    """Settings of test-time augmentation.

    Attributes:
        flip: Whether to add the mirror image.
        window: Side of square windows in pixels of the resized image, instead of the whole image. A shorter side of the
            image is used completely.
        stride: Distance between neighbouring windows; default: two thirds of `window`. The last one ends at the border.
        batch_size: Windows per forward pass.

    Raises:
        ValueError: A number is out of range, or `stride` is given without `window`.
    """

    flip: bool = False
    window: int | None = None
    stride: int | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.window is None and self.stride is not None:
            raise ValueError(
                f"`stride` is {self.stride} but `sliding_window` is missing; pass its side in pixels too."
            )
        if self.window is not None:
            if self.window < 1:
                raise ValueError(f"`sliding_window` is {self.window}; expected a positive number of pixels.")
            stride = max(1, self.window * 2 // 3) if self.stride is None else self.stride
            object.__setattr__(self, "stride", stride)
            if not 1 <= stride <= self.window:
                raise ValueError(
                    f"`stride` is {stride}; expected 1 to {self.window}, the side of the window: beyond it, "
                    "windows would skip pixels."
                )

    def windows(self, height: int, width: int) -> list[Window]:
        """The windows of an image of that size, row by row."""
        tops, lefts = [0], [0]
        if self.window is not None and self.stride is not None:
            tops, lefts = (window_starts(side, self.window, self.stride) for side in (height, width))
        flips = (False, True) if self.flip else (False,)
        return [Window(top, left, flip) for top in tops for left in lefts for flip in flips]

    @torch.no_grad()
    def views(
        self,
        model: AlignZegModel,
        image_processor: AlignZegImageProcessor,
        pixel_values: Tensor,
        size: tuple[int, int],
        readouts: list[tuple[float | None, float | None]],
        **vocabulary: Any,
    ) -> list[list[View]]:
        """Runs the model on all windows of one image.

        Args:
            pixel_values: `(3, height, width)`, normalized, without padding.
            size: Height and width of the label map.
            readouts: PBC's gamma and threshold of each readout; `None` uses the checkpoint's.
            vocabulary: `text_prototypes (C, D)` and `seen_class_mask (C,)` for the model.

        Returns:
            The views per readout, without the background.
        """
        image = pixel_values.shape[-2:]
        shape = [side if self.window is None else min(side, self.window) for side in image]
        windows: list[Window] = self.windows(*image)
        views: list[list[View]] = [[] for _ in readouts]
        for start in range(0, len(windows), self.batch_size):
            chunk = windows[start : start + self.batch_size]
            crops = [pixel_values[:, top : top + shape[0], left : left + shape[1]] for top, left, _ in chunk]
            crops = [crop.flip(-1) if window.is_flipped else crop for crop, window in zip(crops, chunk)]
            outputs = model(pixel_values=torch.stack(crops), **vocabulary)
            tables = [image_processor.proposal_probabilities(outputs, None, *pair)[..., :-1] for pair in readouts]
            for index, (top, left, is_flipped) in enumerate(chunk):
                places = ((top, shape[0], image[0]), (left, shape[1], image[1]))
                weight = image_processor.dense_weight
                view = image_view(outputs, index, tables[0][index], size, weight, places, is_flipped)
                for each, table in zip(views, tables):
                    each.append(view._replace(probabilities=table[index]))
        return views


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Start positions of windows that cover a side of `length` pixels without crossing its ends."""
    steps = math.ceil(max(length - window, 0) / stride)
    return [min(step * stride, max(length - window, 0)) for step in range(steps + 1)]
