# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Makes the scripts and the model's code importable."""

import sys
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "scripts"))  # last: scripts/evaluate.py must not shadow the library of that name

# One thread is fastest for small models and makes sums reproducible. Tests also fork this process, and a child does not
# inherit OpenMP threads.
torch.set_num_threads(1)
