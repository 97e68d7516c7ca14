# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Several phrases per class: text syntax, prototypes, logits, and their use in pipeline, scripts and splits."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import picture, plain_correction, tiny_checkpoint, tiny_model, tiny_processor

from modeling_alignzeg import AlignZegModel, ZeroShotImageSegmentationPipeline
from modeling_alignzeg.processing_alignzeg import check_classes, read_classes
from zeroshot.checkpoints import load_checkpoint
from zeroshot.data.splits import load_split, pseudo_unseen_split
from zeroshot.evaluation.options import load_vocabulary


ROOT = Path(__file__).resolve().parent.parent
CLASSES = {"floor": ["grass", "wood", "sand"], "wall": ["brick"], "thing": ["a red thing", "a blue thing"]}
PHRASES = [phrase for phrases in CLASSES.values() for phrase in phrases]
OWNER = [name for name, phrases in CLASSES.items() for _ in phrases]


@pytest.fixture(scope="module")
def model() -> AlignZegModel:
    return tiny_model(seed=6)


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


# --- names


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a, b", {"a": ["a"], "b": ["b"]}),
        ("a, b,", {"a": ["a"], "b": ["b"]}),
        ("sofa|couch, grass, background: road|ground|wall", None),
        ("sofa | couch,grass ,background :road| ground|wall", None),
    ],
)
def test_classes_in_one_string(text: str, expected: dict | None) -> None:
    both = {"sofa": ["sofa", "couch"], "grass": ["grass"], "background": ["road", "ground", "wall"]}
    assert read_classes(text) == (expected or both)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "Class name 0 is '', which is empty"),
        ("a,, b", "Class name 1"),
        ("a|b, a", "both 'a'"),
        ("a|, b", "The phrases of class 'a' cannot be used. Class name 1 is ''"),
        ("a:, b", "The phrases of class 'a' cannot be used."),
        (": a|b", "Class name 0"),
        ("a|a", "The phrases of class 'a' cannot be used.*both 'a'"),
        ("x: a|b, y: b", "The phrase 'b' is in the classes 'x' and 'y'; leave it in one of them"),
    ],
)
def test_wrong_strings_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_classes(text)


def test_lists_and_dictionaries() -> None:
    assert check_classes(["a: b", "c|d"]) == {"a: b": ["a: b"], "c|d": ["c|d"]}  # no syntax in a list
    assert check_classes({" x ": "y", "z": ("z", "x")}) == {"x": ["y"], "z": ["z", "x"]}
    with pytest.raises(ValueError, match="The phrases of class 'x' cannot be used. Class names are of type int"):
        check_classes({"x": 5})
    with pytest.raises(ValueError, match="There are no class names"):
        check_classes({})


# --- prototypes and logits


@pytest.mark.parametrize("template_set", ["single", "vild"])
def test_prototypes(model: AlignZegModel, processor, template_set: str) -> None:
    single = dict(zip(PHRASES, model.get_text_prototypes(processor, PHRASES, template_set)))
    several = model.get_text_prototypes(processor, CLASSES, template_set)
    mean = model.get_text_prototypes(processor, CLASSES, template_set, phrase_pooling="mean")
    assert several.shape == (3, 3, 24) and mean.shape == (3, 24)
    for index, phrases in enumerate(CLASSES.values()):
        own = torch.stack([single[phrase] for phrase in phrases])
        filled = [*own, *[own[0]] * (3 - len(own))]
        torch.testing.assert_close(several[index], torch.stack(filled))
        torch.testing.assert_close(mean[index], F.normalize(own.sum(0), dim=0))
    tokens = processor(text=CLASSES, template_set=template_set, return_tensors="pt")
    assert tokens["input_ids"].ndim == 4 and tokens["input_ids"].shape[:2] == (3, 3)
    encoded = model.text_encoder(tokens["input_ids"], tokens["attention_mask"])
    torch.testing.assert_close(encoded, several, atol=1e-5, rtol=1e-5)
    nested = processor(text=CLASSES, template_set=template_set)["input_ids"]
    assert nested[0][2][0] == tokens["input_ids"][0, 2, 0].tolist()


