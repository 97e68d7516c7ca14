# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The ablation: its rows, the training of a cell, tables and figures."""

from __future__ import annotations

import copy
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_alignzeg import AlignZegImageProcessor, AlignZegModel, AlignZegProcessor

from ..checkpoints import load_checkpoint
from ..data.benchmarks import open_part
from ..data.dataset import SegmentationDataset
from ..data.task import open_task
from ..files import atomic_write_text
from ..settings import DataSettings, Settings, load_settings
from ..training.trainer import Trainer
from .calibration import BestProposal, average_recall, best_proposals, indicator_roc_auc, oracle_logits
from .evaluator import Evaluator, Readout, evaluation_batches, library_versions


PENALTIES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5)
ORACLE_GAMMAS = (2.0, 100.0)
UNCALIBRATED = (8.0, 0.5)  # γ that nearly excludes the seen classes, θ of the indicator's own decision
INDICATOR_STEPS = 200  # training steps of rows that start from another row's models
WITHOUT_EFFECT = {f"training.{name}" for name in ("log_every", "evaluate_every", "save_every", "keep_checkpoints")}
WITHOUT_EFFECT.add("model.image_processor")  # a model is scored with its own
CURVES = ("baseline", "full")  # rows whose scores during training are plotted
SCORES = ("miou_seen", "miou_unseen", "hiou", "pixel_accuracy")
COLORS = (("miou_seen", "mIoU(S)", "#0072B2"), ("miou_unseen", "mIoU(U)", "#D55E00"), ("hiou", "hIoU", "#009E73"))
CELLS = " + the tower's cells"  # in the titles of rows
RECALLS = ("recall_seen", "recall_unseen")
OFF = {
    "MRPE": {"mutual_refinement": False},
    "FES": {"feature_expansion": False},
    "BDS": {"background_diversity": False},
    "PBC": {"bias_correction": False},
}
UNLABELLED = {"unlabelled_weight": 0.3}


@dataclass(frozen=True)
class Row:
    """A row: its title, its trainings, and their read-out.

    Attributes:
        title: Its name in tables.
        overrides: Overrides of `AlignZegConfig`, for a row with its own trainings.
        readout: `"plain"`, no correction; `"pbc"`, with the calibrated θ and γ; `"decision"`, PBC with θ = 0.5 and
            γ = 8, without calibration; `"constant"`, the blind constant of `PENALTIES` that is the best on the test
            part; `"oracle"`, PBC with a perfect indicator and the best γ on the test part: a bound;
            `"queries"`, no correction and no proposal of the unclaimed region.
            All but the last may end in ` with cells`, which includes the cells of a convolutional tower.
        seeds: Number of trainings.
        start: The row from whose trained models it starts; then only the indicator is trained, for 200 steps, so that the
            rows differ in PBC alone. θ and γ are calibrated on a model without MRPE, FES and BDS.
        cells: The row whose trainings it uses instead of its own. The indicator's input is detached, so a model without
            PBC equals the full one without its correction, apart from gradient clipping.
    """

    title: str
    overrides: dict[str, Any] = field(default_factory=dict)
    readout: str = "pbc"
    seeds: int = 3
    start: str | None = None
    cells: str | None = None

    @property
    def calibration(self) -> str:
        """Name of the file with its θ and γ."""
        return "calibration.json" if self.start is None else "calibration_pbc.json"


def _without(*parts: str) -> dict[str, Any]:
    return {name: value for part in parts for name, value in OFF[part].items()}


