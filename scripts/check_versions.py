#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Runs the core tests with the oldest versions that setup.cfg allows, and with the newest ones available.

    python scripts/check_versions.py oldest newest

For each, it creates a virtual environment (several GB, most of it torch) under --folder, or uses the existing one;
--fresh recreates it. "oldest" turns every lower bound `name>=1.2` into `name==1.2`; indirect requirements are as new as
allowed. Arguments after `--` are passed to pytest in place of the core tests.
"""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from zeroshot.cli import command_parser, run_command


ROOT = Path(__file__).resolve().parent.parent
CORE = (
    *(
        "image_processing",
        "processing",
        "post_processing",
        "losses",
        "modeling",
        "vocabulary",
        "remote_code",
        "pipelines",
    ),
    *("settings", "splits", "data", "transforms", "metric", "checkpoint_store", "scripts"),
)
NEEDED_BY_CORE = ("pytest", "hypothesis")


def requirements() -> list[str]:
    """Requirements in setup.cfg for inference, training and the core tests."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = config["options.extras_require"]
    lines = (config["options"]["install_requires"] + extras["train"]).split()
    return lines + [line for line in extras["test"].split() if re.match(r"[\w.-]+", line)[0] in NEEDED_BY_CORE]


def pinned_to_lower_bound(requirement: str) -> str:
    """`name>=1.2,<3` as `name==1.2`.

    Raises:
        ValueError: There is no lower bound.
    """
    match = re.fullmatch(r"([\w.-]+)>=([\w.]+)(,.*)?", requirement)
    if match is None:
        raise ValueError(f"setup.cfg requires {requirement!r} without a lower bound: add the oldest tested version.")
    return f"{match[1]}=={match[2]}"


def make_environment(folder: Path, packages: list[str]) -> Path:
    """The Python of a virtual environment with `packages`; created unless a complete one exists."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (folder / "finished").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", "pip"], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / "finished").touch()
    return python


def main() -> int:
    options = command_parser(__doc__)
    options.add_argument("which", nargs="+", choices=("oldest", "newest"))
    options.add_argument(
        "--folder", type=Path, default=ROOT / "runs" / "environments", help="folder of the environments"
    )
    options.add_argument("--fresh", action="store_true", help="recreate the environments")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, chosen = options.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    tests = chosen or [f"tests/test_{name}.py" for name in CORE]
    failed = []
    for which in dict.fromkeys(args.which):
        folder = args.folder / which
        if args.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        wanted = requirements()
        python = make_environment(folder, list(map(pinned_to_lower_bound, wanted)) if which == "oldest" else wanted)
        subprocess.run([python, "-m", "pip", "list"], check=True)
        command = [python, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", "-q", *tests]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if subprocess.run(command, cwd=ROOT, env=environment).returncode:
            failed.append(which)
    print(f"Failed with the {' and the '.join(failed)} versions" if failed else "Passed")
    return len(failed)


if __name__ == "__main__":
    run_command(main)
