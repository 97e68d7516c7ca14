# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The transductive setting: pseudo-labels of unseen classes, that no label of theirs leaks in, and training on them."""

from __future__ import annotations

import io
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file

from zeroshot.checkpoints import load_checkpoint
from zeroshot.data.dataset import SegmentationDataset
from zeroshot.data.splits import SegmentationSplit
from zeroshot.data.task import Task
from zeroshot.settings import load_settings
from zeroshot.training.pseudo_labels import FOLDER, pseudo_labelled, unseen_pseudo_labels


SPLIT = SegmentationSplit("drawn", ("brick", "red striped", "grass", "blue dotted"), ("red striped", "blue dotted"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint")


@pytest.fixture
def settings(checkpoint: Path, tmp_path: Path):
    flags = ["--model.checkpoint", checkpoint, "--output_dir", tmp_path / "run", "--data.transductive", "true"]
    return load_settings([*map(str, flags), "--data.transductive_threshold", "0.2"])


def encoded(array: np.ndarray) -> dict[str, bytes | None]:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def drawn(split: SegmentationSplit, hide_unseen: bool = False, count: int = 3) -> tuple[Task, list[np.ndarray]]:
    """A training part of `count` scenes with random labels; with `hide_unseen` unlabelled where a class is unseen."""
    rng, rows, labels = np.random.default_rng(0), [], []
    ids = [*range(len(split.classes)), split.ignore_index]
    for index in range(count):
        label = rng.choice(ids, (40, 48)).astype(np.uint16 if split.ignore_index > 255 else np.uint8)
        if hide_unseen:
            label[np.isin(label, split.unseen_ids)] = split.ignore_index
        image = np.asarray(tiny.picture(index))
        rows.append({"image": encoded(image), "label": encoded(label), "name": f"scene {index}"})
        labels.append(label.astype(np.int64))
    features = {"image": datasets.Image(), "label": datasets.Image(), "name": datasets.Value("string")}
    return Task(
        split, split, {"train": datasets.Dataset.from_list(rows, features=datasets.Features(features))}
    ), labels


def label_maps(task: Task, settings, checkpoint: Path) -> list[np.ndarray]:
    rows, split = pseudo_labelled(Accelerator(), *load_checkpoint(str(checkpoint)), task, settings)
    assert split.unseen == () and split.classes == task.split.classes and len(rows) == len(task.train)
    samples = [*SegmentationDataset(rows, split, training=True)]
    assert [sample["name"] for sample in samples] == task.train["name"]
    return [sample["label"] for sample in samples]


@pytest.mark.parametrize("unlabelled", [0.0, 0.5, 0.9])
def test_a_pixel_is_labelled_by_its_share_of_the_scores(unlabelled: float) -> None:
    model, processor = tiny.tiny_model(), tiny.tiny_processor()
    image = np.asarray(tiny.picture(size=(64, 64)))  # scaled to 32 x 32, so that nothing is padded
    prototypes = model.get_text_prototypes(processor, list(SPLIT.unseen))
    with torch.no_grad():
        outputs = model(**processor.image_processor(image, return_tensors="pt"), text_prototypes=prototypes)
    scores = torch.zeros(1, 3, *outputs.masks_queries_logits.shape[-2:])
    for logits, mask in zip(outputs.class_queries_logits[0], outputs.masks_queries_logits[0]):
        scores += logits.softmax(-1)[:, None, None] * mask.sigmoid()
    shares = F.interpolate(scores, (64, 64), mode="bilinear", align_corners=False)[0]
    shares = (shares / shares.sum(0)).numpy()
    best = shares[:2].max(0)
    threshold = float(np.quantile(best, unlabelled)) if unlabelled else 0.0
    with torch.no_grad():
        found = unseen_pseudo_labels(model, processor.image_processor, image, prototypes, threshold)
    sure = (np.abs(best - threshold) > 1e-6) & (np.abs(shares[0] - shares[1]) > 1e-6)
    expected = np.where(best > threshold, shares[:2].argmax(0), -1)
    assert sure.mean() > 0.95 and np.array_equal(found[sure], expected[sure])
    assert np.mean(found < 0) == pytest.approx(unlabelled, abs=0.01)


def test_seen_labels_stay_and_only_unlabelled_pixels_get_unseen_ones(settings, checkpoint: Path) -> None:
    task, labels = drawn(SPLIT)
    met = set()
    for found, label in zip(label_maps(task, settings, checkpoint), labels, strict=True):
        seen = np.isin(label, SPLIT.seen_ids)
        assert np.array_equal(found[seen], label[seen])
        met |= set(np.unique(found[~seen]).tolist())
    assert met & set(SPLIT.unseen_ids) and met <= {*SPLIT.unseen_ids, SPLIT.ignore_index}


def test_true_labels_of_unseen_classes_change_nothing(settings, checkpoint: Path, tmp_path: Path) -> None:
    found = label_maps(drawn(SPLIT)[0], settings, checkpoint)
    settings = replace(settings, output_dir=str(tmp_path / "hidden"))
    hidden = label_maps(drawn(SPLIT, hide_unseen=True)[0], settings, checkpoint)
    assert all(map(np.array_equal, found, hidden))


def test_more_classes_than_eight_bits_hold(settings, checkpoint: Path) -> None:
    names = tuple(f"class {index}" for index in range(300))
    split = SegmentationSplit("many", names, ("class 3", "class 299"), ignore_index=65535)
    task, labels = drawn(split)
    for found, label in zip(label_maps(task, settings, checkpoint), labels, strict=True):
        seen = np.isin(label, split.seen_ids)
        assert np.array_equal(found[seen], label[seen]) and set(np.unique(found[~seen])) <= {3, 299, 65535}


def test_label_maps_of_an_interrupted_run_are_kept_and_those_of_another_refused(settings, checkpoint: Path) -> None:
    task, _ = drawn(SPLIT)
    label_maps(task, settings, checkpoint)
    first, second, *_ = sorted((Path(settings.output_dir) / FOLDER).glob("*.png"))
    Image.fromarray(np.full((40, 48), 2, np.uint8)).save(first)
    before = second.read_bytes()
    second.unlink()
    assert (label_maps(task, settings, checkpoint)[0] == 2).all() and second.read_bytes() == before
    settings.data.transductive_threshold = 0.9
    with pytest.raises(ValueError, match="written with another `data.transductive_threshold`"):
        label_maps(task, settings, checkpoint)


# --- the script


def train(monkeypatch: pytest.MonkeyPatch, *flags: object) -> None:
    fixed = ["--data.num_train", 4, "--data.transform", "{crop_size: 32}", "--data.validate", "false"]
    fixed += [
        "--training.steps",
        2,
        "--training.batch_size",
        2,
        "--training.warmup_steps",
        1,
        "--training.save_every",
        2,
    ]
    fixed += ["--training.evaluate_every", 0, "--training.tensorboard", "false"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*fixed, *flags])])
    runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")


