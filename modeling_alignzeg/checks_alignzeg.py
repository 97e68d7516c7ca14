# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Type checks for tensor arguments. Values are never read: that would synchronize with the GPU and break the graph of
exported and compiled models."""

from typing import Any

import torch
from torch import Tensor


KINDS = {
    "floating-point numbers": lambda dtype: dtype.is_floating_point,
    "whole numbers": lambda dtype: not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool),
    "real numbers": lambda dtype: not dtype.is_complex,
    "True and False": lambda dtype: dtype == torch.bool,
}


def check_tensor(name: str, value: Any, kind: str, device: torch.device | None = None, hint: str = "") -> None:
    """
    Args:
        kind: One of `KINDS`.
        device: Device of the model; a tensor on `meta`, which has no values, is accepted only by a model on `meta`.
        hint: A sentence that says what to do.

    Raises:
        ValueError: `value` is not a dense tensor of this kind.
    """
    if not isinstance(value, Tensor):
        came = f"a {type(value).__name__}"
    else:
        if (
            not value.is_nested
            and value.layout == torch.strided
            and KINDS[kind](value.dtype)
            and (value.device.type != "meta" or (device is not None and device.type == "meta"))
        ):
            return
        layout = "nested" if value.is_nested else value.layout
        came = f"a tensor of type {value.dtype} ({layout}, {value.device})".replace("torch.", "")
    raise ValueError(f"`{name}` is {came}; expected a dense torch tensor of {kind}.{hint and ' ' + hint}")
