# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Two guards for the training loop: signals become a wish to stop, and what is not finite is noticed by all processes."""

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

SECOND_SIGNAL_AFTER = 3.0  # seconds; within them, a launcher passing on Ctrl-C is not a second request


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

    Attributes:
        requested: Whether this process got a signal.
        received: Its number, `None` before; `128 + received` is the customary exit status.
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
        """Whether to stop, with the same answer on every process: all of them call it equally often.

        With one process it costs nothing; with several, it is a reduction of one number.
        """
        return self.requested if accelerator.num_processes == 1 else _any_process(accelerator, self.requested)

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
