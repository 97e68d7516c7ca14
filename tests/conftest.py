# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Makes the scripts and the model's code importable."""

import sys
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "scripts"))  # last: scripts/evaluate.py must not hide the library of that name

# Small models are fastest on one thread, sums come out the same on every machine, and tests that fork this process
# must not find it with OpenMP threads that a child does not have.
torch.set_num_threads(1)
