# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The read-out: predictive bias correction, the sum over proposals, the weighting with the image tower's own cells, the
resize to the image size and the argmax; and the conversion of proposals to instances and panoptic segments.

The sum over proposals is linear in the masks. So a view of an image (all of it or a window, possibly mirrored) is a list of
proposals with matrices that resize their mask grid to the label map; a plain image is one view. The scores of all classes
at full size are never in memory: label maps are made tile by tile, from the classes that can win there.
"""

import math
from collections.abc import Iterator
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


# Tiles have at most this many output pixels and cells of the mask grid per side, and no step of a tile stores more than
# WORKSPACE numbers (32 MiB). Small tiles have few candidate classes; large ones launch fewer kernels, which matters on a
# GPU.
WORKSPACE = 2**23
TILE_PIXELS, TILE_CELLS = {"cpu": 128, "other": 256}, {"cpu": 16, "other": 32}
DENSE_SHARPNESS = 0.5  # factor on the cells' logits: one cell is less certain than a whole region
LEADERS = 8  # classes of a tile that are scored before the others are ruled out
REFINED_PIXELS = 4  # resolution of the refinement of label maps, in pixels per mask cell and axis
REFINED_STEPS, REFINED_DILATIONS = 10, (1, 2, 4)  # together they reach beyond one mask cell
REFINED_CONTRAST = 0.3  # smaller values: edges block more


class Dense(NamedTuple):
    """Class scores of the image tower's own cells for one view.

    Attributes:
        scores: Class probabilities of the cells, `(C, h, w)`; with the background `(C + 1, h, w)`.
        rows: `(H, h)`: interpolates the scores at the rows of the label map; 0 outside the view.
        columns: `(W, w)`, likewise.
        weight: Weight `a` of the scores in `score = proposals^(1 - a) · cells^a`.
    """

    scores: Tensor
    rows: Tensor
    columns: Tensor
    weight: float


class View(NamedTuple):
    """The proposals of one view of an image, and their resize to the label map.

    Attributes:
        probabilities: `(N, C)`, or `(N, C + 1)` with the background, see [`class_probabilities`].
        masks: `(N, h, w)`, 0 to 1.
        rows: `(H, h)`: interpolates the mask grid at the rows of the label map; 0 outside the view.
        columns: `(W, w)`, likewise.
        dense: The tower's own cells, if they have a weight.
    """

    probabilities: Tensor
    masks: Tensor
    rows: Tensor
    columns: Tensor
    dense: Dense | None = None

    def classes(self, which: int | Tensor) -> "View":
        """The view restricted to the first `which` classes, or to the classes with these ids."""
        ids = slice(which) if isinstance(which, int) else which
        dense = self.dense and self.dense._replace(scores=self.dense.scores[ids])
        return self._replace(probabilities=self.probabilities[:, ids], dense=dense)


def class_probabilities(
    class_queries_logits: Tensor,
    unseen_logits: Tensor | None = None,
    seen_class_mask: Tensor | None = None,
    gamma: float | Tensor = 0.0,
    threshold: float | Tensor = 0.5,
    on_scores: bool = False,
) -> Tensor:
    """Class probabilities of each proposal after predictive bias correction (PBC of AlignZeg, arXiv 2404.05667).

    Where a proposal's probability of being unseen, `sigmoid(unseen_logits)`, exceeds `threshold`, the logits of its seen
    classes are lowered by `gamma`, and the softmax over the classes is multiplied by the proposal's uncorrected probability
    of not being background. So what the seen classes lose goes to the unseen ones: proposals of unseen objects often look
    like background as well, which would otherwise take most of it. With `on_scores`, the probabilities of the seen classes
    are multiplied by `exp(-gamma)` instead, which leaves those of the unseen classes unchanged. With `gamma=0`, a vocabulary
    without unseen classes, or a missing `unseen_logits` or `seen_class_mask`, the result is bitwise equal to the plain
    softmax.

    Args:
        class_queries_logits: `(..., N, C + 1)`, scaled by `τ`; the background comes last.
        unseen_logits: `(..., N)`.
        seen_class_mask: `bool (C,)`, True for classes that were seen in training.
        gamma: How much seen logits are lowered, ≥ 0; `()` as a tensor.
        threshold: Between 0 and 1; `()` as a tensor.
        on_scores: Lower probabilities instead of logits.

    Returns:
        `(..., N, C + 1)`, float32; the last axis sums to one, or to less with `on_scores`.
    """
    logits = class_queries_logits.float()
    plain = logits.softmax(-1)
    if unseen_logits is None or seen_class_mask is None:
        return plain
    classes, background = plain[..., :-1], plain[..., -1:]
    lowered = seen_class_mask.to(logits) * gamma
    if on_scores:
        classes = classes * (-lowered).exp()
    else:
        classes = (1 - background) * (logits[..., :-1] - lowered).softmax(-1)
    is_corrected = (unseen_logits.float().sigmoid() > threshold) & (gamma > 0) & ~seen_class_mask.all()
    return torch.where(is_corrected[..., None], torch.cat([classes, background], -1), plain)


def cell_probabilities(dense_logits: Tensor) -> Tensor:
    """Class probabilities of the cells, float32, from their logits; both `(..., C, h, w)`."""
    return (DENSE_SHARPNESS * dense_logits.float()).softmax(-3)


def resize_matrix(
    source: int,
    target: int,
    content: float | None = None,
    window: tuple[int, int, int] | None = None,
    is_flipped: bool = False,
) -> Tensor:
    """Bilinear interpolation along one axis as a matrix: `target_values = matrix @ source_values`.

    Equal to `torch.nn.functional.interpolate(..., mode="bilinear", align_corners=False)` of the first `content`
    samples; `content` may be fractional, for images whose border falls inside a cell of the grid.

    Args:
        source: Length of the axis.
        target: Length of the result.
        content: Length of the image content, from the start of the axis; all of it by default.
        window: Start and length of the part of the image that the axis shows, and length of the whole image, in the same
            unit.
        is_flipped: Whether the axis shows the image mirrored.

    Returns:
        `(target, source)`, float32, on the CPU; the weights of a row are not negative and sum to one, or are all zero
        outside the window.
    """
    content = float(source if content is None else min(max(content, 1e-6), source))
    start, length, whole = window or (0, target, target)
    positions = (torch.arange(target, dtype=torch.float64) + 0.5) * (whole / target) - start
    inside = ((positions >= 0) & (positions < length)).nonzero()[:, 0]
    positions = length - positions[inside] if is_flipped else positions[inside]
    last = math.ceil(content) - 1
    positions = (positions * (content / length) - 0.5).clamp(0, last)
    lower = positions.floor()
    weight = (positions - lower).float()
    lower = lower.long()
    matrix = torch.zeros(target, source)
    matrix[inside, lower] = 1 - weight
    matrix[inside, (lower + 1).clamp(max=last)] += weight
    return matrix


def image_view(
    outputs: Any,
    index: int,
    probabilities: Tensor,
    size: tuple[int, int] | None,
    dense_weight: float = 0.0,
    windows: tuple[tuple[int, int, int], tuple[int, int, int]] | None = None,
    is_flipped: bool = False,
) -> View:
    """One image of a batch as a view.

    Args:
        outputs: Outputs of the model.
        probabilities: `(N, C + 1)` of this image, or `(N, C)`.
        size: Height and width of the label map; `None`: the size of the mask grid, padding included.
        dense_weight: Weight of `outputs.dense_logits`, from 0 to 1.
        windows, is_flipped: See [`resize_matrix`]; for rows and columns.

    Raises:
        ValueError: the outputs contain NaN, or `content_sizes` is not finite.
    """
    masks = outputs.masks_queries_logits[index].float().sigmoid()
    if masks.isnan().any() or probabilities.isnan().any():
        raise ValueError(f"`outputs` contain NaN for image {index}; try float32, or check the checkpoint.")
    grid, sizes = masks.shape[-2:], getattr(outputs, "content_sizes", None)
    content = grid if sizes is None or size is None else sizes[index].tolist()
    if not all(map(math.isfinite, content)):
        raise ValueError(
            f"`outputs.content_sizes` is {content} for image {index}; expected finite numbers of mask cells."
        )
    windows, flips = windows or (None, None), (False, is_flipped)

    def matrices(cells):  # of a grid that covers the same image as the masks
        shares = [side * length / whole for side, length, whole in zip(content, cells, grid)]
        return [resize_matrix(*axis) for axis in zip(cells, size or grid, shares, windows, flips)]

    view = View(probabilities, masks, *matrices(grid))
    dense_logits = getattr(outputs, "dense_logits", None)
    if dense_logits is None or dense_weight == 0:
        return view
    scores = cell_probabilities(dense_logits[index])
    if probabilities.shape[1] > len(scores):  # cells have no background score: use the one that favours no class
        scores = torch.cat([scores, scores.amax(0, keepdim=True)])
    return view._replace(dense=Dense(scores, *matrices(scores.shape[1:]), dense_weight))


def _weighted(proposals: Tensor, cells: Tensor, weight: float) -> Tensor:
    """The geometric mean `proposals^(1 - weight) · cells^weight` of scores. Powers take three times as long on a CPU."""
    proposals, cells = (scores.clamp(min=torch.finfo(scores.dtype).tiny).log_() for scores in (proposals, cells))
    return proposals.mul_(1 - weight).add_(cells, alpha=weight).exp_()


def class_scores(view: View, penalty: Tensor) -> Tensor:
    """Scores `(C, H, W)` of a view that covers the image, less `penalty (C,)`."""
    scores = torch.einsum("qc,qhw->chw", view.probabilities, view.masks)
    scores = view.rows.to(scores) @ scores @ view.columns.to(scores).T
    if view.dense is not None:
        cells, rows, columns, weight = view.dense
        scores = _weighted(scores, rows.to(scores) @ cells @ columns.to(scores).T, weight)
    return scores - penalty[:, None, None]


def unseen_scores(view: View, unseen_logits: Tensor) -> Tensor:
    """Unseen score per pixel: `Σ_n u_n·σ(mask_n) / Σ_n σ(mask_n)` with `u_n = σ(unseen_logits_n)`; `(H, W)`."""
    unseen = torch.einsum("q,qhw->hw", unseen_logits.float().sigmoid(), view.masks)
    unseen = unseen / view.masks.sum(0).clamp(min=1e-12)
    return view.rows.to(unseen) @ unseen @ view.columns.to(unseen).T


def segment_score(view: View, region: Tensor, label: int) -> float:
    """Probability of class `label`, averaged over the proposals that cover `region`, `bool (H, W)`; 0 to 1."""
    # Each proposal's coverage of the region at full resolution: the adjoint of the masks' resize.
    covered = torch.einsum(
        "qhw,hw->q", view.masks, view.rows.T.to(view.masks) @ region.float() @ view.columns.to(view.masks)
    )
    return (view.probabilities[:, label] @ covered / covered.sum()).item()


class Segments(NamedTuple):
    """Some proposals of a view.

    Attributes:
        proposals, labels, scores: Per segment: the proposal, its class, and its score, 0 to 1.
        map: `int32 (H, W)`: positions in these lists; -1 where there is no segment.
    """

    proposals: list[int]
    labels: list[int]
    scores: list[float]
    map: Tensor


def proposal_mask(view: View, proposal: int) -> Tensor:
    """One mask at the pixels of the label map, `(H, W)`, 0 to 1."""
    return view.rows.to(view.masks) @ view.masks[proposal] @ view.columns.to(view.masks).T


def panoptic_segments(view: View, threshold: float, mask_threshold: float, overlap: float) -> Segments:
    """Proposals as segments that do not overlap, in the order of the proposals.

    A proposal takes part if its most probable class is not the background and the probability of that class, its score,
    is above `threshold`. A pixel goes to the proposal with the greatest `score · mask`, if its mask reaches
    `mask_threshold` there. A proposal that keeps no more than the share `overlap` of its mask is dropped, and the pixels
    are divided among the others. Two proposals of the same region may both be dropped because of each other, so each
    dropped one is tried again, highest score first: it stays if it now gets more than this share.
    """
    scores, labels = view.probabilities.max(-1)
    takes_part = (labels < view.probabilities.shape[1] - 1) & (scores > threshold)
    winners, _, areas = _divided(view, takes_part, scores, mask_threshold)
    visible = torch.bincount(winners.flatten() + 1, minlength=len(scores) + 1)[1:]
    stays = (visible > 0) & (visible > overlap * areas)
    dropped = (takes_part & ~stays).nonzero()[:, 0].tolist()
    if dropped:
        winners, best, _ = _divided(view, stays, scores, mask_threshold)
    for proposal in sorted(dropped, key=lambda proposal: -scores[proposal].item()):
        mask = proposal_mask(view, proposal)
        inside = mask >= mask_threshold
        free = inside & (mask * scores[proposal] > best)
        if free.sum() > overlap * inside.sum():
            stays[proposal], winners[free], best[free] = True, proposal, torch.inf
    kept = stays.nonzero()[:, 0]
    places = torch.where(stays, stays.cumsum(0) - 1, -1).int()
    winners = torch.cat([places.new_full((1,), -1), places])[winners + 1]
    return Segments(kept.tolist(), labels[kept].tolist(), scores[kept].tolist(), winners)


def _divided(view: View, takes_part: Tensor, scores: Tensor, mask_threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The proposal that wins each pixel or -1, `int32 (H, W)`; the greatest `score · mask`, `(H, W)`; and the areas of all
    masks that take part, `(N,)`."""
    winners = torch.full((len(view.rows), len(view.columns)), -1, dtype=torch.int32, device=view.masks.device)
    best = torch.zeros(winners.shape, device=view.masks.device)
    areas = torch.zeros(len(scores), dtype=torch.int64, device=view.masks.device)
    for proposal in takes_part.nonzero()[:, 0].tolist():
        mask = proposal_mask(view, proposal)
        inside, weighted = mask >= mask_threshold, mask * scores[proposal]
        areas[proposal] = inside.sum()
        better = weighted > best
        winners = torch.where(better, torch.where(inside, proposal, -1).int(), winners)
        best = torch.where(better, weighted, best)
    return winners, best, areas


