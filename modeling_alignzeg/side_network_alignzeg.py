# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The side network: from pixels and the image tower's features to mask proposals.

pixels ── stem ──┬─ encoder, fused with the tower's hidden states ── MRPE ──┬── mask head ── masks
                 └────────────── finer stages of the stem ─────────────────┘
"""

import math
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_alignzeg import AlignZegConfig
from .layers_alignzeg import (
    AlignZegAttention,
    AlignZegConv2d,
    AlignZegMLP,
    Grid,
    pool_cells,
    resample,
    to_map,
    to_tokens,
)
from .loss_alignzeg import (
    PointSample,
    ProposalMatch,
    SegmentationTargets,
    mask_loss,
    match_proposals,
    sample_points,
    unlabelled_segments,
)


class Level(NamedTuple):
    """A hidden state of the image tower that can be fused: its `stride` in pixels of the input, and its `width`."""

    stride: int
    width: int


class Proposals(NamedTuple):
    """Outputs of the side network.

    Attributes:
        queries: Refined mask queries `(B, N, d)`; with the unclaimed region, whose query is the mean of the others,
            `(B, N + 1, d)`.
        masks: Mask logits `(B, N or N + 1, h, w)`.
        features: Refined features `(B, T, d)` on `grid`.
        masks_per_layer: Mask logits `(B, N, h, w)` of every MRPE layer if requested, otherwise of the last one.
    """

    queries: Tensor
    masks: Tensor
    features: Tensor
    grid: Grid
    masks_per_layer: list[Tensor]


class AlignZegFusion(nn.Module):
    """Fuses a hidden state of the image tower into the side network: LayerNorm, 1x1 projection, resize."""

    def __init__(self, level: Level, width: int):
        super().__init__()
        self.stride = level.stride
        self.norm = nn.LayerNorm(level.width)
        self.projection = nn.Linear(level.width, width)

    def forward(self, values: Tensor, target: Grid) -> Tensor:
        """`values (B, h, w, c)` to `(B, width, *target.size)`."""
        size = tuple(values.shape[1:3])
        tokens = self.projection(
            self.norm(values).flatten(1, 2)
        )  # 3 axes: bitsandbytes' int8 kernel for CPUs takes no more
        return resample(to_map(tokens, size), Grid(size, self.stride, target.content), target)


class AlignZegImageStem(nn.Module):
    """Convolutions from pixels to tokens, whose strides double from `mask_stride` to `patch_size`.

    A convolutional tower's hidden states of these strides are added stage by stage. The finer stages are kept for the
    masks.
    """

    def __init__(self, config: AlignZegConfig, levels: dict[int, Level]):
        super().__init__()
        stages = int(math.log2(config.patch_size // config.mask_stride)) + 1
        self.strides = [config.mask_stride << i for i in range(stages)]
        self.widths = [max(config.hidden_size >> (stages - 1 - i), 8) for i in range(stages - 1)] + [
            config.hidden_size
        ]
        kernel = 2 * config.mask_stride - config.mask_stride % 2
        first = AlignZegConv2d(3, self.widths[0], kernel, config.mask_stride, (kernel - config.mask_stride) // 2)
        following = [AlignZegConv2d(a, b, 3, 2, 1) for a, b in zip(self.widths, self.widths[1:])]
        self.convolutions = nn.ModuleList([first, *following])
        self.norms = nn.ModuleList([nn.LayerNorm(width) for width in self.widths])
        self.fusions = nn.ModuleDict()
        for stride, width in zip(self.strides[:-1], self.widths):
            for index, level in levels.items():
                if level.stride == stride:
                    self.fusions[f"{stride}_{index}"] = AlignZegFusion(level, width)
        self.activation = ACT2FN["gelu"]

    def forward(self, pixel_values: Tensor, tower: dict[int, Tensor], content: Tensor | None) -> list[Tensor]:
        """`(B, 3, H, W)` to one map `(B, width_i, H / stride_i, W / stride_i)` per stage, finest first."""
        stages, states = [], pixel_values.contiguous(memory_format=torch.channels_last)
        for convolution, norm, stride in zip(self.convolutions, self.norms, self.strides):
            states = norm(convolution(states).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            grid = Grid(tuple(states.shape[-2:]), stride, content)
            if stride != self.strides[-1]:
                for key, fusion in self.fusions.items():
                    if fusion.stride == stride:
                        states = states + fusion(tower[int(key.split("_")[1])], grid)
                states = self.activation(states)
            states = grid.clear(states)
            stages.append(states)
        return stages


class AlignZegSelfAttention(AlignZegAttention):
    """The image encoder's attention; a separate class so that `output_attentions` records only this one."""


