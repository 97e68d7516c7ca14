# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Panoptic segments and instances, against plain formulas and Mask2Former's own post-processing."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import CLASSES, picture, plain_correction, tiny_checkpoint, tiny_model, tiny_processor
from transformers import Mask2FormerImageProcessor, pipeline

from modeling_alignzeg import AlignZegImageProcessor, ZeroShotImageSegmentationPipeline


PROCESSOR = AlignZegImageProcessor()
SEEN = torch.tensor([True, False, True, True])


def random_outputs(seed: int = 0, batch: int = 2, queries: int = 7, grid: tuple[int, int] = (12, 10), **fields):
    """Smooth masks that overlap, and proposals from certain to undecided."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, queries, 4, 4, generator=generator) * 6 - 2
    return SimpleNamespace(
        masks_queries_logits=F.interpolate(coarse, size=grid, mode="bicubic"),
        class_queries_logits=torch.randn(batch, queries, 5, generator=generator) * 2.5,
        unseen_logits=torch.randn(batch, queries, generator=generator),
        **fields,
    )


def plain_inputs(outputs, index, size, gamma=0.0, correction_threshold=0.5, content=None):
    """Probabilities `(N, C + 1)` and masks at the pixels `(N, H, W)` of one image."""
    logits = outputs.class_queries_logits[index]
    probabilities = logits.softmax(-1)
    for query, unseen in enumerate(outputs.unseen_logits[index].sigmoid()):
        if unseen > correction_threshold:
            probabilities[query] = plain_correction(logits[query], SEEN, gamma)
    masks = outputs.masks_queries_logits[index].sigmoid()
    height, width = content or masks.shape[1:]
    masks = F.interpolate(masks[None, :, :height, :width], size=size, mode="bilinear", align_corners=False)[0]
    return probabilities, masks


def plain_panoptic(probabilities, masks, threshold, mask_threshold, overlap, fused=()):
    """Pixel by pixel, proposal by proposal."""
    classes = probabilities.shape[1] - 1
    kept = [n for n, p in enumerate(probabilities) if p.argmax() < classes and p.max() > threshold]
    places = [(y, x) for y in range(masks.shape[1]) for x in range(masks.shape[2])]
    weights = (masks * probabilities.max(-1).values[:, None, None]).numpy()
    areas = (masks >= mask_threshold).sum((1, 2)).tolist()

    def divide(among):
        best = {place: max(among, key=lambda n: weights[n][place]) for place in places if among}
        return best, {place: n for place, n in best.items() if masks[n][place] >= mask_threshold}

    _, owner = divide(kept)
    counts = [list(owner.values()).count(n) for n in range(len(masks))]
    stays = [n for n in kept if counts[n] > overlap * areas[n]]
    best, owner = divide(stays)
    again = set()
    for n in sorted(set(kept) - set(stays), key=lambda n: -float(probabilities[n].max())):
        won = [
            place
            for place in places
            if masks[n][place] >= mask_threshold
            and owner.get(place) not in again
            and (place not in best or weights[n][place] > weights[best[place]][place])
        ]
        if len(won) > overlap * areas[n]:
            again.add(n)
            owner.update(dict.fromkeys(won, n))
    segmentation, infos, ids = np.zeros(masks.shape[1:], int), [], {}
    for n in sorted({*stays, *again}):
        pixels = [place for place, best in owner.items() if best == n]
        label, score = int(probabilities[n].argmax()), float(probabilities[n].max())
        if label in fused and label in ids:
            info = infos[ids[label] - 1]
            info["score"] = max(info["score"], score)
        else:
            info = {"id": len(infos) + 1, "label_id": label, "was_fused": label in fused, "score": score}
            infos.append(info)
            ids[label] = info["id"]
        for place in pixels:
            segmentation[place] = info["id"]
    return segmentation, infos


def plain_instances(probabilities, masks, threshold, mask_threshold, overlap):
    pairs = [(float(p), n, c) for n, row in enumerate(probabilities[:, :-1]) for c, p in enumerate(row)]
    found = []
    for p, n, c in sorted(pairs, reverse=True)[: len(probabilities)]:
        inside = masks[n] > mask_threshold
        if inside.any() and p * float(masks[n][inside].mean()) >= threshold:
            found.append((p * float(masks[n][inside].mean()), c, inside))
    free, kept = torch.ones(masks.shape[1:], dtype=torch.bool), []
    segmentation = np.full(free.shape, -1)
    for score, c, inside in sorted(found, key=lambda part: -part[0]):
        if (inside & free).sum() >= overlap * inside.sum():
            segmentation[(inside & free).numpy()] = len(kept)
            free &= ~inside
            kept.append((score, c, inside))
    return segmentation, kept


def assert_same_infos(infos, expected):
    assert [{**info, "score": 0} for info in infos] == [{**info, "score": 0} for info in expected]
    assert [info["score"] for info in infos] == pytest.approx([info["score"] for info in expected], abs=1e-5)


OPTIONS = [
    {},
    {"threshold": 0.3, "overlap_mask_area_threshold": 0.4},
    {"threshold": 0.0, "mask_threshold": 0.3, "overlap_mask_area_threshold": 0.0},
    {"threshold": 0.9},
    {"threshold": 1.0},
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_panoptic_segments_equal_the_plain_formula(seed: int, options: dict, gamma: float) -> None:
    contents = [(9, 10), (12, 6)]
    outputs = random_outputs(seed, content_sizes=torch.tensor(contents).float())
    sizes, fused = [(21, 27), (8, 5)], {0, 2}
    results = PROCESSOR.post_process_panoptic_segmentation(
        outputs,
        target_sizes=sizes,
        label_ids_to_fuse=fused,
        seen_class_mask=SEEN,
        gamma=gamma,
        correction_threshold=0.6,
        **options,
    )
    values = (options.get("threshold", 0.5), options.get("mask_threshold", 0.5))
    for index, result in enumerate(results):
        inputs = plain_inputs(outputs, index, sizes[index], gamma, 0.6, contents[index])
        overlap = options.get("overlap_mask_area_threshold", 0.8)
        segmentation, infos = plain_panoptic(*inputs, *values, overlap, fused)
        assert np.array_equal(result["segmentation"].numpy(), segmentation)
        assert_same_infos(result["segments_info"], infos)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", OPTIONS)
def test_instances_equal_the_plain_formula(seed: int, options: dict) -> None:
    outputs = random_outputs(seed, content_sizes=torch.tensor([[9.0, 10.0], [12.0, 6.0]]))
    sizes = [(21, 27), (8, 5)]
    values = {"threshold": 0.5, "mask_threshold": 0.5, "overlap_mask_area_threshold": 0.8, **options}
    correct = {"seen_class_mask": SEEN, "gamma": 2.0, "correction_threshold": 0.6}
    flat = PROCESSOR.post_process_instance_segmentation(outputs, target_sizes=sizes, **values, **correct)
    maps, codes = (
        PROCESSOR.post_process_instance_segmentation(outputs, target_sizes=sizes, **{kind: True}, **values, **correct)
        for kind in ("return_binary_maps", "return_coco_annotation")
    )
    for index, content in enumerate([(9, 10), (12, 6)]):
        inputs = plain_inputs(outputs, index, sizes[index], 2.0, 0.6, content)
        segmentation, expected = plain_instances(*inputs, *values.values())
        infos = [
            {"id": i, "label_id": label, "was_fused": False, "score": score}
            for i, (score, label, _) in enumerate(expected)
        ]
        for result in (flat[index], maps[index], codes[index]):
            assert_same_infos(result["segments_info"], infos)
        assert np.array_equal(flat[index]["segmentation"].numpy(), segmentation)
        assert maps[index]["segmentation"].shape == (len(expected), *sizes[index])
        for mask, code, (_, _, inside) in zip(maps[index]["segmentation"], codes[index]["segmentation"], expected):
            assert torch.equal(mask, inside)
            ones = np.repeat(np.arange(len(code["counts"])) % 2, code["counts"])
            assert code["size"] == list(sizes[index]) and np.array_equal(ones.reshape(sizes[index][::-1]).T, inside)


def certain_outputs(overlapping: bool = False):
    """Certain proposals with sharp masks on the grid of Mask2Former's post-processing."""
    masks = torch.full((1, 4, 384, 384), -20.0)
    masks[0, 0, :150] = 20
    masks[0, 1, 150:, :200] = 20
    masks[0, 2, 150:, 200:] = 20
    masks[0, 3, 300:, 300:] = 20 if overlapping else -20
    logits = torch.zeros(1, 4, 5)
    for query, label in enumerate([2, 0, 2, 4 if not overlapping else 1]):  # 4: the background
        logits[0, query, label] = 12 - 2 * query
    return SimpleNamespace(masks_queries_logits=masks, class_queries_logits=logits)


