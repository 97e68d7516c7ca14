# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Conversion of class names and images to model inputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modeling_alignzeg.image_processing_alignzeg import AlignZegImageProcessor
from modeling_alignzeg.images_alignzeg import count_labels
from modeling_alignzeg.processing_alignzeg import AlignZegProcessor, check_class_names, get_templates
from modeling_alignzeg.prompts_alignzeg import TEMPLATE_SETS
from modeling_alignzeg.visualization_alignzeg import class_colors, draw_overlay, draw_unseen_map
from zeroshot.tokenization import build_tokenizer


TOKENIZER = build_tokenizer(["a photo of a red dotted cat.", "There is a dog in the scene"] * 3, model_max_length=32)
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def processor() -> AlignZegProcessor:
    return AlignZegProcessor(AlignZegImageProcessor(size={"shortest_edge": 48}, size_divisor=16), TOKENIZER)


# --- pictures


def test_names_that_no_encoding_takes_are_drawn() -> None:
    label = np.zeros((IMAGE.height, IMAGE.width), np.int64)
    assert class_colors(["\ud800"]).shape == (1, 3)
    assert draw_overlay(IMAGE, label, ["\ud800"]).mode == "RGB"


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: class_colors(["grass", None]), "Class name 1 is None; expected a string"),
        (lambda: draw_overlay(IMAGE, np.zeros((21, 34)), ["grass"]), "`label` is of type float64"),
        (lambda: draw_overlay(IMAGE, np.zeros((34, 21), int), ["grass"]), r"shape \(34, 21\)"),
        (lambda: draw_unseen_map(IMAGE, np.full((21, 34), np.nan)), "`unseen` .* and NaN"),
        (lambda: draw_unseen_map(IMAGE, np.zeros((34, 21))), r"`unseen` has shape \(34, 21\); expected"),
    ],
)
def test_what_cannot_be_drawn_is_named(draw, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()


def plain_overlay(image: Image.Image, label: np.ndarray, names: list[str], opacity: float) -> np.ndarray:
    """The blend pixel by pixel: an id without a name is grey, a pixel that differs from its left or upper one white."""
    colors, pixels = class_colors(names), np.asarray(image.convert("RGB"), float)
    known = np.where((label >= 0) & (label < len(names)), label, len(names))
    result = np.empty(pixels.shape)
    for y, x in np.ndindex(*label.shape):
        color = colors[known[y, x]] if known[y, x] < len(names) else np.array((120, 120, 120))
        is_border = (x and known[y, x] != known[y, x - 1]) or (y and known[y, x] != known[y - 1, x])
        result[y, x] = 255 if is_border else (1 - opacity) * pixels[y, x] + opacity * color
    return result


@pytest.mark.parametrize("classes", [3, 300])  # more classes than colours, and than a palette has entries
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_overlays_equal_the_plain_blend(classes: int, mode: str) -> None:
    names = [f"thing {number}" for number in range(classes)]
    label = np.random.default_rng(1).integers(-1, classes + 2, (7, 12)).repeat(3, 0).repeat(3, 1)[:, :34]
    image = IMAGE.convert(mode)
    drawn = np.asarray(draw_overlay(image, label, names, 0.4, legend=False), float)
    assert np.abs(drawn - plain_overlay(image, label, names, 0.4)).max() <= 1


def test_unseen_maps_equal_the_plain_blend() -> None:
    unseen = np.random.default_rng(2).uniform(-0.1, 1.1, (21, 34))
    stops = np.array([[13, 26, 74], [32, 106, 140], [64, 176, 120], [253, 231, 37]], float)
    heat = np.stack([np.interp(unseen, [0, 1 / 3, 2 / 3, 1], stop) for stop in stops.T], -1)
    expected = 0.3 * np.asarray(IMAGE.convert("L"), float)[..., None] + 0.7 * heat
    assert np.abs(np.asarray(draw_unseen_map(IMAGE, unseen), float) - expected).max() <= 2.5


def test_large_images_are_drawn_small() -> None:
    image, label = Image.new("RGB", (340, 210), (200, 100, 50)), np.zeros((210, 340), np.int64)
    label[:, 170:] = 1
    overlay = draw_overlay(image, label, ["grass", "sky"], opacity=1, legend=False, max_size=34)
    assert overlay.size == (34, 21)
    colors = class_colors(["grass", "sky"])
    assert (np.asarray(overlay)[:, :17] == colors[0]).all() and (np.asarray(overlay)[:, 18:] == colors[1]).all()
    small = draw_unseen_map(image, label.astype(np.float32), max_size=34)
    assert small.size == (34, 21)
    expected = np.asarray(draw_unseen_map(image.reduce(10), label[5::10, 5::10]), float)
    assert np.abs(np.asarray(small, float) - expected).max() <= 1
    assert draw_overlay(image, label, ["grass", "sky"], legend=False, max_size=340).size == image.size


def test_the_legend_names_other_ids() -> None:
    image, label = Image.new("RGB", (120, 80), "grey"), np.zeros((80, 120), np.int64)
    plain, named = (draw_overlay(image, label, ["grass"], other_name=name) for name in ("none of these", "unlabelled"))
    assert plain == named  # no other id occurs
    label[:40] = 255
    plain, named = (draw_overlay(image, label, ["grass"], other_name=name) for name in ("none of these", "unlabelled"))
    assert np.array_equal(np.asarray(plain)[:80, :120], np.asarray(named)[:80, :120]) and plain != named


def test_counts_of_labels() -> None:
    label = np.random.default_rng(3).integers(-2, 9, (13, 17))
    assert count_labels(label, 5).tolist() == [int((label == number).sum()) for number in range(5)]


# --- class names


def test_names_are_cleaned_and_stay_in_order() -> None:
    names = ["  zebra\t crossing\n", "cat", "Cat", "猫", "👩‍👩‍👧", "a\u0301", "b" * 600, "{}", "x\0y", "\ud800"]
    expected = ["zebra crossing", "cat", "Cat", "猫", "👩‍👩‍👧", "a\u0301", "b" * 600, "{}", "x y", "\ufffd"]
    assert check_class_names(names) == expected
    assert check_class_names("one class") == ["one class"]
    assert check_class_names(name for name in ("a", "b")) == ["a", "b"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "There are no class names"),
        (["cat", "  "], "Class name 1 is '  ', which is empty"),
        (["\u200b\t"], "Class name 0 is .* empty"),
        ("", "Class name 0 is '', which is empty"),
        (["cat", "dog", " cat"], "Class names 0 and 2 are both 'cat'"),
        (["cat", 3], "Class name 1 is 3, a int"),
        ([None], "Class name 0 is None"),
        (7, "are of type int"),
        ({"cat", "dog"}, "are a set, which has no order"),
    ],
)
def test_bad_names_are_answered_with_a_sentence(processor: AlignZegProcessor, names: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_class_names(names)
    with pytest.raises(ValueError, match=message):
        processor(text=names)


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=[]), max_size=60), max_size=5))
def test_any_text_is_encoded_or_answered(names: list[str]) -> None:
    try:
        cleaned = check_class_names(names)
    except ValueError as error:
        assert "lass name" in str(error)
        return
    assert len(cleaned) == len(set(cleaned)) == len(names)
    assert check_class_names(cleaned) == cleaned
    encoded = AlignZegProcessor(AlignZegImageProcessor(), TOKENIZER).encode_class_names(cleaned)
    assert encoded.input_ids.shape[0] == len(names) and encoded.input_ids.shape[1] <= 32
    ends = (encoded.input_ids == TOKENIZER.eos_token_id).long().argmax(1)
    assert (ends == encoded.attention_mask.sum(1) - 1).all()  # exactly one end token, and it is the last


