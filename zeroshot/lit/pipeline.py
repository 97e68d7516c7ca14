# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The whole training: features of photographs, text tower, projection, and evaluation."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTokenizer, set_seed

from modeling_alignzeg.prompts_alignzeg import TEMPLATE_SETS

from ..tokenization import build_tokenizer
from .checkpoint import WEIGHTS, LiT
from .features import NAMED, SCENES, named_features, scene_features, select_named
from .measure import cells_miou, naming_accuracy, segment_accuracy
from .names import COCO_NAMES, GENERAL_NAMES, MSRC_CLASSES, MSRC_NAMES, SYNONYMS, english_name
from .photos import open_label, open_photo, read_photos, to_pixels
from .projection import NamedPhotos, Projection, ProjectionTrainer, Recipe, TaggedPhotos
from .teacher import Teacher
from .text import (
    MAX_TOKENS,
    MORE_TEMPLATES,
    TextTower,
    distil,
    embed_names,
    embed_texts,
    measure_text,
    training_texts,
)
from .tower import fold_batch_norms, load_tower
from .vocabulary import Vocabulary
from .wordnet import WordNet, write_phrases


VARIANTS = ("all", "held_out_names", "no_msrc_tags", "no_tags")  # training data of the projection
SMALLEST_TAG = 64  # minimum pixels of a class for a tag
IDS = {
    "msrc": [MSRC_CLASSES.index(name) + 1 for name in MSRC_NAMES],
    "coco_panoptic": list(COCO_NAMES),
}
NAMES = {"msrc": MSRC_NAMES, "coco_panoptic": list(COCO_NAMES.values())}


@dataclass
class Settings:
    """Settings of a run."""

    photos: str
    wordnet: str
    cache: Path
    architecture: str
    resolution: int  # short side of scenes in pixels
    named_side: int  # short side of named photographs, near the tower's training size
    per_name: int
    nouns: int
    vocab_size: int
    text_steps: int
    templates: str
    recipe: Recipe
    seed: int
    text_from: Path | None = None  # folder of an earlier text tower to continue from

    @property
    def text_folder(self) -> Path:
        """Path of the trained text tower in the cache."""
        name = f"text-{self.nouns}-{self.vocab_size}-{self.text_steps}"
        if self.seed:
            name += f"-seed{self.seed}"
        if self.text_from:  # caches may have folders of the same name
            name += f"-from-{hashlib.sha256(str(self.text_from.resolve()).encode()).hexdigest()[:12]}"
        return self.cache / name


