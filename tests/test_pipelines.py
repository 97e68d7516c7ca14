# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Two pipelines: transformers' own image segmentation with the stored vocabulary, and zero-shot segmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CLASSES, picture, tiny_checkpoint, tiny_model, tiny_processor
from transformers import pipeline

from modeling_alignzeg import AlignZegModel, AlignZegProcessor, ZeroShotImageSegmentationPipeline


NAMES = ["grass", "a red thing", "wood", "brick", "something else"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", processor={"correction_gamma": 3.0}))


@pytest.fixture(scope="module")
def segmenter(folder: str) -> ZeroShotImageSegmentationPipeline:
    return pipeline("zero-shot-image-segmentation", model=folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def model(folder: str) -> AlignZegModel:
    return AlignZegModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(folder: str) -> AlignZegProcessor:
    return AlignZegProcessor.from_pretrained(folder)


def label_map(segments: list[dict[str, Any]], names: list[str]) -> np.ndarray:
    """One map of positions in `names`, -1 where there is no mask; masks must not overlap."""
    masks = np.stack([np.asarray(segment["mask"]) for segment in segments])
    assert masks.dtype == np.uint8 and set(np.unique(masks)) <= {0, 255} and (masks > 0).sum(0).max() <= 1
    result = np.full(masks.shape[1:], -1)
    for segment, mask in zip(segments, masks):
        assert mask.any(), "a class that does not occur has no entry"
        result[mask > 0] = names.index(segment["label"])
    return result


def segment_by_hand(model, processor, image, names=None, unseen=(), template_set=None, **readout):
    arguments = {}
    if names is not None:
        arguments["text_prototypes"] = model.get_text_prototypes(processor, names, template_set)
        arguments["seen_class_mask"] = torch.tensor([name not in unseen for name in names])
    with torch.no_grad():
        outputs = model(**processor(images=image, return_tensors="pt"), **arguments)
    return processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]], **readout)[0].numpy()


def test_image_segmentation_with_the_stored_vocabulary(
    folder: str, model: AlignZegModel, processor: AlignZegProcessor
) -> None:
    image = picture()
    segments = pipeline("image-segmentation", model=folder, trust_remote_code=True)(image, subtask="semantic")
    assert all(set(segment) == {"score", "label", "mask"} for segment in segments)
    assert np.array_equal(label_map(segments, list(CLASSES)), segment_by_hand(model, processor, image))


def test_image_segmentation_of_a_batch(folder: str) -> None:
    segmenter = pipeline("image-segmentation", model=folder, trust_remote_code=True)
    images = [picture(index) for index in range(5)]
    alone = [label_map(segmenter(image, subtask="semantic"), list(CLASSES)) for image in images]
    batch = segmenter(images, batch_size=3, subtask="semantic")
    together = [label_map(segments, list(CLASSES)) for segments in batch]
    assert all(np.array_equal(a, b) for a, b in zip(alone, together))


def test_without_labels_the_stored_vocabulary_is_used(
    segmenter: ZeroShotImageSegmentationPipeline, model: AlignZegModel, processor: AlignZegProcessor
) -> None:
    assert (
        isinstance(segmenter, segmenter.__class__) and type(segmenter).__name__ == "ZeroShotImageSegmentationPipeline"
    )
    image = picture()
    assert np.array_equal(label_map(segmenter(image), list(CLASSES)), segment_by_hand(model, processor, image))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"unseen_labels": ["wood", "brick"]},
        {"unseen_labels": ["wood", "brick"], "gamma": 0.0},
        {"unseen_labels": ["wood", "brick"], "gamma": 8.0, "threshold": 0.1},
        {"none_of_these": True},
        {"none_of_these": True, "template_set": "vild"},
        {"template_set": "vild"},
        {"template_set": ["{} in the rain"]},
    ],
)
def test_candidate_labels(
    segmenter: ZeroShotImageSegmentationPipeline,
    model: AlignZegModel,
    processor: AlignZegProcessor,
    options: dict[str, Any],
) -> None:
    image = picture(2, (61, 45))
    segments = segmenter(image, candidate_labels=NAMES, **options)
    assert [segment["label"] for segment in segments] == [n for n in NAMES if n in {s["label"] for s in segments}]
    assert all(0 < segment["score"] <= 1 for segment in segments)
    unseen = options.get("unseen_labels", ())
    rest = {name: value for name, value in options.items() if name != "unseen_labels"}
    expected = segment_by_hand(model, processor, image, NAMES, unseen, **rest)
    assert np.array_equal(label_map(segments, NAMES) if segments else np.full((45, 61), -1), expected)


