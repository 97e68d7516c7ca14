# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Conversion of open_clip's models, weights and tokens to transformers; unsupported models must raise errors."""

import json
import logging
import random
import unicodedata
from pathlib import Path
from typing import Any

import ftfy
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from zeroshot.clip_conversion import (
    clip_config_from_open_clip,
    clip_from_open_clip,
    clip_tokenizer_from_open_clip,
    convert_state_dict,
    load_clip,
)


TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8, "mlp_ratio": 2.5},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3},
}
NAME = "ViT-tiny-for-tests"
CLIP_NORMALIZATION = {
    "image_mean": list(open_clip.OPENAI_DATASET_MEAN),
    "image_std": list(open_clip.OPENAI_DATASET_STD),
}
OTHER_MEAN, OTHER_STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
PROMPTS = ["a photo of a traffic light", "crème brûlée, 2 kinds", "", "don't", "зебра " * 30]

# (first, last) code points of letters of many scripts; each block is filled.
SCRIPTS = {
    "latin": (0x61, 0x7A),
    "latin capitals": (0x41, 0x5A),
    "latin accents": (0xE0, 0xF6),
    "greek without sigma": (0x3B1, 0x3C1),
    "cyrillic": (0x410, 0x44F),
    "armenian": (0x561, 0x586),
    "hebrew": (0x5D0, 0x5EA),
    "arabic": (0x621, 0x63A),
    "devanagari": (0x905, 0x939),
    "bengali": (0x995, 0x9A8),
    "tamil": (0xB95, 0xBB9),
    "thai": (0xE01, 0xE30),
    "georgian": (0x10D0, 0x10F0),
    "ethiopic": (0x1200, 0x1246),
    "hiragana": (0x3041, 0x3096),
    "katakana": (0x30A1, 0x30FA),
    "han": (0x4E00, 0x9FA5),
    "hangul": (0xAC00, 0xD7A3),
    "emoji": (0x1F400, 0x1F43F),
}


@pytest.fixture(scope="module", autouse=True)
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("configs") / f"{NAME}.json"
    path.write_text(json.dumps(TINY))
    open_clip.add_model_config(path)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return clip_tokenizer_from_open_clip()


def build(cfg: str | dict[str, Any], **options: Any) -> open_clip.CLIP:
    """An open_clip model with random weights, also for those that open_clip initialises with zeros and ones."""
    torch.manual_seed(0)
    cfg = open_clip.get_model_config(cfg) if isinstance(cfg, str) else cfg
    cls = open_clip.CustomTextCLIP if options.pop("custom_text", False) else open_clip.CLIP
    model = cls(**{**cfg, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@torch.no_grad()
def assert_same(ours: CLIPModel, theirs: open_clip.CLIP, tokenizer: CLIPTokenizer, images: int = 1) -> None:
    """Embeddings of random images and texts, each with its own tokens, are within 1e-5 of open_clip's."""
    side = ours.config.vision_config.image_size
    pixels = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(1))
    length = tokenizer.model_max_length
    tokens = tokenizer(PROMPTS[:2], truncation=True, padding=True, max_length=length, return_tensors="pt")
    pairs = {
        "image": (ours.get_image_features(pixels).pooler_output, theirs.encode_image(pixels)),
        "text": (
            ours.get_text_features(**tokens).pooler_output,
            theirs.encode_text(open_clip.tokenize(PROMPTS[:2], context_length=length)),
        ),
    }
    for what, (ours_embeds, theirs_embeds) in pairs.items():
        difference = (ours_embeds - theirs_embeds).abs().max().item()
        print(f"{what}: {difference:.1e} of {theirs_embeds.abs().max():.1f}")
        assert theirs_embeds.std() > 1e-2
        assert difference < 1e-5, what
    torch.testing.assert_close(ours.logit_scale, theirs.logit_scale.reshape(()))


def convert(theirs: open_clip.CLIP, cfg: str | dict[str, Any], quick_gelu: bool | None = None) -> CLIPModel:
    config = clip_config_from_open_clip(cfg, quick_gelu)
    state_dict = convert_state_dict(theirs.state_dict(), config)
    return CLIPModel.from_pretrained(None, config=config, state_dict=state_dict).eval()


# ------------------------------------------------------------------------------------------------------ embeddings


@pytest.mark.parametrize(
    "name",
    [
        "ViT-B-32",
        pytest.param("ViT-B-16", marks=pytest.mark.slow),
        pytest.param("ViT-B-16-quickgelu", marks=pytest.mark.slow),
        pytest.param("ViT-L-14", marks=pytest.mark.slow),
    ],
)
def test_embeddings_of_real_sizes_equal_open_clips(name: str, tokenizer: CLIPTokenizer) -> None:
    theirs = build(name)
    assert_same(convert(theirs, name), theirs, tokenizer)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quick_gelu": True},
        {"custom_text": True},
        {"nonscalar_logit_scale": True, "init_logit_scale": 1.0},
    ],
    ids=str,
)
def test_embeddings_of_tiny_variants_equal_open_clips(options: dict[str, Any]) -> None:
    theirs = build(TINY, **options)
    assert_same(convert(theirs, {**TINY, **options}), theirs, clip_tokenizer_from_open_clip(20), images=2)


