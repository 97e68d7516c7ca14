# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Chooses PBC's θ and γ, and measures the indicator and the masks."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from modeling_alignzeg import AlignZegModel, AlignZegOutput, AlignZegProcessor
from modeling_alignzeg.readout_alignzeg import resize_matrix

from ..checkpoints import load_checkpoint
from ..data.benchmarks import open_part
from ..data.dataset import SegmentationDataset, check_dataset
from ..data.splits import SegmentationSplit, load_split
from ..files import atomic_write_text
from ..settings import DataSettings, Settings
from ..training.trainer import Trainer
from .evaluator import Readout, evaluate_model, evaluation_batches


GAMMAS = (0.5, 1.0, 2.0, 8.0)
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.9)


def calibrate(settings: Settings, folds: int = 1) -> dict[str, Any]:
    """Trains `folds` models, each without a part of the seen classes, and sweeps γ and θ on the validation part.

    The fraction of seen classes that is treated as unseen equals the fraction of unseen classes in the split, because the
    strength of the bias, and so the best correction, depends on the numbers of seen and unseen names.

    Returns:
        `gamma`, `threshold`, `hiou` with and without them on the pseudo-unseen classes (mean over folds), and `grid`.

    Raises:
        ValueError: `folds` is not positive, no class is unseen, or the validation part has too few classes for a score.
    """
    if folds < 1:
        raise ValueError(f"`folds` is {folds}; expected a whole number ≥ 1.")
    split = split_with_unseen(settings.data)
    share = len(split.unseen) / len(split.classes)
    grids = []
    for fold in range(folds):
        data = dataclasses.replace(settings.data, pseudo_unseen=share, pseudo_fold=fold)
        training = dataclasses.replace(
            settings.training, evaluate_every=0, save_every=0, tensorboard=False, trackio=False
        )
        output = str(Path(settings.output_dir) / f"calibration-{fold}")
        shutil.rmtree(output, ignore_errors=True)
        trainer = Trainer(dataclasses.replace(settings, output_dir=output, resume=False, data=data, training=training))
        if trainer.model.indicator is None:
            raise ValueError("`bias_correction` is off: a model without PBC has no indicator to calibrate.")
        validation = open_part(data, data.validation_part, data.num_validation)
        check_dataset(trainer.accelerator, validation, trainer.split)  # before hours of training
        trainer.run()
        model = trainer.accelerator.unwrap_model(trainer.network)
        grids.append(_grid(model, trainer.processor, trainer.split, data))
    return {**_best(grids, settings.data), "folds": folds, "pseudo_unseen_share": share}


def calibrate_models(settings: Settings, folders: list[str]) -> dict[str, Any]:
    """Sweeps γ and θ for trained models on the validation part, with its labels of the split's unseen classes.

    Returns:
        `gamma`, `threshold`, `hiou` with and without them (mean over models), and `grid`.

    Raises:
        ValueError: No class is unseen, a model has no indicator, or the validation part has too few classes for a score.
    """
    split = split_with_unseen(settings.data)
    loaded = [
        load_checkpoint(folder, "--models") for folder in folders
    ]  # all, so that a wrong name is found before the sweeps
    for folder, (model, _) in zip(folders, loaded):
        if model.indicator is None:
            raise ValueError(
                f"{folder} was trained without PBC (`bias_correction`): it has no indicator to calibrate."
            )
    grids = [_grid(model, processor, split, settings.data) for model, processor in loaded]
    return {**_best(grids, settings.data), "models": len(folders)}


def split_with_unseen(data: DataSettings) -> SegmentationSplit:
    """The split of `data`.

    Raises:
        ValueError: It has no unseen class.
    """
    split = load_split(data.split or data.dataset, context_459_ids=data.context_459_ids)
    if not split.unseen:
        raise ValueError(f"The split of {data.dataset} has no unseen class: there is no bias to correct.")
    return split


def _grid(
    model: AlignZegModel, processor: AlignZegProcessor, split: SegmentationSplit, data: DataSettings
) -> dict[str, float]:
    """hIoU on the validation part for all γ and θ, and without correction (`"off"`)."""
    readouts = {"off": Readout(gamma=0.0)}
    readouts |= {f"{g}/{t}": Readout(gamma=g, threshold=t) for g in GAMMAS for t in THRESHOLDS}
    part = SegmentationDataset(open_part(data, data.validation_part, data.num_validation), split, training=False)
    scores = evaluate_model(
        model,
        processor.image_processor,
        evaluation_batches(part, processor, 32),
        split,
        model.get_text_prototypes(processor, split.vocabulary),
        readouts,
        num_images=len(part),
    )
    return {name: value["hiou"] for name, value in scores.items()}


def _best(grids: list[dict[str, float]], data: DataSettings) -> dict[str, Any]:
    """The correction with the best mean over `grids`."""
    means = {name: float(np.mean([grid[name] for grid in grids])) for name in grids[0]}
    if any(math.isnan(mean) for mean in means.values()):
        raise ValueError(
            f"No correction can be chosen: the part {data.validation_part!r} has no pixel of the unseen classes, or of "
            "those treated as unseen, or none of the others. Raise `data.num_validation` or choose another part."
        )
    best = max(means, key=means.__getitem__)
    gamma, threshold = (0.0, 0.5) if best == "off" else map(float, best.split("/"))
    return {
        "gamma": gamma,
        "threshold": threshold,
        "hiou": means[best],
        "hiou_without_correction": means["off"],
        "grid": means,
    }


