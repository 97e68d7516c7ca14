# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints survive kills, damage and full disks, and a resumed training is bitwise equal to an uninterrupted one."""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn


if __name__ == "__main__":  # as a script under torchrun, see the end of the file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from zeroshot.files import atomic_file, atomic_folder, atomic_write_text
from zeroshot.training import checkpoint_store, guards, manifest
from zeroshot.training.checkpoint_store import CheckpointError, CheckpointStore
from zeroshot.training.guards import SignalStop, check_finite
from zeroshot.training.state import read_state, write_state


# ------------------------------------------------------------------------------------------------------ a toy training


class Toy(nn.Module):
    """Frozen and trained layers, buffers, a shared parameter, dropout, and a parameter without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 8).requires_grad_(False)
        self.norm = nn.BatchNorm1d(8)
        self.hidden = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.hidden.weight
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(8, 1).to(torch.bfloat16)
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.tied(self.hidden(self.norm(self.base(x))).relu()))
        return self.head(x.to(torch.bfloat16)).float().squeeze(1)


def make_accelerator(accumulate: int = 2) -> Accelerator:
    return Accelerator(
        cpu=True,
        gradient_accumulation_steps=accumulate,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=5),
    )


def batches(
    accelerator: Accelerator, loader: torch.utils.data.DataLoader, epoch: int, first: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """The batches of an epoch from `first` on. Undoes the loader's own draws at its start."""
    rest = accelerator.skip_first_batches(loader, first) if first else loader
    for each in {loader, rest}:  # as in `Trainer.micro_batches`
        each.set_epoch(epoch)
    state = torch.get_rng_state()
    for number, (x,) in enumerate(rest, first):
        if number == first:
            torch.set_rng_state(state)
        yield number, x


def train(
    accelerator: Accelerator,
    store: CheckpointStore,
    stop_at: int | None = None,
    resume: bool = False,
    workers: int = 0,
) -> dict[str, torch.Tensor]:
    """Trains for three epochs; saves and stops after step `stop_at`; returns the weights and the optimizer's averages."""
    set_seed(11 if not resume else 99)
    data = torch.utils.data.TensorDataset(torch.randn(50, 4, generator=torch.Generator().manual_seed(1)))
    loader = torch.utils.data.DataLoader(data, batch_size=3, shuffle=True, num_workers=workers)
    torch.manual_seed(7)
    model = Toy()
    head = list(model.head.parameters())
    rest = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("head.")]
    optimizer = torch.optim.AdamW([{"params": rest, "lr": 0.01}, {"params": head, "lr": 0.1}], weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / 100) ** 0.9)
    model_ddp = model
    if accelerator.num_processes > 1:
        model_ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    loader, optimizer, scheduler = accelerator.prepare(loader, optimizer, scheduler)
    random.seed(3 + accelerator.process_index)
    np.random.seed(3 + accelerator.process_index)
    torch.manual_seed(3 + accelerator.process_index)
    progress = {"step": 0, "epoch": 0, "batch": 0}
    if resume:
        progress = store.load(accelerator, store.latest(accelerator), model, optimizer, scheduler)
        assert progress["best"] == 0.1 + 0.2
    step = progress["step"]
    for epoch in range(progress["epoch"], 3):
        first = progress["batch"] if epoch == progress["epoch"] else 0
        if first >= len(loader):
            continue
        for batch, x in batches(accelerator, loader, epoch, first):
            with accelerator.accumulate(model_ddp):
                noise = random.random() + np.random.rand() + np.random.randn()
                loss = (model_ddp(x) - x.sum(1) + 0.1 * noise).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model_ddp.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                if step == stop_at:
                    store.save(
                        accelerator,
                        model_ddp,
                        optimizer,
                        scheduler,
                        {"step": step, "epoch": epoch, "batch": batch + 1, "best": 0.1 + 0.2},
                    )
                    return {}
    result = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            result[f"{name}/{key}"] = value.clone()
    result["lr"] = torch.tensor(scheduler.get_last_lr(), dtype=torch.float64)
    result["rng"] = torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64)
    result["steps"] = torch.tensor(step)
    return result


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    reset()
    yield make_accelerator(accumulate=1)
    reset()


