# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Samples for training and evaluation, and validation of their files.

Label maps keep their raw ids until a [`~zeroshot.data.splits.SegmentationSplit`] maps them, sample by sample.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image as PILImage
from tqdm.auto import tqdm

from modeling_alignzeg.images_alignzeg import to_rgb

from .benchmarks import encoded_images
from .colors import UnknownColorError
from .splits import SegmentationSplit, UnmappedIdError, listed_ids
from .statistics import PartCounts, label_pixels


Transform = Callable[[np.ndarray, np.ndarray, torch.Generator], tuple[np.ndarray, np.ndarray]]

LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")  # PIL modes with one integer per pixel


class Problem(NamedTuple):
    """A problem with one file of a dataset.

    `ids` are raw ids, and `colors` colours, that the split does not have, if that is the problem.
    """

    file: str
    message: str
    ids: tuple[int, ...] = ()
    colors: tuple[tuple[int, int, int], ...] = ()

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"


def validate_dataset(
    dataset: datasets.Dataset,
    split: SegmentationSplit,
    num_threads: int = 8,
    counts: PartCounts | None = None,
    first: int = 0,
) -> list[Problem]:
    """Reads every file of `dataset` once and returns all problems, in the order of the dataset.

    It finds missing and damaged files, label maps that do not have one integer per pixel or do not match the image's
    size, raw ids that `split` does not map, and a dataset without images.

    Args:
        dataset: A dataset from [`load_benchmark`].
        split: The split that should map all raw ids in the label maps.
        num_threads: Number of files to decode at once.
        counts: Counts to add the pixels per class to, for images in its sample.
        first: Position of the first image of `dataset` in the part.
    """
    sample = counts.sample if counts is not None else frozenset()

    def read(position: int, row: dict[str, Any]) -> tuple[list[Problem], np.ndarray | None, tuple[int, int]]:
        image, label, problems = _read_row(row, split)
        if problems or image is None or label is None or position not in sample:
            return problems, None, (0, 0)
        return problems, label_pixels(label, split), (image.shape[1], image.shape[0])

    if not len(dataset):
        return [Problem("dataset", "it is empty")]
    problems: list[Problem] = []
    rows = encoded_images(dataset)
    progress = tqdm(total=len(rows), desc="Checking files", disable=None)
    with progress, ThreadPoolExecutor(num_threads) as pool:
        for start in range(0, len(rows), 512):  # in blocks, because embedded files are read ahead
            batch = rows.select(range(start, min(start + 512, len(rows)))).to_list()
            for found, pixels, size in pool.map(read, range(first + start, first + start + len(batch)), batch):
                problems += found
                if counts is not None and pixels is not None:
                    counts.add(pixels, size)
                progress.update()
    return problems


def raise_for_problems(problems: list[Problem], split: SegmentationSplit | None = None, limit: int = 20) -> None:
    """Raises a [`ValueError`] that lists `problems`, if there are any, with one line per cause and at most `limit`
    lines. `split` provides hints for unknown ids."""
    if not problems:
        return
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        same = re.sub(r"\d+", "#", problem.message)  # the same cause, for example other sizes
        groups.setdefault("ids" if problem.ids else "colors" if problem.colors else same, []).append(problem)
    shown = list(groups.values())[:limit]
    rest = len(problems) - sum(map(len, shown))
    more = [f"… and {rest} more"] if rest else []
    lines = "\n".join([*(_line(group, split) for group in shown), *more])
    found = "one problem" if len(problems) == 1 else f"{len(problems):,} problems"
    raise ValueError(f"The dataset cannot be used, {found} found:\n{lines}")


def _line(group: list[Problem], split: SegmentationSplit | None) -> str:
    message = group[0].message + (" (in the first)" if len({each.message for each in group}) > 1 else "")
    ids = sorted({each for problem in group for each in problem.ids})
    colors = sorted({each for problem in group for each in problem.colors})
    if len(group) > 1 and ids:
        message = f"label maps contain the raw ids {listed_ids(ids)}, which the split does not have"
    elif len(group) > 1 and colors:
        message = f"label images have the colours {colors[:20]}, which no class has"
    if ids and split is not None:
        message = f"{message.rstrip('.')}. {split.hint(ids)}"
    elif colors and split is not None:
        message = f"{message}. Add them to `palette`, colours without a class as {split.ignore_index}."
    if len(group) == 1:
        return f"{group[0].file}: {message}"
    files = ", ".join(problem.file for problem in group[:5])
    return f"{len(group)} files, {files}{', …' if len(group) > 5 else ''}: {message}"


