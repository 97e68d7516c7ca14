# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Convolutional timm image towers: mask pooling against plain loops, batches, frozen state, checkpoints, pipeline."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from tiny import CLASSES, picture, tiny_checkpoint, tiny_config, tiny_model, tiny_processor
from torch import Tensor
from transformers import pipeline

from modeling_alignzeg import AlignZegModel, AlignZegOutput, AlignZegProcessor, ZeroShotImageSegmentationPipeline


pytest.importorskip("timm", reason="convolutional towers need timm")

TOWERS = ("convnext_atto", "efficientnet_lite0", "mobilenetv3_small_050", "test_resnet")
PROJECTIONS = ("linear", "mlp", "linear+mlp")
SAME = (
    "masks_queries_logits",
    "class_queries_logits",
    "unseen_logits",
    "proposal_embeds",
    "last_hidden_state",
    "queries_hidden_state",
)


def tower_config(architecture: str = "test_efficientnet", **overrides: Any) -> dict[str, Any]:
    """The stages with strides 16 and 32 are fused into the blocks, the stage with stride 4 into the stem."""
    vision = {"model_type": "timm_wrapper", "architecture": architecture}
    return {"vision_config": vision, "clip_input_scale": 1.0, "fusion_layers": [2, 3], **overrides}


def conv_model(architecture: str = "test_efficientnet", seed: int = 0, **overrides: Any) -> AlignZegModel:
    """Makes all weights non-zero and no batch norm an identity."""
    model = tiny_model(seed, **tower_config(architecture, **overrides))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.recognizer.vision_model.named_buffers():
            if buffer.is_floating_point():
                noise = torch.rand(buffer.shape, generator=generator)
                buffer.copy_(0.5 + noise if "var" in name else noise - 0.5)
    return model


