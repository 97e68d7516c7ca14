# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Converts model outputs to label maps, panoptic segments and instances: the part of the image processor after the model.

The computation is in readout_alignzeg.py; this file checks arguments and builds the results.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_utils import ImageInput, PILImageResampling

from .checks_alignzeg import check_tensor
from .images_alignzeg import flatten_images, to_planes
from .readout_alignzeg import (
    REFINED_PIXELS,
    View,
    class_probabilities,
    class_scores,
    image_view,
    instance_segments,
    label_map,
    panoptic_segments,
    refined_map,
    run_lengths,
    unseen_scores,
)


LARGEST_MAP = 2**31  # pixels of a label map: 16 GiB


class AlignZegPostProcessing:
    """Mixin of [`AlignZegImageProcessor`] for post-processing; its attributes are the defaults of the correction."""

    correction_gamma: float
    correction_threshold: float
    correction_on_scores: bool
    dense_weight: float

    @torch.no_grad()
    def proposal_probabilities(
        self,
        outputs: Any,
        seen_class_mask: torch.Tensor | None = None,
        gamma: float | None = None,
        threshold: float | None = None,
    ) -> torch.Tensor:
        """Class probabilities of all proposals after predictive bias correction, `(batch, queries, classes + 1)` with the
        background last. Arguments and errors as for [`post_process_semantic_segmentation`]."""
        _, classes = _check_outputs(outputs)
        seen_class_mask = _check_seen_class_mask(outputs, classes, seen_class_mask)
        unseen_logits = getattr(outputs, "unseen_logits", None)
        is_given = gamma is not None
        gamma = _number("gamma", gamma if is_given else self.correction_gamma)
        if is_given and gamma and (seen_class_mask is None or unseen_logits is None):
            missing = "`outputs.unseen_logits` (a model with PBC)" if unseen_logits is None else "`seen_class_mask`"
            raise ValueError(f"`gamma` is {gamma} and needs {missing}; `seen_penalty` works without the indicator.")
        if gamma < 0:
            raise ValueError(f"`gamma` is {gamma}; expected a number ≥ 0.")
        threshold = check_share("threshold", self.correction_threshold if threshold is None else threshold)
        return class_probabilities(
            outputs.class_queries_logits,
            unseen_logits,
            seen_class_mask,
            gamma,
            threshold,
            bool(self.correction_on_scores),
        )

    @torch.no_grad()
    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: list[tuple[int, int]] | torch.Tensor | None = None,
        return_segmentation_scores: bool = False,
        *,
        seen_class_mask: torch.Tensor | None = None,
        gamma: float | None = None,
        threshold: float | None = None,
        seen_penalty: float = 0.0,
        none_of_these: bool = False,
        none_index: int = -1,
        return_unseen_scores: bool = False,
        images: ImageInput | None = None,
    ) -> list[torch.Tensor] | list[SemanticSegmentationPostProcessorOutput] | tuple[list, list[torch.Tensor] | None]:
        r"""
        Converts model outputs to label maps of the images' own sizes.

        `score(class, pixel) = Σ_n p(class|n) · σ(mask_n(pixel))`, without the background, is computed on the mask grid,
        combined with the cells of a convolutional tower (`dense_weight`) and resized bilinearly; the best class wins. No
        network runs here: call it again on the same outputs with another `gamma` or `target_sizes`.

        Args:
            outputs: [`AlignZegOutput`]. Uses `masks_queries_logits`, `class_queries_logits`, and, if present,
                `unseen_logits`, `dense_logits`, `seen_class_mask` and `content_sizes`.
            target_sizes: (height, width) of each upright image, at most 2**31 pixels. Without it, the maps have the size
                of the mask grid, padding included.
            return_segmentation_scores: Also return the scores of all classes at full size, float32 (classes, height,
                width).
            seen_class_mask: (classes,), bool; True for classes seen in training. Default: `outputs.seen_class_mask`.
            gamma: Amount by which the logits of seen classes are lowered in proposals that look unseen; 0 disables the
                correction. Default: `correction_gamma`.
            threshold: Proposals whose probability of being unseen exceeds it are corrected, 0 to 1. Default:
                `correction_threshold`.
            seen_penalty: Constant subtracted from the scores of all seen classes at every pixel: the blind baseline of
                ZegCLIP (Zhou et al., CVPR 2023). Use it with `gamma=0`.
            none_of_these: Include the background among the candidates; its pixels get `none_index`.
            none_index: Label of pixels that are none of the classes.
            return_unseen_scores: Also return unseen scores per pixel, `Σ_n u_n·σ(mask_n) / Σ_n σ(mask_n)` with
                `u_n = σ(unseen_logits_n)`.
            images: The images at their target sizes; class borders are aligned with their edges ([`refine_scores`]).
                Returned scores are not refined.

        Returns:
            A list of int64 label maps (height, width), on the device of `outputs`; with `return_segmentation_scores` a
            list of [`SemanticSegmentationPostProcessorOutput`]. With `return_unseen_scores`, a pair: that list, and a list
            of float32 maps (height, width), 0 to 1, or `None` if `outputs` have no `unseen_logits`.

        Raises:
            ValueError: `target_sizes` does not match the batch, an argument is out of range, or it needs values that
                `outputs` do not contain.
        """
        batch_size, classes = _check_outputs(outputs)
        targets = _check_target_sizes(target_sizes, batch_size) or [None] * batch_size
        seen_class_mask = _check_seen_class_mask(outputs, classes, seen_class_mask)
        penalty = _penalties(seen_penalty, seen_class_mask, classes).to(outputs.class_queries_logits.device)
        _check_none_index(none_index, classes)
        guides = None if images is None else _check_guides(images, _check_target_sizes(target_sizes, batch_size))
        probabilities = self.proposal_probabilities(outputs, seen_class_mask, gamma, threshold)
        unseen_logits = getattr(outputs, "unseen_logits", None)
        competing = classes + 1 if none_of_these else classes

        segmentations, unseen_maps = [], []
        for index in range(batch_size):
            view = image_view(outputs, index, probabilities[index], targets[index], self.dense_weight)
            labels = label_map([view.classes(competing)], penalty[:competing])
            if guides is not None:
                labels = self._refined(outputs, index, probabilities[index], labels, guides[index], penalty)
            labels = labels.masked_fill_(labels == classes, none_index)
            if return_segmentation_scores:
                scores = class_scores(view.classes(classes), penalty[:classes])
                labels = SemanticSegmentationPostProcessorOutput(
                    {"segmentation": labels, "segmentation_scores": scores}
                )
            segmentations.append(labels)
            if return_unseen_scores and unseen_logits is not None:
                unseen_maps.append(unseen_scores(view, unseen_logits[index]))
        if return_unseen_scores:
            return segmentations, unseen_maps or None
        return segmentations

    def _refined(
        self,
        outputs: Any,
        index: int,
        probabilities: torch.Tensor,
        labels: torch.Tensor,
        guide: Image.Image,
        penalty: torch.Tensor,
    ) -> torch.Tensor:
        """One label map of [`post_process_semantic_segmentation`], refined at a few pixels per mask cell."""
        sizes = getattr(outputs, "content_sizes", None)
        cells = outputs.masks_queries_logits.shape[-2:] if sizes is None else sizes[index].tolist()
        size = tuple(min(side, math.ceil(REFINED_PIXELS * count)) for side, count in zip(labels.shape, cells))
        if guide.size != size[::-1]:
            guide = guide.resize(size[::-1], PILImageResampling.BOX)
        image = torch.from_numpy(np.asarray(guide, dtype=np.float32) / 255).permute(2, 0, 1).to(labels.device)
        view = image_view(outputs, index, probabilities, size, self.dense_weight)
        return refined_map(view, labels, image, penalty)

    @torch.no_grad()
    def post_process_panoptic_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        label_ids_to_fuse: set[int] | None = None,
        target_sizes: list[tuple[int, int]] | torch.Tensor | None = None,
        *,
        seen_class_mask: torch.Tensor | None = None,
        gamma: float | None = None,
        correction_threshold: float | None = None,
    ) -> list[dict[str, Any]]:
        r"""
        Converts model outputs to segments that do not overlap, in the format of [`Mask2FormerImageProcessor`].

        A pixel belongs to the proposal with the greatest `p(class|n) · σ(mask_n(pixel))`. Proposals whose best class is the
        background are left out, so `label_id` is always one of the classes. The unclaimed region, the last proposal of a
        model with `config.unclaimed_proposal`, is one stuff segment and may consist of several pieces. The cells of a
        convolutional tower are not used. AlignZeg learns one mask per class and image, so objects of one class are
        separated only if the proposals separate them.

        Args:
            outputs: See [`post_process_semantic_segmentation`].
            threshold: Proposals whose best class has at most this probability are dropped, 0 to 1.
            mask_threshold: Pixels with a lower mask value are not in the segment, 0 to 1.
            overlap_mask_area_threshold: A segment that keeps no more than this share of its mask is dropped, 0 to 1. Unlike
                in Mask2Former, its pixels go to the others, and of several dropped because of each other, one may stay.
            label_ids_to_fuse: Classes whose segments are fused into one per image, such as grass and sky.
            target_sizes: See [`post_process_semantic_segmentation`].
            seen_class_mask, gamma: See [`post_process_semantic_segmentation`].
            correction_threshold: `threshold` of [`post_process_semantic_segmentation`].

        Returns:
            For each image a dictionary:

            - **segmentation** -- int32 (height, width): ids of segments; 0 where there is none.
            - **segments_info** -- for each segment `id` (from 1 on), `label_id`, `was_fused` (whether the class is one of
              `label_ids_to_fuse`) and `score`, the probability of the class, of a fused segment the highest of its parts.

        Raises:
            ValueError: an argument is out of range or does not match `outputs`.
        """
        _, classes = _check_outputs(outputs)
        fused = _check_label_ids(label_ids_to_fuse, classes)
        thresholds = self._thresholds(threshold, mask_threshold, overlap_mask_area_threshold)
        results = []
        for view in self._views(outputs, target_sizes, seen_class_mask, gamma, correction_threshold):
            found = panoptic_segments(view, *thresholds)
            infos: list[dict[str, Any]] = []
            ids, stuff = [0], {}
            for label, score in zip(found.labels, found.scores):
                score = round(score, 6)
                if label in stuff:
                    info = stuff[label]
                    info["score"] = max(info["score"], score)
                else:
                    info = {"id": len(infos) + 1, "label_id": label, "was_fused": label in fused, "score": score}
                    infos.append(info)
                    if label in fused:
                        stuff[label] = info
                ids.append(info["id"])
            table = torch.tensor(ids, dtype=torch.int32, device=found.map.device)
            results.append({"segmentation": table[found.map + 1], "segments_info": infos})
        return results

    @torch.no_grad()
    def post_process_instance_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        target_sizes: list[tuple[int, int]] | torch.Tensor | None = None,
        return_coco_annotation: bool = False,
        return_binary_maps: bool = False,
        *,
        seen_class_mask: torch.Tensor | None = None,
        gamma: float | None = None,
        correction_threshold: float | None = None,
    ) -> list[dict[str, Any]]:
        r"""
        Converts model outputs to instances, in the format of [`Mask2FormerImageProcessor`].

        Differs from [`post_process_panoptic_segmentation`]: whole masks may overlap, the unclaimed region is left out
        because it is not an object, and `score` is `p(class|n) · mean of σ(mask_n) over the mask`.

        Args:
            outputs, target_sizes, seen_class_mask, gamma, correction_threshold: See
                [`post_process_panoptic_segmentation`].
            threshold: Instances with a lower score are dropped, 0 to 1.
            mask_threshold: Pixels with a higher mask value are in the mask, 0 to 1.
            overlap_mask_area_threshold: An instance is dropped if instances with higher scores leave less than this share
                of its mask, 0 to 1. 0 keeps all, also several of one object.
            return_coco_annotation: Return whole masks in COCO's uncompressed run-length encoding, `{"size", "counts"}`, one
                per instance.
            return_binary_maps: Return whole masks, bool (instances, height, width).

        Returns:
            For each image a dictionary:

            - **segmentation** -- int32 (height, width): ids of instances; the highest score wins where several overlap; -1
              where there is none. Or the masks, in the order of the ids.
            - **segments_info** -- for each instance, by descending score, `id` (from 0), `label_id`, `was_fused` (False) and
              `score`.

        Raises:
            ValueError: an argument is out of range or does not match `outputs`, or both `return_coco_annotation` and
                `return_binary_maps` are set.
        """
        if return_coco_annotation and return_binary_maps:
            raise ValueError("`return_coco_annotation` and `return_binary_maps` are both on; choose one of them.")
        _check_outputs(outputs)
        thresholds = self._thresholds(threshold, mask_threshold, overlap_mask_area_threshold)
        # The unclaimed region has a mask, but no query of its own.
        queries = getattr(outputs, "queries_hidden_state", None)
        proposals = (outputs.masks_queries_logits if queries is None else queries).shape[1]
        results = []
        for view in self._views(outputs, target_sizes, seen_class_mask, gamma, correction_threshold):
            found, masks = instance_segments(view, proposals, *thresholds)
            infos = [
                {"id": index, "label_id": label, "was_fused": False, "score": round(score, 6)}
                for index, (label, score) in enumerate(zip(found.labels, found.scores))
            ]
            segmentation: Any = found.map
            if return_coco_annotation:
                segmentation = [run_lengths(mask) for mask in masks]
            elif return_binary_maps:
                segmentation = torch.stack(masks) if masks else found.map.new_zeros(0, *found.map.shape).bool()
            results.append({"segmentation": segmentation, "segments_info": infos})
        return results

    @staticmethod
    def _thresholds(threshold: Any, mask_threshold: Any, overlap_mask_area_threshold: Any) -> tuple[float, ...]:
        return (
            check_share("threshold", threshold),
            check_share("mask_threshold", mask_threshold),
            check_share("overlap_mask_area_threshold", overlap_mask_area_threshold),
        )

    def _views(
        self, outputs: Any, target_sizes: Any, seen_class_mask: Any, gamma: Any, threshold: Any
    ) -> Iterator[View]:
        """Every image of the batch with the probabilities of its proposals after predictive bias correction."""
        targets = _check_target_sizes(target_sizes, len(outputs.masks_queries_logits))
        if threshold is not None:
            check_share("correction_threshold", threshold)
        probabilities = self.proposal_probabilities(outputs, seen_class_mask, gamma, threshold)
        for index, table in enumerate(probabilities):
            yield image_view(outputs, index, table, targets and targets[index])


