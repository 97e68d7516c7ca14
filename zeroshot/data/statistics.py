# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Counts the pixels per class in a dataset, and warns of likely mistakes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from ..files import shown
from .splits import SegmentationSplit


SAMPLE = 2000  # images to count in larger parts
SIMILAR = 0.99  # from this cosine of two text prototypes, the text tower does not distinguish the names


@dataclass
class PartCounts:
    """Pixels and images per class in one part of a dataset.

    Attributes:
        classes: Number of classes `C`.
        images: Number of images in the part.
        counted: Number of counted images, at most [`SAMPLE`].
        pixels: `int64 (C + 1,)`, the last for unlabelled pixels.
        occurrences: Number of images with such pixels, `int64 (C + 1,)`.
        sizes: Number of images by size (width, height).
    """

    classes: int
    images: int
    counted: int = 0
    pixels: np.ndarray = field(init=False)
    occurrences: np.ndarray = field(init=False)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.pixels, self.occurrences = (np.zeros(self.classes + 1, np.int64) for _ in range(2))

    @property
    def sample(self) -> frozenset[int]:
        """Positions of the images to count, the same in every run."""
        return frozenset(np.linspace(0, self.images - 1, min(self.images, SAMPLE)).astype(int).tolist())

    def add(self, pixels: np.ndarray, size: tuple[int, int]) -> None:
        """Adds an image of `size` with its [`label_pixels`]."""
        self.counted += 1
        self.pixels += pixels
        self.occurrences += pixels > 0
        self.sizes[size] += 1

    def merge(self, other: PartCounts) -> None:
        """Adds the counts of other images of the same part."""
        self.counted += other.counted
        self.pixels += other.pixels
        self.occurrences += other.occurrences
        self.sizes += other.sizes

    def has(self, class_ids: tuple[int, ...]) -> bool:
        """Whether any pixel belongs to one of these classes."""
        return bool(self.pixels[list(class_ids)].sum())


def label_pixels(label: np.ndarray, split: SegmentationSplit) -> np.ndarray:
    """Pixel counts per class in a map of class ids of any shape, with unlabelled pixels last, `int64 (C + 1,)`."""
    classes = len(split.classes)
    return np.bincount(np.where(label == split.ignore_index, classes, label).ravel(), minlength=classes + 1)


def class_table(split: SegmentationSplit, parts: Mapping[str, PartCounts]) -> str:
    """A text table of pixels, their share and images, per class and part."""
    header = ["class", "", *(f"{part}: {what}" for part in parts for what in ("pixels", "share", "images"))]
    rows = [header]
    for position, name in enumerate([*split.classes, "unlabelled pixels"]):
        kind = "" if position == len(split.classes) else "seen" if split.seen_class_mask[position] else "unseen"
        row = [name, kind]
        for counts in parts.values():
            share = 100 * counts.pixels[position] / max(counts.pixels.sum(), 1)
            row += [f"{counts.pixels[position]:,}", f"{share:.1f} %", f"{counts.occurrences[position]:,}"]
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(row)) for row in rows]
    return "\n".join([*(_describe(part, counts) for part, counts in parts.items()), *map(str.rstrip, lines)])


def _describe(part: str, counts: PartCounts) -> str:
    sizes = counts.sizes.most_common(3)
    text = ", ".join(f"{width}×{height} ({count})" for (width, height), count in sizes)
    more = f" and {len(counts.sizes) - 3} more" if len(counts.sizes) > 3 else ""
    sample = "" if counts.counted == counts.images else f", of which a fixed sample of {counts.counted:,} is counted"
    return f"{part}: {counts.images:,} images{sample}; sizes {text}{more}"


def data_warnings(
    split: SegmentationSplit, parts: Mapping[str, PartCounts], train_part: str | None = None
) -> list[str]:
    """Warnings of likely mistakes.

    Args:
        split: The classes; seen ones are for training.
        parts: Counts by part name.
        train_part: The part for training; the others are for evaluation.
    """
    found = []
    for part, counts in parts.items():
        where = f"`{part}`" + ("" if counts.counted == counts.images else f" of the {counts.counted:,} images counted")
        expected = split.seen if part == train_part else split.unseen
        missing = [name for name in expected if not counts.has((split.classes.index(name),))]
        if not counts.pixels[:-1].any():
            found.append(f"All pixels in {where} are unlabelled. Check `ignore_index` and the ids in the files.")
        elif part != train_part and missing:
            present = occurring(len(expected) - len(missing), len(expected))
            score = "mIoU(U) is the mean over these" if len(missing) < len(expected) else "mIoU(U) has no meaning"
            found.append(f"{present} in {where}; {score}. Missing: {_listed(missing)}.")
        elif missing == list(expected) and missing:
            found.append(f"All labelled pixels in {where} belong to unseen classes, so there is nothing to train on.")
        elif missing:
            found.append(
                f"Classes to train on that have no pixel in {where}: {_listed(missing)}.{_counting_hint(split, missing)}"
            )
    last, hint = split.classes[-1], _counting_hint(split, list(split.classes))
    if last in split.unseen and hint and not any(counts.has((len(split.classes) - 1,)) for counts in parts.values()):
        found.append(f"The last class, {shown(last)}, has no pixel in any part.{hint}")
    return found


def occurring(present: int, total: int) -> str:
    """A phrase with the number of unseen classes that occur."""
    if not present:
        return f"None of the {total} unseen classes occurs" if total > 1 else "The unseen class does not occur"
    return f"{present} of {total} unseen classes {'occurs' if present == 1 else 'occur'}"


def similar_names(prototypes: torch.Tensor, names: list[str] | tuple[str, ...]) -> list[str]:
    """One warning per pair of class names that the text tower does not distinguish.

    Args:
        prototypes: Unit vectors `(C, D)`.
        names: The names of the `C` classes.
    """
    cosines = torch.triu(prototypes.float() @ prototypes.float().T, diagonal=1)
    return [
        f"The text tower does not distinguish {names[i]!r} and {names[j]!r} (cosine {float(cosines[i, j]):.3f}); choose "
        "more descriptive names."
        for i, j in (cosines > SIMILAR).nonzero().tolist()
    ]


def _counting_hint(split: SegmentationSplit, missing: list[str]) -> str:
    if split.has_raw_id_map or split.palette or split.classes[-1] not in missing:
        return ""
    return f" If 0 means unlabelled in the files and class ids start at 1, {split.counting_from_one}."


def _listed(names: list[str]) -> str:
    return ", ".join(map(shown, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
