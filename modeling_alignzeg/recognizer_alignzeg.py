# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The proposal recognizer: the frozen image tower, and the computation of proposal embeddings from it.

Every recognizer has the same interface: `levels` (hidden states that the side network may fuse), `hidden_states` (the
    tower's forward pass), `maps` (those hidden states as maps), `forward` (proposal embeddings) and `pool` (embeddings
    of given regions). To add a tower, write a subclass of [`ProposalRecognizer`] and add it to `RECOGNIZERS`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel, TimmWrapperModel
from transformers.activations import QuickGELUActivation
from transformers.models.clip.modeling_clip import CLIPAttention
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

from .checks_alignzeg import check_tensor
from .configuration_alignzeg import AlignZegConfig
from .layers_alignzeg import AlignZegMLP, Grid, attend, resample, to_map, to_tokens
from .side_network_alignzeg import Level, Proposals
from .threads_alignzeg import is_watched


HAS_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
ONEDNN_WEIGHTS = 2**19  # layers with fewer weights are faster in torch


class LibraryInitialization:
    """Makes transformers initialise a custom model's weights like those of a built-in model.

    In custom code, transformers skips modules without tensors of their own, because their initialisation may write
    tensors in place. AlignZeg's `_init_weights` never does, and it must reach such modules: the adapter, and CLIP's
    attention and MLPs.
    """

    @classmethod
    def is_custom_code(cls) -> bool:
        return False


class FrugalQuickGELU(QuickGELUActivation):
    """`x·σ(1.702·x)` with one temporary tensor instead of three. Compilers and exports fuse the plain formula."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(input)
        states = 1.702 * input
        return F.silu(states, inplace=not states.requires_grad).mul_(1 / 1.702)


class AlignZegTowerAttention(CLIPAttention):
    """Self-attention of CLIP's and SigLIP's towers through [`attend`]."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> tuple[Tensor, None]:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        heads = (
            projection(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for projection in projections
        )
        output, _ = attend(self, *heads, attention_mask, scaling=self.scale, dropout=0.0)
        return self.out_proj(output.flatten(2)), None


class AlignZegTowerLinear(nn.Linear):
    """A linear layer of CLIP's and SigLIP's towers. On x86 CPUs, large frozen float32 layers run in oneDNN; torch uses MKL,
    which can take a third longer for a few hundred tokens (docs/experiments.md, Speed)."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not self._runs_in_onednn(input):
            return super().forward(input)
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")

    def _runs_in_onednn(self, input: Tensor) -> bool:
        weight = self.weight
        if not HAS_ONEDNN or weight.numel() < ONEDNN_WEIGHTS:
            return False
        if type(weight) is not nn.Parameter or self.bias is None:  # quantized weights have other types
            return False
        if torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad):
            return False
        is_float = input.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        is_here = input.device.type == weight.device.type == "cpu"
        return is_float and is_here and not is_watched()


def use_tower_layers(layers: nn.ModuleList) -> None:
    """Gives a tower's layers [`AlignZegTowerAttention`] and [`AlignZegTowerLinear`]; their weights remain."""
    for layer in layers:
        layer.self_attn.__class__ = AlignZegTowerAttention
        if isinstance(layer.mlp.activation_fn, QuickGELUActivation):
            layer.mlp.activation_fn = FrugalQuickGELU()
        for module in layer.modules():
            if type(module) is nn.Linear:
                module.__class__ = AlignZegTowerLinear


class AlignZegVisionModel(LibraryInitialization, CLIPVisionModel):
    """CLIP's vision tower. AlignZeg does not return its hidden states and attentions."""

    _can_record_outputs = {}

    def __init__(self, config: CLIPVisionConfig):
        super().__init__(config)
        use_tower_layers(self.encoder.layers)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # Transformers guesses this from the source of this file, where [`AlignZegAttentionBias`] is not an attention layer.
        return True


class AlignZegSiglipVisionModel(LibraryInitialization, SiglipVisionModel):
    """SigLIP's vision tower."""

    _can_record_outputs = {}

    def __init__(self, config: SiglipVisionConfig):
        super().__init__(config)
        use_tower_layers(self.encoder.layers)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True


class AlignZegTimmModel(LibraryInitialization, TimmWrapperModel):
    """A convolutional tower of timm."""

    _can_record_outputs = {}


