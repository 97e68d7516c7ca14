# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Fresh AlignZeg checkpoints on any CLIP, and writing checkpoints that `from_pretrained` loads."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPModel, PreTrainedTokenizerBase

from modeling_alignzeg import AlignZegConfig, AlignZegImageProcessor, AlignZegModel, AlignZegProcessor

from .checkpointing import atomic_file, atomic_folder


CODE_FOLDER = "modeling_alignzeg"
AUTO_CLASSES = {
    "AutoConfig": "configuration_alignzeg.AlignZegConfig",
    "AutoModel": "modeling_alignzeg.AlignZegModel",
    "AutoModelForSemanticSegmentation": "modeling_alignzeg.AlignZegModel",
    "AutoImageProcessor": "image_processing_alignzeg.AlignZegImageProcessor",
    "AutoProcessor": "processing_alignzeg.AlignZegProcessor",
}


def assemble(
    clip: CLIPModel,
    tokenizer: PreTrainedTokenizerBase,
    normalization: dict[str, Any],
    *,
    seed: int = 0,
    config: dict[str, Any] | None = None,
    image_processor: dict[str, Any] | None = None,
) -> tuple[AlignZegModel, AlignZegProcessor]:
    """A fresh AlignZeg on a CLIP: its towers are copied, the trainable parts initialised from `seed`.

    Args:
        clip: The CLIP, in the transformers layout.
        tokenizer: Its tokenizer.
        normalization: `image_mean` and `image_std`.
        seed: Of the trainable parts.
        config: Overrides of [`AlignZegConfig`].
        image_processor: Overrides of [`AlignZegImageProcessor`].

    Raises:
        ValueError: `config` names no field of `AlignZegConfig`, or its values contradict the CLIP.
    """
    overrides = dict(config or {})
    known = vars(AlignZegConfig())
    unknown = [name for name in overrides if name not in known]
    if unknown:
        raise ValueError(f"`model.config` names {unknown[0]!r}, which is no field of AlignZegConfig.")
    full = AlignZegConfig(
        vision_config=clip.config.vision_config.to_dict(),
        text_config=clip.config.text_config.to_dict(),
        projection_dim=clip.config.projection_dim,
        logit_scale_init_value=float(clip.logit_scale.detach()),
        **overrides,
    )
    torch.manual_seed(seed)
    model = AlignZegModel(full)
    with torch.no_grad():
        for part in ("vision_model", "text_model", "visual_projection", "text_projection"):
            getattr(model, part).load_state_dict(getattr(clip, part).state_dict())
        model.logit_scale.copy_(clip.logit_scale)
    options = {"size_divisor": full.size_divisor, **normalization, **(image_processor or {})}
    processor = AlignZegProcessor(
        image_processor=AlignZegImageProcessor(**options), tokenizer=tokenizer, template_set=full.template_set
    )
    return model.eval(), processor


def save_checkpoint(model: AlignZegModel, processor: AlignZegProcessor, folder: str | Path) -> Path:
    """Writes model, processor, tokenizer and the code that loads them; an existing folder is replaced as a whole."""
    folder = Path(folder)
    with atomic_folder(folder) as partial:
        processor.save_pretrained(partial)
        model.save_pretrained(partial)
        _write_auto_map(partial, "")
    return folder


def install_as_root(checkpoint: str | Path, root: str | Path) -> None:
    """Makes `checkpoint` the one that loads from the repository's root, with the code in its folder `modeling_alignzeg`.

    Every file is written beside its place and renamed; weights come last, so that an interrupted call can be repeated.
    """
    checkpoint, root = Path(checkpoint), Path(root)
    if not (root / CODE_FOLDER / "modeling_alignzeg.py").is_file():
        raise ValueError(f"`root` is {str(root)!r}, which has no folder {CODE_FOLDER} with the model's code.")
    names = sorted(p.name for p in checkpoint.iterdir() if p.suffix in (".json", ".safetensors"))
    if "config.json" not in names or "model.safetensors" not in names:
        raise ValueError(f"`checkpoint` is {str(checkpoint)!r}, which has no config.json and model.safetensors.")
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary)
        for name in names:
            shutil.copyfile(checkpoint / name, staged / name)
        _write_auto_map(staged, CODE_FOLDER)
        for name in sorted(names, key="model.safetensors".__eq__):
            with atomic_file(root / name) as partial:
                shutil.copyfile(staged / name, partial)


def _write_auto_map(folder: Path, code_folder: str) -> None:
    """Points every Auto class at the code: beside the files, or in `code_folder` of a repository's root."""
    prefix = f"{code_folder}/" if code_folder else ""
    for name in ("config.json", "processor_config.json"):
        path = folder / name
        values = json.loads(path.read_text(encoding="utf-8"))
        values["auto_map"] = {auto: prefix + target for auto, target in AUTO_CLASSES.items()}
        if "image_processor" in values:
            values["image_processor"]["auto_map"] = {"AutoImageProcessor": prefix + AUTO_CLASSES["AutoImageProcessor"]}
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
