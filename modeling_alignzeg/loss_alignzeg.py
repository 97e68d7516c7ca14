# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Targets, matching, and the mask and class terms of `L = L_bc + λ1·L_ce + λ2·L_mask + λ3·L_vir + λ4·L_reg`.

`L_vir` and `L_reg` are in classifier_alignzeg.py, `L_bc` in indicator_alignzeg.py. All functions are vectorised over images,
proposals and targets, except scipy's assignment and `unlabelled_segments`, which loop over images on the CPU. Unlabelled
pixels (such as unseen classes, clutter or padding) are left out of matching, mask loss and sampling, with two exceptions:
those near a labelled object are negatives of that object only (`SegmentationTargets.reach`), so no proposal learns to avoid
unlabelled regions in general; and with `unlabelled_weight`, unlabelled segments train masks.

Sums are divided by counts over *all* processes, so that two processes with half a batch each take the same step as one
process with the whole batch.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .checks_alignzeg import check_tensor
from .layers_alignzeg import content_mask


try:
    from scipy import ndimage
    from scipy.optimize import linear_sum_assignment
except ImportError:  # inference does not need it
    ndimage = linear_sum_assignment = None


REACH_MARGIN = 0.25  # margin of an object's reach around its bounding box, as a share of the box's sides
OVERSAMPLE_RATIO, IMPORTANCE_SAMPLE_RATIO = 3.0, 0.75  # PointRend (Kirillov et al., 2020), as in Mask2Former
SMALLEST_SEGMENT = 0.01  # share of the image that an unlabelled segment must cover
IGNORED_SHARE = 0.5  # unmatched proposals with more of their mask on unlabelled pixels are left out of the class term


@dataclass
class SegmentationTargets:
    """The labels of a batch as dense tensors.

    Attributes:
        masks: `bool (batch, targets, height, width)`, one mask per class in the image; images with fewer are padded.
        classes: `int64 (batch, targets)`; -1 on padding.
        labelled: `bool (batch, height, width)`; False where no mask covers the pixel.
        reach: `int64 (batch, targets, 4)`, top, bottom, left and right (the second and last exclusive) of the rectangle
            in which an unlabelled pixel is a negative of that target; 0 for a target without pixels.
    """

    masks: Tensor
    classes: Tensor
    labelled: Tensor
    reach: Tensor

    @property
    def counts(self) -> list[int]:
        return (self.classes >= 0).sum(1).tolist()


def compared_points(labelled: Tensor, reach: Tensor, points: Tensor, width: int) -> Tensor:
    """Whether each point counts in the comparison of a mask with a target: if it is labelled or in the target's reach.

    Args:
        labelled: `bool (..., P)` or broadcastable, whether the points are labelled.
        reach: `int64 (..., 4)`, see [`SegmentationTargets`].
        points: `int64 (..., P)` into the flattened image of `width`.
    """
    rows, columns = points.div(width, rounding_mode="floor"), points % width
    top, bottom, left, right = reach[..., None].unbind(-2)
    return (labelled | ((rows >= top) & (rows < bottom) & (columns >= left) & (columns < right))).float()


def target_reach(masks: Tensor, content: Tensor | None, margin: float = REACH_MARGIN) -> Tensor:
    """Rectangles in which unlabelled pixels are negatives of a target: `int64 (batch, targets, 4)`.

    Args:
        masks: `bool (batch, targets, height, width)`.
        content: `(batch, 2)` height and width of the images inside the padding; default all.
        margin: The target's bounding box is grown on each side by this share of its own side.
    """
    size = masks.new_tensor(masks.shape[-2:], dtype=torch.long)
    limits = size.expand(len(masks), 2) if content is None else content.long()
    spans = []
    for axis, hits in enumerate((masks.any(3), masks.any(2))):  # rows, columns
        limit = limits[:, axis, None].expand(hits.shape[:2])
        first = hits.int().argmax(-1)
        last = hits.shape[-1] - hits.flip(-1).int().argmax(-1)
        extra = ((last - first) * margin).ceil().long()
        there = hits.any(-1)  # a target without pixels has no reach
        spans += [(first - extra).clamp(min=0) * there, (last + extra).minimum(limit) * there]
    return torch.stack(spans, -1)


