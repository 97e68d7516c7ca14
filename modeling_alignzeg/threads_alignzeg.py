# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Inference of several images at a time on a CPU: one image per core is faster than all cores on one image after the other,
because the cores do not wait for each other after every step (docs/experiments.md, Speed)."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from typing import TypeVar

import torch
from torch import nn
from torch.overrides import _get_current_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode


Part = TypeVar("Part")
Result = TypeVar("Result")


def is_watched() -> bool:
    """Whether something records the operators of the calling thread, such as a tracer or a counter of FLOPs."""
    modes = _get_current_dispatch_mode(), _get_current_function_mode()
    return torch.jit.is_tracing() or any(mode is not None for mode in modes)


def has_hooks(model: nn.Module) -> bool:
    """Whether code that is not the model's runs in its forward pass: hooks of torch or accelerate."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook") for module in model.modules()
    )


@contextmanager
def shared_threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of `workers` threads, which share the calling thread's number of torch threads."""
    threads, started = torch.get_num_threads(), Barrier(workers + 1)

    def start() -> None:
        torch.get_num_threads()  # torch gives a thread its default at the first use, also after `set_num_threads`
        torch.set_num_threads(max(1, threads // workers))
        started.wait()

    with ThreadPoolExecutor(workers, initializer=start) as pool:
        try:
            for _ in range(workers):
                pool.submit(int)
            started.wait()
        except BaseException:
            started.abort()
            raise
        torch.set_num_threads(threads)  # the workers have also changed the default of new threads
        yield pool


def map_in_threads(function: Callable[[Part], Result], parts: list[Part], workers: int) -> list[Result]:
    """Results of `function` for `parts`, `workers` at a time, without gradients. If their number is not a multiple of
    `workers`, the last ones run one by one with all threads."""
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad
    autocast = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")

    def call(part: Part) -> Result:  # modes apply to single threads
        with mode(), torch.autocast("cpu", *autocast):
            return function(part)

    shared = len(parts) // workers * workers
    with shared_threads(workers) as pool:
        results = list(pool.map(call, parts[:shared]))
    return results + [function(part) for part in parts[shared:]]
