#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Updates the results in README.md, the cards and docs from docs/results and the shipped splits, between `<!-- NAME -->` and
`<!-- /NAME -->`.

python scripts/make_docs.py            # writes
python scripts/make_docs.py --check    # fails if something would change
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import numpy as np

from zeroshot.cli import command_parser, run_command
from zeroshot.data.splits import load_split


ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
FILES = (
    "README.md",
    "model_card.md",
    "checkpoints/photos/README.md",
    "docs/experiments.md",
    "docs/fine_tuning.md",
    "docs/onnx.md",
    "docs/protocols.md",
    "docs/scaling.md",
    "docs/usage.md",
)
NOT_MEASURED = "_not measured_"


def load(name: str) -> dict | None:
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def shipped_table() -> str:
    report = load("shipped_checkpoint.json")
    if report is None:
        return NOT_MEASURED
    lines = [
        "| embedded benchmark, test part | mIoU(S) | mIoU(U) | hIoU | pixel accuracy |",
        "|---|---|---|---|---|",
    ]
    rows = {
        "the checkpoint in this repository": report,
        "same budget, all classes labelled": report["fully_supervised"],
    }
    for title, scores in rows.items():
        values = [f"{scores[name]:.1f}" for name in ("miou_seen", "miou_unseen", "hiou", "pixel_accuracy")]
        lines.append(f"| {title} | {' | '.join(values)} |")
    share = 100 * report["hiou"] / report["hiou_fully_supervised"]
    source = "[docs/results/shipped_checkpoint.json](docs/results/shipped_checkpoint.json)"
    lines += ["", f"The zero-shot model reaches {share:.0f} % of the fully supervised hIoU ({source})."]
    return "\n".join(lines)


def ablation_table() -> str:
    report = load("ablation.json")
    if report is None:
        return NOT_MEASURED
    rows = {row["name"]: row for row in report["rows"]}
    if not {"full", "baseline"} <= rows.keys() or min(len(rows[name]["hiou"]) for name in ("full", "baseline")) < 2:
        return NOT_MEASURED
    full, baseline = rows["full"], rows["baseline"]

    def gain(score: str) -> str:
        mean = statistics.mean(full[score]) - statistics.mean(baseline[score])
        squares = [statistics.variance(row[score]) / len(row[score]) for row in (full, baseline)]
        return f"{mean:+.1f} ± {sum(squares) ** 0.5:.1f}"

    auc = full["indicator_roc_auc"]
    seconds = statistics.mean(full["seconds"])
    correction = report["corrections"]["calibration.json"]
    lines = [
        (RESULTS / "ablation.md").read_text(encoding="utf-8").strip(),
        "",
        f"Test part, mean ± standard error over the seeds, {report['steps']} steps each "
        f"({seconds / 60:.0f} minutes on one core). Full model against baseline: mIoU(S) {gain('miou_seen')}, "
        f"mIoU(U) {gain('miou_unseen')}, hIoU {gain('hiou')}. The indicator's ROC-AUC is {statistics.mean(auc):.2f}. "
        f"PBC's γ = {correction['gamma']} and θ = {correction['threshold']} were chosen on seen classes treated as unseen "
        "([protocol](docs/experiments.md#protocol)); the blind constant was chosen on the test part. The runs "
        "date from before FES's mixtures were detached, with the background in PBC's softmax. Numbers: "
        "[docs/results/ablation.json](docs/results/ablation.json).",
    ]
    return "\n".join(lines)


