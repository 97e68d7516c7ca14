# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The vocabulary: prototypes of class names and of exemplars, and the stored vocabulary of a checkpoint."""

import contextlib
import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks_alignzeg import check_tensor
from .processing_alignzeg import check_classes, check_unseen_names, get_templates
from .recognizer_alignzeg import ProposalRecognizer
from .text_encoder_alignzeg import AlignZegTextEncoder


class Vocabulary(NamedTuple):
    """Classes of one call: unit `prototypes (C, D)` or `(C, K, D)`, the mask `seen (C,)` and the logit scale `τ`."""

    prototypes: Tensor
    seen: Tensor
    scale: Tensor


class AlignZegVocabulary:
    """Mixin of [`AlignZegModel`] that manages its vocabulary."""

    config: Any
    recognizer: ProposalRecognizer
    text_encoder: AlignZegTextEncoder
    logit_scale: nn.Parameter
    class_text_embeds: Tensor
    seen_class_mask: Tensor

    def _placeholder_prototypes(self) -> Tensor:
        """`(C, D)` or `(C, K, D)`, used until [`set_vocabulary`] is called: one axis of the joint space per class, and zeros
        for further classes."""
        axes, count = torch.eye(self.config.num_labels, self.config.projection_dim), self.config.prototypes_per_class
        return axes if count == 1 else axes[:, None].repeat(1, count, 1)

    def _seen_classes_of_config(self) -> Tensor:
        names = [self.config.id2label[i] for i in range(self.config.num_labels)]
        return torch.tensor([name not in self.config.unseen_labels for name in names])

    def get_text_prototypes(
        self,
        processor,
        class_names: list[str] | dict[str, list[str]],
        template_set: str | list[str] | None = None,
        batch_size: int = 256,
        phrase_pooling: str = "max",
        cache_dir: str | os.PathLike | None = None,
    ) -> Tensor:
        """Text prototypes of class names, in the caller's order.

        Args:
            processor: The [`AlignZegProcessor`] of the checkpoint.
            class_names: Distinct, non-empty names; or a dictionary with several phrases for a class, such as `{"background":
                ["road", "wall"], "sofa": ["sofa", "couch"]}`. The name itself is used only if it is among the phrases.
            template_set: Name of a set in `TEMPLATE_SETS` or a list of sentences with one `{}` each; default
                `config.template_set`.
            batch_size: Prompts per forward pass of the text tower.
            phrase_pooling: `"max"`: the best phrase of a class gives its logit; `"mean"`: its prototype is the normalized
                mean of its phrases, as training requires.
            cache_dir: Folder that keeps embeddings of many names for later processes, one file for each list of names,
                templates and weights of the text tower. Damaged files are written again.

        Returns:
            Unit vectors `(C, D)`. If a class has several phrases and each has its own prototype, `(C, phrases, D)`; for
            classes with fewer phrases, the first one is repeated. The result is a copy of a cached tensor; the cache key
            is names, templates and the text tower's weights.

        Raises:
            ValueError: no names, an empty name, a duplicate name or phrase, an unknown template set or pooling, or a
                tokenizer that does not match the text tower.
        """
        return self.text_encoder.prototypes(
            processor, class_names, template_set, batch_size, phrase_pooling, cache_dir
        )

    @torch.no_grad()
    def get_image_prototypes(
        self,
        pixel_values: Tensor,
        masks: list[Tensor] | Tensor,
        pixel_mask: Tensor | None = None,
        anchors: Tensor | None = None,
        merge: bool = False,
    ) -> Tensor:
        """Prototypes of exemplars: the frozen image tower's embeddings of masked regions.

        They can replace text prototypes or be concatenated with them. But there is a modality gap: exemplars are nearer
        to all images than names are. `anchors` close it: an exemplar becomes the mean of the anchors, weighted by its
        probability for each.

        Args:
            pixel_values, pixel_mask: As for [`forward`].
            masks: For each image `(n, H, W)`, 0 outside the exemplar, such as the `mask_labels` of the processor; or one
                per image, `(B, H, W)`.
            anchors: Text prototypes `(A, D)` of many names, or `(A, K, D)`.
            merge: Treat all masks as exemplars of one class and return the prototype of their mean, taken before the
                anchors are applied.

        Returns:
            Unit vectors `(C, D)`, one per mask in the order of the images; with `merge`, a single one.

        Raises:
            ValueError: an argument has the wrong type or shape, or a mask is empty on the image.
        """
        images = self._prepare_images(pixel_values, pixel_mask)
        if isinstance(masks, Tensor) and masks.ndim == 3:
            masks = list(masks[:, None])
        shape = tuple(pixel_values.shape[-2:])
        is_list = isinstance(masks, (list, tuple))
        if not is_list or len(masks) != len(pixel_values):
            came = f"has {len(masks)} entries" if is_list else f"is a {type(masks).__name__}"
            raise ValueError(
                f"`masks` {came}; expected one (n, {shape[0]}, {shape[1]}) tensor for each of {len(pixel_values)} images, "
                "such as the `mask_labels` of the processor."
            )
        for index, mask in enumerate(masks):
            check_tensor(f"masks[{index}]", mask, "real numbers", self.logit_scale.device)
            if mask.ndim != 3 or tuple(mask.shape[1:]) != shape:
                raise ValueError(
                    f"`masks[{index}]` has shape {tuple(mask.shape)}; expected (n, {shape[0]}, {shape[1]})."
                )
        counts = [len(mask) for mask in masks]
        inside = nn.utils.rnn.pad_sequence(
            [(mask != 0).float() for mask in masks], batch_first=True, padding_value=1.0
        )
        if pixel_mask is not None:
            inside = inside * (pixel_mask != 0)[:, None]
        tower = self.recognizer.hidden_states(images.pixel_values, images.content)
        height, width = images.pixel_values.shape[-2:]
        inside = F.pad(inside.to(self.logit_scale.device), (0, width - shape[1], 0, height - shape[0]))
        inside = F.adaptive_avg_pool2d(inside, tower.grid.size)
        empty = (inside.amax((2, 3)) == 0).nonzero().tolist()
        if empty:
            raise ValueError(f"Mask {empty[0][1]} of `masks[{empty[0][0]}]` is empty; mark some pixels of the image.")
        embeds = self.recognizer.pool(tower, inside)
        embeds = torch.cat([rows[:count] for rows, count in zip(embeds, counts)])
        if merge:
            embeds = F.normalize(embeds.mean(0, keepdim=True), dim=-1)
        if anchors is None:
            return embeds
        self._check_prototypes(anchors, "anchors")
        anchors = anchors.to(embeds).flatten(0, -2)
        return F.normalize((self.logit_scale.exp() * embeds @ anchors.T).softmax(-1) @ anchors, dim=-1)

    def set_vocabulary(
        self,
        class_names: list[str] | dict[str, list[str]],
        unseen: list[str] = (),
        processor=None,
        template_set: str | list[str] | None = None,
        text_prototypes: Tensor | None = None,
    ) -> None:
        """Makes `class_names` the default vocabulary, which is saved with the checkpoint.

        Args:
            class_names: Names in the order of their ids, or a dictionary of phrases, see [`get_text_prototypes`].
            unseen: The class names that count as unseen.
            processor: Required unless `text_prototypes`, `(C, D)` or `(C, K, D)`, are given.
            template_set: As for [`get_text_prototypes`]; the name of a set is stored in the config.

        Raises:
            ValueError: `class_names` is empty or contains an empty or duplicate name, `unseen` contains another name,
                neither `processor` nor `text_prototypes` is given, or the prototypes have the wrong shape or are not
                finite. The model is then unchanged.
        """
        classes, unseen = check_classes(class_names), check_unseen_names(unseen)
        class_names = list(classes)
        unknown = [name for name in unseen if name not in class_names]
        if unknown:
            raise ValueError(
                f"`unseen` contains {unknown[0]!r}, which is not one of the {len(class_names)} class names."
            )
        if text_prototypes is None:
            if processor is None:
                raise ValueError("Pass `processor` (the checkpoint's AlignZegProcessor) or `text_prototypes`.")
            text_prototypes = self.get_text_prototypes(processor, classes, template_set)
        elif template_set is not None:
            get_templates(template_set)
        with contextlib.suppress(TypeError, ValueError, RuntimeError):  # the next check reports other types
            text_prototypes = torch.as_tensor(text_prototypes)
        self._check_prototypes(text_prototypes)
        if text_prototypes.device.type == "meta" or not text_prototypes.isfinite().all():
            raise ValueError("`text_prototypes` is empty or contains NaN or infinite values; expected unit vectors.")
        if text_prototypes.shape[0] != len(class_names):
            raise ValueError(
                f"`text_prototypes` has {text_prototypes.shape[0]} rows for the {len(class_names)} names in `class_names`; "
                "pass one row per name."
            )
        if isinstance(template_set, str):
            self.config.template_set = template_set
        self.config.id2label = dict(enumerate(class_names))
        self.config.label2id = {name: i for i, name in enumerate(class_names)}
        self.config.unseen_labels = unseen
        self.config.prototypes_per_class = 1 if text_prototypes.ndim == 2 else text_prototypes.shape[1]
        self.class_text_embeds = text_prototypes.detach().clone().to(self.class_text_embeds)
        self.seen_class_mask = self._seen_classes_of_config().to(self.seen_class_mask.device)

    def _check_prototypes(self, text_prototypes: Tensor, name: str = "text_prototypes") -> None:
        hint = "Create them with `model.get_text_prototypes(processor, names)`."
        check_tensor(name, text_prototypes, "floating-point numbers", self.logit_scale.device, hint)
        shape, width = tuple(text_prototypes.shape), self.config.projection_dim
        if len(shape) not in (2, 3) or 0 in shape or shape[-1] != width:
            raise ValueError(
                f"`{name}` has shape {shape}; expected (classes, {width}) or (classes, prototypes, {width}) with "
                f"at least one class. {hint}"
            )

    def _prepare_vocabulary(
        self,
        text_prototypes: Tensor | None,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        seen: Tensor | None,
    ) -> Vocabulary:
        if text_prototypes is None and input_ids is not None:
            text_prototypes = self.text_encoder(input_ids, attention_mask)
        if text_prototypes is None:
            text_prototypes = self.class_text_embeds
            seen = self.seen_class_mask if seen is None else seen
        self._check_prototypes(text_prototypes)
        if seen is None:
            seen = torch.ones(text_prototypes.shape[0], dtype=torch.bool, device=text_prototypes.device)
        hint = "Convert 0 and 1 with `mask.bool()`."
        check_tensor("seen_class_mask", seen, "True and False", self.logit_scale.device, hint)
        if seen.shape != (text_prototypes.shape[0],):
            raise ValueError(
                f"`seen_class_mask` has shape {tuple(seen.shape)}; expected ({text_prototypes.shape[0]},), one entry per "
                "text prototype."
            )
        return Vocabulary(text_prototypes.to(self.side_network.query_embeddings.dtype), seen, self.logit_scale.exp())
