# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Several processes take the same steps as one, count the same pixels, and never run separately unnoticed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from conftest import ROOT

from zeroshot import launching
from zeroshot.launching import check_unsharded, start_processes


PRESET = ROOT / "scripts" / "configs" / "accelerate" / "two_cpu_processes.yaml"
# Tests may run in a launched process themselves, so child processes must not inherit the launcher's variables.
LAUNCHER = ("ACCELERATE_", "MASTER_", "WORLD_SIZE", "RANK", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER)}
ENVIRONMENT |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def launch(
    script: str, *arguments: object, processes: int = 2, flags: list[str] | None = None, status: int = 0
) -> str:
    """Runs a script, with the preset or with `flags` of accelerate's launcher, and returns its output."""
    launcher = ["-m", "accelerate.commands.launch", *(flags or ["--config_file", str(PRESET)])]
    command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "scripts" / script)]
    result = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, timeout=600, check=False
    )
    assert (result.returncode == 0) == (status == 0), result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout + result.stderr


def train(checkpoint: Path, output: Path, processes: int, batch_size: int) -> list[dict[str, float]]:
    """The losses of ten steps, one dictionary of all terms per step."""
    settings = {
        "model.checkpoint": checkpoint,
        "output_dir": output,
        "data.num_train": 12,
        "data.transform": "{crop_size: 64, scale_range: [0.5, 1.0]}",
        "training.steps": 10,
        "training.batch_size": batch_size,
        "training.warmup_steps": 2,
        "training.learning_rate": 1e-3,
        "training.log_every": 1,
        "training.evaluate_every": 0,
        "training.save_every": 0,
        "training.tensorboard": False,
    }
    launch(
        "train.py", *(part for name, value in settings.items() for part in (f"--{name}", value)), processes=processes
    )
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    return lines


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    # All mask cells instead of sampled points, and no mixtures: the remaining randomness is per step, not per process.
    checkpoint = tiny.tiny_checkpoint(tmp_path / "start", train_num_points=None, feature_expansion=False)
    one = train(checkpoint, tmp_path / "one", processes=1, batch_size=4)
    two = train(checkpoint, tmp_path / "two", processes=2, batch_size=2)
    for expected, found in zip(one, two, strict=True):
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert math.isclose(value, found[name], rel_tol=1e-4, abs_tol=1e-4), (expected["step"], name)
    assert len({line["train/loss"] for line in one}) == 10  # each step used different images


@pytest.mark.slow
def test_two_processes_train_with_pairs_of_their_own(tmp_path: Path) -> None:
    checkpoint = tiny.tiny_checkpoint(tmp_path / "start", train_num_points=None)
    lines = train(checkpoint, tmp_path / "run", processes=2, batch_size=2)
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[-1]["train/loss_virtual"] > 0  # in the first step the adapter is the identity
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


@pytest.mark.slow
def test_two_processes_count_the_pixels_of_one(tmp_path: Path) -> None:
    checkpoint = tiny.tiny_checkpoint(tmp_path / "start")
    flags = ["--model", checkpoint, "--limit", 5, "--batch_size", 2, "--segments"]  # an odd number: the shares differ
    for processes in (1, 2):
        launch("evaluate.py", *flags, "--output", tmp_path / f"{processes}.json", processes=processes)
    one, two = (json.loads((tmp_path / f"{processes}.json").read_text()) for processes in (1, 2))
    assert two["images"] == 5 and one["per_class"] == two["per_class"]
    assert one["pixel_accuracy"] == two["pixel_accuracy"]
    for kind in ("panoptic", "instances"):
        assert one["segments"][kind]["all"] == pytest.approx(two["segments"][kind]["all"])


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "predict.py"])
def test_a_launcher_that_starts_one_process_of_two_is_refused(script: str, tmp_path: Path) -> None:
    arguments = {
        "train.py": ["--output_dir", tmp_path / "run"],
        "evaluate.py": ["--output", tmp_path / "run"],
        "predict.py": ["--dataset", "embedded_scenes", "--output_dir", tmp_path / "run"],
    }[script]
    flags = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    printed = launch(script, *arguments, flags=flags, status=1)
    assert f"{script}: `accelerate launch` was asked for several processes and started one" in printed
    assert not (tmp_path / "run").exists()


# --- in this process


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in os.environ:
        if name.startswith(LAUNCHER):
            monkeypatch.delenv(name)
    yield monkeypatch
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_one_process_is_one_process(environment: pytest.MonkeyPatch) -> None:
    assert start_processes().num_processes == 1


def test_an_address_alone_is_no_launcher(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("MASTER_ADDR", "localhost")
    assert start_processes().num_processes == 1


def test_processes_that_would_work_apart_are_refused(environment: pytest.MonkeyPatch) -> None:
    class Alone:
        def __init__(self, **options):
            self.num_processes, self.distributed_type = 1, "NO"

    environment.setattr(launching, "Accelerator", Alone)
    environment.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="started 2 processes, but 1 would work together"):
        start_processes()


def test_one_process_where_several_were_asked_for_is_refused(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("ACCELERATE_MIXED_PRECISION", "no")
    environment.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(RuntimeError, match="asked for several processes and started one"):
        start_processes()


def test_sharded_weights_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"sharded .*FSDP.*eight_gpus_bf16"):
        check_unsharded(DistributedType.FSDP)
    check_unsharded(DistributedType.MULTI_GPU)


@pytest.mark.parametrize("path", sorted(PRESET.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_start_as_many_processes_as_they_say(path: Path) -> None:
    preset = yaml.safe_load(path.read_text())
    assert preset["distributed_type"] in ("NO", "MULTI_GPU")  # MULTI_CPU starts one process, silently
    assert (preset["num_processes"] == 1) == (preset["distributed_type"] == "NO")
    assert preset["num_machines"] == 1 and preset["mixed_precision"] in ("no", "bf16")
