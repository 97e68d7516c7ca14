# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Label maps from model outputs, against plain formulas."""

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import plain_correction
from transformers.utils import ModelOutput

from modeling_alignzeg import readout_alignzeg
from modeling_alignzeg.image_processing_alignzeg import AlignZegImageProcessor
from modeling_alignzeg.readout_alignzeg import View, class_probabilities, image_view, label_map, resize_matrix


PROCESSOR = AlignZegImageProcessor()
SEEN = torch.tensor([True, False, True, True, False])


def make_outputs(
    batch: int = 2, queries: int = 6, classes: int = 5, grid: tuple[int, int] = (11, 14), seed: int = 0, **fields
) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    return SimpleNamespace(
        masks_queries_logits=torch.randn(batch, queries, *grid, generator=generator) * 3,
        class_queries_logits=torch.randn(batch, queries, classes + 1, generator=generator) * 3,
        unseen_logits=torch.randn(batch, queries, generator=generator),
        **fields,
    )


def plain_scores(
    outputs: SimpleNamespace,
    index: int,
    size: tuple[int, int] | None = None,
    content: tuple[int, int] | None = None,
    gamma: float = 0.0,
    threshold: float = 0.5,
    seen: torch.Tensor = SEEN,
) -> torch.Tensor:
    """The scores of all classes and the background, (C + 1, H, W), by the formula of the method, one step per line."""
    logits = outputs.class_queries_logits[index].float()
    probabilities = logits.softmax(-1)
    for query, unseen in enumerate(outputs.unseen_logits[index].sigmoid()):
        if gamma and unseen > threshold:
            probabilities[query] = plain_correction(logits[query], seen, gamma)
    masks = outputs.masks_queries_logits[index].float().sigmoid()
    scores = (probabilities[:, :, None, None] * masks[:, None]).sum(0)
    if size is None:
        return scores
    height, width = content or masks.shape[1:]
    return F.interpolate(scores[None, :, :height, :width], size=size, mode="bilinear", align_corners=False)[0]


def assert_is_argmax(labels: torch.Tensor, scores: torch.Tensor) -> None:
    """`labels` have the highest score at every pixel, up to ties within rounding."""
    assert labels.dtype == torch.int64 and labels.shape == scores.shape[1:]
    taken = scores.gather(0, labels[None])[0]
    assert (scores.amax(0) - taken).max() < 1e-5


# --- the pieces


@given(source=st.integers(1, 40), target=st.integers(1, 60), seed=st.integers(0, 9))
def test_resize_matrix_is_interpolate(source: int, target: int, seed: int) -> None:
    values = torch.randn(source, generator=torch.Generator().manual_seed(seed))
    expected = F.interpolate(values[None, None, :, None], size=(target, 1), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resize_matrix(source, target) @ values, expected[0, 0, :, 0], atol=1e-5, rtol=1e-5)


@given(source=st.integers(1, 40), target=st.integers(1, 60), part=st.floats(0.01, 1))
def test_resize_matrix_of_a_fraction(source: int, target: int, part: float) -> None:
    content = source * part
    matrix = resize_matrix(source, target, content)
    assert (matrix >= 0).all() and torch.allclose(matrix.sum(1), torch.ones(target))
    cells = -(-content // 1)
    for pixel in range(target):
        position = min(max((pixel + 0.5) * content / target - 0.5, 0), cells - 1)
        lower = int(position)
        upper = min(lower + 1, int(cells) - 1)
        expected = torch.zeros(source)
        expected[lower] += 1 - (position - lower)
        expected[upper] += position - lower
        torch.testing.assert_close(matrix[pixel], expected, atol=1e-5, rtol=0)


def test_class_probabilities_without_correction_are_the_softmax_to_the_bit() -> None:
    outputs = make_outputs()
    logits, unseen = outputs.class_queries_logits, outputs.unseen_logits
    expected = logits.softmax(-1)
    for arguments in [(), (unseen, SEEN, 0.0), (None, SEEN, 2.0), (unseen, None, 2.0), (unseen, SEEN | True, 2.0)]:
        assert torch.equal(class_probabilities(logits, *arguments), expected)


def test_class_probabilities_lower_seen_classes_of_proposals_that_look_unseen() -> None:
    logits = torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.5, 0.0], [1.0, 0.5, 0.0]])
    unseen = torch.tensor([0.6, 0.5, 0.4]).logit()
    result = class_probabilities(logits, unseen, torch.tensor([True, False]), gamma=2.0, threshold=0.5)
    torch.testing.assert_close(result[0], plain_correction(logits[0], torch.tensor([True, False]), 2.0))
    assert result[0, 2] == logits[0].softmax(-1)[2] and result[0, 1] / result[0, 0] == pytest.approx(math.exp(1.5))
    assert torch.equal(result[1:], logits[1:].softmax(-1))


