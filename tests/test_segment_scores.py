# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Panoptic quality and mask AP against plain formulas of panopticapi and pycocotools, and the target segments.

The plain formulas follow the sources of both libraries. `LIBRARIES` has the values of torchmetrics 1.9.0 and pycocotools
2.0.11 on the same images. torchmetrics also leaves out pixels without a predicted segment, which panopticapi does not; for
its values these pixels were predicted as one more class.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model, tiny_processor

from zeroshot.data.benchmarks import load_benchmark
from zeroshot.data.dataset import SegmentationDataset
from zeroshot.data.scenes import IGNORE_INDEX, STUFF, THINGS, draw_scene
from zeroshot.data.segments import TargetSegments, open_segments
from zeroshot.data.splits import SegmentationSplit, load_split
from zeroshot.evaluation.evaluator import evaluate_model, evaluation_batches
from zeroshot.evaluation.segments import AveragePrecision, PanopticQuality, SegmentEvaluator
from zeroshot.settings import DataSettings


C = 5
LIBRARIES = {"pq": 40.697786, "sq": 74.426324, "rq": 54.775210, "ap": 10.037037, "ap50": 25.729759}


def random_images(seed: int, crowds: bool = True, count: int = 12, size: tuple[int, int] = (14, 17)) -> list[tuple]:
    """Rectangles as target and, shifted, as predictions: `(segmentation, labels, target, masks, labels, scores)`."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        target, found = np.full(size, -1), np.full(size, -1)
        masks = np.zeros((9, *size), bool)
        classes = rng.integers(0, C, 9)
        guesses = np.where(rng.random(9) < 0.75, classes, rng.integers(0, C, 9))
        for place in range(rng.integers(0, 9)):
            (top, left), (height, width) = rng.integers(0, 10, 2), rng.integers(2, 8, 2)
            target[top : top + height, left : left + width] = place
            dy, dx, grow = rng.integers(0, 2, 3)
            window = (place, slice(top + dy, top + height + grow), slice(left + dx, left + width))
            masks[window] = True
            found[window[1:]] = place
        found[rng.random(size) < 0.05] = -1

        def compact(places: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            known = np.unique(places[places >= 0])
            return np.where(places >= 0, np.searchsorted(known, places), -1), labels[known]

        places, labels = compact(target, classes)
        is_crowd = (rng.random(len(labels)) < 0.2) & crowds
        scores = rng.permutation(9) / 10
        keep = masks.any((1, 2)) & (rng.random(9) < 0.9)
        images.append(
            (
                *compact(found, guesses),
                TargetSegments(places, labels, is_crowd),
                masks[keep],
                guesses[keep],
                scores[keep],
            )
        )
    return images


# --- plain formulas


def plain_quality(images: list[tuple]) -> dict[str, float]:
    """panopticapi's pq_compute_single_core, segment by segment."""
    sums = np.zeros((4, C))
    for found, labels, target, *_ in images:
        matched, matched_targets = set(), set()
        for t, label in enumerate(target.labels):
            for p, guess in enumerate(labels):
                both = int(((target.map == t) & (found == p)).sum())
                union = int((target.map == t).sum()) + int(((found == p) & (target.map >= 0)).sum()) - both
                if guess == label and not target.crowds[t] and both / union > 0.5:
                    sums[0, label] += both / union
                    sums[1, label] += 1
                    matched.add(p)
                    matched_targets.add(t)
        for t, label in enumerate(target.labels):
            sums[3, label] += t not in matched_targets and not target.crowds[t]
        for p, guess in enumerate(labels):
            crowd = [t for t, label in enumerate(target.labels) if target.crowds[t] and label == guess]
            outside = ((found == p) & ((target.map < 0) | np.isin(target.map, crowd))).sum() / (found == p).sum()
            sums[2, guess] += p not in matched and outside <= 0.5
    values = []
    for iou, hits, surplus, missed in sums.T:
        if hits + surplus + missed:
            sq, rq = (iou / hits if hits else 0), hits / (hits + surplus / 2 + missed / 2)
            values.append((sq * rq, sq, rq))
    return dict(zip(("pq", "sq", "rq"), 100 * np.mean(values, 0))) | {"classes": len(values)}


