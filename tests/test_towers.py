# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""SigLIP and MetaCLIP 2 of transformers as frozen towers, against transformers' own models with random weights."""

from __future__ import annotations

import json
import runpy
import string
import sys
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from tiny import CLASSES, TOWER, UNSEEN, picture, tiny_config
from torch import Tensor
from transformers import (
    AutoModel,
    AutoProcessor,
    GemmaTokenizer,
    MetaClip2Config,
    MetaClip2Model,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Siglip2Config,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    XLMRobertaTokenizer,
)

from modeling_alignzeg import AlignZegModel, AlignZegOutput, AlignZegProcessor
from zeroshot.export import export_program
from zeroshot.onnx_folder import export_folders
from zeroshot.towers import assemble, check_source, load_towers


ROOT = Path(__file__).resolve().parent.parent
LETTERS = ["▁", *string.ascii_letters, *string.digits, ".", ","]
LENGTH = 32  # tokens of a text
VISION = {**TOWER, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
SMALL = {  # of AlignZeg's own parts
    name: getattr(tiny_config(), name)
    for name in (
        *("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        *("mask_dim", "num_queries", "num_refinement_layers", "attention_bias_dim", "adapter_dim"),
        *("num_background_prototypes", "indicator_dim", "train_num_points", "template_set"),
    )
}


def gemma_tokenizer() -> GemmaTokenizer:
    """Of single letters, as the hub's SigLIP 2 has it: upper case is kept, and padding would be at the left."""
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    vocab = {token: index for index, token in enumerate([*special, *LETTERS])}
    return GemmaTokenizer(vocab=vocab, merges=[], add_bos_token=False, add_eos_token=True)


def xlm_tokenizer() -> XLMRobertaTokenizer:
    """Of single letters; a text ends with 2, which is not its highest token."""
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    return XLMRobertaTokenizer(vocab=[*special, *((letter, -1.0) for letter in LETTERS)])


def random_clip(kind: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A whole model of transformers in which no weight is zero and no norm an identity, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = gemma_tokenizer() if kind == "siglip" else xlm_tokenizer()
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    text |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if kind == "siglip":
        clip = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    else:
        widths = {"projection_dim": 24}
        clip = MetaClip2Model(MetaClip2Config(text_config={**text, **widths}, vision_config=VISION | widths, **widths))
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            parameter.copy_(2.0 + torch.rand_like(parameter)) if name == "logit_scale" else parameter.add_(
                0.1 * torch.randn_like(parameter)
            )
    return clip.eval(), tokenizer


def save_clip(kind: str, folder: Path) -> Path:
    for part in (*random_clip(kind), SiglipImageProcessorPil(image_mean=[0.4] * 3, image_std=[0.6] * 3)):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["siglip", "metaclip_2"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, save_clip(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip("siglip", tmp_path_factory.mktemp("siglip"))


def build(folder: Path, scale: float = 1.0) -> tuple[AlignZegModel, AlignZegProcessor]:
    return assemble(load_towers(str(folder)), config={**SMALL, "clip_input_scale": scale})


@pytest.fixture
def model(siglip_folder: Path) -> AlignZegModel:
    return build(siglip_folder)[0]


@cache
def siglip() -> SiglipModel:
    return random_clip("siglip")[0]


def pixels(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def run(model: AlignZegModel, **inputs: Any) -> AlignZegOutput:
    with torch.no_grad():
        return model(**inputs)


def features(output: Any) -> Tensor:
    return F.normalize(output.pooler_output, dim=-1)


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape and theirs.std() > 1e-2
    return (ours - theirs).abs().max().item()


# ----------------------------------------------------------------------------------------------------------- parity


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (48, 64)], ids=str)
def test_all_of_an_image_is_read_as_the_image(source: tuple[str, Path], size: tuple[int, int]) -> None:
    kind, folder = source
    clip, (model, _) = random_clip(kind)[0], build(folder)
    images = pixels(2, *size)
    expected = features(clip.get_image_features(images, interpolate_pos_encoding=True))
    assert difference(*expected) > 1e-2
    tower = model.recognizer.hidden_states(images, None)
    for embed in model.recognizer.pool(tower, torch.ones(2, 2, *tower.grid.size)).unbind(1):
        off = difference(embed, expected)
        print(f"{kind} {size}: {off:.1e}")
        assert off < 1e-5
    torch.testing.assert_close(model.logit_scale, clip.logit_scale.reshape(()))


@torch.no_grad()
def test_a_proposal_with_a_full_mask_is_read_as_the_image(model: AlignZegModel) -> None:
    images = pixels(2, 48, 64)
    tower = model.recognizer.hidden_states(images, None)
    proposals = model.side_network(images, model.recognizer.maps(tower), None)
    embeds = model.recognizer(tower, proposals._replace(masks=torch.full_like(proposals.masks, 9.0)))
    expected = features(siglip().get_image_features(images, interpolate_pos_encoding=True))
    assert difference(embeds, expected[:, None].expand_as(embeds)) < 1e-5


@torch.no_grad()
def test_prototypes_equal_text_features(source: tuple[str, Path]) -> None:
    kind, folder = source
    clip, tokenizer = random_clip(kind)
    model, processor = build(folder)
    names = ["grass", "red striped", "a zebra, 2 kinds", "many words " * 9]
    prompts = [f"a photo of a {name}.".replace("  ", " ") for name in names]
    if kind == "siglip":  # as its authors say: lower case, padded at the right, without a mask
        options = {"padding": "max_length", "padding_side": "right", "return_attention_mask": False}
    else:
        options = {"padding": True}
    tokens = tokenizer(prompts, truncation=True, max_length=LENGTH, return_tensors="pt", **options)
    template = ["a photo of a {}."]
    off = difference(model.get_text_prototypes(processor, names, template), features(clip.get_text_features(**tokens)))
    print(f"{kind}: {off:.1e}")
    assert off < 1e-5
    loud = model.get_text_prototypes(processor, [name.upper() for name in names], ["A PHOTO OF A {}."])
    quiet = model.get_text_prototypes(processor, names, template)
    assert torch.equal(loud, quiet) == (kind == "siglip")


# ------------------------------------------------------------------------------------------------- attention pooling


@torch.no_grad()
def test_a_mask_leaves_its_patches_to_siglips_head(model: AlignZegModel) -> None:
    """Patches outside are as if they were not there, and one that counts twice as if it came twice."""
    images, head = pixels(1, 48, 64), siglip().vision_model.head
    tower = model.recognizer.hidden_states(images, None)
    states = tower.states[model.recognizer.final]
    chosen = torch.rand(6, 8, generator=torch.Generator().manual_seed(1)) < 0.3
    shares = torch.where(chosen, 0.5, 0.0)
    shares[0] *= 2
    twice = [index for index, share in enumerate(shares.flatten().tolist()) for _ in range(round(2 * share))]
    inside = torch.stack([chosen.float(), shares])[None]
    embeds = model.recognizer.pool(tower, inside)[0]
    for embed, rows in zip(embeds, (chosen.flatten().nonzero()[:, 0].tolist(), twice)):
        assert difference(embed, F.normalize(head(states[:, rows]), dim=-1)[0]) < 1e-5


@torch.no_grad()
def test_proposals_equal_a_plain_loop(model: AlignZegModel) -> None:
    images = pixels(2, 48, 64)
    found = []
    hook = model.recognizer.register_forward_hook(lambda *call: found.append(call[-1]))
    masks = run(model, pixel_values=images).masks_queries_logits
    hook.remove()
    vision = siglip().vision_model
    states = vision(images, interpolate_pos_encoding=True).last_hidden_state
    heads, width = vision.config.num_attention_heads, states.shape[-1]
    attention, size = vision.head.attention, width // vision.config.num_attention_heads
    matrices, offsets = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    for image in range(2):
        query, keys, values = (
            rows @ matrix.T + offset
            for rows, matrix, offset in zip((vision.head.probe[0], states[image], states[image]), matrices, offsets)
        )
        for proposal, logits in enumerate(masks[image]):
            probability = logits.sigmoid()
            claimed = torch.where(probability > 0.5, probability, 0.0) + 1e-4 * probability
            share = claimed.unflatten(0, (6, 2)).unflatten(2, (8, 2)).mean((1, 3)).flatten()
            parts = []
            for head in range(heads):
                part = slice(size * head, size * (head + 1))
                weights = share * (keys[:, part] @ query[0, part] / size**0.5).exp()
                parts.append(weights / weights.sum() @ values[:, part])
            pooled = attention.out_proj(torch.cat(parts))
            pooled = pooled + vision.head.mlp(vision.head.layernorm(pooled))
            assert difference(found[0][image, proposal], F.normalize(pooled, dim=0)) < 1e-5


@pytest.mark.parametrize("sizes", [[(64, 96), (96, 64)], [(33, 47), (64, 96), (5, 3)]], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_padded_batch_equals_each_image_alone(siglip_folder: Path, sizes: list, scale: float) -> None:
    model, _ = build(siglip_folder, scale)
    values, mask = torch.full((len(sizes), 3, 96, 96), torch.nan), torch.zeros(len(sizes), 96, 96)
    images = [pixels(1, *size, seed=seed) for seed, size in enumerate(sizes)]
    for index, (image, (height, width)) in enumerate(zip(images, sizes)):
        values[index, :, :height, :width], mask[index, :height, :width] = image[0], 1
    batch = run(model, pixel_values=values, pixel_mask=mask)
    for index, image in enumerate(images):
        alone = run(model, pixel_values=image)
        for name in ("class_queries_logits", "unseen_logits", "proposal_embeds", "queries_hidden_state"):
            torch.testing.assert_close(batch[name][index], alone[name][0], rtol=1e-4, atol=3e-4, msg=name)


@torch.no_grad()
def test_a_proposal_that_claims_nothing_sees_no_padding(model: AlignZegModel) -> None:
    images = pixels(1, 64, 64)
    tower = model.recognizer.hidden_states(images, torch.tensor([[32, 64]]))
    padded = {key: states.unflatten(1, (8, 8)).clone() for key, states in tower.states.items()}
    for states in padded.values():
        states[:, 4:] += 100
    other = tower._replace(states={key: states.flatten(1, 2) for key, states in padded.items()})
    nothing = torch.zeros(1, 1, 8, 8)
    found, expected = (model.recognizer.pool(each, nothing) for each in (other, tower))
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("is_masked", [False, True])
def test_hidden_states_may_be_computed_beforehand(model: AlignZegModel, is_masked: bool) -> None:
    inputs = {"pixel_values": pixels(2, 50, 70)}
    if is_masked:
        inputs["pixel_mask"] = torch.ones(2, 50, 70)
        inputs["pixel_mask"][1, 31:] = 0
    with torch.no_grad():
        states, expected = model.clip_hidden_states(**inputs), run(model, **inputs)
        model.recognizer.vision_model.embeddings.patch_embedding.weight.fill_(torch.nan)  # must not be read again
    outputs = run(model, **inputs, clip_hidden_states=states)
    for name in ("masks_queries_logits", "class_queries_logits", "unseen_logits"):
        torch.testing.assert_close(outputs[name], expected[name])
    wrong = {**states, 3: states[3][:, 1:]}
    with pytest.raises(ValueError, match=r"`clip_hidden_states\[3\]` has shape"):
        run(model, **inputs, clip_hidden_states=wrong)


@torch.no_grad()
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_numbers(model: AlignZegModel, narrow: torch.dtype) -> None:
    images, inside = pixels(2, 48, 64), torch.zeros(2, 1, 6, 8)
    inside[:, :, 2:4, 3:] = 1
    embeds = []
    for dtype in (torch.float32, narrow):
        tower = model.to(dtype).recognizer.hidden_states(images.to(dtype), torch.tensor([[48, 64], [32, 64]]))
        embeds.append(model.recognizer.pool(tower, inside).float())
    torch.testing.assert_close(embeds[1], embeds[0], rtol=0, atol=0.05)
    assert run(model, pixel_values=images).class_queries_logits.dtype == narrow


@pytest.mark.slow
@torch.no_grad()
def test_export(model: AlignZegModel) -> None:
    """Free batch, sides and number of classes."""
    program = export_program(model).module()
    prototypes, seen = F.normalize(torch.randn(7, 32), dim=-1), torch.arange(7) < 5
    for images in (pixels(1, 32, 48), pixels(3, 64, 32)):
        expected = run(model, pixel_values=images, text_prototypes=prototypes, seen_class_mask=seen)
        found = program(images, prototypes, seen)
        for name, value in zip(("masks_queries_logits", "class_queries_logits", "unseen_logits"), found):
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------- checkpoints and training


def test_a_created_checkpoint_comes_back_and_trains(
    source: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    kind, folder = source
    output = tmp_path / "checkpoint"
    config = str({**SMALL, "clip_input_scale": 1.0})
    options = ["--clip", folder, "--vocabulary", ",".join(CLASSES), "--output_dir", output, "--config", config]
    monkeypatch.setattr(sys, "argv", ["create_checkpoint.py", *map(str, options)])
    runpy.run_path(str(ROOT / "scripts" / "create_checkpoint.py"), run_name="__main__")
    assert f"{len(CLASSES)} classes" in capsys.readouterr().out

    model, processor = AutoModel.from_pretrained(output), AutoProcessor.from_pretrained(output)
    assert list(processor.image_processor.image_mean) == [0.4] * 3
    built, own = build(folder)
    prototypes = model.get_text_prototypes(processor, list(CLASSES))
    torch.testing.assert_close(model.class_text_embeds, prototypes)
    torch.testing.assert_close(prototypes, built.get_text_prototypes(own, list(CLASSES)))
    tokens = processor(text=list(CLASSES), return_tensors="pt")
    images = processor(images=picture(), return_tensors="pt")
    by_tokens, by_vocabulary = run(model, **images, **tokens), run(model, **images)
    torch.testing.assert_close(by_tokens.class_queries_logits, by_vocabulary.class_queries_logits)

    before = {name: value.clone() for name, value in model.state_dict().items()}
    mask = torch.zeros(1, 2, 32, 32)
    mask[:, 0, :16] = mask[:, 1, 16:] = 1
    labels = {"mask_labels": list(mask), "class_labels": [torch.tensor([0, 2])]}
    model.train()(pixel_values=pixels(1, 32, 32), **labels).loss.backward()
    frozen = ("recognizer.vision_model", "recognizer.visual_projection", "text_encoder", "logit_scale")
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen), name
        assert parameter.grad is None or parameter.grad.isfinite().all()
    torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1).step()
    assert all(
        torch.equal(value, before[name]) for name, value in model.state_dict().items() if name.startswith(frozen)
    )
    again = load_towers(str(output))
    assert all(torch.equal(again.weights[name], built.state_dict()[name]) for name in again.weights)

    exemplars = model.eval().get_image_prototypes(pixels(1, 32, 32), list(mask))
    assert exemplars.shape == (2, model.config.projection_dim)
    names = run(model, pixel_values=pixels(1, 32, 32), text_prototypes=torch.cat([exemplars, prototypes]))
    assert names.class_queries_logits.shape[-1] == 2 + len(CLASSES) + 1
    model.set_vocabulary(list(CLASSES), list(UNSEEN), processor)


@torch.no_grad()
def test_a_folder_of_open_clip_may_have_a_convnext(tmp_path: Path) -> None:
    vision = {"timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64}
    text = {"context_length": 20, "width": 32, "heads": 2, "layers": 2}
    cfg = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    clip = open_clip.CustomTextCLIP(**cfg).eval()
    save_file(clip.state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": cfg, "preprocess_cfg": {"mean": [0.1] * 3}})
    )
    folder, prefixed = str(tmp_path), f"local-dir:{tmp_path}"
    assert check_source(folder)[0] == check_source(prefixed)[0] == "timm"
    plain, other = load_towers(folder), load_towers(prefixed)
    assert plain.config == other.config and plain.image_processor["image_mean"] == [0.1] * 3
    assert plain.weights.keys() == other.weights.keys()
    model, processor = assemble(plain, config={"image_size": 64})
    prototypes = model.get_text_prototypes(processor, ["grass"], ["a photo of {}."])
    expected = clip.encode_text(open_clip.tokenize(["a photo of grass."], context_length=20), normalize=True)
    torch.testing.assert_close(prototypes, expected, rtol=0, atol=1e-5)
    for source in (folder, prefixed):
        with pytest.raises(ValueError, match="`random_weights` is set, but .* includes its weights"):
            load_towers(source, random_weights=True)
        with pytest.raises(ValueError, match="leave `pretrained` out"):
            load_towers(source, "openai")


# -------------------------------------------------------------------------------------------------------- refusals


def test_texts_that_are_not_padded_are_refused(siglip_folder: Path) -> None:
    model, processor = build(siglip_folder)
    tokens = processor(text=["grass"], padding=True, return_tensors="pt")
    with pytest.raises(ValueError, match=f"`input_ids` has texts of .* tokens; expected {LENGTH}"):
        run(model, pixel_values=pixels(1, 32, 32), **tokens)


def test_a_folder_of_onnx_files_is_refused(siglip_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="ONNX export needs onnx and onnxscript")
    with pytest.raises(ValueError, match="A folder cannot be exported on SigLIP"):
        export_folders(*build(siglip_folder), {tmp_path / "folder": "float32"})


def test_sources_that_do_not_fit_are_named(siglip_folder: Path, tmp_path: Path) -> None:
    Siglip2Config().save_pretrained(tmp_path / "naflex")
    with pytest.raises(ValueError, match=r"of type 'siglip2'; expected .*'siglip', .* \(NaFlex\), which is not"):
        load_towers(str(tmp_path / "naflex"))
    siglip().save_pretrained(tmp_path / "mute")
    with pytest.raises(ValueError, match="The tokenizer in .* cannot be loaded"):
        load_towers(str(tmp_path / "mute"))
    random_clip("metaclip_2")[0].save_pretrained(tmp_path / "mixed")
    gemma_tokenizer().save_pretrained(tmp_path / "mixed")
    with pytest.raises(ValueError, match="ends texts with the token 1, but its text tower expects 2"):
        load_towers(str(tmp_path / "mixed"))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (
            "EVA02-B-16",
            "'eva02_base_patch16_clip_224' of the open_clip model is a transformer .* Choose one of open_clip's plain ViTs",
        ),
        (
            "ViT-B-16-SigLIP2",
            "'vit_base_patch16_siglip_224' of the open_clip model is a transformer .* Load SigLIP from transformers",
        ),
    ],
)
def test_transformers_of_timm_are_refused(name: str, part: str) -> None:
    assert name in open_clip.list_models()
    with pytest.raises(ValueError, match=part):
        load_towers(name, random_weights=True)


def test_configs_that_do_not_fit_are_named() -> None:
    vision = {"model_type": "siglip_vision_model", **VISION}
    with pytest.raises(
        StrictDataclassError, match="`visual_projection` is 'identity', but .* `hidden_size` .32. is not"
    ):
        tiny_config(vision_config=vision, visual_projection="identity")
    with pytest.raises(StrictDataclassError, match="`projection_size` 32; expected `projection_dim` .24"):
        tiny_config(text_config={"model_type": "siglip_text_model", "projection_size": 32})
    with pytest.raises(
        ValueError, match="`text_config` has `model_type` 'bert'; expected one of clip_text_model, meta"
    ):
        tiny_config(text_config={"model_type": "bert"})
    with pytest.raises(ValueError, match="`vision_use_head=False`; expected a SigLIP tower with its pooling head"):
        AlignZegModel(tiny_config(vision_config={**vision, "vision_use_head": False}))
    with pytest.raises(ValueError, match="`fusion_layers` contains 7; the image tower has the layers 0, 1, 2"):
        AlignZegModel(tiny_config(vision_config=vision, fusion_layers=[7]))
