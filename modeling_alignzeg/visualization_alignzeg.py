# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Colours and pictures of segmentations: for scripts, the demo and whoever loads a checkpoint."""

import hashlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont


# The eight colours of Okabe and Ito, told apart by people with any common colour vision, and eight more; then darker and
# lighter ones of them.
_BASE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#8C6BB1") + (
    "#A6761D", "#E7298A", "#7FBC41", "#00CED1", "#4D4DFF", "#FB9A99", "#B8B800", "#A50F15"
)  # fmt: skip
NONE_COLOR = (120, 120, 120)


def _candidates() -> np.ndarray:
    base = np.array([[int(code[i : i + 2], 16) for i in (1, 3, 5)] for code in _BASE], float)
    shades = [base, base * 0.65, base + (255 - base) * 0.55, base * 0.8 + 30, base + (255 - base) * 0.3]
    return np.concatenate(shades).clip(0, 255).round().astype(np.uint8)


def class_colors(class_names: list[str]) -> np.ndarray:
    """One colour per class name, `uint8 (C, 3)`.

    A name has the same colour in every list, except where two names of one list would share it: the later one then
    takes the next free colour, as long as there are any.

    Raises:
        ValueError: a name is no string.
    """
    palette = _candidates()
    taken, colors = set(), []
    for position, name in enumerate(class_names):
        if not isinstance(name, str):
            raise ValueError(f"Class name {position} is {name!r}; expected a string.")
        code = name.strip().lower().encode(errors="replace")  # lone surrogates
        start = int.from_bytes(hashlib.sha256(code).digest()[:4], "big") % len(palette)
        order = [(start + step) % len(palette) for step in range(len(palette))]
        index = next((i for i in order if i not in taken), start)
        taken.add(index)
        colors.append(palette[index])
    return np.array(colors, np.uint8).reshape(-1, 3)


def draw_overlay(image: Image.Image, label: np.ndarray, class_names: list[str], opacity: float = 0.6) -> Image.Image:
    """`image` under the colours of its `label (height, width)`, with a legend of the classes that occur.

    Ids outside `class_names` ("none of these") are grey.

    Raises:
        ValueError: `label` holds no whole numbers or has another size than `image`.
    """
    label = np.asarray(label)
    if label.dtype.kind not in "iu" or label.shape != image.size[::-1]:
        raise ValueError(
            f"`label` is of type {label.dtype} and shape {label.shape}; expected whole numbers of the image's height and "
            f"width, {image.size[::-1]}."
        )
    pixels = np.asarray(image.convert("RGB"), float)
    colors = np.concatenate([class_colors(class_names), [NONE_COLOR]]).astype(float)
    known = np.where((label >= 0) & (label < len(class_names)), label, len(class_names))
    mixed = pixels * (1 - opacity) + colors[known] * opacity
    border = np.zeros(known.shape, bool)
    border[:, 1:] |= known[:, 1:] != known[:, :-1]
    border[1:] |= known[1:] != known[:-1]
    mixed[border] = 255
    ids, counts = np.unique(known, return_counts=True)
    entries = [
        (class_names[i] if i < len(class_names) else "none of these", colors[i], count / known.size)
        for i, count in sorted(zip(ids, counts), key=lambda pair: -pair[1])
    ]
    return _with_legend(Image.fromarray(mixed.round().astype(np.uint8)), entries)


def _with_legend(picture: Image.Image, entries: list[tuple[str, np.ndarray, float]]) -> Image.Image:
    scale = max(1, -(-256 // max(picture.size)))  # tiny pictures are enlarged, so that the legend can be read
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    size = max(12, min(picture.size) // 28)
    font = ImageFont.load_default(size)
    entries = [(name.encode(errors="replace").decode(), *rest) for name, *rest in entries]  # lone surrogates
    texts = [f"{name if len(name) <= 40 else name[:39] + '…'}  {share:.0%}" for name, _, share in entries]
    width = int(max(font.getlength(text) for text in texts)) + 3 * size
    line = int(size * 1.6)
    canvas = Image.new("RGB", (picture.width + width, max(picture.height, line * len(texts) + size)), "white")
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for row, (text, (_, color, _)) in enumerate(zip(texts, entries)):
        left, top = picture.width + size // 2, size // 2 + row * line
        draw.rectangle((left, top, left + size, top + size), fill=tuple(int(c) for c in color), outline="black")
        draw.text((left + size * 1.5, top + size / 2), text, fill="black", font=font, anchor="lm")
    return canvas


def draw_unseen_map(image: Image.Image, unseen: np.ndarray) -> Image.Image:
    """The unseen-ness map `(height, width)` in [0, 1] over a grey `image`: dark blue is seen, yellow is unseen.

    Raises:
        ValueError: `unseen` holds NaN or has another size than `image`.
    """
    unseen = np.asarray(unseen)
    if unseen.shape != image.size[::-1] or np.isnan(unseen).any():
        raise ValueError(
            f"`unseen` has shape {unseen.shape}{' and NaN' if np.isnan(unseen).any() else ''}; expected numbers of the "
            f"image's height and width, {image.size[::-1]}."
        )
    stops = np.array([[13, 26, 74], [32, 106, 140], [64, 176, 120], [253, 231, 37]], float)  # dark to light throughout
    position = np.clip(unseen, 0, 1) * (len(stops) - 1)
    low = np.minimum(position.astype(int), len(stops) - 2)
    heat = stops[low] + (stops[low + 1] - stops[low]) * (position - low)[..., None]
    grey = np.asarray(image.convert("L"), float)[..., None]
    return Image.fromarray((0.3 * grey + 0.7 * heat).round().clip(0, 255).astype(np.uint8))
