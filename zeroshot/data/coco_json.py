# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Reads COCO's JSON files of instances (polygons and run lengths) and panoptic segmentation as label maps.

Label maps are drawn once and cached by the library `datasets`. Their raw ids are the category ids of the file. With a
split, classes are matched to categories by name, or by the split's raw id map.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from ..files import read_text, shown
from .folders import part_names
from .splits import SegmentationSplit


KINDS = ("panoptic", "instances", "")  # prefixes of file names; the first one found is used
DRAWING_VERSION = 1  # raise it with every change of what is drawn: `datasets` caches label maps
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.Image(), "name": datasets.Value("string")})


def find_coco_file(root: Path, part: str) -> Path | None:
    """The COCO JSON file of a part, by its name (`annotations/instances_train2017.json`) or folder (`train/*.json`)."""
    for name in part_names(part):
        token = re.compile(rf"(?<![a-z]){re.escape(name)}(?![a-z])")
        files = [file for folder in (root, root / "annotations") for file in sorted(folder.glob("*.json"))]
        files = [file for file in files if token.search(file.stem)] + sorted((root / name).glob("*.json"))
        for kind in KINDS:
            for file in files:
                if file.stem.startswith(kind) and (kind or file.parent == root / name or file.stem == name):
                    return file
    return None


def load_coco(
    file: Path,
    root: Path,
    image_folder: str | None = None,
    split: SegmentationSplit | None = None,
    limit: int | None = None,
) -> datasets.Dataset:
    """The images of a COCO JSON file with label maps drawn from its annotations.

    Where instances overlap, the smaller one is on top. Pixels without annotation are unlabelled, or belong to the class
    `background` if the split has one.

    Args:
        file: JSON file with `images`, `annotations` and `categories`.
        root: Folder of the dataset, which is searched for the images.
        image_folder: Subfolder of `root` with the images, if it is not one of the usual ones.
        split: The classes. By default, raw ids are the category ids, and 255 is unlabelled.
        limit: Number of images, the first by file name; default: all, in the order of the file.

    Returns:
        Columns `image`, `label` and `name`, see [`~zeroshot.data.benchmarks.load_benchmark`].

    Raises:
        FileNotFoundError: The images are not found.
        ValueError: The file does not have COCO's format, or lacks a class of the split.
    """
    content = read_coco(file)
    if limit is not None:
        content["images"] = _first(content["images"], limit)
    images = _image_folder(file, root, image_folder, content)
    table, rest = raw_ids({each["id"]: each["name"] for each in content["categories"]}, split, file)
    stamp = file.stat()
    return datasets.Dataset.from_generator(
        _rows,
        features=FEATURES,
        gen_kwargs={
            "file": str(file),
            "images": str(images),
            "table": table,
            "rest": rest,
            "limit": limit,
            "stamp": (
                stamp.st_mtime_ns,
                stamp.st_size,
                _segments_stamp(content, file),
            ),  # changed files are drawn again
            "version": DRAWING_VERSION,
        },
    )


def read_coco(file: Path) -> dict[str, Any]:
    """The content of a COCO JSON file, checked for its keys."""
    try:
        content = json.loads(read_text(file))
        ids = [(each["id"], each["name"]) for each in content["categories"]]
        names = [each["file_name"] for each in content["images"]]
        instances = all("category_id" in each or "segments_info" in each for each in content["annotations"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} is not a COCO file of instances or panoptic segments ({type(error).__name__}: {error}); expected the "
            "keys `images`, `annotations` and `categories`."
        ) from error
    if not (ids and names and instances):
        what = "categories" if not ids else "images" if not names else "annotations with a `category_id`"
        raise ValueError(f"{file} has no {what}; expected a COCO file of instances or panoptic segments.")
    return content


