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


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from zeroshot.calibration import calibrate, indicator_auc, store_correction
from zeroshot.files import atomic_write_text
from zeroshot.settings import load_settings


def main() -> None:
    own = {"--model": None, "--output": None, "--report_on": None, "--folds": "1"}
    rest, arguments = [], sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    while arguments:
        name, equals, value = arguments.pop(0).partition("=")
        value = value if equals else (arguments.pop(0) if arguments else "")
        if name in own:
            own[name] = value
        else:
            rest += [name, value]
    settings = load_settings(rest)
    report = calibrate(settings, folds=int(own["--folds"]))
    if own["--model"]:
        if own["--report_on"]:
            report["indicator_roc_auc"] = indicator_auc(own["--model"], settings, own["--report_on"])
        store_correction(own["--model"], report["gamma"], report["threshold"])
    if own["--output"]:
        atomic_write_text(own["--output"], json.dumps(report, indent=2) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "grid"}, indent=2))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"calibrate.py: {error}")
