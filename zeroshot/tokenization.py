# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Tokenizers of the small text towers that this repository trains, and what SigLIP needs of its own."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer, PreTrainedTokenizerBase, TokenizersBackend


def build_tokenizer(texts: list[str], model_max_length: int, vocab_size: int = 4096) -> CLIPTokenizer:
    """A CLIP tokenizer with byte-pair merges learned from `texts`; it can encode any other text too.

    Args:
        texts: Texts to learn the merges from; frequent texts count more.
        model_max_length: Tokens of the longest text, start and end included.
        vocab_size: Maximum number of tokens, of which 512 are bytes and two are special.
    """
    byte_tokens = sorted(ByteLevel.alphabet())
    tokens = dict.fromkeys(byte_tokens + [f"{token}</w>" for token in byte_tokens])
    learner, base = Tokenizer(BPE(end_of_word_suffix="</w>")), CLIPTokenizer().backend_tokenizer
    learner.normalizer, learner.pre_tokenizer = base.normalizer, base.pre_tokenizer
    trainer = BpeTrainer(vocab_size=vocab_size, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(texts, trainer)
    merges = []
    for pair in json.loads(learner.to_str())["model"]["merges"]:
        if len(tokens) < vocab_size - 2:
            tokens["".join(pair)] = None
            merges.append(tuple(pair))
    ids = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=model_max_length)


def siglip_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """`tokenizer` with all that SigLIP's text tower needs, in the files that it saves: lower case, no attention mask, and
    padding at the right up to `model_max_length`, which `AlignZegProcessor` finds there.

    SigLIP's first tokenizer lowers texts itself. That of SigLIP 2, Gemma's, does not.
    """
    if hasattr(tokenizer, "backend_tokenizer"):
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        steps = [normalizers.Lowercase(), *filter(None, [backend.normalizer])]
        backend.normalizer = normalizers.Sequence(steps)
        length, special = tokenizer.model_max_length, tokenizer.special_tokens_map
        tokenizer = TokenizersBackend(tokenizer_object=backend, model_max_length=length, **special)
    options = {"padding": "max_length", "padding_side": "right", "model_input_names": ["input_ids"]}
    tokenizer.padding_side, tokenizer.model_input_names = "right", ["input_ids"]
    tokenizer.init_kwargs.update(options)
    return tokenizer