def _image_folder(file: Path, root: Path, chosen: str | None, content: dict[str, Any]) -> Path:
    name = content["images"][0]["file_name"]
    words = [word for word in re.split(r"[^a-z0-9]+", file.stem.lower()) if word]  # train2017 of instances_train2017
    folders = [file.parent, root, root / "images", *(root / word for word in words)]
    folders += [root / "images" / word for word in words]
    if chosen is not None:
        folders = [root / chosen.replace("{part}", word) for word in words] or [root / chosen]
    for folder in folders:
        if (folder / name).is_file():
            return folder
    raise FileNotFoundError(
        f"The image {name} of {file} is in none of {', '.join(dict.fromkeys(map(str, folders)))}; set `image_folder`."
    )


def raw_ids(categories: dict[int, str], split: SegmentationSplit | None, file: Path) -> tuple[dict[int, int], int]:
    """The raw ids in label maps for each category, and for pixels without annotation."""
    if split is None:
        return {key: key for key in categories}, 255
    if split.palette:
        raise ValueError(f"{file} has categories, not colours; remove `palette` from the split.")
    by_name = {name.casefold(): position for position, name in enumerate(split.classes)}
    table: dict[int, int] = {}
    for key, name in categories.items():
        other = split.raw_id_to_class.get(key) if split.has_raw_id_map else None
        target = by_name.get(name.strip().casefold(), other)
        table[key] = split.ignore_index if target is None else target
    rest = by_name.get("background", split.ignore_index)
    missing = [name for position, name in enumerate(split.classes) if position not in {*table.values(), rest}]
    if missing and not split.has_raw_id_map:
        raise ValueError(
            f"{file} has no category {shown(missing)} of `classes`; it has {shown(list(categories.values()))}. Use its "
            "names, or map the category ids with `raw_id_map`."
        )
    if unused := [name for key, name in categories.items() if table[key] == split.ignore_index]:
        warnings.warn(f"Not in `classes`, so unlabelled: the categories {shown(unused)} of {file}.", stacklevel=4)
    raw_of = {target: raw for raw, target in reversed(list(split.raw_id_to_class.items()))}  # the first of several
    if split.raw_id_to_class.get(split.ignore_index) == split.ignore_index:
        raw_of[split.ignore_index] = split.ignore_index
    if unmapped := {*table.values(), rest} - raw_of.keys():
        raise ValueError(
            f"No raw id of {split.name!r} maps to {sorted(unmapped)}, which {file} needs (`ignore_index` is "
            f"{split.ignore_index}): add one to its raw id map."
        )
    return {key: raw_of[target] for key, target in table.items()}, raw_of[rest]


