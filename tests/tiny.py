# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The smallest AlignZeg with all parts: models, processors and checkpoints for the tests, created in milliseconds."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import CLIPTokenizer

from modeling_alignzeg import TEMPLATE_SETS, AlignZegConfig, AlignZegImageProcessor, AlignZegModel, AlignZegProcessor
from zeroshot.checkpoints import save_checkpoint
from zeroshot.data.scenes import draw_scene
from zeroshot.tokenization import build_tokenizer


CLASSES = ("red striped", "blue dotted", "grass", "brick")
UNSEEN = ("blue dotted",)
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}


@cache
def tiny_tokenizer() -> CLIPTokenizer:
    """A tokenizer with one token per word of `CLASSES` and of the single template; other words are spelled."""
    return build_tokenizer([TEMPLATE_SETS["single"][0].format(name) for name in CLASSES], model_max_length=32)


def tiny_config(**overrides: Any) -> AlignZegConfig:
    """CLIP of width 32 with two layers per tower, a side network of width 32; classes are `CLASSES`."""
    tokenizer = tiny_tokenizer()
    values = {
        "vision_config": {**TOWER, "image_size": 16, "patch_size": 8},
        "text_config": {
            **TOWER,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": tokenizer.model_max_length,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        "projection_dim": 24,
        "logit_scale_init_value": 2.0,
        "image_size": 32,
        "clip_split_layer": 1,
        "fusion_layers": [0, 1],
        "patch_size": 8,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "mask_dim": 16,
        "num_queries": 6,
        "num_refinement_layers": 2,
        "attention_bias_dim": 8,
        "adapter_dim": 16,
        "num_background_prototypes": 3,
        "indicator_dim": 8,
        "train_num_points": 64,
        "template_set": "single",
        "id2label": dict(enumerate(CLASSES)),
        "label2id": {name: index for index, name in enumerate(CLASSES)},
        "unseen_labels": list(UNSEEN),
    }
    return AlignZegConfig(**{**values, **overrides})


def tiny_model(seed: int = 0, **overrides: Any) -> AlignZegModel:
    """A model with weights initialised from `seed`, in evaluation mode; `overrides` are for the config."""
    torch.manual_seed(seed)
    return AlignZegModel(tiny_config(**overrides)).eval()


def tiny_processor(**overrides: Any) -> AlignZegProcessor:
    """A processor for `tiny_model`; `overrides` are for the image processor."""
    options = {"size": {"shortest_edge": 32, "longest_edge": 64}, "size_divisor": 16, **overrides}
    return AlignZegProcessor(AlignZegImageProcessor(**options), tiny_tokenizer(), template_set="single")


def tiny_checkpoint(
    folder: str | Path, seed: int = 0, processor: dict[str, Any] | None = None, **overrides: Any
) -> Path:
    """A folder for `from_pretrained`, with a vocabulary from the text tower; `overrides` are for the config, `processor` for
    the image processor."""
    model, processor = tiny_model(seed, **overrides), tiny_processor(**(processor or {}))
    model.set_vocabulary(list(CLASSES), list(UNSEEN), processor)
    return save_checkpoint(model, processor, folder)


def picture(index: int = 0, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A synthetic scene of `size` (width, height)."""
    return Image.fromarray(draw_scene(0, "test", index, 64).image).resize(size)


def plain_correction(logits: torch.Tensor, is_seen: torch.Tensor, gamma: float) -> torch.Tensor:
    """PBC on the logits `(C + 1,)` of one proposal that looks unseen, class by class: probabilities `(C + 1,)`."""
    *weights, last = (math.exp(value) for value in logits.tolist())
    background = last / (sum(weights) + last)
    lowered = [w * math.exp(-gamma) if seen else w for w, seen in zip(weights, is_seen.tolist())]
    return torch.tensor([*((1 - background) * w / sum(lowered) for w in lowered), background])
