# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Confidence intervals of scores, by a bootstrap over images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


REPLICATES = 1000
LEVEL = 0.95


class Bootstrap:
    """Poisson bootstrap: every image has a weight from Poisson(1) in each of 1,000 replicates of the dataset.

    The weighted pixel counts add up over images and processes, so no image has to be kept in memory.

    Source: Chamandy et al., Estimating uncertainty for massive data streams, Google, 2012.

    Args:
        num_classes: Number of classes C.
        seed: Seed of the weights. Each process needs its own.
    """

    def __init__(self, num_classes: int, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        # Correct, predicted and reference pixels of each class.
        self.areas = torch.zeros(REPLICATES, 3, num_classes, dtype=torch.float64)

    def add(self, matrix: Tensor) -> None:
        """Adds an image by its confusion matrix `int64 (C, C)`."""
        matrix = matrix.cpu()
        areas = torch.stack([matrix.diagonal(), matrix.sum(0), matrix.sum(1)])
        weights = torch.poisson(torch.ones(REPLICATES, 1, 1, dtype=torch.float64), self.generator)
        self.areas += weights * areas

    def intervals(self, unseen_ids: Sequence[int], accelerator=None) -> dict[str, list[float]]:
        """95 % intervals `[low, high]` of the dataset's scores, in percent, over all processes.

        A class is left out of the means of replicates that contain none of its images. A score that is nan in a replicate,
        such as `hiou` without unseen classes, has no interval.
        """
        areas = self.areas
        if accelerator is not None and accelerator.num_processes > 1:
            areas = accelerator.reduce(areas.to(accelerator.device), reduction="sum").cpu()
        correct, predicted, reference = areas.numpy().transpose(1, 0, 2)
        union = predicted + reference - correct
        missing = (reference == 0) & (reference.max(0) > 0)  # none of the images with this class is in the replicate
        iou = np.divide(correct, union, out=np.full_like(union, np.nan), where=(union > 0) & ~missing)
        is_unseen = np.isin(np.arange(iou.shape[1]), list(unseen_ids))
        seen, unseen, overall = (_mean(iou[:, kept]) for kept in (~is_unseen, is_unseen, slice(None)))
        total = reference.sum(1)
        scores = {
            "miou_seen": seen,
            "miou_unseen": unseen,
            "hiou": 2 * seen * unseen / np.maximum(seen + unseen, 1e-12),
            "pixel_accuracy": np.divide(correct.sum(1), total, out=np.full_like(total, np.nan), where=total > 0),
            "miou": overall,
        }
        tail = (1 - LEVEL) / 2
        return {
            name: np.quantile(100 * values, [tail, 1 - tail]).tolist()
            for name, values in scores.items()
            if not np.isnan(values).any()
        }


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean of each row over the values that are not nan; nan for a row without any."""
    count = (~np.isnan(values)).sum(1)
    return np.divide(np.nansum(values, 1), count, out=np.full(len(values), np.nan), where=count > 0)
