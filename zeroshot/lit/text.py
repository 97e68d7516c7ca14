# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The small text tower: CLIP's architecture, distilled from a sentence encoder."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .teacher import TEACHER_SIZE


MAX_TOKENS = 32
# Training templates in addition to ViLD's.
MORE_TEMPLATES = (
    "{}",
    "{}",
    "a {}",
    "the {}",
    "many {}",
    "a photo of the {}.",
    "a photo of many {}.",
    "a good photo of a {}.",
    "a close-up photo of a {}.",
    "a picture of {}.",
    "a bright photo of a {}.",
    "a cropped photo of the {}.",
)


class TextTower(nn.Module):
    """CLIP's text transformer and a linear projection into the teacher's space."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.text_model = CLIPTextModel(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    @classmethod
    def create(cls, tokenizer: CLIPTokenizer, width: int = 256, layers: int = 4) -> TextTower:
        """A tower with random weights for a tokenizer."""
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            projection_dim=TEACHER_SIZE,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        tower = cls(config)
        for name, parameter in tower.named_parameters():  # CLIP's own initialisation is tuned for larger widths
            if parameter.ndim == 2:
                std = 0.02 if "embedding" in name else parameter.shape[-1] ** -0.5
                nn.init.trunc_normal_(parameter, std=std)
        return tower

    @torch.no_grad()
    def start_from(self, tokenizer: CLIPTokenizer, teacher: Callable[[list[str]], torch.Tensor]) -> None:
        """Initialises token embeddings with the principal components of the teacher's embeddings of single tokens."""
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        meanings = teacher([token.removesuffix("</w>") or "." for token, _ in vocabulary])
        width = self.text_projection.in_features
        basis = torch.linalg.svd(meanings - meanings.mean(0), full_matrices=False).Vh[:width]  # (width, 384)
        embeddings = (meanings - meanings.mean(0)) @ basis.T
        self.text_model.get_input_embeddings().weight.copy_(0.1 * embeddings / embeddings.std())
        self.text_projection.weight.copy_(basis.T)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Token ids `(texts, length)` to embeddings `(texts, 384)`, not normalized."""
        return self.text_projection(self.text_model(input_ids, attention_mask).pooler_output)


@torch.inference_mode()
def embed_texts(tower: TextTower, tokenizer: CLIPTokenizer, texts: list[str], batch_size: int = 256) -> torch.Tensor:
    """Unit vectors `(texts, 384)`."""
    result = []
    for start in range(0, len(texts), batch_size):
        inputs = tokenizer(texts[start : start + batch_size], padding=True, truncation=True, return_tensors="pt")
        result.append(F.normalize(tower(inputs.input_ids, inputs.attention_mask), dim=-1))
    return torch.cat(result)


def embed_names(
    embed: Callable[[list[str]], torch.Tensor], names: list[str], templates: tuple[str, ...]
) -> torch.Tensor:
    """Unit vectors `(names, 384)`: the mean over templates of the embeddings by `embed`."""
    sentences = [template.format(name) for name in names for template in templates]
    return F.normalize(embed(sentences).reshape(len(names), len(templates), -1).mean(1), dim=-1)


def training_texts(nouns: list[str], phrases: list[str], templates: tuple[str, ...], seed: int) -> list[str]:
    """Training texts of the tower: every noun alone, and common nouns and phrases in sentences."""
    rng = random.Random(seed)
    texts = [*nouns, *phrases]
    for count in (len(nouns), len(nouns) // 4, 3000):  # the common ones come first
        texts += [rng.choice(templates).format(noun) for noun in nouns[:count]]
    texts += [rng.choice(templates).format(phrase) for phrase in phrases[::2]]
    return list(dict.fromkeys(texts))


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, scale: float = 30.0) -> torch.Tensor:
    """One minus the cosine, plus the KL between the student's and the teacher's similarities within the batch.

    Args:
        student: embeddings `(texts, 384)`.
        teacher: unit vectors `(texts, 384)`.
        scale: scale of similarities before the softmax.
    """
    student = F.normalize(student, dim=-1)
    cosine = 1 - (student * teacher).sum(-1).mean()
    target = (scale * teacher @ teacher.T).log_softmax(-1)
    predicted = (scale * student @ teacher.T).log_softmax(-1)
    return cosine + 0.3 * F.kl_div(predicted, target, log_target=True, reduction="batchmean")


def distil(
    tower: TextTower,
    tokenizer: CLIPTokenizer,
    texts: list[str],
    targets: torch.Tensor,
    steps: int,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
) -> None:
    """Trains the tower in place.

    Args:
        tower: the tower to train.
        tokenizer: its tokenizer.
        texts: training texts.
        targets: the teacher's embeddings of the texts, unit vectors `(texts, 384)`.
        steps: optimizer steps; linear warm-up over the first 3 %, then cosine decay.
        batch_size: texts per step, all of similar length.
        learning_rate: peak learning rate.
    """
    ids = tokenizer(texts, truncation=True).input_ids
    lengths = torch.tensor([len(row) for row in ids], dtype=torch.float)
    optimizer = torch.optim.AdamW(tower.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    tower.train()
    batches: list[torch.Tensor] = []
    progress = tqdm(range(steps), desc="text tower", mininterval=20.0)
    for step in progress:
        if not batches:  # a new epoch: jitter the lengths, so that batches of similar length differ
            batches = list((lengths + torch.rand(len(ids))).argsort().split(batch_size))
            random.Random(step).shuffle(batches)
        batch, done = batches.pop(), step / steps
        optimizer.param_groups[0]["lr"] = learning_rate * min(
            (done + 1e-3) / 0.03, 0.5 + 0.5 * math.cos(math.pi * done)
        )
        inputs = tokenizer.pad({"input_ids": [ids[row] for row in batch.tolist()]}, return_tensors="pt")
        loss = distillation_loss(tower(inputs.input_ids, inputs.attention_mask), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            progress.set_postfix(loss=round(loss.item(), 3))
    tower.eval()


@torch.inference_mode()
def measure_text(
    student: Callable[[list[str]], torch.Tensor],
    teacher: Callable[[list[str]], torch.Tensor],
    held_out: list[str],
    names: list[str],
) -> dict[str, float]:
    """Agreement of student and teacher on held-out nouns.

    Returns:
        `cosine`, mean over the nouns alone, and `cosine_in_sentence`; `retrieval`, share of nouns whose nearest teacher
        embedding is their own; `nearest_name`, share of nouns with the same nearest of `names` in both.
    """
    sentences = [f"a photo of a {noun}." for noun in held_out]
    ours, theirs = student(held_out), teacher(held_out)
    our_names, their_names = student(names), teacher(names)
    nearest = (ours @ our_names.T).argmax(1) == (theirs @ their_names.T).argmax(1)
    return {
        "cosine": (ours * theirs).sum(1).mean().item(),
        "cosine_in_sentence": (student(sentences) * teacher(sentences)).sum(1).mean().item(),
        "retrieval": (ours @ theirs.T).argmax(1).eq(torch.arange(len(held_out))).float().mean().item(),
        "nearest_name": nearest.float().mean().item(),
    }
