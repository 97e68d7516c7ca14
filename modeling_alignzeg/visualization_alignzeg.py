# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Colours of classes, overlays of label maps, and unseen-ness maps as images."""

import hashlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont


# The eight colours of Okabe and Ito, which are safe for colour-blind readers, and eight more. `palette` adds darker
# and lighter shades of them.
_BASE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#8C6BB1") + (
    "#A6761D", "#E7298A", "#7FBC41", "#00CED1", "#4D4DFF", "#FB9A99", "#B8B800", "#A50F15"
)  # fmt: skip
NONE_COLOR = (120, 120, 120)


def palette() -> np.ndarray:
    """Colours that differ, the clearest first: `uint8 (80, 3)`."""
    base = np.array([[int(code[i : i + 2], 16) for i in (1, 3, 5)] for code in _BASE], float)
    shades = [base, base * 0.65, base + (255 - base) * 0.55, base * 0.8 + 30, base + (255 - base) * 0.3]
    return np.concatenate(shades).clip(0, 255).round().astype(np.uint8)


def class_colors(class_names: list[str]) -> np.ndarray:
    """One colour per class name, `uint8 (C, 3)`.

    A name has the same colour in every list. If two names of one list collide, the later one takes the next free
    colour; colours repeat only after the palette is used up.

    Raises:
        ValueError: a name is not a string.
    """
    candidates = palette()
    taken, colors = set(), []
    for position, name in enumerate(class_names):
        if not isinstance(name, str):
            raise ValueError(f"Class name {position} is {name!r}; expected a string.")
        code = name.strip().lower().encode(errors="replace")  # lone surrogates
        start = int.from_bytes(hashlib.sha256(code).digest()[:4], "big") % len(candidates)
        order = [(start + step) % len(candidates) for step in range(len(candidates))]
        index = next((i for i in order if i not in taken), start)
        taken.add(index)
        colors.append(candidates[index])
    return np.array(colors, np.uint8).reshape(-1, 3)


def draw_overlay(
    image: Image.Image, label: np.ndarray, class_names: list[str], opacity: float = 0.6, legend: bool = True
) -> Image.Image:
    """Blends `image` with the colours of its label map, with white borders between regions.

    Args:
        image: Any mode; drawn as RGB.
        label: Integers `(height, width)`, indices into `class_names`. Other ids, such as "none of these", are grey.
        class_names: Names of the classes.
        opacity: Weight of the colours, 0 to 1.
        legend: Whether to add a legend of the classes that occur, with their share of the pixels.

    Raises:
        ValueError: `label` does not contain integers, or its size differs from that of `image`.
    """
    label = np.asarray(label)
    if label.dtype.kind not in "iu" or label.shape != image.size[::-1]:
        raise ValueError(
            f"`label` is of type {label.dtype} and shape {label.shape}; expected integers of shape "
            f"{image.size[::-1]}, the height and width of the image."
        )
    colors = np.concatenate([class_colors(class_names), np.array([NONE_COLOR], np.uint8)])
    known = np.where((label >= 0) & (label < len(class_names)), label, len(class_names))
    mixed = Image.blend(image.convert("RGB"), Image.fromarray(colors[known]), opacity)
    border = np.zeros(known.shape, bool)
    border[:, 1:] |= known[:, 1:] != known[:, :-1]
    border[1:] |= known[1:] != known[:-1]
    mixed.paste("white", mask=Image.fromarray(border))
    if not legend:
        return mixed
    ids, counts = np.unique(known, return_counts=True)
    entries = [
        (class_names[i] if i < len(class_names) else "none of these", colors[i], count / known.size)
        for i, count in sorted(zip(ids, counts), key=lambda pair: -pair[1])
    ]
    return _with_legend(mixed, entries)


def _with_legend(overlay: Image.Image, entries: list[tuple[str, np.ndarray, float]]) -> Image.Image:
    scale = max(1, -(-256 // max(overlay.size)))  # tiny images are enlarged so that the legend is readable
    overlay = overlay.resize((overlay.width * scale, overlay.height * scale), Image.Resampling.NEAREST)
    size = max(12, min(overlay.size) // 28)
    font = ImageFont.load_default(size)
    entries = [(name.encode(errors="replace").decode(), *rest) for name, *rest in entries]  # lone surrogates
    texts = [f"{name if len(name) <= 40 else name[:39] + '…'}  {share:.0%}" for name, _, share in entries]
    width = int(max(font.getlength(text) for text in texts)) + 3 * size
    line = int(size * 1.6)
    canvas = Image.new("RGB", (overlay.width + width, max(overlay.height, line * len(texts) + size)), "white")
    canvas.paste(overlay, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for row, (text, (_, color, _)) in enumerate(zip(texts, entries)):
        left, top = overlay.width + size // 2, size // 2 + row * line
        draw.rectangle((left, top, left + size, top + size), fill=tuple(int(c) for c in color), outline="black")
        draw.text((left + size * 1.5, top + size / 2), text, fill="black", font=font, anchor="lm")
    return canvas


def draw_unseen_map(image: Image.Image, unseen: np.ndarray) -> Image.Image:
    """Blends a greyscale `image` with its unseen-ness map `(height, width)` in [0, 1]: dark blue is seen, yellow unseen.

    Raises:
        ValueError: `unseen` contains NaN, or its size differs from that of `image`.
    """
    unseen = np.asarray(unseen)
    if unseen.shape != image.size[::-1] or np.isnan(unseen).any():
        raise ValueError(
            f"`unseen` has shape {unseen.shape}{' and NaN' if np.isnan(unseen).any() else ''}; expected numbers "
            f"of shape {image.size[::-1]}, the height and width of the image."
        )
    stops = np.array([[13, 26, 74], [32, 106, 140], [64, 176, 120], [253, 231, 37]], float)  # lightness increases
    position = np.clip(unseen, 0, 1) * (len(stops) - 1)
    low = np.minimum(position.astype(int), len(stops) - 2)
    heat = stops[low] + (stops[low + 1] - stops[low]) * (position - low)[..., None]
    grey = np.asarray(image.convert("L"), float)[..., None]
    return Image.fromarray((0.3 * grey + 0.7 * heat).round().clip(0, 255).astype(np.uint8))
