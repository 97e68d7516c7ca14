# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""AlignZeg: zero-shot semantic segmentation on a frozen CLIP (arXiv 2404.05667, ECCV 2024), reconstructed.

`AlignZegModel.forward` follows the data through one module per idea:

    pixel_values ── recognizer: frozen image tower ──────────── hidden states ─┐
         │                                                                    │
         └─ side_network: stem ─ encoder ─ MRPE ─ masks ◄──────────────────────┤
                │ proposals: queries and masks                                │
                └─ recognizer: proposal embeddings from the tower ◄────────────┘
                        │ frozen embeddings
                        └─ classifier (GEPC): adapter, text and background prototypes, virtual features ── class logits
                                │
                                └─ indicator (PBC): statistics of the scores ── unseen logits

A convolutional tower's own cells have a classifier too; the read-out combines its logits with those of the proposals.

Shapes: `B` images of `H x W` pixels; `N` proposals (with `config.unclaimed_proposal`, the last one is the region that no
    query claims); side network of width `d` on a grid of `T = h·w` tokens; image tower of width `Dv` on a grid of `P` cells;
    joint space of width `D`; `C` classes.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .checks_alignzeg import check_tensor
from .classifier_alignzeg import (
    AlignZegAdapter,
    AlignZegBackgroundPrototypes,
    AlignZegCellClassifier,
    AlignZegProposalClassifier,
    Cells,
    Classification,
    class_logits,
)
from .configuration_alignzeg import AlignZegConfig
from .indicator_alignzeg import AlignZegClassIndicator, Evidence
from .layers_alignzeg import content_mask, repeat_border
from .loss_alignzeg import match_proposals, sample_points, stack_targets
from .recognizer_alignzeg import (
    RECOGNIZERS,
    AlignZegAttentionBias,
    LibraryInitialization,
    ProposalRecognizer,
    TowerStates,
)
from .side_network_alignzeg import (
    AlignZegEncoderLayer,
    AlignZegRefinementLayer,
    AlignZegSelfAttention,
    AlignZegSideNetwork,
    Proposals,
)
from .text_encoder_alignzeg import AlignZegTextEncoder
from .threads_alignzeg import has_hooks, is_watched, map_in_threads
from .vocabulary_alignzeg import AlignZegVocabulary, Vocabulary


IMAGE_PIXELS, IMAGES_AT_ONCE = 640**2, 4  # of a batch on a CPU
IMAGE_HINT = "The AlignZegImageProcessor makes it from images."


@dataclass
class AlignZegOutput(ModelOutput):
    r"""
    Output of [`AlignZegModel`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): The total loss, if labels are given.
        loss_class, loss_mask, loss_dice, loss_auxiliary, loss_unlabelled, loss_virtual, loss_diversity, loss_indicator,
            loss_cells (`torch.FloatTensor` of shape `()`, *optional*): Its terms before weighting; zero for a disabled
            part. `loss_auxiliary` is the weighted mask loss of the intermediate MRPE layers, `loss_unlabelled` that of all
            layers on unlabelled segments.
        masks_queries_logits (`torch.FloatTensor` of shape `(B, N, H / mask_stride, W / mask_stride)`): Mask logits, for
            the input padded to a multiple of `config.size_divisor`.
        class_queries_logits (`torch.FloatTensor` of shape `(B, N, C + 1)`): Class logits, scaled by `τ`, the
            background last.
        unseen_logits (`torch.FloatTensor` of shape `(B, N)`, *optional*): Logits of "this proposal shows an unseen
            class" (PBC).
        dense_logits (`torch.FloatTensor` of shape `(B, C, h, w)`, *optional*): Class logits of the cells of a
            convolutional image tower, scaled by `τ`; the read-out combines them with the proposals.
        proposal_embeds (`torch.FloatTensor` of shape `(B, N, D)`): Unit proposal embeddings in the joint space.
        content_sizes (`torch.FloatTensor` of shape `(B, 2)`): Height and width of the image content inside the mask
            grid, in mask cells; the rest, at the bottom and right, is padding.
        seen_class_mask (`torch.LongTensor` of shape `(B, C)`): 1 for classes that count as seen, 0 for unseen ones. The
            same for every image; the batch axis lets pipelines and data parallelism split and join it.
        auxiliary_masks_queries_logits (`tuple(torch.FloatTensor)`, *optional*): Mask logits of the MRPE layers before
            the last, with `output_auxiliary_logits=True`.
        last_hidden_state (`torch.FloatTensor` of shape `(B, T, d)`): Refined features of the side network.
        queries_hidden_state (`torch.FloatTensor` of shape `(B, num_queries, d)`): Refined mask queries.
        hidden_states, attentions (`tuple(torch.FloatTensor)`, *optional*): Hidden states and attentions of the side
            network's image encoder, with `output_hidden_states=True` and `output_attentions=True`.
    """

    loss: torch.FloatTensor | None = None
    masks_queries_logits: torch.FloatTensor | None = None
    class_queries_logits: torch.FloatTensor | None = None
    unseen_logits: torch.FloatTensor | None = None
    dense_logits: torch.FloatTensor | None = None
    proposal_embeds: torch.FloatTensor | None = None
    content_sizes: torch.FloatTensor | None = None
    seen_class_mask: torch.LongTensor | None = None
    auxiliary_masks_queries_logits: tuple[torch.FloatTensor, ...] | None = None
    last_hidden_state: torch.FloatTensor | None = None
    queries_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    loss_class: torch.FloatTensor | None = None
    loss_mask: torch.FloatTensor | None = None
    loss_dice: torch.FloatTensor | None = None
    loss_auxiliary: torch.FloatTensor | None = None
    loss_unlabelled: torch.FloatTensor | None = None
    loss_virtual: torch.FloatTensor | None = None
    loss_diversity: torch.FloatTensor | None = None
    loss_indicator: torch.FloatTensor | None = None
    loss_cells: torch.FloatTensor | None = None


