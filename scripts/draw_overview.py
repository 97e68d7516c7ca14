#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Draws docs/results/overview.png: scenes of the test split, their labels, predictions and unseen scores.

    python scripts/draw_overview.py --model .
    python scripts/draw_overview.py --model checkpoints/photos --photos app/examples/photos.json \\
        --output docs/results/photos.jpg

The second command draws photographs and predictions with the class names that the file lists.
"""

from __future__ import annotations

from pathlib import Path

from zeroshot.cli import command_parser, integers, run_command


def main() -> None:
    options = command_parser(__doc__)
    options.add_argument("--model", default=".", help="AlignZeg checkpoint: a folder or a hub id")
    options.add_argument("--scenes", type=integers, default=[3, 7, 12, 21], help="positions in the test split")
    options.add_argument("--photos", type=Path, help="JSON list of photographs to draw instead of scenes")
    options.add_argument("--output", default="docs/results/overview.png", help="image to write")
    args = options.parse_args()
    from zeroshot.evaluation.overview import draw_overview, draw_photos

    if args.photos is not None:
        draw_photos(args.model, args.photos, args.output)
    else:
        draw_overview(args.model, args.scenes, args.output)


if __name__ == "__main__":
    run_command(main)