def pixels(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def labels(batch: int, height: int, width: int) -> dict[str, list[Tensor]]:
    halves = torch.zeros(2, height, width)
    halves[0, :, : width // 2] = halves[1, :, width // 2 :] = 1
    return {"mask_labels": [halves] * batch, "class_labels": [torch.tensor([0, 2])] * batch}


def run(model: AlignZegModel, **inputs: Any) -> AlignZegOutput:
    with torch.no_grad():
        return model(**inputs)


def frozen_embeds(model: AlignZegModel, **inputs: Any) -> tuple[AlignZegOutput, Tensor]:
    """Outputs of the model and embeddings of the recognizer."""
    found = []
    hook = model.recognizer.register_forward_hook(lambda *call: found.append(call[-1]))
    outputs = run(model, **inputs)
    hook.remove()
    return outputs, found[0]


@pytest.mark.parametrize("architecture", TOWERS)
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_embeddings_equal_a_plain_loop(architecture: str, kind: str) -> None:
    """Mean of the last features over the cells that a proposal claims, the tower's head, projection, unit length."""
    model = conv_model(architecture, visual_projection=kind, projection_hidden_dim=20 if "mlp" in kind else 0)
    image = pixels(2, 64, 96)
    outputs, found = frozen_embeds(model, pixel_values=image)
    tower, projection = model.recognizer.vision_model.timm_model, model.recognizer.visual_projection
    with torch.no_grad():
        features = tower.forward_features(image)
    assert features.shape[-2:] == (2, 3)
    claimed_nothing = 0
    for index in range(2):
        for query, logits in enumerate(outputs.masks_queries_logits[index]):
            probability = logits.sigmoid()
            claimed = torch.where(probability > 0.5, probability, 0.0)
            claimed_nothing += not claimed.any()
            total, weights = torch.zeros(features.shape[1]), 0.0
            for row in range(2):
                for column in range(3):
                    cell = (slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))  # of a mask of stride 4
                    weight = claimed[cell].mean() + 1e-4 * probability[cell].mean()
                    total, weights = total + weight * features[index, :, row, column], weights + weight
            with torch.no_grad():
                pooled = tower.forward_head((total / weights)[None, :, None, None], pre_logits=True)[0]
                expected = torch.zeros(24)
                if "linear" in kind:
                    expected = expected + projection.linear(pooled)
                if "mlp" in kind:
                    first, second = projection.mlp.layers
                    expected = expected + second(F.gelu(first(pooled)))
            torch.testing.assert_close(found[index, query], F.normalize(expected, dim=0), rtol=1e-4, atol=1e-5)
    assert claimed_nothing < 14


def test_a_proposal_that_claims_nothing_takes_what_it_leans_to() -> None:
    model = conv_model()
    with torch.no_grad():
        model.side_network.mask_head.output.bias.zero_()
        features = model.clip_hidden_states(pixels(1, 64, 64))
        tower = model.recognizer.restore(features, pixels(1, 64, 64), None)
        proposals = model.side_network(pixels(1, 64, 64), model.recognizer.maps(tower), None)
        masks = torch.full((1, 2, 16, 16), -30.0)
        masks[0, 0, 3, 12], masks[0, 1, 3, 12] = -3.0, 3.0  # a negative and a positive logit in the upper right cell
        embeds = model.recognizer(tower, proposals._replace(masks=masks))
    torch.testing.assert_close(embeds[0, 0], embeds[0, 1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ["convnext_atto", "test_efficientnet"])
@pytest.mark.parametrize("sizes", [[(64, 96), (96, 64)], [(33, 47), (64, 96), (5, 3)], [(64, 64), (61, 60)]], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_padded_batch_equals_each_image_alone(architecture: str, sizes: list, scale: float) -> None:
    model = conv_model(architecture, clip_input_scale=scale)
    canvas = tuple(max(math.ceil(size[axis] / 32) * 32 for size in sizes) for axis in (0, 1))
    values, mask = torch.full((len(sizes), 3, *canvas), torch.nan), torch.zeros(len(sizes), *canvas)
    images = [pixels(1, *size, seed=seed) for seed, size in enumerate(sizes)]
    for index, (image, (height, width)) in enumerate(zip(images, sizes)):
        values[index, :, :height, :width], mask[index, :height, :width] = image[0], 1
    batch = run(model, pixel_values=values, pixel_mask=mask)
    for index, (image, size) in enumerate(zip(images, sizes)):
        alone = run(model, pixel_values=image)
        for name in (
            "class_queries_logits",
            "unseen_logits",
            "proposal_embeds",
            "queries_hidden_state",
            "content_sizes",
        ):
            torch.testing.assert_close(batch[name][index], alone[name][0], rtol=1e-4, atol=3e-4, msg=name)
        rows, columns = (math.ceil(side / 4) for side in size)
        masks = [outputs.masks_queries_logits[i, :, :rows, :columns] for outputs, i in ((batch, index), (alone, 0))]
        torch.testing.assert_close(*masks, rtol=1e-4, atol=3e-4)


@pytest.mark.parametrize("architecture", ["convnext_atto", "test_efficientnet"])
def test_the_tower_is_frozen_and_its_statistics_stay(architecture: str) -> None:
    model = conv_model(architecture).train()
    recognizer = model.recognizer
    frozen = [*recognizer.vision_model.modules(), *recognizer.visual_projection.modules()]
    assert recognizer.training and not any(module.training for module in frozen)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    model(pixel_values=pixels(2, 64, 64), **labels(2, 64, 64)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
    optimizer.step()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("recognizer.") for name in trained)
    for name, value in model.state_dict().items():
        if name not in trained:
            assert torch.equal(value, before[name]), name
    assert any(not torch.equal(model.get_parameter(name), before[name]) for name in trained)


def test_a_training_step_draws_no_graph_through_the_tower() -> None:
    model = conv_model().train()
    assert not any(states.requires_grad for states in model.clip_hidden_states(pixels(1, 64, 64)).values())


def plain_cells(model: AlignZegModel, images: Tensor) -> Tensor:
    """Unit embeddings of the tower's cells `(B, h, w, D)`, cell by cell."""
    tower = model.recognizer.hidden_states(images, None)
    return model.recognizer.dense_embeds(tower)


def test_cells_start_as_the_frozen_tower_has_them() -> None:
    assert tiny_model(**tower_config()).cell_classifier.adapter.mlp.layers[-1].weight.abs().max() == 0
    model, images = conv_model(), pixels(2, 64, 96)
    for parameter in model.cell_classifier.adapter.mlp.layers[-1].parameters():
        torch.nn.init.zeros_(parameter)
    logits = run(model, pixel_values=images).dense_logits
    cells = plain_cells(model, images)
    expected = torch.einsum("bhwd,cd->bchw", cells, model.class_text_embeds) * model.logit_scale.exp()
    assert logits.shape[2:] == (2, 3)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seen", [[True, False, True], [True] * 3], ids=["some", "all"])
def test_the_indicator_reads_the_frozen_cells_of_a_proposal(seen: list[bool]) -> None:
    model = conv_model(indicator_evidence=["frozen", "cells"])
    images, mask = pixels(2, 64, 96), torch.ones(2, 64, 96)
    mask[1, :, 50:] = 0  # its last column of cells is padding
    prototypes = F.normalize(
        torch.randn(3, model.config.projection_dim, generator=torch.Generator().manual_seed(3)), dim=1
    )
    inputs = {"text_prototypes": prototypes, "seen_class_mask": torch.tensor(seen)}
    outputs, frozen = frozen_embeds(model, pixel_values=images, pixel_mask=mask.long(), **inputs)
    scale, stride = model.logit_scale.exp(), model.config.mask_stride
    for image, width in enumerate((96, 50)):
        content = images[image : image + 1].clone()
        content[..., width:] = 0
        cells = plain_cells(model, content[..., : 64 if width == 50 else 96])[0]
        for proposal in range(outputs.masks_queries_logits.shape[1]):
            inside, votes = outputs.masks_queries_logits[image, proposal].sigmoid(), torch.zeros(3)
            for row in range(cells.shape[0]):
                for column in range(cells.shape[1]):
                    step = 32 // stride
                    area = inside[row * step : (row + 1) * step, column * step : (column + 1) * step]
                    votes += area.mean() * (scale * prototypes @ cells[row, column]).softmax(0)
            votes /= votes.sum()
            unseen = sum(v.item() for v, s in zip(votes, seen) if not s)
            odds = math.log(max(unseen, 1e-4)) - math.log(max(1 - unseen, 1e-4))
            logits = scale * prototypes @ frozen[image, proposal]
            best_seen = max(v.item() for v, s in zip(logits, seen) if s)
            best_other = max((v.item() for v, s in zip(logits, seen) if not s), default=-100.0)
            known = logits[torch.tensor(seen)].softmax(0)
            entropy = -(known * known.log()).sum().item()
            margin = min(max((best_other - best_seen) / 10, -10), 10)
            entry = torch.tensor([best_seen / 10, margin, entropy, odds])
            if proposal < model.config.num_queries:
                expected = model.indicator.mlp(entry).item()
                assert outputs.unseen_logits[image, proposal].item() == pytest.approx(expected, abs=1e-3)


def test_evidence_must_suit_the_tower() -> None:
    assert tiny_config(**tower_config()).indicator_evidence == ["cells"]
    assert tiny_config().indicator_evidence == ["frozen", "adapted"]
    for evidence in (["cells"], [], ["frozen", "frozen"], ["margin"]):
        with pytest.raises(StrictDataclassError, match="indicator_evidence"):
            tiny_config(indicator_evidence=evidence)


@pytest.mark.parametrize("with_mixtures", [False, True])
def test_the_loss_of_cells_equals_a_plain_loop(with_mixtures: bool, monkeypatch) -> None:
    model = conv_model(feature_expansion=with_mixtures).eval()
    images, inputs = pixels(2, 64, 96), labels(2, 64, 96)
    inputs["mask_labels"] = [masks.clone() for masks in inputs["mask_labels"]]
    inputs["mask_labels"][1][:, :20, :32] = 0  # less than half of the second image's first cell is labelled
    inputs["mask_labels"][1][:, 32:45] = 0
    recorded = []
    expansion = model.cell_classifier.feature_expansion
    if with_mixtures:
        plain = expansion.mix
        monkeypatch.setattr(expansion, "mix", lambda *args: recorded.append((args, plain(*args))) or recorded[-1][1])
    loss = run(model, pixel_values=images, **inputs).loss_cells

    cells, scale, terms, kept = plain_cells(model, images), model.logit_scale.exp(), [], []
    for image in range(2):
        for row in range(2):
            for column in range(3):
                area = (slice(32 * row, 32 * row + 32), slice(32 * column, 32 * column + 32))
                shares = [mask[area].float().mean().item() for mask in inputs["mask_labels"][image]]
                if max(shares) <= 0.5:
                    continue
                cell = cells[image, row, column]
                adapted = F.normalize(cell + model.cell_classifier.adapter.mlp(cell), dim=0)
                target = inputs["class_labels"][image][shares.index(max(shares))]
                logits = scale * model.class_text_embeds @ adapted
                terms.append(-logits[model.seen_class_mask].log_softmax(0)[model.seen_class_mask[:target].sum()])
                kept.append(cell)
    assert 2 < len(terms) < 12
    expected = torch.stack(terms).mean()
    if with_mixtures:
        (embeds, *_), (mixed, _) = recorded[-1]
        torch.testing.assert_close(embeds, torch.stack(kept))
        after = [F.normalize(m + model.cell_classifier.adapter.mlp(m), dim=0) for m in mixed]
        expected = expected + torch.stack([scale * (1 - a @ m) for a, m in zip(after, mixed)]).mean()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [[0], [2, 3], [4, 4, 1]], ids=str)
def test_fused_stages_enter_the_masks(layers: list[int]) -> None:
    """A stage whose stride is between the strides of masks and tokens is always fused."""
    model = conv_model(fusion_layers=layers)
    assert [fusion.stride for fusion in model.side_network.stem.fusions.values()] == [4]
    image = pixels(1, 64, 64)
    before = run(model, pixel_values=image).masks_queries_logits
    for fusion in (*model.side_network.fusions, *model.side_network.stem.fusions.values()):
        with torch.no_grad():
            fusion.projection.bias += 1 + torch.arange(len(fusion.projection.bias))
        after = run(model, pixel_values=image).masks_queries_logits
        assert not torch.equal(before, after)
        before = after


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (50, 70)], ids=str)
def test_hidden_states_may_be_computed_beforehand(size: tuple[int, int], is_masked: bool) -> None:
    model = conv_model()
    inputs = {"pixel_values": pixels(2, *size)}
    if is_masked:
        inputs["pixel_mask"] = torch.ones(2, *size)
        inputs["pixel_mask"][1, 31:] = 0
    with torch.no_grad():
        states = model.clip_hidden_states(**inputs)
        expected = model(**inputs)
        for parameter in model.recognizer.vision_model.timm_model.conv_stem.parameters():
            parameter.fill_(float("nan"))  # must not be used again
        outputs = model(**inputs, clip_hidden_states=states)
    for name in SAME:
        torch.testing.assert_close(outputs[name], expected[name])
    wrong = {**states, model.recognizer.final: states[model.recognizer.final][..., 1:]}
    with pytest.raises(ValueError, match=rf"`clip_hidden_states\[{model.recognizer.final}\]` has shape"):
        run(model, **inputs, clip_hidden_states=wrong)


