# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Settings of a training: dataclasses define the defaults, a YAML preset overrides them, options override both.

    train.py --config scripts/configs/embedded.yaml --training.steps 100 --model.config.num_queries 50

A preset may build on others: `base: [base/vitb16.yaml, base/voc2012.yaml]`, relative to its own folder; later entries
    win. Hyper-parameters of the model are not repeated here: `model.config` overrides [`AlignZegConfig`] by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
from argparse import RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from .files import parse_yaml, read_text, shown


EXPECTED = {
    PositiveInt: "a whole number ≥ 1",
    NonNegativeInt: "a whole number ≥ 0",
    PositiveFloat: "a number > 0",
    NonNegativeFloat: "a number ≥ 0",
    ClosedUnitInterval: "a number from 0 to 1",
    bool: "true or false",
    dict: "names and values, such as {name: value}",
    list: "a list, such as [first, second]",
}


@dataclass
class ModelSettings:
    """Model: its source.

    Attributes:
        checkpoint: An AlignZeg checkpoint (folder or hub id) to start from; `clip` and `config` are then ignored.
        checkpoint_config: Overrides of the checkpoint's configuration. Parts that it lacks or that have another shape start
            with new weights.
        clip: A CLIP to start from: folder or hub id of a transformers CLIP, MetaCLIP 2 or SigLIP, or a name of open_clip.
        pretrained: With open_clip, the tag or file of the weights.
        random_weights: With open_clip, initialise randomly: for tests of size and speed, not for training.
        config: Overrides of `AlignZegConfig`, by name.
        image_processor: Overrides of `AlignZegImageProcessor`, by name.
    """

    checkpoint: str | None = None
    checkpoint_config: dict[str, Any] = field(default_factory=dict)
    clip: str | None = None
    pretrained: str | None = None
    random_weights: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    image_processor: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataSettings:
    """Data: datasets and how to read them.

    Attributes:
        dataset: A benchmark name of `zeroshot.data.benchmarks.load_benchmark`, a hub id or a local folder.
        root: Folder of a named benchmark's files.
        split: Name of a split, or a YAML file with classes and unseen classes; default: the split of `dataset`.
        train_part: Part of the dataset to train on.
        validation_part: Part of the dataset to evaluate on.
        num_train: Use only the first N training images (for embedded scenes: generate N).
        num_validation: Use only the first N validation images (for embedded scenes: generate N).
        image_column: Image column of a dataset that is not a named benchmark.
        label_column: Label column of a dataset that is not a named benchmark.
        image_folder: Subfolder of images, if `dataset` is a folder; `{part}` in it is replaced by the part.
        label_folder: Subfolder of label files, if `dataset` is a folder, or the one to use if a benchmark has several.
        image_suffix: Suffix of image names before the file extension, if `dataset` is a folder: `_leftImg8bit`.
        label_suffix: Suffix of label map names, if `dataset` is a folder: `_L`.
        label_file: COCO JSON file (instances or panoptic), if `dataset` is a folder; `{part}` is replaced by the part.
        context_459_ids: The label files of PASCAL Context have the original ids 1..459 instead of 0..59.
        scene_seed: Seed of the embedded scenes.
        transform: Arguments of `zeroshot.data.transforms.TrainTransform`.
        in_memory: Decode the training images once and keep them in memory.
        cached_epochs: Run the frozen image tower only on the samples of the first N epochs, keep its hidden states in
            memory, and repeat these epochs. 1 is exact if the transform is deterministic; with random crops,
            N is the number of augmented versions of each image. 0 runs the tower in every step.
        feature_folder: Store these hidden states in files in this folder, for later runs on the same samples and tower.
        augmentation_seed: Seed of the transform; default: `seed`. Lets runs with different seeds share cached features.
        validate: Read the whole dataset once before training, and stop if a file is missing or unusable.
        pseudo_unseen: Share of the seen classes to treat as unseen; the real unseen classes are then ignored. For
            choosing hyper-parameters without labels of unseen classes; 0 is the real task.
        pseudo_fold: Which of these classes; folds do not overlap until all classes had their turn.
        fully_supervised: Train with the labels of all classes: the upper reference, not zero-shot.
        transductive: Self-training: `model.checkpoint`, trained on the seen classes, labels unseen ones in the
            training images where these are unlabelled, and the training goes on with both.
        transductive_threshold: Minimum share of the best unseen class in the summed scores of unseen classes and
            background.
        num_workers: Loader processes.
    """

    dataset: str = "embedded_scenes"
    root: str | None = None
    split: str | None = None
    train_part: str = "train"
    validation_part: str = "validation"
    num_train: PositiveInt | None = None
    num_validation: PositiveInt | None = None
    image_column: str = "image"
    label_column: str = "label"
    image_folder: str | None = None
    label_folder: str | None = None
    image_suffix: str | None = None
    label_suffix: str | None = None
    label_file: str | None = None
    context_459_ids: bool = False
    scene_seed: NonNegativeInt = 0
    transform: dict[str, Any] = field(default_factory=dict)
    in_memory: bool = False
    cached_epochs: NonNegativeInt = 0
    feature_folder: str | None = None
    augmentation_seed: NonNegativeInt | None = None
    validate: bool = True
    pseudo_unseen: ClosedUnitInterval = 0.0
    pseudo_fold: NonNegativeInt = 0
    fully_supervised: bool = False
    transductive: bool = False
    transductive_threshold: ClosedUnitInterval = 0.5
    num_workers: NonNegativeInt = 0


