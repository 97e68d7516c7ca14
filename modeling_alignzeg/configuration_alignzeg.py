# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Configuration of AlignZeg: the defaults of the model. Those of post-processing are in image_processing_alignzeg.py."""

import difflib
import math
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict, validated_field
from transformers import (
    AutoConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    MetaClip2TextConfig,
    PreTrainedConfig,
    SiglipTextConfig,
    SiglipVisionConfig,
    TimmWrapperConfig,
)


# Supported tower configs, by config field and `model_type`; the first is the default.
TOWERS: dict[str, dict[str, type[PreTrainedConfig]]] = {
    "vision_config": {
        config.model_type: config for config in (CLIPVisionConfig, SiglipVisionConfig, TimmWrapperConfig)
    },
    "text_config": {config.model_type: config for config in (CLIPTextConfig, MetaClip2TextConfig, SiglipTextConfig)},
}


def tower_config(name: str, value: Any, projection_dim: int) -> PreTrainedConfig:
    """The tower's config for the field `name`; in a dict, `model_type` selects the class (default: the first).

    Raises:
        ValueError: there is no such tower.
    """
    towers = TOWERS[name]
    values = {"model_type": next(iter(towers)), **value} if isinstance(value, dict) else None
    kind = getattr(value, "model_type", None) if values is None else values.pop("model_type")
    if kind not in towers:
        raise ValueError(f"`{name}` has `model_type` {kind!r}; expected one of {', '.join(towers)}.")
    if values is None:
        return value
    for width in ("projection_dim", "projection_size"):
        if hasattr(towers[kind], width):
            values.setdefault(width, projection_dim)
    return towers[kind](**values)


def between(low: float, high: float = math.inf) -> Callable[[Any], None]:
    """A validator of finite numbers from `low` to `high`."""

    def validate(value: Any) -> None:
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            expected = f"{low} or more" if high == math.inf else f"a number from {low} to {high}"
            raise ValueError(f"got {value}; use {expected}.")

    return validate


def count(default: int | None, low: int = 1) -> Any:
    return validated_field(between(low), default=default)


def weight(default: float, high: float = math.inf) -> Any:
    return validated_field(between(0, high), default=default)


