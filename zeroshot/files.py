# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Reading user-supplied text files, and writing files and folders atomically.

Files and folders are written under a temporary name in the same place and renamed when complete.
"""

from __future__ import annotations

import os
import reprlib
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml


PARTIAL = ".partial"
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, 120, 120
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = 10


def shown(value: Any) -> str:
    """`repr` of a value for messages, shortened because a few lines of YAML can expand to gigabytes."""
    return _REPR.repr(value)


def read_text(path: str | Path) -> str:
    """The contents of a UTF-8 file.

    Raises:
        ValueError: It cannot be read, or is not UTF-8 text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """Raises an error if a mapping has a duplicate key; YAML would silently keep the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := sorted({shown(key) for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} occurs more than once", node.start_mark)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, source: str | Path) -> Any:
    """Parses YAML from `source`, a file or an option.

    Raises:
        ValueError: It is not YAML, or a mapping has a duplicate key.
    """
    try:
        return yaml.load(text, _UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: dates that do not exist
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{source} is not valid YAML: {reason}") from error


def atomic_write_text(path: str | Path, text: str) -> None:
    """Writes `text` (UTF-8) to `path` atomically: the file always has its old content or the new one."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def check_output(path: str | Path) -> Path:
    """Checks that `path` can be written and returns it with links resolved; call it before computing the contents.

    Raises:
        ValueError: `path` is a folder or a device, or its folder cannot be written to.
    """
    place = Path(os.path.realpath(path))
    if place.exists() and not place.is_file():
        what = "a folder" if place.is_dir() else "not a regular file"
        raise ValueError(f"{path} is {what}, but a file is to be written there: choose another name.")
    folder = next(folder for folder in place.parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        reason = "is not writable" if folder.is_dir() else "is a file, not a folder"
        raise ValueError(f"{path} cannot be written: {folder} {reason}. Choose another place.")
    return place


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary file name with the same suffix in the same folder; the file is renamed to `path` at the end.

    After an exception inside the block, `path` is unchanged. If it is a symbolic link, its target is written.

    Raises:
        ValueError: As [`check_output`].
    """
    path = check_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # File names have a maximum length, and threads may write long names that begin alike.
    short = path.stem if len(path.stem) <= 50 else f"{path.stem[:40]}-{zlib.crc32(os.fsencode(path.stem)):08x}"
    partial = path.with_name(f".{short}{PARTIAL}{path.suffix}")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def remove_partial_files(folder: Path) -> None:
    """Removes the temporary files that a killed process has left in `folder`, which no other process may be writing to."""
    for partial in folder.glob(f".*{PARTIAL}*"):
        if partial.is_file():
            partial.unlink()


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty folder next to `path`; at the end it replaces `path` *and everything in it*.

    After an exception inside the block, or if the process is killed, `path` is unchanged. POSIX cannot exchange two
    folders in one step: if the process is killed between the two renames, the old folder remains as `.name.replaced`, and
    the next call restores it first.

    Raises:
        ValueError: If `path` contains the working directory or the home directory, or is a file.
    """
    path = Path(path).resolve()
    if any(place.resolve().is_relative_to(path) for place in (Path.cwd(), Path(os.path.expanduser("~")))):
        raise ValueError(f"{path} would be replaced with everything in it: choose a new folder inside it instead.")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, but a folder is to be written there: remove it or choose another name.")
    partial = begin_folder(path)
    try:
        yield partial
        for file in sorted(partial.rglob("*")):
            sync(file)
        finish_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on disk."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}")


def recover_folder(path: Path) -> None:
    """Restores an old folder that [`finish_folder`] moved aside just before it was killed."""
    aside = beside(path, "replaced")
    if aside.exists() and not path.exists():
        os.rename(aside, path)


def begin_folder(path: Path) -> Path:
    recover_folder(path)
    partial = beside(path, "partial")
    for leftover in (partial, beside(path, "replaced")):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def finish_folder(partial: Path, path: Path) -> None:
    sync(partial)
    aside = beside(path, "replaced")
    if path.exists():
        os.rename(path, aside)
    try:
        os.rename(partial, path)
    finally:
        recover_folder(path)  # after a failure
    sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)
