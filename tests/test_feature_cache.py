# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Cached features equal those that the model computes, and belong to one tower, one configuration and the same samples."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model, tiny_processor

from zeroshot.data.dataset import SegmentationDataset
from zeroshot.data.splits import SegmentationSplit
from zeroshot.training.feature_cache import feature_cache


def dataset(seed: int = 0, sizes: tuple[int, ...] = (32, 32, 32)) -> SegmentationDataset:
    rng = np.random.default_rng(seed)
    images = [Image.fromarray(rng.integers(0, 256, (32, size, 3), np.uint8)) for size in sizes]
    labels = [Image.new("L", image.size) for image in images]
    features = {"image": datasets.Image(), "label": datasets.Image(), "name": datasets.Value("string")}
    names = [str(index) for index in range(len(images))]
    rows = datasets.Dataset.from_dict(
        {"image": images, "label": labels, "name": names}, features=datasets.Features(features)
    )
    split = SegmentationSplit("one", ("road",), raw_id_to_class={0: 0})
    return SegmentationDataset(rows, split, training=False)


def test_the_cache_is_what_the_model_computes(tmp_path: Path) -> None:
    model, images = tiny_model(), dataset()
    image_processor = tiny_processor().image_processor
    cache = feature_cache(model, image_processor, images, 1, tmp_path)
    for index in range(len(images)):
        inputs = image_processor(images[index]["image"], do_resize=False, return_tensors="pt")
        for layer, states in model.clip_hidden_states(**inputs).items():
            torch.testing.assert_close(cache[layer][index], states[0])
    assert {layer: len(states) for layer, states in cache.items()} == dict.fromkeys(cache, len(images))
    again = feature_cache(model, image_processor, images, 1, tmp_path)
    assert all(torch.equal(again[layer], cache[layer]) for layer in cache) and len(list(tmp_path.iterdir())) == 1


def test_another_tower_or_other_samples_are_computed_anew(tmp_path: Path) -> None:
    """An activation is not in the weights: OpenAI's ViT-B-16 differs from ViT-B-16-quickgelu in nothing else."""
    image_processor = tiny_processor().image_processor
    feature_cache(tiny_model(), image_processor, dataset(), 1, tmp_path)
    model = tiny_model()
    model.config.vision_config.hidden_act = "gelu_new"
    feature_cache(model, image_processor, dataset(), 1, tmp_path)
    feature_cache(tiny_model(seed=1), image_processor, dataset(), 1, tmp_path)
    feature_cache(tiny_model(), image_processor, dataset(seed=1), 1, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_samples_of_different_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs samples of one size, but \(32, 32\) and \(32, 48\)"):
        feature_cache(tiny_model(), tiny_processor().image_processor, dataset(sizes=(32, 48)), 1, tmp_path)
    assert not list(tmp_path.iterdir())
