# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""User-supplied folders of photographs and label maps, without metadata files."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib.path import Path as MatplotlibPath
from PIL import Image
from tiny import tiny_checkpoint

from zeroshot.data.benchmarks import load_benchmark, open_part
from zeroshot.data.dataset import SegmentationDataset, validate_dataset
from zeroshot.data.folders import FolderLayout, is_plain_folder, pair_files
from zeroshot.data.images import open_image
from zeroshot.data.splits import SegmentationSplit, load_split
from zeroshot.data.statistics import SAMPLE, PartCounts, class_table, data_warnings, similar_names
from zeroshot.evaluation.evaluator import Evaluator, Readout, format_scores
from zeroshot.settings import DataSettings


CLASSES = ("road", "car", "sky")
COLORS = {"road": (128, 64, 128), "car": (64, 0, 128), "sky": (128, 128, 128)}
VOID = (0, 0, 0)
SPLIT = SegmentationSplit("own", CLASSES, ("sky",))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def add(root: Path, image: str, label: str, rng: np.random.Generator, colored: bool = False) -> np.ndarray:
    """Writes an image and its label map; returns the class ids."""
    size = tuple(rng.integers(6, 12, 2))
    ids = rng.choice([0, 1, 2, 255], size).astype(np.uint8)
    save(root / image, rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    picture = ids
    if colored:
        picture = np.zeros((*size, 3), np.uint8)
        for position, name in enumerate(CLASSES):
            picture[ids == position] = COLORS[name]
    save(root / label, picture)
    return ids


def read(root: Path, part: str, split: SegmentationSplit = SPLIT, **layout: str) -> dict[str, np.ndarray]:
    rows = load_benchmark(str(root), part, split=split, layout=FolderLayout(**layout))
    assert rows.column_names == ["image", "label", "name"] and validate_dataset(rows, split) == []
    return {sample["name"]: sample["label"] for sample in SegmentationDataset(rows, split, training=False)}


def check(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == sorted(expected)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


LAYOUTS = {  # paths of image and label map, both with the part
    "folders of parts": ("{part}/images/{name}.jpg", "{part}/labels/{name}.png"),
    "parts in folders": ("Images/{part}/{name}.JPG", "Masks/{part}/{name}.png"),
    "cityscapes": ("leftImg8bit/{part}/{name}_leftImg8bit.png", "gtFine/{part}/{name}_gtFine_labelIds.png"),
    "camvid of SegNet": ("{part}/{name}.png", "{part}annot/{name}.png"),
    "camvid of Kaggle": ("{part}/{name}.png", "{part}_labels/{name}_L.png"),
    "beside each other": ("{part}/{name}.jpg", "{part}/{name}_mask.png"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_are_found_in_every_layout(layout: str, tmp_path: Path, rng: np.random.Generator) -> None:
    image, label = LAYOUTS[layout]
    expected = {
        part: {
            name: add(tmp_path, image.format(part=part, name=name), label.format(part=part, name=name), rng)
            for name in (f"berlin/{part}_1", f"berlin/{part}_2", f"{part}_3")
        }
        for part in ("train", "val")
    }
    if layout == "cityscapes":  # its other files in these folders
        save(tmp_path / "gtFine/train/berlin/train_1_gtFine_color.png", np.zeros((4, 4, 3), np.uint8))
        (tmp_path / "gtFine/train/berlin/train_1_gtFine_polygons.json").write_text("{}")
    check(read(tmp_path, "train"), expected["train"])
    for name in ("val", "validation"):
        check(read(tmp_path, name), expected["val"])
    for name in ("test", "nonsense"):
        with pytest.raises(ValueError, match=f"has no part '{name}'; it has train, validation"):
            read(tmp_path, name)


@pytest.mark.parametrize(
    ("image", "label", "layout"),
    [
        ("images/{}.jpg", "labels/{}.png", {}),
        ("701_StillsRaw_full/{}.png", "LabeledApproved_full/{}_L.png", {}),
        ("Images/{}.bmp", "GroundTruth/{}_GT.bmp", {}),
        ("{}.bmp", "{}_GT.bmp", {}),
        ("left/{}-a.png", "right/deep/{}-b.png", {"image_folder": "left", "label_folder": "right/deep"}),
    ],
)
@pytest.mark.parametrize("colored", [False, True])
def test_a_folder_without_parts_is_for_training(
    image: str, label: str, layout: dict[str, str], colored: bool, tmp_path: Path, rng: np.random.Generator
) -> None:
    if "-a" in image:
        layout = layout | {"image_suffix": "-a", "label_suffix": "-b"}
    root = tmp_path / "data"
    names = ("0001TP_006690", "1_10_s")
    expected = {name: add(root, image.format(name), label.format(name), rng, colored) for name in names}
    split = SPLIT
    if colored:
        palette = {name: list(color) for name, color in COLORS.items()} | {255: [list(VOID), [1, 1, 1]]}
        (tmp_path / "own.yaml").write_text(
            json.dumps({"classes": list(CLASSES), "unseen": ["sky"]})[:-1]
            + f", palette: {json.dumps(palette).replace(chr(34) + '255' + chr(34), '255')}}}"
        )
        split = load_split(tmp_path / "own.yaml")
    check(read(root, "train", split, **layout), expected)
    with pytest.raises(ValueError, match="has no part 'val'; it has train"):
        read(root, "val", split, **layout)


def test_lists_divide_a_folder_into_parts(tmp_path: Path, rng: np.random.Generator) -> None:
    ids = {name: add(tmp_path, f"images/{name}.jpg", f"labels/{name}.png", rng) for name in ("a.1", "b", "c")}
    (tmp_path / "train.txt").write_text("a.1\n/elsewhere/c.jpg /elsewhere/c.png\n")
    (tmp_path / "val.txt").write_text("b.jpg\n")
    check(read(tmp_path, "train"), {name: ids[name] for name in ("a.1", "c")})
    check(read(tmp_path, "validation"), {"b": ids["b"]})
    with pytest.raises(ValueError, match="has no part 'test'; it has train, val"):
        read(tmp_path, "test")
    (tmp_path / "val.txt").write_text("d\n")
    with pytest.raises(ValueError, match=r"val\.txt lists 'd', but there is no such image"):
        read(tmp_path, "val")


def test_what_does_not_pair_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    add(tmp_path / "a", "images/1.jpg", "labels/1.png", rng)
    add(tmp_path / "a", "images/2.jpg", "labels/3.png", rng)
    problems = validate_dataset(load_benchmark(str(tmp_path / "a"), "train"), SPLIT)
    assert [(Path(problem.file).name, problem.message) for problem in problems] == [
        ("2.png", "the file does not exist"),
        ("3.jpg", "the file does not exist"),
    ]
    add(tmp_path / "b", "images/1.jpg", "labels/1-truth.png", rng)
    with pytest.raises(ValueError, match=r"\['1'\] and \['1-truth'\].*`label_suffix`"):
        pair_files(tmp_path / "b", "train", FolderLayout())
    add(tmp_path / "c", "images/1.jpg", "images/1.png", rng)
    (tmp_path / "c" / "labels").mkdir()
    with pytest.raises(ValueError, match=r"1\.jpg and .*1\.png have the same name"):
        pair_files(tmp_path / "c", "train", FolderLayout())
    (tmp_path / "d" / "images").mkdir(parents=True)
    (tmp_path / "d" / "labels").mkdir()
    with pytest.raises(ValueError, match="images is empty"):
        pair_files(tmp_path / "d", "train", FolderLayout())
    (tmp_path / "e" / "fotos").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="it has fotos.*`image_folder`"):
        pair_files(tmp_path / "e", "train", FolderLayout())
    with pytest.raises(ValueError, match="`label_folder` is missing"):
        pair_files(tmp_path / "e", "train", FolderLayout(image_folder="fotos"))


def test_folders_of_tables_are_left_to_datasets(tmp_path: Path, rng: np.random.Generator) -> None:
    add(tmp_path / "files", "1.png", "2.png", rng)
    (tmp_path / "table").mkdir()
    line = {"image": str(tmp_path / "files" / "1.png"), "label": str(tmp_path / "files" / "2.png")}
    (tmp_path / "table" / "train.jsonl").write_text(json.dumps(line))
    assert len(read(tmp_path / "table", "train")) == 1
    (tmp_path / "table" / "0.png").touch()
    assert is_plain_folder(tmp_path / "table")
    (tmp_path / "table" / "download.tar").touch()  # the archive that was unpacked here
    assert is_plain_folder(tmp_path / "table")
    (tmp_path / "table" / "metadata.csv").touch()
    assert not is_plain_folder(tmp_path / "table") and not is_plain_folder(tmp_path / "nothing")


# --- parts


def rows_of(count: int) -> datasets.Dataset:
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "PNG")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    value = {"bytes": buffer.getvalue(), "path": None}
    return datasets.Dataset.from_list([{"image": value, "label": value}], features=features).select(range(count))


def test_a_part_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    rows_of(1).save_to_disk(tmp_path / "one")
    datasets.Dataset(rows_of(1).data, split=datasets.NamedSplit("val")).save_to_disk(tmp_path / "named")
    datasets.DatasetDict({"train": rows_of(1), "val": rows_of(0)}).save_to_disk(tmp_path / "two")
    (tmp_path / "parquet").mkdir()
    rows_of(1).to_parquet(tmp_path / "parquet" / "validation.parquet")
    for folder, part in (("one", "train"), ("named", "validation"), ("two", "train"), ("parquet", "val")):
        assert len(load_benchmark(str(tmp_path / folder), part)) == 1
    for folder, part, message in (
        ("one", "nonsense", "It has the parts train; it was saved as a single dataset"),
        ("one", "validation", "It has the parts train; it was saved as a single dataset"),
        ("named", "train", "has the parts val; it was saved"),
        ("two", "nonsense", "has the parts train, val"),
        ("two", "validation", "It has no rows"),
        ("parquet", "nonsense", r"Should be one of \['validation'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            load_benchmark(str(tmp_path / folder), part)


# --- COCO


def coco_file(path: Path, images: dict[int, np.ndarray], annotations: list[dict], folder: Path) -> None:
    for key, label in images.items():
        save(folder / f"{key}.jpg", np.zeros((*label.shape, 3), np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = {key: {"height": label.shape[0], "width": label.shape[1]} for key, label in images.items()}
    content = {
        "images": [{"id": key, "file_name": f"{key}.jpg", **size} for key, size in sizes.items()],
        "annotations": annotations,
        "categories": [
            {"id": 3, "name": "Car"},
            {"id": 7, "name": "road"},
            {"id": 90, "name": "sky"},
            {"id": 1, "name": "x"},
        ],
    }
    path.write_text(json.dumps(content))


RAW = {255: 255, 0: 7, 1: 3, 2: 90}  # category of each class id


def raw_of(label: np.ndarray) -> np.ndarray:
    return np.array([[RAW[value] for value in row] for row in label.tolist()])


@pytest.mark.filterwarnings("ignore:Not in `classes`")
def test_coco_panoptic(tmp_path: Path, rng: np.random.Generator) -> None:
    labels = {key: rng.choice([0, 1, 2, 255], (7, 9)) for key in (5, 6)}
    annotations = []
    for key, label in labels.items():
        codes = {0: 70000 + key, 1: 258, 2: 12}
        picture = np.zeros((*label.shape, 3), np.uint8)
        for value, code in codes.items():
            picture[label == value] = (code % 256, code // 256 % 256, code // 65536)
        save(tmp_path / "annotations" / "panoptic_val2017" / f"{key}.png", picture)
        segments = [{"id": code, "category_id": RAW[value]} for value, code in codes.items()]
        annotations.append({"image_id": key, "file_name": f"{key}.png", "segments_info": segments})
    coco_file(tmp_path / "annotations" / "panoptic_val2017.json", labels, annotations, tmp_path / "val2017")
    check(read(tmp_path, "validation"), {str(key): label for key, label in labels.items()})
    mapped = SegmentationSplit("mapped", CLASSES, raw_id_to_class={3: 1, 7: 0, 90: 2, 1: 255, 255: 255})
    rows = load_benchmark(str(tmp_path), "val", split=mapped)
    assert [np.array_equal(row["label"], raw_of(labels[int(row["name"])])) for row in rows] == [True, True]
    changed = tmp_path / "annotations" / "panoptic_val2017" / "5.png"
    save(changed, np.full((*labels[5].shape, 3), (2, 1, 0), np.uint8))  # code 258: all of it is class 1
    rows = load_benchmark(str(tmp_path), "val", split=mapped)
    assert {row["name"]: np.unique(row["label"]).tolist() for row in rows}["5"] == [RAW[1]]
    labels[5][:] = 1
    check(read(tmp_path, "val", mapped), {str(key): label for key, label in labels.items()})
    with pytest.raises(FileNotFoundError, match="no folders with the usual names of images and label maps"):
        read(tmp_path, "train")
    with pytest.raises(ValueError, match=r"no category \['tree'\] of `classes`"):
        read(tmp_path, "val", SegmentationSplit("own", ("car", "tree")))


def test_coco_names_count_before_ids(tmp_path: Path) -> None:
    """COCO's PNG files count things from 0, its JSON files from 1; a built-in split for PNG files works for both."""
    label = np.array([[1, 1, 0], [0, 3, 3]])  # background, person, car
    annotations = [
        {"image_id": 1, "category_id": key, "area": 2, "segmentation": {"counts": runs_of(label == value)}}
        for key, value in ((1, 1), (3, 3))
    ]
    coco_file(tmp_path / "annotations" / "instances_val2017.json", {1: label}, annotations, tmp_path / "val2017")
    path = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    names = load_split("coco_object").classes[1:]
    ids = [raw + 1 for raw, target in load_split("coco_object").raw_id_to_class.items() if target]
    content["categories"] = [{"id": key, "name": name} for key, name in zip(ids, names, strict=True)]
    path.write_text(json.dumps(content))
    check(read(tmp_path, "val", load_split("coco_object")), {"1": label})
    panoptic = tmp_path / "annotations" / "panoptic_val2017.json"
    panoptic.write_text("its categories are others")
    (sample,) = SegmentationDataset(
        load_benchmark("coco_object", "val", tmp_path), load_split("coco_object"), training=False
    )
    assert np.array_equal(sample["label"], label)
    panoptic.unlink()
    merged = SegmentationSplit("merged", ("vehicle", "person"), raw_id_to_class={3: 0, 1: 1, 255: 255})
    with pytest.warns(UserWarning, match="so unlabelled: the categories"):
        found = read(tmp_path, "val", merged)
    check(found, {"1": np.array([[1, 1, 255], [255, 0, 0]])})
    with pytest.raises(ValueError, match="remove `palette`"):
        read(tmp_path, "val", SegmentationSplit("colors", ("car",), palette={(0, 0, 0): 0}))


def runs_of(mask: np.ndarray) -> list[int]:
    """Run lengths, column by column, alternating between absent and present pixels."""
    flat, counts, value = mask.T.flatten().tolist(), [0], 0
    for pixel in flat:
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


@pytest.mark.filterwarnings("ignore:Not in `classes`")
@pytest.mark.parametrize("background", [False, True])
def test_coco_instances(tmp_path: Path, rng: np.random.Generator, background: bool) -> None:
    car = np.zeros((12, 10), bool)
    car[2:6, 3:9] = True
    noise = rng.random((12, 10)) < 0.4
    crowd = np.ones((12, 10), bool)
    crowd[:, 5:] = False
    rest = 3 if background else 255
    first = np.full((12, 10), rest)
    first[crowd], first[noise] = 2, 0  # smaller instances are on top, crowds at the bottom
    first[car] = 1
    label = {4: first, 9: np.full((3, 4), rest)}
    polygon = [3, 2, 9, 2, 9, 6, 3, 6]
    annotations = [
        {"image_id": 4, "category_id": 3, "area": 24, "segmentation": [polygon]},
        {"image_id": 4, "category_id": 7, "area": 48, "segmentation": {"counts": runs_of(noise), "size": [12, 10]}},
        {"image_id": 4, "category_id": 90, "area": 1, "iscrowd": 1, "segmentation": {"counts": runs_of(crowd)}},
    ]
    coco_file(tmp_path / "train" / "_annotations.coco.json", label, annotations, tmp_path / "train")
    split = SegmentationSplit("own", (*CLASSES, "background")) if background else SPLIT
    check(read(tmp_path, "train", split), {str(key): value for key, value in label.items()})
    settings = DataSettings(
        dataset=str(tmp_path), split=str(tmp_path / "own.yaml"), label_file="{part}/_annotations.coco.json"
    )
    (tmp_path / "own.yaml").write_text(json.dumps({"classes": list(split.classes)}))
    assert open_part(settings, "train", 1)["name"] == ["4"]


def test_polygons_cover_the_pixels_whose_centres_they_contain(rng: np.random.Generator) -> None:
    from zeroshot.data.coco_json import _polygon

    centres = np.stack(np.meshgrid(np.arange(23) + 0.5, np.arange(17) + 0.5), -1).reshape(-1, 2)
    for _ in range(20):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        radii = rng.uniform(2, 14, 9)  # some corners are outside the image
        corners = np.stack([11 + radii * np.cos(angles), 8 + radii * np.sin(angles)], 1)
        inside = MatplotlibPath(np.concatenate([corners, corners[:1]]), closed=True).contains_points(centres)
        assert np.array_equal(_polygon(corners, (17, 23)), inside.reshape(17, 23))


def encode(counts: list[int]) -> str:
    """COCO's compressed run lengths, in the format of rleToString in its C library."""
    text = ""
    for position, count in enumerate(counts):
        value = count - counts[position - 2] if position > 2 else count
        more = True
        while more:
            digit = value & 0x1F
            value >>= 5
            more = value != -1 if digit & 0x10 else value != 0
            text += chr((digit | 0x20 if more else digit) + 48)
    return text


def test_compressed_run_lengths(rng: np.random.Generator) -> None:
    from zeroshot.data.coco_json import _decode_counts

    for limit in (3, 40, 5000):
        counts = rng.integers(0, limit, 50).tolist()
        assert _decode_counts(encode(counts).encode()) == counts


def test_files_that_are_not_coco_are_named(tmp_path: Path, rng: np.random.Generator) -> None:
    add(tmp_path, "images/1.jpg", "labels/1.png", rng)
    for text in ("[", "[]", '{"images": [], "annotations": [], "categories": []}'):
        (tmp_path / "own.json").write_text(text)
        with pytest.raises(ValueError, match=r"own\.json"):
            load_benchmark(str(tmp_path), "train", layout=FolderLayout(label_file="own.json"))
    with pytest.raises(FileNotFoundError, match="None of these files exist.*train.json"):
        load_benchmark(str(tmp_path), "train", layout=FolderLayout(label_file="{part}.json"))


# --- counts and warnings


def own_tree(root: Path, labels: dict[str, list[np.ndarray]], split: dict) -> tuple[Path, Path]:
    """A folder with parts, and the file of its classes."""
    for part, arrays in labels.items():
        for position, label in enumerate(arrays):
            image = np.full((*label.shape, 3), 99, np.uint8)
            save(root / "data" / part / "images" / f"{position}.png", image)
            save(root / "data" / part / "labels" / f"{position}.png", label.astype(np.uint8))
    (root / "own.yaml").write_text(json.dumps(split))
    return root / "data", root / "own.yaml"


def check_data(root: Path, data: Path, split: Path, capsys, monkeypatch, *flags: str) -> tuple[str, str]:
    """The output and error output of scripts/check_data.py."""
    command = ["check_data.py", "--data.dataset", str(data), "--data.split", str(split), *flags]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(root / "check.png"), "--images", "2"])
    with contextlib.suppress(SystemExit):
        runpy.run_path(str(ROOT / "scripts" / "check_data.py"), run_name="__main__")
    printed = capsys.readouterr()
    return printed.out, printed.err


def test_counts_are_those_of_a_plain_loop(tmp_path: Path, rng: np.random.Generator, capsys, monkeypatch) -> None:
    arrays = {
        part: [rng.choice([0, 1, 2, 255], (5 + i, 7)) for i in range(count)]
        for part, count in (("train", 4), ("val", 3))
    }
    data, split = own_tree(tmp_path, arrays, {"classes": list(CLASSES), "unseen": ["sky"]})
    out, err = check_data(tmp_path, data, split, capsys, monkeypatch)
    assert "Warning" not in out, err
    for position, name in ((0, "road"), (1, "car"), (2, "sky"), (255, "unlabelled pixels")):
        line = next(line for line in out.splitlines() if line.startswith(name + " "))
        cells = line.removeprefix(name).split()
        numbers = []
        for part in ("train", "val"):
            pixels = sum(value == position for label in arrays[part] for row in label.tolist() for value in row)
            share = f"{100 * pixels / sum(label.size for label in arrays[part]):.1f}"
            images = sum(position in label.tolist()[0] + label.flatten().tolist() for label in arrays[part])
            numbers += [str(pixels), share, "%", str(images)]
        assert cells[cells.index(numbers[0]) :] == numbers
    assert "4 images; sizes 7×5 (1)" in out and "0.png + " in out
    picture = Image.open(tmp_path / "check.png")
    assert picture.width > 700 and picture.mode == "RGB"


def test_a_large_part_is_counted_by_a_fixed_sample() -> None:
    counts = PartCounts(2, 10_001)
    assert len(counts.sample) == SAMPLE and counts.sample == PartCounts(2, 10_001).sample
    assert min(counts.sample) == 0 and max(counts.sample) == 10_000
    assert PartCounts(2, 7).sample == set(range(7)) and PartCounts(2, 0).sample == frozenset()
    counts.add(np.array([3, 0, 1]), (2, 2))
    text = class_table(SegmentationSplit("two", ("a", "b")), {"train": counts})
    assert "10,001 images, of which a fixed sample of 1 is counted" in text and "75.0 %" in text
    assert (
        "of the 1 images counted" in data_warnings(SegmentationSplit("two", ("a", "b")), {"train": counts}, "train")[0]
    )


def test_only_the_sample_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zeroshot.data.statistics.SAMPLE", 3)
    arrays = {"train": [np.full((4, 4), i % 2) for i in range(9)]}
    data, _ = own_tree(tmp_path, arrays, {})
    split = SegmentationSplit("two", ("a", "b"))
    counts = PartCounts(2, 9)
    assert validate_dataset(load_benchmark(str(data), "train"), split, counts=counts) == []
    assert counts.counted == 3 and counts.pixels.tolist() == [48, 0, 0]  # images 0, 4 and 8


ONE, TWO, ALL = np.zeros((4, 4)), np.ones((4, 4)), np.arange(16).reshape(4, 4) % 3


@pytest.mark.parametrize(
    ("train", "validation", "split", "words"),
    [
        (np.full((4, 4), 255), ALL, {"unseen": ["sky"]}, "All pixels in `train` are unlabelled"),
        (np.full((4, 4), 2), ALL, {"unseen": ["sky"]}, "belong to unseen classes, so there is nothing to train"),
        (ONE, ALL, {"unseen": ["sky"]}, "Classes to train on that have no pixel in `train`: 'car'"),
        (TWO, ALL, {}, "that have no pixel in `train`: 'road', 'sky'. If 0 means unlabelled"),
        (ONE, ONE, {"unseen": ["sky"]}, "The last class, 'sky', has no pixel in any part. If 0 means unlabelled"),
        (
            ALL,
            TWO,
            {"unseen": ["road", "sky"]},
            "None of the 2 unseen classes occurs in `validation`; mIoU(U) has no meaning",
        ),
        (ALL, ONE, {"unseen": ["road", "sky"]}, "1 of 2 unseen classes occurs in `validation`"),
        (ALL, ONE, {"unseen": list(CLASSES)}, "All 3 classes of 'own' are unseen"),
        (ALL + 1, ALL, {}, "0.png: The label map contains the raw ids [3], which"),
        (ALL + 1, ALL, {}, "If 3 marks unlabelled pixels, set `ignore_index: 3`."),
        (ALL + 1, ALL, {}, "add `raw_id_map: {0: 255, 1: road, 2: car, …}` to the split"),
        (np.full((4, 4), 9), ALL, {"raw_id_map": {0: 0}}, "Add them to `raw_id_map`."),
        (np.full((4, 4), 9), ALL, {"palette": {"road": [0, 0, 0]}}, "the colours [(9, 9, 9)] in 16 pixels"),
        (np.full((4, 4), 9), ALL, {"palette": {"road": [0, 0, 0]}}, "Add them to `palette`"),
    ],
)
def test_likely_mistakes_are_said(
    train: np.ndarray, validation: np.ndarray, split: dict, words: str, tmp_path: Path, capsys, monkeypatch
) -> None:
    text = json.dumps({"classes": list(CLASSES), **split}).replace('"0"', "0")
    data, file = own_tree(tmp_path, {"train": [train], "validation": [validation]}, {})
    file.write_text(text)
    out, err = check_data(tmp_path, data, file, capsys, monkeypatch)
    assert words in out + err and "Traceback" not in err


def test_one_cause_is_said_once(tmp_path: Path, capsys, monkeypatch) -> None:
    labels = [np.full((4, 4), 11) if i else np.full((4, 4), 12) for i in range(25)]
    classes = [f"class {i}" for i in range(11)]
    data, file = own_tree(tmp_path, {"train": labels, "val": labels[:1]}, {"classes": classes})
    out, err = check_data(tmp_path, data, file, capsys, monkeypatch)
    assert err.count("raw ids") == 1 and "25 files, " in err and "raw ids [11, 12]" in err
    own_tree(tmp_path, {"train": labels[1:2] * 25}, {"classes": classes})
    out, err = check_data(tmp_path, data, file, capsys, monkeypatch)
    assert "25 files, " in err and "If 11 marks unlabelled pixels, set `ignore_index: 11`." in err


def test_damaged_files_are_said_once(tmp_path: Path, capsys, monkeypatch) -> None:
    data, file = own_tree(tmp_path, {"train": [ALL] * 4, "val": [ALL]}, {"classes": list(CLASSES)})
    for index, size in ((0, (3, 4)), (1, (4, 3))):
        save(next((data / "train" / "labels").glob(f"{index}.*")), np.zeros(size, np.uint8))
    for index in (2, 3):
        next((data / "train" / "images").glob(f"{index}.*")).write_bytes(b"no image")
    _, err = check_data(tmp_path, data, file, capsys, monkeypatch)
    assert "4 problems found" in err and err.count("2 files, ") == 2
    assert err.count("it is not an image, or its format is unknown to Pillow") == 1
    assert err.count("they must be equal (in the first)") == 1


def test_a_part_without_label_maps_and_two_folders_of_one_part_are_refused(tmp_path: Path, rng) -> None:
    for part in ("train", "val"):
        add(tmp_path, f"{part}/images/0.jpg", f"{part}/labels/0.png", rng)
    shutil.copytree(tmp_path / "val", tmp_path / "validation")
    with pytest.raises(ValueError, match="has validation and val, which are names of one part"):
        read(tmp_path, "validation")
    shutil.rmtree(tmp_path / "validation")
    shutil.rmtree(tmp_path / "val" / "labels")
    with pytest.raises(ValueError, match="val has images, such as images/0.jpg, but no label maps"):
        read(tmp_path, "val")


def test_names_that_the_text_tower_does_not_tell_apart() -> None:
    angle = np.arccos([1, 0.995, 0.98])
    prototypes = torch.tensor(np.stack([np.cos(angle), np.sin(angle)], 1))  # 1 and 2: cos(0.2003 - 0.1000) = 0.995
    found = similar_names(prototypes, ("a", "b", "c"))
    assert len(found) == 2 and "'a' and 'b' (cosine 0.995)" in found[0] and "'b' and 'c'" in found[1]


def test_scores_say_how_many_unseen_classes_occur() -> None:
    split = SegmentationSplit("own", CLASSES, ("car", "sky"))
    evaluator = Evaluator(split, {"r": Readout()})
    evaluator._count("r", torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 1]]))
    scores = evaluator.scores()["r"]
    assert "(1 of 2 unseen classes occurs in these images)" in format_scores(scores)
    evaluator._count("r", torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 2]]))
    assert "occur" not in format_scores(evaluator.scores()["r"])