ROWS: dict[str, Row] = {
    "baseline": Row("baseline", _without("MRPE", "FES", "BDS", "PBC"), "plain", 5),
    "pbc": Row("baseline + PBC", {"bias_correction": True}, "pbc", 5, start="baseline"),
    "plus_mrpe": Row("+ MRPE", _without("FES", "BDS", "PBC"), "plain"),
    "plus_fes": Row("+ FES", _without("BDS", "PBC"), "plain"),
    "plus_bds": Row("+ BDS", readout="plain", cells="full"),
    "full": Row("+ PBC = full model", {}, "pbc", 5),
    "without_mrpe": Row("full − MRPE", _without("MRPE")),
    "without_fes": Row("full − FES", _without("FES")),
    "without_bds": Row("full − BDS", _without("BDS")),
    "without_pbc": Row("full − PBC", readout="plain", cells="full"),
    "fes_semantic": Row("full, FES target `semantic`", {"feature_expansion_target": "semantic"}),
    "fes_reserve": Row("full, FES target `reserve`", {"feature_expansion_target": "reserve"}),
    "plus_mrpe_unlabelled": Row(
        "baseline + MRPE with masks of unlabelled segments",
        {**_without("FES", "BDS", "PBC"), **UNLABELLED},
        "plain",
        5,
    ),
    "plus_unlabelled": Row(
        "baseline + masks of unlabelled segments", {**_without("MRPE", "FES", "BDS", "PBC"), **UNLABELLED}, "plain", 5
    ),
    "full_unlabelled": Row("full with masks of unlabelled segments", UNLABELLED, "pbc", 5),
    "without_query_fusion": Row("full, adapter without the query", {"query_fusion": False}),
    "blind_constant": Row("full − PBC + blind constant", readout="constant", cells="full"),
    "baseline_constant": Row("baseline + blind constant", readout="constant", cells="baseline"),
    "full_cells": Row("full + the tower's cells", readout="pbc with cells", cells="full"),
    "full_cells_plain": Row("full − PBC + the tower's cells", readout="plain with cells", cells="full"),
    "baseline_cells": Row("baseline + the tower's cells", readout="plain with cells", cells="baseline"),
    "baseline_cells_constant": Row(
        "baseline + the tower's cells + blind constant", readout="constant with cells", cells="baseline"
    ),
    "pbc_decision": Row("baseline + PBC, γ = 8, θ = 0.5", readout="decision", cells="pbc"),
    "pbc_decision_cells": Row(
        "baseline + the tower's cells + PBC, γ = 8, θ = 0.5", readout="decision with cells", cells="pbc"
    ),
    "full_decision": Row("full, γ = 8, θ = 0.5", readout="decision", cells="full"),
    "full_decision_cells": Row(
        "full + the tower's cells, γ = 8, θ = 0.5", readout="decision with cells", cells="full"
    ),
    "pbc_cells": Row("baseline + the tower's cells + PBC", readout="pbc with cells", cells="pbc"),
    "baseline_oracle": Row("baseline, perfect indicator", readout="oracle", cells="baseline"),
    "baseline_oracle_cells": Row(
        "baseline + the tower's cells, perfect indicator", readout="oracle with cells", cells="baseline"
    ),
    "oracle": Row("full, perfect indicator", readout="oracle", cells="full"),
    "oracle_cells": Row("full + the tower's cells, perfect indicator", readout="oracle with cells", cells="full"),
    "queries_only": Row("full − PBC − unclaimed region", readout="queries", cells="full"),
    "baseline_queries_only": Row("baseline − unclaimed region", readout="queries", cells="baseline"),
}
for _name in (
    *("plus_mrpe", "plus_mrpe_unlabelled", "plus_unlabelled", "plus_fes"),
    *("full_unlabelled", "without_mrpe", "without_fes", "without_bds"),
):
    _title = ROWS[_name].title.replace("full ", "full − PBC ", 1)
    if ROWS[_name].readout != "plain":
        ROWS[f"{_name}_plain"] = Row(_title, readout="plain", cells=_name)
        for _end, _suffix, _readout in (("", "", "decision"), (CELLS, "_cells", "decision with cells")):
            _full_title = f"{ROWS[_name].title}{_end}, γ = 8, θ = 0.5"
            ROWS[f"{_name}_decision{_suffix}"] = Row(_full_title, readout=_readout, cells=_name)
    ROWS[f"{_name}_cells"] = Row(f"{_title}{CELLS}", readout="plain with cells", cells=_name)
TRAININGS = [name for name, row in ROWS.items() if row.cells is None]
CALIBRATIONS = {  # overrides of the calibrated model, by file
    "calibration.json": {},
    "calibration_pbc.json": _without("MRPE", "FES", "BDS"),
}


def config_flags(overrides: dict[str, Any]) -> list[str]:
    """Command line flags that override fields of `AlignZegConfig`."""
    return [f"--model.config.{key}={json.dumps(value)}" for key, value in overrides.items()]


def cell_settings(name: str, seed: int, folder: str, arguments: list[str]) -> Settings:
    """Settings of the training of a cell in `folder`."""
    row = ROWS[name]
    flags = config_flags(row.overrides)
    if row.start is not None:
        flags = [
            f"--model.checkpoint={folder}/{row.start}-{seed}/final",
            f"--model.checkpoint_config={json.dumps(row.overrides)}",
            '--training.trainable=["indicator"]',
            f"--training.steps={INDICATOR_STEPS}",
            f"--training.warmup_steps={INDICATOR_STEPS // 10}",
        ]
    if name not in CURVES:
        flags.append("--training.evaluate_every=0")
    return load_settings([*arguments, *flags, f"--seed={seed}", f"--output_dir={folder}/{name}-{seed}"])


