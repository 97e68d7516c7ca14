# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Splits: the classes of a benchmark, the unseen ones among them, and the mapping of its label files.

There are three kinds of ids, and only this file converts between them:

- *raw* ids, as stored in label files;
- *class* ids, `0 … C-1` in the order of `classes`, for evaluation and prediction;
- *training* ids, `0 … S-1` in the order of `seen`, for training. Unseen classes have none.

Unlabelled pixels have `ignore_index` in the last two.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..files import parse_yaml, read_text, shown
from .colors import colors_to_ids


SPLITS_FOLDER = Path(__file__).resolve().parent / "splits"
SHIPPED_SPLITS: dict[str, str] = {
    "voc2012": "pascal_voc_2012.json",
    "coco_stuff": "coco_stuff_164k.json",
    "pascal_context_59": "pascal_context_59.json",
    "pascal_context_60": "pascal_context_60_with_background.json",
    "ade20k": "ade20k_150.json",
    "embedded_scenes": "embedded_scenes.json",
    "msrc": "msrc21_a.json",
    "msrc_a": "msrc21_a.json",
    "msrc_b": "msrc21_b.json",
    "msrc_c": "msrc21_c.json",
    "coco_panoptic": "coco_panoptic.json",
    "photos": "photos.json",
    "cityscapes": "cityscapes_19.json",
    "cityscapes_train_ids": "cityscapes_19_train_ids.json",
    "coco_object": "coco_object_81.json",
    "ade20k_847": "ade20k_847.json",
    "pascal_context_459": "pascal_context_459.json",
    **{f"mess_{path.stem}": f"mess/{path.name}" for path in sorted((SPLITS_FOLDER / "mess").glob("*.json"))},
}
NUM_RAW_IDS = 1 << 16  # label files have 8 or 16 bits per pixel
CONTEXT_CATEGORIES = 459  # categories of PASCAL Context before rare ones were merged into the background

_UNMAPPED = np.iinfo(np.int64).min
_JSON_KEYS = ("name", "classes", "unseen", "unseen_ids", "seen_ids", "ignore_index", "raw_id_to_contiguous")
_YAML_KEYS = ("classes", "unseen", "ignore_index", "raw_id_map", "palette", "phrases")


class UnmappedIdError(ValueError):
    """A label map contains raw `ids` that the raw id map of a split does not have."""

    def __init__(self, ids: list[int], split: str) -> None:
        self.ids = ids
        super().__init__(
            f"The label map contains the raw ids {listed_ids(ids)}, which the raw id map of {split!r} does not have. "
            "Use the split that matches these files, or add the ids to its raw id map."
        )


