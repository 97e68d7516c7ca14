# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The scripts as a user runs them: train, resume, evaluate and predict, on a tiny model and a few drawn scenes."""

from __future__ import annotations

import json
import os
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
from predict import output_stems
from safetensors.torch import load_file


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
    frozen = ("vision_model", "text_model", "visual_projection", "text_projection", "logit_scale")
    for name, value in before.items():
        if name.startswith(frozen):
            assert torch.equal(value, after[name]), name
    assert not torch.equal(before["query_embeddings"], after["query_embeddings"])


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
    """Unseen pixels given other unseen ids: the losses of every step are the same numbers."""
    sys.path.append(str(ROOT / "scripts"))
    from zeroshot.scenes import CLASSES, scenes_dataset
    from zeroshot.splits import load_split

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
    script("evaluate.py", "--model", run / "whole" / "final", "--limit", 5, "--output", report)
    values = json.loads(report.read_text())
    assert values["images"] == 5 and len(values["per_class"]) == 70
    assert 0 <= values["hiou"] <= 100 and values["protocol"]["template_set"] == "single"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """One picture of every kind that users have, and one broken file."""
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
    files = [Path("in") / name for name in ("a.jpg", "a.png", "b.jpg", "c.png", "c_overlay.png")]
    assert output_stems(files) == ["a.jpg", "a.png", "b", "c.png", "c_overlay.png"]


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
