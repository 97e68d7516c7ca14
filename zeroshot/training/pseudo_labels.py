# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The transductive setting: self-training, as SPNet's and ZegCLIP's papers report it beside the inductive one.

Names of the unseen classes are known in training, their labels are not. The checkpoint from which the training starts
labels the pixels that the training could not use, as one of the unseen classes or not at all; these pseudo-labels and the
labels of the seen classes are then trained on together.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from modeling_alignzeg import AlignZegImageProcessor, AlignZegModel, AlignZegProcessor
from modeling_alignzeg.readout_alignzeg import class_probabilities, class_scores, image_view

from ..data.dataset import SegmentationDataset
from ..data.images import label_picture
from ..data.splits import SegmentationSplit
from ..data.task import Task
from ..files import atomic_file, atomic_write_text
from ..settings import Settings


FOLDER, FACTS = "pseudo_labels", "settings.json"


def check_transductive(settings: Settings, split: SegmentationSplit) -> None:
    """Whether these settings have what the transductive setting needs.

    Raises:
        ValueError: A checkpoint to start from is missing, no class is unseen, or all are labelled.
    """
    if settings.model.checkpoint is None:
        raise ValueError(
            "`data.transductive` is on, but `model.checkpoint` is missing: name a checkpoint trained on the seen classes, "
            "which labels pixels of the unseen ones."
        )
    if settings.data.fully_supervised:
        raise ValueError("`data.transductive` and `data.fully_supervised` are both on; leave one of them off.")
    if not split.unseen:
        raise ValueError(f"`data.transductive` is on, but {split.name!r} has no unseen class; leave it off.")


def unseen_pseudo_labels(
    model: AlignZegModel,
    image_processor: AlignZegImageProcessor,
    image: np.ndarray,
    text_prototypes: Tensor,
    threshold: float,
) -> np.ndarray:
    """Which unseen class the model sees at each pixel, if any.

    A pixel's scores of the unseen classes and of the model's background, which stands for none of them, are divided by
    their sum. The highest of an unseen class is its label if it exceeds `threshold`.

    Args:
        image: `uint8 (height, width, 3)`, RGB.
        text_prototypes: `(U, D)`, of the unseen classes alone.
        threshold: From 0 to 1.

    Returns:
        `int64 (height, width)`, positions in `text_prototypes`, or -1.
    """
    inputs = image_processor(image, return_tensors="pt").to(model.device)
    outputs = model(**inputs, text_prototypes=text_prototypes)
    probabilities = class_probabilities(outputs.class_queries_logits[0])
    view = image_view(outputs, 0, probabilities, (image.shape[0], image.shape[1]), image_processor.dense_weight)
    scores = class_scores(view, probabilities.new_zeros(probabilities.shape[1]))  # (unseen classes + 1, height, width)
    best, label = (scores[:-1] / scores.sum(0).clamp(min=1e-12)).max(0)
    return torch.where(best > threshold, label, -1).cpu().numpy()


@torch.no_grad()
def pseudo_labelled(
    accelerator: Accelerator, model: AlignZegModel, processor: AlignZegProcessor, task: Task, settings: Settings
) -> tuple[datasets.Dataset, SegmentationSplit]:
    """The training part with pseudo-labels of the unseen classes where its label maps were unlabelled or hidden.

    Label maps are written to `pseudo_labels` in the folder of the run, each process its share; those that an interrupted
    run has written are kept.

    Args:
        accelerator: Of the training.
        model: The checkpoint to start from, on its device.
        processor: Its processor.
        task: Of the training; its label maps are read as training sees them, without those of unseen classes.
        settings: Of the training.

    Returns:
        The rows of the part, and the split that reads them, in which no class is unseen.

    Raises:
        ValueError: The folder holds pseudo-labels of another checkpoint, threshold or dataset.
    """
    split, threshold = task.split, settings.data.transductive_threshold
    folder = Path(settings.output_dir) / FOLDER
    facts = {
        "model.checkpoint": settings.model.checkpoint,
        "data.dataset": settings.data.dataset,
        "data.train_part": settings.data.train_part,
        "data.transductive_threshold": threshold,
        "images": len(task.train),
        "classes": list(split.classes),
        "unseen": list(split.unseen),
    }
    earlier = json.loads((folder / FACTS).read_text(encoding="utf-8")) if (folder / FACTS).is_file() else facts
    accelerator.wait_for_everyone()  # all have read what the main process may now write
    for name, value in facts.items():
        if earlier.get(name) != value:
            raise ValueError(f"{folder} was written with another `{name}`; choose another `output_dir`, or remove it.")
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / FACTS, json.dumps(facts, indent=2) + "\n")

    samples = SegmentationDataset(task.train, task.training_split, training=True)
    files = [folder / f"{index:08d}.png" for index in range(len(samples))]
    prototypes = model.get_text_prototypes(processor, list(split.unseen))
    class_ids, unseen_ids = np.array(split.seen_ids), np.array(split.unseen_ids)
    was_training = model.training
    model.eval()
    share = range(accelerator.process_index, len(samples), accelerator.num_processes)
    for index in tqdm(share, "pseudo-labels", leave=False, disable=not accelerator.is_local_main_process):
        if files[index].is_file():
            continue
        sample = samples[index]
        found = unseen_pseudo_labels(model, processor.image_processor, sample["image"], prototypes, threshold)
        label, known = np.where(found >= 0, unseen_ids[found], -1), sample["label"] != split.ignore_index
        label[known] = class_ids[sample["label"][known]]
        with atomic_file(files[index]) as partial:
            label_picture(label, split.classes).save(partial)
    model.train(was_training)
    accelerator.wait_for_everyone()

    ids = {index: index for index in range(len(split.classes))}
    none = 65535 if len(split.classes) > 255 else 255  # as `label_picture` writes them
    rows = task.train.remove_columns("label").add_column("label", list(map(str, files)))
    rows = rows.cast_column("label", datasets.Image())
    return rows, replace(split, unseen=(), raw_id_to_class={**ids, none: split.ignore_index}, palette={})