def speed_table() -> str:
    """AlignZeg and its peers, and one line for each other section of the benchmark."""
    report = load("benchmark_cpu.json")
    if report is None or "peers" not in report["sections"]:
        return NOT_MEASURED
    from zeroshot.evaluation.benchmark_report import machine_name

    sections = report["sections"]
    found = sections["peers"]
    machine = found["machine"]
    lines = [
        f"{report['tower']}, one image of {found['size']} px, {found['classes']} classes, {found['dtype']}, random weights, "
        f"{machine['threads']} threads of {machine['cpu']}; medians; models timed alternately in one run. CLIPSeg: 352 px, "
        "one pass per class. GroupViT: 224 px. Bare CLIP: 320 px, as inside AlignZeg. Mask2Former and EoMT: "
        "a closed vocabulary.",
        "",
        "| | seconds | × bare CLIP | × AlignZeg | GMACs | trainable |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["models"].values():
        macs = f"{row['gmacs']:.0f}" if "gmacs" in row else ""
        trainable = f"{row['trainable'] / 1e6:.1f} M" if row.get("trainable") else ""
        title = f"**{row['title']}**" if row["title"].startswith("AlignZeg") else row["title"]
        lines.append(
            f"| {title} | {row['median']:.2f} | {row['over_clip']:.2f} | {row['over_alignzeg']:.2f} | {macs} | {trainable} |"
        )
    lines.append("")
    notes = {}
    if "classes" in sections:
        count, last = list(sections["classes"]["vocabularies"].items())[-1]
        first = next(iter(sections["classes"]["vocabularies"]))
        notes["classes"] = (
            f"{int(count):,} classes instead of {first}, label map of {sections['classes']['label_size']} px included: "
            f"{last['over_first']:.2f} × the time, {last['memory_over_first_mib']:.0f} MiB more."
        )
    if "dtypes" in sections:
        dtypes = sections["dtypes"]
        seconds = {name: timing["median"] for name, timing in dtypes["timings"].items()}
        notes["dtypes"] = (
            f"bfloat16: {dtypes['speedup']['bfloat16']:.2f} × faster than float32, "
            f"{seconds['bfloat16'] / seconds['clip bfloat16']:.2f} × the bare tower in bfloat16; "
            f"{100 * dtypes['equal_pixels']['bfloat16']:.1f} % of the pixels keep their label (shipped checkpoint)."
        )
    if "batches" in sections:
        rates = {int(count): row["images_per_second"] for count, row in sections["batches"]["batches"].items()}
        first, last = min(rates), max(rates)
        notes["batches"] = (
            f"A batch of {last} instead of {first}: {rates[last] / rates[first]:.2f} × the images per second."
        )
    if "onnx" in sections:
        speedup = sections["onnx"]["speedup"]
        notes["onnx"] = (
            f"`image.onnx` in onnxruntime, from image to label map: {speedup['float32']:.2f} × faster than torch, with "
            f"`--int8` {speedup['int8']:.2f} × ([docs/onnx.md](docs/onnx.md))."
        )
    if "names" in sections:
        costs = {name: row["gmacs_per_class"] for name, row in sections["names"]["models"].items()}
        notes["names"] = (
            f"Multiply-adds for each further class name: AlignZeg {1000 * costs['alignzeg']:.1f} million, CLIPSeg "
            f"{costs['clipseg']:.0f} billion, SAM 3 {costs['sam3']:.0f} billion."
        )
    if "training" in sections:
        training = sections["training"]
        kept, deeper = (
            training[name]["added_mib"] for name in ("memory", "memory_with_6_more_layers_below_the_split")
        )
        notes["training"] = (
            f"A training step takes {training['step_over_inference']:.2f} × as long as inference; loss and matching are "
            f"{100 * training['loss_share']:.0f} % of it. Its peak memory is {kept:.0f} MiB above the weights; six more "
            f"frozen CLIP layers below the split add {deeper - kept:.0f} MiB."
        )
    if "compile" in sections:
        rows = ((name, found) for name, found in sections["compile"].items() if isinstance(found, dict))
        speedups = [f"{found['speedup']:.2f} × ({name})" for name, found in rows if "speedup" in found]
        notes["compile"] = f"`torch.compile` against eager: {', '.join(speedups)}; matrix products dominate."
    for name, note in notes.items():
        where = machine_name(sections[name]["machine"])
        lines.append(f"- {note}{'' if where == machine_name(machine) else f' On another machine: {where}.'}")
    if convnext := load("benchmark_cpu_convnext_base_w.json"):
        found = convnext["sections"]["sizes"]
        row = found["sizes"]["640"]
        lines.append(
            f"- ConvNeXt-Base, 640 px: {row['network']['median'] / row['clip']['median']:.2f} × the bare tower, on "
            f"{machine_name(found['machine'])} "
            "([docs/results/benchmark_cpu_convnext_base_w.md](docs/results/benchmark_cpu_convnext_base_w.md))."
        )
    gpu = load("benchmark_cuda.json")
    lines.append(
        "- GPU: **not measured**."
        if gpu is None
        else f"- {next(iter(gpu['sections'].values()))['machine']['device']}: "
        "[docs/results/benchmark_cuda.md](docs/results/benchmark_cuda.md)."
    )
    lines += ["", "All tables: [docs/results/benchmark_cpu.md](docs/results/benchmark_cpu.md)."]
    return "\n".join(lines)


def onnx_speed_table() -> str:
    """Exported files against torch."""
    report = load("benchmark_cpu.json")
    if report is None or "onnx" not in report["sections"]:
        return NOT_MEASURED
    from zeroshot.evaluation.benchmark_report import machine_name, onnx_rows

    found = report["sections"]["onnx"]
    machine, source = machine_name(found["machine"]), "[results/benchmark_cpu.md](results/benchmark_cpu.md)"
    lines = [
        *onnx_rows(found),
        f"{report['tower']}, from an image of {found['size']} px to its label map, {found['classes']} classes, random "
        f"weights, on {machine} ({source}). Equal pixels: this repository's checkpoint on synthetic scenes, against torch.",
    ]
    return "\n".join(lines)


def precision_table() -> str:
    """Accuracy in reduced precision and after export."""
    report = load("precision.json")
    if report is None:
        return NOT_MEASURED
    titles = {
        "torch": "torch, float32",
        "bfloat16": "torch, bfloat16",
        "float16": "torch, float16",
        "float32": "`image.onnx`",
        "int8": "`image.onnx`, `--int8`",
    }
    header, rows = [""], {way: [title] for way, title in titles.items()}
    for place, found in report.items():
        name = {".": "this repository's checkpoint"}.get(place, f"`{place}`")
        header.append(f"{name}, {found['images']} test images of {found['dataset']}")
        for way, row in rows.items():
            scores = found["ways"][way]
            equal = "" if way == "torch" else f" ({scores['equal_pixels']:.1f} %)"
            row.append(f"{scores['miou']:.1f}{equal}")
    lines = [
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
        *(f"| {' | '.join(row)} |" for row in rows.values()),
    ]
    return "\n".join(
        [
            *lines,
            "",
            "mIoU, and in brackets the share of the pixels with the same label as in torch, float32 "
            "([results/precision.json](results/precision.json), `scripts/measure_precision.py`).",
        ]
    )


def pretraining() -> dict:
    return json.loads((ROOT / "scripts" / "assets" / "small_clip" / "pretraining.json").read_text(encoding="utf-8"))


def clip_line() -> str:
    report = pretraining()
    return (
        f"The small CLIP ({report['parameters'] / 1e6:.1f} M parameters) classifies "
        f"{100 * report['zero_shot_accuracy']:.1f} % of {report['held_out_images']:,} held-out single-object images "
        f"correctly ({report['classes']} classes), after {report['seconds'] / 60:.0f} minutes on one core "
        "(`scripts/assets/small_clip/pretraining.json`)."
    )


def cost_line() -> str:
    report, clip = load("shipped_checkpoint.json"), pretraining()
    if report is None:
        return NOT_MEASURED
    minutes = (report["training_seconds"] + clip["seconds"]) / 60
    return (
        f"{minutes:.0f} minutes on CPU cores, one at a time: {clip['seconds'] / 60:.0f} for the CLIP, the rest for "
        "AlignZeg. No GPU."
    )


def model_index() -> str:
    """The `model-index` of the card's metadata, as YAML lines."""
    report = load("shipped_checkpoint.json")
    names = {
        "miou_seen": "mIoU seen",
        "miou_unseen": "mIoU unseen",
        "hiou": "hIoU",
        "pixel_accuracy": "pixel accuracy",
    }
    metrics = "".join(
        f"          - type: {key}\n            name: {name}\n            value: {report[key]:.2f}\n"
        for key, name in names.items()
    )
    return (
        "model-index:\n  - name: alignzeg-embedded-scenes\n    results:\n      - task:\n          type: image-segmentation\n"
        "          name: zero-shot semantic segmentation\n        dataset:\n          type: embedded_scenes\n"
        "          name: embedded scenes (synthetic)\n          split: test\n        metrics:\n" + metrics
    ).rstrip()


def scaling_stages() -> str:
    report = load("scaling.json")
    if report is None:
        return NOT_MEASURED
    stages = list(report["runs"][0]["seconds_per_image"])
    lines = [
        f"{report['model']}; {report['images']}; {report['classes']} classes; {report['device']}.",
        "",
        f"| seconds of one core per image | {' | '.join(stages)} | all | share of `model` |",
        "|---" * (len(stages) + 3) + "|",
    ]
    for run in report["runs"]:
        values = [f"{run['seconds_per_image'][stage]:.3f}" for stage in stages]
        share = run["seconds_per_image"]["model"] / run["total_seconds_per_image"]
        precision = "fp32" if run["precision"] == "no" else run["precision"]
        lines.append(
            f"| {precision} | {' | '.join(values)} | {run['total_seconds_per_image']:.2f} | {100 * share:.0f} % |"
        )
    return "\n".join(lines)


def duration(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:,.0f} minutes"
    if hours < 48:
        return f"{hours:,.1f} hours"
    return f"{hours / 24:,.1f} days"


def scaling_costs() -> str:
    report = load("scaling.json")
    if report is None:
        return NOT_MEASURED
    seconds = min(run["total_seconds_per_image"] for run in report["runs"])
    lines = [
        "| | core-hours | one machine of 64 cores | ten | a hundred | images | label maps |",
        "|---" * 7 + "|",
    ]
    for name, images in (("a million images", 1e6), ("a billion images", 1e9)):
        hours = images * seconds / 3600
        machine_hours = [hours / (64 * machines) for machines in (1, 10, 100)]
        cells = [duration(time) for time in machine_hours]
        terabytes = [images * report[key] / 1e12 for key in ("image_bytes", "label_map_bytes")]
        cells += [f"{size:,.1f} TB" if size >= 1 else f"{1000 * size:,.0f} GB" for size in terabytes]
        lines.append(f"| {name} | {hours:,.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def scaling_feeding() -> str:
    report = load("scaling.json")
    if report is None:
        return NOT_MEASURED
    seconds = report["runs"][0]["seconds_per_image"]
    cores = seconds["read"] + seconds["encode"] + seconds["write"]
    megabytes = report["image_bytes"] / 1e6
    return (
        f"- r × {cores:.3f} cores for `read`, `encode` and `write`, {100 * cores:.1f} cores at 100 images/s;\n"
        f"- r × {megabytes:.2f} MB/s of images, {100 * megabytes:.0f} MB/s at 100 images/s, for images of "
        "this size; use the size of yours."
    )


PHOTO_ROWS = {  # rows of the ablation on photographs that README shows
    "baseline": "baseline",
    "baseline_constant": "baseline + blind constant",
    "pbc_decision": "baseline + PBC",
    "plus_bds": "AlignZeg without PBC",
    "full_decision": "AlignZeg",
    "without_fes_decision": "AlignZeg without FES",
    "baseline_cells": "baseline + the tower's cells",
    "baseline_cells_constant": "baseline + the tower's cells + blind constant",
    "pbc_decision_cells": "baseline + the tower's cells + PBC",
    "full_cells_plain": "AlignZeg without PBC + the tower's cells",
    "full_decision_cells": "AlignZeg + the tower's cells",
    "without_fes_decision_cells": "AlignZeg without FES + the tower's cells",
}
PHOTO_DETAILS = {  # further rows in docs/experiments.md
    "pbc": "baseline + PBC, γ and θ calibrated",
    "pbc_cells": "baseline + the tower's cells + PBC, γ and θ calibrated",
    "baseline_oracle": "baseline, perfect indicator",
    "oracle": "AlignZeg, perfect indicator",
    "baseline_oracle_cells": "baseline + the tower's cells, perfect indicator",
    "oracle_cells": "AlignZeg + the tower's cells, perfect indicator",
}
PHOTO_COMPARISONS = {  # pairs of rows, read out by proposals alone and with the cells
    "AlignZeg against the baseline": (("full_decision", "baseline"), ("full_decision_cells", "baseline_cells")),
    "AlignZeg without FES against the baseline": (
        ("without_fes_decision", "baseline"),
        ("without_fes_decision_cells", "baseline_cells"),
    ),
    "AlignZeg against the baseline + blind constant": (
        ("full_decision", "baseline_constant"),
        ("full_decision_cells", "baseline_cells_constant"),
    ),
    "AlignZeg without PBC against the baseline": (("plus_bds", "baseline"), ("full_cells_plain", "baseline_cells")),
    "AlignZeg without PBC against the baseline + blind constant": (
        ("plus_bds", "baseline_constant"),
        ("full_cells_plain", "baseline_cells_constant"),
    ),
    "baseline + PBC against the baseline + blind constant": (
        ("pbc_decision", "baseline_constant"),
        ("pbc_decision_cells", "baseline_cells_constant"),
    ),
    "the same with γ and θ of the validation part": (
        ("pbc", "baseline_constant"),
        ("pbc_cells", "baseline_cells_constant"),
    ),
}
PHOTO_COMPONENTS = {  # rows by proposals alone, and with the cells
    "baseline": ("baseline", "baseline_cells"),
    "MRPE": ("plus_mrpe", "plus_mrpe_cells"),
    "MRPE with masks of unlabelled segments": ("plus_mrpe_unlabelled", "plus_mrpe_unlabelled_cells"),
    "masks of unlabelled segments without MRPE": ("plus_unlabelled", "plus_unlabelled_cells"),
    "MRPE + FES": ("plus_fes", "plus_fes_cells"),
    "MRPE + FES + BDS = AlignZeg without PBC": ("plus_bds", "full_cells_plain"),
    "the same with masks of unlabelled segments": ("full_unlabelled_plain", "full_unlabelled_cells"),
    "FES + BDS": ("without_mrpe_plain", "without_mrpe_cells"),
    "MRPE + BDS": ("without_fes_plain", "without_fes_cells"),
}
PHOTO_EFFECTS = {  # what a part adds: a pair of rows by proposals alone, and with the cells
    "MRPE, added to the baseline": (("plus_mrpe", "baseline"), ("plus_mrpe_cells", "baseline_cells")),
    "MRPE, in AlignZeg without PBC": (("plus_bds", "without_mrpe_plain"), ("full_cells_plain", "without_mrpe_cells")),
    "MRPE, in AlignZeg": (
        ("full_decision", "without_mrpe_decision"),
        ("full_decision_cells", "without_mrpe_decision_cells"),
    ),
    "MRPE with masks of unlabelled segments, added to the baseline": (
        ("plus_mrpe_unlabelled", "baseline"),
        ("plus_mrpe_unlabelled_cells", "baseline_cells"),
    ),
    "FES, added to baseline + MRPE": (("plus_fes", "plus_mrpe"), ("plus_fes_cells", "plus_mrpe_cells")),
    "FES, in AlignZeg without PBC": (("plus_bds", "without_fes_plain"), ("full_cells_plain", "without_fes_cells")),
    "FES, in AlignZeg": (
        ("full_decision", "without_fes_decision"),
        ("full_decision_cells", "without_fes_decision_cells"),
    ),
    "BDS, added to baseline + MRPE + FES": (("plus_bds", "plus_fes"), ("full_cells_plain", "plus_fes_cells")),
    "PBC, added to the baseline": (("pbc_decision", "baseline"), ("pbc_decision_cells", "baseline_cells")),
    "PBC, in AlignZeg": (("full_decision", "plus_bds"), ("full_decision_cells", "full_cells_plain")),
    "PBC, in AlignZeg without FES": (
        ("without_fes_decision", "without_fes_plain"),
        ("without_fes_decision_cells", "without_fes_cells"),
    ),
}
SEEN_UNSEEN = ("miou_seen", "miou_unseen", "hiou")


def gain(splits: list[dict], row: str, baseline: str, score: str) -> str:
    """Mean over the splits of the difference between two rows, trained with the same seeds."""
    found = [[dict(zip(rows[name]["seeds"], rows[name][score])) for name in (row, baseline)] for rows in splits]
    seeds = sorted(set.intersection(*(set(values) for pair in found for values in pair)))
    means = [np.mean([ours[seed] - theirs[seed] for ours, theirs in found]) for seed in seeds]
    error = f" ± {np.std(means, ddof=1) / len(means) ** 0.5:.1f}" if len(means) > 1 else ""
    return f"{np.mean(means):+.1f}{error}".replace("-0.0 ", "0.0 ").replace("+0.0 ", "0.0 ")


def photos_table() -> str:
    """MSRC-21: rows of the ablation on both splits, the gain over the baseline, and the reference with all classes
    labelled."""
    reports = [load(f"msrc_{split}/ablation.json") for split in "ab"]
    reference = {split: load(f"msrc/fully_supervised_{split}.json") for split in "ab"}
    if None in (*reports, *reference.values()):
        return NOT_MEASURED
    from zeroshot.evaluation.ablation import mean_and_error

    splits = [{row["name"]: row for row in report["rows"]} for report in reports]
    lines = [
        "| MSRC-21, test part (236 photographs) | A: mIoU(S) | mIoU(U) | hIoU | B: mIoU(S) | mIoU(U) | hIoU |",
        "|---|---|---|---|---|---|---|",
    ]
    shown = {name: title for name, title in PHOTO_ROWS.items() if any(name in rows for rows in splits)}
    for name, title in shown.items():
        values = [
            mean_and_error(rows[name][score]) if name in rows else "—" for rows in splits for score in SEEN_UNSEEN
        ]
        lines.append(f"| {title} | {' | '.join(values)} |")
    values = [f"{reference[split][score]:.1f}" for split in "ab" for score in SEEN_UNSEEN]
    lines.append(f"| all classes labelled, with the tower's cells | {' | '.join(values)} |")

    lines += [
        "",
        "| difference, mean of both splits | proposals: hIoU | mIoU(U) | with the cells: hIoU | mIoU(U) |",
        "|---" * 5 + "|",
    ]
    for title, pairs in PHOTO_COMPARISONS.items():
        names = {name for pair in pairs for name in pair}
        both = [rows for rows in splits if names <= set(rows)]
        if both:
            values = [gain(both, *pair, score) for pair in pairs for score in ("hiou", "miou_unseen")]
            if len(both) < len(splits):
                title += f" ({' and '.join(split for split, rows in zip('AB', splits) if names <= set(rows))} only)"
            lines.append(f"| {title} | {' | '.join(values)} |")
    best = reference["b"]["hiou"] / 2 + reference["a"]["hiou"] / 2
    reached = {
        title: f"{100 * np.mean([np.mean(rows[name]['hiou']) for rows in splits]) / best:.0f} %"
        for name, title in shown.items()
        if name in ("full_decision_cells", "without_fes_decision_cells")
    }
    counts = {
        (title, split): len(rows[name]["seeds"]) if name in rows else 0
        for name, title in shown.items()
        for split, rows in zip("AB", splits)
        if "cells" not in name  # they share the trainings
    }
    most = max(counts.values())
    fewer = ", ".join(
        f"{title}: {count or 'none'} in split {split}" for (title, split), count in counts.items() if count < most
    )
    lines += [
        "",
        f"Unseen in split A: {', '.join(load_split('msrc_a').unseen)}; "
        f"in split B: {', '.join(load_split('msrc_b').unseen)}. "
        f"The frozen towers of `checkpoints/photos`, {reports[0]['steps']:,} steps, "
        f"{most} seeds{f' ({fewer})' if fewer else ''}, mean ± standard error. The tower's cells: the grid cells of the "
        "frozen tower's last feature map, classified and combined with the proposals. The blind constant is subtracted from "
        "the scores of all seen classes everywhere; its value is the best of twelve, from 0 to 1.5, for the test part. PBC: "
        "γ = 8 and θ = 0.5, chosen on earlier models ([protocol](docs/experiments.md#protocol)). A difference "
        "uses the seeds that both rows have on both splits. All classes labelled: one model, scored with both "
        "divisions of the classes. "
        "Share of the hIoU with all classes labelled: "
        f"{', '.join(': '.join(each) for each in reached.items())}. Numbers: `docs/results/msrc_a/ablation.json`, "
        "`docs/results/msrc_b/ablation.json`, `docs/results/msrc/`, written by `scripts/ablate.py` and "
        "`scripts/evaluate.py`.",
    ]
    return "\n".join(lines)


def photo_curves() -> str:
    """mIoU on the validation part during the training, means over the seeds with curves, and the number of these."""
    columns: set[int] = set()
    rows = []
    for split in "ab":
        for name, title in (("baseline", "baseline"), ("full", "AlignZeg without PBC")):
            found = [load(f"msrc_{split}/cells/{name}-{seed}.json") for seed in range(5)]
            curves = [cell["curve"] for cell in found if cell and cell["curve"]]
            if not curves:
                return NOT_MEASURED
            points: dict[int, list[str]] = {}
            for step in (point["step"] for point in curves[0]):
                values = [point for curve in curves for point in curve if point["step"] == step]
                means = [np.mean([point[f"miou_{kind}"] for point in values]) for kind in ("seen", "unseen")]
                points[step] = [f"{mean:.1f}" for mean in means]
            columns |= set(points)
            seeds = f"{len(curves)} seed{'s' if len(curves) > 1 else ''}"
            rows.append((f"split {split.upper()}, {title}, {seeds}", points))
    steps = sorted(columns)
    lines = [f"| mIoU(S) / mIoU(U), validation part, at step | {' | '.join(map(str, steps))} |"]
    lines.append("|---" * (len(steps) + 1) + "|")
    lines += [f"| {title} | {' | '.join(' / '.join(points[step]) for step in steps)} |" for title, points in rows]
    return "\n".join(lines)


def photo_components() -> str:
    """Rows with some of the components, by split: with proposals alone, with the cells, and recalls of the masks."""
    from zeroshot.evaluation.ablation import mean_and_error

    lines = []
    for split in "ab":
        report = load(f"msrc_{split}/ablation.json")
        rows = {row["name"]: row for row in report["rows"]} if report else {}
        shown = {title: pair for title, pair in PHOTO_COMPONENTS.items() if all(name in rows for name in pair)}
        if "MRPE" not in shown:
            continue
        assert report is not None
        lines += [
            f"| split {split.upper()}, {report['steps']} steps, without PBC | proposals: mIoU(U) | hIoU | with the cells: "
            "mIoU(U) | hIoU | recall of seen masks | of unseen masks | seeds |",
            "|---" * 8 + "|",
        ]
        for title, (alone, with_cells) in shown.items():
            values = [
                mean_and_error(rows[row][score]) for row in (alone, with_cells) for score in ("miou_unseen", "hiou")
            ]
            values += [mean_and_error(rows[alone][score]) for score in ("recall_seen", "recall_unseen")]
            lines.append(f"| {title} | {' | '.join(values)} | {len(rows[alone]['seeds'])} |")
        lines.append("")
    return "\n".join(lines).rstrip() or NOT_MEASURED


def photo_effects() -> str:
    """Differences between pairs of rows that differ in one part, by split."""
    reports = [load(f"msrc_{split}/ablation.json") for split in "ab"]
    if None in reports:
        return NOT_MEASURED
    splits = [{row["name"]: row for row in report["rows"]} for report in reports if report]
    lines = [
        "| difference | A: hIoU | with the cells | recall of unseen masks | B: hIoU | with the "
        "cells | recall of unseen masks |",
        "|---" * 7 + "|",
    ]
    for title, (alone, with_cells) in PHOTO_EFFECTS.items():
        values = []
        for rows in splits:
            has_rows = {*alone, *with_cells} <= rows.keys()
            values += [gain([rows], *pair, "hiou") if has_rows else "—" for pair in (alone, with_cells)]
            values.append(gain([rows], *alone, "recall_unseen") if has_rows and not title.startswith("PBC") else "—")
        if set(values) != {"—"}:
            lines.append(f"| {title} | {' | '.join(values)} |")
    return "\n".join(lines)


def photo_means() -> str:
    """Means of the rows of all splits, with bounds."""
    reports = {split: report for split in "ab" if (report := load(f"msrc_{split}/ablation.json"))}
    if not reports:
        return NOT_MEASURED
    splits = [{row["name"]: row for row in report["rows"]} for report in reports.values()]
    titles = [f"{split.upper()}, {report['steps']:,} steps" for split, report in reports.items()]
    lines = [f"| mean of mIoU(S) / mIoU(U) / hIoU | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for name, title in (PHOTO_ROWS | PHOTO_DETAILS).items():
        if any(name in rows for rows in splits):
            values = (
                " / ".join(f"{np.mean(rows[name][score]):.1f}" for score in SEEN_UNSEEN) if name in rows else "—"
                for rows in splits
            )
            lines.append(f"| {title} | {' | '.join(values)} |")
    seeds = [max(len(row["seeds"]) for row in rows.values()) for rows in splits]
    lines += ["", f"Seeds, at most: {', '.join(f'{count} ({title})' for count, title in zip(seeds, titles))}."]
    return "\n".join(lines)


def photo_checkpoint() -> str:
    """What checkpoints/photos reaches on the test photographs of both benchmarks."""
    report = load("photo_checkpoint.json")
    if report is None:
        return NOT_MEASURED
    lines = ["| test photographs | class names given | mIoU | pixel accuracy |", "|---|---|---|---|"]
    scores = ("miou", "pixel_accuracy")
    for name, title, names in (("msrc", "MSRC", 21), ("coco_panoptic", "COCO", 133)):
        for suffix, given in (("", f"all {names}"), ("_present", "those in the photograph")):
            row = report[f"{name}{suffix}"]
            values = [f"{row[score]:.1f} ({{:.1f}}–{{:.1f}})".format(*row["intervals"][score]) for score in scores]
            lines.append(f"| {title}, {row['images']} | {given} | {' | '.join(values)} |")
    lines += [
        "",
        f"In brackets: 95 % intervals. {report['megabytes']:.0f} MB; {report['seconds_per_photo']:.2f} seconds for a "
        "photograph of 640 pixels with five names on two CPU threads. `docs/results/photo_checkpoint.json`, written by "
        "`scripts/ship_photos.py`.",
    ]
    return "\n".join(lines)


def fine_tuning_table() -> str:
    """What fine-tuning on a few photographs gains on its words and loses on others."""
    report = load("fine_tuning.json")
    if report is None:
        return NOT_MEASURED
    titles = {
        "before": "`checkpoints/photos`",
        "trainer": "`Trainer`",
        "trainer_without_fes": "`Trainer`, without FES",
        "lora": "LoRA",
    }
    settings, rows = report["settings"], report["rows"]
    lines = ["| | S | U | hIoU | S, PBC | U, PBC | hIoU, PBC | trainable | minutes |", "|---" * 9 + "|"]
    for name, title in titles.items():
        row = rows[name]
        values = [f"{row[readout][score]:.1f}" for readout in ("plain", "pbc") for score in row[readout]]
        trained = "trainable_percent" in row
        cost = [f"{row['trainable_percent']:.1f} %", f"{row['seconds'] / 60:.1f}"] if trained else ["", ""]
        lines.append(f"| {title} | {' | '.join([*values, *cost])} |")
    lines += [
        "",
        f"S: mIoU of the {len(settings['fine_tuned'])} fine-tuned words; U: mIoU of {len(settings['outside'])} words "
        f"outside ({', '.join(settings['outside'])}), on {settings['test_photographs']} of MSRC's test photographs, in the "
        f"generalized label space. {settings['photographs']} photographs, {settings['steps']} steps of "
        f"{settings['batch_size']} crops of {settings['crop_size']} pixels, one seed, one CPU core that "
        "other programs used too.",
    ]
    return "\n".join(lines)


def segments_table() -> str:
    """Panoptic quality at two thresholds, and mask AP."""
    reports = [load(name) for name in ("segments.json", "segments_low_threshold.json")]
    if None in reports:
        return NOT_MEASURED
    groups = ("all", "seen", "unseen", "things", "stuff")
    lines = [
        f"| {reports[0]['images']} test scenes | {' | '.join(groups)} |",
        "|---" * 6 + "|",
    ]
    for report in reports:
        scores = report["segments"]
        cells = (
            " / ".join(f"{scores['panoptic'][group][name]:.1f}" for name in ("pq", "sq", "rq")) for group in groups
        )
        lines.append(f"| PQ / SQ / RQ, `threshold={scores['score_threshold']}` | {' | '.join(cells)} |")
    instances = {name: f"{each['ap']:.1f} / {each['ap50']:.1f}" for name, each in scores["instances"].items()}
    lines += [
        f"| mask AP / AP50 of things | {' | '.join(instances[name] for name in groups[:3])} | {instances['all']} | |",
        "",
        f"Class-agnostic mask AP / AP50: {instances['class_agnostic']}.",
    ]
    return "\n".join(lines)


def protocol_table(names: tuple[str, ...], columns: str) -> str:
    """What `scripts/evaluate.py` is told about each of these benchmarks, from its layout and its split."""
    from zeroshot.data.layouts import LAYOUTS
    from zeroshot.data.splits import SHIPPED_SPLITS, SPLITS_FOLDER

    lines = [columns, "|---|---|---|---|---|"]
    for name in names:
        facts = json.loads((SPLITS_FOLDER / SHIPPED_SPLITS[name]).read_text(encoding="utf-8"))
        layout = LAYOUTS[name]
        images = f"{layout.image_folder}/NAME{layout.image_suffix or ''}"
        labels = f"{layout.label_folder}/NAME{layout.label_suffix or ''}"
        source = next(each.split(":")[0] for each in facts["sources"] if ".py" in each)
        flags = f"--dataset {name} --part {facts.get('part', 'val')}"
        lines.append(f"| `{flags}` | {len(facts['classes'])} | `{images}` | `{labels}` | {source} |")
    return "\n".join(lines)


def layouts_table() -> str:
    names = ("ade20k_847", "pascal_context_459", "cityscapes", "cityscapes_train_ids")
    return protocol_table(names, "| options | classes | images below `--root` | label maps | source of the names |")


def mess_table() -> str:
    from zeroshot.data.layouts import MESS

    names = tuple(f"mess_{name}" for name in MESS)
    columns = "| options | classes | images below `--root` | label maps | source of the names, in blumenstiel/MESS |"
    return protocol_table(names, columns).replace("| blumenstiel/MESS ", "| ")


BLOCKS = {
    "photo-checkpoint": photo_checkpoint,
    "protocols": layouts_table,
    "protocols-mess": mess_table,
    "photos": photos_table,
    "photo-curves": photo_curves,
    "photo-means": photo_means,
    "photo-components": photo_components,
    "photo-effects": photo_effects,
    "fine-tuning": fine_tuning_table,
    "shipped": shipped_table,
    "ablation": ablation_table,
    "speed": speed_table,
    "clip": clip_line,
    "cost": cost_line,
    "scaling-stages": scaling_stages,
    "scaling-costs": scaling_costs,
    "scaling-feeding": scaling_feeding,
    "segments": segments_table,
    "precision": precision_table,
    "onnx-speed": onnx_speed_table,
}


def replace_between(text: str, begin: str, end: str, content: str) -> str:
    """`text` with `content` between the lines `begin` and `end`."""
    pattern = re.compile(f"({begin}\n).*?(\n{end})", re.DOTALL)
    return pattern.sub(lambda found: found.group(1) + content + found.group(2), text)


def fill(text: str) -> str:
    for name, make in BLOCKS.items():
        if f"<!-- {name} -->" in text:
            text = replace_between(text, f"<!-- {name} -->", f"<!-- /{name} -->", make())
    if "# model-index begins" in text and load("shipped_checkpoint.json") is not None:
        text = replace_between(text, "# model-index begins[^\n]*", "# model-index ends", model_index())
    return text


def main() -> int:
    options = command_parser(__doc__)
    options.add_argument("--check", action="store_true", help="write nothing; fail if a file would change")
    args, stale = options.parse_args(), []
    for name in FILES:
        path = ROOT / name
        if not path.exists():
            continue
        old = path.read_text(encoding="utf-8")
        new = fill(old)
        if new != old:
            stale.append(name)
            if not args.check:
                path.write_text(new, encoding="utf-8")
    if stale and args.check:
        print(f"Out of date: {', '.join(stale)}. Run python scripts/make_docs.py")
        return 1
    return 0


if __name__ == "__main__":
    run_command(main)