# --- arguments -------------------------------------------------------------------------------------------------


def _check_outputs(outputs: Any) -> tuple[int, int]:
    """Checks that the shapes of model outputs are consistent; returns batch size and number of classes."""
    shapes = {
        "masks_queries_logits": ("batch", "queries", "height", "width"),
        "class_queries_logits": ("batch", "queries", "classes + 1"),
        "unseen_logits": ("batch", "queries"),
        "content_sizes": ("batch", 2),
        "seen_class_mask": None,
    }
    lengths = {2: 2}
    for name, axes in shapes.items():
        value = getattr(outputs, name, None)
        if value is None and name in ("masks_queries_logits", "class_queries_logits"):
            raise ValueError(
                f"`outputs` is a {type(outputs).__name__} without `masks_queries_logits` and `class_queries_logits`; "
                "expected the model's output."
            )
        if value is None:
            continue
        check_tensor(f"outputs.{name}", value, "real numbers")
        if axes is None:
            continue
        expected = tuple(lengths.setdefault(axis, length) for axis, length in zip(axes, value.shape))
        if len(axes) != value.ndim or expected != tuple(value.shape) or 0 in expected[1:]:
            raise ValueError(
                f"`outputs.{name}` has shape {tuple(value.shape)}; expected ({', '.join(map(str, axes))}) with no empty "
                "axis, and the same batch and queries in all outputs."
            )
    classes = lengths["classes + 1"] - 1
    if classes == 0:
        raise ValueError("`outputs.class_queries_logits` has only the background; expected at least one class.")
    return lengths["batch"], classes


