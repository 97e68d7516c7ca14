# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Loads the frozen parts of AlignZeg (image tower, text tower, projections) under their names in `AlignZegModel`.

They come from a CLIP, MetaCLIP 2 or SigLIP of transformers, from any open_clip model whose image tower is a plain ViT or a
convolutional network of timm (ConvNeXt and others), from `scripts/pretrain_lit.py`, or from another AlignZeg checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from huggingface_hub.errors import StrictDataclassError
from open_clip.constants import HF_CONFIG_NAME
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modeling_alignzeg import AlignZegConfig, AlignZegImageProcessor, AlignZegModel, AlignZegProcessor

from .checkpoints import check_config_names, load_checkpoint
from .clip_conversion import (
    FOLDER,
    HUB,
    Source,
    clip_text_config,
    clip_tokenizer_from_open_clip,
    convert_text_weights,
    load_clip,
    load_weights,
    look_up,
    transformers_kind,
)


FROZEN = ("recognizer.vision_model.", "recognizer.visual_projection.", "text_encoder.", "logit_scale")
CONFIG = (
    "vision_config",
    "text_config",
    "projection_dim",
    "visual_projection",
    "projection_hidden_dim",
    "logit_scale_init_value",
)
LIT_WEIGHTS, LIT_INFO = "lit.safetensors", "lit.json"


