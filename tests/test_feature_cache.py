# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Cached features equal those that the model computes, and belong to one tower, one configuration and the same samples."""

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from tiny import tiny_checkpoint, tiny_model, tiny_processor

from zeroshot.data.dataset import SegmentationDataset
from zeroshot.data.splits import SegmentationSplit
from zeroshot.settings import load_settings
from zeroshot.training.feature_cache import feature_cache
from zeroshot.training.trainer import Trainer


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


def test_training_gets_the_features_of_its_images_in_every_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the cached epochs too, where loaders of Accelerate set an epoch of their own."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    values = {
        "model.checkpoint": tiny_checkpoint(tmp_path / "model"),
        "output_dir": tmp_path / "run",
        "data.num_train": 4,
        "data.transform.crop_size": 32,
        "data.transform.scale_range": "[1.0, 2.0]",
        "data.transform.color_jitter": "true",
        "data.cached_epochs": 2,
        "data.in_memory": "true",
        "training.batch_size": 2,
        "training.evaluate_every": 0,
        "training.save_every": 0,
        "training.tensorboard": "false",
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Trainer(load_settings([part for name, value in values.items() for part in (f"--{name}", str(value))]))
    network, seen = trainer.network, []

    def check(clip_hidden_states: dict[int, torch.Tensor], pixel_values: torch.Tensor, **batch: object) -> object:
        for layer, states in trainer.model.clip_hidden_states(pixel_values).items():
            torch.testing.assert_close(clip_hidden_states[layer], states)
        seen.append(pixel_values)
        return network(clip_hidden_states=clip_hidden_states, pixel_values=pixel_values, **batch)

    trainer.network = Checked(check, network)
    batches = trainer.micro_batches()
    for _ in range(10):
        trainer.optimizer_step(batches)
    epochs = [torch.cat(seen[start : start + 2]).flatten(1).sum(1).sort().values for start in range(0, 10, 2)]
    for epoch, sums in enumerate(epochs):
        assert torch.equal(sums, epochs[epoch % 2])
    assert not torch.equal(epochs[0], epochs[1])
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Checked(torch.nn.Module):
    """A network whose forward pass goes through `call`."""

    def __init__(self, call: Callable[..., object], network: torch.nn.Module):
        super().__init__()
        self.call, self.network = call, network

    def forward(self, **batch: object) -> object:
        return self.call(**batch)
