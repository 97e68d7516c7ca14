# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The scripts as users run them: train, resume, evaluate and predict, with a tiny model and a few synthetic scenes."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file

from modeling_alignzeg import AlignZegConfig
from zeroshot.cli import run_command
from zeroshot.evaluation.pictures import find_images, output_stems
from zeroshot.settings import load_settings
from zeroshot.towers import layers_of_vit
from zeroshot.training.checkpoint_store import CheckpointError


ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
TRAINING = {
    "data.num_train": 12,
    "data.num_validation": 4,
    "data.transform": "{crop_size: 64, scale_range: [0.5, 1.0]}",
    "data.validate": True,
    "training.steps": 6,
    "training.batch_size": 2,
    "training.gradient_accumulation_steps": 2,
    "training.warmup_steps": 2,
    "training.log_every": 1,
    "training.evaluate_every": 3,
    "training.save_every": 2,
    "training.tensorboard": False,
}


def script(name: str, *arguments: str, status: int | None = 0) -> subprocess.CompletedProcess:
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    if status is not None:
        assert result.returncode == status, result.stdout[-2000:] + result.stderr[-4000:]
    return result


def training_flags(checkpoint: Path, output: Path, **changes) -> list[str]:
    values = {**TRAINING, "model.checkpoint": checkpoint, "output_dir": output, **changes}
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """An uninterrupted training of six steps."""
    folder = tmp_path_factory.mktemp("run")
    checkpoint = tiny.tiny_checkpoint(folder / "start")
    script("train.py", *training_flags(checkpoint, folder / "whole"))
    return folder


def test_training_writes_a_checkpoint_with_the_whole_vocabulary(run: Path):
    config = json.loads((run / "whole" / "final" / "config.json").read_text())
    assert len(config["id2label"]) == 70 and len(config["unseen_labels"]) == 18
    tensors = load_file(run / "whole" / "final" / "model.safetensors")
    assert tensors["class_text_embeds"].shape[0] == 70
    names = {json.loads(line)["step"] for line in (run / "whole" / "metrics.jsonl").read_text().splitlines()}
    assert names == set(range(1, 7))


def test_training_changes_the_side_network_and_leaves_clip_alone(run: Path):
    before = load_file(run / "start" / "model.safetensors")
    after = load_file(run / "whole" / "final" / "model.safetensors")
    frozen = ("recognizer.vision_model", "recognizer.visual_projection", "text_encoder", "logit_scale")
    for name, value in before.items():
        if name.startswith(frozen):
            assert torch.equal(value, after[name]), name
    assert not torch.equal(before["side_network.query_embeddings"], after["side_network.query_embeddings"])