def _check_target_sizes(target_sizes: Any, batch_size: int) -> list[tuple[int, int]] | None:
    if target_sizes is None:
        return None
    try:
        sizes = [(math.floor(height), math.floor(width)) for height, width in target_sizes]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        sizes = []
    if len(sizes) != batch_size or any(min(size) < 1 for size in sizes):
        raise ValueError(
            f"`target_sizes` is {target_sizes}; expected a list of {batch_size} pairs (height, width), one per image."
        )
    if any(height * width > LARGEST_MAP for height, width in sizes):
        raise ValueError(
            f"`target_sizes` is {target_sizes}; expected at most {LARGEST_MAP} pixels per image. Segment it in parts, or "
            "enlarge the label map afterwards."
        )
    return sizes


def _check_guides(images: Any, sizes: list[tuple[int, int]] | None) -> list[Image.Image]:
    """The images that guide the refinement of label maps of these sizes, as RGB."""
    images = flatten_images(images)
    if sizes is None or len(images) != len(sizes):
        raise ValueError(
            f"There are {len(images)} `images` and {len(sizes or ())} `target_sizes`; expected one of each per image."
        )
    guides = []
    for index, (image, size) in enumerate(zip(images, sizes)):
        try:
            guides.append(to_planes(image, True, None)[0][0])
        except ValueError as error:
            raise ValueError(f"`images[{index}]` cannot be used: {error}.") from error
        if guides[-1].size[::-1] != size:
            raise ValueError(
                f"`images[{index}]` has {guides[-1].height} x {guides[-1].width} pixels; expected its target size, "
                f"{size[0]} x {size[1]}."
            )
    return guides


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"`{name}` is {value!r}; expected a finite number.")
    return number


