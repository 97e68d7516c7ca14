#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Measures whether data loading keeps up with the model: times each of them alone, with the settings of a training.

    accelerate launch scripts/benchmark_loader.py --config scripts/configs/coco_stuff_vitb16.yaml --batches 20

Also accepts the options of train.py. The weights change during the measurement and are discarded.
"""

from __future__ import annotations

from jsonargparse.typing import PositiveInt

from zeroshot.cli import run_command
from zeroshot.settings import SettingsParser


def main() -> None:
    parser = SettingsParser(__doc__)
    parser.add_argument("--batches", type=PositiveInt, default=20, help="Batches and steps to time.")
    parser.add_argument("--output", type=str | None, help="JSON report to write.")
    args, settings = parser.parse()
    from zeroshot.training.loader_speed import benchmark_loader

    benchmark_loader(settings, args.batches, args.output)


if __name__ == "__main__":
    run_command(main)
