#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Draws the example scenes of the demo into app/examples, with the class names to try on each.

    python scripts/draw_examples.py                 # scenes with much unseen area
    python scripts/draw_examples.py --model .       # scenes that this checkpoint's correction improves most

All scenes come from the test split of the embedded benchmark. The class names of a scene are the classes in it, plus
seen classes that are easily confused with its unseen ones: with a model, the seen classes most often predicted on the
unseen area; without one, classes of the same colour, or other stuff.
"""

from __future__ import annotations

from pathlib import Path

from zeroshot.cli import command_parser, integer, run_command


OUTPUT = Path(__file__).resolve().parent.parent / "app" / "examples"


def main() -> None:
    options = command_parser(__doc__)
    options.add_argument("--model", help="AlignZeg checkpoint: a folder or a hub id")
    options.add_argument("--count", type=integer(1), default=8, help="number of examples")
    options.add_argument("--scan", type=integer(1), default=200, help="number of test scenes to choose from")
    options.add_argument("--output_dir", type=Path, default=OUTPUT, help="folder to write to")
    args = options.parse_args()
    from zeroshot.evaluation.examples import draw_examples

    examples = draw_examples(args.output_dir, args.count, args.scan, args.model)
    print(f"{len(examples)} examples: {args.output_dir}")


if __name__ == "__main__":
    run_command(main)
