# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""PBC, predictive bias correction: the class indicator `φ_bc`. The read-out applies its logits to the class scores."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_alignzeg import AlignZegConfig
from .layers_alignzeg import AlignZegMLP, Grid
from .loss_alignzeg import count_over_processes


STATISTICS = {"frozen": 3, "adapted": 4, "cells": 1}
UNCLAIMED_LOGIT = 20.0  # sigmoid(20) rounds to 1.0 in float32


class Evidence(NamedTuple):
    """What the indicator reads of proposals.

    Attributes:
        frozen_logits: `(..., C)` class logits of the frozen embedding.
        logits: `(..., C + 1)` logits of the adapted embedding, the background last.
        cell_scores: `(..., C)` class probabilities of the image tower's own cells, mean over the mask; `None` if they are
            not used.
    """

    frozen_logits: Tensor
    logits: Tensor
    cell_scores: Tensor | None

    @classmethod
    def collect(
        cls, frozen_logits: Tensor, logits: Tensor, masks: Tensor, cell_logits: Tensor | None, grid: Grid
    ) -> "Evidence":
        """Evidence of the proposals with the mask logits `masks (B, N, ·, ·)`, from the logits `(B, h, w, C)` of the frozen
        cells, if there are any."""
        if cell_logits is None:
            return cls(frozen_logits, logits, None)
        inside = grid.clear(F.adaptive_avg_pool2d(masks.detach().float().sigmoid(), grid.size)).flatten(2)
        inside = inside / inside.sum(-1, keepdim=True).clamp(min=1e-12)
        return cls(frozen_logits, logits, inside @ cell_logits.float().softmax(-1).flatten(1, 2))

    def matched(self, images: Tensor, queries: Tensor, seen: Tensor) -> "Evidence":
        """Evidence `(M, ·)` of these proposals over the classes `seen (C,)`."""
        with_background = torch.cat([seen, seen.new_ones(1)])
        parts = zip(self, (seen, with_background, seen))
        return Evidence(*(None if part is None else part[images, queries][:, kept] for part, kept in parts))


class AlignZegClassIndicator(nn.Module):
    """Predicts whether a proposal shows an unseen class.

    The position of an embedding says nothing about seen or unseen; its similarity to the prototypes does. So the inputs
    are statistics of class scores, of three kinds (`config.indicator_evidence`):

    - `"frozen"`: logits of the frozen embedding: the best seen class, the margin of the best unseen candidate over it, and
      the entropy over the seen classes;
    - `"adapted"`: the same after the adapter, and the background;
    - `"cells"`: log odds of the unseen candidates in the mean class probabilities of the frozen cells under the mask.

    The adapter was trained on the seen classes that an episode treats as unseen, but not on the real unseen classes, so
    `"adapted"` evidence looks better in an episode than it is. Frozen evidence treats both alike.
    """

    def __init__(self, config: AlignZegConfig):
        super().__init__()
        self.held_out_fraction = config.held_out_fraction
        self.config = config
        self.kinds = config.indicator_evidence
        self.mlp = AlignZegMLP(sum(STATISTICS[kind] for kind in self.kinds), config.indicator_dim, 1)

    def statistics(self, evidence: Evidence, seen: Tensor) -> Tensor:
        """Statistics `(..., n)` that indicate an unseen class.

        Args:
            evidence: Evidence of the proposals.
            seen: `bool (C,)`, classes that count as seen; all others are unseen candidates.
        """
        parts = []
        for kind, values in (("frozen", evidence.frozen_logits), ("adapted", evidence.logits[..., :-1])):
            if kind not in self.kinds:
                continue
            values = values.float()
            seen_values = values.masked_fill(~seen, -1e4)
            best_seen = seen_values.amax(-1)
            # Without a candidate nothing can be unseen: use the margin of a class opposite to the embedding.
            best_other = torch.where((~seen).any(), values.masked_fill(seen, -1e4).amax(-1), -100.0)
            distribution = seen_values.log_softmax(-1)
            entropy = -(distribution.exp() * distribution).sum(-1)
            parts += [best_seen / 10, ((best_other - best_seen) / 10).clamp(-10, 10), entropy]
            if kind == "adapted":
                parts.append((evidence.logits[..., -1].float() - best_seen) / 10)
        if "cells" in self.kinds:
            assert evidence.cell_scores is not None
            shares = [evidence.cell_scores.masked_fill(other, 0).sum(-1) for other in (seen, ~seen)]
            unseen_share, seen_share = (share.float().clamp(min=1e-4).log() for share in shares)
            parts.append(unseen_share - seen_share)
        return torch.stack(parts, -1)

    def score(self, evidence: Evidence, seen: Tensor) -> Tensor:
        """Logits `(...)` of "unseen". Arguments as for [`statistics`]; they receive no gradient."""
        evidence = Evidence(*(None if part is None else part.detach() for part in evidence))
        statistics = self.statistics(evidence, seen)
        return self.mlp(statistics.to(evidence.logits.dtype))[..., 0]  # not of the weights, which may be quantized

    def forward(self, evidence: Evidence, seen: Tensor) -> Tensor:
        """Logits `(B, N)` of all proposals, by their evidence; `seen (C,)`."""
        scores = self.score(evidence, seen).masked_fill(~seen.any(), UNCLAIMED_LOGIT)  # nothing but unseen candidates
        if not self.config.unclaimed_proposal:
            return scores
        # Queries learned to claim seen classes, so the unclaimed region counts as unseen.
        last = scores[:, -1:].masked_fill((~seen).any(), UNCLAIMED_LOGIT)
        return torch.cat([scores[:, :-1], last], 1)

    def loss(self, evidence: Evidence, classes: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """PBC's training episode: a random part of the seen classes is treated as unseen. `L_bc` is a binary cross-entropy
        in which both kinds of proposals have the same total weight.

        Args:
            evidence: Of `M` matched proposals, over the seen classes.
            classes: `int64 (M,)`.
            generator: Source of the held-out classes; default torch's own.
        """
        count = evidence.frozen_logits.shape[-1]
        order = torch.rand(count, generator=generator, device=classes.device).argsort()
        held_out = torch.zeros(count, dtype=torch.bool, device=classes.device)
        held_out[order[: min(max(1, round(self.held_out_fraction * count)), count - 1)]] = True  # one stays seen
        scores, is_unseen = self.score(evidence, ~held_out).float(), held_out[classes]
        entropy = F.binary_cross_entropy_with_logits(scores, is_unseen.float(), reduction="none")
        sides = (is_unseen.float(), (~is_unseen).float())
        return 0.5 * sum((entropy * side).sum() / count_over_processes(side.sum()) for side in sides)
