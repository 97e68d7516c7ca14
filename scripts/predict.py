#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Segments images by given class names.

    python scripts/predict.py photo.jpg more_photos --classes "cat, sofa, window" --unseen "sofa" --output_dir predictions

For every image it writes NAME.png (palette PNG, values are positions in --classes), NAME_overlay.png with a legend, and
NAME_unseen.png, the unseen score of each pixel; --labels_only writes only NAME.png. NAME is the file name without its
extension, or with it if two files would get the same name. Folders are searched recursively, and the output has the same
subfolders. Without --classes, the checkpoint's vocabulary is used.
A file that is not an image is reported and skipped; the exit status is then 1. On a CPU, two images are segmented at a time.

    accelerate launch scripts/predict.py --dataset FOLDER_OR_HUB_ID --part train --classes "cat, sofa" --output_dir out

segments a whole dataset on all processes and machines of the launch, and writes Parquet shards or folders of PNG files (see
`zeroshot.evaluation.bulk`). Run the same command again to resume after an interruption. A broken image is reported and
gets a row with its error and no label map; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from zeroshot.cli import command_parser, integer, names, run_command


def parser() -> argparse.ArgumentParser:
    options = command_parser(__doc__)
    options.add_argument("input", nargs="*", help="images, folders of images, and patterns such as 'photos/**/*.jpg'")
    options.add_argument("--model", default="checkpoints/photos", help="AlignZeg checkpoint: a folder or a hub id")
    options.add_argument(
        "--classes",
        help='class names, separated by commas; several phrases for one class: "sofa|couch, background: road|ground"',
    )
    options.add_argument("--unseen", type=names, help="classes that count as unseen, separated by commas")
    options.add_argument("--output_dir", default="predictions", help="folder to write to")
    options.add_argument("--gamma", type=float, help="PBC's correction; 0 disables it; default: the checkpoint's")
    options.add_argument("--threshold", type=float, help="PBC's threshold; default: the checkpoint's")
    options.add_argument(
        "--none_of_these",
        action="store_true",
        help="give pixels that resemble no class the value 255 (65535 with more than 255 classes)",
    )
    options.add_argument("--refine", action="store_true", help="align class borders with edges in the image")
    options.add_argument("--template_set", help="prompt templates: single, vild or imagenet")
    options.add_argument(
        "--phrase_pooling", choices=("max", "mean"), default="max", help="how to combine several phrases of a class"
    )
    options.add_argument("--text_cache", metavar="DIR", help="folder that keeps text embeddings of many names")
    options.add_argument("--device", help="default: a GPU if available; with --dataset, the launcher chooses")
    options.add_argument("--num_threads", type=integer(0), default=0, help="CPU threads; 0 keeps torch's own choice")
    options.add_argument("--labels_only", action="store_true", help="write only the label maps")
    options.add_argument(
        "--picture_size",
        type=integer(0),
        default=2048,
        help="maximum longer side of overlays and unseen maps; 0: the image's size, which label maps always have",
    )
    bulk = options.add_argument_group("a whole dataset")
    bulk.add_argument("--dataset", help="benchmark name, hub id or folder, in place of `input`")
    bulk.add_argument("--part", default="train", help="part of the dataset")
    bulk.add_argument("--root", help="folder of a named benchmark's files")
    bulk.add_argument(
        "--image_column", default="image", help="image column of a dataset that is not a named benchmark"
    )
    bulk.add_argument("--streaming", action="store_true", help="stream the dataset instead of downloading it first")
    bulk.add_argument("--limit", type=integer(1), help="use only the first N images")
    bulk.add_argument("--shard_size", type=integer(1), default=1000, help="images in one shard")
    bulk.add_argument(
        "--output_format", choices=("parquet", "png"), default="parquet", help="format of the label maps"
    )
    bulk.add_argument("--batch_size", type=integer(1), default=8, help="images per forward pass")
    bulk.add_argument(
        "--num_readers", type=integer(1), default=2, help="threads that read images while the model runs"
    )
    return options


def load_model(args: argparse.Namespace, device: Any) -> tuple[Any, Any, Any]:
    """The model, its processor, and the classes to choose from."""
    from zeroshot.checkpoints import load_checkpoint
    from zeroshot.evaluation.options import load_vocabulary

    model, processor = load_checkpoint(args.model)
    model = model.to(device)
    arguments = (args.classes, args.unseen, args.template_set, args.phrase_pooling, args.text_cache)
    return model, processor, load_vocabulary(model, processor, *arguments)


def segment_dataset(args: argparse.Namespace) -> int:
    """Segments a whole dataset; returns the exit status."""
    from zeroshot.evaluation.bulk import BulkSettings, predict_dataset, start_bulk

    if args.device is not None:
        raise ValueError(
            "`--device` cannot be combined with `--dataset`: the launcher assigns a device to each process."
        )
    if args.refine:
        raise ValueError("`--refine` cannot be combined with `--dataset`: pass a folder of images as `input`.")
    shared = ("dataset", "part", "root", "image_column", "streaming", "limit", "shard_size", "output_format")
    readout = ("batch_size", "gamma", "threshold", "none_of_these")
    settings = BulkSettings(
        **{name: getattr(args, name) for name in (*shared, *readout)}, num_threads=args.num_readers
    )
    accelerator = start_bulk()
    model, processor, vocabulary = load_model(args, accelerator.device)
    images, broken = predict_dataset(model, processor, vocabulary, settings, args.output_dir, accelerator)
    accelerator.print(f"{images - broken} of {images} images segmented: {args.output_dir}")
    accelerator.wait_for_everyone()  # a process that exits early can abort the others' communication
    accelerator.end_training()
    return 1 if broken else 0


def segment_files(args: argparse.Namespace) -> int:
    """Segments images and folders of images in one process; returns the exit status."""
    import torch

    from zeroshot.evaluation.options import check_correction
    from zeroshot.evaluation.pictures import PictureSettings, plan_pictures, write_pictures

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("Every process would segment all images: pass the folder as `--dataset` to distribute it.")
    check_correction(args.gamma, args.threshold)
    shared = ("gamma", "threshold", "none_of_these", "refine", "labels_only", "picture_size")
    settings = PictureSettings(**{name: getattr(args, name) for name in shared})
    output = Path(args.output_dir)
    jobs = plan_pictures(args.input, output, settings)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise ValueError(f"`--device` is {device!r}, which cannot be used: {str(error).splitlines()[0]}") from None
    model, processor, vocabulary = load_model(args, device)
    broken = write_pictures(model, processor, vocabulary, jobs, output, settings)
    print(f"{len(jobs) - broken} of {len(jobs)} images segmented: {output}")
    return 1 if broken else 0


def main() -> int:
    options = parser()
    args = options.parse_args()
    if bool(args.input) == (args.dataset is not None):
        options.error("give images or folders, or --dataset")
    if args.num_threads:
        import torch

        torch.set_num_threads(args.num_threads)
    return segment_files(args) if args.dataset is None else segment_dataset(args)


if __name__ == "__main__":
    run_command(main, status=2)