def train_cell(name: str, seed: int, folder: str, arguments: list[str]) -> Trainer:
    """Trains a cell, and first the one that it starts from, if its model is missing."""
    start = ROWS[name].start
    if start is not None and not Path(folder, f"{start}-{seed}", "final", "config.json").exists():
        train_cell(start, seed, folder, arguments)
    settings = cell_settings(name, seed, folder, arguments)
    shutil.rmtree(settings.output_dir, ignore_errors=True)
    trainer = Trainer(settings)
    trainer.run()
    return trainer


def run_cell(
    name: str, seed: int, folder: str, arguments: list[str], corrections: list[tuple[float, float]]
) -> dict[str, Any]:
    """Trains one cell in `folder` and evaluates it on the test part: with PBC's `corrections` (γ, θ), without correction,
    and with the constants of the blind baseline."""
    started = time.time()
    settings = train_cell(name, seed, folder, arguments).settings
    seconds = time.time() - started
    curve = [
        json.loads(line)
        for line in Path(settings.output_dir, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        if "validation/hiou" in line
    ]
    return {
        "row": name,
        "seed": seed,
        **score_cell(name, settings, corrections),
        "curve": [{k.removeprefix("validation/"): v for k, v in point.items()} for point in curve],
        "seconds": round(seconds),
        "settings": public_settings(settings),
        "versions": library_versions(),
    }


def rescore_cell(
    cell: dict[str, Any], folder: str, arguments: list[str], corrections: list[tuple[float, float]]
) -> dict[str, Any]:
    """A finished cell with the scores of the present read-out. Its training, in `folder`, is not repeated.

    Raises:
        FileNotFoundError: The trained model is not in `folder`.
        ValueError: It was trained with other settings.
    """
    settings = cell_settings(cell["row"], cell["seed"], folder, arguments)
    wanted, before = (_flat(values) for values in (public_settings(settings), cell["settings"]))
    if other := sorted(key for key in wanted.keys() & before.keys() if wanted[key] != before[key]):
        raise ValueError(
            f"{cell['row']} {cell['seed']} was trained with {other[0]} {before[other[0]]}, and the settings say "
            f"{wanted[other[0]]}: pass the options of its training."
        )
    return {**cell, **score_cell(cell["row"], settings, corrections), "versions": library_versions()}


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that change what is trained, by `section.key`."""
    sections = ((name, values) for name, values in settings.items() if isinstance(values, dict))
    flat = {f"{name}.{key}": value for name, values in sections for key, value in values.items()}
    return {key: value for key, value in flat.items() if key not in WITHOUT_EFFECT}


def public_settings(settings: Settings) -> dict[str, Any]:
    """Settings of a cell, except those that are specific to this machine."""
    shown = settings.as_dict()
    del shown["output_dir"], shown["data"]["root"], shown["model"]["checkpoint"]
    return shown


def score_cell(name: str, settings: Settings, corrections: list[tuple[float, float]]) -> dict[str, Any]:
    """Scores on the test part, ROC-AUC and recalls of the model that was trained with these settings, by the readouts of
    the rows that use the training `name`."""
    model, processor = load_checkpoint(Path(settings.output_dir, "final"))
    kinds = {row.readout.partition(" ")[0] for key, row in ROWS.items() if (row.cells or key) == name}
    readouts = {"plain": Readout(gamma=0.0)}
    if model.indicator is not None and kinds & {"pbc", "decision"}:
        pairs = [*corrections, UNCALIBRATED]
        readouts |= {f"pbc {gamma}/{theta}": Readout(gamma=gamma, threshold=theta) for gamma, theta in pairs}
    if "constant" in kinds:
        readouts |= {f"constant {p}": Readout(gamma=0.0, seen_penalty=p) for p in PENALTIES if p}
    oracles = {f"oracle {gamma}": Readout(gamma=gamma) for gamma in ORACLE_GAMMAS if "oracle" in kinds}
    scores, proposals = evaluate_cell(model, processor, settings.data, readouts, oracles, "queries" in kinds)
    if "constant" in kinds:
        scores |= {key.replace("plain", "constant 0.0"): value for key, value in scores.items() if "plain" in key}
    has_auc = model.indicator is not None and not settings.data.fully_supervised
    return {
        "scores": {key: {s: value[s] for s in SCORES} for key, value in scores.items()},
        "indicator_roc_auc": indicator_roc_auc(proposals) if has_auc else None,
        "recall_seen": average_recall(proposals, False),
        "recall_unseen": average_recall(proposals, True),
    }


@torch.no_grad()
def evaluate_cell(
    model: AlignZegModel,
    processor: AlignZegProcessor,
    data: DataSettings,
    readouts: dict[str, Readout],
    oracles: dict[str, Readout],
    queries_only: bool,
) -> tuple[dict[str, dict[str, Any]], list[BestProposal]]:
    """Scores on the test part by readout, from one forward pass per image, and the best proposals.

    A readout uses the proposals only; "… with cells" adds the cells of a convolutional tower. `oracles` are readouts with a
    perfect indicator. `queries_only` adds "queries", without correction and without the unclaimed region.
    """
    split = open_task(data, validation=False).split
    test = SegmentationDataset(open_part(data, "test", None), split, training=False)
    vocabulary = {
        "text_prototypes": model.get_text_prototypes(processor, list(split.classes)),
        "seen_class_mask": torch.tensor(split.seen_class_mask, device=model.device),
    }
    with_cells, alone = (copy.copy(processor.image_processor) for _ in range(2))
    with_cells.dense_weight, alone.dense_weight = AlignZegImageProcessor.dense_weight, 0.0
    evaluators, perfect = (
        {name: Evaluator(split, each) for name in ("", " with cells")} for each in (readouts, oracles)
    )
    queries = Evaluator(split, {"queries": Readout(gamma=0.0)} if queries_only else {})
    proposals: list[BestProposal] = []
    for batch in evaluation_batches(test, processor, 32):
        outputs = model(
            pixel_values=batch["pixel_values"].to(model.device),
            pixel_mask=batch["pixel_mask"].to(model.device),
            **vocabulary,
        )
        labels = batch["labels"]
        readable = [(evaluators, outputs)]
        if oracles:
            known = copy.copy(outputs)
            known["unseen_logits"] = oracle_logits(outputs, labels, split)
            readable.append((perfect, known))
        for each, found in readable:
            each[""].add(alone, found, labels)
            if outputs.dense_logits is not None:
                each[" with cells"].add(with_cells, found, labels)
        proposals += best_proposals(outputs, labels, split)
        for name in ("masks_queries_logits", "class_queries_logits", "unseen_logits"):
            if name in outputs:  # a model without PBC has no indicator
                outputs[name] = outputs[name][:, : model.config.num_queries]
        queries.add(alone, outputs, labels)
    scores = {
        f"{key}{name}": value
        for kind in (evaluators, perfect)
        for name, each in kind.items()
        if not name or outputs.dense_logits is not None
        for key, value in each.scores().items()
    }
    return scores | queries.scores(), proposals


def summarize(cells: Path, results: Path) -> None:
    """Writes ablation.json, ablation.md, ablation.png and misalignment.png from the finished cells.

    Args:
        cells: Folder of the cells' results.
        results: Folder to write to; it contains the calibrations with γ and θ for the rows with PBC.
    """
    corrections = {}
    for name in CALIBRATIONS:
        if (results / name).exists():
            found_here = json.loads((results / name).read_text(encoding="utf-8"))
            corrections[name] = {key: found_here[key] for key in ("gamma", "threshold")}
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(cells.glob("*.json")):
        cell = json.loads(file.read_text(encoding="utf-8"))
        found.setdefault(cell["row"], []).append(cell)
    if not found:
        raise FileNotFoundError(f"There is no finished cell in {cells}; run ablate.py without --summarize first.")
    rows = []
    for name, row in ROWS.items():
        done = sorted(found.get(row.cells or name, []), key=lambda cell: cell["seed"])
        if not done:
            continue
        kind, _, cells_too = row.readout.partition(" ")
        suffix = f" {cells_too}" if cells_too else ""
        shared = set.intersection(*(set(cell["scores"]) for cell in done))
        if f"plain{suffix}" not in shared:  # the tower has no cells
            continue
        readout = kind + suffix
        if kind == "decision":
            readout = f"pbc {UNCALIBRATED[0]}/{UNCALIBRATED[1]}{suffix}"
            if readout not in shared:  # results of an earlier version
                continue
        if kind == "pbc":
            calibration = ROWS[row.cells or name].calibration
            if calibration not in corrections:
                print(f"The row {name!r} is left out: {results / calibration} is missing.", file=sys.stderr)
                continue
            correction = corrections[calibration]
            kind = f"pbc {correction['gamma']}/{correction['threshold']}" if correction["gamma"] else "plain"
            readout = kind + suffix
        if kind in ("constant", "oracle"):  # the best value of the row, shared by all seeds: an upper bound
            candidates = [f"constant {value}" for value in PENALTIES] + [f"oracle {value}" for value in ORACLE_GAMMAS]
            keys = [f"{each}{suffix}" for each in candidates if each.startswith(kind)]
            if not shared.intersection(keys):  # results of an earlier version
                continue
            readout = max(
                shared.intersection(keys),
                key=lambda key: (np.mean([cell["scores"][key]["hiou"] for cell in done]), -keys.index(key)),
            )
        if readout not in shared:
            raise ValueError(
                f"Cells of {name!r} have no scores for the γ and θ of their calibration ({readout}): run "
                "calibrate.py with the grid of this version, or remove the cells."
            )
        rows.append(
            {
                "name": name,
                "title": row.title,
                "readout": readout,
                "seeds": [cell["seed"] for cell in done],
                **{score: [cell["scores"][readout][score] for cell in done] for score in SCORES},
                "indicator_roc_auc": [cell["indicator_roc_auc"] for cell in done],
                **{key: [cell[key] for cell in done] for key in RECALLS if all(key in cell for cell in done)},
                "seconds": [cell["seconds"] for cell in done],
            }
        )
    some = next(iter(found.values()))[0]
    report = {
        "rows": rows,
        "corrections": corrections,
        "command": "python scripts/ablate.py",
        "steps": some["settings"]["training"]["steps"],
        "versions": some["versions"],
    }
    atomic_write_text(results / "ablation.json", json.dumps(report, indent=2) + "\n")
    lines = ["| | mIoU(S) | mIoU(U) | hIoU | seeds |", "|---|---|---|---|---|"]
    for line in rows:
        values = [mean_and_error(line[score]) for score in ("miou_seen", "miou_unseen", "hiou")]
        lines.append(f"| {line['title']} | {' | '.join(values)} | {len(line['seeds'])} |")
    atomic_write_text(results / "ablation.md", "\n".join(lines) + "\n")
    if rows:
        _draw_table(rows, results / "ablation.png")
    curves = {name: [cell["curve"] for cell in found.get(name, ()) if cell["curve"]] for name in CURVES}
    if all(curves.values()):
        _draw_misalignment(curves, results / "misalignment.png")


def mean_and_error(values: Sequence[float]) -> str:
    """`values` as mean ± standard error."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{np.mean(values):.1f} ± {error:.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def _draw_table(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, dict[str, dict[str, Any]]] = {"proposals alone": {}, "with the tower's cells": {}}
    for row in rows:
        title = row["title"].replace("`", "")
        panels["with the tower's cells" if CELLS in title else "proposals alone"][title.replace(CELLS, "")] = row
    panels = {name: found for name, found in panels.items() if found}
    titles = list(dict.fromkeys(title for found in panels.values() for title in found))
    figure, all_axes = plt.subplots(
        1,
        len(panels),
        figsize=(4.5 + 3.5 * len(panels), 0.26 * len(titles) + 1.2),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, (name, found) in zip(all_axes[0], panels.items()):
        shown = [title for title in titles if title in found]
        position = [-titles.index(title) for title in shown]
        for score, label, color in COLORS:
            values = [found[title][score] for title in shown]
            means = [np.mean(seeds) for seeds in values]
            errors = [np.std(seeds, ddof=1) / len(seeds) ** 0.5 if len(seeds) > 1 else 0 for seeds in values]
            axes.errorbar(means, position, xerr=errors, fmt="o", markersize=4, capsize=2, color=color, label=label)
        axes.set_yticks([-index for index in range(len(titles))], titles)
        axes.set_ylim(0.6 - len(titles), 0.6)
        axes.grid(alpha=0.3)
        if len(panels) > 1:
            axes.set_title(name, fontsize="medium")
    figure.supxlabel("percent on the test part, mean and standard error over the seeds", fontsize="medium")
    handles, labels = all_axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_misalignment(curves: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """Draws the mean of the curves of a row's seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, title, style in zip(CURVES, ("baseline", "full model without PBC"), ("--", "-")):
        steps = [point["step"] for point in curves[name][0]]
        for score, label, color in COLORS[:2]:
            values = np.array([[point[score] for point in curve] for curve in curves[name]])
            mean, spread = values.mean(0), values.std(0, ddof=1 if len(values) > 1 else 0)
            axes.plot(steps, mean, style, color=color, label=f"{label}, {title}")
            axes.fill_between(steps, mean - spread, mean + spread, color=color, alpha=0.15, linewidth=0)
    axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))  # the band can reach below 0
    axes.set_xlabel("training step")
    axes.set_ylabel("percent on the validation part")
    several = any(len(seeds) > 1 for seeds in curves.values())
    axes.set_title("mean over seeds; band: standard deviation" if several else "one seed", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
