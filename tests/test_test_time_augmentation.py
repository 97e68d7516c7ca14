# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Test-time augmentation against a plain loop over windows, and evaluation of any checkpoint on any dataset."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image

from modeling_alignzeg import AlignZegOutput, readout_alignzeg
from modeling_alignzeg.readout_alignzeg import label_map, resize_matrix
from zeroshot.evaluation.test_time_augmentation import Augmentation, window_starts


SEEN = torch.tensor([name not in tiny.UNSEEN for name in tiny.CLASSES])


class Decided:
    """An untrained model gives similar proposals; here each one has its own classes and a distinct mask."""

    def __init__(self) -> None:
        self.model = tiny.tiny_model(seed=3)
        self.model.set_vocabulary(list(tiny.CLASSES), list(tiny.UNSEEN), tiny.tiny_processor())
        self.logits = 3 * torch.randn(1, 7, len(tiny.CLASSES) + 1, generator=torch.Generator().manual_seed(1))
        self.unseen = torch.tensor([[2.0, -2.0, 1.0, -1.0, 0.5, -0.5, 0.0]])

    def __call__(self, pixel_values: torch.Tensor, **vocabulary: torch.Tensor) -> AlignZegOutput:
        outputs = self.model(pixel_values=pixel_values, **vocabulary)
        masks = outputs.masks_queries_logits
        masks = masks - masks.mean((2, 3), keepdim=True)
        outputs.masks_queries_logits = 4 * masks / masks.std((2, 3), keepdim=True)
        outputs.class_queries_logits = outputs.class_queries_logits + self.logits
        outputs.unseen_logits = outputs.unseen_logits + self.unseen
        return outputs


@pytest.fixture(scope="module")
def model() -> Decided:
    return Decided()


def image_of(height: int, width: int) -> torch.Tensor:
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(0))


def slow_scores(
    model: Decided, image: torch.Tensor, size: tuple[int, int], window: int, stride: int, flip: bool, gamma: float
) -> torch.Tensor:
    """The mean score `(classes, height, width)` of all views, one at a time, sampled by `grid_sample`."""

    def starts(length):
        found = [0]
        while found[-1] + window < length:
            found.append(min(found[-1] + stride, length - window))
        return found

    height, width = image.shape[1:]
    total, count = torch.zeros(len(SEEN), *size), torch.zeros(size)
    y = (torch.arange(size[0]) + 0.5) * height / size[0]
    x = (torch.arange(size[1]) + 0.5) * width / size[1]
    for top in starts(height):
        for left in starts(width):
            crop = image[:, top : top + window, left : left + window]
            h, w = crop.shape[1:]
            for is_flipped in (False, True) if flip else (False,):
                pixels = torch.from_numpy(np.ascontiguousarray(crop.numpy()[..., ::-1])) if is_flipped else crop
                with torch.no_grad():
                    outputs = model(pixel_values=pixels[None])
                logits = outputs.class_queries_logits[0]
                probabilities = logits.softmax(-1)
                for query, unseen in enumerate(outputs.unseen_logits[0].sigmoid()):
                    if unseen > 0.5:
                        probabilities[query] = tiny.plain_correction(logits[query], SEEN, gamma)
                scores = torch.einsum("nc,nhw->chw", probabilities[:, :-1], outputs.masks_queries_logits[0].sigmoid())
                # Cells beyond the content are padding; the last cell with content is included, and the border is repeated.
                cells = outputs.content_sizes[0].tolist()
                scores = scores[:, : -int(-cells[0] // 1), : -int(-cells[1] // 1)]
                rows, columns = (y - top) / h, (x - left) / w
                inside = ((rows >= 0) & (rows < 1))[:, None] & ((columns >= 0) & (columns < 1))
                columns = 1 - columns if is_flipped else columns
                rows, columns = rows * cells[0] / scores.shape[1], columns * cells[1] / scores.shape[2]
                grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], -1) * 2 - 1
                sampled = F.grid_sample(scores[None], grid[None], padding_mode="border", align_corners=False)[0]
                total += sampled * inside
                count += inside
    assert (count > 0).all()
    return total / count


