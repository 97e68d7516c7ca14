#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Trains a small AlignZeg on the embedded benchmark, evaluates it and draws segmentations: about five minutes on two cores.

make quickstart
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from zeroshot.cli import command_parser, run_command


ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "runs" / "quickstart"
SAMPLES = 6


def run(title: str, *command: str) -> None:
    print(f"\n== {title}\n$ {' '.join(command)}", flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def main() -> None:
    command_parser(__doc__).parse_args()
    from zeroshot.data.scenes import export_scenes

    python, started = sys.executable, time.time()
    run(
        "Train (unseen classes are never labelled)",
        *(python, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "scripts/train.py"),
        *("--config", "scripts/configs/quickstart.yaml", "--output_dir", str(OUTPUT)),
    )
    model = str(OUTPUT / "final")
    run(
        "Evaluate on the test split",
        python,
        "scripts/evaluate.py",
        "--model",
        model,
        "--output",
        str(OUTPUT / "report.json"),
    )
    samples = export_scenes(OUTPUT / "samples", "test", SAMPLES)
    run(
        "Segment sample images",
        *(python, "scripts/predict.py", str(samples / "images"), "--model", model),
        *("--output_dir", str(OUTPUT / "predictions")),
    )
    report = json.loads((OUTPUT / "report.json").read_text(encoding="utf-8"))
    shipped = json.loads((ROOT / "docs" / "results" / "shipped_checkpoint.json").read_text(encoding="utf-8"))
    print("\n== Done")
    print(f"{'':<28}{'mIoU(S)':>9}{'mIoU(U)':>9}{'hIoU':>9}")
    for name, scores in (("this short training", report), ("the checkpoint that ships", shipped)):
        print(f"{name:<28}{scores['miou_seen']:>9.1f}{scores['miou_unseen']:>9.1f}{scores['hiou']:>9.1f}")
    print(f"Report:   {OUTPUT / 'report.json'}")
    print(f"Model:    {model}")
    print(f"Pictures: {OUTPUT / 'predictions'}/*_overlay.png, *_unseen.png")
    print(f"Time:     {time.time() - started:.0f} s")


if __name__ == "__main__":
    run_command(main)
