# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Non-finite values stop a training or skip the step, with a report of step, term and images; batches without labels
work."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from modeling_alignzeg import modeling_alignzeg
from zeroshot.data.scenes import CLASSES, scenes_dataset
from zeroshot.data.splits import load_split
from zeroshot.settings import load_settings
from zeroshot.training.trainer import Trainer


SETTINGS = {
    "data.num_train": 8,
    "data.validate": False,
    "data.transform": "{crop_size: 32}",
    "training.steps": 4,
    "training.batch_size": 2,
    "training.gradient_accumulation_steps": 2,
    "training.warmup_steps": 1,
    "training.log_every": 1,
    "training.evaluate_every": 0,
    "training.save_every": 0,
    "training.tensorboard": False,
}
BAD_STEP, BAD_MICRO_STEP = 2, 0  # the first part of an accumulated step, so that its other batch is skipped too


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("numerics") / "start")


def make_trainer(checkpoint: Path, output: Path, **changes: object) -> Trainer:
    values = {**SETTINGS, "model.checkpoint": checkpoint, "output_dir": output, **changes}
    return Trainer(load_settings([part for name, value in values.items() for part in (f"--{name}", str(value))]))


@pytest.fixture
def trainer(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Trainer]]:
    """Makes a trainer on the CPU, and resets Accelerate's global state afterwards."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    def make(**changes: object) -> Trainer:
        reset()
        return make_trainer(checkpoint, tmp_path / "run", **changes)

    yield make
    reset()


def nan_in_a_loss_term(trainer: Trainer, is_bad: Callable[[], bool]) -> None:
    original = trainer.model._losses

    def losses(*args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        result = original(*args, **kwargs)
        factor = float("nan") if is_bad() else 1.0
        return result | {"loss_dice": factor * result["loss_dice"], "loss": result["loss"] + 0 * factor}

    trainer.model._losses = losses


def infinity_in_a_gradient(trainer: Trainer, is_bad: Callable[[], bool]) -> None:
    trainer.model.side_network.query_embeddings.register_hook(lambda gradient: gradient / (0.0 if is_bad() else 1.0))


def infinity_in_a_cost(trainer: Trainer, is_bad: Callable[[], bool]) -> None:
    """In the second image of the batch, from the masks."""
    original = modeling_alignzeg.match_proposals

    def match(masks: torch.Tensor, *args: object) -> object:
        if is_bad():
            masks = masks.clone()
            masks[1, 0] = float("inf")
        return original(masks, *args)

    modeling_alignzeg.match_proposals = match


FAULTS = {
    "loss": (nan_in_a_loss_term, "loss is nan.* and loss_dice is nan"),
    "gradient": (infinity_in_a_gradient, "gradient norm is (inf|nan)"),
    "cost": (infinity_in_a_cost, r"mask cost of the matching is (inf|nan|-inf)"),
}


def watch(trainer: Trainer) -> tuple[Callable[[], bool], list[list[str]], list[dict[str, torch.Tensor]]]:
    """Whether the bad micro-step is being taken; the names of every batch so far; the weights before every step."""
    names: list[list[str]] = []
    weights: list[dict[str, torch.Tensor]] = []
    batches, step = trainer.micro_batches, trainer.optimizer_step

    def watched_batches() -> Iterator[dict[str, object]]:
        for batch in batches():
            names.append(list(batch["names"]))
            yield batch

    def watched_step(*args: object) -> object:
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        return step(*args)

    trainer.micro_batches, trainer.optimizer_step = watched_batches, watched_step
    number = trainer.settings.training.gradient_accumulation_steps * BAD_STEP + BAD_MICRO_STEP
    return lambda: len(names) == number + 1, names, weights


@pytest.mark.parametrize("fault", FAULTS)
def test_training_stops_with_step_term_and_images(
    trainer: Callable[..., Trainer], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_alignzeg, "match_proposals", modeling_alignzeg.match_proposals)
    broken = trainer()
    is_bad, names, _ = watch(broken)
    cause, words = FAULTS[fault]
    cause(broken, is_bad)
    with pytest.raises(FloatingPointError, match=rf"Step {BAD_STEP}: .*{words}.* for ") as error:
        broken.run()
    first, second = names[2 * BAD_STEP : 2 * BAD_STEP + 2]
    told = str(error.value).split(" for ")[-1].split(". Check these images")[0].split(", ")
    assert told == ([first[1]] if fault == "cost" else first + second)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_can_be_skipped(
    trainer: Callable[..., Trainer], fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(modeling_alignzeg, "match_proposals", modeling_alignzeg.match_proposals)
    broken = trainer(**{"training.on_nan": "skip"})
    is_bad, names, weights = watch(broken)
    cause, words = FAULTS[fault]
    cause(broken, is_bad)
    with caplog.at_level(logging.WARNING):
        broken.run()
    assert f"Step {BAD_STEP}: " in caplog.text and "The step is skipped." in caplog.text
    assert len(names) == 2 * SETTINGS["training.steps"], "the other batch of the skipped step is used up"
    after = {name: p.detach() for name, p in broken.model.named_parameters()}
    moved = [
        any(not torch.equal(old[name], new[name]) for name in old) for old, new in zip(weights, [*weights[1:], after])
    ]
    assert moved == [step != BAD_STEP for step in range(SETTINGS["training.steps"])]
    assert all(value.isfinite().all() for value in after.values())
    lines = (broken.output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 4], "nothing is reported for a skipped step"


def test_a_batch_without_any_labelled_pixel(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    """The first half of the images has no labels, so some batches have none."""
    rows = scenes_dataset("train", 6)
    nothing = Image.fromarray(np.full((128, 128), 255, np.uint8))
    rows = rows.map(
        lambda row, index: {"label": nothing if index < 4 else row["label"]}, with_indices=True, features=rows.features
    )
    rows.save_to_disk(tmp_path / "data")
    classes = {"classes": list(CLASSES), "unseen": list(load_split("embedded_scenes").unseen)}
    (tmp_path / "split.yaml").write_text(json.dumps(classes))
    changes = {"data.dataset": tmp_path / "data", "data.split": tmp_path / "split.yaml", "data.num_train": 6}
    changes |= {"training.gradient_accumulation_steps": 1, "training.batch_size": 1, "training.steps": 12}
    run = trainer(**changes, **{"data.validate": True})
    empty = []
    batches = run.micro_batches

    def watched() -> Iterator[dict[str, object]]:
        for batch in batches():
            empty.append(not any(mask.any() for mask in batch["mask_labels"]))
            yield batch

    run.micro_batches = watched
    run.run()
    metrics = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == len(empty) == 12 and sum(empty) == 8
    for is_empty, line in zip(empty, metrics):
        assert all(math.isfinite(value) for value in line.values())
        assert (line["train/loss_mask"] == 0) == (line["train/loss_dice"] == 0) == is_empty
        if is_empty:
            terms = ("loss_class", "loss_virtual", "loss_indicator", "loss_auxiliary")
            assert [line[f"train/{term}"] for term in terms] == [0] * 4
    assert all(p.isfinite().all() for p in run.model.parameters())


# --- two processes


def diverge(rank: int, port: int, folder: str, action: str, log: str) -> None:
    """A training in which only the second process has a cost that is not finite."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 2)
    trainer = make_trainer(Path(folder) / "start", Path(folder) / action, **{"training.on_nan": action})
    is_bad, names, _ = watch(trainer)
    infinity_in_a_cost(trainer, (lambda: False) if rank == 0 else is_bad)
    try:
        trainer.run()
    except FloatingPointError as error:
        [culprit] = [names[2 * BAD_STEP][1]] if rank == 1 else [None]
        assert culprit is None or str(error).split(" for ")[-1].startswith(f"{culprit}. Check"), error
        sys.exit(f"stopped: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("action", ["stop", "skip"])
def test_two_processes_stop_or_skip_together(checkpoint: Path, action: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = checkpoint.parent / f"{action}.log"
    context = multiprocessing.get_context("spawn")
    arguments = [(rank, port, str(checkpoint.parent), action, str(log)) for rank in range(2)]
    processes = [context.Process(target=diverge, args=values) for values in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    text = log.read_text()
    assert [process.exitcode for process in processes] == ([1, 1] if action == "stop" else [0, 0]), text
    assert f"Step {BAD_STEP}: mask cost of the matching is" in text
    assert text.count("stopped: ") == (2 if action == "stop" else 0)
