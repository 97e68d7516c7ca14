#!/usr/bin/env python
# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The demo of AlignZeg: zero-shot segmentation in a browser, and the same function as an API.

    python app/app.py                       # the checkpoint of this clone
    python app/app.py --model ID_OR_FOLDER  # or the environment variable ALIGNZEG_MODEL

Read top to bottom: limits, reading what strangers send, the model, what the page is told, the page. The network runs
when somebody presses Segment; what it said stays with that visitor, so that the sliders only read it out again.
"""

from __future__ import annotations

import argparse
import base64
import functools
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
# Gradio keeps the times of 10,000 calls in memory and sums all of them up after every call.
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "100")
os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", "100")

import gradio as gr
import numpy as np
import torch
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
VIEW_SIDE = 1024  # the page shows no more pixels of a picture than this on a side; downloads have all
VIEW_LABELS = 512  # and no more of a label map,
VIEW_DETAIL = 8  # nor more than this for a cell of the masks, which are resized bilinearly
REST = 0.3  # seconds after the last move of a slider, when the downloads are made
KEPT_BYTES = 2**30  # of network outputs, for all visitors together
QUEUE_SIZE = 64
NOTHING, NOTHING_NAME, NOTHING_COLOR = 255, "everything else", (120, 120, 120)

logger = logging.getLogger("alignzeg.app")


class Refused(ValueError):
    """What somebody sent cannot be used; the message is a sentence for them."""


# --- what strangers send -----------------------------------------------------------------------------------------


def split_names(text: str | None) -> list[str]:
    """Class names from text: one per line, or with commas. Blank lines and a comma at the end of a line are forgiven.

    Raises:
        Refused: it is no text, or longer than `MAX_TEXT_LENGTH`.
    """
    text = text or ""
    if not isinstance(text, str):
        raise Refused("The class names must be text, with commas between them.")
    if len(text) > MAX_TEXT_LENGTH:
        raise Refused(f"The class names are {len(text):,} characters long; at most {MAX_TEXT_LENGTH:,} are allowed.")
    lines = [line.strip().removesuffix(",") for line in text.splitlines() if line.strip()]
    return [name for line in lines for name in line.split(",")]


def check_names(names: Any) -> list[str]:
    """Class names as they are shown and used: one space between words, no control or direction characters.

    Raises:
        Refused: there are none or too many, or one is empty, too long, no text, or occurs twice.
    """
    if not isinstance(names, (list, tuple)):
        raise Refused("The class names must be a list of texts.")
    if not names:
        raise Refused("There are no class names. Write at least one, such as “grass, water, red striped”.")
    if len(names) > MAX_NAMES:
        raise Refused(f"There are {len(names):,} class names; at most {MAX_NAMES} are allowed.")
    cleaned: dict[str, int] = {}
    for position, name in enumerate(names, 1):
        if not isinstance(name, str):
            raise Refused(f"Class name {position} is no text.")
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
            raise Refused(f"Class name {position} is empty. Remove the extra comma, or write a name there.")
        if text in cleaned:
            raise Refused(f"Class names {cleaned[text]} and {position} are both “{text}”. Remove one of them.")
        cleaned[text] = position
    return list(cleaned)


_DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # they could rearrange the page's text


def check_unseen(unseen: Any, names: list[str]) -> list[bool]:
    """For each of `names`, whether it is among the texts of `unseen`.

    Raises:
        Refused: `unseen` holds something that is not among the names.
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
        Refused: it is no number from 0 to `largest`.
    """
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= largest:
        raise Refused(f"{name} is {str(value)[:40]}; it must be a number from 0 to {largest:g}.")
    return float(value)


def open_picture(path: str | None) -> Image.Image:
    """An uploaded picture, its header read and its pixels not yet decoded.

    Raises:
        Refused: there is none, it is no file that was uploaded, empty, no picture, or too large.
    """
    if not path:
        raise Refused("There is no picture yet. Upload, paste or take one, or choose an example.")
    if not isinstance(path, (str, Path)) or "\0" in str(path):
        raise Refused("The picture must be uploaded; this is the path of no file.")
    file = Path(path).resolve()
    if not file.is_relative_to(Path(get_upload_folder()).resolve()) or not file.is_file():
        raise Refused("The picture must be uploaded; a path or an address is not opened.")
    size = file.stat().st_size
    if size == 0:
        raise Refused("The file is empty (0 bytes). Save or download it again.")
    if size > MAX_FILE_BYTES:
        raise Refused(f"The file has {size / 2**20:.0f} MB; at most {MAX_FILE_BYTES // 2**20} MB are allowed.")
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise Refused(
            "The file is no picture, or of an unknown kind. PNG, JPEG, WebP, GIF, BMP and TIFF work."
        ) from None
    except Image.DecompressionBombError:
        raise Refused(_TOO_LARGE.format("far too many")) from None
    except Exception as error:  # headers on which PIL's plug-ins stumble
        logger.info("unreadable upload: %r", error)
        raise Refused("The file is damaged: it cannot be read as a picture. Save it again.") from None
    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
        raise Refused(_TOO_LARGE.format(f"{image.width:,} × {image.height:,}"))
    return image


_TOO_LARGE = (
    f"The picture has {{}} pixels; at most {MAX_PIXELS / 1e6:.0f} million, and {MAX_SIDE:,} on a side, are allowed. "
    "Scale it down first."
)


# --- the model ---------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Result:
    """What the network said about one picture of one visitor. Everything that the page shows is read out from it.

    Attributes:
        names: the class names.
        unseen: for each, whether it counts as unseen.
        colors: `uint8 (classes, 3)`.
        size: height and width of the upright picture.
        outputs: the network's outputs as far as post-processing reads them, on the CPU; `None` once forgotten.
        folder: holds the files of this result; goes with it.
        shown: the file that the page shows.
        settings: the correction's settings that the page shows.
        cache: what no slider changes.
    """

    names: list[str]
    unseen: list[bool]
    colors: np.ndarray
    size: tuple[int, int]
    outputs: SimpleNamespace | None
    folder: Path
    shown: Path | None = None
    settings: tuple[float, float, bool] | None = None
    cache: dict[Any, Any] = field(default_factory=dict)

    def size_within(self, side: float) -> tuple[int, int]:
        """Height and width of the picture when neither may exceed `side`."""
        scale = min(1.0, side / max(self.size))
        return max(1, round(self.size[0] * scale)), max(1, round(self.size[1] * scale))

    @property
    def label_size(self) -> tuple[int, int]:
        """Height and width of the label maps on the page: as fine as the masks are worth."""
        return self.size_within(min(VIEW_LABELS, VIEW_DETAIL * max(self.outputs.masks_queries_logits.shape[2:])))

    @property
    def num_bytes(self) -> int:
        """Of the outputs."""
        tensors = vars(self.outputs).values() if self.outputs else ()
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass(frozen=True)
class Reading:
    """A label map and what it says.

    Attributes:
        labels: `uint8 (height, width)`: positions in the names, or `NOTHING`.
        rows: `(id, coverage, confidence)` of every class that occurs, the largest first. The confidence is the mean
            chance, from 0 to 1, that the proposals at its pixels give to the class.
    """

    labels: np.ndarray
    rows: list[tuple[int, float, float]]


class Segmenter:
    """A checkpoint, and how the demo uses it."""

    def __init__(self, model: str) -> None:
        folder = Path(model).resolve()  # its place on this machine is nobody's business
        self.title = model if not folder.is_dir() else "this repository" if folder == HERE.parent else folder.name
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = AutoModel.from_pretrained(model, trust_remote_code=True).to(self.device).eval()
        self.processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
        config = self.model.config
        self.classes = [config.id2label[i] for i in range(config.num_labels)]
        self.unseen = [name for name in config.unseen_labels or [] if name in self.classes]
        image_processor = self.processor.image_processor
        self.gamma, self.threshold = image_processor.correction_gamma, image_processor.correction_threshold
        self.has_correction = bool(config.bias_correction)
        self.max_gamma = max(10.0, math.ceil(2 * self.gamma))
        self._kept: deque[weakref.ref[Result]] = deque()
        self._lock = threading.Lock()

    @torch.no_grad()
    def run(
        self, image: Image.Image, names: list[str], unseen: list[bool], progress: Callable[[float, str], Any]
    ) -> tuple[Result, Image.Image]:
        """Runs the network.

        Args:
            image: from [`open_picture`].
            names, unseen: from [`check_names`] and [`check_unseen`].
            progress: is told how far it is, 0 to 1, and what comes next.

        Returns:
            What it said, and the upright RGB picture.

        Raises:
            Refused: the picture cannot be decoded.
        """
        progress(0.05, "Reading the picture")
        image = self._upright(image)
        progress(0.2, f"Reading {len(names)} class name{'s' if len(names) > 1 else ''}")
        prototypes = self.model.get_text_prototypes(self.processor, names)
        progress(0.5, "Looking for regions")
        inputs = self.processor(images=image, return_tensors="pt").to(self.device)
        seen = torch.tensor([not mark for mark in unseen], device=self.device)
        outputs = self.model(**inputs, text_prototypes=prototypes, seen_class_mask=seen)
        progress(0.9, "Drawing")
        read = ("masks_queries_logits", "class_queries_logits", "unseen_logits", "seen_class_mask", "content_sizes")
        found = {name: getattr(outputs, name, None) for name in read}
        kept = SimpleNamespace(**{name: value if value is None else value.cpu() for name, value in found.items()})
        folder = Path(tempfile.mkdtemp(prefix="alignzeg-", dir=get_upload_folder()))
        result = Result(names, unseen, self.processor.class_colors(names), (image.height, image.width), kept, folder)
        weakref.finalize(result, shutil.rmtree, folder, ignore_errors=True)
        return result, image

    def _upright(self, image: Image.Image) -> Image.Image:
        """The picture as the model sees it, at its own size: upright, 8 bits, without transparency."""
        as_it_is = {"do_resize": False, "do_rescale": False, "do_normalize": False, "do_pad": False}
        try:
            pixels = self.processor(images=image, return_tensors="np", **as_it_is)["pixel_values"][0]
        except ValueError as error:
            logger.info("undecodable upload: %s", error)
            raise Refused("The picture is damaged or cut off: it cannot be decoded. Save it again.") from None
        return Image.fromarray(np.rint(pixels).astype(np.uint8).transpose(1, 2, 0))

    def keep(self, result: Result) -> None:
        """Bounds the memory that all visitors' results take together; the oldest are forgotten."""
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
        self, result: Result, size: tuple[int, int], gamma: float, threshold: float, everything_else: bool
    ) -> Reading:
        """The label map of `size` (height, width) and its classes. No network runs.

        Raises:
            Refused: the result has been forgotten.
        """
        outputs = result.outputs
        if outputs is None:
            raise Refused("This result has been forgotten, because many people use the demo. Press Segment again.")
        options = {
            "gamma": gamma if self.has_correction else 0.0,
            "threshold": threshold,
            "none_of_these": everything_else,
            "none_index": NOTHING,
        }
        labels = self.processor.post_process_semantic_segmentation(outputs, [size], **options)[0].byte().numpy()
        coarse = self.processor.post_process_semantic_segmentation(outputs, None, True, **options)[0]
        scores = coarse["segmentation_scores"].numpy()  # (classes, h, w)
        if "weight" not in result.cache:
            result.cache["weight"] = outputs.masks_queries_logits[0].float().sigmoid().sum(0).clamp(min=1e-12).numpy()
        chances = scores / result.cache["weight"]
        chances = np.concatenate([chances, 1 - chances.sum(0, keepdims=True)])  # the last one: none of the classes

        y, x = (
            ((np.arange(length) + 0.5) * (content / length)).astype(np.int32).clip(0, cells - 1)
            for length, content, cells in zip(size, outputs.content_sizes[0].tolist(), scores.shape[1:])
        )
        channels = np.arange(256, dtype=np.int32)
        channels[NOTHING] = len(result.names)
        places = channels[labels] * (scores.shape[1] * scores.shape[2]) + y[:, None] * scores.shape[2] + x
        counts = np.bincount(labels.ravel(), minlength=256)
        sums = np.bincount(labels.ravel(), chances.ravel()[places.ravel()], 256)
        rows = [
            (int(i), float(counts[i] / labels.size), float(np.clip(sums[i] / counts[i], 0, 1)))
            for i in counts.nonzero()[0]
        ]
        return Reading(labels, sorted(rows, key=lambda row: -row[1]))

    def read_unseen_map(self, result: Result) -> np.ndarray | None:
        """How unseen each place looks, 0 to 1, at most 256 pixels on a side; `None` without PBC."""
        _, maps = self.processor.post_process_semantic_segmentation(
            result.outputs, [result.size_within(256)], gamma=0.0, return_unseen_scores=True
        )
        return None if maps is None else maps[0].numpy()