@pytest.mark.parametrize("sizes", [None, [(96, 128)]])
def test_panoptic_segments_are_mask2formers(sizes) -> None:
    pytest.importorskip("torchvision", reason="Mask2Former's image processor needs torchvision")
    outputs, reference = certain_outputs(), Mask2FormerImageProcessor()
    expected = reference.post_process_panoptic_segmentation(outputs, label_ids_to_fuse=set(), target_sizes=sizes)[0]
    result = PROCESSOR.post_process_panoptic_segmentation(outputs, target_sizes=sizes)[0]
    assert set(result) == set(expected)
    assert result["segmentation"].dtype == expected["segmentation"].dtype
    assert (result["segmentation"] == expected["segmentation"]).float().mean() > 0.98  # all but pixels between masks
    assert_same_infos(result["segments_info"], expected["segments_info"])


def test_instances_are_mask2formers() -> None:
    pytest.importorskip("torchvision", reason="Mask2Former's image processor needs torchvision")
    outputs, reference = certain_outputs(), Mask2FormerImageProcessor()
    expected = reference.post_process_instance_segmentation(outputs)[0]
    result = PROCESSOR.post_process_instance_segmentation(outputs)[0]

    def instances(result):
        return {
            (
                info["label_id"],
                info["was_fused"],
                round(info["score"], 4),
                (result["segmentation"] == info["id"]).numpy().tobytes(),
            )
            for info in result["segments_info"]
        }

    assert instances(result) == instances(expected) and len(result["segments_info"]) == 3
    assert torch.equal(result["segmentation"] < 0, expected["segmentation"] < 0)


