# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The overview figure: scenes, their labels, predictions and unseen scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from modeling_alignzeg import class_colors, draw_unseen_map

from ..checkpoints import load_checkpoint
from ..data.scenes import CLASSES, draw_scene
from ..data.splits import load_split
from ..files import atomic_file, check_output


SIDE, GAP, HEADER = 256, 10, 34


def colored(label: np.ndarray, colors: np.ndarray) -> Image.Image:
    known = np.where((label >= 0) & (label < len(colors)), label, 0)
    return Image.fromarray(np.where((label < len(colors))[..., None], colors[known], 128).astype(np.uint8))


def name_regions(picture: Image.Image, label: np.ndarray, unseen: set[str], font) -> None:
    """Writes the name of every large region at its innermost point; unseen classes in capitals."""
    draw, scale = ImageDraw.Draw(picture), SIDE / len(label)
    for class_id in np.unique(label):
        region = label == class_id
        if class_id >= len(CLASSES) or region.mean() < 0.03:
            continue
        depth, inner = np.zeros(label.shape), region.copy()
        while inner.any():
            depth += inner
            padded = np.pad(inner, 1)
            inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        y, x = np.unravel_index(depth.argmax(), depth.shape)
        name = CLASSES[class_id].upper() if CLASSES[class_id] in unseen else CLASSES[class_id]
        half = font.getlength(name) / 2 + 2
        place = (min(max(x * scale, half), SIDE - half), min(max(y * scale, 8), SIDE - 8))
        draw.text(place, name, font=font, fill="white", stroke_fill="black", stroke_width=2, anchor="mm")


def draw_overview(source: str, scenes: list[int], output: str) -> None:
    """Draws the `scenes` of the test split and the predictions of the checkpoint `source` to the file `output`."""
    if Path(output).suffix not in (".png", ".jpg", ".webp"):
        raise ValueError(f"`--output` is {output!r}; expected a file name with the extension .png, .jpg or .webp.")
    check_output(output)
    model, processor = load_checkpoint(source)
    unseen = set(load_split("embedded_scenes").unseen)
    font = ImageFont.load_default(14)
    titles = ("scene", "label (UNSEEN classes in capitals)", "AlignZeg", "how unseen each pixel looks")
    width, height = len(titles) * (SIDE + GAP) + GAP, len(scenes) * (SIDE + GAP) + HEADER
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((GAP + column * (SIDE + GAP) + SIDE / 2, HEADER / 2), title, fill="black", font=font, anchor="mm")
    for row, number in enumerate(scenes):
        scene = draw_scene(0, "test", number)
        image = Image.fromarray(scene.image)
        with torch.no_grad():
            outputs = model(**processor(images=image, return_tensors="pt"))
        labels, maps = processor.post_process_semantic_segmentation(
            outputs, target_sizes=[scene.label.shape], return_unseen_scores=True
        )
        predicted = labels[0].numpy()
        colors = class_colors(list(CLASSES))
        pictures = [
            image,
            colored(scene.label, colors),
            colored(predicted, colors),
            draw_unseen_map(image, maps[0].numpy()),
        ]
        for column, (picture, label) in enumerate(zip(pictures, (None, scene.label, predicted, None))):
            picture = picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)
            if label is not None:
                name_regions(picture, label, unseen, font)
            sheet.paste(picture, (GAP + column * (SIDE + GAP), HEADER + row * (SIDE + GAP)))
    with atomic_file(output) as partial:
        sheet.save(partial)
    print(output)
