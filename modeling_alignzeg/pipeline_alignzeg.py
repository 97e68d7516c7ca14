# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Pipeline from images and class names to masks of classes, panoptic segments or instances."""

import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import Pipeline
from transformers.image_utils import ImageInput

from .images_alignzeg import open_any, to_rgb
from .post_processing_alignzeg import check_share
from .processing_alignzeg import check_classes, check_unseen_names, read_classes
from .readout_alignzeg import image_view, segment_score


SUBTASKS = ("semantic", "panoptic", "instance")
SEGMENT_OPTIONS = ("score_threshold", "mask_threshold", "overlap_mask_area_threshold")


class ZeroShotImageSegmentationPipeline(Pipeline):
    r"""
    Semantic, panoptic or instance segmentation with class names given in each call.

    ```python
    segmenter = pipeline("zero-shot-image-segmentation", model="path/to/alignzeg", trust_remote_code=True)
    segmenter("photo.jpg", candidate_labels=["cat", "sofa", "window"], unseen_labels=["sofa"])
    ```

    Without `candidate_labels` the vocabulary of the checkpoint is used.
    """

    _load_processor = True
    _load_image_processor = _load_tokenizer = _load_feature_extractor = _load_video_processor = False

    def __call__(
        self, images: ImageInput | str | list, **kwargs: Any
    ) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        r"""
        Segments one image, or each of several.

        Args:
            images: PIL images, paths or URLs; mode and size may differ within a batch.
            candidate_labels (`list[str]`, *optional*): Distinct class names, or a dictionary with several phrases for a
                class, see [`AlignZegModel.get_text_prototypes`]; or one string, see [`read_classes`].
            unseen_labels (`list[str]`, *optional*): The class names that count as unseen. Default: the checkpoint's for
                its own vocabulary, none for other names.
            template_set (`str` or `list[str]`, *optional*): Prompt templates; default: the checkpoint's.
            phrase_pooling (`str`, defaults to `"max"`): How to combine several phrases of a class: `"max"` or `"mean"`.
            subtask (`str`, defaults to `"semantic"`): `"semantic"`, `"panoptic"` or `"instance"`.
            gamma, threshold (`float`, *optional*): Predictive bias correction; default: the checkpoint's.
            score_threshold, mask_threshold, overlap_mask_area_threshold (`float`, *optional*): For panoptic segments and
                instances: `threshold` and the others of [`AlignZegImageProcessor.post_process_panoptic_segmentation`].
            labels_to_fuse (`list[str]`, *optional*): Class names whose panoptic segments are fused into one per image.
            none_of_these (`bool`, defaults to `False`): Exclude pixels that resemble no class from all masks.
            batch_size, num_workers, timeout: See [`Pipeline`]; `timeout` is for images from the web.

        Returns:
            For each image, a list with one entry per class that occurs, in the order of the class names, or one per
            segment or instance:

            - **label** (`str`) -- The class name, as [`check_class_names`] reads it.
            - **mask** (`PIL.Image.Image`) -- Mode L, of the image's own size, 255 on the class and 0 elsewhere. Masks of
              instances may overlap.
            - **score** (`float`) -- 0 to 1: the probability of the class, averaged over the proposals that cover its mask;
              of a segment or instance, the score of the post-processing.

        Raises:
            ValueError: `candidate_labels` or `unseen_labels` are invalid, or an image is missing or cannot be read.
        """
        if isinstance(images, (list, tuple)) and not images:
            raise ValueError("`images` is empty; expected at least one image.")
        return super().__call__(images, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Writes the model, the processor and their code to a folder that loads as this pipeline."""
        self.processor.save_pretrained(save_directory)
        self.model.save_pretrained(save_directory, **kwargs)

    def _sanitize_parameters(
        self,
        candidate_labels: list[str] | dict[str, list[str]] | str | None = None,
        unseen_labels: list[str] | str | None = None,
        template_set: str | list[str] | None = None,
        phrase_pooling: str | None = None,
        gamma: float | None = None,
        threshold: float | None = None,
        none_of_these: bool | None = None,
        timeout: float | None = None,
        subtask: str | None = None,
        labels_to_fuse: list[str] | str | None = None,
        **segments: float | None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        def split(names):
            return names.split(",") if isinstance(names, str) else names

        def given(**values):
            return {name: value for name, value in values.items() if value is not None}

        if not isinstance(none_of_these, (bool, type(None))):
            raise ValueError(f"`none_of_these` is {none_of_these!r}; expected True or False.")
        if subtask not in (None, *SUBTASKS):
            raise ValueError(f"`subtask` is {subtask!r}; expected one of {', '.join(SUBTASKS)}.")
        unknown = set(segments) - set(SEGMENT_OPTIONS)
        if unknown:
            raise TypeError(f"`{min(unknown)}` is not an argument of this pipeline; see its documentation.")
        for name, value in segments.items():
            check_share(name, value)
        labels, unseen, classes = {}, {}, {}
        if candidate_labels is not None:
            read = read_classes if isinstance(candidate_labels, str) else check_classes
            classes["classes"] = read(candidate_labels)
            labels["candidate_labels"] = list(classes["classes"])
        if unseen_labels is not None:
            unseen["unseen_labels"] = check_unseen_names(split(unseen_labels))
        readout = given(gamma=gamma, threshold=threshold, none_of_these=none_of_these, subtask=subtask, **segments)
        if labels_to_fuse is not None:
            readout["labels_to_fuse"] = check_unseen_names(split(labels_to_fuse))
        text = given(template_set=template_set, phrase_pooling=phrase_pooling)
        return given(timeout=timeout), {**classes, **unseen, **text}, {**labels, **readout}

    def preprocess(self, image: Image.Image | str | os.PathLike, timeout: float | None = None) -> dict[str, Any]:
        if not isinstance(image, (str, os.PathLike, Image.Image)):
            raise ValueError(f"The image is a {type(image).__name__}; expected a PIL image, a path or a URL.")
        try:
            image = to_rgb(image if isinstance(image, Image.Image) else open_any(os.fspath(image), timeout))
        except ValueError as error:
            raise ValueError(f"The image cannot be used: {error}.") from error
        # Not as bare tensors: the pipeline's own batching requires images of one size.
        features = self.processor.image_processor(images=image, return_tensors="pt")
        return {"features": features, "target_size": (image.height, image.width)}

    def _forward(
        self,
        model_inputs: dict[str, Any],
        classes: dict[str, list[str]] | None = None,
        unseen_labels: list[str] | None = None,
        template_set: str | list[str] | None = None,
        phrase_pooling: str = "max",
    ) -> Any:
        features, sizes = model_inputs["features"], model_inputs["target_size"]
        if not isinstance(features, list):  # one image, outside of a batch
            features, sizes = [features], [sizes]
        height, width = (max(part["pixel_mask"].shape[axis] for part in features) for axis in (1, 2))

        def stack(key):
            return torch.cat(
                [F.pad(v, (0, width - v.shape[-1], 0, height - v.shape[-2])) for v in (part[key] for part in features)]
            )

        config = self.model.config
        names = list(classes or (config.id2label[index] for index in range(config.num_labels)))
        vocabulary = {}
        if classes is None and template_set is not None and config.prototypes_per_class > 1:
            raise ValueError("`template_set` needs `candidate_labels`: the stored classes have several phrases each.")
        if classes is not None or template_set is not None:
            vocabulary["text_prototypes"] = self.model.get_text_prototypes(
                self.processor, classes or names, template_set, phrase_pooling=phrase_pooling
            )
        if unseen_labels is None:
            unseen_labels = config.unseen_labels if classes is None else []
        unknown = [name for name in unseen_labels if name not in names]
        if unknown:
            raise ValueError(
                f"`unseen_labels` contains {unknown[0]!r}, which is not among the {len(names)} class names."
            )
        vocabulary["seen_class_mask"] = torch.tensor([name not in unseen_labels for name in names], device=self.device)
        outputs = self.model(
            pixel_values=stack("pixel_values").to(self.dtype), pixel_mask=stack("pixel_mask"), **vocabulary
        )
        outputs["target_size"] = torch.tensor(sizes)
        return outputs

    def postprocess(
        self,
        model_outputs: Any,
        candidate_labels: list[str] | None = None,
        gamma: float | None = None,
        threshold: float | None = None,
        none_of_these: bool = False,
        subtask: str = "semantic",
        labels_to_fuse: list[str] = (),
        score_threshold: float = 0.5,
        **options: float | None,
    ) -> list[dict[str, Any]]:
        size = model_outputs["target_size"][0].tolist()
        config = self.model.config
        names = (
            [config.id2label[i] for i in range(config.num_labels)] if candidate_labels is None else candidate_labels
        )
        unknown = [name for name in labels_to_fuse if name not in names]
        if unknown:
            raise ValueError(
                f"`labels_to_fuse` contains {unknown[0]!r}, which is not among the {len(names)} class names."
            )
        processor = self.processor.image_processor
        if subtask == "semantic":
            segments = self._classes(model_outputs, size, gamma, threshold, none_of_these)
        else:
            options |= {"threshold": score_threshold, "gamma": gamma, "correction_threshold": threshold}
            if subtask == "panoptic":
                ids = {names.index(name) for name in labels_to_fuse}
                found = processor.post_process_panoptic_segmentation(
                    model_outputs, target_sizes=[size], label_ids_to_fuse=ids, **options
                )[0]
                masks = (found["segmentation"] == segment["id"] for segment in found["segments_info"])
            else:
                found = processor.post_process_instance_segmentation(
                    model_outputs, target_sizes=[size], return_binary_maps=True, **options
                )[0]
                masks = iter(found["segmentation"])
            segments = (
                (segment["label_id"], segment["score"], mask) for segment, mask in zip(found["segments_info"], masks)
            )
        return [
            {"label": names[label], "score": score, "mask": Image.fromarray(mask.byte().mul(255).numpy())}
            for label, score, mask in segments
        ]

    def _classes(
        self,
        model_outputs: Any,
        size: tuple[int, int],
        gamma: float | None,
        threshold: float | None,
        none_of_these: bool,
    ) -> Iterator[tuple[int, float, torch.Tensor]]:
        """Id, score and mask of every class in the label map."""
        correction = {"gamma": gamma, "threshold": threshold}
        processor = self.processor.image_processor
        labels = processor.post_process_semantic_segmentation(
            model_outputs, target_sizes=[size], none_of_these=none_of_these, **correction
        )[0]
        view = image_view(model_outputs, 0, processor.proposal_probabilities(model_outputs, **correction)[0], size)
        for index in labels.unique().tolist():
            if index >= 0:  # -1: none of these
                region = labels == index
                yield index, segment_score(view, region, index), region


__all__ = ["ZeroShotImageSegmentationPipeline"]
