#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Packs the photographs of the experiments, from their public originals, as the parquet files that the other scripts read.

    python scripts/pack_photos.py --msrc MSRC_ObjCategImageDatabase_v2 --coco coco2017 \\
        --imagenet_samples imagenet-sample-images --caltech101 101_ObjectCategories --output data/photos

Each option may be left out. MSRC and COCO serve training and evaluation (`--data.root data/photos`), the other two only
scripts/pretrain_lit.py. docs/protocols.md, "The photographs of the experiments", describes the originals.
"""

from __future__ import annotations

from pathlib import Path

from zeroshot.cli import command_parser, run_command


def main() -> None:
    options = command_parser(__doc__)
    options.add_argument("--msrc", type=Path, help="MSRC v2: Images and GroundTruth")
    options.add_argument("--coco", type=Path, help="COCO 2017 with panoptic annotations")
    options.add_argument("--imagenet_samples", type=Path, help="one image of each ImageNet class")
    options.add_argument("--caltech101", type=Path, help="Caltech-101's folder of categories")
    options.add_argument("--output", type=Path, required=True, help="folder of the parquet files")
    args = options.parse_args()
    from zeroshot.data.photo_files import pack_caltech101, pack_coco, pack_imagenet_samples, pack_msrc

    packs = (
        (args.msrc, pack_msrc),
        (args.coco, pack_coco),
        (args.imagenet_samples, pack_imagenet_samples),
        (args.caltech101, pack_caltech101),
    )
    if not any(folder for folder, _ in packs):
        raise ValueError(
            "No folder of photographs was passed; pass some of --msrc, --coco, --imagenet_samples, --caltech101."
        )
    for folder, pack in packs:
        if folder is not None:
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder} is not a folder.")
            for file in pack(folder, args.output):
                print(file)


if __name__ == "__main__":
    run_command(main)
