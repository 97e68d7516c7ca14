# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Benchmarks as `datasets.Dataset`: splits, files, synthetic scenes, transforms."""