def toy(step: int = 0) -> tuple[Toy, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """A model after one optimizer step, with all trained weights and buffers set to `step`."""
    torch.manual_seed(0)
    model = Toy()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    set_weights(model, step)
    return model, optimizer, scheduler


def set_weights(model: nn.Module, value: int) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(value)


def save_step(store: CheckpointStore, accelerator: Accelerator, step: int) -> Path:
    return store.save(accelerator, *toy(step), {"step": step, "epoch": 0, "batch": step})


def assert_latest_is_whole(folder: Path, accelerator: Accelerator, steps: set[int]) -> int:
    store = CheckpointStore(folder)
    path = store.latest(accelerator)
    model, optimizer, scheduler = toy()
    step = store.load(accelerator, path, model, optimizer, scheduler)["step"]
    assert path.name == f"step-{step:08d}" and step in steps
    assert all((p == step).all() for p in model.parameters() if p.requires_grad)
    return step


# -------------------------------------------------------------------------------------------------------- exact resume


@pytest.mark.parametrize(("stop_at", "workers"), [(3, 0), (9, 0), (10, 0), (20, 0), (13, 1)])
def test_resume_is_exact(tmp_path: Path, stop_at: int, workers: int) -> None:
    """17 micro-batches, two per step, so nine steps per epoch: stops in the middle, at the end and at the start of
    epochs."""
    store = CheckpointStore(tmp_path)
    reset()
    expected = train(make_accelerator(), store, workers=workers)
    reset()
    train(make_accelerator(), store, stop_at=stop_at, workers=workers)
    reset()
    found = train(make_accelerator(), CheckpointStore(tmp_path), resume=True, workers=workers)
    reset()
    assert expected["steps"] == 27 and expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_checkpoint_holds_no_pickle(tmp_path: Path, accelerator: Accelerator) -> None:
    path = save_step(CheckpointStore(tmp_path), accelerator, 1)
    names = {"model.safetensors", "training.safetensors", "rng-00000.safetensors", "progress.json", "manifest.json"}
    assert {file.name for file in path.iterdir()} == names
    weights = load_file(path / "model.safetensors")
    assert not [name for name in weights if name.startswith("base.")] and "norm.running_mean" in weights
    assert set(load_file(path / "training.safetensors")) >= {"/optimizer/state/head.bias/exp_avg_sq"}


def test_structures_round_trip(tmp_path: Path) -> None:
    value = {
        "a": [1, 0.1, -0.0, None, True, "é", (), {}],
        3: (1, [2, (float("inf"),)]),
        "t": {"x": torch.arange(3, dtype=torch.bfloat16), "scalar": torch.tensor(7, dtype=torch.uint8)},
    }
    write_state(tmp_path / "state", value)
    found = read_state(tmp_path / "state")
    tensors, expected = found.pop("t"), value.pop("t")
    assert repr(found) == repr(value)
    assert all(torch.equal(tensors[k], t) and tensors[k].dtype == t.dtype for k, t in expected.items())
    with pytest.raises(ValueError, match="scheduler/f is a function"):
        write_state(tmp_path / "state", {"scheduler": {"f": lambda: 0}})


def test_load_names_what_differs(tmp_path: Path, accelerator: Accelerator) -> None:
    store = CheckpointStore(tmp_path)
    path = save_step(store, accelerator, 1)

    def load(change: Callable[[Toy], object], scheduler: bool = True) -> None:
        model, _, _ = toy()
        change(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10) if scheduler else None
        store.load(accelerator, path, model, optimizer, cosine)

    with pytest.raises(CheckpointError, match="1 trainable weights differ.*unused"):
        load(lambda model: model.unused.requires_grad_(False))
    with pytest.raises(CheckpointError, match="frozen weights differ from those"):
        load(lambda model: model.base.weight.data.add_(1))
    with pytest.raises(CheckpointError, match="The checkpoint has a scheduler and the training has none"):
        load(lambda model: None, scheduler=False)
    model, optimizer, scheduler = toy()
    optimizer.add_param_group({"params": [optimizer.param_groups[0]["params"].pop()]})
    with pytest.raises(CheckpointError, match=r"\[8\] parameters in its groups, this one has \[7, 1\]"):
        store.load(accelerator, path, model, optimizer, scheduler)
    with pytest.raises(CheckpointError, match="parameter that is not in the model"):
        store.load(accelerator, path, toy()[0], optimizer, scheduler)


def test_progress_is_checked(tmp_path: Path, accelerator: Accelerator) -> None:
    store = CheckpointStore(tmp_path)
    for progress, text in [
        ({"step": 1, "epoch": 0}, "'batch' = None; expected a whole number"),
        ({"step": -1, "epoch": 0, "batch": 0}, "'step' = -1; expected a whole number"),
        ({"step": 1, "epoch": 0, "batch": 0, "best": torch.ones(1)}, "JSON"),
    ]:
        with pytest.raises(ValueError, match=text):
            store.save(accelerator, *toy(), progress)
    with pytest.raises(ValueError, match="≥ 1"):
        CheckpointStore(tmp_path, keep=0)
    accelerator.gradient_state._set_sync_gradients(False)
    with pytest.raises(ValueError, match="being accumulated"):
        save_step(store, accelerator, 1)
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------------- damage


def edit_manifest(path: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def flip_byte(path: Path) -> None:
    data = bytearray((path / "training.safetensors").read_bytes())
    data[-5] ^= 1
    (path / "training.safetensors").write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path / "model.safetensors", 100)


def escape(path: Path) -> None:
    shutil.copy(path / "model.safetensors", path.parent / "other")
    edit_manifest(path, lambda m: m["files"].update({"../other": m["files"]["model.safetensors"]}))


def consistent_nonsense(path: Path) -> None:
    """An invalid progress file with a matching manifest."""
    (path / "progress.json").write_text("[")
    entry = {"bytes": 1, "sha256": manifest.sha256_of(path / "progress.json")}
    edit_manifest(path, lambda m: m["files"].update({"progress.json": entry}))


def unreadable(path: Path) -> None:
    (path / "progress.json").unlink()
    (path / "progress.json").mkdir()


def empty(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated weights": (truncate, "model.safetensors has 100 bytes instead of"),
    "flipped byte": (flip_byte, "training.safetensors has changed since it was written"),
    "missing file": (lambda p: (p / "rng-00000.safetensors").unlink(), "rng-00000.safetensors is missing"),
    "empty manifest": (lambda p: (p / "manifest.json").write_text(""), "manifest.json does not have the expected"),
    "binary manifest": (lambda p: (p / "manifest.json").write_bytes(b"\xff\x00"), "manifest.json does not have the"),
    "other JSON": (lambda p: (p / "manifest.json").write_text("[1]"), "manifest.json does not have the expected"),
    "nested JSON": (lambda p: (p / "manifest.json").write_text("[" * 100000), "manifest.json does not have the"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "wrong size": (
        lambda p: edit_manifest(p, lambda m: m["files"]["model.safetensors"].update(bytes=7)),
        "bytes instead of 7",
    ),
    "file not listed": (lambda p: edit_manifest(p, lambda m: m["files"].pop("model.safetensors")), "does not list"),
    "many processes": (lambda p: edit_manifest(p, lambda m: m.update(processes=10**12)), "does not list rng-00001"),
    "other format": (lambda p: edit_manifest(p, lambda m: m.update(format=9)), "format 9"),
    "progress nonsense": (consistent_nonsense, "progress.json does not have the expected format"),
    "progress unreadable": (unreadable, "progress.json"),
    "empty folder": (empty, "manifest.json is missing"),
    "path outside": (escape, "'../other', which is outside the folder"),
    "absolute path": (
        lambda p: edit_manifest(p, lambda m: m["files"].update({"/x": {"bytes": 1, "sha256": ""}})),
        "/x",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_one_before_is_used(
    kind: str, tmp_path: Path, accelerator: Accelerator, caplog: pytest.LogCaptureFixture
) -> None:
    damage, text = DAMAGE[kind]
    store = CheckpointStore(tmp_path, keep=3)
    first = save_step(store, accelerator, 1)
    second = save_step(store, accelerator, 2)
    damage(second)
    with caplog.at_level(logging.WARNING):
        assert store.latest(accelerator) == first
    assert str(second) in caplog.text and text in caplog.text
    with pytest.raises(CheckpointError) as error:
        store.load(accelerator, second, *toy())
    assert str(second) in str(error.value) and text in str(error.value)
    shutil.rmtree(first)
    with pytest.raises(CheckpointError) as error:
        store.latest()
    assert second.name in str(error.value) and text in str(error.value)
    save_step(store, accelerator, 1)  # removes the damaged one of a later step, because this one is complete
    assert store.latest(accelerator) == first and not second.exists()


def test_renamed_checkpoint_is_refused(tmp_path: Path, accelerator: Accelerator) -> None:
    store = CheckpointStore(tmp_path)
    os.rename(save_step(store, accelerator, 1), tmp_path / "step-00000007")
    with pytest.raises(CheckpointError, match="step-00000007: manifest.json belongs to step 1"):
        store.latest()


def test_folders_without_checkpoints(tmp_path: Path, accelerator: Accelerator) -> None:
    assert CheckpointStore(tmp_path / "none").latest() is None
    for name in (".step-00000009.partial", "step-9", "other"):
        (tmp_path / name).mkdir()
    store = CheckpointStore(tmp_path)
    assert store.latest(accelerator) is None
    path = save_step(store, accelerator, 1)
    assert store.latest(accelerator) == path and not (tmp_path / ".step-00000009.partial").exists()


def test_rotation(tmp_path: Path, accelerator: Accelerator) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3, 10**8):
        save_step(store, accelerator, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-100000000"]
    assert store.latest() == tmp_path / "step-100000000"
    with pytest.raises(CheckpointError, match="step-100000000, which is newer than step-00000005"):
        save_step(store, accelerator, 5)
    truncate(tmp_path / "step-00000003")  # a damaged one does not count towards `keep`
    save_step(store, accelerator, 10**8 + 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-100000000", "step-100000001"]
    save_step(store, accelerator, 10**8 + 1)
    assert store.latest() == tmp_path / "step-100000001" and len(list(tmp_path.iterdir())) == 2


# ------------------------------------------------------------------------------------------------ kills and full disks


def in_child(work: Callable[[], int]) -> int:
    """Runs `work` in a fork of this process; returns its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the parent's OpenMP threads do not exist here, and torch would wait for them
            status = work()
        except BaseException as error:
            os.write(2, repr(error).encode())
            status = 99
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("step", [2, 3], ids=["same step again", "next step"])
def test_kill_at_every_point_of_a_save(step: int, tmp_path: Path, accelerator: Accelerator) -> None:
    """SIGKILL just before each write, sync, rename and removal of a save, one per run."""
    points, fresh = 0, tmp_path / "fresh"
    for earlier in (1, 2):
        save_step(CheckpointStore(fresh), accelerator, earlier)
    while True:
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(fresh, folder)

        def save_and_die(left: int = points, folder: Path = folder) -> int:
            def dying(function: Callable) -> Callable:
                def call(*args: object, **kwargs: object) -> object:
                    nonlocal left
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*args, **kwargs)

                return call

            for place, name in [
                (os, "rename"),
                (os, "fsync"),
                (os, "unlink"),
                (os, "rmdir"),
                (os, "mkdir"),
                (Path, "write_text"),
                (checkpoint_store, "save_file"),
            ]:
                setattr(place, name, dying(getattr(place, name)))
            save_step(CheckpointStore(folder), accelerator, step)
            return 0

        status = in_child(save_and_die)
        assert_latest_is_whole(folder, accelerator, {2, step})
        save_step(CheckpointStore(folder), accelerator, 4)
        assert sorted(p.name for p in folder.iterdir())[-1] == "step-00000004" and len(list(folder.iterdir())) == 2
        if status == 0:
            break
        assert status == -signal.SIGKILL
        points += 1
    assert points > 15


def test_kill_at_random_moments(tmp_path: Path, accelerator: Accelerator) -> None:
    def save_forever() -> int:
        store = CheckpointStore(tmp_path)
        model, optimizer, scheduler = toy()
        start = int(store.latest().name[5:]) if store.latest() else 0
        for step in range(start + 1, 10**6):
            set_weights(model, step % 128)
            store.save(accelerator, model, optimizer, scheduler, {"step": step, "epoch": 0, "batch": step % 128})
        return 0

    reached, chance = [0], random.Random(0)
    for _ in range(12):
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)  # as above
                save_forever()
            finally:
                os._exit(99)
        started = time.monotonic()
        while not list(tmp_path.glob("step-*")) and time.monotonic() - started < 60:
            time.sleep(0.01)
        time.sleep(chance.uniform(0.02, 0.4))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        store = CheckpointStore(tmp_path)
        model, optimizer, scheduler = toy()
        progress = store.load(accelerator, store.latest(accelerator), model, optimizer, scheduler)
        assert all((p == progress["batch"]).all() for p in model.parameters() if p.requires_grad)
        assert progress["step"] >= reached[-1]
        reached.append(progress["step"])
    assert reached[-1] > 5


@pytest.mark.parametrize("where", ["weights", "manifest", "folder"])
def test_full_disk_simulated(
    where: str, tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        if where == "weights":  # in the format of safetensors
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    store = CheckpointStore(tmp_path)
    first = save_step(store, accelerator, 1)
    with monkeypatch.context() as patch:
        if where == "weights":
            patch.setattr(checkpoint_store, "save_file", full)
        else:
            patch.setattr(Path, "mkdir" if where == "folder" else "write_text", full)
        with pytest.raises(
            CheckpointError, match=rf"disk is full.*{tmp_path} failed, \d+ bytes are free.*earlier.*intact"
        ):
            save_step(store, accelerator, 2)
    assert list(tmp_path.iterdir()) == [first]
    assert_latest_is_whole(tmp_path, accelerator, {1})


def test_full_disk(tmp_path: Path, accelerator: Accelerator) -> None:
    """A real full disk, if the process may mount one."""

    def fill() -> int:
        libc = ctypes.CDLL(None, use_errno=True)
        user = 0x10000000 if os.getuid() else 0
        if libc.unshare(0x00020000 | user) or libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None):
            return 77
        if libc.mount(b"tmpfs", os.fsencode(tmp_path), b"tmpfs", 0, b"size=150k"):
            return 77
        store, step = CheckpointStore(tmp_path, keep=99), 0
        try:
            while True:
                save_step(store, accelerator, step + 1)
                step += 1
        except CheckpointError as error:
            assert "The disk is full" in str(error) and str(tmp_path) in str(error), error
        assert step > 1 and len(list(tmp_path.iterdir())) == step
        return 0 if assert_latest_is_whole(tmp_path, accelerator, {step}) == step else 1

    status = in_child(fill)
    if status == 77:
        pytest.skip("no file system can be mounted here")
    assert status == 0


def test_folder_that_cannot_be_written(tmp_path: Path, accelerator: Accelerator) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file.* could not be read or written"):
        save_step(CheckpointStore(tmp_path / "file" / "runs"), accelerator, 1)


# ------------------------------------------------------------------------------------------------------- atomic writes


def test_atomic_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    atomic_write_text(path, "é1")
    with pytest.raises(RuntimeError), atomic_file(path) as partial:
        assert partial.suffix == ".json" and partial.parent == path.parent
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "é1" and list(path.parent.iterdir()) == [path]
    atomic_write_text(path, "2")
    assert path.read_text() == "2"
    (tmp_path / "link").symlink_to(path)
    atomic_write_text(tmp_path / "link", "3")
    assert path.read_text() == "3" and (tmp_path / "link").is_symlink()
    long = tmp_path / f"{'é' * 125}.png"
    atomic_write_text(long, "")
    assert sorted(tmp_path.iterdir()) == sorted([path.parent, tmp_path / "link", long])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fifo", "not a regular file"),
        ("folder", "is a folder"),
        ("file/new.json", "is a file, not"),
        ("link", "is a folder"),
    ],
)
def test_places_that_no_file_fits_in(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "fifo")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=words):
        atomic_write_text(tmp_path / name, "")
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "fifo").is_fifo()


def test_atomic_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    for content in ("1", "2"):
        with atomic_folder(path) as partial:
            (partial / "code").mkdir()
            (partial / "code" / content).write_text(content)
    with pytest.raises(RuntimeError), atomic_folder(path) as partial:
        (partial / "half").write_text("")
        raise RuntimeError
    assert [file.name for file in path.rglob("*")] == ["code", "2"] and list(tmp_path.iterdir()) == [path]
    os.rename(path, tmp_path / ".model.replaced")  # as after a kill between the two renames
    with pytest.raises(RuntimeError), atomic_folder(path):
        raise RuntimeError
    assert (path / "code" / "2").exists() and list(tmp_path.iterdir()) == [path]
    monkeypatch.chdir(path)
    for place in (tmp_path, path, Path(".")):
        with pytest.raises(ValueError, match="would be replaced"), atomic_folder(place):
            pass
    with pytest.raises(ValueError, match="is a file"), atomic_folder(path / "code" / "2"):
        pass


# -------------------------------------------------------------------------------------------------------------- guards


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals(number: int, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    received = []
    before = {n: signal.signal(n, lambda n, frame: received.append(n)) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        handlers = [signal.getsignal(n) for n in before]
        with SignalStop() as stop:
            assert not stop.agreed(accelerator)
            signal.raise_signal(number)
            assert stop.requested and stop.agreed(accelerator) and stop.received == number
            signal.raise_signal(number)  # the launcher forwards Ctrl-C: not a second request
            assert received == []
            monkeypatch.setattr(guards, "SECOND_SIGNAL_AFTER", 0.0)
            signal.raise_signal(number)
            assert received == [number]
        assert [signal.getsignal(n) for n in before] == handlers
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def test_check_finite(accelerator: Accelerator, caplog: pytest.LogCaptureFixture) -> None:
    good = {"loss_mask": torch.tensor(1.0), "grad_norm": 2.0, "count": torch.tensor(3)}
    assert check_finite(accelerator, 5, good, ["a.png"])
    assert check_finite(accelerator, 5, {}, [])
    bad = good | {"loss_mask": torch.tensor(float("nan")), "cost": torch.tensor([[1.0, -float("inf")]])}
    with pytest.raises(FloatingPointError, match="Step 5: loss_mask is nan and cost is -inf for a.png, b.png"):
        check_finite(accelerator, 5, bad, ["a.png", "b.png"])
    with caplog.at_level(logging.WARNING):
        assert not check_finite(accelerator, 6, {"loss": float("inf")}, [], "skip")
    assert "Step 6: loss is inf for an empty batch. The step is skipped." in caplog.text
    with pytest.raises(ValueError, match="expected 'stop' or 'skip'"):
        check_finite(accelerator, 5, good, [], "ignore")


# ------------------------------------------------------------------------------------------------------- two processes


def launch(folder: Path, *arguments: str, processes: int = 2) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, __file__, str(folder), *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    launch(tmp_path, "first")
    launch(tmp_path, "resume")
    for rank in range(2):
        expected, found = (load_file(tmp_path / f"{name}-{rank}.safetensors") for name in ("whole", "resumed"))
        assert expected.keys() == found.keys()
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    with pytest.raises(CheckpointError, match="written by 2 processes, but this training has 1"):
        reset()
        store = CheckpointStore(tmp_path / "run")
        store.load(make_accelerator(), store.latest(), *toy())


def run_rank(folder: Path, task: str) -> None:
    """The work of each of the two processes."""
    accelerator = make_accelerator()
    rank, store = accelerator.process_index, CheckpointStore(folder / "run")
    assert accelerator.num_processes == 2
    if task == "resume":
        save_file(train(accelerator, store, resume=True), folder / f"resumed-{rank}.safetensors")
        return
    save_file(train(accelerator, store), folder / f"whole-{rank}.safetensors")
    train(accelerator, store, stop_at=7)
    newest = store.latest(accelerator)

    original, checkpoint_store.rng_state = checkpoint_store.rng_state, lambda device: 1 / (1 - rank)
    for failing in ("one process fails in writing", "no process fails"):
        try:
            save_step(CheckpointStore(folder / "run", keep=3), accelerator, 8)
        except CheckpointError as error:
            assert "ZeroDivisionError" in str(error) and failing.startswith("one"), error
        checkpoint_store.rng_state = original
        if failing.startswith("one"):
            assert store.latest(accelerator) == newest
        accelerator.wait_for_everyone()
    if rank == 0:
        os.truncate(folder / "run" / "step-00000008" / "model.safetensors", 9)
    assert store.latest(accelerator) == newest  # the first process decides

    stop = SignalStop()
    assert not stop.agreed(accelerator)
    stop.requested = rank == 1
    assert stop.agreed(accelerator)
    terms = {"loss": torch.tensor(float("nan") if rank == 1 else 0.0)} | ({"extra": 1.0} if rank == 0 else {})
    assert not check_finite(accelerator, 3, terms, [f"{rank}.png"], "skip")
    try:
        check_finite(accelerator, 3, terms, [f"{rank}.png"])
    except FloatingPointError as error:
        assert "loss is nan for 1.png" in str(error) and "0.png" not in str(error)
    else:
        raise AssertionError("not stopped")


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]), sys.argv[2])
    torch.distributed.barrier()  # gloo threads that release tensors while Python exits abort the process
    torch.distributed.destroy_process_group()