# --- label maps


@pytest.mark.parametrize("size", [(11, 14), (37, 50), (5, 3), (1, 1), (88, 112)])
@pytest.mark.parametrize("gamma", [0.0, 1.5])
def test_label_maps_equal_the_plain_formula(size: tuple[int, int], gamma: float) -> None:
    outputs = make_outputs()
    results = PROCESSOR.post_process_semantic_segmentation(
        outputs, [size, (4, 9)], seen_class_mask=SEEN, gamma=gamma, threshold=0.6
    )
    for index, target in enumerate([size, (4, 9)]):
        assert_is_argmax(results[index], plain_scores(outputs, index, target, None, gamma, 0.6)[:-1])


def test_without_target_sizes_maps_have_the_size_of_the_grid() -> None:
    outputs = make_outputs(content_sizes=torch.tensor([[3.0, 4.0], [11.0, 14.0]]))
    for index, labels in enumerate(PROCESSOR.post_process_semantic_segmentation(outputs)):
        assert torch.equal(labels, plain_scores(outputs, index)[:-1].argmax(0))


def test_padding_is_cut_off() -> None:
    outputs = make_outputs(content_sizes=torch.tensor([[7.0, 9.0], [11.0, 4.0]]))
    sizes = [(30, 40), (22, 7)]
    first = PROCESSOR.post_process_semantic_segmentation(outputs, sizes)
    assert_is_argmax(first[0], plain_scores(outputs, 0, sizes[0], (7, 9))[:-1])
    assert_is_argmax(first[1], plain_scores(outputs, 1, sizes[1], (11, 4))[:-1])
    outputs.masks_queries_logits[0, :, 7:] = 50
    outputs.masks_queries_logits[0, :, :, 9:] = 50
    assert torch.equal(PROCESSOR.post_process_semantic_segmentation(outputs, sizes)[0], first[0])


def test_content_may_end_inside_a_cell() -> None:
    outputs = make_outputs(batch=1, content_sizes=torch.tensor([[6.4, 9.75]]))
    labels = PROCESSOR.post_process_semantic_segmentation(outputs, [(33, 21)])[0]
    scores = plain_scores(outputs, 0)[:-1]
    y = ((torch.arange(33) + 0.5) * 6.4 / 33 - 0.5).clamp(0, 6)
    x = ((torch.arange(21) + 0.5) * 9.75 / 21 - 0.5).clamp(0, 9)
    points = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flip(-1)
    points = (points * 2 + 1) / torch.tensor([14.0, 11.0]) - 1
    expected = F.grid_sample(scores[None], points[None], mode="bilinear", align_corners=False, padding_mode="border")
    assert_is_argmax(labels, expected[0])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tiles_and_pruning_change_nothing(data: st.DataObject) -> None:
    grid = data.draw(st.tuples(st.integers(1, 24), st.integers(1, 24)))
    size = data.draw(st.tuples(st.integers(1, 90), st.integers(1, 90)))
    classes, queries = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 8))
    outputs = make_outputs(1, queries, classes, grid, data.draw(st.integers(0, 99)))
    outputs.class_queries_logits *= data.draw(st.sampled_from([0.0, 0.1, 1.0, 10.0]))
    outputs.masks_queries_logits = outputs.masks_queries_logits * data.draw(st.sampled_from([0.0, 0.1, 1, 30]))
    limits = {
        "TILE_PIXELS": {"cpu": data.draw(st.integers(1, 40))},
        "TILE_CELLS": {"cpu": data.draw(st.integers(1, 9))},
    }
    limits["WORKSPACE"] = data.draw(st.sampled_from([0, 500]))
    limits["LEADERS"] = data.draw(st.integers(1, 16))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in limits.items():
            patch.setattr(readout_alignzeg, name, value)
        labels = PROCESSOR.post_process_semantic_segmentation(outputs, [size])[0]
    assert labels.shape == size and labels.min() >= 0 and labels.max() < classes
    assert_is_argmax(labels, plain_scores(outputs, 0, size)[:-1])


