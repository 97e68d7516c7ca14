# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Label maps for a whole dataset: sharded over processes and machines, resumable, with a result for every image.

The images of a dataset are divided into shards of a fixed size, whose names do not depend on the number of processes.
Each shard is written under a temporary name and renamed when it is complete, so an existing shard is finished. Running
the same command again, on any number of processes, repeats only unfinished shards. Processes do not wait for each other
before the end. predictor.py predicts the images of a shard, shards.py writes its files.

```
run.json                          the settings; a resumed run must have the same
part-00000-00000012.parquet       or a folder of that name with PNG files and results.jsonl
source-00000.json                 streaming: the number of shards of file 0 of the dataset, once known
```
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from tqdm.auto import tqdm

from modeling_alignzeg import AlignZegModel, AlignZegProcessor

from ..data.benchmarks import load_benchmark, open_any_dataset
from ..data.folders import FolderLayout, has_label_folder, is_plain_folder, pair_files
from ..files import atomic_write_text, check_output
from ..launching import start_processes
from .options import Vocabulary
from .predictor import BulkSettings, Predictor
from .shards import Shard, read_counts, read_object, shard_path, write_shard


RUN = "run.json"


def start_bulk() -> Accelerator:
    """The accelerator of a run in which processes synchronize only at the end, with a timeout of 90 days."""
    return start_processes(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=90))])


def predict_dataset(
    model: AlignZegModel,
    processor: AlignZegProcessor,
    vocabulary: Vocabulary,
    settings: BulkSettings,
    output_dir: str | Path,
    accelerator: Accelerator,
) -> tuple[int, int]:
    """Predicts all unfinished shards of this process.

    Returns:
        Numbers of images and of broken images in the dataset, over all processes and earlier runs.

    Raises:
        ValueError: The dataset cannot be opened, or `output_dir` contains results of another model, vocabulary or dataset;
            the message gives the difference.
    """
    output = Path(output_dir)
    check_output(output / RUN)
    with accelerator.local_main_process_first():  # it fills the cache for the others
        rows = open_images(settings)
    _begin(output, _describe(model, processor, vocabulary, settings, rows), accelerator)
    rank, world = accelerator.process_index, accelerator.num_processes
    predictor = Predictor(model, processor, vocabulary, settings, accelerator)
    images = broken = 0
    started = time.time()
    with (
        ThreadPoolExecutor(settings.num_threads) as pool,
        tqdm(desc="segment", unit="image", disable=not accelerator.is_local_main_process) as bar,
    ):
        for shard, shard_rows in _shards(rows, settings, output, rank, world):
            if shard_rows is None:
                count, errors = read_counts(output, shard, settings.output_format)
            else:
                results = predictor.predict(shard_rows, pool, bar)
                write_shard(output, shard, settings.output_format, results)
                count, errors = len(results), sum(result["error"] is not None for result in results)
            images, broken = images + count, broken + errors
    counts = gather_object([(images, broken)])
    images, broken = map(sum, zip(*counts))
    if not images:
        raise ValueError(f"The part {settings.part!r} of {settings.dataset!r} is empty.")
    accelerator.print(f"{time.time() - started:.0f} s on {world} process(es)")
    return images, broken


# --- the dataset ------------------------------------------------------------------------------------------------


def _labelled_images(folder: str, part: str) -> dict[str, Path] | None:
    """The images of a folder of images and label maps by name, without the label maps; `None` if it is not such a folder."""
    root, layout = Path(folder), FolderLayout()
    if not is_plain_folder(root):
        return None
    try:
        return {name: image for name, (image, _) in pair_files(root, part, layout).items()}
    except FileNotFoundError:
        return None
    except ValueError:
        if has_label_folder(root, part, layout):
            raise
        return None


def open_images(settings: BulkSettings) -> datasets.Dataset | datasets.IterableDataset:
    """The images of a dataset, as bytes or paths in the column `image`; named benchmarks also have `name`."""
    column = settings.image_column
    if settings.is_named:
        scenes = settings.limit if settings.dataset == "embedded_scenes" else None
        rows = load_benchmark(settings.dataset, settings.part, settings.root, num_scenes=scenes)
        rows, column = rows.select_columns(["image", "name"]), "image"
    elif (files := _labelled_images(settings.dataset, settings.part)) is not None:
        table = {"image": [str(file) for file in files.values()], "name": list(files)}
        rows, column = datasets.Dataset.from_dict(table), "image"
        rows = rows.to_iterable_dataset() if settings.streaming else rows
    else:
        rows = open_any_dataset(settings.dataset, settings.part, settings.streaming)
        present = rows.column_names
        if present is None:  # a stream gets its columns from the first row
            present = list(next(iter(rows.decode(False)), {column: None}))
        if column not in present:
            raise ValueError(
                f"{settings.dataset!r} has no column {column!r}; set `--image_column` to one of {', '.join(present)}."
            )
        rows = rows.select_columns([column])
    try:
        rows = rows.cast_column(column, datasets.Image(decode=False))
        if settings.streaming:  # it casts at the first row
            next(iter(rows), None)
    except (pyarrow.ArrowException, TypeError) as error:
        raise ValueError(f"The column {column!r} of {settings.dataset!r} does not contain images. {error}") from error
    if column != "image":
        rows = rows.rename_column(
            column, "image"
        )  # after the cast: a stream would decode columns that were renamed before it
    if settings.limit is not None:
        rows = rows.take(settings.limit)
    if not settings.streaming and not len(rows):
        raise ValueError(f"The part {settings.part!r} of {settings.dataset!r} is empty.")
    return rows


