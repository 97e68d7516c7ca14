# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""AlignZeg: zero-shot semantic segmentation on a frozen CLIP (arXiv 2404.05667, ECCV 2024), reconstructed.

Read top to bottom, this file follows the data:

    pixel_values ─┬─ frozen CLIP layers 1..k ──────────────┐ features
                  └─ image stem ─ encoder ── fusion ───────┤
                        MRPE: queries and features refine each other ── masks
                        CLIP layers k+1..L, attention biased by the masks' queries ── proposal embeddings
                        GEPC: adapter, text prototypes, background prototypes, virtual features ── class logits
                        PBC: class indicator ── unseen logits

Shapes: `B` images of `H x W` pixels; `N` queries, one for each proposal but the last, which is what no query claims; side
network of width `d` on a grid of `T = h·w` tokens; CLIP of width `Dv` on a grid of `P` patches; joint space of width `D`;
`C` classes.
"""

import contextlib
import math
from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPVisionModel, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .checks_alignzeg import check_tensor
from .configuration_alignzeg import AlignZegConfig, check_id2label
from .loss_alignzeg import (
    SegmentationTargets,
    cell_centres,
    classification_loss,
    frozen_virtual_loss,
    indicator_loss,
    mask_loss,
    match_proposals,
    prototype_diversity_loss,
    reached_pixels,
    reserve_virtual_loss,
    sample_labelled_points,
    semantic_virtual_loss,
    stack_targets,
    target_reach,
)
from .processing_alignzeg import check_class_names, check_unseen_names, get_templates


UNCLAIMED_LOGIT = 20.0  # a chance of one in float32


@dataclass
class AlignZegOutput(ModelOutput):
    r"""
    Output of [`AlignZegModel`]. `N'` proposals are those of the `N` queries and, with `config.unclaimed_proposal`, the
    region that no query claims, last.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): The objective, when labels were given.
        loss_class, loss_mask, loss_dice, loss_auxiliary, loss_virtual, loss_diversity, loss_indicator
            (`torch.FloatTensor` of shape `()`, *optional*): Its terms before weighting; zero for a part that is
            switched off. `loss_auxiliary` is the weighted mask loss of the intermediate MRPE layers.
        masks_queries_logits (`torch.FloatTensor` of shape `(B, N', H / mask_stride, W / mask_stride)`): Mask logits, for
            the input padded to a multiple of `config.size_divisor`.
        class_queries_logits (`torch.FloatTensor` of shape `(B, N', C + 1)`): Temperature-scaled class logits, the
            background last.
        unseen_logits (`torch.FloatTensor` of shape `(B, N')`, *optional*): Logits of "this proposal shows an unseen
            class" (PBC).
        proposal_embeds (`torch.FloatTensor` of shape `(B, N', D)`): Unit proposal embeddings in CLIP's joint space.
        content_sizes (`torch.FloatTensor` of shape `(B, 2)`): Height and width of the image content inside the mask
            grid, in mask cells; the rest, at the bottom and right, is padding.
        seen_class_mask (`torch.LongTensor` of shape `(B, C)`): 1 for classes that count as seen, 0 for unseen ones. The
            same for every image; with the batch in front, so that pipelines and data parallelism can split and join it.
        correction (`torch.FloatTensor` of shape `(B, 2)`): The checkpoint's `γ` and `θ` for post-processing, likewise.
        auxiliary_masks_queries_logits (`tuple(torch.FloatTensor)`, *optional*): Mask logits of the MRPE layers before
            the last, with `output_auxiliary_logits=True`.
        last_hidden_state (`torch.FloatTensor` of shape `(B, T, d)`): Refined features of the side network.
        queries_hidden_state (`torch.FloatTensor` of shape `(B, N, d)`): Refined mask queries.
        hidden_states, attentions (`tuple(torch.FloatTensor)`, *optional*): Of the side network's image encoder, with
            `output_hidden_states=True` and `output_attentions=True`.
    """

    loss: torch.FloatTensor | None = None
    masks_queries_logits: torch.FloatTensor | None = None
    class_queries_logits: torch.FloatTensor | None = None
    unseen_logits: torch.FloatTensor | None = None
    proposal_embeds: torch.FloatTensor | None = None
    content_sizes: torch.FloatTensor | None = None
    seen_class_mask: torch.LongTensor | None = None
    correction: torch.FloatTensor | None = None
    auxiliary_masks_queries_logits: tuple[torch.FloatTensor, ...] | None = None
    last_hidden_state: torch.FloatTensor | None = None
    queries_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    loss_class: torch.FloatTensor | None = None
    loss_mask: torch.FloatTensor | None = None
    loss_dice: torch.FloatTensor | None = None
    loss_auxiliary: torch.FloatTensor | None = None
    loss_virtual: torch.FloatTensor | None = None
    loss_diversity: torch.FloatTensor | None = None
    loss_indicator: torch.FloatTensor | None = None


# --- padding -----------------------------------------------------------------------------------------------------
# A batch of images of different sizes is padded at the bottom and right. `content (B, 2)` holds each image's true
# height and width in pixels; every step below treats what lies outside as absent, so that padding never changes a
# result. `content=None` means that no grid has a cell without content, and nothing needs to be masked.


def content_cells(content: Tensor, stride: float, grid: tuple[int, int]) -> Tensor:
    """Whether the cells of a grid with `stride` pixels a cell hold content: `bool (B, h, w)`."""
    rows, columns = (torch.arange(cells, device=content.device) * stride for cells in grid)
    return (rows[None, :, None] < content[:, 0, None, None]) & (columns[None, None, :] < content[:, 1, None, None])


def key_mask(cells: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Additive attention mask `(B, 1, 1, T)` that hides the keys of empty `cells (B, T)`."""
    if cells is None:
        return None
    visible = torch.zeros(cells.shape, dtype=dtype, device=cells.device)
    return visible.masked_fill(~cells, torch.finfo(dtype).min)[:, None, None]


def resample_grid(
    values: Tensor,
    size: tuple[int, int],
    source: Tensor | None = None,
    target: Tensor | None = None,
    mode: str = "bilinear",
) -> Tensor:
    """Resizes `values (B or 1, c, h, w)` to `size`, content on content.

    Args:
        source: `(B, 2)` rows and columns of `values` that hold content; default all.
        target: `(B, 2)` rows and columns of the result that hold content; default all.
    """
    if source is None and target is None:
        if not torch.compiler.is_compiling() and values.shape[-2:] == tuple(size):
            return values
        return F.interpolate(values, size=size, mode=mode, align_corners=False)
    height, width = values.shape[-2:]
    full_source, full_target = (torch.tensor(full, device=values.device)[None] for full in ((height, width), size))
    source = full_source if source is None else source
    target = full_target if target is None else target
    axes = []
    for axis, cells in enumerate(size):
        position = (torch.arange(cells, device=values.device) + 0.5) * source[:, axis, None] / target[:, axis, None]
        if mode == "bilinear":  # the outermost content cell is repeated, as at the border of an unpadded grid
            position = position.clamp(max=source[:, axis, None] - 0.5)
        axes.append(position * (2 / values.shape[-2 + axis]) - 1)
    batch = max(axes[0].shape[0], axes[1].shape[0])
    y, x = axes[0][:, :, None].expand(batch, *size), axes[1][:, None, :].expand(batch, *size)
    grid = torch.stack([x, y], -1).to(values.dtype)
    return F.grid_sample(values.expand(batch, -1, -1, -1), grid, mode=mode, padding_mode="border", align_corners=False)


def pool_cells(values: Tensor, ratio: int, cells: Tensor | None) -> Tensor:
    """Means of the `ratio x ratio` blocks of `values (B, c, h, w)` over `bool (B, h, w)` cells, all of them if `None`."""
    if cells is None:  # blocks that reach over the border are means of what lies inside
        return F.avg_pool2d(values, ratio, ceil_mode=True)
    weight = cells[:, None].to(values.dtype)
    total, count = (F.avg_pool2d(states, ratio, ceil_mode=True) for states in (values * weight, weight))
    return total / count.clamp(min=1 / ratio**2)


