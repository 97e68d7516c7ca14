# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Stores the state of a training (weights, optimizer, random number generators) as safetensors and JSON, not pickle."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file


def write_state(path: Path, value: Any) -> None:
    """Writes nested dicts, lists, tuples, numbers, strings and tensors: the structure is JSON in the file's header."""
    tensors: dict[str, torch.Tensor] = {}

    def pack(value: Any, key: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[key] = value.detach().cpu().contiguous()
            return {"!tensor": key}
        if isinstance(value, np.generic):
            return value.item()
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if type(value) is list:
            return [pack(item, f"{key}/{i}") for i, item in enumerate(value)]
        if type(value) is tuple:
            return {"!tuple": pack(list(value), key)}
        if type(value) is dict:
            return {"!dict": [[pack(k, key), pack(item, f"{key}/{k}")] for k, item in value.items()]}
        raise ValueError(
            f"{key[1:]} is a {type(value).__name__}, but a checkpoint can store only tensors, numbers, strings, lists, "
            "tuples and dicts: use an optimizer or scheduler with such a state."
        )

    structure = json.dumps(pack(value, ""))
    save_file(tensors, path, metadata={"structure": structure})


def read_state(path: Path) -> Any:
    with safe_open(path, framework="pt") as file:

        def unpack(value: Any) -> Any:
            if isinstance(value, list):
                return [unpack(item) for item in value]
            if not isinstance(value, dict):
                return value
            [(kind, content)] = value.items()
            if kind == "!tensor":
                return file.get_tensor(content)
            return tuple(unpack(content)) if kind == "!tuple" else {unpack(k): unpack(item) for k, item in content}

        return unpack(json.loads(file.metadata()["structure"]))


def model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trainable parameters (shared ones once) and the persistent buffers."""
    tensors = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = model.state_dict(keep_vars=True)
    return tensors | {name: t for name, t in state.items() if not isinstance(t, torch.nn.Parameter)}


def frozen_hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _named_groups(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    try:
        return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    except KeyError:
        raise ValueError(
            "The optimizer has a parameter that is not in the model: pass the model it was made for."
        ) from None


def optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` with parameter names instead of their indices."""
    groups = _named_groups(model, optimizer)
    names = [name for group in groups for name in group]
    state = optimizer.state_dict()
    return {
        "state": {names[number]: entry for number, entry in state["state"].items()},
        "param_groups": [group | {"params": names} for group, names in zip(state["param_groups"], groups)],
    }


def load_optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    groups = _named_groups(model, optimizer)
    if [group["params"] for group in state["param_groups"]] != groups:
        raise ValueError(
            f"The checkpoint's optimizer has {[len(group['params']) for group in state['param_groups']]} parameters "
            f"in its groups, this one has {[len(group) for group in groups]}, or their names or order differ: "
            "resume with the options with which the training was started."
        )
    number = {name: i for i, name in enumerate(name for group in groups for name in group)}
    optimizer.load_state_dict(
        {
            "state": {number[name]: entry for name, entry in state["state"].items()},
            "param_groups": [g | {"params": [number[name] for name in g["params"]]} for g in state["param_groups"]],
        }
    )


def rng_state(device: torch.device) -> dict[str, Any]:
    algorithm, key, *rest = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (algorithm, np.asarray(key).tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    if device.type != "cpu" and device.type not in state:
        raise ValueError(
            f"The checkpoint was not written on a {device.type} device: resume on the device type on which the "
            "training was started."
        )
    algorithm, key, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((algorithm, np.array(key, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[device.type])
