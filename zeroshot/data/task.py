# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Opens, checks and describes the data of a training: its classes, and its images for training and evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import datasets
import numpy as np
from accelerate import Accelerator
from PIL import Image

from modeling_alignzeg import draw_overlay

from ..files import atomic_file
from ..settings import DataSettings
from .benchmarks import encoded_images, open_part
from .dataset import SegmentationDataset, check_dataset
from .folders import part_names
from .splits import SegmentationSplit, load_split, pseudo_unseen_split
from .statistics import class_table, data_warnings


class Task(NamedTuple):
    """Classes and data of a training.

    Attributes:
        split: The classes, seen and unseen.
        training_split: The only split used in training: its unseen classes become unlabelled in every label map.
        parts: Images by part name. The first part is for training, a second one for validation.
    """

    split: SegmentationSplit
    training_split: SegmentationSplit
    parts: dict[str, datasets.Dataset]

    @property
    def train(self) -> datasets.Dataset:
        return next(iter(self.parts.values()))

    @property
    def validation(self) -> datasets.Dataset | None:
        return list(self.parts.values())[1] if len(self.parts) > 1 else None


def open_task(data: DataSettings, validation: bool) -> Task:
    """Opens the data in the settings, without reading image files.

    Args:
        data: The settings.
        validation: Whether the validation part is needed.

    Raises:
        FileNotFoundError, ValueError: The split or a part cannot be opened, or no class is seen.
    """
    split = load_split(data.split or data.dataset, context_459_ids=data.context_459_ids)
    if data.pseudo_unseen:
        split = pseudo_unseen_split(split, data.pseudo_unseen, data.pseudo_fold)
    training_split = replace(split, unseen=()) if data.fully_supervised else split
    training_split.require_seen()
    parts = {data.train_part: open_part(data, data.train_part, data.num_train)}
    if validation:
        again = " again" if data.validation_part in part_names(data.train_part) else ""
        try:
            parts[data.validation_part + again] = open_part(data, data.validation_part, data.num_validation)
        except (OSError, ValueError) as error:
            raise ValueError(f"{error} To train without validation, set `training.evaluate_every 0`.") from error
    return Task(split, training_split, parts)


def check_task(accelerator: Accelerator, task: Task) -> None:
    """Reads all files once, and prints pixel counts per class and warnings of likely mistakes.

    Raises:
        ValueError: A file cannot be used, or the training part has no pixel of a seen class.
    """
    counts = {part: check_dataset(accelerator, rows, task.split) for part, rows in task.parts.items()}
    accelerator.print(class_table(task.split, counts))
    warnings = data_warnings(task.training_split, counts, train_part=next(iter(counts)))
    if again := [part for part in counts if part.endswith(" again")]:
        warnings.append(
            f"`{again[0].removesuffix(' again')}` is the part for both training and validation, so its scores say little "
            "about other images."
        )
    train = next(iter(counts.values()))
    if train.counted == train.images and not train.has(task.training_split.seen_ids):
        raise ValueError(warnings[0])
    for warning in warnings:
        accelerator.print(f"Warning: {warning}")


def describe_pairs(task: Task, count: int = 3) -> str:
    """The first `count` pairs of files of every part, as text."""
    lines = []
    for part, rows in task.parts.items():
        lines.append(f"{part}: {len(rows):,} pairs of image and label map, for example")
        for row in encoded_images(rows.select(range(min(count, len(rows))))):
            image, label = ((row[column] or {}).get("path") or f"bytes in {column}" for column in ("image", "label"))
            lines.append(f"  {row['name']}: {image} + {label}")
    return "\n".join(lines)


def draw_grid(task: Task, count: int, output: str, width: int = 360) -> None:
    """Writes a figure of `count` evenly spaced images of every part, `width` pixels wide, next to their label maps."""
    pairs = []
    for rows in task.parts.values():
        samples = SegmentationDataset(rows, task.split, training=False)
        for index in np.unique(np.linspace(0, len(rows) - 1, count).astype(int)).tolist():
            sample = samples[index]
            image = Image.fromarray(sample["image"])
            size = (width, max(1, round(image.height * width / image.width)))
            label = Image.fromarray(sample["label"].astype(np.int32)).resize(size, Image.Resampling.NEAREST)
            image = image.resize(size)
            pairs.append(
                (image, draw_overlay(image, np.asarray(label), list(task.split.classes), other_name="unlabelled"))
            )
    height = max(max(image.height, overlay.height) for image, overlay in pairs)
    cell = width + max(overlay.width for _, overlay in pairs)
    columns = 2 if len(pairs) > 1 else 1
    sheet = Image.new("RGB", (columns * cell, -(-len(pairs) // columns) * height), "white")
    for position, (image, overlay) in enumerate(pairs):
        left, top = position % columns * cell, position // columns * height
        sheet.paste(image, (left, top))
        sheet.paste(overlay, (left + width, top))
    with atomic_file(output) as partial:
        sheet.save(partial)