# --- prompts


def test_one_template_gives_one_prompt_a_class(processor: AlignZegProcessor) -> None:
    inputs = processor(text=["dog", "red cat"], return_tensors="pt")
    assert inputs.input_ids.shape == inputs.attention_mask.shape == (2, 9)
    for ids, mask, name in zip(inputs.input_ids, inputs.attention_mask, ["dog", "red cat"]):
        assert ids[mask.bool()].tolist() == TOKENIZER(f"a photo of a {name}.").input_ids


def test_several_templates_give_an_axis_of_their_own(processor: AlignZegProcessor) -> None:
    inputs = processor.encode_class_names(["dog", "red cat", "猫"], template_set="vild")
    assert inputs.input_ids.shape[:2] == inputs.attention_mask.shape[:2] == (3, 14)
    for index, name in enumerate(["dog", "red cat", "猫"]):
        for place, template in enumerate(TEMPLATE_SETS["vild"]):
            ids = inputs.input_ids[index, place][inputs.attention_mask[index, place].bool()]
            assert ids.tolist() == TOKENIZER(template.format(name)).input_ids


@pytest.mark.parametrize("template_set", ["single", "vild"])
def test_lists_and_arrays_hold_the_same_ids(processor: AlignZegProcessor, template_set: str) -> None:
    names = ["dog", "red cat"]
    expected = processor(text=names, template_set=template_set, return_tensors="pt").input_ids
    assert processor(text=names, template_set=template_set)["input_ids"] == expected.tolist()
    assert (
        processor(text=names, template_set=template_set, return_tensors="np")["input_ids"] == expected.numpy()
    ).all()


