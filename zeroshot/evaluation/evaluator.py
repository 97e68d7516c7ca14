# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Evaluation in the generalized label space: every labelled pixel is assigned one of all seen and unseen classes."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm

from modeling_alignzeg import AlignZegImageProcessor, AlignZegModel, AlignZegOutput, AlignZegProcessor
from modeling_alignzeg.readout_alignzeg import View, class_scores, image_view, label_map

from ..data.dataset import SegmentationDataset
from ..data.splits import SegmentationSplit
from ..data.statistics import occurring
from ..metrics.hiou.scoring import confusion_matrix, scores_from_confusion
from .intervals import Bootstrap
from .options import check_correction
from .segments import SegmentEvaluator
from .test_time_augmentation import Augmentation


@dataclass(frozen=True)
class Readout:
    """Read-out of label maps from a forward pass.

    Attributes:
        gamma, threshold: PBC's γ and θ; `gamma=0` disables PBC, `None` uses the checkpoint's values.
        seen_penalty: Constant subtracted from the scores of all seen classes: the blind correction of earlier work.

    Raises:
        ValueError: A value is out of range.
    """

    gamma: float | None = None
    threshold: float | None = None
    seen_penalty: float = 0.0

    def __post_init__(self) -> None:
        check_correction(self.gamma, self.threshold)
        if not math.isfinite(self.seen_penalty):
            raise ValueError(f"`seen_penalty` is {self.seen_penalty}; expected a number.")


class Evaluator:
    """Accumulates confusion matrices of several readouts of the same forward passes.

    Args:
        split: Classes of the dataset, which define the ids in label maps.
        readouts: Readouts by name.
        bootstrap_seed: Seed of the confidence intervals, different for each process; default: no intervals.
    """

    def __init__(
        self,
        split: SegmentationSplit,
        readouts: dict[str, Readout],
        device: torch.device | str = "cpu",
        bootstrap_seed: int | None = None,
    ):
        self.split = split
        self.readouts = readouts
        classes = len(split.classes)
        self.matrices = {name: torch.zeros(classes, classes, dtype=torch.int64, device=device) for name in readouts}
        self.bootstraps = {}
        if bootstrap_seed is not None:
            self.bootstraps = {name: Bootstrap(classes, bootstrap_seed) for name in readouts}

    def add(
        self,
        processor: AlignZegImageProcessor,
        outputs: AlignZegOutput,
        labels: list[Tensor],
        images: Any = None,
        classes: Tensor | None = None,
    ) -> None:
        """Adds a batch: `labels` are its label maps `int64 (height, width)`, each at its original size. Predictions are
        refined with `images`. They are indices into `classes`, if the model chose only among these."""
        sizes = [(label.shape[0], label.shape[1]) for label in labels]
        groups: dict[tuple[float | None, float | None], dict[str, float]] = {}
        for name, readout in self.readouts.items():
            groups.setdefault((readout.gamma, readout.threshold), {})[name] = readout.seen_penalty
        for (gamma, threshold), penalties in groups.items():
            convert = partial(
                processor.post_process_semantic_segmentation, outputs, sizes, gamma=gamma, threshold=threshold
            )
            if images is not None or len(penalties) == 1:
                found = {name: convert(seen_penalty=value, images=images) for name, value in penalties.items()}
            else:  # several constants on the same scores
                assert outputs.seen_class_mask is not None
                seen = outputs.seen_class_mask[0].float()
                table = processor.proposal_probabilities(outputs, gamma=gamma, threshold=threshold)[..., :-1]
                views = [
                    image_view(outputs, index, table[index], size, processor.dense_weight)
                    for index, size in enumerate(sizes)
                ]
                scores = [class_scores(view, torch.zeros_like(seen)) for view in views]
                found = {
                    name: [(each - value * seen[:, None, None]).argmax(0) for each in scores]
                    for name, value in penalties.items()
                }
            for name, maps in found.items():
                for prediction, label in zip(maps, labels):
                    self._count(name, prediction if classes is None else classes[prediction], label)

    def add_views(self, views: list[list[View]], label: Tensor) -> None:
        """Adds an image by its `views`, which have one table of probabilities per readout, in the same order."""
        seen = torch.tensor(self.split.seen_class_mask, dtype=torch.float32)
        for index, (name, readout) in enumerate(self.readouts.items()):
            self._count(name, label_map(views[index], readout.seen_penalty * seen), label)

    def _count(self, name: str, prediction: Tensor, label: Tensor) -> None:
        matrix = confusion_matrix(
            prediction, label.to(prediction.device), len(self.split.classes), self.split.ignore_index
        )
        self.matrices[name] += matrix.to(self.matrices[name].device)
        if name in self.bootstraps:
            self.bootstraps[name].add(matrix)

    def scores(self, accelerator=None) -> dict[str, dict[str, Any]]:
        """Scores per readout, over all processes."""
        results: dict[str, dict[str, Any]] = {}
        for name, matrix in self.matrices.items():
            total = accelerator.reduce(matrix, reduction="sum") if accelerator is not None else matrix
            results[name] = scores_from_confusion(total.cpu(), self.split.unseen_ids, self.split.classes)
            occurs = total.cpu().sum(1) > 0
            results[name]["unseen_occurring"] = sum(bool(occurs[i]) for i in self.split.unseen_ids)
            results[name]["unseen_total"] = len(self.split.unseen_ids)
            if name in self.bootstraps:
                results[name]["intervals"] = self.bootstraps[name].intervals(self.split.unseen_ids, accelerator)
        return results


