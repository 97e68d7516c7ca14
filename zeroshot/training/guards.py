# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Two guards for the training loop: stop requests by signal, and detection of non-finite values on all processes."""

from __future__ import annotations

import logging
import os
import signal
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object


logger = logging.getLogger(__name__)

SECOND_SIGNAL_AFTER = 3.0  # seconds; an earlier signal may be a launcher that forwards Ctrl-C


class SignalStop:
    """Sets a flag on SIGTERM and Ctrl-C, so that the loop can write a checkpoint before it ends.

    A second signal, at least [`SECOND_SIGNAL_AFTER`] seconds after the first, has its original effect.

    ```
    with SignalStop() as stop:
        for batch in loader:
            ...
            if stop.agreed(accelerator):
                break
    ```

    Attributes:
        requested: Whether this process received a signal.
        received: Number of the signal, `None` before; `128 + received` is the usual exit status.
    """

    def __init__(self) -> None:
        self.requested = False
        self.received: int | None = None
        self._since = 0.0
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
        """Whether to stop, with the same result on every process; all processes must call it equally often.

        With one process it is free; with several, it is a reduction of one number.
        """
        return self.requested if accelerator.num_processes == 1 else _any_process(accelerator, self.requested)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self.received, self._since = True, number, time.monotonic()
            name = signal.Signals(number).name
            with suppress(OSError):  # logging is not safe here
                os.write(2, f"{name}: stopping after this step, with a checkpoint; repeat to stop now.\n".encode())
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
    """Checks loss terms, matching costs and gradient norms for NaN and infinity, on all processes together.

    All processes call it once per step, before `optimizer.step()`; the terms may differ between processes. It needs one
    synchronization with the device. (The first steps of a gradient scaler have infinite gradient norms, and the scaler
    skips them itself: with fp16, leave the norm out.)

    Args:
        accelerator: Accelerator of the processes, which all get the same result.
        step: Number of the optimizer step, for the message.
        terms: Tensors of any shape, by name.
        names: Names of the images in this process's batch.
        action: Action if a term of any process is not finite: `"stop"` raises, `"skip"` logs and returns `False`.

    Returns:
        Whether to take the step.

    Raises:
        FloatingPointError: With `"stop"`, on every process; the message has the step, the terms and the images.
    """
    if action not in ("stop", "skip"):
        raise ValueError(f"`action` is {action!r}; expected 'stop' or 'skip'.")
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
        raise FloatingPointError(f"{message} Check these images, lower the learning rate, or skip such steps.")
    if accelerator.is_main_process:
        logger.warning("%s The step is skipped.", message)
    return False


def _any_process(accelerator: Accelerator, flag: bool | torch.Tensor) -> bool:
    """Whether `flag` is true on any process; reduces one number and transfers one value from the device."""
    number = torch.as_tensor(flag, device=accelerator.device).float()
    return bool(accelerator.reduce(number, reduction="sum") > 0)
