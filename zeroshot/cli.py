# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Command-line helpers: options that show their type and default, and errors as one sentence instead of a traceback.

Scripts parse their arguments before they import torch, so that `--help` and misspelt options respond at once.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of the description and adds type and default to the help of each option."""

    def _get_help_string(self, action: argparse.Action) -> str:
        details = []
        if action.nargs != 0 and not action.choices:
            details.append(f"type: {getattr(action.type, '__name__', 'str')}")
        if not any(action.default is value for value in (None, False, argparse.SUPPRESS)):
            details.append(f"default: {action.default}")
        text = action.help or ""
        return f"{text} ({', '.join(details)})".strip().replace("%", "%%") if details else text


def command_parser(description: str | None) -> argparse.ArgumentParser:
    """The argument parser of a script; `description` is the script's docstring."""
    return argparse.ArgumentParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)


def integer(minimum: int) -> Callable[[str], int]:
    """The `type` of an option that takes a whole number ≥ `minimum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"expected a whole number ≥ {minimum}, got {text!r}")
        return value

    parse.__name__ = f"int ≥ {minimum}"
    return parse


def integers(text: str) -> list[int]:
    """The `type` of an option that takes whole numbers, separated by commas."""
    return [integer(0)(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """The `type` of an option that takes names, separated by commas; a trailing comma is ignored."""
    return [name.strip() for name in text.rstrip().removesuffix(",").split(",")]


def run_command(main: Callable[[], int | None], status: int = 1) -> None:
    """Runs a script's `main` and exits with its result; an error becomes one sentence and the exit status `status`.

    A RuntimeError raised inside torch or another library keeps its traceback, because its cause is unclear.
    """
    try:
        if (result := main()) is not None:
            sys.exit(result)
    except (ValueError, OSError, RuntimeError, ImportError, FloatingPointError, subprocess.SubprocessError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = "site-packages" not in last.filename and (last.line or "").startswith("raise ")
        if isinstance(error, RuntimeError) and not ours:
            traceback.print_exc()
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(status)
