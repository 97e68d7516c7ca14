# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What named photographs may be called: their own names, and the more general ones that WordNet has for them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from .names import GENERAL_NAMES, english_name, imagenet_offset
from .wordnet import WordNet


@dataclass
class Vocabulary:
    """All names, and which of them are kinds of which.

    Attributes:
        names: the names of photographs first, general ones after them.
        ancestors: for each name, the set of more general ones, as positions.
        photo_names: position of the name of each photograph, in the order in which they were given.
        imagenet: position of the name of each of the 1,000 outputs of the tower's classifier.
    """

    names: list[str]
    ancestors: list[set[int]]
    photo_names: torch.Tensor
    imagenet: torch.Tensor

    @classmethod
    def build(cls, rows: list[dict], wordnet: WordNet) -> Vocabulary:
        """The vocabulary of photographs, the 1,000 of ImageNet in the order of class ids first.

        Args:
            rows: photographs with `name` and `source`.
            wordnet: says what is a kind of what.
        """
        general = set(GENERAL_NAMES)
        of_synset: dict[int, str] = {}  # Caltech has names of its own for what ImageNet has too
        names: dict[str, set[str]] = {}
        spoken = []
        for row in sorted(rows, key=lambda row: row["source"].startswith("imagenet")):  # Caltech's names are plainer
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
        general_above = [  # of a general name: those that stand above everything below it
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
        """`bool (names, names)`: one is a kind of the other, so that both are right for the same photograph."""
        result = torch.zeros(len(self.names), len(self.names), dtype=torch.bool)
        for index, above in enumerate(self.ancestors):
            result[index, list(above)] = result[list(above), index] = True
        return result

    def draw_level(self, rng: random.Random) -> torch.Tensor:
        """What every name is called at a level of generality drawn at random, `int64 (names,)`.

        Each general name is used or not; below one that is used, the most general that is used takes the place of all.
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
