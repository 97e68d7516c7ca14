#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Trains and evaluates the presets of VOC 2012, COCO-Stuff and PASCAL Context, one after the other, and writes a table.

    python scripts/reproduce.py --data_root /data --output_dir runs/reproduction
    python scripts/reproduce.py --data_root /data --output_dir runs/reproduction --benchmarks voc2012 --num_processes 4
    python scripts/reproduce.py --data_root /data --output_dir runs/reproduction --dry_run

DATA_ROOT contains VOCdevkit/VOC2012, VOCdevkit/VOC2010 and coco_stuff (docs/own_data.md). Every benchmark is evaluated with
PBC's default γ and θ and without PBC. To continue after an interruption, run the same command: trainings resume from their
last checkpoint, and finished evaluations are kept. A step uses 32 images with any number of processes.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

from zeroshot.cli import command_parser, integer, names, run_command
from zeroshot.settings import load_settings


ROOT = Path(__file__).resolve().parent.parent
DATA = {"voc2012": "VOCdevkit/VOC2012", "coco_stuff": "coco_stuff", "pascal_context": "VOCdevkit/VOC2010"}
TOWERS = ("vitb16", "vitl14", "convnext_base_w")
BATCH_SIZE, IMAGES_PER_GPU = 32, 4
READOUTS = {"": [], "_without_pbc": ["--gamma", "0"]}


def main() -> None:
    options = command_parser(__doc__)
    options.add_argument("--data_root", type=Path, required=True, help="folder of the datasets")
    options.add_argument("--output_dir", type=Path, required=True, help="folder of trainings, reports and the table")
    options.add_argument("--benchmarks", type=names, default=list(DATA), help="benchmarks, separated by commas")
    options.add_argument("--clip", choices=TOWERS, default="vitb16", help="image tower of the presets")
    options.add_argument("--num_processes", type=integer(1), default=8, help="GPUs of this machine to use")
    options.add_argument("--dry_run", action="store_true", help="only print the commands")
    args = options.parse_args()
    if unknown := [name for name in args.benchmarks if name not in DATA]:
        raise ValueError(f"`--benchmarks` contains {unknown[0]!r}; expected some of {', '.join(DATA)}.")
    if BATCH_SIZE % args.num_processes:
        raise ValueError(
            f"`--num_processes` is {args.num_processes}; expected a divisor of the batch size, {BATCH_SIZE}."
        )
    missing = [name for name in args.benchmarks if not (args.data_root / DATA[name]).is_dir()]
    if missing and not args.dry_run:
        raise ValueError(
            f"`--data_root` has no folder {DATA[missing[0]]!r}, which {missing[0]} needs; docs/own_data.md lists its files."
        )
    for name in args.benchmarks:
        for command, output in commands(name, args.clip, args.num_processes, args.data_root, args.output_dir):
            print(f"$ {shlex.join(command)}", flush=True)
            if not args.dry_run and (output is None or not output.exists()):
                subprocess.run(command, cwd=ROOT, check=True)
    if not args.dry_run:
        write_table(args.output_dir)


def commands(
    name: str, clip: str, num_processes: int, data_root: Path, output_dir: Path
) -> list[tuple[list[str], Path | None]]:
    """The commands of a benchmark, and the file that shows that a command has finished. Training has none: it finds its
    own checkpoints."""
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", "scripts/configs/accelerate/eight_gpus_bf16.yaml"]
    launch += ["--num_processes", str(num_processes)]
    preset = ROOT / "scripts" / "configs" / f"{name}_{clip}.yaml"
    data, root = load_settings(["--config", str(preset)]).data, str((data_root / DATA[name]).resolve())
    folder = (output_dir / f"{name}_{clip}").resolve()
    steps: list[tuple[list[str], Path | None]] = []
    training = ["scripts/train.py", "--config", str(preset.relative_to(ROOT)), "--data.root", root]
    batch = min(IMAGES_PER_GPU, BATCH_SIZE // num_processes)
    accumulation = BATCH_SIZE // (batch * num_processes)
    training += ["--output_dir", str(folder), "--training.batch_size", str(batch)]
    training += ["--training.gradient_accumulation_steps", str(accumulation)]
    steps.append(([*launch, *training], None))
    for suffix, flags in READOUTS.items():
        report = folder / f"report{suffix}.json"
        evaluation = ["scripts/evaluate.py", "--model", str(folder / "final"), "--dataset", str(data.dataset)]
        evaluation += ["--root", root, "--part", data.validation_part, *flags, "--output", str(report)]
        steps.append(([*launch, *evaluation], report))
    return steps


def write_table(output_dir: Path) -> None:
    """Writes and prints table.md: the scores of all finished evaluations below `output_dir`."""
    from zeroshot.files import atomic_write_text

    lines = ["| | mIoU(S) | mIoU(U) | hIoU | pixel accuracy |", "|---|---|---|---|---|"]
    for file in sorted(output_dir.glob("*/report*.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        title = file.parent.name + (", without PBC" if "without" in file.stem else "")
        scores = (report[key] for key in ("miou_seen", "miou_unseen", "hiou", "pixel_accuracy"))
        lines.append(f"| {title} | {' | '.join(f'{score:.1f}' for score in scores)} |")
    atomic_write_text(output_dir / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    run_command(main)
