# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Bulk prediction: every image exactly once, for any number of processes and after kills."""

from __future__ import annotations

import io
import json
import re
import runpy
import shutil
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from subprocess import DEVNULL, Popen

import datasets
import numpy as np
import psutil
import pytest
import tiny
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_processes import ENVIRONMENT, PRESET, launch

from modeling_alignzeg import AlignZegModel, AlignZegProcessor
from zeroshot.evaluation import bulk, predictor
from zeroshot.evaluation.bulk import BulkSettings, _shards
from zeroshot.evaluation.shards import picture_names


BROKEN = 5  # position of a file that is not an image
IMAGES = 23


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint", seed=4)


def contents(index: int) -> bytes:
    """A random image of its own size as a PNG file; one file is truncated."""
    buffer = io.BytesIO()
    tiny.picture(index, (30 + 7 * (index % 4), 44 - 5 * (index % 3))).save(buffer, "PNG")
    return buffer.getvalue()[: 60 if index == BROKEN else None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of image files."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(IMAGES):
        (folder / f"photo {index:02d}.png").write_bytes(contents(index))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The same images in three parquet files, of 9, 9 and 5 rows."""
    folder = tmp_path_factory.mktemp("parquet")
    features = datasets.Features({"picture": datasets.Image(), "id": datasets.Value("int64")})
    for number, start in enumerate((0, 9, 18)):
        rows = [
            {"picture": {"bytes": contents(index), "path": f"photo {index:02d}.png"}, "id": index}
            for index in range(start, min(start + 9, IMAGES))
        ]
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"train-{number:05d}-of-00003.parquet")
    return folder


def predict(monkeypatch: pytest.MonkeyPatch, *flags: object) -> int:
    """Runs the script in this process and returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "predict.py"), run_name="__main__")
    return stop.value.code


def read(output: Path) -> list[dict]:
    """All rows of all parquet shards, in the order of the dataset."""
    paths = sorted(str(path) for path in output.glob("part-*.parquet"))
    return list(datasets.Dataset.from_parquet(paths, cache_dir=str(output / "cache")).with_format(None))


def assert_rows_equal(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second)
    for one, two in zip(first, second):
        assert np.array_equal(*(np.asarray(row["label_map"]) for row in (one, two)))
        assert one["unseen_score"] == pytest.approx(two["unseen_score"], abs=1e-6)  # batches differ in rounding
        assert (one["error"] is None) == (two["error"] is None)  # the message contains the path
        apart = dict.fromkeys(("label_map", "index", "unseen_score", "error"))
        assert one | apart == two | apart


@pytest.fixture(scope="module")
def whole(checkpoint: Path, folder: Path, tmp_path_factory) -> Path:
    """An uninterrupted run of one process, one image at a time."""
    output = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        flags = ["--model", checkpoint, "--dataset", folder, "--output_dir", output, "--shard_size", 4]
        assert predict(patch, *flags, "--batch_size", 1) == 1  # one image is broken
    return output


# --- results


