# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Choosing θ and γ without unseen labels: no unseen name or pixel is used."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score
from tiny import tiny_checkpoint

from modeling_alignzeg import AlignZegOutput, AlignZegProcessor
from modeling_alignzeg.readout_alignzeg import resize_matrix
from zeroshot.checkpoints import load_checkpoint
from zeroshot.data import dataset
from zeroshot.data.benchmarks import open_part
from zeroshot.data.dataset import SegmentationDataset
from zeroshot.data.splits import load_split
from zeroshot.evaluation import calibration
from zeroshot.evaluation.calibration import (
    GAMMAS,
    THRESHOLDS,
    BestProposal,
    average_recall,
    best_proposals,
    calibrate,
    calibrate_models,
    indicator_roc_auc,
    oracle_logits,
    store_correction,
)
from zeroshot.evaluation.evaluator import Readout, evaluation_batches
from zeroshot.settings import Settings, load_settings
from zeroshot.training.trainer import Trainer


SPLIT = load_split("embedded_scenes")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    values = {
        "model.checkpoint": tiny_checkpoint(tmp_path / "start"),
        "output_dir": tmp_path / "runs",
        "data.dataset": "embedded_scenes",
        "data.num_train": 6,
        "data.num_validation": 8,
        "data.transform": "{crop_size: 32, scale_range: [0.25, 0.5]}",
        "training.steps": 1,
        "training.batch_size": 2,
    }
    return load_settings([f"--{name}={value}" for name, value in values.items()])


