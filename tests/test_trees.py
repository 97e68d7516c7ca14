# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Typical dataset trees, compared with plain PIL and NumPy; and trees with one error, for which the script reports the file
and the problem, and writes nothing."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny
from conftest import ROOT
from PIL import Image
from test_processes import launch

from zeroshot.data.benchmarks import load_benchmark
from zeroshot.data.dataset import SegmentationDataset, validate_dataset
from zeroshot.data.splits import load_split


SIZE = (37, 53)  # rows and columns


# --- an independent reader: the published tables, spelled out


VOC = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()
UNSEEN = {"pottedplant", "sheep", "sofa", "train", "tvmonitor"}
# COCO's stuff annotations count from 0 and leave out eleven of the 182 categories, which occur in no file.
COCO_ABSENT = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
COCO_NAMES = {0: "person", 1: "bicycle", 19: "sheep", 20: "cow", 89: "toothbrush", 91: "banner", 181: "wood"}


def png_pixels(path: Path) -> np.ndarray:
    """The indices in a single-channel 8-bit PNG, decoded from its bytes without applying a palette."""
    data, position, compressed = path.read_bytes(), 8, b""
    while position < len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        body = data[position + 8 : position + 8 + length]
        if kind == b"IHDR":
            width, height, depth, color, _, _, interlaced = struct.unpack(">IIBBBBB", body)
            assert depth == 8 and color in (0, 3) and not interlaced
        compressed += body if kind == b"IDAT" else b""
        position += 12 + length
    rows = np.frombuffer(zlib.decompress(compressed), np.uint8).reshape(height, width + 1)
    pixels = np.zeros((height + 1, width + 1), np.int64)  # with a row above and a column to the left
    for y, (kind, *row) in enumerate(rows.tolist(), 1):
        for x, value in enumerate(row, 1):
            left, above, corner = pixels[y, x - 1], pixels[y - 1, x], pixels[y - 1, x - 1]
            distances = [abs(above - corner), abs(left - corner), abs(left + above - 2 * corner)]
            paeth = (left, above, corner)[distances.index(min(distances))]
            pixels[y, x] = (value + (0, left, above, (left + above) // 2, paeth)[kind]) % 256
    return pixels[1:, 1:]


# --- trees


def blobs(rng: np.random.Generator, raw_ids: list[int], border: int | None) -> np.ndarray:
    """Regions of raw ids around random centres, with a border between them."""
    centres = rng.uniform(0, SIZE[0], (12, 2))
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    nearest = np.argmin([(y - a) ** 2 + (x * SIZE[0] / SIZE[1] - b) ** 2 for a, b in centres], 0)
    label = np.resize(rng.permutation(np.asarray(raw_ids, np.uint8)), 12)[nearest]
    if border is not None:
        edge = np.zeros(SIZE, bool)
        edge[:, 1:] |= nearest[:, 1:] != nearest[:, :-1]
        edge[1:] |= nearest[1:] != nearest[:-1]
        label[edge] = border
    return label


def save_photo(path: Path, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*SIZE, 3)).astype(np.uint8)).save(path, "JPEG")


