# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Tables and figures of the speed benchmark."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import atomic_write_text
from .speed import COMPILE_OPTIONS


NAME_COUNTS = (20, 171, 1000)  # in the section `names`


def milliseconds(timing: dict[str, float]) -> str:
    spread = (timing["upper_quartile"] - timing["lower_quartile"]) * 1000
    return f"{timing['median'] * 1000:,.0f} ± {spread / 2:,.0f}"


def markdown(report: dict[str, Any]) -> str:
    """Markdown tables of all results."""
    lines = ["# Speed and memory", ""]
    sections = report["sections"]
    machines = {name: machine_name(section["machine"]) for name, section in sections.items()}
    one = len(set(machines.values())) == 1
    if one:
        lines += [*set(machines.values()), ""]
    lines += [
        f"{report['tower']}. Milliseconds are medians ± half the distance between the quartiles. Random weights. Models of "
        "one table were timed in turns.",
        "",
    ]
    peaks = sections.get("memory", {}).get("models", {})
    for name, lines_of in _SECTIONS.items():
        if name in sections:
            title, *table = lines_of(sections[name], peaks) if name == "peers" else lines_of(sections[name])
            lines += [title, *([] if one else ["", machines[name]]), *table]
    return "\n".join(lines).rstrip() + "\n"


def machine_name(machine: dict[str, Any]) -> str:
    """The processor with its vector instructions, the number of threads and, if there is one, the accelerator."""
    where = f"{machine['cpu']} ({', '.join(machine['cpu_features'])}), {machine['threads']} threads"
    return where if machine["device"] == "cpu" else f"{machine['device']}; host {where}"


def _table(title: str, header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"## {title}", "", *_rows(header, rows)]