def reached_pixels(targets: SegmentationTargets) -> Tensor:
    """`bool (batch, height, width)`: pixels that count for at least one target."""
    height, width = targets.labelled.shape[-2:]
    top, bottom, left, right = targets.reach[..., None].unbind(-2)  # (batch, targets, 1)
    row, column = (torch.arange(cells, device=top.device) for cells in (height, width))
    rows = (row >= top) & (row < bottom) & (targets.classes >= 0)[..., None]
    columns = (column >= left) & (column < right)
    return targets.labelled | (rows[..., :, None] & columns[..., None, :]).any(1)


@dataclass
class ProposalMatch:
    """Pairs of proposals and targets: proposal `query[i]` of image `image[i]` is target `target[i]`; each `int64 (M,)`."""

    image: Tensor
    query: Tensor
    target: Tensor


class MatchingCostError(FloatingPointError):
    """A matching cost is not finite. All processes raise this error together, so that none waits for another.

    Attributes:
        costs: The first non-finite value of each term, by name; empty if only other processes have one.
        images: Indices of the images in this process's batch that have a non-finite cost.
    """

    def __init__(self, costs: dict[str, float], images: list[int]):
        self.costs, self.images = costs, images
        where = f"Matching of image {', '.join(map(str, images))} in the batch" if images else "Another process"
        super().__init__(
            f"{where} has a cost that is not finite (term: {', '.join(costs) or 'see that process'}). The masks or class "
            "logits diverged: lower the learning rate, clip gradients or train in bf16/fp32."
        )


def stack_targets(
    mask_labels: list[Tensor],
    class_labels: list[Tensor],
    size: tuple[int, int],
    seen_class_mask: Tensor,
    content: Tensor | None = None,
) -> SegmentationTargets:
    """Stacks per-image labels. The training vocabulary contains seen classes only; `classes` are indices into it.

    Args:
        mask_labels: For each image `(targets_i, height, width)`, bool or {0, 1}; a semantic label map split by class.
        class_labels: For each image `int64 (targets_i,)`, indices into the text prototypes.
        size: Height and width to which all masks are padded (bottom, right) with unlabelled pixels.
        seen_class_mask: `bool (classes,)`; labels may contain seen classes only.
        content: `(batch, 2)` height and width of the images inside the padding; default all.

    Raises:
        ValueError: the lists differ in length, an entry is not a tensor of the right type and shape, or a class id is
            unknown or unseen.
    """
    if len(mask_labels) != len(class_labels):
        raise ValueError(
            f"`mask_labels` has {len(mask_labels)} entries and `class_labels` {len(class_labels)}; pass one of each per "
            "image."
        )
    masks = []
    for image, (mask, classes) in enumerate(zip(mask_labels, class_labels)):
        check_tensor(f"mask_labels[{image}]", mask, "real numbers")
        check_tensor(f"class_labels[{image}]", classes, "whole numbers")
        height, width = (*mask.shape, 0, 0)[1:3]
        if mask.ndim != 3 or classes.shape != mask.shape[:1] or height > size[0] or width > size[1]:
            raise ValueError(
                f"`mask_labels[{image}]` has shape {tuple(mask.shape)} and `class_labels[{image}]` {tuple(classes.shape)}; "
                f"expected (n, height, width) with height, width at most {size[0]}, {size[1]} (those of `pixel_values`), "
                "and (n,)."
            )
        masks.append(F.pad(mask.bool(), (0, size[1] - width, 0, size[0] - height)))
    num_classes = len(seen_class_mask)
    if not seen_class_mask.any():
        raise ValueError("`seen_class_mask` marks every class as unseen; a loss needs at least one seen class.")
    ids = torch.cat([c.long() for c in class_labels])
    wrong = (ids < 0) | (ids >= num_classes) | ~seen_class_mask[ids.clamp(0, num_classes - 1)]
    if wrong.any():
        raise ValueError(
            f"`class_labels` contains class id {int(ids[wrong][0])}; expected the position of a seen class among the "
            f"{num_classes} text prototypes. Set the labels of all other classes to `ignore_index` before masks are made."
        )
    classes = torch.nn.utils.rnn.pad_sequence([c.long() for c in class_labels], batch_first=True, padding_value=-1)
    if classes.shape[1] == 0:  # no image has any label
        masks = torch.zeros(len(masks), 1, *size, dtype=torch.bool, device=seen_class_mask.device)
        classes = torch.full((len(masks), 1), -1, device=seen_class_mask.device)
    else:
        masks = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
    among_seen = seen_class_mask.long().cumsum(0) - 1
    classes = torch.where(classes >= 0, among_seen[classes.clamp(min=0)], -1)
    return SegmentationTargets(masks, classes, masks.any(1), target_reach(masks, content))


