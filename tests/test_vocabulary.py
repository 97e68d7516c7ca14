# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The vocabulary: stored classes, computation of their prototypes, and the cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import CLASSES, UNSEEN, picture, tiny_config, tiny_model, tiny_processor

from modeling_alignzeg import TEMPLATE_SETS, AlignZegConfig, AlignZegImageProcessor, AlignZegModel, AlignZegProcessor


@pytest.fixture(scope="module")
def processor() -> AlignZegProcessor:
    return tiny_processor()


@pytest.fixture
def model() -> AlignZegModel:
    return tiny_model()


def plain_prototypes(
    model: AlignZegModel, processor: AlignZegProcessor, names: list[str], templates: Iterable[str]
) -> torch.Tensor:
    """The prototypes by definition, one sentence at a time."""
    rows = []
    for name in names:
        sentences = []
        for template in templates:
            tokens = processor.tokenizer(template.format(name), truncation=True, return_tensors="pt")
            pooled = model.text_encoder.text_model(**tokens).pooler_output
            sentences.append(F.normalize(model.text_encoder.text_projection(pooled), dim=-1))
        rows.append(F.normalize(torch.cat(sentences).mean(0), dim=-1))
    return torch.stack(rows)


@pytest.mark.parametrize("template_set", sorted(TEMPLATE_SETS))
def test_prototypes_are_mean_embeddings_of_the_sentences(
    model: AlignZegModel, processor: AlignZegProcessor, template_set: str
) -> None:
    names = ["grass", "a thing without a word of its own"]
    expected = plain_prototypes(model, processor, names, TEMPLATE_SETS[template_set])
    torch.testing.assert_close(model.get_text_prototypes(processor, names, template_set), expected)


def test_template_set_comes_from_the_config_or_the_call(processor: AlignZegProcessor) -> None:
    model = tiny_model(template_set="vild")
    torch.testing.assert_close(
        model.get_text_prototypes(processor, ["grass"]),
        plain_prototypes(model, processor, ["grass"], TEMPLATE_SETS["vild"]),
    )
    own = ["{} in the rain", "the {}"]
    torch.testing.assert_close(
        model.get_text_prototypes(processor, ["grass"], own), plain_prototypes(model, processor, ["grass"], own)
    )


def test_order_is_the_callers(model: AlignZegModel, processor: AlignZegProcessor) -> None:
    names = ["brick", "red striped", "grass", "blue dotted"]
    forth, back = model.get_text_prototypes(processor, names), model.get_text_prototypes(processor, names[::-1])
    torch.testing.assert_close(forth, back.flip(0))
    model.set_vocabulary(names, ["grass", "brick"], processor)
    assert [model.config.id2label[i] for i in range(4)] == names
    assert [model.config.label2id[name] for name in names] == [0, 1, 2, 3]
    assert model.seen_class_mask.tolist() == [False, True, False, True]
    torch.testing.assert_close(model.class_text_embeds, forth)


def test_batches_of_prompts_change_nothing(model: AlignZegModel, processor: AlignZegProcessor) -> None:
    names = [f"class {i}" for i in range(11)]
    whole = model.get_text_prototypes(processor, names, "vild")
    model.text_encoder._cache.clear()
    torch.testing.assert_close(model.get_text_prototypes(processor, names, "vild", batch_size=30), whole)


def test_short_prompts_are_not_padded_to_the_longest(
    model: AlignZegModel, processor: AlignZegProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "a very long name of a thing that nobody ever saw"
    names = [long, *(f"n{i}" for i in range(7)), f"{long} again"]
    passes = count_passes(model, monkeypatch)
    monkeypatch.setattr("modeling_alignzeg.text_encoder_alignzeg.PROMPTS_AT_ONCE", 50)
    found = model.get_text_prototypes(processor, names, "vild", batch_size=8)
    monkeypatch.undo()
    expected = plain_prototypes(model, processor, names, TEMPLATE_SETS["vild"])
    torch.testing.assert_close(found, expected)
    tokens = sum(ids.numel() for ids, _ in passes)
    widest = max(ids.shape[1] for ids, _ in passes)
    assert tokens < 0.8 * widest * len(names) * len(TEMPLATE_SETS["vild"])


def test_saved_vocabulary_comes_back(model: AlignZegModel, processor: AlignZegProcessor, tmp_path: Path) -> None:
    names = ["snow", "a cat", "Katze", "猫"]
    model.set_vocabulary(names, ["猫"], processor, template_set="vild")
    model.save_pretrained(tmp_path)
    config = AlignZegConfig.from_pretrained(tmp_path)
    assert list(config.id2label.values()) == names and config.unseen_labels == ["猫"] and config.template_set == "vild"
    loaded = AlignZegModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.class_text_embeds, model.class_text_embeds)
    assert loaded.seen_class_mask.tolist() == [True, True, True, False]
    pixels = processor(images=picture(), return_tensors="pt")
    with torch.no_grad():
        ours, theirs = model(**pixels), loaded(**pixels)
    assert ours.class_queries_logits.shape[-1] == 5
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def test_vocabulary_of_another_size_is_loaded_over_the_fresh_one(model: AlignZegModel, tmp_path: Path) -> None:
    model.set_vocabulary([f"n{i}" for i in range(9)], text_prototypes=F.normalize(torch.randn(9, 24), dim=-1))
    model.save_pretrained(tmp_path)
    assert AlignZegModel.from_pretrained(tmp_path).class_text_embeds.shape == (9, 24)