def repeat_border(values: Tensor, cells: Tensor) -> Tensor:
    """`values (B, c, h, w)` with the last rows and columns of content, `cells (B, 2)` of them, repeated over the padding."""
    for axis in (0, 1):
        index = torch.arange(values.shape[2 + axis], device=values.device).minimum(
            cells[:, axis, None] - 1
        )  # (B, h or w)
        index = index[:, None, :, None] if axis == 0 else index[:, None, None, :]
        values = values.gather(2 + axis, index.expand_as(values))
    return values


# --- layers ------------------------------------------------------------------------------------------------------


class AlignZegAttention(nn.Module):
    """Multi-head attention of `queries` over `keys` and `values`, through transformers' attention interface."""

    is_causal = False

    def __init__(self, config: AlignZegConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        def split(states):  # (B, n, d) -> (B, heads, n, head_dim)
            return states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            split(self.q_proj(queries)),
            split(self.k_proj(keys)),
            split(self.v_proj(values)),
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        return self.out_proj(output.flatten(2)), weights


class AlignZegSelfAttention(AlignZegAttention):
    """The image encoder's attention; a class of its own so that `output_attentions` records it alone."""


class AlignZegMLP(nn.Module):
    """`num_layers` linear layers with activations between them."""

    def __init__(self, config: AlignZegConfig, inputs: int, hidden: int, outputs: int, num_layers: int = 2):
        super().__init__()
        widths = [inputs] + [hidden] * (num_layers - 1) + [outputs]
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in zip(widths, widths[1:])])
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, states: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            states = self.activation(layer(states))
        return self.layers[-1](states)


# --- image encoder and fusion --------------------------------------------------------------------------------------