def unlabelled_segments(targets: SegmentationTargets, stride: int, content: Tensor | None) -> SegmentationTargets:
    """Class-agnostic targets: the connected regions of unlabelled pixels, which often show one object of an unseen class.

    Regions are found on cells of `stride` pixels, after a morphological opening (3×3 cells) that removes thin gaps between
    objects. Regions below [`SMALLEST_SEGMENT`] are left out. In the result, all labelled pixels are negatives of all
    segments, and `classes` is 0 for segments.

    Args:
        targets: Labels of the batch.
        stride: Side of the cells, which tile the batch.
        content: `(batch, 2)` height and width of the images inside the padding; default all.
    """
    unlabelled = ~targets.labelled
    if content is not None:
        unlabelled = unlabelled & content_mask(content, tuple(unlabelled.shape[-2:]))
    cells = F.avg_pool2d(unlabelled[:, None].float(), stride)[:, 0].cpu().numpy() > 0.5
    sizes = [unlabelled[0].numel()] * len(cells) if content is None else content.prod(1).tolist()
    found = []
    for image, (cells_of_image, size) in enumerate(zip(cells, sizes)):
        opened = ndimage.binary_opening(np.pad(cells_of_image, 1, mode="edge"), np.ones((3, 3)))[1:-1, 1:-1]
        regions, _ = ndimage.label(opened)
        areas = np.bincount(regions.ravel())[1:] * stride**2
        kept = torch.from_numpy(np.flatnonzero(areas >= SMALLEST_SEGMENT * size) + 1)
        masks = torch.from_numpy(regions)[None] == kept[:, None, None]
        masks = masks.repeat_interleave(stride, 1).repeat_interleave(stride, 2).to(unlabelled.device)
        found.append(masks & unlabelled[image])
    counts = torch.tensor([len(masks) for masks in found], device=unlabelled.device)
    masks = torch.nn.utils.rnn.pad_sequence(found, batch_first=True)
    if not masks.shape[1]:
        masks = unlabelled.new_zeros(len(found), 1, *unlabelled.shape[-2:])
    classes = torch.where(torch.arange(masks.shape[1], device=counts.device) < counts[:, None], 0, -1)
    reach = torch.zeros(*classes.shape, 4, dtype=torch.long, device=classes.device)
    return SegmentationTargets(masks, classes, targets.labelled | masks.any(1), reach)


# --- points ------------------------------------------------------------------------------------------------------


def sample_labelled_points(labelled: Tensor, num_points: int, generator: torch.Generator | None = None) -> Tensor:
    """Samples labelled pixels of each image uniformly.

    Args:
        labelled: `bool (batch, height, width)`.
        num_points: Samples per image, with replacement.
        generator: Random generator; default: torch's own.

    Returns:
        `int64 (batch, num_points)`, indices into the flattened image; 0 if an image has no labelled pixel.
    """
    cumulative = labelled.flatten(1).cumsum(1)
    total = cumulative[:, -1:]
    draws = torch.rand(len(labelled), num_points, generator=generator, device=labelled.device)
    rank = (draws * total).long().clamp(max=total - 1) + 1
    return torch.searchsorted(cumulative, rank).clamp(max=cumulative.shape[1] - 1)


class PointSample(NamedTuple):
    """Pixels at which masks are compared.

    Attributes:
        points: `int64 (batch, P)` candidates, indices into the flattened image.
        num_uncertain: In the mask loss, each proposal keeps this many candidates, the ones it is least certain about
            (PointRend); `None` keeps all.
        num_random: The last `num_random` candidates are always kept.
    """

    points: Tensor
    num_uncertain: int | None = None
    num_random: int = 0

    @property
    def for_matching(self) -> Tensor:
        """As many of the candidates as the mask loss uses."""
        count = self.points.shape[1] if self.num_uncertain is None else self.num_uncertain + self.num_random
        return self.points[:, :count]


def sample_points(
    targets: SegmentationTargets, mask_size: tuple[int, int], num_points: int | None, generator: torch.Generator | None
) -> PointSample:
    """Samples `num_points` pixels per proposal among those that count for a target; `None`: centres of all mask cells."""
    size, device = targets.labelled.shape[-2:], targets.labelled.device
    if num_points is None:
        return PointSample(cell_centres(mask_size, size, device).expand(len(targets.labelled), -1))
    num_uncertain = int(IMPORTANCE_SAMPLE_RATIO * num_points)
    num_random = num_points - num_uncertain
    candidates = int(OVERSAMPLE_RATIO * num_points) + num_random
    points = sample_labelled_points(reached_pixels(targets), candidates, generator)
    return PointSample(points, num_uncertain, num_random)


