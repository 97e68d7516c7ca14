# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Reads plain folders of images and label maps: finds the folders of a part, and pairs images with label maps.

Recognised without any setting are, for a part such as `train`,

    train/images  train/labels        images/train  labels/train        train  trainannot (or train_labels, …)
    images        labels              with or without lists of names, train.txt

with the usual folder names (`IMAGES`, `LABELS`), nested to any depth. File names of a pair are equal or end as in
`ENDINGS`. Images and label maps may also share one folder, if the names of label maps have such an ending.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ..files import read_text, shown
from .images import IMAGE_SUFFIXES


PARTS = (("train", "training"), ("validation", "val", "valid"), ("test", "testing"))
IMAGES = ("images", "image", "imgs", "img", "jpegimages", "photos", "leftimg8bit", "701_stillsraw_full")
LABELS = (
    *("labels", "label", "masks", "mask", "annotations", "annot", "groundtruth", "gt", "gtfine"),
    *("segmentationclass", "labeledapproved_full"),
)
BESIDE = (
    "annot",
    "_labels",
    "_label",
    "_masks",
    "_mask",
    "_annotations",
    "labels",
    "masks",
)  # for train_labels next to train
ENDINGS = (
    *(("", ""), ("_leftImg8bit", "_gtFine_labelIds"), ("", "_gtFine_labelIds"), ("", "_L"), ("", "_GT"), ("", "_gt")),
    *(
        ("", "_P"),
        ("", "_mask"),
        ("", "_label"),
        ("", "_labels"),
        ("", "_seg"),
        ("_image", "_label"),
        ("_image", "_mask"),
    ),
)
OTHER_READERS = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # files that `datasets` reads, like the next
OTHER_SUFFIXES = (".parquet", ".arrow")


@dataclass(frozen=True)
class FolderLayout:
    """Locations of images and label maps in a folder that does not use the usual names.

    Attributes:
        image_folder, label_folder: Paths below the folder; `{part}` in them is replaced by the part. If only
            `label_folder` contains it, all parts share the images, and those without a label map are left out.
        image_suffix, label_suffix: Suffixes of the names of images and label maps, before the file extension.
        label_file: A COCO JSON file below the folder instead of label maps; `{part}` is replaced by the part.
    """

    image_folder: str | None = None
    label_folder: str | None = None
    image_suffix: str | None = None
    label_suffix: str | None = None
    label_file: str | None = None

    @property
    def shares_images(self) -> bool:
        """Whether the images of all parts lie in one folder, so that the label maps tell which belong to a part."""
        return "{part}" not in (self.image_folder or "{part}") and "{part}" in (self.label_folder or "")


def part_names(part: str) -> list[str]:
    """`part` and its synonyms, such as `val` and `validation`."""
    others = next((names for names in PARTS if part in names), ())
    return [part, *(name for name in others if name != part)]


def is_plain_folder(folder: Path) -> bool:
    """Whether `folder` contains images, but no tables or metadata for the library `datasets`."""
    found = False
    for path in folder.rglob("*") if folder.is_dir() else ():
        if path.name in OTHER_READERS or path.suffix in OTHER_SUFFIXES:
            return False
        found = found or path.suffix.lower() in IMAGE_SUFFIXES
    return found


def has_label_folder(root: Path, part: str, layout: FolderLayout) -> bool:
    """Whether label maps have a folder of their own."""
    found = [
        *_whole_folders(root, layout),
        *(each for name in part_names(part) for each in _part_folders(root, name, layout)),
    ]
    return any(image_folder != label_folder for image_folder, label_folder in found)


def pair_files(root: Path, part: str, layout: FolderLayout) -> dict[str, tuple[Path, Path]]:
    """Pairs of image and label map by name, sorted. Files without a partner are kept, so that the missing one is reported.

    Args:
        root: The folder.
        part: Part such as `train`. A folder without parts is all `train`, unless it has lists of names such as `train.txt`.
        layout: Deviations from the usual names.

    Raises:
        FileNotFoundError: There are no folders of images and label maps.
        ValueError: The part does not exist, is empty, or its names do not match.
    """
    found = {name: folders for name in part_names(part) if (folders := next(_part_folders(root, name, layout), None))}
    if len(found) > 1:
        raise ValueError(
            f"{root} has {' and '.join(found)}, which are names of one part: rename or remove one of them."
        )
    for folders in found.values():
        return _pair(*folders, layout)
    parts = [names[0] for names in PARTS if any(any(_part_folders(root, name, layout)) for name in names)]
    lists = {path.stem: path for path in root.glob("*.txt") if any(path.stem in names for names in PARTS)}
    whole = next(_whole_folders(root, layout), None)
    if whole is None and not parts:
        present = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())) or "no folders"
        if _chosen(root, layout):
            raise FileNotFoundError(
                f"{root} lacks {layout.image_folder} or {layout.label_folder}; it has {present}. Give the folder that "
                "contains both, or set `image_folder` and `label_folder`."
            )
        raise FileNotFoundError(
            f"{root} has no folders with the usual names of images and label maps; it has {present}. Rename them to "
            "`images` and `labels`, or set `image_folder` and `label_folder`."
        )
    if whole is not None and not parts:
        listed = next((lists[name] for name in part_names(part) if name in lists), None)
        if listed is not None:
            return _listed(_pair(*whole, layout), listed)
        if part in PARTS[0] and not lists:
            return _pair(*whole, layout)
    raise ValueError(
        f"{root} has no part {part!r}; it has {', '.join(parts or sorted(lists) or ['train'])}. Put files into folders of "
        f"that part, or list their names in {part}.txt next to folders without parts."
    )


