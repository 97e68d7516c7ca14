# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Pretrains the small CLIP of the embedded benchmark on synthetic images and captions."""

from __future__ import annotations

import json
import math
import multiprocessing
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, set_seed

from modeling_alignzeg.prompts_alignzeg import TEMPLATE_SETS

from ..data.scenes import CLASSES, SCENE_SIZE, STUFF, draw_scene, draw_single
from ..settings import ClipPretraining
from ..tokenization import build_tokenizer


@dataclass(frozen=True)
class Phase:
    """A phase of the training and its images: large single things first, small ones among others later."""

    start: float  # share of all steps
    singles_per_step: int
    scenes_per_step: int
    min_radius: float  # minimum radius of single things, relative to the image


PHASES = (Phase(0.0, 56, 8, 0.22), Phase(2 / 3, 24, 32, 0.14))


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tower = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "projection_dim": 128}
    config = CLIPConfig(
        vision_config={**tower, "num_hidden_layers": 5, "image_size": SCENE_SIZE // 2, "patch_size": 8},
        text_config={
            **tower,
            **special,
            "pad_token_id": tokenizer.pad_token_id,
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": tokenizer.model_max_length,
        },
        projection_dim=128,
    )
    model = CLIPModel(config)
    # CLIP's initialisation is tuned for 12 layers of width 768; small towers train faster with this one.
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:
            torch.nn.init.trunc_normal_(
                parameter, std=parameter.shape[-1] ** -0.5 if "embedding" not in name else 0.02
            )
    return model


def halve(image: np.ndarray) -> np.ndarray:
    """(2h, 2w, 3) to (h, w, 3) by the mean of each 2 x 2 block: CLIP's input has half the resolution of scenes."""
    height, width, _ = image.shape
    return image.reshape(height // 2, 2, width // 2, 2, 3).mean((1, 3)).round().astype(np.uint8)


def _single(job: tuple[int, str, int, int, float]) -> np.ndarray:
    seed, split, index, class_id, min_radius = job
    return halve(draw_single(seed, split, index, class_id, min_radius=min_radius))


def _scene(job: tuple[int, str, int]) -> tuple[np.ndarray, list[str]]:
    """A scene and the classes for its caption: those that cover at least 1 % of it."""
    scene = draw_scene(*job)
    counts = np.bincount(scene.label.flatten(), minlength=len(CLASSES))[: len(CLASSES)]
    return halve(scene.image), [CLASSES[i] for i in np.flatnonzero(counts >= 0.01 * scene.label.size)]


def caption(names: list[str]) -> str:
    things = [name for name in names if name not in STUFF]
    ground = [name for name in names if name in STUFF]
    return " and ".join([", ".join(things)] * bool(things) + [f"on {' and '.join(ground)}"] * bool(ground))


def draw_pools(args: ClipPretraining, phase: Phase):
    """The images of one phase, generated on all cores: singles with class ids, scenes with their class names."""
    number = PHASES.index(phase)
    class_ids = np.arange(args.pool_singles) % len(CLASSES)
    with multiprocessing.get_context("fork").Pool() as pool:
        # Separate seeds, so that CLIP is not trained on scenes of the segmentation benchmark.
        jobs = [(args.seed + 100 * number, "train", i, int(c), phase.min_radius) for i, c in enumerate(class_ids)]
        singles = list(tqdm(pool.imap(_single, jobs, chunksize=64), total=len(jobs), desc="single objects"))
        scene_jobs = [(args.seed + 1000 + 100 * number, "train", i) for i in range(args.pool_scenes)]
        scenes = list(tqdm(pool.imap(_scene, scene_jobs, chunksize=32), total=len(scene_jobs), desc="scenes"))
    as_tensor = lambda images: torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()  # noqa: E731
    return (
        as_tensor(singles),
        torch.from_numpy(class_ids),
        as_tensor([s for s, _ in scenes]),
        [names for _, names in scenes],
    )


def naming_loss(logits: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of scenes `(B, C)` against the captions of all classes; every class in a scene is a positive."""
    share = present / present.sum(1, keepdim=True)
    return -(share * logits.log_softmax(-1)).sum(1).mean()


def mirror(images: torch.Tensor) -> torch.Tensor:
    """Randomly flips the whole batch horizontally, vertically, both or not at all."""
    return images.flip([axis for axis in (2, 3) if torch.rand(()) < 0.5])


@torch.no_grad()
def zero_shot_accuracy(model: CLIPModel, tokenizer, images: torch.Tensor, labels: torch.Tensor, normalize) -> float:
    model.eval()
    prompts = [TEMPLATE_SETS["single"][0].format(name) for name in CLASSES]
    text = model.get_text_features(**tokenizer(prompts, padding=True, return_tensors="pt")).pooler_output
    image = torch.cat([model.get_image_features(normalize(chunk)).pooler_output for chunk in images.split(256)])
    model.train()
    return (F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T).argmax(-1).eq(labels).float().mean().item()


def save(model: CLIPModel, tokenizer, args: ClipPretraining, history: list[dict]) -> dict:
    """Writes the current model folder with `pretraining.json`, and returns the contents of the latter."""
    output, side = Path(args.output_dir), SCENE_SIZE // 2
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
        output
    )
    report = {
        "zero_shot_accuracy": history[-1]["accuracy"],
        "held_out_images": args.eval_per_class * len(CLASSES),
        "classes": len(CLASSES),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": history[-1]["seconds"],
        "command": "python scripts/pretrain_clip.py --output_dir scripts/assets/small_clip",
        "arguments": {k: v for k, v in vars(args).items() if k != "output_dir"},
        "torch": torch.__version__.split("+")[0],
        "python": platform.python_version(),
        "history": history,
    }
    (output / "pretraining.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def pretrain_clip(args: ClipPretraining) -> None:
    """Trains the CLIP and writes it to `args.output_dir`."""
    torch.set_num_threads(args.num_threads)
    set_seed(args.seed)
    started = time.time()

    templates = [*TEMPLATE_SETS["single"], *TEMPLATE_SETS["vild"], *TEMPLATE_SETS["imagenet"]]
    corpus = [template.format(name) for template in templates for name in CLASSES] + [", and on"] * 100
    tokenizer = build_tokenizer(corpus, model_max_length=32)
    model = build_model(tokenizer)
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (CLIPImageProcessorPil.image_mean, CLIPImageProcessorPil.image_std)
    )
    normalize = lambda images: (images.float() / 255 - mean) / std  # noqa: E731

    held_out_ids = torch.arange(args.eval_per_class * len(CLASSES)) % len(CLASSES)
    radius = PHASES[0].min_radius
    images = [_single((args.seed, "test", i, int(c), radius)) for i, c in enumerate(held_out_ids)]
    held_out = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()

    cosine = lambda step: 0.5 * (1 + math.cos(math.pi * min(step / args.steps, 1)))  # noqa: E731
    class_index = {name: i for i, name in enumerate(CLASSES)}
    history, model = [], model.train()
    boundaries = [round(phase.start * args.steps) for phase in PHASES] + [args.steps]
    for phase, first, last in zip(PHASES, boundaries, boundaries[1:]):
        singles, class_ids, scenes, names = draw_pools(args, phase)
        decay = [p for p in model.parameters() if p.ndim >= 2]
        rest = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98))
        progress = tqdm(range(first + 1, last + 1), desc="CLIP", mininterval=10.0)
        for step in progress:
            rate = args.learning_rate * min((step - first) / args.warmup_steps, cosine(step - 1))
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = torch.randint(len(singles), (phase.singles_per_step,))
            pick = torch.randint(len(scenes), (phase.scenes_per_step,)).tolist()
            gain = torch.empty(len(batch) + len(pick), 3, 1, 1).uniform_(0.9, 1.1)
            pixels = normalize(torch.cat([mirror(singles[batch]), mirror(scenes[pick])]) * gain)
            present = torch.zeros(len(pick), len(CLASSES))
            for row, index in enumerate(pick):
                present[row, [class_index[name] for name in names[index]]] = 1
            template = templates[int(torch.randint(len(templates), ()))]
            texts = [template.format(name) for name in CLASSES] + [caption(names[index]) for index in pick]
            tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            image = F.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
            text = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
            logits = model.logit_scale.exp().clamp(max=100) * image @ text.T
            class_logits, pairs = logits[:, : len(CLASSES)], logits[len(batch) :, len(CLASSES) :]
            single_loss = F.cross_entropy(class_logits[: len(batch)], class_ids[batch])
            scene_loss = naming_loss(class_logits[len(batch) :], present)
            target = torch.arange(len(pick))
            pair_loss = (F.cross_entropy(pairs, target) + F.cross_entropy(pairs.T, target)) / 2
            loss = (len(batch) * single_loss + len(pick) * (scene_loss + pair_loss)) / len(pixels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 250 == 0 or step == args.steps:
                accuracy = zero_shot_accuracy(model, tokenizer, held_out, held_out_ids, normalize)
                history.append({"step": step, "accuracy": round(accuracy, 4), "seconds": round(time.time() - started)})
                if step % 1000 == 0:
                    save(model, tokenizer, args, history)
                losses = {"single": single_loss.item(), "scene": scene_loss.item(), "pair": pair_loss.item()}
                progress.write(json.dumps({**history[-1], **losses}))

    model.eval()
    report = save(model, tokenizer, args, history)
    print(json.dumps({k: v for k, v in report.items() if k != "history"}, indent=2))