def _rows(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _peers(found: dict[str, Any], peaks: dict[str, Any]) -> list[str]:
    return _table(
        f"{found['size']} px, {found['classes']} classes, batch 1",
        ["model", "ms", "× CLIP", "× AlignZeg", "GMACs", "trainable, M", "peak MiB", ""],
        [
            [
                row["title"],
                milliseconds(row),
                f"{row['over_clip']:.2f}",
                f"{row['over_alignzeg']:.2f}",
                f"{row['gmacs']:.1f}" if "gmacs" in row else "",
                f"{row['trainable'] / 1e6:.1f}" if "trainable" in row else "",
                f"{peaks[name]['peak_mib']:,.0f}" if name in peaks else "",
                row["note"],
            ]
            for name, row in found["models"].items()
        ],
    )


def gmacs_of(row: dict[str, Any], count: int) -> float:
    """Multiply-adds of a model of the section `names` with `count` class names, in units of 1e9."""
    return row["gmacs_first"] + (count - 1) * row["gmacs_per_class"]


def _names(found: dict[str, Any]) -> list[str]:
    return _table(
        f"Open vocabularies: what a class name costs, {found['size']} px, batch 1",
        [
            "model",
            *(f"ms, {count} name{'s' * (count > 1)}" for count in (1, 5)),
            "GMACs, 1 name",
            "each further name",
            *(f"{count:,} names" for count in NAME_COUNTS),
            "parameters, M",
            "",
        ],
        [
            [
                row["title"],
                *(milliseconds(timing) for timing in row["timings"].values()),
                f"{row['gmacs_first']:,.1f}",
                f"{row['gmacs_per_class']:,.4f}" if row["gmacs_per_class"] < 0.1 else f"{row['gmacs_per_class']:,.1f}",
                *(f"{gmacs_of(row, count):,.1f}" for count in NAME_COUNTS),
                f"{row['parameters'] / 1e6:,.0f}",
                row["note"],
            ]
            for row in found["models"].values()
        ],
    )


def _sizes(found: dict[str, Any]) -> list[str]:
    return _table(
        f"Image size, {found['classes']} classes",
        ["px", "network, ms", "file to label map, ms", "bare CLIP, ms", "network × CLIP", "GMACs"],
        [
            [
                side,
                *(milliseconds(row[name]) for name in ("network", "end_to_end", "clip")),
                f"{row['network']['median'] / row['clip']['median']:.2f}",
                f"{row['gmacs']:.1f}",
            ]
            for side, row in found["sizes"].items()
        ],
    )


def _classes(found: dict[str, Any]) -> list[str]:
    return _table(
        f"Number of classes, {found['size']} px, label maps of {found['label_size']} px",
        ["classes", "network, ms", "file to label map, ms", "× the first", "peak MiB"],
        [
            [
                f"{int(count):,}",
                milliseconds(row["network"]),
                milliseconds(row["end_to_end"]),
                f"{row['over_first']:.2f}",
                f"{row['memory']['peak_mib']:,.0f}",
            ]
            for count, row in found["vocabularies"].items()
        ],
    )


def _batches(found: dict[str, Any]) -> list[str]:
    rows, models = found["batches"], ("network", "clip")
    rates = {name: [int(batch) / row[name]["median"] for batch, row in rows.items()] for name in models}
    return _table(
        f"Batch, {found['size']} px",
        ["images", "network, ms", "bare CLIP, ms", "images a second", "× the first", "bare CLIP × the first"],
        [
            [
                batch,
                *(milliseconds(row[name]) for name in models),
                f"{rates['network'][index]:.2f}",
                *(f"{rates[name][index] / rates[name][0]:.2f}" for name in models),
            ]
            for index, (batch, row) in enumerate(rows.items())
        ],
    )


def _dtypes(found: dict[str, Any]) -> list[str]:
    return [f"## Precision, {found['size']} px", "", *_alternatives(found, {name: name for name in found["timings"]})]


def _alternatives(found: dict[str, Any], names: dict[str, str]) -> list[str]:
    """Ways to compute the same, against the first of `names`, which maps them to their titles."""
    columns = {
        "speed-up": ("speedup", "{:.2f}", 1),
        "MB": ("megabytes", "{:.0f}", 1),
        "equal pixels": ("equal_pixels", "{:.2f} %", 100),
    }
    columns = {header: column for header, column in columns.items() if column[0] in found}
    rows = []
    for name, shown in names.items():
        values = [
            text.format(scale * found[key][name]) if name in found[key] else ""
            for key, text, scale in columns.values()
        ]
        rows.append([shown, milliseconds(found["timings"][name]), *values])
    return _rows(["", "ms", *columns], rows)


def _training(found: dict[str, Any]) -> list[str]:
    parts = ("inference", "forward", "loss and matching", "backward", "optimizer", "step")
    rows = [
        [
            part,
            f"{found['median'][part] * 1000:,.0f}",
            "" if part == "inference" else f"{100 * found['median'][part] / found['median']['step']:.0f} %",
        ]
        for part in parts
    ]
    title = f"Training step, {found['size']} px, {found['classes']} classes, batch 1, float32"
    kept, deeper = (found[name] for name in ("memory", "memory_with_6_more_layers_below_the_split"))
    return [
        *_table(title, ["", "ms", "share of the step"], rows),
        f"A step adds {kept['added_mib']:,.0f} MiB to the weights; with six more CLIP layers below the split "
        f"{deeper['added_mib']:,.0f} MiB.",
        "",
    ]


def _loader(found: dict[str, Any]) -> list[str]:
    rates = found["images_per_second_by_workers"]
    lines = [f"{rate:,.0f} training images a second with {workers} workers." for workers, rate in rates.items()]
    return ["## Loader", "", *lines, ""]


def _text(found: dict[str, Any]) -> list[str]:
    return _table(
        "Class names of `checkpoints/photos`",
        ["names, template set", "prompts", "seconds", "unsorted batches, seconds", "from disk, seconds", "added MiB"],
        [
            [
                f"{int(name.split()[0]):,}, {name.split()[1]}",
                f"{row['prompts']:,}",
                f"{row['seconds']:.1f}",
                f"{row['plain']:.1f}",
                f"{row['from_disk']:.2f}",
                f"{row['added_mib']:,.0f}",
            ]
            for name, row in found["rows"].items()
        ],
    )


def _folder(found: dict[str, Any]) -> list[str]:
    peaks = ", ".join(f"{peak:,.0f}" for peak in found["peak_mib"])
    return [
        "## A folder of images",
        "",
        f"`checkpoints/photos`, {found['images']:,} images of {found['width']} × {found['height']} pixels, label maps only: "
        f"{found['predict']:.3f} s per image, the network alone {found['network']:.3f} s "
        f"({100 * found['share_of_network_rate']:.0f} % of its rate). Peak memory after each quarter: {peaks} MiB.",
        "",
    ]


def onnx_rows(found: dict[str, Any]) -> list[str]:
    """The table of the section `onnx` without its title."""
    names = {"torch": "torch", "float32": "`image.onnx`", "int8": "`image.onnx`, `--int8`"}
    return _alternatives(found, names)


def _onnx(found: dict[str, Any]) -> list[str]:
    title = f"## Image of {found['size']} px to label map, {found['classes']} classes, on the CPU"
    return [title, "", *onnx_rows(found)]


def _compile(found: dict[str, Any]) -> list[str]:
    return _table(
        f"torch.compile, {found['size']} px",
        ["", "eager, ms", "compiled, ms", "speed-up", "first call, s"],
        [
            [
                name,
                milliseconds(found[name]["eager"]),
                milliseconds(found[name]["compiled"]),
                f"{found[name]['speedup']:.2f}",
                f"{found[name]['first_call_seconds']:.0f}",
            ]
            for name in COMPILE_OPTIONS
            if name in found
        ],
    )


_SECTIONS: dict[str, Callable[..., list[str]]] = {  # in the order of the report
    "peers": _peers,
    "names": _names,
    "sizes": _sizes,
    "classes": _classes,
    "batches": _batches,
    "dtypes": _dtypes,
    "training": _training,
    "loader": _loader,
    "text": _text,
    "folder": _folder,
    "onnx": _onnx,
    "compile": _compile,
}


def plot(report: dict[str, Any], path: Path) -> None:
    """Plots the latency of all models, multiply-adds over the number of class names, and AlignZeg's latency over it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sections = report["sections"]
    wanted = [name for name in ("peers", "names", "classes") if name in sections]
    if not wanted:
        return
    figure, axes = pyplot.subplots(1, len(wanted), figsize=(6.5 * len(wanted), 3.6), squeeze=False)
    for axis, name in zip(axes[0], wanted):
        if name == "peers":
            rows = list(sections[name]["models"].values())[::-1]
            colors = ["tab:blue" if row["title"].startswith("AlignZeg") else "tab:gray" for row in rows]
            axis.barh([row["title"] for row in rows], [row["median"] for row in rows], color=colors)
            axis.set_xscale("log")
            axis.set_xlabel(f"seconds, {sections[name]['size']} px, {sections[name]['classes']} classes")
        elif name == "names":
            counts = [round(10 ** (step / 20)) for step in range(61)]
            for row in sections[name]["models"].values():
                axis.plot(counts, [gmacs_of(row, count) for count in counts], label=row["title"])
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_xlabel("class names")
            axis.set_ylabel("GMACs per image")
            axis.set_ylim(top=1e7)
            axis.legend(fontsize=8, loc="upper left")
        else:
            rows = sections[name]["vocabularies"]
            for part in ("network", "end_to_end"):
                values = [row[part]["median"] for row in rows.values()]
                axis.plot([int(count) for count in rows], values, marker="o", label=part.replace("_", " "))
            axis.axhline(sections[name]["clip"]["median"], color="tab:gray", linestyle=":", label="bare CLIP")
            axis.set_xscale("log")
            axis.set_ylim(bottom=0)
            axis.set_xlabel("classes")
            axis.set_ylabel("seconds")
            axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write(report: dict[str, Any], stem: Path) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(stem.with_suffix(".json"), json.dumps(report, indent=1) + "\n")
    atomic_write_text(stem.with_suffix(".md"), markdown(report))
    plot(report, stem.with_suffix(".png"))