def _place(accelerator) -> tuple[int, int]:
    """Index of this process, and the number of processes."""
    return (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)


def evaluation_batches(
    dataset: SegmentationDataset,
    processor: AlignZegProcessor,
    batch_size: int,
    accelerator=None,
    shortest_edge: int | None = None,
):
    """Batches for `evaluate_model`: images of equal size, with label maps at their original size; each process gets its
    share.

    `shortest_edge` overrides the image processor's size.
    """
    resize = {} if shortest_edge is None else {"size": {"shortest_edge": shortest_edge}}
    rank, world = _place(accelerator)

    def flush(samples):
        inputs = processor.image_processor([s["image"] for s in samples], return_tensors="pt", **resize)
        return {
            **inputs,
            "labels": [torch.from_numpy(s["label"]) for s in samples],
            "names": [s["name"] for s in samples],
            "images": [s["image"] for s in samples],
        }

    waiting: list[dict[str, Any]] = []
    for index in range(rank, len(dataset), world):
        sample = dataset[index]
        if waiting and (len(waiting) == batch_size or waiting[0]["image"].shape != sample["image"].shape):
            yield flush(waiting)
            waiting = []
        waiting.append(sample)
    if waiting:
        yield flush(waiting)


def present_classes(labels: list[Tensor], split: SegmentationSplit) -> Tensor:
    """Ids of the classes that occur in label maps, `int64`, ascending."""
    ids = torch.cat([label.flatten() for label in labels]).unique()
    return ids[ids != split.ignore_index].long()


@torch.no_grad()
def evaluate_model(
    model: AlignZegModel,
    image_processor: AlignZegImageProcessor,
    batches: Iterable[dict[str, Any]],
    split: SegmentationSplit,
    text_prototypes: Tensor,
    readouts: dict[str, Readout] | None = None,
    accelerator=None,
    progress: bool = True,
    augmentation: Augmentation | None = None,
    num_images: int | None = None,
    refine: bool = False,
    only_present: bool = False,
    intervals: bool = False,
    segments: SegmentEvaluator | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores of `model` on `batches`, by readout.

    Args:
        batches: Each a dictionary of `pixel_values`, `pixel_mask` and `labels`, the list of label maps; with `refine` also
            `images`.
        text_prototypes: `(C, D)`, one per class of `split`.
        augmentation: Test-time augmentation; default: none.
        num_images: Number of images in the `batches` of all processes, for the progress bar.
        refine: Align class borders with edges in the image; without `augmentation`.
        only_present: Choose only among the classes in the label maps of the batch. With a batch size of 1, this simulates a
            user who types the names of the classes in the image. Without `augmentation`.
        intervals: Add `intervals`, 95 % intervals of the scores by a bootstrap over images.
        segments: Add all images, by the `names` of the `batches`, to this evaluator too. Without `augmentation` and
            `only_present`.
    """
    was_training = model.training
    model.eval()
    device = model.device
    seen = torch.tensor(split.seen_class_mask, device=device)
    vocabulary = {"text_prototypes": text_prototypes, "seen_class_mask": seen}
    rank, world = _place(accelerator)
    evaluator = Evaluator(split, readouts or {"default": Readout()}, device, rank if intervals else None)
    share = None if num_images is None else len(range(rank, num_images, world))
    bar = tqdm(total=share, desc="evaluate", unit="image", leave=False, disable=not progress)
    for batch in batches:
        pixel_values, pixel_mask = batch["pixel_values"].to(device), batch["pixel_mask"].to(device)
        if augmentation is None:
            classes = present_classes(batch["labels"], split).to(device) if only_present else None
            if classes is not None and not len(classes):  # nothing is labelled
                continue
            chosen = vocabulary if classes is None else {name: rows[classes] for name, rows in vocabulary.items()}
            outputs = model(pixel_values=pixel_values, pixel_mask=pixel_mask, **chosen)
            evaluator.add(image_processor, outputs, batch["labels"], batch["images"] if refine else None, classes)
            if segments is not None:
                segments.add(image_processor, outputs, batch["names"])
            bar.update(len(batch["labels"]))
            continue
        corrections = [(readout.gamma, readout.threshold) for readout in evaluator.readouts.values()]
        for image, mask, label in zip(pixel_values, pixel_mask, batch["labels"]):
            image = image[:, : int(mask.any(1).sum()), : int(mask.any(0).sum())]
            views = augmentation.views(model, image_processor, image, tuple(label.shape), corrections, **vocabulary)
            evaluator.add_views(views, label)
            bar.update()
    bar.close()
    model.train(was_training)
    return evaluator.scores(accelerator)


def library_versions() -> dict[str, str]:
    """Versions for a report."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }


def without_nan(value: Any) -> Any:
    """A report in which nan, such as the IoU of a class that never occurs, is `None`, because JSON has no nan."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    return None if isinstance(value, float) and value != value else value


def format_scores(scores: dict[str, Any]) -> str:
    """The scores in one line, with the number of unseen classes that occur if some do not."""
    present, total = (scores.get(f"unseen_{what}", 0) for what in ("occurring", "total"))
    note = f" ({occurring(present, total)} in these images)" if present < total else ""
    return (
        f"mIoU(S) {scores['miou_seen']:.1f}  mIoU(U) {scores['miou_unseen']:.1f}{note}  hIoU {scores['hiou']:.1f}  "
        f"pAcc {scores['pixel_accuracy']:.1f}"
    )
