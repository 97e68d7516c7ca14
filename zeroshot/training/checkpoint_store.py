# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints for exact resume of a training.

A checkpoint is a folder of safetensors and JSON, without pickle (`accelerator.save_state` pickles the optimizer, the
scheduler and the random number generators, and silently skips generators that do not load):

```
step-00000123/
    model.safetensors       trainable parameters and buffers, by name
    training.safetensors    optimizer (by parameter name), scheduler, gradient scaler, accelerate's step counter
    rng-00000.safetensors   random number generators, one file per process
    progress.json           step, epoch, batch and further state of the loop
    manifest.json           name, size and SHA-256 of every other file; written last
```

It is written as `.step-00000123.partial` and renamed when all bytes are on disk, so a folder with the final name is
complete even if the process is killed. Only the hash of frozen parameters is stored; the set of frozen parameters must
not change during a training.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..files import begin_folder, beside, finish_folder, recover_folder, sync
from .manifest import (
    FORMAT,
    MANIFEST,
    MODEL,
    PROGRESS,
    RNG,
    STEP_FOLDER,
    TRAINING,
    missing_files,
    problem_of,
    progress_text,
    sha256_of,
    step_of,
)
from .state import (
    frozen_hash,
    load_optimizer_state,
    model_tensors,
    optimizer_state,
    read_state,
    rng_state,
    set_rng_state,
    write_state,
)


logger = logging.getLogger(__name__)

