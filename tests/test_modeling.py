# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The model against plain formulas: transformers' CLIP, naive full-sequence attention, loops, flop and memory counts."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from scipy.stats import kstest
from tiny import CLASSES, TOWER, UNSEEN, tiny_config, tiny_model, tiny_processor
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, CLIPVisionModel
from transformers.activations import QuickGELUActivation

from modeling_alignzeg import (
    TEMPLATE_SETS,
    AlignZegConfig,
    AlignZegModel,
    AlignZegOutput,
    layers_alignzeg,
    modeling_alignzeg,
    recognizer_alignzeg,
)
from modeling_alignzeg.classifier_alignzeg import AlignZegFeatureExpansion
from modeling_alignzeg.indicator_alignzeg import AlignZegClassIndicator, Evidence
from modeling_alignzeg.layers_alignzeg import (
    AlignZegConv2d,
    Grid,
    attention_by_products,
    pool_cells,
    resample,
    to_map,
    to_tokens,
)
from modeling_alignzeg.recognizer_alignzeg import AlignZegTowerLinear, FrugalQuickGELU, shadow_layer


DEEP = {"vision_config": {**TOWER, "num_hidden_layers": 4, "image_size": 16, "patch_size": 8}, "clip_split_layer": 2}
SEEN_IDS = [0, 2, 3]
TERMS = ("class", "mask", "dice", "auxiliary", "virtual", "diversity", "indicator")