def test_own_templates(processor: AlignZegProcessor) -> None:
    inputs = processor(text=["dog"], template_set=["{} and {} {x}"], return_tensors="pt")
    assert inputs.input_ids[0].tolist() == TOKENIZER("dog and dog {x}").input_ids


def test_long_names_are_cut_before_the_end_token(processor: AlignZegProcessor) -> None:
    inputs = processor(text=["dog " * 300, "cat"], return_tensors="pt")
    assert inputs.input_ids.shape == (2, 32) and inputs.input_ids[0, -1] == TOKENIZER.eos_token_id


def test_special_tokens_in_names_are_text(processor: AlignZegProcessor) -> None:
    ids = processor(text=["<|endoftext|> cat"], return_tensors="pt").input_ids[0]
    assert (ids == TOKENIZER.eos_token_id).sum() == 1
    assert TOKENIZER("cat <|endoftext|>").input_ids.count(TOKENIZER.eos_token_id) == 2  # the tokenizer is as it was


@pytest.mark.parametrize(
    ("template_set", "message"),
    [
        ("vildd", "`template_set` is 'vildd'; expected one of single, vild, imagenet"),
        ([], "`template_set` is empty"),
        (5, "`template_set` is a int; expected one of single, vild, imagenet"),
        (["a {}", "a photo"], r"`template_set\[1\]` is 'a photo'"),
        ([3], r"`template_set\[0\]` is 3"),
    ],
)
def test_bad_template_sets_are_answered_with_a_sentence(
    processor: AlignZegProcessor, template_set: object, message: str
) -> None:
    for call in (
        lambda: get_templates(template_set),
        lambda: processor(text=["cat"], template_set=template_set),
        lambda: AlignZegProcessor(AlignZegImageProcessor(), TOKENIZER, template_set=template_set),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- both inputs


def test_images_labels_and_names_together(processor: AlignZegProcessor) -> None:
    labels = np.ones((21, 34), np.int64)
    inputs = processor(images=[IMAGE], text=["dog", "cat"], segmentation_maps=[labels], return_tensors="pt")
    assert set(inputs) == {*processor.model_input_names, "mask_labels", "class_labels"}
    expected = processor.image_processor([IMAGE], [labels], return_tensors="pt")
    for name in ("pixel_values", "pixel_mask"):
        assert torch.equal(inputs[name], expected[name])
    for name in ("mask_labels", "class_labels"):
        assert torch.equal(inputs[name][0], expected[name][0])
    moved = inputs.to(torch.bfloat16)
    assert moved.pixel_values.dtype == moved.mask_labels[0].dtype == torch.bfloat16
    assert moved.input_ids.dtype == torch.int64


def test_arguments_reach_their_parts(processor: AlignZegProcessor) -> None:
    inputs = processor(
        images=IMAGE, text="dog", size={"height": 32, "width": 64}, padding="max_length", return_tensors="pt"
    )
    assert inputs.pixel_values.shape == (1, 3, 32, 64) and inputs.input_ids.shape == (1, 32)
    inputs = processor(images=IMAGE, images_kwargs={"do_resize": False}, text="dog", text_kwargs={"max_length": 5})
    assert inputs.pixel_values.shape == (1, 3, 32, 48) and len(inputs["input_ids"][0]) == 5


def test_missing_inputs_are_answered_with_a_sentence(processor: AlignZegProcessor) -> None:
    with pytest.raises(ValueError, match="Pass `images`, `text`"):
        processor()
    with pytest.raises(ValueError, match="`segmentation_maps` is given without `images`"):
        processor(text=["cat"], segmentation_maps=[np.zeros((3, 3))])


def test_label_maps_come_from_the_image_processor(processor: AlignZegProcessor) -> None:
    outputs = type("Outputs", (), {"masks_queries_logits": torch.zeros(1, 2, 4, 4)})
    outputs.class_queries_logits = torch.tensor([[[0.0, 5.0, 0.0], [0.0, 5.0, 0.0]]])
    assert (processor.post_process_semantic_segmentation(outputs, [(3, 5)])[0] == 1).all()


@pytest.mark.parametrize("template_set", ["imagenet", ["a drawing of a {}."]])
def test_the_template_set_is_saved(tmp_path: Path, template_set: str | list[str]) -> None:
    AlignZegProcessor(AlignZegImageProcessor(), TOKENIZER, template_set=template_set).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["template_set"] == template_set


def test_what_is_saved_does_not_depend_on_earlier_calls(processor: AlignZegProcessor, tmp_path: Path) -> None:
    """A fast tokenizer would save the truncation of its last call as its default."""
    processor.save_pretrained(tmp_path / "before")
    processor(text=["dog"], text_kwargs={"max_length": 5, "padding": "max_length"})
    processor.save_pretrained(tmp_path / "after")
    for path in (tmp_path / "before").iterdir():
        assert path.read_bytes() == (tmp_path / "after" / path.name).read_bytes(), path.name


FRESH = """
import sys
folder, image, result, without = sys.argv[1:]
sys.modules["modeling_alignzeg"] = None  # imports of it fail
if without == "yes":
    sys.modules["torchvision"] = None
import numpy as np
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.utils import is_torchvision_available
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(processor).__name__ == "AlignZegProcessor", type(processor)
assert type(image_processor).__name__ == "AlignZegImageProcessor", type(image_processor)
assert processor.template_set == "vild" and image_processor.to_dict() == processor.image_processor.to_dict()
assert AutoTokenizer.from_pretrained(folder).model_max_length == 32
assert without == "no" or not is_torchvision_available()
inputs = processor(images=image, text=["dog", "red cat"], return_tensors="np")
np.savez(result, alone=image_processor(image, return_tensors="np")["pixel_values"], **inputs)
"""


@pytest.mark.parametrize("without_torchvision", ["yes", "no"])
def test_a_saved_folder_loads_in_a_fresh_process(tmp_path: Path, without_torchvision: str) -> None:
    """From another working directory, offline and without the package; the result is bitwise equal."""
    image_processor = AlignZegImageProcessor(size={"shortest_edge": 48}, size_divisor=16)
    processor = AlignZegProcessor(image_processor, TOKENIZER, template_set="vild")
    processor.save_pretrained(tmp_path / "saved")
    IMAGE.save(tmp_path / "image.png")
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, "-c", FRESH, "../saved", "../image.png", "../result.npz", without_torchvision]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment.pop("PYTHONPATH", None)
    process = subprocess.run(
        command, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    result = np.load(tmp_path / "result.npz")
    expected = processor(images=IMAGE, text=["dog", "red cat"], return_tensors="np")
    for name, value in expected.items():
        np.testing.assert_array_equal(result[name], value)
    np.testing.assert_array_equal(result["alone"], expected["pixel_values"])
