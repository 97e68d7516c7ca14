# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The frozen text tower, which turns class names into text prototypes."""

import hashlib
import json
import os
from collections import OrderedDict
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, MetaClip2TextModel, PreTrainedModel, SiglipTextModel

from .checks_alignzeg import check_tensor
from .configuration_alignzeg import AlignZegConfig
from .processing_alignzeg import check_classes, get_templates, phrase_table


TEXT_TOWERS: dict[str, type[PreTrainedModel]] = {
    "clip_text_model": CLIPTextModel,
    "metaclip_2_text_model": MetaClip2TextModel,
    "siglip_text_model": SiglipTextModel,
}
PROMPTS_AT_ONCE = 8192  # tokenized and embedded before their mean over templates
PROCESSOR_HINT = "The AlignZegProcessor makes both from class names: `processor(text=names, return_tensors='pt')`."


def _read_embeds(file: Path, weight: Tensor) -> Tensor | None:
    """Embeddings of a cache file, with the type and device of `weight`; `None` if there is none, or it is damaged."""
    try:
        return torch.from_numpy(np.load(file, allow_pickle=False)).to(weight.device, weight.dtype)
    except (OSError, EOFError, ValueError):
        return None


def _write_embeds(file: Path, embeds: Tensor) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    values = embeds.cpu() if embeds.dtype == torch.float64 else embeds.cpu().float()
    with NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as beside:
        try:
            np.save(beside, values.numpy())
            os.replace(beside.name, file)
        except BaseException:  # a full disk, or an interrupt
            os.unlink(beside.name)
            raise


