# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Measures search by exemplars instead of names on synthetic scenes.

Exemplars of each class come from validation scenes. Each class is searched for separately in test scenes: all pixels are
    ranked by its score against the background. Average precision is the mean over the classes that occur; for a random
    ranking, its expected value is the share of the pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_alignzeg import AlignZegModel, AlignZegProcessor

from ..data.scenes import CLASSES, IGNORE_INDEX, Scene, draw_scene
from ..data.splits import load_split


SMALLEST = 100  # minimum pixels of an exemplar


def average_precision(positive: Tensor, scores: Tensor) -> float:
    """Mean precision at the ranks of the positives; `bool (n,)` and `(n,)`."""
    hits = positive[scores.argsort(descending=True, stable=True)].double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return float((precision * hits).sum() / hits.sum())


def find_exemplars(count: int, seed: int = 0, scenes: int = 400) -> dict[int, list[Scene]]:
    """For each class id, at most `count` validation scenes, the first ones with enough pixels of the class."""
    found: dict[int, list[Scene]] = {}
    for index in range(scenes):
        scene = draw_scene(seed, "validation", index)
        ids, pixels = np.unique(scene.label, return_counts=True)
        for class_id in ids[(pixels >= SMALLEST) & (ids != IGNORE_INDEX)].tolist():
            if len(found.setdefault(class_id, [])) < count:
                found[class_id].append(scene)
    return dict(sorted(found.items()))


def exemplar_prototypes(
    model: AlignZegModel, processor: AlignZegProcessor, exemplars: dict[int, list[Scene]], anchors: Tensor | None
) -> Tensor:
    """`(C, D)`: one prototype per class, from all its exemplars."""
    rows = []
    for class_id, scenes in exemplars.items():
        maps = [np.where(scene.label == class_id, 0, IGNORE_INDEX) for scene in scenes]
        images = [scene.image for scene in scenes]
        inputs = processor(images=images, segmentation_maps=maps, return_tensors="pt").to(model.device)
        masks = [mask.to(model.device) for mask in inputs["mask_labels"]]
        rows.append(
            model.get_image_prototypes(inputs["pixel_values"], masks, inputs["pixel_mask"], anchors, merge=True)
        )
    return torch.cat(rows)


@torch.no_grad()
def search(model: AlignZegModel, processor: AlignZegProcessor, prototypes: Tensor, images: list[np.ndarray]) -> Tensor:
    """Scores `(C, images, h, w)` on the mask grid of each prototype against the background only."""
    maps = []
    for image in images:
        inputs = processor(images=image, return_tensors="pt").to(model.device)
        outputs = model(**inputs, text_prototypes=prototypes)
        logits = outputs.class_queries_logits[0]
        alone = (logits[:, :-1] - logits[:, -1:]).sigmoid()  # softmax over one class and the background
        maps.append(torch.einsum("nc,nhw->chw", alone, outputs.masks_queries_logits[0].sigmoid()).cpu())
    return torch.stack(maps, 1)


def measure(
    model: AlignZegModel, processor: AlignZegProcessor, exemplars: dict[int, list[Scene]], scenes: int, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Average precision by exemplars without and with anchors, and by names.

    Returns:
        For each search method, `average_precision`, `average_precision_unseen` (over the unseen classes) and `chance`.
        The anchors are all class names (`exemplar`), or only the names of seen classes (`exemplar_seen_anchors`), without
        the name of an unseen exemplar.
    """
    split = load_split("embedded_scenes")
    names = model.get_text_prototypes(processor, list(CLASSES))
    anchors = {
        "exemplar": names,
        "exemplar_seen_anchors": names[list(split.seen_ids)],
        "exemplar_without_anchors": None,
    }
    prototypes = {kind: exemplar_prototypes(model, processor, exemplars, rows) for kind, rows in anchors.items()}
    prototypes["name"] = names[list(exemplars)]
    drawn = [draw_scene(seed, "test", index) for index in range(scenes)]
    report = {}
    for kind, rows in prototypes.items():
        scores = search(model, processor, rows, [scene.image for scene in drawn])
        labels = torch.stack([torch.from_numpy(scene.label.astype(np.int64)) for scene in drawn])
        labels = F.interpolate(labels[:, None].double(), size=scores.shape[2:], mode="nearest-exact")[:, 0].long()
        results = {}
        for position, class_id in enumerate(exemplars):
            positive = (labels == class_id).flatten()
            if positive.any():
                found = average_precision(positive, scores[position].flatten())
                results[class_id] = (found, float(positive.float().mean()))
        unseen = [found for class_id, (found, _) in results.items() if class_id in split.unseen_ids]
        report[kind] = {
            "average_precision": float(np.mean([found for found, _ in results.values()])),
            "average_precision_unseen": float(np.mean(unseen)) if unseen else float("nan"),
            "chance": float(np.mean([share for _, share in results.values()])),
        }
    return report


def report_of(model: AlignZegModel, processor: AlignZegProcessor, counts: list[int], scenes: int) -> dict[str, Any]:
    """[`measure`] for several numbers of exemplars per class."""
    return {
        "scenes": scenes,
        "exemplars": {str(count): measure(model, processor, find_exemplars(count), scenes) for count in counts},
    }
