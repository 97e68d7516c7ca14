# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Options of predictions: class names, and PBC's correction."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from modeling_alignzeg.processing_alignzeg import check_classes, check_unseen_names, read_classes


class Vocabulary(NamedTuple):
    """Classes to choose from.

    Attributes:
        names: Names of the classes.
        unseen: Classes that count as unseen.
        prototypes: `(classes, D)`, or `(classes, phrases, D)`.
        wording: If phrases differ from the names: all phrases and their pooling.
    """

    names: list[str]
    unseen: list[str]
    prototypes: Tensor
    wording: dict[str, Any] = {}


def load_vocabulary(
    model: Any,
    processor: Any,
    classes: str | None,
    unseen: list[str] | None,
    template_set: str | None,
    phrase_pooling: str = "max",
    cache_dir: str | None = None,
) -> Vocabulary:
    """The classes to choose from; default: the checkpoint's.

    Args:
        model, processor: The checkpoint's; the model computes the text prototypes.
        classes: Names and phrases of the classes, from [`read_classes`].
        unseen: Classes that count as unseen.
        template_set: Prompt templates; default: the checkpoint's.
        phrase_pooling: `"max"` or `"mean"`: how to combine several phrases of a class.
        cache_dir: Folder of cached embeddings.

    Raises:
        ValueError: A name is empty or a duplicate, an unseen class is not among the classes, or the templates are to replace
            several prototypes of a class.
    """
    if classes is None:
        phrases = check_classes([model.config.id2label[i] for i in range(model.config.num_labels)])
        unseen = unseen or model.config.unseen_labels
    else:
        phrases = read_classes(classes)
    unseen = check_unseen_names(unseen)
    unknown = [name for name in unseen if name not in phrases]
    if unknown:
        raise ValueError(
            f"`--unseen` contains {unknown[0]!r}, which is not among the classes: {', '.join(list(phrases)[:20])}."
        )
    if classes is None and template_set is None:  # its prototypes may be of several phrases, or of exemplars
        prototypes = model.class_text_embeds
    elif classes is None and model.config.prototypes_per_class > 1:
        raise ValueError("`--template_set` needs `--classes`: the checkpoint's classes have several prototypes each.")
    else:
        options = {"phrase_pooling": phrase_pooling, "cache_dir": cache_dir}
        prototypes = model.get_text_prototypes(processor, phrases, template_set, **options)
    is_plain = all(texts == [name] for name, texts in phrases.items())
    wording = {} if is_plain else {"phrases": phrases, "phrase_pooling": phrase_pooling}
    return Vocabulary(list(phrases), unseen, prototypes, wording)


def check_correction(gamma: float | None, threshold: float | None) -> None:
    """Checks the ranges of PBC's γ and θ; `None` stands for the checkpoint's values.

    Raises:
        ValueError: A value is out of range.
    """
    if gamma is not None and not 0 <= gamma < math.inf:
        raise ValueError(f"`gamma` is {gamma}; expected a number ≥ 0.")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"`threshold` is {threshold}; expected a number from 0 to 1.")
