# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Tools and models of `scripts/benchmark.py`: interleaved timings, multiply-adds, peak memory; AlignZeg and models of
transformers with random weights, which are as fast as trained ones."""

from __future__ import annotations

import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    EomtConfig,
    EomtForUniversalSegmentation,
    GroupViTConfig,
    GroupViTModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Sam3Config,
    Sam3Model,
    SwinConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_alignzeg import AlignZegConfig, AlignZegModel
from modeling_alignzeg.recognizer_alignzeg import AlignZegTimmModel

from ..data.scenes import draw_scene


COMPILE_OPTIONS: dict[str, dict[str, Any]] = {
    "static": {"dynamic": False},
    "frozen": {"dynamic": False, "options": {"freezing": True}},
    "dynamic": {"dynamic": True},
}
TOWERS = {
    "ViT-B-16": {},
    "ViT-L-14": {
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 336,
        },
        "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        "projection_dim": 768,
        "clip_split_layer": 18,
        "fusion_layers": [0, 6, 12, 18],
    },
    "convnext_base_w": {
        "vision_config": {"model_type": "timm_wrapper", "architecture": "convnext_base"},
        "text_config": {"hidden_size": 640, "intermediate_size": 2560, "num_attention_heads": 10},
        "projection_dim": 640,
        "clip_input_scale": 1.0,
        "fusion_layers": [0, 1, 2, 3],
    },
}
CLIPSEG_SIZE, GROUPVIT_SIZE, DENSE_SIZE, SAM3_SIZE = 352, 224, 448, 1008  # pixels per side; their usual sizes
SAM3_TOKENS = 32  # per prompt
PROMPTS_AT_ONCE = 16  # CLIPSeg processes one copy of the image per prompt


# --- measuring -----------------------------------------------------------------------------------------------------


@dataclass
class Timing:
    """Seconds per call: median, quartiles and minimum over `repeats` calls."""

    median: float
    lower_quartile: float
    upper_quartile: float
    least: float
    repeats: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        return cls(statistics.median(seconds), low, high, min(seconds), len(seconds))


def synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    functions: dict[str, Callable[[], Any]], repeats: int, device: torch.device | str = "cpu", budget: float = 60.0
) -> dict[str, dict[str, float]]:
    """Times `functions` alternately, so that slow phases of the machine affect all of them equally.

    Args:
        functions: Functions to time, by name. Each is called once for warm-up.
        repeats: Number of rounds.
        device: Device of the functions; timings include its kernels.
        budget: Seconds after which a function is left out of further rounds, but not before it is timed twice.

    Returns:
        The fields of [`Timing`] for each name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            if len(seconds[name]) >= 2 and sum(seconds[name]) > budget:
                continue
            synchronize(device)
            started = time.perf_counter()
            function()
            synchronize(device)
            seconds[name].append(time.perf_counter() - started)
    return {name: asdict(Timing.of(values)) for name, values in seconds.items()}


def giga_macs(model: torch.nn.Module, function: Callable[[], Any]) -> float:
    """Multiply-adds of one call of `function`, in units of 1e9, by torch's counter: matrix products, convolutions and
    attention. The counter's hooks fail on weights that require gradients, so gradients are disabled meanwhile."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    counter = FlopCounterMode(display=False)
    try:
        model.requires_grad_(False)
        with torch.no_grad(), counter:
            function()
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
    return counter.get_total_flops() / 2e9


def peak_memory(device: torch.device | str) -> int:
    """Peak memory of this process so far, in bytes: GPU memory if `device` is a GPU, otherwise resident memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would include the parent process
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe_machine(device: torch.device | str) -> dict[str, Any]:
    """Machine and versions, for the report."""
    names, flags = [], set()
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            key, _, value = line.partition(":")
            names += [value.strip()] if key.strip() == "model name" else []
            flags |= set(value.split()) if key.strip() == "flags" else set()
    machine = {
        "cpu": names[0] if names else platform.processor(),
        "cpu_features": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16"}),
        "threads": torch.get_num_threads(),
        "device": "cpu",
    }
    if torch.device(device).type == "cuda":
        machine["device"] = torch.cuda.get_device_name(device)
    return machine


# --- what is compared ------------------------------------------------------------------------------------------------