def check_share(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"`{name}` is {value!r}; expected a number from 0 to 1.")
    return number


def _check_none_index(none_index: Any, classes: int) -> None:
    if not isinstance(none_index, int) or not -(2**63) <= none_index < 2**63 or 0 <= none_index < classes:
        raise ValueError(
            f"`none_index` is {none_index!r}; expected a 64-bit integer that is not one of the class ids 0..{classes - 1}."
        )


def _check_label_ids(label_ids: Any, classes: int) -> set[int]:
    try:
        ids = {int(label) for label in label_ids or ()}
    except (TypeError, ValueError, RuntimeError):
        ids = {-1}
    if not ids <= set(range(classes)):
        raise ValueError(f"`label_ids_to_fuse` is {label_ids!r}; expected a set of class ids from 0 to {classes - 1}.")
    return ids


def _check_seen_class_mask(outputs: Any, classes: int, mask: Any) -> torch.Tensor | None:
    """`bool (classes,)`: the argument, or else the mask in `outputs`; `None` without either."""
    if mask is None:  # the mask in `outputs` is repeated for each image
        mask = getattr(outputs, "seen_class_mask", None)
        mask = mask[0] if mask is not None and mask.ndim == 2 and len(mask) else mask
    else:
        try:
            mask = torch.as_tensor(mask, device=outputs.class_queries_logits.device)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"`seen_class_mask` is a {type(mask).__name__}; expected a bool tensor of shape ({classes},)."
            ) from None
    if mask is None:
        return None
    if mask.shape != (classes,) or not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"`seen_class_mask` has shape {tuple(mask.shape)} and values {mask.unique().tolist()[:5]}; expected True or "
            f"False for each of the {classes} classes."
        )
    return mask.bool()


def _penalties(seen_penalty: Any, seen_class_mask: torch.Tensor | None, classes: int) -> torch.Tensor:
    """Constants subtracted from the scores of all classes and the background, `(classes + 1,)`."""
    penalty = torch.zeros(classes + 1)
    if _number("seen_penalty", seen_penalty) != 0:
        if seen_class_mask is None:
            raise ValueError("`seen_penalty` needs `seen_class_mask`: pass it, or outputs that contain it.")
        penalty[:-1] = seen_class_mask.to(penalty) * seen_penalty
    return penalty
