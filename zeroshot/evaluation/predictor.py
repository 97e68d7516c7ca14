# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Predicts label maps for images of a dataset, with reading and encoding in parallel to the model."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from modeling_alignzeg import AlignZegModel, AlignZegOutput, AlignZegProcessor
from modeling_alignzeg.images_alignzeg import count_labels

from ..data.benchmarks import NAMED_BENCHMARKS
from ..data.images import decode_image, label_picture, open_image
from .options import Vocabulary, check_correction
from .shards import FEATURES, FORMATS


@dataclass(frozen=True)
class BulkSettings:
    """Settings of bulk prediction.

    Attributes:
        dataset: A named benchmark, a hub id or a local folder; see `zeroshot.data.benchmarks.load_benchmark`.
        part: Part of the dataset.
        root: Folder of a named benchmark's files.
        image_column: Column of images, if `dataset` is not a named benchmark.
        streaming: Stream a hub id or folder without downloading or indexing it first. Its files are divided among the
            processes; with fewer files than processes, each process reads all and keeps its share.
        limit: Use only the first N images.
        shard_size: Images per shard. After a kill, each process repeats at most one shard.
        output_format: `"parquet"` or `"png"`.
        batch_size: Images per forward pass.
        num_threads: Threads that read and encode images while the model runs.
        gamma, threshold, none_of_these: As in `post_process_semantic_segmentation`.

    Raises:
        ValueError: A value is out of range, or two contradict each other.
    """

    dataset: str
    part: str = "train"
    root: str | None = None
    image_column: str = "image"
    streaming: bool = False
    limit: int | None = None
    shard_size: int = 1000
    output_format: str = "parquet"
    batch_size: int = 8
    num_threads: int = 2
    gamma: float | None = None
    threshold: float | None = None
    none_of_these: bool = False

    def __post_init__(self) -> None:
        for name in ("limit", "shard_size", "batch_size", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}; expected a positive number.")
        check_correction(self.gamma, self.threshold)
        if self.output_format not in FORMATS:
            raise ValueError(f"`output_format` is {self.output_format!r}; expected {' or '.join(FORMATS)}.")
        if self.streaming and self.is_named:
            raise ValueError(f"`streaming` is on, but {self.dataset} is a folder on disk; switch it off.")

    @property
    def is_named(self) -> bool:
        return self.dataset in (*NAMED_BENCHMARKS, "embedded_scenes")


class Predictor:
    """Converts images to rows of [`FEATURES`], with reading and encoding in parallel to the model."""

    def __init__(
        self,
        model: AlignZegModel,
        processor: AlignZegProcessor,
        vocabulary: Vocabulary,
        settings: BulkSettings,
        accelerator: Accelerator,
    ):
        self.model = model
        self.processor = processor
        self.names = vocabulary.names
        self.prototypes = vocabulary.prototypes
        self.seen = torch.tensor([name not in vocabulary.unseen for name in vocabulary.names], device=model.device)
        self.settings = settings
        self.accelerator = accelerator

    def predict(
        self, rows: Iterable[tuple[int, dict[str, Any]]], pool: ThreadPoolExecutor, bar: tqdm | None = None
    ) -> list[dict[str, Any]]:
        """Results in the order of `rows`, pairs of index and row. `pool` reads and encodes."""
        rows = iter(rows)
        waiting: deque[Future] = deque()
        encoded: list[Future] = []
        while True:
            while len(waiting) <= self.settings.num_threads and (part := list(islice(rows, self.settings.batch_size))):
                waiting.append(pool.submit(self.read, part))
            if not waiting:
                return [future.result() for future in encoded]
            results, sizes, inputs = waiting.popleft().result()
            maps = iter(self.read_out(self.forward(inputs), sizes) if sizes else [])
            for result in results:
                label, unseen = (None, None) if result["error"] is not None else next(maps)
                encoded.append(pool.submit(self.encode, result, label, unseen))
                if result["error"] is not None:
                    tqdm.write(f"Broken: {result['error']}")
            if bar is not None:
                bar.update(len(results))

    def read(self, rows: list[tuple[int, dict[str, Any]]]) -> tuple[list[dict[str, Any]], list[tuple[int, int]], Any]:
        """Results without label maps, the sizes of the readable images, and the model inputs of these images."""
        images, results = [], []
        for index, row in rows:
            result: dict[str, Any] = {**dict.fromkeys(FEATURES), "index": index, "name": _name(row, index)}
            try:
                image = _open_row(row, result["name"])
                images.append(image)
                result |= {"height": image.height, "width": image.width}
            except (ValueError, FileNotFoundError) as error:  # not other errors of the disk, which may pass
                result["error"] = str(error)
            results.append(result)
        inputs = self.processor(images=images, return_tensors="pt") if images else None
        return results, [(image.height, image.width) for image in images], inputs

    @torch.no_grad()
    def forward(self, inputs: Any) -> AlignZegOutput:
        """The model's outputs for the inputs of a batch."""
        with self.accelerator.autocast():
            return self.model(
                **inputs.to(self.model.device), text_prototypes=self.prototypes, seen_class_mask=self.seen
            )

    def read_out(self, outputs: AlignZegOutput, sizes: list[tuple[int, int]]) -> list[tuple[np.ndarray, float | None]]:
        """Label maps at the images' sizes, and their mean unseen scores."""
        maps, unseen = self.processor.post_process_semantic_segmentation(
            outputs,
            target_sizes=sizes,
            gamma=self.settings.gamma,
            threshold=self.settings.threshold,
            none_of_these=self.settings.none_of_these,
            return_unseen_scores=True,
        )
        means = [None] * len(maps) if unseen is None else [scores.mean().item() for scores in unseen]
        return [(label.cpu().numpy(), mean) for label, mean in zip(maps, means)]

    def encode(self, result: dict[str, Any], label: np.ndarray | None, unseen: float | None) -> dict[str, Any]:
        """A result with its label map as PNG and its statistics; unchanged without a label map."""
        if label is None:
            return result
        counts = count_labels(label, len(self.names))
        class_ids = counts.nonzero()[0]
        buffer = io.BytesIO()
        label_picture(label, self.names).save(buffer, "PNG")
        return result | {
            "label_map": {"bytes": buffer.getvalue(), "path": f"{result['index']:09d}.png"},
            "class_ids": class_ids.tolist(),
            "coverage": (counts[class_ids] / label.size).tolist(),
            "unseen_score": unseen,
        }


def _name(row: dict[str, Any], index: int) -> str:
    path = (row["image"] or {}).get("path")
    return row.get("name") or (Path(path).stem if path else f"{index:08d}")


def _open_row(row: dict[str, Any], name: str) -> Image.Image:
    value = row["image"]
    if value is None or (value["bytes"] is None and not value["path"]):
        raise ValueError(f"{name} is missing: the dataset has no image in this row.")
    if value["bytes"] is not None:
        return decode_image(value["bytes"], value["path"] or name)
    if "://" not in value["path"]:
        return open_image(value["path"])
    with datasets.utils.file_utils.xopen(value["path"], "rb") as file:
        return decode_image(file.read(), value["path"])
