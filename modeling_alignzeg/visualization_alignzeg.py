# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Class colours, overlays of label maps, and unseen maps as images."""

import hashlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .images_alignzeg import count_labels, resize_labels


# The eight colours of Okabe and Ito, which colour-blind readers can tell apart, and eight more. `palette` adds darker
# and lighter shades of them.
_BASE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#8C6BB1") + (
    "#A6761D", "#E7298A", "#7FBC41", "#00CED1", "#4D4DFF", "#FB9A99", "#B8B800", "#A50F15"
)  # fmt: skip
NONE_COLOR = (120, 120, 120)


def palette() -> np.ndarray:
    """Distinct colours, the most distinct first: `uint8 (80, 3)`."""
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


def _fit(size: tuple[int, int], max_size: int | None) -> tuple[int, int]:
    """`size`, scaled down so that its longer side is at most `max_size`."""
    scale = 1 if max_size is None else min(1, max_size / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _resized(image: Image.Image, size: tuple[int, int], mode: str) -> Image.Image:
    return image.convert(mode).resize(size, Image.Resampling.BILINEAR, reducing_gap=2)


def _painted(values: np.ndarray, colors: np.ndarray) -> Image.Image:
    """An RGB image of `values`, `uint8 (height, width)`, indices into `colors`, `uint8 (at most 256, 3)`."""
    picture = Image.fromarray(values)
    picture.putpalette(colors.tobytes())
    return picture.convert("RGB")


def draw_overlay(
    image: Image.Image,
    label: np.ndarray,
    class_names: list[str],
    opacity: float = 0.6,
    legend: bool = True,
    max_size: int | None = None,
    other_name: str = "none of these",
) -> Image.Image:
    """Blends `image` with the colours of its label map, with white borders between regions.

    Args:
        image: Any mode; drawn as RGB.
        label: Integers `(height, width)`, indices into `class_names`. Other ids are grey.
        class_names: Names of the classes.
        opacity: Weight of the colours, 0 to 1.
        legend: Whether to add a legend of the classes that occur, with their share of the pixels of `label`.
        max_size: Maximum width and height of the overlay without its legend; larger images are scaled down.
        other_name: What the legend calls other ids.

    Raises:
        ValueError: `label` does not contain integers, or it differs in size from `image`.
    """
    label = np.asarray(label)
    if label.dtype.kind not in "iu" or label.shape != image.size[::-1]:
        raise ValueError(
            f"`label` is of type {label.dtype} and shape {label.shape}; expected integers of shape "
            f"{image.size[::-1]}, the height and width of the image."
        )
    size = _fit(image.size, max_size)
    known = resize_labels(label, size[1], size[0]) if size != image.size else label
    known = np.where((known >= 0) & (known < len(class_names)), known, len(class_names)).astype(np.int32)
    colors = np.concatenate([class_colors(class_names), np.array([NONE_COLOR], np.uint8)])
    palette, positions = np.unique(colors, axis=0, return_inverse=True)  # many classes share the few colours
    painted = _painted(positions.reshape(-1).astype(np.uint8)[known], palette)
    mixed = Image.blend(_resized(image, size, "RGB"), painted, opacity)
    border = np.zeros(known.shape, bool)
    border[:, 1:] |= known[:, 1:] != known[:, :-1]
    border[1:] |= known[1:] != known[:-1]
    mixed.paste("white", mask=Image.fromarray(border))
    if not legend:
        return mixed
    counts = count_labels(label, len(class_names))
    counts = np.append(counts, label.size - counts.sum())
    entries = [
        (class_names[i] if i < len(class_names) else other_name, colors[i], counts[i] / label.size)
        for i in sorted(counts.nonzero()[0], key=lambda i: -counts[i])
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


def draw_unseen_map(image: Image.Image, unseen: np.ndarray, max_size: int | None = None) -> Image.Image:
    """Blends a greyscale `image` with its unseen scores `(height, width)` in [0, 1]: dark blue is seen, yellow unseen.

    Scores are quantized to 256 steps. `max_size` is as in [`draw_overlay`].

    Raises:
        ValueError: `unseen` contains NaN, or it differs in size from `image`.
    """
    unseen = np.asarray(unseen)
    if unseen.shape != image.size[::-1] or np.isnan(unseen).any():
        raise ValueError(
            f"`unseen` has shape {unseen.shape}{' and NaN' if np.isnan(unseen).any() else ''}; expected numbers "
            f"of shape {image.size[::-1]}, the height and width of the image."
        )
    size = _fit(image.size, max_size)
    if size != image.size:
        unseen = resize_labels(unseen, size[1], size[0])
    stops = np.array([[13, 26, 74], [32, 106, 140], [64, 176, 120], [253, 231, 37]], float)  # lightness increases
    steps = np.linspace(0, 1, 256)
    colors = np.stack([np.interp(steps, np.linspace(0, 1, len(stops)), stop) for stop in stops.T], 1).round()
    heat = _painted((np.clip(unseen, 0, 1) * 255).round().astype(np.uint8), colors.astype(np.uint8))
    return Image.blend(_resized(image, size, "L").convert("RGB"), heat, 0.7)
