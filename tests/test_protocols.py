# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Benchmarks of other papers, drawn as small trees in their own layouts: what is read is what was drawn, under the published
ids, spelled out here a second time."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import ROOT
from PIL import Image

from zeroshot.data.benchmarks import load_benchmark
from zeroshot.data.dataset import SegmentationDataset, validate_dataset
from zeroshot.data.folders import FolderLayout
from zeroshot.data.layouts import LAYOUTS
from zeroshot.data.splits import SHIPPED_SPLITS, SPLITS_FOLDER, load_split


PREPARED = ("images_detectron2/{part}/{name}.jpg", "annotations_detectron2/{part}/{name}.png")
PREPARED_PNG = ("images_detectron2/{part}/{name}.png", "annotations_detectron2/{part}/{name}.png")
INFRARED = ("images_detectron2/{part}/irrg/{name}.png", "annotations_detectron2/{part}/{name}.png")
STREETS = "leftImg8bit/{part}/lindau/{name}_leftImg8bit.png"
# The part that is evaluated, image and label map as the benchmark's own scripts name them, and some published ids.
TREES = {
    "ade20k_847": (
        *("validation", "images_detectron2/{part}/{name}.jpg", "annotations_detectron2/{part}/{name}.tif"),
        {0: "wall", 11: "person", 114: "bag", 191: "traveling bag", 252: "handbag", 300: None, 846: "adding machine"},
    ),
    "pascal_context_459": (
        *("val", "JPEGImages/{name}.jpg", "annotations_detectron2/pc459_{part}/{name}.tif"),
        {0: "accordion", 1: "aeroplane", 255: None, 283: "person", 430: "unknown", 457: "wood", 458: "wool"},
    ),
    "cityscapes": (
        *("val", STREETS, "gtFine/{part}/lindau/{name}_gtFine_labelIds.png"),
        {7: "road", 11: "building", 24: "person", 26: "car", 33: "bicycle"},
    ),
    "cityscapes_train_ids": (
        *("val", STREETS, "gtFine/{part}/lindau/{name}_gtFine_labelTrainIds.png"),
        {0: "road", 2: "building", 11: "person", 13: "car", 18: "bicycle"},
    ),
    "mess_atlantis": ("test", *PREPARED, {0: "bicycle", 36: "road", 55: "wetland"}),
    "mess_bdd100k": (
        *("val", "images/10k/{part}/{name}.jpg", "annotations_detectron2/{part}/{name}.png"),
        {0: "road", 18: "bicycle"},
    ),
    "mess_chase_db1": ("test", *PREPARED, {0: "others", 1: "blood vessels"}),
    "mess_cub_200": ("test", *PREPARED, {0: "background", 13: "Bobolink", 200: "Common Yellowthroat"}),
    "mess_cwfid": (
        *("test", "images/{name}_image.png", "annotations_detectron2/{part}/{name}_annotation.png"),
        {0: "ground", 1: "crop seedling", 2: "weed"},
    ),
    "mess_dark_zurich": (
        "val",
        "rgb_anon/{part}/night/GOPR0356/{name}_rgb_anon.png",
        "annotations_detectron2/{part}/{name}_gt_labelIds.png",
        {0: "unlabeled", 1: "road", 19: "bicycle"},
    ),
    "mess_deepcrack": (
        *("test", "{part}_img/{name}.jpg", "annotations_detectron2/{part}/{name}.png"),
        {0: "concrete or asphalt", 1: "crack"},
    ),
    "mess_dram": ("test", *PREPARED, {0: "bird", 8: "person", 11: "background"}),
    "mess_floodnet": ("test", *PREPARED, {0: "background", 5: "water", 9: "grass"}),
    "mess_foodseg103": (
        *("test", "Images/img_dir/{part}/{name}.jpg", "Images/ann_dir/{part}/{name}.png"),
        {0: "background", 1: "candy", 66: "rice", 103: "other ingredients"},
    ),
    "mess_isaid": ("val", *PREPARED_PNG, {0: "others", 1: "boat", 15: "pier"}),
    "mess_isprs_potsdam": ("test", *INFRARED, {0: "road", 4: "car", 5: "others"}),
    "mess_kvasir_instrument": ("test", *PREPARED_PNG, {0: "others", 1: "tool"}),
    "mess_mhp_v1": ("test", *PREPARED, {0: "others", 1: "hat", 18: "torso skin"}),
    "mess_pst900": ("test", "{part}/thermal/{name}.png", "{part}/labels/{name}.png", {0: "background", 4: "human"}),
    "mess_suim": (
        *("test", "TEST/images/{name}.jpg", "annotations_detectron2/{part}/{name}.png"),
        {0: "background (waterbody)", 1: "human diver", 7: "sea-floor and rocks"},
    ),
    "mess_uavid": ("val", *PREPARED_PNG, {0: "others", 1: "building", 7: "humans"}),
    "mess_worldfloods": ("test", *INFRARED, {0: "land", 1: "water and flood", 2: "cloud"}),
    "mess_zerowaste": (
        "test",
        "splits_final_deblurred/{part}/data/{name}.PNG",
        "splits_final_deblurred/{part}/sem_seg/{name}.PNG",
        {0: "background or trash", 4: "soft plastic"},
    ),
}
NAMES = ("frame_1", "frame_2")