def _shards(
    rows: datasets.Dataset | datasets.IterableDataset, settings: BulkSettings, output: Path, rank: int, world: int
) -> Iterator[tuple[Shard, Iterable[tuple[int, dict[str, Any]]] | None]]:
    """The shards of process `rank`, each with its images and their indices, or `None` if it is finished."""
    size = settings.shard_size

    def is_finished(shard: Shard) -> bool:
        return shard_path(output, shard, settings.output_format).exists()

    if not settings.streaming:
        for number in range(rank, -(-len(rows) // size), world):
            shard, start = Shard(0, number), number * size
            images = enumerate(rows.select(range(start, min(start + size, len(rows)))), start)
            yield shard, None if is_finished(shard) else images
        return

    sources = 1 if settings.limit is not None else rows.num_shards
    for source in range(sources):
        if sources >= world and source % world != rank:
            continue
        first, step = (0, 1) if sources >= world else ((rank - source) % world, world)
        number = first
        while is_finished(Shard(source, number)):
            yield Shard(source, number), None
            number += step
        marker = output / f"source-{source:05d}.json"
        if marker.exists() and number >= read_object(marker, "shards")["shards"]:
            continue
        # Starts at the last finished shard, to find the end of the file.
        position = max(number - step, first)
        stream = rows.shard(num_shards=sources, index=source) if sources > 1 else rows
        stream = enumerate(stream.skip(position * size) if position else stream, position * size)
        while (head := next(stream, None)) is not None:
            shard_rows = chain([head], islice(stream, size - 1))
            shard, is_last_mine = Shard(source, position), (position - first) % step == 0
            if is_last_mine and position >= number:
                yield shard, None if is_finished(shard) else shard_rows
            deque(shard_rows, maxlen=0)  # consumes the remaining rows
            position += 1
        if position > first and is_last_mine:
            atomic_write_text(marker, json.dumps({"shards": position}) + "\n")


def _describe(
    model: AlignZegModel, processor: AlignZegProcessor, vocabulary: Vocabulary, settings: BulkSettings, rows
) -> dict[str, Any]:
    """Settings that a resumed run must share with the first one, as JSON."""
    ways_to_run = ("batch_size", "num_threads", "root")
    prototypes = hashlib.sha256(vocabulary.prototypes.float().cpu().numpy().tobytes()).hexdigest()
    return {
        **{name: value for name, value in asdict(settings).items() if name not in ways_to_run},
        "files" if settings.streaming else "images": rows.num_shards if settings.streaming else len(rows),
        "classes": vocabulary.names,
        "unseen": vocabulary.unseen,
        "gamma": processor.image_processor.correction_gamma if settings.gamma is None else settings.gamma,
        "threshold": processor.image_processor.correction_threshold
        if settings.threshold is None
        else settings.threshold,
        "image_processor": json.loads(processor.image_processor.to_json_string()),
        "text_prototypes_sha256": prototypes,
        "weights_sha256": _weights_hash(model),
    }


def _weights_hash(model: AlignZegModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name not in ("class_text_embeds", "seen_class_mask"):  # the checkpoint's own vocabulary is not used
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _begin(output: Path, run: dict[str, Any], accelerator: Accelerator) -> None:
    """Writes the settings of this run, or checks that they match an earlier run."""
    path = output / RUN
    # The first process, or the first of each machine if they do not share a disk.
    for is_writer in (accelerator.is_main_process, accelerator.is_local_main_process):
        if is_writer and not path.exists():
            atomic_write_text(path, json.dumps(run, indent=2, ensure_ascii=False) + "\n")
        accelerator.wait_for_everyone()
    earlier = read_object(path)
    different = [name for name in run | earlier if run.get(name) != earlier.get(name)]
    if different:
        changes = "; ".join(
            f"`{name}` was {_short(earlier.get(name))} and is {_short(run.get(name))}" for name in different
        )
        raise ValueError(f"{output} contains results of another run: {changes}. Choose another `--output_dir`.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