class AlignZegTextEncoder(nn.Module):
    """CLIP's text tower and projection.

    SigLIP's tower has its projection inside. It pools the last token and has no mask: the padding to a fixed length is
    part of the text.
    """

    def __init__(self, config: AlignZegConfig):
        super().__init__()
        self.config = config
        text = config.text_config
        self.text_model = TEXT_TOWERS[text.model_type]._from_config(text)
        self.fixed_length = text.max_position_embeddings if text.model_type == "siglip_text_model" else None
        self.text_projection: nn.Module = nn.Identity()
        if self.fixed_length is None:
            self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=False)
        self._cache: OrderedDict[tuple, Tensor] = OrderedDict()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def train(self, mode: bool = True):
        return super().train(False)  # frozen: dropout is always off

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Unit prototypes `(C, D)` from tokenized prompts `(C, L)` or `(C, templates, L)`, or `(C, phrases, D)` from
        `(C, phrases, templates, L)`. Embeddings are normalized before and after the mean over templates.

        Raises:
            ValueError: they are not integers of such a shape, `attention_mask` has another one, or the tower takes another
                length only.
        """
        device = self.device
        check_tensor("input_ids", input_ids, "whole numbers", device, PROCESSOR_HINT)
        if input_ids.ndim not in (2, 3, 4) or 0 in input_ids.shape:
            raise ValueError(
                f"`input_ids` has shape {tuple(input_ids.shape)}; expected (classes, length), (classes, templates, "
                f"length) or (classes, phrases, templates, length) with no empty axis. {PROCESSOR_HINT}"
            )
        prompts, mask = input_ids.reshape(-1, input_ids.shape[-1]), None
        if attention_mask is not None:
            check_tensor("attention_mask", attention_mask, "real numbers", device, PROCESSOR_HINT)
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"`attention_mask` has shape {tuple(attention_mask.shape)}; expected that of `input_ids`, "
                    f"{tuple(input_ids.shape)}. {PROCESSOR_HINT}"
                )
            mask = attention_mask.reshape(prompts.shape)
        if self.fixed_length is not None:
            if prompts.shape[1] != self.fixed_length:
                raise ValueError(
                    f"`input_ids` has texts of {prompts.shape[1]} tokens; expected {self.fixed_length}, to which SigLIP's "
                    f"texts are padded (`padding='max_length'`). {PROCESSOR_HINT}"
                )
            mask = None
        pooled = self.text_model(input_ids=prompts, attention_mask=mask).pooler_output
        embeds = F.normalize(self.text_projection(pooled), dim=-1)
        shape = (*input_ids.shape[:-1], 1)[: max(2, input_ids.ndim - 1)]  # (C, templates) or (C, phrases, templates)
        return F.normalize(embeds.unflatten(0, shape).mean(-2), dim=-1)

    def prototypes(
        self,
        processor,
        classes,
        template_set: str | list[str] | None,
        batch_size: int,
        phrase_pooling: str,
        cache_dir: str | os.PathLike | None,
    ) -> Tensor:
        """See [`AlignZegModel.get_text_prototypes`]."""
        if phrase_pooling not in ("max", "mean"):
            raise ValueError(f"`phrase_pooling` is {phrase_pooling!r}; expected 'max' or 'mean'.")
        classes = check_classes(classes)
        phrases = [phrase for group in classes.values() for phrase in group]
        templates = get_templates(self.config.template_set if template_set is None else template_set)
        embeds = self._cached_embeds(processor, phrases, templates, batch_size, cache_dir)
        if len(phrases) == len(classes):
            return embeds
        if phrase_pooling == "max":
            return embeds[torch.tensor(phrase_table(classes), device=embeds.device)]
        groups = embeds.split([len(group) for group in classes.values()])
        return F.normalize(torch.stack([group.mean(0) for group in groups]), dim=-1)

    def _cached_embeds(
        self,
        processor,
        phrases: list[str],
        templates: tuple[str, ...],
        batch_size: int,
        cache_dir: str | os.PathLike | None,
    ) -> Tensor:
        """Unit embeddings `(phrases, D)`, from memory or from `cache_dir` where they are known."""
        weights = tuple((w.data_ptr(), w._version, w.dtype, w.device) for w in self.parameters())
        key = (tuple(phrases), templates, weights)
        with torch.inference_mode(False):  # the result may be used in a training step
            if key not in self._cache:
                file = None
                if cache_dir is not None and self.device.type != "meta":  # offloaded weights are not hashed
                    file = Path(cache_dir) / f"{self._digest(phrases, templates)}.npy"
                embeds = None if file is None else _read_embeds(file, next(self.parameters()))
                if embeds is None:
                    embeds = self._embed(processor, phrases, templates, batch_size)
                    if file is not None:
                        _write_embeds(file, embeds)
                self._cache[key] = embeds
                while len(self._cache) > 16:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(key)
            return self._cache[key].clone()

    def _embed(self, processor, phrases: list[str], templates: tuple[str, ...], batch_size: int) -> Tensor:
        """Unit embeddings `(phrases, D)`. Prompts of similar length share a batch, so that little padding is encoded; only
        [`PROMPTS_AT_ONCE`] are in memory at a time."""
        found = []
        step = max(1, PROMPTS_AT_ONCE // len(templates))
        for start in range(0, len(phrases), step):
            ids, mask = (
                part.flatten(0, -2) for part in self._tokenize(processor, phrases[start : start + step], templates)
            )
            lengths = mask.sum(-1) if self.fixed_length is None else mask.new_full(mask.shape[:1], ids.shape[-1])
            order = lengths.argsort(stable=True)
            parts = [
                self(ids[rows, : lengths[rows[-1]]], mask[rows, : lengths[rows[-1]]])
                for rows in order.split(batch_size)
            ]
            prompts = torch.cat(parts)[order.argsort().to(parts[0].device)]
            found.append(F.normalize(prompts.unflatten(0, (-1, len(templates))).mean(1), dim=-1))
        return torch.cat(found)

    def _digest(self, phrases: list[str], templates: tuple[str, ...]) -> str:
        """Hash of everything that the embeddings depend on: texts, the tower's configuration and its weights."""
        text = [list(phrases), list(templates), self.config.text_config.to_dict()]
        found = hashlib.sha256(json.dumps(text, sort_keys=True, default=str).encode())
        for name, weight in self.state_dict().items():
            found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            found.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return found.hexdigest()

    def _tokenize(self, processor, class_names: list[str], templates: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        if not hasattr(processor, "encode_class_names"):
            raise ValueError(
                f"`processor` is a {type(processor).__name__}; expected the AlignZegProcessor of the checkpoint, as from "
                "AutoProcessor.from_pretrained."
            )
        encoded = processor.encode_class_names(class_names, template_set=templates)
        known, size = len(processor.tokenizer), self.config.text_config.vocab_size
        # Some text towers have a few unused rows, and some tokenizers have added tokens.
        if 2 * known < size or encoded["input_ids"].max() >= size:
            raise ValueError(
                f"The tokenizer of `processor` has {known} tokens and the text tower {size}: tokenizer.json is missing in "
                "the checkpoint or belongs to another one. Load the processor from the model's folder, or copy the file "
                "there from the CLIP model that the checkpoint is based on."
            )
        ids = encoded["input_ids"]
        mask = encoded.get("attention_mask", torch.ones_like(ids))  # SigLIP's tokenizers give none
        if self.device.type == "meta":  # offloaded: accelerate moves the tokens to where the weights will be
            return ids, mask
        return ids.to(self.device), mask.to(self.device)