class TowerStates(NamedTuple):
    """Outputs of the image tower.

    Attributes:
        states: Hidden states by layer: `(B, 1 + P, Dv)` of CLIP's ViT, `(B, P, Dv)` of SigLIP's, `(B, c, h, w)` of a
            convolutional tower.
        grid: The tower's last grid.
        keys_values: Keys and values of CLIP's ViT `(B, 1 + P, Dv)` in the recognition layers that were run.
    """

    states: dict[int, Tensor]
    grid: Grid
    keys_values: dict[int, tuple[Tensor, Tensor]]


class AlignZegVisualProjection(nn.Module):
    """Projects features of the image tower into the joint space, see `config.visual_projection`."""

    def __init__(self, config: AlignZegConfig, width: int):
        super().__init__()
        kind, dim = config.visual_projection, config.projection_dim
        self.linear = nn.Linear(width, dim, bias=kind != "linear") if "linear" in kind else None
        self.mlp = AlignZegMLP(width, config.projection_hidden_dim, dim) if "mlp" in kind else None

    def forward(self, features: Tensor) -> Tensor:
        """`(..., Dv)` to unit embeddings `(..., D)`."""
        parts = [part(features) for part in (self.linear, self.mlp) if part is not None]
        return F.normalize(sum(parts) if parts else features, dim=-1)


