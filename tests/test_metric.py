# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The scores against plain loops and scikit-learn, and the `evaluate` module in a separate process."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeroshot.metrics.hiou.scoring import confusion_matrix, scores_from_confusion


MODULE = Path(__file__).resolve().parent.parent / "zeroshot" / "metrics" / "hiou"


def slow_scores(predictions, references, num_classes, unseen_ids, ignore_index):
    """The definitions, pixel by pixel and class by class."""
    pixels = [
        (int(p), int(r))
        for prediction, reference in zip(predictions, references, strict=True)
        for p, r in zip(prediction.flat, reference.flat, strict=True)
        if r != ignore_index
    ]
    per_class = {}
    for c in range(num_classes):
        union = sum(p == c or r == c for p, r in pixels)
        per_class[str(c)] = 100 * sum(p == r == c for p, r in pixels) / union if union else math.nan

    def mean(ids):
        values = [per_class[str(c)] for c in ids if not math.isnan(per_class[str(c)])]
        return sum(values) / len(values) if values else math.nan

    seen, unseen = mean([c for c in range(num_classes) if c not in unseen_ids]), mean(unseen_ids)
    return {
        "miou_seen": seen,
        "miou_unseen": unseen,
        "hiou": 0.0 if seen + unseen == 0 else 2 * seen * unseen / (seen + unseen),
        "pixel_accuracy": 100 * sum(p == r for p, r in pixels) / len(pixels) if pixels else math.nan,
        "miou": mean(range(num_classes)),
        "per_class": per_class,
    }


def assert_equal_scores(scores, expected):
    assert scores.keys() == expected.keys()
    for key, value in expected.items():
        assert scores[key] == pytest.approx(value, abs=1e-9, nan_ok=True), key


@st.composite
def cases(draw):
    num_classes = draw(st.integers(1, 6))
    ignore_index = draw(st.sampled_from([255, 6, 65535]))
    unseen_ids = draw(st.lists(st.integers(0, num_classes - 1), unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3))
    used = rng.integers(1, num_classes + 1)  # often, some classes do not occur
    references = [rng.integers(0, used, size) for size in sizes]
    predictions = [rng.integers(0, rng.integers(1, num_classes + 1), size) for size in sizes]
    for reference in references:
        reference[rng.random(reference.shape) < rng.choice([0, 0.3, 1])] = ignore_index
    return predictions, references, num_classes, unseen_ids, ignore_index


@settings(deadline=None)
@given(cases())
def test_scores_equal_a_slow_plain_reference(case):
    predictions, references, num_classes, unseen_ids, ignore_index = case
    matrix = sum(
        confusion_matrix(p, r, num_classes, ignore_index) for p, r in zip(predictions, references, strict=True)
    )
    assert matrix.dtype == torch.int64 and matrix.shape == (num_classes, num_classes)
    assert matrix.sum() == sum((r != ignore_index).sum() for r in references)
    assert_equal_scores(scores_from_confusion(matrix, unseen_ids), slow_scores(*case))