def find_part_file(root: Path, pattern: str, part: str) -> Path:
    """The file below `root` at `pattern`, in which `{part}` is replaced by the part.

    Raises:
        FileNotFoundError: There is no such file.
    """
    places = [root / pattern.replace("{part}", name) for name in part_names(part)]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"None of these files exist: {', '.join(map(str, dict.fromkeys(places)))}.")


def image_files(folder: Path) -> dict[str, Path]:
    """The image files in and below `folder`, sorted; keys are relative paths without extension.

    Raises:
        ValueError: Two files differ only in the extension.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in files:
                raise ValueError(
                    f"{files[name]} and {path} have the same name; images and label maps are paired by name."
                )
            files[name] = path
    return files


def _part_folders(root: Path, name: str, layout: FolderLayout) -> Iterator[tuple[Path, Path]]:
    """Folders of images and of label maps of the part `name`."""
    if chosen := _chosen(root, layout):
        places = [chosen] if "{part}" in f"{chosen}" else []
    else:
        places = [
            *product(_usual(root / name, IMAGES), _usual(root / name, LABELS)),
            *((image / name, label / name) for image, label in product(_usual(root, IMAGES), _usual(root, LABELS))),
            *((root / name, root / f"{name}{ending}") for ending in BESIDE),
            (root / name, root / name),
        ]
    for image, label in places:
        folders = (Path(str(image).replace("{part}", name)), Path(str(label).replace("{part}", name)))
        if all(folder.is_dir() for folder in folders):
            yield folders


def _whole_folders(root: Path, layout: FolderLayout) -> Iterator[tuple[Path, Path]]:
    """Folders of images and of label maps without parts."""
    if chosen := _chosen(root, layout):
        if all(folder.is_dir() for folder in chosen):
            yield chosen
        return
    yield from product(_usual(root, IMAGES), _usual(root, LABELS))
    if any(path.suffix.lower() in IMAGE_SUFFIXES for path in root.iterdir()):
        yield root, root


def _chosen(root: Path, layout: FolderLayout) -> tuple[Path, Path] | None:
    if layout.image_folder is None and layout.label_folder is None:
        return None
    if layout.image_folder is None or layout.label_folder is None:
        missing = "image_folder" if layout.image_folder is None else "label_folder"
        raise ValueError(f"`{missing}` is missing; set both `image_folder` and `label_folder`, or neither.")
    return root / layout.image_folder, root / layout.label_folder


def _usual(folder: Path, names: Sequence[str]) -> list[Path]:
    present = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else {}
    return [present[name] for name in names if name in present]


def _pair(image_folder: Path, label_folder: Path, layout: FolderLayout) -> dict[str, tuple[Path, Path]]:
    images, labels = image_files(image_folder), image_files(label_folder)
    shared = image_folder == label_folder
    if not images or not labels:
        empty = image_folder if not images else label_folder
        raise ValueError(f"{empty} is empty: it contains no file {', '.join(sorted(IMAGE_SUFFIXES))}.")
    best: tuple[dict[str, Path], dict[str, Path]] = ({}, {})
    for image_end, label_end in _endings(layout):
        if shared and not label_end:
            continue
        own = {name: path for name, path in images.items() if not (shared and name.endswith(label_end))}
        found = _without(own, image_end), _without(labels, label_end)
        if len(found[0].keys() & found[1].keys()) > len(best[0].keys() & best[1].keys()):
            best, ends = found, (image_end, label_end)
    if not best[0] and shared:
        example = next(iter(images.values())).relative_to(image_folder)
        raise ValueError(
            f"{image_folder} has images, such as {example}, but no label maps: "
            "put them into a folder `labels` next to `images`, or next to the images with a suffix such as _mask."
        )
    if not best[0]:
        raise ValueError(
            f"No image in {image_folder} has the name of a label map in {label_folder}: they have "
            f"{shown(list(images)[:3])} and {shown(list(labels)[:3])}. Set `image_suffix` and `label_suffix` to the "
            "suffixes in which the names differ, such as _L."
        )
    kinds = [next(iter(files.values())).suffix for files in best]
    return {
        name: (
            best[0].get(name, image_folder / f"{name}{ends[0]}{kinds[0]}"),
            best[1].get(name, label_folder / f"{name}{ends[1]}{kinds[1]}"),
        )
        for name in sorted(best[1] if layout.shares_images else best[0].keys() | best[1].keys())
    }


def _endings(layout: FolderLayout) -> Sequence[tuple[str, str]]:
    if layout.image_suffix is None and layout.label_suffix is None:
        return ENDINGS
    return [(layout.image_suffix or "", layout.label_suffix or "")]


def _without(files: dict[str, Path], ending: str) -> dict[str, Path]:
    return {name.removesuffix(ending): path for name, path in files.items() if name.endswith(ending)}


def _listed(pairs: dict[str, tuple[Path, Path]], file: Path) -> dict[str, tuple[Path, Path]]:
    """The `pairs` in a list, which has the name or path of one image per line."""
    by_name = {Path(name).name: name for name in pairs} | {image.stem: name for name, (image, _) in pairs.items()}
    chosen = {}
    for line in filter(str.strip, read_text(file).splitlines()):
        name = Path(line.split()[0]).name
        found = by_name.get(name) or by_name.get(Path(name).stem)
        if found is None:
            raise ValueError(f"{file} lists {shown(name)}, but there is no such image. Correct or remove the line.")
        chosen[found] = pairs[found]
    if not chosen:
        raise ValueError(f"{file} lists no image; expected one name per line.")
    return chosen