class ImageInputs(NamedTuple):
    """Checked and padded images.

    Attributes:
        pixel_values: `(B, 3, H, W)`; sides are multiples of `config.size_divisor`, padding is zero.
        content: `(B, 2)`, see [`Grid`]; `None` if every cell of every grid has content.
        content_sizes: `(B, 2)` height and width of the images in pixels.
    """

    pixel_values: Tensor
    content: Tensor | None
    content_sizes: Tensor

    def parts(self, pixels: int) -> list["ImageInputs"]:
        """The batch in equal parts of up to `pixels` pixels, or of single images that have more."""
        batch, _, height, width = self.pixel_values.shape
        step = max(1, pixels // (height * width))
        step = math.ceil(batch / math.ceil(batch / step))
        return [
            ImageInputs(*(None if values is None else values[start : start + step] for values in self))
            for start in range(0, batch, step)
        ]


def _joined(parts: list[AlignZegOutput]) -> AlignZegOutput:
    """The outputs of the parts of a batch as those of the batch."""
    return AlignZegOutput(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


class AlignZegPreTrainedModel(LibraryInitialization, PreTrainedModel):
    config_class = AlignZegConfig
    base_model_prefix = "alignzeg"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = [
        "CLIPTextEmbeddings",
        "CLIPVisionEmbeddings",
        "CLIPEncoderLayer",
        "MetaClip2TextEmbeddings",
        "MetaClip2EncoderLayer",
        "SiglipTextEmbeddings",
        "SiglipVisionEmbeddings",
        "SiglipEncoderLayer",
        "AlignZegPoolingHead",
        "AlignZegTimmModel",
        "AlignZegEncoderLayer",
        "AlignZegRefinementLayer",
        "AlignZegImageStem",
    ]
    _can_record_outputs = {"hidden_states": AlignZegEncoderLayer, "attentions": AlignZegSelfAttention}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, AlignZegAdapter):
            init.zeros_(module.mlp.layers[-1].weight)
        elif (
            isinstance(module, AlignZegRefinementLayer) and module.mutual
        ):  # at first, queries add nothing to features
            init.zeros_(module.feature_cross_attention.out_proj.weight)
            init.zeros_(module.feature_mlp.layers[-1].weight)
        elif isinstance(module, AlignZegAttentionBias):
            init.ones_(module.mask_scale)
        elif isinstance(module, AlignZegBackgroundPrototypes):
            init.normal_(module.prototypes, std=self.config.projection_dim**-0.5)
        elif isinstance(module, AlignZegSideNetwork):
            init.normal_(module.query_embeddings)
            init.trunc_normal_(module.query_position, std=0.02)
            init.trunc_normal_(module.position_embedding, std=0.02)
        elif isinstance(module, AlignZegModel):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            init.copy_(module.class_text_embeds, module._placeholder_prototypes())
            init.copy_(module.seen_class_mask, module._seen_classes_of_config())


class AlignZegModel(AlignZegVocabulary, AlignZegPreTrainedModel):
    r"""
    The AlignZeg model. The image and text towers are frozen and receive no gradient; everything else is trainable.

    The vocabulary (`config.id2label` and its text prototypes) is stored with the weights, so the model runs on images
    alone. Pass other classes per call:

        prototypes = model.get_text_prototypes(processor, ["red striped", "blue dotted"])
        outputs = model(**processor(images=image, return_tensors="pt"), text_prototypes=prototypes)
    """

    def __init__(self, config: AlignZegConfig):
        super().__init__(config)
        self.recognizer: ProposalRecognizer = RECOGNIZERS[config.vision_config.model_type](config)
        self.text_encoder = AlignZegTextEncoder(config)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.side_network = AlignZegSideNetwork(config, self.recognizer.levels)
        self.classifier = AlignZegProposalClassifier(config)
        self.indicator = AlignZegClassIndicator(config) if config.bias_correction else None
        self.cell_classifier = AlignZegCellClassifier(config) if config.is_convolutional else None
        self.register_buffer("class_text_embeds", self._placeholder_prototypes())
        self.register_buffer("seen_class_mask", self._seen_classes_of_config())
        self.size_divisor = config.size_divisor  # torch.compile treats numbers of a module as constants
        self.freeze_clip()
        self.post_init()

    def freeze_clip(self) -> None:
        """Freezes the towers, their projections and the logit scale."""
        for part in (*self.recognizer.frozen_parts(), self.text_encoder):
            part.requires_grad_(False).train(False)
        self.logit_scale.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As [`PreTrainedModel.from_pretrained`], which makes every weight trainable; freezes the towers again."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze_clip()
        return loaded

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As [`PreTrainedModel.save_pretrained`]. Also adds the code of the pipeline, so that the folder loads with
        `pipeline` and AutoModelForSemanticSegmentation."""
        from .pipeline_alignzeg import ZeroShotImageSegmentationPipeline

        self.config.auto_map = {
            "AutoConfig": "configuration_alignzeg.AlignZegConfig",
            "AutoModel": "modeling_alignzeg.AlignZegModel",
            "AutoModelForSemanticSegmentation": "modeling_alignzeg.AlignZegModel",
        }
        self.config.custom_pipelines = {
            "zero-shot-image-segmentation": {
                "impl": f"pipeline_alignzeg.{ZeroShotImageSegmentationPipeline.__name__}",
                "pt": ["AutoModel"],
                "type": "multimodal",
            }
        }
        super().save_pretrained(save_directory, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.side_network.stem.convolutions[0]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.side_network.stem.convolutions[0] = value

    # --- forward

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        text_prototypes: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        seen_class_mask: Tensor | None = None,
        clip_hidden_states: dict[int, Tensor] | None = None,
        output_auxiliary_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AlignZegOutput:
        r"""
        Args:
            pixel_values: `(B, 3, H, W)`, normalized with the image tower's mean and standard deviation. Any size.
            pixel_mask: `(B, H, W)`, 1 on the image, 0 on padding at the bottom and right.
            mask_labels: For each image `(n, H, W)`, one binary mask per class in it. Pixels in no mask are unlabelled.
            class_labels: For each image `int64 (n,)`, indices into the text prototypes.
            text_prototypes: Unit vectors `(C, D)`, or `(C, K, D)` with K per class, of which the nearest counts. A loss
                needs `(C, D)`. Default: the stored vocabulary's.
            input_ids, attention_mask: Tokenized class prompts `(C, L)`, `(C, templates, L)` or `(C, phrases, templates,
                L)`, instead of prototypes.
            seen_class_mask: `bool (C,)`, which classes count as seen. Default: the vocabulary's; with other classes, all.
            clip_hidden_states: Result of [`clip_hidden_states`] for these pixels, used instead of running the tower.
            output_auxiliary_logits: Whether to return the masks of the MRPE layers before the last.

        Raises:
            ValueError: an argument is missing or has the wrong type or shape; the message names it.
        """
        images = self._prepare_images(pixel_values, pixel_mask)
        vocabulary = self._prepare_vocabulary(text_prototypes, input_ids, attention_mask, seen_class_mask)
        wants_loss = self._check_labels(mask_labels, class_labels, images.pixel_values.shape[0], vocabulary)

        inputs = (clip_hidden_states, mask_labels, output_auxiliary_logits, *kwargs.values())
        if not any(value is not None and value is not False for value in inputs) and self._runs_in_parts(images):
            return self._segment_in_parts(images, vocabulary, **kwargs)
        tower = None
        if clip_hidden_states is not None:
            tower = self.recognizer.restore(clip_hidden_states, images.pixel_values, images.content)
        labels = (mask_labels, class_labels) if wants_loss else None
        return self._segment(images, vocabulary, tower, labels, output_auxiliary_logits, **kwargs)

    def _runs_in_parts(self, images: ImageInputs) -> bool:
        """Whether inference of a batch runs in parts, see [`_segment_in_parts`]."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or images.pixel_values.device.type != "cpu":
            return False
        records = self.config.output_hidden_states or self.config.output_attentions
        return len(images.pixel_values) > 1 and not records

    def _segment_in_parts(self, images: ImageInputs, vocabulary: Vocabulary, **kwargs) -> AlignZegOutput:
        """Inference on a CPU: several images at a time that share torch's threads, see [`threads_alignzeg`]; with hooks,
        quantized weights or one thread only, a few images after the others. A whole large batch would be slower, because its
        tensors are so large that each goes back to the system after use (docs/experiments.md, Speed)."""

        def segment(part: ImageInputs) -> AlignZegOutput:
            return self._segment(part, vocabulary, **kwargs)

        parts, workers = images.parts(IMAGE_PIXELS), min(torch.get_num_threads(), IMAGES_AT_ONCE)
        workers = min(workers, len(parts))
        # Libraries may still prepare quantized weights in the first forward pass.
        is_quantized = getattr(self, "quantization_method", None) is not None
        if workers > 1 and not (is_watched() or is_quantized or has_hooks(self)):
            return _joined(map_in_threads(segment, parts, workers))
        parts = images.parts(IMAGES_AT_ONCE * IMAGE_PIXELS)
        return segment(images) if len(parts) == 1 else _joined([segment(part) for part in parts])

    def _segment(
        self,
        images: ImageInputs,
        vocabulary: Vocabulary,
        tower: TowerStates | None = None,
        labels: tuple[list[Tensor], list[Tensor]] | None = None,
        output_auxiliary_logits: bool | None = None,
        **kwargs,
    ) -> AlignZegOutput:
        """[`forward`] after its checks; without the `tower`'s hidden states, it is run."""
        if tower is None:
            tower = self.recognizer.hidden_states(images.pixel_values, images.content)
        proposals = self.side_network(
            images.pixel_values,
            self.recognizer.maps(tower),
            images.content,
            every_layer=labels is not None or output_auxiliary_logits,
            **kwargs,
        )
        frozen_embeds = self.recognizer(tower, proposals)
        frozen_logits = class_logits(frozen_embeds, vocabulary.prototypes, vocabulary.scale)
        classified = self.classifier(frozen_embeds, proposals.queries, vocabulary.prototypes, vocabulary.scale)
        unseen_logits, cells, evidence = None, None, None
        if self.cell_classifier is not None:
            cell_embeds = self.recognizer.dense_embeds(tower)
            cells = self.cell_classifier(cell_embeds, vocabulary.prototypes, vocabulary.scale)
        if self.indicator is not None:
            cell_logits = None
            if "cells" in self.config.indicator_evidence:
                cell_logits = class_logits(cells.embeds, vocabulary.prototypes, vocabulary.scale)
            evidence = Evidence.collect(frozen_logits, classified.logits, proposals.masks, cell_logits, tower.grid)
            unseen_logits = self.indicator(evidence, vocabulary.seen)

        losses = {}
        if labels is not None:
            losses = self._losses(labels, images, vocabulary, proposals, classified, evidence, cells)
        return AlignZegOutput(
            **losses,
            masks_queries_logits=proposals.masks,
            class_queries_logits=classified.logits,
            unseen_logits=unseen_logits,
            dense_logits=None if cells is None else cells.logits,
            proposal_embeds=classified.embeds,
            content_sizes=images.content_sizes.float() / self.config.mask_stride,
            seen_class_mask=vocabulary.seen.long().expand(proposals.masks.shape[0], -1),
            auxiliary_masks_queries_logits=tuple(proposals.masks_per_layer[:-1]) if output_auxiliary_logits else None,
            last_hidden_state=proposals.features,
            queries_hidden_state=proposals.queries[:, : self.config.num_queries],
        )

    def clip_hidden_states(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> dict[int, Tensor]:
        """The frozen tower's hidden states that the model reads, by layer: `(B, 1 + P, Dv)` of CLIP's ViT, `(B, P, Dv)` of
        SigLIP's, `(B, c, h, w)` of a convolutional tower. [`forward`] takes them instead of running the tower. Arguments as
        there."""
        images = self._prepare_images(pixel_values, pixel_mask)
        return self.recognizer.hidden_states(images.pixel_values, images.content).states

    def _prepare_images(self, pixel_values: Tensor | None, pixel_mask: Tensor | None) -> ImageInputs:
        device = self.logit_scale.device
        check_tensor("pixel_values", pixel_values, "floating-point numbers", device, IMAGE_HINT)
        if pixel_values.ndim != 4 or 0 in pixel_values.shape or pixel_values.shape[1] != 3:
            raise ValueError(
                "`pixel_values` must have shape (batch, 3, height, width) with no empty axis, got "
                f"{tuple(pixel_values.shape)}. {IMAGE_HINT}"
            )
        batch, _, height, width = pixel_values.shape
        if pixel_mask is not None:
            check_tensor("pixel_mask", pixel_mask, "real numbers", device, IMAGE_HINT)
            if pixel_mask.shape != (batch, height, width):
                raise ValueError(
                    f"`pixel_mask` has shape {tuple(pixel_mask.shape)}; expected (batch, height, width) of `pixel_values`, "
                    f"{(batch, height, width)}."
                )
        # Pad to whole cells of both grids.
        pad = (0, -width % self.size_divisor, 0, -height % self.size_divisor)
        if any(pad):
            if pixel_mask is None:
                pixel_mask = torch.ones(batch, height, width, dtype=torch.long, device=pixel_values.device)
            pixel_values, pixel_mask = F.pad(pixel_values, pad), F.pad(pixel_mask, pad)
        dtype, size = self.side_network.query_embeddings.dtype, tuple(pixel_values.shape[-2:])
        if pixel_mask is None:
            full = torch.tensor([size], device=pixel_values.device).expand(batch, -1)
            return ImageInputs(pixel_values.to(dtype), None, full)
        content = torch.stack([pixel_mask.any(2).sum(1), pixel_mask.any(1).sum(1)], 1)
        # Zero the padding, whatever its values were.
        pixel_values = pixel_values.masked_fill(~content_mask(content, size)[:, None], 0).to(dtype)
        return ImageInputs(pixel_values, content if self._has_empty_cells(content, size) else None, content)

    def _has_empty_cells(self, content: Tensor, size: tuple[int, int]) -> bool:
        """Whether any grid has a cell without content; always true in compiled models."""
        if torch.compiler.is_compiling():
            return True
        smallest, stride = content.amin(0).tolist(), self.config.mask_stride
        if min(smallest) == 0:
            raise ValueError("`pixel_mask` marks an image of the batch as padding only; leave that image out.")
        return any(math.ceil(side / stride) * stride < padded for side, padded in zip(smallest, size))

    @staticmethod
    def _check_labels(
        mask_labels: list[Tensor] | None, class_labels: list[Tensor] | None, batch: int, vocabulary: Vocabulary
    ) -> bool:
        """Whether labels were given."""
        if (mask_labels is None) != (class_labels is None):
            given, missing = ("mask_labels", "class_labels")[:: -1 if mask_labels is None else 1]
            raise ValueError(f"`{given}` is given without `{missing}`; pass both to compute a loss, or neither.")
        for name, labels in (("mask_labels", mask_labels), ("class_labels", class_labels)):
            if not isinstance(labels, (list, tuple, Tensor, type(None))):
                raise ValueError(f"`{name}` is a {type(labels).__name__}; expected a list with one tensor per image.")
            if labels is not None and len(labels) != batch:
                raise ValueError(f"`{name}` has {len(labels)} entries for {batch} images; pass one for each image.")
        if mask_labels is not None and vocabulary.prototypes.ndim == 3:
            raise ValueError(
                "A loss needs one prototype per class, but there are several; use "
                "`get_text_prototypes(..., phrase_pooling='mean')`."
            )
        return mask_labels is not None

    # --- objective

    def _losses(
        self,
        labels: tuple[list[Tensor], list[Tensor]],
        images: ImageInputs,
        vocabulary: Vocabulary,
        proposals: Proposals,
        classified: Classification,
        evidence: Evidence | None,
        cells: Cells | None,
    ) -> dict[str, Tensor]:
        config, seen, content = self.config, vocabulary.seen, images.content
        targets = stack_targets(*labels, tuple(images.pixel_values.shape[-2:]), seen, content)
        # Training samples new points, mixtures and held-out classes in every step; evaluation always samples the same
        # ones, so that the losses of two checkpoints are comparable.
        generator = None if self.training else torch.Generator(seen.device).manual_seed(0)
        # The training vocabulary contains seen classes only, and no loss uses the unclaimed region.
        queries = slice(config.num_queries)
        prototypes = vocabulary.prototypes[seen]
        seen_and_background = torch.cat([seen, seen.new_ones(1)])
        classified = Classification(
            classified.inputs[:, queries],
            classified.embeds[:, queries],
            classified.logits[:, queries][..., seen_and_background],
        )
        masks_per_layer, visible = proposals.masks_per_layer, proposals.masks_per_layer[-1]
        if content is not None:
            # Padding covered by a proposal does not count as unlabelled, and points between the last cell of content and
            # the padding interpolate content only.
            filled = torch.ceil(content / config.mask_stride).long()
            visible = visible.masked_fill(~content_mask(filled, visible.shape[-2:])[:, None], -1e4)
            masks_per_layer = [repeat_border(masks, filled) for masks in masks_per_layer]
        points = sample_points(targets, tuple(visible.shape[-2:]), config.train_num_points, generator)
        weights = (config.class_weight, config.mask_weight, config.dice_weight)
        match = match_proposals(masks_per_layer[-1], classified.logits, targets, points.for_matching, weights)

        loss_mask, loss_dice, loss_auxiliary = self.side_network.loss(masks_per_layer, targets, match, points)
        loss_unlabelled = loss_mask.new_zeros(())
        if config.unlabelled_weight:
            loss_unlabelled = self.side_network.unlabelled_loss(masks_per_layer, targets, match, content, generator)
        loss_class, loss_virtual, loss_diversity = self.classifier.loss(
            classified, visible, targets, match, prototypes, vocabulary.scale, generator
        )
        loss_indicator = loss_mask.new_zeros(())
        if self.indicator is not None:
            matched = evidence.matched(match.image, match.query, seen)
            classes = targets.classes[match.image, match.target]
            loss_indicator = self.indicator.loss(matched, classes, generator)
        loss_cells = loss_mask.new_zeros(())
        if cells is not None:
            loss_cells = self.cell_classifier.loss(cells.embeds, targets, prototypes, vocabulary.scale, generator)
        terms = {
            "loss_class": (config.class_weight, loss_class),
            "loss_mask": (config.mask_weight, loss_mask),
            "loss_dice": (config.dice_weight, loss_dice),
            "loss_auxiliary": (1.0, loss_auxiliary),
            "loss_unlabelled": (config.unlabelled_weight, loss_unlabelled),
            "loss_virtual": (config.virtual_weight, loss_virtual),
            "loss_diversity": (config.diversity_weight, loss_diversity),
            "loss_indicator": (config.indicator_weight, loss_indicator),
            "loss_cells": (config.cell_weight, loss_cells),
        }
        loss = sum(weight * term for weight, term in terms.values())
        return {"loss": loss, **{name: term for name, (_, term) in terms.items()}}


AlignZegModel.register_for_auto_class("AutoModel")

__all__ = ["AlignZegModel", "AlignZegOutput", "AlignZegPreTrainedModel"]