@settings(deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_predictions_at_ignored_pixels_count_nowhere(case, random):
    predictions, references, num_classes, _, ignore_index = case
    for prediction, reference in zip(predictions, references, strict=True):
        other = prediction.copy()
        other[reference == ignore_index] = random.choice([0, num_classes - 1, ignore_index, 9999])
        before = confusion_matrix(prediction, reference, num_classes, ignore_index)
        assert torch.equal(confusion_matrix(other, reference, num_classes, ignore_index), before)


@settings(deadline=None)
@given(cases(), st.sampled_from([-1, 254, 65534]), st.randoms(use_true_random=False))
def test_none_of_these_is_wrong_and_no_class_s_prediction(case, none_index, random):
    predictions, references, num_classes, unseen_ids, ignore_index = case
    for prediction in predictions:
        prediction[[[random.random() < 0.4 for _ in row] for row in prediction]] = none_index
    matrix = sum(
        confusion_matrix(p, r, num_classes, ignore_index, none_index)
        for p, r in zip(predictions, references, strict=True)
    )
    assert matrix.shape == (num_classes, num_classes + 1)
    assert matrix.sum() == sum((r != ignore_index).sum() for r in references)
    assert_equal_scores(scores_from_confusion(matrix, unseen_ids), slow_scores(*case))


def test_none_of_these_has_to_be_announced():
    labels = torch.tensor([[0, 1], [1, 255]])
    refused = torch.tensor([[-1, 1], [1, -1]])
    with pytest.raises(ValueError, match=r"\[-1\] at labelled pixels; expected class ids in 0..1 or `none_index`"):
        confusion_matrix(refused, labels, 2)
    assert confusion_matrix(refused, labels, 2, none_index=-1).tolist() == [[0, 0, 1], [0, 2, 0]]
    with pytest.raises(ValueError, match="`none_index` is 1, the id of a class"):
        confusion_matrix(labels, labels, 2, none_index=1)


@settings(deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_renaming_classes_does_not_change_the_means(case, random):
    predictions, references, num_classes, unseen_ids, ignore_index = case
    new_ids = list(range(num_classes))
    random.shuffle(new_ids)
    table = np.full(65536, ignore_index)
    table[:num_classes] = new_ids
    before, after = (
        scores_from_confusion(sum(confusion_matrix(p, r, num_classes, ignore_index) for p, r in pairs), ids)
        for pairs, ids in (
            (list(zip(predictions, references, strict=True)), unseen_ids),
            (
                [(table[p], table[r]) for p, r in zip(predictions, references, strict=True)],
                [new_ids[i] for i in unseen_ids],
            ),
        )
    )
    before["per_class"] = {str(new_ids[int(i)]): iou for i, iou in before["per_class"].items()}
    assert_equal_scores(after, before)


def test_scores_equal_scikit_learn():
    prediction, reference = np.random.default_rng(0).integers(0, 7, (2, 40, 50))
    scores = scores_from_confusion(confusion_matrix(prediction, reference, 7), unseen_ids=[2, 5])
    matrix = sklearn.metrics.confusion_matrix(reference.ravel(), prediction.ravel())
    assert confusion_matrix(prediction, reference, 7).tolist() == matrix.tolist()
    iou = 100 * sklearn.metrics.jaccard_score(reference.ravel(), prediction.ravel(), average=None)
    assert list(scores["per_class"].values()) == pytest.approx(iou)
    assert scores["miou_unseen"] == pytest.approx(iou[[2, 5]].mean())
    assert scores["pixel_accuracy"] == pytest.approx(
        100 * sklearn.metrics.accuracy_score(reference.ravel(), prediction.ravel())
    )


def test_absent_and_wrongly_predicted_classes():
    # Class 0 right, class 1 predicted but absent (0), class 2 half right, class 3 absent from both (nan).
    matrix = confusion_matrix(np.array([[0, 0, 3], [2, 1, 0]]), np.array([[0, 0, 255], [2, 2, 255]]), 4)
    scores = scores_from_confusion(matrix, unseen_ids=[2, 3], class_names=["a", "b", "c", "d"])
    assert scores["per_class"] == pytest.approx({"a": 100, "b": 0, "c": 50, "d": math.nan}, nan_ok=True)
    assert (scores["miou_seen"], scores["miou_unseen"], scores["hiou"], scores["pixel_accuracy"]) == (50, 50, 50, 75)


def test_means_over_nothing_are_nan_and_two_zeros_give_zero():
    everything_right = torch.eye(3, dtype=torch.int64)
    assert math.isnan(scores_from_confusion(everything_right, [])["hiou"])
    assert scores_from_confusion(everything_right, [])["miou_seen"] == 100
    assert math.isnan(scores_from_confusion(everything_right, [0, 1, 2])["hiou"])
    nothing_labelled = scores_from_confusion(torch.zeros(3, 3), [0])
    assert all(math.isnan(nothing_labelled[key]) for key in ("miou", "hiou", "pixel_accuracy"))
    everything_wrong = torch.tensor([[0, 1], [1, 0]])
    assert scores_from_confusion(everything_wrong, [1])["hiou"] == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_tensors_of_any_integer_type(dtype):
    label = torch.tensor([[0, 1], [1, 2]], dtype=dtype)
    assert confusion_matrix(label, label, 3).tolist() == [[1, 0, 0], [0, 2, 0], [0, 0, 1]]
    array = label.numpy().astype(np.uint16)
    assert confusion_matrix(array, array, 3).tolist() == [[1, 0, 0], [0, 2, 0], [0, 0, 1]]


def test_wrong_input_is_named():
    label = np.array([[0, 1]])
    with pytest.raises(ValueError, match=r"shape \(1, 2\) and `reference` \(2, 1\)"):
        confusion_matrix(label, label.T, 2)
    with pytest.raises(ValueError, match=r"`prediction` contains the ids \[2\].*0\.\.1"):
        confusion_matrix(label * 2, label, 2)
    with pytest.raises(ValueError, match=r"`reference` contains the ids \[-1\].*255"):
        confusion_matrix(label, label - 1, 2)
    with pytest.raises(ValueError, match="`matrix` has shape"):
        scores_from_confusion(np.zeros((2, 4)), [])
    with pytest.raises(ValueError, match=r"`unseen_ids` has \[2\]"):
        scores_from_confusion(np.zeros((2, 2)), [2])
    with pytest.raises(ValueError, match="`class_names` has 1"):
        scores_from_confusion(np.zeros((2, 2)), [1], ["a"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": np.array([[0.7, 1.0]])}, "`prediction` has values of type float64"),
        (
            {"prediction": torch.zeros(1, 2, dtype=torch.complex64)},
            "`prediction` has values of type torch.complex64",
        ),
        ({"reference": np.array([[np.nan, 1.0]])}, "`reference` has values of type float64"),
        ({"reference": [[0], [0, 1]]}, "`reference` is not an array of class ids"),
        ({"reference": [["a", "b"]]}, "`reference` has values of type <U1"),
        ({"num_classes": -2}, "`num_classes` is -2; expected a whole number ≥ 1"),
        ({"num_classes": None}, "`num_classes` is None"),
        ({"num_classes": 2.0}, "`num_classes` is 2.0"),
        ({"ignore_index": 0.5}, "`ignore_index` is 0.5; expected a whole number"),
    ],
)
def test_labels_that_are_no_ids_are_named(change, message):
    label = np.array([[0, 1]])
    with pytest.raises(ValueError, match=message):
        confusion_matrix(**{"prediction": label, "reference": label, "num_classes": 2, **change})


@pytest.mark.parametrize(
    ("matrix", "options", "message"),
    [
        (np.eye(2), {"class_names": ["a", "a"]}, "`class_names` has 'a' twice"),
        (np.eye(2), {"unseen_ids": [0.5]}, r"`unseen_ids` is \[0.5\]; expected a list of whole numbers"),
        (np.eye(2), {"unseen_ids": 1}, "`unseen_ids` is 1; expected a list"),
        ("x", {}, "`matrix` contains values that are not counts"),
        (-np.eye(2), {}, "`matrix` contains values that are not counts"),
        (np.full((2, 2), np.nan), {}, "`matrix` contains values that are not counts"),
    ],
)
def test_scores_of_what_does_not_fit_are_refused(matrix, options, message):
    with pytest.raises(ValueError, match=message):
        scores_from_confusion(matrix, **{"unseen_ids": [], **options})


def test_arrays_of_any_layout():
    label = np.array([[0, 1], [1, 2]])
    expected = [[1, 0, 0], [0, 2, 0], [0, 0, 1]]
    for variant in (label[::-1], label[:, ::-1], label.T, label.astype(">i2"), label.tolist()):
        assert confusion_matrix(variant, variant, 3).tolist() == expected


EVALUATE = """
import json, sys
import evaluate
import numpy as np

metric = evaluate.load(sys.argv[1])
case = json.loads(sys.stdin.read())
arrays = [[np.array(label) for label in case[key]] for key in ("predictions", "references")]
lists = metric.compute(**case)
case.update(predictions=arrays[0], references=arrays[1])
by_image = evaluate.load(sys.argv[1])
for prediction, reference in zip(*arrays):
    by_image.add(prediction=prediction, reference=reference)
options = {key: case[key] for key in ("num_classes", "unseen_ids", "ignore_index", "none_index")}
print(json.dumps([lists, metric.compute(**case), by_image.compute(**options)]))
"""


def test_evaluate_module_loads_offline_in_a_process_of_its_own(tmp_path):
    rng = np.random.default_rng(0)
    references = [rng.integers(0, 300, size) for size in ((20, 30), (31, 17))]  # more classes than 8 bits hold
    predictions = [np.where(rng.random(r.shape) < 0.5, r, rng.integers(0, 300, r.shape)) for r in references]
    references[0][:5] = 65535
    predictions[1][:3] = -1
    options = {"num_classes": 300, "unseen_ids": [3, 299], "ignore_index": 65535}
    case = {"predictions": [p.tolist() for p in predictions], "references": [r.tolist() for r in references]}
    case |= options | {"none_index": -1}
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    environment.pop("PYTHONPATH", None)
    process = subprocess.run(
        [sys.executable, "-c", EVALUATE, str(MODULE)],
        input=json.dumps(case),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert process.returncode == 0, process.stderr
    for scores in json.loads(process.stdout):
        assert_equal_scores(scores, slow_scores(predictions, references, **options))
