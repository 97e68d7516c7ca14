# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Opens benchmarks, hub ids and local folders as `datasets.Dataset`, without reading image files."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import torch

from ..files import read_text
from ..settings import DataSettings
from .coco_json import find_coco_file, load_coco
from .folders import FolderLayout, find_part_file, is_plain_folder, pair_files, part_names
from .layouts import LAYOUTS
from .photos import load_photos
from .scenes import scenes_dataset
from .splits import SegmentationSplit, load_split


Transform = Callable[[np.ndarray, np.ndarray, torch.Generator], tuple[np.ndarray, np.ndarray]]

PHOTOS = ("msrc", "coco_panoptic", "photos")
NAMED_BENCHMARKS = (
    *("voc2012", "coco_stuff", "coco_object", "pascal_context_59", "pascal_context_60", "ade20k"),
    *LAYOUTS,
    *PHOTOS,
)


# --- opening -----------------------------------------------------------------------------------------------------


def load_benchmark(
    name: str,
    split_part: str,
    root: str | Path | None = None,
    *,
    label_folder: str | None = None,
    layout: FolderLayout | None = None,
    image_column: str = "image",
    label_column: str = "label",
    split: SegmentationSplit | None = None,
    num_scenes: int | None = None,
    seed: int = 0,
) -> datasets.Dataset:
    """Opens one part of a benchmark without reading its files; [`validate_dataset`] reads them.

    - `"voc2012"`: `root` contains `JPEGImages`, `SegmentationClassAug` or `SegmentationClass` or both, and
      `ImageSets/Segmentation`, whose lists are the parts: `train`, `trainaug`, `val`.
    - `"pascal_context_59"`, `"pascal_context_60"`: `root` contains `JPEGImages`, `SegmentationClassContext` and
      `ImageSets/SegmentationContext`, whose lists are the parts: `train`, `val`.
    - `"coco_stuff"`: `root` contains `train2017` and `val2017`, or both in `images`, and label folders of the same names
      in `stuffthingmaps` or `annotations`. The parts are `train` and `val`.
    - `"ade20k"`: `root` contains `images` and `annotations`, each with the folders `training` and `validation`. The parts
      are `train` and `val`.
    - `"coco_object"`: as `"coco_stuff"`, or with COCO's `instances_val2017.json` instead of label folders.
    - `"ade20k_847"`, `"pascal_context_459"`, `"cityscapes"`, `"cityscapes_train_ids"`, `"mess_…"`: see layouts.py. The
      parts are those of the folders: `train`, `val`, `test`.
    - `"msrc"`, `"coco_panoptic"`: `root` contains parquet files, see photos.py. The parts are `train`, `validation` and
      `test`, or `train` and `test`. MSRC may also be its original folder. `"photos"` is both `train` parts together.
    - `"embedded_scenes"`: generated on the fly; the parts are `train`, `validation`, `test`.
    - anything else: a hub id, or a local folder: images and label maps (see folders.py), COCO JSON files (see
      coco_json.py), an imagefolder with metadata, parquet files, or the output of `save_to_disk`. The dataset defines
      the names of its parts; a single dataset saved by `save_to_disk` is `train` by default.

    `val` and `validation` are synonyms.

    Args:
        name: See above.
        split_part: See above.
        root: See above. `VOC2012` and `VOC2010` are also found inside it and inside its `VOCdevkit`.
        label_folder: For VOC and Context-59, the only folder of label files to use. By default, VOC uses a file from
            `SegmentationClassAug`, or else from `SegmentationClass`.
        layout: For local folders and the benchmarks of layouts.py, the locations of images and label maps, if not the
            usual ones.
        image_column: For hub ids and local folders, the column of images.
        label_column: For hub ids and local folders, the column of label maps.
        split: For COCO JSON files; its class names select the categories. Default: the split of `name`, if it has one.
        num_scenes: For embedded scenes, the number to generate; default: the number in the split file.
        seed: For embedded scenes, their seed.

    Returns:
        A dataset with the columns `image` and `label` (both [`datasets.Image`], raw ids) and `name` (file name
        without extension, or the position if there is none).

    Raises:
        FileNotFoundError: A required folder or list does not exist.
        ValueError: The part is unknown or empty, a column is missing, or `name` cannot be opened.
    """
    if name == "embedded_scenes":
        return _draw_scenes("validation" if split_part == "val" else split_part, num_scenes, seed)
    if name not in NAMED_BENCHMARKS:
        if is_plain_folder(Path(name)):
            return _open_folder(Path(name), split_part, layout or FolderLayout(), split)
        return _open_dataset(name, split_part, image_column, label_column)

    if root is None:
        raise ValueError(f"`root` is missing; pass the folder of {name}.")
    if not Path(root).is_dir():
        raise FileNotFoundError(f"`root` is {str(root)!r}, which is not a folder; expected the folder of {name}.")
    if name in PHOTOS:
        return load_photos(name, "validation" if split_part == "val" else split_part, Path(root))
    if name in LAYOUTS:
        given = {key: value for key, value in vars(layout or FolderLayout()).items() if value is not None}
        return _open_pairs(Path(root), split_part, dataclasses.replace(LAYOUTS[name], **given))
    part = "val" if split_part == "validation" else split_part
    if name in ("coco_stuff", "coco_object"):
        label_paths = (f"stuffthingmaps/{part}2017", f"annotations/{part}2017")
        if name == "coco_object" and not any((Path(root) / path).is_dir() for path in label_paths):
            layout, instances = layout or FolderLayout(), f"annotations/instances_{part}2017.json"
            if layout == FolderLayout(layout.image_folder) and (Path(root) / instances).is_file():
                layout = dataclasses.replace(layout, label_file=instances)  # the panoptic file has other categories
            return _open_folder(Path(root), part, layout, split or load_split(name))
        images, labels = _paired_files(Path(root), (f"{part}2017", f"images/{part}2017"), label_paths)
    elif name == "ade20k":
        part = {"train": "training", "val": "validation"}.get(part, part)
        images, labels = _paired_files(Path(root), (f"images/{part}",), (f"annotations/{part}",))
    elif name == "voc2012":
        label_folders = [label_folder] if label_folder else ["SegmentationClassAug", "SegmentationClass"]
        images, labels = _voc_files(Path(root), "VOC2012", "Segmentation", label_folders, part)
    else:
        label_folders = [label_folder or "SegmentationClassContext"]
        images, labels = _voc_files(Path(root), "VOC2010", "SegmentationContext", label_folders, part)
    return _dataset_of_files([path.stem for path in images], images, labels)


