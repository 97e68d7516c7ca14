# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The arithmetic of the scores. It lives with the `evaluate` module, whose folder has to be complete by itself."""

from metrics.hiou.scoring import confusion_matrix, scores_from_confusion


__all__ = ["confusion_matrix", "scores_from_confusion"]
