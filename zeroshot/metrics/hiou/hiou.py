# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The `evaluate` module of generalized zero-shot semantic segmentation: harmonic mean of seen and unseen mIoU."""

import datasets
import evaluate
import torch

from .scoring import confusion_matrix, scores_from_confusion


_DESCRIPTION = """\
hIoU, the harmonic mean of the mean IoU over seen and over unseen classes, in the generalized label space: every pixel
    is assigned one of all classes. Also returns both means, the IoU per class and the pixel accuracy. All in percent.
"""

_INPUTS = """\
Args:
    predictions: list of label maps, each a list of rows (or an integer array) of class ids 0..num_classes-1, or
        `none_index`.
    references: list of label maps of the same sizes, class ids 0..num_classes-1 or `ignore_index`.
    num_classes (int): number of classes, seen and unseen.
    unseen_ids (list of int): ids of the unseen classes.
    none_index (int, optional): id in the predictions that means "none of these": an error at every labelled pixel,
        but not a prediction of any class. If it is not set, such ids raise an exception.
    ignore_index (int, 255): id of unlabelled pixels in the references; predictions there are ignored.
    class_names (list of str, optional): keys of `per_class`; default: the ids as strings.
Returns:
    miou_seen, miou_unseen, hiou, pixel_accuracy, miou: floats, 0-100; nan for an empty mean.
    per_class: IoU per class, 0-100; nan for a class that occurs neither in references nor in predictions.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class HIoU(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        label_map = datasets.Sequence(datasets.Sequence(datasets.Value("int32")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": label_map, "references": label_map}),
        )

    def _compute(
        self,
        predictions: list,
        references: list,
        num_classes: int,
        unseen_ids: list[int],
        ignore_index: int = 255,
        class_names: list[str] | None = None,
        none_index: int | None = None,
    ) -> dict[str, float | dict[str, float]]:
        empty = torch.empty(0, dtype=torch.long)
        matrix = confusion_matrix(empty, empty, num_classes, ignore_index, none_index)
        for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            try:
                matrix = matrix + confusion_matrix(prediction, reference, num_classes, ignore_index, none_index)
            except ValueError as error:
                raise ValueError(f"Image {index}: {error}") from None
        return scores_from_confusion(matrix, unseen_ids, class_names)
