# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Quality of panoptic segments (PQ) and of instances (mask AP), for seen and unseen classes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from modeling_alignzeg import AlignZegImageProcessor, AlignZegOutput

from ..data.segments import TargetSegments
from ..data.splits import SegmentationSplit


IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
GROUPS = ("all", "seen", "unseen", "things", "stuff")
MAX_INSTANCES = 100  # per image and class, as in COCO's protocol


class PanopticQuality:
    """Panoptic quality, Kirillov et al., CVPR 2019, by the rules of COCO's panopticapi.

    A predicted segment matches a target of its class if their IoU, without unlabelled pixels, exceeds 0.5. Crowds match
    nothing. A predicted segment that lies mostly on unlabelled pixels and crowds of its class is not counted.

    Args:
        num_classes: Number of classes C.
    """

    def __init__(self, num_classes: int):
        self.sums = np.zeros((4, num_classes))  # IoU of matches, matches, false positives, false negatives

    def add(self, segmentation: np.ndarray, labels: Sequence[int], target: TargetSegments) -> None:
        """Adds an image: `segmentation (height, width)` has positions in `labels`, the segments' classes, or -1.

        Raises:
            ValueError: The sizes of `segmentation` and target differ.
        """
        if segmentation.shape != target.map.shape:
            raise ValueError(
                f"`segmentation` has shape {segmentation.shape}; expected that of the target, {target.map.shape}. Pass "
                "`target_sizes` to the post-processing."
            )
        predicted = np.asarray(labels, np.int64)
        columns, rows = len(predicted) + 1, len(target.labels) + 1
        pairs = (target.map + 1).astype(np.int64) * columns + segmentation + 1
        pixels = np.bincount(pairs.ravel(), minlength=rows * columns).reshape(rows, columns)
        areas, unlabelled, both = pixels[:, 1:].sum(0), pixels[0, 1:], pixels[1:, 1:]
        union = pixels[1:].sum(1, keepdims=True) + areas - unlabelled - both
        iou = both / np.maximum(union, 1)
        same = target.labels[:, None] == predicted
        matches = same & ~target.crowds[:, None] & (iou > 0.5)
        uncounted = unlabelled + (both * (same & target.crowds[:, None])).sum(0) > areas / 2
        for row, classes, values in (
            (0, target.labels, (iou * matches).sum(1)),
            (1, target.labels, matches.sum(1)),
            (2, predicted, ~matches.any(0) & ~uncounted),
            (3, target.labels, ~matches.any(1) & ~target.crowds),
        ):
            np.add.at(self.sums[row], classes, values)

    def scores(self, classes: np.ndarray) -> dict[str, float]:
        """PQ, SQ and RQ, 0 to 100: means over those of `classes`, `bool (C,)`, that occur in targets or predictions."""
        iou, matched, surplus, missed = self.sums
        occurs = classes & (self.sums[1:].sum(0) > 0)
        rq = matched[occurs] / (matched + surplus / 2 + missed / 2)[occurs]
        sq = iou[occurs] / np.maximum(matched[occurs], 1)
        means = {name: _percent(values) for name, values in (("pq", sq * rq), ("sq", sq), ("rq", rq))}
        return {**means, "classes": int(occurs.sum())}