def _first(images: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    return sorted(images, key=lambda image: image["file_name"])[:limit]


def _segments_stamp(content: dict[str, Any], file: Path) -> str:
    """A hash of names, sizes and times of the panoptic PNG files, if there are any."""
    digest = hashlib.sha256()
    for annotation in content["annotations"]:
        if "segments_info" in annotation:
            place = next(filter(Path.is_file, segment_places(annotation["file_name"], file)), None)
            stamp = place and place.stat()
            digest.update(repr(stamp and (str(place), stamp.st_size, stamp.st_mtime_ns)).encode())
    return digest.hexdigest()


def _rows(
    file: str,
    images: str,
    table: dict[int, int],
    rest: int,
    limit: int | None,
    stamp: tuple[int, int, str],
    version: int,
) -> Iterator[dict[str, Any]]:
    content = json.loads(Path(file).read_text(encoding="utf-8"))
    by_image = defaultdict(list)
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    kind = np.uint8 if max(*table.values(), rest) < 256 else np.uint16
    for image in content["images"] if limit is None else _first(content["images"], limit):
        found = by_image[image["id"]]
        label = np.full((image["height"], image["width"]), rest, kind)
        try:
            if found and "segments_info" in found[0]:
                _draw_segments(label, found[0], Path(file), table)
            else:
                for each in sorted(found, key=lambda each: (not each.get("iscrowd", 0), -each.get("area", 0))):
                    label[_mask(each["segmentation"], label.shape)] = table[each["category_id"]]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(
                f"The annotations of {image['file_name']} in {file} cannot be drawn ({type(error).__name__}: {error})."
            ) from error
        encoded = io.BytesIO()
        Image.fromarray(label).save(encoded, "PNG")
        name = Path(image["file_name"]).with_suffix("").as_posix()
        path = str(Path(images) / image["file_name"])
        yield {"image": path, "label": {"bytes": encoded.getvalue(), "path": f"{name}.png"}, "name": name}


def _draw_segments(label: np.ndarray, annotation: dict[str, Any], file: Path, table: dict[int, int]) -> None:
    segments = {segment["id"]: table[segment["category_id"]] for segment in annotation["segments_info"]}
    label[...] = mapped(segment_ids(annotation, file, label.shape), segments, label.flat[0])


def mapped(codes: np.ndarray, table: dict[int, int], rest: int) -> np.ndarray:
    """`codes (height, width)` replaced by their values in `table`, or by `rest` if they have none."""
    known, places = np.unique(codes, return_inverse=True)
    return np.array([table.get(code, rest) for code in known.tolist()])[places.reshape(codes.shape)]


def segment_places(name: str, file: Path) -> tuple[Path, ...]:
    """Where the panoptic PNG `name` of a JSON file may be."""
    return file.with_suffix("") / name, file.parent / name, file.parent.parent / file.stem / name


def segment_ids(annotation: dict[str, Any], file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The segment ids in a panoptic PNG, R + 256 G + 65536 B, `int64` of the image's `shape`."""
    name = annotation["file_name"]
    places = segment_places(name, file)
    place = next(filter(Path.is_file, places), None)
    if place is None:
        raise ValueError(f"{name} is in none of {', '.join(str(place.parent) for place in places)}")
    codes = np.asarray(Image.open(place).convert("RGB")).astype(np.int64) @ np.array([1, 1 << 8, 1 << 16])
    if codes.shape != shape:
        raise ValueError(f"{place} and its image differ in size")
    return codes


def _mask(segmentation: Any, shape: tuple[int, ...]) -> np.ndarray:
    """`bool (height, width)`, from polygons `[[x, y, x, y, …], …]` or run lengths."""
    if isinstance(segmentation, list):
        polygons = [_polygon(np.asarray(each, float).reshape(-1, 2), shape) for each in segmentation]
        return np.any(polygons, axis=0) if polygons else np.zeros(shape, bool)
    counts = segmentation["counts"]
    if isinstance(counts, (str, bytes)):
        counts = _decode_counts(counts.encode() if isinstance(counts, str) else counts)
    values = np.arange(len(counts)) % 2 == 1
    flat = np.repeat(values, counts)
    if flat.size != shape[0] * shape[1]:
        raise ValueError(f"its run lengths have {flat.size} pixels, but the image has {shape[0] * shape[1]}")
    return flat.reshape(shape[1], shape[0]).T  # column by column


def _polygon(corners: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Pixels whose centres are inside the polygon of `corners (N, 2)`, x and y; PIL would include its border pixels."""
    height, width = shape
    flips = np.zeros((height, width + 1), bool)  # where a row enters or leaves the polygon
    for (x, y), (next_x, next_y) in zip(corners, np.roll(corners, -1, axis=0)):
        low, high = (max(0, min(height, int(np.ceil(end - 0.5)))) for end in sorted((y, next_y)))
        rows = np.arange(low, high)
        if len(rows):
            crossings = x + (rows + 0.5 - y) * (next_x - x) / (next_y - y)
            flips[rows, np.clip(np.ceil(crossings - 0.5), 0, width).astype(int)] ^= True
    return np.logical_xor.accumulate(flips, axis=1)[:, :width]


def _decode_counts(text: bytes) -> list[int]:
    """COCO's compressed run lengths: 5 bits per character, as differences from the run before the last."""
    counts: list[int] = []
    position = 0
    while position < len(text):
        value, shift, more = 0, 0, True
        while more:
            digit = text[position] - 48
            value |= (digit & 0x1F) << shift
            more = bool(digit & 0x20)
            position, shift = position + 1, shift + 5
            if not more and digit & 0x10:
                value |= -1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
    return counts
