# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""scripts/pack_photos.py on small trees in the layout of the public originals."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from zeroshot.data.photo_files import pack_caltech101, pack_coco, pack_imagenet_samples, pack_msrc
from zeroshot.data.photos import load_photos
from zeroshot.lit.features import select_named
from zeroshot.lit.photos import open_label, open_photo, read_photos


GRASS, SKY = (0, 128, 0), (128, 128, 128)  # MSRC's colours
CATEGORIES = [{"id": 1, "name": "person"}, {"id": 200, "name": "rug-merged"}]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def test_msrc(tmp_path: Path, rng: np.random.Generator) -> None:
    photos = {f"1_{number}_s": rng.integers(0, 256, (6, 8, 3)) for number in range(10, 22)}
    truth = np.zeros((6, 8, 3), int)  # the first column stays void
    truth[:, 1:4], truth[:, 4:] = GRASS, SKY
    for name, photo in photos.items():
        save(tmp_path / "msrc" / "Images" / f"{name}.bmp", photo)
        save(tmp_path / "msrc" / "GroundTruth" / f"{name}_GT.bmp", truth)
    files = list(pack_msrc(tmp_path / "msrc", tmp_path / "photos"))
    assert sorted(path.name for path in files) == [f"msrc_{part}.parquet" for part in ("test", "train", "validation")]
    for part, numbers in {"train": (0, 2, 4, 6, 8, 10), "validation": (3,), "test": (1, 5, 7, 9, 11)}.items():
        rows = read_photos(tmp_path / "photos", f"msrc_{part}")
        assert [row["name"] for row in rows] == [f"1_{10 + number}_s" for number in numbers]
        for row in rows:
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(row["image"]))), photos[row["name"]])
            assert np.array_equal(open_label(row["label"])[0], [0, 2, 2, 2, 7, 7, 7, 7])  # void, grass, sky
        assert load_photos("msrc", part, tmp_path / "photos")["name"] == [row["name"] for row in rows]
    with pytest.raises(FileNotFoundError, match="no folder Images"):
        list(pack_msrc(tmp_path, tmp_path / "others"))


def test_coco(tmp_path: Path, rng: np.random.Generator) -> None:
    """The first hundred photographs by name, in whatever order the JSON file lists them."""
    labels = {}
    for part in ("train", "val"):
        images, annotations = [], []
        for key in rng.permutation(np.arange(1, 103)).tolist():
            labels[part, key] = rng.choice([255, 1, 200], (4, 5))  # unlabelled, person, rug-merged
            name = f"{key:012d}"
            save(tmp_path / f"{part}2017" / f"{name}.jpg", np.full((4, 5, 3), key))
            codes = np.where(labels[part, key] == 1, 256 * key, np.where(labels[part, key] == 200, 7, 0))
            png = np.stack([codes % 256, codes // 256 % 256, codes // 65536], -1)
            save(tmp_path / "annotations" / f"panoptic_{part}2017" / f"{name}.png", png)
            images.append({"id": key, "file_name": f"{name}.jpg", "height": 4, "width": 5})
            segments = [{"id": 256 * key, "category_id": 1}, {"id": 7, "category_id": 200}]
            annotations.append({"image_id": key, "file_name": f"{name}.png", "segments_info": segments})
        content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        (tmp_path / "annotations" / f"panoptic_{part}2017.json").write_text(json.dumps(content))
    list(pack_coco(tmp_path, tmp_path / "photos"))
    for ours, part in (("train", "train"), ("test", "val")):
        rows = read_photos(tmp_path / "photos", f"coco_panoptic_{ours}")
        assert [row["name"] for row in rows] == [f"{key:012d}" for key in range(1, 101)]
        for row in rows:
            assert np.array_equal(open_label(row["label"]), labels[part, int(row["name"])])
            assert row["image"] == (tmp_path / f"{part}2017" / f"{row['name']}.jpg").read_bytes()
    with pytest.raises(FileNotFoundError, match=r"panoptic_train2017\.json does not exist"):
        list(pack_coco(tmp_path / "photos", tmp_path / "others"))


def test_named(tmp_path: Path, rng: np.random.Generator) -> None:
    for name in ("n01440764_tench", "n01484850_great_white_shark"):
        save(tmp_path / "samples" / f"{name}.jpeg", rng.integers(0, 256, (300, 448, 3)))
    for name, count in {"BACKGROUND_Google": 1, "Faces_easy": 3, "ant": 2}.items():
        for number in range(1, count + 1):
            path = tmp_path / "caltech" / name / f"image_{number:04d}.jpg"
            save(path, rng.integers(0, 256, (40, 30, 3)))
    (tmp_path / "samples" / "README.md").write_text("not a photograph")
    list(pack_imagenet_samples(tmp_path / "samples", tmp_path / "photos"))
    list(pack_caltech101(tmp_path / "caltech", tmp_path / "photos"))
    rows = read_photos(tmp_path / "photos", "named_imagenet_samples")
    assert [row["name"] for row in rows] == ["tench", "great white shark"]
    assert Image.open(io.BytesIO(rows[0]["image"])).size == (335, 224)  # 448 x 300 with a short side of 224
    rows = read_photos(tmp_path / "photos", "named_caltech101")
    assert [row["name"] for row in rows] == ["Faces easy"] * 3 + ["ant"] * 2
    assert select_named(rows, 2) == [0, 1, 3, 4] and rows[0]["source"] == "caltech101/Faces_easy/image_0001"
    assert open_photo(rows[0]["image"], 64).shape == (3, 96, 64)
    assert pq.read_schema(tmp_path / "photos" / "named_caltech101.parquet").names == ["name", "image", "source"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="No photograph was found"):
        list(pack_caltech101(tmp_path / "empty", tmp_path / "photos"))
    assert len(list((tmp_path / "photos").iterdir())) == 2
