#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Measures the cost per image of bulk prediction, stage by stage, for docs/scaling.md.

    python scripts/measure_scaling.py --output docs/results/scaling.json

The model is the full-size default, ViT-B/16 at 640 pixels, with random weights, which are as fast as trained ones. The
images are synthetic scenes as JPEG files of 640 x 480 pixels. It uses one thread and measures CPU time, so other programs
on the machine do not count.
"""

from __future__ import annotations

from zeroshot.cli import command_parser, integer, run_command


def main() -> None:
    options = command_parser(__doc__)
    options.add_argument("--output", default="docs/results/scaling.json", help="JSON report to write")
    options.add_argument("--images", type=integer(1), default=8, help="images to measure")
    options.add_argument("--batch_size", type=integer(1), default=2, help="images per forward pass")
    args = options.parse_args()
    from zeroshot.evaluation.scaling import measure_scaling

    measure_scaling(args.output, args.images, args.batch_size)


if __name__ == "__main__":
    run_command(main)
