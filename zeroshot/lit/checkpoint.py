# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Files of a trained LiT: weights, hyper-parameters and results, and tokenizer."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTokenizer

from .photos import IMAGE_MEAN, IMAGE_STD
from .projection import TAU, Projection
from .text import TextTower
from .tower import BATCH_NORM_EPS, create_tower


WEIGHTS, NUMBERS = "lit.safetensors", "lit.json"
_TEXT_CONFIG = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads projection_dim "
    "max_position_embeddings bos_token_id eos_token_id pad_token_id hidden_act layer_norm_eps"
).split()


@dataclass
class LiT:
    """A trained LiT; `tower` has no classifier."""

    tower: nn.Module
    projection: Projection
    text: TextTower
    tokenizer: CLIPTokenizer

    @torch.inference_mode()
    def embed_cells(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalized pixels `(batch, 3, height, width)` to unit vectors of cells `(batch, rows, columns, 384)`."""
        return self.projection(self.tower.forward_features(pixels).permute(0, 2, 3, 1))


def state_dict(lit: LiT) -> dict[str, torch.Tensor]:
    """All weights under their names in the file; matrices and kernels as float16, the rest unchanged."""
    tensors = {f"tower.{key}": value for key, value in lit.tower.state_dict().items() if "classifier" not in key}
    tensors |= {f"projection.{key}": value for key, value in lit.projection.state_dict().items()}
    tensors |= lit.text.state_dict()
    tensors["logit_scale"] = torch.tensor(math.log(TAU))
    return {
        key: (value.half() if value.is_floating_point() and value.ndim >= 2 else value).contiguous()
        for key, value in tensors.items()
    }


def save_lit(folder: Path, lit: LiT, architecture: str, resolution: int, measured: dict) -> None:
    """Writes weights, JSON and tokenizer under temporary names and renames each file when it is complete.

    Args:
        folder: folder to write to; created if missing.
        lit: the trained LiT.
        architecture: timm's name of the tower.
        resolution: short side of a photograph in pixels.
        measured: results, as JSON values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lit.tokenizer.save_pretrained(folder)
    save_file(state_dict(lit), folder / f"{WEIGHTS}.partial", metadata={"format": "pt"})
    config = lit.text.text_model.config
    info = {
        "architecture": architecture,
        "batch_norm_eps": BATCH_NORM_EPS,
        "image_mean": [IMAGE_MEAN] * 3,
        "image_std": [IMAGE_STD] * 3,
        "resolution": resolution,
        "text_config": {name: getattr(config, name) for name in _TEXT_CONFIG},
        "projection": {
            "input_size": lit.projection.linear.in_features,
            "hidden_size": lit.projection.mlp.layers[0].out_features,
            "output_size": lit.projection.linear.out_features,
        },
        "tau": TAU,
        "measured": measured,
    }
    (folder / f"{NUMBERS}.partial").write_text(json.dumps(info, indent=2) + "\n")
    for name in (WEIGHTS, NUMBERS):
        os.replace(folder / f"{name}.partial", folder / name)


def load_lit(folder: str | Path) -> LiT:
    """Loads the output of [`save_lit`], in float32 and evaluation mode.

    Raises:
        FileNotFoundError: the folder has no such files.
    """
    folder = Path(folder)
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"`folder` is {str(folder)!r}, which has no {WEIGHTS}; expected the output of scripts/pretrain_lit.py."
        )
    info = json.loads((folder / NUMBERS).read_text())
    tensors = {key: v.float() if v.is_floating_point() else v for key, v in load_file(folder / WEIGHTS).items()}
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    tower = create_tower(info["architecture"])
    tower.classifier = nn.Identity()
    tower.load_state_dict(part("tower."))
    projection = Projection(**info["projection"])
    projection.load_state_dict(part("projection."))
    text = TextTower(CLIPTextConfig(**info["text_config"]))
    text.load_state_dict({key: value for key, value in tensors.items() if key.startswith("text_")})
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    return LiT(tower.requires_grad_(False), projection.eval(), text.eval(), tokenizer)