# --- what the page and the API are told --------------------------------------------------------------------------


def encode_runs(labels: np.ndarray) -> dict[str, str]:
    """A label map as runs of equal ids in reading order, for viewer.js."""
    flat = labels.ravel()
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    lengths = np.diff(np.append(starts, flat.size)).astype("<u4")
    return {"ids": encode_bytes(flat[starts]), "runs": encode_bytes(lengths)}


def encode_bytes(values: np.ndarray) -> str:
    """Base64 text."""
    return base64.b64encode(values.tobytes()).decode()


def view_data(
    segmenter: Segmenter, result: Result, gamma: float, threshold: float, everything_else: bool
) -> dict[str, Any]:
    """Everything that viewer.js draws, as JSON."""
    size = result.label_size
    extra = len(result.names)  # the id of "everything else" in the page

    def tell(reading: Reading) -> dict[str, Any]:
        labels = np.where(reading.labels == NOTHING, np.uint8(extra), reading.labels)
        return {
            "labels": encode_runs(labels),
            "rows": [(extra if i == NOTHING else i, *rest) for i, *rest in reading.rows],
        }

    if ("plain", everything_else) not in result.cache:
        result.cache["plain", everything_else] = tell(segmenter.read(result, size, 0.0, threshold, everything_else))
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
    plain = result.cache["plain", everything_else]
    is_corrected = gamma > 0 and segmenter.has_correction and any(result.unseen)
    classes = [
        {"name": name, "unseen": mark, "color": color}
        for name, mark, color in zip(result.names, result.unseen, result.colors.tolist())
    ]
    classes.append({"name": NOTHING_NAME, "unseen": False, "color": NOTHING_COLOR, "extra": True})
    hint = ""
    if not segmenter.has_correction:
        hint = "This checkpoint was trained without bias correction; the sliders have no effect."
    elif not any(result.unseen):
        hint = "No class is marked as unseen, so there is nothing to correct. Mark some and press Segment again."
    return {
        "picture": {"path": str(result.shown), "meta": {"_type": "gradio.FileData"}},
        "small": max(result.size) < 320,
        "width": size[1],
        "height": size[0],
        "classes": classes,
        "plain": plain,
        "corrected": tell(segmenter.read(result, size, gamma, threshold, everything_else)) if is_corrected else plain,
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
    """The JSON that can be downloaded and that the API returns."""
    found = {i: rest for i, *rest in reading.rows}
    marks = [*zip(range(len(result.names)), result.names, result.unseen, result.colors.tolist())]
    if everything_else:
        marks.append((NOTHING, NOTHING_NAME, False, NOTHING_COLOR))
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
    """A palette PNG whose values are positions in the class names, or `NOTHING`."""
    picture = Image.fromarray(labels)
    palette = np.full((256, 3), NOTHING_COLOR, np.uint8)
    palette[: len(colors)] = colors
    picture.putpalette(palette.flatten().tolist())
    picture.save(path, compress_level=3)


def draw_overlay(image: Image.Image, labels: np.ndarray, colors: np.ndarray) -> Image.Image:
    """The picture under the colours of its label map, with white borders."""
    palette = np.full((256, 3), NOTHING_COLOR, np.uint8)
    palette[: len(colors)] = colors
    mixed = Image.blend(image, Image.fromarray(palette[labels]), 0.55)
    border = np.zeros(labels.shape, bool)
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    border[1:] |= labels[1:] != labels[:-1]
    mixed.paste("white", mask=Image.fromarray(border))
    return mixed


def answering(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turns every failure of `function` into a sentence for people; a traceback goes to the log at most."""

    @functools.wraps(function)
    def answer(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Refused as error:
            raise gr.Error(_as_text(str(error)), print_exception=False) from None
        except Exception:
            logger.exception("%s failed", function.__name__)
            message = "Something broke on our side, not yours. Please try again, or with a smaller picture."
            raise gr.Error(message, print_exception=False) from None

    return answer


def _as_text(message: str) -> str:
    """The page's messages may hold markup, so quoted names must not."""
    return message.replace("<", "‹").replace(">", "›").replace("&", "＆")


# --- the page ----------------------------------------------------------------------------------------------------


class Picture(gr.Image):
    """A picture that reaches the function as the path of an upload, unopened: gr.Image would decode it first."""

    is_template = True

    def preprocess(self, payload: Any) -> str | None:
        return getattr(payload, "path", None)

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        """Addresses are refused, which gr.Image would download."""
        if str(url_or_file_path).lower().startswith(("http:", "https:")):
            raise gr.Error("Send the picture itself, not its address.", print_exception=False)
        return await super().async_move_resource_to_block_cache(url_or_file_path)


class Marks(gr.CheckboxGroup):
    """Check boxes that accept any name; the function checks them against the names that came with them."""

    is_template = True

    def preprocess(self, payload: Any) -> list[str]:
        return payload if isinstance(payload, list) else []


class NameList(gr.Textbox):
    """A list of names in the API; never shown."""

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


def load_examples() -> list[dict[str, Any]]:
    """`{"file", "classes", "unseen"}` of every example."""
    file = EXAMPLES / "examples.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def build(segmenter: Segmenter) -> gr.Blocks:
    """The page and its API."""
    examples = load_examples()

    @answering
    def update_marks(text: str, marked: list[str]) -> Any:
        try:
            names = check_names(split_names(text))
        except Refused:  # somebody is still typing
            return gr.skip()
        return gr.update(choices=names, value=[name for name in marked if name in names])

    @answering
    def choose_example(index: int) -> tuple[str, str, Any]:
        example = examples[index]
        return (
            str(EXAMPLES / example["file"]),
            ", ".join(example["classes"]),
            gr.update(choices=example["classes"], value=example["unseen"]),
        )

    def use_vocabulary() -> tuple[str, Any]:
        return ", ".join(segmenter.classes), gr.update(choices=segmenter.classes, value=segmenter.unseen)

    @answering
    def on_segment(
        picture: str | None,
        text: str,
        marked: list[str],
        gamma: float,
        threshold: float,
        everything_else: bool,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how gradio hands it over
    ) -> tuple[Result, dict[str, Any]]:
        image = open_picture(picture)
        names = check_names(split_names(text))
        unseen = check_unseen([name for name in marked if name in names], names)
        result, upright = segmenter.run(image, names, unseen, lambda share, step: progress(share, desc=step))
        result.shown = result.folder / ("picture.png" if max(upright.size) < 320 else "picture.jpg")
        upright.resize(result.size_within(VIEW_SIDE)[::-1], Image.Resampling.BILINEAR, reducing_gap=2.0).save(
            result.shown, quality=90
        )
        segmenter.keep(result)
        return result, redraw(result, gamma, threshold, everything_else)

    @answering
    def redraw(result: Result | None, gamma: float, threshold: float, everything_else: bool) -> Any:
        if result is None:
            return gr.skip()
        result.settings = (gamma, threshold, everything_else)
        return view_data(segmenter, result, *result.settings)

    @answering
    def prepare_downloads(result: Result | None, gamma: float, threshold: float, everything_else: bool) -> Any:
        time.sleep(REST)
        settings = (gamma, threshold, everything_else)
        if result is None or result.settings != settings:  # a slider still moves
            return gr.skip()
        reading = segmenter.read(result, result.size, *settings)
        label, data = result.folder / "labels.png", result.folder / "segmentation.json"
        write_label_png(label, reading.labels, result.colors)
        facts = report(segmenter, result, reading, *settings)
        data.write_text(json.dumps(facts, indent=2, ensure_ascii=False), encoding="utf-8")
        return gr.update(value=str(label), interactive=True), gr.update(value=str(data), interactive=True)

    @answering
    def segment(
        image: str,
        class_names: list[str],
        unseen: list[str] | None = None,
        gamma: float | None = None,
        threshold: float | None = None,
        everything_else: bool = False,
    ) -> tuple[str, str, dict[str, Any]]:
        picture = open_picture(image)
        names = check_names(class_names)
        marks = check_unseen(unseen, names)
        gamma = check_number("gamma", gamma, segmenter.gamma, 100.0)
        threshold = check_number("threshold", threshold, segmenter.threshold, 1.0)
        result, upright = segmenter.run(picture, names, marks, lambda *_: None)
        reading = segmenter.read(result, result.size, gamma, threshold, bool(everything_else))
        folder = Path(tempfile.mkdtemp(prefix="alignzeg-", dir=get_upload_folder()))
        write_label_png(folder / "labels.png", reading.labels, result.colors)
        draw_overlay(upright, reading.labels, result.colors).save(folder / "overlay.jpg", quality=90)
        facts = report(segmenter, result, reading, gamma, threshold, bool(everything_else))
        return str(folder / "labels.png"), str(folder / "overlay.jpg"), facts

    with gr.Blocks(title="AlignZeg", analytics_enabled=False, delete_cache=(600, 3600)) as demo:
        result = gr.State(time_to_live=3600)
        gr.Markdown(
            "# AlignZeg: segment by names\n"
            "Type any class names and get a segmentation. **Unseen** are the classes whose pixels were never labelled in "
            "training: a model tends to give their regions to classes that it knows better. AlignZeg estimates where this "
            "happens, and corrects it.",
            elem_classes="az-intro",
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                picture = Picture(
                    label="Picture",
                    sources=["upload", "clipboard", "webcam"],
                    height=300,
                    buttons=["fullscreen"],
                    elem_id="az-input",
                )
                if examples:
                    gallery = gr.Dataset(
                        components=[gr.Image(visible=False)],
                        samples=[[str(EXAMPLES / example["file"])] for example in examples],
                        label="Examples: scenes with unseen classes",
                        type="index",
                        samples_per_page=len(examples),
                        elem_id="az-examples",
                    )
                names = gr.Textbox(
                    label="Class names",
                    info="With commas, or one per line. Enter starts, Shift+Enter makes a new line.",
                    placeholder="grass, water, red striped",
                    lines=1,
                    max_lines=6,
                    elem_id="az-names",
                )
                marked = Marks(
                    label="Which of them count as unseen?", choices=[], elem_id="az-unseen", elem_classes="az-marks"
                )
                with gr.Row():
                    vocabulary = gr.Button(f"All {len(segmenter.classes)} classes", size="md", min_width=120)
                    start = gr.Button("Segment", variant="primary", size="md", min_width=120, elem_id="az-start")
            with gr.Column(scale=3, min_width=320):
                viewer = gr.HTML(
                    html_template=(HERE / "viewer.html").read_text(encoding="utf-8"),
                    js_on_load=(HERE / "viewer.js").read_text(encoding="utf-8"),
                    apply_default_css=False,
                    container=True,
                    padding=True,
                    min_height=300,
                    elem_id="az-viewer",
                )
                with gr.Row():
                    gamma = gr.Slider(
                        0,
                        segmenter.max_gamma,
                        segmenter.gamma,
                        step=0.1,
                        label="Correction γ",
                        info="How far seen classes are lowered; 0 is off.",
                        interactive=segmenter.has_correction,
                        min_width=240,
                        elem_id="az-gamma",
                    )
                    threshold = gr.Slider(
                        0,
                        1,
                        segmenter.threshold,
                        step=0.01,
                        label="Threshold θ",
                        info="From which chance on a region is corrected.",
                        interactive=segmenter.has_correction,
                        min_width=240,
                        elem_id="az-threshold",
                    )
                everything_else = gr.Checkbox(
                    False,
                    label="“Everything else” is a class too",
                    info="Places that resemble none of the names stay grey.",
                    elem_id="az-else",
                )
                with gr.Row():
                    label_file = gr.DownloadButton("Label PNG", interactive=False, size="md", elem_id="az-label-file")
                    json_file = gr.DownloadButton("JSON", interactive=False, size="md", elem_id="az-json-file")
        gr.Markdown(f"Model: `{segmenter.title}`. The same function works from Python: see “Use via API”.")

        settings = [gamma, threshold, everything_else]
        downloads = [label_file, json_file]
        inputs, outputs = [picture, names, marked, *settings], [result, viewer]
        run = {"concurrency_id": "network", "concurrency_limit": 1, "api_visibility": "private"}
        quick = {"queue": False, "show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
        files = {**quick, "queue": True, "concurrency_limit": 4}

        names.input(update_marks, [names, marked], marked, **quick)
        vocabulary.click(use_vocabulary, None, [names, marked], **quick)
        moves = [control.change for control in settings]
        gr.on([start.click, names.submit, *moves], None, None, downloads, js=_DISABLE, api_visibility="private")
        events = [
            gr.on([start.click, names.submit], on_segment, inputs, outputs, show_progress_on=viewer, **run),
            gr.on(moves, redraw, [result, *settings], viewer, **quick),
        ]
        if examples:
            chosen = gallery.click(
                choose_example, gallery, [picture, names, marked], **{**quick, "trigger_mode": "once"}
            )
            events.append(chosen.success(on_segment, inputs, outputs, show_progress_on=viewer, **run))
        for event in events:
            for then in (event.success, event.failure):  # after a failure the page still shows the result before
                then(prepare_downloads, [result, *settings], downloads, **files)

        with gr.Row(visible=False):
            gr.on(
                [],
                segment,
                [
                    Picture(label="image: the picture, uploaded"),
                    NameList(label=f"class_names: 1 to {MAX_NAMES} names"),
                    NameList(label="unseen: those of them that count as unseen"),
                    gr.Number(label="gamma: correction, 0 switches it off; default: the checkpoint's"),
                    gr.Number(label="threshold: 0 to 1; default: the checkpoint's"),
                    gr.Checkbox(False, label="everything_else: places that resemble no name get 255"),
                ],
                [
                    gr.File(label="labels: palette PNG, values are positions in class_names"),
                    gr.File(label="overlay: the picture under the classes' colours"),
                    gr.JSON(label="result: size, settings, and coverage and confidence of every class"),
                ],
                api_name="segment",
                api_description="Segments a picture by class names.",
                concurrency_id="network",
                concurrency_limit=1,
            )
    return demo


# In the browser: the downloads belong to what was shown before, until new ones are made.
_DISABLE = "() => Array(2).fill({ __type__: 'update', value: null, interactive: false })"


def launch_options() -> dict[str, Any]:
    """Arguments of `launch` that make the demo safe by default and whole without internet."""
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
        "mcp_server": False,
        "ssr_mode": False,
        "share": False,
    }


# --- start -------------------------------------------------------------------------------------------------------


def default_model() -> str:
    """ALIGNZEG_MODEL; else the clone around this folder, if it holds a checkpoint; else README's first model."""
    if os.environ.get("ALIGNZEG_MODEL"):
        return os.environ["ALIGNZEG_MODEL"]
    config = HERE.parent / "config.json"
    if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("model_type") == "alignzeg":
        return str(HERE.parent)
    match = re.search(r"^models:\s*\n\s*-\s*(\S+)", (HERE / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise ValueError("README.md names no model: pass --model.")
    return match[1]


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", help="AlignZeg checkpoint: a folder or a hub id; its code is run")
    options.add_argument("--host", help="address to listen on; default: this machine only")
    options.add_argument("--port", type=int, help="default: the first free one from 7860")
    args = options.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    model = args.model or default_model()
    try:
        segmenter = Segmenter(model)
    except (OSError, ValueError) as error:
        sys.exit(f"app.py: the model {model!r} cannot be loaded: {error}")
    demo = build(segmenter).queue(max_size=QUEUE_SIZE, default_concurrency_limit=1)
    demo.launch(server_name=args.host, server_port=args.port, **launch_options())


if __name__ == "__main__":
    main()
