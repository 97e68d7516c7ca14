#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Does data loading keep up with the model? Measures both, each alone, with the settings of a training.

    accelerate launch scripts/benchmark_loader.py --config scripts/configs/coco_stuff_vitb16.yaml --batches 20

Flags are those of train.py, and --batches, how many of the loader and steps of the model are timed (default 20), and
--output, a JSON report to write. Nothing is trained: the weights change and are thrown away.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from typing import Any

import torch

from zeroshot.cli import run_command
from zeroshot.files import atomic_write_text, check_output
from zeroshot.settings import load_settings, take_option
from zeroshot.training.trainer import Trainer


def measure(trainer: Trainer, batches: int) -> dict[str, Any]:
    """Images a second of one process's loader and model, in a fixed number of `batches`."""
    stream = trainer.micro_batches()
    batch = next(stream)  # what starts with the first batch does not count
    images = len(batch["names"])
    started = time.perf_counter()
    for _ in range(batches):
        next(stream)
    loader_seconds = (time.perf_counter() - started) / batches

    accumulated = trainer.settings.training.gradient_accumulation_steps
    trainer.network.train()
    trainer.optimizer_step(iter([dict(batch) for _ in range(accumulated)]))  # warm-up
    copies = (dict(batch) for _ in range(batches * accumulated))
    _synchronize()
    started = time.perf_counter()
    for _ in range(batches):
        trainer.optimizer_step(copies)
    _synchronize()
    step_seconds = (time.perf_counter() - started) / batches
    wanted = images * accumulated / step_seconds
    workers = trainer.settings.data.num_workers
    return {
        "processes": trainer.accelerator.num_processes,
        "images_per_batch": images,
        "loader_workers": workers,
        "loader_images_per_second": round(images / loader_seconds, 3),
        "model_steps_per_second": round(1 / step_seconds, 4),
        "model_images_per_second": round(wanted, 3),
        "loader_per_model": round(images / loader_seconds / wanted, 3),
        "workers_needed": max(1, math.ceil(max(workers, 1) * wanted * loader_seconds / images)),
    }


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def main() -> None:
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    batches, output = take_option(arguments, "--batches", "20"), take_option(arguments, "--output")
    if not batches.isdecimal() or int(batches) < 1:
        raise ValueError(f"`--batches` is {batches!r}; expected a positive whole number.")
    settings = load_settings(arguments)
    if output:
        check_output(output)
    with tempfile.TemporaryDirectory() as folder:
        settings.output_dir, settings.training.tensorboard, settings.training.evaluate_every = folder, False, 0
        trainer = Trainer(settings)
        report = measure(trainer, int(batches))
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()
    if not trainer.accelerator.is_main_process:
        return
    loader, model = report["loader_images_per_second"], report["model_images_per_second"]
    print(f"Loader: {loader:.1f} images/s with {report['loader_workers']} worker(s)")
    print(f"Model:  {model:.1f} images/s, {report['model_steps_per_second']:.3f} steps/s")
    if loader >= model:
        print(f"The loader keeps up: {report['loader_per_model']:.1f} times what the model takes.")
    else:
        print(f"The model waits for the loader: set data.num_workers to about {report['workers_needed']}.")
    if output:
        atomic_write_text(output, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
