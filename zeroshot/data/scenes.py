# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The embedded benchmark: procedurally generated scenes with exact label maps; no download needed.

A *thing* class is a pair of attributes, such as ``"red striped"``; eight colours times eight surface patterns give 64 of
them. A *stuff* class is a textured background, such as ``"grass"``. A scene shows one or two stuff classes, one to six
overlapping things of random shape, size and rotation, and unlabelled grey clutter (``ignore_index``).

Every scene is a pure function of ``(seed, split, index)``: it does not depend on the scenes generated before it or on the
number of processes.
"""

from __future__ import annotations

import colorsys
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage


COLORS: dict[str, tuple[float, float, float]] = {  # hue in degrees, saturation, value
    "red": (0, 0.90, 0.85),
    "orange": (28, 0.95, 0.97),
    "yellow": (54, 0.95, 0.95),
    "green": (120, 0.80, 0.62),
    "cyan": (182, 0.85, 0.88),
    "blue": (224, 0.85, 0.85),
    "purple": (274, 0.75, 0.65),
    "pink": (326, 0.50, 0.98),
}
PATTERNS: tuple[str, ...] = ("plain", "striped", "checkered", "dotted", "grid", "zigzag", "ringed", "speckled")
STUFF: tuple[str, ...] = ("grass", "sand", "water", "brick", "wood", "snow")
THINGS: tuple[str, ...] = tuple(f"{color} {pattern}" for color in COLORS for pattern in PATTERNS)
CLASSES: tuple[str, ...] = THINGS + STUFF

IGNORE_INDEX = 255
SCENE_SIZE = 128
SPLITS: dict[str, int] = {"train": 0, "validation": 1, "test": 2}  # the value is part of the seed


@dataclass(frozen=True)
class Scene:
    """One synthetic scene.

    Attributes:
        image: `uint8` array of shape `(size, size, 3)`, RGB.
        label: `uint8` array of shape `(size, size)`: index into [`CLASSES`], or [`IGNORE_INDEX`] on clutter.
        things: `uint8` array of shape `(size, size)`: 1, 2, … on each thing, in drawing order; 0 elsewhere.
    """

    image: np.ndarray
    label: np.ndarray
    things: np.ndarray

    @property
    def classes(self) -> list[str]:
        """Names of the classes with at least one visible pixel, in the order of [`CLASSES`]."""
        return [CLASSES[i] for i in np.unique(self.label) if i != IGNORE_INDEX]


def draw_scene(seed: int, split: str, index: int, size: int = SCENE_SIZE) -> Scene:
    """Draws scene `index` of `split`.

    Args:
        seed: Seed of the whole benchmark, non-negative.
        split: One of [`SPLITS`]; splits never share a scene.
        index: Position in the split, non-negative.
        size: Side in pixels. Things and patterns scale with it.

    Raises:
        ValueError: `split` is unknown, or `index`, `seed` or `size` is out of range.
    """
    rng = _generator(seed, split, index, size)
    image, label = _draw_ground(rng, size)
    for _ in range(rng.integers(0, 5)):
        _draw_clutter(rng, image, label)
    things = np.zeros_like(label)
    for number in range(1, rng.integers(1, 7) + 1):
        class_id = int(rng.integers(len(THINGS)))
        center = rng.uniform(0.08, 0.92, 2) * size
        drawn = np.full_like(label, IGNORE_INDEX)
        _draw_thing(rng, image, drawn, class_id, center, radius=rng.uniform(0.18, 0.34) * size)
        things[drawn == class_id] = number
        label[drawn == class_id] = class_id
    return Scene(_finish(rng, image), label, things)


def draw_single(
    seed: int, split: str, index: int, class_id: int, size: int = SCENE_SIZE, min_radius: float = 0.22
) -> np.ndarray:
    """Draws a single class like a captioned web image: a thing on a background, or stuff over the whole image.

    Returns a `uint8` array of shape `(size, size, 3)`. Arguments as for [`draw_scene`]; `class_id` indexes [`CLASSES`],
    and the thing's radius is at least `min_radius` times the side.
    """
    rng = _generator(seed, split, index, size, stream=1)
    if class_id >= len(THINGS):
        image = _texture(rng, CLASSES[class_id], size)
        label = np.zeros((size, size), np.uint8)
    else:
        if rng.random() < 0.5:
            image, label = _draw_ground(rng, size)
        else:
            grey, tint = rng.uniform(0.1, 0.9), rng.uniform(-0.12, 0.12, 3)
            image = np.broadcast_to(np.clip(grey + tint, 0, 1).astype(np.float32), (size, size, 3)).copy()
            label = np.zeros((size, size), np.uint8)
        for _ in range(rng.integers(0, 3)):
            _draw_clutter(rng, image, label)
        radius = rng.uniform(min_radius, 0.48) * size
        slack = max(0.5 - radius / size, 0.05)
        _draw_thing(rng, image, label, class_id, size * (0.5 + rng.uniform(-slack, slack, 2)), radius)
    return _finish(rng, image)


def scenes_dataset(split: str, num_scenes: int, seed: int = 0, size: int = SCENE_SIZE):
    """The scenes as a [`datasets.Dataset`] with columns `image` (RGB) and `label` (mode L, class ids), PNG encoded."""
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Image(), "index": datasets.Value("int32")}
    )
    rows: dict[str, list[Any]] = {"image": [], "label": [], "index": list(range(num_scenes))}
    for index in range(num_scenes):
        scene = draw_scene(seed, split, index, size)
        rows["image"].append({"bytes": _png(scene.image), "path": None})
        rows["label"].append({"bytes": _png(scene.label), "path": None})
    return datasets.Dataset.from_dict(rows, features=features, split=datasets.NamedSplit(split))


def export_scenes(folder: str | Path, split: str, num_scenes: int, seed: int = 0, size: int = SCENE_SIZE) -> Path:
    """Writes `folder/split/{images,labels}/00000.png …`; label maps are palette PNGs whose values are the class ids."""
    from modeling_alignzeg import class_colors

    root = Path(folder) / split
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    palette = class_colors(list(CLASSES)).flatten().tolist()
    for index in range(num_scenes):
        scene = draw_scene(seed, split, index, size)
        PILImage.fromarray(scene.image).save(root / "images" / f"{index:05d}.png")
        label = PILImage.fromarray(scene.label)
        label.putpalette(palette)
        label.save(root / "labels" / f"{index:05d}.png")
    return root


# --- drawing -----------------------------------------------------------------------------------------------------


def _generator(seed: int, split: str, index: int, size: int, stream: int = 0) -> np.random.Generator:
    if split not in SPLITS:
        raise ValueError(f"`split` is {split!r}; expected one of {', '.join(SPLITS)}.")
    if seed < 0 or index < 0:
        raise ValueError(f"`seed` and `index` must be non-negative integers, got {seed} and {index}.")
    if size < 32:
        raise ValueError(f"`size` is {size}; scenes need at least 32 pixels per side for visible patterns.")
    return np.random.default_rng([seed, SPLITS[split], index, stream])


def _png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(array).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _smooth_noise(rng: np.random.Generator, size: int, cell: tuple[float, float]) -> np.ndarray:
    """Noise in [0, 1] of shape (size, size): random values every `cell` = (rows, columns) pixels, bilinearly
    interpolated."""
    shape = [int(np.ceil(size / c)) + 2 for c in cell]
    values = rng.random(shape, dtype=np.float32)
    y, x = (np.arange(size, dtype=np.float32) / c + rng.random() for c in cell)
    y0, x0 = y.astype(int), x.astype(int)
    wy, wx = (y - y0)[:, None], (x - x0)[None, :]
    rows = values[y0] * (1 - wy) + values[y0 + 1] * wy
    return rows[:, x0] * (1 - wx) + rows[:, x0 + 1] * wx


def _texture(rng: np.random.Generator, name: str, size: int) -> np.ndarray:
    """The stuff class `name` over the whole canvas: float array of shape (size, size, 3) in [0, 1]."""
    unit = size / SCENE_SIZE
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / unit
    fine = rng.random((size, size), dtype=np.float32)
    if name == "grass":
        base, tone, field = (0.22, 0.42, 0.12), (0.50, 0.68, 0.25), _smooth_noise(rng, size, (9 * unit, 2 * unit))
    elif name == "sand":
        base, tone, field = (
            (0.72, 0.60, 0.40),
            (0.90, 0.80, 0.60),
            0.6 * fine + 0.4 * _smooth_noise(rng, size, (24, 24)),
        )
    elif name == "water":
        phase = 9 * _smooth_noise(rng, size, (20 * unit, 40 * unit))
        waves = 0.5 + 0.5 * np.sin(2 * np.pi * y / rng.uniform(9, 13) + phase)
        base, tone, field = (0.10, 0.30, 0.50), (0.40, 0.62, 0.78), waves**2
    elif name == "brick":
        height, width = rng.uniform(10, 13), rng.uniform(22, 28)
        row = np.floor((y + rng.uniform(0, height)) / height)
        joint = ((y % height) < 1.8) | (((x + row % 2 * width / 2) % width) < 1.8)
        base, tone = (0.55, 0.25, 0.18), (0.78, 0.74, 0.68)
        field = np.where(joint, 1.0, 0.25 * _smooth_noise(rng, size, (height * unit, width * unit)))
    elif name == "wood":
        warp = 14 * _smooth_noise(rng, size, (60 * unit, 30 * unit))
        grain = 0.5 + 0.5 * np.sin(2 * np.pi * (x + warp) / rng.uniform(7, 12))
        base, tone, field = (0.36, 0.22, 0.11), (0.62, 0.42, 0.24), 0.7 * grain + 0.3 * fine
    else:  # snow
        base, tone, field = (0.78, 0.83, 0.90), (0.97, 0.98, 1.00), _smooth_noise(rng, size, (18 * unit, 26 * unit))
    dark, light = (np.array(c, np.float32) + rng.uniform(-0.04, 0.04, 3).astype(np.float32) for c in (base, tone))
    field = np.clip(field + 0.10 * (fine - 0.5), 0, 1).astype(np.float32)[..., None]
    return dark * (1 - field) + light * field


def _draw_ground(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One stuff class, or two that meet along a wavy border."""
    first, second = rng.choice(len(STUFF), 2, replace=False)
    image = _texture(rng, STUFF[first], size)
    label = np.full((size, size), len(THINGS) + first, np.uint8)
    if rng.random() < 0.6:
        y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
        angle = rng.uniform(0, 2 * np.pi)
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        border = rng.uniform(-0.2, 0.2) + 0.05 * np.sin(rng.uniform(4, 14) * along + rng.uniform(0, 6))
        other = across > border
        image[other] = _texture(rng, STUFF[second], size)[other]
        label[other] = len(THINGS) + second
    return image, label