def test_call_with_names_equals_stored_vocabulary(model: AlignZegModel, processor: AlignZegProcessor) -> None:
    pixels = processor(images=picture(), return_tensors="pt")
    model.set_vocabulary(CLASSES, UNSEEN, processor)
    with torch.no_grad():
        stored = model(**pixels)
        prototypes = model(
            **pixels,
            text_prototypes=model.get_text_prototypes(processor, CLASSES),
            seen_class_mask=torch.tensor([name not in UNSEEN for name in CLASSES]),
        )
        tokens = model(
            **pixels, **processor(text=list(CLASSES), return_tensors="pt"), seen_class_mask=model.seen_class_mask
        )
    for name in ("class_queries_logits", "unseen_logits", "seen_class_mask"):
        torch.testing.assert_close(stored[name], prototypes[name])
        torch.testing.assert_close(stored[name], tokens[name])


def test_ten_thousand_names(model: AlignZegModel, processor: AlignZegProcessor) -> None:
    names = [f"thing number {i}" for i in range(10_000)]
    model.set_vocabulary(names, names[5000:], processor, template_set="single")
    assert model.class_text_embeds.shape == (10_000, 24)
    torch.testing.assert_close(
        model.class_text_embeds[7:8], plain_prototypes(model, processor, names[7:8], TEMPLATE_SETS["single"])
    )
    image = picture()
    with torch.no_grad():
        outputs = model(**processor(images=image, return_tensors="pt"))
    labels = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])[0]
    assert labels.shape == image.size[::-1] and 0 <= labels.min() and labels.max() < 10_000


# --- cache


