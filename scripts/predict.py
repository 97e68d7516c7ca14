#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Segments images by class names that are given here.

    python scripts/predict.py photo.jpg --classes "cat, sofa, window" --unseen "sofa" --output_dir predictions

For every image it writes NAME.png (palette PNG, values are positions in --classes), NAME_overlay.png with a legend, and
NAME_unseen.png, how much each pixel looks like an unseen class. Without --classes the checkpoint's vocabulary is used.
A file that is no image is reported and skipped; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from modeling_alignzeg import AlignZegModel, AlignZegProcessor, class_colors, draw_overlay, draw_unseen_map
from zeroshot.files import atomic_file, atomic_write_text
from zeroshot.images import open_image


SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("input", help="an image, or a folder of images")
    options.add_argument("--model", default=".", help="AlignZeg checkpoint: a folder or a hub id")
    options.add_argument("--classes", help='class names, separated by commas: "a, b, c"')
    options.add_argument("--unseen", help="those of them that count as unseen, separated by commas")
    options.add_argument("--output_dir", default="predictions")
    options.add_argument("--gamma", type=float, help="PBC's correction; 0 switches it off; default: the checkpoint's")
    options.add_argument("--threshold", type=float, help="PBC's threshold; default: the checkpoint's")
    options.add_argument(
        "--none_of_these", action="store_true", help="give pixels that resemble no class the value 255"
    )
    options.add_argument("--template_set", help="prompt templates: single, vild or imagenet")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--num_threads", type=int, default=0)
    return options


def find_images(path: Path) -> list[Path]:
    """The image at `path`, or all images in the folder, by name.

    Raises:
        FileNotFoundError: there is nothing at `path`, or no image in the folder.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise FileNotFoundError(f"The folder {path} holds no image ({', '.join(sorted(SUFFIXES))}).")
        return files
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {path}.")
    return [path]


def split_names(text: str | None) -> list[str]:
    """`"a, b"` to `["a", "b"]`. Empty names stay, for the processor to name in its error; a last comma is forgiven."""
    if text is None:
        return []
    return [name.strip() for name in text.rstrip().removesuffix(",").split(",")]


def write_label(path: Path, label: np.ndarray, names: list[str]) -> None:
    """A palette PNG for up to 255 classes, a 16-bit PNG for more."""
    if len(names) > 255:
        picture = Image.fromarray(label.astype(np.uint16))
    else:
        picture = Image.fromarray(label.astype(np.uint8))
        colors = np.full((256, 3), 128, np.uint8)
        colors[: len(names)] = class_colors(names)
        picture.putpalette(colors.flatten().tolist())
    with atomic_file(path) as partial:
        picture.save(partial)


def main() -> int:
    args = parser().parse_args()
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    files = find_images(Path(args.input))
    model = AlignZegModel.from_pretrained(args.model).to(args.device).eval()
    processor = AlignZegProcessor.from_pretrained(args.model)
    names, unseen = split_names(args.classes), split_names(args.unseen)
    if args.classes is None:
        names = [model.config.id2label[i] for i in range(model.config.num_labels)]
        unseen = unseen or model.config.unseen_labels
    unknown = [name for name in unseen if name not in names]
    if unknown:
        raise ValueError(f"`--unseen` names {unknown[0]!r}, which is not among the classes: {', '.join(names[:20])}.")
    prototypes = model.get_text_prototypes(processor, names, args.template_set)
    seen = torch.tensor([name not in unseen for name in names], device=model.device)

    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    atomic_write_text(output / "classes.json", json.dumps({"classes": names, "unseen": unseen}, indent=2) + "\n")
    broken = 0
    for file in tqdm(files, desc="segment", disable=len(files) == 1):
        try:
            image = open_image(file)
        except (ValueError, OSError) as error:
            tqdm.write(f"Skipped: {error}", file=sys.stderr)
            broken += 1
            continue
        inputs = processor(images=image, return_tensors="pt").to(model.device)
        with torch.no_grad():
            outputs = model(**inputs, text_prototypes=prototypes, seen_class_mask=seen)
        maps, unseen_maps = processor.post_process_semantic_segmentation(
            outputs,
            target_sizes=[(image.height, image.width)],
            gamma=args.gamma,
            threshold=args.threshold,
            none_of_these=args.none_of_these,
            return_unseen_scores=True,
        )
        label = maps[0].cpu().numpy()
        none_value = 65535 if len(names) > 255 else 255
        write_label(output / f"{file.stem}.png", np.where(label < 0, none_value, label), names)
        pictures = {"overlay": draw_overlay(image, label, names)}
        if unseen_maps is not None:
            pictures["unseen"] = draw_unseen_map(image, unseen_maps[0].float().cpu().numpy())
        for kind, picture in pictures.items():
            with atomic_file(output / f"{file.stem}_{kind}.png") as partial:
                picture.save(partial)
    print(f"{len(files) - broken} of {len(files)} images segmented: {output}")
    return 1 if broken else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError, OSError) as error:
        print(f"predict.py: {error}", file=sys.stderr)
        sys.exit(2)