def check_dataset(accelerator: Accelerator, rows: datasets.Dataset, split: SegmentationSplit) -> PartCounts:
    """Reads all files of a part once, divided among the processes, and counts the pixels per class.

    Raises:
        ValueError: On every process, if any process finds a problem; the message names the files.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    first = len(rows) * rank // world
    share = rows.select(range(first, len(rows) * (rank + 1) // world))
    counts = PartCounts(len(split.classes), len(rows))
    problems = validate_dataset(share, split, counts=counts, first=first) if len(share) or not len(rows) else []
    raise_for_problems(
        [Problem(*problem) for problem in gather_object([tuple(problem) for problem in problems])], split
    )
    total = PartCounts(len(split.classes), len(rows))
    for each in gather_object([counts]):
        total.merge(each)
    return total


def _read_row(
    row: dict[str, Any], split: SegmentationSplit
) -> tuple[np.ndarray | None, np.ndarray | None, list[Problem]]:
    """The `uint8` RGB image, the map of class ids, and the problems; a file that cannot be read is `None`."""
    arrays: dict[str, np.ndarray | None] = {}
    files, problems = {}, []
    colored = bool(split.palette)
    for column in ("image", "label"):
        files[column] = (row[column] or {}).get("path") or f"{column} of {row['name']}"
        try:
            if column == "image":
                arrays[column] = np.array(to_rgb(_decode(row[column])))
            else:
                arrays[column] = _color_array(row[column]) if colored else _label_array(row[column])
        except ValueError as error:
            arrays[column] = None
            problems.append(Problem(files[column], str(error)))
    image, label = arrays["image"], arrays["label"]
    if image is not None and label is not None and image.shape[:2] != label.shape[:2]:
        sizes = "{1}×{0} pixels, its image {3}×{2}".format(*label.shape[:2], *image.shape)
        turned = image.shape[1::-1] == label.shape[:2]
        hint = ", or the image's EXIF orientation turns it and not the label map" if turned else ""
        problems.append(Problem(files["label"], f"the label map has {sizes}; they must be equal{hint}"))
    if label is not None:
        try:
            label = split.map_colors(label) if colored else split.map_raw(label)
        except UnmappedIdError as error:
            problems.append(Problem(files["label"], str(error), ids=tuple(error.ids)))
        except UnknownColorError as error:
            problems.append(Problem(files["label"], str(error), colors=tuple(error.colors)))
        except ValueError as error:
            problems.append(Problem(files["label"], str(error)))
    return image, label, problems


def _decode(value: dict[str, Any] | None) -> PILImage.Image:
    if value is None or (value["bytes"] is None and value["path"] is None):
        raise ValueError("the file is missing")
    if value["bytes"] is None and "://" not in value["path"] and not os.path.isfile(value["path"]):
        raise ValueError("the file does not exist")
    try:
        return datasets.Image().decode_example(value)
    except PILImage.UnidentifiedImageError:
        raise ValueError(
            "the file cannot be decoded: it is not an image, or its format is unknown to Pillow"
        ) from None
    except Exception as error:  # PIL raises errors of all types for damaged files
        raise ValueError(f"the file cannot be decoded ({error or type(error).__name__})") from None


def _color_array(value: dict[str, Any] | None) -> np.ndarray:
    return np.array(_decode(value).convert("RGB"))


def _label_array(value: dict[str, Any] | None) -> np.ndarray:
    picture = _decode(value)
    if picture.mode not in LABEL_MODES:
        raise ValueError(
            f"the label map has mode {picture.mode}, expected one integer id per pixel (PNG of mode L, P or I;16); "
            "if it is colour-coded, add its `palette` to the split"
        )
    return np.array(picture)


class SegmentationDataset(torch.utils.data.Dataset):
    """Samples of a benchmark, decoded, mapped and transformed.

    A sample depends only on `seed`, the epoch and its index, not on global random state or the worker that reads it.

    Args:
        dataset: A dataset from [`load_benchmark`].
        split: The split that maps its label files.
        transform: Called with image, label map and a `torch.Generator`, such as
            [`~zeroshot.data.transforms.TrainTransform`].
        training: Whether label maps contain training ids, with unseen classes unlabelled, instead of class ids. The
            transform receives the same ids.
        seed: Seed of the transform.
        in_memory: Whether to decode everything now and keep it in memory, 4 bytes per pixel.
        repeated_epochs: Repeat the samples of the first epochs, as many as this, in turn; 0: every epoch draws new ones.
            With `in_memory`, the repeated samples are kept in memory too.

    Raises:
        ValueError: On construction if `in_memory`, otherwise on access: a file is missing, damaged or does not match
            `split`. The message names it.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        split: SegmentationSplit,
        transform: Transform | None = None,
        *,
        training: bool,
        seed: int = 0,
        in_memory: bool = False,
        repeated_epochs: int = 0,
    ):
        self.split = split
        self.transform = transform
        self.training = training
        self.seed = seed
        self._repeated_epochs = repeated_epochs
        self._rows = encoded_images(dataset)
        # In shared memory, so that persistent loader processes see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._decoded = [self._read(index) for index in range(len(self))] if in_memory else None
        self._keeps = in_memory and repeated_epochs > 0
        self._kept: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def names_digest(self) -> str:
        """A hash of the images' names and their order."""
        return hashlib.sha256("\n".join(self._rows.select_columns("name")["name"]).encode()).hexdigest()[:16]

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that seeds the transform of all further samples. Loaders of Accelerate and of transformers'
        `Trainer` call it with the number of the epoch, whatever the caller of this class has set before."""
        self._epoch.fill_(epoch % self._repeated_epochs if self._repeated_epochs else epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns a dictionary of

        - `image`: `uint8` array of shape (height, width, 3), RGB;
        - `label`: `int64` array of shape (height, width), training ids or class ids, or `split.ignore_index`;
        - `name`: its name in the dataset;
        - `index`: its position in the dataset;
        - `epoch`: the epoch that seeded its transform.
        """
        image, label, name = self._decoded[index] if self._decoded is not None else self._read(index)
        epoch = int(self._epoch)
        key = (epoch, index)
        if key in self._kept:
            image, label = self._kept[key]
        else:
            smallest = label.dtype
            label = self.split.hide_unseen(label) if self.training else label
            if self.transform is not None:
                entropy = np.random.SeedSequence([self.seed, *key])
                generator = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
                image, label = self.transform(image, label.astype(np.int64), generator)
            if self._keeps:
                self._kept[key] = image, label.astype(smallest)
        return {"image": image, "label": label.astype(np.int64), "name": name, "index": index, "epoch": epoch}

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        row = self._rows[index]
        image, label, problems = _read_row(row, self.split)
        raise_for_problems(problems, self.split)
        assert image is not None and label is not None
        smallest = np.result_type(*map(np.min_scalar_type, (self.split.ignore_index, len(self.split.classes) - 1)))
        return image, label.astype(smallest), row["name"]
