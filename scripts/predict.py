#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Segments images by class names that are given here.

    python scripts/predict.py photo.jpg --classes "cat, sofa, window" --unseen "sofa" --output_dir predictions

For every image it writes NAME.png (palette PNG, values are positions in --classes), NAME_overlay.png with a legend, and
NAME_unseen.png, how much each pixel looks like an unseen class; NAME is the file's without its ending, and with it where
two files would write the same picture. Without --classes the checkpoint's vocabulary is used.
A file that is not an image is reported and skipped; the exit status is then 1.

    accelerate launch scripts/predict.py --dataset FOLDER_OR_HUB_ID --part train --classes "cat, sofa" --output_dir out

segments a whole dataset on all processes and machines of the launch, into Parquet shards or folders of PNG files (see
`zeroshot.evaluation.bulk`). Interrupted, it resumes when the same command is run again. A broken image is reported and
gets a row with its error and no label map; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from zeroshot.cli import command_parser, integer, names, run_command


SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
ENDINGS = ("", "_overlay", "_unseen")  # of the pictures of one image
CLASSES = "classes.json"


def parser() -> argparse.ArgumentParser:
    options = command_parser(__doc__)
    options.add_argument("input", nargs="?", help="an image, or a folder of images")
    options.add_argument("--model", default=".", help="AlignZeg checkpoint: a folder or a hub id")
    options.add_argument(
        "--classes",
        help='class names, separated by commas; several phrases for one class: "sofa|couch, background: road|ground"',
    )
    options.add_argument("--unseen", type=names, help="those of them that count as unseen, separated by commas")
    options.add_argument("--output_dir", default="predictions", help="folder to write to")
    options.add_argument(
        "--gamma", type=float, help="PBC's correction; 0 switches it off; by default the checkpoint's"
    )
    options.add_argument("--threshold", type=float, help="PBC's threshold; by default the checkpoint's")
    options.add_argument(
        "--none_of_these", action="store_true", help="give pixels that resemble no class the value 255"
    )
    options.add_argument("--refine", action="store_true", help="move borders between classes to edges of the image")
    options.add_argument("--template_set", help="prompt templates: single, vild or imagenet")
    options.add_argument(
        "--phrase_pooling", choices=("max", "mean"), default="max", help="how several phrases make one class"
    )
    options.add_argument("--device", help="by default a GPU if there is one; with --dataset the launcher chooses")
    options.add_argument("--num_threads", type=integer(0), default=0, help="CPU threads; 0 keeps torch's own choice")
    bulk = options.add_argument_group("a whole dataset")
    bulk.add_argument("--dataset", help="benchmark name, hub id or folder, in place of `input`")
    bulk.add_argument("--part", default="train", help="part of the dataset")
    bulk.add_argument("--root", help="folder of a named benchmark's files")
    bulk.add_argument(
        "--image_column", default="image", help="image column of a dataset that is not a named benchmark"
    )
    bulk.add_argument(
        "--streaming", action="store_true", help="read it from front to back without downloading it first"
    )
    bulk.add_argument("--limit", type=integer(1), help="use only the first N images")
    bulk.add_argument("--shard_size", type=integer(1), default=1000, help="images in one shard")
    bulk.add_argument("--output_format", choices=("parquet", "png"), default="parquet", help="files of label maps")
    bulk.add_argument("--batch_size", type=integer(1), default=8, help="images per forward pass")
    bulk.add_argument("--num_readers", type=integer(1), default=2, help="threads that read images beside the model")
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


def output_stems(files: list[Path]) -> list[str]:
    """What the names of each file's pictures begin with: its stem, or its whole name where two files share a picture."""
    taken = Counter(f"{file.stem}{ending}" for file in files for ending in ENDINGS)
    alone = (all(taken[f"{file.stem}{ending}"] == 1 for ending in ENDINGS) for file in files)
    return [file.stem if is_alone else file.name for file, is_alone in zip(files, alone)]


def check_outputs(inputs: list[Path], outputs: list[Path]) -> None:
    """Makes sure that no image is overwritten by its own result.

    Raises:
        ValueError: One of `outputs` is one of `inputs`, by this name or another.
    """

    def identity(path: Path) -> tuple[int, int]:
        found = path.stat()
        return found.st_dev, found.st_ino

    files = {identity(file): file for file in inputs if os.path.exists(file)}
    for path in filter(os.path.exists, outputs):  # of pathlib, names that are too long would be errors
        if identity(path) in files:
            raise ValueError(f"{files[identity(path)]} would be replaced by a result: choose another `--output_dir`.")


def check_classes(path: Path, classes: dict[str, list[str]]) -> None:
    """Makes sure that label maps of different class names do not come into one folder.

    Raises:
        ValueError: The file at `path` says other classes than `classes`.
    """
    if not path.exists():
        return
    try:
        is_same = json.loads(path.read_text(encoding="utf-8")) == classes
    except ValueError:
        is_same = False
    if not is_same:
        raise ValueError(f"{path} is of results with other classes: choose another `--output_dir`, or remove it.")


