# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The model card of a trained checkpoint: README.md in its folder, in the Hub's format."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..data.splits import SegmentationSplit
from ..hub import PLACEHOLDER
from ..settings import ModelSettings, Settings


PAPER = "2404.05667"
SCORES = {"miou_seen": "mIoU(S)", "miou_unseen": "mIoU(U)", "hiou": "hIoU", "pixel_accuracy": "pixel accuracy"}
OWN_DATA, OWN_CLIP = "embedded_scenes", "scripts/assets/small_clip"  # made by this repository's code
LICENCE = (
    "The code is Apache-2.0. **The licence of these weights has not been chosen yet**: it depends on the licences of "
    "the pretrained weights and the data. Set `license` at the top of this file and replace this sentence."
)

BODY = """
# AlignZeg, trained on {dataset}

Zero-shot semantic segmentation on a frozen CLIP: pass any class names and get a label map. Trained with AlignZeg for
Transformers, an unofficial implementation of *AlignZeg: Mitigating Objective Misalignment for Zero-shot Semantic
Segmentation* (Ge et al., ECCV 2024, [arXiv {paper}](https://arxiv.org/abs/{paper})).

## Use

```python
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

checkpoint = "."
model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
image = Image.open("photo.jpg")
names = {example}
prototypes = model.get_text_prototypes(processor, names)
with torch.no_grad():
    outputs = model(**processor(images=image, return_tensors="pt"), text_prototypes=prototypes)
label = processor.post_process_semantic_segmentation(outputs, target_sizes=[(image.height, image.width)])[0]
```

## Results

{results}

## Data and classes

Trained on the part `{train_part}` of {dataset}, {images} images, {supervision}

<details><summary>{seen_count} seen classes</summary>

{seen}

</details>

<details><summary>{unseen_count} unseen classes</summary>

{unseen}

</details>

## Settings

Step {step} of {steps}. Image and text towers: {towers}.

<details><summary>All settings</summary>

```json
{settings}
```

</details>

## Licence

{licence}
"""


def base_model(settings: ModelSettings) -> str | None:
    """The Hub id of the model that a training starts from; `None` for a local folder or random weights."""
    source = settings.checkpoint or settings.clip
    if source is None or settings.random_weights or Path(source).exists():
        return None
    if settings.checkpoint is None and settings.pretrained is not None:
        import open_clip

        source = (open_clip.get_pretrained_cfg(source, settings.pretrained) or {}).get("hf_hub", "").rstrip("/")
    with suppress(HFValidationError):
        validate_repo_id(source)
        return source if "/" in source else None
    return None


def public_name(source: str) -> str:
    """A Hub id, benchmark name or model name unchanged; the last part of a local path."""
    return Path(source).resolve().name if os.path.isabs(source) or os.path.exists(source) else source


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _public(part) for name, part in value.items() if name not in ("output_dir", "root")}
    return public_name(value) if isinstance(value, str) and value else value


def _names(names: tuple[str, ...]) -> str:
    return ", ".join("`{}`".format(name.replace("`", "'")) for name in names) or "none"


def _results(scores: dict[str, float], part: str) -> str:
    if not scores:
        return "This checkpoint was not evaluated during training; run `scripts/evaluate.py` to evaluate it."
    table = ["| |" + "|".join(SCORES[name] for name in scores) + "|", "|---|" + "---|" * len(scores)]
    table.append(f"|part `{part}`|" + "|".join(f"{value:.1f}" for value in scores.values()) + "|")
    note = "In percent, without predictive bias correction (PBC), measured by the evaluation during training."
    return "\n".join([*table, "", note])


def _metadata(settings: Settings, scores: dict[str, float], is_own: bool) -> ModelCardData:
    data = settings.data
    name = public_name(data.dataset)
    license_fields: dict[str, Any] = {"license": "apache-2.0"}
    if not is_own:
        license_fields = {"license": "other", "license_name": PLACEHOLDER}
    results = [
        EvalResult(
            task_type="image-segmentation",
            task_name="zero-shot semantic segmentation",
            dataset_type=name,
            dataset_name=name,
            dataset_split=data.validation_part,
            metric_type=key,
            metric_name=SCORES[key],
            metric_value=round(value, 2),
        )
        for key, value in scores.items()
    ]
    return ModelCardData(
        language="en",
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=["alignzeg", "zero-shot-segmentation", "semantic-segmentation", "clip", f"arxiv:{PAPER}"],
        datasets=None if Path(data.dataset).exists() else [name],
        metrics=["mean_iou"],
        base_model=base_model(settings.model),
        model_name=f"alignzeg-{name.rpartition('/')[2]}",
        eval_results=results or None,
        **license_fields,
    )


def trained_card(
    settings: Settings, split: SegmentationSplit, images: int, step: int, scores: dict[str, float]
) -> ModelCard:
    """The card of a checkpoint. For local folders it shows only their names.

    The licence of trained weights depends on the pretrained weights and the data. It is Apache-2.0 if both come from this
    repository, otherwise a placeholder, which `scripts/push_to_hub.py` rejects.

    Args:
        settings: Settings of the training.
        split: Classes of the training.
        images: Number of images in the training part.
        step: Step of the checkpoint.
        scores: Scores of this step on the validation part, in percent, by the names in [`SCORES`]; may be empty.
    """
    data, model = settings.data, settings.model
    scores = {key: scores[key] for key in SCORES if key in scores and math.isfinite(scores[key])}
    is_own = data.dataset == OWN_DATA and (model.checkpoint, model.clip) == (None, OWN_CLIP)
    supervision = "with the labels of the seen classes only."
    if data.fully_supervised:
        supervision = "with the labels of **all** classes: an upper reference, not a zero-shot model."
    elif data.transductive:
        supervision = (
            "with the labels of the seen classes and pseudo-labels of the unseen ones: the **transductive** setting."
        )
    elif data.pseudo_unseen:
        supervision = "with some seen classes treated as unseen, to choose hyper-parameters: not the real task."
    sources = [model.checkpoint] if model.checkpoint is not None else [model.clip, model.pretrained]
    towers = " ".join(public_name(source) for source in sources if source is not None)
    body = BODY.format(
        dataset=public_name(data.dataset),
        paper=PAPER,
        example=json.dumps([*split.seen[:2], *split.unseen[:1]], ensure_ascii=False),
        results=_results(scores, data.validation_part),
        train_part=data.train_part,
        images=images,
        supervision=supervision,
        seen_count=len(split.seen),
        seen=_names(split.seen),
        unseen_count=len(split.unseen),
        unseen=_names(split.unseen),
        step=step,
        steps=settings.training.steps,
        towers=f"`{towers}`" + (" with random weights" if model.random_weights else ""),
        settings=json.dumps(_public(settings.as_dict()), indent=2, ensure_ascii=False),
        licence="Apache-2.0." if is_own else LICENCE,
    )
    return ModelCard(f"---\n{_metadata(settings, scores, is_own).to_yaml()}\n---\n{body}")
