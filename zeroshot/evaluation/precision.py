# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Accuracy of a checkpoint in bfloat16 and float16 and as an exported ONNX file, against float32 in torch."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from modeling_alignzeg import AlignZegModel, AlignZegProcessor

from ..data.benchmarks import open_part
from ..data.dataset import SegmentationDataset
from ..data.splits import load_split
from ..metrics.hiou.scoring import confusion_matrix, scores_from_confusion
from ..settings import DataSettings
from .benchmark_onnx import label_maps, torch_label_maps
from .evaluator import library_versions


@torch.no_grad()
def measure_precision(
    model: AlignZegModel, processor: AlignZegProcessor, settings: DataSettings, limit: int | None = None
) -> dict[str, Any]:
    """Scores on the test part of a dataset, in the generalized label space, and the share of the pixels that have the label
    of float32 in torch; both in percent.

    Returns:
        `ways`: `torch`, `bfloat16`, `float16`, `float32` and `int8` (the last two are exported files) to their scores; and
        `dataset`, `images`, `versions`.
    """
    split = load_split(settings.split or settings.dataset)
    dataset = SegmentationDataset(open_part(settings, "test", limit), split, training=False)
    prototypes = model.get_text_prototypes(processor, split.vocabulary, phrase_pooling="mean")
    seen = torch.tensor([name not in split.unseen for name in split.classes])
    ways, _ = label_maps(model, processor.image_processor, prototypes, seen)
    for dtype in (torch.bfloat16, torch.float16):
        narrow, name = copy.deepcopy(model).to(dtype), str(dtype).removeprefix("torch.")
        ways[name] = torch_label_maps(narrow, processor.image_processor, prototypes, seen)

    count = len(split.classes)
    matrices = {way: torch.zeros(count, count, dtype=torch.int64) for way in ways}
    equal, pixels = dict.fromkeys(ways, 0), 0
    for index in range(len(dataset)):
        sample = dataset[index]
        maps = {way: label_map(sample["image"]) for way, label_map in ways.items()}
        pixels += sample["label"].size
        for way, found in maps.items():
            matrices[way] += confusion_matrix(found.astype(np.int64), sample["label"], count, split.ignore_index)
            equal[way] += int((found == maps["torch"]).sum())
    unseen = [split.classes.index(name) for name in split.unseen]
    scores = {way: scores_from_confusion(matrix, unseen) for way, matrix in matrices.items()}
    return {
        "dataset": settings.dataset,
        "images": len(dataset),
        "ways": {
            way: {
                **{name: scores[way][name] for name in ("miou", "pixel_accuracy")},
                "equal_pixels": 100 * equal[way] / pixels,
            }
            for way in ("torch", "bfloat16", "float16", "float32", "int8")
        },
        "versions": library_versions(),
    }
