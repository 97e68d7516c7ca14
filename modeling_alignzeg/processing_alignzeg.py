# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Converts images and class names to model inputs."""

import os
import unicodedata
from collections.abc import Iterable, Mapping, Sized
from typing import Any

import numpy as np
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack

from .prompts_alignzeg import TEMPLATE_SETS
from .visualization_alignzeg import class_colors


def check_class_names(names: Iterable[str]) -> list[str]:
    """Cleans and checks class names, and keeps their order.

    Runs of whitespace and control characters become one space and are stripped at the ends; lone surrogates, which
    no tokenizer accepts, become U+FFFD. Nothing else changes: case, any script, emoji, any length. Names that are equal
    after cleaning are duplicates. Names that differ only in case are allowed, although CLIP's tokenizer cannot
    distinguish them.

    Args:
        names: distinct names, or one name as a string.

    Raises:
        ValueError: there are no names, they are a set, or one is empty, a duplicate or not a string. The message says
            which.
    """
    if isinstance(names, str):
        names = [names]
    if isinstance(names, (set, frozenset)):
        raise ValueError("Class names are a set, which has no order, but ids are positions in them; pass a list.")
    try:
        names = list(names)
    except TypeError:
        raise ValueError(f"Class names are of type {type(names).__name__}; expected a list of strings.") from None
    if not names:
        raise ValueError("There are no class names; expected at least one.")
    cleaned: dict[str, int] = {}
    for position, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(f"Class name {position} is {name!r}, a {type(name).__name__}; expected a string.")
        kinds = [unicodedata.category(character) for character in name]
        characters = (
            " " if kind[0] == "Z" or kind == "Cc" else "\ufffd" if kind == "Cs" else character
            for character, kind in zip(name, kinds)
        )
        text = " ".join("".join(characters).split())
        if all(kind[0] == "Z" or kind in ("Cc", "Cf") for kind in kinds):
            raise ValueError(f"Class name {position} is {name!r}, which is empty; remove it or write a name.")
        if text in cleaned:
            raise ValueError(
                f"Class names {cleaned[text]} and {position} are both {text!r}; names must be unique. Remove one."
            )
        cleaned[text] = position
    return list(cleaned)


def check_classes(classes: Iterable[str] | Mapping[str, str | Iterable[str]]) -> dict[str, list[str]]:
    """Phrases per class, cleaned by [`check_class_names`]: `{"sofa": ["sofa", "couch"], "grass": ["grass"]}`.

    Args:
        classes: Class names, each its own phrase, or a dictionary from class names to one or several phrases.

    Raises:
        ValueError: As [`check_class_names`], or a phrase is in two classes.
    """
    names = check_class_names(classes)
    if not isinstance(classes, Mapping):
        return {name: [name] for name in names}
    owners: dict[str, str] = {}
    result = {}
    for name, phrases in zip(names, classes.values()):
        try:
            result[name] = check_class_names(phrases)
        except ValueError as error:
            raise ValueError(f"The phrases of class {name!r} cannot be used. {error}") from None
        for phrase in result[name]:
            if owners.setdefault(phrase, name) != name:
                raise ValueError(
                    f"The phrase {phrase!r} is in the classes {owners[phrase]!r} and {name!r}; leave it in one of them."
                )
    return result


def read_classes(text: str) -> dict[str, list[str]]:
    """Parses classes in one string: `"sofa|couch, grass, background: road|ground"` gives `{"sofa": ["sofa", "couch"],
    "grass": ["grass"], "background": ["road", "ground"]}`. A trailing comma is ignored.

    Raises:
        ValueError: As [`check_classes`].
    """
    names, phrases = [], []
    for entry in text.rstrip().removesuffix(",").split(","):
        name, colon, rest = entry.partition(":")
        phrases.append((rest if colon else entry).split("|"))
        names.append(name if colon else phrases[-1][0])
    return check_classes(dict(zip(check_class_names(names), phrases)))


def phrase_table(classes: dict[str, list[str]]) -> list[list[int]]:
    """Positions of each class's phrases in the list of all phrases, padded with the first one to equal length."""
    longest, start, rows = max(map(len, classes.values())), 0, []
    for phrases in classes.values():
        rows.append([*range(start, start + len(phrases)), *[start] * (longest - len(phrases))])
        start += len(phrases)
    return rows


def check_unseen_names(names: Iterable[str] | None) -> list[str]:
    """As [`check_class_names`], but the list may be empty."""
    return [] if names is None or (isinstance(names, Sized) and len(names) == 0) else check_class_names(names)


def get_templates(template_set: str | Iterable[str]) -> tuple[str, ...]:
    """The sentences of a template set, each with `{}` where the class name goes.

    Args:
        template_set: a name in `TEMPLATE_SETS`, or a list of sentences.

    Raises:
        ValueError: the name is unknown, there is no sentence, or one has no `{}`.
    """
    if isinstance(template_set, str):
        if template_set not in TEMPLATE_SETS:
            raise ValueError(
                f"`template_set` is {template_set!r}; expected one of {', '.join(TEMPLATE_SETS)}, or a list of "
                'sentences such as ["a photo of a {}."].'
            )
        return TEMPLATE_SETS[template_set]
    if not isinstance(template_set, Iterable):
        raise ValueError(
            f"`template_set` is a {type(template_set).__name__}; expected one of {', '.join(TEMPLATE_SETS)}, or a list of "
            'sentences such as ["a photo of a {}."].'
        )
    templates = tuple(template_set)
    if not templates:
        raise ValueError("`template_set` is empty; expected at least one sentence with {} in it.")
    for position, template in enumerate(templates):
        if not isinstance(template, str) or "{}" not in template:
            raise ValueError(f"`template_set[{position}]` is {template!r}; expected a string with {{}} in it.")
    return templates


