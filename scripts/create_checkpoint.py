#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Creates an untrained AlignZeg checkpoint on a CLIP with a ViT or a convolutional image tower.

    python scripts/create_checkpoint.py --clip ViT-B-16 --pretrained laion2b_s34b_b88k --vocabulary coco_stuff \\
        --output_dir checkpoints/alignzeg-b16

--clip is a model name of open_clip (then --pretrained is a tag of it or a file of weights) or a folder or hub id of a
transformers CLIP, MetaCLIP 2 or SigLIP; SigLIP 2 only with one image size, not NaFlex. --vocabulary is a benchmark's name,
a YAML with classes and unseen classes, or names with commas. Trainable parts are initialised from --seed; --config takes
overrides of AlignZegConfig as YAML.
"""

from __future__ import annotations

from typing import Any

from zeroshot.cli import command_parser, integer, names, run_command
from zeroshot.files import parse_yaml, shown
from zeroshot.settings import load_settings


def read_overrides(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Overrides of `AlignZegConfig` and of the image processor, from YAML or from a preset file."""
    config = parse_yaml(text, "`--config`")
    if isinstance(config, dict):
        return config, {}
    if not isinstance(config, str):
        raise ValueError(f"`--config` is {shown(config)}; expected names and values, or a preset file.")
    preset = load_settings(["--config", text]).model
    if not preset.config and not preset.image_processor:
        raise ValueError(f"`--config` is {text!r}, which has neither `model.config` nor `model.image_processor`.")
    return preset.config, preset.image_processor


def main() -> None:
    options = command_parser(__doc__)
    options.add_argument(
        "--clip",
        required=True,
        help="open_clip model name, or folder or hub id of a transformers CLIP, MetaCLIP 2 or SigLIP",
    )
    options.add_argument("--pretrained", help="with open_clip, the tag or file of the weights")
    options.add_argument("--random_weights", action="store_true", help="initialise the open_clip model randomly")
    options.add_argument(
        "--vocabulary", required=True, help="benchmark name, YAML file, or comma-separated class names"
    )
    options.add_argument("--output_dir", required=True, help="folder to write to")
    options.add_argument("--template_set", help="prompt templates: single, vild or imagenet; default: the config's")
    options.add_argument("--config", default="{}", help='YAML, such as "{num_queries: 50}", or a preset file')
    options.add_argument("--seed", type=integer(0), default=0, help="seed of the trainable parts")
    args = options.parse_args()
    config, image_processor = read_overrides(args.config)
    from zeroshot.checkpoints import check_replaceable, save_checkpoint
    from zeroshot.data.splits import SegmentationSplit, load_split
    from zeroshot.towers import assemble, load_towers

    check_replaceable(args.output_dir)
    if args.template_set:
        config["template_set"] = args.template_set
    if "," in args.vocabulary:
        split = SegmentationSplit("--vocabulary", tuple(names(args.vocabulary)))
    else:
        split = load_split(args.vocabulary)
        split.require_seen()
    towers = load_towers(args.clip, args.pretrained, random_weights=args.random_weights)
    model, processor = assemble(towers, seed=args.seed, config=config, image_processor=image_processor)
    model.set_vocabulary(split.vocabulary, list(split.unseen), processor)
    save_checkpoint(model, processor, args.output_dir)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{args.output_dir}: {len(split.classes)} classes, {trainable:,} trainable parameters. It is untrained.")


if __name__ == "__main__":
    run_command(main)