@pytest.mark.parametrize(
    ("image_size", "size", "window", "stride", "flip"),
    [
        ((48, 64), (96, 120), None, None, True),
        ((40, 75), (53, 100), None, None, True),  # sides that are not a multiple of a token
        ((40, 75), (53, 100), 32, 20, False),
        ((40, 75), (53, 100), 32, 32, True),
        ((30, 70), (20, 41), 32, 11, True),  # lower than a window; label map smaller than the image
    ],
)
@pytest.mark.parametrize("gamma", [0.0, 1.5])
def test_mean_over_views_equals_a_plain_loop(model, image_size, size, window, stride, flip, gamma) -> None:
    image = image_of(*image_size)
    processor = tiny.tiny_processor().image_processor
    augmentation = Augmentation(flip, window, stride, batch_size=3)
    _, views = augmentation.views(model, processor, image, size, [(9.0, 0.2), (gamma, 0.5)])
    labels = label_map(views)
    expected = slow_scores(model, image, size, window or 10**6, stride or 1, flip, gamma)
    assert labels.shape == size and labels.dtype == torch.int64
    taken = expected.gather(0, labels[None])[0]
    assert (expected.amax(0) - taken).max() < 1e-5
    assert len(labels.unique()) > 1  # otherwise the test would be trivial
    penalty = 0.05 * SEEN
    punished = expected - penalty[:, None, None]
    labels = label_map(views, penalty)
    assert (punished.amax(0) - punished.gather(0, labels[None])[0]).max() < 1e-5


def test_a_single_view_is_the_usual_read_out(model: Decided) -> None:
    image, size = image_of(48, 64), (67, 90)
    ((view,),) = (views,) = Augmentation().views(
        model, tiny.tiny_processor().image_processor, image, size, [(None, None)]
    )
    with torch.no_grad():
        outputs = model(pixel_values=image[None])
    (expected,) = tiny.tiny_processor().post_process_semantic_segmentation(outputs, target_sizes=[size])
    assert torch.equal(label_map(views), expected)
    assert torch.equal(view.rows, resize_matrix(view.masks.shape[1], 67, outputs.content_sizes[0, 0].item()))


