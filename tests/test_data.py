# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Benchmarks in small trees with the original layout, their validation, and their samples."""

import io
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from zeroshot.data.benchmarks import load_benchmark
from zeroshot.data.dataset import SegmentationDataset, raise_for_problems, validate_dataset
from zeroshot.data.scenes import draw_scene
from zeroshot.data.splits import SPLITS_FOLDER, SegmentationSplit, load_split
from zeroshot.data.transforms import TrainTransform


def voc_palette():
    """The colours of the VOC development kit: the bits of the index, distributed over three channels."""
    colors = np.zeros((256, 3), np.uint8)
    for index in range(256):
        for bit in range(8):
            for channel in range(3):
                colors[index, channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
    return colors


def save_image(path, rng, size=(32, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def save_label(path, label, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(label)
    if palette is not None:
        picture.putpalette(palette.flatten().tolist())
    picture.save(path)


def draw_label(rng, raw_ids, dtype=np.uint8, size=(32, 48), void=255):
    """Blocks of raw ids, each with an unlabelled border."""
    label = rng.choice(raw_ids, (size[0] // 8, size[1] // 8)).astype(dtype).repeat(8, 0).repeat(8, 1)
    if void is not None:
        label[::8], label[:, ::8] = void, void
    return label


def expected_ids(label, file_name, key="raw_id_to_contiguous"):
    """The raw id map of the split file, applied pixel by pixel."""
    table = json.loads((SPLITS_FOLDER / file_name).read_text())[key]
    return np.array([[table[str(pixel)] for pixel in row] for row in label.tolist()])


def write_list(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def voc(tmp_path, rng):
    """A VOC 2012 tree: `val` has only VOC's labels, `trainaug` also some of SBD's."""
    root, labels = tmp_path / "VOCdevkit" / "VOC2012", {}
    for index, name in enumerate(["2007_000032", "2007_000033", "2008_000002", "2009_000001"]):
        labels[name] = draw_label(rng, range(21))
        save_image(root / "JPEGImages" / f"{name}.jpg", rng)
        if index < 2:
            save_label(root / "SegmentationClass" / f"{name}.png", labels[name], voc_palette())
        else:
            save_label(root / "SegmentationClassAug" / f"{name}.png", labels[name])  # SBD's are often plain grey
    write_list(root / "ImageSets" / "Segmentation" / "val.txt", list(labels)[:2])
    write_list(root / "ImageSets" / "Segmentation" / "trainaug.txt", list(labels)[1:])
    return root, labels


def samples(dataset, spec, training=False):
    return {sample["name"]: sample for sample in SegmentationDataset(dataset, spec, training=training)}


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_voc(voc):
    root, labels = voc
    spec = load_split("voc2012")
    for part, names in (("val", list(labels)[:2]), ("validation", list(labels)[:2]), ("trainaug", list(labels)[1:])):
        for given in (root, root.parent, root.parent.parent):
            dataset = load_benchmark("voc2012", part, given)
            assert dataset["name"] == names and dataset.column_names == ["image", "label", "name"]
        assert validate_dataset(dataset, spec) == []
        for name, sample in samples(dataset, spec).items():
            assert np.array_equal(sample["label"], expected_ids(labels[name], "pascal_voc_2012.json"))
            assert sample["label"].dtype == np.int64 and (sample["label"] == 255).any()
            assert sample["image"].shape == (32, 48, 3) and sample["image"].dtype == np.uint8
    assert dataset[0]["label"].mode in ("P", "L")


def test_voc_lists_of_paths_and_a_chosen_label_folder(voc):
    root, labels = voc
    names = list(labels)[2:]
    lines = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png" for name in names]
    write_list(root / "ImageSets" / "Segmentation" / "train_aug.txt", [*lines, ""])
    assert load_benchmark("voc2012", "train_aug", root)["name"] == names
    dataset = load_benchmark("voc2012", "train_aug", root, label_folder="SegmentationClass")
    assert {problem.message for problem in validate_dataset(dataset, load_split("voc2012"))} == {
        "the file does not exist"
    }


@pytest.mark.parametrize("images, label_root", [("", "stuffthingmaps"), ("images", "annotations")])
def test_coco_stuff(tmp_path, rng, images, label_root):
    spec, labels = load_split("coco_stuff"), {}
    for name in ("000000000139", "000000000285"):
        labels[name] = draw_label(rng, [i for i in spec.raw_id_to_class if i != 255])
        save_image(tmp_path / images / "val2017" / f"{name}.jpg", rng)
        save_label(tmp_path / label_root / "val2017" / f"{name}.png", labels[name])
        save_label(tmp_path / label_root / "val2017" / f"{name}_labelTrainIds.png", labels[name])  # of mmsegmentation
    dataset = load_benchmark("coco_stuff", "val", tmp_path)
    assert validate_dataset(dataset, spec) == []
    assert dataset["name"] == sorted(labels)
    for name, sample in samples(dataset, spec).items():
        assert np.array_equal(sample["label"], expected_ids(labels[name], "coco_stuff_164k.json"))


@pytest.mark.parametrize("name", ["pascal_context_59", "pascal_context_60"])
def test_pascal_context(tmp_path, rng, name):
    file_name = {59: "pascal_context_59.json", 60: "pascal_context_60_with_background.json"}[int(name[-2:])]
    raw459 = json.loads((SPLITS_FOLDER / file_name).read_text())["raw459_id_to_mmseg60"]
    usual = draw_label(rng, range(60))
    original = draw_label(rng, [int(raw) for raw in raw459], np.uint16, void=None)
    save_image(tmp_path / "VOC2010" / "JPEGImages" / "2008_000003.jpg", rng)
    save_label(tmp_path / "VOC2010" / "SegmentationClassContext" / "2008_000003.png", usual)
    save_label(tmp_path / "VOC2010" / "Context459" / "2008_000003.png", original)
    write_list(tmp_path / "VOC2010" / "ImageSets" / "SegmentationContext" / "val.txt", ["2008_000003"])

    (sample,) = samples(load_benchmark(name, "val", tmp_path), load_split(name)).values()
    assert np.array_equal(sample["label"], expected_ids(usual, file_name))
    dataset = load_benchmark(name, "val", tmp_path, label_folder="Context459")
    (sample,) = samples(dataset, load_split(name, context_459_ids=True)).values()
    assert np.array_equal(
        sample["label"], expected_ids(expected_ids(original, file_name, "raw459_id_to_mmseg60"), file_name)
    )
    (problem,) = validate_dataset(dataset, load_split(name))
    assert "Context459" in problem.file and 397 in problem.ids


def test_embedded_scenes():
    spec = load_split("embedded_scenes")
    dataset = load_benchmark("embedded_scenes", "val", num_scenes=3, seed=5)
    assert dataset["name"] == ["00000", "00001", "00002"] and validate_dataset(dataset, spec) == []
    for index, sample in enumerate(SegmentationDataset(dataset, spec, training=False)):
        scene = draw_scene(5, "validation", index)
        assert np.array_equal(sample["image"], scene.image) and np.array_equal(sample["label"], scene.label)
    with pytest.raises(ValueError, match="`split_part` is 'trainaug'; embedded_scenes has train, validation, test"):
        load_benchmark("embedded_scenes", "trainaug")


def own_split():
    classes = tuple(f"class {i}" for i in range(300))
    return SegmentationSplit("own", classes, ("class 1", "class 280"), 65535)


def own_rows(rng, folder):
    """An image and a 16-bit label map each, as bytes."""
    rows, labels = [], []
    for index in range(3):
        labels.append(draw_label(rng, range(300), np.uint16, void=65535))
        save_image(folder / f"street {index}.jpg", rng)
        save_label(folder / f"street {index}.png", labels[-1])
        image, label = ((folder / f"street {index}.{ending}") for ending in ("jpg", "png"))
        rows.append(
            {
                "photo": {"bytes": image.read_bytes(), "path": image.name},
                "annotation": {"bytes": label.read_bytes(), "path": label.name},
                "license": 1,
            }
        )
    return rows, labels


@pytest.mark.parametrize("form", ["parquet", "parquet without features", "imagefolder", "save_to_disk"])
def test_any_dataset(tmp_path, tmp_path_factory, monkeypatch, rng, form):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    rows, labels = own_rows(rng, tmp_path_factory.mktemp("files"))
    features = datasets.Features(
        {"photo": datasets.Image(), "annotation": datasets.Image(), "license": datasets.Value("int64")}
    )
    dataset = datasets.Dataset.from_list(rows, features=features)
    part, columns = "train", {"image_column": "photo", "label_column": "annotation"}
    if form == "parquet":
        (tmp_path / "data").mkdir()
        dataset.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    elif form == "parquet without features":
        import pyarrow
        import pyarrow.parquet

        plain = [{"photo": row["photo"]["bytes"], "annotation": row["annotation"]["bytes"]} for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(plain), tmp_path / "train.parquet")
    elif form == "imagefolder":
        lines = []
        for row in rows:
            for column in ("photo", "annotation"):
                (tmp_path / row[column]["path"]).write_bytes(row[column]["bytes"])
            line = {"image_file_name": row["photo"]["path"], "mask_file_name": row["annotation"]["path"]}
            lines.append(json.dumps(line))
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
        columns = {"label_column": "mask"}
    else:
        part = "test"
        datasets.DatasetDict({"test": dataset}).save_to_disk(tmp_path)

    opened = load_benchmark(str(tmp_path), part, **columns)
    assert opened.column_names == ["image", "label", "name"]
    by_name = samples(opened, own_split())
    named = "without" not in form
    assert sorted(by_name) == [f"street {i}" if named else f"{i:08d}" for i in range(3)]
    for (_, sample), label in zip(sorted(by_name.items()), labels, strict=True):
        assert np.array_equal(sample["label"], label)
    assert validate_dataset(opened, own_split()) == []


def test_what_cannot_be_opened_is_named(tmp_path, voc):
    root, _ = voc
    with pytest.raises(ValueError, match="`root` is missing"):
        load_benchmark("voc2012", "val")
    with pytest.raises(FileNotFoundError, match="nowhere.*not a folder"):
        load_benchmark("voc2012", "val", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"test\.txt does not exist.*\['trainaug', 'val'\]"):
        load_benchmark("voc2012", "test", root)
    with pytest.raises(FileNotFoundError, match="no folder Labels"):
        load_benchmark("voc2012", "val", root, label_folder="Labels")
    with pytest.raises(FileNotFoundError, match="val2017"):
        load_benchmark("coco_stuff", "val", root)
    write_list(root / "ImageSets" / "Segmentation" / "empty.txt", ["", " "])
    with pytest.raises(ValueError, match=r"empty\.txt lists no image"):
        load_benchmark("voc2012", "empty", root)
    for folder in ("images/train2017", "annotations/train2017"):
        (tmp_path / "coco" / folder).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"train2017 contains no \.jpg"):
        load_benchmark("coco_stuff", "train", tmp_path / "coco")
    with pytest.raises(ValueError, match="Cannot open the part 'train' of '.*nothing'"):
        load_benchmark(str(tmp_path / "nothing"), "train")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"image": [1], "text": ["a"]})}).save_to_disk(
        tmp_path / "d"
    )
    with pytest.raises(ValueError, match="has the parts train"):
        load_benchmark(str(tmp_path / "d"), "val")
    with pytest.raises(ValueError, match="no column 'label'; set `label_column` to one of image, text"):
        load_benchmark(str(tmp_path / "d"), "train")
    with pytest.raises(ValueError, match="does not contain images"):
        load_benchmark(str(tmp_path / "d"), "train", label_column="text")


# --- the check -------------------------------------------------------------------------------------------------------


def test_every_kind_of_damage_is_found_in_one_pass(tmp_path, rng):
    spec, root = load_split("coco_stuff"), tmp_path
    images, labels = root / "train2017", root / "stuffthingmaps" / "train2017"
    for name in (
        "colours",
        "cut image",
        "cut label",
        "fine",
        "no image",
        "no label",
        "not an image",
        "size",
        "unknown id",
    ):
        save_image(images / f"{name}.jpg", rng)
        save_label(labels / f"{name}.png", draw_label(rng, [0, 1, 2]))
    save_label(labels / "colours.png", rng.integers(0, 99, (32, 48, 3), dtype=np.uint8))
    for path in (images / "cut image.jpg", labels / "cut label.png"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (images / "no image.jpg").unlink()
    (labels / "no label.png").unlink()
    (images / "not an image.jpg").write_text("<html>404</html>")
    save_label(labels / "size.png", draw_label(rng, [0, 1], size=(32, 40)))
    save_label(labels / "unknown id.png", np.full((32, 48), 11, np.uint8))

    dataset = load_benchmark("coco_stuff", "train", root)
    problems = validate_dataset(dataset, spec, num_threads=2)
    expected = [
        (labels / "colours.png", "mode RGB"),
        (images / "cut image.jpg", "cannot be decoded"),
        (labels / "cut label.png", "cannot be decoded"),
        (images / "no image.jpg", "does not exist"),
        (labels / "no label.png", "does not exist"),
        (images / "not an image.jpg", "cannot be decoded"),
        (labels / "size.png", "40×32 pixels, its image 48×32"),
        (labels / "unknown id.png", "raw ids [11]"),
    ]
    assert [problem.file for problem in problems] == [str(file) for file, _ in expected]
    for problem, (_, message) in zip(problems, expected, strict=True):
        assert message in problem.message
    with pytest.raises(ValueError, match=r"(?s)8 problems found.*colours\.png: .*… and 6 more"):
        raise_for_problems(problems, limit=2)

    # Without validation, the sample raises the same error.
    unchecked = SegmentationDataset(dataset, spec, training=True)
    assert unchecked[3]["name"] == "fine"
    with pytest.raises(ValueError, match=r"size\.png: .*40×32"):
        unchecked[7]
    with pytest.raises(ValueError, match=r"colours\.png"):
        SegmentationDataset(dataset, spec, training=True, in_memory=True)


def test_check_of_embedded_files_names_the_row():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    row = {"image": {"bytes": buffer.getvalue(), "path": None}, "label": None, "name": "7"}
    features = {"image": datasets.Image(), "label": datasets.Image(), "name": datasets.Value("string")}
    dataset = datasets.Dataset.from_list([row], features=datasets.Features(features))
    assert [str(problem) for problem in validate_dataset(dataset, load_split("voc2012"))] == [
        "label of 7: the file is missing"
    ]
    assert [str(problem) for problem in validate_dataset(dataset.select([]), load_split("voc2012"))] == [
        "dataset: it is empty"
    ]
    raise_for_problems([])


# --- samples ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes():
    return load_benchmark("embedded_scenes", "train", num_scenes=6)


def equal(first, second):
    return all(
        np.array_equal(a["image"], b["image"]) and np.array_equal(a["label"], b["label"])
        for a, b in zip(first, second, strict=True)
    )


def test_training_samples_know_seen_classes_only(scenes):
    spec = load_split("embedded_scenes")
    plain, training = (SegmentationDataset(scenes, spec, training=flag) for flag in (False, True))
    for full, hidden in zip(plain, training, strict=True):
        assert hidden["label"].dtype == full["label"].dtype == np.int64
        assert np.array_equal(hidden["label"], spec.hide_unseen(full["label"]))
        assert set(np.unique(hidden["label"])) <= {*range(len(spec.seen)), 255}


def test_the_transform_of_a_training_sees_training_ids_only(scenes):
    spec, seen_by_transform = load_split("embedded_scenes"), []

    def transform(image, label, generator):
        seen_by_transform.append(label)
        return image, label

    hidden = [sample["label"] for sample in SegmentationDataset(scenes, spec, training=True)]
    list(SegmentationDataset(scenes, spec, transform, training=True))
    assert all(np.array_equal(*pair) for pair in zip(seen_by_transform, hidden, strict=True))


def test_relabelled_unseen_pixels_leave_every_training_sample_as_it_is(scenes, rng):
    spec = load_split("embedded_scenes")

    def relabel(row):
        label = np.array(row["label"])
        unseen_pixels = np.isin(label, spec.unseen_ids)
        label[unseen_pixels] = rng.choice(spec.unseen_ids, unseen_pixels.sum())
        return {"label": Image.fromarray(label)}

    transform = TrainTransform(crop_size=64)
    relabelled = datasets.Dataset.from_list([row | relabel(row) for row in scenes], features=scenes.features)
    before, after = (SegmentationDataset(data, spec, transform, training=True) for data in (scenes, relabelled))
    assert equal(before, after)
    plain = (SegmentationDataset(data, spec, training=False) for data in (scenes, relabelled))
    assert not equal(*plain)


@pytest.mark.parametrize("in_memory", [False, True])
def test_samples_depend_on_seed_epoch_and_index_only(scenes, in_memory):
    spec, transform = load_split("embedded_scenes"), TrainTransform(crop_size=48)

    def build(seed=0):
        return SegmentationDataset(scenes, spec, transform, training=True, seed=seed, in_memory=in_memory)

    dataset = build()
    first = list(dataset)
    torch.manual_seed(1)
    np.random.seed(1)
    assert equal(first, [dataset[i] for i in (0, 1, 2, 3, 4, 5)])
    assert equal(first[::-1], [dataset[i] for i in (5, 4, 3, 2, 1, 0)])
    dataset.set_epoch(1)
    second = list(dataset)
    assert not equal(first, second) and not equal(first, list(build(seed=1)))
    resumed = build()
    resumed.set_epoch(1)
    assert equal(second[3:], [resumed[i] for i in (3, 4, 5)])


@pytest.mark.parametrize("in_memory", [False, True])
def test_repeated_epochs(scenes, in_memory):
    spec, transform = load_split("embedded_scenes"), TrainTransform(crop_size=48)
    options = {"training": True, "in_memory": in_memory}
    repeated = SegmentationDataset(scenes, spec, transform, repeated_epochs=2, **options)
    fresh = SegmentationDataset(scenes, spec, transform, **options)
    for epoch in range(5):
        repeated.set_epoch(epoch)
        fresh.set_epoch(epoch % 2)
        assert equal(list(repeated), list(fresh))
        assert {sample["epoch"] for sample in repeated} == {epoch % 2}


def test_lasting_loader_processes_see_the_epoch_change(scenes):
    dataset = SegmentationDataset(
        scenes, load_split("embedded_scenes"), TrainTransform(crop_size=48), training=True, in_memory=True
    )
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=1, persistent_workers=True, collate_fn=lambda s: s
    )
    epochs = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        epochs.append(list(loader))
    assert equal(epochs[0], epochs[2]) and not equal(epochs[0], epochs[1])
