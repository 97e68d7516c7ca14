# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""GEPC, generalization-enhanced proposal classification: an adapter, several background prototypes (BDS) and virtual
features (FES)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_alignzeg import AlignZegConfig
from .layers_alignzeg import AlignZegMLP
from .loss_alignzeg import ProposalMatch, SegmentationTargets, classification_loss, mean_over_processes


def class_logits(embeds: Tensor, prototypes: Tensor, scale: Tensor) -> Tensor:
    """`τ·cos` of unit embeddings `(..., D)` and prototypes `(C, D)`, or the nearest of `(C, K, D)`; `(..., C)`."""
    logits = scale * embeds @ prototypes.flatten(0, -2).T
    return logits if prototypes.ndim == 2 else logits.unflatten(-1, prototypes.shape[:2]).amax(-1)


class Classification(NamedTuple):
    """
    Attributes:
        inputs: Inputs of the adapter, frozen embeddings first: `(B, N, D or D + d)`.
        embeds: Unit embeddings `(B, N, D)`.
        logits: `(B, N, C + 1)`, scaled by `τ`; the background comes last.
    """

    inputs: Tensor
    embeds: Tensor
    logits: Tensor


class Cells(NamedTuple):
    """
    Attributes:
        embeds: Frozen unit embeddings `(B, h, w, D)`.
        logits: `(B, C, h, w)`, scaled by `τ`.
    """

    embeds: Tensor
    logits: Tensor


class AlignZegAdapter(nn.Module):
    """Residual adapter of frozen embeddings: `x <- x̂ + MLP(x̂, q)`; the identity at the start of training.

    With `query_fusion`, the MLP also takes the refined mask query `q`.
    """

    def __init__(self, config: AlignZegConfig, query_fusion: bool):
        super().__init__()
        self.embed_dim = config.projection_dim
        self.query_norm = nn.LayerNorm(config.hidden_size) if query_fusion else None
        inputs = config.projection_dim + (config.hidden_size if query_fusion else 0)
        self.mlp = AlignZegMLP(inputs, config.adapter_dim, config.projection_dim)

    def inputs(self, embeds: Tensor, queries: Tensor) -> Tensor:
        """Concatenates unit embeddings `(..., D)` and refined queries `(..., d)` into the input of [`forward`]."""
        return embeds if self.query_norm is None else torch.cat([embeds, self.query_norm(queries)], -1)

    def forward(self, inputs: Tensor) -> Tensor:
        """`(..., D + d)`, or `(..., D)` without `query_fusion`, to unit embeddings `(..., D)`."""
        return F.normalize(inputs[..., : self.embed_dim] + self.mlp(inputs), dim=-1)


class AlignZegBackgroundPrototypes(nn.Module):
    """Background diversity strategy (BDS): `logsumexp_k τ·cos(x, b_k)` over K learned prototypes."""

    def __init__(self, config: AlignZegConfig):
        super().__init__()
        count = config.num_background_prototypes if config.background_diversity else 1
        self.prototypes = nn.Parameter(torch.empty(count, config.projection_dim))

    def forward(self, embeds: Tensor, scale: Tensor) -> Tensor:
        """Unit embeddings `(..., D)` to background logits `(...)`."""
        return (scale * embeds @ F.normalize(self.prototypes, dim=-1).T).logsumexp(-1)

    def loss(self) -> Tensor:
        """`L_reg`: mean over k ≠ l of `cos(b_k, b_l)²`; 0 for a single prototype."""
        count = len(self.prototypes)
        if count == 1:
            return self.prototypes.new_zeros((), dtype=torch.float32)
        unit = F.normalize(self.prototypes.float(), dim=-1)
        similarity = unit @ unit.T
        off_diagonal = similarity - torch.diag_embed(similarity.diagonal())
        return off_diagonal.square().sum() / (count * (count - 1))


