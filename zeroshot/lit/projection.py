# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The trained part of LiT: a projection from pooled image features into the text space."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from modeling_alignzeg.layers_alignzeg import AlignZegMLP

from .names import SYNONYMS
from .tower import FEATURE_SIZE
from .vocabulary import Vocabulary


TAU = 30.0  # scale of cosines before the softmax


class Projection(nn.Module):
    """`normalize(W x + b + MLP(x))` for features `x` averaged over a region."""

    def __init__(self, input_size: int = FEATURE_SIZE, hidden_size: int = 192, output_size: int = 384):
        super().__init__()
        self.linear = nn.Linear(input_size, output_size)
        self.mlp = AlignZegMLP(input_size, hidden_size, output_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(..., 1280)` to unit vectors `(..., 384)`."""
        return F.normalize(self.linear(features) + self.mlp(features), dim=-1)


@dataclass
class NamedPhotos:
    """Named photographs: `views` `(photographs, scales x 2, 9, 1280)`, `labels` `(photographs,)`."""

    views: torch.Tensor
    labels: torch.Tensor


@dataclass
class TaggedPhotos:
    """Tagged photographs: `cells` `(rows, columns, 1280)` for each, and `tags` `bool (photographs, names)`."""

    cells: list[torch.Tensor]
    tags: torch.Tensor
    names: list[str]


@dataclass
class Recipe:
    """Hyper-parameters of the projection's training."""

    steps: int = 600
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    named_per_step: int = 192
    tagged_per_step: int = 6  # photographs from each tagged set
    regions: int = 40  # regions per tagged photograph
    posterior_regions: int = 256  # features per step that are distilled from the tower's own posterior
    posterior_weight: float = 1.0
    tag_weight: float = 1.0
    seed: int = 0


def pool_regions(cells: torch.Tensor, count: int, rng: random.Random) -> torch.Tensor:
    """Means over random squares of 1 to 3 cells per side: `(rows, columns, 1280)` to `(count, 1280)`."""
    side = rng.choice((1, 1, 2, 3))
    flat = cells.float().permute(2, 0, 1)
    pooled = F.avg_pool2d(flat, side, stride=1).flatten(1).T if side > 1 else flat.flatten(1).T
    drawn = torch.tensor([rng.randrange(len(pooled)) for _ in range(count)])
    return pooled[drawn]


def tag_loss(probabilities: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
    """Image-level loss per photograph: `-log p` of tagged names, `-log(1 - p)` of the others.

    Args:
        probabilities: name probabilities per region, `(photographs, regions, names)`; `p` is their mean over regions.
        tags: tagged names, `bool (photographs, names)`.
    """
    present = probabilities.mean(1).clamp(1e-6, 1 - 1e-6)
    return -torch.where(tags, present.log(), (1 - present).log()).sum(1).mean()


class ProjectionTrainer:
    """Trains a projection on cached features against fixed text embeddings.

    Args:
        recipe: hyper-parameters.
        vocabulary: names of the named photographs.
        allowed: names to use in training, `bool (names,)`.
        named: named photographs.
        tagged: sets of tagged photographs.
        classifier: the tower's ImageNet classifier.
        text: unit vector of every text that is used as a name.
    """

    def __init__(
        self,
        recipe: Recipe,
        vocabulary: Vocabulary,
        allowed: torch.Tensor,
        named: NamedPhotos,
        tagged: list[TaggedPhotos],
        classifier: nn.Linear,
        text: dict[str, torch.Tensor],
    ):
        self.recipe, self.vocabulary, self.allowed = recipe, vocabulary, allowed
        self.named, self.tagged, self.classifier = named, tagged, classifier
        self.text = text
        self.name_text = torch.stack([text[name] for name in vocabulary.names])
        self.related = vocabulary.related()
        self.rng = random.Random(recipe.seed)
        self.usable = allowed[named.labels].nonzero()[:, 0]

    def train(self) -> Projection:
        """Trains the projection and returns it."""
        recipe = self.recipe
        torch.manual_seed(recipe.seed)
        projection = Projection(output_size=self.name_text.shape[1])
        optimizer = torch.optim.AdamW(
            projection.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        progress = tqdm(range(recipe.steps), desc="projection", mininterval=20.0)
        for step in progress:
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps)
            optimizer.param_groups[0]["lr"] = recipe.learning_rate * min((step + 1) / 30, cosine)
            loss = self._loss(projection)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 50 == 0:
                progress.set_postfix(loss=round(loss.item(), 3))
        return projection.eval()

    def _loss(self, projection: Projection) -> torch.Tensor:
        """The loss of one step, with all features projected in one batch."""
        recipe = self.recipe
        level = self.vocabulary.draw_level(self.rng)
        features, labels = self._draw_named()
        parts, tags = [features], []
        for photos in self.tagged:
            chosen = [self.rng.randrange(len(photos.cells)) for _ in range(recipe.tagged_per_step)]
            parts += [pool_regions(photos.cells[index], recipe.regions, self.rng) for index in chosen]
            tags.append(photos.tags[chosen])
        features = torch.cat(parts)
        embeddings = projection(features)
        loss = self._naming_loss(embeddings[: len(labels)], labels, level)
        drawn = torch.randperm(len(features))[: recipe.posterior_regions]
        loss = loss + recipe.posterior_weight * self._posterior_loss(embeddings[drawn], features[drawn], level)
        start = len(labels)
        for photos, present in zip(self.tagged, tags):
            stop = start + recipe.tagged_per_step * recipe.regions
            spoken = [self.rng.choice((name, name, *SYNONYMS.get(name, ()))) for name in photos.names]
            text = torch.stack([self.text[name] for name in spoken])
            probabilities = (TAU * embeddings[start:stop] @ text.T).softmax(-1)
            probabilities = probabilities.reshape(recipe.tagged_per_step, recipe.regions, -1)
            loss = loss + recipe.tag_weight * tag_loss(probabilities, present) / len(self.tagged)
            start = stop
        return loss

    def _draw_named(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Random views `(batch, 1280)` of named photographs, and their names `(batch,)`."""
        count = self.recipe.named_per_step
        photos = self.usable[torch.randint(len(self.usable), (count,))]
        variant = torch.randint(self.named.views.shape[1], (count,))
        view = torch.randint(1, 5, (count,)) * (torch.rand(count) < 0.4)  # whole or a quarter
        return self.named.views[photos, variant, view].float(), self.named.labels[photos]

    def _naming_loss(self, embeddings: torch.Tensor, labels: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Cross-entropy over the names of a level, without other names that are also correct."""
        target = level[labels]
        logits = TAU * embeddings @ self.name_text.T
        used = torch.zeros(len(level), dtype=torch.bool)
        used[level[self.allowed]] = True
        wrong = ~used | self.related[target]
        return F.cross_entropy(logits.masked_fill(wrong, -torch.inf), target)

    def _posterior_loss(self, embeddings: torch.Tensor, features: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """KL from the tower's ImageNet posterior, summed over the names of a level, to the predicted probabilities."""
        classes = self.vocabulary.imagenet
        kept = self.allowed[classes]
        posterior = self.classifier(features)[:, kept].softmax(-1)
        used, column = level[classes[kept]].unique(return_inverse=True)
        target = torch.zeros(len(features), len(used)).index_add_(1, column, posterior)
        predicted = (TAU * embeddings @ self.name_text[used].T).log_softmax(-1)
        return F.kl_div(predicted, target, reduction="batchmean")
