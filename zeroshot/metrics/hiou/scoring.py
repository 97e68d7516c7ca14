# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Scores of generalized zero-shot semantic segmentation, computed from a confusion matrix of label maps."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch


def confusion_matrix(
    prediction: np.ndarray | torch.Tensor,
    reference: np.ndarray | torch.Tensor,
    num_classes: int,
    ignore_index: int = 255,
    none_index: int | None = None,
) -> torch.Tensor:
    """Counts the labelled pixels of one or more images by reference and predicted class.

    Matrices of single images add up to the matrix of the dataset, also over processes. Predictions at pixels whose
    reference is `ignore_index` are not counted.

    Args:
        prediction: Class ids, whole numbers of any shape, in `0..num_classes-1` wherever the reference is labelled.
        reference: Class ids of the same shape, in `0..num_classes-1` or `ignore_index`.
        num_classes: Number of classes C.
        ignore_index: Id of unlabelled pixels. An id in `0..num_classes-1` leaves out the pixels of that class.
        none_index: Id for "none of these" in the prediction. At a labelled pixel it is a false negative of the pixel's
            class, but not a false positive of any class. If it is not set, such ids raise an error.

    Returns:
        `int64` of shape (C, C) on the device of `prediction`; entry (i, j) counts the pixels of class i predicted as
        j. With `none_index`, the shape is (C, C + 1), and the last column counts pixels predicted as none.

    Raises:
        ValueError: The shapes differ, ids are not whole numbers or out of range, `none_index` is the id of a class, or
            `num_classes` is not a whole number ≥ 1.
    """
    for argument, value, least in (("num_classes", num_classes, 1), ("ignore_index", ignore_index, None)):
        if isinstance(value, bool) or not hasattr(value, "__index__") or (least is not None and value < least):
            expected = "a whole number" if least is None else f"a whole number ≥ {least}"
            raise ValueError(f"`{argument}` is {value!r}; expected {expected}.")
    if none_index is not None and 0 <= none_index < num_classes:
        raise ValueError(
            f"`none_index` is {none_index}, the id of a class; expected an id outside 0..{num_classes - 1}."
        )
    prediction = _class_ids("prediction", prediction)
    reference = _class_ids("reference", reference).to(prediction.device)
    if prediction.shape != reference.shape:
        raise ValueError(
            f"`prediction` has shape {tuple(prediction.shape)} and `reference` {tuple(reference.shape)}; they must "
            "be equal. Resize the scores to the size of the reference before the argmax."
        )
    labelled = reference != ignore_index
    prediction, reference = prediction[labelled], reference[labelled]
    is_none = torch.zeros_like(prediction, dtype=torch.bool) if none_index is None else prediction == none_index
    others = f" or `none_index`{'' if none_index is None else f' {none_index}'} for pixels that are none of them."
    for argument, ids, hint in (
        ("prediction", prediction[~is_none], others),
        ("reference", reference, f" or `ignore_index` {ignore_index}."),
    ):
        outside = ids[(ids < 0) | (ids >= num_classes)]
        if outside.numel():
            raise ValueError(
                f"`{argument}` contains the ids {outside.unique().tolist()} at labelled pixels; expected class ids in "
                f"0..{num_classes - 1}{hint}"
            )
    columns = num_classes + (none_index is not None)
    prediction = torch.where(is_none, num_classes, prediction)
    counts = torch.bincount(reference * columns + prediction, minlength=num_classes * columns)
    return counts.reshape(num_classes, columns)


