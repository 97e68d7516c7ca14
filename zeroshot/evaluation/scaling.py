# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Measures the cost per image of bulk prediction, stage by stage."""

from __future__ import annotations

import io
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from modeling_alignzeg import AlignZegConfig, AlignZegImageProcessor, AlignZegModel

from ..data.images import label_picture
from ..data.scenes import draw_scene
from ..files import atomic_write_text
from .evaluator import library_versions
from .options import Vocabulary
from .predictor import BulkSettings, Predictor
from .shards import Shard, write_shard


SIZE = (640, 480)  # width and height
CLASSES = 171  # as in COCO-Stuff


def draw_rows(number: int) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for index in range(number):
        buffer = io.BytesIO()
        Image.fromarray(draw_scene(0, "test", index, 160).image).resize(SIZE).save(buffer, "JPEG", quality=90)
        rows.append((index, {"image": {"bytes": buffer.getvalue(), "path": f"{index}.jpg"}}))
    return rows


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def measure(precision: str, rows: list[tuple[int, dict[str, Any]]], batch_size: int) -> dict[str, Any]:
    """CPU seconds per image on one core, by stage."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = AlignZegModel(AlignZegConfig()).eval()
    processor = AlignZegImageProcessor(size_divisor=model.config.size_divisor)
    prototypes = torch.nn.functional.normalize(torch.randn(CLASSES, model.config.projection_dim), dim=-1)
    names = [f"class {index}" for index in range(CLASSES)]
    settings = BulkSettings("drawn scenes", batch_size=batch_size, num_threads=1)
    predictor = Predictor(model, processor, Vocabulary(names, names[-15:], prototypes), settings, accelerator)
    seconds = dict.fromkeys(("read", "model", "read_out", "encode", "write"), 0.0)

    def timed(stage, function, *arguments):
        started = time.process_time()
        result = function(*arguments)
        seconds[stage] += time.process_time() - started
        return result

    finished: list[dict[str, Any]] = []
    for start in range(-batch_size, len(rows), batch_size):
        if start == 0:  # the first batch is the warm-up
            seconds, finished = dict.fromkeys(seconds, 0.0), []
        part = rows[max(start, 0) : max(start, 0) + batch_size]
        results, sizes, inputs = timed("read", predictor.read, part)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            outputs = timed("model", predictor.forward, inputs)
        maps = timed("read_out", predictor.read_out, outputs, sizes)
        finished += [timed("encode", predictor.encode, *pair) for pair in ((r, *m) for r, m in zip(results, maps))]
    with tempfile.TemporaryDirectory() as folder:
        timed("write", write_shard, Path(folder), Shard(0, 0), "parquet", finished)
    return {
        "precision": precision,
        "batch_size": batch_size,
        "seconds_per_image": {stage: round(value / len(rows), 5) for stage, value in seconds.items()},
        "total_seconds_per_image": round(sum(seconds.values()) / len(rows), 4),
    }


def measure_scaling(output: str, images: int, batch_size: int) -> None:
    """Measures the cost per image on `images` images, prints it and writes it to `output`."""
    torch.set_num_threads(1)
    rows = draw_rows(images)
    labels = [draw_scene(0, "test", index, 160).label for index in range(images)]
    pictures = [Image.fromarray(label).resize(SIZE, Image.Resampling.NEAREST) for label in labels]
    names = [f"class {index}" for index in range(CLASSES)]
    label_bytes = []
    for picture in pictures:  # encode ground-truth label maps, because predictions of random weights are not typical
        buffer = io.BytesIO()
        label_picture(np.asarray(picture, np.int64), names).save(buffer, "PNG")
        label_bytes.append(buffer.tell())
    report: dict[str, Any] = {
        "command": "python scripts/measure_scaling.py",
        "model": "ViT-B/16, short side 640, 100 queries, random weights",
        "images": f"{images} synthetic scenes, JPEG, {SIZE[0]} x {SIZE[1]}",
        "classes": CLASSES,
        "device": f"one core of {os.cpu_count()}, {processor_name()}",
        "runs": [measure(precision, rows, batch_size) for precision in ("no", "bf16")],
        "image_bytes": round(sum(len(row["image"]["bytes"]) for _, row in rows) / len(rows)),
        "label_map_bytes": round(sum(label_bytes) / len(label_bytes)),
        "versions": library_versions(),
    }
    atomic_write_text(output, json.dumps(report, indent=2) + "\n")
    for run in report["runs"]:
        print(run["precision"], run["total_seconds_per_image"], "s per image:", run["seconds_per_image"])