def test_one_phrase_per_class_is_one_prototype_per_class(model: AlignZegModel, processor) -> None:
    renamed = model.get_text_prototypes(processor, {"x": ["grass"], "y": "wood"})
    assert torch.equal(renamed, model.get_text_prototypes(processor, ["grass", "wood"]))
    assert processor(text={"x": "grass"}, return_tensors="pt")["input_ids"].ndim == 2
    with pytest.raises(ValueError, match="`phrase_pooling` is 'sum'; expected 'max' or 'mean'"):
        model.get_text_prototypes(processor, CLASSES, phrase_pooling="sum")


@torch.no_grad()
def test_the_logit_of_a_class_is_that_of_its_best_phrase(model: AlignZegModel, processor) -> None:
    inputs = processor(images=picture(), return_tensors="pt")
    apart = model(**inputs, text_prototypes=model.get_text_prototypes(processor, PHRASES)).class_queries_logits
    outputs = model(**inputs, text_prototypes=model.get_text_prototypes(processor, CLASSES))
    for index, name in enumerate(CLASSES):
        own = [position for position, owner in enumerate(OWNER) if owner == name]
        torch.testing.assert_close(outputs.class_queries_logits[..., index], apart[..., own].amax(-1))
    torch.testing.assert_close(outputs.class_queries_logits[..., -1], apart[..., -1])
    tokens = processor(text=CLASSES, return_tensors="pt")
    by_ids = model(**inputs, **tokens)
    torch.testing.assert_close(by_ids.class_queries_logits, outputs.class_queries_logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_unseen_holds_for_all_phrases(model: AlignZegModel, processor) -> None:
    inputs = processor(images=picture(), return_tensors="pt")
    seen = torch.tensor([False, True, True])
    outputs = model(**inputs, text_prototypes=model.get_text_prototypes(processor, CLASSES), seen_class_mask=seen)
    assert outputs.seen_class_mask.tolist() == [[0, 1, 1]]
    plain = processor.image_processor.proposal_probabilities(outputs, gamma=0.0)
    corrected = processor.image_processor.proposal_probabilities(outputs, gamma=3.0, threshold=0.0)
    expected = [plain_correction(logits, seen, 3.0) for logits in outputs.class_queries_logits[0]]
    torch.testing.assert_close(corrected[0], torch.stack(expected))
    assert not torch.equal(plain, corrected)


def test_several_prototypes_have_no_loss(model: AlignZegModel, processor) -> None:
    inputs = processor(images=picture(), return_tensors="pt")
    labels = {"mask_labels": [torch.ones(1, *inputs["pixel_values"].shape[2:])], "class_labels": [torch.tensor([0])]}
    with pytest.raises(ValueError, match="one prototype per class.*phrase_pooling='mean'"):
        model(**inputs, text_prototypes=model.get_text_prototypes(processor, CLASSES), **labels)
    mean = model.get_text_prototypes(processor, CLASSES, phrase_pooling="mean")
    assert model(**inputs, text_prototypes=mean, **labels).loss.isfinite()


@torch.no_grad()
def test_a_stored_vocabulary_of_phrases_comes_back(processor, tmp_path: Path) -> None:
    model = tiny_model(seed=6)
    model.set_vocabulary(CLASSES, ["floor"], processor)
    model.save_pretrained(tmp_path)
    again = AlignZegModel.from_pretrained(tmp_path)
    inputs = processor(images=picture(), return_tensors="pt")
    expected = model(**inputs, text_prototypes=model.get_text_prototypes(processor, CLASSES)).class_queries_logits
    torch.testing.assert_close(again(**inputs).class_queries_logits, expected)
    assert again.config.id2label == dict(enumerate(CLASSES)) and again.config.unseen_labels == ["floor"]
    again.set_vocabulary(list(CLASSES), processor=processor)
    assert again.class_text_embeds.ndim == 2 and again.config.prototypes_per_class == 1


# --- where they come in


def test_pipeline(model: AlignZegModel, processor) -> None:
    segmenter = ZeroShotImageSegmentationPipeline(model=model, processor=processor)
    text = "floor: grass|wood|sand, wall: brick, thing: a red thing|a blue thing"
    for options in ({}, {"phrase_pooling": "mean"}):
        segments = segmenter(picture(), candidate_labels=CLASSES, unseen_labels=["floor"], **options)
        assert segments == segmenter(picture(), candidate_labels=text, unseen_labels="floor", **options)
        assert {segment["label"] for segment in segments} <= set(CLASSES)
        prototypes = model.get_text_prototypes(processor, CLASSES, **options)
        with torch.no_grad():
            outputs = model(
                **processor(images=picture(), return_tensors="pt"),
                text_prototypes=prototypes,
                seen_class_mask=torch.tensor([False, True, True]),
            )
        label = processor.post_process_semantic_segmentation(outputs, target_sizes=[(40, 48)])[0].numpy()
        for segment in segments:
            assert np.array_equal(np.asarray(segment["mask"]) > 0, label == list(CLASSES).index(segment["label"]))
    with pytest.raises(ValueError, match="`unseen_labels` contains 'grass'"):
        segmenter(picture(), candidate_labels=CLASSES, unseen_labels=["grass"])


def test_predict(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    picture().save(tmp_path / "picture.png")

    def predict(classes: str, *options: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "scripts/predict.py", str(tmp_path / "picture.png"), "--model", str(checkpoint)]
        command += ["--classes", classes, "--output_dir", str(tmp_path / "out"), *options]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    result = predict("floor: grass|sand, brick", "--unseen", "floor")
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert written["classes"] == ["floor", "brick"] and written["unseen"] == ["floor"]
    assert (tmp_path / "out" / "picture.png").exists()
    other = predict("floor: grass|wood, brick", "--unseen", "floor")  # the same class names, other phrases
    assert other.returncode == 2 and "other classes" in other.stderr
    wrong = predict("floor: grass|grass, brick")
    assert wrong.returncode == 2 and "The phrases of class 'floor'" in wrong.stderr


def test_stored_prototypes_are_those_of_a_prediction(processor, tmp_path: Path) -> None:
    model = tiny_model()
    model.set_vocabulary({"floor": ["grass", "wood"], "wall": ["brick"]}, ["wall"], processor)
    found = load_vocabulary(model, processor, None, None, None)
    assert found.names == ["floor", "wall"] and found.unseen == ["wall"]
    assert torch.equal(found.prototypes, model.class_text_embeds) and found.prototypes.shape[:2] == (2, 2)
    with pytest.raises(ValueError, match="`--template_set` needs `--classes`"):
        load_vocabulary(model, processor, None, None, "single")
    model.set_vocabulary(["floor", "wall"], processor=processor)
    found = load_vocabulary(model, processor, None, None, "single")
    assert torch.equal(found.prototypes, model.get_text_prototypes(processor, ["floor", "wall"], "single"))


def test_a_checkpoint_is_created_with_the_phrases_of_a_split(tmp_path: Path) -> None:
    (tmp_path / "split.yaml").write_text("classes: [sofa, grass]\nunseen: [sofa]\nphrases: {sofa: [sofa, couch]}\n")
    command = [sys.executable, "scripts/create_checkpoint.py", "--clip", "scripts/assets/small_clip"]
    command += ["--vocabulary", str(tmp_path / "split.yaml"), "--output_dir", str(tmp_path / "made")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    model, processor = load_checkpoint(tmp_path / "made")
    expected = model.get_text_prototypes(processor, {"sofa": ["sofa", "couch"], "grass": ["grass"]})
    torch.testing.assert_close(model.class_text_embeds, expected)
    assert model.class_text_embeds.shape[:2] == (2, 2) and model.seen_class_mask.tolist() == [False, True]


def test_yaml_splits(tmp_path: Path) -> None:
    file = tmp_path / "split.yaml"
    text = "classes: [sofa, grass, background]\nunseen: [sofa]\n"
    file.write_text(text + "phrases:\n  sofa: [sofa, couch]\n  background: [road, wall]\n")
    split = load_split(file)
    assert split.vocabulary == {"sofa": ["sofa", "couch"], "grass": ["grass"], "background": ["road", "wall"]}
    assert load_split("voc2012").vocabulary["cat"] == ["cat"]
    pseudo = pseudo_unseen_split(split)
    assert set(pseudo.vocabulary) == {"grass", "background"} and pseudo.vocabulary["background"] == ["road", "wall"]
    for wrong, message in [
        ("phrases: {tree: [oak]}", "`phrases` contains 'tree', not found in `classes`"),
        ("phrases: {sofa: couch}", "`phrases` of 'sofa' is 'couch'; expected a list"),
        ("phrases: {sofa: []}", "expected a list of strings"),
        ("phrases: {sofa: [couch, couch]}", "more than once"),
        ("phrases: [sofa]", "expected one class name and its list of phrases"),
    ]:
        file.write_text("classes: [sofa, grass]\n" + wrong)
        with pytest.raises(ValueError, match=message):
            load_split(file)