def test_background_proposals_and_fused_ids() -> None:
    outputs = certain_outputs()
    result = PROCESSOR.post_process_panoptic_segmentation(outputs, label_ids_to_fuse={2})[0]
    infos = [(info["id"], info["label_id"], info["was_fused"]) for info in result["segments_info"]]
    assert infos == [(1, 2, True), (2, 0, False)]
    assert (result["segmentation"][:150] == 1).all() and (result["segmentation"][150:, 200:] == 1).all()


def test_proposals_of_one_region_do_not_drop_each_other() -> None:
    """Each of two equal objects wins half of the other's pixels: without a second try, the region had no segment."""
    outputs = certain_outputs()
    outputs.masks_queries_logits[0, 3] = outputs.masks_queries_logits[0, 0]
    outputs.masks_queries_logits[0, 0, :, ::2] -= 2 * (outputs.masks_queries_logits[0, 0, :, ::2] > 0)
    outputs.masks_queries_logits[0, 3, :, 1::2] -= 2 * (outputs.masks_queries_logits[0, 3, :, 1::2] > 0)
    outputs.masks_queries_logits[0, [0, 3]] /= 10  # probabilities of 0.86 and 0.88
    outputs.class_queries_logits[0, 3] = outputs.class_queries_logits[0, 0] * 0.999
    result = PROCESSOR.post_process_panoptic_segmentation(outputs)[0]
    assert [info["label_id"] for info in result["segments_info"]] == [2, 0, 2]
    assert (result["segmentation"][:150] == 1).all()


def test_a_covered_instance_is_dropped_or_kept() -> None:
    outputs = certain_outputs(overlapping=True)  # proposal 3 is inside proposal 2, which is more certain
    labels = [info["label_id"] for info in PROCESSOR.post_process_instance_segmentation(outputs)[0]["segments_info"]]
    assert labels == [2, 0, 2]
    every = PROCESSOR.post_process_instance_segmentation(
        outputs, overlap_mask_area_threshold=0, return_binary_maps=True
    )
    assert [info["label_id"] for info in every[0]["segments_info"]] == [2, 0, 2, 1]
    assert every[0]["segmentation"][3].sum() == 84 * 84


