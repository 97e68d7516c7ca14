# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""scripts/train.py, killed at random moments, stopped by signals and resumed from damaged checkpoints, gives the same
bytes as an uninterrupted training.

Trainings are real processes, forked from a server that has imported everything, so that each takes only 1 to 2 seconds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import tiny


ROOT = Path(__file__).resolve().parent.parent
STEPS = 8
# Ten images in batches of two: with accumulation, a step may start in one epoch and end in the next.
SETTINGS = {
    "data.num_train": 10,
    "data.num_validation": 2,
    "data.transform": "{crop_size: 32, scale_range: [0.5, 1.0]}",
    "training.steps": STEPS,
    "training.batch_size": 2,
    "training.warmup_steps": 2,
    "training.log_every": 1,
    "training.evaluate_every": 3,
    "training.save_every": 1,
    "training.num_threads": 1,
    "training.tensorboard": False,
}
VARIANTS = {
    "one process": (1, {}),
    "accumulation": (1, {"training.gradient_accumulation_steps": 3}),
    "two processes": (2, {"training.batch_size": 1}),
    "two processes with accumulation": (2, {"training.batch_size": 1, "training.gradient_accumulation_steps": 2}),
}
KILLS = {"one process": 10, "accumulation": 8, "two processes": 6, "two processes with accumulation": 6}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="trainings are forked"),
]


def run_training(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    """A process of a training: `scripts/train.py` with its output in a file."""
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["train.py", *arguments]
    runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")


class Training:
    """A training in `output`, of one or more processes."""

    def __init__(self, context, start: Path, output: Path, variant: str):
        self.output, self.log = output, output.with_suffix(".log")
        self.log.unlink(missing_ok=True)
        count, changes = VARIANTS[variant]
        values = {**SETTINGS, **changes, "model.checkpoint": start, "output_dir": output}
        arguments = [part for name, value in values.items() for part in (f"--{name}", str(value))]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes: list[BaseProcess] = []
        for rank in range(count):
            environment = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
            if count > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            self.processes.append(context.Process(target=run_training, args=(arguments, str(self.log), environment)))
        for process in self.processes:
            process.start()

    @property
    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def wait_for(self, condition: Callable[[], object]) -> bool:
        """Waits until the condition holds (true) or the training has ended (false)."""
        while not condition():
            if not self.is_alive:
                return bool(condition())
            time.sleep(0.0005)
        return True

    def stop(self, number: int, which: slice = slice(None)) -> list[int | None]:
        for process in self.processes[which]:
            if process.is_alive():
                os.kill(process.pid, number)
        return self.statuses()

    def statuses(self) -> list[int | None]:
        for process in self.processes:
            process.join(600)
        return [process.exitcode for process in self.processes]

    def finish(self) -> str:
        assert set(self.statuses()) == {0}, self.log.read_text()
        return self.log.read_text()


class Lab:
    """Starts trainings, and stores the results of the uninterrupted ones."""

    def __init__(self, folder: Path):
        self.folder = folder
        os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "scripts", ROOT / "tests")))
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["zeroshot.training.trainer", "tiny"])
        self.start_checkpoint = tiny.tiny_checkpoint(folder / "start")
        self.wholes: dict[str, dict[str, object]] = {}
        self.seconds: dict[str, float] = {}

    def train(self, output: str, variant: str) -> Training:
        return Training(self.context, self.start_checkpoint, self.folder / output, variant)

    def whole(self, variant: str) -> dict[str, object]:
        """The results of an uninterrupted training."""
        if variant not in self.wholes:
            training = self.train(f"whole {variant}", variant)
            training.wait_for((training.output / "settings.json").exists)
            started = time.monotonic()
            training.finish()
            self.seconds[variant] = time.monotonic() - started
            self.wholes[variant] = ending(training.output)
        return self.wholes[variant]


def ending(output: Path) -> dict[str, object]:
    """The bytes of the final and the best model and of the optimizer, and the lines of metrics.jsonl."""
    files = [output / folder / "model.safetensors" for folder in ("final", "best")]
    # Without the generators' states: a resumed loader draws again, and every step seeds the generators with its number.
    files += [output / "checkpoints" / f"step-{STEPS:08d}" / f"{name}.safetensors" for name in ("model", "training")]
    result: dict[str, object] = {str(file.relative_to(output)): file.read_bytes() for file in files}
    result["metrics"] = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return result