def test_quick_gelu_matters() -> None:
    theirs = build(TINY, quick_gelu=True)
    with pytest.raises(AssertionError):
        assert_same(convert(theirs, TINY), theirs, clip_tokenizer_from_open_clip(20))
    assert_same(convert(theirs, TINY, quick_gelu=True), theirs, clip_tokenizer_from_open_clip(20))


@torch.no_grad()
def test_text_features_do_not_depend_on_padding() -> None:
    theirs, tokens = build(TINY), clip_tokenizer_from_open_clip(20)
    ours = convert(theirs, TINY)
    expected = theirs.encode_text(open_clip.tokenize(PROMPTS, context_length=20))
    for padding in ("max_length", "longest"):
        inputs = tokens(PROMPTS, truncation=True, padding=padding, return_tensors="pt")
        torch.testing.assert_close(ours.get_text_features(**inputs).pooler_output, expected, atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------------------------- files


def save(state_dict: dict[str, Tensor], path: Path) -> str:
    save_file({key: weight.contiguous() for key, weight in state_dict.items()}, path)
    return str(path)


def repository(folder: Path, model: open_clip.CLIP, **cfg: Any) -> Path:
    """A folder as open_clip saves it for the hub."""
    folder.mkdir(parents=True)
    content = {"model_cfg": {**TINY, **cfg}, "preprocess_cfg": {"mean": OTHER_MEAN, "std": OTHER_STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    save(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def test_safetensors_file(tmp_path: Path) -> None:
    theirs = build(TINY)
    ours, tokens, normalization = clip_from_open_clip(NAME, save(theirs.state_dict(), tmp_path / "clip.safetensors"))
    assert_same(ours, theirs, tokens)
    assert tokens.model_max_length == 20
    assert not ours.training
    assert normalization == CLIP_NORMALIZATION

    ours.save_pretrained(tmp_path / "ours")
    tokens.save_pretrained(tmp_path / "ours")
    CLIPImageProcessorPil(image_mean=OTHER_MEAN, image_std=OTHER_STD).save_pretrained(tmp_path / "ours")
    again, tokens, normalization = load_clip(str(tmp_path / "ours"))
    assert_same(again, theirs, tokens)
    assert normalization == {"image_mean": OTHER_MEAN, "image_std": OTHER_STD}


def test_pytorch_file_of_a_distributed_training_in_half_precision(tmp_path: Path) -> None:
    theirs = build(TINY).half().float()
    weights = {f"module.{key}": weight.half() for key, weight in theirs.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "epoch_3.pt")
    ours, tokens, _ = clip_from_open_clip(NAME, str(tmp_path / "epoch_3.pt"))
    assert ours.dtype is torch.float32
    assert_same(ours, theirs, tokens)


def test_file_with_code_is_not_run(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": Malicious()}, tmp_path / "code.pt")
    torch.jit.trace(torch.nn.Linear(1, 1), torch.zeros(1)).save(tmp_path / "archive.pt")
    (tmp_path / "damaged.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "damaged.pt").write_bytes(b"")
    for name in ("code.pt", "archive.pt", "damaged.safetensors", "damaged.pt"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as a file of tensors only"):
            clip_from_open_clip(NAME, str(tmp_path / name))
    assert not (tmp_path / "ran").exists()
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="contains no named weights"):
        clip_from_open_clip(NAME, str(tmp_path / "list.pt"))


def test_tag_decides_on_quick_gelu_and_normalization(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = build(TINY, quick_gelu=True)
    tag = {
        "file": save(theirs.state_dict(), tmp_path / "clip.safetensors"),
        "quick_gelu": True,
        "mean": tuple(OTHER_MEAN),
        "std": tuple(OTHER_STD),
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, NAME, {"openai": tag})
    ours, tokens, normalization = clip_from_open_clip(NAME, "openai")
    assert_same(ours, theirs, tokens)
    assert normalization == {"image_mean": OTHER_MEAN, "image_std": OTHER_STD}
    with pytest.raises(ValueError, match="'laion', which is neither a file nor one of the tags of .*: openai"):
        clip_from_open_clip(NAME, "laion")


def test_download_that_fails_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise FileNotFoundError("no network")

    monkeypatch.setattr(open_clip, "download_pretrained", fail)
    with pytest.raises(OSError, match=r"timm/vit_base_patch16_clip_224.openai/\) and pass the file as `pretrained`"):
        load_clip("ViT-B/16", "openai")


def test_repositories_in_a_folder_and_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = build(TINY, quick_gelu=True)
    folder = repository(tmp_path / "folder", theirs, quick_gelu=True)
    commit = "0" * 40
    hub = tmp_path / "cache" / "models--someone--clip"
    repository(hub / "snapshots" / commit, theirs, quick_gelu=True)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(commit)
    for source in ([str(folder)], [f"local-dir:{folder}"], ["hf-hub:someone/clip"], [NAME, "hf-hub:someone/clip"]):
        ours, tokens, normalization = load_clip(*source, cache_dir=str(tmp_path / "cache"))
        assert_same(ours, theirs, tokens)
        assert normalization == {"image_mean": OTHER_MEAN, "image_std": OTHER_STD}

    with pytest.raises(ValueError, match="is another model than `model_name` 'ViT-B-32'"):
        load_clip("ViT-B-32", "hf-hub:someone/clip", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="leave `pretrained` out"):
        load_clip(str(folder), "openai")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="must contain"):
        load_clip(f"local-dir:{folder}")


def test_local_file_of_a_model_that_exists_with_quick_gelu_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(build(TINY).state_dict(), tmp_path / "clip.safetensors")
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="choose the model"):
        clip_from_open_clip("ViT-B-16", path)
    assert "use the name ViT-B-16-quickgelu" in caplog.text


# ------------------------------------------------------------------------------------------------ transformers' CLIP


def test_random_weights_follow_the_seed_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    models = [load_clip(NAME)[0], clip_from_open_clip(NAME, seed=0)[0], clip_from_open_clip(NAME, seed=1)[0]]
    assert torch.equal(torch.rand(3), expected)
    weights = [model.text_projection.weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_transformers_folders_that_are_no_whole_clip(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokens, _ = load_clip(NAME)
    whole, blind, mute, tower = (str(tmp_path / name) for name in ("whole", "blind", "mute", "tower"))
    for folder in (whole, blind):
        model.save_pretrained(folder)
        tokens.save_pretrained(folder)
    assert load_clip(whole)[2] == CLIP_NORMALIZATION
    assert "has no image processor" in caplog.text

    weights = load_file(f"{blind}/model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, f"{blind}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 'visual_projection\.weight'"):
        load_clip(blind)
    model.save_pretrained(mute)
    with pytest.raises(ValueError, match="tokenizer's files are missing"):
        load_clip(mute)
    model.text_model.save_pretrained(tower)
    with pytest.raises(ValueError, match="type 'clip_text_model'; expected a complete CLIP"):
        load_clip(tower)
    with pytest.raises(ValueError, match="leave `pretrained` out"):
        load_clip(whole, "openai")
    with pytest.raises(ValueError, match=r"neither an open_clip model name \(close: .*ViT-B-16"):
        load_clip("ViT-B-16x")


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("convnext_base", "a timm image tower"),
        ("EVA02-B-16", "a timm image tower"),
        ("ViT-B-16-SigLIP", "SigLIP's logit bias"),
        ("RN50", "a ResNet image tower"),
        ("RN50-quickgelu", "a ResNet image tower"),
        ("roberta-ViT-B-32", "a Hugging Face text tower"),
        ("coca_ViT-B-32", "CoCa's text decoder"),
        ("ViT-L-14-CLIPA", "no layer norm before the transformer"),
        ("ViT-H-14-worldwide", "a tokenizer other than CLIP's"),
        ("ViT-M-16-alt", "layer scale"),
    ],
)
def test_other_families_are_refused(name: str, part: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has .*{part}.* choose one of open_clip's plain ViTs"):
        load_clip(name)


def test_special_settings_are_refused() -> None:
    cfg = {**TINY, "text_cfg": {**TINY["text_cfg"], "no_causal_mask": True}}
    with pytest.raises(ValueError, match=r"a special setting \(text_cfg.no_causal_mask = True\)"):
        clip_config_from_open_clip(cfg)
    cfg = {**TINY, "vision_cfg": {**TINY["vision_cfg"], "image_size": [32, 64]}}
    with pytest.raises(ValueError, match=r"a non-square size \(vision_cfg.image_size = \[32, 64\]"):
        clip_config_from_open_clip(cfg)
    with pytest.raises(ValueError, match=r"a special setting \(from_the_future\)"):
        clip_config_from_open_clip({**TINY, "from_the_future": 1})
    with pytest.raises(ValueError, match=r"lacks \['text_cfg'\]"):
        clip_config_from_open_clip({"embed_dim": 24, "vision_cfg": TINY["vision_cfg"]})
    with pytest.raises(ValueError, match=r"is not a model of open_clip \(close: .*ViT-B-16"):
        clip_config_from_open_clip("ViT-B-16x")


def test_plain_vits_are_accepted() -> None:
    accepted = []
    for name in open_clip.list_models():
        try:
            accepted.append(clip_config_from_open_clip(name))
        except ValueError:
            continue
    assert len(accepted) >= 32  # open_clip 3.3's 31 and the tiny one
    giant = clip_config_from_open_clip("ViT-bigG-14")
    assert (giant.vision_config.num_attention_heads, giant.vision_config.intermediate_size) == (16, 8192)


def test_weights_that_do_not_fit_are_named() -> None:
    config, weights = clip_config_from_open_clip(TINY), build(TINY).state_dict()
    with pytest.raises(ValueError, match=r"has 'visual.transformer.resblocks.0.ls_1.gamma'"):
        convert_state_dict({**weights, "visual.transformer.resblocks.0.ls_1.gamma": torch.ones(48)}, config)
    with pytest.raises(ValueError, match=r"has 'visual.transformer.resblocks.2.ln_1.weight'"):
        convert_state_dict({**weights, "visual.transformer.resblocks.2.ln_1.weight": torch.ones(48)}, config)
    for key in weights:
        with pytest.raises(ValueError, match=f"lacks '{key}'"):
            convert_state_dict({other: weight for other, weight in weights.items() if other != key}, config)
    for key in ("visual.positional_embedding", "visual.proj", "transformer.resblocks.1.attn.in_proj_weight"):
        with pytest.raises(ValueError, match=rf"has '{key}' of shape \(\d+, \d+\), expected \(\d+, \d+\)"):
            convert_state_dict({**weights, key: weights[key][1:]}, config)


def test_converted_weights_can_be_saved(tmp_path: Path) -> None:
    config, weights = clip_config_from_open_clip(TINY), build(TINY).state_dict()
    converted = convert_state_dict({"attn_mask": torch.zeros(20, 20), **weights}, config)
    assert converted.keys() == CLIPModel(config).state_dict().keys()
    save_file(converted, tmp_path / "converted.safetensors")


# ----------------------------------------------------------------------------------------------------------- tokens


def class_names(count: int) -> list[str]:
    """Typical and unusual class names: words in many scripts, numbers, punctuation, contractions."""
    draw = random.Random(0)
    english = ("traffic light", "Wall-Stone", "T-shirt", "people's", "don't", "we've", "I'm", "he'll", "THEY'D", "vs.")
    punctuation = " ,.;:!?()[]{}/\\|-_+*=<>@#$%^~'\"`§°±«»…–—№"
    names = []
    for index in range(count):
        first, last = list(SCRIPTS.values())[index % len(SCRIPTS)]
        words = []
        for _ in range(draw.randint(1, 4)):
            kind = draw.random()
            if kind < 0.6:
                words.append("".join(chr(draw.randint(first, last)) for _ in range(draw.randint(1, 9))))
            elif kind < 0.75:
                words.append(draw.choice(english))
            elif kind < 0.88:
                words.append(str(draw.randint(0, 10 ** draw.randint(1, 6))))
            else:
                words.append("".join(draw.choice(punctuation) for _ in range(draw.randint(1, 4))))
        names.append(draw.choice(("", " ", "  ", "\t", "-")).join(words) + draw.choice(("", "", "!", "'s", " ")))
    return names


def tokens_of_open_clip(text: str) -> list[int]:
    tokens = open_clip.tokenize(text)[0].tolist()
    return tokens[: tokens.index(49407) + 1]


def test_tokens_equal_open_clips(tokenizer: CLIPTokenizer) -> None:
    names = class_names(1000)
    assert len(set(names)) > 950
    ours = tokenizer(names, truncation=True)["input_ids"]
    different = [name for name, ids in zip(names, ours, strict=True) if ids != tokens_of_open_clip(name)]
    assert not different
    assert sum(len(ids) == 77 for ids in ours) > 0, "no text was cut"


def test_tokenizer_survives_saving(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    for name in class_names(50):
        assert again(name)["input_ids"] == tokenizer(name)["input_ids"]
    assert (again.model_max_length, again.pad_token_id, len(again)) == (77, 49407, 49408)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("people‘s “choice”", 'people\'s "choice"'),
        ("ｃａｔ １２", "cat 12"),
        ("ﬁre ĳs", "fire ijs"),
        ("cafÃ©", "café"),
        ("cat\x07fish", "catfish"),
        ("cats &amp; dogs", "cats & dogs"),
        ("cats &amp;amp; dogs", "cats & dogs"),
    ],
)
def test_documented_differences_by_cleaning(text: str, cleaned: str, tokenizer: CLIPTokenizer) -> None:
    assert tokenizer(text)["input_ids"] != tokens_of_open_clip(text)
    assert tokenizer(cleaned)["input_ids"] == tokens_of_open_clip(text)


def test_documented_differences_by_sigma_and_special_tokens(tokenizer: CLIPTokenizer) -> None:
    assert tokens_of_open_clip("ΟΔΟΣ") == tokens_of_open_clip("οδος") == tokenizer("οδος")["input_ids"]
    assert tokenizer("ΟΔΟΣ")["input_ids"] == tokenizer("οδοσ")["input_ids"] != tokenizer("οδος")["input_ids"]
    assert tokenizer("a <|endoftext|>")["input_ids"] == tokens_of_open_clip("a <end_of_text>") + [49407]
    assert tokenizer("a <end_of_text>")["input_ids"] != tokens_of_open_clip("a <end_of_text>")


@pytest.mark.slow
def test_no_other_single_character_differs(tokenizer: CLIPTokenizer) -> None:
    characters = [chr(code) for code in range(0x20, 0x30000) if code != 0x345]
    texts = [f"a {c}b of {c}" for c in characters if unicodedata.category(c) not in ("Cs", "Cn", "Co")]
    for start in range(0, len(texts), 1000):
        batch = texts[start : start + 1000]
        theirs = open_clip.tokenize(batch).tolist()
        for text, ours, row in zip(batch, tokenizer(batch)["input_ids"], theirs, strict=True):
            same = ours == row[: len(ours)]
            assert same or ftfy.fix_text(text) != unicodedata.normalize("NFC", text), f"U+{ord(text[2]):04X}"