def draw(root: Path, name: str, part: str, image: str, label: str, raw_ids: list[int]) -> dict[str, np.ndarray]:
    """Writes two images and their label maps of random raw ids; returns the latter."""
    wide, drawn = max(raw_ids) > 255, {}
    for index, frame in enumerate(NAMES):
        picture, mask = (root / pattern.format(part=part, name=frame) for pattern in (image, label))
        for path in (picture, mask):
            path.parent.mkdir(parents=True, exist_ok=True)
        tiny.picture(index).save(picture)
        drawn[frame] = np.random.default_rng(index).choice(raw_ids, (40, 48)).astype(np.uint16 if wide else np.uint8)
        Image.fromarray(drawn[frame]).save(mask)
    return drawn


def draw_benchmark(root: Path, name: str) -> dict[str, np.ndarray]:
    part, image, label, ids = TREES[name]
    return draw(root, name, part, image, label, [*ids, load_split(name).ignore_index])


def read(name: str, part: str, root: Path, **layout: str) -> dict[str, np.ndarray]:
    split = load_split(name)
    rows = load_benchmark(name, part, root, layout=FolderLayout(**layout), split=split)
    assert validate_dataset(rows, split) == []
    samples = SegmentationDataset(rows, split, training=False)
    return {sample["name"].removeprefix("lindau/").split("_gt")[0]: sample["label"] for sample in samples}


def test_every_layout_has_a_tree_and_a_split() -> None:
    assert set(TREES) == set(LAYOUTS) <= set(SHIPPED_SPLITS)
    assert {name for name in SHIPPED_SPLITS if name.startswith("mess_")} <= set(LAYOUTS)


@pytest.mark.parametrize("name", TREES)
def test_what_is_read_is_what_was_drawn(name: str, tmp_path: Path) -> None:
    split, (part, *_, ids) = load_split(name), TREES[name]
    drawn = draw_benchmark(tmp_path, name)
    found = read(name, part, tmp_path)
    assert list(found) == list(NAMES)
    for frame, raw in drawn.items():
        label = found[frame]
        assert label.shape == raw.shape and np.array_equal(label == split.ignore_index, raw == split.ignore_index)
        for value, class_name in ids.items():
            (class_id,) = set(label[raw == value].tolist())
            assert class_name is None or split.classes[class_id] == class_name
    assert set(read(name, {"validation": "val", "val": "validation"}.get(part, part), tmp_path)) == set(NAMES)


def test_facts_of_ade20k_full() -> None:
    facts = json.loads((SPLITS_FOLDER / "ade20k_847.json").read_text(encoding="utf-8"))
    names, synonyms, index = facts["classes"], facts["synonyms"], facts["index_ids"]
    assert len(names) == len(synonyms) == len(index) == len(set(index)) == 847
    assert all(name in each.split(", ") for name, each in zip(names, synonyms))
    first = [each.split(", ")[0] for each in synonyms]
    others = [position for position in range(847) if names[position] != first[position]]
    assert all(first.count(first[position]) > 1 for position in others) and len(others) == 10
    # rows of ADE20K_2021_17_01's index
    for name, number in (("wall", 2978), ("sky", 2420), ("person", 1831), ("handbag", 96), ("adding machine", 3148)):
        assert index[names.index(name)] == number


def test_the_59_classes_of_context_are_among_the_459_under_their_ids() -> None:
    facts = json.loads((SPLITS_FOLDER / "pascal_context_60_with_background.json").read_text(encoding="utf-8"))
    all_names = load_split("pascal_context_459").classes
    usual = {all_names[int(raw) - 1]: facts["classes"][i] for raw, i in facts["raw459_id_to_mmseg60"].items() if i}
    assert len(usual) == 59 and all(name == other for name, other in usual.items())


def test_images_of_other_parts_in_the_same_folder_are_left_out(tmp_path: Path) -> None:
    draw_benchmark(tmp_path, "pascal_context_459")
    tiny.picture(3).save(tmp_path / "JPEGImages" / "frame_3.jpg")
    assert list(read("pascal_context_459", "val", tmp_path)) == list(NAMES)
    (tmp_path / "JPEGImages" / "frame_1.jpg").unlink()
    split = load_split("pascal_context_459")
    (problem,) = validate_dataset(load_benchmark("pascal_context_459", "val", tmp_path), split)
    assert problem.file.endswith("frame_1.jpg") and "does not exist" in problem.message


def test_elsewhere_an_image_without_label_map_is_a_problem(tmp_path: Path) -> None:
    draw_benchmark(tmp_path, "ade20k_847")
    tiny.picture(3).save(tmp_path / "images_detectron2" / "validation" / "frame_3.jpg")
    (problem,) = validate_dataset(load_benchmark("ade20k_847", "val", tmp_path), load_split("ade20k_847"))
    assert problem.file.endswith("frame_3.tif") and "does not exist" in problem.message


