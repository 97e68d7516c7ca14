# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Parquet files of photographs, as photos.py and scripts/pretrain_lit.py read them, from the public originals.

Every file has the columns `name` and `image`, and `label` (raw ids) or `source`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from ..files import atomic_file
from .coco_json import load_coco
from .folders import image_files
from .images import open_image
from .photos import ENCODED, MSRC_PARTS, load_photos
from .splits import load_split


COCO_PARTS = {"train": "train", "test": "val"}  # our name, COCO's
COCO_PHOTOGRAPHS = 100  # of each part, the first by file name
IMAGENET_SIDE, CALTECH_SIDE = 224, 192  # largest short side in pixels


def pack_msrc(folder: Path, output: Path) -> Iterator[Path]:
    """MSRC v2 with the folders `Images` and `GroundTruth`."""
    if not (folder / "Images").is_dir():
        raise FileNotFoundError(f"{folder} has no folder Images; expected the unpacked MSRC v2.")
    for part in MSRC_PARTS:
        yield _write(_labelled(load_photos("msrc", part, folder)), "label", output / f"msrc_{part}.parquet")


def pack_coco(folder: Path, output: Path) -> Iterator[Path]:
    """COCO 2017 with `annotations/panoptic_{train,val}2017.json`, their PNG folders, and the folders of images."""
    split = load_split("coco_panoptic")
    for part, name in COCO_PARTS.items():
        file = folder / "annotations" / f"panoptic_{name}2017.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; expected COCO 2017 with its panoptic annotations.")
        rows = load_coco(file, folder, split=split, limit=COCO_PHOTOGRAPHS)
        yield _write(_labelled(rows), "label", output / f"coco_panoptic_{part}.parquet")


def pack_imagenet_samples(folder: Path, output: Path) -> Iterator[Path]:
    """One image of each ImageNet class: `n01440764_tench.JPEG`, as in github.com/EliSchwartz/imagenet-sample-images."""
    rows = (
        {
            "name": named[1].replace("_", " "),
            "image": _shrunk(path, IMAGENET_SIDE),
            "source": f"imagenet-sample-images/{path.stem}",
        }
        for path in image_files(folder).values()
        if (named := re.fullmatch(r"n\d{8}_(.+)", path.stem))
    )
    yield _write(rows, "source", output / "named_imagenet_samples.parquet")


def pack_caltech101(folder: Path, output: Path) -> Iterator[Path]:
    """Caltech-101's folder `101_ObjectCategories`, without its background class."""
    files = [(key.partition("/")[0], path) for key, path in image_files(folder).items() if "/" in key]
    rows = (
        {
            "name": category.replace("_", " "),
            "image": _shrunk(path, CALTECH_SIDE),
            "source": f"caltech101/{category}/{path.stem}",
        }
        for category, path in files
        if category != "BACKGROUND_Google"
    )
    yield _write(rows, "source", output / "named_caltech101.parquet")


def _labelled(rows: datasets.Dataset) -> Iterator[dict[str, Any]]:
    for row in rows.cast_column("image", ENCODED).cast_column("label", ENCODED):
        image = row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes()
        yield {"name": row["name"], "image": image, "label": row["label"]["bytes"]}


def _shrunk(path: Path, side: int) -> bytes:
    """The photograph as a JPEG whose short side has at most `side` pixels."""
    image, encoded = open_image(path), io.BytesIO()
    scale = min(1, side / min(image.size))
    width, height = (max(1, round(length * scale)) for length in image.size)
    image.resize((width, height), Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=95)
    return encoded.getvalue()


def _write(rows: Iterator[dict[str, Any]], third: str, path: Path) -> Path:
    encoded = {"image", "label"}
    columns: dict[str, list[Any]] = {"name": [], "image": [], third: []}
    for row in rows:
        for key, values in columns.items():
            values.append({"bytes": row[key], "path": None} if key in encoded else row[key])
    if not columns["name"]:
        raise ValueError(f"No photograph was found for {path.name}.")
    features = {key: datasets.Image() if key in encoded else datasets.Value("string") for key in columns}
    with atomic_file(path) as partial:
        datasets.Dataset.from_dict(columns, datasets.Features(features)).to_parquet(partial)
    return path
