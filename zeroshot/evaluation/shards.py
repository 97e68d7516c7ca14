# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Files of bulk prediction: shards of label maps, as Parquet or as folders of PNG files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow
import pyarrow.parquet

from ..files import atomic_file, atomic_folder


FORMATS = ("parquet", "png")
RESULTS = "results.jsonl"
FEATURES = datasets.Features(
    {
        "index": datasets.Value("int64"),  # position in the dataset, or in its file when streaming
        "name": datasets.Value("string"),  # file name without extension, or the index if there is none
        "height": datasets.Value("int32"),
        "width": datasets.Value("int32"),
        "label_map": datasets.Image(),  # PNG; pixels are positions in the class names of run.json
        "class_ids": datasets.List(datasets.Value("int32")),  # classes that occur, ascending
        "coverage": datasets.List(datasets.Value("float32")),  # their shares of the pixels
        "unseen_score": datasets.Value("float32"),  # mean unseen score of the pixels, 0 to 1
        "error": datasets.Value("string"),  # reason for a missing label map
    }
)


class Shard(NamedTuple):
    """Images from position `number * shard_size` in file `source` of a dataset; `source` is 0 without streaming."""

    source: int
    number: int

    @property
    def name(self) -> str:
        return f"part-{self.source:05d}-{self.number:08d}"


def shard_path(output: Path, shard: Shard, output_format: str) -> Path:
    return output / (f"{shard.name}.parquet" if output_format == "parquet" else shard.name)


def write_shard(output: Path, shard: Shard, output_format: str, results: list[dict[str, Any]]) -> None:
    """Writes a shard atomically."""
    path = shard_path(output, shard, output_format)
    if output_format == "parquet":
        table = pyarrow.Table.from_pylist(results, schema=FEATURES.arrow_schema)
        with atomic_file(path) as partial:
            pyarrow.parquet.write_table(table, partial)
        return
    with atomic_folder(path) as partial:
        lines = []
        for result, name in zip(results, picture_names(results)):
            picture = None
            if result["label_map"] is not None:
                picture = name
                (partial / picture).write_bytes(result["label_map"]["bytes"])
            lines.append(json.dumps(result | {"label_map": picture}, ensure_ascii=False) + "\n")
        (partial / RESULTS).write_text("".join(lines), encoding="utf-8")


def picture_names(results: list[dict[str, Any]]) -> list[str]:
    """File names of the label maps of a shard: the names of the images. Equal ones are prefixed with their indices."""
    names = [result["name"].replace("/", "_").replace("\\", "_") for result in results]
    names = [name.encode(errors="replace")[:200].decode(errors="ignore") for name in names]
    uses = Counter(name.casefold() for name in names)  # some file systems ignore case
    return [
        f"{name}.png" if uses[name.casefold()] == 1 else f"{result['index']:09d}_{name}.png"
        for result, name in zip(results, names)
    ]


def read_counts(output: Path, shard: Shard, output_format: str) -> tuple[int, int]:
    """Numbers of images and of broken images in a finished shard."""
    path = shard_path(output, shard, output_format)
    try:
        if output_format == "parquet":
            errors = pyarrow.parquet.read_table(path, columns=["error"])["error"]
            return len(errors), len(errors) - errors.null_count
        lines = (path / RESULTS).read_text(encoding="utf-8").splitlines()
        return len(lines), sum(json.loads(line)["error"] is not None for line in lines)
    except (OSError, ValueError, TypeError, KeyError) as error:  # includes errors of pyarrow and json
        raise ValueError(
            f"The finished shard {path} cannot be read ({error!r}); delete it to create it again."
        ) from error


def read_object(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON file that this program wrote."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.keys() >= set(keys):
            return values
    except ValueError:
        pass
    raise ValueError(f"{path} is damaged: restore an intact copy, or choose another `--output_dir`.")
