# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The embedded benchmark: reproducible scenes, exact masks, and a split that meets its specification."""

import colorsys
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from modeling_alignzeg import class_colors
from zeroshot.data import scenes
from zeroshot.data.scenes import (
    CLASSES,
    COLORS,
    IGNORE_INDEX,
    PATTERNS,
    SCENE_SIZE,
    SPLITS,
    STUFF,
    THINGS,
    draw_scene,
    draw_single,
    export_scenes,
    scenes_dataset,
)
from zeroshot.data.splits import load_split


def digest(seed: int, split: str, index: int, size: int = SCENE_SIZE) -> str:
    scene = draw_scene(seed, split, index, size)
    single = draw_single(seed, split, index, index % len(CLASSES), size)
    return hashlib.sha256(scene.image.tobytes() + scene.label.tobytes() + single.tobytes()).hexdigest()


# --- determinism -----------------------------------------------------------------------------------------------------


def test_scenes_depend_on_seed_split_and_index_only() -> None:
    keys = [(0, "train", 5), (0, "train", 6), (0, "test", 5), (3, "validation", 5)]
    first = [digest(*key) for key in keys]
    np.random.seed(7)
    np.random.rand(11)
    assert [digest(*key) for key in keys[::-1]] == first[::-1]
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]; from test_scenes import digest\n"
        f"print(*(digest(*key) for key in {keys}))"
    )
    folders = [str(Path(__file__).resolve().parent.parent / name) for name in ("tests", "scripts")]
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    other = subprocess.run(
        [sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True, env=environment
    )
    assert other.stdout.split() == first


def test_no_two_scenes_are_alike() -> None:
    """Over seeds, splits and indices; training scenes do not include validation and test scenes."""
    keys = [(seed, split, index) for seed in (0, 1) for split in SPLITS for index in range(15)]
    images = {draw_scene(*key, size=32).image.tobytes() for key in keys}
    labels = {draw_scene(*key, size=32).label.tobytes() for key in keys}
    assert len(images) == len(keys) and len(labels) > 0.9 * len(keys)
    assert not np.array_equal(draw_single(0, "train", 0, 3, 32), draw_scene(0, "train", 0, 32).image)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0, "dev", 0), "split"),
        ((-1, "train", 0), "seed"),
        ((0, "train", -1), "index"),
        ((0, "train", 0, 31), "size"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: tuple, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        draw_scene(*arguments)


# --- classes and split -----------------------------------------------------------------------------------------------


def test_classes_meet_the_specification() -> None:
    assert len(THINGS) >= 64 and len(STUFF) >= 4 and len(set(CLASSES)) == len(CLASSES) == len(THINGS) + len(STUFF)
    assert set(THINGS) == {f"{color} {pattern}" for color in COLORS for pattern in PATTERNS}
    assert IGNORE_INDEX not in range(len(CLASSES))


def test_split_meets_the_specification() -> None:
    split = load_split("embedded_scenes")
    assert split.classes == CLASSES and split.ignore_index == IGNORE_INDEX
    assert 4 * len(split.unseen) >= len(CLASSES)
    assert 4 * sum(name in THINGS for name in split.unseen) >= len(THINGS)
    assert any(name in STUFF for name in split.unseen) and any(name in STUFF for name in split.seen)
    words = {word for name in split.seen if name in THINGS for word in name.split(" ")}
    assert words == {*COLORS, *PATTERNS}


# --- what is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 96, SCENE_SIZE])
def test_scenes_hold_what_the_specification_says(size: int) -> None:
    drawn = [draw_scene(0, "train", index, size) for index in range(60)]
    things, stuff, clutter = [], [], []
    for scene in drawn:
        assert scene.image.shape == (size, size, 3) and scene.label.shape == (size, size)
        assert scene.image.dtype == scene.label.dtype == np.uint8
        ids = set(np.unique(scene.label).tolist())
        assert ids <= {*range(len(CLASSES)), IGNORE_INDEX}
        assert scene.classes == [CLASSES[i] for i in sorted(ids - {IGNORE_INDEX})]
        things.append(sum(name in THINGS for name in scene.classes))
        stuff.append(sum(name in STUFF for name in scene.classes))
        clutter.append(IGNORE_INDEX in ids)
    assert max(things) <= 6 and min(things) >= 1 and len(set(things)) >= 4
    assert set(stuff) <= {0, 1, 2} and {1, 2} <= set(stuff)
    assert 0.2 < np.mean(clutter) < 1


def test_every_class_occurs_and_unseen_pixels_are_common() -> None:
    split = load_split("embedded_scenes")
    count = np.zeros(256, int)
    for index in range(150):
        count += np.bincount(draw_scene(0, "train", index, 48).label.ravel(), minlength=256)
    assert (count[: len(CLASSES)] > 0).all()
    unseen = count[list(split.unseen_ids)].sum() / count[: len(CLASSES)].sum()
    assert 0.2 < unseen < 0.6


class Recorded:
    """A generator that records its draws."""

    def __init__(self, seed: int):
        self.generator, self.draws = np.random.default_rng(seed), []

    def __getattr__(self, name: str):
        def draw(*arguments, **options):
            self.draws.append(getattr(self.generator, name)(*arguments, **options))
            return self.draws[-1]

        return draw


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("center", [(32.0, 30.0), (3.0, 60.0)], ids=str)
def test_mask_of_a_plain_thing_is_exactly_what_was_painted(seed: int, center: tuple[float, float]) -> None:
    """On white, the red channel shows the share of a blue thing in a pixel; from one half on, the pixel belongs to the
    thing."""
    image, label = np.ones((64, 64, 3), np.float32), np.full((64, 64), 70, np.uint8)
    class_id = THINGS.index("blue plain")
    scenes._draw_thing(np.random.default_rng(seed), image, label, class_id, np.array(center), 14.0)
    painted = image.reshape(-1, 3)
    darkest = painted[painted[:, 0].argmin()]
    hue, saturation, value = colorsys.rgb_to_hsv(*darkest.tolist())
    assert abs(hue * 360 - COLORS["blue"][0]) <= 8.1 and saturation > 0.6 and value > 0.6
    share = (1 - image[..., 0]) / (1 - darkest[0])
    clear = np.abs(share - 0.5) > 1e-3
    assert (label[clear] == np.where(share[clear] > 0.5, class_id, 70)).all()
    assert set(np.unique(label).tolist()) == {class_id, 70}
    rows, columns = np.nonzero(label == class_id)
    assert np.hypot(columns - center[0], rows - center[1]).max() <= 14 + 1.5


@pytest.mark.parametrize("pattern", [name for name in PATTERNS if name != "plain"])
def test_a_pattern_changes_the_surface_and_not_the_mask(pattern: str) -> None:
    """Two frequent tones of one hue, only inside the mask."""
    for seed in range(4):
        image, label = np.full((96, 96, 3), 0.5, np.float32), np.full((96, 96), 70, np.uint8)
        class_id = THINGS.index(f"green {pattern}")
        scenes._draw_thing(np.random.default_rng(seed), image, label, class_id, np.array([48.0, 48.0]), 30.0)
        assert (image[label == 70] == 0.5).all(1).mean() > 0.9  # except for the soft edge
        value = image[label == class_id].max(1)
        middle = (value.min() + value.max()) / 2
        assert value.max() - value.min() > 0.1 and 0.05 < (value > middle).mean() < 0.95


def test_later_things_cover_earlier_ones() -> None:
    image, label = np.full((64, 64, 3), 0.5, np.float32), np.full((64, 64), 70, np.uint8)
    for class_id, radius in ((0, 25.0), (8, 8.0)):
        scenes._draw_thing(np.random.default_rng(1), image, label, class_id, np.array([32.0, 32.0]), radius)
    assert label[32, 32] == 8 and (label == 0).any() and (label == 70).any()


@pytest.mark.parametrize("class_id", [0, 13, 63, 64, len(CLASSES) - 1])
def test_singles_show_one_class(class_id: int) -> None:
    image = draw_single(0, "train", 4, class_id, 64)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8 and image.std() > 3
    assert not np.array_equal(image, draw_single(0, "train", 5, class_id, 64))
    other = draw_single(0, "train", 4, (class_id + 1) % len(CLASSES), 64)
    assert not np.array_equal(image, other)


# --- datasets and files ----------------------------------------------------------------------------------------------


def test_dataset_has_the_columns_and_the_pixels_of_the_scenes() -> None:
    dataset = scenes_dataset("validation", 3, seed=2, size=48)
    assert len(dataset) == 3 and dataset.split == "validation"
    assert dataset.features["image"] == datasets.Image() and dataset.features["label"] == datasets.Image()
    assert dataset["index"][:] == [0, 1, 2]
    for index, row in enumerate(dataset):
        scene = draw_scene(2, "validation", index, 48)
        assert row["image"].mode == "RGB" and row["label"].mode == "L"
        assert np.array_equal(np.asarray(row["image"]), scene.image)
        assert np.array_equal(np.asarray(row["label"]), scene.label)


def test_exported_files_hold_the_scenes(tmp_path: Path) -> None:
    root = export_scenes(tmp_path, "test", 3, seed=1, size=48)
    assert root == tmp_path / "test"
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    assert files == [f"{kind}/{index:05d}.png" for kind in ("images", "labels") for index in range(3)]
    for index in range(3):
        scene = draw_scene(1, "test", index, 48)
        image = Image.open(root / "images" / f"{index:05d}.png")
        label = Image.open(root / "labels" / f"{index:05d}.png")
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), scene.image)
        assert label.mode == "P" and np.array_equal(np.asarray(label), scene.label)  # values are class ids
        palette = np.array(label.getpalette()).reshape(-1, 3)
        assert np.array_equal(palette[: len(CLASSES)], class_colors(list(CLASSES)))
    export_scenes(tmp_path, "test", 3, seed=1, size=48)  # again into the same folder


def test_export_of_a_split_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`split`"):
        export_scenes(tmp_path, "dev", 3)
