# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The sections of the speed benchmark."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from modeling_alignzeg import AlignZegConfig, AlignZegImageProcessor, AlignZegModel, AlignZegProcessor

from ..data.benchmarks import load_benchmark
from ..data.dataset import SegmentationDataset
from ..data.splits import load_split
from ..data.transforms import Collator, TrainTransform
from ..training.setup import parameter_groups
from .benchmark_onnx import onnx
from .benchmark_photos import folder, text
from .benchmark_report import markdown, write
from .evaluator import library_versions
from .speed import (
    COMPILE_OPTIONS,
    OPEN_VOCABULARY,
    PEERS,
    TOWERS,
    build_alignzeg,
    build_contestant,
    describe_machine,
    giga_macs,
    interleaved,
    peak_memory,
    random_prototypes,
    sample_image,
    sample_labels,
    sample_pixels,
    synchronize,
)


ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# --- sections ------------------------------------------------------------------------------------------------------
# Each takes the arguments and returns the results for the JSON file, in seconds, MiB and giga multiply-adds.


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    return getattr(torch, args.dtype)


def image_file(side: int) -> bytes:
    buffer = io.BytesIO()
    sample_image(side).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def network(model: torch.nn.Module, images: torch.Tensor, prototypes: torch.Tensor) -> Callable[[], Any]:
    return lambda: model(pixel_values=images, text_prototypes=prototypes)


def end_to_end(
    model: torch.nn.Module,
    file: bytes,
    side: int,
    prototypes: torch.Tensor,
    label_side: int | None = None,
) -> Callable[[], torch.Tensor]:
    """A function from the bytes of an image file to its label map, with the network at `side` pixels."""
    processor = AlignZegImageProcessor(size={"shortest_edge": side}, size_divisor=model.config.size_divisor)

    def call() -> torch.Tensor:
        image = Image.open(io.BytesIO(file)).convert("RGB")
        inputs = processor(images=image, return_tensors="pt")
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(prototypes.dtype)
        outputs = model(**inputs, text_prototypes=prototypes)
        size = (image.height, image.width) if label_side is None else (label_side, label_side)
        return processor.post_process_semantic_segmentation(outputs, target_sizes=[size])[0]

    return call


def prototypes_for(model: torch.nn.Module, classes: int) -> torch.Tensor:
    return random_prototypes(classes, model.config.projection_dim).to(model.device, model.dtype)


def alignzeg_and_floor(args: argparse.Namespace) -> tuple[torch.nn.Module, Any]:
    model = build_alignzeg(args.tower).to(args.device, dtype_of(args))
    floor = build_contestant("clip", args.tower, args.device)
    floor.model.to(dtype_of(args))
    return model, floor


def peers(args: argparse.Namespace) -> dict[str, Any]:
    """All models on one image, network only."""
    images = sample_pixels(1, args.size, args.device, dtype_of(args))
    results, calls = {}, {}
    for name in PEERS:
        contestant = build_contestant(name, args.tower, args.device)
        contestant.model.to(dtype_of(args))

        def call(contestant=contestant) -> Any:
            return contestant.call(images, args.num_classes)

        results[name] = {
            "title": contestant.title,
            "note": contestant.note,
            **contestant.parameters(),
            "gmacs": round(giga_macs(contestant.model, call), 2),
        }
        calls[name] = call
    model = build_alignzeg(args.tower).to(args.device, dtype_of(args))
    file = image_file(args.size)
    calls["alignzeg_end_to_end"] = end_to_end(model, file, args.size, prototypes_for(model, args.num_classes))
    results["alignzeg_end_to_end"] = {"title": "AlignZeg, image file to label map", "note": ""}
    for name, timing in interleaved(calls, args.repeats, args.device, args.budget).items():
        results[name].update(timing)
    for row in results.values():
        row["over_clip"] = row["median"] / results["clip"]["median"]
        row["over_alignzeg"] = row["median"] / results["alignzeg"]["median"]
    return {"size": args.size, "classes": args.num_classes, "models": results}


