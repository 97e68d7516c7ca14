#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Chooses PBC's threshold θ and correction γ without labels or names of unseen classes, and stores them in a checkpoint.

    python scripts/calibrate.py --config scripts/configs/embedded.yaml --model runs/embedded/final
    python scripts/calibrate.py --config scripts/configs/ablation.yaml --folds 2 --output docs/results/calibration.json

Some *seen* classes play unseen, as large a share of them as the unseen ones are of all: a model of the same settings is
trained without their labels, and θ and γ are those with the best hIoU between the other seen classes and the played ones
on the validation part. The real unseen classes take part by neither name nor pixel. --folds N trains N models, each
without others, and takes the mean. Any setting of the training can be overridden, as for train.py, but
data.pseudo_unseen, which is chosen here. --model stores θ and γ in a checkpoint, --output writes the whole report.

--report_on PART additionally measures the indicator's ROC-AUC of the checkpoint on real unseen classes; it is written
down, never used.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from zeroshot.checkpoints import load_checkpoint
from zeroshot.cli import run_command
from zeroshot.data.benchmarks import open_part
from zeroshot.evaluation.calibration import calibrate, indicator_auc, store_correction
from zeroshot.files import atomic_write_text, check_output
from zeroshot.settings import load_settings, take_option


def main() -> None:
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    model, output, report_on = (take_option(arguments, name) for name in ("--model", "--output", "--report_on"))
    folds = take_option(arguments, "--folds", "1")
    if not folds.isdecimal() or int(folds) < 1:
        raise ValueError(f"`--folds` is {folds!r}; expected a whole number from 1 on.")
    settings = load_settings(arguments)
    # All that is needed at the end, before hours of training.
    if output:
        check_output(output)
    if model:
        load_checkpoint(model)
        if not Path(model).is_dir():
            raise ValueError(f"`--model` is {model!r}, which is no folder to store θ and γ in: download it first.")
        check_output(Path(model) / "config.json")
    if report_on:
        if not model:
            raise ValueError("`--report_on` measures the checkpoint that `--model` names, and that is missing.")
        open_part(settings.data, report_on, None)
    report = calibrate(settings, folds=int(folds))
    if model:
        if report_on:
            report["indicator_roc_auc"] = indicator_auc(model, settings, report_on)
        store_correction(model, report["gamma"], report["threshold"])
    if output:
        atomic_write_text(output, json.dumps(report, indent=2) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "grid"}, indent=2))


if __name__ == "__main__":
    run_command(main)
