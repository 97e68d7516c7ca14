# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The section of the speed benchmark that compares torch with exported models."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_alignzeg import AlignZegImageProcessor, AlignZegModel

from ..checkpoints import load_checkpoint
from ..onnx_folder import Weights, label_map_graph, write_graph
from .speed import build_alignzeg, interleaved, random_prototypes, sample_image


ROOT = Path(__file__).resolve().parents[2]
WEIGHTS: tuple[Weights, ...] = ("float32", "int8")


LabelMaps = Callable[[np.ndarray], np.ndarray]  # from an image, uint8 (height, width, 3), to class ids (height, width)


def torch_label_maps(
    model: AlignZegModel, image_processor: AlignZegImageProcessor, prototypes: torch.Tensor, seen: torch.Tensor
) -> LabelMaps:
    """`model` with its pre- and post-processing, in the precision of its weights."""

    def in_torch(image: np.ndarray) -> np.ndarray:
        inputs = image_processor(images=image, return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        outputs = model(**inputs, text_prototypes=prototypes.to(model.dtype), seen_class_mask=seen)
        size = (image.shape[0], image.shape[1])
        return np.asarray(image_processor.post_process_semantic_segmentation(outputs, target_sizes=[size])[0])

    return in_torch


def label_maps(
    model: AlignZegModel, image_processor: AlignZegImageProcessor, prototypes: torch.Tensor, seen: torch.Tensor
) -> tuple[dict[str, LabelMaps], dict[str, float]]:
    """The same in torch and in onnxruntime with as many threads, and the sizes of the ONNX files in MB."""
    import onnxruntime

    calls: dict[str, LabelMaps] = {"torch": torch_label_maps(model, image_processor, prototypes, seen)}
    megabytes: dict[str, float] = {}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    graph = label_map_graph(model, image_processor)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.onnx"
        for name in WEIGHTS:
            write_graph(graph, path, name)
            megabytes[name] = path.stat().st_size / 1e6
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

            def in_onnxruntime(image: np.ndarray, session=session) -> np.ndarray:
                feeds = {"image": image[None], "text_prototypes": prototypes.numpy(), "seen_class_mask": seen.numpy()}
                return session.run(None, feeds)[0][0]

            calls[name] = in_onnxruntime
    return calls, megabytes


def onnx(args: argparse.Namespace) -> dict[str, Any]:
    """From pixels to the label map, and the share of pixels that keep their label, with this repository's checkpoint,
    because random weights predict one class everywhere. Always on the CPU in float32."""
    model = build_alignzeg(args.tower)
    processor = AlignZegImageProcessor(size={"shortest_edge": args.size}, size_divisor=model.config.size_divisor)
    prototypes = random_prototypes(args.num_classes, model.config.projection_dim)
    functions, megabytes = label_maps(model, processor, prototypes, torch.ones(args.num_classes, dtype=torch.bool))
    image = np.asarray(sample_image(args.size))
    calls: dict[str, Callable[[], Any]] = {name: partial(each, image) for name, each in functions.items()}
    timings = interleaved(calls, args.repeats, "cpu", args.budget)

    trained, trained_processor = load_checkpoint(ROOT)
    every = torch.ones(trained.config.num_labels, dtype=torch.bool)
    functions, _ = label_maps(trained, trained_processor.image_processor, trained.class_text_embeds, every)
    images = [np.asarray(sample_image(256, index)) for index in range(8)]
    maps = {name: np.stack([function(image) for image in images]) for name, function in functions.items()}
    return {
        "size": args.size,
        "classes": args.num_classes,
        "timings": timings,
        "speedup": {name: timings["torch"]["median"] / timings[name]["median"] for name in megabytes},
        "megabytes": megabytes,
        "equal_pixels": {name: float((maps[name] == maps["torch"]).mean()) for name in megabytes},
    }
