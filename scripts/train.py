#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Trains AlignZeg.

    accelerate launch scripts/train.py --config scripts/configs/embedded.yaml [--any.field value ...]

Fields are those of `zeroshot.settings.Settings`. Run it again to resume: it goes on from the newest complete checkpoint
and ends with the weights of an uninterrupted training. SIGTERM and Ctrl-C write a checkpoint first.
"""

import sys

from safetensors import SafetensorError

from zeroshot.cli import run_command
from zeroshot.settings import load_settings
from zeroshot.training.checkpoint_store import CheckpointError, explain
from zeroshot.training.trainer import Trainer


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        from zeroshot import settings

        print(__doc__)
        for part in (settings.Settings, settings.ModelSettings, settings.DataSettings, settings.TrainingSettings):
            print(f"{part.__name__}: {part.__doc__}")
        return
    trainer = Trainer(load_settings(sys.argv[1:]))
    try:
        trainer.run()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(explain(error, trainer.output)) from error


if __name__ == "__main__":
    run_command(main)
