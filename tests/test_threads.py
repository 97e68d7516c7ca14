# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Inference of a batch on a CPU: several images at a time in threads, with the results of the whole batch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from tiny import tiny_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from modeling_alignzeg import AlignZegModel, modeling_alignzeg
from modeling_alignzeg.threads_alignzeg import map_in_threads, shared_threads


SIDE = 32


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> AlignZegModel:
    """A model for which images of `SIDE` pixels are large."""
    monkeypatch.setattr(modeling_alignzeg, "IMAGE_PIXELS", SIDE**2)
    return tiny_model()


@pytest.fixture
def ran_in_threads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], int]]:
    """Sizes of the parts and the number of workers, for each call."""
    calls = []

    def spy(function, parts, workers):
        calls.append(([len(part.pixel_values) for part in parts], workers))
        return map_in_threads(function, parts, workers)

    monkeypatch.setattr(modeling_alignzeg, "map_in_threads", spy)
    return calls


def images(count: int, side: int = SIDE) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def default_threads() -> int:
    """The number of torch threads that a new thread gets."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 9])
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_results_are_those_of_the_whole_batch(model, ran_in_threads, count: int, threads: int) -> None:
    torch.set_num_threads(threads)
    pixel_values, pixel_mask = images(count), torch.ones(count, SIDE, SIDE)
    pixel_mask[0, :, 20:] = 0
    whole = model(pixel_values, pixel_mask)
    with torch.no_grad():
        outputs = model(pixel_values, pixel_mask)
    assert ran_in_threads == [([1] * count, min(threads, count, 4))]
    for name in outputs:
        torch.testing.assert_close(outputs[name], whole[name], rtol=1e-4, atol=1e-5, msg=name)
    assert torch.get_num_threads() == default_threads() == threads


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("autocast", [False, True])
def test_modes_of_the_calling_thread_apply(model, ran_in_threads, mode, autocast: bool) -> None:
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with mode(), context:
        alone = [model(image[None]) for image in images(4)]
        assert not ran_in_threads
        outputs = model(images(4))
    assert len(ran_in_threads) == 1
    for name in outputs:
        assert outputs[name].dtype == alone[0][name].dtype and not outputs[name].requires_grad, name
        assert outputs[name].is_inference() == (mode is torch.inference_mode), name
        expected = torch.cat([single[name] for single in alone])
        torch.testing.assert_close(outputs[name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_small_images_stay_together(model, ran_in_threads) -> None:
    with torch.no_grad():
        model(images(4, SIDE // 2))
        assert not ran_in_threads
        model(images(9, SIDE // 2))  # three parts of up to four images
    assert ran_in_threads == [([3, 3, 3], 3)]


def test_each_image_runs_in_a_thread_of_its_own(model) -> None:
    """All four are in the side network at the same time."""
    together, segment = threading.Barrier(4, timeout=60), model._segment

    def meeting(*arguments, **kwargs):
        together.wait()
        return segment(*arguments, **kwargs)

    model._segment = meeting
    with torch.no_grad():
        model(images(4))


@pytest.mark.parametrize("change", ["hook", "accelerate", "quantized", "one thread", "FLOP counter", "device"])
def test_what_does_not_work_in_threads_runs_in_the_calling_one(model, ran_in_threads, change: str) -> None:
    context, names = nullcontext(), []
    if change == "hook":
        model.side_network.stem.register_forward_hook(lambda *_: names.append(threading.current_thread().name))
    elif change == "accelerate":
        model.side_network._hf_hook = object()
    elif change == "quantized":
        model.quantization_method = "bitsandbytes"
    elif change == "one thread":
        torch.set_num_threads(1)
    elif change == "FLOP counter":
        model.requires_grad_(False)  # its module tracker fails on views of trainable weights without gradients
        context = FlopCounterMode(display=False)
    else:
        context = torch.device("cpu")
    with torch.no_grad():
        expected = [model(image[None]).class_queries_logits for image in images(6)]
    names.clear()
    with context, torch.no_grad():
        outputs = model(images(6))
    assert not ran_in_threads
    torch.testing.assert_close(outputs.class_queries_logits, torch.cat(expected), rtol=1e-4, atol=1e-5)
    if change == "hook":
        assert names == [threading.main_thread().name] * 2  # four images, then two
    if change == "FLOP counter":
        with FlopCounterMode(display=False) as single, torch.no_grad():
            model(images(1))
        assert context.get_total_flops() == 6 * single.get_total_flops()


def test_threads_keep_their_share_and_others_their_number() -> None:
    with shared_threads(3) as pool:
        assert torch.get_num_threads() == default_threads() == 4

        def count(index: int) -> int:
            torch.ones(100_000).sum()
            return torch.get_num_threads()

        assert list(pool.map(count, range(9))) == [1] * 9
    with shared_threads(2) as pool:
        assert list(pool.map(count, range(9))) == [2] * 9
    assert torch.get_num_threads() == default_threads() == 4


def test_an_error_reaches_the_caller(model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.side_network, "forward", fail)
    with torch.no_grad(), pytest.raises(RuntimeError, match="out of memory"):
        model(images(5))
    assert torch.get_num_threads() == default_threads() == 4


def test_a_thread_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def limited(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        with shared_threads(2):
            pass
    monkeypatch.undo()
    assert torch.get_num_threads() == 4
