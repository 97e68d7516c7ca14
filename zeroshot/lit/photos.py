# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Photographs with names or label maps, from parquet files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image


STRIDE = 32  # pixels per cell of the tower's last feature map
# Units of 0..1; the published weights were trained on (pixel - 127) / 128.
IMAGE_MEAN, IMAGE_STD = 127 / 255, 128 / 255


def read_photos(folder: str | Path, name: str) -> list[dict]:
    """The rows of `folder/name.parquet`: `name`, `image` (file contents) and, if present, `label`."""
    import pyarrow.parquet as pq

    path = Path(folder) / f"{name}.parquet"
    if not path.is_file():
        raise FileNotFoundError(
            f"`--photos` is {str(folder)!r}, which has no {path.name}; expected the folder of the project's photographs, "
            "described in its README.md."
        )
    columns = ("image", "label")
    return [
        {key: value["bytes"] if key in columns else value for key, value in row.items()}
        for row in pq.read_table(path).to_pylist()
    ]


def open_label(data: bytes) -> np.ndarray:
    """A label map, `int64 (height, width)`, from the bytes of a PNG."""
    return np.asarray(Image.open(io.BytesIO(data))).astype(np.int64)


def grid_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Columns and rows of cells for a photograph resized to `short_side`; the aspect ratio is at most 2:1."""
    scale = short_side / min(width, height)
    cells = short_side // STRIDE
    return tuple(min(2 * cells, max(cells, round(length * scale / STRIDE))) for length in (width, height))


def to_pixels(image: Image.Image, short_side: int) -> torch.Tensor:
    """`float32 (3, height, width)`, normalized, with sides that are multiples of 32, so that cells cover 32 x 32 pixels."""
    columns, rows = grid_size(*image.size, short_side)
    image = image.convert("RGB").resize((columns * STRIDE, rows * STRIDE), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    return (pixels / 255 - IMAGE_MEAN) / IMAGE_STD


def open_photo(data: bytes, short_side: int) -> torch.Tensor:
    """[`to_pixels`] for the contents of a file."""
    return to_pixels(Image.open(io.BytesIO(data)), short_side)
