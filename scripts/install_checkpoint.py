#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Makes a checkpoint the default one, which is used when this clone is loaded or pushed to the Hub.

    python scripts/install_checkpoint.py runs/embedded/best
    python scripts/install_checkpoint.py runs/photos/final --root checkpoints/photos --half

Its weights, config, processor and tokenizer are copied to the root of the repository, or to another folder with a link to
the code. The code is not copied.
"""

from __future__ import annotations

from pathlib import Path

from zeroshot.cli import command_parser, run_command


ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    options = command_parser(__doc__)
    options.add_argument("checkpoint", help="folder that training or create_checkpoint.py wrote")
    options.add_argument("--root", type=Path, default=ROOT, help="the clone, or a folder in it")
    options.add_argument("--half", action="store_true", help="store matrices as float16; they load as float32")
    args = options.parse_args()
    from zeroshot.checkpoints import install_as_root

    for file in install_as_root(args.checkpoint, args.root, args.half):
        print(file)


if __name__ == "__main__":
    run_command(main)
