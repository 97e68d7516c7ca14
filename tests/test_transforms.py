# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Training augmentation and the collator."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_alignzeg import AlignZegImageProcessor
from zeroshot.data.transforms import Collator, TrainTransform, jitter_colors
from zeroshot.training.setup import build_transform


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def blocks(height, width, ids, rng):
    """A label map of 8 × 8 blocks, and an image whose red channel repeats it."""
    label = rng.choice(ids, (-(-height // 8), -(-width // 8))).repeat(8, 0).repeat(8, 1)[:height, :width]
    label = label.astype(np.int64)
    image = np.stack([label % 256, label // 256, np.full_like(label, 7)], axis=-1).astype(np.uint8)
    return image, label


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.integers(0, 1000))
def test_any_size_gives_a_crop_with_ids_that_were_there(height, width, crop_size, seed):
    image, label = blocks(height, width, [0, 3, 255, 300, 65535], np.random.default_rng(seed))
    transform = TrainTransform(crop_size=crop_size, ignore_index=65535)
    image_crop, label_crop = transform(image, label, generator(seed))
    assert image_crop.dtype == np.uint8 and label_crop.dtype == np.int64
    assert (
        image_crop.shape == (*label_crop.shape, 3) and 1 <= min(label_crop.shape) <= max(label_crop.shape) <= crop_size
    )
    assert set(label_crop.flat) <= set(label.flat)


@pytest.mark.parametrize("seed", range(6))
def test_image_and_label_move_together(seed):
    rng = np.random.default_rng(seed)
    image, label = blocks(120, 160, [0, 80, 160, 240], rng)
    transform = TrainTransform(crop_size=96, color_jitter=False)
    image_crop, label_crop = transform(image, label, generator(seed))
    # Blending changes only the borders of blocks, a shift by a few pixels changes everything.
    close = [
        np.mean(np.abs(image_crop[..., 0].astype(int) - np.roll(label_crop, shift, 1)) < 40) for shift in (0, 8, -8)
    ]
    assert close[0] > 0.8 and max(close[1:]) < 0.6


def test_a_crop_of_the_whole_at_scale_one_is_the_sample_itself():
    image, label = blocks(40, 40, [0, 1, 2], np.random.default_rng(0))
    transform = TrainTransform(crop_size=40, scale_range=(1, 1), flip_probability=0, color_jitter=False)
    image_crop, label_crop = transform(image, label, generator())
    assert np.array_equal(image_crop, image) and np.array_equal(label_crop, label)


def test_flip_only_keeps_the_size_and_flips_half():
    image, label = blocks(128, 128, [0, 1, 2], np.random.default_rng(0))
    transform = TrainTransform(crop_size=None, color_jitter=False)
    flips = 0
    for seed in range(40):
        image_out, label_out = transform(image, label, generator(seed))
        flipped = not np.array_equal(label_out, label)
        expected = (image[:, ::-1], label[:, ::-1]) if flipped else (image, label)
        assert np.array_equal(image_out, expected[0]) and np.array_equal(label_out, expected[1])
        flips += flipped
    assert 10 <= flips <= 30


def test_the_generator_decides_everything():
    image, label = blocks(90, 110, [0, 1, 2, 3], np.random.default_rng(0))
    transform = TrainTransform(crop_size=64)
    first, second, other = (transform(image, label, generator(seed)) for seed in (5, 5, 6))
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    assert not np.array_equal(first[0], other[0])


def test_crops_of_one_category_are_avoided():
    label = np.zeros((200, 200), np.int64)
    label[:, 130:] = 1
    label[:20] = 255
    image = np.zeros((200, 200, 3), np.uint8)

    def largest_part(ratio, seed):
        transform = TrainTransform(crop_size=50, scale_range=(2, 2), max_category_ratio=ratio)
        crop = transform(image, label, generator(seed))[1]
        counts = np.bincount(crop[crop != 255], minlength=2)
        return counts.max() / counts.sum()

    free = np.array([largest_part(1.0, seed) for seed in range(60)])
    kept = np.array([largest_part(0.75, seed) for seed in range(60)])
    assert (free > 0.75).mean() > 0.4 and (kept > 0.75).mean() < 0.2


def test_ignored_pixels_are_no_category():
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 256, (100, 100, 3), dtype=np.uint8), rng.integers(0, 2, (100, 100))
    label[rng.random(label.shape) < 0.9] = 255
    for seed in range(10):  # two classes with one half each: the first crop is used, whatever the limit
        crops = [
            TrainTransform(crop_size=40, scale_range=(2, 2), max_category_ratio=ratio)(image, label, generator(seed))
            for ratio in (0.75, 1.0)
        ]
        assert np.array_equal(crops[0][1], crops[1][1])
    label[:, 60:] = 255
    for seed in range(30):  # a crop without any label is drawn again
        assert (TrainTransform(crop_size=30, scale_range=(3, 3))(image, label, generator(seed))[1] != 255).any()


def test_a_label_map_of_nothing_or_of_one_class_still_gives_a_crop():
    for value in (255, 3):
        label = np.full((60, 50), value, np.int64)
        image, crop = TrainTransform(crop_size=32)(np.zeros((60, 50, 3), np.uint8), label, generator())
        assert np.all(crop == value) and image.shape == (*crop.shape, 3)


def test_color_jitter_changes_colours_by_the_given_generator_alone():
    image = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    results = []
    for seed in range(40):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        results.append(jitter_colors(image, generator(seed)))
        assert torch.equal(torch.get_rng_state(), before)
        assert np.array_equal(results[-1], jitter_colors(image, generator(seed)))
        assert results[-1].shape == image.shape and results[-1].dtype == np.uint8
    assert len({result.tobytes() for result in results}) > 30


@pytest.mark.parametrize(
    "options, name",
    [
        ({"crop_size": 0}, "crop_size"),
        ({"scale_range": (2, 1)}, "scale_range"),
        ({"scale_range": [0, 1]}, "scale_range"),
        ({"max_category_ratio": 0}, "max_category_ratio"),
        ({"flip_probability": 1.5}, "flip_probability"),
        ({"crop_size": "x"}, "crop_size"),
        ({"crop_size": 32.5}, "crop_size"),
        ({"scale_range": 5}, "scale_range"),
        ({"scale_range": [0.5, float("inf")]}, "scale_range"),
        ({"max_category_ratio": None}, "max_category_ratio"),
        ({"flip_probability": "x"}, "flip_probability"),
        ({"color_jitter": "maybe"}, "color_jitter"),
    ],
)
def test_options_out_of_range_are_named(options, name):
    with pytest.raises(ValueError, match=f"`{name}` is"):
        TrainTransform(**options)


@pytest.mark.parametrize("options", [{"foo": 1}, {"ignore_index": 3}])
def test_unknown_options_are_named(options):
    with pytest.raises(ValueError, match=f"`data.transform` has no option '{next(iter(options))}'"):
        build_transform(options)


@pytest.mark.parametrize("shape", [(5, 1), (1, 5), (1, 1)])
def test_a_sample_one_pixel_wide_can_be_flipped(shape):
    transform = TrainTransform(crop_size=None, flip_probability=1, color_jitter=False)
    image, label = transform(np.zeros((*shape, 3), np.uint8), np.zeros(shape, np.int64), generator())
    assert torch.from_numpy(image).shape == (*shape, 3) and torch.from_numpy(label).shape == shape


def test_collator_pads_to_a_common_multiple():
    rng = np.random.default_rng(0)
    samples = []
    for index, (height, width) in enumerate([(30, 50), (41, 20), (8, 8)]):
        image, label = blocks(height, width, [0, 1, 5], rng)
        samples.append({"image": image, "label": label, "name": f"n{index}", "index": index + 7, "epoch": index + 1})
    samples[2]["label"] = np.full((8, 8), 255)
    mean, std = np.array([0.48, 0.46, 0.41]), np.array([0.27, 0.26, 0.28])
    batch = Collator(AlignZegImageProcessor(image_mean=mean.tolist(), image_std=std.tolist()), 16)(samples)

    assert batch["pixel_values"].shape == (3, 3, 48, 64) and batch["pixel_mask"].dtype == torch.int64
    assert (batch["names"], batch["indices"], batch["epochs"]) == (["n0", "n1", "n2"], [7, 8, 9], [1, 2, 3])
    for i, sample in enumerate(samples):
        h, w = sample["label"].shape
        pixels = torch.from_numpy((sample["image"] / 255 - mean) / std).permute(2, 0, 1).float()
        torch.testing.assert_close(batch["pixel_values"][i, :, :h, :w], pixels, atol=1e-5, rtol=0)
        outside = batch["pixel_mask"][i] == 0
        assert (~outside).sum() == h * w and batch["pixel_mask"][i, :h, :w].all()
        assert not batch["pixel_values"][i, :, outside].any()
        classes = [c for c in np.unique(sample["label"]).tolist() if c != 255]
        assert batch["class_labels"][i].tolist() == classes and batch["class_labels"][i].dtype == torch.int64
        masks = batch["mask_labels"][i]
        assert masks.shape == (len(classes), 48, 64) and masks.dtype == torch.bool
        for mask, label_id in zip(masks, classes):
            assert np.array_equal(mask[:h, :w], sample["label"] == label_id)
        assert not batch["mask_labels"][i][:, outside].any()
    assert batch["mask_labels"][2].shape == (0, 48, 64)
