# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Finds image files, segments them, and writes images of their label maps."""

from __future__ import annotations

import glob
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from modeling_alignzeg import draw_overlay, draw_unseen_map
from modeling_alignzeg.threads_alignzeg import shared_threads

from ..data.images import IMAGE_SUFFIXES, label_picture, open_image
from ..files import atomic_file, atomic_write_text, check_output
from .options import Vocabulary


ENDINGS = ("", "_overlay", "_unseen")  # suffixes of the results of one image
CLASSES = "classes.json"


class Input(NamedTuple):
    """An image file, and its path below the output folder."""

    file: Path
    place: Path


def find_images(arguments: list[str], output: Path) -> list[Input]:
    """The images of all `arguments` without duplicates, in order; images of a folder are sorted by name.

    Args:
        arguments: Files; folders, which are searched recursively without hidden subfolders; and patterns such as
            `photos/**/*.jpg`, for shells that do not expand them.
        output: Folder of the results, which is excluded from the search.

    Returns:
        Files and their paths relative to the given folder, or to the fixed part of a pattern.

    Raises:
        FileNotFoundError: An argument matches no image.
        ValueError: Files of two arguments have the same relative path.
    """
    found: dict[Path, Input] = {}
    for argument in arguments:
        for item in _images_of(argument, output.resolve()):
            found.setdefault(item.file.resolve(), item)
    places: dict[Path, Path] = {}
    for file, place in found.values():
        other = places.setdefault(place, file)
        if other is not file:
            raise ValueError(
                f"{other} and {file} would both be written as {place}: pass the folder that contains both, or use "
                "two different `--output_dir`."
            )
    return list(found.values())