def instance_segments(
    view: View, proposals: int, threshold: float, mask_threshold: float, overlap: float
) -> tuple[Segments, list[Tensor]]:
    """The first `proposals` of a view as instances, highest score first, and their whole masks, `bool (H, W)`.

    The score is `p(class) · mean of the mask over its pixels`, those above `mask_threshold`. Of all pairs of a proposal
    and a class, the best ones take part, as many as there are proposals. A pixel goes to the instance with the highest
    score. An instance is dropped if its score is below `threshold` or it keeps less than the share `overlap` of its mask.
    """
    probabilities = view.probabilities[:proposals, :-1]
    scores, pairs = probabilities.flatten().topk(proposals)
    pairs = [(index // probabilities.shape[1], index % probabilities.shape[1]) for index in pairs.tolist()]
    quality: dict[int, float] = {}
    for proposal in {proposal for (proposal, _), score in zip(pairs, scores.tolist()) if score >= threshold}:
        mask = proposal_mask(view, proposal)
        inside = mask > mask_threshold
        quality[proposal] = (mask[inside].mean() if inside.any() else mask.new_zeros(())).item()
    ranked = [(score * quality.get(pair[0], 0.0), *pair) for pair, score in zip(pairs, scores.tolist())]
    ranked = sorted(
        (part for part in ranked if part[0] >= threshold and quality.get(part[1])), key=lambda part: -part[0]
    )
    result = Segments([], [], [], torch.full((len(view.rows), len(view.columns)), -1, dtype=torch.int32))
    result = result._replace(map=result.map.to(view.masks.device))
    masks = []
    for score, proposal, label in ranked:
        mask = proposal_mask(view, proposal) > mask_threshold
        free = mask & (result.map < 0)
        if free.sum() < overlap * mask.sum():
            continue
        result.map[free] = len(masks)
        masks.append(mask)
        for values, value in zip(result, (proposal, label, score)):
            values.append(value)
    return result, masks


def run_lengths(mask: Tensor) -> dict[str, list[int]]:
    """COCO's uncompressed run-length encoding of `bool (H, W)`: `size`, and alternating `counts` of 0s and 1s by columns."""
    pixels = mask.T.flatten()
    changes = (pixels[1:] != pixels[:-1]).nonzero()[:, 0] + 1
    ends = torch.cat([changes, changes.new_full((1,), len(pixels))])
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if pixels[0] else counts}


def label_map(views: list[View], penalty: Tensor | None = None) -> Tensor:
    """The class with the greatest score at every pixel: the mean over the views that show it, less `penalty`.

    Args:
        views: Views of one image that together cover it.
        penalty: `(C,)`, subtracted from the scores.

    Returns:
        `int64 (H, W)` on the device of the views.
    """
    device = views[0].masks.device
    if penalty is None:
        penalty = torch.zeros(views[0].probabilities.shape[1])
    penalty = penalty.to(device)
    height, width = len(views[0].rows), len(views[0].columns)
    labels = torch.empty(height, width, dtype=torch.long, device=device)
    tables = [view.probabilities.T.contiguous() for view in views]
    # With few classes, all are scored anyway, and larger tiles cost fewer steps.
    scale = 4 if len(penalty) <= LEADERS else 1
    for rows in _tiles([view.rows for view in views], device, scale):
        for columns in _tiles([view.columns for view in views], device, scale):
            labels[rows, columns] = _winners(list(_parts(views, tables, rows, columns)), penalty)
    return labels


def refine_scores(scores: Tensor, image: Tensor) -> Tensor:
    """Scores that follow the edges of an image: pixel-adaptive mask refinement (PAMR, Araslanov and Roth, CVPR 2020).

    Every step replaces the scores of a pixel by a mean over its neighbours, weighted by how similar their colours are
    relative to the contrast around the pixel.

    Args:
        scores: `(C, H, W)`.
        image: `(3, H, W)`.
    """
    reach, (height, width) = max(REFINED_DILATIONS), image.shape[1:]
    offsets = [
        (reach + dy * step, reach + dx * step)
        for step in REFINED_DILATIONS
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
        if dy or dx
    ]

    def neighbours(values: Tensor) -> Iterator[Tensor]:
        padded = F.pad(values[None], (reach,) * 4, mode="replicate")[0]
        return (padded[:, y : y + height, x : x + width] for y, x in offsets)

    count = len(offsets) + 1
    mean = (image + sum(neighbours(image))) / count
    variance = (image - mean) ** 2 + sum((part - mean) ** 2 for part in neighbours(image))
    contrast = REFINED_CONTRAST * (variance / (count - 1)).sqrt() + 1e-8
    weights = torch.stack([-((part - image).abs() / contrast).mean(0) for part in neighbours(image)]).softmax(0)
    for _ in range(REFINED_STEPS):
        scores = sum(weight * part for weight, part in zip(weights, neighbours(scores)))
    return scores


def refined_map(view: View, labels: Tensor, image: Tensor, penalty: Tensor) -> Tensor:
    """A label map whose borders follow the image.

    Only the classes of `labels` take part.

    Args:
        view: View with the resolution of `image`, which may be lower than that of `labels`.
        labels: `int64 (H, W)`, from [`label_map`].
        image: `(3, h, w)`.
        penalty: `(C,)`, as for [`label_map`].
    """
    present = labels.unique()
    scores = refine_scores(class_scores(view.classes(present), penalty[present]), image)
    best = scores.new_full(labels.shape, -math.inf)
    for index, values in zip(present.tolist(), scores):  # one class at full size at a time
        values = F.interpolate(values[None, None], size=tuple(labels.shape), mode="bilinear", align_corners=False)[
            0, 0
        ]
        labels = torch.where(values > best, index, labels)
        best = torch.maximum(best, values)
    return labels


def _tiles(matrices: list[Tensor], device: torch.device, scale: int) -> Iterator[slice]:
    """Cuts an axis of the label map into tiles with a bounded number of pixels and of mask cells per view."""
    kind = "cpu" if device.type == "cpu" else "other"
    length, step = len(matrices[0]), scale * TILE_PIXELS[kind]
    for matrix in matrices:
        cells = int(matrix.any(0).sum())
        step = min(step, max(1, scale * TILE_CELLS[kind] * int(matrix.any(1).sum()) // max(cells, 1)))
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


class _Part(NamedTuple):
    """The part of a view in a tile: probabilities `(C, N)`, cells `(N, h, w)`, rows `(H, h)`, columns `(W, w)`."""

    probabilities: Tensor
    cells: Tensor
    rows: Tensor
    columns: Tensor
    dense: Dense | None

    def bound(self, largest: bool) -> Tensor:
        """Per class, `(C,)`: an upper bound of its scores in the tile, or the score of the mean cell."""
        reduce = (lambda cells: cells.amax((1, 2))) if largest else (lambda cells: cells.mean((1, 2)))
        scores = self.probabilities @ reduce(self.cells)
        return scores if self.dense is None else _weighted(scores, reduce(self.dense.scores), self.dense.weight)

    def scores(self, classes: Tensor) -> Tensor:
        """`(len(classes), H, W)`."""
        scores = (self.probabilities[classes] @ self.cells.flatten(1)).unflatten(1, self.cells.shape[1:])
        scores = self.rows @ scores @ self.columns.T
        if self.dense is None:
            return scores
        cells, rows, columns, weight = self.dense
        return _weighted(scores, rows @ cells[classes] @ columns.T, weight)


def _cut(values: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The part of `values (n, h, w)` that the `rows (H, h)` and `columns (W, w)` of a tile use, and the reduced matrices."""
    matrices, cells = [], []
    for matrix in (rows, columns):
        used = matrix.any(0).nonzero()[:, 0]
        cells.append(slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0))
        matrices.append(matrix[:, cells[-1]].to(values.device))
    return values[:, cells[0], cells[1]], *matrices


def _parts(views: list[View], tables: list[Tensor], rows: slice, columns: slice) -> Iterator[_Part]:
    for view, table in zip(views, tables):
        cut = _cut(view.masks, view.rows[rows], view.columns[columns])
        if all(part.numel() for part in cut):
            dense = view.dense
            if dense is not None:
                dense = Dense(*_cut(dense.scores, dense.rows[rows], dense.columns[columns]), dense.weight)
            yield _Part(table, *cut, dense)


def _winners(parts: list[_Part], penalty: Tensor) -> Tensor:
    """The best class of each pixel of a tile, `(H, W)`.

    The classes that are expected to win are scored first. Their scores are a lower bound: another class remains a
    candidate only if its upper bound for the tile, `Σ_n p(c|n)·max(mask_n)`, reaches it.
    """
    upper = torch.stack([part.bound(largest=True) for part in parts]).amax(0) - penalty
    expected = torch.stack([part.bound(largest=False) for part in parts]).mean(0) - penalty
    coverage = sum(part.rows.sum(1)[:, None] * part.columns.sum(1) for part in parts) if len(parts) > 1 else None
    largest = max(len(parts[0].rows) * len(parts[0].columns), *(part.cells[0].numel() for part in parts))
    at_once = max(1, WORKSPACE // largest)

    def race(classes: Tensor) -> tuple[Tensor, Tensor]:
        total = reduce(torch.add, (part.scores(classes) for part in parts))
        values = (total if coverage is None else total / coverage) - penalty[classes, None, None]
        best, first = values.max(0)
        return best, classes[first]

    leaders = expected.topk(min(LEADERS, at_once, len(expected))).indices.sort().values  # the first of equals wins
    best, labels = race(leaders)
    floor = best.amin()
    rounding = 1e-5 * (floor.abs() + 2 * penalty.abs().amax()) + torch.finfo(floor.dtype).tiny
    others = upper >= floor - rounding
    others[leaders] = False
    for classes in others.nonzero()[:, 0].split(at_once):
        if len(classes):
            values, winners = race(classes)
            better = (values > best) | ((values == best) & (winners < labels))
            labels = torch.where(better, winners, labels)
            best = torch.maximum(best, values)
    return labels