def test_score_is_the_mean_probability_of_the_proposals_weighted_by_cover(
    segmenter: ZeroShotImageSegmentationPipeline, model: AlignZegModel, processor: AlignZegProcessor
) -> None:
    image = picture(size=(60, 40))  # 48 x 32 after resizing: whole cells
    segment = segmenter(image, candidate_labels=NAMES)[0]
    with torch.no_grad():
        outputs = model(
            **processor(images=image, return_tensors="pt"), text_prototypes=model.get_text_prototypes(processor, NAMES)
        )
    height, width = (round(side) for side in (outputs.content_sizes[0]).tolist())
    masks = outputs.masks_queries_logits.sigmoid()[..., :height, :width]
    masks = torch.nn.functional.interpolate(masks, size=image.size[::-1], mode="bilinear", align_corners=False)[0]
    cover = (masks * (torch.from_numpy(np.asarray(segment["mask"]) > 0))).sum((1, 2))
    probability = outputs.class_queries_logits[0].softmax(-1)[:, NAMES.index(segment["label"])]
    assert segment["score"] == pytest.approx(((probability * cover).sum() / cover.sum()).item(), rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_of_images_of_any_size(
    segmenter: ZeroShotImageSegmentationPipeline, tmp_path: Path, batch_size: int
) -> None:
    images = [picture(0, (48, 40)), picture(1, (40, 90)), picture(2, (33, 20)), picture(3, (200, 60)), picture(4)]
    images[1].save(tmp_path / "one.png")
    inputs = [str(tmp_path / "one.png") if index == 1 else image for index, image in enumerate(images)]
    options = {"candidate_labels": NAMES, "unseen_labels": ["wood"]}
    results = segmenter(inputs, batch_size=batch_size, **options)
    assert len(results) == len(images)
    for image, segments in zip(images, results):
        alone = segmenter(image, **options)
        assert all(segment["mask"].size == image.size for segment in segments)
        assert np.mean(label_map(segments, NAMES) == label_map(alone, NAMES)) > 0.999  # except for ties
        assert [s["label"] for s in segments] == [s["label"] for s in alone]


def test_generators_and_pictures_of_other_modes(segmenter: ZeroShotImageSegmentationPipeline) -> None:
    modes = [picture().convert(mode) for mode in ("L", "P", "RGBA", "CMYK", "1")]
    results = list(segmenter((image for image in modes), candidate_labels=NAMES))
    assert len(results) == 5 and all(label_map(segments, NAMES).shape == (40, 48) for segments in results)


def test_labels_in_one_string(segmenter: ZeroShotImageSegmentationPipeline) -> None:
    image = picture()
    apart = segmenter(image, candidate_labels=NAMES, unseen_labels=["wood", "brick"])
    assert segmenter(image, candidate_labels=", ".join(NAMES), unseen_labels="wood,brick") == apart


def test_options_of_the_constructor_are_defaults(folder: str, segmenter: ZeroShotImageSegmentationPipeline) -> None:
    image = picture()
    fixed = pipeline(
        "zero-shot-image-segmentation", model=folder, trust_remote_code=True, candidate_labels=NAMES, gamma=0.0
    )
    assert fixed(image) == segmenter(image, candidate_labels=NAMES, gamma=0.0)
    assert {segment["label"] for segment in fixed(image, candidate_labels=["x", "y"])} <= {"x", "y"}


def test_without_remote_code_where_the_package_is_imported(
    folder: str, segmenter: ZeroShotImageSegmentationPipeline
) -> None:
    own = pipeline("zero-shot-image-segmentation", model=folder, pipeline_class=ZeroShotImageSegmentationPipeline)
    assert type(own.model) is AlignZegModel
    assert own(picture(), candidate_labels=NAMES) == segmenter(picture(), candidate_labels=NAMES)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline("zero-shot-image-segmentation", model=folder)


def test_half_precision_and_models_without_correction() -> None:
    model = tiny_model(bias_correction=False).to(torch.bfloat16)
    segmenter = ZeroShotImageSegmentationPipeline(model=model, processor=tiny_processor())
    assert label_map(segmenter(picture(), candidate_labels=NAMES), NAMES).min() >= 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"candidate_labels": []}, "class names"),
        ({"candidate_labels": ["grass", ""]}, "Class name 1"),
        ({"candidate_labels": ["grass", "grass"]}, "both 'grass'"),
        ({"candidate_labels": ["grass"], "unseen_labels": ["sand"]}, "`unseen_labels` contains 'sand'"),
        ({"unseen_labels": ["sand"]}, "`unseen_labels` contains 'sand'"),
        ({"candidate_labels": ["grass"], "template_set": "vlid"}, "`template_set`"),
        ({"candidate_labels": ["grass"], "gamma": -1.0}, "`gamma`"),
        ({"candidate_labels": 5}, "Class names are of type int"),
        ({"candidate_labels": {"grass", "brick"}}, "Class names are a set"),
        ({"candidate_labels": ["grass"], "unseen_labels": 5}, "Class names are of type int"),
        ({"candidate_labels": ["grass"], "none_of_these": "no"}, "`none_of_these` is 'no'; expected True or False"),
    ],
)
def test_wrong_arguments_are_named(
    segmenter: ZeroShotImageSegmentationPipeline, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        segmenter(picture(), **options)


def test_wrong_images_are_refused(segmenter: ZeroShotImageSegmentationPipeline, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match="cannot be"):
        segmenter(str(tmp_path / "broken.png"), candidate_labels=NAMES)
    with pytest.raises(ValueError, match="expected a PIL image"):
        segmenter(np.zeros((4, 4, 3), np.uint8), candidate_labels=NAMES)
    with pytest.raises(ValueError, match="`images` is empty"):
        segmenter([], candidate_labels=NAMES)
    with pytest.raises(ValueError, match="'missing.png' is not an existing file"):
        segmenter("missing.png", candidate_labels=NAMES)
    with pytest.raises(ValueError, match="cannot be opened as an image"):
        segmenter(__file__, candidate_labels=NAMES)
    with pytest.raises(ValueError, match="'http://127.0.0.1:1/a.png' cannot be fetched"):
        segmenter("http://127.0.0.1:1/a.png", candidate_labels=NAMES)


def test_names_are_cleaned_on_both_sides(segmenter: ZeroShotImageSegmentationPipeline) -> None:
    spaced = segmenter(picture(), candidate_labels=["grass", "sand "], unseen_labels=[" sand"])
    assert spaced == segmenter(picture(), candidate_labels=["grass", "sand"], unseen_labels=["sand"])


def test_saved_pipeline_comes_back(segmenter: ZeroShotImageSegmentationPipeline, tmp_path: Path) -> None:
    segmenter.save_pretrained(tmp_path)
    again = pipeline(model=str(tmp_path), trust_remote_code=True)  # the config contains the task
    assert again(picture(), candidate_labels=NAMES) == segmenter(picture(), candidate_labels=NAMES)
