# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Configuration of AlignZeg: the one place where a default lives."""

import difflib
import inspect
import math
import warnings
from typing import Any

from transformers import CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from .prompts_alignzeg import TEMPLATE_SETS


# Which values a field takes: whole numbers with their least, numbers with their least and largest.
WHOLE_NUMBERS = {
    "num_hidden_layers": 0,
    **dict.fromkeys(
        (
            "projection_dim image_size clip_split_layer patch_size num_channels hidden_size num_attention_heads "
            "sequence_reduction_ratio intermediate_size mask_stride mask_dim num_queries num_refinement_layers "
            "attention_bias_dim adapter_dim num_background_prototypes indicator_dim train_num_points"
        ).split(),
        1,
    ),
}
NUMBERS = {
    "logit_scale_init_value": (-math.inf, math.inf),
    "oversample_ratio": (1, math.inf),
    **dict.fromkeys(
        (
            "clip_input_scale layer_norm_eps initializer_range feature_expansion_alpha correction_gamma class_weight "
            "mask_weight dice_weight no_object_weight unlabelled_margin virtual_weight diversity_weight indicator_weight"
        ).split(),
        (0, math.inf),
    ),
    **dict.fromkeys(
        (
            "attention_dropout held_out_fraction correction_threshold ignored_query_threshold importance_sample_ratio"
        ).split(),
        (0, 1),
    ),
}
SWITCHES = (
    "unclaimed_proposal mutual_refinement mask_guided_attention query_fusion feature_expansion background_diversity "
    "bias_correction indicator_embedding use_auxiliary_loss"
).split()
CHOICES = {
    "hidden_act": tuple(ACT2FN),
    "feature_expansion_target": ("frozen", "semantic", "reserve"),
    "feature_expansion_location": ("before_adapter", "after_adapter"),
    "indicator_positives": ("held_out", "virtual", "both"),
    "unlabelled_pixels": ("exclude", "negative", "nearby"),
    "template_set": tuple(TEMPLATE_SETS),
}


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_id2label(id2label: Any) -> None:
    """
    Raises:
        ValueError: class names are not numbered 0, 1, 2, …, or one is no string.
    """
    hint = 'expected a dict from the ids 0, 1, 2, … to names, such as {0: "grass", 1: "water"}.'
    require(isinstance(id2label, dict), f"`id2label` is a {type(id2label).__name__}; {hint}")
    ids = {str(key) for key in id2label}
    for index in range(len(id2label)):
        require(str(index) in ids, f"`id2label` has {len(id2label)} entries and none for the id {index}; {hint}")
    for key, name in id2label.items():
        require(isinstance(name, str), f"`id2label[{key!r}]` is {name!r}; expected a name.")


