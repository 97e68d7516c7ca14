# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Evaluation with only the classes of each image, against segmentation of each image with these names."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score
from tiny import tiny_checkpoint

from zeroshot.checkpoints import load_checkpoint
from zeroshot.data.benchmarks import load_benchmark
from zeroshot.data.dataset import SegmentationDataset
from zeroshot.data.splits import load_split
from zeroshot.evaluation.evaluator import Readout, evaluate_model, evaluation_batches


def test_only_present_is_segmenting_with_the_names_of_each_image(tmp_path: Path) -> None:
    """With and without blind constants, which share one table of scores."""
    model, processor = load_checkpoint(tiny_checkpoint(tmp_path / "start"))
    split = load_split("embedded_scenes")
    rows = load_benchmark("embedded_scenes", "validation", num_scenes=3)
    dataset = SegmentationDataset(rows, split, training=False)
    prototypes = model.get_text_prototypes(processor, list(split.classes))
    penalties = {"plain": 0.0, "constant": 0.1, "large": 2.0}
    scores = evaluate_model(
        model,
        processor.image_processor,
        evaluation_batches(dataset, processor, 1),
        split,
        prototypes,
        {name: Readout(gamma=0.0, seen_penalty=value) for name, value in penalties.items()},
        only_present=True,
    )

    truth, found = [], {name: [] for name in penalties}
    for sample in (dataset[index] for index in range(len(dataset))):
        label = sample["label"]
        ids = [index for index in range(len(split.classes)) if (label == index).any()]
        names = [split.classes[index] for index in ids]
        seen = torch.tensor([name not in split.unseen for name in names])
        inputs = processor(images=sample["image"], return_tensors="pt")
        with torch.no_grad():
            outputs = model(
                **inputs, text_prototypes=model.get_text_prototypes(processor, names), seen_class_mask=seen
            )
        labelled = label != split.ignore_index
        truth.append(label[labelled])
        for name, value in penalties.items():
            [chosen] = processor.image_processor.post_process_semantic_segmentation(
                outputs, [label.shape], gamma=0.0, seen_penalty=value
            )
            found[name].append(np.array(ids)[chosen.numpy()][labelled])
    expected = {name: 100 * accuracy_score(np.concatenate(truth), np.concatenate(found[name])) for name in penalties}
    assert {name: scores[name]["pixel_accuracy"] for name in penalties} == pytest.approx(expected)
    assert len(set(expected.values())) > 1