def pixels(batch: int = 2, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def labels(batch: int = 2, height: int = 32, width: int = 32, seed: int = 0) -> dict[str, list[Tensor]]:
    """Every seen class in every image, as blocks of 4 x 4 pixels; some blocks have no label."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(-1, len(SEEN_IDS), (batch, height // 4, width // 4), generator=generator)
    coarse[:, 0, :4] = torch.tensor([-1, 0, 1, 2])
    maps = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)
    return {
        "mask_labels": [torch.stack([label == i for i in range(len(SEEN_IDS))]) for label in maps],
        "class_labels": [torch.tensor(SEEN_IDS)] * batch,
    }


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def run(model: AlignZegModel, **inputs: Any) -> AlignZegOutput:
    with torch.no_grad():
        return model(**inputs)


def learned(model: AlignZegModel, seed: int = 1) -> AlignZegModel:
    """Perturbs weights that are initialised with zeros, so that no part of the model is an identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


# --- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [(32, 32), (48, 32), (33, 47), (16, 80), (16, 16), (30, 45), (8, 8), (5, 3), (1, 1), (1, 40)], ids=str
)
def test_outputs_have_the_documented_shapes(size: tuple[int, int]) -> None:
    """Also for sizes that are not a multiple of a patch, one patch, or smaller."""
    model = tiny_model()
    height, width = (math.ceil(side / 16) * 16 for side in size)  # 16 input pixels are one patch of CLIP
    outputs = run(model, pixel_values=pixels(2, *size), output_auxiliary_logits=True)
    shapes = {
        "masks_queries_logits": (2, 7, height // 4, width // 4),
        "class_queries_logits": (2, 7, len(CLASSES) + 1),
        "unseen_logits": (2, 7),
        "proposal_embeds": (2, 7, 24),
        "content_sizes": (2, 2),
        "seen_class_mask": (2, len(CLASSES)),
        "last_hidden_state": (2, height // 8 * (width // 8), 32),
        "queries_hidden_state": (2, 6, 32),
    }
    for name, shape in shapes.items():
        assert outputs[name].shape == shape, name
        assert outputs[name].isfinite().all(), name
    assert [masks.shape for masks in outputs.auxiliary_masks_queries_logits] == [(2, 6, height // 4, width // 4)]
    torch.testing.assert_close(outputs.proposal_embeds.norm(dim=-1), torch.ones(2, 7))
    torch.testing.assert_close(outputs.content_sizes, torch.tensor([size, size]) / 4)
    assert outputs.seen_class_mask.bool().tolist() == [[name not in UNSEEN for name in CLASSES]] * 2
    assert "loss" not in outputs and outputs.loss is None


@pytest.mark.parametrize("stride", [1, 2, 8])
def test_masks_have_the_stride_of_the_config(stride: int) -> None:
    outputs = run(tiny_model(mask_stride=stride), pixel_values=pixels(1, 32, 48))
    assert outputs.masks_queries_logits.shape == (1, 7, 32 // stride, 48 // stride)


@pytest.mark.parametrize("fusion_layers", [[], [0], [1, 0], [0, 1, 1], [0, 0, 1, 1], (1,)], ids=str)
def test_any_number_of_fusions_that_the_config_allows(fusion_layers: list[int]) -> None:
    model = tiny_model(fusion_layers=fusion_layers)
    outputs = run(model, pixel_values=pixels(1))
    assert outputs.masks_queries_logits.isfinite().all()
    for fusion in model.side_network.fusions:  # each is used
        with torch.no_grad():
            fusion.projection.bias += 1 + torch.arange(32.0)
        changed = run(model, pixel_values=pixels(1))
        assert not torch.equal(changed.masks_queries_logits, outputs.masks_queries_logits)
        outputs = changed


def test_clip_scale_one() -> None:
    model = tiny_model(clip_input_scale=1.0)
    assert model.config.size_divisor == 8
    assert run(model, pixel_values=pixels(1, 24, 40)).masks_queries_logits.shape == (1, 7, 6, 10)


# --- padding ---------------------------------------------------------------------------------------------------------


def padded(images: list[Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
    """A batch of `images (3, h, w)` on a canvas with nan outside the images."""
    values, mask = torch.full((len(images), 3, *size), torch.nan), torch.zeros(len(images), *size, dtype=torch.long)
    for index, image in enumerate(images):
        values[index, :, : image.shape[1], : image.shape[2]] = image
        mask[index, : image.shape[1], : image.shape[2]] = 1
    return {"pixel_values": values, "pixel_mask": mask}


def assert_same_content(single: AlignZegOutput, batch: AlignZegOutput, index: int, size: tuple[int, int]) -> None:
    rows, columns = (math.ceil(side / 4) for side in size)
    for name in ("class_queries_logits", "unseen_logits", "proposal_embeds", "queries_hidden_state", "content_sizes"):
        named = lambda message, name=name: f"{name}: {message}"  # noqa: E731
        torch.testing.assert_close(batch[name][index], single[name][0], rtol=1e-4, atol=2e-4, msg=named)
    masks = [outputs.masks_queries_logits[i, :, :rows, :columns] for outputs, i in ((batch, index), (single, 0))]
    torch.testing.assert_close(*masks, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("attention, ratio", [("eager", 2), ("sdpa", 2), ("eager", 1), ("sdpa", 3)])
def test_padding_changes_nothing(attention: str, ratio: int) -> None:
    model = learned(tiny_model(**DEEP, attn_implementation=attention, sequence_reduction_ratio=ratio))
    sizes = [(64, 64), (32, 48), (48, 32), (16, 16), (62, 63), (23, 41), (5, 3)]
    images = [pixels(1, *size, seed=seed)[0] for seed, size in enumerate(sizes)]
    batch = run(model, **padded(images, (64, 64)))
    for index, (image, size) in enumerate(zip(images, sizes)):
        assert_same_content(run(model, pixel_values=image[None]), batch, index, size)


@pytest.mark.parametrize("size", [(64, 64), (62, 63), (61, 64), (60, 52), (33, 47)], ids=str)
def test_padding_of_a_single_image_changes_nothing(size: tuple[int, int]) -> None:
    """Also padding of less than one cell of any grid."""
    model = learned(tiny_model(**DEEP))
    image = pixels(1, *size)
    assert_same_content(run(model, pixel_values=image), run(model, **padded([image[0]], (64, 64))), 0, size)


@pytest.mark.parametrize("has_padding", [True, False])
def test_large_batches_run_in_parts(has_padding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, without gradients; hidden states and losses are always computed from the whole batch. With a hook, one part
    after the other."""
    model = learned(tiny_model(**DEEP))
    images, sizes = [pixels(1, 32, 48, seed=seed)[0] for seed in range(5)], []
    inputs: dict[str, Any] = padded(images, (48, 64)) if has_padding else {"pixel_values": torch.stack(images)}
    whole = run(model, **inputs, output_hidden_states=True)
    monkeypatch.setattr(modeling_alignzeg, "IMAGE_PIXELS", inputs["pixel_values"][0, 0].numel())
    monkeypatch.setattr(modeling_alignzeg, "IMAGES_AT_ONCE", 2)
    model.side_network.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    outputs = run(model, **inputs)
    assert sizes == [2, 2, 1]
    for name in outputs:
        torch.testing.assert_close(outputs[name], whole[name], rtol=1e-4, atol=1e-5)
    sizes.clear()
    again = run(model, **inputs, output_hidden_states=True)
    assert [len(states) for states in again.hidden_states] == [5] * len(whole.hidden_states)
    model(**inputs)
    model.config.output_hidden_states = True
    run(model, **inputs)
    run(model, **inputs, **labels(5, *inputs["pixel_values"].shape[-2:]))
    assert sizes == [5, 5, 5, 5]


def test_a_single_large_image_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_alignzeg, "IMAGE_PIXELS", 1)
    monkeypatch.setattr(modeling_alignzeg, "_joined", None)
    assert len(run(tiny_model(), pixel_values=pixels(1)).masks_queries_logits) == 1


@pytest.mark.parametrize("num_points", [None, 64])
def test_padding_changes_no_loss(num_points: int | None) -> None:
    model = learned(tiny_model(train_num_points=num_points))
    image, targets = pixels(1), labels(1)
    alone = run(model, pixel_values=image, **targets)
    mask_labels = [F.pad(masks, (0, 32, 0, 48)) for masks in targets["mask_labels"]]
    inside = run(model, **padded([image[0]], (80, 64)), mask_labels=mask_labels, class_labels=targets["class_labels"])
    for name in TERMS:
        assert inside[f"loss_{name}"].item() == pytest.approx(alone[f"loss_{name}"].item(), rel=1e-4), name


# --- the frozen CLIP -------------------------------------------------------------------------------------------------


def reference_clip(model: AlignZegModel) -> CLIPVisionModel:
    clip = CLIPVisionModel(model.config.vision_config).eval()
    clip.load_state_dict(model.recognizer.vision_model.state_dict())
    return clip


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (48, 80)], ids=str)
def test_clip_features_are_those_of_transformers(size: tuple[int, int]) -> None:
    model = tiny_model(**DEEP, fusion_layers=[0, 1])
    image = pixels(2, *size)
    with torch.no_grad():
        ours = model.clip_hidden_states(image)
        theirs = reference_clip(model)(
            F.avg_pool2d(image, 2), output_hidden_states=True, interpolate_pos_encoding=True
        )
    assert list(ours) == [0, 1, 2, 3] == model.recognizer.layers
    for layer, states in ours.items():
        torch.testing.assert_close(states, theirs.hidden_states[layer], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("size", [(32, 48), (33, 47)], ids=str)
def test_clip_features_may_be_computed_beforehand(size: tuple[int, int], is_masked: bool) -> None:
    model = learned(tiny_model(**DEEP))
    inputs = {"pixel_values": pixels(2, *size)}
    if is_masked:
        inputs["pixel_mask"] = torch.ones(2, *size)
        inputs["pixel_mask"][0, 17:] = inputs["pixel_mask"][1, :, 20:] = 0
    with torch.no_grad():
        states = model.clip_hidden_states(**inputs)
    expected = run(model, **inputs)
    model.recognizer.vision_model.embeddings.patch_embedding.weight.data.fill_(float("nan"))  # must not be used again
    outputs = run(model, **inputs, clip_hidden_states=states)
    for name in (
        "masks_queries_logits",
        "class_queries_logits",
        "unseen_logits",
        "proposal_embeds",
        "last_hidden_state",
    ):
        torch.testing.assert_close(outputs[name], expected[name])


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_activation_of_clip_is_that_of_transformers(needs_gradient: bool) -> None:
    assert isinstance(tiny_model().recognizer.vision_model.encoder.layers[0].mlp.activation_fn, FrugalQuickGELU)
    values = torch.linspace(-30, 30, 1001, requires_grad=needs_gradient)
    before, results = values.detach().clone(), []
    for activation in (FrugalQuickGELU(), QuickGELUActivation()):
        found = activation(values)
        results.append((found, *(torch.autograd.grad(found.sum(), values) if needs_gradient else ())))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    assert torch.equal(values, before)


def test_linear_layers_of_the_tower_are_those_of_torch(monkeypatch) -> None:
    monkeypatch.setattr(recognizer_alignzeg, "ONEDNN_WEIGHTS", 0)
    torch.manual_seed(0)
    plain = torch.nn.Linear(48, 80).requires_grad_(False)
    layer = copy.deepcopy(plain)
    layer.__class__ = AlignZegTowerLinear
    states = torch.randn(2, 9, 48)
    for part in (states, states[0], states[:, :1], states[:, 1:].transpose(0, 1), states[:0]):
        torch.testing.assert_close(layer(part), plain(part))
    needed = states.clone().requires_grad_()
    torch.testing.assert_close(*(torch.autograd.grad(each(needed).sum(), needed) for each in (layer, plain)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(states), plain(states)) and layer(states).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        layer(states)
    assert counter.get_total_flops() == 2 * 18 * 48 * 80
    layer.requires_grad_(True)(states).sum().backward()
    torch.testing.assert_close(layer.weight.grad, states.sum((0, 1)).expand(80, -1))
    layer.bfloat16(), plain.bfloat16()
    assert torch.equal(layer(states.bfloat16()), plain(states.bfloat16()))


@pytest.mark.skipif(not recognizer_alignzeg.HAS_ONEDNN, reason="needs an x86 CPU with AVX2 and torch with oneDNN")
def test_frozen_linear_layers_run_in_onednn(monkeypatch) -> None:
    monkeypatch.setattr(recognizer_alignzeg, "ONEDNN_WEIGHTS", 0)
    model = tiny_model()
    layers = [m for m in model.recognizer.vision_model.modules() if isinstance(m, torch.nn.Linear)]
    assert {type(layer) for layer in layers} == {AlignZegTowerLinear} and len(layers) == 2 * 6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(model, pixel_values=pixels())
    calls = {event.key: event.count for event in profile.key_averages()}
    # 6 of the first layer; in the second, the last, the patches have keys and values only, and the shadow tokens all six
    assert calls["mkldnn::_linear_pointwise"] == 6 + 2 + 6


def test_frozen_parts_get_no_gradient_and_all_others_do() -> None:
    model = learned(tiny_model(**DEEP)).train()
    model(pixel_values=pixels(), **labels()).loss.backward()
    frozen = ("recognizer.vision_model.", "recognizer.visual_projection.", "text_encoder.", "logit_scale")
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not name.startswith(frozen)), name
        if name.startswith(frozen):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            if not name.endswith("k_proj.bias"):  # a softmax is invariant to it
                assert parameter.grad.abs().sum() > 0, name


def test_clip_stays_frozen_when_loaded(tmp_path: Path) -> None:
    model = learned(tiny_model())
    model.save_pretrained(tmp_path)
    loaded = AlignZegModel.from_pretrained(tmp_path)
    flags = [{name: p.requires_grad for name, p in each.named_parameters()} for each in (model, loaded)]
    assert flags[0] == flags[1] and not all(flags[0].values())
    torch.testing.assert_close(
        run(loaded, pixel_values=pixels()).class_queries_logits, run(model, pixel_values=pixels()).class_queries_logits
    )


def saved_for_backward(model: AlignZegModel) -> dict[int, int]:
    """Bytes of each storage that a training step saves for its backward pass, without weights."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept, alive = {}, []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no memory address is reused
        return tensor

    inputs = {"pixel_values": pixels(), **labels()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    del loss
    return kept


def test_memory_of_a_step_does_not_grow_with_clip_below_the_split() -> None:
    sizes = []
    for depth in (1, 6):
        vision = {**DEEP["vision_config"], "num_hidden_layers": depth + 2}
        model = tiny_model(vision_config=vision, clip_split_layer=depth, fusion_layers=[0, 1]).train()
        sizes.append(sum(saved_for_backward(model).values()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)  # other weights, another number of mixtures


def test_clip_below_the_split_has_no_graph() -> None:
    model = tiny_model(**DEEP).train()
    assert not any(states.requires_grad for states in model.clip_hidden_states(pixels()).values())


# --- MRPE ------------------------------------------------------------------------------------------------------------


def plain_attention(part: torch.nn.Module, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Torch's own multi-head attention with the weights of `part`, one image at a time."""
    parts = (part.q_proj, part.k_proj, part.v_proj)
    outputs = []
    for q, k, v in zip(queries, keys, values):
        output, _ = F.multi_head_attention_forward(
            *(states[:, None] for states in (q, k, v)),
            q.shape[-1],
            part.num_heads,
            None,
            torch.cat([linear.bias for linear in parts]),
            None,
            None,
            False,
            0.0,
            part.out_proj.weight,
            part.out_proj.bias,
            use_separate_proj_weight=True,
            q_proj_weight=part.q_proj.weight,
            k_proj_weight=part.k_proj.weight,
            v_proj_weight=part.v_proj.weight,
        )
        outputs.append(output[:, 0])
    return torch.stack(outputs)


@pytest.mark.parametrize("mutual", [True, False])
def test_refinement_layer_is_the_formula(mutual: bool) -> None:
    """Q <- Q + CrossAttn(Q, F), Q + SelfAttn(Q), Q + FFN(Q); F <- F + CrossAttn(F, Q), F + FFN(F); pre-norm."""
    layer = learned(tiny_model(mutual_refinement=mutual)).side_network.refinement_layers[0]
    torch.manual_seed(0)
    queries, features, place_q, place_f = (
        torch.randn(2, 6, 32),
        torch.randn(2, 9, 32),
        torch.randn(6, 32),
        torch.randn(9, 32),
    )
    with torch.no_grad():
        found = layer(queries, features, place_q, place_f, None)
        q, f = queries, features
        context, normed = layer.feature_norm(f), layer.query_cross_norm(q)
        q = q + plain_attention(layer.query_cross_attention, normed + place_q, context + place_f, context)
        normed = layer.query_self_norm(q)
        q = q + plain_attention(layer.query_self_attention, normed + place_q, normed + place_q, normed)
        first, second = layer.query_mlp.layers
        q = q + second(F.gelu(first(layer.query_mlp_norm(q))))
        if mutual:
            context, normed = layer.refined_query_norm(q), layer.feature_cross_norm(f)
            f = f + plain_attention(layer.feature_cross_attention, normed + place_f, context + place_q, context)
            first, second = layer.feature_mlp.layers
            f = f + second(F.gelu(first(layer.feature_mlp_norm(f))))
    torch.testing.assert_close(found[0], q, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], f, rtol=1e-4, atol=1e-4)


# --- proposal embeddings ---------------------------------------------------------------------------------------------


def recorded_forward(model: AlignZegModel, **inputs: Any) -> tuple[AlignZegOutput, Tensor, Tensor]:
    """Outputs, the predicted attention bias `(B, heads, N, P)` and the embeddings that the adapter reads `(B, N, D)`."""
    records: dict[str, Tensor] = {}

    def record_input(_: Any, inputs: tuple[Tensor]) -> None:
        records.setdefault("embeds", inputs[0][..., :24])  # the first call; mixtures come later

    hooks = [
        model.recognizer.attention_bias.register_forward_hook(lambda *call: records.update(bias=call[-1])),
        model.classifier.adapter.register_forward_pre_hook(record_input),
    ]
    outputs = run(model, **inputs)
    for hook in hooks:
        hook.remove()
    return outputs, records["bias"], records["embeds"]


def test_attention_bias_is_the_plain_formula() -> None:
    """`MLP_q(Q) · MLP_a(F)`, pooled to CLIP's grid, plus a multiple of the log sigmoid of the mask's mean logit."""
    model = learned(tiny_model())
    outputs, bias, _ = recorded_forward(model, pixel_values=pixels(1, 32, 48))
    part = model.recognizer.attention_bias
    with torch.no_grad():
        refined = outputs.queries_hidden_state[0]
        queries = part.query_mlp(part.query_norm(torch.cat([refined, refined.mean(0, keepdim=True)])))
        pooled = F.avg_pool2d(outputs.last_hidden_state[0].T.view(1, 32, 4, 6), 2).flatten(2)[0].T
        features = part.feature_mlp(part.feature_norm(pooled))
        for head in range(4):
            channels = slice(8 * head, 8 * head + 8)
            expected = queries[:, channels] @ features[:, channels].T / math.sqrt(8)
            inside = F.avg_pool2d(outputs.masks_queries_logits, 4).sigmoid().log().flatten(2)[0]
            expected = expected + part.mask_scale[head] * inside
            torch.testing.assert_close(bias[0, head], expected, rtol=1e-4, atol=1e-5)


def test_masks_stay_class_agnostic() -> None:
    """The gradient of the class term reaches the mask head only through the queries' refinement, not through the masks."""
    model = learned(tiny_model()).train()
    model(pixel_values=pixels(), **labels()).loss_class.backward()
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in model.side_network.mask_head.parameters())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("size", [(32, 32), (48, 64)], ids=str)
def test_shadow_tokens_equal_a_full_sequence_with_an_explicit_mask(attention: str, size: tuple[int, int]) -> None:
    """N more CLS tokens in CLIP's own layers: they attend to themselves and, with a bias, to patches; no token attends to
    them."""
    model = learned(tiny_model(**DEEP, attn_implementation=attention))
    image = pixels(2, *size)
    _, bias, embeds = recorded_forward(model, pixel_values=image)
    assert bias.std() > 0.02
    batch, heads, number, patches = bias.shape
    assert patches == size[0] * size[1] // 256

    clip = reference_clip(model)
    with torch.no_grad():
        hidden = clip(F.avg_pool2d(image, 2), output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
        mask = torch.full((batch, heads, 1 + patches + number, 1 + patches + number), -1e9)
        mask[:, :, : 1 + patches, : 1 + patches] = 0
        mask[:, :, 1 + patches :, 1 : 1 + patches] = bias
        mask[:, :, 1 + patches :, 1 + patches :].diagonal(dim1=-2, dim2=-1).zero_()
        states = torch.cat([hidden[2], hidden[2][:, :1].expand(-1, number, -1)], 1)
        for layer in clip.encoder.layers[2:]:
            states = layer(states, mask)
        expected = clip.post_layernorm(states[:, 1 + patches :]) @ model.recognizer.visual_projection.linear.weight.T
        expected = F.normalize(expected, dim=-1)
    torch.testing.assert_close(states[:, : 1 + patches], hidden[4], rtol=1e-4, atol=1e-5)  # the other tokens
    torch.testing.assert_close(embeds, expected, rtol=1e-4, atol=1e-5)


def test_a_shadow_token_does_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    model = tiny_model(**DEEP)
    layer = model.recognizer.vision_model.encoder.layers[2]
    shadow, states, bias = torch.randn(2, 6, 32), torch.randn(2, 5, 32), torch.randn(2, 4, 6, 4)

    def through(chosen: list[int]) -> Tensor:
        own = torch.full((len(chosen), len(chosen)), torch.finfo(torch.float32).min).fill_diagonal_(0)
        own = own.expand(2, 4, -1, -1)
        with torch.no_grad():
            return shadow_layer(layer, shadow[:, chosen], states, torch.cat([bias[:, :, chosen], own], -1))

    everything = through(list(range(6)))
    for chosen in ([0], [4, 1], [5, 3, 2]):
        torch.testing.assert_close(through(chosen), everything[:, chosen])


def flops_by_module(model: AlignZegModel, **inputs: Any) -> dict[str, int]:
    counter = FlopCounterMode(display=False)
    with counter:
        run(model, **inputs)
    counts = {name: sum(by_operation.values()) for name, by_operation in counter.get_flop_counts().items()}
    return {**counts, "total": counter.get_total_flops()}


def test_patch_keys_and_values_are_computed_once() -> None:
    model, rows = tiny_model(**DEEP), []
    for layer in model.recognizer.vision_model.encoder.layers[model.config.clip_split_layer :]:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[1]))
    run(model, pixel_values=pixels(1, 32, 48))
    patches, proposals = 2 * 3, model.config.num_queries + 1
    depth = len(model.recognizer.vision_model.encoder.layers) - model.config.clip_split_layer
    assert len(rows) == 4 * depth
    # Before the first of these layers, all proposals are the same CLS token; in the last layer, patches are not computed.
    assert sum(rows) == 2 * (depth * patches + (depth - 1) + 1 + (depth - 1) * proposals)


def test_cost_of_the_patches_does_not_grow_with_the_queries() -> None:
    few, many = (
        flops_by_module(tiny_model(**DEEP, num_queries=number).requires_grad_(False), pixel_values=pixels(1, 64, 64))
        for number in (5, 25)
    )
    vision = "AlignZegModel.recognizer.vision_model."
    frozen = [name for name in many if name.startswith(vision)]
    below = [name for name in frozen if ".embeddings" in name or ".layers.0" in name or ".layers.1" in name]
    assert below and all(few[name] == many[name] for name in below)
    # From the split on, every linear layer processes 20 more tokens, the shadow tokens, once each. Only in the projections
    # of the first attention, they are still identical.
    linear = {
        name: module for name, module in tiny_model(**DEEP).named_modules() if isinstance(module, torch.nn.Linear)
    }
    checked = 0
    for name in frozen:
        module = linear.get(name.removeprefix("AlignZegModel."))
        if module is not None and (".layers.2." in name or ".layers.3." in name):
            equal = ".layers.2." in name and name.endswith(("q_proj", "k_proj", "v_proj"))
            more = 0 if equal else 20
            assert many[name] - few[name] == 2 * more * module.in_features * module.out_features, name
            checked += 1
    assert checked == 12


@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (1, 2)], ids=str)
def test_pooled_cells_are_means_of_what_holds_content(ratio: int, grid: tuple[int, int]) -> None:
    """Blocks that cross the border of the grid or of the content are means of the cells inside."""
    torch.manual_seed(0)
    values = torch.randn(2, 3, *grid)
    content = torch.tensor([grid, ((grid[0] + 1) // 2, max(grid[1] - 2, 1))])
    pooled, without = (pool_cells(values, ratio, Grid(grid, 1, cells)) for cells in (content, None))
    assert pooled.shape == without.shape == (2, 3, math.ceil(grid[0] / ratio), math.ceil(grid[1] / ratio))
    for index, (rows, columns) in enumerate(content.tolist()):
        for y in range(math.ceil(rows / ratio)):
            for x in range(math.ceil(columns / ratio)):
                block = (slice(y * ratio, (y + 1) * ratio), slice(x * ratio, (x + 1) * ratio))
                inside = values[index, :, :rows, :columns][:, *block]
                torch.testing.assert_close(pooled[index, :, y, x], inside.mean((1, 2)))
                torch.testing.assert_close(without[index, :, y, x], values[index][:, *block].mean((1, 2)))


@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_image_encoder_attends_to_means_of_tokens(ratio: int) -> None:
    """Against transformers' eager attention: queries are all tokens, keys are blocks of `ratio x ratio` tokens."""
    model = learned(tiny_model(sequence_reduction_ratio=ratio))
    layer = model.side_network.encoder_layers[0]
    seen: list[tuple[Tensor, Tensor]] = []
    layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    run(model, pixel_values=pixels(1, 48, 32))
    features, found = seen[0]
    grid, heads = (6, 4), model.config.num_attention_heads
    states = layer.attention_norm(features)
    blocks = [
        states.unflatten(1, grid)[0, y : y + ratio, x : x + ratio].flatten(0, 1).mean(0)
        for y in range(0, grid[0], ratio)
        for x in range(0, grid[1], ratio)
    ]
    pooled, attention, outputs = torch.stack(blocks), layer.attention, []
    projected = attention.q_proj(states[0]), attention.k_proj(pooled), attention.v_proj(pooled)
    for query, key, value in zip(*(part.chunk(heads, -1) for part in projected)):
        outputs.append(((query @ key.T) * query.shape[-1] ** -0.5).softmax(-1) @ value)
    expected = features[0] + attention.out_proj(torch.cat(outputs, -1))
    expected = expected + layer.mlp(layer.mlp_norm(expected))
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_convolutions_of_emulated_types_run_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers_alignzeg, "EMULATED_DTYPES", {torch.float16})
    torch.manual_seed(0)
    convolution = AlignZegConv2d(3, 5, 3, stride=2, padding=1).to(dtype)
    image = torch.randn(2, 3, 9, 8).to(dtype).requires_grad_()
    found = convolution(image)
    exact = F.conv2d(image.double(), convolution.weight.double(), convolution.bias.double(), stride=2, padding=1)
    assert found.dtype == dtype
    bound = torch.finfo(dtype).eps / 2 if dtype == torch.float16 else torch.finfo(dtype).eps * 20
    torch.testing.assert_close(found.double(), exact, rtol=1.01 * bound, atol=bound / 10)  # rounded once, at the end
    found.sum().backward()
    assert image.grad.dtype == convolution.weight.grad.dtype == dtype


@pytest.mark.parametrize("mask", [None, "keys", "queries"])
@pytest.mark.parametrize("workspace", [2**24, 2 * 3 * 11, 1])
def test_attention_by_products(mask: str | None, workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's fused attention, also in parts."""
    monkeypatch.setattr(layers_alignzeg, "ATTENTION_WORKSPACE", workspace)
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(2, 3, count, 8, generator=generator) for count in (7, 11, 11))
    bias = None
    if mask is not None:
        shape = (2, 1, 1, 11) if mask == "keys" else (2, 3, 7, 11)
        hidden = torch.rand(shape, generator=generator) < 0.4
        bias = torch.randn(shape, generator=generator).masked_fill(hidden, torch.finfo(torch.float32).min)
    found = attention_by_products(queries, keys, values, bias, scaling=0.3)
    expected = F.scaled_dot_product_attention(queries, keys, values, bias, scale=0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_resample_of_padded_maps(mode: str) -> None:
    """Each image against torch's interpolation of its own content."""
    content = torch.tensor([[64, 48], [33, 64], [7, 5], [40, 17]])
    generator = torch.Generator().manual_seed(0)
    target = Grid((16, 16), 4, content)
    if mode == "bilinear":
        source, values = Grid((8, 8), 8, content), torch.randn(4, 3, 8, 8, generator=generator)
    else:  # the table of position embeddings, which has no padding
        source, values = Grid((7, 7)), torch.randn(1, 3, 7, 7, generator=generator)
    found = resample(values, source, target, mode=mode)
    assert found.shape == (4, 3, 16, 16)
    for index, sides in enumerate(content.tolist()):
        rows, columns = (math.ceil(side / 4) for side in sides)
        own = values[0]
        if mode == "bilinear":
            own = values[index, :, : math.ceil(sides[0] / 8), : math.ceil(sides[1] / 8)]
        expected = F.interpolate(own[None], size=(rows, columns), mode=mode, align_corners=False)[0]
        torch.testing.assert_close(found[index, :, :rows, :columns], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_maps_of_tokens_stay_channels_last(batch: int) -> None:
    """Otherwise the kernels for images copy them, and sums of both layouts are five times as slow."""
    tokens = torch.rand(batch, 6, 4)
    values = to_map(tokens, (2, 3))
    assert torch.equal(values[:, :, 1, 2], tokens[:, 5]) and torch.equal(to_tokens(values), tokens)
    for content in (None, torch.tensor([[64, 90]] * batch)):
        larger = resample(values, Grid((2, 3), 32, content), Grid((4, 6), 16, content))
        assert larger.is_contiguous(memory_format=torch.channels_last) and to_tokens(larger).is_contiguous()


def test_masks_for_inference_equal_those_of_training() -> None:
    """Training applies the mask features' last layer, inference moves it to the queries."""
    model = learned(tiny_model())
    image, masks = pixels(2, 32, 48), {}
    for training in (False, True):
        masks[training] = run(model.train(training), pixel_values=image, output_auxiliary_logits=True)
    torch.testing.assert_close(masks[True].masks_queries_logits, masks[False].masks_queries_logits)
    torch.testing.assert_close(masks[True].auxiliary_masks_queries_logits, masks[False].auxiliary_masks_queries_logits)


def test_queries_start_to_refine_features_from_nothing() -> None:
    """With one or both directions, the masks are equal at the start, because the update of the features is zero."""
    both, one = tiny_model(), tiny_model(mutual_refinement=False)
    one.load_state_dict(both.state_dict(), strict=False)
    found, expected = run(both, pixel_values=pixels()), run(one, pixel_values=pixels())
    torch.testing.assert_close(found.masks_queries_logits, expected.masks_queries_logits)
    torch.testing.assert_close(found.proposal_embeds, expected.proposal_embeds)
    learned(both)
    one.load_state_dict(both.state_dict(), strict=False)
    found, expected = run(both, pixel_values=pixels()), run(one, pixel_values=pixels())
    assert not torch.allclose(found.masks_queries_logits, expected.masks_queries_logits, atol=1e-2)


def test_the_last_proposal_is_what_no_query_claims() -> None:
    model = learned(tiny_model())
    outputs = run(model, pixel_values=pixels())
    without = learned(tiny_model(unclaimed_proposal=False))
    without.load_state_dict(model.state_dict())
    queries = run(without, pixel_values=pixels())
    for name in ("masks_queries_logits", "class_queries_logits", "unseen_logits", "proposal_embeds"):
        assert queries[name].shape[1] == 6
        torch.testing.assert_close(outputs[name][:, :6], queries[name], rtol=1e-4, atol=1e-5)
    claimed = outputs.masks_queries_logits.sigmoid()
    torch.testing.assert_close(claimed[:, 6], 1 - claimed[:, :6].amax(1))
    assert (outputs.unseen_logits[:, 6].sigmoid() == 1).all()
    seen = run(model, pixel_values=pixels(), seen_class_mask=torch.ones(len(CLASSES), dtype=torch.bool))
    assert (seen.unseen_logits[:, 6].sigmoid() < 1).all()


def test_no_loss_reads_the_unclaimed_proposal() -> None:
    losses = []
    for unclaimed in (True, False):
        model = learned(tiny_model(unclaimed_proposal=unclaimed))
        losses.append(run(model, pixel_values=pixels(), **labels()))
    for name in TERMS:
        torch.testing.assert_close(losses[0][f"loss_{name}"], losses[1][f"loss_{name}"], rtol=1e-4, atol=1e-5)


def test_adapter_is_the_identity_at_the_start() -> None:
    model = tiny_model()
    outputs, _, embeds = recorded_forward(model, pixel_values=pixels())
    torch.testing.assert_close(outputs.proposal_embeds, embeds)
    outputs, _, embeds = recorded_forward(learned(model), pixel_values=pixels())
    assert not torch.allclose(outputs.proposal_embeds, embeds, atol=1e-3)


# --- GEPC ------------------------------------------------------------------------------------------------------------


def test_class_and_background_logits() -> None:
    model = learned(tiny_model())
    prototypes = unit(7, 24)
    outputs = run(model, pixel_values=pixels(), text_prototypes=prototypes)
    scale = math.exp(model.config.logit_scale_init_value)
    background = model.classifier.background.prototypes.detach()
    assert len(background) == 3
    for embed, logits in zip(outputs.proposal_embeds.flatten(0, 1), outputs.class_queries_logits.flatten(0, 1)):
        for prototype, logit in zip(prototypes, logits):
            cosine = torch.dot(embed, prototype) / embed.norm() / prototype.norm()
            assert logit.item() == pytest.approx(scale * cosine.item(), abs=1e-4)
        powers = [
            math.exp(scale * torch.dot(embed, b).item() / b.norm().item() / embed.norm().item()) for b in background
        ]
        assert logits[-1].item() == pytest.approx(math.log(sum(powers)), abs=1e-4)


@pytest.mark.parametrize("target", ["frozen", "semantic", "reserve"])
def test_the_training_vocabulary_holds_seen_classes_only(target: str) -> None:
    """Another prototype for the unseen class changes its logits, but no loss."""
    model = learned(tiny_model(feature_expansion_target=target)).train()
    results = []
    for seed in (1, 2):
        prototypes = unit(4, 24, seed=0)
        prototypes[CLASSES.index(*UNSEEN)] = unit(24, seed=seed)
        torch.manual_seed(0)
        seen = torch.tensor([name not in UNSEEN for name in CLASSES])
        inputs = {"text_prototypes": prototypes, "seen_class_mask": seen}
        results.append(run(model, pixel_values=pixels(), **labels(), **inputs))
    assert not torch.equal(results[0].class_queries_logits, results[1].class_queries_logits)
    for name in ("loss", *(f"loss_{term}" for term in TERMS)):
        assert torch.equal(results[0][name], results[1][name]), name


def test_the_adapter_reads_embedding_and_query() -> None:
    model = learned(tiny_model())
    outputs, _, clip_embeds = recorded_forward(model, pixel_values=pixels(1))
    norm, (first, last) = model.classifier.adapter.query_norm, model.classifier.adapter.mlp.layers
    for embed, query, adapted in zip(clip_embeds[0], outputs.queries_hidden_state[0], outputs.proposal_embeds[0]):
        query = F.layer_norm(query, (32,), norm.weight, norm.bias)
        states = F.gelu(first.weight @ torch.cat([embed, query]) + first.bias)
        expected = embed + last.weight @ states + last.bias
        torch.testing.assert_close(adapted, expected / expected.norm(), rtol=1e-4, atol=1e-5)
    without = tiny_model(query_fusion=False).classifier.adapter
    assert without.query_norm is None and without.mlp.layers[0].in_features == 24


def expansion(**overrides: Any) -> AlignZegFeatureExpansion:
    return AlignZegFeatureExpansion(tiny_config(**overrides))


def sources(vector: Tensor) -> dict[int, float]:
    """Coordinates that are not zero, as shares of their sum."""
    assert (vector >= 0).all()  # between, not beyond
    return {int(i): (vector[i] / vector.sum()).item() for i in vector.nonzero()[:, 0]}


def test_virtual_features_lie_between_two_of_different_classes() -> None:
    """With orthogonal features, the coordinates of a mixture reveal its two sources and its weight. Queries and prototypes
    are mixed with the same weight."""
    classes = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    inputs, prototypes = torch.cat([torch.eye(24)[:8], torch.eye(32)[:8]], -1), torch.eye(24)[16:19]
    torch.manual_seed(0)
    virtual, virtual_prototypes = expansion().mix(inputs, classes, prototypes)
    assert 1 <= len(virtual) <= 8 and len(virtual) == len(virtual_prototypes)
    for values in (virtual[:, :24], virtual_prototypes):
        torch.testing.assert_close(values.norm(dim=-1), torch.ones(len(virtual)))
    for mixture, prototype in zip(virtual, virtual_prototypes):
        weights = sources(mixture[:24])
        (first, share), (second, rest) = weights.items()
        assert classes[first] != classes[second] and share + rest == pytest.approx(1)
        expected = {16 + int(classes[first]): share, 16 + int(classes[second]): rest}
        assert sources(prototype) == pytest.approx(expected, abs=1e-5)
        assert sources(mixture[24:]) == pytest.approx(weights, abs=1e-5)
        assert mixture[24:].sum().item() == pytest.approx(1)  # queries are not normalized again


@pytest.mark.parametrize("is_on", [True, False])
def test_virtual_features_are_made_only_for_a_loss(is_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made, original = [], AlignZegFeatureExpansion.mix
    monkeypatch.setattr(AlignZegFeatureExpansion, "mix", lambda *args: made.append(1) or original(*args))
    model = tiny_model(feature_expansion=is_on)
    run(model, pixel_values=pixels())
    assert not made
    run(model, pixel_values=pixels(), **labels())
    assert len(made) == is_on


def test_mixing_weights_are_uniform_and_seeded() -> None:
    classes = torch.arange(3000) % 3
    features, prototypes = torch.eye(24)[classes], torch.eye(24)[:3]
    virtual, again = (
        expansion().mix(features, classes, prototypes, torch.Generator().manual_seed(5))[0] for _ in range(2)
    )
    assert torch.equal(virtual, again) and len(virtual) > 1500
    first = (virtual > 0).float().argmax(1)
    weights = virtual.gather(1, first[:, None])[:, 0] / virtual.sum(1)
    assert kstest(weights.double().numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("target", ["frozen", "semantic", "reserve"])
def test_virtual_loss_of_a_step_is_the_plain_formula(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = learned(tiny_model(feature_expansion_target=target)).train()
    calls, original = [], AlignZegFeatureExpansion.mix

    def recorded(self: AlignZegFeatureExpansion, inputs: Tensor, classes: Tensor, prototypes: Tensor, generator: None):
        calls.append((inputs, classes, prototypes, *original(self, inputs, classes, prototypes, generator)))
        return calls[-1][-2:]

    monkeypatch.setattr(AlignZegFeatureExpansion, "mix", recorded)
    torch.manual_seed(0)
    outputs, _, frozen_embeds = recorded_forward(model, pixel_values=pixels(), **labels())
    ((inputs, classes, prototypes, before, own),) = calls
    # The matched proposals are mixed, three per image; the vocabulary contains the seen classes.
    rows = {tuple(row.tolist()) for row in frozen_embeds.flatten(0, 1)}
    assert inputs.shape == (6, 24 + 32) and all(tuple(row.tolist()) in rows for row in inputs[:, :24])
    assert sorted(classes.tolist()) == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(prototypes, model.class_text_embeds[SEEN_IDS])
    mixed = model.classifier.adapter(before).detach()

    scale, background = math.exp(2.0), F.normalize(model.classifier.background.prototypes.detach(), dim=-1)
    total = 0.0
    for index, feature in enumerate(mixed):
        placeholder = torch.logsumexp(scale * background @ feature, 0)
        others = [scale * prototypes @ feature, placeholder[None]]
        if target == "frozen":
            total += scale * (1 - torch.dot(feature, before[index, :24]).item())
        elif target == "semantic":
            total += F.cross_entropy(torch.cat([scale * own @ feature, *others]), torch.tensor(index)).item()
        else:
            total += F.cross_entropy(torch.cat(others), torch.tensor(3)).item()
    assert outputs.loss_virtual.item() == pytest.approx(total / len(mixed), rel=1e-4)


@pytest.mark.parametrize("target", ["frozen", "semantic", "reserve"])
def test_virtual_loss_trains_the_classifier_alone(target: str) -> None:
    model = learned(tiny_model(feature_expansion_target=target)).train()
    model(pixel_values=pixels(), **labels()).loss_virtual.backward()
    reached = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert reached and all(name.startswith("classifier.") for name in reached)


# --- PBC -------------------------------------------------------------------------------------------------------------


def plain_statistics(frozen: list[float], adapted: list[float], background: float, seen: list[bool]) -> list[float]:
    values = []
    for logits in (frozen, adapted):
        inside = [v for v, s in zip(logits, seen) if s]
        best_other = max((v for v, s in zip(logits, seen) if not s), default=-100.0)
        total = sum(math.exp(v) for v in inside)
        entropy = -sum(math.exp(v) / total * math.log(math.exp(v) / total) for v in inside)
        values += [max(inside) / 10, min(max((best_other - max(inside)) / 10, -10), 10), entropy]
    return [*values, (background - max(inside)) / 10]


@pytest.mark.parametrize("seen", [[True, False, True, True, False, True], [True] * 6], ids=["some", "all"])
def test_indicator_statistics_equal_loops(seen: list[bool]) -> None:
    torch.manual_seed(0)
    frozen, adapted, background = torch.randn(4, 6) * 5, torch.randn(4, 6) * 5, torch.randn(4) * 5
    logits = torch.cat([adapted, background[:, None]], 1)
    indicator = AlignZegClassIndicator(tiny_config())
    found = indicator.statistics(Evidence(frozen, logits, None), torch.tensor(seen))
    assert found.shape == (4, 7) and found.isfinite().all()
    for i in range(4):
        expected = plain_statistics(frozen[i].tolist(), adapted[i].tolist(), background[i].item(), seen)
        assert found[i].tolist() == pytest.approx(expected, abs=1e-4)
    for kinds, kept in ((["frozen"], slice(3)), (["adapted"], slice(3, 7))):
        indicator = AlignZegClassIndicator(tiny_config(indicator_evidence=kinds))
        assert torch.equal(indicator.statistics(Evidence(frozen, logits, None), torch.tensor(seen)), found[:, kept])


@pytest.mark.parametrize("seen", [[True] * 4, [True, False, True, True], [False] * 4], ids=["all", "some", "none"])
def test_unseen_logits_are_the_indicator_of_these_statistics(seen: list[bool]) -> None:
    """They are also defined without unseen or without seen classes."""
    model = learned(tiny_model())
    prototypes = unit(4, 24)
    inputs = {"text_prototypes": prototypes, "seen_class_mask": torch.tensor(seen)}
    outputs, _, clip_embeds = recorded_forward(model, pixel_values=pixels(1), **inputs)
    assert outputs.unseen_logits.isfinite().all()
    if not any(seen):
        assert (outputs.unseen_logits.sigmoid() == 1).all()
        return
    logits = outputs.class_queries_logits[0]
    for i in range(6):
        clip = (math.exp(2.0) * prototypes @ clip_embeds[0, i]).tolist()
        entry = torch.tensor(plain_statistics(clip, logits[i, :-1].tolist(), logits[i, -1].item(), seen))
        first, second = model.indicator.mlp.layers
        expected = second.weight @ F.gelu(first.weight @ entry + first.bias) + second.bias
        assert outputs.unseen_logits[0, i].item() == pytest.approx(expected.item(), abs=1e-4)


def test_indicator_loss_reaches_the_indicator_alone() -> None:
    model = learned(tiny_model()).train()
    torch.manual_seed(1)
    outputs = model(pixel_values=pixels(4), **labels(4))
    assert outputs.loss_indicator.item() > 0
    outputs.loss_indicator.backward()
    for name, parameter in model.named_parameters():
        moved = parameter.grad is not None and parameter.grad.abs().sum() > 0
        assert moved == name.startswith("indicator."), name


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("names", [CLASSES, CLASSES[:1], CLASSES[:2]])
def test_held_out_episodes_leave_and_take_something(fraction: float, names: tuple[str, ...], monkeypatch) -> None:
    """At least one class stays seen, and at least one is held out if there are two."""
    ids = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "unseen_labels": [],
    }
    model = tiny_model(held_out_fraction=fraction, **ids).train()
    masks = []
    original = AlignZegClassIndicator.statistics

    def recorded(indicator: AlignZegClassIndicator, evidence: Evidence, seen: Tensor) -> Tensor:
        masks.append(seen)
        return original(indicator, evidence, seen)

    monkeypatch.setattr(AlignZegClassIndicator, "statistics", recorded)
    batch = {"mask_labels": [torch.ones(1, 32, 32)] * 2, "class_labels": [torch.tensor([0])] * 2}
    outputs = model(pixel_values=pixels(), **batch)
    assert outputs.loss_indicator.isfinite()
    assert masks[-1].any() and (not masks[-1].all() or len(names) == 1)


# --- switches --------------------------------------------------------------------------------------------------------


OFF = {
    "mutual_refinement": "feature_cross",
    "feature_expansion": None,  # it has no parameter
    "background_diversity": None,
    "bias_correction": "indicator.",
}


@pytest.mark.parametrize("off", [*OFF, "everything"])
def test_a_part_that_is_switched_off_is_gone(off: str) -> None:
    switches = {name: off not in (name, "everything") for name in OFF}
    model, whole = learned(tiny_model(**switches)).train(), tiny_model()
    torch.manual_seed(0)
    outputs = model(pixel_values=pixels(), **labels())
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    names = [name for name, _ in model.named_parameters()]
    for switch, part in OFF.items():
        if part is not None:
            assert any(part in name for name in names) == switches[switch]
            assert any(part in name for name, _ in whole.named_parameters())
    assert len(model.classifier.background.prototypes) == (3 if switches["background_diversity"] else 1)
    zero = {
        "virtual": not switches["feature_expansion"],
        "diversity": not switches["background_diversity"],
        "indicator": not switches["bias_correction"],
    }
    for term in TERMS:
        assert (outputs[f"loss_{term}"].item() == 0) == zero.get(term, False), term
        assert outputs[f"loss_{term}"].requires_grad != zero.get(term, False), term  # no graph either
    assert (outputs.unseen_logits is None) == (not switches["bias_correction"])
    if off != "feature_expansion":
        assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in whole.parameters())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("mutual", [True, False])
def test_queries_refine_features_only_with_mutual_refinement(mutual: bool) -> None:
    model = learned(tiny_model(mutual_refinement=mutual))
    before = run(model, pixel_values=pixels())
    with torch.no_grad():
        model.side_network.query_embeddings.mul_(-1)
    after = run(model, pixel_values=pixels())
    assert torch.equal(before.last_hidden_state, after.last_hidden_state) == (not mutual)
    assert not torch.equal(before.queries_hidden_state, after.queries_hidden_state)


def test_total_is_the_weighted_sum_of_the_terms() -> None:
    weights = {
        "class_weight": 1.5,
        "mask_weight": 3.0,
        "dice_weight": 4.0,
        "virtual_weight": 0.7,
        "diversity_weight": 11.0,
        "indicator_weight": 0.3,
    }
    outputs = run(tiny_model(**weights), pixel_values=pixels(), **labels())
    total = outputs.loss_auxiliary + sum(
        v * outputs[f"loss_{name.removesuffix('_weight')}"] for name, v in weights.items()
    )
    torch.testing.assert_close(outputs.loss, total)


# --- precision, kernels, cost ----------------------------------------------------------------------------------------


def label_map(outputs: AlignZegOutput) -> Tensor:
    """`argmax_c Σ_n p(c|n)·σ(M_n)` on the mask grid."""
    probability = outputs.class_queries_logits.float().softmax(-1)[..., :-1]
    return torch.einsum("bnc,bnhw->bchw", probability, outputs.masks_queries_logits.float().sigmoid()).argmax(1)


def test_eager_equals_sdpa() -> None:
    model = learned(tiny_model(**DEEP))
    image = pixels(2, 48, 40)
    outputs = []
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        outputs.append(run(model, pixel_values=image))
    for name in ("masks_queries_logits", "class_queries_logits", "unseen_logits", "last_hidden_state"):
        torch.testing.assert_close(outputs[0][name], outputs[1][name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "emulated"),
    [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True), (torch.float16, False)],
    ids=str,
)
@pytest.mark.parametrize("size", [(64, 40), (328, 636)], ids=str)
def test_narrow_numbers_agree_with_float32(
    size: tuple[int, int], dtype: torch.dtype, emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with padding: torch's `grid_sample` on a CPU returns NaN for large channels-last maps in bfloat16."""
    monkeypatch.setattr(layers_alignzeg, "EMULATED_DTYPES", {dtype} if emulated else set())
    model = learned(tiny_model(logit_scale_init_value=math.log(30)))
    with torch.no_grad():
        model.side_network.query_embeddings.mul_(5)  # proposals that differ
        model.side_network.mask_head.query_mlp.layers[-1].weight.mul_(3)
    inputs = {"pixel_values": pixels(4, *size), "text_prototypes": unit(5, 24)}
    expected = run(model, **inputs)
    assert label_map(expected).unique().numel() > 1
    with torch.autocast("cpu", dtype):
        mixed = run(model, **inputs)
    assert (label_map(mixed) == label_map(expected)).float().mean() > 0.95
    outputs = run(model.to(dtype), **inputs)
    assert outputs.masks_queries_logits.dtype == outputs.class_queries_logits.dtype == dtype
    assert all(
        outputs[name].isfinite().all() for name in ("masks_queries_logits", "class_queries_logits", "unseen_logits")
    )
    assert (label_map(outputs) == label_map(expected)).float().mean() > 0.95


@pytest.mark.parametrize("autocast", [True, False])
def test_training_in_bfloat16(autocast: bool) -> None:
    model = learned(tiny_model()).train()
    expected = run(model.eval(), pixel_values=pixels(), **labels()).loss
    model.to(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = model(pixel_values=pixels(), **labels())
    outputs.loss.backward()
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=0.1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def full_size_model(device: str) -> AlignZegModel:
    names = {f"class {i}": i for i in range(171)}
    config = AlignZegConfig(id2label={i: name for name, i in names.items()}, label2id=names)
    with torch.device(device):
        return AlignZegModel(config).eval().requires_grad_(False)


def test_full_size_model_fits_the_budget() -> None:
    """ViT-B/16 at 640 pixels with 100 queries and 171 classes: multiply-adds by torch's counter, trainable parameters."""
    config = AlignZegConfig()
    assert (config.image_size, config.clip_input_scale, config.num_queries) == (640, 0.5, 100)
    assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers) == (768, 12)
    with torch.device("meta"):
        trainable = sum(p.numel() for p in AlignZegModel(config).parameters() if p.requires_grad)
    assert 5e6 < trainable <= 8.4e6
    flops = flops_by_module(full_size_model("meta"), pixel_values=torch.empty(1, 3, 640, 640, device="meta"))["total"]
    assert 37.3e9 * 9 / 12 < flops / 2 <= 55e9  # CLIP alone has 37.3e9, including its last layers


@pytest.mark.slow
def test_full_size_model_costs_the_same_on_a_real_device() -> None:
    image = torch.zeros(1, 3, 640, 640)
    flops = flops_by_module(full_size_model("cpu"), pixel_values=image)["total"]
    assert flops / 2 <= 55e9
    assert flops == flops_by_module(full_size_model("meta"), pixel_values=image.to("meta"))["total"]


# --- vocabulary ------------------------------------------------------------------------------------------------------


def test_text_prototypes_equal_the_mean_over_templates() -> None:
    model, processor = tiny_model(), tiny_processor()
    templates = list(TEMPLATE_SETS["vild"])[:3]
    names = ["brick", "red striped", "grass"]
    found = model.get_text_prototypes(processor, names, templates)
    for name, prototype in zip(names, found):
        embeds = []
        for template in templates:
            ids = processor.tokenizer([template.format(name)], return_tensors="pt")
            with torch.no_grad():
                embed = model.text_encoder.text_projection(model.text_encoder.text_model(**ids).pooler_output)[0]
            embeds.append(embed / embed.norm())
        mean = sum(embeds) / 3
        torch.testing.assert_close(prototype, mean / mean.norm(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.get_text_prototypes(processor, names[::-1], templates), found.flip(0))
    small = model.get_text_prototypes(processor, [*names, "sand"], templates, batch_size=1)
    torch.testing.assert_close(small[:3], found, rtol=1e-4, atol=1e-5)


def test_text_prototypes_are_cached_until_something_changes() -> None:
    model, processor = tiny_model(), tiny_processor()
    passes = []
    model.text_encoder.text_model.register_forward_hook(lambda *_: passes.append(1))
    first = model.get_text_prototypes(processor, ["grass", "brick"])
    assert torch.equal(model.get_text_prototypes(processor, ["grass", "brick"]), first) and len(passes) == 1
    model.get_text_prototypes(processor, ["brick", "grass"])
    model.get_text_prototypes(processor, ["grass", "brick"], "vild")
    assert len(passes) == 3
    with torch.no_grad():
        model.text_encoder.text_projection.weight.mul_(-1)
    torch.testing.assert_close(model.get_text_prototypes(processor, ["grass", "brick"]), -first)
    assert len(passes) == 4


def test_token_ids_and_prototypes_and_the_stored_vocabulary_agree() -> None:
    model, processor = learned(tiny_model()), tiny_processor()
    names = ["brick", "blue dotted", "grass"]
    encoded = processor.encode_class_names(names)
    prototypes = model.get_text_prototypes(processor, names)
    by_ids = run(model, pixel_values=pixels(), **{name: encoded[name] for name in ("input_ids", "attention_mask")})
    by_prototypes = run(model, pixel_values=pixels(), text_prototypes=prototypes)
    torch.testing.assert_close(by_ids.class_queries_logits, by_prototypes.class_queries_logits)
    assert by_ids.seen_class_mask.bool().all()  # other names count as seen
    model.set_vocabulary(names, ["blue dotted"], processor)
    stored = run(model, pixel_values=pixels())
    torch.testing.assert_close(stored.class_queries_logits, by_prototypes.class_queries_logits)
    assert stored.seen_class_mask.bool().tolist() == [[True, False, True]] * 2
    assert model.config.id2label == dict(enumerate(names)) and model.config.unseen_labels == ["blue dotted"]


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "class"), (["grass", ""], "empty"), (["grass", "  "], "empty"), (["grass", "grass"], "grass")],
)
def test_class_names_that_cannot_be_used_are_named(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model().get_text_prototypes(tiny_processor(), names)


def test_vocabularies_that_cannot_be_used_are_named() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="`unseen` contains 'sand'"):
        model.set_vocabulary(["grass"], ["sand"], tiny_processor())
    with pytest.raises(ValueError, match="`processor`"):
        model.set_vocabulary(["grass"])
    with pytest.raises(ValueError, match="`text_prototypes`"):
        model.set_vocabulary(["grass", "brick"], text_prototypes=unit(3, 24))
    with pytest.raises(ValueError, match="grass"):
        model.set_vocabulary(["grass", "grass"], text_prototypes=unit(2, 24))


# --- wrong arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"pixel_values": None}, "pixel_values"),
        ({"pixel_values": torch.zeros(3, 32, 32)}, "pixel_values"),
        ({"pixel_values": torch.zeros(0, 3, 32, 32)}, "pixel_values"),
        ({"pixel_values": torch.zeros(1, 3, 0, 32)}, "pixel_values"),
        ({"pixel_values": torch.zeros(1, 4, 32, 32)}, "pixel_values"),
        ({"pixel_mask": torch.ones(1, 16, 32)}, "pixel_mask"),
        ({"pixel_mask": torch.ones(32, 32)}, "pixel_mask"),
        ({"pixel_mask": torch.zeros(1, 32, 32)}, "pixel_mask"),
        ({"text_prototypes": torch.zeros(4, 25)}, "text_prototypes"),
        ({"text_prototypes": torch.zeros(24)}, "text_prototypes"),
        ({"text_prototypes": torch.zeros(0, 24)}, "text_prototypes"),
        ({"seen_class_mask": torch.ones(5, dtype=torch.bool)}, "seen_class_mask` has shape"),
        ({"text_prototypes": unit(3, 24), "seen_class_mask": torch.ones(4) > 0}, "seen_class_mask` has shape"),
        (
            {
                "seen_class_mask": torch.zeros(4, dtype=torch.bool),
                "mask_labels": [torch.zeros(0, 32, 32)],
                "class_labels": [torch.zeros(0, dtype=torch.long)],
            },
            "seen_class_mask",
        ),
        ({"clip_hidden_states": torch.zeros(1, 2, 5, 32)}, "clip_hidden_states` is a Tensor; expected a dict"),
        ({"clip_hidden_states": dict.fromkeys((0, 1), torch.zeros(1, 6, 32))}, r"clip_hidden_states\[0\]` has shape"),
        ({"class_labels": None}, "class_labels"),
        ({"mask_labels": None}, "mask_labels"),
        ({"mask_labels": [torch.ones(1, 32, 32)] * 2, "class_labels": [torch.tensor([0])] * 2}, "mask_labels"),
        ({"mask_labels": [torch.ones(1, 48, 32)]}, "mask_labels"),
        ({"class_labels": [torch.tensor([0, 2])]}, "class_labels"),
        ({"class_labels": [torch.tensor([4])]}, "class_labels"),
        ({"class_labels": [torch.tensor([CLASSES.index(*UNSEEN)])]}, "class_labels"),
        ({"pixel_values": np.zeros((1, 3, 32, 32))}, "pixel_values` is a ndarray; expected a dense torch tensor"),
        ({"pixel_values": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)}, "pixel_values` is a tensor of type uint8"),
        ({"pixel_values": torch.zeros(1, 3, 32, 32, dtype=torch.complex64)}, "pixel_values"),
        ({"pixel_values": torch.zeros(1, 3, 32, 32, device="meta")}, "pixel_values"),
        ({"pixel_values": torch.zeros(1, 3, 32, 32).to_sparse()}, "pixel_values"),
        ({"pixel_mask": [[1]]}, "pixel_mask` is a list"),
        ({"text_prototypes": [[1.0]]}, "text_prototypes` is a list"),
        ({"text_prototypes": unit(3, 24).to(torch.complex64)}, "text_prototypes` is a tensor of type complex64"),
        ({"text_prototypes": torch.ones(3, 24, dtype=torch.long)}, "text_prototypes` is a tensor of type int64"),
        ({"seen_class_mask": [True] * 4}, "seen_class_mask` is a list"),
        ({"seen_class_mask": torch.tensor([0, 1, 2, 3])}, "seen_class_mask` is a tensor of type int64"),
        ({"clip_hidden_states": {0: torch.zeros(1, 5, 32)}}, r"clip_hidden_states` is \[0\]; expected .*\[0, 1\]"),
        ({"clip_hidden_states": {0: 1, 1: 2}}, r"clip_hidden_states\[0\]` is a int"),
        ({"mask_labels": 3}, "mask_labels` is a int; expected a list"),
        ({"mask_labels": [0]}, r"mask_labels\[0\]` is a int"),
        ({"class_labels": [0]}, r"class_labels\[0\]` is a int"),
        ({"class_labels": [torch.tensor([0.7])]}, r"class_labels\[0\]` is a tensor of type float32"),
        ({"input_ids": torch.ones(2, 5)}, "input_ids` is a tensor of type float32"),
        ({"input_ids": torch.ones(5, dtype=torch.long)}, "input_ids` has shape"),
        ({"input_ids": torch.ones(0, 5, dtype=torch.long)}, "input_ids` has shape"),
        (
            {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 4)},
            r"attention_mask` has shape \(2, 4\); expected that of `input_ids`, \(2, 5\)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_named(changes: dict[str, Any], name: str) -> None:
    inputs = {
        "pixel_values": pixels(1),
        "mask_labels": [torch.ones(1, 32, 32)],
        "class_labels": [torch.tensor([0])],
        **changes,
    }
    with pytest.raises(ValueError, match=f"`{name}"):
        tiny_model()(**inputs)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"clip_split_layer": 0}, "clip_split_layer"),
        ({"clip_split_layer": 2}, "clip_split_layer"),
        ({"fusion_layers": [0, 2]}, "fusion_layers"),
        ({"fusion_layers": [-1]}, "fusion_layers"),
        ({"fusion_layers": [0] * 5}, "fusion_layers"),
        ({"num_refinement_layers": 0}, "num_refinement_layers"),
        ({"num_queries": 0}, "num_queries"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"mask_stride": 3}, "mask_stride"),
        ({"mask_stride": 16}, "mask_stride"),
        ({"clip_input_scale": 0.3}, "clip_input_scale"),
        ({"clip_input_scale": 0.0}, "clip_input_scale"),
        ({"clip_input_scale": -0.5}, "clip_input_scale"),
        ({"feature_expansion_target": "both"}, "feature_expansion_target"),
        ({"held_out_fraction": 0}, "held_out_fraction"),
        ({"held_out_fraction": 1.0}, "held_out_fraction"),
        ({"num_background_prototypes": 0}, "num_background_prototypes"),
        ({"unseen_labels": ["sand"]}, "unseen_labels"),
        ({"unseen_labels": "grass"}, "unseen_labels' with value 'grass'"),
        ({"unseen_labels": 5}, "unseen_labels"),
        ({"template_set": "vlid"}, "template_set"),
        ({"template_set": []}, "template_set"),
        ({"no_object_weight": -1}, "no_object_weight"),
        ({"bias_correction": "no"}, "bias_correction"),
        ({"train_num_points": 0}, "train_num_points"),
        ({"image_size": -5}, "image_size"),
        ({"fusion_layers": None}, "fusion_layers"),
        ({"fusion_layers": 3}, "fusion_layers"),
        ({"fusion_layers": "03"}, "fusion_layers"),
        ({"fusion_layers": [0.5]}, "fusion_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"vision_config": "x"}, "vision_config"),
        ({"num_refinement_layers": 1.5}, "num_refinement_layers"),
        ({"num_queries": "6"}, "num_queries"),
        ({"num_queries": True}, "num_queries"),
        (
            {"id2label": {0: "a", 2: "b"}, "unseen_labels": []},
            "id2label` maps 2 to 'b' at position 1; expected a dict",
        ),
        ({"id2label": {0: 5}, "unseen_labels": []}, "id2label` maps 0 to 5"),
        ({"projection_hidden_dim": -1}, "projection_hidden_dim"),
        ({"visual_projection": "mlp"}, "projection_hidden_dim` is 0"),
        ({"visual_projection": "none"}, "visual_projection"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_configs_that_cannot_work_are_refused(values: dict[str, Any], name: str) -> None:
    with pytest.raises(StrictDataclassError, match=f"[`']{name}"):
        tiny_config(**values)


@pytest.mark.parametrize("tower", [{"model_type": "bert"}, BertConfig()], ids=["dict", "config"])
def test_towers_that_do_not_exist_are_refused(tower: dict | BertConfig) -> None:
    with pytest.raises(
        ValueError, match="`vision_config` has `model_type` 'bert'; expected one of clip_vision_model, "
    ):
        tiny_config(vision_config=tower)


def test_misspelt_fields_of_the_config_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="`num_querys` is not a field of AlignZegConfig, but `num_queries` is"):
        tiny_config(num_querys=50)