def test_rows_say_what_a_plain_prediction_says(checkpoint: Path, folder: Path, whole: Path, capsys) -> None:
    model, processor = AlignZegModel.from_pretrained(checkpoint).eval(), AlignZegProcessor.from_pretrained(checkpoint)
    rows = read(whole)
    assert [row["index"] for row in rows] == list(range(IMAGES))
    assert len(list(whole.glob("part-*"))) == -(-IMAGES // 4)
    for index, row in enumerate(rows):
        assert row["name"] == f"photo {index:02d}"
        if index == BROKEN:
            assert row["label_map"] is None and f"photo {index:02d}.png" in row["error"]
            continue
        image = Image.open(folder / f"photo {index:02d}.png")
        with torch.no_grad():
            outputs = model(**processor(images=image, return_tensors="pt"))
        size = (image.height, image.width)
        (label,), (unseen,) = processor.post_process_semantic_segmentation(
            outputs, target_sizes=[size], return_unseen_scores=True
        )
        assert row["error"] is None and (row["height"], row["width"]) == size
        assert row["label_map"].mode == "P" and np.array_equal(np.asarray(row["label_map"]), label.numpy())
        shares = [(label == number).double().mean().item() for number in range(len(tiny.CLASSES))]
        assert row["class_ids"] == [number for number, share in enumerate(shares) if share]
        assert row["coverage"] == pytest.approx([share for share in shares if share])
        assert row["unseen_score"] == pytest.approx(unseen.mean().item(), abs=1e-6)
    run = json.loads((whole / "run.json").read_text())
    assert run["classes"] == list(tiny.CLASSES) and run["unseen"] == list(tiny.UNSEEN) and run["images"] == IMAGES


def test_batches_and_streams_change_nothing(checkpoint, files, whole, monkeypatch, tmp_path) -> None:
    flags = ["--model", checkpoint, "--dataset", files, "--image_column", "picture", "--batch_size", 3]
    assert predict(monkeypatch, *flags, "--output_dir", tmp_path / "a", "--streaming", "--shard_size", 4) == 1
    names = sorted(path.name for path in (tmp_path / "a").glob("part-*"))
    assert names == [f"part-{file:05d}-{n:08d}.parquet" for file, parts in enumerate((3, 3, 2)) for n in range(parts)]
    assert_rows_equal(read(tmp_path / "a"), read(whole))
    assert predict(monkeypatch, *flags, "--output_dir", tmp_path / "b", "--limit", 5) == 0
    assert_rows_equal(read(tmp_path / "b"), read(whole)[:5])


def test_folders_of_pictures(checkpoint, folder, whole, monkeypatch, tmp_path) -> None:
    flags = ["--model", checkpoint, "--dataset", folder, "--output_dir", tmp_path, "--output_format", "png"]
    for _ in range(2):  # the second run has nothing to do, but still reports the broken image
        assert predict(monkeypatch, *flags, "--shard_size", 10) == 1
    lines = [json.loads(line) for path in sorted(tmp_path.glob("part-*/*.jsonl")) for line in path.open()]
    assert len(lines) == IMAGES
    for number, (line, row) in enumerate(zip(lines, read(whole))):
        assert line["name"] == row["name"] and line["coverage"] == pytest.approx(row["coverage"] or None)
        if number != BROKEN:
            picture = Image.open(tmp_path / f"part-00000-{number // 10:08d}" / line["label_map"])
            assert np.array_equal(np.asarray(picture), np.asarray(row["label_map"]))
    found = sorted(path.stem for path in tmp_path.glob("part-*/*.png"))
    assert found == [f"photo {index:02d}" for index in range(IMAGES) if index != BROKEN]


def test_pictures_of_one_name_are_kept_apart() -> None:
    def names(*given: str) -> list[str]:
        return picture_names([{"name": name, "index": 7 + index} for index, name in enumerate(given)])

    assert names("a", "b") == ["a.png", "b.png"]
    assert names("a", "b", "A") == ["000000007_a.png", "b.png", "000000009_A.png"]
    assert names("x/a", "é" * 150) == ["x_a.png", f"{'é' * 100}.png"]
    assert len(set(names("n" * 300, "n" * 299))) == 2


def test_many_classes_and_none_of_these(checkpoint, folder, monkeypatch, tmp_path) -> None:
    classes = ", ".join(f"thing {number}" for number in range(300))
    flags = ["--model", checkpoint, "--dataset", folder, "--classes", classes, "--output_dir", tmp_path]
    assert predict(monkeypatch, *flags, "--limit", 2, "--none_of_these") == 0
    for row in read(tmp_path):
        label = np.asarray(row["label_map"])
        assert row["label_map"].mode == "I;16" and set(np.unique(label)) <= {*range(300), 65535}
        assert sum(row["coverage"]) == pytest.approx((label != 65535).mean())


# --- interruption


def test_a_run_goes_on_where_it_was(checkpoint, folder, whole, monkeypatch, tmp_path) -> None:
    flags = ["--model", checkpoint, "--dataset", folder, "--output_dir", tmp_path, "--shard_size", 4]
    (tmp_path / ".part-00000-00000002.partial.parquet").write_bytes(b"half")  # as after a kill
    calls = count()

    def fail(*arguments):
        if next(calls) == 3:
            raise OSError("the power went out")
        return write(*arguments)

    write = bulk.write_shard
    with monkeypatch.context() as patch:
        patch.setattr(bulk, "write_shard", fail)
        assert predict(patch, *flags) == 2
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("part-*")}
    assert len(before) == 3
    assert predict(monkeypatch, *flags, "--batch_size", 5) == 1
    assert all(path.stat().st_mtime_ns == moment for path, moment in before.items())  # finished: not touched again
    assert_rows_equal(read(tmp_path), read(whole))
    assert not list(tmp_path.glob(".*"))


