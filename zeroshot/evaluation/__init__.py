# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Scores, test-time augmentation, calibration, ablation, bulk prediction and speed."""
