#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Runs the ablation: trains and evaluates every row with several seeds, and draws the figures.

    python scripts/ablate.py --workers 2                 # all rows; run again to resume
    python scripts/ablate.py --cell full --seed 0        # one cell
    python scripts/ablate.py --summarize                 # tables and figures from the finished cells
    python scripts/ablate.py --rescore                   # also with the present read-out, from the trained models
    python scripts/ablate.py --config scripts/configs/msrc_ablation.yaml --data.root data/photos \\
        --data.split msrc_a --rows baseline,pbc,full --uncalibrated --results docs/results/msrc_a

Every cell is one training of the preset with overrides, evaluated on the test part. A cell's result is written to
RESULTS/cells/NAME-SEED.json; finished cells are skipped, so remove a file to train that cell again. PBC's θ and γ come
from calibration on seen classes treated as unseen (RESULTS/calibration*.json, computed first if missing; `calibrate.py
--models` writes such a file from the validation part), never from the test part; rows "γ = 8, θ = 0.5" have these values
instead. The constant of the blind baseline is tuned on the test part.
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


def start(name: str, seed: int, results: Path, arguments: list[str]) -> tuple[str, int, int]:
    command = [sys.executable, str(Path(__file__).resolve()), "--cell", name, "--seed", str(seed)]
    command += ["--results", str(results), *arguments]
    log = ROOT / "runs" / "ablation" / results.name / f"{name}-{seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    return name, seed, status


def main() -> int:
    options = command_parser(__doc__)
    options.add_argument("--rows", type=names, help="rows to run; default: all")
    options.add_argument("--cell", help="run one row with one seed, in this process")
    options.add_argument("--seed", type=integer(0), default=0, help="seed of --cell")
    options.add_argument("--workers", type=integer(1), default=1, help="cells trained in parallel, each on one thread")
    options.add_argument(
        "--config", default=str(ROOT / "scripts" / "configs" / "ablation.yaml"), help="preset of the trainings"
    )
    options.add_argument("--results", type=Path, default=ROOT / "docs" / "results", help="folder of results")
    options.add_argument("--seeds", type=integer(1), help="seeds per row; default: the row's own count")
    options.add_argument("--uncalibrated", action="store_true", help="leave out the rows with calibrated θ and γ")
    options.add_argument(
        "--summarize", action="store_true", help="only make tables and figures from the finished cells"
    )
    options.add_argument(
        "--rescore",
        action="store_true",
        help="score the finished cells of --rows again, whose models are in runs/ablation",
    )
    args, overrides = options.parse_known_args()
    load_settings(["--config", args.config, *overrides])  # reports errors before anything starts
    from zeroshot.evaluation.ablation import (
        CALIBRATIONS,
        ROWS,
        TRAININGS,
        config_flags,
        rescore_cell,
        run_cell,
        summarize,
    )
    from zeroshot.files import atomic_write_text

    cells = args.results / "cells"
    arguments = ["--config", args.config, *overrides]
    models = f"runs/ablation/{args.results.name}"

    def corrections(row: str) -> list[tuple[float, float]]:
        file = args.results / ROWS[row].calibration
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"gamma": 0.0}
        return [(found["gamma"], found["threshold"])] if found["gamma"] else []

    if args.cell:
        if args.cell not in TRAININGS:
            raise ValueError(f"`--cell` is {args.cell!r}; expected one of {', '.join(TRAININGS)}.")
        cells.mkdir(parents=True, exist_ok=True)
        result = run_cell(args.cell, args.seed, models, arguments, corrections(args.cell))
        atomic_write_text(cells / f"{args.cell}-{args.seed}.json", json.dumps(result, indent=1) + "\n")
        print(json.dumps({k: v for k, v in result.items() if k != "curve"}, indent=2))
        return 0
    if unknown := set(args.rows or ()) - set(TRAININGS):
        raise ValueError(f"`--rows` contains {', '.join(sorted(unknown))}; expected some of {', '.join(TRAININGS)}.")
    if args.rescore:
        for file in sorted(cells.glob("*.json")):
            cell = json.loads(file.read_text(encoding="utf-8"))
            if not args.rows or cell["row"] in args.rows:
                cell = rescore_cell(cell, models, arguments, corrections(cell["row"]))
                atomic_write_text(file, json.dumps(cell, indent=1) + "\n")
                print(f"{file.stem} scored again.", flush=True)
    elif not args.summarize:
        chosen = args.rows or TRAININGS
        cells.mkdir(parents=True, exist_ok=True)
        for file in sorted({ROWS[name].calibration for name in chosen}):
            if not args.uncalibrated and not (args.results / file).exists():
                flags = ["--folds", "4", "--output", str(args.results / file), *arguments]
                flags += config_flags(CALIBRATIONS[file])
                subprocess.run([sys.executable, str(ROOT / "scripts" / "calibrate.py"), *flags], check=True)
        jobs = [(seed, name) for name in chosen for seed in range(args.seeds or ROWS[name].seeds)]
        jobs = sorted(job for job in jobs if not (cells / f"{job[1]}-{job[0]}.json").exists())  # seed by seed
        started, failed, count = time.time(), 0, 0
        for later in (False, True):  # rows that start from others come after these
            part = [job for job in jobs if (ROWS[job[1]].start is not None) == later]
            with ThreadPoolExecutor(args.workers) as pool:
                for name, seed, status in pool.map(lambda job: start(job[1], job[0], args.results, arguments), part):
                    failed, count = failed + (status != 0), count + 1
                    outcome = "ok" if status == 0 else f"failed ({status})"
                    print(
                        f"{count}/{len(jobs)} {name} seed {seed}: {outcome} {time.time() - started:.0f} s", flush=True
                    )
        if failed:
            return 1
    summarize(cells, args.results)
    return 0


if __name__ == "__main__":
    run_command(main)