def save_label(path: Path, label: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(label)
    if palette:
        colors = [[sum((i >> (3 * b + c) & 1) << (7 - b) for b in range(8)) for c in range(3)] for i in range(256)]
        picture.putpalette(sum(colors, []))
    picture.save(path)


def voc_tree(root: Path) -> list[str]:
    rng = np.random.default_rng(1)
    for name in (names := [f"2007_00{index:04d}" for index in range(4)]):
        save_photo(root / "JPEGImages" / f"{name}.jpg", rng)
        save_label(root / "SegmentationClass" / f"{name}.png", blobs(rng, list(range(21)), 255), palette=True)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for part in ("train", "val"):
        (lists / f"{part}.txt").write_text("\n".join(names) + "\n")
    return names


def test_voc_palette_files_with_void_borders(tmp_path: Path) -> None:
    names, split = voc_tree(tmp_path), load_split("voc2012")
    rows = load_benchmark("voc2012", "train", tmp_path)
    assert validate_dataset(rows, split) == [] and rows["name"] == names
    evaluated, trained = (SegmentationDataset(rows, split, training=flag) for flag in (False, True))
    seen = [name for name in VOC if name not in UNSEEN]
    kinds = set()
    for name, sample, hidden in zip(names, evaluated, trained):
        raw = png_pixels(tmp_path / "SegmentationClass" / f"{name}.png")
        kinds |= set(np.unique(raw))
        for y, x in np.ndindex(*SIZE):
            value = raw[y, x]
            expected = None if value in (0, 255) else VOC[value - 1]
            found = sample["label"][y, x]
            assert (None if found == 255 else split.classes[found]) == expected
            found = hidden["label"][y, x]
            assert (None if found == 255 else seen[found]) == (None if expected in UNSEEN else expected)
        photo = np.asarray(Image.open(tmp_path / "JPEGImages" / f"{name}.jpg"))
        assert np.array_equal(sample["image"], photo)
    assert {0, 255} < kinds and kinds & set(range(16, 21)) and kinds & set(range(1, 16))


def test_coco_stuff_raw_ids(tmp_path: Path) -> None:
    rng, split = np.random.default_rng(2), load_split("coco_stuff")
    present = sorted(set(range(182)) - COCO_ABSENT)
    for start in range(0, len(present), 12):
        save_photo(tmp_path / "train2017" / f"{start:012d}.jpg", rng)
        label = blobs(rng, present[start : start + 12], 255)
        save_label(tmp_path / "stuffthingmaps" / "train2017" / f"{start:012d}.png", label)
    rows = load_benchmark("coco_stuff", "train", tmp_path)
    assert validate_dataset(rows, split) == []
    met = set()
    for sample in SegmentationDataset(rows, split, training=False):
        raw = png_pixels(tmp_path / "stuffthingmaps" / "train2017" / f"{sample['name']}.png")
        table = np.full(256, 255)
        table[present] = range(len(present))  # classes keep the order of the raw ids
        assert np.array_equal(sample["label"], table[raw])
        for value in set(np.unique(raw)) & set(COCO_NAMES):
            assert split.classes[sample["label"][raw == value][0]] == COCO_NAMES[value]
            met.add(value)
    assert met == set(COCO_NAMES) and len(split.classes) == len(present) == 171


@pytest.mark.parametrize(("number", "background"), [(59, 255), (60, 0)])
def test_context_label_files(tmp_path: Path, number: int, background: int) -> None:
    rng, name = np.random.default_rng(3), f"pascal_context_{number}"
    split = load_split(name)
    save_photo(tmp_path / "JPEGImages" / "2008_000002.jpg", rng)
    label = rng.permutation(np.resize(np.arange(60, dtype=np.uint8), SIZE[0] * SIZE[1])).reshape(SIZE)
    save_label(tmp_path / "SegmentationClassContext" / "2008_000002.png", label)
    (tmp_path / "ImageSets" / "SegmentationContext").mkdir(parents=True)
    (tmp_path / "ImageSets" / "SegmentationContext" / "val.txt").write_text("2008_000002\n")
    rows = load_benchmark(name, "val", tmp_path)
    assert validate_dataset(rows, split) == []
    (sample,) = SegmentationDataset(rows, split, training=False)
    raw = png_pixels(tmp_path / "SegmentationClassContext" / "2008_000002.png")
    assert np.array_equal(sample["label"], np.where(raw == 0, background, raw - (number == 59)))
    assert len(split.classes) == number and split.classes[-59] == "aeroplane" and split.classes[-1] == "wood"


def test_parquet_as_on_the_hub(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    (tmp_path / "classes.yaml").write_text(
        "classes: [road, roof, tree]\nunseen: [roof]\nignore_index: 255\nraw_id_map: {7: road, 9: roof, 200: tree, 0: 255}\n"
    )
    split, rows, expected = load_split(tmp_path / "classes.yaml"), [], []
    for index in range(3):
        label = blobs(rng, [0, 7, 9, 200, 255], None)
        expected.append(np.array([[{7: 0, 9: 1, 200: 2}.get(v, 255) for v in row] for row in label.tolist()]))
        row = {}
        for column, array in (("image", rng.integers(0, 256, (*SIZE, 3)).astype(np.uint8)), ("annotation", label)):
            buffer = io.BytesIO()
            Image.fromarray(array).save(buffer, "PNG")
            row[column] = {"bytes": buffer.getvalue(), "path": None}
        rows.append(row | {"scene": index})
    features = {"image": datasets.Image(), "annotation": datasets.Image(), "scene": datasets.Value("int32")}
    data = tmp_path / "repository" / "data"
    data.mkdir(parents=True)
    table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    table.to_parquet(data / "validation-00000-of-00001.parquet")
    opened = load_benchmark(str(data.parent), "validation", label_column="annotation")
    assert validate_dataset(opened, split) == []
    for sample, ids in zip(SegmentationDataset(opened, split, training=False), expected, strict=True):
        assert np.array_equal(sample["label"], ids)


# --- one thing wrong


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def wrong_size(path: Path) -> None:
    save_label(path, np.zeros((SIZE[0], SIZE[1] - 1), np.uint8), palette=True)


def wrong_id(path: Path) -> None:
    save_label(path, np.full(SIZE, 21, np.uint8), palette=True)


def colors(path: Path) -> None:
    Image.open(path).convert("RGB").save(path)


def no_names(path: Path) -> None:
    path.write_text("\n\n")


IMAGE, LABEL = "JPEGImages/2007_000002.jpg", "SegmentationClass/2007_000002.png"
DAMAGE = [
    (Path.unlink, IMAGE, "does not exist"),
    (Path.unlink, LABEL, "does not exist"),
    (cut, IMAGE, "cannot be decoded"),
    (cut, LABEL, "cannot be decoded"),
    (wrong_size, LABEL, "52×37 pixels, its image 53×37"),
    (wrong_id, LABEL, "raw ids [21]"),
    (colors, LABEL, "mode RGB, expected one integer id per pixel"),
    (no_names, "ImageSets/Segmentation/{part}.txt", "lists no image"),
    (Path.unlink, "ImageSets/Segmentation/{part}.txt", "does not exist"),
]


def run(monkeypatch: pytest.MonkeyPatch, script: str, *flags: object) -> str:
    """The error message of a script."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
    errors = io.StringIO()
    with pytest.raises(SystemExit, match="1"), contextlib.redirect_stderr(errors):
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    text = errors.getvalue()
    return text[text.rindex(f"{script}: ") :]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint")


@pytest.mark.parametrize(("damage", "file", "problem"), DAMAGE)
@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_what_is_wrong_is_named_and_nothing_is_written(
    script: str,
    damage: Callable[[Path], None],
    file: str,
    problem: str,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    voc_tree(tmp_path / "voc")
    part = "train" if script == "train.py" else "val"
    path = tmp_path / "voc" / file.format(part=part)
    damage(path)
    before = sorted(tmp_path.rglob("*"))
    if script == "train.py":
        flags = ["--model.checkpoint", checkpoint, "--output_dir", tmp_path / "run", "--data.dataset", "voc2012"]
        flags += ["--data.root", tmp_path / "voc", "--training.evaluate_every", 0, "--training.tensorboard", "false"]
    else:
        flags = ["--model", checkpoint, "--output", tmp_path / "run" / "report.json", "--dataset", "voc2012"]
        flags += ["--root", tmp_path / "voc", "--part", "val", "--batch_size", 1]
    message = run(monkeypatch, script, *flags)
    assert message.startswith(f"{script}: ") and str(path) in message and problem in message
    assert sorted(tmp_path.rglob("*")) == before


def test_all_that_is_wrong_is_named_at_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    voc_tree(tmp_path)
    (tmp_path / "JPEGImages" / "2007_000000.jpg").unlink()
    cut(tmp_path / "JPEGImages" / "2007_000001.jpg")
    wrong_id(tmp_path / "SegmentationClass" / "2007_000003.png")
    flags = ["--model", checkpoint, "--dataset", "voc2012", "--root", tmp_path, "--part", "val"]
    message = run(monkeypatch, "evaluate.py", *flags)
    assert "3 problems found" in message
    assert all(name in message for name in ("2007_000000.jpg", "2007_000001.jpg", "2007_000003.png"))


@pytest.mark.slow
def test_two_processes_share_the_check_and_stop_together(checkpoint: Path, tmp_path: Path) -> None:
    voc_tree(tmp_path / "voc")
    cut(tmp_path / "voc" / "JPEGImages" / "2007_000003.jpg")  # in the share of the second process
    flags = ["--model", checkpoint, "--dataset", "voc2012", "--root", tmp_path / "voc", "--part", "val"]
    printed = launch("evaluate.py", *flags, "--output", tmp_path / "report.json", status=1)
    assert printed.count("2007_000003.jpg: the file cannot be decoded") == 2
    assert not (tmp_path / "report.json").exists()


def test_the_training_part_is_checked_and_so_is_validation(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    voc_tree(tmp_path / "voc")
    lists = tmp_path / "voc" / "ImageSets" / "Segmentation"
    (lists / "train.txt").write_text("2007_000000\n2007_000001\n")
    (lists / "val.txt").write_text("2007_000002\n")
    cut(tmp_path / "voc" / IMAGE)
    flags = ["--model.checkpoint", checkpoint, "--output_dir", tmp_path / "run", "--data.dataset", "voc2012"]
    flags += ["--data.root", tmp_path / "voc", "--training.evaluate_every", 5, "--training.batch_size", 2]
    message = run(monkeypatch, "train.py", *flags)
    assert str(tmp_path / "voc" / IMAGE) in message and not (tmp_path / "run").exists()


def test_a_report_is_whole_or_absent(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    voc_tree(tmp_path / "voc")
    flags = ["--model", checkpoint, "--dataset", "voc2012", "--root", tmp_path / "voc", "--part", "val"]
    report = tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags), "--output", str(report)])
    runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")
    assert json.loads(report.read_text())["images"] == 4
    before = report.read_bytes()
    wrong_size(tmp_path / "voc" / LABEL)
    assert "52×37" in run(monkeypatch, "evaluate.py", *flags, "--output", report)
    assert report.read_bytes() == before  # the report of the previous run
