# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Test-time augmentation: the scores of a flipped image and of overlapping windows, averaged pixel by pixel.

The sum over proposals is linear in the masks, so a view (a window of the image, perhaps mirrored) is a list of further
proposals with their own way from their mask grid to the pixels of the label map. Scores of all classes at full size are
never held: label maps are made tile by tile, from the classes that can win there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modeling_alignzeg import AlignZegModel
from modeling_alignzeg.image_processing_alignzeg import WORKSPACE, _check_correction, class_probabilities


TILE = {"cpu": 64, "other": 128}  # pixels on a side


class Window(NamedTuple):
    """A part of an image that goes through the model by itself: upper left corner in pixels, and whether mirrored."""

    top: int
    left: int
    is_flipped: bool


class View(NamedTuple):
    """The proposals of one window, and where they lie.

    Attributes:
        probabilities: `(queries, classes)`, one such table for each readout.
        masks: `(queries, h, w)`, 0 to 1.
        rows: `(height, h)`: interpolates the mask grid at the rows of the label map; 0 outside of the window.
        columns: `(width, w)`, the same.
    """

    probabilities: list[Tensor]
    masks: Tensor
    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class Augmentation:
    """What an image is shown to the model as.

    Attributes:
        flip: Also mirrored.
        window: Side of square windows in pixels of the resized image, instead of the whole of it. A side of the image
            that is shorter is taken whole.
        stride: Distance of neighbouring windows; default two thirds of `window`. The last one ends with the image.
        batch_size: Windows in one forward pass.

    Raises:
        ValueError: A number is out of its range, or `stride` comes without `window`.
    """

    flip: bool = False
    window: int | None = None
    stride: int | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.window is None and self.stride is not None:
            raise ValueError(
                f"`stride` is {self.stride} but there is no `sliding_window`; give its side in pixels too."
            )
        if self.window is not None:
            if self.window < 1:
                raise ValueError(f"`sliding_window` is {self.window}; expected a positive number of pixels.")
            stride = max(1, self.window * 2 // 3) if self.stride is None else self.stride
            object.__setattr__(self, "stride", stride)
            if not 1 <= stride <= self.window:
                raise ValueError(
                    f"`stride` is {stride}; expected 1 to {self.window}, the side of the window: beyond it, "
                    "windows would leave pixels out."
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
        pixel_values: Tensor,
        size: tuple[int, int],
        readouts: list[tuple[float | None, float | None]],
        **vocabulary: Any,
    ) -> list[View]:
        """Runs the model on all windows of one image.

        Args:
            pixel_values: `(3, height, width)`, normalized, without padding.
            size: Height and width of the label map.
            readouts: PBC's gamma and threshold of each readout; `None` takes the checkpoint's.
            vocabulary: `text_prototypes (C, D)` and `seen_class_mask (C,)` for the model.

        Raises:
            ValueError: The model's outputs hold NaN.
        """
        height, width = pixel_values.shape[-2:]
        shape = [side if self.window is None else min(side, self.window) for side in (height, width)]
        windows, views = self.windows(height, width), []
        for start in range(0, len(windows), self.batch_size):
            chunk = windows[start : start + self.batch_size]
            crops = [pixel_values[:, top : top + shape[0], left : left + shape[1]] for top, left, _ in chunk]
            crops = [crop.flip(-1) if window.is_flipped else crop for crop, window in zip(crops, chunk)]
            outputs = model(pixel_values=torch.stack(crops), **vocabulary)
            classes = outputs.class_queries_logits.shape[-1] - 1
            tables = [
                class_probabilities(
                    outputs.class_queries_logits,
                    outputs.unseen_logits,
                    *_check_correction(outputs, classes, None, gamma, threshold),
                )[..., :-1]
                for gamma, threshold in readouts
            ]
            masks = outputs.masks_queries_logits.float().sigmoid()
            if masks.isnan().any() or any(table.isnan().any() for table in tables):
                raise ValueError("The model's outputs hold NaN; try float32, or check the checkpoint.")
            for index, (top, left, is_flipped) in enumerate(chunk):
                content = outputs.content_sizes[index].tolist()
                rows = window_matrix(masks.shape[-2], size[0], height, top, shape[0], content[0])
                columns = window_matrix(masks.shape[-1], size[1], width, left, shape[1], content[1], is_flipped)
                views.append(View([table[index] for table in tables], masks[index], rows, columns))
        return views


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side of `length` pixels, so that they cover it and none leaves it."""
    steps = math.ceil(max(length - window, 0) / stride)
    return [min(step * stride, max(length - window, 0)) for step in range(steps + 1)]


def window_matrix(
    cells: int, target: int, length: int, start: int, window: int, content: float, is_flipped: bool = False
) -> Tensor:
    """Bilinear interpolation from the mask grid of a window to those of `target` pixels that lie inside it.

    For a window that is the whole side it is [`~modeling_alignzeg.image_processing_alignzeg.resize_matrix`].

    Args:
        cells: Length of the mask grid.
        target: Length of the label map.
        length: Length of the image, in pixels of the model's input.
        start, window: Where the window begins and how long it is, in the same pixels.
        content: How many cells the window covers; what follows is padding.
        is_flipped: Whether the model saw it mirrored.

    Returns:
        `(target, cells)`, float32, on the CPU. Rows of pixels inside sum to 1, others are 0.
    """
    positions = (torch.arange(target, dtype=torch.float64) + 0.5) * (length / target) - start
    inside = ((positions >= 0) & (positions < window)).nonzero()[:, 0]
    positions = positions[inside]
    if is_flipped:
        positions = window - positions
    last = math.ceil(content) - 1
    positions = (positions * (content / window) - 0.5).clamp(0, last)
    lower = positions.floor()
    weight = (positions - lower).float()
    lower = lower.long()
    matrix = torch.zeros(target, cells)
    matrix[inside, lower] = 1 - weight
    matrix[inside, (lower + 1).clamp(max=last)] += weight
    return matrix


def label_map(views: list[View], readout: int = 0, penalty: Tensor | None = None) -> Tensor:
    """The class with the greatest score at every pixel: the mean over the views that show it, minus `penalty`.

    Args:
        views: Of one image; together they cover it.
        readout: Which of their tables of probabilities.
        penalty: `(classes,)`.

    Returns:
        `int64 (height, width)` on the device of the views.
    """
    device = views[0].masks.device
    probabilities = [view.probabilities[readout] for view in views]
    penalty = probabilities[0].new_zeros(probabilities[0].shape[1]) if penalty is None else penalty.to(device)
    height, width = len(views[0].rows), len(views[0].columns)
    side = TILE["cpu" if device.type == "cpu" else "other"]
    labels = torch.empty(height, width, dtype=torch.long, device=device)
    for top in range(0, height, side):
        for left in range(0, width, side):
            tile = (slice(top, min(top + side, height)), slice(left, min(left + side, width)))
            shown, parts, coverage = [], [], torch.zeros((), device=device)
            for view, table in zip(views, probabilities):
                rows, used_rows = _part(view.rows[tile[0]])
                columns, used_columns = _part(view.columns[tile[1]])
                if rows.numel() and columns.numel():
                    rows, columns = rows.to(device), columns.to(device)
                    shown.append(table)
                    parts.append(rows @ view.masks[:, used_rows, used_columns] @ columns.T)
                    coverage = coverage + rows.sum(1)[:, None] * columns.sum(1)
            masks = (torch.cat(parts) / coverage).flatten(1)
            labels[tile] = _winners(torch.cat(shown), masks, penalty).view(labels[tile].shape)
    return labels


def _part(matrix: Tensor) -> tuple[Tensor, slice]:
    """The columns of `matrix` that are not 0, from the first to the last, and where they are."""
    used = matrix.any(0).nonzero()[:, 0]
    part = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0)
    return matrix[:, part], part


def _winners(probabilities: Tensor, masks: Tensor, penalty: Tensor) -> Tensor:
    """The best class `(pixels,)` by `probabilities (queries, classes)` and `masks (queries, pixels)`."""
    # No class scores more than its probabilities times each mask's maximum; the best has no less than with the minima.
    upper = masks.amax(1) @ probabilities - penalty
    least = (masks.amin(1) @ probabilities - penalty).amax()
    rounding = 1e-5 * upper.abs().amax() + 1e-7
    contenders = (upper >= least - rounding).nonzero()[:, 0]
    best, labels = upper.new_full(masks.shape[1:], -torch.inf), contenders.new_zeros(masks.shape[1:])
    for part in contenders.split(max(1, WORKSPACE // masks.shape[1])):
        values, winners = (probabilities[:, part].T @ masks - penalty[part, None]).max(0)
        winners = part[winners]
        labels = torch.where(values > best, winners, labels)
        best = torch.maximum(best, values)
    return labels
