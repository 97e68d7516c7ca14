#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Fills the figures of README.md and model_card.md from docs/results, between the markers `<!-- NAME -->` and `<!-- /NAME -->`.

    python scripts/make_docs.py            # writes
    python scripts/make_docs.py --check    # fails if something would change
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
FILES = ("README.md", "model_card.md", "docs/experiments.md", "docs/scaling.md")
NOT_MEASURED = "_not measured_"


def load(name: str) -> dict | None:
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def shipped_table() -> str:
    report = load("shipped_checkpoint.json")
    if report is None:
        return NOT_MEASURED
    share = 100 * report["hiou"] / report["hiou_fully_supervised"]
    lines = [
        "| embedded benchmark, test split | mIoU(S) | mIoU(U) | hIoU | pixel accuracy |",
        "|---|---|---|---|---|",
        "| the checkpoint in this repository | {miou_seen:.1f} | {miou_unseen:.1f} | {hiou:.1f} | {pixel_accuracy:.1f} |".format(**report),
        "| same budget, all classes labelled | {miou_seen:.1f} | {miou_unseen:.1f} | {hiou:.1f} | {pixel_accuracy:.1f} |".format(
            **report["fully_supervised"]
        ),
        "",
        f"The zero-shot model reaches {share:.0f} % of the fully supervised hIoU "
        "([docs/results/shipped_checkpoint.json](docs/results/shipped_checkpoint.json)).",
    ]
    return "\n".join(lines)


def ablation_table() -> str:
    path = RESULTS / "ablation.md"
    return path.read_text(encoding="utf-8").strip() if path.exists() else NOT_MEASURED


def clip_line() -> str:
    report = json.loads((ROOT / "scripts" / "assets" / "small_clip" / "pretraining.json").read_text(encoding="utf-8"))
    return (
        f"The small CLIP ({report['parameters'] / 1e6:.1f} M parameters) names {100 * report['zero_shot_accuracy']:.1f} % of "
        f"{report['held_out_images']:,} held-out single-object images right among {report['classes']} classes, after "
        f"{report['seconds'] / 60:.0f} minutes of `{report['command']}`."
    )


def model_index() -> str:
    """The `model-index` of the card's metadata, as YAML lines."""
    report = load("shipped_checkpoint.json")
    names = {"miou_seen": "mIoU seen", "miou_unseen": "mIoU unseen", "hiou": "hIoU", "pixel_accuracy": "pixel accuracy"}
    metrics = "".join(
        f"          - type: {key}\n            name: {name}\n            value: {report[key]:.2f}\n" for key, name in names.items()
    )
    return (
        "model-index:\n  - name: alignzeg-embedded-scenes\n    results:\n      - task:\n          type: image-segmentation\n"
        "          name: zero-shot semantic segmentation\n        dataset:\n          type: embedded_scenes\n"
        "          name: embedded scenes (drawn by this repository)\n          split: test\n        metrics:\n" + metrics
    ).rstrip()


def cost_line() -> str:
    report = load("shipped_checkpoint.json")
    clip = json.loads((ROOT / "scripts" / "assets" / "small_clip" / "pretraining.json").read_text(encoding="utf-8"))
    if report is None:
        return NOT_MEASURED
    minutes = (report["training_seconds"] + clip["seconds"]) / 60
    return f"{minutes:.0f} minutes on CPU cores, one at a time: {clip['seconds'] / 60:.0f} for the CLIP, the rest for AlignZeg. No GPU."


BLOCKS = {"cost": cost_line, "shipped": shipped_table, "ablation": ablation_table, "clip": clip_line}


def fill(text: str) -> str:
    for name, make in BLOCKS.items():
        pattern = re.compile(f"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        if pattern.search(text):
            content = make()
            text = pattern.sub(lambda found: found.group(1) + content + found.group(2), text)
    if "# model-index begins" in text:
        pattern = re.compile("(# model-index begins[^\n]*\n).*?(\n# model-index ends)", re.DOTALL)
        text = pattern.sub(lambda found: found.group(1) + model_index() + found.group(2), text)
    return text


def main() -> int:
    stale = []
    for name in FILES:
        path = ROOT / name
        if not path.exists():
            continue
        old = path.read_text(encoding="utf-8")
        new = fill(old)
        if new != old:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    if stale and "--check" in sys.argv:
        print(f"Out of date: {', '.join(stale)}. Run python scripts/make_docs.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
