# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Target segments of images: those of the embedded scenes, and of COCO's panoptic files."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..settings import DataSettings
from .benchmarks import NAMED_BENCHMARKS, chosen_layout, coco_file
from .coco_json import mapped, raw_ids, read_coco, segment_ids
from .folders import is_plain_folder
from .scenes import THINGS, draw_scene
from .splits import SegmentationSplit


ID_BITS = 24  # of COCO's segment ids


class TargetSegments(NamedTuple):
    """The segments of one image: every thing, and everything of a stuff class together.

    Attributes:
        map: `int64 (height, width)`: positions in the other attributes; -1 at unlabelled pixels.
        labels: `int64 (M,)`: class ids.
        crowds: `bool (M,)`: whether a segment is a group of things that are not annotated separately.
    """

    map: np.ndarray
    labels: np.ndarray
    crowds: np.ndarray

    def only(self, classes: np.ndarray) -> TargetSegments:
        """The segments of `classes`, `bool (C,)`."""
        kept = classes[self.labels]
        places = np.append(np.where(kept, kept.cumsum() - 1, -1), -1)  # the last one is that of -1
        return TargetSegments(places[self.map], self.labels[kept], self.crowds[kept])


def target_segments(labels: np.ndarray, ids: np.ndarray, crowds: Sequence[int] = ()) -> TargetSegments:
    """Segments from class ids, -1 at unlabelled pixels, and ids below 2**24 that separate the things of a class, 0 for
    stuff; both `(height, width)`. `crowds` are ids."""
    codes = np.where(labels < 0, -1, labels.astype(np.int64) << ID_BITS | ids)
    known, places = np.unique(codes, return_inverse=True)
    rest = int(known[0] < 0)
    known = known[rest:]
    is_crowd = np.isin(known % (1 << ID_BITS), list(crowds))
    return TargetSegments(places.reshape(codes.shape) - rest, known >> ID_BITS, is_crowd)


Reader = Callable[[str], TargetSegments]


def open_segments(settings: DataSettings, part: str, split: SegmentationSplit) -> tuple[np.ndarray, Reader]:
    """The target segments of a part of the embedded scenes, or of a folder with a COCO panoptic file.

    Returns:
        Which classes of `split` are things, `bool (C,)`, and a function from an image's name in
        [`~zeroshot.data.benchmarks.load_benchmark`] to its segments.

    Raises:
        ValueError: The dataset has no segments. The function raises it if an image's PNG is missing or damaged.
    """
    if settings.dataset == "embedded_scenes":
        return _scene_segments("validation" if part == "val" else part, settings.scene_seed, split)
    root, file = Path(settings.dataset), None
    if settings.dataset not in NAMED_BENCHMARKS and is_plain_folder(root):
        file = coco_file(root, part, chosen_layout(settings))
    if file is None:
        raise ValueError(
            f"`dataset` is {settings.dataset!r}, which has label maps without segments; expected embedded_scenes, or a "
            "folder with a COCO panoptic JSON file and its PNG files."
        )
    return _coco_segments(file, split)


def _scene_segments(part: str, seed: int, split: SegmentationSplit) -> tuple[np.ndarray, Reader]:
    is_thing = np.isin(np.arange(len(split.classes)), split.map_raw(np.arange(len(THINGS))))

    def read(name: str) -> TargetSegments:
        scene = draw_scene(seed, part, int(name))
        labels = split.map_raw(scene.label)
        return target_segments(np.where(labels == split.ignore_index, -1, labels), scene.things)

    return is_thing, read


def _coco_segments(file: Path, split: SegmentationSplit) -> tuple[np.ndarray, Reader]:
    content = read_coco(file)
    annotations = {each["image_id"]: each for each in content["annotations"]}
    needed = [("segments_info", each) for each in annotations.values()]
    needed += [("isthing", each) for each in content["categories"]]
    if any(key not in each for key, each in needed):
        raise ValueError(
            f"{file} has no segments of things and stuff; expected a COCO panoptic file, with `segments_info` of each image "
            "and `isthing` of each category. Select one with `label_file`."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `load_coco` has said it
        table, _ = raw_ids({each["id"]: each["name"] for each in content["categories"]}, split, file)
    classes = dict(zip(table, split.map_raw(np.array(list(table.values()))).tolist()))
    classes = {key: -1 if label == split.ignore_index else label for key, label in classes.items()}
    things = {classes[each["id"]] for each in content["categories"] if each["isthing"]}
    is_thing = np.isin(np.arange(len(split.classes)), list(things))
    images = {Path(each["file_name"]).with_suffix("").as_posix(): each for each in content["images"]}

    def read(name: str) -> TargetSegments:
        shape = images[name]["height"], images[name]["width"]
        annotation = annotations.get(images[name]["id"], {"segments_info": []})
        infos = annotation["segments_info"]
        ids = segment_ids(annotation, file, shape) if infos else np.zeros(shape, np.int64)
        labels = mapped(ids, {each["id"]: classes[each["category_id"]] for each in infos}, -1)
        crowds = [each["id"] for each in infos if each.get("iscrowd")]
        return target_segments(labels, np.where(is_thing[labels], ids, 0), crowds)

    return is_thing, read
