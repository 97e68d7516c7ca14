# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Reports during training: mean losses, figures of predictions, curves."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import ROOT
from huggingface_hub import ModelCard
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from modeling_alignzeg import class_colors, draw_overlay
from zeroshot.settings import load_settings
from zeroshot.training.report import GAP, HEADER, SIDE, RunningMeans, draw_predictions
from zeroshot.training.trainer import LOSSES, Trainer


SETTINGS = {
    "data.num_train": 8,
    "data.num_validation": 6,
    "data.validate": False,
    "data.transform": "{crop_size: 32}",
    "training.steps": 6,
    "training.batch_size": 2,
    "training.warmup_steps": 1,
    "training.log_every": 3,
    "training.evaluate_every": 0,
    "training.save_every": 2,
    "training.tensorboard": False,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("report") / "start")


@pytest.fixture
def train(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Trains on the CPU into a folder, and resets Accelerate's global state afterwards."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    def run(name: str, **changes: object) -> Path:
        reset()
        values = {**SETTINGS, "model.checkpoint": checkpoint, "output_dir": tmp_path / name, **changes}
        trainer = Trainer(load_settings([part for key, value in values.items() for part in (f"--{key}", str(value))]))
        trainer.run()
        return trainer.output

    yield run
    reset()


def lines(output: Path, name: str = "train/loss") -> list[dict[str, float]]:
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in metrics if name in line]


def test_logged_losses_are_means_over_the_steps_since_the_last_entry(train: Callable[..., Path]) -> None:
    single = lines(train("single", **{"training.log_every": 1}))
    means = lines(train("means"))
    assert [line["step"] for line in means] == [3, 6]
    for line, steps in zip(means, (single[:3], single[3:])):
        for name in LOSSES:
            expected = np.mean([step[f"train/{name}"] for step in steps])
            assert line[f"train/{name}"] == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("resume_at", [2, 4])
def test_means_go_on_across_a_resume(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume_at: int
) -> None:
    whole = lines(train("whole"))
    save = Trainer.save

    def save_and_fail(self: Trainer) -> None:
        save(self)
        if self.step == resume_at:
            raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", save_and_fail)
        with pytest.raises(InterruptedError):
            train("cut")
    assert lines(train("cut")) == whole
    weights = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_a_checkpoint_without_means_begins_them_anew() -> None:
    means = RunningMeans(("loss",), torch.device("cpu"))
    means.load(None)
    assert means.count == 0 and means.sums.tolist() == [0]


def test_evaluations_draw_predictions_and_curves(train: Callable[..., Path]) -> None:
    output = train("run", **{"training.evaluate_every": 3, "training.tensorboard": True})
    names = [f"step-{step:08d}.png" for step in (3, 6)]
    assert sorted(path.name for path in (output / "figures").iterdir()) == names
    sheet = np.asarray(Image.open(output / "figures" / names[-1]))
    assert sheet.shape[0] >= 4 * 100 and Image.open(output / "curves.png").size[0] > 500
    (events,) = {path.parent for path in output.rglob("events.out.tfevents.*")}
    log = EventAccumulator(str(events), size_guidance={"images": 0})
    log.Reload()
    logged = log.Images("predictions")
    assert [image.step for image in logged] == [3, 6]
    assert (logged[-1].height, logged[-1].width) == sheet.shape[:2]
    card = ModelCard.load(output / "final" / "README.md")
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    last = lines(output, "validation/hiou")[-1]
    assert found == {name: round(last[f"validation/{name}"], 2) for name in found} and "hiou" in found


def test_drawing_changes_no_step(train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"training.evaluate_every": 2}
    drawn = train("drawn", **changes)
    monkeypatch.setattr(Trainer, "draw", lambda *arguments: None)
    plain = train("plain", **changes)
    weights = [(output / "final" / "model.safetensors").read_bytes() for output in (drawn, plain)]
    assert weights[0] == weights[1] and lines(drawn) == lines(plain)


def test_the_picture_of_predictions_has_image_truth_and_prediction_side_by_side() -> None:
    classes = ["grass", "sky"]
    image = np.full((64, 256, 3), 200, np.uint8)
    truth, label = np.zeros((64, 256), np.uint8), np.ones((64, 256), np.int64)
    truth[:, 128:] = 255
    sheet = np.asarray(draw_predictions([{"image": image, "label": truth}], [label], classes), float)
    row = sheet[HEADER + 32]
    assert (row[GAP + 10] == 200).all()
    colors = 0.4 * 200 + 0.6 * np.vstack([class_colors(classes), [[120, 120, 120]]])
    second = 2 * GAP + SIDE
    assert np.abs(row[second + 10] - colors[0]).max() <= 1  # the seen half of the ground truth
    assert np.abs(row[second + 200] - colors[2]).max() <= 1  # its unlabelled half
    overlay = draw_overlay(Image.fromarray(image), truth.astype(np.int64), classes, max_size=SIDE)
    assert np.abs(row[second + overlay.width + GAP + 10] - colors[1]).max() <= 1  # the prediction


TRACKIO = """
import json, pathlib

class Run:
    def log(self, values, step=None):
        with open(pathlib.Path(__file__).parent / "log.jsonl", "a") as file:
            file.write(json.dumps([step, values]) + "\\n")

    def finish(self):
        pass

def init(project, **options):
    return Run()
"""


def test_trackio_gets_what_is_logged(checkpoint: Path, tmp_path: Path) -> None:
    """A stand-in for trackio, in a separate process, because accelerate looks for trackio when it is imported."""
    (tmp_path / "trackio").mkdir()
    (tmp_path / "trackio" / "__init__.py").write_text(TRACKIO)
    (tmp_path / "trackio-1.dist-info").mkdir()
    (tmp_path / "trackio-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: trackio\nVersion: 1\n")
    values = {**SETTINGS, "model.checkpoint": checkpoint, "output_dir": tmp_path / "run", "training.trackio": True}
    flags = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": paths}
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *flags]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    logged = [json.loads(line) for line in (tmp_path / "trackio" / "log.jsonl").read_text().splitlines()]
    assert [{"step": step, **values} for step, values in logged] == lines(tmp_path / "run")


@pytest.mark.skipif(importlib.util.find_spec("trackio") is not None, reason="trackio is installed")
def test_trackio_that_is_missing_is_named(train: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="`training.trackio` is on, but trackio is not installed"):
        train("run", **{"training.trackio": True})
