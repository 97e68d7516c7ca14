# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Sets up a training run: accelerator, model, transform, optimizer groups and learning rate schedule."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.tracking import get_available_trackers

from modeling_alignzeg import AlignZegModel, AlignZegProcessor

from ..checkpoints import check_config_names, load_checkpoint, load_config
from ..data.transforms import TrainTransform
from ..launching import start_processes
from ..settings import ModelSettings, Settings, TrainingSettings
from ..towers import assemble, check_source, load_towers


def trackers(settings: TrainingSettings) -> list[str]:
    """Names of accelerate's trackers for a training.

    Raises:
        ValueError: A tracker is not installed, or accelerate does not support it.
    """
    names = [name for name in ("tensorboard", "trackio") if getattr(settings, name)]
    if "trackio" in names and "trackio" not in map(str, get_available_trackers()):
        raise ValueError(
            "`training.trackio` is on, but trackio is not installed, or accelerate is too old for it: "
            "`pip install -U trackio accelerate`, or switch it off."
        )
    return names


def start_accelerator(settings: Settings) -> Accelerator:
    """The accelerator of this process; see [`start_processes`] and [`trackers`] for errors."""
    accelerator = start_processes(
        log_with=trackers(settings.training) or None,
        project_dir=settings.output_dir,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=settings.seed),
        step_scheduler_with_optimizer=False,
    )
    if settings.training.num_threads:
        torch.set_num_threads(settings.training.num_threads)
    return accelerator


def check_model(settings: ModelSettings) -> None:
    """Checks the source of the model without reading weights.

    Raises:
        ValueError: Neither a checkpoint nor a CLIP is given, there is no such model, or its configuration has no such field.
    """
    if settings.checkpoint is not None:
        load_config(settings.checkpoint, "model.checkpoint", settings.checkpoint_config)
        return
    if settings.clip is None:
        raise ValueError(
            "`model.clip` is missing: set it to a CLIP (folder, hub id or open_clip model), or set `model.checkpoint`."
        )
    check_source(settings.clip, settings.pretrained, random_weights=settings.random_weights)
    check_config_names(settings.config, "model.config")


def build_model(settings: ModelSettings, seed: int) -> tuple[AlignZegModel, AlignZegProcessor]:
    """The model to train, and its processor, from settings that [`check_model`] accepts.

    Raises:
        ValueError: it cannot be loaded.
    """
    if settings.checkpoint is not None:
        torch.manual_seed(seed)
        return load_checkpoint(settings.checkpoint, "model.checkpoint", settings.checkpoint_config)
    assert settings.clip is not None
    towers = load_towers(settings.clip, settings.pretrained, random_weights=settings.random_weights)
    return assemble(towers, seed=seed, config=settings.config, image_processor=settings.image_processor)


def train_only(model: torch.nn.Module, parts: list[str]) -> None:
    """Freezes all parameters outside `parts`, modules or parameters by name.

    Raises:
        ValueError: a part is unknown or frozen anyway.
    """
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for part in parts:
        if not any(f"{name}.".startswith(f"{part}.") for name in trainable):
            known = ", ".join(dict.fromkeys(name.split(".")[0] for name in trainable))
            raise ValueError(f"`training.trainable` contains {part!r}; expected some of {known}, or parts of these.")
    for name in trainable:
        model.get_parameter(name).requires_grad_(any(f"{name}.".startswith(f"{part}.") for part in parts))


def build_transform(options: dict[str, Any]) -> TrainTransform:
    """The transform of `data.transform`; the caller sets `ignore_index` and `resample`.

    Raises:
        ValueError: an option is unknown or out of range.
    """
    known = [each.name for each in dataclasses.fields(TrainTransform) if each.name not in ("ignore_index", "resample")]
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"`data.transform` has no option {unknown[0]!r}; expected some of {', '.join(known)}.")
    return TrainTransform(**options)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of trainable parameters; norms, biases, embeddings, queries and prototypes have no weight decay."""
    with_decay: list[torch.nn.Parameter] = []
    without: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or any(part in name for part in ("position", "query_embeddings", "prototypes"))
            (without if plain else with_decay).append(parameter)
    return [{"params": with_decay, "weight_decay": weight_decay}, {"params": without, "weight_decay": 0.0}]


def learning_rate_factor(step: int, steps: int, warmup_steps: int, schedule: str) -> float:
    """Share of the peak learning rate at `step` (from 0)."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "poly":
        return (1 - done) ** 0.9
    if schedule == "constant":
        return 1.0
    raise ValueError(f"`training.schedule` is {schedule!r}; use cosine, poly or constant.")
