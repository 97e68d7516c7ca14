# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Label maps for a whole dataset: sharded over processes and machines, resumable, and every image accounted for.

The images of a dataset are cut into shards of a fixed size, whose names do not depend on how many processes there
are. Each is written beside its place and renamed when it is complete, so a shard that exists is finished: whoever runs
the same command again, on any number of processes, redoes only what was under way. Processes never wait for each other
before the end.

```
run.json                          what was asked for; a resumed run must ask for the same
part-00000-00000012.parquet       or a folder of that name with PNG files and results.jsonl
source-00000.json                 streaming: how many shards file 0 of the dataset makes, once its end was reached
```
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from modeling_alignzeg import AlignZegModel, AlignZegOutput, AlignZegProcessor

from ..data.benchmarks import NAMED_BENCHMARKS, load_benchmark, open_any_dataset
from ..data.images import decode_image, label_picture, open_image
from ..files import atomic_file, atomic_folder, atomic_write_text, check_output
from ..launching import start_processes
from .evaluator import check_correction


FORMATS = ("parquet", "png")
RUN, RESULTS = "run.json", "results.jsonl"
FEATURES = datasets.Features(
    {
        "index": datasets.Value("int64"),  # position in the dataset, or in its file when streaming
        "name": datasets.Value("string"),  # file name without its ending, or the index if there is none
        "height": datasets.Value("int32"),
        "width": datasets.Value("int32"),
        "label_map": datasets.Image(),  # PNG; pixels are positions in the class names of run.json
        "class_ids": datasets.List(datasets.Value("int32")),  # classes that occur, ascending
        "coverage": datasets.List(datasets.Value("float32")),  # their shares of the pixels
        "unseen_score": datasets.Value("float32"),  # mean over the pixels of how unseen they look, 0 to 1
        "error": datasets.Value("string"),  # why there is no label map
    }
)


@dataclass(frozen=True)
class BulkSettings:
    """What to predict, and how.

    Attributes:
        dataset: A named benchmark, a hub id or a local folder; see `zeroshot.data.benchmarks.load_benchmark`.
        part: Part of it.
        root: Folder of a named benchmark's files.
        image_column: Column of images, where it is not a named benchmark.
        streaming: Read a hub id or folder from front to back without downloading or indexing it first. Its files are
            spread over the processes; where there are fewer files than processes, each reads all and keeps its share.
        limit: Use only the first N images.
        shard_size: Images in a shard: what is redone after a kill, at most, by each process.
        output_format: `"parquet"` or `"png"`.
        batch_size: Images in a forward pass.
        num_threads: Threads that read and encode images beside the model.
        gamma, threshold, none_of_these: As in `post_process_semantic_segmentation`.

    Raises:
        ValueError: A value is out of its range, or two contradict each other.
    """

    dataset: str
    part: str = "train"
    root: str | None = None
    image_column: str = "image"
    streaming: bool = False
    limit: int | None = None
    shard_size: int = 1000
    output_format: str = "parquet"
    batch_size: int = 8
    num_threads: int = 2
    gamma: float | None = None
    threshold: float | None = None
    none_of_these: bool = False

    def __post_init__(self) -> None:
        for name in ("limit", "shard_size", "batch_size", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}; expected a positive number.")
        check_correction(self.gamma, self.threshold)
        if self.output_format not in FORMATS:
            raise ValueError(f"`output_format` is {self.output_format!r}; expected {' or '.join(FORMATS)}.")
        if self.streaming and self.is_named:
            raise ValueError(f"`streaming` is on, but {self.dataset} is a folder on disk; leave it off.")

    @property
    def is_named(self) -> bool:
        return self.dataset in (*NAMED_BENCHMARKS, "embedded_scenes")


class Shard(NamedTuple):
    """Images `number * shard_size` and following of file `source` of a dataset; a dataset that is not streamed is one."""

    source: int
    number: int

    @property
    def name(self) -> str:
        return f"part-{self.source:05d}-{self.number:08d}"


class Vocabulary(NamedTuple):
    """Class names, those that count as unseen, and their text prototypes `(classes, D)` or `(classes, phrases, D)`."""

    names: list[str]
    unseen: list[str]
    prototypes: Tensor


def start_bulk() -> Accelerator:
    """The accelerator of a run in which the processes meet once, at the end, however late the last one comes."""
    return start_processes(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=90))])