def _draw_clutter(rng: np.random.Generator, image: np.ndarray, label: np.ndarray) -> None:
    """A small grey bar or disc that belongs to no class."""
    size = len(label)
    center, angle = rng.uniform(0, size, 2), rng.uniform(0, np.pi)
    long_side, short_side = rng.uniform(0.03, 0.13) * size, rng.uniform(0.012, 0.03) * size
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    u = (x - center[0]) * np.cos(angle) + (y - center[1]) * np.sin(angle)
    v = (y - center[1]) * np.cos(angle) - (x - center[0]) * np.sin(angle)
    inside = (u / long_side) ** 2 + (v / short_side) ** 2 < 1
    image[inside] = rng.uniform(0.1, 0.9)
    label[inside] = IGNORE_INDEX


def _radius_profile(rng: np.random.Generator, angle: np.ndarray) -> np.ndarray:
    """A random star-shaped outline: distance from the centre to the border per direction, at most about 1."""
    kind = rng.integers(4)
    if kind == 0:  # regular polygon
        corners = int(rng.integers(3, 7))
        sector = np.pi / corners
        return np.cos(sector) / np.cos((angle + rng.uniform(0, 6.3)) % (2 * sector) - sector)
    if kind == 1:  # star
        points = int(rng.integers(4, 8))
        sawtooth = np.abs((angle * points / (2 * np.pi) + rng.random()) % 1 - 0.5) * 2
        return 0.58 + 0.42 * sawtooth
    if kind == 2:  # blob
        outline = np.full_like(angle, 0.78)
        for order in (2, 3, 4):
            outline += 0.09 * np.cos(order * angle + rng.uniform(0, 6.3))
        return outline
    return np.ones_like(angle)  # disc, an ellipse after the aspect ratio


