# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Features of all photographs, computed once and cached on disk as float16."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from .photos import open_photo, read_photos
from .tower import fold_batch_norms, load_tower


NAMED = ("named_imagenet_samples", "named_caltech101")
SCENES = ("msrc_train", "msrc_validation", "msrc_test", "coco_panoptic_train", "coco_panoptic_test")
RANDOM_CELLS = 4


@torch.inference_mode()
def cell_features(tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Last feature map of one photograph: `(3, height, width)` to `(rows, columns, 1280)`."""
    features = tower.forward_features(pixels[None].contiguous(memory_format=torch.channels_last))
    return features[0].permute(1, 2, 0)


def views(cells: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pooled features `(9, 1280)` of a photograph: the whole, its four quarters, and four random cells."""
    rows, columns, size = cells.shape
    spans = lambda length: (slice(0, (length + 1) // 2), slice(length // 2, length))  # the middle cell is in both
    quarters = [cells[down, right].mean((0, 1)) for down in spans(rows) for right in spans(columns)]
    drawn = torch.randint(rows * columns, (RANDOM_CELLS,), generator=generator)
    return torch.cat([cells.mean((0, 1))[None], torch.stack(quarters), cells.reshape(-1, size)[drawn]])


def select_named(rows: list[dict], per_name: int) -> list[int]:
    """Indices of the first photographs of each name, at most `per_name`, in order."""
    counts: dict[str, int] = {}
    kept = []
    for index, row in enumerate(rows):
        key = row["source"].rsplit("/", 1)[0] if "caltech" in row["source"] else row["source"]
        counts[key] = counts.get(key, 0) + 1
        if counts[key] <= per_name:
            kept.append(index)
    return kept


def named_features(photos: str, cache: Path, architecture: str, name: str, side: int, per_name: int) -> torch.Tensor:
    """Pooled views of named photographs, plain and mirrored, `float16 (photographs, 2, 9, 1280)`.

    Args:
        photos: folder of the photographs.
        cache: folder of the cached result, which is loaded if it exists.
        architecture: name of the tower.
        name: `named_imagenet_samples` or `named_caltech101`.
        side: short side in pixels.
        per_name: maximum number of photographs per name.
    """
    path = cache / f"{architecture}-{name}-{side}-{per_name}.safetensors"
    if not path.is_file():
        tower, generator = fold_batch_norms(load_tower(architecture)), torch.Generator().manual_seed(0)
        rows = read_photos(photos, name)
        result = []
        for index in tqdm(select_named(rows, per_name), desc=path.stem, mininterval=20.0):
            pixels = open_photo(rows[index]["image"], side)
            both = [views(cell_features(tower, image), generator) for image in (pixels, pixels.flip(2))]
            result.append(torch.stack(both).half())
        _write(path, {"views": torch.stack(result)})
    return load_file(path)["views"]


def scene_features(
    photos: str, cache: Path, architecture: str, name: str, side: int, mirrored: bool
) -> list[torch.Tensor]:
    """Cells of photographs with label maps, one `float16 (rows, columns, 1280)` each; arguments as above.

    With `mirrored`, the cells of the mirrored photographs follow.
    """
    path = cache / f"{architecture}-{name}-{side}{'-mirrored' * mirrored}.safetensors"
    if not path.is_file():
        tower = fold_batch_norms(load_tower(architecture))
        rows = read_photos(photos, name)
        result = {}
        for index, row in enumerate(tqdm(rows, desc=path.stem, mininterval=20.0)):
            pixels = open_photo(row["image"], side)
            for turn in range(1 + mirrored):
                cells = cell_features(tower, pixels.flip(2) if turn else pixels)
                result[f"{turn}{index:05d}"] = cells.half().contiguous()
        _write(path, result)
    tensors = load_file(path)
    return [tensors[key] for key in sorted(tensors)]


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.rename(path)  # so that an interrupted run leaves no file that looks complete
