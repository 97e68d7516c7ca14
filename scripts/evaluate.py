#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Evaluates a checkpoint: mIoU(S), mIoU(U), hIoU, pixel accuracy and IoU per class, in the generalized label space.

    python scripts/evaluate.py --model . --dataset embedded_scenes --part test --output report.json

Any checkpoint can be evaluated on any dataset: classes come from --split, by default the dataset's own. With
`--unseen_from checkpoint`, a class counts as seen if the checkpoint was trained on its name, regardless of the split. 95 %
intervals come from a bootstrap over images. `--segments` adds the panoptic quality of segments and the average precision of
instances. The report is written atomically at the end.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from zeroshot.cli import command_parser, integer, run_command


if TYPE_CHECKING:  # imported when they are used, so that --help is fast
    from modeling_alignzeg import AlignZegImageProcessor, AlignZegModel
    from zeroshot.data.splits import SegmentationSplit
    from zeroshot.evaluation.test_time_augmentation import Augmentation


def parse_arguments() -> argparse.Namespace:
    options = command_parser(__doc__)
    options.add_argument("--model", default=".", help="AlignZeg checkpoint: a folder or a hub id")
    options.add_argument("--dataset", default="embedded_scenes", help="benchmark name, hub id or folder")
    options.add_argument("--root", help="folder of a named benchmark's files")
    options.add_argument(
        "--split", help="classes and unseen classes: a split name or a YAML file; default: the dataset's"
    )
    options.add_argument(
        "--unseen_from",
        choices=("split", "checkpoint"),
        default="split",
        help="source of the unseen classes: the split, or the training classes of the checkpoint",
    )
    options.add_argument("--part", default="test", help="part of the dataset")
    options.add_argument("--limit", type=integer(1), help="use only the first N images")
    options.add_argument("--image_column", default="image", help="image column, if --dataset is not a named benchmark")
    options.add_argument("--label_column", default="label", help="label column, if --dataset is not a named benchmark")
    options.add_argument(
        "--image_folder", help="image subfolder, if --dataset is a folder; {part} is replaced by the part"
    )
    options.add_argument(
        "--label_folder",
        help="subfolder of label files, if --dataset is a folder, or the one to use if a benchmark has several",
    )
    options.add_argument("--image_suffix", help="suffix of image names, if --dataset is a folder: _leftImg8bit")
    options.add_argument("--label_suffix", help="suffix of label map names, if --dataset is a folder: _L")
    options.add_argument(
        "--label_file", help="COCO JSON file, if --dataset is a folder; {part} is replaced by the part"
    )
    options.add_argument("--context_459_ids", action="store_true", help="PASCAL Context's labels have ids 1..459")
    options.add_argument("--scene_seed", type=integer(0), default=0, help="seed of the embedded scenes")
    options.add_argument("--template_set", help="prompt templates; default: the checkpoint's")
    options.add_argument("--text_cache", metavar="DIR", help="folder that keeps text embeddings of many names")
    options.add_argument(
        "--phrase_pooling",
        choices=("max", "mean"),
        default="max",
        help="how to combine several phrases of a class, if the split has `phrases`",
    )
    options.add_argument("--gamma", type=float, help="PBC's correction; 0 disables it; default: the checkpoint's")
    options.add_argument("--threshold", type=float, help="PBC's threshold; default: the checkpoint's")
    options.add_argument(
        "--seen_penalty",
        type=float,
        default=0.0,
        help="constant subtracted from the scores of all seen classes (blind correction)",
    )
    options.add_argument(
        "--shortest_edge", type=integer(1), help="short side of the images; default: the checkpoint's"
    )
    options.add_argument("--refine", action="store_true", help="align class borders with edges in the image")
    options.add_argument(
        "--only_present",
        action="store_true",
        help="choose only among the classes that each image contains, as if a user had typed their names",
    )
    options.add_argument(
        "--segments",
        action="store_true",
        help="also score panoptic segments (PQ) and instances (mask AP) on embedded_scenes or a COCO panoptic file",
    )
    options.add_argument(
        "--score_threshold", type=float, default=0.5, help="panoptic segments need a score above this, with --segments"
    )
    options.add_argument("--flip", action="store_true", help="average the scores of the image and its mirror image")
    options.add_argument(
        "--sliding_window",
        type=integer(1),
        metavar="SIZE",
        help="average the scores of square windows of SIZE pixels per side",
    )
    options.add_argument("--stride", type=integer(1), help="stride of the windows; default: two thirds of their side")
    options.add_argument("--skip_validation", action="store_true", help="do not check all files before the evaluation")
    options.add_argument("--batch_size", type=integer(1), default=16, help="images per forward pass")
    options.add_argument("--num_threads", type=integer(0), default=0, help="CPU threads; 0 keeps torch's own choice")
    options.add_argument("--output", help="JSON report to write")
    return options.parse_args()


