# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Chooses and draws the demo's example scenes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..checkpoints import load_checkpoint
from ..data.scenes import CLASSES, IGNORE_INDEX, Scene, draw_scene
from ..data.splits import load_split
from ..files import atomic_file, atomic_write_text, check_output


RIVALS = 2  # seen classes to add per unseen class


class Judge:
    """Predictions of a checkpoint for a scene."""

    def __init__(self, model: str, seen: np.ndarray) -> None:
        self.model, self.processor = load_checkpoint(model)
        self.seen = seen

    @torch.no_grad()
    def label_maps(self, scene: Scene, classes: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Class ids of shape (height, width) without and with the correction, with `classes` as the vocabulary."""
        prototypes = self.model.get_text_prototypes(self.processor, [CLASSES[i] for i in classes])
        inputs = self.processor(images=Image.fromarray(scene.image), return_tensors="pt")
        seen = torch.from_numpy(self.seen[classes])
        outputs = self.model(**inputs, text_prototypes=prototypes, seen_class_mask=seen)
        maps = [
            self.processor.post_process_semantic_segmentation(outputs, [scene.label.shape], gamma=gamma)[0].numpy()
            for gamma in (0.0, None)
        ]
        return np.array(classes)[maps[0]], np.array(classes)[maps[1]]

    def rivals(self, scene: Scene, unseen: int) -> list[int]:
        """The seen classes most often predicted on the area of `unseen` with the full vocabulary, largest first."""
        plain, _ = self.label_maps(scene, list(range(len(CLASSES))))
        counts = np.bincount(plain[scene.label == unseen], minlength=len(CLASSES)) * self.seen
        return [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]

    def gain(self, scene: Scene, classes: list[int]) -> float:
        """Increase in pixel accuracy by the correction."""
        known = scene.label != IGNORE_INDEX
        plain, corrected = self.label_maps(scene, classes)
        return float((corrected == scene.label)[known].mean() - (plain == scene.label)[known].mean())


def kind(index: int) -> str:
    """The colour of a thing class, or `"stuff"`."""
    color, _, pattern = CLASSES[index].partition(" ")
    return color if pattern else "stuff"


def describe(scene: Scene, seen: np.ndarray, judge: Judge | None) -> tuple[float, list[int]]:
    """Score of a scene as an example, and the ids of the classes to try on it."""
    ids, areas = np.unique(scene.label[scene.label != IGNORE_INDEX], return_counts=True)
    large = [int(i) for i, area in zip(ids, areas) if area >= 0.02 * scene.label.size]
    unseen = [i for i in large if not seen[i]]
    if not 1 <= len(unseen) <= 4 or len(large) - len(unseen) < 2:
        return -np.inf, []
    classes = [int(i) for i in ids]
    for index in unseen:
        rivals = judge.rivals(scene, index) if judge else []
        rivals += [i for i in range(len(CLASSES)) if seen[i] and kind(i) == kind(index)]
        classes += list(dict.fromkeys(i for i in rivals if i not in classes))[:RIVALS]
    unseen_area = sum(area for i, area in zip(ids, areas) if i in unseen) / scene.label.size
    return (judge.gain(scene, classes) if judge else unseen_area), sorted(classes)


def draw_examples(output: Path, count: int = 8, scan: int = 200, model: str | None = None) -> list[dict[str, Any]]:
    """Writes the images and `examples.json`: a list of `{"file", "classes", "unseen"}`, best example first.

    Images that are in an earlier `examples.json` but not in the new one are removed.

    Args:
        output: the folder to write to.
        count: number of examples.
        scan: number of scenes of the test split to choose from.
        model: a checkpoint whose correction the examples should show.

    Raises:
        ValueError: none of the scenes qualifies as an example, or `output` contains another program's `examples.json`.
    """
    index_file = check_output(output / "examples.json")
    old = _files_of(index_file)
    split = load_split("embedded_scenes")
    seen = np.array(split.seen_class_mask)
    judge = Judge(model, seen) if model else None
    ranked = []
    for index in range(scan):
        scene = draw_scene(0, "test", index)
        score, classes = describe(scene, seen, judge)
        if classes:
            ranked.append((-score, index, classes, scene))
    if not ranked:
        raise ValueError(f"None of the first {scan} scenes qualifies as an example; raise `--scan`.")
    ranked.sort(key=lambda entry: entry[:2])

    examples = []
    for _, index, classes, scene in ranked[:count]:
        file = f"scene_{index:03d}.png"
        with atomic_file(output / file) as partial:
            Image.fromarray(scene.image).save(partial, optimize=True)
        names = [CLASSES[i] for i in classes]
        examples.append({"file": file, "classes": names, "unseen": [CLASSES[i] for i in classes if not seen[i]]})
    atomic_write_text(index_file, json.dumps(examples, indent=2) + "\n")
    for file in old - {example["file"] for example in examples}:
        (output / file).unlink(missing_ok=True)
    return examples


def _files_of(index_file: Path) -> set[str]:
    """The image files listed in an `examples.json`, in the same folder."""
    if not index_file.exists():
        return set()
    try:
        names = {example["file"] for example in json.loads(index_file.read_text(encoding="utf-8"))}
        if all(re.fullmatch(r"scene_\d+\.png", name) for name in names):
            return names
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(f"{index_file} is not from this script: remove it, or choose another `--output_dir`.")