def _pattern(rng: np.random.Generator, name: str, u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    """Weight of the second tone in [0, 1] at coordinates `u`, `v` (pixels from the thing's centre)."""

    def wave(phase: np.ndarray) -> np.ndarray:  # a square wave with soft edges
        return np.clip(1.6 * np.sin(2 * np.pi * phase) + 0.5, 0, 1)

    offset_u, offset_v = rng.random(2)
    u_cells, v_cells = u / period + offset_u, v / period + offset_v
    if name == "striped":
        return wave(u_cells)
    if name == "checkered":
        product = np.sin(np.pi * 1.25 * u_cells) * np.sin(np.pi * 1.25 * v_cells)
        return np.clip(4 * product + 0.5, 0, 1)
    if name == "dotted":
        distance = np.hypot(u_cells % 1 - 0.5, v_cells % 1 - 0.5)
        return np.clip((0.31 - distance) * period + 0.5, 0, 1)
    if name == "grid":
        line = np.minimum(np.abs(u_cells % 1 - 0.5), np.abs(v_cells % 1 - 0.5))
        return np.clip((0.14 - line) * period + 0.5, 0, 1)
    if name == "zigzag":
        return wave(u_cells + 1.1 * np.abs((v_cells * 0.6) % 1 - 0.5))
    if name == "ringed":
        return wave(np.hypot(u, v) / period + offset_u)
    if name == "speckled":
        cell = period / 3.2
        rows, columns = ((c - c.min()) / cell for c in (u, v))
        speckles = rng.random((int(rows.max()) + 1, int(columns.max()) + 1)) < 0.33
        return speckles[rows.astype(int), columns.astype(int)].astype(np.float32)
    return np.zeros_like(u)  # plain


def _draw_thing(
    rng: np.random.Generator, image: np.ndarray, label: np.ndarray, class_id: int, center: np.ndarray, radius: float
) -> None:
    color, pattern = THINGS[class_id].split(" ")
    size = len(label)
    low = np.clip(np.floor(center - radius - 1), 0, size - 2).astype(int)
    high = np.clip(np.ceil(center + radius + 2), low + 1, size).astype(int)
    y, x = np.mgrid[low[1] : high[1], low[0] : high[0]].astype(np.float32)
    x, y = x - center[0], y - center[1]
    turn, aspect = rng.uniform(0, 2 * np.pi), rng.uniform(0.65, 1.0)
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)

    outline = _radius_profile(rng, np.arctan2(v / aspect, u))
    inside = np.clip((outline * radius - np.hypot(u, v / aspect)) + 0.5, 0, 1)

    hue, saturation, value = COLORS[color]
    hue, saturation, value = (
        hue + rng.uniform(-8, 8),
        saturation * rng.uniform(0.85, 1.0),
        value * rng.uniform(0.85, 1.05),
    )
    base = np.array(colorsys.hsv_to_rgb(hue / 360 % 1, min(saturation, 1), min(value, 1)), np.float32)
    tone = base + (1 - base) * rng.uniform(0.62, 0.9) if rng.random() < 0.5 else base * rng.uniform(0.12, 0.38)
    # The outline has any rotation, the surface pattern up to 20 degrees.
    period, slant = rng.uniform(10, 14) * size / SCENE_SIZE, np.deg2rad(rng.uniform(-20, 20))
    along, across = x * np.cos(slant) + y * np.sin(slant), y * np.cos(slant) - x * np.sin(slant)
    weight = _pattern(rng, pattern, along, across, period)[..., None]

    window = (slice(low[1], high[1]), slice(low[0], high[0]))
    alpha = inside[..., None]
    image[window] = image[window] * (1 - alpha) + (base * (1 - weight) + tone * weight) * alpha
    label[window][inside >= 0.5] = class_id


def _finish(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Applies lighting, colour cast and sensor noise, and converts to 8 bits."""
    size = len(image)
    ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    slope = rng.uniform(-0.2, 0.2, 2)
    light = rng.uniform(0.85, 1.1) + slope[0] * ramp[:, None] + slope[1] * ramp[None, :]
    cast = rng.uniform(0.94, 1.06, 3).astype(np.float32)
    noise = rng.uniform(0.01, 0.04) * rng.standard_normal(image.shape, dtype=np.float32)
    return (np.clip(image * light[..., None] * cast + noise, 0, 1) * 255 + 0.5).astype(np.uint8)
