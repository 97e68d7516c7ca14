# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The benchmark's tools on functions of known cost, and the benchmark itself on small images."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from zeroshot.evaluation.benchmark_report import markdown
from zeroshot.evaluation.speed import Timing, giga_macs, interleaved


def test_multiply_adds_of_known_layers() -> None:
    linear, convolution = torch.nn.Linear(10, 20), torch.nn.Conv2d(3, 4, 5, bias=False)
    assert giga_macs(linear, lambda: linear(torch.zeros(3, 10))) == pytest.approx(3 * 10 * 20 / 1e9)
    pixels = torch.zeros(1, 3, 12, 12)  # 8 x 8 positions
    assert giga_macs(convolution, lambda: convolution(pixels)) == pytest.approx(64 * 3 * 4 * 25 / 1e9)
    assert all(p.requires_grad for p in linear.parameters())


def test_functions_take_turns_and_each_is_warm() -> None:
    calls: list[str] = []
    timings = interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=3)
    assert calls == ["a", "b"] * 4  # the first of each is not timed
    assert timings["a"]["repeats"] == timings["b"]["repeats"] == 3


def test_a_slow_function_is_timed_twice_at_least() -> None:
    calls: list[str] = []
    timings = interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=5, budget=-1)
    assert calls.count("a") == 3 and timings["a"]["repeats"] == 2


def test_timing_is_the_quartiles() -> None:
    timing = Timing.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (timing.least, timing.lower_quartile, timing.median, timing.upper_quartile) == (1, 2, 3, 4)
    assert Timing.of([2.0]).median == 2


def benchmark(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True)


def test_an_unknown_section_is_named() -> None:
    finished = benchmark("--sections", "peers,speed")
    assert finished.returncode and "'speed'" in finished.stderr and "Traceback" not in finished.stderr


@pytest.mark.slow
def test_the_quick_benchmark_keeps_other_sections(tmp_path: Path) -> None:
    for sections in ("peers,names,classes", "dtypes,training,loader", "text,folder"):
        finished = benchmark("--quick", "--output_dir", str(tmp_path), "--sections", sections)
        assert finished.returncode == 0, finished.stderr
    report = json.loads((tmp_path / "benchmark_cpu.json").read_text())["sections"]
    assert set(report) == {"peers", "names", "classes", "dtypes", "training", "loader", "text", "folder"}
    models = report["peers"]["models"]
    assert models["clip"]["over_clip"] == 1 and models["alignzeg"]["over_alignzeg"] == 1
    assert models["clip"]["gmacs"] < models["alignzeg"]["gmacs"] < models["mask2former"]["gmacs"]
    costs = {name: row["gmacs_per_class"] for name, row in report["names"]["models"].items()}
    # Two sets of logits per proposal for AlignZeg; a decoder per name for CLIPSeg.
    assert costs["alignzeg"] == pytest.approx(2 * 101 * 512 / 1e9) and costs["clipseg"] > 1000 * costs["alignzeg"]
    assert report["names"]["models"]["alignzeg"]["gmacs_first"] == pytest.approx(
        models["alignzeg"]["gmacs"] - 19 * costs["alignzeg"], abs=0.01
    )
    assert all(share > 0.9 for share in report["dtypes"]["equal_pixels"].values())
    table = (tmp_path / "benchmark_cpu.md").read_text()
    assert all(row["title"] in table for row in models.values())
    assert (tmp_path / "benchmark_cpu.png").stat().st_size > 10_000


def test_a_report_from_two_machines_names_the_machine_of_each_section() -> None:
    def section(cpu: str) -> dict:
        machine = {"cpu": cpu, "cpu_features": ["avx2"], "threads": 2, "device": "cpu"}
        return {"images_per_second_by_workers": {"0": 10.0}, "rows": {}, "machine": machine}

    def report(*cpus: str) -> str:
        return markdown({"tower": "ViT-B-16", "sections": dict(zip(("loader", "text"), map(section, cpus)))})

    assert report("A", "A").count("A (avx2), 2 threads") == 1
    loader, text = report("A", "B").split("## Class names")
    assert "A (avx2), 2 threads" in loader.split("## Loader")[1] and "B (avx2)" not in loader
    assert "B (avx2), 2 threads" in text and "A (avx2)" not in text