def test_the_unclaimed_region_is_a_segment_but_no_instance() -> None:
    outputs = certain_outputs()
    outputs.queries_hidden_state = torch.zeros(1, 3, 8)  # the fourth proposal is the unclaimed region
    outputs.masks_queries_logits[0, 3] = -outputs.masks_queries_logits[0].amax(0)
    outputs.masks_queries_logits[0, 3, :10, :10] = outputs.masks_queries_logits[0, 3, -10:, -10:] = 40
    outputs.masks_queries_logits[0, :3, :10, :10] = outputs.masks_queries_logits[0, :3, -10:, -10:] = -20
    outputs.class_queries_logits[0, 3] = torch.tensor([0.0, 40, 0, 0, 0])
    panoptic = PROCESSOR.post_process_panoptic_segmentation(outputs)[0]
    unclaimed = [info for info in panoptic["segments_info"] if info["label_id"] == 1]
    assert len(unclaimed) == 1 and (panoptic["segmentation"] == unclaimed[0]["id"]).sum() == 200  # two pieces
    instances = PROCESSOR.post_process_instance_segmentation(outputs)[0]
    assert [info["label_id"] for info in instances["segments_info"]] == [2, 0, 2]
    with torch.no_grad():
        model = tiny_model()
        real = model(**tiny_processor()(images=picture(), return_tensors="pt"))
    assert real.masks_queries_logits.shape[1] == real.queries_hidden_state.shape[1] + 1


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_nothing_found(task: str) -> None:
    result = getattr(PROCESSOR, f"post_process_{task}_segmentation")(random_outputs(), threshold=1.0)[1]
    assert result["segments_info"] == []
    assert result["segmentation"].shape == (12, 10) and result["segmentation"].dtype == torch.int32
    assert (result["segmentation"] == (0 if task == "panoptic" else -1)).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"threshold": 1.5}, "`threshold` is 1.5; expected a number from 0 to 1"),
        ({"correction_threshold": 2}, "`correction_threshold` is 2; expected a number from 0 to 1"),
        ({"mask_threshold": None}, "`mask_threshold` is None"),
        ({"overlap_mask_area_threshold": -1}, "`overlap_mask_area_threshold` is -1"),
        ({"target_sizes": [(3, 4)]}, "`target_sizes`"),
        ({"gamma": -1.0, "seen_class_mask": SEEN}, "`gamma`"),
        ({"label_ids_to_fuse": {4}}, "`label_ids_to_fuse` is .4.; expected a set of class ids from 0 to 3"),
        ({"label_ids_to_fuse": "ab"}, "`label_ids_to_fuse`"),
    ],
)
def test_wrong_arguments_are_named(options: dict, message: str) -> None:
    tasks = [PROCESSOR.post_process_panoptic_segmentation]
    if "label_ids_to_fuse" not in options:
        tasks.append(PROCESSOR.post_process_instance_segmentation)
    for task in tasks:
        with pytest.raises(ValueError, match=message):
            task(random_outputs(), **options)


def test_two_forms_of_instances_at_once_are_an_error() -> None:
    with pytest.raises(ValueError, match="choose one of them"):
        PROCESSOR.post_process_instance_segmentation(
            random_outputs(), return_coco_annotation=True, return_binary_maps=True
        )


# --- pipelines


NAMES = ["grass", "a red thing", "wood", "brick"]


@pytest.fixture(scope="module")
def segmenter() -> ZeroShotImageSegmentationPipeline:
    return ZeroShotImageSegmentationPipeline(model=tiny_model(seed=6), processor=tiny_processor())