def load_model(args: argparse.Namespace, device: Any) -> tuple[Any, Any, Any]:
    """The model, its processor, and the classes to choose from."""
    from modeling_alignzeg.processing_alignzeg import check_classes, check_unseen_names, read_classes
    from zeroshot.checkpoints import load_checkpoint
    from zeroshot.evaluation.bulk import Vocabulary

    model, processor = load_checkpoint(args.model)
    model = model.to(device)
    unseen = args.unseen or []
    if args.classes is None:
        classes = check_classes([model.config.id2label[i] for i in range(model.config.num_labels)])
        unseen = unseen or model.config.unseen_labels
    else:
        classes = read_classes(args.classes)
    unseen = check_unseen_names(unseen)
    unknown = [name for name in unseen if name not in classes]
    if unknown:
        raise ValueError(
            f"`--unseen` names {unknown[0]!r}, which is not among the classes: {', '.join(list(classes)[:20])}."
        )
    prototypes = model.get_text_prototypes(processor, classes, args.template_set, phrase_pooling=args.phrase_pooling)
    return model, processor, Vocabulary(list(classes), unseen, prototypes)


def segment_dataset(args: argparse.Namespace) -> int:
    """A whole dataset; returns the exit status."""
    from zeroshot.evaluation.bulk import BulkSettings, predict_dataset, start_bulk

    if args.device is not None:
        raise ValueError("`--device` does not go with `--dataset`: the launcher gives each process its device.")
    if args.refine:
        raise ValueError("`--refine` does not go with `--dataset`: pass a folder of images as `input`.")
    shared = ("dataset", "part", "root", "image_column", "streaming", "limit", "shard_size", "output_format")
    readout = ("batch_size", "gamma", "threshold", "none_of_these")
    settings = BulkSettings(
        **{name: getattr(args, name) for name in (*shared, *readout)}, num_threads=args.num_readers
    )
    accelerator = start_bulk()
    model, processor, vocabulary = load_model(args, accelerator.device)
    images, broken = predict_dataset(model, processor, vocabulary, settings, args.output_dir, accelerator)
    accelerator.print(f"{images - broken} of {images} images segmented: {args.output_dir}")
    accelerator.wait_for_everyone()  # a process that leaves early can abort the others' communication
    accelerator.end_training()
    return 1 if broken else 0


def segment_files(args: argparse.Namespace) -> int:
    """An image or a folder of images, by one process; returns the exit status."""
    import torch
    from tqdm.auto import tqdm

    from modeling_alignzeg import draw_overlay, draw_unseen_map
    from zeroshot.data.images import label_picture, open_image
    from zeroshot.evaluation.evaluator import check_correction
    from zeroshot.files import atomic_file, atomic_write_text, check_output

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("Several processes would all do the same: pass the folder as `--dataset` to share it out.")
    files = find_images(Path(args.input))
    stems = output_stems(files)
    output = Path(args.output_dir)
    check_output(output / CLASSES)
    check_outputs(files, [output / CLASSES, *(output / f"{stem}{end}.png" for stem in stems for end in ENDINGS)])
    check_correction(args.gamma, args.threshold)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise ValueError(f"`--device` is {device!r}, which cannot be used: {str(error).splitlines()[0]}") from None
    model, processor, (class_names, unseen, prototypes) = load_model(args, device)
    seen = torch.tensor([name not in unseen for name in class_names], device=model.device)

    classes: dict[str, Any] = {"classes": class_names, "unseen": list(unseen)}
    if prototypes.ndim == 3 or args.phrase_pooling != "max":
        classes |= {"phrases": args.classes, "phrase_pooling": args.phrase_pooling}
    check_classes(output / CLASSES, classes)
    broken = 0
    for file, stem in tqdm(zip(files, stems), desc="segment", total=len(files), disable=len(files) == 1):
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
            images=[image] if args.refine else None,
        )
        label = maps[0].cpu().numpy()
        pictures = [label_picture(label, class_names), draw_overlay(image, label, class_names)]
        if unseen_maps is not None:
            pictures.append(draw_unseen_map(image, unseen_maps[0].float().cpu().numpy()))
        if not (output / CLASSES).exists():
            atomic_write_text(output / CLASSES, json.dumps(classes, indent=2) + "\n")
        try:
            for ending, picture in zip(ENDINGS, pictures):
                with atomic_file(output / f"{stem}{ending}.png") as partial:
                    picture.save(partial)
        except (ValueError, OSError) as error:
            tqdm.write(f"Not written: {error}", file=sys.stderr)
            broken += 1
    print(f"{len(files) - broken} of {len(files)} images segmented: {output}")
    return 1 if broken else 0


def main() -> int:
    options = parser()
    args = options.parse_args()
    if (args.input is None) == (args.dataset is None):
        options.error("give an image or a folder, or --dataset")
    if args.num_threads:
        import torch

        torch.set_num_threads(args.num_threads)
    return segment_files(args) if args.dataset is None else segment_dataset(args)


if __name__ == "__main__":
    run_command(main, status=2)
