# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Refinement of label maps by the image, against plain loops."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import picture, tiny_checkpoint

from modeling_alignzeg import AlignZegImageProcessor
from modeling_alignzeg.readout_alignzeg import (
    REFINED_CONTRAST,
    REFINED_DILATIONS,
    REFINED_STEPS,
    class_probabilities,
    refine_scores,
)
from zeroshot.data.scenes import draw_scene


ROOT = Path(__file__).resolve().parent.parent
PROCESSOR = AlignZegImageProcessor()


def plain_refinement(scores: np.ndarray, image: np.ndarray) -> np.ndarray:
    """A reference by plain loops over pixels and neighbours; the border of the image is repeated outside it."""
    height, width = image.shape[1:]

    def at(values, y, x):
        return values[:, min(max(y, 0), height - 1), min(max(x, 0), width - 1)]

    offsets = [(dy * d, dx * d) for d in REFINED_DILATIONS for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    for _ in range(REFINED_STEPS):
        result = np.empty_like(scores)
        for y in range(height):
            for x in range(width):
                near = np.stack([at(image, y + dy, x + dx) for dy, dx in offsets])
                contrast = np.concatenate([near, image[None, :, y, x]]).std(0, ddof=1)
                weights = np.exp(-(np.abs(near - image[:, y, x]) / (REFINED_CONTRAST * contrast + 1e-8)).mean(1))
                parts = np.stack([at(scores, y + dy, x + dx) for dy, dx in offsets])
                result[:, y, x] = (weights / weights.sum()) @ parts
        scores = result
    return scores


@pytest.mark.parametrize("size", [(9, 7), (1, 6), (3, 3)])
def test_refinement_equals_plain_loops(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    image, scores = torch.rand(3, *size, generator=generator), torch.rand(2, *size, generator=generator)
    expected = plain_refinement(scores.double().numpy(), image.double().numpy())
    np.testing.assert_allclose(refine_scores(scores, image).numpy(), expected, atol=1e-4)


def outputs_of_a_border(shift: int) -> tuple[SimpleNamespace, Image.Image]:
    """Two certain proposals, whose border is `shift` pixels right of the edge in an image of 64 x 48 pixels, on a 16 x 12
    grid with 4 columns of padding."""
    image = np.zeros((48, 64, 3), np.uint8)
    image[:, :32], image[:, 32:] = (200, 40, 40), (30, 60, 200)
    places = (torch.arange(20) + 0.5) * 4
    mask = ((32 + shift - places) / 2)[None, None, None].expand(1, 1, 12, 20)
    masks = torch.cat([mask, -mask], 1)
    logits = torch.tensor([[[9.0, 0, 0, 0], [0, 9.0, 0, 0]]])
    outputs = SimpleNamespace(
        masks_queries_logits=masks, class_queries_logits=logits, content_sizes=torch.tensor([[12.0, 16.0]])
    )
    return outputs, Image.fromarray(image)


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("shift", [-3, 3])
def test_a_border_moves_to_the_edge(scale: int, shift: int) -> None:
    outputs, image = outputs_of_a_border(shift)
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    size = [image.size[::-1]]
    edge = (torch.arange(image.width) >= 32 * scale).long().expand(size[0])
    before = PROCESSOR.post_process_semantic_segmentation(outputs, size)[0]
    after = PROCESSOR.post_process_semantic_segmentation(outputs, size, images=[image])[0]
    assert after.dtype == torch.int64 and after.shape == size[0]
    assert (after != edge).float().mean() < 0.5 * (before != edge).float().mean()


def test_many_pixels_per_cell_are_refined_at_four_and_enlarged() -> None:
    generator = torch.Generator().manual_seed(1)
    outputs = SimpleNamespace(
        masks_queries_logits=torch.randn(1, 5, 6, 5, generator=generator) * 4,
        class_queries_logits=torch.randn(1, 5, 4, generator=generator) * 3,
    )
    image = picture(0, (70, 90))
    after = PROCESSOR.post_process_semantic_segmentation(outputs, [(90, 70)], images=image)[0]
    before = PROCESSOR.post_process_semantic_segmentation(outputs, [(90, 70)])[0]
    probabilities = class_probabilities(outputs.class_queries_logits)[0, :, :-1]
    scores = torch.einsum("nc,nhw->chw", probabilities, outputs.masks_queries_logits[0].sigmoid())[before.unique()]
    scores = F.interpolate(scores[None], size=(24, 20), mode="bilinear", align_corners=False)[0]
    small = np.asarray(image.resize((20, 24), Image.Resampling.BOX), np.float32).transpose(2, 0, 1) / 255
    scores = torch.from_numpy(plain_refinement(scores.double().numpy(), small.astype(float)))
    scores = F.interpolate(scores[None], size=(90, 70), mode="bilinear", align_corners=False)[0]
    expected = before.unique()[scores.argmax(0)]
    assert (after == expected).float().mean() > 0.995  # but for rounding


def test_scores_and_other_images_stay() -> None:
    outputs, image = outputs_of_a_border(3)
    options = {"target_sizes": [(48, 64)], "return_segmentation_scores": True}
    refined = PROCESSOR.post_process_semantic_segmentation(outputs, images=[image], **options)[0]
    plain = PROCESSOR.post_process_semantic_segmentation(outputs, **options)[0]
    assert torch.equal(refined["segmentation_scores"], plain["segmentation_scores"])
    background = outputs.class_queries_logits.clone()
    background[0, 1] = torch.tensor([0, 0, 0, 9.0])
    outputs.class_queries_logits = background
    labels = PROCESSOR.post_process_semantic_segmentation(outputs, [(48, 64)], images=image, none_of_these=True)[0]
    assert set(labels.unique().tolist()) == {0, -1} and (labels == -1)[:, 33:].all()


@pytest.mark.parametrize(
    "images, sizes, message",
    [
        ([picture()], None, "There are 1 `images` and 0 `target_sizes`"),
        ([picture()] * 2, [(40, 48)], "There are 2 `images` and 1 `target_sizes`"),
        ([picture()], [(48, 40)], r"`images\[0\]` has 40 x 48 pixels; expected its target size, 48 x 40"),
        ([np.zeros((40, 48, 7), np.uint8)], [(40, 48)], r"`images\[0\]` cannot be used"),
    ],
)
def test_wrong_images_are_named(images, sizes, message: str) -> None:
    outputs, _ = outputs_of_a_border(0)
    with pytest.raises(ValueError, match=message):
        PROCESSOR.post_process_semantic_segmentation(outputs, sizes, images=images)


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_scripts(tmp_path: Path) -> None:
    checkpoint = str(tiny_checkpoint(tmp_path / "tiny"))
    Image.fromarray(draw_scene(0, "test", 0).image).save(tmp_path / "scene.png")
    maps = []
    for folder, options in (("plain", []), ("refined", ["--refine"])):
        command = ["scripts/predict.py", str(tmp_path / "scene.png")]  # with the repository's own checkpoint
        result = run(*command, "--output_dir", str(tmp_path / folder), *options)
        assert result.returncode == 0, result.stderr
        with Image.open(tmp_path / folder / "scene.png") as label:
            maps.append(np.asarray(label))
    assert maps[0].shape == maps[1].shape and not np.array_equal(*maps)
    result = run("scripts/predict.py", "--dataset", "embedded_scenes", "--model", checkpoint, "--refine")
    assert result.returncode == 2 and "`--refine` cannot be combined with `--dataset`" in result.stderr
    result = run("scripts/evaluate.py", "--model", checkpoint, "--refine", "--flip")
    assert result.returncode == 1 and "`--refine` cannot be combined with `--flip`" in result.stderr
