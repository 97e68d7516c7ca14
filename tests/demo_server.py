# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Runs the demo as a separate process, for the tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


APP = Path(__file__).resolve().parent.parent / "app"


@dataclass
class DemoServer:
    """`url` ends in a slash; `log` contains the output so far."""

    url: str
    process: subprocess.Popen
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8")

    @property
    def resident_megabytes(self) -> float:
        """Memory of the process; Linux only."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024


@contextlib.contextmanager
def serve_demo(checkpoint: Path, folder: Path, timeout: float = 600) -> Iterator[DemoServer]:
    """Starts a copy of app/ with `checkpoint`, as in a Space; `folder` stores the copy and the uploads."""
    folder.mkdir(parents=True, exist_ok=True)
    space = shutil.copytree(APP, folder / "space", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {
        **os.environ,
        "ALIGNZEG_MODEL": str(checkpoint),
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    log_file = folder / "log.txt"
    with log_file.open("w", encoding="utf-8") as log:
        command = [sys.executable, "-u", "app.py"]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=space)
    try:
        url, started = None, time.monotonic()
        while url is None and process.poll() is None and time.monotonic() - started < timeout:
            time.sleep(0.2)
            lines = log_file.read_text(encoding="utf-8").splitlines()
            url = next((line.split()[-1] for line in lines if "Running on local URL" in line), None)
        if url is None:
            raise RuntimeError(f"the demo did not start: {log_file.read_text(encoding='utf-8')[-2000:]}")
        yield DemoServer(url.rstrip("/") + "/", process, log_file)
    finally:
        process.terminate()
        process.wait(30)
