# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The contents of the loader report, not the speed of this machine."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import tiny
from conftest import ROOT


def run(monkeypatch: pytest.MonkeyPatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_loader.py", *map(str, flags)])
    runpy.run_path(str(ROOT / "scripts" / "benchmark_loader.py"), run_name="__main__")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys, accumulation: int) -> None:
    checkpoint = tiny.tiny_checkpoint(tmp_path / "checkpoint")
    before = sorted(tmp_path.rglob("*"))
    settings = {
        "model.checkpoint": checkpoint,
        "data.num_train": 6,
        "data.transform": "{crop_size: 32}",
        "data.validate": "false",
        "training.batch_size": 2,
        "training.gradient_accumulation_steps": accumulation,
        "output_dir": tmp_path / "run",
    }
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, *flags, "--batches", 4, "--output", tmp_path / "report.json")  # more than one epoch
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["processes"], report["images_per_batch"], report["loader_workers"]) == (1, 2, 0)
    images = report["model_steps_per_second"] * 2 * accumulation
    assert report["model_images_per_second"] == pytest.approx(images, rel=1e-2)
    ratio = report["loader_images_per_second"] / images
    assert report["loader_per_model"] == pytest.approx(ratio, rel=1e-2, abs=1e-3)
    assert report["workers_needed"] in {max(1, math.ceil(factor / ratio)) for factor in (0.98, 1, 1.02)}
    printed = capsys.readouterr().out
    assert ("keeps up" in printed) == (report["loader_images_per_second"] >= report["model_images_per_second"])
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "report.json"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batches", "0"], "`batches` is 0; expected"),
        (["--batches", "few"], "`batches` is 'few'; expected"),
        (["--output"], "argument --output: expected one argument"),
        (["--training.step", "3"], "training.step"),
        ([], "model.clip"),
        (["--output", "/dev/null"], "/dev/null is not a regular file"),
        (
            ["--model.checkpoint", "nowhere", "--data.num_train", "2"],
            "`model.checkpoint` is 'nowhere', but there is no",
        ),
    ],
)
def test_slips_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, flags: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *flags, *(["--data.num_train", 2] if not flags else []))
    assert stop.value.code == 1
    assert re.search(rf"^benchmark_loader.py: .*{re.escape(words)}", capsys.readouterr().err, re.MULTILINE)
