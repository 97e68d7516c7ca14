# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Nouns, adjectives and hypernyms from WordNet 3.0 (Debian package `wordnet-base`, manual page wndb)."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path


# Numbers of lexicographer files (manual page lexnames) with nouns for visible things.
VISIBLE = {5: "animal", 6: "artifact", 8: "body", 13: "food", 17: "object", 18: "person", 20: "plant", 27: "substance"}
_WORD = re.compile(r"[a-z][a-z'\- ]+")


@dataclass(frozen=True)
class Synset:
    """A set of nouns with one meaning."""

    offset: int
    file: int  # number of the lexicographer file
    words: tuple[str, ...]
    parents: tuple[int, ...]  # offsets of hypernyms


class WordNet:
    """The nouns of WordNet.

    Args:
        folder: folder of `data.noun`, `index.noun` and `index.adj`.

    Raises:
        FileNotFoundError: the files are missing; the message says how to install them.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "data.noun").is_file():
            raise FileNotFoundError(
                f"`--wordnet` is {str(folder)!r}, which has no data.noun; expected the folder of WordNet's database. "
                "Run `apt-get install wordnet-base`, or pass the folder."
            )
        self.synsets = {synset.offset: synset for synset in map(_parse_synset, self._lines("data.noun"))}
        # Sense offsets of a noun, most frequent first, and the tag count of its senses.
        self.senses: dict[str, list[int]] = {}
        self.counts: dict[str, int] = {}
        for line in self._lines("index.noun"):
            fields = line.split()
            word, senses = fields[0].replace("_", " "), int(fields[2])
            self.senses[word] = [int(offset) for offset in fields[-senses:]]
            self.counts[word] = int(fields[-senses - 1])

    def _lines(self, name: str) -> list[str]:
        text = (self.folder / name).read_text(encoding="latin-1")
        return [line for line in text.splitlines() if not line.startswith("  ")]  # indented lines are the licence

    def ancestors(self, offset: int) -> set[int]:
        """Offsets of all hypernyms of a synset."""
        found, waiting = set(), [offset]
        while waiting:
            for parent in self.synsets[waiting.pop()].parents:
                if parent not in found:
                    found.add(parent)
                    waiting.append(parent)
        return found

    def find(self, word: str) -> int | None:
        """Offset of the first visible sense of a noun, also for a plural in -s; None if there is none."""
        word = word.lower()
        for form in (word, word.removesuffix("s")):
            for offset in self.senses.get(form, ()):
                if self.synsets[offset].file in VISIBLE:
                    return offset
        return None

    def nouns(self, limit: int) -> list[str]:
        """Up to `limit` nouns in lower case: frequent ones, then other visible things, short ones first."""
        ranked = {}
        for synset in self.synsets.values():
            for word in synset.words:
                lower = word.lower()
                proper = (word[0].isupper() and " " not in word) or word.startswith("genus ")  # Latin names, persons
                if proper or not _WORD.fullmatch(lower) or lower.count(" ") > 2:
                    continue
                count, visible = self.counts.get(lower, 0), synset.file in VISIBLE
                key = (-min(count, 3), not visible, lower.count(" "), len(lower), lower)
                if (visible or count) and (lower not in ranked or key < ranked[lower]):
                    ranked[lower] = key
        return sorted(ranked, key=ranked.get)[:limit]

    def adjectives(self, limit: int) -> list[str]:
        """The `limit` adjectives with the highest tag counts."""
        counted = {}
        for line in self._lines("index.adj"):
            fields = line.split()
            if _WORD.fullmatch(fields[0]):
                counted[fields[0]] = int(fields[-int(fields[2]) - 1])
        return sorted(counted, key=lambda word: (-counted[word], word))[:limit]


def _parse_synset(line: str) -> Synset:
    fields = line.split(" | ")[0].split()
    count = int(fields[3], 16)
    words = tuple(word.replace("_", " ") for word in fields[4 : 4 + 2 * count : 2])
    pointers = fields[5 + 2 * count :]
    parents = tuple(int(pointers[i + 1]) for i in range(0, len(pointers) - 3, 4) if pointers[i] in ("@", "@i"))
    return Synset(int(fields[0]), int(fields[1]), words, parents)


def write_phrases(nouns: list[str], adjectives: list[str], count: int, seed: int) -> list[str]:
    """Random phrases like those in class names and captions: 'wet road', 'cow and grass'."""
    rng = random.Random(seed)
    common = nouns[:8000]
    phrases = []
    for _ in range(count):
        first, second = rng.choice(common), rng.choice(common)
        form = rng.choice(("{a} {n}", "{a} {n}", "{n} {m}", "{n} and {m}", "{n} on the {m}", "the {n}"))
        phrases.append(form.format(a=rng.choice(adjectives), n=first, m=second))
    return phrases
