# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What the scripts share: data sets and splits, the embedded scenes, transforms, the training loop, evaluation."""