@dataclass
class Scenes:
    """Photographs with label maps: `cells`, followed by mirrored ones if any, and `labels`."""

    cells: list[torch.Tensor]
    labels: list[np.ndarray]

    def tagged(self, kind: str) -> TaggedPhotos:
        """The same photographs with tags instead of label maps, like web captions that mention every class."""
        rows = [[bool((label == index).sum() >= SMALLEST_TAG) for index in IDS[kind]] for label in self.labels]
        tags = torch.tensor(rows * (len(self.cells) // len(rows)))
        return TaggedPhotos(self.cells, tags, NAMES[kind])


@dataclass
class Data:
    """Training and evaluation data of the projection."""

    rows: list[dict]
    views: torch.Tensor
    vocabulary: Vocabulary
    scenes: dict[str, Scenes]
    held_out_photos: torch.Tensor = field(init=False)
    held_out_names: list[int] = field(init=False)

    def __post_init__(self):
        # Every fifth photograph of Caltech and every tenth name are held out.
        number = lambda row: int(row["source"].rsplit("_", 1)[-1])
        held_out = ["caltech" in row["source"] and number(row) % 5 == 0 for row in self.rows]
        self.held_out_photos = torch.tensor(held_out)
        names = sorted(set(self.vocabulary.photo_names.tolist()))
        self.held_out_names = random.Random(0).sample(names, len(names) // 10)

    def strings(self) -> list[str]:
        """All texts that are used as names."""
        spoken = [word for words in SYNONYMS.values() for word in words]
        return list(dict.fromkeys([*self.vocabulary.names, *MSRC_NAMES, *COCO_NAMES.values(), *spoken]))


def image_names(photos: str) -> list[str]:
    """All names of photographs, with synonyms and more general names."""
    named = [english_name(row) for name in NAMED for row in read_photos(photos, name)]
    spoken = [word for words in SYNONYMS.values() for word in words]
    return list(dict.fromkeys([*named, *COCO_NAMES.values(), *MSRC_NAMES, *spoken, *GENERAL_NAMES]))


@torch.inference_mode()
def imagenet_accuracy(settings: Settings, side: int, every: int = 2) -> float:
    """Top-1 accuracy of the tower and its classifier on every second ImageNet photograph, to verify the conversion.

    The photographs are in the order of class ids and keep their aspect ratio.
    """
    tower = fold_batch_norms(load_tower(settings.architecture))
    rows = read_photos(settings.photos, NAMED[0])
    hits = [
        tower(open_photo(rows[index]["image"], side)[None]).argmax().item() == index
        for index in range(0, len(rows), every)
    ]
    return sum(hits) / len(hits)


def teach_text(settings: Settings) -> dict:
    """Trains the text tower or loads it from the cache, and returns its results."""
    torch.set_num_threads(1)
    set_seed(settings.seed)
    folder = settings.text_folder
    if not (folder / "text.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        wordnet, names, teacher = WordNet(settings.wordnet), image_names(settings.photos), Teacher()
        nouns, spoken = wordnet.nouns(settings.nouns), [name.lower() for name in names]
        held_out = random.Random(0).sample([noun for noun in nouns if noun not in set(spoken)], 500)
        nouns = list(dict.fromkeys([*spoken, *(noun for noun in nouns if noun not in set(held_out))]))
        templates = (*TEMPLATE_SETS["vild"], *MORE_TEMPLATES)
        common = [noun for noun in wordnet.nouns(9000) if noun not in set(held_out)]
        phrases = write_phrases(common, wordnet.adjectives(300), 12000, settings.seed)
        texts = training_texts(nouns, phrases, templates, settings.seed)
        if settings.text_from:
            tower, tokenizer = load_text(settings.text_from)
            rate = 7e-4
        else:
            corpus = [noun for noun in nouns for _ in range(min(20, 1 + wordnet.counts.get(noun, 0)))] + 5 * spoken
            tokenizer = build_tokenizer(
                corpus + 300 * [text.format("x") for text in templates], MAX_TOKENS, settings.vocab_size
            )
            tower, rate = TextTower.create(tokenizer), 1e-3
            tower.start_from(tokenizer, teacher)
        targets = _teach(teacher, texts, settings)
        distil(tower, tokenizer, texts, targets, settings.text_steps, learning_rate=rate)
        tokenizer.save_pretrained(folder)
        save_file({key: value.contiguous() for key, value in tower.state_dict().items()}, folder / "text.safetensors")
        student = lambda texts: embed_texts(tower, tokenizer, texts)
        measured = {"texts": len(texts), "held_out_nouns": len(held_out)}
        measured |= measure_text(student, teacher, held_out, names)
        (folder / "text.json").write_text(json.dumps(measured, indent=2) + "\n")
    return json.loads((folder / "text.json").read_text())


def _teach(teacher: Teacher, texts: list[str], settings: Settings) -> torch.Tensor:
    path = settings.cache / f"teacher-{settings.nouns}-{settings.seed}.safetensors"
    if path.is_file() and len(kept := load_file(path)["embeddings"]) == len(texts):
        return kept.float()
    embeddings = teacher(texts, progress=True)
    save_file({"embeddings": embeddings.half()}, path)
    return embeddings


def load_text(folder: Path) -> tuple[TextTower, CLIPTokenizer]:
    """Loads a text tower of [`teach_text`] from the cache, and its tokenizer."""
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tower = TextTower.create(tokenizer)
    tower.load_state_dict(load_file(folder / "text.safetensors"))
    return tower.eval(), tokenizer


def load_data(settings: Settings) -> Data:
    """Features of all photographs, from the cache if possible."""
    common = {"photos": settings.photos, "cache": settings.cache, "architecture": settings.architecture}
    rows, views = [], []
    for name in NAMED:
        all_rows = read_photos(settings.photos, name)
        chosen = [all_rows[index] for index in select_named(all_rows, settings.per_name)]
        rows += [{"name": row["name"], "source": row["source"]} for row in chosen]
        views.append(named_features(**common, name=name, side=settings.named_side, per_name=settings.per_name))
    scenes = {}
    for name in SCENES:
        cells = scene_features(**common, name=name, side=settings.resolution, mirrored=name.endswith("train"))
        scenes[name] = Scenes(cells, [open_label(row["label"]) for row in read_photos(settings.photos, name)])
    return Data(rows, torch.cat(views), Vocabulary.build(rows, WordNet(settings.wordnet)), scenes)


def cache_features(settings: Settings) -> None:
    """Computes the cache for [`load_data`], in a separate process."""
    torch.set_num_threads(1)
    load_data(settings)


def train_projection(
    data: Data, settings: Settings, classifier: nn.Linear, text: dict[str, torch.Tensor], variant: str
) -> Projection:
    """Trains a projection.

    Args:
        data: the photographs.
        settings: settings of the run.
        classifier: the tower's classifier.
        text: unit vector of every name.
        variant: `all`, or the data to leave out: `no_msrc_tags`, `no_tags` or `held_out_names`.

    Raises:
        ValueError: `variant` is unknown.
    """
    if variant not in VARIANTS:
        raise ValueError(f"`variant` is {variant!r}; expected one of {', '.join(VARIANTS)}.")
    allowed = torch.ones(len(data.vocabulary.names), dtype=torch.bool)
    if variant == "held_out_names":
        allowed[data.held_out_names] = False
    kinds = {"no_msrc_tags": ["coco_panoptic"], "no_tags": []}.get(variant, ["msrc", "coco_panoptic"])
    tagged = [data.scenes[f"{kind}_train"].tagged(kind) for kind in kinds]
    trained = ~data.held_out_photos
    named = NamedPhotos(data.views[trained], data.vocabulary.photo_names[trained])
    trainer = ProjectionTrainer(settings.recipe, data.vocabulary, allowed, named, tagged, classifier, text)
    return trainer.train()


def measure(data: Data, projection: Projection, text: dict[str, torch.Tensor]) -> dict:
    """All evaluation results of image and text together, by name."""
    stack = lambda names: torch.stack([text[name] for name in names])
    result = {}
    for kind, split in (("msrc", "validation"), ("msrc", "test"), ("coco_panoptic", "test")):
        scenes = data.scenes[f"{kind}_{split}"]
        arguments = (projection, scenes.cells, scenes.labels, IDS[kind], stack(NAMES[kind]))
        result[f"{kind}_{split}_segments"] = segment_accuracy(*arguments)
        if kind == "msrc":
            result[f"{kind}_{split}_cells"] = cells_miou(*arguments)
    vocabulary, names = data.vocabulary, stack(data.vocabulary.names)
    whole, labels = data.views[:, 0, 0], data.vocabulary.photo_names
    caltech = torch.tensor(["caltech" in row["source"] for row in data.rows])
    choices = {"among_all": labels.unique(), "among_own": labels[caltech].unique()}
    rows = data.held_out_photos & ~torch.isin(labels, torch.tensor(data.held_out_names))
    for key, chosen in choices.items():
        result[f"caltech_{key}"] = naming_accuracy(projection, whole[rows], labels[rows], names, chosen)
    rows, own = torch.isin(labels, torch.tensor(data.held_out_names)), torch.tensor(data.held_out_names)
    for key, chosen in {"among_all": labels.unique(), "among_own": own}.items():
        result[f"held_out_names_{key}"] = naming_accuracy(projection, whole[rows], labels[rows], names, chosen)
    result["names"] = {"all": len(choices["among_all"]), "general": len(vocabulary.names) - len(choices["among_all"])}
    return result


def name_texts(settings: Settings, data: Data, tower: TextTower, tokenizer: CLIPTokenizer) -> dict[str, torch.Tensor]:
    """Unit vector of every name: the mean over the templates of the run."""
    names = data.strings()
    embed = lambda texts: embed_texts(tower, tokenizer, texts)
    return dict(zip(names, embed_names(embed, names, TEMPLATE_SETS[settings.templates])))


@torch.inference_mode()
def time_segmentation(lit: LiT, resolution: int, repeats: int = 3) -> float:
    """Seconds for one photograph of 640 x 480 pixels and 21 names in all ViLD templates, on two threads."""
    from PIL import Image

    torch.set_num_threads(2)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8))
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        embed = lambda texts: embed_texts(lit.text, lit.tokenizer, texts)
        text = embed_names(embed, MSRC_NAMES, TEMPLATE_SETS["vild"])
        scores = (lit.embed_cells(to_pixels(photo, resolution)[None]) @ text.T).permute(0, 3, 1, 2)
        nn.functional.interpolate(scores, size=(480, 640), mode="bilinear").argmax(1)
        seconds.append(time.perf_counter() - started)
    torch.set_num_threads(1)
    return min(seconds)


def measure_saved(folder: Path, settings: Settings, data: Data, lit: LiT) -> dict:
    """[`measure`] of a LiT loaded from a folder, with `megabytes` and `seconds_per_photo`."""
    size, seconds = (folder / WEIGHTS).stat().st_size / 1e6, time_segmentation(lit, settings.resolution)
    measured = measure(data, lit.projection, name_texts(settings, data, lit.text, lit.tokenizer))
    return {"megabytes": {"value": round(size, 2)}, "seconds_per_photo": {"value": round(seconds, 3)}, **measured}


def summarise(measured: dict) -> dict:
    """The main results of [`measure`] for one line, in percent."""
    short = {key: value for key, value in measured.items() if isinstance(value, float)}
    for key, value in measured.items():
        if isinstance(value, dict):
            short |= {f"{key}_{name}": value[name] for name in ("class_mean", "miou") if name in value}
    values = {key: value["value"] for key, value in measured.items() if isinstance(value, dict) and "value" in value}
    return {**values, **{key: round(100 * value, 1) for key, value in short.items()}}


class Report:
    """Results that are saved after every addition, so that an interrupted run keeps them."""

    def __init__(self, path: Path, settings: Settings):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.started = path, time.time()
        folders = ("photos", "wordnet", "cache", "text_from")  # specific to this machine
        kept = {key: value for key, value in asdict(settings).items() if key not in folders}
        self.numbers: dict = {"settings": {**kept, "text_goes_on": settings.text_from is not None}}

    def add(self, key: str, value: object) -> None:
        """Stores a value and prints it."""
        self.numbers[key] = value
        self.numbers["seconds"] = round(time.time() - self.started)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.numbers, indent=2) + "\n")
        os.replace(partial, self.path)
        shown = summarise(value) if isinstance(value, dict) and "msrc_test_cells" in value else value
        print(f"[{self.numbers['seconds']:>5} s] {key}: {json.dumps(shown)}", flush=True)
