# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Hidden states of the frozen image tower, computed once for the samples of the first epochs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from modeling_alignzeg import AlignZegImageProcessor, AlignZegModel

from ..data.dataset import SegmentationDataset
from ..files import atomic_file


BATCH = 32


def sample_images(dataset: SegmentationDataset, epochs: int) -> Iterator[np.ndarray]:
    """The transformed images of the first `epochs` epochs, in order.

    Raises:
        ValueError: the images have different sizes.
    """
    shape = None
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        for index in range(len(dataset)):
            image = dataset[index]["image"]
            shape = shape or image.shape
            if image.shape != shape:
                raise ValueError(
                    f"`data.cached_epochs` needs samples of one size, but {shape[:2]} and {image.shape[:2]} (height, width) "
                    "occur: set it to 0, or let `data.transform` cut crops of one size (a lower end of `scale_range` of 1 "
                    "or more)."
                )
            yield image


@torch.no_grad()
def feature_cache(
    model: AlignZegModel,
    image_processor: AlignZegImageProcessor,
    dataset: SegmentationDataset,
    epochs: int,
    folder: str | Path | None = None,
) -> dict[int, Tensor]:
    """Hidden states of the frozen image tower for all samples of the first `epochs` epochs, as the model computes them.

    Args:
        folder: Folder to store them in for later runs, in a file named after a hash of the samples and the tower.

    Returns:
        Tensors `(epochs · images, …)` by layer, in the order of the epochs.

    Raises:
        ValueError: the samples have different sizes.
    """
    path = None if folder is None else Path(folder) / f"{_digest(model, image_processor, dataset, epochs)}.safetensors"
    if path is not None and path.is_file():
        return {int(layer): states for layer, states in load_file(path).items()}
    cache: dict[int, Tensor] = {}
    total, images = epochs * len(dataset), []
    for position, image in enumerate(tqdm(sample_images(dataset, epochs), "image tower", total, leave=False), 1):
        images.append(image)
        if len(images) < BATCH and position < total:
            continue
        inputs = image_processor(images, do_resize=False, return_tensors="pt").to(model.device)
        for layer, states in model.clip_hidden_states(**inputs).items():
            if layer not in cache:
                cache[layer] = states.new_empty(total, *states.shape[1:], device="cpu")
            cache[layer][position - len(images) : position] = states
        images = []
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            save_file({str(layer): states for layer, states in cache.items()}, partial)
    return cache


def _digest(
    model: AlignZegModel, image_processor: AlignZegImageProcessor, dataset: SegmentationDataset, epochs: int
) -> str:
    settings = (
        model.recognizer.layers,
        model.config.clip_input_scale,
        sorted(model.config.vision_config.to_dict().items()),  # activations are not in the weights
        *(image_processor.image_mean, image_processor.image_std, image_processor.rescale_factor),
    )
    digest = hashlib.sha256(repr(settings).encode())
    for weight in model.recognizer.vision_model.state_dict().values():
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    for image in sample_images(dataset, epochs):
        digest.update(image)
    return digest.hexdigest()[:32]
