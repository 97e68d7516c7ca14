# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Label maps of many image files, several at a time."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from zeroshot.evaluation import pictures
from zeroshot.evaluation.options import Vocabulary, load_vocabulary
from zeroshot.evaluation.pictures import PictureSettings, image_workers, plan_pictures, write_pictures


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def network() -> tuple:
    model, processor = tiny.tiny_model(), tiny.tiny_processor()
    return model, processor, load_vocabulary(model, processor, "cat, dog, sky", ["sky"], None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for index in range(9):  # names that begin alike and are longer than those of temporary files
        tiny.picture(index, (60 + 8 * index, 80 - 5 * index)).save(tmp_path / "in" / f"{'n' * 60}{index}.png")
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no image")
    return tmp_path


def test_many_images_have_the_results_of_single_ones(folder, network, two_threads, capsys) -> None:
    settings, alone, together = PictureSettings(), folder / "alone", folder / "together"
    jobs = plan_pictures([str(folder / "in")], together, settings)
    assert write_pictures(*network, jobs, together, settings) == 1
    assert "broken.jpg" in capsys.readouterr().err and torch.get_num_threads() == 2
    for job in plan_pictures([str(folder / "in")], alone, settings):
        write_pictures(*network, [job], alone, settings)
    names = sorted(path.name for path in alone.iterdir())
    assert names == sorted(path.name for path in together.iterdir()) and len(names) == 9 * 3 + 1
    for name in names:
        if name.endswith(".png"):
            first, second = (np.asarray(Image.open(place / name)).astype(int) for place in (alone, together))
            assert (abs(first - second) > 1).mean() < 0.01  # rounding differs with the count of threads


def test_an_error_stops_the_others_and_restores_the_threads(folder, network, two_threads, monkeypatch) -> None:
    calls = []

    def fail(*values):
        calls.append(values)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pictures, "_segment", fail)
    jobs = 20 * plan_pictures([str(folder / "in" / "n*.png")], folder / "out", PictureSettings())
    with pytest.raises(RuntimeError, match="out of memory"):
        write_pictures(*network, jobs, folder / "out", PictureSettings())
    assert torch.get_num_threads() == 2 and len(calls) < len(jobs) and not (folder / "out").exists()


def test_an_accelerator_holds_one_image_at_a_time(folder, monkeypatch) -> None:
    running, most = [], []

    def segment(model, processor, vocabulary, image, inputs, settings):
        running.append(image)
        most.append(len(running))
        time.sleep(0.01)
        running.pop()
        return np.zeros((image.height, image.width), np.int32), None

    monkeypatch.setattr(pictures, "_segment", segment)
    model = SimpleNamespace(device=torch.device("meta"))
    settings = PictureSettings(labels_only=True)
    jobs = plan_pictures([str(folder / "in" / "n*.png")], folder / "out", settings)
    arguments = (lambda **values: None, Vocabulary(["cat"], [], torch.ones(1, 1), {}))
    assert write_pictures(model, *arguments, jobs, folder / "out", settings) == 0
    assert max(most) == 1 and len(most) == 9
    assert image_workers(model.device, 9) == 4
