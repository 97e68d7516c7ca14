# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Prototypes of exemplars: the frozen tower's embeddings of masked regions."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import CLASSES, picture, tiny_model, tiny_processor

from modeling_alignzeg import AlignZegModel
from zeroshot.checkpoints import load_checkpoint
from zeroshot.data.scenes import CLASSES as SCENE_CLASSES
from zeroshot.evaluation.exemplars import average_precision, find_exemplars, measure


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model() -> AlignZegModel:
    return tiny_model()


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def marked(image, *boxes) -> np.ndarray:
    """A label map with one class per box (top, left, bottom, right), 255 elsewhere."""
    mask = np.full((image.height, image.width), 255, np.uint8)
    for index, (top, left, bottom, right) in enumerate(boxes):
        mask[top:bottom, left:right] = index
    return mask


@torch.no_grad()
def by_hand(model: AlignZegModel, pixels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """CLIP's own layers on CLS, patches and one more CLS token, which attends to the masked patches and itself."""
    vision, split = model.recognizer.vision_model, model.config.clip_split_layer
    patch = model.recognizer.stride
    states = model.clip_hidden_states(pixels)[split]
    share = F.avg_pool2d(mask[None, None].float(), patch).flatten()
    shadow = states[:, :1].clone()
    for layer in vision.encoder.layers[split:]:
        tokens = torch.cat([states, shadow], 1)
        bias = torch.zeros(tokens.shape[1], tokens.shape[1])
        bias[:, -1] = -1e30
        bias[-1, 0] = -1e30
        bias[-1, 1:-1] = share.log().clamp(min=-1e30)
        bias[-1, -1] = 0
        tokens = layer(tokens, bias[None, None])
        states, shadow = tokens[:, :-1], tokens[:, -1:]
    return model.recognizer.visual_projection(vision.post_layernorm(shadow))[0, 0]


def test_prototypes_are_a_class_token_that_sees_the_mask(model: AlignZegModel, processor) -> None:
    image = picture(0, (64, 32))
    inputs = processor(
        images=image, segmentation_maps=marked(image, (0, 0, 20, 30), (10, 30, 32, 64)), return_tensors="pt"
    )
    assert inputs["pixel_values"].shape[2:] == (32, 64)
    result = model.get_image_prototypes(inputs["pixel_values"], inputs["mask_labels"])
    assert result.shape == (2, 24) and not result.requires_grad
    torch.testing.assert_close(result.norm(dim=-1), torch.ones(2))
    for row, mask in zip(result, inputs["mask_labels"][0]):
        torch.testing.assert_close(row, by_hand(model, inputs["pixel_values"], mask), atol=1e-5, rtol=1e-4)


def test_pixels_far_from_the_mask_count_through_the_tower_only(model: AlignZegModel, processor) -> None:
    image = picture(0, (64, 32))
    inputs = processor(images=image, segmentation_maps=marked(image, (0, 0, 16, 16)), return_tensors="pt")
    masks = inputs["mask_labels"]
    same = model.get_image_prototypes(inputs["pixel_values"], [masks[0] * 7.0])  # any value but 0
    assert torch.equal(same, model.get_image_prototypes(inputs["pixel_values"], masks))
    other = model.get_image_prototypes(inputs["pixel_values"], [masks[0].flip(-1)])
    assert not torch.allclose(same, other)


def test_batches_of_images_of_different_sizes(model: AlignZegModel, processor) -> None:
    images = [picture(0, (64, 32)), picture(1, (40, 40))]
    maps = [marked(images[0], (0, 0, 20, 30), (10, 30, 32, 64)), marked(images[1], (5, 5, 35, 30))]
    inputs = processor(images=images, segmentation_maps=maps, return_tensors="pt")
    together = model.get_image_prototypes(inputs["pixel_values"], inputs["mask_labels"], inputs["pixel_mask"])
    alone = []
    for image, mask in zip(images, maps):
        one = processor(images=image, segmentation_maps=mask, return_tensors="pt")
        alone.append(model.get_image_prototypes(one["pixel_values"], one["mask_labels"], one["pixel_mask"]))
    assert together.shape == (3, 24)
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_one_mask_per_image_as_a_tensor(model: AlignZegModel) -> None:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[0, :16], masks[1, :, 16:] = True, True
    expected = model.get_image_prototypes(pixels, [masks[:1], masks[1:]])
    assert torch.equal(model.get_image_prototypes(pixels, masks), expected)


def test_anchors(model: AlignZegModel, processor) -> None:
    image = picture(0, (64, 32))
    inputs = processor(images=image, segmentation_maps=marked(image, (0, 0, 20, 30)), return_tensors="pt")
    anchors = model.get_text_prototypes(processor, list(CLASSES))
    plain = model.get_image_prototypes(inputs["pixel_values"], inputs["mask_labels"])[0]
    result = model.get_image_prototypes(inputs["pixel_values"], inputs["mask_labels"], anchors=anchors)[0]
    weights = [float(model.logit_scale.exp() * plain @ anchor) for anchor in anchors]
    weights = np.exp(weights) / np.exp(weights).sum()
    expected = sum(weight * anchor for weight, anchor in zip(weights, anchors))
    torch.testing.assert_close(result, expected / expected.norm(), atol=1e-5, rtol=1e-4)


def test_several_exemplars_of_one_class(model: AlignZegModel, processor) -> None:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    masks = torch.ones(2, 32, 32)
    masks[0, 16:] = 0
    anchors = model.get_text_prototypes(processor, list(CLASSES))
    apart = model.get_image_prototypes(pixels, masks)
    mean = apart.sum(0) / apart.sum(0).norm()
    torch.testing.assert_close(model.get_image_prototypes(pixels, masks, merge=True)[0], mean)
    weights = (model.logit_scale.exp() * anchors @ mean).softmax(0)
    expected = weights @ anchors
    result = model.get_image_prototypes(pixels, masks, anchors=anchors, merge=True)[0]
    torch.testing.assert_close(result, expected / expected.norm())


def test_exemplars_go_beside_names(model: AlignZegModel, processor) -> None:
    image = picture(0, (64, 32))
    inputs = processor(images=image, segmentation_maps=marked(image, (0, 0, 20, 30)), return_tensors="pt")
    exemplar = model.get_image_prototypes(inputs["pixel_values"], inputs["mask_labels"])
    names = model.get_text_prototypes(processor, ["grass", "wood"])
    with torch.no_grad():
        outputs = model(inputs["pixel_values"], text_prototypes=torch.cat([exemplar, names]))
    labels = processor.post_process_semantic_segmentation(outputs, target_sizes=[(32, 64)])[0]
    assert outputs.class_queries_logits.shape[-1] == 4 and set(labels.unique().tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("architecture", ["test_resnet"])
def test_convolutional_towers_pool_the_mask(architecture: str) -> None:
    pytest.importorskip("timm", reason="convolutional towers need timm")
    from test_convolutional import conv_model

    model = conv_model(architecture)
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(1, 2, 64, 96)
    masks[0, 0, :40, :50], masks[0, 1, 50:, 70:] = 1, 1
    result = model.get_image_prototypes(pixels, list(masks))
    with torch.no_grad():
        features = model.clip_hidden_states(pixels)[model.recognizer.final]
        for row, mask in zip(result, masks[0]):
            cells = [
                (float(mask[y * s : (y + 1) * s, x * s : (x + 1) * s].mean()), features[0, :, y, x])
                for s in [64 // features.shape[2]]
                for y in range(features.shape[2])
                for x in range(features.shape[3])
            ]
            pooled = sum(share * values for share, values in cells) / sum(share for share, _ in cells)
            expected = model.recognizer._project(pooled[None, None])[0, 0]
            torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "masks, message",
    [
        ([torch.zeros(1, 32, 32)], r"Mask 0 of `masks\[0\]` is empty; mark some pixels"),
        ([torch.ones(1, 16, 32)], r"`masks\[0\]` has shape \(1, 16, 32\); expected \(n, 32, 32\)"),
        ([torch.ones(1, 32, 32)] * 2, r"`masks` has 2 entries; expected one \(n, 32, 32\) tensor for each of"),
        (torch.ones(32, 32), r"`masks` is a Tensor; expected one \(n, 32, 32\) tensor for each of"),
        ([np.ones((1, 32, 32))], r"`masks\[0\]` is a ndarray"),
        (None, r"`masks` is a NoneType; expected one \(n, 32, 32\) tensor for each of"),
    ],
)
def test_wrong_masks_are_named(model: AlignZegModel, masks, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.get_image_prototypes(torch.zeros(1, 3, 32, 32), masks)


def test_wrong_anchors_are_named(model: AlignZegModel) -> None:
    with pytest.raises(ValueError, match="has shape"):
        model.get_image_prototypes(torch.zeros(1, 3, 32, 32), torch.ones(1, 32, 32), anchors=torch.ones(3, 5))


# --- the measurement


def test_average_precision_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn, the reference, is not installed")
    generator = torch.Generator().manual_seed(0)
    positive = torch.rand(500, generator=generator) > 0.8
    scores = torch.rand(500, generator=generator) + 0.3 * positive
    expected = metrics.average_precision_score(positive.numpy(), scores.numpy())
    assert average_precision(positive, scores) == pytest.approx(expected, abs=1e-6)


def test_exemplar_search_is_better_than_chance() -> None:
    model, processor = load_checkpoint(str(ROOT))
    exemplars = find_exemplars(1, seed=0, scenes=60)
    assert len(exemplars) > 40 and set(exemplars) <= set(range(len(SCENE_CLASSES)))
    report = measure(model, processor, exemplars, scenes=12)
    assert report["exemplar"]["average_precision"] > 5 * report["exemplar"]["chance"]
    assert report["name"]["average_precision"] > report["exemplar"]["average_precision"]