def assert_same(found: dict[str, object], expected: dict[str, object]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory):
    before = os.environ.get("PYTHONPATH")
    yield Lab(tmp_path_factory.mktemp("kills"))
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def test_metrics_name_every_step_once(lab: Lab) -> None:
    metrics = lab.whole("one process")["metrics"]
    assert [line["step"] for line in metrics if "train/loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in metrics if "validation/hiou" in line] == [3, 6, STEPS]


@pytest.mark.parametrize(
    ("variant", "number"), [(variant, number) for variant, kills in KILLS.items() for number in range(kills)]
)
def test_killed_at_a_random_moment_it_ends_in_the_same_bytes(lab: Lab, variant: str, number: int) -> None:
    """Every other kill happens while a checkpoint is being written, the rest at random moments."""
    expected = lab.whole(variant)
    chance = random.Random(f"{variant} {number}")
    output = lab.folder / f"killed {variant} {number}"
    kills, wanted = 0, chance.choice([1, 1, 2])
    while kills < wanted:
        training = lab.train(output.name, variant)
        if number % 2:
            done = [int(path.name[5:]) for path in output.glob("checkpoints/step-*")]
            step = chance.randint(min(max([0, *done]) + 1, STEPS), STEPS)
            training.wait_for((output / "checkpoints" / f".step-{step:08d}.partial").exists)
            time.sleep(chance.choice([0, 0.001, 0.003]))
        else:
            (output / "settings.json").unlink(missing_ok=True)
            training.wait_for((output / "settings.json").exists)
            time.sleep(chance.uniform(0, lab.seconds[variant]))
        statuses = training.stop(signal.SIGKILL)
        if -signal.SIGKILL in statuses:
            kills += 1
        else:  # too late, it had ended
            assert set(statuses) == {0}, training.log.read_text()
            shutil.rmtree(output)
    lab.train(output.name, variant).finish()
    assert_same(ending(output), expected)
    assert not list(output.rglob(".*")), "nothing half written is left"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("variant", ["accumulation", "two processes"])
def test_a_signal_writes_a_checkpoint_first(lab: Lab, variant: str, number: int) -> None:
    """Only one of two processes gets the signal; both stop after the same step."""
    expected = lab.whole(variant)
    output = lab.folder / f"signal {variant} {number}"
    training = lab.train(output.name, variant)
    assert training.wait_for((output / "checkpoints" / "step-00000002").exists)
    statuses = training.stop(number, slice(-1, None))
    text = training.log.read_text()
    newest = max(int(path.name[5:]) for path in output.glob("checkpoints/step-*"))
    assert 2 <= newest < STEPS and f"Stopped by a signal at step {newest}; run the same command to resume" in text
    assert 128 + number in statuses and all(status and status > 128 for status in statuses), text
    text = lab.train(output.name, variant).finish()
    assert f"Resuming at step {newest}" in text
    assert_same(ending(output), expected)


# --- damage


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def flip_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def swap(path: Path, one: str, other: str) -> None:
    os.rename(path / one, path / "aside")
    os.rename(path / other, path / one)
    os.rename(path / "aside", path / other)


def from_the_earlier(path: Path, name: str) -> None:
    earlier = path.with_name(f"step-{int(path.name[5:]) - 1:08d}")
    shutil.copyfile(earlier / name, path / name)


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut short": (lambda p: os.truncate(p / "model.safetensors", 1000), "model.safetensors has 1000 bytes"),
    "empty optimizer": (lambda p: os.truncate(p / "training.safetensors", 0), "training.safetensors has 0 bytes"),
    "flipped bit in a weight": (lambda p: flip_bit(p / "model.safetensors", -1), "model.safetensors has changed"),
    "flipped bit in a header": (lambda p: flip_bit(p / "training.safetensors", 0), "training.safetensors has changed"),
    "zeros for the generators": (lambda p: zeros(p / "rng-00000.safetensors"), "rng-00000.safetensors has changed"),
    "missing generators": (lambda p: (p / "rng-00000.safetensors").unlink(), "rng-00000.safetensors is missing"),
    "swapped files": (lambda p: swap(p, "model.safetensors", "training.safetensors"), ".safetensors has"),
    "weights of another step": (lambda p: from_the_earlier(p, "model.safetensors"), "model.safetensors has changed"),
    "manifest of another step": (lambda p: from_the_earlier(p, "manifest.json"), "manifest.json belongs to step"),
    "wrong hash": (
        lambda p: edit_json(p / "manifest.json", lambda m: m["files"]["progress.json"].update(sha256="0" * 64)),
        "progress.json has changed",
    ),
    "no JSON": (
        lambda p: (p / "manifest.json").write_text('{"format": 1,'),
        "manifest.json does not have the expected",
    ),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
}


@pytest.fixture(scope="module")
def stopped(lab: Lab) -> Path:
    """A training stopped after some steps, with two checkpoints."""
    training = lab.train("stopped", "one process")
    assert training.wait_for((training.output / "checkpoints" / "step-00000003").exists)
    training.stop(signal.SIGTERM)
    assert len(list((training.output / "checkpoints").iterdir())) == 2
    return training.output


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(lab: Lab, stopped: Path, kind: str) -> None:
    expected = lab.whole("one process")
    damage, words = DAMAGE[kind]
    output = lab.folder / f"damaged {kind}"
    shutil.copytree(stopped, output)
    earlier, newest = sorted((output / "checkpoints").iterdir())
    damage(newest)
    text = lab.train(output.name, "one process").finish()
    assert str(newest) in text and words in text and f"from {earlier}" in text
    assert_same(ending(output), expected)


def test_no_usable_checkpoint_is_an_error_without_traceback(lab: Lab, stopped: Path) -> None:
    output = lab.folder / "all damaged"
    shutil.copytree(stopped, output)
    for checkpoint in (output / "checkpoints").iterdir():
        (checkpoint / "progress.json").write_text("null")
    training = lab.train(output.name, "one process")
    assert training.statuses() == [1]
    text = training.log.read_text()
    assert "train.py: No checkpoint in" in text and "Restore an intact copy" in text and "Traceback" not in text


def test_another_model_is_refused(lab: Lab, stopped: Path) -> None:
    output = lab.folder / "another model"
    shutil.copytree(stopped, output)
    other = tiny.tiny_checkpoint(lab.folder / "other", seed=1, num_queries=5)
    training = Training(lab.context, other, output, "one process")
    assert training.statuses() == [1]
    text = training.log.read_text()
    assert "query_embeddings" in text and "resume with the options" in text and "Traceback" not in text
