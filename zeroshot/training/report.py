# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Reports during training: mean losses, figures of predictions, and curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from modeling_alignzeg import AlignZegModel, AlignZegProcessor, draw_overlay

from ..data.dataset import SegmentationDataset
from ..data.splits import SegmentationSplit
from ..files import atomic_file, atomic_write_text


SIDE, GAP, HEADER = 256, 8, 24  # layout of the figure of predictions, in pixels
TITLES = ("image", "ground truth", "prediction")


class RunningMeans:
    """Means of loss terms over the steps since the last call of [`take`].

    They are part of a checkpoint: after a resume, the first log entry covers the same steps as without interruption. It is
        bitwise equal with one process, and equal up to rounding with several.
    """

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names = names
        self.count = 0
        self.sums = torch.zeros(len(names), device=device)

    def add(self, terms: dict[str, Tensor]) -> None:
        """One step."""
        self.sums += torch.stack([terms[name] for name in self.names]).to(self.sums)
        self.count += 1

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Returns the means over steps and processes, and resets them; empty without steps. All processes call it."""
        if not self.count:
            return {}
        means = accelerator.reduce(self.sums / self.count, reduction="mean").tolist()
        self.sums, self.count = torch.zeros_like(self.sums), 0
        return dict(zip(self.names, means))

    def state(self, accelerator: Accelerator) -> dict[str, Any]:
        """The state for a checkpoint, the same on all processes, which call it together."""
        self.sums = accelerator.reduce(self.sums, reduction="mean")
        return {"count": self.count, "sums": dict(zip(self.names, self.sums.tolist()))}

    def load(self, state: dict[str, Any] | None) -> None:
        """Restores a [`state`]; without one, as in checkpoints of earlier versions, the means are reset."""
        if state is not None:
            self.count = state["count"]
            self.sums = torch.tensor([state["sums"].get(name, 0.0) for name in self.names]).to(self.sums)


def read_metrics(path: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics file up to `last_step`, without a truncated one."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, TypeError, KeyError):
            line = json.loads(text)
            if last_step is None or line["step"] <= last_step:
                lines.append(line)
    return lines


def forget_later_steps(path: Path, step: int) -> None:
    """Removes the lines after the last checkpoint from the metrics file of a killed run.

    These steps will be repeated and logged again. A truncated line is removed too.
    """
    if path.exists():
        atomic_write_text(path, "".join(f"{json.dumps(line)}\n" for line in read_metrics(path, step)))


@torch.no_grad()
def predict_samples(
    model: AlignZegModel,
    processor: AlignZegProcessor,
    samples: list[dict[str, Any]],
    split: SegmentationSplit,
    prototypes: Tensor,
) -> list[np.ndarray]:
    """Label maps of `samples` of a [`SegmentationDataset`], without PBC, like the scores during training."""
    was_training = model.training
    model.eval()
    seen = torch.tensor(split.seen_class_mask, device=model.device)
    labels = []
    for sample in samples:
        inputs = processor.image_processor(sample["image"], return_tensors="pt").to(model.device)
        outputs = model(**inputs, text_prototypes=prototypes, seen_class_mask=seen)
        size = sample["label"].shape
        label = processor.image_processor.post_process_semantic_segmentation(outputs, target_sizes=[size], gamma=0.0)
        labels.append(label[0].cpu().numpy())
    model.train(was_training)
    return labels


def choose_samples(dataset: SegmentationDataset, count: int) -> list[dict[str, Any]]:
    """At most `count` samples, evenly spaced in the dataset."""
    return [dataset[int(index)] for index in np.unique(np.linspace(0, len(dataset) - 1, count).astype(int))]


def draw_predictions(samples: list[dict[str, Any]], labels: list[np.ndarray], classes: list[str]) -> Image.Image:
    """A figure with one row per sample: the image, its ground truth and `labels`, with a legend of the classes that occur.
    Unlabelled pixels are grey."""
    rows = []
    for sample, label in zip(samples, labels):
        enlarge = max(1, -(-SIDE // max(label.shape)))  # so that the legend is readable
        pixels, *maps = (
            each.repeat(enlarge, 0).repeat(enlarge, 1)
            for each in (sample["image"], sample["label"].astype(np.int64), label)
        )
        image = Image.fromarray(pixels)
        overlays = [draw_overlay(image, each, classes, max_size=SIDE, other_name="unlabelled") for each in maps]
        image.thumbnail((SIDE, SIDE))
        rows.append((image, *overlays))
    widths = [max(row[column].width for row in rows) + GAP for column in range(len(TITLES))]
    heights = [max(picture.height for picture in row) + GAP for row in rows]
    sheet = Image.new("RGB", (sum(widths) + GAP, sum(heights) + HEADER), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, title in enumerate(TITLES):
        left = GAP + sum(widths[:column])
        draw.text((left, HEADER / 2), title, fill="black", font=font, anchor="lm")
        for row, pictures in enumerate(rows):
            sheet.paste(pictures[column], (left, HEADER + sum(heights[:row])))
    return sheet


def draw_curves(metrics: list[dict[str, Any]], path: Path) -> None:
    """Plots the losses, and the validation scores if there are any, over the steps into the file `path`."""
    from matplotlib.figure import Figure

    panels = {
        "loss": {"train/loss": "mean since the previous point"},
        "validation, %": {
            "validation/miou_seen": "mIoU(S)",
            "validation/miou_unseen": "mIoU(U)",
            "validation/hiou": "hIoU",
        },
    }
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels)), panels.items()):
        for name, label in curves.items():
            points = [(line["step"], line[name]) for line in metrics if name in line]
            axes.plot([step for step, _ in points], [value for _, value in points], marker=".", label=label)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=100)