@dataclass
class Contestant:
    """A model and the call that is timed.

    Attributes:
        title: Title in tables.
        model: Model with random weights, in evaluation mode.
        call: Maps normalized images `(batch, 3, side, side)` and a number of classes to the network's outputs.
        note: Differences of the call from others.
    """

    title: str
    model: torch.nn.Module
    call: Callable[[torch.Tensor, int], Any]
    note: str = ""

    def parameters(self) -> dict[str, int]:
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        return {"parameters": sum(n for n, _ in sizes), "trainable": sum(n for n, wanted in sizes if wanted)}


def random_prototypes(classes: int, width: int, seed: int = 0) -> torch.Tensor:
    """Unit vectors `(classes, width)`."""
    return F.normalize(torch.randn(classes, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def build_alignzeg(tower: str = "ViT-B-16", **overrides: Any) -> AlignZegModel:
    """AlignZeg of full size with random weights."""
    torch.manual_seed(0)
    return AlignZegModel(AlignZegConfig(**{**TOWERS[tower], **overrides})).eval()


def _alignzeg(tower: str) -> Contestant:
    model = build_alignzeg(tower)

    def call(images, classes):
        prototypes = random_prototypes(classes, model.config.projection_dim).to(images)
        return model(pixel_values=images, text_prototypes=prototypes)

    return Contestant("AlignZeg", model, call)


def _clip(tower: str) -> Contestant:
    config = AlignZegConfig(**TOWERS[tower])
    if config.is_convolutional:
        wrapper = AlignZegTimmModel._from_config(config.vision_config).eval().requires_grad_(False)

        def run(images, classes):
            return wrapper.timm_model.forward_features(images.contiguous(memory_format=torch.channels_last))

        return Contestant("bare CLIP vision tower", wrapper, run, "the floor: the same resolution as inside AlignZeg")
    model = CLIPVisionModel(config.vision_config).eval().requires_grad_(False)

    def call(images, classes):
        padded = images.shape[-1] + -images.shape[-1] % config.size_divisor
        side = round(padded * config.clip_input_scale)
        small = F.interpolate(images, size=(side, side), mode="bilinear")
        return model(pixel_values=small, interpolate_pos_encoding=True)

    return Contestant("bare CLIP vision tower", model, call, "the floor: half the resolution, as inside AlignZeg")


def _clipseg(tower: str) -> Contestant:
    vision = AlignZegConfig(**TOWERS[tower]).to_dict()["vision_config"]
    side = CLIPSEG_SIZE // vision["patch_size"] * vision["patch_size"]
    config = CLIPSegConfig(
        vision_config={**vision, "image_size": side},
        text_config={"hidden_size": 512},
        extract_layers=[vision["num_hidden_layers"] * part // 4 for part in (1, 2, 3)],
    )
    model = CLIPSegForImageSegmentation(config).eval()
    model.clip.requires_grad_(False)  # as in its original training

    def call(images, classes):
        small = F.interpolate(images, size=(side, side), mode="bilinear")
        prompts = random_prototypes(classes, config.projection_dim).to(images)
        return [
            model(pixel_values=image.expand(len(part), -1, -1, -1), conditional_embeddings=part).logits
            for image in small
            for part in prompts.split(PROMPTS_AT_ONCE)
        ]

    return Contestant("CLIPSeg", model, call, f"{side} px, one pass for each class, text embeddings given")


def _groupvit(tower: str) -> Contestant:
    model = GroupViTModel(GroupViTConfig()).eval()

    def call(images, classes):
        small = F.interpolate(images, size=(GROUPVIT_SIZE, GROUPVIT_SIZE), mode="bilinear")
        ids = torch.full((classes, 8), 49407, device=images.device)
        ids[:, 1] = torch.arange(classes, device=images.device)
        return model(pixel_values=small, input_ids=ids, output_segmentation=True)

    note = f"{GROUPVIT_SIZE} px, ViT-S/16, encodes its class names in every call"
    return Contestant("GroupViT", model, call, note)


def _mask2former(tower: str, depth: int = 6, title: str = "Mask2Former, Swin-T") -> Contestant:
    backbone = SwinConfig(
        image_size=640,
        embed_dim=96,
        depths=[2, 2, depth, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=171)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    return Contestant(title, model, lambda images, classes: model(images), "a closed vocabulary")


def _mask2former_default(tower: str) -> Contestant:
    """Mask2Former with the depths of `Mask2FormerConfig()`'s backbone."""
    return _mask2former(tower, 18, "Mask2Former, Swin-S (transformers' default)")


def _eomt(tower: str) -> Contestant:
    config = EomtConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_blocks=3, num_queries=100, num_labels=171
    )
    model = EomtForUniversalSegmentation(config).eval()

    def call(images, classes):
        side = config.image_size
        return model(images if images.shape[-1] == side else F.interpolate(images, size=(side, side), mode="bilinear"))

    return Contestant("EoMT, ViT-B/16", model, call, "640 px, a closed vocabulary")


def _dense_cells(tower: str) -> Contestant:
    config = Dinov2WithRegistersConfig(image_size=518)
    model = Dinov2WithRegistersModel(config).eval().requires_grad_(False)
    first = 1 + config.num_register_tokens

    def call(images, classes):
        small = F.interpolate(images, size=(DENSE_SIZE, DENSE_SIZE), mode="bilinear")
        cells = F.normalize(model(small).last_hidden_state[:, first:], dim=-1)
        return cells @ random_prototypes(classes, config.hidden_size).to(images).T

    note = f"{DENSE_SIZE} px, cosine of patches and given text embeddings, as in Talk2DINO"
    return Contestant("dense cells of DINOv2, ViT-B/14", model, call, note)


def _sam3(tower: str) -> Contestant:
    config = Sam3Config()
    model = Sam3Model(config).eval().requires_grad_(False)

    def call(images, classes):
        large = F.interpolate(images, size=(SAM3_SIZE, SAM3_SIZE), mode="bilinear")
        vision = model.get_vision_features(large)
        texts = random_prototypes(classes * SAM3_TOKENS, config.detr_encoder_config.hidden_size).to(images)
        return [
            model(vision_embeds=vision, text_embeds=BaseModelOutputWithPooling(pooler_output=text)).pred_masks
            for text in texts.view(classes, 1, SAM3_TOKENS, -1).expand(-1, len(images), -1, -1)
        ]

    return Contestant("SAM 3", model, call, f"{SAM3_SIZE} px, one pass of its detector for each class, prompts given")


CONTESTANTS: dict[str, Callable[[str], Contestant]] = {
    "alignzeg": _alignzeg,
    "clip": _clip,
    "clipseg": _clipseg,
    "groupvit": _groupvit,
    "dense_cells": _dense_cells,
    "mask2former": _mask2former,
    "mask2former_default": _mask2former_default,
    "eomt": _eomt,
    "sam3": _sam3,
}
PEERS = tuple(name for name in CONTESTANTS if name != "sam3")  # which takes minutes with many classes
OPEN_VOCABULARY = ("alignzeg", "dense_cells", "groupvit", "clipseg", "sam3")


def build_contestant(name: str, tower: str = "ViT-B-16", device: torch.device | str = "cpu") -> Contestant:
    """One of `CONTESTANTS` with random weights, seeded."""
    torch.manual_seed(0)
    contestant = CONTESTANTS[name](tower)
    contestant.model.to(device)
    return contestant


# --- what they see ---------------------------------------------------------------------------------------------------


def sample_image(side: int, index: int = 0) -> Image.Image:
    """A synthetic scene of `side x side` pixels."""
    return Image.fromarray(draw_scene(0, "test", index, 128).image).resize((side, side), Image.Resampling.BICUBIC)


def sample_pixels(batch: int, side: int, device: torch.device | str = "cpu", dtype=torch.float32) -> torch.Tensor:
    """Synthetic scenes `(batch, 3, side, side)`, scaled to about unit variance."""
    images = np.stack([np.asarray(sample_image(side, index)) for index in range(batch)])
    return ((torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127.5) / 64).to(device, dtype)


def sample_labels(batch: int, side: int, classes: int, device: torch.device | str) -> dict[str, list[torch.Tensor]]:
    """Labels with twelve classes in blocks of 32 pixels per image, as arguments of AlignZeg's forward."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, min(12, classes), (batch, -(-side // 32), -(-side // 32)), generator=generator)
    maps = blocks.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :side, :side].to(device)
    present = [label.unique() for label in maps]
    return {
        "mask_labels": [label == names[:, None, None] for label, names in zip(maps, present)],
        "class_labels": present,
    }
