#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Measures the average precision of search by exemplars on test scenes, compared with names and a random ranking.

python scripts/measure_exemplars.py --output docs/results/exemplars.json
"""

from __future__ import annotations

import json

from zeroshot.cli import command_parser, integer, integers, run_command


def main() -> None:
    options = command_parser(__doc__)
    options.add_argument("--model", default=".", help="AlignZeg checkpoint with the classes of the scenes")
    options.add_argument("--counts", type=integers, default=[1, 5], help="exemplars per class")
    options.add_argument("--scenes", type=integer(1), default=200, help="test scenes")
    options.add_argument("--output", help="JSON report to write")
    args = options.parse_args()
    from zeroshot.checkpoints import load_checkpoint
    from zeroshot.evaluation.exemplars import report_of
    from zeroshot.files import atomic_write_text, check_output

    if args.output:
        check_output(args.output)
    report = report_of(*load_checkpoint(args.model), args.counts, args.scenes)
    for count, ways in report["exemplars"].items():
        for way, values in ways.items():
            numbers = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
            print(f"{count} per class, {way:<25} {numbers}")
    if args.output:
        atomic_write_text(args.output, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