# --- training on photographs of mixed sizes


@pytest.fixture
def mixed(tmp_path: Path, rng: np.random.Generator) -> list[str]:
    """Flags of a training of two steps on a tree of images of four sizes."""
    sizes = [(60, 90), (97, 41), (30, 33), (64, 64)]
    labels = [rng.integers(0, 3, size).astype(np.uint8) for size in sizes]
    data, split = own_tree(
        tmp_path, {"train": labels, "validation": labels[:2]}, {"classes": list(CLASSES), "unseen": ["sky"]}
    )
    values = {
        "config": ROOT / "scripts" / "configs" / "own_data.yaml",
        "data.dataset": data,
        "data.split": split,
        "data.transform.crop_size": 32,
        "data.num_workers": 0,
        "model.checkpoint": tiny_checkpoint(tmp_path / "start"),
        "output_dir": tmp_path / "run",
        "training.steps": 2,
        "training.warmup_steps": 1,
        "training.log_every": 1,
        "training.evaluate_every": 2,
        "training.tensorboard": False,
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def train(monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with contextlib.suppress(SystemExit):
        runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")


def test_the_preset_trains_on_images_of_mixed_sizes(mixed: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    train(monkeypatch, mixed)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 2 and np.isfinite(losses).all(), capsys.readouterr().err
    config = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert list(config["id2label"].values()) == list(CLASSES) and config["unseen_labels"] == ["sky"]
    assert "unlabelled pixels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("ids", "ids of label maps: {'1': 1, '2': 2} then, {'1': 2, '2': 1} now"),
        (
            "unseen",
            "labelled classes (by `unseen`, `data.fully_supervised` or `data.pseudo_unseen`): [] then, ['sky'] now",
        ),
        ("labels", "data.image_folder: None then, '{part}/images' now"),
        ("names", "image names"),
        ("nothing", "Resuming at step 2"),
        ("steps", "This training is finished (2 of 2 steps)"),
        ("fewer steps", "This training is finished (2 of 1 steps)"),
    ],
)
def test_a_run_on_other_labels_is_not_resumed(
    change: str, named: str, mixed: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    flags = [*mixed, "--training.evaluate_every", "0", "--training.save_every", "2"]
    train(monkeypatch, flags)
    log = (tmp_path / "run" / "metrics.jsonl").read_text()
    capsys.readouterr()
    split = f"classes: {json.dumps(CLASSES)}\nunseen: {'[]' if change == 'unseen' else '[sky]'}\n"
    split += "raw_id_map: {0: 0, 1: 2, 2: 1, 255: 255}\n" if change == "ids" else ""
    (tmp_path / "own.yaml").write_text(split)
    if change == "labels":
        shutil.copytree(tmp_path / "data" / "train" / "labels", tmp_path / "data" / "train" / "others")
        flags += ["--data.label_folder", "{part}/others", "--data.image_folder", "{part}/images"]  # both or neither
    if change == "names":
        for kind in ("images", "labels"):
            (tmp_path / "data" / "train" / kind / "0.png").rename(tmp_path / "data" / "train" / kind / "9.png")
    steps = {"steps": 2, "fewer steps": 1}.get(change, 3)
    shutil.rmtree(tmp_path / "run" / "final")
    (tmp_path / "run" / ".timing.partial.json").touch()  # as if killed while writing it
    train(monkeypatch, [*flags, "--training.steps", str(steps), "--training.warmup_steps", "0"])
    printed = capsys.readouterr()
    refused = change not in ("nothing", "steps", "fewer steps")
    assert (tmp_path / "run" / "final" / "config.json").is_file() != refused
    assert named in (printed.err if refused else printed.out)
    assert refused or not list((tmp_path / "run").glob(".*"))
    if refused:
        assert "Choose another `output_dir`" in printed.err
        assert (tmp_path / "run" / "metrics.jsonl").read_text() == log


def test_synonyms_of_a_part_are_one_part(mixed: list[str], monkeypatch, capsys) -> None:
    train(
        monkeypatch, [*mixed, "--data.train_part", "val", "--training.batch_size", "2"]
    )  # `validation` is the part for validation
    assert "is the part for both training and validation" in capsys.readouterr().out


def test_a_cache_of_mixed_sizes_is_answered_with_the_settings(
    mixed: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    train(monkeypatch, [*mixed, "--data.cached_epochs", "1", "--data.transform.crop_size", "null"])
    error = capsys.readouterr().err
    assert "`data.cached_epochs` needs samples of one size" in error and "`data.transform`" in error
    assert not (tmp_path / "run").exists()


def test_no_setting_is_left_to_be_guessed(mixed: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    position = mixed.index("--data.split")
    train(monkeypatch, [*mixed[:position], *mixed[position + 2 :]])
    assert "No split 'my_classes.yaml'" in capsys.readouterr().err
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", "--model", str(tmp_path / "start"), "--dataset", str(tmp_path / "data")]
    )
    with contextlib.suppress(SystemExit):
        runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")
    assert "set `split` (`--split`" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["I;16", "RGBA", "LA"])
def test_training_sees_the_pixels_that_prediction_sees(mode: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """16-bit values are scaled, not clipped, and hidden colours under transparency stay hidden."""
    values = rng.integers(0, 65536, (5, 7)).astype(np.uint16)
    image = Image.fromarray(values)
    if mode != "I;16":
        image = Image.fromarray(rng.integers(0, 256, (5, 7, len(mode))).astype(np.uint8), mode)
    (tmp_path / "train" / "images").mkdir(parents=True)
    image.save(tmp_path / "train" / "images" / "0.png")
    save(tmp_path / "train" / "labels" / "0.png", np.zeros((5, 7), np.uint8))
    (sample,) = SegmentationDataset(load_benchmark(str(tmp_path), "train", split=SPLIT), SPLIT, training=False)
    seen = np.asarray(open_image(tmp_path / "train" / "images" / "0.png"))
    assert np.array_equal(sample["image"], seen)
    if mode == "I;16":
        assert np.array_equal(seen[..., 0], np.rint(values / 257))