class ProposalRecognizer(nn.Module, ABC):
    """Interface of recognizers. The tower and its projection are frozen and always in evaluation mode."""

    levels: dict[int, Level]

    def __init__(self, config: AlignZegConfig):
        super().__init__()
        self.config = config
        # torch.compile treats numbers of a module as constants, those of a config as variables.
        self.stride, self.input_scale = config.clip_stride, config.clip_input_scale

    def frozen_parts(self) -> list[nn.Module]:
        return [self.vision_model, self.visual_projection]

    def train(self, mode: bool = True):
        super().train(mode)
        for part in self.frozen_parts():  # batch norms keep their statistics
            part.train(False)
        return self

    def grid(self, pixel_values: Tensor, content: Tensor | None) -> Grid:
        """The tower's last grid for `pixel_values (B, 3, H, W)`."""
        return Grid(tuple(side // self.stride for side in pixel_values.shape[-2:]), self.stride, content)

    def scaled(self, pixel_values: Tensor, patch: int) -> Tensor:
        """Resizes pixels to the tower's resolution, with `patch` pixels per side of a cell."""
        if self.input_scale == 1:
            return pixel_values
        size = [side // self.stride * patch for side in pixel_values.shape[-2:]]
        return F.interpolate(pixel_values, size=size, mode="bilinear", align_corners=False)

    @abstractmethod
    def hidden_states(self, pixel_values: Tensor, content: Tensor | None) -> TowerStates:
        """Runs the frozen tower on `pixel_values (B, 3, H, W)`, whose sides are multiples of `config.size_divisor`."""

    @abstractmethod
    def expected_shapes(self, pixel_values: Tensor) -> dict[int, tuple[int, ...]]:
        """Shapes of the hidden states for `pixel_values (B, 3, H, W)`, by layer."""

    @abstractmethod
    def maps(self, tower: TowerStates) -> dict[int, Tensor]:
        """Hidden states as `(B, h, w, c)`, by layer."""

    @abstractmethod
    def forward(self, tower: TowerStates, proposals: Proposals) -> Tensor:
        """Unit embeddings of the proposals, `(B, N, D)`. Masks receive no gradient: they stay class-agnostic."""

    @abstractmethod
    def pool(self, tower: TowerStates, inside: Tensor) -> Tensor:
        """Unit embeddings `(B, N, D)` of given regions: `inside (B, N, h, w)`, 0 to 1, is the share of each cell of the
        tower's grid that the region covers. No region may be empty."""

    def dense_embeds(self, tower: TowerStates) -> Tensor | None:
        """Unit embeddings of the tower's own cells, `(B, h, w, D)`; `None` if its cells are not in the joint space."""
        return None

    def restore(self, states: dict[int, Tensor], pixel_values: Tensor, content: Tensor | None) -> TowerStates:
        """Restores hidden states that [`hidden_states`] computed earlier for the same pixels.

        Raises:
            ValueError: their shapes do not match `pixel_values`.
        """
        expected = self.expected_shapes(pixel_values)
        if not isinstance(states, dict) or list(states) != list(expected):
            came = list(states) if isinstance(states, dict) else f"a {type(states).__name__}"
            raise ValueError(f"`clip_hidden_states` is {came}; expected a dict with the layers {list(expected)}.")
        for layer, values in states.items():
            check_tensor(f"clip_hidden_states[{layer}]", values, "floating-point numbers", pixel_values.device)
            if values.shape != expected[layer]:
                raise ValueError(
                    f"`clip_hidden_states[{layer}]` has shape {tuple(values.shape)}; expected {expected[layer]} for these "
                    "`pixel_values`."
                )
        states = {layer: values.to(pixel_values.dtype) for layer, values in states.items()}
        return TowerStates(states, self.grid(pixel_values, content), {})


def embed_patches(embeddings: nn.Module, pixels: Tensor, table: Tensor, grid: Grid) -> Tensor:
    """Patches of a ViT as tokens `(B, P, Dv)`; `table (P0, Dv)`, position embeddings of a square, is resampled to `grid`."""
    side = int(round(table.shape[0] ** 0.5))
    position = resample(to_map(table[None], (side, side)), Grid((side, side)), grid, mode="bicubic")
    return to_tokens(embeddings.patch_embedding(pixels) + position)


def claimed_shares(masks: Tensor, grid: Grid) -> Tensor:
    """How much of each cell of `grid` the proposals claim, `(B, N, h, w)`, by their mask logits `(B, N, ·, ·)`."""
    inside = masks.detach().float().sigmoid()
    # Mask probabilities above 0.5; the small term is a fallback for proposals without such pixels.
    return grid.clear(F.adaptive_avg_pool2d(inside * (inside > 0.5) + 1e-4 * inside, grid.size))


# --- CLIP's ViT: shadow tokens ---------------------------------------------------------------------------------------


class AlignZegAttentionBias(nn.Module):
    """Attention bias of each proposal in CLIP's last layers, per head, on CLIP's grid: `MLP_q(Q) · MLP_a(F) + α·log σ(M)`.

    At the start of training, the second term focuses the attention on the proposal's own mask.
    """

    def __init__(self, config: AlignZegConfig):
        super().__init__()
        self.num_heads = config.vision_config.num_attention_heads
        # Mask cells per side of a CLIP patch. If it is a whole number, pooling needs no output size, which helps exports.
        whole = config.clip_stride % config.mask_stride == 0
        self.cells = config.clip_stride // config.mask_stride if whole else None
        width, channels = config.hidden_size, self.num_heads * config.attention_bias_dim
        self.query_norm = nn.LayerNorm(width)
        self.query_mlp = AlignZegMLP(width, width, channels)
        self.feature_norm = nn.LayerNorm(width)
        self.feature_mlp = AlignZegMLP(width, width, channels)
        self.mask_scale = nn.Parameter(torch.empty(self.num_heads))

    def forward(self, queries: Tensor, features: Tensor, masks: Tensor, grid: Grid) -> Tensor:
        """Maps queries `(B, N, d)`, features at CLIP's patches `(B, P, d)` and mask logits `(B, N, h, w)` to a bias
        `(B, heads, N, P)` on CLIP's `grid`."""

        def split(states):
            return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        queries = split(self.query_mlp(self.query_norm(queries)))
        features = split(self.feature_mlp(self.feature_norm(features)))
        bias = queries @ features.mT * queries.shape[-1] ** -0.5
        if self.cells is not None:
            inside = F.avg_pool2d(masks.detach(), self.cells)
        else:
            inside = F.adaptive_avg_pool2d(masks.detach(), grid.size)
        bias = bias + self.mask_scale[:, None, None] * F.logsigmoid(inside).flatten(2)[:, None]
        return bias if grid.content is None else bias + grid.key_mask(bias.dtype)


def attend_in_layer(
    layer: nn.Module, states: Tensor, normed: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, queries: int
) -> Tensor:
    """A frozen CLIP layer for `states (B, n, Dv)` (`normed` after its first norm) over projected `keys` and
    `values (B, m, Dv)`, with an additive `mask` that broadcasts to `(B, heads, queries, m)`. n may be 1 if all `queries`
    states are equal."""
    attention = layer.self_attn

    def split(states):
        return states.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)

    heads = split(attention.q_proj(normed).expand(-1, queries, -1).contiguous()), split(keys), split(values)
    output, _ = attend(attention, *heads, mask, scaling=attention.scale, dropout=0.0)
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
        shadow: `(B, N, Dv)`, or `(B, 1, Dv)` if all N are still equal, as before the first of these layers.
        clip_state: `(B, 1 + P, Dv)`, the layer's input for CLS and patches.
        bias: `(B, heads, N, P + N)`, additive; the last N columns let each shadow token attend to itself only.
        keys_values: Keys and values of CLS and patches if [`patch_layer`] has already computed them.
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


class ShadowTokenRecognizer(ProposalRecognizer):
    """One copy of the CLS token per proposal goes through the last layers of CLIP's ViT (SAN, Xu et al. 2023)."""

    def __init__(self, config: AlignZegConfig):
        super().__init__(config)
        vision = config.vision_config
        self.vision_model = AlignZegVisionModel._from_config(vision)
        self.visual_projection = AlignZegVisualProjection(config, vision.hidden_size)
        self.attention_bias = AlignZegAttentionBias(config)
        self.split = config.clip_split_layer
        self.levels = {layer: Level(self.stride, vision.hidden_size) for layer in range(vision.num_hidden_layers)}
        self.layers = sorted({*config.fusion_layers, *range(self.split, vision.num_hidden_layers)})

    def hidden_states(self, pixel_values: Tensor, content: Tensor | None) -> TowerStates:
        # The last layer's patches are never computed: nothing reads them.
        embeddings, grid = self.vision_model.embeddings, self.grid(pixel_values, content)
        pixels = self.scaled(pixel_values, embeddings.patch_size).to(embeddings.patch_embedding.weight.dtype)
        table = embeddings.position_embedding.weight
        tokens = embed_patches(embeddings, pixels, table[1:], grid)
        first = (embeddings.class_embedding + table[0]).expand(tokens.shape[0], 1, -1)
        states = self.vision_model.pre_layrnorm(torch.cat([first, tokens], 1))
        mask = grid.key_mask(states.dtype)
        mask = None if mask is None else F.pad(mask, (1, 0))
        kept, keys_values = {}, {}
        for index, layer in enumerate(self.vision_model.encoder.layers):
            if index in self.layers:
                kept[index] = states
            if index == self.layers[-1]:
                break
            if index < self.split:
                states = layer(states, mask)
            else:
                states, keys_values[index] = patch_layer(layer, states, mask)
        return TowerStates(kept, grid, keys_values)

    def expected_shapes(self, pixel_values: Tensor) -> dict[int, tuple[int, ...]]:
        cells = math.prod(self.grid(pixel_values, None).size)
        return dict.fromkeys(self.layers, (pixel_values.shape[0], 1 + cells, self.config.vision_config.hidden_size))

    def maps(self, tower: TowerStates) -> dict[int, Tensor]:
        return {layer: states[:, 1:].unflatten(1, tower.grid.size) for layer, states in tower.states.items()}

    def forward(self, tower: TowerStates, proposals: Proposals) -> Tensor:
        features = to_map(proposals.features, proposals.grid.size)
        features = to_tokens(resample(features, proposals.grid, tower.grid))
        bias = self.attention_bias(proposals.queries, features, proposals.masks, tower.grid)
        return self._read(tower, bias, proposals.queries.dtype)

    def pool(self, tower: TowerStates, inside: Tensor) -> Tensor:
        inside = inside.flatten(2).float()
        # Cells outside the region are masked.
        bias = inside.log().clamp(min=torch.finfo(tower.states[self.split].dtype).min)
        bias = bias[:, None].expand(-1, self.attention_bias.num_heads, -1, -1)
        return self._read(tower, bias, tower.states[self.split].dtype)

    def _read(self, tower: TowerStates, bias: Tensor, dtype: torch.dtype) -> Tensor:
        """Unit embeddings of the shadow tokens that see the patches with `bias (B, heads, N, P)`."""
        number = bias.shape[2]
        others = ~torch.eye(number, dtype=torch.bool, device=bias.device)
        own = torch.zeros(number, number, dtype=dtype, device=bias.device).masked_fill(others, torch.finfo(dtype).min)
        bias = torch.cat([bias, own.expand(*bias.shape[:2], -1, -1)], -1).to(dtype)
        shadow = tower.states[self.split][:, :1]
        for index in range(self.split, len(self.vision_model.encoder.layers)):
            layer = self.vision_model.encoder.layers[index]
            shadow = shadow_layer(layer, shadow, tower.states[index], bias, tower.keys_values.get(index))
        return self.visual_projection(self.vision_model.post_layernorm(shadow))


# --- SigLIP's ViT: attention pooling ---------------------------------------------------------------------------------


class AlignZegPoolingHead(SiglipMultiheadAttentionPoolingHead):
    """SigLIP's attention pooling: one learned query, the probe, reads the patches, for each proposal with a bias."""

    def forward(self, states: Tensor, bias: Tensor) -> Tensor:
        """Patches `(B, P, Dv)` and an additive `bias (B, N, P)` on the probe's attention to pooled states `(B, N, Dv)`."""
        probes = self.probe.expand(*bias.shape[:2], -1)
        bias = bias.repeat_interleave(self.attention.num_heads, 0)  # (B·heads, N, P)
        pooled, _ = self.attention(probes, states, states, attn_mask=bias, need_weights=False)
        return pooled + self.mlp(self.layernorm(pooled))


class AttentionPoolingRecognizer(ProposalRecognizer):
    """SigLIP's own pooling head reads each proposal: a patch counts as much as the proposal claims of it.

    A share `w` multiplies the patch's part in the head's softmax, as the bias `log w`. A proposal that claims everything
    has the embedding that SigLIP gives the image.
    """

    def __init__(self, config: AlignZegConfig):
        super().__init__(config)
        vision = config.vision_config
        if not vision.vision_use_head:
            raise ValueError(
                "`vision_config` has `vision_use_head=False`; expected a SigLIP tower with its pooling head, which reads "
                "the proposals. Take the tower of a whole SigLIP."
            )
        self.vision_model = AlignZegSiglipVisionModel._from_config(vision)
        self.vision_model.head = AlignZegPoolingHead(vision)
        self.visual_projection = AlignZegVisualProjection(config, vision.hidden_size)
        self.levels = {layer: Level(self.stride, vision.hidden_size) for layer in range(vision.num_hidden_layers)}
        self.final = vision.num_hidden_layers  # after the layers: what the head pools
        self.layers = sorted({*config.fusion_layers})

    def hidden_states(self, pixel_values: Tensor, content: Tensor | None) -> TowerStates:
        embeddings, grid = self.vision_model.embeddings, self.grid(pixel_values, content)
        pixels = self.scaled(pixel_values, embeddings.patch_size).to(embeddings.patch_embedding.weight.dtype)
        states = embed_patches(embeddings, pixels, embeddings.position_embedding.weight, grid)
        mask, kept = grid.key_mask(states.dtype), {}
        for index, layer in enumerate(self.vision_model.encoder.layers):
            if index in self.layers:
                kept[index] = states
            states = layer(states, mask)
        return TowerStates({**kept, self.final: self.vision_model.post_layernorm(states)}, grid, {})

    def expected_shapes(self, pixel_values: Tensor) -> dict[int, tuple[int, ...]]:
        cells, width = math.prod(self.grid(pixel_values, None).size), self.config.vision_config.hidden_size
        return dict.fromkeys([*self.layers, self.final], (pixel_values.shape[0], cells, width))

    def maps(self, tower: TowerStates) -> dict[int, Tensor]:
        return {layer: tower.states[layer].unflatten(1, tower.grid.size) for layer in self.layers}

    def forward(self, tower: TowerStates, proposals: Proposals) -> Tensor:
        return self.pool(tower, claimed_shares(proposals.masks, tower.grid))

    def pool(self, tower: TowerStates, inside: Tensor) -> Tensor:
        states = tower.states[self.final]
        inside = inside.flatten(2).float()
        bias = inside.clamp(min=torch.finfo(inside.dtype).tiny).log().to(states.dtype)  # (B, N, P)
        if tower.grid.content is not None:  # also where a proposal claims nothing at all
            bias = bias.masked_fill(~tower.grid.mask().flatten(1)[:, None], torch.finfo(bias.dtype).min)
        return self.visual_projection(self.vision_model.head(states, bias))


# --- convolutional towers: mask pooling ------------------------------------------------------------------------------


class MaskPoolingRecognizer(ProposalRecognizer):
    """Means of a convolutional tower's last features over the proposals' masks (FC-CLIP, Yu et al. 2023).

    Convolutions cannot mask padding, so images of different sizes in a batch run one by one. A compiled or exported model
    does not: give it batches of one size, otherwise the padding changes its results.
    """

    def __init__(self, config: AlignZegConfig):
        super().__init__(config)
        self.vision_model = AlignZegTimmModel._from_config(config.vision_config)
        tower = self.vision_model.timm_model
        stages = [Level(stage["reduction"], stage["num_chs"]) for stage in tower.feature_info]
        if stages[-1].stride != 32 or tower.pretrained_cfg.get("fixed_input_size"):
            size = " and which accepts only one image size" if tower.pretrained_cfg.get("fixed_input_size") else ""
            raise ValueError(
                f"`vision_config` names {config.vision_config.architecture!r}, whose last stage has stride "
                f"{stages[-1].stride}{size}; expected a convolutional tower that ends at stride 32."
            )
        self.visual_projection = AlignZegVisualProjection(config, tower.head_hidden_size)
        self.levels = {i: Level(round(s.stride / self.input_scale), s.width) for i, s in enumerate(stages)}
        finer = {i for i, level in self.levels.items() if config.mask_stride <= level.stride < config.patch_size}
        self.final = len(stages)  # after the stages: the features that the tower pools for classification
        self.layers = sorted({*config.fusion_layers, *finer})

    def hidden_states(self, pixel_values: Tensor, content: Tensor | None) -> TowerStates:
        grid = self.grid(pixel_values, content)
        pixels = self.scaled(pixel_values, 32).to(self.vision_model.dtype)
        if content is None or torch.compiler.is_compiling():
            return TowerStates(self._run(pixels), grid, {})
        divisor = self.config.size_divisor
        kept = {layer: pixels.new_zeros(shape) for layer, shape in self.expected_shapes(pixel_values).items()}
        for index, size in enumerate(content.tolist()):
            size = [round(math.ceil(side / divisor) * divisor * self.input_scale) for side in size]
            for layer, states in self._run(pixels[index : index + 1, :, : size[0], : size[1]]).items():
                kept[layer][index, :, : states.shape[2], : states.shape[3]] = states[0]
        return TowerStates(kept, grid, {})

    def _run(self, pixels: Tensor) -> dict[int, Tensor]:
        tower = self.vision_model.timm_model
        final, stages = tower.forward_intermediates(
            pixels.contiguous(memory_format=torch.channels_last), indices=self.layers
        )
        return {**dict(zip(self.layers, stages)), self.final: final}

    def expected_shapes(self, pixel_values: Tensor) -> dict[int, tuple[int, ...]]:
        final = Level(self.stride, self.vision_model.timm_model.num_features)
        levels = {**{layer: self.levels[layer] for layer in self.layers}, self.final: final}
        batch, sides = pixel_values.shape[0], pixel_values.shape[-2:]
        return {i: (batch, level.width, *(side // level.stride for side in sides)) for i, level in levels.items()}

    def maps(self, tower: TowerStates) -> dict[int, Tensor]:
        return {layer: tower.states[layer].permute(0, 2, 3, 1) for layer in self.layers}

    def forward(self, tower: TowerStates, proposals: Proposals) -> Tensor:
        return self.pool(tower, claimed_shares(proposals.masks, tower.grid))

    def pool(self, tower: TowerStates, inside: Tensor) -> Tensor:
        features = tower.states[self.final]
        inside = inside.flatten(2).to(features.dtype)  # (B, N, P)
        weights = inside / inside.sum(-1, keepdim=True).clamp(min=torch.finfo(inside.dtype).tiny)
        pooled = weights @ to_tokens(features)  # (B, N, Dv)
        return self._project(pooled)

    def dense_embeds(self, tower: TowerStates) -> Tensor:
        return self._project(tower.states[self.final].flatten(2).mT).unflatten(1, tower.grid.size)

    def _project(self, features: Tensor) -> Tensor:
        """Applies the norm of the tower's head, as after its own pooling, and the projection to features `(B, n, Dv)`."""
        normed = self.vision_model.timm_model.forward_head(features.flatten(0, 1)[..., None, None], pre_logits=True)
        return self.visual_projection(normed.unflatten(0, features.shape[:2]))


RECOGNIZERS: dict[str, Callable[[AlignZegConfig], ProposalRecognizer]] = {
    "clip_vision_model": ShadowTokenRecognizer,
    "siglip_vision_model": AttentionPoolingRecognizer,
    "timm_wrapper": MaskPoolingRecognizer,
}