def cell_centres(mask_size: tuple[int, int], image_size: tuple[int, int], device) -> Tensor:
    """Pixel indices at the centres of the cells of a mask grid: `int64 (h·w,)` into the flattened image."""
    rows, columns = (
        ((torch.arange(cells, device=device) + 0.5) * (pixels / cells)).long()
        for cells, pixels in zip(mask_size, image_size)
    )
    return (rows[:, None] * image_size[1] + columns[None, :]).flatten()


def mask_values(mask_logits: Tensor, points: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Bilinear mask logits `(B, N, P)` of `mask_logits (B, N, h, w)` at the pixels `points (B, P)` of the image."""
    height, width = image_size
    y = (points.div(width, rounding_mode="floor") + 0.5) * (2 / height) - 1
    x = (points % width + 0.5) * (2 / width) - 1
    grid = torch.stack([x, y], -1)[:, None].to(mask_logits.dtype)
    return F.grid_sample(mask_logits, grid, padding_mode="border", align_corners=False)[:, :, 0]


# --- matching ----------------------------------------------------------------------------------------------------


def raise_for_costs(
    cost_on_host: np.ndarray, terms: dict[str, Tensor], targets: SegmentationTargets, device: torch.device
) -> None:
    """Raises [`MatchingCostError`] on every process if a cost `(B, N, T)` of one of them is not finite."""
    broken = [i for i, count in enumerate(targets.counts) if not np.isfinite(cost_on_host[i, :, :count]).all()]
    flag = torch.tensor(len(broken), device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(flag)
    if not flag:
        return
    costs = {}
    for name, term in terms.items():
        for image in broken:
            values = term[image, :, : targets.counts[image]]
            for value in values[~values.isfinite()][:1].tolist():
                costs.setdefault(name, value)
    raise MatchingCostError(costs, broken)


def full_precision(values: Tensor) -> AbstractContextManager:
    """Sums over thousands of points overflow in float16 and cancel in bfloat16, to which autocast would round them."""
    return torch.autocast(values.device.type, enabled=False)


@torch.no_grad()
def match_proposals(
    mask_logits: Tensor,
    class_logits: Tensor,
    targets: SegmentationTargets,
    points: Tensor,
    weights: tuple[float, float, float],
    taken: ProposalMatch | None = None,
) -> ProposalMatch:
    """Hungarian matching on class probability, mask cross-entropy and dice (MaskFormer, eq. 2; Mask2Former's points).

    Args:
        mask_logits: `(B, N, h, w)`.
        class_logits: `(B, N, C + 1)`, background last.
        targets: Labels of the batch.
        points: `int64 (B, P)` pixels at which masks are compared; points on unlabelled pixels do not count.
        weights: Weights of the class, mask and dice costs.
        taken: Proposals that are left out. Targets beyond the number of the others stay without a proposal.

    Raises:
        MatchingCostError: a cost of this or another process is not finite; the message names the term and the image.
        ImportError: scipy is missing.
    """
    if linear_sum_assignment is None:
        raise ImportError("Training matches proposals with `scipy.optimize.linear_sum_assignment`: pip install scipy")
    size = targets.labelled.shape[-2:]
    predicted = mask_values(mask_logits.float(), points, size)  # (B, N, P)
    truth = targets.masks.flatten(2).gather(2, points[:, None].expand(-1, targets.masks.shape[1], -1)).float()
    labelled = targets.labelled.flatten(1).gather(1, points)[:, None]  # (B, 1, P)
    valid = compared_points(labelled, targets.reach, points[:, None], size[1])  # (B, T or 1, P)

    scores = class_logits.float().softmax(-1)
    class_cost = -scores.gather(2, targets.classes.clamp(min=0)[:, None].expand(-1, scores.shape[1], -1))
    with full_precision(predicted):
        # Cross-entropy with target 0, minus the logit where the target is 1. A target's own pixels always count.
        entropy = F.softplus(predicted) @ valid.mT - predicted @ truth.mT
        probability = predicted.sigmoid()
        overlap = 2 * probability @ truth.mT
        claimed = probability @ valid.mT
    mask_cost = entropy / valid.sum(-1)[:, None].clamp(min=1)
    dice_cost = 1 - (overlap + 1) / (claimed + truth.sum(-1)[:, None] + 1)

    terms = {"class": class_cost, "mask": mask_cost, "dice": dice_cost}
    cost = sum(weight * term for weight, term in zip(weights, terms.values()))
    cost_on_host = cost.cpu().numpy()  # the one transfer
    raise_for_costs(cost_on_host, terms, targets, cost.device)
    free = np.ones(cost_on_host.shape[:2], dtype=bool)
    if taken is not None:
        free[taken.image.cpu(), taken.query.cpu()] = False
    pairs = [[], [], []]
    for image, count in enumerate(targets.counts):
        candidates = np.flatnonzero(free[image])
        queries, objects = linear_sum_assignment(cost_on_host[image, candidates, :count])
        queries = candidates[queries]
        pairs[0].append(torch.full((len(queries),), image))
        pairs[1].append(torch.as_tensor(queries, dtype=torch.long))
        pairs[2].append(torch.as_tensor(objects, dtype=torch.long))
    return ProposalMatch(*(torch.cat(parts).to(mask_logits.device) for parts in pairs))


# --- terms -------------------------------------------------------------------------------------------------------


def count_over_processes(count: Tensor) -> Tensor:
    """Mean of `count` over all processes, at least 1e-6; each process divides its own sum by it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        count = count.clone()
        torch.distributed.all_reduce(count)
        count = count / torch.distributed.get_world_size()
    return count.clamp(min=1e-6)


def mask_loss(
    mask_logits: Tensor,
    targets: SegmentationTargets,
    match: ProposalMatch,
    sample: PointSample,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and dice of matched proposals (`L_mask`), each a mean over the matched proposals of all processes.

    `mask_logits` have shape `(B, N, h, w)`.
    """
    size = targets.labelled.shape[-2:]
    points, num_uncertain, num_random = sample.points[match.image], sample.num_uncertain, sample.num_random  # (M, P)
    logits = mask_values(mask_logits[match.image, match.query][:, None].float(), points, size)[:, 0]
    if num_uncertain is not None:
        with torch.no_grad():
            pool = logits.shape[1] - num_random
            picked = logits[:, :pool].abs().topk(num_uncertain, dim=1, largest=False).indices
            rest = torch.arange(pool, logits.shape[1], device=logits.device).expand(len(logits), -1)
            picked = torch.cat([picked, rest], 1)
        logits, points = logits.gather(1, picked), points.gather(1, picked)
    image = match.image[:, None]
    truth = targets.masks.flatten(2)[image, match.target[:, None], points].float()
    reach = targets.reach[match.image, match.target]
    valid = compared_points(targets.labelled.flatten(1)[image, points], reach, points, size[1])

    count = count_over_processes(torch.tensor(float(len(logits)), device=logits.device))
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none") * valid
    entropy = entropy.sum(1) / valid.sum(1).clamp(min=1)
    probability = logits.sigmoid() * valid
    dice = 1 - (2 * (probability * truth).sum(1) + 1) / (probability.sum(1) + truth.sum(1) + 1)
    return entropy.sum() / count, dice.sum() / count


def classification_loss(
    class_logits: Tensor,
    mask_logits: Tensor,
    targets: SegmentationTargets,
    match: ProposalMatch,
    no_object_weight: float,
) -> Tensor:
    """Weighted cross-entropy over the seen classes and the background (`L_ce`).

    The target of a matched proposal is its class. The target of an unmatched one is the background, with weight
    `no_object_weight`. An unmatched proposal that is mostly on unlabelled pixels may cover an unseen object and is left
    out.
    """
    with torch.no_grad():
        target = torch.full(class_logits.shape[:2], class_logits.shape[-1] - 1, device=class_logits.device)
        target[match.image, match.query] = targets.classes[match.image, match.target]
        labelled = F.adaptive_avg_pool2d(targets.labelled[:, None].float(), mask_logits.shape[-2:]).flatten(1)
        probability = mask_logits.float().sigmoid().flatten(2)
        with full_precision(probability):
            ignored = 1 - (probability @ labelled[..., None])[..., 0] / probability.sum(-1).clamp(min=1e-6)
        weight = torch.where(ignored > IGNORED_SHARE, 0.0, no_object_weight)
        weight[match.image, match.query] = 1.0
    entropy = F.cross_entropy(class_logits.float().flatten(0, 1), target.flatten(), reduction="none")
    return (entropy * weight.flatten()).sum() / count_over_processes(weight.sum())


def mean_over_processes(values: Tensor) -> Tensor:
    """Mean of `values (V,)` over all processes; 0 without values."""
    return values.sum() / count_over_processes(torch.tensor(float(len(values)), device=values.device))
