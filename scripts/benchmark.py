#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Compares the speed of AlignZeg, the bare CLIP tower, CLIPSeg, GroupViT, SAM 3, dense cells of DINOv2, Mask2Former and
EoMT, with random weights.

python scripts/benchmark.py --quick                          # a few minutes, small images, to runs/benchmark
python scripts/benchmark.py                                  # everything, to docs/results
python scripts/benchmark.py --sections peers,classes         # some sections; the others keep their earlier results
python scripts/benchmark.py --device cuda --tower ViT-L-14 --dtype bfloat16 --batches 1,8,32

Results are written after every section: NAME.json, NAME.md and NAME.png, where NAME is benchmark_cpu or benchmark_cuda
(and the tower, if it is not ViT-B/16).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from zeroshot.cli import command_parser, integer, integers, names, run_command


def main() -> None:
    options = command_parser(__doc__)
    options.add_argument(
        "--sections",
        type=names,
        help="any of peers, names, memory, sizes, classes, batches, dtypes, training, loader, text, folder, onnx, compile; "
        "default: all, with --quick all but onnx and compile, which take longer",
    )
    options.add_argument("--device", default="cpu", help="cpu or cuda")
    options.add_argument(
        "--tower",
        default="ViT-B-16",
        choices=("ViT-B-16", "ViT-L-14", "convnext_base_w"),
        help="CLIP tower of AlignZeg and CLIPSeg; with the last one only the sections sizes and batches",
    )
    options.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of weights and inputs"
    )
    options.add_argument("--threads", type=integer(0), default=0, help="CPU threads; 0 keeps torch's own choice")
    options.add_argument("--repeats", type=integer(2), default=11, help="timing rounds; slow models run fewer")
    options.add_argument("--budget", type=float, default=60, help="seconds per model in one comparison")
    options.add_argument("--size", type=integer(1), default=640, help="pixels per side")
    options.add_argument("--num_classes", type=integer(2), default=171, help="classes, except in `classes`")
    options.add_argument(
        "--sizes", type=integers, default=[320, 480, 640, 960, 1280], help="pixels per side in `sizes`"
    )
    options.add_argument(
        "--vocabularies", type=integers, default=[20, 171, 847, 10_000], help="numbers of classes in `classes`"
    )
    options.add_argument("--label_size", type=integer(1), default=1280, help="side of the label maps in `classes`")
    options.add_argument("--batches", type=integers, default=[1, 8], help="batch sizes in `batches`")
    options.add_argument("--names", type=integers, default=[1000, 10_000], help="class name counts in `text`")
    options.add_argument("--images", type=integer(2), default=200, help="images in `folder`")
    options.add_argument("--quick", action="store_true", help="small images, few classes and repeats")
    options.add_argument("--output_dir", type=Path, help="default: docs/results, with --quick runs/benchmark")
    options.add_argument("--child", help=argparse.SUPPRESS)  # a memory measurement in a separate process
    args = options.parse_args()
    from zeroshot.evaluation.benchmark import run_benchmark

    run_benchmark(args)


if __name__ == "__main__":
    run_command(main)