@pytest.mark.parametrize("architecture", TOWERS)
def test_a_saved_model_comes_back(architecture: str, tmp_path: Path) -> None:
    model = conv_model(architecture)
    model.save_pretrained(tmp_path)
    loaded = AlignZegModel.from_pretrained(tmp_path)
    assert type(loaded.config.vision_config) is type(model.config.vision_config)
    assert loaded.config.vision_config.architecture == architecture
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    flags = [{name: p.requires_grad for name, p in each.named_parameters()} for each in (model, loaded)]
    assert flags[0] == flags[1]
    outputs = [run(each, pixel_values=pixels(1, 64, 64)) for each in (loaded, model)]
    for name in SAME:  # the memory layout of weights affects the choice of kernels
        torch.testing.assert_close(outputs[0][name], outputs[1][name], rtol=1e-4, atol=1e-4)


def test_pipeline(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny", processor={"size_divisor": 32}, **tower_config())
    segmenter = pipeline("zero-shot-image-segmentation", model=str(folder), trust_remote_code=True)
    images = [picture(0, (48, 40)), picture(1, (60, 90))]
    names = ["grass", "a red thing", "wood"]
    alone = [segmenter(image, candidate_labels=names) for image in images]
    together = segmenter(images, candidate_labels=names, batch_size=2)
    for image, one, other in zip(images, alone, together):
        assert one and {segment["label"] for segment in one} <= set(names)
        assert all(segment["mask"].size == image.size for segment in one)
        assert [segment["label"] for segment in one] == [segment["label"] for segment in other]
    own = ZeroShotImageSegmentationPipeline(
        model=AlignZegModel.from_pretrained(folder), processor=AlignZegProcessor.from_pretrained(folder)
    )
    assert own(images[0], candidate_labels=names) == alone[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_numbers(dtype: torch.dtype) -> None:
    model = conv_model("convnext_atto")
    expected = run(model, pixel_values=pixels(1, 64, 64))
    outputs = run(model.to(dtype), pixel_values=pixels(1, 64, 64))
    assert outputs.class_queries_logits.dtype == dtype
    torch.testing.assert_close(outputs.proposal_embeds.float(), expected.proposal_embeds, rtol=0, atol=0.2)


def test_the_image_processor_fits_any_tower() -> None:
    """The model pads inputs further than the processor's own divisor does."""
    model = conv_model()
    image = picture(0, (50, 35))
    outputs = run(model, **tiny_processor()(images=image, return_tensors="pt"))
    labels = tiny_processor().post_process_semantic_segmentation(outputs, target_sizes=[(35, 50)])[0]
    assert labels.shape == (35, 50) and labels.max() < len(CLASSES)


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_towers_that_do_not_fit_are_named(architecture: str) -> None:
    with pytest.raises(ValueError, match=f"'{architecture}'.* expected a convolutional tower that ends at stride 32"):
        tiny_model(**tower_config(architecture, fusion_layers=[0]))


def test_fusion_of_a_stage_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="`fusion_layers` contains 7; the image tower has the layers 0, 1, 2, 3, 4"):
        tiny_model(**tower_config(fusion_layers=[7]))