def _dataset_of_files(names: list[str], images: list[Path], labels: list[Path]) -> datasets.Dataset:
    columns = {"image": [str(path) for path in images], "label": [str(path) for path in labels], "name": names}
    features = {"image": datasets.Image(), "label": datasets.Image(), "name": datasets.Value("string")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def coco_file(root: Path, part: str, layout: FolderLayout) -> Path | None:
    """The COCO JSON file of a part of a folder; `None`: it has none, or other labels are chosen."""
    if layout.label_file is not None:
        return find_part_file(root, layout.label_file, part)
    return find_coco_file(root, part) if layout == FolderLayout(layout.image_folder) else None


def _open_folder(root: Path, part: str, layout: FolderLayout, split: SegmentationSplit | None) -> datasets.Dataset:
    coco = coco_file(root, part, layout)
    if coco is not None:
        return load_coco(coco, root, layout.image_folder, split)
    return _open_pairs(root, part, layout)


def _open_pairs(root: Path, part: str, layout: FolderLayout) -> datasets.Dataset:
    pairs = pair_files(root, part, layout)
    return _dataset_of_files(list(pairs), *(list(files) for files in zip(*pairs.values())))


def _draw_scenes(part: str, num_scenes: int | None, seed: int) -> datasets.Dataset:
    sizes = load_split("embedded_scenes").sizes
    if part not in sizes:
        raise ValueError(f"`split_part` is {part!r}; embedded_scenes has {', '.join(sizes)}.")
    scenes = scenes_dataset(part, sizes[part] if num_scenes is None else num_scenes, seed)
    return scenes.select_columns(["image", "label"]).add_column("name", [f"{i:05d}" for i in range(len(scenes))])


def _voc_files(
    root: Path, year: str, list_folder: str, label_folders: list[str], part: str
) -> tuple[list[Path], list[Path]]:
    roots = (root, root / year, root / "VOCdevkit" / year)
    root = next((folder for folder in roots if (folder / "ImageSets" / list_folder).is_dir()), root)
    image_list = root / "ImageSets" / list_folder / f"{part}.txt"
    if not image_list.is_file():
        present = sorted(path.stem for path in image_list.parent.glob("*.txt"))
        raise FileNotFoundError(
            f"{image_list} does not exist. `split_part` is the name of a list in that folder; it has {present or 'none'}."
        )
    label_roots = [root / folder for folder in label_folders if (root / folder).is_dir()]
    if not label_roots:
        raise FileNotFoundError(f"{root} has no folder {' or '.join(label_folders)} of label maps.")
    # Some published lists have paths of image and label; the name is in the first one.
    lines = read_text(image_list).splitlines()
    names = [Path(line.split()[0]).stem for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{image_list} lists no image; expected one name per line.")
    labels = []
    for name in names:
        candidates = [folder / f"{name}.png" for folder in label_roots]
        labels.append(next((path for path in candidates[:-1] if path.is_file()), candidates[-1]))
    return [root / "JPEGImages" / f"{name}.jpg" for name in names], labels


def _paired_files(
    root: Path, image_folders: tuple[str, ...], label_folders: tuple[str, ...]
) -> tuple[list[Path], list[Path]]:
    image_root = _existing_folder(*(root / folder for folder in image_folders))
    label_root = _existing_folder(*(root / folder for folder in label_folders))
    # Names in only one folder are kept, so that the missing file is reported.
    image_names = {Path(file).stem for file in os.listdir(image_root) if file.endswith(".jpg")}
    label_names = {Path(f).stem for f in os.listdir(label_root) if f.endswith(".png") and "TrainIds" not in f}
    names = sorted(image_names | label_names)
    if not names:
        raise ValueError(f"{image_root} contains no .jpg file and {label_root} no label map.")
    return [image_root / f"{name}.jpg" for name in names], [label_root / f"{name}.png" for name in names]


def _existing_folder(*folders: Path) -> Path:
    for folder in folders:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"None of these folders exist: {', '.join(map(str, folders))}.")


def open_any_dataset(
    name: str, split_part: str, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """Opens one part of a hub id or a local folder with its original columns; can stream it instead of downloading it.

    Raises:
        ValueError: `name` cannot be opened, has no such part, or the part is empty.
    """
    if not name:
        raise ValueError("The dataset has an empty name; pass a benchmark name, a hub id or a folder.")
    folder = Path(name)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            dataset = _load_from_disk(folder, split_part)
        else:
            return _load_dataset(name, split_part, streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        source = (
            f"the folder {name!r}" if folder.is_dir() else f"{name!r} (no benchmark and no folder, so a Hub dataset)"
        )
        raise ValueError(f"Cannot open the part {split_part!r} of {source}. {error}") from error
    return dataset.to_iterable_dataset() if streaming else dataset


def _load_from_disk(folder: Path, part: str) -> datasets.Dataset:
    """Opens one part of the output of `save_to_disk`. For a single dataset, `datasets` would ignore the part."""
    listing = folder / "dataset_dict.json"
    if listing.is_file():
        places = {name: folder / name for name in json.loads(read_text(listing))["splits"]}
    else:
        places = {json.loads(read_text(folder / "state.json")).get("_split") or "train": folder}
    found = next((name for name in part_names(part) if name in places), None)
    if found is None:
        hint = (
            ""
            if listing.is_file()
            else "; it was saved as a single dataset. Save a `DatasetDict` to have several parts"
        )
        raise ValueError(f"It has the parts {', '.join(places)}{hint}.")
    try:
        return datasets.load_from_disk(str(places[found]))
    except IndexError:  # `datasets` raises it for a dataset without rows
        raise ValueError("It has no rows.") from None


def _load_dataset(name: str, part: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    unknown: ValueError | None = None
    for each in part_names(part):
        try:
            return datasets.load_dataset(name, split=each, streaming=streaming)
        except ValueError as error:
            if not re.search("unknown split|bad split", str(error), re.IGNORECASE):
                raise
            unknown = unknown or error
    assert unknown is not None
    raise unknown


def _open_dataset(name: str, split_part: str, image_column: str, label_column: str) -> datasets.Dataset:
    dataset = open_any_dataset(name, split_part)
    for argument, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in dataset.column_names:
            present = ", ".join(dataset.column_names)
            raise ValueError(f"{name!r} has no column {column!r}; set `{argument}` to one of {present}.")
    dataset = dataset.select_columns([image_column, label_column])
    dataset = dataset.rename_columns({image_column: "image", label_column: "label"})
    if not len(dataset):
        raise ValueError(f"The part {split_part!r} of {name!r} is empty.")
    try:
        encoded = encoded_images(dataset)
    except (pyarrow.ArrowException, TypeError) as error:
        raise ValueError(
            f"A column of {name!r} does not contain images; it has {dataset.features}. {error}"
        ) from error
    paths = pyarrow.compute.struct_field(encoded.with_format("arrow")[:]["image"], "path").to_pylist()
    names = [Path(path).stem if path else f"{index:08d}" for index, path in enumerate(paths)]
    dataset = encoded.cast_column("image", datasets.Image()).cast_column("label", datasets.Image())
    return dataset.add_column("name", names)


def encoded_images(dataset: datasets.Dataset) -> datasets.Dataset:
    """`dataset` with columns `image` and `label` as bytes and paths."""
    # Never Image(mode=…): converting a palette image to grey replaces its ids with grey values.
    encoded = datasets.Image(decode=False)
    return dataset.cast_column("image", encoded).cast_column("label", encoded)


def chosen_layout(settings: DataSettings) -> FolderLayout:
    return FolderLayout(**{each.name: getattr(settings, each.name) for each in dataclasses.fields(FolderLayout)})


def open_part(settings: DataSettings, part: str, limit: int | None):
    """One part of the dataset, as `datasets.Dataset`, at most `limit` images."""
    split = load_split(settings.split or settings.dataset, context_459_ids=settings.context_459_ids)
    dataset = load_benchmark(
        settings.dataset,
        part,
        settings.root,
        label_folder=settings.label_folder,
        layout=chosen_layout(settings),
        split=split,
        image_column=settings.image_column,
        label_column=settings.label_column,
        num_scenes=limit,
        seed=settings.scene_seed,
    )
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))
