# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Reading text files of strangers, where every failure is one sentence that names the file."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

import yaml


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, 120, 120
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = 10


def shown(value: Any) -> str:
    """`repr` of a value for a message, cut short: a few lines of YAML can stand for gigabytes."""
    return _REPR.repr(value)


def read_text(path: str | Path) -> str:
    """A UTF-8 file.

    Raises:
        ValueError: It cannot be read, or is no UTF-8 text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (byte {error.start}); save it as UTF-8.") from error


def parse_yaml(text: str, source: str | Path) -> Any:
    """YAML that came from `source`, a file or an option.

    Raises:
        ValueError: It is no YAML.
    """
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: dates that do not exist
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{source} is not valid YAML: {reason}") from error
