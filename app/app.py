#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The demo of AlignZeg: zero-shot segmentation in a browser, and the same function as an API.

    python app/app.py                       # the checkpoint for photographs of this clone
    python app/app.py --model ID_OR_FOLDER  # or the environment variable ALIGNZEG_MODEL

Order of this file: limits, validation of user input, the model, data for the page and the API, the page. The network
runs when Segment is pressed. Its outputs are kept for that session, so moving a slider only repeats post-processing.
"""

from __future__ import annotations

import argparse
import base64
import functools
import importlib
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import unicodedata
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# By default Gradio keeps the durations of 10,000 calls in memory and sums them up after every call.
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "100")
os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", "100")


def parser() -> argparse.ArgumentParser:
    """The options of the demo."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", help="AlignZeg checkpoint: a folder or a Hub id; its code is executed (type: str)")
    options.add_argument("--host", help="address to listen on (type: str, default: localhost only)")
    options.add_argument("--port", type=int, help="(type: int, default: the first free port from 7860)")
    options.add_argument("--mcp", action="store_true", help="offer the API to language models too, as an MCP server")
    return options


if __name__ == "__main__":
    parser().parse_args()  # answers --help and misspelt options before the slow imports below

try:
    import spaces  # on ZeroGPU, before torch
except ImportError:
    spaces = None
import gradio as gr
import numpy as np
import torch
from fastapi import HTTPException
from gradio.components.base import server
from gradio.utils import get_upload_folder
from PIL import Image, UnidentifiedImageError
from transformers import AutoModel, AutoProcessor


HERE = Path(__file__).resolve().parent
EXAMPLES = HERE / "examples"

MAX_FILE_BYTES = 20 * 2**20
MAX_PIXELS = 4096 * 4096
MAX_SIDE = 16384
MAX_NAMES = 200  # at most 255 fit into a palette PNG
MAX_NAME_LENGTH = 200
MAX_TEXT_LENGTH = MAX_NAMES * (MAX_NAME_LENGTH + 2)
Image.init()  # PIL registers its formats
FORMATS = [kind for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF") if kind in Image.OPEN]
VIEW_SIDE = 1024  # longest side of the picture on the page; downloads have full resolution
VIEW_LABELS = 512  # longest side of the label map on the page,
VIEW_DETAIL = 8  # which also has at most this many pixels per mask cell and axis
REST = 0.3  # seconds from the last slider change to writing the downloads
KEPT_BYTES = 2**30  # limit on the network outputs kept for all sessions together
QUEUE_SIZE = 64
MAX_LAYERS = 8  # of a painted picture
MAX_SKETCHES = QUEUE_SIZE  # painted pictures that wait to be read, in all sessions together,
SKETCH_BYTES = 2**28  # and limit on their size
SEGMENTS = {"Panoptic segments": "panoptic", "Instances": "instance"}
EXAMPLE_NAME = "your example"
NONE_ID, NONE_NAME, NONE_COLOR = 255, "everything else", (120, 120, 120)

logger = logging.getLogger("alignzeg.app")


class Refused(ValueError):
    """Rejected user input. The message is shown to the user."""


# --- validation of user input ------------------------------------------------------------------------------------


def split_names(text: str | None) -> list[str]:
    """Class names from text, separated by commas or newlines. Blank lines and trailing commas are ignored.

    Raises:
        Refused: it is not a string, or longer than `MAX_TEXT_LENGTH`.
    """
    text = text or ""
    if not isinstance(text, str):
        raise Refused("The class names must be text, separated by commas.")
    if len(text) > MAX_TEXT_LENGTH:
        raise Refused(f"The class names are {len(text):,} characters long; at most {MAX_TEXT_LENGTH:,} are allowed.")
    lines = [line.strip().removesuffix(",") for line in text.splitlines() if line.strip()]
    return [name for line in lines for name in line.split(",")]


def check_names(names: Any) -> list[str]:
    """Cleans class names: single spaces between words, no control or bidirectional-override characters.

    Raises:
        Refused: there are none or too many, or one is empty, too long, not a string, or a duplicate.
    """
    if not isinstance(names, (list, tuple)):
        raise Refused("The class names must be a list of strings.")
    if not names:
        raise Refused("There are no class names. Write at least one, such as “grass, water, red striped”.")
    if len(names) > MAX_NAMES:
        raise Refused(f"There are {len(names):,} class names; at most {MAX_NAMES} are allowed.")
    cleaned: dict[str, int] = {}
    for position, name in enumerate(names, 1):
        if not isinstance(name, str):
            raise Refused(f"Class name {position} is not a string.")
        if len(name) > MAX_NAME_LENGTH:
            raise Refused(
                f"Class name {position} has {len(name):,} characters; at most {MAX_NAME_LENGTH} are allowed."
            )
        kinds = [unicodedata.category(character) for character in name]
        kept = (
            " " if kind[0] == "Z" or kind == "Cc" else "\ufffd" if kind == "Cs" else character
            for character, kind in zip(name, kinds)
            if unicodedata.bidirectional(character) not in _DIRECTIONS
        )
        text = " ".join("".join(kept).split())
        if not any(unicodedata.category(character)[0] not in "CZ" for character in text):
            raise Refused(f"Class name {position} is empty. Remove the extra comma, or enter a name.")
        if text in cleaned:
            raise Refused(f"Class names {cleaned[text]} and {position} are both “{text}”. Remove one of them.")
        cleaned[text] = position
    return list(cleaned)


def check_classes(entries: Any) -> dict[str, list[str]]:
    """The phrases of every class, from entries such as “grass”, “sofa|couch” and “background: road|ground”.

    Raises:
        Refused: as [`check_names`]; or a phrase is in two classes.
    """
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, str) for entry in entries):
        check_names(entries)  # which says what is wrong
    parts = [entry.partition(":") for entry in entries]
    phrases = [(rest if colon else name).split("|") for name, colon, rest in parts]
    names = check_names([name if colon else own[0] for (name, colon, _), own in zip(parts, phrases)])
    if sum(map(len, phrases)) > MAX_NAMES:
        raise Refused(f"There are {sum(map(len, phrases)):,} phrases; at most {MAX_NAMES} are allowed.")
    classes, owners = {}, {}
    for name, own in zip(names, phrases):
        try:
            classes[name] = check_names(own)
        except Refused as error:
            raise Refused(f"Phrases of “{name}”: {error}") from None
        for phrase in classes[name]:
            if owners.setdefault(phrase, name) != name:
                raise Refused(f"“{phrase}” is in “{owners[phrase]}” and in “{name}”. Remove one of them.")
    return classes


_DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # these can reorder text on the page


def check_unseen(unseen: Any, names: list[str]) -> list[bool]:
    """For each of `names`, whether it is in `unseen`.

    Raises:
        Refused: `unseen` contains something that is not in `names`.
    """
    if not unseen:
        return [False] * len(names)
    marked = check_names(unseen)
    for name in marked:
        if name not in names:
            raise Refused(f"“{name}” is marked as unseen, but it is not among the class names.")
    return [name in marked for name in names]


def check_number(name: str, value: Any, default: float, largest: float) -> float:
    """`value`, or `default` for `None`.

    Raises:
        Refused: it is not a number from 0 to `largest`.
    """
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= largest:
        raise Refused(f"{name} is {str(value)[:40]}; it must be a number from 0 to {largest:g}.")
    return float(value)


def open_picture(path: str | None) -> Image.Image:
    """Opens an uploaded picture. Only the header is read; pixels are decoded later.

    Raises:
        Refused: it is missing, not an uploaded file, empty, not a picture, or too large.
    """
    if not path:
        raise Refused("No picture yet: upload, paste or take one, or choose an example.")
    if not isinstance(path, (str, Path)) or "\0" in str(path):
        raise Refused("The picture must be uploaded; this is not a valid file.")
    file = Path(path).resolve()
    if not file.is_relative_to(Path(get_upload_folder()).resolve()) or not file.is_file():
        raise Refused("The picture must be uploaded; paths and URLs are not accepted.")
    size = file.stat().st_size
    if size == 0:
        raise Refused("The file is empty (0 bytes). Save or download it again, then upload it.")
    if size > MAX_FILE_BYTES:
        raise Refused(f"The file has {size / 2**20:.0f} MB; at most {MAX_FILE_BYTES // 2**20} MB are allowed.")
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise Refused(
            "The file is not a picture, or its format is not supported. Use PNG, JPEG, WebP, GIF, BMP or TIFF."
        ) from None
    except Image.DecompressionBombError:
        raise Refused(_TOO_LARGE.format("far too many")) from None
    except Exception as error:  # PIL plug-ins raise errors of many types on malformed headers
        logger.info("unreadable upload: %r", error)
        raise Refused("The file is damaged: it cannot be read as a picture. Save it again, then upload it.") from None
    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
        raise Refused(_TOO_LARGE.format(f"{image.width:,} × {image.height:,}"))
    return image


_TOO_LARGE = (
    f"The picture has {{}} pixels; at most {MAX_PIXELS / 1e6:.0f} million, and {MAX_SIDE:,} on a side, are allowed. "
    "Scale it down and upload it again."
)


_DROPPED = "This result is no longer kept, because many people use the demo. Press Segment again."


# --- the model ---------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Result:
    """Network outputs for one picture of one session. Everything on the page is computed from them.

    Attributes:
        names: the class names.
        unseen: for each name, whether it counts as unseen.
        colors: `uint8 (classes, 3)`.
        size: height and width of the picture after EXIF rotation.
        outputs: the outputs that post-processing reads, on the CPU; `None` once they were dropped.
        folder: files of this result; deleted with it.
        shown: the picture file that the page shows.
        settings: the settings that the page shows: gamma, threshold, everything_else, sharp.
        cache: values that do not depend on the settings.
    """

    names: list[str]
    unseen: list[bool]
    colors: np.ndarray
    size: tuple[int, int]
    outputs: SimpleNamespace | None
    folder: Path
    shown: Path | None = None
    settings: tuple[float, float, bool, bool] | None = None
    cache: dict[Any, Any] = field(default_factory=dict)

    def size_within(self, side: float) -> tuple[int, int]:
        """Height and width of the picture, scaled down so that neither exceeds `side`."""
        scale = min(1.0, side / max(self.size))
        return max(1, round(self.size[0] * scale)), max(1, round(self.size[1] * scale))

    def kept_outputs(self) -> SimpleNamespace:
        """The outputs. Another session can drop them at any time, so read them once.

        Raises:
            Refused: they were dropped.
        """
        outputs = self.outputs
        if outputs is None:
            raise Refused(_DROPPED)
        return outputs

    @property
    def label_size(self) -> tuple[int, int]:
        """Height and width of the label maps on the page, limited by the resolution of the masks.

        Raises:
            Refused: the outputs were dropped.
        """
        masks = self.kept_outputs().masks_queries_logits
        return self.size_within(min(VIEW_LABELS, VIEW_DETAIL * max(masks.shape[2:])))

    @property
    def num_bytes(self) -> int:
        """Size of the outputs."""
        tensors = vars(self.outputs).values() if self.outputs else ()
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass(frozen=True)
class Reading:
    """A label map and its statistics.

    Attributes:
        labels: `uint8 (height, width)`: indices into the class names, or `NONE_ID`.
        rows: `(id, coverage, confidence)` of every class that occurs, largest first. The confidence, from 0 to 1, is the
            mean probability of the class over its pixels.
    """

    labels: np.ndarray
    rows: list[tuple[int, float, float]]