class AlignZegEncoderLayer(GradientCheckpointingLayer):
    """Self-attention and feed-forward. Keys and values are means of cells (spatial reduction, PVT, Wang et al. 2021)."""

    def __init__(self, config: AlignZegConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size)
        self.attention = AlignZegSelfAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size)
        self.mlp = AlignZegMLP(config.hidden_size, config.intermediate_size, config.hidden_size)

    def forward(
        self, features: Tensor, pool: Callable[[Tensor], Tensor], attention_mask: Tensor | None = None, **kwargs
    ) -> Tensor:
        """`features (B, T, d)`; `pool` maps them to keys `(B, T', d)`, masked by `attention_mask (B, 1, 1, T')`."""
        states = self.attention_norm(features)
        pooled = pool(states)
        features = features + self.attention(states, pooled, pooled, attention_mask, **kwargs)[0]
        return features + self.mlp(self.mlp_norm(features))


class AlignZegRefinementLayer(GradientCheckpointingLayer):
    """One layer of mutually-refined proposal extraction, MRPE (docs/method.md)::

        Q <- Q + CrossAttn(Q, F);  Q <- Q + SelfAttn(Q);  Q <- Q + FFN(Q)      features refine queries
        F <- F + CrossAttn(F, Q);  F <- F + FFN(F)                             queries refine features

    Without `mutual_refinement`, the second line is omitted; the rest is a MaskFormer decoder layer.
    """

    def __init__(self, config: AlignZegConfig):
        super().__init__()
        width = config.hidden_size
        self.query_cross_norm = nn.LayerNorm(width)
        self.feature_norm = nn.LayerNorm(width)
        self.query_cross_attention = AlignZegAttention(config)
        self.query_self_norm = nn.LayerNorm(width)
        self.query_self_attention = AlignZegAttention(config)
        self.query_mlp_norm = nn.LayerNorm(width)
        self.query_mlp = AlignZegMLP(width, config.intermediate_size, width)
        self.mutual = config.mutual_refinement
        if self.mutual:
            self.feature_cross_norm = nn.LayerNorm(width)
            self.refined_query_norm = nn.LayerNorm(width)
            self.feature_cross_attention = AlignZegAttention(config)
            self.feature_mlp_norm = nn.LayerNorm(width)
            self.feature_mlp = AlignZegMLP(width, config.intermediate_size, width)

    def forward(
        self,
        queries: Tensor,
        features: Tensor,
        query_position: Tensor,
        feature_position: Tensor,
        attention_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """`queries (B, N, d)`, `features (B, T, d)`; positions are added to attention queries and keys, not to values."""
        context = self.feature_norm(features)
        placed = self.query_cross_norm(queries) + query_position
        attended, _ = self.query_cross_attention(placed, context + feature_position, context, attention_mask)
        queries = queries + attended
        states = self.query_self_norm(queries)
        placed = states + query_position
        queries = queries + self.query_self_attention(placed, placed, states)[0]
        queries = queries + self.query_mlp(self.query_mlp_norm(queries))
        if self.mutual:
            context = self.refined_query_norm(queries)
            placed = self.feature_cross_norm(features) + feature_position
            features = features + self.feature_cross_attention(placed, context + query_position, context)[0]
            features = features + self.feature_mlp(self.feature_mlp_norm(features))
        return queries, features


class AlignZegMaskHead(nn.Module):
    """Masks `M = MLP_q(Q) · MLP_f(F↑)ᵀ`: features are upsampled to `mask_stride` with the stem's finer stages."""

    def __init__(self, config: AlignZegConfig, stem: AlignZegImageStem):
        super().__init__()
        self.strides = stem.strides
        self.feature_norm = nn.LayerNorm(config.hidden_size)
        self.feature_projection = nn.Linear(config.hidden_size, config.mask_dim)
        finer = stem.widths[:-1][::-1]
        self.laterals = nn.ModuleList([AlignZegConv2d(width, config.mask_dim, 1) for width in finer])
        self.convolutions = nn.ModuleList(
            [AlignZegConv2d(config.mask_dim, config.mask_dim, 3, padding=1) for _ in finer]
        )
        self.activation = ACT2FN["gelu"]
        self.output = AlignZegConv2d(config.mask_dim, config.mask_dim, 1)
        self.query_norm = nn.LayerNorm(config.hidden_size)
        self.query_mlp = AlignZegMLP(config.hidden_size, config.hidden_size, config.mask_dim, num_layers=3)

    def features(self, features: Tensor, grid: Grid, stages: list[Tensor]) -> Tensor:
        """`(B, T, d)` on `grid` to mask features `(B, mask_dim, H / mask_stride, W / mask_stride)`. In inference, the last,
        linear layer is left out, and [`forward`] applies it to the queries, because there are fewer of them."""
        states = to_map(self.feature_projection(self.feature_norm(features)), grid.size)
        finer = list(zip(stages, self.strides))[:-1][::-1]
        for (stage, stride), lateral, convolution in zip(finer, self.laterals, self.convolutions):
            finer_grid = Grid(tuple(stage.shape[-2:]), stride, grid.content)
            states = finer_grid.clear(lateral(stage).add_(resample(states, grid, finer_grid)))
            states = self.activation(convolution(states)).add_(states)
            grid = finer_grid
        return self.output(states) if self.training else states

    def forward(self, queries: Tensor, mask_features: Tensor) -> Tensor:
        """`(B, N, d)` and `(B, c, h, w)` to mask logits `(B, N, h, w)`."""
        kernels, size = self.query_mlp(self.query_norm(queries)), mask_features.shape[-2:]
        mask_features = mask_features.flatten(2)
        if self.training:
            return (kernels @ mask_features).unflatten(2, size)
        bias = (kernels @ self.output.bias)[..., None]
        return torch.baddbmm(bias, kernels @ self.output.weight[:, :, 0, 0], mask_features).unflatten(2, size)


class AlignZegSideNetwork(nn.Module):
    """Makes class-agnostic mask proposals.

    Args:
        levels: The image tower's hidden states, by layer.
    """

    def __init__(self, config: AlignZegConfig, levels: dict[int, Level]):
        super().__init__()
        if missing := [layer for layer in config.fusion_layers if layer not in levels]:
            raise ValueError(
                f"`fusion_layers` contains {missing[0]}; the image tower has the layers {', '.join(map(str, levels))}."
            )
        self.config = config
        width, side = config.hidden_size, max(config.image_size // config.patch_size, 1)
        self.stem = AlignZegImageStem(config, levels)
        self.position_embedding = nn.Parameter(torch.empty(1, width, side, side))
        self.fusions = nn.ModuleList([AlignZegFusion(levels[layer], width) for layer in config.fusion_layers])
        self.encoder_layers = nn.ModuleList([AlignZegEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.query_embeddings = nn.Parameter(torch.empty(config.num_queries, width))
        self.query_position = nn.Parameter(torch.empty(config.num_queries, width))
        self.refinement_layers = nn.ModuleList(
            [AlignZegRefinementLayer(config) for _ in range(config.num_refinement_layers)]
        )
        self.mask_head = AlignZegMaskHead(config, self.stem)

    def forward(
        self,
        pixel_values: Tensor,
        tower: dict[int, Tensor],
        content: Tensor | None,
        every_layer: bool = False,
        **kwargs,
    ) -> Proposals:
        """
        Args:
            pixel_values: `(B, 3, H, W)`, padded.
            tower: Hidden states of the image tower, layer to `(B, h, w, c)`.
            content: `(B, 2)`, see [`Grid`].
            every_layer: Whether to return the masks of all MRPE layers.
        """
        stages = self.stem(pixel_values, tower, content)
        grid = Grid(tuple(stages[-1].shape[-2:]), self.config.patch_size, content)
        position = resample(self.position_embedding, Grid(self.position_embedding.shape[-2:]), grid, mode="bicubic")
        position, key_mask = to_tokens(position).contiguous(), grid.key_mask(pixel_values.dtype)
        fusions = iter(zip(self.fusions, self.config.fusion_layers))

        def fused(features):
            for fusion, layer in islice(fusions, 1):
                features = features + to_tokens(fusion(tower[layer], grid))
            return features

        features = to_tokens(stages[-1]) + position
        features = self._encode(features, grid, fused, **kwargs)
        queries, queries_per_layer = self.query_embeddings.expand(features.shape[0], -1, -1), []
        for layer in self.refinement_layers:
            queries, features = layer(queries, fused(features), self.query_position, position, key_mask)
            queries_per_layer.append(queries)
        mask_features = self.mask_head.features(features, grid, stages)
        if not every_layer:
            queries_per_layer = queries_per_layer[-1:]
        masks_per_layer = [self.mask_head(states, mask_features) for states in queries_per_layer]
        masks = masks_per_layer[-1]
        if self.config.unclaimed_proposal:  # 1 - max σ(M) = σ(-max M)
            masks = torch.cat([masks, -masks.amax(1, keepdim=True)], 1)
            queries = torch.cat([queries, queries.mean(1, keepdim=True)], 1)
        return Proposals(queries, masks, features, grid, masks_per_layer)

    def _encode(self, features: Tensor, grid: Grid, fused: Callable[[Tensor], Tensor], **kwargs) -> Tensor:
        ratio = self.config.sequence_reduction_ratio
        key_mask = grid.coarser(ratio).key_mask(features.dtype)

        def pool(states):
            return states if ratio == 1 else to_tokens(pool_cells(to_map(states, grid.size), ratio, grid))

        for layer in self.encoder_layers:
            features = layer(fused(features), pool, key_mask, **kwargs)
        return features

    def loss(
        self, masks_per_layer: list[Tensor], targets: SegmentationTargets, match: ProposalMatch, points: PointSample
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy and dice of the final masks, and the weighted sum of both over the earlier MRPE layers."""
        entropy, dice = mask_loss(masks_per_layer[-1], targets, match, points)
        auxiliary = entropy.new_zeros(())
        for masks in masks_per_layer[:-1]:
            terms = mask_loss(masks, targets, match, points)
            auxiliary = auxiliary + self.config.mask_weight * terms[0] + self.config.dice_weight * terms[1]
        return entropy, dice, auxiliary

    def unlabelled_loss(
        self,
        masks_per_layer: list[Tensor],
        targets: SegmentationTargets,
        match: ProposalMatch,
        content: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Weighted mask loss of all MRPE layers on unlabelled segments ([`unlabelled_segments`]), which are matched with the
        proposals that are not in `match`. It trains masks of objects that belong to no seen class. Not part of the paper."""
        config, masks = self.config, masks_per_layer[-1]
        segments = unlabelled_segments(targets, config.mask_stride, content)
        points = sample_points(segments, tuple(masks.shape[-2:]), config.train_num_points, generator)
        no_class = masks.new_zeros(*masks.shape[:2], 1)
        weights = (0.0, config.mask_weight, config.dice_weight)
        free = match_proposals(masks, no_class, segments, points.for_matching, weights, taken=match)
        entropy, dice, auxiliary = self.loss(masks_per_layer, segments, free, points)
        return config.mask_weight * entropy + config.dice_weight * dice + auxiliary
