# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""How every script ends: with its result, or with one sentence that says what was wrong with what it was given."""

from __future__ import annotations

import argparse
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def run_command(main: Callable[[], int | None], status: int = 1) -> None:
    """Runs a script's `main` and ends the process with what it returns, or with `status` and its error as a sentence.

    A RuntimeError that torch or another library raised may be anybody's mistake: its traceback comes too.
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


def whole_number(minimum: int) -> Callable[[str], int]:
    """The `type` of an argument of `argparse` that is a whole number from `minimum` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {minimum} on")
        return value

    return parse