class Segmenter:
    """A checkpoint and its use in the demo."""

    def __init__(self, model: str) -> None:
        folder = Path(model).resolve()  # the page does not show paths of the server
        self.title = model if not folder.is_dir() else "this repository" if folder == HERE.parent else folder.name
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = AutoModel.from_pretrained(model, trust_remote_code=True).to(self.device).eval()
        self.processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
        package = type(self.processor).__module__.rpartition(".")[0]  # of the checkpoint's own code
        self.draw_overlay = importlib.import_module(f"{package}.visualization_alignzeg").draw_overlay
        config = self.model.config
        self.classes = [config.id2label[i] for i in range(config.num_labels)]
        self.unseen = [name for name in config.unseen_labels or [] if name in self.classes]
        image_processor = self.processor.image_processor
        self.gamma, self.threshold = image_processor.correction_gamma, image_processor.correction_threshold
        self.has_correction = bool(config.bias_correction)
        self.max_gamma = max(10.0, math.ceil(2 * self.gamma))
        self._kept: deque[weakref.ref[Result]] = deque()
        self._lock = threading.Lock()
        # ZeroGPU runs it in another process: what goes in and comes out is pickled, so it is not a method.
        self._network = spaces.GPU(self._make_network()) if spaces is not None else self._make_network()

    def _make_network(self) -> Callable[..., dict[str, torch.Tensor | None]]:
        fields = ("masks_queries_logits", "class_queries_logits", "unseen_logits", "dense_logits", "seen_class_mask")
        fields = (*fields, "content_sizes", "queries_hidden_state")  # the last: which proposals are objects

        @torch.no_grad()
        def network(
            inputs: dict[str, torch.Tensor],
            classes: dict[str, list[str]],
            unseen: list[bool],
            exemplar: tuple[torch.Tensor, torch.Tensor] | None,
        ) -> dict[str, torch.Tensor | None]:
            prototypes = [self.model.get_text_prototypes(self.processor, classes)] if classes else []
            if exemplar is not None:
                pixel_values, mask = (part.to(self.device) for part in exemplar)
                anchors = self.model.class_text_embeds
                example = self.model.get_image_prototypes(pixel_values, mask, anchors=anchors)
                if prototypes and prototypes[0].ndim == 3:  # several phrases per class
                    example = example[:, None].expand(-1, prototypes[0].shape[1], -1)
                prototypes = [example, *prototypes]
            inputs = {name: value.to(self.device) for name, value in inputs.items()}
            seen = torch.tensor([not mark for mark in unseen], device=self.device)
            outputs = self.model(**inputs, text_prototypes=torch.cat(prototypes), seen_class_mask=seen)
            found = {name: getattr(outputs, name, None) for name in fields}
            return {name: value if value is None else value.cpu() for name, value in found.items()}

        return network

    def run(
        self,
        image: Image.Image,
        classes: dict[str, list[str]],
        unseen: list[bool],
        progress: Callable[[float, str], Any],
        exemplar: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[Result, Image.Image]:
        """Runs the network.

        Args:
            image: from [`open_picture`].
            classes, unseen: from [`check_classes`] and [`check_unseen`].
            progress: called with the progress, 0 to 1, and the name of the next step.
            exemplar: from [`read_exemplar`]: one more class, the first, called `EXAMPLE_NAME`, which counts as unseen.

        Returns:
            The result, and the picture as RGB after EXIF rotation.

        Raises:
            Refused: the picture cannot be decoded.
        """
        progress(0.05, "Reading the picture")
        image, names = self._upright(image), list(classes)
        if exemplar is not None:
            names, unseen = [EXAMPLE_NAME, *names], [True, *unseen]
        progress(0.2, f"Running the network on {len(names)} class name{'s' if len(names) > 1 else ''}")
        inputs = self.processor(images=image, return_tensors="pt")
        kept = SimpleNamespace(**self._network(dict(inputs), classes, unseen, exemplar))
        progress(0.9, "Drawing")
        folder = Path(tempfile.mkdtemp(prefix="alignzeg-", dir=get_upload_folder()))
        result = Result(names, unseen, self.processor.class_colors(names), (image.height, image.width), kept, folder)
        weakref.finalize(result, shutil.rmtree, folder, ignore_errors=True)
        return result, image

    def read_exemplar(self, drawing: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """A picture and what is painted over in it; does not run the network. `drawing` is from [`Sketch`].

        Returns:
            The pixel values `(1, 3, H, W)` and the mask `(1, H, W)`, 1 where the picture is painted, on the CPU.

        Raises:
            Refused: the picture is missing, nothing is painted, or one of the two cannot be read.
        """
        drawing = drawing or {}
        picture = self._upright(open_picture(drawing.get("background")))
        painted = np.zeros((picture.height, picture.width), bool)
        for layer in drawing.get("layers") or []:
            try:
                alpha = open_picture(layer).convert("RGBA").getchannel("A")
            except OSError as error:
                logger.info("undecodable layer: %s", error)
                raise Refused("What was painted cannot be read. Paint it again.") from None
            painted |= np.asarray(alpha.resize(picture.size, Image.Resampling.NEAREST)) > 0
        inputs = self.processor(images=picture, segmentation_maps=np.where(painted, 0, 255), return_tensors="pt")
        if not len(inputs["mask_labels"][0]):
            raise Refused("Nothing is painted, or too little. Paint over the thing that you look for.")
        return inputs["pixel_values"], inputs["mask_labels"][0]

    def _upright(self, image: Image.Image) -> Image.Image:
        """The picture as the model sees it, at its original size: EXIF-rotated, 8-bit RGB, no transparency."""
        as_it_is = {"do_resize": False, "do_rescale": False, "do_normalize": False, "do_pad": False}
        try:
            pixels = self.processor(images=image, return_tensors="np", **as_it_is)["pixel_values"][0]
        except ValueError as error:
            logger.info("undecodable upload: %s", error)
            raise Refused(
                "The picture is damaged or truncated: it cannot be decoded. Save it again, then upload it."
            ) from None
        return Image.fromarray(np.rint(pixels).astype(np.uint8).transpose(1, 2, 0))

    def keep(self, result: Result) -> None:
        """Bounds the memory of all kept results: the oldest outputs are dropped first."""
        with self._lock:
            self._kept.append(weakref.ref(result))
            alive = [kept for kept in (reference() for reference in self._kept) if kept is not None and kept.outputs]
            used = sum(kept.num_bytes for kept in alive)
            for kept in alive[:-1]:
                if used <= KEPT_BYTES:
                    break
                used -= kept.num_bytes
                kept.outputs = None
            self._kept = deque(weakref.ref(kept) for kept in alive if kept.outputs)

    def read(
        self,
        result: Result,
        size: tuple[int, int],
        gamma: float,
        threshold: float,
        everything_else: bool,
        sharp: bool = False,
    ) -> Reading:
        """The label map of `size` (height, width) and its classes, from kept outputs; does not run the network. If `sharp`,
        its borders follow the shown picture.

        Raises:
            Refused: the outputs were dropped.
        """
        outputs = result.kept_outputs()
        options = {
            "gamma": gamma if self.has_correction else 0.0,
            "threshold": threshold,
            "none_of_these": everything_else,
            "none_index": NONE_ID,
        }
        guide = {}
        if sharp:
            with Image.open(result.shown) as picture:
                guide["images"] = [picture.convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR)]
        labels = self.processor.post_process_semantic_segmentation(outputs, [size], **options, **guide)[0]
        labels = labels.byte().numpy()
        coarse = self.processor.post_process_semantic_segmentation(outputs, None, True, **options)[0]
        scores = coarse["segmentation_scores"].numpy()  # (classes, h, w)
        if "weight" not in result.cache:
            result.cache["weight"] = outputs.masks_queries_logits[0].float().sigmoid().sum(0).clamp(min=1e-12).numpy()
        probabilities = scores / result.cache["weight"]
        rest = 1 - probabilities.sum(0, keepdims=True)  # none of the classes
        if outputs.dense_logits is not None:  # scores that the image tower's cells share are no longer probabilities
            probabilities = scores / scores.sum(0, keepdims=True).clip(min=1e-12)
        probabilities = np.concatenate([probabilities, rest])

        y, x = (
            ((np.arange(length) + 0.5) * (content / length)).astype(np.int32).clip(0, cells - 1)
            for length, content, cells in zip(size, outputs.content_sizes[0].tolist(), scores.shape[1:])
        )
        channels = np.arange(256, dtype=np.int32)
        channels[NONE_ID] = len(result.names)
        places = channels[labels] * (scores.shape[1] * scores.shape[2]) + y[:, None] * scores.shape[2] + x
        counts = np.bincount(labels.ravel(), minlength=256)
        sums = np.bincount(labels.ravel(), probabilities.ravel()[places.ravel()], 256)
        rows = [
            (int(i), float(counts[i] / labels.size), float(np.clip(sums[i] / counts[i], 0, 1)))
            for i in counts.nonzero()[0]
        ]
        return Reading(labels, sorted(rows, key=lambda row: -row[1]))

    def read_segments(
        self, result: Result, kind: str, score: float, gamma: float, threshold: float
    ) -> list[tuple[np.ndarray, str]]:
        """Masks of the size of the shown picture and names of segments of `kind`, one of `SEGMENTS`.

        Raises:
            Refused: the outputs were dropped, or nothing is found.
        """
        outputs = result.kept_outputs()
        post_process = getattr(self.processor, f"post_process_{SEGMENTS[kind]}_segmentation")
        found = post_process(
            outputs,
            score,
            target_sizes=[result.size_within(VIEW_SIDE)],
            gamma=gamma if self.has_correction else 0.0,
            correction_threshold=threshold,
        )[0]
        labels = found["segmentation"].numpy()
        segments = [
            (labels == info["id"], f"{result.names[info['label_id']]} ({info['score']:.0%})")
            for info in found["segments_info"]
        ]
        if not segments:
            raise Refused("No segment reaches this score. Lower it, or choose other class names.")
        return segments

    def read_unseen_map(self, result: Result) -> np.ndarray | None:
        """The unseen-ness map, 0 to 1, at most 256 pixels on a side; `None` without PBC.

        Raises:
            Refused: the outputs were dropped.
        """
        _, maps = self.processor.post_process_semantic_segmentation(
            result.kept_outputs(), [result.size_within(256)], gamma=0.0, return_unseen_scores=True
        )
        return None if maps is None else maps[0].numpy()


# --- data for the page and the API -------------------------------------------------------------------------------


def encode_runs(labels: np.ndarray) -> dict[str, str]:
    """Run-length encoding of a label map in row-major order, for viewer.js."""
    flat = labels.ravel()
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    lengths = np.diff(np.append(starts, flat.size)).astype("<u4")
    return {"ids": encode_bytes(flat[starts]), "runs": encode_bytes(lengths)}


def encode_bytes(values: np.ndarray) -> str:
    """Base64 encoding of the raw bytes."""
    return base64.b64encode(values.tobytes()).decode()


def view_data(
    segmenter: Segmenter, result: Result, gamma: float, threshold: float, everything_else: bool, sharp: bool = False
) -> dict[str, Any]:
    """Everything that viewer.js draws, as JSON.

    Raises:
        Refused: the outputs were dropped.
    """
    size = result.label_size
    extra = len(result.names)  # id of "everything else" on the page

    def encode(reading: Reading) -> dict[str, Any]:
        labels = np.where(reading.labels == NONE_ID, np.uint8(extra), reading.labels)
        return {
            "labels": encode_runs(labels),
            "rows": [(extra if i == NONE_ID else i, *rest) for i, *rest in reading.rows],
        }

    options = (everything_else, sharp)
    if ("plain", *options) not in result.cache:
        result.cache["plain", *options] = encode(segmenter.read(result, size, 0.0, threshold, *options))
    if "unseen_map" not in result.cache:
        unseen = segmenter.read_unseen_map(result)
        result.cache["unseen_map"] = (
            unseen
            if unseen is None
            else {
                "width": unseen.shape[1],
                "height": unseen.shape[0],
                "values": encode_bytes((unseen * 255).round().astype(np.uint8)),
            }
        )
    plain = result.cache["plain", *options]
    is_corrected = gamma > 0 and segmenter.has_correction and any(result.unseen)
    classes = [
        {"name": name, "unseen": mark, "color": color}
        for name, mark, color in zip(result.names, result.unseen, result.colors.tolist())
    ]
    classes.append({"name": NONE_NAME, "unseen": False, "color": NONE_COLOR, "extra": True})
    hint = ""
    if not segmenter.has_correction:
        hint = "This checkpoint was trained without bias correction; the sliders have no effect."
    elif not any(result.unseen):
        hint = "No class is marked as unseen, so nothing is corrected. Mark at least one and press Segment again."
    return {
        "picture": {"path": str(result.shown), "meta": {"_type": "gradio.FileData"}},
        "small": max(result.size) < 320,
        "width": size[1],
        "height": size[0],
        "classes": classes,
        "plain": plain,
        "corrected": encode(segmenter.read(result, size, gamma, threshold, *options)) if is_corrected else plain,
        "correction": f"With correction, γ = {gamma:g}, θ = {threshold:g}" if is_corrected else "Correction is off",
        "unseen_map": result.cache["unseen_map"],
        "gamma": gamma,
        "threshold": threshold,
        "everything_else": everything_else,
        "hint": hint,
    }


def report(
    segmenter: Segmenter, result: Result, reading: Reading, gamma: float, threshold: float, everything_else: bool
) -> dict[str, Any]:
    """The JSON for download, which the API returns too."""
    found = {i: rest for i, *rest in reading.rows}
    marks = [*zip(range(len(result.names)), result.names, result.unseen, result.colors.tolist())]
    if everything_else:
        marks.append((NONE_ID, NONE_NAME, False, NONE_COLOR))
    return {
        "model": segmenter.title,
        "height": result.size[0],
        "width": result.size[1],
        "gamma": gamma,
        "threshold": threshold,
        "everything_else": everything_else,
        "classes": [
            {
                "id": i,
                "name": name,
                "unseen": mark,
                "color": "#{:02x}{:02x}{:02x}".format(*color),
                "coverage": found[i][0] if i in found else 0.0,
                "confidence": found[i][1] if i in found else None,
            }
            for i, name, mark, color in marks
        ],
    }


def write_label_png(path: Path, labels: np.ndarray, colors: np.ndarray) -> None:
    """Writes a palette PNG whose values are indices into the class names, or `NONE_ID`."""
    picture = Image.fromarray(labels)
    palette = np.full((256, 3), NONE_COLOR, np.uint8)
    palette[: len(colors)] = colors
    picture.putpalette(palette.flatten().tolist())
    picture.save(path, compress_level=3)


def answering(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turns every exception of `function` into a message for the user; unexpected ones are logged with their traceback.
    `gr.Error` passes through: ZeroGPU says with it that a quota is used up."""

    @functools.wraps(function)
    def answer(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Refused as error:
            raise gr.Error(_as_text(str(error)), print_exception=False) from None
        except gr.Error:
            raise
        except Exception:
            logger.exception("%s failed", function.__name__)
            message = "Internal error. Try again, or use a smaller picture."
            raise gr.Error(message, print_exception=False) from None

    return answer


def _as_text(message: str) -> str:
    """Replaces markup characters: the page renders messages as HTML."""
    return message.replace("<", "‹").replace(">", "›").replace("&", "＆")


# --- the page ----------------------------------------------------------------------------------------------------


class Picture(gr.Image):
    """A picture passed on as the path of the uploaded file. gr.Image would decode it before it is checked."""

    is_template = True

    def preprocess(self, payload: Any) -> str | None:
        return getattr(payload, "path", None)

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        """Rejects URLs, which gr.Image would download."""
        if str(url_or_file_path).lower().startswith(("http:", "https:")):
            raise gr.Error("Upload the picture itself, not its URL.", print_exception=False)
        return await super().async_move_resource_to_block_cache(url_or_file_path)


class Sketch(gr.ImageEditor):
    """A picture and what is painted on it, passed on as paths. gr.ImageEditor would decode both before they are checked."""

    is_template = True
    _lock = threading.Lock()

    @server
    def accept_blobs(self, data: Any) -> None:
        """Keeps one file of a painted picture until an event reads it. Every client can call this, with any values.

        Raises:
            HTTPException: the layer does not exist or the file is too large.
        """
        index = str(data.data.get("index") or "null")
        if index not in ("null", *map(str, range(MAX_LAYERS))):
            message = f"The layer is {_as_text(index[:40])}; expected a whole number from 0 to {MAX_LAYERS - 1}."
            raise HTTPException(400, message)
        if any(len(content) > MAX_FILE_BYTES for _, content in data.files):
            message = f"The painted picture is larger than {MAX_FILE_BYTES >> 20} MB. Paint on a smaller one."
            raise HTTPException(400, message)
        with self._lock:  # the page sends the files of a picture at once
            super().accept_blobs(data)
            sizes = {
                key: sum(len(file) for file in (blobs.background, blobs.composite, *blobs.layers) if file)
                for key, blobs in list(self.blob_storage.items())
            }
            while len(sizes) > MAX_SKETCHES or sum(sizes.values()) > SKETCH_BYTES:
                oldest = next(iter(sizes))
                del sizes[oldest]
                self.blob_storage.pop(oldest, None)

    def convert_and_format_image(self, file: Any, flatten_on_white: bool = False) -> str | None:
        if not isinstance(file, (bytes, bytearray, memoryview)):
            return getattr(file, "path", None)
        handle, path = tempfile.mkstemp(prefix=_SKETCH, dir=get_upload_folder())
        with os.fdopen(handle, "wb") as stream:
            stream.write(file)
        self.temp_files.add(path)  # for delete_cache, if no event handler deletes it
        return path


_SKETCH = "alignzeg-sketch-"


class Marks(gr.CheckboxGroup):
    """Check boxes that accept any value; `check_unseen` compares it with the class names of the same request."""

    is_template = True

    def preprocess(self, payload: Any) -> list[str]:
        return payload if isinstance(payload, list) else []


class NameList(gr.Textbox):
    """A list of names in the API; not shown on the page."""

    is_template = True

    def preprocess(self, payload: Any) -> Any:
        return payload

    def postprocess(self, value: Any) -> Any:
        return value

    def api_info(self) -> dict[str, Any]:
        return {"type": "array", "items": {"type": "string"}}

    def example_payload(self) -> list[str]:
        return ["grass", "water"]

    def example_value(self) -> list[str]:
        return self.example_payload()


def load_examples(classes: Sequence[str]) -> list[dict[str, Any]]:
    """`{"file", "classes", "unseen"}` of every example: drawn scenes for a checkpoint that knows their classes,
    photographs, with a `credit`, for any other."""
    scenes, photos = (
        json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        for file in (EXAMPLES / "examples.json", EXAMPLES / "photos.json")
    )
    return scenes if scenes and scenes[0]["classes"][0] in classes else photos


class Page:
    """The page, its event handlers and its API."""

    def __init__(self, segmenter: Segmenter) -> None:
        self.segmenter = segmenter
        self.examples = load_examples(segmenter.classes)

    def build(self) -> gr.Blocks:
        credits = dict.fromkeys(filter(None, (example.get("credit") for example in self.examples)))
        with gr.Blocks(title="AlignZeg", analytics_enabled=False, delete_cache=(600, 3600)) as demo:
            self.result = gr.State(time_to_live=3600)
            gr.Markdown(
                "# AlignZeg: segment by names\n"
                "Enter any class names to segment a picture. **Unseen** classes had no labelled pixels in training, and "
                "models tend to assign their regions to seen classes. AlignZeg estimates where this happens and corrects "
                "it.",
                elem_classes="az-intro",
            )
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self._add_inputs()
                with gr.Column(scale=3, min_width=320):
                    self._add_results()
            credit = f" Example photographs: {', '.join(credits)}." if credits else ""
            gr.Markdown(f"Model: `{self.segmenter.title}`. To call it from Python, see “Use via API”.{credit}")
            self._connect()
            self._add_api()
        return demo

    def _add_inputs(self) -> None:
        self.picture = Picture(
            label="Picture",
            sources=["upload", "clipboard", "webcam"],
            height=300,
            buttons=["fullscreen"],
            elem_id="az-input",
        )
        if self.examples:
            self.gallery = gr.Dataset(
                components=[gr.Image(visible=False)],
                samples=[[str(EXAMPLES / example["file"])] for example in self.examples],
                label="Examples",
                type="index",
                samples_per_page=len(self.examples),
                elem_id="az-examples",
            )
        self.names = gr.Textbox(
            label="Class names",
            info="Separated by commas or newlines. Several phrases for one class: “sofa|couch” or “background: "
            "road|wall”. Enter starts, Shift+Enter adds a line.",
            placeholder="grass, water, red striped",
            lines=1,
            max_lines=6,
            elem_id="az-names",
        )
        self.marked = Marks(label="Unseen classes", choices=[], elem_id="az-unseen", elem_classes="az-marks")
        with gr.Accordion("Find by an example", open=False):
            self.drawing = Sketch(
                label="Another picture: paint over the thing that you look for",
                sources=["upload", "clipboard"],
                brush=gr.Brush(default_size=20, colors=["#0072B2"], color_mode="fixed"),
                layers=False,
                transforms=[],
                height=300,
                elem_id="az-example",
            )
            self.find = gr.Button("Find it in the picture above", size="md", elem_id="az-find")
        with gr.Row():
            self.vocabulary = gr.Button(f"All {len(self.segmenter.classes)} classes", size="md", min_width=120)
            self.start = gr.Button("Segment", variant="primary", size="md", min_width=120, elem_id="az-start")

    def _add_results(self) -> None:
        self.viewer = gr.HTML(
            html_template=(HERE / "viewer.html").read_text(encoding="utf-8"),
            js_on_load=(HERE / "viewer.js").read_text(encoding="utf-8"),
            apply_default_css=False,
            container=True,
            padding=True,
            min_height=300,
            elem_id="az-viewer",
        )
        with gr.Row():
            self.gamma = gr.Slider(
                0,
                self.segmenter.max_gamma,
                self.segmenter.gamma,
                step=0.1,
                label="Correction γ",
                info="Subtracted from the logits of seen classes; 0 is off.",
                interactive=self.segmenter.has_correction,
                min_width=240,
                elem_id="az-gamma",
            )
            self.threshold = gr.Slider(
                0,
                1,
                self.segmenter.threshold,
                step=0.01,
                label="Threshold θ",
                info="Regions above this probability are corrected.",
                interactive=self.segmenter.has_correction,
                min_width=240,
                elem_id="az-threshold",
            )
        self.everything_else = gr.Checkbox(
            False,
            label="Add the class “everything else”",
            info="Regions that match none of the names stay grey.",
            elem_id="az-else",
        )
        self.sharp = gr.Checkbox(
            False,
            label="Sharper borders",
            info="Class borders are aligned with edges in the picture.",
            elem_id="az-sharp",
        )
        with gr.Row():
            self.label_file = gr.DownloadButton("Label PNG", interactive=False, size="md", elem_id="az-label-file")
            self.json_file = gr.DownloadButton("JSON", interactive=False, size="md", elem_id="az-json-file")
        with gr.Accordion("Segments and instances", open=False):
            with gr.Row():
                self.kind = gr.Radio(list(SEGMENTS), value=next(iter(SEGMENTS)), show_label=False, elem_id="az-kind")
                self.score = gr.Slider(0, 1, 0.5, step=0.01, label="Lowest score", elem_id="az-score")
            self.show = gr.Button("Show", size="md", elem_id="az-show")
            self.segments = gr.AnnotatedImage(show_label=False, elem_id="az-segments")

    def _connect(self) -> None:
        """Connects events with handlers."""
        settings = [self.gamma, self.threshold, self.everything_else, self.sharp]
        downloads = [self.label_file, self.json_file]
        inputs, outputs = [self.picture, self.names, self.marked, *settings], [self.result, self.viewer]
        run = {"concurrency_id": "network", "concurrency_limit": 1, "api_visibility": "private"}
        quick = {"queue": False, "show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
        files = {**quick, "queue": True, "concurrency_limit": 4}

        self.show.click(
            self.show_segments,
            [self.result, self.kind, self.score, self.gamma, self.threshold],
            self.segments,
            api_visibility="private",
        )
        self.names.input(self.update_marks, [self.names, self.marked], self.marked, **quick)
        self.vocabulary.click(self.use_vocabulary, None, [self.names, self.marked], **quick)
        moves = [control.change for control in settings]
        gr.on(
            [self.start.click, self.names.submit, self.find.click, *moves],
            None,
            None,
            downloads,
            js=_DISABLE,
            api_visibility="private",
        )
        events = [
            gr.on(
                [self.start.click, self.names.submit],
                self.on_segment,
                inputs,
                outputs,
                show_progress_on=self.viewer,
                **run,
            ),
            self.find.click(
                self.on_find,
                [self.picture, self.drawing, self.names, self.marked, *settings],
                outputs,
                show_progress_on=self.viewer,
                **run,
            ),
            gr.on(moves, self.redraw, [self.result, *settings], self.viewer, **quick),
        ]
        if self.examples:
            chosen = self.gallery.click(
                self.choose_example,
                self.gallery,
                [self.picture, self.names, self.marked],
                **{**quick, "trigger_mode": "once"},
            )
            events.append(chosen.success(self.on_segment, inputs, outputs, show_progress_on=self.viewer, **run))
        for event in events:
            # After a failure the page keeps showing the previous result.
            for then in (event.success, event.failure):
                then(self.prepare_downloads, [self.result, *settings], downloads, **files)

    def _add_api(self) -> None:
        """The function that other programs call."""
        with gr.Row(visible=False):
            gr.on(
                [],
                self.segment,
                [
                    Picture(label="image: the uploaded picture"),
                    NameList(label=f"class_names: 1 to {MAX_NAMES} names"),
                    NameList(label="unseen: the class_names that count as unseen"),
                    gr.Number(label="gamma: correction, 0 switches it off; default: the checkpoint's"),
                    gr.Number(label="threshold: 0 to 1; default: the checkpoint's"),
                    gr.Checkbox(False, label="everything_else: regions that match no name get 255"),
                ],
                [
                    gr.File(label="labels: palette PNG, values are indices into class_names"),
                    gr.File(label="overlay: the picture blended with the colours of its classes"),
                    gr.JSON(label="result: size, settings, and coverage and confidence of every class"),
                ],
                api_name="segment",
                api_description="Segments a picture by class names.",
                concurrency_id="network",
                concurrency_limit=1,
            )

    # --- event handlers

    @answering
    def update_marks(self, text: str, marked: list[str]) -> Any:
        try:
            names = list(check_classes(split_names(text)))
        except Refused:  # the user is still typing
            return gr.skip()
        return gr.update(choices=names, value=[name for name in marked if name in names])

    @answering
    def choose_example(self, index: int) -> tuple[str, str, Any]:
        example = self.examples[index]
        return (
            str(EXAMPLES / example["file"]),
            ", ".join(example["classes"]),
            gr.update(choices=example["classes"], value=example["unseen"]),
        )

    def use_vocabulary(self) -> tuple[str, Any]:
        classes = self.segmenter.classes
        return ", ".join(classes), gr.update(choices=classes, value=self.segmenter.unseen)

    @answering
    def on_segment(
        self,
        picture: str | None,
        text: str,
        marked: list[str],
        gamma: float,
        threshold: float,
        everything_else: bool,
        sharp: bool,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - gradio's way to pass it
    ) -> tuple[Result, dict[str, Any]]:
        image = open_picture(picture)
        classes = check_classes(split_names(text))
        unseen = check_unseen([name for name in marked if name in classes], list(classes))
        result, upright = self.segmenter.run(image, classes, unseen, lambda share, step: progress(share, desc=step))
        return self.present(result, upright, gamma, threshold, everything_else, sharp)

    @answering
    def on_find(
        self, picture: str | None, drawing: Any, text: str, marked: list[str], *settings: Any
    ) -> tuple[Result, dict[str, Any]]:
        try:
            image, exemplar = open_picture(picture), self.segmenter.read_exemplar(drawing)
        finally:
            parts = drawing or {}
            for file in (parts.get("background"), parts.get("composite"), *(parts.get("layers") or [])):
                if file and Path(file).name.startswith(_SKETCH):
                    Path(file).unlink(missing_ok=True)
                    self.drawing.temp_files.discard(file)
        classes = check_classes(split_names(text)) if text.strip() else {}
        if EXAMPLE_NAME in classes:
            raise Refused(f"“{EXAMPLE_NAME}” is the name of what you painted. Remove it from the class names.")
        if not classes and not settings[2]:  # everything_else
            raise Refused("Enter class names beside the example, or add the class “everything else”.")
        unseen = check_unseen([name for name in marked if name in classes], list(classes))
        return self.present(*self.segmenter.run(image, classes, unseen, lambda *_: None, exemplar), *settings)

    def present(self, result: Result, upright: Image.Image, *settings: Any) -> tuple[Result, dict[str, Any]]:
        result.shown = result.folder / ("picture.png" if max(upright.size) < 320 else "picture.jpg")
        upright.resize(result.size_within(VIEW_SIDE)[::-1], Image.Resampling.BILINEAR, reducing_gap=2.0).save(
            result.shown, quality=90
        )
        self.segmenter.keep(result)
        return result, self.redraw(result, *settings)

    @answering
    def redraw(self, result: Result | None, gamma: float, threshold: float, everything_else: bool, sharp: bool) -> Any:
        if result is None:
            return gr.skip()
        result.settings = (gamma, threshold, everything_else, sharp)
        return view_data(self.segmenter, result, *result.settings)

    @answering
    def show_segments(self, result: Result | None, kind: str, score: float, gamma: float, threshold: float) -> Any:
        if result is None:
            raise Refused("Press Segment first.")
        if kind not in SEGMENTS:
            raise Refused(f"The kind of segments must be one of {', '.join(SEGMENTS)}.")
        return str(result.shown), self.segmenter.read_segments(result, kind, score, gamma, threshold)

    @answering
    def prepare_downloads(
        self, result: Result | None, gamma: float, threshold: float, everything_else: bool, sharp: bool
    ) -> Any:
        time.sleep(REST)
        settings = (gamma, threshold, everything_else, sharp)
        if result is None or result.settings != settings:  # a slider is still moving
            return gr.skip()
        reading = self.segmenter.read(result, result.size, *settings)
        if result.settings != settings:
            return gr.skip()
        folder = Path(tempfile.mkdtemp(dir=result.folder))  # not over the files of other settings
        label, data = folder / "labels.png", folder / "segmentation.json"
        write_label_png(label, reading.labels, result.colors)
        facts = report(self.segmenter, result, reading, gamma, threshold, everything_else)
        data.write_text(json.dumps(facts, indent=2, ensure_ascii=False), encoding="utf-8")
        return gr.update(value=str(label), interactive=True), gr.update(value=str(data), interactive=True)

    @answering
    def segment(
        self,
        image: str,
        class_names: list[str],
        unseen: list[str] | None = None,
        gamma: float | None = None,
        threshold: float | None = None,
        everything_else: bool = False,
    ) -> tuple[str, str, dict[str, Any]]:
        picture = open_picture(image)
        classes = check_classes(class_names)
        marks = check_unseen(unseen, list(classes))
        gamma = check_number("gamma", gamma, self.segmenter.gamma, 100.0)
        threshold = check_number("threshold", threshold, self.segmenter.threshold, 1.0)
        result, upright = self.segmenter.run(picture, classes, marks, lambda *_: None)
        reading = self.segmenter.read(result, result.size, gamma, threshold, bool(everything_else))
        folder = Path(tempfile.mkdtemp(prefix="alignzeg-", dir=get_upload_folder()))
        write_label_png(folder / "labels.png", reading.labels, result.colors)
        self.segmenter.draw_overlay(upright, reading.labels, result.names, legend=False).save(
            folder / "overlay.jpg", quality=90
        )
        facts = report(self.segmenter, result, reading, gamma, threshold, bool(everything_else))
        return str(folder / "labels.png"), str(folder / "overlay.jpg"), facts


def build(segmenter: Segmenter) -> gr.Blocks:
    """The page and its API."""
    return Page(segmenter).build()


# In the browser: disables the downloads, which belong to the previous result, until new ones are written.
_DISABLE = "() => Array(2).fill({ __type__: 'update', value: null, interactive: false })"


def launch_options(mcp: bool = False) -> dict[str, Any]:
    """Arguments of `launch`: safe defaults, and no resources from other servers; `mcp` offers the API as an MCP tool too."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    return {
        "theme": gr.themes.Soft(
            primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "Consolas", "monospace"]
        ),
        "css": (HERE / "style.css").read_text(encoding="utf-8"),
        "allowed_paths": [str(EXAMPLES)],
        "max_file_size": MAX_FILE_BYTES,
        "show_error": False,
        "state_session_capacity": 200,
        "footer_links": ["api", "gradio", "settings"],
        "run_history": False,
        "enable_monitoring": False,
        "mcp_server": mcp,
        "ssr_mode": False,
        "share": False,
    }


