#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Trains the small CLIP of the embedded benchmark on drawn images and captions; it never sees a mask.

    python scripts/pretrain_clip.py --output_dir scripts/assets/small_clip

The result is an ordinary `CLIPModel` folder (weights as safetensors, tokenizer, image processor) with
`pretraining.json` beside it: the zero-shot accuracy on held-out images of single objects, and what made it.
As on the web, captions name every class; which of them are "unseen" is a matter of the segmentation labels only.
"""

from __future__ import annotations

from jsonargparse import ArgumentParser

from zeroshot.cli import run_command
from zeroshot.settings import ClipPretraining


def main() -> None:
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_class_arguments(ClipPretraining)
    args = parser.parse_args()
    from zeroshot.training.clip_pretraining import pretrain_clip

    pretrain_clip(ClipPretraining(**vars(args)))


if __name__ == "__main__":
    run_command(main)