def plain_precision(images: list[tuple], classes: range) -> dict[str, float]:
    """pycocotools' COCOeval.evaluateImg and accumulate, instance by instance."""
    table = []
    for label in classes:
        total = sum(int(((t.labels == label) & ~t.crowds).sum()) for _, _, t, *_ in images)
        if not total:
            continue
        for threshold in np.linspace(0.5, 0.95, 10):
            outcomes = []
            for _, _, target, masks, labels, scores in images:
                goals = [t for t in range(len(target.labels)) if target.labels[t] == label]
                goals.sort(key=lambda t: bool(target.crowds[t]))
                taken = set()
                for score, mask in sorted(
                    ((s, m) for s, m, guess in zip(scores, masks, labels) if guess == label), key=lambda x: -x[0]
                ):
                    best, match = threshold, None
                    for t in goals:
                        if t in taken and not target.crowds[t]:
                            continue
                        if match is not None and not target.crowds[match] and target.crowds[t]:
                            break
                        both = (mask & (target.map == t)).sum()
                        whole = mask.sum() if target.crowds[t] else (mask | (target.map == t)).sum()
                        if both / whole >= best:
                            best, match = both / whole, t
                    taken.add(match)
                    if match is None or not target.crowds[match]:
                        outcomes.append((score, match is not None))
            hits, curve = 0, []
            for rank, (_, hit) in enumerate(sorted(outcomes, key=lambda x: -x[0])):
                hits += hit
                curve.append((hits / total, hits / (rank + 1)))
            points = [max((p for r, p in curve if r >= recall), default=0) for recall in np.linspace(0, 1, 101)]
            table.append((threshold, np.mean(points)))
    return {
        "ap": 100 * np.mean([value for _, value in table]),
        "ap50": 100 * np.mean([value for threshold, value in table if threshold == 0.5]),
        "classes": len(table) // 10,
    }


def quality(images: list[tuple]) -> PanopticQuality:
    result = PanopticQuality(C)
    for found, labels, target, *_ in images:
        result.add(found, labels, target)
    return result


def precision(images: list[tuple]) -> AveragePrecision:
    result = AveragePrecision()
    for _, _, target, masks, labels, scores in images:
        result.add(masks, labels, scores, target)
    return result


@pytest.mark.parametrize("seed", range(6))
def test_scores_equal_the_plain_formulas(seed: int) -> None:
    images = random_images(seed, size=(14, 17 + seed))
    assert quality(images).scores(np.ones(C, bool)) == pytest.approx(plain_quality(images), abs=1e-9)
    assert precision(images).scores(range(C)) == pytest.approx(plain_precision(images, range(C)), abs=1e-9)


def test_scores_equal_those_of_the_libraries() -> None:
    images = random_images(0, crowds=False, count=40)
    values = quality(images).scores(np.ones(C, bool)) | precision(images).scores(range(C))
    assert {name: values[name] for name in LIBRARIES} == pytest.approx(LIBRARIES, abs=1e-4)


def test_shares_of_several_processes_add_up() -> None:
    images = random_images(0)
    merged = AveragePrecision.merged([precision(images[:5]), precision(images[5:])])
    assert merged.scores(range(C)) == precision(images).scores(range(C))


def test_groups_without_classes_are_nan() -> None:
    assert np.isnan(PanopticQuality(C).scores(np.ones(C, bool))["pq"])
    assert np.isnan(AveragePrecision().scores(range(C))["ap"])
    nothing = TargetSegments(np.full((4, 5), -1), np.zeros(0, int), np.zeros(0, bool))
    empty = AveragePrecision()
    empty.add(np.zeros((0, 4, 5), bool), np.zeros(0, int), np.zeros(0), nothing)
    with pytest.raises(ValueError, match=r"`segmentation` has shape \(5, 4\).*Pass `target_sizes`"):
        PanopticQuality(C).add(np.full((5, 4), -1), [], nothing)


# --- targets


def test_scenes_know_their_things() -> None:
    split = load_split("embedded_scenes")
    is_thing, target_of = open_segments(DataSettings(scene_seed=3), "val", split)
    assert [name for name, thing in zip(split.classes, is_thing) if not thing] == list(STUFF)
    doubles = 0
    for index in range(60):
        scene, target = draw_scene(3, "validation", index), target_of(f"{index:05d}")
        assert np.array_equal(np.append(target.labels, IGNORE_INDEX)[target.map], scene.label)
        stuff = target.labels[target.labels >= len(THINGS)]
        assert len(set(stuff)) == len(stuff) and not target.crowds.any()
        for place in np.flatnonzero(is_thing[target.labels]):
            assert len(np.unique(scene.things[target.map == place])) == 1
        things = target.only(is_thing)
        assert len(things.labels) == len(np.unique(scene.things)) - 1
        assert np.array_equal(things.map >= 0, scene.things > 0)
        doubles += len(set(things.labels)) < len(things.labels)
    assert doubles, "in some scene, two things of a class are separate segments"