def store_correction(folder: str | Path, gamma: float, threshold: float) -> None:
    """Writes θ and γ into the checkpoint's processor_config.json, atomically."""
    path = Path(folder) / "processor_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["image_processor"] |= {"correction_gamma": gamma, "correction_threshold": threshold}
    atomic_write_text(path, json.dumps(config, indent=2) + "\n")


class BestProposal(NamedTuple):
    """The query that covers a class of an image best.

    Attributes:
        iou: IoU of its binary mask with the pixels of the class.
        is_unseen: Whether the class is unseen.
        unseen_probability: The indicator's probability for the query; `None` for a model without PBC.
    """

    iou: float
    is_unseen: bool
    unseen_probability: float | None


def best_proposals(outputs: AlignZegOutput, labels: list[Tensor], split: SegmentationSplit) -> list[BestProposal]:
    """For every class in an image, the query whose mask covers it best. The unclaimed region, which always counts as
    unseen, is left out.

    Args:
        outputs: Outputs of the model for the vocabulary of `split`.
        labels: Label maps `int64 (height, width)` of the batch.
    """
    assert outputs.masks_queries_logits is not None and outputs.content_sizes is not None
    assert outputs.queries_hidden_state is not None
    found = []
    queries = outputs.queries_hidden_state.shape[1]
    for index, label in enumerate(labels):
        masks = outputs.masks_queries_logits[index, :queries].float().cpu()
        sizes = zip(masks.shape[1:], label.shape, outputs.content_sizes[index].tolist())
        rows, columns = (resize_matrix(*axis) for axis in sizes)
        binary = (rows @ masks @ columns.T > 0).flatten(1)
        label = label.flatten()
        for class_id in label.unique().tolist():
            if class_id == split.ignore_index:
                continue
            target = label == class_id
            overlap = (binary & target).sum(1) / (binary | target).sum(1)
            best = int(overlap.argmax())
            logits = outputs.unseen_logits
            unseen = None if logits is None else float(logits[index, best].float().sigmoid())
            found.append(BestProposal(float(overlap[best]), class_id in split.unseen_ids, unseen))
    return found


def oracle_logits(outputs: AlignZegOutput, labels: list[Tensor], split: SegmentationSplit) -> Tensor:
    """Logits `(B, N)` of a perfect indicator, ±20: whether unseen classes have most of the labelled pixels of a proposal,
    weighted by its mask. Arguments as for [`best_proposals`]."""
    assert outputs.masks_queries_logits is not None and outputs.content_sizes is not None
    unseen_ids = torch.tensor(split.unseen_ids)
    found = []
    for masks, content, label in zip(outputs.masks_queries_logits, outputs.content_sizes.tolist(), labels):
        rows, columns = (resize_matrix(*axis) for axis in zip(masks.shape[1:], label.shape, content))
        weights = ((label != split.ignore_index).float(), torch.isin(label, unseen_ids).float())
        # The resize is linear, so the areas are sums over the mask grid.
        labelled, unseen = (masks.float().sigmoid().cpu().mul(rows.T @ each @ columns).sum((1, 2)) for each in weights)
        found.append(torch.where(unseen > labelled / 2, 20.0, -20.0))
    return torch.stack(found).to(outputs.masks_queries_logits.device)


def average_recall(proposals: list[BestProposal], is_unseen: bool) -> float:
    """Recall, in percent, of seen or unseen regions by the masks, mean over IoU ≥ 0.5, 0.55, …, 0.95 (COCO)."""
    overlaps = np.array([proposal.iou for proposal in proposals if proposal.is_unseen == is_unseen])
    return float(100 * np.mean(overlaps[:, None] >= np.arange(50, 100, 5) / 100)) if len(overlaps) else math.nan


def indicator_roc_auc(proposals: list[BestProposal]) -> float:
    """ROC-AUC of the indicator over regions of unseen against seen classes; NaN without one of both."""
    if len({proposal.is_unseen for proposal in proposals}) < 2:
        return math.nan
    return float(roc_auc_score([p.is_unseen for p in proposals], [p.unseen_probability for p in proposals]))


@torch.no_grad()
def indicator_auc(folder: str, settings: Settings, part: str) -> float:
    """[`indicator_roc_auc`] of a checkpoint on a part of the dataset."""
    split = split_with_unseen(settings.data)
    model, processor = load_checkpoint(folder)
    dataset = SegmentationDataset(open_part(settings.data, part, None), split, training=False)
    vocabulary = {
        "text_prototypes": model.get_text_prototypes(processor, split.vocabulary),
        "seen_class_mask": torch.tensor(split.seen_class_mask),
    }
    found = []
    for batch in evaluation_batches(dataset, processor, 32):
        outputs = model(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"], **vocabulary)
        found += best_proposals(outputs, batch["labels"], split)
    return indicator_roc_auc(found)