def count_passes(model: AlignZegModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    passes, original = [], model.text_encoder.forward
    monkeypatch.setattr(model.text_encoder, "forward", lambda *args: passes.append(args) or original(*args))
    return passes


def test_same_question_is_answered_from_the_cache(
    model: AlignZegModel, processor: AlignZegProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = count_passes(model, monkeypatch)
    first = model.get_text_prototypes(processor, ["grass", "brick"])
    assert len(passes) == 1
    assert torch.equal(model.get_text_prototypes(processor, ("grass", "brick")), first)
    assert torch.equal(model.get_text_prototypes(processor, ["grass", "brick"], TEMPLATE_SETS["single"]), first)
    assert len(passes) == 1
    model.get_text_prototypes(processor, ["brick", "grass"])
    model.get_text_prototypes(processor, ["grass", "brick"], "vild")
    model.get_text_prototypes(processor, "grass")
    assert len(passes) == 4


def test_writing_to_prototypes_leaves_the_cache_alone(model: AlignZegModel, processor: AlignZegProcessor) -> None:
    first = model.get_text_prototypes(processor, ["grass", "brick"])
    expected = first.clone()
    first.zero_()
    second = model.get_text_prototypes(processor, ["grass", "brick"])
    assert torch.equal(second, expected)
    second.zero_()
    assert torch.equal(model.get_text_prototypes(processor, ["grass", "brick"]), expected)


def test_one_name_is_not_its_letters(model: AlignZegModel, processor: AlignZegProcessor) -> None:
    assert model.get_text_prototypes(processor, "abc").shape == (1, 24)
    assert model.get_text_prototypes(processor, ["a", "b", "c"]).shape == (3, 24)


def write_in_place(parameter: torch.nn.Parameter) -> None:
    with torch.no_grad():
        parameter.add_(0.5)


def replace_data(parameter: torch.nn.Parameter) -> None:
    parameter.data = parameter.data + 0.5


@pytest.mark.parametrize("change", [write_in_place, replace_data])
@pytest.mark.parametrize("place", ["text_projection.weight", "text_model.encoder.layers.0.mlp.fc1.bias"])
def test_changed_text_weights_miss_the_cache(
    model: AlignZegModel, processor: AlignZegProcessor, change: Callable[[torch.nn.Parameter], None], place: str
) -> None:
    before = model.get_text_prototypes(processor, ["grass", "brick"])
    change(model.text_encoder.get_parameter(place))
    after = model.get_text_prototypes(processor, ["grass", "brick"])
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, plain_prototypes(model, processor, ["grass", "brick"], TEMPLATE_SETS["single"]))


def test_loaded_and_converted_weights_miss_the_cache(model: AlignZegModel, processor: AlignZegProcessor) -> None:
    before = model.get_text_prototypes(processor, ["grass"])
    model.load_state_dict(tiny_model(seed=1).state_dict())
    after = model.get_text_prototypes(processor, ["grass"])
    assert not torch.equal(before, after)
    assert model.double().get_text_prototypes(processor, ["grass"]).dtype == torch.float64


def test_other_weights_keep_the_cache(
    model: AlignZegModel, processor: AlignZegProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = count_passes(model, monkeypatch)
    model.get_text_prototypes(processor, ["grass"])
    write_in_place(model.side_network.query_embeddings)
    model.get_text_prototypes(processor, ["grass"])
    assert len(passes) == 1


def test_cache_is_bounded(model: AlignZegModel, processor: AlignZegProcessor) -> None:
    for i in range(40):
        model.get_text_prototypes(processor, [f"n{i}"])
    assert len(model.text_encoder._cache) <= 16


def test_embeddings_on_disk_are_used_by_another_process(
    model: AlignZegModel, processor: AlignZegProcessor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = {"ground": ["grass", "brick"], "sofa": ["sofa"]}
    first = model.get_text_prototypes(processor, names, cache_dir=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    later = tiny_model()
    passes = count_passes(later, monkeypatch)
    assert torch.equal(later.get_text_prototypes(processor, names, cache_dir=tmp_path / "cache"), first)
    assert not passes
    file.write_bytes(file.read_bytes()[:-5])  # a damaged file
    later = tiny_model()
    torch.testing.assert_close(later.get_text_prototypes(processor, names, cache_dir=tmp_path / "cache"), first)
    assert [each.name for each in (tmp_path / "cache").iterdir()] == [file.name]


def test_a_failed_write_leaves_nothing(
    model: AlignZegModel, processor: AlignZegProcessor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full_disk(*_) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("modeling_alignzeg.text_encoder_alignzeg.np.save", full_disk)
    with pytest.raises(OSError, match="No space"):
        model.get_text_prototypes(processor, ["grass"], cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["names", "order", "templates", "weights", "dtype"])
def test_embeddings_on_disk_belong_to_names_templates_and_weights(
    model: AlignZegModel, processor: AlignZegProcessor, tmp_path: Path, change: str
) -> None:
    model.get_text_prototypes(processor, ["grass", "brick"], cache_dir=tmp_path)
    names = {"names": ["grass", "bricks"], "order": ["brick", "grass"]}.get(change, ["grass", "brick"])
    templates = "vild" if change == "templates" else "single"
    other = tiny_model()
    if change == "weights":
        write_in_place(other.text_encoder.get_parameter("text_model.encoder.layers.0.mlp.fc1.bias"))
    if change == "dtype":
        other = other.double()
    found = other.get_text_prototypes(processor, names, templates, cache_dir=tmp_path)
    torch.testing.assert_close(found, plain_prototypes(other, processor, names, TEMPLATE_SETS[templates]))
    assert len(list(tmp_path.iterdir())) == 2


def test_prototypes_of_inference_mode_can_be_trained_on(model: AlignZegModel, processor: AlignZegProcessor) -> None:
    with torch.inference_mode():
        prototypes = model.get_text_prototypes(processor, ["grass", "brick"])
    outputs = model(**processor(images=picture(), return_tensors="pt"), text_prototypes=prototypes)
    outputs.class_queries_logits.sum().backward()
    assert model.classifier.adapter.mlp.layers[1].weight.grad is not None


# --- wrong arguments


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"class_names": []}, "class names"),
        ({"class_names": ["grass", ""]}, "Class name 1 is ''"),
        ({"class_names": ["grass", "  \t"]}, "Class name 1"),
        ({"class_names": ["grass", 3]}, "Class name 1 is 3"),
        ({"class_names": ["grass", "brick", "grass"]}, "Class names 0 and 2 are both 'grass'"),
        ({"class_names": ["grass", "grass "]}, "Class names 0 and 1"),
        ({"class_names": ["grass"], "unseen": ["sand"]}, "`unseen` contains 'sand'"),
        ({"class_names": ["grass"], "unseen": 5}, "Class names are of type int"),
        ({"class_names": ["grass"], "processor": None}, "`processor`"),
        ({"class_names": ["grass"], "template_set": "vlid"}, "`template_set` is 'vlid'"),
        ({"class_names": ["grass"], "template_set": ["a photo"]}, r"`template_set\[0\]`"),
        (
            {"class_names": ["grass"], "text_prototypes": torch.ones(1, 23)},
            r"`text_prototypes` has shape \(1, 23\).*24",
        ),
        ({"class_names": ["grass"], "text_prototypes": torch.ones(24)}, "`text_prototypes` has shape"),
        (
            {"class_names": ["grass"], "text_prototypes": torch.ones(2, 24)},
            "`text_prototypes` has 2 rows for the 1 names",
        ),
        ({"class_names": ["grass", "grass"], "text_prototypes": torch.ones(2, 24)}, "both 'grass'"),
        ({"class_names": ["a"], "text_prototypes": torch.ones(1, 24, device="meta")}, "`text_prototypes` .* meta"),
        ({"class_names": ["a"], "text_prototypes": torch.full((1, 24), torch.nan)}, "empty or contains NaN"),
        ({"class_names": ["a"], "text_prototypes": torch.ones(1, 24, dtype=torch.complex64)}, "type complex64"),
        ({"class_names": ["a"], "text_prototypes": torch.ones(1, 24, dtype=torch.long)}, "type int64"),
        ({"class_names": ["a"], "text_prototypes": {"a": 1}}, "`text_prototypes` is a dict"),
        (
            {"class_names": ["a"], "text_prototypes": torch.ones(1, 24), "template_set": "nonsense"},
            "`template_set` is 'nonsense'",
        ),
    ],
)
def test_wrong_vocabulary_is_refused_and_changes_nothing(
    model: AlignZegModel, processor: AlignZegProcessor, arguments: dict[str, Any], message: str
) -> None:
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    config = model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        model.set_vocabulary(**{"processor": processor, **arguments})
    assert model.config.to_dict() == config
    for name, tensor in model.named_buffers():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"text_prototypes": torch.ones(3, 23)}, r"`text_prototypes` has shape \(3, 23\)"),
        ({"text_prototypes": torch.ones(0, 24)}, "`text_prototypes`.*at least one"),
        ({"seen_class_mask": torch.ones(3, dtype=torch.bool)}, r"`seen_class_mask` has shape \(3,\); expected \(4,\)"),
    ],
)
def test_wrong_prototypes_of_a_call_are_named(
    model: AlignZegModel, processor: AlignZegProcessor, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model(**processor(images=picture(), return_tensors="pt"), **arguments)


@pytest.mark.parametrize("vocab_size", [10_000, 50])
def test_tokenizers_that_cannot_be_right_are_refused(processor: AlignZegProcessor, vocab_size: int) -> None:
    text = {**tiny_config().text_config.to_dict(), "vocab_size": vocab_size}
    model = tiny_model(text_config=text)
    with pytest.raises(ValueError, match=f"has .* tokens and the text tower {vocab_size}: tokenizer.json is missing"):
        model.get_text_prototypes(processor, ["grass"])


def test_prototypes_do_not_depend_on_the_mode_of_the_model(processor: AlignZegProcessor) -> None:
    text = {**tiny_config().text_config.to_dict(), "attention_dropout": 0.5}
    model = tiny_model(text_config=text)
    expected = model.get_text_prototypes(processor, ["grass"])
    model.train().text_encoder._cache.clear()
    assert torch.equal(model.get_text_prototypes(processor, ["grass"]), expected)


def test_tokenizers_with_added_tokens_are_not_refused(model: AlignZegModel) -> None:
    processor = AlignZegProcessor(AlignZegImageProcessor(), copy.deepcopy(tiny_processor().tokenizer))
    processor.tokenizer.add_tokens(["<unused>"])
    assert model.get_text_prototypes(processor, ["grass"]).shape == (1, 24)
