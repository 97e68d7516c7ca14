# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Which files a training checkpoint has, and what is wrong with one."""

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


def missing_files(files: dict[str, Any], processes: int, sharded: bool) -> set[str]:
    needed = {PROGRESS} if sharded else {PROGRESS, MODEL, TRAINING}
    ranks = min(processes, len(files))  # the number may come from a damaged file
    return needed.union(map(RNG.format, range(ranks))) - files.keys()


def progress_text(progress: dict[str, Any]) -> str:
    for key in ("step", "epoch", "batch"):
        if type(progress.get(key)) is not int or progress[key] < 0:
            raise ValueError(f"`progress` needs {key!r}, a whole number ≥ 0, and has {progress.get(key)!r}.")
    try:
        return json.dumps(progress, indent=2)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`progress` is written as JSON and holds what JSON cannot: {error}.") from None


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def problem_of(path: Path, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, as the end of a sentence; `None` if nothing is."""
    name = MANIFEST
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} is of format {manifest['format']}, and this version reads format {FORMAT}"
        if STEP_FOLDER.fullmatch(path.name) and manifest["step"] != step_of(path):
            return f"{MANIFEST} is that of step {manifest['step']}"
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        missing = missing_files(files, manifest["processes"], manifest["sharded"])
        if missing:
            return f"{MANIFEST} does not list {', '.join(sorted(missing))}"
        for name, (size, sha256) in files.items():
            relative = PurePosixPath(name)
            if relative.is_absolute() or ".." in relative.parts or "\\" in name:
                return f"{MANIFEST} names {name!r}, which is outside the folder"
            found = (path / relative).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if hashes and sha256_of(path / relative) != sha256:
                return f"{name} has changed since it was written (its SHA-256 differs)"
        name = PROGRESS
        progress = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        progress_text(progress)
        if progress["step"] != manifest["step"]:
            return f"{PROGRESS} is that of step {progress['step']}"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"{name} is not what this program writes ({type(error).__name__}: {error})"
    return None
