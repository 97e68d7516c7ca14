# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Matching and all loss terms against plain loops, brute force and transformers' Mask2Former."""

import itertools
import math
import socket
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare
from tiny import tiny_config, tiny_model
from torch import Tensor
from transformers.models.mask2former import modeling_mask2former as mask2former

from modeling_alignzeg import loss_alignzeg
from modeling_alignzeg.classifier_alignzeg import AlignZegBackgroundPrototypes, AlignZegFeatureExpansion
from modeling_alignzeg.indicator_alignzeg import AlignZegClassIndicator, Evidence
from modeling_alignzeg.loss_alignzeg import (
    IGNORED_SHARE,
    PointSample,
    ProposalMatch,
    SegmentationTargets,
    cell_centres,
    classification_loss,
    count_over_processes,
    mask_loss,
    mask_values,
    match_proposals,
    reached_pixels,
    sample_labelled_points,
    stack_targets,
    target_reach,
    unlabelled_segments,
)


WEIGHTS = (2.0, 5.0, 5.0)
NUM_CLASSES = 6
Table = list[list[float]]  # a cost for every proposal and target
SEEN = torch.tensor([True, True, False, True, True, True])


def random_labels(
    counts: list[int],
    size: tuple[int, int] = (12, 16),
    seed: int = 0,
    ignored: bool = True,
    classes: int = NUM_CLASSES,
) -> tuple[list[Tensor], list[Tensor]]:
    """`mask_labels` and `class_labels` of images with the given numbers of classes, as coarse blocks of random labels."""
    generator = torch.Generator().manual_seed(seed)
    masks, names = [], []
    for count in counts:
        coarse = torch.randint(-1 if ignored else 0, max(count, 1), (size[0] // 4, size[1] // 4), generator=generator)
        coarse.view(-1)[:count] = torch.arange(count)  # every class has at least one block
        if ignored:
            coarse.view(-1)[-3:] = -1
        label = coarse.repeat_interleave(4, 0).repeat_interleave(4, 1)
        masks.append(
            torch.stack([label == i for i in range(count)]) if count else torch.zeros(0, *size, dtype=torch.bool)
        )
        names.append(torch.randperm(classes, generator=generator)[:count])
    return masks, names


def random_targets(counts: list[int], size: tuple[int, int] = (12, 16), **options) -> SegmentationTargets:
    return stack_targets(*random_labels(counts, size, **options), size, torch.ones(NUM_CLASSES, dtype=torch.bool))


def every_pixel(targets: SegmentationTargets) -> Tensor:
    batch, height, width = targets.labelled.shape
    return torch.arange(height * width).expand(batch, -1)


def plain_value(mask: Tensor, row: int, column: int, size: tuple[int, int]) -> float:
    """Bilinear value of `mask (h, w)` at the centre of a pixel of the image, the outermost cells repeated."""
    place = []
    for index, pixels, cells in zip((row, column), size, mask.shape):
        position = (index + 0.5) * cells / pixels - 0.5
        low = math.floor(position)
        share = position - low
        place.append([(min(max(low, 0), cells - 1), 1 - share), (min(max(low + 1, 0), cells - 1), share)])
    return sum(float(mask[y, x]) * wy * wx for y, wy in place[0] for x, wx in place[1])


def plain_terms(logits: list[float], actual: list[int]) -> tuple[float, float]:
    """Cross-entropy and dice of one mask at some points."""
    entropy = [-math.log(sigmoid(v) if a else sigmoid(-v)) for v, a in zip(logits, actual)]
    both = sum(sigmoid(v) * a for v, a in zip(logits, actual))
    total = sum(map(sigmoid, logits)) + sum(actual)
    return sum(entropy) / max(len(entropy), 1), 1 - (2 * both + 1) / (total + 1)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def compared_values(mask: Tensor, targets: SegmentationTargets, image: int, target: int, points: Tensor):
    """Logits and labels at the `points` that count for a target: labelled ones, and unlabelled ones inside the target's
    bounding box, grown by a quarter of its sides."""
    size = targets.labelled.shape[-2:]
    used = targets.masks[image, target].nonzero().tolist()
    spans = []
    for axis in (0, 1):
        first, last = min(place[axis] for place in used), max(place[axis] for place in used)
        extra = math.ceil((last + 1 - first) / 4)
        spans.append(range(first - extra, last + extra + 1))
    logits, actual = [], []
    for point in points.tolist():
        row, column = divmod(point, size[1])
        if targets.labelled[image, row, column] or (row in spans[0] and column in spans[1]):
            logits.append(plain_value(mask, row, column, size))
            actual.append(int(targets.masks[image, target, row, column]))
    return logits, actual


def plain_cost(masks: Tensor, classes: Tensor, targets: SegmentationTargets, image: int, points: Tensor) -> Table:
    """`2·(−p) + 5·BCE + 5·dice` of every pair of a proposal and a target."""
    table = []
    for query in range(masks.shape[1]):
        probability = classes[image, query].softmax(-1)
        row = []
        for target in range(targets.counts[image]):
            terms = plain_terms(*compared_values(masks[image, query], targets, image, target, points[image]))
            costs = (-float(probability[targets.classes[image, target]]), *terms)
            row.append(sum(weight * cost for weight, cost in zip(WEIGHTS, costs)))
        table.append(row)
    return table


def cost_of(table: Table, pairs: dict[int, int]) -> float:
    return sum(table[query][target] for query, target in pairs.items())


def brute_force(table: Table, targets: int) -> dict[int, int]:
    """The cheapest assignment of distinct proposals to targets, or vice versa if there are fewer proposals."""
    queries = len(table)
    if targets <= queries:
        every = (dict(zip(chosen, range(targets))) for chosen in itertools.permutations(range(queries), targets))
    else:
        every = (dict(enumerate(chosen)) for chosen in itertools.permutations(range(targets), queries))
    return min(every, key=lambda pairs: cost_of(table, pairs))


def pairs_of(match: ProposalMatch, image: int) -> dict[int, int]:
    here = match.image == image
    return dict(zip(match.query[here].tolist(), match.target[here].tolist()))


# --- targets and points ----------------------------------------------------------------------------------------------


def test_targets_are_padded_and_know_what_is_labelled() -> None:
    masks = [torch.zeros(2, 3, 4, dtype=torch.uint8), torch.zeros(1, 4, 5)]
    masks[0][0, :, :2], masks[0][1, 0, 2], masks[1][0, 3, 4] = 1, 1, 1
    targets = stack_targets(masks, [torch.tensor([4, 1]), torch.tensor([5], dtype=torch.int32)], (4, 6), SEEN)
    assert targets.masks.shape == (2, 2, 4, 6) and targets.masks.dtype == torch.bool
    # Class 2 is unseen, so later classes move down by one in the training vocabulary.
    assert targets.classes.tolist() == [[3, 1], [4, -1]] and targets.counts == [2, 1]
    expected = torch.zeros(2, 4, 6, dtype=torch.bool)
    expected[0, :3, :2] = expected[0, 0, 2] = expected[1, 3, 4] = True
    assert torch.equal(targets.labelled, expected)
    assert torch.equal(targets.masks.any(1), expected)


def test_images_without_labels_are_padding() -> None:
    empty = torch.zeros(0, 4, 4), torch.zeros(0, dtype=torch.long)
    targets = stack_targets([empty[0]] * 2, [empty[1]] * 2, (4, 4), SEEN)
    assert targets.counts == [0, 0] and not targets.labelled.any() and targets.labelled.shape == (2, 4, 4)
    one = stack_targets([empty[0], torch.ones(1, 4, 4)], [empty[1], torch.tensor([1])], (4, 4), SEEN)
    assert one.counts == [0, 1] and not one.labelled[0].any() and one.labelled[1].all()


@pytest.mark.parametrize("label", [NUM_CLASSES, 255, -1, -100, 2])
@pytest.mark.parametrize("position", [0, 1])
def test_labels_outside_of_the_seen_vocabulary_are_refused(label: int, position: int) -> None:
    """Ids that are too large, negative, or (2) unseen, at any position."""
    classes = [4, 1]
    classes[position] = label
    with pytest.raises(ValueError, match=rf"`class_labels`.* {label}\b"):
        stack_targets([torch.ones(2, 4, 4)], [torch.tensor(classes)], (4, 4), SEEN)


@pytest.mark.parametrize(
    ("mask_labels", "class_labels", "name"),
    [
        ([torch.ones(1, 4, 4)], [], "`mask_labels` has 1 entries and `class_labels` 0"),
        ([torch.ones(2, 4, 4)], [torch.tensor([1])], r"`mask_labels\[0\]`.*`class_labels\[0\]`"),
        ([torch.ones(1, 4, 4), torch.ones(1, 5, 4)], [torch.tensor([1])] * 2, r"`mask_labels\[1\]`"),
        ([torch.ones(1, 4, 5)], [torch.tensor([1])], r"`mask_labels\[0\]`"),
        ([torch.ones(4, 4)], [torch.tensor([1])], r"`mask_labels\[0\]`"),
        ([torch.ones(1, 1, 4, 4)], [torch.tensor([1])], r"`mask_labels\[0\]`"),
        ([torch.ones(4)], [torch.tensor([1])], r"`mask_labels\[0\]`"),
        ([torch.ones(1, 4, 4)], [torch.tensor([[1]])], r"`class_labels\[0\]`"),
        ([torch.ones(1, 4, 4)], [torch.tensor(1)], r"`class_labels\[0\]`"),
    ],
)
def test_labels_of_wrong_shape_are_named(mask_labels: list[Tensor], class_labels: list[Tensor], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        stack_targets(mask_labels, class_labels, (4, 4), SEEN)


def test_points_are_uniform_over_labelled_pixels() -> None:
    torch.manual_seed(0)
    labelled = torch.rand(3, 5, 7) > 0.5
    labelled[1] = False
    labelled[2], labelled[2, 4, 6] = False, True  # only the last pixel
    points = sample_labelled_points(labelled, 20_000)
    assert points.shape == (3, 20_000) and points.dtype == torch.int64
    assert points[1].eq(0).all() and points[2].eq(34).all()
    counts = points[0].bincount(minlength=35)
    flat = labelled[0].flatten()
    assert counts[~flat].sum() == 0
    assert chisquare(counts[flat].tolist()).pvalue > 1e-3


def test_cell_centres() -> None:
    expected = [(r * 4 + 2) * 12 + c * 3 + 1 for r in range(2) for c in range(4)]
    assert cell_centres((2, 4), (8, 12), torch.device("cpu")).tolist() == expected


def test_mask_values_are_bilinear() -> None:
    torch.manual_seed(0)
    masks = torch.randn(2, 3, 4, 6)
    points = torch.randint(0, 12 * 18, (2, 40))
    values = mask_values(masks, points, (12, 18))
    for image, query, i in itertools.product(range(2), range(3), range(40)):
        row, column = divmod(int(points[image, i]), 18)
        expected = plain_value(masks[image, query], row, column, (12, 18))
        assert values[image, query, i].item() == pytest.approx(expected, abs=1e-5)
    own = torch.arange(24).expand(2, -1)
    torch.testing.assert_close(mask_values(masks, own, (4, 6)), masks.flatten(2))


# --- matching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_matching_is_the_cheapest_assignment(seed: int) -> None:
    """With unlabelled pixels, images without labels and more targets than proposals."""
    torch.manual_seed(seed)
    targets = random_targets([3, 0, 5, 1], seed=seed)
    masks, classes = torch.randn(4, 4, 3, 4) * 3, torch.randn(4, 4, NUM_CLASSES + 1)
    points = torch.randint(0, 12 * 16, (4, 50))
    match = match_proposals(masks, classes, targets, points, WEIGHTS)
    for image, count in enumerate(targets.counts):
        table = plain_cost(masks, classes, targets, image, points)
        found, best = pairs_of(match, image), brute_force(table, count)
        assert len(found) == min(4, count)
        assert cost_of(table, found) == pytest.approx(cost_of(table, best), abs=1e-4)
        assert found == best


@pytest.mark.parametrize("seed", range(3))
def test_matching_equals_mask2formers_where_all_is_labelled(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(seed)
    size, number = (12, 16), 60
    masks, names = random_labels([3, 4], size, seed, ignored=False)
    targets = stack_targets(masks, names, size, torch.ones(NUM_CLASSES, dtype=torch.bool))
    assert targets.labelled.all()
    logits, classes = torch.randn(2, 7, *size) * 3, torch.randn(2, 7, NUM_CLASSES + 1)
    points = torch.randint(0, 12 * 16, (number,))
    # The same points for both: Mask2Former samples (x, y) in 0..1.
    centres = torch.stack([(points % 16 + 0.5) / 16, (points // 16 + 0.5) / 12], -1)[None]
    monkeypatch.setattr(mask2former.torch, "rand", lambda *shape, **_: centres)
    matcher = mask2former.Mask2FormerHungarianMatcher(*WEIGHTS, num_points=number)
    theirs = matcher(logits, classes, masks, names)
    ours = match_proposals(logits, classes, targets, points.expand(2, -1), WEIGHTS)
    for image, (queries, objects) in enumerate(theirs):
        assert pairs_of(ours, image) == dict(zip(queries.tolist(), objects.tolist()))


def test_each_cost_alone_finds_the_obvious_partner() -> None:
    targets = random_targets([3])
    masks = torch.where(targets.masks.flip(1), 8.0, -8.0)  # proposal q draws target 2 - q
    classes = torch.zeros(1, 3, NUM_CLASSES + 1)
    for query, target in enumerate([1, 2, 0]):
        classes[0, query, targets.classes[0, target]] = 5.0
    by_mask = {0: 2, 1: 1, 2: 0}
    for weights, expected in {(1, 0, 0): {0: 1, 1: 2, 2: 0}, (0, 1, 0): by_mask, (0, 0, 1): by_mask}.items():
        assert pairs_of(match_proposals(masks, classes, targets, every_pixel(targets), weights), 0) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_leaves_the_sums_over_points_alone(dtype: torch.dtype) -> None:
    """A sum of 12,544 logits of 8 overflows in float16; in bfloat16 good masks would cost nothing."""
    targets = random_targets([3, 2])
    torch.manual_seed(0)
    masks = torch.where(targets.masks, 8.0, -8.0) + torch.randn(2, 3, 12, 16)
    classes = torch.randn(2, 3, NUM_CLASSES + 1)
    points = torch.randint(0, 12 * 16, (2, 12544))
    plain = match_proposals(masks, classes, targets, points, WEIGHTS)
    term = classification_loss(classes, masks, targets, plain, 0.1)
    with torch.autocast("cpu", dtype):
        found = match_proposals(masks, classes, targets, points, WEIGHTS)
        assert torch.equal(classification_loss(classes, masks, targets, plain, 0.1), term)
    assert [pairs_of(found, image) for image in (0, 1)] == [pairs_of(plain, image) for image in (0, 1)]


@pytest.mark.parametrize("part", ["mask", "class"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_costs_that_are_not_finite_are_named(part: str, value: float) -> None:
    targets = random_targets([2, 3])
    masks, classes = torch.zeros(2, 4, 12, 16), torch.zeros(2, 4, NUM_CLASSES + 1)
    (masks if part == "mask" else classes)[1, 2] = value
    with pytest.raises(FloatingPointError, match=rf"(?s)[Mm]atching of image 1 .*term: .*{part}"):
        match_proposals(masks, classes, targets, every_pixel(targets), WEIGHTS)


def test_missing_scipy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_alignzeg, "linear_sum_assignment", None)
    targets = random_targets([1])
    with pytest.raises(ImportError, match="pip install scipy"):
        match_proposals(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 7), targets, every_pixel(targets), WEIGHTS)


# --- mask loss -------------------------------------------------------------------------------------------------------


def matched(targets: SegmentationTargets, queries: int) -> ProposalMatch:
    """Target t of every image goes to proposal `queries - 1 - t`."""
    rows = [(image, queries - 1 - t, t) for image, count in enumerate(targets.counts) for t in range(count)]
    return ProposalMatch(*torch.tensor(rows).T)


@pytest.mark.parametrize("seed", range(3))
def test_mask_loss_equals_loops(seed: int) -> None:
    torch.manual_seed(seed)
    targets = random_targets([3, 0, 2], seed=seed)
    masks = torch.randn(3, 4, 6, 8) * 3
    match = matched(targets, 4)
    points = torch.randint(0, 12 * 16, (3, 70))
    entropy, dice = mask_loss(masks, targets, match, PointSample(points))
    expected = [
        plain_terms(*compared_values(masks[i, q], targets, i, t, points[i]))
        for i, q, t in zip(match.image.tolist(), match.query.tolist(), match.target.tolist())
    ]
    assert entropy.item() == pytest.approx(sum(e for e, _ in expected) / 5, abs=1e-5)
    assert dice.item() == pytest.approx(sum(d for _, d in expected) / 5, abs=1e-5)


def test_mask_loss_keeps_the_least_certain_points() -> None:
    torch.manual_seed(0)
    targets = random_targets([3, 2])
    masks = torch.randn(2, 4, 6, 8) * 3
    match = matched(targets, 4)
    points = sample_labelled_points(targets.labelled, 60)
    entropy, dice = mask_loss(masks, targets, match, PointSample(points, 20, 10))
    expected = []
    for i, q, t in zip(match.image.tolist(), match.query.tolist(), match.target.tolist()):
        certainty = lambda point, i=i, q=q: abs(plain_value(masks[i, q], *divmod(point, 16), (12, 16)))  # noqa: E731
        kept = sorted(points[i, :50].tolist(), key=certainty)[:20] + points[i, 50:].tolist()
        expected.append(plain_terms(*compared_values(masks[i, q], targets, i, t, torch.tensor(kept))))
    assert entropy.item() == pytest.approx(sum(e for e, _ in expected) / 5, abs=1e-4)
    assert dice.item() == pytest.approx(sum(d for _, d in expected) / 5, abs=1e-4)


def test_mask_loss_equals_mask2formers_where_all_is_labelled() -> None:
    torch.manual_seed(0)
    targets = random_targets([3, 2], ignored=False)
    masks = (torch.randn(2, 4, 12, 16) * 3).requires_grad_()
    match = matched(targets, 4)
    ours = mask_loss(masks, targets, match, PointSample(every_pixel(targets)))
    chosen = masks[match.image, match.query].flatten(1)
    actual = targets.masks[match.image, match.target].flatten(1).float()
    theirs = mask2former.sigmoid_cross_entropy_loss(chosen, actual, 5), mask2former.dice_loss(chosen, actual, 5)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(terms[0] + 2 * terms[1], masks, retain_graph=True)[0] for terms in (ours, theirs)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("sampled", [False, True])
def test_unlabelled_pixels_out_of_reach_are_outside_of_matching_and_mask_loss(sampled: bool) -> None:
    torch.manual_seed(0)
    targets = random_targets([3, 2, 4], size=(24, 32))
    targets.masks[..., 14:, :] = targets.masks[..., 20:] = False  # no target reaches row 18 or column 25
    targets.labelled = targets.masks.any(1)
    targets.reach = target_reach(targets.masks, None)
    counts = reached_pixels(targets)
    assert not counts.flatten(1).all(1).any() and (counts & ~targets.labelled).any()
    masks, classes = (torch.randn(3, 5, 24, 32) * 3).requires_grad_(), torch.randn(3, 5, NUM_CLASSES + 1)
    changed = masks.detach() + 50 * torch.randn(3, 5, 24, 32) * ~counts[:, None]
    points = sample_labelled_points(counts, 80) if sampled else every_pixel(targets)
    sample = PointSample(points, 30, 20) if sampled else PointSample(points)
    results = []
    for logits in (masks, changed):
        match = match_proposals(logits, classes, targets, points, WEIGHTS)
        results.append((match, mask_loss(logits, targets, match, sample)))
    assert [pairs_of(results[0][0], image) for image in range(3)] == [
        pairs_of(results[1][0], image) for image in range(3)
    ]
    torch.testing.assert_close(results[0][1], results[1][1])
    (gradient,) = torch.autograd.grad(sum(results[0][1]), masks)
    outside = gradient.masked_select(~counts[:, None])
    assert outside.eq(0).all() and gradient.abs().sum() > 0


# --- classification loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("no_object_weight", [0.1, 0.4, 0.0])
def test_classification_loss_equals_loops(no_object_weight: float) -> None:
    torch.manual_seed(0)
    targets = random_targets([2, 0, 3], seed=3)
    masks, classes = torch.randn(3, 6, 3, 4) * 4, torch.randn(3, 6, NUM_CLASSES + 1) * 2
    match = matched(targets, 6)
    total, weights, left_out = 0.0, 0.0, 0
    for image, query in itertools.product(range(3), range(6)):
        target = pairs_of(match, image).get(query)
        weight, label = 1.0, NUM_CLASSES
        if target is not None:
            label = int(targets.classes[image, target])
        else:
            inside = outside = 0.0
            for row, column in itertools.product(range(12), range(16)):  # masks are 4 times coarser
                chance = sigmoid(float(masks[image, query, row // 4, column // 4]))
                inside += chance * bool(targets.labelled[image, row, column])
                outside += chance * (not targets.labelled[image, row, column])
            weight = 0.0 if outside / (inside + outside) > IGNORED_SHARE else no_object_weight
            left_out += outside / (inside + outside) > IGNORED_SHARE
        total -= weight * float(classes[image, query].log_softmax(-1)[label])
        weights += weight
    loss = classification_loss(classes, masks, targets, match, no_object_weight)
    assert loss.item() == pytest.approx(total / weights, rel=1e-5)
    assert 6 < left_out <= 13  # the image without labels at least


def test_proposals_on_unlabelled_pixels_feel_no_class_loss() -> None:
    """They may cover an unseen object, so they must not be trained towards "no object"."""
    targets = random_targets([2], seed=3)
    masks = torch.full((1, 4, 12, 16), -9.0)
    masks[0, 0][~targets.labelled[0]] = 9.0
    masks[0, 1][targets.labelled[0]] = 9.0
    classes = torch.zeros(1, 4, NUM_CLASSES + 1, requires_grad=True)
    loss = classification_loss(classes, masks, targets, matched(targets, 4), 0.1)
    (gradient,) = torch.autograd.grad(loss, classes)
    assert gradient[0, 0].eq(0).all()
    assert gradient[0, 1, -1] < 0 and (gradient[0, 1, :-1] > 0).all()  # this one is pushed to the background
    # A matched proposal is always included.
    (gradient,) = torch.autograd.grad(
        classification_loss(classes, masks.flip(1), targets, matched(targets, 4), 0.1), classes
    )
    assert gradient[0, 3, targets.classes[0, 0]] < 0


# --- virtual features, background prototypes, indicator --------------------------------------------------------------


def unit(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def plain_cross_entropy(logits: list[float], target: int) -> float:
    return math.log(sum(math.exp(value - logits[target]) for value in logits))


def virtual_loss(
    target: str, virtual: Tensor, own: Tensor, seen: Tensor, background: Tensor, frozen: Tensor | None = None
) -> Tensor:
    part = AlignZegFeatureExpansion(tiny_config(feature_expansion_target=target))
    return part.loss(virtual, own if frozen is None else frozen, own, seen, background, torch.tensor(3.0))


def test_virtual_losses_equal_loops() -> None:
    torch.manual_seed(0)
    virtual, own, frozen, seen, background = unit(5, 8), unit(5, 8), unit(5, 8), unit(4, 8), torch.randn(5)
    expected = {"semantic": 0.0, "reserve": 0.0, "frozen": 0.0}
    for i in range(5):
        cosine = lambda other, i=i: sum(a * b for a, b in zip(virtual[i].tolist(), other.tolist()))  # noqa: E731
        to_own, to_seen = ([3 * cosine(other) for other in others] for others in (own, seen))
        expected["frozen"] += 3 * (1 - cosine(frozen[i])) / 5
        expected["semantic"] += plain_cross_entropy(to_own + to_seen + [float(background[i])], i) / 5
        expected["reserve"] += plain_cross_entropy(to_seen + [float(background[i])], 4) / 5
    for target, value in expected.items():
        found = virtual_loss(target, virtual, own, seen, background, frozen)
        assert found.item() == pytest.approx(value, rel=1e-5), target


def test_virtual_losses_pull_where_they_should() -> None:
    torch.manual_seed(0)
    virtual, own, seen = unit(3, 8).requires_grad_(), unit(3, 8), unit(4, 8)
    background = torch.zeros(3, requires_grad=True)
    semantic, reserve = (
        torch.autograd.grad(virtual_loss(target, virtual, own, seen, background), (virtual, background))
        for target in ("semantic", "reserve")
    )
    assert (-(semantic[0] * own).sum(-1) > 0).all() and (semantic[1] > 0).all()  # to its prototype, off the background
    assert (reserve[1] < 0).all() and (reserve[0] @ seen.mean(0) > 0).float().mean() > 0.5


@pytest.mark.parametrize("target", ["frozen", "semantic", "reserve"])
def test_without_virtual_features_the_loss_is_zero(target: str) -> None:
    virtual = torch.zeros(0, 8, requires_grad=True)
    value = virtual_loss(target, virtual, torch.zeros(0, 8), unit(4, 8), torch.zeros(0))
    value.backward()
    assert value.item() == 0 and virtual.grad is not None


def diversity_loss(prototypes: Tensor) -> float:
    part = AlignZegBackgroundPrototypes(tiny_config())
    part.prototypes = torch.nn.Parameter(prototypes)
    return part.loss().item()


@pytest.mark.parametrize("count", [2, 5])
def test_diversity_loss(count: int) -> None:
    torch.manual_seed(0)
    prototypes = torch.randn(count, 6) * torch.tensor([3.0, 0.1, 1, 1, 1])[:count, None]
    total = 0.0
    for k, other in itertools.permutations(range(count), 2):
        cosine = torch.dot(prototypes[k], prototypes[other]) / prototypes[k].norm() / prototypes[other].norm()
        total += float(cosine) ** 2
    assert diversity_loss(prototypes) == pytest.approx(total / (count * (count - 1)), rel=1e-5)
    assert diversity_loss(torch.eye(6)[:count] * 7) == pytest.approx(0, abs=1e-7)
    assert diversity_loss(torch.ones(count, 6)) == pytest.approx(1, rel=1e-5)
    assert diversity_loss(prototypes[:1]) == 0


@pytest.mark.parametrize("classes", [[0, 1, 2, 3, 0], [1], []], ids=str)
def test_indicator_loss_weighs_both_sides_the_same(classes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.tensor([0.3, -1.0, 2.0, 0.7, -0.2])[: len(classes)]
    held_out: list[Tensor] = []
    monkeypatch.setattr(AlignZegClassIndicator, "score", lambda _, __, seen: held_out.append(~seen) or scores)
    part = AlignZegClassIndicator(tiny_config(held_out_fraction=0.5))
    rows = len(classes)
    evidence = Evidence(torch.zeros(rows, 4), torch.zeros(rows, 5), None)
    loss = part.loss(evidence, torch.tensor(classes, dtype=torch.long))
    (unseen,) = held_out
    assert unseen.sum() == 2
    sides: dict[bool, list[float]] = {True: [], False: []}
    for name, score in zip(classes, scores.tolist()):
        is_unseen = bool(unseen[name])
        sides[is_unseen].append(-math.log(sigmoid(score if is_unseen else -score)))
    expected = sum(sum(side) / len(side) for side in sides.values() if side) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)


# --- the whole objective ---------------------------------------------------------------------------------------------


BASELINE = {
    "feature_expansion": False,
    "bias_correction": False,
    "background_diversity": False,
    "train_num_points": None,
    "id2label": {i: f"class {i}" for i in range(NUM_CLASSES)},
    "label2id": {f"class {i}": i for i in range(NUM_CLASSES)},
    "unseen_labels": ["class 2"],
}


def training_batch(counts: list[int], seed: int = 0, size: tuple[int, int] = (32, 32)) -> dict:
    masks, names = random_labels(counts, size, seed, classes=NUM_CLASSES - 1)
    seen = SEEN.nonzero()[:, 0]
    pixels = torch.randn(len(counts), 3, *size, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": pixels, "mask_labels": masks, "class_labels": [seen[n] for n in names]}


@pytest.mark.parametrize("margin", [0.0, 0.25, 1.5])
def test_reach_of_targets_equals_loops(margin: float) -> None:
    targets = random_targets([2, 0, 3])
    content = torch.tensor([[12, 16], [9, 16], [10, 11]])
    targets.masks &= (torch.arange(12)[:, None] < content[:, 0, None, None, None]) & (
        torch.arange(16) < content[:, 1, None, None, None]
    )
    reach = target_reach(targets.masks, content, margin)
    expected = targets.labelled.clone()
    for image, count in enumerate(targets.counts):
        for target in range(count):
            places = targets.masks[image, target].nonzero().tolist()
            for axis in (0, 1):
                first, last = min(p[axis] for p in places), max(p[axis] for p in places) + 1
                extra = math.ceil((last - first) * margin)
                limit = int(content[image, axis])
                span = [max(first - extra, 0), min(last + extra, limit)]
                assert reach[image, target, 2 * axis : 2 * axis + 2].tolist() == span
            top, bottom, left, right = reach[image, target].tolist()
            expected[image, top:bottom, left:right] = True
    targets.reach = reach
    assert torch.equal(reached_pixels(targets), expected)


def test_objective_equals_the_plain_sum() -> None:
    """Matching by brute force, all points, the training vocabulary without the unseen class, auxiliary masks."""
    model = tiny_model(**BASELINE, num_queries=4, unclaimed_proposal=False)
    batch = training_batch([2, 3])
    with torch.no_grad():
        outputs = model(**batch, output_auxiliary_logits=True)
    targets = stack_targets(batch["mask_labels"], batch["class_labels"], (32, 32), SEEN)
    masks = outputs.masks_queries_logits
    classes = outputs.class_queries_logits[..., torch.cat([SEEN, torch.tensor([True])])]
    points = torch.tensor([(r * 4 + 2) * 32 + c * 4 + 2 for r in range(8) for c in range(8)]).expand(2, -1)
    assert not targets.labelled.all()
    layers = [masks, *outputs.auxiliary_masks_queries_logits]
    assert len(layers) == model.config.num_refinement_layers
    sums, pairs = [[0.0, 0.0] for _ in layers], []
    for image in range(2):
        table = plain_cost(masks, classes, targets, image, points)
        for query, target in brute_force(table, targets.counts[image]).items():
            pairs.append((image, query, target))
            for layer, sums_of_layer in zip(layers, sums):
                terms = plain_terms(*compared_values(layer[image, query], targets, image, target, points[image]))
                for i in range(2):
                    sums_of_layer[i] += terms[i] / 5
    match = ProposalMatch(*torch.tensor(pairs).T)
    expected_class = classification_loss(classes, masks, targets, match, 0.1).item()
    auxiliary = sum(5 * mask + 5 * dice for mask, dice in sums[1:])
    assert outputs.loss_mask.item() == pytest.approx(sums[0][0], abs=1e-5)
    assert outputs.loss_dice.item() == pytest.approx(sums[0][1], abs=1e-5)
    assert outputs.loss_class.item() == pytest.approx(expected_class, abs=1e-5)
    assert outputs.loss_auxiliary.item() == pytest.approx(auxiliary, abs=1e-4)
    total = 2 * expected_class + 5 * sums[0][0] + 5 * sums[0][1] + auxiliary
    assert outputs.loss.item() == pytest.approx(total, abs=1e-4)


def plain_segments(unlabelled: Tensor, stride: int, area: int) -> list[set[tuple[int, int]]]:
    """Connected regions of one image, pixel by pixel: cells with a majority of unlabelled pixels, those covered by an
    entirely unlabelled block of 3×3 cells (the border repeats), flood fill, and at least 1 % of `area`."""
    height, width = (side // stride for side in unlabelled.shape)

    def empty(row: int, column: int) -> bool:
        row, column = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
        cell = unlabelled[row * stride : (row + 1) * stride, column * stride : (column + 1) * stride]
        return int(cell.sum()) * 2 > stride**2

    around = list(itertools.product((-1, 0, 1), repeat=2))
    # The border is repeated once, and an erosion sees nothing beyond it.
    centres = {
        (r, c)
        for r, c in itertools.product(range(height), range(width))
        if all(empty(r + y, c + x) for y, x in around)
    }
    waiting = {(r + y, c + x) for r, c in centres for y, x in around if 0 <= r + y < height and 0 <= c + x < width}
    regions = []
    while waiting:
        region, border = set(), [waiting.pop()]
        while border:
            r, c = border.pop()
            region.add((r, c))
            beside = {(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)} & waiting
            waiting -= beside
            border += beside
        if len(region) * stride**2 * 100 >= area:
            pixels = itertools.product(region, range(stride), range(stride))
            places = {(r * stride + y, c * stride + x) for (r, c), y, x in pixels}
            regions.append({place for place in places if unlabelled[place]})
    return regions


@pytest.mark.parametrize("with_padding", [False, True])
def test_unlabelled_segments_are_the_connected_regions(with_padding: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    size, stride = (96, 128), 4
    shape = (3, 2, size[0] // 8, size[1] // 8)
    masks = (torch.rand(shape, generator=generator) < 0.15).repeat_interleave(8, 2).repeat_interleave(8, 3)
    masks &= torch.rand(3, 2, *size, generator=generator) < 0.95
    masks[2] = True  # nothing is unlabelled
    classes = [torch.tensor([0, 1])] * 3
    content = torch.tensor([[96, 128], [80, 90], [96, 128]]) if with_padding else None
    for image, (height, width) in enumerate(content.tolist() if with_padding else []):
        masks[image, :, height:], masks[image, :, :, width:] = False, False
    targets = stack_targets(list(masks), classes, size, torch.ones(2, dtype=torch.bool), content)
    segments = unlabelled_segments(targets, stride, content)
    sizes = content.tolist() if with_padding else [list(size)] * 3
    found = 0
    for image, (height, width) in enumerate(sizes):
        unlabelled = ~targets.labelled[image]
        unlabelled[height:], unlabelled[:, width:] = False, False
        expected = plain_segments(unlabelled, stride, height * width)
        count = segments.counts[image]
        masks_of_image = [set(map(tuple, mask.nonzero().tolist())) for mask in segments.masks[image, :count]]
        assert sorted(map(sorted, masks_of_image)) == sorted(map(sorted, expected))
        assert torch.equal(segments.labelled[image], targets.labelled[image] | segments.masks[image].any(0))
        found += count
    assert segments.counts[2] == 0 and found >= 4


def test_unlabelled_segments_train_the_masks_of_free_proposals_only() -> None:
    """The loss equals plain sums over the best assignment of the proposals that no class has taken."""
    model = tiny_model(**BASELINE, num_queries=4, unclaimed_proposal=False, unlabelled_weight=0.5)
    label = torch.full((32, 32), -1)
    label[:, :8], label[:4], label[16:20] = 0, 1, 0
    batch = {
        "pixel_values": torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
        "mask_labels": [torch.stack([label == 0, label == 1])],
        "class_labels": [torch.tensor([0, 1])],
    }
    with torch.no_grad():
        outputs = model(**batch, output_auxiliary_logits=True)
        model.config.unlabelled_weight = 0.0
        without = model(**batch)
    assert outputs.loss.item() == pytest.approx(without.loss.item() + 0.5 * outputs.loss_unlabelled.item(), rel=1e-5)
    assert without.loss_unlabelled.item() == 0
    targets = stack_targets(batch["mask_labels"], batch["class_labels"], (32, 32), SEEN)
    segments = unlabelled_segments(targets, model.config.mask_stride, None)
    assert segments.counts == [2]
    masks = outputs.masks_queries_logits
    classes = outputs.class_queries_logits[..., torch.cat([SEEN, torch.tensor([True])])]
    points = cell_centres(tuple(masks.shape[-2:]), (32, 32), "cpu")[None]
    taken = match_proposals(masks, classes, targets, points, WEIGHTS)
    free = [n for n in range(4) if n not in taken.query.tolist()]

    def terms(layer: Tensor, query: int, target: int) -> float:
        places = [divmod(point, 32) for point in points[0].tolist() if segments.labelled[0].flatten()[point]]
        logits = [plain_value(layer[0, query], *place, (32, 32)) for place in places]
        return 5 * sum(plain_terms(logits, [int(segments.masks[0, target][place]) for place in places]))

    def total(order: tuple[int, ...], layers: list[Tensor]) -> float:
        return sum(terms(layer, query, target) for layer in layers for target, query in enumerate(order)) / 2

    best = min(itertools.permutations(free, 2), key=lambda order: total(order, [masks]))
    expected = total(best, [masks, *outputs.auxiliary_masks_queries_logits])
    assert outputs.loss_unlabelled.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("num_points", [None, 64])
@pytest.mark.parametrize("form", ["no masks", "empty masks"])
def test_a_batch_without_labels_has_a_defined_loss(num_points: int | None, form: str) -> None:
    model = tiny_model(train_num_points=num_points).train()
    count = 0 if form == "no masks" else 1
    labels = {
        "mask_labels": [torch.zeros(count, 32, 32)] * 2,
        "class_labels": [torch.zeros(count, dtype=torch.long)] * 2,
    }
    outputs = model(pixel_values=torch.randn(2, 3, 32, 32), **labels)
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    if form == "no masks":
        terms = ("class", "mask", "dice", "auxiliary", "virtual", "indicator")
        assert [outputs[f"loss_{name}"].item() for name in terms] == [0] * 6
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("number", ["one class", "one image without labels"])
def test_batches_without_a_pair_for_mixing_have_a_defined_loss(number: str) -> None:
    model = tiny_model(**{**BASELINE, "feature_expansion": True, "bias_correction": True}).train()
    batch = training_batch([1, 1] if number == "one class" else [3, 0])
    if number == "one class":
        batch["class_labels"] = [torch.tensor([1])] * 2
    outputs = model(**batch)
    outputs.loss.backward()
    assert outputs.loss.isfinite() and (number != "one class" or outputs.loss_virtual.item() == 0)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# --- several processes -----------------------------------------------------------------------------------------------


TERMS = ("loss", "loss_class", "loss_mask", "loss_dice", "loss_auxiliary")


def loss_and_gradient(batch: dict) -> tuple[Tensor, Tensor]:
    model = tiny_model(**BASELINE)
    outputs = model(**batch)
    outputs.loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    return torch.stack([outputs[name].detach() for name in TERMS]), gradient


def halves(batch: dict) -> list[dict]:
    """Uneven work: five masks in the first half, one in the second."""
    return [{name: values[part] for name, values in batch.items()} for part in (slice(0, 2), slice(2, 4))]


def assert_mean_of_halves_is_whole(parts: list[tuple[Tensor, Tensor]]) -> None:
    whole = loss_and_gradient(training_batch([2, 3, 1, 0]))
    for values, expected in zip(zip(*parts), whole):
        torch.testing.assert_close(sum(values) / 2, expected, rtol=1e-4, atol=1e-5)


def test_count_over_processes_alone() -> None:
    assert count_over_processes(torch.tensor(3.0)).item() == 3
    assert 0 < count_over_processes(torch.tensor(0.0)).item() < 1e-3


def test_two_half_batches_give_the_loss_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each half runs twice: first to get its counts, then with the sums that an all-reduce would return."""
    batches = halves(training_batch([2, 3, 1, 0]))
    counts: list[list[Tensor]] = [[], []]
    summed: list[Tensor] = []

    def all_reduce(count: Tensor) -> None:
        if summed:
            count.copy_(pending.pop(0))
        else:
            told.append(count.clone())

    group = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2, all_reduce=all_reduce
    )
    with monkeypatch.context() as patched:
        patched.setattr(loss_alignzeg.torch, "distributed", group)
        for half, batch in enumerate(batches):
            told = counts[half]
            loss_and_gradient(batch)
        assert len(counts[0]) == len(counts[1]) > 0  # both processes take part in every all-reduce
        assert counts[0] != counts[1]
        summed = [a + b for a, b in zip(*counts)]
        parts = []
        for batch in batches:
            pending = list(summed)
            parts.append(loss_and_gradient(batch))
    assert_mean_of_halves_is_whole(parts)


def _run_half(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    torch.save(loss_and_gradient(halves(training_batch([2, 3, 1, 0]))[rank]), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_run_half, (port, str(tmp_path)), nprocs=2)
    assert_mean_of_halves_is_whole([torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)])