def build_augmentation(args: argparse.Namespace) -> Augmentation | None:
    """Test-time augmentation, if an option asks for it."""
    if not args.flip and args.sliding_window is None and args.stride is None:
        return None
    for name in ("refine", "only_present"):
        if getattr(args, name):
            raise ValueError(
                f"`--{name}` cannot be combined with `--flip`, `--sliding_window` or `--stride`; leave it out."
            )
    from zeroshot.evaluation.test_time_augmentation import Augmentation

    return Augmentation(args.flip, args.sliding_window, args.stride, args.batch_size)


def check_segments(args: argparse.Namespace) -> None:
    """Whether `--segments` can be computed with the other options."""
    for name in ("refine", "only_present", "flip", "sliding_window", "stride", "seen_penalty"):
        if args.segments and getattr(args, name):
            raise ValueError(f"`--segments` cannot be combined with `--{name}`, which changes only label maps.")
    if not 0 <= args.score_threshold <= 1:
        raise ValueError(f"`--score_threshold` is {args.score_threshold}; expected a number from 0 to 1.")


def protocol(
    args: argparse.Namespace,
    split: SegmentationSplit,
    model: AlignZegModel,
    image_processor: AlignZegImageProcessor,
    augmentation: Augmentation | None,
) -> dict[str, Any]:
    """What a reader needs to compare the scores with others."""
    gamma = image_processor.correction_gamma if args.gamma is None else args.gamma
    threshold = image_processor.correction_threshold if args.threshold is None else args.threshold
    has_indicator = model.indicator is not None
    return {
        "split": split.name,
        "classes": len(split.classes),
        "unseen": list(split.unseen),
        "unseen_from": args.unseen_from,
        "label_space": "classes of each image" if args.only_present else "generalized",
        "note": split.protocol,
        "template_set": args.template_set or model.config.template_set,
        "phrase_pooling": args.phrase_pooling if split.phrases else None,
        "bias_correction": has_indicator and gamma > 0 and bool(split.unseen),
        "gamma": gamma if has_indicator else None,
        "threshold": threshold if has_indicator else None,
        "seen_penalty": args.seen_penalty,
        "size": {"shortest_edge": args.shortest_edge} if args.shortest_edge else dict(image_processor.size),
        "refine": args.refine,
        "flip": args.flip,
        "sliding_window": augmentation and augmentation.window,
        "stride": augmentation and augmentation.stride,
        "scene_seed": args.scene_seed if args.dataset == "embedded_scenes" else None,
    }


