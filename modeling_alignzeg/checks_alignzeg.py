# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Whether an argument is a tensor that the model can read. Only types are looked at, never values: what runs on a GPU
need not wait, and exported and compiled models stay in one piece."""

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
        device: Where it will be used: a tensor on `meta`, which has no values, goes with a model on `meta` only.
        hint: What to do, a sentence.

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
