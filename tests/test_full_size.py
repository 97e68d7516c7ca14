# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""A dry run at full size: CLIP ViT-B/16 with random weights, a VOC tree of synthetic images, the unchanged preset."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file
from test_data import voc_palette, write_list
from test_processes import ENVIRONMENT

from zeroshot.data.scenes import draw_scene


GIB = 2**20  # in KiB, the unit of ru_maxrss on Linux


def run(script: str, *arguments: object) -> tuple[float, float]:
    """Runs a script; returns its seconds and its peak memory in GiB."""
    started = time.time()
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, printed[-4000:]
    return time.time() - started, usage.ru_maxrss / GIB


def draw_voc(root: Path, images: int) -> None:
    """The original layout: image sizes of photographs, palette PNGs with unlabelled borders, lists."""
    names = [f"2008_{index:06d}" for index in range(images)]
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug"):
        (root / folder).mkdir(parents=True)
    for index, name in enumerate(names):
        size = (500, 375) if index % 3 else (333, 500)
        scene = draw_scene(0, "train", index, 128)
        Image.fromarray(scene.image).resize(size).save(root / "JPEGImages" / f"{name}.jpg", quality=90)
        ids = np.asarray(Image.fromarray(scene.label).resize(size, Image.Resampling.NEAREST))
        raw = ids % 21  # the background is 0
        raw[:, 1:][ids[:, 1:] != ids[:, :-1]] = 255
        label = Image.fromarray(raw.astype(np.uint8))
        label.putpalette(voc_palette().flatten().tolist())
        label.save(root / "SegmentationClassAug" / f"{name}.png")
    write_list(root / "ImageSets" / "Segmentation" / "trainaug.txt", names[:-4])
    write_list(root / "ImageSets" / "Segmentation" / "val.txt", names[-4:])


@pytest.mark.slow
def test_dry_run_at_full_size(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import open_clip

    torch.manual_seed(0)
    clip = open_clip.create_model("ViT-B-16")
    save_file({name: value.contiguous() for name, value in clip.state_dict().items()}, tmp_path / "clip.safetensors")
    del clip
    draw_voc(tmp_path / "VOC2012", 20)
    figures = {}
    figures["create_checkpoint.py"] = run(
        *("create_checkpoint.py", "--clip", "ViT-B-16", "--pretrained", tmp_path / "clip.safetensors"),
        *("--vocabulary", "voc2012", "--template_set", "single", "--output_dir", tmp_path / "start"),
    )
    (tmp_path / "clip.safetensors").unlink()
    settings = {
        "model.checkpoint": tmp_path / "start",
        "output_dir": tmp_path / "run",
        "data.root": tmp_path / "VOC2012",
        "data.num_workers": 1,
        "training.steps": 3,
        "training.batch_size": 2,
        "training.log_every": 1,
        "training.evaluate_every": 0,
        "training.tensorboard": False,
    }
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    figures["train.py"] = run("train.py", "--config", ROOT / "scripts/configs/voc2012_vitb16.yaml", *flags)
    losses = [json.loads(line)["train/loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    timing = json.loads((tmp_path / "run" / "timing.json").read_text())

    data = ["--dataset", "voc2012", "--root", tmp_path / "VOC2012", "--part", "val", "--batch_size", 1]
    model = ["--model", tmp_path / "run" / "final", "--template_set", "single"]
    figures["evaluate.py"] = run(
        "evaluate.py", *model, *data, "--flip", "--limit", 2, "--output", tmp_path / "report.json"
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["images"] == 2 and len(report["per_class"]) == 20 and report["protocol"]["flip"]
    assert report["protocol"]["size"]["shortest_edge"] == 640 and 0 <= report["pixel_accuracy"] <= 100

    figures["predict.py"] = run(
        "predict.py", *model, *data, "--output_dir", tmp_path / "predictions", "--output_format", "png"
    )
    for index in range(4):
        name = f"2008_{16 + index:06d}.png"
        expected = Image.open(tmp_path / "VOC2012" / "SegmentationClassAug" / name)
        found = Image.open(tmp_path / "predictions" / "part-00000-00000000" / name)
        assert found.size == expected.size and np.asarray(found).max() < 20
    with capsys.disabled():
        print(f"\nFull size, batch 2: {timing['seconds_per_step']:.1f} s per training step")
        for script, (seconds, memory) in figures.items():
            print(f"{script:<22}{seconds:7.0f} s   peak memory {memory:5.1f} GiB")
    assert max(memory for _, memory in figures.values()) < 12