def main() -> None:
    args = parse_arguments()
    import torch

    from zeroshot.checkpoints import load_checkpoint
    from zeroshot.data.benchmarks import open_part
    from zeroshot.data.dataset import SegmentationDataset, check_dataset
    from zeroshot.data.segments import open_segments
    from zeroshot.data.splits import load_split, split_by_training_names
    from zeroshot.data.statistics import data_warnings
    from zeroshot.evaluation.evaluator import (
        Readout,
        evaluate_model,
        evaluation_batches,
        format_scores,
        library_versions,
        without_nan,
    )
    from zeroshot.evaluation.segments import SegmentEvaluator, format_segments
    from zeroshot.files import atomic_write_text, check_output
    from zeroshot.launching import start_processes
    from zeroshot.settings import DataSettings

    augmentation = build_augmentation(args)
    readout = Readout(args.gamma, args.threshold, args.seen_penalty)
    check_segments(args)
    if args.output:
        check_output(args.output)
    accelerator = start_processes()
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    model, processor = load_checkpoint(args.model)
    model = model.to(accelerator.device)
    split = load_split(args.split or args.dataset, context_459_ids=args.context_459_ids)
    given = {field.name: getattr(args, field.name) for field in fields(DataSettings) if hasattr(args, field.name)}
    settings = DataSettings(**given)
    rows = open_part(settings, args.part, args.limit)
    if args.unseen_from == "checkpoint":
        known = [name for name in model.config.id2label.values() if name not in model.config.unseen_labels]
        split = split_by_training_names(split, known)
    if not args.skip_validation:
        for warning in data_warnings(split, {args.part: check_dataset(accelerator, rows, split)}):
            accelerator.print(f"Warning: {warning}")
    segments = None
    if args.segments:
        segments = SegmentEvaluator(
            split, *open_segments(settings, args.part, split), args.gamma, args.threshold, args.score_threshold
        )
    prototypes = model.get_text_prototypes(
        processor,
        split.vocabulary,
        args.template_set,
        phrase_pooling=args.phrase_pooling,
        cache_dir=args.text_cache,
    )
    dataset = SegmentationDataset(rows, split, training=False)
    started = time.time()
    scores = evaluate_model(
        model,
        processor.image_processor,
        evaluation_batches(
            dataset, processor, 1 if args.only_present else args.batch_size, accelerator, args.shortest_edge
        ),
        split,
        prototypes,
        {"report": readout},
        accelerator,
        progress=accelerator.is_local_main_process,
        augmentation=augmentation,
        num_images=len(dataset),
        refine=args.refine,
        only_present=args.only_present,
        intervals=True,
        segments=segments,
    )["report"]
    segment_scores = segments and segments.scores(accelerator)
    if not accelerator.is_main_process:
        return
    report = {
        **{name: scores[name] for name in ("miou_seen", "miou_unseen", "hiou", "pixel_accuracy", "miou")},
        "intervals": scores["intervals"],
        "dataset": args.dataset,
        "part": args.part,
        "images": len(dataset),
        "protocol": {
            **protocol(args, split, model, processor.image_processor, augmentation),
            "unseen_occurring": scores["unseen_occurring"],
        },
        "seconds": round(time.time() - started, 1),
        "versions": library_versions(),
        "per_class": scores["per_class"],
    }
    if segment_scores:
        report["segments"] = segment_scores
    width = max(map(len, split.classes))
    for name, value in scores["per_class"].items():
        print(f"{name:<{width}}  {'unseen' if name in split.unseen else 'seen':<6}  {value:6.1f}")
    print(format_scores(scores))
    shown = {"mIoU(S)": "miou_seen", "mIoU(U)": "miou_unseen", "hIoU": "hiou", "pAcc": "pixel_accuracy"}
    ranges = {title: scores["intervals"][name] for title, name in shown.items() if name in scores["intervals"]}
    if ranges:
        print("95 % intervals: " + "  ".join(f"{title} {low:.1f}–{high:.1f}" for title, (low, high) in ranges.items()))
    if segment_scores:
        print(format_segments(segment_scores))
    if args.output:
        atomic_write_text(args.output, json.dumps(without_nan(report), indent=2, allow_nan=False) + "\n")
        print(f"Report: {args.output}")


if __name__ == "__main__":
    run_command(main)