def scores_from_confusion(
    matrix: np.ndarray | torch.Tensor, unseen_ids: Sequence[int], class_names: Sequence[str] | None = None
) -> dict[str, float | dict[str, float]]:
    """Computes the scores of a dataset from its confusion matrix.

    The IoU of a class is TP / (TP + FP + FN) over the dataset. For a class that is neither in the references nor in the
    predictions it is nan and left out of the means; for a class that is only predicted it is 0.

    Args:
        matrix: Counts of shape (C, C) or (C, C + 1), from [`confusion_matrix`].
        unseen_ids: Ids of the unseen classes; all others are seen.
        class_names: Names of the C classes; default: their ids as strings.

    Returns:
        In percent, 0–100: `miou_seen`, `miou_unseen`, `hiou` = 2·S·U/(S+U), `pixel_accuracy` (correct pixels over all
        labelled ones), `miou` (over all classes), and `per_class`, the IoU by name. An empty mean is nan, and so is
        `hiou` if one of its parts is, for example without unseen classes.

    Raises:
        ValueError: `matrix` has the wrong shape or does not contain counts, or `unseen_ids` or `class_names` does not match.
    """
    try:
        matrix = torch.as_tensor(matrix).cpu()
        is_count = not matrix.is_complex() and (matrix.isfinite() & (matrix >= 0)).all()
    except (TypeError, ValueError, RuntimeError):
        is_count = False
    if not is_count:
        raise ValueError("`matrix` contains values that are not counts; expected the output of `confusion_matrix`.")
    matrix = torch.as_tensor(matrix).double().numpy()
    if matrix.ndim != 2 or matrix.shape[1] - matrix.shape[0] not in (0, 1):
        raise ValueError(
            f"`matrix` has shape {matrix.shape}; expected (num_classes, num_classes), or one column more."
        )
    num_classes = len(matrix)
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"`class_names` has {len(class_names)} names; the matrix has {num_classes} classes.")
    twice = [name for name, count in Counter(class_names or ()).items() if count > 1]
    if twice:
        raise ValueError(f"`class_names` has {twice[0]!r} twice; expected unique names, the keys of `per_class`.")
    try:
        unseen_ids = [operator.index(i) for i in unseen_ids]
    except TypeError:
        raise ValueError(f"`unseen_ids` is {unseen_ids!r}; expected a list of whole numbers, the class ids.") from None
    unexpected = [i for i in unseen_ids if not 0 <= i < num_classes]
    if unexpected:
        raise ValueError(f"`unseen_ids` has {unexpected}; expected class ids in 0..{num_classes - 1}.")

    correct = np.diag(matrix)
    predicted, actual = matrix[:, :num_classes].sum(axis=0), matrix.sum(axis=1)
    iou = 100 * _ratio(correct, predicted + actual - correct)
    is_unseen = np.isin(np.arange(num_classes), unseen_ids)
    seen, unseen = _mean(iou[~is_unseen]), _mean(iou[is_unseen])
    names = class_names if class_names is not None else [str(i) for i in range(num_classes)]
    return {
        "miou_seen": seen,
        "miou_unseen": unseen,
        "hiou": 0.0 if seen + unseen == 0 else 2 * seen * unseen / (seen + unseen),
        "pixel_accuracy": float(100 * _ratio(correct.sum(), matrix.sum())),
        "miou": _mean(iou),
        "per_class": dict(zip(names, iou.tolist(), strict=True)),
    }


def _class_ids(argument: str, values: np.ndarray | torch.Tensor) -> torch.Tensor:
    """`values` as int64, if their type is a whole number."""
    if isinstance(values, torch.Tensor):
        if values.is_floating_point() or values.is_complex():
            raise ValueError(f"`{argument}` has values of type {values.dtype}; expected whole numbers, class ids.")
        return values.long()
    try:
        values = np.asarray(values)
    except ValueError:  # rows of different lengths
        raise ValueError(f"`{argument}` is not an array of class ids: its rows differ in length.") from None
    if values.size and values.dtype.kind not in "biu":
        raise ValueError(f"`{argument}` has values of type {values.dtype}; expected whole numbers, class ids.")
    return torch.from_numpy(values.astype(np.int64, order="C"))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part / whole`; nan if both are 0."""
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)


def _mean(values: np.ndarray) -> float:
    """The mean of the values that are not nan; nan without any."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")