@pytest.mark.parametrize("penalty", [0.0, 0.2])
def test_the_best_class_wins_where_every_score_is_small(penalty: float) -> None:
    """Masks that are nearly off on one side of the image, where scores differ only by about 1e-6."""
    outputs = make_outputs(1, queries=8, classes=60, grid=(40, 40))
    outputs.masks_queries_logits[..., 20:] -= 14
    seen = torch.arange(60) % 2 == 0
    labels = PROCESSOR.post_process_semantic_segmentation(
        outputs, [(100, 130)], seen_class_mask=seen, seen_penalty=penalty, gamma=0
    )[0]
    scores = plain_scores(outputs, 0, (100, 130))[:-1] - penalty * seen[:, None, None]
    taken, best = scores.gather(0, labels[None])[0], scores.amax(0)
    assert best[:, 80:].median() < 1e-4 and (best - taken <= 1e-5 * best.abs() + 4e-6 * penalty).all()
    assert len(labels[:, 80:].unique()) > 3


def test_many_classes_equal_the_plain_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    prototypes = F.normalize(torch.randn(2001, 64, generator=generator), dim=-1)
    features = prototypes[::100][:20] + 0.1 * torch.randn(20, 64, generator=generator)
    masks = F.interpolate(torch.randn(1, 20, 5, 6, generator=generator) * 8, size=(40, 48), mode="bicubic")
    outputs = make_outputs(1)
    outputs.masks_queries_logits, outputs.unseen_logits = masks, torch.zeros(1, 20)
    outputs.class_queries_logits = (30 * features @ prototypes.T)[None]
    labels = PROCESSOR.post_process_semantic_segmentation(outputs, [(160, 200)])[0]
    assert_is_argmax(labels, plain_scores(outputs, 0, (160, 200))[:-1])
    assert len(labels.unique()) > 5


MEMORY = """
import resource, sys, types
sys.path.insert(0, sys.argv[1])
import torch, torch.nn.functional as F
from modeling_alignzeg.image_processing_alignzeg import AlignZegImageProcessor
torch.manual_seed(0)
prototypes = F.normalize(torch.randn(10001, 64), dim=-1)
features = F.normalize(torch.randn(100, 64), dim=-1)
masks = F.interpolate(torch.randn(1, 100, 16, 16) * 4, size=(160, 160), mode="bicubic")
outputs = types.SimpleNamespace(masks_queries_logits=masks, class_queries_logits=(40 * features @ prototypes.T)[None])
processor = AlignZegImageProcessor()
processor.post_process_semantic_segmentation(outputs, [(32, 32)])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
labels = processor.post_process_semantic_segmentation(outputs, [(1280, 1280)])[0]
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, labels.shape[0], len(labels.unique()))
"""


def test_ten_thousand_classes_fit_into_memory() -> None:
    command = [sys.executable, "-c", MEMORY, str(ROOT)]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    extra, height, classes = map(int, process.stdout.split())
    assert extra < 512 and height == 1280 and classes > 10  # MiB


# --- views