def test_training_goes_on_with_both(checkpoint: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    flags = ["--model.checkpoint", checkpoint, "--output_dir", tmp_path / "run"]
    train(monkeypatch, *flags, "--data.transductive", "true", "--data.transductive_threshold", 0.01)
    assert len(list((tmp_path / "run" / FOLDER).glob("*.png"))) == 4
    final = tmp_path / "run" / "final"
    config = json.loads((final / "config.json").read_text())
    assert len(config["id2label"]) == 70 and len(config["unseen_labels"]) == 18  # what is evaluated stays zero-shot's
    assert "transductive" in (final / "README.md").read_text(encoding="utf-8")
    train(monkeypatch, *flags[:2], "--output_dir", tmp_path / "inductive")
    weights = [load_file(tmp_path / run / "final" / "model.safetensors") for run in ("run", "inductive")]
    assert any(not torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    with pytest.raises(SystemExit, match="1"):  # the same folder without pseudo-labels
        train(monkeypatch, *flags)
    assert "transductive" in (message := capsys.readouterr().err) and "Choose another `output_dir`" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.clip", "scripts/assets/small_clip"], "`model.checkpoint` is missing"),
        (["--model.checkpoint", "{checkpoint}", "--data.fully_supervised", "true"], "are both on"),
        (["--model.checkpoint", "{checkpoint}", "--data.split", "{split}"], "has no unseen class; leave it off"),
    ],
)
def test_what_the_setting_lacks_is_named(
    flags, message, checkpoint: Path, monkeypatch, capsys, tmp_path: Path
) -> None:
    (tmp_path / "seen.yaml").write_text("classes: [brick, grass]\n")
    flags = [flag.format(checkpoint=checkpoint, split=tmp_path / "seen.yaml") for flag in flags]
    with pytest.raises(SystemExit, match="1"):
        train(monkeypatch, *flags, "--output_dir", tmp_path / "run", "--data.transductive", "true")
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