def test_both_kinds_of_cityscapes_labels_lie_side_by_side(tmp_path: Path) -> None:
    for name in ("cityscapes", "cityscapes_train_ids"):
        draw_benchmark(tmp_path, name)
    by_ids, by_train_ids = (read(name, "val", tmp_path) for name in ("cityscapes", "cityscapes_train_ids"))
    for frame in NAMES:  # the same draw among the same classes, in one order
        assert np.array_equal(by_ids[frame], by_train_ids[frame])


def test_a_part_of_a_layout_can_be_elsewhere(tmp_path: Path) -> None:
    part, image, label, ids = TREES["mess_worldfloods"]
    drawn = draw(tmp_path, "mess_worldfloods", part, image.replace("irrg", "rgb"), label, list(ids))
    found = read("mess_worldfloods", "test", tmp_path, image_folder="images_detectron2/{part}/rgb")
    assert all(np.array_equal(found[frame], drawn[frame]) for frame in NAMES)
    with pytest.raises(FileNotFoundError, match=r"lacks images_detectron2/\{part\}/irrg or annotations.*; it has"):
        read("mess_worldfloods", "test", tmp_path)


def coco_tree(root: Path, kind: str) -> np.ndarray:
    """A person (category 1), a toothbrush (90), and grass or nothing beside them; returns the class names."""
    names = np.full((40, 48), "background", dtype=object)
    names[:, :16], names[:, 16:32] = "person", "toothbrush"
    for folder in ("val2017", "annotations", *(["stuffthingmaps/val2017"] if kind == "label maps" else [])):
        (root / folder).mkdir(parents=True)
    tiny.picture().save(root / "val2017" / "000000000139.jpg")
    if kind == "label maps":  # COCO-Stuff counts from 0; 123 is grass
        raw = np.vectorize({"person": 0, "toothbrush": 89, "background": 123}.get)(names).astype(np.uint8)
        raw[0, 40] = 255
        Image.fromarray(raw).save(root / "stuffthingmaps" / "val2017" / "000000000139.png")
        return names
    classes = load_split("coco_object").classes[1:]
    numbers = [number for number in range(1, 91) if number not in {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}]
    content = {
        "images": [{"id": 139, "file_name": "000000000139.jpg", "height": 40, "width": 48}],
        "categories": [{"id": number, "name": name} for number, name in zip(numbers, classes, strict=True)],
        "annotations": [
            {
                "id": number,
                "image_id": 139,
                "category_id": number,
                "iscrowd": 0,
                "area": 640,
                "bbox": [left, 0, 16, 40],
                "segmentation": [[left, 0, left + 16, 0, left + 16, 40, left, 40]],
            }
            for number, left in ((1, 0), (90, 16))
        ],
    }
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return names


@pytest.mark.parametrize("kind", ["label maps", "instances"])
def test_coco_object_from_label_maps_and_from_instances(kind: str, tmp_path: Path) -> None:
    names, classes = coco_tree(tmp_path, kind), np.array(load_split("coco_object").classes, dtype=object)
    (label,) = read("coco_object", "val", tmp_path).values()
    assert np.mean(classes[label] == names) > (
        0.95 if kind == "instances" else 0.999999
    )  # polygons end at half pixels
    assert set(np.unique(classes[label])) == {"background", "person", "toothbrush"}


# --- the script


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained, as it were, on four classes of which it holds back one."""
    model, processor = tiny.tiny_model(), tiny.tiny_processor()
    model.set_vocabulary(["person", "wall", "car", "sky"], ["sky"], processor)
    return tiny.save_checkpoint(model, processor, tmp_path_factory.mktemp("model") / "checkpoint")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("ade20k_847", {"person", "wall", "car"}),
        ("pascal_context_459", {"person", "wall", "car"}),
        ("cityscapes", {"person", "wall", "car"}),
        ("coco_object", {"person", "car"}),
        ("mess_dark_zurich", {"person", "wall", "car"}),
        ("mess_cub_200", set()),
    ],
)
def test_evaluation_by_flags_alone(
    name: str, known: set[str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root, report = tmp_path / "root", tmp_path / "report.json"
    if name == "coco_object":
        coco_tree(root, "label maps")
    else:
        draw_benchmark(root, name)
    part = TREES[name][0] if name in TREES else "val"
    flags = ["--model", checkpoint, "--dataset", name, "--root", root, "--part", part, "--output", report]
    for unseen_from in ("split", "checkpoint"):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags), "--unseen_from", unseen_from])
        runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")
        values = json.loads(report.read_text())
        assert list(values["per_class"]) == list(load_split(name).classes)
        assert values["images"] == (1 if name == "coco_object" else 2) and 0 <= values["pixel_accuracy"] <= 100
        seen = set(values["per_class"]) - set(values["protocol"]["unseen"])
        assert seen == (known if unseen_from == "checkpoint" else set(values["per_class"]))
