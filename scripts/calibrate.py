#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Chooses PBC's threshold θ and correction γ without labels or names of unseen classes, and stores them in a checkpoint.

    python scripts/calibrate.py --config scripts/configs/embedded.yaml --checkpoint runs/embedded/final
    python scripts/calibrate.py --config scripts/configs/ablation.yaml --folds 2 --output docs/results/calibration.json

Some *seen* classes are treated as unseen; their share of the seen classes equals the share of unseen classes in the
split. A model with the same settings is trained without their labels. The chosen θ and γ have the best hIoU on the
validation part, between these classes and the other seen ones. Neither names nor pixels of the real unseen classes are
used. --folds N trains N models, each without different classes, and averages the results. Also accepts the options of
train.py; data.pseudo_unseen is set here.

--models FOLDER,FOLDER trains nothing: the mean hIoU of these checkpoints decides, on the validation part with its labels of
the unseen classes.

--report_on PART also measures the ROC-AUC of the checkpoint's indicator on real unseen classes; it is reported but not
used.
"""

from __future__ import annotations

import json
from pathlib import Path

from jsonargparse.typing import PositiveInt

from zeroshot.cli import names, run_command
from zeroshot.settings import SettingsParser


def main() -> None:
    parser = SettingsParser(__doc__)
    parser.add_argument("--folds", type=PositiveInt, default=1, help="Models to train.")
    parser.add_argument("--models", type=str | None, help="Trained checkpoints to calibrate instead of training any.")
    parser.add_argument("--checkpoint", type=str | None, help="Checkpoint folder to store θ and γ in.")
    parser.add_argument("--output", type=str | None, help="JSON report to write.")
    parser.add_argument("--report_on", type=str | None, help="Part to measure the indicator's ROC-AUC on.")
    args, settings = parser.parse()
    from zeroshot.checkpoints import load_checkpoint
    from zeroshot.data.benchmarks import open_part
    from zeroshot.data.dataset import raise_for_problems, validate_dataset
    from zeroshot.evaluation.calibration import (
        calibrate,
        calibrate_models,
        indicator_auc,
        split_with_unseen,
        store_correction,
    )
    from zeroshot.evaluation.evaluator import without_nan
    from zeroshot.files import atomic_write_text, check_output

    # Check before hours of training what is needed at the end.
    if args.output:
        check_output(args.output)
    if args.checkpoint:
        model, _ = load_checkpoint(args.checkpoint, "--checkpoint")
        if args.report_on and model.indicator is None:
            raise ValueError(f"`--report_on` measures PBC's indicator, but {args.checkpoint} was trained without it.")
        if not Path(args.checkpoint).is_dir():
            raise ValueError(
                f"`--checkpoint` is {args.checkpoint!r}, which is not a folder to store θ and γ in: download it first."
            )
        check_output(Path(args.checkpoint) / "config.json")
    if args.report_on:
        if not args.checkpoint:
            raise ValueError("`--report_on` needs `--checkpoint`, the checkpoint to measure; pass both.")
        split = split_with_unseen(settings.data)
        raise_for_problems(validate_dataset(open_part(settings.data, args.report_on, None), split), split)
    report = calibrate_models(settings, names(args.models)) if args.models else calibrate(settings, folds=args.folds)
    if args.checkpoint:
        store_correction(args.checkpoint, report["gamma"], report["threshold"])
        if args.report_on:
            report["indicator_roc_auc"] = indicator_auc(args.checkpoint, settings, args.report_on)
    if args.output:
        atomic_write_text(args.output, json.dumps(without_nan(report), indent=2, allow_nan=False) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "grid"}, indent=2))


if __name__ == "__main__":
    run_command(main)
