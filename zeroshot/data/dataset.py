# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The samples that training and evaluation read, and a check of the files behind them.

Label maps stay as their files have them until a [`~zeroshot.data.splits.SegmentationSplit`] maps them, sample by sample.
"""

from __future__ import annotations

import os
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

from .benchmarks import encoded_images
from .colors import UnknownColorError
from .splits import SegmentationSplit, UnmappedIdError
from .statistics import PartCounts, label_pixels


Transform = Callable[[np.ndarray, np.ndarray, torch.Generator], tuple[np.ndarray, np.ndarray]]

LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")  # PIL modes with one integer per pixel


class Problem(NamedTuple):
    """What is wrong with one file of a dataset.

    `ids` are the raw ids, or `colors` the colours, that the split does not have, if that is what is wrong.
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
    """Reads every file of `dataset` once and returns all that is wrong, in the order of the dataset.

    Found are missing and damaged files, label maps that are not one integer a pixel or not of the image's size, raw
    ids that `split` does not map, and a dataset without any image.

    Args:
        dataset: As from [`load_benchmark`].
        split: The split whose raw ids the label maps should hold.
        num_threads: Number of files that are decoded at once.
        counts: Where to count the pixels of the classes, in the images of its sample.
        first: Position in the part of the first image of `dataset`.
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
        for start in range(0, len(rows), 512):  # not all at once, because embedded files are read ahead
            batch = rows.select(range(start, min(start + 512, len(rows)))).to_list()
            for found, pixels, size in pool.map(read, range(first + start, first + start + len(batch)), batch):
                problems += found
                if counts is not None and pixels is not None:
                    counts.add(pixels, size)
                progress.update()
    return problems


def raise_for_problems(problems: list[Problem], split: SegmentationSplit | None = None, limit: int = 20) -> None:
    """Raises a [`ValueError`] that lists `problems`, those of one cause in one line, and at most `limit` lines; does
    nothing if there are none. `split` is what says how to map unknown ids."""
    if not problems:
        return
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        groups.setdefault("ids" if problem.ids else "colors" if problem.colors else problem.message, []).append(
            problem
        )
    shown = list(groups.values())[:limit]
    rest = len(problems) - sum(map(len, shown))
    more = [f"… and {rest} more"] if rest else []
    lines = "\n".join([*(_line(group, split) for group in shown), *more])
    raise ValueError(f"The dataset cannot be used, {len(problems)} problem(s) found:\n{lines}")


def _line(group: list[Problem], split: SegmentationSplit | None) -> str:
    message = group[0].message
    ids = sorted({each for problem in group for each in problem.ids})
    colors = sorted({each for problem in group for each in problem.colors})
    if len(group) > 1 and ids:
        message = f"label maps contain the raw ids {ids}, which the split does not have"
    elif len(group) > 1 and colors:
        message = f"label pictures have the colours {colors[:20]}, which no class has"
    if ids and split is not None:
        message = f"{message.rstrip('.')}. {split.hint(ids)}"
    elif colors and split is not None:
        message = f"{message}. Add them to `palette`, those without a class under {split.ignore_index}."
    if len(group) == 1:
        return f"{group[0].file}: {message}"
    files = ", ".join(problem.file for problem in group[:5])
    return f"{len(group)} files, {files}{', …' if len(group) > 5 else ''}: {message}"


def check_dataset(accelerator: Accelerator, rows: datasets.Dataset, split: SegmentationSplit) -> PartCounts:
    """Reads all files of a part once, each process its share, and counts the pixels of the classes.

    Raises:
        ValueError: On every process, if something is wrong anywhere; the message names the files.
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
    """The `uint8` RGB image, the map of class ids, and what is wrong; what cannot be read is `None`."""
    arrays: dict[str, np.ndarray | None] = {}
    files, problems = {}, []
    colored = bool(split.palette)
    for column in ("image", "label"):
        files[column] = (row[column] or {}).get("path") or f"{column} of {row['name']}"
        try:
            arrays[column] = _image_array(row[column]) if colored or column == "image" else _label_array(row[column])
        except ValueError as error:
            arrays[column] = None
            problems.append(Problem(files[column], str(error)))
    image, label = arrays["image"], arrays["label"]
    if image is not None and label is not None and image.shape[:2] != label.shape[:2]:
        sizes = "{1}×{0} pixels, its image {3}×{2}".format(*label.shape[:2], *image.shape)
        problems.append(Problem(files["label"], f"the label map has {sizes}; they must agree"))
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
    except Exception as error:  # damaged files make PIL raise errors of all kinds
        raise ValueError(f"the file cannot be decoded ({error or type(error).__name__})") from None


def _image_array(value: dict[str, Any] | None) -> np.ndarray:
    return np.array(_decode(value).convert("RGB"))


def _label_array(value: dict[str, Any] | None) -> np.ndarray:
    picture = _decode(value)
    if picture.mode not in LABEL_MODES:
        raise ValueError(
            f"the label map has mode {picture.mode}, expected one integer id a pixel (PNG of mode L, P or I;16); "
            "if colours stand for classes, add their `palette` to the split"
        )
    return np.array(picture)


class SegmentationDataset(torch.utils.data.Dataset):
    """Samples of a benchmark, decoded, mapped and transformed.

    A sample depends on `seed`, the epoch and its index only, never on a global random state or on which worker reads
    it.

    Args:
        dataset: As from [`load_benchmark`].
        split: The split that maps its label files.
        transform: Called with image, label map and a `torch.Generator`, such as
            [`~zeroshot.data.transforms.TrainTransform`].
        training: Whether label maps hold training ids, with unseen classes ignored, instead of class ids. The
            transform sees nothing else.
        seed: Seed of the transform.
        in_memory: Whether to decode everything now and keep it, 4 bytes a pixel.
        keep_samples: Whether to keep every sample after the transform too, for runs that repeat a few epochs.

    Raises:
        ValueError: On construction if `in_memory`, otherwise on access: a file is missing, damaged or not as `split`
            says. The message names it.
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
        keep_samples: bool = False,
    ):
        self.split = split
        self.transform = transform
        self.training = training
        self.seed = seed
        self._rows = encoded_images(dataset)
        # In shared memory, so that loader processes which live on through several epochs see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._decoded = [self._read(index) for index in range(len(self))] if in_memory else None
        self._kept: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] | None = {} if keep_samples else None

    def __len__(self) -> int:
        return len(self._rows)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the transform's randomness of the samples read from now on."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns a dictionary of

        - `image`: `uint8` array of shape (height, width, 3), RGB;
        - `label`: `int64` array of shape (height, width), training ids or class ids, or `split.ignore_index`;
        - `name`: what the dataset calls it;
        - `index`: its position in the dataset.
        """
        image, label, name = self._decoded[index] if self._decoded is not None else self._read(index)
        key = (int(self._epoch), index)
        if self._kept is not None and key in self._kept:
            image, label = self._kept[key]
        else:
            smallest = label.dtype
            label = self.split.hide_unseen(label) if self.training else label
            if self.transform is not None:
                entropy = np.random.SeedSequence([self.seed, *key])
                generator = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
                image, label = self.transform(image, label.astype(np.int64), generator)
            if self._kept is not None:
                self._kept[key] = image, label.astype(smallest)
        return {"image": image, "label": label.astype(np.int64), "name": name, "index": index}

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        row = self._rows[index]
        image, label, problems = _read_row(row, self.split)
        raise_for_problems(problems, self.split)
        assert image is not None and label is not None
        smallest = np.result_type(*map(np.min_scalar_type, (self.split.ignore_index, len(self.split.classes) - 1)))
        return image, label.astype(smallest), row["name"]