def names(args: argparse.Namespace) -> dict[str, Any]:
    """What each further class name costs the open-vocabulary models: their multiply-adds grow linearly with it."""
    images, few, more = sample_pixels(1, args.size, args.device, dtype_of(args)), 1, 5
    results = {}
    for name in OPEN_VOCABULARY:
        if args.quick and name == "sam3":
            continue
        contestant = build_contestant(name, args.tower, args.device)
        contestant.model.to(dtype_of(args))
        calls = {str(count): partial(contestant.call, images, count) for count in (few, more)}
        first, last = (giga_macs(contestant.model, call) for call in calls.values())
        timings = interleaved(calls, args.repeats, args.device, args.budget)
        results[name] = {
            "title": contestant.title,
            "note": contestant.note,
            **contestant.parameters(),
            "gmacs_first": first,
            "gmacs_per_class": (last - first) / (more - few),
            "timings": timings,
        }
        print(f"  {contestant.title}: {timings[str(few)]['median']:.3f} s", flush=True)
    return {"size": args.size, "models": results}


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of a forward pass, each model in a separate process."""
    results = {}
    for name in PEERS:
        results[name] = in_a_child(args, {"what": "forward", "model": name, "classes": args.num_classes})
    return {"size": args.size, "classes": args.num_classes, "models": results}


def sizes(args: argparse.Namespace) -> dict[str, Any]:
    model, floor = alignzeg_and_floor(args)
    prototypes, rows = prototypes_for(model, args.num_classes), {}
    for side in args.sizes:
        images = sample_pixels(1, side, args.device, dtype_of(args))
        calls = {
            "network": network(model, images, prototypes),
            "end_to_end": end_to_end(model, image_file(side), side, prototypes),
            "clip": lambda images=images: floor.call(images, args.num_classes),
        }
        rows[str(side)] = interleaved(calls, args.repeats, args.device, args.budget)
        rows[str(side)]["gmacs"] = round(giga_macs(model, calls["network"]), 2)
        print(f"  {side} px: {rows[str(side)]['network']['median']:.3f} s", flush=True)
    return {"classes": args.num_classes, "sizes": rows}


def classes(args: argparse.Namespace) -> dict[str, Any]:
    """Vocabularies of several sizes, from image file to label map of `label_size`, timed alternately."""
    model, floor = alignzeg_and_floor(args)
    images, file = sample_pixels(1, args.size, args.device, dtype_of(args)), image_file(args.label_size)
    calls: dict[str, Any] = {"clip": lambda: floor.call(images, 0)}
    for count in args.vocabularies:
        prototypes = prototypes_for(model, count)
        calls[f"network {count}"] = network(model, images, prototypes)
        calls[f"end_to_end {count}"] = end_to_end(model, file, args.size, prototypes, args.label_size)
    timings = interleaved(calls, args.repeats, args.device, args.budget)
    rows = {
        str(count): {
            "network": timings[f"network {count}"],
            "end_to_end": timings[f"end_to_end {count}"],
            "memory": in_a_child(args, {"what": "end_to_end", "model": "alignzeg", "classes": count}),
        }
        for count in args.vocabularies
    }
    first = rows[str(args.vocabularies[0])]
    for row in rows.values():
        row["over_first"] = row["end_to_end"]["median"] / first["end_to_end"]["median"]
        row["memory_over_first_mib"] = row["memory"]["peak_mib"] - first["memory"]["peak_mib"]
    return {"size": args.size, "label_size": args.label_size, "clip": timings["clip"], "vocabularies": rows}


def batches(args: argparse.Namespace) -> dict[str, Any]:
    """Every batch size runs the same number of images in a round, so that slow phases of the machine affect all equally."""
    model, floor = alignzeg_and_floor(args)
    prototypes, most = prototypes_for(model, args.num_classes), max(args.batches)
    calls: dict[str, Any] = {}
    for batch in args.batches:
        images = sample_pixels(batch, args.size, args.device, dtype_of(args))
        once = {"network": network(model, images, prototypes), "clip": partial(floor.call, images, args.num_classes)}
        for name, call in once.items():
            calls[f"{name} {batch}"] = partial(repeat, call, most // batch)
    timings, rows = interleaved(calls, args.repeats, args.device, args.budget), {}
    for batch in args.batches:
        row = {name: per_call(timings[f"{name} {batch}"], most // batch) for name in ("network", "clip")}
        rows[str(batch)] = {**row, "images_per_second": batch / row["network"]["median"]}
    return {"size": args.size, "classes": args.num_classes, "batches": rows}


def repeat(call: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        call()


def per_call(timing: dict[str, float], calls: int) -> dict[str, float]:
    return {name: value if name == "repeats" else value / calls for name, value in timing.items()}


def dtypes(args: argparse.Namespace) -> dict[str, Any]:
    """float32 against narrower weights and autocast, and the share of pixels that agree in the label map."""
    whole, images = build_alignzeg(args.tower).to(args.device), sample_pixels(1, args.size, args.device)
    prototypes, calls = prototypes_for(whole, args.num_classes), {}
    for name, dtype in DTYPES.items():
        model, floor = build_alignzeg(args.tower), build_contestant("clip", args.tower, args.device)
        floor.model.to(dtype)
        calls[name] = network(model.to(args.device, dtype), images.to(dtype), prototypes.to(dtype))
        calls[f"clip {name}"] = partial(floor.call, images.to(dtype), 0)

    def autocast() -> Any:
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            return whole(pixel_values=images, text_prototypes=prototypes)

    calls["autocast"] = autocast
    rows = interleaved(calls, args.repeats, args.device, args.budget)
    equal = equal_pixels(args)
    return {
        "size": args.size,
        "classes": args.num_classes,
        "timings": {name: rows[name] for name in ("float32", *equal, *(f"clip {name}" for name in DTYPES))},
        "speedup": {name: rows["float32"]["median"] / rows[name]["median"] for name in equal},
        "equal_pixels": equal,
    }


def equal_pixels(args: argparse.Namespace, scenes: int = 8) -> dict[str, float]:
    """Share of pixels that have the label of float32, with this repository's trained checkpoint, because random weights
    predict one class everywhere."""
    maps: dict[str, list[torch.Tensor]] = {name: [] for name in (*DTYPES, "autocast")}
    processor = AlignZegProcessor.from_pretrained(ROOT)
    for name, labels in maps.items():
        dtype = DTYPES.get(name, torch.float32)
        model = AlignZegModel.from_pretrained(ROOT, dtype=dtype).to(args.device).eval()
        for index in range(scenes):
            inputs = processor(images=sample_image(256, index), return_tensors="pt").to(args.device)
            inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
            with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=name == "autocast"):
                outputs = model(**inputs)
            labels += processor.post_process_semantic_segmentation(outputs, target_sizes=[(256, 256)])
    whole = torch.stack(maps.pop("float32"))
    return {name: (torch.stack(labels) == whole).double().mean().item() for name, labels in maps.items()}


def training(args: argparse.Namespace) -> dict[str, Any]:
    """The parts of one optimizer step, the forward pass without gradients, and memory by depth of CLIP."""
    model = build_alignzeg(args.tower, num_labels=args.num_classes).to(args.device).train()
    images = sample_pixels(1, args.size, args.device)
    labels = sample_labels(1, args.size, args.num_classes, args.device)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-4), lr=1e-4)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        synchronize(args.device)
        started = time.perf_counter()
        result = function()
        synchronize(args.device)
        seconds.setdefault(name, []).append(time.perf_counter() - started)
        return result

    losses = model._losses
    model._losses = lambda *values: timed("loss and matching", lambda: losses(*values))

    def step() -> None:
        loss = timed("forward and loss", lambda: model(pixel_values=images, **labels).loss)
        timed("backward", loss.backward)
        timed("optimizer", lambda: (torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0), optimizer.step()))
        optimizer.zero_grad()

    def forward() -> Any:
        return model(pixel_values=images)

    for round_number in range(max(3, args.repeats // 2) + 1):
        with torch.no_grad():
            timed("inference", forward)
        timed("step", step)
        if round_number == 0:
            seconds.clear()  # the first calls allocate memory
    medians = {name: torch.tensor(values, dtype=torch.float64).median().item() for name, values in seconds.items()}
    medians["forward"] = medians["forward and loss"] - medians["loss and matching"]
    shallow, deep = (
        in_a_child(args, {"what": "step", "model": "alignzeg", "extra_layers": extra, "classes": args.num_classes})
        for extra in (0, 6)
    )
    return {
        "size": args.size,
        "classes": args.num_classes,
        "repeats": len(seconds["step"]),
        "median": medians,
        "step_over_inference": medians["step"] / medians["inference"],
        "loss_share": medians["loss and matching"] / medians["step"],
        "memory": shallow,
        "memory_with_6_more_layers_below_the_split": deep,
    }


def loader(args: argparse.Namespace) -> dict[str, Any]:
    """Training samples of the embedded scenes per second: decode, scale, crop, flip, colour jitter, masks."""
    split, count = load_split("embedded_scenes"), 32 if args.quick else 256
    rows = load_benchmark("embedded_scenes", "train", num_scenes=count)
    dataset = SegmentationDataset(rows, split, TrainTransform(crop_size=args.size), training=True)
    processor = AlignZegImageProcessor()
    collator = Collator(processor, args.size)
    rates = {}
    for workers in (0, 2):
        batch_loader = torch.utils.data.DataLoader(dataset, 8, collate_fn=collator, num_workers=workers)
        started = time.perf_counter()
        seen = sum(len(batch["pixel_values"]) for batch in batch_loader)
        rates[str(workers)] = seen / (time.perf_counter() - started)
    return {"crop_size": args.size, "images_per_second_by_workers": rates}


def compiled(args: argparse.Namespace) -> dict[str, Any]:
    """`torch.compile` against eager; "frozen" reorders the weights, "dynamic" uses one graph for all image sizes."""
    model = build_alignzeg(args.tower).to(args.device, dtype_of(args)).requires_grad_(False)
    prototypes = prototypes_for(model, args.num_classes)
    images = sample_pixels(1, args.size, args.device, dtype_of(args))
    rows: dict[str, Any] = {}
    calls = {"eager": network(model, images, prototypes)}
    for name, options in COMPILE_OPTIONS.items():
        torch._dynamo.reset()
        fast = torch.compile(model, fullgraph=True, **options)
        calls[name] = network(fast, images, prototypes)
        started = time.perf_counter()
        calls[name]()
        rows[name] = {"first_call_seconds": time.perf_counter() - started}
        timing = interleaved({key: calls[key] for key in ("eager", name)}, args.repeats, args.device, args.budget)
        speedup = timing["eager"]["median"] / timing[name]["median"]
        rows[name] |= {"eager": timing["eager"], "compiled": timing[name], "speedup": speedup}
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    step = model.config.size_divisor
    for side in (args.size + 2 * step, args.size - 2 * step):
        network(fast, sample_pixels(1, side, args.device, dtype_of(args)), prototypes)()
    rows["dynamic"]["graphs_for_three_sizes"] = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs + 1
    torch._dynamo.reset()
    return {"size": args.size, "classes": args.num_classes, **rows}


SECTIONS = {
    "peers": peers,
    "names": names,
    "memory": memory,
    "sizes": sizes,
    "classes": classes,
    "batches": batches,
    "dtypes": dtypes,
    "training": training,
    "loader": loader,
    "text": text,
    "folder": folder,
    "onnx": onnx,
    "compile": compiled,
}
SLOW_SECTIONS = ("onnx", "compile")  # not with --quick
CONVOLUTIONAL_SECTIONS = ("sizes", "batches")  # the others compare with models on a ViT, or assume its layers


# --- memory, in a process of its own ---------------------------------------------------------------------------------


def in_a_child(args: argparse.Namespace, task: dict[str, Any]) -> dict[str, float]:
    """Peak memory of `task` in a new process, in MiB: the total including weights, and the increase by the call."""
    names = ("device", "tower", "dtype", "threads", "size", "label_size")
    flags = [f"--{name}={getattr(args, name)}" for name in names]
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *flags, "--child", json.dumps(task)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        return {"error": finished.stderr.strip().splitlines()[-1][:200], "peak_mib": float("nan")}
    return json.loads(finished.stdout.strip().splitlines()[-1])


def measure_memory(args: argparse.Namespace, task: dict[str, Any]) -> dict[str, float]:
    if task["what"] == "step":
        vision = dict(TOWERS[args.tower].get("vision_config", {}))
        depth, split = (12, 9) if args.tower == "ViT-B-16" else (24, 18)
        vision["num_hidden_layers"] = depth + task["extra_layers"]
        vision.setdefault("patch_size", 16)
        model = build_alignzeg(
            args.tower,
            vision_config=vision,
            clip_split_layer=split + task["extra_layers"],
            num_labels=task["classes"],
        )
        model.to(args.device).train()
        images = sample_pixels(1, args.size, args.device)
        labels = sample_labels(1, args.size, task["classes"], args.device)
        before = peak_memory(args.device)
        model(pixel_values=images, **labels).loss.backward()
    else:
        contestant = build_contestant(task["model"], args.tower, args.device)
        model = contestant.model.to(dtype_of(args))
        images = sample_pixels(1, args.size, args.device, dtype_of(args))
        with torch.no_grad():
            if task["what"] == "end_to_end":
                prototypes = prototypes_for(model, task["classes"])
                call = end_to_end(model, image_file(args.label_size), args.size, prototypes, args.label_size)
            else:
                call = lambda: contestant.call(images, task["classes"])
            before = peak_memory(args.device)
            call()
    peak = peak_memory(args.device)
    return {"peak_mib": peak / MIB, "weights_mib": before / MIB, "added_mib": (peak - before) / MIB}


def run_benchmark(args: argparse.Namespace) -> None:
    """Measures the sections in the options of scripts/benchmark.py, and writes the report after each."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.child:
        print(json.dumps(measure_memory(args, json.loads(args.child))))
        return
    if args.quick:
        quick = {"size": 224, "num_classes": 20, "sizes": [160, 224], "vocabularies": [20, 1000], "label_size": 320}
        vars(args).update(**quick, batches=[1, 2], repeats=2, budget=4.0, names=[50, 100], images=4)
    is_convolutional = AlignZegConfig(**TOWERS[args.tower]).is_convolutional
    possible = CONVOLUTIONAL_SECTIONS if is_convolutional else tuple(SECTIONS)
    chosen = args.sections or [name for name in possible if not (args.quick and name in SLOW_SECTIONS)]
    if unknown := [name for name in chosen if name not in possible]:
        raise ValueError(f"`--sections` contains {unknown[0]!r}; expected some of {', '.join(possible)}.")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"`--device` is {args.device}, but torch finds no GPU; use cpu.")
    output = args.output_dir or (ROOT / "runs" / "benchmark" if args.quick else ROOT / "docs" / "results")
    suffix = "" if args.tower == "ViT-B-16" else f"_{args.tower.lower().replace('-', '')}"
    stem = output / f"benchmark_{torch.device(args.device).type}{suffix}"
    report: dict[str, Any] = {"tower": args.tower, "sections": {}}
    if stem.with_suffix(".json").exists():
        report = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    for name in chosen:
        print(f"{name} …", flush=True)
        started = time.perf_counter()
        gradients = torch.enable_grad if name == "training" else torch.no_grad
        with gradients():
            found = SECTIONS[name](args)
        found["machine"], found["versions"] = describe_machine(args.device), library_versions()
        found["dtype"], found["seconds"] = args.dtype, round(time.perf_counter() - started, 1)
        merged = {**report["sections"], name: found}
        report["sections"] = {key: merged[key] for key in SECTIONS if key in merged}
        write(report, stem)
    print(markdown(report))
    print(f"Results: {stem}.json, .md, .png")