def predict_dataset(
    model: AlignZegModel,
    processor: AlignZegProcessor,
    vocabulary: Vocabulary,
    settings: BulkSettings,
    output_dir: str | Path,
    accelerator: Accelerator,
) -> tuple[int, int]:
    """Predicts all shards of this process that are not finished yet.

    Returns:
        How many images the dataset has, and how many of them are broken, over all processes and earlier runs.

    Raises:
        ValueError: The dataset cannot be opened, or `output_dir` holds results of another model, vocabulary or dataset;
            the message says what differs.
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
                count, errors = _read_counts(output, shard, settings.output_format)
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


def open_images(settings: BulkSettings) -> datasets.Dataset | datasets.IterableDataset:
    """The images of a dataset, as bytes or paths in the column `image`; `name` is there for named benchmarks."""
    if settings.is_named:
        scenes = settings.limit if settings.dataset == "embedded_scenes" else None
        rows = load_benchmark(settings.dataset, settings.part, settings.root, num_scenes=scenes)
        rows = rows.select_columns(["image", "name"])
    else:
        rows = open_any_dataset(settings.dataset, settings.part, settings.streaming)
        present = rows.column_names
        if present is None:  # a stream says so with its first row
            present = list(next(iter(rows.decode(False)), {settings.image_column: None}))
        if settings.image_column not in present:
            raise ValueError(
                f"{settings.dataset!r} has no column {settings.image_column!r}; set `--image_column` to one of "
                f"{', '.join(present)}."
            )
        rows = rows.select_columns([settings.image_column])
    column = "image" if settings.is_named else settings.image_column
    try:
        rows = rows.cast_column(column, datasets.Image(decode=False))
        if settings.streaming:  # which casts with the first row
            next(iter(rows), None)
    except (pyarrow.ArrowException, TypeError) as error:
        raise ValueError(f"The column {column!r} of {settings.dataset!r} does not hold images. {error}") from error
    if column != "image":
        rows = rows.rename_column(
            column, "image"
        )  # after the cast: a stream decodes columns that were renamed before it
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
        return _path(output, shard, settings.output_format).exists()

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
        if marker.exists() and number >= _read_object(marker, "shards")["shards"]:
            continue
        # From the last finished one on, to learn where the end is; what lies before it is skipped.
        position = max(number - step, first)
        stream = rows.shard(num_shards=sources, index=source) if sources > 1 else rows
        stream = enumerate(stream.skip(position * size) if position else stream, position * size)
        while (head := next(stream, None)) is not None:
            shard_rows = chain([head], islice(stream, size - 1))
            shard, is_last_mine = Shard(source, position), (position - first) % step == 0
            if is_last_mine and position >= number:
                yield shard, None if is_finished(shard) else shard_rows
            deque(shard_rows, maxlen=0)  # what nobody took
            position += 1
        if position > first and is_last_mine:
            atomic_write_text(marker, json.dumps({"shards": position}) + "\n")


def _name(row: dict[str, Any], index: int) -> str:
    path = (row["image"] or {}).get("path")
    return row.get("name") or (Path(path).stem if path else f"{index:08d}")


def _open_row(row: dict[str, Any], name: str) -> Image.Image:
    value = row["image"]
    if value is None or (value["bytes"] is None and not value["path"]):
        raise ValueError(f"{name} is missing: the dataset holds nothing there.")
    if value["bytes"] is not None:
        return decode_image(value["bytes"], value["path"] or name)
    if "://" not in value["path"]:
        return open_image(value["path"])
    with datasets.utils.file_utils.xopen(value["path"], "rb") as file:
        return decode_image(file.read(), value["path"])


# --- prediction --------------------------------------------------------------------------------------------------


class Predictor:
    """Images in, rows of [`FEATURES`] out; reading and encoding overlap with the model."""

    def __init__(
        self,
        model: AlignZegModel,
        processor: AlignZegProcessor,
        vocabulary: Vocabulary,
        settings: BulkSettings,
        accelerator: Accelerator,
    ):
        self.model = model
        self.processor = processor
        self.names = vocabulary.names
        self.prototypes = vocabulary.prototypes
        self.seen = torch.tensor([name not in vocabulary.unseen for name in vocabulary.names], device=model.device)
        self.settings = settings
        self.accelerator = accelerator

    def predict(
        self, rows: Iterable[tuple[int, dict[str, Any]]], pool: ThreadPoolExecutor, bar: tqdm | None = None
    ) -> list[dict[str, Any]]:
        """Results in the order of `rows`, pairs of an index and a row. `pool` reads and encodes."""
        rows = iter(rows)
        waiting: deque[Future] = deque()
        encoded: list[Future] = []
        while True:
            while len(waiting) <= self.settings.num_threads and (part := list(islice(rows, self.settings.batch_size))):
                waiting.append(pool.submit(self.read, part))
            if not waiting:
                return [future.result() for future in encoded]
            results, sizes, inputs = waiting.popleft().result()
            maps = iter(self.read_out(self.forward(inputs), sizes) if sizes else [])
            for result in results:
                label, unseen = (None, None) if result["error"] is not None else next(maps)
                encoded.append(pool.submit(self.encode, result, label, unseen))
                if result["error"] is not None:
                    tqdm.write(f"Broken: {result['error']}")
            if bar is not None:
                bar.update(len(results))

    def read(self, rows: list[tuple[int, dict[str, Any]]]) -> tuple[list[dict[str, Any]], list[tuple[int, int]], Any]:
        """Results without label maps, the sizes of the images that could be read, and the model's inputs for those."""
        images, results = [], []
        for index, row in rows:
            result: dict[str, Any] = {**dict.fromkeys(FEATURES), "index": index, "name": _name(row, index)}
            try:
                image = _open_row(row, result["name"])
                images.append(image)
                result |= {"height": image.height, "width": image.width}
            except (ValueError, OSError) as error:
                result["error"] = str(error)
            results.append(result)
        inputs = self.processor(images=images, return_tensors="pt") if images else None
        return results, [(image.height, image.width) for image in images], inputs

    @torch.no_grad()
    def forward(self, inputs: Any) -> AlignZegOutput:
        """The model's outputs for the inputs of a batch."""
        with self.accelerator.autocast():
            return self.model(
                **inputs.to(self.model.device), text_prototypes=self.prototypes, seen_class_mask=self.seen
            )

    def read_out(self, outputs: AlignZegOutput, sizes: list[tuple[int, int]]) -> list[tuple[np.ndarray, float | None]]:
        """Label maps of the images' sizes, and their mean unseen scores."""
        maps, unseen = self.processor.post_process_semantic_segmentation(
            outputs,
            target_sizes=sizes,
            gamma=self.settings.gamma,
            threshold=self.settings.threshold,
            none_of_these=self.settings.none_of_these,
            return_unseen_scores=True,
        )
        means = [None] * len(maps) if unseen is None else [scores.mean().item() for scores in unseen]
        return [(label.cpu().numpy(), mean) for label, mean in zip(maps, means)]

    def encode(self, result: dict[str, Any], label: np.ndarray | None, unseen: float | None) -> dict[str, Any]:
        """A result with its label map as PNG, and what it says in numbers; as it is where there is none."""
        if label is None:
            return result
        class_ids, counts = np.unique(label[label >= 0], return_counts=True)
        buffer = io.BytesIO()
        label_picture(label, self.names).save(buffer, "PNG")
        return result | {
            "label_map": {"bytes": buffer.getvalue(), "path": f"{result['index']:09d}.png"},
            "class_ids": class_ids.tolist(),
            "coverage": (counts / label.size).tolist(),
            "unseen_score": unseen,
        }


