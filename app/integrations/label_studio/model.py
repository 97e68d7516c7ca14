#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""A Label Studio ML backend: pre-annotates images with the labels of a project's `<BrushLabels>`.

    python app/integrations/label_studio/model.py                # http://127.0.0.1:9090
    ALIGNZEG_MODEL=ID_OR_FOLDER python app/integrations/label_studio/model.py

This file needs nothing else of this repository, so `label-studio-ml create` can copy it. See docs/integrations.md.
"""

from __future__ import annotations

import argparse
import logging
import os
import threading
import uuid
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from label_studio_ml.model import LabelStudioMLBase
from label_studio_sdk.converter import brush
from PIL import Image
from transformers import pipeline


logger = logging.getLogger(__name__)
OPTIONS = ("none_of_these", "gamma", "threshold")  # arguments of the pipeline that a project may set
loading = threading.Lock()


class BrushTag(NamedTuple):
    """The tag to fill.

    Attributes:
        name: Name of the `<BrushLabels>`.
        image: Name of its `<Image>`.
        field: Key of the image's URL in the data of a task.
        phrases: For each label, what the model looks for: its `predicted_values`, separated by commas, or its `value`.
    """

    name: str
    image: str
    field: str
    phrases: dict[str, list[str]]


def read_brush_tag(config: dict[str, Any]) -> BrushTag:
    """The first `<BrushLabels>` of an `<Image>` in a parsed label config.

    Args:
        config: As `LabelStudioMLBase.parsed_label_config`.

    Raises:
        ValueError: There is none, or it has no labels.
    """
    for name, control in config.items():
        inputs = control["inputs"][:1]
        if control["type"] != "BrushLabels" or not inputs or inputs[0]["type"] != "Image" or "value" not in inputs[0]:
            continue
        phrases = {}
        for label in control["labels"]:
            attributes = control["labels_attrs"][label]
            given = [text.strip() for text in attributes.get("predicted_values", "").split(",")]
            phrases[label] = [text for text in given if text] or [attributes.get("value") or label]
        if not phrases:
            raise ValueError(
                f'The label config has no labels in <BrushLabels name="{name}">; expected at least one '
                '<Label value="…"/>. Labels from the data of a task are not supported.'
            )
        return BrushTag(name, control["to_name"][0], inputs[0]["value"], phrases)
    present = ", ".join(f"<{control['type']}>" for control in config.values()) or "no control tag"
    raise ValueError(
        f'The label config has {present}; expected <BrushLabels name="…" toName="…"> with the name of an <Image> that has '
        "a `value`. Other kinds of labels are not supported."
    )


def to_results(segments: list[dict[str, Any]], tag: BrushTag) -> list[dict[str, Any]]:
    """Segments of the pipeline, one per class, in Label Studio's format: one brush region per label."""
    labels = {" ".join(label.split()): label for label in tag.phrases}  # the pipeline removes superfluous spaces
    return [
        {
            "id": uuid.uuid4().hex[:10],
            "from_name": tag.name,
            "to_name": tag.image,
            "type": "brushlabels",
            "original_width": segment["mask"].width,
            "original_height": segment["mask"].height,
            "image_rotation": 0,
            "value": {
                "format": "rle",
                "rle": brush.mask2rle(np.asarray(segment["mask"])),
                "brushlabels": [labels[segment["label"]]],
            },
            "score": segment["score"],
        }
        for segment in segments
    ]


def checkpoint() -> str:
    """ALIGNZEG_MODEL, or the checkpoint for photographs of the clone around this file."""
    folder = Path(__file__).resolve().parents[3] / "checkpoints" / "photos"
    source = os.environ.get("ALIGNZEG_MODEL") or (str(folder) if (folder / "config.json").is_file() else None)
    if source is None:
        raise ValueError("ALIGNZEG_MODEL is not set; expected a checkpoint: a folder or a Hub id.")
    return source


@cache
def load_segmenter(source: str) -> Any:
    return pipeline("zero-shot-image-segmentation", model=source, trust_remote_code=True)


def get_segmenter() -> Any:
    """The pipeline, loaded once: Label Studio's server makes an [`AlignZegBackend`] for every request."""
    with loading:
        return load_segmenter(checkpoint())


class AlignZegBackend(LabelStudioMLBase):
    """Predicts a brush region for every label that occurs in an image."""

    def setup(self) -> None:
        """Checks the label config, so that Label Studio shows what is missing when the backend is connected.

        Raises:
            ValueError: As [`read_brush_tag`].
        """
        self.set("model_version", self.version)
        if self.label_config:
            read_brush_tag(self.parsed_label_config)

    @property
    def version(self) -> str:
        return f"alignzeg-{Path(checkpoint()).name.removeprefix('alignzeg-')}"

    def predict(
        self, tasks: list[dict[str, Any]], context: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """Segments the images of tasks.

        Args:
            tasks: Label Studio's tasks.
            context, kwargs: Not used; predictions do not depend on what was drawn.

        Returns:
            For each task, a prediction: its regions with scores from 0 to 1, and their mean score. If an image cannot be
            read, the prediction has no regions and the reason is logged.

        Raises:
            ValueError: The label config or the extra parameters are invalid.
        """
        tag = read_brush_tag(self.parsed_label_config if self.label_config else {})
        options = self._options()
        return [self._predict_task(task, tag, options) for task in tasks]

    def _predict_task(self, task: dict[str, Any], tag: BrushTag, options: dict[str, Any]) -> dict[str, Any]:
        try:
            image = self._open_image(task, tag.field)
        except Exception as error:  # network, files and PIL's decoders: their errors have no common base
            logger.warning("Task %s gets no regions, its image cannot be read: %s", task.get("id"), error)
            results = []
        else:
            results = to_results(get_segmenter()(image, candidate_labels=tag.phrases, **options), tag)
        score = sum(result["score"] for result in results) / max(len(results), 1)
        return {"result": results, "score": score, "model_version": self.version}

    def _open_image(self, task: dict[str, Any], field: str) -> Image.Image:
        url = task.get("data", {}).get(field)
        if not isinstance(url, str):
            raise ValueError(f"`{field}` in its data is {url!r}; expected the URL of an image.")
        # label-studio-ml 1, which has this attribute, does not read from cloud storage.
        options = {} if hasattr(self, "hostname") else {"task_id": task.get("id")}
        image = Image.open(self.get_local_path(url, **options))
        image.load()
        return image

    def _options(self) -> dict[str, Any]:
        """The extra parameters of the project's connection, JSON such as `{"none_of_these": true}`."""
        options = getattr(self, "extra_params", None) or {}
        if not isinstance(options, dict) or set(options) - set(OPTIONS):
            raise ValueError(
                f"The extra parameters are {options!r}; expected a JSON object with {', '.join(OPTIONS)}."
            )
        return options


def main() -> None:
    from label_studio_ml.api import init_app

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine only")
    options.add_argument("--port", type=int, default=9090)
    args = options.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    get_segmenter()  # a checkpoint that cannot be loaded is reported now
    init_app(AlignZegBackend).run(host=args.host, port=args.port)


if __name__ == "__main__":
    main()