def _images_of(argument: str, output: Path) -> Iterator[Input]:
    path = Path(argument)
    if os.path.isdir(path):
        files = list(_walk(path, output))
        if not files:
            raise FileNotFoundError(f"The folder {path} contains no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
        yield from (Input(file, file.relative_to(path)) for file in files)
    elif os.path.exists(path):
        yield Input(path, Path(path.name))
    elif glob.has_magic(argument):
        fixed = Path(*_before_pattern(path.parts))
        matches = sorted(map(Path, glob.glob(argument, recursive=True)))
        files = [file for file in matches if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
        files = [file for file in files if fixed.resolve() == output or not file.resolve().is_relative_to(output)]
        if not files:
            raise FileNotFoundError(f"No image matches {argument} ({', '.join(sorted(IMAGE_SUFFIXES))}).")
        yield from (Input(file, file.relative_to(fixed)) for file in files)
    else:
        raise FileNotFoundError(f"There is no file or folder {path}.")


def _before_pattern(parts: tuple[str, ...]) -> Iterator[str]:
    for part in parts[:-1]:
        if glob.has_magic(part):
            return
        yield part


def _walk(folder: Path, output: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=fail):
        kept = (name for name in folders if not name.startswith(".") and (Path(place) / name).resolve() != output)
        folders[:] = sorted(kept)
        yield from (Path(place) / name for name in sorted(names) if Path(name).suffix.lower() in IMAGE_SUFFIXES)


def output_stems(places: list[Path], endings: tuple[str, ...] = ENDINGS) -> list[Path]:
    """Path prefixes of each file's results: without its extension, or with it if two files would share a result."""
    taken = Counter(f"{place.with_suffix('')}{ending}" for place in places for ending in endings)
    alone = (all(taken[f"{place.with_suffix('')}{ending}"] == 1 for ending in endings) for place in places)
    return [place.with_suffix("") if is_alone else place for place, is_alone in zip(places, alone)]


def check_outputs(inputs: list[Path], outputs: list[Path]) -> None:
    """Checks that no image would be overwritten by a result.

    Raises:
        ValueError: One of `outputs` is one of `inputs`, possibly under another name.
    """

    def identity(path: Path) -> tuple[int, int]:
        found = path.stat()
        return found.st_dev, found.st_ino

    files = {identity(file): file for file in inputs if os.path.exists(file)}
    for path in filter(os.path.exists, outputs):  # pathlib would raise an error for names that are too long
        if identity(path) in files:
            raise ValueError(f"{files[identity(path)]} would be replaced by a result: choose another `--output_dir`.")


def check_classes(path: Path, classes: dict[str, Any]) -> None:
    """Checks that label maps with different class names are not mixed in one folder.

    Raises:
        ValueError: The file at `path` has classes other than `classes`.
    """
    if not path.exists():
        return
    try:
        is_same = json.loads(path.read_text(encoding="utf-8")) == classes
    except ValueError:
        is_same = False
    if not is_same:
        raise ValueError(f"{path} belongs to results with other classes: choose another `--output_dir`, or remove it.")


@dataclass(frozen=True)
class PictureSettings:
    """Settings of the segmentation and of its results.

    Attributes:
        gamma, threshold, none_of_these: As in `post_process_semantic_segmentation`.
        refine: Align class borders with edges in the image.
        labels_only: Write only the label map.
        picture_size: Maximum longer side of overlays and unseen maps, in pixels; 0: the size of the image.
    """

    gamma: float | None = None
    threshold: float | None = None
    none_of_these: bool = False
    refine: bool = False
    labels_only: bool = False
    picture_size: int = 0

    @property
    def endings(self) -> tuple[str, ...]:
        return ENDINGS[:1] if self.labels_only else ENDINGS


class Job(NamedTuple):
    """An image file, and the path prefix of its results."""

    file: Path
    stem: Path


def plan_pictures(arguments: list[str], output: Path, settings: PictureSettings) -> list[Job]:
    """The images of all `arguments` and the paths of their results; see [`find_images`].

    Raises:
        FileNotFoundError: An argument matches no image.
        ValueError: Two results or an image and a result would have the same path, or `output` is not writable.
    """
    inputs = find_images(arguments, output)
    stems = [output / stem for stem in output_stems([place for _, place in inputs], settings.endings)]
    jobs = [Job(file, stem) for (file, _), stem in zip(inputs, stems)]
    check_output(output / CLASSES)
    pictures = [picture_path(stem, ending) for stem in stems for ending in settings.endings]
    check_outputs([job.file for job in jobs], [output / CLASSES, *pictures])
    return jobs


def picture_path(stem: Path, ending: str) -> Path:
    return stem.with_name(f"{stem.name}{ending}.png")


def image_workers(device: torch.device, images: int) -> int:
    """Number of threads that each take one image from its file to its results.

    On a CPU there are two: while one reads or writes files, the other runs the network. With a GPU there are four, since it
    waits for files otherwise.
    """
    return min(images, torch.get_num_threads(), 2) if device.type == "cpu" else min(images, 4)


def write_pictures(
    model: Any, processor: Any, vocabulary: Vocabulary, jobs: list[Job], output: Path, settings: PictureSettings
) -> int:
    """Segments images and writes their results and the class names to `output`.

    Images that cannot be read and results that cannot be written are reported on stderr and skipped.

    Returns:
        Number of skipped images.

    Raises:
        ValueError: `output` contains results with other class names.
    """
    classes = {"classes": vocabulary.names, "unseen": list(vocabulary.unseen), **vocabulary.wording}
    check_classes(output / CLASSES, classes)
    writes_classes, on_device = Lock(), nullcontext() if model.device.type == "cpu" else Lock()

    def process(job: Job) -> str | None:
        """Returns why there are no results."""
        try:
            image = open_image(job.file)
        except (ValueError, OSError) as error:
            return f"Skipped: {error}"
        inputs = processor(images=image, return_tensors="pt")
        with on_device:  # one image at a time in a GPU's memory
            label, unseen = _segment(model, processor, vocabulary, image, inputs, settings)
        try:
            with writes_classes:
                if not (output / CLASSES).exists():
                    atomic_write_text(output / CLASSES, json.dumps(classes, indent=2) + "\n")
            pictures = _pictures(image, label, unseen, vocabulary.names, settings.picture_size or None)
            for ending, picture in zip(settings.endings, pictures):
                with atomic_file(picture_path(job.stem, ending)) as partial:
                    # Overlays of photographs compress poorly: higher levels save a tenth but take four times as long.
                    picture.save(partial, compress_level=1 if ending else 6)
        except (ValueError, OSError) as error:
            return f"Not written: {error}"
        return None

    broken = 0
    with shared_threads(image_workers(model.device, len(jobs))) as pool:
        for error in tqdm(pool.map(process, jobs), desc="segment", total=len(jobs), disable=len(jobs) == 1):
            if error is not None:
                tqdm.write(error, file=sys.stderr)
                broken += 1
    return broken


@torch.no_grad()
def _segment(
    model: Any, processor: Any, vocabulary: Vocabulary, image: Image.Image, inputs: Any, settings: PictureSettings
) -> tuple[np.ndarray, np.ndarray | None]:
    """The label map of an image, and the unseen score of each pixel if a picture of it is written."""
    seen = torch.tensor([name not in vocabulary.unseen for name in vocabulary.names], device=model.device)
    outputs = model(**inputs.to(model.device), text_prototypes=vocabulary.prototypes, seen_class_mask=seen)
    found = processor.post_process_semantic_segmentation(
        outputs,
        target_sizes=[(image.height, image.width)],
        gamma=settings.gamma,
        threshold=settings.threshold,
        none_of_these=settings.none_of_these,
        return_unseen_scores=not settings.labels_only,
        images=[image] if settings.refine else None,
    )
    maps, unseen = (found, None) if settings.labels_only else found
    return maps[0].to(torch.int32).cpu().numpy(), None if unseen is None else unseen[0].float().cpu().numpy()


def _pictures(
    image: Image.Image, label: np.ndarray, unseen: np.ndarray | None, names: list[str], max_size: int | None
) -> Iterator[Image.Image]:
    """Yields the results in [`ENDINGS`] one by one, because large images take much memory."""
    yield label_picture(label, names)
    yield draw_overlay(image, label, names, max_size=max_size)
    if unseen is not None:
        yield draw_unseen_map(image, unseen, max_size)