def test_a_killed_training_resumes_to_the_same_weights(run: Path):
    output = run / "killed"
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *training_flags(run / "start", output)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 240
    while (
        not (output / "checkpoints" / "step-00000002").exists() and time.time() < deadline and process.poll() is None
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (output / "checkpoints" / "step-00000002").exists()
    script("train.py", *training_flags(run / "start", output))
    whole = load_file(run / "whole" / "final" / "model.safetensors")
    resumed = load_file(output / "final" / "model.safetensors")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_relabelling_unseen_pixels_changes_no_loss(run: Path, tmp_path: Path):
    """Relabelling unseen pixels with other unseen ids does not change the losses of any step."""
    from zeroshot.data.scenes import CLASSES, scenes_dataset
    from zeroshot.data.splits import load_split

    split = load_split("embedded_scenes")
    turned = dict(zip(split.unseen_ids, split.unseen_ids[1:] + split.unseen_ids[:1]))
    table = np.array([turned.get(i, i) for i in range(256)], np.uint8)
    rows = scenes_dataset("train", 12)
    (tmp_path / "split.yaml").write_text(json.dumps({"classes": list(CLASSES), "unseen": list(split.unseen)}))
    losses = []
    for name, change in (("as they are", False), ("turned", True)):

        def relabel(row, change=change):
            return {"label": Image.fromarray(table[np.asarray(row["label"])])} if change else row

        folder = tmp_path / name.replace(" ", "_")
        rows.map(relabel, features=rows.features).save_to_disk(folder / "data")
        changes = {
            "data.dataset": folder / "data",
            "data.split": tmp_path / "split.yaml",
            "training.evaluate_every": 0,
        }
        script("train.py", *training_flags(run / "start", folder / "out", **changes))
        lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["train/loss"] for line in lines])
    assert losses[0] == losses[1] and len(losses[0]) == 6


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--training.step", "3"], "training.step"),
        (["--training.steps", "many"], "training.steps"),
        (["--config", "no_such.yaml"], "no_such.yaml"),
        (["--model.config", "{num_querys: 3}", "--model.clip", "nothing-here"], "nothing-here"),
        ([], "model.clip"),
    ],
)
def test_wrong_settings_are_named(flags: list[str], words: str, tmp_path: Path):
    result = script("train.py", *flags, "--output_dir", tmp_path / "out", "--data.num_train", "2", status=1)
    assert words in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_evaluation_report(run: Path, tmp_path: Path):
    report = tmp_path / "report.json"
    script("evaluate.py", "--model", run / "whole" / "final", "--limit", 5, "--segments", "--output", report)
    values = json.loads(report.read_text())
    assert values["images"] == 5 and len(values["per_class"]) == 70
    assert 0 <= values["hiou"] <= 100 and values["protocol"]["template_set"] == "single"
    assert 0 <= values["segments"]["panoptic"]["all"]["pq"] <= 100
    assert 0 <= values["segments"]["instances"]["class_agnostic"]["ap50"] <= 100


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """One image of every kind, and one broken file."""
    folder = tmp_path_factory.mktemp("photos")
    scene = tiny.picture(0, (60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    scene.save(folder / "turned.jpg", exif=exif)
    scene.convert("RGBA").save(folder / "alpha.png")
    scene.convert("L").save(folder / "grey.png")
    scene.convert("P").save(folder / "palette.png")
    Image.fromarray(np.asarray(scene.convert("L"), np.uint16) * 257).save(folder / "sixteen.png")
    (folder / "broken.png").write_bytes((folder / "grey.png").read_bytes()[:60])
    return folder


def test_files_that_share_a_picture_keep_their_whole_name():
    def stems(*names: str, **options: tuple[str, ...]) -> list[str]:
        return [stem.as_posix() for stem in output_stems(list(map(Path, names)), **options)]

    names = ("a.jpg", "a.png", "b.jpg", "c.png", "c_overlay.png")
    assert stems(*names) == ["a.jpg", "a.png", "b", "c.png", "c_overlay.png"]
    assert stems(*names, endings=("",)) == ["a.jpg", "a.png", "b", "c", "c_overlay"]
    assert stems("x/a.jpg", "y/a.png", "x/d.1.jpg") == ["x/a", "y/a", "x/d.1"]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images in folders and subfolders of the working directory, and other files."""
    for name in ("in/b.JPG", "in/a.png", "in/sub/a.png", "in/sub/deep/c.jpg", "other/a.png", "other/[1].png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        tiny.picture().save(tmp_path / name)
    for name in ("in/notes.txt", "in/.git/x.png", "in/out/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "bare").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["in"], ["a.png", "b.JPG", "sub/a.png", "sub/deep/c.jpg"]),
        (["in/sub", "in/b.JPG"], ["a.png", "deep/c.jpg", "b.JPG"]),
        (["in/*.png", "in"], ["a.png", "b.JPG", "sub/a.png", "sub/deep/c.jpg"]),
        (["in/**/*.jpg"], ["sub/deep/c.jpg"]),
        (["*/[ab].*"], ["in/a.png", "in/b.JPG", "other/a.png"]),
        (["other/[1].png"], ["[1].png"]),
        (["in/sub/deep/c.jpg", "./in/sub/../sub/deep/c.jpg"], ["c.jpg"]),
    ],
)
def test_files_folders_and_patterns_are_found_once(tree: Path, arguments: list[str], expected: list[str]) -> None:
    found = find_images(arguments, Path("in/out"))
    assert [place.as_posix() for _, place in found] == expected
    assert all(file.as_posix().endswith(place.as_posix()) and file.is_file() for file, place in found)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["in/nowhere.png"], "There is no file or folder in/nowhere.png"),
        (["in", "bare"], "The folder bare contains no image"),
        (["in/*.webp"], r"No image matches in/\*.webp"),
        (["in", "other"], "in/a.png and other/a.png would both be written as a.png"),
    ],
)
def test_arguments_without_images_and_places_for_two_are_named(tree: Path, arguments: list[str], words: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        find_images(arguments, Path("out"))


def test_labels_alone_keep_the_structure_of_folders(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("in/a.jpg", "in/a.png", "in/sub/a.png", "in/sub/b.png"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        tiny.picture(0, (60, 40)).save(place / name)
    command = ["predict.py", "in", "photo.png", "--model", "ck", "--output_dir", "in/out", "--labels_only"]
    for _ in range(2):  # the second run must not segment the results of the first
        assert run_here(monkeypatch, *command) == 0
    found = {path.relative_to(place / "in/out").as_posix() for path in (place / "in/out").rglob("*.*")}
    assert found == {"a.jpg.png", "a.png.png", "sub/a.png", "sub/b.png", "photo.png", "classes.json"}
    assert Image.open(place / "in/out/sub/b.png").size == (60, 40)


def test_large_images_get_small_pictures_and_whole_label_maps(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.picture(0, (90, 60)).save("photo.png")
    assert run_here(monkeypatch, *PREDICT, "small", "--picture_size", 30) == 0
    assert run_here(monkeypatch, *PREDICT, "whole", "--picture_size", 0) == 0
    for name, size in (("small", (30, 20)), ("whole", (90, 60))):
        assert Image.open(f"{name}/photo_unseen.png").size == size
        assert Image.open(f"{name}/photo.png").size == (90, 60)
    assert Path("small/photo.png").read_bytes() == Path("whole/photo.png").read_bytes()


def test_prediction_of_a_folder_skips_what_is_broken(run: Path, photos: Path, tmp_path: Path):
    flags = ["--model", run / "whole" / "final", "--classes", "blue dotted, brick, grass,", "--unseen", "brick"]
    result = script("predict.py", photos, *flags, "--output_dir", tmp_path, status=1)
    assert "broken.png" in result.stderr and "Traceback" not in result.stderr
    assert json.loads((tmp_path / "classes.json").read_text())["classes"] == ["blue dotted", "brick", "grass"]
    for name in ("turned", "alpha", "grey", "palette", "sixteen"):
        size = (40, 60) if name == "turned" else (60, 40)
        label = Image.open(tmp_path / f"{name}.png")
        assert label.size == size and label.mode == "P"
        assert set(np.unique(np.asarray(label))) <= {0, 1, 2}
        assert Image.open(tmp_path / f"{name}_unseen.png").size == size
        assert (tmp_path / f"{name}_overlay.png").exists()
    assert not list(tmp_path.glob("broken*"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--classes", "cat,,dog"], "empty"),
        (["--classes", "cat, dog, cat"], "cat"),
        (["--classes", "cat", "--unseen", "cow"], "cow"),
        (["--classes", " "], "empty"),
    ],
)
def test_wrong_class_names_are_named(run: Path, photos: Path, flags: list[str], words: str, tmp_path: Path):
    result = script("predict.py", photos, "--model", run / "start", *flags, "--output_dir", tmp_path / "out", status=2)
    assert words in result.stderr and "Traceback" not in result.stderr


# --- what is refused, before any work and without a trace


def run_here(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> int:
    """Runs the script in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a checkpoint and typical files of a user."""
    tiny.tiny_checkpoint(tmp_path / "ck")
    tiny.picture().save(tmp_path / "photo.png")
    for folder in ("folder", "foreign", "clone/.git", "other"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    (tmp_path / "clone" / "config.json").write_text('{"model_type": "alignzeg"}')
    (tmp_path / "other" / "classes.json").write_text('{"classes": ["cat"], "unseen": []}')
    (tmp_path / "other" / "run.json").write_text("[]")
    (tmp_path / "other" / "examples.json").write_text('[{"file": "../photo.png"}]')
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("[1]")
    monkeypatch.chdir(tmp_path)
    return tmp_path


FRESH = ["create_checkpoint.py", "--clip", "nowhere", "--vocabulary", "cat, dog", "--output_dir"]
SCENES = ["--dataset", "embedded_scenes", "--part", "test", "--limit", "1"]
PREDICT = ["predict.py", "photo.png", "--model", "ck", "--output_dir"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["predict.py", "photo.png", "--model", "ck", "--output_dir", "."], "photo.png would be replaced"),
        ([*PREDICT, "photo.png"], "photo.png is a file, not a folder"),
        ([*PREDICT, "new", "--gamma", "nan"], "`gamma` is nan; expected"),
        ([*PREDICT, "new", "--threshold", "7"], "`threshold` is 7.0; expected"),
        ([*PREDICT, "new", "--device", "foo"], "`--device` is 'foo', which cannot be used"),
        ([*PREDICT, "new", "--num_threads", "-3"], "expected a whole number ≥ 0, got '-3'"),
        ([*PREDICT, "other"], "classes.json belongs to results with other classes"),
        (
            ["predict.py", "photo.png", "--model", "nowhere", "--output_dir", "new"],
            "`--model` is 'nowhere', but there",
        ),
        (
            ["predict.py", "photo.png", "--model", "broken", "--output_dir", "new"],
            "`--model` is 'broken', which cannot",
        ),
        (["predict.py", *SCENES, "--model", "ck", "--output_dir", "other"], "run.json is damaged"),
        (["predict.py", "--dataset", "", "--model", "ck", "--output_dir", "new"], "empty name"),
        (["predict.py", "--dataset", ".", "--threshold", "nan", "--output_dir", "new"], "`threshold` is nan"),
        (["evaluate.py", "--output", "folder"], "folder is a folder, but"),
        (["evaluate.py", "--output", "photo.png/x.json"], "photo.png is a file, not"),
        (["evaluate.py", "--seen_penalty", "nan"], "`seen_penalty` is nan"),
        (["evaluate.py", "--segments", "--refine"], "`--segments` cannot be combined with `--refine`"),
        (["evaluate.py", "--segments", "--score_threshold", "2"], "`--score_threshold` is 2.0; expected"),
        (["evaluate.py", "--model", "nowhere"], "`--model` is 'nowhere'"),
        (["calibrate.py", "--folds", "0"], "`folds` is 0; expected a whole number ≥ 1"),
        (["calibrate.py", "--folds", "x"], "`folds` is 'x'; expected"),
        (["calibrate.py", "--models", "ck,nowhere"], "`--models` is 'nowhere'"),
        (["calibrate.py", "--checkpoint", "nowhere"], "`--checkpoint` is 'nowhere'"),
        (["calibrate.py", "--checkpoint", "ck", "--report_on", "nothing"], "'nothing'"),
        (["calibrate.py", "--output", "folder"], "folder is a folder"),
        (["train.py", "--model.checkpoint", "nowhere", "--data.num_train", "2"], "`model.checkpoint` is 'nowhere'"),
        (["train.py", "--model.clip", "ViT-B-61"], "neither an open_clip model name (close: ViT-B-16"),
        (
            ["train.py", "--model.clip", "ViT-B-16", "--model.pretrained", "x", "--model.random_weights", "true"],
            "`random_weights` is set, and `pretrained` is 'x'",
        ),
        (
            ["train.py", "--model.checkpoint", "ck", "--model.checkpoint_config", "{num_querys: 3}"],
            "`model.checkpoint_config` contains 'num_querys', which is not a field of AlignZegConfig; did you mean 'num_",
        ),
        (
            ["train.py", "--model.checkpoint", "ck", "--data.num_train", "2", "--training.batch_size", "3"],
            "The training part has 2 images, but one step needs 3",
        ),
        ([*FRESH, "new", "--vocabulary", "car, Car"], "'car', 'Car', which differ only in case"),
        (["train.py", "--data.transform", "{foo: 1}"], "`data.transform` has no option 'foo'"),
        ([*FRESH, "foreign"], "foreign contains 'thesis.txt', which is not part of an AlignZeg checkpoint"),
        ([*FRESH, "clone"], "clone contains '.git', which is not part of an AlignZeg checkpoint"),
        ([*FRESH, "new", "--config", "5"], "`--config` is 5; expected"),
        ([*FRESH, "new", "--config", "[1]"], r"`--config` is [1]; expected"),
        ([*FRESH, "new", "--config", "{: :"], "`--config` is not valid YAML"),
        ([*FRESH, "new", "--config", "empty.yaml"], "which has neither `model.config`"),
        ([*FRESH, "new", "--config", "folder"], "'folder', which is not a file"),
        ([*FRESH, "new", "--config", "photo.png"], "photo.png is not UTF-8 text"),
        (["draw_examples.py", "--scan", "0"], "expected a whole number ≥ 1, got '0'"),
        (["draw_examples.py", "--count", "-1"], "expected a whole number ≥ 1, got '-1'"),
        (["draw_examples.py", "--scan", "1", "--output_dir", "other"], "is not from this script"),
        (["draw_examples.py", "--model", "nowhere", "--output_dir", "new"], "`--model` is 'nowhere'"),
        (["draw_overview.py", "--scenes", "x"], "expected a whole number ≥ 0, got 'x'"),
        (["draw_overview.py", "--output", "o.xyz"], "`--output` is 'o.xyz'"),
        (["draw_overview.py", "--model", "nowhere", "--output", "o.png"], "`--model` is 'nowhere'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_named_and_changes_nothing(
    command: list[str], words: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before = {path: path.read_bytes() if path.is_file() else None for path in place.rglob("*")}
    assert run_here(monkeypatch, *command) in (1, 2)
    assert words in capsys.readouterr().err
    assert {path: path.read_bytes() if path.is_file() else None for path in place.rglob("*")} == before


def test_a_checkpoint_on_a_clip_of_any_depth_needs_no_config(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = ROOT / "scripts" / "assets" / "small_clip"
    command = ["create_checkpoint.py", "--clip", clip, "--vocabulary", "cat, dog", "--output_dir", place / "new"]
    assert run_here(monkeypatch, *command) == 0
    config = json.loads((place / "new" / "config.json").read_text())
    assert config["vision_config"]["num_hidden_layers"] == 5 and config["clip_split_layer"] == 3
    preset = load_settings(["--config", str(ROOT / "scripts" / "configs" / "base" / "vitl14.yaml")]).model.config
    assert layers_of_vit(24) == {name: preset[name] for name in ("clip_split_layer", "fusion_layers")}
    usual = AlignZegConfig()
    assert layers_of_vit(12) == {
        "clip_split_layer": usual.clip_split_layer,
        "fusion_layers": usual.fusion_layers,
    }
    for depth in range(2, 50):
        layers = layers_of_vit(depth)
        assert 1 <= layers["clip_split_layer"] < depth and max(layers["fusion_layers"]) < depth


def test_a_result_that_cannot_be_written_stops_no_other(place: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (place / "in").mkdir()
    (place / "out" / "a.png").mkdir(parents=True)
    for name in ("a", "b", "n" * 250):
        tiny.picture().save(place / "in" / f"{name}.png")
    assert run_here(monkeypatch, "predict.py", "in", "--model", "ck", "--output_dir", "out") == 1
    found = {path.name for path in (place / "out").iterdir() if len(path.name) < 200}
    assert found == {"a.png", "b.png", "b_overlay.png", "b_unseen.png", "classes.json"}
    assert "a.png is a folder" in capsys.readouterr().err


def test_examples_replace_those_of_an_earlier_index_only(tmp_path: Path) -> None:
    from zeroshot.evaluation.examples import draw_examples

    draw_examples(tmp_path, count=2, scan=12)
    (tmp_path / "scene_999.png").write_bytes(b"mine")
    names = [example["file"] for example in draw_examples(tmp_path, count=1, scan=12)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "examples.json", "scene_999.png"])
    with pytest.raises(ValueError, match="None of the first 0 scenes"):
        draw_examples(tmp_path, scan=0)


def test_a_library_s_error_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def ours() -> None:
        raise CheckpointError("all of it is here")

    for main, traceback in ((ours, False), (lambda: torch.zeros(2, 3) @ torch.zeros(2), True)):
        with pytest.raises(SystemExit, match="3"):
            run_command(main, status=3)
        assert ("Traceback" in capsys.readouterr().err) == traceback