class AlignZegConfig(PreTrainedConfig):
    r"""
    Configuration of an [`AlignZegModel`].

    The defaults are the full-size model: CLIP ViT-B/16 seeing 320 of 640 pixels, a side network of SAN's width and 100
    queries. The paper (arXiv 2404.05667) publishes neither code nor hyper-parameters; what it leaves open is
    *reconstructed* here, and `docs/experiments.md` records why each default is what it is.

    Args:
        vision_config (`dict` or [`CLIPVisionConfig`], *optional*): Frozen CLIP vision tower. Default: ViT-B/16.
        text_config (`dict` or [`CLIPTextConfig`], *optional*): Frozen CLIP text tower. Default: the one of ViT-B/16.
        projection_dim (`int`, defaults to 512): Width `D` of CLIP's joint image-text space.
        logit_scale_init_value (`float`, defaults to 4.6052): Log of the temperature `τ` (100 for OpenAI's weights).
        image_size (`int`, defaults to 640): Side of the training crops; position embeddings are learned for it and
            resampled for any other size.
        clip_input_scale (`float`, defaults to 0.5): Resolution of CLIP's input relative to the side network's.
        clip_split_layer (`int`, defaults to 9): CLIP layers before it give features, layers from it on recognise
            proposals.
        fusion_layers (`list[int]`, defaults to `[0, 3, 6, 9]`): CLIP hidden states that enter the side network, one
            before each of its first blocks (0 is the patch embedding).
        patch_size (`int`, defaults to 16): Stride of the side network's token grid.
        num_channels (`int`, defaults to 3): Colour channels.
        hidden_size (`int`, defaults to 240): Width `d` of the side network.
        num_hidden_layers (`int`, defaults to 2): Self-attention layers of its image encoder.
        num_attention_heads (`int`, defaults to 6): Attention heads of the side network.
        sequence_reduction_ratio (`int`, defaults to 2): Side of the blocks of tokens whose means are the keys and values of
            those self-attention layers; 1 for every token.
        intermediate_size (`int`, defaults to 480): Width of its feed-forward layers.
        hidden_act (`str`, defaults to `"gelu"`): Activation of its feed-forward layers.
        layer_norm_eps (`float`, defaults to 1e-5): Epsilon of its layer norms.
        attention_dropout (`float`, defaults to 0.0): Dropout on its attention weights.
        initializer_range (`float`, defaults to 0.02): Standard deviation of initial position embeddings; linear layers
            start from Xavier's.
        mask_stride (`int`, defaults to 4): Stride of the predicted masks; a power-of-two fraction of `patch_size`.
        mask_dim (`int`, defaults to 64): Channels of the mask features.
        num_queries (`int`, defaults to 100): Mask queries `N`, each of which proposes a region.
        unclaimed_proposal (`bool`, defaults to `True`): One more proposal takes what no query claims: its mask is the
            complement of all others, it counts as unseen where a class does, and no loss reads it.
        num_refinement_layers (`int`, defaults to 3): MRPE layers `L_r`.
        mutual_refinement (`bool`, defaults to `True`): MRPE's second direction, queries refine features.
        attention_bias_dim (`int`, defaults to 32): Channels per CLIP head of the predicted attention bias.
        mask_guided_attention (`bool`, defaults to `True`): The bias starts from the proposal's own mask.
        adapter_dim (`int`, defaults to 256): Hidden width of the residual adapter on proposal embeddings.
        query_fusion (`bool`, defaults to `True`): The adapter reads the refined mask query beside the frozen embedding.
        feature_expansion (`bool`, defaults to `True`): GEPC's feature expansion strategy (FES), virtual features.
        feature_expansion_target (`str`, defaults to `"frozen"`): What a virtual feature is trained towards:
            `"frozen"`, itself before the adapter; `"semantic"`, its own virtual prototype; `"reserve"`, the background
            side.
        feature_expansion_alpha (`float`, defaults to 1.0): Mixing weights are drawn from `Beta(alpha, alpha)`.
        feature_expansion_location (`str`, defaults to `"before_adapter"`): Where proposals are mixed; or
            `"after_adapter"`.
        background_diversity (`bool`, defaults to `True`): GEPC's background diversity strategy (BDS); off: one
            background prototype, no regularizer.
        num_background_prototypes (`int`, defaults to 8): Prototypes `K` with BDS.
        bias_correction (`bool`, defaults to `True`): PBC, the class indicator `φ_bc`.
        indicator_dim (`int`, defaults to 64): Hidden width of the indicator.
        indicator_embedding (`bool`, defaults to `False`): Whether the indicator sees the proposal embedding beside the
            statistics of its logits.
        indicator_positives (`str`, defaults to `"held_out"`): Stand-ins for unseen classes in its training:
            `"held_out"` seen classes, `"virtual"` features, or `"both"`.
        held_out_fraction (`float`, defaults to 0.25): Share of the seen classes that plays unseen in every step.
        correction_gamma (`float`, defaults to 1.0): PBC lowers seen logits of unseen-looking proposals by it. The default is
            what calibration found on the embedded benchmark, 0.25 at its temperature of 27, at that of OpenAI's CLIP, 100.
        correction_threshold (`float`, defaults to 0.7): Proposals whose indicator exceeds it are corrected.
            `scripts/calibrate.py` chooses both for a model.
        class_weight, mask_weight, dice_weight (`float`, default to 2.0, 5.0, 5.0): Weights of the class, mask BCE and
            dice terms, in matching and in the objective.
        no_object_weight (`float`, defaults to 0.1): Weight of unmatched proposals in the class term.
        ignored_query_threshold (`float`, defaults to 0.5): An unmatched proposal with more than this share of its mask
            on unlabelled pixels takes no part in the class term. 1.0 switches the rule off.
        unlabelled_pixels (`str`, defaults to `"nearby"`): What unlabelled pixels are in matching and mask loss: left out
            (`"exclude"`); no part of any labelled object (`"negative"`, as MaskFormer has it); or the latter only around
            the object (`"nearby"`), so that no proposal learns to stay off what is unlabelled everywhere.
        unlabelled_margin (`float`, defaults to 0.25): How far "nearby" reaches beyond an object's bounding box, as a share
            of the box's sides.
        virtual_weight, diversity_weight, indicator_weight (`float`, default to 1.0, 1.0, 1.0): Weights of `L_vir`,
            `L_reg` and `L_bc`.
        train_num_points (`int`, *optional*, defaults to 12544): Points per mask in matching and mask loss; `None`
            takes every cell of the mask grid.
        oversample_ratio, importance_sample_ratio (`float`, default to 3.0, 0.75): Uncertainty-guided point sampling.
        use_auxiliary_loss (`bool`, defaults to `True`): Mask loss on the intermediate MRPE layers too.
        template_set (`str`, defaults to `"vild"`): Prompt templates of the stored vocabulary.
        unseen_labels (`list[str]`, *optional*): Names in `id2label` that count as unseen.

    Raises:
        ValueError: a value is of another type or outside its range, or two of them contradict each other; the message
            names them. A misspelt name is warned of.
    """

    model_type = "alignzeg"
    sub_configs = {"vision_config": CLIPVisionConfig, "text_config": CLIPTextConfig}

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        projection_dim=512,
        logit_scale_init_value=math.log(100),
        image_size=640,
        clip_input_scale=0.5,
        clip_split_layer=9,
        fusion_layers=(0, 3, 6, 9),
        patch_size=16,
        num_channels=3,
        hidden_size=240,
        num_hidden_layers=2,
        num_attention_heads=6,
        sequence_reduction_ratio=2,
        intermediate_size=480,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        attention_dropout=0.0,
        initializer_range=0.02,
        mask_stride=4,
        mask_dim=64,
        num_queries=100,
        unclaimed_proposal=True,
        num_refinement_layers=3,
        mutual_refinement=True,
        attention_bias_dim=32,
        mask_guided_attention=True,
        adapter_dim=256,
        query_fusion=True,
        feature_expansion=True,
        feature_expansion_target="frozen",
        feature_expansion_alpha=1.0,
        feature_expansion_location="before_adapter",
        background_diversity=True,
        num_background_prototypes=8,
        bias_correction=True,
        indicator_dim=64,
        indicator_embedding=False,
        indicator_positives="held_out",
        held_out_fraction=0.25,
        correction_gamma=1.0,
        correction_threshold=0.7,
        class_weight=2.0,
        mask_weight=5.0,
        dice_weight=5.0,
        no_object_weight=0.1,
        ignored_query_threshold=0.5,
        unlabelled_pixels="nearby",
        unlabelled_margin=0.25,
        virtual_weight=1.0,
        diversity_weight=1.0,
        indicator_weight=1.0,
        train_num_points=12544,
        oversample_ratio=3.0,
        importance_sample_ratio=0.75,
        use_auxiliary_loss=True,
        template_set="vild",
        unseen_labels=None,
        **kwargs,
    ):
        fields = inspect.signature(AlignZegConfig.__init__).parameters
        for name in kwargs.keys() - set(dir(PreTrainedConfig)):  # others are those of transformers
            close = difflib.get_close_matches(name, fields, 1, cutoff=0.85)
            if close:  # transformers' own code passes such names too
                message = f"`{name}` is no field of AlignZegConfig, but `{close[0]}` is; correct the name."
                warnings.warn(message, stacklevel=2)
        if kwargs.get("id2label") is not None:
            check_id2label(kwargs["id2label"])
        for name, value, kind in (
            ("vision_config", vision_config, CLIPVisionConfig),
            ("text_config", text_config, CLIPTextConfig),
        ):
            require(
                value is None or isinstance(value, (dict, kind)),
                f"`{name}` is a {type(value).__name__}; expected a dict or a {kind.__name__}.",
            )
        require(
            isinstance(fusion_layers, (list, tuple)) and all(map(is_whole, fusion_layers)),
            f"`fusion_layers` is {fusion_layers!r}; expected a list of whole numbers, such as [0, 3, 6, 9].",
        )
        require(
            unseen_labels is None
            or (isinstance(unseen_labels, (list, tuple)) and all(isinstance(name, str) for name in unseen_labels)),
            f"`unseen_labels` is {unseen_labels!r}; expected a list of names in `id2label`.",
        )
        if vision_config is None:
            vision_config = {"image_size": 224, "patch_size": 16}
        if text_config is None:
            text_config = {}
        if isinstance(vision_config, dict):
            vision_config = CLIPVisionConfig(**{"projection_dim": projection_dim, **vision_config})
        if isinstance(text_config, dict):
            text_config = CLIPTextConfig(**{"projection_dim": projection_dim, **text_config})
        self.vision_config = vision_config
        self.text_config = text_config
        self.projection_dim = projection_dim
        self.logit_scale_init_value = logit_scale_init_value

        self.image_size = image_size
        self.clip_input_scale = clip_input_scale
        self.clip_split_layer = clip_split_layer
        self.fusion_layers = list(fusion_layers)
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.sequence_reduction_ratio = sequence_reduction_ratio
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.mask_stride = mask_stride
        self.mask_dim = mask_dim

        self.num_queries = num_queries
        self.unclaimed_proposal = unclaimed_proposal
        self.num_refinement_layers = num_refinement_layers
        self.mutual_refinement = mutual_refinement
        self.attention_bias_dim = attention_bias_dim
        self.mask_guided_attention = mask_guided_attention
        self.adapter_dim = adapter_dim
        self.query_fusion = query_fusion

        self.feature_expansion = feature_expansion
        self.feature_expansion_target = feature_expansion_target
        self.feature_expansion_alpha = feature_expansion_alpha
        self.feature_expansion_location = feature_expansion_location
        self.background_diversity = background_diversity
        self.num_background_prototypes = num_background_prototypes

        self.bias_correction = bias_correction
        self.indicator_dim = indicator_dim
        self.indicator_embedding = indicator_embedding
        self.indicator_positives = indicator_positives
        self.held_out_fraction = held_out_fraction
        self.correction_gamma = correction_gamma
        self.correction_threshold = correction_threshold

        self.class_weight = class_weight
        self.mask_weight = mask_weight
        self.dice_weight = dice_weight
        self.no_object_weight = no_object_weight
        self.ignored_query_threshold = ignored_query_threshold
        self.unlabelled_pixels = unlabelled_pixels
        self.unlabelled_margin = unlabelled_margin
        self.virtual_weight = virtual_weight
        self.diversity_weight = diversity_weight
        self.indicator_weight = indicator_weight
        self.train_num_points = train_num_points
        self.oversample_ratio = oversample_ratio
        self.importance_sample_ratio = importance_sample_ratio
        self.use_auxiliary_loss = use_auxiliary_loss

        self.template_set = template_set
        self.unseen_labels = list(unseen_labels) if unseen_labels is not None else []
        self._check()
        super().__init__(**kwargs)
        self._check_unseen_labels()

    @property
    def clip_stride(self) -> int:
        """Input pixels on a side of one of CLIP's patches."""
        return round(self.vision_config.patch_size / self.clip_input_scale)

    @property
    def size_divisor(self) -> int:
        """Inputs are padded to a multiple of it, so that both token grids divide the image."""
        return math.lcm(self.patch_size, self.clip_stride)

    @property
    def clip_hidden_state_layers(self) -> list[int]:
        """CLIP hidden states that the model reads: those that are fused and the inputs of the recognition layers."""
        return sorted({*self.fusion_layers, *range(self.clip_split_layer, self.vision_config.num_hidden_layers)})

    @classmethod
    def _dict_from_json_file(cls, json_file):
        values = super()._dict_from_json_file(json_file)
        if not isinstance(values, dict):
            raise OSError(
                f"'{json_file}' holds {str(values)[:40]}; expected the fields of an AlignZegConfig in braces."
            )
        return values

    def _check_unseen_labels(self) -> None:
        names = list(self.id2label.values())
        if all(
            name == f"LABEL_{index}" for index, name in enumerate(names)
        ):  # no vocabulary, or a new number of labels
            self.unseen_labels = []
        unknown = [name for name in self.unseen_labels if name not in names]
        if unknown:
            raise ValueError(
                f"`unseen_labels` names {unknown[0]!r}, which is not among the {len(names)} names of `id2label`; a class "
                "that is misspelt here would count as seen."
            )

    def _check(self) -> None:
        for name, least in WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if name == "train_num_points" and value is None:
                continue
            require(is_whole(value), f"`{name}` is {value!r}; expected a whole number.")
            require(value >= least, f"`{name}` is {value}; use {least} or more.")
        for name, (least, largest) in NUMBERS.items():
            value = getattr(self, name)
            require(
                isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value),
                f"`{name}` is {value!r}; expected a finite number.",
            )
            span = f"{least} or more" if largest == math.inf else f"a number from {least} to {largest}"
            require(least <= value <= largest, f"`{name}` is {value}; use {span}.")
        for name in SWITCHES:
            value = getattr(self, name)
            require(isinstance(value, bool), f"`{name}` is {value!r}; expected True or False.")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            require(
                isinstance(value, str) and value in choices, f"`{name}` is {value!r}; use one of {', '.join(choices)}."
            )
        require(self.clip_input_scale > 0, f"`clip_input_scale` is {self.clip_input_scale}; use a positive number.")
        depth = self.vision_config.num_hidden_layers
        require(
            0 < self.clip_split_layer < depth,
            f"`clip_split_layer` is {self.clip_split_layer}; CLIP's vision tower has {depth} layers, so it must lie in "
            f"1..{depth - 1}: features come from the layers before it, recognition from the others.",
        )
        require(
            all(0 <= layer < depth for layer in self.fusion_layers),
            f"`fusion_layers` is {self.fusion_layers}; each must lie in 0..{depth - 1}: the last of the {depth} layers of "
            "CLIP's vision tower recognises proposals only.",
        )
        blocks = self.num_hidden_layers + self.num_refinement_layers
        require(
            len(self.fusion_layers) <= blocks,
            f"`fusion_layers` has {len(self.fusion_layers)} entries, but one enters before each of the {blocks} blocks "
            "(`num_hidden_layers` + `num_refinement_layers`): drop some or add blocks.",
        )
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` ({self.num_attention_heads}).",
        )
        ratio = self.patch_size / self.mask_stride
        require(
            ratio >= 1 and math.log2(ratio).is_integer(),
            f"`mask_stride` is {self.mask_stride}; `patch_size` ({self.patch_size}) must be 1, 2, 4, … times as large.",
        )
        clip_patch = self.vision_config.patch_size / self.clip_input_scale
        require(
            abs(clip_patch - round(clip_patch)) < 1e-6,
            f"`clip_input_scale` is {self.clip_input_scale}; CLIP's patch of {self.vision_config.patch_size} pixels must "
            "cover a whole number of input pixels (0.5 and 1.0 always do).",
        )
        require(
            self.feature_expansion_alpha > 0,
            f"`feature_expansion_alpha` is {self.feature_expansion_alpha}; a Beta distribution needs a positive number.",
        )
        require(
            0 < self.held_out_fraction < 1,
            f"`held_out_fraction` is {self.held_out_fraction}; it is a share of the seen classes between 0 and 1.",
        )


AlignZegConfig.register_for_auto_class()

__all__ = ["AlignZegConfig"]
