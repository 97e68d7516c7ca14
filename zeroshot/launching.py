# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Checks that a launcher started as many processes as requested."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType


HOW_TO_LAUNCH = (
    "For several processes on CPUs: accelerate launch --config_file scripts/configs/accelerate/two_cpu_processes.yaml "
    "scripts/… (or ACCELERATE_USE_CPU=true torchrun --nproc_per_node N scripts/…); on GPUs: accelerate launch "
    "--multi_gpu --num_processes N scripts/…"
)
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def start_processes(**options: Any) -> Accelerator:
    """The accelerator of this process, on the CPU if there is no other device.

    Args:
        options: Arguments of [`Accelerator`].

    Raises:
        RuntimeError: The launcher was asked for a different number of processes than would work together, or to shard the
            weights. With some flags, accelerate ignores the number silently: `--cpu --num_processes 2` starts one
            process.
    """
    # Without this, processes that a GPU launcher starts on a machine without a GPU do not connect to each other.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), **options)
    check_unsharded(accelerator.distributed_type)
    asked = os.environ.get("WORLD_SIZE")
    if asked is None:
        # accelerate's single-process launcher sets MASTER_ADDR if it was asked for more than one process.
        alone = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
        if alone and accelerator.num_processes == 1:
            raise RuntimeError(
                "`accelerate launch` was asked for several processes and started one, as it does with `--cpu`. "
                f"{HOW_TO_LAUNCH} (If you want one process, unset MASTER_ADDR.)"
            )
    elif int(asked) != accelerator.num_processes:
        raise RuntimeError(
            f"The launcher started {asked} processes, but {accelerator.num_processes} would work together "
            f"({accelerator.distributed_type}). {HOW_TO_LAUNCH}"
        )
    return accelerator


def check_unsharded(distributed_type: DistributedType) -> None:
    """
    Raises:
        RuntimeError: The weights would be sharded. Parts of the towers are called one by one, which sharding does not
            gather.
    """
    if distributed_type in SHARDED:
        raise RuntimeError(
            f"The weights would be sharded ({distributed_type}), which AlignZeg does not support: few of them are trained, "
            "so data parallelism is enough. Use scripts/configs/accelerate/eight_gpus_bf16.yaml, or `accelerate launch "
            "--multi_gpu`."
        )
