#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Measures the accuracy of the shipped checkpoints in bfloat16 and float16, and as exported ONNX files in float32 and int8.

python scripts/measure_precision.py --photos PHOTOS --output docs/results/precision.json

The repository's checkpoint is evaluated on the test scenes, `checkpoints/photos` on MSRC's test photographs in PHOTOS, see
scripts/pack_photos.py. Without `--photos`, only the first.
"""

from __future__ import annotations

import json
from pathlib import Path

from zeroshot.cli import command_parser, integer, run_command


ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    options = command_parser(__doc__)
    options.add_argument("--photos", help="folder of the photographs")
    options.add_argument("--limit", type=integer(1), help="use only the first N images of each dataset")
    options.add_argument("--output", help="JSON report to write")
    args = options.parse_args()
    from zeroshot.checkpoints import load_checkpoint
    from zeroshot.evaluation.precision import measure_precision
    from zeroshot.files import atomic_write_text, check_output
    from zeroshot.settings import DataSettings

    if args.output:
        check_output(args.output)
    tasks = {".": DataSettings(dataset="embedded_scenes")}
    if args.photos:
        tasks["checkpoints/photos"] = DataSettings(dataset="msrc", root=args.photos)
    report = {}
    for place, settings in tasks.items():
        report[place] = measure_precision(*load_checkpoint(ROOT / place), settings, args.limit)
        print(f"{place} on {settings.dataset}, {report[place]['images']} images")
        for way, scores in report[place]["ways"].items():
            print(f"  {way:<10}" + "".join(f"  {name} {value:.2f}" for name, value in scores.items()))
    if args.output:
        atomic_write_text(args.output, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