def test_no_unseen_name_or_pixel_takes_part(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tokenized name, every label in training or scoring, and the result after unseen pixels are relabelled as other
    unseen classes."""
    names: set[str] = set()
    tokenized = AlignZegProcessor.encode_class_names

    def encode(self, class_names, *args, **kwargs):
        names.update(class_names)
        return tokenized(self, class_names, *args, **kwargs)

    labels: list[tuple[tuple[str, ...], np.ndarray]] = []
    sample = SegmentationDataset.__getitem__

    def look(self, index):
        found = sample(self, index)
        labels.append((self.split.classes, np.unique(np.asarray(found["label"]))))
        return found

    monkeypatch.setattr(AlignZegProcessor, "encode_class_names", encode)
    monkeypatch.setattr(SegmentationDataset, "__getitem__", look)
    scores: list[dict] = []
    evaluate = calibration.evaluate_model

    def evaluated(*args, **kwargs):
        scores.append(evaluate(*args, **kwargs))
        return scores[-1]

    monkeypatch.setattr(calibration, "evaluate_model", evaluated)
    calibrate(settings)
    assert names == set(SPLIT.seen)
    assert len(labels) > 4
    for classes, found in labels:
        assert classes == SPLIT.seen
        assert {classes[i] for i in found if i != SPLIT.ignore_index} <= set(SPLIT.seen)

    unseen = np.array(SPLIT.unseen_ids)
    read = dataset._label_array

    def paint(ids):
        def repainted(value):
            label = read(value)
            label[np.isin(label, ids)] = ids[-1]
            return label

        monkeypatch.setattr(dataset, "_label_array", repainted)

    paint(unseen)
    calibrate(settings)
    paint(np.array(SPLIT.seen_ids[::2]))
    calibrate(settings)
    first, other_unseen, other_seen = (json.dumps(found, default=str) for found in scores)
    assert first == other_unseen != other_seen


def test_the_report_has_the_whole_grid_and_its_best(settings: Settings) -> None:
    report = calibrate(settings, folds=2)
    assert set(report["grid"]) == {"off", *(f"{g}/{t}" for g in GAMMAS for t in THRESHOLDS)}
    assert report["hiou"] == max(report["grid"].values())
    assert report["hiou_without_correction"] == report["grid"]["off"]
    assert report["pseudo_unseen_share"] == pytest.approx(18 / 70)
    assert calibrate(settings)["folds"] == 1  # works despite the files of an earlier run


@pytest.mark.parametrize("folds", [0, -1])
def test_nothing_is_chosen_without_a_fold_or_a_score(folds: int, settings: Settings, monkeypatch) -> None:
    with pytest.raises(ValueError, match=f"`folds` is {folds}"):
        calibrate(settings, folds=folds)
    nothing = lambda *args, **kwargs: {name: {"hiou": float("nan")} for name in args[-1]}
    monkeypatch.setattr(calibration, "evaluate_model", nothing)
    with pytest.raises(ValueError, match="No correction can be chosen.*num_validation"):
        calibrate(settings)


def test_what_fails_at_the_end_is_found_before_the_training(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("the training started"))
    start = tiny_checkpoint(tmp_path / "plain", bias_correction=False)
    with pytest.raises(ValueError, match="`bias_correction` is off"):
        calibrate(dataclasses.replace(settings, model=dataclasses.replace(settings.model, checkpoint=str(start))))
    monkeypatch.setattr(dataset, "_label_array", lambda value: np.full((128, 128), 254))
    with pytest.raises(ValueError, match=r"(?s)The dataset cannot be used.*254"):
        calibrate(dataclasses.replace(settings, data=dataclasses.replace(settings.data, validate=False)))


def test_trained_models_are_calibrated_on_the_unseen_classes(settings: Settings, tmp_path: Path) -> None:
    """The mean over models of what evaluate_model finds for each γ and θ, with the split's own unseen classes."""
    folders = [str(tiny_checkpoint(tmp_path / name, num_queries=count)) for name, count in (("a", 4), ("b", 6))]
    report = calibrate_models(settings, folders)
    grids = []
    for folder in folders:
        model, processor = load_checkpoint(folder)
        part = SegmentationDataset(open_part(settings.data, "validation", 8), SPLIT, training=False)
        readouts = {"off": Readout(gamma=0.0), "8.0/0.3": Readout(gamma=8.0, threshold=0.3)}
        grids.append(
            calibration.evaluate_model(
                model,
                processor.image_processor,
                evaluation_batches(part, processor, 8),
                SPLIT,
                model.get_text_prototypes(processor, list(SPLIT.classes)),
                readouts,
            )
        )
    for name in ("off", "8.0/0.3"):
        assert report["grid"][name] == pytest.approx(np.mean([grid[name]["hiou"] for grid in grids]))
    assert report["models"] == 2 and report["hiou"] == max(report["grid"].values())
    without = str(tiny_checkpoint(tmp_path / "without", bias_correction=False))
    with pytest.raises(ValueError, match="without PBC"):
        calibrate_models(settings, [folders[0], without])


@torch.no_grad()
def test_the_best_query_of_each_class_is_looked_at(settings: Settings) -> None:
    trainer = Trainer(settings)
    model = trainer.model.eval()
    part = SegmentationDataset(open_part(settings.data, "validation", 3), SPLIT, training=False)
    prototypes = model.get_text_prototypes(trainer.processor, list(SPLIT.classes))
    seen = torch.tensor(SPLIT.seen_class_mask)
    expected, found = [], []
    for batch in evaluation_batches(part, trainer.processor, 3):
        images = {"pixel_values": batch["pixel_values"], "pixel_mask": batch["pixel_mask"]}
        outputs = model(**images, text_prototypes=prototypes, seen_class_mask=seen)
        found += best_proposals(outputs, batch["labels"], SPLIT)
        for index, label in enumerate(batch["labels"]):
            queries = outputs.masks_queries_logits[index, : model.config.num_queries]  # not the unclaimed region
            masks = torch.nn.functional.interpolate(queries[None], label.shape, mode="bilinear")[0].sigmoid() > 0.5
            for class_id in np.setdiff1d(label, [SPLIT.ignore_index]):
                target = (label == class_id).numpy()
                ious = [jaccard_score(target.ravel(), mask.numpy().ravel(), zero_division=0.0) for mask in masks]
                unseen = outputs.unseen_logits[index, int(np.argmax(ious))].sigmoid()
                expected.append((max(ious), class_id in SPLIT.unseen_ids, float(unseen)))
    assert len(found) > 5 and [p.is_unseen for p in found] == [e[1] for e in expected]
    np.testing.assert_allclose([p.iou for p in found], [e[0] for e in expected], atol=1e-3)
    np.testing.assert_allclose([p.unseen_probability for p in found], [e[2] for e in expected], atol=1e-6)


def test_average_recall_is_that_of_coco() -> None:
    found = [BestProposal(0.5, True, 0.2), BestProposal(0.72, True, 0.9), BestProposal(0.3, False, 0.1)]
    assert average_recall(found, True) == pytest.approx(100 * (1 + 5) / 20)
    assert average_recall(found, False) == 0 and np.isnan(average_recall(found[2:], True))
    assert indicator_roc_auc(found) == 1.0


def test_the_correction_is_stored_beside_everything_else(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "checkpoint")
    before = json.loads((folder / "processor_config.json").read_text())
    store_correction(folder, 0.25, 0.7)
    after = json.loads((folder / "processor_config.json").read_text())
    before["image_processor"] |= {"correction_gamma": 0.25, "correction_threshold": 0.7}
    assert after == before


def test_a_perfect_indicator_follows_the_labels() -> None:
    """Against sums over the pixels of resized masks, with padding, void pixels and an odd label size."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(2, 5, 6, 8, generator=generator)
    contents = torch.tensor([[6.0, 8.0], [4.5, 8.0]])
    classes = torch.tensor([*SPLIT.unseen_ids, *SPLIT.seen_ids[: len(SPLIT.unseen_ids)], SPLIT.ignore_index])
    labels = [classes[torch.randint(len(classes), size, generator=generator)] for size in ((23, 31), (17, 29))]
    found = oracle_logits(AlignZegOutput(masks_queries_logits=logits, content_sizes=contents), labels, SPLIT)
    for masks, content, label, row in zip(logits.sigmoid(), contents.tolist(), labels, found):
        rows, columns = (resize_matrix(*axis) for axis in zip(masks.shape[1:], label.shape, content))
        for mask, logit in zip(masks, row):
            pixels = rows @ mask @ columns.T
            unseen = sum(pixels[label == i].sum() for i in SPLIT.unseen_ids)
            assert logit == (20 if unseen > pixels[label != SPLIT.ignore_index].sum() / 2 else -20)
    assert 0 < (found > 0).sum() < found.numel()