def test_a_disk_that_fails_for_a_while_breaks_no_image(checkpoint, folder, whole, monkeypatch, tmp_path) -> None:
    """A shard with results of an outage would be finished, and a later run would skip it."""
    flags = ["--model", checkpoint, "--dataset", folder, "--output_dir", tmp_path, "--shard_size", 4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor, "_open_row", lambda *_: (_ for _ in ()).throw(OSError(116, "Stale file handle")))
        assert predict(patch, *flags) == 2
    assert not list(tmp_path.glob("part-*"))
    assert predict(monkeypatch, *flags) == 1  # one image is broken
    assert_rows_equal(read(tmp_path), read(whole))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--shard_size", 5], "`shard_size` was 4 and is 5"),
        (["--classes", "cat, dog"], "`classes` was"),
        (["--gamma", 0.5], "`gamma` was 1.0 and is 0.5"),
        (["--limit", 3], "`limit` was None and is 3"),
        (["--output_format", "png"], "`output_format`"),
        (["--model", "other"], "`weights_sha256`"),
        (["--model", "processor"], "`image_processor`"),
    ],
)
def test_results_of_two_runs_are_not_mixed(checkpoint, folder, whole, monkeypatch, tmp_path, capsys, change, words):
    if "other" in change:
        change = ["--model", tiny.tiny_checkpoint(tmp_path / "other", seed=5)]
    if "processor" in change:
        change = ["--model", shutil.copytree(checkpoint, tmp_path / "processor")]
        file = tmp_path / "processor" / "processor_config.json"
        values = json.loads(file.read_text())
        values["image_processor"]["correction_on_scores"] = True
        file.write_text(json.dumps(values))
    before = sorted(whole.glob("*"))
    flags = ["--model", checkpoint, "--dataset", folder, "--output_dir", whole, "--shard_size", 4, *change]
    assert predict(monkeypatch, *flags) == 2
    printed = capsys.readouterr().err
    assert "contains results of another run" in printed and words in printed and "--output_dir" in printed
    assert sorted(whole.glob("*")) == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset", "FOLDER/nowhere"], "Cannot open the part 'train' of '"),
        (["--dataset", "FOLDER", "--image_column", "photo"], "has no column 'photo'"),
        (["--dataset", "FOLDER", "--image_column", "photo", "--streaming"], "has no column 'photo'"),
        (["--dataset", "FILES", "--image_column", "id"], "'id' of '.*' does not contain images"),
        (["--dataset", "FILES", "--image_column", "id", "--streaming"], "'id' of '.*' does not contain images"),
        (["--dataset", "FOLDER", "--part", "test"], "part 'test'"),
        (["--dataset", "FOLDER", "--device", "cpu"], "`--device`"),
        (["--dataset", "FOLDER", "--shard_size", 0], "--shard_size: expected a whole number"),
        (["--dataset", "FOLDER", "--gamma", "nan"], "`gamma` is nan; expected a number ≥ 0"),
        (["--dataset", "voc2012", "--streaming"], "`streaming`"),
        (["FOLDER", "--dataset", "FOLDER"], "give images or folders, or --dataset"),
        ([], "give images or folders, or --dataset"),
    ],
)
def test_what_cannot_be_is_named(checkpoint, folder, files, monkeypatch, tmp_path, capsys, flags, words) -> None:
    flags = [str(flag).replace("FOLDER", str(folder)).replace("FILES", str(files)) for flag in flags]
    assert predict(monkeypatch, *flags, "--model", checkpoint, "--output_dir", tmp_path / "out") == 2
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