class AlignZegImageStem(nn.Module):
    """Convolutions from pixels to tokens. Their strides halve from `patch_size` to `mask_stride`; the finer stages are
    kept for the masks."""

    def __init__(self, config: AlignZegConfig):
        super().__init__()
        stages = int(math.log2(config.patch_size // config.mask_stride)) + 1
        widths = [max(config.hidden_size >> (stages - 1 - i), 8) for i in range(stages - 1)] + [config.hidden_size]
        first = config.mask_stride
        kernel = 2 * first - first % 2
        self.convolutions = nn.ModuleList(
            [nn.Conv2d(config.num_channels, widths[0], kernel, first, (kernel - first) // 2)]
        )
        self.convolutions.extend(nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList([nn.LayerNorm(width, eps=config.layer_norm_eps) for width in widths])
        self.activation = ACT2FN[config.hidden_act]
        self.widths, self.strides = widths, [config.mask_stride << i for i in range(stages)]

    def forward(self, pixel_values: Tensor, content: Tensor | None) -> list[Tensor]:
        """`(B, 3, H, W)` to one map `(B, width_i, H / stride_i, W / stride_i)` per stage, finest first."""
        stages, states = [], pixel_values.contiguous(memory_format=torch.channels_last)
        for convolution, norm, stride in zip(self.convolutions, self.norms, self.strides):
            states = norm(convolution(states).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            if stride != self.strides[-1]:
                states = self.activation(states)
            if content is not None:
                states = states * content_cells(content, stride, states.shape[-2:])[:, None].to(states.dtype)
            stages.append(states)
        return stages


class AlignZegFusion(nn.Module):
    """A CLIP hidden state enters the side network: LayerNorm, 1x1 projection, resize, add."""

    def __init__(self, config: AlignZegConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.vision_config.hidden_size, eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.vision_config.hidden_size, config.hidden_size)

    def forward(self, features: Tensor, clip_state: Tensor, resize) -> Tensor:
        """`features (B, T, d)`, `clip_state (B, 1 + P, Dv)`; `resize` maps `(B, P, d)` to `(B, T, d)`."""
        return features + resize(self.projection(self.norm(clip_state[:, 1:])))


class AlignZegEncoderLayer(GradientCheckpointingLayer):
    """Self-attention and feed-forward. Keys and values are means of cells (spatial reduction, PVT, Wang et al. 2021)."""

    def __init__(self, config: AlignZegConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = AlignZegSelfAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = AlignZegMLP(config, config.hidden_size, config.intermediate_size, config.hidden_size)

    def forward(self, features: Tensor, pool, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """`features (B, T, d)`; `pool` maps them to `(B, T', d)`, which `attention_mask (B, 1, 1, T')` belongs to."""
        states = self.attention_norm(features)
        pooled = pool(states)
        features = features + self.attention(states, pooled, pooled, attention_mask, **kwargs)[0]
        return features + self.mlp(self.mlp_norm(features))


# --- MRPE ----------------------------------------------------------------------------------------------------------


class AlignZegRefinementLayer(GradientCheckpointingLayer):
    """One layer of mutually-refined proposal extraction (docs/method.md)::

        Q <- Q + CrossAttn(Q, F);  Q <- Q + SelfAttn(Q);  Q <- Q + FFN(Q)      features refine queries
        F <- F + CrossAttn(F, Q);  F <- F + FFN(F)                             queries refine features

    Without `mutual_refinement` the second line does not exist, which leaves a MaskFormer decoder layer.
    """

    def __init__(self, config: AlignZegConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.query_cross_norm = nn.LayerNorm(width, eps=eps)
        self.feature_norm = nn.LayerNorm(width, eps=eps)
        self.query_cross_attention = AlignZegAttention(config)
        self.query_self_norm = nn.LayerNorm(width, eps=eps)
        self.query_self_attention = AlignZegAttention(config)
        self.query_mlp_norm = nn.LayerNorm(width, eps=eps)
        self.query_mlp = AlignZegMLP(config, width, config.intermediate_size, width)
        self.mutual = config.mutual_refinement
        if self.mutual:
            self.feature_cross_norm = nn.LayerNorm(width, eps=eps)
            self.refined_query_norm = nn.LayerNorm(width, eps=eps)
            self.feature_cross_attention = AlignZegAttention(config)
            self.feature_mlp_norm = nn.LayerNorm(width, eps=eps)
            self.feature_mlp = AlignZegMLP(config, width, config.intermediate_size, width)

    def forward(
        self,
        queries: Tensor,
        features: Tensor,
        query_position: Tensor,
        feature_position: Tensor,
        attention_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """`queries (B, N, d)`, `features (B, T, d)`; positions are added where attention compares, not to what it moves."""
        context = self.feature_norm(features)
        queries = (
            queries
            + self.query_cross_attention(
                self.query_cross_norm(queries) + query_position, context + feature_position, context, attention_mask
            )[0]
        )
        states = self.query_self_norm(queries)
        placed = states + query_position
        queries = queries + self.query_self_attention(placed, placed, states)[0]
        queries = queries + self.query_mlp(self.query_mlp_norm(queries))
        if self.mutual:
            context = self.refined_query_norm(queries)
            features = (
                features
                + self.feature_cross_attention(
                    self.feature_cross_norm(features) + feature_position, context + query_position, context
                )[0]
            )
            features = features + self.feature_mlp(self.feature_mlp_norm(features))
        return queries, features


class AlignZegMaskHead(nn.Module):
    """Masks `M = MLP_q(Q) · MLP_f(F↑)ᵀ`: features return to `mask_stride` along the stem's finer stages."""

    def __init__(self, config: AlignZegConfig, stem_widths: list[int]):
        super().__init__()
        self.feature_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feature_projection = nn.Linear(config.hidden_size, config.mask_dim)
        finer = stem_widths[:-1][::-1]
        self.laterals = nn.ModuleList([nn.Conv2d(width, config.mask_dim, 1) for width in finer])
        self.convolutions = nn.ModuleList([nn.Conv2d(config.mask_dim, config.mask_dim, 3, padding=1) for _ in finer])
        self.activation = ACT2FN[config.hidden_act]
        self.output = nn.Conv2d(config.mask_dim, config.mask_dim, 1)
        self.query_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.query_mlp = AlignZegMLP(config, config.hidden_size, config.hidden_size, config.mask_dim, num_layers=3)

    def features(
        self, features: Tensor, stages: list[Tensor], grid: tuple[int, int], strides: list[int], content
    ) -> Tensor:
        """`(B, T, d)` on `grid` to mask features `(B, mask_dim, H / mask_stride, W / mask_stride)`; for
        inference without their last, linear layer, which [`forward`] then applies to the queries: they are fewer."""
        states = self.feature_projection(self.feature_norm(features)).transpose(1, 2).unflatten(2, grid)
        finer = list(zip(stages, strides))[:-1][::-1]
        coarse_stride = strides[-1]
        for (stage, stride), lateral, convolution in zip(finer, self.laterals, self.convolutions):
            cells = [None if content is None else torch.ceil(content / s) for s in (coarse_stride, stride)]
            states = resample_grid(states, stage.shape[-2:], *cells) + lateral(stage)
            if content is not None:
                states = states * content_cells(content, stride, states.shape[-2:])[:, None].to(states.dtype)
            states = states + self.activation(convolution(states))
            coarse_stride = stride
        return self.output(states) if self.training else states

    def forward(self, queries: Tensor, mask_features: Tensor) -> Tensor:
        """`(B, N, d)` and `(B, c, h, w)` to mask logits `(B, N, h, w)`."""
        kernels, size = self.query_mlp(self.query_norm(queries)), mask_features.shape[-2:]
        mask_features = mask_features.flatten(2)
        if self.training:
            return (kernels @ mask_features).unflatten(2, size)
        bias = (kernels @ self.output.bias)[..., None]
        return torch.baddbmm(bias, kernels @ self.output.weight[:, :, 0, 0], mask_features).unflatten(2, size)


# --- proposal embeddings -------------------------------------------------------------------------------------------


class AlignZegAttentionBias(nn.Module):
    """Where each proposal looks in CLIP's last layers, per CLIP head, on CLIP's grid: `MLP_q(Q) · MLP_a(F) + α·log σ(M)`.

    The second term starts the search inside the proposal's own mask. Masks are detached: they stay class-agnostic.
    """

    def __init__(self, config: AlignZegConfig):
        super().__init__()
        self.num_heads = config.vision_config.num_attention_heads
        # Mask cells on a side of one of CLIP's patches. Where it is whole, pooling needs no size, which exports ask for.
        whole = config.clip_stride % config.mask_stride == 0
        self.cells = config.clip_stride // config.mask_stride if whole else None
        channels = self.num_heads * config.attention_bias_dim
        self.query_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.query_mlp = AlignZegMLP(config, config.hidden_size, config.hidden_size, channels)
        self.feature_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feature_mlp = AlignZegMLP(config, config.hidden_size, config.hidden_size, channels)
        self.mask_scale = nn.Parameter(torch.empty(self.num_heads)) if config.mask_guided_attention else None

    def forward(self, queries: Tensor, features: Tensor, masks: Tensor, grid: tuple[int, int]) -> Tensor:
        """Queries `(B, N, d)`, features pooled to CLIP's grid `(B, P, d)`, mask logits `(B, N, h, w)` and CLIP's `grid`
        to a bias `(B, heads, N, P)`."""

        def split(states):
            return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        queries = split(self.query_mlp(self.query_norm(queries)))
        features = split(self.feature_mlp(self.feature_norm(features)))
        bias = queries @ features.mT * queries.shape[-1] ** -0.5
        if self.mask_scale is not None:
            if self.cells is not None:
                inside = F.avg_pool2d(masks.detach(), self.cells)
            else:
                inside = F.adaptive_avg_pool2d(masks.detach(), grid)
            inside = F.logsigmoid(inside).flatten(2)  # (B, N, P)
            bias = bias + self.mask_scale[:, None, None] * inside[:, None]
        return bias


def attend_in_layer(
    layer: nn.Module,
    states: Tensor,
    normed: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    queries: int,
) -> Tensor:
    """A frozen CLIP layer for `states (B, n, Dv)`, of which `normed` is the first norm, over projected `keys` and
    `values (B, m, Dv)`, with an additive `mask` that broadcasts to `(B, heads, queries, m)`. n may be 1 for `queries`
    equal states."""
    attention = layer.self_attn

    def split(states):
        return states.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)

    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    output, _ = attend(
        attention,
        split(attention.q_proj(normed).expand(-1, queries, -1).contiguous()),
        split(keys),
        split(values),
        mask,
        scaling=attention.scale,
        dropout=0.0,
    )
    states = states + attention.out_proj(output.flatten(2))
    return states + layer.mlp(layer.layer_norm2(states))


def patch_layer(layer: nn.Module, states: Tensor, mask: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One frozen CLIP layer for CLS and patches, `(B, 1 + P, Dv)`, and its keys and values for [`shadow_layer`]."""
    normed = layer.layer_norm1(states)
    keys, values = layer.self_attn.k_proj(normed), layer.self_attn.v_proj(normed)
    return attend_in_layer(layer, states, normed, keys, values, mask, states.shape[1]), (keys, values)


def shadow_layer(
    layer: nn.Module,
    shadow: Tensor,
    clip_state: Tensor,
    bias: Tensor,
    keys_values: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """One frozen CLIP layer for the shadow tokens only.

    A shadow token attends to itself and, with `bias`, to the patches; nothing attends to it. The patches' own states
    are an input: they do not depend on the shadow tokens and are computed once.

    Args:
        layer: A `CLIPEncoderLayer`.
        shadow: `(B, N, Dv)`, or `(B, 1, Dv)` where all N are still equal, as before the first of these layers.
        clip_state: `(B, 1 + P, Dv)`, the layer's input for CLS and patches.
        bias: `(B, heads, N, P + N)`, additive; the last N columns let each shadow token see itself alone.
        keys_values: Those of CLS and patches, where [`patch_layer`] has computed them.
    """
    normed = layer.layer_norm1(shadow)
    if keys_values is None:
        patches = layer.layer_norm1(clip_state[:, 1:])
        keys_values = layer.self_attn.k_proj(patches), layer.self_attn.v_proj(patches)
    else:
        keys_values = (states[:, 1:] for states in keys_values)
    keys, values = (
        torch.cat([states, projection(normed).expand(-1, bias.shape[2], -1)], 1)
        for states, projection in zip(keys_values, (layer.self_attn.k_proj, layer.self_attn.v_proj))
    )
    return attend_in_layer(layer, shadow, normed, keys, values, bias, bias.shape[2])


class AlignZegAdapter(nn.Module):
    """Trainable end of the proposal embeddings: `x <- x̂ + MLP(x̂, q)`; the identity at the start of training.

    With `query_fusion` the MLP reads the refined mask query `q` beside the frozen embedding `x̂`.
    """

    def __init__(self, config: AlignZegConfig):
        super().__init__()
        self.embed_dim = config.projection_dim
        self.query_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.query_fusion else None
        inputs = config.projection_dim + (config.hidden_size if config.query_fusion else 0)
        self.mlp = AlignZegMLP(config, inputs, config.adapter_dim, config.projection_dim)

    def inputs(self, embeds: Tensor, queries: Tensor) -> Tensor:
        """Unit embeddings `(..., D)` and refined queries `(..., d)` to what [`forward`] reads, embeddings first."""
        return embeds if self.query_norm is None else torch.cat([embeds, self.query_norm(queries)], -1)

    def forward(self, inputs: Tensor) -> Tensor:
        """`(..., D + d)`, or `(..., D)` without `query_fusion`, to unit embeddings `(..., D)`."""
        return F.normalize(inputs[..., : self.embed_dim] + self.mlp(inputs), dim=-1)


# --- GEPC and PBC --------------------------------------------------------------------------------------------------


class AlignZegBackgroundPrototypes(nn.Module):
    """Background diversity strategy: `logsumexp_k τ·cos(x, b_k)` over K learned prototypes."""

    def __init__(self, config: AlignZegConfig):
        super().__init__()
        count = config.num_background_prototypes if config.background_diversity else 1
        self.prototypes = nn.Parameter(torch.empty(count, config.projection_dim))

    def forward(self, embeds: Tensor, scale: Tensor) -> Tensor:
        """Unit embeddings `(..., D)` to background logits `(...)`."""
        return (scale * embeds @ F.normalize(self.prototypes, dim=-1).T).logsumexp(-1)


class AlignZegClassIndicator(nn.Module):
    """`φ_bc`: does a proposal show an unseen class?

    Where an embedding lies says nothing about seen or unseen; what it resembles does. So the indicator reads, from the
    logits before and after the adapter: the best seen class, the margin of the best other candidate over it, the
    entropy over seen classes, and the background.
    """

    num_statistics = 7

    def __init__(self, config: AlignZegConfig):
        super().__init__()
        self.use_embedding = config.indicator_embedding
        inputs = self.num_statistics + (config.projection_dim if self.use_embedding else 0)
        self.mlp = AlignZegMLP(config, inputs, config.indicator_dim, 1)

    @staticmethod
    def statistics(
        clip_logits: Tensor, logits: Tensor, background: Tensor, seen: Tensor, candidates: Tensor
    ) -> Tensor:
        """Relative evidence for "unseen".

        Args:
            clip_logits: `(..., C)` class logits of the frozen embedding.
            logits: `(..., C)` class logits of the adapted embedding.
            background: `(...)` background logit.
            seen: `bool (C,)` or `(..., C)`, classes that count as seen.
            candidates: likewise, the other names a proposal may have.

        Returns:
            `(..., 7)`, of the order of one.
        """
        parts = []
        for values in (clip_logits.float(), logits.float()):
            best_seen = values.masked_fill(~seen, -1e4).amax(-1)
            # Without a candidate nothing can be unseen: the margin is that of a class opposite to the embedding.
            best_other = torch.where(candidates.any(-1), values.masked_fill(~candidates, -1e4).amax(-1), -100.0)
            distribution = values.masked_fill(~seen, -1e4).log_softmax(-1)
            entropy = -(distribution.exp() * distribution).sum(-1)
            parts += [best_seen / 10, ((best_other - best_seen) / 10).clamp(-10, 10), entropy]
        parts.append((background.float() - best_seen) / 10)
        return torch.stack(parts, -1)

    def forward(self, statistics: Tensor, embeds: Tensor) -> Tensor:
        """Statistics `(..., 7)` and unit embeddings `(..., D)`, both detached, to logits `(...)`."""
        states = statistics.to(embeds.dtype)  # not that of the weights, which may be quantized
        if self.use_embedding:
            states = torch.cat([states, embeds], -1)
        return self.mlp(states)[..., 0]


# --- the model -----------------------------------------------------------------------------------------------------


class LibraryInitialization:
    """A model outside of transformers whose weights are initialised like one inside.

    For custom code, transformers passes over modules that hold no tensor of their own, because such code may write
    tensors in place. `_init_weights` below never does, and what starts the adapter and CLIP's attention and MLPs are
    such modules.
    """

    @classmethod
    def is_custom_code(cls) -> bool:
        return False


class AlignZegVisionModel(LibraryInitialization, CLIPVisionModel):
    """CLIP's vision tower. Its hidden states and attentions are not those that AlignZeg returns."""

    _can_record_outputs = {}


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
        "AlignZegEncoderLayer",
        "AlignZegRefinementLayer",
        "AlignZegImageStem",
    ]
    _can_record_outputs = {"hidden_states": AlignZegEncoderLayer, "attentions": AlignZegSelfAttention}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
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
        ):  # what queries add to features starts at none
            init.zeros_(module.feature_cross_attention.out_proj.weight)
            init.zeros_(module.feature_mlp.layers[-1].weight)
        elif isinstance(module, AlignZegAttentionBias) and module.mask_scale is not None:
            init.ones_(module.mask_scale)
        elif isinstance(module, AlignZegBackgroundPrototypes):
            init.normal_(module.prototypes, std=self.config.projection_dim**-0.5)
        elif isinstance(module, AlignZegModel):
            init.normal_(module.query_embeddings)
            init.trunc_normal_(module.query_position, std=std)
            init.trunc_normal_(module.position_embedding, std=std)
            init.normal_(module.visual_projection.weight, std=self.config.vision_config.hidden_size**-0.5)
            init.normal_(module.text_projection.weight, std=self.config.text_config.hidden_size**-0.5)
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            init.copy_(module.class_text_embeds, module._placeholder_prototypes())
            init.copy_(module.seen_class_mask, module._seen_classes_of_config())


class AlignZegModel(AlignZegPreTrainedModel):
    r"""
    AlignZeg with all its parts. The CLIP towers are frozen and carry no gradient; everything else is trainable.

    The vocabulary, `config.id2label` and its text prototypes, is stored with the weights, so that the model runs on
    images alone. Other class names are an argument of a call:

        prototypes = model.get_text_prototypes(processor, ["red striped", "blue dotted"])
        outputs = model(**processor(images=image, return_tensors="pt"), text_prototypes=prototypes)
    """

    def __init__(self, config: AlignZegConfig):
        super().__init__(config)
        self.vision_model = AlignZegVisionModel._from_config(config.vision_config)
        self.text_model = CLIPTextModel._from_config(config.text_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))

        # torch.compile takes numbers of a module as they are, those of a config as variables.
        self.clip_stride, self.size_divisor = config.clip_stride, config.size_divisor
        width = config.hidden_size
        self.stem = AlignZegImageStem(config)
        base_grid = max(config.image_size // config.patch_size, 1)
        self.position_embedding = nn.Parameter(torch.empty(1, width, base_grid, base_grid))
        self.fusions = nn.ModuleList([AlignZegFusion(config) for _ in config.fusion_layers])
        self.encoder_layers = nn.ModuleList([AlignZegEncoderLayer(config) for _ in range(config.num_hidden_layers)])

        self.query_embeddings = nn.Parameter(torch.empty(config.num_queries, width))
        self.query_position = nn.Parameter(torch.empty(config.num_queries, width))
        self.refinement_layers = nn.ModuleList(
            [AlignZegRefinementLayer(config) for _ in range(config.num_refinement_layers)]
        )
        self.mask_head = AlignZegMaskHead(config, self.stem.widths)

        self.attention_bias = AlignZegAttentionBias(config)
        self.adapter = AlignZegAdapter(config)
        self.background = AlignZegBackgroundPrototypes(config)
        self.indicator = AlignZegClassIndicator(config) if config.bias_correction else None

        self.register_buffer("class_text_embeds", self._placeholder_prototypes())
        self.register_buffer("seen_class_mask", self._seen_classes_of_config())
        self._prototype_cache: OrderedDict = OrderedDict()
        self.freeze_clip()
        self.post_init()

    # --- frozen parts

    def freeze_clip(self) -> None:
        """Takes the CLIP towers, their projections and the temperature out of training."""
        for part in (self.vision_model, self.text_model, self.visual_projection, self.text_projection):
            part.requires_grad_(False)
        self.logit_scale.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As [`PreTrainedModel.from_pretrained`], which makes every loaded weight trainable: CLIP stays frozen.

        Raises:
            OSError: also where a weight file is damaged.
            RuntimeError: weights have other shapes than the config says.
        """
        source = str(args[0] if args else kwargs.get("pretrained_model_name_or_path"))
        try:
            loaded = super().from_pretrained(*args, **kwargs)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            tolerant = {**kwargs, "ignore_mismatched_sizes": True, "output_loading_info": True}
            misfits = sorted(super().from_pretrained(*args, **tolerant)[1]["mismatched_keys"])
            name, found, expected = misfits[0]
            raise RuntimeError(
                f"The weights of {source!r} do not fit its config.json: {name} has shape {tuple(found)} and the config asks "
                f"for {tuple(expected)}; {len(misfits)} weights differ. The file was edited or belongs to another "
                "checkpoint: restore it, or pass `ignore_mismatched_sizes=True` to draw these weights anew."
            ) from error
        except Exception as error:
            if type(error).__name__ != "SafetensorError":  # its library is none that this file may import
                raise
            raise OSError(
                f"The weights of {source!r} cannot be read ({error}): a .safetensors file is truncated or damaged. "
                "Copy or download it again."
            ) from error
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze_clip()
        return loaded

    def get_input_embeddings(self) -> nn.Module:
        return self.stem.convolutions[0]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.stem.convolutions[0] = value

    # --- vocabulary

    def _placeholder_prototypes(self) -> Tensor:
        """`(C, D)` until [`set_vocabulary`] is called: one axis of the joint space for each class, as far as they go."""
        return torch.eye(self.config.num_labels, self.config.projection_dim)

    def _seen_classes_of_config(self) -> Tensor:
        check_id2label(self.config.id2label)
        names = [self.config.id2label[i] for i in range(self.config.num_labels)]
        return torch.tensor([name not in self.config.unseen_labels for name in names])

    @torch.no_grad()
    def text_prototypes_from_ids(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Unit prototypes `(C, D)` of tokenized prompts `(C, L)`, or of `(C, templates, L)`: the mean over templates,
        normalized before and after.

        Raises:
            ValueError: they are no whole numbers of such a shape, or `attention_mask` has another one.
        """
        device = self.query_embeddings.device
        hint = "The AlignZegProcessor makes both from class names: `processor(text=names, return_tensors='pt')`."
        check_tensor("input_ids", input_ids, "whole numbers", device, hint)
        if input_ids.ndim not in (2, 3) or 0 in input_ids.shape:
            raise ValueError(
                f"`input_ids` has shape {tuple(input_ids.shape)}; expected (classes, length) or (classes, templates, "
                f"length) with no empty axis. {hint}"
            )
        if attention_mask is not None:
            check_tensor("attention_mask", attention_mask, "real numbers", device, hint)
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"`attention_mask` has shape {tuple(attention_mask.shape)}; expected that of `input_ids`, "
                    f"{tuple(input_ids.shape)}. {hint}"
                )
        prompts = input_ids.reshape(-1, input_ids.shape[-1])
        mask = attention_mask.reshape(prompts.shape) if attention_mask is not None else None
        pooled = self.text_model(input_ids=prompts, attention_mask=mask).pooler_output
        embeds = F.normalize(self.text_projection(pooled), dim=-1)
        return F.normalize(embeds.unflatten(0, (input_ids.shape[0], -1)).mean(1), dim=-1)

    def get_text_prototypes(
        self, processor, class_names: list[str], template_set: str | list[str] | None = None, batch_size: int = 256
    ) -> Tensor:
        """Text prototypes of class names, in the caller's order.

        Args:
            processor: The [`AlignZegProcessor`] of the checkpoint.
            class_names: Distinct, non-empty names.
            template_set: Name of a set in `TEMPLATE_SETS` or a list of sentences with one `{}` each; default
                `config.template_set`.
            batch_size: Prompts per pass of the text tower.

        Returns:
            Unit vectors `(C, D)`, the caller's own. They are cached: names, templates and the text tower's weights are the
            key.

        Raises:
            ValueError: no names, an empty name, a name twice, a template set that does not exist, or a tokenizer that
                is not that of the text tower.
        """
        class_names = check_class_names(class_names)
        templates = get_templates(self.config.template_set if template_set is None else template_set)
        key = (tuple(class_names), templates, self._text_weights_key())
        if key not in self._prototype_cache:
            if not hasattr(processor, "encode_class_names"):
                raise ValueError(
                    f"`processor` is a {type(processor).__name__}; expected the AlignZegProcessor of the checkpoint, as "
                    "from AutoProcessor.from_pretrained."
                )
            known, size = len(processor.tokenizer), self.config.text_config.vocab_size
            if 2 * known < size:  # there are text towers with a few unused rows, and tokenizers with added tokens
                raise ValueError(
                    f"The tokenizer of `processor` knows {known} tokens and the text tower {size}: the file tokenizer.json "
                    "(or vocab.json and merges.txt) is missing in the checkpoint, or belongs to another one. Copy it there "
                    "from the CLIP that the checkpoint was made of, and load the processor again."
                )
            encoded = processor.encode_class_names(class_names, template_set=templates)
            ids, mask = encoded["input_ids"], encoded["attention_mask"]
            if ids.max() >= size:
                raise ValueError(
                    f"The tokenizer of `processor` gives the token id {ids.max()}, but the text tower knows {size} tokens: "
                    "it is that of another checkpoint. Load the processor from the folder of the model."
                )
            ids, mask = ids.to(self.device), mask.to(self.device)
            rows = max(1, batch_size // len(templates))
            parts = zip(ids.split(rows), mask.split(rows))
            with torch.inference_mode(False):  # what is returned may meet a training step
                self._prototype_cache[key] = torch.cat([self.text_prototypes_from_ids(*part) for part in parts])
            while len(self._prototype_cache) > 16:
                self._prototype_cache.popitem(last=False)
        self._prototype_cache.move_to_end(key)
        with torch.inference_mode(False):
            return self._prototype_cache[key].clone()

    def _text_weights_key(self) -> tuple:
        """Changes with the weights of the text tower, also where they are written through `.data`, which does not count
        as a version: then their norms differ."""
        weights = (self.text_projection.weight, *self.text_model.parameters())
        weights = [
            w for w in weights if w.is_floating_point() and w.device.type != "meta"
        ]  # neither quantized nor offloaded
        norms = [
            torch.linalg.vector_norm(w.detach(), dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights
        ]
        places = tuple((w.data_ptr(), w._version, w.dtype, w.device) for w in weights)
        devices = {norm.device for norm in norms}  # one transfer from each
        return places, tuple(
            tuple(torch.stack([n.double() for n in norms if n.device == device]).tolist()) for device in devices
        )

    def set_vocabulary(
        self,
        class_names: list[str],
        unseen: list[str] = (),
        processor=None,
        template_set: str | list[str] | None = None,
        text_prototypes: Tensor | None = None,
    ) -> None:
        """Makes `class_names` the vocabulary that is used by default and saved with the checkpoint.

        Args:
            class_names: Names in the order of their ids.
            unseen: Those of them that count as unseen.
            processor: Needed unless `text_prototypes (C, D)` are given.
            template_set: As for [`get_text_prototypes`]; the name of a set is stored in the config.

        Raises:
            ValueError: `class_names` is empty or holds an empty name or one twice, `unseen` names something that is not
                among them, neither processor nor prototypes came, or the prototypes do not fit or are not finite.
                Nothing has changed then.
        """
        class_names = check_class_names(class_names)
        unseen = check_unseen_names(unseen)
        unknown = [name for name in unseen if name not in class_names]
        if unknown:
            raise ValueError(f"`unseen` names {unknown[0]!r}, which is not among the {len(class_names)} class names.")
        if text_prototypes is None:
            if processor is None:
                raise ValueError("Pass `processor` (the checkpoint's AlignZegProcessor), or ready `text_prototypes`.")
            text_prototypes = self.get_text_prototypes(processor, class_names, template_set)
        elif template_set is not None:
            get_templates(template_set)
        with contextlib.suppress(TypeError, ValueError, RuntimeError):  # what cannot become a tensor is named next
            text_prototypes = torch.as_tensor(text_prototypes)
        self._check_prototypes(text_prototypes)
        check_tensor("text_prototypes", text_prototypes, "floating-point numbers")  # with values
        if not text_prototypes.isfinite().all():
            raise ValueError("`text_prototypes` hold NaN or infinite values; expected unit vectors.")
        if len(text_prototypes) != len(class_names):
            raise ValueError(
                f"`text_prototypes` has {len(text_prototypes)} rows for the {len(class_names)} names in `class_names`; "
                "pass one row for each."
            )
        prototypes = text_prototypes.detach().clone().to(self.class_text_embeds)
        seen = torch.tensor([name not in unseen for name in class_names], device=self.seen_class_mask.device)
        if isinstance(template_set, str):
            self.config.template_set = template_set
        self.config.id2label = dict(enumerate(class_names))
        self.config.label2id = {name: i for i, name in enumerate(class_names)}
        self.config.unseen_labels = unseen
        self.class_text_embeds, self.seen_class_mask = prototypes, seen

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As [`PreTrainedModel.save_pretrained`]. The folder loads with AutoModelForSemanticSegmentation too, and with the
        pipeline: what is imported here travels along."""
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

    def _check_prototypes(self, text_prototypes: Tensor) -> None:
        hint = "`model.get_text_prototypes(processor, names)` makes them."
        check_tensor("text_prototypes", text_prototypes, "floating-point numbers", self.query_embeddings.device, hint)
        if (
            text_prototypes.ndim != 2
            or text_prototypes.shape[0] == 0
            or text_prototypes.shape[1] != self.config.projection_dim
        ):
            raise ValueError(
                f"`text_prototypes` has shape {tuple(text_prototypes.shape)}; expected (classes, "
                f"{self.config.projection_dim}) with at least one class. {hint}"
            )

    # --- forward

    def clip_hidden_states(self, pixel_values: Tensor, content: Tensor | None = None) -> dict[int, Tensor]:
        """The frozen CLIP features that the model reads: layer index to `(B, 1 + P, Dv)`, in the order of
        `config.clip_hidden_state_layers`. The last layer's patches are never computed: nothing reads them.

        Args:
            pixel_values: `(B, 3, H, W)`, sides multiples of `config.size_divisor`.
        """
        return self._run_clip(pixel_values, content)[0]

    def _run_clip(
        self, pixel_values: Tensor, content: Tensor | None
    ) -> tuple[dict[int, Tensor], dict[int, tuple[Tensor, Tensor]]]:
        """The features of [`clip_hidden_states`], and keys and values of the recognition layers that were run."""
        embeddings, stride = self.vision_model.embeddings, self.clip_stride
        grid = [side // stride for side in pixel_values.shape[-2:]]
        if self.config.clip_input_scale != 1:
            size = [cells * embeddings.patch_size for cells in grid]
            pixel_values = F.interpolate(pixel_values, size=size, mode="bilinear", align_corners=False)
        patches = embeddings.patch_embedding(pixel_values.to(embeddings.patch_embedding.weight.dtype))
        table = embeddings.position_embedding.weight
        side = int(round((table.shape[0] - 1) ** 0.5))
        position = table[1:].T.reshape(1, -1, side, side)
        cells = None if content is None else torch.ceil(content / stride)
        position = resample_grid(position, grid, target=cells, mode="bicubic")
        tokens = (patches + position).flatten(2).transpose(1, 2)
        first = (embeddings.class_embedding + table[0]).expand(tokens.shape[0], 1, -1)
        states, mask = torch.cat([first, tokens], 1), None
        if content is not None:
            visible = content_cells(content, stride, grid).flatten(1)
            mask = key_mask(F.pad(visible, (1, 0), value=True), states.dtype)
        states = self.vision_model.pre_layrnorm(states)
        wanted, kept, keys_values = self.config.clip_hidden_state_layers, {}, {}
        for index, layer in enumerate(self.vision_model.encoder.layers):
            if index in wanted:
                kept[index] = states
            if index == wanted[-1]:
                break
            if index < self.config.clip_split_layer:
                states = layer(states, mask)
            else:
                states, keys_values[index] = patch_layer(layer, states, mask)
        return kept, keys_values

    def _content(self, pixel_mask: Tensor | None, size: tuple[int, int]) -> tuple[Tensor | None, bool]:
        """Heights and widths in pixels `(B, 2)`, and whether a cell of some grid holds no content at all."""
        if pixel_mask is None:
            return None, False
        content = torch.stack([pixel_mask.any(2).sum(1), pixel_mask.any(1).sum(1)], 1)
        if torch.compiler.is_compiling():
            return content, True
        smallest = content.amin(0).tolist()
        if min(smallest) == 0:
            raise ValueError("`pixel_mask` marks an image of the batch as nothing but padding; leave that image out.")
        stride = self.config.mask_stride
        return content, any(math.ceil(c / stride) * stride < s for c, s in zip(smallest, size))

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
        clip_hidden_states: Tensor | dict[int, Tensor] | None = None,
        output_auxiliary_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AlignZegOutput:
        r"""
        Args:
            pixel_values: `(B, 3, H, W)`, normalized with CLIP's mean and standard deviation. Any size.
            pixel_mask: `(B, H, W)`, 1 on the image, 0 on padding at the bottom and right.
            mask_labels: For each image `(n, H, W)`, one binary mask per class in it. Pixels in no mask are unlabelled.
            class_labels: For each image `int64 (n,)`, indices into the text prototypes.
            text_prototypes: Unit vectors `(C, D)`; default the stored vocabulary's.
            input_ids, attention_mask: Tokenized class prompts `(C, L)` or `(C, templates, L)`, instead of prototypes.
            seen_class_mask: `bool (C,)`, which classes count as seen. Default: the vocabulary's; with other classes, all.
            clip_hidden_states: What [`clip_hidden_states`] gave for these pixels earlier, or `(B, layers, 1 + P, Dv)`.
            output_auxiliary_logits: Whether to return the masks of the MRPE layers before the last.

        Raises:
            ValueError: an argument is missing or does not fit; the message names it.
        """
        channels, device = self.config.num_channels, self.query_embeddings.device
        hint = "The AlignZegImageProcessor makes it from images."
        check_tensor("pixel_values", pixel_values, "floating-point numbers", device, hint)
        if pixel_values.ndim != 4 or 0 in pixel_values.shape or pixel_values.shape[1] != channels:
            raise ValueError(
                f"`pixel_values` must have shape (batch, {channels}, height, width) with no empty axis, got "
                f"{tuple(pixel_values.shape)}. {hint}"
            )
        if pixel_mask is not None:
            check_tensor("pixel_mask", pixel_mask, "real numbers", device, hint)
        if pixel_mask is not None and pixel_mask.shape != (pixel_values.shape[0], *pixel_values.shape[-2:]):
            raise ValueError(
                f"`pixel_mask` has shape {tuple(pixel_mask.shape)}; expected (batch, height, width) of `pixel_values`, "
                f"{(pixel_values.shape[0], *pixel_values.shape[-2:])}."
            )
        if (mask_labels is None) != (class_labels is None):
            given, missing = ("mask_labels", "class_labels")[:: -1 if mask_labels is None else 1]
            raise ValueError(f"`{missing}` is missing beside `{given}`; a loss needs both, no loss needs neither.")
        for name, labels in (("mask_labels", mask_labels), ("class_labels", class_labels)):
            if not isinstance(labels, (list, tuple, Tensor, type(None))):
                raise ValueError(f"`{name}` is a {type(labels).__name__}; expected a list with one tensor per image.")
        if mask_labels is not None and len(mask_labels) != pixel_values.shape[0]:
            raise ValueError(
                f"`mask_labels` has {len(mask_labels)} entries for {pixel_values.shape[0]} images; pass one for each image."
            )
        if text_prototypes is None and input_ids is not None:
            text_prototypes = self.text_prototypes_from_ids(input_ids, attention_mask)
        if text_prototypes is None:
            text_prototypes = self.class_text_embeds
            seen_class_mask = self.seen_class_mask if seen_class_mask is None else seen_class_mask
        self._check_prototypes(text_prototypes)
        if seen_class_mask is None:
            seen_class_mask = torch.ones(text_prototypes.shape[0], dtype=torch.bool, device=text_prototypes.device)
        check_tensor(
            "seen_class_mask", seen_class_mask, "True and False", device, "`mask.bool()` makes it of 0 and 1."
        )
        if seen_class_mask.shape != (text_prototypes.shape[0],):
            raise ValueError(
                f"`seen_class_mask` has shape {tuple(seen_class_mask.shape)}; expected ({text_prototypes.shape[0]},), one "
                "entry per text prototype."
            )

        # Pad to whole tokens of both grids.
        height, width = pixel_values.shape[-2:]
        divisor = self.size_divisor
        pad = (0, -width % divisor, 0, -height % divisor)
        if any(pad):
            if pixel_mask is None:
                pixel_mask = torch.ones(
                    pixel_values.shape[0], height, width, dtype=torch.long, device=pixel_values.device
                )
            pixel_values, pixel_mask = F.pad(pixel_values, pad), F.pad(pixel_mask, pad)
        size = pixel_values.shape[-2:]
        content, has_empty_cells = self._content(pixel_mask, size)
        content_sizes = torch.tensor([size], device=pixel_values.device).expand(pixel_values.shape[0], -1)
        if content is not None:  # padding is zero, whatever the caller left there
            content_sizes = content
            pixel_values = pixel_values.masked_fill(~content_cells(content, 1, size)[:, None], 0)
            content = content if has_empty_cells else None
        dtype = self.query_embeddings.dtype
        pixel_values = pixel_values.to(dtype)

        # Frozen CLIP, layers 1..k (and the patches' part of the others).
        layers = self.config.clip_hidden_state_layers
        clip_stride = self.clip_stride
        clip_grid = tuple(side // clip_stride for side in size)
        keys_values = {}
        if clip_hidden_states is None:
            clip, keys_values = self._run_clip(pixel_values, content)
        else:
            expected = (
                pixel_values.shape[0],
                len(layers),
                1 + math.prod(clip_grid),
                self.config.vision_config.hidden_size,
            )
            if isinstance(clip_hidden_states, dict) and list(clip_hidden_states) == layers:
                for layer, states in clip_hidden_states.items():
                    check_tensor(f"clip_hidden_states[{layer}]", states, "floating-point numbers", device)
                clip_hidden_states = torch.stack(list(clip_hidden_states.values()), 1)
            check_tensor("clip_hidden_states", clip_hidden_states, "floating-point numbers", device)
            if clip_hidden_states.shape != expected:
                raise ValueError(
                    f"`clip_hidden_states` has shape {tuple(clip_hidden_states.shape)}; expected {expected} for these "
                    f"`pixel_values`: layers {layers}, one CLS token and {clip_grid[0]} x {clip_grid[1]} patches."
                )
            clip = dict(zip(layers, clip_hidden_states.to(dtype).unbind(1)))

        # Image encoder, fused with CLIP, and MRPE.
        stages = self.stem(pixel_values, content)
        grid = stages[-1].shape[-2:]
        ratio = self.config.sequence_reduction_ratio
        cells = clip_cells = tokens = token_mask = pooled_mask = None
        if content is not None:
            cells, clip_cells = (torch.ceil(content / stride) for stride in (self.config.patch_size, clip_stride))
            tokens = content_cells(content, self.config.patch_size, grid)
            token_mask = key_mask(tokens.flatten(1), dtype)
            pooled_grid = tuple(-(-side // ratio) for side in grid)
            pooled_mask = key_mask(
                content_cells(content, self.config.patch_size * ratio, pooled_grid).flatten(1), dtype
            )
        position = (
            resample_grid(self.position_embedding, grid, target=cells, mode="bicubic").flatten(2).transpose(1, 2)
        )

        def to_side_grid(states):  # (B, P, d) -> (B, T, d)
            states = states.transpose(1, 2).unflatten(2, clip_grid)
            return resample_grid(states, grid, clip_cells, cells).flatten(2).transpose(1, 2)

        def to_clip_grid(states):  # (B, T, d) -> (B, P, d)
            states = states.transpose(1, 2).unflatten(2, grid)
            return resample_grid(states, clip_grid, cells, clip_cells).flatten(2).transpose(1, 2)

        def pool(states):  # (B, T, d) -> (B, T', d)
            if ratio == 1:
                return states
            states = states.transpose(1, 2).unflatten(2, grid)
            return pool_cells(states, ratio, tokens).flatten(2).transpose(1, 2)

        features = stages[-1].flatten(2).transpose(1, 2) + position
        queries = self.query_embeddings.expand(features.shape[0], -1, -1)
        fusions = iter(zip(self.fusions, self.config.fusion_layers))
        for layer in self.encoder_layers:
            for fusion, index in islice(fusions, 1):
                features = fusion(features, clip[index], to_side_grid)
            features = layer(features, pool, pooled_mask, **kwargs)
        queries_per_layer = []
        for layer in self.refinement_layers:
            for fusion, index in islice(fusions, 1):
                features = fusion(features, clip[index], to_side_grid)
            queries, features = layer(queries, features, self.query_position, position, token_mask)
            queries_per_layer.append(queries)
        mask_features = self.mask_head.features(features, stages, grid, self.stem.strides, content)
        wants_auxiliary = output_auxiliary_logits or (mask_labels is not None and self.config.use_auxiliary_loss)
        masks_per_layer = [
            self.mask_head(states, mask_features) for states in (queries_per_layer if wants_auxiliary else [queries])
        ]
        masks, proposal_queries = masks_per_layer[-1], queries
        if self.config.unclaimed_proposal:  # 1 - max σ(M) = σ(-max M)
            masks = torch.cat([masks, -masks.amax(1, keepdim=True)], 1)
            proposal_queries = torch.cat([queries, queries.mean(1, keepdim=True)], 1)

        # Proposal embeddings: shadow tokens through CLIP's layers k+1..L.
        bias = self.attention_bias(proposal_queries, to_clip_grid(features), masks, clip_grid)  # (B, heads, N', P)
        if content is not None:
            bias = bias + key_mask(content_cells(content, clip_stride, clip_grid).flatten(1), bias.dtype)
        number = proposal_queries.shape[1]
        others = ~torch.eye(number, dtype=torch.bool, device=bias.device)
        own = torch.zeros(number, number, dtype=dtype, device=bias.device).masked_fill(others, torch.finfo(dtype).min)
        bias = torch.cat([bias, own.expand(*bias.shape[:2], -1, -1)], -1).to(dtype)
        split = self.config.clip_split_layer
        shadow = clip[split][:, :1]
        for index in range(split, self.config.vision_config.num_hidden_layers):
            layer = self.vision_model.encoder.layers[index]
            shadow = shadow_layer(layer, shadow, clip[index], bias, keys_values.get(index))
        clip_embeds = F.normalize(self.visual_projection(self.vision_model.post_layernorm(shadow)), dim=-1)
        adapter_inputs = self.adapter.inputs(clip_embeds, proposal_queries)
        embeds = self.adapter(adapter_inputs)  # (B, N', D)

        # GEPC: class and background logits. PBC: unseen logits.
        scale = self.logit_scale.exp()
        prototypes = text_prototypes.to(embeds.dtype)
        class_logits = scale * embeds @ prototypes.T
        background_logits = self.background(embeds, scale)
        logits = torch.cat([class_logits, background_logits[..., None]], -1)
        unseen_logits = None
        if self.indicator is not None:
            with torch.no_grad():
                clip_logits = scale * clip_embeds @ prototypes.T
                statistics = self.indicator.statistics(
                    clip_logits, class_logits, background_logits, seen_class_mask, ~seen_class_mask
                )
            unseen_logits = self.indicator(statistics, embeds.detach())
            if self.config.unclaimed_proposal:  # queries learned to claim what is seen: what they leave is not
                some_unseen = (~seen_class_mask).any()
                last = unseen_logits[:, -1:].masked_fill(some_unseen, UNCLAIMED_LOGIT)
                unseen_logits = torch.cat([unseen_logits[:, :-1], last], 1)

        losses = {}
        if mask_labels is not None and class_labels is not None:
            targets = stack_targets(mask_labels, class_labels, tuple(size), seen_class_mask)
            losses = self._losses(
                targets,
                masks_per_layer,
                *(states[:, : self.config.num_queries] for states in (logits, adapter_inputs, embeds)),
                prototypes,
                seen_class_mask,
                content,
            )

        return AlignZegOutput(
            **losses,
            masks_queries_logits=masks,
            class_queries_logits=logits,
            unseen_logits=unseen_logits,
            proposal_embeds=embeds,
            content_sizes=content_sizes.float() / self.config.mask_stride,
            seen_class_mask=seen_class_mask.long().expand(masks.shape[0], -1),
            correction=torch.tensor(
                [[self.config.correction_gamma, self.config.correction_threshold]],
                dtype=torch.float32,
                device=masks.device,
            ).expand(masks.shape[0], -1),
            auxiliary_masks_queries_logits=tuple(masks_per_layer[:-1]) if output_auxiliary_logits else None,
            last_hidden_state=features,
            queries_hidden_state=queries,
        )

    # --- objective

    def _losses(
        self,
        targets: SegmentationTargets,
        masks_per_layer: list[Tensor],
        logits: Tensor,
        adapter_inputs: Tensor,
        embeds: Tensor,
        prototypes: Tensor,
        seen: Tensor,
        content: Tensor | None,
    ) -> dict[str, Tensor]:
        config = self.config
        # The training vocabulary holds seen classes only, whatever the stored one holds.
        logits = torch.cat([logits[..., :-1][..., seen], logits[..., -1:]], -1)
        prototypes = prototypes[seen]
        if len(prototypes) == 0:
            raise ValueError("`seen_class_mask` marks every class as unseen; a loss needs at least one seen class.")
        renumber = seen.long().cumsum(0) - 1
        classes = torch.where(targets.classes >= 0, renumber[targets.classes.clamp(min=0)], -1)
        targets = SegmentationTargets(targets.masks, classes, targets.labelled)

        visible = masks_per_layer[-1]
        if content is not None:
            # What a proposal covers of the padding does not count as unlabelled, and points between the last cell of
            # content and the padding see the former alone.
            cells = torch.ceil(content / config.mask_stride).long()
            visible = visible.masked_fill(~content_cells(cells, 1, visible.shape[-2:])[:, None], -1e4)
            masks_per_layer = [repeat_border(mask_logits, cells) for mask_logits in masks_per_layer]
        masks = masks_per_layer[-1]
        size = targets.labelled.shape[-2:]
        if config.unlabelled_pixels != "exclude":
            margin = config.unlabelled_margin if config.unlabelled_pixels == "nearby" else None
            targets.reach = target_reach(targets.masks, content, margin)
        # Training draws points, mixtures and held-out classes anew in every step; evaluation draws the same ones each
        # time, so that losses of two checkpoints can be compared.
        generator = None if self.training else torch.Generator(masks.device).manual_seed(0)
        num_uncertain, num_random = None, 0
        if config.train_num_points is None:
            points = cell_centres(masks.shape[-2:], size, masks.device).expand(len(masks), -1)
            matching_points = points
        else:
            num_uncertain = int(config.importance_sample_ratio * config.train_num_points)
            num_random = config.train_num_points - num_uncertain
            pool = int(config.oversample_ratio * config.train_num_points)
            points = sample_labelled_points(reached_pixels(targets), pool + num_random, generator)
            matching_points = points[:, : config.train_num_points]
        weights = (config.class_weight, config.mask_weight, config.dice_weight)
        match = match_proposals(masks, logits, targets, matching_points, weights)

        def masks_term(mask_logits):
            return mask_loss(mask_logits, targets, match, points, num_uncertain, num_random)

        loss_mask, loss_dice = masks_term(masks)
        zero = loss_mask.new_zeros(())
        auxiliary = [
            config.mask_weight * mask + config.dice_weight * dice
            for mask, dice in map(masks_term, masks_per_layer[:-1])
        ]
        loss_auxiliary = sum(auxiliary, zero)
        loss_class = classification_loss(
            logits, visible, targets, match, config.no_object_weight, config.ignored_query_threshold
        )
        matched_inputs = adapter_inputs[match.image, match.query]  # (M, D or D + d)
        matched = matched_inputs[:, : config.projection_dim]
        matched_classes = targets.classes[match.image, match.target]
        # Where nothing reads them, none are drawn: how many there are depends on a process's share of the batch, and so
        # would every draw after them.
        virtual = None
        if config.feature_expansion or (self.indicator is not None and config.indicator_positives != "held_out"):
            virtual, virtual_prototypes, mixed = self._virtual_features(
                matched_inputs, embeds[match.image, match.query], matched_classes, prototypes, generator
            )
        scale = self.logit_scale.exp()
        loss_virtual = (
            self._virtual_loss(virtual, mixed, virtual_prototypes, prototypes, scale)
            if config.feature_expansion
            else zero
        )
        loss_diversity = (
            prototype_diversity_loss(self.background.prototypes) if len(self.background.prototypes) > 1 else zero
        )
        loss_indicator = zero
        if self.indicator is not None:
            loss_indicator = self._indicator_loss(
                matched.detach(),
                embeds[match.image, match.query].detach(),
                matched_classes,
                prototypes,
                None if virtual is None else (virtual.detach(), mixed.detach(), virtual_prototypes),
                generator,
            )
        loss = (
            config.indicator_weight * loss_indicator
            + config.class_weight * loss_class
            + config.mask_weight * loss_mask
            + config.dice_weight * loss_dice
            + loss_auxiliary
            + config.virtual_weight * loss_virtual
            + config.diversity_weight * loss_diversity
        )
        return {
            "loss": loss,
            "loss_class": loss_class,
            "loss_mask": loss_mask,
            "loss_dice": loss_dice,
            "loss_auxiliary": loss_auxiliary,
            "loss_virtual": loss_virtual,
            "loss_diversity": loss_diversity,
            "loss_indicator": loss_indicator,
        }

    def _virtual_features(
        self,
        adapter_inputs: Tensor,
        embeds: Tensor,
        classes: Tensor,
        prototypes: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """FES: Manifold Mixup of matched proposals of different classes, `x̃ = λ·x_i + (1−λ)·x_j`.

        Args:
            adapter_inputs: `(M, D or D + d)`, what the adapter reads: frozen embeddings first.
            embeds: `(M, D)`, after the adapter.
            classes: `int64 (M,)`.
            prototypes: `(S, D)`.
            generator: Source of partners and mixing weights; default torch's own.

        Returns:
            Mixtures before the adapter, their virtual prototypes and the mixtures after the adapter, each `(V, D)`.
        """
        partner = torch.randperm(len(classes), generator=generator, device=classes.device)
        alpha = torch.full((len(classes), 2), float(self.config.feature_expansion_alpha), device=classes.device)
        mixing = torch._sample_dirichlet(alpha, generator)[:, :1].to(embeds.dtype)
        pairs = (classes != classes[partner]).nonzero()[:, 0]
        partner, mixing = partner[pairs], mixing[pairs]

        def blend(values):
            return mixing * values[pairs] + (1 - mixing) * values[partner]

        def mix(values):
            return F.normalize(blend(values), dim=-1)

        width = self.config.projection_dim
        virtual = mix(adapter_inputs[:, :width])
        if self.config.feature_expansion_location == "before_adapter":
            mixed = self.adapter(torch.cat([virtual, blend(adapter_inputs[:, width:])], -1))
        else:
            mixed = mix(embeds)
        return virtual, mix(prototypes[classes]), mixed

    def _virtual_loss(
        self, frozen: Tensor, virtual: Tensor, virtual_prototypes: Tensor, prototypes: Tensor, scale: Tensor
    ) -> Tensor:
        """`L_vir` of virtual features, `(V, D)` before and after the adapter, towards the configured target."""
        if self.config.feature_expansion_target == "frozen":
            return frozen_virtual_loss(virtual, frozen, scale)
        background = self.background(virtual, scale)
        if self.config.feature_expansion_target == "reserve":
            return reserve_virtual_loss(virtual, prototypes, background, scale)
        return semantic_virtual_loss(virtual, virtual_prototypes, prototypes, background, scale)

    def _indicator_loss(
        self,
        clip_embeds: Tensor,
        embeds: Tensor,
        classes: Tensor,
        prototypes: Tensor,
        virtual: tuple[Tensor, Tensor, Tensor] | None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """PBC's training episode: some seen classes are left out of "seen" and play the unseen candidates.

        Args:
            clip_embeds, embeds: `(M, D)` matched proposals before and after the adapter, detached.
            classes: `int64 (M,)`.
            prototypes: `(S, D)`.
            virtual: Virtual features before the adapter, their prototypes, and the features after it, each `(V, D)`.
            generator: Source of the held-out classes; default torch's own.
        """
        scale = self.logit_scale.exp()
        number = len(prototypes)
        order = torch.rand(number, generator=generator, device=prototypes.device).argsort()
        held_out = torch.zeros(number, dtype=torch.bool, device=prototypes.device)
        count = max(1, round(self.config.held_out_fraction * number))
        held_out[order[: min(count, number - 1)]] = True  # at least one stays seen

        def statistics(frozen, adapted, own=None):
            seen, candidates = ~held_out, held_out
            logits = [scale * states @ prototypes.T for states in (frozen, adapted)]
            if own is not None:  # one more candidate: the name that the virtual feature would have
                logits = [
                    torch.cat([values, scale * (states * own).sum(-1, keepdim=True)], -1)
                    for values, states in zip(logits, (frozen, adapted))
                ]
                seen, candidates = F.pad(seen, (0, 1), value=False), F.pad(candidates, (0, 1), value=True)
            background = self.background(adapted, scale).detach()
            return self.indicator.statistics(*logits, background, seen, candidates)

        positives = self.config.indicator_positives
        is_unseen = held_out[classes]
        keep = torch.ones_like(is_unseen) if positives != "virtual" else ~is_unseen
        inputs, states, labels = [statistics(clip_embeds, embeds)[keep]], [embeds[keep]], [is_unseen[keep]]
        if positives != "held_out":
            frozen, own, adapted = virtual
            inputs.append(statistics(frozen, adapted, own))
            states.append(adapted)
            labels.append(torch.ones(len(adapted), dtype=torch.bool, device=adapted.device))
        logits = self.indicator(torch.cat(inputs).detach(), torch.cat(states))
        return indicator_loss(logits, torch.cat(labels))


AlignZegModel.register_for_auto_class("AutoModel")

__all__ = ["AlignZegModel", "AlignZegOutput", "AlignZegPreTrainedModel"]
