# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Lists and verifies the files of a training checkpoint."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path, PurePosixPath
from typing import Any


FORMAT = 1
MANIFEST, PROGRESS = "manifest.json", "progress.json"
MODEL, TRAINING, RNG = "model.safetensors", "training.safetensors", "rng-{:05d}.safetensors"
STEP_FOLDER = re.compile(r"step-(\d{8,})")


def step_of(path: Path) -> int:
    match = STEP_FOLDER.fullmatch(path.name)
    return int(match[1]) if match else -1


def missing_files(files: dict[str, Any], processes: int) -> set[str]:
    ranks = min(processes, len(files))  # the number may come from a damaged file
    return {PROGRESS, MODEL, TRAINING, *map(RNG.format, range(ranks))} - files.keys()


def progress_text(progress: dict[str, Any]) -> str:
    for key in ("step", "epoch", "batch"):
        if type(progress.get(key)) is not int or progress[key] < 0:
            raise ValueError(f"`progress` has {key!r} = {progress.get(key)!r}; expected a whole number ≥ 0.")
    try:
        return json.dumps(progress, indent=2)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`progress` contains a value that JSON does not support: {error}.") from None


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def problem_of(path: Path, hashes: bool = True) -> str | None:
    """The first problem of a checkpoint, as the end of a sentence; `None` if it is intact."""
    name = MANIFEST
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} has format {manifest['format']}, but this version reads format {FORMAT}"
        if STEP_FOLDER.fullmatch(path.name) and manifest["step"] != step_of(path):
            return f"{MANIFEST} belongs to step {manifest['step']}"
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        missing = missing_files(files, manifest["processes"])
        if missing:
            return f"{MANIFEST} does not list {', '.join(sorted(missing))}"
        for name, (size, sha256) in files.items():
            relative = PurePosixPath(name)
            if relative.is_absolute() or ".." in relative.parts or "\\" in name:
                return f"{MANIFEST} lists {name!r}, which is outside the folder"
            found = (path / relative).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if hashes and sha256_of(path / relative) != sha256:
                return f"{name} has changed since it was written (its SHA-256 differs)"
        name = PROGRESS
        progress = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        progress_text(progress)
        if progress["step"] != manifest["step"]:
            return f"{PROGRESS} belongs to step {progress['step']}"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"{name} does not have the expected format ({type(error).__name__}: {error})"
    return None