@dataclass(frozen=True)
class SegmentationSplit:
    """The classes of a benchmark, divided into seen and unseen ones.

    Attributes:
        name: Name of the protocol.
        classes: Names of all classes; a class id is a position in it.
        unseen: Names of the unseen classes, a subset of `classes`.
        ignore_index: Id of unlabelled pixels; any integer that is not a class id.
        raw_id_to_class: Class id, or `ignore_index`, of each raw id in label files. By default raw ids are class ids, and
            `ignore_index` is unlabelled.
        palette: For colour-coded label maps, the class id or `ignore_index` of each colour (red, green, blue). There are
            no raw ids then.
        protocol: Details for reports, such as the treatment of the background.
        phrases: Phrases that replace the name of a class, by class; for evaluation and prediction.
        sizes: Number of images of each part ("train", "val", …) as published; empty if unknown.

    Raises:
        ValueError: Names are empty, duplicates, differ only in case or have spaces around them, `unseen` contains a class
            that does not exist, `ignore_index` is a class id, or `raw_id_to_class` has raw or class ids out of range.
    """

    name: str
    classes: tuple[str, ...]
    unseen: tuple[str, ...] = ()
    ignore_index: int = 255
    raw_id_to_class: Mapping[int, int] = field(default_factory=dict)
    palette: Mapping[tuple[int, int, int], int] = field(default_factory=dict)
    protocol: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)
    phrases: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_names("classes", self.classes)
        _check_names("unseen", self.unseen)
        if not self.classes:
            raise ValueError("`classes` is empty; expected at least one class name.")
        unexpected = [name for name in self.unseen if name not in self.classes]
        if unexpected:
            raise ValueError(f"`unseen` contains {_quoted(unexpected)}, not found in `classes`; check the spelling.")
        for name, phrases in self.phrases.items():
            if name not in self.classes:
                raise ValueError(f"`phrases` contains {shown(name)}, not found in `classes`; check the spelling.")
            if not isinstance(phrases, (list, tuple)) or not phrases:
                raise ValueError(f"`phrases` of {name!r} is {shown(phrases)}; expected a list of strings.")
            _check_names("phrases", phrases)
        if not _is_integer(self.ignore_index):
            raise ValueError(f"`ignore_index` is {shown(self.ignore_index)}; expected an integer.")
        if 0 <= self.ignore_index < len(self.classes):
            raise ValueError(
                f"`ignore_index` is {self.ignore_index}, the id of class {self.classes[self.ignore_index]!r}; "
                f"choose a number outside 0..{len(self.classes) - 1}."
            )
        if not self.raw_id_to_class:
            object.__setattr__(self, "raw_id_to_class", self._identity)
        for raw, target in self.raw_id_to_class.items():
            if not _is_integer(raw) or not 0 <= raw < NUM_RAW_IDS:
                raise ValueError(
                    f"The raw id map has the key {shown(raw)}; expected an integer in 0..{NUM_RAW_IDS - 1}."
                )
            if not _is_integer(target) or not (0 <= target < len(self.classes) or target == self.ignore_index):
                raise ValueError(
                    f"The raw id map maps {raw} to {shown(target)}; expected a class id in 0..{len(self.classes) - 1} or "
                    f"the ignore index {self.ignore_index}."
                )

    @property
    def _identity(self) -> dict[int, int]:
        ids = {i: i for i in range(len(self.classes))} | {self.ignore_index: self.ignore_index}
        return {raw: target for raw, target in ids.items() if raw >= 0}  # no file contains a negative `ignore_index`

    def require_seen(self) -> None:
        """
        Raises:
            ValueError: All classes are unseen.
        """
        if not self.seen:
            raise ValueError(
                f"All {len(self.classes)} classes of {self.name!r} are unseen, so there is nothing to train on: remove "
                "some names from `unseen`, or set `data.fully_supervised`."
            )

    @property
    def has_raw_id_map(self) -> bool:
        """Whether raw ids differ from class ids."""
        return self.raw_id_to_class != self._identity

    @property
    def counting_from_one(self) -> str:
        """Hint for files in which 0 means unlabelled and the first class is 1."""
        more = ", …" if len(self.classes) > 2 else ""
        ids = ", ".join(f"{position}: {name}" for position, name in enumerate(self.classes[:2], 1))
        return f"add `raw_id_map: {{0: {self.ignore_index}, {ids}{more}}}` to the split"

    def hint(self, ids: Sequence[int]) -> str:
        """Hint for raw `ids` in label files that the split does not have."""
        if self.has_raw_id_map:
            return "Add them to `raw_id_map`."
        hints = []
        if len(ids) == 1:
            hints.append(f"If {ids[0]} marks unlabelled pixels, set `ignore_index: {ids[0]}`.")
        if len(self.classes) in ids:
            hints.append(f"If 0 means unlabelled and class ids start at 1, {self.counting_from_one}.")
        return " ".join(hints) or "Add their classes, or a `raw_id_map`."

    @cached_property
    def seen(self) -> tuple[str, ...]:
        """Names of the seen classes in the order of `classes`; a training id is a position in it."""
        return tuple(name for name in self.classes if name not in self.unseen)

    @cached_property
    def vocabulary(self) -> dict[str, list[str]]:
        """The phrases of every class: its entry in `phrases`, or else its name."""
        return {name: list(self.phrases.get(name, (name,))) for name in self.classes}

    @cached_property
    def unseen_ids(self) -> tuple[int, ...]:
        """Class ids of `unseen`, in its order."""
        return tuple(self.classes.index(name) for name in self.unseen)

    @cached_property
    def seen_ids(self) -> tuple[int, ...]:
        """Class ids of `seen`, in its order; maps training ids to class ids."""
        return tuple(self.classes.index(name) for name in self.seen)

    @cached_property
    def seen_class_mask(self) -> tuple[bool, ...]:
        """Whether each class is seen."""
        return tuple(name not in self.unseen for name in self.classes)

    def map_raw(self, label: np.ndarray) -> np.ndarray:
        """Maps raw ids, as stored in a label file, to class ids.

        Args:
            label: Integer array of any shape.

        Returns:
            `int64` array of that shape with values in `0..C-1` or `ignore_index`.

        Raises:
            ValueError: `label` does not contain integers.
            UnmappedIdError: `label` contains an id that the raw id map does not have.
        """
        label = _integer_array(label)
        inside = (label >= 0) & (label < NUM_RAW_IDS) if label.dtype.itemsize > 2 or label.dtype.kind == "i" else True
        mapped = self._raw_table[label] if np.all(inside) else np.array(_UNMAPPED)
        if (mapped == _UNMAPPED).any():
            unexpected = [int(i) for i in np.unique(label) if int(i) not in self.raw_id_to_class]
            raise UnmappedIdError(unexpected, self.name)
        return mapped

    def map_colors(self, picture: np.ndarray) -> np.ndarray:
        """Maps a colour-coded label image to class ids by `palette`.

        Args:
            picture: `uint8` array of shape (height, width, 3), RGB.

        Returns:
            `int64` array of shape (height, width) with values in `0..C-1` or `ignore_index`.

        Raises:
            UnknownColorError: `picture` has a colour that the palette does not have.
        """
        return np.array(list(self.palette.values()))[colors_to_ids(picture, np.array(list(self.palette)))]

    def hide_unseen(self, label: np.ndarray) -> np.ndarray:
        """Maps class ids to training ids; pixels of unseen classes become `ignore_index`.

        All label maps for training pass through here, and no other function may renumber classes.

        Args:
            label: Integer array of any shape with values in `0..C-1` or `ignore_index`.

        Returns:
            `int64` array of that shape with values in `0..S-1` or `ignore_index`.

        Raises:
            ValueError: `label` does not contain integers, or contains an id that is not a class.
        """
        label = _integer_array(label)
        ignored = label == self.ignore_index
        known = ignored | ((label >= 0) & (label < len(self.classes)))
        if not known.all():
            raise ValueError(
                f"The label map contains the ids {np.unique(label[~known]).tolist()}; expected class ids in "
                f"0..{len(self.classes) - 1} or the ignore index {self.ignore_index}. Call `map_raw` on it first."
            )
        return self._training_table[np.where(ignored, len(self.classes), label)]

    @cached_property
    def _raw_table(self) -> np.ndarray:
        table = np.full(NUM_RAW_IDS, _UNMAPPED, np.int64)
        table[list(self.raw_id_to_class)] = list(self.raw_id_to_class.values())
        return table

    @cached_property
    def _training_table(self) -> np.ndarray:
        table = np.full(len(self.classes) + 1, self.ignore_index, np.int64)  # the last entry is for unlabelled pixels
        table[list(self.seen_ids)] = np.arange(len(self.seen))
        return table


