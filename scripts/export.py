#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Exports a checkpoint as an ONNX file or a `torch.export` program that takes the vocabulary as an input.

python scripts/export.py --model . --output alignzeg.onnx
python scripts/export.py --model . --output alignzeg.pt2 --classes "red plain, grass" --prototypes prototypes.npz
python scripts/export.py --model . --output onnx           # a folder with image and text models
python scripts/export.py --model . --output onnx --int8    # faster on CPUs, a quarter of the size
python scripts/export.py --model . --browser app/static/models

The models in a folder take images of any size and class names, see docs/onnx.md. A file stops at the logits:

Inputs: `pixel_values` (batch, 3, height, width), as the image processor makes them. Height and width are multiples of
    `config.size_divisor`, at least twice that value (resize, do not pad: padding would count as image). `text_prototypes`
    (classes, projection_dim), unit vectors. `seen_class_mask` (classes,), bool.
Outputs: `masks_queries_logits`, `class_queries_logits` and, from a model with PBC, `unseen_logits`, as in
    AlignZegOutput. Batch, height, width and the number of classes (at least two) are dynamic. The caller does the
    post-processing (`post_process_semantic_segmentation`), including PBC with γ and θ.
"""

from __future__ import annotations

from zeroshot.cli import command_parser, names, run_command


def main() -> None:
    options = command_parser(__doc__)
    options.add_argument("--model", default=".", help="AlignZeg checkpoint: a folder or a hub id")
    options.add_argument(
        "--output", help="file to write, .onnx or .pt2 (selects the format); a path without extension is a folder"
    )
    options.add_argument(
        "--int8", action="store_true", help="8-bit matrix products in a folder's image model, for CPUs"
    )
    options.add_argument("--browser", help="folder to write for app/static, with weights in 16 and 8 bits")
    options.add_argument("--classes", type=names, help="class names for --prototypes; default: the checkpoint's")
    options.add_argument("--unseen", type=names, help="classes in --classes that count as unseen")
    options.add_argument("--prototypes", help=".npz file for the text prototypes and the seen mask of the classes")
    args = options.parse_args()
    from zeroshot.export import export_checkpoint

    export_checkpoint(args.model, args.output, args.classes, args.unseen, args.prototypes, args.browser, args.int8)


if __name__ == "__main__":
    run_command(main)
