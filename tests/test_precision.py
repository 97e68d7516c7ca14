# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Accuracy in reduced precision, against scikit-learn."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from sklearn.metrics import jaccard_score

from zeroshot.checkpoints import load_checkpoint
from zeroshot.data.benchmarks import load_benchmark
from zeroshot.data.dataset import SegmentationDataset
from zeroshot.data.splits import load_split


@pytest.mark.slow
def test_precision_of_the_repositorys_checkpoint(tmp_path: Path) -> None:
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="ONNX export needs onnx, onnxscript and onnxruntime")
    command = [sys.executable, str(ROOT / "scripts" / "measure_precision.py"), "--limit", "3"]
    subprocess.run([*command, "--output", str(tmp_path / "precision.json")], check=True)
    report = json.loads((tmp_path / "precision.json").read_text())["."]
    assert (report["dataset"], report["images"]) == ("embedded_scenes", 3)
    ways = report["ways"]
    assert ways["torch"]["equal_pixels"] == 100 and all(scores["equal_pixels"] > 95 for scores in ways.values())

    split = load_split("embedded_scenes")
    dataset = SegmentationDataset(load_benchmark("embedded_scenes", "test", num_scenes=3), split, training=False)
    model, processor = load_checkpoint(ROOT)
    prototypes = model.get_text_prototypes(processor, list(split.classes))
    seen = torch.tensor([name not in split.unseen for name in split.classes])
    found, labels = [], []
    for index in range(3):
        image, label = dataset[index]["image"], dataset[index]["label"]
        with torch.no_grad():
            inputs = processor(images=image, return_tensors="pt")
            outputs = model(**inputs, text_prototypes=prototypes, seen_class_mask=seen)
        label_map = processor.post_process_semantic_segmentation(outputs, target_sizes=[label.shape])[0].numpy()
        found.append(label_map[label != split.ignore_index])
        labels.append(label[label != split.ignore_index])
    found, labels = np.concatenate(found), np.concatenate(labels)
    scores = jaccard_score(labels, found, average=None, labels=np.union1d(labels, found))
    assert ways["torch"]["miou"] == pytest.approx(100 * scores.mean(), abs=1e-6)
    assert ways["torch"]["pixel_accuracy"] == pytest.approx(100 * (labels == found).mean(), abs=1e-6)
