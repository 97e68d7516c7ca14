# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""CLIP from open_clip or transformers, as a model of transformers with its tokenizer and normalization.

From open_clip that is always a `CLIPModel` with a `CLIPTokenizer`; transformers also has MetaCLIP 2 and SigLIP.

open_clip's plain ViT families (S, M, B, L, H, g, e and bigG, with `-quickgelu`, `-plus` and `-alt`) have the towers of
`CLIPModel` under other names. Weights files do not say whether the activation is QuickGELU: it is inferred from the
pretrained tag (OpenAI's weights need it even under the name ViT-B-16), otherwise from the model's name or config.

`CLIPTokenizer` gives open_clip's token ids up to and including the end token, with four exceptions. The caller can avoid
the first two by cleaning the text as open_clip does, with `ftfy.fix_text` and then `html.unescape` twice:

- ftfy: open_clip replaces curly quotes, full- and half-width forms, ligatures (ĳ, ǆ, ﬁ, …) and control characters by
  plain ones and repairs mojibake ("cafÃ©"). Of all other single Unicode characters, only the combining iota U+0345
  differs.
- HTML entities: open_clip reads "&amp;" as "&".
- Greek capitals: at the end of a word, open_clip lowers Σ to ς, `CLIPTokenizer` to σ.
- Special tokens in the text: `CLIPTokenizer` recognises "<|endoftext|>", open_clip "<end_of_text>".

After the end token, open_clip pads with 0 and `CLIPTokenizer` with the end token. The text embedding is the same:
attention is causal and the first end token is pooled.
"""

from __future__ import annotations

import difflib
import json
import logging
import pickle
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.pretrained import download_pretrained_from_hf
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    ImageProcessingMixin,
    MetaClip2Model,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipModel,
)

from .tokenization import siglip_tokenizer


logger = logging.getLogger(__name__)

HUB, FOLDER = "hf-hub:", "local-dir:"  # open_clip's prefixes of repositories with a config and weights

_SECTIONS = {"vision_cfg": open_clip.CLIPVisionCfg, "text_cfg": open_clip.CLIPTextCfg}
# Entries that the config of a convertible model may set; every other entry must have open_clip's default.
_CONVERTED = {
    "": {"embed_dim", *_SECTIONS, "quick_gelu", "custom_text", "init_logit_scale", "nonscalar_logit_scale"},
    # Patches are dropped only in training, but the towers are frozen.
    "vision_cfg": {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout"},
    "text_cfg": {"layers", "width", "heads", "mlp_ratio", "context_length", "vocab_size"},
}
_PARTS = {
    "multimodal_cfg": "CoCa's text decoder",
    "init_logit_bias": "SigLIP's logit bias",
    "timm_model_name": "a timm image tower",
    "hf_model_name": "a Hugging Face text tower",
    "hf_tokenizer_name": "a tokenizer other than CLIP's",
    "tokenizer_kwargs": "a tokenizer other than CLIP's",
    "ls_init_value": "layer scale",
    "no_ln_pre": "no layer norm before the transformer (CLIPA)",
    "pool_type": "a pooling other than CLIP's",
}
# transformers' models that have both towers. SigLIP 2 with one image size is a `siglip`, too.
_MODELS: dict[str, type[PreTrainedModel]] = {"clip": CLIPModel, "metaclip_2": MetaClip2Model, "siglip": SiglipModel}
_FAMILIES = "open_clip's plain ViTs: ViT-S, -M, -B, -L, -H, -g, -e and -bigG, with -quickgelu, -plus and -alt"

# Maps open_clip's names to transformers'; `_names` adds the names of the layers.
_NAMES = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
}
_LAYER_NAMES = {
    "ln_1.": ("layer_norm1.",),
    "ln_2.": ("layer_norm2.",),
    "attn.in_proj_": ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
    "attn.out_proj.": ("self_attn.out_proj.",),
    "mlp.c_fc.": ("mlp.fc1.",),
    "mlp.c_proj.": ("mlp.fc2.",),
}
_TRANSPOSED = ("visual.proj", "text_projection")


def load_clip(
    source: str, pretrained: str | None = None, *, cache_dir: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, list[float]]]:
    """Loads a CLIP, MetaCLIP 2 or SigLIP of transformers, or a CLIP of open_clip.

    Args:
        source (`str`): An open_clip model name (`"ViT-B-16"`; a folder of that name is `"./ViT-B-16"`), a repository
            of open_clip (`"hf-hub:id"`, `"local-dir:folder"` or a folder that holds an `open_clip_config.json`), or
            the id or folder of a transformers model of type `clip`, `metaclip_2` or `siglip`.
        pretrained (`str`, *optional*): Weights for an open_clip model name, see [`clip_from_open_clip`].
        cache_dir (`str`, *optional*): Where downloads are kept. Default: the libraries' own caches.

    Returns:
        The model in evaluation mode and float32, its tokenizer, and `{"image_mean": …, "image_std": …}`, one number
        in units of 0..1 for each channel.

    Raises:
        ValueError: If there is no such CLIP, it is incomplete, or it is not of a convertible family.
    """
    if source.startswith((HUB, FOLDER)) or source.replace("/", "-") in open_clip.list_models():
        return clip_from_open_clip(source, pretrained, cache_dir=cache_dir)
    if (Path(source) / HF_CONFIG_NAME).is_file():
        return clip_from_open_clip(FOLDER + source, pretrained, cache_dir=cache_dir)
    if pretrained is not None:
        raise ValueError(
            f"`pretrained` is {pretrained!r} and `source` is {source!r}, which is not an open_clip model name"
            f"{_suggest(source)}. A transformers CLIP includes its weights: leave `pretrained` out."
        )
    return _load_from_transformers(source, cache_dir)


def clip_from_open_clip(
    model_name: str, pretrained: str | None = None, *, cache_dir: str | None = None, seed: int = 0
) -> tuple[CLIPModel, CLIPTokenizer, dict[str, list[float]]]:
    """Converts a CLIP of open_clip.

    Args:
        model_name (`str`): A name of `open_clip.list_models()`, or `"hf-hub:id"` or `"local-dir:folder"` (a config
            with its weights, as open_clip's `push_to_hf_hub` writes them).
        pretrained (`str`, *optional*): One of open_clip's tags, a local weights file (safetensors, or a PyTorch file
            of tensors only), or an `"hf-hub:id"` whose model is `model_name`. Default: random weights, unless
            `model_name` is a repository. For a local file, the name must say whether the weights were trained with
            QuickGELU (`"ViT-B-16-quickgelu"`): the file does not.
        cache_dir (`str`, *optional*): Where downloads are kept. Default: open_clip's own cache.
        seed (`int`, defaults to 0): Seed of random weights; global random number generators are not changed.

    Returns:
        The model in evaluation mode and float32, its tokenizer, and `{"image_mean": …, "image_std": …}`, one number
        in units of 0..1 for each channel.

    Raises:
        ValueError: If the model or the tag is unknown, the family cannot be converted, or the weights do not fit.
        OSError: If the weights cannot be downloaded.
    """
    cfg, normalization, fetch = look_up(model_name, pretrained, cache_dir)
    _check_convertible(cfg, model_name)
    config = clip_config_from_open_clip(cfg)
    tokenizer = clip_tokenizer_from_open_clip(config.text_config.max_position_embeddings)
    if config.text_config.vocab_size != len(tokenizer):
        raise ValueError(
            f"`model_name` {model_name!r} has {config.text_config.vocab_size} tokens, but CLIP's tokenizer has "
            f"{len(tokenizer)}: it has a different tokenizer, which cannot be converted. Choose one of {_FAMILIES}."
        )
    if fetch is None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = CLIPModel(config)
    else:
        state_dict = convert_state_dict(load_weights(Path(fetch())), config)
        model = CLIPModel.from_pretrained(None, config=config, state_dict=state_dict, dtype=torch.float32)
    return model.eval(), tokenizer, normalization


def clip_config_from_open_clip(
    model_name_or_cfg: str | Mapping[str, Any], quick_gelu: bool | None = None
) -> CLIPConfig:
    """The transformers config of an open_clip model.

    Args:
        model_name_or_cfg (`str` or `dict`): A name of `open_clip.list_models()`, or a model config of open_clip with
            `embed_dim`, `vision_cfg` and `text_cfg`.
        quick_gelu (`bool`, *optional*): Whether the weights were trained with QuickGELU. Default: as the config says.

    Raises:
        ValueError: If the name is unknown, or the model has a part that `CLIPModel` lacks; the message names it.
    """
    if isinstance(model_name_or_cfg, str):
        cfg, name = _named_cfg(model_name_or_cfg), model_name_or_cfg
    else:
        cfg, name = dict(model_name_or_cfg), "of this config"
    _check_convertible(cfg, name)
    vision, text = open_clip.CLIPVisionCfg(**cfg["vision_cfg"]), open_clip.CLIPTextCfg(**cfg["text_cfg"])
    shared = {
        "projection_dim": cfg["embed_dim"],
        "hidden_act": "quick_gelu" if (cfg.get("quick_gelu", False) if quick_gelu is None else quick_gelu) else "gelu",
        "layer_norm_eps": 1e-5,
    }
    vision_config = {
        "hidden_size": vision.width,
        "intermediate_size": int(vision.width * vision.mlp_ratio),
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.width // vision.head_width,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
    }
    text_config = _text_fields(text)
    return CLIPConfig(
        vision_config={**shared, **vision_config},
        text_config={**shared, **text_config},
        projection_dim=cfg["embed_dim"],
        logit_scale_init_value=float(cfg.get("init_logit_scale", CLIPConfig.logit_scale_init_value)),
    )


def _text_fields(text: open_clip.CLIPTextCfg) -> dict[str, Any]:
    return {
        "hidden_size": text.width,
        "intermediate_size": int(text.width * text.mlp_ratio),
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "max_position_embeddings": text.context_length,
        "vocab_size": text.vocab_size,
        "bos_token_id": text.vocab_size - 2,
        "eos_token_id": text.vocab_size - 1,
        "pad_token_id": text.vocab_size - 1,  # CLIPTokenizer's
    }


def clip_text_config(cfg: Mapping[str, Any]) -> CLIPTextConfig:
    """The config of an open_clip model's text tower; the image tower may be of any kind.

    Raises:
        ValueError: the tower has a part that `CLIPTextModel` lacks.
    """
    _check_convertible({**cfg, "vision_cfg": {}}, "of this config")
    act = "quick_gelu" if cfg.get("quick_gelu") else "gelu"
    return CLIPTextConfig(
        **_text_fields(open_clip.CLIPTextCfg(**cfg["text_cfg"])), hidden_act=act, layer_norm_eps=1e-5
    )


def convert_text_weights(weights: Mapping[str, Tensor], config: CLIPTextConfig, dim: int) -> dict[str, Tensor]:
    """`text_model.*` and `text_projection.weight` of open_clip's weights.

    Raises:
        ValueError: a weight is missing; the message names it.
    """
    weights = {key.removeprefix("module.").removeprefix("text."): value for key, value in weights.items()}
    names = {key: targets for key, targets in _names(None, config).items() if not key.startswith(("visual.", "logit"))}
    if missing := [key for key in names if key not in weights]:
        raise ValueError(f"The weights lack {_listed(missing)}: choose the model that matches the weights.")
    converted: dict[str, Tensor] = {}
    for key, targets in names.items():
        if len(targets) == 3:
            converted |= {target: part.clone() for target, part in zip(targets, weights[key].chunk(3), strict=True)}
        else:
            converted[targets[0]] = weights[key].T.contiguous() if key in _TRANSPOSED else weights[key]
    return converted


def convert_state_dict(state_dict: Mapping[str, Tensor], config: CLIPConfig) -> dict[str, Tensor]:
    """Converts open_clip's weights to those of `CLIPModel(config)`; the results do not share memory.

    Args:
        state_dict (`dict[str, Tensor]`): Weights of an `open_clip.CLIP` or `open_clip.CustomTextCLIP`, also with the
            `module.` prefixes of distributed training.
        config (`CLIPConfig`): From [`clip_config_from_open_clip`].

    Raises:
        ValueError: If a weight is unknown, missing or of another shape; the message names it.
    """
    weights = {}
    for key, weight in state_dict.items():
        key = key.removeprefix("module.").removeprefix("text.")
        if key != "attn_mask":  # a constant
            weights[key] = weight
    names = _names(config.vision_config, config.text_config)
    if unknown := [key for key in weights if key not in names]:
        raise ValueError(
            f"`state_dict` has {_listed(unknown)}, which a CLIP with {config.vision_config.num_hidden_layers} image and "
            f"{config.text_config.num_hidden_layers} text layers lacks: choose the model that matches the weights."
        )
    if missing := [key for key in names if key not in weights]:
        raise ValueError(f"`state_dict` lacks {_listed(missing)}: choose the model that matches the weights.")

    with torch.device("meta"):
        expected = CLIPModel(config).state_dict()
    converted: dict[str, Tensor] = {}
    for key, targets in names.items():
        weight = weights[key].squeeze() if key == "logit_scale" else weights[key]  # some have a shape of (1,)
        shape = tuple(expected[targets[0]].shape)
        if len(targets) == 3:
            shape = (3 * shape[0], *shape[1:])
        elif key in _TRANSPOSED:
            shape = shape[::-1]
        if weight.shape != shape:
            raise ValueError(
                f"`state_dict` has {key!r} of shape {tuple(weight.shape)}, expected {shape}: choose the model and the "
                "image size that match the weights."
            )
        if len(targets) == 3:
            converted |= {target: part.clone() for target, part in zip(targets, weight.chunk(3), strict=True)}
        else:
            converted[targets[0]] = weight.T.contiguous() if key in _TRANSPOSED else weight
    return converted


def clip_tokenizer_from_open_clip(context_length: int = 77) -> CLIPTokenizer:
    """CLIP's tokenizer from open_clip's vocabulary file, without network access.

    Call it with `truncation=True`: texts of more than `context_length` tokens are then cut as in open_clip. The top of
    this file lists differences from open_clip's ids.

    Args:
        context_length (`int`, defaults to 77): Tokens of the longest text, start and end included.
    """
    source = open_clip.SimpleTokenizer()
    special = {source.sot_token_id: "<|startoftext|>", source.eot_token_id: "<|endoftext|>"}
    return CLIPTokenizer(
        vocab={special.get(index, token): index for token, index in source.encoder.items()},
        merges=list(source.bpe_ranks),
        model_max_length=context_length,
    )


# ------------------------------------------------------------------------------------------------ where weights are


class Source(NamedTuple):
    """open_clip's model config, the normalization, and a function that fetches the weights (`None`: random weights)."""

    cfg: dict[str, Any]
    normalization: dict[str, list[float]]
    fetch: Callable[[], str | Path] | None


def look_up(model_name: str, pretrained: str | None, cache_dir: str | None) -> Source:
    """Finds a model and its weights; downloads at most a config."""
    if model_name.startswith((HUB, FOLDER)):
        if pretrained is not None:
            raise ValueError(
                f"`pretrained` is {pretrained!r}, but the weights are in {model_name!r}: leave `pretrained` out, or "
                "pass the name of an open_clip model."
            )
        return _look_up_repository(model_name, cache_dir)
    cfg = _named_cfg(model_name)
    if pretrained is None:
        return Source(cfg, _normalization({}), None)

    if pretrained.startswith((HUB, FOLDER)):
        repository = _look_up_repository(pretrained, cache_dir)
        cfg["quick_gelu"] = repository.cfg.get("quick_gelu", False)
        if clip_config_from_open_clip(cfg).to_dict() != clip_config_from_open_clip(repository.cfg).to_dict():
            raise ValueError(
                f"`pretrained` {pretrained!r} is another model than `model_name` {model_name!r}: give {pretrained!r} "
                "as `model_name`, without `pretrained`."
            )
        return repository

    name = model_name.replace("/", "-")
    if tag := open_clip.get_pretrained_cfg(name, pretrained):
        cfg["quick_gelu"] = tag.get("quick_gelu", False)
        return Source(cfg, _normalization(tag), partial(_download, name, pretrained, tag, cache_dir))
    if Path(pretrained).is_file():
        if not cfg.get("quick_gelu") and f"{name}-quickgelu" in open_clip.list_models():
            logger.warning(
                f"{pretrained} is read as {name}, without QuickGELU. If its weights were trained with it, as OpenAI's "
                f"and many of DFN and MetaCLIP were, use the name {name}-quickgelu: the file does not say."
            )
        return Source(cfg, _normalization({}), partial(Path, pretrained))
    raise ValueError(
        f"`pretrained` is {pretrained!r}, which is neither a file nor one of the tags of {name!r}: "
        f"{', '.join(open_clip.list_pretrained_tags_by_model(name)) or 'it has none'}."
    )


def _look_up_repository(name: str, cache_dir: str | None) -> Source:
    """As [`look_up`], for a Hub repository or a folder with open_clip's config and weights."""
    if name.startswith(HUB):
        model_id = name.removeprefix(HUB)
        fetch = partial(download_pretrained_from_hf, model_id, cache_dir=cache_dir)
        path = Path(download_pretrained_from_hf(model_id, filename=HF_CONFIG_NAME, cache_dir=cache_dir))
    else:
        folder = Path(name.removeprefix(FOLDER))
        path, names = folder / HF_CONFIG_NAME, (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME)
        found = [folder / weights for weights in names if (folder / weights).is_file()]
        if not path.is_file() or not found:
            raise ValueError(f"{folder} must contain {HF_CONFIG_NAME} and one of {names}, as open_clip saves them.")
        fetch = partial(Path, found[0])
    content = json.loads(path.read_text(encoding="utf-8"))
    if "model_cfg" not in content:
        raise ValueError(f"{path} has no `model_cfg`: expected a config saved by open_clip.")
    return Source(content["model_cfg"], _normalization(content.get("preprocess_cfg", {})), fetch)


def _named_cfg(name: str) -> dict[str, Any]:
    cfg = open_clip.get_model_config(name.replace("/", "-"))
    if cfg is None:
        raise ValueError(f"`model_name` is {name!r}, which is not a model of open_clip{_suggest(name)}.")
    return cfg


def _suggest(name: str) -> str:
    close = difflib.get_close_matches(name.replace("/", "-"), open_clip.list_models())
    return f" (close: {', '.join(close)})" if close else ""


def _normalization(preprocess: Mapping[str, Any]) -> dict[str, list[float]]:
    return {
        "image_mean": list(preprocess.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        "image_std": list(preprocess.get("std", open_clip.OPENAI_DATASET_STD)),
    }


def _download(name: str, tag: str, pretrained_cfg: dict[str, Any], cache_dir: str | None) -> str:
    try:
        return open_clip.download_pretrained(pretrained_cfg, cache_dir=cache_dir)
    except OSError as error:
        raise OSError(
            f"The weights {tag!r} of {name} could not be downloaded. Without network access, download them elsewhere "
            f"({pretrained_cfg.get('hf_hub') or pretrained_cfg.get('url')}) and pass the file as `pretrained`."
        ) from error


def load_weights(path: Path) -> dict[str, Tensor]:
    """Reads only tensors and plain containers from a weights file, so that no code in it can run.

    open_clip's own loader is not used: on a `TypeError` it reads the file again without `weights_only`.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read as a file of tensors only; it is damaged, an archive with code (OpenAI's .pt: use "
            "the tag 'openai'), or contains other objects. Save its weights as safetensors."
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(content, dict) or not all(isinstance(weight, Tensor) for weight in content.values()):
        raise ValueError(f"{path} contains no named weights, neither at its top level nor under 'state_dict'.")
    return content


def transformers_kind(source: str, cache_dir: str | None, more: tuple[str, ...] = ()) -> str:
    """The type of the transformers model `source`, from its config alone.

    Raises:
        ValueError: it cannot be reached, or its type is neither convertible nor in `more`.
    """
    try:
        if not Path(source).exists() and source.count("/") != 1:  # not a Hub id: do not ask the network
            raise FileNotFoundError(source)
        content, _ = PreTrainedConfig.get_config_dict(source, cache_dir=cache_dir)  # AutoConfig could run its code
    except OSError as error:
        raise ValueError(
            f"`source` is {source!r}, which is neither an open_clip model name{_suggest(source)} nor the id or folder "
            "of a transformers CLIP that can be reached."
        ) from error
    kind = content.get("model_type")
    if kind not in (*_MODELS, *more):
        variable = kind == "siglip2" and " Its images have any number of patches (NaFlex), which is not supported."
        raise ValueError(
            f"`source` {source!r} is a transformers model of type {kind!r}; expected a complete CLIP, of type "
            f"{', '.join(map(repr, _MODELS))}, such as 'openai/clip-vit-base-patch16' or "
            f"'google/siglip2-base-patch16-224'.{variable or ''}"
        )
    return str(kind)


def _load_from_transformers(
    source: str, cache_dir: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, list[float]]]:
    kind = transformers_kind(source, cache_dir)
    model, loading = _MODELS[kind].from_pretrained(
        source, cache_dir=cache_dir, dtype=torch.float32, output_loading_info=True
    )
    if loading["missing_keys"]:
        raise ValueError(f"The weights in {source!r} lack {_listed(sorted(loading['missing_keys']))}.")
    tokenizer = _tokenizer_from_transformers(source, kind, model.config.text_config, cache_dir)

    normalization = _normalization({} if kind != "siglip" else {"mean": [0.5] * 3, "std": [0.5] * 3})
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(source, cache_dir=cache_dir)
    except OSError:
        logger.warning(
            f"{source} has no image processor: images are normalized with the mean {normalization['image_mean']} and the "
            f"deviation {normalization['image_std']}, which are usual for a {kind}."
        )
    else:
        normalization = {key: list(processor.get(key) or value) for key, value in normalization.items()}
    return model.eval(), tokenizer, normalization


def _tokenizer_from_transformers(
    source: str, kind: str, text: PreTrainedConfig, cache_dir: str | None
) -> PreTrainedTokenizerBase:
    """The tokenizer in `source`, for the text tower of a model of type `kind`.

    Raises:
        ValueError: there is none, or it does not fit the tower.
    """
    try:
        tokenizer = (CLIPTokenizer if kind == "clip" else AutoTokenizer).from_pretrained(source, cache_dir=cache_dir)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"The tokenizer in {source!r} cannot be loaded: {error}") from error
    tokenizer.model_max_length = min(tokenizer.model_max_length, text.max_position_embeddings)
    if kind == "siglip":
        return siglip_tokenizer(tokenizer)
    # 2: for a `clip`, an old mistake in many configs
    end = text.vocab_size - 1 if kind == "clip" and text.eos_token_id == 2 else text.eos_token_id
    if tokenizer.eos_token_id != end:  # CLIPTokenizer loads without its files, too, and then knows two tokens
        raise ValueError(
            f"The tokenizer in {source!r} ends texts with the token {tokenizer.eos_token_id}, but its text tower expects "
            f"{end}: the tokenizer's files are missing or belong to another model."
        )
    return tokenizer


# ----------------------------------------------------------------------------------------------------- small helpers


def _names(vision: PreTrainedConfig | None, text: PreTrainedConfig) -> dict[str, tuple[str, ...]]:
    """Maps each of open_clip's weights to transformers' name, or to the names of query, key and value."""
    names: dict[str, tuple[str, ...]] = {old: (new,) for old, new in _NAMES.items()}
    towers = {
        ("visual.transformer", "vision_model"): vision,
        ("transformer", "text_model"): text,
    }
    for (old_tower, new_tower), tower in towers.items():
        if tower is None:
            continue
        for layer in range(tower.num_hidden_layers):
            for old, new in _LAYER_NAMES.items():
                for kind in ("weight", "bias"):
                    targets = tuple(f"{new_tower}.encoder.layers.{layer}.{part}{kind}" for part in new)
                    names[f"{old_tower}.resblocks.{layer}.{old}{kind}"] = targets
    return names


def _check_convertible(cfg: Mapping[str, Any], name: str) -> None:
    """Raises an error if a config is incomplete or has a part that `CLIPModel` lacks."""
    if missing := {"embed_dim", "vision_cfg", "text_cfg"} - cfg.keys():
        raise ValueError(f"The open_clip model {name} lacks {sorted(missing)}: pass a complete open_clip config.")
    if unsupported := _unsupported_parts(cfg):
        raise ValueError(
            f"The open_clip model {name} has {'; '.join(unsupported)}, which transformers' CLIP lacks, so it cannot "
            f"be converted: choose one of {_FAMILIES}."
        )


def _unsupported_parts(cfg: Mapping[str, Any]) -> list[str]:
    """Describes the entries of a config that are neither converted nor open_clip's default; only known ones, if any."""
    vision = cfg["vision_cfg"]
    if isinstance(vision.get("layers"), (list, tuple)):
        return [f"a ResNet image tower (vision_cfg.layers = {vision['layers']})"]
    known, special = [], []
    for section, converted in _CONVERTED.items():
        defaults = {field.name: field.default for field in fields(_SECTIONS[section])} if section else {}
        for key, value in (cfg[section] if section else cfg).items():
            if key not in converted and value != defaults.get(key):
                entry = f"({section}.{key} = {value!r})" if section else f"({key})"
                if key in _PARTS:
                    known.append(f"{_PARTS[key]} {entry}")
                else:
                    special.append(f"a special setting {entry}")
    for key in ("image_size", "patch_size"):
        if not isinstance(vision.get(key, 0), int):
            known.append(f"a non-square size (vision_cfg.{key} = {vision[key]!r})")
    return known or special


def _listed(names: list[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more