def _nested(values: list, shape: list[int]) -> list:
    """`values` as nested lists of this shape."""
    for length in shape[:0:-1]:
        values = [values[start : start + length] for start in range(0, len(values), length)]
    return values


class AlignZegProcessor(ProcessorMixin):
    r"""
    Prepares both inputs of [`AlignZegModel`] with an [`AlignZegImageProcessor`] and the tokenizer of its CLIP.

    Args:
        image_processor ([`AlignZegImageProcessor`]):
            Prepares images and converts outputs to label maps.
        tokenizer ([`PreTrainedTokenizerBase`]):
            The tokenizer of the checkpoint's CLIP.
        template_set (`str` or `list[str]`, *optional*, defaults to `"single"`):
            Prompt templates: `"single"`, `"vild"`, `"imagenet"`, or a list of sentences with `{}` for the class name.
    """

    # Prompts are padded to the longest and truncated to the text tower's context length; the end token, at which CLIP
    # pools the text, is kept.
    text_kwargs = {"padding": True, "truncation": True}

    def __init__(self, image_processor=None, tokenizer=None, template_set: str | list[str] = "single"):
        get_templates(template_set)
        self.template_set = template_set if isinstance(template_set, str) else list(template_set)
        super().__init__(image_processor, tokenizer)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        r"""
        Converts images, class names and label maps to model inputs.

        Args:
            images: see [`AlignZegImageProcessor`].
            text: class names, in the order of the ids in the label maps; one string is one class. Or a dictionary with
                several phrases for every class, see [`check_classes`].
            segmentation_maps: see [`AlignZegImageProcessor`].
            kwargs: `template_set`, in place of the processor's own; `return_tensors`; any argument of the image
                processor or the tokenizer.

        Returns:
            [`BatchFeature`] with, for the given inputs:

            - **input_ids**, **attention_mask** -- (classes, length) for one template, (classes, templates, length) for
              several; (classes, phrases, templates, length) if a class has several phrases, with the first phrase
              repeated for classes with fewer.
            - **pixel_values**, **pixel_mask**, **mask_labels**, **class_labels** -- see [`AlignZegImageProcessor`].

        Raises:
            ValueError: neither images nor text is given, or [`check_class_names`], [`get_templates`] or the image
                processor raises one.
        """
        template_set = kwargs.pop("template_set", None)
        if images is None and text is None:
            raise ValueError("Pass `images`, `text` (the class names), or both.")
        if images is None and segmentation_maps is not None:
            raise ValueError("`segmentation_maps` is given without `images`; pass both.")
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        features = {}
        if text is not None:
            features.update(self._encode(text, template_set, **merged["text_kwargs"]))
        if images is not None:
            features.update(self.image_processor(images, segmentation_maps, **merged["images_kwargs"]))
        return BatchFeature(features)

    def encode_class_names(self, names: list[str], template_set: str | list[str] | None = None) -> BatchFeature:
        """`input_ids` and `attention_mask` of class names as torch tensors, as [`__call__`] returns them for `text`."""
        return self(text=names, template_set=template_set, return_tensors="pt")

    def _encode(self, names: Any, template_set: str | list[str] | None, **text_kwargs: Any) -> dict[str, Any]:
        templates = get_templates(self.template_set if template_set is None else template_set)
        classes = check_classes(names)
        table = phrase_table(classes)
        everything = [phrase for phrases in classes.values() for phrase in phrases]
        prompts = [template.replace("{}", everything[i]) for row in table for i in row for template in templates]
        # A name that spells a special token is ordinary text.
        encoded = self.tokenizer(prompts, split_special_tokens=True, **text_kwargs)
        shape = [len(table)]
        if len(table[0]) > 1:
            shape.append(len(table[0]))
        if len(templates) > 1 or len(shape) > 1:
            shape.append(len(templates))
        return {
            key: _nested(value, shape) if isinstance(value, list) else value.reshape(*shape, value.shape[-1])
            for key, value in encoded.items()
        }

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Writes processor, tokenizer and this code to a folder; see [`ProcessorMixin.save_pretrained`]."""
        # A fast tokenizer would save the truncation and padding of its last call as its defaults.
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
        files = super().save_pretrained(save_directory, push_to_hub, **kwargs)
        vars(self).pop("auto_map", None)  # only in the file; a processor loaded from it has no such attribute either
        return files

    def post_process_semantic_segmentation(self, *args: Any, **kwargs: Any) -> Any:
        """See [`AlignZegImageProcessor.post_process_semantic_segmentation`]."""
        return self.image_processor.post_process_semantic_segmentation(*args, **kwargs)

    def post_process_instance_segmentation(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        """See [`AlignZegImageProcessor.post_process_instance_segmentation`]."""
        return self.image_processor.post_process_instance_segmentation(*args, **kwargs)

    def post_process_panoptic_segmentation(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        """See [`AlignZegImageProcessor.post_process_panoptic_segmentation`]."""
        return self.image_processor.post_process_panoptic_segmentation(*args, **kwargs)

    @staticmethod
    def class_colors(class_names: list[str]) -> np.ndarray:
        """One colour per class name, `uint8 (C, 3)`; a name has the same colour in every list unless colours collide."""
        return class_colors(class_names)


AlignZegProcessor.register_for_auto_class()