class AlignZegFeatureExpansion(nn.Module):
    """Feature expansion strategy (FES): Manifold Mixup of matched proposals of different classes,
    `x̃ = λ·x_i + (1−λ)·x_j` with `λ` uniform, and their training target (`feature_expansion_target`)."""

    def __init__(self, config: AlignZegConfig):
        super().__init__()
        self.embed_dim, self.target = config.projection_dim, config.feature_expansion_target

    def mix(
        self, inputs: Tensor, classes: Tensor, prototypes: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            inputs: `(M, D or D + d)`, inputs of the adapter, frozen embeddings first.
            classes: `int64 (M,)`.
            prototypes: `(S, D)`.
            generator: Source of partners and mixing weights; default torch's own.

        Returns:
            Mixed inputs `(V, D or D + d)`, whose embeddings have unit length, and virtual prototypes `(V, D)`.
        """
        partner = torch.randperm(len(classes), generator=generator, device=classes.device)
        mixing = torch.rand(len(classes), 1, generator=generator, device=classes.device).to(inputs.dtype)
        pairs = (classes != classes[partner]).nonzero()[:, 0]
        partner, mixing = partner[pairs], mixing[pairs]

        def blend(values):
            return mixing * values[pairs] + (1 - mixing) * values[partner]

        embeds = F.normalize(blend(inputs[:, : self.embed_dim]), dim=-1)
        virtual_prototypes = F.normalize(blend(prototypes[classes]), dim=-1)
        return torch.cat([embeds, blend(inputs[:, self.embed_dim :])], -1), virtual_prototypes

    def loss(
        self,
        virtual: Tensor,
        frozen: Tensor,
        virtual_prototypes: Tensor,
        prototypes: Tensor,
        background_logits: Tensor,
        scale: Tensor,
    ) -> Tensor:
        """`L_vir`, the mean over all processes of

        - `"frozen"`: `τ·(1 − cos(x̃, x̂))`, which ties a virtual feature to its frozen embedding;
        - `"semantic"`: cross-entropy towards its own virtual prototype, among all virtual prototypes, the seen
          classes and the background;
        - `"reserve"`: cross-entropy towards the background among the seen classes and the background.

        Args:
            virtual, frozen: `(V, D)` unit virtual features after and before the adapter.
            virtual_prototypes: `(V, D)` unit virtual prototypes.
            prototypes: `(S, D)` unit prototypes of the seen classes.
            background_logits: `(V,)` of the virtual features.
            scale: Logit scale `τ`.
        """
        if self.target == "frozen":
            return self.distance(virtual, frozen, scale)
        logits = [scale * virtual @ prototypes.T, background_logits[:, None]]
        target = torch.full((len(virtual),), len(prototypes), device=virtual.device)
        if self.target == "semantic":
            logits = [scale * virtual @ virtual_prototypes.T, *logits]
            target = torch.arange(len(virtual), device=virtual.device)
        return mean_over_processes(F.cross_entropy(torch.cat(logits, 1).float(), target, reduction="none"))

    @staticmethod
    def distance(virtual: Tensor, frozen: Tensor, scale: Tensor) -> Tensor:
        """`τ·(1 − cos(x̃, x̂))` of unit features `(V, D)` after and before the adapter, mean over all processes."""
        return mean_over_processes(scale.float() * (1 - (virtual.float() * frozen.float()).sum(-1)))


class AlignZegProposalClassifier(nn.Module):
    """GEPC: class and background logits of proposals, and the losses that train them."""

    def __init__(self, config: AlignZegConfig):
        super().__init__()
        self.no_object_weight = config.no_object_weight
        self.adapter = AlignZegAdapter(config, config.query_fusion)
        self.background = AlignZegBackgroundPrototypes(config)
        self.feature_expansion = AlignZegFeatureExpansion(config) if config.feature_expansion else None

    def forward(self, frozen_embeds: Tensor, queries: Tensor, prototypes: Tensor, scale: Tensor) -> Classification:
        """
        Args:
            frozen_embeds: `(B, N, D)`, from the recognizer.
            queries: `(B, N, d)`, refined mask queries.
            prototypes: `(C, D)`, or `(C, K, D)`.
            scale: Logit scale `τ`.
        """
        inputs = self.adapter.inputs(frozen_embeds, queries)
        embeds = self.adapter(inputs)
        logits = torch.cat([class_logits(embeds, prototypes, scale), self.background(embeds, scale)[..., None]], -1)
        return Classification(inputs, embeds, logits)

    def loss(
        self,
        proposals: Classification,
        masks: Tensor,
        targets: SegmentationTargets,
        match: ProposalMatch,
        prototypes: Tensor,
        scale: Tensor,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`L_ce`, `L_vir` and `L_reg`; classes, logits and prototypes cover the seen classes only."""
        loss_class = classification_loss(proposals.logits, masks, targets, match, self.no_object_weight)
        loss_virtual = loss_class.new_zeros(())
        if self.feature_expansion is not None:
            inputs, classes = proposals.inputs[match.image, match.query], targets.classes[match.image, match.target]
            # `L_vir` trains the classifier, not queries and masks (docs/experiments.md, Photographs).
            mixed, virtual_prototypes = self.feature_expansion.mix(inputs.detach(), classes, prototypes, generator)
            virtual = self.adapter(mixed)
            loss_virtual = self.feature_expansion.loss(
                virtual,
                mixed[:, : self.adapter.embed_dim],
                virtual_prototypes,
                prototypes,
                self.background(virtual, scale),
                scale,
            )
        return loss_class, loss_virtual, self.background.loss()


class AlignZegCellClassifier(nn.Module):
    """Class logits of the image tower's own cells, for the read-out: an adapter of their frozen embeddings, trained on the
    labels of the cells. FES ties mixtures of cells to their frozen embeddings. Not part of the paper."""

    def __init__(self, config: AlignZegConfig):
        super().__init__()
        self.virtual_weight = config.virtual_weight
        self.adapter = AlignZegAdapter(config, query_fusion=False)
        self.feature_expansion = AlignZegFeatureExpansion(config) if config.feature_expansion else None

    def forward(self, frozen_embeds: Tensor, prototypes: Tensor, scale: Tensor) -> Cells:
        """Classifies unit embeddings `(B, h, w, D)`; prototypes as for [`class_logits`]."""
        logits = class_logits(self.adapter(frozen_embeds), prototypes, scale)
        return Cells(frozen_embeds, logits.permute(0, 3, 1, 2))

    def loss(
        self,
        frozen_embeds: Tensor,
        targets: SegmentationTargets,
        prototypes: Tensor,
        scale: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Cross-entropy of cells that are more than half covered by one class, and `L_vir` of their mixtures.

        Args:
            frozen_embeds: `(B, h, w, D)`; the grid covers the images of `targets`, padding included.
            prototypes: `(S, D)`, of the seen classes.
        """
        shares, target = F.adaptive_avg_pool2d(targets.masks.float(), frozen_embeds.shape[1:3]).max(1)
        labelled = shares > 0.5
        image = torch.arange(len(shares), device=shares.device)[:, None, None].expand_as(target)
        classes, embeds = targets.classes[image[labelled], target[labelled]], frozen_embeds[labelled]
        logits = class_logits(self.adapter(embeds), prototypes, scale)
        loss = mean_over_processes(F.cross_entropy(logits.float(), classes, reduction="none"))
        if self.feature_expansion is not None:
            mixed, _ = self.feature_expansion.mix(embeds, classes, prototypes, generator)
            loss = loss + self.virtual_weight * self.feature_expansion.distance(self.adapter(mixed), mixed, scale)
        return loss
