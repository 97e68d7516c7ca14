# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Colour-coded label images."""

from __future__ import annotations

import numpy as np


class UnknownColorError(ValueError):
    """A label image has `colors`, (red, green, blue), that no class has."""

    def __init__(self, colors: list[tuple[int, int, int]], pixels: int) -> None:
        self.colors = colors
        super().__init__(f"the label image has the colours {colors[:10]} in {pixels} pixels, which no class has")


def voc_palette(count: int) -> np.ndarray:
    """The first `count` colours of PASCAL VOC's palette, `uint8 (count, 3)`: the bits of an id are assigned to red, green
    and blue in turn, filling each from its highest bit."""
    ids = np.arange(count)
    colors = np.zeros((count, 3), np.uint8)
    for level in range(8):
        for channel in range(3):
            colors[:, channel] |= (((ids >> (3 * level + channel)) & 1) << (7 - level)).astype(np.uint8)
    return colors


def colors_to_ids(picture: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Converts a colour-coded label image `uint8 (height, width, 3)` to positions in `palette (K, 3)`, `int64 (height,
    width)`.

    Raises:
        UnknownColorError: The image has colours that the palette does not have.
    """
    weights = np.array([1 << 16, 1 << 8, 1])
    codes, known = picture.astype(np.int64) @ weights, np.asarray(palette).astype(np.int64) @ weights
    order = np.argsort(known)
    places = np.minimum(np.searchsorted(known[order], codes), len(known) - 1)
    ids = order[places]
    wrong = known[ids] != codes
    if wrong.any():
        colors = [(code >> 16, code >> 8 & 255, code & 255) for code in np.unique(codes[wrong]).tolist()]
        raise UnknownColorError(colors, int(wrong.sum()))
    return ids
