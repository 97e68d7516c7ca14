# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Intervals of the scores against an ordinary bootstrap, which draws images with replacement."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from zeroshot.evaluation.intervals import Bootstrap
from zeroshot.metrics.hiou.scoring import scores_from_confusion


NAMES = ("miou_seen", "miou_unseen", "hiou", "pixel_accuracy", "miou")


def confusions(images: int, classes: int = 4, seed: int = 0) -> torch.Tensor:
    """Images of very different difficulty."""
    rng = np.random.default_rng(seed)
    right = rng.beta(1.5, 1.0, (images, classes))
    counts = rng.integers(50, 200, (images, classes)) * (rng.random((images, classes)) < 0.7)
    matrices = np.zeros((images, classes, classes), np.int64)
    for image in range(images):
        for target in range(classes):
            shares = np.full(classes, (1 - right[image, target]) / (classes - 1))
            shares[target] = right[image, target]
            matrices[image, target] = rng.multinomial(counts[image, target], shares)
    return torch.from_numpy(matrices)


def test_intervals_equal_those_of_an_ordinary_bootstrap() -> None:
    matrices, unseen = confusions(80), [1, 3]
    bootstrap = Bootstrap(4)
    for matrix in matrices:
        bootstrap.add(matrix)
    found = bootstrap.intervals(unseen)
    rng = np.random.default_rng(1)
    draws = [scores_from_confusion(matrices[rng.integers(0, 80, 80)].sum(0), unseen) for _ in range(1000)]
    point = scores_from_confusion(matrices.sum(0), unseen)
    assert set(found) == set(NAMES)
    for name in NAMES:
        low, high = np.quantile([draw[name] for draw in draws], [0.025, 0.975])
        assert found[name] == pytest.approx([low, high], abs=0.25 * (high - low)), name
        assert found[name][0] < point[name] < found[name][1]


def test_intervals_cover_the_true_score() -> None:
    """About 95 % of the intervals from samples of 60 images contain the score of the population."""
    population, unseen = confusions(3000, seed=5), [0]
    truth = scores_from_confusion(population.sum(0), unseen)
    rng, covered = np.random.default_rng(2), dict.fromkeys(NAMES, 0)
    for trial in range(60):
        bootstrap = Bootstrap(4, seed=trial)
        for index in rng.integers(0, 3000, 60):
            bootstrap.add(population[index])
        for name, (low, high) in bootstrap.intervals(unseen).items():
            covered[name] += low <= truth[name] <= high
    assert all(count >= 50 for count in covered.values()), covered


def test_processes_add_up() -> None:
    """Two processes with half of the images each: the replicates are sums."""

    class TwoProcesses:
        num_processes, device = 2, torch.device("cpu")

        def __init__(self, other: Bootstrap):
            self.other = other

        def reduce(self, areas: torch.Tensor, reduction: str) -> torch.Tensor:
            assert reduction == "sum"
            return areas + self.other.areas

    matrices = confusions(40)
    halves = [Bootstrap(4, seed) for seed in range(2)]
    for index, matrix in enumerate(matrices):
        halves[index % 2].add(matrix)
    together = halves[0].intervals([1], TwoProcesses(halves[1]))
    alone = Bootstrap(4, seed=7)
    for matrix in matrices:
        alone.add(matrix)
    for name, (low, high) in alone.intervals([1]).items():
        assert together[name] == pytest.approx([low, high], abs=0.3 * (high - low))


@pytest.mark.parametrize("unseen", [[], [0, 1, 2, 3]], ids=["none", "all"])
def test_a_score_that_does_not_exist_has_no_interval(unseen: list[int]) -> None:
    bootstrap = Bootstrap(4)
    for matrix in confusions(40):
        bootstrap.add(matrix)
    found = bootstrap.intervals(unseen)
    assert set(found) == set(NAMES) - {"hiou", "miou_seen" if unseen else "miou_unseen"}
    assert not any(math.isnan(value) for pair in found.values() for value in pair)
    assert Bootstrap(4).intervals(unseen) == {}  # no image