# --- who does what


def stream_of(lengths: list[int]) -> datasets.IterableDataset:
    """Files with `lengths` rows each."""

    def rows(files):
        for file, length in files:
            for row in range(length):
                yield {"file": file, "row": row}

    return datasets.IterableDataset.from_generator(rows, gen_kwargs={"files": list(enumerate(lengths))})


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_image_of_a_stream_is_predicted_once(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=4))
    size = data.draw(st.integers(1, 4))
    stream, options = stream_of(lengths), BulkSettings("x", streaming=True, shard_size=size)
    expected = {(file, row) for file, length in enumerate(lengths) for row in range(length)}
    done: dict[str, list] = {}
    with tempfile.TemporaryDirectory() as folder:
        # Two interrupted launches, on any number of processes, and a complete one.
        for last in (False, False, True):
            world = data.draw(st.integers(1, 5))
            for rank in range(world):
                budget = 99 if last else data.draw(st.integers(0, 3))
                seen = 0
                for shard, rows in _shards(stream, options, Path(folder), rank, world):
                    assert (rows is None) == (shard.name in done)
                    seen += rows is None
                    if rows is not None:
                        if budget == 0:
                            break
                        budget -= 1
                        found = [(row["file"], row["row"]) for _, row in rows]
                        assert [index for index, _ in zip(count(shard.number * size), found)] == [
                            row for _, row in found
                        ]
                        done[shard.name] = found
                        (Path(folder) / f"{shard.name}.parquet").touch()
        assert sorted(sum(done.values(), [])) == sorted(expected)


# --- two processes


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_two_processes_killed_in_the_middle(checkpoint, folder, files, whole, tmp_path, streaming) -> None:
    data = ["--dataset", files, "--image_column", "picture", "--streaming"] if streaming else ["--dataset", folder]
    flags = [*data, "--model", checkpoint, "--output_dir", tmp_path, "--shard_size", 1, "--batch_size", 1]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        PRESET,
        ROOT / "scripts/predict.py",
    ]
    launcher = Popen([*map(str, command + flags)], env=ENVIRONMENT, stdout=DEVNULL, stderr=DEVNULL)
    deadline = time.time() + 300
    while len(list(tmp_path.glob("part-*"))) < 4 and time.time() < deadline and launcher.poll() is None:
        time.sleep(0.002)
    for process in [*psutil.Process(launcher.pid).children(recursive=True), psutil.Process(launcher.pid)]:
        process.kill()
    launcher.wait()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("part-*")}
    assert 4 <= len(before) < IMAGES
    printed = launch("predict.py", *flags, status=1)
    assert f"{IMAGES - 1} of {IMAGES} images segmented" in printed
    assert all(path.stat().st_mtime_ns == moment for path, moment in before.items())
    assert_rows_equal(read(tmp_path), read(whole))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["whole", "stream"])
def test_label_maps_beside_the_images_are_not_segmented(
    streaming: list[str], checkpoint, monkeypatch, tmp_path
) -> None:
    for kind in ("images", "labels"):
        (tmp_path / "data" / "val" / kind).mkdir(parents=True)
        for index in range(3):
            tiny.picture(index, (30, 44)).convert("RGB" if kind == "images" else "L").save(
                tmp_path / "data" / "val" / kind / f"v{index}.png"
            )
    flags = ("--model", checkpoint, "--dataset", tmp_path / "data", "--part", "val", "--classes", "cat, sofa")
    assert predict(monkeypatch, *flags, "--output_dir", tmp_path / "out", *streaming) == 0
    rows = read(tmp_path / "out")
    assert [row["name"] for row in rows] == ["v0", "v1", "v2"] and all(row["error"] is None for row in rows)
