#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Trains the small CLIP of the embedded benchmark on synthetic images and captions, without masks.

    python scripts/pretrain_clip.py --output_dir scripts/assets/small_clip

The result is an ordinary `CLIPModel` folder (weights as safetensors, tokenizer, image processor), plus
`pretraining.json` with the zero-shot accuracy on held-out images of single objects and the settings. As on the web,
captions mention every class; "unseen" refers to the segmentation labels only.
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
