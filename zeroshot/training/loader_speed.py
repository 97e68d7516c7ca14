# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Measures whether data loading keeps up with the model."""

from __future__ import annotations

import json
import math
import tempfile
import time
from typing import Any

import torch

from ..files import atomic_write_text, check_output
from ..settings import Settings
from .trainer import Trainer


def measure(trainer: Trainer, batches: int) -> dict[str, Any]:
    """Images per second of one process's loader and model, over a fixed number of `batches`."""
    stream = trainer.micro_batches()
    batch = next(stream)  # do not time the start of the loader
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


def benchmark_loader(settings: Settings, batches: int, output: str | None) -> None:
    """Times loader and model, prints the comparison, and writes it to the JSON file `output` if given."""
    if output:
        check_output(output)
    with tempfile.TemporaryDirectory() as folder:
        settings.output_dir, settings.training.evaluate_every = folder, 0
        settings.training.tensorboard = settings.training.trackio = False
        trainer = Trainer(settings)
        report = measure(trainer, batches)
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()
    if not trainer.accelerator.is_main_process:
        return
    loader, model = report["loader_images_per_second"], report["model_images_per_second"]
    print(f"Loader: {loader:.1f} images/s with {report['loader_workers']} worker(s)")
    print(f"Model:  {model:.1f} images/s, {report['model_steps_per_second']:.3f} steps/s")
    if loader >= model:
        print(f"The loader keeps up: it is {report['loader_per_model']:.1f} times as fast as the model.")
    else:
        print(f"The model waits for the loader: set data.num_workers to about {report['workers_needed']}.")
    if output:
        atomic_write_text(output, json.dumps(report, indent=2) + "\n")