def panoptic_folder(root: Path) -> np.ndarray:
    """One image with two persons, a crowd of them, two kinds of walls and a cat; the label map of segment ids."""
    codes = np.array([[0, 7, 7, 300, 300, 70000], [9, 9, 10, 10, 12, 12]])
    folder = root / "annotations" / "panoptic_val2017"
    folder.mkdir(parents=True)
    (root / "val2017").mkdir()
    colors = np.stack([codes % 256, codes // 256 % 256, codes // 65536], -1).astype(np.uint8)
    Image.fromarray(colors).save(folder / "5.png")
    Image.new("RGB", codes.shape[::-1]).save(root / "val2017" / "5.jpg")
    Image.new("RGB", (3, 2)).save(root / "val2017" / "6.jpg")
    categories = {1: ("person", 1), 2: ("wall-brick", 0), 3: ("wall-stone", 0), 4: ("cat", 1)}
    segments = {7: 1, 300: 1, 70000: 1, 9: 2, 10: 3, 12: 4}
    content = {
        "images": [
            {"id": 5, "file_name": "5.jpg", "height": 2, "width": 6},
            {"id": 6, "file_name": "6.jpg", "height": 2, "width": 3},
        ],
        "categories": [{"id": key, "name": name, "isthing": thing} for key, (name, thing) in categories.items()],
        "annotations": [
            {
                "image_id": 5,
                "file_name": "5.png",
                "segments_info": [
                    {"id": key, "category_id": category, "iscrowd": int(key == 70000)}
                    for key, category in segments.items()
                ],
            }
        ],
    }
    folder.with_suffix(".json").write_text(json.dumps(content))
    return codes


@pytest.mark.filterwarnings("ignore:Not in `classes`")
def test_coco_panoptic_segments(tmp_path: Path) -> None:
    codes = panoptic_folder(tmp_path)
    split = SegmentationSplit("own", ("wall", "person"), raw_id_to_class={1: 1, 2: 0, 3: 0, 255: 255})
    is_thing, target_of = open_segments(DataSettings(dataset=str(tmp_path)), "validation", split)
    assert is_thing.tolist() == [False, True]
    rows = load_benchmark(str(tmp_path), "val", split=split)
    assert list(rows["name"]) == ["5", "6"]
    target = target_of("5")
    assert sorted(zip(target.labels.tolist(), target.crowds.tolist())) == [
        (0, False),
        (1, False),
        (1, False),
        (1, True),
    ]
    assert np.array_equal(np.append(target.labels, 255)[target.map], split.map_raw(np.array(rows[0]["label"])))
    assert {tuple(np.unique(codes[target.map == place])) for place in range(4)} == {(9, 10), (7,), (300,), (70000,)}
    assert target.crowds[target.map[0, 5]]
    assert (target_of("6").map == -1).all() and target_of("6").map.shape == (2, 3)


@pytest.mark.parametrize(
    "dataset, kind, message",
    [
        ("coco_stuff", None, "`dataset` is 'coco_stuff', which has label maps without segments"),
        ("FOLDER", "isthing", "has no segments of things and stuff; expected a COCO panoptic file"),
        ("FOLDER", "segments_info", "has no segments of things and stuff"),
    ],
)
def test_datasets_without_segments_are_named(dataset: str, kind: str | None, message: str, tmp_path: Path) -> None:
    panoptic_folder(tmp_path)
    path = tmp_path / "annotations" / "panoptic_val2017.json"
    content = json.loads(path.read_text())
    for each in content["categories"] + content["annotations"]:
        each.pop(kind, None)
        each.setdefault("category_id", 1)
    path.write_text(json.dumps(content))
    split = SegmentationSplit("own", ("person", "wall-brick", "wall-stone", "cat"))
    with pytest.raises(ValueError, match=message):
        open_segments(DataSettings(dataset=dataset.replace("FOLDER", str(tmp_path))), "val", split)


# --- models


def test_model_scores() -> None:
    """Both post-processings of a model with random weights, and of the targets themselves in their place."""
    split, processor, model = load_split("embedded_scenes"), tiny_processor(), tiny_model()
    rows = load_benchmark("embedded_scenes", "test", num_scenes=3)
    is_thing, target_of = open_segments(DataSettings(), "test", split)
    segments = SegmentEvaluator(split, is_thing, target_of, score_threshold=0.0)
    batches = evaluation_batches(SegmentationDataset(rows, split, training=False), processor, 2)
    prototypes = model.get_text_prototypes(processor, split.vocabulary)
    evaluate_model(model, processor.image_processor, batches, split, prototypes, segments=segments, progress=False)
    scores = segments.scores()
    assert 0 <= scores["panoptic"]["all"]["pq"] < 50 and 0 <= scores["instances"]["class_agnostic"]["ap"] < 50
    assert scores["panoptic"]["all"]["classes"] == sum(
        scores["panoptic"][name]["classes"] for name in ("things", "stuff")
    )

    perfect = SegmentEvaluator(split, is_thing, target_of)
    perfect.add(Perfect(target_of), None, [f"{index:05d}" for index in range(3)])
    scores = perfect.scores()
    assert all(group["pq"] in (100, pytest.approx(np.nan, nan_ok=True)) for group in scores["panoptic"].values())
    assert {scores["instances"][name]["ap"] for name in ("all", "seen", "class_agnostic")} == {100}


class Perfect:
    """Stands in for an image processor; returns the targets."""

    def __init__(self, target_of):
        self.targets = [target_of(f"{index:05d}") for index in range(3)]

    def post_process_panoptic_segmentation(self, outputs, threshold, **options):
        return [
            {
                "segmentation": torch.from_numpy(target.map + 1),
                "segments_info": [{"label_id": label} for label in target.labels.tolist()],
            }
            for target in self.targets
        ]

    def post_process_instance_segmentation(self, outputs, threshold, **options):
        return [
            {
                "segmentation": torch.from_numpy(target.map) == torch.arange(len(target.labels))[:, None, None],
                "segments_info": [{"label_id": label, "score": 0.9} for label in target.labels.tolist()],
            }
            for target in self.targets
        ]