# --- results on disk ---------------------------------------------------------------------------------------------


def _path(output: Path, shard: Shard, output_format: str) -> Path:
    return output / (f"{shard.name}.parquet" if output_format == "parquet" else shard.name)


def write_shard(output: Path, shard: Shard, output_format: str, results: list[dict[str, Any]]) -> None:
    """Writes a shard atomically."""
    path = _path(output, shard, output_format)
    if output_format == "parquet":
        table = pyarrow.Table.from_pylist(results, schema=FEATURES.arrow_schema)
        with atomic_file(path) as partial:
            pyarrow.parquet.write_table(table, partial)
        return
    with atomic_folder(path) as partial:
        lines = []
        for result in results:
            picture = result["label_map"]
            if picture is not None:
                (partial / picture["path"]).write_bytes(picture["bytes"])
                picture = picture["path"]
            lines.append(json.dumps(result | {"label_map": picture}, ensure_ascii=False) + "\n")
        (partial / RESULTS).write_text("".join(lines), encoding="utf-8")


def _read_counts(output: Path, shard: Shard, output_format: str) -> tuple[int, int]:
    """Images and broken ones of a finished shard."""
    path = _path(output, shard, output_format)
    try:
        if output_format == "parquet":
            errors = pyarrow.parquet.read_table(path, columns=["error"])["error"]
            return len(errors), len(errors) - errors.null_count
        lines = (path / RESULTS).read_text(encoding="utf-8").splitlines()
        return len(lines), sum(json.loads(line)["error"] is not None for line in lines)
    except (OSError, ValueError, TypeError, KeyError) as error:  # of pyarrow and json too
        raise ValueError(
            f"The finished shard {path} cannot be read ({error!r}); delete it to have it made again."
        ) from error


def _describe(
    model: AlignZegModel, processor: AlignZegProcessor, vocabulary: Vocabulary, settings: BulkSettings, rows
) -> dict[str, Any]:
    """What a resumed run must have in common with the first one, as JSON."""
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


def _read_object(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON file that this program wrote."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.keys() >= set(keys):
            return values
    except ValueError:
        pass
    raise ValueError(f"{path} is damaged: put an intact copy back, or choose another `--output_dir`.")


def _begin(output: Path, run: dict[str, Any], accelerator: Accelerator) -> None:
    """Writes what this run does, or checks that it goes on with what is there."""
    path = output / RUN
    # The first process, and where machines do not share a disk the first of each.
    for is_writer in (accelerator.is_main_process, accelerator.is_local_main_process):
        if is_writer and not path.exists():
            atomic_write_text(path, json.dumps(run, indent=2, ensure_ascii=False) + "\n")
        accelerator.wait_for_everyone()
    earlier = _read_object(path)
    different = [name for name in run | earlier if run.get(name) != earlier.get(name)]
    if different:
        changes = "; ".join(
            f"`{name}` was {_short(earlier.get(name))} and is {_short(run.get(name))}" for name in different
        )
        raise ValueError(f"{output} holds results of another run: {changes}. Choose another `--output_dir`.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
