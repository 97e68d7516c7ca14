#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The ablation on the embedded benchmark: trains and evaluates every row with several seeds, and draws the figures.

    python scripts/ablate.py --workers 2                 # all rows; run again to go on where it stopped
    python scripts/ablate.py --cell full --seed 0        # one cell
    python scripts/ablate.py --summarize                 # tables and figures from the finished cells

Every cell is one training of scripts/configs/ablation.yaml with overrides, evaluated on the test part. A cell's result is
written to docs/results/cells/NAME-SEED.json; finished cells are skipped, so remove one to train it again. PBC's θ and γ
come from calibration on seen classes that play unseen (docs/results/calibration.json; made first where it is missing),
never from the test part. The peers' constant is given its best value on the test part.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from zeroshot.cli import command_parser, integer, names, run_command
from zeroshot.settings import load_settings


ROOT = Path(__file__).resolve().parent.parent
CELLS = ROOT / "docs" / "results" / "cells"
CALIBRATION = ROOT / "docs" / "results" / "calibration.json"


def cell_file(name: str, seed: int) -> Path:
    return CELLS / f"{name}-{seed}.json"


def start(name: str, seed: int, arguments: list[str]) -> tuple[str, int, int]:
    command = [sys.executable, str(Path(__file__).resolve()), "--cell", name, "--seed", str(seed), *arguments]
    log = ROOT / "runs" / "ablation" / f"{name}-{seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    return name, seed, status


def main() -> int:
    options = command_parser(__doc__)
    options.add_argument("--rows", type=names, help="rows to run; by default all")
    options.add_argument("--cell", help="run one row with one seed, in this process")
    options.add_argument("--seed", type=integer(0), default=0, help="seed of --cell")
    options.add_argument("--workers", type=integer(1), default=1, help="cells at a time, each on one thread")
    options.add_argument(
        "--config", default=str(ROOT / "scripts" / "configs" / "ablation.yaml"), help="preset of the trainings"
    )
    options.add_argument("--summarize", action="store_true", help="only tables and figures, from the finished cells")
    args, overrides = options.parse_known_args()
    load_settings(["--config", args.config, *overrides])  # names what is wrong before anything starts
    from zeroshot.evaluation.ablation import ROWS, TRAININGS, run_cell, summarize
    from zeroshot.files import atomic_write_text

    if args.cell:
        if args.cell not in TRAININGS:
            raise ValueError(f"`--cell` is {args.cell!r}; rows with a training are {', '.join(TRAININGS)}.")
        CELLS.mkdir(parents=True, exist_ok=True)
        result = run_cell(args.cell, args.seed, ["--config", args.config, *overrides])
        atomic_write_text(cell_file(args.cell, args.seed), json.dumps(result, indent=1) + "\n")
        print(json.dumps({k: v for k, v in result.items() if k != "curve"}, indent=2))
        return 0
    if not args.summarize:
        chosen = args.rows or TRAININGS
        if unknown := set(chosen) - set(TRAININGS):
            raise ValueError(f"`--rows` names {', '.join(sorted(unknown))}; it takes {', '.join(TRAININGS)}.")
        CELLS.mkdir(parents=True, exist_ok=True)
        if not CALIBRATION.exists():
            flags = ["--config", args.config, "--folds", "2", "--output", str(CALIBRATION), *overrides]
            subprocess.run([sys.executable, str(ROOT / "scripts" / "calibrate.py"), *flags], check=True)
        jobs = [
            (seed, name) for name in chosen for seed in range(ROWS[name].seeds) if not cell_file(name, seed).exists()
        ]
        jobs.sort()  # all rows of seed 0 first
        started = time.time()
        failed = 0
        with ThreadPoolExecutor(args.workers) as pool:
            for number, (name, seed, status) in enumerate(
                pool.map(lambda job: start(job[1], job[0], ["--config", args.config, *overrides]), jobs), 1
            ):
                failed += status != 0
                print(
                    f"{number}/{len(jobs)} {name} seed {seed}: {'ok' if status == 0 else f'failed ({status})'} "
                    f"{time.time() - started:.0f} s",
                    flush=True,
                )
        if failed:
            return 1
    summarize(CELLS, ROOT / "docs" / "results")
    return 0


if __name__ == "__main__":
    run_command(main)