Result = TypeVar("Result")

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message gives the checkpoint and the reason."""


class CheckpointStore:
    """The checkpoints of one training run, in one folder (with several machines: on a shared file system).

    Args:
        folder: Folder of the checkpoints, created by the first [`save`].
        keep: Number of complete checkpoints to keep, at least 1.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"`keep` is {keep}; expected a whole number ≥ 1.")
        self.folder = Path(folder)
        self.keep = keep
        self._verified: Path | None = None
        self._frozen: str | None = None

    def save(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any | None,
        progress: dict[str, Any],
    ) -> Path:
        """Writes `step-…` for `progress["step"]`, then removes all but the `keep` newest checkpoints.

        All processes call it, after an optimizer step and before the next batch.

        Args:
            accelerator: Accelerator of the processes; its step counter and gradient scaler are saved as well.
            model: Wrapped or unwrapped.
            optimizer: Wrapped or unwrapped.
            scheduler: Wrapped or unwrapped, or `None`.
            progress: JSON values; `"step"`, `"epoch"` and `"batch"` are required.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: On every process if one of them could not write, for example because the disk is full. The
                incomplete checkpoint is removed, earlier ones stay intact.
            ValueError: If `progress` is not as described above, or gradients are being accumulated.
        """
        text = progress_text(progress)
        if not accelerator.sync_gradients:
            raise ValueError("Gradients are being accumulated and are not saved: save after the optimizer's step.")
        final = self.folder / f"step-{progress['step']:08d}"
        partial = beside(final, "partial")

        def write() -> None:
            if accelerator.is_main_process:
                self._write(accelerator, partial, accelerator.unwrap_model(model), optimizer, scheduler)
            write_state(partial / RNG.format(accelerator.process_index), rng_state(accelerator.device))

        try:
            _together(accelerator, lambda: self._begin(final), self.folder)
            _together(accelerator, write, self.folder, everywhere=True)
            _together(accelerator, lambda: self._finish(accelerator, partial, final, text), self.folder)
        finally:
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
        return final

    def latest(self, accelerator: Accelerator | None = None) -> Path | None:
        """The newest intact checkpoint; `None` if there is no checkpoint.

        The main process decides for all. It warns of each newer checkpoint that is damaged and gives the reason.

        Raises:
            CheckpointError: If there are checkpoints and all of them are damaged.
        """

        def find() -> Path | None:
            problems = []
            for path in reversed(self._checkpoints()):
                problem = problem_of(path)
                if problem is None:
                    self._verified = path
                    return path
                logger.warning("The checkpoint %s is damaged and is skipped: %s.", path, problem)
                problems.append(f"{path.name}: {problem}")
            if problems:
                raise CheckpointError(
                    f"No checkpoint in {self.folder} is usable. {'; '.join(problems)}. Restore an intact copy, or "
                    "remove the folder to start again."
                )
            return None

        return _together(accelerator, find, self.folder)

    def load(
        self,
        accelerator: Accelerator,
        path: str | Path,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any | None,
    ) -> dict[str, Any]:
        """Restores everything that [`save`] wrote, in place, and returns `progress`. All processes call it.

        A data loader draws from torch's generator when it starts, also in the middle of an epoch, where an
        uninterrupted training does not. So a loop whose steps draw from the global generators, instead of seeding them
        with the step number, has to restore them after fetching its first batch.

        Raises:
            CheckpointError: If the checkpoint is damaged or was written with another model, optimizer, scheduler, number
                of processes or device type; the state of model and optimizer is then undefined.
        """
        path = Path(path)

        def verify() -> None:
            verified, self._verified = self._verified, None
            problem = None if path == verified else problem_of(path)
            if problem is not None:
                raise CheckpointError(f"The checkpoint {path} is damaged: {problem}.")
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            if manifest["processes"] != accelerator.num_processes:
                raise CheckpointError(
                    f"The checkpoint {path} was written by {manifest['processes']} processes, but this training has "
                    f"{accelerator.num_processes}: resume with the same number."
                )
            self._remove_leftovers()

        def read() -> None:
            self._read(accelerator, path, accelerator.unwrap_model(model), optimizer, scheduler)
            set_rng_state(read_state(path / RNG.format(accelerator.process_index)), accelerator.device)

        _together(accelerator, verify, path)
        _together(accelerator, read, path, everywhere=True)
        return json.loads((path / PROGRESS).read_text(encoding="utf-8"))

    def _checkpoints(self) -> list[Path]:
        """All folders named `step-…`, oldest first."""
        for aside in self.folder.glob(".step-*.replaced"):
            recover_folder(self.folder / aside.name[1 : -len(".replaced")])
        found = [path for path in self.folder.glob("step-*") if STEP_FOLDER.fullmatch(path.name)]
        return sorted(found, key=step_of)

    def _begin(self, final: Path) -> None:
        for path in self._checkpoints():
            if step_of(path) > step_of(final) and problem_of(path) is None:
                raise CheckpointError(
                    f"{self.folder} contains {path.name}, which is newer than {final.name}, the one to write: resume from "
                    "it, remove it, or choose another folder."
                )
        self._remove_leftovers()
        begin_folder(final)

    def _remove_leftovers(self) -> None:
        """Removes incomplete folders of a process that was killed while writing or removing them."""
        for leftover in self.folder.glob(".step-*.*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _write(
        self,
        accelerator: Accelerator,
        folder: Path,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any | None,
    ) -> None:
        self._frozen = self._frozen or frozen_hash(model)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model_tensors(model).items()}
        save_file(tensors, folder / MODEL, metadata={"frozen": self._frozen})
        state = {
            "optimizer": optimizer_state(model, optimizer),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
            "accelerate_step": accelerator.step,
        }
        write_state(folder / TRAINING, state)

    def _read(
        self,
        accelerator: Accelerator,
        folder: Path,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any | None,
    ) -> None:
        tensors, own = load_file(folder / MODEL), model_tensors(model)
        saved, needed = ({name: (t.shape, t.dtype) for name, t in each.items()} for each in (tensors, own))
        names = sorted({name for name, _ in saved.items() ^ needed.items()})
        if names:
            raise ValueError(
                f"{len(names)} trainable weights differ between the model and the checkpoint (name, shape or "
                f"type), for example {', '.join(names[:3])}: resume with the options with which the training was "
                "started."
            )
        with safe_open(folder / MODEL, framework="pt") as file:
            if accelerator.is_main_process and file.metadata()["frozen"] != frozen_hash(model):
                raise ValueError(
                    "The frozen weights differ from those at the start of the training: start with the same "
                    "pretrained model."
                )
        state = read_state(folder / TRAINING)
        for part, own_part in (("scheduler", scheduler), ("scaler", accelerator.scaler)):
            if (state[part] is None) != (own_part is None):
                raise ValueError(
                    f"{'The training' if state[part] is None else 'The checkpoint'} has a {part} and "
                    f"{'the checkpoint' if state[part] is None else 'the training'} has none: resume with the options "
                    "with which the training was started."
                )
        load_optimizer_state(model, optimizer, state["optimizer"])
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])
        if scheduler is not None:
            scheduler.load_state_dict(state["scheduler"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        accelerator.step = state["accelerate_step"]

    def _finish(self, accelerator: Accelerator, partial: Path, final: Path, text: str) -> None:
        (partial / PROGRESS).write_text(text, encoding="utf-8")
        files = {}
        for path in sorted(partial.rglob("*")):
            sync(path)
            if path.is_file():
                name = path.relative_to(partial).as_posix()
                files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        missing = missing_files(files, accelerator.num_processes)
        if missing:
            raise CheckpointError(
                f"The first process cannot find {', '.join(sorted(missing))} of other processes: choose a "
                "folder on a file system that all machines share."
            )
        manifest = {
            "format": FORMAT,
            "step": step_of(final),
            "processes": accelerator.num_processes,
            "files": files,
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        sync(partial / MANIFEST)
        finish_folder(partial, final)
        self._rotate(final)

    def _rotate(self, newest: Path) -> None:
        """Removes all but the `keep` newest complete checkpoints; newer ones than `newest` are damaged (see [`_begin`])."""
        kept = [newest]
        for path in reversed(self._checkpoints()):
            if path == newest:
                continue
            if len(kept) < self.keep and step_of(path) < step_of(newest) and problem_of(path, hashes=False) is None:
                kept.append(path)
                continue
            gone = beside(path, "partial")  # an interrupted removal leaves no folder that looks complete
            try:
                os.rename(path, gone)
                shutil.rmtree(gone)
            except OSError as error:
                logger.warning("The old checkpoint %s could not be removed: %s.", path, error)


def explain(error: Exception, place: Path) -> str:
    """Describes an exception raised while writing to or reading from the folder `place`."""
    text = str(error)
    full = isinstance(error, OSError) and error.errno in DISK_FULL
    # safetensors includes the error number only in its message
    rust = isinstance(error, SafetensorError) and any(f"(os error {number})" in text for number in DISK_FULL)
    if full or rust:
        exists = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
        return (
            f"The disk is full: writing to {place} failed, {shutil.disk_usage(exists).free} bytes are "
            "free. The earlier checkpoints are intact. Make room or choose another folder, then resume."
        )
    if isinstance(error, CheckpointError):
        return text
    if isinstance(error, OSError | SafetensorError):
        return f"{place} could not be read or written ({text}): check its disk and its permissions."
    return f"{place}: {text if isinstance(error, ValueError) else repr(error)}"


def _together(
    accelerator: Accelerator | None, work: Callable[[], Result], place: Path, everywhere: bool = False
) -> Result:
    """Runs `work` on the main process or everywhere; all processes get the main process's result, or the same error.

    No process waits for one that has failed: each reports success or failure to the others.
    """
    result: Any = None
    message: str | None = None
    cause: Exception | None = None
    if everywhere or accelerator is None or accelerator.is_main_process:
        try:
            result = work()
        except Exception as error:
            message, cause = explain(error, place), error
    if accelerator is not None and accelerator.num_processes > 1:
        reports = gather_object([(result, message)])
        result = reports[0][0]
        message = " ".join(dict.fromkeys(text for _, text in reports if text is not None)) or None
    if message is not None:
        raise CheckpointError(message) from cause
    return result