def test_tiles_and_parts_of_the_classes_change_nothing(model, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = tiny.tiny_processor().image_processor
    (views,) = Augmentation(True, 32, 20).views(model, processor, image_of(40, 75), (53, 100), [(0.0, 0.5)])
    whole = label_map(views)
    monkeypatch.setattr(readout_alignzeg, "TILE_PIXELS", {"cpu": 7})
    monkeypatch.setattr(readout_alignzeg, "WORKSPACE", 100)
    assert (label_map(views) != whole).float().mean() < 1e-3  # ties


@pytest.mark.parametrize(
    ("length", "window", "stride", "expected"),
    [
        (640, 640, 426, [0]),
        (100, 640, 426, [0]),
        (641, 640, 426, [0, 1]),
        (1000, 640, 320, [0, 320, 360]),
        (6, 2, 2, [0, 2, 4]),
    ],
)
def test_windows_cover_a_side(length: int, window: int, stride: int, expected: list[int]) -> None:
    assert window_starts(length, window, stride) == expected
    matrices = [resize_matrix(5, 37, 4.5, (start, min(window, length), length)) for start in expected]
    assert (sum(matrix.sum(1) for matrix in matrices) >= 1 - 1e-6).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"window": 0}, "`sliding_window` is 0"),
        ({"stride": 5}, "`sliding_window` is missing"),
        ({"window": 64, "stride": 65}, "`stride` is 65; expected 1 to 64"),
        ({"window": 64, "stride": 0}, "`stride` is 0"),
    ],
)
def test_windows_that_make_no_sense_are_named(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Augmentation(**arguments)


MEMORY = """
import resource
import torch, torch.nn.functional as F
from modeling_alignzeg.readout_alignzeg import View, label_map, resize_matrix
torch.set_num_threads(1)
torch.manual_seed(0)
table = (40 * F.normalize(torch.randn(100, 64), dim=-1) @ F.normalize(torch.randn(10000, 64), dim=-1).T).softmax(-1)
masks = [(F.interpolate(torch.randn(1, 100, 8, 8) * 4, size=(64, 64), mode="bicubic")[0]).sigmoid() for _ in range(2)]
rows = resize_matrix(64, 192)
views = [View(table, mask, rows, rows) for mask in masks]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
labels = label_map(views)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, len(labels.unique()))
"""


def test_ten_thousand_classes_fit_into_memory() -> None:
    command = [sys.executable, "-c", MEMORY]
    extra, classes = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert extra < 512 and classes > 10  # MiB; all scores at full size would be 1.4 GiB


# --- the script


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A model that counts as trained on three of COCO-Stuff's classes, with a fourth as unseen."""
    model, processor = tiny.tiny_model(), tiny.tiny_processor()
    model.set_vocabulary(["person", "dog", "grass", "sheep"], ["sheep"], processor)
    return tiny.save_checkpoint(model, processor, tmp_path_factory.mktemp("model") / "checkpoint")


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> dict[str, list[str]]:
    """Flags that open an ADE20K and a VOC tree of two images each."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("trees")
    flags = {}
    for name, images, labels, raw_ids in (
        ("ade20k", "images/validation", "annotations/validation", [0, 1, 2, 13, 150]),
        ("voc2012", "JPEGImages", "SegmentationClass", [0, 12, 15, 17, 255]),
    ):
        for folder in (images, labels):
            (root / name / folder).mkdir(parents=True)
        for index in range(2):
            tiny.picture(index).save(root / name / images / f"{index}.jpg")
            raw = rng.choice(raw_ids, (40, 48)).astype(np.uint8)
            Image.fromarray(raw).save(root / name / labels / f"{index}.png")
        flags[name] = ["--dataset", name, "--part", "val", "--root", str(root / name)]
    lists = root / "voc2012" / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("0\n1\n")
    return flags


def evaluate(monkeypatch: pytest.MonkeyPatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")


@pytest.mark.parametrize(
    ("name", "classes", "unseen_by_split", "seen_by_checkpoint"),
    [("ade20k", 150, 0, {"person", "grass"}), ("voc2012", 20, 5, {"person", "dog"})],
)
def test_a_checkpoint_meets_another_benchmark_by_flags_alone(
    checkpoint, trees, monkeypatch, tmp_path, name, classes, unseen_by_split, seen_by_checkpoint
) -> None:
    report = tmp_path / "report.json"
    augmented = [
        "--flip",
        "--sliding_window",
        32,
        "--shortest_edge",
        40,
        "--template_set",
        "vild",
        "--seen_penalty",
        0.1,
    ]
    for flags in ([], ["--unseen_from", "checkpoint", *augmented]):
        evaluate(monkeypatch, "--model", checkpoint, *trees[name], "--output", report, *flags)
        values = json.loads(report.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
        protocol = values["protocol"]
        assert values["images"] == 2 and len(values["per_class"]) == protocol["classes"] == classes
        assert 0 <= values["pixel_accuracy"] <= 100
        if not flags:
            assert len(protocol["unseen"]) == unseen_by_split and (values["hiou"] is None) == (unseen_by_split == 0)
            assert protocol["flip"] is False and protocol["sliding_window"] is None
            assert protocol["size"] == {"shortest_edge": 32, "longest_edge": 64}
    assert set(values["per_class"]) - set(protocol["unseen"]) == seen_by_checkpoint
    assert protocol["flip"] is True and (protocol["sliding_window"], protocol["stride"]) == (32, 21)
    assert protocol["size"] == {"shortest_edge": 40} and protocol["template_set"] == "vild"
    assert protocol["seen_penalty"] == 0.1 and protocol["bias_correction"] is True


def test_both_context_protocols_are_named(checkpoint, monkeypatch, tmp_path) -> None:
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext"):
        (tmp_path / folder).mkdir(parents=True)
    tiny.picture().save(tmp_path / "JPEGImages" / "a.jpg")
    raw = rng.integers(0, 60, (40, 48)).astype(np.uint8)
    Image.fromarray(raw).save(tmp_path / "SegmentationClassContext" / "a.png")
    (tmp_path / "ImageSets" / "SegmentationContext" / "val.txt").write_text("a\n")
    notes = {}
    for number in (59, 60):
        flags = ["--dataset", f"pascal_context_{number}", "--part", "val", "--root", tmp_path]
        evaluate(monkeypatch, "--model", checkpoint, *flags, "--output", tmp_path / "report.json")
        protocol = json.loads((tmp_path / "report.json").read_text())["protocol"]
        assert protocol["classes"] == number and str(number) in protocol["split"]
        notes[number] = protocol["note"]
    assert notes[59] != notes[60] and all("background" in note for note in notes.values())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--stride", "8"], "`sliding_window` is missing"),
        (["--shortest_edge", "0"], "--shortest_edge: expected a whole number"),
        (["--context_459_ids"], "context_459_ids"),
    ],
)
def test_flags_that_make_no_sense_are_named(checkpoint, monkeypatch, capsys, tmp_path, flags, words) -> None:
    with pytest.raises(SystemExit, match="[12]"):
        evaluate(monkeypatch, "--model", checkpoint, "--output", tmp_path / "report.json", *flags)
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("evaluate.py: ") and words in message
    assert not (tmp_path / "report.json").exists()
