#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Trains the checkpoint in the root of this repository, and writes docs/results/shipped_checkpoint.json.

    python scripts/ship_checkpoint.py

trains scripts/configs/embedded.yaml twice, zero-shot and with the labels of all classes (about half an hour each on one
CPU core; --workers 2 runs both in parallel; finished trainings are skipped), evaluates both on the test split and installs
the zero-shot model in the root of the repository.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from zeroshot.cli import command_parser, integer, run_command
from zeroshot.files import atomic_write_text


ROOT = Path(__file__).resolve().parent.parent
SCORES = ("miou_seen", "miou_unseen", "hiou", "pixel_accuracy", "miou")
RUNS = {
    "zero-shot": ("runs/embedded", []),
    "supervised": ("runs/embedded_supervised", ["--data.fully_supervised", "true"]),
}


def train(name: str) -> None:
    output, flags = RUNS[name]
    if not (ROOT / output / "final" / "config.json").exists():
        command = [
            sys.executable,
            "scripts/train.py",
            "--config",
            "scripts/configs/embedded.yaml",
            "--output_dir",
            output,
        ]
        subprocess.run([*command, *flags], cwd=ROOT, check=True)


def evaluate(name: str) -> dict:
    output = RUNS[name][0]
    report = ROOT / output / "test.json"
    flags = ["--gamma", "0"] if name == "supervised" else []
    command = [sys.executable, "scripts/evaluate.py", "--model", f"{output}/final", "--output", str(report), *flags]
    subprocess.run(command, cwd=ROOT, check=True)
    return json.loads(report.read_text(encoding="utf-8"))


def main() -> None:
    options = command_parser(__doc__)
    options.add_argument("--workers", type=integer(1), default=1, help="trainings to run in parallel")
    args = options.parse_args()
    from zeroshot.checkpoints import install_as_root

    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(train, RUNS))
    reports = {name: evaluate(name) for name in RUNS}
    shipped, supervised = reports["zero-shot"], reports["supervised"]
    run = ROOT / RUNS["zero-shot"][0]
    settings, timing = (
        json.loads((run / name).read_text(encoding="utf-8")) for name in ("settings.json", "timing.json")
    )
    result = {
        **{name: shipped[name] for name in SCORES},
        "hiou_fully_supervised": supervised["hiou"],
        "fully_supervised": {name: supervised[name] for name in SCORES},
        "images": shipped["images"],
        "protocol": shipped["protocol"],
        "training_seconds": json.loads((ROOT / RUNS["zero-shot"][0] / "timing.json").read_text(encoding="utf-8"))[
            "seconds"
        ],
        "made_by": "python scripts/ship_checkpoint.py",
        "settings": {**settings, "output_dir": RUNS["zero-shot"][0]},
        "versions": shipped["versions"],
        "per_class": shipped["per_class"],
    }
    install_as_root(run / "final", ROOT)
    path = ROOT / "docs" / "results" / "shipped_checkpoint.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(result, indent=2) + "\n")
    share = 100 * result["hiou"] / result["hiou_fully_supervised"]
    print(f"hIoU {result['hiou']:.1f}, {share:.0f} % of fully supervised: {path}")


if __name__ == "__main__":
    run_command(main)