@strict
class AlignZegConfig(PreTrainedConfig):
    r"""
    Configuration of an [`AlignZegModel`].

    The defaults are the full-size model: CLIP ViT-B/16 at 320 pixels for an input of 640, a side network of SAN's width
    and 100 queries. There is no official code of the paper (arXiv 2404.05667), and its hyper-parameters are not
    known to us; missing details are *reconstructed* here. `docs/experiments.md` gives reasons for some defaults.

    Args:
        vision_config (`dict` or config, *optional*): Frozen image tower: a `CLIPVisionConfig` (default: ViT-B/16), a
            `SiglipVisionConfig` or, for convolutional towers, a `TimmWrapperConfig`. In a dict, `model_type` selects the
            class.
        text_config (`dict` or config, *optional*): Frozen text tower: a `CLIPTextConfig` (default: that of ViT-B/16), a
            `MetaClip2TextConfig` or a `SiglipTextConfig`.
        projection_dim (`int`, defaults to 512): Width `D` of the joint image-text space.
        visual_projection (`str`, defaults to `"linear"`): From the image tower into the joint space: `"linear"`; `"mlp"`, as
            in some of open_clip's ConvNeXt models; the sum of both, `"linear+mlp"`, as `scripts/pretrain_lit.py` trains; or
            `"identity"`, as in SigLIP, whose image tower ends in the joint space.
        projection_hidden_dim (`int`, defaults to 0): Hidden width of that MLP.
        logit_scale_init_value (`float`, defaults to 4.6052): Log of the logit scale `τ`, the inverse
            temperature (100 for OpenAI's weights).
        image_size (`int`, defaults to 640): Side of the training crops. Position embeddings are learned at this size and
            interpolated for others.
        clip_input_scale (`float`, defaults to 0.5): Resolution of the image tower's input relative to the side network's.
        clip_split_layer (`int`, *optional*, defaults to 9): Layers of CLIP's ViT before this index provide features; this
            layer and the later ones recognise proposals. Other towers ignore it.
        fusion_layers (`list[int]`, defaults to `[0, 3, 6, 9]`): Hidden states of the image tower that enter the side
            network, one before each of its first blocks. For a ViT, 0 is the patch embedding; for a convolutional tower
            they are its stages from 0.
        patch_size (`int`, defaults to 16): Stride of the side network's token grid.
        hidden_size (`int`, defaults to 240): Width `d` of the side network.
        num_hidden_layers (`int`, defaults to 2): Self-attention layers of its image encoder.
        num_attention_heads (`int`, defaults to 6): Attention heads of the side network.
        sequence_reduction_ratio (`int`, defaults to 2): Keys and values of those self-attention layers are means over
            blocks of this many tokens per side; 1 disables the reduction.
        intermediate_size (`int`, defaults to 480): Width of its feed-forward layers.
        mask_stride (`int`, defaults to 4): Stride of the predicted masks; a power-of-two fraction of `patch_size`.
        mask_dim (`int`, defaults to 64): Channels of the mask features.
        num_queries (`int`, defaults to 100): Mask queries `N`, each of which proposes a region.
        unclaimed_proposal (`bool`, defaults to `True`): Add one more proposal, the region that no query claims: its mask
            is the complement of all others, it counts as unseen where any class does, and no loss reads it.
        num_refinement_layers (`int`, defaults to 3): MRPE layers `L_r`.
        mutual_refinement (`bool`, defaults to `True`): MRPE's second direction, queries refine features.
        attention_bias_dim (`int`, defaults to 32): Channels per head of the attention bias that proposals use in
            CLIP's ViT.
        adapter_dim (`int`, defaults to 256): Hidden width of the residual adapter on proposal embeddings.
        query_fusion (`bool`, defaults to `True`): Feed the adapter the refined mask query as well as the frozen embedding.
        feature_expansion (`bool`, defaults to `True`): GEPC's feature expansion strategy (FES): virtual features.
        feature_expansion_target (`str`, defaults to `"frozen"`): Training target of a virtual feature: `"frozen"`, the
            feature before the adapter; `"semantic"`, its own virtual prototype; `"reserve"`, the background.
        background_diversity (`bool`, defaults to `True`): GEPC's background diversity strategy (BDS). Without it, there is
            one background prototype and no regularizer.
        num_background_prototypes (`int`, defaults to 8): Number of background prototypes `K` with BDS.
        bias_correction (`bool`, defaults to `True`): PBC, the class indicator `φ_bc`.
        indicator_dim (`int`, defaults to 64): Hidden width of the indicator.
        indicator_evidence (`list[str]`, *optional*): What the indicator reads, some of `"frozen"`, `"adapted"` and, with a
            convolutional tower, `"cells"`; see `AlignZegClassIndicator`. Default: `["cells"]` with a
            convolutional tower, `["frozen", "adapted"]` with a ViT.
        held_out_fraction (`float`, defaults to 0.25): Share of the seen classes treated as unseen in every
            training step.
        class_weight, mask_weight, dice_weight (`float`, default to 2.0, 5.0, 5.0): Weights of the class, mask
            cross-entropy and dice terms, in matching and in the objective.
        no_object_weight (`float`, defaults to 0.1): Weight of unmatched proposals in the class term.
        virtual_weight, diversity_weight, indicator_weight (`float`, default to 1.0): Weights of `L_vir`, `L_reg`, `L_bc`.
        unlabelled_weight (`float`, defaults to 0.0): Weight of the mask loss on unlabelled segments, connected unlabelled
            regions that proposals without a class are trained to cover. 0 disables it.
        cell_weight (`float`, defaults to 1.0): Weight of the loss on a convolutional tower's own cells.
        train_num_points (`int`, *optional*, defaults to 12544): Points per mask in matching and mask loss; `None`
            uses every cell of the mask grid.
        template_set (`str`, defaults to `"vild"`): Prompt templates of the stored vocabulary.
        prototypes_per_class (`int`, defaults to 1): Prototypes per class in the stored vocabulary; the nearest one counts.
            `set_vocabulary` sets it.
        unseen_labels (`list[str]`, *optional*): Class names in `id2label` that count as unseen.

    Raises:
        StrictDataclassError: a value has the wrong type or is out of range, or two values contradict each other; the
            message names the fields. A misspelt field causes a warning.
    """

    model_type = "alignzeg"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projection_dim: int = count(512)
    visual_projection: Literal["linear", "mlp", "linear+mlp", "identity"] = "linear"
    projection_hidden_dim: int = count(0, low=0)
    logit_scale_init_value: float | int = math.log(100)

    image_size: int = count(640)
    clip_input_scale: float | int = weight(0.5)
    clip_split_layer: int | None = 9
    fusion_layers: list[int] | tuple[int, ...] = (0, 3, 6, 9)
    patch_size: int = count(16)
    hidden_size: int = count(240)
    num_hidden_layers: int = count(2, low=0)
    num_attention_heads: int = count(6)
    sequence_reduction_ratio: int = count(2)
    intermediate_size: int = count(480)
    mask_stride: int = count(4)
    mask_dim: int = count(64)
    num_queries: int = count(100)
    unclaimed_proposal: bool = True
    num_refinement_layers: int = count(3)
    mutual_refinement: bool = True
    attention_bias_dim: int = count(32)

    adapter_dim: int = count(256)
    query_fusion: bool = True
    feature_expansion: bool = True
    feature_expansion_target: Literal["frozen", "semantic", "reserve"] = "frozen"
    background_diversity: bool = True
    num_background_prototypes: int = count(8)
    bias_correction: bool = True
    indicator_dim: int = count(64)
    indicator_evidence: list[str] | tuple[str, ...] | None = None
    held_out_fraction: float = weight(0.25, 1)

    class_weight: float | int = weight(2.0)
    mask_weight: float | int = weight(5.0)
    dice_weight: float | int = weight(5.0)
    no_object_weight: float | int = weight(0.1)
    virtual_weight: float | int = weight(1.0)
    diversity_weight: float | int = weight(1.0)
    indicator_weight: float | int = weight(1.0)
    unlabelled_weight: float | int = weight(0.0)
    cell_weight: float | int = weight(1.0)
    train_num_points: int | None = count(12544)

    prototypes_per_class: int = count(1)
    template_set: Literal["single", "vild", "imagenet"] = "vild"
    unseen_labels: list[str] | None = None

    def __post_init__(self, **kwargs):
        if self.vision_config is None:
            self.vision_config = {"image_size": 224, "patch_size": 16}
        self.vision_config = tower_config("vision_config", self.vision_config, self.projection_dim)
        self.text_config = tower_config("text_config", self.text_config or {}, self.projection_dim)
        self.fusion_layers = list(self.fusion_layers)
        if self.indicator_evidence is None:
            self.indicator_evidence = ["cells"] if self.is_convolutional else ["frozen", "adapted"]
        self.indicator_evidence = list(self.indicator_evidence)
        self.unseen_labels = list(self.unseen_labels or [])
        names = [field.name for field in fields(self)]
        for name in kwargs.keys() - set(dir(PreTrainedConfig)):
            if close := difflib.get_close_matches(name, names, 1, cutoff=0.85):
                message = f"`{name}` is not a field of AlignZegConfig, but `{close[0]}` is; correct the name."
                warnings.warn(message, stacklevel=4)
        super().__post_init__(**kwargs)
        self.id2label = {key: self.id2label[key] for key in sorted(self.id2label)}
        labels = list(self.id2label.values())
        if all(
            name == f"LABEL_{index}" for index, name in enumerate(labels)
        ):  # no vocabulary, or another `num_labels`
            self.unseen_labels = []

    @property
    def is_convolutional(self) -> bool:
        """Whether the image tower is convolutional; otherwise it is a ViT."""
        return self.vision_config.model_type == "timm_wrapper"

    @property
    def clip_stride(self) -> int:
        """Input pixels per side of a cell of the image tower's last grid. Convolutional towers end at 1/32."""
        return round((32 if self.is_convolutional else self.vision_config.patch_size) / self.clip_input_scale)

    @property
    def size_divisor(self) -> int:
        """Inputs are padded to a multiple of this, so that both token grids divide the image."""
        return math.lcm(self.patch_size, self.clip_stride)

    @classmethod
    def _dict_from_json_file(cls, json_file):
        values = super()._dict_from_json_file(json_file)
        if not isinstance(values, dict):
            raise OSError(
                f"'{json_file}' contains {str(values)[:40]}; expected a JSON object with AlignZegConfig's fields."
            )
        return values

    def validate_architecture(self) -> None:
        """Checks fields that must be consistent with each other."""
        blocks = self.num_hidden_layers + self.num_refinement_layers
        ratio = self.patch_size / self.mask_stride
        stride = (32 if self.is_convolutional else self.vision_config.patch_size) / max(self.clip_input_scale, 1e-6)
        width = getattr(self.vision_config, "hidden_size", None)
        text_width = getattr(self.text_config, "projection_size", self.projection_dim)
        kinds = {"frozen", "adapted", "cells"} if self.is_convolutional else {"frozen", "adapted"}
        checks = {
            f"`fusion_layers` has {len(self.fusion_layers)} entries, but one enters before each of the {blocks} blocks "
            "(`num_hidden_layers` + `num_refinement_layers`): drop some or add blocks.": len(self.fusion_layers)
            <= blocks,
            f"`fusion_layers` is {self.fusion_layers}; expected non-negative layers.": min(
                self.fusion_layers, default=0
            )
            >= 0,
            f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
            f"({self.num_attention_heads}).": self.hidden_size % self.num_attention_heads == 0,
            f"`mask_stride` is {self.mask_stride}; `patch_size` ({self.patch_size}) must be `mask_stride` times a power of "
            "two.": ratio >= 1 and math.log2(ratio).is_integer(),
            f"`clip_input_scale` is {self.clip_input_scale}; a cell of the image tower must cover a whole number of input "
            "pixels (0.5 and 1.0 always do).": self.clip_input_scale > 0 and abs(stride - round(stride)) < 1e-6,
            f"`projection_hidden_dim` is {self.projection_hidden_dim} with the `visual_projection` "
            f"{self.visual_projection!r}; an MLP needs a width of at least 1.": "mlp" not in self.visual_projection
            or self.projection_hidden_dim > 0,
            f"`visual_projection` is 'identity', but the image tower's `hidden_size` ({width}) is not `projection_dim` "
            f"({self.projection_dim}): name a projection.": self.visual_projection != "identity"
            or width == self.projection_dim,
            f"`text_config` has the `projection_size` {text_width}; expected `projection_dim` ({self.projection_dim}), as "
            "both towers end in the joint space.": text_width == self.projection_dim,
            f"`indicator_evidence` is {self.indicator_evidence}; expected at least one of 'frozen', 'adapted' and, with a "
            "convolutional tower, 'cells', each once.": 0
            < len(kinds.intersection(self.indicator_evidence))
            == len(self.indicator_evidence),
            f"`held_out_fraction` is {self.held_out_fraction}; use a share of the seen classes above 0 and below 1.": 0
            < self.held_out_fraction
            < 1,
        }
        if self.vision_config.model_type == "clip_vision_model":
            depth, split = self.vision_config.num_hidden_layers, self.clip_split_layer or 0
            checks[
                f"`clip_split_layer` is {self.clip_split_layer}; expected 1..{depth - 1}: layers before it provide "
                "features, the others recognise proposals."
            ] = 0 < split < depth
            checks[
                f"`fusion_layers` is {self.fusion_layers}; expected layers below {depth}: the last layer of the image tower "
                "only recognises proposals."
            ] = max(self.fusion_layers, default=0) < depth
        for message, holds in checks.items():
            if not holds:
                raise ValueError(message)

    def validate_labels(self) -> None:
        """Checks `id2label` and `unseen_labels`."""
        for index, (key, name) in enumerate(self.id2label.items()):
            if int(key) != index or not isinstance(name, str):
                raise ValueError(
                    f"`id2label` maps {key!r} to {name!r} at position {index}; expected a dict from the ids 0, 1, 2, … to "
                    'names, such as {0: "grass", 1: "water"}.'
                )
        unknown = [name for name in self.unseen_labels if name not in self.id2label.values()]
        if unknown:
            raise ValueError(
                f"`unseen_labels` contains {unknown[0]!r}, which is not one of the {len(self.id2label)} names in "
                "`id2label`; a misspelt class would count as seen."
            )


AlignZegConfig.register_for_auto_class()

__all__ = ["AlignZegConfig"]
