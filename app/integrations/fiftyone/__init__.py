# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""AlignZeg as a model of FiftyOne's zoo: semantic segmentation by class names.

FiftyOne copies this folder to its model zoo, so it imports nothing else of this repository. See docs/integrations.md.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from transformers import AutoModel, AutoProcessor

import fiftyone as fo


MANIFEST = Path(__file__).parent / "manifest.json"
CHECKPOINTS = {"alignzeg-photos": "checkpoints/photos"}  # zoo model: its folder in the repository
CODE = "modeling_alignzeg"
KEPT = (".json", ".safetensors", ".txt", ".md", ".py")  # files of a checkpoint; a clone also contains .venv and runs


def download_model(model_name: str, model_path: str) -> None:
    """Writes the checkpoint next to this file, with the code that loads it.

    It comes from the repository that was registered as the source, or from the environment variable ALIGNZEG_MODEL: a
    folder or a Hub id.

    Args:
        model_name: `base_name` in the manifest.
        model_path: Path of `base_filename`. It ends in `.zip`, although a folder without that ending is written: FiftyOne
            considers only files and unpacked archives as downloaded.

    Raises:
        ValueError: The name is unknown, or its source is unknown or contains no checkpoint.
    """
    place = _repository_folder(model_name)
    target = _checkpoint_folder(model_path)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        source = os.environ.get("ALIGNZEG_MODEL")
        if source:
            found = Path(source) if Path(source).is_dir() else _from_hub(source, Path(scratch) / "source")
        else:
            found = _from_repository(place, Path(scratch) / "source")
        if not (found / "config.json").is_file():
            raise ValueError(f"{source or place!r} is not a checkpoint: it has no config.json.")
        complete = Path(scratch) / "complete"
        complete.mkdir()
        for file in found.iterdir():
            if file.is_file() and file.suffix in KEPT:
                shutil.copy2(file, complete)
        code = found / CODE
        if code.is_file():  # what Git's link to a folder becomes in a zip archive
            code = found.parents[1] / CODE
        if code.is_dir():
            shutil.copytree(code, complete / CODE, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.rmtree(target, ignore_errors=True)
        complete.rename(target)


def load_model(
    model_name: str,
    model_path: str,
    classes: Iterable[str] | Mapping[str, Iterable[str]] | None = None,
    unseen_classes: Iterable[str] | None = None,
    none_of_these: bool = False,
    gamma: float | None = None,
    threshold: float | None = None,
    device: str | None = None,
) -> AlignZegSegmenter:
    """Loads a model with its classes; the arguments from `classes` on are those of `foz.load_zoo_model`.

    Args:
        model_name, model_path: As in [`download_model`].
        classes: Distinct class names, or a dictionary from names to phrases, `{"sofa": ["sofa", "couch"]}`. Default: the
            checkpoint's.
        unseen_classes: Those of the classes that count as unseen. Default: the checkpoint's for its own classes, none for
            others.
        none_of_these: Give pixels that resemble no class the value 0.
        gamma, threshold: Predictive bias correction; default: the checkpoint's.
        device: Default: a GPU if available.

    Raises:
        ValueError: An argument is invalid, or the model was not downloaded.
    """
    _repository_folder(model_name)
    folder = _checkpoint_folder(model_path)
    if not folder.is_dir():
        raise ValueError(f"{model_name!r} is not downloaded: there is no {folder}. Call download_zoo_model first.")
    settings = AlignZegSegmenterConfig(str(folder), classes, unseen_classes, none_of_these, gamma, threshold, device)
    return AlignZegSegmenter(settings)


@dataclass
class AlignZegSegmenterConfig:
    """Settings of [`AlignZegSegmenter`]: `model_path`, a checkpoint's folder or Hub id, and those of [`load_model`]."""

    model_path: str
    classes: Iterable[str] | Mapping[str, Iterable[str]] | None = None
    unseen_classes: Iterable[str] | None = None
    none_of_these: bool = False
    gamma: float | None = None
    threshold: float | None = None
    device: str | None = None

    def __post_init__(self):
        for name in ("classes", "unseen_classes"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, a string; expected a list of class names.")
        if not isinstance(self.none_of_these, bool):
            raise ValueError(f"`none_of_these` is {self.none_of_these!r}; expected True or False.")


class AlignZegSegmenter(fo.Model):
    """A FiftyOne model that returns one [`fiftyone.Segmentation`] per image.

    Pixel values of a mask are positions in `classes` plus 1, as in `mask_targets`; 0, FiftyOne's background, is a pixel
    that resembles no class.
    """

    media_type = "image"
    ragged_batches = False  # images of a batch may differ in size
    transforms = None
    preprocess = True

    def __init__(self, config: AlignZegSegmenterConfig):
        self.config = config
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
            raise ValueError(f"`device` is {device!r}, which cannot be used: {str(error).splitlines()[0]}") from None
        self._model = AutoModel.from_pretrained(config.model_path, trust_remote_code=True).eval().to(device)
        self._processor = AutoProcessor.from_pretrained(config.model_path, trust_remote_code=True)
        stored, classes, unseen = self._model.config, config.classes, config.unseen_classes
        if classes is None:
            self.classes = [stored.id2label[index] for index in range(stored.num_labels)]
            unseen = stored.unseen_labels if unseen is None else unseen
        else:
            classes = dict(classes) if isinstance(classes, Mapping) else list(classes)
            self.classes = list(classes)
        unseen = list(unseen or [])
        unknown = [name for name in unseen if name not in self.classes]
        if unknown:
            raise ValueError(
                f"`unseen_classes` contains {unknown[0]!r}, which is not among the {len(self.classes)} classes."
            )
        seen = torch.tensor([name not in unseen for name in self.classes], device=device)
        self._vocabulary = {"seen_class_mask": seen}
        if classes is not None:
            with torch.no_grad():
                self._vocabulary["text_prototypes"] = self._model.get_text_prototypes(self._processor, classes)

    @property
    def mask_targets(self) -> dict[int, str]:
        """Pixel values and their classes, for `dataset.mask_targets`."""
        return dict(enumerate(self.classes, start=1))

    def predict(self, arg: np.ndarray) -> fo.Segmentation:
        """Segments one image, uint8 (height, width, 3); see [`predict_all`]."""
        return self.predict_all([arg])[0]

    @torch.no_grad()
    def predict_all(self, args: Iterable[np.ndarray]) -> list[fo.Segmentation]:
        """Segments a batch of images.

        Args:
            args: uint8 arrays (height, width, 3); sizes may differ.

        Returns:
            For each image, a segmentation whose mask has its height and width, uint8, or uint16 for more than 255
            classes.

        Raises:
            ValueError: An image is not such an array.
        """
        images = list(args)
        for index, image in enumerate(images):
            is_array = isinstance(image, np.ndarray)
            if not is_array or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                kind = f"{image.dtype} array of shape {image.shape}" if is_array else type(image).__name__
                raise ValueError(f"`args[{index}]` is a {kind}; expected a uint8 array (height, width, 3).")
        if not images:
            return []
        inputs = self._processor(images=images, input_data_format="channels_last", return_tensors="pt")
        maps = self._processor.post_process_semantic_segmentation(
            self._model(**inputs.to(self._model.device), **self._vocabulary),
            target_sizes=[image.shape[:2] for image in images],
            none_of_these=self.config.none_of_these,
            gamma=self.config.gamma,
            threshold=self.config.threshold,
        )
        dtype = np.uint8 if len(self.classes) <= 255 else np.uint16
        return [fo.Segmentation(mask=(labels + 1).cpu().numpy().astype(dtype)) for labels in maps]


def _repository_folder(model_name: str) -> str:
    """The folder of a zoo model in the repository."""
    if model_name not in CHECKPOINTS:
        raise ValueError(f"`model_name` is {model_name!r}; expected one of {', '.join(CHECKPOINTS)}.")
    return CHECKPOINTS[model_name]


def _checkpoint_folder(model_path: str) -> Path:
    return Path(model_path).with_suffix("")


def _from_hub(model_id: str, folder: Path) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_id, local_dir=folder))
    except (OSError, ValueError) as error:  # huggingface_hub's errors are among these
        raise ValueError(
            f"ALIGNZEG_MODEL is {model_id!r}, but there is no such folder, and the Hub does not provide it ({error})."
        ) from error


def _from_repository(place: str, folder: Path) -> Path:
    """Downloads the registered source to `folder`; returns the path of `place` in it."""
    # `register_zoo_model_source` adds the URL to its copy of the manifest.
    url = json.loads(MANIFEST.read_text(encoding="utf-8")).get("url")
    if not url:
        raise ValueError(
            f"{MANIFEST} contains no URL, because this folder was copied by hand; set ALIGNZEG_MODEL to the folder or Hub "
            "id of a checkpoint, or call register_zoo_model_source with the URL of this repository."
        )
    import eta.core.utils as etau
    import eta.core.web as etaw

    from fiftyone.utils.github import GitHubRepository

    folder.mkdir()
    if urlsplit(url).hostname == "github.com":
        GitHubRepository(url).download(str(folder))
    else:
        archive = str(folder / Path(urlsplit(url).path).name)
        etaw.download_file(url, path=archive)
        etau.extract_archive(archive)
    found = next(folder.rglob(f"{place}/config.json"), None)
    if found is None:
        raise ValueError(
            f"The registered source {url} contains no {place}; register another one, or set ALIGNZEG_MODEL to the folder "
            "or Hub id of a checkpoint."
        )
    return found.parent
