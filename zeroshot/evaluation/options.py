# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What predictions are asked for: class names, and PBC's correction."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from modeling_alignzeg.processing_alignzeg import check_class_names


class Vocabulary(NamedTuple):
    """Class names, those that count as unseen, and their text prototypes `(classes, D)`."""

    names: list[str]
    unseen: list[str]
    prototypes: Tensor


def load_vocabulary(
    model: Any, processor: Any, classes: list[str] | None, unseen: list[str] | None, template_set: str | None
) -> Vocabulary:
    """The classes to choose from; by default those of the checkpoint.

    Args:
        model, processor: Of the checkpoint; the model computes the text prototypes.
        classes: Their names.
        unseen: Those of them that count as unseen.
        template_set: Prompt templates, by default the checkpoint's.

    Raises:
        ValueError: A name is empty or occurs twice, or an unseen class is not among the classes.
    """
    if classes is None:
        classes = [model.config.id2label[i] for i in range(model.config.num_labels)]
        unseen = unseen or model.config.unseen_labels
    classes, unseen = check_class_names(classes), check_class_names(unseen) if unseen else []
    unknown = [name for name in unseen if name not in classes]
    if unknown:
        raise ValueError(
            f"`--unseen` contains {unknown[0]!r}, which is not among the classes: {', '.join(classes[:20])}."
        )
    return Vocabulary(classes, unseen, model.get_text_prototypes(processor, classes, template_set))


def check_correction(gamma: float | None, threshold: float | None) -> None:
    """Ranges of PBC's correction; `None` stands for the checkpoint's.

    Raises:
        ValueError: A value is out of its range.
    """
    if gamma is not None and not 0 <= gamma < math.inf:
        raise ValueError(f"`gamma` is {gamma}; expected a number ≥ 0.")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"`threshold` is {threshold}; expected a number from 0 to 1.")
