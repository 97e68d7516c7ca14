# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""PBC, predictive bias correction: the class indicator `φ_bc`. The read-out applies its logits to the class scores."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_alignzeg import AlignZegConfig
from .layers_alignzeg import AlignZegMLP
from .loss_alignzeg import count_over_processes


UNCLAIMED_LOGIT = 20.0  # sigmoid(20) rounds to 1.0 in float32


class AlignZegClassIndicator(nn.Module):
    """Predicts whether a proposal shows an unseen class.

    The position of an embedding says nothing about seen or unseen; its similarity to the prototypes does. So the inputs
    are statistics of the logits before and after the adapter: the best seen class, the margin of the best unseen
    candidate over it, the entropy over the seen classes, and the background.
    """

    num_statistics = 7

    def __init__(self, config: AlignZegConfig):
        super().__init__()
        self.held_out_fraction = config.held_out_fraction
        self.config = config
        self.mlp = AlignZegMLP(self.num_statistics, config.indicator_dim, 1)

    @staticmethod
    def statistics(frozen_logits: Tensor, logits: Tensor, seen: Tensor) -> Tensor:
        """Statistics of the logits that indicate an unseen class.

        Args:
            frozen_logits: `(..., C)` class logits of the frozen embedding.
            logits: `(..., C + 1)` logits of the adapted embedding, the background last.
            seen: `bool (C,)`, classes that count as seen; all others are unseen candidates.

        Returns:
            `(..., 7)`, on the order of one.
        """
        parts = []
        for values in (frozen_logits.float(), logits[..., :-1].float()):
            seen_values = values.masked_fill(~seen, -1e4)
            best_seen = seen_values.amax(-1)
            # Without a candidate nothing can be unseen: use the margin of a class opposite to the embedding.
            best_other = torch.where((~seen).any(), values.masked_fill(seen, -1e4).amax(-1), -100.0)
            distribution = seen_values.log_softmax(-1)
            entropy = -(distribution.exp() * distribution).sum(-1)
            parts += [best_seen / 10, ((best_other - best_seen) / 10).clamp(-10, 10), entropy]
        parts.append((logits[..., -1].float() - best_seen) / 10)
        return torch.stack(parts, -1)

    def score(self, frozen_logits: Tensor, logits: Tensor, seen: Tensor) -> Tensor:
        """Logits `(...)` of "unseen". Arguments as for [`statistics`]; they receive no gradient."""
        statistics = self.statistics(frozen_logits.detach(), logits.detach(), seen)
        return self.mlp(statistics.to(logits.dtype))[..., 0]  # not the dtype of the weights, which may be quantized

    def forward(self, frozen_logits: Tensor, logits: Tensor, seen: Tensor) -> Tensor:
        """Logits `(B, N)` of all proposals: frozen `(B, N, C)`, adapted `(B, N, C + 1)`, `seen (C,)`."""
        scores = self.score(frozen_logits, logits, seen)
        if not self.config.unclaimed_proposal:
            return scores
        # Queries learned to claim seen classes, so the unclaimed region counts as unseen.
        last = scores[:, -1:].masked_fill((~seen).any(), UNCLAIMED_LOGIT)
        return torch.cat([scores[:, :-1], last], 1)

    def loss(
        self, frozen_logits: Tensor, logits: Tensor, classes: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """PBC's training episode: a random part of the seen classes is treated as unseen. `L_bc` is a binary cross-entropy
        in which both kinds of proposals have the same total weight.

        Args:
            frozen_logits: `(M, S)` logits of matched proposals over the seen classes, before the adapter.
            logits: `(M, S + 1)` after it, the background last.
            classes: `int64 (M,)`.
            generator: Source of the held-out classes; default torch's own.
        """
        count = frozen_logits.shape[-1]
        order = torch.rand(count, generator=generator, device=classes.device).argsort()
        held_out = torch.zeros(count, dtype=torch.bool, device=classes.device)
        held_out[order[: min(max(1, round(self.held_out_fraction * count)), count - 1)]] = True  # one stays seen
        scores, is_unseen = self.score(frozen_logits, logits, ~held_out).float(), held_out[classes]
        entropy = F.binary_cross_entropy_with_logits(scores, is_unseen.float(), reduction="none")
        sides = (is_unseen.float(), (~is_unseen).float())
        return 0.5 * sum((entropy * side).sum() / count_over_processes(side.sum()) for side in sides)