def pseudo_unseen_split(split: SegmentationSplit, fraction: float = 1 / 3, fold: int = 0) -> SegmentationSplit:
    """A split of the *seen* classes only, some of which are treated as unseen: for tuning without labels of unseen classes.

    The real unseen classes are excluded: it does not contain their names, and their pixels are unlabelled.

    Args:
        split: The real split.
        fraction: Share of its seen classes to treat as unseen, in (0, 1).
        fold: Which of these classes: successive folds are successive parts of one random order of the seen classes.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"`fraction` is {fraction}; expected a number between 0 and 1.")
    count = max(1, round(fraction * len(split.seen)))
    order = np.random.default_rng(0).permutation(len(split.seen))
    chosen = np.take(order, range(fold * count, (fold + 1) * count), mode="wrap")
    new_id = {old: new for new, old in enumerate(split.seen_ids)}
    return SegmentationSplit(
        name=f"{split.name}_pseudo_{fold}",
        classes=split.seen,
        unseen=tuple(split.seen[i] for i in sorted(chosen)),
        ignore_index=split.ignore_index,
        raw_id_to_class={raw: new_id.get(target, split.ignore_index) for raw, target in split.raw_id_to_class.items()},
        palette={color: new_id.get(target, split.ignore_index) for color, target in split.palette.items()},
        phrases={name: phrases for name, phrases in split.phrases.items() if name in split.seen},
        protocol=f"{count} of {len(split.seen)} seen classes of {split.name} are treated as unseen; real unseen classes are "
        "ignored",
    )


def split_by_training_names(split: SegmentationSplit, names: Sequence[str]) -> SegmentationSplit:
    """`split`, in which the unseen classes are those that a training did not contain, for cross-dataset evaluation.

    Args:
        split: The benchmark for evaluation.
        names: Classes that were labelled in training; matching ignores case.
    """
    known = {name.casefold() for name in names}
    unseen = tuple(name for name in split.classes if name.casefold() not in known)
    note = (
        f"classes count as unseen if the training did not contain their names: {len(unseen)} of {len(split.classes)}"
    )
    return replace(split, unseen=unseen, protocol="; ".join(filter(None, (split.protocol, note))))


def load_split(name_or_path: str | Path, *, context_459_ids: bool = False) -> SegmentationSplit:
    """Loads a built-in split by name, or a custom one from a file.

    Args:
        name_or_path: One of [`SHIPPED_SPLITS`], or the path of a YAML file with the keys

            - `classes`: list of class names;
            - `unseen` (optional): list of unseen class names;
            - `phrases` (optional): maps class names to lists of phrases that replace the name;
            - `ignore_index` (optional, 255);
            - `raw_id_map` (optional): maps every id in the label files to a class name, a class id or `ignore_index`. The id
              `ignore_index` itself need not be listed. By default the files contain class ids;
            - `palette` (optional), for colour-coded label maps: maps each class name (or `ignore_index`) to its colour
              `[red, green, blue]`, or to a list of colours;

            or of a JSON file in the format of the built-in ones.
        context_459_ids: For the PASCAL Context splits: the label files have the original ids 1..459 instead of the
            usual 0..59. Categories outside the 59 are background.

    Raises:
        FileNotFoundError: There is no such split and no such file.
        ValueError: The file does not have this format; the message names the file and the key.
    """
    name = str(name_or_path)
    path = SPLITS_FOLDER / SHIPPED_SPLITS[name] if name in SHIPPED_SPLITS else Path(name_or_path)
    if not path.is_file():
        built_in = difflib.get_close_matches(name, SHIPPED_SPLITS) or ("voc2012", "coco_stuff", "ade20k", "cityscapes")
        raise FileNotFoundError(
            f"No split {name!r}: it is neither a built-in one, such as {', '.join(built_in)}, nor the path of a YAML or "
            "JSON file. For a dataset of your own, set `split` (`--split`, `--data.split`) to a YAML file with its class "
            "names."
        )
    try:
        text = read_text(path)
        if path.suffix == ".json":
            return _from_json(json.loads(text), context_459_ids)
        if context_459_ids:
            raise ValueError("`context_459_ids` is for the PASCAL Context splits; write the ids into `raw_id_map`.")
        return _from_yaml(parse_yaml(text, path), path.stem)
    except (ValueError, RecursionError) as error:  # ValueError includes JSON errors
        raise ValueError(f"The split file {path} cannot be used. {error}") from None


def _from_json(data: Any, context_459_ids: bool) -> SegmentationSplit:
    missing = [key for key in _JSON_KEYS if key not in data] if isinstance(data, dict) else _JSON_KEYS
    if missing:
        raise ValueError(f"It lacks {_quoted(missing)}; a JSON split has the keys of the built-in ones.")
    _check_types(data)
    raw_id_to_class = {int(raw): target for raw, target in data["raw_id_to_contiguous"].items()}
    if context_459_ids:
        if "raw459_id_to_mmseg60" not in data:
            raise ValueError("`context_459_ids` is for the PASCAL Context splits; this one has no table for such ids.")
        listed = {int(raw): index for raw, index in data["raw459_id_to_mmseg60"].items()}
        raw_id_to_class = {raw: raw_id_to_class[listed.get(raw, 0)] for raw in range(CONTEXT_CATEGORIES + 1)}
    split = SegmentationSplit(
        name=data["name"],
        classes=tuple(data["classes"]),
        unseen=tuple(data["unseen"]),
        ignore_index=data["ignore_index"],
        raw_id_to_class=raw_id_to_class,
        protocol=f"background: {data['background']['policy']}" if "background" in data else "",
        sizes={part: facts["images"] for part, facts in data.get("splits", {}).items()},
    )
    for key in ("unseen_ids", "seen_ids"):  # names take precedence; ids that disagree indicate a mistake
        if tuple(data[key]) != getattr(split, key):
            raise ValueError(f"`{key}` is {shown(data[key])}, but the names give {shown(getattr(split, key))}.")
    return split


def _from_yaml(data: Any, name: str) -> SegmentationSplit:
    if not isinstance(data, dict) or "classes" not in data:
        raise ValueError(f"Expected the key `classes`, and optionally {_quoted(_YAML_KEYS[1:])}.")
    unexpected = [key for key in data if key not in _YAML_KEYS]
    if unexpected:
        close = difflib.get_close_matches(str(unexpected[0]), _YAML_KEYS, n=1)
        expected = f"did you mean {close[0]!r}?" if close else f"expected only {_quoted(_YAML_KEYS)}."
        raise ValueError(f"It has the unknown key {shown(unexpected[0])}; {expected}")
    _check_types(data)
    classes, ignore_index = tuple(data["classes"]), data.get("ignore_index", 255)
    _check_names("classes", classes)
    raw_id_to_class = {}
    for raw, target in data.get("raw_id_map", {}).items():
        if isinstance(target, str) and target not in classes:
            raise ValueError(f"`raw_id_map` maps {shown(raw)} to {shown(target)}, which `classes` does not have.")
        raw_id_to_class[raw] = classes.index(target) if isinstance(target, str) else target
    if raw_id_to_class and _is_integer(ignore_index) and ignore_index >= 0:
        raw_id_to_class.setdefault(ignore_index, ignore_index)
    palette = _read_palette(data.get("palette", {}), classes, ignore_index)
    if raw_id_to_class and palette:
        raise ValueError("It has both `raw_id_map` and `palette`; label maps contain either ids or colours.")
    unseen, phrases = tuple(data.get("unseen", [])), data.get("phrases", {})
    return SegmentationSplit(name, classes, unseen, ignore_index, raw_id_to_class, palette, phrases=phrases)


def _read_palette(data: Any, classes: tuple[str, ...], ignore_index: Any) -> dict[tuple[int, int, int], int]:
    """The class id or `ignore_index` of each colour."""
    if not isinstance(data, dict):
        raise ValueError(f"`palette` is {shown(data)}; expected one class name and its colour per line.")
    palette: dict[tuple[int, int, int], int] = {}
    for key, value in data.items():
        if key not in classes and key != ignore_index:
            raise ValueError(
                f"`palette` has {shown(key)}, which is neither in `classes` nor `ignore_index`, {shown(ignore_index)}."
            )
        colors = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
        for color in colors:
            if (
                not isinstance(color, list)
                or len(color) != 3
                or not all(_is_integer(part) and 0 <= part <= 255 for part in color)
            ):
                raise ValueError(
                    f"`palette` maps {shown(key)} to the colour {shown(color)}; expected three of 0..255."
                )
            if tuple(color) in palette:
                raise ValueError(f"`palette` has the colour {color} more than once.")
            palette[color[0], color[1], color[2]] = ignore_index if key == ignore_index else classes.index(key)
    return palette


def _check_types(data: dict[str, Any]) -> None:
    for key in ("classes", "unseen", "unseen_ids", "seen_ids"):
        if not isinstance(data.get(key, []), list):
            raise ValueError(f"`{key}` is {shown(data[key])}; expected a list.")
    if not isinstance(data.get("phrases", {}), dict):
        raise ValueError(
            f"`phrases` is {shown(data['phrases'])}; expected one class name and its list of phrases per line."
        )
    for key in ("raw_id_map", "raw_id_to_contiguous"):
        if not isinstance(data.get(key, {}), dict):
            raise ValueError(f"`{key}` is {shown(data[key])}; expected one raw id and its class per line.")
    background, parts = data.get("background", {"policy": ""}), data.get("splits", {})
    if not isinstance(background, dict) or not isinstance(background.get("policy"), str):
        raise ValueError(f"`background` is {shown(background)}; expected a string as its `policy`.")
    if not isinstance(parts, dict) or not all(
        isinstance(p, dict) and _is_integer(p.get("images")) for p in parts.values()
    ):
        raise ValueError(f"`splits` is {shown(parts)}; expected the number of `images` per part.")


def _check_names(argument: str, names: Sequence[str]) -> None:
    for position, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            hint = " (YAML does not read yes, no, on, off and numbers as strings; quote them)"
            raise ValueError(
                f"`{argument}` has {shown(name)} at position {position}; expected a class name{'' if name == '' else hint}."
            )
        if name != name.strip():
            raise ValueError(f"`{argument}` has {shown(name)} at position {position}; remove the spaces around it.")
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise ValueError(f"`{argument}` has {_quoted(doubles)} more than once; class names must be unique.")
    folded = [name.casefold() for name in names]
    alike = [name for name, key in zip(names, folded) if folded.count(key) > 1]
    if alike:
        raise ValueError(
            f"`{argument}` has {_quoted(alike)}, which differ only in case; CLIP does not distinguish them."
        )


def _integer_array(label: np.ndarray) -> np.ndarray:
    label = np.asarray(label)
    if label.dtype.kind not in "uib":
        raise ValueError(f"The label map has values of type {label.dtype}; expected integers.")
    return label.astype(np.uint8) if label.dtype.kind == "b" else label


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def listed_ids(ids: Sequence[int]) -> str:
    """The first ids as a list in text, with the number of others."""
    return f"{list(ids)}" if len(ids) <= 12 else f"{list(ids[:10])} and {len(ids) - 10} more"


def _quoted(names: Sequence[Any]) -> str:
    more = ["…"] if len(names) > 10 else []
    return ", ".join([*map(shown, names[:10]), *more])
