# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Evaluates image and text embeddings on held-out photographs."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from ..metrics.hiou.scoring import confusion_matrix, scores_from_confusion
from .projection import Projection


def grid_shares(label: np.ndarray, ids: list[int], rows: int, columns: int) -> torch.Tensor:
    """Share of each cell that each class covers: `(height, width)` to `float32 (classes, rows, columns)`."""
    one_hot = torch.from_numpy(np.stack([label == index for index in ids])).float()
    return F.adaptive_avg_pool2d(one_hot, (rows, columns))


def pool_segments(cells: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Features averaged over segments: `(rows, columns, 1280)` and `(classes, rows, columns)` to `(classes, 1280)`."""
    weights = shares.flatten(1) / shares.flatten(1).sum(1, keepdim=True).clamp(min=1e-6)
    return weights @ cells.float().flatten(0, 1)


@torch.inference_mode()
def segment_accuracy(
    projection: Projection, cells: list[torch.Tensor], labels: list[np.ndarray], ids: list[int], text: torch.Tensor
) -> dict:
    """Classification accuracy of ground-truth segments.

    Args:
        projection: the trained projection.
        cells: features of each photograph, `(rows, columns, 1280)`.
        labels: label map of each photograph, `(height, width)`.
        ids: the id of each name; all other ids are unlabelled.
        text: unit vector of each name, `(names, 384)`.

    Returns:
        `class_mean`, `overall`, `segments`, and `per_class`, a list with None for names that do not occur.
    """
    hits, counts = torch.zeros(len(ids)), torch.zeros(len(ids))
    for grid, label in zip(cells, labels):
        present = [position for position, index in enumerate(ids) if (label == index).sum() >= 64]
        if present:
            shares = grid_shares(label, [ids[position] for position in present], *grid.shape[:2])
            predicted = (projection(pool_segments(grid, shares)) @ text.T).argmax(1)
            counts[present] += 1
            hits[present] += (predicted == torch.tensor(present)).float()
    per_class = [round((h / c).item(), 4) if c else None for h, c in zip(hits, counts)]
    occurring = counts > 0
    return {
        "class_mean": (hits[occurring] / counts[occurring]).mean().item(),
        "overall": (hits.sum() / counts.sum()).item(),
        "segments": int(counts.sum()),
        "per_class": per_class,
    }


@torch.inference_mode()
def cells_miou(
    projection: Projection, cells: list[torch.Tensor], labels: list[np.ndarray], ids: list[int], text: torch.Tensor
) -> dict:
    """Scores of segmentation by bilinearly resized cell scores; arguments as in [`segment_accuracy`]."""
    confusion = torch.zeros(len(ids), len(ids), dtype=torch.long)
    position = torch.full((256,), len(ids))  # default for unlabelled ids
    position[ids] = torch.arange(len(ids))
    for grid, label in zip(cells, labels):
        scores = (projection(grid.float()) @ text.T).permute(2, 0, 1)[None]
        scores = F.interpolate(scores, size=label.shape, mode="bilinear", align_corners=False)
        confusion += confusion_matrix(scores[0].argmax(0), position[torch.from_numpy(label)], len(ids), len(ids))
    found = scores_from_confusion(confusion, (), [str(index) for index in ids])
    return {
        "miou": found["miou"] / 100,
        "pixel_accuracy": found["pixel_accuracy"] / 100,
        "per_class": [round(value / 100, 4) for value in found["per_class"].values()],
    }


@torch.inference_mode()
def naming_accuracy(
    projection: Projection, features: torch.Tensor, labels: torch.Tensor, text: torch.Tensor, names: torch.Tensor
) -> float:
    """Share of photographs whose nearest name is correct.

    Args:
        projection: the trained projection.
        features: features of whole photographs, `(photographs, 1280)`.
        labels: their names, as positions in `text`.
        text: unit vector of every name.
        names: positions of the candidate names.
    """
    predicted = names[(projection(features.float()) @ text[names].T).argmax(1)]
    return (predicted == labels).float().mean().item()
