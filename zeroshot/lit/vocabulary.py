# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The vocabulary of named photographs: their own names, and more general ones from WordNet."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from .names import GENERAL_NAMES, english_name, imagenet_offset
from .wordnet import WordNet


@dataclass
class Vocabulary:
    """All names, and their hierarchy.

    Attributes:
        names: names of photographs, followed by general ones.
        ancestors: for each name, the set of more general names, as positions.
        photo_names: position of the name of each photograph, in their original order.
        imagenet: position of the name of each of the 1,000 outputs of the tower's classifier.
    """

    names: list[str]
    ancestors: list[set[int]]
    photo_names: torch.Tensor
    imagenet: torch.Tensor

    @classmethod
    def build(cls, rows: list[dict], wordnet: WordNet) -> Vocabulary:
        """The vocabulary of photographs, starting with the 1,000 of ImageNet in the order of class ids.

        Args:
            rows: photographs with `name` and `source`.
            wordnet: source of the hierarchy.
        """
        general = set(GENERAL_NAMES)
        of_synset: dict[int, str] = {}  # Caltech uses different names for some ImageNet classes
        names: dict[str, set[str]] = {}
        spoken = []
        for row in sorted(rows, key=lambda row: row["source"].startswith("imagenet")):  # Caltech's names are simpler
            name = english_name(row)
            offset = imagenet_offset(row["source"]) if "imagenet" in row["source"] else wordnet.find(name)
            if offset is not None:
                common = [word for word in wordnet.synsets[offset].words if word in general]
                name = of_synset.setdefault(offset, common[0] if common else name)
            above = wordnet.ancestors(offset) if offset is not None else ()
            more_general = {word for parent in above for word in wordnet.synsets[parent].words if word in general}
            names.setdefault(name, set()).update(more_general - {name})
            spoken.append((row["source"], name))
        leaves = list(names)
        ordered = leaves + sorted({word for above in names.values() for word in above} - set(leaves))
        position = {name: index for index, name in enumerate(ordered)}
        ancestors = [{position[word] for word in names.get(name, ())} for name in ordered]
        general_above = [  # per general name: names that are above all its descendants
            [ancestors[leaf] for leaf in range(len(leaves)) if index in ancestors[leaf]]
            for index in range(len(ordered))
        ]
        for index in range(len(leaves), len(ordered)):
            shared = set.intersection(*general_above[index])
            ancestors[index] = {
                other for other in shared - {index} if len(general_above[other]) > len(general_above[index])
            }
        by_source = dict(spoken)
        photo_names = torch.tensor([position[by_source[row["source"]]] for row in rows])
        return cls(ordered, ancestors, photo_names, photo_names[:1000].clone())

    def related(self) -> torch.Tensor:
        """`bool (names, names)`: whether one name is a kind of the other, so that both fit the same photograph."""
        result = torch.zeros(len(self.names), len(self.names), dtype=torch.bool)
        for index, above in enumerate(self.ancestors):
            result[index, list(above)] = result[list(above), index] = True
        return result

    def draw_level(self, rng: random.Random) -> torch.Tensor:
        """Replacement of every name at a random level of generality, `int64 (names,)`.

        Each general name is used or not at random; the most general name in use replaces all names below it.
        """
        below = [0] * len(self.names)
        for above in self.ancestors:
            for index in above:
                below[index] += 1
        used = {index for index, count in enumerate(below) if count and rng.random() < (0.3 if count < 60 else 0.06)}
        called = []
        for index, above in enumerate(self.ancestors):
            candidates = sorted(above & used, key=lambda other: (-below[other], other))
            called.append(candidates[0] if candidates else index)
        return torch.tensor(called)