class Towers(NamedTuple):
    """Frozen parts.

    Attributes:
        config: Fields of `AlignZegConfig` that describe the towers.
        weights: Weights by their names in `AlignZegModel`, including the logit scale.
        tokenizer: Tokenizer of the text tower.
        image_processor: Fields of `AlignZegImageProcessor`, at least `image_mean` and `image_std`.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerBase
    image_processor: dict[str, Any]


def load_towers(
    source: str, pretrained: str | None = None, *, random_weights: bool = False, cache_dir: str | None = None
) -> Towers:
    """Loads the frozen parts from `source`.

    Args:
        source: A folder that `scripts/pretrain_lit.py` wrote; an AlignZeg checkpoint, without its trained parts; or a
            source of [`load_clip`]. open_clip models, by name or in a repository, may also have a convolutional image
            tower, such as `"convnext_base_w"`.
        pretrained: Weights for an open_clip model name, see [`clip_from_open_clip`].
        random_weights: Initialise an open_clip model randomly. For tests of size and speed: a model on random towers
            learns nothing that transfers to unseen classes.
        cache_dir: Folder for downloads.

    Raises:
        ValueError: there is no such model, it cannot be converted, or neither weights nor `random_weights` are given.
    """
    kind, found = check_source(source, pretrained, random_weights=random_weights, cache_dir=cache_dir)
    if kind == "timm" and found is not None:
        weights = None if found.fetch is None else load_weights(Path(found.fetch()))
        return timm_towers(found.cfg, found.normalization, weights)
    if kind == "lit":
        return lit_towers(Path(source))
    if kind == "alignzeg":
        return alignzeg_towers(source)
    return clip_towers(*load_clip(source, pretrained, cache_dir=cache_dir))


def check_source(
    source: str, pretrained: str | None = None, *, random_weights: bool = False, cache_dir: str | None = None
) -> tuple[str, Source | None]:
    """Checks the arguments of [`load_towers`] without reading weights; downloads at most a config.

    Returns:
        The kind of the source, `"timm"`, `"open_clip"`, `"lit"`, `"alignzeg"` or a model type of transformers; and for a
        model of open_clip, its config and weights.

    Raises:
        ValueError: as [`load_towers`].
    """
    is_named = source.replace("/", "-") in open_clip.list_models()
    if not is_named and (Path(source) / HF_CONFIG_NAME).is_file():
        source = FOLDER + source
    is_repository = source.startswith((HUB, FOLDER))
    if random_weights and pretrained is not None:
        raise ValueError(f"`random_weights` is set, and `pretrained` is {pretrained!r}: leave one of them out.")
    if is_named and pretrained is None and not random_weights:
        tags = open_clip.list_pretrained_tags_by_model(source.replace("/", "-"))
        raise ValueError(
            f"`pretrained` is missing for the open_clip model {source!r}: choose one of its weights "
            f"({', '.join(tags) or 'a file, as it has no tags'}), or set `random_weights`."
        )
    if is_named or is_repository:
        found = look_up(source, pretrained, cache_dir)
        if is_repository and random_weights:
            raise ValueError(
                f"`random_weights` is set, but {source!r} includes its weights: leave `random_weights` out."
            )
        if "timm_model_name" not in found.cfg["vision_cfg"]:
            return "open_clip", found
        check_timm_tower(found.cfg["vision_cfg"])
        return "timm", found
    if (Path(source) / LIT_INFO).is_file():
        kind = "lit"
    else:
        kind = transformers_kind(source, cache_dir, more=("alignzeg",))
    if random_weights or pretrained is not None:
        name = "random_weights" if random_weights else "pretrained"
        raise ValueError(f"`{name}` is set, but {source!r} includes its weights: leave `{name}` out.")
    return kind, None


def layers_of_vit(depth: int) -> dict[str, Any]:
    """Split layer and fusion layers of a ViT with `depth` layers, scaled from the usual ones for 12."""
    split_layer = max(1, depth * 3 // 4)
    return {"clip_split_layer": split_layer, "fusion_layers": sorted({split_layer * step // 3 for step in range(4)})}


def clip_towers(clip: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, normalization: dict[str, Any]) -> Towers:
    """Those of a `CLIPModel`, `MetaClip2Model` or `SiglipModel`."""
    vision, text, is_siglip = clip.config.vision_config, clip.config.text_config, clip.config.model_type == "siglip"
    config = {
        **layers_of_vit(vision.num_hidden_layers),
        # MetaCLIP 2 has CLIP's image tower.
        "vision_config": {**vision.to_dict(), "model_type": vision.model_type if is_siglip else "clip_vision_model"},
        "text_config": text.to_dict(),
        "projection_dim": text.projection_size if is_siglip else clip.config.projection_dim,
        "visual_projection": "identity" if is_siglip else "linear",
        "logit_scale_init_value": float(clip.logit_scale.detach()),
    }
    places = {
        "vision_model.": "recognizer.vision_model.",
        "visual_projection.": "recognizer.visual_projection.linear.",
        "text_model.": "text_encoder.text_model.",
        "text_projection.": "text_encoder.text_projection.",
        "logit_scale": "logit_scale",
    }
    weights = {
        name + key.removeprefix(prefix): value.squeeze() if key == "logit_scale" else value  # (1,) in SigLIP
        for key, value in clip.state_dict().items()
        for prefix, name in places.items()
        if key.startswith(prefix)
    }
    return Towers(config, weights, tokenizer, dict(normalization))


def alignzeg_towers(source: str) -> Towers:
    """Frozen parts of an AlignZeg checkpoint."""
    model, processor = load_checkpoint(source, "model.clip")
    values, fields = model.config.to_dict(), processor.image_processor.to_dict()
    weights = {key: value for key, value in model.state_dict().items() if key.startswith(FROZEN)}
    kept = ("image_mean", "image_std", "resample", "size")
    layers = {} if model.config.is_convolutional else layers_of_vit(model.config.vision_config.num_hidden_layers)
    config = {**layers, **{name: values[name] for name in CONFIG}}
    return Towers(config, weights, processor.tokenizer, {name: fields[name] for name in kept})


def lit_towers(folder: Path) -> Towers:
    """Frozen parts from `scripts/pretrain_lit.py`: a timm image tower, a linear layer plus MLP, and a small text tower."""
    info = json.loads((folder / LIT_INFO).read_text(encoding="utf-8"))
    config = {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": info["architecture"],
            "model_args": {"bn_eps": info["batch_norm_eps"]},
        },
        "text_config": info["text_config"],
        "projection_dim": info["projection"]["output_size"],
        "visual_projection": "linear+mlp",
        "projection_hidden_dim": info["projection"]["hidden_size"],
        "logit_scale_init_value": math.log(info["tau"]),
        "clip_input_scale": 1.0,
        "fusion_layers": [1, 2, 3, 4],
    }
    places = {
        "tower.": "recognizer.vision_model.timm_model.",
        "projection.": "recognizer.visual_projection.",
        "text_": "text_encoder.text_",
        "logit_scale": "logit_scale",
    }
    weights = {
        name + key.removeprefix(prefix): value.float() if value.is_floating_point() else value
        for key, value in load_file(folder / LIT_WEIGHTS).items()
        for prefix, name in places.items()
        if key.startswith(prefix)
    }
    normalization = {"image_mean": info["image_mean"], "image_std": info["image_std"]}
    return Towers(config, weights, CLIPTokenizer.from_pretrained(folder), normalization)


def check_timm_tower(vision: Mapping[str, Any]) -> None:
    """
    Args:
        vision: The `vision_cfg` of an open_clip model with an image tower of timm.

    Raises:
        ValueError: the tower is known not to be convolutional, or has a head that cannot be converted.
    """
    kind, pool = vision.get("timm_proj", "linear"), vision.get("timm_pool", "avg")
    if pool in ("token", "map"):
        advice = "Choose one of open_clip's plain ViTs or a ConvNeXt."
        if pool == "map":
            advice = "Load SigLIP from transformers, for example 'google/siglip2-base-patch16-224'."
        raise ValueError(
            f"timm's image tower {vision['timm_model_name']!r} of the open_clip model is a transformer (as in EVA and "
            f"SigLIP); expected a convolutional one. {advice}"
        )
    if kind not in ("linear", "mlp") or vision.get("timm_proj_bias") or pool not in ("", "avg"):
        raise ValueError(
            f"The open_clip model has the image projection {kind!r} and pooling {pool!r}; expected a linear or mlp "
            "projection without bias, after average pooling."
        )


def timm_towers(cfg: Mapping[str, Any], normalization: dict[str, Any], weights: dict[str, Tensor] | None) -> Towers:
    """Frozen parts of an open_clip model with a convolutional timm image tower.

    Args:
        cfg: open_clip's model config.
        normalization: `image_mean` and `image_std`.
        weights: open_clip's weights; `None` initialises them randomly.

    Raises:
        ValueError: the text tower cannot be converted.
    """
    vision, dim, kind = cfg["vision_cfg"], cfg["embed_dim"], cfg["vision_cfg"].get("timm_proj", "linear")
    text_config = clip_text_config(cfg)
    tokenizer = clip_tokenizer_from_open_clip(text_config.max_position_embeddings)
    config = {
        "vision_config": {"model_type": "timm_wrapper", "architecture": vision["timm_model_name"]},
        "text_config": {**text_config.to_dict(), "projection_dim": dim},
        "projection_dim": dim,
        "visual_projection": kind,
        "projection_hidden_dim": 2 * dim if kind == "mlp" else 0,
        "logit_scale_init_value": float(cfg.get("init_logit_scale", CLIPConfig.logit_scale_init_value)),
        "clip_input_scale": 1.0,
        "fusion_layers": [0, 1, 2, 3],
    }
    if weights is None:
        return Towers(config, {}, tokenizer, dict(normalization))
    converted = {"logit_scale": weights["logit_scale"].squeeze()}
    heads = {
        "visual.head.proj.weight": "linear.weight",
        "visual.head.mlp.fc1.weight": "mlp.layers.0.weight",
        "visual.head.mlp.fc1.bias": "mlp.layers.0.bias",
        "visual.head.mlp.fc2.weight": "mlp.layers.1.weight",
    }
    for key, value in weights.items():
        if key.startswith("visual.trunk."):
            converted[f"recognizer.vision_model.timm_model.{key.removeprefix('visual.trunk.')}"] = value
        elif key in heads:
            converted[f"recognizer.visual_projection.{heads[key]}"] = value
    if kind == "mlp":
        converted["recognizer.visual_projection.mlp.layers.1.bias"] = torch.zeros(dim)
    converted |= {
        f"text_encoder.{key}": value for key, value in convert_text_weights(weights, text_config, dim).items()
    }
    return Towers(config, converted, tokenizer, dict(normalization))


def assemble(
    towers: Towers,
    *,
    seed: int = 0,
    config: dict[str, Any] | None = None,
    image_processor: dict[str, Any] | None = None,
) -> tuple[AlignZegModel, AlignZegProcessor]:
    """An untrained AlignZeg on copies of frozen towers.

    Args:
        towers: From [`load_towers`].
        seed: Seed of the trainable parts.
        config: Overrides of [`AlignZegConfig`].
        image_processor: Overrides of [`AlignZegImageProcessor`].

    Raises:
        ValueError: `config` contains a field that `AlignZegConfig` does not have or that describes the towers, or its
            values contradict the towers.
    """
    overrides = dict(config or {})
    check_config_names(overrides, "model.config")
    if described := [name for name in overrides if name in CONFIG]:
        raise ValueError(
            f"`model.config` contains {described[0]!r}, which the image and text towers determine: leave it out."
        )
    try:
        model = fresh_model(towers, overrides, seed)
    except StrictDataclassError as error:
        raise ValueError(f"`model.config` is invalid. {error}") from error
    options = {"size_divisor": model.config.size_divisor, **towers.image_processor, **(image_processor or {})}
    processor = AlignZegProcessor(
        image_processor=AlignZegImageProcessor(**options),
        tokenizer=towers.tokenizer,
        template_set=model.config.template_set,
    )
    return model, processor


def fresh_model(towers: Towers, config: dict[str, Any], seed: int) -> AlignZegModel:
    """An AlignZeg on `towers`, with trainable parts initialised from `seed` and further config fields in `config`.

    Raises:
        ValueError: a weight is missing or has the wrong shape.
    """
    full = AlignZegConfig(**{**towers.config, **config})
    torch.manual_seed(seed)
    model = AlignZegModel(full)
    if not towers.weights:
        return model.eval()
    expected = {key: value for key, value in model.state_dict().items() if key.startswith(FROZEN)}
    for key, value in expected.items():
        came = towers.weights.get(key)
        if came is None or came.shape != value.shape:
            shape = "missing" if came is None else f"of shape {tuple(came.shape)}"
            raise ValueError(
                f"The weight {key!r} is {shape}; expected {tuple(value.shape)}. The towers do not match each other."
            )
    model.load_state_dict({key: towers.weights[key] for key in expected}, strict=False)
    return model.eval()