class AveragePrecision:
    """Average precision of masks by COCO's protocol: 10 thresholds of IoU, 101 recalls, 100 instances per image and class.

    Instances that match only a crowd are not counted.
    """

    def __init__(self) -> None:
        # By class, one entry per image: scores (n,); outcomes (10, n): 1 matched, 0 not, -1 not counted.
        self.found: dict[int, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
        self.targets: Counter[int] = Counter()

    def add(self, masks: np.ndarray, labels: np.ndarray, scores: np.ndarray, target: TargetSegments) -> None:
        """Adds an image: instances `masks bool (N, height, width)`, classes `(N,)`, scores `(N,)`; all segments of
        `target` are instances."""
        flat = masks.reshape(len(masks), target.map.size).astype(np.float32)
        goals = target.map.reshape(1, -1) == np.arange(len(target.labels))[:, None]
        both = flat @ goals.T.astype(np.float32)
        areas = flat.sum(1, keepdims=True)
        union = np.where(target.crowds, areas, areas + goals.sum(1) - both)
        iou = both / np.maximum(union, 1)
        self.targets.update(target.labels[~target.crowds].tolist())
        for label in np.unique(labels).tolist():
            of_class = target.labels == label
            ranked = np.flatnonzero(labels == label)
            ranked = ranked[np.argsort(-scores[ranked], kind="stable")][:MAX_INSTANCES]
            single, crowd = (iou[ranked][:, of_class & which] for which in (~target.crowds, target.crowds))
            self.found[label].append((scores[ranked], _outcomes(single, crowd)))

    @classmethod
    def merged(cls, parts: Iterable[AveragePrecision]) -> AveragePrecision:
        """All images of `parts`, such as those of several processes."""
        result = cls()
        for part in parts:
            result.targets.update(part.targets)
            for label, images in part.found.items():
                result.found[label] += images
        return result

    def scores(self, classes: Sequence[int]) -> dict[str, float]:
        """AP over all thresholds and at 0.5, 0 to 100: means over those of `classes` that occur in targets."""
        occurring = [label for label in classes if self.targets[label]]
        values = np.array([self._precisions(label) for label in occurring]).reshape(-1, len(IOU_THRESHOLDS))
        return {"ap": _percent(values), "ap50": _percent(values[:, 0]), "classes": len(occurring)}

    def _precisions(self, label: int) -> np.ndarray:
        """Average precision of a class at each threshold, `(10,)`."""
        if not self.found[label]:
            return np.zeros(len(IOU_THRESHOLDS))
        scores, outcomes = (np.concatenate(parts, -1) for parts in zip(*self.found[label]))
        outcomes = outcomes[:, np.argsort(-scores, kind="stable")]
        matched, counted = (outcomes == 1).cumsum(1), (outcomes >= 0).cumsum(1)
        precision = matched / np.maximum(counted, 1)
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        precision = np.pad(precision, ((0, 0), (0, 1)))  # 0 beyond the highest recall
        places = [np.searchsorted(row / self.targets[label], RECALLS) for row in matched]
        return np.array([row[place].mean() for row, place in zip(precision, places)])


def _outcomes(single: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Matches instances, best first, to the free target with the highest IoU; arguments `(n, targets)`, see `found`."""
    outcomes = np.zeros((len(IOU_THRESHOLDS), len(single)), np.int8)
    for row, threshold in zip(outcomes, IOU_THRESHOLDS):
        free = single.copy()
        for place, values in enumerate(free):
            if values.size and values.max() >= threshold:
                row[place] = 1
                free[:, values.argmax()] = -1
            elif crowd.size and crowd[place].max() >= threshold:
                row[place] = -1
    return outcomes


def _percent(values: np.ndarray) -> float:
    return 100 * float(values.mean()) if values.size else float("nan")


class SegmentEvaluator:
    """Scores the panoptic and instance post-processing of a model.

    Panoptic segments of stuff are fused. Instances are those of thing classes, with any score. Class-agnostic AP treats all
    thing classes as one.

    Args:
        split: The classes.
        things: `bool (C,)`; the others are stuff.
        target_of: Gives the target of an image by its name.
        gamma, threshold: PBC's γ and θ; `None`: the checkpoint's.
        score_threshold: `threshold` of the panoptic post-processing, 0 to 1.
    """

    def __init__(
        self,
        split: SegmentationSplit,
        things: np.ndarray,
        target_of: Callable[[str], TargetSegments],
        gamma: float | None = None,
        threshold: float | None = None,
        score_threshold: float = 0.5,
    ):
        self.split, self.things, self.target_of = split, things, target_of
        self.correction = {"gamma": gamma, "correction_threshold": threshold}
        self.score_threshold = score_threshold
        self.quality = PanopticQuality(len(things))
        self.precision, self.agnostic = AveragePrecision(), AveragePrecision()

    def add(self, processor: AlignZegImageProcessor, outputs: AlignZegOutput, names: Sequence[str]) -> None:
        """Adds a batch of images with these names."""
        targets = [self.target_of(name) for name in names]
        options: dict[str, Any] = {"target_sizes": [target.map.shape for target in targets], **self.correction}
        panoptic = processor.post_process_panoptic_segmentation(
            outputs, self.score_threshold, label_ids_to_fuse=set(np.flatnonzero(~self.things).tolist()), **options
        )
        instances = processor.post_process_instance_segmentation(outputs, 0.0, return_binary_maps=True, **options)
        for target, segments, found in zip(targets, panoptic, instances):
            classes = [info["label_id"] for info in segments["segments_info"]]
            self.quality.add(segments["segmentation"].cpu().numpy() - 1, classes, target)
            infos = found["segments_info"]
            masks = found["segmentation"].cpu().numpy()
            labels = np.array([info["label_id"] for info in infos], np.int64)
            scores = np.array([info["score"] for info in infos], np.float64)
            kept = self.things[labels]
            masks, labels, scores = masks[kept], labels[kept], scores[kept]
            target = target.only(self.things)
            self.precision.add(masks, labels, scores, target)
            self.agnostic.add(masks, 0 * labels, scores, target._replace(labels=0 * target.labels))

    def scores(self, accelerator=None) -> dict[str, Any]:
        """Scores over all processes, 0 to 100; nan for a group without classes that occur.

        Returns:
            - **score_threshold** -- of the panoptic segments.
            - **panoptic** -- `pq`, `sq`, `rq` and `classes` of each group of classes, see [`PanopticQuality.scores`].
            - **instances** -- `ap`, `ap50` and `classes` of things, see [`AveragePrecision.scores`].
        """
        quality, precision, agnostic = self.quality, self.precision, self.agnostic
        if accelerator is not None and accelerator.num_processes > 1:
            shares = gather_object([(quality.sums, precision, agnostic)])
            quality = PanopticQuality(len(self.things))
            quality.sums = np.sum([sums for sums, _, _ in shares], axis=0)
            precision, agnostic = (AveragePrecision.merged(parts) for parts in list(zip(*shares))[1:])
        unseen = np.isin(np.arange(len(self.things)), list(self.split.unseen_ids))
        groups = dict(zip(GROUPS, (np.ones_like(unseen), ~unseen, unseen, self.things, ~self.things)))
        instances = {
            name: precision.scores(np.flatnonzero(groups[name] & self.things).tolist()) for name in GROUPS[:3]
        }
        return {
            "score_threshold": self.score_threshold,
            "panoptic": {name: quality.scores(classes) for name, classes in groups.items()},
            "instances": {**instances, "class_agnostic": agnostic.scores([0])},
        }


def format_segments(scores: dict[str, Any]) -> str:
    """The scores in two lines."""
    quality = [f"PQ({name}) {scores['panoptic'][name]['pq']:.1f}" for name in GROUPS]
    instances = [
        f"AP({name}) {group['ap']:.1f} AP50 {group['ap50']:.1f}" for name, group in scores["instances"].items()
    ]
    return "  ".join(quality) + "\n" + "  ".join(instances)
