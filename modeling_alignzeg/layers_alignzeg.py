# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Grids over padded batches, and shared attention and MLP layers.

A batch of images of different sizes is padded at the bottom and right. `content (B, 2)` is the height and width of each
image in pixels, without padding. Every step masks the padding, so that it never changes a result. `content=None` means that
every cell of every grid has content and nothing needs to be masked.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward

from .configuration_alignzeg import AlignZegConfig


ATTENTION_WORKSPACE = 2**24  # scores at once, 32 MiB in bfloat16
# Types for which this CPU has no instructions that oneDNN uses; torch's own products and convolutions in them are slow.
EMULATED_DTYPES = {torch.bfloat16, torch.float16}
if torch.backends.mkldnn.is_available():
    EMULATED_DTYPES -= {torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set()
    EMULATED_DTYPES -= {torch.float16} if torch.ops.mkldnn._is_mkldnn_fp16_supported() else set()


class Grid(NamedTuple):
    """Cells over a padded batch: `size` rows and columns, `stride` pixels per side of a cell."""

    size: tuple[int, int]
    stride: float = 1
    content: Tensor | None = None

    def cells(self) -> Tensor | None:
        """Numbers of rows and columns with content per image, `(B, 2)`; `None`: all of them."""
        return None if self.content is None else torch.ceil(self.content / self.stride)

    def mask(self) -> Tensor | None:
        """Whether each cell has content: `bool (B, h, w)`; `None`: all cells have."""
        return None if self.content is None else content_mask(self.content, self.size, self.stride)

    def key_mask(self, dtype: torch.dtype) -> Tensor | None:
        """Additive attention mask `(B, 1, 1, h·w)` that hides the keys of cells without content."""
        if self.content is None:
            return None
        mask = self.mask().flatten(1)
        hidden = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return hidden.masked_fill(~mask, torch.finfo(dtype).min)[:, None, None]

    def clear(self, values: Tensor) -> Tensor:
        """`values (B, c, h, w)` with zeros on padding."""
        return values if self.content is None else values * self.mask()[:, None].to(values.dtype)

    def coarser(self, ratio: int) -> "Grid":
        """The grid of blocks of `ratio x ratio` cells."""
        return Grid(tuple(-(-side // ratio) for side in self.size), self.stride * ratio, self.content)


def content_mask(content: Tensor, size: tuple[int, int], stride: float = 1) -> Tensor:
    """Which of `size` cells begin inside the `content (B, 2)` pixels of their image: `bool (B, h, w)`."""
    rows, columns = (torch.arange(cells, device=content.device) * stride for cells in size)
    return (rows[None, :, None] < content[:, 0, None, None]) & (columns[None, None, :] < content[:, 1, None, None])


def to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """`(B, h·w, c)` to `(B, c, h, w)`, in the channels-last layout that torch recognises, also for a batch of 1."""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)


def to_tokens(values: Tensor) -> Tensor:
    """`(B, c, h, w)` to `(B, h·w, c)`."""
    return values.permute(0, 2, 3, 1).flatten(1, 2)


def resample(values: Tensor, source: Grid, target: Grid, mode: str = "bilinear") -> Tensor:
    """Resizes `values (B or 1, c, h, w)` from the grid `source` to `target`, aligning their content."""
    if source.content is None and target.content is None:
        if not torch.compiler.is_compiling() and values.shape[-2:] == tuple(target.size):
            return values
        return F.interpolate(values, size=target.size, mode=mode, align_corners=False)
    full = [torch.tensor(grid.size, device=values.device)[None] for grid in (source, target)]
    cells = [every if grid.content is None else grid.cells() for grid, every in zip((source, target), full)]
    rows, columns = (
        interpolation_matrix(values.shape[2 + axis], target.size[axis], cells[0][:, axis], cells[1][:, axis], mode)
        for axis in (0, 1)
    )
    values = columns.to(values.dtype)[:, None] @ values.permute(0, 2, 3, 1)  # (·, source height, target width, c)
    return (rows.to(values.dtype) @ values.flatten(2)).unflatten(2, tuple(values.shape[2:])).permute(0, 3, 1, 2)


def interpolation_matrix(source: int, target: int, content: Tensor, target_content: Tensor, mode: str) -> Tensor:
    """Interpolation along one axis of `source` to `target` cells, of which the first `content (B,)` become the first
    `target_content (B,)`: `(B, target, source)`, float32. Beyond the border, the outermost cell is repeated: of the content
    with `"bilinear"`, of the axis with `"bicubic"`."""
    centers = torch.arange(target, device=content.device) + 0.5
    positions = centers * (content / target_content)[:, None] - 0.5
    if mode == "bilinear":
        positions = positions.clamp(min=0).minimum(content[:, None] - 1)
        cells = torch.arange(source, device=content.device)
        return (1 - (positions[..., None] - cells).abs()).clamp(min=0)
    first = positions.floor()
    offsets = torch.arange(-1, 3, device=content.device)
    distances = (positions - first)[..., None] - offsets
    near, far = distances.abs(), -0.75  # the cubic convolution of torch.nn.functional.interpolate
    weights = torch.where(
        near <= 1,
        ((far + 2) * near - (far + 3)) * near * near + 1,
        ((near - 5) * near + 8) * near * far - 4 * far,
    )
    neighbours = (first[..., None] + offsets).clamp(0, source - 1).long()
    return weights.new_zeros(*positions.shape, source).scatter_add(-1, neighbours, weights)


def pool_cells(values: Tensor, ratio: int, grid: Grid) -> Tensor:
    """Mean over the content of each `ratio x ratio` block of `values (B, c, h, w)` on `grid`."""
    if grid.content is None:  # blocks that cross the border average only the cells inside
        return F.avg_pool2d(values, ratio, ceil_mode=True)
    weight = grid.mask()[:, None].to(values.dtype)
    total, share = (F.avg_pool2d(states, ratio, ceil_mode=True) for states in (values * weight, weight))
    return total / share.clamp(min=1 / ratio**2)


def repeat_border(values: Tensor, cells: Tensor) -> Tensor:
    """`values (B, c, h, w)` with the last of `cells (B, 2)` rows and columns of content repeated over the padding."""
    for axis in (0, 1):
        index = torch.arange(values.shape[2 + axis], device=values.device).minimum(cells[:, axis, None] - 1)
        index = index[:, None, :, None] if axis == 0 else index[:, None, None, :]
        values = values.gather(2 + axis, index.expand_as(values))
    return values


def attend(module: nn.Module, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, **kwargs):
    """Attention over heads `(B, heads, n, c)` with an additive mask, through transformers' attention interface, except for
    torch's fused attention in bfloat16 on CPUs with instructions for it, see [`attention_by_products`]."""
    kind = module.config._attn_implementation
    if kind == "sdpa" and queries.dtype == torch.bfloat16 and queries.device.type == "cpu":
        if torch.bfloat16 not in EMULATED_DTYPES and not torch.compiler.is_compiling():
            return attention_by_products(queries, keys, values, mask, kwargs["scaling"]), None
    return ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager_attention_forward)(
        module, queries, keys, values, mask, **kwargs
    )


def attention_by_products(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """Attention `(B, n, heads, c)` by two matrix products and a softmax: on CPUs, about twice as fast in bfloat16 as torch's
    fused kernel (docs/experiments.md, Speed). Long sequences run in parts, to bound the memory."""
    batch, heads, count, _ = queries.shape
    keys, values = keys.flatten(0, 1).mT, values.flatten(0, 1)
    at_once = max(1, ATTENTION_WORKSPACE // (batch * heads * keys.shape[-1]))
    outputs = []
    for start in range(0, count, at_once):
        part = queries[:, :, start : start + at_once].flatten(0, 1)
        if mask is None:
            scores = torch.baddbmm(part.new_zeros(()), part, keys, beta=0, alpha=scaling)
        else:
            bias = mask[:, :, start : start + at_once] if mask.shape[2] > 1 else mask
            bias = bias.expand(batch, heads, part.shape[1], -1).flatten(0, 1)
            scores = torch.baddbmm(bias, part, keys, alpha=scaling)
        outputs.append((scores.softmax(-1) @ values).unflatten(0, (batch, heads)))
    return (torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]).transpose(1, 2)


class AlignZegConv2d(nn.Conv2d):
    """A convolution, with a bias, that runs in float32 on CPUs without instructions for its type (docs/experiments.md)."""

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or input.dtype not in EMULATED_DTYPES or torch.compiler.is_compiling():
            return super().forward(input)
        return self._conv_forward(input.float(), self.weight.float(), self.bias.float()).to(input.dtype)


class AlignZegAttention(nn.Module):
    """Multi-head attention of `queries` over `keys` and `values`."""

    is_causal = False

    def __init__(self, config: AlignZegConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        def split(states):  # (B, n, d) -> (B, heads, n, head_dim)
            return states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

        heads = (split(self.q_proj(queries)), split(self.k_proj(keys)), split(self.v_proj(values)))
        output, weights = attend(self, *heads, attention_mask, scaling=self.head_dim**-0.5, dropout=0.0, **kwargs)
        return self.out_proj(output.flatten(2)), weights


class AlignZegMLP(nn.Module):
    """`num_layers` linear layers with GELU between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int, num_layers: int = 2):
        super().__init__()
        widths = [inputs] + [hidden] * (num_layers - 1) + [outputs]
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in zip(widths, widths[1:])])
        self.activation = ACT2FN["gelu"]

    def forward(self, states: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            states = self.activation(layer(states))
        return self.layers[-1](states)