def place_view(
    scores: torch.Tensor, size: tuple[int, int], window: tuple[int, int, int, int] | None, is_flipped: bool
):
    """`scores (C, h, w)` of a window (top, left, height, width, in pixels of the label map) on the whole map, and 1 where
    the window is."""
    top, left, height, width = window or (0, 0, *size)
    inside = F.interpolate(scores[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    whole, coverage = torch.zeros(len(scores), *size), torch.zeros(size)
    whole[:, top : top + height, left : left + width] = inside.flip(-1) if is_flipped else inside
    coverage[top : top + height, left : left + width] = 1
    return whole, coverage


VIEWS = {
    "the whole image": [(None, False)],
    "mirrored": [(None, True)],
    "whole and mirrored": [(None, False), (None, True)],
    "windows that overlap": [((0, 0, 30, 25), False), ((10, 0, 30, 25), False), ((0, 15, 40, 36), False)],
    "windows beside the whole": [(None, False), ((5, 7, 20, 31), False), ((5, 7, 20, 31), True)],
    "windows that touch": [((0, 0, 40, 20), False), ((0, 20, 40, 31), True)],
}


@pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("penalty", [0.0, 0.3])
@pytest.mark.parametrize("tile", [7, 64])
def test_label_maps_of_several_views_equal_brute_force(
    views: list, penalty: float, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The argmax of scores from full-size masks, averaged over the views that show a pixel."""
    monkeypatch.setattr(readout_alignzeg, "TILE_PIXELS", {"cpu": tile})
    size, generator = (40, 51), torch.Generator().manual_seed(0)
    subtracted = penalty * SEEN
    total, coverage, given = torch.zeros(5, *size), torch.zeros(size), []
    for window, is_flipped in views:
        grid = tuple(torch.randint(4, 13, (2,), generator=generator).tolist())
        masks = (torch.randn(6, *grid, generator=generator) * 3).sigmoid()
        probabilities = (torch.randn(6, 5, generator=generator) * 3).softmax(-1)
        scores, covered = place_view(torch.einsum("qc,qhw->chw", probabilities, masks), size, window, is_flipped)
        total, coverage = total + scores, coverage + covered
        top, left, height, width = window or (0, 0, *size)
        rows = resize_matrix(grid[0], size[0], window=(top, height, size[0]))
        columns = resize_matrix(grid[1], size[1], window=(left, width, size[1]), is_flipped=is_flipped)
        given.append(View(probabilities, masks, rows, columns))
    assert coverage.min() >= 1
    assert_is_argmax(label_map(given, subtracted), total / coverage - subtracted[:, None, None])


@pytest.mark.parametrize("whole", [8, 20, 400])
def test_windows_may_be_measured_in_another_unit_than_pixels_of_the_map(whole: int) -> None:
    """The axis shows the middle half of an image of length `whole`, whose map has 20 rows."""
    matrix = resize_matrix(6, 20, window=(whole // 4, whole // 2, whole))
    expected = torch.zeros(20, 6)
    expected[5:15] = resize_matrix(6, 10)
    torch.testing.assert_close(matrix, expected)


def test_a_plain_image_is_one_view() -> None:
    outputs = make_outputs(content_sizes=torch.tensor([[7.0, 9.0], [11.0, 14.0]]))
    probabilities = outputs.class_queries_logits.softmax(-1)
    for index, (height, width) in enumerate([(7, 9), (11, 14)]):
        view = image_view(outputs, index, probabilities[index], (33, 20))
        masks = outputs.masks_queries_logits[index].sigmoid()
        expected = F.interpolate(masks[None, :, :height, :width], size=(33, 20), mode="bilinear", align_corners=False)
        torch.testing.assert_close(view.rows @ view.masks @ view.columns.T, expected[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(view.probabilities, probabilities[index])


# --- arguments


def test_defaults_come_from_the_processor_and_the_outputs() -> None:
    outputs = make_outputs(seen_class_mask=SEEN)
    processor = AlignZegImageProcessor(correction_gamma=2.5, correction_threshold=0.4)
    expected = {
        (): (2.5, 0.4, SEEN),
        (("gamma", 0.0),): (0.0, 0.4, SEEN),
        (("gamma", 4.0),): (4.0, 0.4, SEEN),
        (("threshold", 0.2), ("seen_class_mask", ~SEEN)): (2.5, 0.2, ~SEEN),
    }
    for arguments, (gamma, threshold, seen) in expected.items():
        results = processor.post_process_semantic_segmentation(outputs, [(20, 30)] * 2, **dict(arguments))
        probabilities = processor.proposal_probabilities(outputs, **dict(arguments))
        for index, labels in enumerate(results):
            assert_is_argmax(labels, plain_scores(outputs, index, (20, 30), None, gamma, threshold, seen)[:-1])
            rows = zip(outputs.class_queries_logits[index], outputs.unseen_logits[index].sigmoid())
            expected_rows = [
                plain_correction(logits, seen, gamma) if unseen > threshold else logits.softmax(-1)
                for logits, unseen in rows
            ]
            torch.testing.assert_close(probabilities[index], torch.stack(expected_rows))


def test_the_correction_can_lower_scores_instead_of_logits() -> None:
    outputs = make_outputs(seen_class_mask=SEEN)
    processor = AlignZegImageProcessor(correction_gamma=1.5, correction_threshold=0.4, correction_on_scores=True)
    probabilities = processor.proposal_probabilities(outputs)
    plain = outputs.class_queries_logits.softmax(-1)
    assert torch.equal(processor.proposal_probabilities(outputs, gamma=0.0), plain)
    factors = set()
    for index, (image, logit) in enumerate(zip(plain, outputs.unseen_logits)):
        for query, proposal in enumerate(image.tolist()):
            is_unseen = 1 / (1 + math.exp(-float(logit[query]))) > 0.4
            for name, probability in enumerate(proposal):
                factor = math.exp(-1.5) if is_unseen and name < len(SEEN) and SEEN[name] else 1.0
                factors.add(factor)
                assert float(probabilities[index, query, name]) == pytest.approx(probability * factor, abs=1e-6)
    assert len(factors) == 2


@pytest.mark.parametrize("penalty", [0.1, 0.7, -0.3])
def test_blind_penalty(penalty: float) -> None:
    outputs = make_outputs(seen_class_mask=SEEN)
    results = PROCESSOR.post_process_semantic_segmentation(outputs, [(20, 30)] * 2, seen_penalty=penalty, gamma=0)
    for index, labels in enumerate(results):
        assert_is_argmax(labels, plain_scores(outputs, index, (20, 30))[:-1] - penalty * SEEN[:, None, None])


def test_none_of_these() -> None:
    outputs = make_outputs()
    for options, none in (({}, -1), ({"none_index": 255}, 255)):
        results = PROCESSOR.post_process_semantic_segmentation(outputs, [(20, 30)] * 2, none_of_these=True, **options)
        for index, labels in enumerate(results):
            assert set(labels.unique().tolist()) <= {*range(5), none}
            assert (labels == none).any()
            assert_is_argmax(labels.where(labels != none, 5), plain_scores(outputs, index, (20, 30)))


def test_unseen_scores() -> None:
    outputs = make_outputs(content_sizes=torch.tensor([[7.0, 9.0], [11.0, 14.0]]))
    labels, maps = PROCESSOR.post_process_semantic_segmentation(outputs, [(20, 30), (5, 6)], return_unseen_scores=True)
    assert [tuple(label.shape) for label in labels] == [(20, 30), (5, 6)]
    for index, (size, (height, width)) in enumerate([((20, 30), (7, 9)), ((5, 6), (11, 14))]):
        masks = outputs.masks_queries_logits[index].sigmoid()
        unseen = outputs.unseen_logits[index].sigmoid()[:, None, None]
        expected = ((unseen * masks).sum(0) / masks.sum(0))[None, None, :height, :width]
        expected = F.interpolate(expected, size=size, mode="bilinear", align_corners=False)[0, 0]
        torch.testing.assert_close(maps[index], expected)
        assert maps[index].min() >= 0 and maps[index].max() <= 1
    outputs.unseen_logits = None
    assert PROCESSOR.post_process_semantic_segmentation(outputs, return_unseen_scores=True)[1] is None


def test_segmentation_scores() -> None:
    outputs = make_outputs(seen_class_mask=SEEN)
    results = PROCESSOR.post_process_semantic_segmentation(
        outputs, [(20, 30)] * 2, return_segmentation_scores=True, seen_penalty=0.1, gamma=0
    )
    for index, result in enumerate(results):
        expected = plain_scores(outputs, index, (20, 30))[:-1] - 0.1 * SEEN[:, None, None]
        torch.testing.assert_close(result.segmentation_scores, expected)
        assert_is_argmax(result.segmentation, expected)


def test_outputs_as_the_pipeline_passes_them() -> None:
    fields = vars(make_outputs(1, seen_class_mask=SEEN, content_sizes=torch.tensor([[7.0, 9.0]])))
    fields.pop("unseen_logits")
    outputs = ModelOutput(fields)
    outputs["target_size"] = [(20, 30)]
    labels = PROCESSOR.post_process_semantic_segmentation(outputs, target_sizes=outputs["target_size"])[0]
    assert labels.numpy().shape == (20, 30)


def test_half_precision_outputs() -> None:
    outputs = make_outputs()
    outputs.masks_queries_logits = outputs.masks_queries_logits.bfloat16()
    outputs.class_queries_logits = outputs.class_queries_logits.bfloat16()
    results = PROCESSOR.post_process_semantic_segmentation(outputs, torch.tensor([[20, 30], [20, 30]]))
    for index, labels in enumerate(results):
        assert_is_argmax(labels, plain_scores(outputs, index, (20, 30))[:-1])


def test_empty_masks_give_a_label_everywhere() -> None:
    outputs = make_outputs()
    outputs.masks_queries_logits[:] = -torch.inf
    labels, maps = PROCESSOR.post_process_semantic_segmentation(outputs, [(9, 9)] * 2, return_unseen_scores=True)
    assert (labels[0] == 0).all() and (maps[0] == 0).all()


def test_kinds_of_post_processing() -> None:
    names = {name for name in dir(AlignZegImageProcessor) if name.startswith("post_process")}
    assert names == {f"post_process_{kind}_segmentation" for kind in ("semantic", "instance", "panoptic")}


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, {"target_sizes": [(3, 4)]}, "`target_sizes` is .* list of 2 pairs"),
        ({}, {"target_sizes": (3, 4)}, "`target_sizes`"),
        ({}, {"target_sizes": [(3, 4), (0, 4)]}, "`target_sizes`"),
        ({}, {"target_sizes": [(3, 4, 5)] * 2}, "`target_sizes`"),
        ({}, {"target_sizes": 5}, "`target_sizes`"),
        ({}, {"target_sizes": [(float("inf"), 4)] * 2}, "`target_sizes`"),
        ({}, {"gamma": "strong", "seen_class_mask": SEEN}, "`gamma` is 'strong'; expected a finite number"),
        ({}, {"seen_class_mask": "all"}, r"`seen_class_mask` is a str; expected a bool tensor of shape \(5,\)"),
        ({}, {"seen_penalty": float("nan"), "seen_class_mask": SEEN}, "`seen_penalty` is nan"),
        ({}, {"none_of_these": True, "none_index": 1.5}, "`none_index` is 1.5; expected a 64-bit integer"),
        ({"masks_queries_logits": None}, {}, "without `masks_queries_logits`.*expected the model's output"),
        ({}, {"gamma": 1.0}, "`gamma` is 1.0 and needs `seen_class_mask`"),
        (
            {"unseen_logits": None},
            {"gamma": 1.0, "seen_class_mask": SEEN},
            "`gamma` is 1.0 and needs `outputs.unseen_logits`",
        ),
        ({}, {"gamma": -1.0, "seen_class_mask": SEEN}, "`gamma` is .*; expected a number ≥ 0"),
        ({}, {"threshold": 1.5}, "`threshold` is 1.5; expected a number from 0 to 1"),
        (
            {},
            {"seen_class_mask": SEEN[:3]},
            r"`seen_class_mask` has shape \(3,\) .* expected True or False for each of the 5 classes",
        ),
        ({}, {"seen_penalty": 0.1}, "`seen_penalty` needs `seen_class_mask`"),
        ({"class_queries_logits": torch.full((2, 6, 6), torch.nan)}, {}, "NaN for image 0"),
        ({"masks_queries_logits": torch.full((2, 6, 3, 3), torch.nan)}, {}, "NaN for image 0"),
        ({"class_queries_logits": torch.zeros(2, 5, 6)}, {}, r"`outputs.class_queries_logits` has shape \(2, 5, 6\)"),
        ({"class_queries_logits": torch.zeros(1, 6, 6)}, {}, "the same batch and queries"),
        ({"class_queries_logits": torch.zeros(2, 6, 1)}, {}, "only the background"),
        ({"class_queries_logits": torch.zeros(2, 6, 6).numpy()}, {}, "`outputs.class_queries_logits` is a ndarray"),
        ({"masks_queries_logits": torch.zeros(2, 6, 3)}, {}, "`outputs.masks_queries_logits` has shape"),
        ({"masks_queries_logits": torch.zeros(2, 6, 0, 3)}, {}, "`outputs.masks_queries_logits` has shape"),
        ({"unseen_logits": torch.zeros(2, 5)}, {}, "`outputs.unseen_logits` has shape"),
        ({"content_sizes": torch.zeros(2, 3)}, {"target_sizes": [(3, 4)] * 2}, "`outputs.content_sizes` has shape"),
        (
            {"content_sizes": torch.full((2, 2), torch.nan)},
            {"target_sizes": [(3, 4)] * 2},
            "`outputs.content_sizes` is",
        ),
        ({"seen_class_mask": [True] * 5}, {}, "`outputs.seen_class_mask` is a list"),
        (
            {},
            {"seen_class_mask": torch.arange(5)},
            r"`seen_class_mask` .* values \[0, 1, 2, 3, 4\]; expected True or False",
        ),
        (
            {},
            {"gamma": torch.tensor([1.0, 2.0]), "seen_class_mask": SEEN},
            "`gamma` is tensor.*expected a finite number",
        ),
        ({}, {"target_sizes": ["12", "34"]}, "`target_sizes`"),
        ({}, {"target_sizes": [(10**9, 10**9)] * 2}, "at most 2147483648 pixels"),
        ({}, {"none_of_these": True, "none_index": 2}, "`none_index` is 2; expected .* not one of the class ids"),
    ],
)
def test_bad_arguments_are_answered_with_a_sentence(change: dict, arguments: dict, message: str) -> None:
    outputs = make_outputs()
    vars(outputs).update(change)
    with pytest.raises(ValueError, match=message):
        PROCESSOR.post_process_semantic_segmentation(outputs, **arguments)
