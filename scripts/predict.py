#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Segments images by class names that are given here.

    python scripts/predict.py photo.jpg more_photos --classes "cat, sofa, window" --unseen "sofa" --output_dir predictions

For every image it writes NAME.png (palette PNG, values are positions in --classes), NAME_overlay.png with a legend, and
NAME_unseen.png, how much each pixel looks like an unseen class; --labels_only writes the first of them alone. NAME is the
file's without its ending, and with it where two files would write the same picture. The subfolders of a folder are walked,
and are found again in the output. Without --classes the checkpoint's vocabulary is used.
A file that is not an image is reported and skipped; the exit status is then 1.

    accelerate launch scripts/predict.py --dataset FOLDER_OR_HUB_ID --part train --classes "cat, sofa" --output_dir out

segments a whole dataset on all processes and machines of the launch, into Parquet shards or folders of PNG files (see
`zeroshot.evaluation.bulk`). Interrupted, it resumes when the same command is run again. A broken image is reported and
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
    options.add_argument("--labels_only", action="store_true", help="write the label maps without the other pictures")
    options.add_argument(
        "--picture_size",
        type=integer(0),
        default=2048,
        help="longer side of overlays and unseen maps at most; 0 gives them the image's size; label maps always have it",
    )
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


def load_model(args: argparse.Namespace, device: Any) -> tuple[Any, Any, Any]:
    """The model, its processor, and the classes to choose from."""
    from zeroshot.checkpoints import load_checkpoint
    from zeroshot.evaluation.options import load_vocabulary

    model, processor = load_checkpoint(args.model)
    model = model.to(device)
    arguments = (args.classes, args.unseen, args.template_set, args.phrase_pooling)
    return model, processor, load_vocabulary(model, processor, *arguments)


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
    """Images and folders of images, by one process; returns the exit status."""
    import torch

    from zeroshot.evaluation.options import check_correction
    from zeroshot.evaluation.pictures import PictureSettings, plan_pictures, write_pictures

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("Several processes would all do the same: pass the folder as `--dataset` to share it out.")
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
