#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Trains AlignZeg.

    accelerate launch scripts/train.py --config scripts/configs/embedded.yaml [--section.key value ...]

Run the same command again to resume: training continues from the newest complete checkpoint, and the final weights equal
    those of an uninterrupted training. SIGTERM and Ctrl-C write a checkpoint before the process exits.
"""

from zeroshot.cli import run_command
from zeroshot.settings import SettingsParser


def main() -> None:
    _, settings = SettingsParser(__doc__).parse()
    from safetensors import SafetensorError

    from zeroshot.training.checkpoint_store import CheckpointError, explain
    from zeroshot.training.trainer import Trainer

    trainer = Trainer(settings)
    try:
        trainer.run()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(explain(error, trainer.output)) from error


if __name__ == "__main__":
    run_command(main)
