# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The classes that the model chooses from: prototypes of names and of exemplars, and the vocabulary of a checkpoint."""

import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks_alignzeg import check_tensor
from .processing_alignzeg import check_classes, check_unseen_names, get_templates
from .recognizer_alignzeg import ProposalRecognizer
from .text_encoder_alignzeg import AlignZegTextEncoder


class Vocabulary(NamedTuple):
    """Classes of a call: unit `prototypes (C, D)` or `(C, K, D)`, which of them are `seen (C,)`, and the temperature `τ`."""

    prototypes: Tensor
    seen: Tensor
    scale: Tensor


class AlignZegVocabulary:
    """The vocabulary of [`AlignZegModel`], whose modules and `config` it uses."""

    config: Any
    recognizer: ProposalRecognizer
    text_encoder: AlignZegTextEncoder
    logit_scale: nn.Parameter
    class_text_embeds: Tensor
    seen_class_mask: Tensor

    def _placeholder_prototypes(self) -> Tensor:
        """`(C, D)`, or `(C, K, D)`, until [`set_vocabulary`] is called: one axis of the joint space for each class, as far
        as they go."""
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
    ) -> Tensor:
        """Text prototypes of class names, in the caller's order.

        Args:
            processor: The [`AlignZegProcessor`] of the checkpoint.
            class_names: Distinct, non-empty names; or a dictionary with several phrases for a class, such as `{"background":
                ["road", "wall"], "sofa": ["sofa", "couch"]}`. The name itself counts only if it is among the phrases.
            template_set: Name of a set in `TEMPLATE_SETS` or a list of sentences with one `{}` each; default
                `config.template_set`.
            batch_size: Prompts per pass of the text tower.
            phrase_pooling: `"max"`: a class's logit is that of its best phrase; `"mean"`: its prototype is the normalized
                mean of its phrases, as training needs it.

        Returns:
            Unit vectors `(C, D)`, or, if a class has several phrases and each has its own prototype, `(C, phrases, D)`,
            where classes with fewer phrases have their first one several times. They are the caller's own. They are
            cached: names, templates and the text tower's weights are the key.

        Raises:
            ValueError: no names, an empty name, a name or phrase twice, a template set or pooling that does not exist, or
                a tokenizer that is not that of the text tower.
        """
        return self.text_encoder.prototypes(processor, class_names, template_set, batch_size, phrase_pooling)

    @torch.no_grad()
    def get_image_prototypes(
        self,
        pixel_values: Tensor,
        masks: list[Tensor] | Tensor,
        pixel_mask: Tensor | None = None,
        anchors: Tensor | None = None,
        merge: bool = False,
    ) -> Tensor:
        """Prototypes of exemplars: what the frozen image tower sees inside of given masks.

        They go where text prototypes go, alone or beside them. But image and text embeddings of one thing lie apart:
        exemplars are nearer to all images than names are. `anchors` bring them among the names: an exemplar becomes the
        mean of the anchors, weighted by its probability for each.

        Args:
            pixel_values, pixel_mask: As for [`forward`].
            masks: For each image `(n, H, W)`, 0 outside of the exemplar, such as the `mask_labels` of the processor; or one
                per image, `(B, H, W)`.
            anchors: Text prototypes `(A, D)` of many names.
            merge: Make one prototype of all masks, exemplars of one class: their mean, before the anchors.

        Returns:
            Unit vectors `(C, D)`, one per mask, image by image; with `merge` one alone.

        Raises:
            ValueError: an argument does not fit, or a mask is empty on the image.
        """
        images = self._prepare_images(pixel_values, pixel_mask)
        if isinstance(masks, Tensor) and masks.ndim == 3:
            masks = list(masks[:, None])
        shape = tuple(pixel_values.shape[-2:])
        if not isinstance(masks, (list, tuple)) or len(masks) != len(pixel_values):
            raise ValueError(
                f"`masks` is not one (n, {shape[0]}, {shape[1]}) tensor for each of {len(pixel_values)} images."
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
        self._check_prototypes(anchors)
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
        """Makes `class_names` the vocabulary that is used by default and saved with the checkpoint.

        Args:
            class_names: Names in the order of their ids, or their phrases, see [`get_text_prototypes`].
            unseen: Those of them that count as unseen.
            processor: Needed unless `text_prototypes`, `(C, D)` or `(C, K, D)`, are given.
            template_set: As for [`get_text_prototypes`]; the name of a set is stored in the config.

        Raises:
            ValueError: `class_names` is empty or holds an empty name or one twice, `unseen` names something that is not
                among them, neither processor nor prototypes came, or the prototypes do not fit or are not finite.
                Nothing has changed then.
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
                raise ValueError("Pass `processor` (the checkpoint's AlignZegProcessor), or ready `text_prototypes`.")
            text_prototypes = self.get_text_prototypes(processor, classes, template_set)
        elif template_set is not None:
            get_templates(template_set)
        with contextlib.suppress(TypeError, ValueError, RuntimeError):  # what cannot become a tensor is named next
            text_prototypes = torch.as_tensor(text_prototypes)
        self._check_prototypes(text_prototypes)
        if text_prototypes.device.type == "meta" or not text_prototypes.isfinite().all():
            raise ValueError(
                "`text_prototypes` contain NaN or infinite values, or none at all; expected unit vectors."
            )
        if text_prototypes.shape[0] != len(class_names):
            raise ValueError(
                f"`text_prototypes` has {text_prototypes.shape[0]} rows for the {len(class_names)} names in `class_names`; "
                "pass one row for each."
            )
        if isinstance(template_set, str):
            self.config.template_set = template_set
        self.config.id2label = dict(enumerate(class_names))
        self.config.label2id = {name: i for i, name in enumerate(class_names)}
        self.config.unseen_labels = unseen
        self.config.prototypes_per_class = 1 if text_prototypes.ndim == 2 else text_prototypes.shape[1]
        self.class_text_embeds = text_prototypes.detach().clone().to(self.class_text_embeds)
        self.seen_class_mask = self._seen_classes_of_config().to(self.seen_class_mask.device)

    def _check_prototypes(self, text_prototypes: Tensor) -> None:
        hint = "`model.get_text_prototypes(processor, names)` makes them."
        check_tensor("text_prototypes", text_prototypes, "floating-point numbers", self.logit_scale.device, hint)
        shape, width = tuple(text_prototypes.shape), self.config.projection_dim
        if len(shape) not in (2, 3) or 0 in shape or shape[-1] != width:
            raise ValueError(
                f"`text_prototypes` has shape {shape}; expected (classes, {width}) or (classes, prototypes, {width}) with "
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
        hint = "`mask.bool()` makes it of 0 and 1."
        check_tensor("seen_class_mask", seen, "True and False", self.logit_scale.device, hint)
        if seen.shape != (text_prototypes.shape[0],):
            raise ValueError(
                f"`seen_class_mask` has shape {tuple(seen.shape)}; expected ({text_prototypes.shape[0]},), one entry per "
                "text prototype."
            )
        return Vocabulary(text_prototypes.to(self.side_network.query_embeddings.dtype), seen, self.logit_scale.exp())
