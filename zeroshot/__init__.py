# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The package behind the scripts: data, training, evaluation, metrics and checkpoints of AlignZeg."""