# --- start -------------------------------------------------------------------------------------------------------


def default_model() -> str:
    """ALIGNZEG_MODEL, or a checkpoint of the clone around this folder, that for photographs first, or the first model in
    README.md."""
    if os.environ.get("ALIGNZEG_MODEL"):
        return os.environ["ALIGNZEG_MODEL"]
    for folder in (HERE.parent / "checkpoints" / "photos", HERE.parent):
        config = folder / "config.json"
        if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("model_type") == "alignzeg":
            return str(folder)
    match = re.search(r"^models:\s*\n\s*-\s*(\S+)", (HERE / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise ValueError("README.md lists no model: pass --model.")
    return match[1]


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if args.mcp and importlib.util.find_spec("mcp") is None:
        sys.exit(
            "app.py: --mcp needs the package mcp, which is not installed: pip install 'gradio[mcp]', or leave it off."
        )
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    model = args.model or default_model()
    try:
        segmenter = Segmenter(model)
    except (OSError, ValueError) as error:
        sys.exit(f"app.py: the model {model!r} cannot be loaded: {error}")
    demo = build(segmenter).queue(max_size=QUEUE_SIZE, default_concurrency_limit=1)
    demo.launch(server_name=args.host, server_port=args.port, **launch_options(args.mcp))


if __name__ == "__main__":
    main()
