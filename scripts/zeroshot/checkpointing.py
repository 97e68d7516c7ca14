# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints from which a training resumes exactly, files that are never half written, and two guards for the loop.

A checkpoint is a folder of safetensors and JSON, no pickle (`accelerator.save_state` pickles the optimizer, the
scheduler and the random number generators, and passes over the generators in silence when they do not load):

```
step-00000123/
    model.safetensors       the trainable parameters and the buffers, by name
    training.safetensors    optimizer (by parameter name), scheduler, gradient scaler, accelerate's step counter
    rng-00000.safetensors   random number generators, one file for each process
    progress.json           step, epoch, batch and whatever else the loop has to remember
    manifest.json           name, size and SHA-256 of every other file; written last
```

It is written as `.step-00000123.partial` and renamed when every byte is on the disk, so a folder with its final name
is complete, whenever the process was killed. Frozen parameters are not stored, only their hash; which ones are frozen
must not change during a training.

Training sharded by FSDP, DeepSpeed or Megatron has no process that sees all tensors: there, `accelerator.save_state`
writes model and optimizer in its own formats, pickles among them; everything else works as described here.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from types import FrameType, TracebackType
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file


logger = logging.getLogger(__name__)

Result = TypeVar("Result")

FORMAT = 1
MANIFEST, PROGRESS = "manifest.json", "progress.json"
MODEL, TRAINING, RNG = "model.safetensors", "training.safetensors", "rng-{:05d}.safetensors"
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
STEP_FOLDER = re.compile(r"step-(\d{8,})")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
SECOND_SIGNAL_AFTER = 3.0  # seconds; within them, a launcher passing on Ctrl-C is not a second request


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or there is none that can be read; the message says which and why."""


# ---------------------------------------------------------------------------------------------- write, then rename


def atomic_write_text(path: str | Path, text: str) -> None:
    """Writes `text` (UTF-8) to `path`: at every moment, the file has its old content or the new one."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Gives the name of a file beside `path`, of the same suffix, to write to; it becomes `path` at the end.

    After an exception inside the block, `path` is as it was before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _sync(path.parent)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Gives an empty folder beside `path` to write to; at the end it takes the place of `path`, *with all it holds*.

    After an exception inside the block, or when the process is killed, `path` is as it was before. POSIX cannot
    exchange two folders in one step: killed between the two renames, the old one is left as `.name.replaced` beside
    it, and the next call puts it back first.

    Raises:
        ValueError: If `path` holds the working directory or the home directory, or is a file.
    """
    path = Path(path).resolve()
    if any(place.resolve().is_relative_to(path) for place in (Path.cwd(), Path(os.path.expanduser("~")))):
        raise ValueError(f"{path} would be replaced with all it holds: name a new folder inside it instead.")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file where a folder is to be written: remove it or choose another name.")
    partial = _begin_folder(path)
    try:
        yield partial
        for file in sorted(partial.rglob("*")):
            _sync(file)
        _finish_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}")


def _recover_folder(path: Path) -> None:
    """Puts an old folder back that [`_finish_folder`] moved aside just before it was killed."""
    aside = _beside(path, "replaced")
    if aside.exists() and not path.exists():
        os.rename(aside, path)


def _begin_folder(path: Path) -> Path:
    _recover_folder(path)
    partial = _beside(path, "partial")
    for leftover in (partial, _beside(path, "replaced")):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def _finish_folder(partial: Path, path: Path) -> None:
    _sync(partial)
    aside = _beside(path, "replaced")
    if path.exists():
        os.rename(path, aside)
    try:
        os.rename(partial, path)
    finally:
        _recover_folder(path)  # after a failure
    _sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


# ------------------------------------------------------------------------------------- state as safetensors and JSON


def _write_state(path: Path, value: Any) -> None:
    """Writes nested dicts, lists, tuples, numbers, strings and tensors: the structure is JSON in the file's header."""
    tensors: dict[str, torch.Tensor] = {}

    def pack(value: Any, key: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[key] = value.detach().cpu().contiguous()
            return {"!tensor": key}
        if isinstance(value, np.generic):
            return value.item()
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if type(value) is list:
            return [pack(item, f"{key}/{i}") for i, item in enumerate(value)]
        if type(value) is tuple:
            return {"!tuple": pack(list(value), key)}
        if type(value) is dict:
            return {"!dict": [[pack(k, key), pack(item, f"{key}/{k}")] for k, item in value.items()]}
        raise ValueError(
            f"{key[1:]} is a {type(value).__name__}, and a checkpoint holds tensors, numbers, strings, lists, tuples "
            "and dicts only: give the optimizer or scheduler a state of these."
        )

    structure = json.dumps(pack(value, ""))
    save_file(tensors, path, metadata={"structure": structure})


def _read_state(path: Path) -> Any:
    with safe_open(path, framework="pt") as file:

        def unpack(value: Any) -> Any:
            if isinstance(value, list):
                return [unpack(item) for item in value]
            if not isinstance(value, dict):
                return value
            [(kind, content)] = value.items()
            if kind == "!tensor":
                return file.get_tensor(content)
            return tuple(unpack(content)) if kind == "!tuple" else {unpack(k): unpack(item) for k, item in content}

        return unpack(json.loads(file.metadata()["structure"]))


def _model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trainable parameters (a shared one once) and the persistent buffers."""
    tensors = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = model.state_dict(keep_vars=True)
    return tensors | {name: t for name, t in state.items() if not isinstance(t, torch.nn.Parameter)}


def _frozen_hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _named_groups(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    try:
        return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    except KeyError:
        raise ValueError("The optimizer holds a parameter that is not one of the model: give both together.") from None


def _optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` with the parameters' names in the place of their numbers."""
    groups = _named_groups(model, optimizer)
    names = [name for group in groups for name in group]
    state = optimizer.state_dict()
    return {
        "state": {names[number]: entry for number, entry in state["state"].items()},
        "param_groups": [group | {"params": names} for group, names in zip(state["param_groups"], groups)],
    }


def _load_optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    groups = _named_groups(model, optimizer)
    if [group["params"] for group in state["param_groups"]] != groups:
        raise ValueError(
            f"The checkpoint's optimizer has {[len(group['params']) for group in state['param_groups']]} parameters "
            f"in its groups, this one has {[len(group) for group in groups]}, or they are others or in another order: "
            "resume with the options with which the training was started."
        )
    number = {name: i for i, name in enumerate(name for group in groups for name in group)}
    optimizer.load_state_dict(
        {
            "state": {number[name]: entry for name, entry in state["state"].items()},
            "param_groups": [g | {"params": [number[name] for name in g["params"]]} for g in state["param_groups"]],
        }
    )


def _rng_state(device: torch.device) -> dict[str, Any]:
    algorithm, key, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (algorithm, key.tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    if device.type != "cpu" and device.type not in state:
        raise ValueError(
            f"The checkpoint was not written on a {device.type} device: resume on the kind of device on which the "
            "training was started."
        )
    algorithm, key, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((algorithm, np.array(key, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[device.type])


# ------------------------------------------------------------------------------------------------------ checkpoints


class CheckpointStore:
    """The checkpoints of one training run, in one folder (with several machines: on a file system that all share).

    Args:
        folder: Where the checkpoints are; made by the first [`save`].
        keep: How many complete checkpoints are kept, at least 1.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"`keep` is the number of checkpoints to keep, at least 1, not {keep}.")
        self.folder = Path(folder)
        self.keep = keep
        self._verified: Path | None = None
        self._resumed: tuple[Path, dict[str, Any]] | None = None
        self._frozen: str | None = None

    def save(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any | None,
        progress: dict[str, Any],
    ) -> Path:
        """Writes `step-…` for `progress["step"]`, then removes what is older than the `keep` newest.

        Every process calls it, after an optimizer step and before the next batch is used.

        Args:
            accelerator: Tells the processes apart; its step counter and gradient scaler are saved as well.
            model: Wrapped or unwrapped.
            optimizer: Wrapped or unwrapped.
            scheduler: Wrapped or unwrapped, or `None`.
            progress: JSON values; `"step"`, `"epoch"` and `"batch"` are needed.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: On every process if one of them could not write, the disk is full for example. What was
                written of this checkpoint is removed, the earlier ones are intact.
            ValueError: If `progress` is not what is described above, or gradients are being accumulated.
        """
        progress_text = _progress_text(progress)
        if not accelerator.sync_gradients:
            raise ValueError("Gradients are being accumulated and are not saved: save after the optimizer's step.")
        final = self.folder / f"step-{progress['step']:08d}"
        partial = _beside(final, "partial")

        def write() -> None:
            if accelerator.distributed_type in SHARDED:
                accelerator.save_state(str(partial), safe_serialization=True)
            elif accelerator.is_main_process:
                self._write(accelerator, partial, accelerator.unwrap_model(model), optimizer, scheduler)
            _write_state(partial / RNG.format(accelerator.process_index), _rng_state(accelerator.device))

        try:
            _together(accelerator, lambda: self._begin(final), self.folder)
            _together(accelerator, write, self.folder, everywhere=True)
            _together(accelerator, lambda: self._finish(accelerator, partial, final, progress_text), self.folder)
        finally:
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
        return final

    def latest(self, accelerator: Accelerator | None = None) -> Path | None:
        """The newest checkpoint of which every file is as it was written; `None` if there is no checkpoint at all.

        The main process decides for all; a warning names each newer one that is damaged and says in what way.

        Raises:
            CheckpointError: If there are checkpoints and all of them are damaged.
        """

        def find() -> Path | None:
            problems = []
            for path in reversed(self._checkpoints()):
                problem = _problem(path)
                if problem is None:
                    self._verified = path
                    return path
                logger.warning("The checkpoint %s is damaged and is passed over: %s.", path, problem)
                problems.append(f"{path.name}: {problem}")
            if problems:
                raise CheckpointError(
                    f"No checkpoint in {self.folder} is usable. {'; '.join(problems)}. Put an intact copy back, or "
                    "remove the folder to start anew."
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
        """Restores everything that [`save`] wrote, in place, and returns `progress`. Every process calls it.

        Go on with [`batches`] of epoch `progress["epoch"]`.

        Raises:
            CheckpointError: If the checkpoint is damaged or belongs to another model, optimizer, scheduler, number of
                processes or kind of device; the state of model and optimizer is undefined then.
        """
        path = Path(path)

        def verify() -> None:
            verified, self._verified = self._verified, None
            problem = None if path == verified else _problem(path)
            if problem is not None:
                raise CheckpointError(f"The checkpoint {path} is damaged: {problem}.")
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            if manifest["processes"] != accelerator.num_processes:
                raise CheckpointError(
                    f"The checkpoint {path} was written by {manifest['processes']} processes and this training has "
                    f"{accelerator.num_processes}: resume with the same number."
                )
            if manifest["sharded"] != (accelerator.distributed_type in SHARDED):
                raise CheckpointError(
                    f"The checkpoint {path} is {'of' if manifest['sharded'] else 'not of'} a sharded training, unlike "
                    "this one: resume with the settings of `accelerate` with which the training was started."
                )

        def read() -> None:
            if accelerator.distributed_type in SHARDED:
                accelerator.load_state(str(path))
            else:
                self._read(accelerator, path, accelerator.unwrap_model(model), optimizer, scheduler)

        _together(accelerator, verify, path)
        _together(accelerator, read, path, everywhere=True)
        self.restore_rng(accelerator, path)
        progress = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        self._resumed = (path, progress)
        return progress

    def batches(self, accelerator: Accelerator, loader: torch.utils.data.DataLoader, epoch: int) -> Iterator[Any]:
        """The batches of an epoch with their numbers, `(0, batch)` and so on, or what [`load`] has left of it.

        A data loader draws from torch's generator when it begins, in the middle of an epoch too, where the
        uninterrupted training does not: the generators are set back when the first batch has been fetched.

        Args:
            accelerator: Has prepared `loader`, with a seedable sampler.
            loader: Its samples may depend on the seed, the epoch and their index, but not on a global generator.
            epoch: Number of the epoch; it decides the order.
        """
        loader.set_epoch(epoch)
        path, progress = self._resumed or (None, {})
        self._resumed = None
        first = progress["batch"] if epoch == progress.get("epoch") else 0
        if first >= len(loader):
            return
        rest = accelerator.skip_first_batches(loader, first) if first else loader
        for number, batch in enumerate(rest, start=first):
            if first and number == first:
                self.restore_rng(accelerator, path)
            yield number, batch

    def restore_rng(self, accelerator: Accelerator, path: str | Path) -> None:
        """Sets this process's generators (Python, numpy, torch, the device) to what they were at [`save`]."""
        file = Path(path) / RNG.format(accelerator.process_index)
        _together(accelerator, lambda: _set_rng_state(_read_state(file), accelerator.device), file, everywhere=True)

    def _checkpoints(self) -> list[Path]:
        """All folders named `step-…`, oldest first."""
        for aside in self.folder.glob(".step-*.replaced"):
            _recover_folder(self.folder / aside.name[1 : -len(".replaced")])
        found = [path for path in self.folder.glob("step-*") if STEP_FOLDER.fullmatch(path.name)]
        return sorted(found, key=_step_of)

    def _begin(self, final: Path) -> None:
        for path in self._checkpoints():
            if _step_of(path) > _step_of(final) and _problem(path) is None:
                raise CheckpointError(
                    f"{self.folder} holds {path.name}, newer than the {final.name} that is to be written: resume from "
                    "it, remove it, or choose another folder."
                )
        for leftover in self.folder.glob(".step-*.*"):
            shutil.rmtree(leftover, ignore_errors=True)
        _begin_folder(final)

    def _write(
        self,
        accelerator: Accelerator,
        folder: Path,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any | None,
    ) -> None:
        self._frozen = self._frozen or _frozen_hash(model)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _model_tensors(model).items()}
        save_file(tensors, folder / MODEL, metadata={"frozen": self._frozen})
        state = {
            "optimizer": _optimizer_state(model, optimizer),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
            "accelerate_step": accelerator.step,
        }
        _write_state(folder / TRAINING, state)

    def _read(
        self,
        accelerator: Accelerator,
        folder: Path,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any | None,
    ) -> None:
        tensors, own = load_file(folder / MODEL), _model_tensors(model)
        saved, needed = ({name: (t.shape, t.dtype) for name, t in each.items()} for each in (tensors, own))
        names = sorted({name for name, _ in saved.items() ^ needed.items()})
        if names:
            raise ValueError(
                f"{len(names)} trainable weights are not the same in the model and in the checkpoint (name, shape or "
                f"type), {', '.join(names[:3])} for example: resume with the options with which the training was "
                "started."
            )
        with safe_open(folder / MODEL, framework="pt") as file:
            if accelerator.is_main_process and file.metadata()["frozen"] != _frozen_hash(model):
                raise ValueError(
                    "The frozen weights are not those with which the training was started: begin with the same "
                    "pretrained model."
                )
        state = _read_state(folder / TRAINING)
        for part, needed in (("scheduler", scheduler), ("scaler", accelerator.scaler)):
            if (state[part] is None) != (needed is None):
                raise ValueError(
                    f"{'The training' if state[part] is None else 'The checkpoint'} has a {part} and "
                    f"{'the checkpoint' if state[part] is None else 'the training'} has none: resume with the options "
                    "with which the training was started."
                )
        _load_optimizer_state(model, optimizer, state["optimizer"])
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])
        if scheduler is not None:
            scheduler.load_state_dict(state["scheduler"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        accelerator.step = state["accelerate_step"]

    def _finish(self, accelerator: Accelerator, partial: Path, final: Path, progress_text: str) -> None:
        sharded = accelerator.distributed_type in SHARDED
        (partial / PROGRESS).write_text(progress_text, encoding="utf-8")
        files = {}
        for path in sorted(partial.rglob("*")):
            _sync(path)
            if path.is_file():
                name = path.relative_to(partial).as_posix()
                files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        missing = _missing_files(files, accelerator.num_processes, sharded)
        if missing:
            raise CheckpointError(
                f"{', '.join(sorted(missing))}, written by other processes, cannot be seen by the first: choose a "
                "folder on a file system that all machines share."
            )
        manifest = {
            "format": FORMAT,
            "step": _step_of(final),
            "processes": accelerator.num_processes,
            "sharded": sharded,
            "files": files,
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        _sync(partial / MANIFEST)
        _finish_folder(partial, final)
        self._rotate(final)

    def _rotate(self, newest: Path) -> None:
        """Removes all but the `keep` newest complete ones; those beyond `newest` were found damaged by [`_begin`]."""
        kept = [newest]
        for path in reversed(self._checkpoints()):
            if path == newest:
                continue
            if len(kept) < self.keep and _step_of(path) < _step_of(newest) and _problem(path, hashes=False) is None:
                kept.append(path)
                continue
            gone = _beside(path, "partial")  # a removal that is cut short leaves no folder that looks complete
            try:
                os.rename(path, gone)
                shutil.rmtree(gone)
            except OSError as error:
                logger.warning("The old checkpoint %s could not be removed: %s.", path, error)


def _step_of(path: Path) -> int:
    match = STEP_FOLDER.fullmatch(path.name)
    return int(match[1]) if match else -1


def _missing_files(files: dict[str, Any], processes: int, sharded: bool) -> set[str]:
    needed = {PROGRESS} if sharded else {PROGRESS, MODEL, TRAINING}
    ranks = min(processes, len(files))  # the number may come from a damaged file
    return needed.union(map(RNG.format, range(ranks))) - files.keys()


def _progress_text(progress: dict[str, Any]) -> str:
    for key in ("step", "epoch", "batch"):
        if type(progress.get(key)) is not int or progress[key] < 0:
            raise ValueError(f"`progress` needs {key!r}, a whole number from 0 on, and has {progress.get(key)!r}.")
    try:
        return json.dumps(progress, indent=2)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`progress` is written as JSON and holds what JSON cannot: {error}.") from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _problem(path: Path, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, as the end of a sentence; `None` if nothing is."""
    name = MANIFEST
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} is of format {manifest['format']}, and this version reads format {FORMAT}"
        if STEP_FOLDER.fullmatch(path.name) and manifest["step"] != _step_of(path):
            return f"{MANIFEST} is that of step {manifest['step']}"
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        missing = _missing_files(files, manifest["processes"], manifest["sharded"])
        if missing:
            return f"{MANIFEST} does not list {', '.join(sorted(missing))}"
        for name, (size, sha256) in files.items():
            relative = PurePosixPath(name)
            if relative.is_absolute() or ".." in relative.parts or "\\" in name:
                return f"{MANIFEST} names {name!r}, which is outside the folder"
            found = (path / relative).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            if hashes and _sha256(path / relative) != sha256:
                return f"{name} has changed since it was written (its SHA-256 differs)"
        name = PROGRESS
        progress = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        _progress_text(progress)
        if progress["step"] != manifest["step"]:
            return f"{PROGRESS} is that of step {progress['step']}"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"{name} is not what this program writes ({type(error).__name__}: {error})"
    return None


def _explain(error: Exception, place: Path) -> str:
    """An exception as a sentence that names the folder."""
    text = str(error)
    full = isinstance(error, OSError) and error.errno in DISK_FULL
    # safetensors gives the number in the text only
    rust = isinstance(error, SafetensorError) and any(f"(os error {number})" in text for number in DISK_FULL)
    if full or rust:
        exists = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
        return (
            f"The disk is full: no checkpoint could be written to {place}, {shutil.disk_usage(exists).free} bytes are "
            "free. The earlier checkpoints are intact. Make room or choose another folder, then resume."
        )
    if isinstance(error, CheckpointError):
        return text
    if isinstance(error, OSError | SafetensorError):
        return f"{place} could not be read or written ({text}): look at its disk and its permissions."
    return f"{place}: {text if isinstance(error, ValueError) else repr(error)}"


def _together(
    accelerator: Accelerator | None, work: Callable[[], Result], place: Path, everywhere: bool = False
) -> Result:
    """Runs `work` on the main process or everywhere; all get the main process's result, or all the same error.

    No process waits for one that has failed: each tells the others how it went, also when it went wrong.
    """
    result, message, cause = None, None, None
    if everywhere or accelerator is None or accelerator.is_main_process:
        try:
            result = work()
        except Exception as error:
            message, cause = _explain(error, place), error
    if accelerator is not None and accelerator.num_processes > 1:
        reports = gather_object([(result, message)])
        result = reports[0][0]
        message = " ".join(dict.fromkeys(text for _, text in reports if text is not None)) or None
    if message is not None:
        raise CheckpointError(message) from cause
    return result


# ---------------------------------------------------------------------------------------------- guards for the loop


class SignalStop:
    """Turns SIGTERM and Ctrl-C into a flag, so that the loop can write a checkpoint before it ends.

    A second signal, at least [`SECOND_SIGNAL_AFTER`] seconds after the first, does what it did before.

    ```
    with SignalStop() as stop:
        for batch in loader:
            ...
            if stop.agreed(accelerator):
                break
    ```

    Args:
        every: With several processes, every how many calls of [`agreed`] they ask each other.

    Attributes:
        requested: Whether this process got a signal.
        received: Its number, `None` before; `128 + received` is the customary exit status.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self.requested = False
        self.received: int | None = None
        self._since = 0.0
        self._calls = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalStop:
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether to stop, with the same answer on every process: all of them call it equally often.

        With one process it costs nothing; with several, each `every`-th call is a reduction of one number.
        """
        if accelerator.num_processes == 1:
            return self.requested
        self._calls += 1
        return self._calls % self.every == 0 and _any_process(accelerator, self.requested)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self.received, self._since = True, number, time.monotonic()
            name = signal.Signals(number).name
            with suppress(OSError):  # logging is not safe here
                os.write(2, f"{name}: stopping after this step, with a checkpoint; repeat to stop at once.\n".encode())
        elif time.monotonic() - self._since > SECOND_SIGNAL_AFTER:
            self.__exit__(None, None, None)
            signal.raise_signal(number)


def check_finite(
    accelerator: Accelerator,
    step: int,
    terms: dict[str, torch.Tensor | float],
    names: list[str],
    action: Literal["stop", "skip"] = "stop",
) -> bool:
    """Looks for NaN and infinity in loss terms, matcher costs and gradient norms, on all processes at once.

    Every process calls it once a step, before `optimizer.step()`; the terms may differ between processes. It costs
    one wait for the device. (A gradient scaler's first steps have infinite gradient norms and are skipped by the
    scaler itself: with fp16, leave the norm out.)

    Args:
        accelerator: Of which all processes get the same answer.
        step: Number of the optimizer step, for the message.
        terms: Tensors of any shape, by name.
        names: The images of this process's batch.
        action: What to do if a term of any process is not finite: `"stop"` raises, `"skip"` logs and returns `False`.

    Returns:
        Whether the step may be taken.

    Raises:
        FloatingPointError: With `"stop"`, on every process, with the step, the terms and the images.
    """
    if action not in ("stop", "skip"):
        raise ValueError(f"`action` is 'stop' or 'skip', not {action!r}.")
    tensors = {name: torch.as_tensor(term, device=accelerator.device).detach() for name, term in terms.items()}
    bad = [~torch.isfinite(tensor).all() for tensor in tensors.values()]
    if not _any_process(accelerator, torch.stack(bad).any() if bad else False):
        return True
    found = []
    for name, tensor in tensors.items():
        broken = tensor[~torch.isfinite(tensor)]
        if broken.numel():
            found.append(f"{name} is {broken[0].item()}")
    report = f"{' and '.join(found)} for {', '.join(names) or 'an empty batch'}" if found else None
    reports = [text for text in gather_object([report]) if text is not None]
    message = f"Step {step}: {'; '.join(reports)}."
    if action == "stop":
        raise FloatingPointError(f"{message} Look at these images, or lower the learning rate, or skip such steps.")
    if accelerator.is_main_process:
        logger.warning("%s The step is skipped.", message)
    return False


def _any_process(accelerator: Accelerator, flag: bool | torch.Tensor) -> bool:
    """Whether `flag` is true on any process: one number is reduced, one value comes back from the device."""
    number = torch.as_tensor(flag, device=accelerator.device).float()
    return bool(accelerator.reduce(number, reduction="sum") > 0)
