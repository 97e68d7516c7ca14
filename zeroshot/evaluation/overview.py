# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The overview figures: scenes with labels, predictions and unseen scores; photographs with predictions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from modeling_alignzeg import class_colors, draw_overlay, draw_unseen_map

from ..checkpoints import load_checkpoint
from ..data.scenes import CLASSES, draw_scene
from ..data.splits import load_split
from ..files import atomic_file, check_output


SIDE, GAP, HEADER = 256, 10, 34
PHOTO = (300, 210)  # width and height of a cell of the photographs' figure


def colored(label: np.ndarray, colors: np.ndarray) -> Image.Image:
    known = np.where((label >= 0) & (label < len(colors)), label, 0)
    return Image.fromarray(np.where((label < len(colors))[..., None], colors[known], 128).astype(np.uint8))


def name_regions(picture: Image.Image, label: np.ndarray, names: list[str], font) -> None:
    """Writes the name of every large region of `label`, which may be coarser, at its innermost point."""
    draw, scale = ImageDraw.Draw(picture), picture.height / len(label)
    for class_id in np.unique(label):
        region = label == class_id
        if class_id >= len(names) or region.mean() < 0.03:
            continue
        depth, inner = np.zeros(label.shape), region.copy()
        while inner.any():
            depth += inner
            padded = np.pad(inner, 1)
            inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        y, x = np.unravel_index(depth.argmax(), depth.shape)
        name = names[class_id]
        half = font.getlength(name) / 2 + 2
        place = (min(max(x * scale, half), picture.width - half), min(max(y * scale, 8), picture.height - 8))
        draw.text(place, name, font=font, fill="white", stroke_fill="black", stroke_width=2, anchor="mm")


def _check_picture(output: str) -> None:
    if Path(output).suffix not in (".png", ".jpg", ".webp"):
        raise ValueError(f"`--output` is {output!r}; expected a file name with the extension .png, .jpg or .webp.")
    check_output(output)


def draw_overview(source: str, scenes: list[int], output: str) -> None:
    """Draws the `scenes` of the test split and the predictions of the checkpoint `source` to the file `output`."""
    _check_picture(output)
    model, processor = load_checkpoint(source)
    unseen = set(load_split("embedded_scenes").unseen)
    names = [name.upper() if name in unseen else name for name in CLASSES]
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
                name_regions(picture, label, names, font)
            sheet.paste(picture, (GAP + column * (SIDE + GAP), HEADER + row * (SIDE + GAP)))
    with atomic_file(output) as partial:
        sheet.save(partial)
    print(output)


def draw_photos(source: str, examples: Path, output: str, columns: int = 4) -> None:
    """Draws photographs to the file `output`, each above the prediction of the checkpoint `source` for its class names.
    `examples` is a JSON file with a list of `{"file", "classes"}`."""
    _check_picture(output)
    model, processor = load_checkpoint(source)
    entries, font = json.loads(examples.read_text(encoding="utf-8")), ImageFont.load_default(14)
    width, height = PHOTO
    rows = -(-len(entries) // columns)
    size = (columns * (width + GAP) + GAP, rows * (2 * height + 2 * GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    for position, entry in enumerate(entries):
        image, names = Image.open(examples.parent / entry["file"]).convert("RGB"), entry["classes"]
        with torch.no_grad():
            prototypes = model.get_text_prototypes(processor, names)
            outputs = model(**processor(images=image, return_tensors="pt"), text_prototypes=prototypes)
        targets = {"target_sizes": [(image.height, image.width)], "images": [image]}
        label = processor.post_process_semantic_segmentation(outputs, **targets)[0].numpy()
        overlay = draw_overlay(image, label, names, legend=False)
        scale = min(width / image.width, height / image.height)
        fitted = round(image.width * scale), round(image.height * scale)
        overlay = overlay.resize(fitted, Image.Resampling.LANCZOS)
        name_regions(overlay, label[::4, ::4], names, font)
        left = GAP + position % columns * (width + GAP) + (width - fitted[0]) // 2
        top = GAP + position // columns * 2 * (height + GAP)
        sheet.paste(image.resize(fitted, Image.Resampling.LANCZOS), (left, top))
        sheet.paste(overlay, (left, top + height + GAP))
    with atomic_file(output) as partial:
        sheet.save(partial)
    print(output)
