# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Training with transformers' own `Trainer`, PEFT adapters, activation checkpointing, and loading in 8 and 4 bits."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from tiny import TOWER, picture, tiny_checkpoint, tiny_config, tiny_model, tiny_processor
from transformers import AutoModel, AutoProcessor, Trainer, TrainerCallback, TrainingArguments

from modeling_alignzeg import AlignZegModel, AlignZegProcessor
from zeroshot.data.benchmarks import load_benchmark
from zeroshot.data.dataset import SegmentationDataset
from zeroshot.data.splits import load_split
from zeroshot.data.transforms import Collator, TrainTransform


SPLIT = load_split("embedded_scenes")


@pytest.fixture(scope="module")
def processor() -> AlignZegProcessor:
    return tiny_processor()


@pytest.fixture(scope="module")
def scenes() -> SegmentationDataset:
    dataset = load_benchmark("embedded_scenes", "train", num_scenes=6)
    return SegmentationDataset(dataset, SPLIT, TrainTransform(crop_size=32), training=True, in_memory=True)


@pytest.fixture
def model(processor: AlignZegProcessor) -> AlignZegModel:
    model = tiny_model()
    model.set_vocabulary(list(SPLIT.seen), processor=processor)
    return model


class NewAugmentationEveryEpoch(TrainerCallback):
    """`Trainer` sets the epoch of its sampler, but not of the dataset after a resume."""

    def __init__(self, dataset: SegmentationDataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch))


def make_trainer(
    model: torch.nn.Module, processor: AlignZegProcessor, scenes: SegmentationDataset, folder: Path, **options
) -> Trainer:
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "remove_unused_columns": False,  # the collator needs the columns of the dataset
        "label_names": ["mask_labels", "class_labels"],
        "prediction_loss_only": True,
        "disable_tqdm": True,
        **options,
    }
    collator = Collator(processor.image_processor, 32)
    return Trainer(
        model,
        TrainingArguments(**arguments),
        data_collator=collator,
        train_dataset=scenes,
        eval_dataset=scenes,
        processing_class=processor,
        callbacks=[NewAugmentationEveryEpoch(scenes)],
    )


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_trainer_trains_what_is_trainable(
    model: AlignZegModel, processor: AlignZegProcessor, scenes: SegmentationDataset, tmp_path: Path
) -> None:
    before = weights_of(model)
    trainer = make_trainer(model, processor, scenes, tmp_path, save_strategy="steps", save_steps=4)
    result = trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and all(0 < loss < 100 for loss in losses) and result.global_step == 4
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name]), f"{name} is frozen"
    still = [n for n, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[n])]
    assert not still, f"{still} did not move"

    loss = trainer.evaluate()["eval_loss"]
    assert loss == trainer.evaluate()["eval_loss"], "two evaluations of one model agree"

    checkpoint = str(tmp_path / "checkpoint-4")
    loaded = AutoModel.from_pretrained(checkpoint)
    assert type(AutoProcessor.from_pretrained(checkpoint)) is AlignZegProcessor
    pixels = processor(images=picture(), return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**pixels).class_queries_logits, model.eval()(**pixels).class_queries_logits)


def test_trainer_resumes_to_the_bit(
    model: AlignZegModel, processor: AlignZegProcessor, scenes: SegmentationDataset, tmp_path: Path
) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    again = copy.deepcopy(model)
    make_trainer(model, processor, scenes, tmp_path, **options).train()
    make_trainer(again, processor, scenes, tmp_path, **options).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    expected = weights_of(model)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(again).items())


def test_trainer_accumulates_gradients_in_bf16_with_checkpointing(
    model: AlignZegModel, processor: AlignZegProcessor, scenes: SegmentationDataset, tmp_path: Path
) -> None:
    options = {"bf16": True, "gradient_accumulation_steps": 2, "activation_checkpointing": True, "max_steps": 2}
    result = make_trainer(model, processor, scenes, tmp_path, **options).train()
    assert 0 < result.training_loss < 100


# --- adapters