@dataclass
class TrainingSettings:
    """Training: schedule, optimizer, evaluation, checkpoints and logs.

    Attributes:
        steps: Optimizer steps.
        batch_size: Images per process and micro-step.
        gradient_accumulation_steps: Micro-steps per optimizer step.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW; norms, biases, position embeddings, queries and prototypes have none.
        warmup_steps: Steps of linear warm-up.
        schedule: Learning rate after warm-up: cosine to zero, polynomial (power 0.9) to zero, or constant.
        max_grad_norm: Gradients are clipped to this norm.
        log_every: Steps between two log entries; an entry contains means over these steps.
        evaluate_every: Steps between two evaluations; 0 disables evaluation.
        save_every: Steps between two training checkpoints; 0 disables them.
        keep_checkpoints: Number of training checkpoints to keep.
        best_metric: Score on the validation part that selects `best`. The default uses seen classes only:
            labels of unseen classes must not select a model.
        on_nan: What to do if a loss or gradient is not finite.
        trainable: Parts of the model to train, such as `[indicator]`; default: all but the frozen towers.
        num_threads: CPU threads of torch; 0 keeps torch's own choice.
        tensorboard: Log to TensorBoard as well as to `metrics.jsonl`.
        trackio: Log to trackio as well, if it is installed.
    """

    steps: PositiveInt = 60000
    batch_size: PositiveInt = 4
    gradient_accumulation_steps: PositiveInt = 1
    learning_rate: PositiveFloat = 1e-4
    weight_decay: NonNegativeFloat = 1e-4
    warmup_steps: NonNegativeInt = 1500
    schedule: Literal["cosine", "poly", "constant"] = "cosine"
    max_grad_norm: PositiveFloat = 1.0
    log_every: PositiveInt = 50
    evaluate_every: NonNegativeInt = 5000
    save_every: NonNegativeInt = 1000
    keep_checkpoints: PositiveInt = 2
    best_metric: Literal["miou_seen", "miou_unseen", "hiou", "pixel_accuracy", "miou"] = "miou_seen"
    on_nan: Literal["stop", "skip"] = "stop"
    trainable: list[str] = field(default_factory=list)
    num_threads: NonNegativeInt = 0
    tensorboard: bool = True
    trackio: bool = False


