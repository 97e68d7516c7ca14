# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Metrics as `evaluate` modules; each folder is self-contained."""
