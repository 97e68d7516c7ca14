# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Sections of the speed benchmark that run the shipped checkpoint for photographs: many names, and a folder of images."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from modeling_alignzeg import AlignZegModel, AlignZegProcessor
from modeling_alignzeg.processing_alignzeg import get_templates

from ..checkpoints import load_checkpoint
from ..data.splits import SHIPPED_SPLITS, load_split
from .options import load_vocabulary
from .pictures import PictureSettings, plan_pictures, write_pictures
from .speed import peak_memory, sample_image, synchronize


CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "photos"
SAMPLE = 2048  # prompts of the plain way
MIB = 2**20


def sample_names(count: int) -> list[str]:
    """`count` distinct names: classes of the built-in splits, then pairs of them."""
    names = list(dict.fromkeys(name for split in SHIPPED_SPLITS for name in load_split(split).classes))
    pairs = (f"{first} and {second}" for first in names for second in names)
    return names[:count] + [next(pairs) for _ in range(count - len(names))]


def text(args: argparse.Namespace) -> dict[str, Any]:
    """Prototypes of many names, against prompts in batches in their given order, padded to the longest."""
    model, processor = load_checkpoint(CHECKPOINT)
    model.to(args.device)
    rows = {}
    for count, template_set in [(args.names[0], "vild"), *((count, "single") for count in args.names)]:
        names = sample_names(count)
        before, seconds = peak_memory(args.device), []
        with tempfile.TemporaryDirectory() as cache:
            for _ in range(2):
                model.text_encoder._cache.clear()
                started = time.perf_counter()
                model.get_text_prototypes(processor, names, template_set=template_set, cache_dir=cache)
                synchronize(args.device)
                seconds.append(time.perf_counter() - started)
        prompts = count * len(get_templates(template_set))
        rows[f"{count} {template_set}"] = {
            "prompts": prompts,
            "seconds": seconds[0],
            "from_disk": seconds[1],
            "added_mib": (peak_memory(args.device) - before) / MIB,
            "plain": plain_seconds(model, processor, names, template_set, args.device) * prompts,
        }
    return {"rows": rows}


def plain_seconds(
    model: AlignZegModel, processor: AlignZegProcessor, names: list[str], template_set: str, device: str
) -> float:
    """Seconds per prompt without sorting by length, for a sample."""
    templates = get_templates(template_set)
    sample = names[:: max(1, len(names) * len(templates) // SAMPLE)]
    encoded = processor.encode_class_names(sample, template_set=list(templates))
    ids, mask = (encoded[name].flatten(0, -2).to(device) for name in ("input_ids", "attention_mask"))
    started = time.perf_counter()
    for rows in torch.arange(len(ids)).split(256):
        model.text_encoder(ids[rows], mask[rows])
    synchronize(device)
    return (time.perf_counter() - started) / len(ids)


def folder(args: argparse.Namespace) -> dict[str, Any]:
    """predict.py on a folder of images, label maps only, against the network's own time for the same images."""
    model, processor = load_checkpoint(CHECKPOINT)
    model.to(args.device)
    vocabulary = load_vocabulary(model, processor, "grass, sky, road, car, body, dog", None, None)
    settings = PictureSettings(labels_only=True)
    size = (args.size, args.size * 3 // 4)
    with tempfile.TemporaryDirectory() as place:
        images, output = Path(place) / "images", Path(place) / "output"
        images.mkdir()
        for index in range(args.images):
            sample_image(args.size, index % 20).resize(size).save(images / f"{index:04d}.jpg", quality=92)
        jobs = plan_pictures([str(images)], output, settings)
        inputs = processor(images=sample_image(args.size).resize(size), return_tensors="pt").to(args.device)

        def network() -> float:
            started = time.perf_counter()
            for _ in range(8):
                model(**inputs, text_prototypes=vocabulary.prototypes)
            synchronize(args.device)
            return (time.perf_counter() - started) / 8

        def part(first: int, last: int) -> tuple[float, float]:
            started = time.perf_counter()
            write_pictures(model, processor, vocabulary, jobs[first:last], output, settings)
            return (time.perf_counter() - started) / (last - first), peak_memory(args.device) / MIB

        network(), part(0, 2)
        step = max(2, args.images // 4)
        alone, whole, peaks = [], [], []
        for first in range(0, args.images, step):  # in turns, so that a busy machine slows both down
            alone.append(network())
            seconds, peak = part(first, min(first + step, args.images))
            whole.append(seconds)
            peaks.append(peak)
    return {
        "images": args.images,
        "width": size[0],
        "height": size[1],
        "network": sum(alone) / len(alone),
        "predict": sum(whole) / len(whole),
        "share_of_network_rate": sum(alone) / sum(whole),
        "peak_mib": peaks,
    }