@dataclass
class Settings:
    """Run: output folder, seed and resume.

    Attributes:
        output_dir: Folder of the run: training checkpoints, logs and the final model.
        seed: Seed of weights, sample order, augmentation and random choices in the loss.
        resume: Resume from the newest complete training checkpoint in `output_dir`, if there is one.
    """

    output_dir: str = "runs/alignzeg"
    seed: NonNegativeInt = 0
    resume: bool = True
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the layout of the description."""


class SettingsParser(ArgumentParser):
    """Parser of a script that trains: one option per field of [`Settings`], `--config`, and the script's own options.

    Every error is a ValueError; for an unknown key it suggests the closest known one.
    """

    def __init__(self, description: str | None = None) -> None:
        super().__init__(
            description=description,
            usage="%(prog)s [--config FILE] [--section.key VALUE ...]",
            formatter_class=_HelpFormatter,
            print_config=None,
            allow_abbrev=False,
        )
        self.add_argument("--config", action=_Preset, metavar="FILE", help="YAML preset; later options override it")
        self.add_class_arguments(Settings)

    def parse(self, arguments: list[str] | None = None) -> tuple[Namespace, Settings]:
        """The script's own options, and the settings.

        Raises:
            ValueError: An option or key is unknown, or a value has the wrong type or range.
        """
        args = self.instantiate(self.parse_args(sys.argv[1:] if arguments is None else arguments))
        return args, Settings(**{each.name: args[each.name] for each in dataclasses.fields(Settings)})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if wrong := re.match(r'Parser key "([\w.]+)":.*', message, re.DOTALL):
            message = self._wrong_value(wrong[1], message)
        patterns = (
            r"unrecognized arguments: --([\w.]+)",
            r"Group '(?P<group>[\w.]+)' does not accept option '(\w+)'",
            r"Option '(\w+)' is not accepted",
        )
        for match in filter(None, (re.search(pattern, message) for pattern in patterns)):
            name = ".".join(match.groups())
            known = [action.dest for action in self._actions]
            close = difflib.get_close_matches(name, known, n=1)
            close = close or [each for each in known if each.rpartition(".")[2] == name.rpartition(".")[2]][:1]
            message = f"There is no setting `{name}`" + (f"; did you mean `{close[0]}`?" if close else ".")
        raise ValueError(message) from ex

    def _wrong_value(self, key: str, message: str) -> str:
        """A sentence about a value of the wrong type or range, in place of jsonargparse's message."""
        action = next((each for each in self._actions if each.dest == key), None)
        value = re.search(r"(?:Got value: |Given value: |with base 10: |string to float: )(.+)", message)
        value = value or re.search(r"type \w+: (.+) does not conform", message)
        kind = getattr(action, "_typehint", None)
        if type(None) in get_args(kind):
            kind = get_args(kind)[0]
        expected = EXPECTED.get(get_origin(kind) or kind)
        if get_origin(kind) is Literal:
            expected = f"one of {', '.join(get_args(kind))}"
        if value is None or not expected:
            return re.sub(r'^Parser key "([\w.]+)":\s*', r"`\1`: ", message)
        return f"`{key}` is {value[1].strip()}; expected {expected}."


class _Preset(ActionConfigFile):
    def __call__(self, parser, cfg, values, option_string=None) -> None:
        preset = json.dumps(read_preset(values), default=str)  # dates become strings
        self.apply_config(parser, cfg, self.dest, preset)


def load_settings(arguments: list[str]) -> Settings:
    """Settings from `--config FILE` and `--section.key value` options; see [`SettingsParser.parse`]."""
    return SettingsParser().parse(arguments)[1]


def read_preset(path: str | Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Reads a YAML preset and merges it over the presets in its `base`.

    Raises:
        ValueError: A file cannot be read, has a duplicate key, or builds on itself.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`--config` refers to {str(path)!r}, which is not a file.")
    if path.resolve() in seen:
        raise ValueError(f"The preset {path} builds on itself; check `base`.")
    own = parse_yaml(read_text(path), path) or {}
    if not isinstance(own, dict):
        raise ValueError(f"{path} contains {shown(own)}; expected names and values, such as `seed: 0`.")
    own = {name: value for name, value in own.items() if value is not None}  # empty sections
    for section in {"model", "data", "training"} & own.keys():
        if not isinstance(own[section], dict):
            raise ValueError(f"`{section}` in {path} is {shown(own[section])}; expected names and values.")
    bases = own.pop("base", [])
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        merged = _merge(merged, read_preset(path.parent / base, (*seen, path.resolve())))
    return _merge(merged, own)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for name, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(name), dict)
        result[name] = _merge(below[name], value) if both else value
    return result


@dataclass
class ClipPretraining:
    """Pretraining of the small CLIP.

    Attributes:
        output_dir: Folder to write the model to.
        steps: Optimizer steps; the last third uses more scenes.
        pool_singles: Single-object images generated per phase and mirrored.
        pool_scenes: Scenes generated per phase and mirrored.
        learning_rate: Peak learning rate.
        weight_decay: Weight decay of AdamW.
        warmup_steps: Steps of linear warm-up, followed by cosine decay to zero.
        eval_per_class: Held-out single-object images per class.
        seed: Seed of weights, images and sample order.
        num_threads: Threads of torch.
    """

    output_dir: str
    steps: PositiveInt = 6000
    pool_singles: PositiveInt = 32768
    pool_scenes: PositiveInt = 6144
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.05
    warmup_steps: PositiveInt = 300
    eval_per_class: PositiveInt = 30
    seed: NonNegativeInt = 0
    num_threads: PositiveInt = 1
