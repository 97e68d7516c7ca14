#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Reports on the data of a training: file pairs, image sizes, pixels per class, likely mistakes, and a figure.

    python scripts/check_data.py --config scripts/configs/own_data.yaml --data.dataset my_data --data.split my_classes.yaml

Also accepts the options of train.py. Nothing is trained. The figure shows images and their label maps; unlabelled pixels
are grey. Class names are compared if `model.clip` or `model.checkpoint` is set.
"""

from __future__ import annotations

from jsonargparse.typing import PositiveInt

from zeroshot.cli import run_command
from zeroshot.settings import SettingsParser


def main() -> None:
    parser = SettingsParser(__doc__)
    parser.add_argument("--images", type=PositiveInt, default=6, help="Images of each part to draw.")
    parser.add_argument("--output", type=str, default="data_check.png", help="Figure to write.")
    parser.add_argument("--names", type=bool, default=True, help="Load the model and compare the class names.")
    args, settings = parser.parse()
    from zeroshot.data.task import check_task, describe_pairs, draw_grid, open_task
    from zeroshot.files import check_output
    from zeroshot.launching import start_processes

    check_output(args.output)
    accelerator = start_processes()
    task = open_task(settings.data, validation=settings.training.evaluate_every > 0)
    accelerator.print(describe_pairs(task))
    check_task(accelerator, task)
    if accelerator.is_main_process:
        draw_grid(task, args.images, args.output)
        print(f"Picture: {args.output}")
    if args.names and (settings.model.clip or settings.model.checkpoint):
        from zeroshot.data.statistics import similar_names
        from zeroshot.training.setup import build_model

        model, processor = build_model(settings.model, settings.seed)
        classes = list(task.split.classes)
        alike = similar_names(model.get_text_prototypes(processor, classes), classes)
        accelerator.print(
            "\n".join(f"Warning: {each}" for each in alike) or "The text tower distinguishes all class names."
        )


if __name__ == "__main__":
    run_command(main)