@pytest.mark.parametrize("subtask", ["panoptic", "instance"])
def test_zero_shot_pipeline(segmenter: ZeroShotImageSegmentationPipeline, subtask: str) -> None:
    images = [picture(0, (48, 40)), picture(1, (40, 90))]
    options = {"score_threshold": 0.05, "mask_threshold": 0.1, "overlap_mask_area_threshold": 0.0}
    names = {"candidate_labels": NAMES, "unseen_labels": ["wood"]}
    both = segmenter(images, batch_size=2, subtask=subtask, **names, **options)
    model, processor = segmenter.model, segmenter.processor
    prototypes = model.get_text_prototypes(processor, NAMES)
    seen = torch.tensor([name != "wood" for name in NAMES])
    for image, segments in zip(images, both):
        with torch.no_grad():
            outputs = model(
                **processor(images=image, return_tensors="pt"), text_prototypes=prototypes, seen_class_mask=seen
            )
        post_process = getattr(processor, f"post_process_{subtask}_segmentation")
        whole = {"return_binary_maps": True} if subtask == "instance" else {}
        options_here = {**options, "threshold": options["score_threshold"], **whole}
        del options_here["score_threshold"]
        result = post_process(outputs, target_sizes=[image.size[::-1]], **options_here)[0]
        assert result["segments_info"], "the options are such that there is something to compare"
        assert [segment["label"] for segment in segments] == [NAMES[i["label_id"]] for i in result["segments_info"]]
        for segment, info in zip(segments, result["segments_info"]):
            mask = result["segmentation"]
            mask = mask[info["id"]] if subtask == "instance" else mask == info["id"]
            assert segment["mask"].size == image.size
            assert np.mean((np.asarray(segment["mask"]) > 0) == mask.numpy()) > 0.99  # except for rounding in a batch
            assert segment["score"] == pytest.approx(info["score"], abs=1e-4)


def test_zero_shot_pipeline_fuses_classes_by_name(segmenter: ZeroShotImageSegmentationPipeline) -> None:
    options = {
        "subtask": "panoptic",
        "score_threshold": 0.0,
        "overlap_mask_area_threshold": 0.0,
        "mask_threshold": 0.0,
    }
    apart = segmenter(picture(), candidate_labels=NAMES, **options)
    fused = segmenter(picture(), candidate_labels=NAMES, labels_to_fuse=NAMES, **options)
    labels = [segment["label"] for segment in fused]
    assert len(set(labels)) == len(labels) and set(labels) == {segment["label"] for segment in apart}
    for segment in fused:
        parts = [np.asarray(part["mask"]) for part in apart if part["label"] == segment["label"]]
        assert np.array_equal(np.max(parts, 0), np.asarray(segment["mask"]))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"subtask": "things"}, "`subtask` is 'things'; expected one of semantic, panoptic, instance"),
        ({"labels_to_fuse": ["sand"], "subtask": "panoptic"}, "`labels_to_fuse` contains 'sand'"),
        ({"score_threshold": 7, "subtask": "panoptic"}, "`score_threshold` is 7"),
    ],
)
def test_wrong_options_of_the_pipeline(segmenter, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segmenter(picture(), candidate_labels=NAMES, **options)
    with pytest.raises(TypeError, match="scores"):
        segmenter(picture(), candidate_labels=NAMES, scores=1)


@pytest.mark.parametrize("subtask", ["panoptic", "semantic", None])
def test_transformers_own_pipeline(tmp_path, subtask: str | None) -> None:
    segmenter = pipeline(
        "image-segmentation", model=str(tiny_checkpoint(tmp_path / "tiny", seed=6)), trust_remote_code=True
    )
    segments = segmenter(picture(), subtask=subtask, threshold=0, mask_threshold=0, overlap_mask_area_threshold=0)
    assert segments and all(segment["label"] in CLASSES for segment in segments)
    assert (segments[0]["score"] is None) == (subtask == "semantic")  # without a subtask: panoptic


def test_supervision_takes_all_three() -> None:
    supervision = pytest.importorskip("supervision", reason="supervision is not installed")
    outputs = random_outputs()
    id2label = dict(enumerate("abcd"))
    options = {"threshold": 0.1, "overlap_mask_area_threshold": 0.0}
    sizes = [(21, 27), (8, 5)]
    for task in ("panoptic", "instance"):
        for whole in [{}] if task == "panoptic" else [{}, {"return_binary_maps": True}]:
            post_process = getattr(PROCESSOR, f"post_process_{task}_segmentation")
            for result, size in zip(post_process(outputs, target_sizes=sizes, **options, **whole), sizes):
                detections = supervision.Detections.from_transformers(result, id2label)
                infos = result["segments_info"]
                assert len(detections) == len(infos) and detections.mask.shape == (len(infos), *size)
                assert list(detections["class_name"]) == [id2label[info["label_id"]] for info in infos]
                assert detections.confidence == pytest.approx([info["score"] for info in infos])
    labels = PROCESSOR.post_process_semantic_segmentation(outputs, target_sizes=sizes)[0]
    detections = supervision.Detections.from_transformers(labels, id2label)
    assert np.array_equal(detections.class_id, labels.unique().numpy())