def test_lora_attaches_to_the_refinement_layers_and_trains(
    model: AlignZegModel, processor: AlignZegProcessor, scenes: SegmentationDataset, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    with torch.no_grad():
        for layer in model.side_network.refinement_layers:  # zero in an untrained model, which blocks gradients
            layer.feature_cross_attention.out_proj.weight.normal_(std=0.1)
    before = weights_of(model)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=r".*refinement_layers\..*\.(q_proj|v_proj)")
    fresh = copy.deepcopy(model)
    adapted = peft.get_peft_model(model, config)
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    layers = 2 * 3 * 2  # refinement layers, attentions in each, projections
    assert len(trainable) == 2 * layers
    assert all("refinement_layers" in name and "lora_" in name for name in trainable)

    make_trainer(adapted, processor, scenes, tmp_path, learning_rate=1e-2).train()
    base = dict(adapted.get_base_model().named_parameters())
    for name, value in before.items():
        assert torch.equal(value, base[name if name in base else name.replace("_proj.", "_proj.base_layer.")]), name
    assert all(parameter.abs().max() > 0 for name, parameter in adapted.named_parameters() if "lora_B" in name)

    adapted.save_pretrained(tmp_path / "adapter")
    pixels = processor(images=picture(), return_tensors="pt")
    with torch.no_grad():
        unadapted = fresh.eval()(**pixels).masks_queries_logits
        expected = adapted.eval()(**pixels).masks_queries_logits
        loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
        assert torch.equal(loaded(**pixels).masks_queries_logits, expected)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**pixels).masks_queries_logits, expected, rtol=1e-4, atol=1e-4)
    assert type(merged) is AlignZegModel and not torch.allclose(unadapted, expected, atol=1e-3)


# --- activation checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(
    model: AlignZegModel, processor: AlignZegProcessor, scenes: SegmentationDataset, use_reentrant: bool
) -> None:
    collator = Collator(processor.image_processor, 32)
    batch = {k: v for k, v in collator([scenes[0], scenes[1]]).items() if k not in ("names", "indices", "epochs")}
    passes = []
    for layer in model.side_network.refinement_layers:
        layer.query_mlp.register_forward_pre_hook(lambda *_: passes.append(1))

    def gradients():
        passes.clear()
        model.zero_grad()
        torch.manual_seed(0)
        model(**batch).loss.backward()
        return len(passes), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.train()
    plain_passes, plain = gradients()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    checkpointed_passes, checkpointed = gradients()
    assert (plain_passes, checkpointed_passes) == (2, 4), "each layer runs again in the backward pass"
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(plain) == set(checkpointed) == trainable
    for name, gradient in plain.items():  # a reentrant backward pass accumulates gradients in a different order
        tolerance = 1e-5 if use_reentrant else 0
        torch.testing.assert_close(checkpointed[name], gradient, rtol=tolerance, atol=tolerance, msg=name)


# --- 8 and 4 bits


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", [8, 4])
def test_loading_in_few_bits(processor: AlignZegProcessor, tmp_path: Path, bits: int) -> None:
    from transformers import BitsAndBytesConfig

    # The 4-bit CPU kernel requires widths that are multiples of 64, as in CLIP's towers. The rest is not quantized.
    wide = {**TOWER, "hidden_size": 64, "intermediate_size": 128}
    base = tiny_config()
    text_config = {**base.text_config.to_dict(), **wide}
    vision_config = {**wide, "image_size": 16, "patch_size": 8}
    folder = tiny_checkpoint(tmp_path / "checkpoint", vision_config=vision_config, text_config=text_config)
    towers = ("recognizer.vision_model", "text_encoder.text_model")
    parts = [name for name, _ in AlignZegModel(base).named_modules() if name and name.count(".") < 2]
    rest = [name for name in parts if not any(tower.startswith(name) for tower in towers)]
    quantization = BitsAndBytesConfig(
        load_in_8bit=bits == 8, load_in_4bit=bits == 4, llm_int8_skip_modules=rest if bits == 4 else None
    )
    quantized = AlignZegModel.from_pretrained(folder, quantization_config=quantization, device_map={"": "cpu"})
    pixels = processor(images=picture(), return_tensors="pt")
    with torch.no_grad():
        expected = AlignZegModel.from_pretrained(folder)(**pixels)
        outputs = quantized(**pixels)
        names = quantized.get_text_prototypes(processor, ["grass", "brick"])
    assert outputs.class_queries_logits.isfinite().all() and names.isfinite().all()
    torch.testing.assert_close(outputs.proposal_embeds.float(), expected.proposal_embeds, rtol=0, atol=0.5)
